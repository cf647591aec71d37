"""Really pre-trains the quickstart's base: a small OLMoE-style model on the text of the standard library.

Run by `finetune.py` as a process of its own (`python -m quickstart.pretrain`), also under several ranks: a Trainer
inside one rank of a group would wait for the others. The finished folder is a plain checkpoint plus `base.json`; its
name holds a hash of the settings, of the text and of the library versions, so that a cached base is never another one.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quickstart.corpus import Corpus, Module, read_corpus

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
REPORT_FILE = "base.json"


@dataclass(frozen=True)
class BaseSettings:
    """Everything the base depends on; sizes were chosen by bits per byte within about five minutes on two cores."""

    vocab_size: int = field(default=4096, metadata={"help": "Byte-level BPE entries, the two special ones included."})
    hidden_size: int = field(default=192, metadata={"help": "Width of the model."})
    intermediate_size: int = field(default=192, metadata={"help": "Width of one expert."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Blocks; each holds experts."})
    num_attention_heads: int = field(default=6, metadata={"help": "Attention heads."})
    num_experts: int = field(default=8, metadata={"help": "Experts per block; 0: a dense Llama."})
    top_k: int = field(default=2, metadata={"help": "Experts per token."})
    sequence_length: int = field(default=256, metadata={"help": "Tokens per training row."})
    batch_size: int = field(default=4, metadata={"help": "Rows per step."})
    max_steps: int = field(default=1400, metadata={"help": "Steps of pre-training."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak rate; AdamW, warm-up, cosine to zero."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and row order."})
    source_dir: str | None = field(default=None, metadata={"help": "Folder of .py files in place of the library."})

    def cache_key(self, corpus: Corpus) -> str:
        """Hash of the settings, the text and the libraries whose arithmetic decides the result."""
        import tokenizers
        import torch
        import transformers

        settings = {name: value for name, value in dataclasses.asdict(self).items() if name != "source_dir"}
        versions = [torch.__version__, transformers.__version__, tokenizers.__version__]
        described = json.dumps([settings, versions, corpus.fingerprint], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:12]


def find_base(settings: BaseSettings, cache_dir: Path, corpus: Corpus | None = None) -> Path:
    """Folder of the base with these settings, whether it was built yet or not."""
    corpus = corpus or read_corpus(settings.source_dir)
    return cache_dir / f"quickstart-base-{settings.cache_key(corpus)}"


def build_base(settings: BaseSettings, folder: Path) -> None:
    """Pre-train in a process of its own and move the finished folder into place.

    Raises:
        RuntimeError: The process failed; its own output says why.
    """
    command = [sys.executable, "-m", "quickstart.pretrain", "--folder", str(folder)]
    for name, value in dataclasses.asdict(settings).items():
        command += [] if value is None else [f"--{name}", str(value)]
    # Rank variables of a launcher would make the child wait for peers it does not have.
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in launcher and not name.startswith(("TORCHELASTIC_", "FSDP_", "PMI_", "OMPI_", "CCL_"))
    }
    recipes = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join([recipes, *filter(None, [environment.get("PYTHONPATH")])])
    if subprocess.run(command, env=environment, check=False).returncode:
        raise RuntimeError(f"Pre-training the quickstart's base failed; its own message is above. Settings: {settings}")


def train_tokenizer(modules: tuple[Module, ...], vocab_size: int):
    """Byte-level BPE on the train modules; digits stay single, so that numbers never seen are still readable."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PADDING, END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    tokenizer.train_from_iterator([module.text for module in modules], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PADDING,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def cut_blocks(tokens: list[int], length: int, padding: int) -> list[dict[str, list[int]]]:
    """Rows of `length` tokens that overlap by one, so that every token but the first is predicted exactly once."""
    rows = []
    for start in range(0, len(tokens) - 1, length - 1):
        ids = tokens[start : start + length]
        missing = length - len(ids)
        rows.append({"input_ids": ids + [padding] * missing, "labels": ids + [-100] * missing})
    return rows


