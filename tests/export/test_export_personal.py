"""Servables of personalised models read user features of every kind as in training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import tensorflow as tf
from conftest import Job, TextShop, dpsr, runs, untrained_model

from dpsr_common.errors import CommandError
from dpsr_common.packed_file import PackedFile
from dpsr_export.warmup import LoadedServable
from dpsr_serving.client import SearchClient
from dpsr_serving.client import User as ClientUser
from dpsr_serving.model_server import start_model_server
from dpsr_tf.data.store import Store
from dpsr_tf.data.user_requests import User, UserRequests, input_arrays
from dpsr_tf.models.encoders import StoreTables, item_encoder, query_encoder
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.two_tower import soft_dot_product

pytestmark = pytest.mark.slow
QUERIES = ["red shoes", "手机", "kids usb cable", "", "苹果 phone case"]


@pytest.fixture(scope="module")
def servable(text_shop: TextShop) -> LoadedServable:
    return LoadedServable(text_shop.job.servable / "1")


def raw_request(shop: TextShop, query: str, user: str | None, until: int | None = None) -> dict[str, Any]:
    """A request as the shop's own server would send it: from its tables, not from the store."""
    request: dict[str, Any] = {"query": query}
    if user is not None:
        done = [event for event in shop.events[user] if until is None or event[0] < until]
        request |= {f"user_{name}": value for name, value in shop.users[user].items()}
        request["clicked_item_keys"] = [item for _, _, item, _ in done]
        request["clicked_item_types"] = [kind for *_, kind in done]
        request["past_queries"] = [asked for _, asked, _, _ in done]
    return request


def asks(shop: TextShop) -> list[tuple[str, str | None, int | None]]:
    """Queries with their users and histories: the whole history, or only the part before a time."""
    people: list[str | None] = [*shop.users, None]
    return [(query, user, until) for query in QUERIES for user in people for until in (None, 1000, 1040)]


def store_users(shop: TextShop, asked: Sequence[tuple[str, str | None, int | None]]) -> list[User]:
    store = Store(shop.job.store)
    ids = dict(zip(store_keys(store), store.users()["id"].tolist(), strict=True))
    return [User(-1 if user is None else ids[user], until) for _, user, until in asked]


def store_keys(store: Store) -> list[str]:
    from dpsr_tf.data.store import unpack_strings

    return unpack_strings(store.users(), "key")


