"""Dense -> mixture of experts -> trained: a shared base with light deltas (DeRS), beside full copies and the dense model.

    accelerate launch recipes/upcycle.py [--parent MODEL] [--arms low_rank sparse vanilla dense] [--flag value ...]

Without arguments it runs `configs/upcycle.yaml`: offline, two cores, some fifteen minutes. Every arm begins with the
parent's own logits and reads the same rows in the same order; what is compared is the loss on held-out text after equal
tokens, and what each arm's model weighs. A finished arm is kept: a run that was stopped goes on with
`--resume_from_checkpoint true`.
"""

import copy
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from accelerate import PartialState
from distribution import build_distributed_config
from entry import refuse_common_mistakes, run_recipe
from finetune_arguments import UserError
from held_out import MeasureFirst, read_measurement
from hf_moe_ext.convert import upcycle
from output_folder import claim_output_folder, find_checkpoint, push_folder
from pretrain import BEFORE, METRICS, HeldOutText, bits_per_byte, build_trainer
from pretrain_data import Packed, pack, read_texts
from pretrain_model import save_model
from quickstart.corpus import read_corpus
from quickstart.pretrain import build_base, find_base
from reporting import Clock, compare_losses, find_versions, write_results
from upcycle_arguments import (
    DENSE,
    LOW_RANK,
    QUICKSTART_PARENT,
    SPARSE,
    VANILLA,
    UpcycleArguments,
    parse_upcycle_arguments,
)
from upcycle_report import ARM_NAMES, draw_arms

PICTURE = "losses.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit code is 2 for a mistake of the user's, of which nothing is written."""
    return run_recipe(__file__, parse_upcycle_arguments, train_arms, argv)


def train_arms(arguments: UpcycleArguments, command: str) -> dict[str, Any]:
    """The whole run: parent, text, every arm, files.

    Args:
        arguments: Checked arguments.
        command: The command line, for the card.

    Returns:
        What `metrics.json` holds.
    """
    clock, training = Clock(), arguments.training
    refuse_common_mistakes(arguments)
    resumed = [arm for arm in arguments.model.arms if (arguments.output_dir / arm / METRICS).is_file()]
    if training.resume_from_checkpoint is None:
        resumed = []
    with clock("parent"), training.main_process_first(desc="parent"):
        parent = prepare_parent(arguments)
    for arm in arguments.model.arms:  # refused before anything is trained
        convert(arm, parent, arguments, None)
    with clock("data"), training.main_process_first(desc="read data"):
        tokenizer = AutoTokenizer.from_pretrained(parent)
        arguments.data.tokenizer_name_or_path = str(parent)
        packed = pack(read_texts(arguments), tokenizer, arguments)  # type: ignore[arg-type]
    if training.process_index == 0:
        claim_output_folder(arguments)
    PartialState().wait_for_everyone()
    arms = {}
    for arm in arguments.model.arms:
        if arm in resumed:
            arms[arm] = json.loads((arguments.output_dir / arm / METRICS).read_text(encoding="utf-8"))
        else:
            with clock(arm):
                arms[arm] = train_arm(arm, parent, tokenizer, packed, arguments)
    metrics = {
        "command": command,
        "settings": arguments.describe(),
        "parent": str(arguments.model.parent),
        "arms": arms,
    }
    # What a comparison of runs reads.
    metrics["loss"] = next(iter(arms.values()))["loss"]
    if training.process_index == 0:
        draw_arms(arms, arguments.output_dir / PICTURE)
        metrics |= {"pictures": [PICTURE], "seconds": clock.seconds, "versions": find_versions()}
        results = write_results(metrics, arguments.output_dir, METRICS)
        print(
            f"\n{results}\n\nEverything is in {arguments.output_dir}: a model per arm, {METRICS}, README.md, {PICTURE}"
        )
        if arguments.push_to_hub:
            print(f"Pushed: {push_folder(for_arm(arguments, arguments.model.arms[0]))}")
    PartialState().wait_for_everyone()
    return metrics


def prepare_parent(arguments: UpcycleArguments) -> Path:
    """The parent's folder; the quickstart's is pre-trained when it is not there.

    Raises:
        UserError: It cannot be had.
    """
    if arguments.model.parent != QUICKSTART_PARENT:
        return Path(arguments.model.parent)
    try:
        corpus = read_corpus(arguments.data.source_dir)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
    settings = arguments.parent.settings(arguments.data.source_dir)
    folder = find_base(settings, Path(arguments.data.cache_dir or arguments.output_dir.parent), corpus)
    if not folder.is_dir():
        build_base(settings, folder)
    return folder


def convert(arm: str, parent: Path, arguments: UpcycleArguments, output: Path | None) -> dict[str, Any] | None:
    """Upcycle the parent to an arm's model.

    Args:
        arm: Its name.
        parent: The dense model.
        arguments: The run's.
        output: Where it goes; None to check only.

    Returns:
        The conversion's report; None for the dense arm, which is the parent.

    Raises:
        UserError: The parent, or what it should become, is refused.
    """
    if arm == DENSE:
        return None
    model = arguments.model
    forms: dict[str, dict[str, Any]] = {
        LOW_RANK: {"delta": "low_rank", "rank": model.rank, "universal": model.universal},
        SPARSE: {"delta": "sparse", "drop_rate": model.drop_rate, "universal": model.universal},
        VANILLA: {"form": "vanilla"},
    }
    try:
        report = upcycle(
            parent,
            output or arguments.output_dir / "unused",
            num_experts=model.num_experts,
            top_k=model.top_k,
            layers=model.layers,
            router_aux_loss_coef=model.router_aux_loss_coef,
            seed=arguments.training.seed,
            dry_run=output is None,
            **forms[arm],
        )
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"--arms {arm}: {' '.join(str(error).split())}") from error
    return report.as_dict()


