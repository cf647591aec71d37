"""An adapter's safetensors file: its header against what the base model needs, and its values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hf_moe_ext.perft.adapter_files import KEY_PREFIX
from hf_moe_ext.perft.config import PerftConfig
from hf_moe_ext.perft.doctor.diagnosis import Finding, FindingError
from hf_moe_ext.perft.report import TrainableRow

_SHOWN = 4


@dataclass(frozen=True)
class TensorShape:
    """A tensor as a file's header describes it."""

    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path) -> dict[str, TensorShape]:
    """Names, shapes and dtypes of the file's tensors; no tensor is read.

    Raises:
        FindingError: it is no safetensors file, or cut short.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no iterator
            return {name: TensorShape(tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise FindingError(
            "weights-unreadable",
            f"{path} is not a whole safetensors file: {error}",
            "copy or download it again (a few hundred bytes of text are a Git LFS pointer: `git lfs pull`)",
        ) from error


def compare_header(
    header: Mapping[str, TensorShape], expected: Mapping[str, tuple[int, ...]], base: Mapping[str, tuple[int, ...]]
) -> list[Finding]:
    """What the file lacks, has too much of, or holds in another shape.

    Args:
        header: the file's tensors.
        expected: name on disk -> shape, as the base model with this configuration needs them.
        base: the base model's own tensors, which a file may also carry (a resized embedding).
    """
    findings = []
    own = {f"{KEY_PREFIX}{name}": shape for name, shape in base.items()}
    next_step = "use the base model it was trained for, with the adapter_config.json it was saved with"
    missing = [name for name in expected if name not in header]
    extra = [name for name in header if name not in expected and name not in own]
    for code, names, text in (("missing-tensors", missing, "lacks"), ("extra-tensors", extra, "has")):
        if names:
            tail = " that this model and configuration have no place for" if code == "extra-tensors" else ""
            message = f"the adapter file {text} {_count(names)}{tail}: {_list(names)}"
            findings.append(Finding("error", code, message, next_step, tuple(names)))
    wrong = {n: shape for n, shape in expected.items() if n in header and header[n].shape != shape}
    if wrong:
        shapes = _list([f"{n} is {list(header[n].shape)}, needed {list(shape)}" for n, shape in wrong.items()])
        message = f"the adapter file has {_count(wrong)} of another shape: {shapes}"
        findings.append(Finding("error", "misshaped-tensors", message, next_step, tuple(wrong)))
    resized = [n for n in header if n in own and n not in expected and header[n].shape != own[n]]
    if resized:
        rows = header[resized[0]].shape[0]
        message = f"the file carries {_list(resized)} of another size than the base model's: its vocabulary was resized"
        step = f"call model.resize_token_embeddings({rows}) on the base model before loading the adapter"
        findings.append(Finding("warning", "resized-vocabulary", message, step, tuple(resized)))
    return findings


def check_values(path: Path) -> list[Finding]:
    """NaN, infinity, and up projections that are still exactly zero; one tensor in memory at a time."""
    broken, ups, zero = [], [], []
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no iterator
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                broken.append(name)
            if name.endswith(".perft_B"):
                ups.append(name)
                if not tensor.any():
                    zero.append(name)
    findings = []
    if broken:
        message = f"NaN or infinity in {_count(broken)}: {_list(broken)}"
        step = "take an earlier checkpoint; train again with a lower learning rate or in bfloat16 instead of float16"
        findings.append(Finding("error", "not-finite", message, step, tuple(broken)))
    if zero and len(zero) == len(ups):
        message = f"every perft_B is exactly zero ({_count(zero)}): this adapter was never trained and changes nothing"
        step = (
            "train it; if it was trained, check that the optimizer got its parameters and that it was saved afterwards"
        )
        findings.append(Finding("error", "never-trained", message, step, tuple(zero)))
    elif zero:
        message = f"perft_B is exactly zero in {len(zero)} of {len(ups)} modules, which never trained: {_list(zero)}"
        step = "check what froze them; leave such layers out with layers_to_transform"
        findings.append(Finding("warning", "partly-untrained", message, step, tuple(zero)))
    return findings


def rows_of_header(header: Mapping[str, TensorShape], config: PerftConfig) -> list[TrainableRow]:
    """One row per adapted module from the file alone, for a base model that is not at hand."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in header.items():
        module, _, parameter = name.removeprefix(KEY_PREFIX).rpartition(".")
        if parameter.startswith("perft_") and tensor.shape:
            modules.setdefault(module, {})[parameter] = tensor.shape
    return [_row(module, tensors, config) for module, tensors in modules.items()]


def _row(module: str, tensors: dict[str, tuple[int, ...]], config: PerftConfig) -> TrainableRow:
    sizes = {name: math.prod(shape) for name, shape in tensors.items()}
    return TrainableRow(module, tensors, sum(sizes.values()), _count_active(sizes, config))


def _count_active(sizes: dict[str, int], config: PerftConfig) -> int | None:
    """Parameters one token uses, from the sizes of one module's tensors; None for E: the base model's top-k is not here."""
    if "perft_B" not in sizes or config.variant in ("D", "S"):
        return sum(sizes.values())  # used whole, as a tuned base router is
    if config.variant == "E":
        return None
    chosen, stored = config.top_k or 1, config.num_experts or 1
    size_A = sizes.get("perft_A", 0)  # a broken file may lack it
    used_A = size_A if config.shared_A else size_A * chosen // stored
    return used_A + sizes["perft_B"] * chosen // stored + sizes.get("perft_router", 0)


def _count(names: object) -> str:
    number = len(names)  # type: ignore[arg-type]
    return f"{number} tensor{'' if number == 1 else 's'}"


def _list(names: list[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
