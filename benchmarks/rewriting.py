"""Measures query rewriting (docs/rewriting.md): what rewrites add to BM25, whether they mean the same, what they cost.

    python benchmarks/rewriting.py --json [--data=DIR] [--out=DIR] [--parts=homedepot,shop,ablation,cost] [--full]

Parts of the benchmark:

homedepot   A rewriter (dpsr_tf/configs/rewriter.yaml) learns from Home Depot's titles and its training fold: relevance
            of 2.33 and more counts as a click. No list of corrections is used. Then BM25 searches all titles for the
            query or its rewrites, for the judged queries of the folds dev and misspelt_dev as typed.
shop        A rewriter of a generated shop, whose synonyms are known: share of rewrites with the same meaning, drift by
            kind, share of synonyms found, variety, and BM25 on queries that share no word with what they mean. Once as
            the model writes (`rewriter`), and once with the filters of `dpsr rewrite` (`dpsr rewrite`), as a servable
            has them in its table: precision and synonyms are about these. The queries that share no word with what
            they mean are not in the log, so a servable decodes them.
ablation    Rewriters of the same shop, trained for a shorter time: directions that are trained apart and together, with
            and without the loss from query to query and the loss of the cycle; greedy search, beam search and draws.
cost        Latency of decoding, rewrites in a second of one core, for both kinds of decoder.

BM25 has k1 1.2 and b 0.75. On Home Depot its words are lower-cased runs of [a-z0-9]; in the shop, which is English
and Chinese, those of the project's tokenizer. The score of an item for a query with rewrites is

    BM25(query) + weight * sum over the rewrites of share * BM25(rewrite)

where the shares of a query's rewrites sum to 1 (`united`). The weight is larger if the query has a word that no title
has, because then the query itself finds little. Both weights, and the power of the probabilities that shares are in
proportion to, are chosen for each system, peers included, on the two dev folds together; rows `chosen` name them.
Further folds are kept back for judging.

Peers: symspellpy corrects spelling by edit distance and the frequency of words in titles and queries of the log;
co-click replaces a word by one that stands in its place in another query with shared clicks.

A rewrite of the shop means the same if it names the same type, brand and properties, whatever its words and their order
are. Otherwise it drifts: a part is lost, added or replaced, or it holds words that mean nothing.

DIR holds homedepot/. It is $DPSR_DATA by default, or else ../shared/data beside the repository. Stores and models are
kept in --out, and not made again. --full trains longer, with three seeds, and measures both kinds of decoder on Home
Depot.
"""

from __future__ import annotations

import collections
import dataclasses
import gzip
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pyarrow.parquet
import report
import scipy.sparse
import yaml
from absl import app, flags
from quality import dpsr

from dpsr_export.rewrite import LIST
from dpsr_export.rewrite_table import key_of
from dpsr_export.rewriter import latencies
from dpsr_export.warmup import LoadedServable
from dpsr_tf.config import CONFIGS
from dpsr_tf.data.store import Store, unpack_strings
from dpsr_tf.evaluation import metrics
from dpsr_tf.evaluation.baselines import Bm25, Field, plain_words, unigrams
from dpsr_tf.evaluation.corpus import Corpus
from dpsr_tf.evaluation.judgments import Judgments
from dpsr_tf.models.rewriter_texts import rewriter

K = 100
SAMPLES = 1000
REPOSITORY = Path(__file__).resolve().parent.parent
PARTS = ("homedepot", "shop", "ablation", "cost")
_REWRITES = 10
# Characters of scripts that are written without spaces, as far as the generated shop has them.
_UNSPACED = re.compile("[\u4e00-\u9fff]")

# A rewrite of a query and the logarithm of its probability, or another score whose exponential is a share.
Rewrite = tuple[str, float]
Rewriter = Callable[[Sequence[str]], list[list[Rewrite]]]


# BM25 with rewrites.