def train_arm(
    arm: str, parent: Path, tokenizer: PreTrainedTokenizerBase, packed: Packed, arguments: UpcycleArguments
) -> dict[str, Any]:
    """One arm: convert, measure, train, measure, and once more without what sets its experts apart."""
    own = for_arm(arguments, arm)
    checkpoint = find_checkpoint(own)
    known = None if checkpoint is None else read_measurement(checkpoint, BEFORE)
    model, report = load_start(arm, parent, own)
    set_seed(own.training.seed)  # rows in the same order in every arm
    optimizer = group_deltas(model, own.training, own.model.delta_learning_rate_ratio)
    trainer = build_trainer(own, model, tokenizer, packed, optimizer)  # type: ignore[arg-type]  # it reads no others
    held_out = HeldOutText(packed.held_out)
    first = MeasureFirst(trainer, held_out, own.output_dir / BEFORE, known)  # type: ignore[arg-type]  # the same method
    trainer.add_callback(first)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    save_model(trainer, own.output_dir, True)
    after = held_out.measure(trainer, "after")
    metrics = {
        "arm": arm,
        "name": ARM_NAMES[arm],
        "conversion": report,
        "parameters": model.num_parameters(),
        "model_bytes": sum(path.stat().st_size for path in own.output_dir.glob("model*.safetensors")),
        "loss": compare_losses(first.measurement.losses, after.losses, seed=own.training.seed),
        "bits_per_byte": bits_per_byte(after.losses, packed.bytes_per_token),
        "steps": trainer.state.global_step,
        "tokens_per_step": own.training.train_batch_size
        * own.training.gradient_accumulation_steps
        * own.training.world_size
        * own.data.max_length,
        "train_seconds": result.metrics["train_runtime"],
        "log": trainer.state.log_history,
    }
    if level_experts(trainer.accelerator.unwrap_model(trainer.model)):
        levelled = held_out.measure(trainer, "with its experts levelled")
        metrics["loss_levelled"] = float(levelled.losses.mean)
    if own.training.process_index == 0:
        write_results(metrics, own.output_dir, METRICS)
    PartialState().wait_for_everyone()
    return metrics


def for_arm(arguments: UpcycleArguments, arm: str) -> UpcycleArguments:
    """The same run in the arm's own folder."""
    training = copy.copy(arguments.training)
    training.output_dir = str(arguments.output_dir / arm)
    Path(training.output_dir).mkdir(parents=True, exist_ok=True)
    return dataclasses.replace(arguments, training=training)


def load_start(arm: str, parent: Path, arguments: UpcycleArguments) -> tuple[PreTrainedModel, dict[str, Any] | None]:
    """The model an arm starts from, and the report of its conversion."""
    layout = build_distributed_config(arguments.model, arguments.training.world_size)
    options: dict[str, Any] = {} if layout is None else {"distributed_config": layout}
    if arm == SPARSE:
        options["ders_hold_positions"] = True  # four bytes a value, and steps twice as fast
    folder, report = parent, None
    if arm != DENSE:
        folder = arguments.output_dir / ".building-start"
        with arguments.training.main_process_first(desc="upcycle"):
            if arguments.training.process_index == 0:
                shutil.rmtree(folder, ignore_errors=True)
                report = convert(arm, parent, arguments, folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, arguments.model.dtype), use_cache=False, **options
        )
    except (ValueError, OSError) as error:
        raise UserError(f"--arms {arm}: {' '.join(str(error).split())[:400]}") from error
    if arm != DENSE:
        PartialState().wait_for_everyone()
        if arguments.training.process_index == 0:
            shutil.rmtree(folder, ignore_errors=True)
    return model, report


def group_deltas(
    model: PreTrainedModel, training: TrainingArguments, ratio: float
) -> tuple[Any, dict[str, Any]] | None:
    """The Trainer's optimizer with a learning rate of their own for the deltas, which decay as fast as all else.

    Returns:
        Class and arguments; None where there is nothing to set apart.
    """
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((".experts.delta_" in name, parameter.ndim > 1), []).append(parameter)
    if ratio == 1 or not any(of_deltas for of_deltas, _ in groups):
        return None
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(training)
    factors = {key: ratio if key[0] else 1.0 for key in groups}
    return kind, settings | {
        "params": [
            {
                "params": parameters,
                "lr": training.learning_rate * factors[key],
                "weight_decay": training.weight_decay / factors[key] if key[1] else 0.0,
            }
            for key, parameters in groups.items()
        ]
    }


@torch.no_grad()
def level_experts(model: PreTrainedModel) -> bool:
    """Make a layer's experts alike: deltas to zero, full copies to their mean; False for a model without experts."""
    found = False
    module: Any
    for module in model.modules():
        if hasattr(module, "reset_deltas"):
            module.reset_deltas()
            found = True
        elif getattr(getattr(module, "gate_up_proj", None), "ndim", 0) == 3:
            for weight in (module.gate_up_proj, module.down_proj):
                weight.copy_(weight.mean(dim=0, keepdim=True).expand_as(weight))
            found = True
    return found


if __name__ == "__main__":
    sys.exit(main())
