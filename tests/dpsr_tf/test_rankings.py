"""`dpsr evaluate --rank`: held-out requests and judged lists, systems, folds, calibration, wrong use."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml

from dpsr_tf.data.ranking_features import RankingFeatures
from dpsr_tf.data.store import Store
from dpsr_tf.evaluation.corpus import Corpus
from dpsr_tf.evaluation.features import write_features
from dpsr_tf.evaluation.judgments import fold_of
from dpsr_tf.evaluation.ranking_metrics import ndcg, reciprocal_ranks, session_auc
from dpsr_tf.evaluation.rankings import HeldOutRequests, Rankers

DAY = 86_400
WORDS = ["red", "blue", "green", "shoe", "hat", "coat"]
SCHEMA = {
    "items": {"files": "items.jsonl", "id": "item_id", "text": "title"},
    "users": {"files": "users.jsonl", "id": "user_id"},
    "interactions": {
        "files": "log.jsonl", "query": "query", "item": "item_id", "user": "user_id", "type": "type", "time": "time",
        "position": "position", "held_out": {"last_days": 10},
    },
    "ranking": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A store of 400 requests with 6 items each. Item 1 is ordered most often, and the first positions are."""
    folder = tmp_path_factory.mktemp("rankings")
    rng = np.random.default_rng(3)
    items = [{"item_id": i, "title": f"{WORDS[i % 3]} {WORDS[3 + i % 2]}"} for i in range(1, 13)]
    log = []
    for number in range(400):
        asked = {"query": f"{WORDS[rng.integers(3)]} {WORDS[rng.integers(6)]}", "user_id": int(rng.integers(3))}
        for position, item in enumerate(rng.permutation(12)[:6] + 1, 1):
            liked = rng.random() < 0.6 / position + (0.3 if item == 1 else 0)
            kind = ["click", "cart", "order"][rng.integers(3)] if liked else "impression"
            place = position if rng.random() < 0.95 else None
            log.append(
                asked | {"item_id": int(item), "type": kind, "time": DAY * (20 + number // 20), "position": place}
            )
    users = [{"user_id": i} for i in range(3)]
    for name, rows in (("items", items), ("users", users), ("log", log)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    from dpsr_common.command_line import main

    assert main(["ingest", f"--schema={folder / 'schema.yaml'}", f"--out={folder / 'store'}"]) == 0
    return folder


@pytest.fixture(scope="module")
def store(shop):
    return Store(shop / "store")


def of_store(store, *more):
    return ["evaluate", f"--store={store.path}", "--rank", *more]


def test_figures_are_those_of_the_table_of_features(store, tmp_path, dpsr):
    write_features(store, tmp_path / "test.parquet", "test")
    table = pyarrow.parquet.read_table(tmp_path / "test.parquet")
    request, outcome, position = (table[name].to_numpy() for name in ("request", "outcome", "position"))
    out = tmp_path / "out.json"
    systems = ["--system=shown", "--system=feature:item.30.ctr", "--system=bm25", "--system=random"]
    flags = [*systems, "--held_out", "--compare", "--bootstrap=50", "--k=3,5", f"--json={out}"]
    printed = dpsr(*of_store(store, *flags)).succeeds().out
    report = json.loads(out.read_text())
    assert report["lists"] == len(np.unique(request)) and report["items"] == len(request)
    assert report["settings"] | {"fold": "test", "positive": "order", "ks": [3, 5]} == report["settings"]
    for spec, score in (
        ("shown", -np.where(position > 0, position, 256).astype(float)),
        ("feature:item.30.ctr", table["item.30.ctr"].to_numpy().astype(float)),
        ("random", np.zeros(len(request))),
    ):
        found = report["systems"][spec]
        expected = {
            "session_auc": session_auc(request, outcome == 3, score),
            "ndcg@3": ndcg(request, 2.0**outcome - 1, score, 3),
            "ndcg@5": ndcg(request, 2.0**outcome - 1, score, 5),
            "mrr": reciprocal_ranks(request, outcome == 3, score),
        }
        assert found | {name: pytest.approx(values.mean()) for name, values in expected.items()} == found, spec
        assert {name: report["counts"][name] for name in expected} == {n: len(v) for n, v in expected.items()}
        low, high = report["intervals"][spec]["ndcg@5"]
        assert low <= found["ndcg@5"] <= high
    # The curve comes from the other half of the queries: scores that tell nothing give the base rate.
    assert abs(report["systems"]["random"]["log_loss_gain"]) < 1e-9
    assert report["systems"]["shown"]["log_loss_gain"] > 0.02 and report["systems"]["shown"]["ece"] < 0.1
    assert [c["system"] for c in report["comparisons"]] == [spec.partition("=")[2] for spec in systems[1:]]
    compared = report["comparisons"][-1]["figures"]["session_auc"]
    assert compared["difference"] == pytest.approx(0.5 - report["systems"]["shown"]["session_auc"])
    assert compared["p_t_test"] < 0.05 and "shown +-" in printed and "random minus shown" in printed


def test_every_held_out_request_is_in_one_of_two_folds(store, tmp_path, dpsr):
    found = {}
    for fold in ("validation", "test", "all"):
        dpsr(
            *of_store(store, "--held_out", f"--fold={fold}", "--system=shown", f"--json={tmp_path / fold}"),
            "--bootstrap=0", "--positive=click",
        ).succeeds()  # fmt: skip
        found[fold] = json.loads((tmp_path / fold).read_text())
    assert found["validation"]["lists"] + found["test"]["lists"] == found["all"]["lists"] > found["test"]["lists"] > 10
    assert found["all"]["lists"] == store.manifest["ranking"]["counts"]["held_requests"]
    means = {fold: one["systems"]["shown"]["mrr"] * one["counts"]["mrr"] for fold, one in found.items()}
    assert means["validation"] + means["test"] == pytest.approx(means["all"])


def test_scores_of_other_rankers_come_from_a_file(store, tmp_path, dpsr):
    write_features(store, tmp_path / "v.parquet", "validation")
    write_features(store, tmp_path / "t.parquet", "test")
    tables = [pyarrow.parquet.read_table(tmp_path / f"{name}.parquet") for name in "vt"]
    joined = pa.concat_tables([table.select(["request", "item_id", "item.30.ctr"]) for table in tables])
    joined = joined.rename_columns(["request", "item", "score"])
    pyarrow.parquet.write_table(joined, tmp_path / "scores.parquet")
    spec, out = f"--system=scores:{tmp_path / 'scores.parquet'}", tmp_path / "out.json"
    flags = of_store(store, "--held_out", "--system=feature:item.30.ctr", spec, f"--json={out}", "--bootstrap=0")
    dpsr(*flags).succeeds()
    ours, theirs = json.loads(out.read_text())["systems"].values()
    assert ours == pytest.approx(theirs)
    pyarrow.parquet.write_table(joined.slice(1), tmp_path / "scores.parquet")
    first = f"items, first request {joined['request'][0].as_py()}, item {joined['item'][0].as_py()}; write one row"
    dpsr(*flags).fails(1, "has no score for 1 of", first)


def test_only_judged_items_are_ranked(store, tmp_path, dpsr):
    rng = np.random.default_rng(1)
    rows = [
        (f"{a} {b}", int(item), int(rng.integers(0, 4)))
        for a in WORDS
        for b in WORDS
        for item in rng.permutation(12)[:5] + 1
    ]
    file, scores, out = tmp_path / "judged.tsv", tmp_path / "scores.tsv", tmp_path / "out.json"
    file.write_text("query\titem\tgrade\n" + "".join(f"{q}\t{i}\t{g}\n" for q, i, g in rows))
    # One third of the scores are right.
    scores.write_text("query\titem\tscore\n" + "".join(f"{q}\t{i}\t{g if i % 3 else 1.5}\n" for q, i, g in rows))
    systems = ["--system=bm25", f"--system=scores:{scores}", "--system=feature:query_in_title"]
    dpsr(*of_store(store, f"--judgments={file}", "--relevant_from=2", *systems, f"--json={out}")).succeeds()
    report = json.loads(out.read_text())
    lists = {q: [(i, g) for query, i, g in rows if query == q] for q, _, _ in rows}
    lists = {q: judged for q, judged in lists.items() if any(g >= 2 for _, g in judged)}
    request = np.repeat(np.arange(len(lists)), 5)
    grade = np.array([g for judged in lists.values() for _, g in judged])
    right = np.array([g if i % 3 else 1.5 for judged in lists.values() for i, g in judged])
    found = report["systems"][f"scores:{scores}"]
    assert report["lists"] == len(lists) and report["settings"]["relevant_from"] == 2
    assert found["ndcg@5"] == pytest.approx(ndcg(request, 2.0**grade - 1, right, 5).mean())
    assert found["session_auc"] == pytest.approx(session_auc(request, grade >= 2, right).mean())
    assert found["log_loss_gain"] > 0.3 > report["systems"]["bm25"]["log_loss_gain"]
    # Features are those of the end of the log.
    items = np.array([i for judged in lists.values() for i, _ in judged]) - 1
    shown = RankingFeatures(store).at_end(list(lists), request, np.zeros(len(request), int), items)
    expected = ndcg(request, 2.0**grade - 1, shown.numbers["query_in_title"].astype(float), 10).mean()
    assert report["systems"]["feature:query_in_title"]["ndcg@10"] == pytest.approx(expected)


def test_a_retriever_scores_the_items_of_each_request(store):
    lists = HeldOutRequests(store)
    score = Rankers(Corpus.of_store(store), lists).make("bm25")
    for shown, numbers, _, _ in lists.batches("test"):
        assert all(fold_of(query) == "test" for query in shown.queries)
        np.testing.assert_allclose(score(shown, numbers), shown.numbers["bm25.title"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "flags, status, message",
    [
        (["--held_out", "--system=shown", "--slice=frequency"], 2, "--slice cannot be combined with --rank"),
        (["--held_out", "--system=rrf(bm25,random)"], 2, "cannot score given items"),
        (
            ["--held_out", "--system=feature:item.9.ctr"],
            2,
            "the store has no number item.9.ctr, expected one of bm25.title",
        ),
        (["--held_out", "--system=ranker"], 2, "expected one of ranker:DIR, shown"),
        (["--held_out", "--system=ranker:nowhere"], 1, "nowhere: holds no model"),
        (["--held_out", "--system=scores:nowhere.parquet"], 2, "no such file"),
        (["--held_out", "--system=wonder"], 2, "--system=wonder: expected one of bm25"),
        (["--judgments=J", "--system=shown", "--skip_unknown"], 2, "were not shown in any order"),
        (["--judgments=J", "--system=bm25", "--positive=click"], 2, "--positive=click: needs --rank and --held_out"),
        (
            ["--judgments=J", "--system=bm25", "--relevant_from=2"],
            1,
            "1 of 3 judged items are not in the store, first 99",
        ),
        (
            ["--judgments=J", "--system=bm25", "--skip_unknown", "--grade_column=big"],
            1,
            "has the grade 99, expected at most 30",
        ),
    ],
)
def test_wrong_use(store, tmp_path, dpsr, flags, status, message):
    file = tmp_path / "judged.tsv"
    file.write_text("query\titem\tgrade\tbig\nred\t1\t2\t99\nred\t2\t0\t0\nred\t99\t0\t0\n")
    dpsr(*of_store(store, *(flag.replace("=J", f"={file}") for flag in flags))).fails(status, message)


def test_a_ranker_finds_nothing_by_itself(store, dpsr):
    flags = ["evaluate", f"--store={store.path}", "--held_out", "--system=feature:item.30.ctr"]
    dpsr(*flags).fails(2, "orders given items and cannot retrieve any; add --rank")


def test_a_store_without_requests_has_no_lists(shop, tmp_path, dpsr):
    schema = {key: value for key, value in SCHEMA.items() if key != "ranking"}
    (shop / "plain.yaml").write_text(yaml.safe_dump(schema))
    dpsr("ingest", f"--schema={shop / 'plain.yaml'}", f"--out={tmp_path / 'store'}").succeeds()
    flags = ["evaluate", f"--store={tmp_path / 'store'}", "--rank", "--system=bm25"]
    dpsr(*flags, "--held_out").fails(1, "add the section `ranking` and `held_out`")
    file = tmp_path / "judged.tsv"
    file.write_text("query\titem\tgrade\nred hat\t1\t2\nred hat\t2\t0\nblue hat\t2\t0\n")
    out = dpsr(*flags, f"--judgments={file}").succeeds().out
    assert "1 lists with 2 items" in out and "no calibration" in out
    assert "left out: 1 queries without a relevant item\n" in out
