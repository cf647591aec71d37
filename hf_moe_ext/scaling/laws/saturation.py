"""The saturating transform of a number of experts (arXiv 2202.01169, equation 10), which three laws share."""

from math import inf
from typing import Any


def saturate(x: Any, start: Any, limit: Any) -> Any:
    """1/x^ = 1/(x - x_0 + 1/(1/start - 1/limit)) + 1/limit: x^ is ``start`` at x = x_0 and tends to ``limit``.

    Args:
        x: what is above its smallest value: E - 1, or A itself; a number or an array.
        start: value at x = 0.
        limit: value at infinity, above ``start``.
    """
    inverse_limit = 0.0 if limit == inf else 1 / limit
    return 1 / (1 / (x + 1 / (1 / start - inverse_limit)) + inverse_limit)
