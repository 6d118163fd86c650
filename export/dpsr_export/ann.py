"""Approximate nearest neighbours by FAISS: which index, how it is built, and how much of the exact result it finds.

Vectors and queries are float32 [n, dim] and [queries, dim]; the metric is the inner product; labels are positions 0 to
n - 1, -1 where an index finds nothing. Vectors may be memory-mapped: they are read in blocks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import faiss
import numpy as np

from dpsr_common.errors import CommandError

# k of the ann_recall@k that every report gives, beside the k that is served.
RECALL_AT = (10, 100, 1000)

# Up to here `auto` takes Flat: reading all vectors takes few milliseconds.
_FLAT_ITEMS = 50_000
# From here on centroids come from k-means in two levels, and vectors are put into lists by a search in two levels.
_TWO_LEVEL_LISTS = 4096
# Of the sqrt(lists) groups of centroids, those looked into for a vector's list: it is found for 996 of 1,000.
_ASSIGN_NPROBE = 8
# From here on a search finds its lists by an HNSW graph. Of fewer centroids (16,384) comparing with all takes no longer
# than a graph that finds nearly all of the nearest, and finds all.
_GRAPH_LISTS = 32_768
# 8 bits a dimension seldom reach more; for a higher target `auto` starts with whole floats.
_SQ8_RECALL = 0.99
# Vectors that k-means sees for each centroid, and least of a training sample (for the codes of PQ and SQ).
_POINTS_PER_CENTROID, _SAMPLE = 64, 1 << 17
_BLOCK = 1 << 18
_KMEANS_ITERATIONS = 10
# Measuring latency: searches, and seconds, after which it ends.
_LATENCY_SEARCHES, _LATENCY_SECONDS = 200, 1.0


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An index that `auto` may choose."""

    factory: str
    bytes: int  # estimated, of the file and of the server's memory
    verdict: str  # why it is not taken; empty: it may be

    def line(self) -> str:
        """A line of the table that explains the choice."""
        return f"  {self.factory:<28} {self.bytes / 1e6:>10,.1f} MB  {self.verdict or 'fits'}"


def candidates(items: int, dim: int, recall_target: float, memory: float = 0) -> list[Candidate]:
    """What `auto` looks at, in the order of preference.

    Flat while it is fast enough. Else inverted lists, about 4 sqrt(items) of them, the codes as long as the target
    asks and the memory allows: 8 bits a dimension (a quarter of the floats, and as fast as shorter ones where a
    thousand items are wanted), floats, and where neither fits product codes behind a learnt rotation.

    Args:
        items: vectors of the index.
        dim: their length.
        recall_target: ann_recall to reach.
        memory: bytes that the index may take; 0 is any number.
    """
    lists = 1 << round(math.log2(max(4 * math.sqrt(items), 1)))
    graph = "_HNSW32" if lists >= _GRAPH_LISTS else ""
    # A centroid, and in the graph its 64 links, of 4 bytes each.
    centroids = lists * (4 * dim + (4 * 64 + 16 if graph else 0))
    ivf = f"IVF{lists}{graph}"
    flat = 4 * dim * items
    # A code beside its id of 8 bytes. "np": without polysemous training, which takes long and serves nothing here.
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
            return f"reads all items for every query, slow above {_FLAT_ITEMS:,}"
        if memory and size > memory:
            return f"more than index.memory, {memory / 1e6:,.1f} MB"
        return ""

    return [Candidate(factory, size, verdict(factory, size)) for factory, size in found]


def check_device(device: str) -> None:
    """Raises CommandError if `device`, cpu or gpu, is not there."""
    if device == "cpu":
        return
    if not hasattr(faiss, "StandardGpuResources"):
        raise CommandError(
            "--device=gpu: the installed FAISS has no GPU part; put faiss-gpu in the place of faiss-cpu, "
            "or leave --device out"
        )
    if faiss.get_num_gpus() == 0:
        raise CommandError("--device=gpu: FAISS sees no GPU here; check nvidia-smi, or leave --device out")


