"""The proxy's configuration: which model servers hold which model.

models:
  demo: {backends: ["10.0.0.1:8500", "10.0.0.2:8500"]}
default: {backends: ["10.0.0.3:8500"]}     # every other model; without it they are unknown
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dpsr_serving.addresses import check_address
from dpsr_serving.errors import UsageError


@dataclasses.dataclass(frozen=True)
class ProxyConfig:
    """Backends ("host:port") of each model, and of every other model ("default", empty: others are unknown)."""

    models: Mapping[str, tuple[str, ...]]
    default: tuple[str, ...] = ()


def load_config(path: Path) -> ProxyConfig:
    """Reads a configuration file. Raises UsageError that names file, key, value and what is allowed."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot read the configuration: {error}") from error
    try:
        return parse_config(text)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def parse_config(text: str) -> ProxyConfig:
    """Reads a configuration. Raises UsageError that names key, value and what is allowed."""
    try:
        tree = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"not valid YAML: {error}") from error
    top = _mapping("the configuration", {} if tree is None else tree, ("models", "default"))
    models = top.get("models", {})
    if not isinstance(models, dict):
        raise UsageError(f"models: got {models!r}, expected a mapping of model names to {{backends: [host:port, ...]}}")
    routes = {}
    for name, route in models.items():
        if not isinstance(name, str) or not name:
            raise UsageError(f"models: got the name {name!r}, expected a string that is not empty (quote it)")
        routes[name] = _route(f"models.{name}", route)
    default = _route("default", top["default"]) if "default" in top else ()
    if not routes and not default:
        raise UsageError("no backend at all; give models, default, or both")
    return ProxyConfig(routes, default)


def _route(key: str, value: Any) -> tuple[str, ...]:
    backends = _mapping(key, value, ("backends",)).get("backends")
    if not isinstance(backends, list) or not backends:
        raise UsageError(f"{key}.backends: got {backends!r}, expected a list of at least one host:port")
    addresses = tuple(check_address(f"{key}.backends[{index}]", item) for index, item in enumerate(backends))
    if len(set(addresses)) < len(addresses):
        raise UsageError(f"{key}.backends: got {list(addresses)}, expected each address once")
    return addresses


def _mapping(key: str, value: Any, allowed: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{key}: got {value!r}, expected a mapping with the keys {', '.join(allowed)}")
    for name in value:
        if name not in allowed:
            raise UsageError(f"{key}: unknown key {name!r}, allowed: {', '.join(allowed)}")
    return value


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, where PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)
