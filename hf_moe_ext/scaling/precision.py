"""Bytes of a parameter, of its gradient and its optimizer states, and of what runs through the model."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Precision:
    """Widths in bytes.

    Attributes:
        name: as users say it.
        weight: of a parameter.
        gradient: of its gradient.
        optimizer: of all its optimizer states, a float32 copy of the weights included.
        stream: of the residual stream.
        matmul: of inputs and outputs of linear layers outside the experts.
        expert: of rows in the routed experts.
        casts: linear layers keep casts of their weights and inputs (autocast).
    """

    name: str
    weight: float
    gradient: float
    optimizer: float
    stream: int
    matmul: int
    expert: int
    casts: bool = False


# With AdamW's two moments in the type of the weights, as torch keeps them; "megatron" keeps float32 weights and gradients
# beside bfloat16 ones: 2 + 4 + 12 bytes. `grouped_mm` takes the experts' own type, so under autocast they stay float32.
PRECISIONS = {
    one.name: one
    for one in (
        Precision("float32", 4, 4, 8, 4, 4, 4),
        Precision("bfloat16", 2, 2, 4, 2, 2, 2),
        Precision("autocast", 4, 4, 8, 4, 2, 4, casts=True),
        Precision("megatron", 2, 4, 12, 2, 2, 2),
    )
}
# Optimizer states in numbers per parameter, beside float32 weights where they are kept.
STATES_PER_PARAMETER = {"adamw": 2, "muon": 1, "sgd_momentum": 1, "sgd": 0}


def choose_precision(name: str, optimizer: str = "adamw") -> Precision:
    """By name, for an optimizer.

    Raises:
        ValueError: unknown.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {name!r}")
    if optimizer not in STATES_PER_PARAMETER:
        raise ValueError(f"optimizer must be one of {', '.join(STATES_PER_PARAMETER)}, got {optimizer!r}")
    precision = PRECISIONS[name]
    number = 4 if name == "megatron" else precision.weight
    copy = precision.optimizer - 2 * number
    return replace(precision, optimizer=copy + number * STATES_PER_PARAMETER[optimizer])
