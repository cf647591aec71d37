"""``OlmoeExtConfig`` and ``MixtralExtConfig``: the stock configurations, plus what chooses the MoE block.

Open values (None) are filled in when the configuration is made and stored as numbers, so that ``config.json`` says what
the model is.
"""

import importlib
from dataclasses import dataclass, fields
from typing import Any

from transformers import AutoConfig, MixtralConfig, OlmoeConfig, PreTrainedConfig
from transformers.utils import logging

from hf_moe_ext.mup.settings import resolve_parametrisation

logger = logging.get_logger(__name__)

STANDARD, DCCA = "standard", "dcca"
BLOCKS = (STANDARD, DCCA)
# What `grouped_mm` aligns rows to, 16 bytes, in elements of the narrowest dtype we train in (bfloat16).
ALIGNMENT = 8


def nearest_aligned(width: float) -> int:
    """The nearest width that ``grouped_mm`` aligns."""
    return max(ALIGNMENT, round(width / ALIGNMENT) * ALIGNMENT)


def equal_expert_width(hidden_size: int, intermediate_size: int, latent_size: int, gated: bool) -> int:
    """Inner width of a latent expert with as many parameters as a stock one, 3HI = 2RF or 3RF, rounded to alignment."""
    return nearest_aligned(3 * hidden_size * intermediate_size / ((3 if gated else 2) * latent_size))


