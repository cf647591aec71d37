"""The table, and how a candidate is written."""

import pytest

from hf_moe_ext.pilot.candidates import CONTROL_OF, KNOWN_SETTINGS, TABLE, Candidate, choose_candidates, read_candidate


def test_table_is_consistent() -> None:
    assert len({candidate.name for candidate in TABLE}) == len(TABLE)
    assert TABLE[0].name == "base"
    for candidate in TABLE:
        assert set(candidate.settings) <= set(KNOWN_SETTINGS[candidate.kind]), candidate.name
        assert (candidate.variant is not None) == (candidate.kind == "perft")
        rates = sorted(candidate.learning_rates)
        assert not rates or candidate.learning_rates[0] == rates[len(rates) // 2]
        assert Candidate.from_dict(candidate.as_dict()) == candidate
    names = {candidate.name for candidate in TABLE}
    assert set(CONTROL_OF) | set(CONTROL_OF.values()) <= names


def test_what_fits_the_model() -> None:
    moe = [candidate.name for candidate in choose_candidates((), is_moe=True)]
    dense = [candidate.name for candidate in choose_candidates((), is_moe=False)]
    assert dense == ["base", "lora-qv", "full", "ders"]
    assert "ders" not in moe
    assert set(moe) >= {"base", "perft-r", "perft-s", "perft-d", "perft-e", "perft-e-selected", "lora-experts", "full"}


def test_settings_on_the_command_line() -> None:
    candidate = read_candidate("perft-r:num_experts=8,top_k=2,r=4")
    assert candidate.settings == {"num_experts": 8, "top_k": 2, "r": 4}
    assert candidate.name == "perft-r:num_experts=8,top_k=2,r=4"
    assert read_candidate("lora-qv:target_modules=q_proj+k_proj").settings["target_modules"] == ["q_proj", "k_proj"]
    several = choose_candidates(["perft-r", "perft-r:r=4"], is_moe=True)
    assert [candidate.name for candidate in several] == ["base", "perft-r", "perft-r:r=4"]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["perft-x"], "there is no candidate 'perft-x'"),
        (["perft-r:size=4"], "'size=4' must be setting=value"),
        (["perft-r:r"], "'r' must be setting=value"),
        (["full:r=4"], "settings of full: none"),
        (["perft-r", "perft-r"], "names perft-r twice"),
        (["base"], "only the frozen base"),
        (["ders"], "is for a dense model. The model has experts already"),
    ],
)
def test_mistakes_are_refused(texts: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        choose_candidates(texts, is_moe=True)


def test_perft_on_a_dense_model_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"for a moe model. No MoE block found in X. Choose among base, lora-qv"):
        choose_candidates(["perft-r"], is_moe=False, why_not_moe="No MoE block found in X")
