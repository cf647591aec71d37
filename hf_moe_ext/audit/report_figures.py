"""Figures of an inspection's report, each twice, for a light and a dark page; drawn from inspections alone."""

import base64
import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_moe_ext.audit.inspection import Inspection
from hf_moe_ext.audit.layer_number import layer_number
from hf_moe_ext.audit.load_distance import total_variation
from hf_moe_ext.audit.reading import RouterReading

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Distinct without red against green (Okabe and Ito).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
# Text and lines, page, colours of a heat map around its middle, colours of one from zero up, a dead expert.
THEMES = {
    "light": ("#222222", "#ffffff", ("PuOr_r",), "YlGnBu", "#E3000F"),
    "dark": ("#dddddd", "#15181c", ("managua_r", "PuOr_r"), "YlGnBu_r", "#ff5d5d"),
}
_OCTAVES = 3  # of the load's colours, to either side of an even share
_TALLEST_INCHES = 14.0


def draw_all(inspection: Inspection, old: Inspection | None = None) -> dict[str, dict[str, str]]:
    """Name of the figure -> theme -> data URI. Which figures there are depends on what was seen.

    Args:
        inspection: what to draw.
        old: an inspection of the same routers that it is compared with.
    """
    figures = {}
    for kind in _kinds(inspection):
        routers = _routers(inspection, kind)
        figures[f"load {kind}"] = _both(lambda axes, theme, r=routers: _draw_load(axes, theme, r), len(routers))
        if old is not None:
            before = _routers(old, kind)
            figures[f"change {kind}"] = _both(
                lambda axes, theme, r=routers, b=before: _draw_change(axes, theme, r, b), len(routers)
            )
        if any(len(one.slices) > 1 for one in routers):
            figures[f"slices {kind}"] = _both(lambda axes, theme, r=routers: _draw_slices(axes, theme, r), len(routers))
    figures["measures"] = _both(lambda axes, theme: _draw_measures(axes, inspection), None, _kinds(inspection))
    return figures


def _kinds(inspection: Inspection) -> list[str]:
    return list(dict.fromkeys(one.router for one in inspection.reading.routers))


def _routers(inspection: Inspection, kind: str) -> list[RouterReading]:
    return [one for one in inspection.reading.routers if one.router == kind]


def _both(draw: Callable[..., None], num_rows: int | None, panels: list[str] | None = None) -> dict[str, str]:
    return {theme: _picture(draw, theme, num_rows, panels) for theme in THEMES}


def _picture(draw: Callable[..., None], theme: str, num_rows: int | None, panels: list[str] | None) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ink, page, *_ = THEMES[theme]
    keys = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    look: dict[Any, Any] = dict.fromkeys(keys, ink) | {"axes.facecolor": page, "figure.facecolor": page, "font.size": 9}
    look |= {"svg.hashsalt": "inspection", "axes.spines.top": False, "axes.spines.right": False}
    height = 3.2 if num_rows is None else min(_TALLEST_INCHES, 1.5 + 0.2 * num_rows)
    with rc_context(look):
        figure = Figure(figsize=(8.4, height), layout="constrained")
        axes: Any = figure.subplots(1, len(panels), squeeze=False)[0] if panels else figure.subplots()
        draw(axes, theme)
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def _draw_load(axes: "Axes", theme: str, routers: list[RouterReading]) -> None:
    values = _table([one.load * one.num_experts for one in routers])
    with np.errstate(divide="ignore"):
        octaves = np.log2(values)
    dead = [[e in one.dead for e in range(values.shape[1])] for one in routers]
    octaves[np.array(dead)] = -np.inf
    image = _heat(axes, routers, octaves, _around(theme), -_OCTAVES, _OCTAVES, under=THEMES[theme][4])
    bar = axes.figure.colorbar(image, ax=axes, label="times an even share", extend="min")
    ticks = range(-_OCTAVES, _OCTAVES + 1)
    bar.set_ticks(list(ticks), labels=[f"{2.0**tick:g}" for tick in ticks])
    _label_experts(axes, routers)


