"""The same layer read from every way of storing it, and what is wrong with it by name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_moe_ext import OlmoeExtConfig, OlmoeExtForCausalLM
from hf_moe_ext.convert.checkpoint import SINGLE_FILE, CheckpointReader
from hf_moe_ext.convert.expert_layout import DOWN, GATE_UP, check_standard_block, outer_names, read_layer
from support import zoo


def edit(folder: Path, change: dict[str, Tensor | None]) -> CheckpointReader:
    """Add, replace or (None) remove tensors."""
    tensors = load_file(folder / SINGLE_FILE) | {n: t for n, t in change.items() if t is not None}
    save_file({n: t for n, t in tensors.items() if change.get(n, t) is not None}, folder / SINGLE_FILE)
    return CheckpointReader(folder)


@pytest.mark.parametrize(("family", "experts"), [("olmoe", 8), ("mixtral", 4)])
def test_stock_checkpoints_give_the_tensors_of_the_modules(tmp_path: Path, family: str, experts: int) -> None:
    model = zoo.build(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    reader = CheckpointReader(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    for layer in range(2):
        state = read_layer(reader, layer, experts)
        wanted = model.model.layers[layer].state_dict()
        assert state.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(state[name], tensor), name
    outer = set(outer_names(reader))
    assert outer == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_stacked_checkpoints_read_alike(tmp_path: Path) -> None:
    settings = zoo.FAMILIES["olmoe"]().to_dict()
    settings.pop("model_type")
    model = OlmoeExtForCausalLM(OlmoeExtConfig(**settings))
    model.save_pretrained(tmp_path)
    state = read_layer(CheckpointReader(tmp_path), 1, 8)
    for name, tensor in model.model.layers[1].state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_wrong_layers_are_refused_by_name(tmp_path: Path) -> None:
    zoo.build("olmoe").save_pretrained(tmp_path)
    reader = CheckpointReader(tmp_path)
    with pytest.raises(ValueError, match="has no layer 2"):
        read_layer(reader, 2, 8)
    with pytest.raises(ValueError, match=r"config\.json says 9 experts, but there is no gate_proj of expert 8"):
        read_layer(reader, 0, 9)
    with pytest.raises(ValueError, match=r"config\.json says 7 experts, but there are matrices of 8"):
        read_layer(reader, 0, 7)
    reader = edit(tmp_path, {"model.layers.0.mlp.experts.3.up_proj.weight": None})
    with pytest.raises(ValueError, match="there is no up_proj of expert 3"):
        read_layer(reader, 0, 8)


def test_blocks_that_are_not_standard_are_refused_by_name(tmp_path: Path) -> None:
    model = zoo.build("olmoe")
    model.save_pretrained(tmp_path)
    shapes = {GATE_UP: (8, 96, 32), DOWN: (8, 32, 48), "mlp.gate.weight": (8, 32)}
    check_standard_block(read_layer(CheckpointReader(tmp_path), 0, 8), 0, shapes)
    with pytest.raises(
        ValueError, match=r"mlp\.experts\.down_proj is \(8, 32, 48\), its config\.json says \(8, 32, 64\)"
    ):
        check_standard_block(read_layer(CheckpointReader(tmp_path), 0, 8), 0, shapes | {DOWN: (8, 32, 64)})
    reader = edit(tmp_path, {"model.layers.0.mlp.gate.bias": torch.zeros(8)})
    with pytest.raises(ValueError, match=r"layer 0 has mlp\.gate\.bias beside its router and experts.*--layers"):
        check_standard_block(read_layer(reader, 0, 8), 0, shapes)
    reader = edit(tmp_path, {"model.layers.1.mlp.gate.weight": None})
    with pytest.raises(ValueError, match=r"layer 1 of the checkpoint has no mlp\.gate\.weight"):
        check_standard_block(read_layer(reader, 1, 8), 1, shapes)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    zoo.build("olmoe").save_pretrained(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    reader = edit(tmp_path, {name: torch.zeros(32, 32, dtype=dtype)})
    with pytest.raises(ValueError, match=f"q_proj.weight is stored as {dtype}, so it is quantised"):
        read_layer(reader, 0, 8)
