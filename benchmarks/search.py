"""Measures search as a whole: the quality of recall and coarse ranking, and with all stages the speed and the failures.

    python benchmarks/search.py [--data=DIR] [--parts=quality,speed] [--out=DIR] [--full] --json

Quality (this file) is that of the stages themselves, in one process: the inverted index, exact search over the
embeddings of a model, fusion as the gateway does it. Each source is asked for 300 items.

- homedepot: the folds dev and misspelt_dev as typed. The model is that of dpsr_tf/configs/homedepot.yaml, trained on
  the train fold. `hybrid_two` has a second model, whose embeddings have 384 numbers in place of 256.
- shop: a generated shop, judged on its test fold, by kind of query. The model is that of configs/shop.yaml.
- esci150, icecat135: catalogues without clicks. The model is that of configs/catalogue.yaml, of titles, brands and
  categories alone; the inverted index also reads bullet points and colours (ESCI), the texts of attributes (Icecat).

Systems: `bm25` (plain BM25 of the model's texts, as a reference), `inverted` and `semantic` (the single sources),
`hybrid_ranks` (reciprocal ranks), `hybrid_learned`, with a rewriter `hybrid_rewritten` (Home Depot and the shop, whose
clicks a rewriter needs; configs/rewriter.yaml), with a ranker `hybrid_ranker` (the shop, whose log a ranker needs; the
first 200 items are ranked). `hybrid` in the names of bars is `hybrid_learned`, on Home Depot `hybrid_two`, and
`hybrid_rewritten` adds the items of the rewrites to it.

A learned fusion never judges a query that it has learned from. The shop's is learned on its dev fold. The others have
five folds by query: each is judged with the weights and the cut-off that the other four have taught; Home Depot's two
dev folds teach together. The analysis of each inverted index was chosen on these dev queries, as the settings of the
models were; among the analyses in `--full`, recall@100 differs by 0.03 at most on ESCI and Icecat.

`cut_off` rows: what the learned cut-off does on queries that it has not learned from. `kept` is the share of the
relevant items found that stay, `length` the mean number of items that stay, `emptied` the share of queries of which
nothing stays, `emptied_nonsense` that of 100 of the queries whose letters are shuffled, which have no answer.

Intervals are 95 % by bootstrap over queries; those of differences are paired.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import report
import yaml
from absl import app, flags

from dpsr_export import inverted_index
from dpsr_serving.gateway.fusion import LearnedFusion, RankFusion, learn
from dpsr_serving.gateway.inverted import Found, InvertedIndex, open_inverted_index
from dpsr_tf.config import CONFIGS
from dpsr_tf.data.ranking_features import RankingFeatures
from dpsr_tf.data.store import RowsById, Store
from dpsr_tf.evaluation import metrics
from dpsr_tf.evaluation.corpus import Corpus
from dpsr_tf.evaluation.judgments import Judgments
from dpsr_tf.evaluation.retriever import Retriever
from dpsr_tf.evaluation.systems import Systems
from dpsr_tf.models.encoders import exact_search
from dpsr_tf.models.ranker_scores import ranker_scores

PARTS = ("quality", "speed")
DEPTH, SIZE, RANKED = 300, 500, 200
FOLDS, SAMPLES, KEEP = 5, 1000, 0.99
FIGURES = ("recall@10", "recall@100", "ndcg@10")
SHOP = ("--items=10000", "--users=1500", "--interactions=60000")
REWRITER_STEPS = {"homedepot": 4500, "shop": 1000}
# The analyses that were compared on the dev queries; the first one of each data set is used.
ANALYSES = {
    "homedepot": ("stem+typos=0.2", "stem+trigrams=0.3", "stem", ""),
    "shop": ("stem+typos=0.2",),
    "esci150": (
        "stem+title=1+brand=0.5+category=0.5+bullet_points=0.2+color=0.2+typos=0.2",
        "stem+typos=0.2",
        "stem+title=1+brand=0.3+category=0.3+trigrams=0.2",
        "stem",
    ),
    "icecat135": (
        "stem+title=1+brand=0.5+details=0.5+typos=0.2",
        "stem+typos=0.2",
        "stem+title=1+trigrams=0.1",
        "stem+title=1+brand=1",
    ),
}

Lists = list[dict[str, Found]]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A data set that is ready to be searched.

    Attributes:
        name: of the data set.
        store: its items.
        index: the inverted index.
        models: source -> directory of a model.
        folds: name of a fold -> its judged queries.
        learns_on: folds whose queries teach the fusion but are not judged; empty: those of all folds, crosswise.
    """

    name: str
    store: Store
    index: InvertedIndex
    models: Mapping[str, Path]
    folds: Mapping[str, Judgments]
    learns_on: Mapping[str, Judgments] = dataclasses.field(default_factory=dict)


