"""The search gateway: stages and their failures, pages, filters, experiments, limits, and both APIs."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import json
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from gateway_shops import BRANDS, Models, Shop, call, running, write_index
from processes import PATIENCE_S, free_port, run_command

from dpsr_common import serving_apis
from dpsr_common.errors import CommandError, UsageError
from dpsr_serving import grpc_services
from dpsr_serving.gateway import cursor, model_client, search_api
from dpsr_serving.gateway.config import parse_config
from dpsr_serving.gateway.inverted import InvertedIndex
from dpsr_serving.gateway.judgments import JudgmentFile
from dpsr_serving.gateway.messages import Facet, Item, RequestError, SearchRequest, SearchResponse, load_json
from dpsr_serving.gateway.openapi import OPENAPI
from dpsr_serving.gateway.page import add_page
from dpsr_serving.gateway.server import Gateway
from dpsr_serving.gateway.system import search_system
from dpsr_serving.proxy.experiments import assign
from dpsr_serving.search import rewrites_of
from dpsr_serving.tensors import make_tensor

SearchMessage = search_api.message("dpsr.search.v1.SearchRequest")
SearchAnswer = search_api.message("dpsr.search.v1.SearchResponse")

# With deadlines that a machine under load keeps.
PIPELINES = """
pipelines:
  bm25: {recall: {inverted: &inverted {k: 40, deadline_ms: 9000}}}
  semantic: {deadline_ms: 9000, recall: {semantic: &semantic {model: dpsr, k: 10, deadline_ms: 9000}}}
  both: {deadline_ms: 9000, recall: {inverted: *inverted, semantic: *semantic}}
  fine:
    recall: {inverted: *inverted, semantic: *semantic}
    fine: {model: ranker, size: 6, dpsr_source: semantic, deadline_ms: 9000}
    deadline_ms: 9000
  full:
    rewrite: {model: rewriter, n: 2, deadline_ms: 9000}
    recall: {inverted: *inverted, rewritten: *inverted, semantic: *semantic}
    fine: {model: ranker, size: 200, deadline_ms: 9000}
    rerank: {collapse: true, diversity: {attributes: [brand]}}
    deadline_ms: 9000
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gateway")
    write_index(root / "index")
    return root


@pytest.fixture
def models() -> Iterator[Models]:
    started = Models()
    yield started
    started.stop()


@pytest.fixture
def shop(folder: Path, models: Models) -> Iterator[Shop]:
    targets = dict.fromkeys(("dpsr", "ranker", "rewriter"), models.target)
    with running(PIPELINES, folder, **targets) as found:
        yield found


@pytest.fixture(scope="module")
def words(folder: Path) -> Iterator[Shop]:
    """A gateway that asks no models, for tests that only look at answers."""
    with running("pipelines: {bm25: {recall: {inverted: {k: 40}}}}\nlimits: {page_size: 50}", folder) as found:
        yield found


def ids(answer: Any) -> list[int]:
    return [item["id"] for item in answer["items"]]


def every_page(shop: Shop, first: Any, **fields: Any) -> list[Any]:
    pages = [first]
    while pages[-1]["next_cursor"]:
        pages.append(shop.search(None, cursor=pages[-1]["next_cursor"], **fields))
    return pages


# Stages.


def test_inverted_index_answers_items_with_their_attributes(words: Shop) -> None:
    answer = words.search("red shoes", size=3)
    first = answer["items"][0]
    assert (first["title"], first["id"]) == ("red shoes no 102", 102)
    assert first["attributes"] == {"brand": "acme", "price": 2.0}
    assert (first["group"], first["variants"], first["sources"]) == ("product 0", 1, ["inverted"])
    assert (answer["pipeline"], answer["degraded"], answer["arm"]) == ("bm25", [], "")
    assert answer["total"] == 26  # red ones, and shoes


def test_sources_are_united_by_their_ranks(shop: Shop, models: Models) -> None:
    models.search = lambda inputs: [(113, 0.9), (102, 0.8), (137, 0.7)]
    answer = shop.search("red shoes", pipeline="both", size=40, explain=True)
    why = {item["id"]: item["explain"] for item in answer["items"]}
    assert why[102]["inverted"]["rank"] == 1
    assert why[102]["semantic"] == {"rank": 2, "score": 0.8}
    assert why[102]["coarse"] == pytest.approx(1 / 61 + 1 / 62, rel=1e-5)
    assert ids(answer)[0] == 102
    sources = {item["id"]: item["sources"] for item in answer["items"]}
    assert (sources[102], sources[137]) == (["inverted", "semantic"], ["semantic"])
    stages = {stage["name"]: stage for stage in answer["explain"]["stages"]}
    assert stages["recall.semantic"]["out"] == 3
    assert stages["coarse"]["in"] == 3 + stages["recall.inverted"]["out"]
    assert answer["explain"]["tokens"] == ["red", "shoes"]
    assert answer["explain"]["heads"] == {"semantic": [3]}


def test_items_that_the_index_does_not_have_are_left_out(shop: Shop, models: Models) -> None:
    models.search = lambda inputs: [(7, 0.9), (102, 0.8), (2**60, 0.7)]
    assert ids(shop.search(pipeline="semantic")) == [102]


def test_filters_hold_for_all_sources(shop: Shop, models: Models) -> None:
    """The double ignores filters, as an index that was built without the attribute would."""
    filters = {"brand": ["acme", "bolt"], "price": {"min": 3, "max": 20}}
    answer = shop.search("shoes", pipeline="both", filters=filters, size=40)
    assert answer["total"] == len(answer["items"]) > 3
    for item in answer["items"]:
        assert item["attributes"]["brand"] in ("acme", "bolt") and 3 <= item["attributes"]["price"] <= 20
    assert {"semantic"} < {source for item in answer["items"] for source in item["sources"]}
    (sent,) = models.requests["search"]
    assert sent["include"].tolist() == [[b"brand=acme|bolt", b"price=3..20"]]


def test_rewrites_are_looked_up_in_the_inverted_index(shop: Shop, models: Models) -> None:
    models.rewrite = lambda inputs: [("blue boots", -0.5), ("green", -2.0)]
    models.search = lambda inputs: []
    answer = shop.search("red shoes", pipeline="full", size=40)
    assert answer["rewrites"] == ["blue boots", "green"]
    (asked,) = models.requests["rewrite"]
    assert (asked["query"].tolist(), int(asked["n"])) == ([b"red shoes"], 2)
    found_by = {source for item in answer["items"] for source in item["sources"]}
    assert found_by == {"inverted", "rewritten"}


def test_ranker_orders_the_best_and_the_others_follow(shop: Shop, models: Models) -> None:
    coarse = ids(shop.search(pipeline="both", size=40))
    models.rank = lambda inputs: [float(item) if item != coarse[0] else -np.inf for item in inputs["item_ids"]]
    answer = shop.search(pipeline="fine", size=40, explain=True, user={"id": 7})
    scored = sorted(coarse[1:6], reverse=True)
    assert ids(answer) == [*scored, coarse[0], *coarse[6:]]
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True)
    assert [item["explain"]["fine"] for item in answer["items"][:6]] == [*map(float, scored), None]
    (asked,) = models.requests["rank"]
    assert asked["item_ids"].tolist() == coarse[:6]
    assert asked["user_id"].tolist() == [7]
    known = dict(models.search({"k": 10}))
    np.testing.assert_allclose(asked["dpsr_score"], [known.get(item, np.nan) for item in coarse[:6]], rtol=1e-6)


