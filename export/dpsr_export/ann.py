"""Approximate nearest neighbours (ANN) with FAISS: choosing an index, building it, and measuring its recall.

Vectors are float32 [n, dim], queries float32 [queries, dim]. The metric is the inner product. Labels are the positions
0 to n - 1, or -1 where an index finds nothing. Vectors may be memory-mapped: they are read in blocks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import faiss
import numpy as np

from dpsr_common.errors import CommandError
from dpsr_export import product_codes
from dpsr_tf.models.exact_search import is_repeat, top_positions

# Every report gives ann_recall@k for these k, and for the k that is served.
RECALL_AT = (10, 100, 1000)

# `auto` chooses Flat up to this number of items: comparing with all of them takes a few milliseconds.
_FLAT_ITEMS = 50_000
# From this number of lists on, k-means runs in two levels, and so does the search for the list of a vector.
_TWO_LEVEL_LISTS = 4096
# The list of a vector is looked for in this share of the sqrt(lists) groups. It is found for 994 of 1,000 vectors with
# 4,096 lists and for 98 of 100 with 16,384 or more. (With 8 groups, it was found for 92 of 100 with 32,768 lists.)
_SHARE_OF_GROUPS = 1 / 8
_MIN_GROUPS = 8
# From this number of lists on, a search finds its lists with an HNSW graph. With fewer (16,384), comparing with all
# centroids takes no longer than a graph that finds nearly all of the nearest, and it finds all of them.
_GRAPH_LISTS = 32_768
# Codes with 8 bits for each dimension seldom reach a higher recall. For a higher target `auto` starts with floats.
_SQ8_RECALL = 0.99
# Number of vectors that k-means uses for each centroid, and the smallest training sample (for PQ and SQ codes).
_POINTS_PER_CENTROID, _SAMPLE = 64, 1 << 17
_BLOCK = 1 << 18
_KMEANS_ITERATIONS = 10
# Number of vectors from which code_residual is measured.
_RESIDUAL_SAMPLE = 10_000
# A measurement of latency ends after this many searches or seconds.
_LATENCY_SEARCHES, _LATENCY_SECONDS = 200, 1.0


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An index that `auto` may choose."""

    factory: str
    bytes: int  # estimated size of the file, and of the memory of a server
    verdict: str  # why it cannot be chosen; empty if it can

    def line(self) -> str:
        """Returns a line of the table that explains the choice."""
        return f"  {self.factory:<28} {self.bytes / 1e6:>10,.1f} MB  {self.verdict or 'fits'}"


