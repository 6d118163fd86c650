"""Compares indexes that are learned with the model and indexes that are made after training, at equal size.

    python benchmarks/learned_index.py --json [--data=DIR] [--out=DIR] [--only=poeem,homedepot,...] [--full]

All methods get the same vectors, the same number of inverted lists and the same bytes an item, and FAISS searches all
of them but ScaNN's. After training: PQ, OPQ+PQ, residual codes, LSQ, RaBitQ, ScaNN. Learned (docs/learned_index.md):
reconstruction, ranking, distillation, distillation of residual codes. Bytes are those of an item's code; the number of
its list is not counted.

Parts of the comparison, by the names that --only takes:

poeem       The synthetic setting of the tutorial in JD's repository jdcomsearch/poeem: 10,000 queries and items with
            numbers of four digits, a million pairs, d 64, cosines times 30, AdaGrad 0.1, 8 lists, 8 bytes, one list
            probed. Towers and quantizer are trained together from step 16,384 on. precision@100 is the share of the
            first 100 items in which two or more digits are one of the last two digits of the query, as in the tutorial.
homedepot   Home Depot's judged queries of the dev fold, and the model of dpsr_tf/configs/homedepot.yaml.
many_items  A generated shop, with 4,096 lists: how many lists have to be probed for the same recall?
costs       What training the quantizer, a Givens step, and `dpsr index` cost.
movielens, amazon, shop: with --full only. MovieLens 1M and Amazon Beauty, of which the last items of each user are held
            out, and a generated shop with its judged queries.

In all but poeem the towers are frozen: the quantizer learns from fixed vectors, with the layer and the losses of
`dpsr train`. recall@100 is the share of the relevant items among the first 100, ann_recall@100 the share of the exact
first 100 that the index finds (the talk's precision@100 for a list of 100 results). Intervals are 95 % intervals over
the queries. --full adds sizes, methods that encode slowly, all objectives for 32 bytes, more probes, three seeds, a
million items, and costs of the shop.

DIR holds homedepot/, movielens/ml-1m-lightgcn/ and amazon_s3rec/ (docs/adapters.md). It is $DPSR_DATA by default, or
else ../shared/data beside the repository. Stores, models and vectors are kept in --out, and not made again.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import faiss
import numpy as np
import report
import tensorflow as tf
from absl import app, flags
from quality import dpsr

from dpsr_export import product_codes
from dpsr_tf.config import CONFIGS, QuantizerConfig
from dpsr_tf.data.store import RowsById, Store
from dpsr_tf.evaluation.judgments import Judgments
from dpsr_tf.models import encoders
from dpsr_tf.models.quantizer import Quantizer
from dpsr_tf.models.quantizer_layer import ItemCodes, QuantizerLayer, TeacherItems, quantizer_loss
from dpsr_tf.training import quantizer_start

v1 = tf.compat.v1

K = 100
OBJECTIVES = ("reconstruction", "ranking", "distillation")
REPOSITORY = Path(__file__).resolve().parent.parent
# Vectors that rotation and codebooks start from.
_SAMPLE = 32_768
_BATCH = 128
# Held-out queries that are asked of one data set.
_MOST_QUERIES = 10_000
# Cells of the largest table that tells which items a query has found.
_CELLS = 1 << 26

FLAGS = flags.FLAGS


# Data


@dataclasses.dataclass(frozen=True)
class Workload:
    """Vectors of one model. Rows are positions in `items`.

    Attributes:
        name: name of the data set.
        items: unit vectors, float32 [n, d].
        log: vectors of the log's queries, float32 [t, d].
        pairs: row of the query and row of the item of each positive pair of the log, int64 [p, 2].
        asked: vectors of the judged queries, float32 [q, d].
        relevant: rows of the relevant items of each of them.
        lists: number of inverted lists.
        temperature: the temperature that the model was trained with.
        folder: keeps quantizers of the vectors, if there is one.
        centroids: the coarse centroids that all starts of a seed share. K-means of 4,096 lists takes a minute.
    """

    name: str
    items: np.ndarray
    log: np.ndarray
    pairs: np.ndarray
    asked: np.ndarray
    relevant: list[np.ndarray]
    lists: int
    temperature: float
    folder: Path | None = None
    centroids: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def exact(self) -> np.ndarray:
        """The K best items of each judged query by exact search, int64 [q, K]."""
        return best(self.asked, self.items, K)

    @functools.cached_property
    def teacher(self) -> np.ndarray:
        """The 200 best items of each query of the log by exact search, int64 [t, 200]."""
        return best(self.log, self.items, 200)


def best(queries: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """Returns the rows of the k items with the largest products: int64 [n, k]."""
    return faiss.knn(queries, items, min(k, len(items)), metric=faiss.METRIC_INNER_PRODUCT)[1]


def workload(
    name: str, store_path: Path, model: Path, judgments: Judgments, lists: int, temperature: float
) -> Workload:
    """Embeds items, queries of the log and judged queries. Vectors are kept beside the model."""
    kept = model / "vectors.npz"
    if kept.exists():
        with np.load(kept) as file:
            found = dict(file)
    else:
        store = Store(store_path)
        embed = encoders.query_encoder(model, store)

        def encode(texts: Sequence[str]) -> np.ndarray:
            return np.concatenate([embed(texts[i : i + 4096], None)[:, 0] for i in range(0, len(texts), 4096)])

        row_of = RowsById(store.items()["id"])
        relevant = [row_of(np.array(items)) for items in judgments.relevant]
        found = {
            "items": encoders.item_embeddings(model, store),
            "log": encode(list(store.queries())),
            "pairs": _pairs(store),
            "asked": encode(judgments.queries),
            "relevant": np.concatenate(relevant),
            "splits": np.cumsum([len(rows) for rows in relevant]),
        }
        np.savez(kept, **found)
    relevant = np.split(found["relevant"], found["splits"][:-1])
    vectors = (found["items"], found["log"], found["pairs"], found["asked"], relevant)
    return Workload(name, *vectors, lists, temperature, model)


def _pairs(store: Store) -> np.ndarray:
    """Returns the row of the query, over all shards, and the row of the item of each positive pair: int64 [p, 2]."""
    found, first = [], 0
    for shard in store.interactions():
        counts = np.diff(shard["positive.splits"])
        found.append(np.stack([first + np.repeat(np.arange(len(counts)), counts), shard["positive.item"]], axis=1))
        first += len(counts)
    return np.concatenate(found).astype(np.int64)


# Learned quantizers


def config_of(data: Workload, code_bytes: int, objective: str, **changes: Any) -> QuantizerConfig:
    """Returns the config of a quantizer with 8 bits a code."""
    return QuantizerConfig(
        sub_spaces=code_bytes, lists=data.lists, objective=objective, warmup_items=1 << 20, **changes
    )


def kept_quantizer(data: Workload, name: str, make: Callable[[], Quantizer]) -> Quantizer:
    """Returns make(), or reads the quantizer of this name from the workload's folder."""
    if data.folder is None:
        return make()
    path = data.folder / f"quantizer_{data.lists}_{name}.npz"
    if not path.exists():
        partial = path.with_suffix(".part.npz")
        np.savez(partial, *make().arrays)
        os.replace(partial, path)
    with np.load(path) as file:
        return Quantizer.of_arrays(file.values())


