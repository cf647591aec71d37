"""Fine-tune a causal language model with routed adapters (PERFT), LoRA or in full, and say what that changed.

    accelerate launch recipes/finetune.py [--config recipes/configs/X.yaml] [--flag value ...]

Without arguments it runs `configs/quickstart_r.yaml`: no network, two cores, a few minutes.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, Trainer, set_seed
from transformers.utils import logging

from accelerate import PartialState
from built_in_data import build_built_in
from distribution import check_distributed_model
from entry import refuse_common_mistakes, run_recipe
from finetune_arguments import (
    BUILT_IN_DATASETS,
    QUICKSTART_MODEL,
    Arguments,
    UserError,
    find_idle_settings,
    parse_arguments,
)
from finetune_data import encode_rows, load_rows
from finetune_model import (
    attach,
    build_adapter_config,
    count_parameters,
    load_model,
    load_outline,
    load_tokenizer,
)
from held_out import HeldOut, MeasureFirst, Measurement, read_measurement
from hf_moe_ext import RouterLoadCallback, param_groups
from hf_moe_ext.row_losses import sum_answer_nats
from hf_moe_ext.text_rows import apply_chat_templates
from output_folder import (
    claim_output_folder,
    find_checkpoint,
    push_folder,
    wants_resume,
)
from quickstart.corpus import Corpus, read_corpus
from quickstart.pretrain import REPORT_FILE, BaseSettings, build_base, find_base
from recitation import measure_data
from reporting import (
    Clock,
    compare_losses,
    draw_load_map,
    draw_loss_curve,
    find_peak_memory,
    find_versions,
    write_results,
    write_rows,
)

logger = logging.get_logger("finetune")

LOSS_CURVE, LOAD_MAP, METRICS, ROWS = "loss_curve.png", "router_load.png", "metrics.json", "held_out.csv"
BEFORE = "before.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit code is 2 for a mistake of the user's, of which nothing is written."""
    return run_recipe(__file__, parse_arguments, finetune, argv)


def finetune(arguments: Arguments, command: str) -> dict[str, Any]:
    """The whole run: data, base, adapter, before, training, after, files.

    Args:
        arguments: Checked arguments.
        command: The command line, for the card.

    Returns:
        What `metrics.json` holds.
    """
    clock, training = Clock(), arguments.training
    refuse_mistakes(arguments)
    checkpoint = find_checkpoint(arguments)
    known = None if checkpoint is None else read_measurement(checkpoint, BEFORE)
    set_seed(training.seed)

    with clock("data"), training.main_process_first(desc="read data"):
        corpus = read_source(arguments)
        rows = load_rows(arguments, lambda: build_built_in(arguments.data, corpus if uses_source(arguments) else None))
    with clock("base"), training.main_process_first(desc="pre-train the base"):
        path, base = prepare_base(arguments, corpus)
    with clock("tokenize"), training.main_process_first(desc="tokenize"):
        tokenizer = load_tokenizer(arguments.model, path)
        rows = {side: apply_chat_templates(part, tokenizer) for side, part in rows.items()}
        held_out = HeldOut(rows["test"], rows["train"], tokenizer, arguments.data)
        train_rows = encode_rows(rows["train"], tokenizer, arguments.data.max_length, "tokenize train rows")
    if training.process_index == 0:
        claim_output_folder(arguments)
        keep_built_in_rows(arguments, rows)

    trained = None
    if arguments.adapter.peft == "none":
        with clock("before"):
            before = measure_base(arguments, path, tokenizer, held_out)
    else:
        before, trained = train(arguments, path, tokenizer, rows, train_rows, held_out, checkpoint, known, clock)
    metrics = {
        "command": command,
        "settings": arguments.describe(),
        "base": base,
        **compare(held_out, before, trained.after if trained else None, training.seed),
        **(trained.facts if trained else {}),
        "train_rows": len(train_rows),
        "processes": training.world_size,
        "peak_memory_bytes": find_peak_memory(),
        "versions": find_versions(),
    }
    if training.process_index == 0:
        table = held_out.tabulate(before, trained.after if trained else None)
        write_files(arguments, metrics, table, clock)
    PartialState().wait_for_everyone()
    return metrics


@dataclass(frozen=True)
class Trained:
    """What training gives: the measurement after it, and the facts for `metrics.json`."""

    after: Measurement
    facts: dict[str, Any]


def refuse_mistakes(arguments: Arguments) -> None:
    """Refuse what can be refused before anything takes time or is written; warn about settings without effect."""
    refuse_common_mistakes(arguments)
    for sentence in find_idle_settings(arguments):
        logger.warning(sentence)
    if wants_resume(arguments) and arguments.adapter.peft == "full":
        raise UserError(
            "--resume_from_checkpoint with --peft full: the Trainer reads such a checkpoint tensor by tensor, and the "
            "experts of Transformers 5 are saved under other names than they are held, so they would fall back to the "
            "base's. Start again, or train an adapter."
        )
    build_adapter_config(arguments.adapter)
    if arguments.model.model_name_or_path != QUICKSTART_MODEL:
        outline = load_outline(arguments.model)
        check_distributed_model(outline, arguments.model, arguments.training.world_size)
        attach(outline, arguments.adapter)


