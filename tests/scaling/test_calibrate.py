"""Efficiencies come back from the times they made, and runs that cannot be are refused."""

import json

import pytest

from hf_moe_ext.scaling.calibrate import Measured, calibrate, read_measured
from hf_moe_ext.scaling.feed_forward import MoeFfn
from hf_moe_ext.scaling.hardware import find_hardware
from hf_moe_ext.scaling.layout import Layout
from hf_moe_ext.scaling.memory import TrainingStep
from hf_moe_ext.scaling.operations import Tokens
from hf_moe_ext.scaling.rank_seconds import Efficiency
from hf_moe_ext.scaling.roofline import training_time
from hf_moe_ext.scaling.shape import MoeShape

H100 = find_hardware("H100-SXM")
SHAPE = MoeShape.uniform(4, 1024, MoeFfn(16, 2, 512), num_heads=8, vocab_size=8192, context_length=2048)
STEP, LAYOUT = TrainingStep(Tokens(8, 2048), "megatron"), Layout(data=8, expert=8)


def test_one_number_scales_both_products():
    truth = Efficiency(gemm=0.35, grouped=0.28)
    seconds = training_time(SHAPE, LAYOUT, STEP, H100, truth).total
    found = calibrate(SHAPE, LAYOUT, STEP, H100, Measured(seconds))
    assert (found.gemm, found.grouped) == pytest.approx((0.35, 0.28), rel=1e-9)
    assert training_time(SHAPE, LAYOUT, STEP, H100, found).total == pytest.approx(seconds, rel=1e-9)


def test_measured_parts_fix_their_own():
    truth = Efficiency(gemm=0.6, grouped=0.2, memory=0.7, link=0.45)
    time = training_time(SHAPE, LAYOUT, STEP, H100, truth)
    measured = Measured(time.total, time.experts, time.all_to_all, time.optimizer)
    found = calibrate(SHAPE, LAYOUT, STEP, H100, measured)
    assert (found.gemm, found.grouped, found.memory, found.link) == pytest.approx((0.6, 0.2, 0.7, 0.45), rel=1e-8)


def test_faster_than_the_peaks_is_refused():
    fastest = training_time(SHAPE, LAYOUT, STEP, H100, Efficiency(1, 0.8)).total
    with pytest.raises(ValueError, match=r"is shorter than the .* s that the peaks allow; check the hardware"):
        calibrate(SHAPE, LAYOUT, STEP, H100, Measured(fastest * 0.9))


def test_a_part_that_the_layout_does_not_have():
    with pytest.raises(ValueError, match=r"all_to_all_s=0.1 was measured, but this layout has no such part"):
        calibrate(SHAPE, Layout(), STEP, H100, Measured(1.0, all_to_all_s=0.1))


def test_trainer_state_and_metrics(tmp_path):
    log = [{"loss": 3.0, "step": 5}, {"train_runtime": 20.0, "train_steps_per_second": 0.5, "step": 10}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 10, "log_history": log}))
    assert read_measured(tmp_path).step_s == read_measured(tmp_path / "trainer_state.json").step_s == 2.0
    own = tmp_path / "metrics.json"
    own.write_text(json.dumps({"steps": 6, "seconds": {"train": 3.0}}))
    assert read_measured(own).step_s == 0.5
    own.write_text(json.dumps({"step_s": 2, "all_to_all_s": 0.5}))
    assert read_measured(own) == Measured(2, all_to_all_s=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "must hold an object, got list"),
        ('{"log_history": [{"loss": 2}]}', "has no train_steps_per_second, which Trainer logs when training ends"),
        ('{"log_history": [{"train_steps_per_second": 0}]}', "train_steps_per_second must be above 0, got 0"),
        ('{"step_s": -1}', "step_s must be above 0, got -1"),
        ('{"step_s": 1, "expert_s": 1}', "unknown keys expert_s; known: all_to_all_s, experts_s"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_measured(path)


def test_folders_without_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither trainer_state.json nor metrics.json"):
        read_measured(tmp_path)
    with pytest.raises(OSError, match="none"):
        read_measured(tmp_path / "none.json")
