"""Indexes of a trained quantizer, second lists, and the scan budget."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from numpy.typing import NDArray

from dpsr_common.errors import CommandError
from dpsr_common.packed_file import PackedFile, PackedFileWriter
from dpsr_export import ann, faiss_search, item_attributes, product_codes
from dpsr_export.item_attributes import Column
from dpsr_tf.models.quantizer import Encoder, Quantizer

ITEMS, DIM = 3000, 24


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


def unit_vectors(n: int, seed: int, dim: int = DIM) -> NDArray[np.float32]:
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def made_quantizer(lists: int = 32, sub_spaces: int = 8, bits: int = 8, dim: int = DIM) -> Quantizer:
    """A random rotation, some of the items as centroids, and random codes."""
    rng = np.random.default_rng(lists + sub_spaces + bits)
    rotation = np.linalg.qr(rng.normal(size=(dim, dim)))[0].astype(np.float32)
    codebooks = 0.1 * rng.normal(size=(sub_spaces, 1 << bits, dim // sub_spaces))
    return Quantizer(rotation, unit_vectors(lists, 1, dim) @ rotation, codebooks.astype(np.float32))


def reread(index: faiss.Index, path: Path, nprobe: int) -> Any:
    """The index as stock FAISS opens it."""
    faiss.write_index(index, str(path / "index"))
    held = faiss.read_index(str(path / "index"))
    faiss.ParameterSpace().set_index_parameters(held, f"nprobe={nprobe}")
    return held


def quantized(quantizer: Quantizer, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """T(x) in TensorFlow."""
    z = tf.matmul(x, quantizer.rotation)
    distances = tf.reduce_sum((z[:, tf.newaxis] - quantizer.coarse) ** 2, axis=2)
    coarse = tf.gather(quantizer.coarse, tf.argmin(distances, axis=1))
    parts = []
    for m, part in enumerate(tf.split(z - coarse, len(quantizer.codebooks), axis=1)):
        distances = tf.reduce_sum((part[:, tf.newaxis] - quantizer.codebooks[m]) ** 2, axis=2)
        parts.append(tf.gather(quantizer.codebooks[m], tf.argmin(distances, axis=1)))
    return tf.matmul(coarse + tf.concat(parts, axis=1), quantizer.rotation, transpose_b=True).numpy()


def lists_of(index: Any) -> dict[int, list[int]]:
    """The lists of each label."""
    ivf = faiss.extract_index_ivf(index)
    found: dict[int, list[int]] = {}
    for number in range(ivf.nlist):
        size = ivf.invlists.list_size(number)
        if size:
            for label in faiss.rev_swig_ptr(ivf.invlists.get_ids(number), size).tolist():
                found.setdefault(label, []).append(number)
    return found


# ------------------------------------------------------------------------------------- the index of a quantizer


@pytest.mark.parametrize(
    ("lists", "sub_spaces", "bits"),
    [(32, 8, 8), (1, 8, 8), (32, 12, 4), (300, 3, 4), (300, 6, 8), (32, 1, 8), (32, 1, 4)],
)
def test_scores_are_products_with_the_quantized_vectors(tmp_path: Path, lists: int, sub_spaces: int, bits: int) -> None:
    quantizer, x, queries = made_quantizer(lists, sub_spaces, bits), unit_vectors(ITEMS, 2), unit_vectors(20, 3)
    built, its_lists, its_codes = product_codes.build(quantizer, "quantizer", x)
    index = reread(built, tmp_path, lists)
    scores, positions = index.search(queries, ITEMS)
    assert (np.sort(positions, axis=1) == np.arange(ITEMS)).all(), "each item is found once"
    expected = np.take_along_axis(queries @ quantized(quantizer, x).T, positions, axis=1)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)
    # The codes are those of the layer, unless two centroids are equally near but for rounding. Nothing of the quantizer
    # is lost.
    lists_of_layer, codes_of_layer = quantizer.encode(x)
    np.testing.assert_array_equal(its_lists, lists_of_layer)
    residual = np.split(x @ quantizer.rotation - quantizer.coarse[its_lists], sub_spaces, axis=1)
    for part, book, got, want in zip(residual, quantizer.codebooks, its_codes.T, codes_of_layer.T, strict=True):
        distances = [((part - book[code]) ** 2).sum(axis=1) for code in (got, want)]
        np.testing.assert_allclose(*distances, rtol=0, atol=2e-7)
        assert (got != want).mean() < 0.01
    assert [held for _, held in sorted(lists_of(index).items())] == [[number] for number in its_lists]
    assert product_codes.quantizer_of(index).fingerprint == quantizer.fingerprint
    # Lists are probed in the order of the coarse scores.
    index = reread(built, tmp_path, 1)
    coarse = queries @ (quantizer.coarse @ quantizer.rotation.T).T
    for row, found in enumerate(index.search(queries, ITEMS)[1]):
        assert set(found[found >= 0].tolist()) == set(np.flatnonzero(its_lists == coarse[row].argmax()).tolist())


@pytest.mark.parametrize("sub_spaces", [1, 6])  # wide and narrow ones
def test_of_equal_centroids_the_first_is_taken(sub_spaces: int) -> None:
    quantizer, x = made_quantizer(32, sub_spaces, 4), unit_vectors(20_000, 2)
    coarse, codebooks = quantizer.coarse.copy(), quantizer.codebooks.copy()
    coarse[20:], codebooks[:, 8:] = coarse[5:17], codebooks[:, :8]
    again = Quantizer(quantizer.rotation, coarse, codebooks)
    lists, codes = product_codes.encode(again, x)
    assert lists.max() == 19 and codes.max() == 7
    # NumPy may take the second of two equal centroids, because it rounds products by their place in a matrix.
    of_layer, codes_of_layer = again.encode(x)
    assert (lists == np.where(of_layer >= 20, of_layer - 15, of_layer)).mean() > 0.9999
    assert (codes == codes_of_layer % 8).mean() > 0.9999


def fast_scan_bound(quantizer: Quantizer, query: NDArray[np.float32]) -> float:
    """How far FastScan's scores may be from the exact ones: half a step for each table, and for the coarse score.

    Its tables have 8 bits, with one step for all: the largest span of a table, over 255. Sums have 16 bits.
    """
    rotated = query @ quantizer.rotation
    parts = np.split(rotated, len(quantizer.codebooks))
    tables = np.stack([book @ part for book, part in zip(quantizer.codebooks, parts, strict=True)])
    spans = tables.max(axis=1) - tables.min(axis=1)
    coarse = quantizer.coarse @ rotated
    step = max(spans.max() / 255, (spans.sum() + coarse.max() - coarse.min()) / 65535)
    return float(step) * (len(tables) + 2) / 2 + 1e-5


@pytest.mark.parametrize("sub_spaces", [3, 8, 12])
def test_fast_scan_scores_are_within_their_rounding(tmp_path: Path, sub_spaces: int) -> None:
    quantizer, x, queries = made_quantizer(32, sub_spaces, 4), unit_vectors(ITEMS, 2), unit_vectors(20, 3)
    built, lists, codes = product_codes.build(quantizer, "quantizer_fs", x)
    index = reread(built, tmp_path, 32)
    assert isinstance(faiss.downcast_index(index.index), faiss.IndexIVFPQFastScan)
    products = queries @ quantizer.decode(lists, codes).T
    for row, query in enumerate(queries):
        scores, positions = index.search(query[np.newaxis], ITEMS)
        assert sorted(positions[0].tolist()) == list(range(ITEMS))
        error = np.abs(scores[0] - products[row, positions[0]]).max()
        assert error <= fast_scan_bound(quantizer, query)
    assert product_codes.quantizer_of(index).fingerprint == quantizer.fingerprint


def residual_quantizer(lists: int = 32, number: int = 5, bits: int = 8) -> Quantizer:
    """A quantizer of residual codes that has moved away from its encoder."""
    rng = np.random.default_rng(lists + number + bits)
    books = (0.12 * rng.normal(size=(number, 1 << bits, DIM))).astype(np.float32)
    encoder = Encoder(unit_vectors(lists, 1), books)
    moved = [(values + 0.03 * rng.normal(size=values.shape)).astype(np.float32) for values in encoder]
    return Quantizer(np.eye(DIM, dtype=np.float32), moved[0], moved[1], encoder)


@pytest.mark.parametrize(("lists", "number", "bits"), [(32, 5, 8), (1, 7, 8), (32, 5, 4), (32, 1, 8)])
def test_scores_of_residual_codes(tmp_path: Path, lists: int, number: int, bits: int) -> None:
    quantizer, x, queries = residual_quantizer(lists, number, bits), unit_vectors(ITEMS, 2), unit_vectors(20, 3)
    built, its_lists, its_codes = product_codes.build(quantizer, "quantizer", x)
    lists_of_layer, codes_of_layer = quantizer.encode(x)
    np.testing.assert_array_equal(its_lists, lists_of_layer)
    assert (its_codes == codes_of_layer).mean() > 0.99, "but for rounding"
    index = reread(built, tmp_path, lists)
    assert faiss.extract_index_ivf(index).code_size == quantizer.code_bytes == -(-number * bits // 8)
    scores, positions = index.search(queries, ITEMS)
    assert (np.sort(positions, axis=1) == np.arange(ITEMS)).all(), "each item is found once"
    expected = np.take_along_axis(queries @ quantizer.decode(its_lists, its_codes).T, positions, axis=1)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    # Lists are probed in the order of the trained centroids.
    index = reread(built, tmp_path, 1)
    coarse = queries @ quantizer.coarse.T
    for row, found in enumerate(index.search(queries, ITEMS)[1]):
        assert set(found[found >= 0].tolist()) == set(np.flatnonzero(its_lists == coarse[row].argmax()).tolist())
    # Nothing of the quantizer is lost, with the file of its encoder.
    assert product_codes.read_encoder(tmp_path) is None
    product_codes.write_encoder(tmp_path, quantizer.encoder)
    again = product_codes.quantizer_of(index, product_codes.read_encoder(tmp_path))
    assert again.fingerprint == quantizer.fingerprint
    assert (ann.code_residual(index, x) is None) == (number > 1)
    assert product_codes.describe(quantizer, "quantizer") == f"quantizer (IVF{lists},RQ{number}x{bits})"


def test_what_residual_codes_cannot_have(tmp_path: Path) -> None:
    quantizer, x = residual_quantizer(), unit_vectors(3, 1)
    with pytest.raises(CommandError, match=r"second_list is 1.5, but quantizer.codes is residual, and such codes"):
        product_codes.build(quantizer, "quantizer", x, 1.5)
    with pytest.raises(CommandError, match=r"'quantizer_fs' needs codes of 4 bits, but quantizer.bits is 8"):
        product_codes.build(quantizer, "quantizer_fs", x)
    encoder = Encoder(quantizer.encoder.coarse[:, :-1], quantizer.encoder.codebooks)
    with pytest.raises(CommandError, match="train the model again"):
        product_codes.build(dataclasses.replace(quantizer, encoder=encoder), "quantizer", x)
    product_codes.write_encoder(tmp_path, quantizer.encoder)
    path = tmp_path / product_codes.ENCODER
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CommandError, match="run `dpsr index` again"):
        product_codes.read_encoder(tmp_path)


def test_fast_scan_of_residual_codes(tmp_path: Path) -> None:
    quantizer, x, queries = residual_quantizer(32, 6, 4), unit_vectors(ITEMS, 2), unit_vectors(20, 3)
    built, lists, codes = product_codes.build(quantizer, "quantizer_fs", x)
    index = reread(built, tmp_path, 32)
    products = queries @ quantizer.decode(lists, codes).T
    for row, query in enumerate(queries):
        scores, positions = index.search(query[np.newaxis], ITEMS)
        assert sorted(positions[0].tolist()) == list(range(ITEMS))
        tables = quantizer.codebooks @ query
        bound = 6 * np.ptp(tables, axis=1).max() / 255
        assert np.abs(scores[0] - products[row, positions[0]]).max() <= bound + 1e-5


def test_a_quantizer_that_no_index_can_have() -> None:
    good = made_quantizer()
    skew = good.rotation + 0.01
    for changed, message in (
        (
            {"rotation": skew},
            r"rotation is not orthogonal: R\^T R differs from the identity by 0\.\d+, expected at most",
        ),
        (
            {"codebooks": np.where(good.codebooks > 0.2, np.nan, good.codebooks)},
            "a NaN or an infinity in its codebooks",
        ),
        (
            {"coarse": good.coarse[:, :-1]},
            r"coarse centroids \[32, 23\] and codebooks \[8, 256, 3\], expected \[d, d\]",
        ),
        ({"codebooks": good.codebooks[:, :100]}, r"codebooks \[8, 100, 3\], expected .* \[M, 16 or 256, d / M\]"),
    ):
        with pytest.raises(CommandError, match=message):
            product_codes.build(dataclasses.replace(good, **changed), "quantizer", unit_vectors(3, 1))
    with pytest.raises(CommandError, match=r"for vectors of 24 dimensions, but the embeddings have 23"):
        product_codes.build(good, "quantizer", unit_vectors(3, 1, 23))
    with pytest.raises(CommandError, match=r"'quantizer_fs' needs codes of 4 bits, but quantizer.bits is 8"):
        product_codes.build(good, "quantizer_fs", unit_vectors(3, 1))
    with pytest.raises(CommandError, match=r"index.second_list is 1.5, but the index has 1 list"):
        product_codes.build(made_quantizer(1), "quantizer", unit_vectors(3, 1), 1.5)


def test_semantic_ids(tmp_path: Path) -> None:
    quantizer, x = made_quantizer(32, 3, 4), unit_vectors(40, 2)
    lists, codes = quantizer.encode(x)
    for ids in (np.arange(40) * 3, [f"sku-{i}" for i in range(40)]):
        product_codes.write_semantic_ids(tmp_path / "ids.parquet", ids, lists, codes)
        rows = pq.read_table(tmp_path / "ids.parquet").to_pylist()
        assert [row["item_id"] for row in rows] == list(ids)
        expected = [f"list:{li} 0:{c[0]} 1:{c[1]} 2:{c[2]}" for li, c in zip(lists, codes, strict=True)]
        assert [row["semantic_id"] for row in rows] == expected


# ------------------------------------------------------------------------------------------------- second lists


def test_the_second_list_has_the_smallest_loss() -> None:
    x, centroids = unit_vectors(500, 1), unit_vectors(40, 2) * 0.9
    first = faiss.knn(x, centroids, 1)[1][:, 0]
    for weight in (0.5, 1.5, 20):
        second = product_codes.second_lists(x, x - centroids[first], centroids, first, weight)
        for row in range(len(x)):
            r = (x[row] - centroids[first[row]]).astype(np.float64)
            others = (x[row] - centroids).astype(np.float64)
            loss = (others**2).sum(axis=1) + weight * (others @ r / np.linalg.norm(r)) ** 2
            loss[first[row]] = np.inf
            assert loss[second[row]] == pytest.approx(loss.min(), abs=1e-5)
    # A vector that is its own centroid has no residual, and takes the nearest of the others.
    at = product_codes.second_lists(centroids, np.zeros_like(centroids), centroids, np.arange(40), 1.5)
    np.testing.assert_array_equal(at, faiss.knn(centroids, centroids, 2)[1][:, 1])


@dataclasses.dataclass(frozen=True)
class Twice:
    """An index that holds each item in two lists, in files, and the quantizers' vectors of both entries."""

    path: Path
    ids: NDArray[np.int64]
    index: Any  # as stock FAISS reads it, with all lists probed
    columns: dict[str, Column]
    readable: bool  # whether the op reads the lists

    def table(self, **arguments: Any) -> faiss_search.FaissIndexTable:
        names = ("items.faiss", "item_ids.dpsr", item_attributes.FILE)
        return faiss_search.FaissIndexTable(*(str(self.path / name) for name in names), **arguments)

    def scores(self, query: NDArray[np.float32]) -> NDArray[np.float32]:
        """The better of the two scores of each position."""
        found, positions = self.index.search(query[np.newaxis], self.index.ntotal)
        best = np.full(ITEMS, -np.inf, np.float32)
        np.maximum.at(best, positions[0][positions[0] >= 0], found[0][positions[0] >= 0])
        return best


