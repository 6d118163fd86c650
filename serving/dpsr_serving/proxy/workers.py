"""The proxy's processes: a single one that serves, or several workers on one port and a parent that restarts them.

The parent (or the single process) answers HTTP: /healthz (the process lives), /readyz (it takes requests) and /metrics
(of all workers together). A worker and the parent talk over a socket in lines of JSON: the worker announces its
address, and then answers each line, which holds a number, with [number, ready, metrics].
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from dpsr_common.errors import CommandError
from dpsr_serving.addresses import join_address
from dpsr_serving.proxy.config import ProxyConfig, load_config, parse_config
from dpsr_serving.proxy.metrics import merge

Report = Callable[[], Awaitable[list[tuple[bool, str]]]]
Stamp = tuple[int, ...] | None  # changes whenever another file is put in place, or the file is written

_RELOAD_EVERY_S = 1.0
_REPORT_S = 2.0  # time that a worker has for a report
_RESTART_S = 1.0  # pause before a worker that ended is started again


@dataclasses.dataclass(frozen=True)
class Settings:
    """The flags of the command. Without `config_path`, `backend` serves all models."""

    config_path: str | None
    backend: str | None
    host: str
    port: int
    unix_socket: str | None
    drain_s: float
    http_port: int | None
    workers: int

    def load(self) -> tuple[ProxyConfig, Stamp]:
        """Reads the configuration, and returns it with the stamp of the file that was read. Raises UsageError."""
        if self.config_path is None:
            return parse_config(json.dumps({"default": {"backends": [self.backend]}})), None
        # Before reading, so that a change while the proxy starts is noticed afterwards.
        stamp = _stamp(self.config_path)
        return load_config(Path(self.config_path)), stamp


def _say(text: str) -> None:
    """Writes a line to standard error. A reader that has gone away must not end the parent of the workers."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


async def serve_alone(settings: Settings, config: ProxyConfig, stamp: Stamp) -> None:
    """Serves in this process until SIGTERM or SIGINT. Raises CommandError if it cannot start."""
    server = await _start(settings, config, share_port=False)
    signals = _Signals()

    async def report() -> list[tuple[bool, str]]:
        return [(server.ready(), server.dump())]

    http = await _listen_http(settings, report, server.address)
    await _serve(settings, server, signals, stamp)
    http.close()


async def serve_workers(settings: Settings) -> None:
    """Keeps workers running until SIGTERM or SIGINT, and forwards SIGHUP. Raises CommandError if one cannot start."""
    reserved = _reserve(settings.host, settings.port)
    settings = dataclasses.replace(settings, port=reserved.getsockname()[1])
    signals = _Signals()
    workers = [_Worker(settings) for _ in range(settings.workers)]
    try:
        for worker in workers:
            await worker.start()

        async def report() -> list[tuple[bool, str]]:
            return list(await asyncio.gather(*(worker.report() for worker in workers)))

        http = await _listen_http(settings, report, join_address(settings.host, settings.port))
        keepers = [asyncio.create_task(worker.keep()) for worker in workers]
        while not signals.stop.is_set():
            await signals.next()
            if signals.take_reload():
                for worker in workers:
                    worker.signal(signal.SIGHUP)
        signals.forget()
        for keeper in keepers:
            keeper.cancel()
        http.close()
    finally:
        for worker in workers:
            worker.signal(signal.SIGTERM)
        await asyncio.gather(*(worker.wait() for worker in workers))
        reserved.close()


def run_worker() -> None:
    """Runs a worker. Its command-line arguments are the settings as JSON and the file descriptor of the socket."""
    settings = Settings(**json.loads(sys.argv[1]))
    channel = socket.socket(fileno=int(sys.argv[2]))

    async def serve() -> None:
        reader, writer = await asyncio.open_connection(sock=channel)
        signals = _Signals()
        try:
            config, stamp = settings.load()
            server = await _start(settings, config, share_port=True)
        except CommandError as error:
            writer.write(json.dumps({"error": str(error)}).encode() + b"\n")
            await writer.drain()
            return

        async def answer() -> None:
            try:
                writer.write(json.dumps({"address": server.address}).encode() + b"\n")
                while line := await reader.readline():
                    writer.write(json.dumps([int(line), server.ready(), server.dump()]).encode() + b"\n")
                    await writer.drain()
            except OSError:
                pass
            finally:
                signals.stop_now()  # the parent has ended

        answering = asyncio.create_task(answer())
        await _serve(settings, server, signals, stamp)
        answering.cancel()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())


