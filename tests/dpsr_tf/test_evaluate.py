"""Judgments, the figures of a system, and the command `dpsr evaluate` with its report."""

from __future__ import annotations

import json
import math
import socket

import numpy as np
import pytest
from conftest import encode_table

from dpsr_common import command_line
from dpsr_common.errors import CommandError, UsageError
from dpsr_tf.data.store import Store
from dpsr_tf.data.user_requests import User
from dpsr_tf.evaluation.baselines import Bm25, Field, Popularity, Random
from dpsr_tf.evaluation.corpus import Corpus
from dpsr_tf.evaluation.judgments import FOLDS, Judgments, fold_of
from dpsr_tf.evaluation.measure import Options, evaluate, measure_all
from dpsr_tf.evaluation.result_tables import format_report
from dpsr_tf.evaluation.systems import Systems


def answers(lists, scores=None, personal=False):
    """Returns a retriever that answers query "0", "1", ... with these items, padded to k."""

    def retrieve(queries, users, k):
        retrieve.asked.append((list(queries), users))
        ids, found = np.full((len(queries), k), -1, np.int64), np.zeros((len(queries), k), np.float32)
        for row, query in enumerate(queries):
            mine = lists[int(query)][:k]
            ids[row, : len(mine)] = mine
            if scores:
                found[row, : len(mine)] = scores[int(query)]
        return ids, found

    retrieve.asked, retrieve.personal = [], personal
    return retrieve


def judged(relevant, **more):
    return Judgments("judgments.tsv", [str(i) for i in range(len(relevant))], relevant, **more)


def corpus(count=10, **more):
    return Corpus(np.arange(count), [f"title {i}" for i in range(count)], np.arange(count, dtype=np.float32), **more)


FEW = Options(ks=(1, 3), bootstrap=50, latency_queries=2)


# The figures of one system.


def test_evaluate_averages_over_queries():
    found = evaluate(answers([[1], [], [9, 3], [8]]), judged([[1], [2], [3], [4, 5]]), (1, 2))
    assert found["recall@2"] == pytest.approx(2 / 4)
    assert found["recall@1"] == pytest.approx(1 / 4)
    assert found["mrr@2"] == pytest.approx((1 + 1 / 2) / 4)
    assert set(found) == {f"{name}@{k}" for name in ("recall", "precision", "mrr", "ndcg") for k in (1, 2)}


def test_all_queries_are_asked_however_many():
    relevant = [[i] for i in range(700)]
    found = evaluate(answers([[i] if i % 3 else [] for i in range(700)]), judged(relevant))
    assert found["recall@10"] == pytest.approx(466 / 700)


def test_a_query_of_many_users_is_asked_once_unless_the_system_is_personal():
    judgments = Judgments("j", ["0", "1", "0"], [[1], [2], [3]], users=[User(5, 9), User(6), User(7)])
    plain, personal = answers([[1], [2]]), answers([[1], [2]], personal=True)
    for retriever in (plain, personal):
        assert evaluate(retriever, judgments, (1,))["recall@1"] == pytest.approx(2 / 3)
    assert plain.asked == [(["0", "1"], None)]
    assert personal.asked == [(["0", "1", "0"], judgments.users)]


def test_coverage_popularity_and_empty_answers():
    retriever = answers([[9, 8, 0], [9], [], [4, 4, 77]])
    report = measure_all({"a": retriever}, judged([[1], [1], [1], [1]]), corpus(), FEW)
    figures = report["systems"]["a"]
    assert figures["coverage@1"] == 2 / 10 and figures["coverage@3"] == 4 / 10
    # Popularity of item i is i: its percentile (i + 0.5) / 10.
    assert figures["popularity@1"] == pytest.approx((0.95 + 0.95 + 0.45) / 3)
    assert figures["popularity@3"] == pytest.approx((0.95 + 0.85 + 0.05 + 0.95 + 0.45) / 5)
    assert figures["empty_answers"] == 1 / 4
    assert report["notes"]["a"][:2] == [
        "1 results that are not items of the store, counted as wrong",
        "1 results that repeat an item of the same answer, counted as wrong",
    ]


def test_nan_scores_are_noted_and_no_results():
    retriever = answers([[1, 2]], scores=[[math.nan, 1.0]])
    report = measure_all({"a": retriever}, judged([[1, 2]]), corpus(), FEW)
    assert report["systems"]["a"]["recall@3"] == 0.5
    assert "1 results whose score is NaN, counted as wrong" in report["notes"]["a"]


