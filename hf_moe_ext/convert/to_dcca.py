"""``to_dcca``: a pretrained Mixtral- or OLMoE-type checkpoint, or some of its layers, to the DCCA form.

The order of work: the refusals (`conversion_plan`), the text (`calibration_text`), the layers one after the other
(`layer_conversion`), and if asked for the distillation (`distillation`), all in a folder that gets its name at the end.
"""

import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hf_moe_ext.convert.calibration_text import TokenRows, check_ids, draw_rows, read_whole, split_source, take_rows
from hf_moe_ext.convert.checkpoint import (
    DEFAULT_SHARD_BYTES,
    CheckpointReader,
    CheckpointWriter,
    check_target,
    copy_side_files,
    write_folder,
)
from hf_moe_ext.convert.conversion_plan import ConversionPlan, plan_conversion
from hf_moe_ext.convert.conversion_report import ConversionReport, peak_memory_bytes
from hf_moe_ext.convert.distillation import DistillationSettings, distill, measure_perplexity
from hf_moe_ext.convert.layer_conversion import FitSettings, check_language_model, convert_layers

_METHODS = ("data", "svd")


def to_dcca(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    calibration: str | os.PathLike[str] | Tensor | None = None,
    *,
    held_out: str | os.PathLike[str] | Tensor | None = None,
    latent_size: int | None = None,
    ratio: float | None = None,
    layers: Iterable[int] | None = None,
    method: Literal["data", "svd"] = "data",
    num_tokens: int = 65_536,
    num_held_out_tokens: int = 16_384,
    sequence_length: int | None = None,
    distillation: DistillationSettings | None = None,
    expert_gated: bool = True,
    expert_intermediate_size: int | None = None,
    sequential: bool = True,
    seed: int = 0,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    device: str | torch.device | None = None,
) -> ConversionReport:
    """Convert a checkpoint and write the result to a folder.

    One decoder layer is in memory at a time, with the hidden states of all calibration tokens; only a distillation loads
    whole models (source and result). The router stays as it is. At latent size = hidden size the result computes what
    the source does, to rounding.

    Args:
        model: folder or Hub id; model_type mixtral, olmoe, mixtral_ext or olmoe_ext, safetensors, not quantised.
        output: folder to write: config.json, safetensors, tokenizer files, conversion.json.
        calibration: a text file, a folder of texts, token ids [rows, length], or None for the source of the Python
            standard library. An eighth of it is held out for the report.
        held_out: another text (or ids) to measure on in place of that eighth.
        latent_size: R, a multiple of 8 and at most the hidden size. Default: ratio.
        ratio: R over the hidden size, rounded to a multiple of 8. Default: 0.25.
        layers: layers to convert; None: all that are standard.
        method: "data", or "svd": the data-free baseline.
        num_tokens: calibration tokens at most.
        num_held_out_tokens: tokens to measure on at most.
        sequence_length: tokens per row of text; None: 512, or the model's longest if that is less.
        distillation: settings of a short distillation on the calibration rows; None: none.
        expert_gated: only True can be represented.
        expert_intermediate_size: only the source's own can be represented.
        sequential: fit each layer on the inputs that the layers converted before it give, and so that the hidden states
            after it are the source's. False: each layer by itself.
        seed: of the calibration sample and of the distillation.
        overwrite: replace an existing output folder.
        max_shard_bytes: largest safetensors file.
        device: where to compute; None: CUDA if there is one, else the CPU.

    Returns:
        The report, which is also in the output folder.

    Raises:
        ValueError, TypeError: a request that cannot be carried out; nothing was written.
        FileExistsError: the output exists.
        FileNotFoundError: the source has no safetensors weights.
    """
    began = time.monotonic()
    target = Path(output)
    check_target(target, overwrite, keep=Path(model))
    place = _choose_device(device)
    if method not in _METHODS:
        raise ValueError(f"method must be 'data' or 'svd'; got {method!r}")
    for name, value in (("num_tokens", num_tokens), ("num_held_out_tokens", num_held_out_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 2:
            raise ValueError(f"{name} must be an integer of at least 2; got {value!r}")
    plan = plan_conversion(model, layers, latent_size, ratio, expert_gated, expert_intermediate_size)
    length = _choose_length(plan, sequence_length)
    steps = distillation or DistillationSettings()
    steps.check()
    reader = CheckpointReader(plan.source)
    check_language_model(reader)
    rows = _token_rows(plan, calibration, held_out, (num_tokens, num_held_out_tokens), length, seed)
    report = ConversionReport(
        source=str(model),
        output=str(output),
        settings={
            **{"latent_size": plan.config.moe_latent_size, "layers": plan.layers, "method": method},
            **{"sequential": sequential, "seed": seed, "calibration": rows.origin, "distillation": asdict(steps)},
        },
        calibration_tokens=rows.calibration.numel(),
        held_out_tokens=rows.held_out.numel(),
    )
    with write_folder(target, overwrite) as staging:
        with CheckpointWriter(staging, max_shard_bytes) as writer:
            convert_layers(plan, reader, writer, rows, FitSettings(method, sequential), place, report)
        report.num_parameters = writer.num_parameters
        plan.config.save_pretrained(staging)
        copy_side_files(plan.source, staging)
        if steps.num_steps:
            _distill_folder(plan, staging, rows, steps, place, seed, max_shard_bytes, report)
        report.seconds = round(time.monotonic() - began, 1)
        report.peak_memory_bytes = peak_memory_bytes()
        report.write(staging)
    return report


def _distill_folder(
    plan: ConversionPlan,
    folder: Path,
    rows: TokenRows,
    steps: DistillationSettings,
    device: torch.device,
    seed: int,
    max_shard_bytes: int,
    report: ConversionReport,
) -> None:
    from transformers import AutoModelForCausalLM

    def load(path: Path, **kwargs: Any) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(path, **kwargs)
        return model.to(device)

    # AdamW on bfloat16 weights would lose its small steps.
    student, teacher = load(folder, dtype=torch.float32), load(plan.source)
    dtype = teacher.dtype  # the checkpoint's, whether its config.json says so or not
    report.distillation_losses = distill(
        student, teacher, rows.calibration, plan.layers, steps, folder / "trainer", seed
    )
    report.perplexity_distilled = measure_perplexity(student, rows.held_out)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    student.to(dtype).save_pretrained(folder, max_shard_size=max_shard_bytes)


def _token_rows(
    plan: ConversionPlan,
    calibration: str | os.PathLike[str] | Tensor | None,
    held_out: str | os.PathLike[str] | Tensor | None,
    num_tokens: tuple[int, int],
    length: int,
    seed: int,
) -> TokenRows:
    """Rows to fit on and to measure on; the tokenizer is loaded only for text."""
    if held_out is None:
        fit, measure, origin = split_source(calibration)
    else:  # nothing of either needs to be held out
        (fit, origin), (measure, _) = read_whole(calibration), read_whole(held_out)

    def rows(source: Tensor | list[str], count: int, order: int) -> Tensor:
        if isinstance(source, Tensor):
            ids, longest = check_ids(source, plan.config.vocab_size), plan.config.max_position_embeddings
            if ids.shape[1] > longest:
                raise ValueError(f"token ids have {ids.shape[1]} per row, and the model takes {longest}; cut the rows")
            return take_rows(ids, count, order)
        from transformers import AutoTokenizer

        return draw_rows(source, AutoTokenizer.from_pretrained(plan.source), count, length, order)

    # Measured always in the same order: results of several seeds are of the same tokens.
    return TokenRows(rows(fit, num_tokens[0], seed), rows(measure, num_tokens[1], 0), origin)


def _choose_device(device: str | torch.device | None) -> torch.device:
    """The device, tried out.

    Raises:
        ValueError: there is no such device.
    """
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    try:
        return torch.empty(0, device=place).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used: {reason}; write 'cpu', or leave it out") from error


def _choose_length(plan: ConversionPlan, length: int | None) -> int:
    longest = plan.config.max_position_embeddings
    if length is None:
        return min(512, longest)
    if isinstance(length, bool) or not isinstance(length, int) or not 2 <= length <= longest:
        raise ValueError(
            f"sequence_length must be from 2 to the model's max_position_embeddings={longest}; got {length!r}"
        )
    return length
