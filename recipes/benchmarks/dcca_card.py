"""The cards and figures of `dcca.py`, from its JSON alone: `dcca-pretrain` (loss, probe) and `dcca-speed` (the rest)."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file
from matplotlib import pyplot as plt  # after the backend is set

LOSS_LIMIT = 0.02  # upper end of the interval of the relative difference, for the default block at r = 1/4
EXCHANGE_LIMIT = 2.7  # times shorter all-to-all at r = 1/4, four ranks
LINK_LIMIT, AMDAHL_TOLERANCE = 2.0, 0.15
LINK_SHARES = (0.8, 0.9)
_HEADLINE = "dcca r=1/4"

_PRETRAIN_HEAD = """# DCCA: what it costs in loss

The DCCA block (BigMac, arXiv 2502.16927: descend, communicate, communicate, ascend) against the stock block of
OLMoE-style models, at equal expert parameters, from scratch on the source text of Python's standard library. Every
number is in [dcca-pretrain.json](dcca-pretrain.json), with the command that made it.

![held-out loss](dcca-pretrain.png)
"""

_SPEED_HEAD = """# DCCA: what it gains in time and bytes

The DCCA block (BigMac, arXiv 2502.16927) against the stock block, experts spread over ranks by Transformers' expert
parallelism, one thread per rank, gloo. Both models hold the same embeddings, attention and router, so the same tokens go
to the same experts. The arms take turns in one process group; a ratio is taken within each round; given are the median
and [quartiles] over rounds. All-to-all is timed in steps of its own, each exchange from a barrier to the received rows:
what a rank waits for slower ones is computing and not counted. Attention and vocabulary are small, the same in both arms:
a full-size model adds equal time to both and so moves every ratio of whole steps towards 1. Every number is in
[dcca-speed.json](dcca-speed.json), with the command that made it.

![step times](dcca-speed.png)
"""

_PROBE = """
### What a linear probe reads from the latent

A latent is not encryption. A softmax-linear probe on the latent that travels names the token at that position, among
{vocab_size:,}; fitted on {train_tokens:,} held-out tokens, judged on {test_tokens:,} of other rows (run `{model}`, latent
{latent_size} of {hidden_size}). Always naming the most frequent token is right {most:.1%} of the time, a uniform guess
{uniform:.2%}. Command: `{command}`

