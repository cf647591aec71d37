"""An interpolated byte n-gram: the yardstick a pre-trained base has to beat.

With `c_k` the k bytes before `b`, `n` counts in the training text and the recursion starting at the uniform 1/256:

    p_k(b | c_k) = w[k, bucket(n(c_k))] * n(c_k b) / n(c_k) + (1 - w[k, bucket(n(c_k))]) * p_{k-1}(b | c_{k-1})

which is Jelinek-Mercer smoothing (Jelinek and Mercer, 1980; Chen and Goodman, 1998, section 2.3): the weights depend on
how often the context was seen, and are fitted by expectation maximisation on a slice of train the counts leave out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

NUM_BUCKETS = 16
FIT_ONE_IN = 20
FIT_ROUNDS = 15


@dataclass(frozen=True)
class CountTable:
    """Sorted keys and their counts; a key packs a byte string of one length into an integer."""

    keys: np.ndarray
    counts: np.ndarray

    def look_up(self, keys: np.ndarray) -> np.ndarray:
        """Counts of `keys` [n], 0 where never seen."""
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[place] == keys, self.counts[place], 0)


class ByteNgram:
    """Interpolated n-gram over bytes.

    Args:
        texts: Training documents; every document starts with an empty context of its own (bytes of value 0).
        order: Bytes of context.

    Attributes:
        weights: [order + 1, NUM_BUCKETS], the share given to each order's own counts.
    """

    def __init__(self, texts: Sequence[bytes], order: int = 3) -> None:
        if order < 0 or order > 7:
            raise ValueError(f"order must be from 0 to 7 bytes of context, got {order}")
        if not any(texts):
            raise ValueError("texts must hold at least one byte, got none")
        self.order = order
        self.weights = np.full((order + 1, NUM_BUCKETS), 0.5)
        slice_, rest = texts[::FIT_ONE_IN], [text for i, text in enumerate(texts) if i % FIT_ONE_IN]
        if any(rest):
            self._count(rest)
            self._fit_weights(slice_)
        self._count(texts)

    def bits_per_byte(self, texts: Iterable[bytes]) -> float:
        """Mean code length of `texts`, in bits per byte."""
        probabilities = [self.probabilities(text) for text in texts if text]
        return float(-np.log2(np.concatenate(probabilities)).mean())

    def probabilities(self, text: bytes) -> np.ndarray:
        """Probability of each byte of `text` given the bytes before it, [len(text)]."""
        mixed = np.full(len(text), 1 / 256)
        for k, (own, bucket) in enumerate(self._own_estimates(text)):
            weight = self.weights[k, bucket]
            mixed = weight * own + (1 - weight) * mixed
        return mixed

    def _own_estimates(self, text: bytes) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per order: `n(c b) / n(c)` and the bucket of `n(c)`; bucket 0 is a context never seen."""
        estimates = []
        for k in range(self.order + 1):
            keys = _windows(text, k + 1)
            seen = self._contexts[k].look_up(keys >> 8)
            estimate = self._windows[k].look_up(keys) / np.maximum(seen, 1)
            bucket = np.where(seen > 0, np.minimum(1 + np.log2(np.maximum(seen, 1)).astype(int), NUM_BUCKETS - 1), 0)
            estimates.append((estimate, bucket))
        return estimates

    def _count(self, texts: Iterable[bytes]) -> None:
        texts = [text for text in texts if text]
        self._windows, self._contexts = [], []
        for k in range(self.order + 1):
            keys, counts = np.unique(np.concatenate([_windows(text, k + 1) for text in texts]), return_counts=True)
            self._windows.append(CountTable(keys, counts))
            contexts, first = np.unique(keys >> 8, return_index=True)
            self._contexts.append(CountTable(contexts, np.add.reduceat(counts, first)))

    def _fit_weights(self, texts: Iterable[bytes]) -> None:
        """Expectation maximisation: a weight becomes (times the recursion stopped at it) / (times it came by)."""
        estimates = [self._own_estimates(text) for text in texts if text]
        orders = [
            tuple(np.concatenate(column) for column in zip(*per_text, strict=True))
            for per_text in zip(*estimates, strict=True)
        ]
        for _ in range(FIT_ROUNDS):
            mixed, shares = np.full(len(orders[0][0]), 1 / 256), []
            for k, (own, bucket) in enumerate(orders):
                weight = self.weights[k, bucket]
                reached = weight * own + (1 - weight) * mixed
                shares.append(weight * own / reached)
                mixed = reached
            visits = np.ones(len(mixed))  # how likely the recursion came down to this order, given the byte
            for k in range(self.order, -1, -1):
                bucket = orders[k][1]
                visited = np.bincount(bucket, weights=visits, minlength=NUM_BUCKETS)
                stopped = np.bincount(bucket, weights=visits * shares[k], minlength=NUM_BUCKETS)
                self.weights[k] = (stopped + 0.5) / (visited + 1)  # never 1: that would leave nothing for other bytes
                visits = visits * (1 - shares[k])
        self.weights[:, 0] = 0  # a context never seen has no estimate of its own


def _windows(text: bytes, length: int) -> np.ndarray:
    """Every window that ends at a byte of `text`, packed big-endian: the last byte is the lowest."""
    padded = np.frombuffer(bytes(length - 1) + text, dtype=np.uint8).astype(np.uint64)
    keys = np.zeros(len(text), dtype=np.uint64)
    for offset in range(length):
        keys = (keys << np.uint64(8)) | padded[offset : offset + len(text)]
    return keys.astype(np.int64)
