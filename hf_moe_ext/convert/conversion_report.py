"""What a conversion did: numbers for machines (JSON) and a table for people."""

import json
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

REPORT_FILE = "conversion.json"


@dataclass(frozen=True)
class LayerReport:
    """One converted layer, measured on held-out rows; both errors are ratios of squared norms.

    Attributes:
        layer: its number.
        relative_output_error: block's output against the source's block on the same inputs.
        relative_hidden_error: hidden states after the layer against those of the source model.
        fewest_tokens: calibration tokens of the least used expert.
        experts_without_tokens: experts that no calibration token chose; they keep the source's weights, projected.
    """

    layer: int
    relative_output_error: float
    relative_hidden_error: float
    fewest_tokens: int
    experts_without_tokens: int


@dataclass
class ConversionReport:
    """All of a conversion; perplexities are of the same held-out rows."""

    source: str
    output: str
    settings: dict[str, Any]
    calibration_tokens: int
    held_out_tokens: int
    layers: list[LayerReport] = field(default_factory=list)
    perplexity_source: float = float("nan")
    perplexity_converted: float = float("nan")
    perplexity_distilled: float | None = None
    distillation_losses: list[float] = field(default_factory=list)
    num_parameters_source: int = 0
    num_parameters: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int | None = None

    @property
    def recovered_fraction(self) -> float | None:
        """Share of the perplexity lost by the conversion that the distillation won back; None without one."""
        lost = self.perplexity_converted - self.perplexity_source
        if self.perplexity_distilled is None or lost <= 0:
            return None
        return (self.perplexity_converted - self.perplexity_distilled) / lost

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "recovered_fraction": self.recovered_fraction}

    def write(self, folder: Path) -> None:
        """Leave the report beside the weights."""
        text = json.dumps(without_infinities(self.as_dict()), indent=1, allow_nan=False)
        (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")


def without_infinities(value: Any) -> Any:
    """JSON knows no infinity and no NaN: null stands for them."""
    if isinstance(value, dict):
        return {key: without_infinities(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_infinities(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def peak_memory_bytes() -> int | None:
    """Most memory this process ever held, accelerators apart; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def print_report(report: ConversionReport, console: "Console") -> None:
    """The table of the layers, then the perplexities."""
    from rich.table import Table

    console.print(f"{report.source} to DCCA, latent size {report.settings['latent_size']}", soft_wrap=True)
    table = Table()
    for heading in ("layer", "output error", "hidden error", "fewest tokens", "unused experts"):
        table.add_column(heading, justify="right")
    for row in report.layers:
        errors = (f"{row.relative_output_error:.3g}", f"{row.relative_hidden_error:.3g}")
        table.add_row(str(row.layer), *errors, str(row.fewest_tokens), str(row.experts_without_tokens))
    console.print(table)
    line = f"perplexity on {report.held_out_tokens:,} held-out tokens: source {report.perplexity_source:.4g}"
    line += f", converted {report.perplexity_converted:.4g}"
    if report.perplexity_distilled is not None:
        line += f", distilled {report.perplexity_distilled:.4g}"
    if report.recovered_fraction is not None:
        line += f" ({report.recovered_fraction:.0%} of the gap recovered)"
    console.print(line, soft_wrap=True)
    memory = "" if report.peak_memory_bytes is None else f", peak memory {report.peak_memory_bytes / 2**30:.2f} GiB"
    console.print(
        f"parameters {report.num_parameters_source:,} -> {report.num_parameters:,}; {report.seconds:.0f} s{memory}"
    )
    console.print(f"written to {report.output}", soft_wrap=True)
