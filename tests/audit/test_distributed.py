"""Readings of several processes: equal to counts by hand over all tokens, each of them once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_moe_ext.audit.reading import RoutingReading
from support import audit_ranks as work
from support import distributed_training, naive_routing, zoo
from support.ranks import run_ranks

pytestmark = [
    pytest.mark.slow,
    # torch 2.13 asks whoever starts processes from a process with threads to think twice.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

RANDOM = {"phimoe"}  # its router draws at random in training, so that there is no twin of it
FSDP, EXPERTS = {"fsdp_size": 2}, {"fsdp_size": 2, "ep_size": 2}
SHARED = {"tp_size": 2, "ep_size": 2}  # both ranks see the same tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family's tiny model, saved once."""
    found = {}
    for family in zoo.FAMILIES:
        if family not in RANDOM:
            found[family] = tmp_path_factory.mktemp(family)
            save(family).save_pretrained(found[family])
    return found


def save(family: str) -> Any:
    changes = {"num_experts": 6} if family == "flex_olmo" else {}  # five cannot be split in two
    model = zoo.build(family, **changes)
    naive_routing.spread_corrections(model)
    return model


def assert_equals_sum(results: list[dict[str, Any]], family: str, distinct: list[int]) -> None:
    """All ranks read the sum of what the ranks in ``distinct`` saw."""
    readings = [RoutingReading.from_dict(result[family]["reading"]) for result in results]
    assert all(reading.as_dict() == readings[0].as_dict() for reading in readings)
    model, expected = save(family), {}
    for rank in distinct:
        mine = results[rank][family]
        masks = [work.batch_of(mine["index"], number)["attention_mask"] for number in range(2)]
        names = np.array(work.ROW_SLICES[mine["index"]])
        for name in (None, "code", "prose", "maths"):
            chosen = torch.ones(3, 1) if name is None else torch.tensor((names == name)[:, None])
            twin = naive_routing.count(family, model, mine["seen"], [mask * chosen for mask in masks])
            for layer, found in twin.items():
                sums = expected.setdefault((layer, name), [0, 0])
                sums[0] = sums[0] + np.array(found["coactivation"])
                sums[1] += found["tokens"]
    layers = [layer for layer, name in expected if name is None]
    assert [each.layer for each in readings[0].routers] == layers
    for each in readings[0].routers:
        together, tokens = expected[each.layer, None]
        assert each.tokens == tokens
        assert each.coactivation.tolist() == together.tolist()
        assert each.counts.tolist() == together.diagonal().tolist()
        for name, counts in each.slices.items():
            assert counts.tolist() == np.diagonal(expected[each.layer, name][0]).tolist()


@pytest.mark.parametrize(
    ("layout", "reentrant", "distinct"),
    [
        (None, None, [0, 1]),
        (FSDP, None, [0, 1]),
        (FSDP, True, [0, 1]),
        (EXPERTS, None, [0, 1]),
        (EXPERTS, False, [0, 1]),
        (SHARED, None, [0]),
    ],
    ids=["ddp", "fsdp2", "fsdp2-reentrant", "ep", "ep-checkpointing", "tp-ep"],
)
def test_two_processes_count_every_token_once(folders, layout, reentrant, distinct):
    results = run_ranks(work.record, 2, folders, layout, reentrant, timeout=500)
    for family in folders:
        assert_equals_sum(results, family, distinct)


def test_a_trainer_under_ddp_logs_the_same_on_every_rank(folders, tmp_path):
    results = run_ranks(work.train_slices, 2, folders["olmoe"], tmp_path)
    (reading, logged), (other, _) = results
    assert reading == other
    assert len(logged) == 2
    assert "routing_load_max_default" in logged[0]
    rows = distributed_training.rows(2 * distributed_training.BATCH_SIZE * distributed_training.MICRO_BATCHES)
    sources = (["code", "prose", "prose", "maths"] * 8)[: len(rows)]
    expected = {
        name: sum(len(row) for row, source in zip(rows, sources, strict=True) if source == name)
        for name in ("code", "maths", "prose")
    }
    for each in RoutingReading.from_dict(reading).routers:
        assert {name: int(counts.sum()) // each.top_k for name, counts in each.slices.items()} == expected
        assert each.tokens == sum(expected.values())
