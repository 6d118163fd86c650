"""`dpsr search`: starts the search gateway, which joins an inverted index and models to one search."""

from __future__ import annotations

from absl import flags

from dpsr_common.errors import UsageError
from dpsr_serving.addresses import define_listen_flags

USAGE = """
Usage: dpsr search --config=search.yaml [--host=127.0.0.1] [--port=8700] [--grpc_port=8701] [--page]
"""


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("config", None, "YAML file of pipelines", flag_values=values)
    define_listen_flags(values, 8700)


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Serves until SIGTERM or SIGINT."""
    raise UsageError("is not there yet")
