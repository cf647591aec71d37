"""Two questions that a card answers about data: is the held-out side really held out, and does the model recite?"""

from collections.abc import Hashable, Iterable, Sequence


def duplicate_rate(train: Iterable[str], held_out: Sequence[str]) -> float:
    """Share of the held-out texts that, letter case and spacing aside, are also train texts.

    Args:
        train: Texts trained on.
        held_out: Texts measured on.

    Returns:
        0 to 1.

    Raises:
        ValueError: Nothing is held out.
    """
    if not held_out:
        raise ValueError("held_out must hold at least one text; it is empty.")
    seen = {_normalised(text) for text in train}
    return sum(_normalised(text) in seen for text in held_out) / len(held_out)


def verbatim_rate(
    continuations: Sequence[Sequence[Hashable]], training: Iterable[Sequence[Hashable]], num_tokens: int
) -> float:
    """Share of the continuations that hold a run of `num_tokens` tokens of the training text.

    After the extraction measure of Carlini et al., "Quantifying Memorization Across Neural Language Models"
    (arXiv 2202.07646), with any place of the training text in place of the prompt's own.

    Args:
        continuations: What the model wrote greedily, as tokens, one sequence per prompt.
        training: The training text as tokens; read once, in any order.
        num_tokens: Length of the run.

    Returns:
        0 to 1.

    Raises:
        ValueError: No continuation, or a run without tokens.
    """
    if not continuations:
        raise ValueError("continuations must hold at least one sequence; it is empty.")
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1; it is {num_tokens}.")
    # The runs of what was written are few; those of the training text may not fit into memory.
    owners: dict[tuple[Hashable, ...], set[int]] = {}
    for number, continuation in enumerate(continuations):
        for run in _runs(continuation, num_tokens):
            owners.setdefault(run, set()).add(number)
    recited: set[int] = set()
    for text in training if owners else ():
        for run in _runs(text, num_tokens):
            recited |= owners.get(run, set())
    return len(recited) / len(continuations)


def _runs(tokens: Sequence[Hashable], length: int) -> Iterable[tuple[Hashable, ...]]:
    return (tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1))


def _normalised(text: str) -> str:
    return " ".join(text.split()).casefold()