def measure_base(arguments: Arguments, path: str, tokenizer: PreTrainedTokenizerBase, held_out: HeldOut) -> Measurement:
    """Measure the model as it was loaded."""
    model = load_model(arguments.model, path, arguments.training.world_size)
    return held_out.measure(build_trainer(arguments, model, tokenizer, None, held_out.encoded), "before")


def train(
    arguments: Arguments,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    texts: dict[str, Dataset],
    rows: Dataset,
    held_out: HeldOut,
    checkpoint: str | None,
    known: Measurement | None,
    clock: Clock,
) -> tuple[Measurement, Trained]:
    """Attach, measure, train with the plain Trainer, save, and measure again."""
    set_seed(arguments.training.seed)
    base = load_model(arguments.model, path, arguments.training.world_size)
    model = attach(base, arguments.adapter, rows, build_collator(tokenizer), checkpoint)
    trainer = build_trainer(arguments, model, tokenizer, rows, held_out.encoded)
    first = MeasureFirst(trainer, held_out, arguments.output_dir / BEFORE, known)
    trainer.add_callback(first)
    with clock("train"):
        trainer.train(resume_from_checkpoint=checkpoint)
    clock.seconds["before"], clock.seconds["train"] = first.seconds, round(clock.seconds["train"] - first.seconds, 2)
    trainer.save_model(str(arguments.output_dir))
    trainer.save_state()
    with clock("after"):
        after = held_out.measure(trainer, "after")
    with clock("recitation"):
        encoded = {"train": rows, "test": held_out.encoded}
        data = measure_data(trainer, tokenizer, texts, encoded, arguments.data)
    facts = {
        "data": data,
        "parameters": count_parameters(model),
        "router_load": after.router_load,
        "steps": trainer.state.global_step,
        "log": trainer.state.log_history,
    }
    return first.measurement, Trained(after, facts)


def uses_source(arguments: Arguments) -> bool:
    """Whether the rows are made of source text."""
    return arguments.data.dataset_name == "docstrings"


def read_source(arguments: Arguments) -> Corpus | None:
    """The source text, when the base or the rows are made of it."""
    if arguments.model.model_name_or_path != QUICKSTART_MODEL and not uses_source(arguments):
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


def keep_built_in_rows(arguments: Arguments, rows: Mapping[str, Dataset]) -> None:
    """Rows that no file holds as `NAME_train.jsonl` and `NAME_test.jsonl` beside the output folder, for other commands."""
    name = arguments.data.dataset_name
    if name in BUILT_IN_DATASETS:
        for side, part in rows.items():
            part.to_json(arguments.output_dir.parent / f"{name}_{side}.jsonl")


def build_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Pads rows to the longest of a batch; padding carries no loss."""
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)


def build_trainer(
    arguments: Arguments,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Dataset | None,
    eval_rows: Dataset,
) -> Trainer:
    """A plain Trainer; a router learning rate of its own becomes an optimizer group."""
    training, adapter = arguments.training, arguments.adapter
    optimizer = None
    routed = adapter.peft == "perft" and (adapter.variant == "R" or adapter.base_router != "frozen")
    if routed and train_rows is not None and adapter.router_learning_rate is not None:
        groups = param_groups(model, training.learning_rate, adapter.router_learning_rate, training.weight_decay)
        options = {"betas": (training.adam_beta1, training.adam_beta2), "eps": training.adam_epsilon}
        optimizer = (torch.optim.AdamW, {"params": groups, **options})
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=eval_rows,  # for --eval_strategy; choosing a checkpoint by it would be choosing on the test
        data_collator=build_collator(tokenizer),
        processing_class=tokenizer,
        preprocess_logits_for_metrics=sum_answer_nats,
        optimizer_cls_and_kwargs=optimizer,
    )
    if routed and train_rows is not None:
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


def write_files(arguments: Arguments, metrics: dict[str, Any], rows: Mapping[str, Sequence[Any]], clock: Clock) -> None:
    """Pictures, table of rows, card and metrics; then the push."""
    folder, pictures = arguments.output_dir, []
    if "after" in metrics["loss"]:
        draw_loss_curve(metrics["log"], metrics["loss"]["before"], metrics["loss"]["after"], folder / LOSS_CURVE)
        pictures.append(LOSS_CURVE)
    if metrics.get("router_load"):
        draw_load_map(metrics["router_load"], folder / LOAD_MAP)
        pictures.append(LOAD_MAP)
    metrics |= {"pictures": pictures, "seconds": clock.seconds}
    write_rows(rows, folder / ROWS)
    results = write_results(metrics, folder, METRICS)
    print(f"\n{results}\n\nEverything is in {folder}: {', '.join([METRICS, ROWS, 'README.md', *pictures])}")
    if arguments.push_to_hub:
        print(f"Pushed: {push_folder(arguments)}")


if __name__ == "__main__":
    sys.exit(main())
