"""Codes of deltas: encoders against their definitions, unbiased drops, exact bytes of real files, refusals."""

import json
import math
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_moe_ext.ops.delta_encoders import (
    drop_at_random,
    drop_small,
    low_rank_at_birth,
    low_rank_from_svd,
    sparse_at_birth,
)
from hf_moe_ext.ops.delta_measures import relative_error
from hf_moe_ext.ops.delta_positions import MaskStream
from hf_moe_ext.ops.delta_quantization import quantize
from hf_moe_ext.ops.deltas import LowRankDelta, SparseDelta, read_delta
from support import naive_deltas

STREAM = MaskStream(42, 1, 2, 3)


def _codes():
    delta = torch.randn(24, 40)
    seeded, stored = drop_at_random(delta, 0.6, STREAM), drop_small(delta, 0.6, "row")
    return {
        "svd": low_rank_from_svd(delta, 3),
        "low-rank birth": low_rank_at_birth((24, 40), 2, torch.bfloat16),
        "seeded": seeded,
        "exact": drop_at_random(delta, 0.6, STREAM, exact=True),
        "flat": drop_at_random(delta, 0.6, STREAM, exact=True, stored="flat"),
        "bitmap": drop_small(delta, 0.6),
        "row": stored,
        "sparse birth": sparse_at_birth((24, 40), 0.6, STREAM),
        "quantised": quantize(delta, 2, 16),
        "sparse and quantised": seeded.quantize(4, 32),
        "magnitude and quantised": stored.quantize(1, None),
    }


NAMES = list(_codes())


def _payload_bytes(path):
    (header_bytes,) = struct.unpack("<Q", path.read_bytes()[:8])
    return path.stat().st_size - 8 - header_bytes


@pytest.mark.parametrize("name", NAMES)
def test_file_holds_the_code_and_its_bytes(name, tmp_path):
    code, path = _codes()[name], tmp_path / "delta.safetensors"
    save_file(code.tensors(), path, metadata={"delta": json.dumps(code.metadata())})
    assert _payload_bytes(path) == code.num_bytes
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        metadata = json.loads(file.metadata()["delta"])
    again = read_delta(tensors, metadata, shape=(24, 40))
    assert type(again) is type(code)
    assert torch.equal(again.decode(), code.decode())
    assert again.decode().shape == code.shape == (24, 40)
    assert again.num_bytes == code.num_bytes
    with pytest.raises(ValueError, match=r"matrix of shape \(24, 40\), got one of \(40, 24\)"):
        read_delta(tensors, metadata, shape=(40, 24))
    with pytest.raises(ValueError, match="stored as 'out_in', got 'in_out'"):
        read_delta(tensors, metadata, layout="in_out")
    with pytest.raises(ValueError, match="kind must be low_rank, sparse or quantized, got 'lora'"):
        read_delta(tensors, metadata | {"kind": "lora"})
    with pytest.raises(ValueError, match="format_version must be 1, got 0"):
        read_delta(tensors, metadata | {"format_version": 0})
    for field in metadata.keys() - {"kind", "format_version"}:
        with pytest.raises(ValueError, match=f"lacks '{field}'"):
            read_delta(tensors, {other: value for other, value in metadata.items() if other != field})
    for key in tensors:
        with pytest.raises(ValueError, match="lacks the tensor"):
            read_delta({other: tensor for other, tensor in tensors.items() if other != key}, metadata)


# --- Low rank ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (1, 6), (6, 1)])
def test_svd_is_the_best_of_its_rank(shape):
    delta = torch.randn(shape, dtype=torch.float64)
    singular = torch.linalg.svdvals(delta)
    for rank in range(1, min(shape) + 1):
        code = low_rank_from_svd(delta, rank)
        assert code.A.shape == (rank, shape[1])
        assert code.B.shape == (shape[0], rank)
        assert code.num_bytes == 8 * rank * sum(shape)
        error = float((code.decode() - delta).norm())
        assert error == pytest.approx(float(singular[rank:].norm()), abs=1e-10)
    torch.testing.assert_close(low_rank_from_svd(delta, min(shape)).decode(), delta, atol=1e-10, rtol=0)


def test_svd_finds_a_low_rank_delta_again():
    delta = torch.randn(50, 3, dtype=torch.float64) @ torch.randn(3, 30, dtype=torch.float64)
    code = low_rank_from_svd(delta, 3)
    torch.testing.assert_close(code.decode(), delta, atol=1e-10, rtol=0)
    # Balanced factors: each row of A is as long as its column of B.
    torch.testing.assert_close(code.A.norm(dim=1), code.B.norm(dim=0), atol=1e-10, rtol=0)
    assert low_rank_from_svd(delta.bfloat16(), 3).A.dtype == torch.bfloat16
    assert low_rank_from_svd(delta, 3, torch.float32).B.dtype == torch.float32


