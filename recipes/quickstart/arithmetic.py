"""Generated true/false arithmetic whose test operands never occur in train, in BoolQ's instruction form."""

import random

OPERANDS = range(10, 1000)
TEST_ONE_IN = 5
_KINDS = ("greater", "even")


def build_arithmetic_rows(
    num_train: int = 6000, num_test: int = 1000, seed: int = 0
) -> dict[str, list[dict[str, str]]]:
    """Balanced questions: is a greater than b, is a + b even.

    Args:
        num_train: Rows of the train side.
        num_test: Rows of the test side.
        seed: Decides which operands are for testing and which questions are asked.

    Returns:
        `{"train": rows, "test": rows}`; rows have `instruction`, `output` and `answer`.
    """
    generator = random.Random(seed)
    operands = list(OPERANDS)
    generator.shuffle(operands)
    cut = len(operands) // TEST_ONE_IN
    return {
        "train": _ask(operands[cut:], num_train, generator),
        "test": _ask(operands[:cut], num_test, generator),
    }


def _ask(operands: list[int], count: int, generator: random.Random) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    asked: set[tuple[str, int, int]] = set()
    while len(rows) < count:
        kind, wanted = _KINDS[len(rows) % 2], len(rows) // 2 % 2 == 0  # both answers equally often for both kinds
        a, b = generator.sample(operands, 2)
        if (kind, a, b) in asked or (a > b if kind == "greater" else (a + b) % 2 == 0) != wanted:
            continue
        asked.add((kind, a, b))
        question = f"is {a} greater than {b}" if kind == "greater" else f"is {a} plus {b} even"
        answer = "true" if wanted else "false"
        rows.append(
            {
                "instruction": f"Please answer the following question with true or false, question: {question}?\n\n"
                "Answer format: true/false",
                "output": f"the correct answer is {answer}",
                "answer": answer,
            }
        )
    return rows
