"""The three scopes of the auxiliary loss: each by its definition, and what each promises about batching."""

import pytest
import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForSequenceClassification

from hf_moe_ext import PerftConfig
from hf_moe_ext.ops.routing import TokenGroups
from hf_moe_ext.perft.batch import share_of_loss
from hf_moe_ext.perft.layer import PerftLayer
from support import zoo
from support.perft import (
    COEFFICIENTS,
    assert_equal_gradients,
    batch,
    gradients,
    loss_tokens,
    perft_r,
    steps_by_definition,
    trainable,
)

SCOPES = ["batch", "sequence", "global"]
BATCHES = [(2, 7, 1), (1, 9, 2), (4, 5, 3)]


def micro_batches():
    batches = [batch(rows, length, seed) for rows, length, seed in BATCHES]
    assert len({loss_tokens(b) for b in batches}) == 3, "equal counts could not tell a right weight from a wrong one"
    return batches


def joined(batches):
    """The micro-batches as one, padded on the right to the longest."""
    length = max(b["input_ids"].shape[1] for b in batches)
    pad = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.cat(
            [torch.nn.functional.pad(b[key], (0, length - b[key].shape[1]), value=pad[key]) for b in batches]
        )
        for key in pad
    }


def step(model, batches):
    """The gradients of one optimizer step as a trainer computes them, micro-batch by micro-batch."""
    total = torch.tensor(sum(map(loss_tokens, batches)))
    model.zero_grad()
    for inputs in batches:
        model(**inputs, num_items_in_batch=total).loss.backward()
    return {name: p.grad.clone() for name, p in trainable(model).items()}


def end_step(model):
    """The optimizer steps (at rate 0, so that the weights stay): what the scope "global" waits for."""
    torch.optim.SGD(list(trainable(model).values()), lr=0.0).step()


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_the_gradient_is_that_of_the_definition(scope, reentrant):
    model, batches = perft_r(router_aux_loss_scope=scope), micro_batches()
    expected = steps_by_definition(model, batches, [sum(map(loss_tokens, batches))] * len(batches))
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for gradients_of_step in expected:  # the second step of "global" is the first with a load
        assert_equal_gradients(step(model, batches), gradients_of_step)
        end_step(model)


@pytest.mark.parametrize("scope", ["sequence", "global"])
def test_batching_does_not_matter(scope):
    """Seven sequences in three uneven micro-batches, in one, and one by one: the same gradient."""
    model, batches = perft_r(router_aux_loss_scope=scope), micro_batches()
    whole = joined(batches)
    single = [{key: value[i : i + 1] for key, value in whole.items()} for i in range(len(whole["input_ids"]))]
    step(model, batches)
    end_step(model)
    expected = step(model, batches)
    for other in ([whole], single):
        end_step(model)
        assert_equal_gradients(step(model, other), expected)


def test_the_batch_scope_depends_on_batching():
    """Its load times probability is no sum over tokens; said in its documentation, and guards the test above."""
    model, batches = perft_r(router_aux_loss_scope="batch"), micro_batches()
    ours, other = step(model, batches), step(model, [joined(batches)])
    name = next(name for name in ours if "router" in name)
    assert (ours[name] - other[name]).abs().max() > 1e-4


@pytest.mark.parametrize("marker", ["position_ids", "cu_seq_lens", "seq_idx"])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_packed_row_equals_its_sequences(scope, marker):
    """Padding-free batches: the sequences of a row are told apart, by whichever key says so."""
    model = perft_r(router_aux_loss_scope=scope)
    lengths, generator = (4, 9, 6), torch.Generator().manual_seed(5)
    texts = [torch.randint(3, 90, (n,), generator=generator) for n in lengths]
    rows = []
    for ids in texts:
        missing = max(lengths) - len(ids)
        rows.append([torch.nn.functional.pad(ids, (0, missing), value=v) for v in (0, -100)])
    padded = {
        "input_ids": torch.stack([ids for ids, _ in rows]),
        "attention_mask": torch.stack([(ids > 0).long() for ids, _ in rows]),
        "labels": torch.stack([labels for _, labels in rows]),
    }
    labels = torch.cat(texts)
    labels[[0, 4, 13]] = -100  # the first token of a sequence is predicted by nobody
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = {"input_ids": torch.cat(texts)[None], "labels": labels[None], "position_ids": positions}
    if marker == "cu_seq_lens":
        packed["cu_seq_lens_q"] = torch.tensor([0, 4, 13, 19], dtype=torch.int32)
    elif marker == "seq_idx":
        packed["seq_idx"] = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].int()
    if marker != "position_ids":  # the attention still needs its positions; ours must not
        keep = next(m for m in model.modules() if isinstance(m, PerftLayer)).state
        keep._named = lambda args, kwargs: {k: v for k, v in kwargs.items() if k != "position_ids"}
    expected = step_of(model, padded)
    assert_equal_gradients(step_of(model, packed), expected)


def step_of(model, inputs):
    inputs = inputs | {"num_items_in_batch": torch.tensor(16), "use_cache": False}  # a cache hides that rows are packed
    model(**inputs).loss.backward()
    end_step(model)
    model.zero_grad()
    model(**inputs).loss.backward()
    result = {name: p.grad.clone() for name, p in trainable(model).items()}
    model.zero_grad()
    return result


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("factor", [1.0, 1024.0])
def test_log_probs_carry_the_weights_too(scope, factor):
    """A trainer that sums the log-probabilities itself, as TRL's does, with a loss scale on top."""
    model, batches = perft_r(router_aux_loss_scope=scope), micro_batches()
    total = sum(map(loss_tokens, batches))
    step(model, batches)
    end_step(model)
    expected = step(model, batches)
    end_step(model)
    base = model.get_base_model()
    original = base.forward
    base.forward = lambda *args, **kwargs: with_log_probs(original, *args, **kwargs)
    model.zero_grad()
    for inputs in batches:
        outputs = model(**inputs)
        (-(outputs.log_probs * outputs.label_mask).sum() / total * factor).backward()
    ours = {name: p.grad / factor for name, p in trainable(model).items()}
    assert_equal_gradients(ours, expected)