def kept_start(data: Workload, code_bytes: int, kind: str, seed: int) -> Quantizer:
    """Returns start_of(...), or reads it from the workload's folder."""
    return kept_quantizer(data, f"{code_bytes}_{kind}_{seed}", lambda: start_of(data, code_bytes, kind, seed))


def kept_learned(
    data: Workload, code_bytes: int, objective: str, seed: int, start: Quantizer, how: Learning
) -> Quantizer:
    """Returns learn(...), or reads it from the workload's folder."""
    name = f"{code_bytes}_{'residual_' if start.encoder else ''}{objective}_{seed}"
    return kept_quantizer(data, name, lambda: learn(data, code_bytes, objective, seed, start, how))


def start_of(data: Workload, code_bytes: int, kind: str, seed: int) -> Quantizer:
    """Returns the quantizer before training: lists from all vectors, rotation and codebooks from a sample.

    `kind` is the rotation of product codes, or "residual" for residual codes.
    """
    generator = np.random.default_rng(seed)
    vectors = data.items[generator.permutation(len(data.items))[: max(_SAMPLE, 32 * data.lists)]]
    if seed not in data.centroids:
        data.centroids[seed] = quantizer_start.coarse_centroids(vectors, data.lists, seed)
    changes = {"codes": kind, "rotation": "none"} if kind == "residual" else {"rotation": kind}
    config = config_of(data, code_bytes, "reconstruction", **changes)
    return quantizer_start.fit(vectors, config, seed, data.centroids[seed])


@dataclasses.dataclass(frozen=True)
class Learning:
    """How a quantizer learns from fixed vectors.

    Attributes:
        steps: number of steps.
        queries: number of queries in a batch.
        candidates: number of items drawn for each of them from its exact best 200.
        shared_items: number of items of all queries of the batch that are candidates of each of them.
        random_items: number of random items that are candidates of all queries of the batch.
        temperature: temperature of distillation as a multiple of the one that the model was trained with.
        rate: learning rate of coarse centroids and codebooks, which falls to zero as half a cosine.
    """

    steps: int = 1000
    queries: int = _BATCH
    candidates: int = 8
    shared_items: int = 380
    random_items: int = 128
    temperature: float = 0.5
    rate: float = 1e-3


def learn(
    data: Workload, code_bytes: int, objective: str, seed: int, start: Quantizer, how: Learning = Learning()
) -> Quantizer:
    """Trains a quantizer with frozen towers, with the layer and the loss of `dpsr train`.

    Distillation sees queries of the log. The candidates of a query are items drawn from its exact best 200, and items
    that all queries of a batch share: some of the other queries' items, and random ones. Ranking is the softmax loss
    over the items of the batch, on pairs of the log, for T(items) and for the coarse centroids. Reconstruction sees
    random items. No judgment of a measured query is read.
    """
    changes: dict[str, Any] = {"codes": "residual", "rotation": "none"} if start.encoder else {}
    config = config_of(data, code_bytes, objective, learning_rate=how.rate, coarse_learning_rate=how.rate, **changes)
    codes = ItemCodes(*product_codes.encode(start, data.items)) if start.encoder else None
    generator = np.random.default_rng(seed)
    tau = data.temperature * (how.temperature if objective == "distillation" else 1)

    def batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns query vectors [b, d], rows of items [n], and rows of the teacher's items of each query [b, c]."""
        if objective == "ranking":
            pairs = data.pairs[generator.integers(0, len(data.pairs), 4 * how.queries)]
            return data.log[pairs[:, 0]], pairs[:, 1], nothing
        rows = generator.integers(0, len(data.log), how.queries)
        if objective == "distillation":
            places = generator.random((how.queries, data.teacher.shape[1])).argsort(axis=1)[:, : how.candidates]
            drawn = np.take_along_axis(data.teacher[rows], places, axis=1)
            # Items of other queries are harder than random ones. quantizer_loss takes all of fewer than 512.
            of_others = generator.permutation(np.unique(drawn))[: how.shared_items]
            chosen = generator.integers(0, len(data.items), how.random_items)
            return data.log[rows], np.concatenate([of_others, chosen]), drawn
        return data.log[rows], generator.integers(0, len(data.items), how.queries * how.candidates), nothing

    nothing = np.zeros((how.queries, 0), np.int64)
    graph = tf.Graph()
    with graph.as_default():
        d = data.items.shape[1]
        query, items = (v1.placeholder(tf.float32, [None, d]) for _ in range(2))
        rows, taught_rows = (v1.placeholder(tf.int64, [None] * rank) for rank in (1, 2))
        taught = v1.placeholder(tf.float32, [None, None, d])
        factor = v1.placeholder(tf.float32, [])
        layer = QuantizerLayer(config, d, start, codes)
        if objective == "ranking":
            quantized, labels = layer(items, rows), tf.range(tf.shape(query)[0])
            scores = [tf.matmul(query, each, transpose_b=True) / tau for each in (quantized.full, quantized.coarse)]
            losses = [tf.nn.sparse_softmax_cross_entropy_with_logits(labels, of_one) for of_one in scores]
            loss = tf.reduce_mean(tf.add_n(losses))
        else:
            given = TeacherItems(taught_rows, taught, tf.ones_like(taught_rows, tf.bool))
            loss, _ = quantizer_loss(config, layer, query[:, tf.newaxis], items, given, tau, rows)
        step = layer.minimize(loss, factor)
        initialize = v1.global_variables_initializer()
    with v1.Session(graph=graph) as session:
        session.run(initialize)
        for number in range(how.steps):
            vectors, chosen, drawn = batch()
            feeds = {query: vectors, items: data.items[chosen], rows: chosen}
            feeds |= {taught_rows: drawn, taught: data.items[drawn]}
            falling = 0.5 * (1 + np.cos(np.pi * number / how.steps))
            session.run(step, feeds | {factor: falling})
        return layer.quantizer(session)


