"""Versions, many models, labels, reloads and retries of the model server."""

from __future__ import annotations

import concurrent.futures
import contextlib
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import saved_models
from model_servers import (
    INVALID,
    Server,
    State,
    config_list,
    error_of,
    eventually,
    failing_start,
    held_request,
    labelled_request,
    model_config,
    predict_request,
    serving,
)
from processes import PATIENCE_S, free_port
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    prediction_service_pb2_grpc,
)

# ---- reloads at an address of their own ----


@pytest.mark.parametrize("where", ["off", "port", "socket"])
def test_reloads_at_another_address(exported: Path, tmp_path: Path, where: str) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        saved_models.publish(exported / "half_plus_1", tmp_path / name, 1)
    address = {"off": "off", "port": f"127.0.0.1:{free_port()}", "socket": f"unix:{tmp_path / 'admin'}"}[where]
    flags = ["--model_name=a", f"--model_base_path={tmp_path / 'a'}", f"--reload_address={address}"]
    with serving(tmp_path, *flags) as running:
        config = config_list(model_config("b", tmp_path / "b"))
        code, message = error_of(lambda: running.reload(config))
        assert code == grpc.StatusCode.PERMISSION_DENIED and "--reload_address" in message
        assert running.states("a") == {1: State.AVAILABLE}
        if where != "off":
            with grpc.insecure_channel(address) as channel:
                stub = model_service_pb2_grpc.ModelServiceStub(channel)
                stub.HandleReloadConfigRequest(
                    model_management_pb2.ReloadConfigRequest(config=config), timeout=PATIENCE_S
                )
            assert running.states("b") == {1: State.AVAILABLE}


def test_an_address_for_reloads_that_is_taken(tmp_path: Path) -> None:
    status, error = failing_start(f"--model_base_path={tmp_path}", "--port=0", "--reload_address=nowhere:x")
    assert status == 1
    assert "--reload_address=nowhere:x" in error and "unix:/PATH" in error


# ---- file systems that hang ----


