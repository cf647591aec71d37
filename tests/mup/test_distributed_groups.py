"""µP's groups under DDP, FSDP2 and expert parallelism: the trajectory of one process, and one mesh per group."""

import pytest

from support import mup_ranks as work
from support.expert_parallel import save
from support.ranks import run_ranks

MUP = {"mup": "mup", "mup_base_hidden_size": 8}
FSDP, EXPERTS = {"fsdp_size": 2}, {"fsdp_size": 2, "ep_size": 2}


def assert_trains_like_one_process(folder, out, world_size, layout):
    ranks = run_ranks(work.train, world_size, folder, out / "ranks", layout, timeout=400)
    expected = work.train(0, 1, folder, out / "one", None)
    assert len(expected["trajectory"]) == work.NUM_STEPS
    assert expected["trajectory"][-1]["loss"] < expected["trajectory"][0]["loss"] - 0.1  # it did train
    assert len({group["lr"] for group in expected["settings"]}) > 1
    for rank, found in enumerate(ranks):
        for step, (ours, theirs) in enumerate(zip(found["trajectory"], expected["trajectory"], strict=True)):
            for key in theirs:
                assert abs(ours[key] - theirs[key]) < 1e-5, f"rank {rank}, step {step}: {ours} for {theirs}"
        for name, parameter in expected["parameters"].items():
            worst = float((found["parameters"][name] - parameter).abs().max())
            assert worst < 1e-5, f"rank {rank}, {name}: off by {worst:.2e}"
        assert all(len(meshes) == 1 for meshes in found["meshes"])
        distinct = {tuple(sorted(map(str, group.items()))) for group in found["settings"]}
        assert distinct == {tuple(sorted(map(str, group.items()))) for group in expected["settings"]}
    return ranks, expected


@pytest.mark.parametrize("layout", [EXPERTS, FSDP], ids=["ep", "fsdp2"])
def test_two_ranks(tmp_path, layout):
    ranks, expected = assert_trains_like_one_process(save(tmp_path, "olmoe_ext", "full", **MUP), tmp_path, 2, layout)
    more = len(ranks[0]["settings"]) - len(expected["settings"])
    assert more > 0 if layout is EXPERTS else more == 0  # experts are on a mesh of their own


@pytest.mark.slow
@pytest.mark.parametrize("form", ["multiplier", "folded"])
@pytest.mark.parametrize("layout", [None, EXPERTS], ids=["ddp", "ep"])
def test_more_layouts_and_forms(tmp_path, layout, form):
    folder = save(tmp_path, "mixtral_ext", "mixed", mup_form=form, **MUP)
    assert_trains_like_one_process(folder, tmp_path, 2, layout)


@pytest.mark.slow
def test_four_ranks(tmp_path):
    folder = save(tmp_path, "mixtral_ext", "standard", **MUP)
    assert_trains_like_one_process(folder, tmp_path, 4, {"fsdp_size": 4, "ep_size": 2})
