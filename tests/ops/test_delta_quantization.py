"""Few-bit deltas: exact storage, errors against published and brute-force numbers, plain min-max as the bar."""

import itertools
import json
import math

import pytest
import torch

from hf_moe_ext.ops.delta_measures import relative_error
from hf_moe_ext.ops.delta_quantization import BITS, QuantizedDelta, pack, quantize, unpack
from support import naive_deltas

FEW = (8, 4, 2, 1)


def _error(delta, bits, **options):
    return relative_error(quantize(delta, bits, **options).decode(), delta)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sixteen_bits_are_the_identity(dtype):
    delta = torch.randn(5, 7).to(dtype)
    code = quantize(delta, 16)
    assert code.decode().dtype == dtype
    assert torch.equal(code.decode(), delta)
    assert code.num_bytes == delta.numel() * delta.element_size()


@pytest.mark.parametrize("bits", FEW)
@pytest.mark.parametrize("columns", [1, 2, 7, 8, 9, 33])
def test_packing_loses_nothing(bits, columns):
    codes = torch.randint(2**bits, (4, columns), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (4, math.ceil(columns * bits / 8))
    assert torch.equal(unpack(packed, bits, columns), codes)
    for row, packed_row in zip(codes.tolist(), packed.tolist(), strict=True):
        assert row == [naive_deltas.unpacked_code(packed_row, bits, column) for column in range(columns)]


@pytest.mark.parametrize("bits", FEW)
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("group_size", [1, 5, 16, 33, 100, None])
def test_decoding_equals_the_loop(bits, zero_points, group_size):
    delta = torch.randn(3, 33, dtype=torch.float64) + 0.3
    code = quantize(delta, bits, group_size, zero_points, torch.float64)
    decoded = code.decode()
    width = group_size or 33
    for row in range(3):
        for column in range(33):
            level = naive_deltas.unpacked_code(code.codes[row].tolist(), bits, column) - (2**bits - 1) / 2
            value = level * code.scales[row, column // width]
            if zero_points:
                value = value + code.zero_points[row, column // width]
            assert abs(decoded[row, column] - value) <= 1e-10
            # Nearest level: no other code of the group's grid comes closer.
            nearest = code.scales[row, column // width] / 2 * (1 + 1e-9)
            inside = abs(level) < (2**bits - 1) / 2
            assert not inside or abs(decoded[row, column] - delta[row, column]) <= nearest


@pytest.mark.parametrize("bits", FEW)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("zero_points", [False, True])
def test_storage_is_bits_and_scales(bits, scale_dtype, zero_points):
    """B + s / G bits an entry, exactly, where groups and bytes come out even."""
    delta, group_size = torch.randn(6, 256), 64
    code = quantize(delta, bits, group_size, zero_points, scale_dtype)
    group_bits = scale_dtype.itemsize * 8 * (2 if zero_points else 1)
    assert code.num_bytes * 8 / delta.numel() == bits + group_bits / group_size
    assert code.num_bytes == sum(t.numel() * t.element_size() for t in code.tensors().values())
    assert code.codes.dtype == torch.uint8
    assert code.scales.dtype == scale_dtype


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("group_size", [16, 128, None])
@pytest.mark.parametrize("law", ["gaussian", "heavy", "shifted", "sparse"])
def test_error_falls_with_bits(zero_points, group_size, law):
    delta = torch.randn(64, 512)
    if law == "heavy":
        delta = delta**3
    elif law == "shifted":
        delta = delta + 1.5
    elif law == "sparse":
        delta = delta * (torch.rand(64, 512) < 0.3)
    errors = [_error(delta, bits, group_size=group_size, zero_points=zero_points) for bits in BITS]
    assert errors[0] == 0
    assert all(more < fewer for more, fewer in itertools.pairwise(errors))
    assert errors[-1] < 1


@pytest.mark.parametrize("group_size", [64, 128, None])
def test_one_bit_error_on_gaussian_deltas(group_size):
    delta = 1e-4 * torch.randn(256, 2048)
    code = quantize(delta, 1, group_size)
    assert abs(relative_error(code.decode(), delta) - 0.603) < 0.01
    # Sign times mean magnitude, in each group.
    width = group_size or 2048
    means = delta.view(256, -1, width).abs().mean(-1).repeat_interleave(width, 1)
    torch.testing.assert_close(code.decode(), delta.sign() * means, rtol=2**-8, atol=0)


@pytest.mark.parametrize(("bits", "published"), [(8, 0.006), (4, 0.100), (2, 0.50), (1, 1.89)])
def test_min_max_error_on_gaussian_deltas(bits, published):
    """The measured row of the specification, groups of 128; fitted scales with the same storage are better throughout."""
    delta = torch.randn(512, 1024)
    plain = _error(delta, bits, fit="min_max", scale_dtype=torch.float32)
    assert abs(plain - published) < (0.02 if bits == 1 else 0.006 if bits == 2 else 0.0006)
    assert _error(delta, bits, zero_points=True, scale_dtype=torch.float32) < plain


@pytest.mark.parametrize("bits", [2, 1])
def test_few_bits_beat_min_max_with_fewer_bytes(bits):
    """Where plain rounding collapses (error above 1 at one bit: worse than no delta at all) the fitted scale does not."""
    delta = 1e-3 * torch.randn(128, 1024)
    fitted, plain = quantize(delta, bits), quantize(delta, bits, fit="min_max")
    assert fitted.num_bytes < plain.num_bytes
    assert relative_error(fitted.decode(), delta) < 0.75 * relative_error(plain.decode(), delta)
    assert relative_error(fitted.decode(), delta) < 1


def test_min_max_equals_its_definition():
    delta = torch.randn(4, 32, dtype=torch.float64)
    code = quantize(delta, 4, 16, scale_dtype=torch.float64, fit="min_max")
    for row in range(4):
        for group in range(2):
            values = delta[row, 16 * group : 16 * group + 16]
            step = (values.max() - values.min()) / 15
            expected = values.min() + step * ((values - values.min()) / step).round()
            torch.testing.assert_close(code.decode()[row, 16 * group : 16 * group + 16], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("bits", [4, 2, 1])
def test_fit_is_close_to_the_best_scale(bits):
    """A search over 300 scales a group in plain Python finds nothing more than 1 % better over all."""
    delta = torch.randn(6, 64, dtype=torch.float64)
    code = quantize(delta, bits, 32, scale_dtype=torch.float64)
    ours = float((code.decode() - delta).square().sum())
    best = 0.0
    for group in delta.view(-1, 32).tolist():
        top = 2 * max(abs(value) for value in group) / (2**bits - 1)
        best += min(naive_deltas.grid_error(group, top * step / 280, bits) for step in range(10, 310))
    assert ours <= 1.01 * best


@pytest.mark.parametrize("bits", FEW)
@pytest.mark.parametrize("options", [{}, {"zero_points": True}, {"fit": "min_max"}])
def test_a_short_last_group_is_fitted_alone(bits, options):
    """The padding beside its columns has no say: the group comes out as if it were the whole matrix."""
    delta = torch.randn(20, 21, dtype=torch.float64) + 2
    whole = quantize(delta, bits, 16, scale_dtype=torch.float64, **options)
    alone = quantize(delta[:, 16:], bits, 5, scale_dtype=torch.float64, **options)
    torch.testing.assert_close(whole.decode()[:, 16:], alone.decode(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("zero_points", [False, True])
def test_codes_are_chosen_for_the_stored_scale(zero_points):
    """At 8 bits a bfloat16 scale moves the outer levels by a third of a step; each code is the nearest all the same."""
    delta = torch.randn(16, 128)
    code = quantize(delta, 8, 128, zero_points)
    levels = unpack(code.codes, 8, 128).float()
    inside = (levels > 0) & (levels < 255)
    error = (code.decode() - delta).abs()
    assert (error <= code.scales.float() / 2 * (1 + 1e-4))[inside].all()


@pytest.mark.parametrize("bits", FEW)
@pytest.mark.parametrize("zero_points", [False, True])
def test_zeros_and_constants_stay_what_they_are(bits, zero_points):
    delta = torch.zeros(2, 40)
    delta[1, 16:] = 0.5
    decoded = quantize(delta, bits, 8, zero_points).decode()
    assert torch.equal(decoded[0], delta[0])
    torch.testing.assert_close(decoded[1], delta[1], rtol=2**-8, atol=0)


def test_a_matrix_in_pieces_is_the_same(monkeypatch):
    delta = torch.randn(9, 70)
    whole = quantize(delta, 2, 16)
    monkeypatch.setattr("hf_moe_ext.ops.delta_quantization._CHUNK_ENTRIES", 40)
    for name, tensor in quantize(delta, 2, 16).tensors().items():
        assert torch.equal(tensor, whole.tensors()[name])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_points", [False, True])
def test_code_comes_back_through_json(bits, zero_points):
    code = quantize(torch.randn(3, 21).bfloat16(), bits, 8, zero_points)
    again = QuantizedDelta.from_parts(code.tensors(), json.loads(json.dumps(code.metadata())))
    assert again.decode().dtype == torch.bfloat16
    assert torch.equal(again.decode(), code.decode())
    assert again.num_bytes == code.num_bytes


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bits", 3, "bits must be one of 16, 8, 4, 2, 1, got 3"),
        ("bits", 4, "tensor 'codes' has shape"),
        ("group_size", 0, "group_size must be a positive int"),
        ("group_size", 16, "tensor 'scales' has shape"),
        ("shape", [4, 21], "tensor 'codes' has shape"),
        ("dtype", "int8", "dtype must name a floating-point dtype"),
        ("dtype", "os", "dtype must name a floating-point dtype"),
        ("zero_points", True, "lacks the tensor 'zero_points'"),
        ("kind", "sparse", "kind must be 'quantized', got 'sparse'"),
        ("format_version", 2, "format_version must be 1, got 2"),
    ],
)
def test_changed_metadata_is_refused(field, value, message):
    code = quantize(torch.randn(3, 21), 2, 8)
    with pytest.raises(ValueError, match=message):
        QuantizedDelta.from_parts(code.tensors(), code.metadata() | {field: value})


def test_bad_input_is_refused():
    delta = torch.randn(4, 16)
    for bits in (3, 32, 0, 2.0, True):
        with pytest.raises(ValueError, match="bits must be one of 16, 8, 4, 2, 1, got"):
            quantize(delta, bits)
    for group_size in (0, -1, 2.0):
        with pytest.raises(ValueError, match="group_size must be a positive int"):
            quantize(delta, 4, group_size)
    with pytest.raises(ValueError, match="fit must be 'least_squares' or 'min_max', got 'gptq'"):
        quantize(delta, 4, fit="gptq")
    with pytest.raises(ValueError, match="scale_dtype must be one of"):
        quantize(delta, 4, scale_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"torch\.float16 cannot hold the scales"):
        quantize(1e-9 * delta, 4, scale_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"must be one matrix \[rows, cols\].*\(2, 4, 4\)"):
        quantize(torch.randn(2, 4, 4), 4)
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(torch.full((2, 2), torch.nan), 4)
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        quantize(torch.ones(2, 2, dtype=torch.int64), 4)
