"""The auxiliary loss through the trainers people use: the plain Trainer and TRL's SFTTrainer."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_moe_ext import RouterLoadCallback
from support import zoo
from support.perft import assert_equal_gradients, batch, explicit_auxiliary, perft_r, trainable

pytestmark = pytest.mark.filterwarnings(
    # The Trainer asks PyTorch to pin memory for a GPU that is not there.
    "ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning",
)


class KeepGradients(TrainerCallback):
    """The gradients of the first optimizer step, before clipping has a chance."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def arguments(folder, **changes) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_grad_norm": 0.0,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 0,
        "dataloader_pin_memory": False,
    } | changes


def rows(count=6):
    """Sequences of very different lengths, so that micro-batches have uneven numbers of loss tokens."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, zoo.VOCAB_SIZE, (4 + 5 * (i % 3),), generator=generator).tolist() for i in range(count)]


def collate(features):
    ids = [torch.tensor(f["input_ids"]) for f in features]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=zoo.PAD_ID)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    return {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}


def expected_gradients(model, micro_batches):
    """Sum over micro-batches of (cross-entropy sum + auxiliary loss * its tokens) / tokens of the step."""
    total = sum(int(b["labels"][:, 1:].ne(-100).sum()) for b in micro_batches)
    model.train()
    loss: Any = 0
    for inputs in micro_batches:
        cross_entropy, auxiliary = explicit_auxiliary(model, inputs | {"num_items_in_batch": torch.tensor(total)})
        loss = loss + cross_entropy + auxiliary * int(inputs["labels"][:, 1:].ne(-100).sum()) / total
    parameters = trainable(model)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def test_trainer_with_uneven_accumulation(tmp_path):
    """The reference is in float64; the Trainer's cross-entropy is float32, hence 1e-7 here."""
    model, keep, data = perft_r(), KeepGradients(), rows()
    expected = expected_gradients(model, [collate([{"input_ids": r} for r in data[i : i + 2]]) for i in range(0, 6, 2)])
    trainer = Trainer(
        model,
        TrainingArguments(**arguments(tmp_path, train_sampling_strategy="sequential")),
        train_dataset=Dataset.from_dict({"input_ids": data}),
        data_collator=collate,
        callbacks=[keep],
    )
    trainer.train()
    assert_equal_gradients(keep.gradients, expected, atol=1e-7)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL 1.16 sets it itself
def test_sft_trainer_with_uneven_accumulation(tmp_path):
    trl = pytest.importorskip("trl", reason="trl comes with the test extra, which is not installed")
    model, keep, data = perft_r(), KeepGradients(), rows()
    expected = expected_gradients(model, [collate([{"input_ids": r} for r in data[i : i + 2]]) for i in range(0, 6, 2)])
    settings = arguments(tmp_path, train_sampling_strategy="sequential", bf16=False)
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(
            **settings, router_aux_loss_coef=0.0, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}
        ),
        train_dataset=Dataset.from_dict({"input_ids": data, "labels": data}),
        data_collator=collate,
        processing_class=tokenizer(),
        callbacks=[keep],
    )
    trainer.train()
    assert_equal_gradients(keep.gradients, expected, atol=1e-7)


def tokenizer():
    """A tokenizer SFTTrainer can hold; the data is tokenised already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"t{i}": i for i in range(zoo.VOCAB_SIZE)}, unk_token="t3"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="t0", bos_token="t1", eos_token="t2", unk_token="t3"
    )


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
