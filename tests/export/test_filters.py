"""Searches with filters compared with NumPy, for each kind of index, and bad requests."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from conftest import Job
from numpy.typing import NDArray

from dpsr_common.packed_file import PackedFile, PackedFileWriter
from dpsr_export import faiss_search, item_attributes
from dpsr_export.item_attributes import Column
from dpsr_tf.data.store import unpack_strings

v1 = tf.compat.v1

ITEMS, DIM = 20_000, 16
# Each kind of index that a config may name. Inverted lists are read directly; other indexes are scored item by item.
FACTORIES = {
    "Flat": "",
    "IVF64,Flat": "nprobe=8",
    "IVF64,SQ8": "nprobe=8",
    "IVF64,PQ8x4np": "nprobe=8",
    "RR12,IVF64,SQ8": "nprobe=8",
    "IVF64_HNSW8,SQ8": "nprobe=8",
    "IVF64(IVF8,Flat),SQ8": "nprobe=8,quantizer_nprobe=8",
    "IVF64,PQ8x4fs": "nprobe=8",
    "IVF64,PQ8x4fs,RFlat": "nprobe=8,k_factor_rf=4",
    "HNSW16": "efSearch=100",
}
LISTS = ("IVF64,Flat", "IVF64,SQ8", "IVF64,PQ8x4np", "RR12,IVF64,SQ8", "IVF64_HNSW8,SQ8", "IVF64(IVF8,Flat),SQ8")
COLOURS = ["red", "green", "blue", "手机", "a|b", "c\\d"]

Result = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int32]]


def columns() -> list[Column]:
    """Attributes with no relation to the vectors; `half`, `tenth`, ... have one value at about that share of items."""
    random = np.random.default_rng(5)
    draw = random.random(ITEMS)
    shares = {"half": 0.5, "tenth": 0.1, "hundredth": 0.01, "thousandth": 0.001}
    lengths = random.integers(0, 4, ITEMS)
    splits = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    price = np.round(random.random(ITEMS) * 100, 2)
    price[::50] = np.nan
    return [
        *(Column(name, (draw < share).astype(np.int32), ["yes"]) for name, share in shares.items()),
        Column("colour", random.integers(0, len(COLOURS) + 1, ITEMS).astype(np.int32), COLOURS),
        Column("shop", random.integers(0, 1000, ITEMS).astype(np.int32), [f"shop {i}" for i in range(1000)]),
        Column("price", price),
        Column("stars", random.integers(0, 6, ITEMS).astype(np.float64)),
        Column("tags", random.integers(1, 8, splits[-1]).astype(np.int32), [f"t{i}" for i in range(7)], splits),
    ]


@dataclasses.dataclass(frozen=True)
class Shop:
    """An index with ids and attributes, and the Python FAISS index of the same file."""

    path: Path
    ids: NDArray[np.int64]
    vectors: NDArray[np.float32]
    scored: NDArray[np.float32]  # as the index holds them
    columns: dict[str, Column]

    def table(self, **arguments: Any) -> faiss_search.FaissIndexTable:
        return faiss_search.FaissIndexTable(
            str(self.path / "items.faiss"),
            str(self.path / "item_ids.dpsr"),
            str(self.path / item_attributes.FILE),
            **arguments,
        )


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Shop]:
    """Shops by the factory of their index, made once; not to be changed."""
    faiss.omp_set_num_threads(1)
    vectors = np.random.default_rng(1).normal(size=(ITEMS, DIM)).astype(np.float32)
    ids = np.random.default_rng(2).permutation(ITEMS) * 3 + 7

    @functools.cache
    def make(factory: str) -> Shop:
        path = tmp_path_factory.mktemp("shop")
        index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
        if "(" in factory:  # centroids that lie in lists: residuals need a table of them
            faiss.downcast_index(index.quantizer).make_direct_map()
        index.train(vectors[:4000])
        index.add(vectors)
        if FACTORIES[factory]:
            faiss.ParameterSpace().set_index_parameters(index, FACTORIES[factory])
        faiss.write_index(index, str(path / "items.faiss"))
        faiss_search.write_item_ids(path / "item_ids.dpsr", ids, path / "items.faiss")
        item_attributes.write_columns(path, columns())
        ivf = faiss.try_extract_index_ivf(index)
        if ivf is not None:
            ivf.make_direct_map()
        return Shop(path, ids, vectors, index.reconstruct_n(0, ITEMS), {c.name: c for c in columns()})

    return make


def queries(n: int, seed: int, heads: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(n, heads, DIM)).astype(np.float32)


def search(table: faiss_search.FaissIndexTable, x: NDArray[np.float32], k: int, **arguments: Any) -> Result:
    ids, scores, heads = (tensor.numpy() for tensor in table.search(x, k, **arguments))
    return ids, scores, heads


def recall(shop: Shop, x: NDArray[np.float32], ids: NDArray[np.int64], k: int, passing: NDArray[np.bool_]) -> float:
    """Recall of the k best codes of the index among the items that pass. Also checks ids and their number."""
    positions = np.flatnonzero(passing)
    allowed = set(shop.ids[positions].tolist())
    found = wanted = 0
    for query, row in zip(x[:, 0], ids, strict=True):
        there = row[row >= 0]
        assert set(there.tolist()) <= allowed
        assert len(set(there.tolist())) == len(there) == min(k, len(positions))
        best = positions[np.argsort(-(shop.scored[positions] @ query), kind="stable")[:k]]
        found += len(set(shop.ids[best].tolist()) & set(there.tolist()))
        wanted += len(best)
    return found / wanted if wanted else 1.0


# ---------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("factory", FACTORIES)
def test_results_are_the_best_of_those_that_pass(shop: Callable[[str], Shop], factory: str) -> None:
    here = shop(factory)
    table = here.table()
    x = queries(8, seed=3)
    unfiltered = recall(here, x, search(table, x, 100)[0], 100, np.ones(ITEMS, bool))
    for name in ("half", "tenth", "hundredth", "thousandth"):
        passing = here.columns[name].values == 1
        ids, scores, _ = search(table, x, 100, include=np.full((8, 1), f"{name}=yes"))
        found = recall(here, x, ids, 100, passing)
        assert found >= unfiltered - 0.03, (name, found, unfiltered)
        if passing.sum() <= 8192:
            assert found >= 0.99, name  # all of them were scored; equal scores of short codes are as good
        # Scores are those of the index, and descend.
        position = {item: i for i, item in enumerate(here.ids.tolist())}
        for query, row, values in zip(x[:, 0], ids, scores, strict=True):
            there = row >= 0
            rows = [position[item] for item in row[there].tolist()]
            exact = here.vectors if factory.endswith("RFlat") else here.scored
            error = 0.3 if factory.endswith("fs") else 2e-3  # FastScan rounds its tables to 8 bits
            np.testing.assert_allclose(values[there], exact[rows] @ query, rtol=1e-3, atol=error)
            assert (np.diff(values[there]) <= 0).all()
            assert (values[~there] == -np.inf).all()


@pytest.mark.parametrize("factory", [factory for factory in LISTS if "HNSW" not in factory])
def test_a_filter_that_all_items_pass_changes_nothing(shop: Callable[[str], Shop], factory: str) -> None:
    table = shop(factory).table(max_parameters="nprobe=64")
    x = queries(8, seed=4, heads=2)
    plain = search(table, x, 50, parameters="nprobe=64")
    filtered = search(table, x, 50, exclude=np.full((8, 1), "shop=no such"), parameters="nprobe=64")
    np.testing.assert_array_equal(plain[0], filtered[0])
    np.testing.assert_allclose(plain[1], filtered[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(plain[2], filtered[2])


def meets(shop: Shop, expression: str) -> NDArray[np.bool_]:
    """Evaluates an expression without escapes in NumPy."""
    name, _, text = expression.partition("=")
    column = shop.columns[name]
    passing = np.zeros(ITEMS, bool)
    for value in text.split("|"):
        if column.texts is None:
            low, dots, high = value.partition("..")
            passing |= (column.values >= float(low or "-inf")) & (
                column.values <= (float(high or "inf") if dots else float(low))
            )
        else:
            code = column.texts.index(value) + 1 if value in column.texts else -1
            if column.splits is None:
                passing |= column.values == code
            else:
                rows = np.repeat(np.arange(ITEMS), np.diff(column.splits))
                passing[rows[column.values == code]] = True
    return passing


@pytest.mark.parametrize(
    ("include", "exclude"),
    [
        (["colour=red"], []),
        (["colour=red|手机|no such"], ["half=yes"]),
        (["colour=no such"], []),
        ([], ["colour=red|green|blue|手机"]),
        (["shop=shop 7|shop 8|shop 9|shop 100|shop 200|shop 300"], []),
        (["price=10..20"], ["price=15..15.5|12"]),
        (["price=..0.5|99.5.."], []),
        (["price=-1..0.005"], []),
        (["stars=3|5"], ["stars=5..9"]),
        (["stars=2.5..4.5", "colour=blue"], []),
        (["tags=t1|t2"], ["tags=t3"]),
        ([], ["price=..1000"]),
        (["half=yes", "tenth=yes", "price=1..", "tags=t0"], ["colour=red", "stars=1"]),
    ],
)
def test_expressions(shop: Callable[[str], Shop], include: list[str], exclude: list[str]) -> None:
    for factory in ("Flat", "IVF64,SQ8"):  # positions in order, and in the order of lists
        here = shop(factory)
        passing = np.ones(ITEMS, bool)
        for text in include:
            passing &= meets(here, text)
        for text in exclude:
            passing &= ~meets(here, text)
        k = min(10_000, max(1, int(passing.sum()) + 5))
        ids, _, _ = search(
            here.table(), queries(1, seed=6), k, include=np.array([["", *include]]), exclude=np.array([[*exclude, ""]])
        )
        if passing.sum() <= 8192:
            assert set(ids[ids >= 0].tolist()) == set(here.ids[passing].tolist())
        else:
            assert set(ids[ids >= 0].tolist()) <= set(here.ids[passing].tolist())


def test_escapes(shop: Callable[[str], Shop]) -> None:
    here = shop("Flat")
    for text, colour in (("colour=a\\|b", "a|b"), ("colour=c\\\\d", "c\\d")):
        ids, _, _ = search(here.table(), queries(1, seed=7), 5000, include=np.array([[text]]))
        expected = here.columns["colour"].values == COLOURS.index(colour) + 1
        assert set(ids[ids >= 0].tolist()) == set(here.ids[expected].tolist())


def test_each_row_has_its_own_filters(shop: Callable[[str], Shop]) -> None:
    here = shop("IVF64,SQ8")
    x = queries(12, seed=8)
    include = np.array([["colour=red"], [""], ["tenth=yes"]] * 4)
    excluded = np.where(np.arange(12)[:, None] % 2 == 0, here.ids[:40], -1)
    together = search(here.table(), x, 30, include=include, excluded_item_ids=excluded)
    for row in range(12):
        alone = search(
            here.table(),
            x[row : row + 1],
            30,
            include=include[row : row + 1],
            excluded_item_ids=excluded[row : row + 1],
        )
        for got, want in zip(together, alone, strict=True):
            np.testing.assert_array_equal(got[row], want[0])


@pytest.mark.parametrize("factory", FACTORIES)
def test_excluded_ids(shop: Callable[[str], Shop], factory: str) -> None:
    here = shop(factory)
    table = here.table()
    x = queries(4, seed=9, heads=2)
    found = search(table, x, 60)
    # All but the first ten that are found, some ids that no item has, and padding.
    excluded = np.concatenate([found[0][:, 10:40], np.full((4, 3), 2**40), np.full((4, 2), -1)], axis=1)
    ids, scores, _ = search(table, x, 30, excluded_item_ids=excluded)
    assert not any(set(a.tolist()) & set(b.tolist()) - {-1} for a, b in zip(ids, excluded, strict=True))
    assert (ids >= 0).all()
    if factory in LISTS or factory == "Flat":  # graphs and refinement look further when they are asked for more
        np.testing.assert_array_equal(ids, np.delete(found[0], np.s_[10:40], axis=1)[:, :30])
        np.testing.assert_array_equal(scores, np.delete(found[1], np.s_[10:40], axis=1)[:, :30])
    only = search(
        table, x, 10, include=np.full((4, 1), "thousandth=yes"), excluded_item_ids=here.ids[None].repeat(4, 0)[:, :9999]
    )
    passing = (here.columns["thousandth"].values == 1)[9999:]
    for row in only[0]:
        assert set(row.tolist()) - {-1} <= set(here.ids[9999:][passing].tolist())


def test_excluded_ids_that_stand_several_times(tmp_path: Path) -> None:
    items = np.linspace(1, 0, 100, dtype=np.float32)[:, None] * np.ones(4, np.float32)
    index = faiss.IndexFlatIP(4)
    index.add(items)
    faiss.write_index(index, str(tmp_path / "items.faiss"))
    faiss_search.write_item_ids(
        tmp_path / "item_ids.dpsr", np.minimum(np.arange(100), 60)[::-1] // 30, tmp_path / "items.faiss"
    )
    table = faiss_search.FaissIndexTable(str(tmp_path / "items.faiss"), str(tmp_path / "item_ids.dpsr"))
    # 40 positions of item 2, then 30 of item 1: one more than k is not enough.
    x = np.ones((1, 1, 4), np.float32)
    assert search(table, x, 2, excluded_item_ids=np.array([[2]]))[0].tolist() == [[1, -1]]
    assert search(table, x, 40, excluded_item_ids=np.array([[2]]))[0][0, :3].tolist() == [1, 0, -1]


def test_heads_that_are_empty_stay_empty(shop: Callable[[str], Shop]) -> None:
    x = queries(3, seed=10)
    x[0], x[1, 0, 2] = 0, np.nan
    ids, scores, heads = search(shop("IVF64,SQ8").table(), x, 5, include=np.full((3, 1), "half=yes"))
    assert (ids[:2] == -1).all()
    assert (scores[:2] == -np.inf).all()
    assert (heads[:2] == -1).all()
    assert (ids[2] >= 0).all()


def test_ten_thousand(shop: Callable[[str], Shop]) -> None:
    here = shop("IVF64,SQ8")
    passing = here.columns["half"].values == 1
    ids, _, _ = search(here.table(), queries(1, seed=11), 10_000, include=np.array([["half=yes"]]))
    assert len(set(ids[0].tolist()) - {-1}) == min(10_000, passing.sum())


def test_items_that_are_no_numbers_are_in_no_list(tmp_path: Path) -> None:
    items = np.random.default_rng(12).normal(size=(3000, DIM)).astype(np.float32)
    index = faiss.index_factory(DIM, "IVF8,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(items)
    items[::3] = np.nan
    index.add(items)
    faiss.write_index(index, str(tmp_path / "items.faiss"))
    faiss_search.write_item_ids(tmp_path / "item_ids.dpsr", np.arange(3000), tmp_path / "items.faiss")
    item_attributes.write_columns(tmp_path, [Column("n", np.arange(3000) % 10.0)])
    table = faiss_search.FaissIndexTable(
        *(str(tmp_path / name) for name in ("items.faiss", "item_ids.dpsr", item_attributes.FILE))
    )
    ids, _, _ = search(table, queries(1, seed=13), 3000, include=np.array([["n=2..3"]]))
    expected = {i for i in range(3000) if i % 3 and i % 10 in (2, 3)}
    assert set(ids[0].tolist()) - {-1} == expected


# ---------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("factory", [f for f in FACTORIES if f != "Flat"])
def test_parameters_of_a_request(shop: Callable[[str], Shop], factory: str) -> None:
    here = shop(factory)
    few, many = ("efSearch=1", "efSearch=2000") if factory == "HNSW16" else ("nprobe=1", "nprobe=64")
    table = here.table(max_parameters=many)
    x = queries(8, seed=14)
    k = 10
    # As an index that was saved with them.
    for parameters in (few, many):
        index = faiss.read_index(str(here.path / "items.faiss"))
        faiss.ParameterSpace().set_index_parameters(index, parameters)
        ids, _, _ = search(table, x, k, parameters=parameters)
        expected = np.stack([index.search(query, k)[1][0] for query in x])
        for row, positions in zip(ids, expected, strict=True):
            assert set(row.tolist()) - {-1} == set(here.ids[positions[positions >= 0]].tolist())
    # The index that all share is as before.
    np.testing.assert_array_equal(search(table, x, k)[0], search(here.table(), x, k)[0])
    assert (
        recall(
            here,
            x,
            search(table, x, k, parameters=many, include=np.full((8, 1), "half=yes"))[0],
            k,
            here.columns["half"].values == 1,
        )
        >= 0.6
    )


def test_k_factor_of_a_request(shop: Callable[[str], Shop]) -> None:
    here = shop("IVF64,PQ8x4fs,RFlat")
    table = here.table(max_parameters="nprobe=64,k_factor_rf=100")
    x = queries(8, seed=15)
    everything = np.ones(ITEMS, bool)
    poor = recall(here, x, search(table, x, 10, parameters="nprobe=64,k_factor_rf=1")[0], 10, everything)
    good = recall(here, x, search(table, x, 10, parameters="nprobe=64,k_factor_rf=100")[0], 10, everything)
    assert good > 0.95 > poor


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nprobe=65", "nprobe is 65, expected at most 64"),
        ("efSearch=10", "this index has no efSearch, only nprobe"),
        ("nprobe=0", "nprobe is not a whole number from 1"),
        ("nprobe=-3", "nprobe is not a whole number"),
        ("nprobe=1.5", "nprobe is not a whole number"),
        ("nprobe=", "nprobe is not a whole number"),
        ("nprobe", "nprobe is not a whole number"),
        ("nprobe=8,nprobe=9", "nprobe is given twice"),
        ("nprobe=8,", "ends in a comma"),
        ("nprobe=1e400", "nprobe is not a whole number"),
        ("nprobe = 8", "not one of nprobe, max_codes, efSearch, k_factor_rf"),
        ("verbose=1", "not one of nprobe, max_codes, efSearch, k_factor_rf"),
    ],
)
def test_parameters_that_are_refused(shop: Callable[[str], Shop], given: str, message: str) -> None:
    table = shop("IVF64,SQ8").table(max_parameters="nprobe=64")
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        search(table, queries(1, seed=16), 5, parameters=given)


def test_no_parameter_may_be_set_where_none_is_declared(shop: Callable[[str], Shop]) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match="nprobe cannot be set by a request here"):
        search(shop("IVF64,SQ8").table(), queries(1, seed=17), 5, parameters="nprobe=1")
    with pytest.raises(tf.errors.InvalidArgumentError, match="this index has no nprobe, only efSearch"):
        shop("HNSW16").table(max_parameters="nprobe=4")


# ---------------------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("weight=3", 'filter on "weight": there is no such attribute, expected one of: half, .*, price, stars, tags'),
        ("colour", 'filter "colour" has no =; expected NAME=VALUE'),
        ("=red", "has no name"),
        ("colour=", "has an empty value"),
        ("colour=red||blue", "has an empty value"),
        ("colour=|", "has an empty value"),
        ("colour=a\\", "has a backslash"),
        ("colour=a\\b", "has a backslash"),
        ("price=cheap", '"price" is a number, but "cheap" is neither a number nor a range'),
        ("price=20..10", '"20..10" is neither'),
        ("price=..", r'"\.\." is neither'),
        ("price=nan", '"nan" is neither'),
        ("price=1..inf", "is neither"),
        ("price=1,5", "is neither"),
        ("price= 1", "is neither"),
        ("x" * 70_000, "has 70000 bytes, expected at most 65536"),
    ],
)
def test_expressions_that_are_refused(shop: Callable[[str], Shop], expression: str, message: str) -> None:
    for inputs in ({"include": [[expression]]}, {"exclude": [[expression]]}):
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            search(shop("IVF64,SQ8").table(), queries(1, seed=18), 5, **{k: np.array(v) for k, v in inputs.items()})


def test_bytes_that_are_no_text(shop: Callable[[str], Shop]) -> None:
    table = shop("IVF64,SQ8").table()
    for bad in (b"\xff\xfe=1", b"col\x00our=1", b"\xed\xa0\x80=1"):
        with pytest.raises(tf.errors.InvalidArgumentError, match="no such attribute"):
            search(table, queries(1, seed=19), 5, include=tf.constant([[bad]]))
    assert (search(table, queries(1, seed=19), 5, include=tf.constant([[b"colour=\xff"]]))[0] == -1).all()


def test_an_index_without_attributes(shop: Callable[[str], Shop]) -> None:
    here = shop("IVF64,SQ8")
    table = faiss_search.FaissIndexTable(str(here.path / "items.faiss"), str(here.path / "item_ids.dpsr"))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"no attributes to filter by.*items\.filters"):
        search(table, queries(1, seed=20), 5, include=np.array([["colour=red"]]))
    x = queries(2, seed=20)
    np.testing.assert_array_equal(
        search(table, x, 5)[0], search(table, x, 5, include=np.array([[""], [""]]), exclude=np.zeros(0, str))[0]
    )


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"include": np.array(["half=yes"])}, r"include has shape \[1\], expected \[batch, n\] with the batch of 2"),
        ({"exclude": np.full((3, 1), "half=yes")}, r"exclude has shape \[3,1\], expected"),
        ({"excluded_item_ids": np.array([[1]])}, r"excluded_item_ids has shape \[1,1\], expected"),
        ({"excluded_item_ids": np.zeros((2, 10_001), np.int64)}, "10001 excluded item ids, expected at most 10000"),
        (
            {"include": np.array([[f"price={i}" for i in range(257)]] * 2)},
            "257 filters to include, expected at most 256",
        ),
        ({"excluded_item_ids": tf.constant([[1], [2]], tf.int32)}, "int64"),
        ({"include": tf.constant([[1], [2]])}, "string"),
        ({"parameters": tf.constant([""])}, r"parameters has shape \[1\], expected a scalar"),
    ],
)
def test_bad_inputs(shop: Callable[[str], Shop], inputs: dict[str, Any], message: str) -> None:
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError, TypeError), match=message):
        search(shop("IVF64,SQ8").table(), queries(2, seed=21), 5, **inputs)


# ---------------------------------------------------------------------------------------------------- bad files


def test_attributes_that_do_not_fit(shop: Callable[[str], Shop], tmp_path: Path) -> None:
    here = shop("Flat")
    copy = dataclasses.replace(here, path=tmp_path)
    for name in ("items.faiss", "item_ids.dpsr", item_attributes.FILE):
        shutil.copy(here.path / name, tmp_path / name)
    file = tmp_path / item_attributes.FILE
    whole = file.read_bytes()

    def refused(error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            copy.table()

    file.write_bytes(whole[:-1])
    refused(tf.errors.DataLossError, item_attributes.FILE)
    file.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 4]) + whole[len(whole) // 2 + 1 :])
    refused(tf.errors.DataLossError, "checksum")
    file.unlink()
    refused(tf.errors.NotFoundError, item_attributes.FILE)
    shutil.copy(here.path / "item_ids.dpsr", file)
    refused(tf.errors.FailedPreconditionError, "item_attributes")
    # Of other items: the ids of the same index, but the other way round.
    faiss_search.write_item_ids(tmp_path / "item_ids.dpsr", here.ids[::-1].copy(), tmp_path / "items.faiss")
    shutil.copy(here.path / item_attributes.FILE, file)
    refused(tf.errors.FailedPreconditionError, "belongs to another index")

    fingerprint = np.array([PackedFile(str(tmp_path / "item_ids.dpsr")).fingerprint], np.uint64)
    codes = np.zeros(ITEMS, np.uint8)

    def written(sections: dict[str, NDArray[Any]], error: type[Exception], message: str) -> None:
        with PackedFileWriter(str(file), "item_attributes") as writer:
            writer.add("item_ids.fingerprint", fingerprint)
            for name, values in sections.items():
                writer.add(name, values)
        refused(error, message)

    splits, text = np.array([0, 1], np.int64), np.frombuffer(b"a", np.uint8)
    texts = {"text.c.splits": splits, "text.c.bytes": text}
    fine = np.arange(ITEMS + 1, dtype=np.int64)
    mismatch, damaged = tf.errors.FailedPreconditionError, tf.errors.DataLossError
    written({"value.c": codes[1:], **texts}, mismatch, f"has {ITEMS - 1} items, but the index has {ITEMS}")
    written({"value.c": codes}, damaged, r"text\.c\.splits")
    written({"value.c": codes + np.uint8(2), **texts}, damaged, "a code is out of range")
    written({"value.c": codes.astype(np.int32) - 1, **texts}, damaged, "a code is out of range")
    written({"value.c": codes, **texts, "text.c.bytes": text[:0]}, damaged, "its values are damaged")
    written({"value.c": codes, **texts, "text.c.splits": splits[:0]}, damaged, "its values are damaged")
    written({"value.c": codes.astype(np.int64), **texts}, damaged, "int64")
    written({"value.c": codes, "splits.c": fine[:0], **texts}, damaged, "its splits do not fit")
    written({"value.c": codes, "splits.c": fine[::-1].copy(), **texts}, damaged, "its splits do not fit")
    written({"value.c": codes.astype(np.float32), "splits.c": fine}, damaged, "numbers cannot be multi-valued")


# ---------------------------------------------------------------------------------------------------- from a store


def values(file: PackedFile, name: str) -> list[Any]:
    """The values of an attribute at each position."""
    codes = file[f"value.{name}"].tolist()
    if f"text.{name}.bytes" not in file:
        return codes
    texts: list[str | None] = [None, *unpack_strings(file, f"text.{name}")]
    assert texts[1:] == sorted(texts[1:], key=lambda text: str(text).encode())
    if f"splits.{name}" not in file:
        return [texts[code] for code in codes]
    splits = file[f"splits.{name}"].tolist()
    return [[texts[code] for code in codes[begin:end]] for begin, end in itertools.pairwise(splits)]


def test_the_index_of_a_shop_has_its_attributes(job: Job) -> None:
    file = PackedFile(str(job.index / item_attributes.FILE), "item_attributes")
    ids = PackedFile(str(job.index / "item_ids.dpsr"), "item_ids")["id"].tolist()
    rows = {row["item_id"]: row for row in pq.read_table(job.store.parent / "shop" / "items.parquet").to_pylist()}
    for name in ("brand", "category", "shop", "price"):
        assert values(file, name) == [rows[item][name] for item in ids]
    assert values(file, "in_stock") == [str(rows[item]["in_stock"]).lower() for item in ids]
    assert item_attributes.FILE in json.loads((job.index / "index.json").read_text())["files"]


def test_attributes_of_some_positions(shop: Callable[[str], Shop], tmp_path: Path) -> None:
    here = shop("Flat")
    positions = np.arange(5, ITEMS, 7)
    index = faiss.IndexFlatIP(DIM)
    index.add(here.vectors[positions])
    faiss.write_index(index, str(tmp_path / "items.faiss"))
    faiss_search.write_item_ids(tmp_path / "item_ids.dpsr", here.ids[positions], tmp_path / "items.faiss")
    item_attributes.copy_positions(here.path, tmp_path, positions)
    whole, part = (PackedFile(str(path / item_attributes.FILE)) for path in (here.path, tmp_path))
    assert set(part) == set(whole)
    for name in here.columns:
        everything = values(whole, name)
        assert list(map(repr, values(part, name))) == [repr(everything[position]) for position in positions]
    ids, _, _ = search(
        dataclasses.replace(here, path=tmp_path).table(), queries(1, 23), 3000, include=np.array([["tags=t1"]])
    )
    assert set(ids[0].tolist()) - {-1} == set(here.ids[positions][meets(here, "tags=t1")[positions]].tolist())


def test_numbers_are_as_narrow_as_they_can_be(tmp_path: Path) -> None:
    index = faiss.IndexFlatIP(2)
    index.add(np.zeros((3, 2), np.float32))
    faiss.write_index(index, str(tmp_path / "items.faiss"))
    faiss_search.write_item_ids(tmp_path / "item_ids.dpsr", np.arange(3), tmp_path / "items.faiss")
    numbers = {
        "whole": [1, np.nan, 2**24],
        "cents": [19.99, 0, np.nan],
        "large": [1e300, 1, 2],
        "many": [2**24 + 1, 0, 1],
    }
    item_attributes.write_columns(tmp_path, [Column(name, np.array(given, float)) for name, given in numbers.items()])
    file = PackedFile(str(tmp_path / item_attributes.FILE))
    assert [file[f"value.{name}"].dtype.itemsize for name in numbers] == [4, 8, 8, 8]
    for name, given in numbers.items():
        np.testing.assert_array_equal(file[f"value.{name}"], given)


@pytest.mark.parametrize(("texts", "itemsize"), [(255, 1), (256, 2), (65_535, 2), (65_536, 4)])
def test_codes_are_as_narrow_as_they_can_be(tmp_path: Path, texts: int, itemsize: int) -> None:
    index = faiss.IndexFlatIP(2)
    index.add(np.ones((texts, 2), np.float32))
    faiss.write_index(index, str(tmp_path / "items.faiss"))
    faiss_search.write_item_ids(tmp_path / "item_ids.dpsr", np.arange(texts), tmp_path / "items.faiss")
    item_attributes.write_columns(tmp_path, [Column("n", np.arange(1, texts + 1), [f"n{i}" for i in range(texts)])])
    assert PackedFile(str(tmp_path / item_attributes.FILE))["value.n"].dtype.itemsize == itemsize
    table = faiss_search.FaissIndexTable(
        *(str(tmp_path / name) for name in ("items.faiss", "item_ids.dpsr", item_attributes.FILE))
    )
    for number in (0, 9, 10, texts // 2, texts - 1):
        ids, _, _ = search(table, np.ones((1, 1, 2), np.float32), 2, include=np.array([[f"n=n{number}"]]))
        assert ids.tolist() == [[number, -1]]


# ---------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("factory", ["IVF64,SQ8", "HNSW16"])
def test_eight_threads(shop: Callable[[str], Shop], factory: str) -> None:
    here = shop(factory)
    x = queries(16, seed=22, heads=2)
    filters = ["", "half=yes", "tenth=yes", "price=10..30", "tags=t1|t5", "colour=red"]
    excluded = here.ids[:320].reshape(16, 20)
    parameters = ["", "efSearch=50"] if factory == "HNSW16" else ["", "nprobe=3"]

    with tf.Graph().as_default(), v1.Session() as session:
        table = here.table(max_parameters="efSearch=300" if factory == "HNSW16" else "nprobe=64")
        query = v1.placeholder(tf.float32, [None, 2, DIM])
        include = v1.placeholder(tf.string, [None, 1])
        exclude_ids = v1.placeholder(tf.int64, [None, None])
        given = v1.placeholder(tf.string, [])
        result = table.search(query, 20, include, excluded_item_ids=exclude_ids, parameters=given)
        session.run(v1.tables_initializer())
        run = session.make_callable(list(result), [query, include, exclude_ids, given])

        def ask(rows: slice, text: str, setting: str) -> list[NDArray[Any]]:
            size = rows.stop - rows.start
            found: list[NDArray[Any]] = run(x[rows], np.full((size, 1), text, object), excluded[rows], setting)
            return found

        expected = {(text, setting): ask(slice(0, 16), text, setting) for text in filters for setting in parameters}
        failures: list[str] = []

        def work(seed: int) -> None:
            random = np.random.default_rng(seed)
            for i in range(60):
                begin, size = int(random.integers(0, 8)), int(random.choice([1, 2, 8]))
                rows = slice(begin, begin + size)
                # Beside the filters that all ask, one that only this call has.
                ask(rows, f"price={seed}.{i}..{seed + 20}", "")
                text, setting = str(random.choice(filters)), str(random.choice(parameters))
                for got, want in zip(ask(rows, text, setting), expected[text, setting], strict=True):
                    if not np.array_equal(got, want[rows]):
                        failures.append(f"thread {seed}, {text}, {setting}, rows {rows}")

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
