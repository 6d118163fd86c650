"""The report's figures: functions of results, each returns a matplotlib figure.

Colours are Okabe and Ito's, which the colour-blind tell apart; where there are more groups than colours, the marker
tells them apart, and labels stand in the picture.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE, BLACK = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000",
)  # fmt: skip
COLORS = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, YELLOW, "#666666")
MARKERS = "o^sDvPX*"
_STYLE = {
    "svg.fonttype": "none",  # texts stay texts: they can be searched, and the reader's fonts have all scripts
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
}


def svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element, the same text for the same figure; `name` keeps its ids apart from others'."""
    out = io.StringIO()
    with _quiet(), matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    # Several figures share a page, and ids are common to it.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    return re.sub(r"url\(#", f"url(#{name}-", text)


def topology(result: Mapping[str, Any]) -> Figure:
    """Figure 5: `points` [n, 2] of items, the `type` of each, and the `category` of each type, by name."""
    with _new((9, 7.5)) as figure:
        axes = figure.add_subplot()
        points, types = np.array(result["points"]), np.array(result["type"])
        categories = list(dict.fromkeys(result["category"].values()))
        for number, category in enumerate(categories):
            mine = np.isin(types, [name for name, of in result["category"].items() if of == category])
            color, marker = COLORS[number % len(COLORS)], MARKERS[number // len(COLORS)]
            axes.scatter(
                points[mine, 0], points[mine, 1], s=9, c=color, marker=marker, alpha=0.7, linewidths=0, label=category
            )
        _bare(axes)
        # A label stands at the item of its type that is nearest to all others of it.
        places = {name: _medoid(points[types == name]) for name in result["category"]}
        _spread_labels(axes, places, points)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=5, markerscale=2, frameon=False, fontsize=8)
    return figure


def polysemy(result: Mapping[str, Any]) -> Figure:
    """Figure 6: for each query and model the items of its meanings, and which head finds which of the first ones."""
    queries, models = result["queries"], list(result["queries"][0]["models"])
    with _new((5 * len(models), 4.2 * len(queries))) as figure:
        grid = figure.subplots(len(queries), len(models), squeeze=False)
        for row, query in enumerate(queries):
            for column, model in enumerate(models):
                axes, found = grid[row, column], query["models"][model]
                points, meaning = np.array(found["points"]), np.array(found["meaning"])
                for number, name in enumerate(query["meanings"]):
                    mine = meaning == number
                    color, marker = (SKY, ORANGE, PURPLE, GREEN)[number % 4], "os^D"[number % 4]
                    axes.scatter(
                        points[mine, 0],
                        points[mine, 1],
                        s=12,
                        c=color,
                        marker=marker,
                        alpha=0.6,
                        linewidths=0,
                        label=name,
                    )
                axes.scatter(
                    points[meaning < 0, 0], points[meaning < 0, 1], s=5, c="#BBBBBB", linewidths=0, label="other items"
                )
                for head, places in enumerate(found["heads"]):
                    edge, mark = (BLACK, VERMILION, BLUE, GREEN)[head % 4], "osD^"[head % 4]
                    size = 70 + 50 * head
                    where = points[places]
                    axes.scatter(where[:, 0], where[:, 1], s=size, marker=mark, facecolors="none", edgecolors=edge,
                                 linewidths=1.3, label=f"found by head {head + 1}")  # fmt: skip
                _bare(axes)
                axes.set_title(f"“{query['query']}”, {model}")
            grid[row, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    return figure


def mixing(result: Mapping[str, Any]) -> Figure:
    """Figure 7: `alpha`, and for each of `figures` a mean and its interval at each alpha."""
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
    """Group -> (name, value, interval) of each bar, beside one another; names are the same in all groups."""
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
    with _quiet(), matplotlib.rc_context(_STYLE):
        yield Figure(figsize=size)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without a line for each character that the font which measures texts does not have."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="matplotlib")  # NumPy 1.25
            yield
    finally:
        logger.setLevel(level)


def _bare(axes: Axes) -> None:
    """t-SNE's axes mean nothing."""
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color("#CCCCCC")


def _medoid(points: np.ndarray) -> np.ndarray:
    return points[np.abs(points - np.median(points, axis=0)).sum(axis=1).argmin()]


def _spread_labels(axes: Axes, places: Mapping[str, np.ndarray], points: np.ndarray) -> None:
    """Writes each name at its place, moved up or down until none lies over another."""
    low, high = points.min(axis=0), points.max(axis=0)
    width, height = (high - low) * (0.013, 0.03)  # of a character, as this figure's size has it
    taken: list[tuple[float, float, float]] = []  # left, right, middle
    for name, (x, y) in sorted(places.items(), key=lambda entry: -entry[1][1]):
        half = width * (sum(2 if ord(c) > 0x2E80 else 1 for c in name) + 1) / 2
        for step in (n // 2 * (-1) ** n for n in range(1, 40)):
            at = y + step * height * 0.6
            if all(x + half < left or x - half > right or abs(at - middle) > height for left, right, middle in taken):
                break
        taken.append((x - half, x + half, at))
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.8, "linewidth": 0}
        axes.text(x, at, name, ha="center", va="center", fontsize=8, bbox=box)