@pytest.fixture
def blocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """While this file exists, servers wait when they list a folder with `blocked` in its path."""
    library, block = tmp_path / "blocked_folders.so", tmp_path / "block"
    source = Path(__file__).with_name("blocked_folders.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("BLOCKED_FOLDER", "blocked")
    monkeypatch.setenv("BLOCK_FILE", str(block))
    return block


def begin_to_block(block: Path) -> None:
    block.touch()
    eventually(lambda: block.with_suffix(".hit").exists(), "a listing waits")


def test_a_file_system_that_hangs_stops_only_its_own_model(exported: Path, tmp_path: Path, blocked: Path) -> None:
    for name in ("a_blocked", "b", "c_blocked", "d"):
        (tmp_path / name).mkdir()
        saved_models.publish(exported / "half_plus_1", tmp_path / name, 1)
    models = config_list(*(model_config(name, tmp_path / name) for name in ("a_blocked", "b", "c_blocked", "d")))
    (tmp_path / "models.config").write_text(str(models))
    with serving(tmp_path, f"--model_config_file={tmp_path / 'models.config'}") as running:
        begin_to_block(blocked)
        for name in ("a_blocked", "b", "d"):
            saved_models.publish(exported / "half_plus_2", tmp_path / name, 2)
        for name in ("b", "d"):
            eventually(lambda name=name: running.states(name).get(2) == State.AVAILABLE, f"{name} has a new version")
        assert running.states("a_blocked") == {1: State.AVAILABLE}
        blocked.unlink()
        eventually(lambda: running.states("a_blocked").get(2) == State.AVAILABLE, "the file system is back")


def test_a_listing_of_an_older_configuration_is_dropped(exported: Path, tmp_path: Path, blocked: Path) -> None:
    old, new = tmp_path / "blocked", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    saved_models.publish(exported / "half_plus_1", old, 1)
    saved_models.publish(exported / "half_plus_4", new, 2)
    (tmp_path / "models.config").write_text(str(config_list(model_config("m", old))))
    with serving(tmp_path, f"--model_config_file={tmp_path / 'models.config'}") as running:
        begin_to_block(blocked)
        saved_models.publish(exported / "half_plus_3", old, 2)  # the listing that waits will find it
        running.reload(config_list(model_config("m", new)))
        blocked.unlink()
        eventually(lambda: running.states("m").get(2) == State.AVAILABLE, "version 2")
        response = running.predict(predict_request(inputs={"x": np.float32([2])}, name="m", version=2))
        assert list(response.outputs["y"].float_val) == [5]


# ---- priority ----


def test_requests_do_not_run_with_the_priority_of_loads(exported: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(exported / "signatures", base_path, 1)
    with serving(tmp_path, f"--model_base_path={base_path}") as running:
        running.predict(predict_request())

        # TensorFlow starts the threads of all sessions with the first one, which must not be that of a load. One thread
        # of each session remains, which computes constants while a graph is prepared.
        eventually(lambda: len(low_threads(running)) <= 1, "threads have the priority of the process")


def test_changes_of_items_are_applied_with_a_low_priority(base_path: Path, tmp_path: Path) -> None:
    """The thread that applies them does not keep requests waiting if there are few processors."""
    saved_models.write_half_plus(tmp_path / "model", 1.0, item_changes=True)
    saved_models.publish(tmp_path / "model", base_path, 1)
    with serving(tmp_path, f"--model_base_path={base_path}") as running:
        running.predict(predict_request())

        def applies() -> bool:
            """Whether a thread of low priority runs again and again: those of loads have ended, or wait."""
            before = switches(running)
            time.sleep(0.5)
            return any(count > before.get(thread, count) for thread, count in switches(running).items())

        eventually(applies, "a thread applies the changes")


def test_a_version_is_available_after_its_first_call_for_changes(base_path: Path, tmp_path: Path) -> None:
    """For that call the session makes an executor, and requests would have to wait meanwhile."""
    saved_models.write_half_plus(tmp_path / "model", 1.0, item_changes=True, slow_calls=True)
    saved_models.publish(tmp_path / "model", base_path, 1)
    with serving(tmp_path, f"--model_base_path={base_path}") as running:
        assert running.predict(predict_request()).outputs["calls"].int_val[0] >= 1


def low_threads(running: Server) -> list[Path]:
    """Returns the threads of a server, in /proc, whose priority is below that of its first threads."""
    niceness = {}
    for stat in Path(f"/proc/{running.process.pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # the thread has ended
            niceness[stat.parent] = int(stat.read_text().rpartition(")")[2].split()[16])
    return [thread for thread, nice in niceness.items() if nice > min(niceness.values())]


def switches(running: Server) -> dict[Path, int]:
    """Returns how often each thread of low priority has waited."""
    found = {}
    for thread in low_threads(running):
        with contextlib.suppress(OSError):
            found[thread] = int(
                re.search(r"^voluntary_ctxt_switches:\s*(\d+)", (thread / "status").read_text(), re.M)[1]
            )
    return found


# ---- versions ----


def test_new_versions_are_swapped_in_under_load_without_a_failure(
    exported: Path, base_path: Path, tmp_path: Path
) -> None:
    saved_models.publish(exported / "half_plus_1", base_path, 1)
    (base_path / "not_a_version").mkdir()
    with serving(tmp_path, f"--model_base_path={base_path}") as running:
        stop = threading.Event()
        latest = [0] * 4

        def load(client: int) -> None:
            # The option gives each client a connection of its own.
            with grpc.insecure_channel(f"127.0.0.1:{running.port}", [("dpsr.client", client)]) as channel:
                stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
                while not stop.is_set():
                    response = stub.Predict(predict_request(inputs={"x": np.float32([2])}), timeout=PATIENCE_S)
                    version = response.model_spec.version.value
                    assert list(response.outputs["y"].float_val) == [1 + version]
                    assert version >= latest[client]  # no way back
                    latest[client] = version

        with concurrent.futures.ThreadPoolExecutor(len(latest)) as threads:
            clients = [threads.submit(load, client) for client in range(len(latest))]
            try:
                for version in (1, 2, 3, 4):
                    if version > 1:
                        saved_models.publish(exported / f"half_plus_{version}", base_path, version)
                    expected = {v: State.END for v in range(1, version)} | {version: State.AVAILABLE}
                    eventually(lambda: running.states() == expected, f"version {version} serves alone")  # noqa: B023
                    eventually(
                        lambda: min(latest) == version or any(client.done() for client in clients),  # noqa: B023
                        f"all clients see version {version}",
                    )
            finally:
                stop.set()
            for client in clients:
                client.result()  # raises what went wrong
        assert latest == [4] * 4
        assert running.stop() == 0


def test_a_version_is_unloaded_when_its_requests_have_ended(exported: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(exported / "signatures", base_path, 1)
    with serving(tmp_path, f"--model_base_path={base_path}") as running:
        held, release = held_request(running, tmp_path)
        saved_models.publish(exported / "half_plus_2", base_path, 2)
        eventually(lambda: running.states() == {1: State.UNLOADING, 2: State.AVAILABLE}, "2 serves, 1 waits")
        assert running.predict(predict_request()).model_spec.version.value == 2
        code, message = error_of(lambda: running.predict(predict_request(version=1)))
        assert (code, message) == (
            grpc.StatusCode.NOT_FOUND,
            "Servable not found for request: Specific(default, 1)",
        )
        # A further version does not wait for the request either.
        saved_models.publish(exported / "half_plus_3", base_path, 3)
        eventually(
            lambda: running.states() == {1: State.UNLOADING, 2: State.END, 3: State.AVAILABLE}, "3 serves, 1 waits"
        )
        release.touch()
        assert held.result().model_spec.version.value == 1
        eventually(lambda: running.states()[1] == State.END, "1 is unloaded")


def test_a_model_that_comes_back_while_it_is_unloaded(exported: Path, base_path: Path, tmp_path: Path) -> None:
    """Its version is loaded again, also where the server does not search for versions at intervals."""
    saved_models.publish(exported / "signatures", base_path, 1)
    with serving(tmp_path, f"--model_base_path={base_path}", "--file_system_poll_wait_seconds=0") as running:
        held, release = held_request(running, tmp_path)
        running.reload(config_list())
        eventually(lambda: running.states() == {1: State.UNLOADING}, "1 waits for its request")
        back = config_list(model_config("default", base_path))
        reload = model_management_pb2.ReloadConfigRequest(config=back)
        waiting = running.model.HandleReloadConfigRequest.future(reload, timeout=PATIENCE_S)
        time.sleep(0.5)  # the search for versions, which finds 1 before it is gone
        assert not waiting.done()
        release.touch()
        assert held.result().model_spec.version.value == 1
        assert waiting.result().status.error_code == 0
        assert running.states() == {1: State.AVAILABLE}


def test_a_model_that_comes_back_while_it_is_unloaded_is_warned_of_again(
    exported: Path, base_path: Path, tmp_path: Path
) -> None:
    """What was wrong before is in a log that nobody looks at any more."""
    saved_models.publish(exported / "signatures", base_path, 1)
    config = model_config("default", base_path, specific=(1, 9))
    with serving(tmp_path, write_config(tmp_path, config)) as running:

        def warnings() -> int:
            return running.log.read_text().count("version 9 of model default, which its version policy names, was not")

        eventually(lambda: warnings() == 1, "a warning")
        held, release = held_request(running, tmp_path)
        running.reload(config_list())
        eventually(lambda: running.states() == {1: State.UNLOADING}, "1 waits for its request")
        reload = model_management_pb2.ReloadConfigRequest(config=config_list(config))
        waiting = running.model.HandleReloadConfigRequest.future(reload, timeout=PATIENCE_S)
        eventually(lambda: warnings() == 2, "a second warning")
        release.touch()
        assert held.result().model_spec.version.value == 1
        assert waiting.result().status.error_code == 0


def test_a_broken_version_never_disturbs_the_one_that_serves(exported: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(exported / "half_plus_1", base_path, 1)
    with serving(tmp_path, f"--model_base_path={base_path}", "--max_num_load_retries=0") as running:
        broken = {
            2: lambda path: path.mkdir(),
            3: lambda path: (path.mkdir(), (path / "saved_model.pb").write_bytes(b"\xff" * 100)),
            4: lambda path: saved_models.write_unknown_op(path, "OpOfNobody"),
            5: lambda path: path.write_text("a file"),
        }
        errors = {}
        for version, make in broken.items():
            make(tmp_path / "making")
            (tmp_path / "making").rename(base_path / str(version))
            eventually(lambda: running.states().get(version) == State.END, f"{version} has failed")  # noqa: B023
            assert running.states()[1] == State.AVAILABLE
            assert running.predict(predict_request()).model_spec.version.value == 1
            request = get_model_status_pb2.GetModelStatusRequest()
            request.model_spec.name = "default"
            request.model_spec.version.value = version
            (status,) = running.model.GetModelStatus(request, timeout=PATIENCE_S).model_version_status
            assert status.status.error_code != 0
            errors[version] = status.status.error_message
        assert "OpOfNobody" in errors[4] and "--op_library" in errors[4]
        saved_models.publish(exported / "half_plus_2", base_path, 6)
        eventually(lambda: running.states().get(6) == State.AVAILABLE, "the next good version serves")
        assert running.predict(predict_request()).model_spec.version.value == 6


def test_deleting_versions(exported: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(exported / "half_plus_1", base_path, 1)
    saved_models.publish(exported / "half_plus_2", base_path, 2)
    with serving(tmp_path, f"--model_base_path={base_path}") as running:
        assert running.states() == {2: State.AVAILABLE}
        # A missing base path changes nothing.
        base_path.rename(tmp_path / "away")
        eventually(lambda: "cannot read the base path" in running.log.read_text(), "a warning")
        assert running.predict(predict_request()).model_spec.version.value == 2
        (tmp_path / "away").rename(base_path)
        # A deleted version gives way to the next lower one.
        (base_path / "2").rename(tmp_path / "two")
        eventually(lambda: running.states() == {1: State.AVAILABLE, 2: State.END}, "1 serves")
        # An emptied base path unloads everything.
        (base_path / "1").rename(tmp_path / "one")
        eventually(lambda: running.states() == {1: State.END, 2: State.END}, "nothing serves")
        code, message = error_of(lambda: running.predict(predict_request()))
        assert (code, message) == (grpc.StatusCode.NOT_FOUND, "Servable not found for request: Latest(default)")
        assert "Did you forget to name your leaf directory as a number" in running.log.read_text()
        # What comes back is served again.
        (tmp_path / "two").rename(base_path / "00000002")
        eventually(lambda: running.states()[2] == State.AVAILABLE, "2 serves again")
        # A second folder of a version is named, and left alone.
        (base_path / "02").mkdir()
        eventually(lambda: "has several folders of one version" in running.log.read_text(), "a warning")
        assert running.predict(predict_request()).model_spec.version.value == 2


# ---- retries ----


def status_of(server: Server, version: int, name: str = "default") -> get_model_status_pb2.ModelVersionStatus:
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = name
    request.model_spec.version.value = version
    (status,) = server.model.GetModelStatus(request, timeout=PATIENCE_S).model_version_status
    return status


@pytest.mark.parametrize(
    "missing",
    [
        "saved_model.pb",
        "half of saved_model.pb",
        "variables/variables.data-00000-of-00001",
        "half of variables/variables.data-00000-of-00001",
        "assets",
    ],
)
def test_a_version_whose_files_come_late_is_tried_again(
    exported: Path, zoo: Path, base_path: Path, tmp_path: Path, missing: str
) -> None:
    saved_models.publish(exported / "half_plus_1", base_path, 1)
    flags = [f"--model_base_path={base_path}", "--load_retry_interval_micros=50000", "--max_num_load_retries=1000000"]
    with serving(tmp_path, *flags) as running:
        saved_models.publish(zoo / "half_plus_two_tf1", tmp_path, 2)
        whole, away = tmp_path / "2", tmp_path / "away"
        name = missing.removeprefix("half of ")
        (whole / name).rename(away)
        if missing != name:
            (whole / name).write_bytes(away.read_bytes()[: away.stat().st_size // 2])
        whole.rename(base_path / "2")
        eventually(lambda: running.log.read_text().count("; trying again in 0.05 s") > 2, "it is tried again")
        status = status_of(running, 2)
        assert status.state == State.LOADING
        assert running.predict(predict_request()).model_spec.version.value == 1
        assert error_of(lambda: running.predict(predict_request(version=2))) == (
            grpc.StatusCode.NOT_FOUND,
            "Servable not found for request: Specific(default, 2)",
        )
        away.rename(base_path / "2" / name)
        eventually(lambda: running.states() == {1: State.END, 2: State.AVAILABLE}, "it serves")
        x = {"x": np.float32([[2]])}
        assert list(running.predict(predict_request(inputs=x)).outputs["y"].float_val) == [3.0]


def test_tries_are_counted_and_a_deleted_version_is_given_up(exported: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(exported / "half_plus_1", base_path, 1)
    flags = [f"--model_base_path={base_path}", "--load_retry_interval_micros=1000", "--max_num_load_retries=2"]
    with serving(tmp_path, *flags) as running:
        (base_path / "2").mkdir()
        eventually(lambda: running.states().get(2) == State.END, "it is given up")
        assert running.log.read_text().count("loading model default version 2 ") == 3
        assert status_of(running, 2).status.error_code == grpc.StatusCode.NOT_FOUND.value[0]
        # A version that is deleted and comes again is new.
        (base_path / "2").rmdir()
        # What is found later in the same folder shows that the server has looked again.
        (base_path / "01").mkdir()
        eventually(lambda: "several folders of one version" in running.log.read_text(), "it looks again")
        saved_models.publish(exported / "half_plus_2", base_path, 2)
        eventually(lambda: running.states()[2] == State.AVAILABLE, "it serves")
    with serving(tmp_path, f"--model_base_path={base_path}", "--load_retry_interval_micros=3600000000") as running:
        (base_path / "3").mkdir()
        eventually(lambda: "; trying again in 3600 s" in running.log.read_text(), "it waits for an hour")
        (base_path / "3").rmdir()
        eventually(lambda: running.states()[3] == State.END, "it is given up")
        assert running.stop() == 0


def test_what_cannot_be_mended_is_not_tried_again(exported: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(exported / "half_plus_1", base_path, 1)
    with serving(tmp_path, f"--model_base_path={base_path}") as running:
        saved_models.write_unknown_op(tmp_path / "two", "OpOfNobody")
        (tmp_path / "two").rename(base_path / "2")
        eventually(lambda: running.states().get(2) == State.END, "it has failed")
        assert running.log.read_text().count("loading model default version 2 ") == 1


# ---- many models ----


@pytest.fixture
def models(exported: Path, tmp_path: Path) -> Path:
    """Base paths `a` with the versions 1, 2, 3 (half_plus_<version>) and `b` with 4."""
    for name, versions in (("a", (1, 2, 3)), ("b", (4,))):
        (tmp_path / name).mkdir()
        for version in versions:
            saved_models.publish(exported / f"half_plus_{version}", tmp_path / name, version)
    return tmp_path


def write_config(folder: Path, *configs: object) -> str:
    """Writes the configuration of these models at once; returns the flag."""
    (folder / "new.config").write_text(str(config_list(*configs)))
    (folder / "new.config").rename(folder / "models.config")
    return f"--model_config_file={folder / 'models.config'}"


def ready(server: Server, name: str) -> list[int]:
    return sorted(version for version, state in server.states(name).items() if state == State.AVAILABLE)


def answer(server: Server, name: str, **spec: object) -> int:
    """The version that answers, by its own words and by what it computes."""
    request = labelled_request(str(spec["label"]), name) if "label" in spec else predict_request(name=name, **spec)
    response = server.predict(request)
    assert response.model_spec.name == name
    version = response.model_spec.version.value
    assert list(response.outputs["y"].float_val) == [0.5 + version, 1 + version]
    return version


def test_policies_and_labels_at_the_start(models: Path) -> None:
    config = write_config(
        models,
        model_config("latest", models / "a"),
        model_config("two", models / "a", latest=2),
        model_config("all", models / "a", every=True, labels={"stable": 1, "canary": 3}),
        model_config("some", models / "a", specific=(1, 3, 9), labels={"old": 1}),
        model_config("b", models / "b"),
    )
    # A config file goes before the other two flags.
    with serving(models, config, "--model_name=nobody", "--model_base_path=/nowhere") as running:
        # Each model has a version that answers, and each label its own; the other versions follow.
        assert answer(running, "all", label="stable") == 1
        versions = {"latest": [3], "two": [2, 3], "all": [1, 2, 3], "some": [1, 3], "b": [4]}
        eventually(lambda: {name: ready(running, name) for name in versions} == versions, "all are loaded")
        assert [answer(running, name) for name in ("latest", "two", "all", "some", "b")] == [3, 3, 3, 3, 4]
        assert answer(running, "two", version=2) == 2
        assert answer(running, "all", label="stable") == 1
        assert answer(running, "all", label="canary") == 3
        assert answer(running, "some", label="old") == 1
        assert error_of(lambda: answer(running, "b", label="stable")) == (
            INVALID,
            "Unrecognized servable version label: stable",
        )
        assert "version 9 of model some, which its version policy names, was not found" in running.log.read_text()
        missing = error_of(lambda: running.states("nobody"))
        assert missing == (grpc.StatusCode.NOT_FOUND, "Could not find any versions of model nobody")


def test_a_label_at_the_start_that_no_version_carries_is_never_given(models: Path) -> None:
    with serving(models, write_config(models, model_config("a", models / "a", labels={"old": 1}))) as running:
        assert answer(running, "a") == 3
        assert error_of(lambda: answer(running, "a", label="old"))[0] == INVALID


def test_one_missing_base_path_does_not_stop_the_others(models: Path, exported: Path) -> None:
    config = write_config(models, model_config("a", models / "a"), model_config("later", models / "later"))
    with serving(models, config, port=free_port(), wait=False) as running:
        eventually(lambda: "loaded model a version 3" in running.log.read_text(), "one model is there")
        eventually(lambda: answer(running, "a") == 3, "it answers")
        # Until all of them are there, nothing is said to be unknown for good.
        for name in ("later", "nobody"):
            code, message = error_of(lambda: running.predict(predict_request(name=name)))  # noqa: B023
            assert code == grpc.StatusCode.UNAVAILABLE and "starting" in message
        saved_models.publish(exported / "half_plus_4", models / "a", 4)
        eventually(lambda: answer(running, "a") == 4, "its new version serves")
        (models / "later").mkdir()
        saved_models.publish(exported / "half_plus_1", models / "later", 1)
        running.wait_until_ready()
        assert answer(running, "later") == 1
        assert error_of(lambda: running.predict(predict_request(name="nobody"))) == (
            grpc.StatusCode.NOT_FOUND,
            "Servable not found for request: Latest(nobody)",
        )
        # And when it goes away again.
        (models / "later").rename(models / "gone")
        saved_models.publish(exported / "half_plus_1", models / "b", 5)
        eventually(lambda: "cannot read the base path of model later" in running.log.read_text(), "a warning")
        assert (answer(running, "a"), answer(running, "later")) == (4, 1)


BAD_CONFIGS = {
    "no config": ("what is this", "Error parsing text-format tensorflow.serving.ModelServerConfig: 1:"),
    "unknown field": (
        "model_config_list { config { nam: 'a' } }",
        "Error parsing text-format tensorflow.serving.Model",
    ),
    "not closed": ("model_config_list {", "Error parsing text-format tensorflow.serving.ModelServerConfig"),
    "twice": (
        "model_config_list { config { name: 'a' base_path: '/a' model_platform: 'tensorflow' } "
        "config { name: 'a' base_path: '/b' model_platform: 'tensorflow' } }",
        "Illegal to list model a multiple times in config list",
    ),
    "relative path": (
        "model_config_list { config { name: 'a' base_path: 'b' model_platform: 'tensorflow' } }",
        "Expected model a to have an absolute path or URI; got base_path()=b",
    ),
    "no path": (
        "model_config_list { config { name: 'a' model_platform: 'tensorflow' } }",
        "Expected model a to have an absolute path or URI; got base_path()=",
    ),
    "no name": ("model_config_list { config { base_path: '/a' model_platform: 'tensorflow' } }", "has no name"),
    "no platform": ("model_config_list { config { name: 'a' base_path: '/a' } }", "Illegal setting neither "),
    "both platforms": (
        "model_config_list { config { "
        "name: 'a' base_path: '/a' model_platform: 'tensorflow' model_type: TENSORFLOW } }",
        "Illegal setting both ",
    ),
    "unknown platform": (
        "model_config_list { config { name: 'a' base_path: '/a' model_platform: 'p' } }",
        "Model a requests unsupported platform p",
    ),
    "custom": ("custom_model_config { }", "custom_model_config is not supported"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs_end_the_start(tmp_path: Path, case: str) -> None:
    text, message = BAD_CONFIGS[case]
    (tmp_path / "models.config").write_text(text)
    status, error = failing_start("--port=0", f"--model_config_file={tmp_path / 'models.config'}")
    assert status == 1
    assert error.startswith("Failed to start server. Error: ")
    assert message in error


def test_a_config_file_that_is_missing_ends_the_start(tmp_path: Path) -> None:
    status, error = failing_start("--port=0", f"--model_config_file={tmp_path / 'models.config'}")
    assert status == 1 and "models.config" in error and "No such file" in error


def test_the_old_model_type_is_understood(models: Path) -> None:
    text = f"model_config_list {{ config {{ name: 'a' base_path: '{models / 'a'}' model_type: TENSORFLOW }} }}"
    (models / "models.config").write_text(text)
    with serving(models, f"--model_config_file={models / 'models.config'}") as running:
        assert answer(running, "a") == 3


# ---- reloads ----


@pytest.fixture
def reloadable(models: Path) -> Iterator[Server]:
    """Serves the model a by its base path a, all versions, with the label stable on 1."""
    flags = ["--max_num_load_retries=0", write_config(models, model_a(models, stable=1))]
    with serving(models, *flags) as running:
        yield running


def model_a(models: Path, **labels: int) -> object:
    return model_config("a", models / "a", every=True, labels=labels)


def test_reload_adds_and_removes_models(reloadable: Server, models: Path) -> None:
    response = reloadable.reload(config_list(model_a(models), model_config("b", models / "b")))
    assert response.status.error_code == 0
    assert answer(reloadable, "b") == 4  # available when the call returns
    reloadable.reload(config_list(model_config("b", models / "b")))
    eventually(lambda: set(reloadable.states("a").values()) == {State.END}, "a is unloaded")
    assert error_of(lambda: answer(reloadable, "a"))[0] == grpc.StatusCode.NOT_FOUND
    assert answer(reloadable, "b") == 4
    reloadable.reload(config_list(model_a(models)))
    assert answer(reloadable, "a") == 3
    reloadable.reload(config_list())
    assert error_of(lambda: answer(reloadable, "b"))[0] == grpc.StatusCode.NOT_FOUND


def test_reload_changes_the_policy(reloadable: Server, models: Path) -> None:
    reloadable.reload(config_list(model_config("a", models / "a", specific=(2,))))
    eventually(lambda: ready(reloadable, "a") == [2], "2 alone")
    reloadable.reload(config_list(model_config("a", models / "a")))
    eventually(lambda: ready(reloadable, "a") == [3], "the latest")


def test_reload_moves_labels(reloadable: Server, models: Path) -> None:
    assert answer(reloadable, "a", label="stable") == 1
    reloadable.reload(config_list(model_a(models, stable=2, canary=3)))
    assert (answer(reloadable, "a", label="stable"), answer(reloadable, "a", label="canary")) == (2, 3)
    reloadable.reload(config_list(model_a(models, canary=3)))
    assert error_of(lambda: answer(reloadable, "a", label="stable"))[0] == INVALID


def test_a_label_may_name_a_version_that_the_reload_loads(reloadable: Server, models: Path) -> None:
    reloadable.reload(config_list(model_config("b", models / "b", labels={"new": 4}), model_a(models)))
    assert answer(reloadable, "b", label="new") == 4
    reloadable.reload(config_list(model_config("a", models / "a", specific=(2,), labels={"stable": 2})))
    assert answer(reloadable, "a", label="stable") == 2


LABEL_ERROR = "Request to assign label to version 9 of model a, which is not currently available for inference"


def test_a_label_that_cannot_be_changes_nothing(reloadable: Server, models: Path) -> None:
    config = config_list(model_a(models, stable=9), model_config("b", models / "b"))
    assert error_of(lambda: reloadable.reload(config)) == (grpc.StatusCode.FAILED_PRECONDITION, LABEL_ERROR)
    assert answer(reloadable, "a", label="stable") == 1
    assert error_of(lambda: answer(reloadable, "b"))[0] == grpc.StatusCode.NOT_FOUND
    reloadable.reload(config_list(model_a(models, stable=2)))  # nothing of the other one is left
    assert answer(reloadable, "a", label="stable") == 2


def test_a_label_on_a_version_that_does_not_load(reloadable: Server, models: Path) -> None:
    saved_models.write_unknown_op(models / "making", "OpOfNobody")
    (models / "making").rename(models / "a" / "9")
    code, message = error_of(lambda: reloadable.reload(config_list(model_a(models, stable=9))))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert message == LABEL_ERROR + ": it did not load"
    assert answer(reloadable, "a", label="stable") == 1  # as it was


def test_labels_for_unavailable_models(models: Path, exported: Path) -> None:
    flag = "--allow_version_labels_for_unavailable_models"
    with serving(models, flag, write_config(models, model_a(models, stable=1))) as running:
        eventually(lambda: ready(running, "a") == [1, 2, 3], "all are there")
        running.reload(config_list(model_a(models, stable=1, next=4)))
        assert error_of(lambda: answer(running, "a", label="next")) == (
            grpc.StatusCode.NOT_FOUND,
            "Servable not found for request: Specific(a, 4)",
        )
        # One that is in use does not go where nothing answers.
        code, message = error_of(lambda: running.reload(config_list(model_a(models, stable=9, next=4))))
        assert (code, message) == (grpc.StatusCode.FAILED_PRECONDITION, LABEL_ERROR)
        assert answer(running, "a", label="stable") == 1
        saved_models.publish(exported / "half_plus_4", models / "a", 4)
        eventually(lambda: ready(running, "a") == [1, 2, 3, 4], "4 is there")
        assert answer(running, "a", label="next") == 4


def test_a_reload_whose_model_does_not_load(reloadable: Server, models: Path) -> None:
    saved_models.write_unknown_op(models / "broken" / "5", "OpOfNobody")
    configs = (model_a(models, stable=1), model_config("b", models / "b"), model_config("c", models / "broken"))
    request = model_management_pb2.ReloadConfigRequest(config=config_list(*configs))
    code, message = error_of(lambda: reloadable.model.HandleReloadConfigRequest(request, timeout=PATIENCE_S))
    assert code == grpc.StatusCode.UNKNOWN
    assert message.startswith("1 model(s) did not become available: {{name: c version: 5} due to error: ")
    assert "OpOfNobody" in message and message.endswith("}, }")
    assert (answer(reloadable, "a"), answer(reloadable, "b")) == (3, 4)


def test_reload_errors(reloadable: Server, models: Path) -> None:
    unsupported = (
        INVALID,
        "ServerModelConfig type not supported by HandleReloadConfigRequest. "
        "Only ModelConfigList is currently supported",
    )
    empty = model_management_pb2.ReloadConfigRequest().config
    custom = model_management_pb2.ReloadConfigRequest().config
    custom.custom_model_config.SetInParent()
    a = model_a(models)
    cases = {
        unsupported: (empty, custom),
        (INVALID, "Illegal to list model a multiple times in config list"): (config_list(a, a),),
        (INVALID, "Expected model a to have an absolute path or URI; got base_path()=x"): (
            config_list(model_config("a", Path("x"))),
        ),
    }
    for expected, configs in cases.items():
        for config in configs:
            assert error_of(lambda: reloadable.reload(config)) == expected  # noqa: B023
    for platform in ("", "p"):
        config = config_list(model_config("a", models / "a", platform=platform))
        assert error_of(lambda: reloadable.reload(config))[0] == INVALID  # noqa: B023
    assert answer(reloadable, "a", label="stable") == 1


def test_a_reload_that_waits_in_vain_holds_nothing_up(reloadable: Server, models: Path) -> None:
    """A base path that is not there is waited for; a typing error in it must not be the end of reloads."""
    typo = config_list(model_a(models, stable=1), model_config("b", models / "bb"))
    request = model_management_pb2.ReloadConfigRequest(config=typo)
    waiting = reloadable.model.HandleReloadConfigRequest.future(request, timeout=PATIENCE_S)
    eventually(lambda: "cannot read the base path of model b" in reloadable.log.read_text(), "a warning")
    assert not waiting.done()
    reloadable.reload(config_list(model_a(models, stable=1)))  # takes b away
    code, message = error_of(waiting.result)
    assert (code, message) == (grpc.StatusCode.ABORTED, "a later configuration removed model b")
    # Where the later one mends it, both succeed.
    waiting = reloadable.model.HandleReloadConfigRequest.future(request, timeout=PATIENCE_S)
    eventually(lambda: reloadable.log.read_text().count("cannot read the base path of model b") == 2, "a warning")
    reloadable.reload(config_list(model_a(models, stable=1), model_config("b", models / "b")))
    assert waiting.result().status.error_code == 0
    assert answer(reloadable, "b") == 4
    # Clients that gave up leave no thread behind: more of them than there are threads.
    for i in range(20):
        lost = config_list(model_a(models, stable=1), model_config(f"c{i}", models / "cc"))
        code, _ = error_of(lambda: reloadable.reload(lost, timeout=0.05))  # noqa: B023
        assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    reloadable.reload(config_list(model_a(models, stable=1)))
    # And the end of the server ends a wait.
    waiting = reloadable.model.HandleReloadConfigRequest.future(request, timeout=PATIENCE_S)
    eventually(lambda: reloadable.log.read_text().count("cannot read the base path of model b") == 3, "a warning")
    assert reloadable.stop() == 0
    assert "did not end in time" not in reloadable.log.read_text()
    assert error_of(waiting.result)[0] == grpc.StatusCode.CANCELLED


def test_labels_move_and_models_come_and_go_under_load_without_a_failure(reloadable: Server, models: Path) -> None:
    stop = threading.Event()

    answers: set[int] = set()

    def load(client: int) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{reloadable.port}", [("dpsr.client", client)]) as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            while not stop.is_set():
                response = stub.Predict(labelled_request("stable", "a"), timeout=PATIENCE_S)
                version = response.model_spec.version.value
                assert list(response.outputs["y"].float_val) == [0.5 + version, 1 + version]
                answers.add(version)

    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        clients = [threads.submit(load, client) for client in range(3)]
        try:
            for turn in range(12):
                version = 1 + turn % 3
                # The version that the label leaves is unloaded at once.
                a = model_config("a", models / "a", specific=(version,), labels={"stable": version})
                others = [model_config("b", models / "b")] if turn % 2 else []
                reloadable.reload(config_list(a, *others))
                assert answer(reloadable, "a", label="stable") == version
                eventually(lambda: ready(reloadable, "a") == [version], "it serves alone")  # noqa: B023
                eventually(
                    lambda: version in answers or any(client.done() for client in clients),  # noqa: B023
                    "clients see it",
                )
        finally:
            stop.set()
        for client in clients:
            client.result()  # raises what went wrong
    assert answers == {1, 2, 3}


# ---- the config file is polled ----


def test_the_config_file_is_polled(models: Path, exported: Path) -> None:
    config = write_config(models, model_a(models, stable=1))
    with serving(models, config, "--model_config_file_poll_wait_seconds=1") as running:

        def log(text: str) -> bool:
            return text in running.log.read_text()

        write_config(models, model_a(models, stable=2), model_config("b", models / "b"))
        eventually(lambda: log("now serving the models of "), "it is read")
        assert answer(running, "a", label="stable") == 2
        eventually(lambda: running.states("b") == {4: State.AVAILABLE}, "b is there")
        # What is wrong changes nothing.
        (models / "models.config").write_text("")
        eventually(lambda: log("was not applied: FAILED_PRECONDITION: it is empty"), "it is refused")
        (models / "models.config").write_text("what is this")
        eventually(lambda: log("was not applied: INVALID_ARGUMENT: Error parsing"), "it is refused")
        (models / "models.config").unlink()
        eventually(lambda: log("was not applied: NOT_FOUND"), "it is missed")
        assert (answer(running, "a", label="stable"), answer(running, "b")) == (2, 4)
        # A label whose version comes later is given then; a base path that is missing does not end the polling.
        write_config(models, model_a(models, stable=4), model_config("c", models / "c"))
        eventually(lambda: log("Request to assign label to version 4 of model a"), "it is too early")
        assert answer(running, "a", label="stable") == 2
        saved_models.publish(exported / "half_plus_4", models / "a", 4)
        eventually(lambda: running.predict(labelled_request("stable", "a")).model_spec.version.value == 4, "moved")
        eventually(lambda: log("cannot read the base path of model c"), "c is missing")
        write_config(models, model_config("b", models / "b"))
        eventually(lambda: set(running.states("a").values()) == {State.END}, "a is gone")
        assert running.stop() == 0
        assert not log("did not end in time")


def test_loads_of_several_models_run_side_by_side(models: Path, exported: Path) -> None:
    # With a single thread the one that waits for its next try must not hold up the other either.
    (models / "late" / "1").mkdir(parents=True)
    configs = (model_config("late", models / "late"), model_config("a", models / "a"))
    for threads in (1, 4):
        flags = [f"--num_load_threads={threads}", f"--num_unload_threads={threads}", write_config(models, *configs)]
        with serving(models, *flags, port=free_port(), wait=False) as running:
            eventually(lambda: "loaded model a version 3" in running.log.read_text(), "a is loaded")
            eventually(lambda: answer(running, "a") == 3, "it answers")
            eventually(lambda: "; trying again in 60 s" in running.log.read_text(), "the other waits")
            assert running.stop() == 0
