"""One rank of `finetune.py` under accelerate's FSDP2 on CPU: ``fsdp2_recipe.py FLAGS ...``.

On a CPU accelerate takes DDP whatever its configuration says. Told that the group is one of GPUs, it prepares, saves and
resumes FSDP2 as it would there, on the tensors of the CPU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import finetune
from accelerate import PartialState

sharded: set[str] = set()
build_trainer = finetune.build_trainer


class Watch(TrainerCallback):
    """Sees which adapter tensors are sharded while it trains."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Note them."""
        sharded.update(name for name, p in model.named_parameters() if "perft_" in name and isinstance(p, DTensor))


def build_watched(*arguments):
    """The recipe's own trainer, watched."""
    trainer = build_trainer(*arguments)
    trainer.add_callback(Watch())
    return trainer


def call_it_gpus(*arguments):
    """The run itself, which begins when its arguments have set up the processes."""
    assert PartialState().num_processes > 1
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return run(*arguments)


run = finetune.finetune
finetune.finetune, finetune.build_trainer = call_it_gpus, build_watched
code = finetune.main(sys.argv[1:])
assert code or sharded, "no adapter was sharded: this was not FSDP2"
sys.exit(code)
