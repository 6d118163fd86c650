"""The report's text: results in, Markdown and figures out. Nothing is computed here but what is shown."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from dpsr_tf.report import plots
from dpsr_tf.report.runner import Result

# Table 2 of the paper: top-1, top-10, AUC, time. 15 million items of JD.com, 48 cores.
PAPER_TABLE_2 = {
    "BM25": (0.718, 0.947, 0.661, "61 s"),
    "BM25-u&b": (0.721, 0.948, 0.661, "157 s"),
    "DSSM": (0.002, 0.016, 0.524, "20 ms"),
    "DPSR": (0.839, 0.979, 0.696, "20 ms"),
    "DPSR-p": (0.868, 0.984, 0.692, "20 ms"),
    "DPSR-h": (0.889, 0.998, 0.685, "20 ms"),
}
# What the paper finds of top-k, and what it is judged by here: who asks matters to the last three only.
ORDERS = {"unseen": ("DSSM", "BM25"), "purchases": ("BM25", "DPSR", "DPSR-p", "DPSR-h")}
_NAMES = ("top-1", "top-10")
_ASKED = {"homonyms": "homonyms", "all": "all polysemous queries"}
_JUDGED = {"unseen": "queries that the log does not hold", "purchases": "what users bought"}


class Report:
    """Markdown, and the figures it names."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.figures: dict[str, Figure] = {}

    def heading(self, text: str, level: int = 2) -> None:
        """A heading."""
        self.lines += ["", "#" * level + f" {text}", ""]

    def text(self, *paragraphs: str) -> None:
        """Paragraphs of Markdown."""
        for paragraph in paragraphs:
            self.lines += [paragraph, ""]

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], texts: int = 1) -> None:
        """A table; the first `texts` columns to the left, the others, numbers, to the right."""
        if not rows:
            self.text("None.")
            return
        marks = [":--" if column < texts else "--:" for column in range(len(columns))]
        for cells in [columns, marks] + [list(map(_escaped, row)) for row in rows]:
            self.lines.append("| " + " | ".join(map(str, cells)) + " |")
        self.lines.append("")

    def figure(self, name: str, caption: str, figure: Figure) -> None:
        """A figure, `plots/NAME.svg`."""
        self.figures[name] = figure
        self.lines += [f"![{caption}](plots/{name}.svg)", "", f"*{caption}*", ""]

    @property
    def markdown(self) -> str:
        """All of it."""
        return "\n".join(self.lines).strip() + "\n"


def report(results: Result) -> Report:
    """The report of what `experiments.run` gives, with `mode`, `hardware`, `bars` and `seconds`."""
    page = Report()
    hardware = results["hardware"]
    page.heading("DPSR: the paper's experiments", 1)
    counts = results["shop"]
    page.text(
        "Section 6 of *Towards Personalized and Semantic Retrieval* (SIGIR 2020), on data that anyone can make: a "
        f"generated shop of {counts['items']:,} items, {counts['users']:,} users and {counts['interactions']:,} "
        "clicks, whose truths are known. Its queries, users and items are not JD.com's, so its figures and the "
        "paper's are not comparable; what can be compared is the order of the methods.",
        f"Mode {results['mode']}, seed {results['seed']}, {hardware['cpu']}, {hardware['cores']} cores, "
        f"{hardware['memory_gib']:g} GiB, {hardware['system']}, DPSR {results['versions']['dpsr']}, TensorFlow "
        f"{results['versions']['tensorflow']}. Intervals are 95 % bootstrap intervals over the queries. The same seed "
        "on the same machine gives the same figures, but for times and rates.",
    )
    _claims(page, results)
    _table_2(page, results)
    _topology(page, results)
    _polysemy(page, results)
    _mixing(page, results)
    _cases(page, results)
    _efficiency(page, results)
    for name, of in results.get("data", {}).items():
        _data_set(page, name, of)
    if "ablations" in results:
        _ablations(page, results["ablations"])
    _files(page, results)
    return page


