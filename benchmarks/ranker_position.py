"""Position bias: how well propensities are estimated from clicks, and what rankers gain from knowing positions.

    python benchmarks/ranker_position.py [--seeds=1,2,3] [--out=DIR] [--full] --json

**Propensities.** The generated shop knows how likely its users are to look at each position. `error` is the mean over
the positions from 2 on of |log(estimate / truth)|, the error as a share of the propensity. Methods:

- click-through rate of each position, relative to the first: what one gets without comparing like with like.
- all pairs of positions (Agarwal et al., WSDM 2019), with a relevance for each pair.
- regression EM (Wang et al., WSDM 2018): LightGBM predicts the relevance from the numbers of `dpsr features`.
- ours without smoothing, with falling values only (isotonic), and as dpsr_tf.data.propensities.

The workloads `exponent` are shops whose propensities are position^-exponent. For other curves a shop is generated in
which users look at all positions, and its clicks are kept with the probability that the curve has for their position.

**Rankers.** They learn from clicks of training requests, and are compared with what users truly like, which the shop
knows: the gain of an item is the true probability of a click once the user looks at it. In these shops most lists are
in the order of popularity. (With the generator's defaults chance decides most of the order, so that positions hardly
mislead a ranker.)

- `ndcg10_preference`: users and queries of judgments.personal.tsv, all items that answer the query (at most 100).
- `ndcg5_preference_shown`: requests of the test fold, the items shown.
- `mrr_purchases`: the first lists, the rank of what was bought. Purchases prefer popular items, clicks do not.
- `ndcg5_clicks`: requests of the test fold, with their clicks, which are as biased as those of the training.

Plain rankers believe clicks; `position` adds a learned bias for each position in training; `propensities` weights each
clicked item by 1 / estimated propensity, at most 10; `true propensities` by the shop's own. The bars are the mean gains
over the plain ranker. Intervals are paired 95 % intervals over the requests of all seeds. LightGBM minimises the
pairwise loss of our ranker. `--full` trains our ranker, too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import lightgbm
import numpy as np
import report
from absl import app, flags
from tqdm import tqdm

from dpsr_tf.config import CONFIGS
from dpsr_tf.data.ingest import ingest
from dpsr_tf.data.propensities import estimate, propensities
from dpsr_tf.data.ranking_features import RankingFeatures, Shown
from dpsr_tf.data.schema import load_schema
from dpsr_tf.data.store import Store, new_directory
from dpsr_tf.evaluation import metrics
from dpsr_tf.evaluation.judgments import fold_of
from dpsr_tf.evaluation.ranking_metrics import ndcg
from dpsr_tf.shop.generate import generate, random_ids
from dpsr_tf.shop.log import Log
from dpsr_tf.shop.parameters import Parameters
from dpsr_tf.shop.world import make_world

SIZE = {"items": 3000, "users": 500, "interactions": 30_000}
# An engine that mostly ranks by popularity, and users who rarely look further down.
BIASED = {"sorted_share": 0.8, "position_exponent": 1.0}
EXPONENTS = (0.3, 0.7, 1.0, 1.5)
MOST_WEIGHT = 10.0
TREES = 80
VARIANTS = ("plain", "position", "propensities", "true propensities")
SAMPLES = 1000
# Most items that are ranked for a purchase.
_CANDIDATES = 100
Scores = Callable[[Shown], np.ndarray]


def make(folder: Path, **parameters: Any) -> Path:
    """Generates a shop and its store in a folder, unless they are there. Returns the store."""
    shop, store = folder / "shop", folder / "store"
    if not (store / "manifest.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with new_directory(shop, True, "shop", "truth.json") as out:
            generate(Parameters(**{**SIZE, **parameters}), out)
        with new_directory(store, True, "store", "manifest.json") as out:
            ingest(load_schema(shop / "schema.ranking.yaml"), shop, out)
    return store


# Propensities.


@dataclasses.dataclass(frozen=True)
class Clicks:
    """Items shown in requests for training."""

    pair: np.ndarray  # int64 [n], equal for the same query and item
    position: np.ndarray  # int64 [n], from 1 on
    clicked: np.ndarray  # bool [n]

    @staticmethod
    def read(store: Store) -> Clicks:
        """Reads a store with one file of requests."""
        (file,) = store.requests()
        query = np.repeat(file["request.query"].astype(np.int64), np.diff(file["request.splits"]))
        pair = np.unique(query << 32 | file["shown.item"], return_inverse=True)[1]
        return Clicks(pair, file["shown.position"].astype(np.int64), file["shown.outcome"] > 0)

    def thinned(self, curve: np.ndarray, seed: int) -> Clicks:
        """Keeps each click with the probability of its position."""
        kept = np.random.default_rng(seed).random(len(self.pair)) < curve[self.position - 1]
        return dataclasses.replace(self, clicked=self.clicked & kept)


def of_rates(clicks: Clicks) -> np.ndarray:
    """Returns click-through rates."""
    shown, clicked = (np.bincount(clicks.position, w)[1:] for w in (None, clicks.clicked))
    return np.maximum(clicked, 0.5) / shown


def cells_of(clicks: Clicks) -> tuple[np.ndarray, np.ndarray]:
    """Returns how often each pair was shown and clicked at each position, float64 [pairs, positions] each."""
    deepest = int(clicks.position.max())
    cell = clicks.pair * deepest + clicks.position - 1
    size = (int(clicks.pair.max()) + 1) * deepest
    shown, clicked = (np.bincount(cell, w, size).astype(float) for w in (None, clicks.clicked))
    return shown.reshape(-1, deepest), clicked.reshape(-1, deepest)


def of_all_pairs(clicks: Clicks) -> np.ndarray:
    """Maximises the likelihood of Agarwal et al. (2019), section 4.3, over p(k) and a relevance for each k and k'."""
    shown, clicked = cells_of(clicks)
    rate, there = np.divide(clicked, shown, out=np.zeros_like(shown), where=shown > 0), shown > 0
    yes, no = rate.T @ there.astype(float), (there * (1 - rate)).T @ there.astype(float)
    np.fill_diagonal(yes, 0)
    np.fill_diagonal(no, 0)
    total, deepest = (yes + no).sum(), len(yes)
    x = np.zeros((deepest + 1, deepest))  # logits of p, and of the relevances
    first, second = np.zeros_like(x), np.zeros_like(x)
    for step in range(1, 3001):  # Adam
        p = 1 / (1 + np.exp(-x[0]))
        r = 1 / (1 + np.exp(-(x[1:] + x[1:].T) / 2))
        looked = p[:, None] * r
        slope = (yes / looked - no / (1 - looked)) / total
        of_r = slope * looked * (1 - r)
        gradient = np.vstack([(slope * r).sum(1) * p * (1 - p), (of_r + of_r.T) / 2])
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        rate_now = 0.05 * min(1, 500 / step)
        x += rate_now * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-12)
    return 1 / (1 + np.exp(-x[0]))


