"""The proxy's configuration, a YAML file; docs/proxy.md explains every key.

models:
  demo: {backends: ["10.0.0.1:8500", "10.0.0.2:8500"]}
default: {backends: ["10.0.0.3:8500"]}     # every other model; without it they are unknown
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpsr_common.errors import UsageError
from dpsr_common.strict_yaml import Section, load_yaml, read_file
from dpsr_serving.addresses import check_address


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """Servers that hold the same, or with several shards, each a part of the items.

    Attributes:
        shards: addresses of the replicas of each shard; one tuple where the model is not split.
        discover: only those replicas are asked that say (GetModelStatus) that they hold the model.
        allow_partial: with shards: an answer without some of them is an answer.
        shard_timeout_s: with shards: how long one may take; None leaves it to the request's deadline.
    """

    shards: tuple[tuple[str, ...], ...]
    discover: bool = False
    allow_partial: bool = True
    shard_timeout_s: float | None = None


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    """Where a request goes instead: other servers, another model, version or label; None leaves each as it is."""

    pool: PoolConfig | None = None
    model: str | None = None
    version: int | None = None
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """Servers for the requests that have all that is given; None matches all."""

    pool: PoolConfig
    version: int | None = None
    label: str | None = None
    signature: str | None = None


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """A split of the requests of one model.

    Attributes:
        name: the experiment's name, in metrics, logs and the assignment's hash.
        key: metadata key whose value (a user id) decides the arm.
        override: metadata key whose value names an arm outright, for testers; None: no override.
        weights: share of each arm, any positive scale, in order.
        targets: where each arm's requests go, in the same order.
    """

    name: str
    key: str
    override: str | None
    weights: Mapping[str, float]
    targets: Mapping[str, TargetConfig]


@dataclasses.dataclass(frozen=True)
class ShadowConfig:
    """A copy of a share of the requests goes to a target too, and its answer is dropped."""

    target: TargetConfig
    share: float


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """How the requests of one model are routed: the first rule that matches, else its pool (None: the default)."""

    pool: PoolConfig | None
    rules: tuple[RuleConfig, ...] = ()
    experiment: ExperimentConfig | None = None
    shadow: ShadowConfig | None = None


@dataclasses.dataclass(frozen=True)
class HealthConfig:
    """Active checks: every `every_s`, `timeout_s` each; `failures` in a row eject a server, back over `return_s`."""

    every_s: float = 1.0
    timeout_s: float = 1.0
    failures: int = 2
    return_s: float = 10.0


@dataclasses.dataclass(frozen=True)
class RetryConfig:
    """At most `attempts` a request; retries at most `budget` of the requests, beside a reserve of `reserve`."""

    attempts: int = 3
    budget: float = 0.2
    reserve: int = 100


@dataclasses.dataclass(frozen=True)
class TlsConfig:
    """Files in PEM form. For listening: `ca` makes clients show a certificate. For backends: `ca` is whom to trust."""

    certificate: str | None = None
    key: str | None = None
    ca: str | None = None
    server_name: str | None = None


@dataclasses.dataclass(frozen=True)
class AccessLogConfig:
    """JSON lines appended to `path`: a `sample` of the requests and, with `errors`, all that fail."""

    path: str
    sample: float = 0.01
    errors: bool = True
    metadata: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ProxyConfig:
    """Everything the file says. `max_outstanding` is the number of unanswered requests one backend may have."""

    models: Mapping[str, ModelConfig]
    default: PoolConfig | None = None
    max_outstanding: int = 1024
    health: HealthConfig = HealthConfig()
    retries: RetryConfig = RetryConfig()
    listen_tls: TlsConfig | None = None
    backend_tls: TlsConfig | None = None
    access_log: AccessLogConfig | None = None


def load_config(path: Path) -> ProxyConfig:
    """Reads a configuration file. Raises UsageError that names file, key, value and what is allowed."""
    return read_file(path, parse_config)


def parse_config(text: str) -> ProxyConfig:
    """Reads a configuration. Raises UsageError that names key, value and what is allowed."""
    top = Section(
        "",
        load_yaml(text),
        ("models", "default", "max_outstanding", "health", "retries", "tls", "access_log"),
    )
    models = top.tree.get("models", {})
    if not isinstance(models, dict):
        raise UsageError(f"models: got {models!r}, expected a mapping of model names to {{backends: [host:port, ...]}}")
    for name in models:
        if not isinstance(name, str) or not name:
            raise UsageError(f"models: got the name {name!r}, expected a string that is not empty (quote it)")
    default = None
    if "default" in top.tree:
        section = Section("default", top.tree["default"], _POOL_KEYS)
        default = _pool(section)
        if default is None:
            raise UsageError(f"default.backends: got None, expected {_ADDRESSES}")
    routes = {name: _model(f"models.{name}", value, default is not None) for name, value in models.items()}
    if not routes and default is None:
        raise UsageError("no backend at all; give models, default, or both")
    _check_targets(routes, default)
    tls = top.section("tls", ("listen", "backends"))
    return ProxyConfig(
        models=routes,
        default=default,
        max_outstanding=top.integer("max_outstanding", ProxyConfig.max_outstanding, least=1),
        health=_health(top.section("health", _fields(HealthConfig))),
        retries=_retries(top.section("retries", _fields(RetryConfig))),
        listen_tls=_tls(tls, "listen", ("certificate", "key", "ca")),
        backend_tls=_tls(tls, "backends", ("certificate", "key", "ca", "server_name")),
        access_log=_access_log(top),
    )


_POOL_KEYS = ("backends", "shards", "discover", "missing_shards", "shard_timeout_s")
_ADDRESSES = "a list of at least one host:port"


def _model(key: str, value: Any, has_default: bool) -> ModelConfig:
    section = Section(key, value, (*_POOL_KEYS, "rules", "experiment", "shadow"))
    pool = _pool(section)
    others = [name for name in ("rules", "experiment", "shadow") if name in section.tree]
    if pool is None and not (has_default and others):
        raise UsageError(f"{key}.backends: got None, expected {_ADDRESSES}")
    rules = section.tree.get("rules", [])
    if not isinstance(rules, list):
        raise UsageError(
            f"{key}.rules: got {rules!r}, expected a list of {{version|label|signature: ..., backends: ...}}"
        )
    return ModelConfig(
        pool=pool,
        rules=tuple(_rule(f"{key}.rules[{index}]", rule) for index, rule in enumerate(rules)),
        experiment=_experiment(f"{key}.experiment", section.tree["experiment"]) if "experiment" in others else None,
        shadow=_shadow(f"{key}.shadow", section.tree["shadow"]) if "shadow" in others else None,
    )


def _rule(key: str, value: Any) -> RuleConfig:
    section = Section(key, value, ("version", "label", "signature", *_POOL_KEYS))
    if not {"version", "label", "signature"} & set(section.tree):
        raise UsageError(f"{key}: got {value!r}, expected a version, a label or a signature that it is for")
    if {"version", "label"} <= set(section.tree):
        raise UsageError(f"{key}: got a version and a label; a request has one of them at most: give one")
    pool = _pool(section)
    if pool is None:
        raise UsageError(f"{key}.backends: got None, expected {_ADDRESSES}")
    return RuleConfig(
        pool, section.integer("version", None, 0), section.text("label", None), section.text("signature", None)
    )


def _pool(section: Section) -> PoolConfig | None:
    given = [name for name in _POOL_KEYS if name in section.tree]
    if not given:
        return None
    if "backends" in given and "shards" in given:
        raise UsageError(f"{section.key}shards: got backends too; give one of them")
    if "shards" not in given:
        for name in ("missing_shards", "shard_timeout_s"):
            if name in given:
                raise UsageError(f"{section.key}{name}: got {section.tree[name]!r} without shards; leave it out")
        shards: tuple[tuple[str, ...], ...] = (_addresses(f"{section.key}backends", section.tree.get("backends")),)
    else:
        lists = section.tree["shards"]
        if not isinstance(lists, list) or len(lists) < 2:
            raise UsageError(f"{section.key}shards: got {lists!r}, expected at least two lists of host:port")
        shards = tuple(_addresses(f"{section.key}shards[{index}]", part) for index, part in enumerate(lists))
        every = [address for shard in shards for address in shard]
        if len(set(every)) < len(every):
            raise UsageError(f"{section.key}shards: got {every}, expected each address once")
    policy = section.text("missing_shards", "partial", ("partial", "error").__contains__, "'partial' or 'error'")
    return PoolConfig(
        shards, section.flag("discover", False), policy == "partial", section.number("shard_timeout_s", None)
    )


def _addresses(key: str, backends: Any) -> tuple[str, ...]:
    if not isinstance(backends, list) or not backends:
        raise UsageError(f"{key}: got {backends!r}, expected {_ADDRESSES}")
    addresses = tuple(_address(f"{key}[{index}]", item) for index, item in enumerate(backends))
    if len(set(addresses)) < len(addresses):
        raise UsageError(f"{key}: got {list(addresses)}, expected each address once")
    return addresses


def _address(key: str, value: Any) -> str:
    if isinstance(value, str) and value.startswith("unix:/"):
        return value
    return check_address(key, value)


_TARGET_KEYS = (*_POOL_KEYS, "model", "version", "label")


def _target(section: Section) -> TargetConfig:
    if {"version", "label"} <= set(section.tree):
        raise UsageError(f"{section.key}label: got a version too; give one of them")
    return TargetConfig(
        _pool(section),
        section.text("model", None),
        section.integer("version", None, 0),
        section.text("label", None),
    )


def _experiment(key: str, value: Any) -> ExperimentConfig:
    section = Section(key, value, ("name", "key", "override", "arms"))
    arms = section.tree.get("arms")
    if not isinstance(arms, dict) or not arms or not all(isinstance(arm, str) and arm for arm in arms):
        raise UsageError(f"{key}.arms: got {arms!r}, expected a mapping of names to {{weight: ..., ...}}")
    for name in ("name", "key"):
        if name not in section.tree:
            raise UsageError(f"{key}.{name}: got None, expected a string that is not empty")
    weights, targets = {}, {}
    for name, arm in arms.items():
        part = Section(f"{key}.arms.{name}", arm, ("weight", *_TARGET_KEYS))
        if "weight" not in part.tree:
            raise UsageError(f"{key}.arms.{name}.weight: got None, expected a number above 0")
        weights[name] = float(part.number("weight", 0.0))
        targets[name] = _target(part)
    return ExperimentConfig(
        name=section.text("name", ""),
        key=_metadata_key(section, "key") or "",
        override=_metadata_key(section, "override"),
        weights=weights,
        targets=targets,
    )


def _metadata_key(section: Section, name: str) -> str | None:
    return section.text(
        name,
        None,
        lambda value: value == value.lower() and not value.endswith("-bin") and value.isascii(),
        "a metadata key: lower case, no -bin",
    )


def _shadow(key: str, value: Any) -> ShadowConfig:
    section = Section(key, value, ("share", *_TARGET_KEYS))
    target = _target(section)
    if target == TargetConfig():
        raise UsageError(f"{key}: got {value!r}, expected where the copies go: backends, model, version or label")
    return ShadowConfig(target, float(section.number("share", 1.0, most=1)))


def _check_targets(models: Mapping[str, ModelConfig], default: PoolConfig | None) -> None:
    """A target that names no backends goes to those of its model: there must be some."""
    for name, model in models.items():
        targets: dict[str, TargetConfig] = {}
        if model.experiment is not None:
            targets |= {f"experiment.arms.{arm}": target for arm, target in model.experiment.targets.items()}
        if model.shadow is not None:
            targets["shadow"] = model.shadow.target
        for key, target in targets.items():
            if target.pool is None and target.model is not None and target.model not in models and default is None:
                raise UsageError(
                    f"models.{name}.{key}.model: got {target.model!r}, expected one of the models, or backends too"
                )


def _fields(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def _health(section: Section) -> HealthConfig:
    preset = HealthConfig()
    return HealthConfig(
        section.number("every_s", preset.every_s),
        section.number("timeout_s", preset.timeout_s),
        section.integer("failures", preset.failures, 1),
        section.number("return_s", preset.return_s, least=0),
    )


def _retries(section: Section) -> RetryConfig:
    preset = RetryConfig()
    return RetryConfig(
        section.integer("attempts", preset.attempts, 1),
        section.number("budget", preset.budget, least=0, most=1),
        section.integer("reserve", preset.reserve, 0),
    )


def _tls(parent: Section, name: str, allowed: tuple[str, ...]) -> TlsConfig | None:
    if name not in parent.tree:
        return None
    section = parent.section(name, allowed)
    files = {key: section.text(key, None) for key in allowed}
    if (files["certificate"] is None) != (files["key"] is None) or (name == "listen" and files["key"] is None):
        raise UsageError(f"tls.{name}: got {section.tree!r}, expected certificate and key together")
    return TlsConfig(**files)


def _access_log(top: Section) -> AccessLogConfig | None:
    if "access_log" not in top.tree:
        return None
    section = top.section("access_log", _fields(AccessLogConfig))
    path = section.text("path", None)
    if path is None:
        raise UsageError("access_log.path: got None, expected the path of a file")
    metadata = section.tree.get("metadata", [])
    if not isinstance(metadata, list) or not all(isinstance(key, str) and key for key in metadata):
        raise UsageError(f"access_log.metadata: got {metadata!r}, expected a list of metadata keys")
    return AccessLogConfig(
        path, section.number("sample", 0.01, least=0, most=1), section.flag("errors", True), tuple(metadata)
    )
