"""The PERFT layer against per-token loops (`support.naive`): outputs and every gradient, float64, 1e-10.

First Mixtral- and OLMoE-style blocks as a whole, the base block's loop included, on awkward routings. Then the layer
inside every family of the zoo, whose own block is taken as it is: what the layer adds to its experts' output.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from hf_moe_ext import PerftConfig
from hf_moe_ext.perft.layer import PerftLayer
from support import naive, zoo

HIDDEN, RANK, ALPHA = 32, 4, 6.0  # a scale of 1.5, so that r, alpha and 1/r in its place all show
TOLERANCE = 1e-10
# Float32 has 6e-8 per operation; a value here is the end of four chained sums of 24 to 48 terms, and compared entry by
# entry with the largest of its tensor. Observed: below 1e-6.
FLOAT32_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """An awkward routing: sizes of the base router and of R's own, and what is done to router and input."""

    tokens: int = 12
    base_experts: int = 5
    base_top_k: int = 2
    experts: int = 4
    top_k: int = 2
    rank: int = RANK
    base: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[nn.Module, Tensor], None] = lambda block, hidden: None


@torch.no_grad()
def starve_experts(block: nn.Module, hidden: Tensor) -> None:
    """Give expert 1 of every router a logit that no token chooses: its weight is far below zero on a constant input."""
    hidden[:, 0] = 1.0
    for router in (block.gate.weight, *block.experts.perft_router.values()):
        router[1] = 0.0
        router[1, 0] = -40.0


@torch.no_grad()
def tie_experts(block: nn.Module, hidden: Tensor) -> None:
    """Make R's logits exactly equal in pairs (0, 3) and (1, 2), with the pairs' order drawn by the token.

    One non-zero entry per row: the other products are zero, so the logits are equal to the last bit in any order of
    summation. The base router stays as it is: `torch.topk` breaks ties as it likes.
    """
    for router in block.experts.perft_router.values():
        router.zero_()
        router[[0, 3], 0] = 0.5
        router[[1, 2], 1] = 0.5


CASES = {
    "plain": Case(),
    "one token": Case(tokens=1),
    "unchosen expert": Case(prepare=starve_experts),
    "top_k = num_experts": Case(base_experts=3, base_top_k=3, experts=3, top_k=3),
    "N > K": Case(base_top_k=1, experts=6, top_k=4),
    "top_k = 1": Case(base_top_k=1, top_k=1),
    "ties": Case(top_k=3, prepare=tie_experts),
    "r = 1": Case(rank=1),
    "one adapter": Case(experts=1, top_k=1),
}
# Cases about R's own router change nothing for a variant that has none (or no adapters to choose from).
MEANINGLESS = {
    "R": set(),
    "E": {"ties", "one adapter"},
    "D": {"unchosen expert", "N > K", "top_k = 1", "ties"},
    "S": {"unchosen expert", "top_k = num_experts", "N > K", "top_k = 1", "ties", "one adapter"},
}
BLOCKS = [(name, variant) for variant in "REDS" for name in CASES if name not in MEANINGLESS[variant]]


def adapter_config(variant: str, kind: str, rank: int = RANK, experts: int = 4, top_k: int = 2) -> PerftConfig:
    sizes = {"R": {"num_experts": experts, "top_k": top_k}, "D": {"num_experts": experts}}.get(variant, {})
    alpha = {"lora_alpha": ALPHA} if kind == "lora" else {}
    return PerftConfig(variant=variant, adapter=kind, r=rank, init_weights=False, **alpha, **sizes)


