"""Layouts that Transformers would refuse late, compute wrongly or ignore: one clear error, before anything starts."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hf_moe_ext.models.distribution import check_distribution
from support import expert_parallel as work
from support import zoo

EP = {"fsdp_size": 2, "ep_size": 2}
EXPERTS = "model.layers.*.mlp.experts"


def config(block: str = "ungated", **changes: Any) -> Any:
    return work.make_config("olmoe_ext", block, **changes)


@pytest.fixture(autouse=True)
def no_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


# block, arguments of DistributedConfig, words of the message. The first words name what was given, the last what to write.
REFUSED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "legacy flag beside FSDP": (
        "ungated",
        {"fsdp_size": 2, "enable_expert_parallel": True},
        ["enable_expert_parallel=True", "shards no experts", "DistributedConfig(fsdp_size=2, ep_size=2)"],
    ),
    "legacy flag alone with TP": (
        "ungated",
        {"tp_size": 2, "enable_expert_parallel": True},
        ["tp_size=2 with tp_plan={}", "DistributedConfig(tp_size=2, ep_size=2)"],
    ),
    "empty TP plan": (
        "ungated",
        {"tp_size": 2, "ep_size": 2, "tp_plan": {}},
        ["tp_size=2 with tp_plan={}", "DistributedConfig(fsdp_size=2, ep_size=2)"],
    ),
    "EP in pipeline stages": (
        "ungated",
        {"pp_size": 2, "tp_size": 2, "ep_size": 2},
        ["pp_size=2 cannot be combined with ep_size=2", "write pp_size=1"],
    ),
    "experts that do not divide": (
        "ungated",
        {"fsdp_size": 3, "ep_size": 3},
        ["ep_size=3 must divide the number of experts, which is 8", "one of 2, 4, 8"],
    ),
    "all-reduce of different rows": (
        "ungated",
        {**EP, "ep_implementation": "all_reduce"},
        ["'all_reduce'", "ep_size=2 must equal tp_size=1", "'all_to_all', or tp_size=2"],
    ),
    "unknown implementation": (
        "ungated",
        {**EP, "ep_implementation": "all_two_all"},
        ["must be one of 'all_reduce', 'all_to_all', 'auto'", "got 'all_two_all'"],
    ),
    "fused kernel for the exchange alone": (
        "ungated",
        {"tp_size": 2, "ep_size": 2, "ep_implementation": "deepgemm_megamoe"},
        ["ep_implementation='deepgemm_megamoe'", "write it for both, or for neither"],
    ),
    "key without the prefix": (
        "ungated",
        {**EP, "ep_plan": {"layers.*.mlp.experts.up_proj": "grouped_gemm"}},
        ["'layers.*.mlp.experts.up_proj'", "names nothing in OlmoeExtForCausalLM", f"write '{EXPERTS}.up_proj'"],
    ),
    "gated weight of un-gated experts": (
        "ungated",
        {**EP, "ep_plan": {f"{EXPERTS}.gate_up_proj": "grouped_gemm"}},
        ["gate_up_proj', which names nothing", "its experts have 'up_proj'", "leave the plan out"],
    ),
    "un-gated weight of gated experts": (
        "gated",
        {**EP, "ep_plan": {f"{EXPERTS}.up_proj": "grouped_gemm"}},
        ["its experts have 'gate_up_proj'"],
    ),
    "one weight whole": (
        "ungated",
        {**EP, "ep_plan": {f"{EXPERTS}.up_proj": "replicate"}},
        ["lacks rules", "would be mixed up", f"ep_plan={{'{EXPERTS}.up_proj': 'grouped_gemm'}}"],
    ),
    "one weight of the mixed list whole": (
        "mixed",
        {**EP, "ep_plan": {f"{EXPERTS}.up_proj": "replicate"}},
        ["lacks rules for model.layers.1.mlp.experts", f"{EXPERTS}.up_proj"],
    ),
    "no dispatch": (
        "mixed",
        {**EP, "ep_plan": {EXPERTS: "replicate"}},
        ["model.layers.0.mlp.experts", "nothing would send tokens", f"ep_plan={{'{EXPERTS}': 'ep_dispatch_experts'}}"],
    ),
    "dispatch alone": (
        "gated",
        {**EP, "ep_plan": dict.fromkeys((f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"), "replicate")},
        ["every rank would keep all experts", "'grouped_gemm'"],
    ),
    "style that was removed": (
        "ungated",
        {**EP, "ep_plan": {"model.layers.*.mlp.gate": "ep_router"}},
        ["'ep_router'", "does not know", "leave ep_plan out"],
    ),
    "split latent": (
        "ungated",
        {"tp_size": 2, "tp_plan": {"model.layers.*.mlp.descend": "colwise"}},
        ["mlp.descend' ('colwise')", "must stay whole", "leave the rule out"],
    ),
    "split router, by its weight": (
        "full",
        {"tp_size": 2, "ep_size": 2, "ep_plan": {"model.layers.*.mlp.gate.weight": "grouped_gemm"}},
        ["mlp.gate.weight' ('grouped_gemm')", "must stay whole"],
    ),
    "rule for nothing in another plan": (
        "ungated",
        {"fsdp_size": 2, "fsdp_plan": {"model.layers.*.mlp.expert": "free_full_weight"}},
        ["fsdp_plan", "'model.layers.*.mlp.expert'", "names nothing"],
    ),
    "inner width that tensor parallelism does not divide": (
        "full",
        {"tp_size": 5},
        ["tp_size=5 must divide the experts' inner width, which is 24", "ep_size=tp_size"],
    ),
    "inner width that grouped_mm cannot align": (
        "full",
        {"tp_size": 4},
        ["leaves 6 of the experts' inner width 24", "multiples of 4 in torch.float32", "'batched_mm'"],
    ),
}


def words_in_order(words: list[str]) -> str:
    return ".*".join(map(re.escape, words))


@pytest.mark.filterwarnings("ignore:`enable_expert_parallel` without:FutureWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    block, arguments, words = REFUSED[case]
    with pytest.raises(ValueError, match=words_in_order(words)):
        check_distribution(config(block), DistributedConfig(**arguments))


@pytest.mark.filterwarnings("ignore:`enable_expert_parallel` without:FutureWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_starts(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By both loaders, with the launcher's environment, which Transformers would start a group from."""
    block, arguments, words = REFUSED[case]
    layout = DistributedConfig(**arguments)
    config(block).save_pretrained(tmp_path)  # no weights: it must not get so far
    monkeypatch.setenv("WORLD_SIZE", str(layout.dp_size * layout.tp_size * layout.pp_size))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    from hf_moe_ext import OlmoeExtForCausalLM

    for loader in (AutoModelForCausalLM, OlmoeExtForCausalLM):
        with pytest.raises(ValueError, match=words_in_order(words)):
            loader.from_pretrained(tmp_path, distributed_config=layout)
    assert not torch.distributed.is_initialized()