@dataclasses.dataclass(frozen=True)
class Union:
    """How the BM25 scores of a query and of its rewrites are added up.

    Attributes:
        weight: of the rewrites together; the query has 1.
        unknown: what the weight is multiplied by if no title has one of the query's words.
        count: largest number of rewrites of a query.
        power: shares are as this power of the rewrites' probabilities; with 0 all rewrites have the same share.
    """

    weight: float
    count: int
    power: float
    unknown: float = 1.0

    def shares(self, rewrites: Sequence[Rewrite], known: bool = True) -> list[Rewrite]:
        """Returns the rewrites that are used, with the factors of their scores.

        Args:
            rewrites: rewrites of a query, best first.
            known: whether titles have all words of the query.
        """
        used = rewrites[: self.count]
        if not used:
            return []
        best = max(score for _, score in used)
        parts = [math.exp(self.power * (score - best)) for _, score in used]
        factor = self.weight * (1 if known else self.unknown) / sum(parts)
        return [(text, factor * part) for (text, _), part in zip(used, parts, strict=True)]


UNIONS = [
    Union(weight, _REWRITES, power, unknown)
    for weight, power, unknown in itertools.product((0.25, 1.0, 1.5, 2.0), (1.0, 0.5), (1.0, 4.0))
]


def united(bm25: Bm25, queries: Sequence[str], rewrites: Sequence[Sequence[Rewrite]], union: Union) -> np.ndarray:
    """Returns the ids of the K best items of each query or its rewrites, int64 [queries, K], padded with -1."""
    texts, row, factor = list(queries), list(range(len(queries))), [1.0] * len(queries)
    for number, (query, of_query) in enumerate(zip(queries, rewrites, strict=True)):
        for text, share in union.shares(of_query, bm25.knows(query)):
            texts.append(text)
            row.append(number)
            factor.append(share)
    mix = scipy.sparse.csr_matrix((np.array(factor, np.float32), (row, np.arange(len(texts)))))
    ids, _ = bm25.search(mix @ bm25.counts(texts), K)
    return ids


def recall(ids: np.ndarray, relevant: Sequence[Sequence[int]]) -> np.ndarray:
    """Returns the share of each query's relevant items among `ids` [queries, K]."""
    found = [len(set(row) & set(wanted)) / len(wanted) for row, wanted in zip(ids.tolist(), relevant, strict=True)]
    return np.array(found)


# Peers.


def spelling_corrector(texts: Iterable[str]) -> Rewriter:
    """Returns symspellpy's correction of whole texts: words up to two edits away, joined and split words."""
    from symspellpy import SymSpell

    words, count = plain_words(), collections.Counter[str]()
    for text in texts:
        count.update(words(text))
    symspell = SymSpell(max_dictionary_edit_distance=2, prefix_length=7)
    for word, times in count.items():
        symspell.create_dictionary_entry(word, times)

    def correct(query: str) -> list[Rewrite]:
        asked = " ".join(words(query))
        found = symspell.lookup_compound(asked, max_edit_distance=2, ignore_non_words=True, split_by_space=True)
        return [(part.term, 0.0) for part in found[:1] if part.term != asked]

    return lambda queries: [correct(query) for query in queries]


def co_click_synonyms(clicks: Mapping[str, Iterable[Any]], most: int = 3) -> Rewriter:
    """Returns rewrites by replacing one word by another, learned from pairs of queries with shared clicks.

    Such a pair counts for a word and its replacement if it differs in this word only. The score of a replacement is the
    logarithm of the cosine between the clicks of both words in such queries.
    """
    words = plain_words()
    # (query with a gap, item) -> words that stood in the gap.
    in_gap: dict[tuple[tuple[str, ...], Any], set[str]] = {}
    for query, items in clicks.items():
        found = words(query)
        items = list(items)
        for place, word in enumerate(found):
            gap = (*found[:place], "", *found[place + 1 :])
            for item in items:
                in_gap.setdefault((gap, item), set()).add(word)
    together, alone = collections.Counter[tuple[str, str]](), collections.Counter[str]()
    for standing in in_gap.values():
        alone.update(standing)
        together.update(itertools.permutations(sorted(standing), 2))
    best: dict[str, list[tuple[str, float]]] = {}
    for (word, other), count in together.items():
        best.setdefault(word, []).append((other, math.log(count / math.sqrt(alone[word] * alone[other]))))

    def replace(query: str) -> list[Rewrite]:
        asked = words(query)
        found = {
            " ".join([*asked[:place], other, *asked[place + 1 :]]): score
            for place, word in enumerate(asked)
            for other, score in best.get(word, ())
        }
        return sorted(found.items(), key=lambda rewrite: (-rewrite[1], rewrite[0]))[:most]

    return lambda queries: [replace(query) for query in queries]