def dpsr(*arguments: str) -> None:
    """Runs a `dpsr` command. Raises SystemExit with its message if it fails."""
    run = subprocess.run([sys.executable, "-m", "dpsr_common", *arguments], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"`dpsr {' '.join(arguments)}` ended with status {run.returncode}:\n{run.stderr[-2000:]}")


def trained(store: Store, config: str, out: Path, seed: int, *changes: str, name: str = "") -> Path:
    """Returns the directory of a model, by default named by its config, and trains the model unless it is there."""
    path = out / f"{store.path.name}-{name or config}-{seed}"
    if not (path / "checkpoint").is_file():
        flags_of = [f"--set={change}" for change in (f"train.seed={seed}", *changes)]
        dpsr("train", f"--store={store.path}", f"--config={CONFIGS / config}.yaml", f"--out={path}", *flags_of)
    return path


def indexed(store: Store, analysis: str, out: Path) -> InvertedIndex:
    """Builds and opens an inverted index of a store."""
    path = out / f"{store.path.name}-inverted"
    inverted_index.build(store, path, analysis, overwrite=path.exists())
    return open_inverted_index(path)


# Data sets.


def homedepot(data: Path, out: Path, seed: int) -> Workload:
    """Home Depot: titles, a train fold of judgments as clicks, two dev folds."""
    path = out / "homedepot"
    if not path.is_dir():
        dpsr("ingest", "--adapter=homedepot", f"--input={data / 'homedepot'}", f"--out={path}")
    store = Store(path)
    wider = ("model.token_dim=384", "model.embedding_dim=384")
    models = {
        "semantic": trained(store, "homedepot", out, seed),
        "semantic_2": trained(store, "homedepot", out, seed + 1, *wider, name="wider"),
    }
    folds = {}
    for name in ("dev", "misspelt_dev"):
        file = data / "homedepot" / f"judgments.{name}.tsv"
        folds[name] = Judgments.read(file, "search_term", "product_uid", "relevance", 2.33)
    return Workload("homedepot", store, indexed(store, ANALYSES["homedepot"][0], out), models, folds)


def shop(out: Path, seed: int) -> Workload:
    """A generated shop with a log, from which its ranker and its rewriter learn."""
    folder, path = out / "shop-files", out / "shop"
    if not folder.is_dir():
        dpsr("generate", f"--out={folder}", f"--seed={seed}", *SHOP)
    if not path.is_dir():
        schema = folder / "schema.ranking_and_rewriting.yaml"
        schema.write_text((folder / "schema.ranking.yaml").read_text() + "rewriting: {}\n")
        dpsr("ingest", f"--schema={schema}", f"--out={path}")
    store = Store(path)
    read = {
        name: Judgments.read(folder / f"judgments.{name}.tsv", "query", "item", "grade", 1, slices=("kind",))
        for name in ("dev", "test")
    }
    semantic = trained(store, "shop", out, seed)
    # The ranker reads the model's score of query and item: among its candidates are many that the log has never shown.
    changes = ("train.steps=1200", "train.checkpoint_steps=1200", f"ranker.dpsr_model={semantic}")
    models = {"semantic": semantic, "ranker": trained(store, "ranker", out, seed, *changes)}
    index = indexed(store, ANALYSES["shop"][0], out)
    return Workload("shop", store, index, models, {"test": read["test"]}, {"dev": read["dev"]})


def esci150(data: Path, out: Path, seed: int) -> Workload:
    """OpenSearch's sample of ESCI: products without clicks."""
    items = {
        "files": str(data / "esci150" / "products.tsv.gz"), "id": "asin", "text": ["title", "brand", "category"],
        "searched": ["color", "bullet_points"], "filters": ["brand", {"column": "price", "kind": "number"}],
    }  # fmt: skip
    return _catalogue("esci150", items, data, out, seed, 3)


