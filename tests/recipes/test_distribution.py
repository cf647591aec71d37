"""Which layouts of a spread model are taken, and the one error for each that is not."""

import pytest

from distribution import build_distributed_config, check_distributed_model, check_distribution
from finetune_arguments import ModelArguments, UserError, parse_arguments
from support import zoo


@pytest.mark.parametrize(
    ("sizes", "processes", "expected"),
    [
        ({}, 4, None),
        ({"fsdp_size": 1, "ep_size": 1}, 1, None),
        ({"fsdp_size": 4}, 4, (4, 1, 1)),
        ({"ep_size": 2}, 4, (4, 2, 1)),
        ({"tp_size": 2, "ep_size": 4}, 4, (2, 4, 2)),
    ],
    ids=str,
)
def test_layouts(sizes: dict[str, int], processes: int, expected: tuple[int, ...] | None) -> None:
    config = build_distributed_config(ModelArguments(**sizes), processes)
    assert (None if config is None else (config.fsdp_size, config.ep_size, config.tp_size)) == expected


@pytest.mark.parametrize(
    ("flags", "processes", "words"),
    [
        (["--fsdp_size=0"], 2, ["--fsdp_size must be at least 1, got 0"]),
        (["--fsdp_size=2"], 1, ["--fsdp_size 2", "must equal the number of processes, which is 1", "--num_processes"]),
        (["--tp_size=3"], 4, ["--fsdp_size 1 times --tp_size 3", "which is 4"]),
        (["--ep_size=3"], 4, ["--ep_size 3 must divide the number of processes, which is 4"]),
        (["--ep_size=2", "--tp_size=4"], 4, ["multiple of --tp_size, which is 4"]),
        (["--ep_size=2"], 2, ["--save_strategy steps", "--save_strategy no"]),
        (["--tp_size=2", "--save_strategy=no", "--use_cpu"], 2, ["--tp_size 2", "CPU", "--fsdp_size"]),
    ],
    ids=str,
)
def test_refused_layouts(flags: list[str], processes: int, words: list[str]) -> None:
    arguments = parse_arguments(["--model_name_or_path=x", *flags])
    with pytest.raises(UserError) as error:
        check_distribution(arguments.model, arguments.training, processes)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_how_tokens_travel_is_transformers_choice() -> None:
    config = build_distributed_config(ModelArguments(ep_size=2, ep_implementation="all_to_all"), 2)
    assert config is not None
    assert config.ep_implementation == "all_to_all"


def test_models_that_cannot_be_spread() -> None:
    for family, words in (
        ("flex_olmo", "number of experts, which is 5"),
        ("llama", "has no MoE block; write ep_size=1"),
    ):
        outline, arguments = zoo.build(family), ModelArguments(model_name_or_path="x", ep_size=2)
        check_distributed_model(outline, ModelArguments(model_name_or_path="x"), 2)
        with pytest.raises(UserError, match=f"^--model_name_or_path x cannot be spread this way: .*{words}"):
            check_distributed_model(outline, arguments, 2)
    check_distributed_model(zoo.build("olmoe"), arguments, 2)


def test_a_layout_does_not_make_another_run() -> None:
    plain, spread = (parse_arguments(flags).describe() for flags in ([], ["--ep_size=2"]))
    assert plain == spread