# Home Depot.


def homedepot(result: report.Report, data: Path, out: Path, seeds: Sequence[int], full: bool) -> None:
    """Measures BM25 with the rewrites of all systems on both dev folds."""
    folder = data / "homedepot"
    missing = [name for name in ("products.tsv", "judgments.train.tsv") if not (folder / name).is_file()]
    if missing:
        result.add("data", "homedepot", "missing", 1, "", note=f"{folder} has no {', '.join(missing)}")
        return
    store = _ingested(folder, "homedepot", out)
    folds = {name: _judged(folder, name) for name in ("dev", "misspelt_dev")}
    queries = [query for judged in folds.values() for query in judged.queries]
    relevant = [items for judged in folds.values() for items in judged.relevant]
    fold_of = np.repeat(list(folds), [len(judged.queries) for judged in folds.values()])
    train = _judged(folder, "train")
    clicks = dict(zip(train.queries, train.relevant, strict=True))
    titles = Store(store).texts()["product_title"]
    bm25 = Bm25(Store(store).items()["id"], [Field(list(titles), plain_words())])

    systems: dict[str, list[list[Rewrite]]] = {
        "bm25": [[] for _ in queries],
        "symspellpy": spelling_corrector([*titles, *train.queries])(queries),
        "co-click": co_click_synonyms(clicks)(queries),
    }
    systems["symspellpy + co-click"] = [a + b for a, b in zip(systems["symspellpy"], systems["co-click"], strict=True)]
    corrections = dict(_pairs(folder / "spelling.misspelt_dev.tsv"))
    systems["corrected by hand"] = [[(corrections[query], 0.0)] if query in corrections else [] for query in queries]
    for name, changes in _homedepot_models(seeds, full).items():
        model = trained(store, out / f"homedepot-{name}".replace(" ", "-"), changes)
        systems[name] = rewriter(model)(queries, _REWRITES, seeds[0])
    for name, rewrites in systems.items():
        chosen, figures = _best_union(bm25, queries, rewrites, relevant, fold_of)
        result.add(
            name, "homedepot", "chosen", chosen.weight, "", note=f"power {chosen.power:g}, unknown {chosen.unknown:g}"
        )
        for fold in folds:
            _add(result, name, f"homedepot {fold}", "recall@100", figures[fold_of == fold])
    for fold in folds:
        for bar, name in (
            ("bm25", "bm25"), ("bm25_rewritten", "rewriter"), ("bm25_symspellpy", "symspellpy"),
            ("bm25_co_click", "co-click"), ("bm25_rules", "symspellpy + co-click"),
        ):  # fmt: skip
            prefix = "misspelt" if fold == "misspelt_dev" else fold
            result.bars[f"{prefix}_{bar}"] = result.value(name, f"homedepot {fold}", "recall@100")


def _homedepot_models(seeds: Sequence[int], full: bool) -> dict[str, list[str]]:
    models = {"rewriter": [f"train.seed={seeds[0]}"]}
    if full:
        models |= {f"rewriter seed {seed}": [f"train.seed={seed}"] for seed in seeds[1:]}
        models["rewriter transformer"] = [f"train.seed={seeds[0]}", "rewriter.decoder=transformer"]
    return models


def _ingested(folder: Path, adapter: str, out: Path) -> Path:
    """Ingests what an adapter reads, unless it is there already. Returns the store."""
    store = out / f"store-{adapter}"
    if not (store / "manifest.json").exists():
        dpsr("ingest", f"--adapter={adapter}", f"--input={folder}", f"--out={store}", "--overwrite")
    return store


def _judged(folder: Path, fold: str) -> Judgments:
    path = folder / f"judgments.{fold}.tsv"
    return Judgments.read(path, "search_term", "product_uid", "relevance", relevant_from=2.33)


def _pairs(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()[1:]] if path.is_file() else []


