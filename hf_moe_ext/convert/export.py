"""``export``: experts that share a base, to ordinary ones: for engines that know only stock models.

Each expert's matrices are base plus delta, decoded and added in at least float32 and rounded once, to the base's type.
"""

import os
import time
from functools import reduce
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
from hf_moe_ext.convert.expert_layout import DOWN, GATE_UP, LAYER_PREFIX, stock_expert_name, stock_tensors
from hf_moe_ext.convert.export_check import Stored, compare, split_weights
from hf_moe_ext.convert.export_plan import ExportPlan, plan_export
from hf_moe_ext.convert.export_report import ExportReport
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
    Logits are those of the source up to the rounding of base plus delta: in 16-bit types a delta that is small beside its
    base loses digits, and the report says what that does.

    One layer and one shard are in memory at a time; ``verify`` loads whole models in at least float32, the source with all
    experts and then the result.

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
        ValueError: no such experts, parts that ordinary blocks have not, an adapter, a checkpoint that is not its model's,
            numbers that are not finite or become so; nothing was written.
        FileExistsError: the output exists.
        FileNotFoundError: the source has no safetensors weights.
        RuntimeError: logits differ from those of base plus delta, rounded as they are stored; nothing was written.
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
        can_fold=plan.can_fold,
    )
    if dry_run:
        return report
    with write_folder(target, overwrite) as staging:
        with CheckpointWriter(staging, max_shard_bytes) as writer:
            stored = _write_tensors(plan, reader, writer)
        report.num_parameters, report.num_bytes = writer.num_parameters, writer.num_bytes
        plan.target.save_pretrained(staging)
        copy_side_files(plan.source, staging)
        if verify:
            compare(plan, staging, stored, report)
    report.written = True
    report.seconds = round(time.monotonic() - began, 1)
    return report


def _write_tensors(plan: ExportPlan, reader: CheckpointReader, writer: CheckpointWriter) -> Stored:
    """Everything in the order of the source; returns how experts are stored."""
    stored: Stored = {}
    for name in reader.names:
        layer = plan.layer_of(name)
        if layer is None:
            tensor = reader.read(name)
            for new_name, part in stock_tensors(name, tensor, plan.family) if plan.is_stock else ((name, tensor),):
                writer.write(new_name, part)
        elif layer not in stored:
            experts, stored[layer] = _read_experts(plan, reader, layer)
            _write_experts(plan, experts, layer, stored[layer], writer)
    return stored


def _read_experts(plan: ExportPlan, reader: CheckpointReader, layer: int) -> tuple[DersExperts, dict[str, torch.dtype]]:
    """Experts in at least float32, and the types their bases are stored in, by matrix."""
    prefix = f"{LAYER_PREFIX}{layer}.mlp.experts."
    state = {name.removeprefix(prefix): reader.read(name) for name in reader.names if name.startswith(prefix)}
    with torch.device("meta"):
        experts = make_ders_experts(plan.config, layer)
    first, down = state[experts.first_name].dtype, state["down_proj"].dtype
    wide = reduce(torch.promote_types, (t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
    state = {name: tensor.to(wide) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    experts.load_state_dict(state, assign=True)
    return experts, {matrix: down if matrix == "down" else first for matrix in experts.matrices}


@torch.no_grad()
def _write_experts(
    plan: ExportPlan, experts: DersExperts, layer: int, stored: dict[str, torch.dtype], writer: CheckpointWriter
) -> None:
    bases, stacks = split_weights(experts)

    def merge(matrix: str, expert: int) -> Tensor:
        base, delta = bases[matrix], stacks[matrix].matrix(expert)
        merged = merge_out(base, delta, stored[matrix])
        if not merged.isfinite().all():
            whole = bool((base + delta).isfinite().all())
            raise ValueError(
                f"layer {layer}, {matrix} of expert {expert}: "
                + (
                    f"base plus delta is too large for {stored[matrix]}; store the source in a wider type"
                    if whole
                    else "the source holds NaN or infinite numbers; take an earlier checkpoint"
                )
            )
        return merged

    if plan.is_stock:
        for matrix in experts.matrices:
            for expert in range(experts.num_experts):
                name = stock_expert_name(layer, expert, f"{matrix}_proj", plan.family)
                writer.write(name, merge(matrix, expert))
        return
    for name, matrices in ((GATE_UP, ("gate", "up")), (DOWN, ("down",))):
        rows = sum(bases[matrix].shape[0] for matrix in matrices)
        stacked = torch.empty(experts.num_experts, rows, bases[matrices[0]].shape[1], dtype=stored[matrices[0]])
        for expert, place in enumerate(
            stacked
        ):  # straight into its place: a list and its stack would be the layer twice
            torch.cat([merge(matrix, expert) for matrix in matrices], out=place)
        writer.write(f"{LAYER_PREFIX}{layer}.{name}", stacked)
