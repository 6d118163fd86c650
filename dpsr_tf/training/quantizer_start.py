"""The start of the quantizer of a learned index: its first values, and what its distillation learns from.

When the towers have trained for `quantizer.start_step` steps, the chief computes rotation, coarse centroids and
codebooks from the embeddings of some items. For the objective `distillation` it also looks up the exact best items of
the log's queries (the teacher). Residual codes it chooses for all items. FAISS does the work, so it is needed here, and
nowhere else in training.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from dpsr_common.errors import CommandError
from dpsr_common.packed_file import FormatError, PackedFile, PackedFileWriter
from dpsr_tf.config import Config, QuantizerConfig
from dpsr_tf.data.store import Store
from dpsr_tf.models.encoders import item_encoder, query_encoder
from dpsr_tf.models.exact_search import is_repeat
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.quantizer import Encoder, Quantizer
from dpsr_tf.models.quantizer_layer import ItemCodes, TeacherItems

if TYPE_CHECKING:
    from dpsr_tf.data.examples_dataset import Batch

# The teacher's file, and that of the items' residual codes, in a model directory.
TEACHER, ITEM_CODES = "teacher.dpsr", "item_codes.dpsr"
# Rows that the towers embed at once.
_BATCH = 4096
# Items and queries whose scores are computed at once: their embeddings stay in memory meanwhile.
_ITEMS, _QUERIES = 65_536, 16_384
# Iterations of k-means.
_ITERATIONS = 25
# Iterations of OPQ, and of k-means before the first one. Each moves the rotation and then the centroids once, which on
# Home Depot (256 dimensions, 8 parts) leaves a smaller error in the same time than FAISS's 4 moves of the centroids.
_OPQ_ITERATIONS, _OPQ_FIRST = 30, 10
# Codebooks of residual codes are trained with fewer items and a smaller beam than codes are chosen with. On Home Depot
# (256 dimensions, 8 codes, 14,000 items) FAISS took 6 s with a beam of 1, 22 s with 4, for errors of 0.216 and 0.206.
_RESIDUAL_ITEMS, _RESIDUAL_BEAM = 32_768, 4


def check(config: Config, store: Store) -> None:
    """Finds out before the training begins what its quantizer could not start with.

    Raises:
        CommandError: the store has fewer items than centroids are asked for, or FAISS is not installed.
    """
    if not config.quantizer.sub_spaces:
        return
    problem = _too_few(config.quantizer, min(config.quantizer.warmup_items, store.counts.items))
    if problem:
        raise CommandError(f"{store.path}: has {store.counts.items:,} items; {problem}")
    if importlib.util.find_spec("faiss") is None:
        raise CommandError(
            f"quantizer.sub_spaces is {config.quantizer.sub_spaces}, but FAISS is not installed, which computes the "
            f"start of the quantizer; install faiss-cpu (pip install 'dpsr[faiss-cpu]'), or set quantizer.sub_spaces "
            f"to 0"
        )


def start(model: ModelDirectory, store: Store, checkpoint: str) -> tuple[Quantizer, str]:
    """Computes the quantizer that the training of a model goes on with.

    Args:
        model: the model, whose config says what the quantizer is like.
        store: its store.
        checkpoint: the checkpoint of the trained towers, "MODEL/model.ckpt-1000".

    Returns:
        The quantizer, and a line that says what it was computed from.

    Raises:
        CommandError: there are fewer items than centroids, or embeddings are not finite.
    """
    config = model.config.quantizer
    generator = np.random.default_rng(model.config.train.seed)
    rows = _sample(generator, store.counts.items, config.warmup_items)
    encode = item_encoder(model, store, checkpoint)
    vectors = _embed(encode, rows)
    found = fit(vectors, config, model.config.train.seed)
    step = int(checkpoint.rpartition("-")[2])
    return found, (
        f"quantizer starts at step {step:,}: {len(vectors):,} items, {config.lists:,} lists, {found.code_bytes} bytes "
        f"an item, reconstruction error {reconstruction_error(found, vectors):.4f}"
    )


def coarse_centroids(vectors: np.ndarray, lists: int, seed: int) -> np.ndarray:
    """Computes the coarse centroids of fit() by k-means: float32 [lists, d], of vectors float32 [n, d]."""
    import faiss

    count, d = vectors.shape
    if lists == 1:
        return vectors.mean(axis=0, keepdims=True)
    means = faiss.Kmeans(
        d, lists, niter=_ITERATIONS, seed=seed, min_points_per_centroid=1, max_points_per_centroid=count
    )
    means.train(vectors)
    assert means.centroids is not None
    return means.centroids


def fit(vectors: np.ndarray, config: QuantizerConfig, seed: int, coarse: np.ndarray | None = None) -> Quantizer:
    """Computes a quantizer of vectors without training: k-means, OPQ, and k-means of the residual's parts.

    The coarse centroids are those of k-means over the vectors. OPQ (Ge et al., 2013) finds the rotation for the
    residuals, because they are what is split into parts, and k-means is the same in all rotations. The codebooks are
    those of k-means over the parts of the rotated residuals. Residual codes have FAISS's codebooks, each of which is
    trained with what those before it leave of the residuals.

    Args:
        vectors: float32 [n, d].
        config: says how many centroids, parts and bits there are, and which rotation.
        seed: seed of all k-means. The same seed on the same machine gives the same values.
        coarse: the coarse centroids of these vectors and this seed, if they are known from another call.

    Returns:
        The quantizer. Its rotation is orthogonal to 1e-6, the identity for `rotation: none` and for
        `givens_start: identity`.

    Raises:
        CommandError: there are fewer vectors than centroids, or vectors that are not finite.
    """
    import faiss

    count, d = vectors.shape
    problem = _too_few(config, count)
    if problem:
        raise CommandError(problem)
    if not np.isfinite(vectors).all():
        bad = int((~np.isfinite(vectors).all(axis=1)).sum())
        raise CommandError(
            f"{bad:,} of {count:,} item embeddings are NaN or infinite, and no rotation of them is orthogonal; train "
            f"the towers with a lower train.learning_rate"
        )
    vectors = np.ascontiguousarray(vectors, np.float32)
    if coarse is None:
        coarse = coarse_centroids(vectors, config.lists, seed)
    nearest = faiss.knn(vectors, coarse, 1)[1][:, 0]
    residual = vectors - coarse[nearest]
    rotation = np.eye(d, dtype=np.float32)
    if config.codes == "residual":
        rq = faiss.ResidualQuantizer(d, config.sub_spaces, config.bits)
        rq.train_type, rq.max_beam_size = faiss.ResidualQuantizer.Train_default, _RESIDUAL_BEAM
        rq.cp.seed, rq.cp.niter, rq.cp.min_points_per_centroid = seed, _ITERATIONS, 1
        rq.train(np.ascontiguousarray(residual[:: -(-count // _RESIDUAL_ITEMS)]))
        codebooks = faiss.vector_to_array(rq.codebooks).reshape(config.sub_spaces, 1 << config.bits, d)
        return Quantizer(rotation, coarse, codebooks, Encoder(coarse, codebooks))
    if "opq" in (config.rotation, config.givens_start if config.rotation == "givens" else None):
        opq = faiss.OPQMatrix(d, config.sub_spaces, d)
        opq.niter, opq.niter_pq, opq.niter_pq_0 = _OPQ_ITERATIONS, 1, _OPQ_FIRST
        pq = _product_quantizer(config, d, seed)
        opq.pq = pq
        opq.train(residual)
        rotation = _orthogonal(faiss.vector_to_array(opq.A).reshape(d, d).T)
    pq = _product_quantizer(config, d, seed)
    pq.train(np.ascontiguousarray(residual @ rotation))
    codebooks = faiss.vector_to_array(pq.centroids).reshape(config.sub_spaces, 1 << config.bits, -1)
    return Quantizer(rotation, coarse @ rotation, codebooks)


def reconstruction_error(quantizer: Quantizer, vectors: np.ndarray) -> float:
    """Returns the mean of |T(x) - x|^2 over vectors x, float32 [n, d]. A vector of unit length makes it a share."""
    return float(np.mean(np.sum((quantizer(vectors) - vectors) ** 2, axis=1)))


def _product_quantizer(config: QuantizerConfig, d: int, seed: int) -> Any:
    import faiss

    pq = faiss.ProductQuantizer(d, config.sub_spaces, config.bits)
    pq.cp.niter, pq.cp.seed = _ITERATIONS, seed
    # All vectors count, and a few for each centroid are enough.
    pq.cp.min_points_per_centroid, pq.cp.max_points_per_centroid = 1, 1 << 30
    return pq


def _orthogonal(matrix: np.ndarray) -> np.ndarray:
    """Returns the orthogonal matrix that is nearest to a nearly orthogonal one, float32 [d, d]."""
    u, _, v = np.linalg.svd(matrix.astype(np.float64))
    return (u @ v).astype(np.float32)


def _too_few(config: QuantizerConfig, count: int) -> str | None:
    for key, value, centroids in (
        ("lists", f"{config.lists:,}", config.lists),
        ("bits", f"{config.bits}, which makes {1 << config.bits} codes", 1 << config.bits),
    ):
        if centroids > count:
            return (
                f"quantizer.{key} is {value}, but the start of the quantizer has {count:,} vectors; lower "
                f"quantizer.{key}, or give more items"
            )
    return None


def _embed(encode: Callable[[np.ndarray], np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Returns the embeddings of items by their rows [n]: float32 [n, d]."""
    return np.concatenate([encode(rows[begin : begin + _BATCH]) for begin in range(0, len(rows), _BATCH)])


