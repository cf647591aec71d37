"""The meter against calls counted at torch.distributed, against the routing itself, and against a network interface."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from hf_moe_ext.dcca.meter import KEYS, TrafficMeter
from hf_moe_ext.scaling.exchange import Exchange, count_sent, layer_bytes
from support import expert_exchange as work
from support import traffic_ranks, zoo
from support.latent_models import make_model
from support.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings(
    # torch 2.13 asks whoever starts processes from a process with threads to think twice.
    "ignore:This process .* is multi-threaded:DeprecationWarning",
)
ROOT = Path(__file__).parents[2]
BENCHMARKS = str(ROOT / "recipes" / "benchmarks")
sys.path.append(BENCHMARKS)
import network_namespaces  # noqa: E402  # after the path is set

FLOAT64_BYTES = 8


def naive_rows(case: work.Case, name: str, world_size: int, rank: int) -> tuple[Counter[int], Counter[int]]:
    """Rows and pairs that a rank sends to each rank, token by token."""
    local = work.NUM_EXPERTS // world_size
    rows, pairs = Counter(), Counter()
    for token in case.top_k_index[rank].tolist():
        owners = [expert // local for expert in token]
        pairs.update(owners)
        rows.update(owners if name == "all_to_all" else set(owners))
    return rows, pairs


def expected_flows(
    case: work.Case, name: str, world_size: int, rank: int
) -> dict[tuple[str, str, str], tuple[int, ...]]:
    """(calls, rows, rows to itself, bytes to others) per flow, from the routing."""
    routed = [naive_rows(case, name, world_size, sender) for sender in range(world_size)]
    sent, pairs = routed[rank]
    received = Counter({peer: routed[peer][0][rank] for peer in range(world_size)})
    pairs_received = Counter({peer: routed[peer][1][rank] for peer in range(world_size)})

    def flow(rows: Counter[int], row_bytes: int, calls: int = 1) -> tuple[int, ...]:
        return calls, rows.total(), rows[rank], (rows.total() - rows[rank]) * row_bytes

    width = work.WIDTH * FLOAT64_BYTES
    found = {
        ("payload", "dispatch", "forward"): flow(sent, width),
        ("payload", "combine", "forward"): flow(received, width),
        ("payload", "combine", "backward"): flow(sent, width),
        ("payload", "dispatch", "backward"): flow(received, width),
    }
    peers = world_size - 1
    if name == "all_to_all":
        local = work.NUM_EXPERTS // world_size
        return found | {("metadata", "dispatch", "forward"): (1, world_size, 1, peers * local * 8)}
    calls, rows, own, sent_bytes = flow(pairs, 2 * FLOAT64_BYTES)
    return found | {
        ("metadata", "dispatch", "forward"): (calls + 1, rows + world_size, own + 1, sent_bytes + peers * 16),
        ("metadata", "dispatch", "backward"): flow(pairs_received, FLOAT64_BYTES),
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_counts_calls_and_routing(world_size):
    case = work.build_case([7, 4, 0, 9][:world_size])
    exact = Exchange(work.WIDTH, work.NUM_EXPERTS, work.TOP_K, world_size, FLOAT64_BYTES, weight_bytes=FLOAT64_BYTES)
    formula = {name: [0.0, 0.0] for name in work.BOTH}
    measured = {name: [0.0, 0.0] for name in work.BOTH}
    for rank, results in enumerate(run_ranks(traffic_ranks.metered, world_size, case)):
        for name, found in results.items():
            flows = {
                (f["kind"], f["direction"], f["pass"]): (
                    f["num_calls"],
                    f["num_rows"],
                    f["num_own_rows"],
                    f["off_rank_bytes"],
                )
                for f in found["flows"]
            }
            assert flows == expected_flows(case, name, world_size, rank), (name, rank)
            assert found["total"] == sum(flow[3] for flow in flows.values())
            # The backend was called as often and with as many bytes, those for the own rank included.
            for payload in (True, False):
                kind = "payload" if payload else "metadata"
                counted = [f for f in found["flows"] if f["kind"] == kind]
                called = [size for kind, size in found["calls"] if kind == ("double" if payload else "long int")]
                assert sum(f["num_calls"] for f in counted) == len(called)
                assert sum(f["off_rank_bytes"] + f["own_bytes"] for f in counted) == sum(called)
                measured[name][not payload] += sum(f["off_rank_bytes"] for f in counted)
            sent = count_sent(exact, name, case.top_k_index[rank].tolist(), rank)
            by_formula = layer_bytes(exact, name, sent)
            formula[name][0] += by_formula.payload
            formula[name][1] += by_formula.metadata
            assert sum(f["num_calls"] for f in found["flows"]) == by_formula.num_collectives
    assert measured == formula  # over all ranks: what comes back to one was sent by the others


def test_recomputed_layers_are_told_apart():
    """Gradient checkpointing runs the exchange again inside the backward pass; that is not a backward exchange."""
    for results in run_ranks(traffic_ranks.metered_checkpointing, 2, work.build_case([5, 4])):
        for (name, reentrant), calls in results.items():
            metadata = 1 if name == "all_to_all" else 2
            assert calls["payload", "dispatch", "forward"] == calls["payload", "combine", "forward"] == 1
            assert calls["payload", "dispatch", "recompute"] == 1, (name, reentrant)
            assert calls["metadata", "dispatch", "forward"] == calls["metadata", "dispatch", "recompute"] == metadata
            assert calls["payload", "combine", "backward"] == calls["payload", "dispatch", "backward"] == 1


def test_bytes_shrink_with_the_width_alone(tmp_path):
    """The same routing at a quarter of the width: a quarter of the payload exactly, metadata as before."""
    folders = []
    for latent in (32, 8):
        model = zoo.build("nemotron_h", dtype=torch.float64, moe_latent_size=latent)
        for module in model.modules():  # route alike whatever the width: the last expert choices hang on nothing else
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias.copy_(torch.tensor([90.0, 0, 60, 0, 30, 0, 0, 0]))
                module.n_group, module.topk_group = 1, 1
        model.config.n_group = model.config.topk_group = 1
        folders.append(tmp_path / str(latent))
        model.save_pretrained(folders[-1])
    for full, narrow in run_ranks(traffic_ranks.metered_widths, 2, folders):
        for name in work.BOTH:
            assert narrow[name]["payload"] * 4 == full[name]["payload"] > 0
            assert narrow[name]["metadata"] == full[name]["metadata"] > 0


def test_dcca_moves_r_times_the_bytes_of_the_standard_block(tmp_path):
    """Equal expert parameters, the same router and rows: payload exactly R / H, metadata as before."""
    folders, standard = [], None
    for block in ("standard", "ungated"):
        model = make_model("olmoe_ext", block, dtype=torch.float64, num_hidden_layers=1)
        if standard is None:
            standard = model
        else:  # what stands before the experts of the only layer
            shared = {n: t for n, t in standard.state_dict().items() if ".experts." not in n}
            assert not model.load_state_dict(shared, strict=False).unexpected_keys
        folders.append(tmp_path / block)
        model.save_pretrained(folders[-1])
    assert abs(model.num_parameters() - standard.num_parameters()) == 2 * 8 * 32  # descend and ascend
    for full, narrow in run_ranks(traffic_ranks.metered_widths, 2, folders):
        for name in work.BOTH:
            assert narrow[name]["payload"] * 4 == full[name]["payload"] > 0
            assert narrow[name]["metadata"] == full[name]["metadata"] > 0


def _raise_if(counting: bool) -> None:
    if counting:
        raise KeyError("from inside")


def test_leaves_nothing_behind():
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    meter = TrafficMeter()
    with pytest.raises(KeyError, match="from inside"), meter:
        _raise_if(_get_current_dispatch_mode() is not None)
    assert _get_current_dispatch_mode() is None
    with meter, pytest.raises(RuntimeError, match="counting already"):
        meter.__enter__()
    assert meter.as_dict() == []
    assert set(meter.flows) == set(KEYS)


# TCP/IPv4 over Ethernet: 14 + 20 + 32 bytes before at least 1,448 of 1,514, unless the kernel hands the interface
# larger segments; acknowledgements of what comes back, at most one per two packets; and gloo's message of 40 to 72 bytes
# before each buffer, with those of the store.
HEADER_FRACTION, CALL_BYTES = 66 / 1448 * 1.5, 1024


@pytest.mark.parametrize("name", work.BOTH)
def test_bytes_of_a_network_interface(name):
    repeats = 6
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), BENCHMARKS]),
        "OMP_NUM_THREADS": "1",
        "RANK": "0",
    }
    program = str(Path(__file__).parents[1] / "support" / "namespace_rank.py")
    if (obstacle := network_namespaces.find_obstacle()) is not None:
        pytest.skip(obstacle)
    with network_namespaces.make_lab(2) as lab:
        processes = [
            subprocess.Popen(
                [*lab.enter(side), sys.executable, program, str(side), lab.address(0), name, str(repeats)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            )
            for side in (0, 1)
        ]  # fmt: skip
        try:
            said = [process.communicate(timeout=120) for process in processes]
        finally:
            for process in processes:
                process.kill()
    for process, (_, errors) in zip(processes, said, strict=True):
        assert process.returncode == 0, errors
    for side, (output, _) in enumerate(said):
        found = json.loads(output.strip().splitlines()[-1])
        counted, wire = found["total"], found["wire"]
        calls = sum(flow["num_calls"] for flow in found["flows"])
        assert counted > 500_000
        assert counted <= wire <= counted * (1 + HEADER_FRACTION) + calls * CALL_BYTES, (side, wire / counted)
