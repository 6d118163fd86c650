"""Measures the click graph: LightGCN on Gowalla, shops, catalogues and purchases with and without it, and its cost.

    python benchmarks/graph.py [--data=DIR] [--parts=gowalla,shop,clusters,cost] [--out=DIR] [--full] --json

- gowalla: LightGCN (dpsr_tf/models/light_gcn.py) with 3 layers and 64 dimensions. It is trained with a sampled softmax
  over cosines in large batches, in the place of BPR, from the spectrum of the graph. Recall@20 and NDCG@20 are over all
  items that a user has not in the training file, as published.
- gowalla_settings (not by default): how its settings were chosen. Models learn without a part of each user's training
  items and are measured on it, for 5,000 users: a tenth drawn by chance, and a fifth whose items are alike, as those of
  one trip. The test file is not read.
- shop: DPSR and the same with a graph, trained alike on the same store. Titles of the shop are cut to a third, as of
  sellers who write little: where titles say all, towers without a graph find nearly everything. Queries are some that
  its log asks, some that it misspells, and some that it never asks. Their right answers come from the truth of
  the shop. An item is in the tail if its log has fewer than 5 positive pairs. The tail's recall@100 of a query is that
  of its right answers in the tail.
- clusters: how well items of the same category stand together in the shop of the first seed (--full: of all seeds), and
  a picture of them: clusters.png under --out.
- catalogue (--full): ESCI's sample, which has no log, with brand nodes, and Home Depot, which has no brands. All
  queries of the training are pieces of titles.
- amazon (--full): purchases of items with attributes. The queries are made from attributes.
- cost: examples a core-second at batch 1,024, embeddings of items a core-second, and the latency of a query that the
  table of the servable has and of one that it has not. Latencies are those of calls in this process.

Intervals are 95 % by bootstrap over queries; those of differences are paired. With --out everything that was made is
kept and used again.
"""

from __future__ import annotations

import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import report
import tensorflow as tf
import yaml
from absl import app, flags
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples
from tqdm import tqdm

from dpsr_export.warmup import LoadedServable
from dpsr_tf.config import CONFIGS
from dpsr_tf.data.adapters import open_adapter
from dpsr_tf.data.store import Store
from dpsr_tf.models.encoders import exact_search, item_embeddings, item_encoder
from dpsr_tf.models.light_gcn import LightGcn, pair_batches, sampled_softmax_loss
from dpsr_tf.models.model_directory import ModelDirectory

PARTS = ("gowalla", "gowalla_settings", "shop", "clusters", "catalogue", "amazon", "cost")
SAMPLES = 1000
# LightGCN on Gowalla.
LAYERS, DIM = 3, 64
PAIRS, NEGATIVES = 8192, 2048
# Negatives are drawn by this power of their pairs.
POWER = 0.5


@dataclass(frozen=True)
class Settings:
    """Settings of LightGCN that validation chose.

    Attributes:
        epochs: number of epochs.
        rate: Adam's rate at the first step.
        temperature: divides the cosines.
        popularity: a score has this share of the logarithm of the item's pairs.
        spectrum: whether the training starts from the spectrum of the graph, and not at random.
        parts: an epoch's pairs are learned in as many parts, and the graph is without the part that is learned. With 1,
            the graph is whole.
    """

    epochs: int = 10
    rate: float = 0.012
    temperature: float = 0.12
    popularity: float = 0.08
    spectrum: bool = True
    parts: int = 10


LIGHT_GCN = Settings()
# What gowalla_settings compares. Popularity of each is the best of POPULARITIES.
VARIANTS = {
    "as gowalla": LIGHT_GCN,
    "6 epochs": replace(LIGHT_GCN, epochs=6),
    "6 epochs, temperature 0.1": replace(LIGHT_GCN, epochs=6, temperature=0.1),
    "random start": replace(LIGHT_GCN, spectrum=False),
    "whole graph": replace(LIGHT_GCN, parts=1),
}
POPULARITIES = (0.0, 0.06, 0.08, 0.1)
PUBLISHED = {"recall@20": 0.1824, "ndcg@20": 0.1547}

