"""Which layouts of ``DistributedConfig`` a MoE model can take: the others are refused before any process group starts.

Transformers 5.23 resolves a layout after it has started the processes' groups, and takes some that do nothing or compute
something else (specified in ``tests/models/test_distribution.py``, one row each). ``check_distribution`` reads the
configuration and an outline of the model without weights, and says what to write instead. It serves stock models too.
"""

import copy
import os
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers import initialization as init
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import EPImplementationInterface
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard
from transformers.utils import logging

from hf_moe_ext.dcca.block import DccaExperts, DccaGatedExperts
from hf_moe_ext.host.blocks import ExpertsSite, iterate_experts

logger = logging.get_logger(__name__)

SHARDED, DISPATCHED = "grouped_gemm", "ep_dispatch_experts"
MEGAMOE = "deepgemm_megamoe"
# Their eager loop looks up the id that stands for experts of other ranks (modeling_nemotron_h.py), an IndexError.
_EAGER_WITHOUT_OTHER_RANKS = ("nemotron_h",)
_ROW_BYTES = 16  # what grouped_mm aligns rows to

Layout = DistributedConfig | dict[str, Any]


def check_distribution(
    config: Any,
    distributed_config: Layout,
    *,
    model_class: Any = AutoModelForCausalLM,
    num_processes: int | None = None,
    experts_implementation: str | None = None,
    dtype: Any = None,
) -> None:
    """Refuse a layout that would fail later, compute something else, or silently do nothing.

    Args:
        config: the model's configuration, of ours or a stock one; not changed.
        distributed_config: as given to ``from_pretrained``.
        model_class: the class to be loaded.
        num_processes: of the run; None: not compared.
        experts_implementation: as given to ``from_pretrained``; None: the configuration's, else "grouped_mm".
        dtype: as given to ``from_pretrained``; None: the configuration's.

    Raises:
        ValueError: the layout cannot be taken; the message says what to write.
    """
    given = distributed_config if isinstance(distributed_config, dict) else {}
    layout: Any = DistributedConfig.from_dict(given) if isinstance(distributed_config, dict) else distributed_config
    if layout.dp_size * layout.tp_size * layout.pp_size == 1:
        return  # Transformers distributes nothing
    _check_sizes(layout, bool(given.get("enable_expert_parallel")), num_processes)
    if layout.ep_size > 1:
        _refuse_shared_base(config, layout.ep_size)
        _check_implementation(layout, experts_implementation or config._experts_implementation)
    model = _outline(config, model_class, experts_implementation)
    plans = {name: _resolve(model, name, getattr(layout, name)) for name in ("ep_plan", "tp_plan", "fsdp_plan")}
    _check_whole_modules(model, plans["ep_plan"] | plans["tp_plan"])
    sites = list(iterate_experts(model))
    if layout.ep_size > 1:
        _check_expert_plan(model, sites, plans["ep_plan"], layout.ep_size)
        _check_eager(model, sites, layout)
    if layout.tp_size > 1:
        _warn_of_shared_norms(plans["tp_plan"])
        _check_heads(model, plans["tp_plan"], layout.tp_size)
    if layout.tp_size > 1 and layout.ep_size == 1:
        _check_inner_width(model, sites, layout.tp_size, dtype)


