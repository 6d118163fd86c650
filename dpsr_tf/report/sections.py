"""The text of the report: turns results into Markdown and figures. It runs no experiment."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from dpsr_tf.report import plots
from dpsr_tf.report.benchmarks import BENCHMARKS, bar_rows, shown
from dpsr_tf.report.online import FIGURES, GRADES, TAIL
from dpsr_tf.report.runner import Result
from dpsr_tf.report.shop import TUNED_BM25

# Table 2 of the paper: top-1, top-10, AUC, time. Measured on 15 million items of JD.com with 48 cores.
PAPER_TABLE_2 = {
    "BM25": (0.718, 0.947, 0.661, "61 s"),
    "BM25-u&b": (0.721, 0.948, 0.661, "157 s"),
    "DSSM": (0.002, 0.016, 0.524, "20 ms"),
    "DPSR": (0.839, 0.979, 0.696, "20 ms"),
    "DPSR-p": (0.868, 0.984, 0.692, "20 ms"),
    "DPSR-h": (0.889, 0.998, 0.685, "20 ms"),
}
# The methods of Table 2 here. "BM25, tuned" and "DSSM, our start" are not in the paper.
METHODS = ("BM25", "BM25-u&b", "BM25, tuned", "DSSM", "DSSM, our start", "DPSR", "DPSR-p", "DPSR-h")
# The orders of neighbours in the paper's Table 2, worse before better, by top-k and by AUC; and where the figure is
# measured here.
_TOP_K_ORDERS = tuple(itertools.pairwise(("DSSM", "BM25", "BM25-u&b", "DPSR", "DPSR-p", "DPSR-h")))
_PAPER_ORDERS = {
    ("purchases", "top-1"): _TOP_K_ORDERS,
    ("purchases", "top-10"): _TOP_K_ORDERS,
    ("labels", "auc"): tuple(itertools.pairwise(("DSSM", "BM25", "DPSR-h", "DPSR-p", "DPSR"))),
}
# The orders by top-k that the paper finds, by what they are checked on here. DPSR-p and DPSR-h use the user, so they
# are checked on purchases, where the user is known.
ORDERS = {"unseen": ("DSSM", "BM25"), "purchases": ("BM25", "DPSR", "DPSR-p", "DPSR-h")}
_NAMES = ("top-1", "top-10")
_QUERY_GROUPS = {"homonyms": "homonyms", "all": "all polysemous queries"}
_MEASURED_ON = {
    "unseen": "queries that are not in the log",
    "purchases": "purchases",
    "labels": "graded pairs",
}
# What Table 2 shows for each shop.
_BY_SHOP = (
    ("purchases", "top-1"),
    ("purchases", "top-10"),
    ("labels", "auc"),
    ("unseen", "top-1"),
    ("unseen", "recall@100"),
    ("unseen", "mrr@10"),
)
_GROUPS = {"all": "all", "tail": "long tail"}
_LANGUAGES = {"en": "English", "zh": "Chinese"}
# How the rankers of ceilings.py are shown.
_KNOWLEDGE = {
    "what the query means": "the meaning of the query",
    "and the profile": "the meaning and the user's profile",
    "and the taste": "the meaning, the profile and the user's taste",
}


class Report:
    """A page of Markdown, the figures that it names, and by name the tables that pages of docs/ show."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.figures: dict[str, Figure] = {}
        self.tables: dict[str, list[str]] = {}

    def heading(self, text: str, level: int = 2) -> None:
        """Adds a heading."""
        self.lines += ["", "#" * level + f" {text}", ""]

    def text(self, *paragraphs: str) -> None:
        """Adds paragraphs of Markdown."""
        for paragraph in paragraphs:
            self.lines += [paragraph, ""]

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[object]], texts: int = 1, name: str | None = None
    ) -> None:
        """Adds a table. The first `texts` columns are aligned to the left, the others, numbers, to the right."""
        if not rows:
            self.text("None.")
            return
        marks = [":--" if column < texts else "--:" for column in range(len(columns))]
        cells_of_rows = [columns, marks] + [list(map(_escaped, row)) for row in rows]
        lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in cells_of_rows]
        if name is not None:
            self.tables[name] = lines
        self.lines += [*lines, ""]

    def figure(self, name: str, caption: str, figure: Figure) -> None:
        """Adds a figure, which is shown as `plots/NAME.svg`."""
        self.figures[name] = figure
        self.lines += [f"![{caption}](plots/{name}.svg)", "", f"*{caption}*", ""]

    @property
    def markdown(self) -> str:
        """The text of the page."""
        return "\n".join(self.lines).strip() + "\n"