def test_a_system_that_finds_nothing():
    report = measure_all({"a": answers([[], []])}, judged([[1], [2]]), corpus(), FEW)
    figures = report["systems"]["a"]
    assert figures["recall@3"] == figures["ndcg@3"] == figures["coverage@3"] == 0
    assert math.isnan(figures["popularity@3"]) and figures["empty_answers"] == 1


def test_top_k_of_a_system_that_cannot_tell_items_apart_is_k_of_1024():
    judgments = judged([[1, 5], [2]], grades=[{1: 1.0, 5: 1.0, 6: 0.0}, {2: 1.0}])
    report = measure_all({"random": Random(np.arange(3000))}, judgments, corpus(3000), FEW)
    figures = report["systems"]["random"]
    assert (figures["top-1"], figures["top-10"]) == pytest.approx((1 / 1024, 10 / 1024))
    assert figures["auc"] == 0.5


def test_top_k_of_one_that_can():
    popular = Popularity(np.arange(3000), np.arange(3000))
    report = measure_all({"popularity": popular}, judged([[2999, 0], [1500]]), corpus(3000), FEW)
    # The best item is always first, the worst never, one in the middle neither.
    assert report["systems"]["popularity"]["top-1"] == pytest.approx((1 / 2 + 0) / 2)
    assert report["notes"]["popularity"] == ["no AUC: every judged item is relevant"]


def test_what_cannot_be_measured_is_said():
    report = measure_all({"a": answers([[1]]), "random": Random(np.arange(10))}, judged([[1]]), corpus(), FEW)
    assert report["notes"]["a"] == ["no top-k and no AUC: the system cannot score given pairs"]
    assert report["notes"]["random"][0].startswith("no top-k: each query needs 1,023 items that are not relevant")
    assert "auc" not in report["systems"]["random"] and "top-1" not in report["systems"]["random"]


def test_auc_takes_the_queries_without_a_relevant_item_too():
    popular = Popularity(np.arange(10), np.arange(10))
    judgments = judged([[5]], grades=[{5: 1.0, 3: 0.0}], unanswered=[("x", None, [9, 8, 1])])
    report = measure_all({"a": popular}, judgments, corpus(), FEW)
    assert report["systems"]["a"]["auc"] == pytest.approx(2 / 4)
    assert report["intervals"]["a"]["auc"][0] <= 0.5 <= report["intervals"]["a"]["auc"][1]


def test_slices_are_means_over_their_queries():
    slices = {"kind": [("easy",), ("hard",), ("easy", "hard"), ("easy",)]}
    judgments = judged([[1], [2], [3], [4]], slices=slices, grades=[{i: 1.0, 9: 0.0} for i in (1, 2, 3, 4)])
    popular = Popularity(np.arange(10), np.array([0, 9, 1, 8, 1, 0, 0, 0, 0, 5]))
    report = measure_all({"a": answers([[1], [9], [3], []]), "b": popular}, judgments, corpus(), FEW)
    easy, hard = (report["slices"]["kind"][value] for value in ("easy", "hard"))
    assert (easy["queries"], hard["queries"]) == (3, 2)
    assert easy["systems"]["a"]["recall@1"] == pytest.approx(2 / 3)
    assert hard["systems"]["a"]["recall@1"] == pytest.approx(1 / 2)
    assert report["systems"]["a"]["recall@1"] == pytest.approx(2 / 4)
    assert easy["systems"]["b"]["auc"] == pytest.approx(2 / 3) and hard["systems"]["b"]["auc"] == pytest.approx(1 / 2)
    assert easy["intervals"]["a"]["recall@1"][1] <= 1


def test_comparison_is_with_the_first_and_query_by_query():
    judgments = judged([[i] for i in range(5)], grades=[{i: 1.0, 9: 0.0} for i in range(5)])
    none, all_ = answers([[]] * 5), answers([[i] for i in range(5)])
    report = measure_all({"none": none, "all": all_, "random": Random(np.arange(10))}, judgments, corpus(), FEW, True)
    assert [(one["system"], one["baseline"]) for one in report["comparisons"]] == [("all", "none"), ("random", "none")]
    one = report["comparisons"][0]["figures"]["recall@1"]
    assert (one["difference"], one["interval"]) == (1, [1, 1])
    assert "auc" not in report["comparisons"][0]["figures"]


