from __future__ import annotations

import csv
import decimal
import gzip
import io
import json
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from conftest import encode_table

from dpsr_common.errors import CommandError, UsageError
from dpsr_tf.data import tables
from dpsr_tf.data.column_values import ids_of, numbers_of, texts_of
from dpsr_tf.data.tables import SUFFIXES, Table, find_files, read_batches

TEXT_KINDS = [".csv", ".tsv", ".jsonl", ".json"]
ARROW_KINDS = [".arrow", ".feather", ".ipc"]
FORMATS = [".parquet", *ARROW_KINDS, ".ipc_stream", *TEXT_KINDS, *(k + c for k in TEXT_KINDS for c in (".gz", ".zst"))]

# Texts that one format or another could spoil, and numbers beside them.
ROWS = [
    {"text": text, "number": i, "unused": "x"}
    for i, text in enumerate(
        ["007", "NA", "null", "1e5", "true", "2024-03-01", 'inch "', "a,b", "红鞋", " x ", "1.0", "nan", "[1]", "{}"]
    )
]


def write(path, rows=ROWS, suffix=".csv"):
    """Writes rows as a file of a kind; .ipc_stream is an .ipc file in the stream format."""
    file = path / f"t{suffix.replace('_stream', '')}"
    kind = suffix.removesuffix(".gz").removesuffix(".zst")
    if kind == ".ipc_stream":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(str(file), table.schema) as writer:
            writer.write_table(table, 5)
        return file
    if kind in ARROW_KINDS:
        table = pa.Table.from_pylist(rows)
        if kind == ".feather":
            pyarrow.feather.write_feather(table, str(file), compression="zstd")
        else:
            with pa.ipc.new_file(str(file), table.schema) as writer:
                writer.write_table(table, 5)
        return file
    data = encode_table(rows, ".jsonl" if kind == ".json" else kind)
    if suffix.endswith(".gz"):
        data = gzip.compress(data)
    if suffix.endswith(".zst"):
        data = pa.Codec("zstd").compress(data, asbytes=True)
    file.write_bytes(data)
    return file


def read(file, texts=("text",), others=("number",), **arguments):
    """All texts and all numbers of a file."""
    found_texts, found_numbers = [], []
    row = 0
    for source in read_batches([file], texts, others, **arguments):
        assert (source.path, source.first_row) == (file, row)
        assert source.batch.schema.names == [*texts, *others]
        row += len(source.batch)
        found_texts += texts_of(source.batch[texts[0]])[0].to_pylist()
        if others:
            found_numbers += numbers_of(source.batch[others[0]])[0].tolist()
    return found_texts, found_numbers


@pytest.fixture
def small_blocks(monkeypatch):
    """Text files in blocks of a few rows."""
    monkeypatch.setattr(tables, "_BLOCK_BYTES", 64)


# Every kind of file.


@pytest.mark.parametrize("batch_rows", [1, 3, 65_536])
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same(tmp_path, suffix, batch_rows):
    file = write(tmp_path, suffix=suffix)
    sizes = [len(source.batch) for source in read_batches([file], ["text"], ["number"], batch_rows)]
    assert max(sizes) <= batch_rows and sum(sizes) == len(ROWS)
    texts, numbers = read(file, batch_rows=batch_rows)
    assert texts == [row["text"] for row in ROWS]
    assert numbers == [row["number"] for row in ROWS]


@pytest.mark.parametrize("suffix", TEXT_KINDS)
def test_blocks_do_not_change_the_result(tmp_path, small_blocks, suffix):
    rows = [{"text": str(i), "number": i} for i in range(100)] + ROWS[1:] + [{"text": "", "number": None}]
    file = write(tmp_path, [{"text": row["text"], "number": row["number"]} for row in rows], suffix)
    assert len(list(read_batches([file], ["text"], []))) > 10
    texts, numbers = read(file)
    assert texts == [row["text"] for row in rows]
    np.testing.assert_array_equal(numbers, [np.nan if row["number"] is None else row["number"] for row in rows])


