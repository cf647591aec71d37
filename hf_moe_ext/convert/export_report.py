"""What an export did: numbers for machines and a few lines for people."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class ExportReport:
    """All of an export.

    Attributes:
        source: what was exported.
        output: the folder.
        model_type: of the result.
        layers: whose experts shared a base.
        kept: what kept the result from being a stock model, as ``key=value``; empty for a stock one.
        can_fold: whether ``fold`` makes a stock model of the result.
        num_parameters: of the result.
        num_bytes: of its tensors.
        max_logit_difference: greatest difference of a logit on random tokens, computed in at least float32 with base plus
            delta rounded as they are stored; None if it was not looked at.
        rounding: greatest difference of a logit that this rounding makes; 0 where weights have 32 bits or more; None if it
            was not looked at.
        max_logit: greatest magnitude among these logits.
        written: False for a dry run.
        seconds: for all of it.
    """

    source: str
    output: str
    model_type: str
    layers: list[int]
    kept: list[str]
    can_fold: bool
    num_parameters: int = 0
    num_bytes: int = 0
    max_logit_difference: float | None = None
    rounding: float | None = None
    max_logit: float | None = None
    written: bool = False
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    def as_text(self) -> str:
        """The same to read."""
        kind = self.model_type if self.kept else f"stock {self.model_type}"
        lines = [f"{self.source} to a {kind} model; {len(self.layers)} layers had experts with a shared base"]
        if self.kept:
            told = "; hf-moe fold makes a stock model of it" if self.can_fold else ""
            lines.append(f"not a stock model, because of {', '.join(self.kept)}{told}")
        if self.max_logit_difference is not None:
            lines.append(
                f"compared on random tokens: greatest difference {self.max_logit_difference:.3g}, "
                f"greatest logit {self.max_logit:.3g}"
            )
        if self.rounding:
            lines.append(f"storing base plus delta in 16 bits changes logits by up to {self.rounding:.3g}")
        if self.written:
            lines.append(f"{self.num_parameters:,} parameters, {self.num_bytes:,} bytes, {self.seconds:.0f} s")
        lines.append(f"written to {self.output}" if self.written else f"nothing written to {self.output} (dry run)")
        return "\n".join(lines)
