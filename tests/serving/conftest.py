"""Real model servers on small SavedModels, and real proxy processes, for the tests of serving."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import ProxyProcess, save_search_model
from proxy_backends import RecordingBackend

from dpsr_serving import model_server


@pytest.fixture
def start_proxy() -> Iterator[Callable[..., ProxyProcess]]:
    started: list[ProxyProcess] = []

    def start(*arguments: str) -> ProxyProcess:
        started.append(ProxyProcess(*arguments))
        return started[-1]

    yield start
    for proxy in started:
        proxy.stop()


@pytest.fixture
def start_backend() -> Iterator[Callable[[], RecordingBackend]]:
    started: list[RecordingBackend] = []

    def start() -> RecordingBackend:
        started.append(RecordingBackend())
        return started[-1]

    yield start
    for backend in started:
        backend.stop()


@pytest.fixture(scope="session")
def model_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Base paths: "shop" (ids from 100, versions 7) and "keyed" (ids from 200, with item_keys, version 1)."""
    root = tmp_path_factory.mktemp("models")
    save_search_model(root / "shop" / "7", base=100)
    save_search_model(root / "keyed" / "1", base=200, with_keys=True)
    return {"shop": root / "shop", "keyed": root / "keyed"}


@pytest.fixture(scope="session")
def servers(model_paths: dict[str, Path]) -> Iterator[dict[str, model_server.ModelServer]]:
    """A running model server for each model. Tests must not stop them."""
    running: dict[str, model_server.ModelServer] = {}
    try:
        for name, path in model_paths.items():
            running[name] = model_server.start_model_server(path, name, op_libraries=())
        yield running
    finally:
        for server in running.values():
            server.stop()