def with_log_probs(forward, *args, labels=None, **kwargs):
    outputs = forward(*args, **kwargs)
    mask = labels[:, 1:] != -100
    nats = outputs.logits[:, :-1].log_softmax(-1)
    outputs.log_probs = nats.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    outputs.label_mask = mask
    return outputs


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("parts", ["whole", "layers"])
@pytest.mark.parametrize("scope", ["sequence", "global"])
def test_compiled_scopes(scope, parts):
    torch._dynamo.reset()
    model, inputs = perft_r(dtype=torch.float32, router_aux_loss_scope=scope), batch()
    step_of(model, inputs)
    expected = gradients(model, model(**inputs).loss)
    call = model
    if parts == "whole":
        call = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        for layer in model.get_base_model().model.layers:
            layer.compile(backend="aot_eager")
    assert_equal_gradients(gradients(model, call(**inputs, use_cache=False).loss), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_layers_compiled_one_by_one_share_their_code():
    """Ten layers, one compilation: nothing a layer reads or writes may differ between layers."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model, inputs = perft_r(dtype=torch.float32, num_hidden_layers=10), batch()
    for layer in model.get_base_model().model.layers:
        layer.compile(backend=counter, fullgraph=True)
    model(**inputs, use_cache=False).loss.backward()
    assert counter.frame_count <= 2, "the first layer's input needs a gradient or not; all others are alike"


def test_a_copied_and_a_deleted_model_count_their_own_steps():
    import copy
    import gc

    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

    gc.collect()  # models of other tests
    before = len(hooks)
    model = perft_r(router_aux_loss_scope="global")
    twin = copy.deepcopy(model)
    assert len(hooks) == before + 2
    states = [next(m.state for m in each.modules() if isinstance(m, PerftLayer)) for each in (model, twin)]
    model(**batch()).loss.backward()
    end_step(model)
    assert [any(r.last_load for r in state.records.values()) for state in states] == [True, False]
    del states
    model.unload()
    del twin
    gc.collect()
    assert len(hooks) == before


@pytest.mark.parametrize("value", ["token", "", 3])
def test_an_unknown_scope_is_refused(value):
    with pytest.raises(ValueError, match="router_aux_loss_scope must be one of batch, sequence, global; got"):
        PerftConfig(variant="R", router_aux_loss_scope=value)


def test_a_scope_without_a_router_is_refused():
    with pytest.raises(ValueError, match="router_aux_loss_scope belongs to the router of variant='R'"):
        PerftConfig(variant="E", router_aux_loss_scope="batch")


def loads(model):
    state = next(m.state for m in model.modules() if isinstance(m, PerftLayer))
    return [dict(record.last_load) for record in state.records.values()]


def test_the_optimizer_of_another_model_ends_no_step():
    model = perft_r(router_aux_loss_scope="global")
    model(**batch()).loss.backward()
    other = torch.nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert loads(model) == [{}, {}]
    end_step(model)
    assert all("default" in load for load in loads(model))


def test_a_deleted_adapter_leaves_no_load_to_one_of_its_name():
    model = perft_r(router_aux_loss_scope="global")
    model(**batch()).loss.backward()
    end_step(model)
    config = model.peft_config["default"]
    model.add_adapter("other", PerftConfig(variant="S"))
    model.set_adapter("other")
    model.delete_adapter("default")
    assert loads(model) == [{}, {}]
    again = PerftConfig(**{**COEFFICIENTS, "router_aux_loss_scope": config.router_aux_loss_scope, "num_experts": 8})
    model.add_adapter("default", again)
    model.set_adapter("default")
    model(**batch()).loss.backward()
    end_step(model)
    model(**batch()).loss.backward()
    assert all(len(load["default"]) == 8 for load in loads(model))


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_a_loss_that_ignores_the_count_of_the_step(scope):
    """Heads for classification divide by their own rows whatever the Trainer says: the weight must not be smaller."""
    base = zoo.FAMILIES["mixtral"](num_labels=2)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(base, experts_implementation="batched_mm").double().train()
    config = {"variant": "R", "init_weights": False, **COEFFICIENTS, "router_aux_loss_scope": scope}
    model = get_peft_model(model, PerftConfig(task_type="SEQ_CLS", **config))
    inputs = batch() | {"labels": torch.tensor([0, 1, 1])}
    expected = gradients(model, model(**inputs).loss)
    assert_equal_gradients(gradients(model, model(**inputs, num_items_in_batch=torch.tensor(6)).loss), expected)


def test_labels_on_another_device_than_the_loss():
    """Transformers' loss moves labels itself; the weights of the sequences must follow."""
    with FakeTensorMode():
        labels = torch.zeros(2, 5, dtype=torch.long)
        share = share_of_loss({"labels": labels}, TokenGroups(2), 2, True)
        assert share.weights(torch.ones((), device="cuda")).device.type == "cuda"
        assert share.attach(torch.ones((), device="cuda"), torch.ones(2, device="cuda")).device.type == "cuda"
