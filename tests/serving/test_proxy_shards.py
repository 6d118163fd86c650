"""Index shards: what several servers with a part of the items each find, merged to what one with all of them does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from processes import PATIENCE_S, freeze, run_command
from proxy_backends import RecordingBackend, StartProxy, call, http_address, metric, predict, wait_until, write_yaml

from dpsr_common import serving_apis
from dpsr_serving.client import SearchClient
from dpsr_serving.model_server import ModelServer, start_model_server
from dpsr_serving.proxy.shards import merge_answers
from dpsr_serving.tensors import make_tensor, to_numpy

PARTS = 3


def save_exact_index(path: Path, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
    """A servable with an exact index of these items, as `dpsr export` has it: ties by ascending id, padding behind.

    Query vectors are small integers by the query's length, so that scores are exact and often equal.
    """
    import tensorflow as tf

    order = np.argsort(ids)

    class Model(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ids = tf.constant(ids[order])
            self.vectors = tf.constant(vectors[order])

        def answer(self, query: tf.Tensor, k: tf.Tensor) -> dict[str, tf.Tensor]:
            lengths = tf.cast(tf.strings.length(query), tf.float32)[:, tf.newaxis]
            first = tf.concat([lengths % 3 - 1, lengths % 5 - 2, lengths % 2], 1)
            towers = tf.stack([first, 0 * first - 1])
            each = tf.einsum("hbd,nd->bhn", towers, self.vectors)
            best, heads = tf.reduce_max(each, 1), tf.argmax(each, 1, output_type=tf.int32)
            found = tf.minimum(k, tf.shape(self.ids)[0])
            scores, rows = tf.math.top_k(best, found)  # among equal ones the lower row, that is the lower id
            pad = [[0, 0], [0, k - found]]
            item_ids = tf.pad(tf.gather(self.ids, rows), pad, constant_values=-1)
            return {
                "item_ids": item_ids,
                "scores": tf.pad(scores, pad, constant_values=-np.inf),
                "heads": tf.pad(tf.gather(heads, rows, batch_dims=1), pad, constant_values=-1),
                "item_keys": tf.where(item_ids < 0, "", tf.strings.join(["sku-", tf.strings.as_string(item_ids)])),
            }

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "query"), tf.TensorSpec([], tf.int32, "k")])
        def search(self, query: tf.Tensor, k: tf.Tensor) -> dict[str, tf.Tensor]:
            return self.answer(query, k)

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "query")])
        def serve(self, query: tf.Tensor) -> dict[str, tf.Tensor]:
            return self.answer(query, tf.constant(10))

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "query")])
        def lengths(self, query: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"lengths": tf.strings.length(query)}

    model = Model()
    signatures = {"search": model.search, "serving_default": model.serve, "query_embedding": model.lengths}
    tf.saved_model.save(model, str(path / "1"), signatures=signatures)


@pytest.fixture(scope="module")
def index_paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The whole index, then its parts."""
    root = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(5)
    ids = random.permutation(400)[:200].astype(np.int64)
    vectors = random.integers(-2, 3, (200, 3)).astype(np.float32)
    paths = [root / "whole", *(root / f"part{part}" for part in range(PARTS))]
    save_exact_index(paths[0], ids, vectors)
    edges = [0, 90, 192, 200]  # the last part has fewer items than most k
    for path, start, end in zip(paths[1:], edges, edges[1:], strict=False):
        save_exact_index(path, ids[start:end], vectors[start:end])
    return paths


@pytest.fixture(scope="module")
def whole(index_paths: list[Path]) -> Iterator[ModelServer]:
    with start_model_server(index_paths[0], "shop", op_libraries=()) as server:
        yield server


@pytest.fixture
def parts(index_paths: list[Path]) -> Iterator[list[ModelServer]]:
    running = [start_model_server(path, "shop", op_libraries=()) for path in index_paths[1:]]
    yield running
    for server in running:
        server.process.send_signal(signal.SIGCONT)
        server.stop()


