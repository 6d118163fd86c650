"""The inputs that both clients fill into the `search` signature, as echoed by real model servers."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import PATIENCE_S, free_port, freeze, run_command, save_search_model
from proxy_backends import RecordingBackend, wait_until, write_yaml
from saved_models import publish

from dpsr_common import serving_apis
from dpsr_serving.client import AsyncSearchClient, ModelVersion, SearchClient, ServingError, Tls, User, retriever
from dpsr_serving.model_server import ModelServer, start_model_server
from dpsr_serving.search import Signature, expressions, make_search

PLAIN = {
    "k": "5",
    "search_parameters": "",
    "include": "0",
    "exclude": "0",
    "excluded_item_ids": "0",
    "user_gender": "",
    "user_age": "nan",
    "user_likes": "0",
    "clicked_items": "0",
    "clicked_item_types": "0",
    "past_queries": "0",
}


def save_echo(path: Path, keyed: bool = False, **features: str) -> None:
    """A model with every input of `search` that echoes its inputs, as "NAME: VALUE" in item_keys.

    A row's lists are their values joined by ",", with "n:" in front: how wide the tensor was. `features` are user
    features: name -> "text", "number" or "texts".
    """
    import tensorflow as tf

    items = tf.string if keyed else tf.int64
    suffix = ("item_keys", "item_keys") if keyed else ("items", "item_ids")
    specs = {
        "query": tf.TensorSpec([None], tf.string),
        "k": tf.TensorSpec([], tf.int32),
        "search_parameters": tf.TensorSpec([], tf.string),
        "include": tf.TensorSpec([None, None], tf.string),
        "exclude": tf.TensorSpec([None, None], tf.string),
        f"excluded_{suffix[1]}": tf.TensorSpec([None, None], items),
        f"clicked_{suffix[0]}": tf.TensorSpec([None, None], items),
        "clicked_item_types": tf.TensorSpec([None, None], tf.string),
        "past_queries": tf.TensorSpec([None, None], tf.string),
    }
    kinds = {"text": ([None], tf.string), "number": ([None], tf.float32), "texts": ([None, None], tf.string)}
    specs |= {f"user_{name}": tf.TensorSpec(*kinds[kind]) for name, kind in features.items()}
    specs = {name: tf.TensorSpec(spec.shape, spec.dtype, name) for name, spec in specs.items()}

    def answer(batch: Any, lines: list[Any]) -> dict[str, Any]:
        keys = tf.stack([tf.broadcast_to(line, [batch]) for line in lines], axis=1)
        shape = tf.shape(keys)
        return {
            "item_ids": tf.cast(tf.ones(shape), tf.int64),
            "scores": tf.ones(shape),
            "heads": tf.zeros(shape, tf.int32),
            "item_keys": keys,
        }

    class Echo(tf.Module):
        @tf.function(input_signature=[specs["query"]])
        def serve(self, query: tf.Tensor) -> dict[str, tf.Tensor]:
            # The number of results is a constant, as in an exported servable.
            return {name: tf.ensure_shape(value, [None, 1]) for name, value in answer(tf.size(query), [query]).items()}

        def search(self, **inputs: tf.Tensor) -> dict[str, tf.Tensor]:
            lines = []
            for name, value in sorted(inputs.items()):
                if value.shape.rank == 2:
                    width = tf.strings.as_string(tf.shape(value)[1])
                    texts = value if value.dtype == tf.string else tf.strings.as_string(value)
                    joined = tf.strings.reduce_join(texts, axis=1, separator=",")
                    value = tf.strings.join([tf.fill([tf.size(inputs["query"])], width), joined], ":")
                elif value.dtype != tf.string:
                    value = tf.strings.as_string(value, shortest=value.dtype.is_floating)
                lines.append(tf.strings.join([name, value], ": "))
            return answer(tf.size(inputs["query"]), lines)

    module = Echo()
    module.search = tf.function(module.search)
    search = module.search.get_concrete_function(**specs)
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.serve, "search": search})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Versions to publish: "echo", "keyed", "more" (another user feature) and "simple" (query and k only)."""
    root = tmp_path_factory.mktemp("echo")
    features = {"gender": "text", "age": "number", "likes": "texts"}
    save_echo(root / "echo", **features)
    save_echo(root / "keyed", keyed=True)
    save_echo(root / "more", **features, city="text")
    save_search_model(root / "simple", base=500)
    return {name: root / name for name in ("echo", "keyed", "more", "simple")}


