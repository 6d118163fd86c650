"""The proxy's configuration file, in YAML. docs/proxy.md explains every key. An example:

models:
  demo: {backends: ["10.0.0.1:8500", "10.0.0.2:8500"]}
default: {backends: ["10.0.0.3:8500"]}     # all other models; without it they are unknown
"""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpsr_common.errors import UsageError
from dpsr_common.serving_apis import MAX_MESSAGE_BYTES
from dpsr_common.strict_yaml import Section, load_yaml, read_file
from dpsr_serving.addresses import check_address


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """Servers that hold a model: replicas of the whole, or replicas of each shard of its items.

    Attributes:
        shards: addresses of the replicas of each shard; a single tuple if the model is not split into shards. An
            address is "host:port", "unix:/path" or "dns:NAME:PORT", which stands for all addresses of the name.
        discover: whether to ask only replicas that report (GetModelStatus) that they hold the model.
        allow_partial: with shards: whether an answer may leave out shards that fail.
        shard_timeout_s: with shards: seconds that one shard may take; None means until the request's deadline.
    """

    shards: tuple[tuple[str, ...], ...]
    discover: bool = False
    allow_partial: bool = True
    shard_timeout_s: float | None = None


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    """Where a request is redirected to: other servers, another model, version or label. None means no change."""

    pool: PoolConfig | None = None
    model: str | None = None
    version: int | None = None
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """Servers for requests with this version, label and signature; None matches any."""

    pool: PoolConfig
    version: int | None = None
    label: str | None = None
    signature: str | None = None


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """An experiment that splits the requests of one model into arms.

    Attributes:
        name: the experiment's name in metrics and logs, and in the hash that assigns arms.
        key: metadata key whose value, such as a user id, decides the arm.
        override: metadata key whose value names the arm directly, for testers; None: no override.
        weights: weight of each arm, above 0, on any scale, in order.
        targets: where each arm's requests go, in the same order.
    """

    name: str
    key: str
    override: str | None
    weights: Mapping[str, float]
    targets: Mapping[str, TargetConfig]


@dataclasses.dataclass(frozen=True)
class ShadowConfig:
    """A share of the requests is copied to a second target, whose answers are dropped."""

    target: TargetConfig
    share: float


@dataclasses.dataclass(frozen=True)
class LimitConfig:
    """Inference requests that are taken for a model by all workers of the proxy together; None: no limit.

    Attributes:
        requests_per_s: requests a second.
        burst: requests that may come at once on top of that, after a time with fewer.
        in_flight: requests that are not answered yet.
    """

    requests_per_s: float | None = None
    burst: int = 1
    in_flight: int | None = None


@dataclasses.dataclass(frozen=True)
class PrioritiesConfig:
    """The priorities of requests.

    Attributes:
        key: metadata key whose value names the priority.
        default: priority of requests without the key, or with a value that is not configured.
        shares: priority -> share of a model's limits that is open to its requests, above 0 and at most 1.
    """

    key: str
    default: str
    shares: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """How requests for one model are routed: by the first rule that matches, else to its pool (None: the default)."""

    pool: PoolConfig | None
    rules: tuple[RuleConfig, ...] = ()
    experiment: ExperimentConfig | None = None
    shadow: ShadowConfig | None = None
    limit: LimitConfig | None = None


@dataclasses.dataclass(frozen=True)
class HealthConfig:
    """Health checks of the servers.

    Each server is checked every `every_s` seconds and has `timeout_s` seconds to answer. `failures` failed checks in a
    row take it out of service. When it answers again, its share of the requests grows over `return_s` seconds. A server
    whose calls fail or hang while those of its replicas do not is taken out for at least `eject_s` seconds; 0: never.
    """

    every_s: float = 1.0
    timeout_s: float = 1.0
    failures: int = 2
    return_s: float = 10.0
    eject_s: float = 5.0


@dataclasses.dataclass(frozen=True)
class RetryConfig:
    """Limits of retries.

    A request is sent at most `attempts` times. Retries in all may be a share `budget` of the requests, plus `reserve`.
    """

    attempts: int = 3
    budget: float = 0.2
    reserve: int = 100


@dataclasses.dataclass(frozen=True)
class HedgeConfig:
    """Second calls for requests that take long.

    A request that has no answer after the latency that the share `quantile` of the requests of the last minute did not
    exceed is also sent to another server, and the first good answer counts. Second calls are at most a share `budget`
    of the requests; 0: none.
    """

    budget: float = 0.0
    quantile: float = 0.95


