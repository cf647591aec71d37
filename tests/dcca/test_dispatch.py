"""Dispatch once per rank: equal to one process, exact gradients, and an end with a message when a rank is killed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from support import expert_exchange as work
from support import zoo
from support.distributed_models import load
from support.ranks import RankError, run_ranks

pytestmark = pytest.mark.filterwarnings(
    # torch 2.13 asks whoever starts processes from a process with threads to think twice.
    "ignore:This process .* is multi-threaded:DeprecationWarning",
)
FLOAT64, FLOAT32_OUTPUT, FLOAT32_GRADIENT = 1e-10, 1e-6, 1e-5


def cases(world_size: int, dtype: torch.dtype = torch.float64) -> dict[str, work.Case]:
    local = work.NUM_EXPERTS // world_size
    sizes = [5, 9, 1, 6][:world_size]
    return {
        "random": work.build_case(sizes, dtype=dtype),
        "one token in all": work.build_case([0, 1, 0, 0][:world_size], dtype=dtype),
        "an empty expert": work.build_case(sizes, [i for i in range(work.NUM_EXPERTS) if i != 3], dtype=dtype),
        "an empty rank": work.build_case(sizes, range(work.NUM_EXPERTS - local), dtype=dtype),
        "one rank has all": work.build_case(sizes, range(local, 2 * local), dtype=dtype),
    }


def assert_like_one_process(
    ranks: list[Any], world_size: int, implementation: str, case: work.Case, number: int, what: str
) -> None:
    exact = case.hidden_states[0].dtype == torch.float64
    expected = work.expected_of(implementation, case)
    for rank, results in enumerate(ranks):
        for name, mine in results[number].items():
            theirs = expected[name]
            if isinstance(theirs, list):
                theirs = theirs[rank * len(theirs) // world_size]
            else:
                theirs = theirs.chunk(world_size)[rank]
            tolerance = FLOAT64 if exact else FLOAT32_OUTPUT if name == "output" else FLOAT32_GRADIENT
            scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
            torch.testing.assert_close(
                mine,
                theirs,
                atol=tolerance * scale,
                rtol=0,
                msg=lambda m, n=name, r=rank: f"{what}, {n}, rank {r}: {m}",
            )


@pytest.mark.parametrize("world_size", [2, 4])
def test_experts_like_one_process(world_size):
    setups = [
        (implementation, name, cases(world_size, torch.float32 if implementation == "grouped_mm" else torch.float64))
        for implementation in ("batched_mm", "eager", "grouped_mm")
        for name in work.BOTH
    ]
    jobs = [(implementation, name, 1, case) for implementation, name, routed in setups for case in routed.values()]
    ranks = run_ranks(work.run_experts, world_size, jobs)
    number = 0
    for implementation, name, routed in setups:
        for what, case in routed.items():
            assert_like_one_process(
                ranks, world_size, implementation, case, number, f"{name}, {implementation}, {what}"
            )
            number += 1


def test_experts_on_a_shared_batch():
    """Ranks of a tensor-parallel group hold one batch: each sends its slice, one token leaves a rank without any."""
    jobs = [
        ("batched_mm", "latent_all_to_all", tp_size, work.build_case(sizes[: 4 // tp_size]))
        for tp_size in (2, 4)
        for sizes in ([5, 2], [1, 3])
    ]
    ranks = run_ranks(work.run_experts, 4, jobs)
    for number, (implementation, name, tp_size, case) in enumerate(jobs):
        assert_like_one_process(ranks, 4, implementation, case, number, f"{name}, tp {tp_size}")


def test_ids_and_types():
    """Ids of no expert, as a router marks a choice it leaves out; bfloat16 tokens with float32 routing weights."""
    marked = work.build_case([4, 3])
    marked.top_k_index[0][1, 2], marked.top_k_index[1][:, 0] = work.NUM_EXPERTS, -1
    half = work.build_case([6, 5], dtype=torch.bfloat16, weights_dtype=torch.float32)
    jobs = [("batched_mm", "latent_all_to_all", 1, marked), ("eager", "latent_all_to_all", 1, half)]
    ranks = run_ranks(work.run_experts, 2, jobs)
    nobody = [(index < 0) | (index >= work.NUM_EXPERTS) for index in marked.top_k_index]
    for mask, index, weights in zip(nobody, marked.top_k_index, marked.top_k_weights, strict=True):
        index[mask], weights[mask] = 0, 0.0
    expected = work.expected_of("batched_mm", marked)
    exact = work.Case(
        [t.double() for t in half.hidden_states], half.top_k_index, [t.double() for t in half.top_k_weights]
    )
    expected_half = work.expected_of("eager", exact)
    for rank, (found, found_half) in enumerate(ranks):
        for name in ("output", "hidden_states"):
            torch.testing.assert_close(found[name], expected[name][rank], atol=FLOAT64, rtol=0)
        of_weights = expected["top_k_weights"][rank].masked_fill(nobody[rank], 0.0)
        torch.testing.assert_close(found["top_k_weights"], of_weights, atol=FLOAT64, rtol=0)
        types = [found_half[name].dtype for name in ("output", "hidden_states", "top_k_weights")]
        assert types == [torch.bfloat16, torch.bfloat16, torch.float32]
        for name in ("output", "hidden_states", "top_k_weights"):
            theirs = expected_half[name][rank]
            # Eight bits of mantissa, and some ten roundings from the token to the gradient.
            bound = 10 * 2**-8 * float(theirs.abs().max())
            torch.testing.assert_close(found_half[name].double(), theirs, atol=bound, rtol=0)


def test_gradients_by_finite_differences():
    for errors in run_ranks(work.numeric_gradients, 2, [3, 2]):
        assert errors.keys() == set(work.BOTH)
        assert max(errors.values()) < 1e-7


def test_registered_once():
    """A second import changes nothing; both names of Transformers' own stay what they were."""
    import importlib

    from transformers.distributed.expert_parallel import AllToAllEP, EPImplementationInterface

    from hf_moe_ext.dcca import dispatch

    held = EPImplementationInterface()["latent_all_to_all"]
    importlib.reload(dispatch)
    assert EPImplementationInterface()["latent_all_to_all"] is held
    assert EPImplementationInterface()["all_to_all"] is AllToAllEP


