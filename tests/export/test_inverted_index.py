"""`dpsr index --inverted`, its catalogue, and searches with Tantivy and in a server that answers like OpenSearch."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Job
from opensearch_server import OpenSearchServer

from dpsr_common.command_line import main
from dpsr_common.errors import CommandError, UsageError
from dpsr_common.search_index import connect_opensearch, identifier_hash
from dpsr_export import inverted_index
from dpsr_export.warmup import LoadedServable
from dpsr_serving.gateway import opensearch
from dpsr_serving.gateway.catalogue import Catalogue, check_same_store
from dpsr_serving.gateway.inverted import MAX_K, MAX_TERMS, InvertedIndex, open_inverted_index
from dpsr_serving.search import expressions
from dpsr_tf.data.store import Store
from dpsr_tf.evaluation.baselines import Bm25, Field
from dpsr_tokenizer.analysis import analyzer

ITEMS = [
    # key, title, brand, details, tags, price, model number, product
    ("sku-1001", "Red running shoes", "acme", "light mesh", "new|sale", "49.5", "AB-1200/x", "runner"),
    ("sku-1002", "Blue running shoes", "acme", "light mesh", "sale", "59", "AB-1200/y", "runner"),
    ("sku-1003", "Red leather boots", "bolt", "warm lining for running late", "", "120", "B 77 Z", ""),
    ("sku-1004", "Green garden hose 12mm", "bolt", "fits AND OR NOT taps", "garden", "", "H12", "hose"),
    ("sku-1005", "Storage shelves, steel", "", "five shelves", "new", "80.25", "77", ""),
    ("sku-1006", "苹果手机壳 红色", "苹果", "硅胶", "手机|new", "9.99", "苹果X-100", ""),
    ("sku-1007", "Shoe cleaner", "a|b", "for shoes", "sale|sale", "5", "AB1200Y", " runner "),
]
SCHEMA = {
    "items": {
        "files": "items.tsv",
        "id": "key",
        "text": ["title", "brand"],
        "searched": ["details"],
        "identifiers": ["model"],
        "group": "product",
        "filters": [
            "brand",
            {"column": "tags", "kind": "multi", "separator": "|"},
            {"column": "price", "kind": "number"},
        ],
    }
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inverted")
    head = ("key", "title", "brand", "details", "tags", "price", "model", "product")
    (root / "items.tsv").write_text("".join("\t".join(row) + "\n" for row in (head, *ITEMS)), "utf-8")
    (root / "schema.yaml").write_text(json.dumps(SCHEMA))
    assert main(["ingest", f"--schema={root / 'schema.yaml'}", f"--out={root / 'store'}"]) == 0
    return root / "store"


@pytest.fixture(scope="module")
def server() -> Iterator[OpenSearchServer]:
    server = OpenSearchServer()
    yield server
    server.close()


Build = Callable[..., InvertedIndex]


@pytest.fixture(params=["tantivy", "opensearch"])
def build(request: pytest.FixtureRequest, store: Path, server: OpenSearchServer, tmp_path: Path) -> Build:
    """Builds and opens an inverted index with an analysis, in each engine."""
    numbers = itertools.count()

    def open_index(analysis: str = "") -> InvertedIndex:
        out = tmp_path / f"inverted{next(numbers)}"
        address = server.address if request.param == "opensearch" else ""
        inverted_index.build(Store(store), out, analysis, opensearch=address)
        return open_inverted_index(out)

    return open_index


@pytest.fixture(scope="module")
def inverted(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inverted") / "out"
    assert main(["index", "--inverted", f"--store={store}", f"--out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def catalogue(inverted: Path) -> Catalogue:
    return Catalogue.open(inverted)


def keys(index: InvertedIndex, *texts: tuple[str, float] | str, k: int = 10, **options: Any) -> list[str]:
    """Searches, and returns the last digit of the key of each item found, best first."""
    weighted = [(text, 1.0) if isinstance(text, str) else text for text in texts]
    found = index.search(weighted, k, **options)
    assert found.ids.dtype == np.int64 and found.scores.dtype == np.float32
    assert (np.diff(found.scores) <= 0).all() and len(set(found.ids.tolist())) == len(found)
    return [str(index.catalogue.key(row))[-1] for row in index.catalogue.rows(found.ids)]


def test_words_find_items(build: Build):
    index = build()
    assert set(keys(index, "running")) == {"1", "2", "3"}  # 3 has it in its details
    assert keys(index, "RED running")[0] == "1"
    assert keys(index, "手机") == ["6"]
    assert keys(index, "shelf") == keys(index, "") == keys(index, "  \n ,;") == []
    assert keys(index, "red blue running", k=2) == keys(index, "red blue running")[:2]


def test_stems_typos_and_trigrams(build: Build):
    assert keys(build("stem"), "shelve runs")[0] in "125" and "5" in keys(build("stem"), "shelve")
    assert keys(build("stem+trigrams=0.3"), "shelvez")[0] == "5"
    assert keys(build("simple+stem"), "SHELVE") == ["5"]
    assert keys(build("simple"), "steel,storage") == ["5"]


def test_letters_are_asked_for_unknown_words_only(store: Path, tmp_path: Path):
    inverted_index.build(Store(store), tmp_path / "out", "stem+typos=0.5")
    index = open_inverted_index(tmp_path / "out")
    assert keys(index, "shelvez")[0] == "5"
    assert index.tokens("red shelvez")[:2] == ["red", "shelvez"] and "##sh" in index.tokens("red shelvez")
    assert index.tokens("red shoes") == ["red", "shoe"]


def test_fields_have_boosts(build: Build):
    assert keys(build("title=1+details=0.01"), "shoes")[-1] == "7"
    assert keys(build("title=1"), "lining") == []
    assert keys(build("title=0.01+details=5"), "running shoes")[0] in "37"


def test_rewrites_add_items_with_their_weight(build: Build):
    index = build()
    assert keys(index, "boots", ("hose", 0.1)) == ["3", "4"]
    assert keys(index, ("boots", 0.1), "hose") == ["4", "3"]
    one, twice = (index.search([("boots", weight)], 5).scores for weight in (1.0, 2.0))
    np.testing.assert_allclose(2 * one, twice, rtol=1e-5)
    np.testing.assert_allclose(index.search([("boots", 1.0), ("boots", 1.0)], 5).scores, twice, rtol=1e-5)


@pytest.mark.parametrize(
    "text",
    ["red AND running", "title:red", "re*", '"red boots"', "-red", "+red", "red^9", "(red", "a\\", "[1 TO 2]", "{}"],
)
def test_what_a_user_types_is_words(build: Build, text: str):
    plain = "".join(letter if letter.isalnum() else " " for letter in text)
    assert keys(build(), text) == keys(build(), plain)


def test_a_long_query_is_cut(inverted: Path):
    index = open_inverted_index(inverted)
    assert len(index.tokens(" ".join(f"w{i}" for i in range(10 * MAX_TERMS)))) <= MAX_TERMS
    assert keys(index, "red " + "x" * 100_000)


FILTERS: list[tuple[Any, str]] = [
    ({"brand": "acme"}, "12"),
    ({"brand": ["acme", "苹果"]}, "126"),
    ({"brand": "a|b"}, "7"),
    ({"brand": "nobody"}, ""),
    ({"brand": ""}, ""),
    ({"tags": "new"}, "156"),
    ({"tags": ["garden", "sale"], "price": (None, 50)}, "17"),
    ({"price": 120}, "3"),
    ({"price": (49.5, 59)}, "12"),
    ({"price": [(None, 6), (100, None)]}, "37"),
    ({"price": (60, 50)}, ""),
    ({"price": (None, 1e300)}, "123567"),
    ({}, "1234567"),
]


@pytest.mark.parametrize(("filters", "expected"), FILTERS)
def test_filters(build: Build, filters: Any, expected: str):
    index = build()
    text = "red blue green storage 苹果手机壳 cleaner running"
    assert sorted(keys(index, text, filters=filters)) == list(expected)
    rows = np.arange(len(ITEMS))
    passes = index.catalogue.matches(rows, filters)
    assert sorted(str(index.catalogue.key(row))[-1] for row in rows[passes]) == list(expected)
    # A filter leaves scores and order as they are.
    everything, some = index.search([(text, 1.0)], 10), index.search([(text, 1.0)], 10, filters)
    kept = np.isin(everything.ids, some.ids)
    assert everything.ids[kept].tolist() == some.ids.tolist()
    np.testing.assert_allclose(everything.scores[kept], some.scores, rtol=1e-6)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"colour": "red"}, "filter 'colour': there is no such attribute; expected one of brand, tags, price"),
        ({"price": "cheap"}, "filter 'price': got 'cheap'; the attribute is a number"),
        ({"price": (1, 2, 3)}, "expected a finite number or a range"),
        ({"price": (None, None)}, "expected a finite number or a range"),
        ({"price": float("nan")}, "expected a finite number"),
        ({"brand": (1, 2)}, "filter 'brand': got (1, 2); the attribute is a keyword, expected a text"),
        ({"brand": True}, "expected a text"),
        ({"brand": []}, "filter 'brand': has no values"),
    ],
)
def test_wrong_filters(catalogue: Catalogue, filters: Any, message: str):
    with pytest.raises(ValueError) as error:
        catalogue.conditions(filters)
    assert message in str(error.value)


@pytest.mark.parametrize("k", [0, -1, MAX_K + 1])
def test_k_out_of_range(inverted: Path, k: int):
    with pytest.raises(ValueError, match=f"k={k}: expected 1 to 10,000"):
        open_inverted_index(inverted).search([("red", 1.0)], k)


def test_numbers_as_keywords_have_the_form_of_the_client(catalogue: Catalogue):
    values = [5, 5.0, 0.5, 1e20, "x"]
    (condition,) = catalogue.conditions({"brand": values})
    assert [f"brand={text}" for text in condition.texts] == [expressions({"brand": value})[0] for value in values]


def test_catalogue(catalogue: Catalogue):
    assert catalogue.num_items == len(ITEMS) and (np.diff(catalogue.ids) > 0).all()
    row = {str(catalogue.key(row)): row for row in range(len(ITEMS))}
    assert catalogue.title(row["sku-1006"]) == "苹果手机壳 红色"
    assert catalogue.attributes_of(row["sku-1001"]) == {"brand": "acme", "tags": ["new", "sale"], "price": 49.5}
    assert catalogue.attributes_of(row["sku-1004"]) == {"brand": "bolt", "tags": ["garden"]}
    rows = np.arange(len(ITEMS))
    cards = catalogue.cards(rows)
    expected = [(catalogue.key(i), catalogue.title(i), catalogue.attributes_of(i)) for i in range(len(ITEMS))]
    assert cards == expected
    assert catalogue.rows(catalogue.ids).tolist() == rows.tolist() and catalogue.rows([-1, 5]).tolist() == [-1, -1]
    assert {name: attribute.kind for name, attribute in catalogue.attributes.items()} == {
        "brand": "keyword", "tags": "keyword", "price": "number",
    }  # fmt: skip


def test_facets_count_the_items_of_the_list(catalogue: Catalogue):
    rows = np.arange(len(ITEMS))
    facets = catalogue.facets(rows, ["brand", "tags", "price"], 2)
    assert facets["brand"] == {
        "kind": "keyword", "more": 2, "values": [{"value": "acme", "count": 2}, {"value": "bolt", "count": 2}],
    }  # fmt: skip
    # An item that has a value twice counts once.
    assert facets["tags"]["values"] == [{"value": "new", "count": 3}, {"value": "sale", "count": 3}]
    assert facets["price"] == {"kind": "number", "min": 5.0, "max": 120.0, "count": 6}
    for facet in facets["brand"]["values"]:
        assert catalogue.matches(rows, {"brand": facet["value"]}).sum() == facet["count"]
    nothing = catalogue.facets(rows[:0], ["brand", "price"], 2)
    assert nothing["brand"]["values"] == [] and nothing["price"]["min"] is None
    with pytest.raises(ValueError, match="facet 'x': there is no such attribute; expected one of brand"):
        catalogue.facets(rows, ["x"], 2)


def test_groups_of_variants(catalogue: Catalogue):
    row = {str(catalogue.key(row))[-1]: row for row in range(len(ITEMS))}
    rows = np.array([row[key] for key in "1234567"])
    groups = catalogue.group(rows)
    assert groups[0] == groups[1] == groups[6] >= 0 and groups[3] >= 0 and groups[3] != groups[0]
    assert groups[[2, 4, 5]].tolist() == (-1 - rows[[2, 4, 5]]).tolist()
    assert (catalogue.group_text(groups[0]), catalogue.group_text(groups[2])) == ("runner", None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("AB-1200/x", "1"), ("ab1200x", "1"), (" AB 1200 X ", "1"), ("AB-1200/y", "27"), ("sku-1003", "3"),
        ("苹果x100", "6"), ("AB-1200", ""), ("H12", ""), ("77", ""), ("red shoes", ""), ("", ""), ("B 77 Z", "3"),
    ],
)  # fmt: skip
def test_identifiers(catalogue: Catalogue, inverted: Path, text: str, expected: str):
    found = open_inverted_index(inverted).identifier(text)
    assert sorted(str(catalogue.key(row))[-1] for row in catalogue.rows(found)) == list(expected)


def test_an_identifier_has_a_digit_and_four_characters():
    assert identifier_hash("shoes") is identifier_hash("a-1") is None
    assert (
        identifier_hash("Ａ１２３") == identifier_hash("a123") == identifier_hash("A.12-3") != identifier_hash("a124")
    )


def test_bm25_is_that_of_the_baseline(tmp_path: Path, shop_store: Store):
    """Tantivy keeps the length of a text in one byte. Up to 40 tokens that is exact."""
    inverted_index.build(shop_store, tmp_path / "out", "")
    index = open_inverted_index(tmp_path / "out")
    ids, titles = shop_store.items()["id"], shop_store.titles()
    queries = [*titles[:20], "red shoes", "phone case", "手机"]
    expected_ids, expected = Bm25(ids, [Field(titles)])(queries, None, 50)
    for row, query in enumerate(queries):
        # A repeated word counts as often as it is typed, in both.
        found = index.search([(query, 1.0)], 50)
        assert len(found) == (expected_ids[row] >= 0).sum()
        np.testing.assert_allclose(found.scores, 2.2 * expected[row, : len(found)], rtol=1e-4)


@pytest.fixture(scope="module")
def shop_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("shop")
    assert main(["generate", f"--out={root / 'shop'}", "--items=300", "--users=20", "--interactions=300"]) == 0
    assert main(["ingest", f"--schema={root / 'shop' / 'schema.yaml'}", f"--out={root / 'store'}"]) == 0
    return Store(root / "store")


@pytest.mark.slow
def test_filters_mean_what_those_of_the_servable_mean(job: Job, tmp_path: Path):
    store = Store(job.store)
    inverted_index.build(store, tmp_path / "out", "")
    catalogue = Catalogue.open(tmp_path / "out")
    version = max(path for path in job.servable.iterdir() if path.name.isdigit())
    check_same_store(catalogue, version)
    some = catalogue.attributes_of(7)
    servable = LoadedServable(version)
    rows = np.arange(catalogue.num_items)
    every = _of_servable(servable, {}, catalogue.num_items)
    for filters in (
        {"brand": some["brand"]}, {"price": some["price"]}, {"price": (some["price"], None)},
        {"brand": [some["brand"], "x|y"], "in_stock": "true"}, {"shop": "no"}, {"price": [(1, 20), (100, 200)]},
    ):  # fmt: skip
        passes = set(catalogue.ids[rows[catalogue.matches(rows, filters)]].tolist())
        assert _of_servable(servable, filters, catalogue.num_items) == passes & every, filters
    servable.close()


def _of_servable(servable: LoadedServable, filters: Any, items: int) -> set[int]:
    """Returns all items that pass in a servable: of a price with several ranges, the union."""
    parts = [filters]
    if isinstance(filters.get("price"), list):
        parts = [{**filters, "price": one} for one in filters["price"]]
    found: set[int] = set()
    for part in parts:
        request = {"query": "shoes", "include": expressions(part)}
        result = servable("search", servable.search_inputs([request], items))["item_ids"]
        found |= {int(i) for i in result.flatten() if i >= 0}
    return found


# Commands, files, errors.


def test_the_command_says_what_it_made(dpsr: Callable[..., Any], store: Path, tmp_path: Path):
    out = tmp_path / "out"
    result = dpsr(
        "index", "--inverted", f"--store={store}", f"--out={out}", "--analysis=stem+title=2+brand=1"
    ).succeeds()
    assert result.out.startswith(f"inverted index {out}: 7 items, ")
    manifest = json.loads((out / "inverted.json").read_text())
    assert [(field["texts"], field["boost"]) for field in manifest["fields"]] == [(["title"], 2.0), (["text1"], 1.0)]
    assert set(manifest["files"]) == {
        path.relative_to(out).as_posix()
        for path in out.rglob("*")
        if path.is_file() and path.suffix != ".lock" and path.name != "inverted.json"
    }
    dpsr("index", "--inverted", f"--store={store}", f"--out={out}").fails(1, "exists already")
    dpsr("index", "--inverted", f"--store={store}", f"--out={out}", "--overwrite").succeeds()


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--inverted", "--model=m"], ["--model cannot be combined with --inverted"]),
        (["--inverted", "--analysis=stemm"], ["has the option 'stemm', expected stem", "title=WEIGHT"]),
        (["--inverted", "--analysis=title=0"], ["has the option 'title=0'"]),
        (["--inverted", "--analysis=stem=klingon"], ["language 'klingon'"]),
        (["--inverted", "--opensearch=nowhere"], ["expected an address such as http://127.0.0.1:9200"]),
        (
            ["--inverted", "--opensearch=http://h:1", "--analysis=typos=1"],
            ["typos cannot be combined with --opensearch"],
        ),
        (["--analysis=stem", "--model=m"], ["--analysis is for inverted indexes; give --inverted"]),
        ([], ["--model is missing", "or give --inverted"]),
    ],
)
def test_wrong_flags(dpsr: Callable[..., Any], store: Path, tmp_path: Path, flags: list[str], fragments: list[str]):
    dpsr("index", f"--store={store}", f"--out={tmp_path / 'out'}", *flags).fails(2, *fragments)
    assert not (tmp_path / "out").exists()


def test_damaged_directories_are_refused(inverted: Path, tmp_path: Path):
    def broken(name: str, change: Callable[[Path], Any]) -> str:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(inverted, copy)
        change(copy / name)
        with pytest.raises(CommandError) as error:
            open_inverted_index(copy)
        return str(error.value)

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    files = json.loads((inverted / "inverted.json").read_text())["files"]
    for name, record in files.items():
        assert "is missing; run `dpsr index --inverted` again" in broken(name, Path.unlink)
        if record["bytes"]:
            assert "is damaged" in broken(name, flip)
        longer = broken(name, lambda path: path.write_bytes(path.read_bytes() + b"x"))
        assert f"has {record['bytes'] + 1:,} bytes, expected {record['bytes']:,}" in longer
    assert "holds no inverted index" in broken("inverted.json", Path.unlink)
    assert "cannot be read" in broken("inverted.json", lambda path: path.write_text("{"))
    other = broken("inverted.json", lambda path: path.write_text('{"format": "dpsr-store", "version": 3}'))
    assert "is of dpsr-store version 3, expected dpsr-inverted version 1" in other
    assert "is of None version None" in broken("inverted.json", lambda path: path.write_text("[]"))
    head = '{"format": "dpsr-inverted", "version": 1}'
    assert "is malformed" in broken("inverted.json", lambda path: path.write_text(head))


def test_a_directory_without_write_access(inverted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    copy = tmp_path / "inverted"
    shutil.copytree(inverted, copy, ignore=shutil.ignore_patterns("*.lock"))
    before = sorted(path.name for path in (copy / "tantivy").iterdir())
    assert before
    (copy / "tantivy").chmod(0o555)
    if os.geteuid() == 0:  # root may write everywhere, so the system's answer is replaced
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    try:
        assert keys(open_inverted_index(copy), "boots") == ["3"]
        assert sorted(path.name for path in (copy / "tantivy").iterdir()) == before
    finally:
        (copy / "tantivy").chmod(0o755)


def test_a_lock_file_that_appears_while_the_links_are_removed(
    inverted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    remove, made = os.rmdir, []

    def rmdir(path: Any, **how: Any) -> None:
        # A thread of Tantivy did this in 3 of 100 openings on a busy machine.
        if Path(path).parent == tmp_path and not made:
            made.append(Path(path) / ".tantivy-meta.lock")
            made[0].touch()
        remove(path, **how)

    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(os, "rmdir", rmdir)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert keys(open_inverted_index(inverted), "boots") == ["3"]
    assert made
    assert not list(tmp_path.iterdir())


def test_a_servable_of_another_store_is_refused(catalogue: Catalogue, tmp_path: Path):
    path = tmp_path / "assets.extra" / "dpsr_manifest.json"
    path.parent.mkdir()
    with pytest.raises(CommandError, match="cannot be read"):
        check_same_store(catalogue, tmp_path)
    path.write_text(json.dumps({"index": {"vocabulary_fingerprint": "0"}}))
    with pytest.raises(CommandError, match="its vocabulary is 0, that of the inverted index is"):
        check_same_store(catalogue, tmp_path)


def test_failures_of_opensearch(
    server: OpenSearchServer, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dpsr: Callable[..., Any]
):
    out = tmp_path / "out"
    address = server.address.replace("http://", "http://me:secret@")
    dpsr("index", "--inverted", f"--store={store}", f"--out={out}", f"--opensearch={address}").succeeds()
    manifest = json.loads((out / "inverted.json").read_text())
    assert "secret" not in json.dumps(manifest) and not (out / "tantivy").exists()
    index = open_inverted_index(out)
    assert keys(index, "shelvez")[0] == "5"
    monkeypatch.setattr(server, "fail", 503)
    with pytest.raises(CommandError, match=r"OpenSearch does not answer: .*503"):
        index.search([("red", 1.0)], 5)
    monkeypatch.setattr(server, "indices", {})
    with pytest.raises(CommandError, match=f"has no index {manifest['index']} that answers"):
        open_inverted_index(out)
    monkeypatch.setenv(opensearch.ADDRESS_VARIABLE, "ftp://x")
    with pytest.raises(UsageError, match="OpenSearch at ftp://x: expected an address"):
        open_inverted_index(out)


def test_an_index_that_fails_half_way_is_removed(
    server: OpenSearchServer, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before = set(server.indices)
    monkeypatch.setattr(
        server, "bulk", lambda data: {"errors": True, "items": [{"index": {"status": 400, "error": {}}}]}
    )
    with pytest.raises(CommandError, match="cannot make the index"):
        inverted_index.build(Store(store), tmp_path / "out", "", opensearch=server.address)
    assert set(server.indices) == before and not (tmp_path / "out").exists()


@pytest.mark.skipif(
    "DPSR_TEST_OPENSEARCH" not in os.environ, reason="set DPSR_TEST_OPENSEARCH to the address of a server"
)
def test_a_real_server(store: Path, tmp_path: Path):
    address = os.environ["DPSR_TEST_OPENSEARCH"]
    inverted_index.build(Store(store), tmp_path / "out", "stem", opensearch=address)
    index = open_inverted_index(tmp_path / "out")
    try:
        assert keys(index, "shelf shelving") == keys(index, "shelves") == ["5"]
        for filters, expected in FILTERS:
            found = keys(index, "red blue green storage 苹果手机壳 cleaner running", filters=filters)
            assert sorted(found) == list(expected)
    finally:
        connect_opensearch(address, 30).indices.delete(index=index.catalogue.manifest["index"])


@pytest.mark.parametrize("name", ["word", "stems", "trigrams:x", "simple:klingon", ""])
def test_unknown_analyzers(name: str):
    with pytest.raises(ValueError, match="expected"):
        analyzer(name)
