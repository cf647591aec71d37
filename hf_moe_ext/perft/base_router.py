"""``BaseRouterLayer``: lets an adapter tune the base model's own router, and holds it near where it started.

PERFT freezes that router. How far it may move is open: moved too far, tokens reach experts that never saw their like. So
what is tuned is a difference (whole, or of low rank) that starts at zero, belongs to the adapter and goes with it; and
its drift, the divergence of the tuned router's probabilities from the old ones, is a loss with a weight of its own.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from hf_moe_ext.host.blocks import RouterSite
from hf_moe_ext.ops.routing import DriftSums, drift_sums
from hf_moe_ext.perft.state import PerftState
from hf_moe_ext.perft.tape import ForwardTape, RouterCoefficients, RouterRecord, warn_no_weight
from hf_moe_ext.perft.tuner_layer import PerftTunerLayer


class BaseRouterLayer(PerftTunerLayer):
    """Wraps the router of one block; calls it with its weight plus the active adapters' differences.

    Parameters, one per adapter name: ``perft_base_router`` [num_experts, hidden] (base_router="train"), or
    ``perft_base_router_A`` [r, hidden] and ``perft_base_router_B`` [num_experts, r] ("lora").
    """

    adapter_layer_names = ("perft_base_router", "perft_base_router_A", "perft_base_router_B")
    other_param_names = ("scales",)

    def __init__(self, base_layer: nn.Module, site: RouterSite, record: RouterRecord, state: PerftState) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.perft_base_router = nn.ParameterDict()
        self.perft_base_router_A = nn.ParameterDict()
        self.perft_base_router_B = nn.ParameterDict()
        self.scales: dict[str, float] = {}
        self.site, self.record, self.state = site, record, state
        self.in_features, self.out_features = site.hidden_size, site.num_experts
        self.training = base_layer.training
        self._disable_adapters = False
        self.merged_adapters = []

    def __getattr__(self, name: str) -> Any:
        """What a block reads off its router beside calling it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def update_layer(self, name: str, rank: int | None, scale: float, init_weights: bool | str) -> None:
        """Add the difference of the adapter ``name``; ``rank`` None: a whole one."""
        weight, (rows, width) = self._weight(), (self.out_features, self.in_features)
        dtype = torch.promote_types(weight.dtype, torch.float32)

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=weight.device, dtype=dtype))

        self.scales[name] = 1.0 if rank is None else scale
        if rank is None:
            last = self.perft_base_router[name] = zeros(rows, width)
        else:
            A = self.perft_base_router_A[name] = zeros(rank, width)
            last = self.perft_base_router_B[name] = zeros(rows, rank)
            nn.init.uniform_(A, -1.0 / math.sqrt(width), 1.0 / math.sqrt(width))  # as perft_A
        if not init_weights:  # for tests: a difference that acts
            nn.init.normal_(last, std=0.1 / math.sqrt(last.shape[1]))
        self.set_adapter(self.active_adapters)

    def difference(self, name: str) -> Tensor:
        """[num_experts, hidden] what the adapter adds to the router's weight."""
        if name in self.perft_base_router:
            return self.state.shared(self.perft_base_router[name])
        A, B = self.state.shared(self.perft_base_router_A[name]), self.state.shared(self.perft_base_router_B[name])
        return B @ A * self.scales[name]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The router's own output, of its tuned weight; hidden_states [..., hidden]."""
        names = [name for name in self.active_adapters if name in self.scales]
        tape = self.state.current_tape()
        if self.disable_adapters or not names or (tape is not None and tape.row_adapters is not None):
            return self.base_layer(hidden_states, *args, **kwargs)
        weight = self._weight()
        with torch.autocast(hidden_states.device.type, enabled=False):
            tuned = weight.to(torch.promote_types(weight.dtype, torch.float32))
            for name in names:
                difference = self.difference(name)
                if tape is not None:
                    difference = self._watch(name, difference, hidden_states, tape)
                elif self.training and torch.is_grad_enabled() and self._coefficients(name).drift:
                    warn_no_weight()  # called past the model
                tuned = tuned + difference
        # A call with another weight, not a copy of the module: hooks on the router (recorders, expert parallelism) stay.
        return torch.func.functional_call(
            self.base_layer, {self.site.weight_name: tuned.to(weight.dtype)}, (hidden_states, *args), kwargs
        )

    def _watch(self, name: str, difference: Tensor, hidden_states: Tensor, tape: ForwardTape) -> Tensor:
        """Record the drift of this pass, and let its gradient reach the difference."""
        coefficients = self._coefficients(name)
        rows = hidden_states.detach().reshape(-1, hidden_states.shape[-1])
        rows = rows / getattr(self.base_layer, "input_divisor", 1.0)  # of a µP model's router, which is called below
        weight = self._weight().detach().to(difference.dtype)
        bias = (
            None if self.site.bias_name is None else self._parameter(self.site.bias_name).detach().to(difference.dtype)
        )
        compiling = torch.compiler.is_compiling()
        if (coefficients.drift or self.state.recorders) and tape is self.state.tape:
            change, groups = difference if compiling else difference.detach(), tape.groups("sequence", rows.shape[0])
            self.record.drift[name] = drift_sums(rows.to(difference.dtype), weight, change, bias, groups)
        if tape.training and coefficients.drift and not compiling:
            return _DriftAnchor.apply(difference, rows, weight, bias, tape, name)
        return difference

    def _coefficients(self, name: str) -> RouterCoefficients:
        return self.state.coefficients.get(name, RouterCoefficients())

    def _weight(self) -> Tensor:
        return self._parameter(self.site.weight_name)

    def _parameter(self, path: str) -> Tensor:
        owner, _, name = path.rpartition(".")
        return getattr(self.base_layer.get_submodule(owner), name)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        return self._weight().device, None


class _DriftAnchor(torch.autograd.Function):
    """Identity on a router's difference [num_experts, hidden]; backward adds the gradient of its drift."""

    @staticmethod
    def forward(
        ctx: Any, difference: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, tape: ForwardTape, adapter: str
    ) -> Tensor:
        ctx.save_for_backward(difference, rows, weight)
        ctx.bias, ctx.tape, ctx.adapter = bias, tape, adapter
        return difference.view_as(difference)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        difference, rows, weight = ctx.saved_tensors
        tape = ctx.tape

        def sums(leaf: Tensor) -> DriftSums:
            return drift_sums(rows.to(leaf.dtype), weight, leaf, ctx.bias, tape.groups("sequence", rows.shape[0]))

        drift = tape.drift_gradient(ctx.adapter, difference, sums)
        gradient = gradients[0]
        return gradient if drift is None else gradient + drift, None, None, None, None, None
