"""Gradients of base and deltas: the identities, idle experts, what autograd keeps."""

import pytest
import torch
from torch import Tensor

from hf_moe_ext.ders.experts import DersExperts
from support.ders_experts import (
    FORMS,
    HIDDEN,
    every_path,
    gradients,
    make_experts,
    route,
    run,
)
from support.naive_ders import shared_base_experts


@pytest.mark.parametrize(("form", "path"), every_path(FORMS))
def test_an_idle_expert_has_zeros_not_none(form, path):
    module = make_experts(form)
    index, weights = route(9, 2, "idle")
    run(module, path, torch.randn(9, HIDDEN, dtype=torch.float64), index, weights).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        if name not in ("gate_up_proj", "down_proj"):
            assert not parameter.grad[1].any(), name
            assert parameter.grad[0].any(), name


def dense_gradients(module: DersExperts, hidden: Tensor, index: Tensor, weights: Tensor) -> dict[str, list[Tensor]]:
    """dL/dW_i of every expert's whole matrices, from the loop, for the direction of ``gradients``."""
    deltas = {
        m: [module.deltas(m).delta(i).decode().detach().requires_grad_() for i in range(module.num_experts)]
        for m in module.matrices
    }
    inner = module.intermediate_dim
    base = {"gate": module.gate_up_proj[:inner], "up": module.gate_up_proj[inner:], "down": module.down_proj}
    output = shared_base_experts(hidden, index, weights, base, deltas, {}, module.act_fn)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (output * direction).sum().backward()
    return {m: [each.grad for each in deltas[m]] for m in deltas}


def test_gradient_identities_of_sparse_values_and_of_the_base():
    module = make_experts("sparse", bias=False)
    hidden = torch.randn(9, HIDDEN, dtype=torch.float64, requires_grad=True)
    index, weights = route(9, 2)
    weights.requires_grad_()
    G = dense_gradients(module, hidden, index, weights)
    found = gradients(module, run(module, "grouped", hidden, index, weights), hidden, weights)
    for matrix in module.matrices:
        for i, G_i in enumerate(G[matrix]):
            places = module.deltas(matrix).delta(i).indices.positions()
            gathered = G_i.reshape(-1)[places]
            torch.testing.assert_close(found[f"delta_{matrix}_values"][i], gathered, atol=1e-12, rtol=0)
    torch.testing.assert_close(found["gate_up_proj"], torch.cat([sum(G["gate"]), sum(G["up"])]), atol=1e-12, rtol=0)
    torch.testing.assert_close(found["down_proj"], sum(G["down"]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("path", ["dense", "grouped"])
def test_gradient_identities_of_low_rank_factors(path):
    module = make_experts(bias=False)
    hidden = torch.randn(9, HIDDEN, dtype=torch.float64, requires_grad=True)
    index, weights = route(9, 2)
    weights.requires_grad_()
    G = dense_gradients(module, hidden, index, weights)
    found = gradients(module, run(module, path, hidden, index, weights), hidden, weights)
    for matrix in module.matrices:
        A, B = getattr(module, f"delta_{matrix}_A"), getattr(module, f"delta_{matrix}_B")
        for i, G_i in enumerate(G[matrix]):
            torch.testing.assert_close(found[f"delta_{matrix}_A"][i], B[i].T @ G_i, atol=1e-12, rtol=0)
            torch.testing.assert_close(found[f"delta_{matrix}_B"][i], G_i @ A[i].T, atol=1e-12, rtol=0)


# Those of a decoding step are not for training; gathered copies factors.
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("form", "path"), [case for case in every_path(FORMS) if case[1] not in ("gathered", "pairwise")]
)
def test_only_the_materialised_path_keeps_matrices_of_experts(form, path, gated):
    module = make_experts(form, gated, dtype=torch.float32, hidden_dim=32, intermediate_dim=48)
    index, weights = route(6, 2)
    own = {tensor.untyped_storage().data_ptr() for tensor in module.state_dict().values()}
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() >= 32 * 48 and tensor.untyped_storage().data_ptr() not in own:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run(module, path, torch.randn(6, 32, requires_grad=True), index, weights.float())
    assert output.requires_grad
    # Two matrices a used expert or three: gate and up are one there.
    assert (len(kept) >= 2 * len(index.unique())) if path == "materialised" else not kept, kept
