"""Starts the processes that `accelerate launch --cpu --num_processes N` promises.

Accelerate's CPU launcher hands N over to MPI. Without an MPI host file it starts one process, sets MASTER_ADDR and
MASTER_PORT for peers that never come, and says nothing (`accelerate/utils/launch.py`, prepare_simple_launcher_cmd_env,
1.15). We start the N processes with torch's own launcher, so that the command does what it says.
"""

import os
import subprocess
import sys
from collections.abc import Sequence

import psutil

from finetune_arguments import UserError

# Set by torchrun and by the MPI launchers accelerate knows: then every process is there already.
_RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def find_missing_processes() -> int:
    """How many processes were asked for when only this one was started; 0 when nothing is missing.

    Raises:
        UserError: Several were asked for, and how many cannot be found out.
    """
    promised = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ
    if not promised or any(name in os.environ for name in _RANK_VARIABLES):
        return 0
    asked = read_num_processes(psutil.Process(os.getppid()).cmdline())
    if asked is None:
        raise UserError(
            "accelerate was told to use several CPU processes and started one. Give --num_processes N on its command "
            f"line, or start with `torchrun --nproc_per_node N {sys.argv[0]} --use_cpu`."
        )
    return asked if asked > 1 else 0


def read_num_processes(command_line: Sequence[str]) -> int | None:
    """The value of `--num_processes` in a launcher's command line."""
    for i, word in enumerate(command_line):
        name, _, value = word.replace("-", "_").partition("=")
        if name == "__num_processes":
            value = value or (command_line[i + 1] if i + 1 < len(command_line) else "")
            return int(value) if value.isdigit() else None
    return None


def start_processes(count: int, script: str, arguments: Sequence[str]) -> int:
    """Run the script in `count` processes of one group on this machine and return their exit code."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT")}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    return subprocess.run([*launcher, script, *arguments], env=environment, check=False).returncode
