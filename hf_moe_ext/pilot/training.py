"""The plain Trainer of an arm, and the callback that times its steps and sees a loss that is no number."""

import math
import time
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_moe_ext.pilot.attachment import optimizer_groups
from hf_moe_ext.pilot.candidates import Candidate
from hf_moe_ext.row_losses import sum_answer_nats

WARMUP_FRACTION = 0.06
SCHEDULE = "cosine"


def num_warmup_steps(max_steps: int) -> int:
    """Of a schedule of so many steps."""
    return max(1, round(WARMUP_FRACTION * max_steps))


class Watch(TrainerCallback):
    """Seconds of every step, the last logged loss, and why training was stopped."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last_loss: float | None = None
        self.failure: str | None = None
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it, after what the device still has to do."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Stop at a loss that is no number: no later step brings it back."""
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        self.last_loss = float(loss)
        if not math.isfinite(self.last_loss):
            self.failure = f"the training loss became {self.last_loss} by step {state.global_step}"
            control.should_training_stop = True


def build_trainer(
    model: nn.Module,
    spec: dict[str, Any],
    candidate: Candidate,
    tokenizer: PreTrainedTokenizerBase,
    collator: DataCollatorForSeq2Seq,
    train_rows: Dataset,
    watch: Watch,
    scratch: str,
) -> Trainer:
    """A Trainer that saves nothing and reports nowhere; the seed decides the order of the rows."""
    rate = spec["learning_rate"] or 0.0
    arguments = TrainingArguments(
        output_dir=scratch,
        max_steps=max(1, spec["max_steps"]),
        per_device_train_batch_size=spec["batch_size"],
        per_device_eval_batch_size=4 * spec["batch_size"],
        learning_rate=rate,
        lr_scheduler_type=SCHEDULE,
        warmup_steps=num_warmup_steps(spec["max_steps"]),
        weight_decay=0.0,
        logging_steps=max(1, spec["max_steps"] // 16),
        logging_nan_inf_filter=False,  # it would hide what `Watch` looks for
        include_num_input_tokens_seen="non_padding",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=spec["seed"],
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        data_collator=collator,
        processing_class=tokenizer,
        preprocess_logits_for_metrics=sum_answer_nats,
        optimizer_cls_and_kwargs=None if candidate.kind == "base" else optimizer_groups(model, candidate, rate),
        callbacks=[watch],
    )
