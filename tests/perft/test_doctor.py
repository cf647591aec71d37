"""The doctor on models: what it says would train, trains, in every family; what it costs; what is refused."""

from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from safetensors.torch import load_file

from hf_moe_ext import PerftConfig
from hf_moe_ext.perft.doctor import TargetError, diagnose
from hf_moe_ext.perft.doctor.tables import format_bytes, group_rows
from hf_moe_ext.perft.report import TrainableRow, count_trainable, trainable_rows
from support import zoo
from support.doctor import adapter_folder, base_folder, codes, only


@pytest.mark.parametrize("variant", ["R", "E", "D", "S"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_what_would_train_is_what_trains(family: str, variant: str, tmp_path: Path) -> None:
    diagnosis = diagnose(str(base_folder(tmp_path, family)), {"variant": variant, "r": 4})
    model = zoo.build(family)
    parameters = sum(p.numel() for p in model.parameters())
    peft_model = get_peft_model(model, PerftConfig(variant=variant, r=4))

    assert diagnosis.findings == []
    assert diagnosis.rows == trainable_rows(peft_model)
    assert (diagnosis.adapter_parameters, diagnosis.active_parameters) == count_trainable(peft_model)
    assert diagnosis.trainable_parameters == sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    assert diagnosis.base is not None
    assert diagnosis.base.parameters == parameters
    assert diagnosis.share_of_base == diagnosis.trainable_parameters / parameters
    assert diagnosis.router is not None
    if variant == "R":
        settings = next(m.settings["default"] for m in peft_model.modules() if hasattr(m, "perft_A"))
        assert diagnosis.router.normalize_top_k is settings.normalize


def test_costs_are_those_of_the_saved_file_and_of_adam(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path, modules_to_save=["lm_head"])
    saved = sum(t.nbytes for t in load_file(adapter / "adapter_model.safetensors").values())
    diagnosis = diagnose(str(tmp_path / "base"), {"r": 4, "modules_to_save": ["lm_head"]})

    assert diagnosis.file_bytes == saved
    assert diagnosis.also_trains == {"lm_head.weight": (zoo.VOCAB_SIZE, 32)}
    assert diagnosis.training_bytes == 16 * diagnosis.trainable_parameters
    on_disk = diagnose(str(adapter))
    assert on_disk.findings == []
    assert on_disk.file_bytes == (adapter / "adapter_model.safetensors").stat().st_size
    assert on_disk.trainable_parameters == diagnosis.trainable_parameters


def test_base_bytes_follow_its_dtype_and_tied_weights_count_once(tmp_path: Path) -> None:
    full, half = (
        diagnose(str(base_folder(tmp_path / "a"))).base,
        diagnose(str(base_folder(tmp_path / "b", dtype="bfloat16"))).base,
    )
    assert full
    assert half
    assert (full.dtype, half.dtype) == ("float32", "bfloat16")
    assert full.weight_bytes == 4 * full.parameters == 2 * half.weight_bytes
    tied = diagnose(str(base_folder(tmp_path / "c", tie_word_embeddings=True))).base
    assert tied
    assert full.parameters - tied.parameters == zoo.VOCAB_SIZE * 32


@pytest.mark.parametrize(
    ("family", "options", "rule", "normalize", "reason"),
    [
        (
            "olmoe",
            {},
            "top 3 of 8 experts; their weights are not made to sum to 1 (norm_topk_prob=False)",
            False,
            "follows",
        ),
        ("mixtral", {}, "top 2 of 4 experts; their weights sum to 1 (fixed in this family)", True, "follows"),
        ("mixtral", {"normalize_top_k": False}, "mixtral, top 2 of 4", False, "as set"),
        ("mixtral", {"top_k": 1}, "mixtral, top 2 of 4", False, "never True at top_k=1"),
        ("deepseek_v3", {}, "(norm_topk_prob=True), then times routed_scaling_factor=2.5", True, "follows"),
        ("mixtral", {"variant": "E"}, "mixtral, top 2 of 4", None, "uses the base router's weights"),
        ("mixtral", {"variant": "D"}, "mixtral, top 2 of 4", None, "every adapter has weight 1"),
    ],
)
def test_router_is_stated(
    family: str, options: dict[str, Any], rule: str, normalize: bool | None, reason: str, tmp_path: Path
) -> None:
    router = diagnose(str(base_folder(tmp_path, family)), options).router
    assert router is not None
    assert rule in router.base_rule
    assert router.normalize_top_k is normalize
    assert reason in router.reason


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("llama", "No MoE block found in LlamaForCausalLM (model_type 'llama')"),
        ("llama4", "Llama4TextExperts at 'model.layers.0.feed_forward.experts' takes (hidden_states)"),
        ("jetmoe", "JetMoeParallelExperts"),
    ],
)
def test_models_that_cannot_be_served_are_refused_by_name(family: str, words: str, tmp_path: Path) -> None:
    diagnosis = diagnose(str(base_folder(tmp_path, family)))
    message = only(diagnosis, "error", "no-moe-block")
    assert words in message
    assert "choose a base model of a supported family" in message
    assert diagnosis.base is not None
    assert diagnosis.rows == []


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"variant": "S", "top_k": 2}, "options-refused", "top_k belongs to the router of variant='R'"),
        ({"num_experts": 2, "top_k": 3}, "options-refused", "top_k must be between 1 and num_experts=2; got 3"),
        ({"normalize_top_k": True, "top_k": 1}, "options-refused", "leave it out (None) or write False"),
        ({"target_modules": ["q_proj"]}, "attach-refused", "not the experts module of a MoE block"),
        ({"layers_to_transform": [7]}, "nothing-selected", "model.layers.1.mlp.experts"),
    ],
)
def test_meaningless_options_are_wrong(options: dict[str, Any], code: str, words: str, tmp_path: Path) -> None:
    assert words in only(diagnose(str(base_folder(tmp_path)), options), "error", code)


