"""Fine-tune a causal language model with routed adapters (PERFT), LoRA or in full, and say what that changed.

    accelerate launch recipes/finetune.py [--config recipes/configs/X.yaml] [--flag value ...]

Without arguments it runs `configs/quickstart_r.yaml`: no network, two cores, a few minutes.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, Trainer, set_seed
from transformers.utils import logging

from built_in_data import build_built_in
from cpu_processes import find_missing_processes, start_processes
from evaluation import sum_answer_nats
from finetune_arguments import QUICKSTART_MODEL, Arguments, UserError, find_idle_settings, parse_arguments
from finetune_data import apply_chat_templates, encode_rows, load_rows
from finetune_model import (
    attach,
    build_adapter_config,
    count_parameters,
    group_parameters,
    load_model,
    load_tokenizer,
)
from held_out import HeldOut, Measurement
from hf_moe_ext import RouterLoadCallback, record_router_load
from output_folder import check_hub_login, check_output_folder, claim_output_folder, find_checkpoint, push_folder
from quickstart.corpus import Corpus, read_corpus
from quickstart.pretrain import REPORT_FILE, BaseSettings, build_base, find_base
from reporting import append_results, compare_losses, draw_load_map, draw_loss_curve, format_results, write_metrics

logger = logging.get_logger("finetune")

LOSS_CURVE, LOAD_MAP, METRICS = "loss_curve.png", "router_load.png", "metrics.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit code is 2 for a mistake of the user's, of which nothing is written."""
    first_process = os.environ.get("RANK", "0") == "0"
    try:
        arguments = parse_arguments(argv)
        if argv is None and (missing := find_missing_processes()):
            check_output_folder(arguments)  # here the exit code is still ours to choose
            return start_processes(missing, __file__, sys.argv[1:])
        finetune(arguments, shlex.join(["recipes/finetune.py", *(sys.argv[1:] if argv is None else argv)]))
    except UserError as error:
        if first_process:
            print(f"finetune.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def finetune(arguments: Arguments, command: str) -> dict[str, Any]:
    """The whole run: data, base, adapter, before, training, after, files.

    Args:
        arguments: Checked arguments.
        command: The command line, for the card.

    Returns:
        What `metrics.json` holds.
    """
    clock = Clock()
    training = arguments.training
    logging.set_verbosity_warning()
    if not torch.accelerator.is_available():
        training.dataloader_pin_memory = False  # nothing to pin for; torch would warn at every loader
    for sentence in find_idle_settings(arguments):
        logger.warning(sentence)
    # What can be refused is refused before anything takes time or is written.
    build_adapter_config(arguments.adapter)
    check_output_folder(arguments)
    check_hub_login(arguments)
    checkpoint = find_checkpoint(arguments)
    set_seed(training.seed)

    with clock("data"), training.main_process_first(desc="read data"):
        corpus = read_source(arguments)
        rows = load_rows(arguments, lambda: build_built_in(arguments.data, corpus))
    with clock("base"), training.main_process_first(desc="pre-train the base"):
        path, base = prepare_base(arguments, corpus)
    tokenizer = load_tokenizer(arguments.model, path)
    model = attach(load_model(arguments.model, path), arguments.adapter, training.seed)
    with clock("tokenize"), training.main_process_first(desc="tokenize"):
        rows = {side: apply_chat_templates(part, tokenizer) for side, part in rows.items()}
        held_out = HeldOut(rows["test"], rows.get("train"), tokenizer, arguments.data)
        train_rows = None
        if arguments.adapter.peft != "none":
            train_rows = encode_rows(rows["train"], tokenizer, arguments.data.max_length, "tokenize train rows")
    with training.main_process_first(desc="claim the output folder"):
        if training.process_index == 0:
            claim_output_folder(arguments)

    trainer = build_trainer(arguments, model, tokenizer, train_rows)
    with clock("before"):
        before = held_out.measure(trainer, "before")
    after, load = None, {}
    if arguments.adapter.peft != "none":
        with clock("train"):
            trainer.train(resume_from_checkpoint=checkpoint)
        with clock("after"), record_router_load(model) as recorded:
            after = held_out.measure(trainer, "after")
        load = recorded.fractions()  # sums over processes, so every one of them asks
        trainer.save_model(str(arguments.output_dir))
        trainer.save_state()
    metrics = {
        "command": command,
        "settings": arguments.describe(),
        "base": base,
        "parameters": count_parameters(model, arguments.adapter),
        **compare(held_out, before, after, training.seed),
        "router_load": load,
        "train_rows": 0 if train_rows is None else len(train_rows),
        "steps": trainer.state.global_step,
        "processes": training.world_size,
        "log": trainer.state.log_history,
    }
    if trainer.is_world_process_zero():
        write_files(arguments, metrics, clock)
    trainer.accelerator.wait_for_everyone()
    return metrics


def read_source(arguments: Arguments) -> Corpus | None:
    """The source text, when the base or the rows are made of it."""
    if arguments.model.model_name_or_path != QUICKSTART_MODEL and arguments.data.dataset_name != "docstrings":
        return None
    try:
        return read_corpus(arguments.quickstart.base_source_dir)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error


def prepare_base(arguments: Arguments, corpus: Corpus | None) -> tuple[str, dict[str, Any] | None]:
    """The model's name or folder, and the quickstart base's report; the first process pre-trains it when needed.

    Raises:
        UserError: The base does not beat the n-gram.
    """
    if arguments.model.model_name_or_path != QUICKSTART_MODEL:
        return arguments.model.model_name_or_path, None
    wanted = arguments.quickstart
    changed = {} if wanted.base_max_steps is None else {"max_steps": wanted.base_max_steps}
    settings = BaseSettings(seed=wanted.base_seed, source_dir=wanted.base_source_dir, **changed)
    folder = find_base(settings, Path(wanted.base_cache_dir or arguments.output_dir.parent), corpus)
    if not folder.is_dir():
        build_base(settings, folder)
    report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    if arguments.training.process_index == 0:
        print(
            f"base {folder}: {report['bits_per_byte']:.3f} bits per byte on held-out modules; "
            f"order-3 byte n-gram: {report['ngram_bits_per_byte']:.3f}",
            flush=True,
        )
    if report["bits_per_byte"] >= report["ngram_bits_per_byte"] and not wanted.allow_weak_base:
        raise UserError(
            f"--base_max_steps {settings.max_steps}: the base reaches {report['bits_per_byte']:.3f} bits per byte on "
            f"held-out modules and must beat the n-gram's {report['ngram_bits_per_byte']:.3f}. Raise it, or go on with "
            "--allow_weak_base."
        )
    return str(folder.resolve()), {key: value for key, value in report.items() if key != "log"}


def build_trainer(
    arguments: Arguments, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, train_rows: Dataset | None
) -> Trainer:
    """A plain Trainer; a router learning rate of its own becomes an optimizer group."""
    training, adapter = arguments.training, arguments.adapter
    tokenizer.padding_side = "right"
    optimizer = None
    if adapter.router_learning_rate is not None and adapter.peft == "perft" and adapter.variant == "R":
        groups = group_parameters(model, training.learning_rate, adapter.router_learning_rate, training.weight_decay)
        optimizer = torch.optim.AdamW(
            groups, betas=(training.adam_beta1, training.adam_beta2), eps=training.adam_epsilon
        )
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train_rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        processing_class=tokenizer,
        preprocess_logits_for_metrics=sum_answer_nats,
        optimizers=(optimizer, None),
    )
    if adapter.peft == "perft":
        # First, so that what it adds to a log line is seen by every reporter after it.
        trainer.callback_handler.callbacks.insert(0, RouterLoadCallback(model))
    return trainer