def _best_union(
    bm25: Bm25,
    queries: Sequence[str],
    rewrites: Sequence[Sequence[Rewrite]],
    relevant: Sequence[Sequence[int]],
    fold_of: np.ndarray,
) -> tuple[Union, np.ndarray]:
    """Returns the union with the highest mean over the folds, and the recall of each query with it."""
    folds, tried = sorted(set(fold_of.tolist())), {}
    longest = max(map(len, rewrites))
    for union in UNIONS:
        # With fewer rewrites than that, or with one share, some unions are equal.
        key = union
        if longest < 2:
            key = Union(union.weight * longest, longest, 0.0, union.unknown if longest else 1.0)
        if key not in tried:
            tried[key] = recall(united(bm25, queries, rewrites, key), relevant)
    best = max(tried, key=lambda union: float(np.mean([tried[union][fold_of == fold].mean() for fold in folds])))
    return best, tried[best]


def _add(result: report.Report, impl: str, workload: str, metric: str, figures: np.ndarray) -> None:
    low, high = metrics.interval(metrics.bootstrap_means(figures[:, None], SAMPLES, result.seed)[:, 0]) or (0.0, 0.0)
    note = f"95 % interval {low:.3f} to {high:.3f}"
    result.add(impl, workload, metric, float(figures.mean()), "", note=note, interval=[low, high], queries=len(figures))


def trained(store: Path, model: Path, changes: Sequence[str]) -> Path:
    """Trains a rewriter, unless it is there already."""
    if not (model / "trained").exists():
        flags_of_changes = [f"--set={change}" for change in changes]
        dpsr("train", f"--store={store}", f"--config={CONFIGS / 'rewriter.yaml'}", f"--out={model}", *flags_of_changes)
        (model / "trained").touch()
    return model


def _asking(rewrite: Callable[[Sequence[str], int, int], list[list[Rewrite]]], count: int, seed: int) -> Rewriter:
    return lambda queries: rewrite(queries, count, seed)


# The generated shop.

# Of the rewrites in the table: how many a query has at most, and the smallest logarithm of their probability. Chosen on
# the shop of seed 1.
TABLE_REWRITES, LEAST_LOG_PROBABILITY = 1, -4.0
_SYMBOLS = re.compile(f"{_UNSPACED.pattern}|[a-z0-9]+")
UNKNOWN = "unknown"


class Meanings:
    """What texts of a generated shop mean: sets of parts, each a type, a brand, a property or an unknown word.

    Attributes:
        kinds: part -> property, brand or type.
        synonyms: synonym -> the word that stands in titles instead.
    """

    def __init__(self, shop: Path):
        """Reads the truth of a shop that `dpsr generate` wrote."""
        read = pyarrow.parquet.read_table
        truth = json.loads((shop / "truth.json").read_text())
        meanings = read(shop / "truth" / "meanings.parquet").to_pylist()
        misspelt = read(shop / "truth" / "misspellings.parquet", columns=["query", "right"]).to_pydict()
        self._right = dict(zip(misspelt["query"], misspelt["right"], strict=True))
        self.kinds: dict[str, str] = {}
        for meaning in meanings:
            self.kinds |= dict.fromkeys(meaning["words"], "property")
        for kind in ("brand", "type"):
            self.kinds |= {meaning[kind]: kind for meaning in meanings if meaning[kind]}
        self.synonyms = {
            synonym: word
            for language in truth["synonyms"].values()
            for word, synonyms in language.items()
            for synonym in synonyms
        }
        phrases = {name: name for name in self.kinds} | self.synonyms
        self._phrases = {tuple(_SYMBOLS.findall(phrase.lower())): name for phrase, name in phrases.items()}
        self._longest = max(map(len, self._phrases))
        items = read(shop / "truth" / "items.parquet", columns=["item_id", "type", "words"]).to_pylist()
        brand_of = read(shop / "items.parquet", columns=["item_id", "brand"]).to_pydict()
        brands = dict(zip(brand_of["item_id"], brand_of["brand"], strict=True))
        self._items: dict[str, set[int]] = {}
        for item in items:
            for part in (item["type"], brands[item["item_id"]], *item["words"]):
                self._items.setdefault(part, set()).add(item["item_id"])

    def phrases(self, text: str) -> list[tuple[str, str]]:
        """Splits a text. Returns its phrases, each with the part that it means, or UNKNOWN and a word."""
        symbols, found, place = _SYMBOLS.findall(self._right.get(text, text).lower()), [], 0
        while place < len(symbols):
            for size in range(min(self._longest, len(symbols) - place), 0, -1):
                name = self._phrases.get(tuple(symbols[place : place + size]))
                if name is not None or size == 1:
                    found.append((" ".join(symbols[place : place + size]), name or f"{UNKNOWN} {symbols[place]}"))
                    place += size
                    break
        return found

    def parts(self, text: str) -> frozenset[str]:
        """Returns what a text means."""
        return frozenset(part for _, part in self.phrases(text))

    def drift(self, query: str, rewrite: str) -> str:
        """Returns "" if both mean the same, or what has become of the meaning, such as "lost brand"."""
        wanted, found = self.parts(query), self.parts(rewrite)
        lost, added = wanted - found, found - wanted
        if any(part.startswith(UNKNOWN) for part in added):
            return "unknown word"
        kind = next((self.kinds.get(part, UNKNOWN) for part in sorted(lost or added)), "")
        if not kind:
            return ""
        return f"{'replaced' if lost and added else 'lost' if lost else 'added'} {kind}"

    def cosine(self, query: str, rewrite: str) -> float:
        """Returns the cosine between the sets of items that have all parts of the query, and of the rewrite."""
        both = [
            set.intersection(*[self._items.get(part, set()) for part in self.parts(text)] or [set()])
            for text in (query, rewrite)
        ]
        return len(both[0] & both[1]) / math.sqrt(max(len(both[0]) * len(both[1]), 1))


