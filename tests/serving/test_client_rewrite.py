"""`rewrite` of both clients and `dpsr query --rewrite`, against a real model server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import save_search_model

from dpsr_common import serving_apis
from dpsr_common.command_line import main
from dpsr_serving.client import AsyncSearchClient, Rewrite, SearchClient, ServingError
from dpsr_serving.model_server import ModelServer, start_model_server
from dpsr_serving.search import rewrite_tensors, rewrites_of


def save_rewriter(path: Path) -> None:
    """A model whose i-th rewrite of a query is "QUERY SEED i" with the log-probability -i; none for ""; n is 1 to 5."""
    import tensorflow as tf

    class Model(tf.Module):
        @tf.function(
            input_signature=[
                tf.TensorSpec([None], tf.string, "query"),
                tf.TensorSpec([], tf.int32, "n"),
                tf.TensorSpec([], tf.int64, "seed"),
            ]
        )
        def rewrite(self, query: tf.Tensor, n: tf.Tensor, seed: tf.Tensor) -> dict[str, tf.Tensor]:
            tf.debugging.Assert((n > 0) & (n <= 5), ["n is", n, "expected 1 to 5"])
            shape = tf.stack([tf.size(query), n])
            numbers = tf.broadcast_to(tf.strings.as_string(tf.range(n)), shape)
            queries, seeds = tf.broadcast_to(query[:, None], shape), tf.fill(shape, tf.strings.as_string(seed))
            texts = tf.strings.join([queries, seeds, numbers], separator=" ")
            there = tf.strings.length(queries) > 0
            scores = tf.broadcast_to(tf.cast(-tf.range(n), tf.float32), shape)
            return {
                "rewrites": tf.where(there, texts, ""),
                "log_probabilities": tf.where(there, scores, -float("inf")),
            }

    module = Model()
    tf.saved_model.save(module, str(path), signatures={"rewrite": module.rewrite})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    base = tmp_path_factory.mktemp("rewriter")
    save_rewriter(base / "1")
    with start_model_server(base, "words") as running:
        yield running


def test_rewrites(server: ModelServer) -> None:
    with SearchClient(server.target, "words") as client:
        first, none, raw = client.rewrite(["手机", "", b"\xff"], 2, 7)
        assert first == [Rewrite("手机 7 0", 0.0), Rewrite("手机 7 1", -1.0)] and none == []
        assert raw[0].text == "\ufffd 7 0"
        assert client.rewrite("red") == [[Rewrite(f"red 0 {i}", -float(i)) for i in range(3)]]
        assert client.rewrite([]) == []
        assert client.rewrite("red", seed=-(2**63))[0][0].text == f"red {-(2**63)} 0"

    async def ask() -> Any:
        async with AsyncSearchClient(server.target, "words") as client:
            return await asyncio.gather(client.rewrite("red", n=1), client.rewrite(["a", "b"], n=1, seed=2))

    assert asyncio.run(ask()) == [[[Rewrite("red 0 0", 0.0)]], [[Rewrite("a 2 0", 0.0)], [Rewrite("b 2 0", 0.0)]]]


def test_bad_requests(server: ModelServer) -> None:
    with SearchClient(server.target, "words") as client:
        with pytest.raises(ValueError, match="n is"):
            client.rewrite("red", n=6)
        with pytest.raises(ServingError, match="no signature 'search'"):
            client.search("red", 3)
    for arguments, message in (
        (("red", 0, 0), "n must be a positive int32, got 0"),
        (("red", 2**31, 0), "n must be a positive int32, got 2147483648"),
        (("red", True, 0), "n must be a positive int32, got True"),
        (("red", 1.0, 0), "n must be a positive int32, got 1.0"),
        (("red", 1, 2**63), "seed must be an int64, got 9223372036854775808"),
        ((["red", None], 1, 0), "queries must be texts, got None"),
        (([3], 1, 0), "queries must be texts, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            rewrite_tensors(*arguments)  # type: ignore[arg-type]


def test_a_model_that_is_no_rewriter(tmp_path: Path) -> None:
    save_search_model(tmp_path / "shop" / "1", base=100)
    with (
        start_model_server(tmp_path / "shop", "shop") as server,
        SearchClient(server.target, "shop") as client,
        pytest.raises(ServingError, match="rewrite"),
    ):
        client.rewrite("red")


def test_answers_of_other_models() -> None:
    response = serving_apis.PredictResponse()
    with pytest.raises(ValueError, match="the output 'rewrites' is missing; there are \\[\\]"):
        rewrites_of(response, 1)
    for outputs, message in (
        (([[b"a"]], [[1, 2]]), "log_probabilities' is int64 .*, expected float32"),
        (([b"a"], [[0.5]]), r"'rewrites' is object \[1\], expected string \[1, n\]"),
        (([[b"a"]], [[0.5, 0.5]]), r"rewrites have the shape \[1, 1\], but log_probabilities \[1, 2\]"),
    ):
        fill(response, *outputs)
        with pytest.raises(ValueError, match=message):
            rewrites_of(response, 1)


def fill(response: Any, texts: Any, scores: Any) -> None:
    import numpy as np

    from dpsr_serving.tensors import make_tensor

    scores = np.array(scores)
    response.outputs["rewrites"].CopyFrom(make_tensor(np.array(texts, object)))
    numbers = scores.astype(np.float32) if scores.dtype.kind == "f" else scores
    response.outputs["log_probabilities"].CopyFrom(make_tensor(numbers))


def test_query_prints_rewrites(server: ModelServer, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--target={server.target}", "--model=words", "--rewrite"]
    assert main(["query", *flags, "--k=2", "--seed=4", "red\x07", ""]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "red\ufffd",
        "  rank  log-prob  rewrite",
        "     1    0.0000  red\ufffd 4 0",
        "     2   -1.0000  red\ufffd 4 1",
        "",
        "",
        "  no rewrites",
        "",
    ]
    assert main(["query", *flags, "--json", "é"]) == 0
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert line["query"] == "é" and line["rewrites"][2] == {"text": "é 0 2", "log_probability": -2.0}


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--rewrite", "--include=brand=Acme"], 2, "--rewrite cannot be combined with --include"),
        (["--rewrite", "--rank=1,2"], 2, "--rank cannot be combined with --rewrite"),
        (["--rank=1,2", "--k=3"], 2, "--rank cannot be combined with --k, which a ranker does not know"),
        (["--rank="], 2, "--rank is empty; expected items, such as --rank=17,4,99"),
        (["--rank=1,2"], 1, "has no signature 'rank'"),
        (["--seed=1"], 2, "--seed=1: needs --rewrite"),
        (["--user_id=1"], 2, "--user_id=1: needs --rank"),
        (["--rewrite", "--k=6"], 1, "n is"),
    ],
)
def test_wrong_use_of_query(
    server: ModelServer, capsys: pytest.CaptureFixture[str], flags: list[str], status: int, message: str
) -> None:
    assert main(["query", f"--target={server.target}", "--model=words", *flags, "red"]) == status
    shown = capsys.readouterr()
    assert message in shown.err and shown.out == ""
