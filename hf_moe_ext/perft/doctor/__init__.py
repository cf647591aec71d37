"""What would train, what it costs and what is wrong: the logic of ``hf-moe doctor``.

Of a model only config.json is read and the model is built on the meta device, so any size is examined on any machine.
Of an adapter the header and the values of its safetensors file are read; a pickle never is.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn

from hf_moe_ext.perft.adapter_files import KEY_PREFIX, refuse_pickle
from hf_moe_ext.perft.config import PerftConfig, PerftType
from hf_moe_ext.perft.doctor.adapter_file import (
    TensorShape,
    check_values,
    compare_header,
    read_header,
    rows_of_header,
)
from hf_moe_ext.perft.doctor.attachment import attach, build_settings, settings_as_dict, warnings_as_findings
from hf_moe_ext.perft.doctor.base import build_on_meta, check_base, read_base_config, summarize_base
from hf_moe_ext.perft.doctor.diagnosis import Diagnosis, Finding, FindingError, TargetError

__all__ = ["Diagnosis", "Finding", "TargetError", "diagnose"]

_CONFIG_NAME, _WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


def diagnose(target: str, options: dict[str, Any] | None = None, base_model: str | None = None) -> Diagnosis:
    """Examine a model with a new adapter, or a saved adapter.

    Args:
        target: Hub id or folder of a model, or folder of an adapter (it holds adapter_config.json).
        options: arguments of ``PerftConfig`` for the new adapter; none for a saved one.
        base_model: for a saved adapter: the base model to check it against, where it is not the one its configuration
            names. Named here it may come from the Hub; otherwise only what is on this machine is looked at.

    Raises:
        TargetError: there is nothing to examine under these names.
    """
    if (Path(target) / _CONFIG_NAME).is_file():
        if options:
            raise TargetError(
                f"{target!r} is a saved adapter, whose {_CONFIG_NAME} holds its settings; leave out {', '.join(options)}"
            )
        return _diagnose_adapter(Path(target), base_model)
    if base_model is not None:
        raise TargetError(
            f"{target!r} is no adapter folder (no {_CONFIG_NAME}), so it has no base model to be checked with"
        )
    return _diagnose_model(target, options or {})


def _diagnose_model(target: str, options: dict[str, Any]) -> Diagnosis:
    diagnosis = Diagnosis(target, "model")
    try:
        base_config = read_base_config(target)
        model = build_on_meta(base_config, options.get("task_type"))
        diagnosis.base = summarize_base(target, base_config, model)
        config = build_settings(options, diagnosis.findings)
        diagnosis.settings = settings_as_dict(config)
        tensors = attach(model, config, diagnosis)
        diagnosis.file_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        diagnosis.findings.extend(check_base(base_config, model))
    except FindingError as stop:
        diagnosis.findings.append(stop.finding)
    return diagnosis


def _diagnose_adapter(folder: Path, base_model: str | None) -> Diagnosis:
    diagnosis = Diagnosis(str(folder), "adapter")
    try:
        config = _read_settings(folder, diagnosis.findings)
        diagnosis.settings = settings_as_dict(config)
        weights = folder / _WEIGHTS_NAME
        header = read_header(weights)
        diagnosis.file_bytes = weights.stat().st_size
        diagnosis.rows = rows_of_header(header, config)
        diagnosis.also_trains = {
            name.removeprefix(KEY_PREFIX): tensor.shape for name, tensor in header.items() if ".perft_" not in name
        }
        try:
            _compare_with_base(diagnosis, config, header, base_model)
        except FindingError as stop:  # the file's values can be read all the same
            diagnosis.findings.append(stop.finding)
        diagnosis.findings.extend(check_values(weights))
    except FindingError as stop:
        diagnosis.findings.append(stop.finding)
    return diagnosis


def _read_settings(folder: Path, findings: list[Finding]) -> PerftConfig:
    path = folder / _CONFIG_NAME
    try:
        peft_type = json.loads(path.read_text(encoding="utf-8"))["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise FindingError(
            "adapter-config-unreadable", f"{path} is not the configuration of a PEFT adapter", "restore the file"
        ) from error
    if peft_type != PerftType.PERFT:
        raise FindingError(
            "not-perft", f"{str(folder)!r} is a PEFT adapter of type {peft_type}, not PERFT", "name a PERFT adapter"
        )
    try:
        refuse_pickle(folder)
    except ValueError as error:
        raise FindingError("pickle-adapter", str(error), "load it where you trust it and save it again") from error
    if not (folder / _WEIGHTS_NAME).is_file():
        raise FindingError(
            "no-weights", f"the adapter's weights {folder / _WEIGHTS_NAME} are missing", "copy them there"
        )
    try:
        with warnings_as_findings(findings, "adapter-config-warning"):
            return PerftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError) as error:
        raise FindingError(
            "adapter-config-refused", f"{path}: {error}", "restore the file it was saved with"
        ) from error


def _compare_with_base(
    diagnosis: Diagnosis, config: PerftConfig, header: dict[str, TensorShape], base_model: str | None
) -> None:
    source = base_model or config.base_model_name_or_path
    try:
        if not source:
            raise TargetError("the adapter's configuration names no base model")
        base_config = read_base_config(source, download=base_model is not None)
    except TargetError as error:
        if base_model is not None:
            raise
        diagnosis.findings.append(
            Finding(
                "warning",
                "base-not-found",
                f"names and shapes of the adapter's tensors were not checked: {error}",
                "name the base model with --base-model (a folder with its config.json, or a Hub id)",
            )
        )
        return
    labels = next((t.shape[0] for n, t in header.items() if n.endswith(("score.weight", "classifier.weight"))), None)
    if labels is not None:
        base_config.num_labels = labels  # the head's size is the adapter's, not the base model's
    model = build_on_meta(base_config, config.task_type, (config.auto_mapping or {}).get("base_model_class"))
    diagnosis.base = summarize_base(source, base_config, model)
    own = _shapes(model)
    saved = diagnosis.rows, diagnosis.also_trains
    tensors = attach(model, config, diagnosis)
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    mismatches = compare_header(header, expected, own)
    if any(finding.level == "error" for finding in mismatches):
        diagnosis.rows, diagnosis.also_trains = saved  # what the file holds, not what this base model would need
    diagnosis.findings.extend(mismatches)
    diagnosis.findings.extend(check_base(base_config, model))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