def make(factory: str, dim: int) -> faiss.Index:
    """An empty, untrained index. Raises CommandError if FAISS does not know the factory string."""
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise CommandError(f"FAISS refuses index.factory '{factory}' for {dim} dimensions: {_last(error)}") from None


def build(vectors: np.ndarray, factory: str, device: str = "cpu") -> faiss.Index:
    """Trains an index on a sample of `vectors` [n, dim] and adds all of them.

    On a GPU, k-means runs and vectors are added there; the index that is returned is on the CPU.

    Raises:
        CommandError: FAISS refuses the factory string, has too few vectors for it, or cannot build it on a GPU.
    """
    index = make(factory, vectors.shape[1])
    try:
        ivf = _ivf(index)
        wanted = max(_SAMPLE, _POINTS_PER_CENTROID * ivf.nlist if ivf is not None else 0)
        _train(index, _sample(vectors, wanted), device)
        if device == "gpu":
            options = faiss.GpuClonerOptions()
            options.allowCpuCoarseQuantizer = True
            resources = faiss.StandardGpuResources()
            on_gpu = faiss.index_cpu_to_gpu(resources, 0, index, options)
            _add(on_gpu, vectors)
            return faiss.index_gpu_to_cpu(on_gpu)
        with _two_level_assignment(ivf):
            _add(index, vectors)
    except RuntimeError as error:
        where = " on a GPU" if device == "gpu" else ""
        raise CommandError(
            f"FAISS cannot build index.factory '{factory}' of {len(vectors):,} items{where}: {_last(error)}"
        ) from None
    return index


