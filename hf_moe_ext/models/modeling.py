"""``OlmoeExt*``, ``MixtralExt*``, ``Qwen3MoeExt*``: the stock models with the block that the configuration names.

Everything but the blocks is inherited. A layer's stock block is exchanged before any weight is drawn, so a model of
standard blocks draws the same weights from the same seed as the stock one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM, MixtralModel, MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM, OlmoeModel, OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM, Qwen3MoeModel, Qwen3MoeTopKRouter

from hf_moe_ext.dcca.block import is_plain
from hf_moe_ext.ders.experts import DersExperts
from hf_moe_ext.models.blocks import draw_shared_base, exchange_block
from hf_moe_ext.models.checkpoint_blocks import refuse_other_blocks
from hf_moe_ext.models.configuration import DCCA, DERS, MixtralExtConfig, OlmoeExtConfig, Qwen3MoeExtConfig
from hf_moe_ext.models.distribution import check_distribution, count_processes
from hf_moe_ext.models.expert_gradients import divide_expert_gradients_once
from hf_moe_ext.mup.guard import watch
from hf_moe_ext.mup.multipliers import divide_logits, multiply_embedding, multiply_layer
from hf_moe_ext.mup.roles import NONE, read_role


class ChosenBlocks:
    """What the ``*_ext`` models have in common; stands before a stock model class."""

    router_class: Callable[[Any], nn.Module]

    def post_init(self) -> None:
        """Exchange the blocks before the weights are drawn, then what every model does."""
        model: Any = self
        config = model.config
        # Keys may have been changed since the configuration was made.
        config.resolve_keys()
        layers = getattr(model, "layers", ())
        for i, layer in enumerate(layers):
            exchange_block(layer, i, config, self.router_class)
            multiply_layer(layer, config)
        if hasattr(model, "embed_tokens"):
            multiply_embedding(model.embed_tokens, config)
        if config.mup != NONE:
            _set_init_factors(model, config)
            watch(model)
        super().post_init()  # type: ignore[misc]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """As ``PreTrainedModel.from_pretrained``, but a layout that cannot be taken is refused before anything starts."""
        layout = kwargs.get("distributed_config")
        if layout is not None:
            outline = config
            if not isinstance(config, PreTrainedConfig):
                own = {key: value for key, value in kwargs.items() if key != "distributed_config"}
                outline = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **own)  # type: ignore[attr-defined]
            check_distribution(
                outline,
                layout,
                model_class=cls,
                num_processes=count_processes(),
                experts_implementation=kwargs.get("experts_implementation"),
                dtype=kwargs.get("dtype"),
            )
        return super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *model_args, config=config, **kwargs
        )

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        model = super().maybe_distribute_model(model, distributed_config, mesh_manager)  # type: ignore[misc]
        if mesh_manager is not None:
            divide_expert_gradients_once(model, distributed_config)
        return model

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        stds, factors = getattr(module, "init_std", {}), getattr(module, "init_factor", {})
        if isinstance(module, DersExperts):
            draw_shared_base(module, self.config.initializer_range, factors)  # type: ignore[attr-defined]
            return
        if not stds and not factors:
            super()._init_weights(module)  # type: ignore[misc]
            return
        for name in factors or stds:
            std = stds.get(name, self.config.initializer_range) * factors.get(name, 1.0)  # type: ignore[attr-defined]
            init.normal_(getattr(module, name), mean=0.0, std=std)
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)
        padding = getattr(module, "padding_idx", None)
        # A slice would lose the mark of a weight that was read from a checkpoint.
        if padding is not None and not getattr(module.weight, "_is_hf_initialized", False):
            init.zeros_(module.weight[padding])

    def set_input_embeddings(self, value: nn.Module) -> None:
        """As the stock one; resizing puts a new module there, which has to be multiplied as the old one was."""
        super().set_input_embeddings(value)  # type: ignore[misc]
        multiply_embedding(value, self.config)  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy: it is trained by other optimizers."""
        super().__setstate__(state)  # type: ignore[misc]
        watch(self)  # type: ignore[arg-type]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Transformers looks for `@use_experts_implementation` in this file; ours stands beside the block.
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Transformers' choice, less what cannot run un-gated experts.

        Raises:
            ValueError: "sonicmoe" with un-gated experts.
        """
        config: Any = self.config  # type: ignore[attr-defined]
        if requested_experts == "sonicmoe" and DCCA in config.moe_blocks and not config.moe_expert_gated:
            raise ValueError(
                "experts_implementation='sonicmoe' runs gated experts only, and this model has moe_expert_gated=False; "
                "use 'grouped_mm', or a model with moe_expert_gated=True"
            )
        return super().get_correct_experts_implementation(requested_experts)  # type: ignore[misc]

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        # Before Transformers draws what is missing at random.
        if not load_config.ignore_mismatched_sizes:
            refuse_other_blocks(model, loading_info)
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> None:
        """As ``PreTrainedModel.save_pretrained``, but with the module's own names unless asked otherwise.

        The Trainer loads its checkpoints by these names; it would pass over experts written one by one and go on with
        the ones it has.
        """
        if save_original_format and DERS in self.config.moe_blocks:  # type: ignore[attr-defined]
            raise ValueError(
                "save_original_format=True writes one matrix per expert, which experts with a shared base (moe_block='ders') "
                "do not have; leave it out, or write ordinary experts with `hf-moe export`"
            )
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)  # type: ignore[misc]


class ChosenBlocksForCausalLM(ChosenBlocks):
    """The same for models with a language-model head."""

    def _build(self, config: Any, model: nn.Module) -> None:
        """What the stock head's constructor does, around our model instead of the stock one."""
        head: Any = self
        head.model = model
        head.vocab_size = config.vocab_size
        head.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        head.router_aux_loss_coef = config.router_aux_loss_coef
        head.num_experts = config.num_local_experts
        head.num_experts_per_tok = config.num_experts_per_tok
        head.register_forward_hook(_name_latent)
        head.post_init()

    def __setattr__(self, name: str, value: Any) -> None:
        """Whatever becomes the head has its input divided: a resized one, one that an adapter wraps, one taken out of it."""
        super().__setattr__(name, value)
        if name == "lm_head" and isinstance(value, nn.Module):
            divide_logits(value, self.config.logits_scaling)  # type: ignore[attr-defined]


