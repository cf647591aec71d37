"""``compress``: a trained Mixture of Experts to one shared base and a light delta per expert (arXiv 2503.01359, 3.2).

The order of work: the refusals (`compress_plan`), one reading that measures (`compress_measure`), the choice of rates
(`compress_rates`), one reading that encodes and writes (`compress_writing`), and if asked for the perplexities
(`compress_calibration`), all in a folder that gets its name at the end.
"""

import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from transformers.utils import logging

from hf_moe_ext.convert.checkpoint import (
    DEFAULT_SHARD_BYTES,
    CheckpointWriter,
    check_target,
    copy_side_files,
    write_folder,
)
from hf_moe_ext.convert.compress_calibration import (
    check_calibration,
    measure_calibration,
    read_slices,
    tokenize_slices,
)
from hf_moe_ext.convert.compress_plan import CompressPlan, plan_compression, stock_config, target_config
from hf_moe_ext.convert.compress_rates import Chosen, choose_rates, find_waste, predict_file_bytes
from hf_moe_ext.convert.compress_report import CompressReport, MatrixReport
from hf_moe_ext.convert.compress_writing import CompressedWriter, LayerBases, measure_all
from hf_moe_ext.convert.conversion_report import peak_memory_bytes
from hf_moe_ext.convert.delta_encoding import Encoding
from hf_moe_ext.convert.expert_matrices import MATRICES
from hf_moe_ext.ops.delta_positions import MaskStream

logger = logging.get_logger(__name__)

# Two unrelated experts have a cosine of 1 / sqrt(2) = 0.71 to their mean, eight 0.35, and experts trained from scratch 0.38 to
# 0.47 (Mixtral's first layer); upcycled ones in the paper exceed 0.999. At 0.9 a fifth of an expert's energy lies in its
# delta (1 - 0.9^2), more than any rate worth having can carry, and what is below shares no base.
MIN_COSINE = 0.9