def test_types_of_columns(tmp_path):
    untyped = {pa.large_binary()}
    for suffix in TEXT_KINDS:
        [source] = read_batches([write(tmp_path, suffix=suffix)], ["text"], ["number"])
        assert set(source.batch.schema.types) == untyped, suffix
    for suffix in (".parquet", *ARROW_KINDS):
        for source in read_batches([write(tmp_path, suffix=suffix)], ["text"], ["number"]):
            assert source.batch.schema.types == [pa.large_binary(), pa.int64()], suffix


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_columns_of_arrow_types(tmp_path, suffix):
    texts = ["a", None, "红"]
    columns = {
        "string": pa.array(texts),
        "large_string": pa.array(texts, pa.large_string()),
        "dictionary": pa.array(texts).dictionary_encode(),
        "binary": pa.array([b"a", None, "红".encode()]),
    }
    if suffix == ".arrow":
        columns["string_view"] = pa.array(texts, pa.string_view())
    table = pa.table(
        columns | {"list": [["a", "b"], None, []], "decimal": [decimal.Decimal("1.5"), None, decimal.Decimal(2)]}
    )
    file = tmp_path / f"t{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        pyarrow.feather.write_feather(table, str(file), compression="uncompressed")
    [source] = read_batches([file], list(columns), ["list", "decimal"])
    for name in columns:
        assert source.batch[name].type == pa.large_binary()
        assert texts_of(source.batch[name])[0].to_pylist() == texts
    assert source.batch["list"].cast(pa.list_(pa.string())).to_pylist() == [["a", "b"], None, []]
    assert numbers_of(source.batch["decimal"])[0].tolist()[::2] == [1.5, 2.0]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("column", [pa.array([{"a": 1}]), pa.array([[[1]]]), pa.array([1], pa.time32("s"))])
def test_columns_of_types_that_hold_no_value(tmp_path, suffix, column):
    table, file = pa.table({"text": column}), tmp_path / f"t{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        pyarrow.feather.write_feather(table, str(file))
    with pytest.raises(CommandError, match=f"{file}: column text has type .*, expected text, numbers, times"):
        read(file, others=())


def test_csv_with_quotes_newlines_and_a_byte_order_mark(tmp_path, small_blocks):
    texts = ["two\nlines", 'a "quote"', "a\r\nb", "", "comma, there"] * 20
    out = io.StringIO()
    csv.writer(out).writerows([["text", "number"], *([text, i] for i, text in enumerate(texts))])
    file = tmp_path / "t.csv"
    file.write_bytes(b"\xef\xbb\xbf" + out.getvalue().encode())
    assert read(file) == (texts, list(range(100)))


def test_tsv_is_unquoted(tmp_path):
    file = tmp_path / "t.tsv"
    file.write_bytes(b'text\tnumber\r\n"open\t1\r\n3" bolt\t2\r\n')
    assert read(file) == (['"open', '3" bolt'], [1, 2])


def test_json_values(tmp_path):
    values = [5, 5.0, -0.5, 1e3, 2**70, True, None, "x", {"a": [1]}, float("nan")]
    file = tmp_path / "t.jsonl"
    text = "".join(json.dumps({"text": value}) + "\n\r\n" for value in values)
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    expected = ["5", "5", "-0.5", "1000", str(2**70), "true", None, "x", '{"a": ["1"]}', "NaN"]
    assert read(file, others=())[0] == expected
    [source] = read_batches([file], ["text"], [])
    assert source.batch["text"].type == pa.large_binary()


@pytest.mark.parametrize("block", [32, 1 << 20])
def test_json_lists_beside_other_values(tmp_path, monkeypatch, block):
    monkeypatch.setattr(tables, "_BLOCK_BYTES", block)
    file = tmp_path / "t.jsonl"
    values = ["a", ["b"], ["c", "d"], None, [], 5, [5.0]]
    file.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    found, bad = [], []
    for source in read_batches([file], ["text"], []):
        texts, wrong = texts_of(source.batch["text"])
        found += texts.to_pylist()
        bad += wrong.tolist()
    assert found == ["a", "b", None, None, None, "5", "5"]
    assert np.flatnonzero(bad).tolist() == [2], "a list of several is no single value"


def test_json_columns_that_begin_late_or_are_left_out(tmp_path, small_blocks):
    file = tmp_path / "t.jsonl"
    rows = [{"text": "a"}] * 50 + [{"number": 3, "text": "b"}, {}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts, numbers = read(file)
    assert texts == ["a"] * 50 + ["b", None]
    np.testing.assert_array_equal(numbers, [np.nan] * 50 + [3, np.nan])


def test_several_members_of_a_compressed_file(tmp_path):
    one, two = b"text,number\na,1\n", b"b,2\n"
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(one) + gzip.compress(two))
    codec = pa.Codec("zstd")
    (tmp_path / "t.csv.zst").write_bytes(codec.compress(one, asbytes=True) + codec.compress(two, asbytes=True))
    assert read(tmp_path / "t.csv.gz") == read(tmp_path / "t.csv.zst") == (["a", "b"], [1, 2])


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".csv", ".tsv"])
def test_a_file_without_a_row(tmp_path, suffix):
    file = write(tmp_path, suffix=suffix)
    table = pa.Table.from_pylist(ROWS).slice(0, 0)
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, file)
    elif suffix == ".arrow":
        pyarrow.feather.write_feather(table, str(file))
    else:
        file.write_bytes(file.read_bytes().split(b"\n")[0] + b"\n")
    assert read(file) == ([], [])


