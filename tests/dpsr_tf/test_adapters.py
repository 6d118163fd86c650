"""Every adapter through `dpsr ingest`: on the real files where they are present, else on files of their layout."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from store_builder import queries_of

from dpsr_common.errors import CommandError
from dpsr_common.packed_file import PackedFile
from dpsr_tf.data.adapters import GROUP, esci, movielens_100k, open_adapter, raw
from dpsr_tf.data.schema import load_schema
from dpsr_tf.data.store import Counts, Store, unpack_strings

NAMES = sorted(entry.name for entry in entry_points(group=GROUP))
CONVERTED = [name for name in NAMES if open_adapter(name).convert]
# query, user, item, time; ids or keys
Pair = tuple[str, Any, Any, int]


def real(folder: str) -> Path:
    """A folder of $DPSR_DATA, or of ../shared/data; skips where it is not there."""
    path = Path(os.environ.get("DPSR_DATA", Path(__file__).parents[3] / "shared" / "data")) / folder
    if not path.is_dir():
        pytest.skip(f"no data at {path}")
    return path


def convert(name: str, source: Path, out: Path) -> Path:
    """What the adapter's converter makes of `source`."""
    out.mkdir()
    convert = open_adapter(name).convert
    assert convert is not None
    convert(source, out)
    return out


@dataclasses.dataclass
class Ingested:
    """A store, read as plain arrays."""

    path: Path

    @property
    def counts(self) -> Counts:
        return Store(self.path).counts

    def file(self, name: str) -> PackedFile:
        return PackedFile(str(self.path / f"{name}.dpsr"))

    def texts(self, name: str, section: str) -> list[str]:
        return unpack_strings(self.file(name), section)

    def ids(self, name: str) -> list[Any]:
        """Keys where there are any, else ids."""
        return self.texts(name, "key") if "key.splits" in self.file(name) else self.file(name)["id"].tolist()

    def pairs(self, name: str, prefix: str = "") -> list[Pair]:
        file = self.file(name)
        columns = [file[f"{prefix}{column}"].tolist() for column in ("user", "item", "time")]
        columns.insert(0, (queries_of(file) if prefix else file["query"]).tolist())
        queries, users, items = self.texts("interactions", "query_text"), self.ids("users"), self.ids("items")
        return [(queries[q], users[u], items[i], time) for q, u, i, time in zip(*columns, strict=True)]

    @property
    def positives(self) -> list[Pair]:
        return self.pairs("interactions", "positive.")

    @property
    def held_out(self) -> list[Pair]:
        return self.pairs("held_out")

    @property
    def negatives(self) -> dict[str, list[Any]]:
        file, items = self.file("interactions"), self.ids("items")
        parts = np.split(file["negative.item"], file["negative.splits"][1:-1])
        queries = self.texts("interactions", "query_text")
        return {query: [items[i] for i in part] for query, part in zip(queries, parts, strict=True) if len(part)}

    def feature(self, table: str, name: str) -> dict[Any, str | None]:
        """The value of a categorical feature of each row; None is code 0."""
        values = [None, *self.texts(table, f"values.{name}")]
        codes = self.file(table)[f"feature.{name}"]
        return {id: values[code] for id, code in zip(self.ids(table), codes, strict=True)}

    def lists(self, table: str, name: str) -> dict[Any, set[str]]:
        """The values of a feature of kind multi of each row."""
        values = self.texts(table, f"values.{name}")
        file = self.file(table)
        parts = np.split(file[f"feature.{name}.values"], file[f"feature.{name}.splits"][1:-1])
        return {id: {values[c - 1] for c in part} for id, part in zip(self.ids(table), parts, strict=True)}

    def codes(self, table: str, name: str) -> dict[Any, int]:
        return dict(zip(self.ids(table), self.file(table)[f"feature.{name}"].tolist(), strict=True))


@pytest.fixture
def ingest(dpsr, tmp_path) -> Callable[..., Ingested]:
    """Ingests `source` by an adapter's name."""

    def run(name: str, source: Path, *more: str) -> Ingested:
        out = tmp_path / f"store_{len(list(tmp_path.iterdir()))}"
        dpsr("ingest", f"--adapter={name}", f"--input={source}", f"--out={out}", *more).succeeds()
        return Ingested(out)

    return run


# What all have in common.


@pytest.mark.parametrize("name", NAMES)
def test_schema_and_documentation(name):
    schema = load_schema(open_adapter(name).schema_path)
    held_out = schema.interactions.held_out
    if held_out is not None and held_out.after is not None and held_out.after.isdigit():
        # The lists of JDsearch have five times, of which its second adapter holds out the last.
        assert int(held_out.after) == raw.HELD_OUT_FROM + (4 if name == "jdsearch_ranker" else 0)
    docs = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
    assert f"`{name}`" in docs


