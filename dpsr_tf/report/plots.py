"""The figures of the report. Each function takes results and returns a matplotlib figure.

The colors are those of Okabe and Ito, which color-blind readers can tell apart. Where there are more groups than
colors, markers differ too, and the figure has labels.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpsr_common.quiet_matplotlib import quiet_matplotlib

ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE, BLACK = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000",
)  # fmt: skip
COLORS = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, YELLOW, "#666666")
MARKERS = "o^sDvPX*"
_STYLE = {
    # Keep text as text: it can be searched, and the reader's fonts cover all scripts.
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
}


def svg(figure: Figure, name: str) -> str:
    """Returns the figure as an SVG element, reproducibly. `name` makes its ids distinct from those of other figures."""
    out = io.StringIO()
    with quiet_matplotlib(), matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    # Several figures stand on one page, where ids must be distinct.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    return re.sub(r"url\(#", f"url(#{name}-", text)


def topology(result: Mapping[str, Any]) -> Figure:
    """Draws figure 5: `points` [n, 2] of items, the `type` of each item, and type -> `category`."""
    with _new((9, 7.5)) as figure:
        axes = figure.add_subplot()
        points, types = np.array(result["points"]), np.array(result["type"])
        categories = list(dict.fromkeys(result["category"].values()))
        for number, category in enumerate(categories):
            mine = np.isin(
                types, [name for name, its_category in result["category"].items() if its_category == category]
            )
            color, marker = COLORS[number % len(COLORS)], MARKERS[number // len(COLORS)]
            axes.scatter(
                points[mine, 0], points[mine, 1], s=9, c=color, marker=marker, alpha=0.7, linewidths=0, label=category
            )
        _hide_axes(axes)
        # The label of a type stands at its most central item.
        places = {name: _medoid(points[types == name]) for name in result["category"]}
        _spread_labels(axes, places, points)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=5, markerscale=2, frameon=False, fontsize=8)
    return figure


def polysemy(result: Mapping[str, Any]) -> Figure:
    """Draws figure 6: for each query and model the items of its meanings, and the items that each head finds."""
    queries, models = result["queries"], list(result["queries"][0]["models"])
    with _new((5 * len(models), 4.2 * len(queries))) as figure:
        grid = figure.subplots(len(queries), len(models), squeeze=False)
        for row, query in enumerate(queries):
            for column, model in enumerate(models):
                axes = grid[row, column]
                _meanings_and_heads(axes, query["meanings"], query["models"][model])
                axes.set_title(f"“{query['query']}”, {model}")
            grid[row, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    return figure


def _meanings_and_heads(axes: Axes, meanings: Sequence[str], found: Mapping[str, Any]) -> None:
    """Draws the items of each meaning, the other items, and rings around the items that each head finds."""
    points, meaning = np.array(found["points"]), np.array(found["meaning"])
    for number, name in enumerate(meanings):
        mine = meaning == number
        color, marker = (SKY, ORANGE, PURPLE, GREEN)[number % 4], "os^D"[number % 4]
        axes.scatter(
            points[mine, 0], points[mine, 1], s=12, c=color, marker=marker, alpha=0.6, linewidths=0, label=name
        )
    others = points[meaning < 0]
    axes.scatter(others[:, 0], others[:, 1], s=5, c="#BBBBBB", linewidths=0, label="other items")
    for head, places in enumerate(found["heads"]):
        color, marker = (BLACK, VERMILION, BLUE, GREEN)[head % 4], "osD^"[head % 4]
        where = points[places]
        axes.scatter(where[:, 0], where[:, 1], s=70 + 50 * head, marker=marker, facecolors="none", edgecolors=color,
                     linewidths=1.3, label=f"found by head {head + 1}")  # fmt: skip
    _hide_axes(axes)


def mixing(result: Mapping[str, Any]) -> Figure:
    """Draws figure 7: the mean and interval of each of `figures` for each `alpha`."""
    panels = list(result["figures"])
    with _new((3.6 * len(panels), 3.4)) as figure:
        for number, name in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), number + 1)
            values = np.array(result["figures"][name]["value"])
            intervals = result["figures"][name].get("interval")
            error = None if intervals is None else np.abs(np.array(intervals).T - values)
            axes.errorbar(result["alpha"], values, error, color=COLORS[number], marker=MARKERS[number], capsize=3)
            axes.set_xlabel("α, share of random negatives")
            axes.set_title(name)
            axes.set_xticks(result["alpha"])
            axes.grid(axis="y", color="#DDDDDD")
    return figure


def bars(groups: Mapping[str, Sequence[tuple[str, float, Sequence[float] | None]]], title: str) -> Figure:
    """Draws bars side by side: group -> (name, value, interval) of each bar, with the same names in all groups."""
    with _new((8.5, 3.2)) as figure:
        axes = figure.add_subplot()
        names = [name for name, _, _ in next(iter(groups.values()))]
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            entries = [next(entry for entry in entries if entry[0] == name) for entries in groups.values()]
            values = np.array([value for _, value, _ in entries])
            error = None
            if all(limits is not None for _, _, limits in entries):
                error = np.abs(np.array([limits for _, _, limits in entries], float).T - values)
            at = np.arange(len(groups)) + (number - (len(names) - 1) / 2) * width
            hatch = ("", "//", "..", "xx", "\\\\", "--", "++", "oo")[number % 8]
            axes.bar(at, values, width * 0.92, yerr=error, label=name, color=COLORS[number % 8], hatch=hatch,
                     edgecolor="white", error_kw={"elinewidth": 1, "capsize": 2})  # fmt: skip
        axes.set_xticks(np.arange(len(groups)), groups)
        axes.set_title(title)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


@contextlib.contextmanager
def _new(size: tuple[float, float]) -> Iterator[Figure]:
    with quiet_matplotlib(), matplotlib.rc_context(_STYLE):
        yield Figure(figsize=size)


def _hide_axes(axes: Axes) -> None:
    """Removes the axes, which have no meaning in t-SNE."""
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color("#CCCCCC")


def _medoid(points: np.ndarray) -> np.ndarray:
    return points[np.abs(points - np.median(points, axis=0)).sum(axis=1).argmin()]


def _spread_labels(axes: Axes, places: Mapping[str, np.ndarray], points: np.ndarray) -> None:
    """Writes each name at its place, moved up or down so that no two overlap."""
    low, high = points.min(axis=0), points.max(axis=0)
    # Size of a character in the units of the points, for the size of this figure.
    width, height = (high - low) * (0.013, 0.03)
    # Left, right and middle of the labels that have been placed.
    taken: list[tuple[float, float, float]] = []
    for name, (x, y) in sorted(places.items(), key=lambda entry: -entry[1][1]):
        half = width * (sum(2 if ord(c) > 0x2E80 else 1 for c in name) + 1) / 2
        for step in (n // 2 * (-1) ** n for n in range(1, 40)):
            at = y + step * height * 0.6
            if all(x + half < left or x - half > right or abs(at - middle) > height for left, right, middle in taken):
                break
        taken.append((x - half, x + half, at))
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.8, "linewidth": 0}
        axes.text(x, at, name, ha="center", va="center", fontsize=8, bbox=box)
