"""Two planted data sets for the pilot: one that can be learnt, one where the frozen base is already right."""

import json
import random
from pathlib import Path

import torch

from support import words, zoo

FIRST_TASK, ARGUMENTS, ANSWERS = 3, range(8, 40), range(40, 72)


def save_model(folder: Path, family: str = "olmoe", **changes) -> Path:
    """A tiny random model with its tokenizer."""
    zoo.build(family, **changes).save_pretrained(folder)
    words.build_tokenizer().save_pretrained(folder)
    return folder


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
        rows.append((f"w{noise} w{72 + number // 20 % 24} w{FIRST_TASK + task} w{argument}", f"w{answer}"))
    return write_rows(path, rows)


def nothing_to_learn(path: Path, model: Path, count: int = 480, seed: int = 0) -> Path:
    """Answers drawn from the model itself, whose own distribution no training can beat."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(3, zoo.VOCAB_SIZE, (count, 4), generator=generator)
    # Every row is read to the same length, so that the end-of-text that follows an answer is drawn as well: never.
    with torch.no_grad():
        logits = base(input_ids=prompts).logits[:, -1]
    logits[:, :3] = -torch.inf  # special words would end a text or be cut from it
    answers = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return write_rows(
        path, [(" ".join(f"w{i}" for i in p), f"w{a}") for p, a in zip(prompts.tolist(), answers.tolist(), strict=True)]
    )