SHOP = {
    "items": 20_000, "types": 560, "users": 4_000, "interactions": 80_000,
    "shops": 400, "invented_brands": 20, "homonyms": 12, "typo_share": 0.1,
}  # fmt: skip
# Both models: DPSR of the shop's config, which reads these features too.
TRAINING = ("--set=train.steps=600", "--set=model.item_features=[brand, shop, category]")
GRAPH = ("--set=model.graph_fan_out=[10, 5]",)
MODELS = {"DPSR": (), "SearchGCN": GRAPH}
ATTRIBUTES = ["brand", "shop", "category"]
TAIL = 5
AMAZON = ("Beauty", "Toys_and_Games")
AMAZON_TRAINING = ("--set=train.steps=600",)


def dpsr(*arguments: str) -> None:
    """Runs a command. Raises RuntimeError with its output if it fails."""
    run = subprocess.run([sys.executable, "-m", "dpsr_common", *arguments], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"dpsr {' '.join(arguments)}: {run.stdout}{run.stderr}")


def interval(values: np.ndarray) -> list[float]:
    """Returns the 95 % bootstrap interval of the mean of the values that are not NaN."""
    values = values[np.isfinite(values)]
    rng = np.random.default_rng(1)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(SAMPLES)]
    return [float(limit) for limit in np.percentile(means, [2.5, 97.5])]


# LightGCN.

# Users and their items, int [pairs] each.
Pairs = tuple[np.ndarray, np.ndarray]


def read_lists(path: Path) -> Pairs:
    """Reads a file with a user and its items a line: the pairs, int64 [pairs] each."""
    users, items = [], []
    with gzip.open(path, "rt") as lines:
        for line in lines:
            user, *wanted = map(int, line.split())
            users += [user] * len(wanted)
            items += wanted
    return np.array(users), np.array(items)


def top_items(users: np.ndarray, items: np.ndarray, seen: list[np.ndarray], k: int) -> np.ndarray:
    """Returns the k best items of each user, int64 [users, k], without those that the user has in training."""
    found = []
    for begin in range(0, len(users), 1024):
        scores = users[begin : begin + 1024] @ items.T
        for row, known in enumerate(seen[begin : begin + 1024]):
            scores[row, known] = -np.inf
        best = np.argpartition(-scores, k, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1)
        found.append(np.take_along_axis(best, order, axis=1))
    return np.concatenate(found)


def by_user(pairs: Pairs, num_users: int) -> list[np.ndarray]:
    """Returns the items of each user."""
    order = np.argsort(pairs[0], kind="stable")
    return np.split(pairs[1][order], np.cumsum(np.bincount(pairs[0], minlength=num_users))[:-1])