def test_comparison_of_auc():
    judgments = judged([[4], [6]], grades=[{4: 1.0, 3: 0.0}, {6: 1.0, 5: 0.0}])
    up, down = Popularity(np.arange(10), np.arange(10)), Popularity(np.arange(10), -np.arange(10))
    report = measure_all({"down": down, "up": up}, judgments, corpus(), FEW, True)
    one = report["comparisons"][0]["figures"]["auc"]
    assert (report["systems"]["up"]["auc"], report["systems"]["down"]["auc"]) == (3 / 4, 1 / 4)
    # A sample of one of the queries alone: all right or all wrong.
    assert (one["difference"], one["interval"]) == (pytest.approx(1 / 2), [0.5, 1])
    assert one["p_t_test"] is None


def test_the_same_seed_gives_the_same_figures():
    judgments = judged([[i, i + 7] for i in range(40)])

    def figures(seed):
        retriever = Popularity(np.arange(3000), -np.arange(3000))
        options = Options(bootstrap=30, latency_queries=0, seed=seed)
        report = measure_all({"p": retriever}, judgments, corpus(3000), options)
        del report["systems"]["p"]["queries_per_second"]
        return report

    assert figures(1) == figures(1)
    assert figures(1)["systems"]["p"]["top-10"] != figures(2)["systems"]["p"]["top-10"]


def test_frequencies():
    counts = {"a": 50, "b": 30, "c": 30, "d": 20, "e": 10, "f": 10, "g": 0}
    log = corpus(query_counts=counts)
    # Thirds of 150: a reaches 50; b and c, never parted, 110.
    assert log.frequencies(["a", "b", "c", "d", "e", "g", "new", " a "]) == [
        "head", "torso", "torso", "tail", "tail", "unseen", "unseen", "head",
    ]  # fmt: skip
    assert corpus(query_counts={"a": 3, "b": 3}).frequencies(["a", "b"]) == ["head", "head"]
    assert corpus().frequencies(["a"]) == ["unseen"]


def test_popularity_percentiles():
    log = Corpus(np.arange(4), [""] * 4, np.array([0, 0, 7, 3], np.float32))
    assert log.popularity_percentiles().tolist() == [0.25, 0.25, 0.875, 0.625]


def test_format_report():
    judgments = judged([[1], [2]], slices={"kind": [("easy",), ("hard",)]}, grades=[{1: 1.0, 3: 0.0}, {2: 1.0}])
    systems = {"a": answers([[1], [9]]), "random": Random(np.arange(10))}
    report = measure_all(systems, judgments, corpus(), FEW, True) | {"settings": {"ks": (1, 3), "bootstrap": 50}}
    text = format_report(report)
    blocks = text.split("\n\n")
    lines = blocks[0].splitlines()
    assert lines[0].split() == ["system", "recall@1", "recall@3", "mrr@1", "ndcg@1", "top-1", "top-10", "auc"]
    assert lines[1].split() == ["a", "0.500", "0.500", "0.500", "0.500", "-", "-", "-"]
    assert lines[2].split()[:2] == ["a", "+-"] and float(lines[2].split()[2]) == pytest.approx(0.5, abs=0.01)
    assert lines[3].split()[0] == "random" and lines[3].split()[-1] == "0.500"
    assert len({len(line) for line in lines[:-1]}) == 1, "columns stand under their names"
    assert any(block.startswith("kind  queries  share  system") for block in blocks)
    assert any(block.startswith("random minus a, query by query") for block in blocks)
    assert blocks[-1].splitlines()[0] == "a: no top-k and no AUC: the system cannot score given pairs"


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


def test_users_and_slices(tmp_path):
    rows = [
        {"query": "a", "item": 1, "grade": 2, "who": 5, "kind": "x"},
        {"query": "a", "item": 2, "grade": 0, "who": 5, "kind": "never"},
        {"query": "a", "item": 3, "grade": 2, "who": -1, "kind": "y"},
        {"query": "a", "item": 4, "grade": 1, "who": -1, "kind": ""},
        {"query": "b", "item": 4, "grade": 0, "who": 5, "kind": "x"},
    ]
    file = judgments_file(tmp_path, rows)
    judgments = Judgments.read(file, "query", "item", "grade", 1, user="who", slices=["kind"])
    assert judgments.queries == ["a", "a"] and judgments.users == [User(5), User(-1)]
    assert judgments.relevant == [[1], [3, 4]]
    assert judgments.grades == [{1: 2.0, 2: 0.0}, {3: 2.0, 4: 1.0}]
    assert judgments.slices == {"kind": [("x",), ("y", "")]}
    assert judgments.unanswered == [("b", User(5), [4])]
    plain = Judgments.read(file, "query", "item", "grade", 1)
    assert (plain.queries, plain.users, plain.relevant) == (["a"], None, [[1, 3, 4]])
    assert plain.unanswered == [("b", None, [4])]


