"""Mixture-of-Experts fine-tuning for the Hugging Face stack.

Importing this package is cheap: it loads neither torch, transformers nor peft. It leaves notes for the imports of PEFT and
Transformers so that every loader (``PeftModel``, ``AutoPeftModel*``, ``AutoModel*.from_pretrained``) knows our types,
whichever package is imported first.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hf_moe_ext import registry

if TYPE_CHECKING:
    from hf_moe_ext.audit.recorder import RoutingRecorder
    from hf_moe_ext.audit.thresholds import RoutingThresholds
    from hf_moe_ext.dcca.meter import TrafficMeter
    from hf_moe_ext.dcca.traffic_callback import TrafficCallback
    from hf_moe_ext.models import (
        MixtralExtConfig,
        MixtralExtForCausalLM,
        OlmoeExtConfig,
        OlmoeExtForCausalLM,
        Qwen3MoeExtConfig,
        Qwen3MoeExtForCausalLM,
    )
    from hf_moe_ext.models.distribution import check_distribution
    from hf_moe_ext.perft import PerftConfig, PerftModel
    from hf_moe_ext.perft.calibration import choose_experts_to_adapt
    from hf_moe_ext.perft.groups import param_groups
    from hf_moe_ext.perft.report import count_trainable
    from hf_moe_ext.perft.router_load import RouterLoadCallback, record_router_load

__version__ = "0.1.0"

_EXPORTS = {
    "TrafficCallback": "hf_moe_ext.dcca.traffic_callback",
    "TrafficMeter": "hf_moe_ext.dcca.meter",
    "MixtralExtConfig": "hf_moe_ext.models",
    "MixtralExtForCausalLM": "hf_moe_ext.models",
    "OlmoeExtConfig": "hf_moe_ext.models",
    "OlmoeExtForCausalLM": "hf_moe_ext.models",
    "Qwen3MoeExtConfig": "hf_moe_ext.models",
    "Qwen3MoeExtForCausalLM": "hf_moe_ext.models",
    "PerftConfig": "hf_moe_ext.perft",
    "PerftModel": "hf_moe_ext.perft",
    "RouterLoadCallback": "hf_moe_ext.perft.router_load",
    "RoutingRecorder": "hf_moe_ext.audit.recorder",
    "RoutingThresholds": "hf_moe_ext.audit.thresholds",
    "check_distribution": "hf_moe_ext.models.distribution",
    "choose_experts_to_adapt": "hf_moe_ext.perft.calibration",
    "count_trainable": "hf_moe_ext.perft.report",
    "param_groups": "hf_moe_ext.perft.groups",
    "record_router_load": "hf_moe_ext.perft.router_load",
}
__all__ = [
    "MixtralExtConfig",
    "MixtralExtForCausalLM",
    "OlmoeExtConfig",
    "OlmoeExtForCausalLM",
    "PerftConfig",
    "PerftModel",
    "Qwen3MoeExtConfig",
    "Qwen3MoeExtForCausalLM",
    "RouterLoadCallback",
    "RoutingRecorder",
    "RoutingThresholds",
    "TrafficCallback",
    "TrafficMeter",
    "__version__",
    "check_distribution",
    "choose_experts_to_adapt",
    "count_trainable",
    "param_groups",
    "record_router_load",
]


def __getattr__(name: str) -> Any:
    """Resolve public names on first use (PEP 562)."""
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)


registry.install()
