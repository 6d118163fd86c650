"""The model server's gRPC port beyond usual calls: compression, limits, settings, hostile clients."""

from __future__ import annotations

import contextlib
import gzip
import resource
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import saved_models
from model_servers import Server, error_of, eventually, held_request, predict_request, serving
from processes import PATIENCE_S
from raw_http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    HEADERS,
    PING,
    RST_STREAM,
    WINDOW_UPDATE,
    Wire,
    frame,
    head,
    message,
)
from tensorflow_serving.apis import prediction_service_pb2_grpc

OK, DEADLINE_EXCEEDED, EXHAUSTED, UNIMPLEMENTED, INTERNAL = b"0", b"4", b"8", b"12", b"13"


@pytest.fixture
def model(exported: Path, base_path: Path) -> str:
    saved_models.publish(exported / "signatures", base_path, 1)
    return f"--model_base_path={base_path}"


@contextlib.contextmanager
def wire(server: Server) -> Iterator[Wire]:
    with contextlib.closing(Wire(f"127.0.0.1:{server.port}")) as client:
        yield client


def send(client: Wire, stream: int, body: bytes, **fields: str) -> None:
    client.send(frame(HEADERS, END_HEADERS, stream, head(**fields)))
    pieces = [body[begin : begin + 16384] for begin in range(0, len(body), 16384)] or [b""]
    for index, piece in enumerate(pieces, 1):
        client.send(frame(DATA, END_STREAM if index == len(pieces) else 0, stream, piece))


def packed(body: bytes) -> bytes:
    return b"\1" + message(body)[1:]


def works(server: Server) -> None:
    assert list(server.predict(predict_request()).outputs["y"].float_val) == [0.5, 1.0]


# ---- compression ----


@pytest.mark.parametrize("case", ["no gzip", "cut off", "deflate"])
def test_a_message_that_is_not_in_its_format(server: Server, case: str) -> None:
    whole = b"\x0a\x02"
    body = {"no gzip": b"x", "cut off": gzip.compress(whole)[:-1], "deflate": zlib.compress(whole)}[case]
    with wire(server) as client:
        send(client, 1, packed(body), grpc_encoding="gzip")
        headers, _ = client.answer(1)
        assert headers[b"grpc-status"] == INTERNAL
        assert headers[b"grpc-message"] == b"the message is not a complete text in the format gzip"
        works(server)


def test_a_format_that_the_server_does_not_know(server: Server) -> None:
    with wire(server) as client:
        send(client, 1, packed(b"x"), grpc_encoding="br")
        headers, _ = client.answer(1)
        assert headers[b"grpc-status"] == UNIMPLEMENTED
        assert headers[b"grpc-message"].endswith(b"expected one of identity,deflate,gzip")


def test_a_small_message_that_unpacks_to_much_is_refused(server: Server) -> None:
    """One of a million zeros is still taken, as a tensor may well be all zeros."""
    with wire(server) as client:
        send(client, 1, packed(gzip.compress(bytes(100_000_000))), grpc_encoding="gzip")
        headers, _ = client.answer(1)
        assert headers[b"grpc-status"] == EXHAUSTED
        assert b"when it is unpacked" in headers[b"grpc-message"]
        zeros = predict_request(inputs={"x": np.zeros(900_000, np.float32)})
        with grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.max_receive_message_length", -1)]) as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            answer = stub.Predict(zeros, compression=grpc.Compression.Gzip, timeout=PATIENCE_S)
        assert len(answer.outputs["y"].float_val) == 900_000


def test_answers_to_all_who_accept_it_are_compressed_if_the_operator_says_so(model: str, tmp_path: Path) -> None:
    request = predict_request(inputs={"x": np.zeros(1000, np.float32)}).SerializeToString()
    with serving(tmp_path, model, "--grpc_channel_arguments=grpc.default_compression_algorithm=2") as running:
        for number, (accepted, used) in enumerate([("identity, gzip", b"gzip"), ("identity,deflate", None)]):
            with wire(running) as client:
                send(client, 1, message(request), grpc_accept_encoding=accepted)
                headers, body = client.answer(1)
                assert headers.get(b"grpc-encoding") == used, number
                assert body[0] == (used is not None)


