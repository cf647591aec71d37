"""Models whose experts share a base, on disk, and checkpoints with tensors changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.latent_models import DERS_BLOCKS, make_model
from support.words import build_tokenizer


def save(folder: Path, family: str, block: str = "low_rank", dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    """A model whose every delta differs from zero, on disk with a tokenizer; returns it."""
    # Fused, the same sums would be rounded elsewhere.
    forward = {"ders_forward": "materialised"} if block in DERS_BLOCKS else {}
    model = make_model(family, block, dtype=dtype, **forward, **keys)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            part = name.rpartition(".delta_")[2]
            if part.endswith(("_A", "_B", "_values")):
                tensor.copy_((torch.randn(tensor.shape, generator=generator) * 0.05).to(dtype))
            elif part.endswith("_codes"):
                tensor.copy_(torch.randint(0, 256, tensor.shape, generator=generator).to(tensor.dtype))
            elif part.endswith("_scales"):
                tensor.copy_((torch.rand(tensor.shape, generator=generator) * 0.01).to(tensor.dtype))
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return model


def edit(folder: Path, changes: dict[str, Callable[[Tensor], Tensor] | Tensor | None]) -> None:
    """Change tensors of a checkpoint of one file by name: a function of the old one, a new one, or None to take it out."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, change in changes.items():
        old = tensors.pop(name, None)
        if isinstance(change, Tensor):
            tensors[name] = change
        elif change is not None:
            tensors[name] = change(old)
    save_file(tensors, path, metadata={"format": "pt"})
