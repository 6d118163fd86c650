"""Inverted lists with product codes: an index of a trained quantizer, and a second list for each vector.

Vectors are float32 [n, dim]. Labels are the positions 0 to n - 1. With a second list, an index holds each label twice.

FAISS's indexes of residual codes compute a table of scores for each list that a search probes. But scores of residual
codes are scores of product codes if a query is repeated: q . (c + b_1 + ... + b_M) = (q, ..., q) . (c + b_1, ..., b_M),
and product codes have one table for all lists. So an index of residual codes is one of product codes of M dim
dimensions, whose parts are whole vectors. FAISS can search it, but it cannot choose codes with it.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpsr_common.errors import CommandError
from dpsr_common.packed_file import FormatError, PackedFile, PackedFileWriter
from dpsr_tf.models.quantizer import Encoder, Quantizer
from dpsr_tf.ops._native import NearestCodes

# Values of index.factory that take the model's quantizer: IndexIVFPQ, or IndexIVFPQFastScan with the same codes.
FACTORIES = QUANTIZER, QUANTIZER_FAST_SCAN = "quantizer", "quantizer_fs"
# The centroids by which residual codes are chosen, in an index directory.
ENCODER = "encoder.dpsr"
# R^T R of a rotation may differ from the identity by this much.
_ORTHOGONAL = 1e-3
# Vectors that are added, and vectors that are compared with all centroids, in one step.
_BLOCK, _SECOND_BLOCK = 1 << 16, 1 << 12
# Residuals as short as this are rounding errors of vectors of length 1.
_NO_RESIDUAL = np.float32(1e-6)
# Vectors that one thread encodes at a time: few, so that threads end at the same time, and caches hold them.
_PART = 1 << 11


def make(quantizer: Quantizer) -> faiss.IndexPreTransform:
    """Makes an empty index whose scores are the products of queries and T(x), in which nothing is left to train.

    Returns:
        An IndexPreTransform: a LinearTransform by the transposed rotation, over an IndexIVFPQ. With residual codes a
        RemapDimensionsTransform that repeats the vector, and the IndexIVFPQ's coarse quantizer reads the first copy.

    Raises:
        CommandError: the quantizer has wrong shapes, values that are not finite, or a rotation that is not orthogonal.
    """
    dim = _check(quantizer)
    lists: faiss.Index = faiss.IndexFlatIP(dim)
    lists.add(np.ascontiguousarray(quantizer.coarse, np.float32))
    sub_spaces = len(quantizer.codebooks)
    # FAISS multiplies the matrix with a vector, so it is the transpose of the one that vectors are multiplied with.
    transform: faiss.VectorTransform = _linear(quantizer.rotation.T)
    width = dim
    if quantizer.encoder:
        width = sub_spaces * dim
        transform = _remap(dim, np.arange(width) % dim)
        lists = faiss.IndexPreTransform(_remap(width, np.arange(dim)), lists)
    ivf = faiss.IndexIVFPQ(lists, width, len(quantizer.coarse), sub_spaces, quantizer.bits, faiss.METRIC_INNER_PRODUCT)
    faiss.copy_array_to_vector(np.ravel(quantizer.codebooks).astype(np.float32), ivf.pq.centroids)
    ivf.is_trained = True
    return faiss.IndexPreTransform(transform, ivf)


def _linear(matrix: np.ndarray) -> faiss.LinearTransform:
    """Returns the transform of a vector by an orthogonal matrix."""
    transform = faiss.LinearTransform(len(matrix), len(matrix), False)
    faiss.copy_array_to_vector(np.ravel(matrix).astype(np.float32), transform.A)
    transform.is_trained = True
    transform.set_is_orthonormal()
    return transform


def _remap(dim: int, of: np.ndarray) -> faiss.RemapDimensionsTransform:
    """Returns the transform of a vector of `dim` dimensions to those that are named, int [n]."""
    numbers = of.astype(np.int32)  # swig_ptr does not keep it
    return faiss.RemapDimensionsTransform(dim, len(numbers), faiss.swig_ptr(numbers))


def _check(quantizer: Quantizer) -> int:
    """Returns the dimension. Raises CommandError if the quantizer has wrong shapes or values."""
    rotation, coarse, codebooks = quantizer.rotation, quantizer.coarse, quantizer.codebooks
    dim = rotation.shape[1]
    sub_spaces, codes = codebooks.shape[:2]
    width = dim if quantizer.encoder else dim // sub_spaces
    expected: tuple[tuple[int, ...], ...] = ((dim, dim), (len(coarse), dim), (sub_spaces, codes, width))
    expected += expected[1:] if quantizer.encoder else ()
    given = tuple(values.shape for values in quantizer.arrays)
    if given != expected or (dim % sub_spaces and not quantizer.encoder) or codes not in (16, 256):
        raise CommandError(
            f"the checkpoint has a quantizer with rotation {list(given[0])}, coarse centroids {list(given[1])} and "
            f"codebooks {list(given[2])}, expected [d, d], [lists, d] and [M, 16 or 256, d / M]; train the model again"
        )
    for name, values in (("rotation", rotation), ("coarse centroids", coarse), ("codebooks", codebooks)):
        if not np.isfinite(values).all():
            raise CommandError(
                f"the checkpoint has a quantizer with a NaN or an infinity in its {name}; train it again with a lower "
                f"quantizer.learning_rate"
            )
    if quantizer.encoder and (rotation != np.eye(dim)).any():
        raise CommandError("the checkpoint has a quantizer with residual codes and a rotation, which none has")
    error = float(np.abs(rotation.astype(np.float64).T @ rotation - np.eye(dim)).max())
    if error > _ORTHOGONAL:
        raise CommandError(
            f"the checkpoint has a quantizer whose rotation is not orthogonal: R^T R differs from the identity by "
            f"{error:.2g}, expected at most {_ORTHOGONAL:g}; train it again with a lower "
            f"quantizer.rotation_learning_rate"
        )
    return dim


def quantizer_of(index: faiss.Index, encoder: Encoder | None = None) -> Quantizer:
    """Returns the quantizer that an index of `build` was made from. That of residual codes had this encoder."""
    outer: Any = faiss.downcast_index(index)
    transform: Any = faiss.downcast_VectorTransform(outer.chain.at(0))
    ivf: Any = faiss.downcast_index(outer.index)
    dim, sub_spaces = outer.d, ivf.pq.M
    rotation = np.eye(dim, dtype=np.float32)
    if isinstance(transform, faiss.LinearTransform):
        rotation = np.ascontiguousarray(faiss.vector_to_array(transform.A).reshape(dim, dim).T)
    coarse = ivf.quantizer.reconstruct_n(0, ivf.nlist)[:, :dim]
    codebooks = faiss.vector_to_array(ivf.pq.centroids).reshape(sub_spaces, ivf.pq.ksub, ivf.d // sub_spaces)
    return Quantizer(rotation, np.ascontiguousarray(coarse), codebooks, encoder)


def write_encoder(directory: Path, encoder: Encoder) -> None:
    """Writes the file ENCODER."""
    with PackedFileWriter(str(directory / ENCODER), "encoder") as file:
        for name, values in encoder._asdict().items():
            file.add(f"{name}.shape", np.array(values.shape, np.int64))
            file.add(name, np.ravel(values).astype(np.float32))


def read_encoder(directory: Path) -> Encoder | None:
    """Reads the file ENCODER; None if there is none. Raises CommandError if it is damaged."""
    path = directory / ENCODER
    if not path.exists():
        return None
    try:
        file = PackedFile(str(path), "encoder")
    except FormatError as error:
        raise CommandError(f"{error}; run `dpsr index` again") from None
    return Encoder(*(np.array(file[name]).reshape(file[f"{name}.shape"]) for name in Encoder._fields))


def build(
    quantizer: Quantizer, factory: str, vectors: np.ndarray, second_list: float = 0.0
) -> tuple[faiss.Index, np.ndarray, np.ndarray]:
    """Makes an index of `make` that holds `vectors` [n, dim] with the codes of the quantizer.

    Args:
        quantizer: the quantizer.
        factory: one of FACTORIES.
        vectors: float32 [n, dim]. They may be memory-mapped.
        second_list: see add_in_two_lists. 0 keeps each vector in one list.

    Returns:
        The index, whose scores are the products of queries and T(x) (rounded by FastScan, whose tables have 8 bits).
        And what Quantizer.encode returns for the vectors: lists, int64 [n], and codes, uint8 [n, M].

    Raises:
        CommandError: see `make` and check_second_list, the quantizer is for vectors of another dimension, or the codes
            do not fit FastScan.
    """
    if vectors.shape[1] != len(quantizer.rotation):
        raise CommandError(
            f"the checkpoint has a quantizer for vectors of {len(quantizer.rotation)} dimensions, but the embeddings "
            f"have {vectors.shape[1]} (model.embedding_dim); train the model again"
        )
    if quantizer.encoder and second_list:
        raise CommandError(
            f"index.second_list is {second_list:g}, but quantizer.codes is residual, and such codes stand in one list; "
            f"set index.second_list=0"
        )
    if factory == QUANTIZER_FAST_SCAN and quantizer.bits != 4:
        raise CommandError(
            f"index.factory '{factory}' needs codes of 4 bits, but quantizer.bits is {quantizer.bits}; "
            f"give --set=index.factory={QUANTIZER}"
        )
    index: Any = make(quantizer)
    ivf: Any = faiss.downcast_index(index.index)
    check_second_list(ivf, second_list)
    lists, codes = encode(quantizer, vectors)
    for begin in range(0, len(vectors), _BLOCK):
        rows = slice(begin, begin + _BLOCK)
        first = lists[rows]
        positions = np.arange(begin, begin + len(first))
        _add_codes(ivf, first, _pack(codes[rows], quantizer.bits), positions)
        if second_list:
            z = np.asarray(vectors[rows], np.float32) @ quantizer.rotation
            second = second_lists(z, z - quantizer.coarse[first], quantizer.coarse, first, second_list)
            _add_codes(ivf, second, ivf.pq.compute_codes(z - quantizer.coarse[second]), positions)
    index.ntotal = ivf.ntotal
    if factory == QUANTIZER_FAST_SCAN:
        # The copy owns its parts, and `index` may go.
        fast = faiss.IndexPreTransform(faiss.downcast_VectorTransform(index.chain.at(0)), faiss.IndexIVFPQFastScan(ivf))
        index = faiss.clone_index(fast)
    return index, lists, codes


def encode(quantizer: Quantizer, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes what Quantizer.encode returns, with the kernel of training and on all cores.

    The results differ where two centroids are equally near but for rounding. Of equal centroids, the first is taken.

    Args:
        quantizer: the quantizer.
        vectors: float32 [n, dim]. They may be memory-mapped.

    Returns:
        Lists, int64 [n], and codes, uint8 [n, M].
    """
    coarse, codebooks = quantizer.encoder or (quantizer.coarse, quantizer.codebooks)
    rotate = _linear(quantizer.rotation.T)
    nearest_list = NearestCodes(coarse[np.newaxis])
    nearest_codes = quantizer.coder if quantizer.encoder else NearestCodes(codebooks)
    lists = np.empty(len(vectors), np.int64)
    codes = np.empty((len(vectors), len(codebooks)), np.uint8)

    def encode_part(begin: int) -> None:
        rows = slice(begin, begin + _PART)
        z = rotate.apply(np.ascontiguousarray(vectors[rows], np.float32))
        lists[rows] = nearest_list(z)[:, 0]
        z -= coarse[lists[rows]]
        codes[rows] = nearest_codes(z)

    # FAISS runs on one thread in each of these threads: its own threads, and those of NumPy's matrix products, wait for
    # one another actively, which takes many times as long where other programs need the cores.
    workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers, initializer=faiss.omp_set_num_threads, initargs=(1,)) as threads:
        list(threads.map(encode_part, range(0, len(vectors), _PART)))
    return lists, codes


