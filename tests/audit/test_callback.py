"""``RoutingRecorder`` in a Trainer: what it logs, for whom, and the slices of a column of the data."""

import pytest
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_moe_ext import RoutingRecorder
from support import naive_routing, trainers, zoo


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
    heard = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            heard.append(dict(logs))

    trainer.add_callback(Tracker())
    recorder.attach_to(trainer)  # before a reporter that was there first
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


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL 1.16 sets it itself
def test_a_trainer_of_trl_logs_too(tmp_path):
    model = zoo.build("olmoe")
    settings = trainers.arguments(tmp_path, max_steps=1)
    trainer = trainers.build_trainer("SFTTrainer", model, settings, trainers.rows(6), [])
    recorder = RoutingRecorder(model).attach_to(trainer)
    trainer.train()
    assert {each.tokens for each in recorder.reading().routers} == {sum(len(row) for row in trainers.rows(6))}
    assert "routing_load_max" in next(line for line in trainer.state.log_history if "loss" in line)
