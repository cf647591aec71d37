"""What cannot work is refused by name, with the next step, and leaves the model as it was."""

import json
import re

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from hf_moe_ext import PerftConfig
from hf_moe_ext.perft.layer import PerftLayer
from support import zoo


def config(**arguments):
    return PerftConfig(**{"r": 4, "init_weights": False, "task_type": "CAUSAL_LM"} | arguments)


def fingerprint(model):
    """Everything an attachment would change."""
    return (
        [(name, type(module).__name__) for name, module in model.named_modules()],
        {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        len(model._forward_hooks),
        len(model._forward_pre_hooks),
        hasattr(model, "peft_config"),
    )


def refused(model, arguments, error, words):
    before = fingerprint(model)
    with pytest.raises(error, match=words):
        get_peft_model(model, config(**arguments))
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("llama", "No MoE block found in LlamaForCausalLM .model_type 'llama'.; supported: .*mixtral"),
        (
            "llama4",
            r"cannot be served: Llama4TextExperts at .* takes \(hidden_states\), not \(hidden_states, index, weights\)",
        ),
        ("jetmoe", "JetMoeParallelExperts at .* cannot be served|cannot be served: JetMoe"),
    ],
)
def test_a_model_without_blocks_we_can_serve(family, words):
    refused(zoo.build(family), {}, NoMatchingPeftModuleError, words.partition("mixtral")[0])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"target_modules": ["expert"]}, NoMatchingPeftModuleError, r"no experts module is left by target_modules=\{'expert'\}"),
        ({"target_modules": "nothing.*"}, NoMatchingPeftModuleError, "this model has: model.layers.0.mlp.experts"),
        ({"target_modules": ["q_proj"]}, ValueError, r"'model.layers.0.self_attn.q_proj' \(Linear\), which is not the experts"),
        ({"target_modules": "all-linear"}, ValueError, "target_modules"),
        ({"layers_to_transform": [9]}, NoMatchingPeftModuleError, r"layers_to_transform=\[9\]"),
        ({"exclude_modules": ["experts"]}, NoMatchingPeftModuleError, r"exclude_modules=\{'experts'\}"),
        ({"modules_to_save": ["no_such_head"]}, ValueError, "no_such_head"),
    ],
)  # fmt: skip
def test_targets_that_match_nothing_or_the_wrong_thing(arguments, error, words):
    refused(zoo.build("olmoe"), arguments, error, words)


class Router(nn.Linear):
    pass


class Experts(nn.Module):
    def __init__(self, width=8, count=3):
        super().__init__()
        self.num_experts, self.hidden_dim = count, width
        self.up_proj = nn.Parameter(torch.randn(count, width, width))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        picked = torch.einsum("td,tkhd->tkh", hidden_states, self.up_proj[top_k_index])
        return (picked * top_k_weights[..., None]).sum(1)


