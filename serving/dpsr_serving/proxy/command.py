"""`dpsr proxy`: starts the proxy in front of model servers."""

from __future__ import annotations

import asyncio
import os

from absl import flags

from dpsr_common.errors import UsageError
from dpsr_serving.addresses import check_address
from dpsr_serving.proxy import workers

USAGE = """
Usage: dpsr proxy --config=proxy.yaml [--host=127.0.0.1] [--port=8600] [--http_port=8601] [--workers=N]
       dpsr proxy --backend=host:port [--host=127.0.0.1] [--port=8600]

Speaks TensorFlow Serving's gRPC API and sends each request on to a server that holds its model:

  models:
    demo: {backends: ["10.0.0.1:8500", "10.0.0.2:8500"]}
  default: {backends: ["10.0.0.3:8500"]}

The file may change while the proxy runs; a bad one is refused, and the one before stays. docs/proxy.md has every key.
The HTTP port has /healthz, /readyz and Prometheus' /metrics.
SIGTERM drains: no new calls, those in flight may end. A second one ends at once. SIGHUP reads the file again.
"""


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("config", None, "YAML file with the backends of each model.", flag_values=values)
    flags.DEFINE_string("backend", None, "host:port of the one server that holds all models.", flag_values=values)
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all.", flag_values=values)
    flags.DEFINE_integer(
        "port", 8600, "Port to listen on; 0 takes a free one.", lower_bound=0, upper_bound=65535, flag_values=values
    )
    flags.DEFINE_string("unix_socket", None, "Path of a UNIX socket to listen on as well.", flag_values=values)
    flags.DEFINE_integer(
        "http_port",
        None,
        "Port for /healthz, /readyz and /metrics; 0 takes a free one, without it there is none.",
        lower_bound=0,
        upper_bound=65535,
        flag_values=values,
    )
    flags.DEFINE_integer("workers", 1, "Processes that share the port.", lower_bound=1, flag_values=values)
    flags.DEFINE_float(
        "drain_s", 30.0, "Seconds that calls in flight may take after SIGTERM.", lower_bound=0, flag_values=values
    )


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        CommandError: it cannot listen; UsageError for flags and configuration.
    """
    if arguments:
        raise UsageError(f"unexpected argument {arguments[0]!r}")
    if (values.config is None) == (values.backend is None):
        raise UsageError("give either --config or --backend")
    if not values.host:
        raise UsageError("--host must not be empty")
    if values.unix_socket is not None and values.workers > 1:
        raise UsageError("--unix_socket: a socket has one process; leave out --workers, or the socket")
    if values.backend is not None:
        check_address("--backend", values.backend)
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
        config = settings.load()
    except UsageError as error:
        raise UsageError(str(error).replace(settings.config_path or "", values.config or "", 1)) from None
    if values.workers == 1:
        asyncio.run(workers.serve_alone(settings, config))
    else:
        asyncio.run(workers.serve_workers(settings))
