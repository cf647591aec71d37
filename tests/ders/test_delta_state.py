"""Codes of single deltas to the state of ``DersExperts`` and back."""

import pytest
import torch
from torch import Tensor

from hf_moe_ext.ders.delta_state import stack_deltas
from hf_moe_ext.ops.delta_encoders import drop_at_random, drop_small, low_rank_from_svd
from hf_moe_ext.ops.delta_indices import FlatIndices, SeededIndices
from hf_moe_ext.ops.delta_positions import MaskStream
from hf_moe_ext.ops.delta_quantization import quantize
from hf_moe_ext.ops.deltas import SparseDelta
from support.ders_experts import EXPERTS, FORMS, HIDDEN, INNER, make_experts, matrices

SHAPE = (INNER, HIDDEN)


def draw() -> list[Tensor]:
    return [torch.randn(SHAPE) for _ in range(EXPERTS)]


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_stacking_is_the_inverse_of_reading_one_by_one(form, hold):
    seeded = form.startswith("sparse")
    module = make_experts(form, hold_positions=hold and seeded)
    state = module.state_dict()
    for matrix in module.matrices:
        stack = module.deltas(matrix)
        stacked = stack_deltas([stack.delta(i) for i in range(EXPERTS)])
        assert stacked.keys() == module.forms[matrix].parts(EXPERTS).keys()
        for part, tensor in stacked.items():
            assert tensor.dtype == state[f"delta_{matrix}_{part}"].dtype, part
            assert torch.equal(tensor, state[f"delta_{matrix}_{part}"]), part


ENCODERS = {
    "low_rank_each": lambda delta, expert: low_rank_from_svd(delta, 3),
    "sparse": lambda delta, expert: drop_at_random(delta, 0.7, MaskStream(8, 5, 2, expert + 7), exact=True),
    "sparse_bits": lambda delta, expert: drop_at_random(delta, 0.5, MaskStream(8, 5, 2, expert), exact=True).quantize(
        4, 4
    ),
    "stored": lambda delta, expert: drop_small(delta, 0.7, "bitmap"),
    "stored_bits_each": lambda delta, expert: drop_small(delta, 0.7, "row").quantize(8, 4),
    "quantized": lambda delta, expert: quantize(delta, 4, 4),
}


@pytest.mark.parametrize("form", ENCODERS)
def test_encoded_deltas_are_those_of_the_experts_that_load_them(form):
    codes = [ENCODERS[form](delta, expert) for expert, delta in enumerate(draw())]
    module = make_experts(form, dtype=torch.float32)
    module.load_state_dict({f"delta_up_{part}": t for part, t in stack_deltas(codes).items()}, strict=False)
    for found, twin, code in zip(
        map(module.deltas("up").delta, range(EXPERTS)), matrices(module, "up"), codes, strict=True
    ):
        torch.testing.assert_close(found.decode(), code.decode(), atol=1e-6, rtol=0)
        torch.testing.assert_close(twin.float(), code.decode(), atol=1e-6, rtol=0)
    if form == "sparse":
        assert [module.deltas("up").delta(i).indices for i in range(EXPERTS)] == [code.indices for code in codes]


def test_positions_in_any_order_are_sorted_with_their_values():
    positions = torch.tensor([7, 2, 29, 11])
    codes = [SparseDelta(FlatIndices(SHAPE, positions), torch.tensor([1.0, 2.0, 3.0, 4.0]))] * 2
    stacked = stack_deltas(codes)
    assert stacked["positions"].tolist() == [[2, 7, 11, 29]] * 2
    assert stacked["positions"].dtype == torch.int32
    assert stacked["values"].tolist() == [[2.0, 1.0, 4.0, 3.0]] * 2
    with pytest.raises(ValueError, match="positions of quantised values must ascend, those of expert 0 do not"):
        stack_deltas([code.quantize(4) for code in codes])


def seeded(drop_rate: float = 0.7, **more) -> SparseDelta:
    return drop_at_random(torch.randn(SHAPE), drop_rate, MaskStream(1), exact=True, **more)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([], "codes must have one delta an expert, got none"),
        ([low_rank_from_svd(torch.ones(SHAPE), 2), low_rank_from_svd(torch.ones(SHAPE), 3)], "rank .* got 2 .* and 3"),
        ([quantize(torch.ones(SHAPE), 4), quantize(torch.ones(SHAPE), 8)], "bits .* got 4 .* and 8 for expert 1"),
        ([quantize(torch.ones(SHAPE), 4, 2), quantize(torch.ones(SHAPE), 4, 3)], "group size .* got 2 .* and 3"),
        ([quantize(torch.ones(SHAPE), 4), quantize(torch.ones(SHAPE).T, 4)], r"shape .* got \(5, 6\) .* and \(6, 5\)"),
        ([seeded(), seeded(0.5)], "kept entries .* got 9 for expert 0 and 15 for expert 1"),
        ([seeded(), seeded(stored="flat")], "form .* got 'sparse, positions of a seed, trained values' .* 'sparse, stored"),
        ([seeded(), seeded().quantize(4)], "form .* 'sparse, positions of a seed, quantised values' for expert 1"),
        ([seeded(), low_rank_from_svd(torch.ones(SHAPE), 2)], "form .* 'low rank' for expert 1"),
        ([seeded(), SparseDelta(seeded().indices, seeded().values.double())], "dtype .* torch.float64 for expert 1"),
        ([quantize(torch.ones(SHAPE), 4, zero_points=True)], "no zero points.* for expert 0"),
        ([quantize(torch.ones(SHAPE), 4, layout="in_out")], "stored as 'out_in', got 'in_out' for expert 0"),
        ([drop_at_random(torch.ones(SHAPE), 0.7, MaskStream(i)) for i in range(2)], r"Bernoulli form \(drop_rate=0.7\) for expert 0"),
        ([SparseDelta(FlatIndices((2**16, 2**16), torch.zeros(1)), torch.ones(1))], "int32, .* got 65536 x 65536"),
    ],
)  # fmt: skip
def test_codes_that_do_not_stack_are_refused_by_name(codes, message):
    with pytest.raises(ValueError, match=message):
        stack_deltas(codes)


def test_what_is_no_code_is_refused():
    with pytest.raises(TypeError, match="codes must be LowRankDelta, SparseDelta or QuantizedDelta, got Tensor"):
        stack_deltas([torch.ones(SHAPE)])


def test_large_matrices_of_a_seed_are_stacked_without_generating_positions():
    # 2^34 entries: their positions would take minutes.
    indices = SeededIndices((2**17, 2**17), MaskStream(1), None, 3)
    assert stack_deltas([SparseDelta(indices, torch.ones(3))])["stream"].tolist() == [[1, 0, 0, 0]]
