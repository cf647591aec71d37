"""Models whose experts share a base: what they compute, how they are born, saved and read, and what users do with them."""

import pytest
import torch
from torch import nn

from hf_moe_ext.ders.block import DenseFfn, UniversalMoeBlock
from hf_moe_ext.ders.experts import DersExperts
from support.latent_models import assert_same, make_config, make_model
from support.shared_base import IDS, every_block, every_model, fill_deltas, gradients

# --- what they compute -----------------------------------------------------------------------------------------------


@every_model
@every_block
def test_both_forwards_are_one_function_of_the_weights(family, block):
    fused = fill_deltas(make_model(family, block, dtype=torch.float64))
    plain = make_model(family, block, dtype=torch.float64, ders_forward="materialised")
    plain.load_state_dict(fused.state_dict())
    paths = {module.forward_path for module in plain.modules() if isinstance(module, DersExperts)}
    assert paths == {"materialised"}
    torch.testing.assert_close(fused(IDS).logits, plain(IDS).logits, atol=1e-10, rtol=0)
    ours, theirs = gradients(fused, input_ids=IDS), gradients(plain, input_ids=IDS)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-10, rtol=0, msg=name)


def naive_block(block, hidden, config):
    """Token by token in float64 from the block's own tensors: every expert's matrices written out whole."""
    experts = block.experts
    width = experts.intermediate_dim
    bases = dict(zip(("gate", "up", "down"), (*experts.gate_up_proj.split(width), experts.down_proj), strict=True))
    matrices = [
        {m: base + experts.deltas(m).delta(i).decode().to(base) for m, base in bases.items()}
        for i in range(experts.num_experts)
    ]

    def run(i, x):
        gate, up, down = (matrices[i][m] for m in ("gate", "up", "down"))
        first, last = (0, 0), 0
        if experts.has_bias:
            first, last = experts.gate_up_proj_bias[i].split(width), experts.down_proj_bias[i]
        return down @ (nn.functional.silu(gate @ x + first[0]) * (up @ x + first[1])) + last

    rows = []
    for x in hidden:
        probs = torch.softmax(block.gate.weight @ x, dim=-1)
        kept = sorted(range(len(probs)), key=lambda i: -float(probs[i].detach()))[: config.num_experts_per_tok]
        gates = torch.stack([probs[i] for i in kept])
        if config.norm_topk_prob:
            gates = gates / gates.sum()
        own = torch.ones(())
        if config.moe_shared_expert_intermediate_size and config.ders_universal_gate == "complement":
            own, gates = 1 - probs.max(), gates * probs.max()
        y = sum(g * run(i, x) for g, i in zip(gates, kept, strict=True))
        if config.ders_share_universal:
            y = y + own * run(experts.num_experts - 1, x)
        elif config.moe_shared_expert_intermediate_size:
            y = y + own * block.shared_expert(x)
        rows.append(y)
    return torch.stack(rows)


GATED = {
    "shared, complement": {"ders_share_universal": True},
    "shared, add": {"ders_share_universal": True, "ders_universal_gate": "add"},
    "beside, complement": {},
    "beside, add": {"ders_universal_gate": "add"},
}


