"""The life of a servable: warm-up, every loader, a new index, shards, exchanged files."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import faiss
import grpc
import numpy as np
import pytest
import tensorflow as tf
from conftest import Job, dpsr
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2, prediction_service_pb2_grpc

from dpsr_common.command_line import main
from dpsr_common.errors import CommandError
from dpsr_common.packed_file import PackedFile, PackedFileWriter
from dpsr_export import faiss_search
from dpsr_export.export import Index
from dpsr_export.export import export as export_to
from dpsr_export.warmup import LoadedServable
from dpsr_serving.client import SearchClient, User
from dpsr_serving.model_server import start_model_server
from dpsr_tf.data.store import Store, new_directory
from dpsr_tf.data.user_requests import User as StoreUser
from dpsr_tf.data.user_requests import UserRequests
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tokenizer import TokenizerConfig, VocabularyBuilder

sys.path.append(str(Path(__file__).resolve().parents[1] / "serving"))
from processes import ProxyProcess, free_port

pytestmark = pytest.mark.slow
QUERIES = ["phone case", "苹果 手机", "kids keybaord", "red shoes", ""]


def manifest_of(version: Path) -> dict[str, Any]:
    return json.loads((version / "assets.extra" / "dpsr_manifest.json").read_text())


def export(job: Job, out: Path, *more: str) -> None:
    dpsr("export", f"--model={job.model}", f"--index={job.index}", f"--out={out}", *more)


def failed(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line of a command that fails."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) in (1, 2)
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    return error


def personal_requests(job: Job) -> list[dict[str, Any]]:
    store = Store(job.store)
    told = UserRequests(store, LoadedServable(job.servable / "1").inputs["search"])
    users = [StoreUser(int(user)) for user in store.users()["id"][: len(QUERIES)]]
    return [{"query": query} | told.of(user) for query, user in zip(QUERIES, users, strict=True)]


def test_warmup_requests_are_real_and_varied(personal: Job) -> None:
    servable = LoadedServable(personal.servable / "1")
    asked: set[bytes] = set()
    shapes = set()
    for record in tf.data.TFRecordDataset(str(personal.servable / "1" / "assets.extra" / "tf_serving_warmup_requests")):
        request = prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log.request
        inputs = {name: tf.make_ndarray(tensor) for name, tensor in request.inputs.items()}
        signature = request.model_spec.signature_name
        assert set(inputs) == set(servable.inputs[signature])
        servable(signature, inputs)
        asked.update(inputs["query"].tolist())
        shapes.add((signature, len(inputs["query"]), int(inputs.get("k", -1))))
        if signature == "search" and len(inputs["query"]) == 32:
            assert (inputs["clicked_items"] >= 0).any() and (inputs["past_queries"] != b"").any()
    assert asked <= {query.encode() for query in Store(personal.store).queries()} and len(asked) > 20
    assert {batch for _, batch, _ in shapes} == {1, 2, 8, 32}
    assert {(name, k) for name, _, k in shapes} >= {("search", k) for k in (7, 10, 100, 1000)} | {
        ("serving_default", -1)
    }


def test_warmup_requests_that_batching_allows(personal: Job, tmp_path: Path) -> None:
    export(personal, tmp_path / "servable", "--warmup=batchable")
    version = tmp_path / "servable" / "1"
    servable, asked = LoadedServable(version), []
    for record in tf.data.TFRecordDataset(str(version / "assets.extra" / "tf_serving_warmup_requests")):
        request = prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log.request
        inputs = {name: tf.make_ndarray(tensor) for name, tensor in request.inputs.items()}
        # TensorFlow Serving's batches need one number of rows, and max_batch_size may be any number.
        assert {value.shape[:1] for value in inputs.values()} == {(1,)}
        servable(request.model_spec.signature_name, inputs)
        asked.append((request.model_spec.signature_name, inputs["query"][0]))
    assert {signature for signature, _ in asked} == {"serving_default", "query_embedding"}
    assert len(set(asked)) > 20


def test_a_search_stops_when_its_client_cancels(job: Job, tmp_path: Path) -> None:
    (tmp_path / "monitoring").write_text("prometheus_config { enable: true }")
    port = free_port()
    flags = [
        f"--rest_api_port={port}",
        f"--monitoring_config_file={tmp_path / 'monitoring'}",
        "--max_results_per_request=500000",
    ]

    def metric(name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/monitoring/prometheus/metrics", timeout=60) as reply:
            lines = reply.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "shop", "search"
    request.inputs["query"].CopyFrom(tf.make_tensor_proto(["red shoes"] * 100_000))
    request.inputs["k"].CopyFrom(tf.make_tensor_proto(6))
    with (
        start_model_server(job.servable, "shop", arguments=flags) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        with pytest.raises(grpc.RpcError, match=r"100000 \* 6, expected at most 500000 results"):
            stub.Predict(request, timeout=60)
        request.inputs["k"].CopyFrom(tf.make_tensor_proto(5))
        running, count = ":dpsr:serving:requests_running", ':tensorflow:serving:request_count{model_name="shop",status='
        # A request that is cancelled just before its search begins is not counted: then another one is sent.
        while metric(f'{count}"CANCELLED"') < 1:
            while metric(running) >= 1:
                pass
            call = stub.Predict.future(request, timeout=60)
            while metric(running) < 1:
                assert not call.done(), "the request ended too early for this test"
            call.cancel()
            while metric(running) >= 1:
                pass
            assert metric(f'{count}"OK"') == 0, "the search was not stopped"


def test_another_export_of_the_same_version_removes_nothing(job: Job, tmp_path: Path) -> None:
    """Its clean-up takes a directory without a lock for one that a killed process has left behind."""
    with new_directory(tmp_path / "1") as out:
        export_to(ModelDirectory.open(job.model), Index.open(job.index), out)
        with contextlib.suppress(KeyboardInterrupt), new_directory(tmp_path / "1"):
            raise KeyboardInterrupt
    assert (tmp_path / "1" / "saved_model.pb").is_file()


def test_the_servable_has_the_averaged_weights(personal: Job) -> None:
    trained = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(personal.model)))
    held = tf.train.load_checkpoint(str(personal.servable / "1" / "variables" / "variables"))
    names = list(held.get_variable_to_shape_map())
    assert len(names) > 10
    for name in names:
        np.testing.assert_array_equal(held.get_tensor(name), trained.get_tensor(f"{name}/ExponentialMovingAverage"))
    assert any((held.get_tensor(name) != trained.get_tensor(name)).any() for name in names)


def test_every_loader_twice_after_a_move(personal: Job, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "9"
    shutil.copytree(personal.servable / "1", moved)
    inputs = LoadedServable(personal.servable / "1").search_inputs(personal_requests(personal), 20)
    servables = [LoadedServable(path) for path in (personal.servable / "1", moved, moved)]
    first, *others = (servable("search", inputs) for servable in servables)
    assert (first["item_ids"][:4] >= 0).all() and (first["item_ids"][4] == -1).all()
    for other in others:
        for name, value in first.items():
            np.testing.assert_array_equal(other[name], value)
    for _ in range(2):
        loaded = tf.saved_model.load(str(moved))
        tensors = {
            name: tf.constant(value, tf.string if np.asarray(value).dtype.kind == "O" else None)
            for name, value in inputs.items()
        }
        found = loaded.signatures["search"](**tensors)
        np.testing.assert_array_equal(found["item_ids"], first["item_ids"])
        default = loaded.signatures["serving_default"](query=tf.constant(QUERIES))
        assert default["item_ids"].shape == (5, 7)


def test_the_model_server_answers_alike_and_keeps_what_is_good(personal: Job, tmp_path: Path) -> None:
    """Two versions of one servable at once, then one with another's index, which is refused."""
    base = tmp_path / "shop"
    for version in (1, 2):
        shutil.copytree(personal.servable / "1", base / str(version))
    requests = personal_requests(personal)
    expected = LoadedServable(personal.servable / "1")
    found = expected("search", expected.search_inputs(requests, 20))
    config = tmp_path / "models.config"
    config.write_text(
        f'model_config_list {{ config {{ name: "shop" base_path: "{base}" model_platform: "tensorflow" '
        "model_version_policy { all {} } } }"
    )
    flags = [f"--model_config_file={config}", "--file_system_poll_wait_seconds=1", "--max_num_load_retries=0"]
    with (
        start_model_server(base, "shop", arguments=flags) as server,
        SearchClient(server.target, "shop") as client,
    ):
        for _ in range(2):
            results = client.search(
                QUERIES,
                20,
                user=[
                    {
                        "features": {name[5:]: value for name, value in request.items() if name.startswith("user_")},
                        **{name: value for name, value in request.items() if name.startswith(("clicked", "past"))},
                    }
                    for request in requests
                ],
            )
            for row, result in enumerate(results):
                known = found["item_ids"][row] >= 0
                np.testing.assert_array_equal(result.item_ids, found["item_ids"][row][known])
                np.testing.assert_array_equal(result.scores, found["scores"][row][known])
        wrong = tmp_path / "wrong"
        shutil.copytree(base / "1", wrong)
        swap_index(wrong, personal.index.parent / "renamed")
        os.rename(wrong, base / "3")
        end = time.monotonic() + 60
        while not (state := {one.version: one for one in client.model_status()}.get(3)) or not state.error:
            assert time.monotonic() < end, client.model_status()
            time.sleep(0.05)
        assert "is not the file that this servable was exported with" in state.error
        assert {one.version for one in client.model_status() if one.state == "AVAILABLE"} == {1, 2}


