"""The placement file: the servers with their memory, and the models with what each needs."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.strict_yaml import Section, load_yaml
from dpsr_serving.addresses import check_address
from dpsr_serving.placement.planner import Model, Server

# A loaded version takes more memory than its files: the session, and the tables that it builds from them.
_MEMORY_OVER_FILES = 1.2
_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """A model of the placement file.

    Attributes:
        model: what the planner needs to know: name, memory, replicas, request rate.
        base_path: the directory that holds the model's versions, as the servers see it.
        versions: the versions to serve; empty: the `latest` highest versions.
        latest: number of versions to serve where `versions` is empty.
        labels: label -> version.
    """

    model: Model
    base_path: str
    versions: tuple[int, ...]
    latest: int
    labels: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class PlacementConfig:
    """The whole placement file.

    Attributes:
        models: model name -> entry.
        servers: server name -> what the planner needs to know.
        addresses: server name -> "host:port".
        tls: files to reach the servers with: ca, certificate, key, server_name; empty: no TLS.
    """

    models: Mapping[str, ModelEntry]
    servers: Mapping[str, Server]
    addresses: Mapping[str, str]
    tls: Mapping[str, str]


def parse_config(text: str) -> PlacementConfig:
    """Reads a placement file. Raises UsageError that names the key, its value and what is allowed."""
    top = Section("", load_yaml(text), ("servers", "models", "swap_room", "tls"))
    servers, addresses = {}, {}
    for name, section in _sections(top, "servers", ("address", "memory", "zone", "leaving")):
        addresses[name] = check_address(f"{section.key}address", section.tree.get("address"))
        memory = _bytes(section)
        if memory is None:
            raise UsageError(f"{section.key}memory: got None, expected the bytes for models, such as 64GiB")
        servers[name] = Server(name, memory, section.text("zone", ""), section.flag("leaving", False))
    if len(set(addresses.values())) < len(addresses):
        raise UsageError(f"servers: got {sorted(addresses.values())}, expected a different address for each")
    swap_room = top.flag("swap_room", True)
    keys = ("base_path", "memory", "replicas", "requests_per_s", "versions", "latest", "labels")
    models = {name: _model(name, section, swap_room) for name, section in _sections(top, "models", keys)}
    files = top.section("tls", ("ca", "certificate", "key", "server_name"))
    tls = {key: str(files.text(key, "")) for key in files.tree}
    if ("certificate" in tls) != ("key" in tls):
        raise UsageError(f"tls: got {files.tree!r}, expected certificate and key together")
    return PlacementConfig(models, servers, addresses, tls if "tls" in top.tree else {})


def _sections(top: Section, key: str, allowed: tuple[str, ...]) -> list[tuple[str, Section]]:
    """Returns the sections below a key that maps names to sections, sorted by name."""
    words = f"a mapping of names to {{{', '.join(allowed)}}}"
    tree: dict[Any, Any] = top.value(key, {}, lambda value: isinstance(value, dict) and bool(value), words)
    if not tree:
        raise UsageError(f"{key}: got None, expected {words}")
    for name in tree:
        if not isinstance(name, str) or not name:
            raise UsageError(f"{key}: got the name {name!r}, expected a string that is not empty (quote it)")
    return [(name, Section(f"{key}.{name}", part, allowed)) for name, part in sorted(tree.items())]


def _model(name: str, section: Section, swap_room: bool) -> ModelEntry:
    base_path = section.text("base_path", "", lambda path: path[0] == "/" or "://" in path, "an absolute path or URI")
    if not base_path:
        raise UsageError(f"{section.key}base_path: got None, expected the directory of the model's versions")
    versions: list[int] = section.value(
        "versions",
        [],
        lambda value: isinstance(value, list) and bool(value) and all(_is_version(version) for version in value),
        "a list of version numbers",
    )
    if versions and "latest" in section.tree:
        raise UsageError(f"{section.key}latest: cannot be combined with versions; give one of them")
    latest = section.integer("latest", 1, 1)
    labels: dict[str, int] = section.value(
        "labels",
        {},
        lambda value: (
            isinstance(value, dict) and all(isinstance(k, str) and k and _is_version(v) for k, v in value.items())
        ),
        "a mapping of labels to version numbers",
    )
    num_versions = len(set(versions)) or latest
    version_memory = _bytes(section)
    if version_memory is None:
        version_memory = _measure_memory(f"{section.key}memory", base_path, versions, latest)
    model = Model(
        name,
        memory=version_memory * num_versions,
        swap=version_memory if swap_room else 0,
        replicas=section.integer("replicas", 1, 1),
        requests=float(section.number("requests_per_s", 0.0, least=0)),
    )
    return ModelEntry(model, base_path, tuple(sorted(set(versions))), latest, labels)


def _is_version(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _bytes(section: Section) -> int | None:
    """Returns the key `memory` in bytes; None where it is not given."""
    words = f"bytes above 0, or a number with a unit such as 12GiB ({', '.join(unit for unit in _UNITS if unit)})"
    value = section.value("memory", None, lambda value: _parse_bytes(value) > 0, words)
    return None if value is None else _parse_bytes(value)


def _parse_bytes(value: Any) -> int:
    """Returns the bytes that a number, or a number with a unit, stands for; 0 for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return 0
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", str(value))
    return int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0


def _measure_memory(key: str, base_path: str, versions: Sequence[int], latest: int) -> int:
    """Estimates the memory of the largest version to be served from its files.

    Raises:
        UsageError: there is none.
        CommandError: it was removed meanwhile.
    """
    try:
        numbers = sorted(int(child) for child in os.listdir(base_path) if child.isdecimal())
    except OSError as error:
        raise UsageError(
            f"{key}: not given, and the files cannot be measured here: {base_path}: {error.strerror}; "
            "give the bytes of one version"
        ) from None
    served = [number for number in numbers if number in versions] if versions else numbers[-latest:]
    try:
        sizes = [
            sum(file.stat().st_size for file in (Path(base_path) / str(number)).rglob("*") if file.is_file())
            for number in served
        ]
    except OSError as error:
        raise CommandError(
            f"{key}: not given, and the files cannot be measured here: {error.filename}: {error.strerror}; was the "
            "version removed meanwhile? Run the command again, or give the bytes of one version"
        ) from None
    if not any(sizes):
        wanted = f"none of the versions {', '.join(map(str, versions))}" if versions else "no version"
        there = f" (versions there: {', '.join(map(str, numbers))})" if numbers else ""
        raise UsageError(
            f"{key}: not given, and {base_path} has {wanted} to measure{there}; give the bytes of one version"
        )
    return int(max(sizes) * _MEMORY_OVER_FILES)