def of_regression_em(clicks: Clicks, features: np.ndarray, seed: int) -> np.ndarray:
    """Runs regression EM (Wang et al., 2018, algorithm 1) on a sample of the rows."""
    rows = np.random.default_rng(seed).permutation(len(clicks.pair))[:30_000]
    place, clicked, x = clicks.position[rows] - 1, clicks.clicked[rows], features[rows]
    deepest = int(place.max()) + 1
    p, relevance = np.full(deepest, 0.5), np.full(len(rows), clicked.mean())
    settings = {"objective": "cross_entropy", "num_leaves": 15, "verbose": -1, "seed": seed, "num_threads": 1}
    data = lightgbm.Dataset(x, relevance, free_raw_data=False)
    # Fewer rounds leave the deep positions too high.
    for _ in range(40):
        neither = 1 - p[place] * relevance
        looked = np.where(clicked, 1, p[place] * (1 - relevance) / neither)
        relevant = np.where(clicked, 1, (1 - p[place]) * relevance / neither)
        p = np.bincount(place, looked, deepest) / np.bincount(place, minlength=deepest)
        data.set_label(relevant)
        relevance = np.clip(lightgbm.train(settings, data, 10).predict(x), 1e-4, 1 - 1e-4)
    return p


def of_cells(clicks: Clicks) -> np.ndarray:
    """Returns our estimate without smoothing: the fixed point of relevance and propensity of all cells."""
    shown, clicked = cells_of(clicks)
    use = (clicked.sum(1) > 0) & ((shown > 0).sum(1) > 1)
    shown, clicked = shown[use], clicked[use]
    p = np.ones(shown.shape[1])
    for _ in range(300):
        relevance = clicked.sum(1) / (shown @ p)
        p = np.maximum(clicked.sum(0), 0.01) / np.maximum(relevance @ shown, 1e-9)
    return p


