"""What Muon is given, from the spectral condition: a hidden matrix must move by sqrt(fan_out / fan_in) in spectral norm.

Muon's update has all singular values near 1, so its size is its learning rate, times what torch adjusts it by. That
adjustment hangs on the matrix's shape; what it already does between the base's shape and this one is divided out of the
power in the rule table.
"""

import math
from collections.abc import Sequence

from hf_moe_ext.mup.roles import TensorRole

ORIGINAL, MATCH_RMS_ADAMW = "original", "match_rms_adamw"
ADJUSTMENTS = (None, ORIGINAL, MATCH_RMS_ADAMW)


def adjustment(fan_out: float, fan_in: float, adjust_lr_fn: str | None) -> float:
    """What ``torch.optim.Muon`` multiplies the learning rate by (torch/optim/_muon.py, ``_adjust_lr``)."""
    if adjust_lr_fn == MATCH_RMS_ADAMW:
        return 0.2 * math.sqrt(max(fan_out, fan_in))
    return math.sqrt(max(1.0, fan_out / fan_in))


def muon_factors(role: TensorRole, shape: Sequence[int], adjust_lr_fn: str | None) -> tuple[float, float, float]:
    """Factors on learning rate, independent weight decay and epsilon of a hidden matrix under Muon.

    With all axes in one ratio m: 1 for "original", m^-1/2 for "match_rms_adamw", at any shape.

    Args:
        role: of the matrix; its ratios say what shape it has in the base model.
        shape: (fan_out, fan_in).
        adjust_lr_fn: of Muon; None is "original".

    Source: arXiv 2310.17813, condition 1; the adjustments are Keller Jordan's and that of arXiv 2502.16982.
    """
    lr, decay, eps = role.update_factors("muon")
    fan_out, fan_in = shape
    base = adjustment(fan_out / role.fan_out, fan_in / role.fan_in, adjust_lr_fn)
    adjusted = adjustment(fan_out, fan_in, adjust_lr_fn) / base
    # Muon's decay is by the rate before its adjustment.
    return lr / adjusted, decay * adjusted, eps
