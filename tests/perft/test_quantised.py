"""Adapters on quantised bases: they train, save and reopen, and experts left in bfloat16 are said, with their bytes."""

import logging
import subprocess
import sys
import warnings

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import Trainer, TrainingArguments

from hf_moe_ext import PerftConfig
from hf_moe_ext.perft.doctor import diagnose
from hf_moe_ext.perft.report import describe_trainable, format_bytes
from support import quantised, zoo
from support.doctor import base_folder, codes
from support.perft import batch

# Said at every attachment here, see test_it_warns; the others need not hear it again.
pytestmark = pytest.mark.filterwarnings("ignore:PERFT. the base model was quantised:UserWarning")

VARIANTS = ("R", "E", "D", "S")


def attach(base, variant="R", **arguments):
    torch.manual_seed(1)
    config = {"variant": variant, "r": 4, "init_weights": False, "task_type": "CAUSAL_LM"} | arguments
    return get_peft_model(base, PerftConfig(**config))


def logits(model):
    inputs = batch()
    with torch.no_grad():
        return model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


@pytest.fixture
def routed_in(monkeypatch):
    """The dtypes in which adapter routers chose."""
    from hf_moe_ext.perft import layer as module

    seen, real = set(), module.choose_experts
    monkeypatch.setattr(module, "choose_experts", lambda x, top_k: (seen.add(x.dtype), real(x, top_k))[1])
    return seen


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """One saved bfloat16 model per family."""
    found = {family: tmp_path_factory.mktemp(family) for family in quantised.FAMILIES}
    for family, folder in found.items():
        quantised.save(folder, family)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", quantised.FAMILIES)
@pytest.mark.parametrize("kind", quantised.ON_CPU)
def test_the_trainer_moves_the_adapter_and_nothing_else(kind, family, variant, folders, routed_in, tmp_path):
    model = attach(quantised.load(folders[family], kind), variant)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "perft_" in name}
    base = quantised.contents(model)
    rows = zoo.random_batch(batch=4, length=8)
    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, warmup_steps=0,
        report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, save_strategy="no",
        activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    result = Trainer(model, settings, train_dataset=Dataset.from_dict({k: v.tolist() for k, v in rows.items()})).train()
    assert torch.tensor(result.training_loss).isfinite()
    parameters = dict(model.named_parameters())
    for name, old in before.items():
        assert parameters[name].dtype == torch.float32, name
        assert not torch.equal(parameters[name], old), name
    after = quantised.contents(model)
    assert after.keys() == base.keys()
    for name, parts in base.items():
        assert all(torch.equal(a, b) for a, b in zip(parts, after[name], strict=True)), name
    assert routed_in == ({torch.float32} if variant == "R" else set())