# Indexes


Search = Callable[[np.ndarray, int], np.ndarray]  # (queries [n, d], probes) -> rows [n, K]


def faiss_search(index: faiss.Index) -> Search:
    """Returns the search of an IVF index, which may be behind a transform."""
    ivf = faiss.extract_index_ivf(index)

    def search(queries: np.ndarray, probes: int) -> np.ndarray:
        ivf.nprobe = min(probes, ivf.nlist)
        return index.search(np.ascontiguousarray(queries), K)[1]

    return search


def of_quantizer(data: Workload, quantizer: Quantizer) -> Search:
    """Returns the search of the index of a quantizer, which `dpsr index` would make."""
    return faiss_search(product_codes.build(quantizer, product_codes.QUANTIZER, data.items)[0])


def of_factory(data: Workload, codec: str, start: Quantizer) -> Search:
    """Returns the search of an IVF index with the lists of `start` and another codec: RQ8x8, LSQ8x8, RaBitQ."""
    d = data.items.shape[1]
    index = faiss.index_factory(d, f"IVF{data.lists},{codec}", faiss.METRIC_INNER_PRODUCT)
    ivf = faiss.extract_index_ivf(index)
    coarse = faiss.IndexFlatIP(d)
    # RaBitQ wants vectors that are rotated at random; the rotation that OPQ found is one as good as another.
    vectors, centroids = data.items @ start.rotation, start.coarse
    coarse.add(np.ascontiguousarray(centroids))
    ivf.quantizer, ivf.own_fields = coarse, False  # another index may use `coarse` after this one has ended
    index.train(vectors[:: -(-len(vectors) // _SAMPLE)])
    lists = faiss.knn(vectors, centroids, 1)[1][:, 0]
    add_in_lists(ivf, vectors, lists)
    if codec != "RaBitQ":
        # With an additive quantizer, FAISS computes a table of scores for each list of each query. With thousands of
        # lists this takes minutes. An index of the decoded vectors finds the same items in seconds.
        ivf.make_direct_map()
        decoded = ivf.reconstruct_n(0, len(vectors))
        index = faiss.IndexIVFFlat(coarse, d, data.lists, faiss.METRIC_INNER_PRODUCT)
        add_in_lists(index, decoded, lists)
    plain = faiss_search(index)
    # `coarse` must live as long as the index.
    return lambda queries, probes, _keep=coarse: plain(queries @ start.rotation, probes)


def add_in_lists(ivf: Any, vectors: np.ndarray, lists: np.ndarray) -> None:
    """Adds vectors to the lists [n] that are given, not to those that the index would choose."""
    vectors, lists = np.ascontiguousarray(vectors), np.ascontiguousarray(lists)
    ivf.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(lists))


def of_scann(data: Workload, code_bytes: int) -> Search | None:
    """Returns ScaNN's search with 4-bit codes of the same size; None if ScaNN is not installed."""
    try:
        scann: Any = importlib.import_module("scann")
    except ImportError:
        return None
    width = data.items.shape[1] // (2 * code_bytes)
    if not width:
        return None
    builder = scann.scann_ops_pybind.builder(data.items, K, "dot_product")
    builder = builder.tree(num_leaves=data.lists, num_leaves_to_search=1, training_sample_size=len(data.items))
    searcher = builder.score_ah(width, anisotropic_quantization_threshold=0.2).build()

    def search(queries: np.ndarray, probes: int) -> np.ndarray:
        return searcher.search_batched(queries, K, K, min(probes, data.lists))[0].astype(np.int64)

    return search


def methods(data: Workload, code_bytes: int, seed: int, full: bool, how: Learning) -> Iterator[tuple[str, Search]]:
    """Yields the indexes of one size by name."""
    all_methods = full or code_bytes <= 8  # more codes take longer
    opq = kept_start(data, code_bytes, "opq", seed)
    yield "opq", of_quantizer(data, opq)
    for objective in reversed(OBJECTIVES) if all_methods else ("distillation",):
        yield objective, of_quantizer(data, kept_learned(data, code_bytes, objective, seed, opq, how))
    if all_methods:
        residual = kept_start(data, code_bytes, "residual", seed)
        yield "residual_codes", of_quantizer(data, residual)
        # More codes leave smaller errors, which the larger rate would only add to.
        slowly = dataclasses.replace(how, rate=1e-4) if code_bytes > 8 else how
        learned = kept_learned(data, code_bytes, "distillation", seed, residual, slowly)
        yield "distillation_residual", of_quantizer(data, learned)
    if full:
        yield "pq", of_quantizer(data, kept_start(data, code_bytes, "none", seed))
        yield "residual_quantizer", of_factory(data, f"RQ{code_bytes}x8", opq)
        if code_bytes <= 8:
            yield "lsq", of_factory(data, f"LSQ{code_bytes}x8", opq)
        # One bit for each dimension and two numbers of 4 bytes.
        if code_bytes == data.items.shape[1] // 8 + 8:
            yield "rabitq", of_factory(data, "RaBitQ", opq)
    scann = of_scann(data, code_bytes) if all_methods else None
    if scann:
        yield "scann", scann


# Measuring


def share_found(found: np.ndarray, wanted: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Returns the share of the wanted rows of each query that are in its row of `found` [q, K]: float64 [q]."""
    counts = np.array([len(rows) for rows in wanted])
    ends, rows = np.cumsum(counts), np.concatenate(wanted)
    query = np.repeat(np.arange(len(counts)), counts)
    hits = np.empty(len(rows), bool)
    width = int(max(found.max(), rows.max())) + 2  # the last column is that of -1, nothing found
    block = max(1, _CELLS // width)
    for begin in range(0, len(found), block):
        marks = np.zeros((len(found[begin : begin + block]), width), bool)
        np.put_along_axis(marks, found[begin : begin + block], True, axis=1)
        part = slice(ends[begin] - counts[begin], ends[min(begin + block, len(ends)) - 1])
        hits[part] = marks[query[part] - begin, rows[part]]
    return np.bincount(query, hits, len(counts)) / counts


def interval(values: np.ndarray, seed: int = 1) -> list[float]:
    """Returns the 95 % bootstrap interval of a mean."""
    draws = np.random.default_rng(seed).integers(0, len(values), (1000, len(values)))
    return [round(float(bound), 4) for bound in np.percentile(values[draws].mean(axis=1), [2.5, 97.5])]


def add(result: report.Report, impl: str, workload_name: str, metric: str, per_query: list[np.ndarray]) -> float:
    """Adds a row with the mean over seeds, its interval from the first one. Returns the mean."""
    values = [float(one.mean()) for one in per_query]
    low, high = interval(per_query[0])
    note = f"95 % interval {low:.3f} to {high:.3f}" + (f", {len(values)} seeds" if len(values) > 1 else "")
    more = {"interval": [low, high], "values": values, "queries": len(per_query[0]), "note": note}
    result.add(impl, workload_name, metric, statistics.fmean(values), "", **more)
    print(f"{workload_name} {impl} {metric} {statistics.fmean(values):.4f}", file=sys.stderr, flush=True)
    return statistics.fmean(values)


def compare(
    result: report.Report,
    make: Callable[[int], Workload],
    sizes: Sequence[int],
    seeds: Sequence[int],
    full: bool,
    how: Learning = Learning(),
) -> None:
    """Measures all methods of all sizes on a workload, with all lists probed and with few."""
    found: dict[tuple[str, str, str], list[np.ndarray]] = {}

    def keep(impl: str, name: str, data: Workload, rows: np.ndarray) -> None:
        found.setdefault((impl, name, "recall@100"), []).append(share_found(rows, data.relevant))
        found.setdefault((impl, name, "ann_recall@100"), []).append(share_found(rows, data.exact))

    for seed in seeds:
        data = make(seed)
        keep("exact", f"{data.name} float", data, data.exact)
        for size in sizes:
            for impl, search in methods(data, size, seed, full, how):
                probes = [1, 2, 5, 10, 20, 30, 50, data.lists] if full else [10, data.lists]
                for count in sorted({min(count, data.lists) for count in probes}):
                    where = "all lists" if count == data.lists else f"{count} of {data.lists} lists"
                    keep(impl, f"{data.name} {size} bytes, {where}", data, search(data.asked, count))
    for (impl, name, metric), per_query in found.items():
        add(result, impl, name, metric, per_query)


# Poeem's synthetic setting


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """The setting of the tutorial. A query is a number of four digits, of which the last two count, as an item is."""

    numbers: int = 10_000
    pairs: int = 1_000_000
    epochs: int = 3
    batch: int = 128
    dim: int = 64
    scale: float = 30.0
    rate: float = 0.1
    lists: int = 8
    sub_spaces: int = 8
    warm_up: int = 16_384

    @property
    def steps(self) -> int:
        """Number of steps of a training."""
        return self.epochs * (self.pairs // self.batch)

    def log(self, seed: int) -> np.ndarray:
        """Draws the pairs, int64 [pairs, 2]: the query's last two digits are two of the item's four, in any order."""
        generator = np.random.default_rng(seed)
        item = generator.integers(0, self.numbers, self.pairs)
        digits = item[:, np.newaxis] // np.array([1000, 100, 10, 1]) % 10
        places = generator.random(digits.shape).argsort(axis=1)[:, :2]
        last = np.take_along_axis(digits, places, axis=1) @ np.array([10, 1])
        query = generator.integers(0, self.numbers // 100, self.pairs) * 100 + last
        return np.stack([query, item], axis=1)

    def precision(self, found: np.ndarray) -> np.ndarray:
        """Returns the share of right items for each query 0 to numbers - 1, from rows [numbers, K]."""
        query = np.arange(self.numbers)[:, np.newaxis, np.newaxis]
        digits = found[:, :, np.newaxis] // np.array([1000, 100, 10, 1]) % 10
        same = (digits == query % 10) | (digits == query // 10 % 10)
        return ((same.sum(axis=2) >= 2) & (found >= 0)).mean(axis=1)


class SyntheticModel:
    """Two tables of embeddings, trained with the softmax loss over the items of the batch, as the tutorial does.

    With an objective, a quantizer is trained with them. The loss of all but `distillation` is the model's loss with
    T(items) in the place of items, and

    poeem            the distortion of the items of the batch, as in Poeem,
    reconstruction   the same distortion, and the model's loss with the coarse centroids in the place of items,
    ranking          the latter only.

    `distillation` is the model's loss over the float vectors, and the quantizer's loss over the items of the batch.
    Gradients of T(items) and of the coarse centroids pass to the items as if nothing had been quantized.
    """

    def __init__(self, setting: Synthetic, seed: int, objective: str = "", start: Quantizer | None = None):
        self._setting = setting
        self._graph = tf.Graph()
        with self._graph.as_default():
            v1.set_random_seed(seed)
            first = v1.truncated_normal_initializer(stddev=setting.dim**-0.5)
            shape = (setting.numbers, setting.dim)
            self._tables = [v1.get_variable(name, shape, initializer=first) for name in ("query", "item")]
            self._pairs = v1.placeholder(tf.int64, [None, 2])
            self._factor = v1.placeholder(tf.float32, [])
            query, items = (
                tf.nn.l2_normalize(tf.gather(table, self._pairs[:, side]), axis=1)
                for side, table in enumerate(self._tables)
            )
            b = tf.shape(query)[0]

            def model_loss(vectors: tf.Tensor) -> tf.Tensor:
                scores = setting.scale * tf.matmul(query, vectors, transpose_b=True)
                of_queries = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=tf.range(b), logits=scores)
                return tf.reduce_sum(of_queries)

            if not objective:
                loss = model_loss(items)
            else:
                known = objective if objective in OBJECTIVES else "reconstruction"
                config = QuantizerConfig(sub_spaces=setting.sub_spaces, lists=setting.lists, objective=known)
                self.layer = QuantizerLayer(config, setting.dim, start)
                if objective == "distillation":
                    rows, tau = self._pairs[:, 1], 1 / setting.scale
                    of_mean, _ = quantizer_loss(config, self.layer, query[:, tf.newaxis], items, None, tau, rows)
                    loss = model_loss(items) + of_mean * tf.cast(b, tf.float32)
                else:
                    fixed = tf.stop_gradient(items)
                    quantized = self.layer(fixed)
                    loss = model_loss(quantized.full + items - fixed)
                    if objective != "poeem":
                        loss += model_loss(quantized.coarse + items - fixed)
                    if objective != "ranking":
                        loss += tf.reduce_sum((quantized.full - fixed) ** 2)
            steps = [v1.train.AdagradOptimizer(setting.rate).minimize(loss, var_list=self._tables)]
            if objective:
                steps.append(self.layer.minimize(loss, self._factor))
            self._step = tf.group(*steps)
            initialize = v1.global_variables_initializer()
        self._session = v1.Session(graph=self._graph)
        self._session.run(initialize)

    def train(self, log: np.ndarray, first: int, last: int, falling: bool = False) -> None:
        """Takes the steps `first` to `last` - 1. `falling`: the quantizer's rates fall as half a cosine."""
        size = self._setting.batch
        of_epoch = len(log) // size
        for step in range(first, last):
            begin = step % of_epoch * size
            factor = 0.5 * (1 + np.cos(np.pi * (step - first) / (last - first))) if falling else 1.0
            self._session.run(self._step, {self._pairs: log[begin : begin + size], self._factor: factor})

    def state(self) -> dict[str, np.ndarray]:
        """Returns the values of tables and sums of AdaGrad by name."""
        with self._graph.as_default():
            variables = [variable for variable in v1.global_variables() if not variable.name.startswith("quantizer")]
        return dict(zip((v.op.name for v in variables), self._session.run(variables), strict=True))

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Sets the values of `state` of another model."""
        with self._graph.as_default():
            for variable in v1.global_variables():
                if variable.op.name in state:
                    variable.load(state[variable.op.name], self._session)

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns unit vectors of all queries and items, float32 [numbers, dim] each."""
        tables = self._session.run(self._tables)
        queries, items = (table / np.linalg.norm(table, axis=1, keepdims=True) for table in tables)
        return queries, items

    def quantizer(self) -> Quantizer:
        """Returns the trained quantizer."""
        return self.layer.quantizer(self._session)


def poeem(result: report.Report, seeds: Sequence[int], setting: Synthetic) -> None:
    """Trains and measures the indexes of Poeem's synthetic setting."""
    found: dict[str, list[np.ndarray]] = {}

    def keep(impl: str, rows: np.ndarray) -> None:
        found.setdefault(impl, []).append(setting.precision(rows))
        print(f"poeem {impl} {found[impl][-1].mean():.4f}", file=sys.stderr, flush=True)

    for seed in seeds:
        log = setting.log(seed)
        model = SyntheticModel(setting, seed)
        warm_up = min(setting.warm_up, setting.steps * 7 // 10)
        model.train(log, 0, warm_up)
        state, (_, items) = model.state(), model.vectors()
        model.train(log, warm_up, setting.steps)
        plain = functools.partial(
            Workload,
            "poeem",
            pairs=log,
            relevant=[],
            lists=setting.lists,
            temperature=1 / setting.scale,
        )
        queries, finished = model.vectors()
        data = plain(items=finished, log=queries, asked=queries)
        keep("exact", data.exact)
        for rotation, impl in (("none", "pq"), ("opq", "opq")):
            after = start_of(data, setting.sub_spaces, rotation, seed)
            keep(impl, of_quantizer(data, after)(queries, 1))
        start = start_of(plain(items=items, log=queries, asked=queries), setting.sub_spaces, "opq", seed)
        for objective in ("poeem", *OBJECTIVES):
            joint = SyntheticModel(setting, seed, objective, start)
            joint.restore(state)
            joint.train(log, warm_up, setting.steps, falling=True)
            queries, items_now = joint.vectors()
            data = plain(items=items_now, log=queries, asked=queries)
            keep(objective, of_quantizer(data, joint.quantizer())(queries, 1))
    means = {}
    for impl, per_query in found.items():
        name = f"poeem {setting.sub_spaces} bytes, 1 of {setting.lists} lists" if impl != "exact" else "poeem float"
        means[impl] = add(result, impl, name, "precision@100", per_query)
    result.bars["poeem_precision100"] = max(means[objective] for objective in OBJECTIVES)
    result.bars["poeem_precision100_reconstruction"] = means["reconstruction"]


# Models of data sets


def trained(store: Path, config: str, out: Path, seed: int, *changes: str) -> Path:
    """Returns the directory of a model, and trains the model unless it is there."""
    path = out / f"{store.name}_{config}_{seed}"
    dpsr(
        "train",
        f"--store={store}",
        f"--config={CONFIGS / config}.yaml",
        f"--out={path}",
        f"--set=train.seed={seed}",
        *(f"--set={change}" for change in changes),
    )
    return path


def ingested(name: str, out: Path, *arguments: str) -> Path:
    """Returns a store, and makes it unless it is there."""
    path = out / name
    if not (path / "manifest.json").exists():
        dpsr("ingest", f"--out={path}", "--overwrite", *arguments)
    return path


def generated(name: str, out: Path, items: int) -> tuple[Path, Path]:
    """Returns the store of a generated shop and its judged queries, and makes both unless they are there."""
    shop = out / f"{name}_log"
    if not (shop / "schema.yaml").exists():
        dpsr(
            "generate",
            f"--out={shop}",
            "--overwrite",
            f"--items={items}",
            f"--users={max(100, items // 20)}",
            f"--interactions={min(3 * items, 100_000)}",
            "--types=560" if items > 50_000 else "--types=58",
            "--set=judged_queries=1000",
        )
    return ingested(name, out, f"--schema={shop / 'schema.yaml'}", f"--input={shop}"), shop / "judgments.dev.tsv"


def homedepot_data(data: Path, out: Path, lists: int, seed: int) -> Workload:
    """Returns Home Depot's vectors by the model of dpsr_tf/configs/homedepot.yaml."""
    store = ingested("homedepot", out, "--adapter=homedepot", f"--input={data / 'homedepot'}")
    model = trained(store, "homedepot", out, seed)
    judged = Judgments.read(data / "homedepot" / "judgments.dev.tsv", "search_term", "product_uid", "relevance", 2.33)
    return workload("homedepot", store, model, judged, lists, 0.07)


def cost_of_codes(result: report.Report, data: Workload, code_bytes: int, seed: int) -> None:
    """Measures what product codes and residual codes cost in CPU time: an item, and a search of 10 lists."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # others would wait actively
    for impl, kind in (("opq", "opq"), ("residual_codes", "residual")):
        quantizer = kept_start(data, code_bytes, kind, seed)
        begin = time.process_time()
        product_codes.encode(quantizer, data.items)
        of_item = (time.process_time() - begin) / len(data.items)
        search, queries = of_quantizer(data, quantizer), data.asked[:200]
        begin = time.process_time()
        for query in queries:
            search(query[np.newaxis], 10)
        of_search = (time.process_time() - begin) / len(queries)
        name = f"{data.name} {code_bytes} bytes"
        result.add(impl, name, "encode_ms", 1000 * of_item, "ms")
        result.add(impl, f"{name}, 10 of {data.lists} lists", "core_ms", 1000 * of_search, "ms")
    faiss.omp_set_num_threads(threads)


def homedepot(result: report.Report, data: Path, out: Path, seeds: Sequence[int], full: bool) -> None:
    """Measures Home Depot."""
    make = functools.cache(functools.partial(homedepot_data, data, out, HOMEDEPOT_LISTS))
    for size in (4, 8, 16, 32) if full else (8, 32):
        compare(result, make, [size], seeds, full)
    cost_of_codes(result, make(seeds[0]), 8, seeds[0])
    exact = result.value("exact", "homedepot float", "recall@100")
    found = [row for row in result.rows if row["workload"].startswith("homedepot ") and row["metric"] == "recall@100"]
    for row in found:
        result.add(row["impl"], row["workload"], "share_of_exact", row["value"] / exact, "share")
    for size in (8, 32):
        name = f"homedepot {size} bytes, all lists"
        shares = {row["impl"]: row["value"] / exact for row in found if row["workload"] == name}
        result.bars[f"homedepot_recall100_{size}_bytes_over_float_opq"] = shares["opq"]
        learned = [share for impl, share in shares.items() if impl.startswith(OBJECTIVES)]
        result.bars[f"homedepot_recall100_{size}_bytes_over_float"] = max(learned)


def shop_data(out: Path, items: int, lists: int, steps: int, seed: int) -> Workload:
    """Returns a generated shop's vectors by a model of dpsr_tf/configs/shop.yaml."""
    name = f"shop_{items}"
    store, judgments = generated(name, out, items)
    temperature = 0.07
    softmax = ["loss=softmax", f"softmax_temperature={temperature}", "num_hard_negatives=0", f"steps={steps}"]
    changes = [f"train.{change}" for change in softmax]
    model = trained(store, "shop", out, seed, *changes)
    judged = Judgments.read(judgments, "query", "item", "grade", 1.0)
    return workload(name, store, model, judged, lists, temperature)


def held_out_data(
    name: str, adapter: str, source: Path, out: Path, lists: int, changes: Sequence[str], seed: int
) -> Workload:
    """Returns the vectors of a data set whose held-out interactions are what is relevant.

    Of more queries than _MOST_QUERIES a sample is asked, the same for all seeds.
    """
    store = ingested(name, out, f"--adapter={adapter}", f"--input={source}")
    model = trained(store, "movielens", out, seed, *changes)
    judgments = Judgments.of_held_out(Store(store), "all")
    if len(judgments.queries) > _MOST_QUERIES:
        chosen = np.random.default_rng(0).choice(len(judgments.queries), _MOST_QUERIES, replace=False)
        judgments = judgments.take(np.sort(chosen).tolist())
    return workload(name, store, model, judgments, lists, 0.1)


def many_items(
    result: report.Report, out: Path, seeds: Sequence[int], items: int, lists: int, steps: int, how: Learning
) -> None:
    """Measures how many lists have to be probed, learned ones and those of k-means, with 16 bytes an item."""
    size, fixed = 16, min(30, lists)
    counts = sorted({min(lists, count) for count in (*range(1, 16), 20, 25, 30, 50)})
    ratios: dict[str, list[float]] = {"recall@100": [], "ann_recall@100": []}
    for seed in seeds:
        data = shop_data(out, items, lists, steps, seed)
        start = kept_start(data, size, "opq", seed)
        learned = kept_learned(data, size, "distillation", seed, start, how)
        recalls: dict[tuple[str, str], dict[int, float]] = {}
        for impl, quantizer in (("opq", start), ("distillation", learned)):
            search = of_quantizer(data, quantizer)
            for probes in counts:
                rows = search(data.asked, probes)
                for metric, wanted in (("recall@100", data.relevant), ("ann_recall@100", data.exact)):
                    name = f"{data.name} {size} bytes, {probes} of {lists} lists"
                    mean = add(result, impl, name, metric, [share_found(rows, wanted)])
                    recalls.setdefault((impl, metric), {})[probes] = mean
        for metric, of_seeds in ratios.items():
            aim = recalls["opq", metric][fixed]
            enough = [probes for probes, recall in recalls["distillation", metric].items() if recall >= aim]
            of_seeds.append((enough[0] if enough else lists) / fixed)
    result.bars["nprobe_ratio_at_equal_recall"] = statistics.fmean(ratios["recall@100"])
    name = f"shop_{items} {size} bytes, {lists} lists"
    result.add("distillation", name, "nprobe_ratio_at_equal_ann_recall", statistics.fmean(ratios["ann_recall@100"]), "")


# Costs


def givens_over_svd(result: report.Report, dims: Sequence[int]) -> None:
    """Measures a Givens step, and the SVD of Procrustes that OPQ and Poeem take instead, in CPU time."""
    for d in dims:
        generator = np.random.default_rng(1)
        rotation = np.linalg.qr(generator.standard_normal((d, d)))[0].astype(np.float32)
        gradient = generator.standard_normal((d, d)).astype(np.float32)
        graph = tf.Graph()
        with graph.as_default():
            config = QuantizerConfig(sub_spaces=1, rotation="givens", rotation_learning_rate=1e-3)
            layer = QuantizerLayer(config, d, Quantizer(rotation, np.zeros((1, d)), np.zeros((1, 256, d))))
            given = v1.placeholder(tf.float32, [d, d])
            givens = layer.minimize(tf.reduce_sum(given * layer.variables[0]))
            initialize = v1.global_variables_initializer()
        with v1.Session(graph=graph) as session:
            session.run(initialize)
            step = session.make_callable(givens, [given])
            passes: dict[str, Callable[[], object]] = {
                "givens": functools.partial(step, gradient),
                "svd": functools.partial(np.linalg.svd, gradient),
            }
            samples = report.rates(passes, 1, repeat=5, min_seconds=0.2)
        for impl, rates in samples.items():
            result.add_samples(impl, f"rotation of {d} dimensions", "step_ms", [1000 / rate for rate in rates], "ms")
    costs = [result.value(impl, f"rotation of {dims[-1]} dimensions", "step_ms") for impl in ("givens", "svd")]
    result.bars["givens_over_svd_cost"] = costs[0] / costs[1]


def training_rate(result: report.Report, store: Path, config: str, out: Path, batch: int, steps: int) -> Path:
    """Measures the training with and without a quantizer, in examples per second of CPU time, side by side.

    Both go on from the same number of steps. A second run of each takes more steps, so that the difference of the CPU
    times is that of the steps alone. Returns the directory of the model with a quantizer.
    """
    changes: dict[str, list[str]] = {
        "plain": [],
        "quantizer": ["sub_spaces=8", "lists=1024", f"start_step={steps // 4}"],
    }
    rates: dict[str, list[float]] = {name: [] for name in changes}
    for name, values in changes.items():
        path = out / f"{store.name}_rate_{name}"
        shutil.rmtree(path, ignore_errors=True)
        seconds = []
        for last in (steps // 2, steps, 3 * steps + steps // 2):
            start = report.cpu_seconds()
            dpsr(
                "train",
                f"--store={store}",
                f"--config={CONFIGS / config}.yaml",
                f"--out={path}",
                f"--set=train.steps={last}",
                f"--set=train.checkpoint_steps={steps}",
                # The steps that are measured are those after it, with queries of the log.
                "--set=train.pretrain_steps=0",
                *(f"--set=quantizer.{value}" for value in values),
            )
            seconds.append(report.cpu_seconds() - start)
        # The first run has phase 1 in it. The other two resume, and differ by two times `steps`.
        rates[name].append(batch * 2 * steps / (seconds[2] - seconds[1]))
    for name, found in rates.items():
        result.add_samples(name, f"{store.name}, batches of {batch}", "train_rate", found, "examples/s")
    result.bars["train_rate_over_unquantized"] = rates["quantizer"][0] / rates["plain"][0]
    return out / f"{store.name}_rate_quantizer"


def index_time(result: report.Report, store: Path, model: Path, out: Path) -> None:
    """Measures `dpsr index` on a model with a quantizer: the embedding of all items, and the rest, in seconds."""
    index = out / f"{model.name}_index"
    # `--overwrite` would reuse the embeddings of an earlier run, and their time would be missing.
    shutil.rmtree(index, ignore_errors=True)
    dpsr("index", f"--model={model}", f"--store={store}", f"--out={index}")
    seconds = json.loads((index / "index.json").read_text())["seconds"]
    for part, value in seconds.items():
        result.add("dpsr index", store.name, part, value, "s")
    result.bars["index_seconds_over_embedding_seconds"] = sum(seconds.values()) / seconds["embeddings"]


PARTS = ("poeem", "homedepot", "many_items", "costs", "movielens", "amazon", "shop")
# FAISS advises 4 to 16 times the square root of the number of items.
HOMEDEPOT_LISTS = 4096


def main(arguments: list[str]) -> None:
    """Runs the benchmark."""
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    full, quick = FLAGS.full, FLAGS.quick
    default = [part for part in PARTS if full or part in PARTS[:4]]
    parts = FLAGS.only or (["poeem", "shop", "many_items", "costs"] if quick else default)
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise app.UsageError(
            f"--only={','.join(parts)}: '{unknown[0]}' is unknown; expected some of {', '.join(PARTS)}"
        )
    data = Path(FLAGS.data or os.environ.get("DPSR_DATA") or REPOSITORY.parent / "shared" / "data")
    folders = {
        "homedepot": "homedepot",
        "costs": "homedepot",
        "movielens": "movielens/ml-1m-lightgcn",
        "amazon": "amazon_s3rec",
    }
    for part in parts:
        if part in folders and not quick and not (data / folders[part]).is_dir():
            raise app.UsageError(
                f"--data={data}: has no {folders[part]}; give the folder of the data sets, or leave '{part}' out of "
                f"--only"
            )
    seeds = [FLAGS.seed, FLAGS.seed + 1, FLAGS.seed + 2] if full else [FLAGS.seed]
    result = report.Report("learned_index", FLAGS.seed, report.hardware("tensorflow", "faiss-cpu", "numpy", "scann"))
    if find_spec("scann") is None:
        print("ScaNN is not installed (pip install scann==1.3.0), so its rows are left out", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(FLAGS.out or temporary)
        out.mkdir(parents=True, exist_ok=True)
        for part in parts:
            begin = time.perf_counter()
            run_part(part, result, data, out, seeds, full, quick)
            print(f"{part}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    result.print(FLAGS.json)


def run_part(
    part: str, result: report.Report, data: Path, out: Path, seeds: Sequence[int], full: bool, quick: bool
) -> None:
    """Runs one of PARTS."""
    sizes = (4, 8, 16, 32) if full else (8,)
    how = Learning(steps=20) if quick else Learning()
    items, lists, steps = (3_000, 64, 50) if quick else (1_000_000, 4_096, 2_000) if full else (200_000, 4_096, 2_000)
    if part == "poeem":
        poeem(result, seeds, Synthetic(pairs=20_000, epochs=1) if quick else Synthetic())
    elif part == "homedepot":
        homedepot(result, data, out, seeds, full)
    elif part == "many_items":
        many_items(result, out, seeds[:1], items, lists, steps, dataclasses.replace(how, temperature=1.0))
    elif part == "costs":
        givens_over_svd(result, (64,) if quick else (64, 256, 512))
        # The measurement of the bars comes last.
        runs: list[tuple[Path, str, int, int]] = []
        if full or quick:
            runs.append((generated(f"shop_{items}", out, items)[0], "shop", 256, 20 if quick else 500))
        if not quick:
            store = ingested("homedepot", out, "--adapter=homedepot", f"--input={data / 'homedepot'}")
            runs.append((store, "homedepot", 1024, 200))
        for store, config, batch, steps in runs:
            index_time(result, store, training_rate(result, store, config, out, batch, steps), out)
    elif part == "movielens":
        make = functools.partial(held_out_data, part, "movielens_1m_lightgcn", data / "movielens/ml-1m-lightgcn", out)
        compare(result, lambda seed: make(64, ["model.item_features=[]"], seed), sizes, seeds, full, how)
    elif part == "amazon":
        make = functools.partial(held_out_data, part, "amazon_s3rec", data / "amazon_s3rec/Beauty.txt", out)
        compare(result, lambda seed: make(256, [], seed), sizes, seeds, full, how)
    else:
        items, lists = (3_000, 64) if quick else (50_000, 1_024)
        make_shop = functools.partial(shop_data, out, items, lists, steps)
        compare(result, make_shop, sizes, seeds, full, how)


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "folder of the data sets (default: $DPSR_DATA, or ../shared/data)")
    flags.DEFINE_string("out", None, "directory that keeps stores, models and vectors (default: a temporary one)")
    flags.DEFINE_list("only", [], f"parts to run, separated by commas: {', '.join(PARTS)}")
    flags.DEFINE_integer("seed", 1, "first seed of data, models and quantizers")
    flags.DEFINE_boolean("full", False, "adds sizes, methods, probes, two more seeds and a million items; takes hours")
    flags.DEFINE_boolean("quick", False, "only tests the script, with small shops and few steps")
    flags.DEFINE_boolean("json", False, "prints one JSON object as the last line")
    app.run(main)
