"""Converts NumPy arrays to and from TensorFlow's `TensorProto`, without TensorFlow.

Supports floats (16, 32, 64 bits), integers (8 to 64 bits, signed and unsigned), bool and strings. A string tensor is an
object array of bytes, as in TensorFlow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsr_common import serving_apis

TensorLike = NDArray[Any] | np.generic | Sequence[str | bytes] | str | bytes | int | float | bool

_STRING = 7  # DT_STRING of tensorflow/core/framework/types.proto

# Number in types.proto -> (dtype in tensor_content, name of the typed field).
_NUMERIC: dict[int, tuple[np.dtype[Any], str]] = {
    1: (np.dtype("<f4"), "float_val"),
    2: (np.dtype("<f8"), "double_val"),
    3: (np.dtype("<i4"), "int_val"),
    4: (np.dtype("u1"), "int_val"),
    5: (np.dtype("<i2"), "int_val"),
    6: (np.dtype("i1"), "int_val"),
    9: (np.dtype("<i8"), "int64_val"),
    10: (np.dtype("?"), "bool_val"),
    17: (np.dtype("<u2"), "int_val"),
    19: (np.dtype("<f2"), "half_val"),
    22: (np.dtype("<u4"), "uint32_val"),
    23: (np.dtype("<u8"), "uint64_val"),
}
_HALF = 19
_NUMBER_OF_DTYPE = {dtype: number for number, (dtype, _) in _NUMERIC.items()}


def make_tensor(values: TensorLike) -> Any:
    """Encodes `values` as a TensorProto.

    Args:
        values: a NumPy array of any shape with a numeric dtype, bool or strings (dtype object, U or S); a flat list of
            str or bytes, which becomes a string tensor [n]; or a scalar. str is encoded as UTF-8.

    Raises:
        ValueError: the dtype is not supported, or a str has lone surrogates.
        TypeError: an object array holds something that is neither str nor bytes.
    """
    # Strings do not become a NumPy string array first, because that would drop trailing zero bytes.
    if isinstance(values, (str, bytes)):
        return _string_tensor([values], ())
    if isinstance(values, (list, tuple)) and any(isinstance(value, (str, bytes)) for value in values):
        return _string_tensor(values, (len(values),))
    array = np.asarray(values)
    if array.dtype.kind in "OUS":
        return _string_tensor(array.ravel().tolist(), array.shape)
    number = _NUMBER_OF_DTYPE.get(array.dtype.newbyteorder("<"))
    if number is None:
        raise ValueError(f"cannot encode an array of dtype {array.dtype} as a tensor")
    proto = serving_apis.TensorProto(dtype=number)
    _set_shape(proto, array.shape)
    proto.tensor_content = array.astype(_NUMERIC[number][0], copy=False).tobytes()
    return proto


def _string_tensor(values: Sequence[Any], shape: tuple[int, ...]) -> Any:
    proto = serving_apis.TensorProto(dtype=_STRING)
    _set_shape(proto, shape)
    for value in values:
        if isinstance(value, str):
            value = value.encode("utf-8")
        elif not isinstance(value, bytes):
            raise TypeError(f"a string tensor holds str or bytes, got {type(value).__name__}: {value!r}")
        proto.string_val.append(value)
    return proto


def _set_shape(proto: Any, shape: tuple[int, ...]) -> None:
    proto.tensor_shape.SetInParent()  # a scalar has a shape too, with no dimensions
    for size in shape:
        proto.tensor_shape.dim.add(size=size)


def to_numpy(proto: Any) -> NDArray[Any]:
    """Decodes a TensorProto.

    Values come from `tensor_content` if that is set, else from the typed field of the dtype. As in TensorFlow, the last
    value of a typed field with too few values for the shape is repeated, and an empty field means zeros.

    Returns:
        A writable array; strings have the dtype object and are bytes.

    Raises:
        ValueError: the proto is broken, or its dtype is not supported.
    """
    shape = _shape(proto)
    count = math.prod(shape)
    flat: NDArray[Any]
    if proto.dtype == _STRING:
        flat = np.empty(_bounded(count, np.dtype(object).itemsize), object)
        _fill(flat, _string_list(proto.tensor_content, count) if proto.tensor_content else proto.string_val, b"")
        return flat.reshape(shape)
    if proto.dtype not in _NUMERIC:
        raise ValueError(f"cannot decode a tensor of dtype {proto.dtype} (a number of TensorFlow's types.proto)")
    dtype, field = _NUMERIC[proto.dtype]
    _bounded(count, dtype.itemsize)
    if proto.tensor_content:
        if len(proto.tensor_content) != count * dtype.itemsize:
            raise ValueError(
                f"tensor_content has {len(proto.tensor_content)} bytes; "
                f"shape {list(shape)} of {dtype.name} needs {count * dtype.itemsize}"
            )
        if dtype.kind == "b":  # any byte may arrive, but a NumPy bool is 0 or 1
            flat = np.frombuffer(proto.tensor_content, np.uint8) != 0
        else:
            flat = np.frombuffer(proto.tensor_content, dtype).astype(dtype.newbyteorder("="), copy=True)
        return flat.reshape(shape)
    flat = np.empty(count, dtype.newbyteorder("="))
    values = getattr(proto, field)
    if proto.dtype == _HALF:  # the 16 bits of each value, in an int32
        _fill(flat.view(np.uint16), values, 0)
    else:
        _fill(flat, values, 0)
    return flat.reshape(shape)


def _shape(proto: Any) -> tuple[int, ...]:
    sizes = tuple(dim.size for dim in proto.tensor_shape.dim)
    if proto.tensor_shape.unknown_rank or any(size < 0 for size in sizes):
        known = "an unknown rank" if proto.tensor_shape.unknown_rank else str(list(sizes))
        raise ValueError(f"the value of a tensor needs a complete shape, got {known}")
    return sizes


def _bounded(count: int, itemsize: int) -> int:
    """Returns `count`. Raises ValueError if an array of so many elements is larger than any message."""
    if count * itemsize > serving_apis.MAX_MESSAGE_BYTES:
        raise ValueError(
            f"a tensor of {count} elements is larger than any message ({serving_apis.MAX_MESSAGE_BYTES} bytes)"
        )
    return count


def _fill(flat: NDArray[Any], values: Sequence[Any], default: Any) -> None:
    """Writes `values` into `flat` [n] and repeats the last one to the end. Raises ValueError."""
    given = len(values)
    if given > flat.size:
        raise ValueError(f"the tensor has {given} values, but its shape has {flat.size} elements")
    # The fields of the message hold integers of 32 and 64 bits, so only smaller ones can be out of range.
    if flat.dtype.kind in "iu" and flat.dtype.itemsize < 4 and given:
        limits = np.iinfo(flat.dtype)
        low, high = min(values), max(values)
        if low < limits.min or high > limits.max:
            raise ValueError(f"the value {low if low < limits.min else high} is out of the range of {flat.dtype.name}")
    flat[:given] = values[:]  # a list, which NumPy reads faster than the message's own sequence
    flat[given:] = values[-1] if given else default


def _string_list(content: bytes, count: int) -> list[bytes]:
    """Decodes the `tensor_content` of a string tensor: `count` lengths as varints, then the strings in order."""
    lengths, offset = [], 0
    for _ in range(count):
        length, shift = 0, 0
        while True:
            if offset >= len(content) or shift > 28:
                raise ValueError("tensor_content of a string tensor is broken: a length is too long or cut off")
            byte = content[offset]
            offset += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        lengths.append(length)
    if offset + sum(lengths) != len(content):
        raise ValueError(
            f"tensor_content of a string tensor has {len(content)} bytes, expected {offset + sum(lengths)}"
        )
    strings = []
    for length in lengths:
        strings.append(content[offset : offset + length])
        offset += length
    return strings
