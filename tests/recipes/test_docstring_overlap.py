"""The text metric by hand, and loaded as `evaluate` loads it."""

import evaluate
import pytest


@pytest.fixture(scope="module")
def metric(recipes):
    """The metric, by its path."""
    return evaluate.load(str(recipes / "metrics" / "docstring_overlap"), keep_in_memory=True)


@pytest.mark.parametrize(
    ("prediction", "reference", "word_f1"),
    [
        ("Return the name.", "Return the name.", 100),
        ("returns names", "Return the name.", 100 * 2 * 2 / (2 + 3)),  # endings aside: return, nam of return, the, nam
        ("getFile_name", "get file name", 100),
        ("the the the", "the end", 100 * 2 * 1 / (3 + 2)),
        ("nothing alike", "other words", 0),
        ("", "other words", 0),
        ("...", "...", 0),
    ],
)
def test_words_by_hand(metric, prediction: str, reference: str, word_f1: float) -> None:
    scores = metric.compute(predictions=[prediction], references=[reference])
    assert scores["word_f1"] == pytest.approx(word_f1)


def test_characters_by_hand(metric) -> None:
    # "ab c" and "abd" without spaces: 1-grams share 2 of 3, 2-grams share 1 of 2, 3-grams 0 of 1; longer ones: none
    scores = metric.compute(predictions=["ab c"], references=["abd"])
    assert scores["chrf"] == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)
    # recall weighs four times: precision 1/2, recall 1 for "aa" against "a"
    scores = metric.compute(predictions=["aa"], references=["a"])
    assert scores["chrf"] == pytest.approx(100 * 5 * 0.5 * 1 / (4 * 0.5 + 1))


def test_mean_over_rows(metric) -> None:
    scores = metric.compute(predictions=["a cat", "x"], references=["a cat", "y"])
    assert scores["word_f1"] == pytest.approx(50)
