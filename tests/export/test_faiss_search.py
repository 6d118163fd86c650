"""The FAISS lookup op against Python FAISS and a NumPy reference, in every way it is loaded, and on bad input."""

from __future__ import annotations

import functools
import gc
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import tensorflow as tf
from numpy.typing import NDArray

from dpsr_common.packed_file import PackedFileWriter
from dpsr_export import faiss_search

v1 = tf.compat.v1

ITEMS, DIM = 2000, 16
# Factory strings with search parameters; each kind of index that a config may name.
FACTORIES = [
    ("Flat", ""),
    ("IVF16,Flat", "nprobe=4"),
    ("IVF16,SQ8", "nprobe=4"),
    ("IVF16,PQ8x4", "nprobe=4"),
    ("IVF16,PQ8x4fs,RFlat", "nprobe=4,k_factor_rf=4"),
    ("OPQ8,IVF16,PQ8x4", "nprobe=8"),
    ("HNSW16", "efSearch=40"),
]
FAISS_BINDING = Path(__file__).parents[2] / "export" / "faiss_binding"

# item_ids [batch, k] int64, scores [batch, k] float32, heads [batch, k] int32
Result = tuple[NDArray[Any], ...]


def vectors(n: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(n, DIM)).astype(np.float32)


class Files:
    """An index file with its item ids, and the Python FAISS index of the same file."""

    def __init__(
        self,
        folder: Path,
        factory: str = "Flat",
        parameters: str = "",
        items: NDArray[np.float32] | None = None,
        ids: NDArray[np.int64] | None = None,
        metric: int = faiss.METRIC_INNER_PRODUCT,
    ):
        self.items = vectors(ITEMS, seed=1) if items is None else items
        self.ids = np.random.default_rng(2).permutation(len(self.items)) * 7 + 1000 if ids is None else ids
        self.parameters = parameters
        index = faiss.index_factory(self.items.shape[1], factory, metric)
        index.train(self.items)
        index.add(self.items)
        self.index = str(folder / "items.faiss")
        faiss.write_index(index, self.index)
        self.faiss = faiss.read_index(self.index)
        if parameters:
            faiss.ParameterSpace().set_index_parameters(self.faiss, parameters)
        self.item_ids = str(folder / "item_ids.dpsr")
        self.write_item_ids()

    def write_item_ids(self, ids: NDArray[np.int64] | None = None) -> None:
        """For the index file as it is now."""
        faiss_search.write_item_ids(self.item_ids, self.ids if ids is None else ids, self.index)

    def table(self, mmap: bool = True) -> faiss_search.FaissIndexTable:
        return faiss_search.FaissIndexTable(self.index, self.item_ids, parameters=self.parameters, mmap=mmap)

    def expected(self, queries: NDArray[np.float32], k: int) -> Result:
        """The rule of retrieval over heads, [batch, heads, dim] queries, on the results of Python FAISS."""
        batch, heads, _ = queries.shape
        ids = np.full((batch, k), -1, np.int64)
        scores = np.full((batch, k), -np.inf, np.float32)
        best_heads = np.full((batch, k), -1, np.int32)
        for row in range(batch):
            best: dict[int, tuple[float, int]] = {}
            for head in range(heads):
                found = self.faiss.search(queries[row, head : head + 1], k)
                for score, label in zip(found[0][0], found[1][0], strict=True):
                    if label >= 0 and (self.ids[label] not in best or score > best[self.ids[label]][0]):
                        best[self.ids[label]] = (score, head)
            for i, (item, (score, head)) in enumerate(sorted(best.items(), key=lambda x: (-x[1][0], x[0]))[:k]):
                ids[row, i], scores[row, i], best_heads[row, i] = item, score, head
        return ids, scores, best_heads


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Files]:
    """Files of each kind of index, trained once; not to be changed."""
    # Training with more threads than free cores takes many times as long.
    faiss.omp_set_num_threads(1)

    @functools.cache
    def files(factory: str, parameters: str) -> Files:
        return Files(tmp_path_factory.mktemp("index"), factory, parameters)

    return files


def search(table: faiss_search.FaissIndexTable, queries: NDArray[np.float32], k: int) -> Result:
    item_ids, scores, heads = (tensor.numpy() for tensor in table.search(queries, k))
    assert (item_ids.dtype, scores.dtype, heads.dtype) == (np.int64, np.float32, np.int32)
    assert item_ids.shape == scores.shape == heads.shape == (len(queries), k)
    return item_ids, scores, heads


