"""What a plan is asked for: budget, devices, data, demand, and every assumption that enters its numbers."""

from dataclasses import dataclass, field
from math import isfinite, log2

from hf_moe_ext.scaling.hardware import Hardware
from hf_moe_ext.scaling.laws.downstream import Target
from hf_moe_ext.scaling.laws.leverage import batch_tokens as published_batch_tokens
from hf_moe_ext.scaling.money import SECONDS_PER_HOUR, Demand, Prices
from hf_moe_ext.scaling.precision import choose_precision
from hf_moe_ext.scaling.rank_seconds import Efficiency
from hf_moe_ext.scaling.size_checks import check_at_least

BUDGETS = ("budget_flops", "gpu_hours", "money")
FAMILIES = ("olmoe_ext", "mixtral_ext")
BLOCKS = ("standard", "dcca", "ders")
# Fewer tokens per active parameter than this was fitted by no law.
FEWEST_TOKENS_PER_PARAMETER = 1.0


@dataclass(frozen=True)
class Inference:
    """What will be asked of the trained model.

    Attributes:
        generated_tokens: over its whole life.
        context_length: of a sequence, prompt and answer.
        num_sequences: at a time, on one rank.
        demand: prompt tokens per generated one, use of the devices, bytes moved.
        present_cost_per_million: of what serves today, for "doing nothing"; None where nothing does.
    """

    generated_tokens: float
    context_length: int = 4096
    num_sequences: int = 32
    demand: Demand = field(default_factory=Demand)
    present_cost_per_million: float | None = None

    def __post_init__(self) -> None:
        check_at_least(self, 1, "context_length", "num_sequences")
        _check_positive("generated_tokens", self.generated_tokens)
        if self.present_cost_per_million is not None and not self.present_cost_per_million >= 0:
            raise ValueError(f"present_cost_per_million must be at least 0, got {self.present_cost_per_million}")