def recall_and_ndcg(found: np.ndarray, wanted: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns recall@k and NDCG@k of each user with wanted items, as LightGCN computes them."""
    k = found.shape[1]
    discount = 1 / np.log2(np.arange(2, k + 2))
    recall, ndcg = [], []
    for row, right in zip(found, wanted, strict=True):
        if len(right):
            hits = np.isin(row, right)
            recall.append(hits.sum() / len(right))
            ndcg.append((hits * discount).sum() / discount[: min(k, len(right))].sum())
    return np.array(recall), np.array(ndcg)


def gowalla(result: report.Report, data: Path, out: Path) -> None:
    """Trains LightGCN, or takes the embeddings that --out has, and adds its figures."""
    train, test = (read_lists(data / "gowalla" / f"{name}.txt.gz") for name in ("train", "test"))
    kept = out / "light_gcn.npz"
    if not kept.exists():
        start = report.cpu_seconds()
        users, items = train_light_gcn(train, result.seed, LIGHT_GCN)
        np.savez(kept, users=users, items=items, cpu=report.cpu_seconds() - start)
    with np.load(kept) as arrays:
        users, items, cpu = arrays["users"], arrays["items"], float(arrays["cpu"])
    found = top_items(*with_prior(users, items, prior(train[1], LIGHT_GCN.popularity)), by_user(train, len(users)), 20)
    recall, ndcg = recall_and_ndcg(found, by_user(test, len(users)))
    for metric, values in (("recall@20", recall), ("ndcg@20", ndcg)):
        low, high = interval(values)
        note = f"published {PUBLISHED[metric]}; 95 % interval {low:.4f} to {high:.4f}"
        result.add("LightGCN", "gowalla", metric, float(values.mean()), "", users=len(values), note=note)
        result.bars[f"gowalla_{metric.replace('@', '')}"] = float(values.mean())
    note = f"{LIGHT_GCN.epochs} epochs in batches of {PAIRS:,} pairs"
    result.add("LightGCN", "gowalla", "training", cpu, "CPU s", note=note)


def gowalla_settings(result: report.Report, data: Path) -> None:
    """Trains LightGCN with several settings without a part of each user's training items, and adds what it finds."""
    pairs = read_lists(data / "gowalla" / "train.txt.gz")
    num_users = int(pairs[0].max()) + 1
    chosen = np.random.default_rng(result.seed).choice(num_users, min(5000, num_users), replace=False)
    splits = {"by chance": (0.1, chance(pairs, result.seed)), "alike": (0.2, likeness(pairs, result.seed))}
    for split, (share, order) in splits.items():
        train, held = hold_back(pairs, share, order)
        seen, wanted = (by_user(part, num_users) for part in (train, held))
        seen, wanted = ([lists[user] for user in chosen] for lists in (seen, wanted))
        for name, settings in VARIANTS.items():
            users, items = train_light_gcn(train, result.seed, settings)
            for popularity in POPULARITIES:
                scored = with_prior(users[chosen], items, prior(train[1], popularity))
                recall, ndcg = recall_and_ndcg(top_items(*scored, seen, 20), wanted)
                for metric, values in (("recall@20", recall), ("ndcg@20", ndcg)):
                    note, workload = f"cosine + {popularity:g} log(pairs)", f"gowalla, held back {split}"
                    result.add(f"LightGCN, {name}", workload, metric, float(values.mean()), "", note=note)


def hold_back(pairs: Pairs, share: float, order: np.ndarray) -> tuple[Pairs, Pairs]:
    """Splits pairs: those that are left, and a share of the items of each user, rounded, but at least one.

    Args:
        pairs: users and their items.
        share: the share that is held back.
        order: float [pairs]; the items of a user with the smallest values are held back.
    """
    users, items = pairs
    sorted_pairs = np.lexsort((order, users))
    counts = np.bincount(users)
    place = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
    held = np.zeros(len(users), bool)
    held[sorted_pairs] = place < np.maximum(1, np.round(share * counts))[users[sorted_pairs]]
    return (users[~held], items[~held]), (users[held], items[held])


def chance(pairs: Pairs, seed: int) -> np.ndarray:
    """Returns an order for hold_back that holds items back by chance, float [pairs]."""
    return np.random.default_rng(seed).random(len(pairs[0]))


def likeness(pairs: Pairs, seed: int) -> np.ndarray:
    """Returns an order for hold_back that holds back items which are alike: the nearest to one that is drawn.

    Items are compared by the cosine of their rows of the graph's leading eigenvectors.
    """
    model = LightGcn(*pairs, DIM, LAYERS, seed)
    model.start_from_spectrum(scale=0.1, iterations=10, seed=seed)
    items = model.embeddings.numpy()[model.num_users :]
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    rng, order = np.random.default_rng(seed), np.empty(len(pairs[0]))
    by_users = np.argsort(pairs[0], kind="stable")
    for rows in np.split(by_users, np.cumsum(np.bincount(pairs[0]))[:-1]):
        if len(rows):
            of_user = items[pairs[1][rows]]
            order[rows] = -of_user @ of_user[rng.integers(len(rows))]
    return order


def prior(items: np.ndarray, popularity: float) -> np.ndarray:
    """Returns what the score of each item has beside the cosine, from the items of the training pairs."""
    return popularity * np.log(np.maximum(np.bincount(items), 1))


def with_prior(users: np.ndarray, items: np.ndarray, prior: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns vectors of users and items whose inner product is their cosine plus the prior of the item."""
    units = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (users, items)]
    more = np.ones((len(users), 1)), prior[:, np.newaxis]
    of_users, of_items = (np.concatenate(parts, axis=1, dtype=np.float32) for parts in zip(units, more, strict=True))
    return of_users, of_items


def train_light_gcn(train: Pairs, seed: int, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Returns the final embeddings of users and items, float32 [users, DIM] and [items, DIM]."""
    model = LightGcn(*train, DIM, LAYERS, seed)
    if settings.spectrum:
        model.start_from_spectrum(scale=0.1, iterations=10, seed=seed)
    optimizer = tf.keras.optimizers.legacy.Adam(settings.rate)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32)] * 3)
    def step(users: tf.Tensor, items: tf.Tensor, negatives: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            final = model.propagate(tf.convert_to_tensor(model.embeddings))
            loss = sampled_softmax_loss(final, users, items, negatives, settings.temperature)
        variables = [model.embeddings]
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    hide = model.hide if settings.parts > 1 else None
    batches = pair_batches(*train, PAIRS, NEGATIVES, POWER, seed, hide, settings.parts)
    steps = settings.epochs * settings.parts * (len(train[0]) // settings.parts // PAIRS)
    for number in tqdm(range(steps), desc="gowalla"):
        # The rate falls to 0 at the last step.
        optimizer.learning_rate.assign(settings.rate * 0.5 * (1 + np.cos(np.pi * number / steps)))
        step(*next(batches))
    model.hide(np.array([], int))
    users, items = (part.numpy() for part in model.final())
    return users, items


# The shop.


def make_shop(folder: Path, seed: int) -> None:
    """Writes the shop and its store, with a graph."""
    if (folder / "store").exists():
        return
    sizes = [f"--set={name}={value}" for name, value in SHOP.items()]
    dpsr("generate", f"--out={folder / 'shop'}", f"--seed={seed}", *sizes, "--overwrite")
    _cut_titles(folder / "shop" / "items.parquet")
    schema = yaml.safe_load((folder / "shop" / "schema.yaml").read_text())
    schema["graph"] = {"attributes": ATTRIBUTES}
    (folder / "shop" / "schema.graph.yaml").write_text(yaml.safe_dump(schema, sort_keys=False))
    dpsr("ingest", f"--schema={folder / 'shop' / 'schema.graph.yaml'}", f"--out={folder / 'store'}", "--overwrite")


def _cut_titles(path: Path) -> None:
    """Keeps the first third of the words of each title, as of sellers who write little. The right answers stay."""
    table = pyarrow.parquet.read_table(path)
    titles = [title.split() for title in table["title"].to_pylist()]
    cut = pa.array([" ".join(words[: -(-len(words) // 3)]) for words in titles])
    column = table.schema.get_field_index("title")
    pyarrow.parquet.write_table(table.set_column(column, "title", cut), path)


def make_models(folder: Path, config: str, seed: int, training: tuple[str, ...] = TRAINING) -> None:
    """Trains both models on folder/store."""
    for name, more in MODELS.items():
        if not (folder / name / "checkpoint").exists():
            dpsr("train", f"--store={folder / 'store'}", f"--config={CONFIGS / config}", f"--out={folder / name}",
                 f"--set=train.seed={seed}", "--overwrite", *training, *more)  # fmt: skip


def judged_queries(shop: Path, seed: int) -> dict[str, list[tuple[str, set[int]]]]:
    """Returns queries with all their right answers: asked in the log, misspelt in the log, and never asked."""
    tables = {name: pyarrow.parquet.read_table(shop / "truth" / f"{name}.parquet") for name in
              ("queries", "misspellings", "relevant")}  # fmt: skip
    meaning, item = (tables["relevant"][name].to_numpy() for name in ("meaning", "item_id"))
    order = np.argsort(meaning, kind="stable")
    meaning, item = meaning[order], item[order]
    queries = {row["query"]: row for row in tables["queries"].to_pylist()}

    def answers(row: dict[str, Any]) -> set[int]:
        parts = [np.searchsorted(meaning, [number, number + 1]) for number in row["meanings"]]
        return {int(i) for begin, end in parts for i in item[begin:end]}

    asked = [(text, row, row["requests"]) for text, row in queries.items() if row["fold"] == "log" and row["requests"]]
    names = tables["misspellings"].schema.names
    misspelt = [(row[names[0]], queries[row[names[1]]], row["requests"]) for row in tables["misspellings"].to_pylist()
                if row["requests"] and row[names[1]] in queries]  # fmt: skip
    unasked = [(text, row, 1) for text, row in queries.items() if row["fold"] == "test"]
    rng, found = np.random.default_rng(seed), {}
    for name, rows, most in (("asked", asked, 1500), ("misspelt", misspelt, 500), ("never asked", unasked, 700)):
        share = np.array([count for *_, count in rows], float)
        chosen = rng.choice(len(rows), min(most, len(rows)), replace=False, p=share / share.sum())
        judged = [(rows[i][0], answers(rows[i][1])) for i in chosen]
        found[name] = [(text, right) for text, right in judged if right]
    return found


def figures(search: Any, queries: list[tuple[str, set[int]]], tail: set[int]) -> dict[str, np.ndarray]:
    """Returns the figures of each query, NaN where it has none."""
    ids, _ = search([text for text, _ in queries], None, 100)
    rows = []
    for (text, right), row in zip(queries, ids.tolist(), strict=True):
        found, rare = set(row), right & tail
        gain = sum(1 / np.log2(place + 2) for place, i in enumerate(row[:10]) if i in right)
        ideal = sum(1 / np.log2(place + 2) for place in range(min(10, len(right))))

        def recall(wanted: set[int], found: set[int] = found) -> float:
            return len(found & wanted) / min(100, len(wanted)) if wanted else np.nan

        rows.append((recall(right), recall(rare), recall(right - rare), gain / ideal, len(text.split())))
    columns = np.array(rows, float).T
    return dict(zip(("recall@100", "tail recall@100", "other recall@100", "ndcg@10", "words"), columns, strict=True))


def shop(result: report.Report, seeds: list[int], out: Path) -> None:
    """Adds the figures of both models on the shops of some seeds."""
    of_all: dict[tuple[str, str, str], list[np.ndarray]] = {}
    for seed in seeds:
        folder = out / f"shop-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        make_shop(folder, seed)
        make_models(folder, "shop.yaml", seed)
        store = Store(folder / "store")
        clicks = sum(np.bincount(file["positive.item"], minlength=store.counts.items) for file in store.interactions())
        tail = set(store.items()["id"][clicks < TAIL].tolist())
        if seed == seeds[0]:
            note = f"of {store.counts.items:,}, {int((clicks == 0).sum()):,} of them without a click"
            result.add("store", "shop", "items in the tail", len(tail), "items", note=note)
            result.add("store", "shop", "edges by clicks", store.manifest["graph"]["edges"], "edges")
        judged = judged_queries(folder / "shop", seed)
        for model in MODELS:
            search = exact_search(folder / model, store)
            for fold, queries in judged.items():
                found = figures(search, queries, tail)
                words = found.pop("words")
                for metric, values in found.items():
                    of_all.setdefault((fold, metric, model), []).append(values)
                for name, rows in (("one word", words == 1), ("more words", words > 1)):
                    of_all.setdefault((f"{fold}, {name}", "ndcg@10", model), []).append(found["ndcg@10"][rows])
                    of_all.setdefault((f"{fold}, {name}", "recall@100", model), []).append(found["recall@100"][rows])
    for (fold, metric, model), values in of_all.items():
        joined = np.concatenate(values)
        low, high = interval(joined)
        more = {"values": [float(np.nanmean(part)) for part in values], "interval": [low, high]}
        count = int(np.isfinite(joined).sum())
        note = f"{count:,} queries; 95 % interval {low:.4f} to {high:.4f}"
        if model == "SearchGCN":
            low, high = interval(joined - np.concatenate(of_all[fold, metric, "DPSR"]))
            more["difference"], note = [low, high], f"{note}; minus DPSR {low:+.4f} to {high:+.4f}"
        result.add(model, f"shop, {fold}", metric, float(np.nanmean(joined)), "", queries=count, note=note, **more)

    def tails(model: str) -> float:
        folds = [fold for fold, metric, name in of_all if metric == "tail recall@100" and name == model]
        return float(np.nanmean(np.concatenate([part for f in folds for part in of_all[f, "tail recall@100", model]])))

    result.bars["shop_tail_recall100_gcn_over_dpsr"] = tails("SearchGCN") / tails("DPSR")


def clusters(result: report.Report, seeds: list[int], out: Path) -> None:
    """Adds how well items of the same category stand together, and draws those of the first seed: clusters.png.

    The silhouette is that of 2,000 items by cosine distance. The picture has their places by t-SNE.
    """
    of_all: dict[str, list[np.ndarray]] = {model: [] for model in MODELS}
    for seed in seeds:
        folder = out / f"shop-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        make_shop(folder, seed)
        make_models(folder, "shop.yaml", seed)
        store = Store(folder / "store")
        rows = np.random.default_rng(1).choice(store.counts.items, min(2000, store.counts.items), replace=False)
        category = store.items()["feature.category"][rows]
        vectors = {model: item_embeddings(folder / model, store)[rows] for model in MODELS}
        for model, places in vectors.items():
            of_all[model].append(silhouette_samples(places, category, metric="cosine"))
        if seed == seeds[0]:
            titles = {model: f"{model}, silhouette {of_all[model][0].mean():.3f}" for model in MODELS}
            _draw({titles[model]: places for model, places in vectors.items()}, category, out / "clusters.png")
    for model, values in of_all.items():
        joined = np.concatenate(values)
        note = "by seed " + ", ".join(f"{part.mean():.4f}" for part in values)
        if model == "SearchGCN":
            low, high = interval(joined - np.concatenate(of_all["DPSR"]))
            note += f"; minus DPSR {low:+.4f} to {high:+.4f}"
        result.add(model, "shop", "silhouette by category", float(joined.mean()), "", items=len(joined), note=note)


def _draw(vectors: dict[str, np.ndarray], category: np.ndarray, path: Path) -> None:
    """Draws the embeddings [n, dim] of each model beside each other, in the plane by t-SNE, a color for a category."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    for axes, (title, places) in zip(figure.subplots(1, len(vectors)), vectors.items(), strict=True):
        points = TSNE(2, init="pca", metric="cosine", random_state=1).fit_transform(places)
        axes.scatter(points[:, 0], points[:, 1], s=5, c=category, cmap="tab20", linewidths=0)
        axes.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=100)


# Catalogues without a log.


def catalogue(result: report.Report, data: Path, out: Path, seed: int, full: bool) -> None:
    """Adds recall@100 of both models on catalogues whose training queries are pieces of titles."""
    sets = {
        "esci150": ({"files": "products.tsv.gz", "id": "asin", "text": ["title"], "features": ["brand"]}, ["brand"], 3),
    }
    if full:
        sets["homedepot"] = ({"files": "products.tsv", "id": "product_uid", "text": ["product_title"]}, [], 2.33)
    for name, (items, attributes, relevant_from) in sets.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "store").exists():
            schema = {"items": items, "graph": {"attributes": attributes}}
            (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
            dpsr("ingest", f"--schema={folder / 'schema.yaml'}", f"--input={data / name}", f"--out={folder / 'store'}")
        make_models(folder, "catalogue.yaml", seed, ())
        columns = () if name == "esci150" else ("--query_column=search_term", "--item_column=product_uid",
                                                 "--grade_column=relevance")  # fmt: skip
        _evaluate(result, folder, name, f"--judgments={data / name / 'judgments.dev.tsv'}",
                  f"--relevant_from={relevant_from}", *columns)  # fmt: skip


def _evaluate(result: report.Report, folder: Path, workload: str, *judgments: str) -> None:
    """Adds the figures of both models of a folder on judgments, and the difference of the second from the first."""
    file = folder / "figures.json"
    systems = {model: f"model:{folder / model}" for model in MODELS}
    dpsr("evaluate", f"--store={folder / 'store'}", *(f"--system={system}" for system in systems.values()),
         "--compare", "--latency_queries=0", f"--json={file}", *judgments)  # fmt: skip
    read = json.loads(file.read_text())
    (compared,) = read["comparisons"]
    for model, system in systems.items():
        for metric in ("recall@10", "recall@100", "ndcg@10"):
            low, high = read["intervals"][system][metric]
            more, note = {"interval": [low, high]}, f"95 % interval {low:.4f} to {high:.4f}"
            if system == compared["system"]:
                low, high = compared["figures"][metric]["interval"]
                more["difference"], note = [low, high], f"{note}; minus DPSR {low:+.4f} to {high:+.4f}"
            result.add(model, workload, metric, read["systems"][system][metric], "", note=note, **more)


# Amazon: purchases of items with attributes.


def amazon(result: report.Report, data: Path, out: Path, seed: int) -> None:
    """Adds the figures of both models on Amazon's reviews, on half of the queries of users' last two items.

    Edges need columns with one value an item. So an item's first attribute (mostly its brand) and its last (mostly its
    narrowest category) make the edges. Both models read them as features too.
    """
    adapter = open_adapter("amazon_s3rec")
    assert adapter.convert is not None
    for name in AMAZON:
        folder = out / f"amazon-{name}"
        tables = folder / "tables"
        if not (folder / "store").exists():
            tables.mkdir(parents=True, exist_ok=True)
            adapter.convert(data / "amazon_s3rec" / f"{name}.txt", tables)
            items = pyarrow.parquet.read_table(tables / "items.parquet")
            words = [cell.split() or [""] for cell in items["attributes"].to_pylist()]
            for column, place in (("first", 0), ("last", -1)):
                items = items.append_column(column, pa.array([cell[place] for cell in words]))
            pyarrow.parquet.write_table(items, tables / "items.parquet")
            schema = yaml.safe_load(adapter.schema_path.read_text())
            schema["items"]["features"] += ["first", "last"]
            schema["graph"] = {"attributes": ["first", "last"]}
            (folder / "schema.yaml").write_text(yaml.safe_dump(schema, sort_keys=False))
            dpsr("ingest", f"--schema={folder / 'schema.yaml'}", f"--input={tables}", f"--out={folder / 'store'}")
        make_models(folder, "movielens.yaml", seed, AMAZON_TRAINING)
        _evaluate(result, folder, f"amazon {name}", "--held_out", "--fold=test")


# Cost.


def cost(result: report.Report, out: Path, seed: int) -> None:
    """Adds rates of training and embedding, and latencies, on the shop of a seed."""
    folder = out / f"shop-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    make_shop(folder, seed)
    make_models(folder, "shop.yaml", seed)
    store = Store(folder / "store")
    rates: dict[str, list[float]] = {model: [] for model in MODELS}
    for turn in range(2):
        for model in list(MODELS)[:: 1 if turn % 2 == 0 else -1]:
            rates[model].append(_train_rate(folder, model, seed))
    for model, values in rates.items():
        result.add_samples(model, "shop", "training, batch 1024", values, "examples/core-s")
    medians = {model: statistics.median(values) for model, values in rates.items()}
    result.bars["train_rate_over_dpsr"] = medians["SearchGCN"] / medians["DPSR"]

    rows = np.arange(4096)

    def embeds(model: str) -> Callable[[], object]:
        opened = ModelDirectory.open(folder / model)
        encode = item_encoder(opened, store, opened.last_checkpoint())
        return lambda: encode(rows)

    for model, values in report.rates({model: embeds(model) for model in MODELS}, len(rows), 3, 2.0).items():
        result.add_samples(model, "shop", "embedding", values, "items/core-s")
    result.bars["embed_items_per_core_second"] = result.value("SearchGCN", "shop", "embedding")
    _latencies(result, folder, store)


def _train_rate(folder: Path, model: str, seed: int) -> float:
    """Returns the examples a core-second of the steps between a short and a longer training."""
    spent, steps = [], (30, 150)
    for count in steps:
        with tempfile.TemporaryDirectory() as name:
            start = report.cpu_seconds()
            dpsr("train", f"--store={folder / 'store'}", f"--config={CONFIGS / 'shop.yaml'}", f"--out={name}/model",
                 *TRAINING, *MODELS[model], f"--set=train.seed={seed}", f"--set=train.steps={count}",
                 "--set=train.batch_size=1024", "--set=train.num_title_queries=0")  # fmt: skip
            spent.append(report.cpu_seconds() - start)
    return (steps[1] - steps[0]) * 1024 / (spent[1] - spent[0])


def _latencies(result: report.Report, folder: Path, store: Store) -> None:
    asked = list(store.queries())[:200]
    unknown = [f"{text} zzz" for text in asked]
    servables = {}
    for model in MODELS:
        if not (folder / f"{model}-servable").exists():
            index = folder / f"{model}-index"
            dpsr("index", f"--model={folder / model}", f"--store={store.path}", f"--out={index}", "--overwrite")
            dpsr("export", f"--model={folder / model}", f"--index={index}", f"--out={folder / f'{model}-servable'}")
        servables[model] = LoadedServable(folder / f"{model}-servable" / "1")
    cases = {("DPSR", "in the table"): asked, ("SearchGCN", "in the table"): asked,
             ("SearchGCN", "not in the table"): unknown}  # fmt: skip
    times: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    try:
        for number in range(len(asked) * 3):
            for (model, what), texts in cases.items():
                inputs = {"query": np.array([texts[number % len(texts)]], object)}
                start = time.perf_counter()
                servables[model]("serving_default", inputs)
                times[model, what].append(1000 * (time.perf_counter() - start))
    finally:
        for servable in servables.values():
            servable.close()
    # The first calls warm up.
    medians = {case: statistics.median(values[len(asked) :]) for case, values in times.items()}
    for (model, what), median in medians.items():
        result.add(model, "shop", f"latency, query {what}", median, "ms", note="p50")
    known = medians["SearchGCN", "in the table"]
    result.bars["query_latency_over_dpsr"] = known / medians["DPSR", "in the table"]


def main(arguments: list[str]) -> None:
    """Runs the benchmark."""
    values = flags.FLAGS
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    if unknown := [part for part in values.parts if part not in PARTS]:
        raise app.UsageError(f"--parts: '{unknown[0]}' is not known, expected some of {', '.join(PARTS)}")
    seeds, data = list(map(int, values.seeds)), Path(values.data)
    result = report.Report("graph", seeds[0], report.hardware("tensorflow", "numpy"))
    with _folder(values.out) as out:
        if "gowalla" in values.parts:
            gowalla(result, data, out)
        if "gowalla_settings" in values.parts:
            gowalla_settings(result, data)
        if "shop" in values.parts:
            shop(result, seeds, out)
        if "clusters" in values.parts:
            clusters(result, seeds if values.full else seeds[:1], out)
        if "catalogue" in values.parts or values.full:
            catalogue(result, data, out, seeds[0], values.full)
        if "amazon" in values.parts or values.full:
            amazon(result, data, out, seeds[0])
        if "cost" in values.parts:
            cost(result, out, seeds[0])
    result.print(values.json)


class _folder:
    """The directory --out, or a temporary one."""

    def __init__(self, path: str | None):
        self._temporary = tempfile.TemporaryDirectory() if path is None else None
        self._path = Path(path or self._temporary.name)

    def __enter__(self) -> Path:
        self._path.mkdir(parents=True, exist_ok=True)
        return self._path

    def __exit__(self, *unused: object) -> None:
        if self._temporary:
            self._temporary.cleanup()


if __name__ == "__main__":
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    flags.DEFINE_string("data", os.environ.get("DPSR_DATA", str(beside)), "directory with the data sets")
    flags.DEFINE_string("out", None, "directory that keeps everything that is made; by default a temporary one")
    flags.DEFINE_list(
        "parts", ["gowalla", "shop", "clusters", "cost"], "parts to measure; --full adds catalogue and amazon"
    )
    flags.DEFINE_list("seeds", ["1", "2", "3"], "seeds of the shops and their trainings")
    flags.DEFINE_boolean("full", False, "whether to measure catalogues, Amazon and the clusters of all seeds too")
    flags.DEFINE_boolean("json", False, "whether to print one JSON object as the last line")
    app.run(main)