def swap_index(version: Path, work: Path) -> None:
    """Puts an index of other vectors in a servable, with item ids that belong to it, as a careless copy would."""
    index = faiss.read_index(str(version / "assets" / "items.faiss"))
    ids = PackedFile(str(version / "assets" / "item_ids.dpsr"), "item_ids")["id"]
    vectors = np.random.default_rng(1).standard_normal((len(ids), index.d)).astype(np.float32)
    index.reset()
    index.add(vectors)
    work.mkdir(exist_ok=True)
    faiss.write_index(index, str(work / "items.faiss"))
    faiss_search.write_item_ids(work / "item_ids.dpsr", ids, work / "items.faiss")
    for name in ("items.faiss", "item_ids.dpsr"):
        os.replace(work / name, version / "assets" / name)


def test_files_of_another_export_are_refused_at_load(job: Job, personal: Job, tmp_path: Path) -> None:
    """A servable refuses exchanged assets: another vocabulary has other tokens, other values have other codes."""
    other = tmp_path / "other"
    shutil.copytree(personal.servable / "1", other)
    builder = VocabularyBuilder(TokenizerConfig(letter_trigrams=False))
    builder.add(["red shoes"])
    builder.write(tmp_path / "vocabulary.dpsr")
    os.replace(tmp_path / "vocabulary.dpsr", other / "assets" / "vocabulary.dpsr")
    with pytest.raises(CommandError, match=r"vocabulary.dpsr: is not the file that this servable was exported with"):
        LoadedServable(other)
    for name in ("feature_values.dpsr", "items.dpsr"):
        shutil.copyfile(personal.servable / "1" / "assets" / "vocabulary.dpsr", other / "assets" / "vocabulary.dpsr")
        held = PackedFile(str(other / "assets" / name), "")
        with PackedFileWriter(str(tmp_path / name), held.kind) as file:
            for section, values in held.items():
                file.add(section, values)
            file.add("more", np.zeros(1, np.int32))
        os.replace(tmp_path / name, other / "assets" / name)
        with pytest.raises(CommandError, match=rf"{name}: is not the file that"):
            LoadedServable(other)
        shutil.copyfile(personal.servable / "1" / "assets" / name, other / "assets" / name)
    LoadedServable(other).close()