@dataclass(frozen=True)
class PlanRequest:
    """One question to the planner; exactly one of the three budgets.

    Attributes:
        hardware: of all devices.
        num_devices: how many train.
        budget_flops: training FLOPs C = F_tok D.
        gpu_hours: rented device hours.
        money: for rent, moved bytes and effort; needs ``prices``.
        prices: of one currency; without them nothing is told in money.
        memory_bytes: of a device that a step may allocate; None: the hardware's less ``memory_reserve``.
        memory_reserve: share left to CUDA contexts, fragmentation and libraries.
        token_supply: different training tokens there are; None: enough.
        max_epochs: how often each may be read.
        inference: demand on the trained model.
        vocab_size: V.
        context_length: of training sequences.
        family: of the emitted configuration.
        blocks: kinds of MoE blocks that are enumerated, beside dense ones.
        precision: a name of `precision.PRECISIONS`; "autocast" is what ``bf16=True`` of the Trainer does.
        efficiency: of the roofline; assumptions until `calibrate` measured them.
        imbalance: rows of the busiest rank over the mean.
        utilisation: share of rented time in which steps run.
        batch_tokens: of one optimizer step; None: the power of two nearest a published fit.
        moved_bytes: data and checkpoints that are paid for.
        target: what the model is for; a caution, never a number.
        indifference: plans this near the best in quality count as equal, and the cheaper one is recommended.
    """

    hardware: Hardware
    num_devices: int = 1
    budget_flops: float | None = None
    gpu_hours: float | None = None
    money: float | None = None
    prices: Prices | None = None
    memory_bytes: float | None = None
    memory_reserve: float = 0.1
    token_supply: float | None = None
    max_epochs: float = 1.0
    inference: Inference | None = None
    vocab_size: int = 50304
    context_length: int = 4096
    family: str = "olmoe_ext"
    blocks: tuple[str, ...] = BLOCKS
    precision: str = "autocast"
    efficiency: Efficiency = field(default_factory=Efficiency)
    imbalance: float = 1.0
    utilisation: float = 0.9
    batch_tokens: int | None = None
    moved_bytes: float = 0.0
    target: Target = "general"
    indifference: float = 0.05

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_devices", "vocab_size", "context_length", "batch_tokens")
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one budget of budget_flops, gpu_hours and money, got {', '.join(given) or 'none'}"
            )
        for name in (*given, "memory_bytes", "token_supply", "max_epochs"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        if self.money is not None and (self.prices is None or self.prices.gpu_hour <= 0):
            raise ValueError("a budget in money needs prices with gpu_hour above 0; give the price of a device's hour")
        for name, low_open in (("memory_reserve", False), ("utilisation", True)):
            value = getattr(self, name)
            if not (0 < value <= 1 if low_open else 0 <= value < 1):
                bounds = "above 0 and at most 1" if low_open else "at least 0 and below 1"
                raise ValueError(f"{name} must be {bounds}, got {value}")
        if not 0 <= self.indifference < 1:
            raise ValueError(f"indifference must be at least 0 and below 1, got {self.indifference}")
        if not self.imbalance >= 1:
            raise ValueError(f"imbalance must be at least 1, got {self.imbalance}")
        if self.family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {self.family!r}")
        unknown = [block for block in self.blocks if block not in BLOCKS]
        if unknown or not self.blocks:
            raise ValueError(f"blocks must be some of {', '.join(BLOCKS)}, got {', '.join(unknown) or 'none'}")
        choose_precision(self.precision)
        self._check_money()
        self._check_batch()

    def _check_money(self) -> None:
        if self.money is None or self.prices is None:
            return
        fixed = self.prices.effort + self.moved_bytes / 1e9 * self.prices.per_gb_moved
        if self.money <= fixed:
            raise ValueError(
                f"money={self.money:g} {self.prices.currency} leaves nothing for devices: effort and moved bytes alone take "
                f"{fixed:g}, {fixed - self.money:g} more"
            )

    def _check_batch(self) -> None:
        least = self.num_devices * self.context_length
        if self.batch_tokens is not None and self.batch_tokens % least:
            raise ValueError(
                f"batch_tokens must be a multiple of num_devices * context_length = {least}, got {self.batch_tokens}"
            )

    @property
    def usable_bytes(self) -> float:
        """Of a device, for one step."""
        if self.memory_bytes is not None:
            return self.memory_bytes
        return self.hardware.memory_bytes * (1 - self.memory_reserve)

    @property
    def rented_hours(self) -> float | None:
        """Device hours that the budget buys; None for a budget in FLOPs."""
        if self.money is not None and self.prices is not None:
            fixed = self.prices.effort + self.moved_bytes / 1e9 * self.prices.per_gb_moved
            return (self.money - fixed) / self.prices.gpu_hour
        return self.gpu_hours

    @property
    def step_seconds(self) -> float | None:
        """Seconds in which steps run on all devices at once; None for a budget in FLOPs."""
        hours = self.rented_hours
        return None if hours is None else hours / self.num_devices * SECONDS_PER_HOUR * self.utilisation

    @property
    def expected_flops(self) -> float:
        """The budget, or what the devices do in its time at the products' efficiency; for choosing a batch and for figures."""
        if self.budget_flops is not None:
            return self.budget_flops
        seconds = self.step_seconds or 0.0
        return seconds * self.num_devices * self.hardware.flops_per_s * self.efficiency.gemm

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step: as given, or a sequence per device times the power of two nearest the published fit."""
        if self.batch_tokens is not None:
            return self.batch_tokens
        least = self.num_devices * self.context_length
        # That fit counts a third of the FLOPs: forward only.
        wanted = published_batch_tokens(self.expected_flops / 3)
        return int(least * 2 ** max(0, round(log2(wanted / least))))


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (isfinite(value) and value > 0):
        raise ValueError(f"{name} must be above 0, got {value}")
