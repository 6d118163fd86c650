from __future__ import annotations

import json
import math
import socket

import numpy as np
import pytest
from conftest import encode_table

from dpsr_tf import cli
from dpsr_tf.data.store import Store
from dpsr_tf.errors import CommandError, UsageError
from dpsr_tf.evaluation.evaluate import MEASURES, Judgments, evaluate, format_table, make_retriever
from dpsr_tf.evaluation.retriever import Bm25
from dpsr_tokenizer import Tokenizer, TokenizerConfig

# Metrics, by hand.


def answers(lists):
    """A retriever that gives these items, query "0", "1", ... of `lists`, padded to k."""

    def retrieve(queries, users, k):
        assert users is None
        ids = np.full((len(queries), k), -1, np.int64)
        for row, query in enumerate(queries):
            found = lists[int(query)][:k]
            ids[row, : len(found)] = found
        return ids, np.zeros(ids.shape, np.float32)

    return retrieve


def judged(relevant):
    return Judgments("judgments.tsv", [str(i) for i in range(len(relevant))], relevant)


OTHERS = list(range(1000, 1100))


@pytest.mark.parametrize(
    ("relevant", "found", "recall10", "recall100", "mrr"),
    [
        ([1], [1], 1, 1, 1),
        ([1], [*OTHERS[:1], 1], 1, 1, 1 / 2),
        ([1], [*OTHERS[:9], 1], 1, 1, 1 / 10),
        ([1], [*OTHERS[:10], 1], 0, 1, 0),
        ([1], [*OTHERS[:99], 1], 0, 1, 0),
        ([1], [*OTHERS[:100], 1], 0, 0, 0),
        ([1], [], 0, 0, 0),
        ([1], OTHERS, 0, 0, 0),
        ([1, 2], [2, 5, 1], 1, 1, 1),
        ([1, 2, 3, 4], [*OTHERS[:3], 4, *OTHERS[3:20], 1, 2], 1 / 4, 3 / 4, 1 / 4),
        (list(range(1, 21)), list(range(1, 21)), 10 / 20, 1, 1),
        ([0], [0], 1, 1, 1),
        ([2**40], [5, 2**40], 1, 1, 1 / 2),
    ],
)
def test_metrics_of_one_query(relevant, found, recall10, recall100, mrr):
    result = evaluate(answers([found]), judged([relevant]))
    assert result == pytest.approx({"recall@10": recall10, "recall@100": recall100, "mrr@10": mrr})


def test_metrics_are_averaged_over_queries_and_no_answer_counts_as_0():
    relevant = [[1], [2], [3], [4, 5]]
    found = [[1], [], [9, 3], [*OTHERS[:10], 4]]
    result = evaluate(answers(found), judged(relevant))
    assert result["recall@10"] == pytest.approx((1 + 0 + 1 + 0) / 4)
    assert result["recall@100"] == pytest.approx((1 + 0 + 1 + 1 / 2) / 4)
    assert result["mrr@10"] == pytest.approx((1 + 0 + 1 / 2 + 0) / 4)


def test_all_queries_are_asked_however_many():
    relevant = [[i] for i in range(150)]
    found = [[i] if i % 3 else [] for i in range(150)]
    assert evaluate(answers(found), judged(relevant))["recall@10"] == pytest.approx(100 / 150)


def test_format_table():
    text = format_table({"bm25": dict.fromkeys(MEASURES, 0.12345), "server:a:1/m": dict.fromkeys(MEASURES, 1.0)})
    lines = text.splitlines()
    assert lines[0].split() == ["system", *MEASURES]
    assert lines[1].split() == ["bm25", "0.123", "0.123", "0.123"]
    assert lines[2].split() == ["server:a:1/m", "1.000", "1.000", "1.000"]
    assert len({len(line) for line in lines}) == 1, "columns stand under their names"


# BM25.

TITLES = [
    "red running shoes",
    "Red shoes, red laces",
    "blue running shorts",
    "红色 跑鞋",
    "红色 手机壳 iPhone 红色",
    "running running running shoes shoes",
    "",
    "3/4 in. hex bolt 3/4",
    "shoes",
]
IDS = [50, 10, 40, 20, 90, 30, 60, 80, 70]