@pytest.fixture(scope="module")
def ivf(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An approximate index of the job's model, with search parameters that miss much."""
    index = tmp_path_factory.mktemp("ivf") / "index"
    settings = ["--set=index.factory=IVF8,Flat", "--set=index.parameters=nprobe=2"]
    dpsr("index", f"--model={job.model}", f"--store={job.store}", f"--out={index}", *settings)
    return index


def test_index_only_keeps_the_model(job: Job, ivf: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = tmp_path / "base"
    shutil.copytree(job.servable / "1", base / "4")
    dpsr("export", "--index_only", f"--index={ivf}", f"--out={base}")
    old, new = base / "4", base / "5"
    assert not any(path.name.startswith(".") for path in base.iterdir())
    for path in sorted((old / "variables").iterdir()):
        assert path.read_bytes() == (new / "variables" / path.name).read_bytes()
    graphs = [
        saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes()).meta_graphs[0]
        for path in (old, new)
    ]
    changed = set()
    for before, now in zip(*(graph.graph_def.node for graph in graphs), strict=True):
        if before != now:
            changed.add(now.op)
            now.CopyFrom(before)
    assert changed == {"DpsrFaissIndexLoad", "DpsrFileFingerprint"}
    assert graphs[0] == graphs[1]
    manifest = manifest_of(new)
    assert manifest["index"]["factory"] == "IVF8,Flat" and manifest["config"] == manifest_of(old)["config"]
    assert manifest["search_parameters"]["default"] == "nprobe=2"
    # The index has its own search parameters, and requests may raise them as far as was measured.
    servable = LoadedServable(new)
    exact = LoadedServable(old)("search", LoadedServable(old).search_inputs([{"query": "phone case"}], 50))["item_ids"]
    few, all_lists = (
        servable("search", servable.search_inputs([{"query": "phone case"}], 50, parameters))["item_ids"]
        for parameters in ("", manifest["search_parameters"]["max"])
    )
    assert set(few[0].tolist()) != set(exact[0].tolist()) == set(all_lists[0].tolist())
    with pytest.raises(tf.errors.InvalidArgumentError, match="nprobe"):
        servable("search", servable.search_inputs([{"query": "phone case"}], 5, "nprobe=100000"))
    # Only what is of this model, and a servable that is there.
    arguments = ["export", "--index_only", f"--index={ivf}"]
    assert "holds no servable" in failed(capsys, *arguments, f"--out={tmp_path / 'none'}")
    shutil.copytree(old, tmp_path / "shards" / "shard-0-of-2" / "1")
    assert "without shards; give --shards=2" in failed(capsys, *arguments, f"--out={tmp_path / 'shards'}")
    assert "--index_only, which keeps" in failed(capsys, *arguments, f"--out={base}", f"--model={job.model}")
    assert "--model is missing" in failed(capsys, "export", f"--index={ivf}", f"--out={base}")
    assert sorted(path.name for path in base.iterdir()) == ["4", "5"]


def test_index_only_refuses_the_index_of_another_model(
    job: Job, personal: Job, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = tmp_path / "base"
    shutil.copytree(job.servable / "1", base / "1")
    error = failed(capsys, "export", "--index_only", f"--index={personal.index}", f"--out={base}")
    assert "so it is not of the model in" in error
    index = tmp_path / "index"
    shutil.copytree(job.index, index)
    original = json.loads((index / "index.json").read_text())
    for key, value in (
        ("embedding_dim", 99),
        ("vocabulary_fingerprint", "0" * 16),
        ("checkpoint_fingerprint", "1" * 16),
    ):
        (index / "index.json").write_text(json.dumps({**original, key: value}))
        error = failed(capsys, "export", "--index_only", f"--index={index}", f"--out={base}")
        assert f"{key} is {value}, but {original[key]} in the servable" in error
    assert [path.name for path in base.iterdir()] == ["1"]


@pytest.fixture(scope="module")
def sharded(personal: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The personal servable in two shards, version 7 each."""
    base = tmp_path_factory.mktemp("sharded")
    export(personal, base, "--shards=2", "--version_number=7")
    return base


def test_shards_behind_a_proxy_answer_as_one_server(personal: Job, sharded: Path, tmp_path: Path) -> None:
    requests = personal_requests(personal)
    users = [
        User({name[5:]: value for name, value in request.items() if name.startswith("user_")}, request["clicked_items"],
             request["past_queries"], request["clicked_item_types"])
        for request in requests
    ]  # fmt: skip
    whole = LoadedServable(personal.servable / "1")
    with contextlib.ExitStack() as stack:
        parts = [
            stack.enter_context(start_model_server(sharded / f"shard-{number}-of-2", "shop")) for number in range(2)
        ]
        config = tmp_path / "proxy.yaml"
        config.write_text(f"models: {{shop: {{shards: {[[part.target] for part in parts]}}}}}\n")
        proxy = ProxyProcess(f"--config={config}")
        stack.callback(proxy.stop)
        client = stack.enter_context(SearchClient(proxy.target, "shop"))
        for k in (1, 10, 150, 500):
            expected = whole("search", whole.search_inputs(requests, k))
            for row, result in enumerate(client.search(QUERIES, k, user=users)):
                known = expected["item_ids"][row] >= 0
                assert (result.shards, len(result)) == ((2, 2), known.sum())
                for name in ("item_ids", "scores", "heads"):
                    np.testing.assert_array_equal(getattr(result, name), expected[name][row][known], err_msg=name)
        (anonymous,) = client.search("phone case", 400, filters={"price": (None, 50)}, exclude_items=[1, 2])
        inputs = whole.search_inputs([{"query": "phone case", "include": ["price=..50"]}], 400)
        inputs["excluded_item_ids"] = np.array([[1, 2]])
        found = whole("search", inputs)["item_ids"][0]
        assert anonymous.item_ids.tolist() == found[found >= 0].tolist() and len(anonymous) > 10


def test_shards_share_the_items_and_are_renewed(
    personal: Job, sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = tmp_path / "sharded"
    shutil.copytree(sharded, base)
    assert sorted(path.name for path in base.iterdir()) == ["shard-0-of-2", "shard-1-of-2"]
    parts = [base / f"shard-{number}-of-2" / "7" for number in range(2)]
    ids = [PackedFile(str(part / "assets" / "item_ids.dpsr"), "item_ids")["id"] for part in parts]
    whole = PackedFile(str(personal.index / "item_ids.dpsr"), "item_ids")["id"]
    assert sorted(np.concatenate(ids).tolist()) == whole.tolist()
    for part, part_ids in zip(parts, ids, strict=True):
        titles = gzip.decompress((part / "assets.extra" / "item_titles.tsv.gz").read_bytes()).decode().splitlines()
        assert [int(line.partition("\t")[0]) for line in titles] == part_ids.tolist()
    # A shard is renewed as such, and not mistaken for another.
    renewed = ["export", "--index_only", f"--index={personal.index}"]
    dpsr(*renewed, f"--out={base}", "--shards=2")
    assert [manifest_of(part.parent / "8")["shard"] for part in parts] == [[0, 2], [1, 2]]
    assert "is shard [1, 2], expected [0, 1]" in failed(capsys, *renewed, f"--out={parts[1].parent}")
    assert "must be at most the number of items, 400" in failed(
        capsys, *renewed, f"--out={tmp_path / 'x'}", "--shards=401"
    )


def test_shards_keep_what_was_trained_on_all_items(ivf: Path, tmp_path: Path) -> None:
    """Shards have the same centroids and codes, so the merged answer equals that of the whole index."""
    index = Index.open(ivf)
    whole = faiss.read_index(str(ivf / "items.faiss"))
    queries = index.vectors()[::37]
    products, positions = whole.search(queries, 20)
    found = []
    for number in range(2):
        with index.part(number, 2, tmp_path) as part:
            held = faiss.read_index(str(part.path / "items.faiss"))
            assert held.nprobe == whole.nprobe == 2 and held.ntotal == 200
            np.testing.assert_array_equal(held.quantizer.reconstruct_n(0, 8), whole.quantizer.reconstruct_n(0, 8))
            scores, places = held.search(queries, 20)
            found.append((scores, np.where(places >= 0, 2 * places + number, -1)))
            assert part.item_ids().tolist() == index.item_ids()[number::2].tolist()
    assert not any(tmp_path.iterdir())
    scores, places = (np.concatenate(columns, axis=1) for columns in zip(*found, strict=True))
    for row in range(len(queries)):
        order = np.lexsort((places[row], -scores[row]))[:20]
        expected = np.lexsort((positions[row], -products[row]))
        np.testing.assert_array_equal(places[row][order], positions[row][expected])
        np.testing.assert_array_equal(scores[row][order], products[row][expected])