def report(results: Result) -> Report:
    """Returns the report of the results that report.json holds: experiments.run, and what the command adds."""
    page = Report()
    hardware = results["hardware"]
    page.heading("DPSR: experiments and benchmarks", 1)
    page.text(
        f"Mode {results['mode']}, seed {results['seed']}, {hardware['cpu']}, {hardware['cores']} cores, "
        f"{hardware['memory_gib']:g} GiB, {hardware['system']}, DPSR {results['versions']['dpsr']}, TensorFlow "
        f"{results['versions']['tensorflow']}. Intervals are 95 % bootstrap intervals over the queries. The same seed "
        "on the same machine gives the same figures, except times and rates.",
    )
    if "table2" in results:
        _experiments(page, results)
    if "benchmarks" in results:
        _benchmarks(page, results["benchmarks"], results["mode"])
    _files(page, results)
    return page


def _experiments(page: Report, results: Result) -> None:
    """Adds what experiments.run has found."""
    counts = results["shop"]
    page.text(
        "The experiments of section 6 of *Towards Personalized and Semantic Retrieval* (SIGIR 2020), on data that "
        f"anyone can generate: a shop of {counts['items']:,} items, {counts['users']:,} users and "
        f"{counts['interactions']:,} clicks, whose right answers are known. The queries, users and items are not those "
        "of JD.com. Compare the order of the methods with the paper's, not the figures.",
    )
    _claims(page, results)
    _table_2(page, results)
    _topology(page, results)
    _polysemy(page, results)
    _mixing(page, results)
    _cases(page, results)
    _online(page, results["online"])
    for name, folds in results.get("data", {}).items():
        _data_set(page, name, folds)
    if "ablations" in results:
        _ablations(page, results["ablations"])
        _training_claims(page, results["claims"])


def bars(results: Result) -> dict[str, float]:
    """Returns flat figures to compare runs by: those of the first shop, and how often shops keep the paper's order."""
    result: dict[str, float] = {}
    if "table2" not in results:
        return result
    first = results["table2"][0]
    for label in METHODS:
        key = label.lower().replace("&", "").replace(",", "").replace("-", "_").replace(" ", "_")
        for figure in ("top-1", "top-10"):
            result[f"{figure}_{key}".replace("-", "_")] = first["purchases"]["systems"][label][figure]
        result[f"auc_{key}"] = first["labels"]["systems"][label]["auc"]
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
    """Returns whether the systems are in this order, and whether the intervals of neighbours do not overlap."""
    values = [table["systems"][label][figure] for label in order]
    limits = [table["intervals"][label][figure] for label in order]
    rising = all(low < high for low, high in itertools.pairwise(values))
    return rising, all(low[1] < high[0] for low, high in itertools.pairwise(limits))


def _rise(one: Mapping[str, Any]) -> float:
    """Returns how much the popularity of the retrieved items grows from the smallest to the largest alpha."""
    ends = [one["purchases"]["systems"][f"{alpha:g}"]["popularity@10"] for alpha in (one["alpha"][0], one["alpha"][-1])]
    return float(ends[1] - ends[0])


