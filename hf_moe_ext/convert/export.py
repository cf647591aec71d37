"""``export``: experts that share a base, to ordinary ones: for engines that know only stock models.

Each expert's matrices are base plus decoded delta, added in at least float32 and rounded once to the base's type.
"""

import os
import time
from pathlib import Path
from typing import Any

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
from hf_moe_ext.convert.expert_layout import DOWN, GATE_UP, LAYER_PREFIX, stock_expert_name, stock_tensors
from hf_moe_ext.convert.export_plan import ExportPlan, plan_export
from hf_moe_ext.convert.export_report import ExportReport
from hf_moe_ext.convert.logit_check import bound, draw_tokens, load_plain
from hf_moe_ext.ders.experts import DersExperts
from hf_moe_ext.models.blocks import make_ders_experts
from hf_moe_ext.ops.delta_measures import merge_out


def export(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    verify: bool = True,
    dry_run: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> ExportReport:
    """Write a model with ``moe_block="ders"`` as one with ordinary experts.

    The result is a stock Mixtral, OLMoE or Qwen3-MoE checkpoint that opens without this package, unless the source has
    more that a stock one has not (multipliers, dense layers): then it keeps its ``*_ext`` type, and the report says why.
    Logits are those of the source up to rounding: in 16-bit types a delta that is small beside its base loses digits.

    One layer and one shard are in memory at a time; ``verify`` loads whole models, the source and then the result.

    Args:
        source: folder or Hub id; model_type mixtral_ext, olmoe_ext or qwen3_moe_ext, safetensors, not quantised.
        output: folder to write: config.json, safetensors, tokenizer files.
        verify: compare the logits of source and result on a few random tokens before the folder gets its name.
        dry_run: check and report; write nothing.
        overwrite: replace an existing output folder.
        max_shard_bytes: largest safetensors file.

    Returns:
        What was done.

    Raises:
        ValueError: no such experts, parts that ordinary blocks have not, an adapter, an incomplete checkpoint; nothing was
            written.
        FileExistsError: the output exists.
        FileNotFoundError: the source has no safetensors weights.
        RuntimeError: logits of weights of at least 32 bits differ by more than rounding; nothing was written.
    """
    began = time.monotonic()
    target = Path(output)
    check_target(target, overwrite, keep=Path(source))
    plan = plan_export(source)
    reader = CheckpointReader(plan.source)
    plan.check_tensors(reader)
    report = ExportReport(
        source=str(source),
        output=str(output),
        model_type=plan.target.model_type,
        layers=list(plan.layers),
        kept=list(plan.kept),
    )
    if dry_run:
        return report
    with write_folder(target, overwrite) as staging:
        with CheckpointWriter(staging, max_shard_bytes) as writer:
            dtype = _write_tensors(plan, reader, writer)
        report.num_parameters, report.num_bytes = writer.num_parameters, writer.num_bytes
        plan.target.save_pretrained(staging)
        copy_side_files(plan.source, staging)
        if verify:
            _compare(plan, staging, dtype, report)
    report.written = True
    report.seconds = round(time.monotonic() - began, 1)
    return report


def _write_tensors(plan: ExportPlan, reader: CheckpointReader, writer: CheckpointWriter) -> torch.dtype:
    """Everything in the order of the source; returns the type of the experts."""
    done: set[int] = set()
    dtype = torch.float32
    for name in reader.names:
        layer = plan.layer_of(name)
        if layer is None:
            tensor = reader.read(name)
            for new_name, part in stock_tensors(name, tensor, plan.family) if plan.is_stock else ((name, tensor),):
                writer.write(new_name, part)
        elif layer not in done:
            done.add(layer)
            experts = _read_experts(plan, reader, layer)
            dtype = experts.down_proj.dtype
            _write_experts(plan, experts, layer, writer)
    return dtype


def _read_experts(plan: ExportPlan, reader: CheckpointReader, layer: int) -> DersExperts:
    prefix = f"{LAYER_PREFIX}{layer}.mlp.experts."
    state = {name.removeprefix(prefix): reader.read(name) for name in reader.names if name.startswith(prefix)}
    with torch.device("meta"):
        experts = make_ders_experts(plan.config, layer)
    experts.load_state_dict(state, assign=True)
    return experts


@torch.no_grad()
def _write_experts(plan: ExportPlan, experts: DersExperts, layer: int, writer: CheckpointWriter) -> None:
    weights = experts.experts()
    bases = dict(zip(experts.matrices, (*weights.first.chunk(2), weights.down), strict=True))
    stacks = dict(zip(experts.matrices, weights.deltas, strict=True))

    def merge(matrix: str, expert: int) -> Tensor:
        return merge_out(bases[matrix], stacks[matrix].matrix(expert), bases[matrix].dtype)

    if plan.is_stock:
        for matrix in experts.matrices:
            for expert in range(experts.num_experts):
                name = stock_expert_name(layer, expert, f"{matrix}_proj", plan.family)
                writer.write(name, merge(matrix, expert))
        return
    for name, matrices in ((GATE_UP, ("gate", "up")), (DOWN, ("down",))):
        rows = sum(bases[matrix].shape[0] for matrix in matrices)
        stacked = bases[matrices[0]].new_empty(experts.num_experts, rows, bases[matrices[0]].shape[1])
        for expert, place in enumerate(
            stacked
        ):  # straight into its place: a list and its stack would be the layer twice
            torch.cat([merge(matrix, expert) for matrix in matrices], out=place)
        writer.write(f"{LAYER_PREFIX}{layer}.{name}", stacked)


@torch.no_grad()
def _compare(plan: ExportPlan, folder: Path, dtype: torch.dtype, report: ExportReport) -> None:
    """Note the difference between the logits of source and result; raise if it is more than float32's rounding."""
    work = torch.promote_types(dtype, torch.float32)
    ids = draw_tokens(plan.config)
    # With matrices of base plus delta, as the result has them: fused, the same sums are rounded elsewhere.
    wanted: Any = load_plain(plan.source, work, ders_forward="materialised")(input_ids=ids).logits
    found: Any = load_plain(folder, work)(input_ids=ids).logits
    report.max_logit_difference, report.max_logit = float((found - wanted).abs().max()), float(wanted.abs().max())
    allowed = bound(plan.config.num_hidden_layers, plan.config.hidden_size, report.max_logit)
    if dtype.itemsize >= 4 and not report.max_logit_difference <= allowed:
        raise RuntimeError(
            f"export: logits differ by up to {report.max_logit_difference:.3g}, where at most {allowed:.3g} is rounding; "
            "nothing was written. That is a mistake in this package: report it, with the source's config.json"
        )