def test_one_routed_adapter_and_a_loss_from_the_base_router_are_warnings(tmp_path: Path) -> None:
    one = diagnose(str(base_folder(tmp_path / "a")), {"num_experts": 1})
    assert "it equals variant='S'" in only(one, "warning", "option-warning")
    loud = diagnose(str(base_folder(tmp_path / "b", output_router_logits=True, router_aux_loss_coef=0.02)))
    message = only(loud, "warning", "base-aux-loss")
    assert "router_aux_loss_coef=0.02" in message
    assert "output_router_logits=False" in message
    off = diagnose(str(base_folder(tmp_path / "c", output_router_logits=True, router_aux_loss_coef=0.0)))
    assert off.findings == []


def test_what_peft_warns_about_when_attaching_is_a_warning(tmp_path: Path) -> None:
    base = str(base_folder(tmp_path, tie_word_embeddings=True))
    assert "tied layer" in only(diagnose(base, {"modules_to_save": ["lm_head"]}), "warning", "attach-warning")


def test_an_adapter_for_each_of_very_many_experts_warns_of_its_size(tmp_path: Path) -> None:
    base = str(base_folder(tmp_path, num_experts=128))
    message = only(diagnose(base, {"variant": "E"}), "warning", "many-experts")
    assert "each of 128 base experts in 2 blocks" in message
    assert f"{2 * 128 * 2 * 32 * 16:,} parameters" in message
    assert diagnose(base, {"variant": "R"}).findings == []


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{", "config-unreadable"),
        ("{}", "config-unusable"),
        ('{"model_type": "from_the_future"}', "config-unusable"),
        ('{"model_type": "olmoe", "hidden_size": "wide"}', "config-unusable"),
        ('{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}', "config-unusable"),
        ('{"model_type": "olmoe", "hidden_act": "no_such_act"}', "model-not-built"),
    ],
)
def test_a_bad_config_is_one_message(text: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    diagnosis = diagnose(str(tmp_path))
    assert codes(diagnosis) == [("error", code)]
    assert "\n" not in diagnosis.findings[0].message


def test_what_is_not_there_is_bad_usage(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path)
    with pytest.raises(TargetError, match=r"neither a folder here nor a Hub id \(owner/name\)"):
        diagnose("no/such/folder")
    with pytest.raises(TargetError, match="neither a folder here nor a model whose config"):
        diagnose("nobody/no-such-model")  # offline: not in the cache
    with pytest.raises(TargetError, match=r"holds neither config.json .* adapters lie in .*adapter"):
        diagnose(str(tmp_path))
    with pytest.raises(TargetError, match="is a file; name its folder"):
        diagnose(str(adapter / "adapter_model.safetensors"))
    with pytest.raises(TargetError, match="holds its settings; leave out r, top_k"):
        diagnose(str(adapter), {"r": 8, "top_k": 1})
    with pytest.raises(TargetError, match="is no adapter folder"):
        diagnose(str(tmp_path / "base"), base_model=str(tmp_path / "base"))
    with pytest.raises(TargetError, match="neither a folder here"):
        diagnose(str(adapter), base_model="no/such/folder")


def test_rows_alike_are_grouped_by_layer() -> None:
    def row(name: str, width: int = 8) -> TrainableRow:
        return TrainableRow(name, {"perft_A": (1, 2, width)}, 2 * width, None)

    rows = [row(f"layers.{i}.experts") for i in (1, 2, 3, 5)] + [row("layers.4.experts", 16), row("a.0.b.1.experts")]
    assert [name for name, _ in group_rows(rows)] == ["layers.[1-3,5].experts", "layers.4.experts", "a.0.b.1.experts"]


def test_bytes_are_decimal() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 999_949, 999_951, 13_600_000_000)] == [
        *("0 B", "999 B", "1.0 kB", "999.9 kB", "1.0 MB", "13.6 GB"),
    ]
