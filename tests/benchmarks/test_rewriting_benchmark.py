"""benchmarks/rewriting.py: unions of rewrites, peers and meanings. Training is measured by the benchmark itself."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from dpsr_tf.evaluation.baselines import Bm25, Field, plain_words

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "rewriting.py"
sys.path.append(str(SCRIPT.parent))
benchmark = importlib.import_module("rewriting")
Union = benchmark.Union

TITLES = ["red kettle", "water boiler", "blue kettle small", "garden chair"]


@pytest.fixture(scope="module")
def bm25():
    return Bm25(np.arange(4) + 10, [Field(TITLES, plain_words())])


def test_shares_sum_to_the_weight():
    rewrites = [("a", -1.0), ("b", -1.0 - np.log(4)), ("c", -50.0)]
    assert Union(2.0, 2, 1.0).shares(rewrites) == [("a", pytest.approx(1.6)), ("b", pytest.approx(0.4))]
    assert [share for _, share in Union(3.0, 9, 0.0).shares(rewrites)] == pytest.approx([1, 1, 1])
    assert Union(1.0, 3, 1.0).shares([]) == []
    assert [share for _, share in Union(1.0, 3, 1.0, 4.0).shares([("a", 0.0)], known=False)] == [4.0]


def test_bm25_knows_the_words_of_titles(bm25):
    assert bm25.knows("small garden kettle") and bm25.knows("") and not bm25.knows("kettle unseen")


def test_a_union_finds_what_its_rewrites_find(bm25):
    ids = benchmark.united(bm25, ["boiler", "chair"], [[("kettle", 0.0), ("red kettle", -1.0)], []], Union(1.0, 3, 1.0))
    assert set(ids[0].tolist()) - {-1} == {10, 11, 12} and ids[0, 0] == 11
    assert ids[1, 0] == 13 and ids[1, 1] == -1


def test_a_union_without_rewrites_is_bm25(bm25):
    queries = ["red kettle", "garden water", "unseen"]
    ids, _ = bm25(queries, None, benchmark.K)
    np.testing.assert_array_equal(benchmark.united(bm25, queries, [[], [], []], Union(1.0, 3, 1.0)), ids)


def test_recall():
    found = benchmark.recall(np.array([[3, 1, -1], [-1, -1, -1]]), [[1, 2], [7]])
    np.testing.assert_array_equal(found, [0.5, 0.0])


def test_the_best_union_is_the_best_of_both_folds(bm25):
    union, figures = benchmark._best_union(
        bm25, ["boiler", "chair"], [[("kettle", 0.0)], []], [[10, 12], [13]], np.array(["a", "b"])
    )
    assert union.weight > 0
    np.testing.assert_array_equal(figures, [1.0, 1.0])


def test_the_peer_corrects_spelling():
    correct = benchmark.spelling_corrector(["outdoor patio tile", "outdoor tile"])
    assert correct(["ourdoor patio tile", "patio tile"]) == [[("outdoor patio tile", 0.0)], []]


def test_the_peer_replaces_words_by_co_clicks():
    clicks = {"red kettle": [1, 2], "red boiler": [1, 2], "blue boiler": [3], "green chair": [4]}
    replace = benchmark.co_click_synonyms(clicks)
    assert [text for text, _ in replace(["small kettle", "green chair"])[0]] == ["small boiler"]
    assert replace(["green chair"]) == [[]]


def write_truth(folder):
    synonyms = {"en": {"kettle": ["water boiler"], "navy": ["dark blue"]}, "zh": {"手机": ["大哥大"]}}
    (folder / "truth").mkdir()
    (folder / "truth.json").write_text(json.dumps({"synonyms": synonyms}))
    names = {"kettle": ("kettle", None), "chair": ("garden chair", "acme"), "phone": ("手机", None)}
    tables = {
        "truth/meanings": [
            {"type": type_, "brand": brand, "words": ["navy", "64gb"]} for type_, brand in names.values()
        ],
        "truth/misspellings": [{"query": "kettel", "right": "kettle"}],
        "truth/items": [
            {"item_id": 1, "type": "kettle", "words": ["navy"]},
            {"item_id": 2, "type": "kettle", "words": ["64gb"]},
            {"item_id": 3, "type": "garden chair", "words": ["navy"]},
        ],
        "items": [{"item_id": number, "brand": "acme"} for number in (1, 2, 3)],
    }
    for name, rows in tables.items():
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")


@pytest.fixture(scope="module")
def meanings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    write_truth(folder)
    return benchmark.Meanings(folder)


@pytest.mark.parametrize(
    ("query", "rewrite", "drift"),
    [
        ("dark blue water boiler", "navy kettle", ""),
        ("kettle navy", "dark blue water boiler", ""),
        ("kettel", "water boiler", ""),
        ("大哥大64gb", "手机64gb", ""),
        ("navy kettle", "kettle", "lost property"),
        ("kettle", "navy kettle", "added property"),
        ("acme kettle", "kettle", "lost brand"),
        ("kettle", "garden chair", "replaced type"),
        ("kettle", "nice kettle", "unknown word"),
    ],
)
def test_drift(meanings, query, rewrite, drift):
    assert meanings.drift(query, rewrite) == drift


def test_cosine_of_answers(meanings):
    assert meanings.cosine("kettle", "water boiler") == 1
    assert meanings.cosine("kettle", "navy kettle") == pytest.approx(np.sqrt(0.5))
    assert meanings.cosine("kettle", "garden chair") == 0
    assert meanings.cosine("kettle", "unheard of") == 0


@pytest.mark.parametrize(("one", "other", "distance"), [("", "a b", 2), ("a b c", "a c", 1), ("a b", "b a", 2)])
def test_edit_distance(one, other, distance):
    assert benchmark.edit_distance(one.split(), other.split()) == distance


def test_f1_counts_repeated_words():
    assert benchmark.word_f1(["a", "a"], ["a"]) == pytest.approx(2 / 3)
    assert benchmark.word_f1([], []) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--parts=everything"], "everything", marks=pytest.mark.long),
        (["--seeds=1,b"], "--seeds=1,b: expected whole numbers"),
        pytest.param(["more"], "unexpected argument 'more'", marks=pytest.mark.long),
    ],
)
def test_bad_arguments(arguments, message):
    run = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode != 0 and message in run.stdout + run.stderr
