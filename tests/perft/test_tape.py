"""The auxiliary loss of PERFT-R: its gradient, its weight in the step, and who must not see it."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from peft import get_peft_model

from hf_moe_ext import PerftConfig, RouterLoadCallback, record_router_load
from hf_moe_ext.perft.layer import PerftLayer
from support import zoo
from support.perft import assert_equal_gradients, batch, explicit_auxiliary, gradients, perft_r, trainable


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek_v3"])
def test_gradient_equals_adding_the_loss(family, top_k):
    """The tape's gradient is that of cross-entropy + auxiliary loss, for the routers and for adapters of earlier layers.

    The reference differentiates the auxiliary loss through the hidden states too; the tape stops at the logits' own
    backward, which continues into the hidden states, so the two must agree everywhere.
    """
    model, inputs = perft_r(family, top_k=top_k), batch()
    cross_entropy, auxiliary = explicit_auxiliary(model, inputs)
    expected = gradients(model, cross_entropy + auxiliary)
    outputs = model(**inputs)
    torch.testing.assert_close(outputs.loss, cross_entropy, atol=1e-12, rtol=0)
    assert_equal_gradients(gradients(model, outputs.loss), expected)
    without = gradients(model, explicit_auxiliary(model, inputs)[0])
    router = next(name for name in expected if "perft_router" in name)
    assert (expected[router] - without[router]).abs().max() > 1e-4, "the auxiliary loss must be seen to act"


@pytest.mark.parametrize("factor", [1.0, 1024.0, 0.25])
def test_any_factor_on_the_loss_reaches_the_auxiliary_gradient(factor):
    """Loss scaling, division by accumulation steps, multiplication by the number of processes."""
    model, inputs = perft_r(), batch()
    expected = gradients(model, model(**inputs).loss)
    scaled = gradients(model, model(**inputs).loss * factor)
    assert_equal_gradients({name: g / factor for name, g in scaled.items()}, expected)


def test_micro_batches_count_with_their_share_of_loss_tokens():
    """What the Trainer does with accumulation: each forward gets the step's token count, the losses are summed."""
    model = perft_r()
    batches = [batch(rows, length, seed) for rows, length, seed in ((3, 7, 1), (1, 9, 2), (4, 5, 3))]
    tokens = [int(b["labels"][:, 1:].ne(-100).sum()) for b in batches]
    assert len(set(tokens)) == 3
    total = sum(tokens)
    expected = None
    for inputs, count in zip(batches, tokens, strict=True):
        # Transformers computes the cross-entropy in float32: take it as the Trainer has it, already divided.
        cross_entropy, auxiliary = explicit_auxiliary(model, inputs | {"num_items_in_batch": torch.tensor(total)})
        part = gradients(model, cross_entropy + auxiliary * (count / total))
        expected = part if expected is None else {n: expected[n] + g for n, g in part.items()}
    loss = sum(model(**inputs, num_items_in_batch=torch.tensor(total)).loss for inputs in batches)
    assert_equal_gradients(gradients(model, loss), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing_and_counts_once(reentrant):
    model, inputs = perft_r(), batch()
    with record_router_load(model) as plain:
        expected = gradients(model, model(**inputs).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with record_router_load(model) as load:
        model(**inputs).loss.backward()
    assert_equal_gradients({name: p.grad for name, p in trainable(model).items()}, expected, atol=1e-12)
    assert load.fractions() == plain.fractions()
    assert load.losses() == plain.losses()
    counts = {key: sums.tokens.item() for key, sums in load._sums.items()}
    assert set(counts.values()) == {inputs["attention_mask"].sum().item()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_passes_before_one_backward(reentrant):
    model, first, second = perft_r(), batch(seed=1), batch(seed=2)
    one, other = gradients(model, model(**first).loss), gradients(model, model(**second).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    (model(**first).loss + model(**second).loss).backward()
    expected = {name: one[name] + other[name] for name in one}
    assert_equal_gradients({name: p.grad for name, p in trainable(model).items()}, expected)


def test_evaluation_is_free_of_it():
    model, inputs = perft_r(), batch()
    heavy = perft_r(router_aux_loss_coef=100.0)
    model.eval(), heavy.eval()
    heavy.load_state_dict(model.state_dict())
    assert torch.equal(model(**inputs).loss, heavy(**inputs).loss)
    # Not even its gradient, should somebody differentiate an evaluation (influence functions, attacks).
    assert_equal_gradients(gradients(model, model(**inputs).loss), gradients(heavy, heavy(**inputs).loss), atol=0)


def test_a_loss_it_cannot_see_is_said_loudly():
    model, inputs = perft_r(), batch()
    logits = model(**inputs).logits
    with pytest.warns(UserWarning, match="auxiliary loss .* is NOT applied"):
        logits.square().mean().backward()
    silent = perft_r(router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    silent(**inputs).logits.square().mean().backward()  # nothing is asked for, so nothing is said


def test_calling_past_the_model_is_said_too():
    model, inputs = perft_r(), batch()
    inner = model.get_base_model().model
    with pytest.warns(UserWarning, match="auxiliary loss .* is NOT applied"):
        inner(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])


@pytest.mark.filterwarnings("ignore:PERFT. the routers' auxiliary loss:UserWarning")  # said in the test above
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_calling_past_the_model_gets_no_stale_auxiliary_gradient(reentrant):
    """After a step of the whole model, the inner model alone trains on its own loss: nothing of the step may come back."""
    model, inputs = perft_r(), batch(seed=1)
    expected = {}
    for stale in (False, True):
        if stale:
            model(**batch(seed=2)).loss.backward()
            model.zero_grad()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        inner = model.get_base_model().model
        inner(input_ids=inputs["input_ids"]).last_hidden_state.square().mean().backward()
        grads = {name: p.grad.clone() for name, p in trainable(model).items()}
        model.zero_grad()
        model.gradient_checkpointing_disable()
        if not stale:
            expected = grads
    assert_equal_gradients(grads, expected, atol=1e-14)


def test_a_forward_that_failed_leaves_nothing_behind():
    model, inputs = perft_r(), batch()
    expected = gradients(model, model(**inputs).loss)
    head = model.get_base_model().lm_head
    handle = head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**batch(rows=5, seed=4))
    handle.remove()
    state = next(m.state for m in model.modules() if isinstance(m, PerftLayer))
    assert state.tape is None
    assert_equal_gradients(gradients(model, model(**inputs).loss), expected, atol=0)


def test_a_deleted_model_frees_its_memory_at_once():
    model = perft_r()
    model(**batch()).loss.backward()
    watched = weakref.ref(model.get_base_model())
    gc.collect()
    gc.disable()
    try:
        del model
        assert watched() is None, "a reference cycle keeps the weights until the next garbage collection"
    finally:
        gc.enable()


def test_a_copy_and_a_pickle_have_a_tape_of_their_own():
    model, inputs = perft_r(), batch()
    expected = gradients(model, model(**inputs).loss)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal_gradients(gradients(twin, twin(**inputs).loss), expected, atol=0)
        layer = next(m for m in twin.modules() if isinstance(m, PerftLayer))
        assert layer.state._model() is twin.get_base_model()


def test_the_callback_wants_an_adapter():
    with pytest.raises(ValueError, match="no PERFT adapter yet; attach it first"):
        RouterLoadCallback(zoo.build("olmoe"))


@pytest.mark.parametrize("variant", ["E", "D", "S"])
def test_other_variants_have_none(variant):
    base = zoo.build("olmoe")
    model = get_peft_model(base, PerftConfig(variant=variant, r=4, task_type="CAUSAL_LM")).train()
    with record_router_load(model) as load:
        model(**batch()).loss.backward()
    assert load.fractions() == {}
    assert load.losses() == {}


def test_base_and_adapter_terms_stay_apart():
    """output_router_logits adds the base model's own term to the loss and leaves the adapter's where it was."""
    model, inputs = perft_r(), batch()
    plain = model(**inputs)
    both = model(**inputs, output_router_logits=True)
    base_term = model.get_base_model().config.router_aux_loss_coef * both.aux_loss
    torch.testing.assert_close(both.loss, plain.loss + base_term, atol=1e-6, rtol=0)  # HF counts in float32
    assert len(both.router_logits) == model.get_base_model().config.num_hidden_layers
    with record_router_load(model) as load:
        model(**inputs)
    assert load.losses()["router_aux_loss"] != pytest.approx(both.aux_loss.item(), rel=1e-3)


def test_recorded_loss_and_load_equal_the_loops():
    model, inputs = perft_r(), batch()
    with record_router_load(model) as load:
        model(**inputs)
    _, auxiliary = explicit_auxiliary(model, inputs)
    losses = load.losses()
    weighted = 0.5 * losses["router_aux_loss"] + 0.1 * losses["router_z_loss"]
    assert weighted == pytest.approx(auxiliary.item(), abs=1e-6)
    for shares in load.fractions().values():
        assert len(shares) == 4
        assert sum(shares) == pytest.approx(1.0)


def _compiled_gradients_equal(model, inputs, call):
    expected = gradients(model, model(**inputs).loss)
    call(
        **inputs, use_cache=False
    ).loss.backward()  # with a cache and checkpointing Transformers logs, which breaks the graph
    # float32, and the compiled graph adds the load-balance gradient in another order.
    assert_equal_gradients({name: p.grad for name, p in trainable(model).items()}, expected, atol=1e-5)


def test_compiled_training_has_no_graph_break_and_the_same_gradient():
    torch._dynamo.reset()
    model = perft_r(dtype=torch.float32)
    _compiled_gradients_equal(model, batch(), torch.compile(model, backend="aot_eager", fullgraph=True))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # dynamo's own look
@pytest.mark.parametrize("skip_side_effects", [False, True])
def test_compiled_and_checkpointed(skip_side_effects):
    # Not fullgraph: Transformers' hook that makes the embeddings require a gradient breaks the graph, for LoRA too.
    torch._dynamo.reset()
    model = perft_r(dtype=torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=skip_side_effects):
        _compiled_gradients_equal(model, batch(), torch.compile(model, backend="aot_eager"))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # dynamo's own look
@pytest.mark.parametrize("parts", ["one layer", "every layer", "all but one layer"])
def test_partly_compiled(parts):
    """Eager layers talk through nodes, compiled ones through their sums; together they make one auxiliary loss."""
    torch._dynamo.reset()
    model = perft_r(dtype=torch.float32)
    layers = model.get_base_model().model.layers
    call = model
    if parts == "all but one layer":
        layers[0].forward = torch.compiler.disable(layers[0].forward)
        call = torch.compile(model, backend="aot_eager")
    else:
        for layer in layers[: 1 if parts == "one layer" else None]:
            layer.compile(backend="aot_eager")
    _compiled_gradients_equal(model, batch(), call)


def test_compiled_generation_has_no_graph_break():
    torch._dynamo.reset()
    model, inputs = perft_r(dtype=torch.float32).eval(), batch()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).logits
        torch.testing.assert_close(compiled, model(**inputs).logits, atol=1e-6, rtol=0)
