"""The trainers people use, on a tiny model and rows of very different lengths."""

from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from support import zoo


class KeepGradients(TrainerCallback):
    """The gradients of the first optimizer steps, before clipping has a chance."""

    def __init__(self, steps: int = 1) -> None:
        self.wanted = steps
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Copy them."""
        if len(self.steps) < self.wanted:
            self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


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


def build_trainer(kind: str, model, settings: dict[str, Any], data: list[list[int]], callbacks: list[TrainerCallback]):
    """The plain Trainer, or TRL's SFTTrainer, on these sequences."""
    common = {"data_collator": collate, "callbacks": callbacks}
    if kind == "Trainer":
        rows = Dataset.from_dict({"input_ids": data})
        return Trainer(model, TrainingArguments(**settings), train_dataset=rows, **common)
    import trl

    # The base router's own loss off, and the rows are tokenised already.
    config = trl.SFTConfig(
        **settings,
        bf16=False,
        router_aux_loss_coef=0.0,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    rows = Dataset.from_dict({"input_ids": data, "labels": data})
    return trl.SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer(), **common)


def tokenizer():
    """A tokenizer SFTTrainer can hold; the data is tokenised already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"t{i}": i for i in range(zoo.VOCAB_SIZE)}, unk_token="t3"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="t0", bos_token="t1", eos_token="t2", unk_token="t3"
    )
