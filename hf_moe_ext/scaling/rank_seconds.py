"""Seconds of the parts of one micro-batch on one rank: FLOPs over a peak, bytes over a bandwidth or a link."""

from dataclasses import dataclass, fields

from hf_moe_ext.scaling.exchange import Exchange, Passes, expect_sent, layer_bytes
from hf_moe_ext.scaling.hardware import Hardware
from hf_moe_ext.scaling.layout import Layout, cache_ranks, stage_parameters
from hf_moe_ext.scaling.memory import TrainingStep
from hf_moe_ext.scaling.precision import choose_precision
from hf_moe_ext.scaling.shape import FlopTerms, MoeShape


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peaks that are reached, shares of communication that hide behind computing; assumptions by default.

    Attributes:
        gemm: of ``flops_per_s`` in matrix products outside the experts.
        grouped: of ``grouped_flops_per_s`` in the experts.
        memory: of ``memory_bytes_per_s``.
        link: of both link speeds.
        overlap: of the all-to-alls.
        overlap_data: of the gradients' exchange.
        collective_s: seconds that a collective takes whatever its size.
    """

    gemm: float = 0.5
    grouped: float = 0.4
    memory: float = 0.8
    link: float = 0.8
    overlap: float = 0.0
    overlap_data: float = 0.5
    collective_s: float = 20e-6

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            positive = field.name in ("gemm", "grouped", "memory", "link")
            inside = value >= 0 if field.name == "collective_s" else 0 <= value <= 1
            if not inside or (positive and value == 0):
                bounds = (
                    "at least 0"
                    if field.name == "collective_s"
                    else f"{'above' if positive else 'at least'} 0 and at most 1"
                )
                raise ValueError(f"efficiency: {field.name} must be {bounds}, got {value}")


class RankSeconds:
    """Seconds of the parts of one micro-batch on one rank of a stage."""

    def __init__(self, shape: MoeShape, layout: Layout, hardware: Hardware, eff: Efficiency) -> None:
        self.shape, self.layout, self.hardware, self.eff = shape, layout, hardware, eff
        self.gemm_speed = hardware.flops_per_s * eff.gemm
        self.grouped_speed = hardware.grouped_peak * eff.grouped
        self.memory_speed = hardware.memory_bytes_per_s * eff.memory
        self.local = stage_parameters(shape, layout, 0)

    def link(self, num_ranks: int, stride: int = 1) -> float:
        """Bytes per second of a ring of ranks this far apart: within a node, or as its slowest hop."""
        inside = num_ranks * stride <= self.hardware.devices_per_node
        return self.hardware.link(between_nodes=not inside) * self.eff.link

    def products(self, flops: FlopTerms, tokens: float) -> float:
        """Of one forward pass, outside the routed experts; routers and a latent's projections are on every TP rank."""
        whole = flops.router + flops.projections
        cut = flops.total - flops.experts - whole
        return tokens * (cut / self.layout.tensor + whole) / self.layout.pipeline / self.gemm_speed

    def expert_token(self, flops: FlopTerms) -> float:
        """Seconds of one token's experts, shared by all ranks that hold the token."""
        return (
            flops.experts
            * self.layout.row_share
            / self.layout.expert_tensor
            / self.layout.pipeline
            / self.grouped_speed
        )

    def experts(self, flops: float, rows: float, step: TrainingStep) -> tuple[float, bool]:
        """Of one forward pass: arithmetic, or reading the weights once; and whether it is the reading."""
        compute = rows * flops / self.layout.expert_tensor / self.layout.pipeline / self.grouped_speed
        width = choose_precision(step.precision, step.optimizer).expert
        read = self.local.experts * width / self.memory_speed
        return max(compute, read), read > compute

    def all_to_all(self, tokens: float, passes: Passes, element_bytes: int, imbalance: float) -> float:
        """All exchanges of a stage's layers; links within a node and between nodes carry their shares at the same time."""
        if self.layout.expert == 1:
            return 0.0
        ep, seconds = self.layout.expert, 0.0
        near = max(1, min(ep, self.hardware.devices_per_node // self.layout.expert_tensor))
        far_share = (ep - near) / (ep - 1)
        for layer in self.shape.moe_layers:
            width = layer.expert_width(self.shape.hidden_size)
            exchange = Exchange(width, layer.num_experts, layer.top_k, ep, element_bytes)
            sent = expect_sent(exchange, self.layout.dispatch, tokens * self.layout.row_share)
            moved = layer_bytes(exchange, self.layout.dispatch, sent, passes)
            size = moved.total * imbalance / self.eff.link
            far = size * far_share / self.hardware.link(between_nodes=True) if far_share else 0.0
            inside = size * (1 - far_share) / self.hardware.link(between_nodes=False) if near > 1 else 0.0
            seconds += max(far, inside) + moved.num_collectives * self.eff.collective_s
        return seconds / self.layout.pipeline

    def tensor(self, tokens: float, num_all_reduces: int, step: TrainingStep) -> float:
        """Two all-reduces per layer and pass of the residual stream."""
        width = choose_precision(step.precision, step.optimizer).matmul
        return self.tensor_bytes(tokens * self.shape.hidden_size * width, num_all_reduces)

    def tensor_bytes(self, num_bytes: float, num_all_reduces: int) -> float:
        """All-reduces of this many bytes per layer of a stage: 2 (TP - 1) / TP of them travel."""
        tp = self.layout.tensor
        if tp == 1:
            return 0.0
        each = 2 * (tp - 1) / tp * num_bytes / self.link(tp) + self.eff.collective_s
        return num_all_reduces * each * self.shape.num_layers / self.layout.pipeline

    def pipeline_send(self, tokens: float, step: TrainingStep) -> float:
        """Rows out and gradients back over a stage's boundary."""
        if self.layout.pipeline == 1:
            return 0.0
        width = choose_precision(step.precision, step.optimizer).stream
        return 2 * tokens * self.shape.hidden_size * width / self.link(self.layout.world_size)

    def data(self, step: TrainingStep) -> float:
        """Gradients (and shared weights) between ranks that hold the same parameters: rings, (n - 1) / n per pass.

        One all-reduce a step is two passes; ZeRO-1 a reduce-scatter and a gather; ZeRO-2 scatters and ZeRO-3 (which also
        gathers twice) does so in every micro-batch.
        """
        precision, m, zero = choose_precision(step.precision, step.optimizer), step.num_micro_batches, self.layout.zero
        gradients, weights = {0: (2, 0), 1: (1, 1), 2: (m, 1), 3: (m, 2 * m)}[zero]
        per_parameter = gradients * precision.gradient + weights * precision.weight
        seconds, ranks = 0.0, self.layout.tensor * self.layout.context * self.layout.data
        for parameters, num_ranks in (
            (self.local.dense, self.layout.dense_data),
            (self.local.experts, self.layout.expert_data),
        ):
            if num_ranks > 1 and parameters:
                stride = ranks // num_ranks
                seconds += (num_ranks - 1) / num_ranks * parameters * per_parameter / self.link(num_ranks, stride)
        return seconds

    def optimizer(self, step: TrainingStep) -> float:
        """Weights and states read and written, gradients read, of what this rank updates."""
        precision = choose_precision(step.precision, step.optimizer)
        shared = self.layout.zero > 0
        updated = self.local.dense / (self.layout.dense_data if shared else 1)
        updated += self.local.experts / (self.layout.expert_data if shared else 1)
        return updated * (2 * precision.weight + precision.gradient + 2 * precision.optimizer) / self.memory_speed

    def decode_bytes(self, num_sequences: int, context_length: int, weight_bytes: float, kv_bytes: int) -> float:
        """Weights that a token of every sequence touches on this rank, and their cache."""
        group = num_sequences * self.layout.expert * self.layout.row_share
        shares = [1 - (1 - layer.top_k / layer.num_experts) ** group for layer in self.shape.moe_layers]
        touched = self.local.experts * (sum(shares) / len(shares) if shares else 0)
        # Of the embedding table only the batch's rows are read.
        table = 0 if self.shape.tied_embeddings else self.shape.vocab_size * self.shape.hidden_size / self.layout.tensor
        weights = (self.local.dense - table + touched) * weight_bytes
        cache = self.shape.kv_cache_bytes(context_length, num_sequences, kv_bytes)
        return weights + cache / cache_ranks(self.shape, self.layout)