def test_bad_utf8_is_a_matter_of_its_row(tmp_path):
    for suffix in TEXT_KINDS:
        file = write(tmp_path, suffix=suffix)
        file.write_bytes(file.read_bytes().replace("红".encode(), b"\xe8\xff"))
    for suffix in (".parquet", *ARROW_KINDS):
        file = write(tmp_path, suffix=suffix)
        raw = pa.array([row["text"].encode().replace("红".encode(), b"\xe8\xff") for row in ROWS])
        table = pa.table({"text": raw.cast(pa.string(), safe=False), "number": range(len(ROWS))})
        pyarrow.parquet.write_table(table, file) if suffix == ".parquet" else pyarrow.feather.write_feather(
            table, str(file)
        )
    for suffix in (*TEXT_KINDS, ".parquet", *ARROW_KINDS):
        texts, bad = [], []
        for source in read_batches([tmp_path / f"t{suffix}"], ["text"], ["number"]):
            values, wrong = texts_of(source.batch["text"])
            texts += values.to_pylist()
            bad += np.flatnonzero(wrong).tolist()
        assert bad == [8] and texts[8] is None, suffix
        assert texts[:8] == [row["text"] for row in ROWS[:8]] and texts[9] == " x ", suffix


def test_lone_surrogates_in_json(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "\\ud800"}\n{"text": "\\ud83d\\ude00"}\n{"text": "\\udc80"}\n')
    assert read(file, others=())[0] == [None, "😀", None]


# What is refused.


@pytest.mark.parametrize("suffix", FORMATS)
def test_missing_columns(tmp_path, suffix):
    file = write(tmp_path, suffix=suffix)
    with pytest.raises(CommandError) as caught:
        read(file, ["query", "text"], ["label"])
    expected = f"{file}: has no column query, label; its columns are text, number, unused; correct the schema"
    assert str(caught.value) == expected


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".csv", ".tsv"])
def test_a_column_that_stands_twice(tmp_path, suffix):
    table = pa.table([["a"], ["b"], ["c"]], names=["text", "number", "text"])
    file = tmp_path / f"t{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, file)
    elif suffix == ".arrow":
        pyarrow.feather.write_feather(table, str(file), compression="uncompressed")
    else:
        file.write_text("text,number,text\na,b,c\n".replace(",", "," if suffix == ".csv" else "\t"))
    with pytest.raises(CommandError, match=f"{file}: column text appears more than once; rename one of them"):
        read(file)
    assert read(file, ["number"], [])[0] == ["b"], "nobody asks for the other"


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_empty_file(tmp_path, suffix):
    file = write(tmp_path, suffix=suffix)
    file.write_bytes(b"")
    with pytest.raises(CommandError, match=f"{file}: is empty, expected a table with columns text, number"):
        read(file)


MANY = [{"text": f"text {i * 7919 % 10007}", "number": i} for i in range(20_000)]


@pytest.mark.parametrize("suffix", [s for s in FORMATS if s not in (".csv", ".tsv")])
def test_a_truncated_file(tmp_path, suffix):
    file = write(tmp_path, MANY, suffix)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2 + 1])
    kind = suffix.removesuffix("_stream").removesuffix(".gz").removesuffix(".zst")[1:]
    with pytest.raises(CommandError, match=f"{file}: cannot be read as {kind}: "):
        read(file)


@pytest.mark.parametrize("suffix", [".parquet", ".feather", ".csv.gz", ".jsonl.zst", ".jsonl"])
def test_a_file_that_is_corrupt_in_its_middle(tmp_path, suffix):
    file = write(tmp_path, MANY, suffix)
    if suffix == ".parquet":  # whose pages have checksums where the writer was asked for them
        pyarrow.parquet.write_table(pa.Table.from_pylist(MANY), file, write_page_checksum=True)
    data = bytearray(file.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 60] = bytes(60)
    file.write_bytes(data)
    with pytest.raises(CommandError, match=f"{file}: cannot be read as "):
        read(file)


