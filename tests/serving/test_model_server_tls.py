"""How the model server is reached over gRPC: TLS, mutual TLS, UNIX sockets, channel arguments, health service."""

from __future__ import annotations

import datetime
import socket
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import saved_models
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from model_servers import Server, error_of, eventually, failing_start, predict_request, serving
from processes import PATIENCE_S, free_port
from tensorflow_serving.apis import prediction_service_pb2_grpc

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


class Authority:
    """Signs certificates. `cert` is its own, PEM."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")])
        self.cert, _ = self._sign(self._name, self._key, ca=True)

    def issue(self, name: str) -> tuple[bytes, bytes]:
        """A certificate for `name` and its key, PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        return self._sign(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]), key, ca=False)

    def _sign(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, ca: bool) -> tuple[bytes, bytes]:
        now = datetime.datetime.now(datetime.timezone.utc)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return certificate.public_bytes(pem), private


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def model(exported: Path, base_path: Path) -> str:
    """The flag of a model to serve."""
    saved_models.publish(exported / "half_plus_1", base_path, 1)
    return f"--model_base_path={base_path}"


def write_tls(folder: Path, **fields: bytes | bool) -> str:
    """Writes an SSLConfig; returns the flag."""
    lines = []
    for name, value in fields.items():
        text = str(value).lower() if isinstance(value, bool) else '"' + value.decode().replace("\n", "\\n") + '"'
        lines.append(f"{name}: {text}\n")
    (folder / "ssl.config").write_text("".join(lines))
    return f"--ssl_config_file={folder / 'ssl.config'}"


def ask(server: Server, credentials: grpc.ChannelCredentials | None) -> list[float]:
    target = f"localhost:{server.port}"
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = (
        grpc.secure_channel(target, credentials, options) if credentials else grpc.insecure_channel(target, options)
    )
    with channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        return list(stub.Predict(predict_request(), timeout=PATIENCE_S).outputs["y"].float_val)


def test_tls(authority: Authority, model: str, tmp_path: Path) -> None:
    cert, key = authority.issue("server")
    with serving(tmp_path, model, write_tls(tmp_path, server_key=key, server_cert=cert)) as running:
        assert ask(running, grpc.ssl_channel_credentials(authority.cert)) == [1.5, 2.0]
        assert error_of(lambda: ask(running, grpc.ssl_channel_credentials(Authority().cert)))[0] == UNAVAILABLE
        assert error_of(lambda: ask(running, None))[0] == UNAVAILABLE


def test_mutual_tls(authority: Authority, model: str, tmp_path: Path) -> None:
    cert, key = authority.issue("server")
    config = {"server_key": key, "server_cert": cert, "custom_ca": authority.cert, "client_verify": True}
    with serving(tmp_path, model, write_tls(tmp_path, **config)) as running:
        client_cert, client_key = authority.issue("client")
        credentials = grpc.ssl_channel_credentials(authority.cert, client_key, client_cert)
        assert ask(running, credentials) == [1.5, 2.0]
        assert error_of(lambda: ask(running, grpc.ssl_channel_credentials(authority.cert)))[0] == UNAVAILABLE
        stranger_cert, stranger_key = Authority().issue("client")
        stranger = grpc.ssl_channel_credentials(authority.cert, stranger_key, stranger_cert)
        assert error_of(lambda: ask(running, stranger))[0] == UNAVAILABLE


def test_bad_tls_configs_end_the_start(authority: Authority, model: str, tmp_path: Path) -> None:
    cert, key = authority.issue("server")
    other_key = authority.issue("other")[1]

    def failure(flag: str) -> str:
        status, error = failing_start("--port=0", model, flag)
        assert status == 1 and error.startswith("Failed to start server. Error: ")
        return error

    for fields in (
        {"server_key": b"no key", "server_cert": cert},
        {"server_key": key, "server_cert": b"no certificate"},
        {"server_key": other_key, "server_cert": cert},
        {"server_key": key},
        {},
        {"server_key": key, "server_cert": cert, "custom_ca": b"no certificate", "client_verify": True},
    ):
        error = failure(write_tls(tmp_path, **fields))
        assert "--ssl_config_file" in error and "Address" not in error
    (tmp_path / "ssl.config").write_text("what: is this")
    assert "Error parsing text-format" in failure(f"--ssl_config_file={tmp_path / 'ssl.config'}")
    assert "No such file" in failure(f"--ssl_config_file={tmp_path / 'none'}")


