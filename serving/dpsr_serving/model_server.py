"""`dpsr serve`: starts the model server on a servable."""

from __future__ import annotations

import atexit
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from absl import flags

from dpsr_common.errors import CommandError, UsageError
from dpsr_serving.addresses import define_listen_flags, join_address

BINARY = Path(__file__).parent / "bin" / "dpsr_model_server"
OP_LIBRARY_GROUP = "dpsr.op_libraries"

PASS_UNKNOWN_FLAGS = True
USAGE = f"""
Usage: dpsr serve --model_base_path=DIR [--model_name=NAME] [--host=127.0.0.1] [--port=8500] [--flag=value ...]
       dpsr serve --model_config_file=FILE [--host=127.0.0.1] [--port=8500] [--flag=value ...]

Serves models over TensorFlow Serving's gRPC API and, with --rest_api_port=PORT, its REST API.
DIR holds the versions of one model: SavedModels in subdirectories named by numbers. FILE lists several models, as a
ModelServerConfig in text form.
All other flags are passed to the model server. This command lists them: {BINARY} --help
"""

# The server prints the same line as TensorFlow Serving when it is ready. The line names the port, also for --port=0.
_READY = re.compile(rb"Running gRPC ModelServer at \S*:(\d+)")

# Runs in the child before the server starts: asks the kernel to end the child when its parent ends for any reason.
# `preexec_fn` would be the usual place, but it runs after a fork and can deadlock with the parent's gRPC threads.
_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string(
        "model_base_path",
        None,
        "directory that holds the versions of one model, in subdirectories named by numbers",
        flag_values=values,
    )
    flags.DEFINE_string("model_name", "default", "name of the model in requests", flag_values=values)
    flags.DEFINE_string(
        "model_config_file",
        None,
        "file that lists several models, a ModelServerConfig in text form. Replaces --model_base_path",
        flag_values=values,
    )
    define_listen_flags(values, 8500)
    flags.DEFINE_list(
        "op_library",
        None,
        f"comma-separated libraries of custom ops. The default is all that installed packages register "
        f"({OP_LIBRARY_GROUP})",
        flag_values=values,
    )


def run(values: flags.FlagValues, arguments: list[str]) -> NoReturn:
    """Replaces this process by the model server, to which `arguments` are passed as further flags.

    Raises:
        UsageError: a flag is wrong.
        CommandError: the server cannot start.
    """
    if not values.model_base_path and not values.model_config_file:
        raise UsageError(
            "no model to serve; give the directory of its versions with --model_base_path=DIR, or a list of models "
            "with --model_config_file=FILE"
        )
    if values.model_base_path and values.model_config_file:
        raise UsageError("--model_base_path cannot be combined with --model_config_file; give one of them")
    if values.model_config_file:
        models = [f"--model_config_file={os.path.abspath(values.model_config_file)}"]
    else:
        models = _one_model(values.model_base_path, values.model_name)
    server = _server_command(models, values.host, values.port, values.op_library, arguments)
    sys.stdout.flush()
    os.execve(server[0], server, _environment())


class ModelServer:
    """A model server that runs as a child of this process and ends with it. A context manager that stops the server.

    start_model_server() makes one.

    Attributes:
        process: the child process.
        port: the port that the server listens on.
        target: "host:port", the address for clients.
    """

    def __init__(self, command_line: Sequence[str]) -> None:
        # The file has no name, so that nothing is left behind however this process ends.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (stop() closes it)
        self.process = subprocess.Popen(
            command_line, env=_environment(), stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT
        )
        self.port = 0
        self.target = ""
        atexit.register(self.stop)

    def __enter__(self) -> ModelServer:
        """Returns the server itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stops the server."""
        self.stop()

    def output(self) -> str:
        """Returns what the server has printed so far, or "" after stop()."""
        if self._log.closed:
            return ""
        descriptor = self._log.fileno()
        # pread() leaves the file offset alone: both processes share it, and the server writes there.
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode("utf-8", "replace")

    def stop(self, timeout_s: float = 10.0) -> int:
        """Ends the server, killing it after `timeout_s` seconds, and returns its exit status. May be called again."""
        atexit.unregister(self.stop)
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self._log.close()
        return self.process.wait()