def test_corrupt_arrow_offsets_are_found_before_they_are_used(tmp_path):
    file = tmp_path / "t.arrow"
    pyarrow.feather.write_feather(pa.table({"text": ["abcd"] * 1000}), str(file), compression="uncompressed")
    data = file.read_bytes()
    offset = np.int32(4 * 500).tobytes() + np.int32(4 * 501).tobytes()
    assert data.count(offset) == 1
    file.write_bytes(data.replace(offset, np.int32(2**30).tobytes() + np.int32(4 * 501).tobytes()))
    with pytest.raises(CommandError, match="cannot be read as arrow"):
        read(file, others=())


@pytest.mark.parametrize(
    ("suffix", "data", "fragment"),
    [
        (".csv", b"text,number\na,1\nb\n", "Expected 2 columns, got 1"),
        (".csv", b"text,number\na,1\nb,2,3\n", "Expected 2 columns, got 3"),
        (".csv", b'text,number\n"never closed,1\n' + b"x,1\n" * 20_000, "block"),
        (".tsv", b"text\tnumber\n\xff\n", "Expected 2 columns, got 1"),
        (".jsonl", b'{"text": "a", "number": 1}\n{"text": "b"', "line 2: "),
        (".jsonl", b'{"text": "a", "number": 1}\n\n[1]\n', "line 3 is not a JSON object"),
        (".json", b'[{"text": "a",\n "number": 1}]\n', "line 1: "),
        (".jsonl", b'{"text": "a", "number": 1}{"text": "b"}\n', "line 1: "),
        (".jsonl", b'{"text": "' + b"a" * 70_000 + b'", "number": 1}\n', "longer than"),
        (".jsonl", b'{"text": ' + b"[" * 30_000 + b"\n", "line 1: "),
        (".jsonl.gz", b"no gzip", "zlib inflate failed"),
    ],
)
def test_malformed_text(tmp_path, monkeypatch, suffix, data, fragment):
    monkeypatch.setattr(tables, "_BLOCK_BYTES", 1 << 15)
    file = tmp_path / f"t{suffix}"
    file.write_bytes(data)
    with pytest.raises(CommandError, match=f"{file}: cannot be read as ") as caught:
        read(file)
    assert fragment in str(caught.value) and "\n" not in str(caught.value)


def test_a_column_name_that_is_not_utf8(tmp_path):
    file = tmp_path / "t.csv"
    file.write_bytes(b"text,number,d\xe9j\xe0\na,1,2\n")
    with pytest.raises(CommandError, match="the name of a column is not UTF-8; convert the file to UTF-8"):
        read(file)


# Which files.


def test_find_files(tmp_path):
    for name in ("b.csv", "a.jsonl.zst", "c.tsv.gz", "_SUCCESS", "notes.txt", "x.parquet.gz", "d.arrow"):
        (tmp_path / name).touch()
    (tmp_path / "folder.csv").mkdir()

    def names(*patterns):
        return [path.name for path in find_files(patterns, tmp_path)]

    assert names(".") == ["a.jsonl.zst", "b.csv", "c.tsv.gz", "d.arrow"]
    assert names("c.*", "b.csv") == ["c.tsv.gz", "b.csv"]
    assert names("?.csv") == ["b.csv"]
    assert names("c.*", "b.csv", "?.csv", "c.tsv.gz") == ["c.tsv.gz", "b.csv"]
    for pattern in ("none.csv", "folder.csv", "*.xlsx"):
        with pytest.raises(UsageError, match=r"no such file; correct the path, --input, or `files`"):
            names(pattern)
    for pattern in ("notes.txt", "x.parquet.gz"):
        with pytest.raises(UsageError, match=r"unknown kind of file, expected \.parquet, \.csv, \.tsv, \.jsonl"):
            names(pattern)
    assert {".parquet", ".arrow", ".feather", ".ipc", ".jsonl", ".json", ".csv", ".tsv"} == set(SUFFIXES)


# Whole tables.


@pytest.mark.parametrize("suffix", FORMATS)
def test_table(tmp_path, suffix):
    table = Table(write(tmp_path, suffix=suffix), ["text"], ["number"])
    assert len(table) == len(ROWS)
    assert table.text("text").to_pylist() == [row["text"] for row in ROWS]
    assert table.ids("number").tolist() == table.numbers("number").tolist() == list(range(len(ROWS)))