@pytest.mark.parametrize("name", CONVERTED)
def test_missing_files_are_named_with_their_publisher(name, dpsr, tmp_path):
    (tmp_path / "in").mkdir()
    arguments = ["ingest", f"--adapter={name}", f"--out={tmp_path / 'store'}"]
    dpsr(*arguments, f"--input={tmp_path / 'in'}").fails(2, str(tmp_path / "in"), "has no", "expected", "https://")
    dpsr(*arguments, f"--input={tmp_path / 'nowhere'}").fails(2, str(tmp_path / "nowhere"))
    assert not (tmp_path / "store").exists()


def test_text_is_read_line_by_line(tmp_path):
    path = tmp_path / "lines"
    path.write_text("id|name\n1|one\n\n2|two|more\nx|three\n")
    found = raw.records(path, "|", [int, str], header=True)
    assert [next(found), next(found)] == [[1, "one"], [2, "two"]]
    with pytest.raises(CommandError, match=r"lines: line 5 is not as published: .*'x'"):
        next(found)
    with pytest.raises(CommandError, match=r"line 1 has 2 fields, expected at least 3 with '\|' between"):
        list(raw.records(path, "|", [str, str, str]))
    path.write_bytes(b"1|Mis\xe9rables\n")
    assert list(raw.records(path, "|", [int, str], encoding="iso-8859-1")) == [[1, "Misérables"]]
    with pytest.raises(CommandError, match="lines: is not utf-8 text"):
        list(raw.records(path, "|", [int, str]))
    path.write_text("1 2 3\n4\n5 x\n")
    lists = raw.id_lists(path)
    assert [next(lists), next(lists)] == [(1, [2, 3]), (4, [])]
    with pytest.raises(CommandError, match="lines: line 3 is '5 x', expected `user item item"):
        next(lists)


def test_tables_of_many_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "_CHUNK", 3)
    rows = [(i, f"text {i}") for i in range(10)]
    raw.write(tmp_path / "t.parquet", {"id": pa.int64(), "text": pa.string()}, iter(rows))
    table = pyarrow.parquet.read_table(tmp_path / "t.parquet")
    assert list(zip(*table.to_pydict().values(), strict=True)) == rows
    raw.write(tmp_path / "none.parquet", {"id": pa.int64()}, [])
    assert pyarrow.parquet.read_table(tmp_path / "none.parquet").num_rows == 0


# MovieLens.


def test_movielens_100k(ingest):
    source = real("movielens/ml-100k")
    store = ingest("movielens_100k", source)
    lines = (source / "ml-100k.inter").read_text().splitlines()[1:]
    liked = {(int(u), int(i), int(t)) for u, i, r, t in map(str.split, lines) if float(r) >= 4}
    assert store.counts.rejected == store.counts.negatives == 0
    assert len(store.ids("items")) == 1682
    assert len(store.ids("users")) == 1 + 943
    assert len(store.positives) + len(store.held_out) == len(liked) == 55_375
    assert {pair[1:] for pair in store.positives + store.held_out} == liked
    first_of_april = 891_388_800
    assert max(pair[3] for pair in store.positives) < first_of_april <= min(pair[3] for pair in store.held_out)
    assert 0.05 < len(store.held_out) / len(liked) < 0.15
    assert ("Sci-Fi War", 298, 474, 884_182_806) in store.positives
    titles = dict(zip(store.ids("items"), store.texts("titles", "title"), strict=True))
    # The last one has its year in the title, in place of the field.
    assert (titles[1], titles[1412]) == ("Toy Story", "Land Before Time III: The Time of the Great Giving")
    assert store.lists("items", "genres")[1] == {"Animation", "Children's", "Comedy"}
    assert store.feature("users", "occupation")[1] == "technician"
    assert (store.feature("users", "gender")[1], store.feature("users", "gender")[-1]) == ("M", None)
    # Of the boundaries 18, 25, 35, ... one is not above the 24 years of user 1, all six are not above 57.
    assert (store.codes("users", "age")[1], store.codes("users", "age")[-1]) == (2, 0)


FILMS = [(1, "Toy Story", 1995, "Animation Children's"), (7, "Misérables, Les", 1998, "Drama"), (9, "odd", None, "")]
PEOPLE = [(1, 24, "M", "writer"), (2, 53, "F", "other")]
RATINGS = [(1, 1, 5, 880_000_000), (2, 7, 4, 880_000_001), (2, 1, 3, 880_000_002), (1, 7, 4, 892_000_000)]


