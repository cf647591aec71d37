"""Who holds what, counted by hand."""

import pytest

from hf_moe_ext.scaling.attention import GroupedAttention
from hf_moe_ext.scaling.feed_forward import Deltas, DenseFfn, MoeFfn
from hf_moe_ext.scaling.layout import Layout, cache_ranks, layer_parameters_on_rank, stage_parameters
from hf_moe_ext.scaling.shape import MoeShape

SHAPE = MoeShape.uniform(
    4, 64, MoeFfn(8, 2, 32, shared=DenseFfn(48)), num_heads=4, num_key_value_heads=2, vocab_size=100, context_length=128
)
ATTENTION, EXPERTS, SHARED, ROUTER, NORMS = 2 * 64 * (64 + 32), 8 * 3 * 64 * 32, 3 * 64 * 48, 8 * 64, 2 * 64


def test_one_rank_holds_the_model():
    local = stage_parameters(SHAPE, Layout(), 0)
    assert local.total == SHAPE.total_parameters
    assert local.experts == SHAPE.parameters.routed


def test_world_and_expert_data():
    layout = Layout(data=8, tensor=2, pipeline=2, context=2, expert=4, expert_tensor=2)
    assert (layout.world_size, layout.expert_data, layout.dense_data) == (64, 4, 16)
    # ETP EP EDP PP is the same world.
    assert layout.expert_tensor * layout.expert * layout.expert_data * layout.pipeline == layout.world_size


def test_a_layer_is_cut_in_three_ways():
    """Matrices over TP, router and norms whole, experts over EP and ETP."""
    local = layer_parameters_on_rank(SHAPE, 0, Layout(data=4, tensor=2, expert=4))
    assert local.experts == EXPERTS / 4
    assert local.dense == (ATTENTION + SHARED) / 2 + ROUTER + NORMS


def test_stages_hold_their_layers_and_ends():
    layout = Layout(pipeline=4)
    first, second, last = (stage_parameters(SHAPE, layout, stage).total for stage in (0, 1, 3))
    assert (first - second, last - second) == (100 * 64, 100 * 64 + 64)
    assert sum(stage_parameters(SHAPE, layout, stage).total for stage in range(4)) == SHAPE.total_parameters


def test_a_tied_head_is_on_both_ends():
    tied = MoeShape.uniform(
        2, 64, MoeFfn(8, 2, 32), num_heads=4, vocab_size=100, context_length=128, tied_embeddings=True
    )
    assert stage_parameters(tied, Layout(), 0).total == tied.total_parameters
    both = sum(stage_parameters(tied, Layout(pipeline=2), stage).total for stage in range(2))
    assert both == tied.total_parameters + 100 * 64


def test_a_shared_base_is_on_every_rank():
    ders = MoeFfn(8, 2, 32, deltas=Deltas("low_rank", rank=(4, 4, 4)))
    shape = MoeShape.uniform(1, 64, ders, num_heads=4, vocab_size=100, context_length=128)
    whole, cut = (layer_parameters_on_rank(shape, 0, Layout(data=n, expert=n)) for n in (1, 8))
    deltas = 8 * 3 * 4 * (64 + 32)
    assert (whole.experts, cut.experts, cut.dense) == (deltas, deltas / 8, whole.dense)
    assert stage_parameters(shape, Layout(), 0).total == shape.total_parameters


def test_latent_caches_are_not_cut_by_tensor_parallelism():
    deepseek = MoeShape.from_hf({"model_type": "deepseek_v3"})
    assert cache_ranks(deepseek, Layout(tensor=4, pipeline=2)) == 2
    assert cache_ranks(SHAPE, Layout(tensor=2, pipeline=2)) == 4


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(data=3, expert=3), "expert must divide num_experts=8, got 3"),
        (Layout(tensor=3), "tensor must divide num_heads=4, got 3"),
        (Layout(tensor=4), "tensor must divide num_key_value_heads=2, got 4"),
        (Layout(pipeline=3), "pipeline must divide num_layers=4, got 3"),
        (Layout(data=5, expert_tensor=5), "expert_tensor must divide intermediate_size=32, got 5"),
    ],
)
def test_cuts_that_do_not_fit(layout, message):
    with pytest.raises(ValueError, match=message):
        layout.check(SHAPE)


def test_dense_models_have_no_experts_to_share():
    dense = MoeShape(64, 100, 128, GroupedAttention(4, 4, 16), (DenseFfn(128),))
    with pytest.raises(ValueError, match="the model has none"):
        Layout(data=2, expert=2).check(dense)


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"data": 0}, "data must be at least 1, got 0"),
        ({"expert": 4}, "expert . expert_tensor must divide tensor . context . data = 1"),
        ({"zero": 4}, "zero must be 0, 1, 2 or 3, got 4"),
        ({"dispatch": "deepep"}, "dispatch must be one of all_to_all, latent_all_to_all, got 'deepep'"),
    ],
)
def test_impossible_layouts(degrees, message):
    with pytest.raises(ValueError, match=message):
        Layout(**degrees)
    with pytest.raises(TypeError, match="data must be an integer"):
        Layout(data=2.0)