def bars(results: Result) -> dict[str, float]:
    """Flat figures for a comparison of runs: of the first shop, and how much of the paper's order the shops keep."""
    result: dict[str, float] = {}
    first = results["table2"][0]
    for label in PAPER_TABLE_2:
        key = label.lower().replace("&", "")
        for figure in ("top-1", "top-10"):
            result[f"{figure}_{key}".replace("-", "_")] = first["purchases"]["systems"][label][figure]
        result[f"auc_{key}".replace("-", "_")] = first["labels"]["systems"][label]["auc"]
    orders = [
        _order(table[measured], order, figure)
        for table in results["table2"]
        for measured, order in ORDERS.items()
        for figure in _NAMES
    ]
    result["order_kept_share"] = sum(kept for kept, _ in orders) / len(orders)
    result["order_kept_with_intervals_apart_share"] = sum(apart for _, apart in orders) / len(orders)
    for dim in results["polysemy"][0]["widths"]:
        gains = [
            one["widths"][dim]["homonyms"] for one in results["polysemy"] if "homonyms" in one["widths"].get(dim, {})
        ]
        if gains:
            mean = sum(one["difference"]["value"][0] for one in gains) / len(gains)
            result[f"two_heads_homonym_senses_gain_d{dim}"] = mean
    rises = [_rise(one) for one in results["mixing"]]
    result["popularity_rise_alpha_0_to_1"] = sum(rises) / len(rises)
    return result


def _order(table: Mapping[str, Any], order: Sequence[str], figure: str) -> tuple[bool, bool]:
    """Whether systems are in this order, and whether neighbours' intervals are apart."""
    values = [table["systems"][label][figure] for label in order]
    limits = [table["intervals"][label][figure] for label in order]
    rising = all(low < high for low, high in itertools.pairwise(values))
    return rising, all(low[1] < high[0] for low, high in itertools.pairwise(limits))


def _rise(one: Mapping[str, Any]) -> float:
    ends = [one["purchases"]["systems"][f"{alpha:g}"]["popularity@10"] for alpha in (one["alpha"][0], one["alpha"][-1])]
    return float(ends[1] - ends[0])


def _claims(page: Report, results: Result) -> None:
    page.heading("What the paper claims, and what is found here")
    rows: list[Sequence[object]] = []
    for table, poly, mixed in zip(results["table2"], results["polysemy"], results["mixing"], strict=True):
        seed = table["seed"]
        for measured, order in ORDERS.items():
            for figure in _NAMES:
                kept, apart = _order(table[measured], order, figure)
                values = " < ".join(f"{table[measured]['systems'][label][figure]:.3f}" for label in order)
                what = f"{figure}, {_JUDGED[measured]}: {' < '.join(order)}"
                rows.append((what, seed, values, "intervals apart" if apart else "yes" if kept else "**no**"))
        for dim, groups in poly["widths"].items():
            for group in ("homonyms", "all"):
                if group in groups:
                    gain = groups[group]["difference"]
                    low, high = gain["interval"][0]
                    values = f"{gain['value'][0]:+.3f} ({low:+.3f} to {high:+.3f})"
                    what = f"two heads find more senses than one, d {dim}, {_ASKED[group]}"
                    rows.append((what, seed, values, _verdict(low, high)))
        rise = _rise(mixed)
        what = f"popularity of what is found, α {mixed['alpha'][0]:g} to {mixed['alpha'][-1]:g}, rises"
        rows.append((what, seed, f"{rise:+.3f}", "yes" if rise > 0 else "**no**"))
    rows.sort(key=lambda row: str(row[0]))
    page.table(("claim", "seed", "found", "holds"), rows, texts=4)


def _verdict(low: float, high: float) -> str:
    return "intervals apart" if low > 0 else "**no**" if high < 0 else "not told apart"


