"""Orders judged lists by DPR, by LightGBM with the same features, and by BM25. `benchmarks/ranker.py` runs it.

Three catalogues with a few grades and no clicks: product searches of CrowdFlower, Icecat and ESCI (judgments.dev.tsv
each). What is measured is NDCG@10 within each query's judged items, with gains of 2^outcome - 1; the lowest grade is
outcome 0, the highest outcome 3. Items without a grade play no part.

Every query is scored by models that have not seen its grades: five folds by query, and settings that are chosen inside
the other four folds. For that, each setting is trained on all three of them in turn, and measured on the fourth. The
score of an item is the mean over five trainings with different seeds, of trees and of networks alike. The scales of
numbers need no grades and are those of all lists. `bm25` is BM25 of the titles with its usual constants; `bm25 tuned`
has stems, trigrams, weights and constants that are chosen in the same way.

All trees and networks read the same numbers: matches of query and item, prices and the like, and the score of two
towers that are trained on the titles of the catalogue (dpsr_tf/configs/catalogue.yaml). Settings come with and without
`list_similarity`, by the same towers: how similar an item is to the others of its list. With 75 to 130 queries there is
too little to learn embeddings of words from, so DPR reads numbers only, in a small network of three ReLU layers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import report
import tensorflow as tf
import yaml
from absl import logging
from tqdm import tqdm

from dpsr_tf.config import CONFIGS, Config, ModelConfig, RankerConfig
from dpsr_tf.data.ingest import ingest
from dpsr_tf.data.ranking_features import MODEL_NUMBERS, RankingFeatures, Shown
from dpsr_tf.data.schema import load_schema
from dpsr_tf.data.store import Store, new_directory
from dpsr_tf.evaluation import metrics
from dpsr_tf.evaluation.corpus import Corpus
from dpsr_tf.evaluation.ranking_metrics import ndcg
from dpsr_tf.evaluation.systems import Systems
from dpsr_tf.models.encoders import placeholder
from dpsr_tf.models.features import RankingBatch
from dpsr_tf.models.model_directory import feature_spec
from dpsr_tf.models.ranker import Ranker
from dpsr_tf.models.ranker_inputs import RankerInputs, choose_numbers, dpsr_scorer
from dpsr_tf.models.ranking_losses import ranker_loss
from dpsr_tf.training.train import config_from_flags, train

v1 = tf.compat.v1

FOLDS = 5
SAMPLES = 1000
# Models of different seeds whose scores are added, of trees and of networks: with few lists, one seed says little.
_MEMBERS = 5
_GRADES = {"click": 1, "cart": 2, "order": 3}


def _schema(
    folder: Path, items: dict[str, Any], item: str, grades: Mapping[str, int], **ranking: Any
) -> dict[str, Any]:
    log = {
        "files": str(folder / "judgments.dev.tsv"), "query": "query", "item": item, "label": "grade",
        "positive_from": grades["order"],
    }  # fmt: skip
    return {"items": items, "interactions": log, "ranking": {"grades": dict(grades)} | ranking}


def _number(name: str, *boundaries: float) -> dict[str, Any]:
    return {"column": name, "kind": "number", "boundaries": list(boundaries)}


def schemas(data: Path) -> dict[str, dict[str, Any]]:
    """Returns the schema of each data set."""
    crowdflower, icecat, esci = (data / name for name in ("crowdflower261", "icecat135", "esci150"))
    return {
        # Each judged pair has a product text of its own.
        "crowdflower261": _schema(
            crowdflower,
            {"files": str(crowdflower / "judgments.dev.tsv"), "id": "pair", "text": ["title", "description"]},
            "pair",
            {name: grade + 1 for name, grade in _GRADES.items()},
        ),
        "icecat135": _schema(
            icecat,
            {
                "files": str(icecat / "products.jsonl.gz"), "id": "id", "text": ["title", "brand"],
                "features": ["brand", _number("price", 1e3, 1e4)],
            },
            "item", _GRADES, brand="brand", price="price",
        ),
        "esci150": _schema(
            esci,
            {
                "files": str(esci / "products.tsv.gz"), "id": "asin",
                "text": ["title", "brand", "color", "category", "bullet_points"],
                "features": [
                    "brand", _number("price", 10, 50), _number("rating", 3, 4), _number("rating_count", 10, 1000)
                ],
            },
            "item", _GRADES, brand="brand", price="price",
        ),
    }  # fmt: skip


# BM25 that is tuned: its options, as --system=bm25:OPTIONS.
BM25_OPTIONS = [
    "+".join(parts)
    for parts in itertools.product(
        ("title=1", "title=1+brand=0.5", ""), ("stem",), ("", "trigrams=0.3"), ("b=0.4", "b=0.75")
    )
]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting of a model, and after how many steps or trees it is measured."""

    name: str
    make: Callable[[Shown], Callable[[Shown, int], Callable[[Shown], list[np.ndarray]]]]
    marks: tuple[int, ...]


