"""Serving: memory of one rank, and tokens per second of a replica, by roofline."""

from dataclasses import dataclass

from hf_moe_ext.scaling.exchange import INFERENCE
from hf_moe_ext.scaling.hardware import Hardware
from hf_moe_ext.scaling.layout import Layout, cache_ranks, stage_parameters
from hf_moe_ext.scaling.memory import Buckets, Memory
from hf_moe_ext.scaling.rank_seconds import Efficiency, RankSeconds
from hf_moe_ext.scaling.shape import MoeShape


def serving_memory(
    shape: MoeShape,
    layout: Layout,
    num_sequences: int,
    sequence_length: int,
    *,
    weight_bytes: float = 2,
    kv_bytes: int = 2,
    prefill_tokens: int = 8192,
    imbalance: float = 1.0,
) -> Memory:
    """Weights, the cache of all sequences at their full length, and a prefill chunk's rows; no pipeline bubbles.

    Keys and values are cut by TP; a latent cache is whole on every TP rank. ``num_sequences`` are those of one rank of DP.

    Raises:
        ValueError: the layout does not fit the shape, or a number out of range.
    """
    layout.check(shape)
    for name, value in (
        ("num_sequences", num_sequences),
        ("sequence_length", sequence_length),
        ("prefill_tokens", prefill_tokens),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not weight_bytes > 0:
        raise ValueError(f"weight_bytes must be above 0, got {weight_bytes}")
    local = max((stage_parameters(shape, layout, stage) for stage in {0, layout.pipeline - 1}), key=lambda p: p.total)
    cache = shape.kv_cache_bytes(sequence_length, num_sequences, kv_bytes) / cache_ranks(shape, layout)
    tokens, d = min(prefill_tokens, num_sequences * sequence_length), shape.hidden_size
    rows = [3 * tokens * max(shape.attention.score_widths) / layout.tensor]
    sent = [0.0]
    for layer in shape.moe_layers:
        routed = tokens * layer.top_k * imbalance * layout.row_share
        rows.append(routed * (layer.expert_width(d) + 3 * layer.intermediate_size / layout.expert_tensor))
        sent.append(2 * 2 * routed * layer.expert_width(d) * (layout.expert > 1))
    return Memory(
        Buckets(
            weights=local.total * weight_bytes,
            working=2 * (2 * tokens * d + max(rows)),
            logits=num_sequences * shape.vocab_size * 4 / layout.tensor,
            exchange=max(sent),
            kv_cache=cache,
        ),
        "prefill",
    )  # fmt: skip


@dataclass(frozen=True)
class ServingRates:
    """Tokens per second of one replica (all ranks of the layout) and what bounds a token's time.

    Attributes:
        prefill_tokens_per_s: of prompts.
        decode_tokens_per_s: of generated tokens, all sequences together.
        decode_s: seconds of one token of every sequence.
        decode_binds: "compute", "memory" or "all_to_all".
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_s: float
    decode_binds: str


def serving_rates(
    shape: MoeShape,
    layout: Layout,
    hardware: Hardware,
    num_sequences: int,
    context_length: int,
    *,
    efficiency: Efficiency | None = None,
    weight_bytes: float = 2,
    kv_bytes: int = 2,
    imbalance: float = 1.0,
    prefill_tokens: int = 8192,
) -> ServingRates:
    """Prefill of chunks, and decoding of ``num_sequences`` per DP rank at this context, stages in turn.

    Decoding reads the weights that the batch touches (a layer's experts as far as uniform routing hits them) and the cache.

    Raises:
        ValueError: the layout does not fit, or a number out of range.
    """
    layout.check(shape)
    for name, value in (
        ("num_sequences", num_sequences),
        ("context_length", context_length),
        ("prefill_tokens", prefill_tokens),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    eff = efficiency or Efficiency()
    each = RankSeconds(shape, layout, hardware, eff)
    flops = shape.forward_flops(context_length)
    chunk = each.products(flops, prefill_tokens)
    chunk += prefill_tokens * imbalance * each.expert_token(flops)
    chunk += (1 - eff.overlap) * each.all_to_all(prefill_tokens, INFERENCE, 2, imbalance)
    chunk += each.tensor_bytes(prefill_tokens * shape.hidden_size * 2, 2)
    compute = each.products(flops, num_sequences)
    compute += num_sequences * imbalance * each.expert_token(flops)
    memory = each.decode_bytes(num_sequences, context_length, weight_bytes, kv_bytes) / each.memory_speed
    wire = (1 - eff.overlap) * each.all_to_all(num_sequences, INFERENCE, 2, imbalance)
    wire += each.tensor_bytes(num_sequences * shape.hidden_size * 2, 2)
    # A token passes all stages; other sequences keep them busy meanwhile, so the rate is a stage's.
    seconds = max(compute, memory) + wire
    parts = {"compute": compute, "memory": memory, "all_to_all": wire}
    replicas = layout.data
    return ServingRates(
        prefill_tokens_per_s=replicas * prefill_tokens / chunk,
        decode_tokens_per_s=replicas * num_sequences / seconds,
        decode_s=seconds * layout.pipeline,
        decode_binds=max(parts, key=lambda name: parts[name]),
    )