FAMILIES = ["olmoe", "mixtral", "qwen3_moe", "nemotron_h"]
TWO = [{"fsdp_size": 2, "ep_size": 2}, {"tp_size": 2, "ep_size": 2}]
FOUR = [
    {"fsdp_size": 4, "ep_size": 4},
    {"fsdp_size": 4, "ep_size": 2},
    {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
    {"tp_size": 4, "ep_size": 4},
    {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2},
]


def layouts_of(family: str, layouts: list[Any]) -> list[Any]:
    """Qwen3's norms of single heads get a part of their gradient under Transformers' own TP plan, experts or none."""
    return [layout for layout in layouts if family != "qwen3_moe" or "tp_size" not in layout]


def save(family: str, folder: Path, dtype: torch.dtype = torch.float64) -> Path:
    latent = {"moe_latent_size": 8} if family == "nemotron_h" else {}
    heads = {"num_key_value_heads": 4}  # divisible by four tensor-parallel ranks
    zoo.build(family, dtype=dtype, **heads, **latent).save_pretrained(folder)
    return folder


def assert_models_like_one_process(
    folder: Path, world_size: int, layouts: list[Any], implementation: str, dtype: torch.dtype
) -> None:
    layouts = [layout | {"ep_implementation": name} for layout in layouts for name in work.BOTH]
    ranks = run_ranks(work.train_models, world_size, folder, implementation, dtype, layouts, timeout=500)
    expected = work.train_step(load(folder, None, implementation, dtype))
    for rank, results in enumerate(ranks):
        for layout, found in zip(layouts, results, strict=True):
            # Split sums round differently, and the stock norms cut such differences to float32 steps.
            # NemotronH's logits are float32 whatever the model is.
            single = expected["logits"][0].dtype == torch.float32
            split = layout.get("tp_size", 1) > 1 or single
            of_logits, of_gradients = (FLOAT32_OUTPUT, FLOAT32_GRADIENT) if split else (FLOAT64, FLOAT64)
            tp_size = layout.get("tp_size", 1)
            mine = expected["logits"][rank // tp_size :: world_size // tp_size]
            for key in ("logits", "inference"):
                for ours, theirs in zip(found[key], mine, strict=True):
                    torch.testing.assert_close(
                        ours,
                        theirs,
                        atol=of_logits * max(1.0, float(theirs.abs().max())),
                        rtol=0,
                        msg=lambda m, w=(key, layout, rank): f"{w}: {m}",
                    )
            assert found["gradients"].keys() == expected["gradients"].keys()
            for name, theirs in expected["gradients"].items():
                torch.testing.assert_close(
                    found["gradients"][name], theirs, atol=of_gradients * max(1.0, float(theirs.abs().max())), rtol=0,
                    msg=lambda m, w=(name, layout, rank): f"{w}: {m}",
                )  # fmt: skip


def test_models_on_two_ranks(tmp_path):
    """The whole proof in one model of the default run; the latent width is NemotronH's own."""
    assert_models_like_one_process(save("nemotron_h", tmp_path), 2, TWO[:1], "batched_mm", torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["batched_mm", "eager", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_on_two_ranks(tmp_path, family, implementation):
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64
    assert_models_like_one_process(save(family, tmp_path, dtype), 2, layouts_of(family, TWO), implementation, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families_on_four_ranks(tmp_path, family):
    assert_models_like_one_process(save(family, tmp_path), 4, layouts_of(family, FOUR), "batched_mm", torch.float64)


@pytest.mark.parametrize(
    "killed_at",
    [
        "payload",
        "backward return",
        *(
            pytest.param(exchange, marks=pytest.mark.slow)
            for exchange in ("counts", "metadata", "return", "backward payload", "backward metadata")
        ),
    ],
)
def test_a_killed_rank_ends_all(killed_at):
    """The others raise one error that names the exchange and what to do; none waits for the collective's time limit."""
    with pytest.raises(RankError) as caught:
        run_ranks(work.die_at, 4, killed_at, timeout=240)
    reports = str(caught.value).split("--- rank ")[1:]
    assert len(reports) == 4
    for rank, report in enumerate(reports):
        if rank == 2:
            assert "died with exit code -9" in report
            continue
        last = report.strip().splitlines()[-1]
        assert last.startswith("RuntimeError: latent_all_to_all: the ")
        assert " exchange of MoE layer 0 " in last
        assert "look for the first error" in last


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (
            "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 3000ms for recv operation",
            "did not answer in time",
        ),
        ("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:55", "ended or closed its connection"),
    ],
)
def test_message_of_a_failed_exchange(said, cause):
    """A process that is only slow is told from one that is gone."""
    from torch.distributed import ProcessGroup

    from hf_moe_ext.dcca.exchange import explained

    with pytest.raises(RuntimeError) as caught, explained("MoE layer 3", "payload", ProcessGroup(1, 4)):
        raise RuntimeError(said)
    message = str(caught.value)
    assert message.startswith("latent_all_to_all: the payload exchange of MoE layer 3 failed on rank 1 of the 4 ")
    assert cause in message
    assert ("`ddp_timeout`" in message) == ("Timed out" in said)
    assert message.endswith(said)