def attach(model: nn.Module, config: PerftConfig, seed: int = 1) -> list[PerftLayer]:
    """Attach with seeded random weights; R's routers are drawn wide enough for choices to differ between tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        get_peft_model(model, config)
        layers = [module for module in model.modules() if isinstance(module, PerftLayer)]
        for layer in layers:
            for router in layer.perft_router.values():
                nn.init.normal_(router, std=2.0 / router.shape[1] ** 0.5)
    assert layers
    model.eval()  # new layers come up in training mode, where R misses the loss that it takes its weight from
    return layers


def build_block(family: str, case: Case, variant: str, kind: str, dtype: torch.dtype, implementation: str):
    """One stock block with an adapter, its input [tokens, hidden], and the adapter as the twin reads it."""
    experts = {"mixtral": "num_local_experts", "olmoe": "num_experts"}[family]
    settings = {experts: case.base_experts, "num_experts_per_tok": case.base_top_k, **case.base}
    model = zoo.build(family, dtype=dtype, experts_implementation=implementation, num_hidden_layers=1, **settings)
    assert model.config._experts_implementation == implementation
    ones = pytest.warns(UserWarning, match="num_experts=1") if (variant, case.experts) == ("R", 1) else nullcontext()
    with ones:
        config = adapter_config(variant, kind, case.rank, case.experts, case.top_k)
    (layer,) = attach(model, config)
    block = model.model.layers[0].mlp
    model.requires_grad_(True)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(case.tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    case.prepare(block, hidden)
    adapter = naive.Adapter(
        variant=variant,
        A=layer.perft_A["default"],
        B=layer.perft_B["default"],
        scale=ALPHA / case.rank if kind == "lora" else 1.0,
        kind=kind,
        router=layer.perft_router["default"] if variant == "R" else None,
        top_k=case.top_k,
        # Mixtral divides by the sum, OLMoE where told; a single choice is never divided by itself.
        normalize=case.top_k > 1 and (family == "mixtral" or case.base.get("norm_topk_prob", False)),
    )
    return block, hidden, adapter


def gradients(output: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of `output`; an input that the output does not depend on raises."""
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    found = torch.autograd.grad(output, list(inputs.values()), direction, retain_graph=True)
    return dict(zip(inputs, found, strict=True))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, relative: bool) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        unit = expected[name].abs().max().clamp(min=1e-30) if relative else 1.0
        error = ((value.double() - expected[name].double()) / unit).abs().max().item()
        assert error < tolerance, f"{name}: {error}"


def check_block(family: str, case: Case, variant: str, kind: str, dtype: torch.dtype, implementation: str) -> None:
    block, hidden, adapter = build_block(family, case, variant, kind, dtype, implementation)
    hidden.requires_grad_()
    inputs = {"hidden": hidden, **dict(block.named_parameters())}
    fast = block(hidden[None])[0]
    assert fast.dtype == dtype
    slow = naive.moe_block(hidden, naive.BaseBlock.read(block), adapter)
    tolerance, relative = (TOLERANCE, False) if dtype == torch.float64 else (FLOAT32_TOLERANCE, True)
    assert_close({"output": fast}, {"output": slow}, tolerance, relative)
    expected = gradients(slow, inputs)
    assert_close(gradients(fast, inputs), expected, tolerance, relative)
    # An oracle of zeros would prove nothing. A softmax over one adapter is constant, its gradient exactly 0.
    for name, gradient in expected.items():
        constant = name == "experts.perft_router.default" and case.experts == 1
        assert (gradient.abs().max() > 1e-6) != constant, name


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("kind", ["lora", "parallel"])
@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
@pytest.mark.parametrize(("case", "variant"), BLOCKS)
def test_block_equals_the_loop(family, case, variant, kind, implementation):
    if family == "mixtral" and CASES[case].base_top_k == 1:
        # A single weight divided by itself: the base router's gradient is 0 up to the rounding of its float32 softmax.
        check_constant_base_router(CASES[case], variant, kind, implementation)
        return
    check_block(family, CASES[case], variant, kind, torch.float64, implementation)


def check_constant_base_router(case: Case, variant: str, kind: str, implementation: str) -> None:
    block, hidden, adapter = build_block("mixtral", case, variant, kind, torch.float64, implementation)
    hidden.requires_grad_()
    inputs = {"hidden": hidden, **dict(block.named_parameters())}
    fast = block(hidden[None])[0]
    slow = naive.moe_block(hidden, naive.BaseBlock.read(block), adapter)
    assert_close({"output": fast}, {"output": slow}, TOLERANCE, False)
    actual, expected = gradients(fast, inputs), gradients(slow, inputs)
    # Rounding noise of float32 (6e-8) times gradients of order 100, not a number to compare to 1e-10.
    for gradient in (actual.pop("gate.weight"), expected.pop("gate.weight")):
        assert gradient.abs().max() < 1e-4
    assert (actual.pop("hidden") - expected.pop("hidden")).abs().max() < 1e-4  # flows through the same softmax
    assert_close(actual, expected, TOLERANCE, False)