def test_table_of_missing_values(tmp_path):
    for suffix in (".jsonl", ".parquet", ".csv"):
        table = Table(write(tmp_path, [{"a": None, "b": 1}, {"a": 2.5, "b": None}], suffix), ["a"], ["b"])
        assert table.numbers("a", missing=-1).tolist() == [-1, 2.5]
        assert table.text("a").to_pylist() == ["", "2.5"]
        with pytest.raises(CommandError, match="column b has 1 rows without an id"):
            table.ids("b")
        with pytest.raises(CommandError, match="column a has 1 rows without a finite number; mend it"):
            Table(table.path, [], ["a"], "mend it").numbers("a")


@pytest.mark.parametrize(
    ("value", "call", "fragment"),
    [
        ("A-1", lambda t: t.ids("v"), "has the id 'A-1', expected a whole number"),
        ("1.5", lambda t: t.ids("v"), "has the id '1.5', expected a whole number"),
        ("007", lambda t: t.ids("v"), "has the id '007', expected a whole number"),
        (str(2**63), lambda t: t.ids("v"), f"has the id '{2**63}', expected a whole number"),
        ("-2", lambda t: t.ids("v", -1), "has the id -2, expected -1 or more"),
        ("good", lambda t: t.numbers("v"), "has the value 'good', expected a number; correct the schema"),
        ("inf", lambda t: t.numbers("v"), "has the value 'inf', expected a number"),
        ("7", lambda t: t.numbers("v", 0, 5), "has the number 7, expected 0 to 5"),
        ("\udcff", lambda t: t.text("v"), "is not UTF-8 text: '�'; convert the file to UTF-8"),
    ],
)
def test_table_errors(tmp_path, value, call, fragment):
    file = tmp_path / "t.tsv"
    file.write_bytes(f"v\tw\n1\t1\n{value}\t1\n".encode(errors="surrogateescape"))
    with pytest.raises(CommandError) as caught:
        call(Table(file, ["v"], ["w"]))
    assert f"{file}: column v {fragment}" in str(caught.value)


# Memory.


def test_the_end_of_a_file_waits_until_arrow_holds_nothing_of_it():
    """A process that ends while a thread of Arrow drops something of Python's aborts."""
    source = tables._WholeLineEnds(pa.BufferReader(b"a,b\n1,2\n"))
    held = [source.read(100)]
    thread = threading.Thread(target=source.wait)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive() and bytes(held[0]) == b"a,b\n1,2\n"
    held.clear()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl.gz", ".arrow"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    """100 MB of text, most of it in a column that is read, in one row group."""
    file, rows = tmp_path / f"t{suffix}", 200_000
    text = pa.array([f"{i:07d}" * 70 for i in range(rows)])
    table = pa.table({"text": text, "number": range(rows)})
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, file, use_dictionary=False, compression="none", row_group_size=rows)
    elif suffix == ".arrow":
        with pa.ipc.new_file(str(file), table.schema) as writer:
            writer.write_table(table, 10_000)
    else:
        with gzip.open(file, "wt", compresslevel=1) if suffix.endswith("gz") else file.open("w") as out:
            out.write("" if suffix == ".jsonl.gz" else "text,number\n")
            for i, value in enumerate(text.to_pylist()):
                out.write(f'{{"text": "{value}", "number": {i}}}\n' if suffix == ".jsonl.gz" else f"{value},{i}\n")
    program = """
        import pathlib, re, sys
        from dpsr_tf.data import tables

        tables._BLOCK_BYTES = 1 << 18

        def anonymous():  # pages of a mapped file are not ours
            return int(re.search(r"RssAnon:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024

        before, most, rows = anonymous(), 0, 0
        for source in tables.read_batches([pathlib.Path(sys.argv[1])], ["text"], ["number"], 4096):
            rows += len(source.batch)
            most = max(most, anonymous() - before)
        print(rows, most)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(file)]
    found, most = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split()
    assert int(found) == rows
    assert float(most) < 80, "MB"


def test_ids_of_a_column_that_changes_its_kind(tmp_path, small_blocks):
    """Whole numbers at first, text later: no block decides for another."""
    for suffix in TEXT_KINDS:
        rows = [{"text": i, "number": 1} for i in range(60)] + [
            {"text": "A1", "number": 1},
            {"text": "007", "number": 1},
        ]
        file = write(tmp_path, rows, suffix)
        keys, wrong = [], []
        for source in read_batches([file], ["text"], []):
            keys += ids_of(source.batch["text"], True).keys.to_pylist()
            wrong += ids_of(source.batch["text"], False).wrong.tolist()
        assert keys == [str(row["text"]) for row in rows], suffix
        assert np.flatnonzero(wrong).tolist() == [60, 61], suffix
