"""Vector indexes of other projects for benchmarks/index.py: usearch, hnswlib and ScaNN.

A peer is named like a factory string of FAISS: its project, a colon, and what it is built with.

    usearch:M=32,ef=128,codes=i8      a graph; M links per item, ef candidates per insertion; codes of f32, bf16 or i8
    hnswlib:M=32,ef=200               a graph of float vectors
    scann:leaves=2000,codes=int8      lists; all vectors of the nearest leaves are scored, rounded to 8 bits
    scann:leaves=2000,codes=2,reorder=int8,soar=1.5
                                      lists with product codes of 4 bits for 2 dimensions each; the best are scored
                                      again with vectors of float32 or int8; soar > 0 adds each vector to a second leaf

A built peer has `search(x, k)` as FAISS's indexes do, so that they are measured in the same way.
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from absl import app

# The builds that --peers measures; docs/experiments.md has others.
CHOSEN = (
    "usearch:M=16,ef=128,codes=i8",
    "hnswlib:M=16,ef=200",
    "scann:leaves=2000,codes=int8",
    "scann:leaves=2000,codes=2,reorder=int8,soar=1.5",
)


class Peer(abc.ABC):
    """An index of another project.

    Attributes:
        setting: what searches are done with, such as "ef=1000".
        ntotal: number of vectors, as of FAISS's indexes.
    """

    # What is imported, and the values that `name:key=value,...` may set, with their defaults.
    MODULE: str
    DEFAULTS: ClassVar[dict[str, str]]

    def __init__(self, vectors: np.ndarray, options: dict[str, str], threads: int) -> None:
        """Builds the index of unit vectors, float32 [n, dim], on so many threads."""
        self.setting, self.ntotal = "", len(vectors)
        self._build(vectors, options, threads)

    @abc.abstractmethod
    def _build(self, vectors: np.ndarray, options: dict[str, str], threads: int) -> None: ...

    @abc.abstractmethod
    def settings(self, k: int) -> Iterator[list[str]]:
        """Yields lists of settings for searches of the top k, each in the order of their costs."""

    @abc.abstractmethod
    def search(self, x: np.ndarray, k: int) -> tuple[None, np.ndarray]:
        """Returns the labels, int64 [queries, k], -1 for none, of the queries float32 [queries, dim], on one thread."""

    @abc.abstractmethod
    def write(self, path: Path) -> int:
        """Writes the index to a file or directory that does not exist yet. Returns its bytes."""


def _numbers(setting: str) -> dict[str, int]:
    return {key: int(value) for key, _, value in (part.partition("=") for part in setting.split(","))}


class _Graph(Peer):
    """A graph that is searched with a list of `ef` candidates, which must have at least k."""

    def settings(self, k: int) -> Iterator[list[str]]:
        yield [f"ef={round(k * 2 ** (step / 2))}" for step in range(9)]


class Usearch(_Graph):
    """https://github.com/unum-cloud/USearch."""

    MODULE = "usearch.index"
    DEFAULTS: ClassVar = {"M": "16", "ef": "128", "codes": "f32"}

    def _build(self, vectors: np.ndarray, options: dict[str, str], threads: int) -> None:
        # Of unit vectors cosines are inner products. Codes of 8 bits are made for cosines only.
        usearch: Any = importlib.import_module(self.MODULE)
        self._index = usearch.Index(
            ndim=vectors.shape[1],
            metric="cos",
            dtype=options["codes"],
            connectivity=int(options["M"]),
            expansion_add=int(options["ef"]),
            enable_key_lookups=False,
        )
        self._index.add(np.arange(len(vectors), dtype=np.uint64), vectors, threads=threads)

    def search(self, x: np.ndarray, k: int) -> tuple[None, np.ndarray]:
        """Searches on one thread."""
        self._index.expansion_search = _numbers(self.setting)["ef"]
        found = self._index.search(x, k, threads=1)
        if x.ndim == 1 or len(x) == 1:
            counts, keys = np.array([found.keys.size]), found.keys.reshape(1, -1)
        else:
            counts, keys = found.counts, found.keys
        labels = np.full((len(x), k), -1, np.int64)
        labels[:, : keys.shape[1]] = keys
        labels[np.arange(k) >= np.asarray(counts)[:, np.newaxis]] = -1
        return None, labels

    def write(self, path: Path) -> int:
        """Writes one file."""
        self._index.save(str(path))
        return path.stat().st_size


