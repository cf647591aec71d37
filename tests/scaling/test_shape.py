"""Counts against the meta-device models, to the parameter, and against the published tables."""

import itertools
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import hf_moe_ext  # noqa: F401  (makes the loaders know our types)
from hf_moe_ext.scaling import ders_accounting, layer_counts
from hf_moe_ext.scaling.attention import GroupedAttention, LatentAttention
from hf_moe_ext.scaling.family_defaults import DEFAULTS
from hf_moe_ext.scaling.feed_forward import DenseFfn, MoeFfn
from hf_moe_ext.scaling.shape import MoeShape
from support.published_configs import PUBLISHED, PUBLISHED_BILLIONS

TINY = {"vocab_size": 101, "max_position_embeddings": 64, "num_hidden_layers": 5, "hidden_size": 48}
LATENT = {
    "num_attention_heads": 3, "num_key_value_heads": 3, "kv_lora_rank": 12, "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6, "v_head_dim": 9, "num_experts_per_tok": 2, "moe_intermediate_size": 13,
    "n_routed_experts": 8, "intermediate_size": 29, "n_group": 1, "topk_group": 1,
}  # fmt: skip
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "num_experts_per_tok": 3}
# Odd sizes, and every switch that adds or removes a tensor.
ODD = {
    "mixtral": {**HEADS, "model_type": "mixtral", "head_dim": 10, "intermediate_size": 23, "num_local_experts": 5},
    "mixtral tied": {**HEADS, "model_type": "mixtral", "intermediate_size": 23, "tie_word_embeddings": True},
    "olmoe": {**HEADS, "model_type": "olmoe", "intermediate_size": 19, "num_experts": 7, "attention_bias": True},
    "olmoe all heads": {"model_type": "olmoe", "num_attention_heads": 6, "intermediate_size": 19},
    "qwen2_moe": {
        **HEADS, "model_type": "qwen2_moe", "intermediate_size": 31, "moe_intermediate_size": 9, "num_experts": 6,
        "shared_expert_intermediate_size": 21, "decoder_sparse_step": 2, "mlp_only_layers": [3],
    },
    "qwen2_moe no bias": {**HEADS, "model_type": "qwen2_moe", "qkv_bias": False, "num_experts": 4},
    "qwen3_moe": {
        **HEADS, "model_type": "qwen3_moe", "head_dim": 14, "attention_bias": True, "mlp_only_layers": [0, 2],
        "intermediate_size": 31, "moe_intermediate_size": 9, "num_experts": 6,
    },
    "deepseek_v2": {**LATENT, "model_type": "deepseek_v2", "q_lora_rank": None, "mlp_bias": True},
    "deepseek_v2 bias": {
        **LATENT, "model_type": "deepseek_v2", "q_lora_rank": 7, "attention_bias": True, "first_k_dense_replace": 2,
    },
    "deepseek_v3": {**LATENT, "model_type": "deepseek_v3", "q_lora_rank": 7, "n_shared_experts": 3},
    "deepseek_v3 no query rank": {**LATENT, "model_type": "deepseek_v3", "q_lora_rank": None, "attention_bias": True},
    "gpt_oss": {**HEADS, "model_type": "gpt_oss", "head_dim": 10, "intermediate_size": 23, "num_local_experts": 5},
    "gpt_oss no bias": {
        **HEADS, "model_type": "gpt_oss", "head_dim": 10, "intermediate_size": 23, "num_local_experts": 5,
        "attention_bias": False,
    },
    "glm4_moe": {
        **HEADS, "model_type": "glm4_moe", "head_dim": 8, "use_qk_norm": True, "attention_bias": True,
        "intermediate_size": 31, "moe_intermediate_size": 9, "n_routed_experts": 6, "first_k_dense_replace": 3,
    },
    "granitemoe": {
        **HEADS, "model_type": "granitemoe", "intermediate_size": 23, "num_local_experts": 5, "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "mixtral_ext": {
        **HEADS, "model_type": "mixtral_ext", "moe_block": ["dcca", "standard", "dcca", "standard", "dcca"],
        "moe_latent_size": 16, "intermediate_size": 24, "num_local_experts": 5, "moe_latent_norm": True,
    },
    "olmoe_ext": {
        **HEADS, "model_type": "olmoe_ext", "moe_block": "dcca", "moe_latent_size": 24, "intermediate_size": 17,
        "num_experts": 6, "moe_expert_gated": True, "moe_shared_expert_intermediate_size": 21,
        "moe_expert_intermediate_size": 40,
    },
    "olmoe_ext un-gated, open values": {
        **HEADS, "model_type": "olmoe_ext", "moe_block": "dcca", "hidden_size": 96, "num_experts": 6,
        "moe_shared_expert_intermediate_size": 21,
    },
    "mixtral_ext low rank": {
        **HEADS, "model_type": "mixtral_ext", "moe_block": "ders", "intermediate_size": 24, "num_local_experts": 5,
        "ders_bias": True, "moe_shared_expert_intermediate_size": 20,
    },
    "mixtral_ext all blocks": {
        **HEADS, "model_type": "mixtral_ext", "moe_block": ["ders", "dense", "dcca", "standard", "ders"],
        "intermediate_size": 24, "num_local_experts": 5, "moe_latent_size": 16, "ders_bias": True,
        "ders_rank": [{"gate": 2, "up": 3, "down": 5}, None, None, None, 7],
    },
    "olmoe_ext sparse, shared with the universal": {
        **HEADS, "model_type": "olmoe_ext", "moe_block": "ders", "intermediate_size": 21, "num_experts": 6,
        "ders_delta": "sparse", "ders_drop_rate": {"gate": 0.9, "up": 0.77, "down": 0.5}, "ders_share_universal": True,
        "norm_topk_prob": True,
        "moe_shared_expert_intermediate_size": 21,
    },
    "olmoe_ext sparse, quantised values": {
        **HEADS, "model_type": "olmoe_ext", "moe_block": "ders", "intermediate_size": 21, "num_experts": 6,
        "ders_delta": "sparse", "ders_bits": 4,
    },
    "olmoe_ext quantised": {
        **HEADS, "model_type": "olmoe_ext", "moe_block": "ders", "intermediate_size": 21, "num_experts": 6,
        "ders_delta": "quantized", "ders_bits": 2, "ders_group_size": 8,
    },
    "qwen3_moe_ext": {
        **HEADS, "model_type": "qwen3_moe_ext", "moe_block": "ders", "head_dim": 14, "mlp_only_layers": [1],
        "intermediate_size": 31, "moe_intermediate_size": 24, "num_experts": 6, "decoder_sparse_step": 1,
    },
    "qwen3_moe_ext latent": {
        **HEADS, "model_type": "qwen3_moe_ext", "moe_block": ["dcca", "dense", "standard", "ders", "dcca"],
        "intermediate_size": 31, "moe_intermediate_size": 24, "num_experts": 6, "moe_latent_size": 16,
    },
}  # fmt: skip