ACCEPTED = [
    EP,
    {**EP, "ep_implementation": "all_to_all"},
    {"fsdp_size": 4, "ep_size": 2},
    {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2},
    {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
    {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
    {"tp_size": 2, "tp_plan": "auto", "enable_expert_parallel": True},
    {"tp_size": 2},
    {"fsdp_size": 2},
    {"fsdp_size": 1},
    {**EP, "ep_plan": {f"{EXPERTS}.down_proj": "grouped_gemm"}},
]


@pytest.mark.filterwarnings("ignore:`enable_expert_parallel` without:FutureWarning")
@pytest.mark.parametrize("arguments", ACCEPTED, ids=str)
def test_accepted(arguments: dict[str, Any]) -> None:
    for family in ("olmoe_ext", "mixtral_ext"):
        for block in ("standard", "ungated", "gated", "full", "mixed", "full_gated"):
            given = work.make_config(family, block)
            before = given.to_dict()
            layout = DistributedConfig(**arguments)
            check_distribution(given, layout, num_processes=layout.dp_size * layout.tp_size)
            assert given.to_dict() == before


@pytest.mark.parametrize("family", sorted(set(zoo.FAMILIES) - {"flex_olmo"}))
def test_stock_models_are_accepted(family: str) -> None:
    """With the plans they come with; flex_olmo has five experts here."""
    for arguments in (EP, {"tp_size": 2, "ep_size": 2}, {"tp_size": 2}, {"fsdp_size": 2}):
        check_distribution(zoo.FAMILIES[family](), DistributedConfig(**arguments))


def test_stock_models_are_refused() -> None:
    with pytest.raises(ValueError, match="ep_size=2 must divide the number of experts, which is 5"):
        check_distribution(zoo.FAMILIES["flex_olmo"](), DistributedConfig(**EP))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no MoE block; write ep_size=1"):
        check_distribution(zoo.REFUSED["llama"](), DistributedConfig(**EP))
    nemotron, layout = zoo.FAMILIES["nemotron_h"](), DistributedConfig(tp_size=2, ep_size=2)
    check_distribution(nemotron, layout)
    with pytest.raises(ValueError, match=r"experts_implementation='eager' .* of 'nemotron_h' fails on ids"):
        check_distribution(nemotron, layout, experts_implementation="eager")
    check_distribution(nemotron, DistributedConfig(**EP), experts_implementation="eager")


@pytest.mark.parametrize(
    ("own", "given", "words"),
    [
        # Transformers only warns, shards one matrix of two, and computes wrong numbers.
        ("gated", None, ["would be mixed up", f"write ep_plan={{'{EXPERTS}.up_proj': 'grouped_gemm'}}"]),
        # No expert parallelism at all, and no message.
        (
            None,
            {f"{EXPERTS}.up_proj": "grouped_gemm", f"{EXPERTS}.down_proj": "grouped_gemm"},
            ["send tokens", EXPERTS],
        ),
        # All rows to the first rank; the experts of the others drift apart.
        (None, {EXPERTS: "ep_dispatch_experts"}, ["all rows would go to the first", "up_proj': 'grouped_gemm'"]),
        (None, None, ["nothing would send tokens", "'ep_dispatch_experts'"]),
    ],
)
def test_plans_of_the_configuration(own: str | None, given: Any, words: list[str], monkeypatch: Any) -> None:
    """A class of somebody's own, whose plan is another's or none."""
    model_config = config("ungated")
    plan = {} if own is None else config(own).base_model_ep_plan
    monkeypatch.setattr(type(model_config), "base_model_ep_plan", plan)
    with pytest.raises(ValueError, match=words_in_order(words)):
        check_distribution(model_config, DistributedConfig(**EP, ep_plan=given))


@pytest.mark.filterwarnings("ignore:`enable_expert_parallel` without:FutureWarning")
def test_a_layout_as_a_dictionary() -> None:
    """The flag that ``DistributedConfig`` forgets is still to be seen, also beside a plan."""
    layout = {"fsdp_size": 2, "tp_size": 1, "tp_plan": "auto", "enable_expert_parallel": True}
    with pytest.raises(ValueError, match="shards no experts"):
        check_distribution(config(), layout)
    check_distribution(config(), {**EP, "enable_expert_parallel": True})


def test_eager_loops_that_leave_other_ranks_waiting() -> None:
    layout = DistributedConfig(tp_size=2, ep_size=2, ep_implementation="all_reduce")
    with pytest.raises(ValueError, match=r"hangs in training .*\(model.layers.0.mlp.experts\); write experts_impl"):
        check_distribution(config("mixed"), layout, experts_implementation="eager")
    check_distribution(config("ungated"), layout, experts_implementation="eager")
    check_distribution(config("mixed"), layout, experts_implementation="batched_mm")
    check_distribution(config("mixed"), DistributedConfig(tp_size=2, ep_size=2), experts_implementation="eager")


def test_heads_that_tensor_parallelism_cannot_split() -> None:
    layout = DistributedConfig(tp_size=4, ep_size=4)
    with pytest.raises(ValueError, match="tp_size=4 must divide num_key_value_heads=2; write a smaller tp_size"):
        check_distribution(work.make_config("mixtral_ext", "ungated"), layout)
    check_distribution(config("ungated"), layout)  # OLMoE gathers what it splits, because of its norms


@pytest.mark.parametrize("implementation", ["sonicmoe", "deepgemm_megamoe", "grouped"])
def test_expert_implementations(implementation: str) -> None:
    with pytest.raises(ValueError, match=implementation):
        check_distribution(config(), DistributedConfig(**EP), experts_implementation=implementation)


def test_alignment_hangs_on_the_dtype_and_the_implementation() -> None:
    layout = DistributedConfig(tp_size=2)
    given = config("full")  # inner width 24
    check_distribution(given, layout, dtype=torch.float32)
    for dtype in (torch.bfloat16, "bfloat16"):
        with pytest.raises(ValueError, match="leaves 12 of the experts' inner width 24"):
            check_distribution(given, layout, dtype=dtype)
    check_distribution(given, layout, dtype=torch.bfloat16, experts_implementation="batched_mm")
    check_distribution(given, DistributedConfig(tp_size=2, ep_size=2), dtype=torch.bfloat16)


def test_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"fsdp_size=2 needs 2 processes, and this run has 1; .*--nproc_per_node 2"):
        AutoModelForCausalLM.from_pretrained(tmp_path, distributed_config=DistributedConfig(**EP))
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match=r"fsdp_size=2 x tp_size=2 needs 4 processes, and this run has 8"):
        AutoModelForCausalLM.from_pretrained(tmp_path, distributed_config=DistributedConfig(fsdp_size=2, tp_size=2))


def test_keys_given_to_the_loader_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the number of experts, which is 7"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_experts=7, distributed_config=DistributedConfig(**EP))


def test_settings_without_effect_warn(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("hf_moe_ext"), "propagate", True)
    check_distribution(config(), DistributedConfig(fsdp_size=2, ep_implementation="all_to_all"))
    assert "ep_implementation: no effect, because ep_size is 1" in caplog.text


def test_checking_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    check_distribution(config("full"), DistributedConfig(**EP))
    assert torch.equal(before, torch.get_rng_state())