def python_search(job: Job, heads: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The expected result of the fused op: FAISS results of each head, united by largest product, ties by id."""
    index = faiss.read_index(str(job.index / "items.faiss"))
    item_ids = PackedFile(str(job.index / "item_ids.dpsr"), "item_ids")["id"]
    ids, scores = np.full((len(heads), k), -1, np.int64), np.full((len(heads), k), -np.inf, np.float32)
    for row, query in enumerate(heads):
        best: dict[int, float] = {}
        for head in query:
            if head.any():
                products, places = index.search(head[np.newaxis], k)
                for product, place in zip(products[0], places[0], strict=True):
                    if place >= 0:
                        best[item_ids[place]] = max(product, best.get(item_ids[place], -np.inf))
        order = sorted(best, key=lambda item: (-best[item], item))[:k]
        ids[row, : len(order)], scores[row, : len(order)] = order, [best[item] for item in order]
    return ids, scores


def test_users_are_embedded_as_in_training(text_shop: TextShop, servable: LoadedServable) -> None:
    asked = asks(text_shop)
    expected = query_encoder(text_shop.job.model, Store(text_shop.job.store))(
        [query for query, _, _ in asked], store_users(text_shop, asked)
    )
    requests = [raw_request(text_shop, *one) for one in asked]
    types = servable.inputs["query_embedding"]
    assert set(types) == {
        "query", "user_about", "user_gender", "user_interests", "user_age", "user_taste", "clicked_item_keys",
        "clicked_item_types", "past_queries",
    }  # fmt: skip
    found = servable("query_embedding", input_arrays(requests, types))["query_embedding"]
    np.testing.assert_array_equal(found, expected)
    # In a batch of its own everything is the same, but for rounding.
    for row in range(0, len(asked), 7):
        alone = servable("query_embedding", input_arrays(requests[row : row + 1], types))["query_embedding"]
        np.testing.assert_allclose(alone[0], expected[row], atol=1e-6)
    distinct = np.unique(np.round(expected[: len(asked) // len(QUERIES)].reshape(-1, 12), 5), axis=0)
    assert len(distinct) > 18, "users matter"


def test_fused_answer_equals_its_parts(text_shop: TextShop, servable: LoadedServable) -> None:
    asked = asks(text_shop)
    requests = [raw_request(text_shop, *one) for one in asked]
    heads = query_encoder(text_shop.job.model, Store(text_shop.job.store))(
        [query for query, _, _ in asked], store_users(text_shop, asked)
    )
    items = Store(text_shop.job.store).items()["id"].tolist()
    key_of = dict(zip(items, Store(text_shop.job.store).item_keys() or [], strict=True)) | {-1: ""}
    assert set(key_of.values()) == {*text_shop.items, ""}
    for k in (1, 5, 70):
        found = servable("search", servable.search_inputs(requests, k))
        ids, scores = python_search(text_shop.job, heads, k)
        np.testing.assert_array_equal(found["item_ids"], ids)
        np.testing.assert_array_equal(found["scores"], scores)
        keys = [[key_of[item] for item in row] for row in found["item_ids"].tolist()]
        assert [[key.decode() for key in row] for row in found["item_keys"].tolist()] == keys


def test_serving_default_is_anonymous(text_shop: TextShop, servable: LoadedServable) -> None:
    default = servable("serving_default", {"query": QUERIES})
    search = servable("search", servable.search_inputs([{"query": query} for query in QUERIES], 5))
    for name, value in default.items():
        np.testing.assert_array_equal(value, search[name])
    assert default["item_keys"].shape == (len(QUERIES), 5) and (default["item_keys"][3] == b"").all()


def test_absent_values_in_every_form(text_shop: TextShop, servable: LoadedServable) -> None:
    types = servable.inputs["query_embedding"]
    absent = {name: np.zeros([0] * rank, dtype) for name, (dtype, rank) in types.items()} | {"query": QUERIES}
    expected = servable("query_embedding", absent)["query_embedding"]
    without = query_encoder(text_shop.job.model, Store(text_shop.job.store))(QUERIES, None)
    np.testing.assert_array_equal(expected, without)
    n = len(QUERIES)
    forms: dict[str, list[Any]] = {
        "user_gender": [[""] * n, ["never heard"] * n, [" \u3000"] * n],
        "user_about": [[""] * n, ["!!"] * n],
        "user_age": [np.full(n, np.nan, np.float32)],
        "user_taste": [np.zeros((n, 3), np.float32), np.full((n, 3), np.nan, np.float32), np.zeros((n, 0), np.float32)],
        "user_interests": [np.full((n, 2), "", object), np.full((n, 1), "unknown", object), np.zeros((n, 0), object)],
        "clicked_item_keys": [
            np.full((n, 3), "", object),
            np.full((n, 1), "sku-999", object),
            np.zeros((n, 0), object),
        ],
        "past_queries": [np.full((n, 2), " ", object), np.zeros((n, 0), object)],
    }
    for name, values in forms.items():
        for value in values:
            found = servable("query_embedding", absent | {name: value})["query_embedding"]
            np.testing.assert_array_equal(found, expected, err_msg=f"{name} {value}")


def test_values_are_trimmed_and_histories_cut(text_shop: TextShop, servable: LoadedServable) -> None:
    plain = raw_request(text_shop, "red shoes", "u0")
    plain["user_interests"] = ["eco", "new"]
    types = servable.inputs["query_embedding"]
    expected = servable("query_embedding", input_arrays([plain], types))["query_embedding"]
    spaced = plain | {
        "user_gender": f"\u3000{plain['user_gender']} ",
        "user_interests": [" eco", "nobody knows", "", "new\t"],
        "clicked_item_keys": [f" {key}" for key in plain["clicked_item_keys"]],
        "past_queries": [f"{query} " for query in plain["past_queries"]],
    }
    found = servable("query_embedding", input_arrays([spaced], types))["query_embedding"]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    # What the model reads is all that counts: three items, two queries.
    last = plain | {name: plain[name][-3:] for name in ("clicked_item_keys", "clicked_item_types")}
    last["past_queries"] = runs(plain["past_queries"])[-2:]
    found = servable("query_embedding", input_arrays([last], types))["query_embedding"]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    all_clicks = plain | {"clicked_item_types": []}
    found = servable("query_embedding", input_arrays([all_clicks], types))["query_embedding"]
    assert np.abs(found - expected).max() > 1e-4
    said = plain | {"clicked_item_types": ["click"] * len(plain["clicked_item_keys"])}
    same = servable("query_embedding", input_arrays([said], types))["query_embedding"]
    np.testing.assert_array_equal(found, same)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("user_gender", ["f"], r"user_gender has shape \[1\], expected \[2\]"),
        ("user_age", np.zeros(3, np.float32), r"user_age has shape \[3\], expected \[2\]"),
        ("user_interests", np.full((3, 1), "a", object), r"user_interests has shape \[3,1\], expected \[2, n\]"),
        ("user_taste", np.zeros((2, 4), np.float32), "user_taste: expected 3 numbers for each text, or no values"),
        ("user_taste", np.zeros((1, 3), np.float32), "user_taste: expected 3 numbers for each text"),
        ("user_taste", np.array([[0, 0, np.inf]] * 2, np.float32), "user_taste: expected finite numbers"),
        ("user_taste", np.array([[0, np.nan, 0]] * 2, np.float32), "user_taste: expected finite numbers"),
        ("user_about", ["a"] * 3, "user_about: expected one value for each text"),
        ("clicked_item_keys", np.full((1, 4), "a", object), r"clicked_items has shape \[1,4\], expected \[2, n\]"),
        ("clicked_item_types", np.full((2, 4), "click", object), r"clicked_item_types has shape \[2,4\], expected"),
        ("past_queries", np.full((3, 4), "a", object), r"past_queries has shape \[3,4\], expected \[2, n\]"),
    ],
)
def test_wrong_shapes_are_refused(servable: LoadedServable, name: str, value: Any, message: str) -> None:
    inputs = servable.search_inputs([{"query": "red"}] * 2, 3)
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        servable("search", inputs | {name: value})


def test_unknown_event_types_are_refused(servable: LoadedServable) -> None:
    request = {"query": "red", "clicked_item_keys": ["sku-1"], "clicked_item_types": ["bought"]}
    with pytest.raises(tf.errors.InvalidArgumentError, match="clicked_item_types has 'bought', expected one of"):
        servable("search", servable.search_inputs([request], 3))


def test_filters_and_exclusions_by_key(text_shop: TextShop, servable: LoadedServable) -> None:
    request = raw_request(text_shop, "red shoes", "u1")
    everything = servable("search", servable.search_inputs([request], 50))["item_keys"][0]
    keys = [key.decode() for key in everything if key]
    out = [keys[0], keys[3]]
    found = servable(
        "search",
        servable.search_inputs([request | {"excluded_item_keys": [*out, "sku-999", ""]}], 50),
    )["item_keys"][0]
    assert [key.decode() for key in found if key] == [key for key in keys if key not in out]
    wanted = request | {"include": ["brand=Acme|B\\|C", "price=10..80"], "exclude": ["tags=sale"]}
    found = servable("search", servable.search_inputs([wanted], 50))["item_keys"][0]
    expected = {
        key
        for key, item in text_shop.items.items()
        if item["brand"] in ("Acme", "B|C") and 10 <= (item["price"] or -1) <= 80 and "sale" not in item["tags"]
    }
    assert {key.decode() for key in found if key} == expected and expected
    with pytest.raises(tf.errors.InvalidArgumentError, match="colour"):
        servable("search", servable.search_inputs([request | {"include": ["colour=red"]}], 5))


def test_score_is_the_soft_product_of_both_towers(text_shop: TextShop, servable: LoadedServable) -> None:
    job, store = text_shop.job, Store(text_shop.job.store)
    model = ModelDirectory.open(job.model)
    keys = store.item_keys()
    assert keys is not None
    requests, rows = [], []
    for place, (key, item) in enumerate(text_shop.items.items()):
        features = {f"item_{name}": item[name] for name in ("brand", "price", "tags", "details", "photo")}
        asked = raw_request(text_shop, QUERIES[place % 3], f"u{place % 8}")
        requests.append(asked | {"item_text": item["title"]} | features)
        rows.append(keys.index(key))
    found = servable("score", input_arrays(requests, servable.inputs["score"]))["score"]
    items = item_encoder(model, store, tf.train.latest_checkpoint(str(job.model)) or "")(np.array(rows))
    users = [(query, f"u{place % 8}", None) for place, query in enumerate(r["query"] for r in requests)]
    heads = query_encoder(job.model, store)([query for query, _, _ in users], store_users(text_shop, users))
    inner = [tf.constant((heads[:, head] * items).sum(axis=1)) for head in range(2)]
    np.testing.assert_allclose(found, soft_dot_product(inner, model.config.model.temperature), atol=1e-5)


def test_a_store_tells_what_it_can_of_users(text_shop: TextShop) -> None:
    store = Store(text_shop.job.store)
    with pytest.raises(CommandError, match="'about' as tokens only"):
        UserRequests(store, ["user_about"])
    with pytest.raises(CommandError, match="no user feature 'shoe_size'"):
        UserRequests(store, ["user_shoe_size"])
    names = ["query", "user_gender", "user_interests", "user_age", "user_taste", "clicked_item_keys", "past_queries"]
    told = UserRequests(store, names)
    tables = StoreTables(ModelDirectory.open(text_shop.job.model), store)
    for (_, user, until), known in zip(asks(text_shop)[:27], store_users(text_shop, asks(text_shop)[:27]), strict=True):
        raw, found = raw_request(text_shop, "red", user, until), told.of(known)
        assert found["user_gender"] == raw.get("user_gender", "")
        assert sorted(found["user_interests"]) == sorted(raw.get("user_interests", []))
        assert found["user_taste"] == pytest.approx(raw.get("user_taste") or [])
        assert found["clicked_item_keys"] == raw.get("clicked_item_keys", [])
        assert found["past_queries"] == runs(raw.get("past_queries", []))
        code = tables.queries(["red"], [known]).user.codes[0, 1]
        age = found["user_age"]
        assert (age is None) == (code == 0)
        assert age is None or 1 + np.searchsorted([24.5, 42.5], age, side="right") == code


def test_model_and_servable_have_the_same_recall(personal: Job, tmp_path: Path) -> None:
    """`dpsr evaluate` on a shop's purchases: exact search with the model, the servable, and a server of it."""
    shop, out = personal.store.parent / "shop", tmp_path / "figures.json"
    with start_model_server(personal.servable, "shop") as server:
        systems = [
            f"model:{personal.model}", f"servable:{personal.servable}", f"index:{personal.index}",
            f"server:{server.target}/shop",
        ]  # fmt: skip
        judgments = [f"--judgments={shop / 'judgments.personal.tsv'}", "--user_column=user_id", "--time_column=time"]
        few = ["--k=5,20,100", "--bootstrap=0", "--latency_queries=0", f"--json={out}"]
        dpsr("evaluate", f"--store={personal.store}", *judgments, *few, *(f"--system={name}" for name in systems))
    figures = json.loads(out.read_text())["systems"]
    model, *others = (figures[name] for name in systems)
    for other in others:
        for name in ("recall@5", "recall@20", "recall@100", "mrr@20", "ndcg@20"):
            assert other[name] == pytest.approx(model[name], abs=1e-9), name
    anonymous = ["evaluate", f"--store={personal.store}", judgments[0], *few, f"--system={systems[1]}"]
    dpsr(*anonymous)
    assert json.loads(out.read_text())["systems"][systems[1]]["mrr@20"] != model["mrr@20"], "users matter"


def test_a_client_sends_vectors(text_shop: TextShop, servable: LoadedServable) -> None:
    """Users with and without one in a request, on the real server."""
    people = ["u0", "u6", "u3"]
    requests = [raw_request(text_shop, "red shoes", user) for user in people]
    expected = servable("search", servable.search_inputs(requests, 5))
    users = [
        ClientUser(
            text_shop.users[user], request["clicked_item_keys"], request["past_queries"], request["clicked_item_types"]
        )
        for user, request in zip(people, requests, strict=True)
    ]
    with start_model_server(text_shop.job.servable, "shop") as server, SearchClient(server.target, "shop") as client:
        found = client.search(["red shoes"] * 3, 5, user=users)
        for result, keys, scores in zip(found, expected["item_keys"], expected["scores"], strict=True):
            assert [key.encode() for key in result.item_keys] == keys.tolist()
            np.testing.assert_allclose(result.scores, scores, atol=1e-6)
        (alone,) = client.search("red shoes", 5, user=ClientUser({"taste": np.zeros(3)}))
        (unknown,) = client.search("red shoes", 5, user=ClientUser({"taste": None}))
        assert alone.item_ids.tolist() == unknown.item_ids.tolist()
        for wrong in (["a", "b", "c"], 3.0, [[1.0, 2.0, 3.0]]):
            with pytest.raises(ValueError, match="user feature 'taste': expected a list of numbers"):
                client.search("red shoes", 5, user=ClientUser({"taste": wrong}))
        with pytest.raises(ValueError, match="of the same length for all users"):
            client.search(["red"] * 2, 5, user=[ClientUser({"taste": [1.0]}), ClientUser({"taste": [1.0, 2.0]})])
        with pytest.raises(Exception, match="user_taste: expected 3 numbers for each text"):
            client.search("red", 5, user=ClientUser({"taste": [1.0, 2.0]}))


def test_text_ids_without_a_history(text_shop: TextShop, tmp_path: Path) -> None:
    job = Job(text_shop.job.store, tmp_path / "model", tmp_path / "index", tmp_path / "servable")
    untrained_model(job, user_features=())
    dpsr("index", f"--model={job.model}", f"--store={job.store}", f"--out={job.index}")
    dpsr("export", f"--model={job.model}", f"--index={job.index}", f"--out={job.servable}")
    servable = LoadedServable(job.servable / "1")
    assert set(servable.inputs["search"]) == {
        "query", "k", "search_parameters", "include", "exclude", "excluded_item_keys",
    }  # fmt: skip
    request = {"query": "red shoes"}
    keys = servable("search", servable.search_inputs([request], 3))["item_keys"][0]
    assert {key.decode() for key in keys} < set(text_shop.items)
    without = servable("search", servable.search_inputs([request | {"excluded_item_keys": [keys[0]]}], 2))
    assert without["item_keys"][0].tolist() == keys[1:].tolist()
    # Without what only histories need.
    assert PackedFile(str(job.index / "items.dpsr"), "items").get("tokens.values") is None
