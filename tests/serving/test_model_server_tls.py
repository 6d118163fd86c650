"""How the model server is reached: TLS, renewed certificates, UNIX sockets, channel arguments, health service."""

from __future__ import annotations

import contextlib
import datetime
import gzip
import http.client
import json
import shutil
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import saved_models
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from model_servers import (
    Reply,
    Server,
    config_list,
    error_of,
    eventually,
    failing_start,
    held_request,
    model_config,
    predict_request,
    serving,
)
from processes import PATIENCE_S, free_port
from raw_http2 import DATA, END_HEADERS, END_STREAM, HEADERS, Wire, frame, head, message
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

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


def write_tls(folder: Path, flag: str = "ssl_config_file", **fields: bytes | bool) -> str:
    """Writes an SSLConfig; returns the flag."""
    lines = []
    for name, value in fields.items():
        text = str(value).lower() if isinstance(value, bool) else '"' + value.decode().replace("\n", "\\n") + '"'
        lines.append(f"{name}: {text}\n")
    (folder / "ssl.config").write_text("".join(lines))
    return f"--{flag}={folder / 'ssl.config'}"


def files_of(folder: Path, name: str, pair: tuple[bytes, bytes]) -> dict[str, bytes]:
    """Writes a certificate and its key to files; returns the fields that name them."""
    names = {}
    for field, text in zip(("server_cert", "server_key"), pair, strict=True):
        file = folder / f"{name}.{field}"
        file.write_bytes(text)
        names[f"{field}_file"] = str(file).encode()
    return names


def client_context(authority: Authority, folder: Path, pair: tuple[bytes, bytes] | None = None) -> ssl.SSLContext:
    """A client that trusts `authority`, and shows the certificate of `pair`."""
    context = ssl.create_default_context(cadata=authority.cert.decode())
    if pair is not None:
        file = folder / "client.pem"
        file.write_bytes(b"".join(pair))
        context.load_cert_chain(file)
    return context


def https(server: Server, context: ssl.SSLContext, path: str, body: object = None) -> Reply:
    connection = http.client.HTTPSConnection("localhost", server.rest_port, timeout=PATIENCE_S, context=context)
    with contextlib.closing(connection):
        data = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, data)
        return Reply(connection.getresponse())


def certificate_at(port: int, context: ssl.SSLContext) -> int:
    """The serial number of the certificate that a server shows to a new connection."""
    plain = socket.create_connection(("localhost", port), PATIENCE_S)
    with context.wrap_socket(plain, server_hostname="localhost") as secure:
        certificate = secure.getpeercert(binary_form=True)
        assert certificate is not None
        return x509.load_der_x509_certificate(certificate).serial_number


def serial(certificate: bytes) -> int:
    return x509.load_pem_x509_certificate(certificate).serial_number


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
        {"server_key": key, "server_cert": cert, "client_verify": True},
        {"server_key": key, "server_cert": cert, "server_key_file": b"/nowhere"},
        {"server_key": key, "server_cert_file": b"/nowhere"},
    ):
        for flag in ("ssl_config_file", "rest_api_ssl_config_file"):
            error = failure(write_tls(tmp_path, flag, **fields))
            assert f"--{flag}" in error and "Address" not in error
    (tmp_path / "ssl.config").write_text("what: is this")
    assert "Error parsing text-format" in failure(f"--ssl_config_file={tmp_path / 'ssl.config'}")
    assert "No such file" in failure(f"--ssl_config_file={tmp_path / 'none'}")


