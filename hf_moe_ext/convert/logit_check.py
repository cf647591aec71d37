"""What conversions compare two models by: their logits on a few random tokens."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

_CHECKED_ROWS, _CHECKED_LENGTH = 2, 16
# Of logits of the order of 1 in a small model. Rounding in float32 (sums of gates, other shapes of the same products) adds
# up over layers, and over the terms of a product as a random walk: measured 2e-6 to 3e-6 of the greatest logit in random
# models of 12 to 24 layers and widths 512 to 1024, a sixth of what this allows.
_BOUND, _SMALL = 1e-6, 32


def draw_tokens(config: Any) -> Tensor:
    """A few random rows, the same ones each time."""
    length = min(_CHECKED_LENGTH, config.max_position_embeddings)
    return torch.randint(config.vocab_size, (_CHECKED_ROWS, length), generator=torch.Generator().manual_seed(0))


def load_plain(folder: Path, dtype: torch.dtype | None = None, **keys: Any) -> Any:
    """A model for inference that computes in plain loops, which every type has and which are the same in all models.

    Args:
        folder: of the checkpoint.
        dtype: to load it in; None: as its config.json says.
        keys: of the configuration, in place of those in the folder.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", attn_implementation="eager", experts_implementation="eager", **keys
    )
    _align(model)
    return model.eval()


def _align(model: torch.nn.Module) -> None:
    """Weights mapped from a file lie where its header ends; a product may add up in another order there (MKL on an AMD EPYC)."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def bound(num_layers: int, hidden_size: int, max_logit: float) -> float:
    """Greatest difference of a logit that rounding explains: 1e-6, times the greatest logit, times L sqrt(d) / 32."""
    return _BOUND * max(1.0, max_logit) * max(1.0, num_layers * hidden_size**0.5 / _SMALL)