def measure(result: report.Report, data: Path, out: Path, seed: int, full: bool) -> None:
    """Measures all data sets, and adds rows and bars to the result.

    Args:
        result: the report to add to.
        data: folder of the data sets. Those that are missing are left out, which a row says.
        out: folder for stores and models, which are read again where they are there.
        seed: of folds, models and bootstrap samples.
        full: tries more settings, and trains the towers for longer.
    """
    logging.set_verbosity(logging.ERROR)
    for name, schema in schemas(data.resolve()).items():
        if not (data / name / "judgments.dev.tsv").is_file():
            result.add("data", name, "missing", 1, "", note=f"no {data / name / 'judgments.dev.tsv'}")
            continue
        _measure(name, _ingested(name, schema, out), result, out / f"towers-{name}", seed, full)


def _ingested(name: str, schema: dict[str, Any], out: Path) -> Store:
    store = out / f"store-{name}"
    if not (store / "manifest.json").exists():
        path = out / f"schema-{name}.yaml"
        path.write_text(yaml.safe_dump(schema))
        with new_directory(store, True, "store", "manifest.json") as directory:
            ingest(load_schema(path), out, directory)
    return Store(store)


def _measure(name: str, store: Store, result: report.Report, towers: Path, seed: int, full: bool) -> None:
    assignments = [f"train.seed={seed}"] + ([] if full else ["train.steps=150", "train.checkpoint_steps=150"])
    train(store, config_from_flags(str(CONFIGS / "catalogue.yaml"), assignments), towers)
    features, (file,) = RankingFeatures(store), store.requests()
    lists = features.of(file, np.arange(len(file["request.splits"]) - 1))
    lists = dpsr_scorer(str(towers), store)(lists)
    fold, systems = _folds(len(lists.queries), seed), Systems(Corpus.of_store(store))
    result.add("data", name, "rows", len(lists.item), "", note=f"{len(lists.queries)} queries")
    found = {
        "bm25": _ndcg(lists, _bm25(systems, store, lists, "bm25-words")),
        "bm25 tuned": _tuned_bm25(name, systems, store, lists, fold, result),
        "towers": _ndcg(lists, lists.numbers["dpsr_score"]),
        "lightgbm": _cross_validated(
            name, "lightgbm", lightgbm_settings(features, lists, full), lists, fold, seed, result
        ),
        "dpr": _cross_validated(name, "dpr", dpr_settings(store, features, lists, full), lists, fold, seed, result),
    }
    for impl, figures in found.items():
        _add(result, impl, name, figures, seed)
    for impl in ("bm25", "bm25 tuned", "lightgbm"):
        _add(result, f"dpr - {impl}", name, found["dpr"] - found[impl], seed)
    for impl in ("dpr", "bm25", "lightgbm"):
        result.bars[f"ndcg10_{name}_{impl}"] = float(found[impl].mean())


def _add(result: report.Report, impl: str, name: str, figures: np.ndarray, seed: int) -> None:
    low, high = metrics.interval(metrics.bootstrap_means(figures[:, None], SAMPLES, seed)[:, 0]) or (0.0, 0.0)
    note = f"95 % interval {low:.3f} to {high:.3f}"
    result.add(impl, name, "ndcg10", float(figures.mean()), "", note=note, interval=[low, high], queries=len(figures))


def _folds(queries: int, seed: int) -> np.ndarray:
    """Returns the fold of each query, int64 [queries]."""
    return np.random.default_rng([seed, 7]).permutation(np.arange(queries) % FOLDS)


def _ndcg(lists: Shown, score: np.ndarray) -> np.ndarray:
    return ndcg(lists.request, 2.0**lists.outcome - 1, score, 10)


def _mean_ndcg(lists: Shown, score: np.ndarray) -> float:
    values = _ndcg(lists, score)
    return float(values.mean()) if len(values) else 0.0


def _part(lists: Shown, inside: np.ndarray) -> tuple[Shown, np.ndarray]:
    """Returns the lists that are `inside`, bool [queries], and their rows."""
    rows, number = np.flatnonzero(inside[lists.request]), np.cumsum(inside) - 1
    arrays = {name: getattr(lists, name)[rows] for name in ("user", "time", "item", "position", "outcome")}
    part = lists._replace(
        queries=[query for query, there in zip(lists.queries, inside, strict=True) if there],
        request=number[lists.request[rows]],
        numbers={name: values[rows] for name, values in lists.numbers.items()},
        codes={},
        **arrays,
    )
    return part, rows


# BM25.


