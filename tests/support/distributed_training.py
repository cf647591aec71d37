"""What the ranks of ``tests/perft/test_distributed_models.py`` run, and the same on one process."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_moe_ext import PerftConfig, count_trainable
from hf_moe_ext.perft import gradient_sync
from support import zoo
from support.distributed_models import Layout, load

VARIANTS: dict[str, dict[str, Any]] = {
    "R": {"num_experts": 4, "top_k": 2, "router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1},
    "E": {},
    "D": {"num_experts": 2},
    "S": {},
}
BATCH_SIZE, STEPS, MICRO_BATCHES = 2, 4, 4  # micro-batches of one step, over all ranks


def attach(model: Any, variant: str, seed: int = 1, **settings: Any) -> Any:
    """A new adapter; its random values hang on the seed."""
    torch.manual_seed(seed)
    config = {"variant": variant, "r": 4, "init_weights": False, **VARIANTS[variant]} | settings
    return get_peft_model(model, PerftConfig(task_type="CAUSAL_LM", **config))


def rows(count: int) -> list[list[int]]:
    """Sequences of very different lengths, so that micro-batches have uneven numbers of loss tokens."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, zoo.VOCAB_SIZE, (3 + (7 * i) % 11,), generator=generator).tolist() for i in range(count)]


def collate(features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A padded batch."""
    ids = [torch.tensor(f["input_ids"]) for f in features]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=zoo.PAD_ID)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    return {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}


def micro_batches(empty: int | None = None) -> list[dict[str, Tensor]]:
    """The micro-batches of one step; number ``empty`` has no loss token."""
    data = rows(BATCH_SIZE * MICRO_BATCHES)
    batches = [
        collate([{"input_ids": row} for row in data[i : i + BATCH_SIZE]]) for i in range(0, len(data), BATCH_SIZE)
    ]
    if empty is not None:
        batches[empty]["labels"].fill_(-100)
    return batches


def adapters(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The tensors of one adapter."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".perft_" in n and n.endswith(f".{name}")}


def gradients(model: nn.Module, batches: Sequence[dict[str, Tensor]], step_tokens: Tensor, factor: int = 1) -> Any:
    """Gradients of the adapters after some micro-batches, as a training loop of one's own accumulates them."""
    model.train()
    model.zero_grad()
    for batch in batches:
        (model(**batch, num_items_in_batch=step_tokens).loss * factor).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and ".perft_" in n}


def own_loop(model: Any, rank: int = 0, empty: int | None = None) -> dict[str, Tensor]:
    """Gradients of one step over all micro-batches, of which this rank takes its share."""
    config = getattr(model.config, "distributed_config", None)
    size, index = (config.dp_size, rank // config.tp_size) if config is not None else (1, 0)
    batches = micro_batches(empty)
    step_tokens = torch.stack([batch["labels"][:, 1:].ne(-100).sum() for batch in batches]).sum()
    return gradients(model, batches[index::size], step_tokens, factor=size)


def make_trainer(model: Any, folder: Path, **changes: Any) -> Trainer:
    """A plain Trainer over uneven rows; every step is MICRO_BATCHES micro-batches, whatever the number of ranks."""
    config = getattr(model.config, "distributed_config", None)
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": MICRO_BATCHES // (config.dp_size if config is not None else 1),
        "average_tokens_across_devices": True,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    } | changes
    return Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=Dataset.from_dict({"input_ids": rows(2 * BATCH_SIZE * MICRO_BATCHES)}),
        data_collator=collate,
    )


def held_out_logits(model: nn.Module) -> Tensor:
    """Logits of a batch nobody trains on, the same on every rank."""
    batch = zoo.random_batch(zoo.VOCAB_SIZE, 3, 9, zoo.PAD_ID, seed=7)
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def sharded_fraction(model: nn.Module) -> float:
    """How much of the model's parameters this rank holds."""
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters())
    return held / sum(p.numel() for p in model.parameters())


# What the ranks run: functions at the top level, called with (rank, world_size, ...).


def train_variants(rank: int, world_size: int, base: Path, out: Path, layout: Layout, reduce: str = "both") -> Any:
    """Every variant: attach, train, save; ``reduce`` says who averages gradients."""
    if reduce == "tuner":  # as in Transformers before 5.22
        Trainer._sync_replicated_trainable_parameters = lambda self, model: None
    results, averaged = {}, []
    backward = gradient_sync._MeanGradient.backward
    gradient_sync._MeanGradient.backward = staticmethod(lambda *args: averaged.append(1) or backward(*args))
    for variant in VARIANTS:
        model = load(base, layout)
        held = sharded_fraction(model)
        model = attach(model, variant, seed=1 + rank)  # each rank draws other values
        born = adapters(model)
        trainer = make_trainer(model, out / variant)
        trainer.train()
        trainer.save_model(str(out / variant / "saved"))
        results[variant] = {
            "born": born,
            "trained": adapters(model),
            "logits": held_out_logits(model),
            "held": held,
            "averaged": len(averaged),
            "count": count_trainable(model),
        }
    return results