def write_grouplens_100k(folder: Path) -> None:
    genres = movielens_100k._GENRES
    flags = {number: "|".join(str(int(genre in listed.split())) for genre in genres) for number, _, _, listed in FILMS}
    titles = {number: title + (f" ({year})" if year else "") for number, title, year, _ in FILMS}
    (folder / "u.item").write_bytes(
        "".join(f"{i}|{titles[i]}|01-Jan-1995||http://imdb|{flags[i]}\n" for i in titles).encode("iso-8859-1")
    )
    (folder / "u.user").write_text("".join(f"{u}|{age}|{sex}|{job}|85711\n" for u, age, sex, job in PEOPLE))
    (folder / "u.data").write_text("".join("\t".join(map(str, rating)) + "\n" for rating in RATINGS))


def write_recbole_100k(folder: Path) -> None:
    tables = {
        "item": ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq", *FILMS],
        "user": [
            "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token",
            *((*person, "85711") for person in PEOPLE),
        ],
        "inter": ["user_id:token\titem_id:token\trating:float\ttimestamp:float", *RATINGS],
    }
    for suffix, (header, *rows) in tables.items():
        lines = ["\t".join("" if value is None else str(value) for value in row) for row in rows]
        (folder / f"ml-100k.{suffix}").write_text("\n".join([str(header), *lines]) + "\n")


def test_movielens_100k_layouts_give_the_same_tables(ingest, tmp_path):
    for write in (write_grouplens_100k, write_recbole_100k):
        (tmp_path / write.__name__).mkdir()
        write(tmp_path / write.__name__)
    tables = [
        convert("movielens_100k", tmp_path / write.__name__, tmp_path / f"{write.__name__}_tables")
        for write in (write_grouplens_100k, write_recbole_100k)
    ]
    names = ["films.parquet", "ratings.parquet", "users.parquet"]
    for table in tables:
        assert sorted(path.name for path in table.iterdir()) == names
    for name in names:
        assert pyarrow.parquet.read_table(tables[0] / name).equals(pyarrow.parquet.read_table(tables[1] / name))
    films = pyarrow.parquet.read_table(tables[0] / "films.parquet").to_pydict()
    assert list(zip(*films.values(), strict=True)) == FILMS
    store = ingest("movielens_100k", tmp_path / "write_grouplens_100k")
    assert store.positives == [("Animation Children's", 1, 1, 880_000_000), ("Drama", 2, 7, 880_000_001)]
    assert store.held_out == [("Drama", 1, 7, 892_000_000)]


def test_movielens_1m(ingest, dpsr, tmp_path):
    source = tmp_path / "ml-1m"
    source.mkdir()
    (source / "movies.dat").write_bytes(
        "".join(f"{i}::{title} ({year})::{genres.replace(' ', '|')}\n" for i, title, year, genres in FILMS[:2]).encode(
            "iso-8859-1"
        )
    )
    (source / "users.dat").write_text("1::F::1::10::48067\n2::M::56::20::70072\n")
    # The last one is of a film that is not in the table; the one before it is of 2001.
    ratings = [(1, 1, 5, 978_300_760), (2, 7, 4, 978_302_109), (2, 1, 3, 978_301_968), (1, 7, 4, 978_307_200)]
    ratings += [(1, 5, 5, 978_300_000)]
    (source / "ratings.dat").write_text("".join("::".join(map(str, rating)) + "\n" for rating in ratings))
    store = ingest("movielens_1m", source, "--max_reject_fraction=0.3")
    assert store.positives == [("Animation Children's", 1, 1, 978_300_760), ("Drama", 2, 7, 978_302_109)]
    assert store.held_out == [("Drama", 1, 7, 978_307_200)]
    assert store.counts.rejected == 1
    assert store.texts("titles", "title") == ["Toy Story", "Misérables, Les"]
    assert store.feature("users", "occupation") == {-1: None, 1: "K-12 student", 2: "writer"}
    assert store.codes("users", "age") == {-1: 0, 1: 1, 2: 7}

    (source / "users.dat").write_text("1::F::1::21::48067\n")
    dpsr("ingest", "--adapter=movielens_1m", f"--input={source}", f"--out={tmp_path / 'bad'}").fails(
        1, "users.dat: line 1", "occupation is 21, expected 0 to 20"
    )
    (source / "ratings.dat").rename(source / "train.txt")
    dpsr("ingest", "--adapter=movielens_1m", f"--input={source}", f"--out={tmp_path / 'bad'}").fails(
        2, "has lists of ids", "--adapter=movielens_1m_lightgcn"
    )


