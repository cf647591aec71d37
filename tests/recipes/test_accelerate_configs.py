"""The files of `recipes/accelerate`: accelerate reads them, its launcher passes on what they say, and they train."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from support import tiny_training, zoo
from support.launched import CONFIGS, environment, parse, run_ranks
from support.perft import batch

TYPES = {
    "ddp": DistributedType.MULTI_GPU,
    "ep": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
}
# A section of the file -> what its keys are called among the launcher's options.
SECTIONS = {"fsdp_config": "fsdp_", "deepspeed_config": ""}


@pytest.fixture(params=TYPES)
def config(request) -> Path:
    """Each file in turn."""
    return CONFIGS / f"{request.param}.yaml"


def test_there_are_no_others():
    assert {path.stem for path in CONFIGS.iterdir()} == set(TYPES)


def test_accelerate_reads_it_for_one_machine_with_eight_gpus(config):
    loaded = load_config_from_file(str(config))
    assert isinstance(loaded, ClusterConfig)
    assert loaded.distributed_type == TYPES[config.stem]
    assert (loaded.num_machines, loaded.num_processes, loaded.use_cpu) == (1, 8, False)
    assert loaded.mixed_precision == "no", "more would give the adapters' router bfloat16"


def test_every_key_is_an_option_of_the_launcher(config):
    """Accelerate refuses unknown keys at the top; below it would carry them along unread."""
    options = {action.dest for action in launch_command_parser()._actions}
    content = yaml.safe_load(config.read_text())
    sections = {name: value for name, value in content.items() if isinstance(value, dict)}
    for name, section in sections.items():
        for key in section:
            assert key in options, f"{name}.{key}"
            assert key.startswith(SECTIONS[name])
    assert parse(config, "--num_processes", "4").num_processes == 4


def test_its_head_says_how_it_is_started(config):
    head = config.read_text().split("compute_environment")[0]
    assert "Choose it" in head
    assert f"--config_file recipes/accelerate/{config.name}" in head


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ddp", {}),
        ("ep", {}),
        (
            "fsdp2",
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
                "FSDP_RESHARD_AFTER_FORWARD": "true",
                "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
                "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
                "FSDP_OFFLOAD_PARAMS": "false",
            },
        ),
        (
            "deepspeed_zero2",
            {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
                "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",
                "ACCELERATE_GRADIENT_CLIPPING": "auto",
                "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
            },
        ),
        (
            "deepspeed_zero3",
            {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",
                "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
                "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
            },
        ),
    ],
)
def test_the_launcher_tells_its_processes(name, expected):
    found = environment(parse(CONFIGS / f"{name}.yaml"))
    assert found.items() >= expected.items()
    assert found["ACCELERATE_MIXED_PRECISION"] == "no"
    if not expected:
        assert not any("USE_" in key and value == "true" for key, value in found.items()), "no plugin of accelerate's"


def test_fsdp2_wraps_the_decoder_layers_of_any_family(monkeypatch):
    for name, value in environment(parse(CONFIGS / "fsdp2.yaml")).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading) == (2, True, True)
    for family in ("olmoe", "mixtral"):
        model = tiny_training.attach(zoo.build(family), "R")
        plugin = FullyShardedDataParallelPlugin()
        plugin.set_auto_wrap_policy(model)
        assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {
            type(model.get_base_model().model.layers[0])
        }


@pytest.mark.slow
def test_fsdp2_computes_what_the_whole_model_computes_and_saves_it_whole(tmp_path):
    """Accelerate's own preparation, called as Accelerator.prepare does on GPUs (on a CPU it takes DDP instead)."""
    zoo.build("olmoe", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    script = Path(tiny_training.__file__).with_name("fsdp2_rank.py")
    run_ranks(script, tmp_path, **environment(parse(CONFIGS / "fsdp2.yaml", "--num_processes", "2")))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["router_dtype"] == ["torch.float32"]
    assert report["router_dtype_in_bf16"] == ["torch.bfloat16"], "then the file's warning is out of date"
    assert report["adapters_sharded"]
    model = tiny_training.attach(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), "R")
    assert report["loss"] == float(model.train()(**batch()).loss.detach())
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(saved[name.replace(".default", "")], parameter), name
    with warnings.catch_warnings(action="ignore"):
        reopened = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        )
    assert torch.equal(reopened.eval()(**batch()).logits, model.eval()(**batch()).logits)


@pytest.mark.slow
def test_ddp_trains_the_recipe(quickstart_flags, run_script, tmp_path):
    """The command of the file's head, with the overrides it names for a machine without GPUs."""
    launcher = (
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        CONFIGS / "ddp.yaml",
        "--cpu",
        "--num_processes",
        "2",
    )
    result = run_script(*quickstart_flags, "--output_dir", tmp_path / "run", launcher=tuple(map(str, launcher)))
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["processes"], metrics["steps"]) == (2, 4)