class OlmoeExtModel(ChosenBlocks, OlmoeModel):
    """``OlmoeModel`` with the blocks of its ``OlmoeExtConfig``."""

    config: OlmoeExtConfig
    router_class = OlmoeTopKRouter


class OlmoeExtForCausalLM(ChosenBlocksForCausalLM, OlmoeForCausalLM, GenerationMixin):
    """``OlmoeForCausalLM`` with the blocks of its ``OlmoeExtConfig``."""

    config: OlmoeExtConfig
    router_class = OlmoeTopKRouter

    def __init__(self, config: OlmoeExtConfig) -> None:
        super(OlmoeForCausalLM, self).__init__(config)
        self._build(config, OlmoeExtModel(config))


class MixtralExtTopKRouter(MixtralTopKRouter):
    """Mixtral's router without its last step: gates are the kept probabilities as they are (``norm_topk_prob=False``)."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[..., hidden] to logits [tokens, num_experts], gates [tokens, top_k] and ids [tokens, top_k]."""
        logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        wide = torch.promote_types(logits.dtype, torch.float32)
        gates, ids = torch.topk(torch.softmax(logits.to(wide), dim=-1), self.top_k, dim=-1)
        return logits, gates, ids


def _make_mixtral_router(config: MixtralExtConfig) -> MixtralTopKRouter:
    return (MixtralTopKRouter if config.norm_topk_prob else MixtralExtTopKRouter)(config)


class MixtralExtModel(ChosenBlocks, MixtralModel):
    """``MixtralModel`` with the blocks of its ``MixtralExtConfig``."""

    config: MixtralExtConfig
    router_class = staticmethod(_make_mixtral_router)


