"""Encodings: predicted bytes are those of the tensors, predicted errors those of the codes."""

from typing import Any

import pytest
import torch

from hf_moe_ext.convert.delta_encoding import Encoding, squared_errors
from hf_moe_ext.ders.delta_state import stack_deltas
from hf_moe_ext.ops.delta_measures import output_norm
from hf_moe_ext.ops.delta_positions import MaskStream

SHAPE = (40, 72)
ENCODINGS = [
    Encoding("random_drop", drop_rate=0.7),
    *(Encoding("random_drop", drop_rate=0.7, bits=bits) for bits in (8, 4, 2, 1)),
    Encoding("magnitude_drop", drop_rate=0.7),
    *(Encoding("magnitude_drop", drop_rate=0.7, bits=bits, group_size=32) for bits in (8, 4, 2, 1)),
    Encoding("svd", rank=5),
    *(Encoding("quantize", bits=bits, group_size=32) for bits in (16, 8, 4, 2, 1)),
]


def draw(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=generator) * torch.linspace(0.2, 2, SHAPE[1])


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.label())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_stored_tensors(encoding: Encoding, dtype: torch.dtype) -> None:
    codes = [encoding.encode(draw(i), MaskStream(0, 0, 0, i), dtype) for i in range(3)]
    state = stack_deltas(codes)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert stored == 3 * encoding.count_bytes(SHAPE, dtype)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.label())
def test_predicted_error_is_that_of_the_code(encoding: Encoding) -> None:
    delta, moments = draw(), torch.linspace(3, 0.5, SHAPE[1])
    predicted = squared_errors(delta, [encoding], moments)[0]
    codes = [encoding.encode(delta, MaskStream(seed), torch.float32) for seed in range(40)]
    found = sum(output_norm(code.decode() - delta, moments) ** 2 for code in codes) / len(codes)
    # A drop by chance: an average of 40 masks.
    tolerance = {"random_drop": 0.01, "magnitude_drop": 1e-6, "svd": 1e-4, "quantize": 1e-6}[encoding.method]
    assert found == pytest.approx(predicted, rel=tolerance, abs=1e-9)


@pytest.mark.parametrize("method", ["random_drop", "magnitude_drop", "svd", "quantize"])
def test_grids_ascend_in_bytes_and_fall_in_error(method: str) -> None:
    grid = Encoding(method).grid(SHAPE)
    sizes = [encoding.count_bytes(SHAPE, torch.bfloat16) for encoding in grid]
    errors = squared_errors(draw(), grid, torch.ones(SHAPE[1]))
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert len(grid) >= 5


@pytest.mark.parametrize("num_experts", [2, 4, 8, 64])
def test_break_even_is_where_bytes_cross(num_experts: int) -> None:
    """Section 3.6's table: seed 0.25, int32 0.75 for four experts in bfloat16, and the bytes themselves."""
    shape, dense = (256, 512), 256 * 512 * 2
    for method, entry in (("random_drop", 1.0), ("magnitude_drop", 3.0)):
        bound = 1 - (num_experts - 1) / (num_experts * entry)
        text = Encoding(method, drop_rate=0.5).break_even(shape, torch.bfloat16, num_experts)
        assert text == f"drop_rate above {bound:.4g}"
        for rate, saves in ((bound + 0.01, True), (bound - 0.01, False)):
            if 0 < rate < 1:
                size = Encoding(method, drop_rate=rate).count_bytes(shape, torch.bfloat16)
                assert (dense + num_experts * size < num_experts * dense) is saves
    rank = float(Encoding("svd", rank=1).break_even(shape, torch.bfloat16, num_experts).split()[-1])
    for number, saves in ((int(rank), True), (int(rank) + 1, False)):
        size = Encoding("svd", rank=number).count_bytes(shape, torch.bfloat16)
        assert (dense + num_experts * size <= num_experts * dense) is saves
    assert Encoding("quantize", bits=4).break_even(shape, torch.bfloat16, 4) == "bits + 16 / group_size below 12"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"method": "pca"}, "encode must be one of random_drop, magnitude_drop, svd, quantize, got 'pca'"),
        ({"method": "svd", "drop_rate": 0.5}, "drop_rate=0.5 has no effect with encode='svd'"),
        ({"method": "random_drop", "rank": 4}, "rank=4 has no effect with encode='random_drop'"),
        ({"method": "random_drop", "drop_rate": 1.0}, "drop_rate must lie strictly between 0 and 1"),
        ({"method": "random_drop", "bits": 16}, "bits must be one of 8, 4, 2, 1 with encode='random_drop', got 16"),
        ({"method": "svd", "bits": 4}, "bits must be left out with encode='svd', got 4"),
        ({"method": "quantize", "bits": 3}, "bits must be one of 16, 8, 4, 2, 1 with encode='quantize', got 3"),
        ({"method": "quantize", "group_size": 0}, "group_size must be a positive int, got 0"),
    ],
)
def test_bad_numbers(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="^.*" + words.replace("(", r"\(")):
        Encoding(**keys)


def test_filled_in_for_a_shape() -> None:
    assert Encoding("svd").fill_in((40, 72)).rank == 5
    assert Encoding("random_drop").fill_in(SHAPE).drop_rate == 0.6
    assert Encoding("quantize").fill_in(SHAPE).bits == 4
    with pytest.raises(ValueError, match="at most 40, the smaller dimension"):
        Encoding("svd", rank=41).fill_in(SHAPE)
    with pytest.raises(ValueError, match=r"drop_rate=0.9999 keeps no entry of a 4 x 8 matrix"):
        Encoding("random_drop", drop_rate=0.9999).fill_in((4, 8))