def compare(held_out: HeldOut, before: Measurement, after: Measurement | None, seed: int) -> dict[str, Any]:
    """The measured numbers: loss with its interval, text metric, accuracy, samples."""
    if after is None:
        loss: dict[str, Any] = {"before": before.losses.mean, "rows": len(before.losses.tokens)}
    else:
        loss = compare_losses(before.losses, after.losses, seed=seed)
    return {
        "loss": loss,
        "text_metric": held_out.report_text(before, after, seed),
        "accuracy": held_out.report_accuracy(before, after),
        "samples": held_out.sample_texts(before, after),
    }


def write_files(arguments: Arguments, metrics: dict[str, Any], clock: "Clock") -> None:
    """Pictures, card and metrics; then the push."""
    folder, pictures = arguments.output_dir, []
    if "after" in metrics["loss"]:
        draw_loss_curve(metrics["log"], metrics["loss"]["before"], metrics["loss"]["after"], folder / LOSS_CURVE)
        pictures.append(LOSS_CURVE)
    if metrics["router_load"]:
        draw_load_map(metrics["router_load"], folder / LOAD_MAP)
        pictures.append(LOAD_MAP)
    metrics |= {"pictures": pictures, "seconds": clock.seconds}
    append_results(metrics, folder / "README.md")
    write_metrics(metrics, folder / METRICS)
    print(f"\n{format_results(metrics)}\n\nEverything is in {folder}: {METRICS}, README.md, {', '.join(pictures)}")
    if arguments.push_to_hub:
        print(f"Pushed: {push_folder(arguments)}")


class Clock:
    """Seconds each named part of a run took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time the block as `part`."""
        began = time.monotonic()
        yield
        self.seconds[part] = round(time.monotonic() - began, 2)


if __name__ == "__main__":
    sys.exit(main())
