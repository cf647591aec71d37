"""PERFT: routed adapters for Mixture-of-Experts models, as a PEFT tuner.

PERFT (arXiv 2411.08212, 2508.02587) adds small adapters beside the experts of each MoE block and can route tokens among
them. R has a router of its own, E reuses the frozen base router with one adapter per base expert, D adds several
always-on adapters, S one. The base model stays frozen; nothing can be merged into it exactly.

======== ======================= ===========================================================
symbol   code                    where
======== ======================= ===========================================================
E, K     base experts, active    base model's configuration
M        ``num_experts``         adapters per layer
N        ``top_k``               adapters per token, variant R
r, b     ``r``                   bottleneck width
s        ``lora_alpha / r``      LoRA scale
A, W1    ``perft_A``             [num_experts, r, hidden]
B, W2    ``perft_B``             [num_experts, hidden, r]
W~       ``perft_router``        [num_experts, hidden]
L_aux    ``load_balance_loss``   ``M * sum_k sum_i f[k,i] P[i]``, padding masked; over ``router_aux_loss_scope``
======== ======================= ===========================================================

Departures from the paper's public code, and why:

* OLMoE R weighs an adapter by its own router; the authors' code multiplies by the base router's probability, so their
  PERFT-R router never learns from the model's loss.
* B starts at exact zero (the adapter is a no-op at birth), A Kaiming-uniform per expert; ``init_weights="paper"`` gives
  the authors' A (which takes the rank for the fan-in) and tiny random B.
* The router and its arithmetic are float32 at least; in bfloat16 it hardly moves at the authors' learning rates.
* The auxiliary loss is taken per sequence and layer, reaches the router with the weight the sequence's loss tokens have
  in the step, and is logged apart. ``router_aux_loss_scope="batch"`` pools micro-batch and layers as the authors do.
* Dropout on a LoRA adapter's input draws one mask per token, not one per token and adapter.
"""

from hf_moe_ext import registry
from hf_moe_ext.perft.config import PerftConfig, PerftType
from hf_moe_ext.perft.model import PerftModel

__all__ = ["PerftConfig", "PerftModel"]

# Not router_load: PEFT is imported, and with it this package, in the middle of Transformers' own import of its Trainer,
# whose callbacks do not exist yet at that point.
registry.register_tuner(PerftType.PERFT, PerftConfig, PerftModel)
