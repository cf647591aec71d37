"""Text for pre-training: documents of both sides, a tokenizer trained on them when none is named, and packed rows."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from built_in_data import build_built_in
from finetune_arguments import UserError
from finetune_data import load_rows
from hf_moe_ext.text_rows import apply_chat_templates
from pretrain_arguments import SOURCE, TRAINED, PretrainArguments
from quickstart.corpus import Module, read_corpus
from quickstart.pretrain import cut_blocks, train_tokenizer


@dataclass(frozen=True)
class Texts:
    """Documents to train on, and documents no training ever sees."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    def fingerprint(self) -> str:
        """Hash of the train documents."""
        digest = hashlib.sha256()
        for text in self.train:
            digest.update(f"{len(text)}\0{text}".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Packed:
    """Rows of tokens, and what the held-out side is in bytes, for bits per byte."""

    train: Dataset
    held_out: Dataset
    bytes_per_token: float


def read_texts(arguments: PretrainArguments) -> Texts:
    """The documents of `--dataset_name`.

    Raises:
        UserError: They cannot be read, or a side is empty.
    """
    data = arguments.data
    if data.dataset_name == SOURCE:
        try:
            corpus = read_corpus(data.source_dir)
        except FileNotFoundError as error:
            raise UserError(str(error)) from error
        texts = Texts(tuple(m.text for m in corpus.train), tuple(m.text for m in corpus.held_out))
        if not texts.train or not texts.held_out:
            raise UserError(
                f"--source_dir {data.source_dir} gives {len(texts.train)} train and {len(texts.held_out)} held-out "
                "modules; both must be more than none. Give it more .py files, or leave it out."
            )
        return texts
    source = read_corpus(data.source_dir) if data.dataset_name == "docstrings" else None
    rows = load_rows(arguments, lambda: build_built_in(data, source))
    sides = {}
    for side, part in rows.items():
        if "messages" in part.column_names:
            if data.tokenizer_name_or_path == TRAINED:
                raise UserError(
                    f"--dataset_name {data.dataset_name} holds conversations, which a trained tokenizer has no template "
                    "for. Give --tokenizer_name_or_path, or a data set with a text column."
                )
            part = apply_chat_templates(part, _load_tokenizer(data.tokenizer_name_or_path))
        sides[side] = tuple(f"{row['prompt']}{row['completion']}" for row in part)
    return Texts(sides["train"], sides["test"])


def prepare_tokenizer(arguments: PretrainArguments, texts: Texts) -> PreTrainedTokenizerBase:
    """The named tokenizer, or one trained on the train documents and kept for the next run.

    Raises:
        UserError: It cannot be loaded, or cannot end a text.
    """
    data = arguments.data
    if data.tokenizer_name_or_path != TRAINED:
        return _load_tokenizer(data.tokenizer_name_or_path)
    described = json.dumps([data.tokenizer_vocab_size, tokenizers.__version__, texts.fingerprint()])
    key = hashlib.sha256(described.encode()).hexdigest()[:12]
    folder = Path(data.cache_dir or arguments.output_dir.parent) / f"pretrain-tokenizer-{key}"
    if not folder.is_dir():
        print(f"training a byte-level BPE tokenizer on {sum(map(len, texts.train)):,} characters", flush=True)
        modules = tuple(Module(str(i), text) for i, text in enumerate(texts.train))
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
        try:
            train_tokenizer(modules, data.tokenizer_vocab_size).save_pretrained(staging)
            staging.chmod(0o755)  # mkdtemp's own is for its owner alone
            if not folder.is_dir():  # another run may have been faster
                staging.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return _load_tokenizer(str(folder))


def pack(texts: Texts, tokenizer: PreTrainedTokenizerBase, arguments: PretrainArguments) -> Packed:
    """Documents end to end, an end-of-text token between them, cut into rows of `--max_length` tokens.

    Every token but the first is predicted exactly once. Rows are shuffled by the Trainer.

    Raises:
        UserError: A side has fewer than two tokens.
    """
    data, sides, counts = arguments.data, {}, {}
    for name, side in (("train", texts.train), ("held_out", texts.held_out)):
        tokens = _encode(side, tokenizer)
        counts[name] = len(tokens) - 1
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        sides[name] = Dataset.from_list(cut_blocks(tokens, data.max_length, padding))
    for name, limit in (("train", data.max_train_samples), ("held_out", data.max_eval_samples)):
        if limit is not None and limit < len(sides[name]):
            sides[name] = sides[name].shuffle(seed=arguments.training.data_seed or 0).select(range(limit))
    held_out_bytes = sum(len(text.encode()) for text in texts.held_out)
    return Packed(sides["train"], sides["held_out"], held_out_bytes / counts["held_out"])


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ending = tokenizer.eos_token_id
    tokens = [ending]
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        tokens += [*ids, ending]
    return tokens


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0][:300]
        raise UserError(
            f"--tokenizer_name_or_path {name} cannot be loaded: {reason} Give a tokenizer of the Hub (and be online), a "
            f"folder{os.sep}, or '{TRAINED}'."
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"--tokenizer_name_or_path {name} has no end-of-text token to stand between documents. Set 'eos_token' in its "
            "tokenizer_config.json."
        )
    return tokenizer
