"""What the doctor found, as plain data: the tables and the JSON are two views of it."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hf_moe_ext.perft.report import TrainableRow, sum_rows

# float32 weight, its gradient, and the two moments of Adam: 4 bytes each.
TRAINING_BYTES_PER_PARAMETER = 16


class TargetError(ValueError):
    """What the doctor was pointed at cannot be examined at all; the message says why and what to pass instead."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
        level: "error": it will not work, or not do what it says; "warning": it works.
        code: stable short name, for machines.
        message: what was found.
        next_step: what to do about it; empty where the message says it.
        tensors: names of all tensors concerned (the message shows the first few).
    """

    level: Literal["error", "warning"]
    code: str
    message: str
    next_step: str = ""
    tensors: tuple[str, ...] = ()


class FindingError(Exception):
    """Carries the finding after which there is nothing more to examine."""

    def __init__(self, code: str, message: str, next_step: str = "") -> None:
        super().__init__(message)
        self.finding = Finding("error", code, message, next_step)


@dataclass(frozen=True)
class BaseSummary:
    """The base model, as its configuration describes it.

    Attributes:
        source: Hub id or folder the configuration came from.
        model_class: class it was built as.
        model_type: its configuration's.
        parameters: how many it has; tied ones count once.
        dtype: of most of them.
        weight_bytes: all of them in their dtype, unquantised.
        quantization: method named by its configuration, else None.
    """

    source: str
    model_class: str
    model_type: str
    parameters: int
    dtype: str
    weight_bytes: int
    quantization: str | None = None


@dataclass(frozen=True)
class RouterSummary:
    """Where the adapters' routing weights come from.

    Attributes:
        base_rule: the base router in words, one line per kind of block.
        normalize_top_k: R: what ``normalize_top_k`` resolved to; None for the other variants.
        reason: why, in words.
    """

    base_rule: str
    normalize_top_k: bool | None
    reason: str


@dataclass
class Diagnosis:
    """All that was found about a model with a new adapter, or about a saved adapter.

    Attributes:
        target: what was examined.
        kind: which of the two.
        settings: the adapter's own settings (variant, adapter, r, ...); empty if they were refused.
        base: None where the base model could not be read.
        rows: adapted modules, in layer order.
        also_trains: further trainable tensors (``modules_to_save``, biases) -> shape.
        file_bytes: the adapter file: its size on disk, or of the tensors it would hold.
        router: None where no adapter could be attached.
        findings: errors and warnings, in the order they were found.
    """

    target: str
    kind: Literal["model", "adapter"]
    settings: dict[str, Any] = field(default_factory=dict)
    base: BaseSummary | None = None
    rows: list[TrainableRow] = field(default_factory=list)
    also_trains: dict[str, tuple[int, ...]] = field(default_factory=dict)
    file_bytes: int | None = None
    router: RouterSummary | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing is wrong; warnings are allowed."""
        return all(finding.level != "error" for finding in self.findings)

    @property
    def adapter_parameters(self) -> int:
        """Parameters stored by the adapters of all modules."""
        return sum_rows(self.rows)[0]

    @property
    def active_parameters(self) -> int | None:
        """Adapter parameters one token uses; None where a row does not know."""
        return sum_rows(self.rows)[1]

    @property
    def trainable_parameters(self) -> int:
        """Adapter parameters and whatever else trains."""
        return self.adapter_parameters + sum(math.prod(shape) for shape in self.also_trains.values())

    @property
    def training_bytes(self) -> int:
        """Weights, gradients and Adam moments of all that trains; neither activations nor the base model."""
        return TRAINING_BYTES_PER_PARAMETER * self.trainable_parameters

    @property
    def share_of_base(self) -> float | None:
        """Trainable parameters over those of the base model."""
        return self.trainable_parameters / self.base.parameters if self.base and self.base.parameters else None

    def as_dict(self) -> dict[str, Any]:
        """The diagnosis for ``json.dumps``; sizes in bytes, counts in parameters."""
        return {
            "target": self.target,
            "kind": self.kind,
            "ok": self.ok,
            "settings": self.settings,
            "base": None if self.base is None else asdict(self.base),
            "modules": [asdict(row) for row in self.rows],
            "also_trains": self.also_trains,
            "parameters": {
                "adapter": self.adapter_parameters,
                "adapter_active_per_token": self.active_parameters,
                "trainable": self.trainable_parameters,
                "share_of_base": self.share_of_base,
            },
            "cost": {
                "adapter_file_bytes": self.file_bytes,
                "training_state_bytes": self.training_bytes,
                "base_weight_bytes": None if self.base is None else self.base.weight_bytes,
                "not_included": "activations, and whatever the optimizer or the loader keep beside the parameters",
            },
            "router": None if self.router is None else asdict(self.router),
            "findings": [asdict(finding) for finding in self.findings],
        }
