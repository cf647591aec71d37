"""Parameters and bytes of an upcycled model by part, from an outline without weights."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from hf_moe_ext.convert.dense_parents import DERS
from hf_moe_ext.convert.upcycle_plan import DELTAS, UpcyclePlan
from hf_moe_ext.convert.upcycle_report import UpcycledLayer, UpcycleReport
from hf_moe_ext.scaling.ders_accounting import DENSE_BITS, break_even_bits, break_even_drop_rate, break_even_rank

_PARTS = {
    "router": re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.weight"),
    "deltas": re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.delta_\w+"),
    "expert_biases": re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.\w+_bias"),
    "experts": re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(?:gate_up_proj|down_proj)"),
    "universal": re.compile(r"model\.layers\.(\d+)\.mlp\.shared_expert\..*"),
}


def count(plan: UpcyclePlan, dtype: torch.dtype, report: UpcycleReport) -> None:
    """Fill in every number of the report that needs no weights.

    Args:
        plan: the upcycling.
        dtype: of the result's weights; where a checkpoint mixes types, of its FFNs.
        report: filled in.
    """
    parent, result = plan.outline_parent(), plan.outline_result()
    tensors, trained = _state(result), dict(result.named_parameters())
    report.num_parameters_before = sum(p.numel() for p in parent.parameters())
    report.num_parameters = sum(p.numel() for p in result.parameters())
    expert_blocks = DERS if plan.settings.form == DERS else "standard"
    report.num_bytes = sum(_count_bytes(name, tensor, dtype) for name, tensor in tensors.items())
    report.layers = [
        UpcycledLayer(i, expert_blocks if i in plan.layers else "dense") for i in range(plan.parent.num_hidden_layers)
    ]
    idle = 0.0
    num_members = plan.settings.num_experts + (plan.settings.universal == "extend")
    for name, tensor in tensors.items():
        for part, pattern in _PARTS.items():
            if found := pattern.fullmatch(name):
                parameters, size = tensor.numel() if name in trained else 0, _count_bytes(name, tensor, dtype)
                if part in ("deltas", "expert_biases", "experts") and (part != "experts" or tensor.ndim == 3):
                    idle += parameters * (plan.settings.num_experts - plan.settings.top_k) / num_members
                _add(report, int(found[1]), part, tensor, parameters, size)
    report.num_active_parameters = round(report.num_parameters - idle)
    report.vanilla_bytes = _vanilla_bytes(plan, dtype, tensors)


def warn_of_bytes(plan: UpcyclePlan, dtype: torch.dtype, report: UpcycleReport) -> None:
    """Say so where base and deltas take more bytes than full copies, with the rate at which they would not."""
    s = plan.settings
    if s.form != DERS or report.num_bytes < report.vanilla_bytes:
        return
    size, hidden, width = dtype.itemsize, plan.parent.hidden_size, plan.parent.intermediate_size
    needed = {
        "low_rank": f"a rank below {break_even_rank(s.num_experts, hidden, width):.4g} saves",
        "sparse": f"a drop_rate above {break_even_drop_rate(s.num_experts, 'seed', size):.4g} saves",
        # 16 bits stand for entries as they are, in the checkpoint's type.
        "quantized": "fewer bits than 16 save"
        if s.bits == DENSE_BITS
        else f"bits, with {DENSE_BITS} of scale per 128, below {break_even_bits(s.num_experts) * size / 2:.4g} save",
    }[s.delta]
    name = DELTAS[s.delta]
    report.warnings.append(
        f"{name}={getattr(s, name)}: base and deltas take {report.num_bytes:,} bytes, full copies {report.vanilla_bytes:,}; "
        f"for {s.num_experts} experts of {hidden} x {width} only {needed} any"
    )


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters once, however often they are used, and the buffers that are saved."""
    state = model.state_dict()
    kept = {name for name, _ in model.named_parameters()} | (
        state.keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    )
    return {name: tensor for name, tensor in state.items() if name in kept}


def _count_bytes(name: str, tensor: Tensor, dtype: torch.dtype) -> int:
    own = not tensor.is_floating_point() or name.endswith("_scales")
    return tensor.numel() * (tensor.element_size() if own else dtype.itemsize)


def _add(report: UpcycleReport, layer: int, part: str, tensor: Tensor, parameters: int, size: int) -> None:
    # What the parent has already is not added: the base, the first copy, one expert's biases.
    if part == "experts":
        if tensor.ndim == 2:
            return
        part = "copies"
    if part in ("copies", "expert_biases"):
        share = len(tensor)
        parameters, size = parameters * (share - 1) // share, size * (share - 1) // share
    report.added_parameters[part] = report.added_parameters.get(part, 0) + parameters
    report.added_bytes[part] = report.added_bytes.get(part, 0) + size
    report.layers[layer].added_parameters += parameters


def _vanilla_bytes(plan: UpcyclePlan, dtype: torch.dtype, tensors: dict[str, Tensor]) -> int:
    """Bytes if each expert, and a universal one that shares the base, were a full copy."""
    s = plan.settings
    total = sum(_count_bytes(name, tensor, dtype) for name, tensor in tensors.items() if "delta_" not in name)
    if s.form == DERS:
        copies = s.num_experts + (s.universal == "extend") - 1
        parent: Any = plan.parent
        total += copies * 3 * parent.hidden_size * parent.intermediate_size * dtype.itemsize * len(plan.layers)
    return total