class _Signals:
    """SIGTERM and SIGINT ask to stop, a second one ends the process; SIGHUP asks to read the configuration again."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self._any = asyncio.Event()
        self._reload = False
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self.stop_now)
        self._loop.add_signal_handler(signal.SIGHUP, self._ask_reload)

    def stop_now(self) -> None:
        self.stop.set()
        self._any.set()

    def _ask_reload(self) -> None:
        self._reload = True
        self._any.set()

    async def next(self, timeout_s: float | None = None) -> None:
        """Waits for a signal, at most `timeout_s` seconds."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._any.wait(), timeout_s)
        if not self.stop.is_set():
            self._any.clear()

    def take_reload(self) -> bool:
        """Returns whether a reload was asked for since the last call."""
        reload, self._reload = self._reload, False
        return reload

    def forget(self) -> None:
        """Restores the default handlers: from now on SIGTERM or SIGINT ends the process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(number)


async def _start(settings: Settings, config: ProxyConfig, share_port: bool) -> Any:
    from dpsr_serving.proxy.server import ProxyServer

    try:
        server: Any = ProxyServer(config, share_port, settings.workers)
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}; check the path in the configuration") from error
    try:
        server.address = await server.start(settings.host, settings.port, settings.unix_socket)
    except OSError as error:
        await server.stop(0)
        raise CommandError(f"{error}: is the port in use, or is the host not an address of this machine?") from error
    # Modules stay as long as the process. When the garbage collector looks at all of them, calls wait for it.
    gc.collect()
    gc.freeze()
    return server


async def _serve(settings: Settings, server: Any, signals: _Signals, seen: Stamp) -> None:
    """Reloads the configuration and certificates whenever their files change, until it is time to stop; then drains."""
    path = settings.config_path
    certificates = _Certificates(server)
    while not signals.stop.is_set():
        await signals.next(_RELOAD_EVERY_S)
        certificates.look()
        stamp = _stamp(path)
        if path is None or not (signals.take_reload() or stamp != seen):
            continue
        seen = stamp
        try:
            await server.reload(load_config(Path(path)))
        except Exception as error:  # whatever a file holds, the proxy goes on
            server.metrics.count("dpsr_proxy_config_reloads_total", ("refused",))
            _say(f"dpsr proxy: {error}; keeping the last good configuration")
        else:
            server.metrics.count("dpsr_proxy_config_reloads_total", ("ok",))
            _say(f"dpsr proxy: {path}: configuration reloaded")
    signals.forget()
    await server.stop(settings.drain_s)


class _Certificates:
    """Lets a server look for new certificates, and says what became of them."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._problem = ""
        self._said = False

    def look(self) -> None:
        """Looks once. Says a problem when it meets it again: key and certificate may be replaced one by one."""
        problem = ""
        try:
            for name in self._server.renew_certificates():
                self._server.metrics.count("dpsr_proxy_config_reloads_total", ("ok",))
                _say(f"dpsr proxy: {name}: new connections use the renewed certificates")
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}"
        if problem != self._problem:
            self._problem, self._said = problem, False
        elif problem and not self._said:
            self._said = True
            self._server.metrics.count("dpsr_proxy_config_reloads_total", ("refused",))
            _say(f"dpsr proxy: {problem}; keeping the old certificates")