def count_processes() -> int:
    """Processes of this run: of the initialised group, else what the launcher says, else 1."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_sizes(layout: Any, flagged: bool, num_processes: int | None) -> None:
    sizes = {"pp_size": layout.pp_size, "dp_replicate_size": layout.dp_replicate_size}
    sizes |= {"fsdp_size": layout.fsdp_size, "tp_size": layout.tp_size}
    # `enable_expert_parallel` without `ep_size` means ep_size=tp_size and leaves only an empty tp_plan behind.
    if layout.ep_size == 1 and layout.tp_size == 1 and (flagged or layout.tp_plan == {}):
        raise ValueError(
            "enable_expert_parallel=True (or tp_plan={}) without tensor parallelism shards no experts: Transformers takes "
            f"ep_size from tp_size, which is 1; write DistributedConfig(fsdp_size={layout.fsdp_size}, "
            f"ep_size={layout.fsdp_size}) for expert parallelism, or leave it out"
        )
    if layout.tp_size > 1 and layout.tp_plan == {}:
        raise ValueError(
            f"tp_size={layout.tp_size} with tp_plan={{}} (which enable_expert_parallel=True sets, and Transformers' text "
            "recommends) has no rule to follow; write "
            f"DistributedConfig(tp_size={layout.tp_size}, ep_size={layout.tp_size}), which splits attention too, or "
            f"DistributedConfig(fsdp_size={layout.tp_size}, ep_size={layout.tp_size}), where each rank reads its own rows"
        )
    if layout.pp_size > 1 and layout.ep_size > 1:
        raise ValueError(
            f"pp_size={layout.pp_size} cannot be combined with ep_size={layout.ep_size}: tokens are not exchanged between "
            "experts across pipeline stages; write pp_size=1"
        )
    needed = layout.pp_size * layout.dp_size * layout.tp_size
    if num_processes is not None and needed != num_processes:
        product = " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
        raise ValueError(
            f"{product} needs {needed} processes, and this run has {num_processes}; start it with "
            f"`torchrun --nproc_per_node {needed}` or `accelerate launch --num_processes {needed}`, or change the sizes"
        )
    idle = [
        name for name, value in (("ep_plan", None), ("ep_implementation", "auto")) if getattr(layout, name) != value
    ]
    if idle and layout.ep_size == 1:
        logger.warning(f"{' and '.join(idle)}: no effect, because ep_size is 1; write ep_size to shard the experts")


def _refuse_shared_base(config: Any, ep_size: int) -> None:
    layers = [layer for layer, block in enumerate(getattr(config, "moe_blocks", ())) if block == "ders"]
    if layers:
        raise ValueError(
            f"ep_size={ep_size}: the experts of layer {layers[0]} (moe_block='ders') share a base that every rank needs, and "
            "their deltas are light, so there is nothing to gain from spreading them; write fsdp_size for the same number of "
            "processes, which shards base and deltas alike, and leave ep_size out"
        )


def _check_implementation(layout: Any, experts_implementation: str | None) -> None:
    """How tokens reach the experts, and whether every rank has what that needs."""
    implementations, name = EPImplementationInterface(), layout.ep_implementation
    if name not in implementations:
        raise ValueError(
            f"ep_implementation must be one of {', '.join(sorted(map(repr, implementations)))}, got {name!r}"
        )
    if MEGAMOE in (name, experts_implementation):
        if experts_implementation != MEGAMOE or name not in ("auto", MEGAMOE):
            raise ValueError(
                f"ep_implementation={name!r} with experts_implementation={experts_implementation!r}: {MEGAMOE!r} is one "
                f"kernel for both; write it for both, or for neither"
            )
        name = MEGAMOE
    if implementations[name].needs_shared_batch and layout.ep_size != layout.tp_size:
        raise ValueError(
            f"ep_implementation={name!r} needs every rank of an expert group to hold the same rows, so "
            f"ep_size={layout.ep_size} must equal tp_size={layout.tp_size}; write ep_implementation='all_to_all', or "
            f"tp_size={layout.ep_size}"
        )


def _outline(config: Any, model_class: Any, experts_implementation: str | None) -> Any:
    """The model on the meta device: its modules, names and plans, without weights."""
    build = getattr(model_class, "from_config", None) or model_class._from_config
    given = {} if experts_implementation is None else {"experts_implementation": experts_implementation}
    with init.no_init_weights(), torch.device("meta"):
        return build(copy.deepcopy(config), **given)


def _resolve(model: Any, plan_name: str, override: Any) -> dict[str, str]:
    """The model's own plan with the rules of ``DistributedConfig`` in place, as Transformers merges them."""
    plan = dict(getattr(model, plan_name))
    if not isinstance(override, dict):
        return plan
    names = [*dict(model.named_modules()), *dict(model.named_parameters())]
    known = {replace_layer_number_by_wildcard(name) for name in names} | plan.keys()
    for key, style in override.items():
        if key not in known:
            prefixed = f"{model.base_model_prefix}.{key}"
            hint = f"write {prefixed!r}" if prefixed in known else _hint(known, key)
            raise ValueError(
                f"{plan_name} has a rule for {key!r}, which names nothing in {type(model).__name__}; {hint}"
            )
        if plan_name != "fsdp_plan" and style not in ALL_PARALLEL_STYLES:
            raise ValueError(
                f"{plan_name} gives {key!r} the style {style!r}, which Transformers does not know; for experts write "
                f"{SHARDED!r} on each weight and {DISPATCHED!r} on the module, or leave {plan_name} out"
            )
    return plan | override


def _hint(known: set[str], key: str) -> str:
    last = key.rpartition(".")[2]
    if last in ("gate_up_proj", "up_proj") and not any(name.endswith(f".experts.{last}") for name in known):
        other = "up_proj" if last == "gate_up_proj" else "gate_up_proj"
        return f"its experts have {other!r}; write that, or leave the plan out"
    return "leave it out, or write the name of a module or parameter with * for layer numbers"


def _check_whole_modules(model: nn.Module, plan: dict[str, str]) -> None:
    """What stands around latent experts is whole on every rank: a split latent is not what travels and is combined."""
    for name, module in model.named_modules():
        if not (hasattr(module, "descend") and hasattr(module, "ascend")):
            continue
        for child in ("gate", "descend", "ascend", "latent_norm"):
            prefix = replace_layer_number_by_wildcard(f"{name}.{child}")
            rule = next((key for key in plan if key == prefix or key.startswith(f"{prefix}.")), None)
            if rule is not None:
                raise ValueError(
                    f"the plan has a rule for {rule!r} ({plan[rule]!r}), but router, descend, ascend and their norm must "
                    "stay whole on every rank, or the experts would get a part of the latent; leave the rule out"
                )


def _check_expert_plan(model: nn.Module, sites: list[ExpertsSite], plan: dict[str, str], ep_size: int) -> None:
    """Every experts module is reached by a dispatch, and all of its weights are sharded by expert."""
    if not sites:
        raise ValueError(f"ep_size={ep_size}, but {type(model).__name__} has no MoE block; write ep_size=1")
    for site in sites:
        key = replace_layer_number_by_wildcard(site.name)
        weights = {
            f"{key}.{name}": p.shape[0] for name, p in site.experts.named_parameters(recurse=False) if p.ndim > 1
        }
        dispatched = plan.get(key) == DISPATCHED
        whole = [name for name in weights if plan.get(name) != SHARDED]
        if whole or not dispatched:
            missing = dict.fromkeys(whole, SHARDED) | ({} if dispatched else {key: DISPATCHED})
            consequence = (
                "every rank would keep all experts, and all rows would go to the first"
                if dispatched and len(whole) == len(weights)
                else "sharded and whole weights would be mixed up"
                if dispatched
                else "nothing would send tokens to the experts"
            )
            raise ValueError(
                f"ep_size={ep_size}: the expert-parallel plan lacks rules for {site.name}: {consequence}; write "
                f"ep_plan={missing!r} (it is merged with the model's own plan), or leave ep_plan out if the model has one"
            )
        num_experts = min(weights.values())
        if num_experts % ep_size:
            divisors = [str(n) for n in range(2, num_experts + 1) if num_experts % n == 0]
            raise ValueError(
                f"ep_size={ep_size} must divide the number of experts, which is {num_experts} in {site.name}; write one "
                f"of {', '.join(divisors)}"
            )


def _check_eager(model: Any, sites: list[ExpertsSite], layout: Any) -> None:
    """Stock eager loops where ranks share their rows, each running its own experts on all of them."""
    if model.config._experts_implementation != "eager" or layout.ep_size != layout.tp_size:
        return
    stock = [site for site in sites if not isinstance(site.experts, DccaExperts | DccaGatedExperts)]
    model_type, name = model.config.model_type, layout.ep_implementation
    if model_type in _EAGER_WITHOUT_OTHER_RANKS and name in ("auto", "all_reduce"):
        consequence = f"of {model_type!r} fails on ids of other ranks' experts"
    elif stock and name == "all_reduce":
        # Its output is then a constant, and the other ranks wait for this one in the backward.
        consequence = f"hangs in training once the experts of one rank get no token ({stock[0].name})"
    else:
        return
    raise ValueError(
        f"experts_implementation='eager' with ep_implementation={name!r} {consequence}; write "
        "experts_implementation='batched_mm' or 'grouped_mm', or ep_implementation='all_to_all'"
    )


def _check_heads(model: Any, plan: dict[str, str], tp_size: int) -> None:
    """A rank that holds a part of a key-value head fails in its first forward."""
    split = any(key.endswith(".self_attn.k_proj") and style == "colwise" for key, style in plan.items())
    num_heads = getattr(model.config, "num_key_value_heads", None)
    if split and isinstance(num_heads, int) and num_heads % tp_size:
        raise ValueError(
            f"tp_size={tp_size} must divide num_key_value_heads={num_heads}; write a smaller tp_size, and fsdp_size for "
            "the other processes"
        )


def _warn_of_shared_norms(plan: dict[str, str]) -> None:
    """Transformers 5.23 sums such a gradient over the ranks after each backward, with what earlier ones have left in it."""
    names = [name for name, style in plan.items() if style == "replicated_with_grad_allreduce"]
    if names:
        logger.warning(
            f"{' and '.join(names)}: under tensor parallelism Transformers adds up their gradients anew after each backward, "
            "which is right for one backward per step only; train with gradient_accumulation_steps=1, or freeze them"
        )


def _check_inner_width(model: Any, sites: list[ExpertsSite], tp_size: int, dtype: Any) -> None:
    """Tensor parallelism splits the experts' inner width; grouped_mm wants what is left in whole units."""
    if dtype is None or dtype == "auto":
        dtype = model.config.dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    unit = _ROW_BYTES // dtype.itemsize if model.config._experts_implementation == "grouped_mm" else 1
    for site in sites:
        weight = getattr(site.experts, "down_proj", None)
        if weight is None or weight.ndim != 3 or getattr(site.experts, "is_transposed", False):
            continue
        width = weight.shape[2]
        if width % tp_size:
            raise ValueError(
                f"tp_size={tp_size} must divide the experts' inner width, which is {width} in {site.name}; write another "
                "tp_size, or ep_size=tp_size, which keeps experts whole"
            )
        if width // tp_size % unit:
            raise ValueError(
                f"tp_size={tp_size} leaves {width // tp_size} of the experts' inner width {width} in {site.name}, and "
                f"grouped_mm needs multiples of {unit} in {dtype}; write experts_implementation='batched_mm', or "
                "ep_size=tp_size, which keeps experts whole"
            )
