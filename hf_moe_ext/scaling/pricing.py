"""One candidate on given devices: the quickest way to train it that fits, its tokens, its cost; and how it is served."""

from dataclasses import dataclass, replace
from math import floor

from hf_moe_ext.scaling.activations import Tokens
from hf_moe_ext.scaling.candidates import Candidate
from hf_moe_ext.scaling.exchange import Implementation
from hf_moe_ext.scaling.layout import Layout, stage_parameters
from hf_moe_ext.scaling.memory import Memory, TrainingStep, training_memory
from hf_moe_ext.scaling.money import SECONDS_PER_HOUR, Cost, Prices, serving_cost_per_million, training_cost
from hf_moe_ext.scaling.plan_request import Inference, PlanRequest
from hf_moe_ext.scaling.precision import choose_precision
from hf_moe_ext.scaling.roofline import StepTime, training_time
from hf_moe_ext.scaling.serving import ServingRates, serving_memory, serving_rates
from hf_moe_ext.scaling.shape import MoeShape

# Sequences of a micro-batch that are tried, the largest that fits is taken; and what to give up for memory, in this order.
MICRO_BATCHES = (16, 8, 4, 2, 1)
ESCALATION = ((0, "none"), (1, "none"), (1, "full"), (3, "none"), (3, "full"))
MOST_EXPERT_RANKS = 64
ONE_DEVICE_HOUR = Prices(1.0)


@dataclass(frozen=True)
class Training:
    """How a shape trains.

    Attributes:
        layout: parallel degrees.
        step: of the optimizer.
        memory: of the worst rank.
        time: of a step.
    """

    layout: Layout
    step: TrainingStep
    memory: Memory
    time: StepTime


@dataclass(frozen=True)
class Shortage:
    """What was lacking.

    Attributes:
        needed_bytes: of the most frugal way to train it that was tried, on one device.
        usable_bytes: that a device has.
    """

    needed_bytes: float
    usable_bytes: float


@dataclass(frozen=True)
class Run:
    """A whole training.

    Attributes:
        num_steps: of the optimizer.
        num_tokens: D.
        hours: by the clock, of rented time.
        gpu_hours: of all devices.
        limited_by: "budget", or "data" where the tokens ran out first.
        affordable_tokens: D if there were tokens enough.
        cost: None without prices.
    """

    num_steps: int
    num_tokens: int
    hours: float
    gpu_hours: float
    limited_by: str
    affordable_tokens: int
    cost: Cost | None


@dataclass(frozen=True)
class Serving:
    """One replica.

    Attributes:
        layout: of it.
        memory: of the worst rank.
        rates: tokens per second.
        cost_per_million: generated tokens; None without prices.
        gpu_hours_per_million: the same without prices.
    """

    layout: Layout
    memory: Memory
    rates: ServingRates
    cost_per_million: float | None
    gpu_hours_per_million: float


def choose_training(shape: MoeShape, request: PlanRequest) -> Training | Shortage:
    """The quickest of the layouts that fit: data parallelism, sharded or not, and expert parallelism with both dispatches."""
    best: Training | None = None
    needed: list[float] = []
    for expert in _expert_degrees(shape, request):
        found = _first_fit(shape, request, expert)
        if isinstance(found, Shortage):
            needed.append(found.needed_bytes)
            continue
        for candidate in found:
            if best is None or candidate.time.total < best.time.total:
                best = candidate
    return best or Shortage(min(needed), request.usable_bytes)


def _expert_degrees(shape: MoeShape, request: PlanRequest) -> list[int]:
    """1, a node, and as many ranks as there are experts, as far as they divide."""
    if not shape.moe_layers:
        return [1]
    num_experts = shape.moe_layers[0].num_experts
    # A shared base has no expert-parallel plan: it is needed on every rank.
    if shape.moe_layers[0].deltas is not None:
        return [1]
    wanted = {1, request.hardware.devices_per_node, request.num_devices, num_experts, MOST_EXPERT_RANKS}
    return sorted(n for n in wanted if n <= MOST_EXPERT_RANKS and num_experts % n == 0 and request.num_devices % n == 0)


def _first_fit(shape: MoeShape, request: PlanRequest, expert: int) -> list[Training] | Shortage:
    """The first of `ESCALATION` that fits, with every dispatch."""
    needed = float("inf")
    for zero, recompute in ESCALATION:
        if (zero == 0) != (request.num_devices == 1):
            continue
        layout = Layout(data=request.num_devices, expert=expert, zero=zero)  # type: ignore[arg-type]
        least = resident_bytes(shape, layout, request.precision)
        if least > request.usable_bytes:
            needed = min(needed, least)
            continue
        for num_sequences in MICRO_BATCHES:
            step = _make_step(request, num_sequences, recompute)
            if step is None:
                continue
            bound = least_memory(shape, layout, step)
            if bound > request.usable_bytes:
                needed = min(needed, bound)
                continue
            memory = training_memory(shape, layout, step)
            if memory.total <= request.usable_bytes:
                return [_time(shape, request, way, step, memory) for way in _dispatches(layout)]
            needed = min(needed, memory.total)
    return Shortage(needed, request.usable_bytes)


