"""The Slurm example, with commands in place of Slurm's that record what they are told."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from finetune_arguments import parse_arguments
from support.launched import CONFIGS

ROOT = CONFIGS.parents[1]
SCRIPT = ROOT / "recipes" / "slurm" / "finetune.sbatch"

# Slurm starts the command once on every machine; here one after the other.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
for ((SLURM_NODEID = 0; SLURM_NODEID < SLURM_NNODES; SLURM_NODEID++)); do
  export SLURM_NODEID
  "$@" || exit $?
done
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$1 $2 $3" == "show hostnames gpu[07-09]" ]] || exit 1
printf 'gpu07\\ngpu08\\ngpu09\\n'
for ((i = 0; i < 20000; i++)); do echo more; done  # a long list: whoever stops reading early breaks the pipe
"""
ACCELERATE = """#!{python}
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
sys.exit(int(os.environ.get("FAIL_ON") == os.environ["SLURM_NODEID"]))
"""


@pytest.fixture
def submit(tmp_path):
    """Run the script as a job of three machines; its result and the words each machine gave accelerate."""
    commands = {"srun": SRUN, "scontrol": SCONTROL, "accelerate": ACCELERATE.format(python=sys.executable)}
    for name, text in commands.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    record = tmp_path / "record"

    def run(*words: str, **variables: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
        environment = {
            **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(record), "SLURM_JOB_ID": "123456",
            "SLURM_NNODES": "3", "SLURM_JOB_NODELIST": "gpu[07-09]", **variables,
        }  # fmt: skip
        result = subprocess.run(
            ["bash", str(SCRIPT), *words], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        return result, [json.loads(line) for line in record.read_text().splitlines()]

    return run


def test_bash_reads_it():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_every_machine_starts_its_part_of_one_job(submit):
    result, calls = submit("--config", "recipes/configs/mixtral_commonsense.yaml")
    assert result.returncode == 0, result.stderr
    assert len(calls) == 3
    for rank, words in enumerate(calls):
        assert words[0] == "launch"
        arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words[1:]))
        assert arguments.use_fsdp
        assert arguments.fsdp_version == 2
        assert (arguments.num_machines, arguments.num_processes, int(arguments.machine_rank)) == (3, 24, rank)
        prepare_multi_gpu_env(arguments)  # as the launcher does: fills in what torch's launcher reads
        assert arguments.rdzv_backend == "c10d"
        assert arguments.rdzv_endpoint == "gpu07:23456", "without it every machine would wait for itself"
        assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("3", "8", rank)
        assert arguments.training_script == "recipes/finetune.py"


def test_the_recipe_understands_its_words(submit, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, calls = submit("--config", "recipes/configs/mixtral_commonsense.yaml", "--use_cpu", "true")
    words = calls[0][calls[0].index("recipes/finetune.py") + 1 :]
    arguments = parse_arguments(words)
    assert str(arguments.output_dir) == "outputs/slurm-123456"
    assert arguments.training.resume_from_checkpoint == "true"
    assert not arguments.training.bf16


def test_variables_choose_another_file_other_machines_and_another_folder(submit):
    _, calls = submit(
        "--seed", "3 4", CONFIG="recipes/accelerate/ddp.yaml", GPUS_PER_NODE="4", OUTPUT_DIR="/scratch/my run"
    )
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(calls[2][1:]))
    assert arguments.multi_gpu
    assert arguments.num_processes == 12
    assert arguments.training_script_args == [
        "--output_dir", "/scratch/my run", "--resume_from_checkpoint", "true", "--seed", "3 4",
    ]  # fmt: skip


def test_a_machine_that_fails_fails_the_job(submit):
    result, _ = submit(FAIL_ON="1")
    assert result.returncode == 1


def test_the_header_asks_slurm_for_one_launcher_per_machine_and_for_requeueing():
    lines = [line.removeprefix("#SBATCH ") for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--ntasks-per-node=1", "--requeue", "--open-mode=append"} <= set(lines)
    assert Path(SCRIPT).read_text().splitlines()[0] == "#!/usr/bin/env bash"