def test_variants_collapse(shop: Shop, models: Models) -> None:
    models.search = lambda inputs: [(item, 1 - item / 1000) for item in (100, 101, 102, 120)]
    models.rewrite = lambda inputs: []
    answer = shop.search("no word of it", pipeline="full", explain=True)
    groups = [item["group"] for item in answer["items"]]
    assert len(set(groups)) == len(groups)
    product = next(item for item in answer["items"] if item["group"] == "product 0")
    assert product["variants"] >= 3
    assert any(f"stands for {product['variants']} variants" in reason for reason in product["explain"]["rerank"])


@pytest.mark.parametrize(
    ("mode", "first", "others"), [("first", [115], True), ("only", [115], False), ("off", [], True)]
)
def test_identifiers_win(folder: Path, mode: str, first: list[int], others: bool) -> None:
    pipeline = f"pipelines: {{bm25: {{identifiers: '{mode}', recall: {{inverted: {{}}}}}}}}"
    with running(pipeline, folder) as shop:
        answer = shop.search("mx 115", explain=True)
        assert ids(answer)[: len(first)] == first
        assert answer["explain"]["identifier"] == bool(first)
        if first:
            assert "identifier" in answer["items"][0]["sources"]
        assert (len(shop.search("no MX-115")["items"]) > 1) is True
        if others:
            assert shop.search("mx 115 shoes")["total"] > 1
        assert shop.search("MX-115", filters={"brand": "nobody"})["total"] == 0


def test_identifier_of_many_items_gives_no_longer_list_than_recall(folder: Path) -> None:
    def wrap(index: Any) -> Faulty:
        faulty = Faulty(index)
        faulty.identifier = lambda text: index.catalogue.ids
        return faulty

    config = "pipelines: {bm25: {identifiers: only, recall: {inverted: {}}, coarse: {size: 7}}}"
    with running(config, folder, wrap) as shop:
        assert ids(shop.search("00000000")) == list(range(100, 107))


def test_identifier_stays_first_whatever_the_ranker_says(shop: Shop, models: Models) -> None:
    models.search = lambda inputs: [(102, 0.9), (104, 0.8)]
    models.rank = lambda inputs: [-100.0 if item == 121 else 1.0 for item in inputs["item_ids"]]
    answer = shop.search("MX-121", pipeline="fine")
    assert ids(answer) == [121, 102, 104]
    models.rank = lambda inputs: [-np.inf if item == 121 else 1.0 for item in inputs["item_ids"]]
    assert ids(shop.search("MX-121", pipeline="fine")) == [121, 102, 104]


# Failures.

LATE = "limits: {searches: 2}\npipelines:\n  full:\n    rewrite: {model: rewriter, deadline_ms: 50}\n    recall:\n" + (
    "      inverted: {k: 40}\n      rewritten: {k: 40}\n      semantic: {model: dpsr, k: 10, deadline_ms: 50}\n"
    "    fine: {model: ranker, deadline_ms: 50}\n"
)


@pytest.mark.parametrize("stage", ["rewrite", "recall.semantic", "fine"])
@pytest.mark.parametrize("how", ["late", "fails", "dead", "nonsense"])
def test_stage_without_an_answer_is_left_out(folder: Path, models: Models, stage: str, how: str) -> None:
    other = Models()
    key = {"rewrite": "rewriter", "recall.semantic": "dpsr", "fine": "ranker"}[stage]
    signature = {"rewrite": "rewrite", "recall.semantic": "search", "fine": "rank"}[stage]
    targets = dict.fromkeys(("dpsr", "ranker", "rewriter"), models.target) | {key: other.target}
    if how == "dead":
        targets[key] = f"127.0.0.1:{free_port()}"
    elif how == "late":
        other.delay_s = 0.3
    elif how == "fails":
        other.fails[signature] = grpc.StatusCode.INTERNAL
    else:
        setattr(other, f"_{signature}", lambda inputs: {"nonsense": np.zeros(3, np.float32)})
    # A machine under load must not make the healthy stages late.
    config = LATE if how == "late" else LATE.replace("deadline_ms: 50", "deadline_ms: 5000")
    if how == "late":
        for name in {"dpsr", "ranker", "rewriter"} - {key}:
            config = config.replace(f"model: {name}, ", f"model: {name}, ").replace(
                *{"dpsr": ("k: 10, deadline_ms: 50", "k: 10, deadline_ms: 5000"),
                  "ranker": ("ranker, deadline_ms: 50", "ranker, deadline_ms: 5000"),
                  "rewriter": ("rewriter, deadline_ms: 50", "rewriter, deadline_ms: 5000")}[name]
            )  # fmt: skip
    try:
        with running(config + "    deadline_ms: 10000\n", folder, **targets) as shop:
            answer = shop.search("red shoes", explain=True)
            assert answer["degraded"] == [stage]
            assert answer["total"] >= 26
            error = next(entry["error"] for entry in answer["explain"]["stages"] if entry["name"] == stage)
            reason = "late" if how == "late" else "failed"
            assert ("no answer within" in error) == (how == "late")
            assert shop.metric("dpsr_search_left_out_total") == {
                f'{{pipeline="full",stage="{stage}",reason="{reason}"}}': 1
            }
    finally:
        other.stop()


def test_late_answer_is_better_than_none(folder: Path, models: Models) -> None:
    models.delay_s = 0.3
    config = (
        "pipelines:\n"
        "  a: {deadline_ms: 9000, recall: {one: {model: dpsr, deadline_ms: 20}, two: {model: dpsr, deadline_ms: 40}}}\n"
        "  b: {deadline_ms: 100, recall: {one: {model: dpsr, deadline_ms: 9000}}}\n"
    )
    with running(config, folder, dpsr=models.target) as shop:
        assert shop.search("red shoes")["total"] == 20
        # But not later than the whole search may take.
        assert "recall.one: no answer within" in shop.post({"query": "red shoes", "pipeline": "b"}).error


class Faulty:
    """An index that is late or fails when told to."""

    def __init__(self, index: Any) -> None:
        self.catalogue = index.catalogue
        self.index = index
        self.identifier, self.tokens = index.identifier, index.tokens
        self.before: Callable[[], None] = lambda: None

    def prepare(self, *arguments: Any) -> Callable[[], Any]:
        def search() -> Any:
            self.before()
            return self.index.search(*arguments)

        return search


def test_inverted_index_that_fails_is_left_out(folder: Path, models: Models) -> None:
    faults: list[Faulty] = []
    config = (
        "pipelines: {both: {recall: {inverted: {k: 40, deadline_ms: 100}, semantic: {model: dpsr, deadline_ms: 9000}}}}"
    )

    def wrap(index: Any) -> Faulty:
        faults.append(Faulty(index))
        return faults[0]

    def fail() -> None:
        raise OSError("the disk is gone")

    with running(config, folder, wrap, dpsr=models.target) as shop:
        faults[0].before = fail
        answer = shop.search("red shoes", explain=True)
        assert answer["degraded"] == ["recall.inverted"] and answer["items"]
        assert "the disk is gone" in answer["explain"]["stages"][0]["error"]
        faults[0].before = lambda: time.sleep(0.5)
        assert shop.search("red shoes")["degraded"] == ["recall.inverted"]
        faults[0].before = lambda: None