# ---- limits ----


def test_a_call_whose_deadline_has_passed_when_it_begins(server: Server) -> None:
    """The client may not have noticed: its clock is looked at later than ours."""
    with wire(server) as client:
        send(client, 1, message(predict_request().SerializeToString()), grpc_timeout="1n")
        headers, data = client.answer(1)
    assert (headers[b"grpc-status"], data) == (DEADLINE_EXCEEDED, b"")
    assert headers[b"grpc-message"] == b"the deadline passed before the request was computed"


def test_settings_of_connections(model: str, tmp_path: Path) -> None:
    settings = {
        "grpc.max_receive_message_length": 1000,
        "grpc.max_metadata_size": 600,
        "grpc.max_concurrent_streams": 2,
        "grpc.nothing": "text",
        "grpc.max_connection_idle_ms": "soon",
    }
    arguments = ",".join(f"{name}={value}" for name, value in settings.items())
    with serving(tmp_path, model, f"--grpc_channel_arguments={arguments}") as running:
        log = running.log.read_text()
        assert "this server has no grpc.nothing, and ignores it" in log
        assert "grpc.max_connection_idle_ms='soon' is ignored; expected a number" in log
        works(running)
        large = predict_request(inputs={"x": np.zeros(1000, np.float32)})
        assert error_of(lambda: running.predict(large)) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "a message of more than 1000 bytes",
        )
        with wire(running) as client:
            send(client, 1, message(b""), long="x" * 1000)
            assert client.answer(1)[0][b"grpc-message"] == b"headers of more than 600 bytes"
        # A client that knows the limit has its third call wait for one of the two.
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        calls = [held_request(running, tmp_path / name) for name in ("a", "b")]
        third = running.prediction.Predict.future(predict_request(), timeout=PATIENCE_S)
        assert not third.done()
        calls[0][1].touch()
        assert list(third.result().outputs["y"].float_val) == [0.5, 1.0]
        calls[1][1].touch()
        for call, _ in calls:
            call.result()


def test_what_the_calls_of_a_connection_hold_is_bounded(model: str, tmp_path: Path) -> None:
    with serving(tmp_path, model, "--max_held_bytes=1000000") as running, wire(running) as hog:
        held, release = held_request(running, tmp_path)
        for turn in range(30):  # parts of three messages of 5 MB, which may come at the same time
            for stream in (1, 3, 5):
                begin = b"" if turn else b"\0\0\x50\0\0"
                hog.send(frame(HEADERS, END_HEADERS, stream, head()) if begin else b"")
                hog.send(frame(DATA, 0, stream, begin + bytes(16000 - len(begin))))
        while (got := hog.read()) is not None and got[0] != HEADERS:
            pass
        assert got is not None
        refusal = dict(hog.decoder.decode(got[3], raw=True))
        assert refusal[b"grpc-status"] == EXHAUSTED
        assert refusal[b"grpc-message"] == b"the calls of this connection hold more than 1000000 bytes"
        works(running)
        release.touch()
        assert held.result().outputs["turns"].int64_val[0] >= 0


def test_a_single_message_above_the_held_bytes_passes(model: str, tmp_path: Path) -> None:
    with serving(tmp_path, model, "--max_held_bytes=4000000") as running:
        request = predict_request(inputs={"x": np.zeros(900_000, np.float32)})
        with grpc.insecure_channel(f"127.0.0.1:{running.port}", [("grpc.max_receive_message_length", -1)]) as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            assert len(stub.Predict(request, timeout=PATIENCE_S).outputs["y"].float_val) == 900_000


