"""The file that ``hf-moe transfer`` writes, and what it says about it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_moe_ext.mup.output_file import check_output_file, write_whole
from hf_moe_ext.mup.small_run import TransferError, read_arguments, read_small_run, read_target
from hf_moe_ext.mup.transfer import NEVER_COVERED, Transfer, format_yaml, transfer


def write_transfer_file(
    source: str,
    target: str,
    output: Path,
    *,
    arguments_file: Path | None = None,
    given: Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
    mode: str | None = None,
    num_trials: int | None = None,
    overwrite: bool = False,
) -> Transfer:
    """Read both sides, and write the training arguments of the target.

    Args:
        source: of the small run.
        target: ``config.json`` of the large model, or its folder.
        output: YAML to write.
        arguments_file: the small run's training arguments, over what its folder tells.
        given: the same, one by one, over both; None is not given.
        changes: in which the large run is to differ; None is not given.
        mode: arm of a sweep.
        num_trials: runs that tuning took.
        overwrite: replace an existing file.

    Raises:
        TransferError: see ``mup.transfer.transfer``; a number out of range; the file is there already, or is a folder.
    """
    given, changes = ({k: v for k, v in (part or {}).items() if v is not None} for part in (given, changes))
    for name, value in {**given, **changes, **({} if num_trials is None else {"trials": num_trials})}.items():
        if not value > 0 and not (name == "weight_decay" and value == 0):
            raise TransferError(f"--{name.replace('_', '-')} must be above 0, got {value}")
    try:
        check_output_file("--output", output)
    except ValueError as error:
        raise TransferError(str(error)) from error
    if output.exists() and not overwrite:
        raise TransferError(f"--output {output} is there already; name another file, or add --overwrite")
    small = read_small_run(source, mode)
    known = small.arguments | ({} if arguments_file is None else read_arguments(arguments_file)) | given
    small = dataclasses.replace(small, arguments=known, num_trials=num_trials or small.num_trials)
    path = Path(target)
    file = path / "config.json" if path.is_dir() else path
    result = transfer(small, read_target(file), str(file), changes)
    text = format_yaml(result, small.source)
    write_whole(output, lambda partial: partial.write_text(text, encoding="utf-8"))
    return result


def format_report(result: Transfer, output: Path) -> str:
    """Text for the terminal."""
    small, target = result.parameters["small"], result.parameters["target"]
    lines = [
        f"Wrote {output}: learning_rate {result.arguments['learning_rate']:g} (at the base; each tensor's own follows from "
        "the configuration). Train with",
        f"  accelerate launch recipes/pretrain.py --config {output}",
        "",
        f"Active parameters without embedding and head: {small.active:,} -> {target.active:,} "
        f"({target.active / small.active:.1f} times); all: {small.total:,} -> {target.total:,}.",
    ]
    flops = result.tuning_flops
    if flops is None:
        lines.append("Tuning FLOPs are not known: max_steps, per_device_train_batch_size and max_length are needed.")
    else:
        lines.append(
            f"Tuning, {result.num_trials} run(s), 6 x active non-embedding parameters x tokens: {flops['small']:.3g} FLOPs at "
            f"the small size, {flops['target']:.3g} at the target's: {1 - flops['small'] / flops['target']:.1%} saved."
        )
    if result.missing:
        lines.append(f"Not known of the small run, so the Trainer's defaults hold: {', '.join(result.missing)}.")
    lines += ["", "Not covered by the theory, and different here:"]
    lines += [f"  - {sentence}" for sentence in result.uncovered] or ["  - nothing that the configurations tell"]
    return "\n".join([*lines, NEVER_COVERED])
