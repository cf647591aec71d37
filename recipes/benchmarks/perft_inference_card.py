"""The model card of `perft_inference.py`, from its JSON alone."""

from typing import Any

TARGET = 0.9  # of the base's tokens per second, for R

_HEAD = """# What PERFT costs at generation

Greedy decoding of an OLMoE-shaped model with random weights ({parameters:,} parameters, hidden size {hidden_size},
{num_hidden_layers} layers, {num_experts} experts of width {intermediate_size}, top-{top_k}, vocabulary {vocab_size:,},
{dtype}): prompts of {prompt_length} tokens, {new_tokens} new ones, dynamic cache, default attention and experts
implementation. {device}; torch {torch}, transformers {transformers}.

Command: `{command}`; every number below is in [perft-inference.json](perft-inference.json), which it writes. All
methods share the base's tensors and decode in lockstep in one process, each token by every method in turn. Adapters are
no-ops, so all write the same tokens through the same experts. A round's ratio is the median over its steps of the
base's time over the method's; given are median and [quartiles] of the rounds. The machine's load average was
{load_before:.1f} before and {load_after:.1f} after; where that is more than the threads used, other work ran beside it:
read the ratios, not the times.
"""


def render_card(results: dict[str, Any]) -> str:
    """The card as Markdown.

    Args:
        results: What `perft_inference.py` wrote as JSON.
    """
    parts = [_HEAD.format(**results, **results["shape"], **results["versions"])]
    for batch, methods in results["batches"].items():
        parts += [f"\n## Batch {batch}\n\n", _table(methods, results["adapters"])]
    parts += ["\n## Reading\n\n", *(_read(batch, methods) for batch, methods in results["batches"].items())]
    return "".join(parts)


def meets_target(methods: dict[str, Any]) -> bool:
    """Whether decoding with R keeps the wanted share of the base's tokens per second."""
    return bool(methods["R"]["speed_ratio"]["median"] >= TARGET)


def _table(methods: dict[str, Any], adapters: dict[str, int]) -> str:
    lines = [
        "| method | adapter parameters | tokens/s per row | of the base's | per token p50, ms | p95, ms | first token, ms "
        "| over the base's |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, method in methods.items():
        lines.append(
            f"| {name} | {adapters.get(name, 0):,} | {method['tokens_per_second']:.2f} | {_ratio(method['speed_ratio'])} "
            f"| {method['token_p50_ms']:.1f} | {method['token_p95_ms']:.1f} | {method['first_token_ms']:.0f} "
            f"| {_ratio(method['first_token_ratio'])} |"
        )
    return "\n".join(lines) + "\n"


def _ratio(value: dict[str, float]) -> str:
    return f"{value['median']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _read(batch: str, methods: dict[str, Any]) -> str:
    verdict = "within" if meets_target(methods) else "**beyond**"
    ratio, rounds = methods["R"]["speed_ratio"]["median"], methods["R"]["rounds"]
    return (
        f"- Batch {batch}: decoding with R costs {1 - ratio:.1%} of the base's tokens per second ({rounds} rounds), "
        f"{verdict} the {1 - TARGET:.0%} we allow.\n"
    )
