"""Models that Transformers distributes (``distributed_config=``): adapters equal to those of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from hf_moe_ext import PerftConfig, count_trainable
from support import distributed_training as work
from support import zoo
from support.ranks import RankError, run_ranks

pytestmark = pytest.mark.filterwarnings(
    # torch 2.13 asks whoever starts processes from a process with threads to think twice.
    "ignore:This process .* is multi-threaded:DeprecationWarning",
)

FSDP, REPLICATED, EXPERTS = {"fsdp_size": 2}, {"dp_replicate_size": 2}, {"fsdp_size": 2, "ep_size": 2}
TENSOR = {"tp_size": 2}
TENSOR_EXPERTS = [
    {"tp_size": 2, "ep_size": 2, "ep_implementation": name} for name in ("auto", "all_to_all", "all_reduce")
]
FLOAT32 = 1e-6  # of gradients up to 0.3
FOUR = [
    {"fsdp_size": 4},
    {"fsdp_size": 4, "ep_size": 2},  # two copies of every expert, themselves sharded
    {"fsdp_size": 4, "ep_size": 4},
    {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2},
]


def name_layout(layout: work.Layout) -> str:
    return "-".join(f"{name.removesuffix('_size')}{size}" for name, size in layout.items())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a family's tiny model, saved once."""
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            zoo.build(family, dtype=torch.float64).save_pretrained(folders[family])
        return folders[family]

    return folder


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], what: str, atol: float = 1e-10) -> None:
    assert ours.keys() == theirs.keys()
    assert ours
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{what}, {n}: {m}"
        )


