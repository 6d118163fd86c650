"""`dpsr launch`: trains on a cluster of processes on this machine.

What a cluster manager does elsewhere: gives each process its TF_CONFIG, starts again those that were killed (training
goes on: a worker picks up where the others are, a parameter server's variables come back from the last checkpoint),
ends the parameter servers, which never end by themselves, once the work is done, and passes on the first failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import IO

from absl import flags

from dpsr_common.errors import CommandError, UsageError
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.training import train
from dpsr_tf.training.validation import Validation

USAGE = """
Usage: dpsr launch --workers=N --ps=N --store=STORE --out=MODEL [--config=FILE] [--set=KEY=VALUE ...]

Runs `dpsr train` as a cluster of processes on this machine: N workers (the first is the chief), N parameter servers,
and an evaluator where the config asks for validation. A process that is killed is started again.
"""

REQUIRED_FLAGS = train.REQUIRED_FLAGS

# Seconds a process has to end after SIGTERM.
_GRACE = 15.0
_POLL = 0.2
# Seconds between the lines that stand for a progress bar.
_PROGRESS = 10.0


def define_flags(values: flags.FlagValues) -> None:
    """Flags of `dpsr launch`: those of `dpsr train`, and what the cluster is made of."""
    train.define_flags(values)
    flags.DEFINE_integer("workers", 2, "training processes, the chief among them", 1, flag_values=values)
    flags.DEFINE_integer("ps", 1, "parameter servers", 1, flag_values=values)
    flags.DEFINE_integer("max_restarts", 10, "times that killed processes are started again", 0, flag_values=values)


def run(values: flags.FlagValues, arguments: list[str]) -> int:
    """Runs `dpsr launch`."""
    if "TF_CONFIG" in os.environ:
        raise UsageError(
            "TF_CONFIG is set, but `dpsr launch` makes one for each process; unset it, or run `dpsr train`"
        )
    # What is wrong with flags, store, config or model is said here, once, before there is any process.
    store, config = train.read_flags(values)
    model = ModelDirectory.create_or_resume(values.out, config, store)
    tasks = [("ps", i) for i in range(values.ps)] + [("chief", 0)]
    tasks += [("worker", i) for i in range(values.workers - 1)]
    if config.validation.queries:
        Validation(model, store, config)
        tasks.append(("evaluator", 0))
    command = ["train", f"--store={values.store}", f"--out={values.out}", *(f"--set={value}" for value in values.set)]
    if values.config:
        command.append(f"--config={values.config}")
    with _ended_by_signals(), _Processes(tasks, command, values.max_restarts) as processes:
        return processes.run()


class _Failed(CommandError):
    """A process of the cluster has failed."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class _Processes:
    """The cluster's processes. On leaving the block none of them is left."""

    def __init__(self, tasks: list[tuple[str, int]], arguments: list[str], max_restarts: int):
        self._arguments, self._restarts_left = arguments, max_restarts
        ports = free_ports(len(tasks))
        self._cluster: dict[str, list[str]] = {}
        for (kind, _), port in zip(tasks, ports, strict=True):
            if kind == "evaluator":  # nobody connects to it
                continue
            self._cluster.setdefault(kind, []).append(f"127.0.0.1:{port}")
        self._tasks = tasks
        self._running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
        self._printers: list[threading.Thread] = []

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *error: object) -> None:
        self._end(list(self._running))
        for printer in self._printers:
            printer.join()

    def run(self) -> int:
        """Until every worker is done (0), or one has failed (its status)."""
        for task in self._tasks:
            self._start(task)
        while any(kind != "ps" for kind, _ in self._running):
            time.sleep(_POLL)
            for task in list(self._running):
                status = self._running[task].poll()
                if status is None:
                    continue
                del self._running[task]
                if status == 0 and task[0] != "ps":
                    continue
                # A command that failed has said why, and would fail again; what was killed, or lost a process that was,
                # deserves another try.
                if status > 0 and status != train.LostError.status:
                    self._end(list(self._running))
                    raise _Failed(f"{_name(task)} ended with status {status}; its message stands above", status)
                if self._restarts_left == 0:
                    raise CommandError(f"{_name(task)} was ended by {_cause(status)}, and --max_restarts is used up")
                self._restarts_left -= 1
                print(f"launch: {_name(task)} was ended by {_cause(status)}, starting it again", flush=True)
                self._start(task)
        return 0

    def _start(self, task: tuple[str, int]) -> None:
        kind, index = task
        config = {"cluster": self._cluster, "task": {"type": kind, "index": index}}
        command = [sys.executable, "-m", "dpsr_common", *self._arguments]
        if (setpriv := shutil.which("setpriv")) is not None:  # a launcher that is killed takes its processes along
            command = [setpriv, "--pdeathsig", "KILL", *command]
        process = subprocess.Popen(
            command,
            env={**os.environ, "TF_CONFIG": json.dumps(config)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us to pass on
        )
        self._running[task] = process
        assert process.stdout is not None
        printer = threading.Thread(target=_print_lines, args=(_name(task), process.stdout), daemon=True)
        printer.start()
        self._printers.append(printer)

    def _end(self, tasks: list[tuple[str, int]]) -> None:
        processes = [self._running.pop(task) for task in tasks]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + _GRACE
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _print_lines(name: str, stream: IO[bytes]) -> None:
    """Passes on what a process prints, a line at a time; of a progress bar a line every few seconds, and its last."""
    rest, next_progress = b"", time.monotonic() + _PROGRESS
    while data := os.read(stream.fileno(), 1 << 16):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            _print_line(name, line)
        if b"\r" in rest and time.monotonic() >= next_progress:
            next_progress = time.monotonic() + _PROGRESS
            _print_line(name, rest)
            rest = b""
    _print_line(name, rest)
    stream.close()


def _print_line(name: str, line: bytes) -> None:
    text = line.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2].strip()
    if text:
        # One write: lines of several processes do not run into one another.
        sys.stdout.write(f"{name}: {text}\n")
        sys.stdout.flush()


def _name(task: tuple[str, int]) -> str:
    return f"{task[0]} {task[1]}"


def _cause(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"itself, with status {status}"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, found all at once so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM leaves the block by an exception, so that its processes are ended."""

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