def test_rest_tls(authority: Authority, model: str, tmp_path: Path) -> None:
    cert, key = authority.issue("server")
    flag = write_tls(tmp_path, "rest_api_ssl_config_file", server_key=key, server_cert=cert)
    with serving(tmp_path, model, flag, rest_port=free_port()) as running:
        context = client_context(authority, tmp_path)
        assert https(running, context, "/readyz").status == 200
        reply = https(running, context, "/v1/models/default:predict", {"instances": [1.0, 2.0]})
        assert reply.json == {"predictions": [1.5, 2.0]}
        large = [1.0] * 100_000  # many TLS records in both directions
        reply = https(running, context, "/v1/models/default:predict", {"instances": large})
        assert reply.json == {"predictions": [1.5] * 100_000}
        assert ask(running, None) == [1.5, 2.0]  # gRPC has its own flag

        with pytest.raises((OSError, http.client.HTTPException)):
            running.rest("/readyz")
        with pytest.raises(ssl.SSLError):
            https(running, client_context(Authority(), tmp_path), "/readyz")
        old = client_context(authority, tmp_path)
        with pytest.warns(DeprecationWarning):
            old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.raises(OSError):
            https(running, old, "/readyz")
        with contextlib.suppress(OSError), socket.create_connection(("localhost", running.rest_port)) as client:
            client.sendall(bytes(range(256)) * 100)
            assert client.recv(1) in (b"", b"\x15")  # nothing, or an alert

        # HTTP/1.1 by ALPN, several requests on a connection, and TLS's own end of it.
        context.set_alpn_protocols(["h2", "http/1.1"])
        plain = socket.create_connection(("localhost", running.rest_port), PATIENCE_S)
        with context.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False) as secure:
            assert secure.selected_alpn_protocol() == "http/1.1"
            end = b"GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
            secure.sendall(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n" + end)
            assert b"".join(iter(lambda: secure.recv(1 << 16), b"")).count(b"200 OK") == 2
        assert running.stop() == 0


def test_rest_mutual_tls(authority: Authority, model: str, tmp_path: Path) -> None:
    cert, key = authority.issue("server")
    config = {"server_key": key, "server_cert": cert, "custom_ca": authority.cert, "client_verify": True}
    flag = write_tls(tmp_path, "rest_api_ssl_config_file", **config)
    with serving(tmp_path, model, flag, rest_port=free_port()) as running:
        known = client_context(authority, tmp_path, authority.issue("client"))
        assert https(running, known, "/readyz").status == 200
        for pair in (None, Authority().issue("client")):
            with pytest.raises(OSError):
                https(running, client_context(authority, tmp_path, pair), "/readyz")


@contextlib.contextmanager
def load(*calls: Callable[[], object]) -> Iterator[Callable[[], list[int]]]:
    """Makes each call again and again, in a thread of its own; no call may fail. Yields the numbers of calls made."""
    stop, made = threading.Event(), [0] * len(calls)
    failures: list[Exception] = []

    def repeat(index: int) -> None:
        while not stop.is_set():
            try:
                calls[index]()
            except Exception as error:  # whatever it is, it is a failure of the test
                failures.append(error)
                return
            made[index] += 1
            stop.wait(0.03)

    threads = [threading.Thread(target=repeat, args=[index]) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    try:
        yield lambda: list(made)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures and all(made), failures


def test_certificates_are_renewed_under_load(authority: Authority, model: str, tmp_path: Path) -> None:
    first, second, third = (authority.issue(name) for name in ("first", "second", "third"))
    grpc_flag = write_tls(tmp_path, **files_of(tmp_path, "server", first))
    rest_flag = grpc_flag.replace("--", "--rest_api_")
    context = client_context(authority, tmp_path)
    context_h2 = client_context(authority, tmp_path)
    context_h2.set_alpn_protocols(["h2"])
    credentials = grpc.ssl_channel_credentials(authority.cert)
    with (
        serving(tmp_path, model, grpc_flag, rest_flag, rest_port=free_port()) as running,
        grpc.secure_channel(f"localhost:{running.port}", credentials) as kept,
        load(
            lambda: ask(running, credentials),
            lambda: prediction_service_pb2_grpc.PredictionServiceStub(kept).Predict(predict_request()),
            lambda: https(running, context, "/v1/models/default:predict", {"instances": [1.0]}).json["predictions"],
        ) as made,
    ):

        def shown() -> list[int]:
            return [certificate_at(running.port, context_h2), certificate_at(running.rest_port, context)]

        assert shown() == [serial(first[0])] * 2
        files_of(tmp_path, "server", second)
        eventually(lambda: shown() == [serial(second[0])] * 2, "new connections see the second certificate")
        # A certificate whose key has not come changes nothing, and is logged; once the key is there, it is used.
        (tmp_path / "server.server_cert").write_bytes(third[0])
        eventually(lambda: "server_key is not the key of server_cert" in running.log.read_text(), "it warns")
        assert shown() == [serial(second[0])] * 2
        (tmp_path / "server.server_key").write_bytes(third[1])
        eventually(lambda: shown() == [serial(third[0])] * 2, "new connections see the third certificate")
        # The SSLConfig itself may be replaced, too; one that is broken or gone keeps the present one.
        (tmp_path / "ssl.config").write_text("what: is this")
        eventually(lambda: "Error parsing text-format" in running.log.read_text(), "it warns")
        write_tls(tmp_path, server_key=first[1], server_cert=first[0])
        eventually(lambda: shown() == [serial(first[0])] * 2, "new connections see the first certificate again")
        before = made()
        eventually(lambda: all(a > b for a, b in zip(made(), before, strict=True)), "all clients go on")


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


def test_health_follows_the_models(exported: Path, tmp_path: Path) -> None:
    """Names of models, Watch, and a server as a whole that is as ready as /readyz says."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        saved_models.publish(exported / "half_plus_1", tmp_path / name, 1)
    config = [model_config(name, tmp_path / name) for name in ("a", "b")]
    (tmp_path / "models.config").write_text(str(config_list(*config)))
    flags = [f"--model_config_file={tmp_path}/models.config", "--enable_grpc_healthcheck_service"]
    with serving(tmp_path, *flags, "--file_system_poll_wait_seconds=1", rest_port=free_port()) as running:
        check = check_health(running)
        eventually(lambda: [check(name) for name in ("", "a", "b")] == [1, 1, 1], "all serve")
        watched = running.channel.unary_stream("/grpc.health.v1.Health/Watch")(b"\x0a\x01b", timeout=PATIENCE_S)
        assert next(watched)[1] == 1
        shutil.rmtree(tmp_path / "b" / "1")
        # A version whose folder has gone stays; a model that leaves the configuration does not.
        running.reload(config_list(config[0]))
        assert next(watched)[1] == 2
        eventually(lambda: [check(name) for name in ("", "a", "b")] == [1, 1, 2], "only a serves")
        # A new model without a version is not available, and neither is the server.
        with pytest.raises(grpc.RpcError):
            running.reload(config_list(config[0], model_config("c", tmp_path / "c")), timeout=0.5)
        eventually(lambda: [check(name) for name in ("", "a", "c")] == [2, 1, 2], "c does not serve")
        assert running.rest("/readyz").status == 503
        services = ("ModelService", "PredictionService")
        assert [check(name) for name in services] == [1, 1]
        assert check("nobody") == grpc.StatusCode.NOT_FOUND
        watched.cancel()
        assert running.stop() == 0


def test_reflection(model: str, tmp_path: Path) -> None:
    from google.protobuf import descriptor_pool
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    with serving(tmp_path, model, "--enable_grpc_healthcheck_service") as running:
        database = ProtoReflectionDescriptorDatabase(running.channel)
        assert set(database.get_services()) == {
            "tensorflow.serving.PredictionService",
            "tensorflow.serving.ModelService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        pool = descriptor_pool.DescriptorPool(database)
        service = pool.FindServiceByName("tensorflow.serving.PredictionService")
        inputs = service.methods_by_name["Predict"].input_type.fields_by_name["inputs"]
        assert inputs.message_type.fields_by_name["value"].message_type.full_name == "tensorflow.TensorProto"
        assert ask(running, None) == [1.5, 2.0]


PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0"


def test_times_and_traces(exported: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(exported / "signatures", base_path, 1)
    flags = [f"--model_base_path={base_path}", "--slow_request_ms=1000"]
    with serving(tmp_path, *flags, rest_port=free_port()) as running:

        def times(parent: str | None, request: predict_pb2.PredictRequest) -> dict[str, int]:
            metadata = [("traceparent", parent)] if parent else []
            future = running.prediction.Predict.future(request, timeout=PATIENCE_S, metadata=metadata)
            return {key: int(value) for key, value in future.trailing_metadata() if key.startswith("dpsr-")}

        def warnings() -> list[str]:
            return [line for line in running.log.read_text().splitlines() if line.startswith("W ")]

        good, bad = predict_request(), predict_request("nothing")
        for request in (good, bad):
            assert sorted(times(PARENT + "1", request)) == ["dpsr-compute-us", "dpsr-queue-us"]
            assert times(PARENT + "0", request) == times("nonsense", request) == times(None, request) == {}
        for body in ({"instances": [1.0]}, {"signature_name": "nothing", "instances": [1.0]}):
            reply = running.rest("/v1/models/default:predict", body, headers={"traceparent": PARENT + "1"})
            assert int(reply.headers["dpsr-queue-us"]) >= 0 and int(reply.headers["dpsr-compute-us"]) >= 0
            assert "dpsr-queue-us" not in running.rest("/v1/models/default:predict", body).headers
        assert warnings() == []  # errors of requests are the clients' business

        # A slow request, and one that fails by the server's fault, are logged with the trace.
        slow, release = held_request(running, tmp_path, metadata=[("traceparent", PARENT + "0")])
        time.sleep(1)
        release.touch()
        slow.result()
        eventually(lambda: len(warnings()) == 1, "it is logged")
        [line] = warnings()
        assert "Predict of model default took " in line and line.endswith(f" trace={PARENT[3:35]}")


def test_compression(exported: Path, base_path: Path, tmp_path: Path) -> None:
    """Answers are compressed if the client asks for it and they are large enough."""
    saved_models.publish(exported / "half_plus_1", base_path, 1)
    with serving(tmp_path, f"--model_base_path={base_path}", rest_port=free_port()) as running:
        target = f"127.0.0.1:{running.port}"
        for count, packed in ((10, 0), (1000, 1)):
            request = predict_request(inputs={"x": np.zeros(count, np.float32)})
            for encoding, flag in ((None, 0), ("gzip", packed), ("deflate", packed)):
                headers, body = raw_call(target, request.SerializeToString(), encoding)
                used = headers.get(b"grpc-encoding", b"identity").decode()
                assert (body[0], used) == (flag, encoding if flag else "identity")
            answer = running.prediction.Predict(request, compression=grpc.Compression.Gzip)
            assert list(answer.outputs["y"].float_val) == [1.0] * count
            data = {"instances": [0.0] * count}
            plain = running.rest("/v1/models/default:predict", data)
            assert "Content-Encoding" not in plain.headers
            for accepted in ("gzip", "deflate, GZIP;q=0.5"):
                connection = http.client.HTTPConnection("127.0.0.1", running.rest_port, timeout=PATIENCE_S)
                with contextlib.closing(connection):
                    headers = {"Accept-Encoding": accepted}
                    connection.request("POST", "/v1/models/default:predict", json.dumps(data), headers)
                    response = connection.getresponse()
                    assert (response.headers["Content-Encoding"] == "gzip") == bool(packed)
                    body = response.read()
                    assert (gzip.decompress(body) if packed else body).decode() == plain.text


def raw_call(target: str, request: bytes, encoding: str | None) -> tuple[dict[bytes, bytes], bytes]:
    """Headers and body of the answer to a Predict that may be compressed."""
    pack = {"gzip": gzip.compress, "deflate": zlib.compress}
    sent = message(pack[encoding](request) if encoding else request)
    fields = {"grpc_encoding": encoding} if encoding else {}
    client = Wire(target)
    with contextlib.closing(client):
        client.send(frame(HEADERS, END_HEADERS, 1, head(grpc_accept_encoding="identity, deflate, gzip", **fields)))
        client.send(frame(DATA, END_STREAM, 1, bytes([encoding is not None]) + sent[1:]))
        return client.answer(1)


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


def test_watching_the_health_ends_when_the_server_stops(exported: Path, base_path: Path, tmp_path: Path) -> None:
    """At the beginning of the shutdown: running requests go on, and the server does not wait for the watchers."""
    saved_models.publish(exported / "signatures", base_path, 1)
    with serving(tmp_path, f"--model_base_path={base_path}", "--enable_grpc_healthcheck_service") as running:
        eventually(lambda: check_health(running)("") == 1, "it serves")
        watch = running.channel.unary_stream("/grpc.health.v1.Health/Watch")
        watched = watch(b"", timeout=PATIENCE_S)
        unknown = watch(b"\x0a\x06nobody", timeout=PATIENCE_S)
        cancelled = watch(b"", timeout=PATIENCE_S)
        assert [next(one)[1] for one in (watched, unknown, cancelled)] == [1, 3, 1]
        cancelled.cancel()
        held, release = held_request(running, tmp_path)
        begin = time.monotonic()
        running.process.terminate()
        assert next(watched)[1] == 2
        for one in (watched, unknown):
            assert error_of(lambda one=one: next(one)) == (UNAVAILABLE, "the server is stopping")
        assert not held.done()
        release.touch()
        assert held.result().outputs["turns"].int64_val[0] >= 0
        assert running.process.wait(PATIENCE_S) == 0
        assert time.monotonic() - begin < 9, "the server waits for calls for 10 s"


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
