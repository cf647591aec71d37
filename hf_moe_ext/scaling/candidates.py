"""The discrete shapes a plan chooses from: every one is a configuration that `models` can build.

Widths are multiples of 128 and heads of 64 or 128; depth follows width; an expert's width is the dense one over top_k, so that
all shapes of a width and depth spend nearly the same FLOPs in their experts, and granularity G = 2 d / d_e grows with top_k.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from hf_moe_ext.scaling.plan_request import PlanRequest
from hf_moe_ext.scaling.shape import MoeShape

HIDDEN_SIZES = (256, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192, 12288)
# d / n: the deep ones as in Abnar's models, the shallow ones half as deep.
WIDTHS_PER_LAYER = (64, 128)
FEWEST_LAYERS, MOST_LAYERS = 4, 96
EXPERT_RATIOS = (2, 4, 8, 16, 32, 64)
TOP_KS = (1, 2, 4, 8)
MOST_EXPERTS = 512
# Width of a dense FFN over d; Abnar's.
FFN_RATIO = 4
ALIGNMENT = 64
# Latent experts: r = 1/4 and 1/8; worth their projections only where several rows of a token travel.
LATENT_DIVISORS, LATENT_TOP_KS, LATENT_RATIOS = (4, 8), (4, 8), (4, 8, 16)
# Shared base: full-width experts, low-rank deltas of d / 16.
DELTA_RANK_DIVISOR, DELTA_TOP_K, DELTA_RATIOS = 16, 2, (4, 8, 16)


@dataclass(frozen=True)
class Candidate:
    """A shape as the configuration that makes it.

    Attributes:
        block: "dense", "standard", "dcca" or "ders".
        keys: of its config.json, as sorted pairs.
    """

    block: str
    keys: tuple[tuple[str, Any], ...]

    @property
    def config(self) -> dict[str, Any]:
        """As config.json has it."""
        return dict(self.keys)

    @cached_property
    def shape(self) -> MoeShape:
        """Counted from the configuration itself."""
        return MoeShape.from_hf(self.config)

    @property
    def expert_ratio(self) -> float:
        """E / K; 1 for a dense model."""
        if self.block == "dense":
            return 1.0
        moe = self.shape.moe_layers[0]
        return moe.num_experts / moe.top_k

    @property
    def name(self) -> str:
        """Short, for tables."""
        shape = self.shape
        size = f"d{shape.hidden_size} x {shape.num_layers}"
        if self.block == "dense":
            return f"dense {size}"
        moe = shape.moe_layers[0]
        extra = {
            "dcca": f", latent {moe.latent_size}",
            "ders": f", rank {moe.deltas.rank[0] if moe.deltas else 0}",
        }.get(self.block, "")
        return f"{self.block} {size}, {moe.top_k} of {moe.num_experts} x {moe.intermediate_size}{extra}"


def enumerate_candidates(request: PlanRequest) -> Iterator[Candidate]:
    """All of them, small to large."""
    for hidden_size in HIDDEN_SIZES:
        for per_layer in WIDTHS_PER_LAYER:
            num_layers = hidden_size // per_layer
            if FEWEST_LAYERS <= num_layers <= MOST_LAYERS:
                yield from _of_size(request, hidden_size, num_layers)


def _of_size(request: PlanRequest, hidden_size: int, num_layers: int) -> Iterator[Candidate]:
    stem = _stem(request, hidden_size, num_layers)
    wide = FFN_RATIO * hidden_size
    yield _make("dense", stem, request.family, intermediate_size=wide, num_experts=1, top_k=1)
    for ratio in EXPERT_RATIOS if "standard" in request.blocks else ():
        for top_k in TOP_KS:
            if wide % (top_k * ALIGNMENT) == 0 and ratio * top_k <= MOST_EXPERTS:
                yield _make("standard", stem, request.family, wide // top_k, ratio * top_k, top_k)
    for ratio, divisor in product(LATENT_RATIOS, LATENT_DIVISORS) if "dcca" in request.blocks else ():
        latent_size = hidden_size // divisor
        for top_k in LATENT_TOP_KS:
            if latent_size % (ALIGNMENT // 2) == 0 and wide % (top_k * ALIGNMENT) == 0:
                latent = {
                    "moe_latent_size": latent_size,
                    "moe_expert_gated": True,
                    # As many parameters as an expert of the full width.
                    "moe_expert_intermediate_size": divisor * wide // top_k,
                }
                yield _make("dcca", stem | latent, request.family, wide // top_k, ratio * top_k, top_k)
    for ratio in DELTA_RATIOS if "ders" in request.blocks else ():
        deltas = {"ders_delta": "low_rank", "ders_rank": max(8, hidden_size // DELTA_RANK_DIVISOR)}
        yield _make("ders", stem | deltas, request.family, wide, ratio * DELTA_TOP_K, DELTA_TOP_K)


def _stem(request: PlanRequest, hidden_size: int, num_layers: int) -> dict[str, Any]:
    heads = hidden_size // (128 if hidden_size >= 1024 else 64)
    return {
        "model_type": request.family,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        # Four queries share a key where there are eight or more.
        "num_key_value_heads": heads // 4 if heads >= 8 and heads % 4 == 0 else heads,
        "vocab_size": request.vocab_size,
        "max_position_embeddings": request.context_length,
        "tie_word_embeddings": False,
    }


def _make(
    block: str, keys: dict[str, Any], family: str, intermediate_size: int, num_experts: int, top_k: int
) -> Candidate:
    experts = "num_local_experts" if family == "mixtral_ext" else "num_experts"
    config = keys | {
        "moe_block": block,
        "intermediate_size": intermediate_size,
        experts: num_experts,
        "num_experts_per_tok": top_k,
    }
    return Candidate(block, tuple(sorted(config.items())))
