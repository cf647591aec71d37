"""Model cards: rendered from a folder's configuration and its metrics, every number with the file it is from.

    write_card("outputs/run", metrics="outputs/run/metrics.json")

What is not measured is said to be so. A card that a person has written in keeps those words: only the part between our
two marks is rendered anew.
"""

from hf_moe_ext.cards.facts import CardError
from hf_moe_ext.cards.front_matter import CARD, check_front_matter
from hf_moe_ext.cards.rendering import (
    check_card,
    find_metrics,
    format_results,
    name_repository,
    render_card,
    write_card,
)

__all__ = [
    "CARD",
    "CardError",
    "check_card",
    "check_front_matter",
    "find_metrics",
    "format_results",
    "name_repository",
    "render_card",
    "write_card",
]
