"""Flags of the model server that no other test gives."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from pathlib import Path

import grpc
import model_servers
import pytest
import saved_models
import tensorflow as tf
from model_servers import State, error_of, eventually, failing_start, held_request, predict_request, serving
from processes import PATIENCE_S, free_port
from tensorflow_serving.apis import prediction_log_pb2

v1 = tf.compat.v1


@pytest.fixture
def half(exported: Path, base_path: Path) -> Path:
    saved_models.publish(exported / "half_plus_1", base_path, 1)
    return base_path


MANY = 60  # threads that no other pool comes near to


@pytest.mark.parametrize(
    ("pools", "flags"),
    [
        (0, ["--tensorflow_session_parallelism=1"]),
        (2, [f"--tensorflow_session_parallelism={MANY}"]),
        (1, [f"--tensorflow_intra_op_parallelism={MANY}", "--tensorflow_inter_op_parallelism=1"]),
        (1, ["--tensorflow_intra_op_parallelism=1", f"--tensorflow_inter_op_parallelism={MANY}"]),
        (1, [f"intra_op_parallelism_threads: {MANY} inter_op_parallelism_threads: 1"]),
    ],
    ids=["session 1", "session", "intra", "inter", "config file"],
)
def test_parallelism_sets_the_size_of_tensorflows_pools(
    half: Path, tmp_path: Path, pools: int, flags: list[str]
) -> None:
    if not flags[0].startswith("--"):
        config = tmp_path / "session.config"
        config.write_text(flags[0])
        flags = [f"--tensorflow_session_config_file={config}"]
    with serving(tmp_path, f"--model_base_path={half}", "--grpc_max_threads=4", *flags) as running:
        running.predict(predict_request())  # by now TensorFlow has made its pools
        threads = len(list(Path(f"/proc/{running.process.pid}/task").iterdir()))
    assert threads // MANY == pools, threads


@pytest.mark.parametrize("text", [None, "intra_op_parallelism_threads: many"])
def test_a_session_config_that_cannot_be_read_ends_the_start(half: Path, tmp_path: Path, text: str | None) -> None:
    config = tmp_path / "session.config"
    if text is not None:
        config.write_text(text)
    status, error = failing_start("--port=0", f"--model_base_path={half}", f"--tensorflow_session_config_file={config}")
    assert status == 1
    assert "Failed to start server. Error: " in error
    assert str(config) in error or "ConfigProto" in error


def test_saved_model_tags_choose_the_graph(base_path: Path, tmp_path: Path) -> None:
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None], name="x")
        signatures = {"serving_default": v1.saved_model.predict_signature_def({"x": x}, {"y": x * 3})}
        builder = v1.saved_model.Builder(str(base_path / "1"))
        builder.add_meta_graph_and_variables(session, ["serve", "gpu"], signatures)
        builder.save()
    flag = f"--model_base_path={base_path}"
    with serving(tmp_path, flag, "--saved_model_tags=serve,gpu") as running:
        assert list(running.predict(predict_request()).outputs["y"].float_val) == [3, 6]
    status, error = failing_start("--port=0", flag, "--max_num_load_retries=0")
    assert status == 1
    assert "Could not find meta graph def matching supplied tags: { serve }" in error


def test_polling_once_and_never(exported: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(exported / "half_plus_1", base_path, 1)
    flag = f"--model_base_path={base_path}"
    with serving(tmp_path, flag, "--file_system_poll_wait_seconds=-1") as never:
        assert error_of(lambda: never.predict(predict_request()))[0] == grpc.StatusCode.NOT_FOUND
    with serving(tmp_path, flag, "--file_system_poll_wait_seconds=0") as once:
        assert once.states() == {1: State.AVAILABLE}
        saved_models.publish(exported / "half_plus_2", base_path, 2)
        with serving(tmp_path, flag) as other:  # which has seen the new version, at its own first look
            assert 2 in other.states()
        assert once.states() == {1: State.AVAILABLE}


def test_file_system_caches_need_not_be_flushed(half: Path, tmp_path: Path) -> None:
    with serving(tmp_path, f"--model_base_path={half}", "--flush_filesystem_caches=false") as running:
        assert list(running.predict(predict_request()).outputs["y"].float_val) == [1.5, 2.0]


def test_rest_threads_bound_the_requests_that_run(exported: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(exported / "signatures", base_path, 1)
    config = tmp_path / "monitoring.config"
    config.write_text("prometheus_config { enable: true }")
    flags = [
        f"--model_base_path={base_path}",
        f"--monitoring_config_file={config}",
        "--grpc_max_threads=2",
        "--rest_api_num_threads=1",
    ]
    with serving(tmp_path, *flags, rest_port=free_port()) as running:
        statuses = []

        def ask(name: str) -> None:
            inputs = {"begun": str(tmp_path / f"{name}.begun"), "release": str(tmp_path / "release")}
            reply = running.rest("/v1/models/default:predict", {"signature_name": "gate", "inputs": inputs})
            statuses.append(reply.status)

        def at_work() -> tuple[int, int]:
            lines = running.rest("/monitoring/prometheus/metrics").text.splitlines()
            values = dict(line.rsplit(" ", 1) for line in lines if line.startswith(":dpsr:serving:requests_"))
            running_now, waiting = (values[f":dpsr:serving:requests_{state}"] for state in ("running", "waiting"))
            return int(running_now), int(waiting)

        askers = [threading.Thread(target=ask, args=(name,)) for name in ("first", "second")]
        for asker in askers:
            asker.start()
        # What asks for a state needs no thread of theirs.
        eventually(lambda: at_work() == (1, 1), "a request runs and one waits")
        assert running.rest("/healthz").status == 200
        assert running.rest("/v1/models/default").status == 200
        # Nor do gRPC's.
        folder = tmp_path / "grpc"
        folder.mkdir()
        by_grpc, release = held_request(running, folder)
        eventually(lambda: len(list(tmp_path.glob("*.begun"))) == 1, "one of the two is computed")
        release.touch()
        by_grpc.result()
        (tmp_path / "release").touch()
        for asker in askers:
            asker.join(PATIENCE_S)
        assert statuses == [200, 200]
        assert len(list(tmp_path.glob("*.begun"))) == 2


def test_other_addresses_only_where_asked(half: Path, tmp_path: Path) -> None:
    for flags, answers in (([], False), (["--host=0.0.0.0"], True)):
        with serving(tmp_path, f"--model_base_path={half}", *flags, rest_port=free_port()) as running:
            for port in (running.port, running.rest_port):
                with socket.socket() as client:
                    assert (client.connect_ex(("127.0.0.2", port)) == 0) == answers


def test_another_tensorflow_than_that_of_the_build_ends_the_start(half: Path, tmp_path: Path) -> None:
    library = tmp_path / "other.so"
    code = 'const char* TF_Version(void) { return "2.99.0"; }'
    subprocess.run(["cc", "-shared", "-o", str(library), "-x", "c", "-"], input=code, text=True, check=True)
    command = [str(model_servers.BINARY), "--port=0", f"--model_base_path={half}"]
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE_S, check=False)
    assert done.returncode == 1
    built = f"this server was built for TensorFlow {tf.__version__}, but found TensorFlow 2.99.0"
    assert f"Failed to start server. Error: {built}; install tensorflow=={tf.__version__}" in done.stderr


def test_the_metric_of_warmup(zoo: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(zoo / "counter", base_path, 1)
    log = predict_request("incr_counter_by", {"delta": tf.constant(2.0)})
    record = prediction_log_pb2.PredictionLog()
    record.predict_log.request.CopyFrom(log)
    saved_models.write_warmup(base_path / "1", record.SerializeToString())
    config = tmp_path / "monitoring.config"
    config.write_text("prometheus_config { enable: true }")
    flags = [f"--model_base_path={base_path}", f"--monitoring_config_file={config}"]
    with serving(tmp_path, *flags, rest_port=free_port()) as running:
        text = running.rest("/monitoring/prometheus/metrics").text
    path = str(base_path / "1")
    assert f':tensorflow:serving:model_warmup_latency_count{{model_path="{path}",status="OK"}} 1' in text