def test_searches_that_wait_for_a_thread_too_long_are_refused(folder: Path, models: Models) -> None:
    release, faults = threading.Event(), []

    def wrap(index: Any) -> Faulty:
        faults.append(Faulty(index))
        faults[0].before = lambda: release.wait(PATIENCE_S) and None
        return faults[0]

    config = (
        "pipelines: {both: {recall: {inverted: {deadline_ms: 50}, semantic: {model: dpsr, deadline_ms: 9000}}}}\n"
        "limits: {searches: 1, waiting_searches: 1}"
    )
    with running(config, folder, wrap, dpsr=models.target) as shop:
        try:
            assert shop.search("red shoes")["degraded"] == ["recall.inverted"]
            # The first search still holds the thread, and the second one waits for it no more.
            answers = []
            threads = [
                threading.Thread(target=lambda: answers.append(shop.search("red shoes", explain=True)))
                for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE_S)
            assert [answer["degraded"] for answer in answers] == [["recall.inverted"]] * 4
        finally:
            release.set()
        counted = shop.metric("dpsr_search_left_out_total")
        assert sum(counted.values()) == 5
        # Once the thread is free again, searches are answered.
        end = time.monotonic() + PATIENCE_S
        while shop.search("red shoes")["degraded"]:
            assert time.monotonic() < end


def test_only_without_any_source_there_is_an_error(folder: Path, models: Models) -> None:
    dead = f"127.0.0.1:{free_port()}"
    config = "pipelines:\n  a: {recall: {one: {model: dead}, two: {model: dpsr}}}\n"
    models.fails["search"] = grpc.StatusCode.INTERNAL
    with running(config, folder, dead=dead, dpsr=models.target) as shop:
        answer = shop.post({"query": "red"})
        assert answer.status == 503
        assert answer.error.startswith("no source of recall answered: recall.")
        assert "recall.one" in answer.error and "recall.two" in answer.error
        with grpc.insecure_channel(shop.gateway.grpc_address) as channel, pytest.raises(grpc.RpcError) as failed:
            _stub(channel)(SearchMessage(query="red"), timeout=PATIENCE_S)
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
        models.fails.clear()
        assert shop.search("red")["degraded"] == ["recall.one"]


def test_model_server_that_comes_back_is_asked_again(folder: Path, models: Models) -> None:
    config = (
        "pipelines: {both: {deadline_ms: 9000, recall: {inverted: {}, semantic: {model: dpsr, deadline_ms: 9000}}}}"
    )
    port = free_port()
    with running(config, folder, dpsr=f"127.0.0.1:{port}") as shop:
        assert shop.search()["degraded"] == ["recall.semantic"]
        relay = _Relay(port, models.target)
        try:
            assert shop.search()["degraded"] == []
            relay.cut()
            # The connection is lost; the next search opens another one.
            assert shop.search()["degraded"] == []
        finally:
            relay.close()


class _Relay:
    """Forwards connections of a port to a target."""

    def __init__(self, port: int, target: str) -> None:
        host, _, number = target.rpartition(":")
        self._target = (host, int(number))
        self._pairs: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._pairs += [client, server]
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)

    def cut(self) -> None:
        for one in self._pairs:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._pairs.clear()

    def close(self) -> None:
        self.cut()
        self._listener.close()


# Users.


def test_models_are_told_what_they_read_of_a_user(shop: Shop, models: Models) -> None:
    user = {
        "id": 5,
        "features": {"gender": "f", "age": 31},
        "clicked_items": [101, 7],
        "past_queries": ["red", "blue"],
    }
    shop.search(pipeline="fine", user=user)
    (searched,), (ranked,) = models.requests["search"], models.requests["rank"]
    assert searched["user_gender"].tolist() == [b"f"] and searched["user_age"].tolist() == [31.0]
    assert searched["clicked_items"].tolist() == [[101, 7]]
    assert searched["past_queries"].tolist() == [[b"red", b"blue"]]
    assert ranked["user_gender"].tolist() == [b"f"]
    assert "user_age" not in ranked and "clicked_items" not in ranked
    shop.search(pipeline="fine")
    assert models.requests["search"][1]["user_gender"].tolist() == [b""]
    assert np.isnan(models.requests["search"][1]["user_age"]).all()
    assert models.requests["search"][1]["query"].tolist() == [b"red shoes"]
    assert int(models.requests["search"][1]["k"]) == 10
    assert models.requests["rank"][1]["user_id"].tolist() == []


def test_clicked_items_that_are_no_ids_are_left_out(shop: Shop, models: Models) -> None:
    answer = shop.search(pipeline="semantic", user={"clicked_items": ["9" * 20, "x", "101"]})
    assert answer["degraded"] == []
    assert models.requests["search"][0]["clicked_items"].tolist() == [[101]]


def test_features_that_no_model_reads_are_refused(shop: Shop) -> None:
    shop.search(pipeline="fine")  # by now all models have told their inputs
    error = shop.post({"query": "red", "user": {"features": {"shoe_size": 44}}}).error
    assert error == "user.features: no model reads 'shoe_size', expected one of age, gender"
    kinds = {one["name"]: one["kind"] for one in shop.get("/v1/pipelines").json["user_features"]}
    assert kinds == {"age": "number", "gender": "text"}


def test_proxies_are_told_the_user(folder: Path, models: Models) -> None:
    config = (
        "pipelines: {a: {recall: {semantic: {model: m, deadline_ms: 9000}}}}\n"
        f"models: {{m: {{target: '{models.target}', metadata_key: user-id}}}}\n"
    )
    with running(config, folder) as shop:
        shop.search(user={"id": "ann"})
        shop.search(user={"id": "ünı"})
        shop.search()
    assert [one.get("user-id") for one in models.metadata] == ["ann", None, None]


# Answers of models.


@pytest.mark.parametrize("content", [False, True])
def test_scores_and_rewrites_of_an_answer(content: bool) -> None:
    response = serving_apis.PredictResponse()
    scores = np.array([0.5, -1.25, 3], np.float32)
    response.outputs["scores"].CopyFrom(make_tensor(scores) if content else _typed(scores))
    assert model_client._scores_of(response, 3).tolist() == scores.tolist()
    with pytest.raises(ValueError, match=r"float32 \[3\], expected float32 \[4\]"):
        model_client._scores_of(response, 4)
    texts = np.array([["red sneakers", "\u9152", ""]], object)
    response.outputs["rewrites"].CopyFrom(make_tensor(texts))
    response.outputs["log_probabilities"].CopyFrom(make_tensor(scores[None]) if content else _typed(scores[None]))
    assert model_client._rewrites_of(response) == rewrites_of(response, 1)[0]
    assert [one.text for one in model_client._rewrites_of(response)] == ["red sneakers", "\u9152"]
    response.outputs["log_probabilities"].CopyFrom(make_tensor(scores[None, :2]))
    with pytest.raises(ValueError, match="log_probabilities"):
        model_client._rewrites_of(response)


