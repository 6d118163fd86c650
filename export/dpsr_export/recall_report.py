"""The recall report of `dpsr index`: ann_recall and latency of an index at several search parameters."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np

from dpsr_common.errors import CommandError
from dpsr_common.quiet_matplotlib import quiet_matplotlib
from dpsr_export import ann

JSON_FILE = "recall.json"
PLOT_FILE = "recall.svg"


@dataclasses.dataclass(frozen=True)
class MeasuredIndex:
    """An index with its search parameters set, and what was measured to choose them.

    Attributes:
        index: the FAISS index.
        factory: its FAISS factory string.
        settings: the search parameters that were measured, with their ann_recall and latency.
        chosen: the one of `settings` that is set in the index.
        k: the k of the recall target.
        recall_target: ann_recall@k that was asked for.
        entries: number of times that the index holds each position: 2 if each is in two lists.
        seconds: time that it took to train the index and to add the vectors.
        semantic_ids: lists, int64 [n], and codes, uint8 [n, M], if the index is that of a trained quantizer.
        exact_relevant_recall: recall of relevant items by exact search, by k, if there are judgments.
    """

    index: faiss.Index
    factory: str
    settings: list[ann.Setting]
    chosen: ann.Setting
    k: int
    recall_target: float
    entries: int = 1
    seconds: float = 0.0
    semantic_ids: tuple[np.ndarray, np.ndarray] | None = None
    exact_relevant_recall: dict[int, float] = dataclasses.field(default_factory=dict)


def table(measured: MeasuredIndex) -> str:
    """Returns the report as text. An asterisk marks the chosen search parameters."""
    names = [f"@{k}" for k in measured.chosen.ann_recall]
    names += [f"rel@{k}" for k in measured.chosen.relevant_recall]
    lines = [f"  {'parameters':<28}" + "".join(f"{name:>9}" for name in names) + f"{'p50 ms':>10}{'p99 ms':>10}"]
    for setting in measured.settings:
        mark = "*" if setting == measured.chosen else " "
        values = [*setting.ann_recall.values(), *setting.relevant_recall.values()]
        recalls = "".join(f"{recall:>9.4f}" for recall in values)
        lines.append(f"{mark} {setting.parameters or '-':<28}{recalls}{setting.p50_ms:>10.3f}{setting.p99_ms:>10.3f}")
    if measured.exact_relevant_recall:
        exact = ", ".join(f"rel@{k} {recall:.4f}" for k, recall in measured.exact_relevant_recall.items())
        lines.append(f"recall of relevant items by exact search: {exact}")
    if measured.chosen.ann_recall[measured.k] < measured.recall_target:
        lines.append(f"ann_recall@{measured.k} does not reach index.recall_target={measured.recall_target:g}")
    return "\n".join(lines)


def write(directory: Path, measured: MeasuredIndex, queries: str) -> None:
    """Writes recall.json and, if there are several settings to compare, recall.svg.

    Without matplotlib no plot is written, and one line says so: an index that took an hour is not lost for its plot.

    Args:
        directory: where the files are written.
        measured: the index.
        queries: says which queries were asked.
    """
    report = {
        "queries": queries,
        "factory": measured.factory,
        "k": measured.k,
        "recall_target": measured.recall_target,
        "chosen": measured.chosen.parameters,
        **{f"exact_relevant_recall@{k}": recall for k, recall in measured.exact_relevant_recall.items()},
        "latency": f"one query at a time, one thread, k={measured.k}",
        "settings": [
            {
                "parameters": setting.parameters,
                **{f"ann_recall@{k}": recall for k, recall in setting.ann_recall.items()},
                **{f"relevant_recall@{k}": recall for k, recall in setting.relevant_recall.items()},
                "p50_ms": setting.p50_ms,
                "p99_ms": setting.p99_ms,
            }
            for setting in measured.settings
        ],
    }
    (directory / JSON_FILE).write_text(json.dumps(report, indent=2) + "\n")
    if len(measured.settings) < 2:
        return
    try:
        drawn = plot(measured.settings, measured.factory)
    except ImportError as error:
        print(f"{PLOT_FILE} is not written: {error}; install matplotlib with pip to get it")
    else:
        (directory / PLOT_FILE).write_text(drawn)


def plot(settings: Sequence[ann.Setting], title: str) -> str:
    """Returns an SVG of ann_recall over the median latency, with a group `ann_recall@k` of dots for each k.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # Imported here because only this function needs it. Import and drawing take 0.65 s of CPU time (the import of
    # `dpsr index` itself takes 3 s).
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": title, "figure.constrained_layout.use": True}
    with quiet_matplotlib(), matplotlib.rc_context(style):
        figure = Figure(figsize=(6.4, 4))
        axes = figure.add_subplot()
        milliseconds = [max(setting.p50_ms, 1e-6) for setting in settings]
        for k, color in zip(settings[0].ann_recall, ("crimson", "teal", "navy", "orange"), strict=False):
            recall = [setting.ann_recall[k] for setting in settings]
            axes.plot(milliseconds, recall, "o", color=color, label=f"@{k}", gid=f"ann_recall@{k}")
        axes.set(xscale="log", ylim=(-0.03, 1.03), xlabel="median latency, ms", title=f"ann_recall of {title}")
        axes.grid(axis="y", color="lightgrey")
        axes.legend()
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    return drawn.getvalue()


def check(measured: MeasuredIndex, min_ann_recall: float) -> None:
    """Raises CommandError if the index finds less than --min_ann_recall."""
    recall = measured.chosen.ann_recall[measured.k]
    if recall < min_ann_recall:
        raise CommandError(
            f"ann_recall@{measured.k} of {measured.factory} is {recall:.4f} at most ({measured.chosen.parameters}), "
            f"below --min_ann_recall={min_ann_recall:g}; choose another index.factory or index.parameters (the "
            f"embeddings are kept for the next run)"
        )
