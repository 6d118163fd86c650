"""Ranks the items shown in requests of a generated shop with DPR, and with gradient boosted trees.

    python benchmarks/ranker.py --out=DIR --json

For each seed it generates a shop, ingests it with schema.ranking.yaml, and writes the features of the three folds. Then
it trains the trees that shops use: XGBoost that predicts orders (as the paper's baseline does), XGBoost with LambdaMART
(`rank:ndcg`), and LightGBM with LambdaMART. Each is trained with several settings; the setting and the number of trees
with the highest session AUC on the validation fold are measured on the test fold.

`dpr` is the ranker of `dpsr train` (configs/ranker.yaml with the settings of DPR below). It reads the numbers of the
same table and, beside them, texts, features and histories. `dpr numbers` is the same ranker with the numbers alone. The
checkpoint with the highest session AUC on the validation fold is measured on the test fold.

All settings tried are rows of the result. No model reads the position.

`session_auc` is the mean AUC of orders over the requests with an order; `ndcg5` has gains of 2^outcome - 1, over the
requests with a click. Bars are means over the seeds, of XGBoost those of the objective with the higher session AUC on
the validation fold. Beside the trees stand the order in which the shop has shown the items, BM25 of the title, and the
click-through rate of 30 days. Rows of `dpr - IMPL` are differences on the same requests, with paired bootstrap
intervals.

Other parts are measured by other files of this folder: judged lists (ranker_judged_lists.py), speed (ranker_speed.py)
and, with --parts=position, position bias (ranker_position.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pyarrow.parquet
import report
import xgboost
from absl import app, flags
from tqdm import tqdm

from dpsr_tf.config import CONFIGS
from dpsr_tf.data.ingest import ingest
from dpsr_tf.data.ranking_features import RankingFeatures
from dpsr_tf.data.request_log import OUTCOMES
from dpsr_tf.data.schema import load_schema
from dpsr_tf.data.store import Store, new_directory
from dpsr_tf.evaluation import metrics
from dpsr_tf.evaluation.features import METADATA, TRAIN, request_batches, write_features
from dpsr_tf.evaluation.ranking_metrics import ndcg, session_auc
from dpsr_tf.models.ranker_scores import ranker_scores
from dpsr_tf.shop.generate import generate
from dpsr_tf.shop.parameters import Parameters
from dpsr_tf.training.train import config_from_flags, train

FOLDS = (TRAIN, "validation", "test")
PARTS = ("shop", "judged_lists", "speed", "position")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Fold:
    """The table of a fold; rows of a request stand together."""

    request: np.ndarray
    outcome: np.ndarray
    position: np.ndarray
    features: np.ndarray  # float32 [rows, features], NaN is missing
    names: list[str]
    codes: list[str]  # those of `names` that are categorical
    fold: str  # one of FOLDS

    @staticmethod
    def read(path: Path, fold: str) -> Fold:
        """Reads the table of a fold that `dpsr features` has written."""
        table = pyarrow.parquet.read_table(path)
        names = json.loads(table.schema.metadata[METADATA])
        columns = [*names["numbers"], *names["codes"]]
        features = np.empty((len(table), len(columns)), np.float32)
        for place, name in enumerate(columns):
            features[:, place] = table[name].to_numpy()
        request, outcome, position = (table[name].to_numpy() for name in ("request", "outcome", "position"))
        return Fold(request, outcome, position, features, columns, names["codes"], fold)

    @property
    def lengths(self) -> np.ndarray:
        """The number of rows of each request."""
        return np.unique(self.request, return_counts=True)[1]

    def with_preference(self) -> Fold:
        """Returns the requests whose items differ in their outcomes. LambdaMART learns from no others."""
        begins = np.flatnonzero(np.diff(self.request, prepend=-1))
        differs = np.maximum.reduceat(self.outcome, begins) > np.minimum.reduceat(self.outcome, begins)
        rows = np.repeat(differs, np.diff(np.append(begins, len(self.request))))
        arrays = {name: getattr(self, name)[rows] for name in ("request", "outcome", "position", "features")}
        return dataclasses.replace(self, **arrays)

    def column(self, name: str) -> np.ndarray:
        """Returns a feature; missing values are the lowest."""
        return np.nan_to_num(self.features[:, self.names.index(name)], nan=-1)

    def figures(self, score: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the figures of each request that has one."""
        return {
            "session_auc": session_auc(self.request, self.outcome == OUTCOMES.index("order"), score),
            "ndcg5": ndcg(self.request, 2.0**self.outcome - 1, score, 5),
        }