def _bm25(systems: Systems, store: Store, lists: Shown, spec: str) -> np.ndarray:
    retriever: Any = systems.make(spec)
    longest = int(np.bincount(lists.request).max())
    items = np.full((len(lists.queries), longest), -1, np.int64)
    place = np.arange(len(lists.item)) - np.searchsorted(lists.request, lists.request)
    items[lists.request, place] = store.items()["id"][lists.item]
    scores: np.ndarray = retriever.score(lists.queries, None, items)
    return scores[lists.request, place]


def _tuned_bm25(
    name: str, systems: Systems, store: Store, lists: Shown, fold: np.ndarray, result: report.Report
) -> np.ndarray:
    columns = set(store.texts())
    options = [o.strip("+").replace("++", "+") for o in BM25_OPTIONS if "brand" not in o or "brand" in columns]
    scores = {option: _bm25(systems, store, lists, f"bm25:{option}") for option in options}
    found = np.zeros(len(lists.item))
    for k in range(FOLDS):
        chosen = max(scores, key=lambda option: _mean_ndcg(*_scored_part(lists, fold != k, scores[option])))
        inside = (fold == k)[lists.request]
        found[inside] = scores[chosen][inside]
        result.add("bm25 tuned", name, f"chosen_{k}", 0, "", note=chosen)
    return _ndcg(lists, found)


def _scored_part(lists: Shown, inside: np.ndarray, score: np.ndarray) -> tuple[Shown, np.ndarray]:
    part, rows = _part(lists, inside)
    return part, score[rows]


# Cross validation.


def _cross_validated(
    name: str,
    impl: str,
    settings: Sequence[Setting],
    lists: Shown,
    fold: np.ndarray,
    seed: int,
    result: report.Report,
) -> np.ndarray:
    """Returns the figures of lists whose folds were scored by models that have not seen them."""
    # A model that has seen neither fold i nor fold j measures the setting on j for i, and on i for j.
    inner = np.zeros((len(settings), max(len(s.marks) for s in settings), FOLDS))
    pairs = list(itertools.combinations(range(FOLDS), 2))
    for number, setting in enumerate(tqdm(settings, desc=f"{name}, {impl}", unit=" settings")):
        fit = setting.make(lists)
        for i, j in pairs:
            score = fit(_part(lists, (fold != i) & (fold != j))[0], seed)
            for choosing, measured in ((i, j), (j, i)):
                part, _ = _part(lists, fold == measured)
                for mark, values in enumerate(score(part)):
                    inner[number, mark, choosing] += _mean_ndcg(part, values) / (FOLDS - 1)
    found = np.zeros(len(lists.item))
    for k in range(FOLDS):
        number, mark = np.unravel_index(int(np.argmax(inner[:, :, k])), inner.shape[:2])
        setting = settings[int(number)]
        part, rows = _part(lists, fold == k)
        others, _ = _part(lists, fold != k)
        for member in range(_MEMBERS):
            score = setting.make(lists)(others, seed + 1000 * member)(part)[int(mark)]
            found[rows] += (score - score.mean()) / max(float(score.std()), 1e-9) / _MEMBERS
        note = f"{setting.name}, {setting.marks[int(mark)]} steps"
        result.add(impl, name, f"chosen_{k}", float(inner[number, mark, k]), "", note=note)
    return _ndcg(lists, found)


# What models read of the towers: their score alone, or how similar the items of a list are, too.
_OF_MODEL = (MODEL_NUMBERS[:1], MODEL_NUMBERS)


def _read(of_model: Sequence[str]) -> str:
    return ", list_similarity" if len(of_model) > 1 else ""


# LightGBM.


def lightgbm_settings(features: RankingFeatures, lists: Shown, full: bool) -> list[Setting]:
    """Returns LambdaMART, and regression of gains, with several sizes of trees, with and without list_similarity."""
    marks = (25, 50, 100, 200)

    def setting(of_model: Sequence[str], objective: str, leaves: int, rows: int) -> Setting:
        names = [number.name for number in choose_numbers(features, lists, of_model)[0]]

        def matrix(part: Shown) -> np.ndarray:
            return np.stack([part.numbers[name] for name in names], axis=1)

        parameters = {
            "objective": objective, "num_leaves": leaves, "min_data_in_leaf": rows, "learning_rate": 0.05,
            "feature_fraction": 0.7, "bagging_fraction": 0.8, "bagging_freq": 1, "lambda_l2": 5,
            "lambdarank_truncation_level": 15, "deterministic": True, "force_row_wise": True, "num_threads": 1,
            "verbose": -1,
        }  # fmt: skip

        def fit(train_lists: Shown, seed: int) -> Callable[[Shown], list[np.ndarray]]:
            data = lightgbm.Dataset(matrix(train_lists), train_lists.outcome, group=np.bincount(train_lists.request))
            model = lightgbm.train(parameters | {"seed": seed}, data, marks[-1])
            return lambda part: [np.asarray(model.predict(matrix(part), num_iteration=trees)) for trees in marks]

        return Setting(f"{objective}, {leaves} leaves of {rows} rows{_read(of_model)}", lambda lists: fit, marks)

    sizes = ((4, 20), (7, 20), (7, 50), (15, 50)) if full else ((4, 20), (7, 50))
    return [
        setting(of_model, objective, *size)
        for of_model in _OF_MODEL
        for objective in ("lambdarank", "regression")
        for size in sizes
    ]


