"""What `accelerate launch --config_file` would do, without the devices the file asks for."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"


def parse(config: Path, *flags: str) -> argparse.Namespace:
    """The launcher's arguments after it has read the file; flags of the command line win."""
    words = ["--config_file", str(config), "--main_process_port", "0", *flags, "recipes/finetune.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    return arguments


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    """The variables by which the launcher tells its processes what the file says."""
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""
        found = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        found = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in found.items() if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_"))}


def run_ranks(script: Path, *words: object, world_size: int = 2, **variables: str) -> str:
    """Run a script in processes of one gloo group on this machine; its output, or an AssertionError with it."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
         str(world_size), str(script), *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables}, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout
