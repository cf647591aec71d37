"""Which axis of a model each dimension of each of its tensors is.

Shapes do not say it: with 64 experts and a hidden size of 64 a router is square; a norm and a bias look alike; stacked
experts have three dimensions of which one is no width at all. So it is declared here, by the names of the live model (on
disk they may differ), and a name without a declaration is an error.
"""

import re
from dataclasses import dataclass
from typing import Any

HIDDEN, ATTENTION, INTERMEDIATE = "hidden", "attention", "intermediate"
LATENT, LATENT_INTERMEDIATE, SHARED_INTERMEDIATE = "latent", "latent_intermediate", "shared_intermediate"
DENSE_INTERMEDIATE, HEAD_DIM = "dense_intermediate", "head_dim"
# Not widths: they stay as they are while a model grows wider.
VOCAB, EXPERTS, RANK = "vocab", "experts", "rank"

# model_type of the configurations these tables describe.
DECLARED = ("mixtral", "mixtral_ext", "olmoe", "olmoe_ext", "granitemoe", "qwen3_moe", "qwen3_moe_ext")


@dataclass(frozen=True)
class Axes:
    """What a tensor maps from and to.

    Attributes:
        fan_out: axis of its output; of a norm's gain and a bias, the axis they lie along.
        fan_in: axis of its input; None for a norm's gain or a bias.
        adapts: of an adapter's part, the axes of the weight that the adapter is added to.
    """

    fan_out: str
    fan_in: str | None = None
    adapts: "Axes | None" = None


_MODEL: dict[str, Axes] = {
    r"embed_tokens\.weight": Axes(HIDDEN, VOCAB),
    r"lm_head\.weight": Axes(VOCAB, HIDDEN),
    r"self_attn\.[qkv]_proj\.weight": Axes(ATTENTION, HIDDEN),
    r"self_attn\.[qkv]_proj\.bias": Axes(ATTENTION),
    r"self_attn\.o_proj\.weight": Axes(HIDDEN, ATTENTION),
    r"self_attn\.o_proj\.bias": Axes(HIDDEN),
    r"self_attn\.[qk]_norm\.weight": Axes(ATTENTION),
    r"(?:input_layernorm|post_attention_layernorm|norm)\.weight": Axes(HIDDEN),
    r"mlp\.(?:gate|up)_proj\.weight": Axes(DENSE_INTERMEDIATE, HIDDEN),
    r"mlp\.(?:gate|up)_proj\.bias": Axes(DENSE_INTERMEDIATE),
    r"mlp\.down_proj\.weight": Axes(HIDDEN, DENSE_INTERMEDIATE),
    r"mlp\.down_proj\.bias": Axes(HIDDEN),
}
# Where a family's differ: Qwen3 has one gain for each place in a head, the same for all heads.
_QWEN3 = {r"self_attn\.[qk]_norm\.weight": Axes(HEAD_DIM)}
_OF_FAMILY: dict[str, dict[str, Axes]] = {"qwen3_moe": _QWEN3, "qwen3_moe_ext": _QWEN3}
_ROUTER = Axes(EXPERTS, HIDDEN)
_STANDARD: dict[str, Axes] = {
    r"(?:mlp\.gate|block_sparse_moe\.router)\.weight": _ROUTER,
    r"experts\.gate_up_proj": Axes(INTERMEDIATE, HIDDEN),
    r"experts\.down_proj": Axes(HIDDEN, INTERMEDIATE),
}
_DCCA: dict[str, Axes] = {
    r"mlp\.gate\.weight": _ROUTER,
    r"mlp\.descend\.weight": Axes(LATENT, HIDDEN),
    r"mlp\.ascend\.weight": Axes(HIDDEN, LATENT),
    r"mlp\.latent_norm\.weight": Axes(LATENT),
    r"experts\.(?:gate_up|up)_proj": Axes(LATENT_INTERMEDIATE, LATENT),
    r"experts\.down_proj": Axes(LATENT, LATENT_INTERMEDIATE),
    r"shared_expert\.(?:gate|up)_proj\.weight": Axes(SHARED_INTERMEDIATE, HIDDEN),
    r"shared_expert\.down_proj\.weight": Axes(HIDDEN, SHARED_INTERMEDIATE),
}
_FIRST, _DOWN = Axes(INTERMEDIATE, HIDDEN), Axes(HIDDEN, INTERMEDIATE)
# Values of a sparse delta are entries of the matrix they are added to, and get what it gets.
_DERS: dict[str, Axes] = {
    r"mlp\.gate\.weight": _ROUTER,
    r"experts\.gate_up_proj": _FIRST,
    r"experts\.gate_up_proj_bias": Axes(INTERMEDIATE),
    r"experts\.down_proj": _DOWN,
    r"experts\.down_proj_bias": Axes(HIDDEN),
    r"experts\.delta_(?:gate|up)_A": Axes(RANK, HIDDEN, _FIRST),
    r"experts\.delta_(?:gate|up)_B": Axes(INTERMEDIATE, RANK, _FIRST),
    r"experts\.delta_(?:gate|up)_values": Axes(INTERMEDIATE, HIDDEN, _FIRST),
    r"experts\.delta_down_A": Axes(RANK, INTERMEDIATE, _DOWN),
    r"experts\.delta_down_B": Axes(HIDDEN, RANK, _DOWN),
    r"experts\.delta_down_values": Axes(HIDDEN, INTERMEDIATE, _DOWN),
    r"shared_expert\.(?:gate|up)_proj\.weight": Axes(SHARED_INTERMEDIATE, HIDDEN),
    r"shared_expert\.(?:gate|up)_proj\.bias": Axes(SHARED_INTERMEDIATE),
    r"shared_expert\.down_proj\.weight": Axes(HIDDEN, SHARED_INTERMEDIATE),
    r"shared_expert\.down_proj\.bias": Axes(HIDDEN),
}
_BLOCKS: dict[str, dict[str, Axes]] = {"standard": _STANDARD, "dcca": _DCCA, "ders": _DERS, "dense": {}}

