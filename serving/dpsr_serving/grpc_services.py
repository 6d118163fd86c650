"""gRPC's health and reflection services, without a transport: the proxy and the gateway serve them, each in its way.

Health says whether a server takes requests; Kubernetes and gRPC's clients ask it. Reflection tells tools such as
grpcurl which methods and messages there are. The two .proto files name gRPC's documents about them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.message import DecodeError

from dpsr_common.serving_apis import load_pool

HEALTH = "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1.ServerReflection"
REFLECTION_ALPHA = "grpc.reflection.v1alpha.ServerReflection"
SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3  # a service's status

_WATCH_S = 0.5  # between two looks at a status that is watched
_NOT_FOUND, _INVALID_ARGUMENT = 5, 3  # status codes


def _with_alpha(path: Path) -> Any:
    """Returns a pool with health, and both packages of reflection."""
    pool = load_pool(path)
    alpha = descriptor_pb2.FileDescriptorProto()
    pool.FindFileByName("reflection.proto").CopyToProto(alpha)
    alpha.name, alpha.package = "reflection_v1alpha.proto", "grpc.reflection.v1alpha"
    old, new = ".grpc.reflection.v1.", ".grpc.reflection.v1alpha."
    for message in alpha.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(old, new)
    for method in alpha.service[0].method:
        method.input_type, method.output_type = (
            name.replace(old, new) for name in (method.input_type, method.output_type)
        )
    pool.AddSerializedFile(alpha.SerializeToString())
    return pool


POOL = _with_alpha(Path(__file__).with_name("grpc_services.desc"))


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))


HealthCheckRequest = _message("grpc.health.v1.HealthCheckRequest")
HealthCheckResponse = _message("grpc.health.v1.HealthCheckResponse")
_ReflectionRequest = _message("grpc.reflection.v1.ServerReflectionRequest")
_ReflectionResponse = _message("grpc.reflection.v1.ServerReflectionResponse")


class UnknownServiceError(Exception):
    """There is no service of this name."""


class Health:
    """Answers health checks by `status`: the name of a service -> SERVING, NOT_SERVING or SERVICE_UNKNOWN.

    The name "" means the whole server.
    """

    def __init__(self, status: Callable[[str], int]) -> None:
        self._status = status

    def check(self, request: bytes) -> bytes:
        """Answers Check. Raises UnknownServiceError, and ValueError if the bytes are not a HealthCheckRequest."""
        service = self._service(request)
        status = self._status(service)
        if status == SERVICE_UNKNOWN:
            raise UnknownServiceError(f"there is no service {service!r}")
        return _answer(status)

    async def watch(self, request: bytes) -> AsyncIterator[bytes]:
        """Answers Watch: the status now and whenever it changes, without an end. Raises ValueError as check() does."""
        service, last = self._service(request), None
        while True:
            status = self._status(service)
            if status != last:
                yield _answer(status)
                last = status
            await asyncio.sleep(_WATCH_S)

    @staticmethod
    def _service(request: bytes) -> str:
        try:
            return str(HealthCheckRequest.FromString(request).service)
        except DecodeError as error:
            raise ValueError(f"the message is not a {HealthCheckRequest.DESCRIPTOR.full_name}: {error}") from None


def _answer(status: int) -> bytes:
    return bytes(HealthCheckResponse(status=status).SerializeToString())


class Reflection:
    """Answers requests of reflection, in both packages, about the services of some descriptor pools."""

    def __init__(self, services: Sequence[str], pools: Sequence[Any]) -> None:
        """`services`: full names of the services that a server has. `pools`: where they and their messages are."""
        self._services = (*services, REFLECTION, REFLECTION_ALPHA)
        self._pools = (*pools, POOL)

    def answer(self, request: bytes) -> bytes:
        """Answers one message of the stream. Raises ValueError if the bytes are not a ServerReflectionRequest."""
        try:
            asked = _ReflectionRequest.FromString(request)
        except DecodeError as error:
            raise ValueError(f"the message is not a {_ReflectionRequest.DESCRIPTOR.full_name}: {error}") from None
        response = _ReflectionResponse(valid_host=asked.host, original_request=asked)
        which = asked.WhichOneof("message_request")
        if which == "list_services":
            for name in self._services:
                response.list_services_response.service.add(name=name)
        elif which is None:
            response.error_response.error_code = _INVALID_ARGUMENT
            response.error_response.error_message = "the request asks for nothing"
        elif not self._look_up(which, getattr(asked, which), response):
            response.error_response.error_code = _NOT_FOUND
            response.error_response.error_message = f"there is no {which}: {getattr(asked, which)}".strip()
        return bytes(response.SerializeToString())

    def _look_up(self, which: str, wanted: Any, response: Any) -> bool:
        for pool in self._pools:
            try:
                if which == "file_by_filename":
                    file = pool.FindFileByName(wanted)
                elif which == "file_containing_symbol":
                    file = pool.FindFileContainingSymbol(wanted)
                elif which == "file_containing_extension":
                    kind = pool.FindMessageTypeByName(wanted.containing_type)
                    file = pool.FindExtensionByNumber(kind, wanted.extension_number).file
                else:
                    extensions = pool.FindAllExtensions(pool.FindMessageTypeByName(wanted))
                    found = response.all_extension_numbers_response
                    found.base_type_name = wanted
                    found.extension_number.extend(one.number for one in extensions)
                    return True
            except KeyError:
                continue
            # With all files that it imports, so that a tool need not ask for each.
            files = dict(_with_imports(file))
            response.file_descriptor_response.file_descriptor_proto.extend(files.values())
            return True
        return False


def _with_imports(file: Any) -> Iterator[tuple[str, bytes]]:
    yield file.name, file.serialized_pb
    for imported in file.dependencies:
        yield from _with_imports(imported)