def bm25(query, titles=TITLES, ids=IDS, k1=1.2, b=0.75):
    """Items with a score above 0 and their scores, best first; Lucene's idf and term weight, term by term."""
    tokenizer = Tokenizer(TokenizerConfig(letter_trigrams=False))
    documents = [tokenizer.tokenize(title) for title in titles]
    mean = sum(map(len, documents)) / len(documents)
    scored = []
    for item, document in zip(ids, documents, strict=True):
        score = 0.0
        for term in tokenizer.tokenize(query):
            holding = sum(term in other for other in documents)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            frequency = document.count(term)
            score += idf * frequency / (frequency + k1 * (1 - b + b * len(document) / mean))
        if score > 0:
            scored.append((-score, item))
    return [(item, -score) for score, item in sorted(scored)]


QUERIES = [
    "red",
    "RED SHOES",
    "running shoes",
    "running running shoes",
    "红色",
    "红色 跑鞋",
    "跑",
    "iphone 手机",
    "bolt 3/4",
    "shoes unheard",
]


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (0.9, 0.4)])
def test_bm25_equals_its_definition(query, k1, b):
    ids, scores = Bm25(np.array(IDS), TITLES, k1, b)([query], None, 9)
    expected = bm25(query, k1=k1, b=b)
    assert 0 < len(expected) < 9
    assert ids[0, : len(expected)].tolist() == [item for item, _ in expected]
    np.testing.assert_allclose(scores[0, : len(expected)], [score for _, score in expected], rtol=1e-5)
    assert (ids[0, len(expected) :] == -1).all() and (scores[0, len(expected) :] == -np.inf).all()


def test_bm25_shapes_types_and_batches():
    retriever = Bm25(np.array(IDS), TITLES)
    for k in (1, 3, 9, 50):
        ids, scores = retriever(QUERIES, None, k)
        assert ids.shape == scores.shape == (len(QUERIES), k)
        assert (ids.dtype, scores.dtype) == (np.int64, np.float32)
        for query, row, row_scores in zip(QUERIES, ids.tolist(), scores, strict=True):
            expected = bm25(query, k1=1.2, b=0.75)[:k]
            assert row == [item for item, _ in expected] + [-1] * (k - len(expected))
            np.testing.assert_allclose(row_scores[: len(expected)], [score for _, score in expected], rtol=1e-5)
    assert retriever([], None, 3)[0].shape == (0, 3)


@pytest.mark.parametrize("query", ["", "   ", "unheard", "!!!", "鞋子"])
def test_bm25_finds_nothing(query):
    ids, scores = Bm25(np.array(IDS), [title for title in TITLES if "鞋" not in title] + ["x"] * 1)([query], None, 4)
    assert (ids == -1).all() and (scores == -np.inf).all()


@pytest.mark.parametrize("k", [1, 3, 5, 20, 40])
def test_bm25_breaks_ties_by_id_also_where_k_cuts(k):
    ids = np.random.default_rng(0).permutation(40)
    found, _ = Bm25(ids, ["red shoes"] * 40)(["red"], None, k)
    assert found[0].tolist() == list(range(k))


def test_bm25_of_titles_without_words():
    ids, _ = Bm25(np.array([1, 2]), ["", "!!!"])(["red"], None, 2)
    assert (ids == -1).all()


# Judgments.

ROWS = [
    {"query": "red shoes", "item": 30, "grade": 3.0},
    {"query": "red shoes", "item": 20, "grade": 2.0},
    {"query": "红鞋", "item": 70, "grade": 2.5},
    {"query": "red shoes", "item": 30, "grade": 1.0},
    {"query": "red shoes", "item": 10, "grade": 3.0},
    {"query": 'bolt 3/4"', "item": 50, "grade": 1.0},
]


def judgments_file(path, rows=ROWS, suffix=".tsv"):
    file = path / f"judgments{suffix}"
    file.write_bytes(encode_table(rows, suffix))
    return file


