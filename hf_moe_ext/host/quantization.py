"""What a quantiser left as it was. Transformers' quantisers convert linear layers; fused experts mostly stay behind.

Read off the tensors, not off a table of libraries: a weight counts as quantised when what it stores is integers or
floats of one byte, whether it is a packed parameter (bitsandbytes, MXFP4, FP8) or a tensor subclass that looks like
bfloat16 from outside (torchao, quanto).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_moe_ext.host.blocks import iterate_experts

# Methods that convert modules of type nn.Linear and nothing else, in Transformers 5.23 (`param_needs_quantization`).
_LINEAR_ONLY = frozenset({"bitsandbytes", "quanto", "torchao"})


@dataclass(frozen=True)
class UnquantisedExperts:
    """Expert weights in their full precision.

    Attributes:
        method: what the rest was quantised with, as in ``quantization_config.quant_method``.
        tensors: (last name, shape, dtype) -> how many of them.
        expert_bytes: what they store.
        model_bytes: what all parameters and buffers of the model store; the scales that bitsandbytes keeps beside its
            parameters (some percent of these) are not among them.
    """

    method: str
    tensors: dict[tuple[str, tuple[int, ...], torch.dtype], int]
    expert_bytes: int
    model_bytes: int

    @property
    def share(self) -> float:
        """Of the model's bytes."""
        return self.expert_bytes / self.model_bytes

    def describe_tensors(self) -> str:
        """Such as ``16 x gate_up_proj [64, 2048, 2048] bfloat16``, one after the other."""
        return ", ".join(
            f"{count} x {name} {list(shape)} {str(dtype).removeprefix('torch.')}"
            for (name, shape, dtype), count in self.tensors.items()
        )


def unquantised_experts(model: nn.Module) -> UnquantisedExperts | None:
    """The expert weights that the quantiser of a quantised model left alone.

    Args:
        model: the Transformers model, with adapters or without; where it is sharded, the bytes are this process's.

    Returns:
        None for a model that Transformers has not quantised (an outline built from a quantised model's configuration
        is one), and for one whose experts all are.
    """
    # `config.quantization_config` is not asked: a model on the meta device has it too, with nothing quantised.
    if getattr(model, "hf_quantizer", None) is None:
        return None
    left = [(name, tensor) for _, name, tensor in expert_weights(model) if not is_quantised(tensor)]
    if not left:
        return None
    return UnquantisedExperts(
        quantization_method(getattr(model, "config", None)) or "an unnamed method",
        dict(Counter((name, tuple(tensor.shape), tensor.dtype) for name, tensor in left)),
        sum(stored_bytes(tensor) for _, tensor in left),
        sum(stored_bytes(tensor) for tensors in (model.parameters(), model.buffers()) for tensor in tensors),
    )


def expert_weights(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(path of the experts module, name of the tensor, tensor) of every expert weight; biases and scales are left out."""
    for site in iterate_experts(model):
        tensors = dict(site.experts.named_parameters())
        for name, tensor in tensors.items():
            # `gate_up_proj_scale_inv` belongs to `gate_up_proj`, and so does `gate_up_proj_bias`.
            belongs_to_another = any(name != other and name.startswith(other) for other in tensors)
            if tensor.ndim >= 2 and not belongs_to_another and not name.endswith("bias"):
                yield site.name, name.rpartition(".")[2], tensor


def is_quantised(tensor: Tensor) -> bool:
    """Whether it stores integers, or floats of one byte."""
    return any(not part.is_floating_point() or part.element_size() < 2 for part in stored_tensors(tensor))


def stored_bytes(tensor: Tensor) -> int:
    """Bytes a tensor stores; of a subclass those of the tensors inside, of a sharded one those of this process."""
    return sum(part.numel() * part.element_size() for part in stored_tensors(tensor))


def quantization_method(config: Any) -> str | None:
    """The method named by a model's configuration; None if it names none."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method)) if method else "unnamed method"


def quantises_linear_only(config: Any) -> bool:
    """Whether the method named by a model's configuration leaves fused experts alone, as far as a configuration tells."""
    # torchao's FqnToConfig names single tensors, experts too.
    return quantization_method(config) in _LINEAR_ONLY and "fqn" not in str(config.quantization_config).lower()


def stored_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that hold a tensor's values: itself, or those inside a subclass (torchao, quanto, DTensor)."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from stored_tensors(getattr(tensor, name))
    else:
        yield tensor
