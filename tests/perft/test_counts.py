"""Parameter counts of real model shapes, to the last printed digit, and the scale of the initial weights.

The numbers are those of the PERFT specification (arXiv 2411.08212, with the counts recomputed from
`a = 2 D r`; S: `L a`; D: `L M a`; R: `L (M a + M D)` stored, `L (N a + M D)` active; E: `L E a` stored, `L K a` active),
written here as printed: "1.05M .082%". The models are real configurations on the meta device, so nothing is allocated.
"""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig

from hf_moe_ext import PerftConfig
from hf_moe_ext.perft.layer import PerftLayer
from hf_moe_ext.perft.report import count_trainable, describe_trainable, trainable_rows
from support import zoo

# allenai/OLMoE-1B-7B-0924 and mistralai/Mixtral-8x7B-v0.1, as their config.json say.
REAL = {
    "olmoe": OlmoeConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
    ),
    "mixtral": MixtralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    ),
}

S, E, QV = {"variant": "S"}, {"variant": "E"}, "q_proj and v_proj, LoRA"


def R(top_k: int, num_experts: int) -> dict:
    return {"variant": "R", "top_k": top_k, "num_experts": num_experts}


# (model, method, r) -> active parameters, share of the base model's active parameters, stored parameters where printed.
PRINTED = {
    ("olmoe", QV): {4: "0.52M .041%", 8: "1.05M .082%", 16: "2.10M .164%", 32: "4.19M .327%"},
    ("olmoe", "S"): {4: "0.26M .020%", 8: "0.52M .041%", 16: "1.05M .082%", 32: "2.10M .164%"},
    ("olmoe", "R 1/2"): {
        4: "0.33M .026% 0.59M",
        8: "0.59M .046% 1.11M",
        16: "1.11M .087% 2.16M",
        32: "2.16M .169% 4.26M",
    },
    ("olmoe", "R 2/4"): {
        4: "0.66M .051% 1.18M",
        8: "1.18M .092% 2.23M",
        16: "2.23M .174% 4.33M",
        32: "4.33M .337% 8.52M",
    },
    ("olmoe", "R 1/8"): {
        4: "0.52M .041% 2.36M",
        8: "0.79M .061% 4.46M",
        16: "1.31M .102% 8.65M",
        32: "2.36M .184% 17.0M",
    },
    ("olmoe", "R 8/8"): {4: "2.36M .184%", 8: "4.46M .348%", 16: "8.65M .675%", 32: "17.0M 1.33%"},
    ("olmoe", "E"): {
        4: "2.10M .164% 16.8M",
        8: "4.19M .327% 33.6M",
        16: "8.39M .654% 67.1M",
        32: "16.8M 1.31% 134M",
    },
    ("mixtral", QV): {8: "3.41M .026%", 16: "6.82M .053%", 32: "13.6M .106%"},
    ("mixtral", "S"): {8: "2.10M .016%", 16: "4.19M .033%", 32: "8.39M .065%"},
    ("mixtral", "R 1/4"): {8: "2.62M .020% 8.91M", 16: "4.72M .037% 17.3M", 32: "8.91M .069% 34.1M"},
    ("mixtral", "R 2/8"): {8: "5.24M .041% 17.8M", 16: "9.44M .073% 34.6M", 32: "17.8M .138% 68.2M"},
    ("mixtral", "E"): {8: "4.19M .033% 16.8M", 16: "8.39M .065% 33.6M", 32: "16.8M .130% 67.1M"},
}
CELLS = [(model, method, r, cell) for (model, method), row in PRINTED.items() for r, cell in row.items()]


@pytest.fixture(scope="module")
def real_models():
    """The two models, without any memory for their 54 billion weights."""
    with torch.device("meta"):
        return {name: AutoModelForCausalLM.from_config(config) for name, config in REAL.items()}


def method_settings(method: str) -> dict:
    variant, _, routing = method.partition(" ")
    if variant != "R":
        return {"variant": variant}
    top_k, num_experts = routing.split("/")
    return R(int(top_k), int(num_experts))


def count_perft(model: nn.Module, **settings) -> tuple[int, int]:
    """(stored, active) of an adapter attached to the model, which is given back bare."""
    peft_model = get_peft_model(model, PerftConfig(**settings))
    try:
        stored, active = count_trainable(model)
        # What the report says is what an optimizer would get.
        assert stored == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert stored == peft_model.get_nb_trainable_parameters()[0]
        assert active == active_by_hand(model, settings)
        return stored, active
    finally:
        peft_model.unload()
        assert not any(isinstance(module, PerftLayer) for module in model.modules())


