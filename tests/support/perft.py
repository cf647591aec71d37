"""Tiny PERFT models, and the auxiliary loss written out with ordinary autograd."""

import dataclasses

import torch
from peft import get_peft_model

from hf_moe_ext import PerftConfig
from hf_moe_ext.perft.layer import PerftLayer
from hf_moe_ext.perft.tape import RouterCoefficients
from support import naive, zoo

COEFFICIENTS = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}


def perft_r(family="olmoe", dtype=torch.float64, **arguments):
    """A tiny model with a randomly initialised PERFT-R adapter, in training mode."""
    config = {"variant": "R", "r": 4, "num_experts": 4, "top_k": 2, "init_weights": False, **COEFFICIENTS} | arguments
    base = zoo.build(family, dtype=dtype)
    torch.manual_seed(1)
    return get_peft_model(base, PerftConfig(task_type="CAUSAL_LM", **config)).train()


def batch(rows=3, length=7, seed=0):
    return zoo.random_batch(zoo.VOCAB_SIZE, rows, length, zoo.PAD_ID, seed)


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model, loss):
    parameters = trainable(model)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def explicit_auxiliary(model, inputs):
    """(cross-entropy, auxiliary loss by the loops) with ordinary autograd: no tape, the definition written out."""
    layers = [m for m in model.modules() if isinstance(m, PerftLayer)]
    seen = []
    hooks = [layer.register_forward_pre_hook(lambda m, args: seen.append((m, args[0]))) for layer in layers]
    saved = [(layer, layer.settings["default"]) for layer in layers]
    for layer, settings in saved:
        layer.settings["default"] = dataclasses.replace(settings, coefficients=RouterCoefficients())
    try:
        cross_entropy = model(**inputs).loss
    finally:
        for hook in hooks:
            hook.remove()
        for layer, settings in saved:
            layer.settings["default"] = settings
    mask = inputs["attention_mask"].bool().flatten()
    probs, indices, logits = [], [], []
    for layer, hidden in seen:
        router, settings = layer.perft_router["default"], layer.settings["default"]
        rows = hidden.reshape(-1, hidden.shape[-1])
        p, index, _ = naive.route(rows, router, settings.top_k, settings.normalize)
        probs.append(p)
        indices.append(torch.as_tensor(index))
        logits.append(rows.double() @ router.double().T)
    coefficients = saved[0][1].coefficients
    auxiliary = coefficients.load_balance * naive.load_balance_loss(probs, indices, mask)
    return cross_entropy, auxiliary + coefficients.z * naive.router_z_loss(logits, mask)


def assert_equal_gradients(ours, theirs, atol=1e-10):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