@pytest.fixture(scope="module")
def echo(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ModelServer]]:
    running: dict[str, ModelServer] = {}
    try:
        for name in ("echo", "keyed"):
            base = tmp_path_factory.mktemp(name)
            publish(models[name], base, 3)
            running[name] = start_model_server(base, name, op_libraries=())
        yield running
    finally:
        for server in running.values():
            server.stop()


def said(result: Any) -> dict[str, str]:
    """The inputs that the model got. A list is written as its width and, if that is not zero, ":values"."""
    pairs = (line.split(": ", 1) for line in result.item_keys)
    return {name: value.removesuffix(":") for name, value in pairs}


# What is sent


def test_what_is_left_out_is_empty(echo: dict[str, ModelServer]) -> None:
    with SearchClient(echo["echo"].target, "echo") as client:
        (plain,) = client.search("a")  # serving_default
        assert plain.item_keys == ("a",) and plain.version == 3
        first, second = client.search(["a", "b"], k=5)
        assert said(first) == {"query": "a", **PLAIN} and said(second) == {"query": "b", **PLAIN}
        # Without k, as many as serving_default gives.
        assert said(client.search("a", filters={"brand": "Acme"})[0])["k"] == "1"


def test_everything_is_sent_as_the_model_takes_it(echo: dict[str, ModelServer]) -> None:
    user = User({"gender": "f", "age": 31, "likes": ["tea", "été"]}, [17, 4], ["red", b"\xff"], ["", "order"])
    everything: dict[str, Any] = {
        "user": user,
        "filters": {"brand": ["Acme", "A|B"], "price": (10, 20.5)},
        "exclude_filters": {"color": "red"},
        "exclude_items": np.array([8, 9]),
        "search_parameters": "nprobe=64",
    }
    expected = {
        "query": "a",
        "k": "5",
        "search_parameters": "nprobe=64",
        "include": r"2:brand=Acme|A\|B,price=10..20.5",
        "exclude": "1:color=red",
        "excluded_item_ids": "2:8,9",
        "user_gender": "f",
        "user_age": "31",
        "user_likes": "2:tea,été",
        "clicked_items": "2:17,4",
        "clicked_item_types": "2:,order",
        "past_queries": "2:red,�",
    }
    with SearchClient(echo["echo"].target, "echo") as client:
        assert said(client.search("a", 5, **everything)[0]) == expected
        # A user of their own for each query; lists are padded to the longest.
        first, second = client.search(["a", "b"], 5, user=[user, None])
        assert said(first)["clicked_items"] == "2:17,4" and said(second)["clicked_items"] == "2:-1,-1"
        assert said(second)["user_age"] == "nan" and said(second)["user_likes"] == "2:,"
        everything["user"] = {"features": {"gender": "f", "age": 31, "likes": ["tea", "été"]}, "clicked_items": [17, 4]}
        expected |= {"past_queries": "0", "clicked_item_types": "0"}
        assert said(client.search("a", 5, **everything)[0]) == expected
    with SearchClient(echo["keyed"].target, "keyed") as client:
        (result,) = client.search("a", 5, user=User(clicked_items=["x-1"]), exclude_items=["y"])
        assert said(result)["clicked_item_keys"] == "1:x-1" and said(result)["excluded_item_keys"] == "1:y"


def test_what_the_model_does_not_take_is_a_value_error_that_says_what_it_takes(
    echo: dict[str, ModelServer], servers: dict[str, ModelServer]
) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"user": User({"height": 3})}, "no user feature 'height'; those it reads: age, gender, likes"),
        ({"user": User({"age": "old"})}, "'age': expected a number, got 'old'"),
        ({"user": User({"gender": ["f"]})}, r"'gender': expected one text, got \['f'\]"),
        ({"user": User({"likes": "tea"})}, "'likes': expected a list of texts, got 'tea'"),
        ({"user": User({"likes": [1]})}, "expected a sequence of texts"),
        ({"user": User(past_queries="red")}, "past_queries: expected a sequence of texts, got 'red'"),
        ({"user": {"age": 3}}, "unknown user attribute 'age', expected features, clicked_items, past_queries"),
        ({"user": [None, None]}, "2 users for 1 queries"),
        ({"exclude_items": ["sku-1"]}, "identifies items by id, an integer; got 'sku-1'"),
        ({"exclude_items": [2**63]}, "an integer; got 9223372036854775808, which does not fit"),
    ]
    with SearchClient(echo["echo"].target, "echo") as client:
        for arguments, words in wrong:
            with pytest.raises(ValueError, match=words):
                client.search("a", 5, **arguments)
    with (
        SearchClient(echo["keyed"].target, "keyed") as client,
        pytest.raises(ValueError, match="items by key, a text; got 7"),
    ):
        client.search("a", 5, exclude_items=[7])
    with SearchClient(servers["shop"].target, "shop") as client:  # takes query and k
        assert client.search("abc", 2)[0].item_ids.tolist() == [100, 101]
        for arguments in ({"filters": {"a": "b"}}, {"exclude_items": [1]}, {"search_parameters": "nprobe=1"}):
            with pytest.raises(ValueError, match=r"this model takes no \w+; its inputs are k, query"):
                client.search("a", 5, **arguments)


