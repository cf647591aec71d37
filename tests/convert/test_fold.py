"""A folded checkpoint: logits equal to the last bit for powers of two, no trace of the package, all or nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM, OlmoeForCausalLM
from typer.testing import CliRunner

from hf_moe_ext import PerftConfig
from hf_moe_ext.cli import app
from hf_moe_ext.convert import fold
from hf_moe_ext.convert.fold import scale
from support import zoo
from support.killed import kill_while_writing
from support.latent_models import make_model
from support.words import build_tokenizer

FAMILIES = {"mixtral_ext": MixtralForCausalLM, "olmoe_ext": OlmoeForCausalLM}
BASE = {"mup_base_hidden_size": 8}  # of 32
GRANITE = {"embedding_multiplier": 4.0, "residual_multiplier": 0.5, "logits_scaling": 8.0, "router_logits_scaling": 2.0}
# The attention's factor: heads of 8 over a base of 128 give sqrt(128) / 8 over 8^-0.5, which is 4.
ALL = {"mup": "mup", **BASE, **GRANITE, "mup_base_head_dim": 128}
ODD = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 3.0, "attention_multiplier": 0.3}
OUR_KEYS = ("mup", "moe_", "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")


def save(folder: Path, family: str, *, dtype: torch.dtype = torch.float32, shard: str = "5GB", **keys: Any) -> Any:
    """A random model with gains and biases that are not all alike, on disk with a tokenizer; returns it."""
    model = make_model(family, "standard", dtype=dtype, **keys)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += (torch.randn(parameter.shape, generator=generator) * 0.3).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    build_tokenizer().save_pretrained(folder)
    return model


def ids() -> Tensor:
    return torch.randint(3, zoo.VOCAB_SIZE, (4, 24), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def run(model: Any) -> Any:
    return model.eval()(input_ids=ids(), labels=ids(), output_router_logits=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"mup": "mup", **BASE},
        {"mup": "simplep", **BASE},
        {"mup": "mup", "mup_form": "folded", **BASE},
        {"mup": "mup", **BASE, "mup_base_head_dim": 2},
        GRANITE,
        ALL,
    ],
    ids=["none", "mup", "simplep", "folded form", "head_dim", "granite", "all"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_powers_of_two_are_bit_equal(tmp_path: Path, family: str, keys: dict[str, Any], dtype: torch.dtype) -> None:
    wanted = run(save(tmp_path / "source", family, dtype=dtype, **keys))
    report = fold(tmp_path / "source", tmp_path / "out")
    folded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(folded) is FAMILIES[family]
    assert {p.dtype for p in folded.parameters()} == {dtype}
    found = run(folded)
    assert torch.equal(found.logits, wanted.logits)
    assert report.bit_equal
    assert report.max_logit_difference == 0
    # Both losses of the router see the logits that its softmax sees.
    for ours, theirs in zip(found.router_logits, wanted.router_logits, strict=True):
        assert torch.equal(ours, theirs)
        z_losses = [logits.float().logsumexp(-1).square().mean() for logits in (ours, theirs)]
        assert torch.equal(*z_losses)
    assert found.aux_loss > 0
    assert torch.equal(found.aux_loss, wanted.aux_loss)
    assert torch.equal(found.loss, wanted.loss)
    assert report.num_parameters == folded.num_parameters()
    assert [factor for factor in report.factors.values() if factor != 1] or keys in ({}, {**keys, "mup_form": "folded"})


@pytest.mark.parametrize("family", FAMILIES)
def test_each_factor_of_its_tensors(tmp_path: Path, family: str) -> None:
    save(tmp_path / "source", family, **ALL)
    report = fold(tmp_path / "source", tmp_path / "out", verify=False)
    queries = "q_norm" if family == "olmoe_ext" else "q_proj"
    factors = {"embed_tokens": 4, queries: 4, "o_proj": 0.5, "down_proj": 0.5, "router": 0.5, "lm_head": 0.125}
    assert report.factors == factors
    assert report.num_scaled == {"embed_tokens": 1, queries: 2, "o_proj": 2, "down_proj": 16, "router": 2, "lm_head": 1}
    assert report.max_logit_difference is None
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source").state_dict()
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert source.keys() == folded.keys()
    names = {**{kind: kind for kind in factors}, "router": "mlp.gate"}
    for name, tensor in source.items():
        kind = next((kind for kind in factors if names[kind] in name), None)
        assert torch.equal(folded[name], tensor * (1 if kind is None else factors[kind])), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "keys",
    [
        ODD,
        {"mup": "mup", "mup_base_hidden_size": 12, "mup_base_head_dim": 5, "router_logits_scaling": 0.7},
        {"mup": "mup", "mup_base_hidden_size": 24},
    ],
    ids=["granite", "head_dim", "ratio 4/3"],
)
def test_other_factors_to_rounding(tmp_path: Path, family: str, keys: dict[str, Any]) -> None:
    # Logits of the order of 1: at 2 the rounding of float32 sums alone reaches 1e-6.
    wanted = run(save(tmp_path / "source", family, initializer_range=0.08, **keys))
    assert 0.1 < wanted.logits.abs().max() < 2
    report = fold(tmp_path / "source", tmp_path / "out")
    found = run(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.aux_loss, wanted.aux_loss, rtol=0, atol=1e-6)
    assert not report.bit_equal
    assert report.rounded
    assert report.max_logit_difference is not None
    assert report.max_logit_difference < 1e-6


def test_float64_to_rounding(tmp_path: Path) -> None:
    """In float64 what is left of a product's rounding is far below float32's: the factors themselves are right."""
    save(tmp_path / "source", "mixtral_ext", dtype=torch.float64, **ODD)
    fold(tmp_path / "source", tmp_path / "out")

    @torch.no_grad()
    def logits(folder: Path) -> Tensor:
        return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="batched_mm").eval()(ids()).logits

    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "source"), rtol=0, atol=1e-6)
    source, folded = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "out"))
    exact = source["lm_head.weight"] / 3
    torch.testing.assert_close(folded["lm_head.weight"], exact, rtol=1e-15, atol=0)


@pytest.mark.parametrize("keys", [ALL, ODD | {"mup": "mup", **BASE}])
def test_olmoe_with_biases(tmp_path: Path, keys: dict[str, Any]) -> None:
    """The output projection's bias takes the branch's factor, that of the queries none: the norm after it would undo it."""
    model = save(tmp_path / "source", "olmoe_ext", attention_bias=True, **keys)
    assert model.model.layers[0].self_attn.o_proj.bias.abs().max() > 0
    report = fold(tmp_path / "source", tmp_path / "out")
    found, wanted = run(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), run(model)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=0 if report.bit_equal else 1e-6)
    assert report.num_scaled["o_proj"] == 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("original", [True, False])
def test_sources_in_shards_and_one_expert_at_a_time(tmp_path: Path, family: str, original: bool) -> None:
    model = save(tmp_path / "other", family, **ALL)
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB", save_original_format=original)
    report = fold(tmp_path / "source", tmp_path / "out", max_shard_bytes=30_000)
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    found = run(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.equal(found.logits, run(model).logits)
    assert report.num_scaled["down_proj"] == 16


@pytest.mark.parametrize("family", FAMILIES)
def test_names_on_disk_are_those_the_stock_class_writes(tmp_path: Path, family: str) -> None:
    save(tmp_path / "source", family, **ALL)
    fold(tmp_path / "source", tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_opens_where_the_package_cannot_be_imported(tmp_path: Path) -> None:
    """Logits and generated tokens, in a process that may not import us."""
    prompt = ids()[:, :6]
    torch.save({"prompt": prompt, "ids": ids()}, tmp_path / "inputs.pt")
    models = {}
    for family in FAMILIES:
        models[family] = save(tmp_path / "source" / family, family, **ALL)
        fold(tmp_path / "source" / family, tmp_path / family)
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'hf_moe_ext': raise AssertionError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import torch\nfrom transformers import AutoModelForCausalLM\n"
        "inputs, results = torch.load('inputs.pt'), {}\n"
        "for family in sys.argv[1:]:\n"
        "    model, info = AutoModelForCausalLM.from_pretrained(family, output_loading_info=True)\n"
        "    assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info\n"
        "    with torch.no_grad(): logits = model.eval()(inputs['ids']).logits\n"
        "    generated = model.generate(inputs['prompt'], max_new_tokens=12, do_sample=False)\n"
        "    results[family] = (type(model).__module__, logits, generated)\n"
        "assert not any(name.split('.')[0] == 'hf_moe_ext' for name in sys.modules)\n"
        "torch.save(results, 'results.pt')\n"
    )
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code, *FAMILIES],
        **{"cwd": tmp_path, "env": variables, "capture_output": True, "text": True, "timeout": 300},
    )
    assert result.returncode == 0, result.stderr
    results = torch.load(tmp_path / "results.pt")
    for family, model in models.items():
        module, logits, generated = results[family]
        assert module.startswith("transformers.models.")
        assert torch.equal(logits, run(model).logits)
        assert torch.equal(generated, model.generate(prompt, max_new_tokens=12, do_sample=False))
        assert generated.shape[1] > prompt.shape[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_trace_and_all_side_files(tmp_path: Path, family: str) -> None:
    save(tmp_path / "source", family, rms_norm_eps=3e-6, **ALL)
    (tmp_path / "source" / "LICENSE").write_text("free")
    fold(tmp_path / "source", tmp_path / "out")
    text = (tmp_path / "out" / "config.json").read_text()
    config = json.loads(text)
    assert config["model_type"] == family.removesuffix("_ext")
    assert config["architectures"] == [FAMILIES[family].__name__]
    assert not [key for key in config if key.startswith(OUR_KEYS) or key == "router_logits_scaling"]
    assert "_ext" not in text
    assert config["rms_norm_eps"] == 3e-6
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w30 w31").input_ids == [30, 31]
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert "generation_config.json" in names
    assert names == {p.name for p in (tmp_path / "source").iterdir()}


def test_tied_head_takes_one_factor(tmp_path: Path) -> None:
    tied = {"mup": "mup", **BASE, "tie_word_embeddings": True}
    model = save(tmp_path / "source", "olmoe_ext", **tied)
    with pytest.raises(
        ValueError, match=r"cannot take both embedding_multiplier=1.0 and 1 / logits_scaling=0.25; write"
    ):
        fold(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = fold(tmp_path / "source", tmp_path / "out", untie=True)
    assert report.bit_equal
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not folded.config.tie_word_embeddings
    assert torch.equal(run(folded).logits, run(model).logits)
    # Both factors the same: still one tensor.
    model = save(tmp_path / "same", "olmoe_ext", **tied, embedding_multiplier=0.25)
    fold(tmp_path / "same", tmp_path / "one")
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert folded.lm_head.weight is folded.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "one" / "model.safetensors")
    assert torch.equal(run(folded).logits, run(model).logits)


def test_untie_without_effect_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "source", "mixtral_ext", **ALL)
    import logging

    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        fold(tmp_path / "source", tmp_path / "out", untie=True, dry_run=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert "untie: no effect" in caplog.text


@pytest.mark.parametrize(("block", "layers"), [("gated", "layers 0, 1 are"), ("mixed", "layers 1 are")])
def test_dcca_is_refused_by_layer(tmp_path: Path, block: str, layers: str) -> None:
    make_model("mixtral_ext", block, mup="mup", **BASE).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=f"{layers} DCCA blocks .* stock mixtral"):
        fold(tmp_path / "source", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_shared_bases_are_exported_first(tmp_path: Path) -> None:
    make_model("mixtral_ext", "low_rank", mup="mup", **BASE).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"are DERS blocks .* hf-moe export"):
        fold(tmp_path / "source", tmp_path / "out")


def test_clipped_queries(tmp_path: Path) -> None:
    """Clipping stands after the norm: a factor in the norm would change what is cut."""
    save(tmp_path / "source", "olmoe_ext", clip_qkv=0.5, **ALL)
    with pytest.raises(ValueError, match=r"clip_qkv=0.5 .* attention_multiplier=1.41"):
        fold(tmp_path / "source", tmp_path / "out")
    model = save(tmp_path / "plain", "olmoe_ext", clip_qkv=0.5, mup="mup", **BASE, **GRANITE)
    fold(tmp_path / "plain", tmp_path / "out")
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).logits, run(model).logits)


@pytest.mark.parametrize("adapter", ["lora", "perft"])
def test_adapters_are_refused(tmp_path: Path, adapter: str) -> None:
    model = make_model("mixtral_ext", "standard", **ALL)
    config = LoraConfig(target_modules=["q_proj"]) if adapter == "lora" else PerftConfig()
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds an adapter, not a model"):
        fold(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stock_quantised_and_foreign_sources(tmp_path: Path) -> None:
    zoo.build("mixtral").save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match=r"has model_type 'mixtral'\. It is a stock checkpoint already"):
        fold(tmp_path / "stock", tmp_path / "out")
    zoo.build("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"fold takes mixtral_ext, olmoe_ext; .* has model_type 'llama'"):
        fold(tmp_path / "dense", tmp_path / "out")
    save(tmp_path / "source", "mixtral_ext", **ALL)
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match="is quantised"):
        fold(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, "has no model.layers.2"),
        ({"num_hidden_layers": 1}, "holds model.layers.1.*has no place for"),
        ({"intermediate_size": 40}, r"w[123].weight is \(.*48.* its config.json says \(.*40"),
        ({"num_local_experts": 4}, "holds model.layers.0.block_sparse_moe.experts.4"),
    ],
)
def test_checkpoints_that_are_not_their_config(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    save(tmp_path / "source", "mixtral_ext", **ALL)
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=words):
        fold(tmp_path / "source", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_scale_rounds_once() -> None:
    tensor = torch.randn(1000).bfloat16()
    assert torch.equal(scale(tensor, 0.3)[0], (tensor.double() * 0.3).bfloat16())
    assert scale(tensor, 0.25)[1]
    assert not scale(tensor, 0.3)[1]
    # Once in float64, then once to float32: closer than with a factor that was rounded before.
    wide = torch.randn(1000)
    assert torch.equal(scale(wide, 1 / 3)[0], (wide.double() / 3).float())
    assert scale(wide, 1.0)[0] is wide


def test_what_leaves_the_range_of_the_type() -> None:
    small = torch.tensor([1.5 * 2**-14, 1.25 * 2**-20]).half()  # the second has few digits already
    assert not scale(small, 2.0**-9)[1]
    assert scale(small, 2.0)[1]
    with pytest.raises(ValueError, match=r"6e\+04 times 4 is too large for torch.float16"):
        scale(torch.tensor([60000.0]).half(), 4.0)


def test_float16_promises_no_equality(tmp_path: Path) -> None:
    save(tmp_path / "source", "mixtral_ext", dtype=torch.float16, **ALL)
    report = fold(tmp_path / "source", tmp_path / "out")
    assert not report.bit_equal
    assert report.max_logit_difference is not None
    assert report.max_logit is not None
    assert report.max_logit_difference <= 2**-8 * report.max_logit  # eleven digits, a few of them lost
    source, folded = (
        load_file(tmp_path / n / "model.safetensors")["model.embed_tokens.weight"] for n in ("source", "out")
    )
    assert torch.equal(folded, source * 4)


def test_existing_output_is_kept_unless_asked(tmp_path: Path) -> None:
    save(tmp_path / "source", "olmoe_ext", **ALL)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="exists; name a new folder"):
        fold(tmp_path / "source", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    with pytest.raises(FileExistsError, match="is or holds the model that is read"):
        fold(tmp_path / "source", tmp_path / "source", overwrite=True)
    assert fold(tmp_path / "source", tmp_path / "out", overwrite=True).written
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "olmoe"


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    save(tmp_path / "source", "olmoe_ext", **ALL)
    report = fold(tmp_path / "source", tmp_path / "out", dry_run=True)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    assert (report.written, report.bit_equal, report.factors["q_norm"]) == (False, True, 4)


@pytest.mark.slow
def test_a_kill_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    save(tmp_path / "source", "olmoe_ext", num_hidden_layers=24, **ALL)
    code = "import sys\nfrom hf_moe_ext.convert import fold\nfold(sys.argv[1], sys.argv[2], max_shard_bytes=1)\n"
    output = tmp_path / "out"
    kill_while_writing(tmp_path, code, tmp_path / "source", output)
    assert not output.exists()
    assert fold(tmp_path / "source", output, verify=False).written


def command(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["fold", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_command(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save(source, "olmoe_ext", **ODD | {"attention_multiplier": 1.0}, mup="mup", **BASE)
    code, text, error = command(source, "--output", out, "--dry-run")
    assert code == 0, error
    assert "nothing written" in text
    assert not out.exists()
    code, text, error = command(source, "--output", out)
    assert code == 0, error
    for words in (
        "stock olmoe model",
        "q_norm",
        "x 2.82843",
        "2 tensors",
        "up to rounding, at",
        "greatest difference",
        str(out),
    ):
        assert words in text
    code, _, error = command(source, "--output", out)
    assert (code, "exists; name a new folder" in error) == (2, True)
    code, text, error = command(source, "--output", out, "--overwrite", "--no-verify", "--json")
    assert code == 0, error
    report = json.loads(text)
    assert report["max_logit_difference"] is None
    wanted = fold(source, tmp_path / "api", verify=False).as_dict()
    for name in ("output", "seconds"):
        report.pop(name), wanted.pop(name)
    assert report == json.loads(json.dumps(wanted))


def test_command_unties(tmp_path: Path) -> None:
    save(tmp_path / "source", "mixtral_ext", tie_word_embeddings=True, **ALL)
    code, _, error = command(tmp_path / "source", "--output", tmp_path / "out")
    assert (code, "--untie" in error) == (2, True)
    code, _, error = command(tmp_path / "source", "--output", tmp_path / "out", "--untie")
    assert code == 0, error


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "abc"}, "Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"mup": "wide"}, "mup must be one of"),
    ],
)
def test_command_refuses_an_invalid_configuration(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    save(tmp_path / "source", "mixtral_ext", **ALL)
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    code, _, error = command(tmp_path / "source", "--output", tmp_path / "out")
    assert code == 2
    assert "the configuration of " in error
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_a_stock_mixtral_cannot_express(tmp_path):
    make_model("mixtral_ext", "standard", norm_topk_prob=False).save_pretrained(tmp_path / "raw")
    with pytest.raises(ValueError, match="norm_topk_prob=False: a stock Mixtral divides"):
        fold(tmp_path / "raw", tmp_path / "out")
    make_model("mixtral_ext", "low_rank").save_pretrained(tmp_path / "shared")
    with pytest.raises(ValueError, match="layers 0, 1 are DERS blocks"):
        fold(tmp_path / "shared", tmp_path / "out")
    assert not (tmp_path / "out").exists()
