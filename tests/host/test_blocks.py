"""`hf_moe_ext.host.blocks`: the MoE blocks of every family are found by structure, and nothing else is."""

import logging

import pytest
import torch
from peft import get_peft_model
from torch import nn

from hf_moe_ext import PerftConfig
from hf_moe_ext.host.blocks import explain_no_blocks, iterate_experts, read_experts, routing_arguments
from support import zoo

HIDDEN = 32

# Read off the zoo's configurations, not off the code under test: the experts modules of each tiny model, how many ids
# its router can send, and the layers that have no experts.
EXPECTED = {
    "mixtral": (["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"], 4),
    "olmoe": (["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"], 8),
    "flex_olmo": (["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"], 5),
    "qwen2_moe": (["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"], 8),
    "qwen3_moe": (["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"], 8),
    "deepseek_v3": (["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"], 8),
    "gpt_oss": (["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"], 4),
    "glm4_moe": (["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"], 8),
    "granitemoe": (["model.layers.0.block_sparse_moe.experts", "model.layers.1.block_sparse_moe.experts"], 4),
    "ernie4_5_moe": (["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"], 6),
    "phimoe": (["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"], 4),
    "minimax_m2": (["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"], 8),
    "nemotron_h": (["model.layers.1.mixer.experts", "model.layers.4.mixer.experts"], 8),
    "hunyuan_v1_moe": (["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"], 4),
    "exaone_moe": (["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"], 8),
}

# Where a family's tiny model has a dense layer: the module that must be left alone.
DENSE = {
    "qwen2_moe": "model.layers.0.mlp",
    "qwen3_moe": "model.layers.0.mlp",
    "deepseek_v3": "model.layers.0.mlp",
    "glm4_moe": "model.layers.0.mlp",
    "ernie4_5_moe": "model.layers.0.mlp",
    "exaone_moe": "model.layers.0.mlp",
    "nemotron_h": "model.layers.3.mixer",
}

REFUSALS = {
    "llama4": (
        "The MoE blocks of Llama4ForCausalLM (model_type 'llama4_text') cannot be served: Llama4TextExperts at "
        "'model.layers.0.feed_forward.experts' takes (hidden_states), not (hidden_states, index, weights)"
    ),
    "jetmoe": (
        "The MoE blocks of JetMoeForCausalLM (model_type 'jetmoe') cannot be served: JetMoeParallelExperts at "
        "'model.layers.0.mlp.input_linear' takes (inputs, expert_size), not (hidden_states, index, weights)"
    ),
    "llama": "No MoE block found in LlamaForCausalLM (model_type 'llama')",
}


def test_every_family_of_the_zoo_is_expected():
    assert EXPECTED.keys() == zoo.FAMILIES.keys()
    assert REFUSALS.keys() == zoo.REFUSED.keys()


@pytest.mark.parametrize("family", EXPECTED)
def test_finds_exactly_the_moe_blocks(family):
    names, num_experts = EXPECTED[family]
    model = zoo.build(family)
    sites = list(iterate_experts(model))
    assert [site.name for site in sites] == names
    for site in sites:
        assert site.experts is model.get_submodule(site.name)
        assert (site.num_experts, site.hidden_size) == (num_experts, HIDDEN)


@pytest.mark.parametrize("family", EXPECTED)
def test_description_agrees_with_what_the_experts_receive(family):
    """The sizes and the argument names are those of a real forward pass, whatever the modules call themselves."""
    model = zoo.build(family)
    seen = []

    def record(module, args, kwargs):
        seen.append((module, args, kwargs))

    sites = list(iterate_experts(model))
    for site in sites:
        site.experts.register_forward_pre_hook(record, with_kwargs=True)
    batch = zoo.random_batch()
    model(**batch)
    assert [module for module, _, _ in seen] == [site.experts for site in sites]
    for site, (_, args, kwargs) in zip(sites, seen, strict=True):
        arguments = dict(zip(("hidden", site.index_name, site.weights_name), args, strict=False)) | kwargs
        index, weights = arguments[site.index_name], arguments[site.weights_name]
        assert arguments["hidden"].shape == (batch["input_ids"].numel(), site.hidden_size)
        assert index.dtype == torch.long
        assert index.shape == weights.shape == (batch["input_ids"].numel(), index.shape[1])
        assert index.min() >= 0
        assert index.max() < site.num_experts
        assert len(index.unique()) > 1


@pytest.mark.parametrize("family", DENSE)
def test_dense_layers_are_left_alone(family):
    model = zoo.build(family)
    dense = model.get_submodule(DENSE[family])
    modules = dict(dense.named_modules())
    assert not any(name.endswith("experts") for name in modules), "the zoo's layer is not dense"
    get_peft_model(model, PerftConfig(variant="D"))
    assert model.get_submodule(DENSE[family]) is dense
    assert dict(dense.named_modules()) == modules