def _table_2(page: Report, results: Result) -> None:
    page.heading("Table 2: methods")
    first = results["table2"][0]
    bought, graded = first["purchases"], first["labels"]
    page.text(
        "Top-k: a right item among 1,023 that are not, the chance that it ranks within k. Right is what a user "
        f"bought after the log's end ({bought['queries']:,} purchases); DPSR-p and DPSR-h are told who asks. AUC: "
        f"{graded['queries']:,} queries with pairs graded by (simulated, erring) humans, nobody named. Time to 1,000 "
        f"items: one query alone, median, of {bought['items']:,} items on this machine by exact search; the index "
        "does it for millions (Table 5). The paper's rows stand beside it for orientation: they are of JD.com's log "
        "and 15 million items. All DPSR models are trained alike, by softmax with log Q correction over the batch, 512 "
        "random and 4 unclicked items; figure 7 has the paper's hinge."
    )
    rows = []
    for label in [*PAPER_TABLE_2, "popularity"]:
        paper = PAPER_TABLE_2.get(label, ("", "", "", ""))
        time = f"{first['times']['systems'][label]['latency_ms_p50']:.2f} ms"
        cells = [_with_interval(bought, label, "top-1"), _with_interval(bought, label, "top-10")]
        cells += [_with_interval(graded, label, "auc"), time]
        rows.append((label, *cells, *(f"{x:.3f}" if isinstance(x, float) else x for x in paper)))
    columns = ("", "top-1", "top-10", "AUC", "time", *(f"paper: {name}" for name in ("top-1", "top-10", "AUC", "time")))
    page.table(columns, rows)
    groups = {
        figure: [
            (label, bought["systems"][label][figure], bought["intervals"][label][figure]) for label in PAPER_TABLE_2
        ]
        for figure in _NAMES
    }
    page.figure("table2", "Top-1 and top-10 by what users bought, with intervals", plots.bars(groups, ""))
    page.text("The same with every shop:")
    rows = [
        (table["seed"], label, *(_with_interval(table["purchases"], label, figure) for figure in _NAMES),
         _with_interval(table["purchases"], label, "recall@100"), _with_interval(table["labels"], label, "auc"))
        for table in results["table2"] for label in PAPER_TABLE_2
    ]  # fmt: skip
    page.table(("seed", "", *_NAMES, "recall@100", "AUC"), rows, texts=2)
    page.text(
        "How much there is to find: the same purchases ranked by rankers that know the shop's truth, the last one what "
        "no log tells in full."
    )
    rows = [
        (one["seed"], name, *(_limits(of[figure]["value"], of[figure]["interval"]) for figure in _NAMES))
        for one in results["ceilings"] for name, of in one["rankers"].items()
    ]  # fmt: skip
    page.table(("seed", "knows", *_NAMES), rows, texts=2)
    unseen = first["unseen"]
    page.text(
        f"By kind of query, recall@100 over all items, {unseen['queries']:,} queries of meanings that the log never "
        "asks for: `gap` shares no word with any right title, `partial` some, `typo` is misspelt."
    )
    kinds = unseen["slices"]["kind"]
    rows = [
        (label, *(_with_interval(part, label, "recall@100") for part in (*kinds.values(), unseen)))
        for label in PAPER_TABLE_2
    ]  # fmt: skip
    page.table(("", *(f"{kind} ({kinds[kind]['queries']})" for kind in kinds), "all"), rows)


def _topology(page: Report, results: Result) -> None:
    page.heading("Figure 5: item embeddings")
    result = results["topology"]
    page.figure(
        "topology",
        f"t-SNE of DPSR's embeddings of {len(result['points']):,} items, the most popular of the "
        f"{len(result['category'])} most popular types of product; colors and markers are categories",
        plots.topology(result),
    )
    page.text(
        f"All {results['projector']['items']:,} embeddings are in `projector/` for TensorBoard's embedding projector: "
        f"`tensorboard --logdir=projector`."
    )