def config_of(parts: list[ModelServer], more: str = "") -> str:
    shards = ", ".join(f"['{server.target}']" for server in parts)
    return f"models: {{shop: {{shards: [{shards}]{more}}}}}\nhealth: {{every_s: 0.2, timeout_s: 1}}\n"


def test_merged_answer_is_that_of_the_whole_index(
    whole: ModelServer, parts: list[ModelServer], start_proxy: StartProxy, tmp_path: Path
) -> None:
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config_of(parts)))
    queries = ["x" * n for n in range(12)]
    ties = 0
    with SearchClient(proxy.target, "shop") as sharded, SearchClient(whole.target, "shop") as single:
        for k in (None, 1, 2, 7, 50, 199, 200, 300):
            for got, wanted in zip(sharded.search(queries, k), single.search(queries, k), strict=True):
                assert got.item_ids.tolist() == wanted.item_ids.tolist()
                assert got.scores.tolist() == wanted.scores.tolist()
                assert got.heads.tolist() == wanted.heads.tolist()
                assert got.item_keys == wanted.item_keys
                ties += int(np.count_nonzero(np.diff(wanted.scores) == 0))
        assert sharded.model_status()[0].version == 1
    assert ties > 100
    request = predict("shop", "search", query=queries, k=np.int32(300))
    code, _, response, _, trailing = call(proxy.target, serving_apis.PREDICT, request)
    assert code is grpc.StatusCode.OK and ("dpsr-shards", "3/3") in trailing
    direct = serving_apis.PredictResponse.FromString(call(whole.target, serving_apis.PREDICT, request)[2])
    merged = serving_apis.PredictResponse.FromString(response)
    assert merged.model_spec == direct.model_spec
    for name, tensor in direct.outputs.items():  # padding too
        assert np.array_equal(to_numpy(merged.outputs[name]), to_numpy(tensor)), name
    # What is not a search, and what is wrong with a request, any part can say.
    for request in (predict("shop", "query_embedding", query=queries), predict("shop", "search", query=queries)):
        through, straight = (call(target, serving_apis.PREDICT, request) for target in (proxy.target, whole.target))
        assert through[:2] == straight[:2]


@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGSTOP])
def test_missing_shard_gives_the_rest_or_an_error_by_policy(
    harm: signal.Signals, parts: list[ModelServer], start_proxy: StartProxy, tmp_path: Path
) -> None:
    partial = start_proxy(write_yaml(tmp_path / "p.yaml", config_of(parts)), "--http_port=0")
    http = http_address(partial)
    strict = start_proxy(write_yaml(tmp_path / "s.yaml", config_of(parts, ", missing_shards: error")))
    request = predict("shop", "search", query=["abc"], k=np.int32(200))

    def found(target: str) -> tuple[Any, Any, set[int], Any]:
        code, details, response, _, trailing = call(target, serving_apis.PREDICT, request)
        ids = (
            set()
            if response is None
            else set(to_numpy(serving_apis.PredictResponse.FromString(response).outputs["item_ids"])[0])
        )
        return code, details, {int(item) for item in ids if item >= 0}, dict(trailing)

    everything = found(partial.target)[2]
    lost = found(parts[1].target)[2]
    assert len(everything) == 200 and len(lost) == 102
    if harm is signal.SIGSTOP:
        freeze(parts[1].process.pid)
    else:
        parts[1].process.kill()
        parts[1].process.wait()
    for _ in range(3):
        code, _, ids, trailing = found(partial.target)
        assert code is grpc.StatusCode.OK and ids == everything - lost and trailing["dpsr-shards"] == "2/3"
        code, details, _, trailing = found(strict.target)
        assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        if code is grpc.StatusCode.UNAVAILABLE:
            assert "model 'shop': shard 2 of 3" in details and trailing["dpsr-shards"] == "2/3"
    assert metric(http, "dpsr_proxy_shards_missing_total", model="shop", shard="1") == 3
    shown = run_command("query", f"--target={partial.target}", "--model=shop", "--k=5", "abc")
    assert shown.returncode == 0 and "incomplete: 2 of 3 shards answered" in shown.stdout.splitlines(), shown
    # What concerns no items goes to a shard that is there: at random, a third of these would fail.
    status = serving_apis.GetModelStatusRequest()
    status.model_spec.name = "shop"
    wait_until(lambda: metric(http, "dpsr_proxy_backend_up", backend=parts[1].target) == 0)
    for _ in range(20):
        assert call(partial.target, serving_apis.GET_MODEL_STATUS, status.SerializeToString())[0] is grpc.StatusCode.OK
    if harm is signal.SIGSTOP:
        parts[1].process.send_signal(signal.SIGCONT)
        wait_until(lambda: found(partial.target)[2] == everything)
    for server in parts:
        server.process.kill()
        server.process.wait()
    code, details, *_ = found(partial.target)
    assert code is grpc.StatusCode.UNAVAILABLE and "model 'shop'" in details