def test_a_query_of_a_user_is_as_of_its_first_time(tmp_path):
    rows = [
        {"query": "a", "item": item, "grade": 1, "who": who, "when": when}
        for item, who, when in [(1, "ann", 900), (2, "ann", 700), (3, "bob", 800), (4, "new", 600)]
    ]
    file = judgments_file(tmp_path, rows)
    judgments = Judgments.read(
        file, "query", "item", "grade", 1, user="who", time="when", user_keys={"ann": 2**60, "bob": 0}
    )
    assert judgments.users == [User(2**60, 700), User(0, 800), User(-1, 600)]
    with pytest.raises(CommandError, match="column who"):
        Judgments.read(file, "query", "item", "grade", 1, user="who")
    file = judgments_file(tmp_path, [rows[0] | {"who": 5, "when": 1_700_000_000_000}])
    with pytest.raises(CommandError, match=r"has the number 1\.7e\+12, expected 0 to 4\.29497e\+09"):
        Judgments.read(file, "query", "item", "grade", 1, user="who", time="when")


def test_no_grade_column_makes_every_row_relevant(tmp_path):
    judgments = Judgments.read(judgments_file(tmp_path), "query", "item", "", 2.5)
    assert judgments.relevant == [[10, 20, 30], [70], [50]]


def test_text_ids(tmp_path):
    rows = [{"query": "a", "item": key, "grade": 1} for key in ("A-1", "B-2", "no", "007")]
    judgments = Judgments.read(
        judgments_file(tmp_path, rows), "query", "item", "grade", 1, item_keys={"A-1": 7, "B-2": 2**62, "007": 0}
    )
    assert judgments.relevant[0][1:] == [0, 7, 2**62]
    with pytest.raises(CommandError, match="1 of 4 relevant items are not in the store, first no; "):
        judgments.check_items(np.array([7, 2**62, 0]))
    kept, dropped = judgments.only_known(np.array([7, 2**62, 0]))
    assert (kept.relevant, dropped) == ([[0, 7, 2**62]], 1)


def test_white_space_around_text_ids_does_not_count(tmp_path):
    rows = [{"query": "a", "item": key, "grade": 1, "who": " ann\t"} for key in (" A-1", "B-2 ")]
    keys = {"item_keys": {"A-1": 7, "B-2": 8}, "user_keys": {"ann": 5}}
    file = judgments_file(tmp_path, rows, ".jsonl")
    judgments = Judgments.read(file, "query", "item", "grade", 1, user="who", **keys)
    assert judgments.relevant == [[7, 8]]
    assert judgments.users == [User(5)]


def test_only_known_drops_queries_that_are_left_without_a_relevant_item(tmp_path):
    kept, dropped = read(judgments_file(tmp_path), 2.5).only_known(np.array([10, 20, 50]))
    assert (kept.queries, kept.relevant, kept.grades) == (["red shoes"], [[10]], [{20: 2.0, 10: 3.0}])
    assert dropped == 2
    with pytest.raises(CommandError, match="no relevant item is in the store"):
        read(judgments_file(tmp_path), 2.5).only_known(np.array([1]))