@dataclasses.dataclass(frozen=True)
class DnsConfig:
    """Lookups of names in addresses "dns:NAME:PORT".

    Attributes:
        every_s: seconds between two lookups of a name.
        timeout_s: seconds that a lookup may take.
        resolver: the DNS server to ask, "IP:port"; None asks the system, which also reads /etc/hosts.
    """

    every_s: float = 5.0
    timeout_s: float = 2.0
    resolver: str | None = None


@dataclasses.dataclass(frozen=True)
class LimitsConfig:
    """What clients may make one worker of the proxy hold, and how long they may take. Bytes and seconds.

    Attributes:
        connections: connections of clients. A new one above them takes the place of one without calls.
        streams: calls under way on a connection.
        header_bytes: headers of a call, each counted with 32 bytes more than its name and value.
        message_bytes: one message, unpacked.
        connection_bytes: all that the calls of a connection hold: their messages, and answers that are not yet read.
        total_bytes: the same for all connections, with what waits in their sockets. Above it the connections that
            hold the most are ended.
        connect_s: from a connection's first byte to the client's settings.
        headers_s: from the first byte of a call's headers to their last.
        body_s: from there to the end of the call's message.
        answer_s: from an answer to the last byte of it that the client takes.
        idle_s: without a call, before a connection is ended.
        age_s: before a connection is ended, once its calls are answered.
    """

    connections: int = 1024
    streams: int = 128
    header_bytes: int = 8192
    message_bytes: int = 2**25
    connection_bytes: int = 2**25
    total_bytes: int = 5 * 2**23
    connect_s: float = 10.0
    headers_s: float = 10.0
    body_s: float = 60.0
    answer_s: float = 60.0
    idle_s: float = 300.0
    age_s: float = 3600.0


@dataclasses.dataclass(frozen=True)
class TlsConfig:
    """Paths of PEM files. For listening, `ca` makes clients show a certificate; for backends, `ca` signed theirs."""

    certificate: str | None = None
    key: str | None = None
    ca: str | None = None
    server_name: str | None = None


@dataclasses.dataclass(frozen=True)
class AccessLogConfig:
    """A log in JSON lines at `path`: a share `sample` of all requests and, with `errors`, all that fail."""

    path: str
    sample: float = 0.01
    errors: bool = True
    metadata: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TracingConfig:
    """Spans, exported by OTLP over gRPC.

    Attributes:
        endpoint: the collector, "http://host:port", or "https://host:port" for TLS.
        sample: share of the requests that get spans, where the client does not decide.
        follow_clients: whether a client's trace decides by its flag `sampled`.
        service: name of the service in the spans.
    """

    endpoint: str
    sample: float = 0.01
    follow_clients: bool = True
    service: str = "dpsr-proxy"


@dataclasses.dataclass(frozen=True)
class ProxyConfig:
    """The whole configuration.

    Attributes:
        default_limit: limit of all models together that `default` serves.
        max_outstanding: number of unanswered requests that one backend may have.
        forward_reloads: whether clients may replace the list of models of a sole backend (HandleReloadConfigRequest).
    """

    models: Mapping[str, ModelConfig]
    default: PoolConfig | None = None
    default_limit: LimitConfig | None = None
    priorities: PrioritiesConfig | None = None
    max_outstanding: int = 1024
    health: HealthConfig = HealthConfig()
    retries: RetryConfig = RetryConfig()
    hedge: HedgeConfig = HedgeConfig()
    dns: DnsConfig = DnsConfig()
    limits: LimitsConfig = LimitsConfig()
    listen_tls: TlsConfig | None = None
    backend_tls: TlsConfig | None = None
    access_log: AccessLogConfig | None = None
    tracing: TracingConfig | None = None
    forward_reloads: bool = False


def load_config(path: Path) -> ProxyConfig:
    """Reads a configuration file. Raises UsageError that names the file, the key, its value and what is allowed."""
    return read_file(path, parse_config)


def parse_config(text: str) -> ProxyConfig:
    """Reads a configuration. Raises UsageError that names the key, its value and what is allowed."""
    top = Section(
        "",
        load_yaml(text, lines=True),
        _TOP_KEYS,
    )
    models = top.tree.get("models", {})
    if not isinstance(models, dict):
        raise UsageError(f"models: got {models!r}, expected a mapping of model names to {{backends: [host:port, ...]}}")
    for name in models:
        if not isinstance(name, str) or not name:
            raise UsageError(f"models: got the name {name!r}, expected a string that is not empty (quote it)")
    default, default_limit = None, None
    if "default" in top.tree:
        section = Section("default", top.tree["default"], (*_POOL_KEYS, "limit"))
        default, default_limit = _pool(section), _limit(section)
        if default is None:
            raise UsageError(f"default.backends: got None, expected {_ADDRESSES}")
    routes = {name: _model(f"models.{name}", value, default is not None) for name, value in models.items()}
    if not routes and default is None:
        raise UsageError("no backends are configured; give models, default, or both")
    _check_targets(routes, default)
    tls = top.section("tls", ("listen", "backends"))
    return ProxyConfig(
        models=routes,
        default=default,
        default_limit=default_limit,
        priorities=_priorities(top),
        max_outstanding=top.integer("max_outstanding", ProxyConfig.max_outstanding, least=1),
        health=_health(top.section("health", _fields(HealthConfig))),
        retries=_retries(top.section("retries", _fields(RetryConfig))),
        hedge=_hedge(top.section("hedge", _fields(HedgeConfig))),
        dns=_dns(top.section("dns", _fields(DnsConfig))),
        limits=_limits(top.section("limits", _fields(LimitsConfig))),
        listen_tls=_tls(tls, "listen", ("certificate", "key", "ca")),
        backend_tls=_tls(tls, "backends", ("certificate", "key", "ca", "server_name")),
        access_log=_access_log(top),
        tracing=_tracing(top),
        forward_reloads=top.flag("forward_reloads", False),
    )


