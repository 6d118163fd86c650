from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from dpsr_tf.data.store import FORMAT, Store, new_directory, pack_strings, unpack_strings
from dpsr_tf.errors import CommandError
from dpsr_tokenizer import PackedFile, PackedFileWriter


def read_all(path):
    """Opens a store and reads everything that Python reads."""
    store = Store(path)
    for file in (store.items(), store.interactions()):
        for name in file:
            file[name].sum()
    return store.titles()


def edit_manifest(store, **changes):
    path = store.path / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))


def test_a_whole_store_opens(store):
    assert len(read_all(store.path)) == 7
    assert Store(str(store.path)).counts == store.counts


def test_it_may_be_moved(store, tmp_path):
    shutil.move(store.path, tmp_path / "elsewhere")
    assert len(read_all(tmp_path / "elsewhere")) == 7


def test_no_store(tmp_path):
    with pytest.raises(CommandError, match=r"none: holds no store \(no manifest\.json\); make one with `dpsr ingest`"):
        Store(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match="file"):
        Store(tmp_path / "file")


FILES = ["vocabulary.dpsr", "items.dpsr", "interactions.dpsr", "titles.dpsr"]


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
    items, log = store.items_path, store.interactions_path
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


@pytest.mark.parametrize("name", ["items.dpsr", "interactions.dpsr", "titles.dpsr", "users.dpsr"])
def test_a_file_of_another_store(store, shop, tmp_path, dpsr, name):
    """Same vocabulary, same kind, other rows: only the manifest can know."""
    shop.items.reverse()
    shop.users.reverse()
    shop.log = shop.log[:-1]
    dpsr(*shop.write().flags(tmp_path / "other")).succeeds()
    other = Store(tmp_path / "other")
    assert other.vocabulary.fingerprint == store.vocabulary.fingerprint
    shutil.copy(other.path / name, store.path / name)
    with pytest.raises(CommandError, match=str(store.path / name)):
        store = Store(store.path)
        store.items(), store.interactions(), store.titles()


def test_swapped_vocabulary(store, shop, tmp_path, dpsr):
    shop.items[0]["title"] = "Something else"
    dpsr(*shop.write().flags(tmp_path / "other")).succeeds()
    other = Store(tmp_path / "other")
    shutil.copy(other.vocabulary_path, store.vocabulary_path)
    with pytest.raises(CommandError) as caught:
        Store(store.path)
    assert str(store.vocabulary_path) in str(caught.value)
    assert f"{other.vocabulary.fingerprint:016x}" in str(caught.value)
    assert f"{store.vocabulary.fingerprint:016x}" in str(caught.value)


@pytest.mark.parametrize(("version", "got"), [(2, "2"), (0, "0"), ("1", "1"), (None, "None")])
def test_another_version_of_the_store(store, version, got):
    edit_manifest(store, version=version)
    with pytest.raises(CommandError, match=f"is {FORMAT} version {got}, expected {FORMAT} version 1"):
        Store(store.path)


def test_another_format(store):
    edit_manifest(store, format="tar")
    with pytest.raises(CommandError, match=f"is tar version 1, expected {FORMAT} version 1"):
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
        '{"format": "dpsr-store", "version": 1}',
        '{"format": "dpsr-store", "version": 1, "counts": {"users": 1}, "fingerprints": {}}',
        '{"format": "dpsr-store", "version": 1, "counts": 5, "fingerprints": {}}',
    ],
)
def test_damaged_manifest(store, text):
    (store.path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CommandError, match=f"{store.path}/manifest.json"):
        Store(store.path)


def test_manifest_without_a_fingerprint(store):
    edit_manifest(store, fingerprints={})
    with pytest.raises(CommandError, match=f"{store.path}/manifest.json"):
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
