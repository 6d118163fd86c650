"""`dpsr proxy`: starts the proxy in front of model servers."""

from __future__ import annotations

import asyncio
import os
import resource

from absl import flags

from dpsr_common.errors import UsageError
from dpsr_serving.addresses import define_listen_flags
from dpsr_serving.proxy import workers
from dpsr_serving.proxy.config import check_backend

USAGE = """
Usage: dpsr proxy --config=proxy.yaml [--host=127.0.0.1] [--port=8600] [--http_port=8601] [--workers=N]
       dpsr proxy --backend=host:port [--host=127.0.0.1] [--port=8600]

Speaks TensorFlow Serving's gRPC API and forwards each request to a model server that holds the model:

  models:
    demo: {backends: ["10.0.0.1:8500", "10.0.0.2:8500"]}
  default: {backends: ["10.0.0.3:8500"]}

`default` serves all models that are not listed. docs/proxy.md explains every key.
The proxy reads the file again when it changes, or on SIGHUP. It refuses a file with errors and keeps the last good one.
The HTTP port serves /healthz, /readyz and, for Prometheus, /metrics.
On SIGTERM the proxy accepts no new calls and lets calls in flight finish. A second SIGTERM ends it at once.
"""


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string(
        "config", None, "YAML file that lists the backends (model servers) of each model", flag_values=values
    )
    flags.DEFINE_string(
        "backend",
        None,
        "host:port of a single model server that holds all models, or dns:NAME:PORT for all addresses of a name. "
        "Replaces --config",
        flag_values=values,
    )
    define_listen_flags(values, 8600)
    flags.DEFINE_string(
        "unix_socket", None, "path of a UNIX socket to listen on in addition to the port", flag_values=values
    )
    flags.DEFINE_integer(
        "http_port",
        None,
        "port for /healthz, /readyz and /metrics. 0 chooses a free port. Without the flag there is no HTTP port",
        lower_bound=0,
        upper_bound=65535,
        flag_values=values,
    )
    flags.DEFINE_integer("workers", 1, "number of processes that share the port", lower_bound=1, flag_values=values)
    flags.DEFINE_float(
        "drain_s", 30.0, "seconds that calls in flight may still take after SIGTERM", lower_bound=0, flag_values=values
    )


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        UsageError: a flag or the configuration is wrong.
        CommandError: the proxy cannot listen.
    """
    if arguments:
        raise UsageError(f"unexpected argument {arguments[0]!r}")
    if (values.config is None) == (values.backend is None):
        missing = values.config is None
        raise UsageError(
            "neither --config nor --backend is given; give one of them"
            if missing
            else "--config and --backend cannot be combined; give one of them"
        )
    if not values.host:
        raise UsageError("--host must not be empty")
    if values.unix_socket is not None and values.workers > 1:
        raise UsageError("--unix_socket cannot be combined with --workers above 1: only one process can own the socket")
    if values.backend is not None:
        check_backend("--backend", values.backend)
    settings = workers.Settings(
        config_path=None if values.config is None else os.path.abspath(values.config),
        backend=values.backend,
        host=values.host,
        port=values.port,
        unix_socket=values.unix_socket,
        drain_s=values.drain_s,
        http_port=values.http_port,
        workers=values.workers,
    )
    try:
        config, stamp = settings.load()
    except UsageError as error:
        raise UsageError(str(error).replace(settings.config_path or "", values.config or "", 1)) from None
    # Each connection is an open file. Many systems allow 1,024 unless a process asks for more. Workers inherit it.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if values.workers == 1:
        asyncio.run(workers.serve_alone(settings, config, stamp))
    else:
        asyncio.run(workers.serve_workers(settings))
