"""Formats the result of an evaluation as text tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpsr_tf.evaluation import metrics


def format_report(report: Mapping[str, Any]) -> str:
    """Returns the report of measure_all, with the `settings` of the command, as text for people."""
    ks = report["settings"]["ks"]
    main = [*(f"recall@{k}" for k in ks), f"mrr@{ks[0]}", f"ndcg@{ks[0]}"]
    names = ["system", *main, *(f"top-{k}" for k in metrics.TOP_K), "auc"]
    more = ["system", *(f"precision@{k}" for k in ks), *(f"coverage@{k}" for k in ks), *(f"popularity@{k}" for k in ks)]
    speed = ["system", "latency_ms_p50", "latency_ms_p99", "cpu_ms", "queries_per_second"]
    rows = [{"system": spec, **figures} for spec, figures in report["systems"].items()]
    blocks = [_table(names, _with_widths(report, rows))]
    if report["settings"]["bootstrap"]:
        blocks[0] += f"\n+-: half the width of the {metrics.CONFIDENCE:.0%} bootstrap interval"
    blocks += [_table(more, rows), _table(speed, rows)]
    for slicing, values in report["slices"].items():
        of_slice = [
            {slicing: value, "queries": part["queries"], "share": part["share"], "system": spec, **figures}
            for value, part in values.items()
            for spec, figures in part["systems"].items()
        ]
        blocks.append(_table([slicing, "queries", "share", *names], of_slice))
    return "\n\n".join(blocks + _comparisons(report, names) + _notes(report))


def format_rankings(report: Mapping[str, Any]) -> str:
    """Returns the report of measure_rankings, with the `settings` of the command, as text for people."""
    ndcg = [f"ndcg@{k}" for k in report["settings"]["ks"]]
    names = ["system", "session_auc", *ndcg, "mrr", "ece", "log_loss", "log_loss_gain"]
    rows = [{"system": spec, **figures} for spec, figures in report["systems"].items()]
    lists = {"system": "lists", **report["counts"]}
    blocks = [_table(names, [*_with_widths(report, rows), lists])]
    return "\n\n".join(blocks + _comparisons(report, names) + _notes(report))


def _with_widths(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns each row with another one below that has half the widths of its intervals."""
    if not report["settings"]["bootstrap"]:
        return list(rows)
    widths = [
        {"system": f"{spec} +-"} | {name: (limits[1] - limits[0]) / 2 for name, limits in intervals.items() if limits}
        for spec, intervals in report["intervals"].items()
    ]
    return [row for pair in zip(rows, widths, strict=True) for row in pair]


def _comparisons(report: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    blocks = []
    for comparison in report.get("comparisons", []):
        rows = [
            {
                "figure": name,
                "difference": one["difference"],
                **dict(zip(("low", "high"), one["interval"] or (), strict=False)),
                "p (t-test)": _p_value(one["p_t_test"]),
                "p (Wilcoxon)": _p_value(one["p_wilcoxon"]),
            }
            for name, one in comparison["figures"].items()
            if name in names
        ]
        title = f"{comparison['system']} minus {comparison['baseline']}, query by query"
        columns = ["figure", "difference", "low", "high", "p (t-test)", "p (Wilcoxon)"]
        blocks.append(f"{title}\n{_table(columns, rows)}")
    return blocks


def _notes(report: Mapping[str, Any]) -> list[str]:
    notes = [f"{spec}: {note}" for spec, lines in report["notes"].items() for note in lines]
    return ["\n".join(notes)] if notes else []


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats one line per row, texts aligned to the left, numbers to the right. A missing number is shown as -."""
    lines = [list(columns)] + [[_cell(row.get(name)) for name in columns] for row in rows]
    is_text = [any(isinstance(row.get(name), str) for row in rows) for name in columns]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if text else f"{cell:>{width}}"
            for cell, width, text in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in lines
    )


def _p_value(p: float | None) -> str:
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None or not np.isfinite(value):
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"
