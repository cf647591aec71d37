"""``MoeShape``: what a decoder-only model is made of, and exact counts of its parameters, FLOPs and cache.

Conventions, stated because published numbers differ in them:

* Active parameters are what one token touches: everything always on plus K of E experts. The input embedding counts
  (``input_embedding=True``) or not; GPT-OSS's 3.6B and DeepSeek-V3's 37B leave it out. A tied embedding stays: it is the
  un-embedding too.
* FLOPs per token (arXiv 2501.12370, appendix C): 6 per weight and token for forward and backward, of which 2 are forward;
  14 for the router's weights (arXiv 2402.07871), or whatever is passed; biases, norms and nonlinearities 0; the input
  embedding 0; attention logits and values 6 n_ctx d_q each, without a causal half, but not beyond a sliding window.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hf_moe_ext.scaling.attention import Attention, GroupedAttention
from hf_moe_ext.scaling.feed_forward import DenseFfn, FeedForward, MoeFfn
from hf_moe_ext.scaling.size_checks import check_at_least

if TYPE_CHECKING:
    from pathlib import Path

FORWARD_FLOPS_PER_WEIGHT, TRAINING_FLOPS_PER_WEIGHT, ROUTER_FLOPS_PER_WEIGHT = 2, 6, 14


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by place; each is in exactly one.

    Attributes:
        input_embedding: V d.
        output_embedding: V d, or 0 where it is the input embedding.
        attention: projections with their biases, norms and sinks of all layers.
        dense: FFNs of layers without experts.
        router: of all MoE layers.
        routed: all routed experts; on a shared base, base and deltas.
        shared: experts that every token passes, their gates included.
        projections: descend and ascend of latent blocks.
        norms: of layers and of the model.
        active_routed: of ``routed``, what one token touches; not a place of its own.
    """

    input_embedding: int
    output_embedding: int
    attention: int
    dense: int
    router: int
    routed: int
    shared: int
    projections: int
    norms: int
    active_routed: int

    @property
    def always_on(self) -> int:
        """All but the routed experts and the input embedding."""
        return (
            self.output_embedding + self.attention + self.dense + self.router + self.shared + self.projections
            + self.norms
        )  # fmt: skip

    @property
    def total(self) -> int:
        """``sum(p.numel() for p in model.parameters())``."""
        return self.input_embedding + self.always_on + self.routed

    def active(self, input_embedding: bool = True) -> int:
        """What one token touches, with or without an input embedding that serves for nothing else."""
        counted = input_embedding or self.output_embedding == 0
        return self.input_embedding * counted + self.always_on + self.active_routed


