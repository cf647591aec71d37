"""The DCCA block: route on the full width, descend, experts in the latent width, combine, ascend.

    z = x W_d;  u = sum over the chosen experts of p_i E_i(z);  y = u W_u        (arXiv 2502.16927, section 3)

E_i(z) = act(z U_i) D_i, or gated (act(z G_i) * (z U_i)) D_i. Only z and u travel between ranks.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from hf_moe_ext.dcca.initialization import combined_weight_norm, initial_scales
from hf_moe_ext.host.families import expert_width, normalizes_top_k
from hf_moe_ext.ops.routing import jitter


class _LatentExperts(nn.Module):
    """Experts stacked in three-dimensional tensors, reading and writing the latent width."""

    gated: bool
    init_std: dict[str, float]  # of each weight, for the model's `_init_weights`
    _apply_gate: Callable[[Tensor], Tensor]  # set by the decorator

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = config.num_local_experts
        self.hidden_dim = config.moe_latent_size
        self.intermediate_dim = config.moe_expert_intermediate_size
        self.act_fn = ACT2FN[config.moe_expert_act]
        wide = self.intermediate_dim * (2 if self.gated else 1)
        first = nn.Parameter(torch.empty(self.num_experts, wide, self.hidden_dim))
        if self.gated:
            self.gate_up_proj = first
        else:
            self.up_proj = first
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs, expert by expert: the "eager" implementation.

        Args:
            hidden_states: [tokens, latent].
            top_k_index: expert ids [tokens, top_k]; ids from ``num_experts`` on are experts of other ranks: no output.
            top_k_weights: [tokens, top_k].
        """
        output = torch.zeros_like(hidden_states)
        first = self.gate_up_proj if self.gated else self.up_proj
        for expert in range(self.num_experts):
            tokens, choices = torch.where(top_k_index == expert)
            # Expert 0 runs on no rows too: an output without a graph would leave other ranks waiting in the backward.
            if tokens.numel() == 0 and expert > 0:
                continue
            inner = nn.functional.linear(hidden_states[tokens], first[expert])
            inner = self._apply_gate(inner) if self.gated else self.act_fn(inner)
            rows = nn.functional.linear(inner, self.down_proj[expert]) * top_k_weights[tokens, choices, None]
            output = output.index_add(0, tokens, rows.to(output.dtype))
        return output


@use_experts_implementation(has_gate=False)
class DccaExperts(_LatentExperts):
    """Un-gated experts, as in the paper: ``up_proj`` [experts, F, R], ``down_proj`` [experts, R, F]."""

    gated = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See ``_LatentExperts.forward``."""
        return super().forward(hidden_states, top_k_index, top_k_weights)


@use_experts_implementation
class DccaGatedExperts(_LatentExperts):
    """Gated experts: ``gate_up_proj`` [experts, 2F, R] (gate rows first), ``down_proj`` [experts, R, F]."""

    gated = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See ``_LatentExperts.forward``."""
        return super().forward(hidden_states, top_k_index, top_k_weights)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers that may be looked at: no outline, no tracer, no recording of a CUDA graph."""
    if type(tensor) is not Tensor or tensor.device.type == "meta":
        return False
    recorded = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
    return not recorded and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


class SharedExpert(nn.Module):
    """An expert of full width that every token passes, of the same form as the routed ones."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.moe_shared_expert_intermediate_size
        if config.moe_expert_gated:
            self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.moe_expert_act]
        self.gated = config.moe_expert_gated

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden] to [..., hidden]."""
        up = self.up_proj(hidden_states)
        inner = self.act_fn(self.gate_proj(hidden_states)) * up if self.gated else self.act_fn(up)
        return self.down_proj(inner)


class DccaMoeBlock(nn.Module):
    """Stands where a stock MoE block stands: [batch, sequence, hidden] to the same shape.

    Args:
        config: an ``*_ext`` configuration with every key resolved.
        gate: the family's own top-k router; called with [tokens, hidden], returns (logits, weights, ids).
        sizes: the widths that the initial scales are taken at (``initial_scales``); None: the configuration's.
    """

    def __init__(self, config: Any, gate: nn.Module, sizes: Mapping[str, float] | None = None) -> None:
        super().__init__()
        latent_size = config.moe_latent_size
        self.jitter_noise = getattr(config, "router_jitter_noise", 0.0)  # Mixtral's
        self.gate = gate
        self.descend = nn.Linear(config.hidden_size, latent_size, bias=False)
        self.experts = (DccaGatedExperts if config.moe_expert_gated else DccaExperts)(config)
        if config.moe_latent_norm:
            self.latent_norm = nn.RMSNorm(latent_size, eps=config.rms_norm_eps)
        self.ascend = nn.Linear(latent_size, config.hidden_size, bias=False)
        if config.moe_shared_expert_intermediate_size:
            self.shared_expert = SharedExpert(config)
        self.last_latent_magnitude: Tensor | None = None
        own = {
            "hidden_size": config.hidden_size,
            "intermediate_size": expert_width(config),
            "latent_size": latent_size,
            "expert_intermediate_size": config.moe_expert_intermediate_size,
        }
        self._set_initial_scales(config, own if sizes is None else sizes)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Route, descend, experts, combine, ascend."""
        shape = hidden_states.shape
        if self.training and self.jitter_noise > 0:
            hidden_states = jitter(hidden_states, self.jitter_noise)
        tokens = hidden_states.reshape(-1, shape[-1])
        _, weights, index = self.gate(tokens)
        # The experts sum over the chosen ones, here or on the ranks that hold them; ascend is linear, so once is enough.
        latent = self.experts(self.descend(tokens), index, weights)
        if self.training and not torch.compiler.is_compiling() and is_plain(latent):
            # Read after the forward, to name the layer that went wrong; keeping it costs one pass and no wait.
            dtype = torch.promote_types(latent.dtype, torch.float32)
            self.last_latent_magnitude = torch.linalg.vector_norm(latent.detach(), dtype=dtype)
        if hasattr(self, "latent_norm"):
            latent = self.latent_norm(latent)
        output = self.ascend(latent)
        if hasattr(self, "shared_expert"):
            output = output + self.shared_expert(tokens)
        return output.reshape(shape)

    def _set_initial_scales(self, config: Any, sizes: Mapping[str, float]) -> None:
        """Leave on each module what standard deviation its weights are drawn with; the model's ``_init_weights`` reads it."""
        norm = None
        if config.moe_latent_norm:
            norm = combined_weight_norm(
                config.num_local_experts,
                config.num_experts_per_tok,
                logit_std=config.initializer_range * sizes["hidden_size"] ** 0.5,
                normalized=normalizes_top_k(self.experts),
            )
        scales = initial_scales(
            **sizes,
            act=ACT2FN[config.hidden_act],
            expert_act=ACT2FN[config.moe_expert_act],
            gated=config.moe_expert_gated,
            initializer_range=config.initializer_range,
            combined_norm=norm,
            norm_eps=config.rms_norm_eps,
        )
        first = "gate_up_proj" if config.moe_expert_gated else "up_proj"
        # Transformers' initialisation passes over any module of ours without weights of its own, such as the block.
        for projection, std in ((self.descend, scales.descend), (self.ascend, scales.ascend)):
            projection.init_std = {"weight": std}  # type: ignore[assignment]
        self.experts.init_std = {first: scales.up, "down_proj": scales.down}
