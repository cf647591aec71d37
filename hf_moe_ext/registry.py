"""The seams to other libraries: which of our modules loads after which top-level package is imported.

The hooks sit on top-level packages only. On a submodule they would fire inside Transformers' own import cycle, where
half of its names do not exist yet. A hook does nothing but import our feature module, which registers itself,
idempotently, on its last line; so nothing is loaded that the user did not load, and the order of imports is free.
"""

import importlib
from types import ModuleType

import wrapt

FEATURES = {
    "peft": ("hf_moe_ext.perft",),
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
