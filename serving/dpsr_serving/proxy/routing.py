"""Decides where a request goes: finds the model spec in its bytes, and looks it up in the configuration.

These are pure functions on plain data; server.py moves the bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from google.protobuf.message import DecodeError

from dpsr_common import serving_apis
from dpsr_serving import _native
from dpsr_serving.proxy.config import PoolConfig, ProxyConfig, TargetConfig

_SPEC_BYTES = 4096  # a model spec holds a name, a version or label, and a signature

# Where a PredictResponse has its model spec.
_ANSWER_SPEC = (serving_apis.PredictResponse.DESCRIPTOR.fields_by_name["model_spec"].number,)

_LENGTH_DELIMITED = 2  # protocol buffers' number of this kind of field


class Loaded(Protocol):
    """Anything that counts the requests that it has not answered yet."""

    outstanding: int


L = TypeVar("L", bound=Loaded)


@dataclasses.dataclass(frozen=True)
class Spec:
    """A model spec. The signature "" means `serving_default`; neither version nor label means the latest version."""

    model: str
    version: int | None = None
    label: str | None = None
    signature: str = ""


def parse_spec(message: bytes) -> Spec:
    """Reads a serialized ModelSpec. Raises ValueError if the bytes are not one."""
    if len(message) > _SPEC_BYTES:
        raise ValueError(f"a model spec of {len(message)} bytes, expected at most {_SPEC_BYTES}")
    try:
        proto = serving_apis.ModelSpec.FromString(message)
    except DecodeError as error:
        raise ValueError(f"broken model spec: {error}") from error
    choice = proto.WhichOneof("version_choice")
    return Spec(
        model=proto.name,
        version=proto.version.value if choice == "version" else None,
        label=proto.version_label if choice == "version_label" else None,
        signature=proto.signature_name,
    )


def route(config: ProxyConfig, spec: Spec) -> PoolConfig | None:
    """Returns a request's servers: of the first matching rule of its model, else of the model, else the default."""
    model = config.models.get(spec.model)
    if model is None:
        return config.default
    for rule in model.rules:
        if (
            rule.version in (None, spec.version)
            and rule.label in (None, spec.label)
            and rule.signature in (None, spec.signature or "serving_default")
        ):
            return rule.pool
    return model.pool or config.default


def redirect(config: ProxyConfig, spec: Spec, target: TargetConfig) -> tuple[Spec, PoolConfig | None]:
    """Returns the model spec of a request that goes to a target, and the servers for it.

    A target's version or label replaces the request's. A target that names another model but no version or label means
    that model's latest version, because version numbers of different models are unrelated.
    """
    version, label = spec.version, spec.label
    if target.version is not None or target.label is not None or target.model not in (None, spec.model):
        version, label = target.version, target.label
    new = Spec(target.model or spec.model, version, label, spec.signature)
    return new, target.pool or route(config, new)


def model_spec_path(request: Any) -> tuple[int, ...] | None:
    """Returns the field numbers that lead to the model spec in a message of this descriptor; None if it has none.

    MultiInference has a spec in each of its tasks. All must name the same model, so the first one decides.
    """
    fields = request.fields_by_name
    if "model_spec" in fields:
        return (fields["model_spec"].number,)
    if "tasks" in fields:
        return (fields["tasks"].number, fields["tasks"].message_type.fields_by_name["model_spec"].number)
    return None


def find_model_spec(request: bytes, path: tuple[int, ...]) -> bytes | None:
    """Returns the serialized ModelSpec at `path` of a request, or None, without decoding the tensors around it.

    Raises:
        ValueError: the bytes are not a protocol buffer message.
    """
    # A message field may occur several times; it means the merge of all, which their concatenation parses to. The steps
    # before the last are repeated fields, whose occurrences are elements: the first one counts.
    message = request
    for field in path[:-1]:
        element = _native.find_field(message, field, True)
        if element is None:
            return None
        message = element
    return _native.find_field(message, path[-1])


def answer_versions(answers: Sequence[bytes | None]) -> list[int | None]:
    """Returns the model version of each serialized PredictResponse; None for an answer that does not say it.

    Raises:
        ValueError: an answer is not a PredictResponse.
    """
    specs = [None if answer is None else find_model_spec(answer, _ANSWER_SPEC) for answer in answers]
    known = {spec: parse_spec(spec).version for spec in set(specs) if spec is not None}
    return [None if spec is None else known[spec] for spec in specs]


def rewrite_model_spec(request: bytes, path: tuple[int, ...], spec: Spec) -> bytes:
    """Returns the request with model, version and label of `spec` in its model spec, or in that of each of its tasks.

    The signature and everything else stay the same byte for byte, including unknown fields.

    Raises:
        ValueError: a model spec after the first is broken.
    """
    pieces, offset = [], 0
    found = _native.find_places(request, path[0])
    if len(path) == 1:
        try:
            proto = serving_apis.ModelSpec.FromString(b"".join(request[start:end] for _, start, end in found))
        except DecodeError as error:
            raise ValueError(f"broken model spec: {error}") from error
        proto.name = spec.model
        proto.ClearField("version_choice")
        if spec.version is not None:
            proto.version.value = spec.version
        elif spec.label is not None:
            proto.version_label = spec.label
        pieces.append(_field(path[0], proto.SerializeToString()))
    for tag, start, end in found:
        pieces.append(request[offset:tag])
        if len(path) > 1:
            pieces.append(_field(path[0], rewrite_model_spec(request[start:end], path[1:], spec)))
        offset = end
    return b"".join([*pieces, request[offset:]])


def least_outstanding(backends: Sequence[L], turn: int) -> L:
    """Returns the backend with the fewest unanswered requests. `turn` breaks ties, so that idle ones take turns."""
    count = len(backends)
    best = backends[turn % count]
    for step in range(1, count):
        backend = backends[(turn + step) % count]
        if backend.outstanding < best.outstanding:
            best = backend
    return best


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
