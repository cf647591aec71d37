"""One rank of a DeepSpeed run: ``deepspeed_rank.py BASE OUTPUT VARIANT``; accelerate's variables say which ZeRO stage.

accelerate 1.15 counts a single process under DeepSpeed where there is no GPU, so the launcher's variables are turned
into the plugin here and its configuration goes to the Trainer, as `--deepspeed` would do it.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import deepspeed
import torch
from accelerate.utils import DeepSpeedPlugin

import hf_moe_ext  # noqa: F401 - registers PERFT with PEFT
from support import tiny_training

base, output, variant = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
deepspeed.init_distributed(dist_backend="gloo")
config = {key: value for key, value in DeepSpeedPlugin().deepspeed_config.items() if key != "steps_per_print"}
zero3 = config["zero_optimization"]["stage"] == 3
seen = {}


def watch_attachment() -> None:
    """Under ZeRO-3 attaching must see partitioned experts and leave them so."""
    real = tiny_training.attach

    def attach(model, name):
        attached = real(model, name)
        experts = [p for n, p in attached.named_parameters() if ".experts." in n and "perft_" not in n]
        adapters = [p for n, p in attached.named_parameters() if "perft_" in n]
        seen["experts_partitioned"] = {p.ds_status.name for p in experts} == {"NOT_AVAILABLE"}
        seen["adapters_whole"] = not any(hasattr(p, "ds_status") or p.numel() == 0 for p in adapters)
        return attached

    tiny_training.attach = attach


if zero3:
    watch_attachment()
options = {"deepspeed": config, "gradient_accumulation_steps": 2}
losses = tiny_training.train(base, output / "whole", variant, **options)
checkpoint = output / "whole" / "checkpoint-2"
resumed = tiny_training.train(base, output / "resumed", variant, resume=str(checkpoint), **options)
if torch.distributed.get_rank() == 0:
    (output / "report.json").write_text(json.dumps({"losses": losses, "resumed": resumed, **seen}))
