"""The recipe on two processes under FSDP2: equal to one process, and resumed after a kill as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from support.launched import CONFIGS, environment, parse

SCRIPT = Path(__file__).parents[1] / "support" / "fsdp2_recipe.py"
STEPS = 12


def start(flags, folder, *more):
    """The two ranks in a session of their own; what they print comes line by line."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    variables = environment(parse(CONFIGS / "fsdp2.yaml", "--num_processes", "2"))
    return subprocess.Popen(
        [*command, str(SCRIPT), *flags, "--output_dir", str(folder), *more],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables, "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process):
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output[-4000:]


def losses(folder):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.slow
def test_killed_at_a_random_step_and_resumed(quickstart_flags, run_script, tmp_path):
    flags = [*quickstart_flags, f"--max_steps={STEPS}", "--save_steps=2"]
    flags += ["--per_device_train_batch_size=2", "--num_generations=2"]
    one = run_script(*flags, "--output_dir", tmp_path / "one", "--gradient_accumulation_steps=2")
    assert one.returncode == 0, one.stderr
    finish(start(flags, tmp_path / "whole"))

    step = random.Random().randint(3, STEPS - 1)  # after the first checkpoint, before the end
    print(f"killed after step {step}")
    process, seen = start(flags, tmp_path / "killed"), 0
    assert process.stdout is not None
    for line in process.stdout:
        seen += line.count("'loss':")
        if seen >= step:
            break
    assert seen >= step, "it ended by itself"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "killed" / "metrics.json").exists()
    finish(start(flags, tmp_path / "killed", "--resume_from_checkpoint", "true"))

    assert len(losses(tmp_path / "whole")) == STEPS
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    adapters = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "whole", "killed")}
    for name, tensor in adapters["whole"].items():
        assert (adapters["killed"][name] == tensor).all(), name
        assert adapters["one"][name].shape == tensor.shape, "saved whole"
        assert (adapters["one"][name] - tensor).abs().max() < 1e-5
