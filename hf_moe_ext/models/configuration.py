"""``OlmoeExtConfig``, ``MixtralExtConfig``, ``Qwen3MoeExtConfig``: the stock configurations, plus what chooses the MoE block.

Open values (None) are filled in when the configuration is made and stored as numbers, so that ``config.json`` says what
the model is.
"""

import importlib
from dataclasses import dataclass, fields
from typing import Any

from transformers import AutoConfig, MixtralConfig, OlmoeConfig, PreTrainedConfig, Qwen3MoeConfig
from transformers.utils import logging

from hf_moe_ext.models import dcca_keys, ders_keys
from hf_moe_ext.mup.settings import resolve_parametrisation

logger = logging.get_logger(__name__)

STANDARD, DCCA, DERS, DENSE = "standard", "dcca", "ders", "dense"
BLOCKS = (STANDARD, DCCA, DERS, DENSE)


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
    ders_delta: str = ders_keys.LOW_RANK
    ders_rank: Any = None
    ders_drop_rate: Any = None
    ders_bits: Any = None
    ders_group_size: int = 128
    ders_seed: int = 0
    ders_stored_positions: bool = False
    ders_bias: bool = False
    ders_share_universal: bool = False
    ders_universal_gate: str = ders_keys.COMPLEMENT
    ders_forward: str = "fused"
    ders_hold_positions: bool = False
    ders_mask: Any = None
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
        _warn_without_effect(self)
        # The classes cannot be registered while Transformers is being imported, and nobody needs them before this.
        importlib.import_module("hf_moe_ext.models.modeling")

    def resolve_keys(self) -> None:
        """Check the keys and fill in what is open; the models call it again before they build their blocks.

        Raises:
            ValueError, TypeError: see the class.
        """
        _check_blocks(self)
        blocks = self.moe_blocks
        if {DCCA, DERS} & set(blocks):
            dcca_keys.check_shared_width(self)
        if DCCA in blocks:
            dcca_keys.check_dcca_kinds(self)
            dcca_keys.resolve_dcca(self)
        if DERS in blocks:
            ders_keys.resolve_ders(self, [layer for layer, block in enumerate(blocks) if block == DERS])
        resolve_parametrisation(self)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As ``PreTrainedConfig.from_dict``, with the given keys in place before the open values are filled in."""
        ours = {f.name for f in fields(cls)} - {f.name for f in fields(PreTrainedConfig)}
        given = {name: kwargs.pop(name) for name in ours & kwargs.keys()}
        return super().from_dict({**config_dict, **given}, **kwargs)  # type: ignore[misc]

    @property
    def moe_blocks(self) -> list[str]:
        """Block of each layer; "dense" too where the stock family has an ordinary FFN (Qwen3-MoE's ``mlp_only_layers``)."""
        config: Any = self
        dense = stock_dense_layers(self)
        named = [self.moe_block] * config.num_hidden_layers if isinstance(self.moe_block, str) else self.moe_block
        return [DENSE if layer in dense else block for layer, block in enumerate(named)]

    @property
    def base_model_ep_plan(self) -> dict[str, str]:
        """Expert-parallel plan: experts split by expert, reached through a dispatch; nothing else is touched.

        Empty with shared-base experts: their deltas are light, and the base is needed on every rank.
        """
        if DERS in self.moe_blocks:
            return {}
        rules = {f"layers.*.mlp.experts.{name}": "grouped_gemm" for name in self._expert_weights}
        return {**rules, "layers.*.mlp.experts": "ep_dispatch_experts"}

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """Tensor-parallel plan: the stock one for attention; experts split along their inner width, never the latent.

        Rules name no layer, so that one layer with shared-base experts, which stay whole, leaves all experts whole.
        """
        # Without the stock rule for weights that no layer has: such a rule only makes Transformers warn.
        experts, blocks = "layers.*.mlp.experts", self.moe_blocks
        whole = DERS in blocks or set(blocks) == {DENSE}
        dense = {f"layers.*.mlp.{name}_proj" for name in ("gate", "up", "down")}
        stock = {
            name: style
            for name, style in type(self)._stock_tp_plan().items()
            if not (name.startswith(f"{experts}.") or name in dense or (whole and name == experts))
        }
        styles = {"gate_up_proj": "packed_colwise", "up_proj": "colwise", "down_proj": "rowwise"}
        ours = {} if whole else {f"{experts}.{name}": styles[name] for name in self._expert_weights}
        if DENSE in blocks:
            ours |= {name: "rowwise" if name.endswith("down_proj") else "colwise" for name in sorted(dense)}
        return {**ours, **stock}

    @property
    def _expert_weights(self) -> list[str]:
        blocks = self.moe_blocks
        gated = STANDARD in blocks or (DCCA in blocks and self.moe_expert_gated)
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
    """``MixtralConfig`` and the keys that choose the MoE block; as ``OlmoeExtConfig``.

    Attributes:
        norm_topk_prob: whether the chosen experts' gates are made to sum to 1, as stock Mixtral's are; False: the kept
            probabilities as they are.
    """

    model_type = "mixtral_ext"
    norm_topk_prob: bool = True


class Qwen3MoeExtConfig(ExtKeys, Qwen3MoeConfig):  # type: ignore[misc, override]
    """``Qwen3MoeConfig`` and the keys that choose the MoE block; as ``OlmoeExtConfig``.

    Experts are ``moe_intermediate_size`` wide, dense layers ``intermediate_size``. Layers that ``mlp_only_layers`` and
    ``decoder_sparse_step`` make dense stay so whatever ``moe_block`` says for all.
    """

    model_type = "qwen3_moe_ext"


def stock_dense_layers(config: Any) -> set[int]:
    """Layers in which the stock family has an ordinary FFN (the rule of Qwen3-MoE's decoder layer)."""
    step = getattr(config, "decoder_sparse_step", None)
    if step is None:
        return set()
    only, some = config.mlp_only_layers or (), config.num_local_experts > 0
    return {i for i in range(config.num_hidden_layers) if i in only or not some or (i + 1) % step}


def _check_blocks(config: Any) -> None:
    value = config.moe_block
    if not isinstance(value, str | list | tuple) or not all(isinstance(block, str) for block in value):
        raise TypeError(
            f"moe_block must be a name or a list of names, got {value!r}; write one of {', '.join(map(repr, BLOCKS))}"
        )
    if not isinstance(value, str):
        config.moe_block = list(value)  # what JSON gives back
        if len(value) != config.num_hidden_layers:
            raise ValueError(
                f"moe_block lists {len(value)} blocks for num_hidden_layers={config.num_hidden_layers}; "
                "write one per layer, or one name for all"
            )
    named = [value] if isinstance(value, str) else value
    unknown = sorted(set(named) - set(BLOCKS))
    if unknown:
        raise ValueError(f"moe_block must be one of {', '.join(map(repr, BLOCKS))}, got {unknown[0]!r}")
    if not isinstance(value, str):
        for layer in sorted(stock_dense_layers(config)):
            if value[layer] in (DCCA, DERS):
                raise ValueError(
                    f"moe_block[{layer}]={value[layer]!r}, but mlp_only_layers={config.mlp_only_layers} with "
                    f"decoder_sparse_step={config.decoder_sparse_step} makes layer {layer} dense; write 'dense' there, or "
                    "take it out of those"
                )


def _warn_without_effect(config: Any) -> None:
    blocks = set(config.moe_blocks)
    idle = {}
    if DCCA not in blocks:
        idle[DCCA] = dcca_keys.list_idle_keys(config, ExtKeys, shared_expert_used=DERS in blocks)
    if DERS not in blocks:
        idle[DERS] = ders_keys.list_idle_keys(config, ExtKeys, bias_used=DENSE in blocks)
    for block, names in idle.items():
        if names:
            logger.warning(
                f"{', '.join(names)}: no effect, because no layer has moe_block={block!r}; write moe_block={block!r}, or "
                "leave them out"
            )


AutoConfig.register(OlmoeExtConfig.model_type, OlmoeExtConfig, exist_ok=True)
AutoConfig.register(MixtralExtConfig.model_type, MixtralExtConfig, exist_ok=True)
AutoConfig.register(Qwen3MoeExtConfig.model_type, Qwen3MoeExtConfig, exist_ok=True)
