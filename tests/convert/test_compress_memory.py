"""Memory of a compression: bounded by the largest stack of experts, not by the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import compress_memory
from support.big_checkpoint import save_big

_SMALL, _LARGE = 1, 4


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux' /proc")
def test_below_three_stacks_whatever_the_size(tmp_path: Path) -> None:
    """Two models with equal stacks, one four times as large: greatest resident memory beyond that of a run on a tiny one."""
    results = []
    for num_layers in (_SMALL, _LARGE):
        folder = tmp_path / str(num_layers)
        save_big(folder, num_layers)
        keys = json.dumps({"encode": "random_drop", "drop_rate": 0.6})
        found = subprocess.run(
            [sys.executable, compress_memory.__file__, str(folder), keys],
            capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "2"},
        )  # fmt: skip
        results.append(json.loads(found.stdout.splitlines()[-1]))
    small, large = results
    assert small["stack"] == large["stack"] == 2**25
    assert large["source"] > 3.9 * small["source"] > 11 * large["stack"]
    for result in results:
        assert result["peak"] < 3 * result["stack"]
