from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import Shop

from dpsr_common import command_line
from dpsr_common.errors import CommandError
from dpsr_common.object_store import RemoteFolder, upload
from dpsr_common.packed_file import PackedFile, PackedFileWriter
from dpsr_tf.data.examples_dataset import BatchOptions, examples_dataset
from dpsr_tf.data.store import (
    FORMAT,
    Store,
    interactions_names,
    manifest_checksum,
    new_directory,
    pack_strings,
    unpack_strings,
)
from dpsr_tf.training.cluster import Cluster
from dpsr_tf.training.train import config_from_flags, open_store


def read_all(path):
    """Opens a store and reads everything that Python reads."""
    store = Store(path)
    for file in (store.items(), store.users(), store.packed_texts(), *store.interactions(), store.held_out() or {}):
        for name in file:
            file[name].sum()
    assert len(list(store.queries())) == store.counts.queries
    return store.titles()


def edit_manifest(store, **changes):
    """Changes keys of the manifest, or removes them (None), with a checksum that is right."""
    path = store.path / "manifest.json"
    manifest = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not None}
    path.write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))


def with_every_kind(shop):
    """The shop, with what makes every kind of file."""
    for i, row in enumerate(shop.log):
        row["time"] = 100 * (i + 1)
    shop.schema["interactions"] |= {"time": "time", "held_out": {"after": "400"}}
    shop.schema["vocabularies"] = {"words": {"tokenizer": {"letter_trigrams": False}}}
    shop.schema["items"]["features"] = [{"column": "brand", "kind": "text", "vocabulary": "words"}, "color"]
    return shop


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The path of a store with every kind of file; it must not be changed."""
    folder = tmp_path_factory.mktemp("made")
    shop = with_every_kind(Shop(folder / "shop"))
    assert command_line.main([*shop.write().flags(folder / "store"), "--shards=2"]) == 0
    return folder / "store"


@pytest.fixture
def store(made, shop, tmp_path):
    """A copy of `made`, which a test may damage; `shop` has become the shop that it was made of."""
    with_every_kind(shop)
    return Store(shutil.copytree(made, tmp_path / "store"))


def test_a_whole_store_opens(store):
    assert len(read_all(store.path)) == 7
    assert Store(str(store.path)).counts == store.counts
    assert sorted(store.manifest["files"]) == sorted(FILES)
    assert store.held_out()["item"].tolist() and len(store.interactions()) == 2
    assert list(store.vocabularies) == ["words"] and not store.vocabularies["words"].config.letter_trigrams
    text, color = store.features.items
    assert (text.kind, text.vocabulary, text.num_values) == ("text", "words", None)
    assert (color.name, color.kind, color.num_values) == ("color", "categorical", 2 + 1), "red, blue, null as a text"
    assert store.schema.interactions.held_out.after == "400"


def test_text_ids(shop, tmp_path, dpsr):
    for row in [*shop.items, *shop.log]:
        row["item_id"] = f"sku-{row['item_id']}"
    dpsr(*shop.write().flags(tmp_path / "text")).succeeds()
    store = Store(tmp_path / "text")
    assert sorted(store.item_keys()) == sorted(row["item_id"] for row in shop.items)
    titles = dict(zip(store.item_keys(), store.titles(), strict=True))
    assert titles == {row["item_id"]: row["title"] for row in shop.items}
    assert (np.diff(store.items()["id"]) > 0).all() and store.items()["id"][0] >= 0


def test_it_may_be_moved(store, tmp_path):
    shutil.move(store.path, tmp_path / "elsewhere")
    assert len(read_all(tmp_path / "elsewhere")) == 7


def test_no_store(tmp_path):
    with pytest.raises(CommandError, match=r"none: holds no store \(no manifest\.json\); make one with `dpsr ingest`"):
        Store(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match="file"):
        Store(tmp_path / "file")


CHIEF, WORKER, PS = Cluster("chief", 0, 2, 1), Cluster("worker", 0, 2, 1), Cluster("ps", 0, 2, 1)


def test_a_task_copies_what_it_opens_of_a_store_in_an_object_store(store, s3_url, tmp_path, monkeypatch):
    monkeypatch.setenv("DPSR_CACHE", str(tmp_path / "cache"))
    (store.path / "log").mkdir()
    (store.path / "log" / "part-00001.parquet").write_bytes(b"raw")
    upload(store.path, s3_url)
    everything = {"manifest.json", *store.manifest["files"]}
    first, second = interactions_names(2)

    def copied(cluster, *assignments):
        opened = open_store(s3_url, config_from_flags(None, list(assignments)), cluster)
        return {path.name for path in opened.path.iterdir()}

    assert copied(CHIEF) == everything - {second, "held_out.dpsr"}
    assert copied(WORKER) == everything - {first, "held_out.dpsr"}
    assert copied(PS) == everything - {first, second, "held_out.dpsr"}
    # With fewer files than workers, each worker reads a part of all of them.
    assert copied(Cluster("worker", 1, 3, 1)) == everything - {"held_out.dpsr"}
    for assignments in (
        ["model.query_history_length=3"],
        ["model.graph_fan_out=[5]"],
        ["train.loss=softmax", "train.log_q_correction=true"],
    ):
        assert copied(WORKER, *assignments) == everything - {"held_out.dpsr"}, assignments
    for cluster in (Cluster(), Cluster("evaluator", 0, 2, 1)):
        assert copied(cluster) == everything | {"log"}
    assert open_store(str(store.path), config_from_flags(None, []), WORKER).path == store.path


def test_a_worker_reads_the_same_from_its_part_of_a_store(store, s3_url, tmp_path, monkeypatch):
    monkeypatch.setenv("DPSR_CACHE", str(tmp_path / "cache"))
    upload(store.path, s3_url)
    sizes = []
    for cluster in (CHIEF, WORKER):
        found = [
            list(
                examples_dataset(
                    opened, BatchOptions(4), num_epochs=8, shard_index=cluster.worker_index, num_shards=2
                ).as_numpy_iterator()
            )
            for opened in (store, open_store(s3_url, config_from_flags(None, []), cluster))
        ]
        sizes.append(len(found[0]))
        assert len(found[0]) == len(found[1])
        for one, other in zip(*found, strict=True):
            np.testing.assert_array_equal(one.query_rows, other.query_rows)
            np.testing.assert_array_equal(one.query.values, other.query.values)
            np.testing.assert_array_equal(one.item_rows, other.item_rows)
    assert any(sizes)


def test_a_file_that_changed_in_an_object_store_stops_the_task_that_needs_it(store, s3_url, tmp_path, monkeypatch):
    monkeypatch.setenv("DPSR_CACHE", str(tmp_path / "cache"))
    upload(store.path, s3_url)
    first, second = interactions_names(2)
    RemoteFolder(s3_url).write(second, (store.path / first).read_bytes())
    config = config_from_flags(None, [])
    assert open_store(s3_url, config, CHIEF).counts == store.counts
    with pytest.raises(CommandError, match=f"{second}: is not the file that dpsr_complete.json lists"):
        open_store(s3_url, config, WORKER)


def test_a_task_copies_all_queries_of_a_store_that_does_not_count_them(store, s3_url, tmp_path, monkeypatch):
    monkeypatch.setenv("DPSR_CACHE", str(tmp_path / "cache"))
    edit_manifest(store, shard_queries=None)
    upload(store.path, s3_url)
    opened = open_store(s3_url, config_from_flags(None, []), WORKER)
    assert {path.name for path in opened.path.iterdir()} >= set(interactions_names(2))
    assert len(opened.interactions()) == 2


FILES = ["vocabulary.dpsr", "vocabulary-words.dpsr", "users.dpsr", "items.dpsr", "held_out.dpsr", "titles.dpsr"]
FILES += [f"interactions-0000{shard}-of-00002.dpsr" for shard in range(2)]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped", "longer", "directory", "text"])
def test_damaged_files_are_named(store, name, damage):
    path = store.path / name
    data = path.read_bytes()
    path.unlink()
    middle = len(data) // 2
    damaged = {
        "empty": b"",
        "truncated": data[:-1],
        "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "longer": data + b"\0",
        "text": b"item_id\ttitle\n" * 100,
    }
    if damage == "directory":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(damaged[damage])
    with pytest.raises(CommandError) as caught:
        read_all(store.path)
    assert str(path) in str(caught.value) and "ingest the log again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_section_is_verified_when_it_is_first_read(store):
    path = store.users_path
    sections, begin = dict(PackedFile(path)), 64
    for name in itertools.takewhile(lambda name: name != "event.item", sections):
        begin += -(-sections[name].nbytes // 64) * 64
    data = bytearray(path.read_bytes())
    assert data[begin : begin + sections["event.item"].nbytes] == sections["event.item"].tobytes() != b""
    data[begin] ^= 1
    path.write_bytes(data)
    users = Store(store.path).users()
    assert "event.item" in users and "event.items" not in users
    assert users["id"][0] == -1
    for _ in range(2):
        with pytest.raises(CommandError, match=r'users\.dpsr: .* section "event.item" .*ingest the log again'):
            users["event.item"].sum()
    with pytest.raises(KeyError, match=r"event\.items"):
        users["event.items"].sum()


@pytest.mark.parametrize("name", FILES)
def test_another_version_of_a_file_is_named(store, name):
    path = store.path / name
    data = bytearray(path.read_bytes())
    assert data[:8] == b"DPSRPACK" and data[8] == 1
    data[8] = 2
    path.write_bytes(data)
    with pytest.raises(CommandError, match=str(path)):
        read_all(store.path)


def test_swapped_files(store):
    items, log = store.items_path, store.interactions_paths[0]
    items.rename(store.path / "swap")
    log.rename(items)
    (store.path / "swap").rename(log)
    with pytest.raises(CommandError, match=r'items\.dpsr: .*kind "interactions", expected "items"'):
        Store(store.path).items()


def test_a_file_without_a_section(store):
    with PackedFileWriter(store.path / "titles.dpsr", "titles") as file:
        file.add("other", np.zeros(1, np.int64))
    with pytest.raises(CommandError, match=r"titles\.dpsr: is not the file this store was made with"):
        Store(store.path).titles()


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("vocabulary")])
def test_a_file_of_another_store(store, shop, tmp_path, dpsr, name):
    """Same vocabulary, same kind, other rows: only the manifest can know."""
    for rows in (shop.items, shop.users):
        key = next(iter(rows[0]))
        rows[0][key], rows[1][key] = rows[1][key], rows[0][key]
    shop.log = [row | {"time": row["time"] + 1} for row in shop.log]
    dpsr(*shop.write().flags(tmp_path / "other"), "--shards=2").succeeds()
    other = Store(tmp_path / "other")
    assert other.vocabulary.fingerprint == store.vocabulary.fingerprint
    shutil.copy(other.path / name, store.path / name)
    with pytest.raises(CommandError, match=str(store.path / name)):
        store = Store(store.path)
        read_all(store.path)


def test_swapped_vocabulary(store, shop, tmp_path, dpsr):
    shop.items[0]["title"] = "Something else"
    dpsr(*shop.write().flags(tmp_path / "other"), "--shards=2").succeeds()
    other = Store(tmp_path / "other")
    shutil.copy(other.vocabulary_path, store.vocabulary_path)
    with pytest.raises(CommandError) as caught:
        Store(store.path)
    assert str(store.vocabulary_path) in str(caught.value)
    assert f"{other.vocabulary.fingerprint:016x}" in str(caught.value)
    assert f"{store.vocabulary.fingerprint:016x}" in str(caught.value)


@pytest.mark.parametrize(("version", "got"), [(2, "2"), (4, "4"), ("3", "3"), (None, "None")])
def test_another_version_of_the_store(store, version, got):
    edit_manifest(store, version=version)
    with pytest.raises(
        CommandError, match=f"is of {FORMAT} version {got}, expected {FORMAT} version 3; run `dpsr ingest`"
    ):
        Store(store.path)


def test_another_format(store):
    edit_manifest(store, format="tar")
    with pytest.raises(CommandError, match=f"is of tar version 3, expected {FORMAT} version 3"):
        Store(store.path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "\xff",
        "[]",
        "7",
        '"text"',
        '{"format": "dpsr-store", "version": 3}',
        '{"format": "dpsr-store", "version": 3, "counts": {"users": 1}, "files": {}}',
    ],
)
def test_damaged_manifest(store, text):
    (store.path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CommandError, match=f"{store.path}/manifest.json"):
        Store(store.path)


@pytest.mark.parametrize(
    "change",
    [
        {"files": {}},
        {"files": None},
        {"counts": 5},
        {"counts": {"users": 1}},
        {"counts": None},
        {"shards": None},
        {"shards": "2"},
        {"features": None},
        {"features": {"items": [{"kind": "number"}]}},
        {"schema": {}},
        {"schema": None},
    ],
)
def test_a_manifest_that_lacks_something(store, change):
    """Even where its checksum is right: another program may have written it."""
    edit_manifest(store, **change)
    with pytest.raises(CommandError, match=f"{store.path}/manifest.json: .*; ingest the log again"):
        Store(store.path)


def test_a_change_of_any_value_of_the_manifest_is_found(store):
    path = store.path / "manifest.json"
    text = path.read_text()
    for place, letter in enumerate(text):
        if letter.isalnum():
            other = chr(ord(letter) ^ 1)
            path.write_text(text[:place] + other + text[place + 1 :])
            with pytest.raises(CommandError):
                Store(store.path)


def test_manifest_is_a_directory(store):
    (store.path / "manifest.json").unlink()
    (store.path / "manifest.json").mkdir()
    with pytest.raises(CommandError, match=r"manifest\.json: cannot be read"):
        Store(store.path)


@pytest.mark.parametrize("texts", [[], [""], ["a", "", "红色", "\n\0"]])
def test_pack_strings_round_trip(tmp_path, texts):
    splits, data = pack_strings(texts)
    assert (splits.dtype, data.dtype) == ("int64", "uint8")
    assert splits.tolist() == np.cumsum([0, *(len(text.encode()) for text in texts)]).tolist()
    with PackedFileWriter(tmp_path / "f", "titles") as file:
        file.add("t.splits", splits)
        file.add("t.bytes", data)
    assert unpack_strings(PackedFile(tmp_path / "f"), "t") == texts


def test_new_directory_appears_whole_or_not_at_all(tmp_path):
    with new_directory(tmp_path / "new", overwrite=False) as temporary:
        (temporary / "file").write_text("x")
        assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "other", overwrite=False) as temporary:
        (temporary / "file").write_text("x")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_killed_run_is_cleaned_up_and_a_living_one_is_not(tmp_path):
    script = f"""
