"""What folding a model will do, and everything that can be refused before a weight is read.

| multiplier of the source | goes into | as |
|---|---|---|
| ``embedding_multiplier`` | ``embed_tokens`` | times it; the residual stream is all that reads the embedding |
| ``attention_multiplier`` | ``q_proj`` (Mixtral), ``q_norm`` (OLMoE, whose norm would undo it in ``q_proj``) | over head_dim^-0.5 |
| ``residual_multiplier`` | ``o_proj`` and the experts' ``down_proj`` | times it |
| ``router_logits_scaling`` | router | divided by it |
| ``logits_scaling`` | ``lm_head`` | divided by it |
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hf_moe_ext.convert.checkpoint import CheckpointReader
from hf_moe_ext.convert.conversion_plan import locate_checkpoint, read_config, refuse_other_tensors, refuse_quantised
from hf_moe_ext.convert.expert_layout import stock_tensors
from hf_moe_ext.convert.stock_form import make_stock_config, read_attention_factor
from hf_moe_ext.models.configuration import DERS, STANDARD
from hf_moe_ext.mup.settings import read_head_dim

logger = logging.get_logger(__name__)

EMBEDDING, HEAD, ROUTER, ATTENTION_OUTPUT, EXPERTS_OUTPUT = "embed_tokens", "lm_head", "router", "o_proj", "down_proj"
QUERIES = {"mixtral": "q_proj", "olmoe": "q_norm"}
_SOURCES = ("mixtral_ext", "olmoe_ext")
# Both ways of storing experts.
_TENSORS = {
    EMBEDDING: r"model\.embed_tokens\.weight",
    HEAD: r"lm_head\.weight",
    ROUTER: r"model\.layers\.\d+\.(?:mlp|block_sparse_moe)\.gate\.weight",
    "q_proj": r"model\.layers\.\d+\.self_attn\.q_proj\.(?:weight|bias)",
    "q_norm": r"model\.layers\.\d+\.self_attn\.q_norm\.weight",
    ATTENTION_OUTPUT: r"model\.layers\.\d+\.self_attn\.o_proj\.(?:weight|bias)",
    EXPERTS_OUTPUT: r"model\.layers\.\d+\.(?:mlp|block_sparse_moe)\.experts\.(?:down_proj|\d+\.(?:down_proj|w2)\.weight)",
}


@dataclass(frozen=True)
class FoldPlan:
    """A fold that can be carried out.

    Attributes:
        source: folder of the source checkpoint.
        config: of the result, a stock configuration.
        factors: kind of tensor -> what its values are multiplied by.
        untie: write the head as a tensor of its own, made from the embedding that it shares in the source.
    """

    source: Path
    config: Any
    factors: dict[str, float]
    untie: bool

    def list_rounded(self, dtype: torch.dtype) -> list[str]:
        """Kinds whose factor changes digits: no power of two, or in float16, whose small numbers have fewer, none but 1."""
        exact = (lambda factor: factor == 1) if dtype == torch.float16 else is_power_of_two
        return [kind for kind, factor in self.factors.items() if not exact(factor)]

    def read_kind(self, name: str) -> str | None:
        """Kind of a tensor of the source, None for those that stay as they are."""
        return next((kind for kind in self.factors if re.fullmatch(_TENSORS[kind], name)), None)

    def check_names(self, reader: CheckpointReader) -> None:
        """Refuse a checkpoint that does not hold the tensors of the stock model, and no others.

        Raises:
            ValueError: a missing, additional or mis-shaped tensor, by name.
        """
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
            expected = self._shapes({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
            found = self._shapes({name: reader.shape(name) for name in reader.names})
        is_tied = self.config.tie_word_embeddings or self.untie
        refuse_other_tensors(reader.folder, found, expected, is_tied, f"a stock {self.config.model_type} model")

    def _shapes(self, tensors: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The same under the stock names; on the meta device."""
        pairs = (stock_tensors(name, torch.empty(shape), self.config.model_type) for name, shape in tensors.items())
        return {name: tuple(tensor.shape) for each in pairs for name, tensor in each}


