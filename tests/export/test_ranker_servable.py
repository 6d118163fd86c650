"""The servable of a ranker: its scores against those of the checkpoint, renewal, requests, and wrong use."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from ranking_shops import QUERIES, ranking_store, untrained_ranker, untrained_towers

from dpsr_common.command_line import main
from dpsr_export.ranker import rank_inputs
from dpsr_export.warmup import LoadedServable
from dpsr_serving.client import AsyncSearchClient, SearchClient, ServingError, User
from dpsr_serving.model_server import start_model_server
from dpsr_tf.data.ranking_features import DPSR_SCORE, RankingFeatures
from dpsr_tf.data.store import Store
from dpsr_tf.data.user_requests import User as StoreUser
from dpsr_tf.data.user_requests import UserRequests, client_arguments
from dpsr_tf.models.ranker_inputs import dpsr_scorer
from dpsr_tf.models.ranker_scores import ranker_scores


def export(*arguments: object) -> None:
    assert main(["export", *map(str, arguments)]) == 0


def checkpoint_scores(model: Path, store: Store) -> Callable[..., np.ndarray]:
    """Returns a function from a query, rows of a user and of items, and dpsr_score to scores of the checkpoint."""
    features, score = RankingFeatures(store), ranker_scores(model, store)
    towers = model.parent / "towers"
    of_model = dpsr_scorer(str(towers), store) if towers.exists() else None

    def scores(query: str, user: int, items: np.ndarray, dpsr_score: np.ndarray | None = None) -> np.ndarray:
        n = len(items)
        shown = features.at_end([query.strip()], np.zeros(n, np.int64), np.full(n, user), items)
        if of_model is None:
            return score(shown)
        given = np.full(n, np.nan, np.float32) if dpsr_score is None else dpsr_score
        return score(shown._replace(numbers=of_model(shown).numbers | {DPSR_SCORE: given}))

    return scores


def requester(servable: LoadedServable, store: Store) -> Callable[..., np.ndarray]:
    """Returns a function from a query, rows of a user and of items, and more inputs to scores of the servable."""
    users, ids, keys = store.users()["id"], store.items()["id"], store.item_keys()
    of_users = UserRequests(store, [name for name in servable.inputs["rank"] if name != "user_id"])

    def scores(query: str, user: int, items: np.ndarray, **more: Any) -> np.ndarray:
        given = {"item_ids": ids[items]} if keys is None else {"item_keys": [keys[row].encode() for row in items]}
        request = {
            "query": query,
            "user_id": int(users[user]),
            **of_users.of(StoreUser(int(users[user]))),
            **given,
            **more,
        }
        return servable("rank", rank_inputs(servable, request))["scores"]

    return scores


@pytest.fixture(scope="module")
def servable(ranking_shop_of_texts: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    """A ranker that reads all features and numbers, and its servable, of at most 100 items."""
    folder, ranking_shop = tmp_path_factory.mktemp("ranker"), ranking_shop_of_texts
    untrained_towers(folder / "towers", ranking_shop)
    untrained_ranker(folder / "model", ranking_shop, folder / "towers")
    export(f"--model={folder / 'model'}", f"--store={ranking_shop.path}", f"--out={folder / 'servable'}",
        "--max_items=100")  # fmt: skip
    return ranking_shop, folder


def check_scores(model: Path, store: Store, version: Path, scored: bool) -> None:
    rng = np.random.default_rng(3)
    expected, servable = checkpoint_scores(model, store), LoadedServable(version)
    rank, different = requester(servable, store), 0
    for number, query in enumerate([*QUERIES, *QUERIES]):
        user, items = number % store.counts.users, rng.integers(store.counts.items, size=number * 2)
        score = rng.normal(size=len(items)).astype(np.float32) if scored and number % 2 else None
        more = {} if score is None else {DPSR_SCORE: score}
        found = rank(query, user, items, **more)
        np.testing.assert_allclose(found, expected(query, user, items, score), rtol=1e-4, atol=1e-4)
        different += len(np.unique(found)) > 5
    assert different > 10
    servable.close()


def test_scores_are_those_of_the_checkpoint(servable: tuple[Store, Path]) -> None:
    store, folder = servable
    check_scores(folder / "model", store, folder / "servable" / "1", scored=True)


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"history_pooling": "sum", "user_features": ["gender"], "item_features": ["brand"]}},
        {"ranker": {"products": False, "numbers": False}, "train": {"average_decay": 0.9}},
        {"ranker": {"crosses": 2}, "model": {"history_length": 0, "user_features": []}},
    ],
    ids=["sum", "averaged", "crosses"],
)
def test_scores_of_other_models(
    ranking_shop_of_numbers: Store, tmp_path: Path, sections: dict[str, dict[str, Any]]
) -> None:
    store = ranking_shop_of_numbers
    untrained_towers(tmp_path / "towers", store)
    untrained_ranker(tmp_path / "model", store, tmp_path / "towers", **sections)
    export(f"--model={tmp_path / 'model'}", f"--store={store.path}", f"--out={tmp_path / 'servable'}")
    check_scores(tmp_path / "model", store, tmp_path / "servable" / "1", scored=False)


def test_unknown_items_and_users(servable: tuple[Store, Path]) -> None:
    store, folder = servable
    loaded = LoadedServable(folder / "servable" / "1")
    by_key = store.item_keys() is not None
    name = "item_keys" if by_key else "item_ids"
    known = (store.item_keys() or store.items()["id"].tolist())[:3]
    unknown = ["", "sku-1000", "\x00"] if by_key else [-1, 4, 2**62]

    def rank(**inputs: Any) -> np.ndarray:
        return loaded("rank", rank_inputs(loaded, {"query": "red drill", **inputs}))["scores"]

    alone, mixed = rank(**{name: known}), rank(**{name: [unknown[0], *known, *unknown[1:]]})
    np.testing.assert_allclose(mixed[1:4], alone, rtol=1e-5, atol=1e-6)
    assert np.isneginf(mixed[[0, 4, 5]]).all() and np.isfinite(alone).all()
    assert rank(**{name: []}).shape == (0,)
    if by_key:
        np.testing.assert_array_equal(rank(item_keys=[f" {key}\u3000" for key in known]), alone)
    np.testing.assert_array_equal(rank(**{name: known, "user_id": -1}), rank(**{name: known, "user_id": 77}))
    # Unknown values of features are absent ones.
    np.testing.assert_array_equal(rank(**{name: known, "user_gender": "?"}), alone)
    with pytest.raises(tf.errors.InvalidArgumentError, match="has 101 items, expected at most 100"):
        rank(**{name: [known[0]] * 101})
    with pytest.raises(tf.errors.InvalidArgumentError, match="query has 100000 bytes, expected at most 65536"):
        rank(**{name: known, "query": "x" * 100_000})
    inputs = rank_inputs(loaded, {"query": "red", name: known})
    for wrong in (
        {"user_age": np.zeros(2, np.float32)},
        {"user_likes": np.full((2, 1), b"new", object)},
        {DPSR_SCORE: np.zeros(2, np.float32)},
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=next(iter(wrong))):
            loaded("rank", inputs | wrong)
    loaded.close()


def test_an_item_is_compared_with_the_known_items_of_its_list(servable: tuple[Store, Path]) -> None:
    store, folder = servable
    loaded = LoadedServable(folder / "servable" / "1")
    rank = requester(loaded, store)
    alone, *others = (rank("red drill", 1, np.array([7, *more])) for more in ([], [8], [9], [8, 9]))
    assert np.isfinite(alone).all() and len(alone) == 1, "nothing to compare it with"
    first = [alone[0], *(scores[0] for scores in others)]
    assert len(set(np.round(first, 4).tolist())) == 4, first
    loaded.close()


def test_a_server_ranks_as_the_checkpoint_does(
    servable: tuple[Store, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    store, folder = servable
    expected = checkpoint_scores(folder / "model", store)
    ids, keys, users = store.items()["id"].tolist(), store.item_keys(), store.users()["id"]
    items: list[Any] = keys or ids
    arguments = client_arguments(store, ["user_gender", "user_age", "user_likes", "clicked_items", "clicked_item_types"]
        if keys is None else ["user_gender", "user_age", "user_likes", "clicked_item_keys", "clicked_item_types"]
    )  # fmt: skip
    assert arguments is not None
    with start_model_server(folder / "servable", "ranker") as server, SearchClient(server.target, "ranker") as client:
        for row in range(store.counts.users):
            user = User(**arguments(StoreUser(int(users[row]))))
            query, score = QUERIES[row + 3], np.linspace(-1, 1, 60).astype(np.float32)
            found = client.rank(query, items, user=user, user_id=int(users[row]), dpsr_scores=score.tolist())
            np.testing.assert_allclose(found, expected(query, row, np.arange(60), score), rtol=1e-4, atol=1e-4)
        plain = client.rank(b"red\xff", [*items[:2], "none" if keys else -1])
        assert np.isfinite(plain[:2]).all() and np.isneginf(plain[2]) and client.rank("red", []).shape == (0,)

        async def ask() -> np.ndarray:
            async with AsyncSearchClient(server.target, "ranker") as other:
                return await other.rank(b"red\xff", items[:2])

        np.testing.assert_allclose(asyncio.run(ask()), plain[:2], rtol=1e-5)

        unknown = "none" if keys else "999999"
        asked = ["query", f"--target={server.target}", "--model=ranker", f"--rank={unknown},{items[0]},{items[1]}"]
        assert main([*asked, "--json", "red"]) == 0
        (line,) = map(json.loads, capsys.readouterr().out.splitlines())
        best, second = np.argsort(-client.rank("red", items[:2]))
        assert [row["item_id"] for row in line["results"]] == [str(items[best]), str(items[second]), unknown]
        assert [row["score"] is None for row in line["results"]] == [False, False, True]
        assert main([*asked, "red"]) == 0
        assert capsys.readouterr().out.splitlines()[-2].split() == ["3", "unknown", unknown]
        for options, message in (
            (
                {"user": {"features": {"height": 3}}},
                "reads no user feature 'height'; those it reads: age, gender, likes",
            ),
            ({"user": {"past_queries": ["a"]}}, "a ranker takes no past_queries"),
            ({"dpsr_scores": [1.0]}, "1 dpsr_scores for 2 items"),
            ({"dpsr_scores": [1.0, np.inf]}, "dpsr_score has inf at 1, expected finite numbers"),
        ):
            with pytest.raises(ValueError, match=message):
                client.rank("red", items[:2], **options)
        with pytest.raises(ValueError, match="101 items, expected at most 100; send the best"):
            client.rank("red", [items[0]] * 101)
        with pytest.raises(ValueError, match="query has 1048576 bytes, expected at most 65536"):
            client.rank("x" * 2**20, items[:2])
        with pytest.raises(ServingError, match="has no signature 'search'"):
            client.search("red", k=3)


def test_index_only_renews_items_and_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first = ranking_store(tmp_path / "first", text_ids=True)
    untrained_towers(tmp_path / "towers", first)
    untrained_ranker(tmp_path / "model", first, tmp_path / "towers")
    base = tmp_path / "servable"
    export(f"--model={tmp_path / 'model'}", f"--store={first.path}", f"--out={base}")
    second = ranking_store(tmp_path / "second", text_ids=True, seed=6, like=tmp_path / "model")
    export("--index_only", f"--store={second.path}", f"--out={base}")
    out = capsys.readouterr().out
    assert f"servable {base / '2'}: ranks 60 items; p50" in out
    versions = [LoadedServable(base / name) for name in ("1", "2")]
    scores = []
    for servable, store in zip(versions, (first, second), strict=True):
        expected = checkpoint_scores(tmp_path / "model", store)
        found = requester(servable, store)("acme drill 12MM", 2, np.arange(60))
        np.testing.assert_allclose(found, expected("acme drill 12MM", 2, np.arange(60)), rtol=1e-4, atol=1e-4)
        scores.append(found)
        servable.close()
    assert np.abs(scores[0] - scores[1]).max() > 1e-3, "prices and counts have changed"
    manifests = [json.loads((base / name / "assets.extra" / "dpsr_manifest.json").read_text()) for name in ("1", "2")]
    assert manifests[0]["checkpoint_fingerprint"] == manifests[1]["checkpoint_fingerprint"]
    assert manifests[1]["kind"] == "ranker" and manifests[1]["until"] == int(second.statistics()["until"][0])
    variables = [sorted((base / name / "variables").iterdir()) for name in ("1", "2")]
    assert [path.read_bytes() for path in variables[0]] == [path.read_bytes() for path in variables[1]]
    # The embeddings of new items need the retrieval model.
    (tmp_path / "towers").rename(tmp_path / "moved")
    assert main(["export", "--index_only", f"--store={second.path}", f"--out={base}"]) == 1
    assert f"{tmp_path / 'towers'}: holds no model" in capsys.readouterr().err and not (base / "3").exists()
    (tmp_path / "moved").rename(tmp_path / "towers")
    # A table of another version is refused.
    (base / "2" / "assets" / "rank_table.dpsr").write_bytes((base / "1" / "assets" / "rank_table.dpsr").read_bytes())
    assert main(["export", "--index_only", f"--store={second.path}", f"--out={base}"]) == 1
    assert "is not the file that this servable was exported with" in capsys.readouterr().err


def test_wrong_use(
    job: Any, ranking_shop_of_numbers: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, out = ranking_shop_of_numbers, f"--out={tmp_path / 'servable'}"
    untrained_ranker(tmp_path / "model", store)
    model = f"--model={tmp_path / 'model'}"
    for arguments, status, message in (
        ((model, out), 2, "--index is missing (index directory); for a ranker, give --store"),
        ((model, f"--index={job.index}", out), 1, "holds a model of kind ranker, expected retrieval"),
        ((f"--model={job.model}", f"--store={store.path}", out), 1, "holds a model of kind retrieval, expected ranker"),
        ((model, f"--store={store.path}", f"--index={job.index}", out), 2, "cannot be combined with --index"),
        ((model, f"--store={store.path}", "--shards=2", out), 2, "cannot be combined with --store"),
        ((model, f"--store={job.store}", out), 1, "holds no requests"),
        (("--index_only", f"--store={store.path}", out), 1, "holds no servable"),
        (("--index_only", f"--store={store.path}", f"--out={job.servable}"), 1, "is a retrieval servable, expected"),
        ((model, f"--store={store.path}", "--max_items=0", out), 2, "max_items"),
        ((model, f"--store={store.path}", f"--out={job.servable}"), 1, "this would be a ranker servable"),
    ):
        assert main(["export", *arguments]) == status, arguments
        assert message in capsys.readouterr().err, arguments
        assert not (tmp_path / "servable" / "1").exists()