def read(path, relevant_from=2.5):
    return Judgments.read(path, "query", "item", "grade", relevant_from)


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet", ".tsv.gz"])
def test_judgments(tmp_path, suffix):
    judgments = read(judgments_file(tmp_path, suffix=suffix))
    assert judgments.queries == ["red shoes", "红鞋"], "queries without a relevant item are left out"
    assert judgments.relevant == [[10, 30], [70]], "one good judgment of an item is enough"
    assert read(judgments_file(tmp_path, suffix=suffix), 1.0).relevant == [[10, 20, 30], [70], [50]]


def test_a_missing_grade_is_not_relevant(tmp_path):
    rows = [{"query": "a", "item": 1, "grade": None}, {"query": "b", "item": 2, "grade": 1}]
    assert read(judgments_file(tmp_path, rows), 0.0).queries == ["b"]


def test_nothing_relevant(tmp_path):
    file = judgments_file(tmp_path)
    with pytest.raises(CommandError, match=f"{file}: no grade in column grade is 9 or more.*--relevant_from"):
        read(file, 9)


@pytest.mark.parametrize(
    ("rows", "fragments"),
    [
        ([{"query": "a", "item": "A-1", "grade": 1}], ["A-1", "item"]),
        ([{"query": "a", "item": 1, "grade": "good"}], ["good", "grade"]),
        ([{"query": "a", "item": 1.5, "grade": 1}], ["1.5", "item"]),
        ([{"query": "a", "item": None, "grade": 1}, {"query": "a", "item": 1, "grade": 1}], ["item"]),
        ([{"query": "a", "item": {"id": 1}, "grade": 1}], ["item"]),
    ],
)
def test_values_of_the_wrong_kind(tmp_path, rows, fragments):
    file = judgments_file(tmp_path, rows, ".jsonl")
    with pytest.raises(CommandError) as caught:
        read(file, 1)
    for fragment in [str(file), *fragments]:
        assert fragment in str(caught.value), str(caught.value)


def test_unknown_items(tmp_path):
    judgments = read(judgments_file(tmp_path), 1.0)
    judgments.check_items(np.array([10, 20, 30, 50, 70, 90]))
    with pytest.raises(CommandError) as caught:
        judgments.check_items(np.array([20, 30, 90]))
    text = str(caught.value)
    assert "judgments.tsv: 3 of 5 relevant items are not in the store, first 10, 50, 70" in text


# The command.


@pytest.fixture
def flags(store, tmp_path):
    return ["evaluate", f"--store={store.path}", f"--judgments={judgments_file(tmp_path)}", "--relevant_from=2.5"]


def test_command(dpsr, flags, store, tmp_path):
    outcome = dpsr(*flags, "--system=bm25", f"--json={tmp_path / 'figures.json'}").succeeds()
    figures = json.loads((tmp_path / "figures.json").read_text())
    expected = evaluate(Bm25(store.items()["id"], store.titles()), read(tmp_path / "judgments.tsv"))
    assert figures == {"queries": 2, "systems": {"bm25": pytest.approx(expected)}}
    assert f"{tmp_path / 'judgments.tsv'}: 2 queries with a relevant item, 7 items" in outcome.out
    row = next(line.split() for line in outcome.out.splitlines() if line.startswith("bm25"))
    assert [float(value) for value in row[1:]] == pytest.approx(list(expected.values()), abs=5e-4)
    # "red shoes" finds 30 but not 10, 红鞋 finds 70: by hand.
    assert expected == pytest.approx({"recall@10": 0.75, "recall@100": 0.75, "mrr@10": 1.0})


def test_column_flags(dpsr, store, tmp_path):
    rows = [{"text": row["query"], "sku": row["item"], "stars": row["grade"]} for row in ROWS]
    file = judgments_file(tmp_path, rows, ".csv")
    flags = ["evaluate", f"--store={store.path}", f"--judgments={file}", "--system=bm25"]
    columns = ["--query_column=text", "--item_column=sku", "--grade_column=stars"]
    assert "3 queries with a relevant item" in dpsr(*flags, *columns).succeeds().out
    dpsr(*flags).fails(1, f"{file}: has no column query, item, grade; its columns are text, sku, stars")
    dpsr(*flags, *columns[:2]).fails(1, "has no column grade; its columns are text, sku, stars", "--grade_column")