def test_a_table_of_queries_renames_and_slices(tmp_path):
    judgments = read(judgments_file(tmp_path), 2.5)
    table = [
        {"as_typed": "红鞋", "meant": "红色 跑鞋", "kind": "gap"},
        {"as_typed": "red shoes", "meant": "red shoe", "kind": "plain"},
        {"as_typed": "other", "meant": "x", "kind": "x"},
    ]
    path = tmp_path / "queries.tsv"
    path.write_bytes(encode_table(table, ".tsv"))
    with pytest.raises(
        CommandError, match=r"judgments.tsv: 1 of 3 queries are not in .*, first 'bolt 3/4\"'; .*--key_column"
    ):
        judgments.with_queries(path, "as_typed", "meant", ["kind"])
    path.write_bytes(encode_table([*table, {"as_typed": 'bolt 3/4"', "meant": "bolt", "kind": "plain"}], ".tsv"))
    joined = judgments.with_queries(path, "as_typed", "meant", ["kind"])
    assert joined.queries == ["red shoe", "红色 跑鞋"] and joined.relevant == judgments.relevant
    assert joined.slices == {"kind": [("plain",), ("gap",)]}
    assert joined.unanswered == [("bolt", None, [50])]
    assert judgments.with_queries(path, "as_typed", "", []).queries == judgments.queries
    with pytest.raises(CommandError, match=r"has no column query; .*--key_column"):
        judgments.with_queries(path, "query", "", [])
    with pytest.raises(UsageError, match=r"--queries=.*: no such file"):
        judgments.with_queries(tmp_path / "no.tsv", "query", "", [])


def test_sample():
    judgments = judged([[i] for i in range(100)], slices={"s": [(str(i),) for i in range(100)]}, users=[User(1)] * 100)
    found = judgments.sample(20, 3)
    assert len(found.queries) == len(found.users) == 20
    assert [[int(text)] for text in found.queries] == found.relevant == [[int(v[0])] for v in found.slices["s"]]
    assert found.relevant == sorted(found.relevant)
    assert found == judgments.sample(20, 3) != judgments.sample(20, 4)
    assert judgments.sample(100, 3) is judgments
    more = judged([[i] for i in range(100)], unanswered=[(f"x{i:02}", None, [i]) for i in range(31)])
    some = more.sample(20, 3)
    assert some.queries == found.queries, "the same ones as without others"
    assert len(some.unanswered) == 7, "a fifth, rounded up"
    texts = [text for text, _, _ in some.unanswered]
    assert texts == sorted(set(texts)) and set(texts) <= {text for text, _, _ in more.unanswered}


def test_unknown_items(tmp_path):
    judgments = read(judgments_file(tmp_path), 1.0)
    judgments.check_items(np.array([10, 20, 30, 50, 70, 90]))
    with pytest.raises(CommandError) as caught:
        judgments.check_items(np.array([20, 30, 90]))
    text = str(caught.value)
    assert "judgments.tsv: 3 of 5 relevant items are not in the store, first 10, 50, 70; " in text


# The command.


@pytest.fixture
def flags(store, tmp_path):
    return ["evaluate", f"--store={store.path}", f"--judgments={judgments_file(tmp_path)}", "--relevant_from=2.5"]


def figures(path):
    return json.loads(path.read_text())


def test_command(dpsr, flags, store, tmp_path):
    outcome = dpsr(*flags, "--system=bm25", f"--json={tmp_path / 'figures.json'}").succeeds()
    found = figures(tmp_path / "figures.json")
    assert found["queries"] == 2 and found["items"] == 7
    assert found["settings"]["seed"] == 1 and found["settings"]["relevant_from"] == 2.5
    assert found["versions"]["numpy"] == np.__version__
    bm25 = found["systems"]["bm25"]
    texts = [" ".join(parts) for parts in zip(*store.texts().values(), strict=True)]
    expected = evaluate(Bm25(store.items()["id"], [Field(texts)]), read(tmp_path / "judgments.tsv"))
    assert {name: bm25[name] for name in expected} == pytest.approx(expected)
    # "red shoes" finds 30 but not 10, 红鞋 finds 70: by hand.
    assert (bm25["recall@10"], bm25["mrr@10"]) == pytest.approx((0.75, 1.0))
    assert set(found["intervals"]["bm25"]) >= {"recall@10", "auc"}
    assert bm25["latency_ms_p99"] >= bm25["latency_ms_p50"] > 0
    assert f"{tmp_path / 'judgments.tsv'}: 2 queries with a relevant item, 7 items" in outcome.out
    assert "left out: 1 queries without a relevant item (they count for AUC only)" in outcome.out
    row = next(line.split() for line in outcome.out.splitlines() if line.startswith("bm25"))
    assert [float(value) for value in row[1:3]] == pytest.approx([0.75, 0.75])