def start_model_server(
    base_path: str | os.PathLike[str],
    model_name: str,
    port: int = 0,
    *,
    host: str = "127.0.0.1",
    op_libraries: Sequence[str | os.PathLike[str]] | None = None,
    arguments: Sequence[str] = (),
    timeout_s: float = 120.0,
) -> ModelServer:
    """Starts a model server and waits until it serves the model.

    Args:
        base_path: directory that holds the model's versions.
        model_name: name of the model in requests.
        port: port to listen on; 0 chooses a free port.
        host: address to listen on.
        op_libraries: libraries of custom ops; None means all that installed packages register.
        arguments: further flags of the model server.
        timeout_s: seconds that loading the model may take.

    Raises:
        CommandError: the server cannot start, ends, or is not ready in time. The message quotes its last lines.
    """
    server = _server_command(_one_model(base_path, model_name), host, port, op_libraries, arguments)
    if threading.current_thread() is threading.main_thread():
        # Only from the main thread: the kernel ends the child when the thread that started it ends, not the process.
        server = [sys.executable, "-I", "-S", "-c", _WITH_PARENT, str(os.getpid()), *server]
    handle = ModelServer(server)
    try:
        handle.port = _wait_until_ready(handle, timeout_s)
    except BaseException:
        handle.stop()
        raise
    handle.target = join_address(host, handle.port)
    return handle


def registered_op_libraries() -> list[str]:
    """Returns the paths of the op libraries that installed packages register in the entry point group.

    Each entry point of the group dpsr.op_libraries is a function without arguments that returns a path.

    Raises:
        CommandError: a package registers a library that does not exist.
    """
    libraries = {}
    for entry in importlib.metadata.entry_points(group=OP_LIBRARY_GROUP):
        try:
            libraries[os.fspath(entry.load()())] = entry.value
        except (ImportError, AttributeError, OSError) as error:
            raise CommandError(
                f"cannot find the op library that {entry.value} provides: {error}; name the libraries with --op_library"
            ) from error
    for path, provider in libraries.items():
        if not os.path.isfile(path):
            raise CommandError(
                f"the op library {path} of {provider} is not built; run `make setup`, or name the libraries with "
                "--op_library"
            )
    return sorted(libraries)


def _one_model(base_path: str | os.PathLike[str], model_name: str) -> list[str]:
    """Returns the server's flags for one model. Raises CommandError if its directory has no version."""
    path = os.fspath(base_path)
    # A URI names a file system that only TensorFlow can read.
    if "://" not in path:
        path = os.path.abspath(path)
        _check_versions(path)
    return [f"--model_base_path={path}", f"--model_name={model_name}"]


def _server_command(
    models: Sequence[str],
    host: str,
    port: int,
    op_libraries: Iterable[str | os.PathLike[str]] | None,
    arguments: Sequence[str],
) -> list[str]:
    """Returns the server's command line. Raises CommandError if the server or an op library is missing."""
    if not os.access(BINARY, os.X_OK):
        raise CommandError(f"the model server is not built ({BINARY} is missing); run `make setup`")
    if op_libraries is None:
        op_libraries = registered_op_libraries()
    libraries = [os.path.abspath(library) for library in op_libraries if os.fspath(library)]
    for library in libraries:
        if not os.path.isfile(library):
            raise CommandError(f"--op_library: no such file: {library}")
    server = [str(BINARY), *models, f"--host={host}", f"--port={port}"]
    if libraries:
        server.append(f"--op_library={','.join(libraries)}")
    return [*server, *arguments]


def _check_versions(path: str) -> None:
    try:
        children = sorted(os.listdir(path))
    except OSError as error:
        raise CommandError(f"--model_base_path: {path}: {error.strerror}; give the directory of the versions") from None
    if not any(child.isdecimal() and os.path.isdir(os.path.join(path, child)) for child in children):
        hint = "; it is a version itself: give its parent" if "saved_model.pb" in children else ""
        raise CommandError(
            f"--model_base_path: {path} has no version: expected a child directory named by a number, "
            f"such as {os.path.join(path, '1')}{hint}"
        )


def _environment() -> Mapping[str, str]:
    """Returns this process's environment plus FAISS_LIBRARY, by which the retrieval op finds this Python's FAISS."""
    environment = dict(os.environ)
    if "FAISS_LIBRARY" not in environment:
        spec = importlib.util.find_spec("faiss")
        library = Path(spec.origin).with_name("libfaiss.so") if spec is not None and spec.origin else None
        if library is not None and library.is_file():
            environment["FAISS_LIBRARY"] = str(library)
    return environment


def _wait_until_ready(handle: ModelServer, timeout_s: float) -> int:
    """Waits until the server prints its ready line, and returns the port that the line names."""
    deadline = time.monotonic() + timeout_s
    while True:
        # Before reading the output, so that the output of a server that has ended is complete.
        status = handle.process.poll()
        ready = _READY.search(handle.output().encode())
        if ready and status is None:
            return int(ready[1])
        if status is not None:
            problem = f"the model server ended with exit status {status}"
        elif time.monotonic() > deadline:
            problem = f"the model server was not ready within {timeout_s:g} s"
        else:
            time.sleep(0.02)
            continue
        lines = handle.output().strip().splitlines()[-8:]
        raise CommandError(f"{problem}; its last lines:\n" + "\n".join(lines))
