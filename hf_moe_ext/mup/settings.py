"""Checks the parametrisation keys of a configuration and fills in those left open, as numbers."""

from typing import Any

from hf_moe_ext.host.families import expert_width, router_normalizes
from hf_moe_ext.mup.roles import FOLDED, MULTIPLIER, MUP, NONE, SIMPLEP

PARAMETRISATIONS = (NONE, SIMPLEP, MUP)
FORMS = (MULTIPLIER, FOLDED)
BASE_SIZES = (
    "mup_base_hidden_size",
    "mup_base_intermediate_size",
    "mup_base_head_dim",
    "mup_base_latent_size",
)
MULTIPLIERS = (
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "router_logits_scaling",
)


def resolve_parametrisation(config: Any) -> None:
    """Refuse what cannot be, and fill in what was left open. Widths and blocks have to be resolved before.

    Raises:
        ValueError, TypeError: naming the key, the rule, the value and what to write.
    """
    _check_kinds(config)
    if config.mup == NONE:
        _warn_without_effect(config)
        return
    _check_relations(config)
    head_dim = read_head_dim(config)
    ratio = config.hidden_size / config.mup_base_hidden_size
    if config.mup_base_intermediate_size is None:
        config.mup_base_intermediate_size = _plain(expert_width(config) / ratio)
    if config.mup_base_head_dim is None:
        config.mup_base_head_dim = head_dim
    if config.mup_base_latent_size is None and config.moe_latent_size is not None:
        config.mup_base_latent_size = _plain(config.moe_latent_size / ratio)
    # sqrt(d_base) / d is d^-0.5 where the head dimension is the base's, to the last bit.
    same = config.mup_base_head_dim == head_dim
    by_rule = {
        "attention_multiplier": head_dim**-0.5 if same else config.mup_base_head_dim**0.5 / head_dim,
        "logits_scaling": ratio if config.mup_form == MULTIPLIER else 1.0,
        "router_logits_scaling": ratio if config.mup == MUP and config.mup_form == MULTIPLIER else 1.0,
    }
    for name, value in by_rule.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    _warn_of_other_numbers(config, by_rule)


def _warn_of_other_numbers(config: Any, by_rule: dict[str, float]) -> None:
    """A tuned factor is one's own; the number of another width, copied with its config.json, is a mistake. Both look alike."""
    from transformers.utils import logging

    other = [name for name, value in by_rule.items() if abs(getattr(config, name) / value - 1) > 1e-6]
    if other:
        written = ", ".join(f"{name}={getattr(config, name):.6g} (here {by_rule[name]:.6g})" for name in other)
        logging.get_logger(__name__).warning_once(
            f"{written}: taken as written, though hidden_size={config.hidden_size} and head_dim={read_head_dim(config)} ask for "
            "the numbers in brackets; leave them out if they were copied from a model of another width"
        )


def read_head_dim(config: Any) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _check_kinds(config: Any) -> None:
    for name, choices in (("mup", PARAMETRISATIONS), ("mup_form", FORMS)):
        value = getattr(config, name)
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    for name in (*BASE_SIZES, *MULTIPLIERS):
        value = getattr(config, name)
        if value is None and name not in ("embedding_multiplier", "residual_multiplier"):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a positive number, got {value!r}")


def _warn_without_effect(config: Any) -> None:
    # Here, not above: this module is loaded in the middle of Transformers' own import.
    from transformers.utils import logging

    given = [name for name in BASE_SIZES if getattr(config, name) is not None]
    given += ["mup_form"] if config.mup_form != MULTIPLIER else []
    if given:
        logging.get_logger(__name__).warning(f"{', '.join(given)}: no effect, because mup='none'; write mup='mup'")


def _check_relations(config: Any) -> None:
    if config.mup_base_hidden_size is None:
        raise ValueError(
            f"mup={config.mup!r} needs mup_base_hidden_size, the hidden_size of the model whose learning rate was tuned; "
            f"write mup_base_hidden_size={config.hidden_size} for that model itself"
        )
    if not config.num_attention_heads > 0:
        raise ValueError(f"num_attention_heads must be at least 1, got {config.num_attention_heads!r}")
    if not config.initializer_range > 0:
        raise ValueError(
            f"initializer_range must be above 0 under mup={config.mup!r}, got {config.initializer_range!r}: a router of "
            "zeros sends every token to the same experts"
        )
    if config.num_experts_per_tok == 1 and router_normalizes(config):
        raise ValueError(
            "num_experts_per_tok=1 with routing weights that are made to sum to 1: every weight is 1 whatever the router "
            "says, so it gets no gradient from the loss; write norm_topk_prob=False, or num_experts_per_tok=2"
        )
    if config.mup_form == FOLDED and config.tie_word_embeddings:
        raise ValueError(
            "mup_form='folded' puts the head's factor into its weights, which tie_word_embeddings=True shares with the "
            "embedding; write mup_form='multiplier' or tie_word_embeddings=False"
        )
    head_dim, base = read_head_dim(config), config.mup_base_head_dim
    if base is not None and base != head_dim and config.attention_multiplier == head_dim**-0.5:
        raise ValueError(
            f"attention_multiplier={config.attention_multiplier} is 1/sqrt(head_dim), but under mup={config.mup!r} attention "
            f"logits must shrink as 1/head_dim when it changes (here from {base} to {head_dim}); leave it out, or write "
            f"{base**0.5 / head_dim}"
        )


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else value
