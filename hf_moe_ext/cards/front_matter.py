"""The front matter of a card: what the Hub files a model under."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_moe_ext.cards.facts import CardError, Metrics, Result, without_machine_paths

CARD = "README.md"
NOT_ON_THE_HUB = ("docstrings", "arithmetic", "reasoning")  # data that recipes make themselves
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def is_hub_id(name: str | None) -> bool:
    """Whether a base model's name can be an id of the Hub: the Hub refuses a card whose base model is anything else."""
    return bool(name) and _HUB_ID.fullmatch(str(name)) is not None and not Path(str(name)).exists()


def load_card(path: Path) -> ModelCard:
    """A folder's card; an empty one where there is none.

    Raises:
        CardError: Its metadata cannot be read.
    """
    if not path.is_file():
        return ModelCard("---\n{}\n---\n")
    try:
        return ModelCard.load(path, ignore_metadata_errors=True)
    except Exception as error:  # YAML's own kinds, and ValueError
        raise CardError(f"The metadata of {path} cannot be read: {error}. Mend or delete the file.") from error


def check_front_matter(folder: str | Path) -> None:
    """Refuse a card that the Hub would refuse after everything was uploaded.

    Raises:
        CardError: Its metadata cannot be read, or names a base model that is no id of the Hub.
    """
    path = Path(folder) / CARD
    base = load_card(path).data.to_dict().get("base_model")
    for name in [base] if isinstance(base, str) else base or []:
        if not is_hub_id(name) and "/" in str(name):
            raise CardError(
                f"{path} names the base model {name!r}, which is no id of the Hub, and the Hub refuses such a card. "
                "Render it with `hf-moe card`, or mend base_model."
            )


def build_front_matter(
    config_file: str,
    config: Mapping[str, Any],
    facts: Metrics,
    results: list[Result],
    old: Any,
    license: str | None,
    name: str,
) -> ModelCardData:
    adapter = config_file == "adapter_config.json"
    settings = facts.values.get("settings") or {}
    base = config.get("base_model_name_or_path") or settings.get("model_name_or_path") or settings.get("parent")
    dataset = settings.get("dataset_name")
    datasets = [str(dataset)] if _is_hub_dataset(dataset) else None
    kind = str(config.get("peft_type") or config.get("model_type")).lower()
    tags = [tag for tag in old.tags or [] if not tag.startswith("base_model:")]
    kept = {key: value for key, value in old.to_dict().items() if key not in (*_OURS, "model-index")}
    measured = [result for result in results if result.metric and result.after]
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
        base_model=base if is_hub_id(base) else None,
        base_model_relation=("adapter" if adapter else "finetune") if is_hub_id(base) else None,
        tags=sorted({*tags, "hf_moe_ext", "mixture-of-experts", kind}),
        datasets=datasets or old.datasets,
        metrics=sorted({str(result.metric) for result in measured}) or None,
        license=license or facts.values.get("license") or old.license,
        pipeline_tag=old.pipeline_tag or ("text-generation" if _writes_text(config) else None),
        model_name=name if measured else None,
        eval_results=[_as_eval_result(result, dataset) for result in measured] or None,
        **kept,
    )


_OURS = (
    "library_name", "base_model", "base_model_relation", "tags", "datasets", "metrics", "license", "pipeline_tag",
    "model_name", "eval_results",
)  # fmt: skip


def _is_hub_dataset(name: Any) -> bool:
    if not isinstance(name, str) or name in NOT_ON_THE_HUB:
        return False
    return _HUB_DATASET.fullmatch(name) is not None and not Path(name).suffix and not Path(name).exists()


def _as_eval_result(result: Result, dataset: Any) -> EvalResult:
    assert result.after is not None
    data = str(without_machine_paths(str(dataset))) if dataset else "unknown"
    return EvalResult(
        task_type="text-generation",
        dataset_type=data,
        dataset_name=data,
        dataset_split="held-out",
        metric_type=str(result.metric),
        metric_name=result.name,
        metric_value=result.after.value,
    )


def _writes_text(config: Mapping[str, Any]) -> bool:
    architectures = config.get("architectures") or []
    return config.get("task_type") == "CAUSAL_LM" or any(str(name).endswith("ForCausalLM") for name in architectures)
