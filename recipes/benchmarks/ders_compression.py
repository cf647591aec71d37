"""Compression of a trained vanilla-upcycled model against its dense parent: loss by form and bytes.

Every expert matrix is replaced by base + decode(encode(expert - base)), as `hf-moe compress` writes it; the models are
those of part `quality`, a trained one per seed. Two baselines are not ours: plain min-max rounding (a scale per matrix),
and random drop with its positions stored as int64, as the paper's memory figures imply.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from ders_presets import QualityPreset
from ders_quality import VANILLA, interval, make_cell, prepare_parent
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_moe_ext.ops.delta_encoders import drop_at_random, drop_small
from hf_moe_ext.ops.delta_measures import form_delta, merge_out
from hf_moe_ext.ops.delta_positions import MaskStream
from hf_moe_ext.ops.delta_quantization import quantize
from pretrain_data import pack, read_texts
from upcycle_arguments import parse_upcycle_arguments

# (delta, name of the mask) -> what it is decoded to, and its bytes at two per value.
Encode = Callable[[Tensor, MaskStream], tuple[Tensor, int]]
VALUE_BYTES = 2


def list_encodings(preset: QualityPreset) -> dict[str, Encode]:
    """Name -> encoding; random masks several times, with a seed each."""
    found: dict[str, Encode] = {}
    for rate in preset.drop_rates:
        for seed in preset.mask_seeds:
            found[f"random drop {rate:g} / mask {seed}"] = _random_drop(rate, seed)
        found[f"magnitude drop {rate:g}"] = _magnitude_drop(rate)
    for bits in preset.bits:
        found[f"{bits} bit, least squares"] = _fitted(bits, preset.group_size)
        found[f"{bits} bit, min-max"] = _min_max(bits)
    return found


def measure_compression(preset: QualityPreset, options: argparse.Namespace, quality: dict[str, Any]) -> dict[str, Any]:
    """Loss of every encoding on every seed's trained model.

    Args:
        preset: Rates, bits, masks.
        options: `work_dir`, `source_dir`, `threads`.
        quality: The `quality` part, whose vanilla runs are compressed.

    Returns:
        The part of the JSON.
    """
    parent = AutoModelForCausalLM.from_pretrained(prepare_parent(preset, options))
    rate = quality["arms"][VANILLA]["chosen"]
    rows = read_rows(preset, options)
    losses: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    cosines: list[float] = []
    full = 0
    for seed in preset.seeds:
        folder = options.work_dir / "quality" / make_cell(preset, options, VANILLA, rate, seed, 0).name / VANILLA
        model = AutoModelForCausalLM.from_pretrained(folder, use_cache=False).eval()
        experts = [(w, b, w.clone()) for w, b in pair_weights(model, parent)]
        cosines += [float(torch.nn.functional.cosine_similarity(w.flatten(), b.flatten(), 0)) for w, b, _ in experts]
        full = sum(w.numel() for w, _, _ in experts) * VALUE_BYTES
        losses.setdefault("none", []).append(measure_loss(model, rows))
        for name, encode in list_encodings(preset).items():
            sizes[name] = apply_encoding(experts, encode)
            losses.setdefault(name, []).append(measure_loss(model, rows))
            print(f"seed {seed}, {name}: {losses[name][-1]:.4f} (whole {losses['none'][-1]:.4f})", flush=True)
        restore(experts)
    base = sum(p.numel() for n, p in parent.named_parameters() if ".mlp." in n) * VALUE_BYTES
    return {
        "held_out_rows": len(rows),
        "expert_bytes": full,
        "base_bytes": base,
        "cosine": {"least": min(cosines), "median": statistics.median(cosines)},
        "loss": interval(losses["none"]),
        "encodings": summarize(losses, sizes, base, full),
    }


def pair_weights(model: PreTrainedModel, parent: PreTrainedModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Every expert matrix (a view into the model) with the parent's: gate, up, down of each layer and expert."""
    for ours, theirs in zip(model.model.layers, parent.model.layers, strict=True):
        experts, ffn = ours.mlp.experts, theirs.mlp
        for gate_up, down in zip(experts.gate_up_proj.detach(), experts.down_proj.detach(), strict=True):
            gate, up = gate_up.chunk(2)
            yield gate, ffn.gate_proj.weight.detach()
            yield up, ffn.up_proj.weight.detach()
            yield down, ffn.down_proj.weight.detach()