def test_the_server_says_what_is_wrong_with_a_request(start_backend: Any) -> None:
    backend = start_backend()

    def refuse(request: bytes, context: Any) -> bytes:
        if backend.calls[-1][0] == serving_apis.GET_MODEL_METADATA:
            return signature_of("query", "k", "include", "exclude")
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no attribute 'brnd'; there are brand, price")
        raise AssertionError

    backend.answer = refuse
    with SearchClient(backend.target, "m") as client, pytest.raises(ValueError, match="there are brand, price"):
        client.search("a", 5, filters={"brnd": "x"})


def signature_of(*names: str) -> bytes:
    """The metadata of a model with these inputs, strings all, and k."""
    signatures = serving_apis.SignatureDefMap()
    for name in names:
        info = signatures.signature_def["search"].inputs[name]
        info.dtype = 3 if name == "k" else 7
        for _ in range(0 if name == "k" else 1 if name == "query" or name.startswith("user_") else 2):
            info.tensor_shape.dim.add(size=-1)
    response = serving_apis.GetModelMetadataResponse()
    response.metadata["signature_def"].value = signatures.SerializeToString()
    return bytes(response.SerializeToString())


# Filters


def test_expressions() -> None:
    assert expressions({"brand": "A|B\\C", "n": 3, "size": {40}, "x": 0.25, "big": 1e15}) == [
        "brand=A\\|B\\\\C",
        "n=3",
        "size=40",
        "x=0.25",
        "big=1000000000000000",
    ]
    assert expressions({"p": (None, 2), "q": (-1.5, None), "r": [1, "a"]}) == ["p=..2", "q=-1.5..", "r=1|a"]
    assert expressions(["brand=a|b"]) == ["brand=a|b"] and expressions(()) == []
    for bad in ({"": "a"}, {"a=b": "c"}, {"a": []}, {"a": (1,)}, {"a": (None, None)}, {"a": ("x", "y")}, "a=b"):
        with pytest.raises(ValueError):
            expressions(bad)  # type: ignore[arg-type]
    for value in (float("nan"), float("inf"), True, None):
        with pytest.raises(ValueError, match="expected a text or a finite number"):
            expressions({"a": value})  # type: ignore[dict-item]


@given(st.lists(st.text("ab|\\=.", min_size=1), min_size=1))
def test_escaped_alternatives_read_back(values: list[str]) -> None:
    (expression,) = expressions({"a": values})
    read, escaped = [""], False
    for char in expression.removeprefix("a="):
        if char == "|" and not escaped:
            read.append("")
        elif char == "\\" and not escaped:
            escaped = True
            continue
        else:
            read[-1] += char
        escaped = False
    assert read == values


def test_an_option_that_does_not_exist_is_named() -> None:
    options: dict[str, Any] = {"filter": {"brand": "Acme"}}
    with pytest.raises(TypeError, match="unknown option 'filter', expected metadata, user, filters"):
        make_search(["a"], 3, **options)


def test_an_input_that_no_client_knows_is_named() -> None:
    signature = Signature({"query": (7, 1), "k": (3, 0), "weather": (1, 1)})
    with pytest.raises(ValueError, match="'weather', float of rank 1"):
        signature.tensors(make_search(["a"], 3))
    with pytest.raises(ValueError, match="k is missing"):
        Signature({"query": (7, 1), "k": (3, 0)}).tensors(make_search(["a"], None))


# Versions, transports


