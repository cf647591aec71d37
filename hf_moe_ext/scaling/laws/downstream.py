"""Cautions about downstream tasks: findings that are no numbers.

Few-shot error follows the loss whatever the sparsity, except in reading comprehension (SQuAD, CoQA, BoolQ), where denser
models do slightly better at equal loss (arXiv 2501.12370). Reasoning is best near 20 tokens per total parameter and at equal
loss prefers larger K; memorisation likes fewer tokens per total parameter (arXiv 2508.18672).
"""

from typing import Literal, get_args

from hf_moe_ext.scaling.laws.card import Flag
from hf_moe_ext.scaling.shape import MoeShape

Target = Literal["general", "reading", "reasoning"]
# "Far below" 20 tokens per total parameter, as a flag's bound.
REASONING_TOKENS_PER_PARAMETER, FAR_BELOW = 20.0, 10.0


def check_downstream(shape: MoeShape, num_tokens: float, target: Target = "general") -> tuple[Flag, ...]:
    """Flags for a sparse shape and a purpose; none for a dense one or for "general".

    Raises:
        ValueError: no such purpose.
    """
    if target not in get_args(Target):
        raise ValueError(f"target must be one of {', '.join(get_args(Target))}, got {target!r}")
    if target == "general" or shape.sparsity == 0:
        return ()
    if target == "reading":
        return (Flag("caution", "reading comprehension: denser models do slightly better at equal loss (2501.12370)"),)
    flags = [Flag("caution", "reasoning: at equal loss larger top_k does better (2508.18672)")]
    per_parameter = num_tokens / shape.total_parameters
    if per_parameter < FAR_BELOW:
        flags.append(
            Flag(
                "caution",
                f"reasoning is best near {REASONING_TOKENS_PER_PARAMETER:.0f} tokens per total parameter (2508.18672); "
                f"here {per_parameter:.3g}",
            )
        )
    return tuple(flags)
