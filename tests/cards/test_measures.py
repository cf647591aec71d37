"""Duplicates and recitation, against what can be counted by eye."""

import pytest

from hf_moe_ext.cards.measures import duplicate_rate, verbatim_rate


def test_duplicates_are_found_through_case_and_spacing() -> None:
    train = ["The  cat sat.", "A dog ran.\n"]
    assert duplicate_rate(train, ["the cat\nsat.", "A dog ran", "a DOG ran.", "new"]) == 0.5
    assert duplicate_rate([], ["anything"]) == 0


def test_recitation_counts_continuations_with_a_long_enough_run() -> None:
    training = [[1, 2, 3, 4, 5], [7, 8, 9]]
    written = [[0, 2, 3, 4], [3, 4, 0, 8, 9], [5, 7, 8], [1, 2, 3, 4, 5, 6]]
    assert verbatim_rate(written, training, 3) == 0.5  # the first and the last
    assert verbatim_rate(written, training, 2) == 1.0
    assert verbatim_rate(written, training, 5) == 0.25
    assert verbatim_rate(written, training, 6) == 0  # no row of the training text is so long
    assert verbatim_rate([[5, 7]], training, 2) == 0  # one row's end and the next one's start are no run


def test_the_training_text_may_be_read_once_only() -> None:
    assert verbatim_rate([[2, 3], [8, 9]], iter([[1, 2, 3], [8, 9]]), 2) == 1.0


@pytest.mark.parametrize(
    ("written", "length", "words"), [([], 2, "at least one sequence"), ([[1]], 0, "at least 1; it is 0")]
)
def test_what_cannot_be_measured_is_refused(written, length: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        verbatim_rate(written, [[1]], length)


def test_no_held_out_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="held_out must hold"):
        duplicate_rate(["a"], [])
