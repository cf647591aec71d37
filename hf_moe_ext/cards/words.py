"""What a card says of each kind of model in words: how to load it, its method, its limits, whom to cite."""

from collections.abc import Mapping
from typing import Any

_LOADERS = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
_IMPORT = "import hf_moe_ext  # makes PEFT and Transformers know our types; pip install hf_moe_ext"
_VARIANTS = {
    "S": "one shared adapter per MoE block, with weight one for every token",
    "D": "several adapters per MoE block, all of them used by every token",
    "E": "an adapter at each chosen expert, weighted as the base's own router weighs that expert",
    "R": "routed adapters with a router of their own beside the base's",
}
_PAPERS = {
    "perft": "PERFT: Parameter-Efficient Routed Fine-Tuning for Mixture-of-Expert Model, [arXiv 2411.08212]"
    "(https://arxiv.org/abs/2411.08212).",
    "hf_moe_ext": "Software: hf_moe_ext, Mixture-of-Experts fine-tuning for the Hugging Face stack.",
}


def describe_adapter(config: Mapping[str, Any], name: str, base: str) -> dict[str, Any]:
    """Texts of a PEFT adapter's card.

    Args:
        config: Its `adapter_config.json`.
        name: What to write in `from_pretrained`.
        base: The base model, as a reader may know it.
    """
    kind = config.get("peft_type")
    loader = _LOADERS.get(config.get("task_type") or "", "AutoPeftModel")
    loading = f'{_IMPORT}\nfrom peft import {loader}\n\nmodel = {loader}.from_pretrained("{name}")'
    if kind != "PERFT":
        return {
            "what": f"A {kind} adapter for {base}, trained with PEFT.",
            "loading": loading.removeprefix(f"{_IMPORT}\n"),
            "mergeable": "",
            "method": f"{kind}, as PEFT implements it.",
            "citation": _PAPERS["hf_moe_ext"],
            "limits": [],
        }
    variant = config.get("variant", "R")
    return {
        "what": f"A PERFT adapter for {base}: routed adapters beside the experts of a Mixture-of-Experts model "
        "([arXiv 2411.08212](https://arxiv.org/abs/2411.08212)).",
        "loading": loading,
        "mergeable": "It is not mergeable; it runs beside the base model.",
        "method": f"PERFT-{variant}: {_VARIANTS.get(variant, 'see the configuration')}.",
        "citation": f"{_PAPERS['perft']}\n\n{_PAPERS['hf_moe_ext']}",
        "limits": [
            "It cannot be merged into the base's weights, so every step pays for it and a server must know PERFT.",
            "Without this package PEFT does not know the type and refuses it.",
        ],
    }


def describe_model(config: Mapping[str, Any], name: str, base: str | None) -> dict[str, Any]:
    """Texts of a whole model's card.

    Args:
        config: Its `config.json`.
        name: What to write in `from_pretrained`.
        base: What it was made from, where that is known.
    """
    model_type = str(config.get("model_type"))
    ours = model_type.endswith("_ext")
    block = config.get("moe_block")
    loading = 'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("{}")'
    loading = f"{_IMPORT}\n{loading}" if ours else loading
    blocks = f", with the MoE block `{block}`" if block else ""
    limits = ["Without this package Transformers does not know the type and refuses it."] if ours else []
    return {
        "what": f"A `{model_type}` language model{blocks}" + (f", made from {base}." if base else "."),
        "loading": loading.format(name),
        "mergeable": "",
        "method": f"Model type `{model_type}`{blocks}.",
        "citation": _PAPERS["hf_moe_ext"],
        "limits": limits,
    }


def describe_measurement(base: str | None) -> dict[str, Any]:
    """Texts of the card of a folder that holds measurements and no model of its own.

    Args:
        base: What was measured, where that is known.
    """
    return {
        "what": f"Measurements of {base or 'models'}; this folder itself holds no model.",
        "loading": "",
        "mergeable": "",
        "method": "See the settings of the run.",
        "citation": _PAPERS["hf_moe_ext"],
        "limits": [],
    }
