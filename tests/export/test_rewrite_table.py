"""The table of rewrites: what its ops find in a graph, against the dictionary that was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from dpsr_export import rewrite_table
from dpsr_export.rewrite_table import RewriteTable, key_of

v1 = tf.compat.v1

REWRITES = {
    "red shoes": [("Red Sneakers", -0.25), ("crimson shoes", -1.5), ("trainers", -3.0), ("red", -9.0)],
    "trainers": [("running shoes", -0.5)],
    "手 机": [("移动电话", -0.125), ("phone", 0.0)],
    "known without any": [],
    "3/4 x 1000": [("0.75 by 1,000", -2.0)],
}


def find(path: Path, queries: list[str | bytes], n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with tf.Graph().as_default(), v1.Session() as session:
        texts = v1.placeholder(tf.string, [None])
        found = RewriteTable(path).find(texts, n)
        assert found.rewrites.shape.as_list() == found.log_probabilities.shape.as_list() == [None, n]
        session.run(v1.tables_initializer())
        return session.run(tuple(found), {texts: np.array(queries, object)})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / rewrite_table.FILE
    rewrite_table.write(REWRITES, path)
    return path


@pytest.mark.parametrize("n", [1, 3, 6])
def test_finds_what_was_written(path: Path, n: int) -> None:
    queries = [*REWRITES, "unknown", "crimson shoes", "", "red"]
    rewrites, scores, known = find(path, queries, n)
    for row, query in enumerate(queries):
        expected = REWRITES.get(query, [])[:n]
        padding = n - len(expected)
        assert [text.decode() for text in rewrites[row]] == [text for text, _ in expected] + [""] * padding
        np.testing.assert_array_equal(scores[row], [score for _, score in expected] + [-np.inf] * padding)
        # The text of a rewrite is not a known query.
        assert known[row] == (query in REWRITES)


def test_a_query_is_found_by_its_words(path: Path) -> None:
    same = ["RED  shoes", " red-shoes!", "ｒｅｄ shoes\u3000", "red\tshoes"]
    rewrites, _, known = find(path, [*same, "手机", "3/4 x 1,000", "shoes red", "red shoes red", b"red \xff shoes"], 2)
    assert known.tolist() == [True] * 6 + [False] * 2 + [key_of("red \ufffd shoes") == "red shoes"]
    assert all(row[0] == b"Red Sneakers" for row in rewrites[:4]) and rewrites[4][0].decode() == "移动电话"


def test_keys_in_the_graph_are_those_of_python() -> None:
    texts = ["", "  ", "!?", "İstanbul Straße", "men's 12mm", "ไทย 한국어 手机x2", "a" * 5000, "x " * 5000, "½ ⅻ ٣٤ 😀"]
    found = rewrite_table.keys_of(tf.constant(texts))
    assert [key.decode() for key in found.numpy()] == list(map(key_of, texts))
    assert rewrite_table.keys_of(tf.zeros([0], tf.string)).shape == [0]
    # A mask of the size batch times longest query would take 400 GB.
    many = rewrite_table.keys_of(tf.constant([*["red"] * 50_000, "x " * 1_000_000]))
    assert many[0] == b"red" and len(many[-1].numpy()) == 1_999_999


def test_no_queries_and_no_rewrites(tmp_path: Path) -> None:
    rewrite_table.write({}, tmp_path / "empty.dpsr")
    rewrites, scores, known = find(tmp_path / "empty.dpsr", ["red", ""], 3)
    assert rewrites.shape == scores.shape == (2, 3) and not known.any()
    assert (rewrites == b"").all() and np.isneginf(scores).all()
    rewrites, scores, known = find(tmp_path / "empty.dpsr", [], 3)
    assert rewrites.shape == scores.shape == (0, 3) and known.shape == (0,)


def test_many_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    made = {f"q{i}": [(f"r{j}", -float(j)) for j in rng.integers(0, 5000, rng.integers(0, 4))] for i in range(3000)}
    rewrite_table.write(made, tmp_path / "many.dpsr")
    queries = [f"q{i}" for i in rng.integers(0, 4000, 2000)]
    rewrites, scores, known = find(tmp_path / "many.dpsr", queries, 3)
    for query, row, score, there in zip(queries, rewrites, scores, known, strict=True):
        assert there == (query in made)
        assert [(t.decode(), s) for t, s in zip(row, score, strict=True) if t] == made.get(query, [])


def test_a_damaged_file_is_refused(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    for name, damaged in (("short", data[: len(data) // 2]), ("other", b"not a packed file"), ("empty", b"")):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises((tf.errors.DataLossError, tf.errors.FailedPreconditionError)):
            find(tmp_path / name, ["red"], 1)