def active_by_hand(model: nn.Module, settings: dict) -> int:
    """Parameters that one token meets, from the tensors: its choices' slices of A and B, and the whole router."""
    total = 0
    for layer in model.modules():
        if isinstance(layer, PerftLayer):
            A, B = layer.perft_A["default"], layer.perft_B["default"]
            base_top_k = model.config.num_experts_per_tok
            choices = {"R": settings.get("top_k"), "E": base_top_k, "D": A.shape[0], "S": 1}[settings["variant"]]
            total += choices * (A[0].numel() + B[0].numel())
            if settings["variant"] == "R":
                total += layer.perft_router["default"].numel()
    return total


def count_qv_lora(model: nn.Module, r: int) -> int:
    peft_model = get_peft_model(model, LoraConfig(r=r, target_modules=["q_proj", "v_proj"]))
    try:
        return peft_model.get_nb_trainable_parameters()[0]
    finally:
        peft_model.unload()


def active_base(model: nn.Module) -> int:
    """Parameters of the base model that one token meets: all but the experts it is not sent to."""
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    everything = sum(p.numel() for p in model.parameters())
    num_experts, top_k = experts[0].shape[0], model.config.num_experts_per_tok
    return everything - sum(p.numel() // num_experts * (num_experts - top_k) for p in experts)


def as_printed(value: float, printed: str) -> str:
    """A number with as many decimals as the printed one has, without a leading zero where that has none."""
    digits = printed.rstrip("MGB%")
    text = f"{value:.{len(digits.partition('.')[2])}f}"
    return (text.removeprefix("0") if digits.startswith(".") else text) + printed[len(digits) :]


@pytest.mark.parametrize(
    ("name", "printed", "everything"), [("olmoe", "1.282", "6.919"), ("mixtral", "12.88", "46.70")]
)
def test_shapes_are_those_of_the_real_models(real_models, name, printed, everything):
    """The base of all percentages below, in billions; and the published sizes, 1B-7B and 8x7B."""
    assert as_printed(active_base(real_models[name]) / 1e9, printed) == printed
    assert as_printed(sum(p.numel() for p in real_models[name].parameters()) / 1e9, everything) == everything


EXACT = [
    ("olmoe", 16, S, 1_048_576, 1_048_576),
    ("olmoe", 16, R(2, 4), 4_325_376, 2_228_224),
    ("olmoe", 16, E, 67_108_864, 8_388_608),
    ("mixtral", 8, S, 2_097_152, 2_097_152),
    ("mixtral", 8, R(2, 8), 17_825_792, 5_242_880),
    ("mixtral", 8, E, 16_777_216, 4_194_304),
]


@pytest.mark.parametrize(("name", "r", "settings", "stored", "active"), EXACT, ids=str)
def test_exact_counts(real_models, name, r, settings, stored, active):
    assert count_perft(real_models[name], r=r, **settings) == (stored, active)


@pytest.mark.parametrize(("settings", "printed"), [(E, "1.1GB"), (R(2, 4), "0.07GB")], ids=str)
def test_training_state(real_models, settings, printed):
    """16 bytes per parameter: float32 weight, gradient and two Adam moments."""
    stored, _ = count_perft(real_models["olmoe"], r=16, **settings)
    assert as_printed(16 * stored / 1e9, printed) == printed


@pytest.mark.parametrize(("name", "method", "r", "cell"), CELLS, ids=str)
def test_table_of_counts(real_models, name, method, r, cell):
    model = real_models[name]
    printed_active, printed_share, *printed_stored = cell.split()
    if method == QV:
        stored = active = count_qv_lora(model, r)
    else:
        stored, active = count_perft(model, r=r, **method_settings(method))
    assert as_printed(active / 1e6, printed_active) == printed_active
    assert as_printed(100 * active / active_base(model), printed_share) == printed_share
    for printed in printed_stored:
        assert as_printed(stored / 1e6, printed) == printed


def test_a_parallel_adapter_counts_the_same(real_models):
    assert count_perft(real_models["olmoe"], r=16, adapter="parallel", **R(2, 4)) == (4_325_376, 2_228_224)


TOY = [
    ({"variant": "S"}, 512, 512),
    (R(2, 4), 2_304, 1_280),
    ({"variant": "E"}, 4_096, 1_536),  # active: K = 3 of the 8 experts of the zoo's OLMoE
    ({"variant": "D", "num_experts": 4}, 2_048, 2_048),
]


@pytest.mark.parametrize(("settings", "stored", "active"), TOY, ids=str)
def test_toy_counts_with_real_tensors(settings, stored, active):
    """D=32, L=2, E=8, r=4: the numbers, and that they are the sizes of the tensors on disk, slice by slice."""
    model = zoo.build("olmoe")
    peft_model = get_peft_model(model, PerftConfig(r=4, **settings))
    assert count_trainable(model) == (stored, active)
    tensors = {name: p for name, p in model.named_parameters() if "perft_" in name}
    assert sum(p.numel() for p in tensors.values()) == stored
    assert peft_model.get_nb_trainable_parameters()[0] == stored
    num_experts = {"S": 1, "E": 8}.get(settings["variant"], 4)
    for row in trainable_rows(model):
        assert row.tensors.pop("perft_A") == (num_experts, 4, 32)
        assert row.tensors.pop("perft_B") == (num_experts, 32, 4)
        assert row.tensors == ({"perft_router": (num_experts, 32)} if settings["variant"] == "R" else {})
        assert 2 * row.total == stored
        assert 2 * row.active == active
    assert f"{stored:,} parameters in 2 modules, {active:,} active per token" in describe_trainable(model)


def wide_layer(rank: int, init_weights: bool | str, hidden_size: int = 256, num_experts: int = 6) -> PerftLayer:
    model = zoo.build("mixtral", hidden_size=hidden_size, num_hidden_layers=1)
    get_peft_model(model, PerftConfig(r=rank, num_experts=num_experts, init_weights=init_weights))
    return next(module for module in model.modules() if isinstance(module, PerftLayer))


def assert_std(sample: torch.Tensor, std: float, kurtosis: float) -> None:
    """The sample's deviation around 0 is `std` within 5 of its own standard errors, `sqrt((kurtosis - 1) / 4n)`."""
    error = math.sqrt((kurtosis - 1) / (4 * sample.numel()))
    assert abs(sample.square().mean().sqrt().item() / std - 1) < 5 * error
    assert abs(sample.mean().item()) < 5 * std / math.sqrt(sample.numel())


UNIFORM, NORMAL = 1.8, 3.0  # kurtosis


@pytest.mark.parametrize("rank", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("init_weights", [True, False])
def test_every_slice_of_A_is_kaiming_uniform(rank, init_weights):
    """Std 1/sqrt(3D) and bound 1/sqrt(D) whatever r is; torch's own init of the stacked tensor divides by sqrt(r) more.

    With D = 256 the 5-sigma bound is 14% at r = 1 and falls with sqrt(r), while that mistake is 29% at r = 2.
    """
    hidden_size = 256
    layer = wide_layer(rank, init_weights, hidden_size)
    A, B = layer.perft_A["default"].detach(), layer.perft_B["default"].detach()
    for one in A:
        assert_std(one, 1 / math.sqrt(3 * hidden_size), UNIFORM)
        assert one.abs().max() <= 1 / math.sqrt(hidden_size)
        assert one.abs().max() > 0.9 / math.sqrt(hidden_size)
    assert not torch.equal(A[0], A[1])
    if init_weights:
        assert torch.equal(B, torch.zeros_like(B))
    else:
        assert_std(B, 1 / math.sqrt(3 * rank), UNIFORM)
    assert_std(layer.perft_router["default"].detach(), 0.02, NORMAL)


@pytest.mark.parametrize(("hidden_size", "printed"), [(2048, ".01276"), (4096, ".00902")])
def test_kaiming_std_of_the_real_widths(hidden_size, printed):
    assert as_printed(1 / math.sqrt(3 * hidden_size), printed) == printed


@pytest.mark.parametrize(("rank", "printed"), [(4, ".707"), (8, ".500"), (16, ".354"), (32, ".250")])
def test_paper_init(rank, printed):
    """The authors' A ~ N(0, sqrt(2/r)), which takes the rank for the fan-in, and their tiny B."""
    assert as_printed(math.sqrt(2 / rank), printed) == printed
    layer = wide_layer(rank, "paper")
    assert_std(layer.perft_A["default"].detach(), math.sqrt(2 / rank), NORMAL)
    assert_std(layer.perft_B["default"].detach(), 1e-6, NORMAL)
    assert_std(layer.perft_router["default"].detach(), 0.02, NORMAL)