def edit_distance(one: Sequence[str], other: Sequence[str]) -> int:
    """Returns how many words must be added, left out or replaced to turn one text into the other."""
    row = list(range(len(other) + 1))
    for i, word in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, second in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != second))
    return row[-1]


def word_f1(one: Sequence[str], other: Sequence[str]) -> float:
    """Returns the F1 of the words of two texts."""
    shared = sum((collections.Counter(one) & collections.Counter(other)).values())
    return 2 * shared / max(len(one) + len(other), 1)


@dataclasses.dataclass(frozen=True)
class Shop:
    """A generated shop, and what is asked of its rewriter.

    Attributes:
        store: its store.
        meanings: what its texts mean.
        asked: the judged queries, and the most frequent queries of the log.
        gaps: the judged queries that share no word with the titles of what they mean.
        clicks: clicks of each query of the log.
        equals: query of the truth -> the other queries with the same meaning.
    """

    store: Path
    meanings: Meanings
    asked: list[str]
    gaps: Judgments
    clicks: dict[str, int]
    equals: dict[str, list[str]]


def make_shop(out: Path, seed: int, clicks: int) -> Shop:
    """Generates and ingests a shop, unless it is there already."""
    shop, store = out / f"shop-{seed}", out / f"store-shop-{seed}"
    if not (store / "manifest.json").exists():
        dpsr("generate", f"--out={shop}", f"--seed={seed}", f"--interactions={clicks}", "--overwrite")
        dpsr("ingest", f"--schema={shop / 'schema.rewriting.yaml'}", f"--out={store}", "--overwrite")
    queries = pyarrow.parquet.read_table(shop / "truth" / "queries.parquet").to_pylist()
    of_meaning = collections.defaultdict(list)
    for query in queries:
        of_meaning[tuple(query["meanings"])].append(query["query"])
    judged = [Judgments.read(shop / f"judgments.{fold}.tsv", "query", "item", "grade", 1, slices=["kind"])
              for fold in ("dev", "test")]  # fmt: skip
    log = Store(store)
    counts = dict(zip(log.queries(), _clicks(log), strict=True))
    heads = sorted(counts, key=lambda query: (-counts[query], query))[:500]
    of_gap = [part.take([row for row, kinds in enumerate(part.slices["kind"]) if "gap" in kinds]) for part in judged]
    gaps = Judgments(shop, *([x for part in of_gap for x in getattr(part, name)] for name in ("queries", "relevant")))
    return Shop(
        store,
        Meanings(shop),
        list(dict.fromkeys([*itertools.chain(*(part.queries for part in judged)), *heads])),
        gaps,
        counts,
        {query["query"]: [x for x in of_meaning[tuple(query["meanings"])] if x != query["query"]] for query in queries},
    )


