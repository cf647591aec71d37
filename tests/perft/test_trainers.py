"""The auxiliary loss through the trainers people use: the plain Trainer and TRL's SFTTrainer."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from hf_moe_ext import RouterLoadCallback
from support.perft import assert_equal_gradients, batch, explicit_objective, gradients, loss_tokens, perft_r
from support.trainers import KeepGradients, arguments, build_trainer, collate, rows

pytestmark = pytest.mark.filterwarnings(
    # The Trainer asks PyTorch to pin memory for a GPU that is not there.
    "ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning",
)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL 1.16 sets it itself
@pytest.mark.parametrize("scope", ["batch", "sequence", "global"])
@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_uneven_accumulation(kind, scope, accumulation, tmp_path):
    """The gradient of a step is that of the definition over all its micro-batches. TRL's log-probabilities are float32."""
    model, keep, data = perft_r(router_aux_loss_scope=scope), KeepGradients(), rows(2 * accumulation)
    batches = [collate([{"input_ids": r} for r in data[i : i + 2]]) for i in range(0, len(data), 2)]
    total = sum(map(loss_tokens, batches))
    expected = gradients(model, sum(explicit_objective(model, inputs, total)[0] for inputs in batches))
    settings = arguments(tmp_path, train_sampling_strategy="sequential", gradient_accumulation_steps=accumulation)
    build_trainer(kind, model, settings, data, [keep]).train()
    assert_equal_gradients(keep.steps[0], expected, atol=1e-10 if kind == "Trainer" else 1e-7)


def test_label_smoothing_says_that_the_auxiliary_loss_is_not_applied(tmp_path):
    trainer = Trainer(
        perft_r(dtype=torch.float32),
        TrainingArguments(**arguments(tmp_path, label_smoothing_factor=0.1)),
        train_dataset=Dataset.from_dict({"input_ids": rows()}),
        data_collator=collate,
    )
    with pytest.warns(UserWarning, match="auxiliary loss .* is NOT applied"):
        trainer.train()


def test_the_callback_logs_it_apart_from_the_cross_entropy(tmp_path):
    logs, losses = {}, {}
    for weight in (0.0, 5.0):
        torch.manual_seed(0)
        model = perft_r(dtype=torch.float32, router_aux_loss_coef=weight)
        trainer = Trainer(
            model,
            TrainingArguments(**arguments(tmp_path / str(weight), max_steps=3, learning_rate=0.05)),
            train_dataset=Dataset.from_dict({"input_ids": rows(18)}),
            data_collator=collate,
            callbacks=[RouterLoadCallback(model)],
        )
        trainer.train()
        logs[weight] = [entry for entry in trainer.state.log_history if "loss" in entry]
        losses[weight] = [entry["loss"] for entry in logs[weight]]
    for entry in logs[5.0]:
        assert {"router_aux_loss", "router_z_loss", "router_load_max", "router_load_entropy"} <= entry.keys()
    assert losses[0.0][0] == losses[5.0][0], "the logged loss is the cross-entropy alone"
    assert logs[0.0][0]["router_aux_loss"] == logs[5.0][0]["router_aux_loss"]
    assert logs[5.0][-1]["router_aux_loss"] < logs[0.0][-1]["router_aux_loss"], "the loss must balance the router"


def test_evaluation_loss_is_the_cross_entropy(tmp_path):
    results = []
    for weight in (0.0, 100.0):
        model = perft_r(dtype=torch.float32, router_aux_loss_coef=weight)
        trainer = Trainer(
            model,
            TrainingArguments(**arguments(tmp_path)),
            eval_dataset=Dataset.from_dict({"input_ids": rows()}),
            data_collator=collate,
        )
        results.append(trainer.evaluate()["eval_loss"])
    assert results[0] == results[1]


def test_the_batch_helper_has_uneven_token_counts():
    """Guards the tests above: with equal counts they could not tell weighting by tokens from weighting by batches."""
    counts = [
        int(collate([{"input_ids": r} for r in rows()[i : i + 2]])["labels"][:, 1:].ne(-100).sum()) for i in (0, 2, 4)
    ]
    assert len(set(counts)) == 3
    assert batch()["input_ids"].shape[0] > 1
