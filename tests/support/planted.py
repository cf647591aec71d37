"""Two planted data sets for the pilot: one that can be learnt, one where the frozen base is already right."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from support import zoo

FIRST_TASK, ARGUMENTS, ANSWERS = 3, range(8, 40), range(40, 72)


def save_model(folder: Path, family: str = "olmoe", **changes) -> Path:
    """A tiny random model with its tokenizer."""
    zoo.build(family, **changes).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Id i is the word ``t{i:02}``: of one width, for a special word would be found inside a longer one."""
    tokenizer = Tokenizer(models.WordLevel({word(i): i for i in range(zoo.VOCAB_SIZE)}, unk_token=word(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=word(0), bos_token=word(1), eos_token=word(2))


def word(i: int) -> str:
    """The word of an id."""
    return f"t{i:02}"


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return path


def two_tasks(path: Path, count: int = 480, seed: int = 0) -> Path:
    """A task word and an argument; the answer is one permutation of the argument for the one task, another for the other."""
    draw = random.Random(seed)
    tables = [draw.sample(ANSWERS, len(ANSWERS)) for _ in range(2)]
    rows = []
    for number in range(count):
        task, argument, noise = draw.randrange(2), draw.choice(ARGUMENTS), 72 + number % 20
        answer = tables[task][argument - ARGUMENTS.start]
        rows.append((" ".join(map(word, (noise, 72 + number // 20 % 24, FIRST_TASK + task, argument))), word(answer)))
    return write_rows(path, rows)


def nothing_to_learn(path: Path, model: Path, count: int = 480, length: int = 16, seed: int = 0) -> Path:
    """Texts drawn from the model itself, word by word: no training can beat a model on its own distribution.

    Read with `max_length` no greater than `length`, so that no end-of-text is put behind them, which the model does not
    expect there.
    """
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, zoo.VOCAB_SIZE, (count, 1), generator=generator)
    with torch.no_grad():
        while ids.shape[1] < length:
            probabilities = base(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    texts = [" ".join(map(word, row)) for row in ids.tolist()]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