def _clicks(store: Store) -> np.ndarray:
    """Returns the number of positive pairs of each query of the log, int64 [queries]."""
    counts = Corpus.of_store(store).query_counts
    return np.array([counts.get(query, 0) for query in store.queries()])


def measure_shop(result: report.Report, impl: str, shop: Shop, rewrite: Rewriter,
                 workload: str) -> dict[str, float]:  # fmt: skip
    """Adds the figures of a rewriter of a shop to the result, and returns them by name."""
    meanings, words = shop.meanings, _SYMBOLS.findall
    rows = [(query, text) for query, texts in zip(shop.asked, rewrite(shop.asked), strict=True) for text, _ in texts]
    drifts = collections.Counter(meanings.drift(query, text) for query, text in rows)
    truths = [[words(text) for text in shop.equals.get(query, ())] for query, _ in rows]
    split = [(words(query), words(text)) for query, text in rows]
    new_words = collections.defaultdict(set)
    for (query, _), (asked, written) in zip(rows, split, strict=True):
        new_words[query] |= set(written) - set(asked)
    gap_ids = united(_shop_bm25(shop), shop.gaps.queries, rewrite(shop.gaps.queries), Union(1.0, 3, 1.0))
    figures = {
        "rewrites": len(rows) / len(shop.asked),
        "precision": drifts[""] / max(len(rows), 1),
        "synonym_recall": _synonym_recall(shop, rewrite),
        "gap_recall100": float(recall(gap_ids, shop.gaps.relevant).mean()),
        "f1": _mean(
            max(word_f1(text, truth) for truth in known)
            for (_, text), known in zip(split, truths, strict=True)
            if known
        ),
        "edit_distance": _mean(edit_distance(*pair) for pair in split),
        "new_words": _mean(len(new_words[query]) for query in shop.asked),
        "cosine": _mean(meanings.cosine(*row) for row in rows),
    }
    for name, value in figures.items():
        result.add(impl, workload, name, value, "")
    for kind, count in sorted(drifts.items()):
        if kind:
            result.add(impl, workload, f"drift: {kind}", count / len(rows), "share of rewrites")
    return figures


def measure_pairs(result: report.Report, shop: Shop, seed: int, out: Path) -> None:
    """Adds how many of the pairs of queries in a store mean the same, with the filter against drift and without it."""
    folder = out / f"shop-{seed}"
    unfiltered = out / f"store-shop-{seed}-unfiltered"
    if not (unfiltered / "manifest.json").exists():
        schema = yaml.safe_load((folder / "schema.rewriting.yaml").read_text())
        schema["rewriting"] = {**(schema["rewriting"] or {}), "meaning_share": 0}
        (folder / "schema.unfiltered.yaml").write_text(yaml.safe_dump(schema))
        dpsr("ingest", f"--schema={folder / 'schema.unfiltered.yaml'}", f"--out={unfiltered}", "--overwrite")
    for impl, path in (("all pairs", unfiltered), ("filtered pairs", shop.store)):
        # A generated shop has one file, so that rows of pairs are rows of the file.
        (file,) = Store(path).rewriting()
        texts, splits = unpack_strings(file, "query_text"), file["pair.splits"]
        same = [
            not shop.meanings.drift(query, texts[other])
            for row, query in enumerate(texts)
            for other in file["pair.query"][splits[row] : splits[row + 1]]
        ]
        result.add(impl, f"shop {seed}", "pairs", len(same), "")
        result.add(impl, f"shop {seed}", "precision", _mean(same), "")


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return float(np.mean(found)) if found else 0.0


def _with_synonyms(shop: Shop, clicks: int = 20, queries: int = 5) -> dict[str, list[str]]:
    """Returns each synonym with at least so many clicks in the log, and the most clicked queries that hold it."""
    holding: dict[str, list[str]] = {}
    known = {" ".join(_SYMBOLS.findall(synonym.lower())) for synonym in shop.meanings.synonyms}
    for query in sorted(shop.clicks, key=lambda query: (-shop.clicks[query], query)):
        for phrase, _ in shop.meanings.phrases(query):
            if phrase in known:
                holding.setdefault(phrase, []).append(query)
    return {
        phrase: found[:queries]
        for phrase, found in holding.items()
        if sum(shop.clicks[query] for query in found) >= clicks
    }


