"""The n-gram against arithmetic done by hand, and as a distribution."""

import numpy as np
import pytest

from quickstart.ngram import ByteNgram


def test_order_one_by_hand() -> None:
    model = ByteNgram([b"abab"], order=1)
    model.weights[:] = 0.5
    # counts: a 2, b 2 of 4 bytes; after the empty context (byte 0): a 1 of 1; after a: b 2 of 2; after b: a 1 of 1
    p0 = 0.5 * (2 / 4) + 0.5 / 256
    assert model.probabilities(b"ab") == pytest.approx([0.5 * 1 + 0.5 * p0, 0.5 * 1 + 0.5 * p0], abs=1e-15)
    # b after b was never seen: only the lower orders speak; c was never seen at all
    assert model.probabilities(b"abb")[2] == pytest.approx(0.5 * p0, abs=1e-15)
    assert model.probabilities(b"ac")[1] == pytest.approx(0.25 / 256, abs=1e-15)


def test_a_context_never_seen_falls_back_whole() -> None:
    model = ByteNgram([b"abab"] * 3, order=2)
    lower = ByteNgram([b"abab"] * 3, order=1)
    model.weights[:] = lower.weights[0, 0] = 0.5
    model.weights[:, 0] = 0
    lower.weights[:] = model.weights[:2]
    assert model.probabilities(b"zzb")[2] == pytest.approx(lower.probabilities(b"zzb")[2], abs=1e-15)


def test_probabilities_sum_to_one_for_every_context() -> None:
    text = b"the cat sat on the mat, the dog sat on the log. " * 5
    model = ByteNgram([text[i : i + 40] for i in range(0, len(text), 7)], order=3)
    for context in (b"", b"t", b"the", b"xyz", b"at "):
        total = sum(model.probabilities(context + bytes([byte]))[-1] for byte in range(256))
        assert total == pytest.approx(1, abs=1e-12)


def test_fitted_weights_beat_equal_ones_and_higher_orders_help() -> None:
    text = b"for index in range(count): total = total + values[index]; print(total)\n"
    train, held_out = [text * 3 + bytes([65 + i % 26]) * 2 for i in range(60)], [text + b"QZ"]
    fitted = ByteNgram(train, order=3)
    equal = ByteNgram(train, order=3)
    equal.weights[:, 1:] = 0.5
    assert fitted.bits_per_byte(held_out) < equal.bits_per_byte(held_out)
    orders = [ByteNgram(train, order=k).bits_per_byte(held_out) for k in range(4)]
    assert orders == sorted(orders, reverse=True)


def test_bits_per_byte_is_the_mean_code_length() -> None:
    model = ByteNgram([b"abcabcabd"], order=2)
    texts = [b"abc", b"d"]
    bits = np.concatenate([-np.log2(model.probabilities(text)) for text in texts])
    assert model.bits_per_byte(texts) == pytest.approx(bits.sum() / 4)


@pytest.mark.parametrize(
    "bad", [{"texts": [], "order": 3}, {"texts": [b"a"], "order": -1}, {"texts": [b"a"], "order": 8}]
)
def test_meaningless_arguments_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="got"):
        ByteNgram(**bad)
