"""The layers of a model one after the other: run, fit, run again, write.

Two streams of hidden states go through the layers: the source's, and that of the model converted so far. A layer is
fitted on the inputs it will really have (the converted stream), and its target is what brings the hidden states after it
back to the source's: the source's hidden states less what attention has left. So later layers make up for earlier ones.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from hf_moe_ext.convert.calibration_text import TokenRows
from hf_moe_ext.convert.checkpoint import CheckpointReader, CheckpointWriter
from hf_moe_ext.convert.conversion_plan import ConversionPlan
from hf_moe_ext.convert.conversion_report import ConversionReport, LayerReport
from hf_moe_ext.convert.expert_layout import (
    DOWN,
    GATE_UP,
    LAYER_PREFIX,
    check_standard_block,
    outer_names,
    read_layer,
)
from hf_moe_ext.convert.layer_fit import GatedExperts, RoutedTokens, fit_data, fit_svd
from hf_moe_ext.convert.layer_runner import LayerRecord, LayerRunner
from hf_moe_ext.models.configuration import DCCA, STANDARD

_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class FitSettings:
    """How a layer is fitted: see the arguments of the same names of ``to_dcca``."""

    method: Literal["data", "svd"] = "data"
    sequential: bool = True


def check_language_model(reader: CheckpointReader) -> None:
    """Refuse a checkpoint without a language model's own tensors before anything is computed.

    Raises:
        ValueError: one is missing.
    """
    for name in (_EMBEDDING, _NORM):
        if name not in reader:
            raise ValueError(
                f"checkpoint {reader.folder} holds no {name!r}: it was saved from a model without its language-model head, "
                "or is not one; open it with AutoModelForCausalLM and save that"
            )


def convert_layers(
    plan: ConversionPlan,
    reader: CheckpointReader,
    writer: CheckpointWriter,
    rows: TokenRows,
    settings: FitSettings,
    device: torch.device,
    report: ConversionReport,
) -> None:
    """Write all tensors of the result and fill in the report's layers and perplexities.

    Raises:
        ValueError: tensors that are missing, mis-shaped or have no place in the result.
    """
    for name in outer_names(reader):
        tensor = reader.read(name)
        writer.write(name, tensor)
        report.num_parameters_source += tensor.numel()
    streams = _Streams(plan, reader, [rows.calibration, rows.held_out], device)
    for layer in range(plan.config.num_hidden_layers):
        state = read_layer(reader, layer, plan.config.num_local_experts)
        report.num_parameters_source += sum(tensor.numel() for tensor in state.values())
        if layer in plan.layers:
            check_standard_block(state, layer, plan.standard_shapes())
            state = streams.convert(layer, state, settings, report)
        else:
            streams.advance(layer, state)
        for name, tensor in state.items():
            writer.write(f"{LAYER_PREFIX}{layer}.{name}", tensor)
    report.perplexity_source, report.perplexity_converted = streams.perplexities(reader, rows.held_out)


class _Streams:
    """Hidden states of source and converted model, each for calibration and held-out rows."""

    def __init__(
        self, plan: ConversionPlan, reader: CheckpointReader, rows: list[Tensor], device: torch.device
    ) -> None:
        self.plan = plan
        blocks = {*plan.source_blocks, DCCA}
        self.runners = {block: LayerRunner(plan.config, block, device) for block in sorted(blocks)}
        table = reader.read(_EMBEDDING).float()
        self.source = [table[ids].to(device) for ids in rows]
        self.converted = list(self.source)  # the same tensors until a layer has been converted

    def advance(self, layer: int, state: dict[str, Tensor]) -> None:
        """Pass both streams through a layer that stays as it is."""
        runner = self.runners[self.plan.source_blocks[layer]]
        runner.load(state, layer)
        same = self.converted[0] is self.source[0]
        self.source = [runner.run(hidden).hidden_states for hidden in self.source]
        self.converted = list(self.source) if same else [runner.run(h).hidden_states for h in self.converted]

    def convert(
        self, layer: int, state: dict[str, Tensor], settings: FitSettings, report: ConversionReport
    ) -> dict[str, Tensor]:
        """Fit a layer, pass the source stream through the old and the converted stream through the new one."""
        runner = self.runners[STANDARD]
        runner.load(state, layer)
        same = self.converted[0] is self.source[0]
        source = [runner.run(hidden) for hidden in self.source]
        # The source's layer on the converted stream: what there is to route, and the block's own answer to it.
        local = source if same else [runner.run(hidden) for hidden in self.converted]
        device = self.source[0].device
        activation = ACT2FN[self.plan.config.hidden_act]
        experts = GatedExperts(state[GATE_UP].to(device), state[DOWN].to(device), activation)
        size = self.plan.config.moe_latent_size
        tokens = _routed_tokens(source[0], local[0]) if settings.sequential else _routed_tokens(source[0], source[0])
        block = fit_svd(experts, size) if settings.method == "svd" else fit_data(tokens, experts, size)
        result = {name: tensor for name, tensor in state.items() if name not in (GATE_UP, DOWN)}
        result |= {f"mlp.{name}": tensor.to(state[GATE_UP].dtype).cpu() for name, tensor in block.state().items()}
        # From here on what is written, rounded to the checkpoint's type, is what is run.
        self.runners[DCCA].load(result, layer)
        converted = [self.runners[DCCA].run(hidden) for hidden in self.converted]
        report.layers.append(_layer_report(layer, tokens, len(state[DOWN]), source[1], local[1], converted[1]))
        self.source = [record.hidden_states for record in source]
        self.converted = [record.hidden_states for record in converted]
        return result

    def perplexities(self, reader: CheckpointReader, held_out: Tensor) -> tuple[float, float]:
        """Of source and converted model, on the held-out rows."""
        norm = reader.read(_NORM)
        head = reader.read(_HEAD if _HEAD in reader else _EMBEDDING)
        runner = self.runners[DCCA]
        source, converted = (runner.perplexity(s[1], held_out, norm, head) for s in (self.source, self.converted))
        return source, converted


def _routed_tokens(source: LayerRecord, local: LayerRecord) -> RoutedTokens:
    """Tokens to fit a layer on: inputs of one stream, and what its block would have to add to reach the source's."""
    wanted = source.hidden_states.flatten(0, 1)
    present = local.hidden_states.flatten(0, 1) - local.block_outputs
    return RoutedTokens(local.block_inputs, local.ids, local.weights, wanted - present)


def _layer_report(
    layer: int, tokens: RoutedTokens, num_experts: int, source: LayerRecord, local: LayerRecord, converted: LayerRecord
) -> LayerReport:
    counts = torch.bincount(tokens.ids.flatten(), minlength=num_experts)
    return LayerReport(
        layer=layer,
        relative_output_error=_relative_error(converted.block_outputs, local.block_outputs),
        relative_hidden_error=_relative_error(converted.hidden_states, source.hidden_states),
        fewest_tokens=int(counts.min()),
        experts_without_tokens=int((counts == 0).sum()),
    )


def _relative_error(given: Tensor, wanted: Tensor) -> float:
    return float((given - wanted).double().square().sum() / wanted.double().square().sum())
