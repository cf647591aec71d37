"""Short distillation of a converted model against its source, by the plain Trainer with another loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator


@dataclass(frozen=True)
class DistillationSettings:
    """How long and how to distill.

    Attributes:
        num_steps: optimizer steps; 0 = no distillation.
        learning_rate: peak of AdamW; warm-up over a tenth, then linear to zero.
        batch_rows: rows per step.
        output_loss_coef: weight of the converted blocks' relative squared output errors beside the KL divergence.
        train_router: train the converted layers' routers too.
    """

    num_steps: int = 0
    learning_rate: float = 5e-4
    batch_rows: int = 4
    output_loss_coef: float = 0.0
    train_router: bool = False

    def check(self) -> None:
        """Refuse bad values.

        Raises:
            ValueError: naming the setting.
        """
        for name, least in (("num_steps", 0), ("batch_rows", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"distillation {name} must be an integer of at least {least}; got {value!r}")
        if not self.learning_rate > 0:
            raise ValueError(f"distillation learning_rate must be above 0; got {self.learning_rate!r}")
        if not self.output_loss_coef >= 0:
            raise ValueError(f"distillation output_loss_coef must be at least 0; got {self.output_loss_coef!r}")


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher || student), in nats; logits [..., vocabulary]."""
    log_p, log_q = F.log_softmax(teacher.float(), dim=-1), F.log_softmax(student.float(), dim=-1)
    return F.kl_div(log_q.flatten(0, -2), log_p.flatten(0, -2), log_target=True, reduction="batchmean")


def relative_output_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Sum over blocks of |student - teacher|^2 / |teacher|^2."""
    return torch.stack([(s - t).square().sum() / t.square().sum() for s, t in zip(student, teacher, strict=True)]).sum()


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Tensor,
    layers: list[int],
    settings: DistillationSettings,
    working_folder: Path,
    seed: int = 0,
) -> list[float]:
    """Train the converted layers' descend, ascend and experts in place; all else stays as it was.

    Args:
        student: the converted model, float32.
        teacher: the source.
        rows: token ids [rows, length].
        layers: converted layers.
        settings: see `DistillationSettings`.
        working_folder: a temporary folder for the Trainer, which writes nothing there that is kept.
        seed: of the order of rows.

    Returns:
        Logged losses, some twenty over the run.
    """
    _choose_trainable(student, layers, settings.train_router)
    arguments = TrainingArguments(
        output_dir=str(working_folder),
        max_steps=settings.num_steps,
        per_device_train_batch_size=settings.batch_rows,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.num_steps // 10,
        logging_steps=max(1, settings.num_steps // 20),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        use_cpu=student.device.type == "cpu",
        dataloader_pin_memory=False,
    )
    dataset: Any = [{"input_ids": row, "labels": row} for row in rows]
    trainer = _DistillationTrainer(
        model=student, args=arguments, train_dataset=dataset, data_collator=default_data_collator
    )
    teacher.to(arguments.device)  # type: ignore[arg-type]
    trainer.teacher, trainer.layers = teacher.eval(), layers
    trainer.output_loss_coef = settings.output_loss_coef
    trainer.train()
    student.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class _DistillationTrainer(Trainer):
    teacher: PreTrainedModel
    layers: list[int]
    output_loss_coef: float

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids = inputs["input_ids"]
        with _block_outputs(self.teacher, self.layers) as wanted, torch.no_grad():
            teacher = self.teacher(input_ids=ids).logits
        with _block_outputs(self.accelerator.unwrap_model(model), self.layers) as given:
            outputs = model(input_ids=ids)
        loss = distillation_loss(outputs.logits, teacher)
        if self.output_loss_coef:
            loss = loss + self.output_loss_coef * relative_output_loss(given, wanted)
        return (loss, outputs) if return_outputs else loss


@contextmanager
def _block_outputs(model: Any, layers: list[int]) -> Iterator[list[Tensor]]:
    outputs: list[Tensor] = []
    handles = [
        model.model.layers[layer].mlp.register_forward_hook(lambda _, __, result: outputs.append(result))
        for layer in layers
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _choose_trainable(student: Any, layers: list[int], train_router: bool) -> None:
    student.requires_grad_(False)
    for layer in layers:
        block: nn.Module = student.model.layers[layer].mlp
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(train_router or not name.startswith("gate."))


@torch.no_grad()
def measure_perplexity(model: Any, rows: Tensor, batch_rows: int = 8) -> float:
    """Exponential of the mean negative log-likelihood of every token but a row's first; rows [rows, length]."""
    model.eval()
    nats = 0.0
    for batch in rows.to(model.device).split(batch_rows):
        logits = model(input_ids=batch).logits[:, :-1].float()
        nats += float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return float(torch.tensor(nats / (rows.shape[0] * (rows.shape[1] - 1)), dtype=torch.float64).exp())