def describe(quantizer: Quantizer, factory: str) -> str:
    """Returns a name of the index, such as "quantizer (IVF1024,PQ16x8)"."""
    fast_scan = "fs" if factory == QUANTIZER_FAST_SCAN else ""
    kind = "RQ" if quantizer.encoder else "PQ"
    return f"{factory} (IVF{len(quantizer.coarse)},{kind}{len(quantizer.codebooks)}x{quantizer.bits}{fast_scan})"


def check_second_list(index: faiss.Index, second_list: float) -> None:
    """Raises CommandError if vectors cannot stand in two lists of this index."""
    if not second_list:
        return
    ivf = _ivfpq(index)
    if ivf is None:
        raise CommandError(
            f"index.second_list is {second_list:g}, but only an index of product codes in lists can have second lists, "
            f"such as index.factory={QUANTIZER} or IVF1024,PQ16; set index.second_list=0 for other indexes"
        )
    if ivf.nlist < 2:
        raise CommandError(
            f"index.second_list is {second_list:g}, but the index has {ivf.nlist} list; it needs at least 2, so set "
            f"index.second_list=0 or more lists"
        )


def add_in_two_lists(index: faiss.Index, vectors: np.ndarray, second_list: float) -> None:
    """Adds vectors to a trained IndexIVFPQ, which may be in an IndexPreTransform: each to two lists, with two codes.

    The first list is the one that FAISS chooses, and the second one is that of second_lists.

    Args:
        index: the index. Its ntotal grows by 2n.
        vectors: float32 [n, dim]. They may be memory-mapped.
        second_list: lambda.

    Raises:
        CommandError: the index has no product codes in lists, or only one list.
    """
    check_second_list(index, second_list)
    ivf = _ivfpq(index)
    centroids = ivf.quantizer.reconstruct_n(0, ivf.nlist)
    for begin in range(0, len(vectors), _BLOCK):
        z = np.ascontiguousarray(vectors[begin : begin + _BLOCK], np.float32)
        outer = faiss.downcast_index(index)
        if isinstance(outer, faiss.IndexPreTransform):
            chain: Any = outer.chain  # a std::vector, which the stub calls a list
            for number in range(chain.size()):
                z = chain.at(number).apply(z)
        positions = np.arange(begin, begin + len(z))
        first = ivf.quantizer.assign(z, 1).reshape(-1)
        residual = z - centroids[first]
        second = second_lists(z, residual, centroids, first, second_list)
        for lists, coded in ((first, residual), (second, z - centroids[second])):
            _add_codes(ivf, lists, ivf.pq.compute_codes(coded if ivf.by_residual else z), positions)
    index.ntotal = ivf.ntotal