def _synonym_recall(shop: Shop, rewrite: Rewriter) -> float:
    """Returns the share of the frequent synonyms that a rewrite replaces, in a query that holds it.

    Rewrites with another meaning than the query do not count.
    """
    asked = _with_synonyms(shop)
    found = 0
    for phrase, queries in asked.items():
        found += any(
            phrase not in (part for part, _ in shop.meanings.phrases(text)) and not shop.meanings.drift(query, text)
            for query, texts in zip(queries, rewrite(queries), strict=True)
            for text, _ in texts
        )
    return found / max(len(asked), 1)


def filtered(model: Path, shop: Shop, out: Path) -> Rewriter:
    """Returns the rewrites that `dpsr rewrite` writes into a table for the queries that a shop is measured with."""
    queries, table = out / "queries.txt", out / "table"
    asked = [*shop.asked, *shop.gaps.queries, *itertools.chain(*_with_synonyms(shop).values())]
    queries.write_text("\n".join(dict.fromkeys(asked)) + "\n")
    limits = [f"--n={TABLE_REWRITES}", f"--min_log_probability={LEAST_LOG_PROBABILITY}"]
    files = [f"--model={model}", f"--store={shop.store}", f"--queries={queries}", f"--out={table}"]
    dpsr("rewrite", *files, *limits, "--overwrite")
    found: dict[str, list[Rewrite]] = {}
    with gzip.open(table / LIST, "rt", encoding="utf-8") as lines:
        for line in lines:
            query, text, score, *_ = line.rstrip("\n").split("\t")
            found.setdefault(key_of(query), []).append((text, float(score)))
    return lambda queries: [found.get(key_of(query), []) for query in queries]


def _shop_bm25(shop: Shop) -> Bm25:
    store = Store(shop.store)
    return Bm25(store.items()["id"], [Field(list(store.texts()["title"]), unigrams())])


# Parts.


def measure_shops(result: report.Report, out: Path, seeds: Sequence[int], clicks: int, changes: Sequence[str]) -> None:
    """Measures a rewriter of each shop."""
    of_seed = []
    for seed in seeds:
        shop = make_shop(out, seed, clicks)
        measure_pairs(result, shop, seed, out)
        model = trained(shop.store, out / f"rewriter-shop-{seed}", [f"train.seed={seed}", *changes])
        nothing = measure_shop(result, "bm25", shop, lambda queries: [[] for _ in queries], f"shop {seed}")
        decoded = measure_shop(result, "rewriter", shop, _asking(rewriter(model), 3, seed), f"shop {seed}")
        figures = measure_shop(result, "dpsr rewrite", shop, filtered(model, shop, out), f"shop {seed}")
        # The log has none of these queries, so a servable decodes them.
        of_seed.append(figures | {"gap_bm25": nothing["gap_recall100"], "gap_recall100": decoded["gap_recall100"]})
    for bar, name in (
        ("rewrite_precision", "precision"), ("synonym_recall", "synonym_recall"),
        ("gap_bm25", "gap_bm25"), ("gap_bm25_rewritten", "gap_recall100"),
    ):  # fmt: skip
        result.bars[bar] = _mean(figures[name] for figures in of_seed)


# Directions and losses of the ablation. JD trains forward and backward apart first, then together (arXiv 2103.00800).
# The loss of the cycle begins after a third of the short trainings.
_CYCLE = ["rewriter.cycle_weight=0.1", "rewriter.cycle_start=100"]
ABLATION = {
    "separate": ["rewriter.shared=false", "rewriter.direct_weight=0", "rewriter.path=titles"],
    "joint": ["rewriter.direct_weight=0", "rewriter.path=titles"],
    "joint with cycle": ["rewriter.direct_weight=0", "rewriter.path=titles", *_CYCLE],
    "joint with query to query": [],
    "joint with query to query and cycle": _CYCLE,
}
_ABLATION_QUERIES = 300
# How words are chosen: rewrites of a query, and the method.
DECODING = {"greedy": (1, "beam"), "beam": (3, "beam"), "sampling": (3, "sampling")}


