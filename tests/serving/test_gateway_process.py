"""`dpsr search` as a process, beside a real model server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway_shops import call, write_index
from processes import PATIENCE_S, child_environment, command_line, freeze, run_command

from dpsr_serving.model_server import start_model_server

pytestmark = pytest.mark.slow

CONFIG = """
index: {index}
models:
  shop: {{target: "{target}"}}
pipelines:
  both: {{deadline_ms: 9000, recall: {{inverted: {{deadline_ms: 9000}}, semantic: {{model: shop, deadline_ms: 9000}}}}}}
"""


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_index(tmp_path_factory.mktemp("index") / "index")


class Process:
    """`dpsr search` on a free port."""

    def __init__(self, config: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            command_line("search", f"--config={config}", "--port=0", *arguments),
            env=child_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("search ready on http://"), self.process.communicate()
        self.address = line.split("http://")[1].split(",")[0].strip()


@pytest.fixture
def gateway(index: Path, model_paths: dict[str, Path], tmp_path: Path) -> Iterator[tuple[Process, int]]:
    """A gateway and the process id of its model server, whose query of n bytes finds items 100, 101, ... 99 + n."""
    config = tmp_path / "search.yaml"
    with start_model_server(model_paths["shop"], "shop", op_libraries=()) as server:
        config.write_text(CONFIG.format(index=index, target=server.target))
        process = Process(config, "--grpc_port=0", "--page")
        try:
            yield process, server.process.pid
        finally:
            if process.process.poll() is None:
                process.process.kill()
            process.process.communicate()


def test_gateway_answers_degrades_and_stops(gateway: tuple[Process, int]) -> None:
    process, model_server = gateway
    answer = call(process.address, "/v1/search", {"query": "red", "size": 40}).json
    assert answer["degraded"] == []
    semantic = [item["id"] for item in answer["items"] if "semantic" in item["sources"]]
    assert sorted(semantic) == [100, 101, 102]
    assert call(process.address, "/").status == 200
    # A model server that hangs, with a search under way when the gateway is told to stop.
    freeze(model_server)
    answers: list[object] = []
    ask = threading.Thread(
        target=lambda: answers.append(call(process.address, "/v1/search", {"query": "red"}).json["degraded"])
    )
    ask.start()
    while (
        json.loads(call(process.address, "/metrics").body.decode().split("dpsr_search_under_way{} ")[1].split()[0]) < 1
    ):
        pass
    process.process.send_signal(signal.SIGTERM)
    while _listens(process.address):
        pass
    os.kill(model_server, signal.SIGCONT)
    ask.join(PATIENCE_S)
    assert answers == [[]]
    assert process.process.wait(PATIENCE_S) == 0


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE_S).close()
    except OSError:
        return False
    return True


def test_wrong_starts_are_refused(index: Path, tmp_path: Path) -> None:
    config = tmp_path / "search.yaml"
    config.write_text("index: nothing\npipelines: {bm25: {recall: {inverted: {}}}}\n")
    refused = run_command("search", f"--config={config}")
    assert (refused.returncode, "holds no inverted index" in refused.stderr) == (1, True)
    config.write_text(f"index: {index}\npipelines: {{bm25: {{recall: {{inverted: {{}}}}}}}}\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = run_command("search", f"--config={config}", f"--port={taken.getsockname()[1]}")
    assert (refused.returncode, "is the port in use" in refused.stderr) == (1, True)
    refused = run_command("search", f"--config={config}", "--judgments=a.tsv")
    assert (refused.returncode, "only the page saves judgments; add --page" in refused.stderr) == (2, True)