def icecat135(data: Path, out: Path, seed: int) -> Workload:
    """Electronics of Open Icecat, without clicks. The inverted index reads the texts among the attributes."""
    file = out / "icecat135.jsonl"
    with gzip.open(data / "icecat135" / "products.jsonl.gz", "rt", encoding="utf-8") as lines, file.open("w") as output:
        for line in lines:
            item = json.loads(line)
            given = item.pop("attributes")
            texts = [str(value) for name, value in given.items() if name.startswith("attr_t_")]
            output.write(json.dumps({**item, "details": " ".join(texts), "oem": given.get("attr_t_oem_code")}) + "\n")
    items = {
        "files": str(file), "id": "id", "text": ["title", "brand"], "searched": ["details"], "identifiers": ["oem"],
        "filters": ["brand", {"column": "price", "kind": "number"}],
    }  # fmt: skip
    return _catalogue("icecat135", items, data, out, seed, 2)


def _catalogue(name: str, items: dict[str, Any], data: Path, out: Path, seed: int, relevant_from: int) -> Workload:
    path, schema = out / name, out / f"{name}.yaml"
    if not path.is_dir():
        schema.write_text(yaml.safe_dump({"items": items}))
        dpsr("ingest", f"--schema={schema}", f"--out={path}")
    store = Store(path)
    corpus = Corpus.of_store(store)
    judged = Judgments.read(
        data / name / "judgments.dev.tsv", "query", "item", "grade", relevant_from, item_keys=corpus.item_keys
    )
    judged, _ = judged.only_known(corpus.item_ids)
    models = {"semantic": trained(store, "catalogue", out, seed)}
    return Workload(name, store, indexed(store, ANALYSES[name][0], out), models, {"dev": judged})


# Sources and systems.


def found_by(retriever: Retriever, queries: Sequence[str]) -> list[Found]:
    """Asks a retriever for DEPTH items of each query."""
    ids, scores = retriever(queries, None, DEPTH)
    return [Found(one[one >= 0], score[one >= 0]) for one, score in zip(ids, scores, strict=True)]


def looked_up(index: InvertedIndex, texts: Sequence[Sequence[tuple[str, float]]]) -> list[Found]:
    """Asks the inverted index for DEPTH items of each query."""
    return [index.search(of_query, DEPTH) if of_query else Found.nothing() for of_query in texts]


def sources_of(workload: Workload, queries: Sequence[str], rewrite: Callable[[list[str]], Any] | None) -> Lists:
    """Returns what each source finds for each query."""
    lists = {"inverted": looked_up(workload.index, [[(query, 1.0)] for query in queries])}
    for name, model in workload.models.items():
        if name != "ranker":
            lists[name] = found_by(exact_search(model, workload.store), queries)
    if rewrite is not None:
        lists["rewritten"] = looked_up(workload.index, rewrite(list(queries)))
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def only(lists: Lists, names: Sequence[str]) -> Lists:
    """Returns the lists of some sources."""
    return [{name: row[name] for name in names} for row in lists]


def crosswise(lists: Lists, relevant: Sequence[Sequence[int]]) -> list[LearnedFusion]:
    """Returns for each query a fusion that was learned from the queries of the other four folds."""
    depths = dict.fromkeys(lists[0], DEPTH)
    fold = np.random.default_rng(1).permutation(len(lists)) % FOLDS
    fusions: list[Any] = [None] * len(lists)
    for number in range(FOLDS):
        others = np.flatnonzero(fold != number)
        fusion = learn([lists[i] for i in others], [relevant[i] for i in others], depths, KEEP)
        for i in np.flatnonzero(fold == number):
            fusions[i] = fusion
    return fusions


def uncut(fusion: LearnedFusion) -> LearnedFusion:
    """Returns the fusion without its cut-off, which recall at 100 is not to be measured with."""
    return dataclasses.replace(fusion, min_score=0.0, min_best=0.0)