@dataclass(kw_only=True, repr=False)
class ExtKeys:
    """The keys that choose a model's MoE blocks and its parametrisation; see the package docstring for their meaning."""

    moe_block: str | list[str] = STANDARD
    moe_latent_size: int | None = None
    moe_expert_gated: bool = False
    moe_expert_intermediate_size: int | None = None
    moe_expert_act: str | None = None
    moe_latent_norm: bool = False
    moe_shared_expert_intermediate_size: int = 0
    mup: str = "none"
    mup_form: str = "multiplier"
    mup_base_hidden_size: int | None = None
    mup_base_intermediate_size: int | float | None = None
    mup_base_head_dim: int | None = None
    mup_base_latent_size: int | float | None = None
    embedding_multiplier: int | float = 1.0
    attention_multiplier: int | float | None = None
    residual_multiplier: int | float = 1.0
    logits_scaling: int | float | None = None
    router_logits_scaling: int | float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)  # of a stock config.json: this class has its own
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.resolve_keys()
        if DCCA not in self.moe_blocks:
            _warn_without_effect(self)
        # The classes cannot be registered while Transformers is being imported, and nobody needs them before this.
        importlib.import_module("hf_moe_ext.models.modeling")

    def resolve_keys(self) -> None:
        """Check the keys and fill in what is open; the models call it again before they build their blocks.

        Raises:
            ValueError, TypeError: see the class.
        """
        _check_blocks(self)
        if DCCA in self.moe_blocks:
            _check_kinds(self)
            _resolve(self)
        resolve_parametrisation(self)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As ``PreTrainedConfig.from_dict``, with the given keys in place before the open values are filled in."""
        ours = {f.name for f in fields(cls)} - {f.name for f in fields(PreTrainedConfig)}
        given = {name: kwargs.pop(name) for name in ours & kwargs.keys()}
        return super().from_dict({**config_dict, **given}, **kwargs)  # type: ignore[misc]

    @property
    def moe_blocks(self) -> list[str]:
        """Block of each layer."""
        config: Any = self
        return [self.moe_block] * config.num_hidden_layers if isinstance(self.moe_block, str) else self.moe_block

    @property
    def base_model_ep_plan(self) -> dict[str, str]:
        """Expert-parallel plan: experts split by expert, reached through a dispatch; nothing else is touched."""
        rules = {f"layers.*.mlp.experts.{name}": "grouped_gemm" for name in self._expert_weights}
        return {**rules, "layers.*.mlp.experts": "ep_dispatch_experts"}

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """Tensor-parallel plan: the stock one for attention; experts split along their inner width, never the latent."""
        # Without the stock rule for weights that no layer has: such a rule only makes Transformers warn.
        experts = "layers.*.mlp.experts."
        stock = {k: v for k, v in type(self)._stock_tp_plan().items() if not k.startswith(experts)}
        styles = {"gate_up_proj": "packed_colwise", "up_proj": "colwise", "down_proj": "rowwise"}
        return {**{experts + name: styles[name] for name in self._expert_weights}, **stock}

    @property
    def _expert_weights(self) -> list[str]:
        blocks = self.moe_blocks
        gated = STANDARD in blocks or self.moe_expert_gated
        ungated = DCCA in blocks and not self.moe_expert_gated
        return ["gate_up_proj"] * gated + ["up_proj"] * ungated + ["down_proj"]

    @classmethod
    def _stock_tp_plan(cls) -> dict[str, str]:
        return super().base_model_tp_plan  # type: ignore[misc]


class OlmoeExtConfig(ExtKeys, OlmoeConfig):  # type: ignore[misc, override]
    """``OlmoeConfig`` and the keys that choose the MoE block.

    Example: ``OlmoeExtConfig(moe_block="dcca", moe_latent_size=512)``.

    Raises:
        ValueError: a value outside its range, widths that ``grouped_mm`` cannot align, a list of the wrong length.
        TypeError: a value of the wrong kind.
    """

    model_type = "olmoe_ext"


class MixtralExtConfig(ExtKeys, MixtralConfig):  # type: ignore[misc, override]
    """``MixtralConfig`` and the keys that choose the MoE block; as ``OlmoeExtConfig``."""

    model_type = "mixtral_ext"


def _check_blocks(config: Any) -> None:
    value = config.moe_block
    if not isinstance(value, str | list | tuple) or not all(isinstance(block, str) for block in value):
        raise TypeError(f"moe_block must be a name or a list of names, got {value!r}; write 'standard' or 'dcca'")
    if not isinstance(value, str):
        config.moe_block = list(value)  # what JSON gives back
        if len(value) != config.num_hidden_layers:
            raise ValueError(
                f"moe_block lists {len(value)} blocks for num_hidden_layers={config.num_hidden_layers}; "
                "write one per layer, or one name for all"
            )
    unknown = sorted(set(config.moe_blocks) - set(BLOCKS))
    if unknown:
        raise ValueError(f"moe_block must be one of {', '.join(map(repr, BLOCKS))}, got {unknown[0]!r}")


def _check_kinds(config: Any) -> None:
    for name in ("moe_latent_size", "moe_expert_intermediate_size", "moe_shared_expert_intermediate_size"):
        value = getattr(config, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an integer, got {value!r}")
    for name in ("moe_expert_gated", "moe_latent_norm"):
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"{name} must be True or False, got {getattr(config, name)!r}")


def _resolve(config: Any) -> None:
    """Fill in what was left open, and refuse what cannot be built."""
    from transformers.activations import ACT2FN

    hidden_size = config.hidden_size
    if config.moe_latent_size is None:
        config.moe_latent_size = hidden_size // 4
        if config.moe_latent_size % ALIGNMENT:
            raise ValueError(
                f"moe_latent_size is hidden_size // 4 = {config.moe_latent_size} by default, which is not a multiple of "
                f"{ALIGNMENT}, as grouped_mm needs; write moe_latent_size={nearest_aligned(config.moe_latent_size)}"
            )
    latent_size = config.moe_latent_size
    if not 1 <= latent_size <= hidden_size:
        raise ValueError(f"moe_latent_size must be from 1 to hidden_size={hidden_size}, got {latent_size}")
    if config.moe_expert_intermediate_size is None:
        config.moe_expert_intermediate_size = equal_expert_width(
            hidden_size, config.intermediate_size, latent_size, config.moe_expert_gated
        )
    if config.moe_expert_act is None:
        config.moe_expert_act = config.hidden_act
    if config.moe_expert_act not in ACT2FN:
        raise ValueError(f"moe_expert_act must be an activation of Transformers, got {config.moe_expert_act!r}")
    if config.moe_expert_intermediate_size < 1:
        raise ValueError(f"moe_expert_intermediate_size must be at least 1, got {config.moe_expert_intermediate_size}")
    if config.moe_shared_expert_intermediate_size < 0:
        raise ValueError(
            "moe_shared_expert_intermediate_size must be 0 (none) or a width, got "
            f"{config.moe_shared_expert_intermediate_size}"
        )
    for name in ("moe_latent_size", "moe_expert_intermediate_size"):
        width = getattr(config, name)
        if width % ALIGNMENT:
            raise ValueError(
                f"{name}={width} is not a multiple of {ALIGNMENT}, which grouped_mm needs (rows of 16 bytes in "
                f"bfloat16); write {name}={nearest_aligned(width)}"
            )


def _warn_without_effect(config: Any) -> None:
    keys = [f for f in fields(ExtKeys) if f.name.startswith("moe_") and f.name != "moe_block"]
    given = [f.name for f in keys if getattr(config, f.name) != f.default]
    if given:
        logger.warning(
            f"{', '.join(given)}: no effect, because every layer has moe_block='standard'; write moe_block='dcca'"
        )


AutoConfig.register(OlmoeExtConfig.model_type, OlmoeExtConfig, exist_ok=True)
AutoConfig.register(MixtralExtConfig.model_type, MixtralExtConfig, exist_ok=True)