def pretrain(settings: BaseSettings, folder: Path) -> dict[str, float]:
    """Train tokenizer and model, compare with the n-gram, and write the folder in one move.

    Returns:
        The report that stands in `base.json`.
    """
    import torch
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

    from hf_moe_ext.row_losses import measure_losses, sum_answer_nats
    from quickstart.ngram import ByteNgram

    began = time.monotonic()
    corpus = read_corpus(settings.source_dir)
    print("quickstart base 1/4: training a byte-level BPE tokenizer", flush=True)
    tokenizer = train_tokenizer(corpus.train, settings.vocab_size)
    sides = {}
    for name, modules in (("train", corpus.train), ("held_out", corpus.held_out)):
        tokens = [tokenizer.eos_token_id]
        for ids in tokenizer([module.text for module in modules])["input_ids"]:
            tokens += [*ids, tokenizer.eos_token_id]
        sides[name] = Dataset.from_list(cut_blocks(tokens, settings.sequence_length, tokenizer.pad_token_id))

    print(f"quickstart base 2/4: pre-training on {sum(len(m.text) for m in corpus.train):,} characters", flush=True)
    set_seed(settings.seed)
    model = build_model(settings, tokenizer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        arguments = TrainingArguments(
            output_dir=str(staging),
            max_steps=settings.max_steps,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=32,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(60, settings.max_steps // 5),
            weight_decay=0.1,
            adam_beta2=0.95,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            seed=settings.seed,
            dataloader_pin_memory=torch.accelerator.is_available(),
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=sides["train"],
            data_collator=default_data_collator,
            preprocess_logits_for_metrics=sum_answer_nats,
        )
        trainer.train()
        print("quickstart base 3/4: bits per byte on the held-out modules", flush=True)
        if settings.num_experts:
            model.config.output_router_logits = False
        losses = measure_losses(trainer, sides["held_out"])
        texts = {
            name: [m.text.encode() for m in modules]
            for name, modules in (("train", corpus.train), ("held_out", corpus.held_out))
        }
        held_out_bytes = sum(map(len, texts["held_out"]))
        print("quickstart base 4/4: the same for an interpolated order-3 byte n-gram", flush=True)
        report = {
            # The end-of-text tokens are paid for by the model and by no byte: the comparison leans against it.
            "bits_per_byte": float(losses.nats.sum()) / math.log(2) / held_out_bytes,
            "ngram_bits_per_byte": ByteNgram(texts["train"], order=3).bits_per_byte(texts["held_out"]),
            "held_out_bytes": held_out_bytes,
            "train_bytes": sum(map(len, texts["train"])),
            "train_tokens_seen": settings.max_steps * settings.batch_size * settings.sequence_length,
            "num_parameters": model.num_parameters(),
            "seconds": round(time.monotonic() - began, 1),
        }
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        described = {**report, "settings": dataclasses.asdict(settings), "log": trainer.state.log_history}
        (staging / REPORT_FILE).write_text(json.dumps(described, indent=1) + "\n")
        staging.chmod(0o755)  # mkdtemp's own is for its owner alone
        if not folder.is_dir():  # another run with the same settings may have been faster
            staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return report


def build_model(settings: BaseSettings, tokenizer):
    """A randomly initialised OLMoE of the given size, or a Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.num_hidden_layers,
        "num_attention_heads": settings.num_attention_heads,
        "num_key_value_heads": settings.num_attention_heads,
        "max_position_embeddings": 1024,
        # OLMoE's own default is 1, and the embedding row of the padding token is zeroed and never trained.
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": True,
    }
    if settings.num_experts == 0:
        return LlamaForCausalLM(LlamaConfig(**sizes))
    config = OlmoeConfig(
        **sizes,
        num_experts=settings.num_experts,
        num_experts_per_tok=settings.top_k,
        output_router_logits=True,  # adds the load-balance loss while pre-training
    )
    config._experts_implementation = "grouped_mm"
    return OlmoeForCausalLM(config)


@dataclass
class _Target:
    folder: str = field(metadata={"help": "Where the finished base goes."})


def main() -> None:
    """Entry point of the child process."""
    from transformers import HfArgumentParser

    kinds: list[Any] = [_Target, BaseSettings]
    target, settings = HfArgumentParser(kinds).parse_args_into_dataclasses()
    pretrain(settings, Path(target.folder))


if __name__ == "__main__":
    main()
