"""Bits per position and break-even points, from formulas and from the sizes of real files."""

import struct

import pytest
import torch
from safetensors.torch import save_file

from hf_moe_ext.ops.delta_encoders import low_rank_from_svd, sparse_at_birth
from hf_moe_ext.ops.delta_indices import store_positions
from hf_moe_ext.ops.delta_positions import MaskStream
from hf_moe_ext.ops.delta_quantization import quantize
from hf_moe_ext.ops.deltas import SparseDelta
from hf_moe_ext.scaling.ders_accounting import (
    INDEX_FORMS,
    bitmap_break_even_drop_rate,
    break_even_bits,
    break_even_drop_rate,
    break_even_rank,
    kept_entry_ratio,
    quantized_bits_per_entry,
    sparse_bits_per_position,
)

NUM_EXPERTS = (2, 4, 8, 16, 64)
BREAK_EVEN = {
    "seed": ("0.500", "0.250", "0.125", "0.0625", "0.0156"),
    "uint16": ("0.750", "0.625", "0.5625", "0.531", "0.508"),
    "int32": ("0.833", "0.750", "0.708", "0.6875", "0.672"),
    "int64": ("0.900", "0.850", "0.825", "0.8125", "0.803"),
    "bitmap": ("0.5625", "0.3125", "0.1875", "0.125", "0.078"),
}
DROP_RATES = (0.2, 0.6, 0.8, 0.9, 0.99)
BITS_PER_POSITION = {
    "seed": ("67.2", "41.6", "28.8", "22.4", "16.64"),
    "uint16": ("118.4", "67.2", "41.6", "28.8", "17.28"),
    "int32": ("169.6", "92.8", "54.4", "35.2", "17.92"),
    "int64": ("272", "144", "80", "48", "19.2"),
    "bitmap": ("71.2", "45.6", "32.8", "26.4", "20.64"),
}
STORED = {"uint16": "row", "int32": "flat", "int64": "flat64", "bitmap": "bitmap"}
SHAPE = (64, 2048)


def _sparse(shape, drop_rate, index_form, expert):
    code = sparse_at_birth(shape, drop_rate, MaskStream(5, expert=expert), torch.bfloat16)
    if index_form == "seed":
        return code
    positions = code.indices.positions().sort().values
    return SparseDelta(store_positions(positions, shape, STORED[index_form]), code.values)


def _file_bytes(tensors, path):
    """Size of a safetensors file without its header."""
    save_file(tensors, path)
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
    size = path.stat().st_size - 8 - header_bytes
    path.unlink()
    return size


def _stored_bits(shape, num_experts, make, path):
    """Bits per entry of the base, of one file with a bfloat16 base and so many deltas."""
    tensors = {"base": torch.zeros(shape, dtype=torch.bfloat16)}
    for expert in range(num_experts):
        tensors |= {f"{expert}.{name}": tensor for name, tensor in make(expert).tensors().items()}
    return 8 * _file_bytes(tensors, path) / (shape[0] * shape[1])


@pytest.mark.parametrize("index_form", INDEX_FORMS)
def test_break_even_and_bits_equal_the_table(index_form):
    for num_experts, printed in zip(NUM_EXPERTS, BREAK_EVEN[index_form], strict=True):
        rate = break_even_drop_rate(num_experts, index_form)
        assert abs(rate - float(printed)) <= 0.5 * 10.0 ** -len(printed.partition(".")[2]) * (1 + 1e-9)
        # At break-even base and deltas take exactly the bits of the dense experts.
        if rate < 1:
            assert sparse_bits_per_position(num_experts, rate, index_form) == pytest.approx(16 * num_experts, abs=1e-9)
    for drop_rate, printed in zip(DROP_RATES, BITS_PER_POSITION[index_form], strict=True):
        assert sparse_bits_per_position(4, drop_rate, index_form) == pytest.approx(float(printed), abs=1e-9)