def test_several_systems_slices_and_a_comparison(dpsr, flags, store, tmp_path):
    systems = ["bm25", "bm25-bigrams", "popularity", "random", "rrf(bm25,popularity)", "weighted(bm25:2,random:1)"]
    queries = tmp_path / "queries.csv"
    rows = [{"query": row["query"], "kind": "zh" if "鞋" in row["query"] else "en"} for row in ROWS]
    queries.write_bytes(encode_table(rows, ".csv"))
    more = ["--slice=frequency", f"--queries={queries}", "--query_slice=kind", "--compare", "--k=1,7", "--bootstrap=20"]
    out = tmp_path / "figures.json"
    text = dpsr(*flags, *(f"--system={system}" for system in systems), *more, f"--json={out}").succeeds().out
    found = figures(out)
    assert list(found["systems"]) == systems
    assert found["settings"]["ks"] == [1, 7]
    assert set(found["slices"]["kind"]) == {"en", "zh"}
    assert found["slices"]["kind"]["zh"]["systems"]["bm25"]["recall@1"] == 1
    assert [part["share"] for part in found["slices"]["kind"].values()] == [0.5, 0.5]
    assert found["slices"]["frequency"]["head"]["queries"] + sum(
        part["queries"] for name, part in found["slices"]["frequency"].items() if name != "head"
    ) == 2  # fmt: skip
    assert found["systems"]["popularity"]["recall@7"] == found["systems"]["random"]["recall@7"] == 1
    assert [one["system"] for one in found["comparisons"]] == systems[1:]
    assert "popularity minus bm25, query by query" in text


def test_ask_column(dpsr, flags, tmp_path):
    queries = tmp_path / "queries.tsv"
    rows = [{"query": row["query"], "meant": "blue"} for row in ROWS]
    queries.write_bytes(encode_table(rows, ".tsv"))
    out = tmp_path / "figures.json"
    dpsr(*flags, "--system=bm25", f"--queries={queries}", "--ask_column=meant", f"--json={out}").succeeds()
    assert figures(out)["systems"]["bm25"]["recall@10"] == 0


def test_held_out(dpsr, shop, tmp_path):
    shop.schema["interactions"]["held_out"] = {"query_share": 0.5}
    dpsr(*shop.write().flags(tmp_path / "store")).succeeds()
    store = Store(tmp_path / "store")
    judgments = Judgments.of_held_out(store, "all")
    good = {(row["query"].strip(), row["user_id"]): [] for row in shop.log if row["label"] == 2}
    for row in shop.log:
        if row["label"] == 2 and row["item_id"] not in good[row["query"].strip(), row["user_id"]]:
            good[row["query"].strip(), row["user_id"]].append(row["item_id"])
    asked = list(zip(judgments.queries, [user.id for user in judgments.users], strict=True))
    assert 0 < len(asked) < len(good) and len(set(asked)) == len(asked)
    assert judgments.relevant == [sorted(good[one]) for one in asked]
    assert sum(map(len, judgments.relevant)) == store.counts.held_out
    out = tmp_path / "figures.json"
    flags = ["evaluate", f"--store={store.path}", "--held_out", "--fold=all", "--system=bm25", f"--json={out}"]
    dpsr(*flags, "--slice=frequency").succeeds()
    assert figures(out)["queries"] == len(asked)
    assert set(figures(out)["slices"]["frequency"]) == {"unseen"}, "its clicks are not in the training log"
    dpsr(*flags, "--max_queries=1").succeeds()
    assert figures(out)["queries"] == 1
    assert figures(out)["left_out"]["queries that --max_queries did not draw"] == len(asked) - 1
    dpsr(*flags, "--slice=kind").fails(2, "--slice=kind: held-out interactions have no columns, expected frequency")


def test_folds_of_what_is_held_out(dpsr, shop, tmp_path):
    """Validation and test share no query, are all together, and do not depend on the store."""
    shop.log = [row | {"query": f"{row['query'].strip()} {i}"} for i in range(40) for row in shop.log]
    asked = {}
    for share in (0.3, 0.5):
        shop.schema["interactions"]["held_out"] = {"query_share": share}
        dpsr(*shop.write().flags(tmp_path / f"{share}")).succeeds()
        store = Store(tmp_path / f"{share}")
        asked[share] = {fold: Judgments.of_held_out(store, fold).queries for fold in FOLDS}
        validation, test, both = (set(asked[share][fold]) for fold in ("validation", "test", "all"))
        assert not validation & test and validation | test == both
        assert 0.35 < len(test) / len(both) < 0.65, "about half, although a hash of the same text held them out"
    assert set(asked[0.3]["test"]) < set(asked[0.5]["test"]), "what is held out of one store has the same fold"

    out = tmp_path / "figures.json"
    flags = ["evaluate", f"--store={tmp_path / '0.5'}", "--held_out", "--system=bm25", f"--json={out}"]
    for fold in (None, *FOLDS):
        outcome = dpsr(*flags, *([f"--fold={fold}"] if fold else [])).succeeds()
        assert figures(out)["queries"] == len(asked[0.5][fold or "test"]), "test is the default"
        assert figures(out)["settings"]["fold"] == (fold or "test")
        assert "warning" not in outcome.out, "bm25 has no training"