@dataclasses.dataclass
class Found:
    """A model with the setting and the number of trees that were best on the validation fold."""

    setting: str
    validation: float
    predict: Callable[[Fold], np.ndarray]


# Scores a fold by some number of trees, or by the checkpoint of a step.
Predict = Callable[[Fold, int], np.ndarray]

# The rankers: overrides of configs/ranker.yaml. They were chosen on the validation fold of seed 1.
DPR: Mapping[str, Mapping[str, Any]] = {
    "dpr": {},
    "dpr numbers": {
        "ranker.texts": False, "ranker.products": False, "model.item_features": [], "model.user_features": [],
        "model.history_length": 0,
    },
}  # fmt: skip
CHECKPOINTS = 3

# Settings that are tried: depth or leaves, and the weight or number of rows of a leaf.
GRID: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "xgboost": {"max_depth": (3, 5), "min_child_weight": (20,)},
    "lightgbm": {"num_leaves": (31,), "min_data_in_leaf": (200,), "learning_rate": (0.1, 0.2)},
}
FULL_GRID: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "xgboost": {"max_depth": (3, 4, 6, 8), "min_child_weight": (1, 20, 100), "eta": (0.05, 0.1)},
    "lightgbm": {"num_leaves": (7, 15, 31, 63), "min_data_in_leaf": (20, 100, 500), "learning_rate": (0.05, 0.1)},
}


def settings(grid: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Yields all combinations of a grid."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def xgboost_models(
    objective: str, folds: Mapping[str, Fold], grid: Mapping[str, tuple[Any, ...]], trees: int, seed: int
) -> Iterator[tuple[dict[str, Any], Predict]]:
    """Yields each setting with a function from a fold and a number of trees to scores."""
    ordered = objective.startswith("binary")

    def matrix(fold: Fold, reference: Any = None) -> Any:
        label = fold.outcome == OUTCOMES.index("order") if ordered else fold.outcome
        kinds = ["c" if name in fold.codes else "q" for name in fold.names]
        return xgboost.QuantileDMatrix(
            fold.features, label, qid=None if ordered else fold.request, feature_types=kinds, enable_categorical=True,
            ref=reference,
        )  # fmt: skip

    train = matrix(folds[TRAIN] if ordered else folds[TRAIN].with_preference())
    matrices = {id(fold): matrix(fold, train) for name, fold in folds.items() if name != TRAIN}
    for setting in settings(grid):
        parameters = {"objective": objective, "tree_method": "hist", "eta": 0.1, "seed": seed, **setting}
        model = xgboost.train(parameters, train, trees)
        yield (
            setting,
            lambda fold, n, model=model: model.predict(matrices[id(fold)], iteration_range=(0, n), output_margin=True),
        )


def lightgbm_models(
    folds: Mapping[str, Fold], grid: Mapping[str, tuple[Any, ...]], trees: int, seed: int
) -> Iterator[tuple[dict[str, Any], Predict]]:
    """Yields each setting with a function from a fold and a number of trees to scores."""
    train = folds[TRAIN].with_preference()
    codes = [train.names.index(name) for name in train.codes]
    for setting in settings(grid):
        data = lightgbm.Dataset(
            train.features, train.outcome, group=train.lengths, categorical_feature=codes, free_raw_data=False
        )
        parameters = {
            "objective": "lambdarank", "learning_rate": 0.1, "lambdarank_truncation_level": 10, "seed": seed,
            "deterministic": True, "force_row_wise": True, "verbose": -1, **setting,
        }  # fmt: skip
        model = lightgbm.train(parameters, data, trees)
        yield setting, lambda fold, n, model=model: model.predict(fold.features, num_iteration=n, raw_score=True)


