"""The model card of `audit.py`, from its JSON alone."""

from typing import Any

TARGET = 1.03  # of a step, without drift

_HEAD = f"""# Routing audit: what recording costs

Training steps (forward, backward, AdamW) with a `RoutingRecorder` over the same steps without, turn about in one process,
on random weights of OLMoE's proportions. A ratio is taken within each round; the brackets are its quartiles over rounds.
Recorded are load, entropy, largest probability and margin of every router, and one reading for each visit's steps. Target:
at most {TARGET} without coactivation and drift. Every number is in [routing-audit.json](routing-audit.json).
"""

_RUN = """
## {name}

{device}; torch {torch}, transformers {transformers}. {family}: hidden {hidden_size}, {num_experts} experts of width
{intermediate_size}, top {top_k}, {num_hidden_layers} layers, vocabulary {vocab_size}, {dtype}; {batch_size} x {length} tokens.
{rounds} rounds, {steps} steps and one reading per visit, seed {seed}: `{command}`

| method | step, s | recorder | step over plain | processor time over plain | added, ms | share of processor time in the hooks |
|---|---:|---|---:|---:|---:|---:|
"""


def render_card(results: dict[str, Any]) -> str:
    """The card as Markdown.

    Args:
        results: What `audit.py` wrote as JSON.
    """
    return "".join([_HEAD, *(_render_run(name, run) for name, run in results["runs"].items())])


def _render_run(name: str, run: dict[str, Any]) -> str:
    lines = [_RUN.format(**run["shape"] | run["versions"] | run, name=name)]
    for method, found in run["methods"].items():
        for recorder, values in found["recorders"].items():
            processor = _show(values["processor_ratio"], 3) if "processor_ratio" in values else ""
            share = (
                _show({k: 100 * v for k, v in values["own_share"].items()}, 2) + " %" if "own_share" in values else ""
            )
            lines.append(
                f"| {method} | {found['step_seconds']:.3f} | {recorder} | {_show(values['ratio'], 3)} | {processor} "
                f"| {_show(values['added_ms'], 1)} | {share} |\n"
            )
    return "".join([*lines, "\n", *(f"- {line}\n" for line in judge_run(run))])


def judge_run(run: dict[str, Any]) -> list[str]:
    """For each method, whether the target is met; a ratio whose quartiles hold the target is not decided."""
    lines = []
    for method, found in run["methods"].items():
        ratio = found["recorders"]["recorder"]["ratio"]
        met = "met" if ratio["median"] <= TARGET else "not met"
        undecided = ratio["low"] <= TARGET < ratio["high"]
        doubt = " (not decided: the quartiles lie on both sides)" if undecided else ""
        share = found["recorders"]["recorder"].get("own_share")
        own = "" if share is None else f" Its hooks take {100 * share['median']:.2f} % of the step's processor time."
        lines.append(f"{method}: target {met}, {ratio['median']:.3f} of the plain step{doubt}.{own}")
    return lines


def _show(values: dict[str, float], digits: int) -> str:
    return f"{values['median']:.{digits}f} [{values['low']:.{digits}f}, {values['high']:.{digits}f}]"
