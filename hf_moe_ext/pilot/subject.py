"""The model a pilot is about, as far as its configuration and its tokenizer tell: nothing here loads a weight."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from hf_moe_ext.convert.dense_parents import refuse_homeless
from hf_moe_ext.host.blocks import explain_no_blocks, iterate_experts
from hf_moe_ext.pilot.attachment import expert_parameters

NUMBERS_PER_TRAINED_PARAMETER = 4  # weight, gradient and two states of AdamW, all of the weight's type


@dataclass(frozen=True)
class Subject:
    """What is known of the model.

    Attributes:
        name: Hub id or folder.
        is_moe: It has MoE blocks that can be served.
        why_not_moe: One sentence, where it has none.
        why_not_upcycled: The same for the home a dense model would be upcycled into; None where there is one.
        num_parameters: Stored.
        model_type: Of its configuration.
        expert_parameters: Names of the experts' fused weights; empty where there are none.
    """

    name: str
    is_moe: bool
    why_not_moe: str
    why_not_upcycled: str | None
    num_parameters: int
    model_type: str
    expert_parameters: tuple[str, ...]


def read_subject(model: str) -> Subject:
    """Look at a model on the meta device.

    Raises:
        ValueError: There is no such model, or it is no causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            outline = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, ImportError) as error:
        raise _cannot_load(model, "model", error) from error
    is_moe = bool(list(iterate_experts(outline)))
    return Subject(
        model,
        is_moe,
        "" if is_moe else explain_no_blocks(outline),
        None if is_moe else _why_homeless(model, config),
        sum(parameter.numel() for parameter in outline.parameters()),
        config.model_type,
        tuple(expert_parameters(outline)) if is_moe else (),
    )


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token.

    Raises:
        ValueError: There is none, or it cannot end a text.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise _cannot_load(model, "tokenizer", error) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"--model {model}: its tokenizer has no end-of-text token, so answers could not end. Set 'eos_token' in its "
            "tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # never attended to and never scored, so any token does
    tokenizer.padding_side = "right"
    return tokenizer


def _why_homeless(model: str, config: Any) -> str | None:
    try:
        refuse_homeless(model, config)
    except ValueError as error:
        return str(error)
    return None


def _cannot_load(model: str, what: str, error: Exception) -> ValueError:
    reason = inspect.cleandoc(str(error)).split("\n")[0][:300]
    return ValueError(
        f"--model {model}: its {what} cannot be loaded: {reason} Give a causal language model of the Hub (and be online), "
        "or a folder."
    )
