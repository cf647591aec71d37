"""The benchmark of a training step: equal active parameters, memory that is counted right, a card that says what was found."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
BENCHMARKS = ROOT / "recipes" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import perft_card  # noqa: E402  # after the path is set
import perft_methods  # noqa: E402
import step_cost  # noqa: E402
from perft_methods import METHODS, PRESETS, REFERENCE  # noqa: E402

CARDS = ROOT / "model_cards"
TINY = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 16, "vocab_size": 64, "length": 16}


def tiny(preset: str, **changes):
    """A preset's family and proportions, small, on the CPU."""
    cpu = {"device": "cpu", "dtype": "float32", "threads": 1}
    return dataclasses.replace(PRESETS[preset], **{**TINY, **cpu, **changes})


@pytest.fixture(scope="module")
def script():
    """`perft.py` as a module; by its path, because `perft` is also a folder of tests."""
    spec = importlib.util.spec_from_file_location("perft_benchmark", BENCHMARKS / "perft.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def one_thread():
    """The script sets the number of threads; later tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results():
    """The committed numbers, to be changed at will."""
    return json.loads((CARDS / "perft-speed.json").read_text())


def test_the_committed_card_is_rendered_from_the_committed_numbers():
    assert (CARDS / "perft-speed.md").read_text() == perft_card.render_card(results())


def test_the_committed_card_holds_every_method():
    for run in results()["runs"].values():
        assert list(run["methods"]) == list(METHODS)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].config is not None])
def test_adapters_have_equal_active_parameters(preset, name):
    shape, method = PRESETS[preset], METHODS[name]
    rank = perft_methods.choose_rank(method, shape, 16)
    active = method.active_per_rank(shape) * rank + method.active_fixed(shape)
    budget = METHODS[REFERENCE].active_per_rank(shape) * 16
    # Exact but for two: half a rank of a method that spends much per rank is a few percent.
    if name == "LoRA on experts" or (preset, name) == ("gpu80-mixtral", "D 4"):
        assert abs(active - budget) <= method.active_per_rank(shape) / 2
    else:
        assert active == budget


@pytest.mark.parametrize("preset", ["cpu2", "gpu80-mixtral"])
def test_the_formulas_count_what_is_there(preset):
    shape = tiny(preset)
    base = perft_methods.build_base(shape, seed=0)
    share = shape.num_experts / shape.top_k
    for name, method in METHODS.items():
        if method.config is None:
            continue
        rank = perft_methods.choose_rank(method, shape, 4)
        model = perft_methods.attach(base, method, rank)
        trainable, active = perft_methods.count_adapter(model, method, shape, rank)
        formula = method.active_per_rank(shape) * rank + method.active_fixed(shape)
        assert active == formula * shape.num_hidden_layers, name
        if name in (REFERENCE, "S", "D 4"):
            assert trainable == active, name
        elif name in ("E", "LoRA on experts"):
            assert trainable == active * share, name
        else:
            assert trainable > active, name


def test_full_fine_tuning_counts_a_tokens_experts():
    shape = tiny("cpu2")
    base = perft_methods.build_base(shape, seed=0)
    model = perft_methods.attach(base, METHODS["full"], None)
    trainable, active = perft_methods.count_adapter(model, METHODS["full"], shape, None)
    one_expert = 3 * shape.hidden_size * shape.intermediate_size
    assert trainable == sum(p.numel() for p in base.parameters())
    assert trainable - active == shape.num_hidden_layers * (shape.num_experts - shape.top_k) * one_expert


def test_methods_share_weights_and_nothing_else():
    base = perft_methods.build_base(tiny("cpu2"), seed=0)
    models = [perft_methods.attach(base, METHODS[name], 2) for name in ("full", "LoRA on experts", "S")]
    pointers = {p.data_ptr() for p in base.parameters()}
    for model in models:
        assert pointers <= {p.data_ptr() for p in model.parameters()}
    assert not any(p.requires_grad for p in base.parameters())
    assert all(p.requires_grad for p in models[0].parameters())
    assert {n for n, p in models[2].named_parameters() if p.requires_grad} == {
        n for n, _ in models[2].named_parameters() if "perft_" in n
    }


@pytest.mark.parametrize("name", METHODS)
def test_a_step_trains_what_is_trainable_and_leaves_no_gradient(name):
    shape = tiny("cpu2", num_hidden_layers=1, dtype="bfloat16")
    model = perft_methods.attach(perft_methods.build_base(shape, seed=0), METHODS[name], 2)
    reached = []

    def watch(module, args, output):
        output.register_hook(lambda gradient: reached.append(True))

    model.get_input_embeddings().register_forward_hook(watch)
    ids = torch.randint(3, shape.vocab_size, (2, shape.length))
    with step_cost.training_step(model, {"input_ids": ids, "labels": ids}) as (step, optimizer):
        step()
        trainable = {id(p) for p in model.parameters() if p.requires_grad}
        assert {id(p) for p in (optimizer.state if optimizer else ())} == trainable
        assert all(p.grad is None for p in model.parameters())
    assert reached == [True]


def test_the_transient_peak_is_the_most_that_is_held_at_a_time():
    kept = torch.empty(700_000, dtype=torch.uint8)

    def step():
        first = torch.empty(1_000_000, dtype=torch.uint8)
        del first
        second = torch.empty(2_000_000, dtype=torch.uint8)
        return kept, second, torch.empty(500_000, dtype=torch.uint8)

    assert step_cost.measure_transient_bytes(step, "cpu") == pytest.approx(2_500_000, abs=1000)


def test_bytes_of_a_storage_count_once():
    tensor = torch.empty(10, 4)
    assert step_cost.count_bytes([tensor, tensor[2:], tensor.T, torch.empty(3)]) == 160 + 12


def test_warm_up_steps_do_not_count():
    calls = []
    times = step_cost.time_steps(lambda: calls.append(1), "cpu", warmup=2, count=3)
    assert (len(calls), len(times)) == (5, 3)


def test_a_ratio_is_taken_within_its_round(script):
    mine, theirs = [(2.0, 3.0), (8.0, 3.0), (3.0, 3.0)], [(1.0, 3.0), (8.0, 1.0), (2.0, 2.0)]
    summary = script.summarize(mine, theirs, "cpu")
    assert summary["step_seconds"] == 3.0
    assert summary["ratio"] == [1.25, 1.5, 1.75]
    assert summary["processor_ratio"] == [1.25, 1.5, 2.25]
    assert "processor_ratio" not in script.summarize(mine, theirs, "cuda")


def test_the_card_says_which_targets_are_missed():
    run = next(iter(results()["runs"].values()))
    fine = {"S": 1.05, "D 4": 1.04, "E": 1.15, "R 2 of 4": 1.0, "LoRA on experts": 2.5}
    for name, method in run["methods"].items():
        method["ratio"] = [0.9, fine.get(name, 1.0), 1.2]
        method.update(adapter_bytes=0, optimizer_bytes=0, transient_bytes=100)
    run["base_bytes"], run["profiles"] = 900, {}
    assert perft_card.missed_targets(run) == {}

    run["methods"]["S"]["ratio"][1] = 1.051
    run["methods"]["D 4"]["ratio"] = [1.051, 1.06, 1.07]
    run["methods"]["E"]["ratio"][1] = 1.4
    run["methods"]["R 2 of 4"]["transient_bytes"] = 121
    run["methods"]["R 1 of 8"]["adapter_bytes"] = 19
    missed = perft_card.missed_targets(run)
    assert set(missed) == {"S", "D 4", "E", "R 2 of 4", "LoRA on experts"}
    assert "not decided" in missed["S"]
    assert "not decided" not in missed["D 4"] + missed["R 2 of 4"]
    assert "peak memory 1.021" in missed["R 2 of 4"]
    assert "1.79 times the step of E" in missed["LoRA on experts"]

    run["profiles"] = {REFERENCE: {"a": 5.0, "b": 1.0}, "S": {"a": 5.5, "c": 3.0}}
    card = perft_card.render_card({"runs": {"x": run}})
    assert "Targets met: R 1 of 4, R 1 of 8, R 2 of 8." in card
    assert "S, milliseconds of one step more than LoRA q, v: `c` +3.0, `a` +0.5, `b` -1.0." in card
    assert "R 2 of 4 1.210, R 1 of 8 1.190" in card


def test_a_method_that_does_not_fit_is_named_with_the_reason(tmp_path):
    changed = results()
    run = next(iter(changed["runs"].values()))
    run["methods"]["full"] = {"rank": None, "trainable": 7, "active": 3, "does_not_fit": "CUDA out of memory"}
    assert "| full |  | 7 | 3 | does not fit: CUDA out of memory |" in perft_card.render_card(changed)
    perft_card.draw_card(changed, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("preset", ["gpu80-olmoe", "gpu80-mixtral"])
def test_the_script_from_end_to_end(script, preset, tmp_path, monkeypatch, capsys):
    words = [
        *("--preset", preset, "--device", "cpu", "--threads", "1", "--layers", "1", "--hidden_size", "64"),
        *("--intermediate_size", "32", "--vocab_size", "64", "--length", "16", "--num_experts", "8"),
        *("--rounds", "2", "--steps", "1", "--methods", "frozen base", "R 2 of 4", "S"),
        *("--work_dir", str(tmp_path / "work"), "--card_dir", str(tmp_path / "card")),
    ]
    monkeypatch.setattr(sys, "argv", ["perft.py", *words])
    script.main()
    written = json.loads((tmp_path / "card" / "perft-speed.json").read_text())
    ((name, run),) = written["runs"].items()
    assert name.startswith(f"{preset}, layers 1, hidden_size 64")
    assert list(run["methods"]) == ["frozen base", REFERENCE, "R 2 of 4", "S"]
    assert run["shape"]["dtype"] == "bfloat16"
    assert run["methods"][REFERENCE]["ratio"] == [1.0, 1.0, 1.0]
    for method in run["methods"].values():
        assert 0 < method["step_seconds"] < 60
        assert method["transient_bytes"] > 16 * 64 * 4
    # AdamW keeps two float32 moments per parameter, and a float32 step count per tensor.
    state = run["methods"]["S"]
    assert state["adapter_bytes"] == 4 * state["trainable"]
    assert 0 <= state["optimizer_bytes"] - 8 * state["trainable"] <= 16
    (log,) = (tmp_path / "work").iterdir()
    assert len(json.loads(log.read_text())["S"]) == 2
    card = (tmp_path / "card" / "perft-speed.md").read_text()
    assert card == perft_card.render_card(written)
    assert card in capsys.readouterr().out
    assert (tmp_path / "card" / "perft-speed.png").stat().st_size > 10_000


def test_a_gpu_preset_without_a_gpu_says_so(script, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(sys, "argv", ["perft.py", "--preset", "gpu80-olmoe"])
    with pytest.raises(SystemExit, match="gpu80-olmoe needs a CUDA device"):
        script.main()


@pytest.mark.parametrize("flag", ["rounds", "steps", "r"])
def test_a_count_below_one_is_refused(script, flag, capsys):
    with pytest.raises(SystemExit):
        script.parse_options([f"--{flag}", "0"])
    assert f"--{flag} must be at least 1; got 0" in capsys.readouterr().err
