"""Positions of a sparse delta, regenerated from a seed: our own counter-based integer hash, version 1.

A random fixed mask needs no stored indices if every process, device and torch release computes the same one. The streams
of ``torch.rand`` and ``torch.randperm`` promise nothing of the kind, so the numbers are defined here, by integers only.
``ALGORITHM`` and ``VERSION`` are saved beside the values; a change to anything below is a new version.

*Mixing*, a bijection of 32-bit numbers (all arithmetic modulo 2^32)::

    x ^= x >> 16;  x *= MULTIPLIERS[0];  x ^= x >> 15;  x *= MULTIPLIERS[1];  x ^= x >> 16

*Keys*: ``key(i, words)`` starts with ``i`` and takes ``state = mix((state + INCREMENT) ^ word)`` over
``words = (purpose, seed low, seed high, layer, matrix, expert, block)``, low and high being 32 bits of the seed.

*Bernoulli form* (purpose 1): position ``q`` is kept iff ``hash32(q) >= round(p 2^32)``, where
``hash32(q) = mix(mix(low ^ key(0)) + key(1))``, ``low`` the lower 32 bits of ``q`` and ``block`` the bits above them.
Values stand in ascending ``q``.

*Exact form* (purpose 2, block 0): the positions are ``pi(0), ..., pi(n - 1)``, ``pi`` a keyed bijection of ``[0, S)``: a
Feistel network of ``NUM_ROUNDS`` rounds on ``ceil(log2 S)`` bits, walked until it falls below ``S``. With ``h`` the lower
half of the bits rounded down and the upper half the rest, even rounds do ``lower ^= mix(upper ^ key(round))`` and odd
rounds ``upper ^= mix(lower ^ key(round))``, each cut to the width of the half it changes. So the positions are distinct by
construction and need no state.

Both multipliers are below 2^31: their product with a 32-bit number is below 2^63, so that int64 arithmetic is exact on
every device and nothing depends on how a kernel overflows. They were chosen here, of random odd numbers, for their small
avalanche bias.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ALGORITHM = "hf_moe_ext.mix32"
VERSION = 1
MULTIPLIERS = (0x7F674995, 0x3355132F)
INCREMENT = 0x9E3779B9  # 2^32 over the golden ratio
NUM_ROUNDS = 6
MAX_ENTRIES = 2**34

_MASK = 0xFFFFFFFF
_BERNOULLI, _EXACT = 1, 2
# Entries handled at a time: 2 MiB a temporary, which stays in a cache. It divides 2^32, so a chunk lies in one block.
_CHUNK = 2**18


@dataclass(frozen=True)
class MaskStream:
    """Names one mask: all of a model's matrices share a seed and differ in the other three numbers.

    Attributes:
        seed: in [0, 2^63).
        layer: index of the decoder layer.
        matrix: index of the matrix within an expert; whoever builds the model numbers them.
        expert: index of the expert.
    """

    seed: int
    layer: int = 0
    matrix: int = 0
    expert: int = 0

    def __post_init__(self) -> None:
        for name, bits in (("seed", 63), ("layer", 31), ("matrix", 31), ("expert", 31)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
            if not 0 <= value < 2**bits:
                raise ValueError(f"{name} must be at least 0 and below 2**{bits}, got {value}; choose a smaller number")


def check_drop_rate(drop_rate: float) -> None:
    """Refuse a rate outside (0, 1).

    Raises:
        ValueError, TypeError: see above.
    """
    if not isinstance(drop_rate, (int, float)) or isinstance(drop_rate, bool):
        raise TypeError(f"drop_rate must be a float, got {drop_rate!r} ({type(drop_rate).__name__})")
    if not 0 < drop_rate < 1:
        raise ValueError(
            f"drop_rate must lie strictly between 0 and 1 (the share of a delta's entries that is zero), got {drop_rate}"
        )


def count_kept(num_entries: int, drop_rate: float) -> int:
    """Entries that the exact form keeps: round(S (1 - p)); cutting off instead loses one where 1 - p is inexact."""
    check_drop_rate(drop_rate)
    return round(num_entries * (1 - drop_rate))


def hash32(stream: MaskStream, positions: Tensor) -> Tensor:
    """Bernoulli form's hash of each position.

    Args:
        stream: the mask's name.
        positions: int64, any shape, each in [0, 2^34).

    Returns:
        int64 of the same shape, each in [0, 2^32).
    """
    block = positions >> 32
    result = torch.zeros_like(positions)
    for number in range(MAX_ENTRIES >> 32):
        result = torch.where(block == number, _hash_block(stream, positions & _MASK, number), result)
    return result


def bernoulli_chunks(
    stream: MaskStream, num_entries: int, drop_rate: float, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """Kept positions of the Bernoulli form, int64, ascending, a bounded number at a time.

    Raises:
        ValueError: drop_rate outside (0, 1), or num_entries outside [1, 2^34].
    """
    check_drop_rate(drop_rate)
    _check_entries(num_entries)
    threshold = round(drop_rate * 2**32)
    for start in range(0, num_entries, _CHUNK):
        positions = torch.arange(start, min(start + _CHUNK, num_entries), dtype=torch.int64, device=device)
        kept = _hash_block(stream, positions & _MASK, start >> 32) >= threshold
        yield positions[kept]


def bernoulli_positions(
    stream: MaskStream, num_entries: int, drop_rate: float, device: torch.device | str = "cpu"
) -> Tensor:
    """All kept positions of the Bernoulli form: int64 [kept], ascending; see ``bernoulli_chunks``."""
    return torch.cat(list(bernoulli_chunks(stream, num_entries, drop_rate, device)))


def exact_positions(
    stream: MaskStream, num_entries: int, num_kept: int, device: torch.device | str = "cpu", start: int = 0
) -> Tensor:
    """Positions pi(start), ..., pi(num_kept - 1) of the exact form: int64, distinct, in no order.

    Args:
        stream: the mask's name.
        num_entries: S, at most 2^34.
        num_kept: n, at most S.
        device: where to compute them.
        start: first counter.

    Raises:
        ValueError: num_entries outside [1, 2^34], or not 0 <= start <= num_kept <= num_entries.
    """
    _check_entries(num_entries)
    if not 0 <= start <= num_kept <= num_entries:
        raise ValueError(
            f"num_kept must be at most the {num_entries} entries and start at most num_kept, got num_kept={num_kept}, "
            f"start={start}"
        )
    keys = [_key(number, _EXACT, stream, 0) for number in range(NUM_ROUNDS)]
    positions = torch.empty(num_kept - start, dtype=torch.int64, device=device)
    for first in range(start, num_kept, _CHUNK):
        counters = torch.arange(first, min(first + _CHUNK, num_kept), dtype=torch.int64, device=device)
        positions[first - start : first - start + len(counters)] = _walk(counters, num_entries, keys)
    return positions


def checksum(positions: Tensor, shape: tuple[int, int], layout: str) -> str:
    """First 16 hexadecimal digits of a SHA-256 that tells one set of positions from another.

    Of the text ``rows cols layout``, then the row-major positions as little-endian int64 in the order of the values: the
    same numbers mean other entries in another shape or layout.
    """
    digest = hashlib.sha256(f"{shape[0]} {shape[1]} {layout}".encode())
    for chunk in positions.reshape(-1).split(_CHUNK):
        digest.update(chunk.to("cpu", torch.int64).numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _check_entries(num_entries: int) -> None:
    if not 1 <= num_entries <= MAX_ENTRIES:
        raise ValueError(f"a mask must have at least 1 and at most 2**34 entries, got {num_entries}; split the matrix")


def _hash_block(stream: MaskStream, low: Tensor, block: int) -> Tensor:
    first, second = (_key(number, _BERNOULLI, stream, block) for number in range(2))
    mixed = _mix(low ^ first)
    return _mix(mixed.add_(second).bitwise_and_(_MASK))


def _walk(counters: Tensor, num_entries: int, keys: list[int]) -> Tensor:
    num_bits = (num_entries - 1).bit_length()
    positions = _feistel(counters, num_bits, keys)
    outside = (positions >= num_entries).nonzero()[:, 0]
    # Fewer than half of the 2**num_bits numbers lie outside, and each walk ends: it stays on a cycle that started inside.
    while len(outside):
        again = _feistel(positions[outside], num_bits, keys)
        positions[outside] = again
        outside = outside[again >= num_entries]
    return positions


def _feistel(numbers: Tensor, num_bits: int, keys: list[int]) -> Tensor:
    low_bits = num_bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (num_bits - low_bits)) - 1
    low, high = numbers & low_mask, numbers >> low_bits
    for number, key in enumerate(keys):
        if number % 2 == 0:
            low = low ^ _mix(high ^ key).bitwise_and_(low_mask)
        else:
            high = high ^ _mix(low ^ key).bitwise_and_(high_mask)
    return (high << low_bits) | low


def _mix(numbers: Tensor) -> Tensor:
    """Changes ``numbers`` in place: it is called on temporaries, and memory traffic is all that it costs."""
    numbers ^= numbers >> 16
    numbers.mul_(MULTIPLIERS[0]).bitwise_and_(_MASK)
    numbers ^= numbers >> 15
    numbers.mul_(MULTIPLIERS[1]).bitwise_and_(_MASK)
    numbers ^= numbers >> 16
    return numbers


def _key(number: int, purpose: int, stream: MaskStream, block: int) -> int:
    state = number
    for word in (purpose, stream.seed & _MASK, stream.seed >> 32, stream.layer, stream.matrix, stream.expert, block):
        state = _mix_int(((state + INCREMENT) & _MASK) ^ word)
    return state


def _mix_int(number: int) -> int:
    number ^= number >> 16
    number = number * MULTIPLIERS[0] & _MASK
    number ^= number >> 15
    number = number * MULTIPLIERS[1] & _MASK
    return number ^ number >> 16
