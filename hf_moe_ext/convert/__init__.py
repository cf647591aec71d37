"""Checkpoint in, checkpoint out: a trained Mixture-of-Experts model in another form.

``to_dcca`` replaces the MoE blocks of a Mixtral- or OLMoE-type checkpoint by DCCA blocks (descend, communicate,
communicate, ascend), fitted on a calibration text. It reads one decoder layer at a time, so the whole model is never in
memory, and writes a folder that ``AutoModelForCausalLM.from_pretrained`` opens.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_moe_ext.convert.to_dcca import to_dcca

__all__ = ["to_dcca"]


def __getattr__(name: str) -> Any:
    """Resolve public names on first use (PEP 562): the package imports neither torch nor transformers."""
    if name in __all__:
        value = getattr(importlib.import_module(f"hf_moe_ext.convert.{name}"), name)
        # Importing the submodule of the same name has put the module here; the function is what is public.
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
