"""What the two tuner layers share: refusing to merge, to load what does not fit, and forgetting a deleted adapter."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_moe_ext.perft.state import PerftState
from hf_moe_ext.perft.tape import RouterRecord

MERGE_REFUSAL = (
    "PERFT adapters cannot be merged: they add a routed term to the block's output that no base weight can hold; "
    "keep the adapter beside the model (it loads and generates unmerged), or call unload() for the bare base model"
)


class PerftTunerLayer(nn.Module, BaseTunerLayer):
    """A module of the base model with PERFT parameters beside it.

    Attributes:
        state: shared by all layers of the model.
        record: what this block's routers did in the pass under way.
    """

    base_layer: nn.Module
    state: PerftState
    record: RouterRecord

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: a routed term has no place in the base weights."""
        raise ValueError(MERGE_REFUSAL)

    def unmerge(self) -> None:
        """Refuse: nothing was ever merged."""
        raise ValueError(MERGE_REFUSAL)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and what its routers have left behind: one of the same name starts anew."""
        super().delete_adapter(adapter_name)
        self.record.forget(adapter_name)
        self.state.coefficients.pop(adapter_name, None)

    def take_base_dtype(self, name: str) -> None:
        """Give the adapter ``name`` the base's half precision; packed or full-precision weights change nothing."""
        parameter = next(self.get_base_layer().parameters(), None)
        if parameter is None or parameter.dtype not in (torch.float16, torch.bfloat16):
            return
        for tensors in (getattr(self, attribute) for attribute in self.adapter_layer_names):
            if name in tensors:
                old = tensors[name]
                tensors[name] = nn.Parameter(old.detach().to(parameter.dtype), requires_grad=old.requires_grad)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # PEFT has filtered these keys already where ignore_mismatched_sizes asks for that.
        for key, parameter in self.named_parameters():
            value = state_dict.get(prefix + key)
            if key.startswith("perft_") and value is not None and value.shape != parameter.shape:
                self.state.refuse_load(
                    key.rpartition(".")[2],
                    f"adapter file: {prefix + key} has shape {tuple(value.shape)}, but this model with this configuration "
                    f"needs {tuple(parameter.shape)}; load it on the base model it was trained for",
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
