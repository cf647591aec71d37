"""``PerftLayer``: the one tuner layer. It wraps a block's ``experts`` and adds the adapters to their output.

The way of a token: the block's router (frozen, full width) sends ``(hidden_states, index, weights)`` to this layer, which
returns ``base_layer(...) + routed_adapter(hidden_states, idx, w)``. The variants differ only in where ``idx, w`` come
from: R its own router; E the arguments themselves; D and S all adapters with weight 1.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_moe_ext.host.blocks import ExpertsSite
from hf_moe_ext.host.routing import AdapterRouting, RoutingListeners
from hf_moe_ext.ops.routed_adapter import routed_adapter
from hf_moe_ext.ops.routing import choose_experts, expert_weights, router_logits, router_sums
from hf_moe_ext.perft.config import PerftConfig
from hf_moe_ext.perft.state import PerftState
from hf_moe_ext.perft.tape import ForwardTape, RouterCoefficients, anchor_router, warn_no_weight
from hf_moe_ext.perft.tuner_layer import PerftTunerLayer


@dataclass(frozen=True)
class AdapterSettings:
    """What the layer must remember of one adapter's configuration, resolved against its block."""

    variant: str
    kind: str
    num_experts: int
    rank: int
    scale: float
    lora_scale: float
    dropout: float
    top_k: int = 0
    normalize: bool = False
    shared_A: bool = False
    expert_ids: tuple[int, ...] | None = None
    coefficients: RouterCoefficients = field(default_factory=RouterCoefficients)


