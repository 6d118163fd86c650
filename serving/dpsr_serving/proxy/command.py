"""`dpsr proxy`: starts the proxy."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from absl import flags

from dpsr_serving.addresses import check_address
from dpsr_serving.errors import CommandError, UsageError
from dpsr_serving.proxy.config import ProxyConfig, load_config

USAGE = """
Usage: dpsr proxy --config=proxy.yaml [--host=127.0.0.1] [--port=8600]
       dpsr proxy --backend=host:port [--host=127.0.0.1] [--port=8600]

Speaks TensorFlow Serving's gRPC API and sends each request on to a server that holds its model:

  models:
    demo: {backends: ["10.0.0.1:8500", "10.0.0.2:8500"]}
  default: {backends: ["10.0.0.3:8500"]}

SIGTERM drains: no new calls, those in flight may end. A second one ends at once.
"""


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("config", None, "YAML file with the backends of each model.", flag_values=values)
    flags.DEFINE_string("backend", None, "host:port of the one server that holds all models.", flag_values=values)
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all.", flag_values=values)
    flags.DEFINE_integer(
        "port", 8600, "Port to listen on; 0 takes a free one.", lower_bound=0, upper_bound=65535, flag_values=values
    )
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
    if values.config is not None:
        config = load_config(Path(values.config))
    else:
        config = ProxyConfig({}, (check_address("--backend", values.backend),))
    # gRPC logs a failed bind in its own words, beside our one line. It reads this when it is first imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    asyncio.run(_serve(config, values.host, values.port, values.drain_s))


async def _serve(config: ProxyConfig, host: str, port: int, drain_s: float) -> None:
    from dpsr_serving.proxy.server import ProxyServer  # imports gRPC: see above

    server = ProxyServer(config)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, stopping.set)
    try:
        address = await server.start(host, port)
    except OSError as error:
        await server.stop(0)
        raise CommandError(f"{error}: is the port in use, or the host not one of this machine?") from error
    print(f"proxy ready on {address}", flush=True)
    await stopping.wait()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(signal_number)
    await server.stop(drain_s)
