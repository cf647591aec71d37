"""Positions from a seed: golden values, the definition in plain integers, distinctness, independence."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from hf_moe_ext.ops.delta_positions import (
    MaskStream,
    bernoulli_chunks,
    bernoulli_positions,
    checksum,
    count_kept,
    exact_positions,
    hash32,
)
from support import naive_deltas

STREAM = (2503_01359, 3, 1, 2)
SHAPE, DROP_RATE = (96, 160), 0.9
# Version 1. These never change: files in the world were written with them.
GOLDEN_BERNOULLI = {"count": 1573, "first": [7, 15, 27, 33, 62, 80], "checksum": "406d2cce628cca9c"}
GOLDEN_EXACT = {"count": 1536, "first": [2356, 10156, 9272, 2801, 619, 9004], "checksum": "e1ea25d4280ad7e8"}
GOLDEN_HASHES = {0: 3163265961, 1: 1487905745, 2**32: 3780913049, 2**34 - 1: 2685177605}
GOLDEN_LARGE = [9832451161, 9004981761, 13754945250, 15077312060, 4660267801]


def _both(device="cpu"):
    stream, num_entries = MaskStream(*STREAM), SHAPE[0] * SHAPE[1]
    return (
        bernoulli_positions(stream, num_entries, DROP_RATE, device),
        exact_positions(stream, num_entries, count_kept(num_entries, DROP_RATE), device),
    )


def _summary(positions):
    return {
        "count": len(positions),
        "first": positions[:6].tolist(),
        "checksum": checksum(positions, SHAPE, "out_in"),
    }


def test_golden_positions():
    assert [_summary(p) for p in _both()] == [GOLDEN_BERNOULLI, GOLDEN_EXACT]
    assert hash32(MaskStream(*STREAM), torch.tensor(list(GOLDEN_HASHES))).tolist() == list(GOLDEN_HASHES.values())
    assert exact_positions(MaskStream(*STREAM), 2**34, 5).tolist() == GOLDEN_LARGE


@pytest.mark.parametrize("threads", [1, 2])
def test_golden_positions_in_a_fresh_process(threads):
    program = (
        "import json, torch\n"
        "from hf_moe_ext.ops.delta_positions import *\n"
        "torch.set_default_dtype(torch.float64); torch.manual_seed(123)\n"
        f"s, n = MaskStream(*{STREAM}), {SHAPE[0] * SHAPE[1]}\n"
        f"both = bernoulli_positions(s, n, {DROP_RATE}), exact_positions(s, n, count_kept(n, {DROP_RATE}))\n"
        f"print(json.dumps([checksum(p, {SHAPE}, 'out_in') for p in both]))\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": "random"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout) == [GOLDEN_BERNOULLI["checksum"], GOLDEN_EXACT["checksum"]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_golden_positions_on_a_gpu():
    assert [_summary(p) for p in _both("cuda")] == [GOLDEN_BERNOULLI, GOLDEN_EXACT]
    assert exact_positions(MaskStream(*STREAM), 2**34, 5, "cuda").tolist() == GOLDEN_LARGE


@pytest.mark.parametrize("stream", [(0, 0, 0, 0), STREAM, (2**63 - 1, 2**31 - 1, 5, 2**31 - 1), (1, 0, 2, 0)])
def test_bernoulli_equals_the_definition(stream):
    for num_entries, drop_rate in ((1, 0.5), (700, 0.3), (2000, 0.99)):
        ours = bernoulli_positions(MaskStream(*stream), num_entries, drop_rate).tolist()
        assert ours == naive_deltas.bernoulli_positions(stream, num_entries, drop_rate)
    far = [0, 2**18 - 1, 2**18, 2**31, 2**32 - 1, 2**32, 2**33 + 12345, 2**34 - 1]
    assert hash32(MaskStream(*stream), torch.tensor(far)).tolist() == [naive_deltas.hash32(stream, q) for q in far]


@pytest.mark.parametrize("stream", [(0, 0, 0, 0), STREAM, (2**63 - 1, 2**31 - 1, 5, 2**31 - 1)])
@pytest.mark.parametrize("num_entries", [1, 2, 3, 4, 5, 7, 31, 64, 65, 600, 2**20 + 1, 2**33 + 7, 2**34])
def test_bijection_equals_the_definition(stream, num_entries):
    num_kept = min(num_entries, 120)
    ours = exact_positions(MaskStream(*stream), num_entries, num_kept).tolist()
    assert ours == [naive_deltas.exact_position(stream, num_entries, j) for j in range(num_kept)]


@pytest.mark.parametrize("num_entries", [*range(1, 40), 1000, 2**12, 2**12 + 1, 2**19 + 3])
def test_bijection_reaches_every_position_once(num_entries):
    positions = exact_positions(MaskStream(5), num_entries, num_entries)
    assert torch.equal(positions.sort().values, torch.arange(num_entries))


def test_a_long_mask_is_the_same_in_pieces():
    stream, num_entries = MaskStream(11), 3 * 2**18 + 17
    chunks = list(bernoulli_chunks(stream, num_entries, 0.9))
    assert len(chunks) == 4
    whole = torch.arange(num_entries)
    whole = whole[hash32(stream, whole) >= round(0.9 * 2**32)]
    assert torch.equal(torch.cat(chunks), whole)
    exact = exact_positions(stream, num_entries, 2**18 + 100)
    assert torch.equal(exact_positions(stream, num_entries, 2**18 + 100, start=2**18 - 5), exact[2**18 - 5 :])


@pytest.mark.parametrize("drop_rate", [0.01, 0.2, 0.5, 0.9, 0.99, 0.9999])
def test_kept_count_is_binomial(drop_rate):
    num_entries = 300_000
    deviation = math.sqrt(num_entries * drop_rate * (1 - drop_rate))
    for seed in range(3):
        kept = len(bernoulli_positions(MaskStream(seed, 1, 2, 3), num_entries, drop_rate))
        assert abs(kept - num_entries * (1 - drop_rate)) < 5 * deviation


@pytest.mark.parametrize("form", ["bernoulli", "exact"])
def test_masks_of_neighbouring_streams_are_independent(form):
    """Each of two masks keeps a tenth; both keep a hundredth of the entries, whichever number differs by one."""
    num_entries, expected, masks = 200_000, 2000, []
    streams = [(9, 0, 0, 0), (10, 0, 0, 0), (9, 1, 0, 0), (9, 0, 1, 0), (9, 0, 0, 1), (9 + 2**32, 0, 0, 0)]
    for stream in (MaskStream(*numbers) for numbers in streams):
        exact = form == "exact"
        positions = (
            exact_positions(stream, num_entries, num_entries // 10)
            if exact
            else bernoulli_positions(stream, num_entries, 0.9)
        )
        masks.append(torch.zeros(num_entries).index_fill(0, positions, 1.0))
    masks = torch.stack(masks)
    common = (masks @ masks.T)[~torch.eye(len(streams), dtype=torch.bool)]
    assert ((common - expected).abs() < 5 * math.sqrt(expected)).all()


@pytest.mark.parametrize("num_entries", [12, 300, 4096])
def test_every_position_is_kept_equally_often(num_entries):
    """Over seeds: the count at each position, and of each neighbouring pair, is binomial (six deviations)."""
    num_seeds, num_kept = 2000, num_entries // 3
    counts, pairs = torch.zeros(num_entries), torch.zeros(num_entries)
    for seed in range(num_seeds):
        mask = torch.zeros(num_entries).index_fill(0, exact_positions(MaskStream(seed), num_entries, num_kept), 1.0)
        counts += mask
        pairs += mask * mask.roll(1)
    for observed, rate in (
        (counts, num_kept / num_entries),
        (pairs, num_kept * (num_kept - 1) / num_entries / (num_entries - 1)),
    ):
        assert ((observed - num_seeds * rate).abs() < 6 * math.sqrt(num_seeds * rate * (1 - rate))).all()


def test_counts_round_instead_of_cutting_off():
    assert count_kept(1000, 0.9) == 100 != int(1000 * (1 - 0.9))
    assert count_kept(2048 * 5504, 0.9999) == 1127


@pytest.mark.parametrize("drop_rate", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_rate_outside_is_refused(drop_rate):
    with pytest.raises(ValueError, match=r"drop_rate must lie strictly between 0 and 1"):
        bernoulli_positions(MaskStream(1), 10, drop_rate)
    with pytest.raises(ValueError, match=r"drop_rate must lie strictly between 0 and 1"):
        count_kept(10, drop_rate)


def test_other_bad_input_is_refused():
    with pytest.raises(TypeError, match=r"drop_rate must be a float, got '0\.9'"):
        count_kept(10, "0.9")
    with pytest.raises(ValueError, match=r"at most 2\*\*34 entries, got 17179869185"):
        exact_positions(MaskStream(1), 2**34 + 1, 1)
    with pytest.raises(ValueError, match="at least 1 and at most"):
        bernoulli_positions(MaskStream(1), 0, 0.5)
    with pytest.raises(ValueError, match="num_kept must be at most the 10 entries"):
        exact_positions(MaskStream(1), 10, 11)
    with pytest.raises(ValueError, match=r"seed must be at least 0 and below 2\*\*63, got -1"):
        MaskStream(-1)
    with pytest.raises(ValueError, match=r"expert must be at least 0 and below 2\*\*31"):
        MaskStream(1, expert=2**31)
    with pytest.raises(TypeError, match="layer must be an int"):
        MaskStream(1, layer=0.5)
