"""Small experts with a shared base in every form, routings for them, and their slow twin read from the names on disk."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_moe_ext.ders.experts import DersExperts
from hf_moe_ext.ders.forward import fused, materialised
from hf_moe_ext.ops.delta_quantization import quantize
from support.naive_ders import grid_values, low_rank_matrices, shared_base_experts, sparse_matrices

HIDDEN, INNER, EXPERTS = 6, 5, 4
# One number for all matrices.
PLAIN_FORMS = {
    "low_rank": {"delta": "low_rank", "rank": 2},
    "sparse": {"delta": "sparse", "drop_rate": 0.7, "seed": 3, "layer": 2},
    "quantized": {"delta": "quantized", "bits": 4, "group_size": 4},
}
# A number for each matrix, values of few bits, stored positions.
MORE_FORMS = {
    "low_rank_each": {"delta": "low_rank", "rank": {"gate": 1, "up": 3, "down": 2}},
    "sparse_each": {"delta": "sparse", "drop_rate": {"gate": 0.5, "up": 0.7, "down": 0.9}},
    "sparse_bits": {"delta": "sparse", "drop_rate": 0.5, "bits": 4, "group_size": 4},
    "stored": {"delta": "sparse", "drop_rate": 0.7, "stored_positions": True},
    "stored_bits_each": {
        **{"delta": "sparse", "drop_rate": {"gate": 0.5, "up": 0.7, "down": 0.9}, "stored_positions": True},
        **{"bits": {"gate": 1, "up": 8, "down": 16}, "group_size": 4},
    },
    "quantized_each": {"delta": "quantized", "bits": {"gate": 16, "up": 1, "down": 8}, "group_size": 4},
}
FORMS = PLAIN_FORMS | MORE_FORMS


def paths(form: str) -> dict[str, str | None]:
    """Name of each forward that serves a form, and its ``path`` in ``fused``."""
    low_rank = {path: path for path in ("dense", "gathered", "pairwise")} if form.startswith("low_rank") else {}
    return {"materialised": None, "grouped": "grouped", **low_rank}


def every_path(forms) -> list[tuple[str, str]]:
    return [(form, path) for form in forms for path in paths(form)]


def make_experts(form="low_rank", gated=True, bias=True, dtype=torch.float64, **more) -> DersExperts:
    """Experts whose base, deltas and biases are all of the same size."""
    settings = {"hidden_dim": HIDDEN, "intermediate_dim": INNER, "num_experts": EXPERTS, **FORMS[form], **more}
    if not gated:
        settings = {
            name: {matrix: value[matrix] for matrix in ("up", "down")} if isinstance(value, dict) else value
            for name, value in settings.items()
        }
    module = DersExperts(act="silu" if gated else F.gelu, gated=gated, bias=bias, **settings).to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    if module.bits is not None:
        for matrix in module.matrices:
            draw_codes(module, matrix)
    if module.stored_positions:
        for matrix in module.matrices:
            draw_positions(module, matrix)
    return module


@torch.no_grad()
def draw_codes(module: DersExperts, matrix: str) -> None:
    form = module.forms[matrix]
    shape = (1, form.num_kept) if form.form == "sparse" else form.shape
    for expert in range(module.num_experts):
        code = quantize(0.5 * torch.randn(shape), form.bits, module.group_size)
        for part, tensor in code.tensors().items():
            getattr(module, f"delta_{matrix}_{part}")[expert] = tensor[0] if form.form == "sparse" else tensor


def draw_positions(module: DersExperts, matrix: str) -> None:
    """Other ones than the seed's."""
    form, positions = module.forms[matrix], getattr(module, f"delta_{matrix}_positions")
    for row in positions:
        row.copy_(torch.randperm(form.shape[0] * form.shape[1])[: form.num_kept].sort().values)


def route(tokens: int, top_k: int, routing: str = "any", experts: int = EXPERTS) -> tuple[Tensor, Tensor]:
    """Distinct ids of each token and gates that do not sum to 1.

    "idle" leaves expert 1 out, "sentinels" has ids outside, "nobody" has no others.
    """
    index = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    if routing == "idle":
        index = torch.stack([torch.tensor([0, 2, 3])[torch.randperm(3)[:top_k]] for _ in range(tokens)])
    if routing == "sentinels":
        index[0], index[2, 1], index[-1, 0] = experts, experts + 3, -1
    if routing == "nobody":
        index[:] = experts
    return index, 0.1 + torch.rand(tokens, top_k, dtype=torch.float64)


def run(module: DersExperts, path: str, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    if path == "materialised":
        return materialised(hidden, index, weights, module.experts())
    return fused(hidden, index, weights, module.experts(), path=path)


def matrices(module: DersExperts, matrix: str) -> list[Tensor]:
    """Every expert's delta from the tensors on disk, entry by entry."""
    stored = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    form = module.forms[matrix]
    parts = {part: stored[f"delta_{matrix}_{part}"] for part in form.parts(module.num_experts)}
    if form.form == "low_rank":
        return low_rank_matrices(parts["A"], parts["B"])
    values = parts.get("values")
    if form.bits is not None:
        width = form.num_kept if form.form == "sparse" else form.shape[1]
        values = grid_values(parts["codes"], parts.get("scales"), form.bits, module.group_size, width)
    if form.form == "quantized":
        return list(values)
    if "positions" in parts:
        return sparse_matrices(values, parts["positions"].tolist(), form.shape)
    places = [module.deltas(matrix).delta(i).indices.positions().tolist() for i in range(module.num_experts)]
    return sparse_matrices(values, places, form.shape)


def naive(module: DersExperts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The loop on the module's own parameters, read by their names on disk."""
    stored, inner = dict(module.named_parameters()), module.intermediate_dim
    base, biases = {"down": stored["down_proj"]}, {}
    if module.gated:
        base["gate"], base["up"] = stored["gate_up_proj"][:inner], stored["gate_up_proj"][inner:]
    else:
        base["up"] = stored["up_proj"]
    if module.gated and module.has_bias:
        both = stored["gate_up_proj_bias"]
        biases = {"gate": both[:, :inner], "up": both[:, inner:], "down": stored["down_proj_bias"]}
    elif module.has_bias:
        biases = {"up": stored["up_proj_bias"], "down": stored["down_proj_bias"]}
    deltas = {matrix: matrices(module, matrix) for matrix in base}
    rules = (module.act_fn, module.post_norm, module.gates_on_input)
    return shared_base_experts(hidden, index, weights, base, deltas, biases, *rules)


def gradients(module: DersExperts, output: Tensor, hidden: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Of the input, the gates and every parameter, for one fixed direction; None for what is not in the graph."""
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = {"hidden": hidden, "weights": weights, **dict(module.named_parameters())}
    found = torch.autograd.grad((output * direction).sum(), list(leaves.values()), allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def assert_same(found: dict, expected: dict, atol: float) -> None:
    for name, gradient in found.items():
        wanted = torch.zeros_like(gradient) if expected[name] is None else expected[name]
        torch.testing.assert_close(gradient, wanted, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