@every_model
@pytest.mark.parametrize("case", ["none", *GATED])
def test_the_block_is_what_the_tensors_say(family, case):
    shared = {} if case == "none" else {"moe_shared_expert_intermediate_size": 48, **GATED[case]}
    model = fill_deltas(make_model(family, "low_rank", ders_bias=True, norm_topk_prob=True, **shared)).double()
    block = model.model.layers[1].mlp
    hidden = torch.randn(1, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # Stock routers compute in float32.
        torch.testing.assert_close(block(hidden)[0], naive_block(block, hidden[0], model.config), atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", [False, True])
def test_mixtral_gates_as_they_are(norm):
    model = make_model("mixtral_ext", "standard", norm_topk_prob=norm)
    other = make_model("mixtral_ext", "low_rank", norm_topk_prob=norm)
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for block in (model.model.layers[0].mlp, other.model.layers[1].mlp):
        logits, gates, index = block.gate(rows)
        probs = torch.softmax(rows @ block.gate.weight.T, -1)
        expected = probs.gather(1, index)
        if norm:
            expected = expected / expected.sum(-1, keepdim=True)
        torch.testing.assert_close(gates, expected)
        assert logits.shape == (5, 8)
    out = model(IDS, output_router_logits=True)
    assert len(out.router_logits) == 2
    assert out.router_logits[0].shape == (22, 8)


@every_model
def test_copies_of_one_ffn_are_that_ffn(family):
    """At birth deltas are zero, so with gates that sum to 1 a layer is the dense layer of its base."""
    shared = {"moe_shared_expert_intermediate_size": 48, "ders_share_universal": True}
    for keys in ({}, {"ders_delta": "sparse"}, {"ders_delta": "quantized"}, shared):
        model = make_model(family, "low_rank", norm_topk_prob=True, **keys)
        mlp = model.model.layers[0].mlp
        dense = DenseFfn(32, 48, nn.functional.silu)
        with torch.no_grad():
            dense.gate_proj.weight.copy_(mlp.experts.gate_up_proj[:48])
            dense.up_proj.weight.copy_(mlp.experts.gate_up_proj[48:])
            dense.down_proj.weight.copy_(mlp.experts.down_proj)
        rows = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(mlp(rows), dense(rows), atol=1e-5, rtol=1e-5)


# --- birth -----------------------------------------------------------------------------------------------------------


@every_model
def test_drawn_as_stock_experts_are(family):
    model = make_model(family, "universal", hidden_size=64, num_attention_heads=8, initializer_range=0.05)
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts, DersExperts)
    assert experts.num_experts == 9
    for base in (experts.gate_up_proj, experts.down_proj):
        assert float(base.detach().std()) == pytest.approx(0.05, rel=0.1)
    assert not experts.gate_up_proj_bias.any()
    assert not experts.delta_up_B.any()
    assert float(experts.delta_up_A.detach().abs().max()) == pytest.approx(64**-0.5, rel=0.02)
    assert float(model.model.layers[1].mlp.gate.weight.detach().std()) == pytest.approx(0.05, rel=0.1)
    assert torch.equal(
        make_model(family, "universal", seed=1).lm_head.weight, make_model(family, "universal", seed=1).lm_head.weight
    )


def test_streams_name_layer_matrix_and_expert():
    model = make_model("mixtral_ext", "sparse")
    stream = model.model.layers[1].mlp.experts.delta_up_stream
    assert stream.tolist() == [[5, 1, 1, expert] for expert in range(8)]
    assert model.model.layers[0].mlp.experts.delta_down_stream[3].tolist() == [5, 0, 2, 3]


def test_blocks_per_layer_and_numbers_per_matrix():
    model = make_model("mixtral_ext", "some_layers")
    kinds = [type(layer.mlp).__name__ for layer in model.model.layers]
    assert kinds == [
        "DenseFfn",
        "MixtralSparseMoeBlock",
        "MixtralSparseMoeBlock",
        "MixtralSparseMoeBlock",
        "DccaMoeBlock",
    ]
    first, second = (model.model.layers[i].mlp.experts for i in (1, 3))
    assert [first.delta_gate_A.shape[1], first.delta_up_A.shape[1], first.delta_down_A.shape[1]] == [1, 2, 3]
    assert second.delta_down_B.shape == (8, 32, 4)
    assert isinstance(make_model("olmoe_ext", "beside").model.layers[0].mlp, UniversalMoeBlock)


def test_a_qwen_model_keeps_the_dense_layers_of_its_stock_keys():
    keys = {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    model = make_model("qwen3_moe_ext", "low_rank", **keys)
    assert model.config.moe_blocks == ["dense", "ders", "dense", "dense"]
    kinds = [type(layer.mlp).__name__ for layer in model.model.layers]
    assert kinds == ["Qwen3MoeMLP", "Qwen3MoeSparseMoeBlock", "Qwen3MoeMLP", "Qwen3MoeMLP"]
    with pytest.raises(
        ValueError, match=r"moe_block\[2\]='ders', but mlp_only_layers=\[3\] with decoder_sparse_step=2"
    ):
        make_config("qwen3_moe_ext", "standard", moe_block=["dense", "ders", "ders", "dense"], **keys)


def test_a_qwen_model_with_dense_layers_is_the_stock_one():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from support.latent_models import stock_settings

    keys = {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    ours = make_model("qwen3_moe_ext", "standard", **keys)
    torch.manual_seed(0)
    theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**stock_settings("qwen3_moe") | keys)).eval()
    assert_same(ours.state_dict(), theirs.state_dict())
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
