"""Models whose experts share a base on two processes: equal to one, whatever spreads them; expert parallelism is refused."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from hf_moe_ext import check_distribution
from support import expert_parallel as work
from support.latent_models import make_config
from support.ranks import run_ranks
from support.shared_base import replicated_steps, save

pytestmark = pytest.mark.filterwarnings(
    # torch 2.13 asks whoever starts processes from a process with threads to think twice.
    "ignore:This process .* is multi-threaded:DeprecationWarning",
)
FORMS = ("low_rank", "sparse", "quantized")
# Half of the experts get no token, which must stop nobody.
IDLE = "empty_experts"
LAYOUTS = ({"fsdp_size": 2}, {"dp_replicate_size": 2}, {"tp_size": 2})


def assert_equal_to_one_process(results, folder):
    logits, gradients = work.train(work.load(folder))
    seen = set()
    for found in results:
        for number, rows in found["logits"].items():
            seen.add(number)
            torch.testing.assert_close(rows, logits[number], atol=1e-10, rtol=0)
        assert found["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert gradient is not None, name
            torch.testing.assert_close(found["gradients"][name], gradient, atol=1e-10, rtol=0, msg=name)
    assert seen == set(logits)


@pytest.mark.parametrize("routing", ["spread", IDLE])
def test_data_parallel(routing, tmp_path):
    folders = [save(tmp_path, "mixtral_ext", form, routing) for form in (*FORMS, "universal")]
    ranks = run_ranks(replicated_steps, 2, folders)
    for i, folder in enumerate(folders):
        assert_equal_to_one_process([rank[i] for rank in ranks], folder)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_of_transformers(layout, tmp_path):
    blocks = [*FORMS, "sparse_values", "universal", "beside"]
    folders = [save(tmp_path, "mixtral_ext", block, IDLE if block in FORMS else "spread") for block in blocks]
    folders.append(save(tmp_path, "mixtral_ext", "some_layers", ders_bias=True))
    if "tp_size" not in layout:  # Qwen3's norms have a rule of their own under it, see the test below
        folders += [save(tmp_path, family, "low_rank") for family in ("qwen3_moe_ext", "olmoe_ext")]
    ranks = run_ranks(work.steps, 2, [(folder, layout, "batched_mm") for folder in folders])
    for i, folder in enumerate(folders):
        assert not ranks[0][i]["messages"], ranks[0][i]["messages"]
        assert_equal_to_one_process([rank[i] for rank in ranks], folder)


@pytest.mark.parametrize(
    ("form", "layout"),
    [
        ("low_rank", {"fsdp_size": 2}),
        pytest.param("sparse", {"fsdp_size": 2}, marks=pytest.mark.slow),
        pytest.param("quantized", {"fsdp_size": 2}, marks=pytest.mark.slow),
        pytest.param("sparse", {"dp_replicate_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_the_trainer_and_a_fresh_process(form, layout, tmp_path):
    folder = save(tmp_path, "mixtral_ext", form)
    alone, weights = work.train_and_save(0, 1, folder, tmp_path / "alone", None)
    ranks = run_ranks(work.train_and_save, 2, folder, tmp_path / "ranks", layout)
    assert len(alone) == work.NUM_STEPS
    for steps, spread in ranks:
        for mine, theirs in zip(steps, alone, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(spread[name], weight, atol=1e-5, rtol=0, msg=name)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ranks" / "saved", dtype=torch.float64)
    for name, weight in ranks[0][1].items():
        assert torch.equal(again.state_dict()[name], weight), name
    born = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, buffer in born.named_buffers():
        assert torch.equal(again.get_buffer(name), buffer), name  # codes and streams are no training's to change


@pytest.mark.parametrize("block", ["low_rank", "some_layers"])
def test_expert_parallelism_is_refused_with_the_reason(block, tmp_path, monkeypatch):
    config = make_config("mixtral_ext", block)
    config.save_pretrained(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a launcher says
    reason = r"experts of layer \d \(moe_block='ders'\) share a base that every rank needs.*write fsdp_size"
    for layout in ({"fsdp_size": 2, "ep_size": 2}, {"tp_size": 2, "ep_size": 2}):
        with pytest.raises(ValueError, match=reason):
            check_distribution(config, layout, num_processes=2)
        with pytest.raises(ValueError, match=reason):
            AutoModelForCausalLM.from_pretrained(tmp_path, distributed_config=layout)
    assert not torch.distributed.is_initialized()
    check_distribution(config, {"fsdp_size": 2}, num_processes=2)
    check_distribution(config, {"tp_size": 2}, num_processes=2, experts_implementation="batched_mm")


def test_qwen_under_tensor_parallelism(tmp_path, caplog):
    """All but the norms in a head, of which Transformers 5.23 adds up the gradients of earlier batches once per rank."""
    folder = save(tmp_path, "qwen3_moe_ext", "low_rank")
    logging.get_logger("hf_moe_ext").propagate = True  # Transformers' own handler does not reach pytest
    check_distribution(AutoConfig.from_pretrained(folder), {"tp_size": 2}, num_processes=2)
    assert "gradient_accumulation_steps=1, or freeze them" in caplog.text
    ranks = run_ranks(work.steps, 2, [(folder, {"tp_size": 2}, "batched_mm")], torch.float32)
    logits, gradients = work.train(work.load(folder, dtype=torch.float32))
    for rank in ranks:
        assert not rank[0]["messages"]
        for number, rows in rank[0]["logits"].items():
            torch.testing.assert_close(rows, logits[number], atol=5e-6, rtol=0)  # logits up to 5: one part in a million
        for name, gradient in gradients.items():
            if not name.endswith(("q_norm.weight", "k_norm.weight")):
                torch.testing.assert_close(rank[0]["gradients"][name], gradient, atol=1e-5, rtol=0, msg=name)
