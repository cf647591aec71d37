"""Word and character overlap of written and real docstring sentences, as an `evaluate` metric loaded by path."""

import re
from collections import Counter

import datasets
import evaluate

_DESCRIPTION = """
How much of a reference sentence a written one holds, without a model and without a download.
`word_f1`: harmonic mean of precision and recall over words (a multiset, lower case, plural and verb endings cut off),
the mean over rows. `chrf`: the F-score with twice the weight on recall over character 1- to 6-grams, spaces aside,
counts summed over rows (Popovic, 2015). Both from 0 to 100.
"""
_INPUTS = """
Args:
    predictions: List of written sentences.
    references: List of real sentences, one for each.

Returns:
    `word_f1`, `chrf`.
"""
_CITATION = """
@inproceedings{popovic-2015-chrf, author = {Popovi\\'c, Maja}, year = {2015}, pages = {392--395},
  title = {chrF: character n-gram F-score for automatic MT evaluation}, booktitle = {Workshop on Statistical Machine Translation}}
"""

LONGEST_NGRAM = 6
RECALL_WEIGHT = 2.0
_ENDINGS = ("ing", "ed", "es", "s", "e")


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class DocstringOverlap(evaluate.Metric):
    """The metric; `evaluate.load(folder)` makes one."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        rows = list(zip(predictions, references, strict=True))
        return {
            "word_f1": 100 * sum(score_words(*row) for row in rows) / len(rows),
            "chrf": 100 * score_characters(rows),
        }


def score_words(prediction: str, reference: str) -> float:
    """F1 of two sentences' words, 0 to 1; 0 when one of them has none."""
    written, real = Counter(split_words(prediction)), Counter(split_words(reference))
    shared = sum((written & real).values())
    return 2 * shared / (sum(written.values()) + sum(real.values())) if shared else 0.0


def split_words(sentence: str) -> list[str]:
    """Lower-case words without their endings; names are taken apart: `getFile_name` is `get file nam`."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", sentence)
    return [_cut_ending(word) for word in re.findall(r"[a-z]+|[0-9]+", spaced.lower())]


def score_characters(rows: list[tuple[str, str]]) -> float:
    """ChrF over pairs of prediction and reference, 0 to 1."""
    scores = []
    for length in range(1, LONGEST_NGRAM + 1):
        shared = written = real = 0
        for prediction, reference in rows:
            ours, theirs = _ngrams(prediction, length), _ngrams(reference, length)
            shared += sum((ours & theirs).values())
            written += sum(ours.values())
            real += sum(theirs.values())
        if written and real:
            precision, recall = shared / written, shared / real
            weight = RECALL_WEIGHT**2
            bottom = weight * precision + recall
            scores.append((1 + weight) * precision * recall / bottom if bottom else 0.0)
    return sum(scores) / len(scores) if scores else 0.0


def _cut_ending(word: str) -> str:
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word.removesuffix(ending)
    return word


def _ngrams(sentence: str, length: int) -> Counter[str]:
    text = "".join(sentence.split())
    return Counter(text[i : i + length] for i in range(len(text) - length + 1))
