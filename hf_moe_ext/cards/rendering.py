"""A card from a folder: its files read, its parts put together, its own words kept."""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_moe_ext.cards.facts import (
    CardError,
    Metrics,
    read_costs,
    read_results,
    refuse_bare_number,
    without_machine_paths,
)
from hf_moe_ext.cards.front_matter import CARD, NOT_ON_THE_HUB, build_front_matter, is_hub_id, load_card
from hf_moe_ext.cards.routing import read_routing
from hf_moe_ext.cards.words import describe_adapter, describe_measurement, describe_model

METRICS = "metrics.json"
START, END = "<!-- hf_moe_ext: card -->", "<!-- hf_moe_ext: end -->"
_OLD_START = "<!-- hf_moe_ext: how to load -->"
# Templates that libraries write and nobody has filled in.
_UNTOUCHED = (
    "- **Developed by:** [More Information Needed]",
    "<!-- This model card has been generated automatically according to the information the Trainer had access to. You",
)
_VERSIONS = "### Framework versions"
_SHOWN_SAMPLES = 8


def render_card(
    folder: str | Path,
    metrics: Mapping[str, Any] | str | Path | None = None,
    *,
    source: str = "",
    license: str | None = None,
    name: str | None = None,
) -> str:
    """The card of a saved adapter or model, front matter and text.

    Args:
        folder: Holds `adapter_config.json` or `config.json`; its README.md's own words and metadata are kept.
        metrics: A recipe's `metrics.json`, or what it holds; None for a card without results.
        source: Name of the file that `metrics` given as a mapping is from.
        license: Id of a license, as the Hub knows it.
        name: What to write in `from_pretrained`; the folder as it is given, where None.

    Raises:
        CardError: No model is in the folder, a file cannot be read, or a number has no source or is not finite.
    """
    folder = Path(folder)
    facts = _read_metrics(metrics, source)
    config_file, config = _read_config(folder, bool(facts.values))
    old = load_card(folder / CARD)
    words = _describe(config_file, config, name or _own_name(folder), facts)
    results = read_results(facts)
    body = _render(
        "model_card.md.j2",
        name=_title(folder, name),
        config_file=config_file,
        config=_as_json(config),
        settings=_as_json(facts.values["settings"]) if facts.values.get("settings") else "",
        source=facts.source,
        data=_read_data(facts),
        results=results,
        pictures=facts.values.get("pictures") or [],
        samples=(facts.values.get("samples") or [])[:_SHOWN_SAMPLES],
        routing=read_routing(facts),
        no_routing="Not measured.",
        costs=read_costs(facts),
        has_memory=facts.fact("peak_memory_bytes") is not None,
        command=without_machine_paths(facts.values.get("command", "")),
        versions=_list_versions(config, facts),
        **words,
    )
    data = build_front_matter(config_file, config, facts, results, old.data, license, _title(folder, name))
    before, after = _own_words(old.text)
    ours = f"{START}\n{body.strip()}\n{END}"
    text = "\n\n".join(part for part in (before, ours, after) if part)
    return f"---\n{data.to_yaml()}\n---\n{text}\n"