@pytest.mark.slow
def test_another_version_is_learnt(models: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    publish(models["simple"], base, 1)
    polling = ("--file_system_poll_wait_seconds=1",)
    with (
        start_model_server(base, "m", op_libraries=(), arguments=polling) as server,
        SearchClient(server.target, "m") as client,
    ):
        assert client.search("abc", 2)[0].item_ids.tolist() == [500, 501]
        publish(models["echo"], base, 2)
        # The request for two inputs is refused by the new version, whose signature the client then asks for.
        wait_until(lambda: client.search("a", 2)[0].version == 2)
        assert said(client.search("a", 2, user=User({"age": 3}))[0])["user_age"] == "3"
        publish(models["more"], base, 3)
        wait_until(lambda: client.model_status()[0] == ModelVersion(3, "AVAILABLE", ""))
        assert said(client.search("a", 2, user=User({"city": "Oslo"}))[0])["user_city"] == "Oslo"
        with pytest.raises(ValueError, match="'height'; those it reads: age, city, gender, likes"):
            client.search("a", 2, user=User({"height": 3}))


def test_async_client_is_the_same(echo: dict[str, ModelServer]) -> None:
    async def ask() -> None:
        async with AsyncSearchClient(echo["echo"].target, "echo") as client:
            one, many = await asyncio.gather(
                client.search("a", 5, user=User({"age": 3}), filters={"b": "c"}), client.search(["x", "y"])
            )
            assert said(one[0]) == {"query": "a", **PLAIN, "user_age": "3", "include": "1:b=c"}
            assert [result.item_keys for result in many] == [("x",), ("y",)]
            assert (await client.model_status())[0].version == 3
            with pytest.raises(ValueError, match="those it reads: age"):
                await client.search("a", 5, user=User({"height": 3}))
        async with AsyncSearchClient(echo["echo"].target, "nowhere") as client:
            with pytest.raises(ServingError, match="does not serve a model 'nowhere'"):
                await client.search("a")

    asyncio.run(ask())


def test_version_label_and_metadata(start_backend: Any) -> None:
    backend: RecordingBackend = start_backend()
    backend.answer = lambda request, context: (context.abort(grpc.StatusCode.ABORTED, "seen"), b"")[1]
    for arguments, version, label in (({}, 0, ""), ({"version": 7}, 7, ""), ({"label": "canary"}, 0, "canary")):
        with SearchClient(backend.target, "m", metadata={"user-id": "u1", "a": "1"}, **arguments) as client:
            with pytest.raises(ServingError) as raised:
                client.search("q", metadata={"user-id": "u2"})
            assert raised.value.code is grpc.StatusCode.ABORTED and len(backend.calls) == 1
        _, request, metadata, _ = backend.calls.pop()
        spec = serving_apis.PredictRequest.FromString(request).model_spec
        assert (spec.version.value, spec.version_label) == (version, label)
        assert metadata["user-id"] == "u2" and metadata["a"] == "1"
    with pytest.raises(ValueError, match="a version or a label"):
        SearchClient("h:1", "m", version=1, label="x")


def test_only_unavailable_is_tried_again_and_only_within_the_deadline(start_backend: Any) -> None:
    backend: RecordingBackend = start_backend()

    def refuse(code: grpc.StatusCode, times: int) -> None:
        backend.calls.clear()

        def answer(request: bytes, context: Any) -> bytes:
            if len(backend.calls) <= times:
                context.abort(code, "not now")
            return b""

        backend.answer = answer

    with SearchClient(backend.target, "m") as client:
        for code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL):
            refuse(code, 100)
            with pytest.raises(ServingError) as raised:
                client.model_status()
            assert raised.value.code is code
            assert len(backend.calls) == (4 if code is grpc.StatusCode.UNAVAILABLE else 1)
        refuse(grpc.StatusCode.UNAVAILABLE, 2)
        assert client.model_status() == [] and len(backend.calls) == 3
        assert all(call[3] < 11 for call in backend.calls)  # all have the deadline
    refuse(grpc.StatusCode.UNAVAILABLE, 100)
    with SearchClient(backend.target, "m", timeout_s=0.05) as client:
        with pytest.raises(ServingError) as raised:
            client.model_status()
        assert raised.value.code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)
        assert len(backend.calls) < 4


