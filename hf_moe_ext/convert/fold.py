"""``fold``: a µP model, or any with multipliers, to a stock Mixtral or OLMoE checkpoint with the same logits.

The multipliers go into weights (`fold_plan`), tensor by tensor; the result has a stock config.json and opens without this
package.
"""

import os
import time
from pathlib import Path

import torch
from torch import Tensor

from hf_moe_ext.convert.checkpoint import (
    DEFAULT_SHARD_BYTES,
    CheckpointReader,
    CheckpointWriter,
    check_target,
    copy_side_files,
    write_folder,
)
from hf_moe_ext.convert.expert_layout import stock_tensors
from hf_moe_ext.convert.fold_plan import EMBEDDING, HEAD, FoldPlan, is_power_of_two, plan_fold
from hf_moe_ext.convert.fold_report import FoldReport
from hf_moe_ext.convert.logit_check import draw_tokens, load_plain

_LAST_NORM = "model.norm.weight"  # small, and of the type of the rest


def fold(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    untie: bool = False,
    verify: bool = True,
    dry_run: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> FoldReport:
    """Fold the multipliers of a checkpoint into its weights and write a stock checkpoint.

    Logits are equal to the last bit if every factor is a power of two (width ratios mostly are), in float32, float64 and
    bfloat16, for weights at equally aligned addresses (libraries of matrix products may add up in another order elsewhere),
    and else up to rounding: 16-bit weights are multiplied in float32, wider ones in float64, and rounded once. In float16
    weights are exact too, but not logits: small activations that the source divides fall below what the type resolves, and
    the result does not divide them. A tensor whose factor is 1 keeps its bytes. The router's logits stay the same too, so
    the load-balance loss and the z-loss do.

    One tensor and one shard are in memory at a time; ``verify`` loads whole models, the source and then the result.

    Args:
        source: folder or Hub id; model_type mixtral_ext or olmoe_ext, every block standard, safetensors, not quantised.
        output: folder to write: config.json, safetensors, tokenizer files; nothing in it names this package.
        untie: give a model whose head is its embedding a head of its own, as two different factors need.
        verify: compare the logits of source and result on a few random tokens before the folder gets its name.
        dry_run: check and report the factors; write nothing.
        overwrite: replace an existing output folder.
        max_shard_bytes: largest safetensors file.

    Returns:
        What was done, and what equality it promises.

    Raises:
        ValueError: what a stock model cannot express (DCCA, a shared tensor with two factors, ``clip_qkv``), an adapter, an
            incomplete checkpoint; nothing was written.
        FileExistsError: the output exists.
        FileNotFoundError: the source has no safetensors weights.
        RuntimeError: bit-equal logits were promised and are not; nothing was written.
    """
    began = time.monotonic()
    target = Path(output)
    check_target(target, overwrite, keep=Path(source))
    plan = plan_fold(source, untie)
    reader = CheckpointReader(plan.source)
    plan.check_names(reader)
    rounded = plan.list_rounded(reader.read(_LAST_NORM).dtype)
    report = FoldReport(
        source=str(source),
        output=str(output),
        model_type=plan.config.model_type,
        factors=plan.factors,
        bit_equal=not rounded,
        rounded=rounded,
    )
    if dry_run:
        return report
    with write_folder(target, overwrite) as staging:
        with CheckpointWriter(staging, max_shard_bytes) as writer:
            _write_tensors(plan, reader, writer, report)
        report.num_parameters = writer.num_parameters
        plan.config.save_pretrained(staging)
        copy_side_files(plan.source, staging)
        if verify:
            _compare(plan, staging, report)
    report.written = True
    report.seconds = round(time.monotonic() - began, 1)
    return report


def scale(tensor: Tensor, factor: float) -> tuple[Tensor, bool]:
    """A tensor times a number, rounded once to its own type, and whether the product is exact.

    16-bit types are multiplied in float32, wider ones in float64.

    Raises:
        ValueError: a product is too large for the type.
    """
    if factor == 1:
        return tensor, True
    wide = tensor.to(torch.float32 if tensor.element_size() < 4 else torch.float64)
    scaled = (wide * factor).to(tensor.dtype)
    if not torch.isfinite(scaled).all() and torch.isfinite(tensor).all():
        raise ValueError(
            f"a weight of {float(wide.abs().max()):.3g} times {factor:.6g} is too large for {tensor.dtype}"
        )
    # A small product may lie where the type has fewer digits: then the way back leads elsewhere.
    return scaled, is_power_of_two(factor) and torch.equal(scaled.to(wide.dtype) / factor, wide)


def _write_tensors(plan: FoldPlan, reader: CheckpointReader, writer: CheckpointWriter, report: FoldReport) -> None:
    def write(name: str, tensor: Tensor, kind: str | None) -> None:
        factor = plan.factors.get(kind or "", 1.0)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ValueError(
                f"checkpoint {reader.folder}: {name} is stored as {tensor.dtype}, so it is quantised; fold the checkpoint "
                "in full precision it was made from, and quantise the result"
            )
        scaled, exact = scale(tensor, factor)
        if kind is not None and not exact and kind not in report.rounded:
            report.rounded.append(kind)
            report.bit_equal = False
        for stock_name, part in stock_tensors(name, scaled, plan.config.model_type):
            writer.write(stock_name, part)
            report.num_tensors += 1
            if kind is not None and factor != 1:
                report.num_scaled[kind] = report.num_scaled.get(kind, 0) + 1

    for name in reader.names:
        kind = plan.read_kind(name)
        if kind == HEAD and plan.untie:
            continue  # the embedding again: of a tied model the embedding is what is read
        tensor = reader.read(name)
        write(name, tensor, kind)
        if kind == EMBEDDING and plan.untie:
            write("lm_head.weight", tensor, HEAD)


@torch.no_grad()
def _compare(plan: FoldPlan, folder: Path, report: FoldReport) -> None:
    """Note the difference between the logits of source and result; raise if there is one where none was promised."""
    ids = draw_tokens(plan.config)
    wanted, found = (load_plain(each)(input_ids=ids).logits for each in (plan.source, folder))
    report.max_logit_difference, report.max_logit = float((found - wanted).abs().max()), float(wanted.abs().max())
    if report.bit_equal and not torch.equal(found, wanted):
        raise RuntimeError(
            f"fold: every factor is a power of two, but logits differ by up to {report.max_logit_difference:.3g}; nothing "
            "was written. That is a mistake in this package: report it, with the source's config.json"
        )