_TOP_KEYS = (
    "models", "default", "priorities", "max_outstanding", "health", "retries", "hedge", "dns", "limits", "tls",
    "forward_reloads", "access_log", "tracing",
)  # fmt: skip
_POOL_KEYS = ("backends", "shards", "discover", "missing_shards", "shard_timeout_s")
_ADDRESSES = "a list of at least one host:port"
DNS_PREFIX = "dns:"
_ENDPOINT = re.compile(r"https?://[^/]+:[0-9]+")


def _model(key: str, value: Any, has_default: bool) -> ModelConfig:
    section = Section(key, value, (*_POOL_KEYS, "rules", "experiment", "shadow", "limit"))
    pool = _pool(section)
    others = [name for name in ("rules", "experiment", "shadow", "limit") if name in section.tree]
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
        limit=_limit(section),
    )


def _rule(key: str, value: Any) -> RuleConfig:
    section = Section(key, value, ("version", "label", "signature", *_POOL_KEYS))
    if not {"version", "label", "signature"} & set(section.tree):
        raise UsageError(f"{key}: got {value!r}, expected a version, a label or a signature to match")
    if {"version", "label"} <= set(section.tree):
        raise UsageError(f"{key}: version cannot be combined with label, because no request has both; give one of them")
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
        raise UsageError(f"{section.key}shards: cannot be combined with backends; give one of them")
    if "shards" not in given:
        for name in ("missing_shards", "shard_timeout_s"):
            if name in given:
                raise UsageError(
                    f"{section.key}{name}: got {section.tree[name]!r}, but it only applies to shards; leave it out"
                )
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
    addresses = tuple(check_backend(f"{key}[{index}]", item) for index, item in enumerate(backends))
    if len(set(addresses)) < len(addresses):
        raise UsageError(f"{key}: got {list(addresses)}, expected each address once")
    return addresses


def check_backend(key: str, value: Any) -> str:
    """Returns `value` if it is an address of servers, else raises UsageError that names `key`."""
    if isinstance(value, str) and value.startswith("unix:/"):
        return value
    if isinstance(value, str) and value.startswith(DNS_PREFIX) and value.count(":") > 1:
        try:
            check_address(key, value.removeprefix(DNS_PREFIX))
        except UsageError:
            raise UsageError(f"{key}: got {value!r}, expected dns:NAME:PORT with a port from 1 to 65535") from None
        return value
    return check_address(key, value)


_TARGET_KEYS = (*_POOL_KEYS, "model", "version", "label")


def _target(section: Section) -> TargetConfig:
    if {"version", "label"} <= set(section.tree):
        raise UsageError(f"{section.key}label: cannot be combined with version; give one of them")
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
        "a metadata key: lower case, not ending in -bin",
    )


def _shadow(key: str, value: Any) -> ShadowConfig:
    section = Section(key, value, ("share", *_TARGET_KEYS))
    target = _target(section)
    if target == TargetConfig():
        raise UsageError(f"{key}: got {value!r}, expected the target of the copies: backends, model, version or label")
    return ShadowConfig(target, float(section.number("share", 1.0, most=1)))


def _limit(parent: Section) -> LimitConfig | None:
    if "limit" not in parent.tree:
        return None
    section = parent.section("limit", _fields(LimitConfig))
    if not {"requests_per_s", "in_flight"} & set(section.tree):
        raise UsageError(f"{parent.key}limit: got {section.tree!r}, expected requests_per_s, in_flight, or both")
    rate = section.number("requests_per_s", None)
    if rate is None and "burst" in section.tree:
        raise UsageError(f"{section.key}burst: cannot be given without requests_per_s; leave it out")
    # The bucket of a tenth of a second lets requests pass that come in small groups.
    preset = 1 if rate is None else max(math.ceil(rate / 10), 1)
    return LimitConfig(rate, section.integer("burst", preset, 1), section.integer("in_flight", None, 1))


