"""Models whose experts share a base: what they compute, how they are born, saved and read, and what users do with them."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from hf_moe_ext import PerftConfig
from hf_moe_ext.ders.block import DenseFfn, UniversalMoeBlock
from hf_moe_ext.ders.experts import DersExperts
from support import trainers
from support.latent_models import DERS_BLOCKS, FAMILIES, make_config, make_model
from support.shared_base import fill_deltas

every_model = pytest.mark.parametrize("family", FAMILIES)
every_block = pytest.mark.parametrize("block", DERS_BLOCKS)
IDS = torch.arange(3, 25).reshape(2, 11)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


def gradients(model, **inputs):
    model.zero_grad()
    model(**inputs, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


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
        assert float(base.std()) == pytest.approx(0.05, rel=0.1)
    assert not experts.gate_up_proj_bias.any()
    assert not experts.delta_up_B.any()
    assert float(experts.delta_up_A.abs().max()) == pytest.approx(64**-0.5, rel=0.02)
    assert float(model.model.layers[1].mlp.gate.weight.std()) == pytest.approx(0.05, rel=0.1)
    assert torch.equal(
        make_model(family, "universal", seed=1).lm_head.weight, make_model(family, "universal", seed=1).lm_head.weight
    )


def test_streams_name_layer_matrix_and_expert():
    model = make_model("mixtral_ext", "sparse")
    stream = model.model.layers[1].mlp.experts.delta_up_stream
    assert stream.tolist() == [[5, 1, 1, expert] for expert in range(8)]
    assert model.model.layers[0].mlp.experts.delta_down_stream[3].tolist() == [5, 0, 2, 3]


# --- on disk ---------------------------------------------------------------------------------------------------------


@every_model
@every_block
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_open_again(family, block, dtype, tmp_path):
    fill_deltas(make_model(family, block, output_router_logits=True)).save_pretrained(tmp_path / "first")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=dtype)
    assert model.lm_head.weight.dtype == dtype
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert type(again) is type(model)
    assert_same(again.state_dict(), model.state_dict())
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


NAMES = {
    "low_rank": {f"delta_{m}_{part}" for m in ("gate", "up", "down") for part in "AB"},
    "sparse": {f"delta_{m}_{part}" for m in ("gate", "up", "down") for part in ("values", "stream")},
    "quantized": {f"delta_{m}_{part}" for m in ("gate", "up", "down") for part in ("codes", "scales")},
    "sparse_values": {f"delta_{m}_{part}" for m in ("gate", "up", "down") for part in ("codes", "scales", "positions")},
    "universal": {f"delta_{m}_{part}" for m in ("gate", "up", "down") for part in "AB"}
    | {"gate_up_proj_bias", "down_proj_bias"},
}


@every_model
@pytest.mark.parametrize("block", NAMES)
def test_names_on_disk(family, block):
    """A golden list: a renamed tensor is a breaking change."""
    names = {n.removeprefix("model.layers.1.mlp.") for n in make_model(family, block).state_dict() if ".1.mlp" in n}
    assert names == {"gate.weight"} | {f"experts.{n}" for n in NAMES[block] | {"gate_up_proj", "down_proj"}}


@every_model
def test_names_of_dense_layers_and_of_a_universal_ffn(family):
    names = set(make_model(family, "some_layers", ders_bias=True).state_dict())
    parts = [f"{m}_proj.{kind}" for m in ("gate", "up", "down") for kind in ("weight", "bias")]
    assert {n.removeprefix("model.layers.0.mlp.") for n in names if ".0.mlp." in n} == set(parts)
    names = set(make_model(family, "beside").state_dict())
    assert {n.partition("shared_expert.")[2] for n in names if ".0.mlp.shared" in n} == set(parts)


@every_model
@every_block
def test_a_missing_tensor_is_refused_by_name(family, block, tmp_path):
    make_model(family, block).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    layer = 1
    for name in [n for n in whole if f"layers.{layer}.mlp." in n]:
        save_file({n: t for n, t in whole.items() if n != name}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=rf"layers {layer} are not those.*ders_delta=.*it has no {name}"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


@every_model
@pytest.mark.parametrize(
    ("saved", "wanted", "rule"),
    [
        ("standard", {"moe_block": "ders"}, "moe_block='ders', ders_delta='low_rank', ders_rank=4.*hf-moe upcycle"),
        ("low_rank", {"moe_block": "standard"}, r"down_proj is \(32, 48\), the model's \(8, 32, 48\)"),
        ("low_rank", {"ders_rank": 2}, "ders_rank=2"),
        ("sparse", {"ders_drop_rate": 0.5}, "ders_drop_rate=0.5"),
        ("quantized", {"ders_bits": 8}, "ders_bits=8"),
        ("universal", {"ders_bias": False}, "ders_bias=False"),
        ("universal", {"ders_share_universal": False}, "ders_share_universal=False"),
    ],
)
def test_a_checkpoint_of_other_blocks_is_refused(family, saved, wanted, rule, tmp_path):
    make_model(family, saved).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rule):
        AutoModelForCausalLM.from_pretrained(tmp_path, **wanted)


def test_no_matrix_per_expert_on_disk(tmp_path):
    with pytest.raises(ValueError, match="one matrix per expert, which experts with a shared base"):
        make_model("mixtral_ext", "low_rank").save_pretrained(tmp_path / "out", save_original_format=True)
    assert not (tmp_path / "out").exists()


# --- what users do ---------------------------------------------------------------------------------------------------


@every_model
@every_block
def test_generation_with_a_cache(family, block):
    model = fill_deltas(make_model(family, block))
    cached, plain = (
        model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached, plain)


@every_model
@every_block
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(family, block, reentrant):
    found = []
    for checkpointed in (False, True):
        model = fill_deltas(make_model(family, block, dtype=torch.float64)).train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        found.append({n: g for n, g in gradients(model, inputs_embeds=embedded).items() if g is not None})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], atol=1e-12, rtol=0)


@pytest.mark.filterwarnings(
    # The compiler looks at every tensor where a graph ends.
    "ignore:The .grad attribute of a Tensor:UserWarning"
)
@pytest.mark.parametrize(
    ("family", "block"),
    [
        ("mixtral_ext", "low_rank"),
        *(
            pytest.param(family, block, marks=pytest.mark.slow)
            for family, block in [
                ("qwen3_moe_ext", "universal"),
                ("olmoe_ext", "sparse"),
                ("mixtral_ext", "quantized"),
                ("qwen3_moe_ext", "some_layers"),
            ]
        ),
    ],
)
def test_compiles(family, block):
    model = fill_deltas(make_model(family, block)).train()
    torch._dynamo.reset()
    # Only low-rank deltas have shapes that no routing decides; a graph ends at the others and begins again.
    whole = block not in ("sparse", "quantized")
    loss = torch.compile(model, fullgraph=whole, backend="aot_eager")(IDS, labels=IDS).loss
    expected = model(IDS, labels=IDS).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(loss, trained, allow_unused=True)
    theirs = torch.autograd.grad(expected, trained, allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)


@every_model
@pytest.mark.parametrize("block", ["low_rank", "sparse", "quantized", "universal"])
@torch.no_grad()
def test_bfloat16_stays_near_float32(family, block):
    # 2^-8 of a bfloat16 number through two layers and a head, of logits near 1: some hundredths.
    model = fill_deltas(make_model(family, block))
    exact = model(IDS).logits
    assert float((model.to(torch.bfloat16)(IDS).logits.float() - exact).abs().median()) < 0.02 * float(exact.std())


@every_model
@pytest.mark.parametrize("block", ["low_rank", "sparse", "quantized", "some_layers"])
def test_the_trainer_resumes_where_it_was(family, block, tmp_path):
    def train(folder, resume=None):
        model = fill_deltas(make_model(family, block, seed=1)).train()
        settings = trainers.arguments(
            folder, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-2, gradient_accumulation_steps=1
        )
        trainer = trainers.build_trainer("Trainer", model, settings, trainers.rows(16), [])
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = train(tmp_path / "whole")
    resumed = train(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-2"))
    assert_same(resumed, whole)
    born = fill_deltas(make_model(family, block, seed=1)).state_dict()
    moved = {name.rpartition(".")[2] for name in born if not torch.equal(born[name], whole[name])}
    assert {"gate_up_proj", "down_proj"} <= moved
    assert not any(name.endswith(("_codes", "_scales", "_stream", "_positions")) for name in moved)


@every_model
@pytest.mark.parametrize("variant", ["R", "E", "D", "S"])
@pytest.mark.parametrize("block", ["low_rank", "universal"])
def test_perft_attaches(family, variant, block, tmp_path):
    from peft import AutoPeftModelForCausalLM, get_peft_model

    fill_deltas(make_model(family, block)).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = base(IDS).logits
    model = get_peft_model(base, PerftConfig(variant=variant, r=4, lora_alpha=8, task_type="CAUSAL_LM"))
    assert torch.equal(model(IDS).logits, expected)  # a no-op at birth
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(".perft_" in name for name in trained)
    trainer = trainers.build_trainer(
        "Trainer", model, trainers.arguments(tmp_path / "run", learning_rate=0.1), trainers.rows(), []
    )
    trainer.train()
    changed = model.eval()(IDS).logits
    assert not torch.allclose(changed, expected)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(again(IDS).logits, changed)
    assert torch.equal(model.unload()(IDS).logits, expected)


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
