"""Network addresses, "host:port"."""

from __future__ import annotations

import re
from typing import Any

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