| layer | from the latent | from the full-width input |
|---|---:|---:|
"""


def render_pretrain(results: dict[str, Any]) -> str:
    """The card of loss, equal time and probe.

    Args:
        results: `dcca-pretrain.json`.
    """
    parts = [_PRETRAIN_HEAD]
    for preset, run in results["runs"].items():
        parts.append(f"\n## {preset}\n")
        for name, render in (("loss", _loss), ("time", _time), ("probe", _probe)):
            if name in run:
                parts.append(render(run[name]))
    return "".join(parts)


def render_speed(results: dict[str, Any]) -> str:
    """The card of step, link, decoding and bytes.

    Args:
        results: `dcca-speed.json`.
    """
    parts = [_SPEED_HEAD]
    for preset, run in results["runs"].items():
        parts.append(f"\n## {preset}\n")
        for name, render in (("step", _step), ("link", _link), ("decode", _decode), ("bytes", _bytes)):
            if name in run:
                parts.append(render(run[name]))
    return "".join(parts)


def meets_loss_limit(loss: dict[str, Any]) -> bool:
    """Whether the default block at r = 1/4 stays within the limit, interval and all."""
    return bool(loss["arms"][_HEADLINE]["difference"].get("high", 1.0) < LOSS_LIMIT)


def judge_step(ranks: dict[str, Any]) -> dict[str, bool]:
    """What is wanted of the `step` part -> whether it holds."""
    verdicts = {}
    for number, run in ranks.items():
        ratios = run["ratios"]
        for key, value in ratios.items():
            what, pair = key.split(": ")
            mine, theirs = pair.split(" / ")
            if what == "exchange" and number == "4" and mine.startswith("dcca") and theirs.startswith("standard"):
                if mine.endswith(", all_to_all"):
                    limit = 1 / EXCHANGE_LIMIT
                    name = f"{number} ranks: all-to-all at least {EXCHANGE_LIMIT} times shorter than full width"
                    verdicts[name] = value["median"] <= limit
            elif what == "exchange" and ", latent" in mine:
                verdicts[f"{number} ranks: {mine} exchanges faster than {theirs}"] = value["median"] < 1
            elif what == "step" and _same_exchange(mine, theirs):
                verdicts[f"{number} rank(s): a step of DCCA no slower than the stock block's"] = value["median"] <= 1
    return verdicts


def judge_link(link: dict[str, Any]) -> dict[str, bool]:
    """What is wanted of the `link` part -> whether it holds."""
    speed_up = _speed_up(link)
    low, high = LINK_SHARES
    return {
        f"all-to-all takes {low:.0%} to {high:.0%} of the full-width step": low <= link["full_width_share"] <= high,
        f"the whole step at least {LINK_LIMIT:g} times faster": speed_up >= LINK_LIMIT,
        f"within {AMDAHL_TOLERANCE:.0%} of Amdahl's law": abs(speed_up / link["amdahl"] - 1) <= AMDAHL_TOLERANCE,
    }


def draw_curves(results: dict[str, Any], path: Path) -> None:
    """Held-out loss by step, mean over seeds, and the relative difference of each arm."""
    runs = {name: run["loss"] for name, run in results["runs"].items() if "loss" in run}
    figure, axes = plt.subplots(max(1, len(runs)), 2, figsize=(12, 4.2 * max(1, len(runs))), squeeze=False)
    for (name, loss), (left, right) in zip(runs.items(), axes, strict=True):
        for arm, found in loss["arms"].items():
            curves = list(found["curve"].values())
            steps = [step for step, _ in curves[0]]
            mean = [sum(curve[i][1] for curve in curves) / len(curves) for i in range(len(steps))]
            left.plot(steps, mean, label=arm, linewidth=1)
        left.set(xlabel="step", ylabel="held-out loss, nats per token", title=name)
        left.legend(fontsize=7)
        others = [arm for arm in loss["arms"] if arm != "standard"]
        for position, arm in enumerate(others):
            difference = loss["arms"][arm]["difference"]
            low, high = difference.get("low", difference["mean"]), difference.get("high", difference["mean"])
            right.plot([low * 100, high * 100], [position, position], color="C0")
            right.plot([difference["mean"] * 100], [position], "o", color="C0")
        right.axvline(0, color="grey", linewidth=0.8)
        right.axvline(LOSS_LIMIT * 100, color="C3", linewidth=0.8)
        right.set_yticks(range(len(others)), others)
        right.invert_yaxis()
        right.set(xlabel="loss relative to the stock block, % (95% interval; red: limit)")
        right.grid(axis="x", alpha=0.3)
    _save(figure, path)


def draw_speed(results: dict[str, Any], path: Path) -> None:
    """Bars of a step's time, all-to-all and the rest, by number of ranks and over the slow link."""
    panels = [
        (f"{name}, {number} rank(s), loopback", run)
        for name, parts in results["runs"].items()
        for number, run in parts.get("step", {}).get("ranks", {}).items()
    ]
    panels += [
        (
            f"{name}, {parts['link']['num_ranks']} ranks, {parts['link']['rate_bytes_per_s'] / 1e6:.1f} MB/s",
            parts["link"],
        )
        for name, parts in results["runs"].items()
        if "arms" in parts.get("link", {})
    ]
    figure, axes = plt.subplots(1, max(1, len(panels)), figsize=(4.2 * max(1, len(panels)), 3.6), squeeze=False)
    for axis, (title, run) in zip(axes[0], panels, strict=False):
        names = list(run["arms"])
        exchange = [run["arms"][name]["exchange_s"]["median"] for name in names]
        rest = [max(0.0, run["arms"][name]["step_s"]["median"] - e) for name, e in zip(names, exchange, strict=True)]
        axis.barh(names, rest, color="C0", label="the rest")
        axis.barh(names, exchange, left=rest, color="C1", label="all-to-all")
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=7)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("seconds per step")
    axes[0][0].legend(fontsize=7)
    _save(figure, path)


