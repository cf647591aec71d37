"""Buckets of memory by hand, and what must move which of them; the comparison with real training is the slow test below."""

from dataclasses import replace

import pytest

from hf_moe_ext.scaling.activations import MASKED_LIMIT, BlockBytes
from hf_moe_ext.scaling.feed_forward import Deltas, DenseFfn, MoeFfn
from hf_moe_ext.scaling.layout import Layout, stage_parameters
from hf_moe_ext.scaling.memory import TrainingStep, bytes_per_parameter, training_memory
from hf_moe_ext.scaling.operations import Tokens
from hf_moe_ext.scaling.precision import PRECISIONS, choose_precision
from hf_moe_ext.scaling.shape import MoeShape

TOKENS = Tokens(2, 64)
FFN = MoeFfn(8, 2, 32)


def make_shape(ffn=FFN, **changes):
    keys = {"num_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "context_length": 128, **changes}
    return MoeShape.uniform(4, 64, ffn, **keys)


SHAPE = make_shape()


def test_published_bytes_per_parameter():
    megatron = PRECISIONS["megatron"]
    assert bytes_per_parameter(megatron, 0, 1) == 18
    assert bytes_per_parameter(megatron, 1, 8) == 6 + 12 / 8 == 7.5
    assert bytes_per_parameter(megatron, 2, 8) == 2 + 16 / 8
    assert bytes_per_parameter(megatron, 3, 8) == 18 / 8
    assert bytes_per_parameter(PRECISIONS["float32"], 0, 8) == 16


def test_optimizers_hold_what_they_hold():
    states = {name: [choose_precision(name, one).optimizer for one in ("adamw", "muon", "sgd")] for name in PRECISIONS}
    assert states["float32"] == [8, 4, 0]
    assert states["bfloat16"] == [4, 2, 0]
    assert states["megatron"] == [12, 8, 4]


def test_saved_bytes_of_a_layer_by_hand():
    """What autograd was seen to keep, tensor by tensor; d 64, 4 heads of 16, keys and values 32, K 2, d_e 32, E 8."""
    blocks = BlockBytes(SHAPE, TOKENS, Layout(), PRECISIONS["float32"])
    norm = 4 * 64 + 4 + 4 * 64
    attention = norm + 4 * 64 + 4 * (64 + 32 + 32 + 64) + 4 * 4
    router = norm + 4 * 64 + 4 * 8 + (8 + 4) * 2
    experts = 2 * (2 * 8 + 4 * 64 + 4 * 64 + 4 * 32 + 4 * 32 + 4 * 64 + 4 + 8)
    assert sum(one.saved for one in blocks.layer(0)) == 128 * (attention + router + experts)


def test_every_gradient_is_made_once():
    for shape in (
        SHAPE,
        make_shape(tied_embeddings=True),
        make_shape(MoeFfn(8, 2, 32, latent_size=16, latent_norm=True, shared=DenseFfn(48), gated=False)),
        make_shape(DenseFfn(128)),
        make_shape(MoeFfn(8, 2, 32, deltas=Deltas("low_rank", rank=(4, 4, 2)))),
        *(MoeShape.from_hf({"model_type": family}) for family in ("olmoe", "deepseek_v3", "qwen2_moe", "gpt_oss")),
    ):
        blocks = BlockBytes(shape, TOKENS, Layout(), PRECISIONS["float32"])
        parts = [blocks.embedding(), *(blocks.layer(i) for i in range(shape.num_layers)), blocks.head()]
        assert sum(one.gradients for part in parts for one in part) == shape.total_parameters


def test_narrow_deltas_are_masked_where_the_forward_pass_masks_them():
    from hf_moe_ext.ders.forward import DENSE_LIMIT

    assert MASKED_LIMIT == DENSE_LIMIT


def buckets(layout=None, shape=SHAPE, **step):
    return training_memory(shape, layout or Layout(), TrainingStep(step.pop("tokens", TOKENS), "float32", **step)).peak


def test_resident_bytes():
    peak = buckets()
    assert (peak.weights, peak.optimizer) == (4 * SHAPE.total_parameters, 8 * SHAPE.total_parameters)
    assert peak.exchange == peak.kv_cache == 0
    assert peak.total == pytest.approx(sum(value for name, value in peak.as_dict().items() if name != "total"))


def test_gradients_of_earlier_micro_batches_stay():
    few = buckets(tokens=Tokens(16, 64))
    many = buckets(tokens=Tokens(16, 64), num_micro_batches=2)
    assert few.gradients == 0  # the peak stands at the loss
    assert many.gradients == 4 * SHAPE.total_parameters
    assert many.total > few.total


def test_few_tokens_peak_where_all_gradients_have_come():
    memory = training_memory(SHAPE, Layout(), TrainingStep(Tokens(1, 8), "float32"))
    assert memory.moment == "embedding"
    assert memory.peak.gradients == 4 * SHAPE.total_parameters


@pytest.mark.parametrize(
    ("zero", "weights", "gradients", "states"), [(0, 1, 1, 1), (1, 1, 1, 8), (2, 1, 8, 8), (3, 8, 8, 8)]
)
def test_zero_shares_dense_over_all_and_experts_over_their_own_ranks(zero, weights, gradients, states):
    """DP 8, EP 4: experts are held by 2 ranks, EDP; not by DP."""
    layout = Layout(data=8, expert=4, zero=zero)
    local = stage_parameters(SHAPE, layout, 0)
    assert local.experts == SHAPE.parameters.routed / 4
    peak = buckets(layout, num_micro_batches=2, tokens=Tokens(64, 64))

    def shared(count):
        return local.dense / count + local.experts / min(count, 2)

    assert peak.weights == pytest.approx(4 * shared(weights))
    assert peak.gradients == pytest.approx(4 * shared(gradients))
    assert peak.optimizer == pytest.approx(8 * shared(states))


def test_ddp_holds_gradients_twice_unless_they_are_views():
    layout = Layout(data=4)
    assert buckets(layout).exchange == 4 * SHAPE.total_parameters
    assert buckets(layout, gradient_bucket_views=True).exchange == 0
    # With experts on all four ranks nobody else has the same ones.
    spread = Layout(data=4, expert=4)
    rows = 2 * 128 * 2 * 64 * 4
    assert buckets(spread).exchange == rows + 4 * stage_parameters(SHAPE, spread, 0).dense


def test_zero_3_gathers_two_layers_and_the_ends():
    layer = (SHAPE.total_parameters - 2 * 512 * 64 - 64) / 4
    ends = 2 * 512 * 64 + 64
    assert buckets(Layout(data=4, zero=3)).exchange == 4 * (2 * layer + ends) + 4 * layer


def test_recomputation_trades_activations():
    tokens = Tokens(16, 64)
    none, selective, full = (buckets(tokens=tokens, recompute=level) for level in ("none", "selective", "full"))
    assert none.activations > selective.activations > full.activations
    # At the loss a checkpointed layer holds its input alone.
    kept = 4 * 1024 * 64 * 4
    blocks = BlockBytes(SHAPE, tokens, Layout(), PRECISIONS["float32"])
    head = sum(one.saved for one in blocks.head() if one.name != "cross-entropy")
    un_embedding = 4 * 1024 * 64
    assert full.activations == kept + head + blocks.embedding()[0].saved
    assert head > un_embedding


def test_imbalance_scales_routed_rows_alone():
    blocks = {
        rho: BlockBytes(SHAPE, Tokens(2, 64, rho), Layout(), PRECISIONS["float32"]).layer(0) for rho in (1.0, 1.5)
    }
    routed = ("gather", "expert up", "expert activation", "expert gating", "expert down", "weighting", "combine")
    for even, uneven in zip(blocks[1.0], blocks[1.5], strict=True):
        assert uneven.saved == even.saved * (1.5 if even.name in routed else 1)


def test_eager_attention_stores_the_weights():
    flash, eager = (buckets(tokens=Tokens(2, 64, eager_attention=eager)) for eager in (False, True))
    assert eager.activations > flash.activations


def test_stages_hold_micro_batches_in_flight():
    step = {"tokens": Tokens(8, 64), "num_micro_batches": 4}
    one, two = buckets(**step), buckets(Layout(pipeline=2), **step)
    assert two.weights < one.weights
    memory = training_memory(SHAPE, Layout(pipeline=4), TrainingStep(Tokens(8, 64), "float32", num_micro_batches=8))
    assert memory.stage in (0, 3)


def test_narrower_numbers_take_less():
    wide, cast, half = (
        training_memory(SHAPE, Layout(), TrainingStep(Tokens(32, 64), name)).total
        for name in ("float32", "autocast", "bfloat16")
    )
    assert wide > cast > half


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"precision": "fp8"}, "precision must be one of float32, bfloat16, autocast, megatron, got 'fp8'"),
        ({"optimizer": "lion"}, "optimizer must be one of adamw, muon"),
        ({"recompute": "some"}, "recompute must be one of none, selective, full, got 'some'"),
        ({"num_micro_batches": 0}, "num_micro_batches must be at least 1, got 0"),
    ],
)
def test_bad_steps(step, message):
    with pytest.raises(ValueError, match=message):
        TrainingStep(TOKENS, **step)


def test_bad_tokens_and_layouts():
    with pytest.raises(ValueError, match="num_sequences must be at least 1, got 0"):
        Tokens(0, 64)
    with pytest.raises(ValueError, match="imbalance is the busiest rank over the mean, at least 1, got 0"):
        Tokens(1, 64, 0)
    with pytest.raises(ValueError, match="context must divide sequence_length=63, got 2"):
        training_memory(SHAPE, Layout(context=2), TrainingStep(replace(TOKENS, sequence_length=63)))
