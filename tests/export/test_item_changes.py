"""The log of item changes, `dpsr items`, and servables that apply the log."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Job, untrained_model
from conftest import dpsr as run

from dpsr_common.command_line import main
from dpsr_common.errors import CommandError, UsageError
from dpsr_common.serving_apis import Example
from dpsr_export.item_changes import DELETE, PUT, UPDATE, Changes, ItemChangeLog
from dpsr_export.item_rows import ItemWriter, ServableItems
from dpsr_serving.client import SearchClient
from dpsr_serving.model_server import start_model_server

sys.path.append(str(Path(__file__).resolve().parents[1] / "serving"))
from processes import PATIENCE_S, free_port

MONITORING = Path(__file__).resolve().parents[2] / "serving" / "deploy" / "prometheus" / "monitoring.config"
FIRST_KINDS = [PUT, UPDATE, DELETE]


def some(ids: list[int], kinds: list[int] | None = None) -> Changes:
    """Changes with the id in their example."""
    kinds = kinds or [PUT] * len(ids)
    return Changes(np.array(kinds, np.uint8), np.array(ids), [b"example %d" % i for i in ids], np.array(ids) * 2)


def read_ids(log: ItemChangeLog, offset: int | None = None) -> list[int]:
    return [i for _, changes in log.read(offset) for i in changes.ids.tolist()]


# The log.


def test_changes_come_back_as_they_were_written(tmp_path: Path) -> None:
    log = ItemChangeLog(tmp_path / "item_changes")
    before = time.time()
    assert log.append(some([5, 6, 7], FIRST_KINDS)) == (0, 3)
    texts = Changes(np.array([PUT], np.uint8), np.array([9]), [b"\x00\xff"], keys=["款-1"])
    assert log.append(texts) == (3, 4)
    (first, three), (second, one) = log.read()
    assert (first, second) == (0, 3)
    assert three.kinds.tolist() == FIRST_KINDS and three.ids.tolist() == [5, 6, 7] and three.keys is None
    assert three.examples == [b"example 5", b"example 6", b"example 7"]
    assert three.versions is not None and three.versions.tolist() == [10, 12, 14]
    assert three.times is not None and (before <= three.times).all() and (three.times <= time.time()).all()
    assert one.keys == ["款-1"] and one.examples == [b"\x00\xff"]
    assert read_ids(log, 2) == [7, 9] and read_ids(log, 4) == []
    status = log.status()
    assert (status.first, status.end, status.segments) == (0, 4, 2) and status.last_time is not None


def test_an_empty_log_begins_where_the_index_ends(tmp_path: Path) -> None:
    log = ItemChangeLog(tmp_path / "item_changes", 40)
    assert log.end() == 40 and log.status().end == 40 and read_ids(log) == []
    assert log.append(some([1])) == (40, 41)
    assert log.append(some([])) == (41, 41)


def test_other_files_do_not_hide_the_end(tmp_path: Path) -> None:
    log = ItemChangeLog(tmp_path / "item_changes")
    for number in range(12):
        log.append(some([number]))
    last = log.segments()[-1].path
    for name in ("notes.txt", "9-10.dpsr", f"{last.name}.old", last.name.replace("0", "9")):
        (log.path / name).write_text("not a segment")
    (log.path / f"{last.name}.tmp.1.0").write_text("of a writer that was killed")
    assert log.end() == 12 == log.status().end and log.status().segments == 12
    assert log.append(some([12])) == (12, 13) and read_ids(log) == list(range(13))
    assert not list(log.path.glob("*.tmp.*")) and (log.path / "notes.txt").exists()


def test_many_changes_are_split_into_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpsr_export.item_changes._SEGMENT_CHANGES", 4)
    log = ItemChangeLog(tmp_path / "item_changes")
    assert log.append(some(list(range(10)))) == (0, 10)
    assert [segment.end for segment in log.segments()] == [4, 8, 10] and read_ids(log) == list(range(10))


def test_trim_keeps_whole_segments_and_the_end(tmp_path: Path) -> None:
    log = ItemChangeLog(tmp_path / "item_changes")
    for ids in ([1, 2], [3], [4, 5, 6]):
        log.append(some(ids))
    assert log.trim(2) == 2 and read_ids(log) == [3, 4, 5, 6]
    assert log.trim(6) == 1 and read_ids(log) == [4, 5, 6]
    assert log.append(some([7])) == (6, 7)
    with pytest.raises(UsageError, match="ends at 7"):
        log.trim(8)
    with pytest.raises(CommandError, match="the changes 1 to 2 are missing"):
        read_ids(log, 1)


@pytest.mark.parametrize("place", [0, 70, 300, -1])
def test_a_damaged_segment_ends_what_can_be_read(tmp_path: Path, place: int) -> None:
    log = ItemChangeLog(tmp_path / "item_changes")
    for ids in ([1], [2], [3]):
        log.append(some(ids))
    damaged = log.segments()[1].path
    data = bytearray(damaged.read_bytes())
    data[place] ^= 1
    damaged.write_bytes(data)
    found: list[int] = []
    with pytest.raises(CommandError, match=damaged.name):
        found.extend(i for _, changes in log.read() for i in changes.ids.tolist())
    changes = log.read()
    assert next(changes)[1].ids.tolist() == [1]
    assert log.append(some([4])) == (3, 4)


def test_a_gap_and_another_log_are_named(tmp_path: Path) -> None:
    log = ItemChangeLog(tmp_path / "item_changes")
    for ids in ([1], [2], [3]):
        log.append(some(ids))
    log.segments()[1].path.unlink()
    with pytest.raises(CommandError, match="the changes 1 to 1 are missing"):
        read_ids(log)
    with pytest.raises(CommandError, match="another log"):
        read_ids(log, 4)


# Writes numbers as changes until it is killed, and prints what was acknowledged.
_WRITER = """
import sys
from pathlib import Path
import numpy as np
from dpsr_export.item_changes import Changes, ItemChangeLog
log, name = ItemChangeLog(Path(sys.argv[1])), int(sys.argv[2])
for number in range(int(sys.argv[3])):
    ids = np.arange(3) + name + 3 * number
    first, end = log.append(Changes(np.zeros(3, np.uint8), ids, [b"x" * 5000] * 3))
    print(first, end, ids[0], flush=True)
