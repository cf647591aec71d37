"""Time of a training step, by roofline: each part as long as its FLOPs, bytes or messages need.

    t_step = [max(compute, weights) + (1 - overlap) all-to-all + tensor] m (1 + (PP - 1)/m) + pipeline
             + (1 - overlap_dp) data + optimizer

Efficiencies and overlaps are inputs; the defaults are assumptions, and `calibrate.py` solves for them from a measured run.
Peaks times efficiencies say how fast it could go; a real step also waits for data, kernels' launches and stragglers.
"""

from dataclasses import asdict, dataclass

from hf_moe_ext.scaling.exchange import RECOMPUTED, TRAINING
from hf_moe_ext.scaling.hardware import Hardware
from hf_moe_ext.scaling.layout import Layout
from hf_moe_ext.scaling.memory import TrainingStep
from hf_moe_ext.scaling.precision import choose_precision
from hf_moe_ext.scaling.rank_seconds import Efficiency, RankSeconds
from hf_moe_ext.scaling.shape import MoeShape


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the slowest rank; hidden communication is left out.

    Attributes:
        products: matrix products outside the experts.
        experts: grouped products, or reading the experts' weights where that takes longer.
        all_to_all: what of it does not hide.
        tensor: all-reduces of tensor parallelism.
        pipeline: bubble and sends.
        data: what of the gradients' exchange does not hide.
        optimizer: its pass over the states.
        experts_read: experts wait for memory, not for arithmetic.
    """

    products: float
    experts: float
    all_to_all: float
    tensor: float
    pipeline: float
    data: float
    optimizer: float
    experts_read: bool

    @property
    def total(self) -> float:
        """All parts."""
        return sum(seconds for name, seconds in asdict(self).items() if name != "experts_read")

    @property
    def binds(self) -> str:
        """What takes most: "compute", "memory", "all_to_all", "tensor", "pipeline" or "data"."""
        read = self.optimizer + self.experts * self.experts_read
        groups = {
            "compute": self.products + self.experts * (not self.experts_read),
            "memory": read,
            **{name: getattr(self, name) for name in ("all_to_all", "tensor", "pipeline", "data")},
        }
        return max(groups, key=lambda name: groups[name])

    def as_dict(self) -> dict[str, float | str | bool]:
        """Parts, total and what binds."""
        return {**asdict(self), "total": self.total, "binds": self.binds}


def training_time(
    shape: MoeShape, layout: Layout, step: TrainingStep, hardware: Hardware, efficiency: Efficiency | None = None
) -> StepTime:
    """Seconds of one optimizer step of ``step.num_micro_batches`` per rank.

    Raises:
        ValueError: the layout does not fit the shape.
    """
    layout.check(shape)
    eff = efficiency or Efficiency()
    passes = 4 if step.recompute == "full" else 3
    flops = shape.forward_flops(step.tokens.sequence_length)
    tokens = step.tokens.num_sequences * step.tokens.sequence_length / layout.context
    each = RankSeconds(shape, layout, hardware, eff)
    products = passes * each.products(flops, tokens)
    experts, experts_read = each.experts(flops.experts, tokens * step.tokens.imbalance * layout.row_share, step)
    extra = step.recompute == "selective"
    experts *= passes + extra
    wire = choose_precision(step.precision, step.optimizer).expert
    moved = each.all_to_all(tokens, RECOMPUTED if passes == 4 else TRAINING, wire, step.tokens.imbalance)
    all_to_all = (1 - eff.overlap) * moved
    tensor = each.tensor(tokens, 2 * (passes - 1), step)
    one = products + experts + all_to_all + tensor
    m = step.num_micro_batches
    boundary = each.pipeline_send(tokens, step) * m
    return StepTime(
        products=products * m,
        experts=experts * m,
        all_to_all=all_to_all * m,
        tensor=tensor * m,
        pipeline=one * (layout.pipeline - 1) + boundary,
        data=(1 - eff.overlap_data) * each.data(step),
        optimizer=each.optimizer(step),
        experts_read=experts_read,
    )


def tokens_per_expert_to_compute(hardware: Hardware) -> float:
    """Tokens an expert needs so that its products wait for arithmetic and not for its two-byte weights: peak / bandwidth."""
    return hardware.flops_per_byte


def batch_tokens_to_compute(hardware: Hardware, sparsity: float) -> float:
    """Tokens of an EP group from which experts are compute-bound: (peak / bandwidth) / (1 - S)."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and below 1, got {sparsity}")
    return hardware.flops_per_byte / (1 - sparsity)


def expert_width_to_hide_all_to_all(hardware: Hardware, link_bytes_per_s: float) -> float:
    """Width of gated experts above which they compute longer than two-byte rows travel: (peak / link) / 1.5."""
    return hardware.flops_per_s / link_bytes_per_s / 1.5
