"""The optimum of a curve, the cells of a sweep, and that a study can be stopped, searched and drawn."""

import importlib.util
import json
import math
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

from hf_moe_ext.mup import Cell, Sweep, draw_sweep, find_optimum, read_cells, run_cells, search_cells, summarize
from hf_moe_ext.mup import trainer_optimizer as mup_optimizer
from hf_moe_ext.mup.optimum import average_losses, compute_regret, fit_parabola, seed_spread, shift_steps
from support.latent_models import make_config
from support.zoo import VOCAB_SIZE

# A published sweep (held-out nats): a base of width 32 under learning rates 2^-9 to 2^-3, then wider models.
BASE_LOSSES = dict(zip(range(-9, -2), (2.619, 2.514, 2.471, 2.454, 2.484, 2.515, 2.803), strict=True))
STANDARD = {
    64: (2.760, 2.591, 2.501, 2.433, 2.401, 2.425, 2.487),
    128: (2.600, 2.491, 2.414, 2.365, 2.392, 2.488, 2.590),
    256: (2.573, 2.480, 2.410, 2.365, 2.413, 2.518, 2.609),
}
MUP = {
    64: (2.484, 2.417, 2.390, 2.433, 2.491),
    128: (2.464, 2.401, 2.388, 2.432, 2.485),
    256: (2.456, 2.366, 2.342, 2.380, 2.439),
}


def make_record(mode, value, learning_rate, loss, seed=0, max_steps=150):
    cell = {"mode": mode, "value": value, "learning_rate": learning_rate, "seed": seed, "max_steps": max_steps}
    return {"cell": cell, "loss": loss, "seconds": 1.0, "sweep": {}}


def make_records(mode, wider, first_power):
    records = [make_record(mode, 32, 2.0**power, loss) for power, loss in BASE_LOSSES.items()]
    for width, losses in wider.items():
        records += [make_record(mode, width, 2.0 ** (first_power + i), loss) for i, loss in enumerate(losses)]
    return records


def make_sweep(**changes):
    settings = {
        "base_config": make_config("mixtral_ext", "standard", output_router_logits=True),
        "axis": "hidden_size",
        "values": (32, 64),
        "learning_rates": {"mup": (2.0**-7, 2.0**-5)},
        "max_steps": (3,),
        "settings": {"rows": 8},
    }
    return Sweep(**(settings | changes))


class Rows(torch.utils.data.Dataset):
    """Random tokens."""

    def __init__(self, count=8, length=12):
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, VOCAB_SIZE, (count, length), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def build_trainer(config, cell, learning_rate=None, lr=None):
    args = TrainingArguments(
        output_dir="unused",
        learning_rate=cell.learning_rate if learning_rate is None else learning_rate,
        seed=cell.seed,
        max_steps=cell.max_steps,
        per_device_train_batch_size=4,
        max_grad_norm=0.0,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )

    def draw_model():
        return AutoModelForCausalLM.from_config(config)

    return Trainer(
        args=args,
        model_init=draw_model,
        train_dataset=Rows(),
        eval_dataset=Rows(4),
        data_collator=default_data_collator,
        optimizer_cls_and_kwargs=mup_optimizer(draw_model(), args=args, lr=lr),
    )


def build_trainer_of_a_model(config, cell):
    trainer = build_trainer(config, cell)
    trainer.model_init = None
    return trainer


@pytest.mark.parametrize("vertex", [-6.3, -6.0, -5.51])
def test_a_parabola_in_log2_gives_its_own_vertex(vertex):
    losses = {2.0**p: 2.0 + 0.03 * (p - vertex) ** 2 for p in range(-9, -3)}
    optimum = find_optimum(losses)
    assert optimum.bracketed
    assert optimum.learning_rate == 2.0 ** round(vertex)
    assert math.log2(optimum.vertex_learning_rate) == pytest.approx(vertex, abs=1e-9)
    assert optimum.vertex_loss == pytest.approx(2.0, abs=1e-9)


