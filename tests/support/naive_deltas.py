"""Slow twins of the codes of deltas: Python integers and loops, written from the documented definitions."""

from collections.abc import Sequence

MODULUS = 2**32


def mix(number: int) -> int:
    """The 32-bit mixing step."""
    number ^= number >> 16
    number = number * 0x7F674995 % MODULUS
    number ^= number >> 15
    number = number * 0x3355132F % MODULUS
    number ^= number >> 16
    return number


def key(number: int, purpose: int, stream: Sequence[int], block: int) -> int:
    """One key; stream = (seed, layer, matrix, expert)."""
    seed, layer, matrix, expert = stream
    state = number
    for word in (purpose, seed % MODULUS, seed // MODULUS, layer, matrix, expert, block):
        state = mix(((state + 0x9E3779B9) % MODULUS) ^ word)
    return state


def hash32(stream: Sequence[int], position: int) -> int:
    """Hash of one position, Bernoulli form."""
    low, block = position % MODULUS, position // MODULUS
    return mix((mix(low ^ key(0, 1, stream, block)) + key(1, 1, stream, block)) % MODULUS)


def bernoulli_positions(stream: Sequence[int], num_entries: int, drop_rate: float) -> list[int]:
    """Kept positions, one after the other."""
    return [q for q in range(num_entries) if hash32(stream, q) >= round(drop_rate * MODULUS)]


def exact_position(stream: Sequence[int], num_entries: int, counter: int) -> int:
    """The bijection of [0, num_entries) at one number."""
    num_bits = 0
    while 2**num_bits < num_entries:
        num_bits += 1
    low_bits = num_bits // 2
    position = counter
    while True:
        low, high = position % 2**low_bits, position // 2**low_bits
        for number in range(6):
            if number % 2 == 0:
                low ^= mix(high ^ key(number, 2, stream, 0)) % 2**low_bits
            else:
                high ^= mix(low ^ key(number, 2, stream, 0)) % 2 ** (num_bits - low_bits)
        position = high * 2**low_bits + low
        if position < num_entries:
            return position


def unpacked_code(row: Sequence[int], bits: int, column: int) -> int:
    """One code of a row of bytes."""
    return row[column * bits // 8] // 2 ** (column * bits % 8) % 2**bits


def grid_error(values: Sequence[float], scale: float, bits: int) -> float:
    """Squared error of the nearest levels (2^b of them, centred on 0, ``scale`` apart)."""
    levels = [(code - (2**bits - 1) / 2) * scale for code in range(2**bits)]
    return sum(min((value - level) ** 2 for level in levels) for value in values)