def _claims(page: Report, results: Result) -> None:
    page.heading("Claims of the paper and results here")
    rows: list[Sequence[object]] = []
    for table, poly, mixed in zip(results["table2"], results["polysemy"], results["mixing"], strict=True):
        seed = table["seed"]
        for measured, order in ORDERS.items():
            for figure in _NAMES:
                kept, apart = _order(table[measured], order, figure)
                values = " < ".join(f"{table[measured]['systems'][label][figure]:.3f}" for label in order)
                claim = f"{figure}, {_MEASURED_ON[measured]}: {' < '.join(order)}"
                verdict = "yes, intervals do not overlap" if apart else "yes" if kept else "**no**"
                rows.append((claim, seed, values, verdict))
        for dim, groups in poly["widths"].items():
            for group in ("homonyms", "all"):
                if group in groups:
                    gain = groups[group]["difference"]
                    low, high = gain["interval"][0]
                    values = f"{gain['value'][0]:+.3f} ({low:+.3f} to {high:+.3f})"
                    claim = f"two heads find more meanings than one, d {dim}, {_QUERY_GROUPS[group]}"
                    rows.append((claim, seed, values, _verdict(low, high)))
        rise = _rise(mixed)
        claim = f"retrieved items get more popular from α {mixed['alpha'][0]:g} to {mixed['alpha'][-1]:g}"
        rows.append((claim, seed, f"{rise:+.3f}", "yes" if rise > 0 else "**no**"))
    rows.sort(key=lambda row: str(row[0]))
    page.table(("claim", "seed", "result", "holds"), rows, texts=4)


def _verdict(low: float, high: float) -> str:
    return "yes, interval above 0" if low > 0 else "**no**" if high < 0 else "undecided, interval contains 0"


def _table_2(page: Report, results: Result) -> None:
    page.heading("Table 2: methods")
    first = results["table2"][0]
    bought, graded = first["purchases"], first["labels"]
    page.text(
        "**Top-k** is the probability that a relevant item ranks within the first k among 1,023 items that are not "
        f"relevant. Relevant is what a user bought after the end of the log ({bought['queries']:,} purchases). DPSR-p "
        "and DPSR-h are told who the user is.",
        f"**AUC** is measured on the graded pairs of {graded['queries']:,} queries. Simulated humans, who make "
        "errors, gave the grades. Each query is asked by a random user of the shop, with the history that the log ends "
        "with, because DPSR-p and DPSR-h are trained to read a user.",
        f"**Time** is the median time of one query for its first 1,000 of {bought['items']:,} items by exact search on "
        "this machine.",
        "The paper's columns were measured on JD.com's log with 15 million items and are shown for orientation. All "
        "DPSR models here have the same training: softmax with log Q correction over the batch, 512 random items and 4 "
        "unclicked items. Figure 7 uses the paper's hinge loss.",
        "DSSM has the layers and item features of DPSR. Its authors start all weights at random; `DSSM, our start` "
        "starts as DPSR does, with texts that share words near each other. `BM25, tuned` is the best BM25 found on the "
        f"dev queries of another shop, `--system=bm25:{TUNED_BM25}`.",
    )
    rows = []
    for label in [*METHODS, "popularity"]:
        paper = PAPER_TABLE_2.get(label, ("", "", "", ""))
        time = f"{first['times']['systems'][label]['latency_ms_p50']:.2f} ms"
        cells = [_with_interval(bought, label, "top-1"), _with_interval(bought, label, "top-10")]
        cells += [_with_interval(graded, label, "auc"), time]
        rows.append((label, *cells, *(f"{x:.3f}" if isinstance(x, float) else x for x in paper)))
    names = ("top-1", "top-10", "AUC", "time")
    page.table(("method", *names, *(f"paper: {name}" for name in names)), rows)
    groups = {
        figure: [(label, bought["systems"][label][figure], bought["intervals"][label][figure]) for label in METHODS]
        for figure in _NAMES
    }
    page.figure("table2", "Top-1 and top-10 on purchases, with intervals", plots.bars(groups, ""))
    page.text(*_orders_of_the_paper(results["table2"]))
    _table_2_by_shop(page, results)
    _unseen_by_kind(page, first["unseen"])