def ranked(workload: Workload, queries: Sequence[str], lists: list[Found]) -> list[Found]:
    """Orders the first RANKED items of each list by the ranker; the others stay behind them."""
    score = ranker_scores(workload.models["ranker"], workload.store)
    heads = [found.ids[:RANKED] for found in lists]
    request = np.repeat(np.arange(len(heads)), [len(ids) for ids in heads])
    rows = RowsById(workload.store.items()["id"])(np.concatenate(heads))
    # Row 0 of the users is the anonymous one.
    shown = RankingFeatures(workload.store).at_end(list(queries), request, np.zeros(len(rows), np.int64), rows)
    scores = np.split(score(shown), np.cumsum([len(ids) for ids in heads])[:-1])
    result = []
    for found, ids, values in zip(lists, heads, scores, strict=True):
        order = np.argsort(-values, kind="stable")
        united = np.concatenate([ids[order], found.ids[RANKED:]])
        result.append(Found(united, -np.arange(len(united), dtype=np.float32)))
    return result


# Figures.


def figures_of(lists: Sequence[Found], judgments: Judgments) -> dict[str, np.ndarray]:
    """Returns the figures of each query."""
    ids = np.full((len(lists), 100), -1, np.int64)
    for row, found in enumerate(lists):
        ids[row, : len(found.ids[:100])] = found.ids[:100]
    return metrics.ranked_metrics(ids, np.where(ids >= 0, 0.0, -np.inf), judgments, (10, 100))


def add_rows(result: report.Report, system: str, workload: str, figures: Mapping[str, np.ndarray]) -> None:
    """Adds the means of a system, with intervals."""
    for name in FIGURES:
        low, high = _interval(figures[name])
        note = f"95 % interval {low:.3f} to {high:.3f}"
        more = {"interval": [low, high], "queries": len(figures[name]), "note": note}
        result.add(system, workload, name, float(figures[name].mean()), "", **more)


def add_differences(
    result: report.Report,
    workload: str,
    system: str,
    figures: Mapping[str, Mapping[str, np.ndarray]],
    others: Sequence[str],
) -> None:
    """Adds the paired differences of NDCG@10 of a system to others."""
    for other in others:
        difference = figures[system]["ndcg@10"] - figures[other]["ndcg@10"]
        low, high = _interval(difference)
        note = f"95 % interval {low:+.3f} to {high:+.3f}"
        result.add(
            f"{system} - {other}", workload, "ndcg@10", float(difference.mean()), "", interval=[low, high], note=note
        )


def _interval(values: np.ndarray) -> list[float]:
    found = metrics.interval(metrics.bootstrap_means(values[:, np.newaxis], SAMPLES, 1)[:, 0])
    assert found is not None
    return found


def measure_workload(result: report.Report, workload: Workload, rewrite: Callable[[list[str]], Any] | None) -> None:
    """Measures all systems on all folds of a data set."""
    folds = dict(workload.learns_on) | dict(workload.folds)
    lists = {name: sources_of(workload, judged.queries, rewrite) for name, judged in folds.items()}
    bm25 = Systems(Corpus.of_store(workload.store)).make("bm25")
    hybrids = {"hybrid_learned": ["inverted", "semantic"]}
    if "semantic_2" in workload.models:
        hybrids["hybrid_two"] = ["inverted", "semantic", "semantic_2"]
    if rewrite is not None:
        hybrids["hybrid_rewritten"] = ["inverted", "rewritten", *hybrids[list(hybrids)[-1]][1:]]
    fused: dict[str, dict[str, list[Found]]] = {name: {} for name in workload.folds}
    for system, sources in hybrids.items():
        fusions = _fusions(workload, {name: only(rows, sources) for name, rows in lists.items()})
        for name in workload.folds:
            rows = only(lists[name], sources)
            united = [uncut(fusion).combine(row, SIZE) for fusion, row in zip(fusions[name], rows, strict=True)]
            fused[name][system] = [Found(one.ids, one.scores) for one in united]
            if system == "hybrid_learned":
                _add_cut_off(result, f"{workload.name} {name}", workload.folds[name], rows, fusions[name])
                _add_nonsense(result, f"{workload.name} {name}", workload, fusions[name], sources)
    for name, judged in workload.folds.items():
        label, rows = f"{workload.name} {name}", lists[name]
        ranks = [RankFusion().combine(row, SIZE) for row in only(rows, ["inverted", "semantic"])]
        systems: dict[str, list[Found]] = {"bm25": found_by(bm25, judged.queries)}
        systems |= {source: [row[source] for row in rows] for source in rows[0]}
        systems["hybrid_ranks"] = [Found(one.ids, one.scores) for one in ranks]
        systems |= fused[name]
        if "ranker" in workload.models:
            systems["hybrid_ranker"] = ranked(workload, judged.queries, systems["hybrid_learned"])
        figures = {system: figures_of(of_system, judged) for system, of_system in systems.items()}
        best = "hybrid_two" if "hybrid_two" in figures else "hybrid_learned"
        for system, values in figures.items():
            add_rows(result, system, label, values)
        add_differences(result, label, best, figures, ["bm25", "inverted", "semantic"])
        if rewrite is not None:
            add_differences(result, label, "hybrid_rewritten", figures, [best])
        for kind in sorted({kind for kinds in judged.slices.get("kind", ()) for kind in kinds}):
            inside = np.array([kind in kinds for kinds in judged.slices["kind"]])
            for system, values in figures.items():
                add_rows(result, system, f"{label}, {kind}", {key: value[inside] for key, value in values.items()})


