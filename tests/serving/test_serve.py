"""`dpsr serve` and start_model_server, on the real model server."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import PATIENCE_S, alive, child_environment, command_line, run_command

from dpsr_common.command_line import main
from dpsr_common.errors import CommandError
from dpsr_serving import model_server
from dpsr_serving.client import SearchClient
from dpsr_serving.model_server import registered_op_libraries, start_model_server


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`dpsr serve --port=0` as a process, and the target that it announces."""
    with subprocess.Popen(
        command_line("serve", "--port=0", *arguments),
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        seen = ""
        try:
            for line in process.stdout:
                seen += line
                ready = re.search(r"Running gRPC ModelServer at (\S+:\d+)", line)
                if ready:
                    yield process, ready[1]
                    return
            raise AssertionError(f"dpsr serve never announced itself:\n{seen}")
        finally:
            process.kill()


def test_serves_the_models_of_a_file(model_paths: dict[str, Path], tmp_path: Path) -> None:
    models = tmp_path / "models.config"
    models.write_text(
        "model_config_list {"
        + "".join(
            f'config {{ name: "{name}" base_path: "{path}" model_platform: "tensorflow" }}'
            for name, path in model_paths.items()
        )
        + "}"
    )
    with serving(f"--model_config_file={models}") as (_, target):
        for name in model_paths:
            with SearchClient(target, name) as client:
                assert len(client.search("abc")[0])
    result = run_command("serve", f"--model_config_file={models}", "--model_base_path=x")
    assert result.returncode == 2 and "--model_base_path cannot be combined with --model_config_file" in result.stderr


def test_serves_until_sigterm(model_paths: dict[str, Path]) -> None:
    with serving(f"--model_base_path={model_paths['shop']}", "--model_name=s", "--op_library=") as (process, target):
        with SearchClient(target, "s") as client:
            assert client.search("ab")[0].item_ids.tolist() == [100, 101]
        process.terminate()
        assert process.wait(PATIENCE_S) == 0


def test_relative_base_path_and_flags_of_the_server(model_paths: dict[str, Path]) -> None:
    path = os.path.relpath(model_paths["shop"])
    with (
        serving(f"--model_base_path={path}", "--op_library=", "--enable_serialization_as_tensor_content=true") as (
            _,
            target,
        ),
        SearchClient(target, "default") as client,
    ):
        assert client.search("ab")[0].item_ids.tolist() == [100, 101]


def test_failures_are_one_line(
    tmp_path: Path, model_paths: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no_version" / "abc").mkdir(parents=True)
    shop = model_paths["shop"]
    for status, arguments, words in (
        (2, (), "--model_base_path=DIR"),
        (2, ("--port=many",), "many"),
        (1, (f"--model_base_path={tmp_path / 'missing'}",), "missing: No such file or directory"),
        (1, (f"--model_base_path={tmp_path / 'no_version'}",), "has no version"),
        (1, (f"--model_base_path={shop / '7'}",), "give its parent"),
        (1, (f"--model_base_path={shop}", "--op_library=nowhere.so"), "no such file"),
    ):
        assert main(["serve", *arguments]) == status, arguments
        errors = capsys.readouterr().err
        assert errors.startswith("dpsr serve: error: ") and errors.count("\n") == 1 and words in errors, errors


def test_help() -> None:
    result = run_command("serve", "--help")
    assert result.returncode == 0 and "--model_base_path" in result.stdout and result.stderr == ""


def test_missing_binary_says_what_to_do(monkeypatch: pytest.MonkeyPatch, model_paths: dict[str, Path]) -> None:
    monkeypatch.setattr(model_server, "BINARY", Path("/nonexistent/dpsr_model_server"))
    with pytest.raises(CommandError, match="make setup"):
        start_model_server(model_paths["shop"], "shop", op_libraries=())


def test_start_and_stop(model_paths: dict[str, Path]) -> None:
    with start_model_server(model_paths["shop"], "shop", op_libraries=()) as server:
        assert server.target == f"127.0.0.1:{server.port}"
        with SearchClient(server.target, "shop") as client:
            assert len(client.search("ab")[0]) == 2
        assert server.output()
    assert server.process.returncode == 0
    assert server.stop() == 0  # again


def test_start_failure_tells_what_the_server_said(tmp_path: Path, model_paths: dict[str, Path]) -> None:
    library = tmp_path / "broken_op.so"
    library.write_text("not a library")
    with pytest.raises(CommandError) as raised:
        start_model_server(model_paths["shop"], "shop", op_libraries=[library])
    assert "exit status" in str(raised.value) and "broken_op.so" in str(raised.value)


def test_port_in_use(model_paths: dict[str, Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(CommandError) as raised:
            start_model_server(model_paths["shop"], "shop", port, op_libraries=())
    assert str(port) in str(raised.value)


def test_not_ready_in_time_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "1").mkdir()  # a version without a SavedModel: the server keeps looking
    started = []
    popen = subprocess.Popen

    def record(*arguments: object, **keywords: object) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **keywords))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", record)
    with pytest.raises(CommandError):
        start_model_server(tmp_path, "m", op_libraries=(), timeout_s=1.0)
    assert len(started) == 1 and started[0].poll() is not None


@pytest.mark.parametrize("how", ["exit", "exception", "kill"])
def test_server_ends_with_its_parent(model_paths: dict[str, Path], how: str) -> None:
    code = (
        "import sys, time\n"
        "from dpsr_serving.model_server import start_model_server\n"
        f"server = start_model_server({str(model_paths['shop'])!r}, 'shop', op_libraries=())\n"
        "print(server.process.pid, flush=True)\n"
        f"if {how!r} == 'exception': raise RuntimeError\n"
        f"if {how!r} == 'kill': time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        if how == "kill":
            parent.send_signal(signal.SIGKILL)
        parent.wait(PATIENCE_S)
    while alive(pid):  # the test's own time limit ends this
        time.sleep(0.01)


def test_registered_op_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop_ops.py").write_text(
        "from pathlib import Path\ndef library(): return Path(__file__).with_name('libshop_ops.so')\n"
    )
    info = tmp_path / "shop_ops-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shop_ops\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{model_server.OP_LIBRARY_GROUP}]\nshop = shop_ops:library\n")
    before = {entry.value for entry in importlib.metadata.entry_points(group=model_server.OP_LIBRARY_GROUP)}
    monkeypatch.syspath_prepend(tmp_path)
    assert "shop_ops:library" not in before
    with pytest.raises(CommandError, match=r"libshop_ops.so of shop_ops:library is not built"):
        registered_op_libraries()
    (tmp_path / "libshop_ops.so").touch()
    assert str(tmp_path / "libshop_ops.so") in registered_op_libraries()
    (info / "entry_points.txt").write_text(f"[{model_server.OP_LIBRARY_GROUP}]\nshop = shop_ops:nothing\n")
    with pytest.raises(CommandError, match="shop_ops:nothing"):
        registered_op_libraries()