def assert_equal(result: Result, expected: Result) -> None:
    for got, want in zip(result, expected, strict=True):
        np.testing.assert_array_equal(got, want)


def assert_padding(result: Result) -> None:
    assert (result[0] == -1).all()
    assert (result[1] == -np.inf).all()
    assert (result[2] == -1).all()


# ---------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize(("factory", "parameters"), FACTORIES)
def test_results_equal_python_faiss(
    trained: Callable[[str, str], Files], factory: str, parameters: str, mmap: bool
) -> None:
    files = trained(factory, parameters)
    table = files.table(mmap)
    # Python FAISS, one query at a time with one thread, gives the very bits: no tolerance.
    for heads in (1, 2, 4):
        queries = vectors(12 * heads, seed=3).reshape(12, heads, DIM)
        for k in (1, 10, 100):
            result = search(table, queries, k)
            assert_equal(result, files.expected(queries, k))
            assert (np.diff(result[1][:, : k // 2]) <= 0).all()


def test_the_parameters_are_in_force(tmp_path: Path) -> None:
    files = Files(tmp_path, "IVF16,Flat", "nprobe=16")
    queries = vectors(8, seed=4)[:, None]
    wide = search(files.table(), queries, 50)
    files.parameters = "nprobe=1"
    narrow = search(files.table(), queries, 50)
    assert_equal(wide, files.expected(queries, 50))
    assert (wide[0] != narrow[0]).any()


def test_results_do_not_depend_on_the_batch(files: Files) -> None:
    table = files.table()
    queries = vectors(100, seed=5)[:, None]
    together = search(table, queries, 20)
    rows = [search(table, queries[row : row + 1], 20) for row in range(100)]
    assert_equal(together, tuple(np.concatenate(parts) for parts in zip(*rows, strict=True)))


def test_ties_are_in_order_of_item_id(tmp_path: Path) -> None:
    items = np.repeat(np.eye(DIM, dtype=np.float32)[:2], 4, axis=0)
    ids = np.array([80, 20, 60, 40, 70, 10, 50, 30], np.int64)
    table = Files(tmp_path, items=items, ids=ids).table()
    queries = np.zeros((1, 2, DIM), np.float32)
    queries[0, 0, :2] = 1, 0
    queries[0, 1, :2] = 0, 1
    item_ids, scores, heads = search(table, queries[:, :1], 8)
    assert item_ids.tolist() == [[20, 40, 60, 80, 10, 30, 50, 70]]
    assert heads.tolist() == [[0] * 8]
    item_ids, scores, heads = search(table, queries, 8)
    assert item_ids.tolist() == [[10, 20, 30, 40, 50, 60, 70, 80]]
    assert scores.tolist() == [[1.0] * 8]
    assert heads.tolist() == [[1, 0] * 4]
    same_head_twice = np.repeat(queries[:, :1], 3, axis=1)
    assert search(table, same_head_twice, 8)[2].tolist() == [[0] * 8]


def test_missing_results_are_padded(tmp_path: Path) -> None:
    files = Files(tmp_path, items=vectors(5, seed=6))
    queries = vectors(4, seed=7).reshape(2, 2, DIM)
    result = search(files.table(), queries, 9)
    assert_equal(result, files.expected(queries, 9))
    assert (result[0][:, :5] > 0).all()
    assert_padding(tuple(part[:, 5:] for part in result))


def test_the_largest_k(files: Files) -> None:
    result = search(files.table(), vectors(1, seed=8)[:, None], 10_000)
    assert sorted(result[0][0, :ITEMS]) == sorted(files.ids)
    assert_padding(tuple(part[:, ITEMS:] for part in result))


def test_an_empty_index_gives_padding(tmp_path: Path) -> None:
    files = Files(tmp_path, items=np.zeros((0, DIM), np.float32))
    assert_padding(search(files.table(), vectors(2, seed=9)[:, None], 3))


def test_an_empty_batch(files: Files) -> None:
    search(files.table(), np.zeros((0, 2, DIM), np.float32), 5)


def test_rows_that_cannot_be_answered_are_empty(files: Files) -> None:
    queries = vectors(24, seed=10).reshape(12, 2, DIM)
    queries[1, 0, 3] = np.nan
    queries[2, 1, 0] = np.inf
    queries[3, 1, 5] = -np.inf
    queries[4] = 0
    queries[5] = np.nan
    queries[6, 0] = 0  # only one of two heads: the other answers
    result = search(files.table(), queries, 10)
    assert_padding(tuple(part[1:6] for part in result))
    one_head = files.expected(queries[6:7, 1:], 10)
    assert_equal(tuple(part[6:7] for part in result), (one_head[0], one_head[1], one_head[2] + 1))
    good = [0, *range(7, 12)]
    assert_equal(tuple(part[good] for part in result), files.expected(queries[good], 10))


def test_items_that_are_no_numbers_are_not_found(tmp_path: Path) -> None:
    items = vectors(50, seed=11)
    items[::2] = np.nan
    files = Files(tmp_path, items=items)
    item_ids, _, _ = search(files.table(), vectors(3, seed=12)[:, None], 50)
    for row in item_ids:
        assert set(row) <= {-1, *files.ids[1::2]}
        assert len(set(row) - {-1}) == 25


# ---------------------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize("k", [0, -1, 10_001, 2**31 - 1, -(2**31)])
def test_k_out_of_range(files: Files, k: int) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"k is {k}, expected 1 to 10000"):
        files.table().search(vectors(1, seed=13)[:, None], k)


def test_the_results_of_a_call_are_limited(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    table, queries = files.table(), vectors(101, seed=13)[:, None]
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"batch \* k is 101 \* 10000, expected at most 1000000"):
        table.search(queries, 10_000)
    assert table.search(queries[:100], 10_000)[0].shape == [100, 10_000]
    monkeypatch.setenv("DPSR_MAX_RESULTS", "505")
    assert table.search(queries, 5)[0].shape == [101, 5]
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"at most 505 .*--max_results_per_request"):
        table.search(queries, 6)


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (np.zeros((3, DIM), np.float32), r"shape \[3,16\], expected \[batch, heads, dim\]"),
        (np.zeros((1, 1, 1, DIM), np.float32), r"shape \[1,1,1,16\], expected"),
        (np.zeros((2, 1, DIM + 1), np.float32), r"shape \[2,1,17\], expected .* dim 16"),
        (np.zeros((0, 1, DIM - 1), np.float32), r"shape \[0,1,15\], expected .* dim 16"),
        (np.zeros((2, 0, DIM), np.float32), r"shape \[2,0,16\], expected .* 1 to 16 heads"),
        (np.zeros((2, 17, DIM), np.float32), r"shape \[2,17,16\], expected .* 1 to 16 heads"),
        (tf.zeros((2, 1, DIM), tf.float64), r"expected to be a float tensor but is a double tensor"),
    ],
)
def test_bad_query_embeddings(files: Files, queries: NDArray[np.float32], message: str) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        files.table().search(queries, 3)