def _orders_of_the_paper(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns paragraphs that say which orders of the paper's Table 2 hold on the generated shops, and which do not."""
    verdicts: dict[str, list[str]] = {"clearly": [], "values": [], "not": []}
    for (measured, figure), orders in _PAPER_ORDERS.items():
        for order in orders:
            found = [_order(table[measured], order, figure) for table in tables]
            claim = f"{' < '.join(order)} by {'AUC' if figure == 'auc' else figure}"
            if all(apart for _, apart in found):
                verdicts["clearly"].append(claim)
            elif all(kept for kept, _ in found):
                verdicts["values"].append(claim)
            else:
                verdicts["not"].append(f"{claim} (holds on {sum(kept for kept, _ in found)} of {len(tables)})")
    where = f"{len(tables)} shops" if len(tables) > 1 else "the shop"
    said = {
        "clearly": f"**These orders of the paper's Table 2 hold on {where}, and the intervals do not overlap:**",
        "values": f"**These hold on {where}, but intervals overlap, so a part may be chance:**",
        "not": f"**These do not hold on {where}:**",
    }
    return [f"{said[key]} {'; '.join(claims) or 'none'}." for key, claims in verdicts.items()]


def _table_2_by_shop(page: Report, results: Result) -> None:
    """Table 2 of each generated shop, and what rankers reach that know the shop's truth."""
    tables = results["table2"]
    seeds = _seeds(tables)
    page.text("The same figures for each generated shop, and those of queries that are not in the log:")
    for measured, figure in _BY_SHOP:
        rows = [
            (label, *(_with_interval(table[measured], label, figure) for table in tables))
            for label in (*METHODS, "popularity")
        ]
        page.table((f"{figure}, {_MEASURED_ON[measured]}", *seeds), rows, name=f"{figure}, {measured}")
    page.text(
        "Upper limits: the same purchases, ranked with knowledge of how the shop was generated. No model can know the "
        "user's taste in full, because no log shows all of it."
    )
    rows = [
        (_KNOWLEDGE[name], figure, *(
            _limits(one["rankers"][name][figure]["value"], one["rankers"][name][figure]["interval"])
            for one in results["ceilings"]
        ))
        for figure in _NAMES for name in results["ceilings"][0]["rankers"]
    ]  # fmt: skip
    page.table(("the ranker knows", "figure", *seeds), rows, texts=2, name="upper limits")


def _unseen_by_kind(page: Report, unseen: Mapping[str, Any]) -> None:
    page.text(
        f"recall@100 over all items, for {unseen['queries']:,} queries whose meanings the log never asks for, by kind "
        "of query, with the number and share of each kind. A `gap` query shares no word with the titles of the "
        "relevant items, a `partial` query shares some, a `typo` query is misspelt."
    )
    kinds = unseen["slices"]["kind"]
    rows = [
        (label, *(_with_interval(part, label, "recall@100") for part in (*kinds.values(), unseen))) for label in METHODS
    ]
    asked = unseen["queries"]
    columns = (f"{kind} ({kinds[kind]['queries']}, {kinds[kind]['queries'] / asked:.0%})" for kind in kinds)
    page.table(("method", *columns, "all"), rows, name="kinds of query")
    page.text(
        "mrr@10 by language, of misspelt queries and of `plain` ones, which hold words of the titles. A Chinese query "
        "is misspelt by a character that sounds alike."
    )
    parts = unseen["slices"]["kind_and_language"]
    names = {f"{kind}, {code}": f"{kind}, {name}" for code, name in _LANGUAGES.items() for kind in ("plain", "typo")}
    names = {part: f"{name} ({parts[part]['queries']})" for part, name in names.items() if part in parts}
    rows = [(label, *(_with_interval(parts[part], label, "mrr@10") for part in names)) for label in METHODS]
    page.table(("method", *names.values()), rows, name="languages")


def _topology(page: Report, results: Result) -> None:
    page.heading("Figure 5: item embeddings")
    result = results["topology"]
    page.figure(
        "topology",
        f"t-SNE of DPSR's embeddings of {len(result['points']):,} items: the most popular items of the "
        f"{len(result['category'])} most popular types of product. Colors and markers show the category",
        plots.topology(result),
    )
    page.text(
        f"To look at all {results['projector']['items']:,} embeddings in TensorBoard's embedding projector, run "
        f"`tensorboard --logdir=projector`."
    )


def _polysemy(page: Report, results: Result) -> None:
    page.heading("Figure 6: queries with several meanings, with one head and with two")
    page.text(
        "The models of this section are scored in training as in retrieval, by the best head (β 0), and are trained "
        "without unclicked items."
    )
    _polysemy_examples(page, results["examples"])
    page.text(
        "All polysemous queries of each shop. **senses@10** is the share of a query's meanings that have an item among "
        "the first 10. **recall@100** is the share of the relevant items among the first 100 (if there are more than "
        "100, the share of 100). A **homonym** is a word that users, but no title, use for two types of product. "
        "**silhouette** says whether the items that a query may mean form clusters by type of product: 1 if each type "
        "is a cluster of its own, 0 if the types overlap."
    )
    page.text(
        "By the dimension d of the embeddings: with one head, with two, and in brackets the interval of the "
        "difference. With few dimensions there is little room for one vector that is close to two meanings."
    )
    shops = results["polysemy"]
    for column, figure in enumerate(shops[0]["figures"]):
        rows = [
            (
                _QUERY_GROUPS[group],
                f"{dim}",
                *(_one_and_two_heads(shop["widths"][dim].get(group), column) for shop in shops),
            )
            for group in _QUERY_GROUPS
            for dim in sorted(shops[0]["widths"], key=int)
        ]
        page.table((f"{figure}, queries", "d", *_seeds(shops)), rows, texts=2, name=f"heads: {figure}")


def _polysemy_examples(page: Report, examples: Result) -> None:
    page.figure(
        "polysemy",
        "t-SNE of item embeddings, and the first 20 items that each head finds, for the two most frequent polysemous "
        "queries",
        plots.polysemy(examples),
    )
    rows = [
        (query["query"], label, head + 1, title, meaning)
        for query in examples["queries"]
        for label, example in query["models"].items()
        for head, items in enumerate(example["found"])
        for title, meaning in items[:3]
    ]
    page.table(("query", "model", "head", "item found", "meaning of the item"), rows, texts=5)


def _one_and_two_heads(one: Mapping[str, Any] | None, column: int) -> str:
    """Returns the cell of one figure: with one head, with two, and the interval of the difference."""
    if one is None:
        return ""
    values = ", ".join(f"{one[label]['value'][column]:.3f}" for label in ("1 head", "2 heads"))
    low, high = one["difference"]["interval"][column]
    return f"{values} ({low:+.3f} to {high:+.3f})"


def _seeds(shops: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the heads of columns of generated shops."""
    return [f"seed {shop['seed']}" for shop in shops]


def _mixing(page: Report, results: Result) -> None:
    page.heading("Figure 7: the share of random negatives")
    page.text(
        "DPSR is trained with the paper's hinge loss, on 64 random negatives and the negatives of the batch. α is the "
        "share of random negatives in the mix."
    )
    first = results["mixing"][0]
    panels = {
        "popularity of the first 10 items (percentile)": ("purchases", "popularity@10"),
        "top-10, purchases": ("purchases", "top-10"),
        "recall@100, queries not in the log": ("unseen", "recall@100"),
    }
    names = [f"{alpha:g}" for alpha in first["alpha"]]
    figures: dict[str, Any] = {}
    for title, (measured, figure) in panels.items():
        values = [first[measured]["systems"][name][figure] for name in names]
        intervals = [first[measured]["intervals"][name].get(figure) for name in names]
        figures[title] = {"value": values, "interval": None if None in intervals else intervals}
    page.figure(
        "mixing",
        "Popularity and relevance of the retrieved items by α",
        plots.mixing({"alpha": first["alpha"], "figures": figures}),
    )
    rows = []
    for shop in results["mixing"]:
        for name in (f"{alpha:g}" for alpha in shop["alpha"]):
            bought, unseen = shop["purchases"], shop["unseen"]
            popular = [f"{one['systems'][name]['popularity@10']:.3f}" for one in (bought, unseen)]
            cells = [_with_interval(bought, name, figure) for figure in _NAMES]
            cells += [_with_interval(unseen, name, figure) for figure in ("top-1", "recall@100")]
            rows.append((shop["seed"], name, *popular, *cells))
    page.table(
        (
            "seed",
            "α",
            "popularity@10, purchases",
            "popularity@10, queries not in the log",
            "top-1, purchases",
            "top-10, purchases",
            "top-1, queries not in the log",
            "recall@100, queries not in the log",
        ),
        rows,
        texts=2,
        name="alpha",
    )


def _cases(page: Report, results: Result) -> None:
    page.heading("Table 1: good cases and failures")
    cases = results["cases"]
    page.text(
        "A rule picks the examples, not a person, from the queries that are not in the log. A good case is a query "
        "whose first item is relevant; either the title shares no token with the query, or the query is misspelt. The "
        "good cases shown are a random sample. A failure is a query whose first item is not relevant; shown are the "
        "failures in which the first relevant item has the worst rank."
    )
    names = {"gap": "all words are synonyms", "typo": "misspelt"}
    page.table(
        ("kind of query", "queries", "good cases", "first item not relevant"),
        [(names[kind], of["queries"], of["good"], of["bad"]) for kind, of in cases.items()],
    )
    for title, key, columns in (
        ("Good cases", "good_cases", ("query", "first item")),
        ("Failures", "bad_cases", ("query", "first item, not relevant", "first relevant item", "rank of that item")),
    ):
        page.heading(title, 3)
        rows = []
        for cases_of_kind in cases.values():
            for case in cases_of_kind[key]:
                query = f"{case['query']} ({case['means']})" if case["means"] else case["query"]
                more = (case["right"], case["rank"]) if key == "bad_cases" else ()
                rows.append((query, case["item"], *more))
        page.table(columns, rows, texts=3)


def _online(page: Report, results: Sequence[Mapping[str, Any]]) -> None:
    page.heading("Online tests, simulated")
    first = results[0]
    page.text(
        "JD.com's online tests need JD.com's users. This is a simulation with those of the generated shop: "
        f"{first['requests']:,} new requests, of which {first['tail_requests']:,} are in the long tail (the log has "
        f"fewer than {TAIL} requests with the query). The control is a word search (`bm25:{TUNED_BM25}`); a treatment "
        "unites its results with a model's by reciprocal ranks. Figures are changes against the control, with paired "
        "intervals. UCTR and UCVR are the chances that a user clicks and orders, GMV is the price of what is ordered, "
        "and QRR is the query rewrite rate: a user who clicks nothing asks again. AOP is the average position of what "
        "is ordered; it falls if orders come from higher places. docs/papers.md has the papers' figures.",
    )
    widest = {
        figure: max(
            abs(limit - changes[figure]["change"])
            for one in results for of_name in one["ab_test"].values() for changes in of_name.values()
            for limit in changes[figure]["interval"]
        )
        for figure in FIGURES
    }  # fmt: skip
    page.text(
        f"Changes in percent on {_and(_seeds(results))}. The 95 % intervals reach at most "
        + ", ".join(f"{100 * width:.1f} points ({figure})" for figure, width in widest.items())
        + " to one side."
    )
    rows = [
        (
            name,
            _GROUPS[group],
            *(
                ", ".join(f"{100 * one['ab_test'][group][name][figure]['change']:+.1f}" for one in results)
                for figure in FIGURES
            ),
        )
        for group, of_name in first["ab_test"].items()
        for name in of_name
    ]
    page.table(("treatment", "queries", *FIGURES), rows, texts=2, name="online tests")
    page.text(
        f"Raters: {first['rated']['queries']} queries of the long tail. The shop's truth grades the first 10 results: "
        "perfect has all that the query asks for, fair lacks one thing, bad is all else. Shares:"
    )
    rows = [
        (name, *(", ".join(f"{one['rated']['systems'][name][g]['share']:.3f}" for one in results) for g in GRADES))
        for name in first["rated"]["systems"]
    ]
    page.table(("system", *GRADES), rows, name="raters")


def _machine(benchmark: Mapping[str, Any]) -> str:
    return f"{benchmark['hardware']['cpu']}, {benchmark['hardware']['cores']} cores"


_DATA_SETS = {
    "homedepot": ("Home Depot", ("recall@10", "recall@100", "recall@1000", "mrr@10")),
    "movielens": (
        "MovieLens 100K: genres as queries, the last tenth of the log held out",
        ("recall@10", "recall@100", "ndcg@10"),
    ),
    "qbqtc": ("QBQTC: relevance of Chinese titles", ("auc", "recall@10", "recall@100")),
}


def _data_set(page: Report, name: str, folds: Mapping[str, Any]) -> None:
    title, figures = _DATA_SETS[name]
    page.heading(title)
    for fold, table in folds.items():
        page.text(f"{fold}: {table['queries']:,} queries, {table['items']:,} items.")
        rows = [(label, *(_with_interval(table, label, figure) for figure in figures)) for label in table["systems"]]
        page.table(("method", *figures), rows, name=f"{name}, {fold}")


def _ablations(page: Report, ablations: Mapping[str, Any]) -> None:
    page.heading("Ablations")
    page.text(
        "Each variant changes one part of DPSR (`dpsr_tf/configs/dpsr.yaml` with the steps, batch size and learning "
        "rate of this report). In brackets are the difference from the first row of a group, over the same queries, "
        "and its 95 % interval; even without any effect, one interval in twenty does not contain 0. The last three "
        "columns are measured on queries that are not in the log, and the misspelt ones among them."
    )
    rows = []
    for group, measured in ablations.items():
        bought, unseen = measured["purchases"], measured["unseen"]
        typo = unseen["slices"]["kind"].get("typo")
        for label in bought["systems"]:
            cells = [
                _compared(table["systems"][label], table["comparisons"], label, figure)
                for table, figure in ((bought, "top-1"), (unseen, "top-1"), (unseen, "recall@100"))
            ]
            rows.append((group, label, *cells, f"{typo['systems'][label]['top-1']:.3f}" if typo else ""))
    columns = ("top-1, purchases", "top-1, not in the log", "recall@100, not in the log", "top-1, misspelt")
    page.table(("group", "variant", *columns), rows, texts=2, name="ablations")


def _training_claims(page: Report, shops: Sequence[Mapping[str, Any]]) -> None:
    page.heading("Claims of section 4 about the training")
    page.text(
        "Each table compares ways to train the paper's model with its hinge loss, with the same batches and the same "
        "number of steps. Differences are from the first row of a shop, over the same queries. CPU times are those of "
        "one thread: of a training step, and of embedding one query. senses@10 is measured on homonyms."
    )
    for group in (name for name in shops[0]["groups"] if name != "steps"):
        page.heading(group, 3)
        rows = []
        for shop in shops:
            measured = shop["groups"].get(group)
            if measured is None:
                continue
            for name, one in measured["variants"].items():
                last = list(one["by_step"].values())[-1]
                cells = [
                    _compared(last[on], measured["comparisons"][on], name, "top-1") for on in ("purchases", "unseen")
                ]
                costs = (f"{one['parameters']:,}", f"{one['step_ms']:.2f}", f"{one['query_ms']:.2f}")
                rows.append((shop["seed"], name, *cells, f"{one['senses@10']:.3f}", *costs))
        columns = ("top-1, purchases", "top-1, not in the log", "senses@10", "weights", "ms a step", "ms a query")
        page.table(("seed", "variant", *columns), rows, texts=2, name=f"claim: {group}")
    page.heading("Batch negatives and random ones, by steps", 3)
    page.text("α is the share of random negatives. Top-1 of purchases, and of queries that are not in the log:")
    rows = [
        (shop["seed"], name, *(
            f"{of['purchases']['top-1']:.3f}, {of['unseen']['top-1']:.3f}" for of in one["by_step"].values()
        ))
        for shop in shops for name, one in shop["groups"]["steps"]["variants"].items()
    ]  # fmt: skip
    marks = next(iter(shops[0]["groups"]["steps"]["variants"].values()))["by_step"]
    after = (f"{int(step):,} steps" for step in marks)
    page.table(("seed", "variant", *after), rows, texts=2, name="claim: steps")
    page.heading("Items that answer the query", 3)
    page.text(
        "Computed from the whole log and the truth: the chance that an item answers the query of a click. It is the "
        "item of that click, the item of another click (a batch negative), or an item drawn uniformly (a random "
        "negative). The third column is the chance that somebody clicked a batch negative for the query."
    )
    names = ("click", "batch", "clicked", "random")
    rows = [(one["seed"], *(f"{one['chance'][name]:.2%}" for name in names)) for one in shops]
    chances = ("clicked item", "batch negative", "batch negative was clicked for the query", "random negative")
    page.table(("seed", *chances), rows, name="claim: chance")


def _compared(figures: Mapping[str, float], comparisons: Sequence[Mapping[str, Any]], name: str, figure: str) -> str:
    """Returns the cell of a variant's figure, with its difference from the first variant."""
    cell = f"{figures[figure]:.3f}"
    for one in comparisons:
        if one["system"] == name:
            low, high = one["figures"][figure]["interval"]
            cell += f" ({one['figures'][figure]['difference']:+.3f}, {low:+.3f} to {high:+.3f})"
    return cell


def _benchmarks(page: Report, measured: Mapping[str, Any], mode: str) -> None:
    page.heading("The whole system")
    page.text(
        "The scripts in `benchmarks/` measure each part. Their bars are figures that are held to an aim."
        + (" This is quick mode: it shows that they run, and its figures mean nothing." if mode == "quick" else "")
    )
    done = {name: one for name, one in measured.items() if "bars" in one}
    rows = [(BENCHMARKS[name].title, *cells) for name, one in done.items() for cells in bar_rows(name, one["bars"])]
    page.table(("part", "bar", "aim", "measured", "met"), [row for row in rows if row[2]], texts=3)
    for name, one in measured.items():
        page.heading(BENCHMARKS[name].title)
        page.text(f"{BENCHMARKS[name].text} docs/{BENCHMARKS[name].page} says more.")
        if name in done:
            _benchmark(page, name, one)
        else:
            page.text(f"Not run: the folder of the data sets has no {', '.join(one['missing'])}. Give --data.")


def _benchmark(page: Report, name: str, one: Mapping[str, Any]) -> None:
    """Adds the bars of a benchmark, the figures of the papers, and all of its rows."""
    page.text(f"`{one['command']}`, {one['date']}, {_machine(one)}, seed {one['seed']}.")
    page.table(("bar", "aim", "measured", "met"), bar_rows(name, one["bars"]), texts=2)
    if BENCHMARKS[name].papers:
        page.text("Figures of the papers:")
        page.table(("figure", "paper", "setting"), BENCHMARKS[name].papers, texts=3)
    of_workload: dict[str, dict[str, dict[str, str]]] = {}
    for row in one["rows"]:
        cell = shown(row["value"]) + (f" {row['unit']}" if row["unit"] else "")
        if "interval" in row:
            cell += " ({} to {})".format(*map(shown, row["interval"]))
        of_workload.setdefault(row["workload"], {}).setdefault(row["impl"], {})[row["metric"]] = cell
    for workload, of_impl in of_workload.items():
        metrics = list(dict.fromkeys(metric for cells in of_impl.values() for metric in cells))
        page.heading(workload, 3)
        page.table(("", *metrics), [(impl, *(cells.get(m, "") for m in metrics)) for impl, cells in of_impl.items()])


def _files(page: Report, results: Result) -> None:
    page.heading("Files")
    page.text(
        "`report.json` holds every figure, `plots/` the figures as SVG, and `runs/` the definition, log and result of "
        f"each experiment. The experiments took {results['seconds'] / 60:.0f} minutes in total, if they are counted "
        "one after the other. docs/report.md says how to run them again."
    )


def _and(words: Sequence[str]) -> str:
    """Returns "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _with_interval(table: Mapping[str, Any], label: str, figure: str) -> str:
    """Returns the cell of a system's figure, "" if the system does not have it."""
    value = table["systems"][label].get(figure)
    return "" if value is None else _limits(value, table["intervals"][label].get(figure))


def _limits(value: float, interval: Sequence[float] | None, form: str = ".3f") -> str:
    text = format(value, form)
    return text if interval is None else f"{text} ({interval[0]:{form}} to {interval[1]:{form}})"


def _escaped(cell: object) -> str:
    text = str(cell)
    return text.replace("|", "\\|").replace("<", "&lt;") if isinstance(cell, str) else text
