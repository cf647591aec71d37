"""µP for Mixture of Experts: the learning rate that is best for a narrow model is best for a wide one.

A base model is declared in the configuration (``mup_base_hidden_size`` ...); every tensor's initial scale, learning rate,
weight decay and epsilon, and two or three multipliers in the forward pass, then follow from how much wider than the base
the model is along each axis of the tensor (Małaśnicki et al., arXiv 2508.09752; the rules are those of Tensor Programs V,
arXiv 2203.03466, tables 3 and 8). Everything is in ``config.json``, nothing on tensors, and with power-of-two ratios the
model folds back to a stock checkpoint bit for bit (``hf-moe fold``).

| symbol | code name | meaning |
|---|---|---|
| n, n_base | ``hidden_size``, ``mup_base_hidden_size`` | width; m = n / n_base |
| H, H_base | ``intermediate_size``, ``mup_base_intermediate_size`` | width inside an expert; m_H |
| d_h | head dimension, ``mup_base_head_dim`` | attention logits are divided by d_h, times sqrt(d_h,base) |
| R, R_base | ``moe_latent_size``, ``mup_base_latent_size`` | latent width of a DCCA block; m_R |
| η, λ, ε, σ | ``lr``, ``weight_decay``, ``eps``, ``initializer_range`` | tuned at the base |
| form A, B | ``mup_form`` "multiplier", "folded" | logits of router and head divided by m, or folded into their weights |

A tensor's role follows from its declared axes (``hf_moe_ext/host/axes.py``) and from which of them grow:

* both grow: hidden (q, k, v, o, experts). Only the input grows: output (router, head). Only the output grows: input
  (embedding). A gain or bias along an axis that grows: vector. Nothing grows: finite.
* DCCA: with a latent that grows with the width, descend, ascend and the latent experts are hidden, the latent norm a
  vector. With a latent held at one size, descend is output, ascend input, the experts' first matrix input and their last
  output, the norm finite. An output of this kind has no multiplier and takes the folded rule in both forms.
* A shared expert is an expert whose width grows with the experts'. Latent experts are taken to be as wide as equal
  parameters ask: F grows as n H / R.
* LoRA and PERFT on a µP model: A maps a width to the rank (output: η/m), B the rank to a width (input: η), as LoRA+
  (arXiv 2402.12354) finds too; PERFT's router is an output without a multiplier. What is added to the router or the head is
  divided as they are, also when it is merged, and gets their rate. Their first weights are drawn by PEFT. LoRA on stacked
  experts (``target_parameters``) has no role: its names do not tell which matrix it adapts.

Muon (``trainer_optimizer(model, torch.optim.Muon, lr=..., adam_lr=...)``) trains the hidden matrices, AdamW everything else:
torch's Muon takes matrices only, so stacked experts are AdamW's. Muon's update has singular values near 1, and a hidden
matrix must move by sqrt(fan_out / fan_in) in spectral norm (arXiv 2310.17813, condition 1); torch has it move by the rate
times a of its shape, a = sqrt(max(1, fan_out / fan_in)) for ``adjust_lr_fn="original"``, 0.2 sqrt(max(fan_out, fan_in)) for
"match_rms_adamw". So the rate's factor is sqrt(m_out / m_in) a_base / a; with all axes in one ratio m this is 1, or
m^-1/2.

Where we depart: epsilon is divided by the ratio of the output's axis, which is the papers' ε/m when all axes grow alike;
``simplep`` leaves the router in standard parametrisation, and nothing else.

Prefer a latent that grows. One that is held starts a block whose output is of size n^-3/2, and the first steps of a wide
model still see it rise (``model_cards/mup-coord.md``).
"""

import importlib
from typing import Any

_EXPORTS = {
    "AXES": "hf_moe_ext.mup.widening",
    "Cell": "hf_moe_ext.mup.sweep",
    "CoordCheck": "hf_moe_ext.mup.coord_check",
    "MuonWithAdamW": "hf_moe_ext.mup.muon",
    "Sweep": "hf_moe_ext.mup.sweep",
    "check_coordinates": "hf_moe_ext.mup.coord_check",
    "draw_sweep": "hf_moe_ext.mup.sweep_plot",
    "find_cell": "hf_moe_ext.mup.sweep",
    "find_optimum": "hf_moe_ext.mup.optimum",
    "muon_groups": "hf_moe_ext.mup.muon",
    "param_groups": "hf_moe_ext.mup.groups",
    "read_cells": "hf_moe_ext.mup.sweep",
    "record_training_arguments": "hf_moe_ext.mup.small_run",
    "run_cell": "hf_moe_ext.mup.sweep_runs",
    "run_cells": "hf_moe_ext.mup.sweep_runs",
    "search_cells": "hf_moe_ext.mup.sweep_runs",
    "summarize": "hf_moe_ext.mup.optimum",
    "trainer_optimizer": "hf_moe_ext.mup.groups",
}
__all__ = [
    "AXES",
    "Cell",
    "CoordCheck",
    "MuonWithAdamW",
    "Sweep",
    "check_coordinates",
    "draw_sweep",
    "find_cell",
    "find_optimum",
    "muon_groups",
    "param_groups",
    "read_cells",
    "record_training_arguments",
    "run_cell",
    "run_cells",
    "search_cells",
    "summarize",
    "trainer_optimizer",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
