"""The coordinate check on small models: µP passes, every other parametrisation is caught, bad input is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OlmoeConfig
from transformers.models.mixtral import modeling_mixtral
from typer.testing import CliRunner

from hf_moe_ext.cli import app
from hf_moe_ext.models import MixtralExtConfig, OlmoeExtConfig
from hf_moe_ext.mup import CoordCheck, check_coordinates
from hf_moe_ext.mup.coord_check import measure
from hf_moe_ext.mup.coord_input import draw_tokens, prepare_config
from hf_moe_ext.mup.coord_probe import RECORDED_ATTENTION, Probe, align, rms
from hf_moe_ext.mup.coord_report import as_json, draw_check, explain_findings, write_json, write_png
from hf_moe_ext.mup.coord_verdict import Row, Size, fit_rows, fit_slope, judge

WIDTHS, BASE = (32, 64, 128), 32
MUP = {"mup": "mup", "mup_base_hidden_size": BASE}
BLOCKS: dict[str, dict[str, Any]] = {"standard": {}, "dcca": {"moe_block": "dcca", "moe_latent_size": 16}}


def make_config(**keys: Any) -> Any:
    return MixtralExtConfig(
        **{
            "hidden_size": BASE,
            "intermediate_size": 2 * BASE,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 64,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "initializer_range": 0.1,
            "max_position_embeddings": 64,
        }
        | keys
    )


def make_model_init(router_factor: Callable[[float], float] = lambda m: 1.0) -> Callable[[Any], Any]:
    """As in `recipes/benchmarks/mup_coord.py`: a wide embedding; small outputs, whose first values fade sooner."""

    def model_init(config: Any) -> Any:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(5)
            model.lm_head.weight.mul_(0.1)
            for layer in model.model.layers:
                layer.mlp.gate.weight.mul_(0.1 * router_factor(config.hidden_size / BASE))
        return model

    return model_init


def run_small(config: Any, router_factor: Callable[[float], float] = lambda m: 1.0, **keys: Any) -> CoordCheck:
    settings = {"num_steps": 3, "seeds": (0, 1, 2, 3), "model_init": make_model_init(router_factor)}
    return check_coordinates(config, **{"widths": WIDTHS, **settings, **keys})


def failures(check: CoordCheck) -> set[tuple[str, int]]:
    return {(finding.row.quantity, finding.row.step) for finding in check.findings if not finding.ok}


@pytest.mark.parametrize("block", BLOCKS)
def test_mup_passes(block: str) -> None:
    check = run_small(make_config(**MUP, **BLOCKS[block]))
    assert check.ok, explain_findings(check)
    assert {finding.row.step for finding in check.findings} == {0, 1, 3}
    for layer in (0, 1):
        assert -0.6 < check.slope("router_logits", 0, layer) < -0.4
        assert -1.7 < check.slope("covariance", 0, layer) < -1.3
        assert -1.4 < check.slope("covariance", 3, layer) < -0.8
        assert check.slope("covariance", 3, layer) > check.slope("covariance", 0, layer) + 0.1


@pytest.mark.parametrize("block", BLOCKS)
def test_simplep_is_caught_by_its_router_alone(block: str) -> None:
    check = run_small(make_config(**MUP | {"mup": "simplep"}, **BLOCKS[block]), seeds=(0, 1))
    assert {quantity for quantity, _ in failures(check)} == {"delta_router_logits"}
    assert max(check.slope("delta_router_logits", 1, layer) for layer in (0, 1)) >= 0.7


@pytest.mark.parametrize("block", BLOCKS)
def test_standard_parametrisation_grows(block: str) -> None:
    check = run_small(make_config(**BLOCKS[block]), seeds=(0, 1))
    assert not check.ok
    assert "standard parametrisation" in check.notes[0]
    assert check.slope("delta_residual", 1, 1) >= 1.2


@pytest.mark.parametrize("block", BLOCKS)
def test_hidden_type_router_is_caught_at_the_start(block: str) -> None:
    # A folded router has σ/m and η/m: times sqrt(m) it is scaled as a hidden weight.
    check = run_small(make_config(**MUP, mup_form="folded", **BLOCKS[block]), lambda m: m**0.5, seeds=(0, 1))
    assert ("router_logits", 0) in failures(check)
    assert all(abs(check.slope("router_logits", 0, layer)) < 0.2 for layer in (0, 1))


def test_both_forms_are_one() -> None:
    forms = [run_small(make_config(**MUP, mup_form=form), seeds=(0,)) for form in ("multiplier", "folded")]
    for quantity in ("delta_router_logits", "delta_residual", "covariance"):
        slopes = [form.slope(quantity, 3, 1) for form in forms]
        assert slopes[0] == pytest.approx(slopes[1], abs=1e-3)
    # The gradient of the weight itself is what the forms differ in: m times as large folded.
    weights = [form.slope("weight_gradient:mlp.gate.weight", 3, 1) for form in forms]
    assert weights[1] - weights[0] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        lambda: make_config(**MUP, moe_block=["standard", "dcca"], moe_latent_size=16, moe_latent_norm=True),
        lambda: OlmoeExtConfig(
            **{**MUP, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4},
            **{"vocab_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0, "mup_base_head_dim": 8},
        ),
        lambda: make_config(
            **MUP, moe_block="dcca", moe_latent_size=16, mup_base_latent_size=16, residual_multiplier=0.5
        ),
    ],
    ids=["mixed layers", "olmoe", "dcca"],
)
def test_any_ext_configuration(config: Any) -> None:
    check = check_coordinates(config(), (32, 64), num_steps=1, seeds=(0,))
    assert all(math.isfinite(finding.row.slope) for finding in check.findings)
    latents = {row.layer for row in check.rows if row.quantity == "latent"}
    assert latents == {layer for layer, block in enumerate(check.settings.moe_blocks) if block == "dcca"}


def test_held_latent_keeps_its_size() -> None:
    config = make_config(**MUP, moe_block="dcca", moe_latent_size=16)
    check = check_coordinates(config, (32, 64), num_steps=1, seeds=(0,), hold_latent=True)
    assert check.settings.hold_latent
    # The latent's descend is then an output: its first values shrink with the width, the growing latent's do not.
    growing = check_coordinates(config, (32, 64), num_steps=1, seeds=(0,))
    assert check.slope("latent", 0, 0) < growing.slope("latent", 0, 0) - 0.8


@pytest.mark.parametrize("stock", [MixtralConfig, OlmoeConfig])
def test_stock_configuration_is_measured_as_its_ext_form(stock: Any) -> None:
    experts = {"num_local_experts": 4} if stock is MixtralConfig else {"num_experts": 4}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = stock(**sizes, **experts, num_key_value_heads=4, vocab_size=64, num_experts_per_tok=2, pad_token_id=0)
    check = check_coordinates(config, (32, 64), num_steps=1, seeds=(0,))
    assert check.settings.model_type == f"{config.model_type}_ext"
    assert (check.settings.mup, set(check.settings.moe_blocks)) == ("none", {"standard"})
    assert "stock family" in check.notes[0]
    assert "a checkpoint's own weights" in check.notes[0]
    converted, _ = prepare_config(config)
    assert converted.hidden_size == 32
    assert converted.num_local_experts == 4


def test_slope_of_a_power_law_is_exact() -> None:
    widths = (64, 128, 256, 512)
    for power in (-1.5, -0.5, 0.0, 1.0):
        assert fit_slope(widths, [3.0 * width**power for width in widths]) == pytest.approx(power, abs=1e-12)
    assert fit_slope((2, 2, 8), (1.0, 4.0, 32.0)) == pytest.approx(2.0, abs=1e-12)  # through the mean of the two
    assert math.isnan(fit_slope(widths, (1.0, 0.0, 1.0, 1.0)))
    assert math.isnan(fit_slope(widths, (1.0, math.inf, 1.0, 1.0)))
    with pytest.raises(ValueError, match="two different widths; got \\[64, 64\\]"):
        fit_slope((64, 64), (1.0, 2.0))
    with pytest.raises(ValueError, match="got 1 and 2"):
        fit_slope((64, 128), (1.0,))


def test_rows_pool_the_seeds_and_keep_each() -> None:
    sizes = [
        Size("delta_residual", 0, 1, width, seed, width**power)
        for seed, power in enumerate((0.1, 0.3))
        for width in (2, 4, 8)
    ]
    (row,) = fit_rows(sizes)
    assert row.slope == pytest.approx(0.2)
    assert row.seed_slopes == pytest.approx((0.1, 0.3))
    assert row.sizes[4] == pytest.approx((4**0.1, 4**0.3))


@pytest.mark.parametrize(
    ("quantity", "step", "slope", "ok"),
    [
        ("delta_residual", 1, 0.30, True),
        ("delta_residual", 3, -0.31, False),
        ("delta_latent", 6, 0.31, False),
        ("delta_router_logits", 6, math.nan, False),
        ("router_logits", 0, -0.45, True),
        ("router_logits", 0, 0.05, False),
        ("router_logits", 0, -0.80, False),
        ("delta_residual", 2, 9.0, None),
        ("output_logits", 0, -0.5, None),
        ("attention_logits", 0, -0.5, None),
        ("residual", 6, 9.0, None),
    ],
)
def test_bars(quantity: str, step: int, slope: float, ok: bool | None) -> None:
    found = judge([Row(quantity, 1, step, slope, (slope,), {})], router_start=True)
    assert [finding.ok for finding in found] == ([] if ok is None else [ok])


def test_the_router_s_start_is_asked_of_mup_only() -> None:
    assert judge([Row("router_logits", 0, 0, 0.5, (0.5,), {})], router_start=False) == []


def test_covariance_and_cosine_by_hand() -> None:
    gradient, output = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 1.0], [5.0, 6.0]])
    assert align(gradient, output) == pytest.approx((0.0, math.sqrt(0.5 / 2)))
    gradient = torch.tensor([[1.0, -1.0]])
    assert align(gradient, 3 * gradient) == pytest.approx((3.0, 1.0))
    assert rms(torch.tensor([3.0, 4.0])) == pytest.approx(math.sqrt(12.5))


def test_probe_sees_what_the_model_computes() -> None:
    """Against the stock outputs of the same model and a second backward by autograd."""
    torch.manual_seed(0)
    config = make_config(**MUP | {"mup_base_hidden_size": 16})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tokens = draw_tokens(64, 2, 8)
    plain = model(tokens, labels=tokens, output_hidden_states=True, output_router_logits=False, output_attentions=True)
    with Probe(model) as probe:
        seen = probe.observe(tokens)
    assert seen.loss == pytest.approx(float(plain.loss.detach()), abs=1e-6)
    torch.testing.assert_close(seen.features["output_logits", None], plain.logits.detach())
    torch.testing.assert_close(seen.features["residual", 0], plain.hidden_states[1].detach())
    # Rows of the lower triangle, made whole again, are the logits that eager attention takes the softmax of.
    logits = torch.full((2, 4, 8, 8), -torch.inf)
    logits[..., torch.ones(8, 8, dtype=torch.bool).tril()] = seen.features["attention_logits", 1]
    torch.testing.assert_close(logits.softmax(-1), plain.attentions[1].detach())
    largest = seen.features["router_logits", 0].softmax(-1).amax(-1).mean()
    assert seen.numbers["max_router_probability", 0] == pytest.approx(float(largest), rel=1e-5)
    gate = model.model.layers[0].mlp.gate
    torch.testing.assert_close(rms(gate.weight.grad), seen.numbers["weight_gradient:mlp.gate.weight", 0])
    assert model.config._attn_implementation == RECORDED_ATTENTION
    assert not hasattr(model.model.layers[0].self_attn, "coord_check_recorder")


def test_router_update_leaves_the_first_weights_out() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(**MUP)).eval()
    tokens = draw_tokens(64, 2, 8)
    gate, inputs = model.model.layers[0].mlp.gate, []
    with Probe(model) as probe:
        assert ("router_update", 0) not in probe.observe(tokens).numbers
        with torch.no_grad():
            gate.weight += 0.25
            model.model.embed_tokens.weight.mul_(2)
        handle = gate.register_forward_hook(lambda _, args, __: inputs.append(args[0].detach()))
        seen = probe.observe(tokens)
        handle.remove()
    assert seen.numbers["router_update", 0] == pytest.approx(rms(0.25 * inputs[0].sum(-1)), rel=1e-5)


def test_nothing_of_transformers_is_changed() -> None:
    stock = modeling_mixtral.eager_attention_forward
    forward = modeling_mixtral.MixtralAttention.forward
    state = torch.get_rng_state()
    measure(make_config(**MUP), draw_tokens(64, 2, 8), 1, 1e-3, seed=3)
    assert modeling_mixtral.eager_attention_forward is stock
    assert modeling_mixtral.MixtralAttention.forward is forward
    assert torch.equal(torch.get_rng_state(), state)


def test_drawn_tokens_are_few_kinds_and_always_the_same() -> None:
    tokens = draw_tokens(50_000, 8, 64)
    assert tokens.shape == (8, 64)
    assert torch.equal(tokens, draw_tokens(50_000, 8, 64))
    assert tokens.unique().numel() <= 64
    assert int(draw_tokens(5, 4, 16).max()) == 4


def test_a_diverged_training_fails_and_says_so() -> None:
    check = check_coordinates(make_config(), (32, 64), num_steps=1, seeds=(0,), lr=1e30)
    assert not check.ok
    assert any("training diverged" in line for line in explain_findings(check))
    assert "NaN" not in as_json(check)
    assert any(row["slope"] is None for row in json.loads(as_json(check))["rows"])


def test_a_fading_start_is_told_from_a_router_that_stops_learning() -> None:
    quick = check_coordinates(make_config(**MUP), (32, 64), num_steps=1, seeds=(0,))
    for update, told in ((-0.1, True), (-0.5, False)):
        rows = [
            Row(name, 0, 1, slope, (slope,), {})
            for name, slope in (("delta_router_logits", -0.4), ("router_update", update))
        ]
        check = CoordCheck(quick.settings, rows, judge(rows, router_start=True))
        assert not check.ok
        assert any("are inside: what shrinks" in line for line in explain_findings(check)) == told


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"widths": (64,)}, ValueError, "widths: must be at least two different sizes, each once; got \\[64\\]"),
        ({"widths": (64, 64)}, ValueError, "widths: must be at least two different sizes"),
        ({"widths": (64, 72.0)}, TypeError, "widths: must be a whole number, got 72.0"),
        ({"widths": (32, 36)}, ValueError, "choose a value for which it is whole"),
        ({"num_steps": 0}, ValueError, "num_steps: must be at least 1, got 0"),
        ({"seeds": ()}, ValueError, "seeds: must be one or more"),
        ({"lr": 0.0}, ValueError, "lr: must be above 0; got 0.0"),
        ({"lr": math.nan}, ValueError, "lr: must be above 0; got nan"),
        ({"num_sequences": 0}, ValueError, "num_sequences: must be at least 1, got 0"),
        ({"tokens": torch.zeros(4)}, ValueError, "tokens: must be ids \\[rows, length\\]"),
        ({"tokens": torch.full((2, 4), 64)}, ValueError, "tokens: ids must be from 0 to vocab_size - 1 = 63; got 64"),
        ({"hold_latent": True}, ValueError, "hold_latent: no layer has a latent to hold"),
        ({"model_init": lambda config: AutoModelForCausalLM.from_config(make_config())}, ValueError, "hidden_size=64"),
    ],
)
def test_bad_arguments(keys: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_coordinates(make_config(**MUP), **{"widths": (64, 128), "num_steps": 1, "seeds": (0,), **keys})


def test_a_held_latent_needs_a_base_that_has_it() -> None:
    config = make_config(**MUP | {"mup_base_hidden_size": 16}, moe_block="dcca", moe_latent_size=16)
    with pytest.raises(ValueError, match="moe_latent_size=16 and mup_base_latent_size=8; write both the same"):
        check_coordinates(config, (32, 64), hold_latent=True)


def test_other_families_are_refused() -> None:
    with pytest.raises(ValueError, match=r"families mixtral_ext, olmoe_ext .*; got model_type 'llama'"):
        check_coordinates(LlamaConfig(), (32, 64))
    with pytest.raises(TypeError, match="config must be a configuration of Transformers, got dict"):
        check_coordinates({"hidden_size": 32}, (32, 64))


@pytest.fixture(scope="module")
def quick() -> CoordCheck:
    return check_coordinates(make_config(**MUP), (32, 64), num_steps=1, seeds=(0, 1))


def test_files_are_written_whole_or_not_at_all(
    quick: CoordCheck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "new" / "check.json"
    write_json(quick, target)
    assert json.loads(target.read_text())["settings"]["widths"] == [32, 64]
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib")
    figure = tmp_path / "new" / "check.png"
    write_png(quick, figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    before = target.read_bytes()

    def write_half(path: Path, text: str, **_: Any) -> int:
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="disk full"):
        write_json(quick, target)
    assert target.read_bytes() == before
    assert sorted(path.name for path in target.parent.iterdir()) == ["check.json", "check.png"]


def test_figure_has_a_panel_for_each_quantity(quick: CoordCheck) -> None:
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib")
    titles = [axis.get_title() for axis in draw_check(quick).axes]
    assert "Δ router logits, layer 1" in titles
    assert "Δ output logits" in titles


def run_command(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["coord-check", *words], env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


def test_command(tmp_path: Path) -> None:
    make_config(**MUP).save_pretrained(tmp_path / "mup")
    quick = ("--widths", "32,64", "--steps", "1", "--sequences", "4", "--length", "16")
    code, out, error = run_command(str(tmp_path / "mup" / "config.json"), *quick, "--seeds", "0", "--json")
    assert code in (0, 1), error
    report = json.loads(out)
    wanted = check_coordinates(
        make_config(**MUP), (32, 64), num_steps=1, seeds=(0,), num_sequences=4, sequence_length=16
    )
    assert report == json.loads(as_json(wanted))
    assert code == (0 if report["ok"] else 1)


def test_command_prints_the_verdict_and_fails(tmp_path: Path) -> None:
    make_config().save_pretrained(tmp_path / "sp")
    files = ("--output", str(tmp_path / "check.json"), "--png", str(tmp_path / "check.png"))
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib")
    code, out, error = run_command(
        str(tmp_path / "sp"), "--widths", "32,64,128", "--steps", "1", "--seeds", "0,1", *files
    )
    assert code == 1, error
    for words in (
        "standard parametrisation",
        "FAILED Δ residual stream, layer 1, t=1",
        "t=3, 6 not reached",
        "router update",
    ):
        assert words in out
    assert json.loads((tmp_path / "check.json").read_text())["ok"] is False
    assert (tmp_path / "check.png").is_file()


def test_command_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, error = run_command(str(tmp_path / "nothing"))
    assert code == 2
    assert "cannot be read" in error
    LlamaConfig().save_pretrained(tmp_path / "llama")
    assert run_command(str(tmp_path / "llama"))[0] == 2
    make_config().save_pretrained(tmp_path / "sp")
    code, _, error = run_command(str(tmp_path / "sp"), "--widths", "32;64")
    assert (code, "widths: must be whole numbers with commas between them" in error) == (2, True)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    code, _, error = run_command(str(tmp_path / "sp"), "--png", str(tmp_path / "x.png"))
    assert (code, "a PNG needs matplotlib" in error) == (2, True)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "abc"}, "Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
    ],
)
def test_command_refuses_an_invalid_configuration(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_config(**MUP).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    code, out, error = run_command(str(path))
    assert (code, out) == (2, "")
    assert message in error
    assert len(error.strip().splitlines()) == 1


def _absent_device() -> str:
    return "cuda:99" if torch.cuda.is_available() else "cuda"


def _train_nothing(*_: Any, **__: Any) -> Any:
    raise AssertionError("a model was trained")


@pytest.mark.parametrize("device", ["nonsense", "meta", _absent_device()])
def test_command_refuses_a_device_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    make_config(**MUP).save_pretrained(tmp_path)
    monkeypatch.setattr("hf_moe_ext.mup.coord_check.measure", _train_nothing)
    code, out, error = run_command(str(tmp_path), "--device", device)
    assert (code, out) == (2, "")
    assert f"device: PyTorch must be able to calculate on it, got '{device}'" in error


@pytest.mark.parametrize("option", ["--output", "--png"])
def test_command_refuses_a_folder_for_a_file_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    make_config(**MUP).save_pretrained(tmp_path)
    monkeypatch.setattr("hf_moe_ext.mup.coord_check.measure", _train_nothing)
    before = sorted(tmp_path.iterdir())
    for path, message in (
        (tmp_path, "must be a file to write"),
        (tmp_path / "config.json" / "x", "must lie in a folder"),
    ):
        code, _, error = run_command(str(tmp_path), option, str(path))
        assert code == 2
        assert f"{option} {message}" in error
    assert sorted(tmp_path.iterdir()) == before


def test_command_that_runs_out_of_memory_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory:\ntried to allocate 80 GiB")

    make_config(**MUP).save_pretrained(tmp_path)
    monkeypatch.setattr("hf_moe_ext.mup.coord_check.measure", run_out)
    code, out, error = run_command(str(tmp_path))
    assert (code, out) == (2, "")
    assert error == "hf-moe coord-check: out of memory: tried to allocate 80 GiB\n"
