"""One cell of `mup_transfer.py`: rows of bytes, a model whose first weights are drawn as the study says, a plain Trainer."""

import argparse
import functools
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments, default_data_collator

from hf_moe_ext.mup import trainer_optimizer
from hf_moe_ext.row_losses import RowLosses
from pretrain import sum_nats
from quickstart.corpus import read_corpus

HELD_OUT_SEED = 0


class TransferTraining:
    """Configuration and cell -> a Trainer; what `hf_moe_ext.mup.run_cell` asks for."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments

    def __call__(self, config: Any, cell: Any) -> Trainer:
        """A Trainer with `model_init`, which draws the first weights by the cell's seed."""
        arguments = self.arguments
        args = training_arguments(arguments, cell)
        train, held_out = read_rows(arguments.source_dir, arguments.length, arguments.num_held_out_rows)

        def draw_model() -> Any:
            model = AutoModelForCausalLM.from_config(config)
            with torch.no_grad():  # embeddings have a scale of their own, the same at every width
                model.get_input_embeddings().weight.mul_(arguments.embedding_std / config.initializer_range)
            return model

        trainer = Trainer(
            args=args,
            model_init=draw_model,
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=default_data_collator,
            # args, not numbers: a search sets args.learning_rate for each of its trials.
            optimizer_cls_and_kwargs=trainer_optimizer(draw_model(), args=args),
            preprocess_logits_for_metrics=sum_nats,
            # The loss the Trainer reports holds the router's auxiliary loss too; this one does not.
            compute_metrics=lambda prediction: {
                "nats_per_token": RowLosses(*np.asarray(prediction.predictions).T).mean
            },
        )
        trainer.remove_callback(PrinterCallback)  # the study prints one line per cell
        return trainer


def training_arguments(arguments: argparse.Namespace, cell: Any) -> TrainingArguments:
    """Linear warm-up, constant to a share of the steps, then linear to a share of the rate; see the recipe's arguments."""
    decay = round((1 - arguments.stable_until) * cell.max_steps)
    return TrainingArguments(
        output_dir=str(arguments.output_dir / "unused"),
        learning_rate=cell.learning_rate,
        seed=cell.seed,
        max_steps=cell.max_steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.num_held_out_rows,
        lr_scheduler_type="warmup_stable_decay",
        warmup_steps=arguments.warmup_steps,
        lr_scheduler_kwargs={
            "num_decay_steps": decay,
            "decay_type": "linear",
            "min_lr_ratio": arguments.final_lr_ratio,
        },
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=arguments.adam_epsilon,
        weight_decay=arguments.weight_decay,
        max_grad_norm=arguments.max_grad_norm,
        use_cpu=arguments.use_cpu,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


class ByteRows(torch.utils.data.Dataset):
    """Bytes end to end, cut into rows; a token is a byte.

    Attributes:
        rows: [rows, length], uint8.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index].long()
        return {"input_ids": row, "labels": row}


@functools.cache
def read_rows(source_dir: str | None, length: int, num_held_out_rows: int) -> tuple[ByteRows, ByteRows]:
    """All rows of the train modules, and some of the held-out modules', the same ones for every cell."""
    corpus = read_corpus(source_dir)
    sides = [cut_rows("\n".join(m.text for m in side), length) for side in (corpus.train, corpus.held_out)]
    train, held_out = sides
    chosen = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(HELD_OUT_SEED))[:num_held_out_rows]
    return ByteRows(train), ByteRows(held_out[chosen])


def cut_rows(text: str, length: int) -> torch.Tensor:
    """[rows, length], uint8; what is left over at the end is dropped."""
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    return torch.from_numpy(data[: len(data) // length * length].reshape(-1, length).copy())