@pytest.mark.long
def test_movielens_1m_lightgcn(ingest):
    source = real("movielens/ml-1m-lightgcn")
    store = ingest("movielens_1m_lightgcn", source)
    expected: Counter[Pair] = Counter()
    for name, time in (("train", 999_999_999), ("valid", 1_000_000_000), ("test", 1_000_000_001)):
        for line in (source / f"{name}.txt").read_text().splitlines():
            user, *items = map(int, line.split())
            expected.update((f"user{user}", user, item, time) for item in items)
    assert store.counts.rejected == 0
    assert (len(store.positives), len(store.held_out)) == (590_733, 80_897 + 164_848)
    assert Counter(store.positives + store.held_out) == expected
    assert ("user1", 1, 38, 999_999_999) in expected
    assert len(store.ids("users")) == 1 + len({pair[1] for pair in expected})
    assert store.ids("items") == sorted({pair[2] for pair in expected})
    # Each query and each item is one token, and no two share it.
    files = [(store.file("interactions"), "query.splits", "query.tokens"), (store.file("items"), "tokens.splits", "")]
    tokens = np.concatenate([file[values or "tokens.values"] for file, _, values in files])
    assert all((np.diff(file[splits]) == 1).all() for file, splits, _ in files)
    assert len(np.unique(tokens)) == len(tokens)


# Amazon reviews.


def test_amazon_s3rec(ingest, dpsr, tmp_path):
    source = real("amazon_s3rec")
    store = ingest("amazon_s3rec", source / "Beauty.txt")
    lines = [list(map(int, line.split())) for line in (source / "Beauty.txt").read_text().splitlines()]
    assert store.counts.rejected == 0
    assert len(store.ids("items")) == 12_101
    assert len(store.ids("users")) == 1 + 22_363
    assert len(store.held_out) == 2 * 22_363
    assert len(store.positives) == 198_502 - 2 * 22_363
    # Sorted by time, each user's items are his line, and the last two of them are held out.
    by_user: dict[int, list[Pair]] = {}
    for pair in sorted(store.positives + store.held_out, key=lambda pair: pair[3]):
        by_user.setdefault(pair[1], []).append(pair)
    assert {user: [pair[2] for pair in pairs] for user, pairs in by_user.items()} == {u: items for u, *items in lines}
    assert all([pair[3] for pair in pairs[-2:]] == [10**9, 10**9 + 1] for pairs in by_user.values())
    # No query gives away the item: its attributes are items', and 20 or more of them have each.
    attributes = {
        int(item): set(a) for item, a in json.loads((source / "Beauty_item2attributes.json").read_text()).items()
    }
    items_with = Counter(attribute for values in attributes.values() for attribute in values)
    assert store.lists("items", "attributes")[4] == {f"attribute{a}" for a in attributes[4]} != set()
    for query, _, item, _ in store.positives:
        words = {int(word.removeprefix("attribute")) for word in query.split()}
        assert words <= attributes[item]
        assert len(words) <= 2
        assert all(items_with[word] >= 20 for word in words)
    assert len(store.texts("interactions", "query_text")) > 200

    dpsr("ingest", "--adapter=amazon_s3rec", f"--input={source}", f"--out={tmp_path / 'x'}").fails(
        2, "holds 2 data sets, Beauty, Toys_and_Games; choose one with", f"--input={source / 'Beauty.txt'}"
    )


def test_amazon_s3rec_directory_with_one_set(dpsr, ingest, tmp_path):
    source = tmp_path / "amazon"
    source.mkdir()
    (source / "Books.txt").write_text("1 10 11 12\n2 12 10 11 12\n")
    attributes = source / "Books_item2attributes.json"
    attributes.write_text('{"10": [1, 2, 2], "11": [2], "12": [3, 1]}')
    store = ingest("amazon_s3rec", source)
    # No attribute is common: a query has all of them.
    assert store.positives == [
        ("attribute1 attribute2", 1, 10, 999_999_999),
        ("attribute1 attribute2", 2, 10, 999_999_999),
        ("attribute3 attribute1", 2, 12, 999_999_998),
    ]
    assert len(store.held_out) == 4
    for text in ("[1]", '{"10": 3}', '{"a": [1]}', "{"):
        attributes.write_text(text)
        dpsr("ingest", "--adapter=amazon_s3rec", f"--input={source}", f"--out={tmp_path / 'x'}").fails(
            1, "Books_item2attributes.json", "is not a JSON object from items to lists of attribute ids"
        )
    attributes.unlink()
    dpsr("ingest", "--adapter=amazon_s3rec", f"--input={source / 'Books.txt'}", f"--out={tmp_path / 'x'}").fails(
        2, "Books_item2attributes.json: no such file", "https://"
    )