def best_of(
    models: Iterator[tuple[dict[str, Any], Predict]],
    impl: str,
    workload: str,
    validation: Fold,
    steps: list[int],
    result: report.Report,
    counted: str = "trees",
) -> Found:
    """Measures every setting on the validation fold, and returns the best one; `counted` names `steps`."""
    best = None
    for setting, predict in tqdm(models, desc=f"{workload}, {impl}", unit=" settings"):
        for trees in steps:
            value = float(validation.figures(predict(validation, trees))["session_auc"].mean())
            text = " ".join(f"{name}={value}" for name, value in (setting | {counted: trees}).items())
            result.add(impl, workload, "validation_session_auc", value, "", note=text, setting=text)
            if best is None or value > best.validation:
                best = Found(text, value, lambda fold, predict=predict, trees=trees: predict(fold, trees))
    assert best is not None
    return best


def dpr_models(impl: str, steps: int, store: Path, folder: Path, seed: int) -> Iterator[tuple[dict[str, Any], Predict]]:
    """Trains a ranker, and yields its only setting with a function from a fold and a number of steps to scores."""
    assignments = {"train.steps": steps, "train.checkpoint_steps": steps // CHECKPOINTS, "train.seed": seed}
    values = [f"{name}={json.dumps(value)}" for name, value in (assignments | dict(DPR[impl])).items()]
    config, opened = config_from_flags(str(CONFIGS / "ranker.yaml"), values), Store(store)
    model = folder / f"{impl.replace(' ', '-')}-{seed}"
    train(opened, config, model)
    features = RankingFeatures(opened)

    def predict(fold: Fold, step: int) -> np.ndarray:
        scores = ranker_scores(model, opened, f"model.ckpt-{step}")
        # The rows of the fold's table, in the same order.
        return np.concatenate(
            [scores(features.of(file, chosen)) for _, file, chosen in request_batches(opened, fold.fold)]
        )

    yield {}, predict


def folds_of(seed: int, folder: Path, values: flags.FlagValues) -> tuple[dict[str, Fold], Path]:
    """Generates a shop, and returns the features of its folds and its store."""
    parameters = Parameters(seed=seed, items=values.items, users=values.users, interactions=values.interactions)
    shop, store = folder / f"shop-{seed}", folder / f"store-{seed}"
    if not (store / "manifest.json").exists():
        with new_directory(shop, True, "shop", "truth.json") as out:
            generate(parameters, out)
        with new_directory(store, True, "store", "manifest.json") as out:
            ingest(load_schema(shop / "schema.ranking.yaml"), shop, out)
    found = {}
    for fold in FOLDS:
        path = folder / f"{fold}-{seed}.parquet"
        if not path.exists():
            write_features(Store(store), path, fold)
        found[fold] = Fold.read(path, fold)
    return found, store


def measure(
    seed: int, folds: Mapping[str, Fold], store: Path, folder: Path, values: flags.FlagValues, result: report.Report
) -> None:
    """Trains all models of a seed, and adds their figures to the result."""
    grid = FULL_GRID if values.full else GRID
    trees = 500 if values.full else 120
    steps = [trees // 8, trees // 4, trees // 2, trees]
    workload, test, validation = f"shop {seed}", folds["test"], folds["validation"]
    orders = int((test.outcome == OUTCOMES.index("order")).sum())
    result.add("data", workload, "rows", len(folds[TRAIN].request), "", note=f"test: {orders:,} orders")
    scores = {
        "shown order": -test.position.astype(float),
        "bm25": test.column("bm25.title"),
        "ctr of 30 days": test.column("item.30.ctr"),
    }
    found: dict[str, Found] = {}
    for impl, models in (
        ("xgboost orders", xgboost_models("binary:logistic", folds, grid["xgboost"], trees, seed)),
        ("xgboost lambdamart", xgboost_models("rank:ndcg", folds, grid["xgboost"], trees, seed)),
        ("lightgbm lambdamart", lightgbm_models(folds, grid["lightgbm"], trees, seed)),
    ):
        start = time.monotonic()
        found[impl] = best_of(models, impl, workload, validation, steps, result)
        result.add(impl, workload, "search_seconds", time.monotonic() - start, "s")
        scores[impl] = found[impl].predict(test)
    for impl in DPR:
        start = time.monotonic()
        checkpoints = [values.steps * (i + 1) // CHECKPOINTS for i in range(CHECKPOINTS)]
        models = dpr_models(impl, values.steps, store, folder, seed)
        found[impl] = best_of(models, impl, workload, validation, checkpoints, result, "steps")
        result.add(impl, workload, "search_seconds", time.monotonic() - start, "s")
        scores[impl] = found[impl].predict(test)
    for impl, score in scores.items():
        for metric, figures in test.figures(score).items():
            samples = metrics.bootstrap_means(figures[:, None], SAMPLES, values.seed)
            low, high = metrics.interval(samples[:, 0]) or (0.0, 0.0)
            note = f"95 % interval {low:.3f} to {high:.3f}"
            more = {"interval": [low, high], "requests": len(figures)}
            if impl in found:
                note, more = f"{note}; {found[impl].setting}", more | {"setting": found[impl].setting}
            result.add(impl, workload, metric, float(figures.mean()), "", note=note, **more)
    figures = {impl: test.figures(scores[impl]) for impl in found}
    for impl in figures:
        for metric in figures[impl] if impl != "dpr" else ():
            difference = figures["dpr"][metric] - figures[impl][metric]
            samples = metrics.bootstrap_means(difference[:, None], SAMPLES, values.seed)
            low, high = metrics.interval(samples[:, 0]) or (0.0, 0.0)
            note = f"95 % interval {low:+.3f} to {high:+.3f}"
            more = {"interval": [low, high], "requests": len(difference)}
            result.add(f"dpr - {impl}", workload, metric, float(difference.mean()), "", note=note, **more)
    objective = max(("xgboost orders", "xgboost lambdamart"), key=lambda impl: found[impl].validation)
    result.add("xgboost", workload, "best_objective", found[objective].validation, "", note=objective)
    for metric in ("session_auc", "ndcg5"):
        value = result.value(objective, workload, metric)
        result.add("xgboost", workload, metric, value, "", note=objective)


def run_parts(values: flags.FlagValues, folder: Path, seeds: list[int], result: report.Report) -> None:
    """Runs the parts that other files measure."""
    if "judged_lists" in values.parts:
        import ranker_judged_lists

        data = Path(values.data or os.environ.get("DPSR_DATA") or DATA)
        ranker_judged_lists.measure(result, data, folder, values.seed, values.full)
    if "speed" in values.parts:
        import ranker_speed

        ranker_speed.measure(result, folder, values.seed, values.full)
    if "position" in values.parts:
        import ranker_position

        ranker_position.measure(result, folder, seeds, values.full)


def main(arguments: list[str]) -> None:
    """Runs the benchmark."""
    values = flags.FLAGS
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    result = report.Report("ranker", values.seed, report.hardware("numpy", "xgboost-cpu", "xgboost", "lightgbm"))
    seeds = [values.seed + i for i in range(values.seeds)]
    folder = Path(values.out or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for seed in seeds if "shop" in values.parts else ():
            folds, store = folds_of(seed, folder, values)
            measure(seed, folds, store, folder, values, result)
        run_parts(values, folder, seeds, result)
    finally:
        if not values.out:
            shutil.rmtree(folder)
    for metric in ("session_auc", "ndcg5") if "shop" in values.parts else ():
        for bar, impl in (("dpr", "dpr"), ("xgboost", "xgboost"), ("lightgbm", "lightgbm lambdamart")):
            result.bars[f"{metric}_{bar}"] = statistics.fmean(result.value(impl, f"shop {s}", metric) for s in seeds)
    result.print(values.json)


if __name__ == "__main__":
    flags.DEFINE_integer("seed", 1, "seed of the first shop, of the models and of the bootstrap samples")
    flags.DEFINE_integer("seeds", 3, "number of shops")
    flags.DEFINE_multi_enum(
        "parts", PARTS[:3], PARTS, "what is measured; give the flag once for each part. position takes long"
    )
    flags.DEFINE_string("data", None, "folder of the judged catalogues; default: $DPSR_DATA, else ../shared/data")
    flags.DEFINE_integer("items", 3_000, "items of a shop")
    flags.DEFINE_integer("users", 1_000, "users of a shop")
    flags.DEFINE_integer("interactions", 60_000, "clicks of a shop")
    flags.DEFINE_integer("steps", 1_500, "training steps of the rankers, a multiple of 3", lower_bound=3)
    flags.DEFINE_string("out", None, "folder that keeps shops, stores and features, and reads those that it has")
    flags.DEFINE_boolean("full", False, "a larger grid and more trees; all figures of the other parts")
    flags.DEFINE_boolean("json", False, "prints the results as one JSON object on the last line")
    app.run(main)