def _stamp(path: str | None) -> Stamp:
    if path is None:
        return None
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _reserve(host: str, port: int) -> socket.socket:
    """Binds a socket that keeps the port for the workers but does not listen. Raises CommandError if it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        if port:
            # The probe has no SO_REUSEPORT, so that it fails where the workers of another proxy share the port.
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
                probe.listen()
        reserved = socket.socket(family)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind((host, port))
    except OSError as error:
        raise CommandError(
            f"cannot listen on {join_address(host, port)}: is the port in use, or is the host not an address of this "
            "machine?"
        ) from error
    return reserved


class _Worker:
    """A child process that serves on the shared port."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._lock = asyncio.Lock()
        self._reports = 0  # number of the last report that was asked for

    async def start(self) -> None:
        """Starts the worker and waits until it serves. Raises CommandError."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                "from dpsr_serving.proxy.workers import run_worker; run_worker()",
                json.dumps(dataclasses.asdict(self._settings)),
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
            )
        reader, writer = await asyncio.open_connection(sock=ours, limit=2**26)
        line = await reader.readline()
        message = json.loads(line) if line else {"error": f"a worker ended with status {await self._process.wait()}"}
        if "error" in message:
            writer.close()
            await self._process.wait()
            raise CommandError(message["error"])
        self._reader, self._writer = reader, writer

    async def keep(self) -> None:
        """Starts the worker again whenever it ends."""
        while True:
            assert self._process is not None
            status = await self._process.wait()
            _say(f"dpsr proxy: a worker ended with status {status}; starting another")
            await asyncio.sleep(_RESTART_S)
            if self._writer is not None:
                self._writer.close()
            self._reader = self._writer = None
            try:
                await self.start()
            except (CommandError, OSError) as error:  # OSError: the machine lacks memory, processes or open files
                _say(f"dpsr proxy: {error}")

    async def report(self) -> tuple[bool, str]:
        """Returns whether the worker takes requests, and its metrics; (False, "[]") if it does not answer."""
        async with self._lock:
            if self._reader is None or self._writer is None:
                return False, "[]"
            self._reports += 1
            try:
                self._writer.write(b"%d\n" % self._reports)
                return await asyncio.wait_for(_read_report(self._reader, self._reports), _REPORT_S)
            except (asyncio.TimeoutError, OSError, ValueError):
                return False, "[]"

    def signal(self, number: int) -> None:
        """Sends the worker a signal."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def wait(self) -> None:
        """Waits until the worker has ended."""
        if self._process is not None:
            await self._process.wait()


async def _read_report(reader: asyncio.StreamReader, number: int) -> tuple[bool, str]:
    """Returns the report of this number; skips late answers to earlier ones. Raises ValueError at the stream's end."""
    while True:
        answered, ready, dump = json.loads(await reader.readline())
        if answered == number:
            return bool(ready), str(dump)


async def _listen_http(settings: Settings, report: Report, address: str) -> Any:
    """Prints the ready line and starts the HTTP port, if one is wanted. Raises CommandError if it cannot listen."""
    if settings.http_port is None:
        print(f"proxy ready on {address}", flush=True)
        return contextlib.ExitStack()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5.0)
            method, _, rest = head.split(b"\r\n", 1)[0].partition(b" ")
            status, body = await _page(rest.split(b" ")[0].split(b"?")[0].decode("latin-1"), report)
            if method not in (b"GET", b"HEAD"):
                status, body = "405 Method Not Allowed", "only GET and HEAD are allowed\n"
            content = body.encode()
            kind = "text/plain; version=0.0.4; charset=utf-8"
            fields = f"Content-Type: {kind}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
            writer.write(f"HTTP/1.1 {status}\r\n{fields}".encode() + (b"" if method == b"HEAD" else content))
            await asyncio.wait_for(writer.drain(), 5.0)
        writer.close()

    try:
        server = await asyncio.start_server(answer, settings.host, settings.http_port)
    except OSError as error:
        raise CommandError(
            f"cannot listen on {join_address(settings.host, settings.http_port)} for HTTP: {error.strerror}"
        ) from error
    bound = server.sockets[0].getsockname()[1]
    print(f"proxy ready on {address}")
    print(f"proxy HTTP on {join_address(settings.host, bound)}", flush=True)
    return server


async def _page(path: str, report: Report) -> tuple[str, str]:
    if path == "/healthz":
        return "200 OK", "ok\n"
    if path == "/readyz":
        ready = any(ready for ready, _ in await report())
        return ("200 OK", "ready\n") if ready else ("503 Service Unavailable", "not ready\n")
    if path == "/metrics":
        return "200 OK", merge(dump for _, dump in await report())
    return "404 Not Found", "the pages are /healthz, /readyz and /metrics\n"
