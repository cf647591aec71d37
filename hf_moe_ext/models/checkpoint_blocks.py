"""Whether a checkpoint's MoE blocks are those of the configuration it is read with."""

import re
from typing import Any

_LAYER = re.compile(r"layers\.(\d+)\.")


def refuse_other_blocks(model: Any, info: Any) -> None:
    """Raise if loading would leave weights of a MoE block at random, or drop some.

    Args:
        model: the model, its weights read.
        info: Transformers' account of the loading: ``missing_keys``, ``mismatched_keys``, ``unexpected_keys``.

    Raises:
        ValueError: naming the layers and the first such weight.
    """
    weight = re.compile(r"layers\.(\d+)\.mlp\..*(?:proj|weight|bias|_(?:A|B|values|stream|positions|codes|scales))$")
    # A layer of which nothing was found (a truncated checkpoint, a state dict of the head) is Transformers' to report.
    read = {found[1] for key in model.state_dict() if (found := _LAYER.search(key)) and key not in info.missing_keys}
    missing = sorted(key for key in info.missing_keys if (found := weight.search(key)) and found[1] in read)
    mismatched = sorted(key for key in info.mismatched_keys if weight.search(key[0]))
    unexpected = sorted(key for key in info.unexpected_keys if weight.search(key))
    if not (missing or mismatched or unexpected):
        return
    names = missing + [key[0] for key in mismatched] + unexpected
    layers = sorted({int(found[1]) for key in names if (found := weight.search(key))})
    config = model.config
    wanted = sorted({config.moe_blocks[layer] for layer in layers if layer < len(config.moe_blocks)})
    if missing:
        example = f"it has no {missing[0]}"
    elif mismatched:
        key, theirs, ours = mismatched[0]
        example = f"its {key} is {tuple(theirs)}, the model's {tuple(ours)}"
    else:
        example = f"the model has no {unexpected[0]}"
    raise ValueError(
        f"the checkpoint's MoE blocks in layers {', '.join(map(str, layers))} are not those of the configuration "
        f"(moe_block={' or '.join(map(repr, wanted))}, {_list_keys(config, wanted)}): {example}; load it with its own "
        f"config.json, or convert a {_ORIGIN['ders' if 'ders' in wanted else 'other']}"
    )


_ORIGIN = {
    "ders": "dense checkpoint with `hf-moe upcycle`, a trained one with `hf-moe compress`",
    "other": "standard checkpoint with `hf-moe to-dcca`",
}
_DERS_KEYS = (
    "ders_delta",
    "ders_rank",
    "ders_drop_rate",
    "ders_bits",
    "ders_group_size",
    "ders_stored_positions",
    "ders_bias",
    "ders_share_universal",
    "moe_shared_expert_intermediate_size",
)


def _list_keys(config: Any, blocks: list[str]) -> str:
    """The keys that decide on the tensors of these blocks, with their values."""
    names = _DERS_KEYS if "ders" in blocks else ()
    if not names or "dcca" in blocks:
        names = (*names, "moe_latent_size", "moe_expert_gated")
    return ", ".join(f"{name}={getattr(config, name)!r}" for name in names)