def _typed(values: np.ndarray) -> Any:
    """Returns a tensor of floats whose values are in the typed field."""
    tensor = make_tensor(values)
    tensor.ClearField("tensor_content")
    tensor.float_val.extend(values.ravel().tolist())
    return tensor


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ids", [[7, 9, 5], [7, -1, 5], []])
def test_answers_are_read_in_both_forms_of_a_tensor(packed: bool, ids: list[int]) -> None:
    response = serving_apis.PredictResponse()
    columns: dict[str, tuple[str, Any, list[float]]] = {
        "item_ids": ("int64_val", np.int64, ids),
        "scores": ("float_val", np.float32, [3.0, 2.0, 1.0][: len(ids)]),
        "heads": ("int_val", np.int32, [1, 0, 2][: len(ids)]),
    }
    for name, (field, dtype, values) in columns.items():
        response.outputs[name].CopyFrom(make_tensor(np.array([values], dtype)))
        if not packed:
            response.outputs[name].ClearField("tensor_content")
            getattr(response.outputs[name], field).extend(values)
    found = model_client._row_of(response, with_heads=True)
    kept = [place for place, item in enumerate(ids) if item >= 0]
    for column, (_, dtype, values) in zip(found, columns.values(), strict=True):
        assert column is not None and column.dtype == dtype
        assert column.tolist() == [values[place] for place in kept]
    assert model_client._row_of(response, with_heads=False)[2] is None


# Pages, facets.


def test_pages_have_every_item_once(words: Shop) -> None:
    whole = words.search("red shoes", size=50)
    first = words.search("red shoes", size=7, facets=["brand"])
    pages = every_page(words, first, size=7, facets=["brand"])
    assert [len(page["items"]) for page in pages] == [7, 7, 7, 5]
    assert [item for page in pages for item in page["items"]] == whole["items"]
    for page in pages:
        assert (page["total"], page["facets"], page["query"]) == (26, first["facets"], "red shoes")
    sizes = every_page(words, words.search("red shoes", size=1), size=50)
    assert [len(page["items"]) for page in sizes] == [1, 25]


def test_a_retriever_asks_for_pages_that_the_gateway_allows(folder: Path) -> None:
    config = "pipelines: {bm25: {recall: {inverted: {}}}}\nlimits: {page_size: 7}"
    with running(config, folder) as shop:
        retriever = search_system(None, f"{shop.gateway.rest_address}/bm25")
        for k in (20, 5, 30):
            (row,), _ = retriever(["red shoes"], None, k)
            listed = [item for item in row.tolist() if item >= 0]
            assert len(set(listed)) == len(listed) == min(k, shop.search(size=7)["total"]) > 0


def test_pages_stay_when_models_change(shop: Shop, models: Models) -> None:
    whole = ids(shop.search(pipeline="fine", size=40))
    first = shop.search(pipeline="fine", size=4)
    models.search, models.rank = lambda inputs: [(139, 1.0)], lambda inputs: [float(i) for i in inputs["item_ids"]]
    models.fails["rank"] = grpc.StatusCode.INTERNAL
    asked = len(models.requests["search"])
    pages = every_page(shop, first, size=4)
    assert [item for page in pages for item in ids(page)] == whole
    assert len(models.requests["search"]) == asked
    assert all(page["degraded"] == [] for page in pages)


def test_facets_agree_with_the_list(shop: Shop) -> None:
    answer = shop.search("shoes", pipeline="both", size=100, facets=["brand", "price"])
    brands = [item["attributes"].get("brand") for item in answer["items"]]
    counts = {one["value"]: one["count"] for one in answer["facets"]["brand"]["values"]}
    assert counts == {brand: brands.count(brand) for brand in BRANDS}
    prices = [item["attributes"]["price"] for item in answer["items"]]
    assert answer["facets"]["price"] == {"kind": "number", "min": min(prices), "max": max(prices)}
    assert len(brands) == answer["total"]


def test_nothing_found_is_an_answer(words: Shop) -> None:
    answer = words.search("qwertz", facets=["brand", "price"])
    assert (answer["total"], answer["items"], answer["next_cursor"]) == (0, [], "")
    assert answer["facets"]["price"] == {"kind": "number", "min": None, "max": None}
    assert words.search("")["total"] == 0


def test_cursors_that_do_not_fit_are_refused(words: Shop, tmp_path: Path) -> None:
    good = words.search("red shoes", size=5, filters={"brand": ["acme"]})["next_cursor"]
    refused = {
        "is damaged": good[:-8],
        "is damaged; send": good[:40] + ("A" if good[40] != "A" else "B") + good[41:],
        "is damaged; send the": "x" * 60,
        "is damaged; send the next_cursor": "é",
    }
    for words_of_error, bad in refused.items():
        error = words.post({"cursor": bad}).error
        assert error.startswith("cursor: ") and words_of_error in error
    assert "another query" in words.post({"query": "blue", "cursor": good}).error
    assert "another filters" in words.post({"cursor": good, "filters": {"brand": "bolt"}}).error
    assert words.post({"query": "red shoes", "cursor": good, "filters": {"brand": ["acme"]}}).status == 200
    write_index(tmp_path / "index", items=30)
    with running("pipelines: {bm25: {recall: {inverted: {}}}}", tmp_path) as other:
        assert "another index" in other.post({"cursor": good}).error