def _loss(part: dict[str, Any]) -> str:
    sizes, arms = part["sizes"], part["arms"]
    lines = [
        f"\n### Equal tokens\n\nCommand: `{part['command']}` ({_where(part)}). Hidden {sizes['hidden_size']}, "
        f"{sizes['num_hidden_layers']} layers, {sizes['num_experts']} experts of width {sizes['intermediate_size']}, top-"
        f"{sizes['top_k']}, vocabulary {sizes['vocab_size']:,}; {part['steps']} steps of {part['tokens_per_step']:,} tokens, "
        "AdamW, warm-up, constant rate, linear to zero at the end. Pairs share their seed: the same rows in the same order. "
        f"Held out: {part['held_out_rows']} rows of modules no run has seen. The learning rate was chosen per block on "
        f"modules of the train side with seed {part['search_seed']}; the variants take that of DCCA r=1/4. An interpolated "
        f"order-3 byte n-gram of the same text: {part['ngram_bits_per_byte']:.3f} bits per byte.\n\n",
        "| arm | parameters | in experts | in projections | seeds | loss, nats per token | bits per byte | against standard |\n",
        "|---|---:|---:|---:|---:|---:|---:|---:|\n",
    ]
    for name, arm in arms.items():
        losses, counts = arm["loss"].values(), arm["parameters_by_part"]
        versus = "" if name == "standard" else _difference(arm["difference"])
        lines.append(
            f"| {name} | {arm['parameters']:,} | {counts['experts']:,} | {counts['projections']:,} | {len(losses)} "
            f"| {sum(losses) / len(losses):.4f} | {arm['bits_per_byte']:.3f} | {versus} |\n"
        )
    rates = part["learning_rates"]
    for name, rate in rates.items():
        tried = ", ".join(f"{value}: {loss:.4f}" for value, loss in rate["tried"].items())
        edge = rate["chosen"] in (min(rate["tried"], key=float), max(rate["tried"], key=float))
        warning = "; the best one lies at the edge of the grid" if edge else ""
        lines.append(
            f"\nLearning rates of {name} (loss on the validation modules): {tried}; chosen {rate['chosen']}{warning}."
        )
    headline = arms[_HEADLINE]["difference"]
    verdict = "within" if meets_loss_limit(part) else "**beyond**"
    lines.append(
        f"\n\n- {_HEADLINE} against standard: {_difference(headline)}, {verdict} the {LOSS_LIMIT:.0%} we allow for the upper "
        "end of the interval. Total parameters differ: the projections come on top of equal experts.\n"
        "- One small model, one text, few steps: widths of 32 to 128 are far below those DCCA was made for.\n"
    )
    return "".join(lines)


def _time(part: dict[str, Any]) -> str:
    lines = [
        f"\n### Equal time, one process\n\nCommand: `{part['command']}` ({_where(part)}). Step times measured in turns in "
        "one process, with no communication, so this is the least favourable case; losses read from the curves above where "
        "the learning rate is still constant for both.\n\n"
        "| arm | step, s | steps | loss | other | step, s | steps | loss | difference |\n|---|---:|---:|---:|---|---:|---:|---:|---:|\n"
    ]
    for found in part["comparisons"]:
        cells = []
        for arm in found["arms"]:
            cells.append(
                f"{arm} | {found['step_seconds'][arm]:.3f} | {found['steps'][arm]:.0f} | {found['loss'][arm]:.4f}"
            )
        lines.append(f"| {' | '.join(cells)} | {_difference(found['difference'])} |\n")
    lines += [f"\n- Step time {pair}: {_spread(value)}.\n" for pair, value in part["ratios"].items()]
    return "".join(lines)


def _probe(part: dict[str, Any]) -> str:
    head = _PROBE.format(**part, most=part["most_frequent_token"], uniform=part["uniform_chance"])
    return head + "".join(
        f"| {layer} | {found['latent']:.1%} | {found['full_width']:.1%} |\n" for layer, found in part["layers"].items()
    )


def _step(part: dict[str, Any]) -> str:
    sizes = part["sizes"]
    lines = [
        f"\n### Step and all-to-all, {'loopback' if sizes['device'] == 'cpu' else 'one device'}\n\n"
        f"Command: `{part['command']}` ({_where(part)}). Hidden {sizes['hidden_size']}, latent {sizes['latent_size']}, "
        f"{sizes['num_hidden_layers']} layer(s) of {sizes['num_experts']} experts of width {sizes['intermediate_size']}, "
        f"top-{sizes['top_k']}; {sizes['batch_size']} x {sizes['length']} tokens per rank; forward, backward, AdamW; "
        f"{sizes['rounds']} rounds.\n"
    ]
    for number, run in part["ranks"].items():
        lines += [f"\n{number} rank(s):\n\n", _arms_table(run), "\n", _ratio_list(run["ratios"])]
        if len(run["profiles"]) > 1:
            lines.append(_profile_line(run["profiles"]))
    return "".join([*lines, _verdicts(judge_step(part["ranks"]))])


