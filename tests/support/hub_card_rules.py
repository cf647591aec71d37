"""The rules for a card's front matter that the Hub is known to hold."""

import re
from urllib.parse import quote

import yaml

_REPOSITORY_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FRONT_MATTER = re.compile(r"^\s*---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)


def check_front_matter(card: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of a card, for the rules the Hub is known to hold: YAML, kinds, and ids of base models."""
    found = _FRONT_MATTER.match(card)
    if not found:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"], []
    if not isinstance(data, dict):
        return ["metadata must be a mapping"], []
    errors = []
    for name in ("tags", "datasets", "metrics"):
        values = data.get(name, [])
        if not all(isinstance(value, str) for value in ([values] if isinstance(values, str) else values)):
            errors.append(f'"{name}" must be strings')
    bases = data.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        if not isinstance(base, str) or not _REPOSITORY_ID.fullmatch(base) or quote(base) != base:
            errors.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    for model in data.get("model-index", []):
        if not isinstance(model, dict) or not model.get("name") or not isinstance(model.get("results"), list):
            errors.append('"model-index" must name a model and list its results')
    return errors, []