def write_card(folder: str | Path, metrics: Mapping[str, Any] | str | Path | None = None, **options: Any) -> Path:
    """Render the card into the folder's README.md, whole or not at all.

    Args:
        folder: See `render_card`.
        metrics: See `render_card`.
        options: The rest of `render_card`.

    Returns:
        The file written.

    Raises:
        CardError: See `render_card`.
    """
    path = Path(folder) / CARD
    text = render_card(folder, metrics, **options)
    partial = path.with_suffix(".md.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path


def check_card(folder: str | Path, metrics: Mapping[str, Any] | str | Path | None = None, **options: Any) -> bool:
    """Whether the folder's card is the one that its configuration and metrics make.

    Raises:
        CardError: See `render_card`.
    """
    path = Path(folder) / CARD
    return path.is_file() and path.read_text(encoding="utf-8") == render_card(folder, metrics, **options)


def format_results(metrics: Mapping[str, Any], source: str) -> str:
    """The card's results alone, as Markdown; for a terminal.

    Args:
        metrics: What a recipe's `metrics.json` holds.
        source: That file's name.

    Raises:
        CardError: A number has no source or is not finite.
    """
    facts = Metrics(metrics, source)
    return _render("results.md.j2", results=read_results(facts), costs=read_costs(facts), source=source).strip()


def find_metrics(folder: str | Path) -> Path | None:
    """The metrics that lie in a folder."""
    path = Path(folder) / METRICS
    return path if path.is_file() else None


def name_repository(text: str, repo_id: str, revision: str | None = None) -> str:
    """A card with a repository's name as its title and where it says how to load; a person's own words stay."""
    before, found, rest = text.partition(START)
    ours, end, after = rest.partition(END)
    if not found or not end:
        return text
    at = f', revision="{revision}"' if revision else ""
    ours = re.sub(r"^# .*$", lambda _: f"# {repo_id.rpartition('/')[2]}", ours, count=1, flags=re.MULTILINE)
    ours = re.sub(r'from_pretrained\("[^"]*"\)', lambda _: f'from_pretrained("{repo_id}"{at})', ours)
    return before + found + ours + end + after


def _read_config(folder: Path, measured: bool) -> tuple[str, dict[str, Any]]:
    if not folder.is_dir():
        raise CardError(f"{folder} is no folder. Give the folder of a saved adapter or model.")
    for name in ("adapter_config.json", "config.json"):
        if (folder / name).is_file():
            return name, _read_json(folder / name)
    if measured:
        return "", {}
    raise CardError(
        f"{folder} holds neither adapter_config.json nor config.json, so there is no model to describe. Save one there "
        "with save_pretrained."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CardError(f"{path} cannot be read as JSON: {error}. Write it anew.") from error
    if not isinstance(values, dict):
        raise CardError(f"{path} must hold a JSON object; it holds a {type(values).__name__}.")
    return values


def _read_metrics(metrics: Mapping[str, Any] | str | Path | None, source: str) -> Metrics:
    if metrics is None:
        return Metrics({}, "")
    if isinstance(metrics, Mapping):
        return Metrics(metrics, source)
    path = Path(metrics)
    return Metrics(_read_json(path), source or path.name)


def _own_words(text: str) -> tuple[str, str]:
    """What a person has written before and after our part; of an untouched template only its versions stay."""
    for start in (START, _OLD_START):
        before, found, rest = text.partition(start)
        if found:
            return _without_template(before), _without_template(rest.partition(END)[2])
    return "", _without_template(text)


def _without_template(text: str) -> str:
    if set(text.splitlines()) & set(_UNTOUCHED):
        text = _VERSIONS + text.partition(_VERSIONS)[2] if _VERSIONS in text else ""
    return text.strip()


def _describe(config_file: str, config: Mapping[str, Any], name: str, facts: Metrics) -> dict[str, Any]:
    settings = facts.values.get("settings") or {}
    base = config.get("base_model_name_or_path") or settings.get("model_name_or_path") or settings.get("parent")
    shown = f"`{base if is_hub_id(base) else Path(str(base)).name}`" if base else None
    if not config_file:
        words = describe_measurement(shown)
    elif config_file == "adapter_config.json":
        words = describe_adapter(config, name, shown or "a base model that its configuration does not name")
    else:
        words = describe_model(config, name, shown)
    revision = config.get("revision") or settings.get("model_revision") or settings.get("revision")
    if shown is None:
        words["base"] = "None is recorded."
    else:
        where = "of the Hub" if is_hub_id(base) else "a local folder or a model that the recipe made"
        words["base"] = f"{shown} ({where}), revision {f'`{revision}`' if revision else 'not recorded'}."
    if not facts.values:
        words["limits"] = [*words["limits"], "Nothing about it was measured where this card was written."]
    elif "after" in (facts.values.get("loss") or {}) or "arms" in facts.values:
        words["limits"] = [
            *words["limits"],
            "The results are of the held-out rows of this run's own data; other data and other tasks were not measured.",
            "One seed says nothing about the spread over seeds.",
        ]
    return words


def _read_data(facts: Metrics) -> dict[str, Any]:
    settings = facts.values.get("settings") or {}
    name = settings.get("dataset_name") or settings.get("source_dir")
    said = f"`{without_machine_paths(str(name))}`." if name else "Not recorded."
    if name in NOT_ON_THE_HUB:
        said = f"`{name}`, which the recipe makes from the text of Python's standard library."
    run = facts.fact("data.verbatim_tokens", "{}")
    recited = f"that hold {f'{run} tokens in a row' if run else 'a run of tokens'} of the training text"
    lines = [
        {"said": "train rows", "fact": facts.fact("train_rows", "{:,}")},
        {"said": "held-out rows", "fact": facts.fact("loss.rows", "{:,}")},
        {
            "said": "held-out rows that are train rows too, letter case and spacing aside",
            "fact": facts.fact("data.duplicate_rate", "{:.2%}"),
        },
        {
            "said": f"greedy continuations of train prompts {recited}",
            "fact": facts.fact("data.verbatim_rate_train", "{:.1%}"),
        },
        {
            "said": f"greedy continuations of held-out prompts {recited}",
            "fact": facts.fact("data.verbatim_rate_held_out", "{:.1%}"),
        },
    ]
    return {"said": said, "lines": lines}


def _own_name(folder: Path) -> str:
    """What to write in `from_pretrained`: the folder as the user named it, but no path of one machine."""
    if not folder.is_absolute():
        return folder.as_posix()
    # A push to the Hub goes through a temporary folder.
    return "path/or/hub-id" if folder.is_relative_to(tempfile.gettempdir()) else folder.name


def _title(folder: Path, name: str | None) -> str:
    if name or folder.resolve().parent != Path(tempfile.gettempdir()).resolve():
        return (name or folder.resolve().name).rpartition("/")[2]
    return "Adapter or model"  # saved on its way to somewhere else


def _as_json(values: Mapping[str, Any]) -> str:
    return json.dumps(without_machine_paths(values), indent=1, ensure_ascii=False, sort_keys=True)


def _list_versions(config: Mapping[str, Any], facts: Metrics) -> str:
    """Versions that wrote the files, not those that render the card."""
    written = {"hf_moe_ext": config.get("hf_moe_ext_version"), "transformers": config.get("transformers_version")}
    versions = {**written, **(facts.values.get("versions") or {})}
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _render(template: str, **values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("hf_moe_ext", "card_templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=refuse_bare_number,
    )
    environment.filters["cell"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    environment.filters["tail"] = lambda text: (
        "-" if text is None else " ".join(text.split())[-120:].replace("|", "\\|")
    )
    return environment.get_template(template).render(**values)