@torch.no_grad()
def apply_encoding(experts: list[tuple[Tensor, Tensor, Tensor]], encode: Encode) -> int:
    """Put base + decoded delta in the place of every expert matrix; the bytes of all deltas."""
    total = 0
    for number, (weight, base, trained) in enumerate(experts):
        decoded, size = encode(form_delta(trained, base), MaskStream(0, 0, 0, number))
        weight.copy_(merge_out(base, decoded, weight.dtype))
        total += size
    return total


@torch.no_grad()
def restore(experts: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """The trained weights again."""
    for weight, _, trained in experts:
        weight.copy_(trained)


@torch.no_grad()
def measure_loss(model: PreTrainedModel, rows: list[Tensor]) -> float:
    """Nats per token over rows of equal length."""
    return statistics.mean(float(model(input_ids=row[None], labels=row[None]).loss) for row in rows)


def read_rows(preset: QualityPreset, options: argparse.Namespace) -> list[Tensor]:
    """Held-out rows, those of the `quality` part's runs, without the padded one."""
    from transformers import AutoTokenizer

    arguments = parse_upcycle_arguments(make_cell(preset, options, VANILLA, "1e-3", 0, 0).arguments)
    tokenizer = AutoTokenizer.from_pretrained(prepare_parent(preset, options))
    packed = pack(read_texts(arguments), tokenizer, arguments)  # type: ignore[arg-type]
    rows = [torch.tensor(row["input_ids"]) for row in packed.held_out if -100 not in row["labels"]]
    return rows[: preset.num_rows]


def summarize(losses: dict[str, list[float]], sizes: dict[str, int], base: int, full: int) -> list[dict[str, Any]]:
    """An encoding's rise in loss over seeds (and masks), and what base and deltas weigh of the full experts."""
    groups: dict[str, list[str]] = {}
    for name in sizes:
        groups.setdefault(name.split(" / ")[0], []).append(name)
    rows = []
    for group, names in groups.items():
        rises = [a - b for name in names for a, b in zip(losses[name], losses["none"], strict=True)]
        size = statistics.mean(sizes[name] for name in names)
        rows.append({"encoding": group, "rise": interval(rises), "delta_bytes": size, "share": (base + size) / full})
    return rows


def _random_drop(rate: float, seed: int) -> Encode:
    def encode(delta: Tensor, stream: MaskStream) -> tuple[Tensor, int]:
        found = drop_at_random(delta, rate, MaskStream(seed, stream.layer, stream.matrix, stream.expert), exact=True)
        return found.decode(), _as_16_bit(found.num_bytes, delta, found.decoded_values().numel())

    return encode


def _magnitude_drop(rate: float) -> Encode:
    def encode(delta: Tensor, _: MaskStream) -> tuple[Tensor, int]:
        found = drop_small(delta, rate)
        return found.decode(), _as_16_bit(found.num_bytes, delta, found.decoded_values().numel())

    return encode


def _fitted(bits: int, group_size: int) -> Encode:
    def encode(delta: Tensor, _: MaskStream) -> tuple[Tensor, int]:
        found = quantize(delta, bits, group_size)
        return found.decode(), found.num_bytes

    return encode


def _min_max(bits: int) -> Encode:
    def encode(delta: Tensor, _: MaskStream) -> tuple[Tensor, int]:
        low, high = delta.min(), delta.max()
        scale = (high - low) / (2**bits - 1)
        return ((delta - low) / scale).round() * scale + low, delta.numel() * bits // 8 + 2 * VALUE_BYTES

    return encode


def _as_16_bit(num_bytes: int, delta: Tensor, num_values: int) -> int:
    """Values counted at two bytes, as a bfloat16 checkpoint holds them."""
    return num_bytes - num_values * (delta.element_size() - VALUE_BYTES)