def test_a_grid_need_not_be_even():
    losses = {2.0**p: 1.0 + (p + 6.4) ** 2 for p in (-9, -7, -6, -2)}
    assert math.log2(find_optimum(losses).vertex_learning_rate) == pytest.approx(-6.4, abs=1e-9)


@pytest.mark.parametrize("losses", [[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.0]])
def test_a_best_rate_at_the_edge_is_not_bracketed(losses):
    optimum = find_optimum({2.0**p: loss for p, loss in enumerate(losses, -8)})
    assert (optimum.bracketed, optimum.vertex_learning_rate) == (False, None)


def test_a_neighbour_that_diverged_brackets_but_is_no_point_of_a_parabola():
    optimum = find_optimum({0.01: 2.0, 0.02: 1.0, 0.04: math.inf})
    assert (optimum.learning_rate, optimum.bracketed, optimum.vertex_learning_rate) == (0.02, True, None)


def test_of_equal_losses_the_smaller_rate_is_taken_and_a_plateau_has_no_vertex():
    assert find_optimum({0.04: 1.0, 0.02: 1.0, 0.01: 2.0}).learning_rate == 0.02
    assert fit_parabola([0, 1, 2], [1.0, 1.0, 1.0]) is None


def test_no_finite_loss_is_an_error():
    with pytest.raises(ValueError, match="no run of 2 has a finite loss; try smaller"):
        find_optimum({0.1: math.inf, 0.2: math.inf})


def test_shift_regret_mean_and_spread():
    by_seed = {0: {0.01: 2.0, 0.02: 1.0}, 1: {0.01: 2.2, 0.02: 1.5, 0.04: 9.0}}
    assert average_losses(by_seed) == {0.01: pytest.approx(2.1), 0.02: 1.25}
    assert seed_spread(by_seed, 0.02) == 0.5
    assert seed_spread({0: by_seed[0]}, 0.02) is None
    assert shift_steps(0.005, 0.02) == -2
    assert compute_regret(by_seed[0], 0.01) == 1.0
    assert compute_regret(by_seed[0], 0.08) is None
    assert compute_regret({0.01: 1.0, 0.02: math.inf}, 0.02) == math.inf


def test_regrets_and_shifts_of_a_published_sweep():
    standard, mup = (
        next(iter(summarize(make_records(mode, wider, power))))
        for mode, wider, power in (("none", STANDARD, -11), ("mup", MUP, -8))
    )
    for arm, regrets in ((standard, [0, 0.025, 0.123, 0.153]), (mup, [0, 0, 0, 0])):
        assert arm["base_learning_rate"] == 2.0**-6
        # Printed with three decimals from losses with more.
        assert [entry["regret"] for entry in arm["values"]] == pytest.approx(regrets, abs=1.1e-3)
    assert [entry["shift_steps"] for entry in standard["values"]] == [0, -1, -2, -2]
    assert [entry["shift_steps"] for entry in mup["values"]] == [0, 0, 0, 0]
    json.dumps([standard, mup], allow_nan=False)


def test_an_unfinished_seed_is_left_out_and_a_run_that_diverged_is_null():
    records = make_records("none", STANDARD, -11)
    more = [make_record("none", 64, 2.0**-6, 0.1, seed=1), make_record("none", 256, 2.0**-4, None)]
    (arm,) = summarize([*records, *more])
    widths = {entry["value"]: entry for entry in arm["values"]}
    assert widths[64]["seeds"] == [0]
    assert widths[64]["regret"] == pytest.approx(0.024, abs=1e-9)
    assert widths[256]["losses"][-1] == [2.0**-4, None]


