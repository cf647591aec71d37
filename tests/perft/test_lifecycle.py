"""The life of an adapter: attach, switch, mix, save, reopen, disable, delete, unload."""

import copy
import json
import logging
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_moe_ext import PerftConfig
from hf_moe_ext.perft.layer import PerftLayer
from support import zoo
from support.perft import batch

VARIANTS = ("R", "E", "D", "S")
STATE_DICT_KEYS = {
    "R": ("perft_A", "perft_B", "perft_router"),
    "E": ("perft_A", "perft_B"),
    "D": ("perft_A", "perft_B"),
    "S": ("perft_A", "perft_B"),
}


def config(variant="R", **arguments):
    return PerftConfig(variant=variant, task_type="CAUSAL_LM", **{"r": 4, "init_weights": False} | arguments)


@pytest.fixture
def base_folder(tmp_path):
    """A tiny OLMoE on disk."""
    folder = tmp_path / "base"
    zoo.build("olmoe").save_pretrained(folder)
    return folder


def logits(model, **kwargs):
    model.eval()
    with torch.no_grad():
        inputs = batch()
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **kwargs).logits


def pretrained(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_on_disk_are_these(variant, tmp_path):
    """A golden list: a renamed tensor is a breaking change."""
    model = get_peft_model(zoo.build("olmoe"), config(variant))
    model.save_pretrained(tmp_path)
    layers = model.get_base_model().config.num_hidden_layers
    expected = {
        f"base_model.model.model.layers.{i}.mlp.experts.{name}"
        for i in range(layers)
        for name in STATE_DICT_KEYS[variant]
    }
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_loader_reopens_it_exactly(variant, base_folder, tmp_path):
    base = pretrained(base_folder)
    plain = logits(base)
    model = get_peft_model(base, config(variant))
    trained = logits(model)
    assert not torch.equal(plain, trained)
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    added = pretrained(base_folder)
    added.load_adapter(str(adapter))
    for reopened in (
        PeftModel.from_pretrained(pretrained(base_folder), adapter),
        PeftModel.from_pretrained(pretrained(base_folder), adapter, low_cpu_mem_usage=True),
        AutoPeftModelForCausalLM.from_pretrained(adapter),
        AutoModelForCausalLM.from_pretrained(adapter),
        added,
    ):
        assert torch.equal(logits(reopened), trained)
    assert torch.equal(logits(model.unload()), plain)


def test_it_reopens_in_a_fresh_process_with_one_import(base_folder, tmp_path):
    model = get_peft_model(pretrained(base_folder), config())
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    torch.save(batch(), tmp_path / "batch.pt")
    code = """
import sys, torch, hf_moe_ext
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(f"{folder}/adapter").eval()
inputs = torch.load(f"{folder}/batch.pt")
with torch.no_grad():
    torch.save(model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits, f"{folder}/out.pt")
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)


def test_the_card_starts_with_the_loading_snippet_and_keeps_what_was_written(base_folder, tmp_path):
    model = get_peft_model(pretrained(base_folder), config())
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "README.md"
    text = path.read_text()
    body = text.split("---\n", 2)[2]
    assert "More Information Needed" not in body
    assert "- PEFT " in body
    assert body.index("import hf_moe_ext") < body.index("AutoPeftModelForCausalLM.from_pretrained") < 600
    path.write_text(text + "\nMy own words.\n")
    model.save_pretrained(tmp_path / "adapter")
    again = path.read_text()
    assert again.count("import hf_moe_ext") == 1
    assert again.rstrip().endswith("My own words.")


def test_the_snippet_loads_the_task(tmp_path):
    PerftConfig(task_type="SEQ_CLS").save_pretrained(tmp_path)
    assert "AutoPeftModelForSequenceClassification.from_pretrained" in (tmp_path / "README.md").read_text()


def test_the_snippet_names_the_folder_as_the_user_does(base_folder, tmp_path, monkeypatch):
    model = get_peft_model(pretrained(base_folder), config())
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("outputs/mine")
    assert 'from_pretrained("outputs/mine")' in (tmp_path / "outputs/mine/README.md").read_text()
    model.save_pretrained(tmp_path / "elsewhere")  # a temporary folder, as a push to the Hub uses
    assert 'from_pretrained("path/or/hub-id")' in (tmp_path / "elsewhere/README.md").read_text()


def test_several_adapters_switch_add_up_and_go(base_folder):
    base = pretrained(base_folder)
    plain = logits(base)
    model = get_peft_model(base, config("R"), adapter_name="one")
    model.add_adapter("two", config("E"))
    alone = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        alone[name] = logits(model)
        trainable = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
        assert trainable == {name}
    assert not torch.equal(alone["one"], alone["two"])
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    assert not torch.equal(both, alone["one"])
    assert not torch.equal(both, alone["two"])
    model.set_adapter("one")
    model.delete_adapter("two")
    assert torch.equal(logits(model), alone["one"])
    assert not any(name.endswith(".two") for name, _ in model.named_parameters())
    model.add_adapter("three", config("S"))
    with pytest.warns(UserWarning, match="Setting active adapter to three"):
        model.delete_adapter("one")
    assert not any(name.endswith(".one") for name, _ in model.named_parameters())
    bare = model.unload()
    assert torch.equal(logits(bare), plain)
    assert not bare._forward_hooks
    assert not bare._forward_pre_hooks
    assert not any(isinstance(m, PerftLayer) for m in bare.modules())


def test_transformers_own_adapter_methods(base_folder, tmp_path):
    model = pretrained(base_folder)
    plain = logits(model)
    model.add_adapter(config("R"), "one")
    trained = logits(model)
    assert not torch.equal(trained, plain)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    reopened = pretrained(base_folder)
    reopened.load_adapter(str(tmp_path), adapter_name="one")
    assert torch.equal(logits(reopened), trained)
    model.delete_adapter("one")
    assert torch.equal(logits(model), plain)


def test_modules_to_save_and_token_embeddings_train_and_travel(base_folder, tmp_path):
    model = get_peft_model(
        pretrained(base_folder), config("S", modules_to_save=["lm_head"], trainable_token_indices=[5, 6])
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**batch()).loss.backward()
    optimizer.step()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    saved = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert any("lm_head" in key for key in saved)
    assert torch.equal(logits(PeftModel.from_pretrained(pretrained(base_folder), tmp_path)), expected)


def test_state_dict_functions_without_a_peft_model(base_folder):
    model = inject_adapter_in_model(config("R"), pretrained(base_folder))
    state = get_peft_model_state_dict(model)
    expected = logits(model)
    other = inject_adapter_in_model(config("R", init_weights=True), pretrained(base_folder))
    assert not torch.equal(logits(other), expected)
    set_peft_model_state_dict(other, state)
    assert torch.equal(logits(other), expected)


def test_patterns_and_layer_choices():
    model = get_peft_model(
        zoo.build("olmoe", num_hidden_layers=3),
        config("S", layers_to_transform=[0, 2], rank_pattern={"layers.2.mlp.experts": 7}, alpha_pattern={"experts": 8}),
    )
    layers = {m.site_name: m.settings["default"] for m in model.modules() if isinstance(m, PerftLayer)}
    assert {name: s.rank for name, s in layers.items()} == {
        "model.layers.0.mlp.experts": 4,
        "model.layers.2.mlp.experts": 7,
    }
    assert {s.scale for s in layers.values()} == {8 / 4, 8 / 7}
    excluded = get_peft_model(zoo.build("olmoe"), config("S", exclude_modules=["layers.0.mlp.experts"]))
    assert [m.site_name for m in excluded.modules() if isinstance(m, PerftLayer)] == ["model.layers.1.mlp.experts"]


def test_a_copy_is_independent():
    model = get_peft_model(zoo.build("olmoe"), config("R"))
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "perft_B" in name:
                parameter.zero_()
    assert torch.equal(logits(model), expected)
    twin.train()(**batch()).loss.backward()
    states = {id(m.state) for m in model.modules() if isinstance(m, PerftLayer)}
    twin_states = {id(m.state) for m in twin.modules() if isinstance(m, PerftLayer)}
    assert len(states) == len(twin_states) == 1
    assert states != twin_states


def test_attaching_tells_what_trains(caplog):
    caplog.set_level(logging.INFO, "hf_moe_ext")
    get_peft_model(zoo.build("olmoe"), config("R"))
    assert "model.layers.0.mlp.experts: perft_A [4, 4, 32], perft_B [4, 32, 4], perft_router [4, 32]" in caplog.text
    assert "active per token" in caplog.text
    assert "2,304 parameters in 2 modules, 1,280 active per token" in caplog.text


@pytest.mark.parametrize("call", ["merge_and_unload", "merge_adapter", "unmerge_adapter"])
def test_merging_is_refused_in_one_sentence_and_changes_nothing(call):
    model = get_peft_model(zoo.build("olmoe"), config())
    before = logits(model)
    with pytest.raises(ValueError, match=r"PERFT adapters cannot be merged.*keep the adapter beside the model"):
        getattr(model, call)()
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="cannot be averaged into one"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def mixed_model():
    model = get_peft_model(zoo.build("olmoe"), config("R"), adapter_name="one")
    model.add_adapter("two", config("E"))
    model.add_adapter("three", config("S"))
    return model.eval()


def test_mixed_batches_serve_each_row_its_own():
    model, inputs = mixed_model(), batch(rows=5)
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    names = ["two", "__base__", "one", "three", "one"]
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=names).logits
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    expected = model(**inputs).logits
            else:
                model.set_adapter(name)
                expected = model(**inputs).logits
            real = inputs["attention_mask"][row].bool()
            torch.testing.assert_close(mixed[row][real], expected[row][real], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "arguments", [{}, {"num_beams": 3}, {"do_sample": False, "num_beams": 2, "num_return_sequences": 2}]
)
def test_mixed_batches_generate(arguments):
    model = mixed_model()
    ids = torch.randint(3, zoo.VOCAB_SIZE, (3, 5))
    settings = {"max_new_tokens": 4, "do_sample": False} | arguments
    names = ["one", "__base__", "two"]
    mixed = model.generate(input_ids=ids, adapter_names=names, **settings)
    each = mixed.shape[0] // 3
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = model.generate(input_ids=ids[row : row + 1], **settings)
        else:
            model.set_adapter(name)
            expected = model.generate(input_ids=ids[row : row + 1], **settings)
        assert mixed[row * each : (row + 1) * each, : expected.shape[1]].tolist() == expected.tolist()


def test_mixed_batches_refuse_what_they_cannot_serve():
    model, ids = mixed_model(), torch.randint(3, zoo.VOCAB_SIZE, (2, 6))
    with pytest.raises(
        ValueError,
        match=r"`adapter_names` should be the same as the number of inputs, but got 3 and 2.*one name per row",
    ):
        model(input_ids=ids, adapter_names=["one", "two", "one"])
    with pytest.raises(
        ValueError, match=r"non-existing adapter\(s\): four. Names for adapter_names: one, two, three, __base__"
    ):
        model(input_ids=ids, adapter_names=["one", "four"])
    with pytest.raises(TypeError, match="must be a list"):
        model(input_ids=ids, adapter_names="one")
    settings = {"max_new_tokens": 2, "num_beams": 2}
    for names in (["one"], ["one", "two", "one", "two"]):
        with pytest.raises(ValueError, match="adapter_names"):
            model.generate(input_ids=ids, adapter_names=names, **settings)
    norms = get_peft_model(zoo.build("olmoe"), config("S", modules_to_save=["norm"])).eval()
    with pytest.raises(ValueError, match=r"norm' \(OlmoeRMSNorm\) is in modules_to_save"):
        norms(input_ids=ids, adapter_names=["default", "__base__"])
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="padding-free"):
        model(input_ids=ids[:1], position_ids=packed, adapter_names=["one"])
    with pytest.raises(ValueError, match=r"when the model is in training mode. Call model.eval"):
        model.train()(input_ids=ids, adapter_names=["one", "two"])
    bare = zoo.build("olmoe")
    bare.add_adapter(config("R"))
    with pytest.raises(ValueError, match="needs the PeftModel"):
        bare.eval()(input_ids=ids, adapter_names=["default", "default"])
    assert model.eval()(input_ids=ids).logits.isfinite().all(), "a refusal leaves nothing behind"


def test_status_names_the_method():
    model = get_peft_model(zoo.build("olmoe"), config("R"))
    status = model.get_model_status()
    assert status.peft_types == {"default": "PERFT"}
    assert status.trainable_params == 2304
    assert json.loads(json.dumps(model.peft_config["default"].peft_type)) == "PERFT"
    assert "default: R lora 4x r=4" in repr(model)
