"""The model card of `perft_router.py`, from its JSON alone."""

import statistics
from typing import Any

_HEAD = """# Routers of PERFT on the quickstart's task

Which tokens R's load should be balanced over, whether tuning the base model's own router pays, and what fewer adapters
cost, on the task of [perft-quickstart.md](perft-quickstart.md) ({num_parameters:,} parameters, {rows} held-out functions).

Command: `{command}`; every number below is in [perft-router.json](perft-router.json), which it writes. {steps} steps of
{batch_size} rows, learning rate {rate} (a tuned base router: {router_rate}), seeds {seeds}; no setting's rate was searched
for by itself.

"""
_STUDIES = {
    "scope": (
        "The scope of R's auxiliary loss",
        "`router_aux_loss_scope` and `router_aux_loss_coef`. Largest load: share of the tokens' choices that the busiest "
        "adapter of any layer got at the end (an even load is 0.25); entropy 1 is an even load.",
        {"router_load_max": "largest load", "router_load_entropy": "load entropy"},
    ),
    "base_router": (
        "Tuning the base model's own router (E)",
        "`base_router` and `base_router_drift_coef` (the guard). Divergence: of the tuned router's probabilities from the "
        "old ones, nats per token, mean over layers; load drift: share of the probability mass that changed experts, "
        "largest layer.",
        {"base_router_divergence": "divergence", "base_router_load_drift": "load drift"},
    ),
    "fewer": ("Fewer adapters", "`expert_fraction` (the experts that the train rows use most) and `shared_A`.", {}),
}


def render_card(results: dict[str, Any]) -> str:
    """The card as Markdown.

    Args:
        results: What `perft_router.py` wrote as JSON.
    """
    head = _HEAD.format(
        **results["base"],
        command=results["command"],
        steps=results["max_steps"],
        batch_size=results["batch_size"],
        rate=results["learning_rate"],
        router_rate=results["base_router_learning_rate"],
        seeds=", ".join(map(str, results["seeds"])),
    )
    parts = [_render_study(*_STUDIES[name], results["studies"][name]) for name in _STUDIES]
    tail = (
        "\nOne task, one small model, few steps: it can choose a default and warn of a trap, and ranks nothing for larger "
        "models.\n"
    )
    return head + "\n".join(parts) + tail


def _render_study(title: str, text: str, watched: dict[str, str], settings: dict[str, Any]) -> str:
    reference = next(iter(settings))
    lines = [
        f"## {title}\n",
        f"{text}\n",
        "| setting | trainable | active | change of held-out loss | spread | against the first | "
        + "".join(f"{label} | " for label in watched.values()).rstrip(),
        "|---|---:|---:|---:|---:|---|" + "---:|" * len(watched),
    ]
    for name, setting in settings.items():
        numbers = (
            f"{statistics.mean([run[key] for run in setting['runs'].values()]):.4f}"
            if all(key in run for run in setting["runs"].values())
            else "-"
            for key in watched
        )
        lines.append(
            f"| {name} | {setting['parameters']['trainable']:,} | {setting['parameters']['active']:,} "
            f"| {setting['mean_difference']:.4f} | {setting['spread']:.4f} | {_compare(setting, settings[reference])} | "
            + "".join(f"{number} | " for number in numbers).rstrip()
        )
    return "\n".join(lines) + "\n"


def _compare(setting: dict[str, Any], reference: dict[str, Any]) -> str:
    """Difference of the paired seeds, and whether all of them agree in sign."""
    if setting is reference:
        return "-"
    pairs = [run["after"] - reference["runs"][seed]["after"] for seed, run in setting["runs"].items()]
    mean = statistics.mean(pairs)
    if all(p < 0 for p in pairs):
        return f"{mean:+.4f}, better in every seed"
    if all(p > 0 for p in pairs):
        return f"{mean:+.4f}, worse in every seed"
    return f"{mean:+.4f}, seeds disagree"
