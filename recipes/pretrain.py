"""Pre-train a model whose MoE blocks the configuration chooses (`olmoe_ext`, `mixtral_ext`, `qwen3_moe_ext`) with the plain Trainer.

    accelerate launch recipes/pretrain.py [--config recipes/configs/X.yaml] [--moe_block dcca] [--flag value ...]

Without arguments it runs `configs/pretrain_dcca.yaml`: a small DCCA model on the text of Python's standard library, no
network, two cores, a few minutes.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, default_data_collator
from transformers.utils import logging

from accelerate import PartialState
from entry import refuse_common_mistakes, run_recipe
from held_out import MeasureFirst, Measurement, read_measurement
from hf_moe_ext.mup import record_training_arguments
from hf_moe_ext.row_losses import RowLosses, measure_losses, sum_answer_nats
from output_folder import claim_output_folder, find_checkpoint, push_folder
from pretrain_arguments import PretrainArguments, parse_pretrain_arguments
from pretrain_data import Packed, Texts, pack, prepare_tokenizer, read_texts
from pretrain_model import build_config, build_model, check_model, choose_optimizer, describe_model, save_model
from quickstart.ngram import ByteNgram
from reporting import Clock, compare_losses, draw_loss_curve, find_peak_memory, find_versions, write_results

logger = logging.get_logger("pretrain")

LOSS_CURVE, METRICS, BEFORE = "loss_curve.png", "metrics.json", "before.json"
NGRAM_ORDER = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit code is 2 for a mistake of the user's, of which nothing is written."""
    return run_recipe(__file__, parse_pretrain_arguments, pretrain, argv)


def pretrain(arguments: PretrainArguments, command: str) -> dict[str, Any]:
    """The whole run: text, tokenizer, model, before, training, after, files.

    Args:
        arguments: Checked arguments.
        command: The command line, for the card.

    Returns:
        What `metrics.json` holds.
    """
    clock, training = Clock(), arguments.training
    refuse_common_mistakes(arguments)
    check_model(arguments)
    checkpoint = find_checkpoint(arguments)
    known = None if checkpoint is None else read_measurement(checkpoint, BEFORE)
    with clock("data"), training.main_process_first(desc="read data"):
        texts = read_texts(arguments)
        tokenizer = prepare_tokenizer(arguments, texts)
        packed = pack(texts, tokenizer, arguments)
    config = build_config(arguments, tokenizer)
    if training.process_index == 0:
        claim_output_folder(arguments)
    PartialState().wait_for_everyone()
    with clock("model"):
        model = build_model(config, arguments)
    trainer = build_trainer(arguments, model, tokenizer, packed)
    held_out = HeldOutText(packed.held_out)
    first = MeasureFirst(trainer, held_out, arguments.output_dir / BEFORE, known)  # type: ignore[arg-type]  # the same method
    trainer.add_callback(first)
    with clock("train"):
        result = trainer.train(resume_from_checkpoint=checkpoint)
    clock.seconds["before"], clock.seconds["train"] = first.seconds, round(clock.seconds["train"] - first.seconds, 2)
    save_model(trainer, arguments.output_dir, bool(arguments.config_keys.get("use_cache", True)))
    trainer.save_state()
    with clock("after"):
        after = held_out.measure(trainer, "after")
    metrics = {
        "command": command,
        "settings": arguments.describe(),
        # What `hf-moe transfer` takes over to a larger model.
        "training_arguments": record_training_arguments(training, arguments.data.max_length),
        "model": describe_model(config),
        "loss": compare_losses(first.measurement.losses, after.losses, seed=training.seed),
        "bits_per_byte": {
            name: bits_per_byte(measured.losses, packed.bytes_per_token)
            for name, measured in (("before", first.measurement), ("after", after))
        },
        "steps": trainer.state.global_step,
        "processes": training.world_size,
        "train_rows": len(packed.train),
        "tokens_per_step": training.train_batch_size
        * training.gradient_accumulation_steps
        * training.world_size
        * arguments.data.max_length,
        # Of this process' share of the run: after a resume, of what was left.
        "samples_per_second": result.metrics["train_samples_per_second"],
        "log": trainer.state.log_history,
    }
    if training.process_index == 0:
        if arguments.data.ngram_baseline:
            with clock("ngram"):
                metrics["bits_per_byte"][f"order_{NGRAM_ORDER}_ngram"] = measure_ngram(texts)
        write_files(arguments, metrics, clock)
    PartialState().wait_for_everyone()
    return metrics


def build_trainer(
    arguments: PretrainArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    packed: Packed,
    optimizer: Any = None,
) -> Trainer:
    """A plain Trainer; `--eval_strategy` measures the first `--max_curve_samples` held-out rows, `--mup` has its groups.

    Args:
        arguments: The run's.
        model: That is trained.
        tokenizer: The model's.
        packed: Rows of both sides.
        optimizer: Class and arguments; None for what `--optim` and `--mup` say.
    """
    curve, limit = packed.held_out, arguments.data.max_curve_samples
    return Trainer(
        model=model,
        args=arguments.training,
        train_dataset=packed.train,
        eval_dataset=curve if limit is None else curve.select(range(min(limit, len(curve)))),
        data_collator=default_data_collator,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer or choose_optimizer(model, arguments.training),
        preprocess_logits_for_metrics=sum_nats,
        # The loss that the Trainer reports holds the router's auxiliary loss too; this one does not.
        compute_metrics=lambda prediction: {"nats_per_token": RowLosses(*np.asarray(prediction.predictions).T).mean},
    )


def sum_nats(outputs: torch.Tensor | tuple[Any, ...], labels: torch.Tensor) -> torch.Tensor:
    """`sum_answer_nats` of a model whose outputs may begin with an auxiliary loss and end with router logits."""
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum_answer_nats(next(t for t in tensors if isinstance(t, torch.Tensor) and t.ndim == 3), labels)


class HeldOutText:
    """The held-out rows, measured as `held_out.HeldOut` is, less what only answers have."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def measure(self, trainer: Trainer, description: str) -> Measurement:
        """Loss of every row."""
        del description
        return Measurement(measure_losses(trainer, self.rows))


def bits_per_byte(losses: RowLosses, bytes_per_token: float) -> float:
    """Code length of the held-out text; its end-of-text tokens are paid for and are no bytes."""
    return losses.mean / math.log(2) / bytes_per_token


def measure_ngram(texts: Texts) -> float:
    """Bits per byte of an interpolated byte n-gram of the train text, on the held-out text."""
    model = ByteNgram([text.encode() for text in texts.train], order=NGRAM_ORDER)
    return model.bits_per_byte([text.encode() for text in texts.held_out])


def write_files(arguments: PretrainArguments, metrics: dict[str, Any], clock: Clock) -> None:
    """Picture, card and metrics; then the push."""
    folder, loss = arguments.output_dir, metrics["loss"]
    draw_loss_curve(metrics["log"], loss["before"], loss["after"], folder / LOSS_CURVE, "Pre-training loss")
    metrics |= {"pictures": [LOSS_CURVE], "seconds": clock.seconds, "versions": find_versions()}
    metrics["peak_memory_bytes"] = find_peak_memory()
    results = write_results(metrics, folder, METRICS)
    print(f"\n{results}\n\nEverything is in {Path(folder)}: model, {METRICS}, README.md, {LOSS_CURVE}")
    if arguments.push_to_hub:
        print(f"Pushed: {push_folder(arguments)}")


if __name__ == "__main__":
    sys.exit(main())