"""


def writer(log: ItemChangeLog, name: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _WRITER, str(log.path), str(name), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_writers_take_turns(tmp_path: Path) -> None:
    log = ItemChangeLog(tmp_path / "item_changes")
    both = [writer(log, name, 15) for name in (0, 1000)]
    lines = [line.split() for process in both for line in process.communicate()[0].splitlines()]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(int(first) for first, _, _ in lines) == list(range(0, 90, 3))
    at = {first: changes.ids.tolist() for first, changes in log.read()}
    for first, end, ident in lines:
        assert int(end) - int(first) == 3 and at[int(first)] == [int(ident), int(ident) + 1, int(ident) + 2]


def test_nothing_acknowledged_is_lost_when_writers_are_killed(tmp_path: Path) -> None:
    log = ItemChangeLog(tmp_path / "item_changes")
    acknowledged: list[int] = []
    for turn in range(4):
        process = writer(log, 1000 * turn, 10_000)
        assert process.stdout is not None
        for _ in range(turn + 1):
            acknowledged.append(int(process.stdout.readline().split()[2]))
        os.kill(process.pid, signal.SIGKILL)
        acknowledged += [int(line.split()[2]) for line in process.communicate()[0].splitlines() if line.count(" ") == 2]
    ids = read_ids(log)
    assert {i + n for i in acknowledged for n in range(3)} <= set(ids) and len(ids) == len(set(ids)) == log.end()
    # What a killed writer leaves behind does not disturb readers, and the next writer removes it.
    leftover = log.path / "00000000000000000000-00000000000000000009.dpsr.tmp.1.0"
    leftover.write_bytes(b"half")
    assert read_ids(log) == ids
    log.append(some([5]))
    assert not leftover.exists() and read_ids(log) == [*ids, 5]


# The op.


def test_the_op_reads_what_was_written(tmp_path: Path) -> None:
    import tensorflow as tf

    from dpsr_export.faiss_search import read_item_changes

    log = ItemChangeLog(tmp_path / "item_changes")
    log.append(some([5, 6, 7], FIRST_KINDS))
    log.append(Changes(np.array([PUT], np.uint8), np.array([9]), [b"e"], keys=["款-1"]))
    every = read_item_changes(str(log.path), 0, 100)
    assert every.kinds.numpy().tolist() == [*FIRST_KINDS, PUT] and every.item_ids.numpy().tolist() == [5, 6, 7, 9]
    assert every.versions.numpy().tolist() == [10, 12, 14, 0] and every.next_offset.numpy() == 4
    assert every.keys.numpy().tolist() == [b"", b"", b"", "款-1".encode()]
    assert every.examples.numpy().tolist() == [b"example 5", b"example 6", b"example 7", b"e"]
    times = [time for _, changes in log.read() for time in changes.times.tolist()]  # type: ignore[union-attr]
    assert every.times.numpy().tolist() == times
    some_of_them = read_item_changes(str(log.path), 1, 1)
    assert some_of_them.item_ids.numpy().tolist() == [6] and some_of_them.next_offset.numpy() == 2
    for path, up in ((log.path, 0), (tmp_path / "3" / "assets" / "item_ids.dpsr", 3)):
        assert len(read_item_changes(str(path), 0, 100, up).kinds) == 4
        end = read_item_changes(str(path), 4, 100, up)
        assert len(end.kinds) == 0 and end.next_offset.numpy() == 4
    # A servable that is not a version has no log.
    assert len(read_item_changes(str(tmp_path / "copy" / "assets" / "item_ids.dpsr"), 0, 100, 3).kinds) == 0
    with pytest.raises(tf.errors.DataLossError, match="ends at the change 4"):
        read_item_changes(str(log.path), 5, 100)
    quiet = read_item_changes(str(log.path), 5, 100, log_errors=True)
    assert len(quiet.kinds) == 0 and quiet.next_offset.numpy() == 5
    for offset, most in ((-1, 10), (0, 0)):
        with pytest.raises(tf.errors.InvalidArgumentError, match="expected an offset of 0 or more and at least 1"):
            read_item_changes(str(log.path), offset, most)


def test_the_op_knows_its_shapes(tmp_path: Path) -> None:
    import tensorflow as tf

    from dpsr_export.faiss_search import read_item_changes

    with tf.Graph().as_default():
        made = read_item_changes("x", 0, tf.compat.v1.placeholder(tf.int32, []))
        assert [output.shape.as_list() for output in made] == [[None]] * 6 + [[]]
        for inputs in ((["x"], 0, 1), ("x", [0], 1), ("x", 0, [1])):
            with pytest.raises(ValueError, match="must be rank 0"):
                read_item_changes(*inputs)
    vector = tf.zeros([1], tf.int64)
    with pytest.raises(tf.errors.InvalidArgumentError, match="offset has shape"):
        read_item_changes("x", vector, 1)


# Rows of tables.


def base_of(tmp_path: Path, string_ids: bool = True, **other: Any) -> Path:
    """A base path with the manifest of a servable, and nothing else."""
    schema = {
        "files": ["items.jsonl"],
        "id": "item",
        "text": ["title", "brand"],
        "popularity": "sales",
        "features": [
            "brand",
            {"column": "price", "kind": "number", "boundaries": [1, 2]},
            {"column": "tags", "kind": "multi", "separator": "|"},
            {"column": "photo", "kind": "vector", "length": 2, "separator": " "},
            {"column": "details", "kind": "text"},
        ],
        "filters": [
            "brand",
            {"column": "price", "kind": "number"},
            {"column": "tags", "kind": "multi", "separator": "|"},
        ],
        "searched": ["bullets"],
        "group": "family",
    }
    manifest = {
        "format": "dpsr-servable",
        "version": 2,
        "inputs": {"apply_changes": []},
        "index": {"items_schema": schema, "string_ids": string_ids} | other,
    }
    extra = tmp_path / "base" / "3" / "assets.extra"
    extra.mkdir(parents=True)
    (extra / "dpsr_manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "base"


def dpsr(*arguments: object) -> int:
    return main([str(argument) for argument in ("items", *arguments)])


def features_of(example: bytes) -> dict[str, Any]:
    read = Example.FromString(example).features.feature
    lists = {name: (value.bytes_list.value, value.float_list.value) for name, value in read.items()}
    return {name: list(texts) + list(numbers) for name, (texts, numbers) in lists.items()}


def only_changes(base: Path) -> Changes:
    ((_, changes),) = ItemChangeLog(base / "item_changes").read()
    return changes


COLUMNS = ("item", "title", "brand", "price", "tags", "photo", "details")
ROWS = [("sku-1", "red shoes", "Acme", "9.1", "new|sale", "1 2.5", "soft"), ("sku-2", "手机", "", "", "", "", "")]


def write_table(path: Path, rows: list[tuple[str, ...]], columns: tuple[str, ...] = COLUMNS) -> Path:
    """A table of texts, in the format that the name says."""
    if path.suffix == ".jsonl":
        records = (dict(zip(columns, row, strict=True)) for row in rows)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        table = pa.table({name: [row[i] for row in rows] for i, name in enumerate(columns)})
        pyarrow.parquet.write_table(table, path)
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        path.write_text("".join(separator.join(row) + "\n" for row in (columns, *rows)))
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet"])
def test_add_writes_the_inputs_of_the_item_tower_and_the_attributes(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_of(tmp_path)
    assert dpsr("add", f"--servable={base}", write_table(tmp_path / name, ROWS)) == 0
    assert "2 changes, offsets 0 to 1" in capsys.readouterr().out
    changes = only_changes(base)
    assert changes.kinds.tolist() == [PUT, PUT] and changes.keys == ["sku-1", "sku-2"]
    first, second = map(features_of, changes.examples)
    assert first == {
        "item_text": [b"red shoes Acme"],
        "title": [b"red shoes"],
        "item_brand": [b"Acme"],
        "item_price": [pytest.approx(9.1)],
        "item_tags": [b"new", b"sale"],
        "item_photo": [1.0, 2.5],
        "item_details": [b"soft"],
        "attribute.brand": [b"Acme"],
        # A float32 does not hold it exactly.
        "attribute.price": [b"9.1"],
        "attribute.tags": [b"new", b"sale"],
    }
    assert second == {"item_text": ["手机 ".encode()], "title": ["手机".encode()], "item_details": [b""]}


def test_update_changes_the_columns_of_the_table(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    table = write_table(tmp_path / "a.csv", [("sku-1", "8", ""), ("sku-2", "", "x|y")], ("item", "price", "tags"))
    assert dpsr("update", f"--servable={base}", table) == 0
    changes = only_changes(base)
    assert changes.kinds.tolist() == [UPDATE, UPDATE]
    assert [features_of(example) for example in changes.examples] == [
        {"attribute.price": [8.0], "attribute.tags": []},
        {"attribute.price": [], "attribute.tags": [b"x", b"y"]},
    ]


def test_rows_of_json_lines_change_what_they_name(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    rows = [{"item": "a", "price": 1}, {"item": "b", "brand": None}, {"price": 2, "item": "c"}, {"item": "d"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert dpsr("update", f"--servable={base}", tmp_path / "a.jsonl") == 0
    changes = only_changes(base)
    assert changes.keys == ["a", "b", "c", "d"]
    assert [features_of(example) for example in changes.examples] == [
        {"attribute.price": [1.0]},
        {"attribute.brand": []},
        {"attribute.price": [2.0]},
        {},
    ]


def test_an_update_of_anything_but_filters_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_of(tmp_path)
    table = write_table(tmp_path / "a.csv", [("sku-1", "new title")], ("item", "title"))
    assert dpsr("update", f"--servable={base}", table) == 2
    assert "has the column 'title', but an update only changes attributes" in capsys.readouterr().err
    assert dpsr("update", f"--servable={base}", write_table(tmp_path / "b.csv", [("1",)], ("price",))) == 2
    assert "has no column item" in capsys.readouterr().err
    assert not (base / "item_changes").exists()


def test_delete_takes_ids_and_tables(tmp_path: Path) -> None:
    base = base_of(tmp_path, string_ids=False)
    assert dpsr("delete", f"--servable={base}", "--ids=4,5") == 0
    assert dpsr("delete", f"--servable={base}", write_table(tmp_path / "a.tsv", [("6", "x")], ("item", "why"))) == 0
    log = ItemChangeLog(base / "item_changes")
    assert read_ids(log) == [4, 5, 6] and log.end() == 3
    assert all(changes.kinds.tolist() == [DELETE] * len(changes) and changes.keys is None for _, changes in log.read())


def test_versions_come_from_their_column(tmp_path: Path) -> None:
    base = base_of(tmp_path, string_ids=False)
    table = write_table(tmp_path / "a.csv", [("4", "17"), ("5", "")], ("item", "revision"))
    assert dpsr("delete", f"--servable={base}", "--version_column=revision", table) == 0
    versions = only_changes(base).versions
    assert versions is not None and versions.tolist() == [17, 0]
    rows = [("4", "1"), ("5", "-2"), ("6", "x")]
    table = write_table(tmp_path / "b.csv", rows, ("item", "revision"))
    assert dpsr("delete", f"--servable={base}", "--version_column=revision", "--skip_bad", table) == 0
    assert read_ids(ItemChangeLog(base / "item_changes")) == [4, 5, 4]


def test_nothing_is_written_if_a_row_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_of(tmp_path)
    bad = [ROWS[0], ("", *ROWS[1][1:]), ("sku-3", "t", "b", "cheap", "", "", ""), ("sku-4", "t", "b", "", "", "1", "")]
    table = write_table(tmp_path / "a.csv", bad)
    assert dpsr("add", f"--servable={base}", table) == 1
    error = capsys.readouterr().err
    assert f"3 rows cannot be used: {table} row 2: item id is missing" in error
    assert "row 3: feature price is not a number: 'cheap'" in error
    assert "row 4: feature photo is not a vector of 2 finite numbers: '1'" in error and "nothing was written" in error
    assert not (base / "item_changes").exists()
    assert dpsr("add", f"--servable={base}", "--skip_bad", table) == 0
    assert "1 changes, offsets 0 to 0; left out 3 rows" in capsys.readouterr().out
    assert only_changes(base).keys == ["sku-1"]


def test_servables_that_take_no_changes_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dpsr("status", f"--servable={tmp_path}") == 1
    assert "holds no servable" in capsys.readouterr().err
    base = base_of(tmp_path)
    path = base / "3" / "assets.extra" / "dpsr_manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"index": {"string_ids": True}}))
    assert dpsr("status", f"--servable={base}") == 1
    assert "did not know changes of items; run `dpsr index`" in capsys.readouterr().err
    path.write_text(json.dumps(manifest | {"kind": "ranker"}))
    assert dpsr("status", f"--servable={base}") == 1
    assert "is a ranker servable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ([], "the action is missing"),
        (["remove"], "no action 'remove'"),
        (["add", "x.csv"], "--servable is missing"),
        (["add", "--servable=x"], "the table is missing"),
        (["add", "--servable=x", "--ids=3"], "--ids=3: is for `dpsr items delete`"),
        (["trim", "--servable=x"], "--before is missing"),
        (["status", "--servable=x", "y"], "unexpected argument 'y'"),
        (["follow", "--model=x"], "--server is missing"),
    ],
)
def test_wrong_usage(arguments: list[str], fragment: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dpsr(*arguments) == 2
    assert fragment in capsys.readouterr().err


def test_the_log_is_not_trimmed_beyond_the_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_of(tmp_path, string_ids=False, changes_offset=2)
    for ids in ("1,2", "3", "4"):
        assert dpsr("delete", f"--servable={base}", f"--ids={ids}") == 0
    capsys.readouterr()
    assert dpsr("status", f"--servable={base}") == 0
    shown = capsys.readouterr().out
    # An empty log begins where the index ends.
    assert "offsets 2 to 5, 4 in all" in shown and "to apply         4" in shown
    assert dpsr("trim", f"--servable={base}", "--before=3") == 2
    assert "has only the changes before 2" in capsys.readouterr().err
    # An older version may be served again.
    older = base / "1" / "assets.extra" / "dpsr_manifest.json"
    shutil.copytree(base / "3", base / "1")
    manifest = json.loads(older.read_text())
    manifest["index"]["changes_offset"] = 1
    older.write_text(json.dumps(manifest))
    assert dpsr("trim", f"--servable={base}", "--before=2") == 2
    assert f"{base / '1'} needs the changes from 1 on; remove this version" in capsys.readouterr().err
    shutil.rmtree(base / "1")
    assert dpsr("trim", f"--servable={base}", "--before=2") == 0


def test_the_command_does_not_import_tensorflow(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    code = (
        "import sys; from dpsr_common.command_line import main; status = main(sys.argv[1:]);"
        "sys.exit(status or 'tensorflow' in sys.modules or 'grpc' in sys.modules)"
    )
    table = write_table(tmp_path / "a.csv", ROWS)
    subprocess.run([sys.executable, "-c", code, "items", "add", f"--servable={base}", table], check=True)


def test_files_of_a_watched_directory_are_taken_once(tmp_path: Path) -> None:
    base, watched = base_of(tmp_path), tmp_path / "watched"
    watched.mkdir()
    command = [sys.executable, "-m", "dpsr_common", "items", "watch", f"--servable={base}", f"--dir={watched}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == f"watching {watched}\n"
    try:
        for name, rows, columns in (
            ("add-1.csv", ROWS, COLUMNS),
            ("update-1.csv", [("sku-1", "3")], ("item", "price")),
            ("delete-1.csv", [("sku-2",)], ("item",)),
        ):
            os.rename(write_table(tmp_path / name, rows, columns), watched / name)
            assert "changes, offsets" in process.stdout.readline()
        for name in ("update-2.csv", "other.csv"):
            os.rename(write_table(tmp_path / name, [("x", "y")], ("item", "weight")), watched / name)
        while len(list((watched / "failed").iterdir())) < 4:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGTERM)
        output = process.communicate()
    assert process.returncode == 0, output
    assert sorted(path.name for path in (watched / "done").iterdir()) == ["add-1.csv", "delete-1.csv", "update-1.csv"]
    assert "has the column 'weight'" in (watched / "failed" / "update-2.csv.error").read_text()
    assert "expected a name that begins with" in (watched / "failed" / "other.csv.error").read_text()
    kinds = [kind for _, changes in ItemChangeLog(base / "item_changes").read() for kind in changes.kinds.tolist()]
    assert kinds == [PUT, PUT, UPDATE, DELETE]


def test_a_writer_that_runs_on_joins_the_changes_of_its_callers(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    with ItemWriter(base, wait_s=0.5) as writer:
        futures = [writer.add([{"item": f"sku-{i}", "title": "red", "brand": "", "price": i}]) for i in range(5)]
        futures.append(writer.update([{"item": "sku-1", "price": 2.5}, {"item": "sku-2", "price": None}]))
        futures.append(writer.delete(["sku-3"], version=7))
        bad = writer.delete([""]), writer.add([{"item": "sku-9", "title": "red", "colour": "red"}])
        with pytest.raises(CommandError, match="row 1: item id is missing"):
            bad[0].result()
        with pytest.raises(UsageError, match="column 'colour'"):
            bad[1].result()
        assert [future.result() for future in futures] == [*((i, i + 1) for i in range(5)), (5, 7), (7, 8)]
    log = ItemChangeLog(base / "item_changes")
    assert len(log.segments()) < 4 and log.end() == 8
    with pytest.raises(CommandError, match="is closed"):
        writer.delete(["sku-1"])
    assert ServableItems(base).log.end() == 8


# Servables.


@pytest.fixture(scope="module")
def shop(text_shop: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The base path of a copy of a servable with text ids and features of every kind, version 1."""
    base = tmp_path_factory.mktemp("fresh") / "base"
    shutil.copytree(text_shop.job.servable / "1", base / "1")
    yield base