def test_a_fold_without_a_query(dpsr, shop, tmp_path):
    only = next(word for word in ("a", "b", "c", "d", "e", "f", "g") if fold_of(word) == "validation")
    shop.log.append(shop.log[0] | {"query": only, "time": 900})
    shop.log = [{"time": 100} | row for row in shop.log]
    shop.schema["interactions"] |= {"time": "time", "held_out": {"after": "500"}}
    dpsr(*shop.write().flags(tmp_path / "store")).succeeds()
    flags = ["evaluate", f"--store={tmp_path / 'store'}", "--held_out", "--system=bm25"]
    dpsr(*flags).fails(1, "none of the 1 held-out queries is in the fold 'test'", "or give --fold=all")
    dpsr(*flags, "--fold=validation").succeeds()
    dpsr(*flags, "--fold=dev").fails(2, "--fold")


def test_a_store_that_holds_nothing_out(dpsr, store):
    dpsr("evaluate", f"--store={store.path}", "--held_out", "--system=bm25").fails(
        1, "holds no held-out interactions; set `held_out` in the schema"
    )


def test_column_flags(dpsr, store, tmp_path):
    rows = [{"text": row["query"], "sku": row["item"], "stars": row["grade"]} for row in ROWS]
    file = judgments_file(tmp_path, rows, ".csv")
    flags = ["evaluate", f"--store={store.path}", f"--judgments={file}", "--system=bm25"]
    columns = ["--query_column=text", "--item_column=sku", "--grade_column=stars"]
    assert "3 queries with a relevant item" in dpsr(*flags, *columns).succeeds().out
    dpsr(*flags).fails(1, f"{file}: has no column query, item, grade; its columns are text, sku, stars")
    dpsr(*flags, *columns[:2]).fails(1, "has no column grade; its columns are text, sku, stars", "--grade_column")
    dpsr(*flags, *columns, "--slice=kind").fails(1, "has no column kind; its columns are text, sku, stars", "--slice")


def test_unknown_items_end_the_command_or_are_skipped(dpsr, store, tmp_path):
    file = judgments_file(tmp_path, [*ROWS, {"query": "x", "item": 12345, "grade": 3}])
    flags = ["evaluate", f"--store={store.path}", f"--judgments={file}", "--system=bm25"]
    dpsr(*flags).fails(1, f"{file}: 1 of 6 relevant items are not in the store, first 12345", "--skip_unknown")
    out = dpsr(*flags, "--skip_unknown").succeeds().out
    assert "3 queries with a relevant item" in out
    assert "left out: 1 judgments of items that are not in the store" in out


@pytest.mark.parametrize(
    "system", ["bm26", "", "server", "server:", "server:localhost:1", "server:/model", "server:localhost:1/", "bm25:"]
)
def test_bad_systems(dpsr, flags, system):
    dpsr(*flags, f"--system={system}").fails(2, f"--system={system}: expected one of bm25,")


def test_bm25_reads_the_text_that_the_towers_read(dpsr, flags, tmp_path):
    """A query of brands: no title holds them. `bm25-words` stays over titles, as in published figures."""
    rows = ["query\titem\tgrade", "acme\t30\t3", "acme\t20\t3", "hex bolts\t10\t3"]
    (tmp_path / "judgments.tsv").write_text("\n".join(rows) + "\n")
    systems = ["bm25", "bm25-bigrams", "bm25-words", "bm25:stem+brand=1", "bm25:title=1"]
    out = tmp_path / "figures.json"
    dpsr(*flags, *(f"--system={name}" for name in systems), f"--json={out}").succeeds()
    recall = {name: found["recall@10"] for name, found in figures(out)["systems"].items()}
    assert recall == {"bm25": 1, "bm25-bigrams": 1, "bm25-words": 0.5, "bm25:stem+brand=1": 1, "bm25:title=1": 0.5}
    dpsr(*flags, "--system=bm25:color=1").fails(2, "has the column 'color', expected a text column: title, brand")


