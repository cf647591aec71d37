"""Which encoding each matrix gets, and what that will cost on disk."""

from collections.abc import Mapping
from dataclasses import dataclass

from hf_moe_ext.convert.compress_measure import MatrixMeasures
from hf_moe_ext.convert.compress_plan import CompressPlan
from hf_moe_ext.convert.delta_budget import Option, choose_within_bytes, choose_within_error, smallest_bytes
from hf_moe_ext.convert.delta_encoding import Encoding
from hf_moe_ext.convert.expert_matrices import MATRICES

# Layer and matrix.
Place = tuple[int, str]

# Upper bounds: of a tensor's entry in a safetensors header beside its name, of a file's header beside its tensors, of the
# names of what a layer's experts become.
_ENTRY_BYTES, _FILE_BYTES, _NAME_BYTES = 160, 64, 64
_TENSORS_A_LAYER = 2 + 4 * len(MATRICES)


@dataclass(frozen=True)
class Measured:
    """What is known of a matrix before rates are chosen.

    Attributes:
        measures: of all experts.
        encodings: those whose errors are in ``measures.squared_errors``.
    """

    measures: MatrixMeasures
    encodings: tuple[Encoding, ...]


@dataclass(frozen=True)
class Chosen:
    """The encoding of every matrix.

    Attributes:
        encodings: of one method.
        measures: of the matrices.
        errors: predicted mean squared relative output error, where it is known.
    """

    encodings: dict[Place, Encoding]
    measures: dict[Place, MatrixMeasures]
    errors: dict[Place, float]


def choose_rates(
    plan: CompressPlan,
    measured: Mapping[Place, Measured],
    encodings: Mapping[str, Encoding],
    target_bytes: float | None = None,
    max_error: float | None = None,
    shard_bytes: int | None = None,
) -> Chosen:
    """The same encoding for all, or the one that a budget gives each matrix.

    Args:
        plan: what is compressed.
        measured: every matrix of every layer; with a budget, for a grid of encodings.
        encodings: matrix -> encoding without a budget.
        target_bytes: of all safetensors files.
        max_error: relative output error of a matrix.
        shard_bytes: largest file, with ``target_bytes``: each has a header.

    Raises:
        ValueError: a target that no choice meets, with what can be met.
    """
    places = list(measured)
    if target_bytes is None and max_error is None:
        chosen = {place: encodings[place[1]] for place in places}
    else:
        matrices = [_options(plan, place, measured[place]) for place in places]
        if target_bytes is not None:
            indices = _within_bytes(plan, matrices, target_bytes, shard_bytes)
        else:
            assert max_error is not None
            indices = _within_error(places, matrices, max_error)
        chosen = {place: measured[place].encodings[index] for place, index in zip(places, indices, strict=True)}
    errors = {}
    for place, encoding in chosen.items():
        known = measured[place]
        if encoding in known.encodings:
            errors[place] = known.measures.squared_errors[known.encodings.index(encoding)]
    return Chosen(chosen, {place: known.measures for place, known in measured.items()}, errors)


def fixed_bytes(plan: CompressPlan, shard_bytes: int | None = None) -> int:
    """Upper bound of the files' bytes without deltas: other tensors, bases, headers."""
    reader, layers = plan.reader, plan.experts.layers
    owned = {name for layer in layers for name in plan.experts.names(layer)}
    others = [name for name in reader.names if name not in owned]
    tensors = sum(reader.places[name].num_bytes for name in others)
    for layer in layers:
        width = plan.experts.dtype(layer).itemsize
        tensors += sum(rows * cols * width for rows, cols in plan.experts.shapes.values())
    header = sum(len(name) + _ENTRY_BYTES for name in others)
    header += len(layers) * _TENSORS_A_LAYER * (_NAME_BYTES + _ENTRY_BYTES)
    # Two neighbours together exceed a shard's size, or they would be one.
    num_files = 1 if shard_bytes is None else 2 * reader.file_bytes // shard_bytes + 2
    return tensors + header + num_files * _FILE_BYTES


def predict_file_bytes(plan: CompressPlan, chosen: Chosen, export: str | None, shard_bytes: int) -> int:
    """Upper bound of the result's safetensors files; of a stock export, what the source has."""
    if export is not None:
        return plan.reader.file_bytes
    deltas = 0
    for place, encoding in chosen.encodings.items():
        deltas += _delta_bytes(plan, place, encoding)
    return fixed_bytes(plan, shard_bytes) + deltas


def find_waste(plan: CompressPlan, chosen: Chosen) -> list[str]:
    """A sentence for each encoding that takes more bytes than it saves, with the rate from which on it does not."""
    sentences: dict[str, str] = {}
    for (layer, matrix), encoding in chosen.encodings.items():
        before, after = plan.count_bytes(layer, matrix, encoding)
        if after < before:
            continue
        bound = encoding.break_even(plan.experts.shapes[matrix], plan.experts.dtype(layer), plan.experts.num_experts)
        label = encoding.label()
        sentences.setdefault(
            label,
            f"{label} saves nothing (layer {layer}, {matrix}): base and {plan.experts.num_experts} deltas take {after:,} "
            f"bytes, the experts {before:,}; it pays with {bound}",
        )
    return list(sentences.values())


def _options(plan: CompressPlan, place: Place, known: Measured) -> list[Option]:
    pairs = zip(known.encodings, known.measures.squared_errors, strict=True)
    return [Option(_delta_bytes(plan, place, encoding), error) for encoding, error in pairs]


def _delta_bytes(plan: CompressPlan, place: Place, encoding: Encoding) -> int:
    layer, matrix = place
    one = encoding.count_bytes(plan.experts.shapes[matrix], plan.experts.dtype(layer))
    return plan.experts.num_experts * one


def _within_bytes(
    plan: CompressPlan, matrices: list[list[Option]], target_bytes: float, shard_bytes: int | None
) -> list[int]:
    fixed = fixed_bytes(plan, shard_bytes)
    least = fixed + smallest_bytes(matrices)
    if least > target_bytes:
        raise ValueError(
            f"target_bytes={int(target_bytes):,} cannot be met: everything else takes {fixed:,} bytes and the smallest deltas "
            f"{least - fixed:,}, so the smallest achievable is {least:,}; ask for that, or for another encode"
        )
    return choose_within_bytes(matrices, int(target_bytes) - fixed)


def _within_error(places: list[Place], matrices: list[list[Option]], max_error: float) -> list[int]:
    smallest = [min(option.error for option in options) ** 0.5 for options in matrices]
    worst = max(range(len(places)), key=smallest.__getitem__)
    if smallest[worst] > max_error:
        layer, matrix = places[worst]
        raise ValueError(
            f"max_error={max_error} cannot be met: the least relative output error of layer {layer}, {matrix} is "
            f"{smallest[worst]:.4g}; ask for that, or for another encode"
        )
    return choose_within_error(matrices, max_error**2)