def two_level_kmeans(vectors: np.ndarray, clusters: int, device: str = "cpu") -> np.ndarray:
    """Centroids of length 1, float32 [clusters, dim], of n >= clusters vectors of length 1.

    k-means with sqrt(clusters) centroids, and in each of those clusters k-means with a share of the centroids as large
    as its share of the vectors: O(n sqrt(clusters)) instead of O(n clusters) for each iteration.
    """

    def kmeans(points: np.ndarray, count: int) -> Any:
        found = faiss.Kmeans(
            points.shape[1],
            count,
            niter=_KMEANS_ITERATIONS,
            spherical=True,
            min_points_per_centroid=1,
            max_points_per_centroid=1 << 20,
            seed=1,
            gpu=device == "gpu",
        )
        found.train(points)
        return found

    coarse = kmeans(vectors, max(1, math.isqrt(clusters)))
    _, assigned = coarse.assign(vectors)
    order = np.argsort(assigned, kind="stable")
    ends = np.cumsum(np.bincount(assigned, minlength=coarse.k))
    shares = np.diff(ends * clusters // len(vectors), prepend=0)
    parts = np.split(order, ends[:-1])
    # A share never exceeds its vectors by more than rounding up: with n >= clusters by none.
    return np.vstack([kmeans(vectors[part], int(n)).centroids for part, n in zip(parts, shares, strict=True) if n])


def _train(index: faiss.Index, sample: np.ndarray, device: str) -> None:
    """index.train(sample), but with two_level_kmeans where there are many lists."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        _train(index.base_index, sample, device)
        index.refine_index.train(sample)
        index.is_trained = True
    elif isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain  # a std::vector, which the stub calls a list
        for i in range(chain.size()):
            transform = faiss.downcast_VectorTransform(chain.at(i))
            if isinstance(transform, faiss.OPQMatrix):
                transform.niter = _KMEANS_ITERATIONS  # FAISS's 50 take minutes for little
            if not transform.is_trained:
                transform.train(sample)
            sample = transform.apply(sample)
        _train(index.index, sample, device)
        index.is_trained = True
    else:
        if isinstance(index, faiss.IndexIVF):
            _train_quantizer(index, sample, device)
            if isinstance(index, faiss.IndexIVFScalarQuantizer):
                # The 8 bits of a dimension span all but its two in 10,000 outermost values: fewer errors than by all.
                index.sq.rangestat, index.sq.rangestat_arg = faiss.ScalarQuantizer.RS_quantiles, 1e-4
            # The codes need no more.
            sample = sample[:: max(1, len(sample) // _SAMPLE)]
        index.train(sample)


def _train_quantizer(index: faiss.IndexIVF, sample: np.ndarray, device: str) -> None:
    """Prepares the coarse quantizer; where there are many lists it gets their centroids, by two_level_kmeans."""
    # No warnings on stderr: small shops have small lists.
    for trained in (index, index.pq) if isinstance(index, faiss.IndexIVFPQ) else (index,):
        trained.cp.min_points_per_centroid = 1
    quantizer = faiss.downcast_index(index.quantizer)
    if isinstance(quantizer, faiss.IndexHNSW):
        quantizer.hnsw.efConstruction = 200  # few nodes: a better graph costs nothing
    if isinstance(quantizer, faiss.IndexIVF):  # residuals are taken from centroids that lie in lists themselves
        quantizer.make_direct_map()
    if _TWO_LEVEL_LISTS <= index.nlist <= len(sample):
        # FAISS keeps a quantizer that holds as many centroids as there are lists.
        centroids = two_level_kmeans(sample, index.nlist, device)
        if not quantizer.is_trained:
            quantizer.train(centroids)
        quantizer.add(centroids)


def _sample(vectors: np.ndarray, count: int) -> np.ndarray:
    if len(vectors) <= count:
        return np.ascontiguousarray(vectors)
    rows = np.random.default_rng(1).choice(len(vectors), count, replace=False, shuffle=False)
    return vectors[np.sort(rows)]


def _add(index: faiss.Index, vectors: np.ndarray) -> None:
    for begin in range(0, len(vectors), _BLOCK):
        index.add(np.ascontiguousarray(vectors[begin : begin + _BLOCK]))


@contextlib.contextmanager
def _two_level_assignment(ivf: faiss.IndexIVF | None) -> Iterator[None]:
    """Within it, vectors that are added find their list in two levels: most of the time that adding takes."""
    if ivf is None or ivf.nlist < _TWO_LEVEL_LISTS:
        yield
        return
    quantizer = ivf.quantizer
    centroids = quantizer.reconstruct_n(0, ivf.nlist)
    nearest = faiss.IndexFlatIP(ivf.d)
    groups = faiss.IndexIVFFlat(nearest, ivf.d, math.isqrt(ivf.nlist), faiss.METRIC_INNER_PRODUCT)
    groups.cp.min_points_per_centroid = 1
    groups.train(centroids)
    groups.make_direct_map()  # gives the centroid of a list, from which residuals are taken
    groups.add(centroids)
    groups.nprobe = _ASSIGN_NPROBE
    ivf.quantizer = groups
    try:
        yield
    finally:
        ivf.quantizer = quantizer


def _ivf(index: faiss.Index) -> faiss.IndexIVF | None:
    """The inverted lists inside an index, if it has some."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        return _ivf(index.base_index)
    return faiss.try_extract_index_ivf(index)


def _probes(ivf: faiss.IndexIVF) -> Iterator[str]:
    """nprobe in steps of about 1.4, and where a graph finds the lists, how hard that looks."""
    graph = isinstance(faiss.downcast_index(ivf.quantizer), faiss.IndexHNSW)
    for nprobe in sorted({*itertools.takewhile(lambda n: n < ivf.nlist, _steps(1)), ivf.nlist}):
        # With FAISS's efSearch of 16 a graph finds but half of the nearest 256 lists, and few beyond.
        yield f"nprobe={nprobe}" + (f",quantizer_efSearch={max(16, 2 * nprobe)}" if graph else "")


def set_parameters(index: faiss.Index, parameters: str) -> None:
    """Sets search parameters in FAISS's words: "nprobe=64,k_factor_rf=4". Raises CommandError where it refuses."""
    if parameters:
        try:
            # The stub of this overload names its second argument's type wrongly.
            faiss.ParameterSpace().set_index_parameters(index, parameters)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise CommandError(f"FAISS refuses index.parameters '{parameters}': {_last(error)}") from None


@dataclasses.dataclass(frozen=True)
class Setting:
    """What an index does with some search parameters."""

    parameters: str
    ann_recall: dict[int, float]  # of each k
    p50_ms: float  # of one query at a time, on one thread, for the served k
    p99_ms: float


class Exact:
    """The exact result of some queries, which ann_recall compares with."""

    def __init__(self, vectors: np.ndarray, queries: np.ndarray, ks: Sequence[int], device: str = "cpu"):
        """Computes all inner products; k above n counts as n."""
        self._vectors, self._queries = vectors, queries
        self.ks = tuple(ks)
        largest = min(max(ks), len(vectors))
        if device == "gpu":
            scores = faiss.knn_gpu(
                faiss.StandardGpuResources(), queries, vectors, largest, metric=faiss.METRIC_INNER_PRODUCT
            )[0]
        else:
            scores = faiss.knn(queries, vectors, largest, metric=faiss.METRIC_INNER_PRODUCT)[0]
        self._floors = {k: scores[:, min(k, largest) - 1] for k in ks}

    def ann_recall(self, index: faiss.Index, k: int) -> float:
        """Of the exact top k, the share that the index finds, averaged over the queries.

        By score, not by label: items with equal vectors are equally right. Scores within 1e-6, rounding, are equal.
        """
        found = index.search(self._queries, min(k, len(self._vectors)))[1]
        right = 0
        for query, labels, floor in zip(self._queries, found, self._floors[k], strict=True):
            labels = labels[labels >= 0]
            right += int((self._vectors[labels] @ query >= floor - 1e-6).sum())
        return right / found.size


def sweep(index: faiss.Index, exact: Exact, queries: np.ndarray, k: int, parameters: str = "") -> list[Setting]:
    """Measures an index at `parameters`, if given, and over its own: nprobe or efSearch, k_factor of a refinement.

    nprobe and efSearch grow by about 1.4, from their least value until recall is all but 1 or rises no more.

    Args:
        index: changed: it is left with the parameters of the last setting.
        exact: the right answers for `queries`.
        queries: float32 [queries, dim].
        k: whose latency is measured.
        parameters: measured first.
    """
    found: list[Setting] = []
    if parameters:
        set_parameters(index, parameters)
        found.append(_measured(index, exact, queries, k, parameters))
    for grid in _grids(index):
        best: list[float] = []
        for setting in grid:
            set_parameters(index, setting)
            found.append(_measured(index, exact, queries, k, setting))
            best.append(min(found[-1].ann_recall.values()))
            if best[-1] > 0.998 or (len(best) > 5 and best[-1] < best[-5] + 0.002 and best[-1] > 0.1):
                break
    return found


def choose(settings: Sequence[Setting], k: int, recall_target: float) -> Setting:
    """The fastest setting whose ann_recall@k meets the target; the one with the highest recall if none does."""
    good = [setting for setting in settings if setting.ann_recall[k] >= recall_target]
    if good:
        return min(good, key=lambda setting: setting.p50_ms)
    return max(settings, key=lambda setting: (setting.ann_recall[k], -setting.p50_ms))


def _grids(index: faiss.Index) -> Iterator[Iterator[str]]:
    """For each value of the refinement, the settings of the other parameter in the order of their cost."""
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
    """first, and then twice and three times each power of two of it."""
    yield first
    for i in itertools.count():
        yield first << i + 1
        yield 3 * first << i


def _measured(index: faiss.Index, exact: Exact, queries: np.ndarray, k: int, parameters: str) -> Setting:
    recalls = {at: exact.ann_recall(index, at) for at in exact.ks}
    p50, p99 = latency(index, queries, k)
    return Setting(parameters, recalls, p50, p99)


def latency(index: faiss.Index, queries: np.ndarray, k: int) -> tuple[float, float]:
    """Median and 99th percentile, in ms, of searching one query at a time on one thread."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        times: list[float] = []
        for query in queries[:_LATENCY_SEARCHES]:
            start = time.perf_counter()
            index.search(query[np.newaxis], min(k, index.ntotal))
            times.append(time.perf_counter() - start)
            if sum(times) > _LATENCY_SECONDS:
                break
    finally:
        faiss.omp_set_num_threads(threads)
    p50, p99 = np.percentile(times, [50, 99]) * 1000
    return float(p50), float(p99)


def _last(error: Exception) -> str:
    """FAISS's own words, without the place in its code."""
    return str(error).strip().splitlines()[-1]
