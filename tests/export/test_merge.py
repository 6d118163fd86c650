"""`dpsr index --merge`: what a log of item changes makes of an index."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from conftest import Job, TextShop, dpsr

from dpsr_common.command_line import main
from dpsr_common.packed_file import PackedFile
from dpsr_export import merge
from dpsr_export.item_changes import DELETE, PUT, UPDATE, Changes, ItemChangeLog
from dpsr_export.merge import Changed, replay
from dpsr_export.warmup import LoadedServable
from dpsr_tf.data.column_values import ids_of

BASE = np.array([1, 3, 5, 7])

Change = tuple[int, int, int]  # kind, item, version


def replayed(changes: Sequence[Change], **more: Any) -> merge.Replayed:
    return replay(BASE, *zip(*changes, strict=True), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "items", "hidden", "ignored"),
    [
        # A new item; an item of the base that is replaced; the same change twice.
        ([(PUT, 2, 0)], {2: Changed(0)}, set(), 0),
        ([(PUT, 3, 0), (PUT, 3, 0)], {3: Changed(1)}, set(), 0),
        # Updates add up, and a put drops them.
        ([(UPDATE, 3, 0), (UPDATE, 3, 0)], {3: Changed(-1, [0, 1])}, set(), 0),
        ([(UPDATE, 3, 0), (PUT, 3, 0), (UPDATE, 3, 0)], {3: Changed(1, [2])}, set(), 0),
        # Deletes, and ids that come back.
        ([(DELETE, 3, 0)], {}, {3}, 0),
        ([(PUT, 2, 0), (DELETE, 2, 0)], {}, {2}, 0),
        ([(DELETE, 3, 0), (PUT, 3, 0), (UPDATE, 3, 0)], {3: Changed(1, [2])}, set(), 0),
        # Unknown ids.
        ([(UPDATE, 2, 0), (DELETE, 4, 0)], {}, set(), 2),
        ([(DELETE, 3, 0), (UPDATE, 3, 0), (DELETE, 3, 0)], {}, {3}, 2),
        # Out of order: lower versions are ignored, equal ones and none are not.
        ([(PUT, 2, 7), (PUT, 2, 6), (UPDATE, 2, 7), (UPDATE, 2, 0)], {2: Changed(0, [2, 3])}, set(), 1),
        ([(DELETE, 3, 7), (PUT, 3, 6), (PUT, 3, 0)], {3: Changed(2)}, set(), 1),
        ([(PUT, 2, 7), (PUT, 2, 0), (PUT, 2, 6)], {2: Changed(1)}, set(), 1),
        ([(DELETE, 2, 9), (PUT, 2, 8)], {}, set(), 2),
        ([(UPDATE, 2, 9), (PUT, 2, 8)], {2: Changed(1)}, set(), 1),
    ],
)
def test_outcomes(changes: list[Change], items: dict[int, Changed], hidden: set[int], ignored: int) -> None:
    found = replayed(changes)
    assert (found.items, found.hidden, found.ignored) == (items, hidden, ignored)


def test_a_put_that_cannot_be_found_hides_the_item() -> None:
    found = replayed([(PUT, 3, 4), (UPDATE, 3, 0), (PUT, 3, 3)], not_indexed=[0])
    assert (found.items, found.hidden, found.versions, found.ignored) == ({}, {3}, {3: 4}, 2)
    assert (found.not_indexed, found.met) == ({3: 0}, set())
    found = replayed([(PUT, 3, 4), (DELETE, 3, 0)], not_indexed=[0])
    assert (found.hidden, found.ignored, found.not_indexed) == ({3}, 1, {})
    assert replayed([(PUT, 3, 0), (PUT, 3, 0)], not_indexed=[0]).not_indexed == {}


def test_with_shards_an_update_of_an_unknown_item_sets_its_version() -> None:
    changes = [(UPDATE, 2, 9), (PUT, 2, 8), (PUT, 4, 3), (UPDATE, 4, 5), (PUT, 4, 4)]
    found = replayed(changes, not_indexed=[2], sharded=True)
    assert (found.items, found.versions, found.ignored) == ({}, {2: 9, 4: 5}, 4)
    assert replayed(changes, not_indexed=[2]).items == {2: Changed(1), 4: Changed(4)}


def test_puts_that_matter_are_those_that_a_later_change_or_a_search_meets() -> None:
    changes = [(PUT, 2, 0), (PUT, 2, 0), (UPDATE, 2, 0), (PUT, 2, 0), (PUT, 4, 0), (DELETE, 4, 0), (UPDATE, 3, 0)]
    assert replayed(changes).met == {1, 3, 4}
    assert replayed([(PUT, 2, 7), (UPDATE, 2, 6), (PUT, 2, 0)]).met == {2}, "the update came too late"


def test_a_replay_in_two_parts_is_that_of_the_whole() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        columns = (rng.integers(*bounds, 30).tolist() for bounds in ((0, 3), (1, 8), (0, 4)))
        changes = list(zip(*columns, strict=True))
        whole, first = replayed(changes), replayed(changes[:15])
        between = np.array(sorted((set(BASE.tolist()) | set(first.items)) - first.hidden))
        second = replay(between, *zip(*changes[15:], strict=True), base_versions=first.versions)  # type: ignore[arg-type]
        there = (set(between.tolist()) | set(second.items)) - second.hidden
        assert there == (set(BASE.tolist()) | set(whole.items)) - whole.hidden
        assert second.versions == whole.versions and first.ignored + second.ignored == whole.ignored


def example(values: Mapping[str, Any]) -> bytes:
    """A tf.train.Example: texts, numbers, or lists of them."""
    made = tf.train.Example()
    for name, value in values.items():
        feature = made.features.feature[name]
        listed = value if isinstance(value, list) else [value]
        if listed and isinstance(listed[0], float):
            feature.float_list.value.extend(listed)
        else:
            feature.bytes_list.value.extend(str(text).encode() for text in listed)
    return made.SerializeToString()


def item_id(key: str) -> int:
    return int(ids_of(pa.array([key]), string_ids=True).values[0])


def put(row: Mapping[str, Any]) -> bytes:
    """The put of a row of text_shop."""
    values: dict[str, Any] = {
        "item_text": row["title"],
        "title": row["title"],
        "item_brand": row["brand"],
        "item_details": row["details"],
        "item_tags": row["tags"],
        "attribute.brand": [row["brand"]] if row["brand"] else [],
        "attribute.tags": row["tags"],
    }
    if row["photo"] is not None:
        values["item_photo"] = row["photo"]
    if row["price"] is not None:
        values |= {"item_price": row["price"], "attribute.price": [str(row["price"])]}
    return example(values)


def append(base: Path, changes: Sequence[tuple[int, str, bytes, int]]) -> None:
    kinds, keys, examples, versions = zip(*changes, strict=True)
    ids = np.array([item_id(key) for key in keys])
    ItemChangeLog(base / "item_changes").append(
        Changes(np.array(kinds, np.uint8), ids, list(examples), np.array(versions), list(keys))
    )


def merged(index: Path, base: Path, out: Path) -> dict[str, Any]:
    dpsr("index", "--merge", f"--index={index}", f"--servable={base}", f"--out={out}")
    found: dict[str, Any] = json.loads((out / "index.json").read_text())
    return found


@pytest.fixture
def copied(text_shop: TextShop, tmp_path: Path) -> Path:
    """A base path with the version of text_shop, to write a log beside it."""
    base = tmp_path / "servable"
    base.mkdir()
    shutil.copytree(text_shop.job.servable / "1", base / "1")
    return base


FILES = ["items.faiss", "item_ids.dpsr", "item_attributes.dpsr", "item_embeddings.dpsr", "items.dpsr"]


def assert_same(one: Path, other: Path) -> None:
    """Compares the files of two indexes: vectors nearly, all others exactly."""
    for name in FILES[1:]:
        a, b = PackedFile(one / name), PackedFile(other / name)
        assert list(a) == list(b), name
        for section in a:
            if section in ("embedding", "index.checksum", "item_ids.fingerprint"):
                continue
            np.testing.assert_array_equal(a[section], b[section], f"{name}: {section}")
    vectors = [PackedFile(path / "item_embeddings.dpsr")["embedding"] for path in (one, other)]
    np.testing.assert_allclose(*vectors, atol=1e-6)
    titles = [gzip.decompress((path / "item_titles.tsv.gz").read_bytes()) for path in (one, other)]
    assert titles[0] == titles[1]


def test_items_that_are_put_as_they_were_change_nothing(text_shop: TextShop, copied: Path, tmp_path: Path) -> None:
    some = dict(list(text_shop.items.items())[::2])
    append(copied, [(DELETE, key, b"", 0) for key in list(some)[:5]])
    append(copied, [(PUT, key, put(row), 0) for key, row in some.items()])
    manifest = merged(text_shop.job.index, copied, tmp_path / "new")
    assert manifest["merged"] == {"changes": 30, "put": 25, "updated": 0, "removed": 0, "ignored": 0}
    assert manifest["changes_offset"] == 30 and manifest["items"] == 50
    assert_same(text_shop.job.index, tmp_path / "new")


def test_merges_in_two_steps_and_the_next_version(text_shop: TextShop, copied: Path, tmp_path: Path) -> None:
    rows = list(text_shop.items.items())
    new = dict(rows[1][1]) | {"title": "green hat 帽子", "brand": "Neu", "tags": ["sale", "rare"], "price": 0.1}
    first = [
        (PUT, "new-1", put(new), 3),
        (PUT, rows[2][0], put(new), 0),
        (UPDATE, rows[3][0], example({"attribute.price": ["16777217"], "attribute.tags": ["rare", "new"]}), 0),
        (DELETE, rows[4][0], b"", 9),
        (PUT, "new-2", put(new), 0),
        (PUT, "empty", example({"title": "nothing"}), 0),
    ]
    second = [
        (PUT, rows[4][0], put(new), 8),  # came late
        (PUT, "new-1", put(new | {"title": "late"}), 2),
        (UPDATE, rows[3][0], example({"attribute.brand": []}), 0),
        (DELETE, "new-2", b"", 0),
        (UPDATE, "new-1", example({"attribute.price": [7.5]}), 3),
    ]
    append(copied, first)
    one = merged(text_shop.job.index, copied, tmp_path / "one")
    assert (one["items"], one["empty_items"], one["changes_offset"]) == (51, 1, 6)
    dpsr("export", "--index_only", f"--index={tmp_path / 'one'}", f"--out={copied}")
    append(copied, second)
    two = merged(tmp_path / "one", copied, tmp_path / "two")
    assert (two["items"], two["changes_offset"], two["merged"]["ignored"]) == (50, 11, 2)
    whole = merged(text_shop.job.index, copied, tmp_path / "whole")
    assert whole["merged"]["changes"] == 11
    assert_same(tmp_path / "whole", tmp_path / "two")
    # What searches see of it.
    attributes = PackedFile(tmp_path / "two" / "item_attributes.dpsr")
    ids = PackedFile(tmp_path / "two" / "item_ids.dpsr")["id"].tolist()
    assert item_id(rows[4][0]) not in ids and item_id("new-2") not in ids and item_id("empty") not in ids
    prices = attributes["value.price"]
    assert prices.dtype == np.float64 and prices[ids.index(item_id(rows[3][0]))] == 16777217
    assert prices[ids.index(item_id("new-1"))] == 7.5 and prices[ids.index(item_id(rows[2][0]))] == 0.1
    assert attributes["value.brand"][ids.index(item_id(rows[3][0]))] == 0
    assert b"rare" in attributes["text.tags.bytes"].tobytes()
    versions = PackedFile(tmp_path / "two" / "item_ids.dpsr")
    assert versions["version"][ids.index(item_id("new-1"))] == 3
    assert (versions["hidden.id"].tolist(), versions["hidden.version"].tolist()) == ([item_id(rows[4][0])], [9])
    titles = gzip.decompress((tmp_path / "two" / "item_titles.tsv.gz").read_bytes()).decode()
    assert f"{item_id('new-1')}\tgreen hat 帽子\n" in titles and str(item_id(rows[4][0])) not in titles


def test_changes_of_an_item_that_cannot_be_found(text_shop: TextShop, copied: Path, tmp_path: Path) -> None:
    """An update of it is ignored with its version, so a put between the two versions makes the item come back."""
    row, nothing = next(iter(text_shop.items.values())), example({"title": "nothing"})
    append(copied, [(PUT, "late", nothing, 3), (UPDATE, "late", example({"attribute.price": [7.5]}), 5)])
    append(copied, [(PUT, "late", put(row), 4), (PUT, "gone", nothing, 0), (DELETE, "gone", b"", 0)])
    manifest = merged(text_shop.job.index, copied, tmp_path / "new")
    assert manifest["merged"] == {"changes": 5, "put": 1, "updated": 0, "removed": 0, "ignored": 2}
    assert (manifest["items"], manifest["empty_items"]) == (51, 0)
    ids = PackedFile(tmp_path / "new" / "item_ids.dpsr")
    assert ids["version"][ids["id"].tolist().index(item_id("late"))] == 4
    price = PackedFile(tmp_path / "new" / "item_attributes.dpsr")["value.price"]
    assert price[ids["id"].tolist().index(item_id("late"))] != 7.5
    assert LoadedServable(copied / "1")("apply_changes", {})["ignored"] == 2


def found(servable: LoadedServable, query: str, include: str = "") -> dict[str, float]:
    """Key -> score of all items that a search finds."""
    inputs = servable.search_inputs([{"query": query}], 1000) | {"include": np.array([[include]], object)}
    answer = servable("search", inputs)
    scores = answer["scores"][0][answer["item_ids"][0] >= 0].tolist()
    keys = [key.decode() for key in answer["item_keys"][0].tolist() if key]
    assert len(keys) == len(set(keys)) == len(scores)
    return dict(zip(keys, scores, strict=True))


def test_a_servable_and_a_merge_agree(text_shop: TextShop, copied: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows, keys = list(text_shop.items.values()), [*list(text_shop.items)[:16], "new-1", "new-2", "new-3"]
    changes = []
    for _ in range(200):
        kind, key, version = int(rng.integers(0, 3)), str(rng.choice(keys)), int(rng.choice([0, 0, 1, 2, 3]))
        row = rows[int(rng.integers(0, len(rows)))] | {"brand": str(rng.choice(["Acme", "Neu", ""]))}
        if rng.random() < 0.1:
            row = dict.fromkeys(row) | {"title": "", "brand": "", "tags": [], "details": ""}  # has no vector
        update = {"attribute.price": [[], ["0.1"], [5.0]][rng.integers(0, 3)], "attribute.tags": ["sale", "rare"]}
        changes.append((kind, key, put(row) if kind == PUT else example(update) if kind == UPDATE else b"", version))
    append(copied, changes[:120])
    append(copied, changes[120:])
    online = LoadedServable(copied / "1")
    index = merged(text_shop.job.index, copied, tmp_path / "index")
    dpsr("export", "--index_only", f"--index={tmp_path / 'index'}", f"--out={copied}")
    folded = LoadedServable(copied / "2")
    before = LoadedServable(text_shop.job.servable / "1")
    states = [servable("apply_changes", {}) for servable in (online, folded)]
    assert [state["offset"] for state in states] == [200, 200] and [state["changes"] for state in states] == [0, 0]
    assert states[0]["items"] == states[1]["items"] == index["items"] and states[1]["hidden"] == 0
    assert states[0]["ignored"] == index["merged"]["ignored"] > 0
    for query in ("red shoes", "手机"):
        for include in ("", "brand=Neu", "price=0.1", "price=..50", "tags=rare", "brand=Acme|阿克梅"):
            one, other = found(online, query, include), found(folded, query, include)
            assert one.keys() == other.keys(), (query, include)
            for key, score in one.items():
                assert score == pytest.approx(other[key], abs=1e-5)
        assert one and found(before, query) != found(online, query)


def test_an_interrupted_merge_leaves_nothing(
    text_shop: TextShop, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def die(*_: Any) -> None:
        raise Killed

    append(copied, [(DELETE, "sku-1", b"", 0)])
    monkeypatch.setattr(merge._Merge, "_write_titles", die)
    with pytest.raises(Killed):
        merge.merge_index(text_shop.job.index, copied, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["servable"]
    assert (copied / "1" / "saved_model.pb").exists()


def test_what_is_refused(text_shop: TextShop, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def error(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in ("index", *arguments)]) in (1, 2)
        said = capsys.readouterr().err.strip()
        assert len(said.splitlines()) == 1 and not (tmp_path / "new").exists()
        return said

    index, base, out = f"--index={text_shop.job.index}", f"--servable={copied}", f"--out={tmp_path / 'new'}"
    assert "--servable is missing" in error("--merge", index, out)
    assert "--model cannot be combined with --merge" in error("--merge", index, base, out, "--model=x")
    assert "--index is for merges" in error(index, out)
    append(copied, [(DELETE, "sku-1", b"", 0), (DELETE, "sku-2", b"", 0)])
    append(copied, [(DELETE, "sku-3", b"", 0)])
    (segment,) = (copied / "item_changes").glob("0*-*02.dpsr")
    whole = segment.read_bytes()
    segment.write_bytes(whole[:-9] + b"?" + whole[-8:])
    assert "damaged" in error("--merge", index, base, out)
    segment.unlink()
    assert "are missing" in error("--merge", index, base, out)


@pytest.mark.slow
def test_an_index_of_numbers_in_lists(job: Job, tmp_path: Path) -> None:
    index, base = tmp_path / "index", tmp_path / "servable"
    dpsr("index", f"--model={job.model}", f"--store={job.store}", f"--out={index}", "--set=index.factory=IVF16,SQ8")
    dpsr("export", f"--model={job.model}", f"--index={index}", f"--out={base}")
    dpsr("export", f"--model={job.model}", f"--index={index}", f"--out={tmp_path / 'shards'}", "--shards=2")
    before = PackedFile(index / "item_ids.dpsr")["id"]
    log = ItemChangeLog(base / "item_changes")
    log.append(Changes(np.full(9, DELETE, np.uint8), before[:9], [b""] * 9))
    manifest = merged(index, base, tmp_path / "new")
    assert manifest["items"] == 391 and manifest["merged"]["removed"] == 9
    assert manifest["parameters"] == json.loads((index / "index.json").read_text())["parameters"]
    shutil.copytree(base / "item_changes", tmp_path / "shards" / "item_changes")
    sharded = merged(index, tmp_path / "shards", tmp_path / "of_shards")
    assert sharded["files"] == manifest["files"]
    dpsr("export", "--index_only", f"--index={tmp_path / 'of_shards'}", f"--out={tmp_path / 'shards'}", "--shards=2")
