"""Where a request goes: reading its model spec out of the bytes, and choosing one of the model's backends.

Plain functions on plain data; the server beside them moves the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from google.protobuf.message import DecodeError

from dpsr_serving import apis

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5


class Loaded(Protocol):
    """Something with a number of requests that it has not answered yet."""

    outstanding: int


L = TypeVar("L", bound=Loaded)


def model_spec_path(request: Any) -> tuple[int, ...] | None:
    """The field numbers that lead to the model spec in a message of this descriptor; None where there is none.

    MultiInference has a spec in each of its tasks, which all have to name one model: the first stands for all.
    """
    fields = request.fields_by_name
    if "model_spec" in fields:
        return (fields["model_spec"].number,)
    if "tasks" in fields:
        return (fields["tasks"].number, fields["tasks"].message_type.fields_by_name["model_spec"].number)
    return None


def read_model_spec(request: bytes, path: tuple[int, ...]) -> Any:
    """Reads the ModelSpec at `path` of a serialized request, without decoding the tensors around it.

    Returns:
        The message, or None where the request has none.

    Raises:
        ValueError: the bytes are not a protocol buffer message.
    """
    message = request
    for step, field in enumerate(path):
        last = step == len(path) - 1
        occurrences = _submessages(message, field)
        if not occurrences:
            return None
        # A message given in several pieces means their merge, which is what their concatenation parses to. Of a
        # repeated field (the steps before the last), the pieces are elements, and the first counts.
        message = b"".join(occurrences) if last else occurrences[0]
    try:
        return apis.ModelSpec.FromString(message)
    except DecodeError as error:
        raise ValueError(f"broken model spec: {error}") from error


def least_outstanding(backends: Sequence[L], turn: int) -> L:
    """The backend with the fewest unanswered requests; among equals `turn` decides, so that idle ones take turns."""
    count = len(backends)
    return min((backends[(turn + step) % count] for step in range(count)), key=lambda backend: backend.outstanding)


def _submessages(message: bytes, wanted: int) -> list[bytes]:
    """All occurrences of the length-delimited field `wanted`. Raises ValueError where the bytes are no message."""
    found = []
    offset, size = 0, len(message)
    while offset < size:
        tag, offset = _read_varint(message, offset)
        field, wire_type = tag >> 3, tag & 7
        start = offset
        if wire_type == _LENGTH_DELIMITED:
            length, start = _read_varint(message, offset)
            offset = start + length
        elif wire_type == _VARINT:
            _, offset = _read_varint(message, offset)
        elif wire_type == _FIXED64:
            offset += 8
        elif wire_type == _FIXED32:
            offset += 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {start}")
        if field == 0 or offset > size:
            raise ValueError(f"a field that is cut off or has number 0 at byte {start}")
        if field == wanted and wire_type == _LENGTH_DELIMITED:
            found.append(message[start:offset])
    return found


def _read_varint(message: bytes, offset: int) -> tuple[int, int]:
    """The varint at `offset` and the offset after it."""
    value = 0
    for shift in range(0, 70, 7):
        if offset >= len(message):
            raise ValueError("a number that is cut off")
        byte = message[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
    raise ValueError(f"a number of more than 10 bytes ending at byte {offset}")