def _draw_change(axes: "Axes", theme: str, routers: list[RouterReading], before: list[RouterReading]) -> None:
    old = {one.layer: one for one in before}
    values = _table([100 * (one.load - old[one.layer].load) for one in routers])
    bound = max(0.1, float(np.nanmax(np.abs(values))))
    image = _heat(axes, routers, values, _around(theme), -bound, bound)
    axes.figure.colorbar(image, ax=axes, label="new minus old share, per cent")
    _label_experts(axes, routers)


def _draw_slices(axes: "Axes", theme: str, routers: list[RouterReading]) -> None:
    names = sorted({name for one in routers for name in one.slices})
    values = _table([np.array([_from_others(one, name) for name in names]) for one in routers])
    image = _heat(axes, routers, values, THEMES[theme][3], 0.0, max(0.1, float(np.nanmax(values))))
    axes.figure.colorbar(image, ax=axes, label="distance from the other slices")
    shown = [name if len(name) <= 18 else name[:17] + "…" for name in names]
    axes.set_xticks(
        range(len(names)), shown, rotation=30 if len(names) > 4 else 0, ha="right" if len(names) > 4 else "center"
    )


def _from_others(router: RouterReading, name: str) -> float:
    """Total variation of a slice's load from that of all the others; not a number without either."""
    own = router.slices.get(name)
    others = [counts for other, counts in router.slices.items() if other != name]
    if own is None or not own.sum() or not others or not sum(one.sum() for one in others):
        return math.nan
    return total_variation(own, np.sum(others, axis=0))


def _draw_measures(axes: Any, inspection: Inspection) -> None:
    for panel, kind in zip(axes, _kinds(inspection), strict=True):
        routers = _routers(inspection, kind)
        lines: dict[str, list[float | None]] = {
            "evenness of load": [one.load_entropy for one in routers],
            "entropy of a token's choice": [one.entropy for one in routers],
            "decided by the token": [inspection.selectivity.get(one.layer, {}).get(kind) for one in routers],
        }
        for colour, marker, (label, values) in zip(COLOURS, "os^", lines.items(), strict=False):
            places = [i for i, value in enumerate(values) if value is not None]
            if places:
                heights = [values[i] for i in places]
                panel.plot(places, heights, marker=marker, markersize=4, linewidth=1.2, color=colour, label=label)
        ticks = _thinned(len(routers))
        panel.set_xticks(ticks, [_name(routers[i].layer) for i in ticks])
        panel.set(title=f"{kind} router", xlabel="layer", ylim=(-0.03, 1.05))
        panel.set_xlim(-0.5, len(routers) - 0.5)
    axes[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _heat(
    axes: "Axes", routers: list[RouterReading], values: np.ndarray, colours: str, low: float, high: float,
    under: str | None = None,
) -> Any:  # fmt: skip
    import matplotlib

    scale = matplotlib.colormaps[colours]
    if under is not None:
        # Below every finite value: what is minus infinity is drawn in it too.
        scale = scale.with_extremes(under=under)
        values = np.where(np.isneginf(values), low - 1.0, np.where(np.isnan(values), np.nan, np.maximum(values, low)))
    image = axes.imshow(values, aspect="auto", cmap=scale, vmin=low, vmax=high, interpolation="nearest")
    rows = _thinned(len(routers))
    axes.set_yticks(rows, [_name(routers[i].layer) for i in rows])
    axes.set_ylabel("layer")
    return image


def _label_experts(axes: "Axes", routers: list[RouterReading]) -> None:
    axes.set_xlabel("expert")
    axes.set_xticks(_thinned(max(one.num_experts for one in routers), most=20))


def _around(theme: str) -> str:
    import matplotlib

    # Maps with a dark middle came with Matplotlib 3.10.
    return next(name for name in THEMES[theme][2] if name in matplotlib.colormaps)


def _table(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of different length as one table, not a number where a row has ended."""
    width = max(len(row) for row in rows)
    return np.array([np.pad(row.astype(float), (0, width - len(row)), constant_values=np.nan) for row in rows])


def _thinned(count: int, most: int = 40) -> list[int]:
    return list(range(0, count, max(1, math.ceil(count / most))))


def _name(layer: str) -> str:
    number = layer_number(layer)
    return layer if number is None else str(number)