# What wrappers put into names (DDP, FSDP, torch.compile, PEFT), in front and in between.
_WRAPPERS = re.compile(
    r"(?:^module\.)|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|^base_model\.model\.|"
    r"modules_to_save\.[^.]+\.|\bbase_layer\.|\boriginal_module\."
)
_LAYER = re.compile(r"\blayers\.(\d+)\.")
# PEFT's LoRA on a projection, and PERFT's tensors beside the experts or the router; the adapter's name stands at the end.
_LORA = re.compile(r"(?P<host>.+)\.lora_(?P<half>A|B|embedding_A|embedding_B)\.[^.]+(?:\.weight)?$")
_PERFT = re.compile(r"\.perft_(?P<part>A|B|router|base_router|base_router_A|base_router_B)\.[^.]+$")


def clean_name(name: str) -> str:
    """A parameter's name in the bare model, without what DDP, FSDP, ``torch.compile`` and PEFT add."""
    previous = None
    while previous != name:  # DDP around PEFT around compile
        previous, name = name, _WRAPPERS.sub("", name)
    return name


def read_axes(name: str, config: Any) -> Axes:
    """The axes of one parameter.

    Args:
        name: as in ``named_parameters``, wrapped or not.
        config: the model's; ``moe_blocks``, where it has it, says which block each layer is.

    Raises:
        ValueError: nothing is declared for this name.
    """
    bare = clean_name(name)
    found = _read_adapter(bare, config) or _find(bare, config)
    if found is None:
        raise ValueError(
            f"parameter {bare!r} of a {getattr(config, 'model_type', None)!r} model has no declared axes, so its role "
            "(initial scale, learning rate) is not known; declare it in hf_moe_ext/host/axes.py, or freeze it"
        )
    return found


def _find(name: str, config: Any) -> Axes | None:
    layer = _LAYER.search(name)
    blocks = getattr(config, "moe_blocks", None)
    block = blocks[int(layer[1])] if layer and blocks is not None else "standard"
    family = _OF_FAMILY.get(str(getattr(config, "model_type", None)), {})
    for pattern, axes in (_MODEL | family | _BLOCKS[block]).items():
        if re.search(rf"(?:^|\.){pattern}$", name):
            return axes
    return None


def _read_adapter(name: str, config: Any) -> Axes | None:
    """LoRA and PERFT: a rank stands in the place of one of the host's axes."""
    if lora := _LORA.match(name):
        host = _find(f"{lora['host']}.weight", config) or _find(lora["host"], config)
        if lora["host"].endswith(".experts"):
            raise ValueError(
                f"parameter {name!r}: LoRA on stacked experts (target_parameters) does not say in its names which matrix it "
                "adapts, so its role is not known; adapt experts with PERFT, or give the optimizer groups of your own"
            )
        if host is None or host.fan_in is None:
            return None
        return Axes(RANK, host.fan_in, host) if lora["half"].endswith("A") else Axes(host.fan_out, RANK, host)
    if perft := _PERFT.search(name):
        block = name[: perft.start()].rpartition(".")[0]
        first = _find(f"{block}.experts.gate_up_proj", config)  # its fan_in is the width that the experts are handed
        if first is None or first.fan_in is None:
            return None
        return {
            "A": Axes(RANK, first.fan_in),
            "B": Axes(first.fan_in, RANK),
            "router": Axes(EXPERTS, first.fan_in),
            "base_router": Axes(EXPERTS, HIDDEN, _ROUTER),
            "base_router_A": Axes(RANK, HIDDEN, _ROUTER),
            "base_router_B": Axes(EXPERTS, RANK, _ROUTER),
        }[perft["part"]]
    return None