def test_large_messages_that_do_not_end_leave_room_for_others(server: Server) -> None:
    with wire(server) as client:
        client.acknowledge()
        streams = range(1, 33, 2)
        for stream in streams:  # the begins of messages of 4 MB
            client.send(frame(HEADERS, END_HEADERS, stream, head()) + frame(DATA, 0, stream, b"\0\0\x40\0\0"))
        send(client, 101, message(predict_request().SerializeToString()))
        admitted: list[int] = []
        while (got := client.read()) is not None and got[2] != 101:
            if got[0] == WINDOW_UPDATE and got[2]:
                admitted.append(got[2])
        assert admitted == [1, 3, 5]  # 16 MB hold three of them with their prefixes
        request = predict_request(inputs={"x": np.zeros(3_000_000, np.float32)})
        with grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.max_receive_message_length", -1)]) as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            assert len(stub.Predict(request, timeout=PATIENCE_S).outputs["y"].float_val) == 3_000_000
        client.send(frame(RST_STREAM, 0, 1, bytes(4)))
        while (got := client.read()) is not None and not (got[0] == WINDOW_UPDATE and got[2]):
            pass
        assert got is not None and got[2] == 7


def test_a_request_of_many_fields_is_refused(server: Server) -> None:
    for count, code in ((9_990, OK), (20_000, b"3")):
        body = message(predict_request().SerializeToString() + b"\x7a\x00" * count)
        with wire(server) as client:
            send(client, 1, body)
            headers, _ = client.answer(1)
            assert headers[b"grpc-status"] == code, headers


def test_a_message_that_goes_on_beyond_its_end_is_refused_at_once(server: Server) -> None:
    with wire(server) as client:
        client.send(frame(HEADERS, END_HEADERS, 1, head()) + frame(DATA, 0, 1, message(b"abc") + b"d"))
        headers, _ = client.answer(1)
        assert headers[b"grpc-status"] == INTERNAL
        works(server)


def test_it_listens_again_after_it_had_no_files_left(model: str, tmp_path: Path) -> None:
    """gRPC before 1.56 does not (CVE-2023-4785)."""
    with serving(tmp_path, model) as running, contextlib.ExitStack() as opened:
        pid = running.process.pid
        used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 3, used + 3))
        for _ in range(20):
            opened.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE_S))
        eventually(lambda: len(list(Path(f"/proc/{pid}/fd").iterdir())) >= used + 3, "all files are used")
        opened.close()
        with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            answer = stub.Predict(predict_request(), timeout=PATIENCE_S, wait_for_ready=True)
        assert list(answer.outputs["y"].float_val) == [0.5, 1.0]


# ---- hostile clients ----


def test_calls_given_up_at_once_end_their_connection(server: Server) -> None:
    body = message(predict_request().SerializeToString())
    with wire(server) as client:
        with contextlib.suppress(OSError):
            for stream in range(1, 80_001, 2):
                call = frame(HEADERS, END_HEADERS, stream, head()) + frame(DATA, END_STREAM, stream, body)
                client.send(call + frame(RST_STREAM, 0, stream, bytes(4)))
        assert client.goodbye() in (ENHANCE_YOUR_CALM, None)  # None: it was lost in the reset of the connection
        works(server)


def test_pings_that_are_not_read_end_their_connection(server: Server) -> None:
    with wire(server) as client:
        with contextlib.suppress(OSError):
            for _ in range(1000):
                client.send(frame(PING, 0, 0, bytes(8)) * 1000)
        assert client.goodbye() in (ENHANCE_YOUR_CALM, None)
        works(server)


def test_a_client_that_broke_a_limit_is_not_read_any_more(server: Server) -> None:
    """The connection stays open for a while, so that a flood does not begin anew at once."""
    with wire(server) as client:
        client.send(frame(PING, 0, 0, bytes(8)) * 12_000)
        assert client.goodbye() == ENHANCE_YOUR_CALM
        assert not client.is_read()


def test_headers_that_ended_servers_of_grpc(server: Server) -> None:
    """CVE-2023-1428 and its kin, also with more headers than the limit."""
    long = {f"long{index}": "v" * 1500 for index in range(8)}
    body = message(predict_request().SerializeToString())
    with wire(server) as client:
        for stream, more, status in ((1, {}, OK), (3, long, EXHAUSTED)):
            send(client, stream, body, grpclb_client_stats="deadly", **more)
            assert client.answer(stream)[0][b"grpc-status"] == status
        for stream, more in ((5, {}), (7, long)):
            send(client, stream, body, te="deadly", **more)
            while (got := client.read()) is not None and got[2] != stream:
                pass
            assert got is not None and got[0] == RST_STREAM
    works(server)
