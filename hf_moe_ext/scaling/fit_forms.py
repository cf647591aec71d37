"""The functional forms of the laws, ready to be fitted (``law_form``), by name."""

from collections.abc import Callable, Mapping
from math import log
from typing import Any

import numpy as np

from hf_moe_ext.scaling.law_form import Array, Form, Parameter, ParameterKind, Term

SMALLEST_DENSITY = 1e-3


def _log(name: str) -> Callable[[Mapping[str, Any]], Array]:
    return lambda data: np.log(data[name])


def _log_density(data: Mapping[str, Array]) -> Array:
    return np.log(np.maximum(1 - np.asarray(data["sparsity"]), SMALLEST_DENSITY))


def _above_one(name: str) -> Callable[[Mapping[str, Any]], Array]:
    return lambda data: np.asarray(data[name], dtype=float) - 1


def _parameters(**kinds: ParameterKind) -> tuple[Parameter, ...]:
    return tuple(Parameter(name, kind) for name, kind in kinds.items())


_SIZE_TERMS = (
    Term("a", (("alpha", "n", -1),)),
    Term("c", (("lambda", "s", -1),)),
    Term("d", (("delta", "s", -1), ("gamma", "n", -1))),
    Term("e"),
)
_ABNAR_KINDS: dict[str, ParameterKind] = {
    "a": "scale", "alpha": "exponent", "b": "scale", "beta": "exponent", "c": "scale", "lambda": "interaction",
    "d": "scale", "delta": "interaction", "gamma": "exponent", "e": "irreducible",
}  # fmt: skip
_TOKENS = Term("b", (("beta", "d", -1),))

ABNAR = Form(
    "abnar",
    "a/N^alpha + b/D^beta + c/(1-S)^lambda + d/((1-S)^delta N^gamma) + e",
    ("total_parameters", "num_tokens", "sparsity"),
    _parameters(**_ABNAR_KINDS),
    (_SIZE_TERMS[0], _TOKENS, *_SIZE_TERMS[1:]),
    {"n": _log("total_parameters"), "d": _log("num_tokens"), "s": _log_density},
)
ABNAR_SIZE = Form(
    "abnar_size",
    "a/N^alpha + c/(1-S)^lambda + d/((1-S)^delta N^gamma) + e, tokens fixed",
    ("total_parameters", "sparsity"),
    _parameters(**{name: kind for name, kind in _ABNAR_KINDS.items() if name not in ("b", "beta")}),
    _SIZE_TERMS,
    {"n": _log("total_parameters"), "s": _log_density},
)
_JOINT_SIZE = Term("a", (("delta", "e", 1), ("alpha", "n", 1), ("gamma", "en", 1)))
_EXPERTS: dict[str, ParameterKind] = {"E_start": "start", "E_max": "limit"}
JOINT = Form(
    "joint",
    "a E^^delta N^(alpha + gamma ln E^) + b E^^omega D^(beta + zeta ln E^) + c",
    ("active_parameters", "num_tokens", "num_experts"),
    _parameters(
        a="scale", delta="interaction", alpha="interaction", gamma="free", b="scale", omega="interaction",
        beta="interaction", zeta="free", c="irreducible", **_EXPERTS,
    ),
    (_JOINT_SIZE, Term("b", (("omega", "e", 1), ("beta", "d", 1), ("zeta", "ed", 1))), Term("c")),
    {"n": _log("active_parameters"), "d": _log("num_tokens")},
    saturating=_above_one("num_experts"),
    products={"en": "n", "ed": "d"},
    size_variable="active_parameters",
    sparsity_variable="num_experts",
)  # fmt: skip
JOINT_SIZE = Form(
    "joint_size",
    "a E^^delta N^(alpha + gamma ln E^) + c, tokens fixed",
    ("active_parameters", "num_experts"),
    _parameters(a="scale", delta="interaction", alpha="interaction", gamma="free", c="irreducible", **_EXPERTS),
    (_JOINT_SIZE, Term("c")),
    {"n": _log("active_parameters")},
    saturating=_above_one("num_experts"),
    products={"en": "n"},
    size_variable="active_parameters",
    sparsity_variable="num_experts",
)
ROUTED = Form(
    "routed",
    "log10 L = a log10 N + b log10 E^ + c log10 N log10 E^ + d, tokens fixed",
    ("dense_parameters", "num_experts"),
    (
        Parameter("d", "free", 1 / log(10)),
        Parameter("a", "free"),
        Parameter("b", "free"),
        Parameter("c", "free", log(10)),
        *_parameters(**_EXPERTS),
    ),
    (Term("d", (("a", "n", 1), ("b", "e", 1), ("c", "en", 1))),),
    {"n": _log("dense_parameters")},
    saturating=_above_one("num_experts"),
    products={"en": "n"},
    size_variable="dense_parameters",
    sparsity_variable="num_experts",
)
FINE_GRAINED = Form(
    "fine_grained",
    "c + (g/G^gamma + a)/N^alpha + b/D^beta",
    ("total_parameters", "num_tokens", "granularity"),
    _parameters(g="scale", gamma="exponent", a="scale", alpha="exponent", b="scale", beta="exponent", c="irreducible"),
    (
        Term("g", (("gamma", "g", -1), ("alpha", "n", -1))),
        Term("a", (("alpha", "n", -1),)),
        _TOKENS,
        Term("c"),
    ),
    {"n": _log("total_parameters"), "d": _log("num_tokens"), "g": _log("granularity")},
    sparsity_variable=None,
)
CHINCHILLA = Form(
    "chinchilla",
    "a/N^alpha + b/D^beta + e, dense",
    ("total_parameters", "num_tokens"),
    _parameters(a="scale", alpha="exponent", b="scale", beta="exponent", e="irreducible"),
    (_SIZE_TERMS[0], _TOKENS, Term("e")),
    {"n": _log("total_parameters"), "d": _log("num_tokens")},
    sparsity_variable=None,
)
LEVERAGE = Form(
    "leverage",
    "A^^(a + d log10 C + gamma (log2 G)^2 + beta log2 G)",
    ("activation_ratio", "granularity", "budget_flops"),
    _parameters(a="free", d="free", gamma="free", beta="free", E_start="low_start", E_max="limit"),
    (Term(None, (("a", "e", 1), ("d", "ec", 1), ("gamma", "egg", 1), ("beta", "eg", 1))),),
    {
        "c": lambda data: np.log10(data["budget_flops"]),
        "g": lambda data: np.log2(data["granularity"]),
        "gg": lambda data: np.log2(data["granularity"]) ** 2,
    },
    saturating=lambda data: np.asarray(data["activation_ratio"], dtype=float),
    products={"ec": "c", "egg": "gg", "eg": "g"},
    target="efficiency_leverage",
    size_variable="budget_flops",
    sparsity_variable=None,
)

FORMS: dict[str, Form] = {
    form.name: form for form in (ABNAR, ABNAR_SIZE, JOINT, JOINT_SIZE, ROUTED, FINE_GRAINED, CHINCHILLA, LEVERAGE)
}


def find_form(name: str) -> Form:
    """One form by name.

    Raises:
        ValueError: there is none.
    """
    if name not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {name!r}")
    return FORMS[name]