def _polysemy(page: Report, results: Result) -> None:
    page.heading("Figure 6: queries with several meanings, one head and two")
    examples = results["examples"]
    page.figure(
        "polysemy",
        "t-SNE of item embeddings, and the first 20 items that each head finds, for the two most frequent polysemous "
        "queries",
        plots.polysemy(examples),
    )
    rows = [
        (query["query"], label, head + 1, title, meaning)
        for query in examples["queries"]
        for label, of in query["models"].items()
        for head, items in enumerate(of["found"])
        for title, meaning in items[:3]
    ]
    page.table(("query", "model", "head", "found", "means"), rows, texts=5)
    page.text(
        "All polysemous queries of each shop. senses@10: of a query's meanings, the share with an item among the "
        "first 10. recall@100: of the right items, the share among the first 100 (of 100 where there are more). A "
        "homonym is a word that users, but no title, have for two types of product. Models of this section score in "
        "training as retrieval does, by the nearest head (β 0), and without unclicked items."
    )
    rows = []
    for shop in results["polysemy"]:
        for group, one in shop["groups"].items():
            for column, figure in enumerate(shop["figures"]):
                cells = [
                    _limits(one[label]["value"][column], one[label]["interval"][column])
                    for label in ("1 head", "2 heads")
                ]
                difference = one["difference"]
                cells.append(_limits(difference["value"][column], difference["interval"][column], "+.3f"))
                rows.append((shop["seed"], f"{group} ({one['queries']})", figure, *cells))
    page.table(("seed", "queries", "figure", "1 head", "2 heads", "difference"), rows, texts=3)
    page.text(
        "The same by d: the fewer dimensions, the less room between two meanings for one vector that is near both."
    )
    rows = []
    for shop in results["polysemy"]:
        for dim, groups in sorted(shop["widths"].items(), key=lambda item: int(item[0])):
            for group in _ASKED.keys() & groups.keys():
                one = groups[group]
                for column, figure in enumerate(shop["figures"]):
                    cells = [
                        _limits(one[label]["value"][column], one[label]["interval"][column], form)
                        for label, form in (("1 head", ".3f"), ("2 heads", ".3f"), ("difference", "+.3f"))
                    ]
                    rows.append((shop["seed"], f"{_ASKED[group]} ({one['queries']})", figure, dim, *cells))
    rows.sort(key=lambda row: (row[0], row[1], row[2]))
    page.table(("seed", "queries", "figure", "d", "1 head", "2 heads", "difference"), rows, texts=3)


def _mixing(page: Report, results: Result) -> None:
    page.heading("Figure 7: the share of random negatives")
    page.text("DPSR with the paper's hinge loss, 64 random negatives and those of the batch.")
    first = results["mixing"][0]
    panels = {
        "popularity of the first 10 (percentile)": ("purchases", "popularity@10"),
        "top-10, what users bought": ("purchases", "top-10"),
        "recall@100, unseen queries": ("unseen", "recall@100"),
    }
    names = [f"{alpha:g}" for alpha in first["alpha"]]
    figures: dict[str, Any] = {}
    for title, (measured, figure) in panels.items():
        values = [first[measured]["systems"][name][figure] for name in names]
        intervals = [first[measured]["intervals"][name].get(figure) for name in names]
        figures[title] = {"value": values, "interval": None if None in intervals else intervals}
    page.figure(
        "mixing",
        "α against popularity and relevance of what DPSR finds",
        plots.mixing({"alpha": first["alpha"], "figures": figures}),
    )
    rows = []
    for shop in results["mixing"]:
        for name in (f"{alpha:g}" for alpha in shop["alpha"]):
            bought, unseen = shop["purchases"], shop["unseen"]
            popular = [f"{one['systems'][name]['popularity@10']:.3f}" for one in (bought, unseen)]
            cells = [_with_interval(bought, name, "top-1"), _with_interval(bought, name, "top-10")]
            rows.append((shop["seed"], name, *popular, *cells, _with_interval(unseen, name, "recall@100")))
    page.table(
        ("seed", "α", "popularity@10", "the same, unseen queries", "top-1", "top-10", "recall@100, unseen queries"),
        rows,
        texts=2,
    )


