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
from dpsr_serving.addresses import join_address

BINARY = Path(__file__).parent / "bin" / "dpsr_model_server"
OP_LIBRARY_GROUP = "dpsr.op_libraries"

PASS_UNKNOWN_FLAGS = True
USAGE = f"""
Usage: dpsr serve --model_base_path=DIR [--model_name=NAME] [--host=127.0.0.1] [--port=8500] [--flag=value ...]
       dpsr serve --model_config_file=FILE [--host=127.0.0.1] [--port=8500] [--flag=value ...]

Serves the SavedModel versions in DIR (its children named by numbers), or the models that the text ModelServerConfig in
FILE names, over TensorFlow Serving's gRPC API and, with --rest_api_port=PORT, its REST API.
Every other flag goes to the model server as it is; its own are listed by {BINARY} --help
"""

# The server announces itself with TensorFlow Serving's words; with port 0 they tell the port.
_READY = re.compile(rb"Running gRPC ModelServer at \S*:(\d+)")

# Runs in the child before the server does: asks the kernel to end it together with its parent, however that ends.
# Python would run such code in `preexec_fn` after a fork, which threads of the parent (gRPC's) can deadlock.
_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("model_base_path", None, "Directory with the model's versions.", flag_values=values)
    flags.DEFINE_string("model_name", "default", "Name that requests call the model by.", flag_values=values)
    flags.DEFINE_string(
        "model_config_file", None, "Text file with many models, instead of a base path.", flag_values=values
    )
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all.", flag_values=values)
    flags.DEFINE_integer(
        "port", 8500, "Port to listen on; 0 takes a free one.", lower_bound=0, upper_bound=65535, flag_values=values
    )
    flags.DEFINE_list(
        "op_library",
        None,
        f"Libraries of custom ops; by default those that installed packages register ({OP_LIBRARY_GROUP}).",
        flag_values=values,
    )


def run(values: flags.FlagValues, arguments: list[str]) -> NoReturn:
    """Becomes the model server; `arguments` are further flags of it.

    Raises:
        CommandError: the server cannot start; UsageError for the flags.
    """
    if not values.model_base_path and not values.model_config_file:
        raise UsageError(
            "no model to serve; give the directory of its versions with --model_base_path=DIR, or a list of models "
            "with --model_config_file=FILE"
        )
    if values.model_base_path and values.model_config_file:
        raise UsageError("give either --model_base_path or --model_config_file")
    if values.model_config_file:
        models = [f"--model_config_file={os.path.abspath(values.model_config_file)}"]
    else:
        models = _one_model(values.model_base_path, values.model_name)
    server = _server_command(models, values.host, values.port, values.op_library, arguments)
    sys.stdout.flush()
    os.execve(server[0], server, _environment())


class ModelServer:
    """A model server that runs as a child of this process and ends with it; see start_model_server. A context manager.

    Attributes:
        process: the child.
        port: the port that it listens on.
        target: "host:port", for clients.
    """

    def __init__(self, command_line: Sequence[str]) -> None:
        # A file without a name: nothing is left behind, however this process ends.
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
        """What the server has printed so far; nothing after stop()."""
        if self._log.closed:
            return ""
        descriptor = self._log.fileno()
        # pread: the server writes at the offset that both processes share.
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode("utf-8", "replace")

    def stop(self, timeout_s: float = 10.0) -> int:
        """Ends the server, politely for `timeout_s` seconds; may be called again. Returns its exit status."""
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
    """Starts a model server and waits until it answers.

    Args:
        base_path: directory with the model's versions.
        model_name: name that requests call the model by.
        port: port to listen on; 0 takes a free one.
        host: address to listen on.
        op_libraries: libraries of custom ops; None means those that installed packages register.
        arguments: further flags of the model server.
        timeout_s: how long loading the model may take, seconds.

    Raises:
        CommandError: it cannot start, ended, or is not ready in time; with the last that it printed.
    """
    server = _server_command(_one_model(base_path, model_name), host, port, op_libraries, arguments)
    if threading.current_thread() is threading.main_thread():
        # Not from other threads: the kernel would end the server with the thread, not with the process.
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
    """The op libraries of installed packages: what the functions in the entry point group dpsr.op_libraries return.

    Raises:
        CommandError: a package names a library that is not there.
    """
    libraries = {}
    for entry in importlib.metadata.entry_points(group=OP_LIBRARY_GROUP):
        try:
            libraries[os.fspath(entry.load()())] = entry.value
        except (ImportError, AttributeError, OSError) as error:
            raise CommandError(
                f"cannot find the op library that {entry.value} provides: {error}; give --op_library yourself"
            ) from error
    for path, provider in libraries.items():
        if not os.path.isfile(path):
            raise CommandError(
                f"the op library {path} of {provider} is not built; run `make setup`, or give --op_library yourself"
            )
    return sorted(libraries)


def _one_model(base_path: str | os.PathLike[str], model_name: str) -> list[str]:
    """The server's flags for the versions in a directory. Raises CommandError where there are none."""
    path = os.fspath(base_path)
    if "://" not in path:  # not a file system that only TensorFlow reads
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
    """The server's command line. Raises CommandError for what the user can mend before anything starts."""
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
    """This process's, with the FAISS library of this Python environment, which the retrieval op looks for."""
    environment = dict(os.environ)
    if "FAISS_LIBRARY" not in environment:
        spec = importlib.util.find_spec("faiss")
        library = Path(spec.origin).with_name("libfaiss.so") if spec is not None and spec.origin else None
        if library is not None and library.is_file():
            environment["FAISS_LIBRARY"] = str(library)
    return environment


def _wait_until_ready(handle: ModelServer, timeout_s: float) -> int:
    """Waits for the line that tells the port, and returns it."""
    deadline = time.monotonic() + timeout_s
    while True:
        status = handle.process.poll()  # before reading: what it printed last is then complete
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
        raise CommandError(f"{problem}; it said last:\n" + "\n".join(lines))