# ESCI.


def write_esci(folder: Path, label: str = "E") -> None:
    folder.mkdir()
    products = [
        ("B1", "Running shoe", "Acme", "red", "us"),
        ("B2", "Shoe laces", None, None, "us"),
        ("B1", "Zapatilla", "Acme", "rojo", "es"),
        ("B3", "Sock", "Acme", "", "us"),
    ]
    names = ["product_id", "product_title", "product_brand", "product_color", "product_locale"]
    rows = [dict(zip(names, product, strict=True)) for product in products]
    for row in rows:
        row.update(product_description="<p>long</p>", product_bullet_point="short")
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "shopping_queries_dataset_products.parquet")
    judged = [
        ("trainers", "B1", label, "train", "us"),
        ("trainers", "B2", "C", "train", "us"),
        ("trainers", "B3", "S", "train", "us"),
        ("sock", "B3", "E", "test", "us"),
        ("sock", "B1", "I", "test", "us"),
        ("zapatos", "B1", "E", "train", "es"),
    ]
    rows = [
        {"example_id": i, "query": query, "query_id": i, "product_id": product, "product_locale": locale,
         "esci_label": grade, "small_version": 1, "large_version": 1, "split": split}
        for i, (query, product, grade, split, locale) in enumerate(judged)
    ]  # fmt: skip
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "shopping_queries_dataset_examples.parquet")


def test_esci(ingest, dpsr, tmp_path):
    write_esci(tmp_path / "esci")
    store = ingest("esci", tmp_path / "esci")
    assert sorted(store.ids("items")) == ["B1", "B2", "B3"]
    assert store.positives == [("trainers", -1, "B1", 999_999_999)]
    assert store.held_out == [("sock", -1, "B3", 1_000_000_000)]
    assert store.negatives["trainers"] == ["B2"]
    assert store.feature("items", "color") == {"B1": "red", "B2": None, "B3": None}
    assert store.counts.rejected == 0
    # Another locale through the function.
    (tmp_path / "es").mkdir()
    esci.convert(tmp_path / "esci", tmp_path / "es", locale="es")
    spanish = pyarrow.parquet.read_table(tmp_path / "es" / "examples.parquet").to_pylist()
    assert spanish == [{"query": "zapatos", "product_id": "B1", "grade": 3, "time": 999_999_999}]
    with pytest.raises(CommandError, match=r"products.parquet: has no rows of locale fr, expected us, es or jp"):
        esci.convert(tmp_path / "esci", tmp_path / "es", locale="fr")

    write_esci(tmp_path / "bad", label="X")
    arguments = ["ingest", "--adapter=esci", f"--out={tmp_path / 'x'}"]
    dpsr(*arguments, f"--input={tmp_path / 'bad'}").fails(1, "examples.parquet", "esci_label has 'X', expected E, S, C")
    products = tmp_path / "bad" / "shopping_queries_dataset_products.parquet"
    table = pyarrow.parquet.read_table(products)
    pyarrow.parquet.write_table(table.drop_columns(["product_color", "product_locale"]), products)
    dpsr(*arguments, f"--input={tmp_path / 'bad'}").fails(1, "has no column product_color, product_locale")
    products.write_bytes(b"PAR1 no more")
    dpsr(*arguments, f"--input={tmp_path / 'bad'}").fails(1, "cannot be read as parquet")


# WANDS.

WANDS = {
    "query.csv": "query_id\tquery\tquery_class\n"
    + '208\t"fawkes 36"" blue vanity"\tVanities\n197\tdesk for kids\t\n'
    + "".join(f"{300 + i}\tsofa number {i}\tSofas\n" for i in range(30)),
    "product.csv": "product_id\tproduct_name\tproduct_class\tcategory hierarchy\tproduct_description\tproduct_features"
    "\trating_count\taverage_rating\treview_count\n"
    '0\tsolid wood desk\tDesks|Kids Desks\tFurniture / Office / Desks\t"two lines,\none ""quoted"""\t'
    "color:oak|legs : 4\t15.0\t4.5\t11.0\n"
    '1\t"36"" vanity"\tVanities\tBath / Vanities\t\t\t\t\t\n',
    "label.csv": "id\tquery_id\tproduct_id\tlabel\n0\t208\t1\tExact\n1\t208\t0\tIrrelevant\n2\t197\t0\tExact\n"
    "3\t197\t1\tPartial\n4\t999\t1\tExact\n" + "".join(f"{9 + i}\t{300 + i}\t0\tExact\n" for i in range(30)),
}


