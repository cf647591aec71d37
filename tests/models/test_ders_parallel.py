"""Models whose experts share a base on two processes: equal to one, whatever spreads them; expert parallelism is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_moe_ext import check_distribution
from support import expert_parallel as work
from support.latent_models import FAMILIES, make_config
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
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_of_transformers(family, layout, tmp_path):
    blocks = [*FORMS, "sparse_values", "universal", "beside", "some_layers"] if family == "mixtral_ext" else FORMS
    folders = [save(tmp_path, family, block, IDLE if block in FORMS else "spread") for block in blocks]
    ranks = run_ranks(work.steps, 2, [(folder, layout, "batched_mm") for folder in folders])
    for i, folder in enumerate(folders):
        assert not ranks[0][i]["messages"], ranks[0][i]["messages"]
        assert_equal_to_one_process([rank[i] for rank in ranks], folder)


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
@pytest.mark.parametrize("form", FORMS)
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
def test_expert_parallelism_is_refused_with_the_reason(block, tmp_path):
    config = make_config("mixtral_ext", block)
    config.save_pretrained(tmp_path)
    reason = r"experts of layer \d \(moe_block='ders'\) share a base that every rank needs.*write fsdp_size"
    for layout in ({"fsdp_size": 2, "ep_size": 2}, {"tp_size": 2, "ep_size": 2}):
        with pytest.raises(ValueError, match=reason):
            check_distribution(config, layout, num_processes=2)
        with pytest.raises(ValueError, match=reason):
            AutoModelForCausalLM.from_pretrained(tmp_path, distributed_config=layout)
    assert not torch.distributed.is_initialized()
    check_distribution(config, {"fsdp_size": 2}, num_processes=2)
    check_distribution(config, {"tp_size": 2}, num_processes=2, experts_implementation="batched_mm")