@pytest.mark.slow
def test_a_server_that_comes_up_late_is_reached(models: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    publish(models["simple"], base, 1)
    port = free_port()
    with SearchClient(f"127.0.0.1:{port}", "m") as client:
        with pytest.raises(ServingError, match="is it running"):
            client.search("a")
        with start_model_server(base, "m", port, op_libraries=()):
            wait_until(lambda: found(client) == [500])


def found(client: SearchClient) -> list[int]:
    try:
        return [int(item) for item in client.search("a")[0].item_ids]
    except ServingError:
        return []


@pytest.mark.slow
def test_deadline_against_a_server_that_hangs(models: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    publish(models["simple"], base, 1)
    with start_model_server(base, "m", op_libraries=()) as server, SearchClient(server.target, "m", 0.3) as client:
        wait_until(lambda: found(client) == [500])
        freeze(server.process.pid)
        try:
            threads = [threading.Thread(target=found, args=(client,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            with pytest.raises(ServingError, match=r"no answer within 0\.3 s"):
                client.search("a", 3)
            for thread in threads:
                thread.join(PATIENCE_S)
                assert not thread.is_alive()
        finally:
            server.process.send_signal(signal.SIGCONT)
        wait_until(lambda: found(client) == [500])


def test_tls(certificates: Path, servers: dict[str, ModelServer], start_proxy: Any, tmp_path: Path) -> None:
    """A proxy that demands client certificates, in front of a real server."""
    pem = {
        name: str(certificates / name) for name in ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")
    }
    proxy = start_proxy(
        write_yaml(
            tmp_path / "p.yaml",
            f"default: {{backends: ['{servers['shop'].target}']}}\ntls: {{listen: {{certificate: {pem['server.pem']}, "
            f"key: {pem['server.key']}, ca: {pem['ca.pem']}}}}}",
        )
    )
    target = proxy.target
    known = Tls(pem["ca.pem"], pem["client.pem"], pem["client.key"], server_name="localhost")
    with SearchClient(target, "shop", tls=known) as client:
        assert client.search("ab", 1)[0].item_ids.tolist() == [100]

    async def ask() -> None:
        async with AsyncSearchClient(target, "shop", tls=known) as client:
            assert (await client.search("ab", 1))[0].item_ids.tolist() == [100]

    asyncio.run(ask())
    for tls in (None, Tls(pem["ca.pem"])):
        with SearchClient(target, "shop", tls=tls) as client, pytest.raises(ServingError) as raised:
            client.search("a")
        assert raised.value.code is grpc.StatusCode.UNAVAILABLE
    flags = [f"--ca={known.ca}", f"--certificate={known.certificate}", f"--key={known.key}", "--server_name=localhost"]
    done = run_command("query", f"--target={target}", "--model=shop", *flags, "a")
    assert done.returncode == 0 and "100" in done.stdout, done
    with pytest.raises(FileNotFoundError):
        SearchClient("h:1", "m", tls=Tls("missing.pem"))


# dpsr query, retriever


def test_query_sends_it_all(echo: dict[str, ModelServer]) -> None:
    done = run_command(
        "query",
        f"--target={echo['echo'].target}",
        "--model=echo",
        "--version=3",
        "--k=5",
        "--json",
        '--user_features={"age": 31, "likes": ["tea"]}',
        "--clicked_items=17,4",
        "--clicked_item_types=order",
        "--past_queries=red",
        "--past_queries=blue dress",
        "--include=brand=Acme|Bolt",
        "--include=price=10..20",
        "--exclude=color=red",
        "--exclude_items=8",
        "--search_parameters=nprobe=2",
        "--metadata=user-id=u1",
        "a",
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    given_inputs = dict(row["item_key"].split(": ", 1) for row in answer["results"])
    assert answer["version"] == 3
    assert given_inputs == {
        "query": "a",
        "k": "5",
        "search_parameters": "nprobe=2",
        "include": "2:brand=Acme|Bolt,price=10..20",
        "exclude": "1:color=red",
        "excluded_item_ids": "1:8",
        "user_gender": "",
        "user_age": "31",
        "user_likes": "1:tea",
        "clicked_items": "2:17,4",
        "clicked_item_types": "2:order,",
        "past_queries": "2:red,blue dress",
    }


def test_retriever_tells_the_model_of_users(start_backend: Any) -> None:
    backend: RecordingBackend = start_backend()

    def answer(request: bytes, context: Any) -> bytes:
        if backend.calls[-1][0] == serving_apis.GET_MODEL_METADATA:
            return signature_of("query", "k", "user_id")
        given_ids = serving_apis.PredictRequest.FromString(request).inputs["user_id"].string_val
        context.abort(grpc.StatusCode.ABORTED, " ".join(text.decode() or "-" for text in given_ids))
        raise AssertionError

    backend.answer = answer
    retrieve = retriever(backend.target, "m", to_user=lambda number: User({"id": f"u{number}"}) if number else None)
    assert retrieve.personal  # type: ignore[attr-defined]
    with pytest.raises(ServingError) as raised:
        retrieve(["a", "b"], [7, 0], 3)
    assert raised.value.details == "u7 -"