def _priorities(top: Section) -> PrioritiesConfig | None:
    if "priorities" not in top.tree:
        return None
    section = top.section("priorities", _fields(PrioritiesConfig))
    key = _metadata_key(section, "key")
    if key is None:
        raise UsageError("priorities.key: got None, expected a metadata key: lower case, not ending in -bin")
    names = section.tree.get("shares")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) and name for name in names):
        raise UsageError(
            f"priorities.shares: got {names!r}, expected a mapping of names to shares, such as {{high: 1, low: 0.5}}"
        )
    part = Section("priorities.shares", names, tuple(names))
    shares = {name: float(part.number(name, 1.0, most=1)) for name in names}
    default = section.text("default", None, shares.__contains__, f"one of {', '.join(shares)}")
    if default is None:
        raise UsageError(f"priorities.default: got None, expected one of {', '.join(shares)}")
    return PrioritiesConfig(key, default, shares)


def _check_targets(models: Mapping[str, ModelConfig], default: PoolConfig | None) -> None:
    """Raises UsageError for a target that names neither backends nor a model that has some."""
    for name, model in models.items():
        targets: dict[str, TargetConfig] = {}
        if model.experiment is not None:
            targets |= {f"experiment.arms.{arm}": target for arm, target in model.experiment.targets.items()}
        if model.shadow is not None:
            targets["shadow"] = model.shadow.target
        for key, target in targets.items():
            if target.pool is None and target.model is not None and target.model not in models and default is None:
                raise UsageError(
                    f"models.{name}.{key}.model: got {target.model!r}, expected one of the configured models, or give "
                    "backends as well"
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
        section.number("eject_s", preset.eject_s, least=0),
    )


def _retries(section: Section) -> RetryConfig:
    preset = RetryConfig()
    return RetryConfig(
        section.integer("attempts", preset.attempts, 1),
        section.number("budget", preset.budget, least=0, most=1),
        section.integer("reserve", preset.reserve, 0),
    )


def _hedge(section: Section) -> HedgeConfig:
    preset = HedgeConfig()
    return HedgeConfig(
        section.number("budget", preset.budget, least=0, most=1),
        section.number("quantile", preset.quantile, most=1),
    )


def _dns(section: Section) -> DnsConfig:
    preset = DnsConfig()
    resolver = section.text("resolver", None)
    if resolver is not None:
        check_address(f"{section.key}resolver", resolver)
        try:
            ipaddress.ip_address(resolver.rpartition(":")[0].strip("[]"))
        except ValueError:
            raise UsageError(
                f"{section.key}resolver: got {resolver!r}, expected IP:port, for example 127.0.0.1:53"
            ) from None
    return DnsConfig(section.number("every_s", preset.every_s), section.number("timeout_s", preset.timeout_s), resolver)


def _limits(section: Section) -> LimitsConfig:
    preset = LimitsConfig()
    counts = ("connections", "streams", "header_bytes", "message_bytes", "connection_bytes", "total_bytes")
    # HTTP/2's settings have 32 bits, the numbers of its streams 31.
    most = {"header_bytes": 2**31 - 1, "streams": 2**31 - 1}
    found: dict[str, Any] = {
        name: section.integer(name, getattr(preset, name), 1, most.get(name, 2**63 - 1)) for name in counts
    }
    for name in _fields(LimitsConfig):
        if name not in counts:
            found[name] = section.number(name, getattr(preset, name))
    limits = LimitsConfig(**found)
    if limits.message_bytes > MAX_MESSAGE_BYTES:
        raise UsageError(
            f"{section.key}message_bytes: got {limits.message_bytes}, expected at most {MAX_MESSAGE_BYTES}"
        )
    if limits.message_bytes > limits.total_bytes:
        raise UsageError(
            f"{section.key}total_bytes: got {limits.total_bytes}, expected at least message_bytes, which is "
            f"{limits.message_bytes}"
        )
    return limits


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


def _tracing(top: Section) -> TracingConfig | None:
    if "tracing" not in top.tree:
        return None
    section = top.section("tracing", _fields(TracingConfig))
    words = "http://host:port or https://host:port"
    endpoint = section.text("endpoint", None, lambda value: bool(_ENDPOINT.fullmatch(value)), words)
    if endpoint is None:
        raise UsageError(f"tracing.endpoint: got None, expected {words}")
    return TracingConfig(
        endpoint,
        section.number("sample", TracingConfig.sample, least=0, most=1),
        section.flag("follow_clients", TracingConfig.follow_clients),
        section.text("service", TracingConfig.service),
    )