class Custom(nn.Module):
    """A model of one's own: served by structure, but its router's rule is nobody's to know."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = Router(8, 3), Experts()

    def forward(self, hidden_states):
        weights, index = self.router(hidden_states).softmax(-1).topk(2)
        return self.experts(hidden_states, index, weights)


def test_an_unknown_routers_rule_must_be_said():
    model = Custom()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"Experts .* is not known; write normalize_top_k=True or False"):
        get_peft_model(model, config(task_type=None))
    assert fingerprint(model) == before
    served = get_peft_model(model, config(task_type=None, normalize_top_k=True))
    assert served(torch.randn(5, 8)).shape == (5, 8)


@pytest.fixture
def saved(tmp_path):
    """(base folder, adapter folder) of a PERFT-R adapter."""
    zoo.build("olmoe").save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config())
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


KEY = "base_model.model.model.layers.1.mlp.experts.perft_A"


def _drop(tensors):
    del tensors[KEY]


def _add(tensors):
    tensors[KEY.replace("layers.1", "layers.7")] = tensors[KEY].clone()


def _reshape(tensors):
    tensors[KEY] = torch.zeros(4, 5, 32)


BROKEN = {
    "missing": (_drop, r"lacks 1 tensors \(.*layers.1.mlp.experts.perft_A"),
    "extra": (_add, r"has 1 tensors \(.*layers.7.mlp.experts.perft_A.*\) that do not belong here"),
    "shape": (_reshape, r"layers.1.mlp.experts.perft_A.* has shape \(4, 5, 32\), .* needs \(4, 4, 32\)"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_file_that_does_not_fit_is_refused_and_nothing_stays(fault, saved):
    base_folder, adapter = saved
    breaking, words = BROKEN[fault]
    tensors = load_file(adapter / "adapter_model.safetensors")
    breaking(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")

    base = AutoModelForCausalLM.from_pretrained(base_folder)
    before = fingerprint(base)
    parameters = {name: value[0] for name, value in before[1].items()}
    with pytest.raises(ValueError, match=words):
        PeftModel.from_pretrained(base, adapter)
    after = fingerprint(base)
    assert after[0] == before[0]
    assert {name: value[0] for name, value in after[1].items()} == parameters
    assert after[2:] == before[2:]

    with pytest.raises(ValueError, match=words):
        AutoPeftModelForCausalLM.from_pretrained(adapter)

    second = get_peft_model(base, config(variant="S"), adapter_name="good")
    names = set(second.state_dict())
    with pytest.raises(ValueError, match=words):
        second.load_adapter(adapter, "bad")
    assert set(second.state_dict()) == names
    assert set(second.peft_config) == {"good"}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_failed_load_leaves_a_live_adapter_as_it_was(fault, saved):
    """What a resumed training does: it loads into the adapter that is already there."""
    base_folder, adapter = saved
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), adapter, is_trainable=True)
    model(input_ids=torch.tensor([[3, 4, 5]]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = load_file(adapter / "adapter_model.safetensors")
    BROKEN[fault][0](tensors)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=BROKEN[fault][1]):
        model.load_adapter(adapter, "default")
    assert set(model.state_dict()) == set(before)
    assert set(model.peft_config) == {"default"}


def test_transformers_own_loader_refuses_a_file_of_which_nothing_fits(saved):
    base_folder, adapter = saved
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({f"other.{name}": t for name, t in tensors.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 6 tensors"):
        AutoModelForCausalLM.from_pretrained(base_folder).load_adapter(str(adapter))


def test_a_partial_file_loaded_for_training_is_refused_before_the_first_step(saved):
    base_folder, adapter = saved
    tensors = load_file(adapter / "adapter_model.safetensors")
    _drop(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model.load_adapter(str(adapter), is_trainable=True)
    with pytest.raises(ValueError, match="lacks 1 tensors"):
        model(input_ids=torch.tensor([[3, 4, 5]]))


@pytest.mark.parametrize("name", ["a.b", "keys"])
def test_a_name_pytorch_cannot_hold(name):
    model = zoo.build("olmoe")
    before = fingerprint(model)
    with pytest.raises(ValueError, match="cannot name a parameter; use letters"):
        get_peft_model(model, config(), adapter_name=name)
    assert fingerprint(model) == before


def test_a_pickled_adapter_in_the_hubs_cache_is_refused(saved, tmp_path):
    _, adapter = saved
    repository = tmp_path / "hub" / "models--somebody--adapter"
    snapshot = repository / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123456789abcdef")
    (snapshot / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    torch.save({}, snapshot / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"somebody/adapter/adapter_model.bin is a pickle"):
        PerftConfig.from_pretrained("somebody/adapter", cache_dir=str(tmp_path / "hub"))


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_transformers_own_loader_refuses_a_partial_file(fault, saved):
    """Transformers prints a table of what was missing and would go on; extra tensors it only lists."""
    base_folder, adapter = saved
    tensors = load_file(adapter / "adapter_model.safetensors")
    BROKEN[fault][0](tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    before = fingerprint(base)[0]
    with pytest.raises((ValueError, RuntimeError), match=re.escape("perft_A.default") + "|ignore_mismatched_sizes"):
        base.load_adapter(str(adapter))
    assert fingerprint(base)[0] == before


def test_an_adapter_for_another_shape_is_refused(saved, tmp_path):
    _, adapter = saved
    other = zoo.build("olmoe", hidden_size=64)
    with pytest.raises(ValueError, match=r"needs \(4, 4, 64\); load it on the base model it was trained for"):
        PeftModel.from_pretrained(other, adapter)
    assert not any(isinstance(m, PerftLayer) for m in other.modules())


def test_ignore_mismatched_sizes_is_the_users_word(saved):
    _, adapter = saved
    other = zoo.build("olmoe", hidden_size=64)
    with pytest.warns(UserWarning, match="layers.0.mlp.experts.perft_A") as caught:
        PeftModel.from_pretrained(other, adapter, ignore_mismatched_sizes=True)
    messages = " ".join(str(warning.message) for warning in caught)
    assert "ignore_mismatched_sizes=True" in messages
    assert "layers.0.mlp.experts.perft_A" in messages


def test_a_pickled_adapter_is_refused_when_its_config_is_read(saved):
    base_folder, adapter = saved
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model.bin is a pickle, .* adapter_model.safetensors only"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), adapter)
    with pytest.raises(ValueError, match="is a pickle"):
        PerftConfig.from_pretrained(adapter)


def test_saving_as_a_pickle_is_refused(tmp_path):
    model = get_peft_model(zoo.build("olmoe"), config())
    with pytest.raises(ValueError, match="is a pickle"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "adapter_config.json").exists()


def test_a_meaningless_configuration_on_disk_is_refused_when_read(saved):
    base_folder, adapter = saved
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"top_k": 9}))
    with pytest.raises(ValueError, match="top_k must be between 1 and num_experts=4; got 9"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), adapter)
