"""Writes the descriptors of TensorFlow Serving's API, with all their dependencies, as one FileDescriptorSet.

    python dump_apis.py serving_apis.desc

The `tensorflow-serving-api` wheel contains generated Python modules but no .proto files, and current protobuf releases
can no longer import some of these modules. But every generated module contains its serialized descriptor as a literal,
so this script reads the literals from the source text. It imports neither TensorFlow nor the generated modules, and
takes a fraction of a second. From the result, `protoc --descriptor_set_in` makes the C++ messages of the server, and
dpsr_common.serving_apis makes the Python messages of the proxy and the client.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool

# The files to start from. The files that they import (predict, classification, TensorFlow's tensors, ...) are added.
ROOTS = (
    "tensorflow_serving/apis/prediction_service.proto",
    "tensorflow_serving/apis/model_service.proto",
    "tensorflow_serving/apis/prediction_log.proto",
    "tensorflow_serving/config/model_server_config.proto",
)


def _module_path(proto: str) -> Path:
    """Returns the path of the generated module of a .proto file, without importing the packages above it."""
    package, _, rest = proto.partition("/")
    # TensorFlow's support library is inside its wheel.
    if package == "tsl":
        package, rest = "tensorflow", proto
    spec = importlib.util.find_spec(package)
    locations = spec.submodule_search_locations if spec else None
    for location in locations or ():
        path = Path(location) / (rest.removesuffix(".proto") + "_pb2.py")
        if path.is_file():
            return path
    raise SystemExit(f"dump_apis: no generated module of {proto}; install tensorflow and tensorflow-serving-api")


def _serialized_descriptor(path: Path) -> bytes:
    """Returns the argument of `AddSerializedFile(b'...')` or, in older modules, of `serialized_pb=_b('...')`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        literal: ast.expr | None = None
        if isinstance(node.func, ast.Attribute) and node.func.attr == "AddSerializedFile":
            literal = node.args[0]
        for keyword in node.keywords:
            if keyword.arg == "serialized_pb":
                # `_b('...')` turns a str of latin-1 characters into bytes.
                literal = keyword.value.args[0] if isinstance(keyword.value, ast.Call) else keyword.value
        if isinstance(literal, ast.Constant) and isinstance(literal.value, (bytes, str)):
            value = literal.value
            return value if isinstance(value, bytes) else value.encode("latin-1")
    raise SystemExit(f"dump_apis: {path}: found no serialized descriptor; this script does not know its generator")


def collect(roots: tuple[str, ...] = ROOTS) -> descriptor_pb2.FileDescriptorSet:
    """Returns the files in `roots` and all their dependencies, each file after the ones that it imports."""
    result = descriptor_pb2.FileDescriptorSet()
    seen: set[str] = set()

    def add(name: str) -> None:
        if name in seen:
            return
        seen.add(name)
        file = descriptor_pb2.FileDescriptorProto.FromString(_serialized_descriptor(_module_path(name)))
        if file.name != name:
            raise SystemExit(f"dump_apis: the generated module of {name} describes {file.name}")
        for dependency in file.dependency:
            add(dependency)
        result.file.append(file)

    for root in roots:
        add(root)
    return result


def main() -> None:
    """Writes the file that is named on the command line."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: dump_apis.py OUTPUT")
    descriptors = collect()
    pool = descriptor_pool.DescriptorPool()
    for file in descriptors.file:
        pool.Add(file)
    # Fails if a dependency is missing.
    for root in ROOTS:
        pool.FindFileByName(root)
    temporary = sys.argv[1] + ".tmp"
    Path(temporary).write_bytes(descriptors.SerializeToString(deterministic=True))
    os.replace(temporary, sys.argv[1])


if __name__ == "__main__":
    main()
