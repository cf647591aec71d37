"""One rank of an FSDP2 model as accelerate shards it: ``fsdp2_rank.py FOLDER``, which holds the base model."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import hf_moe_ext  # noqa: F401 - registers PERFT with PEFT
from hf_moe_ext.perft.layer import PerftLayer
from support import tiny_training
from support.perft import batch

folder = Path(sys.argv[1])
dist.init_process_group("gloo")


def prepare(mixed_precision: str):
    """A freshly loaded and attached model, sharded by the launcher's variables."""
    model = tiny_training.attach(AutoModelForCausalLM.from_pretrained(folder / "base"), "R")
    if dist.get_rank() > 0:  # fsdp_cpu_ram_efficient_loading: every value must come from the first process
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    plugin = FullyShardedDataParallelPlugin()
    if mixed_precision != "no":
        plugin.set_mixed_precision(mixed_precision)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision=mixed_precision, device=torch.device("cpu"),
        is_main_process=dist.get_rank() == 0, torch_device_mesh=None, parallelism_config=None,
    )  # fmt: skip
    return fsdp2_prepare_model(accelerator, model).train()


def router_dtypes(model) -> tuple[float, list[str]]:
    """Loss, and the dtypes the router has while its layer runs; the backward runs too."""
    seen = set()
    for layer in model.modules():
        if isinstance(layer, PerftLayer):
            layer.register_forward_hook(lambda layer, *_: seen.add(str(layer.perft_router["default"].dtype)))
    loss = model(**batch()).loss
    loss.backward()
    return float(loss.detach()), sorted(seen)


model = prepare("no")
report = {"adapters_sharded": all(isinstance(p, DTensor) for n, p in model.named_parameters() if "perft_" in n)}
report["loss"], report["router_dtype"] = router_dtypes(model)
# As Accelerator.get_state_dict does for Trainer.save_model.
options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
whole = get_model_state_dict(model, options=options)
if dist.get_rank() == 0:
    model.save_pretrained(folder / "adapter", state_dict=whole)
report["router_dtype_in_bf16"] = router_dtypes(prepare("bf16"))[1]
if dist.get_rank() == 0:
    (folder / "report.json").write_text(json.dumps(report))
dist.barrier()