@dataclass(frozen=True)
class FlopTerms:
    """FLOPs of one token by term; all of one pass kind (forward, or forward and backward)."""

    attention_projections: float
    attention_scores: float
    attention_values: float
    router: float
    experts: float
    shared: float
    dense: float
    projections: float
    unembedding: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class MoeShape:
    """A decoder-only model, layer by layer.

    Attributes:
        hidden_size: d.
        vocab_size: V.
        context_length: positions the model is made for.
        attention: of every layer.
        layers: the feed-forward part of each layer, in model order.
        tied_embeddings: the un-embedding is the input embedding.
        windows: positions that each layer attends to at most, None for all; one per layer, or empty for all None.
        layer_norms: norms of width d in a layer.
        family: where it was read from (``model_type``).
    """

    hidden_size: int
    vocab_size: int
    context_length: int
    attention: Attention
    layers: tuple[FeedForward, ...]
    tied_embeddings: bool = False
    windows: tuple[int | None, ...] = ()
    layer_norms: int = 2
    family: str = "custom"

    def __post_init__(self) -> None:
        check_at_least(self, 1, "hidden_size", "vocab_size", "context_length")
        if not self.layers:
            raise ValueError("MoeShape: layers must have at least one entry, got none")
        if self.windows and len(self.windows) != len(self.layers):
            raise ValueError(
                f"MoeShape: windows must have one entry per layer ({len(self.layers)}) or none, got {len(self.windows)}"
            )

    @classmethod
    def uniform(
        cls,
        num_layers: int,
        hidden_size: int,
        feed_forward: FeedForward,
        *,
        num_heads: int,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        vocab_size: int,
        context_length: int,
        tied_embeddings: bool = False,
        num_dense_layers: int = 0,
        dense: DenseFfn | None = None,
    ) -> "MoeShape":
        """All layers alike, after ``num_dense_layers`` dense ones; for planners.

        Raises:
            ValueError: ``hidden_size`` is not a multiple of ``num_heads`` and no ``head_dim`` is given; dense layers
                without their FFN.
        """
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(f"num_heads must divide hidden_size={hidden_size}, got {num_heads}; or pass head_dim")
            head_dim = hidden_size // num_heads
        if (num_dense_layers > 0) != (dense is not None) or not 0 <= num_dense_layers <= num_layers:
            raise ValueError(
                f"num_dense_layers must be from 0 to num_layers={num_layers} and come with dense=DenseFfn(...), got "
                f"num_dense_layers={num_dense_layers}, dense={dense}"
            )
        first = () if dense is None else (dense,) * num_dense_layers
        return cls(
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            context_length=context_length,
            attention=GroupedAttention(num_heads, num_key_value_heads or num_heads, head_dim),
            layers=first + (feed_forward,) * (num_layers - num_dense_layers),
            tied_embeddings=tied_embeddings,
        )

    @classmethod
    def from_hf(cls, source: "dict[str, Any] | str | Path | Any") -> "MoeShape":
        """From a configuration object, its dictionary, a config.json, a folder with one, or a Hub id.

        Reads the configuration only; loads no torch and runs no code of the model.

        Raises:
            ValueError: a family we do not count, or a key of it that is missing or impossible.
            OSError: there is no such file or id.
        """
        from hf_moe_ext.scaling.hf_config import read_shape

        return read_shape(source)

    @property
    def num_layers(self) -> int:
        """All of them."""
        return len(self.layers)

    @cached_property
    def moe_layers(self) -> tuple[MoeFfn, ...]:
        """Those with experts, in model order."""
        return tuple(layer for layer in self.layers if isinstance(layer, MoeFfn))

    @cached_property
    def _kinds(self) -> Counter[FeedForward]:
        return Counter(self.layers)

    @property
    def sparsity(self) -> float:
        """S = 1 - K / E over the MLP experts of all MoE layers; 0 for a dense model. It does not give N_a."""
        experts = sum(layer.num_experts for layer in self.moe_layers)
        return 1 - sum(layer.top_k for layer in self.moe_layers) / experts if experts else 0.0

    @cached_property
    def parameters(self) -> ParameterCount:
        """Exact, by place."""
        d, embedding = self.hidden_size, self.vocab_size * self.hidden_size
        moe = [(layer, count) for layer, count in self._kinds.items() if isinstance(layer, MoeFfn)]
        dense = [(layer, count) for layer, count in self._kinds.items() if isinstance(layer, DenseFfn)]
        attention = self.attention.matrix_parameters(d) + self.attention.vector_parameters(d)
        return ParameterCount(
            input_embedding=embedding,
            output_embedding=0 if self.tied_embeddings else embedding,
            attention=self.num_layers * attention,
            dense=sum(n * (layer.matrix_parameters(d) + layer.vector_parameters(d)) for layer, n in dense),
            router=sum(n * layer.router_parameters(d) for layer, n in moe),
            routed=sum(n * layer.routed_parameters(d) for layer, n in moe),
            shared=sum(n * layer.shared_parameters(d) for layer, n in moe),
            projections=sum(n * layer.projection_parameters(d) for layer, n in moe),
            norms=(self.layer_norms * self.num_layers + 1) * d,
            active_routed=sum(n * layer.active_routed_parameters(d) for layer, n in moe),
        )

    @property
    def total_parameters(self) -> int:
        """N."""
        return self.parameters.total

    @property
    def active_parameters(self) -> int:
        """N_a with the input embedding; ``parameters.active(input_embedding=False)`` for the other convention."""
        return self.parameters.active()

    def training_flops(
        self, context_length: int | None = None, router_flops_per_weight: float = ROUTER_FLOPS_PER_WEIGHT
    ) -> FlopTerms:
        """FLOPs of one token, forward and backward, in sequences of this length (None: the model's own)."""
        return self._flops(context_length, TRAINING_FLOPS_PER_WEIGHT, router_flops_per_weight)

    def forward_flops(
        self, context_length: int | None = None, router_flops_per_weight: float = FORWARD_FLOPS_PER_WEIGHT
    ) -> FlopTerms:
        """FLOPs of one token, forward alone; here the router's weights cost 2 like all others unless told otherwise."""
        return self._flops(context_length, FORWARD_FLOPS_PER_WEIGHT, router_flops_per_weight)

    def _flops(self, context_length: int | None, per_weight: int, per_router_weight: float) -> FlopTerms:
        d, length = self.hidden_size, self.context_length if context_length is None else context_length
        if length < 1:
            raise ValueError(f"context_length must be at least 1, got {length}")
        attended = sum(self.positions(length))
        logits, values = self.attention.score_widths
        moe = [(layer, n) for layer, n in self._kinds.items() if isinstance(layer, MoeFfn)]
        dense = [(layer, n) for layer, n in self._kinds.items() if isinstance(layer, DenseFfn)]
        shared = [(layer.shared, layer.shared_gate, n) for layer, n in moe if layer.shared is not None]
        latents = sum(n * 2 * d * layer.latent_size for layer, n in moe if layer.latent_size is not None)
        return FlopTerms(
            attention_projections=per_weight * self.num_layers * self.attention.matrix_parameters(d),
            attention_scores=per_weight * attended * logits,
            attention_values=per_weight * attended * values,
            router=per_router_weight * sum(n * d * layer.num_experts for layer, n in moe),
            experts=per_weight * sum(n * layer.expert_multiply_adds(d) for layer, n in moe),
            shared=per_weight * sum(n * (one.matrix_parameters(d) + d * gate) for one, gate, n in shared),
            dense=per_weight * sum(n * layer.matrix_parameters(d) for layer, n in dense),
            projections=per_weight * latents,
            unembedding=per_weight * self.vocab_size * d,
        )

    def positions(self, length: int) -> tuple[int, ...]:
        """How many of ``length`` positions each layer attends to and caches at most: all, or its window."""
        windows = self.windows or (None,) * self.num_layers
        return tuple(length if window is None else min(length, window) for window in windows)

    def kv_cache_bytes(self, num_tokens: int, num_sequences: int = 1, element_bytes: int = 2) -> int:
        """Keys and values kept for sequences of this length; latent attention keeps its compressed vectors."""
        if num_tokens < 0 or num_sequences < 1:
            raise ValueError(
                f"num_tokens must be at least 0 and num_sequences at least 1, got {num_tokens} and {num_sequences}"
            )
        return sum(self.positions(num_tokens)) * self.attention.cached_values * num_sequences * element_bytes