def build(values):
    values = dict(values)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        return config, AutoModelForCausalLM.from_config(config)


def numel(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_dimensions_count_to_the_parameter(name):
    config, model = build(PUBLISHED[name])
    # The file as published, which leaves keys out, and the filled-in configuration.
    for source in (PUBLISHED[name], config, config.to_dict()):
        assert MoeShape.from_hf(source).total_parameters == numel(model)


@pytest.mark.parametrize("name", ODD)
def test_odd_dimensions_count_to_the_parameter(name):
    values = {**TINY, **ODD[name]}
    config, model = build(values)
    shape = MoeShape.from_hf(values)
    assert shape.total_parameters == numel(model)
    assert MoeShape.from_hf(config) == shape
    check_places(shape.parameters, model)


def check_places(count, model):
    """Each tensor is counted where its name says."""
    found = dict.fromkeys(vars(count), 0)
    found.pop("active_routed")
    for name, parameter in model.named_parameters():
        found[place(name)] += parameter.numel()
    assert found == {key: value for key, value in vars(count).items() if key != "active_routed"}


def place(name):
    for part, where in (
        ("embed_tokens", "input_embedding"), ("lm_head", "output_embedding"), ("self_attn", "attention"),
        (".experts.", "routed"), (".shared_expert", "shared"), (".gate.", "router"), (".router.", "router"),
        ("scend.", "projections"), ("latent_norm", "projections"), ("norm", "norms"),
    ):  # fmt: skip
        if part in name:
            return where
    return "dense"


@pytest.mark.parametrize("name", PUBLISHED_BILLIONS)
def test_published_round_numbers(name):
    total, active, with_embedding = PUBLISHED_BILLIONS[name]
    count = MoeShape.from_hf(PUBLISHED[name]).parameters
    for printed, value in ((total, count.total), (active, count.active(with_embedding))):
        digits = len(printed.partition(".")[2])
        assert f"{value / 1e9:.{digits}f}" == printed


# scaling.md, section 5.4: total, routed, active with the input embedding, input embedding.
HF_COUNTS = {
    "mixtral-8x7b": (46_702_792_704, 45_097_156_608, 12_879_925_248, 131_072_000),
    "olmoe-1b-7b": (6_919_161_856, 6_442_450_944, 1_282_017_280, 103_022_592),
    "qwen3-30b-a3b": (30_532_122_624, 28_991_029_248, 3_353_032_704, 311_164_928),
    "qwen1.5-moe-a2.7b": (14_315_784_192, 12_457_082_880, 2_689_173_504, 311_164_928),
    "deepseek-v3": (671_026_404_352, 653_908_770_816, 37_552_282_624, 926_679_040),
    "gpt-oss-20b": (20_914_757_184, 19_116_933_120, 4_187_440_704, 579_133_440),
}


@pytest.mark.parametrize("name", HF_COUNTS)
def test_counts_of_known_models(name):
    count = MoeShape.from_hf(PUBLISHED[name]).parameters
    assert (count.total, count.routed, count.active(), count.input_embedding) == HF_COUNTS[name]
    # active = total - routed (1 - K/E)
    shape = MoeShape.from_hf(PUBLISHED[name])
    assert count.active() == count.total - round(count.routed * shape.sparsity)
    assert count.active() - count.active(input_embedding=False) == count.input_embedding


def test_shared_experts_of_known_models():
    assert MoeShape.from_hf(PUBLISHED["qwen1.5-moe-a2.7b"]).parameters.shared == 830_521_344
    assert MoeShape.from_hf(PUBLISHED["deepseek-v3"]).parameters.shared == 2_554_331_136


def abnar(num_layers, d, num_experts, top_k, granularity=1, tied=False):
    width = 4 * d // granularity
    block = DenseFfn(width) if num_experts == 1 else MoeFfn(num_experts, top_k, width)
    return MoeShape.uniform(
        num_layers, d, block, num_heads=d // 64, vocab_size=50_432, context_length=2048, tied_embeddings=tied
    )


@pytest.mark.parametrize(
    ("layout", "flops", "flops_without_router", "total", "active", "ratios"),
    [
        ((8, 512, 1, 1), 456_916_992, 456_916_992, 85_196_800, 85_196_800, (".8938", "1.283")),  # the table has .8939
        ((12, 768, 8, 1), 1_139_392_512, 1_138_360_320, 785_326_080, 190_783_488, (".9954", "1.249")),
        ((16, 1024, 8, 2), 3_532_914_688, 3_531_079_680, 1_781_137_408, 573_177_856, ("1.027", "1.129")),
        ((16, 1024, 64, 2), 3_545_759_744, 3_531_079_680, 13_056_344_064, 574_095_360, ("1.029", "1.131")),
        ((24, 2048, 64, 1), 11_535_384_576, 11_491_344_384, 77_921_779_712, 1_820_327_936, ("1.056", "1.120")),
        ((32, 4096, 64, 2), 94_772_396_032, 94_654_955_520, 414_885_871_616, 15_453_913_088, ("1.022", "1.036")),
    ],
)
def test_abnar_layouts(layout, flops, flops_without_router, total, active, ratios):
    shape, tied = abnar(*layout), abnar(*layout, tied=True)
    assert shape.training_flops(2048).total == flops
    assert shape.training_flops(2048, router_flops_per_weight=0).total == flops_without_router
    # The paper's counts leave the norms out.
    count = shape.parameters
    assert (count.total - count.norms, count.active() - count.norms) == (total, active)
    for one, printed in zip((shape, tied), ratios, strict=True):
        value = flops / (6 * (one.active_parameters - one.parameters.norms))
        digits = len(printed.partition(".")[2])
        assert f"{value:.{digits}f}".removeprefix("0") == printed


def test_twice_the_granularity_halves_the_experts():
    coarse, fine = abnar(16, 1024, 8, 2), abnar(16, 1024, 8, 2, granularity=2)
    assert coarse.parameters.routed == 2 * fine.parameters.routed
    assert coarse.training_flops().experts == 2 * fine.training_flops().experts


def test_input_embedding_costs_no_flops_and_dense_layers_no_router():
    small, large = (
        MoeShape.uniform(2, 64, DenseFfn(128), num_heads=2, vocab_size=size, context_length=8) for size in (10, 30)
    )
    difference = large.training_flops().total - small.training_flops().total
    assert difference == 6 * 20 * 64  # the un-embedding alone
    assert small.training_flops().router == 0


@pytest.mark.parametrize(
    ("top_k", "num_experts", "width", "shared", "total", "active", "flops"),
    [
        (1, 8, 3528, 3528, 2_155_174_912, 590_436_352, 4_096_266_240),
        (3, 8, 2888, 8664, 2_156_188_672, 1_241_270_272, 8_001_269_760),
        (2, 88, 352, 704, 2_150_612_992, 232_579_072, 1_949_122_560),
        (1, 89, 352, 352, 2_150_612_992, 187_973_632, 1_681_489_920),
    ],
)
def test_steplaw_identities(top_k, num_experts, width, shared, total, active, flops):
    shape = MoeShape.uniform(
        16, 1408, MoeFfn(num_experts, top_k, width, shared=DenseFfn(shared)), num_heads=11, vocab_size=65_536,
        context_length=2048, num_dense_layers=1, dense=DenseFfn(3904),
    )  # fmt: skip
    count, terms = shape.parameters, shape.training_flops()
    kept = count.attention + count.dense + count.shared
    assert (kept + count.routed, kept + count.active_routed) == (total, active)
    assert terms.total - terms.router - terms.unembedding == flops


def test_forward_flops_agree_with_the_layer_formulas():
    """``layer_counts.token_flops`` counts one layer; the shape counts the same for a standard and a latent model."""
    for block, latent in (("standard", None), ("dcca", 24)):
        layer = MoeFfn(7, 3, 40, gated=latent is None, latent_size=latent)
        shape = MoeShape.uniform(3, 96, layer, num_heads=4, vocab_size=50, context_length=33)
        terms = shape.forward_flops()
        one = layer_counts.token_flops(block, 96, 7, 3, 40, 33, latent, gated=latent is None)
        assert terms.total - terms.unembedding == 3 * one.total
        assert shape.training_flops(router_flops_per_weight=6).total == 3 * terms.total


def test_matrix_flops_are_what_a_forward_multiplies():
    """Twice the entries of every matrix, the routed ones times K / E, is what PyTorch counts in a real forward."""
    from torch.utils.flop_counter import FlopCounterMode

    values = {**TINY, **ODD["qwen2_moe"], "num_hidden_layers": 4, "mlp_only_layers": [1]}
    config = AutoConfig.for_model(**values, attn_implementation="eager", experts_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).eval()
    num_tokens = 6
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(num_tokens)[None], use_cache=False)
    assert counter.get_total_flops() == num_tokens * MoeShape.from_hf(values).forward_flops(num_tokens).total


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss", "qwen3_moe", "olmoe_ext"])
def test_kv_cache_bytes_are_those_of_a_real_cache(name):
    values = {**TINY, **ODD[name]}
    values |= {"sliding_window": 100} if name == "gpt_oss" else {}
    config = AutoConfig.for_model(**values, experts_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        cache = model(torch.arange(14).view(2, 7), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert MoeShape.from_hf(config).kv_cache_bytes(7, num_sequences=2, element_bytes=4) == held


def test_windows():
    shape = MoeShape.from_hf({**TINY, **ODD["gpt_oss"], "sliding_window": 8})
    assert shape.positions(20) == (8, 20, 8, 20, 8)
    assert shape.positions(3) == (3,) * 5
    full = MoeShape.from_hf({**TINY, **ODD["gpt_oss"], "sliding_window": None})
    assert shape.kv_cache_bytes(20) * 100 == full.kv_cache_bytes(20) * 64
    assert shape.forward_flops(20).attention_scores * 100 == full.forward_flops(20).attention_scores * 64
    qwen = {**TINY, **ODD["qwen2_moe"], "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}
    assert MoeShape.from_hf(qwen).positions(20) == (8, 20, 8, 20, 20)
    assert MoeShape.from_hf({**qwen, "use_sliding_window": False}).positions(20) == (20,) * 5
    config = AutoConfig.for_model(**qwen)
    assert config.layer_types[0] == config.layer_types[2] == "sliding_attention"
    assert MoeShape.from_hf(config).positions(20) == (8, 20, 8, 20, 20)


@pytest.mark.parametrize("family", sorted(set(DEFAULTS) & set(transformers.CONFIG_MAPPING)))
def test_defaults_are_those_of_the_class(family):
    """A config.json leaves out what equals a default; ours are Transformers' own."""
    config = AutoConfig.for_model(family)
    stored = config.to_dict()
    open_values = {"num_key_value_heads": config.num_attention_heads, "mlp_only_layers": []}
    for key, value in DEFAULTS[family].items():
        if key in ("layer_types", "sliding_window", "head_dim") or (key in EXT_OPEN and value is None):
            continue  # filled in by the class; covered by the counts
        expected = open_values.get(key) if value is None else value
        assert stored.get(key, expected) == expected, key


EXT_OPEN = ("moe_latent_size", "moe_expert_intermediate_size")


def test_reads_files_and_folders(tmp_path):
    config, model = build({**TINY, **ODD["qwen3_moe"]})
    config.save_pretrained(tmp_path)
    expected = numel(model)
    for source in (tmp_path, str(tmp_path), tmp_path / "config.json"):
        assert MoeShape.from_hf(source).total_parameters == expected


def test_reads_a_hub_id_from_the_cache(tmp_path, monkeypatch):
    config, model = build({**TINY, **ODD["olmoe"]})
    revision = "0" * 40
    folder = tmp_path / "models--someone--small"
    config.save_pretrained(folder / "snapshots" / revision)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert MoeShape.from_hf("someone/small").total_parameters == numel(model)


def test_loads_no_torch(tmp_path):
    build({**TINY, **ODD["mixtral"]})[0].save_pretrained(tmp_path)
    code = (
        "import sys; from hf_moe_ext.scaling.shape import MoeShape\n"
        f"MoeShape.from_hf({str(tmp_path)!r}).training_flops()\n"
        "print(sorted({'torch', 'transformers', 'scipy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_shared_base_agrees_with_its_own_accounting():
    """Base, deltas and routers by ``ders_accounting``, whose parent has the base already."""
    geometry = ders_accounting.DersGeometry(48, 24, 5)
    keys = {**TINY, **ODD["mixtral_ext low rank"], "ders_bias": False, "moe_shared_expert_intermediate_size": 0}
    count = MoeShape.from_hf(keys).parameters
    added = ders_accounting.low_rank_parameters(geometry, num_experts=5, rank=4)
    assert count.routed + count.router == geometry.ffn_parameters + added
    # A token meets the base once, and a delta in each of its experts.
    deltas = 3 * 4 * (48 + 24)
    assert count.active_routed == 5 * (3 * 48 * 24 + 3 * deltas)
    assert MoeShape.from_hf(keys).forward_flops().experts == 2 * count.active_routed


def test_dense_deltas_cost_dense_flops():
    for name in ("olmoe_ext quantised", "olmoe_ext sparse, quantised values"):
        shape = MoeShape.from_hf({**TINY, **ODD[name]})
        assert shape.forward_flops().experts == 5 * 2 * (1 + 3) * 3 * 48 * 21
        assert shape.parameters.routed == 5 * 3 * 48 * 21


BAD = [
    ({"model_type": "llama"}, ValueError, "model_type 'llama'"),
    ({}, ValueError, "model_type None"),
    ({"model_type": "deepseek_v2"}, ValueError, "deepseek_v2 configuration: num_experts_per_tok is missing"),
    ({"model_type": "mixtral", "hidden_size": "big"}, ValueError, "mixtral configuration: hidden_size must be a whole"),
    ({"model_type": "olmoe", "num_hidden_layers": 0}, ValueError, "olmoe configuration: num_hidden_layers must be at"),
    ({"model_type": "olmoe", "tie_word_embeddings": 1}, ValueError, "tie_word_embeddings must be true or false"),
    ({"model_type": "mixtral", "num_experts_per_tok": 9}, ValueError, "top_k must be at most num_experts=8, got 9"),
    ({"model_type": "mixtral", "num_key_value_heads": 5}, ValueError, "num_key_value_heads must divide num_heads=32"),
    ({"model_type": "gpt_oss", "layer_types": ["full_attention"]}, ValueError, "one entry per layer"),
    ({"model_type": "olmoe_ext", "moe_block": ["dcca"]}, ValueError, "moe_block lists 1 blocks"),
    ({"model_type": "olmoe_ext", "moe_block": "best"}, ValueError, "got 'best'"),
    (7, TypeError, "got 7"),
]


@pytest.mark.parametrize(("source", "kind", "message"), BAD)
def test_refuses_what_cannot_be_counted(source, kind, message):
    with pytest.raises(kind, match=message):
        MoeShape.from_hf(source)


def test_refuses_files_that_are_none(tmp_path):
    for text, message in (("{", "not valid JSON"), ("[]", "holds list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            MoeShape.from_hf(tmp_path)
    with pytest.raises(OSError, match="neither a file nor a folder"):
        MoeShape.from_hf("nobody/no-such-model")
    with pytest.raises(OSError, match="neither a file nor a folder"):
        MoeShape.from_hf(tmp_path / "absent")


def test_refuses_impossible_shapes():
    ffn = DenseFfn(8)
    with pytest.raises(ValueError, match="num_heads must divide hidden_size=10"):
        MoeShape.uniform(1, 10, ffn, num_heads=3, vocab_size=5, context_length=4)
    with pytest.raises(ValueError, match="num_dense_layers must be from 0"):
        MoeShape.uniform(1, 12, ffn, num_heads=3, vocab_size=5, context_length=4, num_dense_layers=1)
    with pytest.raises(ValueError, match="layers must have at least one"):
        MoeShape(4, 5, 6, GroupedAttention(1, 1, 4), ())
    with pytest.raises(ValueError, match="windows must have one entry"):
        MoeShape(4, 5, 6, GroupedAttention(1, 1, 4), (ffn,), windows=(1, 2))
    with pytest.raises(TypeError, match=r"intermediate_size must be an integer, got 2\.5"):
        DenseFfn(2.5)
    with pytest.raises(ValueError, match="key_value_rank must be at least 1, got 0"):
        LatentAttention(1, 0, None, 1, 1, 1)
    with pytest.raises(ValueError, match="context_length must be at least 1, got 0"):
        MoeShape.uniform(1, 12, ffn, num_heads=3, vocab_size=5, context_length=4).training_flops(0)


def test_active_is_what_one_token_can_reach():
    """Every choice of K experts touches the same number; unchosen experts get no gradient from one token."""
    values = {**TINY, **ODD["qwen2_moe"], "num_hidden_layers": 2, "mlp_only_layers": []}
    config = AutoConfig.for_model(**values, experts_implementation="eager")
    model = AutoModelForCausalLM.from_config(config)
    model(torch.tensor([[5]])).logits.sum().backward()
    reached = 0
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if ".experts." in name:
            reached += sum(gradient[e].numel() for e in range(len(gradient)) if gradient[e].abs().sum() > 0)
        else:
            reached += parameter.numel()
    assert reached == MoeShape.from_hf(values).active_parameters


def test_sizes_of_layers_differ_in_place():
    """Order of layers is kept (windows and pipeline stages need it) and equal layers are counted together."""
    dense, moe = DenseFfn(16), MoeFfn(4, 1, 8)
    for layers in itertools.permutations((dense, moe, moe)):
        shape = MoeShape(8, 5, 6, GroupedAttention(1, 1, 8), layers)
        assert shape.layers == layers
        assert shape.parameters.dense == 3 * 8 * 16
        assert shape.parameters.routed == 2 * 4 * 3 * 8 * 8
        assert shape.sparsity == 0.75