@pytest.mark.slow
def test_a_fresh_process_and_a_freshly_quantised_base_give_the_same_logits(folders, tmp_path):
    """One process for all libraries: importing them takes longer than all else here."""
    kinds, expected = [kind for kind in quantised.ON_CPU if quantised.installed(kind)], {}
    assert {kind.partition("-")[0] for kind in kinds} >= set(quantised.REQUIRED)
    for kind in kinds:
        for variant in VARIANTS:
            model = attach(quantised.load(folders["olmoe"], kind), variant)
            expected[kind, variant] = logits(model)
            model.save_pretrained(tmp_path / kind / variant)
        assert not torch.equal(expected[kind, "D"], expected[kind, "S"])
    code = """
import sys, torch, hf_moe_ext
sys.path.insert(0, "tests")
from peft import PeftModel
from support import quantised
from support.perft import batch
folder, base, *kinds = sys.argv[1:]
inputs = {name: value for name, value in batch().items() if name != "labels"}
found = {}
for kind in kinds:
    for variant in "REDS":
        model = PeftModel.from_pretrained(quantised.load(base, kind), f"{folder}/{kind}/{variant}").eval()
        with torch.no_grad():
            found[kind, variant] = model(**inputs).logits
torch.save(found, f"{folder}/out.pt")
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path), str(folders["olmoe"]), *kinds],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = torch.load(tmp_path / "out.pt")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("kind", quantised.PREPARABLE)
def test_prepare_model_for_kbit_training(kind, folders, routed_in):
    """It freezes and checkpoints; bitsandbytes' norms and experts become float32, torchao's stay. Routing is float32."""
    base = quantised.load(folders["olmoe"], kind)
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = attach(base).train()
    half = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    if kind.startswith("bitsandbytes"):
        assert not half
    else:
        assert {name for name in half if "norm" in name}
    assert base.is_activation_checkpointing
    with_checkpointing = _gradients(model)
    base.activation_checkpointing_disable()
    assert not base.is_activation_checkpointing
    for name, gradient in _gradients(model).items():
        assert "perft_" in name
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, with_checkpointing[name], atol=1e-6, rtol=0)
    assert routed_in == {torch.float32}


def _gradients(model):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(model(**batch()).loss, list(parameters.values()))
    assert all(gradient.abs().max() > 0 for gradient in found)
    return dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize("kind", quantised.ON_CPU)
@pytest.mark.parametrize("family", quantised.FAMILIES)
def test_experts_left_as_they_were_are_in_the_report(kind, family, folders, caplog):
    base = quantised.load(folders[family], kind)
    experts = [p for name, p in base.named_parameters() if ".experts." in name]
    assert {p.dtype for p in experts} == {torch.bfloat16}, (
        "this library quantises experts now: the texts are out of date"
    )
    size = sum(2 * p.numel() for p in experts)
    with caplog.at_level(logging.INFO, logger="hf_moe_ext"):
        model = attach(base)
    count = {"olmoe": 8, "mixtral": 4}[family]
    line = f"experts not quantised: 2 x gate_up_proj [{count}, 128, 64] bfloat16, 2 x down_proj [{count}, 64, 64] bfloat16: "
    assert f"{line}{format_bytes(size)} of the model's " in caplog.text
    assert line in describe_trainable(model)


def test_it_warns_when_they_are_most_of_the_model(folders):
    base = quantised.load(folders["olmoe"], "bitsandbytes-8bit")
    with pytest.warns(UserWarning, match=r"quantised with bitsandbytes, but its experts were not: .*393\.2 kB of the"):
        attach(base)


def test_it_does_not_warn_when_they_are_few(tmp_path):
    base = zoo.build("olmoe", dtype=torch.bfloat16, hidden_size=64, intermediate_size=1, vocab_size=400)
    base.save_pretrained(tmp_path)
    with warnings.catch_warnings():  # a mark would stand behind that of the module
        warnings.filterwarnings("error", "PERFT: the base model was quantised")
        model = attach(quantised.load(tmp_path, "bitsandbytes-8bit"))
    assert "experts not quantised: " in describe_trainable(model)


def test_a_base_that_is_not_quantised_says_nothing():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "PERFT: the base model was quantised")
        assert "quantised" not in describe_trainable(attach(zoo.build("olmoe")))


@pytest.mark.parametrize("kind", ["bitsandbytes-4bit", "torchao-int8"])
def test_the_doctor_says_it_of_a_saved_quantised_model(kind, folders, tmp_path):
    quantised.load(folders["olmoe"], kind).save_pretrained(tmp_path)
    diagnosis = diagnose(str(tmp_path), {"r": 4})
    assert codes(diagnosis) == [("warning", "experts-not-quantised")]
    method = kind.partition("-")[0]
    message = diagnosis.findings[0].message
    assert message.startswith(f"the configuration says {method}-quantised, ")
    assert "all 4 of them stay bfloat16, 393.2 kB" in message


def test_the_doctor_claims_nothing_of_methods_that_can_quantise_experts(tmp_path):
    folder = base_folder(tmp_path, "gpt_oss", quantization_config={"quant_method": "mxfp4"})
    assert diagnose(str(folder), {"r": 4}).findings == []


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            "torchao-int4",
            "torchao 0.18 has no int4 weight-only kernel for the CPU, and Transformers 5.23 trains only 8 bit",
        ),
        ("hqq-4bit", "Transformers 5.23 cannot quantise with HQQ: 'not available yet'"),
    ],
)
def test_what_cannot_run_on_a_cpu(kind, reason, folders):
    settings = quantised.settings(kind)
    try:
        model = quantised.AutoModelForCausalLM.from_pretrained(folders["olmoe"], quantization_config=settings)
    except (RuntimeError, ImportError, NotImplementedError) as error:
        pytest.skip(f"{kind}: {reason} ({type(error).__name__})")
    assert logits(attach(model)).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-int8", "torchao-int4"])
def test_a_step_on_a_gpu(kind, variant, folders):
    """With an optimizer of its own: the Trainer refuses torchao's int4."""
    model = attach(quantised.load(folders["olmoe"], kind, device_map={"": 0}), variant).train()
    before, base = (
        {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad},
        quantised.contents(model),
    )
    loss = model(**{name: value.cuda() for name, value in batch().items()}).loss
    loss.backward()
    assert loss.isfinite()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    parameters, after = dict(model.named_parameters()), quantised.contents(model)
    assert all(not torch.equal(parameters[name], old) for name, old in before.items())
    assert all(torch.equal(a, b) for name, parts in base.items() for a, b in zip(parts, after[name], strict=True))
