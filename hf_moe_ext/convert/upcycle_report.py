"""What an upcycling did: numbers for machines and a few lines for people."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REPORT_FILE = "upcycle.json"


@dataclass
class UpcycledLayer:
    """One decoder layer of the result.

    Attributes:
        layer: its number.
        block: "ders", "standard" (full copies) or "dense" (the parent's FFN as it was).
        added_parameters: beyond the parent's layer.
        gate_sum: mean sum of a token's gates on random tokens, where they are not made to sum to 1.
    """

    layer: int
    block: str
    added_parameters: int = 0
    gate_sum: float | None = None


@dataclass
class UpcycleReport:
    """All of an upcycling.

    Attributes:
        source: the dense parent.
        output: the folder.
        settings: the arguments that say what the result is.
        parent_type: ``model_type`` of the parent.
        model_type: of the result.
        num_parameters_before: of the parent.
        num_parameters: of the result; codes of quantised deltas are no parameters, their bytes count.
        num_active_parameters: those that one token passes: all but the experts that it is not sent to.
        added_parameters: by part: "router", "deltas", "expert_biases", "copies", "universal".
        num_bytes_before: of the parent's tensors on disk.
        num_bytes: of the result's.
        added_bytes: by part, as ``added_parameters``.
        vanilla_bytes: of the same model with full copies for experts.
        layers: one entry for each.
        max_logit_difference: greatest difference of a logit on random tokens from the parent's, or where gates do not sum
            to 1 from the parent's with each FFN times its tokens' sum of gates; None if it was not looked at.
        max_change: greatest difference from the parent's logits as they are.
        max_logit: greatest magnitude among the parent's logits.
        bound: what ``max_logit_difference`` had to stay below.
        warnings: what to know before training.
        written: False for a dry run.
    """

    source: str
    output: str
    settings: dict[str, Any]
    parent_type: str
    model_type: str
    num_parameters_before: int = 0
    num_parameters: int = 0
    num_active_parameters: int = 0
    added_parameters: dict[str, int] = field(default_factory=dict)
    num_bytes_before: int = 0
    num_bytes: int = 0
    added_bytes: dict[str, int] = field(default_factory=dict)
    vanilla_bytes: int = 0
    layers: list[UpcycledLayer] = field(default_factory=list)
    max_logit_difference: float | None = None
    max_change: float | None = None
    max_logit: float | None = None
    bound: float | None = None
    warnings: list[str] = field(default_factory=list)
    written: bool = False
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    def write(self, folder: Path) -> None:
        """Leave the report beside the weights."""
        text = json.dumps(self.as_dict(), indent=1, allow_nan=False)
        (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")

    def as_text(self) -> str:
        """The same to read."""
        s = self.settings
        experts = [layer.layer for layer in self.layers if layer.block != "dense"]
        what = f"{s['num_experts']} experts, top {s['top_k']}, in {len(experts)} of {len(self.layers)} layers"
        lines = [f"{self.source} ({self.parent_type}) to {self.model_type}: {what}"]
        before, after = self.num_parameters_before, self.num_parameters
        lines.append(
            f"  parameters {before:,} -> {after:,} (x {after / before:.3f}), active {self.num_active_parameters:,}"
        )
        for part, count in self.added_parameters.items():
            lines.append(f"    {part:14} {count:>16,} parameters {self.added_bytes[part]:>18,} bytes")
        lines.append(
            f"  bytes {self.num_bytes_before:,} -> {self.num_bytes:,}; with full copies {self.vanilla_bytes:,}"
        )
        lines += self._logit_lines()
        lines += [f"  warning: {text}" for text in self.warnings]
        end = (
            f"written to {self.output}, {self.seconds:.0f} s"
            if self.written
            else f"nothing written to {self.output} (dry run)"
        )
        return "\n".join([*lines, end])

    def _logit_lines(self) -> list[str]:
        if self.max_logit_difference is None:
            return ["  logits: not compared"]
        assert self.bound is not None
        sums = [layer.gate_sum for layer in self.layers if layer.gate_sum is not None]
        size = f"{self.max_logit_difference:.3g} (bound {self.bound:.3g}, greatest logit {self.max_logit:.3g})"
        if not sums:
            return [f"  logits equal the parent's on random tokens: greatest difference {size}"]
        return [
            f"  logits differ from the parent's by up to {self.max_change:.3g}: each layer starts as the sum of the kept "
            f"probabilities, {min(sums):.3f} to {max(sums):.3f} on average, times the dense FFN",
            f"  against the parent with its FFNs times these sums: greatest difference {size}",
        ]