def candidates(items: int, dim: int, recall_target: float, memory: float = 0) -> list[Candidate]:
    """Returns the indexes that `auto` considers, the preferred one first.

    A Flat index is preferred while it is fast enough, otherwise about 4 sqrt(items) inverted lists. Their codes depend
    on the recall target and on the memory: 8 bits for each dimension (a quarter of the size of floats, and as fast as
    shorter codes when a thousand items are wanted), floats, or, if neither fits, product codes with a learnt rotation.

    Args:
        items: number of vectors in the index.
        dim: dimension of the vectors.
        recall_target: ann_recall that the index should reach.
        memory: bytes that the index may take. 0 means no limit.
    """
    lists = 1 << round(math.log2(max(4 * math.sqrt(items), 1)))
    graph = "_HNSW32" if lists >= _GRAPH_LISTS else ""
    # Each centroid has dim floats and, in a graph, 64 links of 4 bytes.
    centroids = lists * (4 * dim + (4 * 64 + 16 if graph else 0))
    ivf = f"IVF{lists}{graph}"
    flat = 4 * dim * items
    # Each code is stored with an id of 8 bytes. "np" skips polysemous training, which takes long and is not used here.
    codes_of_8_bits, floats = (
        (f"{ivf},SQ8", items * (dim + 8) + centroids),
        (f"{ivf},Flat", flat + 8 * items + centroids),
    )
    of_lists = [floats, codes_of_8_bits] if recall_target > _SQ8_RECALL else [codes_of_8_bits, floats]
    found = [("Flat", flat), *of_lists]
    for codes in (dim // 2, dim // 4):
        if codes >= 1 and dim % codes == 0:
            rotation = 4 * dim * dim + 4 * 256 * dim
            found.append((f"OPQ{codes},{ivf},PQ{codes}np", items * (codes + 8) + centroids + rotation))

    def verdict(factory: str, size: int) -> str:
        if factory == "Flat" and items > _FLAT_ITEMS:
            return f"compares each query with all items, slow above {_FLAT_ITEMS:,}"
        if memory and size > memory:
            return f"more than index.memory, {memory / 1e6:,.1f} MB"
        return ""

    return [Candidate(factory, size, verdict(factory, size)) for factory, size in found]


def check_device(device: str) -> None:
    """Checks that `device`, "cpu" or "gpu", can be used. Raises CommandError."""
    if device == "cpu":
        return
    if not hasattr(faiss, "StandardGpuResources"):
        raise CommandError(
            "--device=gpu: the installed FAISS does not support GPUs; install faiss-gpu instead of faiss-cpu, "
            "or leave out --device"
        )
    if faiss.get_num_gpus() == 0:
        raise CommandError("--device=gpu: FAISS finds no GPU on this machine; check nvidia-smi, or leave out --device")


def make(factory: str, dim: int) -> faiss.Index:
    """Makes an empty, untrained index. Raises CommandError if FAISS does not know the factory string."""
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise CommandError(f"FAISS refuses index.factory '{factory}' for {dim} dimensions: {_last(error)}") from None


@functools.cache
def _gpu_resources() -> Any:
    """Returns the memory and streams on the GPU that everything here shares."""
    return faiss.StandardGpuResources()


def build(vectors: np.ndarray, factory: str, device: str = "cpu", second_list: float = 0.0) -> faiss.Index:
    """Trains an index on a sample of `vectors` [n, dim] and adds all of them.

    With device "gpu" and many lists, the GPU makes the lists by k-means and finds the list of each vector. The CPU
    makes the codes, so the index need not fit into the GPU's memory. With a `second_list`, the CPU adds each vector to
    two lists (product_codes.add_in_two_lists).

    Raises:
        CommandError: FAISS refuses the factory string, there are too few vectors, the GPU fails, or the
            index cannot have second lists.
    """
    index = make(factory, vectors.shape[1])
    product_codes.check_second_list(index, second_list)
    try:
        train(index, _sample(vectors, training_sample(index)), device)
        if second_list:
            with two_level_assignment(index):
                product_codes.add_in_two_lists(index, vectors, second_list)
        else:
            add(index, lambda: blocks_of(vectors), device)
    except RuntimeError as error:
        where = " on a GPU" if device == "gpu" else ""
        raise CommandError(
            f"FAISS cannot build index.factory '{factory}' of {len(vectors):,} items{where}: {_last(error)}"
        ) from None
    return index


def training_sample(index: faiss.Index) -> int:
    """Returns the number of vectors that an index is trained on."""
    ivf = _ivf(index)
    return max(_SAMPLE, _POINTS_PER_CENTROID * ivf.nlist if ivf is not None else 0)


def code_residual(index: faiss.Index, vectors: np.ndarray) -> float | None:
    """Measures how well the codes of an index fit vectors: the drift of later ones is compared with this.

    Returns:
        The mean squared distance of a sample of `vectors` [n, dim] to what their codes stand for. None if the index has
        no lists that can be read, or no vectors are given.
    """
    ivf = _ivf(index)
    outer = faiss.downcast_index(index)
    if not len(vectors) or ivf is None or isinstance(outer, faiss.IndexRefine):
        return None
    if isinstance(faiss.downcast_index(ivf), faiss.IndexIVFFastScan):
        return None
    if ivf.d > outer.d:  # residual codes, which FAISS cannot choose
        return None
    z = _transformed(index, _sample(vectors, _RESIDUAL_SAMPLE))
    decoded = ivf.sa_decode(ivf.sa_encode(z))
    return float(np.mean(np.sum((z - decoded) ** 2, axis=1)))


def _kmeans(points: np.ndarray, count: int, device: str = "cpu") -> Any:
    """Computes unit-length centroids, as FAISS does: float32 [count, dim] of n >= count unit vectors."""
    found = faiss.Kmeans(
        points.shape[1],
        count,
        niter=_KMEANS_ITERATIONS,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=1 << 20,
        seed=1,
    )
    if device == "gpu":
        found.index = faiss.index_cpu_to_gpu(_gpu_resources(), 0, found.index)
    found.train(points)
    return found


def two_level_kmeans(vectors: np.ndarray, clusters: int) -> np.ndarray:
    """Computes unit-length centroids, float32 [clusters, dim], of n >= clusters unit vectors.

    k-means first makes sqrt(clusters) coarse clusters. Then it runs in each of them, with a number of centroids
    proportional to the number of vectors. An iteration costs O(n sqrt(clusters)) instead of O(n clusters).
    """

    coarse = _kmeans(vectors, max(1, math.isqrt(clusters)))
    _, assigned = coarse.assign(vectors)
    order = np.argsort(assigned, kind="stable")
    ends = np.cumsum(np.bincount(assigned, minlength=coarse.k))
    shares = np.diff(ends * clusters // len(vectors), prepend=0)
    parts = np.split(order, ends[:-1])
    # Because n >= clusters, no part gets more centroids than it has vectors.
    return np.vstack([_kmeans(vectors[part], int(n)).centroids for part, n in zip(parts, shares, strict=True) if n])


def train(index: faiss.Index, sample: np.ndarray, device: str = "cpu") -> None:
    """Trains an index as index.train(sample) does, but with two_level_kmeans if it has many lists."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        train(index.base_index, sample, device)
        index.refine_index.train(sample)
        index.is_trained = True
    elif isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain  # a std::vector, which the stub calls a list
        for i in range(chain.size()):
            transform = faiss.downcast_VectorTransform(chain.at(i))
            if isinstance(transform, faiss.OPQMatrix):
                transform.niter = _KMEANS_ITERATIONS  # FAISS's default of 50 takes minutes and gains little
            if not transform.is_trained:
                transform.train(sample)
            sample = transform.apply(sample)
        train(index.index, sample, device)
        index.is_trained = True
    else:
        if isinstance(index, faiss.IndexIVF):
            _train_quantizer(index, sample, device)
            if isinstance(index, faiss.IndexIVFScalarQuantizer):
                # The 8 bits of a dimension leave out the outermost two of 10,000 values. That gives smaller errors than
                # spanning all values.
                index.sq.rangestat, index.sq.rangestat_arg = faiss.ScalarQuantizer.RS_quantiles, 1e-4
            # A smaller sample is enough for the codes.
            sample = sample[:: max(1, len(sample) // _SAMPLE)]
        index.train(sample)


def _train_quantizer(index: faiss.IndexIVF, sample: np.ndarray, device: str) -> None:
    """Prepares the coarse quantizer. If there are many lists, it gets their centroids from two_level_kmeans.

    A GPU compares each vector with all centroids. That takes less time than many small k-means, and the centroids are
    better.
    """
    # Keeps FAISS from printing warnings about few training vectors: small shops have small lists.
    for trained in (index, index.pq) if isinstance(index, faiss.IndexIVFPQ) else (index,):
        trained.cp.min_points_per_centroid = 1
    quantizer = faiss.downcast_index(index.quantizer)
    if isinstance(quantizer, faiss.IndexHNSW):
        quantizer.hnsw.efConstruction = 200  # a better graph costs little, because it has few nodes
    if isinstance(quantizer, faiss.IndexIVF):
        # Residuals need the centroids, and FAISS reconstructs vectors in lists only with this map.
        quantizer.make_direct_map()
    if _TWO_LEVEL_LISTS <= index.nlist <= len(sample):
        # FAISS does not train a quantizer again that already has a centroid for each list.
        on_gpu = device == "gpu"
        centroids = _kmeans(sample, index.nlist, device).centroids if on_gpu else two_level_kmeans(sample, index.nlist)
        if not quantizer.is_trained:
            quantizer.train(centroids)
        quantizer.add(centroids)


def _sample(vectors: np.ndarray, count: int) -> np.ndarray:
    if len(vectors) <= count:
        return np.ascontiguousarray(vectors)
    rows = np.random.default_rng(1).choice(len(vectors), count, replace=False, shuffle=False)
    return vectors[np.sort(rows)]


def blocks_of(vectors: np.ndarray) -> Iterator[np.ndarray]:
    """Yields vectors [n, dim], which may be mapped, in blocks: float32 [at most 262,144, dim]."""
    for begin in range(0, len(vectors), _BLOCK):
        yield np.ascontiguousarray(vectors[begin : begin + _BLOCK])


def add(index: faiss.Index, blocks: Callable[[], Iterable[np.ndarray]], device: str = "cpu") -> None:
    """Adds vectors to a trained index, as index.add does, with less time and memory where there are many lists.

    FAISS lets a list grow by doubling, so an index can take twice the memory of its codes. Here a first pass finds the
    list of each vector, and lists get the memory that they need. A second pass encodes the vectors.

    Args:
        index: the index; where its lists are counted first, it must be empty.
        blocks: returns the vectors, float32 [n, dim] each; is called once for each pass.
        device: "cpu", or "gpu" to find the lists there, where they are counted first.
    """
    ivf = _growing_lists(index)
    if ivf is None:
        with two_level_assignment(index):
            for block in blocks():
                index.add(block)
        return
    centroids = ivf.quantizer.reconstruct_n(0, ivf.nlist)
    groups = _GpuCentroids(centroids) if device == "gpu" else _CentroidGroups(centroids)
    chosen = [groups.nearest(_transformed(index, block)) for block in blocks()]
    counts = sum(np.bincount(lists, minlength=ivf.nlist) for lists in chosen)
    lists_of: Any = ivf.invlists
    for number, count in enumerate(np.asarray(counts).tolist()):
        lists_of.resize(number, count)
        lists_of.resize(number, 0)  # the memory stays
    for block, lists in zip(blocks(), chosen, strict=True):
        z, of_vector = _transformed(index, block), lists.astype(np.int64)
        ivf.add_core(len(z), faiss.swig_ptr(z), None, faiss.swig_ptr(of_vector))
    index.ntotal = ivf.ntotal


def _growing_lists(index: faiss.Index) -> faiss.IndexIVF | None:
    """Returns the part of an index that has lists, if they are many, and if they grow by doubling."""
    outer = faiss.downcast_index(index)
    ivf = _ivf(index)
    if ivf is None or ivf.nlist < _TWO_LEVEL_LISTS or isinstance(outer, faiss.IndexRefine):
        return None
    inner = faiss.downcast_index(ivf)
    return inner if isinstance(inner, faiss.IndexIVFFlat | faiss.IndexIVFScalarQuantizer | faiss.IndexIVFPQ) else None


def _transformed(index: faiss.Index, x: np.ndarray) -> np.ndarray:
    """Returns vectors as the lists of an index see them: float32 [n, dim of the lists]."""
    outer = faiss.downcast_index(index)
    if isinstance(outer, faiss.IndexPreTransform):
        chain: Any = outer.chain  # a std::vector, which the stub calls a list
        for number in range(chain.size()):
            x = chain.at(number).apply(x)
    return np.ascontiguousarray(x, np.float32)


class _CentroidGroups:
    """Centroids in sqrt(lists) groups. The nearest centroid of a vector is looked for in the nearest groups."""

    def __init__(self, centroids: np.ndarray) -> None:
        """Groups unit-length centroids, float32 [lists, dim]."""
        dim = centroids.shape[1]
        self._of_groups = faiss.IndexFlatIP(dim)
        # Attributes keep both indexes alive: FAISS holds pointers.
        self.index = faiss.IndexIVFFlat(self._of_groups, dim, math.isqrt(len(centroids)), faiss.METRIC_INNER_PRODUCT)
        self.index.cp.min_points_per_centroid = 1
        self.index.train(centroids)
        self.index.make_direct_map()  # lets FAISS reconstruct the centroids, which residuals need
        self.index.add(centroids)
        self.index.nprobe = min(max(_MIN_GROUPS, round(_SHARE_OF_GROUPS * self.index.nlist)), self.index.nlist)
        group = self._of_groups.assign(centroids, 1)[:, 0]
        self._members = [np.flatnonzero(group == number) for number in range(self.index.nlist)]
        self._centroids = [centroids[rows] for rows in self._members]

    def nearest(self, vectors: np.ndarray) -> np.ndarray:
        """Returns the nearest centroid of each vector, int32 [n] of float32 [n, dim], as self.index.assign does.

        All vectors that look into a group are compared with it by one matrix product. With 32,768 centroids that takes
        0.7 times the time of self.index.assign, which takes vector by vector.
        """
        probes = self.index.nprobe
        groups = self._of_groups.assign(vectors, probes).ravel()
        by_group = np.argsort(groups, kind="stable") // probes
        ends = np.cumsum(np.bincount(groups, minlength=self.index.nlist))
        best = np.full(len(vectors), -np.inf, np.float32)
        found = np.zeros(len(vectors), np.int32)
        for members, centroids, rows in zip(self._members, self._centroids, np.split(by_group, ends[:-1]), strict=True):
            if len(members) and len(rows):
                scores, positions = faiss.knn(vectors[rows], centroids, 1, metric=faiss.METRIC_INNER_PRODUCT)
                better = scores[:, 0] > best[rows]
                best[rows[better]] = scores[better, 0]
                found[rows[better]] = members[positions[better, 0]]
        return found


class _GpuCentroids:
    """Centroids on the GPU, which finds the nearest one of a vector by comparing it with all of them."""

    def __init__(self, centroids: np.ndarray) -> None:
        """Copies centroids, float32 [lists, dim], to the GPU."""
        self._index = faiss.index_cpu_to_gpu(_gpu_resources(), 0, faiss.IndexFlatIP(centroids.shape[1]))
        self._index.add(centroids)

    def nearest(self, vectors: np.ndarray) -> np.ndarray:
        """Returns the nearest centroid of each vector, int32 [n] of float32 [n, dim]."""
        return self._index.search(vectors, 1)[1][:, 0].astype(np.int32)


@contextlib.contextmanager
def two_level_assignment(index: faiss.Index) -> Iterator[None]:
    """Makes index.add find the list of a vector in two levels. Finding it takes most of the time of adding."""
    ivf = _ivf(index)
    if ivf is None or ivf.nlist < _TWO_LEVEL_LISTS:
        yield
        return
    quantizer = ivf.quantizer
    groups = _CentroidGroups(quantizer.reconstruct_n(0, ivf.nlist))
    ivf.quantizer = groups.index
    try:
        yield
    finally:
        ivf.quantizer = quantizer


def _ivf(index: faiss.Index) -> faiss.IndexIVF | None:
    """Returns the part of an index that has inverted lists, or None."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        return _ivf(index.base_index)
    return faiss.try_extract_index_ivf(index)


def _probes(ivf: faiss.IndexIVF) -> Iterator[str]:
    """Returns parameters with nprobe in steps of about 1.4 and, if a graph finds the lists, the graph's efSearch."""
    graph = isinstance(faiss.downcast_index(ivf.quantizer), faiss.IndexHNSW)
    for nprobe in sorted({*itertools.takewhile(lambda n: n < ivf.nlist, _steps(1)), ivf.nlist}):
        # With FAISS's default efSearch of 16, a graph finds only half of the nearest 256 lists.
        yield f"nprobe={nprobe}" + (f",quantizer_efSearch={max(16, 2 * nprobe)}" if graph else "")


def set_parameters(index: faiss.Index, parameters: str) -> None:
    """Sets search parameters as FAISS names them: "nprobe=64,max_codes=20000", "nprobe=64,k_factor_rf=4".

    FAISS keeps a parameter that is not named, and an index file holds all of them except max_codes.

    Raises:
        CommandError: FAISS refuses them, or the index does not obey max_codes.
    """
    ivf = _ivf(index)
    if _max_codes(parameters) and ivf is not None and isinstance(faiss.downcast_index(ivf), faiss.IndexIVFFastScan):
        raise CommandError(
            f"index.parameters '{parameters}': FastScan does not obey max_codes, because it scores the codes of a list "
            f"in blocks; leave max_codes out, or choose an index.factory without FastScan"
        )
    if parameters:
        try:
            # FAISS's type stub has a wrong type for the second argument.
            faiss.ParameterSpace().set_index_parameters(index, parameters)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise CommandError(f"FAISS refuses index.parameters '{parameters}': {_last(error)}") from None


def _max_codes(parameters: str) -> str:
    """Returns "max_codes=20000" if that is one of the search parameters, otherwise ""."""
    return next((part for part in parameters.split(",") if part.strip().startswith("max_codes=")), "").strip()


@contextlib.contextmanager
def _few_threads(index: faiss.Index, queries: int) -> Iterator[None]:
    """Limits the threads of FAISS to the root of the number of queries, if it is an index of FAISS with lists.

    FAISS 1.15.1 finds wrong lists if each thread gets fewer queries than there are threads, and has 1,024 centroids or
    more: it then shares the centroids among threads that do not run. With 16,384 lists, 200 queries and 16 threads,
    ann_recall falls from 0.86 to 0.06.
    """
    threads = faiss.omp_get_max_threads()
    # Benchmarks also search the indexes of other projects.
    if isinstance(index, faiss.Index) and _ivf(index) is not None:
        faiss.omp_set_num_threads(min(threads, max(1, math.isqrt(queries))))
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def search(index: faiss.Index, queries: np.ndarray, k: int, entries: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Searches an index that holds each position `entries` times, and gives each position once.

    Returns:
        Scores float32 [queries, k] and positions int64 [queries, k], best first. Missing results are at the end, with
        position -1.
    """
    with _few_threads(index, len(queries)):
        scores, found = index.search(queries, entries * k)
    if entries == 1:
        return scores, found
    found[is_repeat(found)] = -1
    kept = np.argsort(found < 0, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, kept, axis=1), np.take_along_axis(found, kept, axis=1)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Search parameters of an index, and the recall and latency that were measured with them."""

    parameters: str
    ann_recall: dict[int, float]  # by k
    p50_ms: float  # median latency of one query at a time on one thread, with the served k
    p99_ms: float  # 99th percentile
    relevant_recall: dict[int, float] = dataclasses.field(default_factory=dict)  # by k, if there are judgments


class Exact:
    """The exact results of some queries, with which ann_recall compares."""

    def __init__(self, vectors: np.ndarray, queries: np.ndarray, ks: Sequence[int], device: str = "cpu"):
        """Computes the inner products of all queries and vectors. A k above n counts as n."""
        self._vectors, self._queries = vectors, queries
        self.ks = tuple(ks)
        largest = min(max(ks), len(vectors))
        if device == "gpu":
            scores = faiss.knn_gpu(_gpu_resources(), queries, vectors, largest, metric=faiss.METRIC_INNER_PRODUCT)[0]
        else:
            scores = faiss.knn(queries, vectors, largest, metric=faiss.METRIC_INNER_PRODUCT)[0]
        self._floors = {k: scores[:, min(k, largest) - 1] for k in ks}

    def ann_recall(self, index: faiss.Index, k: int, entries: int = 1) -> float:
        """Returns the share of the exact top k that the index finds, averaged over the queries.

        The index holds each position `entries` times.

        Scores are compared, not labels, because items with equal vectors are equally right. Scores that differ by less
        than 1e-6 are equal: that is rounding.
        """
        found = search(index, self._queries, min(k, len(self._vectors)), entries)[1]
        right = 0
        for query, labels, floor in zip(self._queries, found, self._floors[k], strict=True):
            labels = labels[labels >= 0]
            right += int((self._vectors[labels] @ query >= floor - 1e-6).sum())
        return right / found.size


def unite_heads(items: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Unites the results of all heads, int64 [n] and float32 [n]. Returns the best k items and their largest scores."""
    found, which = np.unique(items, return_inverse=True)
    largest = np.full(len(found), -np.inf, np.float32)
    np.maximum.at(largest, which, scores)
    order = top_positions(found, largest, k)
    return found[order], largest[order]


class Relevant:
    """Judged queries, with which the recall of relevant items is measured."""

    def __init__(self, vectors: np.ndarray, heads: np.ndarray, relevant: Sequence[np.ndarray], ks: Sequence[int]):
        """Keeps what it is given.

        Args:
            vectors: float32 [items, dim], the vectors that the index was built from.
            heads: float32 [queries, num_heads, dim]. Heads of zeros find nothing.
            relevant: positions of the relevant items of each query, at least one; -1 for an item that has no vector.
            ks: the k of the recall.
        """
        self._vectors, self._heads, self._relevant, self.ks = vectors, heads, relevant, tuple(ks)
        queries = np.ascontiguousarray(heads.reshape(-1, heads.shape[2]))
        scores, found = faiss.knn(queries, vectors, min(max(ks), len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)
        self.exact = {k: self._recall(scores, found, k) for k in self.ks}

    def recall(self, index: faiss.Index, k: int, entries: int = 1) -> float:
        """Returns the share of the relevant items among the k best results of all heads, averaged over the queries."""
        queries = np.ascontiguousarray(self._heads.reshape(-1, self._heads.shape[2]))
        scores, found = search(index, queries, min(k, len(self._vectors)), entries)
        return self._recall(scores, found, k)

    def _recall(self, scores: np.ndarray, found: np.ndarray, k: int) -> float:
        num_heads = self._heads.shape[1]
        there = (found[:, :k] >= 0) & self._heads.any(axis=2).reshape(-1, 1)
        shares = []
        for query, wanted in enumerate(self._relevant):
            of_query = slice(query * num_heads, (query + 1) * num_heads)
            kept = there[of_query]
            positions = unite_heads(found[of_query, :k][kept], scores[of_query, :k][kept], k)[0]
            shares.append(np.isin(wanted, positions).mean())
        return float(np.mean(shares))


def measure_settings(
    index: faiss.Index,
    exact: Exact,
    queries: np.ndarray,
    k: int,
    parameters: str = "",
    entries: int = 1,
    relevant: Relevant | None = None,
) -> list[Setting]:
    """Measures an index at several values of its search parameters: nprobe or efSearch, and k_factor_rf.

    nprobe and efSearch grow by a factor of about 1.4, from the smallest value until recall is nearly 1 or no longer
    rises. A max_codes in `parameters` holds for all of them.

    Args:
        index: the index. It is left with the parameters of the last setting.
        exact: the exact results of `queries`.
        queries: float32 [queries, dim].
        k: latency is measured with this k.
        parameters: if not empty, these search parameters are measured first.
        entries: number of times that the index holds each position.
        relevant: judged queries, if there are some.
    """
    found: list[Setting] = []
    if parameters:
        set_parameters(index, parameters)
        found.append(_measured(index, exact, queries, k, parameters, entries, relevant))
    for grid in _grids(index):
        best: list[float] = []
        for part in grid:
            setting = ",".join(filter(None, (part, _max_codes(parameters))))
            set_parameters(index, setting)
            found.append(_measured(index, exact, queries, k, setting, entries, relevant))
            best.append(min(found[-1].ann_recall.values()))
            if best[-1] > 0.998 or (len(best) > 5 and best[-1] < best[-5] + 0.002 and best[-1] > 0.1):
                break
    return found


def measure_again(
    index: faiss.Index, exact: Exact, queries: np.ndarray, k: int, parameters: Sequence[str], entries: int = 1
) -> list[Setting]:
    """Measures an index at given search parameters. The arguments are those of measure_settings."""
    found = []
    for setting in parameters:
        set_parameters(index, setting)
        found.append(_measured(index, exact, queries, k, setting, entries, None))
    return found


def choose(settings: Sequence[Setting], k: int, recall_target: float) -> Setting:
    """Returns the fastest setting whose ann_recall@k reaches the target, or else the one with the highest recall."""
    good = [setting for setting in settings if setting.ann_recall[k] >= recall_target]
    if good:
        return min(good, key=lambda setting: setting.p50_ms)
    return max(settings, key=lambda setting: (setting.ann_recall[k], -setting.p50_ms))


def _grids(index: faiss.Index) -> Iterator[Iterator[str]]:
    """Returns, for each value of k_factor_rf, settings of the other parameter in the order of their cost."""
    space = faiss.ParameterSpace()
    space.initialize(index)
    names = {space.parameter_ranges.at(i).name for i in range(space.parameter_ranges.size())}
    ivf = _ivf(index)
    if ivf is not None:
        values = list(_probes(ivf))
    elif "efSearch" in names:
        values = [f"efSearch={n}" for n in itertools.takewhile(lambda n: n <= 4096, _steps(16))]
    else:
        values = [""]
    for factor in (1, 2, 4, 8) if "k_factor_rf" in names else (None,):
        refine = "" if factor is None else f"k_factor_rf={factor}"
        yield (",".join(filter(None, (value, refine))) for value in values)


def _steps(first: int) -> Iterator[int]:
    """Returns `first`, and then 2, 3, 4, 6, 8, 12, 16 ... times `first`."""
    yield first
    for i in itertools.count():
        yield first << i + 1
        yield 3 * first << i


def _measured(
    index: faiss.Index,
    exact: Exact,
    queries: np.ndarray,
    k: int,
    parameters: str,
    entries: int,
    relevant: Relevant | None,
) -> Setting:
    recalls = {at: exact.ann_recall(index, at, entries) for at in exact.ks}
    of_relevant = {at: relevant.recall(index, at, entries) for at in relevant.ks} if relevant is not None else {}
    p50, p99 = latency(index, queries, k, entries)
    return Setting(parameters, recalls, p50, p99, of_relevant)


def latency(index: faiss.Index, queries: np.ndarray, k: int, entries: int = 1) -> tuple[float, float]:
    """Measures searches of one query at a time on one thread. Returns median and 99th percentile in ms.

    `entries` times as many results are searched for, as a server does with an index that holds each position so often.
    """
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        times: list[float] = []
        for query in queries[:_LATENCY_SEARCHES]:
            start = time.perf_counter()
            index.search(query[np.newaxis], min(entries * k, index.ntotal))
            times.append(time.perf_counter() - start)
            if sum(times) > _LATENCY_SECONDS:
                break
    finally:
        faiss.omp_set_num_threads(threads)
    p50, p99 = np.percentile(times, [50, 99]) * 1000
    return float(p50), float(p99)


def _last(error: Exception) -> str:
    """Returns the last line of a FAISS error: its message without the place in the code."""
    return str(error).strip().splitlines()[-1]