# DPR.


def dpr_settings(store: Store, features: RankingFeatures, lists: Shown, full: bool) -> list[Setting]:
    """Returns DPR with small networks, with and without dropout and list_similarity."""
    marks = (40, 80, 160)

    def setting(of_model: Sequence[str], hidden: tuple[int, ...], dropout: float, rate: float, loss: str) -> Setting:
        config = Config(
            model=ModelConfig(kind="ranker", hidden=hidden),
            ranker=RankerConfig(
                texts=False, products=False, matches=False, dropout=dropout, loss=loss, gains=(0.0, 1.0, 3.0, 7.0)
            ),
        )
        made: list[_Network] = []

        def make(lists: Shown) -> Callable[[Shown, int], Callable[[Shown], list[np.ndarray]]]:
            if not made:
                made.append(_Network(store, features, lists, config, rate, of_model))
            return lambda part, seed: made[0].fit(part, seed, marks)

        name = f"{loss} {'-'.join(map(str, hidden))}, dropout {dropout}, rate {rate}{_read(of_model)}"
        return Setting(name, make, marks)

    chosen = [((32, 16, 8), 0.0, 0.003, "pairwise"), ((64, 32, 16), 0.5, 0.003, "pairwise")]
    more = [((64, 32, 16), 0.0, 0.003, "pairwise"), ((64, 32, 16), 0.2, 0.003, "listwise")]
    return [setting(of_model, *values) for of_model in _OF_MODEL for values in (chosen + more if full else chosen)]


class _Network:
    """A ranker that is trained on all lists at once in each step, by Adam."""

    def __init__(
        self,
        store: Store,
        features: RankingFeatures,
        lists: Shown,
        config: Config,
        rate: float,
        of_model: Sequence[str],
    ):
        numbers, _ = choose_numbers(features, lists, of_model)
        spec = dataclasses.replace(feature_spec(config, store), numbers=numbers)
        self._inputs = RankerInputs(store, spec, config.model.history_length)
        graph = tf.Graph()
        with graph.as_default():
            self._batch = tf.nest.map_structure(placeholder, self._as_batch(lists))
            loss, _ = ranker_loss(self._batch, Ranker(config, spec, training=True))
            self._scores = Ranker(config, spec).scores(self._batch.lists)
            self._step = v1.train.AdamOptimizer(rate).minimize(loss)
            variables = v1.trainable_variables()
            self._shapes = [variable.shape.as_list() for variable in variables]
            self._values = [variable.read_value() for variable in variables]
            self._given = [v1.placeholder(tf.float32, shape) for shape in self._shapes]
            self._assign = [variable.assign(value).op for variable, value in zip(variables, self._given, strict=True)]
            self._start = v1.global_variables_initializer()
        options = v1.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)
        self._session = v1.Session(graph=graph, config=options)

    def fit(self, lists: Shown, seed: int, marks: Sequence[int]) -> Callable[[Shown], list[np.ndarray]]:
        """Trains anew. Returns a function from lists to the scores after each of `marks` steps."""
        run, fed = self._session.run, self._feed(lists)
        run(self._start)
        rng = np.random.default_rng([seed, 3])
        # Glorot's initializer, with this seed.
        limits = [np.sqrt(6 / sum(shape)) if len(shape) == 2 else 0.0 for shape in self._shapes]
        start = [rng.uniform(-limit, limit, shape) for limit, shape in zip(limits, self._shapes, strict=True)]
        self._load(start)
        weights = []
        for step in range(1, marks[-1] + 1):
            run(self._step, fed)
            if step in marks:
                weights.append(run(self._values))

        def scores(part: Shown) -> list[np.ndarray]:
            found, asked = [], self._feed(part)
            for values in weights:
                self._load(values)
                found.append(run(self._scores, asked))
            return found

        return scores

    def _load(self, values: Sequence[np.ndarray]) -> None:
        self._session.run(self._assign, dict(zip(self._given, values, strict=True)))

    def _as_batch(self, lists: Shown) -> RankingBatch:
        zeros = np.zeros(len(lists.item), np.int32)
        requests = np.arange(len(lists.queries))
        return RankingBatch(self._inputs(lists), lists.outcome.astype(np.int32), zeros, requests)

    def _feed(self, lists: Shown) -> dict[Any, Any]:
        batch = self._as_batch(lists)
        return dict(zip(tf.nest.flatten(self._batch), tf.nest.flatten(batch), strict=True))
