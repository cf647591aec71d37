"""Cores of the process, not of the machine."""

import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_cores_are_those_of_the_process() -> None:
    code = (
        "import os\nfrom hf_moe_ext.cores import count_cores\nwhole = count_cores()\n"
        "os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])\nprint(whole, count_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(os.sched_getaffinity(0))), "1"]