class PerftLayer(PerftTunerLayer):
    """Wraps the ``experts`` of one block.

    Parameters, one per adapter name: ``perft_A`` [num_experts, r, hidden] (or [1, r, hidden], shared), ``perft_B`` [num_experts, hidden, r],
    ``perft_router`` [num_experts, hidden] (R only). They are float32 whatever the base model's precision, unless
    ``autocast_adapter_dtype=False`` asks PEFT for the base's.
    """

    adapter_layer_names = ("perft_A", "perft_B", "perft_router")
    other_param_names = ("settings", "adapter_of_expert")

    def __init__(self, base_layer: nn.Module, site: ExpertsSite, state: PerftState) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.perft_A = nn.ParameterDict()
        self.perft_B = nn.ParameterDict()
        self.perft_router = nn.ParameterDict()
        self.settings: dict[str, AdapterSettings] = {}
        self.routing_listeners: RoutingListeners = []
        self.adapter_of_expert: dict[str, Tensor] = {}
        self.state = state
        self.record = state.record_of(site.name)
        self.site_name = site.name
        self.in_features = self.out_features = site.hidden_size
        self.base_num_experts = site.num_experts
        self._arguments = (site.index_name, site.weights_name)
        self.training = base_layer.training
        self._disable_adapters = False
        self.merged_adapters = []

    def update_layer(self, name: str, settings: AdapterSettings, init_weights: bool | str) -> None:
        """Add the adapter ``name``."""
        device, dtype = _parameter_device_and_dtype(self.get_base_layer())
        num_experts, rank, hidden_size = settings.num_experts, settings.rank, self.in_features
        self.settings[name] = settings

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.perft_A[name] = empty(1 if settings.shared_A else num_experts, rank, hidden_size)
        self.perft_B[name] = empty(num_experts, hidden_size, rank)
        if settings.variant == "R":
            self.perft_router[name] = empty(num_experts, hidden_size)
        if settings.expert_ids is not None:
            self.adapter_of_expert[name] = _number_adapters(settings.expert_ids, self.base_num_experts)
        self.state.set_coefficients(name, settings.coefficients)
        self.reset_parameters(name, init_weights)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters)

    @torch.no_grad()
    def reset_parameters(self, name: str, init_weights: bool | str) -> None:
        """Initialise the adapter ``name``; see ``PerftConfig.init_weights``."""
        A, B = self.perft_A[name], self.perft_B[name]
        _, rank, hidden_size = A.shape
        if init_weights == "paper":
            A.normal_(0.0, math.sqrt(2.0 / rank))
            B.normal_(0.0, 1e-6)
        else:
            # Kaiming-uniform(a=sqrt 5) of one expert's slice; on the stacked tensor torch would take r*hidden for the
            # fan-in and start a factor sqrt(r) too small.
            A.uniform_(-1.0, 1.0).mul_(1.0 / math.sqrt(hidden_size))
            if init_weights:
                B.zero_()
            else:
                B.uniform_(-1.0, 1.0).mul_(1.0 / math.sqrt(rank))
        if name in self.perft_router:
            self.perft_router[name].normal_(0.0, 0.02)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The experts' output plus the active adapters'; hidden_states [tokens, hidden], as the experts take them."""
        output = self.base_layer(hidden_states, *args, **kwargs)
        if self.disable_adapters:
            return output
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        index, weights = self._base_routing(args, kwargs)
        tape = self.state.current_tape()
        if tape is not None and tape.row_adapters is not None:
            delta = self._mixed_delta(tape, rows, index, weights)
        else:
            delta = None
            for name in self.active_adapters:
                if name in self.settings:
                    part = self._delta(name, rows, index, weights, tape)
                    delta = part if delta is None else delta + part
        return output if delta is None else output + delta.to(output.dtype).view_as(output)

    def _delta(
        self,
        name: str,
        rows: Tensor,
        index: Tensor,
        weights: Tensor,
        tape: ForwardTape | None,
        chosen: Tensor | None = None,
    ) -> Tensor:
        settings = self.settings[name]
        idx: Tensor | None
        w: Tensor | None
        if settings.variant == "R":
            idx, w = self._route(name, rows, tape, chosen)
        elif settings.variant == "E":
            idx, w = self._adapters_of(name, index), weights
        else:
            idx, w = None, None
        return routed_adapter(
            _autocast(rows),
            self.state.shared(self.perft_A[name]),
            self.state.shared(self.perft_B[name]),
            idx,
            w,
            scale=settings.scale,
            activation=F.silu if settings.kind == "parallel" else None,
            dropout=settings.dropout if self.training else 0.0,
        )

    def _route(self, name: str, rows: Tensor, tape: ForwardTape | None, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
        settings, router = self.settings[name], self.state.shared(self.perft_router[name])
        if tape is None and self.training and torch.is_grad_enabled() and settings.coefficients:
            # Called past the model. The empty tape keeps the nodes that a recomputation in backward will make.
            warn_no_weight()
            tape = ForwardTape(training=True)
        logits = router_logits(rows, router)
        with torch.autocast(rows.device.type, enabled=False):
            index = choose_experts(logits, settings.top_k)
            if tape is not None:
                compiling = torch.compiler.is_compiling()
                wanted = bool(settings.coefficients) or bool(self.state.recorders)
                if wanted and tape is self.state.tape:  # once: not when gradient checkpointing recomputes the layer
                    groups = tape.groups(settings.coefficients.scope, rows.shape[0])
                    # Only the compiled path differentiates these sums; a graph left here in eager mode would be one
                    # that gradient checkpointing does not see again.
                    self.record.sums[name] = router_sums(logits if compiling else logits.detach(), index, groups)
                if tape.training and settings.coefficients and not compiling:
                    logits = anchor_router(logits, tape, name, self.site_name)
            expert_weight = expert_weights(logits, index, settings.normalize)
            for listener in self.routing_listeners:
                listener(AdapterRouting(name, logits.detach(), index, expert_weight.detach(), chosen))
            return index, expert_weight

    def _adapters_of(self, name: str, index: Tensor) -> Tensor:
        """The adapters of the experts in ``index`` [tokens, top_k]; a sentinel for an expert that has none."""
        if name not in self.adapter_of_expert:
            return index
        table = self.adapter_of_expert[name]
        if table.device != index.device:  # no buffer: PEFT would save it, and the meta device would lose it
            table = self.adapter_of_expert[name] = table.to(index.device)
        return table[torch.where((index < 0) | (index >= self.base_num_experts), self.base_num_experts, index)]

    def _mixed_delta(self, tape: ForwardTape, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        names = tape.row_adapters or []
        if rows.shape[0] != tape.num_tokens:
            raise ValueError(
                f"adapter_names: the experts of {self.site_name} received {rows.shape[0]} tokens of the batch's "
                f"{tape.num_tokens}; this model drops, packs or splits tokens, so run one adapter at a time"
            )
        tokens = tape.num_tokens // len(names)
        delta = torch.zeros_like(_autocast(rows))
        for name in sorted(set(names) & set(self.settings)):
            # Numbers, not a mask: the shapes are known beforehand, so nothing waits for the device or breaks a graph.
            first = torch.tensor([row * tokens for row, own in enumerate(names) if own == name], device=rows.device)
            chosen = (first[:, None] + torch.arange(tokens, device=rows.device)).reshape(-1)
            delta[chosen] = self._delta(name, rows[chosen], index[chosen], weights[chosen], None, chosen)
        return delta

    def _base_routing(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        return given[self._arguments[0]], given[self._arguments[1]]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, None]:
        # PEFT looks for a `weight`, which no experts module has, and would leave adapters on the CPU. No dtype: they
        # stay float32 beside a base in bfloat16.
        return _parameter_device_and_dtype(base_layer)[0], None

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set trainability; Transformers' ``load_adapter`` freezes each layer so, right after it has loaded them."""
        if not requires_grad:
            for name in list(self.settings):
                self.state.refuse_partial_load(name, or_empty=name in self.state.fresh)
        return super().requires_grad_(requires_grad)

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}: {s.variant} {s.kind} {s.num_experts}x r={s.rank}" for name, s in self.settings.items()
        )