def second_lists(
    z: np.ndarray, residual: np.ndarray, centroids: np.ndarray, first: np.ndarray, second_list: float
) -> np.ndarray:
    """Chooses the second list c' of each vector as SOAR does: with |r'|^2 + lambda (r' . r / |r|)^2 smallest.

    r is the residual in the first list, r' that in the second. A query that finds neither is one for which both
    residuals have a large inner product, so the second residual should not be parallel to the first. (Sun et al.,
    SOAR: improved indexing for approximate nearest neighbor search, NeurIPS 2023, theorem 3.1.)

    Args:
        z: vectors, float32 [n, d], in the space of the centroids.
        residual: float32 [n, d], their residuals in the first list.
        centroids: float32 [lists, d].
        first: int64 [n], numbers of the first lists.
        second_list: lambda.

    Returns:
        Numbers of the second lists, int64 [n], which differ from the first ones.
    """
    second = np.empty(len(z), np.int64)
    squares = np.einsum("ld,ld->l", centroids, centroids)
    for begin in range(0, len(z), _SECOND_BLOCK):
        rows = slice(begin, begin + _SECOND_BLOCK)
        x, r = z[rows], residual[rows]
        # A vector that is its list's centroid has a residual of rounding errors, and no direction.
        length = np.linalg.norm(r, axis=1, keepdims=True)
        unit = np.where(length > _NO_RESIDUAL, r / np.maximum(length, _NO_RESIDUAL), 0)
        # r' . r / |r| for all lists, [rows, lists].
        loss = np.einsum("nd,nd->n", x, unit)[:, np.newaxis] - unit @ centroids.T
        loss *= loss
        loss *= second_list
        # |r'|^2 without |x|^2, which all lists have in common.
        loss += squares
        loss -= 2 * (x @ centroids.T)
        np.put_along_axis(loss, first[rows, np.newaxis], np.inf, axis=1)
        second[rows] = loss.argmin(axis=1)
    return second