def test_a_bad_system_is_found_before_any_is_asked(dpsr, flags, capfd):
    dpsr(*flags, "--system=bm25", "--system=bm26").fails(2, "--system=bm26")
    assert command_line.main([*flags, "--system=bm25", "--system=bm26"]) == 2
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
        ({"--judgments": None}, 2, "--judgments is missing; give a table of judged pairs, or --held_out"),
        ({"--fold": "test"}, 2, "--fold=test: needs --held_out"),
        ({"--held_out": "true"}, 2, "--judgments=judgments.tsv: cannot be combined with --held_out"),
        ({"--store": None}, 2, "--store is missing"),
        ({"--system": None}, 2, "--system is missing, expected at least one of: bm25"),
        ({"--judgments": "none.tsv"}, 2, "none.tsv: no such file"),
        ({"--judgments": "."}, 2, "--judgments=.: is not a file"),  # a directory: which of its files?
        ({"--store": "none"}, 1, "none: holds no store"),
        ({"--relevant_from": "high"}, 2, "--relevant_from=high"),
        ({"--relevant_from": "9"}, 1, "no grade in column grade is 9 or more"),
        ({"--json": "no/folder/figures.json"}, 1, "no/folder/figures.json"),
        ({"--k": "8"}, 2, "--k=8: must be at most 7, the number of items in the store"),
        ({"--k": "0,5"}, 2, "--k=0,5: expected cut-offs of 1 or more"),
        ({"--k": "ten"}, 2, "--k=ten: expected cut-offs of 1 or more"),
        ({"--k": ""}, 2, "--k=: expected cut-offs of 1 or more"),
        ({"--compare": "true"}, 2, "--compare needs at least two systems"),
        ({"--ask_column": "x"}, 2, "--queries is missing"),
        ({"--bootstrap": "-1"}, 2, "--bootstrap=-1"),
        ({"--system": "model:none"}, 1, "none: holds no model"),
        ({"--system": "rrf(bm25,nothing)"}, 2, "has 'nothing', expected one of"),
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
    assert not list(tmp_path.glob("*.json*"))


def test_messages_name_the_flag_that_is_wrong(dpsr, store):
    outcome = dpsr("evaluate", f"--store={store.path}", "--judgments=none.tsv", "--system=bm25")
    outcome.fails(2, "none.tsv: no such file", "--judgments")
    assert "schema" not in outcome.errors[0] and "--input" not in outcome.errors[0]


def test_corpus_of_a_store(store):
    found = Corpus.of_store(store)
    assert found.item_ids.tolist() == sorted([30, 10, 70, 50, 20, 90, 2**40])
    assert found.titles[found.item_ids.tolist().index(30)] == "Red running shoes"
    # Positive pairs: 30 three times (one of them twice in the log), 70 once, ...
    assert found.query_counts["红鞋"] == 1 and found.query_counts["red shoes"] >= 2
    assert found.popularity[found.item_ids.tolist().index(30)] >= 2
    assert Systems(found).make("popularity")(["x"], None, 1)[0].tolist() == [[30]]


@pytest.mark.long
def test_bm25_on_the_home_depot_dev_fold(dpsr, homedepot, tmp_path):
    dpsr("ingest", "--adapter=homedepot", f"--input={homedepot}", f"--out={tmp_path / 'store'}").succeeds()
    out = tmp_path / "figures.json"
    columns = ["--query_column=search_term", "--item_column=product_uid", "--grade_column=relevance"]
    file = f"--judgments={homedepot / 'judgments.dev.tsv'}"
    flags = ["evaluate", f"--store={tmp_path / 'store'}", file, *columns, "--relevant_from=2.33", f"--json={out}"]
    dpsr(*flags, "--system=bm25", "--system=bm25-words").succeeds()
    found = figures(out)
    assert found["queries"] == 1_156
    for system in ("bm25", "bm25-words"):
        assert found["systems"][system]["recall@100"] == pytest.approx(0.682, abs=0.005)
        assert found["systems"][system]["mrr@10"] == pytest.approx(0.396, abs=0.005)
        assert found["systems"][system]["top-1"] > 0.5 and found["systems"][system]["auc"] > 0.6