def ablation(result: report.Report, out: Path, seed: int, clicks: int, changes: Sequence[str]) -> None:
    """Measures rewriters that are trained with other losses, and other ways to choose words."""
    shop = make_shop(out, seed, clicks)
    shop = dataclasses.replace(shop, asked=shop.asked[:_ABLATION_QUERIES])
    for name, other in ABLATION.items():
        model = trained(shop.store, out / f"ablation-{name}".replace(" ", "-"), [*changes, *other])
        for how, (count, method) in DECODING.items():
            # How words are chosen matters alike in all of them.
            if how != "beam" and other:
                continue
            rewrite = _asking(rewriter(model, method=method), count, seed)
            measure_shop(result, f"{name}, {how}", shop, rewrite, "ablation")


def cost(result: report.Report, out: Path, seed: int, clicks: int) -> None:
    """Measures the latency of the signature `rewrite`, and the rewrites that a core writes in a second.

    The rewriters are trained for a few steps only. So they write texts of the greatest length, which take longest.
    """
    shop = make_shop(out, seed, clicks)
    for decoder in ("gru", "transformer"):
        changes = ["train.steps=20", "train.checkpoint_steps=20", f"rewriter.decoder={decoder}"]
        model, base = trained(shop.store, out / f"cost-{decoder}", changes), out / f"servable-{decoder}"
        if not base.exists():
            dpsr("export", f"--model={model}", f"--out={base}")
        times = latencies(LoadedServable(base / "1", threads=1), shop.asked[:200], 3)
        for name, percent in (("decode_ms_p50", 50), ("decode_ms_p99", 99)):
            result.add(decoder, "cost", name, float(np.percentile(times, percent)), "ms", note="3 rewrites, one core")
        rewrite, queries = rewriter(model), (shop.asked * 4)[:2000]
        rewrite(queries[:100], 3, seed)
        start = report.cpu_seconds()
        written = sum(map(len, rewrite(queries, 3, seed)))
        rate = written / (report.cpu_seconds() - start)
        result.add(decoder, "cost", "rewrites_per_core_second", rate, "1/s", note="3 rewrites for each query")
    for name in ("decode_ms_p50", "rewrites_per_core_second"):
        result.bars[name] = result.value("gru", "cost", name)


def main(arguments: list[str]) -> None:
    """Runs the benchmark."""
    values = flags.FLAGS
    if arguments[1:]:
        raise app.UsageError(f"unexpected argument '{arguments[1]}'")
    seeds = report.read_seeds(values.seeds or (["1", "2", "3"] if values.full else ["1"]))
    data = Path(values.data or os.environ.get("DPSR_DATA") or REPOSITORY.parent / "shared" / "data")
    result = report.Report("rewriting", seeds[0], report.hardware("tensorflow", "numpy", "bm25s", "symspellpy"))
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(values.out or temporary)
        out.mkdir(parents=True, exist_ok=True)
        if "homedepot" in values.parts:
            homedepot(result, data, out, seeds, values.full)
        shop_changes = [f"train.steps={values.shop_steps}", f"train.checkpoint_steps={values.shop_steps}"]
        if "shop" in values.parts:
            measure_shops(result, out, seeds, values.clicks, shop_changes)
        if "ablation" in values.parts:
            ablation(
                result,
                out,
                seeds[0],
                values.clicks,
                shop_changes if values.full else ["train.steps=300", "train.checkpoint_steps=300"],
            )
        if "cost" in values.parts:
            cost(result, out, seeds[0], values.clicks)
    result.print(values.json)


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "folder of the data sets (default: $DPSR_DATA, or ../shared/data)")
    flags.DEFINE_string("out", None, "folder that keeps stores and models, and reads those that it has")
    flags.DEFINE_multi_enum("parts", list(PARTS), PARTS, "what is measured; give the flag once for each part")
    flags.DEFINE_list("seeds", None, "seeds of shops and trainings (default: 1, with --full 1,2,3)")
    flags.DEFINE_integer("clicks", 60_000, "clicks of a shop", lower_bound=100)
    flags.DEFINE_integer("shop_steps", 1_000, "training steps of a shop's rewriter", lower_bound=1)
    flags.DEFINE_boolean("full", False, "three seeds, both decoders on Home Depot, and a longer ablation")
    flags.DEFINE_boolean("json", False, "prints the results as one JSON object on the last line")
    app.run(main)