def test_slow_shard_is_left_out_after_its_time(
    start_backend: Callable[[], RecordingBackend], start_proxy: StartProxy, tmp_path: Path
) -> None:
    fast, slow = start_backend(), start_backend()
    release = threading.Event()
    fast.answer = lambda request, context: answer([[1, 2]], [[2.0, 1.0]])
    slow.answer = lambda request, context: (release.wait(PATIENCE_S), answer([[3, 4]], [[4.0, 0.0]]))[1]
    shards = f"shards: [['{fast.target}'], ['{slow.target}']], shard_timeout_s: 1"
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", f"models: {{m: {{{shards}}}}}"))
    for timeout in (PATIENCE_S, None):
        code, _, response, _, trailing = call(proxy.target, serving_apis.PREDICT, predict("m"), timeout)
        assert code is grpc.StatusCode.OK and dict(trailing)["dpsr-shards"] == "1/2"
        assert ids_of(response) == [[1, 2]]
    release.set()
    wait_until(lambda: ids_of(call(proxy.target, serving_apis.PREDICT, predict("m"))[2]) == [[3, 1]])
    slow.answer = lambda request, context: b"\xff nonsense"
    code, details, *_ = call(proxy.target, serving_apis.PREDICT, predict("m"))
    assert code is grpc.StatusCode.INTERNAL and "model 'm': cannot merge" in details


def shard_of(item: int, versions: list[int]) -> Callable[[bytes, Any], bytes]:
    """Answers as a server that holds these versions, last the latest. The item's id ends with the version."""

    def reply(request: bytes, context: Any) -> bytes:
        spec = serving_apis.PredictRequest.FromString(request).model_spec
        version = spec.version.value if spec.HasField("version") else versions[-1]
        if version not in versions:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: Specific(m, {version})")
        return answer([[10 * item + version]], [[1.0 / item]], version=version)

    return reply


@pytest.mark.parametrize("policy", ["partial", "error"])
def test_answers_of_different_versions_are_never_merged(
    policy: str, start_backend: Callable[[], RecordingBackend], start_proxy: StartProxy, tmp_path: Path
) -> None:
    shards = [start_backend() for _ in range(3)]
    addresses = ", ".join(f"['{shard.target}']" for shard in shards)
    proxy = start_proxy(
        write_yaml(tmp_path / "p.yaml", f"models: {{m: {{shards: [{addresses}], missing_shards: {policy}}}}}")
    )

    def ask(*held: list[int]) -> tuple[Any, Any, Any, str]:
        for item, (shard, versions) in enumerate(zip(shards, held, strict=True), 1):
            shard.answer = shard_of(item, versions)
        code, details, response, _, trailing = call(proxy.target, serving_apis.PREDICT, predict("m", "search"))
        return code, details, response and ids_of(response), dict(trailing)["dpsr-shards"]

    assert ask([1], [1], [1])[2:] == ([[11]], "3/3")
    # The first shard has loaded version 2 already; version 1 is on all of them. Then version 2 is.
    code, _, ids, answered = ask([1, 2], [1], [1])
    assert (code, ids, answered) == (grpc.StatusCode.OK, [[11]], "3/3")
    assert ask([1, 2], [1, 2], [1])[2:] == ([[11]], "3/3")
    assert ask([2, 3], [3, 2], [2, 3])[2:] == ([[13]], "3/3")
    # No version is on all shards.
    code, details, ids, answered = ask([2], [1], [1])
    assert answered == "2/3"
    if policy == "partial":
        assert (code, ids) == (grpc.StatusCode.OK, [[21]])
    else:
        assert code is grpc.StatusCode.UNAVAILABLE
        assert (
            "shard 1 of 3 is missing: UNAVAILABLE: it answers with version 2 and other shards with version 1" in details
        )