def compress(
    moe: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    parent: str | os.PathLike[str] | None = None,
    base: Literal["parent", "mean", "least_squares"] = "parent",
    encode: Literal["random_drop", "magnitude_drop", "svd", "quantize"] = "random_drop",
    drop_rate: float | None = None,
    rank: int | None = None,
    bits: int | None = None,
    group_size: int = 128,
    seed: int = 0,
    target_bytes: int | None = None,
    max_error: float | None = None,
    min_cosine: float = MIN_COSINE,
    force: bool = False,
    export: Literal["stock"] | None = None,
    calibration: str | os.PathLike[str] | None = None,
    max_loss: float | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int | None = None,
) -> CompressReport:
    """Compress a MoE checkpoint and write the result to a folder.

    One matrix of all experts of one layer is in memory at a time, encoded, and one expert's as numbers: below 3 times the
    largest stack of experts, whatever the model's size (``calibration`` loads whole models). All that is no expert's matrix
    keeps its bytes. Deltas are formed in float32 against the base as it is stored.

    Args:
        moe: folder or Hub id; model_type mixtral, olmoe, qwen3_moe or their ``*_ext`` with standard blocks; safetensors.
        output: folder to write: config.json of the ``*_ext`` family with moe_block "ders", safetensors, tokenizer files,
            compress.json.
        parent: the dense model whose FFN the experts were copied from.
        base: "parent": its FFN, as the paper does. Without a parent "mean" of the experts, or "least_squares": what leaves the
            least error after encoding (svd, magnitude_drop, quantize; for random_drop it is the mean).
        encode: "random_drop" (the paper's: rescaled, positions from a seed), "magnitude_drop" (positions stored), "svd",
            "quantize".
        drop_rate: share of a delta's entries dropped. Default: 0.6.
        rank: of svd. Default: an eighth of the smaller dimension.
        bits: of quantize, 16, 8, 4, 2 or 1 (default 4); with a drop, those of its values (default: as they are).
        group_size: entries that share a scale.
        seed: of random positions.
        target_bytes: largest size of the safetensors files; rates are chosen per matrix for the least error.
        max_error: largest relative output error of any matrix; the cheapest rates within it are chosen.
        min_cosine: refuse experts less close to the base than this.
        force: go on all the same.
        export: "stock" writes ordinary experts, base plus decoded delta, for engines that know only stock models.
        calibration: text to measure perplexities on before and after: JSONL with "text" and perhaps "slice", a text file, or
            a folder of texts.
        max_loss: refuse a rise of the loss above this, nats per token; needs calibration.
        dry_run: measure, choose and report; write nothing.
        overwrite: replace an existing output folder.
        max_shard_bytes: largest safetensors file. Default: half the largest stack, at most 5 GB.

    Returns:
        The report, which is also in the output folder.

    Raises:
        ValueError, TypeError: a request that cannot be carried out, experts too far from the base, a target that cannot be
            met, a rise of the loss above max_loss; nothing was written.
        FileExistsError: the output exists.
        FileNotFoundError: no safetensors weights, or a missing shard.
    """
    began = time.monotonic()
    target = Path(output)
    for kept in (moe, parent, calibration):
        check_target(target, overwrite, keep=None if kept is None else Path(kept))
    encoding = Encoding(encode, drop_rate, rank, bits, group_size)
    _check_request(encoding, target_bytes, max_error, min_cosine, export, base)
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes!r}")
    MaskStream(seed)  # raises for what is no seed
    check_calibration(calibration, max_loss)
    plan = plan_compression(moe, parent, base)
    if export == "stock":
        stock_config(plan)
    # Now, not at the end: a missing tokenizer would cost the whole conversion.
    rows = None if calibration is None else tokenize_slices(plan.source, read_slices(calibration))
    settings = {
        **{"parent": None if parent is None else str(parent), "base": base, **asdict(encoding), "seed": seed},
        **{"encode": encode, "target_bytes": target_bytes, "max_error": max_error, "min_cosine": min_cosine},
        **{"force": force, "export": export, "max_loss": max_loss},
    }
    del settings["method"]
    report = CompressReport(str(moe), str(output), settings, file_bytes_before=plan.reader.file_bytes)
    report.largest_stack_bytes = max(
        plan.experts.stack_bytes(), *(place.num_bytes for place in plan.reader.places.values())
    )
    shard_bytes = (
        min(DEFAULT_SHARD_BYTES, report.largest_stack_bytes // 2 + 1) if max_shard_bytes is None else max_shard_bytes
    )
    encodings = {matrix: encoding.fill_in(shape) for matrix, shape in plan.experts.shapes.items()}
    bases = LayerBases(plan, base)
    budgeted = target_bytes is not None or max_error is not None
    measured = measure_all(plan, bases, encodings, budgeted, dry_run)
    chosen = choose_rates(plan, measured, encodings, target_bytes, max_error, shard_bytes)
    _fill_rows(plan, chosen, report, export)
    _judge(chosen, report, min_cosine, force, base)
    report.predicted_file_bytes = predict_file_bytes(plan, chosen, export, shard_bytes)
    for sentence in find_waste(plan, chosen) if export is None else ():
        _warn(report, sentence)
    if not dry_run:
        with write_folder(target, overwrite) as staging:
            with CheckpointWriter(staging, shard_bytes) as writer:
                CompressedWriter(plan, bases, chosen, writer, report, seed, export).write_all()
            config = stock_config(plan) if export else target_config(plan, chosen.encodings, seed)
            config.save_pretrained(staging)
            copy_side_files(plan.source, staging)
            report.file_bytes_after = sum(path.stat().st_size for path in staging.glob("*.safetensors"))
            if rows is not None:
                report.calibration = measure_calibration(plan.source, staging, str(calibration), rows, max_loss)
            report.written, report.peak_memory_bytes = True, peak_memory_bytes()
            report.seconds = round(time.monotonic() - began, 1)
            report.write(staging)
    report.seconds = round(time.monotonic() - began, 1)
    return report


def _check_request(
    encoding: Encoding, target_bytes: Any, max_error: Any, min_cosine: Any, export: Any, base: str
) -> None:
    if target_bytes is not None and max_error is not None:
        raise ValueError("target_bytes and max_error each choose the rates; give one of them")
    numbers = {"drop_rate": encoding.drop_rate, "rank": encoding.rank}
    numbers |= {"bits": encoding.bits} if encoding.form == "quantized" else {}
    given = [name for name, value in numbers.items() if value is not None]
    for name, value in (("target_bytes", target_bytes), ("max_error", max_error)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value!r}")
        if given:
            raise ValueError(f"{name} chooses {given[0]} for every matrix; leave {given[0]}={numbers[given[0]]!r} out")
    if isinstance(min_cosine, bool) or not isinstance(min_cosine, int | float) or not -1 <= min_cosine <= 1:
        raise ValueError(f"min_cosine must be from -1 to 1, got {min_cosine!r}")
    if export not in (None, "stock"):
        raise ValueError(f"export must be 'stock' or None, got {export!r}")
    if export == "stock" and target_bytes is not None:
        raise ValueError(
            "export='stock' writes ordinary experts, which take the bytes they took; leave target_bytes out"
        )
    if base == "least_squares" and encoding.method == "random_drop":
        raise ValueError(
            "base='least_squares' with encode='random_drop': its expected error is least at the mean; write base='mean', or "
            "encode='magnitude_drop', 'svd' or 'quantize'"
        )


def _fill_rows(plan: CompressPlan, chosen: Chosen, report: CompressReport, export: str | None) -> None:
    for layer in plan.experts.layers:
        for matrix in MATRICES:
            measures, encoding = chosen.measures[layer, matrix], chosen.encodings[layer, matrix]
            error = chosen.errors.get((layer, matrix))
            before, after = plan.count_bytes(layer, matrix, encoding)
            report.matrices.append(
                MatrixReport(
                    layer=layer,
                    matrix=matrix,
                    encoding=encoding.label(),
                    least_cosine=min(measures.cosines),
                    mean_cosine=sum(measures.cosines) / len(measures.cosines),
                    relative_norm=sum(measures.relative_norms) / len(measures.relative_norms),
                    distance_before=measures.distance,
                    bytes_before=before,
                    bytes_after=before if export else after,
                    predicted_error=None if error is None else error**0.5,
                )
            )


def _judge(chosen: Chosen, report: CompressReport, min_cosine: float, force: bool, base: str) -> None:
    """Refuse, or warn of, experts far from the base, and warn of a base that is no parent's."""
    worst = min(report.matrices, key=lambda row: row.least_cosine)
    below = [row for row in report.matrices if row.least_cosine < min_cosine]
    if below:
        cosines = chosen.measures[worst.layer, worst.matrix].cosines
        origin = "the parent's matrix" if base == "parent" else "the experts' mean"
        reason = (
            f"layer {worst.layer}, {worst.matrix} of expert {cosines.index(min(cosines))} has cosine "
            f"{worst.least_cosine:.3f} to {origin} (||D||/||W|| = {worst.relative_norm:.3g}), below min_cosine={min_cosine}, as "
            f"have {len(below)} of {len(report.matrices)} matrices: these experts are not close to one shared base"
        )
        advice = (
            "give the parent this MoE was made from"
            if base == "parent"
            else "a MoE trained from scratch does not fit this method; give its dense parent if it has one"
        )
        if not force:
            raise ValueError(
                f"{reason}. {advice[0].upper()}{advice[1:]}, or write force (--force) to do it all the same"
            )
        _warn(report, reason)
    if base != "parent":
        norms = [row.relative_norm for row in report.matrices]
        _warn(
            report,
            f"base={base!r} is no dense parent, which the paper never tried: experts have cosines of "
            f"{worst.least_cosine:.4f} (layer {worst.layer}, {worst.matrix}) to "
            f"{max(row.mean_cosine for row in report.matrices):.4f} to it, ||D||/||W|| up to {max(norms):.3g}; measure the "
            "result on data (calibration)",
        )


def _warn(report: CompressReport, sentence: str) -> None:
    report.warnings.append(sentence)
    logger.warning(sentence)