def falling(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the nearest values that never rise (isotonic regression)."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        blocks.append((value, weight, 1))
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            (b, wb, nb), (a, wa, na) = blocks.pop(), blocks.pop()
            blocks.append(((a * wa + b * wb) / (wa + wb), wa + wb, na + nb))
    return np.repeat([block[0] for block in blocks], [block[2] for block in blocks])


def measure_propensities(result: report.Report, out: Path, seeds: list[int], full: bool) -> None:
    """Adds the error of each method for each workload, the mean over the seeds."""
    errors: dict[tuple[str, str], list[float]] = {}

    def add(workload: str, curve: np.ndarray, clicks: Clicks, more: Mapping[str, np.ndarray]) -> None:
        raw = of_cells(clicks)
        found = {
            "click-through rates": of_rates(clicks),
            "all pairs of positions": of_all_pairs(clicks),
            **more,
            "ours, not smoothed": raw,
            "ours, falling": falling(raw, np.bincount(clicks.position)[1:]),
            "ours": estimate(clicks.pair, clicks.position, clicks.clicked),
        }
        for method, values in found.items():
            logs = np.log(np.maximum(values / values[0], 1e-3) * curve[0] / curve)
            errors.setdefault((method, workload), []).append(float(np.abs(logs[1:]).mean()))

    for seed in tqdm(seeds, desc="propensities", unit=" seeds"):
        for exponent in EXPONENTS if full else (0.7,):
            store = Store(make(out / f"exponent-{exponent:g}-{seed}", seed=seed, position_exponent=exponent))
            clicks = Clicks.read(store)
            curve = np.arange(1.0, clicks.position.max() + 1) ** -exponent
            (file,) = store.requests()
            shown = RankingFeatures(store).of(file, np.arange(len(file["request.query"])))
            more = {"regression EM": of_regression_em(clicks, np.stack([*shown.numbers.values()], 1), seed)}
            add(f"8 positions, exponent {exponent:g}", curve, clicks, more)
        for length in (8, 40):
            store = Store(make(out / f"flat-{length}-{seed}", seed=seed, position_exponent=0.0, list_length=length))
            clicks = Clicks.read(store)
            place = np.arange(1.0, clicks.position.max() + 1)
            curves = {
                **{f"exponent {exponent:g}": place**-exponent for exponent in (*EXPONENTS, 0.0)},
                "exponential": (0.75 if length == 8 else 0.93) ** (place - 1),
                "step after position 4": np.where(place <= 4, 0.9, 0.3),
                "rises at the end": np.interp(place / len(place), [0.1, 0.6, 1], [1, 0.25, 0.5]),
            }
            for name, curve in curves.items():
                add(f"{length} positions, {name}, thinned", curve, clicks.thinned(curve, seed), {})
    for (method, workload), values in errors.items():
        result.add(method, workload, "error", float(np.mean(values)), "", values=values)
    ours = [np.mean(values) for (method, _), values in errors.items() if method == "ours"]
    result.bars["propensity_error"] = float(np.mean(ours))


# Rankers.


class Truth:
    """What users of a generated shop like: the world that it was made from."""

    def __init__(self, folder: Path, store: Store, seed: int):
        self.facts = json.loads((folder / "truth.json").read_text())
        self._world = make_world(Parameters(**self.facts["parameters"]))
        self._log, self._seed = Log(self._world), seed
        right, _ = self._world.text_rows()
        names = [*self._world.texts, *self._world.misspelt]
        self._senses = {name: self._world.senses[row] for name, row in zip(names, right.tolist(), strict=True)}
        # Rows of the world, for rows of the store.
        self._item, self._user = (
            np.array([row.get(i, 0) for i in table["id"].tolist()])
            for table, row in zip(
                (store.items(), store.users()),
                ({i: row for row, i in enumerate(ids.tolist())} for ids in random_ids(self._world)),
                strict=True,
            )
        )

    def chance(self, queries: list[str], request: np.ndarray, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """Returns how likely users are to click items once they look at them, float64; rows of the store."""
        total, count = np.zeros(len(item)), np.zeros(len(item))
        senses = [self._senses[query] for query in queries]
        for number in range(max(map(len, senses))):
            meaning = np.array([mine[number] if number < len(mine) else -1 for mine in senses])[request]
            rows = np.flatnonzero(meaning >= 0)
            mine = (self._user[user[rows]], meaning[rows], self._item[item[rows]])
            total[rows] += self._log.click_chance(*mine, 20, self._seed)
            count[rows] += 1
        return total / count

    def answers(self, query: str) -> np.ndarray:
        """Returns the rows of the store's items that are in stock and answer a query, int64."""
        rows = np.unique(np.concatenate([self._world.answer_rows(meaning) for meaning in self._senses[query]]))
        return np.flatnonzero(np.isin(self._item, rows[self._world.items.in_stock[rows]]))


@dataclasses.dataclass
class Shop:
    """A shop with what its rankers learn from and are measured on."""

    folder: Path
    store: Store
    propensities: np.ndarray  # the true ones, float64 [positions]
    train: Shown
    test: Shown
    preference: np.ndarray  # true click probability of each row of `test`, once looked at
    purchases: Shown  # all candidates of each purchase
    bought: np.ndarray  # bool, rows of `purchases`
    liked: np.ndarray  # true click probability of each row of `purchases`, once looked at

    @staticmethod
    def read(folder: Path, seed: int) -> Shop:
        """Reads what `make` has made."""
        store = Store(folder / "store")
        truth = Truth(folder / "shop", store, seed)
        features, held, (train,) = RankingFeatures(store), store.held_requests(), store.requests()
        assert held is not None
        everything = features.of(held, np.arange(len(held["request.query"])))
        test = features.of(held, np.flatnonzero([fold_of(query) == "test" for query in everything.queries]))
        return Shop(
            folder,
            store,
            np.array(truth.facts["propensities"]),
            features.of(train, np.arange(len(train["request.query"]))),
            test,
            truth.chance(test.queries, test.request, test.user, test.item),
            *_purchases(folder / "shop", truth, store, features, seed),
        )


def _purchases(
    folder: Path, truth: Truth, store: Store, features: RankingFeatures, seed: int
) -> tuple[Shown, np.ndarray, np.ndarray]:
    """Returns the candidates of each purchase, which of them were bought, and how much the user likes each."""
    rng = np.random.default_rng(seed)
    user_rows, item_rows = (
        {i: row for row, i in enumerate(table["id"].tolist())} for table in (store.users(), store.items())
    )
    queries, request, user, item, bought = [], [], [], [], []
    for line in (folder / "judgments.personal.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query, who, what, *_ = line.split("\t")
        mine, found = item_rows[int(what)], truth.answers(query)
        others = rng.permutation(found[found != mine])[: _CANDIDATES - 1]
        if not len(others):
            continue
        chosen = rng.permutation([mine, *others])
        request += [len(queries)] * len(chosen)
        queries.append(query)
        user += [user_rows[int(who)]] * len(chosen)
        item += chosen.tolist()
        bought += (chosen == mine).tolist()
    rows = (np.array(request), np.array(user), np.array(item))
    return features.at_end(queries, *rows), np.array(bought), truth.chance(queries, *rows)


def weights_of(shop: Shop, variant: str) -> np.ndarray | None:
    """Returns the weight of a click at each position from 1 on, or None."""
    of_variant = {"propensities": lambda: propensities(shop.store), "true propensities": lambda: shop.propensities}
    return np.minimum(1 / of_variant[variant](), MOST_WEIGHT) if variant in of_variant else None


def matrix_of(shown: Shown) -> np.ndarray:
    """Returns all numbers and codes, float32 [n, features]."""
    return np.stack([*shown.numbers.values(), *(codes.astype(np.float32) for codes in shown.codes.values())], axis=1)


def lightgbm_ranker(shop: Shop, variant: str, steps: int) -> Scores:
    """Trains LightGBM with the pairwise loss over clicked and unclicked items of a request."""
    shown, clicked = shop.train, shop.train.outcome > 0
    clicks, lengths = (np.bincount(shown.request, w) for w in (clicked, None))
    use = ((clicks > 0) & (clicks < lengths))[shown.request]
    x, clicked, position = matrix_of(shown)[use], clicked[use], shown.position[use].astype(np.int64)
    lengths = np.unique(shown.request[use], return_counts=True)[1]
    # Rows of each request, [requests, longest]; those beyond its length are the row after the last.
    begins, column = np.cumsum(lengths) - lengths, np.arange(lengths.max())
    place = np.where(column < lengths[:, None], begins[:, None] + column, len(x))
    padded = np.append(clicked, False)[place], np.append(~clicked, False)[place]
    pairs = (padded[0][:, :, None] & padded[1][:, None, :]).astype(np.float32)
    weights = weights_of(shop, variant)
    if weights is not None:
        pairs *= np.append(weights, 1.0).astype(np.float32)[np.append(position - 1, 0)[place]][:, :, None]
    pairs /= pairs.sum() / (pairs > 0).sum()
    bias = np.zeros(256)

    def objective(scores: np.ndarray, _: lightgbm.Dataset) -> tuple[np.ndarray, np.ndarray]:
        s = np.append(scores + bias[position], 0).astype(np.float32)[place]
        wrong = 1 / (1 + np.exp(s[:, :, None] - s[:, None, :]))
        of_pairs, curvature = pairs * wrong, pairs * wrong * (1 - wrong)
        slope = np.zeros(len(x) + 1)
        slope[place] = of_pairs.sum(1) - of_pairs.sum(2)
        second = np.zeros(len(x) + 1)
        second[place] = curvature.sum(1) + curvature.sum(2)
        slope, second = slope[:-1], second[:-1]
        if variant == "position":
            # A step of Newton's method for the biases goes with each tree.
            bias[:] -= 0.5 * np.bincount(position, slope, 256) / (np.bincount(position, second, 256) + 1)
        return slope, np.maximum(second, 1e-6)

    codes = list(range(len(shown.numbers), x.shape[1]))
    settings = {"objective": objective, "learning_rate": 0.15, "num_leaves": 15, "min_data_in_leaf": 50, "verbose": -1,
                "max_bin": 63, "num_threads": 1, "seed": 1, "deterministic": True, "force_row_wise": True}  # fmt: skip
    model = lightgbm.train(settings, lightgbm.Dataset(x, clicked, categorical_feature=codes), steps)
    return lambda of: model.predict(matrix_of(of), raw_score=True)


# Trains a ranker with propensities that are given. Only the generated shop knows the true ones.
_WITH_PROPENSITIES = """
import sys, numpy, dpsr_tf.training.ranker_examples as examples
from dpsr_common.command_line import main
given = [float(text) for text in sys.argv[1].split(",")]
examples.propensities = lambda store: numpy.array(given)
sys.exit(main(sys.argv[2:]))
"""


def our_ranker(shop: Shop, variant: str, steps: int) -> Scores:
    """Trains our ranker on clicks."""
    from dpsr_tf.models.ranker_scores import ranker_scores

    out = shop.folder / f"ranker-{variant.replace(' ', '-')}"
    flags = ["train", f"--store={shop.store.path}", f"--config={CONFIGS / 'ranker.yaml'}", f"--out={out}",
             "--set=ranker.gains=[0, 1, 1, 1]", f"--set=train.steps={steps}", f"--set=train.checkpoint_steps={steps}",
             f"--set=ranker.position={str(variant == 'position').lower()}",
             f"--set=ranker.propensity_weights={str('propensities' in variant).lower()}",
             f"--set=ranker.most_propensity_weight={MOST_WEIGHT}"]  # fmt: skip
    command = [sys.executable, "-m", "dpsr_common", *flags]
    if variant == "true propensities":
        given = ",".join(map(str, shop.propensities))
        command = [sys.executable, "-c", _WITH_PROPENSITIES, given, *flags]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"dpsr {' '.join(flags)}: {run.stdout}{run.stderr[-2000:]}")
    return ranker_scores(out, shop.store)


def figures(shop: Shop, scores: Scores) -> dict[str, np.ndarray]:
    """Returns the figures of each request or purchase."""
    of_test, of_purchases = scores(shop.test), scores(shop.purchases)
    request, bought = shop.purchases.request, shop.bought
    mine = of_purchases[bought][request]  # one item of each purchase was bought
    above = np.bincount(request, (of_purchases > mine) + 0.5 * ((of_purchases == mine) & ~bought))
    return {
        "ndcg10_preference": ndcg(request, shop.liked, of_purchases, 10),
        "ndcg5_preference_shown": ndcg(shop.test.request, shop.preference, of_test, 5),
        "mrr_purchases": 1 / (1 + above),
        "ndcg5_clicks": ndcg(shop.test.request, (shop.test.outcome > 0).astype(float), of_test, 5),
    }


def measure_rankers(result: report.Report, out: Path, seeds: list[int], full: bool, steps: int) -> None:
    """Adds the figures of each ranker, means over the seeds, with paired intervals of its gain over the plain one."""
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    makers = {"lightgbm": lambda shop, variant: lightgbm_ranker(shop, variant, TREES)}
    if full:
        makers["ours"] = lambda shop, variant: our_ranker(shop, variant, steps)
    for seed in tqdm(seeds, desc="rankers", unit=" seeds"):
        folder = out / f"sorted-{seed}"
        make(folder, seed=seed, **BIASED)
        shop = Shop.read(folder, seed)
        everyone: dict[str, Scores] = {"shown order": lambda of: -of.position.astype(float)}
        for name, maker in makers.items():
            everyone |= {f"{name}, {variant}": maker(shop, variant) for variant in VARIANTS}
        for impl, scores in everyone.items():
            for metric, values in figures(shop, scores).items():
                found.setdefault(impl, {}).setdefault(metric, []).append(values)
    for impl, of_metric in found.items():
        plain = f"{impl.split(',')[0]}, plain"
        for metric, values in of_metric.items():
            if impl == "shown order" and metric in ("ndcg10_preference", "mrr_purchases"):
                continue
            more: dict[str, Any] = {"values": [float(of_seed.mean()) for of_seed in values]}
            if impl != plain and plain in found:
                gain = np.concatenate(values) - np.concatenate(found[plain][metric])
                samples = metrics.bootstrap_means(gain[:, None], SAMPLES, seeds[0])
                low, high = metrics.interval(samples[:, 0]) or (0.0, 0.0)
                more |= {"gain": float(gain.mean()), "interval": [low, high]}
                more["note"] = f"{gain.mean():+.4f} ({low:+.4f} to {high:+.4f}) to plain"
            result.add(impl, "shop", metric, float(np.mean(more["values"])), "", **more)


def measure(result: report.Report, out: Path, seeds: list[int], full: bool, steps: int = 2000) -> None:
    """Adds all rows and bars."""
    measure_propensities(result, out, seeds, full)
    measure_rankers(result, out, seeds, full, steps)
    for row in result.rows:
        name, metric = row["impl"].partition(", ")[2].replace(" ", "_"), row["metric"]
        if "gain" in row and metric == "ndcg10_preference" and row["impl"].startswith("ours" if full else "lightgbm"):
            result.bars[f"{metric}_gain_{name}"] = row["gain"]


def main(arguments: list[str]) -> None:
    """Runs the benchmark."""
    values = flags.FLAGS
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    seeds = report.read_seeds(values.seeds)
    result = report.Report("ranker_position", seeds[0], report.hardware("numpy", "lightgbm", "tensorflow"))
    with tempfile.TemporaryDirectory() as temporary:
        measure(result, Path(values.out or temporary), seeds, values.full, values.steps)
    result.print(values.json)


if __name__ == "__main__":
    flags.DEFINE_list("seeds", ["1", "2", "3"], "seeds of the shops, separated by commas")
    flags.DEFINE_integer("steps", 2000, "with --full: number of training steps of our ranker", 10)
    flags.DEFINE_string("out", None, "folder that keeps shops and models, and reads those that it has")
    flags.DEFINE_boolean("full", False, "all exponents, and our ranker beside LightGBM")
    flags.DEFINE_boolean("json", False, "prints the results as one JSON object on the last line")
    app.run(main)
