"""What a model card may say: numbers, each with the file it was read from.

A template prints a number only as a `Fact`; `refuse_bare_number` is the guard that `cards.py` puts in front of its output.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Spread = tuple["Fact", "Fact"]


class CardError(ValueError):
    """A card that cannot be written as it should be; the message names the number or file and what to do."""


@dataclass(frozen=True)
class Fact:
    """A number and where it is from.

    Args:
        value: The number.
        source: File and key it was read from, as the card shows them.
        form: How it is printed.

    Raises:
        CardError: It has no source, or is not finite.
    """

    value: float
    source: str
    form: str = "{:,.4g}"

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise CardError(f"{self.source or 'a value of the card'} must be a number; it is {self.value!r}.")
        if not self.source:
            raise CardError(f"The number {self.value!r} has no source. Name the file it was measured into.")
        if not math.isfinite(self.value):
            raise CardError(
                f"{self.source} is {self.value}, which no card can state. Find out why the run gave it, or leave it out."
            )

    def __str__(self) -> str:
        return self.form.format(self.value)


@dataclass(frozen=True)
class Result:
    """One row of the results: what was measured, before and after, and how far to trust it."""

    name: str
    source: str
    after: Fact | None = None
    before: Fact | None = None
    change: Fact | None = None
    spread: Spread | None = None
    spread_kind: str = ""
    rows: Fact | None = None
    seeds: str = ""
    note: str = ""
    metric: str | None = None  # its name in the front matter's model-index


def refuse_bare_number(value: Any) -> Any:
    """Jinja2's `finalize`: let texts and facts through.

    Raises:
        CardError: A number without a source.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise CardError(f"The number {value!r} has no source. Name the file it was measured into.")
    return value