def test_bad_k_tensors(files: Files) -> None:
    table = files.table()
    queries = vectors(1, seed=14)[:, None]
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"k has shape \[1\], expected a scalar"):
        table.search(queries, tf.constant([3]))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"expected to be a int32 tensor but is a int64 tensor"):
        table.search(queries, tf.constant(3, tf.int64))


def test_too_many_results_at_once(files: Files) -> None:
    queries = np.zeros((2**27 // 10_000 + 1, 1, DIM), np.float32)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"batch \* k is 13422 \* 10000, expected at most"):
        files.table().search(queries, 10_000)


# ---------------------------------------------------------------------------------------------------- bad files


def assert_refused(files: Files, error: type[Exception], *words: str) -> None:
    for mmap in (True, False):
        with pytest.raises(error) as raised:
            files.table(mmap)
        for word in words:
            assert word in str(raised.value)


def test_missing_files(files: Files) -> None:
    good = files.index
    files.index += ".missing"
    assert_refused(files, tf.errors.NotFoundError, files.index)
    files.index = good
    files.item_ids += ".missing"
    assert_refused(files, tf.errors.NotFoundError, files.item_ids)


def test_a_folder_or_an_empty_file_is_no_index(files: Files, tmp_path: Path) -> None:
    files.index = str(tmp_path)
    assert_refused(files, tf.errors.DataLossError, str(tmp_path), "not a regular file")
    files.index = str(tmp_path / "empty")
    Path(files.index).touch()
    assert_refused(files, tf.errors.DataLossError, files.index, "empty")


@pytest.mark.parametrize(("factory", "parameters"), FACTORIES)
def test_truncated_index(files: Files, trained: Callable[[str, str], Files], factory: str, parameters: str) -> None:
    whole = Path(trained(factory, parameters).index).read_bytes()
    shutil.copy(trained(factory, parameters).item_ids, files.item_ids)
    # All ends within the headers, where fields are short, and a sample of those within the arrays.
    for size in [*range(1, 250), *range(250, len(whole), len(whole) // 50), *range(len(whole) - 20, len(whole))]:
        Path(files.index).write_bytes(whole[:size])
        with pytest.raises(tf.errors.DataLossError, match=re.escape(files.index)):
            files.table()
    Path(files.index).write_bytes(whole)
    files.table()


def test_a_file_that_is_no_index(files: Files) -> None:
    Path(files.index).write_bytes(b"this is no index" * 100)
    files.write_item_ids()
    assert_refused(files, tf.errors.DataLossError, files.index, "not recognized")
    shutil.copy(files.item_ids, files.index)
    files.write_item_ids()
    assert_refused(files, tf.errors.DataLossError, files.index, "not recognized")


def test_an_index_that_is_not_the_one_of_the_item_ids(files: Files, tmp_path: Path) -> None:
    whole = Path(files.index).read_bytes()
    for place in (9, 100, len(whole) // 2, len(whole) - 1):
        Path(files.index).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert_refused(files, tf.errors.DataLossError, files.index, "checksum", "damaged, or it is another file")
    Path(files.index).write_bytes(whole + b"x")
    assert_refused(files, tf.errors.DataLossError, f"{len(whole) + 1} bytes, expected {len(whole)}")
    (tmp_path / "other").mkdir()
    shutil.copy(Files(tmp_path / "other", items=vectors(ITEMS, seed=77)).index, files.index)
    assert_refused(files, tf.errors.DataLossError, files.index, "another file")


def test_item_ids_of_an_older_version(files: Files) -> None:
    with PackedFileWriter(files.item_ids, "item_ids") as writer:
        writer.add("id", files.ids)
    assert_refused(files, tf.errors.FailedPreconditionError, files.item_ids, "run `dpsr index` again")


def test_queries_of_another_dimension_are_refused_at_load(files: Files) -> None:
    faiss_search.FaissIndexTable(files.index, files.item_ids, dim=DIM)
    with pytest.raises(tf.errors.FailedPreconditionError, match=r"dimension 16, but queries have 17"):
        faiss_search.FaissIndexTable(files.index, files.item_ids, dim=DIM + 1)


def test_damaged_item_ids(files: Files) -> None:
    whole = Path(files.item_ids).read_bytes()
    for damaged in (whole[:-1], whole[:50], whole[:500] + bytes([whole[500] ^ 1]) + whole[501:], b""):
        Path(files.item_ids).write_bytes(damaged)
        assert_refused(files, tf.errors.DataLossError, files.item_ids)


def test_item_ids_of_another_kind(files: Files) -> None:
    with PackedFileWriter(files.item_ids, "items") as writer:
        writer.add("id", files.ids)
    assert_refused(files, tf.errors.FailedPreconditionError, files.item_ids, "item_ids", "items")
    with PackedFileWriter(files.item_ids, "item_ids") as writer:
        writer.add("id", files.ids.astype(np.int32))
    assert_refused(files, tf.errors.DataLossError, files.item_ids, "int32")


def test_item_ids_of_another_index(files: Files) -> None:
    for count in (ITEMS - 1, ITEMS + 1, 0):
        files.write_item_ids(np.arange(count, dtype=np.int64))
        assert_refused(
            files,
            tf.errors.FailedPreconditionError,
            files.index,
            files.item_ids,
            f"{count} item ids",
            f"{ITEMS} vectors",
        )


def test_negative_item_ids(tmp_path: Path) -> None:
    ids = np.arange(ITEMS, dtype=np.int64)
    ids[7] = -5
    files = Files(tmp_path, ids=ids)
    assert_refused(files, tf.errors.FailedPreconditionError, files.item_ids, "position 7 is -5")


def test_only_the_inner_product_is_accepted(tmp_path: Path) -> None:
    assert_refused(
        Files(tmp_path, metric=faiss.METRIC_L2), tf.errors.FailedPreconditionError, "metric L2", "inner product"
    )
    assert_refused(Files(tmp_path, metric=faiss.METRIC_L1), tf.errors.FailedPreconditionError, "MetricType(2)")


def test_an_untrained_index(files: Files) -> None:
    faiss.write_index(faiss.index_factory(DIM, "IVF16,Flat", faiss.METRIC_INNER_PRODUCT), files.index)
    files.write_item_ids()
    assert_refused(files, tf.errors.FailedPreconditionError, files.index, "not trained")


def test_an_index_with_ids_of_its_own(files: Files) -> None:
    index = faiss.index_factory(DIM, "IDMap,Flat", faiss.METRIC_INNER_PRODUCT)
    index.add_with_ids(files.items, files.ids + 10_000)
    faiss.write_index(index, files.index)
    files.write_item_ids()
    assert_refused(files, tf.errors.DataLossError, files.index, "built with ids instead of positions")
    index = faiss.index_factory(DIM, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(files.items)
    index.add_with_ids(files.items, np.arange(ITEMS) + 1)
    faiss.write_index(index, files.index)
    files.write_item_ids()
    assert_refused(files, tf.errors.DataLossError, files.index, f"there is {ITEMS}", "built with ids")


def test_parameters_that_faiss_does_not_take(files: Files) -> None:
    for parameters in ("nprobe=3", "no_such=1", "nonsense"):  # a Flat index has no nprobe
        files.parameters = parameters
        assert_refused(files, tf.errors.InvalidArgumentError, parameters)


# ---------------------------------------------------------------------------------------------------- graphs


def export(files: Files, path: Path, static_k: int = 5) -> str:
    """Writes a TensorFlow 1 SavedModel with a fixed and a given k; returns its path."""
    with tf.Graph().as_default():
        table = files.table()
        query = v1.placeholder(tf.float32, [None, None, DIM], "query_embedding")
        k = v1.placeholder(tf.int32, [], "k")
        names = ("item_ids", "scores", "heads")
        fixed = dict(zip(names, table.search(query, static_k), strict=True))
        given = dict(zip(names, table.search(query, k), strict=True))
        assert [output.shape.as_list() for output in fixed.values()] == [[None, static_k]] * 3
        assert [output.shape.as_list() for output in given.values()] == [[None, None]] * 3
        with v1.Session() as session:
            builder = v1.saved_model.Builder(str(path))
            builder.add_meta_graph_and_variables(
                session,
                [tf.saved_model.SERVING],
                signature_def_map={
                    "serving_default": v1.saved_model.predict_signature_def({"query_embedding": query}, fixed),
                    "search": v1.saved_model.predict_signature_def({"query_embedding": query, "k": k}, given),
                },
                assets_collection=v1.get_collection(v1.GraphKeys.ASSET_FILEPATHS),
                main_op=v1.tables_initializer(),
            )
            builder.save()
    assert sorted(asset.name for asset in (path / "assets").iterdir()) == ["item_ids.dpsr", "items.faiss"]
    return str(path)


def run_tf1(path: str, queries: NDArray[np.float32], k: int) -> Result:
    with tf.Graph().as_default(), v1.Session() as session:
        meta_graph = v1.saved_model.load(session, [tf.saved_model.SERVING], path)
        signature = meta_graph.signature_def["search"]
        feed = {signature.inputs["query_embedding"].name: queries, signature.inputs["k"].name: k}
        result: Result = session.run(
            tuple(signature.outputs[name].name for name in ("item_ids", "scores", "heads")), feed
        )
        return result


def run_tf2(path: str, queries: NDArray[np.float32], k: int) -> Callable[[], Result]:
    model = tf.saved_model.load(path)

    def run() -> Result:
        outputs = model.signatures["search"](query_embedding=tf.constant(queries), k=tf.constant(k))
        return outputs["item_ids"].numpy(), outputs["scores"].numpy(), outputs["heads"].numpy()

    return run


def test_saved_model_after_a_move(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    files = Files(tmp_path / "source", "IVF16,SQ8", "nprobe=4")
    path = export(files, tmp_path / "model")
    moved = str(tmp_path / "elsewhere" / "1")
    shutil.move(path, moved)
    shutil.rmtree(tmp_path / "source")
    queries = vectors(6, seed=15).reshape(3, 2, DIM)
    expected = files.expected(queries, 7)
    assert_equal(run_tf1(moved, queries, 7), expected)
    first = run_tf2(moved, queries, 7)
    assert_equal(first(), expected)
    # A second copy in the same process has its own index, and the first keeps the one it has.
    again = str(tmp_path / "again")
    shutil.move(moved, again)
    second = run_tf2(again, queries, 7)
    assert_equal(second(), expected)
    assert_equal(first(), expected)
    assert_equal(run_tf1(again, queries, 7), expected)


def test_saved_model_with_a_damaged_index_is_refused(files: Files, tmp_path: Path) -> None:
    path = export(files, tmp_path / "model")
    asset = Path(path) / "assets" / "items.faiss"
    asset.write_bytes(asset.read_bytes()[:1000])
    queries = vectors(1, seed=16)[:, None]
    for load in (run_tf1, run_tf2):
        with pytest.raises(tf.errors.DataLossError, match=re.escape(str(asset))):
            load(path, queries, 3)


def test_two_tables_in_a_graph(tmp_path: Path) -> None:
    tables = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tables.append(Files(tmp_path / name, items=vectors(100, seed=ord(name))))
    queries = vectors(2, seed=17)[:, None]
    with tf.Graph().as_default(), v1.Session() as session:
        results = [files.table().search(queries, 5) for files in tables]
        session.run(v1.tables_initializer())
        session.run(v1.tables_initializer())  # the same files again: nothing happens
        for files, result in zip(tables, session.run(results), strict=True):
            assert_equal(result, files.expected(queries, 5))


def test_other_files_in_the_same_handle_are_refused(files: Files, tmp_path: Path) -> None:
    other = str(tmp_path / "other.faiss")
    shutil.copy(files.index, other)
    ops = faiss_search.load()
    handle = ops.dpsr_faiss_index_handle(shared_name="test_other_files")
    ops.dpsr_faiss_index_load(handle, files.index, files.item_ids, "")
    ops.dpsr_faiss_index_load(handle, files.index, files.item_ids, "")
    with pytest.raises(tf.errors.FailedPreconditionError, match=r"other\.faiss.*items\.faiss.*already"):
        ops.dpsr_faiss_index_load(handle, other, files.item_ids, "")


def test_search_before_load(files: Files) -> None:
    with tf.Graph().as_default(), v1.Session() as session:
        result = files.table().search(vectors(1, seed=18)[:, None], 3)
        with pytest.raises(tf.errors.FailedPreconditionError, match="not loaded"):
            session.run(result)


def test_static_errors_and_shapes(files: Files) -> None:
    with tf.Graph().as_default():
        table = files.table()
        for shape, k in (([2, DIM], 3), ([2, 1, DIM], 0), ([2, 1, DIM], 10_001), ([2, 1, DIM], [3])):
            with pytest.raises(ValueError):
                table.search(tf.zeros(shape), tf.constant(k))
        assert [part.shape.as_list() for part in table.search(tf.zeros([2, 1, DIM]), 3)] == [[2, 3]] * 3


def test_inside_a_function(files: Files) -> None:
    table = files.table()

    @tf.function(input_signature=[tf.TensorSpec([None, 1, DIM])])
    def best(query: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return table.search(query, 4)

    queries = vectors(3, seed=19)[:, None]
    assert_equal(tuple(part.numpy() for part in best(queries)), files.expected(queries, 4))


def test_the_index_is_freed_with_its_table(files: Files) -> None:
    def mapped() -> bool:
        return files.index in Path("/proc/self/maps").read_text()

    table = files.table()
    assert mapped()
    del table
    gc.collect()
    assert not mapped()


# ---------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize(("factory", "parameters"), [("IVF16,SQ8", "nprobe=4"), ("HNSW16", "efSearch=40")])
def test_eight_threads(trained: Callable[[str, str], Files], factory: str, parameters: str) -> None:
    files = trained(factory, parameters)
    queries = vectors(64, seed=20).reshape(32, 2, DIM)
    expected = files.expected(queries, 20)
    with tf.Graph().as_default(), v1.Session() as session:
        query = v1.placeholder(tf.float32, [None, 2, DIM])
        result = files.table().search(query, 20)
        session.run(v1.tables_initializer())
        run = session.make_callable(list(result), [query])
        failures: list[str] = []

        def work(seed: int) -> None:
            random = np.random.default_rng(seed)
            for _ in range(60):
                # One row is searched in the caller's thread, many are spread over the pool.
                begin, size = random.integers(0, 16), random.choice([1, 2, 16])
                rows = slice(begin, begin + size)
                for got, want in zip(run(queries[rows]), expected, strict=True):
                    if not np.array_equal(got, want[rows]):
                        failures.append(f"thread {seed}, rows {rows}")

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


# ---------------------------------------------------------------------------------------------------- the library

_LOAD = """
import os, sys
import tensorflow as tf
from dpsr_export import op_library_path
ops = tf.load_op_library(op_library_path())  # not faiss_search.load(), which would set FAISS_LIBRARY
index, item_ids, *libraries = sys.argv[1:]
for library in libraries:
    os.environ["FAISS_LIBRARY"] = library
    try:
        ops.dpsr_faiss_index_load(ops.dpsr_faiss_index_handle(shared_name=library), index, item_ids, "")
        print("loaded")
    except Exception as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))
"""


def load_in_a_process(files: Files, *libraries: str, **variables: str) -> tuple[list[str], str]:
    """Loads an index in a new process for each value of FAISS_LIBRARY. Returns the messages and the log."""
    environment = {name: value for name, value in os.environ.items() if name != "FAISS_LIBRARY"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment |= {"TF_CPP_MIN_LOG_LEVEL": "3"} | variables
    process = subprocess.run(
        [sys.executable, "-c", _LOAD, files.index, files.item_ids, *libraries],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return process.stdout.splitlines(), process.stderr


def test_load_names_the_library_of_the_wheel() -> None:
    faiss_search.load()
    assert Path(os.environ["FAISS_LIBRARY"]).samefile(Path(faiss.__file__).parent / "libfaiss.so")


def test_the_op_library_finds_the_wheel_by_itself_and_without_a_gpu_uses_the_cpu(files: Files) -> None:
    # An empty FAISS_LIBRARY is none; once a library is loaded, it stays.
    said, logged = load_in_a_process(files, "", "/no/such/library", TF_CPP_MIN_LOG_LEVEL="3", DPSR_FAISS_DEVICE="gpu")
    assert said == ["loaded", "loaded"]
    lines = [line for line in logged.splitlines() if "DPSR_FAISS_DEVICE=gpu" in line]
    assert len(lines) == 2, "one for each load"
    assert "faiss-gpu==1.15.1" in lines[0]
    assert "the CPU is used" in lines[0]


def test_devices(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("gpu:0", "cpu", ""):
        monkeypatch.setenv("DPSR_FAISS_DEVICE", device)
        queries = vectors(2, seed=21)[:, None]
        assert_equal(search(files.table(), queries, 5), files.expected(queries, 5))
    for device in ("tpu", "gpu:", "gpu:x", "gpu:-1", "GPU"):
        monkeypatch.setenv("DPSR_FAISS_DEVICE", device)
        assert_refused(files, tf.errors.InvalidArgumentError, f'DPSR_FAISS_DEVICE is "{device}"', "expected cpu, gpu")


def test_libraries_that_do_not_fit_are_refused(files: Files, tmp_path: Path) -> None:
    wrong, missing = str(tmp_path / "wrong" / "libfaiss.so"), str(tmp_path / "missing" / "libfaiss.so")
    Path(wrong).parent.mkdir()
    source = FAISS_BINDING / "wrong_version_faiss.cc"
    subprocess.run(["c++", "-std=c++17", "-shared", "-fPIC", str(source), "-o", wrong], check=True)
    right = str(Path(faiss.__file__).parent / "libfaiss.so")
    (other_version, not_there, loaded), _ = load_in_a_process(files, wrong, missing, right)
    for said, words in (
        (other_version, (wrong, "FAISS version 9.8.7", "version 1.15.1 is needed")),
        (not_there, (missing, "cannot open")),
    ):
        assert "FailedPreconditionError" in said
        for word in (*words, "install faiss-cpu==1.15.1", "FAISS_LIBRARY"):
            assert word in said
    assert loaded == "loaded"