def test_a_missing_base_is_an_error():
    with pytest.raises(ValueError, match="there is no run of the base value 16; run it first"):
        summarize(make_records("mup", MUP, -8), base_value=16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis": "depth"}, "axis must be one of hidden_size, num_experts, top_k, granularity; got 'depth'"),
        ({"learning_rates": {"ntk": (0.1,)}}, "learning_rates must be given by mode"),
        ({"learning_rates": {}}, "learning_rates must be given by mode"),
        ({"learning_rates": {"mup": (0.1, 0.1)}}, "nothing twice"),
        ({"learning_rates": {"mup": (0.0,)}}, "learning_rates of 'mup' must be positive"),
        ({"values": ()}, "values must hold something"),
        ({"max_steps": (0,)}, "max_steps must be positive"),
        ({"hidden_size": 64}, "hidden_size is the axis here"),
        ({"base_config": make_config(mup="mup", mup_base_hidden_size=32)}, "base_config must have mup='none'"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_sweep(**changes)


def test_cells_go_budget_by_budget_and_seed_by_seed():
    sweep = make_sweep(seeds=(0, 1), max_steps=(3, 6), learning_rates={"mup": (0.1,), "none": (0.2,)})
    order = [(c.max_steps, c.seed, c.mode, c.value) for c in sweep.cells()]
    assert order[:5] == [
        (3, 0, "mup", 32),
        (3, 0, "mup", 64),
        (3, 0, "none", 32),
        (3, 0, "none", 64),
        (3, 1, "mup", 32),
    ]
    assert len(order) == len({cell.name for cell in sweep.cells()}) == 16


@pytest.mark.parametrize(
    ("axis", "value", "key", "found"),
    [
        ("hidden_size", 64, "router_logits_scaling", 2.0),
        ("num_experts", 16, "num_local_experts", 16),
        ("top_k", 2, "num_experts_per_tok", 2),
        ("granularity", 2, "intermediate_size", 48),
    ],
)
def test_every_axis_configures_a_wider_model(axis, value, key, found):
    sweep = make_sweep(axis=axis, values=(value,), hidden_size=None if axis == "hidden_size" else 64)
    config = sweep.configure(Cell("mup", value, 0.1))
    assert getattr(config, key) == found
    assert (config.hidden_size, config.mup_base_hidden_size) == (64, 32)


def test_at_the_base_all_modes_are_the_same_training(tmp_path):
    modes = ("none", "simplep", "mup")
    sweep = make_sweep(values=(32,), learning_rates=dict.fromkeys(modes, (2.0**-6,)))
    losses = [record["loss"] for record in run_cells(sweep, build_trainer, tmp_path)]
    assert len(set(losses)) == 1
    wider = make_sweep(values=(64,), learning_rates=dict.fromkeys(modes, (2.0**-6,)))
    losses = [record["loss"] for record in run_cells(wider, build_trainer, tmp_path)]
    assert len(set(losses)) == 3


def test_finished_cells_are_not_run_again_and_missing_ones_come_out_the_same(tmp_path):
    sweep, ran = make_sweep(), []

    def build_and_note(config, cell):
        ran.append(cell)
        return build_trainer(config, cell)

    first = run_cells(sweep, build_and_note, tmp_path)
    assert ran == sweep.cells()
    (tmp_path / f"{ran[1].name}.json").unlink()
    (tmp_path / ".half-written.partial").write_text("{")
    ran.clear()
    again = run_cells(sweep, build_and_note, tmp_path)
    assert ran == [sweep.cells()[1]]
    assert [record["loss"] for record in again] == [record["loss"] for record in first]
    assert {record["loss"] for record in read_cells(tmp_path)} == {record["loss"] for record in first}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"rows": 16}}, "made with settings 'rows' 8, not 16"),
        ({"metric": "eval_nats"}, "made with metric 'eval_loss', not 'eval_nats'"),
        (
            {"base_config": make_config("mixtral_ext", "standard", rms_norm_eps=1e-3, output_router_logits=True)},
            "made with config 'rms_norm_eps'",
        ),
    ],
)
def test_cells_of_other_settings_are_not_mixed(tmp_path, changes, message):
    small = {"values": (32,), "learning_rates": {"mup": (0.01,)}, "max_steps": (1,)}
    run_cells(make_sweep(**small), build_trainer, tmp_path)
    with pytest.raises(ValueError, match=message):
        run_cells(make_sweep(**small, **changes), build_trainer, tmp_path)