import os, pathlib
from dpsr_tf.data.store import new_directory
with new_directory(pathlib.Path({str(tmp_path / "new")!r})) as temporary:
    (temporary / "file").write_text("x")
    print(flush=True)
    input()
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"\n"
    (theirs,) = tmp_path.iterdir()
    with new_directory(tmp_path / "new"):
        assert theirs.exists(), "its process lives"
    assert sorted(tmp_path.iterdir()) == sorted([theirs, tmp_path / "new"])
    process.send_signal(signal.SIGKILL)
    process.wait()
    with new_directory(tmp_path / "other"):
        assert theirs.exists(), "of another name"
    (tmp_path / ".new.settings").mkdir()
    with pytest.raises(CommandError, match="exists already"), new_directory(tmp_path / "new"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new.settings", "new", "other"]


def test_what_a_run_was_killed_while_replacing_comes_back(tmp_path):
    (tmp_path / ".new.replaced-abcd1234" / "old").mkdir(parents=True)
    (tmp_path / ".new.replaced-abcd1234" / "old" / "manifest.json").write_text("the old one")
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "new", True, "store", "manifest.json"):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new" / "manifest.json").read_text() == "the old one"


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_replacement_that_fails_keeps_the_old_directory(tmp_path, monkeypatch, failing, error):
    """The first rename moves the old directory away, the second one brings the new one."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "manifest.json").write_text("the old one")
    rename, left = os.rename, [failing]

    def rename_until_it_fails(source, to):
        left[0] -= 1
        if left[0] == 0:
            raise error
        rename(source, to)

    monkeypatch.setattr(os, "rename", rename_until_it_fails)
    with pytest.raises(error), new_directory(tmp_path / "new", True, "store", "manifest.json") as temporary:
        (temporary / "manifest.json").write_text("the new one")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new" / "manifest.json").read_text() == "the old one"
