"""What is not even tried."""

from types import SimpleNamespace

import pytest
import torch

from hf_moe_ext.pilot.candidates import BY_NAME
from hf_moe_ext.pilot.subject import NUMBERS_PER_TRAINED_PARAMETER
from hf_moe_ext.pilot.trials import leave_out_too_large

CANDIDATES = [BY_NAME["perft-r"], BY_NAME["full"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_takes_the_bytes_that_are_counted(dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(8, 8, bias=False, dtype=dtype)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 8, dtype=dtype)).sum().backward()
    optimizer.step()
    held = [layer.weight, layer.weight.grad, *(s for s in optimizer.state[layer.weight].values() if s.ndim)]
    taken = sum(tensor.numel() * tensor.element_size() for tensor in held)
    assert taken == NUMBERS_PER_TRAINED_PARAMETER * dtype.itemsize * layer.weight.numel()


def test_all_weights_are_left_out_where_their_type_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=24e9))
    left, why = leave_out_too_large(CANDIDATES, 10**9, "float32", 2)
    assert [c.name for c in left] == ["perft-r"]
    assert why == {"full": "training all weights takes at least 32.0 GB in 2 processes, and 24.0 GB of memory are free"}
    for dtype in ("bfloat16", "float16"):
        assert leave_out_too_large(CANDIDATES, 10**9, dtype, 2) == (CANDIDATES, {})