class Hnswlib(_Graph):
    """https://github.com/nmslib/hnswlib."""

    MODULE = "hnswlib"
    DEFAULTS: ClassVar = {"M": "16", "ef": "200"}

    def _build(self, vectors: np.ndarray, options: dict[str, str], threads: int) -> None:
        # In parts, since the library copies what it is given.
        hnswlib: Any = importlib.import_module(self.MODULE)
        self._index = hnswlib.Index(space="ip", dim=vectors.shape[1])
        self._index.init_index(max_elements=len(vectors), M=int(options["M"]), ef_construction=int(options["ef"]))
        for begin in range(0, len(vectors), 1 << 18):
            part = vectors[begin : begin + (1 << 18)]
            self._index.add_items(part, np.arange(begin, begin + len(part)), num_threads=threads)

    def search(self, x: np.ndarray, k: int) -> tuple[None, np.ndarray]:
        """Searches on one thread. If a query reaches fewer than k vectors, nothing is found for any of them."""
        self._index.set_ef(_numbers(self.setting)["ef"])
        try:
            return None, self._index.knn_query(x, k, num_threads=1)[0].astype(np.int64)
        except RuntimeError:
            return None, np.full((len(x), k), -1, np.int64)

    def write(self, path: Path) -> int:
        """Writes one file."""
        self._index.save_index(str(path))
        return path.stat().st_size


class Scann(Peer):
    """https://github.com/google-research/google-research/tree/master/scann."""

    MODULE = "scann"
    DEFAULTS: ClassVar = {"leaves": "2000", "codes": "2", "reorder": "float32", "soar": "0", "sample": "250000"}
    _REORDER = (1.0, 1.5, 2.0, 3.0)

    def _build(self, vectors: np.ndarray, options: dict[str, str], threads: int) -> None:
        scann: Any = importlib.import_module(self.MODULE)
        types: Any = importlib.import_module("scann.scann_ops.py.scann_builder").ReorderType
        self._leaves = int(options["leaves"])
        self._reorders = options["codes"] != "int8"
        builder = scann.scann_ops_pybind.builder(vectors, 1000, "dot_product").set_n_training_threads(threads)
        soar = float(options["soar"])
        builder = builder.tree(
            num_leaves=self._leaves,
            num_leaves_to_search=100,
            training_sample_size=min(int(options["sample"]), len(vectors)),
            soar_lambda=soar or None,
            overretrieve_factor=2.0 if soar else None,
        )
        if self._reorders:
            kind = types.INT8 if options["reorder"] == "int8" else types.FLOAT32
            builder = builder.score_ah(int(options["codes"]), anisotropic_quantization_threshold=0.2)
            builder = builder.reorder(2000, quantize=kind)
        else:
            builder = builder.score_brute_force(quantize=True)
        self._searcher = builder.build()

    def settings(self, k: int) -> Iterator[list[str]]:
        """Yields numbers of leaves, for each number of candidates that are scored again."""
        leaves = [round(2 ** (step / 2)) for step in range(2, 21)]
        leaves = [number for number in dict.fromkeys(leaves) if number <= self._leaves]
        for factor in self._REORDER if self._reorders else (0.0,):
            reorder = f",reorder={round(factor * k)}" if factor else ""
            yield [f"leaves={number}{reorder}" for number in leaves]

    def search(self, x: np.ndarray, k: int) -> tuple[None, np.ndarray]:
        """Searches query by query on one thread."""
        numbers = _numbers(self.setting)
        labels = np.full((len(x), k), -1, np.int64)
        for row, query in enumerate(x):
            found = self._searcher.search(query, k, numbers.get("reorder"), numbers["leaves"])[0]
            labels[row, : len(found)] = found
        return None, labels

    def write(self, path: Path) -> int:
        """Writes a directory."""
        path.mkdir()
        self._searcher.serialize(str(path))
        return sum(file.stat().st_size for file in path.iterdir())


_KINDS: dict[str, type[Peer]] = {"usearch": Usearch, "hnswlib": Hnswlib, "scann": Scann}

PACKAGES = tuple(_KINDS)


def is_peer(factory: str) -> bool:
    """Returns whether a factory string names a peer."""
    return factory.partition(":")[0] in _KINDS


def options_of(factory: str) -> dict[str, str]:
    """Returns all that a peer is built with.

    Raises:
        app.UsageError: the peer is not installed, or the string sets something that it does not have.
    """
    name, _, given = factory.partition(":")
    try:
        # Before the build is measured: ScaNN brings TensorFlow along.
        importlib.import_module(_KINDS[name].MODULE)
    except ImportError as error:
        raise app.UsageError(f"{factory} needs {name} ({error}); install it with: pip install '.[bench]'") from None
    defaults = _KINDS[name].DEFAULTS
    options = dict(defaults)
    for part in filter(None, given.split(",")):
        key, _, value = part.partition("=")
        if key not in defaults or not value:
            known = ",".join(f"{key}={value}" for key, value in defaults.items())
            raise app.UsageError(f"--factories={factory}: {part!r} cannot be set; {name} has {name}:{known}")
        options[key] = value
    return options


def build(factory: str, vectors: np.ndarray, options: dict[str, str], threads: int) -> Peer:
    """Builds a peer of unit vectors, float32 [n, dim], with the options of `options_of`, on so many threads."""
    return _KINDS[factory.partition(":")[0]](vectors, options, threads)
