"""Real model servers on small SavedModels, and real proxy processes, for the tests of serving."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from processes import ProxyProcess, save_search_model
from proxy_backends import RecordingBackend

from dpsr_serving import model_server

if TYPE_CHECKING:
    from model_servers import Server


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
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority (ca.pem), and server and client certificates of it (NAME.pem, NAME.key) for "localhost"."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=ca")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signing)
    return folder


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


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SavedModels to publish: half_plus_<n> for n 1 to 4 (TF1) and `signatures` (TF2)."""
    import saved_models

    folder = tmp_path_factory.mktemp("exported")
    for n in range(1, 5):
        saved_models.write_half_plus(folder / f"half_plus_{n}", n)
    saved_models.write_signatures(folder / "signatures")
    return folder


@pytest.fixture(scope="module")
def server(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server of the `signatures` model, version 7, for all tests that only send requests."""
    import model_servers
    import saved_models

    folder = tmp_path_factory.mktemp("shared")
    base_path = folder / "model"
    base_path.mkdir()
    saved_models.publish(exported / "signatures", base_path, 7)
    with model_servers.serving(folder, f"--model_base_path={base_path}") as running:
        yield running


@pytest.fixture
def base_path(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    return path


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SavedModels to publish: half_plus_two_tf1, half_plus_two_tf2, half_plus_two_keras, counter."""
    import saved_models

    folder = tmp_path_factory.mktemp("zoo")
    for form in ("tf1", "tf2", "keras"):
        saved_models.write_half_plus_two(folder / f"half_plus_two_{form}", form)
    saved_models.write_counter(folder / "counter")
    return folder