def test_wands(ingest, dpsr, tmp_path):
    source = tmp_path / "dataset"
    source.mkdir()
    for name, text in WANDS.items():
        (source / name).write_text(text)
    store = ingest("wands", source, "--max_reject_fraction=0.1")
    assert store.counts.rejected == 1  # the judgment of query 999, which is not in the table
    pairs = {(query, item) for query, _, item, _ in store.positives}
    held_out = {(query, item) for query, _, item, _ in store.held_out}
    assert pairs | held_out == {
        ('fawkes 36" blue vanity', 1),
        ("desk for kids", 0),
        *((f"sofa number {i}", 0) for i in range(30)),
    }
    assert pairs
    assert held_out
    assert not {query for query, _ in pairs} & {query for query, _ in held_out}
    assert store.negatives in ({}, {'fawkes 36" blue vanity': [0]})
    assert store.texts("titles", "title") == ["solid wood desk", '36" vanity']
    assert store.lists("items", "class") == {0: {"Desks", "Kids Desks"}, 1: {"Vanities"}}
    assert store.lists("items", "category")[0] == {"Furniture", "Office", "Desks"}
    assert store.lists("items", "attributes") == {0: {"color:oak", "legs : 4"}, 1: set()}
    assert store.codes("items", "rating") == {0: 5, 1: 0}
    assert store.file("items")["popularity"].tolist() == [11, 0]

    arguments = ["ingest", "--adapter=wands", f"--input={source}", f"--out={tmp_path / 'x'}"]
    (source / "label.csv").write_text(WANDS["label.csv"].replace("Irrelevant", "Maybe"))
    dpsr(*arguments).fails(1, "label.csv: column label has 'Maybe', expected Irrelevant, Partial, Exact")
    (source / "label.csv").write_text("id\tquery_id\tproduct\tlabel\n0\t208\t1\tExact\n")
    dpsr(*arguments).fails(1, "label.csv", "product_id", "https://")
    (source / "label.csv").write_text("id\tquery_id\tproduct_id\tlabel\n0\t208\tone\tExact\n")
    dpsr(*arguments).fails(1, "label.csv: cannot be read as tab-separated text", "one")


# KuaiSearch.


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_kuaisearch_sample(ingest, dpsr, tmp_path):
    source = real("kuaisearch_schema_sample")
    log = pyarrow.parquet.read_table(convert("kuaisearch", source, tmp_path / "tables") / "log.parquet").to_pylist()
    expected = {}
    for search in read_jsonl(source / "recall.jsonl"):
        for place, item in enumerate(search["impressed_item_ids"], start=1):
            kind = "click" if item in search["clicked_item_ids"] else "impression"
            kind = "order" if item in search["purchased_item_ids"] else kind
            expected[search["session_id"], item] = (
                search["user_id"],
                search["query"],
                search["time_index"],
                kind,
                place,
            )
    names = ("user_id", "query", "time", "type", "position")
    assert {(row["session_id"], row["item_id"]): tuple(row[name] for name in names) for row in log} == expected
    # One thing was bought without a click.
    assert Counter(row["type"] for row in log) == {"impression": 24_846, "click": 565, "order": 19}

    # The sample's tables do not join. With the ids of its log in its items and users, they do.
    arguments = ["ingest", "--adapter=kuaisearch", f"--out={tmp_path / 'x'}"]
    dpsr(*arguments, f"--input={source}").fails(1, "25,430 of 25,430 interactions cannot be used")
    joined = tmp_path / "joined"
    joined.mkdir()
    (joined / "recall.jsonl").write_bytes((source / "recall.jsonl").read_bytes())
    for name, key in (("items", "item_id"), ("users", "user_id")):
        rows = read_jsonl(source / f"{name}.jsonl")
        ids = sorted({row[key] for row in log})
        renamed = [{**rows[i % len(rows)], key: id} for i, id in enumerate(ids)]
        (joined / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in renamed))
    store = ingest("kuaisearch", joined)
    assert (store.counts.rejected, store.counts.positives) == (0, 565 + 19)
    first = read_jsonl(joined / "users.jsonl")[0]
    assert store.feature("users", "province")[first["user_id"]] == first["fre_province"]
    file = store.file("interactions")
    # Every unclicked item of a search with a click stands in the request of its clicks.
    clicked = {row["session_id"] for row in log if row["type"] != "impression"}
    unclicked = [row for row in log if row["type"] == "impression" and row["session_id"] in clicked]
    assert len(file["impression.item"]) == len(unclicked) == store.counts.impressions