def _fusions(workload: Workload, lists: Mapping[str, Lists]) -> dict[str, list[LearnedFusion]]:
    """Returns for each query of each fold the fusion that judges it."""
    if workload.learns_on:
        rows = [row for name in workload.learns_on for row in lists[name]]
        relevant = [wanted for judged in workload.learns_on.values() for wanted in judged.relevant]
        fusion = learn(rows, relevant, dict.fromkeys(rows[0], DEPTH), KEEP)
        return {name: [fusion] * len(lists[name]) for name in workload.folds}
    rows = [row for name in workload.folds for row in lists[name]]
    relevant = [wanted for judged in workload.folds.values() for wanted in judged.relevant]
    fusions = iter(crosswise(rows, relevant))
    return {name: [next(fusions) for _ in lists[name]] for name in workload.folds}


def _add_cut_off(
    result: report.Report, label: str, judged: Judgments, lists: Lists, fusions: Sequence[LearnedFusion]
) -> None:
    """Adds what the cut-off does on queries that have relevant items."""
    kept, length = [], []
    for row, wanted, fusion in zip(lists, judged.relevant, fusions, strict=True):
        whole, cut = uncut(fusion).combine(row, 10**6), fusion.combine(row, 10**6)
        kept.append((np.isin(whole.ids, wanted).sum(), np.isin(cut.ids, wanted).sum()))
        length.append((len(whole.ids), len(cut.ids)))
    found, stays = np.array(kept).sum(axis=0)
    lengths = np.array(length)
    result.add("cut_off", label, "kept", stays / max(found, 1), "")
    note = f"{lengths[:, 0].mean():.0f} without the cut-off"
    result.add("cut_off", label, "length", float(lengths[:, 1].mean()), "items", note=note)
    result.add("cut_off", label, "emptied", float((lengths[:, 1] == 0).mean()), "")


def _add_nonsense(
    result: report.Report, label: str, workload: Workload, fusions: Sequence[LearnedFusion], sources: Sequence[str]
) -> None:
    """Adds what the cut-off does on queries whose letters are shuffled."""
    rng, (judged, *_) = np.random.default_rng(1), workload.folds.values()
    asked = ["".join(rng.permutation(list(query))) for query in judged.queries[:100]]
    lists = only(sources_of(workload, asked, None), sources)
    sizes = [len(fusions[0].combine(row, 10**6).ids) for row in lists]
    note = f"mean length {np.mean(sizes):.0f}, {len(sizes)} queries"
    result.add("cut_off", label, "emptied_nonsense", float(np.mean(np.array(sizes) == 0)), "", note=note)


def add_bars(result: report.Report) -> None:
    """Adds the bars of the data sets that were measured."""
    labels = {
        "homedepot_dev": ("homedepot dev", "hybrid_two"),
        "homedepot_misspelt": ("homedepot misspelt_dev", "hybrid_two"),
        "shop": ("shop test", "hybrid_learned"),
        "esci150": ("esci150 dev", "hybrid_learned"),
        "icecat135": ("icecat135 dev", "hybrid_learned"),
    }
    rows = {(row["impl"], row["workload"], row["metric"]): row for row in result.rows}
    for name, (label, system) in labels.items():
        if (system, label, "recall@100") not in rows:
            continue
        for key, impl in (("hybrid", system), ("bm25", "bm25"), ("inverted", "inverted"), ("semantic", "semantic")):
            result.bars[f"{name}_recall100_{key}"] = rows[impl, label, "recall@100"]["value"]
            result.bars[f"{name}_ndcg10_{key}"] = rows[impl, label, "ndcg@10"]["value"]
        for other in ("bm25", "inverted", "semantic"):
            low = rows[f"{system} - {other}", label, "ndcg@10"]["interval"][0]
            result.bars[f"{name}_ndcg10_hybrid_over_{other}_low"] = low
        for metric in ("kept", "emptied", "emptied_nonsense"):
            if ("cut_off", label, metric) in rows:
                result.bars[f"{name}_cut_off_{metric}"] = rows["cut_off", label, metric]["value"]


