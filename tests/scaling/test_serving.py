"""Memory and rates of serving, by hand."""

from dataclasses import replace

import pytest

from hf_moe_ext.scaling.feed_forward import MoeFfn
from hf_moe_ext.scaling.hardware import find_hardware
from hf_moe_ext.scaling.layout import Layout
from hf_moe_ext.scaling.rank_seconds import Efficiency
from hf_moe_ext.scaling.serving import serving_memory, serving_rates
from hf_moe_ext.scaling.shape import MoeShape

H100 = find_hardware("H100-SXM")
PERFECT = Efficiency(1, 1, 1, 1, 0, 0, 0)
SHAPE = MoeShape.uniform(
    4, 256, MoeFfn(16, 2, 128), num_heads=8, num_key_value_heads=4, vocab_size=512, context_length=4096
)


def test_weights_and_cache():
    peak = serving_memory(SHAPE, Layout(), 10, 1000).peak
    assert peak.weights == 2 * SHAPE.total_parameters
    assert peak.kv_cache == 4 * 2 * 4 * 32 * 1000 * 10 * 2
    assert peak.logits == 10 * 512 * 4
    assert peak.gradients == peak.optimizer == peak.activations == peak.exchange == 0
    cut = serving_memory(SHAPE, Layout(tensor=4), 10, 1000).peak
    assert cut.kv_cache == peak.kv_cache / 4


def test_quantised_weights_and_caches():
    peak = serving_memory(SHAPE, Layout(), 10, 1000, weight_bytes=0.5, kv_bytes=1).peak
    assert peak.weights == SHAPE.total_parameters / 2
    assert peak.kv_cache == serving_memory(SHAPE, Layout(), 10, 1000).peak.kv_cache / 2


def test_experts_on_other_ranks():
    peak = serving_memory(SHAPE, Layout(data=4, expert=4), 10, 1000, prefill_tokens=100).peak
    assert peak.weights == 2 * (SHAPE.total_parameters - SHAPE.parameters.routed * 3 / 4)
    assert peak.exchange == 2 * 100 * 2 * 256 * 2


def test_decoding_reads_what_it_touches():
    """Of 16 experts one sequence touches 2; of the input embedding one row."""
    rates = serving_rates(SHAPE, Layout(), H100, 1, 1000, efficiency=PERFECT)
    weights = SHAPE.total_parameters - SHAPE.parameters.routed * 14 / 16 - 512 * 256
    read = weights * 2 + SHAPE.kv_cache_bytes(1000)
    assert rates.decode_s == pytest.approx(read / H100.memory_bytes_per_s)
    assert rates.decode_tokens_per_s == pytest.approx(1 / rates.decode_s)
    assert rates.decode_binds == "memory"
    many = serving_rates(SHAPE, Layout(), H100, 64, 1000, efficiency=PERFECT)
    touched = SHAPE.parameters.routed * (1 - (1 - 2 / 16) ** 64)
    weights = SHAPE.total_parameters - SHAPE.parameters.routed - 512 * 256 + touched
    read = weights * 2 + SHAPE.kv_cache_bytes(1000, 64)
    assert many.decode_s == pytest.approx(read / H100.memory_bytes_per_s)


def test_prefill_is_arithmetic():
    rates = serving_rates(SHAPE, Layout(), H100, 1, 1000, efficiency=PERFECT)
    assert rates.prefill_tokens_per_s == pytest.approx(H100.flops_per_s / SHAPE.forward_flops(1000).total)
    half = serving_rates(SHAPE, Layout(), H100, 1, 1000, efficiency=replace(PERFECT, gemm=0.5, grouped=0.5))
    assert half.prefill_tokens_per_s == pytest.approx(rates.prefill_tokens_per_s / 2)


def test_replicas_add_up():
    one, four = (serving_rates(SHAPE, Layout(data=n), H100, 8, 1000) for n in (1, 4))
    assert four.decode_tokens_per_s == pytest.approx(4 * one.decode_tokens_per_s)
    assert four.decode_s == pytest.approx(one.decode_s)


def test_stages_wait_for_each_other_but_work_in_parallel():
    one, two = (serving_rates(SHAPE, Layout(pipeline=n), H100, 8, 1000, efficiency=PERFECT) for n in (1, 2))
    assert two.decode_tokens_per_s > one.decode_tokens_per_s
    assert two.decode_s == pytest.approx(one.decode_s, rel=0.1)


@pytest.mark.parametrize("name", ["num_sequences", "sequence_length", "prefill_tokens"])
def test_bad_numbers(name):
    keys = {"num_sequences": 1, "sequence_length": 10, "prefill_tokens": 10, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        serving_memory(SHAPE, Layout(), **keys)
    keys["context_length"] = keys.pop("sequence_length")
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        serving_rates(SHAPE, Layout(), H100, **keys)
    with pytest.raises(ValueError, match="weight_bytes must be above 0, got 0"):
        serving_memory(SHAPE, Layout(), 1, 1, weight_bytes=0)