def test_kuaisearch_lists_that_do_not_agree(dpsr, tmp_path):
    source = tmp_path / "kuai"
    source.mkdir()
    searches = [
        {"impressed_item_ids": [5, 3, 5], "clicked_item_ids": [3], "purchased_item_ids": [9], "split": "train"},
        {"impressed_item_ids": [], "clicked_item_ids": [], "purchased_item_ids": [], "split": "train"},
        {"impressed_item_ids": [3], "clicked_item_ids": [3, 3], "purchased_item_ids": [3], "split": "test"},
    ]
    more = {"user_id": 1, "query": "鞋", "time_index": 7, "a_field_of_tomorrow": {"x": 1}}
    text = "".join(json.dumps({"session_id": i, **s, **more}) + "\n" for i, s in enumerate(searches))
    (source / "recall.jsonl").write_text(text)
    for name in ("items", "users"):
        (source / f"{name}.jsonl").write_text("{}\n")
    rows = pyarrow.parquet.read_table(convert("kuaisearch", source, tmp_path / "out") / "log.parquet").to_pylist()
    found = sorted((row["session_id"], row["item_id"], row["type"], row["position"] or 0, row["time"]) for row in rows)
    assert found == [
        (0, 3, "click", 2, 7),
        (0, 5, "impression", 1, 7),
        (0, 9, "order", 0, 7),
        (2, 3, "order", 1, 1_000_000_007),
    ]
    (source / "recall.jsonl").write_text(text + "{not JSON}\n")
    dpsr("ingest", "--adapter=kuaisearch", f"--input={source}", f"--out={tmp_path / 'x'}").fails(
        1, "recall.jsonl: is not as published"
    )


# JDsearch. These lines are made up, in the layout of the published files; ^X stands for the code 24.
JDSEARCH_USERS = [
    "query\tcandidate_wid_list\tcandidate_label_list\thistory_qry_list\thistory_wid_list\thistory_type_list\t"
    "history_time_list",
    "12^X32\t456_457_789\t3.0_0.0_1.0\t323^X328_-1_12^X54\t889_256_456\tORD_CLICK_CART\t0_12_4_5",
    "77\t457_456\t0.0_2.0\t\t\t\t0",
    "12^X32\t457\t0.0\t12^X32\t457\tFLW\t7_0",
    "5\t789_457\t0.0_1.0\t5\t789\tCLICK\t0_86400",
]
JDSEARCH_PRODUCTS = [
    "wid\tname\tbrand_id\tbrand_name\tcate_id_1\tcate_name_1\tcate_id_2\tcate_name_2\tcate_id_3\tcate_name_3\t"
    "cate_id_4\tcate_name_4\tshop_id",
    "456\t12^X99\t7\t70^X71\t1\t10\t2\t20^X21\t3\t30\t4\t40\t8",
    "457\t32\t\t\t1\t10\t2\t20^X21\t3\t30\t5\t50\t",
]


def jdsearch_files(folder, users=JDSEARCH_USERS, products=JDSEARCH_PRODUCTS, sample=""):
    folder.mkdir()
    for name, lines in (("user_behavior_data", users), ("product_meta_data", products)):
        (folder / f"{name}{sample}.txt").write_text("".join(f"{line}\n" for line in lines).replace("^X", "\x18"))
    return folder


@pytest.mark.parametrize("header", [True, False])
def test_jdsearch_tables(tmp_path, header):
    first = 0 if header else 1
    source = jdsearch_files(tmp_path / "in", JDSEARCH_USERS[first:], JDSEARCH_PRODUCTS[first:])
    out = convert("jdsearch", source, tmp_path / "out")
    log = [tuple(row.values()) for row in pyarrow.parquet.read_table(out / "log.parquet").to_pylist()]
    end = raw.HELD_OUT_FROM
    assert log == [
        # Times go back from the test query; the first user's is at 1, the second's at 2, and so on.
        ("323 328", 1, 889, "order", end + 1 - 21, "", 1),
        ("-1", 1, 256, "click", end + 1 - 9, "", 0),
        ("12 54", 1, 456, "cart", end + 1 - 5, "", 1),
        ("12 32", 1, 456, "order", end + 1, "test", 1),
        ("12 32", 1, 457, "impression", end + 1, "test", 1),
        ("12 32", 1, 789, "click", end + 1, "test", 1),
        ("77", 2, 457, "impression", end + 2, "test", 1),
        ("77", 2, 456, "cart", end + 2, "test", 1),
        # The history is never held out, even if it ends in the same second.
        ("12 32", 3, 457, "follow", end - 1, "", 1),
        ("12 32", 3, 457, "impression", end + 3, "test", 1),
        ("5", 4, 789, "click", end + 4 - 86_400, "", 1),
        ("5", 4, 789, "impression", end + 4, "test", 1),
        ("5", 4, 457, "click", end + 4, "test", 1),
    ]
    items = pyarrow.parquet.read_table(out / "items.parquet").to_pylist()
    assert [tuple(item.values()) for item in items[:2]] == [
        (456, "12 99", "70 71", "10 20 21 30 40", "1", "2", "3", "4", "8"),
        (457, "32", "", "10 20 21 30 50", "1", "2", "3", "5", ""),
    ]
    # Products without metadata.
    assert [(item["item_id"], item["name"], item["shop"]) for item in items[2:]] == [
        (256, None, None), (789, None, None), (889, None, None)
    ]  # fmt: skip
    assert pyarrow.parquet.read_table(out / "users.parquet")["user_id"].to_pylist() == [1, 2, 3, 4]