@pytest.mark.parametrize("kind", ["lora", "parallel"])
@pytest.mark.parametrize("variant", "REDS")
@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_grouped_experts_equal_the_loop(family, variant, kind):
    """`grouped_mm`, the stock default, has no float64, so this is a float32 bound."""
    check_block(family, CASES["plain"], variant, kind, torch.float32, "grouped_mm")


@pytest.mark.parametrize("variant", "RE")
def test_olmoe_that_renormalises_equals_the_loop(variant):
    check_block("olmoe", Case(base={"norm_topk_prob": True}), variant, "lora", torch.float64, "batched_mm")


@pytest.mark.parametrize("kind", ["lora", "parallel"])
def test_experts_implementation_changes_nothing(kind):
    """The adapters' part is computed by us alone: equal to the last bit under each implementation of the base."""
    deltas = {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        for variant in "REDS":
            block, hidden, _ = build_block("olmoe", Case(), variant, kind, torch.float32, implementation)
            kept = {}
            block.experts.base_layer.register_forward_hook(
                lambda *a, kept=kept: torch.zeros_like(kept.setdefault(0, a[2]))
            )
            deltas[implementation, variant] = block(hidden[None])
            assert kept[0].abs().max() > 1e-3
    for variant in "REDS":
        assert deltas["eager", variant].abs().max() > 1e-3
        for implementation in ("batched_mm", "grouped_mm"):
            assert torch.equal(deltas[implementation, variant], deltas["eager", variant])


def test_starved_and_tied_routings_are_what_they_say():
    """The awkward cases really occur: no token chooses expert 1; ties across the top-k boundary go to the lower id."""
    for variant in "RE":
        block, hidden, adapter = build_block("olmoe", CASES["unchosen expert"], variant, "lora", torch.float64, "eager")
        if variant == "R":
            _, index, _ = naive.route(hidden, adapter.router, adapter.top_k, adapter.normalize)
        else:
            index = block.gate(hidden)[2]
        assert 1 not in index
        assert {0, 2, 3} <= set(index.flatten().tolist())
    block, hidden, adapter = build_block(
        "olmoe", Case(top_k=1, prepare=tie_experts), "R", "lora", torch.float64, "eager"
    )
    logits = hidden @ adapter.router.T
    assert torch.equal(logits[:, 0], logits[:, 3])
    assert torch.equal(logits[:, 1], logits[:, 2])
    _, index, _ = naive.route(hidden, adapter.router, 1, False)
    assert set(index.flatten().tolist()) == {0, 1}
    slow = naive.moe_block(hidden, naive.BaseBlock.read(block), adapter)
    assert (block(hidden[None])[0] - slow).abs().max() < TOLERANCE


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("kind", ["lora", "parallel"])
def test_sentinel_ids_add_nothing_in_variant_e(kind, implementation):
    """Expert parallelism marks choices that live elsewhere with the id num_experts; base and adapters skip them."""
    block, hidden, adapter = build_block("mixtral", Case(), "E", kind, torch.float64, implementation)
    layer, experts = block.experts, block.experts.base_layer
    experts._is_expert_parallel = True  # batched_mm looks for sentinels only then
    num_experts = experts.num_experts
    _, weights, index = block.gate(hidden)
    index = index.clone()
    index[::3, 0] = num_experts
    index[1::3, 1] = num_experts
    index[4] = num_experts  # a token with no expert at all
    index[5] = 2  # hash routers may choose one expert twice
    weights = weights.detach().double().requires_grad_()
    hidden.requires_grad_()
    inputs = {"hidden": hidden, "weights": weights, "A": adapter.A, "B": adapter.B}
    delta = layer(hidden, index, weights) - experts(hidden, index, weights)
    slow = naive.routed_adapter(hidden, index, weights, adapter.A, adapter.B, scale=adapter.scale, kind=kind)
    assert_close({"delta": delta}, {"delta": slow}, TOLERANCE, False)
    assert torch.equal(delta[4], torch.zeros_like(delta[4]))
    actual = gradients(delta, inputs)
    assert_close(actual, gradients(slow, inputs), TOLERANCE, False)
    assert torch.equal(actual["weights"][index == num_experts], torch.zeros(int((index == num_experts).sum())).double())


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_ties_of_the_base_router_are_its_own_to_break(family):
    """E takes the base router's choice as it comes; with equal logits everywhere `torch.topk` may choose anything."""
    block, hidden, adapter = build_block(family, Case(base_experts=8), "E", "lora", torch.float64, "batched_mm")
    nn.init.zeros_(block.gate.weight)
    _, weights, index = block.gate(hidden)
    assert torch.allclose(weights, weights[0, 0].expand_as(weights))
    delta = block(hidden[None])[0] - block.experts.base_layer(hidden, index, weights)
    slow = naive.routed_adapter(hidden, index, weights, adapter.A, adapter.B, scale=adapter.scale, kind="lora")
    assert_close({"delta": delta}, {"delta": slow}, TOLERANCE, False)


# Whether R divides its chosen weights by their sum when it follows the base router: read off the table in
# `support.zoo` (and proved against the routers in tests/host/test_families.py), not off the code under test.
NORMALIZES = dict.fromkeys(zoo.FAMILIES, True) | dict.fromkeys(
    ("olmoe", "flex_olmo", "qwen2_moe", "qwen3_moe", "phimoe"), False
)


@dataclass
class Call:
    """One call of a PERFT layer in a forward pass of its model."""

    layer: PerftLayer
    hidden: Tensor
    index: Tensor
    weights: Tensor
    base_output: Tensor | None = None
    output: Tensor | None = None


def record_calls(model: nn.Module, layers: list[PerftLayer]) -> list[Call]:
    """What arrives at each layer, what its experts make of it, and what leaves, in one forward pass."""
    calls: list[Call] = []

    def enter(layer, args, kwargs):
        hidden, index, weights = [*args, *kwargs.values()]
        calls.append(Call(layer, hidden, index, weights))

    def leave_experts(experts, args, output):
        calls[-1].base_output = output

    def leave(layer, args, output):
        calls[-1].output = output

    for layer in layers:
        layer.register_forward_pre_hook(enter, with_kwargs=True)
        layer.base_layer.register_forward_hook(leave_experts)
        layer.register_forward_hook(leave)
    model(**zoo.random_batch())
    return calls


@pytest.mark.parametrize("kind", ["lora", "parallel"])
@pytest.mark.parametrize("variant", "REDS")
@pytest.mark.parametrize("family", [*zoo.FAMILIES, "nemotron_h (latent)"])
def test_layer_in_every_family_equals_the_loop(family, variant, kind):
    """`output - base output` of each layer, and its gradients, with what the model really sends there."""
    name, _, latent = family.partition(" ")
    model = zoo.build(name, dtype=torch.float64, **({"moe_latent_size": 16} if latent else {}))
    layers = attach(model, adapter_config(variant, kind))
    model.requires_grad_(True)  # so that the experts' input and the base router's weights have gradients too
    calls = record_calls(model, layers)
    assert [call.layer for call in calls] == layers
    for call in calls:
        layer, adapter = call.layer, {"A": call.layer.perft_A["default"], "B": call.layer.perft_B["default"]}
        assert call.hidden.dtype == call.output.dtype == torch.float64
        inputs = {"hidden": call.hidden, **adapter}
        if variant == "R":
            inputs["router"] = layer.perft_router["default"]
            _, index, weights = naive.route(call.hidden, inputs["router"], 2, NORMALIZES[name])
            assert len(index.unique()) == 4
        elif variant == "E":
            index, weights = call.index, call.weights
            inputs["weights"] = call.weights
            assert len(index.unique()) > 2
        else:
            index, weights = None, None
        scale = ALPHA / RANK if kind == "lora" else 1.0
        slow = naive.routed_adapter(call.hidden, index, weights, **adapter, scale=scale, kind=kind)
        fast = call.output - call.base_output
        assert slow.abs().max() > 1e-2
        assert_close({"delta": fast}, {"delta": slow}, TOLERANCE, False)
        actual, expected = gradients(fast, inputs), gradients(slow, inputs)
        if call.weights.dtype == torch.float32 and "weights" in actual:
            # Where the base router hands over float32 weights their gradient is float32 too, and ours is what is left
            # of two such numbers (experts with adapters, minus experts): 6e-8 of gradients of order 10.
            assert_close({"w": actual.pop("weights")}, {"w": expected.pop("weights")}, 1e-5, False)
        assert_close(actual, expected, TOLERANCE, False)
