"""The model card of `perft_quickstart.py`, from its JSON alone."""

import statistics
from typing import Any

_HEAD = """# PERFT on the quickstart's task

What PERFT R, E, D and S gain on a small, fully reproducible task: an OLMoE-style model of {num_parameters:,} parameters
({bits_per_byte:.3f} bits per byte on held-out modules, an order-3 byte n-gram {ngram_bits_per_byte:.3f}), pre-trained on
the source of the Python standard library, is fine-tuned to write the first sentence of a function's docstring, and
measured on {rows} functions of modules it has never seen.

Command: `{command}`; every number below is in [perft-quickstart.json](perft-quickstart.json), which it writes.
{steps} steps of {batch_size} rows, AdamW, cosine; learning rates {rates} tried per method on modules of the train side
(one seed), the best one then run with seeds {seeds} on the held-out modules. Every method has the active parameters of
R, as nearly as its rank allows; E and R store more.

"""


def render_card(results: dict[str, Any]) -> str:
    """The card as Markdown.

    Args:
        results: What `perft_quickstart.py` wrote as JSON.
    """
    head = _HEAD.format(
        **results["base"],
        command=results["command"],
        steps=results["steps"],
        batch_size=results["batch_size"],
        rates=", ".join(results["learning_rates"]),
        seeds=", ".join(map(str, results["seeds"])),
    )
    parts = [
        head,
        _table(results),
        "\n## Reading\n\n",
        *_reading(results),
        "\n## Learning-rate search\n\n",
        _search(results),
    ]
    return "".join(parts)


def _table(results: dict[str, Any]) -> str:
    lines = [
        f"Change of the held-out loss, nats per answer token (base: {results['base']['loss']:.4f}), with its paired 95% "
        "bootstrap interval over functions:\n",
        "| method | trainable | active | lr | mean of seeds | spread | "
        + " | ".join(f"seed {s}" for s in results["seeds"])
        + " |",
        "|---|---:|---:|---:|---:|---:|" + "---:|" * len(results["seeds"]),
    ]
    for name, method in _best_first(results):
        runs = (f"{r['difference']:.4f} [{r['low']:.4f}, {r['high']:.4f}]" for r in method["runs"].values())
        lines.append(
            f"| {name} | {method['parameters']['trainable']:,} | {method['parameters']['active']:,} "
            f"| {method['learning_rate']} | {method['mean_difference']:.4f} | {method['spread']:.4f} | {' | '.join(runs)} |"
        )
    return "\n".join(lines) + "\n"


def _reading(results: dict[str, Any]) -> list[str]:
    methods = results["methods"]
    wins = [name for name, m in methods.items() if m["beats_base_in_every_seed"]]
    lines = [f"- Better than the base in every seed, the interval excluding zero: {'; '.join(wins) or 'none'}.\n"]
    rest = [name for name in methods if name not in wins]
    if rest:
        lines.append(f"- Not so: {'; '.join(rest)}.\n")
    for other in methods:
        if other != "R":
            lines.append(_compare("R", other, methods))
    edge = [
        n
        for n, m in methods.items()
        if m["learning_rate"] in (results["learning_rates"][0], results["learning_rates"][-1])
    ]
    if edge:
        lines.append(
            f"- The best learning rate lies at the edge of the grid for {'; '.join(edge)}: it may do better outside.\n"
        )
    lines.append(
        "- One task, one small model, three seeds: it shows that the method works and learns, and ranks nothing for "
        "larger models.\n"
    )
    return lines


def _compare(one: str, other: str, methods: dict[str, Any]) -> str:
    """Difference of the paired seeds, and whether all of them agree in sign."""
    pairs = [
        methods[one]["runs"][seed]["after"] - methods[other]["runs"][seed]["after"] for seed in methods[one]["runs"]
    ]
    mean = statistics.mean(pairs)
    spread = statistics.stdev(pairs) if len(pairs) > 1 else 0.0
    if all(p < 0 for p in pairs):
        verdict = f"{one} is better than {other} in every seed"
    elif all(p > 0 for p in pairs):
        verdict = f"{one} is worse than {other} in every seed"
    else:
        verdict = f"{one} and {other} differ by less than seeds do"
    return f"- {verdict}: loss of {one} minus loss of {other} {mean:+.4f} (spread over seeds {spread:.4f}).\n"


def _search(results: dict[str, Any]) -> str:
    rates = results["learning_rates"]
    lines = [
        "Loss on modules of the train side, one seed:\n",
        "| method | " + " | ".join(rates) + " |",
        "|---|" + "---:|" * len(rates),
    ]
    for name, method in results["methods"].items():
        cells = (
            f"**{method['search'][r]:.4f}**" if r == method["learning_rate"] else f"{method['search'][r]:.4f}"
            for r in rates
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _best_first(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return sorted(results["methods"].items(), key=lambda item: item[1]["mean_difference"])
