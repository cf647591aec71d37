"""What a model's expert parallelism sends, by formula from its configuration, beside what a run has measured."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig

from hf_moe_ext.dcca.traffic_callback import FORMAT
from hf_moe_ext.host.blocks import read_experts
from hf_moe_ext.host.families import ACTIVE_KEYS, active_experts
from hf_moe_ext.scaling.exchange import (
    IMPLEMENTATIONS,
    INFERENCE,
    RECOMPUTED,
    TRAINING,
    Exchange,
    Implementation,
    LayerBytes,
    Passes,
    expect_sent,
    layer_bytes,
)


class TrafficError(ValueError):
    """The traffic cannot be told; the message says why and what to pass instead."""


@dataclass(frozen=True)
class MoeLayer:
    """What of an MoE layer determines its traffic.

    Attributes:
        name: of the experts module.
        width: elements of a row on the wire.
        hidden_size: of the model; the width on the wire of the same block without a latent.
        num_experts: routed experts.
        top_k: experts of a token.
    """

    name: str
    width: int
    hidden_size: int
    num_experts: int
    top_k: int


@dataclass(frozen=True)
class LayerTraffic:
    """Bytes one rank sends to others in one layer: forward, and in a training step."""

    layer: MoeLayer
    implementation: Implementation
    rows: float
    forward: LayerBytes
    training: LayerBytes
    training_at_full_width: LayerBytes

    @property
    def payload_ratio(self) -> float:
        """Payload over that of the same block at full width."""
        return self.layer.width / self.layer.hidden_size


@dataclass(frozen=True)
class Traffic:
    """All MoE layers under one dispatcher, and what a run measured.

    Attributes:
        ep_size: ranks that share the experts.
        num_tokens: of one rank in one pass; ranks that share a batch divide it.
        element_bytes: of a hidden state.
        passes: of a training step.
        layers: by dispatcher, in model order.
        measured: the report a `TrafficCallback` wrote.
    """

    ep_size: int
    num_tokens: int
    element_bytes: int
    passes: Passes
    layers: dict[Implementation, list[LayerTraffic]]
    measured: dict[str, Any] | None = None

    def step_bytes(self, implementation: Implementation) -> LayerBytes:
        """One training step, all layers."""
        rows = [row.training for row in self.layers[implementation]]
        return LayerBytes(
            sum(row.payload for row in rows),
            sum(row.metadata for row in rows),
            sum(row.num_collectives for row in rows),
        )

    def measured_bytes(self, kind: str) -> float | None:
        """Measured bytes of a step on the mean rank, "payload" or "metadata"."""
        if self.measured is None:
            return None
        return sum(flow["off_rank_bytes"] for flow in self.measured["flows"] if flow["kind"] == kind)

    def as_dict(self) -> dict[str, Any]:
        """Numbers for machines; bytes per rank."""
        return {
            "ep_size": self.ep_size,
            "num_tokens": self.num_tokens,
            "element_bytes": self.element_bytes,
            "passes": asdict(self.passes),
            "implementations": {
                name: {
                    "step": asdict(self.step_bytes(name)),
                    "layers": [asdict(row) | {"payload_ratio": row.payload_ratio} for row in rows],
                }
                for name, rows in self.layers.items()
            },
            "measured": self.measured,
        }


def read_layers(source: str) -> list[MoeLayer]:
    """The MoE layers of a model that its expert-parallel plan dispatches, from its configuration alone.

    Args:
        source: Hub id, folder, or a config.json.

    Raises:
        TrafficError: no such model, none that Transformers builds, or none with MoE layers under expert parallelism.
    """
    config = _read_config(source)
    model = _build_on_meta(config)
    patterns = [name for name, style in (model.ep_plan or {}).items() if style == "ep_dispatch_experts"]
    if not patterns:
        raise TrafficError(
            f"{source}: {type(model).__name__} (model_type {config.model_type!r}) has no expert-parallel plan, so it is dense "
            "or Transformers cannot dispatch its experts; pass a Mixture-of-Experts model such as Mixtral or OLMoE"
        )
    wanted = re.compile("|".join(re.escape(pattern).replace(r"\*", r"\d+") for pattern in patterns))
    layers = [_read_layer(name, module) for name, module in model.named_modules() if wanted.fullmatch(name)]
    if not layers:
        raise TrafficError(f"{source}: no layer of this configuration has experts; every one is dense")
    return layers


def _read_config(source: str) -> PreTrainedConfig:
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise TrafficError(f"{source} has no config.json; pass a Hub id, a folder that has one, or the file itself")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TrafficError(
            f"the configuration of {source!r} cannot be read: {_first_line(error)}; pass a Hub id, a folder or a "
            "config.json that Transformers knows"
        ) from error


def _build_on_meta(config: PreTrainedConfig) -> Any:
    auto = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
    try:
        with torch.device("meta"):
            return auto.from_config(config)
    except Exception as error:  # the configuration is the user's, and Transformers checks it wherever it first hurts
        raise TrafficError(
            f"Transformers cannot build a model of type {config.model_type!r} from this configuration: "
            f"{_first_line(error)}; correct config.json"
        ) from error


def _read_layer(name: str, experts: Any) -> MoeLayer:
    site, top_k = read_experts(name, experts), active_experts(experts)
    if site is None or top_k is None:
        raise TrafficError(
            f"{name} ({type(experts).__name__}): its width or experts per token cannot be read; supported are experts that "
            f"take (hidden_states, index, weights) and a configuration with one of {', '.join(ACTIVE_KEYS)}"
        )
    return MoeLayer(name, site.hidden_size, int(experts.config.hidden_size), site.num_experts, top_k)


def compute_traffic(
    layers: list[MoeLayer],
    ep_size: int,
    num_tokens: int,
    implementations: tuple[Implementation, ...] = IMPLEMENTATIONS,
    element_bytes: int = 2,
    recomputed: bool = False,
    measured: Path | None = None,
) -> Traffic:
    """The formulas of `hf_moe_ext.scaling.exchange` for every layer, uniform routing.

    Args:
        layers: of `read_layers`.
        ep_size: ranks that share the experts.
        num_tokens: tokens of one rank in one pass.
        implementations: dispatchers.
        element_bytes: of a hidden state.
        recomputed: whether gradient checkpointing runs each layer's forward pass again.
        measured: a ``traffic.json``.

    Raises:
        TrafficError: a value out of range, or a file that holds no measurement.
    """
    for name, value in (("ep", ep_size), ("tokens", num_tokens)):
        if value < 1:
            raise TrafficError(f"--{name} must be at least 1, got {value}")
    passes = RECOMPUTED if recomputed else TRAINING
    rows: dict[Implementation, list[LayerTraffic]] = {}
    try:
        for implementation in implementations:
            rows[implementation] = [
                _compute_layer(layer, implementation, ep_size, num_tokens, element_bytes, passes) for layer in layers
            ]
    except ValueError as error:
        raise TrafficError(str(error)) from error
    report = None if measured is None else read_measurement(measured)
    return Traffic(ep_size, num_tokens, element_bytes, passes, rows, report)


def _compute_layer(
    layer: MoeLayer,
    implementation: Implementation,
    ep_size: int,
    num_tokens: int,
    element_bytes: int,
    passes: Passes,
) -> LayerTraffic:
    narrow, full = (
        Exchange(width, layer.num_experts, layer.top_k, ep_size, element_bytes)
        for width in (layer.width, layer.hidden_size)
    )
    sent = expect_sent(narrow, implementation, num_tokens)
    return LayerTraffic(
        layer,
        implementation,
        sent.rows,
        forward=layer_bytes(narrow, implementation, sent, INFERENCE),
        training=layer_bytes(narrow, implementation, sent, passes),
        training_at_full_width=layer_bytes(full, implementation, sent, passes),
    )


def read_measurement(path: Path) -> dict[str, Any]:
    """The report a `TrafficCallback` wrote.

    Raises:
        TrafficError: no such file, or another one.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrafficError(
            f"--measured {path}: {error.strerror}; train with TrafficCallback, which writes traffic.json into output_dir"
        ) from error
    except ValueError as error:
        raise TrafficError(
            f"--measured {path} is not JSON: {_first_line(error)}; pass traffic.json of a run"
        ) from error
    if not isinstance(report, dict) or report.get("format") != FORMAT or not {"num_steps", "flows"} <= report.keys():
        raise TrafficError(f"--measured {path} holds no {FORMAT!r} report; pass traffic.json of a run")
    return report


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