def test_nemotron_experts_work_in_the_latent_width():
    """Nemotron-H projects to a latent width before its experts, while `experts.hidden_dim` says the model's width."""
    model = zoo.build("nemotron_h", moe_latent_size=16)
    sites = list(iterate_experts(model))
    assert [site.name for site in sites] == EXPECTED["nemotron_h"][0]
    assert [site.hidden_size for site in sites] == [16, 16]
    assert sites[0].experts.hidden_dim == HIDDEN, "the trap this test is about has gone"
    widths = []
    sites[0].experts.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[-1]))
    model(**zoo.random_batch())
    assert widths == [16]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_adapted_blocks_are_found_under_their_own_names(family):
    model = zoo.build(family)
    before = list(iterate_experts(model))
    get_peft_model(model, PerftConfig(variant="S"))
    assert list(iterate_experts(model)) == before  # frozen dataclasses: names, sizes and the same base modules
    wrapped = model.get_submodule(before[0].name)
    assert wrapped is not before[0].experts
    assert read_experts(before[0].name, wrapped) == before[0]


@pytest.mark.parametrize("family", REFUSALS)
def test_unservable_models_are_refused_by_name(family):
    model = zoo.build(family)
    assert list(iterate_experts(model)) == []
    assert explain_no_blocks(model) == REFUSALS[family]
    modules, tensors = dict(model.named_modules()), dict(model.named_parameters())
    with pytest.raises(ValueError, match="supported: every family whose experts take") as error:
        get_peft_model(model, PerftConfig())
    assert str(error.value).startswith(REFUSALS[family])
    assert dict(model.named_modules()) == modules
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in tensors.items()}


def test_attaching_logs_every_adapted_block(caplog):
    with caplog.at_level(logging.INFO, logger="hf_moe_ext"):
        get_peft_model(zoo.build("deepseek_v3"), PerftConfig(variant="S", r=4))
    for name in EXPECTED["deepseek_v3"][0]:
        assert f"{name}: perft_A [1, 4, 32], perft_B [1, 32, 4] = 256 parameters" in caplog.text


class _Experts(nn.Module):
    """Experts as the structure asks for them; what else they have is set by each test."""

    def forward(self, hidden_states, selected_experts, routing_weights):
        return hidden_states


class _MaskExperts(nn.ModuleDict):
    """Switch Transformers' layout: `selected_experts` is a one-hot mask there."""

    def forward(self, hidden_states, selected_experts, routing_weights):
        return hidden_states


class _KeywordExperts(nn.Module):
    def forward(self, hidden_states, top_k_index, top_k_weights, capacity=None):
        return hidden_states


class _SwappedExperts(nn.Module):
    def forward(self, hidden_states, top_k_weights, top_k_index):
        return hidden_states


def test_structure_is_hidden_states_index_weights():
    assert routing_arguments(_Experts()) == ("selected_experts", "routing_weights")
    assert routing_arguments(_MaskExperts()) is None
    assert routing_arguments(_KeywordExperts()) is None
    assert routing_arguments(_SwappedExperts()) is None
    assert routing_arguments(nn.Linear(2, 2)) is None
    assert routing_arguments(nn.Bilinear(2, 2, 2)) is None


def test_identity_experts_count_as_ids():
    """LongCat's router also sends ids of experts without weights: `total_experts` of them in all."""
    experts = _Experts()
    experts.total_experts, experts.num_routed_experts, experts.hidden_size = 6, 4, 8
    assert read_experts("experts", experts).num_experts == 6


def test_packed_weights_do_not_set_the_width():
    """A quantised weight is packed, so its last axis is no width; the module's own number is taken instead."""
    experts = _Experts()
    experts.gate_up_proj = nn.Parameter(torch.zeros(4, 12, 5, dtype=torch.uint8), requires_grad=False)
    experts.num_experts, experts.hidden_dim = 4, 40
    assert read_experts("experts", experts).hidden_size == 40


def test_transposed_weights_set_the_width():
    experts = _Experts()
    experts.num_experts, experts.is_transposed = 4, True
    experts.gate_up_proj = nn.Parameter(torch.zeros(4, 40, 12))
    assert read_experts("experts", experts).hidden_size == 40
    experts.is_transposed = False
    assert read_experts("experts", experts).hidden_size == 12


def test_unreadable_width_is_refused():
    experts = _Experts()
    experts.num_experts = 4
    with pytest.raises(TypeError, match="cannot tell the input width of _Experts: no hidden_dim and no fused weight"):
        read_experts("experts", experts)
