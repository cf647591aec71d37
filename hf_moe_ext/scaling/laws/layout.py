"""Idealised layouts that published tables were computed with: depth d / 64 as a continuous number, top-1 routing.

For comparing laws only. What a planner returns is priced by ``MoeShape``.
"""

from dataclasses import dataclass

ABNAR_VOCAB_SIZE, ABNAR_CONTEXT_LENGTH = 50_432, 2048
HEAD_WIDTH = 64


@dataclass(frozen=True)
class IdealLayout:
    """A decoder of width d and depth n = d / 64, E experts of which one is used.

    Attributes:
        hidden_size: d, any positive number.
        expert_ratio: E; 1 is a dense model.
        ffn_ratio: inner width of an expert over d, gated: 4 in Abnar's, 3 in the Joint law's models.
        vocab_size: V; embeddings in and out.
        context_length: for FLOPs of attention.
    """

    hidden_size: float
    expert_ratio: float
    ffn_ratio: int = 4
    vocab_size: int = ABNAR_VOCAB_SIZE
    context_length: int = ABNAR_CONTEXT_LENGTH

    @property
    def num_layers(self) -> float:
        """N."""
        return self.hidden_size / HEAD_WIDTH

    def _count(self, experts: float) -> float:
        d = self.hidden_size
        return self.num_layers * (4 + 3 * self.ffn_ratio * experts) * d**2 + 2 * self.vocab_size * d

    @property
    def total_parameters(self) -> float:
        """N (4 + 3 f E) d^2 + 2 V d; the router left out."""
        return self._count(self.expert_ratio)

    @property
    def active_parameters(self) -> float:
        """The same with E = 1."""
        return self._count(1)

    @property
    def training_flops(self) -> float:
        """Per token, arXiv 2501.12370, equation 9: 6 n d^2 (4 + 2 n_ctx/d + 3 f) + 6 V d."""
        d = self.hidden_size
        weights = self.num_layers * (4 + 3 * self.ffn_ratio) * d**2 + self.vocab_size * d
        return 6 * (weights + 2 * self.num_layers * self.context_length * d)