def test_low_rank_birth_is_zero_and_trains_b_first():
    code = low_rank_at_birth((30, 400), 4, torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(code.decode(), torch.zeros(30, 400, dtype=torch.float64))
    assert code.A.abs().max() <= 1 / 20
    assert code.A.std() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.05)
    A, B = code.A.requires_grad_(), code.B.requires_grad_()
    gradient = torch.randn(30, 400, dtype=torch.float64)
    of_a, of_b = torch.autograd.grad((LowRankDelta(A, B).decode() * gradient).sum(), (A, B))
    assert not of_a.any()
    torch.testing.assert_close(of_b, gradient @ A.T, atol=1e-10, rtol=0)


@pytest.mark.parametrize("rank", [0, -1, 25])
def test_a_rank_outside_is_refused(rank):
    for make in (lambda: low_rank_from_svd(torch.randn(24, 40), rank), lambda: low_rank_at_birth((40, 24), rank)):
        with pytest.raises(ValueError, match=f"rank must be at least 1 and at most 24.*got {rank}"):
            make()


# --- Sparse ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_random_drop_equals_the_loop(rescale, exact):
    delta = torch.randn(9, 14, dtype=torch.float64)
    stream = (STREAM.seed, STREAM.layer, STREAM.matrix, STREAM.expert)
    if exact:
        kept = [naive_deltas.exact_position(stream, 126, j) for j in range(round(126 * 0.3))]
    else:
        kept = naive_deltas.bernoulli_positions(stream, 126, 0.7)
    expected = torch.zeros(9, 14, dtype=torch.float64)
    for q in kept:
        expected[q // 14, q % 14] = delta[q // 14, q % 14] * (1 / 0.3 if rescale else 1)
    for stored in (None, "flat", "flat64", "row", "bitmap"):
        code = drop_at_random(delta, 0.7, STREAM, rescale, exact, stored)
        torch.testing.assert_close(code.decode(), expected, atol=1e-10, rtol=0)
        assert len(code.values) == len(kept)


@pytest.mark.parametrize(("drop_rate", "exact"), [(0.2, False), (0.6, False), (0.9, False), (0.9, True)])
def test_random_drop_is_unbiased(drop_rate, exact):
    """Mean over 1000 masks: every entry within five standard errors of the delta's."""
    delta, total = torch.randn(16, 24, dtype=torch.float64), torch.zeros(16, 24, dtype=torch.float64)
    for seed in range(1000):
        total += drop_at_random(delta, drop_rate, MaskStream(seed, 1, 2, 3), exact=exact).decode()
    # 384 p entries are dropped exactly, which is no whole number: the rate that counts is the one of the counts.
    expected = delta * round(384 * (1 - drop_rate)) / (384 * (1 - drop_rate)) if exact else delta
    standard_error = delta.abs() * math.sqrt(drop_rate / (1 - drop_rate) / 1000)
    assert ((total / 1000 - expected).abs() <= 5 * standard_error).all()


@pytest.mark.parametrize("drop_rate", [0.2, 0.5, 0.9, 0.99])
def test_random_drop_has_the_predicted_error(drop_rate):
    delta = torch.randn(512, 1024)
    error = relative_error(drop_at_random(delta, drop_rate, STREAM).decode(), delta)
    assert abs(error / math.sqrt(drop_rate / (1 - drop_rate)) - 1) < 0.05


@pytest.mark.parametrize("shape", [(1, 1), (10, 100), (33, 77), (300, 500)])
@pytest.mark.parametrize("drop_rate", [0.1, 0.5, 0.9, 0.9999])
def test_sparse_birth_keeps_exactly_so_many_distinct_positions(shape, drop_rate):
    code = sparse_at_birth(shape, drop_rate, STREAM)
    positions = code.indices.positions()
    assert len(positions) == len(code.values) == round(shape[0] * shape[1] * (1 - drop_rate))
    assert len(positions.unique()) == len(positions)
    assert torch.equal(code.decode(), torch.zeros(shape))


def test_sparse_gradient_is_the_delta_gradient_at_its_positions():
    code = sparse_at_birth((12, 15), 0.7, STREAM, torch.float64)
    values = torch.randn_like(code.values).requires_grad_()
    gradient = torch.randn(12, 15, dtype=torch.float64)
    decoded = SparseDelta(code.indices, values).decode()
    (of_values,) = torch.autograd.grad((decoded * gradient).sum(), values)
    assert torch.equal(of_values, gradient.reshape(-1)[code.indices.positions()])


def test_magnitude_drop_keeps_the_largest():
    delta = torch.randn(30, 40, dtype=torch.float64)
    for stored in ("flat", "row", "bitmap"):
        decoded = drop_small(delta, 0.75, stored).decode()
        threshold = delta.abs().flatten().sort(descending=True).values[299]
        assert torch.equal(decoded, torch.where(delta.abs() >= threshold, delta, 0.0))
    # Never worse than any other choice of as many entries, without rescaling.
    random = drop_at_random(delta, 0.75, STREAM, rescale=False, exact=True)
    assert relative_error(decoded, delta) < relative_error(random.decode(), delta)
    ties = drop_small(torch.tensor([[1.0, -1.0, 1.0, 2.0, 1.0]]), 0.4)
    assert ties.indices.positions().tolist() == [0, 1, 3]


@pytest.mark.parametrize("bits", [16, 8, 4, 2, 1])
def test_sparse_and_quantised_values_compose(bits):
    delta = torch.randn(64, 128)
    sparse = drop_at_random(delta, 0.5, STREAM, rescale=False)
    both = sparse.quantize(bits, 64, torch.float32)
    positions, values = sparse.indices.positions(), sparse.values
    assert torch.equal(
        both.decode().flatten()[positions], quantize(values[None], bits, 64, scale_dtype=torch.float32).decode()[0]
    )
    outside = torch.ones(64 * 128, dtype=torch.bool)
    outside[positions] = False
    assert not both.decode().flatten()[outside].any()
    kept = len(values)
    coded = 4 * kept if bits == 16 else math.ceil(kept * bits / 8) + 4 * math.ceil(kept / 64)
    assert both.num_bytes == 32 + coded
    if bits == 16:
        assert torch.equal(both.decode(), sparse.decode())
    with pytest.raises(ValueError, match=f"quantised to {bits} bits already"):
        both.quantize(4)


def test_nothing_kept_is_a_zero_delta():
    delta = torch.randn(3, 4)
    for code in (drop_small(delta, 0.99), drop_at_random(delta, 0.9999, MaskStream(0), stored="row")):
        assert torch.equal(code.decode(), torch.zeros(3, 4))
        assert torch.equal(read_delta(code.tensors(), code.metadata()).decode(), torch.zeros(3, 4))


@pytest.mark.parametrize("encode", [drop_small, lambda delta, p: drop_at_random(delta, p, STREAM)])
def test_bad_deltas_and_rates_are_refused(encode):
    for drop_rate in (0.0, 1.0, 2.0):
        with pytest.raises(ValueError, match="drop_rate must lie strictly between 0 and 1"):
            encode(torch.randn(3, 4), drop_rate)
    with pytest.raises(ValueError, match="one matrix"):
        encode(torch.randn(3, 4, 5), 0.5)
    with pytest.raises(ValueError, match="NaN or infinite"):
        encode(torch.full((3, 4), torch.inf), 0.5)
    with pytest.raises(TypeError, match="floating-point tensor"):
        encode(torch.ones(3, 4, dtype=torch.int64), 0.5)
    with pytest.raises(ValueError, match="drop_rate must lie strictly between 0 and 1"):
        sparse_at_birth((3, 4), 1.0, STREAM)


def test_parts_of_two_files_are_refused():
    code = drop_at_random(torch.randn(24, 40), 0.6, STREAM)
    other = drop_at_random(torch.randn(24, 40), 0.6, MaskStream(43))
    with pytest.raises(ValueError, match="of its positions"):
        read_delta(other.tensors(), code.metadata())
    with pytest.raises(ValueError, match="tensor 'values' has shape"):
        read_delta(code.tensors() | {"values": code.values[:-1]}, code.metadata())
    quantised = code.quantize(4)
    mixed = quantised.metadata() | {"values": other.quantize(4).metadata()["values"]}
    assert other.indices.num_kept != code.indices.num_kept
    with pytest.raises(ValueError, match=r"not of one file|tensor 'codes' has shape"):
        read_delta(quantised.tensors(), mixed)
    low_rank = low_rank_from_svd(torch.randn(24, 40), 3)
    with pytest.raises(ValueError, match="tensor 'A' has shape"):
        read_delta(low_rank.tensors(), low_rank.metadata() | {"rank": 4})
    with pytest.raises(ValueError, match="rank must be at least 1"):
        read_delta(low_rank.tensors(), low_rank.metadata() | {"rank": 99})