def loaded(version: Path) -> Any:
    from dpsr_export.warmup import LoadedServable

    return LoadedServable(version)


def found(servable: Any, query: str, **inputs: Any) -> list[str]:
    """The keys that a search finds."""
    keys = servable("search", servable.search_inputs([{"query": query}], 60) | inputs)["item_keys"][0]
    return [key.decode() for key in keys if key]


NEW = {
    "item": "new-款",
    "title": "red leather shoes",
    "brand": "Acme",
    "details": "soft cable",
    "tags": ["new", "eco"],
    "photo": [1, 2, 3, 4, 5.5],
    "price": 33.3,
}


def inputs_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of the signature `item_embedding`."""
    named = {f"item_{name}": [row[name]] for name in ("brand", "details", "tags", "photo", "price")}
    return {"item_text": [row["title"]]} | named


@pytest.mark.slow
def test_a_servable_applies_the_log(shop: Path, text_shop: Any) -> None:
    servable = loaded(shop / "1")
    state = servable("apply_changes", {})
    assert state["changes"] == 0 and state["offset"] == 0 and state["items"] == 50
    everything = found(servable, "red shoes")
    assert len(everything) == 50
    gone, changed = everything[:2]
    with ItemWriter(shop) as writer:
        writer.add([NEW])
        writer.update([{"item": changed, "price": 12_345.678, "tags": ["rare"]}])
        writer.delete([gone]).result()
    state = servable("apply_changes", {"max_changes": np.int32(2)})
    assert state["changes"] == 2 and state["offset"] == 2 and state["items"] == 51 and state["updated"] == 1
    state = servable("apply_changes", {})
    assert state["changes"] == 1 and state["offset"] == 3 and state["items"] == 50 and state["hidden"] >= 1
    assert servable("apply_changes", {})["changes"] == 0

    keys = found(servable, "red shoes")
    assert set(keys) == {*everything, NEW["item"]} - {gone}
    # The new item has the vector that the item tower gives it, from all its features.
    embedded = servable("query_embedding", {"query": ["red shoes"]})["query_embedding"][0]
    item = servable("item_embedding", inputs_of(NEW))["item_embedding"][0]
    outputs = servable("search", servable.search_inputs([{"query": "red shoes"}], 60))
    place = list(outputs["item_keys"][0]).index(NEW["item"].encode())
    np.testing.assert_allclose(outputs["scores"][0][place], (embedded @ item).max(), rtol=1e-5)
    # Filters see new attributes, of new items and of old ones.
    assert found(servable, "red shoes", include=[["price=12345.678"]]) == [changed]
    assert found(servable, "red shoes", include=[["tags=rare"]]) == [changed]
    assert NEW["item"] in found(servable, "red shoes", include=[["tags=eco", "price=..40"]])
    assert NEW["item"] not in found(servable, "red shoes", excluded_item_keys=[[NEW["item"]]])
    servable.close()


@pytest.fixture(scope="module")
def other(shop: Path, text_shop: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Version 2 of the shop, of a model with other layers and only two of the features, beside a log with NEW."""
    root = tmp_path_factory.mktemp("other")
    job = Job(text_shop.job.store, root / "model", root / "index", root / "base")
    job.servable.mkdir()
    ItemChangeLog(job.servable / "item_changes").append(ServableItems(shop).put_rows([NEW])[0])
    untrained_model(job, hidden=(), num_heads=1, item_features=("brand", "photo"))
    run("index", f"--model={job.model}", f"--store={job.store}", f"--out={job.index}")
    # The log is not applied while the servable is measured, or NEW would be an item that is not in its index.
    run("export", f"--model={job.model}", f"--index={job.index}", f"--out={job.servable}", "--version_number=2")
    return job