class MixtralExtForCausalLM(ChosenBlocksForCausalLM, MixtralForCausalLM, GenerationMixin):
    """``MixtralForCausalLM`` with the blocks of its ``MixtralExtConfig``."""

    config: MixtralExtConfig
    router_class = staticmethod(_make_mixtral_router)

    def __init__(self, config: MixtralExtConfig) -> None:
        super(MixtralForCausalLM, self).__init__(config)
        self._build(config, MixtralExtModel(config))


class Qwen3MoeExtModel(ChosenBlocks, Qwen3MoeModel):
    """``Qwen3MoeModel`` with the blocks of its ``Qwen3MoeExtConfig``."""

    config: Qwen3MoeExtConfig
    router_class = Qwen3MoeTopKRouter


class Qwen3MoeExtForCausalLM(ChosenBlocksForCausalLM, Qwen3MoeForCausalLM, GenerationMixin):
    """``Qwen3MoeForCausalLM`` with the blocks of its ``Qwen3MoeExtConfig``."""

    config: Qwen3MoeExtConfig
    router_class = Qwen3MoeTopKRouter

    def __init__(self, config: Qwen3MoeExtConfig) -> None:
        super(Qwen3MoeForCausalLM, self).__init__(config)
        self._build(config, Qwen3MoeExtModel(config))


def _set_init_factors(model: nn.Module, config: Any) -> None:
    """Leave on each module by what factor its matrices' initial scale differs from the base model's."""
    for path, module in model.named_modules():
        matrices = [name for name, p in module.named_parameters(recurse=False) if p.ndim > 1]
        if matrices:
            # Deltas of a shared base have laws of their own.
            roles = {name: read_role(f"{path}.{name}", config) for name in matrices if not name.startswith("delta_")}
            module.init_factor = {name: role.init_factor for name, role in roles.items()}


def _name_latent(model: Any, _: tuple[Any, ...], output: Any) -> None:
    """After a forward in training: raise naming the first layer whose combined latent is not finite.

    Only where the loss is not finite either, or where the caller computes it (label smoothing, distillation). Not inside
    ``torch.compile``, which cannot stop to look.
    """
    if not model.training or torch.compiler.is_compiling():
        return
    loss = output[0] if isinstance(output, tuple) else output.loss
    if loss is not None and loss.ndim == 0 and (not is_plain(loss) or torch.isfinite(loss)):
        return
    blocks = {
        name: getattr(layer.mlp, "last_latent_magnitude", None) for name, layer in model.model.layers.named_children()
    }
    magnitudes = {name: value for name, value in blocks.items() if value is not None}
    if not magnitudes:
        return
    first = next(iter(magnitudes.values()))
    finite = torch.isfinite(torch.stack([value.to(first.device) for value in magnitudes.values()])).tolist()
    if not all(finite):
        name = list(magnitudes)[finite.index(False)]
        raise FloatingPointError(
            f"the combined latent of model.layers.{name}.mlp is not finite, and it is the first layer of which that is so; "
            "lower the learning rate, train in bfloat16 rather than float16, or set moe_latent_norm=True"
        )


for _ours, _theirs in (("olmoe_ext", "olmoe"), ("mixtral_ext", "mixtral"), ("qwen3_moe_ext", "qwen3_moe")):
    register_checkpoint_conversion_mapping(_ours, get_checkpoint_conversion_mapping(_theirs), overwrite=True)
AutoModel.register(OlmoeExtConfig, OlmoeExtModel, exist_ok=True)
AutoModel.register(MixtralExtConfig, MixtralExtModel, exist_ok=True)
AutoModel.register(Qwen3MoeExtConfig, Qwen3MoeExtModel, exist_ok=True)
AutoModelForCausalLM.register(OlmoeExtConfig, OlmoeExtForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(MixtralExtConfig, MixtralExtForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(Qwen3MoeExtConfig, Qwen3MoeExtForCausalLM, exist_ok=True)