def test_unknown_items_end_the_command(dpsr, store, tmp_path):
    file = judgments_file(tmp_path, [*ROWS, {"query": "x", "item": 12345, "grade": 3}])
    flags = ["evaluate", f"--store={store.path}", f"--judgments={file}", "--system=bm25"]
    dpsr(*flags).fails(1, f"{file}: 1 of 6 relevant items are not in the store, first 12345")


@pytest.mark.parametrize(
    "system", ["bm26", "", "server", "server:", "server:localhost:1", "server:/model", "server:localhost:1/", "bm25:x"]
)
def test_bad_systems(dpsr, flags, system):
    dpsr(*flags, f"--system={system}").fails(2, f"--system={system}: expected bm25 or server:HOST:PORT/MODEL")


def test_a_bad_system_is_found_before_any_is_asked(dpsr, flags, capfd):
    dpsr(*flags, "--system=bm25", "--system=bm26").fails(2, "--system=bm26")
    assert cli.main([*flags, "--system=bm25", "--system=bm26"]) == 2
    assert "ask bm25" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_server_that_is_not_there(dpsr, flags):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: nobody else can have the port
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        dpsr(*flags, f"--system=server:{address}/demo").fails(1, address)


@pytest.mark.parametrize(
    ("change", "status", "fragment"),
    [
        ({"--judgments": None}, 2, "--judgments is missing"),
        ({"--store": None}, 2, "--store is missing"),
        ({"--system": None}, 2, "--system is missing, expected at least one of: bm25, server:HOST:PORT/MODEL"),
        ({"--judgments": "none.tsv"}, 2, "none.tsv: no such file"),
        ({"--judgments": "."}, 2, "judgments"),  # a directory: which of its files?
        ({"--store": "none"}, 1, "none: holds no store"),
        ({"--relevant_from": "high"}, 2, "--relevant_from=high"),
        ({"--relevant_from": "9"}, 1, "no grade in column grade is 9 or more"),
        ({"--json": "no/folder/figures.json"}, 1, "no/folder/figures.json"),
        ({"extra": ""}, 2, "unexpected argument"),
    ],
)
def test_usage_errors(dpsr, store, tmp_path, monkeypatch, change, status, fragment):
    monkeypatch.chdir(tmp_path)
    judgments_file(tmp_path)
    values = {"--judgments": "judgments.tsv", "--store": str(store.path), "--system": "bm25"} | change
    dpsr("evaluate", *(f"{name}={value}" for name, value in values.items() if value is not None)).fails(
        status, fragment
    )


def test_messages_name_the_flag_that_is_wrong(dpsr, store):
    outcome = dpsr("evaluate", f"--store={store.path}", "--judgments=none.tsv", "--system=bm25")
    outcome.fails(2, "none.tsv: no such file", "--judgments")
    assert "schema" not in outcome.errors[0] and "--input" not in outcome.errors[0]


def test_make_retriever(store):
    assert isinstance(make_retriever("bm25", store), Bm25)
    with pytest.raises(UsageError, match="--system=faiss"):
        make_retriever("faiss", store)


def test_bm25_on_the_home_depot_dev_fold(dpsr, homedepot, tmp_path):
    dpsr("ingest", "--adapter=homedepot", f"--input={homedepot}", f"--out={tmp_path / 'store'}").succeeds()
    store = Store(tmp_path / "store")
    judgments = Judgments.read(homedepot / "judgments.dev.tsv", "search_term", "product_uid", "relevance", 2.33)
    judgments.check_items(store.items()["id"])
    assert len(judgments.queries) == 1_156
    figures = evaluate(make_retriever("bm25", store), judgments)
    assert figures["recall@100"] == pytest.approx(0.682, abs=0.005)
    assert figures["mrr@10"] == pytest.approx(0.396, abs=0.005)
