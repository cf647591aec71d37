"""``hf-moe run``: real programs in real processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_moe_ext.launch import STARTUP_FOLDER, startup_environment

RUN = [sys.executable, "-m", "hf_moe_ext.cli", "run"]
LOADED = "import sys; print('hf_moe_ext' in sys.modules, 'torch' in sys.modules)"
KNOWN = "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as t; print(t['PERFT'].__name__)"


def start(*command: str, environment: dict[str, str] | None = None, **arguments) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RUN, *command], capture_output=True, text=True, timeout=300, env=os.environ | (environment or {}), **arguments
    )


def test_a_python_has_imported_us_and_nothing_heavy():
    result = start("--", "python", "-c", LOADED)
    assert (result.stdout, result.stderr) == ("True False\n", "")


def test_without_it_nothing_is_imported():
    result = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, timeout=60)
    assert result.stdout == "False False\n"


def test_peft_knows_the_type_in_a_child_of_a_child():
    inner = f"import subprocess, sys; subprocess.run([sys.executable, '-W', 'ignore', '-c', {KNOWN!r}], check=True)"
    result = start("--", "python", "-c", inner)
    assert result.stdout == "PerftModel\n", result.stderr


def test_spawned_workers_know_the_type(tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(
        "import multiprocessing, sys\n"
        "def loaded(_): return 'hf_moe_ext' in sys.modules\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool: print(pool.map(loaded, [0]))\n"
    )
    assert start("--", "python", str(script)).stdout == "[True]\n"


LAUNCHERS = {
    "accelerate": (
        "accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no",
        1,
    ),
    "torchrun": ("torchrun --nproc_per_node 2 --master_addr 127.0.0.1 --master_port 0", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_pass_it_on_to_every_rank(name, tmp_path):
    command, ranks = LAUNCHERS[name]
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys\nfrom peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as t\n"
        "open(f'{sys.argv[1]}/rank' + os.environ.get('RANK', '0'), 'w').write(t['PERFT'].__name__)\n"
    )
    result = start("--", *command.split(), str(script), str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(ranks)] == ["PerftModel"] * ranks


def test_a_console_script_of_this_environment_needs_no_path():
    result = start("--", "hf", "version", environment={"PATH": os.defpath})
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_options_of_the_program_stay_its_own_also_without_the_dashes():
    result = start("python", "-c", "import sys; print(sys.argv[1:])", "--help", "--json", "--", "x")
    assert result.stdout == "['--help', '--json', '--', 'x']\n", result.stderr


def test_exit_code_and_standard_streams_are_the_programs():
    code = "import sys; sys.stdout.write(sys.stdin.read().upper()); sys.stderr.write('said'); sys.exit(7)"
    result = start("--", "python", "-c", code, input="words")
    assert (result.returncode, result.stdout, result.stderr) == (7, "WORDS", "said")


@pytest.mark.parametrize(
    ("number", "returncode", "words"),
    [(signal.SIGINT, 3, "interrupted\n"), (signal.SIGTERM, -signal.SIGTERM, ""), (signal.SIGKILL, -signal.SIGKILL, "")],
)
def test_signals_reach_the_program(number, returncode, words):
    # A shell's background job, as this suite may be one, ignores the keyboard's signal, and so would its children.
    code = "import signal, sys, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\ntry: print('ready', flush=True); time.sleep(120)\nexcept KeyboardInterrupt: print('interrupted', flush=True); sys.exit(3)\n"
    with subprocess.Popen([*RUN, "--", "python", "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(60) == returncode  # nothing is left behind: the program is this very process
        assert process.stdout.read() == words


def test_another_sitecustomize_runs_too_and_ours_is_not_importable(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; print('theirs', __name__, 'hf_moe_ext' in sys.modules)\n")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    code = f"import sitecustomize, sys; print(sitecustomize.__file__, {str(STARTUP_FOLDER)!r} in sys.path)"
    result = start("--", "python", "-c", code, environment={"PYTHONPATH": paths})
    theirs = "theirs sitecustomize True\n"
    # Once for the Python of `hf-moe` itself, whose site would run it as well, were it not replaced: output is the program's.
    assert result.stdout.removeprefix("theirs sitecustomize False\n") == f"{theirs}{tmp_path}/sitecustomize.py False\n"


def test_a_python_without_the_package_says_so_and_goes_on(tmp_path):
    hidden = "import sys; sys.meta_path.insert(0, type('F', (), {'find_spec': staticmethod(hide)}))"
    code = (
        "def hide(name, *_):\n"
        "    if name == 'hf_moe_ext': raise ModuleNotFoundError('no', name=name)\n"
        f"{hidden}\nimport runpy; runpy.run_path({str(STARTUP_FOLDER / 'sitecustomize.py')!r}); print('went on')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "went on\n"
    assert result.stderr == f"hf-moe run: {sys.executable} cannot import hf_moe_ext, so it knows no PERFT adapters\n"


def test_the_folder_stands_once_and_first_however_often_it_is_nested():
    once = startup_environment({"PYTHONPATH": os.pathsep.join(["a", "", "b"]), "HOME": "x"})
    assert once == {"PYTHONPATH": os.pathsep.join([str(STARTUP_FOLDER), "a", "b"]), "HOME": "x"}
    assert startup_environment(once) == once


def test_bad_commands_are_one_message_and_exit_code_2(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text("print(1)")
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x00\x01")
    broken.chmod(0o755)
    for command, words in (
        (["--", "no-such-program"], "hf-moe run: no program 'no-such-program' in "),
        (["--", str(script)], f"is a script, not a program; write: hf-moe run -- python {script} ..."),
        (["--", str(broken)], "cannot be started: Exec format error"),
        ([], "Missing argument 'COMMAND...'"),
    ):
        result = start(*command)
        assert result.returncode == 2, command
        assert result.stdout == ""
        assert words in result.stderr
        assert "Traceback" not in result.stderr
