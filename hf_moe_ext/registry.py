"""The seams to other libraries: which of our modules loads after which top-level package is imported.

The hooks sit on top-level packages only. On a submodule they would fire inside Transformers' own import cycle, where
half of its names do not exist yet: ``from transformers import OlmoeConfig`` imports the table of configurations in the
middle of the module that defines that class. A hook does nothing but import our feature module, which registers itself,
idempotently, on its last line; so the order of imports is free. What is registered for Transformers are configurations
and the expert dispatch, which load what its ``AutoConfig`` loads too (torch, for one); the model classes wait for the
first configuration that is made.
"""

import importlib
from types import ModuleType
from typing import Any

import wrapt

FEATURES = {
    "peft": ("hf_moe_ext.perft",),
    "transformers": ("hf_moe_ext.models", "hf_moe_ext.dcca.dispatch"),
}

_installed = False


def install() -> None:
    """Leave the post-import hooks; a second call does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    for package in FEATURES:
        wrapt.register_post_import_hook(_load_features, package)


def _load_features(package: ModuleType) -> None:
    for name in FEATURES[package.__name__]:
        importlib.import_module(name)


def register_tuner(peft_type: Any, config: type, tuner: Any) -> None:
    """Enter a tuner in PEFT's tables; a second call with the same classes does nothing.

    PEFT has no entry points, and its own ``register_peft_method`` takes only names of its closed enumeration. Loaders
    look types up in three module-level tables, which a string-valued enumeration member fits.

    Raises:
        RuntimeError: another package holds the name.
    """
    from peft import mapping
    from peft.utils.peft_types import PeftType, register_peft_method

    name = peft_type.value
    holder = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if holder is config:
        return
    if holder is not None:
        raise RuntimeError(
            f"the PEFT type {name!r} is already held by {holder.__module__}.{holder.__qualname__}, so hf_moe_ext cannot "
            "register its own; uninstall one of the two packages, or upgrade hf_moe_ext if PEFT now ships this method"
        )
    if name in PeftType.__members__:  # should PEFT adopt the name without the method
        register_peft_method(name=name.lower(), config_cls=config, model_cls=tuner, prefix=tuner.prefix)
        return
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = tuner.prefix
