"""Dispatch once per rank: equal to one process, exact gradients, and an end with a message when a rank is killed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from support import expert_exchange as work
from support import zoo
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
                mine, theirs, atol=tolerance * scale, rtol=0, msg=lambda m, n=name, r=rank: f"{what}, {n}, rank {r}: {m}"
            )


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", work.BOTH)
@pytest.mark.parametrize("implementation", ["batched_mm", "eager", "grouped_mm"])
def test_experts_like_one_process(world_size, name, implementation):
    routed = cases(world_size, torch.float32 if implementation == "grouped_mm" else torch.float64)
    ranks = run_ranks(work.run_experts, world_size, implementation, name, list(routed.values()))
    for number, (what, case) in enumerate(routed.items()):
        assert_like_one_process(ranks, world_size, implementation, case, number, what)


@pytest.mark.parametrize(("world_size", "tp_size"), [(2, 2), (4, 2), (4, 4)])
def test_experts_on_a_shared_batch(world_size, tp_size):
    """Ranks of a tensor-parallel group hold one batch: each sends its slice, one token leaves a rank without any."""
    groups = world_size // tp_size
    routed = [work.build_case([5, 2][:groups]), work.build_case([1, 3][:groups])]
    ranks = run_ranks(work.run_experts, world_size, "batched_mm", "latent_all_to_all", routed, tp_size)
    for number, case in enumerate(routed):
        assert_like_one_process(ranks, world_size, "batched_mm", case, number, f"batch {number}")