def test_unix_socket(model: str, tmp_path: Path) -> None:
    path = tmp_path / "s"

    def ask_socket() -> list[float]:
        with grpc.insecure_channel(f"unix:{path}") as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            return list(stub.Predict(predict_request(), timeout=PATIENCE_S).outputs["y"].float_val)

    with serving(tmp_path, model, f"--grpc_socket_path={path}") as running:
        assert ask_socket() == [1.5, 2.0]
        assert ask(running, None) == [1.5, 2.0]  # and on the port
    # Killed, it left the socket behind: that does not stop the next one.
    assert path.is_socket()
    with serving(tmp_path, model, f"--grpc_socket_path={path}") as running:
        assert ask_socket() == [1.5, 2.0]
        assert running.stop() == 0


def test_unix_sockets_that_cannot_be(model: str, tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "folder", tmp_path / ("a" * 200)):
        status, error = failing_start("--port=0", model, f"--grpc_socket_path={path}")
        assert status == 1
        assert "cannot listen on the UNIX socket" in error and "--grpc_socket_path" in error


def test_channel_arguments(model: str, tmp_path: Path) -> None:
    arguments = "grpc.max_connection_age_ms=100,grpc.nothing=text,grpc.empty"
    with serving(tmp_path, model, f"--grpc_channel_arguments={arguments}") as running:
        seen = []
        running.channel.subscribe(seen.append, try_to_connect=True)
        eventually(lambda: grpc.ChannelConnectivity.READY in seen, "it connects")
        # The server ends the connection when it is old enough.
        eventually(lambda: seen[-1] != grpc.ChannelConnectivity.READY, "the connection ends")
        assert ask(running, None) == [1.5, 2.0]


def check_health(server: Server) -> Callable[[str], int | grpc.StatusCode]:
    call = server.channel.unary_unary("/grpc.health.v1.Health/Check")

    def check(service: str) -> int | grpc.StatusCode:
        name = service.encode()
        try:
            answer = call(b"\x0a" + bytes([len(name)]) + name if name else b"", timeout=PATIENCE_S)
        except grpc.RpcError as error:
            return error.code()
        return answer[1] if answer else 0  # 1: serving, 2: not serving

    return check


def test_health_service(exported: Path, tmp_path: Path) -> None:
    base_path = tmp_path / "later"
    flags = [f"--model_base_path={base_path}", "--enable_grpc_healthcheck_service"]
    services = ("", "ModelService", "PredictionService")
    with serving(tmp_path, *flags, port=free_port(), wait=False) as running:
        check = check_health(running)
        eventually(lambda: [check(service) for service in services] == [2, 2, 2], "it says that it does not serve yet")
        assert check("nobody") == grpc.StatusCode.NOT_FOUND
        base_path.mkdir()
        saved_models.publish(exported / "half_plus_1", base_path, 1)
        running.wait_until_ready()
        eventually(lambda: [check(service) for service in services] == [1, 1, 1], "it serves")


def test_no_health_service_unless_asked_for(model: str, tmp_path: Path) -> None:
    with serving(tmp_path, model) as running:
        assert check_health(running)("ModelService") == grpc.StatusCode.UNIMPLEMENTED


def test_bytes_that_are_no_grpc(model: str, tmp_path: Path) -> None:
    with serving(tmp_path, model) as running:
        http2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        garbage = [bytes(range(256)) * 100, b"GET / HTTP/1.1\r\n\r\n", http2 + b"\xff" * 999]
        for data in garbage:
            with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE_S) as client:
                try:
                    client.sendall(data)
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(1 << 16):
                        pass
                except TimeoutError:
                    raise
                except OSError:
                    pass  # the server may close the connection at any time, also before all is sent
        assert ask(running, None) == [1.5, 2.0]
        assert running.stop() == 0