def _link(part: dict[str, Any]) -> str:
    if "skipped" in part:
        return f"\n### Rate-limited link\n\nNot measured: {part['skipped']}. Command: `{part['command']}`\n"
    return "".join(
        [
            f"\n### Rate-limited link\n\nCommand: `{part['command']}` ({_where(part)}). {part['num_ranks']} ranks in network "
            f"namespaces of their own, joined by a bridge; each sends at most {part['rate_bytes_per_s'] / 1e6:.2f} MB/s "
            f"(`tc ... tbf`), {part['tokens_per_rank']} tokens per rank. All-to-all takes {part['full_width_share']:.1%} of "
            f"the full-width step; with it cut to r, Amdahl's law gives {part['amdahl']:.2f} times; measured: "
            f"{_speed_up(part):.2f} times. Weights and gradients of what is not an expert go over the same link (FSDP).\n\n",
            _arms_table(part),
            "\n",
            _ratio_list(part["ratios"]),
            _verdicts(judge_link(part)),
        ]
    )


def _decode(part: dict[str, Any]) -> str:
    sizes = part["sizes"]
    lines = [
        f"\n### Prompt and token, loopback\n\nCommand: `{part['command']}` ({_where(part)}). {sizes['decode_batch_size']} rows "
        f"of {sizes['prompt_length']} tokens per rank, then {sizes['new_tokens'] - 1} tokens one by one, with cache; "
        "slowest rank.\n"
    ]
    for number, run in part["ranks"].items():
        lines.append(f"\n{number} ranks:\n\n| arm | prompt, ms | token, ms |\n|---|---:|---:|\n")
        for name, arm in run["arms"].items():
            lines.append(f"| {name} | {_milliseconds(arm['prefill_s'])} | {_milliseconds(arm['token_s'])} |\n")
        lines += ["\n", _ratio_list(run["ratios"])]
    return "".join(lines)


def _bytes(part: dict[str, Any]) -> str:
    lines = [
        f"\n### Bytes\n\nCommand: `{part['command']}`. Bytes that one rank sends to others in the all-to-alls of one step: "
        "by formula (uniform routing), and counted in a step of the first rank (its real routing). Payload is hidden states "
        "and their gradients; metadata is counts, ids and routing weights, which do not shrink with r.\n\n"
        "| ranks | arm | payload, formula | payload, counted | metadata, formula | metadata, counted |\n|---|---|---:|---:|---:|---:|\n"
    ]
    for number, arms in part["ranks"].items():
        for name, arm in arms.items():
            formula, measured = arm["formula"] or {}, arm["measured"]
            cells = [
                _count(side.get(key)) for key in ("payload_bytes", "metadata_bytes") for side in (formula, measured)
            ]
            lines.append(f"| {number} | {name} | {' | '.join(cells)} |\n")
    return "".join(lines)


def _arms_table(run: dict[str, Any]) -> str:
    lines = ["| arm | step, ms | all-to-all, ms | share |\n|---|---:|---:|---:|\n"]
    for name, arm in run["arms"].items():
        share = f"{arm['exchange_share']:.1%}"
        lines.append(f"| {name} | {_milliseconds(arm['step_s'])} | {_milliseconds(arm['exchange_s'])} | {share} |\n")
    return "".join(lines)


def _ratio_list(ratios: dict[str, Any]) -> str:
    return "".join(f"- {name}: {_spread(value)}.\n" for name, value in ratios.items())


def _profile_line(profiles: dict[str, dict[str, float]]) -> str:
    (first, theirs), (second, mine) = list(profiles.items())[:2]
    cells = ", ".join(f"`{key}` {theirs[key]:.1f} / {mine[key]:.1f}" for key in theirs)
    return f"- Where the time goes, milliseconds of one step, {first} / {second}: {cells}.\n"


def _verdicts(verdicts: dict[str, bool]) -> str:
    return "".join(f"- {'Met' if met else '**Not met**'}: {name}.\n" for name, met in verdicts.items())


def _speed_up(link: dict[str, Any]) -> float:
    """Full-width step over DCCA's, both by the stock exchange: median of the rounds."""
    return 1 / float(link["ratios"]["step: dcca, all_to_all / standard, all_to_all"]["median"])


def _same_exchange(mine: str, theirs: str) -> bool:
    return mine.replace("dcca", "standard") == theirs


def _where(part: dict[str, Any]) -> str:
    before, after = part["load_average"]
    versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
    return f"{part['device']}; {versions}; load average {before} before, {after} after"


def _difference(difference: dict[str, float]) -> str:
    if "low" not in difference:
        return f"{difference['mean']:+.2%} (one pair)"
    return f"{difference['mean']:+.2%} [{difference['low']:+.2%}, {difference['high']:+.2%}]"


def _spread(value: dict[str, float]) -> str:
    return f"{value['median']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _milliseconds(value: dict[str, float]) -> str:
    return f"{value['median'] * 1e3:.1f} [{value['low'] * 1e3:.1f}, {value['high'] * 1e3:.1f}]"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