def _sample(generator: np.random.Generator, count: int, wanted: int) -> np.ndarray:
    """Returns at most `wanted` of the numbers 0 to count - 1, ascending, int64."""
    return np.arange(count) if wanted >= count else np.sort(generator.choice(count, wanted, replace=False))


def write_item_codes(model: ModelDirectory, store: Store, checkpoint: str, quantizer: Quantizer) -> None:
    """Chooses the lists and residual codes of all items, and writes them into the model directory."""
    encode = item_encoder(model, store, checkpoint)
    with PackedFileWriter(model.path / ITEM_CODES, "item_codes") as file, _bar(store.counts.items, "codes") as bar:
        file.add("about", np.frombuffer(_about_codes(store, quantizer).encode(), np.uint8))
        for begin in range(0, store.counts.items, _ITEMS):
            rows = np.arange(begin, min(begin + _ITEMS, store.counts.items))
            lists, codes = quantizer.encode(_embed(encode, rows))
            file.append("lists", lists.astype(np.int32))
            file.append("codes", codes.reshape(-1))
            bar.update(len(rows))


def open_item_codes(model: ModelDirectory, store: Store, quantizer: Quantizer) -> ItemCodes | None:
    """Opens the codes of a model's items; None if there are none that fit the quantizer and the store."""
    try:
        file = PackedFile(model.path / ITEM_CODES, "item_codes")
    except (FileNotFoundError, FormatError):
        return None
    if file["about"].tobytes() != _about_codes(store, quantizer).encode():
        return None
    return ItemCodes(file["lists"], file["codes"].reshape(len(file["lists"]), -1))