def compare_analyses(result: report.Report, workload: Workload, out: Path) -> None:
    """Adds the recall of the inverted index alone with each analysis that was compared."""
    for analysis in ANALYSES[workload.name]:
        index = indexed(workload.store, analysis, out)
        for name, judged in workload.folds.items():
            lists = looked_up(index, [[(query, 1.0)] for query in judged.queries])
            add_rows(result, f"inverted, {analysis or 'words'}", f"{workload.name} {name}", figures_of(lists, judged))


def rewrites_of(model: Path) -> Callable[[list[str]], list[list[tuple[str, float]]]]:
    """Returns a function from queries to their rewrites, weighted by their probabilities."""
    from dpsr_tf.models.rewriter_texts import rewriter

    rewrite = rewriter(model)

    def weighted(queries: list[str]) -> list[list[tuple[str, float]]]:
        found = []
        for of_query in rewrite(queries, 3, 0):
            shares = np.exp([chance for _, chance in of_query])
            found.append(
                [(text, float(share)) for (text, _), share in zip(of_query, shares / shares.sum(), strict=True)]
            )
        return found

    return weighted


def quality(result: report.Report, data: Path, out: Path, seed: int, full: bool) -> None:
    """Measures the quality of all data sets."""
    makers: dict[str, Callable[[], Workload]] = {
        "homedepot": lambda: homedepot(data, out, seed),
        "shop": lambda: shop(out, seed),
        "esci150": lambda: esci150(data, out, seed),
        "icecat135": lambda: icecat135(data, out, seed),
    }
    for name, make in makers.items():
        workload = make()
        rewrite = None
        if name in REWRITER_STEPS:
            steps = REWRITER_STEPS[name]
            changes = (f"train.steps={steps}", f"train.checkpoint_steps={steps}")
            rewrite = rewrites_of(trained(workload.store, "rewriter", out, seed, *changes))
        measure_workload(result, workload, rewrite)
        if full:
            compare_analyses(result, workload, out)
    add_bars(result)


def main(arguments: list[str]) -> None:
    """Runs the benchmark."""
    values = flags.FLAGS
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    if unknown := [part for part in values.parts if part not in PARTS]:
        raise app.UsageError(f"--parts={unknown[0]}: expected some of {', '.join(PARTS)}")
    data = Path(values.data or os.environ.get("DPSR_DATA") or Path(__file__).parent.parent.parent / "shared" / "data")
    if "quality" in values.parts:
        for name in ("homedepot", "esci150", "icecat135"):
            if not (data / name / "judgments.dev.tsv").is_file():
                raise app.UsageError(
                    f"--data={data}: has no {name}/judgments.dev.tsv; give the folder of the data sets"
                )
    result = report.Report("search", values.seed, report.hardware("tensorflow", "numpy", "tantivy"))
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(values.out or temporary)
        out.mkdir(parents=True, exist_ok=True)
        if "quality" in values.parts:
            quality(result, data, out, values.seed, values.full)
        if "speed" in values.parts:
            import search_speed

            search_speed.measure(result, out, values.seed, values.full)
    result.print(values.json)


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "folder of the data sets (default: $DPSR_DATA, else ../shared/data)")
    flags.DEFINE_list("parts", list(PARTS), f"parts to run, of {', '.join(PARTS)}")
    flags.DEFINE_string("out", None, "folder that keeps stores and models (default: a temporary one)")
    flags.DEFINE_integer("seed", 1, "seed of the shop and of the trainings")
    flags.DEFINE_boolean("full", False, "also compares analyses of the inverted index")
    flags.DEFINE_boolean("json", False, "prints the results as one JSON object on the last line")
    app.run(main)
