"""The rule table: role of a tensor -> initial scale, multiplier, and what each optimiser gets. Data, and how to read it.

Every entry is a power of two ratios: ``fan_in``, how much wider the tensor's input is than the base model's, and
``fan_out``, the same of its output. An axis that does not grow has the ratio 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Optimiser = Literal["adam", "sgd", "muon"]
# Those that can take every tensor of a model.
OPTIMISERS: tuple[Optimiser, ...] = ("adam", "sgd")

INPUT, VECTOR, HIDDEN, OUTPUT, OUTPUT_MULTIPLIER = "input", "vector", "hidden", "output", "output with multiplier"
FINITE, STANDARD_ROUTER = "finite", "standard router"


@dataclass(frozen=True)
class Power:
    """fan_in ** ``fan_in`` * fan_out ** ``fan_out``."""

    fan_in: float = 0.0
    fan_out: float = 0.0

    def at(self, fan_in: float, fan_out: float) -> float:
        """Its value."""
        return fan_in**self.fan_in * fan_out**self.fan_out


@dataclass(frozen=True)
class Update:
    """Factors on what an optimiser is given.

    Attributes:
        lr: on the learning rate.
        weight_decay: on a weight decay that shall take the same share of the weight per step at every width ("independent").
        eps: on Adam's epsilon: how the entries of the gradient scale.
    """

    lr: Power
    weight_decay: Power
    eps: Power = Power()


@dataclass(frozen=True)
class Rule:
    """One row.

    Attributes:
        init_std: factor on the standard deviation the weights are drawn with.
        multiplier: factor on the tensor's output in the forward pass.
        updates: by optimiser; "muon" only where the tensor is a matrix between widths.
        source: where the row comes from.
    """

    init_std: Power
    multiplier: Power
    updates: Mapping[Optimiser, Update]
    source: str


_ONE = Power()
_TP5 = "arXiv 2203.03466"
RULES: Mapping[str, Rule] = {
    INPUT: Rule(
        init_std=_ONE,
        multiplier=_ONE,
        updates={
            "adam": Update(lr=_ONE, weight_decay=_ONE, eps=Power(fan_out=-1)),
            "sgd": Update(lr=Power(fan_out=1), weight_decay=Power(fan_out=-1)),
        },
        source=f"{_TP5}, table 8, input weights",
    ),
    VECTOR: Rule(
        init_std=_ONE,
        multiplier=_ONE,
        updates={
            "adam": Update(lr=_ONE, weight_decay=_ONE, eps=Power(fan_out=-1)),
            "sgd": Update(lr=Power(fan_out=1), weight_decay=Power(fan_out=-1)),
        },
        source=f"{_TP5}, table 8, biases; a gain is the diagonal of a map between widths and scales alike",
    ),
    HIDDEN: Rule(
        init_std=Power(fan_in=-0.5),
        multiplier=_ONE,
        updates={
            "adam": Update(lr=Power(fan_in=-1), weight_decay=Power(fan_in=1), eps=Power(fan_out=-1)),
            "sgd": Update(lr=Power(fan_in=-1, fan_out=1), weight_decay=Power(fan_in=1, fan_out=-1)),
            # Of an update whose singular values are all 1; what Muon makes of the rate by the matrix's shape comes on top.
            "muon": Update(
                lr=Power(fan_in=-0.5, fan_out=0.5),
                weight_decay=Power(fan_in=0.5, fan_out=-0.5),
                eps=Power(fan_in=0.5, fan_out=-0.5),  # beside the gradient's Frobenius norm, entries as Adam's
            ),
        },
        source=f"{_TP5}, table 8, hidden weights; experts are hidden weights by arXiv 2508.09752; "
        "muon: arXiv 2310.17813, condition 1, see hf_moe_ext/mup/spectral.py",
    ),
    OUTPUT: Rule(
        init_std=Power(fan_in=-1),
        multiplier=_ONE,
        updates={
            "adam": Update(lr=Power(fan_in=-1), weight_decay=Power(fan_in=1)),
            "sgd": Update(lr=Power(fan_in=-1), weight_decay=Power(fan_in=1)),
        },
        source=f"{_TP5}, table 3, output weights; the router is one by arXiv 2508.09752",
    ),
    OUTPUT_MULTIPLIER: Rule(
        init_std=_ONE,
        multiplier=Power(fan_in=-1),
        updates={
            "adam": Update(lr=_ONE, weight_decay=_ONE, eps=Power(fan_in=-1)),
            "sgd": Update(lr=Power(fan_in=1), weight_decay=Power(fan_in=-1)),
        },
        source=f"{_TP5}, table 8, output weights; the row above with the factor 1/m taken out of the weight",
    ),
    STANDARD_ROUTER: Rule(
        init_std=_ONE,
        multiplier=_ONE,
        updates={"adam": Update(lr=_ONE, weight_decay=_ONE), "sgd": Update(lr=_ONE, weight_decay=_ONE)},
        source="simpleP of arXiv 2508.09752: the router as it is without µP",
    ),
    FINITE: Rule(
        init_std=_ONE,
        multiplier=_ONE,
        updates={"adam": Update(lr=_ONE, weight_decay=_ONE), "sgd": Update(lr=_ONE, weight_decay=_ONE)},
        source="nothing about it depends on the width",
    ),
}
