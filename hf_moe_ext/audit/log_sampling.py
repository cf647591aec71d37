"""Which tokens a log keeps: by hash of seed, example and position, so the same for every layer, batch size and order."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal

import numpy as np

SampledBy = Literal["token", "example"]


def keep_tokens(
    examples: Sequence[int | str],
    rows: np.ndarray,
    positions: np.ndarray,
    sample_rate: float,
    sampled_by: SampledBy = "token",
    seed: int = 0,
) -> np.ndarray:
    """True where a token is kept [tokens].

    Args:
        examples: id of the example in each row of the batch.
        rows: [tokens] row of each token.
        positions: [tokens] place of each token in its sequence.
        sample_rate: share of the tokens, or of the examples, that is kept; above 0, at most 1.
        sampled_by: whether tokens or whole examples are drawn.
        seed: of the draw.
    """
    if sample_rate >= 1:
        return np.ones(len(rows), bool)
    keys = np.array([_number(seed, example) for example in examples], dtype=np.uint64)[rows]
    if sampled_by == "token":
        keys = keys + positions.astype(np.int64).view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return _scramble(keys) < np.uint64(min(int(sample_rate * 2.0**64), 2**64 - 1))


def _number(seed: int, example: int | str) -> int:
    # Python's own hash of a text differs from run to run.
    return int.from_bytes(blake2b(f"{seed}:{example}".encode(), digest_size=8).digest(), "little")


def _scramble(keys: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): neighbouring numbers become unlike ones."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))