def test_a_version_that_a_shard_lacks_is_the_error_of_the_request(
    start_backend: Callable[[], RecordingBackend], start_proxy: StartProxy, tmp_path: Path
) -> None:
    first, second = start_backend(), start_backend()
    first.answer, second.answer = shard_of(1, [1, 2]), shard_of(2, [1])
    proxy = start_proxy(
        write_yaml(tmp_path / "p.yaml", f"models: {{m: {{shards: [['{first.target}'], ['{second.target}']]}}}}")
    )
    request = serving_apis.PredictRequest.FromString(predict("m", "search"))
    request.model_spec.version.value = 2
    code, details, *_ = call(proxy.target, serving_apis.PREDICT, request.SerializeToString())
    assert code is grpc.StatusCode.NOT_FOUND and details == "Servable not found for request: Specific(m, 2)"


# The merge itself


def answer(ids: Any, scores: Any, version: int = 1, **more: Any) -> bytes:
    response = serving_apis.PredictResponse()
    response.model_spec.version.value = version
    outputs = {"item_ids": np.array(ids, np.int64), "scores": np.array(scores, np.float32), **more}
    for name, value in outputs.items():
        response.outputs[name].CopyFrom(make_tensor(value))
    return bytes(response.SerializeToString())


def ids_of(response: bytes) -> Any:
    return to_numpy(serving_apis.PredictResponse.FromString(response).outputs["item_ids"]).tolist()


def test_merge_by_score_ties_by_id_repeats_once_padding_last() -> None:
    inf = float("inf")
    for parts, ids in (
        ([([[5, 9]], [[1, 1]]), ([[7, 2]], [[1, 0]])], [[5, 7]]),
        ([([[5, -1]], [[1, -inf]]), ([[7, -1]], [[2, -inf]])], [[7, 5]]),
        ([([[-1, -1]], [[-inf, -inf]]), ([[7, -1]], [[-2, -inf]])], [[7, -1]]),
        ([([[5, 6]], [[3, 2]]), ([[5, 6]], [[3, 1]])], [[5, 6]]),  # an item in two parts
        ([([[5, 6]], [[3, 2]]), ([[5, 6]], [[1, 2.5]])], [[5, 6]]),
        ([([[5, 6, -1]], [[3, 2, -inf]]), ([[5]], [[4]])], [[5, 6, -1]]),
        ([([[], []], [[], []]), ([[], []], [[], []])], [[], []]),
        ([([[1], [2]], [[1], [2]]), ([[3], [4]], [[2], [1]])], [[3], [2]]),
    ):
        assert ids_of(merge_answers([answer(*part) for part in parts])) == ids


def test_merge_takes_what_belongs_to_an_item_along_and_leaves_the_rest() -> None:
    parts = [
        answer([[1]], [[1]], vectors=np.ones((1, 1, 2), np.float32), total=np.array([4, 4])),
        answer([[2]], [[2]], vectors=np.full((1, 1, 2), 2, np.float32), total=np.array([5, 5])),
    ]
    outputs = serving_apis.PredictResponse.FromString(merge_answers(parts)).outputs
    assert to_numpy(outputs["vectors"]).tolist() == [[[2, 2]]]
    assert to_numpy(outputs["total"]).tolist() == [4, 4]


def test_merge_refuses_what_does_not_fit() -> None:
    good = answer([[1]], [[1]])
    for bad in (answer([[1], [2]], [[1], [2]]), answer([1], [1]), answer([[1, 2]], [[1]])):
        with pytest.raises(ValueError, match="item_ids"):
            merge_answers([good, bad])
