"""The ops that change the items of a loaded index, against a NumPy model. The tests beside the C++ cover the index."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import pytest
import tensorflow as tf
from numpy.typing import NDArray

from dpsr_export import ann, faiss_search, item_attributes

v1 = tf.compat.v1

DIM = 8
ITEMS = 400
PUT, UPDATE, DELETE = 0, 1, 2


class Changes(NamedTuple):
    """What DpsrItemChangesRead returns."""

    kinds: NDArray[np.int32]
    item_ids: NDArray[np.int64]
    versions: NDArray[np.int64]
    times: NDArray[np.float64]
    keys: list[str]
    examples: list[bytes]
    next_offset: np.int64


def example(**values: float | bytes | list[bytes]) -> bytes:
    features = {}
    for name, value in values.items():
        if isinstance(value, float):
            feature = tf.train.Feature(float_list=tf.train.FloatList(value=[value]))
        else:
            texts = value if isinstance(value, list) else [value]
            feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=texts))
        features[name.replace("__", ".")] = feature
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def changes(*rows: tuple[int, int, bytes], next_offset: int, keys: list[str] | None = None) -> Changes:
    """Makes changes of (kind, item id, example)."""
    n = len(rows)
    return Changes(
        np.array([row[0] for row in rows], np.int32),
        np.array([row[1] for row in rows], np.int64),
        np.zeros(n, np.int64),
        np.arange(n) + 100.0,
        keys or [""] * n,
        [row[2] for row in rows],
        np.int64(next_offset),
    )


@pytest.fixture(scope="module")
def vectors() -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(size=(ITEMS, DIM)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path, vectors: NDArray[np.float32]) -> Path:
    index = faiss.index_factory(DIM, "IVF8,SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    index.nprobe = 8
    faiss.write_index(index, str(tmp_path / "items.faiss"))
    faiss_search.write_item_ids(
        tmp_path / "item_ids.dpsr",
        np.arange(ITEMS),
        tmp_path / "items.faiss",
        residual=ann.code_residual(index, vectors),
    )
    item_attributes.write_columns(
        tmp_path,
        [
            item_attributes.Column("price", np.arange(ITEMS) / 2),
            item_attributes.Column("brand", np.arange(ITEMS) % 3, ["acme", "other"]),
        ],
    )
    return tmp_path


def table(folder: Path, **options: Any) -> faiss_search.FaissIndexTable:
    return faiss_search.FaissIndexTable(
        str(folder / "items.faiss"), str(folder / "item_ids.dpsr"), str(folder / item_attributes.FILE), **options
    )


def found(items: faiss_search.FaissIndexTable, query: NDArray[np.float32], k: int, **filters: list[str]) -> list[int]:
    given = {name: tf.constant([values]) for name, values in filters.items()}
    ids = items.search(query.reshape(1, 1, DIM), k, **given)[0].numpy()[0]
    return [int(number) for number in ids if number >= 0]


def test_changes_are_searched_at_once(folder: Path, vectors: NDArray[np.float32]) -> None:
    items = table(folder, changes_offset=7)
    query = vectors[5]
    nothing = np.zeros((0, DIM), np.float32)
    assert items.apply_changes(7, changes(next_offset=7), nothing).numpy()
    before = items.search(query.reshape(1, 1, DIM), 20)
    plain = table(folder).search(query.reshape(1, 1, DIM), 20)
    for one, other in zip(before, plain, strict=True):
        np.testing.assert_array_equal(one, other)

    batch = changes(
        (DELETE, 5, b""),
        (PUT, 1000, example(item_text=b"new", attribute__price=12.5, attribute__brand=b"brand new")),
        (UPDATE, 6, example(attribute__price=b"0.1", attribute__brand=[], attribute__unknown=3.0)),
        (PUT, 7, example()),
        (PUT, 8, example()),
        next_offset=12,
        keys=["", "the new one", "", "seven", ""],
    )
    new = np.stack([query * 20, query * 15, np.zeros(DIM, np.float32)])
    assert items.apply_changes(7, batch, new).numpy()
    assert not items.apply_changes(7, batch, new).numpy(), "the second call comes too late"
    state = items.changes_state()
    assert state.offset.numpy() == 12
    assert state.last_time.numpy() == 104
    assert state.counts.numpy().tolist() == [ITEMS - 1, 2, 0, 0, 3, 0, 1, 1]
    assert state.drift.numpy() > 0

    assert found(items, query, 2) == [1000, 7]
    everything = found(items, query, ITEMS + 10)
    assert sorted(everything) == [i for i in range(ITEMS) if i not in (5, 8)] + [1000]
    assert found(items, query, 10, include=["brand=brand new"]) == [1000]
    assert found(items, query, 10, include=["price=0.1"]) == [6]
    assert found(items, query, 10, include=["price=12.5"]) == [1000, 25]
    assert 6 not in found(items, query, ITEMS, include=["brand=acme|other"])
    ids = items.search(query.reshape(1, 1, DIM), 2, excluded_item_ids=np.array([[1000, -1]]))[0].numpy()
    assert ids[0, 0] == 7

    keys = items.changed_item_keys(np.array([[1000, 7], [3, -1]]), tf.constant([["", "known"], ["", ""]]))
    assert keys.numpy().tolist() == [[b"the new one", b"known"], [b"", b""]]
    known = items.changed_item_ids(tf.constant(["the new one", "seven", "", "x"]), np.array([-1, 9, -1, -1]))
    assert known.numpy().tolist() == [1000, 9, -1, -1]


@pytest.mark.parametrize(
    ("factory", "lists"),
    [("Flat", False), ("HNSW8", False), ("IVF8,PQ4x4fs,RFlat", False), ("IVF8,Flat", True), ("PCA6,IVF8,SQ8", True)],
)
def test_every_kind_of_index_takes_changes(
    tmp_path: Path, vectors: NDArray[np.float32], factory: str, lists: bool
) -> None:
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "items.faiss"))
    residual = ann.code_residual(index, vectors)
    assert (residual is not None) == lists
    faiss_search.write_item_ids(
        tmp_path / "item_ids.dpsr", np.arange(ITEMS), tmp_path / "items.faiss", residual=residual
    )
    items = faiss_search.FaissIndexTable(str(tmp_path / "items.faiss"), str(tmp_path / "item_ids.dpsr"))
    # So many that the open segment is sealed.
    puts = 8200
    new = np.random.default_rng(2).normal(size=(puts, DIM)).astype(np.float32)
    rows = [(PUT, ITEMS - 200 + i, b"") for i in range(puts)]
    assert items.apply_changes(0, changes(*rows, next_offset=puts), new).numpy()
    gone = np.arange(0, ITEMS + 1000, 2)
    rows = [(DELETE, int(number), b"") for number in gone]
    assert items.apply_changes(puts, changes(*rows, next_offset=puts + len(gone)), new[:0]).numpy()
    counts = items.changes_state().counts.numpy()
    total = puts + ITEMS - 200 - len(gone)
    assert counts[:4].tolist() == [total, 8, total - 108, 1]

    expected = np.concatenate([vectors[: ITEMS - 200], new])
    query = vectors[0] / np.linalg.norm(vectors[0])
    scores = expected @ query
    scores[gone] = -np.inf
    found_ids, found_scores, _ = items.search(query.reshape(1, 1, DIM), total + 10)
    there = found_ids.numpy()[0, :total]
    assert sorted(there) == [i for i in range(len(expected)) if i >= len(gone) * 2 or i % 2], "each visible item, once"
    assert np.all(found_ids.numpy()[0, total:] == -1)
    if not factory.startswith("PCA"):  # which loses dimensions
        np.testing.assert_allclose(found_scores.numpy()[0, :total], scores[there], atol=0.1)


def test_a_row_of_a_batch_has_its_own_filter(folder: Path, vectors: NDArray[np.float32]) -> None:
    items = table(folder)
    puts = [(PUT, 1000 + i, example(attribute__brand=b"new" if i % 2 else b"acme")) for i in range(40)]
    assert items.apply_changes(0, changes(*puts, next_offset=40), vectors[:40] * 3).numpy()
    queries = np.repeat(vectors[:12, np.newaxis], 2, axis=1)
    include = tf.constant([["brand=new"] if i % 2 else [""] for i in range(12)])
    ids, scores, heads = (output.numpy() for output in items.search(queries, 5, include=include))
    for row in range(12):
        one = items.search(queries[row : row + 1], 5, include=include[row : row + 1])
        for together, alone in zip((ids, scores, heads), one, strict=True):
            np.testing.assert_array_equal(together[row], alone.numpy()[0])
        if row % 2:
            assert all(number >= 1000 and number % 2 for number in ids[row])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": np.array([3], np.int32)}, "the kind of a change is 3"),
        ({"item_ids": np.array([-4], np.int64)}, "the item id of a change is -4"),
        ({"examples": [b"no example"]}, "is not a serialized tf.train.Example"),
        ({"keys": ["", ""]}, "keys"),
        ({"next_offset": np.int64(-1)}, "next_offset is -1"),
        ({"versions": np.zeros((1, 1), np.int64)}, "versions"),
    ],
)
def test_bad_changes_are_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    items = table(folder)
    batch = changes((DELETE, 3, b""), next_offset=1)._replace(**change)
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        items.apply_changes(0, batch, np.zeros((0, DIM), np.float32))
    assert items.changes_state().counts.numpy()[0] == ITEMS


@pytest.mark.parametrize("shape", [(0, DIM), (1, DIM + 1), (2, DIM)])
def test_vectors_that_do_not_fit_the_puts_are_refused(folder: Path, shape: tuple[int, int]) -> None:
    items = table(folder)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"vectors has shape .*, expected \[1,8\]"):
        items.apply_changes(0, changes((PUT, 3, b""), next_offset=1), np.zeros(shape, np.float32))


def test_shapes_are_known_in_a_graph(folder: Path) -> None:
    with tf.Graph().as_default():
        items = table(folder)
        given = v1.placeholder(tf.int64, [None, 3])
        assert items.changed_item_keys(given, tf.fill(tf.shape(given), "")).shape.as_list() == [None, 3]
        state = items.changes_state()
        assert [output.shape.as_list() for output in state] == [[], [8], [], []]
        bad = changes((PUT, 3, b""), next_offset=1)
        with pytest.raises(ValueError, match="rank 2"):
            items.apply_changes(0, bad, tf.zeros([DIM]))
        with pytest.raises(ValueError, match=r"[Dd]imension"):
            items.apply_changes(0, bad._replace(keys=["", ""]), tf.zeros([1, DIM]))
        with v1.Session() as session, pytest.raises(tf.errors.FailedPreconditionError, match="not loaded"):
            session.run(state)


def test_bad_options_of_the_load_op(folder: Path) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match="shard 2, num_shards 2"):
        table(folder, shard=2, num_shards=2)


def test_versions_of_the_file_count(folder: Path) -> None:
    index = folder / "items.faiss"
    ids = np.arange(ITEMS)
    versions = np.zeros(ITEMS, np.int64)
    versions[3] = 10
    with faiss_search.PackedFileWriter(str(folder / "item_ids.dpsr"), "item_ids") as file:
        file.add("id", ids)
        file.add("index.bytes", np.array([index.stat().st_size], np.uint64))
        file.add("index.checksum", np.array([faiss_search.checksum(np.memmap(index, np.uint8, "r"))], np.uint64))
        file.add("version", versions)
        file.add("hidden.id", np.array([2000], np.int64))
        file.add("hidden.version", np.array([20], np.int64))
    items = faiss_search.FaissIndexTable(str(index), str(folder / "item_ids.dpsr"))
    old = changes((DELETE, 3, b""), (PUT, 2000, b""), next_offset=2)._replace(versions=np.array([9, 19]))
    assert items.apply_changes(0, old, np.ones((1, DIM), np.float32)).numpy()
    assert items.changes_state().counts.numpy()[[0, 5]].tolist() == [ITEMS, 2]