def _about_codes(store: Store, quantizer: Quantizer) -> str:
    """Returns what codes depend on, beside the weights of the towers."""
    assert quantizer.encoder is not None
    encoder = Quantizer(quantizer.rotation, *quantizer.encoder)
    return json.dumps({"store": store.manifest["checksum"], "encoder": encoder.fingerprint})


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The exact best items of queries of the log, at the start of the quantizer.

    Attributes:
        queries: rows of queries over all interaction files, ascending, int64 [queries].
        items: rows of their best items, best first, int32 [queries, teacher_items].
        vectors: embeddings of all items, float32 [items, d].
    """

    queries: np.ndarray
    items: np.ndarray
    vectors: np.ndarray

    @staticmethod
    def is_needed(config: QuantizerConfig) -> bool:
        """Returns whether a quantizer learns from a teacher."""
        wanted = config.teacher_queries and config.candidates
        return bool(config.sub_spaces and config.objective == "distillation" and wanted)

    @staticmethod
    def write(model: ModelDirectory, store: Store, checkpoint: str) -> None:
        """Looks up the teacher of a model by exact search with a checkpoint, and writes it into the directory.

        It computes queries * heads * items * d products. Memory holds the embeddings of 65,536 items and of all
        queries, and 12 bytes for each query, head and item found.
        """
        config = model.config.quantizer
        rows, vectors = _queries(model, store, checkpoint)
        num_items = store.counts.items
        search = _Search(vectors, min(config.teacher_items, num_items))
        encode = item_encoder(model, store, checkpoint)
        with PackedFileWriter(model.path / TEACHER, "teacher") as file, _bar(num_items) as bar:
            file.add("about", np.frombuffer(_about(model, store).encode(), np.uint8))
            for begin in range(0, num_items, _ITEMS):
                block = np.arange(begin, min(begin + _ITEMS, num_items))
                found = _embed(encode, block)
                file.append("vectors", found.reshape(-1))
                search.add(begin, found)
                bar.update(len(block))
            file.add("queries", rows)
            file.add("items", search.best().astype(np.int32).reshape(-1))

    @staticmethod
    def open(model: ModelDirectory, store: Store) -> Teacher | None:
        """Opens the teacher of a model; None if there is none that fits its config and store."""
        try:
            file = PackedFile(model.path / TEACHER, "teacher")
        except (FileNotFoundError, FormatError):
            return None
        if file["about"].tobytes() != _about(model, store).encode():
            return None
        queries = file["queries"]
        vectors = file["vectors"].reshape(-1, model.config.model.embedding_dim)
        width = min(model.config.quantizer.teacher_items, len(vectors))
        return Teacher(queries, file["items"].reshape(len(queries), width), vectors)

    def draw(self, queries: np.ndarray, candidates: int, seed: Sequence[int]) -> TeacherItems:
        """Draws items for the queries of a batch.

        Args:
            queries: rows of queries, -1 for a query that is not of the log, [b].
            candidates: c, number of different items for each query.
            seed: the draw depends on it and on the place in the batch.

        Returns:
            NumPy arrays: rows int64 [b, c], embeddings float32 [t, c, d] for the t queries that the teacher knows, and
            bool [b, c], which is false for the other queries, and where there are fewer items.
        """
        count = min(candidates, self.items.shape[1])
        places = np.searchsorted(self.queries, queries)
        known = np.flatnonzero(places < len(self.queries))
        known = known[self.queries[places[known]] == queries[known]]
        rows, valid = np.zeros((len(queries), candidates), np.int64), np.zeros((len(queries), candidates), bool)
        # For all queries, so that what a place draws does not depend on the other places.
        keys = np.random.default_rng(seed).random((len(queries), self.items.shape[1]), np.float32)[known]
        chosen = np.argpartition(keys, count - 1, axis=1)[:, :count]
        rows[known, :count] = np.take_along_axis(self.items[places[known]], chosen, axis=1)
        valid[known, :count] = True
        return TeacherItems(rows, self.vectors[rows[known]], valid)

    def join(
        self, dataset: tf.data.Dataset, config: Config, first_step: int | tf.Tensor, worker: int = 0
    ) -> tf.data.Dataset:
        """Returns a dataset of {"batch": Batch, "teacher": TeacherItems}.

        The items depend on the seed, the number of the step and the worker only, so a resumed training draws the same.

        Args:
            dataset: of Batch.
            config: the config of the training.
            first_step: number of the first batch.
            worker: number of this worker.
        """
        candidates, d = config.quantizer.candidates, self.vectors.shape[1]

        def drawn(step: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, ...]:
            return tuple(self.draw(queries, candidates, (config.train.seed, worker, int(step))))

        def with_items(step: tf.Tensor, batch: Batch) -> dict[str, Any]:
            rows, vectors, valid = tf.numpy_function(
                drawn, [step, batch.query_rows], [tf.int64, tf.float32, tf.bool], stateful=False
            )
            b = batch.query_rows.shape[0]
            rows, valid = (tf.ensure_shape(part, [b, candidates]) for part in (rows, valid))
            vectors = tf.ensure_shape(vectors, [None, candidates, d])
            return {"batch": batch, "teacher": TeacherItems(rows, vectors, valid)}

        # Not by Dataset.enumerate, for which TensorFlow logs a line.
        numbered = dataset.scan(tf.cast(first_step, tf.int64), lambda step, batch: (step + 1, (step, batch)))
        return numbered.map(with_items)


class _Search:
    """Exact search for the best items of queries, over items that come in blocks.

    The score of an item is its largest inner product over the heads of a query, as in retrieval.
    """

    def __init__(self, vectors: np.ndarray, k: int):
        """`vectors` are queries, float32 [n, heads, d]; `k` is the number of items to find for each."""
        import faiss

        self._faiss, self._k, self._shape = faiss, k, vectors.shape[:2]
        flat = vectors.reshape(-1, vectors.shape[2])
        self._queries = [flat[begin : begin + _QUERIES] for begin in range(0, len(flat), _QUERIES)]
        self._heaps = [faiss.ResultHeap(len(queries), k, keep_max=True) for queries in self._queries]

    def add(self, first_row: int, items: np.ndarray) -> None:
        """Searches items, float32 [n, d], the rows of which begin with `first_row`."""
        for queries, heap in zip(self._queries, self._heaps, strict=True):
            k = min(self._k, len(items))
            scores, rows = self._faiss.knn(queries, items, k, self._faiss.METRIC_INNER_PRODUCT)
            heap.add_result(scores, rows + first_row)

    def best(self) -> np.ndarray:
        """Returns the rows of the best items of each query, best first, int64 [n, k]."""
        n, heads = self._shape
        best = np.empty((n, self._k), np.int64)
        if not n:
            return best
        for heap in self._heaps:
            heap.finalize()
        rows, scores = (
            np.concatenate([getattr(heap, name) for heap in self._heaps]).reshape(n, heads * self._k)
            for name in ("I", "D")
        )
        if heads == 1:
            return rows
        for begin in range(0, n, _BATCH):
            part = slice(begin, begin + _BATCH)
            for _ in range(2):  # by score; then once more, when an item's lower scores are out of the way
                order = np.argsort(-scores[part], axis=1, kind="stable")
                for values in (rows, scores):
                    values[part] = np.take_along_axis(values[part], order, axis=1)
                scores[part][is_repeat(rows[part])] = -np.inf
            best[part] = rows[part, : self._k]
        return best


def _queries(model: ModelDirectory, store: Store, checkpoint: str) -> tuple[np.ndarray, np.ndarray]:
    """Draws queries that have a positive pair and tokens. Returns rows int64 [n] and float32 [n, heads, d]."""
    config = model.config.quantizer
    shards = store.interactions()
    asked = [np.diff(shard["positive.splits"]) > 0 for shard in shards]
    candidates = np.flatnonzero(np.concatenate(asked))
    generator = np.random.default_rng(model.config.train.seed)
    rows = candidates[_sample(generator, len(candidates), config.teacher_queries)]
    encode = query_encoder(model.path, store, Path(checkpoint).name)
    vectors = np.empty((len(rows), model.config.model.num_heads, model.config.model.embedding_dim), np.float32)
    firsts = np.cumsum([0, *map(len, asked)])
    for begin in range(0, len(rows), _BATCH):
        part = rows[begin : begin + _BATCH]
        places = np.searchsorted(firsts, part, side="right") - 1
        texts = [_text(shards[place], row - firsts[place]) for place, row in zip(places, part, strict=True)]
        vectors[begin : begin + _BATCH] = encode(texts, None)
    known = vectors.any(axis=(1, 2))
    return rows[known], vectors[known]


def _text(shard: PackedFile, query: int) -> str:
    begin, end = shard["query_text.splits"][query : query + 2]
    return bytes(shard["query_text.bytes"][begin:end]).decode()


def _about(model: ModelDirectory, store: Store) -> str:
    """Returns what a teacher depends on, beside the weights of the towers."""
    config = model.config.quantizer
    return json.dumps(
        {
            "store": store.manifest["checksum"],
            "seed": model.config.train.seed,
            "teacher_queries": config.teacher_queries,
            "teacher_items": config.teacher_items,
        }
    )


def _bar(num_items: int, what: str = "teacher") -> tqdm:
    return tqdm(total=num_items, desc=f"{what:<14}", unit=" items", unit_scale=True)