def _cases(page: Report, results: Result) -> None:
    page.heading("Table 1: good cases, and as many failures")
    cases = results["cases"]
    page.text(
        "Picked by rule, not by hand, from the queries that the log does not hold. Good: the first item is right, "
        "and its title shares no token with the query, or the query is misspelt; drawn by chance. Failure: the first "
        "item is wrong; shown are those whose first right item stands last."
    )
    names = {"gap": "all words are synonyms", "typo": "misspelt"}
    page.table(
        ("queries", "asked", "good", "first item wrong"),
        [(names[kind], of["queries"], of["good"], of["bad"]) for kind, of in cases.items()],
    )
    for title, key, columns in (
        ("Good cases", "good_cases", ("query", "first item")),
        ("Failures", "bad_cases", ("query", "first item, wrong", "first right item", "its rank")),
    ):
        page.heading(title, 3)
        rows = []
        for of in cases.values():
            for case in of[key]:
                query = f"{case['query']} ({case['means']})" if case["means"] else case["query"]
                more = (case["right"], case["rank"]) if key == "bad_cases" else ()
                rows.append((query, case["item"], *more))
        page.table(columns, rows, texts=3)


def _efficiency(page: Report, results: Result) -> None:
    page.heading("Tables 5 and 6: index and serving")
    result = results.get("efficiency") or {}
    index, serving = result.get("index"), result.get("serving")
    if index:
        page.text(
            f"`benchmarks/index.py`: clustered vectors of 64 dimensions, top 1,000, {_machine(index)}. Latency is of "
            "one query at a time on one thread, QPS on all cores; a latency says nothing without the recall beside "
            "it. The paper (15 million items, recall not stated): built in 3,453 s, 9.92 ms, 100 QPS on 64 CPU cores."
        )
        rows = []
        for workload, one in _by_workload(index).items():
            if "ann_recall@1000" in one:
                cores = index["hardware"]["cores"]
                rows.append((workload, *(f"{one[name]:.3f}" for name in ("ann_recall@1000", "p50", "p99", "core_ms")),
                             f"{one['wall_qps']:,.0f}", f"{one['wall_qps'] / cores:,.0f}"))  # fmt: skip
        built = {row["impl"]: row["value"] for row in index["rows"] if row["metric"] == "build_wall"}
        page.text("Built: " + ", ".join(f"{name} in {seconds:.1f} s" for name, seconds in built.items()) + ".")
        page.table(
            ("index, search parameters", "ann_recall@1000", "p50 ms", "p99 ms", "core ms", "QPS", "QPS per core"), rows
        )
    if serving:
        page.text(
            "`benchmarks/model_server.py`: from query text to items, on the servable of DPSR above "
            f"({results['shop']['items']:,} items), our model server, {_machine(serving)}, which the load generator "
            "shares. Core time is the server's, a request; QPS per core is its inverse. The paper: 4,000 QPS at 20 "
            "ms on 64 CPU cores."
        )
        rows = []
        for row in serving["rows"]:
            if row["impl"] == "dpsr" and row["workload"].startswith("fused") and row["metric"].endswith("_qps"):
                load = row["metric"].removesuffix("_qps")
                of = {
                    r["metric"]: r["value"]
                    for r in serving["rows"]
                    if r["impl"] == "dpsr" and r["workload"] == row["workload"]
                }
                cpu = of.get(f"{load}_cpu")
                cells = [f"{of[name]:,.2f}" if name in of else "" for name in (f"{load}_p50", f"{load}_p99")]
                per_core = f"{1e6 / cpu:,.0f}" if cpu else ""
                rows.append(
                    (load.replace("_", " "), f"{row['value']:,.0f}", *cells, f"{cpu:,.0f}" if cpu else "", per_core)
                )
        page.table(("load", "QPS", "p50 ms", "p99 ms", "core µs a request", "QPS per core"), rows)
    if not index and not serving:
        page.text("Left out: the benchmarks are part of a checkout, and not asked for at this size.")