def test_a_file_that_is_no_record_is_named(tmp_path):
    sweep = make_sweep()
    (tmp_path / f"{sweep.cells()[0].name}.json").write_text('{"cell": {}}')
    with pytest.raises(ValueError, match="is no record of a sweep's cell"):
        run_cells(sweep, build_trainer, tmp_path)


def test_a_trainer_with_another_learning_rate_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"args\.learning_rate=0\.5 for a cell with learning_rate=0\.0078125"):
        run_cells(make_sweep(), lambda config, cell: build_trainer(config, cell, learning_rate=0.5), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_metric_that_is_not_measured_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"metric must be one that Trainer\.evaluate returns, eval_loss"):
        run_cells(make_sweep(metric="eval_nats"), build_trainer, tmp_path)


def test_a_run_that_diverges_is_a_finished_cell_without_a_number(tmp_path):
    sweep = make_sweep(values=(32,), learning_rates={"mup": (1e30,)})
    (record,) = run_cells(sweep, build_trainer, tmp_path)
    assert record["loss"] is None
    assert read_cells(tmp_path) == [record]


def test_a_search_with_optuna_gives_the_cells_of_the_runner(tmp_path):
    sweep = make_sweep(seeds=(0, 1))
    one_by_one = run_cells(sweep, build_trainer, tmp_path / "runner")
    searched = search_cells(sweep, build_trainer, tmp_path / "search")
    assert [(r["cell"], r["loss"]) for r in searched] == [(r["cell"], r["loss"]) for r in one_by_one]
    assert len({record["loss"] for record in searched}) == len(searched) == 8


def test_a_search_goes_on_where_the_runner_was(tmp_path):
    sweep = make_sweep()
    begun = run_cells(sweep, build_trainer, tmp_path, sweep.cells()[:3])
    searched = search_cells(sweep, build_trainer, tmp_path)
    assert searched[:3] == begun
    assert len(searched) == 4


def test_a_search_survives_a_run_that_diverges(tmp_path):
    sweep = make_sweep(values=(32,), learning_rates={"mup": (2.0**-6, 1e30)})
    assert [record["loss"] is None for record in search_cells(sweep, build_trainer, tmp_path)] == [False, True]


def test_a_learning_rate_written_into_the_optimizer_holds_for_all_trials(tmp_path):
    """The trap that ``trainer_optimizer(args=...)`` without ``lr`` is there to avoid."""
    sweep = make_sweep(values=(32,))
    records = search_cells(sweep, lambda config, cell: build_trainer(config, cell, lr=0.01), tmp_path)
    assert records[0]["loss"] == records[1]["loss"]


def test_a_search_needs_model_init_and_a_backend_that_is_there(tmp_path):
    with pytest.raises(ValueError, match="model_init in place of a model"):
        search_cells(make_sweep(), build_trainer_of_a_model, tmp_path)
    with pytest.raises(ValueError, match="backend must be 'optuna' or 'ray', got 'grid'"):
        search_cells(make_sweep(), build_trainer, tmp_path, backend="grid")


def test_a_missing_backend_is_named(tmp_path):
    if importlib.util.find_spec("ray") is not None:
        pytest.skip("Ray is installed here")
    with pytest.raises(ImportError, match="backend='ray' is not installed: pip install 'ray"):
        search_cells(make_sweep(), build_trainer, tmp_path, backend="ray")


def test_the_picture_is_written_whole(tmp_path):
    records = make_records("none", STANDARD, -11) + make_records("mup", MUP, -8)
    records += [make_record("mup", 512, 2.0**-6, None)]  # a width of which nothing is finite
    draw_sweep(summarize(records), tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.png"]


def test_without_matplotlib_the_picture_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # what Python does with a module that is not there
    with pytest.raises(ImportError, match="draw_sweep needs matplotlib: pip install"):
        draw_sweep(summarize(make_records("mup", MUP, -8)), tmp_path / "sweep.png")
