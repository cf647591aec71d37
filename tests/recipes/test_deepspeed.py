"""DeepSpeed as `recipes/accelerate` configures it, two gloo ranks on the CPU: the same adapter as one process trains."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support import tiny_training, zoo
from support.launched import CONFIGS, environment, parse, run_ranks

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip(
        "deepspeed is not installed; test_accelerate_configs.py reads its files all the same", allow_module_level=True
    )
if shutil.which("c++") is None and shutil.which("g++") is None:
    pytest.skip("deepspeed compiles its CPU collectives and there is no C++ compiler", allow_module_level=True)

RANK = Path(tiny_training.__file__).with_name("deepspeed_rank.py")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny OLMoE on disk."""
    folder = tmp_path_factory.mktemp("base")
    zoo.build("olmoe").save_pretrained(folder)
    return folder


def run(stage: int, variant: str, base: Path, output: Path) -> dict:
    """Train and resume under a ZeRO stage; what the first rank reports."""
    config = CONFIGS / f"deepspeed_zero{stage}.yaml"
    variables = environment(parse(config, "--num_processes", "2"))
    # See deepspeed_rank.py; the plugin is built there.
    variables.pop("ACCELERATE_USE_DEEPSPEED")
    output.mkdir()
    run_ranks(RANK, base, output, variant, DS_ACCELERATOR="cpu", **variables)
    return json.loads((output / "report.json").read_text())


@pytest.mark.parametrize("variant", ["R", "E", "D", "S"])
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_train_save_and_resume_what_one_process_trains(stage, variant, base, tmp_path):
    expected = tiny_training.train(base, tmp_path / "one", variant)
    report = run(stage, variant, base, tmp_path / "two")
    assert report["losses"] == pytest.approx(expected, abs=1e-5)
    assert report["resumed"] == pytest.approx(report["losses"], abs=0)
    if stage == 3:
        assert report["experts_partitioned"]
        assert report["adapters_whole"]
    one = load_file(tmp_path / "one" / "adapter_model.safetensors")
    start = load_file(tmp_path / "one" / "checkpoint-2" / "adapter_model.safetensors")
    assert all((one[name] - start[name]).abs().max() > 1e-4 for name in one), "SGD must have moved every tensor"
    for folder in ("whole", "resumed"):
        two = load_file(tmp_path / "two" / folder / "adapter_model.safetensors")
        assert two.keys() == one.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(
                two[name], tensor, atol=1e-5, rtol=0, msg=lambda m, n=f"{folder} {name}": f"{n}: {m}"
            )