def test_jdsearch_lists_are_requests_with_outcomes(ingest, tmp_path):
    source = jdsearch_files(tmp_path / "in", sample="_sample")
    store = Store(ingest("jdsearch", source).path)
    held, (train,) = store.held_requests(), store.requests()
    ids = store.items()["id"]

    def requests(file):
        places = zip(file["request.splits"], file["request.splits"][1:], strict=False)
        found = [
            {int(ids[item]): int(outcome) for item, outcome in
             zip(file["shown.item"][begin:end], file["shown.outcome"][begin:end], strict=True)}
            for begin, end in places
        ]  # fmt: skip
        queries = unpack_strings(file, "query_text")
        return [(queries[q], lists) for q, lists in zip(file["request.query"], found, strict=True)]

    assert requests(held) == [
        ("12 32", {456: 3, 457: 0, 789: 1}), ("77", {456: 2, 457: 0}), ("12 32", {457: 0}), ("5", {789: 0, 457: 1})
    ]  # fmt: skip
    # A follow counts as a click. The same query in the history is another request.
    assert sorted(requests(train)) == [
        ("-1", {256: 1}), ("12 32", {457: 1}), ("12 54", {456: 2}), ("323 328", {889: 3}), ("5", {789: 1})
    ]  # fmt: skip
    # Weight 0: what was done without a query is in the history only.
    file = Ingested(store.path).file("interactions")
    weights = dict(zip(queries_of(file), file["positive.weight.values"][file["positive.weight"]], strict=True))
    assert {list(store.queries())[query]: weight for query, weight in weights.items()}["-1"] == 0
    assert np.diff(store.users()["event.splits"]).tolist() == [0, 5, 1, 1, 2]

    ranker = Store(ingest("jdsearch_ranker", source).path)
    assert [query for query, _ in requests(ranker.held_requests())] == ["5"]
    (train,) = ranker.requests()
    assert ("77", {456: 2, 457: 0}) in requests(train)


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("1\t2\t0.0\t\t\t\t", ["line 2 has", "0 queries, 0 products, 0 types and 0 times", "one time more"]),
        ("1\t2_3\t0.0\t\t\t\t0", ["2 candidates with 1 labels"]),
        ("1\t2\t4.0\t\t\t\t0", ["is not as published ('4.0')", "0.0, 1.0, 2.0, 3.0"]),
        ("1\t2\t0.0\t5\t6\tBUY\t0_1", ["'BUY'", "CLICK, FLW, CART, ORD"]),
        ("1\tx\t0.0\t\t\t\t0", ["'x'", "whole numbers"]),
        ("1\t2\t0.0", ["line 2 has 3 fields, expected 7"]),
    ],
)
def test_jdsearch_bad_lines(dpsr, tmp_path, line, fragments):
    source = jdsearch_files(tmp_path / "in", [JDSEARCH_USERS[0], line])
    dpsr("ingest", "--adapter=jdsearch", f"--input={source}", f"--out={tmp_path / 'x'}").fails(
        1, "user_behavior_data.txt: ", *fragments
    )


def test_jdsearch_bad_products(dpsr, tmp_path):
    for number, (line, fragment) in enumerate(
        [("456\ta", "line 2 has 2 fields, expected 13"), ("w" + "\t" * 12, "'w'")]
    ):
        source = jdsearch_files(tmp_path / f"in{number}", products=[JDSEARCH_PRODUCTS[0], line])
        dpsr("ingest", "--adapter=jdsearch", f"--input={source}", f"--out={tmp_path / 'x'}").fails(
            1, "product_meta_data.txt: ", fragment
        )