def _machine(benchmark: Mapping[str, Any]) -> str:
    return f"{benchmark['hardware']['cpu']}, {benchmark['hardware']['cores']} cores"


def _by_workload(benchmark: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for row in benchmark["rows"]:
        found.setdefault(f"{row['impl']}, {row['workload']}", {})[row["metric"]] = row["value"]
    return found


_DATA_SETS = {
    "homedepot": ("Home Depot", ("recall@10", "recall@100", "recall@1000", "mrr@10")),
    "movielens": ("MovieLens 100K: genres as queries, the last tenth held out", ("recall@10", "recall@100", "ndcg@10")),
    "qbqtc": ("QBQTC: relevance of titles", ("auc", "recall@10", "recall@100")),
}


def _data_set(page: Report, name: str, of: Mapping[str, Any]) -> None:
    title, figures = _DATA_SETS[name]
    page.heading(title)
    for fold, table in of.items():
        page.text(f"{fold}: {table['queries']:,} queries, {table['items']:,} items.")
        rows = [(label, *(_with_interval(table, label, figure) for figure in figures)) for label in table["systems"]]
        page.table(("", *figures), rows)


def _ablations(page: Report, results: Mapping[str, Any]) -> None:
    page.heading("Ablations")
    page.text(
        "One thing of DPSR (`dpsr_tf/configs/dpsr.yaml` with this report's steps, batch and learning rate) is changed "
        "at a time. A difference is from the first line of its table over the same queries, with its interval; of "
        "twenty that do not differ, one interval leaves out 0 by chance. Purchases of seen queries, and queries that "
        "the log does not hold."
    )
    for group, measured in results.items():
        bought, unseen = measured["purchases"], measured["unseen"]
        page.heading(group, 3)
        rows = []
        for label in bought["systems"]:
            cells = []
            for table, figure in ((bought, "top-10"), (unseen, "top-10"), (unseen, "recall@100")):
                compared = [one for one in table["comparisons"] if one["system"] == label]
                cells.append(f"{table['systems'][label][figure]:.3f}")
                if compared:
                    one = compared[0]["figures"][figure]
                    cells[-1] += f" ({one['difference']:+.3f}, {one['interval'][0]:+.3f} to {one['interval'][1]:+.3f})"
            typo = unseen["slices"]["kind"].get("typo")
            cells.append(_with_interval(typo, label, "recall@100") if typo else "")
            cells.append(f"{unseen['systems'][label]['auc']:.3f}")
            cells.append(f"{bought['systems'][label]['popularity@100']:.3f}")
            rows.append((label, *cells))
        columns = (
            "top-10, purchases",
            "top-10, unseen",
            "recall@100, unseen",
            "recall@100, misspelt",
            "AUC, unseen",
            "popularity@100",
        )
        page.table(("", *columns), rows)


def _files(page: Report, results: Result) -> None:
    page.heading("Files")
    page.text(
        "`report.json` has every figure; `runs/` each experiment with its definition, log and result; `plots/` the "
        f"figures. The experiments took {results['seconds'] / 60:.0f} minutes, taken one after the other. "
        "docs/report.md tells how to run them again."
    )


def _with_interval(table: Mapping[str, Any], label: str, figure: str) -> str:
    value = table["systems"][label].get(figure)
    return "" if value is None else _limits(value, table["intervals"][label].get(figure))


def _limits(value: float, interval: Sequence[float] | None, form: str = ".3f") -> str:
    text = format(value, form)
    return text if interval is None else f"{text} ({interval[0]:{form}} to {interval[1]:{form}})"


def _escaped(cell: object) -> str:
    text = str(cell)
    return text.replace("|", "\\|").replace("<", "&lt;") if isinstance(cell, str) else text
