"""What lies in an adapter's folder beside its weights, and what may not."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

SNIPPET_START, SNIPPET_END = "<!-- hf_moe_ext: how to load -->", "<!-- hf_moe_ext: end -->"

_SNIPPET = """{start}
## How to load

```python
import hf_moe_ext  # makes PEFT and Transformers know PERFT; pip install hf_moe_ext
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{adapter}")
```

A PERFT adapter for `{base}`: routed adapters beside the experts of a Mixture-of-Experts model
([arXiv 2411.08212](https://arxiv.org/abs/2411.08212)). It is not mergeable; it runs beside the base model.
{end}
"""


def refuse_pickle(folder: Path) -> None:
    """Raise if the folder's only weights are a pickle; a folder that does not exist (a Hub id) is left to the loader."""
    if (folder / WEIGHTS_NAME).is_file() and not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{folder / WEIGHTS_NAME} is a pickle, which can run code when it is read; PERFT adapters are "
            f"{SAFETENSORS_WEIGHTS_NAME} only. Save with safe_serialization=True (the default)"
        )


def write_loading_snippet(folder: Path, base_model: str | None) -> None:
    """Put the loading snippet at the top of the folder's card, below its metadata; an older snippet is replaced."""
    path = folder / "README.md"
    card = ModelCard.load(path) if path.is_file() else ModelCard.from_template(ModelCardData(library_name="peft"))
    text = card.text if path.is_file() else ""
    before, _, rest = text.partition(SNIPPET_START)
    after = rest.partition(SNIPPET_END)[2] if rest else ""
    snippet = _SNIPPET.format(
        start=SNIPPET_START,
        end=SNIPPET_END,
        adapter=folder.name or "path/or/hub-id",
        base=base_model or "the base model",
    )
    card.text = snippet + "\n" + (before + after).lstrip("\n")
    card.data.tags = sorted({*(card.data.tags or []), "hf_moe_ext", "perft"})
    card.save(path)