@pytest.mark.parametrize("index_form", INDEX_FORMS)
def test_bits_of_real_files_equal_the_table(index_form, tmp_path):
    """What is beside the formula: 32 bytes of seed a delta, or the row pointers, 4 bytes a row and one more."""
    entries = SHAPE[0] * SHAPE[1]
    beside = {"seed": 8 * 32, "uint16": 8 * 4 * (SHAPE[0] + 1)}.get(index_form, 0) * 4 / entries
    for drop_rate, printed in zip(DROP_RATES, BITS_PER_POSITION[index_form], strict=True):
        bits = _stored_bits(SHAPE, 4, lambda e, p=drop_rate: _sparse(SHAPE, p, index_form, e), tmp_path / "codes")
        # n is rounded: at most half an entry a delta.
        rounding = 4 * 0.5 * (16 + 64) / entries
        assert abs(bits - beside - float(printed)) <= rounding
        assert beside < 0.08


@pytest.mark.parametrize("index_form", INDEX_FORMS)
@pytest.mark.parametrize("num_experts", NUM_EXPERTS)
def test_real_files_break_even_where_the_table_says(index_form, num_experts, tmp_path):
    """One per cent above the rate the file is smaller than the dense experts, one per cent below larger."""
    shape = (16, 2048)
    dense = _file_bytes({"experts": torch.zeros(num_experts, *shape, dtype=torch.bfloat16)}, tmp_path / "dense")
    rate = float(BREAK_EVEN[index_form][NUM_EXPERTS.index(num_experts)])

    def bits(drop_rate):
        return _stored_bits(shape, num_experts, lambda e: _sparse(shape, drop_rate, index_form, e), tmp_path / "codes")

    assert bits(rate + 0.01) < 8 * dense / (shape[0] * shape[1]) < bits(rate - 0.01)


def test_bitmap_against_stored_indices(tmp_path):
    for index_form, rate in (("int32", 0.96875), ("int64", 0.984375), ("uint16", 0.9375)):
        assert bitmap_break_even_drop_rate(index_form) == rate
        for drop_rate, bitmap_smaller in ((rate - 0.002, True), (rate + 0.002, False)):
            bitmap, other = (_sparse((16, 8192), drop_rate, form, 0).num_bytes for form in ("bitmap", index_form))
            assert (bitmap < other) == bitmap_smaller
    with pytest.raises(ValueError, match="uint16, int32 or int64"):
        bitmap_break_even_drop_rate("seed")


def test_low_rank_break_even(tmp_path):
    assert [int(break_even_rank(4, 2048, width)) for width in (5504, 5632)] == [1119, 1126]
    assert break_even_rank(4, 2560, 10240) == 1536
    shape = (40, 60)
    dense = 16 * 4
    assert break_even_rank(4, *shape) == 18
    delta = torch.randn(shape).bfloat16()
    bits = {
        rank: _stored_bits(shape, 4, lambda _, r=rank: low_rank_from_svd(delta, r), tmp_path / "codes")
        for rank in (17, 18, 19)
    }
    assert bits[17] < dense == bits[18] < bits[19]


@pytest.mark.parametrize(("bits", "group_size"), [(8, 128), (4, 64), (2, 128), (1, 32)])
def test_quantised_bits_of_real_files(bits, group_size, tmp_path):
    shape, delta = (32, 256), torch.randn(32, 256)
    stored = _stored_bits(shape, 4, lambda _: quantize(delta, bits, group_size), tmp_path / "codes")
    assert stored == 16 + 4 * quantized_bits_per_entry(bits, 16, group_size)
    assert (stored < 64) == (quantized_bits_per_entry(bits, 16, group_size) < break_even_bits(4))


def test_quantised_break_even():
    assert break_even_bits(4) == 12
    assert break_even_bits(2) == 8
    assert quantized_bits_per_entry(8, 16, 128) > break_even_bits(2) > quantized_bits_per_entry(4, 16, 128)
    assert quantized_bits_per_entry(16) == 16


def test_trainable_entries_break_even_later():
    assert kept_entry_ratio("int64", 16) == 1.5
    assert break_even_drop_rate(4, "int64", 16) == 0.5
    assert break_even_drop_rate(1, "seed") == 1


def test_bad_input_is_refused():
    for rate in (0, 1, -1, 2):
        with pytest.raises(ValueError, match="drop_rate must lie strictly between 0 and 1"):
            sparse_bits_per_position(4, rate, "seed")
    with pytest.raises(ValueError, match="index_form must be one of seed, uint16, int32, int64, got 'csr'"):
        break_even_drop_rate(4, "csr")
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        break_even_drop_rate(0, "seed")
