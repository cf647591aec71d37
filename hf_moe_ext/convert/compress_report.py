"""What a compression did: numbers for machines and a table for people."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_moe_ext.convert.conversion_report import without_infinities

REPORT_FILE = "compress.json"


@dataclass
class MatrixReport:
    """One matrix ("gate", "up" or "down") of all experts of a layer.

    Attributes:
        layer: decoder layer.
        matrix: which.
        encoding: method and numbers.
        least_cosine: of an expert to the base.
        mean_cosine: over the experts.
        relative_norm: ||D|| / ||W||, mean over the experts; the cosine alone is blind to rescaling.
        predicted_error: relative output error of the experts, root mean square, before anything was encoded; exact
            expectation for a random drop. Inputs are taken as uncorrelated, of the size that the norm before them gives.
            None where only encoding tells.
        output_error: the same of what was written; None for a dry run.
        distance_before: mean ||W_i - W_j|| over pairs of experts, over the mean ||W_i||.
        distance_after: the same of base plus decoded delta.
        bytes_before: of the experts.
        bytes_after: of base and deltas, indices, scales and seeds counted; of the experts again in a stock export.
    """

    layer: int
    matrix: str
    encoding: str
    least_cosine: float
    mean_cosine: float
    relative_norm: float
    distance_before: float
    bytes_before: int
    bytes_after: int
    predicted_error: float | None = None
    output_error: float | None = None
    distance_after: float | None = None


@dataclass
class CalibrationReport:
    """Perplexity before and after on a text.

    Attributes:
        origin: the text.
        num_tokens: that were predicted.
        perplexity_before: of the source.
        perplexity_after: of the result.
        loss_rise: nats per token.
        worst_slice: the slice whose loss rises most.
        worst_rise: its rise.
        slices: slice -> tokens, loss before, loss after, rise.
    """

    origin: str
    num_tokens: int
    perplexity_before: float
    perplexity_after: float
    loss_rise: float
    worst_slice: str
    worst_rise: float
    slices: dict[str, dict[str, float]]


@dataclass
class CompressReport:
    """All of a compression.

    Attributes:
        source: what was compressed.
        output: the folder.
        settings: as asked for.
        matrices: one row for each matrix of each layer.
        warnings: sentences that were also logged.
        base_errors: "layer.matrix" -> squared error after encoding of the least-squares base, over that of the mean.
        file_bytes_before: of the source's safetensors files.
        file_bytes_after: of the result's; None for a dry run.
        predicted_file_bytes: upper bound known before anything was written.
        largest_stack_bytes: the largest stack of experts, or tensor, of the source: what memory is counted in.
        peak_memory_bytes: most that this process held, all of its life; None where the system does not say.
        calibration: None without a text.
        written: False for a dry run.
    """

    source: str
    output: str
    settings: dict[str, Any]
    matrices: list[MatrixReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    base_errors: dict[str, float] = field(default_factory=dict)
    file_bytes_before: int = 0
    file_bytes_after: int | None = None
    predicted_file_bytes: int = 0
    largest_stack_bytes: int = 0
    peak_memory_bytes: int | None = None
    calibration: CalibrationReport | None = None
    written: bool = False
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON; an infinity or NaN is null."""
        values: dict[str, Any] = without_infinities(asdict(self))
        return values

    def write(self, folder: Path) -> None:
        """Leave the report beside the weights."""
        (folder / REPORT_FILE).write_text(
            json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )

    def as_text(self) -> str:
        """The same to read: a row for each matrix, then the sums."""
        s = self.settings
        to = "a stock checkpoint" if s.get("export") == "stock" else "shared base and deltas"
        lines = [f"{self.source} to {to}, base {s['base']}, {s['encode']}"]
        heads = ("layer", "matrix", "cosine", "|D|/|W|", "error", "distance", "after", "bytes", "after", "encoding")
        rows = [heads, *map(_row, self.matrices)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
        lines += ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
        lines += [f"warning: {sentence}" for sentence in self.warnings]
        after = self.file_bytes_after if self.file_bytes_after is not None else self.predicted_file_bytes
        share = after / self.file_bytes_before if self.file_bytes_before else 0.0
        lines.append(f"files: {self.file_bytes_before:,} bytes -> {after:,} ({share:.1%})")
        if self.calibration is not None:
            c = self.calibration
            lines.append(
                f"perplexity on {c.num_tokens:,} tokens of {c.origin}: {c.perplexity_before:.5g} -> "
                f"{c.perplexity_after:.5g} ({c.loss_rise:+.4f} nats); worst slice {c.worst_slice!r} "
                f"({c.worst_rise:+.4f} on {c.slices[c.worst_slice]['num_tokens']:,.0f} tokens)"
            )
        done = f"written to {self.output}, {self.seconds:.0f} s"
        lines.append(done if self.written else f"nothing written to {self.output} (dry run)")
        return "\n".join(lines)


def _row(row: MatrixReport) -> tuple[str, ...]:
    error = row.predicted_error if row.output_error is None else row.output_error
    return (
        str(row.layer), row.matrix, f"{row.least_cosine:.5f}", f"{row.relative_norm:.3g}", _number(error),
        f"{row.distance_before:.3g}", _number(row.distance_after), f"{row.bytes_before:,}", f"{row.bytes_after:,}",
        row.encoding,
    )  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
