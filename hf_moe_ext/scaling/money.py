"""What training and serving cost, and from which volume a model pays for itself; prices are the user's.

cost of training      = devices x hours x price / utilisation + bytes moved x price + one-off effort
break-even tokens     = one-off difference / saving per token
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import inf, isfinite

SECONDS_PER_HOUR = 3600
MILLION = 1e6


@dataclass(frozen=True)
class Prices:
    """In one currency.

    Attributes:
        gpu_hour: of a device for an hour.
        per_gb_moved: of 10^9 bytes that leave or enter: data sets, checkpoints, answers.
        effort_hours: of people, once.
        effort_hour: of a person for an hour.
        currency: its name, for reports.
    """

    gpu_hour: float
    per_gb_moved: float = 0.0
    effort_hours: float = 0.0
    effort_hour: float = 0.0
    currency: str = "USD"

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "currency":
                _check_amount(field.name, getattr(self, field.name))

    @property
    def effort(self) -> float:
        """One-off."""
        return self.effort_hours * self.effort_hour


@dataclass(frozen=True)
class Cost:
    """Of a one-off undertaking.

    Attributes:
        devices: rent.
        moved: bytes.
        effort: people.
        gpu_hours: behind ``devices``.
    """

    devices: float
    moved: float
    effort: float
    gpu_hours: float

    @property
    def total(self) -> float:
        """Rent, bytes and people."""
        return self.devices + self.moved + self.effort

    def as_dict(self) -> dict[str, float]:
        """With the total."""
        return {**asdict(self), "total": self.total}


def training_cost(
    prices: Prices, num_devices: int, step_s: float, num_steps: float, *, moved_bytes: float = 0.0, utilisation: float = 1.0
) -> Cost:  # fmt: skip
    """Rent of all devices for all steps; ``utilisation`` is the share of rented time in which steps run.

    Raises:
        ValueError: a number below its bound.
    """
    if num_devices < 1:
        raise ValueError(f"num_devices must be at least 1, got {num_devices}")
    for name, value in (("step_s", step_s), ("num_steps", num_steps), ("moved_bytes", moved_bytes)):
        _check_amount(name, value)
    _check_share("utilisation", utilisation)
    hours = num_devices * step_s * num_steps / SECONDS_PER_HOUR / utilisation
    return Cost(hours * prices.gpu_hour, moved_bytes / 1e9 * prices.per_gb_moved, prices.effort, hours)


@dataclass(frozen=True)
class Demand:
    """What is asked of a served model.

    Attributes:
        prefill_tokens: of prompts, for each generated token.
        utilisation: share of rented time in which the devices work at their rate.
        moved_bytes: that leave or enter, for each generated token.
    """

    prefill_tokens: float = 3.0
    utilisation: float = 0.5
    moved_bytes: float = 0.0

    def __post_init__(self) -> None:
        _check_amount("prefill_tokens", self.prefill_tokens)
        _check_amount("moved_bytes", self.moved_bytes)
        _check_share("utilisation", self.utilisation)


def serving_cost_per_million(
    prices: Prices, num_devices: int, prefill_tokens_per_s: float, decode_tokens_per_s: float, demand: Demand
) -> float:
    """Of a million generated tokens with their prompts, on one replica of this many devices.

    Raises:
        ValueError: a rate that is not above 0.
    """
    for name, rate in (("prefill_tokens_per_s", prefill_tokens_per_s), ("decode_tokens_per_s", decode_tokens_per_s)):
        if not rate > 0:
            raise ValueError(f"{name} must be above 0, got {rate}")
    seconds = MILLION * (1 / decode_tokens_per_s + demand.prefill_tokens / prefill_tokens_per_s) / demand.utilisation
    moved = MILLION * demand.moved_bytes / 1e9 * prices.per_gb_moved
    return num_devices * seconds / SECONDS_PER_HOUR * prices.gpu_hour + moved


@dataclass(frozen=True)
class BreakEven:
    """Of a candidate against an alternative.

    Attributes:
        one_off: what the candidate costs more before it serves; negative: less.
        saving_per_million: what it saves per million generated tokens; negative: it costs more.
        tokens: generated tokens from which the candidate is cheaper in all; 0: from the start; inf: never.
        until: generated tokens up to which it is cheaper in all (cheaper to make, dearer to serve); inf: for good.
    """

    one_off: float
    saving_per_million: float
    tokens: float
    until: float

    def saved(self, tokens: float) -> float:
        """In all, after this many generated tokens."""
        return tokens / MILLION * self.saving_per_million - self.one_off


def break_even(one_off: float, serving: float, alternative_one_off: float, alternative_serving: float) -> BreakEven:
    """Against a model with these one-off costs and costs per million generated tokens.

    Doing nothing is an alternative of one-off 0 that goes on serving at its present cost (0 where nothing is served).
    """
    for name, value in (("serving", serving), ("alternative_serving", alternative_serving)):
        _check_amount(name, value)
    extra, saving = one_off - alternative_one_off, alternative_serving - serving
    if extra <= 0:
        until = inf if saving >= 0 else MILLION * extra / saving
        return BreakEven(extra, saving, 0.0 if until > 0 else inf, until)
    return BreakEven(extra, saving, MILLION * extra / saving if saving > 0 else inf, inf if saving > 0 else 0.0)


def compare(
    one_off: float, serving: float, alternatives: Mapping[str, tuple[float, float]]
) -> dict[str, BreakEven]:  # fmt: skip
    """`break_even` against each named alternative: (one-off, per million generated tokens)."""
    return {name: break_even(one_off, serving, *alternative) for name, alternative in alternatives.items()}


def _check_amount(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be at least 0, got {value}")


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value}")