def least_memory(shape: MoeShape, layout: Layout, step: TrainingStep) -> float:
    """No more than `training_memory`, and much quicker for deep models: drawn out from the same model with few layers.

    With equal layers, what is held at a moment is linear in their number, and the worst moment lies in the first or the last of
    them or at an end; the largest of linear functions lies nowhere below the line through two of its values.
    """
    few, more = (2, 3)
    if shape.num_layers <= few + more:
        return 0.0
    low, high = (training_memory(replace(shape, layers=shape.layers[:n]), layout, step).total for n in (few, more))
    return low + (high - low) * (shape.num_layers - few)


def _make_step(request: PlanRequest, num_sequences: int, recompute: str) -> TrainingStep | None:
    sequences = request.step_tokens // (request.num_devices * request.context_length)
    if sequences % num_sequences:
        return None
    tokens = Tokens(num_sequences, request.context_length, request.imbalance)
    return TrainingStep(tokens, request.precision, "adamw", recompute, sequences // num_sequences)  # type: ignore[arg-type]


def _dispatches(layout: Layout) -> list[Layout]:
    if layout.expert == 1:
        return [layout]
    names: tuple[Implementation, ...] = ("all_to_all", "latent_all_to_all")
    return [Layout(data=layout.data, expert=layout.expert, zero=layout.zero, dispatch=name) for name in names]


def _time(shape: MoeShape, request: PlanRequest, layout: Layout, step: TrainingStep, memory: Memory) -> Training:
    return Training(layout, step, memory, training_time(shape, layout, step, request.hardware, request.efficiency))


def resident_bytes(shape: MoeShape, layout: Layout, precision_name: str) -> float:
    """Weights and optimizer states of a rank: less than any step needs."""
    local, precision = stage_parameters(shape, layout, 0), choose_precision(precision_name)
    weights, states = layout.zero > 2, layout.zero > 0
    total = 0.0
    for parameters, ranks in ((local.dense, layout.dense_data), (local.experts, layout.expert_data)):
        total += parameters * precision.weight / (ranks if weights else 1)
        total += parameters * precision.optimizer / (ranks if states else 1)
    return total


def plan_run(shape: MoeShape, request: PlanRequest, training: Training) -> Run | None:
    """Steps that budget and data allow; None where not one does."""
    batch = request.step_tokens
    seconds = request.step_seconds
    if seconds is None:
        affordable = floor((request.budget_flops or 0.0) / (shape.training_flops().total * batch))
    else:
        affordable = floor(seconds / training.time.total)
    supplied = affordable
    if request.token_supply is not None:
        supplied = min(affordable, floor(request.token_supply * request.max_epochs / batch))
    if supplied < 1:
        return None
    return make_run(request, training, supplied, "data" if supplied < affordable else "budget", affordable)


def make_run(
    request: PlanRequest, training: Training, num_steps: int, limited_by: str = "budget", affordable: int | None = None
) -> Run:
    """So many steps: time and cost."""
    seconds, batch = training.time.total, request.step_tokens
    hours = seconds * num_steps / SECONDS_PER_HOUR / request.utilisation
    cost = None
    if request.prices is not None:
        cost = training_cost(
            request.prices, request.num_devices, seconds, num_steps,
            moved_bytes=request.moved_bytes, utilisation=request.utilisation,
        )  # fmt: skip
    tokens = (num_steps if affordable is None else affordable) * batch
    return Run(num_steps, num_steps * batch, hours, hours * request.num_devices, limited_by, tokens, cost)


def choose_serving(candidate: Candidate, request: PlanRequest) -> Serving | Shortage | None:
    """The fewest devices of a node that hold it; None without a demand.

    Experts are spread over the replica's ranks, each with its own sequences; where the rest alone is too large, and in dense
    models, matrices are cut instead.
    """
    asked, shape = request.inference, candidate.shape
    if asked is None:
        return None
    needed = float("inf")
    devices = 1
    while devices <= request.hardware.devices_per_node:
        for layout in _serving_layouts(shape, devices):
            memory = serving_memory(
                shape, layout, asked.num_sequences, asked.context_length, imbalance=request.imbalance
            )
            if memory.total <= request.usable_bytes:
                return _serve(shape, request, asked, layout, memory)
            needed = min(needed, memory.total)
        devices *= 2
    return Shortage(needed, request.usable_bytes)


def _serving_layouts(shape: MoeShape, devices: int) -> list[Layout]:
    layouts = []
    tensor = Layout(tensor=devices)
    if shape.moe_layers and shape.moe_layers[0].deltas is None:
        layouts.append(Layout(data=devices, expert=devices))
        tensor = Layout(tensor=devices, expert=devices)
    fitting = []
    for layout in [*layouts, tensor]:
        try:
            layout.check(shape)
        except ValueError:
            continue
        fitting.append(layout)
    return list(dict.fromkeys(fitting))


def _serve(
    shape: MoeShape, request: PlanRequest, asked: Inference, layout: Layout, memory: Memory
) -> Serving:  # fmt: skip
    rates = serving_rates(
        shape, layout, request.hardware, asked.num_sequences, asked.context_length,
        efficiency=request.efficiency, imbalance=request.imbalance,
    )  # fmt: skip

    def cost(prices: Prices) -> float:
        return serving_cost_per_million(
            prices, layout.world_size, rates.prefill_tokens_per_s, rates.decode_tokens_per_s, asked.demand
        )

    priced = None if request.prices is None else cost(request.prices)
    return Serving(layout, memory, rates, priced, cost(ONE_DEVICE_HOUR))