def loop_variants(rank: int, world_size: int, base: Path, layouts: Sequence[Layout], variants: str = "REDS") -> Any:
    """Gradients of a loop without a Trainer, per layout and variant; micro-batch 1 has no loss token."""
    # What the stock lm_head does under tensor parallelism inside FSDP; nothing writes into that view.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    return {
        (i, variant): own_loop(attach(load(base, layout), variant, seed=1 + rank), rank, empty=1)
        for i, layout in enumerate(layouts)
        for variant in variants
    }


def resume_loop(rank: int, world_size: int, base: Path, out: Path, layout: Layout) -> Any:
    """A loop of one's own that is stopped after two of four steps and goes on with a new model, beside one that is not.

    The Trainer refuses to resume a model that was distributed when it was loaded.
    """

    def steps(model: Any, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            own_loop(model, rank)
            optimizer.step()

    def optimizer_of(model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)

    model = attach(load(base, layout), "R", seed=1 + rank)
    optimizer = optimizer_of(model)
    steps(model, optimizer, 2)
    model.save_pretrained(out, is_main_process=rank == 0)
    if rank == 0:
        torch.save(optimizer.state_dict(), out / "optimizer.pt")
    torch.distributed.barrier()
    resumed = PeftModel.from_pretrained(load(base, layout), out, is_trainable=True)
    second = optimizer_of(resumed)
    second.load_state_dict(torch.load(out / "optimizer.pt", weights_only=True))
    steps(model, optimizer, 2)
    steps(resumed, second, 2)
    return {"whole": adapters(model), "resumed": adapters(resumed)}


def checkpointing_modes(rank: int, world_size: int, base: Path, layout: Layout) -> Any:
    """Gradients under both modes of gradient checkpointing."""
    results = {}
    for reentrant in (False, True):
        model = attach(load(base, layout), "R", seed=1 + rank)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        results[reentrant] = own_loop(model, rank)
    return results


def compiled(rank: int, world_size: int, base: Path, layout: Layout) -> Any:
    """Gradients under torch.compile, without a code generator."""
    warnings.simplefilter("default")  # the compiler warns of what FSDP's own hooks do
    found = own_loop(torch.compile(attach(load(base, layout), "R", seed=1 + rank), backend="aot_eager"), rank)
    return {name.replace("_orig_mod.", ""): gradient for name, gradient in found.items()}


def later_adapters(rank: int, world_size: int, base: Path, saved: Path, layout: Layout) -> Any:
    """Gradients of adapters that were added, loaded, frozen and cast after the first was attached and deleted."""
    model = attach(load(base, layout), "R", seed=1 + rank)
    torch.manual_seed(50 + rank)
    model.add_adapter("second", PerftConfig(task_type="CAUSAL_LM", variant="E", r=4, init_weights=False))
    model.set_adapter("second")
    model.delete_adapter("default")
    born = adapters(model, "second")
    own_loop(model, rank)
    results = {"born": born, "second": own_loop(model, rank)}
    for name, low_memory in (("loaded", False), ("assigned", True)):
        model.load_adapter(saved, name, is_trainable=True, low_cpu_mem_usage=low_memory)
        model.set_adapter(name)
        model.base_model.set_requires_grad(name, requires_grad=False)
        model.base_model.set_requires_grad(name, requires_grad=True)
        model.base_model._cast_adapter_dtype(name)
        results[name] = own_loop(model, rank)
    return results


def reopened(rank: int, world_size: int, base: Path, saved: Path, layout: Layout) -> Tensor:
    """Logits of a saved adapter on a distributed base."""
    return held_out_logits(PeftModel.from_pretrained(load(base, layout), saved))


def undistributed(rank: int, world_size: int, base: Path) -> Any:
    """Gradient of this rank's own micro-batch in a model that Transformers did not distribute."""
    batch = micro_batches()[rank]
    return gradients(attach(load(base), "R"), [batch], batch["labels"][:, 1:].ne(-100).sum())


def refusals(rank: int, world_size: int, base: Path) -> list[str]:
    """The messages for what cannot be attached."""
    messages = []
    cases: list[tuple[Layout, dict[str, Any]]] = [
        ({"fsdp_size": 2}, {"modules_to_save": ["lm_head"]}),
        ({"fsdp_size": 2}, {"trainable_token_indices": [4]}),
        ({"fsdp_size": 2}, {"bias": "all"}),
        ({"pp_size": 2}, {}),
    ]
    for layout, settings in cases:
        model = load(base, layout)
        names = [name for name, _ in model.named_modules()]
        try:
            attach(model, "S", **settings)
        except ValueError as error:
            messages.append(str(error))
        assert [name for name, _ in model.named_modules()] == names  # nothing was changed
    return messages


def train_tensor_parallel(rank: int, world_size: int, base: Path, out: Path) -> Any:
    """The plain Trainer on a tensor-parallel model."""
    model = attach(load(base, {"tp_size": 2}), "R", seed=1 + rank)
    make_trainer(model, out).train()
    return adapters(model)
