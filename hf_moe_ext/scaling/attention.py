"""Attention of one layer on plain numbers: parameters, multiply-adds per token, what it caches.

Symbols: d ``hidden_size``, a ``num_heads``. A layer's attention is grouped (every head its own query, heads share keys
and values) or latent (MLA, arXiv 2405.04434, section 2.1: keys and values come out of one compressed vector).
"""

from dataclasses import dataclass
from typing import Literal

from hf_moe_ext.scaling.size_checks import check_at_least

QueryKeyNorm = Literal["none", "head", "full"]


@dataclass(frozen=True)
class GroupedAttention:
    """Multi-head, grouped-query or multi-query attention.

    Attributes:
        num_heads: query heads a.
        num_key_value_heads: heads of keys and of values.
        head_dim: of one head; a head_dim need not be d.
        qkv_bias: biases of the three input projections.
        output_bias: bias of the output projection.
        query_key_norm: scales of the norms on queries and keys: none, one head's, or all heads'.
        sinks: one learned logit per head (GPT-OSS).
    """

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    query_key_norm: QueryKeyNorm = "none"
    sinks: bool = False

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_heads", "num_key_value_heads", "head_dim")
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_heads={self.num_heads}, got {self.num_key_value_heads}"
            )
        if self.query_key_norm not in ("none", "head", "full"):
            raise ValueError(f"query_key_norm must be 'none', 'head' or 'full', got {self.query_key_norm!r}")

    @property
    def query_size(self) -> int:
        """All heads' queries."""
        return self.num_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """All key heads; values take as much."""
        return self.num_key_value_heads * self.head_dim

    def matrix_parameters(self, hidden_size: int) -> int:
        """Entries of the projections, one multiply-add per token each: 2 d d_q + 2 d d_kv."""
        return 2 * hidden_size * (self.query_size + self.key_size)

    def vector_parameters(self, hidden_size: int) -> int:
        """Biases, scales of norms, sinks."""
        inputs = self.query_size + 2 * self.key_size
        norms = {"none": 0, "head": 2 * self.head_dim, "full": self.query_size + self.key_size}[self.query_key_norm]
        biases = inputs * self.qkv_bias + hidden_size * self.output_bias
        return biases + norms + self.num_heads * self.sinks

    @property
    def score_widths(self) -> tuple[int, int]:
        """Multiply-adds per token and attended position: of the logits, of the weighted values."""
        return self.query_size, self.query_size

    @property
    def cached_values(self) -> int:
        """Numbers kept per token for generation: keys and values."""
        return 2 * self.key_size


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention; the cache holds the compressed vector and the rotary key.

    Attributes:
        num_heads: a.
        key_value_rank: width of the compressed keys and values (``kv_lora_rank``).
        query_rank: width of the compressed queries; None: queries come straight from the hidden state.
        nope_head_dim: of a query or key head, without position.
        rope_head_dim: with position; one key for all heads.
        value_head_dim: of a value head.
        bias: biases of the down-projections and of the output projection.
    """

    num_heads: int
    key_value_rank: int
    query_rank: int | None
    nope_head_dim: int
    rope_head_dim: int
    value_head_dim: int
    bias: bool = False

    def __post_init__(self) -> None:
        check_at_least(
            self, 1, "num_heads", "key_value_rank", "nope_head_dim", "rope_head_dim", "value_head_dim", "query_rank"
        )

    @property
    def query_size(self) -> int:
        """All heads' queries."""
        return self.num_heads * (self.nope_head_dim + self.rope_head_dim)

    def matrix_parameters(self, hidden_size: int) -> int:
        """Entries of the projections, one multiply-add per token each."""
        rank = self.query_rank
        queries = hidden_size * self.query_size if rank is None else rank * (hidden_size + self.query_size)
        down = hidden_size * (self.key_value_rank + self.rope_head_dim)
        up = self.key_value_rank * self.num_heads * (self.nope_head_dim + self.value_head_dim)
        return queries + down + up + self.num_heads * self.value_head_dim * hidden_size

    def vector_parameters(self, hidden_size: int) -> int:
        """Scales of the norms on the compressed vectors, and biases."""
        rank = self.query_rank or 0
        biases = rank + self.key_value_rank + self.rope_head_dim + hidden_size
        return rank + self.key_value_rank + biases * self.bias

    @property
    def score_widths(self) -> tuple[int, int]:
        """Multiply-adds per token and attended position: of the logits, of the weighted values."""
        return self.query_size, self.num_heads * self.value_head_dim

    @property
    def cached_values(self) -> int:
        """Numbers kept per token for generation."""
        return self.key_value_rank + self.rope_head_dim


Attention = GroupedAttention | LatentAttention
