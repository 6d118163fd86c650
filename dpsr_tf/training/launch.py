"""`dpsr launch`: trains on a cluster of processes, on this machine or on a list of hosts.

It does the work of a cluster manager. It gives each process its TF_CONFIG and restarts processes that were killed:
a worker continues where the others are, and a parameter server's variables come back from the last checkpoint. When the
work is done it ends the parameter servers, which never end by themselves. It passes on the first failure.
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
from pathlib import Path
from typing import IO

from absl import flags

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.object_store import cached, is_remote
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.training import kubernetes, train
from dpsr_tf.training.ssh_hosts import SSH_FAILED, SshHosts
from dpsr_tf.training.validation import measure_of

USAGE = """
Usage: dpsr launch --workers=N --ps=N --store=STORE --out=MODEL [--config=FILE] [--set=KEY=VALUE ...]

Runs `dpsr train` as a cluster of processes: workers (the first one is the chief), parameter servers, and an evaluator
if the config asks for validation. Processes that are killed are restarted. They run on this machine or, with
--hosts=HOST,HOST,..., on these hosts, over ssh. With --kubernetes the command starts no process, and prints manifests
for `kubectl apply -f -`.
"""

REQUIRED_FLAGS = train.REQUIRED_FLAGS
REMOTE_PATHS = ("store", "warm_start")

# Seconds that a process has to end after SIGTERM.
_GRACE = 15.0
_POLL = 0.2
# Seconds between two starts over ssh. A server of ssh refuses some of many that come at once.
_BETWEEN_STARTS = 0.2
# Seconds between the printed lines of a progress bar.
_PROGRESS = 10.0


def define_flags(values: flags.FlagValues) -> None:
    """Flags of `dpsr launch`: the flags of `dpsr train`, the size of the cluster, and where it runs."""
    train.define_flags(values)
    flags.DEFINE_integer("workers", 2, "number of training processes, including the chief", 1, flag_values=values)
    flags.DEFINE_integer("ps", 1, "number of parameter servers", 1, flag_values=values)
    flags.DEFINE_integer(
        "max_restarts", 10, "number of restarts of killed processes, all processes together", 0, flag_values=values
    )
    flags.DEFINE_list(
        "hosts",
        [],
        "hosts for the processes, as ssh takes them: HOST or USER@HOST. All see store, config and model under the "
        "same paths, and so does this machine (default: this machine alone)",
        flag_values=values,
    )
    flags.DEFINE_string(
        "ssh", "ssh", "for --hosts, the command that reaches a host, such as 'ssh -F FILE'", flag_values=values
    )
    flags.DEFINE_string(
        "remote_python",
        sys.executable,
        "for --hosts, path of the Python on the hosts that DPSR is installed for; by default the path of this one",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "port",
        2222,
        "for --hosts, the port of the first process; each other one listens on the next. For --kubernetes, the port of "
        "all pods",
        1,
        65535,
        flag_values=values,
    )
    kubernetes.define_flags(values)


def run(values: flags.FlagValues, arguments: list[str]) -> int:
    """Runs `dpsr launch`."""
    if "TF_CONFIG" in os.environ:
        raise UsageError(
            "TF_CONFIG is set, but `dpsr launch` makes one for each process; unset it, or run `dpsr train`"
        )
    if values.kubernetes:
        sys.stdout.write(kubernetes.manifests(values, _command(values)))
        return 0
    # On other hosts, each process copies what it needs from an object store.
    command = _command(values)
    for name in REMOTE_PATHS:
        if values[name].value is not None and is_remote(values[name].value):
            values[name].value = str(cached(values[name].value))
    if not values.hosts:
        command = _command(values)
    tasks, hosts = _prepare(values)
    with _ended_by_signals(), _Processes(tasks, command, values.max_restarts, hosts) as processes:
        return processes.run()


def _prepare(values: flags.FlagValues) -> tuple[list[tuple[str, int]], SshHosts | None]:
    """Makes the model directory, and returns the processes and their hosts.

    Errors in flags, store, config or model are reported here, once, before any process starts.
    """
    store, config, _ = train.read_flags(values)
    own = train.examples_of(store, config)
    tasks = [("ps", i) for i in range(values.ps)] + [("chief", 0)]
    tasks += [("worker", i) for i in range(values.workers - 1)]
    if config.validation.queries:
        measure_of(store, config)
        tasks.append(("evaluator", 0))
    hosts = None
    if values.hosts:
        hosts = SshHosts.of_flags(values.hosts, values.ssh, values.remote_python, values.port, len(tasks))
    if values.overwrite or train.is_untrained(Path(values.out)):
        train.remove(Path(values.out))
    ModelDirectory.create_or_resume(values.out, config, store, train.numbers_of(store, config, own))
    return tasks, hosts


def _command(values: flags.FlagValues) -> list[str]:
    """Returns the arguments of `dpsr` in every process."""
    command = ["train", f"--store={values.store}", f"--out={values.out}", *(f"--set={value}" for value in values.set)]
    if values.config:
        command.append(f"--config={values.config}")
    if values.warm_start:
        command += [f"--warm_start={values.warm_start}", f"--warm_start_sums={values.warm_start_sums}"]
    return command


class _Failed(CommandError):
    """A process of the cluster failed, and so does the command, with the same status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class _Processes:
    """The processes of the cluster, as a context manager that ends all of them on leaving."""

    def __init__(
        self, tasks: list[tuple[str, int]], arguments: list[str], max_restarts: int, hosts: SshHosts | None = None
    ):
        self._arguments, self._restarts_left, self._hosts = arguments, max_restarts, hosts
        if hosts is None:
            addresses = [f"127.0.0.1:{port}" for port in free_ports(len(tasks))]
        else:
            addresses = [hosts.address(number) for number in range(len(tasks))]
        self._cluster: dict[str, list[str]] = {}
        for (kind, _), address in zip(tasks, addresses, strict=True):
            if kind == "evaluator":  # nobody connects to it
                continue
            self._cluster.setdefault(kind, []).append(address)
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
        """Runs until every worker is done. Raises CommandError if one fails."""
        for task in self._tasks:
            self._start(task)
            time.sleep(_BETWEEN_STARTS if self._hosts else 0)
        while any(kind != "ps" for kind, _ in self._running):
            time.sleep(_POLL)
            for task in list(self._running):
                status = self._running[task].poll()
                if status is None:
                    continue
                del self._running[task]
                if self._hosts is not None and status == SSH_FAILED:
                    self._end(list(self._running))
                    host = self._hosts.host(self._tasks.index(task))
                    raise _Failed(f"{_name(task)}: ssh to {host} failed; see its message above", 1)
                if self._hosts is not None and status > 128 and status != train.LostError.status:
                    status = 128 - status  # as the status of a process here that a signal ended
                if status == 0 and task[0] != "ps":
                    continue
                # A command that failed has said why and would fail again. A process that was killed, or that lost
                # another process, is restarted.
                if status > 0 and status != train.LostError.status:
                    self._end(list(self._running))
                    raise _Failed(f"{_name(task)} failed with status {status}; see its message above", status)
                if self._restarts_left == 0:
                    raise CommandError(
                        f"{_name(task)} was ended by {_cause(status)}, and no restart is left (--max_restarts)"
                    )
                self._restarts_left -= 1
                print(f"launch: {_name(task)} was ended by {_cause(status)}; restarting it", flush=True)
                self._start(task)
        return 0

    def _start(self, task: tuple[str, int]) -> None:
        kind, index = task
        config = {"cluster": self._cluster, "task": {"type": kind, "index": index}}
        environment = dict(os.environ)
        if self._hosts is None:
            command = [sys.executable, "-m", "dpsr_common", *self._arguments]
            environment["TF_CONFIG"] = json.dumps(config)
        else:
            command = self._hosts.command(self._tasks.index(task), config, self._arguments)
        # A launcher that is killed takes its processes along.
        if (setpriv := shutil.which("setpriv")) is not None:
            command = [setpriv, "--pdeathsig", "KILL", *command]
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL if self._hosts is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the launcher only, which ends its processes
        )
        self._running[task] = process
        assert process.stdout is not None
        printer = threading.Thread(target=_print_lines, args=(_name(task), process.stdout), daemon=True)
        printer.start()
        self._printers.append(printer)

    def _end(self, tasks: list[tuple[str, int]]) -> None:
        processes = [self._running.pop(task) for task in tasks]
        for process in processes:
            if process.stdin is not None:
                process.stdin.close()  # which ends the process on its host, and then ssh
            else:
                process.terminate()
        deadline = time.monotonic() + _GRACE
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _print_lines(name: str, stream: IO[bytes]) -> None:
    """Passes on what a process prints, line by line; of a progress bar, a line every few seconds and its last."""
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
        # One write, so that lines of several processes do not mix.
        sys.stdout.write(f"{name}: {text}\n")
        sys.stdout.flush()


def _name(task: tuple[str, int]) -> str:
    return f"{task[0]} {task[1]}"


def _cause(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"itself, with status {status}"


def free_ports(count: int) -> list[int]:
    """Returns free ports of this machine, found all at once so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turns SIGTERM into an exception inside the block, so that the processes are ended."""

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
