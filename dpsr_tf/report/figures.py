"""The figures of a report that pages of docs/ quote: figures.json and figures.md.

`figures` returns figures.json: name of a part -> `date`, `command`, `seed`, `hardware`, `bars` and `rows`, and for the
experiments `tables`. `rows` has `IMPLEMENTATION; WORKLOAD; METRIC` -> figure, and for each number beside a figure, such
as the ends of its interval, `IMPLEMENTATION; WORKLOAD; METRIC; low` -> number. Of rows with equal names the first
counts. `tables` has the named tables of sections.py, as lines of Markdown.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpsr_common.typed_config import to_dict
from dpsr_tf.report.benchmarks import BENCHMARKS, bar_rows, command_of
from dpsr_tf.report.online import FIGURES, GRADES
from dpsr_tf.report.public_data import DATA_SETS
from dpsr_tf.report.runner import Result
from dpsr_tf.report.shop import QUICK, Size

# The part of a report that is not a benchmark.
EXPERIMENTS = "experiments"
# Systems whose difference pages quote: the better one, and what it is compared with.
_PAIRS = tuple(itertools.pairwise(("BM25", "DPSR", "DPSR-p", "DPSR-h")))
# Fields of a row that are its name or its value, or that no page quotes.
_NOT_QUOTED = ("impl", "workload", "metric", "value", "unit", "samples")

Row = dict[str, Any]


def figures(results: Mapping[str, Any], tables: Mapping[str, Sequence[str]]) -> Result:
    """Returns figures.json of what was measured. `results` is report.json, `tables` are the named ones of its page."""
    keys = ("date", "command", "seed", "hardware", "bars")
    found: Result = {}
    if "table2" in results:
        own = {**{key: results[key] for key in keys if key != "command"}, "command": command_of_experiments(results)}
        found[EXPERIMENTS] = {
            **{key: own[key] for key in keys},
            "rows": named_rows(list(experiment_rows(results))),
            "tables": {name: list(lines) for name, lines in tables.items()},
        }
    for name, one in results.get("benchmarks", {}).items():
        if "bars" in one:
            found[name] = {**{key: one[key] for key in keys}, "rows": named_rows(one["rows"])}
    return found


def command_of_experiments(results: Mapping[str, Any]) -> str:
    """Returns the command that makes the experiments of a report again. It leaves out folders and the seed."""
    quick = results["mode"] == "quick"
    usual = to_dict(QUICK if quick else Size())
    words = ["dpsr report", f"--parts={EXPERIMENTS}"]
    words += ["--quick"] if quick else []
    words += ["--ablations"] if "ablations" in results else []
    words += [f"--{name}=DIR" for name in results["data"]]
    words += [f"--set={name}={value}" for name, value in results["size"].items() if value != usual[name]]
    return " ".join(words)


def full_command(name: str) -> str:
    """Returns the command of a part of a full report, as figures.json has it."""
    if name != EXPERIMENTS:
        return command_of(name, False)
    everything = {"mode": "full", "ablations": {}, "data": DATA_SETS, "size": to_dict(Size())}
    return command_of_experiments(everything)


def named_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns `IMPLEMENTATION; WORKLOAD; METRIC` -> figure, and the numbers beside each figure."""
    named: dict[str, float] = {}
    for row in rows:
        name = "; ".join(row[key].replace(";", ",") for key in ("impl", "workload", "metric"))
        found: dict[str, Any] = {name: row["value"]}
        for field, value in row.items():
            if field in ("interval", "difference"):
                prefix = "" if field == "interval" else "difference "
                found |= {f"{name}; {prefix}low": value[0], f"{name}; {prefix}high": value[1]}
            elif field not in _NOT_QUOTED:
                found[f"{name}; {field}"] = value
        for key, value in found.items():
            if isinstance(value, int | float):
                named.setdefault(key, _rounded(value))
    return named


def _rounded(value: float) -> float:
    """Returns a figure with six digits, more than any page shows."""
    return float(f"{value:.6g}")


def experiment_rows(results: Mapping[str, Any]) -> Iterator[Row]:
    """Yields the figures of the experiments as rows, like those of a benchmark.

    The workload is what was measured, and the shop or data set: `purchases, seed 1`, `typo, seed 1`,
    `homonyms, d 8, seed 1`, `online tail, seed 1`, `ablations, purchases`.
    """
    for table in results["table2"]:
        seed = f"seed {table['seed']}"
        for measured in ("purchases", "labels", "unseen"):
            yield from _of_systems(table[measured], f"{measured}, {seed}", ("top-1", "top-10", "mrr@10", "recall@100"))
            yield from _of_systems(table[measured], f"{measured}, {seed}", ("auc",) if measured == "labels" else ())
            for (worse, better), figure in itertools.product(_PAIRS, ("top-1", "top-10", "auc")):
                values = [table[measured]["systems"][label].get(figure) for label in (worse, better)]
                if None not in values:
                    yield _row(better, f"{measured}, {seed}", f"{figure} over {worse}", values[1] - values[0])
        for slicing, metrics in (("kind", ("top-1", "recall@100")), ("kind_and_language", ("mrr@10",))):
            for value, part in table["unseen"]["slices"][slicing].items():
                yield from _of_systems(part, f"{value}, {seed}", metrics)
    for one in results["ceilings"]:
        for name, of_figure in one["rankers"].items():
            for figure, of in of_figure.items():
                yield _row(name, f"upper limits, seed {one['seed']}", figure, of["value"], interval=of["interval"])
    yield from _polysemy_rows(results["polysemy"])
    for one in results["mixing"]:
        for alpha, measured in itertools.product(one["alpha"], ("purchases", "unseen")):
            for figure in ("popularity@10", "top-1", "top-10", "recall@100"):
                value = one[measured]["systems"][f"{alpha:g}"].get(figure)
                if value is not None:
                    yield _row(f"alpha {alpha:g}", f"{measured}, seed {one['seed']}", figure, value)
    yield from _online_rows(results["online"])
    for group, measured in results.get("ablations", {}).items():
        for on in ("purchases", "unseen"):
            yield from _of_variants(measured[on]["systems"], measured[on]["comparisons"], group, f"ablations, {on}")
        if "typo" in measured["unseen"]["slices"]["kind"]:
            typo = measured["unseen"]["slices"]["kind"]["typo"]
            yield from _of_systems(typo, "ablations, typo", ("top-1",), group)
    for one in results.get("claims", []):
        yield from _claim_rows(one)
    for name, folds in results["data"].items():
        for fold, table in folds.items():
            figures_of = ("recall@10", "recall@100", "mrr@10", "ndcg@10", "auc")
            yield from _of_systems(table, f"{name}, {fold}", figures_of)


