"""Parameters and FLOPs of MoE layers on plain numbers: the one owner of these formulas.

Two sets stand side by side: ``paper_*`` exactly as printed in BigMac's Table 3 (arXiv 2502.16927), flaws included, and the
corrected ones, which count what a layer really has.

Symbols: H `hidden_size`, R `latent_size` (r = R / H), E `num_experts`, k `top_k`, F `intermediate_size`, L `num_layers`,
V `vocab_size`, b `num_sequences`, s `sequence_length`. CDAC is the ordinary fine-grained MoE, with experts H -> R -> H; DCCA
has experts R -> F -> R between one descend H -> R and one ascend R -> H per layer. A FLOP is one multiplication or one
addition.
"""

from dataclasses import dataclass
from typing import Literal

Block = Literal["standard", "dcca"]

# --- As printed in Table 3 -----------------------------------------------------------------------------------------


def paper_parameters(
    block: Block, hidden_size: int, latent_size: int, num_experts: int, num_layers: int, vocab_size: int
) -> int:
    """Parameters of a whole GPT-3-style model: (4H^2 + 8H + (2RH + 2R)E)L + (V + E + 2)H, DCCA 2RHL more.

    Printed flaws: the router E H is counted once instead of L times, and an expert's biases as 2R instead of R + H.
    """
    per_layer = 4 * hidden_size**2 + 8 * hidden_size + (2 * latent_size * hidden_size + 2 * latent_size) * num_experts
    total = per_layer * num_layers + (vocab_size + num_experts + 2) * hidden_size
    return total + (2 * latent_size * hidden_size * num_layers if block == "dcca" else 0)


def paper_iteration_flops(
    block: Block,
    hidden_size: int,
    latent_size: int,
    top_k: int,
    num_layers: int,
    vocab_size: int,
    num_sequences: int,
    sequence_length: int,
) -> int:
    """FLOPs of one training iteration: 12 b s L H^2 (2 + s/H + V/(2LH) + rk), DCCA 12 b s L R H more.

    Three times a forward pass; the router is left out, as printed. Table 4 has V padded to 50,304.
    """
    per_layer = 2 * hidden_size**2 + sequence_length * hidden_size + latent_size * hidden_size * top_k
    if block == "dcca":
        per_layer += latent_size * hidden_size
    return num_sequences * sequence_length * (12 * num_layers * per_layer + 6 * vocab_size * hidden_size)


# --- Corrected: parameters and FLOPs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerParameters:
    """Parameters of one MoE layer, without biases.

    Attributes:
        experts: all routed experts.
        projections: descend and ascend.
        router: the router's weight.
    """

    experts: int
    projections: int
    router: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.experts + self.projections + self.router


def layer_parameters(
    block: Block,
    hidden_size: int,
    num_experts: int,
    intermediate_size: int,
    latent_size: int | None = None,
    gated: bool = False,
) -> LayerParameters:
    """Parameters of one MoE layer: experts E g width F, projections 2HR, router EH; g = 3 gated, else 2.

    Args:
        block: "standard": experts of width H, no projections. "dcca": experts of width R.
        hidden_size: H.
        num_experts: E.
        intermediate_size: F, the inner width of an expert.
        latent_size: R; only for "dcca".
        gated: whether an expert has three matrices.
    """
    width = _expert_width(block, hidden_size, latent_size)
    matrices = 3 if gated else 2
    projections = 2 * hidden_size * width if block == "dcca" else 0
    return LayerParameters(
        experts=num_experts * matrices * width * intermediate_size,
        projections=projections,
        router=num_experts * hidden_size,
    )


def model_parameters(
    block: Block, hidden_size: int, latent_size: int, num_experts: int, num_layers: int, vocab_size: int
) -> int:
    """The model of `paper_parameters` with its flaws mended: a router per layer, expert biases of R and of H."""
    mended = (num_layers - 1) * num_experts * hidden_size + num_layers * num_experts * (hidden_size - latent_size)
    return paper_parameters(block, hidden_size, latent_size, num_experts, num_layers, vocab_size) + mended


@dataclass(frozen=True)
class TokenFlops:
    """Forward FLOPs of one token in one layer; a training step costs three times as much."""

    attention: int
    router: int
    experts: int
    projections: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.attention + self.router + self.experts + self.projections


def token_flops(
    block: Block,
    hidden_size: int,
    num_experts: int,
    top_k: int,
    intermediate_size: int,
    sequence_length: int,
    latent_size: int | None = None,
    gated: bool = False,
) -> TokenFlops:
    """Forward FLOPs of one token in one layer: attention 8H^2 + 4sH, router 2HE, experts 2 g k width F, projections 4HR.

    For un-gated experts with F = H the projections cost 1/k of the experts.
    """
    width = _expert_width(block, hidden_size, latent_size)
    return TokenFlops(
        attention=8 * hidden_size**2 + 4 * sequence_length * hidden_size,
        router=2 * hidden_size * num_experts,
        experts=2 * (3 if gated else 2) * top_k * width * intermediate_size,
        projections=4 * hidden_size * width if block == "dcca" else 0,
    )


def _expert_width(block: Block, hidden_size: int, latent_size: int | None) -> int:
    if block == "standard":
        return hidden_size
    if latent_size is None:
        raise ValueError('latent_size is needed for block="dcca", got None; pass the width of the latent')
    return latent_size
