"""Everything refused before a weight is read: argument, rule, value, next step."""

import json
from pathlib import Path
from typing import Any

import pytest

from hf_moe_ext import MixtralExtConfig, OlmoeExtConfig
from hf_moe_ext.convert.conversion_plan import parse_layers, plan_conversion
from support import zoo


@pytest.fixture
def olmoe(tmp_path: Path) -> Path:
    zoo.FAMILIES["olmoe"](num_hidden_layers=4).save_pretrained(tmp_path / "olmoe")
    return tmp_path / "olmoe"


def test_plan_of_all_layers(olmoe: Path) -> None:
    plan = plan_conversion(olmoe)
    config = plan.config
    assert isinstance(config, OlmoeExtConfig)
    assert plan.layers == [0, 1, 2, 3]
    assert plan.source_blocks == ["standard"] * 4
    assert (config.moe_block, config.moe_latent_size, config.moe_expert_gated) == ("dcca", 8, True)
    assert (config.moe_expert_intermediate_size, config.moe_expert_act) == (48, "silu")
    assert config.architectures == ["OlmoeExtForCausalLM"]
    assert config.num_experts == 8


def test_plan_of_some_layers_and_a_second_turn(olmoe: Path, tmp_path: Path) -> None:
    first = plan_conversion(olmoe, layers=[2, 0], latent_size=16)
    assert first.layers == [0, 2]
    assert first.config.moe_block == ["dcca", "standard", "dcca", "standard"]
    first.config.save_pretrained(tmp_path / "mixed")
    second = plan_conversion(tmp_path / "mixed", latent_size=16)
    assert second.layers == [1, 3]
    assert second.config.moe_block == "dcca"
    with pytest.raises(ValueError, match=r"moe_latent_size=16 and the new ones would have 8.*write latent_size=16"):
        plan_conversion(tmp_path / "mixed")
    with pytest.raises(ValueError, match=r"layer 2 is a DCCA block already; choose among \[1, 3\]"):
        plan_conversion(tmp_path / "mixed", layers=[2], latent_size=16)
    second.config.save_pretrained(tmp_path / "done")
    with pytest.raises(ValueError, match="nothing to convert"):
        plan_conversion(tmp_path / "done", latent_size=16)


@pytest.mark.parametrize(("ratio", "size"), [(0.25, 8), (0.5, 16), (0.74, 24), (1.0, 32), (0.01, 8)])
def test_ratio_is_rounded_to_what_can_be_aligned(olmoe: Path, ratio: float, size: int) -> None:
    assert plan_conversion(olmoe, ratio=ratio).config.moe_latent_size == size


def test_mixtral_becomes_mixtral_ext(tmp_path: Path) -> None:
    zoo.FAMILIES["mixtral"]().save_pretrained(tmp_path)
    config = plan_conversion(tmp_path).config
    assert isinstance(config, MixtralExtConfig)
    assert config.num_local_experts == 4


def test_ungated_layers_of_the_source_cannot_be_mixed_in(tmp_path: Path) -> None:
    settings: dict[str, Any] = zoo.FAMILIES["olmoe"]().to_dict()
    settings.pop("model_type")
    OlmoeExtConfig(**settings | {"moe_block": ["dcca", "standard"], "moe_latent_size": 8}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"moe_expert_gated=False and the new ones would have True"):
        plan_conversion(tmp_path, latent_size=8)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"latent_size": 40}, ValueError, "latent_size must be from 1 to hidden_size=32; got 40"),
        ({"latent_size": 0}, ValueError, "latent_size must be from 1 to hidden_size=32; got 0"),
        ({"latent_size": 12}, ValueError, "multiple of 8 .*; got 12, write 16"),
        ({"latent_size": 8.0}, TypeError, r"latent_size must be an integer; got 8\.0"),
        ({"ratio": 0.0}, ValueError, r"ratio must be above 0 and at most 1; got 0\.0"),
        ({"ratio": 1.5}, ValueError, r"ratio must be above 0 and at most 1; got 1\.5"),
        ({"ratio": 0.5, "latent_size": 8}, ValueError, "give one of latent_size=8, ratio=0.5"),
        ({"layers": []}, ValueError, "nothing to convert"),
        ({"layers": [4]}, ValueError, "layers must be from 0 to 3; got 4"),
        ({"layers": [-1]}, ValueError, "layers must be from 0 to 3; got -1"),
        ({"layers": [1, 1]}, ValueError, r"layers must not repeat; got \[1, 1\]"),
        ({"layers": ["1"]}, TypeError, "layers must be integers"),
        ({"expert_gated": False}, ValueError, "expert_gated=False: the source's experts are gated"),
        ({"expert_intermediate_size": 64}, ValueError, "must be the source's intermediate_size=48; leave it out"),
    ],
)
def test_refused_arguments(olmoe: Path, arguments: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        plan_conversion(olmoe, **arguments)


def test_refused_sources(tmp_path: Path) -> None:
    zoo.REFUSED["llama"]().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"converts mixtral, .*; .*llama has model_type 'llama'"):
        plan_conversion(tmp_path / "llama")
    zoo.FAMILIES["olmoe"](intermediate_size=44).save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match="intermediate_size=44 is not a multiple of 8"):
        plan_conversion(tmp_path / "odd")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"is a folder without config\.json"):
        plan_conversion(tmp_path / "empty")
    with pytest.raises(ValueError, match="no/such is neither a folder here nor a model"):
        plan_conversion("no/such")


def test_quantised_source_is_refused(olmoe: Path) -> None:
    path = olmoe / "config.json"
    settings = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"is quantised \('fp8'\); convert the checkpoint in full precision"):
        plan_conversion(olmoe)


def test_layers_as_text() -> None:
    assert parse_layers("3,5-8") == [3, 5, 6, 7, 8]
    assert parse_layers(" 0 , 2-2") == [0, 2]
    for text in ("", "a", "3-", "8-5", "1,,2", "-1"):
        with pytest.raises(ValueError, match=r"numbers and ranges such as 3,5-8; got"):
            parse_layers(text)


def test_other_blocks_are_not_read(tmp_path: Path) -> None:
    settings: dict[str, Any] = zoo.FAMILIES["olmoe"]().to_dict()
    OlmoeExtConfig(**settings | {"moe_block": ["ders", "standard"]}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layer 0 has moe_block='ders', which to_dcca does not read"):
        plan_conversion(tmp_path)