def test_cursor_returns_what_was_packed() -> None:
    rng = np.random.default_rng(1)
    for n in (0, 1, 300):
        listed = cursor.List(
            'a "quoted" 手机', "p", "e/a", "", ("fine",), ("b",), rng.integers(0, 2**32 - 1, n),
            rng.normal(size=n), rng.integers(1, 300, n), rng.integers(0, 2**16, n).astype(np.uint16),
        )  # fmt: skip
        found, begin = cursor.unpack(cursor.pack(listed, n // 2, b"12345678"), b"12345678", 2**32)
        assert begin == n // 2
        assert (found.query, found.degraded, found.rewrites) == (listed.query, ("fine",), ("b",))
        np.testing.assert_array_equal(found.rows, listed.rows)
        np.testing.assert_array_equal(found.variants, np.minimum(listed.variants, 255))
        np.testing.assert_array_equal(found.sources, listed.sources)
    with pytest.raises(ValueError, match="damaged"):
        cursor.unpack(cursor.pack(listed, 0, b"12345678"), b"12345678", 1000)


def test_cursors_that_clients_make_up(words: Shop) -> None:
    of = cursor.fingerprint(words.searcher.catalogue.manifest)
    good, begin = cursor.unpack(words.search("red shoes", size=5)["next_cursor"], of, 40)
    answer = words.search(None, cursor=cursor.pack(dataclasses.replace(good, arm="made/up"), begin, of))
    assert (answer["arm"], answer["total"]) == ("", 26)
    assert "made/up" not in words.get("/metrics").body.decode()
    # Half of a surrogate pair, which has no form in UTF-8.
    data = base64.urlsafe_b64decode(cursor.pack(dataclasses.replace(good, query="AAAAAA"), begin, of))[4:]
    data = data.replace(b"AAAAAA", b"\\ud800")
    forged = base64.urlsafe_b64encode(struct.pack("<I", zlib.crc32(data)) + data).decode()
    assert "is damaged" in words.post({"cursor": forged}).error


# Experiments.

ARMS = """
pipelines:
  bm25: {recall: {inverted: {k: 40}}}
  short: {recall: {inverted: {k: 5}}}
experiments:
  bm25: {name: length, arms: {treatment: {weight: 1, pipeline: short}, control: {weight: 1, pipeline: bm25}}}
"""


def test_experiments_split_users(folder: Path) -> None:
    with running(ARMS, folder) as shop:
        for user in ("ann", "bob", "eve", 17):
            answer = shop.search(user={"id": user})
            arm = assign("length", str(user), {"treatment": 1, "control": 1})
            assert answer["arm"] == f"length/{arm}"
            assert answer["pipeline"] == {"treatment": "short", "control": "bm25"}[arm]
        assert shop.search(arm="treatment")["total"] == 5
        assert shop.search(pipeline="short")["arm"] == ""
        assert "expected one of treatment, control" in shop.post({"query": "red", "arm": "none"}).error
        assert "has no experiment" in shop.post({"query": "red", "pipeline": "short", "arm": "control"}).error
        assert "expected one of bm25, short" in shop.post({"query": "red", "pipeline": "full"}).error
        counted = shop.metric("dpsr_search_requests_total")
        assert sum(value for labels, value in counted.items() if 'arm="length/' in labels) == 5
        described = shop.get("/v1/pipelines").json
        assert described["pipelines"][0] == {
            "name": "bm25", "stages": ["recall.inverted", "coarse"], "arms": ["treatment", "control"]
        }  # fmt: skip
        page = shop.search(arm="control", size=3)
        assert shop.search(None, cursor=page["next_cursor"])["arm"] == "length/control"


# Hostile requests.


@pytest.mark.parametrize(
    ("body", "words_of_error"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 60_000, "nested too deeply"),
        (b'{"a":' * 30_000, "nested too deeply"),
        (b'{"query": "\xff"}', "not UTF-8"),
        (b'{"query": "\\ud800"}', "surrogate"),
        (b'{"query": "a", "query": "b"}', "twice"),
        (b'{"query": NaN}', "NaN"),
        ([], "expected an object"),
        ("red", "expected an object"),
        ({}, "query: is missing"),
        ({"query": None}, ""),
        ({"query": 7}, "query: got 7, expected a text"),
        ({"query": "a" * 1001}, "1001 characters"),
        ({"query": "a", "page": 2}, 'unknown field "page"'),
        ({"query": "a", "size": 0}, "size: got 0"),
        ({"query": "a", "size": True}, "size: got true"),
        ({"query": "a", "size": 51}, "size: got 51, expected at most 50"),
        ({"query": "a", "size": 10**30}, "size: got 1000"),
        ({"query": "a", "facets": ["colour"]}, "no attribute 'colour', expected one of brand, price"),
        ({"query": "a", "facets": "brand"}, "expected a list"),
        ({"query": "a", "facets": ["brand"] * 65}, "65 elements"),
        ({"query": "a", "filters": {"colour": "red"}}, "colour"),
        ({"query": "a", "filters": {"price": "cheap"}}, "price"),
        ({"query": "a", "filters": {"brand": {"min": 1}}}, "brand"),
        ({"query": "a", "filters": {"brand": []}}, "empty list"),
        ({"query": "a", "filters": {"price": {"min": 1, "low": 2}}}, 'unknown field "filters.price.low"'),
        ({"query": "a", "filters": {"price": {"min": 10**400}}}, "finite"),
        ({"query": "a", "filters": {"brand": [[1]]}}, "got a list"),
        ({"query": "a", "filters": {str(i): "a" for i in range(65)}}, "65 fields"),
        ({"query": "a", "user": {"name": "x"}}, 'unknown field "user.name"'),
        ({"query": "a", "user": {"id": 2**63}}, "64 bits"),
        ({"query": "a", "user": {"clicked_items": list(range(1001))}}, "1001 elements"),
        ({"query": "a", "user": {"features": {"age": {"x": 1}}}}, "user.features.age"),
        ({"query": "a", "explain": 1}, "true or false"),
        ({"query": "a", "pipeline": "none"}, "expected one of bm25"),
        ({"query": "a", "cursor": "x" * 140_000}, "characters"),
    ],
)  # fmt: skip
def test_wrong_requests_are_refused(words: Shop, body: Any, words_of_error: str) -> None:
    answer = words.post(body)
    if words_of_error:
        assert answer.status == 400
        assert words_of_error in answer.error
        assert len(answer.body) < 1000
    assert words.search("red shoes")["total"] == 26


def test_a_name_that_is_given_twice_among_many_is_found_at_once() -> None:
    """To compare each name with each takes seconds, in which the gateway answers nobody."""
    body = b"{" + b"".join(b'"%d":0,' % i for i in range(25_000)) + b'"24999":0}'
    begin = time.process_time()
    with pytest.raises(RequestError, match='"24999" is given twice'):
        load_json(body)
    assert time.process_time() - begin < 1


def test_text_of_users_is_no_query_syntax(words: Shop) -> None:
    plain = ids(words.search("red shoes", size=50))
    for text in ("red AND shoes", "+red +shoes", '"red shoes"~2', "red shoes^9", "brand:acme red shoes", "red* shoes"):
        found = words.search(text, size=50)
        assert set(ids(found)) >= set(plain), text
    assert words.search("*")["total"] == words.search("*:*")["total"] == words.search("text:[a TO z]")["total"] == 0


def test_large_bodies_and_other_paths_are_refused(folder: Path) -> None:
    config = "pipelines: {bm25: {recall: {inverted: {}}}}\nlimits: {body_bytes: 1000, receive_s: 0.3}"
    with running(config, folder) as shop:
        answer = shop.post(b'{"query": "' + b"a" * 2000 + b'"}')
        assert (answer.status, answer.error) == (413, "the body has more than 1000 bytes, which is the limit")
        chunked = _raw(
            shop,
            b"POST /v1/search HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n7d0\r\n" + b"a" * 2000 + b"\r\n",
        )
        assert chunked.startswith(b"HTTP/1.1 413")
        assert shop.get("/v1/nothing").status == 404
        wrong = call(shop.gateway.rest_address, "/v1/pipelines", {"query": "a"})
        assert (wrong.status, wrong.headers["Allow"]) == (405, "GET,HEAD".replace(",", ", "))
        assert shop.get("/v1/search").status == 405
        assert shop.post(b"<a/>", Content_Type="text/xml").status == 415
        # A body that does not come, and a connection that sends nothing at all.
        late = _raw(shop, b"POST /v1/search HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        assert late.startswith(b"HTTP/1.1 408")
        assert _raw(shop, b"") == b""
        assert _raw(shop, b"POST /v1/sea") == b""
        bad = _raw(shop, b"\x00\x01\x02\r\n\r\n")
        assert bad.startswith(b"HTTP/1.0 400") or bad.startswith(b"HTTP/1.1 400")
        assert shop.search()["items"]


def test_judgments_that_do_not_arrive_are_refused(folder: Path, tmp_path: Path) -> None:
    config = "pipelines: {bm25: {recall: {inverted: {}}}}\nlimits: {receive_s: 0.3}"
    judgments = JudgmentFile(tmp_path / "judgments.tsv")

    def add_routes(gateway: Gateway, index: InvertedIndex) -> Callable[[Any], None]:
        return functools.partial(
            add_page,
            catalogue=index.catalogue,
            judgments=judgments,
            host="127.0.0.1",
            read_body=gateway.read_body,
        )

    with running(config, folder, add_routes=add_routes) as shop:
        late = _raw(shop, b"POST /v1/judgments HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        assert late.startswith(b"HTTP/1.1 408")
        body = {"query": "red shoes", "item": shop.search()["items"][0]["id"], "grade": 1}
        assert call(shop.gateway.rest_address, "/v1/judgments", body).status == 200


def test_connections_above_the_limit_are_closed(folder: Path) -> None:
    config = "pipelines: {bm25: {recall: {inverted: {}}}}\nlimits: {connections: 1, receive_s: 600}"
    with running(config, folder) as shop:
        host, _, port = shop.gateway.rest_address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as first:
            first.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            assert first.recv(65536).startswith(b"HTTP/1.1 200")
            assert _raw(shop, b"") == b""


def test_connections_whose_answers_are_not_read_are_ended(folder: Path) -> None:
    config = "pipelines: {bm25: {recall: {inverted: {}}}}\nlimits: {connections: 1, answer_s: 0.5}"
    with running(config, folder) as shop:
        assert shop.gateway._site is not None
        # So that the kernel does not take all answers.
        shop.gateway._site.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        host, _, port = shop.gateway.rest_address.rpartition(":")
        with socket.socket() as first:
            first.settimeout(PATIENCE_S)
            first.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            first.connect((host, int(port)))
            first.sendall(b"GET /v1/openapi.json HTTP/1.1\r\nHost: a\r\n\r\n" * 200)
            # It has the only place until the gateway ends it.
            end, answer = time.monotonic() + PATIENCE_S, b""
            while not answer.startswith(b"HTTP/1.1 200"):
                assert time.monotonic() < end
                with contextlib.suppress(ConnectionError):
                    answer = _raw(shop, b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")


def _raw(shop: Shop, data: bytes) -> bytes:
    """Sends bytes, and returns all that comes back until the gateway ends the connection."""
    host, _, port = shop.gateway.rest_address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(data)
        received = b""
        while part := connection.recv(65536):
            received += part
            if received.startswith(b"HTTP") and b"\r\n\r\n" in received:
                break
        return received


def test_too_many_searches_are_refused(folder: Path, models: Models) -> None:
    models.delay_s = 0.5
    config = (
        "pipelines: {a: {deadline_ms: 9000, recall: {semantic: {model: dpsr, deadline_ms: 9000}}}}\n"
        "limits: {concurrent: 2}"
    )
    with running(config, folder, drain_s=PATIENCE_S, dpsr=models.target) as shop:
        answers: list[Any] = []
        threads = [threading.Thread(target=lambda: answers.append(shop.post({"query": "red"}))) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        statuses = sorted(answer.status for answer in answers)
        assert statuses[:2] == [200, 200] and statuses[-1] == 503
        refused = next(answer for answer in answers if answer.status == 503)
        assert "which is the limit" in refused.error and refused.headers["Retry-After"] == "1"


def test_searches_under_way_are_finished_at_the_end(folder: Path, models: Models) -> None:
    models.delay_s = 0.5
    config = "pipelines: {a: {deadline_ms: 9000, recall: {semantic: {model: dpsr, deadline_ms: 9000}}}}"
    answers: list[Any] = []
    with running(config, folder, drain_s=PATIENCE_S, dpsr=models.target) as shop:
        thread = threading.Thread(target=lambda: answers.append(shop.post({"query": "red"})))
        thread.start()
        while not models.requests["search"]:
            time.sleep(0.01)
    thread.join(PATIENCE_S)
    assert answers[0].status == 200
    with pytest.raises(OSError):
        shop.get("/healthz")


# gRPC.


def _stub(channel: Any, method: str = "Search", answer: Any = SearchAnswer) -> Any:
    return channel.unary_unary(
        f"/dpsr.search.v1.Search/{method}",
        request_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
        response_deserializer=answer.FromString,
    )


def test_grpc_answers_the_same_as_rest(shop: Shop) -> None:
    fields: dict[str, Any] = {
        "pipeline": "full",
        "filters": {"brand": ["acme", "bolt"], "price": {"min": 1.0, "max": 30.0}},
        "facets": ["brand", "price"],
        "size": 5,
        "explain": True,
        "user": {"id": 7, "features": {"gender": "f", "age": 30.0}, "clicked_items": [101], "past_queries": ["red"]},
    }
    rest = shop.search("red shoes", **fields)
    request = SearchMessage(query="red shoes", pipeline="full", facets=["brand", "price"], size=5, explain=True)
    request.filters["brand"].texts.extend(["acme", "bolt"])
    request.filters["price"].min, request.filters["price"].max = 1.0, 30.0
    request.user.number = 7
    request.user.features["gender"].text = "f"
    request.user.features["age"].number = 30.0
    request.user.clicked_items.add(id_number=101)
    request.user.past_queries.append("red")
    with grpc.insecure_channel(shop.gateway.grpc_address) as channel:
        found = _stub(channel)(request, timeout=PATIENCE_S)
        assert [item.id for item in found.items] == ids(rest)
        for item, expected in zip(found.items, rest["items"], strict=True):
            assert (item.title, list(item.sources)) == (expected["title"], expected["sources"])
            assert (item.group, item.variants) == (expected["group"], expected["variants"])
            assert item.attributes["price"].number == expected["attributes"]["price"]
            assert item.attributes["brand"].text == expected["attributes"]["brand"]
            assert {name: one.rank for name, one in item.explain.recall.items()} == {
                name: one["rank"] for name, one in expected["explain"].items() if isinstance(one, dict)
            }
            assert item.explain.fine == pytest.approx(expected["explain"]["fine"], rel=1e-5)
        assert [(one.value, one.count) for one in found.facets["brand"].values] == [
            (one["value"], one["count"]) for one in rest["facets"]["brand"]["values"]
        ]
        assert found.facets["price"].max == rest["facets"]["price"]["max"]
        assert [stage.name for stage in found.explain.stages] == [s["name"] for s in rest["explain"]["stages"]]
        assert (found.total, list(found.rewrites)) == (rest["total"], rest["rewrites"])
        following = _stub(channel)(SearchMessage(cursor=found.next_cursor, size=3), timeout=PATIENCE_S)
        expected = shop.search(None, cursor=rest["next_cursor"], size=3)
        assert [item.id for item in following.items] == ids(expected)
        pipelines = search_api.message("dpsr.search.v1.ListPipelinesResponse")
        listed = _stub(channel, "ListPipelines", pipelines)(b"", timeout=PATIENCE_S)
        assert [one.name for one in listed.pipelines] == ["bm25", "semantic", "both", "fine", "full"]
        assert [one.kind for one in listed.attributes] == ["keyword", "number"]


def test_grpc_refuses_wrong_requests(words: Shop) -> None:
    with grpc.insecure_channel(words.gateway.grpc_address) as channel:
        for request, words_of_error in (
            (b"\xff\xff", "dpsr.search.v1.SearchRequest"),
            (b"\x0a\x02\xff\xfe", "dpsr.search.v1.SearchRequest"),
            (SearchMessage(query="a", size=51), "at most 50"),
            (SearchMessage(query="a", size=-1), "size"),
            (SearchMessage(query="a", facets=["colour"]), "colour"),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                _stub(channel)(request, timeout=PATIENCE_S)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert words_of_error in refused.value.details()
        request = SearchMessage(query="a")
        request.filters["price"].min = 1
        request.filters["price"].numbers.append(2)
        with pytest.raises(grpc.RpcError, match="give one of them"):
            _stub(channel)(request, timeout=PATIENCE_S)


def test_grpc_has_reflection_and_health(words: Shop) -> None:
    from google.protobuf import descriptor_pool
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    with grpc.insecure_channel(words.gateway.grpc_address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert set(database.get_services()) >= {"dpsr.search.v1.Search", "grpc.health.v1.Health"}
        service = descriptor_pool.DescriptorPool(database).FindServiceByName("dpsr.search.v1.Search")
        assert [method.name for method in service.methods] == ["Search", "ListPipelines"]
        health = grpc_services.HealthCheckResponse
        check = channel.unary_unary("/grpc.health.v1.Health/Check", response_deserializer=health.FromString)
        assert check(b"", timeout=PATIENCE_S).status == 1
        asked = grpc_services.HealthCheckRequest(service="nobody")
        with pytest.raises(grpc.RpcError, match="there is no service 'nobody'"):
            check(asked.SerializeToString(), timeout=PATIENCE_S)
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch", response_deserializer=health.FromString)
        watching = watch(b"", timeout=PATIENCE_S)
        assert next(watching).status == 1
        watching.cancel()


def test_watchers_of_the_health_do_not_keep_searches_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_api, "_STREAMS", 3)
    config = "pipelines: {bm25: {recall: {inverted: {}}}}\nlimits: {concurrent: 1}"
    with running(config, folder) as shop, grpc.insecure_channel(shop.gateway.grpc_address) as channel:
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")
        watchers = [watch(b"", timeout=PATIENCE_S) for _ in range(3)]
        assert all([next(one) for one in watchers])
        for _ in range(2):
            with pytest.raises(grpc.RpcError, match="3 streaming calls are under way") as refused:
                next(watch(b"", timeout=PATIENCE_S))
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert _stub(channel)(SearchMessage(query="red shoes"), timeout=PATIENCE_S).items
        watchers.pop().cancel()
        # The gateway hears of that a little later.
        end, status = time.monotonic() + PATIENCE_S, b""
        while not status:
            assert time.monotonic() < end
            with contextlib.suppress(grpc.RpcError):
                status = next(watch(b"", timeout=PATIENCE_S))
        for one in watchers:
            one.cancel()


def test_watching_the_health_does_not_keep_the_gateway(folder: Path) -> None:
    with contextlib.ExitStack() as clients:
        with running("pipelines: {bm25: {recall: {inverted: {}}}}", folder, drain_s=PATIENCE_S) as shop:
            channel = clients.enter_context(grpc.insecure_channel(shop.gateway.grpc_address))
            watching = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=2 * PATIENCE_S)
            assert next(watching)
            begin = time.monotonic()
        assert time.monotonic() - begin < PATIENCE_S / 2


# Descriptions.


def test_openapi_describes_every_field(shop: Shop) -> None:
    schemas = OPENAPI["components"]["schemas"]
    answer = shop.search("red shoes", pipeline="full", explain=True, facets=["brand", "price"], size=2)
    _check(answer, {"$ref": "#/components/schemas/SearchResponse"}, schemas, "answer")
    _check(shop.get("/v1/pipelines").json, schemas["Pipelines"], schemas, "pipelines")
    assert shop.get("/v1/openapi.json").json == json.loads(json.dumps(OPENAPI))
    fields = {field.name for field in dataclasses.fields(SearchRequest)} - {"user_id"}
    assert set(schemas["SearchRequest"]["properties"]) == fields
    for name in fields - {"query"}:
        SearchRequest.from_dict({"query": "a", name: None})
    with pytest.raises(RequestError):
        SearchRequest.from_dict({"query": "a", "user_id": 1})


def _check(value: Any, schema: dict[str, Any], schemas: dict[str, Any], where: str) -> None:
    """Fails if a value has a field that the schema does not name, or lacks one that it demands."""
    if "$ref" in schema:
        schema = schemas[schema["$ref"].rpartition("/")[2]]
    if "oneOf" in schema and isinstance(value, dict):
        schema = next(one for one in schema["oneOf"] if one["properties"]["kind"]["const"] == value["kind"])
    if isinstance(value, dict) and "properties" in schema:
        assert set(value) <= set(schema["properties"]), where
        assert set(schema.get("required", ())) <= set(value), where
        for name, one in value.items():
            _check(one, schema["properties"][name], schemas, f"{where}.{name}")
    elif isinstance(value, dict):
        for name, one in value.items():
            _check(one, schema.get("additionalProperties", {}), schemas, f"{where}.{name}")
    elif isinstance(value, list) and "items" in schema:
        for one in value:
            _check(one, schema["items"], schemas, where)
    kinds = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", list: "array"}
    wanted = schema.get("type")
    if wanted is not None and not isinstance(value, dict):
        allowed = wanted if isinstance(wanted, list) else [wanted]
        assert kinds[type(value)] in allowed or (type(value) is int and "number" in allowed), (where, value)


def test_answers_are_written_in_full() -> None:
    item = Item(1, "a", float("nan"), key="k", group="g", variants=2, sources=("x",))
    answer = SearchResponse("q", "p", 1, [item], {"price": Facet("number", minimum=1.0, maximum=2.0)})
    tree = json.loads(answer.to_json())
    assert tree["items"][0]["score"] is None
    assert tree["facets"]["price"] == {"kind": "number", "min": 1.0, "max": 2.0}
    assert "explain" not in tree and "explain" not in tree["items"][0]


def test_other_paths_answer(words: Shop) -> None:
    assert words.get("/healthz").body == words.get("/readyz").body == b"ok\n"
    words.search("red")
    text = words.get("/metrics").body.decode()
    assert '# TYPE dpsr_search_requests_total counter\ndpsr_search_requests_total{api="' in text
    assert words.metric("dpsr_search_stage_seconds_count")['{pipeline="bm25",stage="recall.inverted"}'] >= 1
    assert words.metric("dpsr_search_under_way") == {"{}": 0}


# Configuration.


@pytest.mark.parametrize(
    ("text", "words_of_error"),
    [
        ("pipelines: {}", "index: got None"),
        ("index: a\npipelines: {}", "line 2: pipelines: got none"),
        ("index: a\npipeline: {}", "line 2: the configuration: unknown key 'pipeline', allowed: index,"),
        (
            "index: a\npipelines:\n  a:\n    recall: {inverted: {}}\n    fin: {}",
            "line 5: pipelines.a: unknown key 'fin'",
        ),
        ("index: a\npipelines:\n  a: {recall: {}}", "line 3: pipelines.a.recall: got {}, expected at least one source"),
        ("index: a\npipelines:\n  a: {recall: {inverted: {k: 0}}}", "line 3: pipelines.a.recall.inverted.k: got 0"),
        ("index: a\npipelines:\n  a: {recall: {inverted: {K: 1}}}", "unknown key 'K', allowed: k, deadline_ms, weight"),
        ("index: a\npipelines:\n  a: {recall: {inverted: {model: m}}}", "unknown key 'model'"),
        ("index: a\npipelines:\n  a: {recall: {dense: {}}}", "a.recall.dense.model: got None, expected one of the"),
        ("index: a\npipelines:\n  a: {recall: {coarse: {}}}", "none of identifier, coarse, fine, rerank"),
        ("index: a\npipelines:\n  a: {recall: {rewritten: {}}}", "expected a section `rewrite` beside recall"),
        (
            "index: a\nmodels: {m: {target: 'a:1'}}\npipelines:\n  a: {recall: {inverted: {}}, rewrite: {model: m}}",
            "line 4: pipelines.a.rewrite: nothing looks rewrites up",
        ),
        ("index: a\nmodels:\n  m: {target: localhost}", "line 3: models.m.target: got 'localhost', expected host:port"),
        ("index: a\nmodels:\n  m: {}", "models.m.target: got None"),
        (
            "index: a\nmodels: {m: {target: 'a:1'}}\npipelines:\n  a:\n    recall: {inverted: {}}\n"
            "    fine: {model: x}",
            "line 6: pipelines.a.fine.model: got 'x', expected one of the configured models: m",
        ),
        ("index: a\npipelines: {a: {recall: {inverted: {}}, coarse: {method: best}}}", "'ranks' or 'learned'"),
        ("index: a\npipelines: {a: {recall: {inverted: {}}, coarse: {method: learned}}}", "coarse.file: got None"),
        ("index: a\npipelines: {a: {recall: {inverted: {}}, coarse: {file: b}}}", "the method 'learned', and no other"),
        ("index: a\npipelines: {a: {recall: {inverted: {}}, rerank: {diverse: 1}}}", "unknown key 'diverse'"),
        ("index: a\npipelines: {a: {recall: {inverted: {}}, identifiers: on}}", "'first', 'only' or 'off'"),
        ("index: a\npipelines: {a: {recall: {inverted: {}}}}\ndefault: b", "line 3: default: got 'b'"),
        ("index: a\npipelines: {a: {recall: {inverted: {}}}}\nexperiments: {b: {arms: {}}}", "experiments.b.arms"),
        (
            "index: a\npipelines: {a: {recall: {inverted: {}}}}\nexperiments:\n"
            "  b: {arms: {x: {weight: 1, pipeline: a}}}",
            "line 4: experiments.b: expected the name of a pipeline: a",
        ),
        (
            "index: a\npipelines: {a: {recall: {inverted: {}}}}\nexperiments:\n"
            "  a: {arms: {x: {weight: 0, pipeline: a}}}",
            "weight: got 0, expected a number above 0",
        ),
        ("index: a\npipelines: {a: {recall: {inverted: {}}}}\nlimits: {page_size: 9999}", "an integer from 1 to 1000"),
        (
            "index: a\npipelines: {a: {recall: {inverted: {}}}}\nlimits:\n  pages: 3",
            "line 4: limits: unknown key 'pages'",
        ),
        ("index: a\npipelines: {a: {recall: {inverted: {}}}}\npipelines: {}", "given twice"),
        ("index: a\npipelines: [a]", "line 2: pipelines: got ['a'], expected a mapping of names"),
        ("index: [", "not valid YAML"),
    ],
)
def test_wrong_configurations_are_refused(text: str, words_of_error: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_config(text)
    assert words_of_error in str(refused.value)


def test_files_of_a_configuration_are_read_at_the_start(folder: Path, tmp_path: Path) -> None:
    config = "pipelines: {{bm25: {{recall: {{inverted: {{}}}}, {}}}}}"
    with (
        pytest.raises(CommandError, match=r"none\.json"),
        running(config.format("coarse: {method: learned, file: none.json}"), folder),
    ):
        pass
    with (
        pytest.raises(UsageError, match="no keyword attribute 'price'"),
        running(config.format("rerank: {diversity: {attributes: [price]}}"), folder),
    ):
        pass
    (folder / "rules.yaml").write_text("sale:\n  pin: [107]\n  sink: 3\n")
    with (
        pytest.raises(UsageError, match=r"rules.yaml: line 3: sale: unknown key 'sink'"),
        running(config.format("rerank: {rules: rules.yaml}"), folder),
    ):
        pass


def test_servables_of_another_store_are_refused(folder: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "servable" / "3" / "assets.extra" / "dpsr_manifest.json"
    manifest.parent.mkdir(parents=True)
    config = tmp_path / "search.yaml"
    config.write_text(
        f"index: {folder / 'index'}\nmodels: {{dpsr: {{target: 'a:1', servable: servable}}}}\n"
        "pipelines: {bm25: {recall: {inverted: {}}}}\n"
    )
    manifest.write_text(json.dumps({"vocabulary_fingerprint": "00ff"}))
    refused = run_command("search", f"--config={config}", "--port=0")
    assert refused.returncode == 1
    assert "its vocabulary is 00ff, that of the inverted index is 0; make both from one store" in refused.stderr
    manifest.write_text(json.dumps({"kind": "ranker"}))
    refused = run_command("search", f"--config={config}", "--port=0")
    assert refused.returncode == 1
    assert "is a ranker servable, which has no vocabulary to compare with the index; leave `servable` out" in (
        refused.stderr
    )


def test_rules_are_read_again(folder: Path) -> None:
    (folder / "rules.yaml").write_text("sale:\n  queries: [red shoes]\n  pin: [107]\n")
    config = "pipelines: {bm25: {recall: {inverted: {}}, rerank: {collapse: false, rules: rules.yaml}}}"
    with running(config, folder) as shop:
        answer = shop.search("red shoes", explain=True)
        assert ids(answer)[0] == 107
        assert "sale: pinned" in answer["items"][0]["explain"]["rerank"]
        (folder / "rules.yaml").write_text("sale:\n  queries: [red shoes]\n  pin: [139]\n")
        end = time.monotonic() + PATIENCE_S
        while ids(shop.search("red shoes"))[0] != 139:
            assert time.monotonic() < end
            time.sleep(0.05)
        while not shop.metric("dpsr_search_rule_reloads_total"):
            assert time.monotonic() < end


def test_load_generator_counts_what_it_sees(folder: Path, models: Models, tmp_path: Path) -> None:
    """That of benchmarks/search_speed.py."""
    script = Path(__file__).parents[2] / "benchmarks" / "search_load.py"
    (tmp_path / "requests.json").write_text(
        json.dumps(['{"query": "red"}', '{"query": "shoes", "explain": true}', "{"])
    )
    models.fails["search"] = grpc.StatusCode.INTERNAL
    config = "pipelines: {both: {recall: {inverted: {deadline_ms: 9000}, semantic: {model: dpsr}}}}"
    with running(config, folder, dpsr=models.target) as shop:
        for rate in ("0", "60"):
            given = [shop.gateway.rest_address, str(tmp_path / "requests.json"), "0.3", rate, "1"]
            ended = subprocess.run([sys.executable, script, *given], capture_output=True, text=True, check=True)
            seen = json.loads(ended.stdout)
            answered = len(seen["latencies"]) - seen["failed"]
            assert answered > 0 and seen["failed"] > 0
            assert seen["degraded"] == {"recall.semantic": answered}


def test_cursor_of_the_longest_list_is_taken_back() -> None:
    n = 5000
    texts = ("字" * 1000,) * 10
    numbers = (np.arange(n), np.ones(n), np.ones(n, np.int64), np.ones(n, np.uint16))
    listed = cursor.List("手" * 1000, "p" * 100, "e/a", "", ("fine",), texts, *numbers)
    packed = cursor.pack(listed, 20, b"12345678")
    assert SearchRequest.from_dict({"cursor": packed}).cursor == packed