FACTORIES = ["quantizer", "quantizer_fs", "IVF32,PQ8x4np", "OPQ8,IVF32,PQ8np"]


@pytest.fixture(scope="module", params=FACTORIES)
def twice(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twice:
    faiss.omp_set_num_threads(1)
    path, x = tmp_path_factory.mktemp("twice"), unit_vectors(ITEMS, 2)
    if request.param in product_codes.FACTORIES:
        bits = 4 if request.param == "quantizer_fs" else 8
        index, _, _ = product_codes.build(made_quantizer(bits=bits), request.param, x, 1.5)
    else:
        index = ann.build(x, request.param, second_list=1.5)
    ann.set_parameters(index, "nprobe=8")
    ids = np.random.default_rng(3).permutation(ITEMS) * 3 + 5
    faiss.write_index(index, str(path / "items.faiss"))
    faiss_search.write_item_ids(path / "item_ids.dpsr", ids, path / "items.faiss", entries=2)
    rng = np.random.default_rng(4)
    lengths = rng.integers(0, 3, ITEMS)
    columns = [
        Column("half", (rng.random(ITEMS) < 0.5).astype(np.int32), ["yes"]),
        Column("rare", (rng.random(ITEMS) < 0.01).astype(np.int32), ["yes"]),
        Column("price", np.round(rng.random(ITEMS) * 100, 1)),
        Column(
            "tags",
            rng.integers(1, 4, lengths.sum()).astype(np.int32),
            ["a", "b", "c"],
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        ),
    ]
    item_attributes.write_columns(path, columns)
    held = reread(index, path, 32)
    return Twice(path, ids, held, {c.name: c for c in columns}, request.param != "quantizer_fs")


def test_stock_faiss_sees_each_item_in_two_lists(twice: Twice) -> None:
    assert twice.index.ntotal == 2 * ITEMS
    positions = twice.index.search(unit_vectors(5, 6), 2 * ITEMS)[1]
    assert (np.sort(positions, axis=1) == np.repeat(np.arange(ITEMS), 2)).all()
    if twice.readable:
        lists = lists_of(twice.index)
        assert sorted(lists) == list(range(ITEMS))
        assert all(len(set(held)) == 2 for held in lists.values()), "two different lists"
    # ann.search gives each position once, with its better score.
    queries = unit_vectors(5, 6)
    scores, found = ann.search(twice.index, queries, 70, 2)
    assert found.shape == (5, 70) and (scores[:, :-1] >= scores[:, 1:]).all()
    for row, query in enumerate(queries):
        expected = twice.scores(query)
        assert len(set(found[row].tolist())) == 70
        np.testing.assert_allclose(np.sort(-expected)[:70], -scores[row], atol=1e-5)


@pytest.mark.parametrize("heads", [1, 3])
def test_each_item_is_found_once(twice: Twice, heads: int) -> None:
    table, queries = twice.table(max_parameters="nprobe=32"), unit_vectors(6 * heads, 7).reshape(6, heads, DIM)
    for k in (1, 10, 500, ITEMS):
        ids, scores, best = (t.numpy() for t in table.search(queries, k, parameters="nprobe=32"))
        for row in range(6):
            expected = np.stack([twice.scores(query) for query in queries[row]])
            order = np.lexsort((twice.ids, -expected.max(axis=0)))[:k]
            assert len(set(ids[row].tolist())) == k, "exactly k items, each once"
            np.testing.assert_allclose(scores[row], expected.max(axis=0)[order], atol=2e-5)
            position = np.argsort(twice.ids)[np.searchsorted(np.sort(twice.ids), ids[row])]
            np.testing.assert_allclose(expected[best[row], position], scores[row], atol=2e-5)


def passing(twice: Twice, expression: str) -> NDArray[np.bool_]:
    name, _, value = expression.partition("=")
    column = twice.columns[name]
    if name == "price":
        low, high = map(float, value.split(".."))
        return (column.values >= low) & (column.values <= high)
    if name == "tags":
        assert column.splits is not None
        rows = np.repeat(np.arange(ITEMS), np.diff(column.splits))
        return np.isin(np.arange(ITEMS), rows[column.values == "abc".index(value) + 1])
    return column.values == 1


@pytest.mark.parametrize("expression", ["half=yes", "rare=yes", "price=10..30", "price=99.8..100", "tags=b"])
def test_filters_and_exclusions(twice: Twice, expression: str) -> None:
    table, queries = twice.table(), unit_vectors(4, 8)[:, np.newaxis]
    passes = passing(twice, expression)
    assert 0 < passes.sum() < ITEMS
    for wanted, column in ((passes, "include"), (~passes, "exclude")):
        expressions = tf.constant([[expression]] * 4)
        for k in (10, int(wanted.sum()) + 3):
            ids, scores, _ = (t.numpy() for t in table.search(queries, k, **{column: expressions}))
            allowed = set(twice.ids[wanted].tolist())
            for row in range(4):
                there = ids[row][ids[row] >= 0]
                assert len(set(there.tolist())) == len(there) == min(k, len(allowed)), "k results, each once"
                assert set(there.tolist()) <= allowed
                # So few items are all scored.
                best = np.sort(-twice.scores(queries[row, 0])[wanted])[:k]
                np.testing.assert_allclose(-scores[row][: len(best)], best, atol=2e-5)
            # The best ones are excluded by id: as many others come in their place.
            excluded = ids[:, :7]
            again = table.search(queries, 10, **{column: expressions}, excluded_item_ids=excluded)[0].numpy()
            for row in range(4):
                assert not set(again[row].tolist()) & set(excluded[row][excluded[row] >= 0].tolist())
                assert (again[row] >= 0).sum() == min(10, len(allowed) - (excluded[row] >= 0).sum())


def test_exclusions_without_filters(twice: Twice) -> None:
    table, queries = twice.table(max_parameters="nprobe=32"), unit_vectors(4, 9).reshape(2, 2, DIM)
    ids, scores, _ = (t.numpy() for t in table.search(queries, 300, parameters="nprobe=32"))
    again = table.search(queries, 100, parameters="nprobe=32", excluded_item_ids=ids[:, :200])
    np.testing.assert_array_equal(again[0].numpy(), ids[:, 200:])
    np.testing.assert_allclose(again[1].numpy(), scores[:, 200:])


def test_item_ids_have_to_say_how_often_an_item_is_there(twice: Twice, tmp_path: Path) -> None:
    for name in ("items.faiss", item_attributes.FILE):
        (tmp_path / name).write_bytes((twice.path / name).read_bytes())
    here = dataclasses.replace(twice, path=tmp_path)
    faiss_search.write_item_ids(tmp_path / "item_ids.dpsr", twice.ids, tmp_path / "items.faiss")
    with pytest.raises(tf.errors.FailedPreconditionError, match=r"holds 3000 item ids, but .* holds 6000 vectors"):
        here.table()
    held = dict(PackedFile(str(twice.path / "item_ids.dpsr"), "item_ids").items())
    for entries, message in (([3], "index.entries has 1 values, 3, expected one value from 1 to 2"), ([], "has 0 val")):
        with PackedFileWriter(str(tmp_path / "item_ids.dpsr"), "item_ids") as file:
            for name, values in {**held, "index.entries": np.array(entries, np.uint64)}.items():
                file.add(name, values)
        with pytest.raises(tf.errors.DataLossError, match=message):
            here.table()


@pytest.mark.parametrize("factory", ["Flat", "IVF32,SQ8", "IVF32,PQ8x4fs", "IVF32,PQ8,RFlat", "HNSW8"])
def test_second_lists_need_product_codes(factory: str) -> None:
    with pytest.raises(CommandError, match=r"index.second_list is 1.5, but only an index of product codes in lists"):
        ann.build(unit_vectors(500, 1), factory, second_list=1.5)


# --------------------------------------------------------------------------------------------------- scan budget


def written(path: Path, factory: str, parameters: str = "nprobe=32") -> faiss_search.FaissIndexTable:
    index = ann.build(unit_vectors(ITEMS, 2), factory)
    ann.set_parameters(index, "nprobe=1")
    faiss.write_index(index, str(path / "items.faiss"))
    faiss_search.write_item_ids(path / "item_ids.dpsr", np.arange(ITEMS), path / "items.faiss")
    names = [str(path / name) for name in ("items.faiss", "item_ids.dpsr")]
    return faiss_search.FaissIndexTable(*names, parameters=parameters, max_parameters="nprobe=32,max_codes=900")


@pytest.mark.parametrize("factory", ["IVF32,PQ8np", "OPQ8,IVF32,PQ8np", "IVF32,SQ8", "IVF32,Flat"])
def test_max_codes_bounds_a_search(tmp_path: Path, factory: str) -> None:
    queries = unit_vectors(10, 3)[:, np.newaxis]

    def found(table: faiss_search.FaissIndexTable, parameters: str) -> NDArray[np.int64]:
        return (table.search(queries, ITEMS, parameters=parameters)[0].numpy() >= 0).sum(axis=1)

    table = written(tmp_path, factory)
    assert (found(table, "") == ITEMS).all()
    assert (found(table, "max_codes=700") == 700).all(), "over all lists"
    assert (found(table, "nprobe=2,max_codes=900") < 900).all(), "fewer lists have fewer codes"
    with pytest.raises(tf.errors.InvalidArgumentError, match="max_codes is 901, expected at most 900"):
        found(table, "max_codes=901")
    # An index's own budget holds for requests that set something else, and a request may lower it.
    table = written(tmp_path, factory, "nprobe=32,max_codes=500")
    assert (found(table, "") == 500).all() and (found(table, "nprobe=31") == 500).all()
    assert (found(table, "max_codes=100") == 100).all()


def test_max_codes_under_a_filter(tmp_path: Path) -> None:
    """At most so many of the items that pass are scored, but at least k."""
    vectors = unit_vectors(40_000, 2)
    index = ann.build(vectors, "IVF32,PQ8x4np")
    ann.set_parameters(index, "nprobe=32")
    faiss.write_index(index, str(tmp_path / "items.faiss"))
    faiss_search.write_item_ids(tmp_path / "item_ids.dpsr", np.arange(len(vectors)), tmp_path / "items.faiss")
    item_attributes.write_columns(tmp_path, [Column("even", np.arange(len(vectors), dtype=np.int32) % 2, ["yes"])])
    names = [str(tmp_path / name) for name in ("items.faiss", "item_ids.dpsr", item_attributes.FILE)]
    table = faiss_search.FaissIndexTable(*names, max_parameters="nprobe=32")
    query, even = unit_vectors(1, 3)[:, np.newaxis], tf.constant([["even=yes"]])

    def found(k: int, parameters: str) -> NDArray[np.int64]:
        ids = table.search(query, k, include=even, parameters=parameters)[0].numpy()[0]
        assert (ids % 2 == 1).all() and len(set(ids.tolist())) == k
        return ids

    all_of_them, few = found(300, ""), found(300, "max_codes=300")
    assert set(all_of_them.tolist()) != set(few.tolist())
    lists = lists_of(index)
    assert len({lists[i][0] for i in few.tolist()}) < len({lists[i][0] for i in all_of_them.tolist()})
    for k, budget in itertools.product((5, 300), (1, 400, 20_000)):
        found(k, f"max_codes={budget}")
    np.testing.assert_array_equal(found(300, "max_codes=40000"), all_of_them)


def test_fast_scan_has_no_budget(tmp_path: Path) -> None:
    index = ann.build(unit_vectors(ITEMS, 2), "IVF32,PQ8x4fs")
    with pytest.raises(CommandError, match="FastScan does not obey max_codes"):
        ann.set_parameters(index, "nprobe=3,max_codes=100")
    with pytest.raises(tf.errors.InvalidArgumentError, match="max_codes needs inverted lists, and not those of Fast"):
        written(tmp_path, "IVF32,PQ8x4fs", "max_codes=100")
    with pytest.raises(tf.errors.InvalidArgumentError, match="this index has no max_codes, only nprobe"):
        written(tmp_path, "IVF32,PQ8x4fs", "nprobe=3")
    faiss.write_index(index, str(tmp_path / "items.faiss"))
    faiss_search.write_item_ids(tmp_path / "item_ids.dpsr", np.arange(ITEMS), tmp_path / "items.faiss")
    table = faiss_search.FaissIndexTable(*(str(tmp_path / name) for name in ("items.faiss", "item_ids.dpsr")))
    with pytest.raises(tf.errors.InvalidArgumentError, match="this index has no max_codes, only nprobe"):
        table.search(unit_vectors(1, 1)[:, np.newaxis], 3, parameters="max_codes=100")


def test_the_report_measures_with_the_budget() -> None:
    x, queries = unit_vectors(ITEMS, 2), unit_vectors(50, 3)
    index = ann.build(x, "IVF32,PQ8np")
    exact = ann.Exact(x, queries, (10,))
    settings = ann.measure_settings(index, exact, queries, 10, "nprobe=32,max_codes=600")
    assert all(setting.parameters.endswith("max_codes=600") for setting in settings) and len(settings) > 3
    without = ann.measure_settings(ann.build(x, "IVF32,PQ8np"), exact, queries, 10, "nprobe=32")
    assert settings[0].ann_recall[10] < without[0].ann_recall[10]


def test_recall_of_an_index_with_two_lists_counts_items_once() -> None:
    x, queries = unit_vectors(ITEMS, 2), unit_vectors(50, 3)
    exact = ann.Exact(x, queries, (10, 100))
    index = ann.build(x, "IVF32,PQ24np", second_list=1.5)
    (setting,) = ann.measure_settings(index, exact, queries, 10, "nprobe=32", entries=2)[:1]
    found = ann.search(index, queries, 100, 2)[1]
    best = np.argsort(-(queries @ x.T), axis=1)[:, :100]
    expected = np.mean([len(set(a.tolist()) & set(b.tolist())) / 100 for a, b in zip(found, best, strict=True)])
    assert setting.ann_recall[100] == pytest.approx(expected, abs=1e-6) and expected < 1


def test_recall_of_relevant_items() -> None:
    x, heads = unit_vectors(ITEMS, 2), unit_vectors(60, 3).reshape(30, 2, DIM)
    heads[3, 1] = 0  # an empty query's head finds nothing
    products = np.einsum("qhd,nd->qhn", heads, x)
    products[3, 1] = -np.inf
    order = np.argsort(-products.max(axis=1), axis=1)
    relevant = [order[query, [0, 5, 2000]] for query in range(30)]
    relevant[4] = np.array([order[4, 0], -1])  # one has no vector
    measured = ann.Relevant(x, heads, relevant, (3, 10, 5000))
    assert measured.exact[3] == pytest.approx((29 / 3 + 1 / 2) / 30)
    assert measured.exact[10] == pytest.approx((29 * 2 / 3 + 1 / 2) / 30)
    assert measured.exact[5000] == pytest.approx((29 + 1 / 2) / 30)
    flat = ann.build(x, "Flat")
    assert {k: measured.recall(flat, k) for k in measured.ks} == pytest.approx(measured.exact)
    index = ann.build(x, "IVF32,PQ24np", second_list=1.5)
    ann.set_parameters(index, "nprobe=4")
    assert 0.1 < measured.recall(index, 10, 2) < measured.exact[10]
