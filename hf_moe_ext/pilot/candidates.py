"""The methods a pilot compares: one row each, and how a row is written on the command line."""

import ast
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Kind = Literal["base", "perft", "lora", "lora_experts", "full", "upcycle"]
PERFT_SETTINGS = ("r", "num_experts", "top_k", "adapter", "shared_A", "router_aux_loss_coef", "expert_fraction")
LORA_SETTINGS = ("r", "target_modules")
UPCYCLE_SETTINGS = ("num_experts", "top_k", "rank")
KNOWN_SETTINGS: dict[Kind, tuple[str, ...]] = {
    "base": (), "full": (), "perft": PERFT_SETTINGS, "lora": LORA_SETTINGS, "lora_experts": ("r",),
    "upcycle": UPCYCLE_SETTINGS,
}  # fmt: skip
# A factor of four between neighbours: coarse, but an optimum at the edge of the grid is followed beyond it.
ADAPTER_RATES = (1e-3, 2.5e-4, 4e-3)
FULL_RATES = (2.5e-4, 6e-5, 1e-3)
RATE_FACTOR = 4.0


@dataclass(frozen=True)
class Candidate:
    """A method with its settings.

    Attributes:
        name: As it is written on the command line; names files and rows of tables.
        kind: How it is attached.
        label: In a few words.
        settings: Of the kind, see `KNOWN_SETTINGS`.
        needs: The models it is for.
        learning_rates: The grid, the middle first, so that fewer rates keep the middle.
        variant: Of PERFT.
        router: "trained", or "frozen" for the control that never learns to route.
    """

    name: str
    kind: Kind
    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    needs: Literal["moe", "dense", "any"] = "any"
    learning_rates: tuple[float, ...] = ADAPTER_RATES
    variant: Literal["R", "E", "D", "S"] | None = None
    router: Literal["trained", "frozen"] = "trained"

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Candidate":
        """The opposite of `as_dict`."""
        return cls(**{**saved, "learning_rates": tuple(saved["learning_rates"])})


# In the order in which a budget takes them up: what answers most comes first.
TABLE = (
    Candidate("base", "base", "frozen base model", learning_rates=()),
    Candidate("perft-r", "perft", "routed adapters, own router", {"num_experts": 4, "top_k": 2, "r": 16}, "moe", variant="R"),
    Candidate("lora-qv", "lora", "LoRA on q and v", {"r": 16, "target_modules": ["q_proj", "v_proj"]}),
    Candidate("perft-s", "perft", "one adapter beside the experts", {"r": 16}, "moe", variant="S"),
    Candidate("full", "full", "all weights", learning_rates=FULL_RATES),
    Candidate("perft-e", "perft", "an adapter per expert, base router", {"r": 16}, "moe", variant="E"),
    Candidate(
        "perft-r-frozen-router", "perft", "control: its own router never learns",
        {"num_experts": 4, "top_k": 2, "r": 16}, "moe", variant="R", router="frozen",
    ),
    Candidate("ders", "upcycle", "upcycled: shared base and light deltas, all trained",
              {"num_experts": 4, "top_k": 2, "rank": 4}, "dense", FULL_RATES),
    Candidate("lora-experts", "lora_experts", "LoRA on every expert's matrices", {"r": 8}, "moe"),
    Candidate("perft-d", "perft", "adapters for every token, no router", {"num_experts": 2, "r": 16}, "moe", variant="D"),
    Candidate("perft-e-selected", "perft", "adapters on the experts the task uses most",
              {"r": 16, "expert_fraction": 0.25}, "moe", variant="E"),
    Candidate("perft-r-many", "perft", "many small routed adapters", {"num_experts": 16, "top_k": 4, "r": 4}, "moe", variant="R"),
    Candidate("perft-r-wide", "perft", "few wide routed adapters", {"num_experts": 4, "top_k": 1, "r": 32}, "moe", variant="R"),
)  # fmt: skip
BY_NAME = {candidate.name: candidate for candidate in TABLE}
CONTROL_OF = {"perft-r-frozen-router": "perft-r"}


def choose_candidates(texts: Sequence[str], is_moe: bool, why_not_moe: str = "") -> list[Candidate]:
    """The candidates asked for, or all that fit the model; the frozen base always stands first.

    Args:
        texts: Each `name` or `name:setting=value,setting=value`; empty for every row of the table that fits.
        is_moe: Whether the model has MoE blocks that can be served.
        why_not_moe: One sentence, for the refusal.

    Raises:
        ValueError: An unknown name or setting, one twice, or a method that the model cannot take.
    """
    fitting = {"moe" if is_moe else "dense", "any"}
    if not texts:
        return [candidate for candidate in TABLE if candidate.needs in fitting]
    chosen = {"base": BY_NAME["base"]}
    for text in texts:
        candidate = read_candidate(text)
        if candidate.needs not in fitting:
            reason = why_not_moe if candidate.needs == "moe" else "The model has experts already"
            usable = ", ".join(c.name for c in TABLE if c.needs in fitting)
            raise ValueError(f"--candidates {text} is for a {candidate.needs} model. {reason}. Choose among {usable}.")
        if candidate.name in chosen and candidate.name != "base":
            raise ValueError(f"--candidates names {text} twice. Leave one out.")
        chosen[candidate.name] = candidate
    if len(chosen) == 1:
        raise ValueError("--candidates names only the frozen base. Add something to compare it with.")
    return list(chosen.values())


def read_candidate(text: str) -> Candidate:
    """A row of the table, with other settings where some are given: `perft-r:num_experts=8,top_k=2,r=4`.

    Raises:
        ValueError: There is no such row, or it has no such setting.
    """
    name, _, given = text.partition(":")
    if name not in BY_NAME:
        raise ValueError(f"--candidates {text}: there is no candidate {name!r}. Choose among {', '.join(BY_NAME)}.")
    candidate = BY_NAME[name]
    if not given:
        return candidate
    changes: dict[str, Any] = {}
    for word in given.split(","):
        key, equals, value = word.partition("=")
        if not equals or key not in KNOWN_SETTINGS[candidate.kind]:
            known = ", ".join(KNOWN_SETTINGS[candidate.kind]) or "none"
            raise ValueError(f"--candidates {text}: {word!r} must be setting=value; settings of {name}: {known}.")
        changes[key] = _read_value(value)
    return replace(candidate, name=text, settings=candidate.settings | changes)


def _read_value(text: str) -> Any:
    if "+" in text:
        return text.split("+")  # several modules: q_proj+v_proj
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
