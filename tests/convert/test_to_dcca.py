"""Whole conversions of a tiny trained model: exact at full width, better with more width and than SVD, all or nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe_ext import MixtralExtForCausalLM, OlmoeExtForCausalLM
from hf_moe_ext.convert import to_dcca
from hf_moe_ext.convert.conversion_report import ConversionReport
from hf_moe_ext.convert.distillation import distillation_loss, measure_perplexity
from support import zoo
from support.killed import kill_while_writing


@pytest.fixture(scope="session")
def rows(train_rows: Tensor) -> Tensor:
    return train_rows[:128]


@torch.no_grad()
def logits(folder: Path, ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()(input_ids=ids).logits


def errors(report: ConversionReport) -> list[float]:
    return [row.relative_hidden_error for row in report.layers]


@pytest.mark.parametrize("method", ["data", "svd"])
def test_full_width_reproduces_the_source(source: Path, rows: Tensor, tmp_path: Path, method: Any) -> None:
    report = to_dcca(source, tmp_path / "out", rows, latent_size=32, method=method)
    ids = rows[:4] + 0
    torch.testing.assert_close(logits(tmp_path / "out", ids), logits(source, ids), rtol=0, atol=1e-5)
    # Tokens that the calibration text has nothing of, too.
    strange = torch.randint(3, zoo.VOCAB_SIZE, (4, 64))
    torch.testing.assert_close(logits(tmp_path / "out", strange), logits(source, strange), rtol=0, atol=1e-5)
    assert report.perplexity_converted == pytest.approx(report.perplexity_source, rel=1e-5)
    assert max(errors(report)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtral_in_shards(tmp_path: Path, dtype: torch.dtype) -> None:
    model = zoo.build("mixtral", dtype=dtype)
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    ids = torch.randint(3, zoo.VOCAB_SIZE, (24, 32))
    report = to_dcca(tmp_path / "source", tmp_path / "out", ids, latent_size=32, max_shard_bytes=40_000)
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(converted, MixtralExtForCausalLM)
    assert {p.dtype for p in converted.parameters()} == {dtype}
    assert report.num_parameters == converted.num_parameters()
    assert report.num_parameters_source == model.num_parameters()
    with torch.no_grad():
        found, wanted = converted(input_ids=ids).logits, model(input_ids=ids).logits
    if dtype == torch.float32:
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    else:
        # Weights and sums are rounded to 8 bits, which sends a few tokens to another expert: only the whole is held.
        assert float((found - wanted).float().square().sum() / wanted.float().square().sum()) < 2e-3


def test_folder_opens_and_says_what_it_is(source: Path, rows: Tensor, tmp_path: Path) -> None:
    report = to_dcca(source, tmp_path / "out", rows, latent_size=16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model, OlmoeExtForCausalLM)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("olmoe_ext", ["OlmoeExtForCausalLM"])
    assert config["moe_block"] == "dcca"
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == model.state_dict().keys()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_ids_to_tokens([5]) == ["w5"]
    assert (tmp_path / "out" / "generation_config.json").is_file()
    written = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert written == json.loads(json.dumps(report.as_dict()))
    assert written["calibration_tokens"] == 112 * 64  # an eighth of the rows is held out
    assert written["settings"]["layers"] == [0, 1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    # The perplexities, found layer by layer, are those of the models.
    held_out = rows[112:]
    assert measure_perplexity(model, held_out) == pytest.approx(report.perplexity_converted, rel=1e-5)
    stock = AutoModelForCausalLM.from_pretrained(source)
    assert measure_perplexity(stock, held_out) == pytest.approx(report.perplexity_source, rel=1e-5)
    # The router is the source's, bit for bit.
    for theirs, ours in zip(stock.model.layers, model.model.layers, strict=True):
        assert torch.equal(theirs.mlp.gate.weight, ours.mlp.gate.weight)
    generated = model.generate(rows[:1, :8], max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 12)


def test_error_falls_with_the_width_and_beats_svd_on_held_out_text(
    source: Path, rows: Tensor, held_out_rows: Tensor, tmp_path: Path
) -> None:
    wanted = logits(source, held_out_rows)

    def convert(ratio: float, method: Any = "data") -> tuple[ConversionReport, float]:
        settings: dict[str, Any] = {"held_out": held_out_rows, "overwrite": True, "ratio": ratio, "method": method}
        report = to_dcca(source, tmp_path / "out", rows, **settings)
        return report, float(distillation_loss(logits(tmp_path / "out", held_out_rows), wanted))

    data = [convert(ratio) for ratio in (0.25, 0.5, 0.75, 1.0)]
    svd = [convert(ratio, "svd") for ratio in (0.25, 0.5, 0.75)]
    assert [report.settings["latent_size"] for report, _ in data] == [8, 16, 24, 32]
    for results in (data, svd):
        for layer in range(3):
            falling = [report.layers[layer].relative_hidden_error for report, _ in results]
            assert falling == sorted(falling, reverse=True), layer
        # Divergence from the source, not perplexity: of a model so small some conversions predict better than it does.
        divergences = [divergence for _, divergence in results]
        assert divergences == sorted(divergences, reverse=True)
    # The first layer has nothing to make up for, so its own error counts; later ones are judged by where they lead.
    first = [report.layers[0].relative_output_error for report, _ in data]
    assert first == sorted(first, reverse=True)
    for (fitted, near), (blind, far) in zip(data, svd, strict=False):
        assert all(a < 0.8 * b for a, b in zip(errors(fitted), errors(blind), strict=True))
        assert near < 0.8 * far


def test_fitting_in_sequence_beats_fitting_apart(
    source: Path, rows: Tensor, held_out_rows: Tensor, tmp_path: Path
) -> None:
    def convert(sequential: bool) -> ConversionReport:
        settings: dict[str, Any] = {"held_out": held_out_rows, "overwrite": True, "sequential": sequential}
        return to_dcca(source, tmp_path / "out", rows, latent_size=8, **settings)

    together, apart = convert(True), convert(False)
    assert errors(together)[0] == pytest.approx(errors(apart)[0], rel=1e-6)
    assert all(a < b for a, b in zip(errors(together)[1:], errors(apart)[1:], strict=True))


def test_chosen_layers_and_then_the_rest(source: Path, rows: Tensor, tmp_path: Path) -> None:
    first = to_dcca(source, tmp_path / "one", rows, latent_size=8, layers=[1])
    assert [row.layer for row in first.layers] == [1]
    stock, mixed = load_file(source / "model.safetensors"), load_file(tmp_path / "one" / "model.safetensors")
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "model.layers.0.mlp.gate.weight"):
        assert torch.equal(stock[name], mixed[name])
    experts = torch.stack([stock[f"model.layers.2.mlp.experts.{e}.down_proj.weight"] for e in range(8)])
    assert torch.equal(experts, mixed["model.layers.2.mlp.experts.down_proj"])
    assert mixed["model.layers.1.mlp.descend.weight"].shape == (8, 32)
    assert "model.layers.0.mlp.descend.weight" not in mixed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert measure_perplexity(model, rows[112:]) == pytest.approx(first.perplexity_converted, rel=1e-5)
    # A mixed model is a source again; its DCCA layer stays as it is.
    second = to_dcca(tmp_path / "one", tmp_path / "two", rows, latent_size=8)
    assert [row.layer for row in second.layers] == [0, 2]
    assert second.perplexity_source == pytest.approx(first.perplexity_converted, rel=1e-5)
    whole = load_file(tmp_path / "two" / "model.safetensors")
    assert torch.equal(
        whole["model.layers.1.mlp.experts.gate_up_proj"], mixed["model.layers.1.mlp.experts.gate_up_proj"]
    )
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert opened.config.moe_block == "dcca"
    assert measure_perplexity(opened, rows[112:]) == pytest.approx(second.perplexity_converted, rel=1e-5)


def test_seeds_and_repetition(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for i in range(16):
        (text / f"{i}.txt").write_text(" ".join(f"w{30 + (j * (i + 3)) % 60}" for j in range(200)))

    def convert(name: str, seed: int) -> Tensor:
        settings: dict[str, Any] = {"sequence_length": 32, "num_tokens": 1024, "seed": seed, "latent_size": 8}
        to_dcca(source, tmp_path / name, text, **settings)
        return load_file(tmp_path / name / "model.safetensors")["model.layers.0.mlp.descend.weight"]

    one = convert("a", 0)
    assert torch.equal(one, convert("b", 0))
    assert not torch.equal(one, convert("c", 1))


def test_a_failure_leaves_nothing(source: Path, rows: Tensor, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in source.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match="has no layer 3"):  # after three layers were written
        to_dcca(broken, tmp_path / "out", rows, latent_size=8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]


@pytest.mark.slow
def test_a_kill_leaves_nothing_under_the_final_name(source: Path, rows: Tensor, tmp_path: Path) -> None:
    torch.save(rows.repeat(4, 1), tmp_path / "rows.pt")
    code = (
        "import sys, torch\nfrom hf_moe_ext.convert import to_dcca\n"
        "to_dcca(sys.argv[1], sys.argv[2], torch.load(sys.argv[3]), latent_size=8, max_shard_bytes=1)\n"
    )
    output = tmp_path / "out"
    kill_while_writing(tmp_path, code, source, output, tmp_path / "rows.pt")
    assert not output.exists()
    to_dcca(source, output, rows, latent_size=8)
    assert (output / "config.json").is_file()


def test_existing_output_is_kept_unless_asked(source: Path, rows: Tensor, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("")
    with pytest.raises(FileExistsError, match=r"exists; name a new folder, or ask for it with overwrite"):
        to_dcca(source, output, rows, latent_size=8)
    assert [p.name for p in output.iterdir()] == ["mine"]
    (output / "config.json").write_text("{}")  # what says that it is a model's folder
    to_dcca(source, output, rows, latent_size=8, overwrite=True)
    assert not (output / "mine").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "pca"}, "method must be 'data' or 'svd'; got 'pca'"),
        ({"num_tokens": 1}, "num_tokens must be an integer of at least 2; got 1"),
        ({"num_held_out_tokens": 0}, "num_held_out_tokens must be an integer of at least 2; got 0"),
        ({"sequence_length": 65}, "sequence_length must be from 2 to the model's max_position_embeddings=64; got 65"),
        ({"latent_size": 64}, "latent_size must be from 1 to hidden_size=32; got 64"),
        ({"calibration": torch.full((4, 8), 96)}, "token ids must be from 0 to 95; got 96 to 96"),
        ({"held_out": torch.zeros(8)}, "token ids must be integers"),
        ({"calibration": "no/such"}, "no/such is neither a text file nor a folder"),
        ({"calibration": None, "num_tokens": 40}, "at most 40 were asked for"),
    ],
)
def test_refusals_write_nothing(source: Path, tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    settings = {"calibration": torch.full((8, 8), 5), "sequence_length": 64} | arguments
    with pytest.raises(ValueError, match=words):
        to_dcca(source, tmp_path / "out", **settings)
    assert list(tmp_path.iterdir()) == []