def plan_fold(model: str | os.PathLike[str], untie: bool = False) -> FoldPlan:
    """Check a request against the source's configuration.

    Raises:
        ValueError: naming the rule, the value and the next step.
    """
    refuse_adapter(Path(model), "fold")
    source = locate_checkpoint(model)
    config = read_config(model, source)
    if config.model_type not in _SOURCES:
        stock = " It is a stock checkpoint already." if config.model_type in QUERIES else ""
        raise ValueError(f"fold takes {', '.join(_SOURCES)}; {model} has model_type {config.model_type!r}.{stock}")
    refuse_quantised(model, config, "fold")
    target = make_stock_config(config, config.model_type.removesuffix("_ext"))
    if untie:
        target.tie_word_embeddings = False
    _refuse_other_blocks(config, target.model_type)
    _refuse_raw_gates(config, target.model_type)
    factors = read_factors(config)
    _refuse_shared(config, factors, untie)
    if config.model_type == "olmoe_ext" and config.clip_qkv is not None and factors["q_norm"] != 1:
        raise ValueError(
            f"clip_qkv={config.clip_qkv} cuts queries and keys at one number, so no weight of a stock OLMoE can hold "
            f"attention_multiplier={config.attention_multiplier} instead of head_dim^-0.5={read_head_dim(config) ** -0.5}; "
            "such a model stays as it is (train it with clip_qkv=None, or with the base model's head dimension)"
        )
    if untie and not config.tie_word_embeddings:
        logger.warning("untie: no effect, because the model's head and embedding are two tensors already")
    return FoldPlan(source, target, factors, untie and config.tie_word_embeddings)


def read_factors(config: Any) -> dict[str, float]:
    """Kind of tensor -> what a fold multiplies its values by."""
    return {
        EMBEDDING: float(config.embedding_multiplier),
        QUERIES[config.model_type.removesuffix("_ext")]: read_attention_factor(config),
        ATTENTION_OUTPUT: float(config.residual_multiplier),
        ROUTER: 1.0 / (config.router_logits_scaling or 1.0),
        EXPERTS_OUTPUT: float(config.residual_multiplier),
        HEAD: 1.0 / (config.logits_scaling or 1.0),
    }


def can_fold(family: str) -> bool:
    """Whether ``fold`` knows a family: "mixtral", "olmoe" ..."""
    return f"{family}_ext" in _SOURCES


def is_power_of_two(factor: float) -> bool:
    """Whether a product with it is exact."""
    return math.frexp(factor)[0] == 0.5


def refuse_adapter(folder: Path, conversion: str) -> None:
    """Refuse the folder of an adapter.

    Raises:
        ValueError: saying what can be done with it.
    """
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter, not a model. A LoRA can be merged: PeftModel.from_pretrained(base, "
            f"{str(folder)!r}).merge_and_unload().save_pretrained(...), then {conversion} that. PERFT's adapters cannot be merged; "
            "serve them on the model they were trained on"
        )


def _refuse_other_blocks(config: Any, model_type: str) -> None:
    layers = [i for i, block in enumerate(config.moe_blocks) if block != STANDARD]
    if layers:
        kinds = " and ".join(sorted({config.moe_blocks[i].upper() for i in layers}))
        hint = "; hf-moe export writes experts with a shared base as ordinary ones" if DERS in config.moe_blocks else ""
        raise ValueError(
            f"layers {', '.join(map(str, layers))} are {kinds} blocks (moe_block), which a stock {model_type} model does not "
            f"have: only models whose every layer has moe_block='standard' can be folded{hint}"
        )


def _refuse_raw_gates(config: Any, model_type: str) -> None:
    if model_type == "mixtral" and not config.norm_topk_prob:
        raise ValueError(
            "norm_topk_prob=False: a stock Mixtral divides the chosen experts' gates by their sum, so no weights of it give "
            "this model's outputs; it stays as it is"
        )


def _refuse_shared(config: Any, factors: dict[str, float], untie: bool) -> None:
    if config.tie_word_embeddings and not untie and factors[EMBEDDING] != factors[HEAD]:
        raise ValueError(
            f"tie_word_embeddings=True: one tensor is embedding and head, and cannot take both embedding_multiplier="
            f"{config.embedding_multiplier} and 1 / logits_scaling={factors[HEAD]:.6g}; write untie=True (--untie) for a "
            "stock model with a head of its own"
        )
