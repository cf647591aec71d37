"""Tiny models under the names that the README gives: on a Hub, and in a reader's folder. For processes of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import HfApi
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from hf_moe_ext.convert import upcycle
from support import zoo

OLMOE, LLAMA = "allenai/OLMoE-1B-7B-0924", "meta-llama/Llama-3.2-1B"
SIZES: dict[str, Any] = {"max_position_embeddings": 512, "num_hidden_layers": 2}


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that any text can be read."""
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def publish(folder: Path) -> None:
    """Save both, with a tokenizer, and push them to the Hub that the environment names."""
    tokenizer = build_byte_tokenizer()
    sizes = SIZES | {"vocab_size": len(tokenizer)}
    found: dict[str, Any] = {
        OLMOE: OlmoeForCausalLM(zoo.FAMILIES["olmoe"](**sizes)),
        LLAMA: LlamaForCausalLM(LlamaConfig(**{**zoo.COMMON, **sizes})),
    }
    for name, model in found.items():
        path = folder / name
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        HfApi().create_repo(name)
        HfApi().upload_folder(repo_id=name, folder_path=path)


def prepare(folder: Path) -> None:
    """What the README calls "my-...": a text, a trained MoE and a second version of it, and a run that was timed."""
    lines = [json.dumps({"text": line}) for line in Path(torch.__file__).read_text(encoding="utf-8").splitlines()[:400]]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    upcycle(LLAMA, folder / "copies", form="vanilla", num_experts=4, top_k=2)
    model = AutoModelForCausalLM.from_pretrained(folder / "copies")
    for name in ("my-trained-moe", "my-moe-v2"):
        for parameter in model.parameters():
            parameter.data += 1e-3 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        build_byte_tokenizer().save_pretrained(folder / name)
    # A step of 4 x 4096 tokens, as the README's `calibrate` says of it.
    tokens = [[3 + (7 * row + place) % 200 for place in range(4096)] for row in range(8)]
    arguments = TrainingArguments(
        str(folder / "my-run"), max_steps=12, logging_steps=2, report_to=[], use_cpu=True, save_strategy="no",
        per_device_train_batch_size=4,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    trainer = Trainer(AutoModelForCausalLM.from_pretrained(OLMOE), arguments, train_dataset=rows)
    trainer.train()
    trainer.save_state()
    trainer.save_model(str(folder / "my-model"))