@pytest.mark.slow
def test_another_model_embeds_the_changes_of_the_log_anew(other: Any) -> None:
    servable = loaded(other.servable / "2")
    assert servable("apply_changes", {})["offset"] == 1
    embedded = servable("query_embedding", {"query": ["red shoes"]})["query_embedding"][0]
    wanted = {name: value for name, value in inputs_of(NEW).items() if name in servable.inputs["item_embedding"]}
    assert set(wanted) == {"item_text", "item_brand", "item_photo"}
    item = servable("item_embedding", wanted)["item_embedding"][0]
    outputs = servable("search", servable.search_inputs([{"query": "red shoes"}], 60))
    place = list(outputs["item_keys"][0]).index(NEW["item"].encode())
    np.testing.assert_allclose(outputs["scores"][0][place], (embedded @ item).max(), rtol=1e-5)
    servable.close()


@pytest.mark.slow
def test_shards_share_a_log(other: Any, text_shop: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    run("export", f"--model={other.model}", f"--index={other.index}", f"--out={base}", "--shards=2")
    with pytest.raises(CommandError, match=f"all shards share a log; give {base}"):
        ServableItems(base / "shard-0-of-2")
    rows = [NEW | {"item": f"new-{i}"} for i in range(20)]
    with ItemWriter(base) as writer:
        writer.add(rows)
        writer.delete(["sku-1", "sku-2", "sku-3", "sku-4"]).result()
    keys = []
    for number in range(2):
        servable = loaded(base / f"shard-{number}-of-2" / "1")
        keys.append(found(servable, "red shoes"))
        servable.close()
    # Each new item is in one of the shards, and both have some.
    assert all(any(key.startswith("new-") for key in of_shard) for of_shard in keys)
    left = set(text_shop.items) - {"sku-1", "sku-2", "sku-3", "sku-4"}
    assert sorted(keys[0] + keys[1]) == sorted(left | {row["item"] for row in rows})


@pytest.mark.slow
def test_a_damaged_segment_stops_the_replay_and_not_the_servable(shop: Path, tmp_path: Path) -> None:
    import tensorflow as tf

    base = tmp_path / "base"
    shutil.copytree(shop / "1", base / "1")
    log = ServableItems(base).log
    for key in ("a", "b"):
        log.append(ServableItems(base).put_rows([NEW | {"item": key}])[0])
    damaged = log.segments()[1].path
    data = bytearray(damaged.read_bytes())
    data[-70] ^= 1
    damaged.write_bytes(data)
    servable = loaded(base / "1")
    keys = found(servable, "red shoes")
    assert "a" in keys and "b" not in keys
    with pytest.raises(tf.errors.DataLossError, match=damaged.name):
        servable("apply_changes", {})
    assert found(servable, "red shoes") == keys
    data[-70] ^= 1
    damaged.write_bytes(data)
    assert servable("apply_changes", {})["changes"] == 1
    assert "b" in found(servable, "red shoes")
    servable.close()


# The model server.


def eventually(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"did not happen: {what}"
        time.sleep(0.02)


class Served:
    """A model server of a base path, and a client of it."""

    def __init__(self, base: Path):
        self.port = free_port()
        flags = [f"--rest_api_port={self.port}", f"--monitoring_config_file={MONITORING}"]
        self.server = start_model_server(base, "shop", arguments=flags)
        self.client = SearchClient(self.server.target, "shop")

    def found(self, **inputs: Any) -> list[str]:
        (result,) = self.client.search("red shoes", 60, **inputs)
        return list(result.item_keys)

    def version(self) -> int:
        (result,) = self.client.search("red shoes", 1)
        return result.version

    def metrics(self) -> dict[str, float]:
        """Values by name, of the metrics of item changes; each has a version in its labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            lines = [line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line.startswith(":dpsr")]
        return {name.removeprefix(":dpsr:serving:"): float(value) for name, value in lines}

    def close(self) -> None:
        self.client.close()
        self.server.stop()


@pytest.mark.slow
def test_a_server_shows_changes_keeps_them_and_replays_them_through_new_models(
    shop: Path, other: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(shop / "1", base / "1")
    of_version = '{model_name="shop",version="%d"}'
    served = Served(base)
    try:
        everything = served.found()
        gone, changed = everything[:2]
        with ItemWriter(base) as writer:
            writer.add([NEW]).result()
            eventually(lambda: NEW["item"] in served.found(), "the new item is found")
            writer.update([{"item": changed, "price": 77_777}]).result()
            eventually(lambda: served.found(filters={"price": (70_000, None)}) == [changed], "the new price is seen")
            writer.delete([gone]).result()
            eventually(lambda: gone not in served.found(), "the item is gone")
        name = of_version % 1
        eventually(lambda: served.metrics()[f"item_changes_offset{name}"] == 3, "the metrics show the offset")
        eventually(lambda: served.metrics()[f"item_changes_lag_seconds{name}"] == 0, "nothing is to be applied")
        metrics = served.metrics()
        assert metrics[f"item_changes_applied{name}"] == 3 and metrics[f"item_changes_errors{name}"] == 0
        assert metrics[f"items_visible{name}"] == 50 and metrics[f"items_open{name}"] == 1
        assert metrics[f"items_hidden_share{name}"] == pytest.approx(1 / 51)
        expected = {*everything, NEW["item"]} - {gone}
        assert set(served.found()) == expected
        # The server calls the signature itself. For one that does not, `dpsr items follow` does.
        assert dpsr("follow", f"--server={served.server.target}", "--model=shop", "--once") == 0
        assert dpsr("follow", f"--server={served.server.target}", "--model=nope", "--once") == 1
        assert "NOT_FOUND" in capsys.readouterr().err

        # Another model: it replays the log with its own item tower before it is ready, and the first one goes.
        shutil.copytree(other.servable / "2", tmp_path / "2")
        os.rename(tmp_path / "2", base / "2")
        eventually(lambda: served.version() == 2, "the new version is served")
        assert set(served.found()) == expected and served.found(filters={"price": (70_000, None)}) == [changed]
        eventually(lambda: f"items_visible{name}" not in served.metrics(), "the old version's metrics are gone")

        # A damaged segment: the server goes on with what it has, and says so, until the segment is whole.
        errors = f"item_changes_errors{of_version % 2}"
        bad = base / "item_changes" / f"{3:020}-{4:020}.dpsr"
        (tmp_path / "bad").write_bytes(b"no packed file" * 10)
        os.rename(tmp_path / "bad", bad)
        eventually(lambda: served.metrics().get(errors, 0) > 0, "the damage is counted")
        assert served.server.output().count("cannot apply changes of items") == 1 and bad.name in served.server.output()
        assert set(served.found()) == expected
        bad.unlink()
        with ItemWriter(base) as writer:
            writer.delete([NEW["item"]]).result()
        eventually(lambda: NEW["item"] not in served.found(), "the item is gone")
        expected.remove(NEW["item"])
        assert "applies changes of items again" in served.server.output()
        served.server.process.kill()
    finally:
        served.close()
    served = Served(base)
    try:
        assert set(served.found()) == expected
    finally:
        served.close()
