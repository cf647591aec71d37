"""Closed forms of activations as others print them, for fused kernels in two bytes; our own count is in `activations.py`.

These leave out what Transformers' unfused blocks keep besides (float32 inputs of norms, an index per row, log-probabilities).
"""


def gpt_layer_bytes(
    num_sequences: int, sequence_length: int, hidden_size: int, num_heads: int, flash: bool = False
) -> int:
    """A dense GPT layer with dropout: s b d (34 + 5 a s / d); without the scores where they are not kept.

    Source: arXiv 2205.05198, section 4.1.
    """
    rows = sequence_length * num_sequences
    return 34 * rows * hidden_size + (0 if flash else 5 * rows * num_heads * sequence_length)


def moe_block_token_bytes(
    hidden_size: int, num_experts: int, top_k: int, intermediate_size: int, shared_size: int = 0, imbalance: float = 1.0
) -> float:
    """A dropless block of gated experts, per token: 2 d + 4 E + rho (2 K d + 6 K d_e + 2 K d) + 6 d_sh."""
    routed = 4 * top_k * hidden_size + 6 * top_k * intermediate_size
    return 2 * hidden_size + 4 * num_experts + imbalance * routed + 6 * shared_size