def write_semantic_ids(path: Path, item_ids: np.ndarray | list[str], lists: np.ndarray, codes: np.ndarray) -> None:
    """Writes the codes of items as a Parquet table that `dpsr ingest` reads as a column of the kind `multi`.

    Columns: item_id (int64, or text where the shop's ids are texts), and semantic_id, the number of the list and the
    code of each sub-space, such as "list:71 0:5 1:231". Each value has its own name, because the order of the values of
    a `multi` column does not count.

    Args:
        path: the file to write.
        item_ids: n ids.
        lists: int64 [n].
        codes: uint8 [n, M].
    """
    columns = [("list", lists), *((str(m), codes[:, m]) for m in range(codes.shape[1]))]
    parts = []
    for name, values in columns:
        names = pa.array([f"{name}:{value}" for value in range(int(values.max(initial=0)) + 1)], pa.large_string())
        parts.append(names.take(pa.array(values)))
    joined = pc.binary_join_element_wise(*parts, pa.scalar(" ", pa.large_string()))
    table = pa.table({"item_id": pa.array(item_ids), "semantic_id": joined})
    pq.write_table(table, str(path))


def _add_codes(ivf: Any, lists: np.ndarray, codes: np.ndarray, positions: np.ndarray) -> None:
    """Adds codes [n, code_size] with add_sa_codes, which wants the list before each of them, lowest byte first."""
    size = ivf.coarse_code_size()
    numbers = np.ascontiguousarray(lists, "<u8").view(np.uint8).reshape(-1, 8)[:, :size]
    ivf.add_sa_codes(np.ascontiguousarray(np.hstack([numbers, codes])), positions)


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Returns codes, uint8 [n, M], as FAISS packs them: codes of 4 bits by two, the first one in the low half."""
    if bits == 8:
        return codes
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return even[:, ::2] | even[:, 1::2] << 4


def _ivfpq(index: faiss.Index) -> Any:
    """Returns the IndexIVFPQ of an index that is one, or has one behind transforms; otherwise None."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index if isinstance(index, faiss.IndexIVFPQ) else None