def _row(impl: str, workload: str, metric: str, value: float, **more: Any) -> Row:
    return {"impl": impl, "workload": workload, "metric": metric, "value": value, **more}


def _of_systems(table: Mapping[str, Any], workload: str, metrics: Sequence[str], group: str = "") -> Iterator[Row]:
    """Yields the figures of a table of `dpsr evaluate`, with their intervals where there are some."""
    for label, values in table["systems"].items():
        for metric in metrics:
            if values.get(metric) is not None:
                limits = table["intervals"][label].get(metric)
                name = f"{group}: {label}" if group else label
                yield _row(name, workload, metric, values[metric], **({"interval": limits} if limits else {}))


def _of_variants(
    systems: Mapping[str, Any], comparisons: Sequence[Mapping[str, Any]], group: str, workload: str
) -> Iterator[Row]:
    """Yields top-1 and recall@100 of variants; `gain` is the difference from the first one."""
    compared = {one["system"]: one["figures"] for one in comparisons}
    for label, values in systems.items():
        for metric in ("top-1", "recall@100"):
            if metric in values:
                beside = compared.get(label, {}).get(metric)
                more = {"gain": beside["difference"], "difference": beside["interval"]} if beside else {}
                yield _row(f"{group}: {label}", workload, metric, values[metric], **more)


def _polysemy_rows(shops: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    for shop in shops:
        for dim, groups in shop["widths"].items():
            for group in ("homonyms", "all"):
                one = groups.get(group)
                if one is None:
                    continue
                workload = f"{group}, d {dim}, seed {shop['seed']}"
                yield _row("all models", workload, "queries", one["queries"])
                for column, figure in enumerate(shop["figures"]):
                    for label in ("1 head", "2 heads", "difference"):
                        limits = one[label]["interval"][column]
                        yield _row(label, workload, figure, one[label]["value"][column], interval=limits)


def _online_rows(shops: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    for shop in shops:
        for group, of_name in shop["ab_test"].items():
            for name, changes in of_name.items():
                workload = f"online {group}, seed {shop['seed']}"
                for figure in FIGURES:
                    yield _row(name, workload, figure, changes[figure]["change"], interval=changes[figure]["interval"])
        for name, grades in shop["rated"]["systems"].items():
            for grade in GRADES:
                yield _row(name, f"raters, seed {shop['seed']}", grade, grades[grade]["share"])


def _claim_rows(shop: Mapping[str, Any]) -> Iterator[Row]:
    seed = f"seed {shop['seed']}"
    for group, measured in shop["groups"].items():
        for name, one in measured["variants"].items():
            for step, of_step in one["by_step"].items():
                for on in ("purchases", "unseen"):
                    steps = f", {step} steps" if len(one["by_step"]) > 1 else ""
                    yield _row(f"{group}: {name}", f"claim, {on}, {seed}{steps}", "top-1", of_step[on]["top-1"])
            for metric in ("parameters", "step_ms", "query_ms", "senses@10"):
                yield _row(f"{group}: {name}", f"claim, {seed}", metric, one[metric])
        for on in ("purchases", "unseen"):
            for compared in measured["comparisons"][on]:
                of = compared["figures"]["top-1"]
                name = f"{group}: {compared['system']}"
                yield _row(name, f"claim, {on}, {seed}", "gain", of["difference"], interval=of["interval"])
    for name, chance in shop["chance"].items():
        yield _row(name, f"claim, {seed}", "chance of relevance", chance)


def figures_page(found: Mapping[str, Any]) -> str:
    """Returns docs/figures.md, the Markdown of the benchmarks in what `figures` returned."""
    lines = [
        "# Figures",
        "",
        "This page lists the main figures (bars) of the benchmarks, as they were last measured for this repository,",
        "and their aims. Read it to compare your own run, or to see which aims are missed.",
        "[`dpsr report`](report.md) writes this page:",
        "",
        "```",
        "dpsr report --out=report --data=DATA",
        "```",
    ]
    for name, one in found.items():
        if name == EXPERIMENTS:  # their tables are in docs/report.md
            continue
        benchmark, machine = BENCHMARKS[name], one["hardware"]
        lines += [
            "",
            f"## {benchmark.title}",
            "",
            f"{benchmark.text} See [{benchmark.page[:-3]}]({benchmark.page}).",
            "",
        ]
        lines += [
            f"`{one['command']}`, {one['date']}, {machine['cpu']}, {machine['cores']} cores, seed {one['seed']}.",
            "",
        ]
        lines += ["| bar | aim | measured | met |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(cells)} |" for cells in bar_rows(name, one["bars"])]
    return "\n".join(lines) + "\n"