class Metrics:
    """A recipe's `metrics.json`, read as facts.

    Args:
        values: What the file holds.
        source: The file's name; empty refuses every number.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def fact(self, key: str, form: str = "{:,.4g}") -> Fact | None:
        """The number at a dotted key; None where there is none.

        Raises:
            CardError: The metrics have no source.
        """
        value: Any = self.values
        for part in key.split("."):
            if not isinstance(value, Mapping) or value.get(part) is None:
                return None
            value = value[part]
        return self.derived(value, key, form)

    def derived(self, value: float, key: str, form: str = "{:,.4g}") -> Fact:
        """A number at a key, or computed from what is there."""
        if not self.source:
            raise CardError(f"{key} = {value!r} has no source. Give the file of the metrics, or source=.")
        return Fact(value, f"`{self.source}`: {key}", form)

    @property
    def seeds(self) -> str:
        """The seed of the run, in words."""
        seed = self.values.get("settings", {}).get("seed")
        return "" if seed is None else f"seed {seed}"


def read_results(metrics: Metrics) -> list[Result]:
    """Every result that a recipe writes, and those listed under `results`."""
    found = [_read_loss(metrics, "loss", "held-out loss, nats per token")] if "arms" not in metrics.values else []
    found += (
        _read_base(metrics) + _read_text(metrics) + _read_accuracy(metrics) + _read_bits(metrics) + _read_arms(metrics)
    )
    return [result for result in found if result] + [*_read_listed(metrics)]


def _read_loss(metrics: Metrics, key: str, name: str) -> Result | None:
    before, after = metrics.fact(f"{key}.before", "{:.4f}"), metrics.fact(f"{key}.after", "{:.4f}")
    if before is None and after is None:
        return None
    low, high = metrics.fact(f"{key}.low", "{:+.4f}"), metrics.fact(f"{key}.high", "{:+.4f}")
    return Result(
        name,
        key,
        before=before,
        after=after,
        change=metrics.fact(f"{key}.difference", "{:+.4f}"),
        spread=(low, high) if low and high else None,
        spread_kind="95% of the change, paired bootstrap over rows",
        rows=metrics.fact(f"{key}.rows", "{:,}"),
        seeds=metrics.seeds,
        metric="loss",
    )


def _read_base(metrics: Metrics) -> list[Result]:
    """What a base that the recipe pre-trained reaches before anything is tuned."""
    bits, ngram = metrics.fact("base.bits_per_byte", "{:.3f}"), metrics.fact("base.ngram_bits_per_byte", "{:.3f}")
    if bits is None:
        return []
    note = f"an interpolated byte n-gram of the same text {ngram}" if ngram else ""
    return [Result("bits per byte of the base, held-out modules", "base.bits_per_byte", before=bits, note=note)]


def _read_text(metrics: Metrics) -> list[Result]:
    text = metrics.values.get("text_metric")
    if not text:
        return []
    words, shuffled = metrics.fact("text_metric.name_words", "{:.2f}"), metrics.fact("text_metric.shuffled", "{:.2f}")
    baselines = [f"words of the name {words}"] if words else []
    baselines += [f"shuffled pairs {shuffled}"] if shuffled else []
    return [
        Result(
            f"{text['name']}, 0 to 100",
            "text_metric",
            before=metrics.fact("text_metric.before", "{:.2f}"),
            after=metrics.fact("text_metric.after", "{:.2f}"),
            rows=metrics.fact("text_metric.rows", "{:,}"),
            seeds=metrics.seeds,
            note=f"baselines: {', '.join(baselines)}" if baselines else "",
            metric=text["name"],
        )
    ]


def _read_accuracy(metrics: Metrics) -> list[Result]:
    return [
        Result(
            f"accuracy, {group}",
            f"accuracy.{group}",
            before=metrics.derived(scores["before"], f"accuracy.{group}.before", "{:.1%}"),
            after=None
            if scores.get("after") is None
            else metrics.derived(scores["after"], f"accuracy.{group}.after", "{:.1%}"),
            rows=metrics.derived(scores["rows"], f"accuracy.{group}.rows", "{:,}"),
            seeds=metrics.seeds,
            note=f"majority class {metrics.derived(scores['majority_class'], f'accuracy.{group}.majority_class', '{:.1%}')}",
            metric="accuracy",
        )
        for group, scores in (metrics.values.get("accuracy") or {}).items()
    ]


def _read_bits(metrics: Metrics) -> list[Result]:
    bits = metrics.values.get("bits_per_byte")
    if not isinstance(bits, Mapping):
        after = metrics.fact("bits_per_byte", "{:.3f}")
        return [Result("bits per byte", "bits_per_byte", after=after, seeds=metrics.seeds)] if after else []
    baselines = [
        f"{name.replace('_', ' ')} {metrics.fact(f'bits_per_byte.{name}', '{:.3f}')}"
        for name in bits
        if name not in ("before", "after")
    ]
    before, after = metrics.fact("bits_per_byte.before", "{:.3f}"), metrics.fact("bits_per_byte.after", "{:.3f}")
    note = f"baselines: {', '.join(baselines)}" if baselines else ""
    return [Result("bits per byte", "bits_per_byte", before=before, after=after, seeds=metrics.seeds, note=note)]


def _read_arms(metrics: Metrics) -> list[Result]:
    """Arms of one comparison: a loss each, and what each costs."""
    rows: list[Result | None] = []
    for arm, values in (metrics.values.get("arms") or {}).items():
        key, called = f"arms.{arm}", values.get("name", arm)
        rows.append(_read_loss(metrics, f"{key}.loss", f"held-out loss, nats per token, {called}"))
        for name, form in (("loss_levelled", "{:.4f}"), ("bits_per_byte", "{:.3f}"), ("parameters", "{:,}"), ("model_bytes", "{:,}")):  # fmt: skip
            if name in values:
                said = {"loss_levelled": "held-out loss with its experts made alike", "model_bytes": "bytes on disk"}
                fact = metrics.fact(f"{key}.{name}", form)
                rows.append(Result(f"{said.get(name, name.replace('_', ' '))}, {called}", f"{key}.{name}", after=fact))
    return [row for row in rows if row]


def _read_listed(metrics: Metrics) -> Iterator[Result]:
    """`results`: [{name, value or values, source, seeds, rows, note}]; each with a source of its own."""
    for place, entry in enumerate(metrics.values.get("results") or []):
        name, source = entry.get("name"), entry.get("source")
        if not name or not source:
            missing = "name" if not name else "source"
            raise CardError(
                f"results[{place}] ({name or entry!r}) has no {missing}: a result has name, value or values, and source; "
                "name the file it was measured into."
            )
        values = entry.get("values") or ([entry["value"]] if "value" in entry else [])
        if not values:
            raise CardError(f"results[{place}] ({name}) has neither value nor values.")
        facts = [Fact(value, f"`{source}`", entry.get("form", "{:,.4g}")) for value in values]
        form = facts[0].form
        mean = Fact(sum(fact.value for fact in facts) / len(facts), facts[0].source, form)
        ends = (min(facts, key=lambda fact: fact.value), max(facts, key=lambda fact: fact.value))
        seeds = entry.get("seeds") or []
        yield Result(
            name,
            source,
            after=mean,
            spread=ends if len(facts) > 1 else None,
            spread_kind="least and greatest over seeds",
            rows=None if entry.get("rows") is None else Fact(entry["rows"], f"`{source}`", "{:,}"),
            seeds=f"seeds {', '.join(map(str, seeds))}" if seeds else "",
            note=entry.get("note", ""),
            metric=entry.get("metric"),
        )


def read_costs(metrics: Metrics) -> list[tuple[str, Fact]]:
    """Memory, time and sizes that the run wrote down."""
    forms = {
        "parameters.trainable": ("trainable parameters", "{:,}"),
        "parameters.active": ("of which a token uses", "{:,}"),
        "model.parameters": ("parameters", "{:,}"),
        "peak_memory_bytes": ("peak memory of a process, bytes", "{:,}"),
        "processes": ("processes", "{}"),
        "steps": ("optimizer steps", "{:,}"),
        "tokens_per_step": ("tokens per step", "{:,}"),
        "samples_per_second": ("rows per second in training", "{:.1f}"),
    }
    found = [(said, fact) for key, (said, form) in forms.items() if (fact := metrics.fact(key, form))]
    for part, value in (metrics.values.get("seconds") or {}).items():
        found.append((f"seconds, {part}", metrics.derived(value, f"seconds.{part}", "{:,.1f}")))
    return found


def without_machine_paths(value: Any) -> Any:
    """The same with every absolute path cut to its last part: a card names no folder of one machine."""
    if isinstance(value, Mapping):
        return {key: without_machine_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_machine_paths(item) for item in value]
    return re.sub(r"(?<![\w.~:/])(?:~|[A-Za-z]:)?[/\\](?:[^\s'\"=,;|]+[/\\])*([^\s'\"=,;|/\\]+)", r"\1", value) if isinstance(value, str) else value  # fmt: skip
