"""Coarse ranking: fusion by ranks and learned, the cut-off, learning, files and judgments."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.packed_file import PackedFile, PackedFileWriter
from dpsr_serving.gateway.catalogue import Catalogue
from dpsr_serving.gateway.fusion import LearnedFusion, RankFusion, SourceWeights, learn, read_judgments
from dpsr_serving.gateway.inverted import Found


def found(ids: list[int], scores: list[float] | None = None) -> Found:
    values = scores if scores is not None else [-float(place) for place in range(len(ids))]
    return Found(np.array(ids, np.int64), np.array(values, np.float32))


FUSION = LearnedFusion({"a": SourceWeights(2.0, 0.1, 3), "b": SourceWeights(1.0, 1.0, 3)}, -1.0)


def test_ranks():
    combined = RankFusion().combine({"a": found([7, 3, 5]), "b": found([3, 9])}, 10)
    expected = {3: 1 / 62 + 1 / 61, 7: 1 / 61, 9: 1 / 62, 5: 1 / 63}
    assert combined.ids.tolist() == [3, 7, 9, 5] and combined.cut_off == 0
    np.testing.assert_allclose(combined.scores, [expected[i] for i in combined.ids.tolist()], rtol=1e-6)
    assert combined.ranks["a"].tolist() == [2, 1, 0, 3] and combined.ranks["b"].tolist() == [1, 0, 2, 0]
    np.testing.assert_array_equal(combined.source_scores["b"], np.array([0, np.nan, -1, np.nan], np.float32))


def test_weights_of_ranks_and_lowest_score():
    lists = {"a": found([1]), "b": found([2])}
    assert RankFusion({"b": 1.1}).combine(lists, 10).ids.tolist() == [2, 1]
    assert RankFusion().combine(lists, 10).ids.tolist() == [1, 2]  # equal scores: in order of the ids
    cut = RankFusion({"b": 1.1}, min_score=1.05 / 61).combine(lists, 10)
    assert (cut.ids.tolist(), cut.cut_off) == ([2], 1)


@pytest.mark.parametrize("fusion", [RankFusion(), FUSION])
def test_missing_and_empty_sources(fusion: Any):
    assert fusion.combine({"a": found([4, 2])}, 10).ids.tolist() == [4, 2]
    assert fusion.combine({"a": found([]), "b": found([4, 2])}, 1).ids.tolist() == [4]
    for nothing in ({}, {"a": found([])}):
        combined = fusion.combine(nothing, 10)
        assert len(combined.ids) == len(combined.scores) == combined.cut_off == 0
        assert set(combined.ranks) == set(nothing)


def test_the_learned_score():
    lists = {"a": found([1, 2, 3], [8, 6, 4]), "b": found([2, 9], [0.5, 0.5])}
    combined = FUSION.combine(lists, 10)

    def probability(scaled_a: float, a: float, scaled_b: float, b: float) -> float:
        return 1 / (1 + np.exp(-(-1 + 2 * scaled_a + 0.1 * a + scaled_b + b)))

    # a is full, so an item that it did not find has its last score at most. b is not: such an item has nothing of it.
    expected = {
        1: probability(1, 8, 0, 0), 2: probability(0.5, 6, 1, 0.5), 3: probability(0, 4, 0, 0),
        9: probability(0, 4, 1, 0.5),
    }  # fmt: skip
    assert combined.ids.tolist() == sorted(expected, key=lambda i: -expected[i])
    np.testing.assert_allclose(combined.scores, sorted(expected.values(), reverse=True), rtol=1e-6)
    threshold = float(combined.scores[1])
    cut = dataclasses.replace(FUSION, min_score=threshold).combine(lists, 10)
    assert (len(cut.ids), cut.cut_off) == (2, 2)
    nothing = dataclasses.replace(FUSION, min_score=1.0).combine(lists, 10)
    assert (len(nothing.ids), nothing.cut_off) == (0, 4)
    best = float(combined.scores[0])
    assert dataclasses.replace(FUSION, min_best=best).combine(lists, 10).ids.tolist() == combined.ids.tolist()
    emptied = dataclasses.replace(FUSION, min_best=best + 1e-6).combine(lists, 10)
    assert (len(emptied.ids), emptied.cut_off) == (0, 4)


def test_a_score_that_is_not_a_number_counts_as_not_found():
    fusion = dataclasses.replace(FUSION, min_best=0.01)
    others = {"b": found([1, 3], [0.5, 0.25])}
    without = fusion.combine({"a": found([1], [8.0]), **others}, 10)
    for scores in ([np.nan, 8.0], [8.0, np.nan]):
        ids = [3, 1] if np.isnan(scores[0]) else [1, 3]
        combined = fusion.combine({"a": found(ids, scores), **others}, 10)
        assert combined.cut_off == 0 and combined.ids.tolist() == without.ids.tolist()
        assert combined.scores.tolist() == without.scores.tolist()
    assert len(fusion.combine({"a": found([1, 2], [np.nan, np.nan])}, 10).ids) == 2


def test_items_beyond_the_depth_do_not_change_the_scale():
    first = FUSION.combine({"a": found([1, 2, 3], [8, 6, 4])}, 10)
    more = FUSION.combine({"a": found([1, 2, 3, 4, 5], [8, 6, 4, 3, -100])}, 10)
    assert first.scores.tolist() == more.scores[:3].tolist() and set(more.ids.tolist()) == {1, 2, 3, 4, 5}


_LISTS = st.lists(st.integers(0, 30), unique=True, max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), _LISTS), st.integers(1, 20), st.booleans())
def test_every_item_comes_once_and_in_order(given: dict[str, list[int]], size: int, learned: bool):
    lists = {name: found(ids) for name, ids in given.items()}
    combined = (FUSION if learned else RankFusion()).combine(lists, size)
    everything = {i for ids in given.values() for i in ids}
    assert len(combined.ids) == len(set(combined.ids.tolist())) == min(size, len(everything))
    assert (np.diff(combined.scores) <= 0).all() and set(combined.ids.tolist()) <= everything
    for name, ids in given.items():
        ranks = combined.ranks[name]
        assert all(rank == (ids.index(i) + 1 if i in ids else 0) for i, rank in zip(combined.ids, ranks, strict=True))
        assert (np.isnan(combined.source_scores[name]) == (ranks == 0)).all()
    # The best `size` items, not any: a longer list begins with them.
    longer = (FUSION if learned else RankFusion()).combine(lists, 100)
    assert longer.ids[: len(combined.ids)].tolist() == combined.ids.tolist()


def judged(queries: int, seed: int = 1) -> tuple[list[dict[str, Found]], list[list[int]]]:
    """Queries whose source `good` scores relevant items higher, and whose source `noise` says nothing.

    Every tenth query has no relevant item, and low scores.
    """
    rng = np.random.default_rng(seed)
    lists, relevant = [], []
    for number in range(queries):
        ids = rng.permutation(1000)[:40]
        answered = number % 10 != 0
        wanted = ids[:4] if answered else ids[:0]
        scores = rng.normal(0.3, 0.1, 40) + np.isin(ids, wanted) * 0.5
        order = np.argsort(-scores)
        noise = rng.permutation(ids)
        lists.append({"good": found(ids[order].tolist(), scores[order].tolist()), "noise": found(noise.tolist())})
        relevant.append(wanted.tolist())
    return lists, relevant


def test_learning_finds_the_source_that_tells():
    lists, relevant = judged(100)
    fusion = learn(lists, relevant, {"good": 40, "noise": 40}, keep=0.9)
    good, noise = fusion.sources["good"], fusion.sources["noise"]
    assert good.score > 0 and good.scaled + good.score > 20 * abs(noise.scaled + noise.score)
    assert fusion == learn(lists, relevant, {"good": 40, "noise": 40}, keep=0.9)  # the same numbers
    learned = fusion.learned
    assert learned["queries"] == 100 and learned["relevant"] == 360 and learned["pairs"] == 4000
    # A tenth of the items, and a tenth of the queries, in part the same.
    assert 0.8 <= learned["kept"] <= 0.91 and 0.05 <= learned["emptied"] <= 0.15 and learned["emptied_others"] > 0.5
    # On other queries it puts the relevant items first, keeps most of them, and leaves little else.
    others, wanted = judged(50, seed=2)
    kept = [set(fusion.combine(row, 100).ids.tolist()) for row in others]
    shares = [len(found & set(items)) / 4 for found, items in zip(kept, wanted, strict=True) if items]
    assert np.mean(shares) > 0.7 and np.mean([len(found) for found in kept]) < 6
    first = dataclasses.replace(fusion, min_best=0.0).combine(others[1], 4).ids.tolist()
    assert len(set(first) & set(wanted[1])) >= 3


def test_keep_says_what_the_cut_off_keeps():
    lists, relevant = judged(60)
    depths = {"good": 40, "noise": 40}
    fusions = [learn(lists, relevant, depths, keep) for keep in (1.0, 0.99, 0.9, 0.5)]
    for thresholds in ([fusion.min_score for fusion in fusions], [fusion.min_best for fusion in fusions]):
        assert thresholds[0] == 0 and thresholds == sorted(thresholds) and thresholds[-1] > thresholds[1]
    assert fusions[0].learned["kept"] == 1 and fusions[0].learned["emptied_others"] == 0


def test_a_source_that_finds_nothing_and_a_number_that_never_varies():
    lists, relevant = judged(40)
    lists = [{"good": row["good"], "dead": found([])} for row in lists]
    fusion = learn(lists, relevant, {"good": 40, "dead": 40})
    assert abs(fusion.sources["dead"].scaled) < 1e-6 and abs(fusion.sources["dead"].score) < 1e-6


def test_too_few_judgments():
    lists, relevant = judged(11)
    with pytest.raises(CommandError, match="9 queries have a relevant item that a source finds, expected at least 10"):
        learn(lists, relevant, {"good": 40, "noise": 40})


def test_the_file(tmp_path: Path):
    lists, relevant = judged(40)
    fusion = learn(lists, relevant, {"good": 40, "noise": 40})
    path = tmp_path / "fusion.json"
    fusion.write(path)
    assert LearnedFusion.read(path) == fusion
    fusion.check_sources({"good": 40, "noise": 50}, str(path))
    with pytest.raises(CommandError, match="learned from the sources good, noise, but the pipeline has good, other"):
        fusion.check_sources({"good": 40, "other": 40}, str(path))
    with pytest.raises(CommandError, match="learned from 40 items of noise, but the pipeline asks for k=39"):
        fusion.check_sources({"good": 40, "noise": 39}, str(path))
    with pytest.raises(CommandError, match="cannot be written: No such file"):
        fusion.write(tmp_path / "none" / "fusion.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.pop("bias"),
        lambda tree: tree.update(bias=None),
        lambda tree: tree.update(min_score=float("nan")),
        lambda tree: tree.pop("min_best"),
        lambda tree: tree.update(sources=[]),
        lambda tree: tree.update(sources={"a": {"scaled": 1}}),
        lambda tree: tree.update(version=2),
        lambda tree: tree.update(format="dpsr-store"),
        lambda tree: tree.clear(),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: Any):
    path = tmp_path / "fusion.json"
    FUSION.write(path)
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(CommandError, match=r"fusion.json: .*make it with `dpsr search --learn`"):
        LearnedFusion.read(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_files_that_are_no_json_object_are_refused(tmp_path: Path, text: str):
    (tmp_path / "fusion.json").write_text(text)
    with pytest.raises(CommandError, match=r"fusion.json: "):
        LearnedFusion.read(tmp_path / "fusion.json")
    with pytest.raises(CommandError, match=r"cannot be read: .*No such file"):
        LearnedFusion.read(tmp_path / "other.json")


# Judgments.


def catalogue(folder: Path, keys: list[str] | None = None) -> Catalogue:
    titles = b"".join(b"ab" for _ in range(4))
    with PackedFileWriter(str(folder / "catalogue.dpsr"), "catalogue") as file:
        file.add("id", np.array([3, 5, 7, 9]))
        file.add("title.splits", np.arange(0, 9, 2))
        file.add("title.bytes", np.frombuffer(titles, np.uint8))
        if keys:
            file.add("key.splits", np.cumsum([0, *map(len, keys)]))
            file.add("key.bytes", np.frombuffer("".join(keys).encode(), np.uint8))
        file.add("identifier.hash", np.zeros(0, np.uint64))
        file.add("identifier.row", np.zeros(0, np.int32))
    return Catalogue({"attributes": []}, PackedFile(str(folder / "catalogue.dpsr"), "catalogue"))


def test_judgments(tmp_path: Path):
    items = catalogue(tmp_path)
    text = 'query\titem\tgrade\nred "shoe\t3\t2\nred "shoe\t5\t0\n红\t9\t1\nnothing\t7\t0\nred "shoe\t4\t2\n'
    path = tmp_path / "judged.tsv"
    path.write_text(text, "utf-8")
    assert read_judgments(path, items) == {'red "shoe': {3}, "红": {9}, "nothing": set()}
    assert read_judgments(path, items, relevant_from=2)["红"] == set()
    (tmp_path / "judged.tsv.gz").write_bytes(gzip.compress(text.encode()))
    assert read_judgments(tmp_path / "judged.tsv.gz", items) == read_judgments(path, items)
    (tmp_path / "judged.csv").write_text(f'q,i,g\n"a, b",3,1\n"a, b",{2**64},1\n')
    assert read_judgments(tmp_path / "judged.csv", items, ("q", "i", "g")) == {"a, b": {3}}
    with_keys = catalogue(tmp_path, ["a", "b", "c", "d"])
    path.write_text("query\titem\tgrade\nx\tb\t1\nx\tz\t1\n")
    assert read_judgments(path, with_keys) == {"x": {5}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("query\titem\nx\t3\n", "has no column grade; its columns are query, item"),
        ("query\titem\tgrade\nx\t3\tgood\n", "has a row that is not query, item and grade"),
        ("query\titem\tgrade\nx\n", "has a row that is not query, item and grade"),
        ("query\titem\tgrade\nx\tb\t1\n", "has a row that is not query, item and grade"),
        ("", "has no column query"),
    ],
)
def test_wrong_judgments(tmp_path: Path, text: str, message: str):
    (tmp_path / "judged.tsv").write_text(text)
    with pytest.raises(CommandError, match=message):
        read_judgments(tmp_path / "judged.tsv", catalogue(tmp_path))


def test_judgments_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(UsageError, match="no such file; give a table of judged pairs"):
        read_judgments(tmp_path / "none.tsv", catalogue(tmp_path))
    (tmp_path / "bad.tsv").write_bytes(b"query\titem\tgrade\n\xff\t3\t1\n")
    with pytest.raises(CommandError, match="cannot be read"):
        read_judgments(tmp_path / "bad.tsv", catalogue(tmp_path))
    (tmp_path / "bad.tsv.gz").write_bytes(b"no gzip")
    with pytest.raises(CommandError, match="cannot be read"):
        read_judgments(tmp_path / "bad.tsv.gz", catalogue(tmp_path))
