"""Network addresses, "host:port", and the flags that say where a command listens."""

from __future__ import annotations

import re
from typing import Any

from absl import flags

from dpsr_common.errors import UsageError

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):([0-9]{1,5})")


def check_address(key: str, value: Any) -> str:
    """Returns `value` if it is "host:port", else raises UsageError that names `key`."""
    match = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if match is None or not 0 < int(match[2]) < 65536:
        raise UsageError(f"{key}: got {value!r}, expected host:port with a port from 1 to 65535")
    return str(value)


def join_address(host: str, port: int) -> str:
    """Returns "host:port" as gRPC expects it, with an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def define_listen_flags(values: flags.FlagValues, port: int) -> None:
    """Defines the flags --host and --port of a command that listens; `port` is the default."""
    flags.DEFINE_string(
        "host",
        "127.0.0.1",
        "address to listen on. 0.0.0.0 listens on all addresses of this machine",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "port", port, "port to listen on. 0 chooses a free port", lower_bound=0, upper_bound=65535, flag_values=values
    )