def assert_trains_like_one_process(base: Path, out: Path, world_size: int, layout: work.Layout, reduce: str) -> None:
    ranks = run_ranks(work.train_variants, world_size, base, out, layout, reduce)
    for variant in work.VARIANTS:
        model = work.attach(work.load(base), variant)
        born = work.adapters(model)
        work.make_trainer(model, out / "one").train()
        expected = work.adapters(model)
        assert max(float((expected[n] - born[n]).abs().max()) for n in born) > 1e-3  # it did train
        for rank, results in enumerate(ranks):
            mine, what = results[variant], f"{variant}, rank {rank}"
            assert mine["held"] < 1 or layout == REPLICATED, "the base model is not distributed at all"
            assert (mine["averaged"] > 0) == (reduce == "tuner"), "both the Trainer and the tuner average, or neither"
            assert mine["count"] == count_trainable(model)
            assert_equal(mine["born"], born, f"{what}, at birth", atol=0)
            assert_equal(mine["trained"], expected, what)
            assert_equal(mine["trained"], ranks[0][variant]["trained"], f"{what} beside rank 0", atol=0)
        saved = PeftModel.from_pretrained(work.load(base), out / variant / "saved")
        assert_equal(work.adapters(saved), ranks[0][variant]["trained"], f"{variant}, saved", atol=0)
        logits = work.held_out_logits(saved)
        torch.testing.assert_close(logits, ranks[0][variant]["logits"], atol=1e-10, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
@pytest.mark.parametrize("layout", [FSDP, REPLICATED, EXPERTS], ids=name_layout)
def test_trainer_on_two_ranks(base, tmp_path, family, layout):
    assert_trains_like_one_process(base(family), tmp_path, 2, layout, "both")


@pytest.mark.slow
@pytest.mark.parametrize("layout", FOUR, ids=name_layout)
def test_trainer_on_four_ranks(base, tmp_path, layout):
    assert_trains_like_one_process(base("olmoe"), tmp_path, 4, layout, "both")


def test_trainer_that_leaves_adapters_alone(base, tmp_path):
    """Transformers before 5.22; also the whole proof in one test of the default run."""
    assert_trains_like_one_process(base("olmoe"), tmp_path, 2, EXPERTS, "tuner")


def test_own_training_loop_on_two_ranks(base):
    """Every layout, tensor parallelism too, which the Trainer cannot run on CPU; one rank has no loss token."""
    layouts = [FSDP, REPLICATED, EXPERTS, TENSOR, *TENSOR_EXPERTS]
    assert_loops_like_one_process(base("mixtral"), 2, layouts, "REDS")


@pytest.mark.slow
def test_own_training_loop_on_four_ranks(base):
    layouts = [{"tp_size": 2, "fsdp_size": 2, "ep_size": size} for size in (1, 2, 4)]
    assert_loops_like_one_process(base("olmoe"), 4, [*layouts, *FOUR], "REDS")


def assert_loops_like_one_process(base: Path, world_size: int, layouts: list[work.Layout], variants: str) -> None:
    ranks = run_ranks(work.loop_variants, world_size, base, layouts, variants)
    for variant in variants:
        expected = work.own_loop(work.attach(work.load(base), variant), empty=1)
        for rank, results in enumerate(ranks):
            for i, layout in enumerate(layouts):
                # Split sums round differently, and the stock norms cut such differences to float32 steps.
                atol = FLOAT32 if layout.get("tp_size", 1) > 1 else 1e-10
                assert_equal(results[i, variant], expected, f"{layout}, {variant}, rank {rank}", atol)


@pytest.mark.slow
def test_resumed_loop(base, tmp_path):
    for results in run_ranks(work.resume_loop, 2, base("olmoe"), tmp_path, EXPERTS):
        assert_equal(results["resumed"], results["whole"], "resumed", atol=0)


@pytest.mark.slow
def test_compiled(base):
    """Not under tensor parallelism: there the stock model alone does not compile (torch 2.13)."""
    folder = base("olmoe")
    expected = work.own_loop(work.attach(work.load(folder), "R"))
    for rank, found in enumerate(run_ranks(work.compiled, 2, folder, FSDP)):
        assert_equal(found, expected, f"rank {rank}")


@pytest.mark.slow
def test_gradient_checkpointing(base):
    folder = base("olmoe")
    expected = work.own_loop(work.attach(work.load(folder), "R"))
    for results in run_ranks(work.checkpointing_modes, 2, folder, EXPERTS):
        for reentrant, found in results.items():
            assert_equal(found, expected, f"use_reentrant={reentrant}")


def test_adapters_that_come_later(base, tmp_path):
    """Added, deleted, loaded (also by assignment), frozen and thawed, cast: whatever puts new parameters in place."""
    folder = base("mixtral")
    model = work.attach(work.load(folder), "R")
    model.save_pretrained(tmp_path / "adapter")
    expected = work.own_loop(model)
    ranks = run_ranks(work.later_adapters, 2, folder, tmp_path / "adapter", EXPERTS)
    second = work.load(folder)
    torch.manual_seed(50)
    second = work.get_peft_model(
        second, PerftConfig(task_type="CAUSAL_LM", variant="E", r=4, init_weights=False), adapter_name="second"
    )
    for results in ranks:
        assert_equal(results["born"], work.adapters(second, "second"), "second at birth", atol=0)
        assert_equal(results["second"], work.own_loop(second), "second")
        for name in ("loaded", "assigned"):
            found = {key.replace(f".{name}", ".default"): value for key, value in results[name].items()}
            assert_equal(found, expected, name)


def test_an_adapter_of_one_process_opens_on_every_layout(base, tmp_path):
    folder = base("olmoe")
    model = work.attach(work.load(folder), "E")
    model.save_pretrained(tmp_path / "adapter")
    for logits in run_ranks(work.reopened, 2, folder, tmp_path / "adapter", EXPERTS):
        torch.testing.assert_close(logits, work.held_out_logits(model), atol=1e-10, rtol=0)


def test_other_models_keep_their_own_gradients(base):
    """What DDP or FSDP wraps later is reduced by them: several processes alone are no reason to average."""
    folder = base("olmoe")
    for rank, found in enumerate(run_ranks(work.undistributed, 2, folder)):
        batch = work.micro_batches()[rank]
        expected = work.gradients(work.attach(work.load(folder), "R"), [batch], batch["labels"][:, 1:].ne(-100).sum())
        assert_equal(found, expected, f"rank {rank}")


def test_what_cannot_be_attached_is_refused(base):
    for messages in run_ranks(work.refusals, 2, base("mixtral")):
        *settings, staged = messages
        assert [message.partition(":")[2].split()[0] for message in settings] == [
            "modules_to_save=['lm_head']",
            "trainable_token_indices=[4]",
            "bias='all'",
        ]
        assert "got pp_size=2" in staged


@pytest.mark.slow
def test_trainer_under_tensor_parallelism(base, tmp_path):
    model = work.attach(work.load(base("olmoe")), "R")
    work.make_trainer(model, tmp_path / "one").train()
    try:
        ranks = run_ranks(work.train_tensor_parallel, 2, base("olmoe"), tmp_path / "two")
    except RankError as error:
        if "but got DistributedType.MULTI_CPU" in str(error):
            pytest.skip(
                "the Trainer hands tp_size to accelerate's ParallelismConfig (transformers 5.23, trainer.py:785), which "
                "refuses several CPU processes (accelerate 1.15, parallelism_config.py:395)"
            )
        raise
    for found in ranks:
        assert_equal(found, work.adapters(model), "tensor parallel")
