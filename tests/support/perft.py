"""Tiny PERFT models, and the auxiliary loss written out with ordinary autograd."""

import dataclasses

import torch
from peft import get_peft_model

from hf_moe_ext import PerftConfig
from hf_moe_ext.perft.layer import PerftLayer
from hf_moe_ext.perft.tape import RouterCoefficients
from support import naive, zoo

# The scope in which layers and micro-batches have most to do with each other.
COEFFICIENTS = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1, "router_aux_loss_scope": "batch"}


def perft_r(family="olmoe", dtype=torch.float64, **arguments):
    """A tiny model with a randomly initialised PERFT-R adapter, in training mode."""
    layers = {key: arguments.pop(key) for key in ("num_hidden_layers",) if key in arguments}
    config = {"variant": "R", "r": 4, "num_experts": 4, "top_k": 2, "init_weights": False, **COEFFICIENTS} | arguments
    base = zoo.build(family, dtype=dtype, **layers)
    if dtype == torch.float64:
        base.loss_function = exact_cross_entropy
    torch.manual_seed(1)
    return get_peft_model(base, PerftConfig(task_type="CAUSAL_LM", **config)).train()


def batch(rows=3, length=7, seed=0):
    return zoo.random_batch(zoo.VOCAB_SIZE, rows, length, zoo.PAD_ID, seed)


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model, loss):
    parameters = trainable(model)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def observe(model, inputs):
    """(the model's loss without the tape, per layer the loops' probabilities, choices and logits), ordinary autograd."""
    layers = [m for m in model.modules() if isinstance(m, PerftLayer)]
    seen = []
    hooks = [layer.register_forward_pre_hook(lambda m, args: seen.append((m, args[0]))) for layer in layers]
    saved = [(layer, layer.settings["default"]) for layer in layers]
    for layer, settings in saved:
        layer.settings["default"] = dataclasses.replace(settings, coefficients=RouterCoefficients())
    try:
        loss = model(**inputs).loss
    finally:
        for hook in hooks:
            hook.remove()
        for layer, settings in saved:
            layer.settings["default"] = settings
    routed = []
    for layer, hidden in seen:
        router, settings = layer.perft_router["default"], layer.settings["default"]
        rows = hidden.reshape(-1, hidden.shape[-1])
        probabilities, index, _ = naive.route(rows, router, settings.top_k, settings.normalize)
        routed.append((probabilities, torch.as_tensor(index), rows.double() @ router.double().T))
    return loss, routed


def explicit_auxiliary(model, inputs):
    """(cross-entropy, auxiliary loss of the scope "batch" by the loops): no tape, the definition written out."""
    cross_entropy, routed = observe(model, inputs)
    coefficients = _coefficients(model)
    mask = inputs["attention_mask"].flatten().tolist()
    sequences = [0 if counts else -1 for counts in mask]
    return cross_entropy, naive.scoped_auxiliary(routed, sequences, "batch", coefficients.load_balance, coefficients.z)[
        0
    ]


def sequences_of(inputs):
    """For each token the number of its row, or -1 for padding."""
    return [row if counts else -1 for row, line in enumerate(inputs["attention_mask"].tolist()) for counts in line]


def explicit_objective(model, inputs, step_tokens, last_load=None):
    """(what the step's loss gains by this micro-batch, the choices per layer): every sequence weighs with its loss tokens."""
    cross_entropy, routed = observe(model, inputs | {"num_items_in_batch": torch.tensor(step_tokens)})
    coefficients = _coefficients(model)
    values = naive.scoped_auxiliary(
        routed, sequences_of(inputs), coefficients.scope, coefficients.load_balance, coefficients.z, last_load
    )
    objective = cross_entropy
    for value, labels in zip(values, inputs["labels"], strict=True):
        objective = objective + value * int(labels[1:].ne(-100).sum()) / step_tokens
    return objective, [index for _, index, _ in routed]


def load_of_step(batches, choices):
    """Per layer the share of all tokens of a step that chose each of the 4 experts; choices per batch and layer."""
    counted = [s >= 0 for inputs in batches for s in sequences_of(inputs)]
    return [naive.shares_of_experts(torch.cat(list(layer)), counted, 4) for layer in zip(*choices, strict=True)]


def steps_by_definition(model, batches, step_tokens, steps=2):
    """Gradients of steps over these micro-batches at unchanged weights, by the definition; the second has a last load.

    ``step_tokens`` holds for each micro-batch the loss tokens its loss is divided by.
    """
    last_load, expected = None, []
    for _ in range(steps):
        parts = [
            explicit_objective(model, inputs, tokens, last_load)
            for inputs, tokens in zip(batches, step_tokens, strict=True)
        ]
        expected.append(gradients(model, sum(part for part, _ in parts)))
        last_load = load_of_step(batches, [index for _, index in parts])
    return expected


def loss_tokens(inputs):
    return int(inputs["labels"][:, 1:].ne(-100).sum())


def _coefficients(model):
    return next(m for m in model.modules() if isinstance(m, PerftLayer)).settings["default"].coefficients


def exact_cross_entropy(logits, labels, vocab_size=None, num_items_in_batch=None, **_):
    """The causal loss of Transformers without its cast to float32, for comparisons to 1e-10."""
    targets = labels[:, 1:].reshape(-1)
    nats = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="sum")
    return nats / (targets.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)


def assert_equal_gradients(ours, theirs, atol=1e-10):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
