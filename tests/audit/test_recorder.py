"""``RoutingRecorder`` against counts by hand: families, checkpointing, generation, adapters, slices, values that are not finite."""

import warnings

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from hf_moe_ext import PerftConfig, RoutingRecorder, RoutingThresholds, record_router_load
from hf_moe_ext.audit.batch import tag_batch
from hf_moe_ext.audit.reading import RoutingReading
from hf_moe_ext.audit.thresholds import RoutingWarning
from support import naive_routing, trainers, zoo


def assert_equals_twin(reading, twin, router="base"):
    assert [each.layer for each in reading.of(router)] == list(twin)
    for each in reading.of(router):
        expected = twin[each.layer]
        assert each.counts.tolist() == expected["counts"]
        assert each.tokens == expected["tokens"]
        assert each.counts.sum() == each.tokens * each.top_k
        if each.coactivation is not None:
            assert each.coactivation.tolist() == expected["coactivation"]
        for measure in ("entropy", "max_probability", "margin"):
            assert getattr(each, measure) == pytest.approx(expected[measure], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_reading_equals_counts_by_hand(family):
    model, batches = zoo.build(family), [zoo.random_batch(seed=seed) for seed in (0, 1)]
    naive_routing.spread_corrections(model)
    with (
        torch.no_grad(),
        naive_routing.recorded_inputs(model) as seen,
        RoutingRecorder(model, coactivation=True) as recorder,
    ):
        for batch in batches:
            model(**batch)
    twin = naive_routing.count(family, model, seen, [batch["attention_mask"] for batch in batches])
    reading = recorder.reading()
    assert_equals_twin(reading, twin)
    again = RoutingReading.from_dict(reading.as_dict())
    assert again.as_dict() == reading.as_dict()
    assert again.summary() == reading.summary()


@pytest.mark.parametrize("family", zoo.FAMILIES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_layer_counts_once(family, reentrant):
    if family == "phimoe":
        pytest.skip("its router draws at random in training, so that there is no twin of it")
    model, batch = zoo.build(family).train(), zoo.random_batch()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    for name, _, router in naive_routing.blocks(model):
        router.register_forward_hook(lambda *_, name=name: calls.append(name))
    with naive_routing.recorded_inputs(model) as seen, RoutingRecorder(model) as recorder:
        for _ in range(2):  # two micro-batches
            model(**batch).loss.backward()
    assert len(calls) == 4 * len(seen)  # each layer ran again in each backward
    twin = naive_routing.count(family, model, seen, [batch["attention_mask"]] * 2)
    assert_equals_twin(recorder.reading(), twin)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_generation_counts_prompt_and_new_tokens(family, cache):
    model, batch = zoo.build(family), zoo.random_batch(batch=2, length=8)
    mask = batch["attention_mask"].clone()
    mask[1], mask[1, :3] = 1, 0  # prompts are padded on the left
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "disable_compile": True}
    settings |= {"use_cache": False} if cache is None else {"cache_implementation": cache}
    positions = []
    with naive_routing.recorded_inputs(model) as seen, RoutingRecorder(model) as recorder:
        from hf_moe_ext.audit.events import watch_routing

        def keep(event):
            facts = event.batch
            kept = torch.ones_like(facts.rows, dtype=torch.bool) if facts.mask is None else facts.mask
            positions.append([facts.positions[(facts.rows == row) & kept].tolist() for row in range(2)])

        with watch_routing(model, keep):
            model.generate(input_ids=batch["input_ids"], attention_mask=mask, **settings)
    calls = len(seen[next(iter(seen))])
    if cache is None:
        masks = [torch.cat([mask, torch.ones(2, n, dtype=mask.dtype)], dim=1) for n in range(calls)]
    else:
        masks = [mask] + [torch.ones(2, 1)] * (calls - 1)
    assert calls == 4
    assert_equals_twin(recorder.reading(), naive_routing.count(family, model, seen, masks))
    lengths = mask.sum(dim=1).tolist()
    layers = len(seen)
    for call in range(calls):
        first = [0, 0] if cache is None or call == 0 else [length + call - 1 for length in lengths]
        last = [length + call for length in lengths]
        assert positions[call * layers] == [list(range(a, b)) for a, b in zip(first, last, strict=True)]


def test_several_adapters_at_once_and_the_load_that_perft_counts():
    model = zoo.build("mixtral")
    model = get_peft_model(
        model, PerftConfig(task_type="CAUSAL_LM", variant="R", r=4, num_experts=4, top_k=2, init_weights=False), "one"
    )
    model.add_adapter(
        "two", PerftConfig(task_type="CAUSAL_LM", variant="R", r=2, num_experts=3, top_k=1, init_weights=False)
    )
    model.base_model.set_adapter(["one", "two"])
    batch = zoo.random_batch()
    with record_router_load(model) as load, RoutingRecorder(model, coactivation=True) as recorder:
        model(**batch)
    reading = recorder.reading()
    assert reading.kinds == ("base", "one", "two")
    assert [each.num_experts for each in reading.routers] == [4, 4, 3] * 2
    for name in ("one", "two"):
        fractions = load.fractions(name)
        for each in reading.of(name):
            assert each.tokens == int(batch["attention_mask"].sum())
            torch.testing.assert_close(torch.tensor(each.load), torch.tensor(fractions[each.layer]), check_dtype=False)
    summary = reading.summary()
    assert {"routing_load_max", "routing_load_max_one", "routing_margin_two"} <= set(summary)


def test_mixed_batches_count_each_row_for_its_own_adapter():
    model = get_peft_model(
        zoo.build("mixtral"), PerftConfig(task_type="CAUSAL_LM", variant="R", r=4, num_experts=4, top_k=2), "one"
    )
    model.add_adapter("two", PerftConfig(task_type="CAUSAL_LM", variant="R", r=2, num_experts=3, top_k=1))
    batch = zoo.random_batch(batch=3)
    del batch["labels"]
    with torch.no_grad(), RoutingRecorder(model.eval()) as recorder:
        model(**batch, adapter_names=["one", "two", "one"])
    per_row = batch["attention_mask"].sum(dim=1).tolist()
    tokens = {each.router: each.tokens for each in recorder.reading().routers}
    assert tokens == {"base": sum(per_row), "one": per_row[0] + per_row[2], "two": per_row[1]}


def test_autocast_and_inference_mode_round_nothing():
    model, batch = zoo.build("olmoe"), zoo.random_batch(batch=60, length=12)
    with torch.no_grad(), RoutingRecorder(model, coactivation=True) as plain:
        model(**batch)
    recorder = RoutingRecorder(model, coactivation=True)
    with recorder, torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(**batch)
    with recorder, torch.no_grad():  # sums from an inference mode go on outside of it
        model(**batch)
    for one, two in zip(plain.reading().routers, recorder.reading().routers, strict=True):
        assert two.tokens == 2 * one.tokens == 2 * int(batch["attention_mask"].sum())
        assert (two.coactivation.diagonal() == two.counts).all()
        assert two.entropy == pytest.approx(one.entropy, rel=0.02)  # the model's own bfloat16


def test_slices_by_hand_split_the_counts():
    model, batch = zoo.build("olmoe"), zoo.random_batch(batch=3)
    with torch.no_grad(), naive_routing.recorded_inputs(model) as seen, RoutingRecorder(model) as recorder:
        with tag_batch(slices=["code", "prose", "code"]):
            model(**batch)
        model(**batch)  # of no slice
        with tag_batch(slices=["prose", "maths", "prose"]):
            model(**batch)
    mask = batch["attention_mask"]
    rows = {"code": [(0, (0, 2))], "prose": [(0, (1,)), (2, (0, 2))], "maths": [(2, (1,))]}
    for name, parts in rows.items():
        masks = [torch.zeros_like(mask) for _ in range(3)]
        for call, chosen in parts:
            masks[call][list(chosen)] = mask[list(chosen)]
        twin = naive_routing.count("olmoe", model, seen, masks)
        for each in recorder.reading().routers:
            assert each.slices[name].tolist() == twin[each.layer]["counts"]
    assert set(recorder.reading().routers[0].slices) == set(rows)


def test_values_that_are_not_finite_are_counted_and_reported():
    model, batch = zoo.build("mixtral"), zoo.random_batch()
    with torch.no_grad():
        next(zoo.routers(model))[1, 0] = float("nan")
    recorder = RoutingRecorder(model, thresholds=None)
    with (
        pytest.warns(RoutingWarning, match=r"layers\.0.*invalid is \d+.*and 1 more layers.*learning rate too high"),
        recorder,
    ):
        model(**batch)
    reading = recorder.reading()
    tokens = int(batch["attention_mask"].sum())
    assert [each.invalid for each in reading.routers] == [tokens, tokens]
    assert [int(each.counts.sum()) for each in reading.routers] == [2 * tokens, 2 * tokens]
    assert reading.routers[0].entropy is None
    assert reading.summary()["routing_invalid_fraction"] == 1.0


def make_trainer(model, folder, recorder, data=None, **changes):
    data = Dataset.from_dict(data or {"input_ids": trainers.rows(12)})
    return Trainer(
        model,
        TrainingArguments(**trainers.arguments(folder, **changes)),
        train_dataset=data,
        eval_dataset=data,
        data_collator=trainers.collate,
        callbacks=[] if recorder is None else [recorder],
    )


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_a_trainer_logs_what_its_steps_routed(tmp_path, checkpointing):
    model = zoo.build("olmoe")
    changes = {"max_steps": 2, "gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"}
    changes |= {"eval_strategy": "steps", "eval_steps": 1}  # which is not counted
    if checkpointing is not None:
        changes |= {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": checkpointing},
        }
    recorder = RoutingRecorder(model)
    trainer = make_trainer(model, tmp_path, recorder, **changes)
    recorder.attach_to(trainer)
    heard = []

    class Tracker(type(recorder).__mro__[1]):
        def on_log(self, args, state, control, logs=None, **kwargs):
            heard.append(dict(logs))

    trainer.add_callback(Tracker())
    with naive_routing.recorded_inputs(model) as seen:
        trainer.train()
    rows = trainers.rows(12)
    masks = [
        trainers.collate([{"input_ids": row} for row in rows[i : i + 2]])["attention_mask"] for i in range(0, 8, 2)
    ]
    expected = int(sum(mask.sum() for mask in masks))
    reading = recorder.reading()
    assert [each.tokens for each in reading.routers] == [expected] * 2
    logged = [line for line in heard if "loss" in line]
    assert len(logged) == 2
    assert logged == [
        {k: v for k, v in line.items() if k != "step"} for line in trainer.state.log_history if "loss" in line
    ]
    for line in logged:
        assert 0 < line["routing_load_max"] <= 1
        assert 0 < line["routing_load_entropy"] <= 1
    # Twin: the first step's share of the most loaded expert, by hand.
    first = {name: calls[:2] for name, calls in seen.items()}
    twin = naive_routing.count("olmoe", zoo.build("olmoe"), first, masks[:2])
    largest = max(max(found["counts"]) / sum(found["counts"]) for found in twin.values())
    assert logged[0]["routing_load_max"] == pytest.approx(largest)


@pytest.mark.parametrize("workers", [0, 2])
def test_slices_of_a_column_reach_the_recorder(tmp_path, workers):
    rows = trainers.rows(12)
    sources = ["code", "prose", "prose"] * 4
    model = zoo.build("olmoe")
    recorder = RoutingRecorder(model, slice_column="source", slices=["code", "maths", "prose"])
    data = {"input_ids": rows, "source": sources, "note": ["not for the model"] * 12}
    changes = {"max_steps": 2, "gradient_accumulation_steps": 3, "dataloader_num_workers": workers, "logging_steps": 2}
    trainer = make_trainer(model, tmp_path, None, data, **changes)
    recorder.attach_to(trainer)
    trainer.train()
    expected = {
        name: 2 * 3 * sum(len(r) for r, s in zip(rows, sources, strict=True) if s == name) for name in set(sources)
    }
    for each in recorder.reading().routers:
        assert {name: int(counts.sum()) for name, counts in each.slices.items()} == {"maths": 0, **expected} | {
            name: each.top_k * expected[name] // 6 for name in expected
        }
    assert "eval_loss" in trainer.evaluate()  # the column is taken out there too


def test_a_removed_column_is_said(tmp_path):
    model = zoo.build("olmoe")
    recorder = RoutingRecorder(model, slice_column="source", slices=["a"])
    trainer = make_trainer(model, tmp_path, recorder, {"input_ids": trainers.rows(6), "source": ["a"] * 6})
    trainer.data_collator = recorder.collator(trainer.data_collator)
    with pytest.raises(ValueError, match=r"no column 'source'.*remove_unused_columns=False"):
        trainer.train()
    trainer = make_trainer(model, tmp_path, None, {"input_ids": trainers.rows(6), "source": ["b"] * 6})
    recorder.attach_to(trainer)
    with pytest.raises(ValueError, match=r"'b' is not among \['a'\]"):
        trainer.train()


def test_thresholds_warn_with_what_to_change():
    model, batch = zoo.build("mixtral"), zoo.random_batch(batch=20)
    recorder = RoutingRecorder(model, thresholds=RoutingThresholds(load_ratio=1.01, tokens_per_expert=10))
    with pytest.warns(RoutingWarning, match=r"load_ratio is 1\.\d+, past 1\.01.*router_aux_loss_coef"), recorder:
        model(**batch)
    with warnings.catch_warnings(), recorder:  # once only
        warnings.simplefilter("error")
        model(**batch)
    with warnings.catch_warnings(), RoutingRecorder(model, thresholds=RoutingThresholds(load_ratio=1.01)):
        warnings.simplefilter("error")  # too few tokens to judge
        model(**zoo.random_batch(batch=1))


def test_bad_arguments_are_refused():
    model = zoo.build("olmoe")
    with pytest.raises(ValueError, match="slice_column and slices go together"):
        RoutingRecorder(model, slice_column="source")
    with pytest.raises(TypeError, match="list of names"):
        RoutingRecorder(model, slice_column="source", slices="code")
    with pytest.raises(ValueError, match="must not repeat"):
        RoutingRecorder(model, slice_column="source", slices=["a", "a"])
    with pytest.raises(ValueError, match="No MoE block found"):
        RoutingRecorder(zoo.build("llama"))
    with pytest.raises(ValueError, match="load_entropy must be between 0 and 1"):
        RoutingThresholds(load_entropy=2)
    recorder = RoutingRecorder(model)
    with pytest.raises(RuntimeError, match="recording already"), recorder, recorder:
        pass


def test_an_error_inside_ends_the_recording():
    model = zoo.build("olmoe")
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with pytest.raises(KeyError), RoutingRecorder(model):
        raise KeyError
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == before
