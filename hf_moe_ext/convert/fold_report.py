"""What a fold did: numbers for machines and a few lines for people."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class FoldReport:
    """All of a fold.

    Attributes:
        source: what was folded.
        output: the folder.
        model_type: of the stock model.
        factors: kind of tensor -> what its values were multiplied by.
        num_scaled: kind of tensor -> how many tensors of the result have been.
        num_tensors: of the result.
        num_parameters: of the result.
        bit_equal: whether equal logits are promised to the last bit: every factor a power of two, and all products within
            the range of the checkpoint's type. Otherwise they are equal up to that type's rounding.
        rounded: kinds of tensors at which digits are lost.
        max_logit_difference: greatest difference of a logit on random tokens; None if it was not looked at.
        max_logit: greatest magnitude among these logits.
        written: False for a dry run.
    """

    source: str
    output: str
    model_type: str
    factors: dict[str, float]
    bit_equal: bool
    rounded: list[str]
    num_scaled: dict[str, int] = field(default_factory=dict)
    num_tensors: int = 0
    num_parameters: int = 0
    max_logit_difference: float | None = None
    max_logit: float | None = None
    written: bool = False
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    def as_text(self) -> str:
        """The same to read."""
        lines = [f"{self.source} to a stock {self.model_type} model"]
        for kind, factor in self.factors.items():
            count = f"{self.num_scaled.get(kind, 0)} tensors" if self.written else ""
            lines.append(
                f"  {kind:12} {'as it is' if factor == 1 else f'x {factor:.6g}':14} {count if factor != 1 else ''}"
            )
        promise = "equal to the last bit"
        if not self.bit_equal:
            promise = f"equal up to rounding, at {', '.join(self.rounded)}: no powers of two, or products below the type's range"
        lines.append(f"logits: {promise}")
        if self.max_logit_difference is not None:
            lines.append(
                f"compared on random tokens: greatest difference {self.max_logit_difference:.3g}, "
                f"greatest logit {self.max_logit:.3g}"
            )
        if self.written:
            lines.append(f"{self.num_tensors} tensors, {self.num_parameters:,} parameters, {self.seconds:.0f} s")
        lines.append(f"written to {self.output}" if self.written else f"nothing written to {self.output} (dry run)")
        return "\n".join(line.rstrip() for line in lines)
