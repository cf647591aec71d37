"""``*_ext`` models spread by Transformers' own layouts: equal to one process, with the latent on the wire."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support import distributed_training
from support import expert_parallel as work
from support.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings(
    # torch 2.13 asks whoever starts processes from a process with threads to think twice.
    "ignore:This process .* is multi-threaded:DeprecationWarning",
)

# Class that is called where the ranks of an expert group hold rows of their own (None: refused), and where they share
# their rows: in training, at inference.
IMPLEMENTATIONS: dict[str, tuple[str | None, str, str]] = {
    "auto": ("AllToAllEP", "AllToAllEP", "AllReduceEP"),
    "all_to_all": ("AllToAllEP", "AllToAllEP", "AllToAllEP"),
    "all_reduce": (None, "AllReduceEP", "AllReduceEP"),
    "latent_all_to_all": ("LatentAllToAllEP", "LatentAllToAllEP", "LatentAllToAllEP"),
}
FAMILIES, BLOCKS = ("olmoe_ext", "mixtral_ext"), ("standard", "ungated", "gated", "full", "mixed", "full_gated")
EXPERTS = {"fsdp_size": 2, "ep_size": 2}
TWO = [EXPERTS, {"tp_size": 2, "ep_size": 2}]
FOUR = [
    {"fsdp_size": 4, "ep_size": 4},
    {"fsdp_size": 4, "ep_size": 2},  # two copies of every expert, themselves sharded
    {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2},
    {"fsdp_size": 2, "tp_size": 2, "ep_size": 2},
    {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
    {"tp_size": 4, "ep_size": 4},
]
# The deprecated flag beside a tensor-parallel plan means ep_size=tp_size.
LEGACY = {"tp_size": 2, "tp_plan": "auto", "enable_expert_parallel": True}
WITHOUT_EXPERTS = [{"fsdp_size": 2}, {"tp_size": 2}, {"dp_replicate_size": 2}]


def shares_rows(layout: work.Layout) -> bool:
    return layout.get("ep_size", 1) == layout.get("tp_size", 1)


def with_implementations(layouts: Sequence[work.Layout]) -> list[work.Layout]:
    """Every layout with every implementation it can take."""
    return [
        {**layout, "ep_implementation": name}
        for layout in layouts
        for name, (apart, _, _) in IMPLEMENTATIONS.items()
        if shares_rows(layout) or apart is not None
    ]


def assert_equal_to_one_process(
    world_size: int, cases: list[tuple[Path, work.Layout, str]], dtype: torch.dtype = torch.float64
) -> None:
    """Logits and all gradients of every rank; the dispatcher that was named, and the latent width, were used."""
    ranks = run_ranks(work.steps, world_size, cases, dtype, timeout=400.0)
    whole: dict[Any, Any] = {}
    for i, (folder, layout, experts) in enumerate(cases):
        if (folder, experts) not in whole:
            model = work.load(folder, None, experts, dtype)
            whole[folder, experts] = model, work.infer(model), *work.train(model)
        model, inference, logits, gradients = whole[folder, experts]
        for rank, results in enumerate(ranks):
            found, what = results[i], f"{folder.name}, {layout}, {experts}, rank {rank}"
            assert not found["messages"], f"{what}: {found['messages']}"
            assert found["logits"].keys() == found["inference"].keys() != set()
            for number in found["logits"]:
                assert_close(found["logits"][number], logits[number], dtype, f"{what}, logits {number}", 1e-6)
                assert_close(found["inference"][number], inference[number], dtype, f"{what}, inference {number}", 1e-6)
            assert found["gradients"].keys() == gradients.keys()
            for name, gradient in gradients.items():
                assert gradient is not None, name
                assert found["gradients"][name] is not None, f"{what}: {name} has no gradient"
                assert_close(found["gradients"][name], gradient, dtype, f"{what}, gradient of {name}", 1e-5)
            if layout == LEGACY:
                assert_dispatched(model, {"tp_size": 2, "ep_size": 2, "ep_implementation": "auto"}, found, what)
            elif "ep_size" in layout:
                assert_dispatched(model, layout, found, what)
    assert len({number for results in ranks for number in results[0]["logits"]}) == len(work.batches())


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str, float32: float) -> None:
    """Float64 to 1e-10; float32 to the bound given, of the largest value where that is above 1."""
    assert found.shape == expected.shape
    scale = max(1.0, float(expected.abs().max())) if dtype == torch.float32 else 1.0
    worst = float((found - expected).abs().max())
    assert worst <= (float32 * scale if dtype == torch.float32 else 1e-10), f"{what}: off by {worst:.2e}"


def assert_dispatched(model: Any, layout: work.Layout, found: Any, what: str) -> None:
    """By count: every layer of every batch went through the class that was named, in the width of its experts."""
    apart, training, inferring = IMPLEMENTATIONS[layout["ep_implementation"]]
    widths = [layer.mlp.experts.hidden_dim for layer in model.model.layers]
    slices = layout.get("tp_size", 1)
    for mode, shared in (("training", training), ("inferring", inferring)):
        name, record = shared if shares_rows(layout) else apart, found[mode]
        assert name is not None
        expected = [(tokens, width) for tokens in found["tokens"] for width in widths]
        assert record["calls"].pop(name) == expected, f"{what}, {mode}"
        # Ours reduces shared rows at inference through the stock class.
        beside = {"AllReduceEP"} if name == "LatentAllToAllEP" and mode == "inferring" else {"AutoEP"}
        assert set(record["calls"]) <= beside, f"{what}, {mode}: {record['calls']}"
        if name == "AllToAllEP":  # there and back; one row per token and choice
            there, back = record["sent"][::2], record["sent"][1::2]
            assert len(there) == len(back) == len(expected)
            for (rows, width), (_, width_back), (tokens, wanted) in zip(there, back, expected, strict=True):
                assert width == width_back == wanted, f"{what}, {mode}"
                assert rows <= -(-tokens // slices) * work.TOP_K
                assert slices > 1 or rows == tokens * work.TOP_K
        elif name == "AllReduceEP":
            assert not record["sent"]


def make_cases(
    folder: Path,
    layouts: Sequence[work.Layout],
    families: Sequence[str] = FAMILIES,
    blocks: Sequence[str] = BLOCKS,
    routings: Sequence[str] = ("spread",),
    experts: Sequence[str] = ("batched_mm",),
) -> list[tuple[Path, work.Layout, str]]:
    return [
        (work.save(folder, family, block, routing), layout, implementation)
        for family in families
        for block in blocks
        for routing in routings
        for layout in layouts
        for implementation in experts
    ]


def test_two_ranks(tmp_path):
    """One of each kind: rows apart and shared, mixed and un-gated blocks, an empty rank."""
    cases = make_cases(tmp_path, [{**EXPERTS, "ep_implementation": "auto"}], ["olmoe_ext"], ["full_gated"])
    cases += make_cases(tmp_path, with_implementations(TWO), ["mixtral_ext"], ["ungated"], ["empty_ranks"])
    assert_equal_to_one_process(2, cases)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_on_two_ranks(tmp_path, family):
    cases = make_cases(tmp_path, with_implementations(TWO), [family])
    cases += make_cases(tmp_path, [LEGACY], [family], ["mixed"])
    assert_equal_to_one_process(2, cases + make_cases(tmp_path, WITHOUT_EXPERTS, [family]))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_on_four_ranks(tmp_path, family):
    # Mixtral's attention is split by key-value heads, of which there are two.
    layouts = [layout for layout in FOUR if family == "olmoe_ext" or layout.get("tp_size", 1) < 4]
    cases = make_cases(tmp_path, with_implementations(layouts), [family], ["ungated", "full_gated"])
    assert_equal_to_one_process(4, cases)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_multipliers(tmp_path, family):
    keys = {"mup": "mup", "mup_base_hidden_size": 8, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}
    folder = work.save(tmp_path, family, "mixed", **keys)
    layouts = [{**layout, "ep_implementation": name} for layout in TWO for name in ("auto", "latent_all_to_all")]
    assert_equal_to_one_process(2, [(folder, layout, "batched_mm") for layout in layouts + WITHOUT_EXPERTS])


@pytest.mark.slow
def test_ranks_and_experts_without_rows(tmp_path):
    layouts = with_implementations([FOUR[0], *FOUR[3:]])
    cases = make_cases(tmp_path, layouts, ["olmoe_ext"], ["mixed"], ["empty_ranks"])
    layouts = with_implementations(FOUR[1:3])
    assert_equal_to_one_process(4, cases + make_cases(tmp_path, layouts, ["mixtral_ext"], ["full"], ["empty_experts"]))


@pytest.mark.slow
def test_eager_experts(tmp_path):
    """All-reduce only without standard blocks, whose eager loop hangs there (and is refused)."""
    routings, eager = ["spread", "empty_ranks"], ["eager"]
    cases = make_cases(tmp_path, with_implementations(TWO), ["olmoe_ext"], ["ungated", "gated"], routings, eager)
    layouts = [layout for layout in with_implementations(TWO) if layout["ep_implementation"] != "all_reduce"]
    assert_equal_to_one_process(2, cases + make_cases(tmp_path, layouts, ["mixtral_ext"], ["mixed"], routings, eager))


@pytest.mark.slow
def test_float32(tmp_path):
    routings, grouped = ["spread", "empty_ranks"], ["grouped_mm"]
    cases = make_cases(tmp_path, with_implementations(TWO), ["olmoe_ext"], ["full", "gated"], routings, grouped)
    layouts = with_implementations(TWO) + WITHOUT_EXPERTS
    cases += make_cases(tmp_path, layouts, ["mixtral_ext"], ["mixed"], ["spread"], grouped)
    assert_equal_to_one_process(2, cases, torch.float32)


def assert_trains_like_one_process(folder: Path, out: Path, world_size: int, layout: work.Layout) -> None:
    ranks = run_ranks(work.train_and_save, world_size, folder, out / "ranks", layout)
    model = work.load(folder)
    trainer = distributed_training.make_trainer(model, out / "one", max_steps=work.NUM_STEPS, learning_rate=0.003)
    born = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    expected = work.trajectory(trainer)
    assert len(expected) == work.NUM_STEPS
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.1  # it did train
    saved = work.load(out / "ranks" / "saved")
    for rank, (found, parameters) in enumerate(ranks):
        for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            for key in theirs:
                assert abs(ours[key] - theirs[key]) < 1e-5, f"rank {rank}, step {step}: {ours} for {theirs}"
        for name, parameter in model.named_parameters():
            assert not torch.equal(parameter, born[name]), name
            worst = float((parameters[name] - parameter.detach()).abs().max())
            assert worst < 1e-5, f"rank {rank}, {name}: off by {worst:.2e}"
            assert torch.equal(saved.get_parameter(name), parameters[name]), name


def test_trainer(tmp_path):
    """Five steps on all weights, saved and opened again on one process."""
    assert_trains_like_one_process(work.save(tmp_path, "olmoe_ext", "full"), tmp_path, 2, EXPERTS)


@pytest.mark.slow
@pytest.mark.parametrize("layout", FOUR[1:3], ids=str)
def test_trainer_on_four_ranks(tmp_path, layout):
    assert_trains_like_one_process(work.save(tmp_path, "mixtral_ext", "mixed"), tmp_path, 4, layout)


def test_generation(tmp_path):
    """Prompts of different lengths; without gradients and with shared rows "auto" reduces instead of exchanging."""
    folder = work.save(tmp_path, "olmoe_ext", "ungated")
    ranks = run_ranks(work.generate, 2, folder, TWO)
    model = work.load(folder).eval()
    for number, ids in enumerate(work.batches()):
        expected = work.continuation(model, ids)
        for i, name in enumerate(("AllToAllEP", "AllReduceEP")):
            holders = [results[i] for results in ranks if number in results[i][0]]
            assert holders
            for found, calls in holders:
                assert torch.equal(found[number], expected), f"{TWO[i]}, prompt {number}"
                assert calls.keys() == {"AutoEP", name}


@pytest.mark.slow
def test_adapters(tmp_path):
    """PERFT in the latent width of distributed experts: every variant trains as on one process."""
    folder = work.save(tmp_path, "olmoe_ext", "mixed")
    ranks = run_ranks(distributed_training.train_variants, 2, folder, tmp_path, EXPERTS)
    for variant in distributed_training.VARIANTS:
        model = distributed_training.attach(distributed_training.load(folder), variant)
        distributed_training.make_trainer(model, tmp_path / "one").train()
        expected = distributed_training.adapters(model)
        latent = {n: p for n, p in expected.items() if "layers.1." in n and n.endswith("perft_A.default")}
        assert [p.shape[-1] for p in latent.values()] == [8]
        for rank, results in enumerate(ranks):
            found = results[variant]
            assert found["held"] < 1
            assert found["trained"].keys() == expected.keys()
            for name, tensor in expected.items():
                assert not torch.equal(tensor, found["born"][name])
                worst = float((found["trained"][name] - tensor).abs().max())
                assert worst < 1e-10, f"{variant}, rank {rank}, {name}: off by {worst:.2e}"