def resolve_settings(
    config: PerftConfig,
    rank: int,
    alpha: float,
    base_num_experts: int,
    normalize: bool,
    expert_ids: tuple[int, ...] | None = None,
) -> AdapterSettings:
    """Settings of one adapter on one block.

    Args:
        config: the adapter's configuration.
        rank: its r on this block (``rank_pattern`` applied).
        alpha: its lora_alpha on this block.
        base_num_experts: experts of the block; E has as many adapters.
        normalize: R: whether weights are renormalised (``normalize_top_k`` or the base model's rule).
        expert_ids: E: the experts that get an adapter; None: all.
    """
    num_experts = {"E": base_num_experts, "S": 1}.get(config.variant, config.num_experts or 1)
    if expert_ids is not None:
        num_experts = len(expert_ids)
    return AdapterSettings(
        variant=config.variant,
        kind=config.adapter,
        num_experts=num_experts,
        rank=rank,
        scale=alpha / rank if config.adapter == "lora" else 1.0,
        lora_scale=alpha / rank,
        dropout=config.lora_dropout,
        top_k=config.top_k or 0,
        normalize=normalize,
        shared_A=config.shared_A,
        expert_ids=expert_ids,
        coefficients=RouterCoefficients(
            load_balance=config.router_aux_loss_coef or 0.0,
            z=config.router_z_loss_coef or 0.0,
            scope=config.router_aux_loss_scope or "sequence",
            drift=config.base_router_drift_coef or 0.0,
        ),
    )


def _number_adapters(expert_ids: tuple[int, ...], base_num_experts: int) -> Tensor:
    """[base_num_experts + 1] the adapter of each expert and of the sentinel; ``len(expert_ids)`` where there is none."""
    # On the CPU also where the model is just being outlined on the meta device.
    table = torch.full((base_num_experts + 1,), len(expert_ids), device="cpu")
    table[list(expert_ids)] = torch.arange(len(expert_ids), device="cpu")
    return table


def _parameter_device_and_dtype(experts: nn.Module) -> tuple[torch.device | None, torch.dtype]:
    """Where adapters of these experts live, and their dtype: float32, or float64 beside a float64 base."""
    parameter = next(experts.parameters(), None)
    if parameter is None:
        return None, torch.float32
    return parameter.device, torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _autocast(rows: Tensor) -> Tensor:
    """The rows as autocast would have them: grouped_mm is no autocast operation and would run in float32."""
    device = rows.device.type
    if torch.is_autocast_enabled(device) and rows.dtype != torch.float64:
        return rows.to(torch.get_autocast_dtype(device))
    return rows
