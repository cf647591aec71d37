"""What lies in an adapter's folder beside its weights, and what may not."""

import logging
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, file_exists, try_to_load_from_cache
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

logger = logging.getLogger(__name__)

KEY_PREFIX = "base_model.model."  # PeftModel and its tuner, in front of every name on disk
SNIPPET_START, SNIPPET_END = "<!-- hf_moe_ext: how to load -->", "<!-- hf_moe_ext: end -->"

_LOADERS = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
_PICKLE = (
    "{} is a pickle, which can run code when it is read; PERFT adapters are "
    f"{SAFETENSORS_WEIGHTS_NAME} only. Save with safe_serialization=True (the default)"
)
_UNTOUCHED_TEMPLATE = {"# Model Card for Model ID", "- **Developed by:** [More Information Needed]"}
_VERSIONS = "### Framework versions"

_SNIPPET = """{start}
## How to load

```python
import hf_moe_ext  # makes PEFT and Transformers know PERFT; pip install hf_moe_ext
from peft import {loader}

model = {loader}.from_pretrained("{adapter}")
```

A PERFT adapter for `{base}`: routed adapters beside the experts of a Mixture-of-Experts model
([arXiv 2411.08212](https://arxiv.org/abs/2411.08212)). It is not mergeable; it runs beside the base model.
{end}
"""


def refuse_pickle(folder: Path) -> None:
    """Raise if the folder's only weights are a pickle."""
    if (folder / WEIGHTS_NAME).is_file() and not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ValueError(_PICKLE.format(folder / WEIGHTS_NAME))


def refuse_pickle_on_hub(repo_id: str, subfolder: str | None = None, **hub: Any) -> None:
    """Raise if a Hub repository has no safetensors weights: PEFT would then read its pickle.

    Args:
        repo_id: the repository; one that cannot be reached is left to the loader.
        subfolder: folder of the adapter in it.
        hub: ``revision``, ``cache_dir`` and ``token``, as for a download.
    """
    prefix = f"{subfolder}/" if subfolder else ""
    cache = {key: value for key, value in hub.items() if key != "token"}
    if isinstance(try_to_load_from_cache(repo_id, prefix + SAFETENSORS_WEIGHTS_NAME, **cache), str):
        return
    pickled = isinstance(try_to_load_from_cache(repo_id, prefix + WEIGHTS_NAME, **cache), str)
    try:
        online = {key: value for key, value in hub.items() if key != "cache_dir"}
        pickled = not file_exists(repo_id, prefix + SAFETENSORS_WEIGHTS_NAME, **online)
    except Exception:  # offline, or no such repository: only the cache can be read then
        logger.debug("%s cannot be asked for its files", repo_id, exc_info=True)
    if pickled:
        raise ValueError(_PICKLE.format(f"{repo_id}/{prefix}{WEIGHTS_NAME}"))


def write_loading_snippet(folder: Path, base_model: str | None, task_type: str | None) -> None:
    """Put the loading snippet at the top of the folder's card, below its metadata; an older snippet is replaced.

    Of PEFT's card template, while nobody has filled it in, only the versions at its end are kept.
    """
    path = folder / "README.md"
    card = ModelCard.load(path) if path.is_file() else ModelCard.from_template(ModelCardData(library_name="peft"))
    text = card.text if path.is_file() else ""
    before, _, rest = text.partition(SNIPPET_START)
    body = before + rest.partition(SNIPPET_END)[2] if rest else before
    if set(body.splitlines()) >= _UNTOUCHED_TEMPLATE:
        body = _VERSIONS + body.partition(_VERSIONS)[2]
    snippet = _SNIPPET.format(
        start=SNIPPET_START,
        end=SNIPPET_END,
        loader=_LOADERS.get(task_type or "", "AutoPeftModel"),
        adapter=_own_name(folder),
        base=base_model or "the base model",
    )
    card.text = snippet + "\n" + body.lstrip("\n")
    card.data.tags = sorted({*(card.data.tags or []), "hf_moe_ext", "perft"})
    card.save(path)


def _own_name(folder: Path) -> str:
    """What to write in ``from_pretrained``: the folder as the user named it, but no path of one machine."""
    if not folder.is_absolute():
        return folder.as_posix()
    # A push to the Hub goes through a temporary folder.
    return "path/or/hub-id" if folder.is_relative_to(tempfile.gettempdir()) else folder.name
