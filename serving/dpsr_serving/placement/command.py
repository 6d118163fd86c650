"""`dpsr place`: decides which servers hold which models, and moves them.

The servers themselves say what they hold (GetModelStatus); there is no other state. They are changed by
HandleReloadConfigRequest, which takes the whole list of a server's models. placement.py has the method.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import yaml
from absl import flags

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.strict_yaml import Section, load_yaml, read_file
from dpsr_serving.addresses import check_address
from dpsr_serving.placement.planner import (
    Misfit,
    Model,
    Server,
    Step,
    StuckError,
    assign,
    format_bytes,
    memory_needed,
    schedule,
)

USAGE = """
Usage: dpsr place --config=placement.yaml [--apply] [--rebalance] [--proxy_config=proxy.yaml]

Places models on model servers: within their memory, replicas on different servers, few moves from what stands.

  servers:
    a: {address: "10.0.0.1:8500", memory: 64GiB, zone: east}
    b: {address: "10.0.0.2:8500", memory: 64GiB, zone: west}
  models:
    shop: {base_path: /models/shop, memory: 12GiB, replicas: 2}

Shows the plan. With --apply it is carried out: a model is loaded at its new place before it leaves the old one.
docs/operations.md has every key.
"""
REQUIRED_FLAGS = ("config",)

# A loaded version takes more than its files: the session, and what its tables are built of.
_MEMORY_OVER_FILES = 1.2
_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_ASK_TIMEOUT_S = 10.0
_LOOK_S = 0.1
_FAILED_S = 5.0  # that a version stays failed: a server that looks again takes a moment
_MODELS_SHOWN = 6  # in one line of the progress

Held = Mapping[str, frozenset[str]]


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """A model of the file: what is placed, and what its servers are told.

    Attributes:
        placed: name, memory, replicas.
        base_path: the directory of its versions, as the servers see it.
        versions: those to serve; empty: the `latest` highest.
        latest: number of versions.
        labels: names of versions.
    """

    placed: Model
    base_path: str
    versions: tuple[int, ...]
    latest: int
    labels: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class PlacementConfig:
    """Everything the file says; `addresses` are those of the servers, `tls` is what the proxy's tls.backends takes."""

    models: Mapping[str, ModelEntry]
    servers: Mapping[str, Server]
    addresses: Mapping[str, str]
    tls: Mapping[str, str]


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("config", None, "YAML file with the servers and the models.", flag_values=values)
    flags.DEFINE_boolean("apply", False, "Carries the plan out.", flag_values=values)
    flags.DEFINE_boolean(
        "rebalance", False, "Also moves models until the servers are loaded alike, within a tenth.", flag_values=values
    )
    flags.DEFINE_boolean(
        "offline", False, "Asks no server and plans as if all were empty, to see what fits.", flag_values=values
    )
    flags.DEFINE_string(
        "proxy_config",
        None,
        "Proxy's YAML file; each model's backends are written into it as they change, the rest is kept, "
        "comments are not.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "config_dir",
        None,
        "Directory for each server's list of models, NAME.config, for its --model_config_file: one that starts "
        "again has them.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "settle_s",
        5.0,
        "Seconds that proxies have to notice new places before models leave the old ones.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_float(
        "timeout_s", 600.0, "Seconds that the models of one step may take to load.", lower_bound=1, flag_values=values
    )


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Shows the plan and, with --apply, carries it out.

    Raises:
        CommandError: something does not fit, a server does not answer, a model does not load; UsageError for the flags
            and the file.
    """
    if values.offline and values.apply:
        raise UsageError("--offline plans for empty servers; leave it out with --apply")
    for name in ("proxy_config", "config_dir"):
        if values[name].value is not None and not values.apply:
            raise UsageError(f"--{name} is written while a plan is carried out: give --apply too")
    config = read_file(Path(values.config), parse_config)
    routing = None if values.proxy_config is None else ProxyRouting(Path(values.proxy_config), config)
    config_dir = None if values.config_dir is None else Path(values.config_dir)
    with _Fleet(config, values.timeout_s, config_dir) as fleet:
        known = _Known({}, {}, frozenset()) if values.offline else fleet.look()
        for name in sorted(known.silent):
            if not config.servers[name].leaving:
                raise CommandError(
                    f"server {name} ({config.addresses[name]}) does not answer; start it, or say `leaving: true` "
                    "so that its models go elsewhere"
                )
        models = [entry.placed for entry in config.models.values()]
        servers = list(config.servers.values())
        target, misfits = assign(models, servers, known.held, values.rebalance)
        steps: list[Step] = []
        stuck: Sequence[str] = ()
        if not misfits:
            try:
                steps = schedule(models, servers, known.answering, target)
            except StuckError as error:
                stuck = error.models
        print(plan_text(config, known.held, target, steps, misfits, known.silent))
        if misfits:
            raise CommandError(
                f"{sum(m.replicas for m in misfits)} replicas of {len(misfits)} models do not fit; "
                "nothing was changed: add a server or memory, or place less"
            )
        if stuck:
            raise CommandError(
                f"the plan fits, but no order of moves keeps every model answering: {', '.join(stuck)} wait for room; "
                "nothing was changed: add a server for a while"
            )
        if values.apply:
            _apply(fleet, known, target, steps, routing, values.settle_s)
        else:
            print("nothing was changed; --apply carries it out")
        sys.stdout.flush()


def parse_config(text: str) -> PlacementConfig:
    """Reads a placement file. Raises UsageError that names key, value and what is allowed."""
    top = Section("", load_yaml(text), ("servers", "models", "swap_room", "tls"))
    servers, addresses = {}, {}
    for name, section in _sections(top, "servers", ("address", "memory", "zone", "leaving")):
        addresses[name] = check_address(f"{section.key}address", section.tree.get("address"))
        memory = _bytes(section)
        if memory is None:
            raise UsageError(f"{section.key}memory: got None, expected bytes for models, such as 64GiB")
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
        raise UsageError(f"{section.key}latest: got versions too; give one of them")
    latest = section.integer("latest", 1, 1)
    labels: dict[str, int] = section.value(
        "labels",
        {},
        lambda value: (
            isinstance(value, dict) and all(isinstance(k, str) and k and _is_version(v) for k, v in value.items())
        ),
        "a mapping of labels to version numbers",
    )
    count = len(set(versions)) or latest
    one = _bytes(section)
    if one is None:
        one = _measure(f"{section.key}memory", base_path, versions, latest)
    placed = Model(
        name,
        memory=one * count,
        swap=one if swap_room else 0,
        replicas=section.integer("replicas", 1, 1),
        requests=float(section.number("requests_per_s", 0.0, least=0)),
    )
    return ModelEntry(placed, base_path, tuple(sorted(set(versions))), latest, labels)


def _is_version(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _bytes(section: Section) -> int | None:
    """The key `memory` in bytes: a number, or one with a unit."""
    words = f"bytes above 0, or a number with a unit such as 12GiB ({', '.join(unit for unit in _UNITS if unit)})"
    value = section.value("memory", None, lambda value: _parse_bytes(value) > 0, words)
    return None if value is None else _parse_bytes(value)


def _parse_bytes(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return 0
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", str(value))
    return int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0


def _measure(key: str, base_path: str, versions: Sequence[int], latest: int) -> int:
    """Memory of the largest version that shall be served, by its files. Raises UsageError where there is none."""
    try:
        numbers = sorted(int(child) for child in os.listdir(base_path) if child.isdecimal())
    except OSError as error:
        raise UsageError(
            f"{key}: not given, and the files cannot be measured here: {base_path}: {error.strerror}; "
            "give the bytes of one version"
        ) from None
    served = [number for number in numbers if number in versions] if versions else numbers[-latest:]
    sizes = [
        sum(file.stat().st_size for file in (Path(base_path) / str(number)).rglob("*") if file.is_file())
        for number in served
    ]
    if not any(sizes):
        raise UsageError(f"{key}: not given, and {base_path} has no version to measure; give the bytes of one version")
    return int(max(sizes) * _MEMORY_OVER_FILES)


@dataclasses.dataclass(frozen=True)
class _Known:
    """What the servers said: `held` is loaded or loading, `answering` is loaded; `silent` ones said nothing."""

    held: Held
    answering: Held
    silent: frozenset[str]


class _Fleet:
    """Connections to the servers. A context manager."""

    def __init__(self, config: PlacementConfig, timeout_s: float, config_dir: Path | None) -> None:
        # Here, not at the top: gRPC is slow to import, and `--help` does without.
        import grpc

        from dpsr_common import serving_apis

        self._grpc = grpc
        self._apis = serving_apis
        self._timeout_s = timeout_s
        self._config_dir = config_dir
        self.config = config
        options = list(serving_apis.CHANNEL_OPTIONS)
        credentials = None
        if config.tls:
            from dpsr_serving.client import Tls

            try:
                credentials = Tls(**config.tls).credentials()
            except OSError as error:
                raise UsageError(f"tls: {error.filename}: {error.strerror}") from None
            if "server_name" in config.tls:
                options.append(("grpc.ssl_target_name_override", config.tls["server_name"]))
        self._channels = {
            name: grpc.secure_channel(address, credentials, options=options)
            if credentials
            else grpc.insecure_channel(address, options=options)
            for name, address in config.addresses.items()
        }
        self._pool = futures.ThreadPoolExecutor(max(1, min(64, len(self._channels))))

    def __enter__(self) -> _Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for channel in self._channels.values():
            channel.close()

    def look(self) -> _Known:
        """Asks every server for every model."""
        available, coming = {"AVAILABLE"}, {"START", "LOADING", "AVAILABLE"}

        def ask(server: str) -> tuple[set[str], set[str]] | None:
            held: set[str] = set()
            answering: set[str] = set()
            for model in self.config.models:
                states = self._states(server, model)
                if states is None:
                    return None
                if coming & {state for state, _ in states.values()}:
                    held.add(model)
                if available & {state for state, _ in states.values()}:
                    answering.add(model)
            return held, answering

        found = dict(zip(self._channels, self._pool.map(ask, self._channels), strict=True))
        return _Known(
            {server: frozenset(sets[0]) for server, sets in found.items() if sets is not None},
            {server: frozenset(sets[1]) for server, sets in found.items() if sets is not None},
            frozenset(server for server, sets in found.items() if sets is None),
        )

    def _states(self, server: str, model: str) -> dict[int, tuple[str, str]] | None:
        """Version -> (state, error) of a model, {} where the server does not know it; None: the server is not there."""
        request = self._apis.GetModelStatusRequest()
        request.model_spec.name = model
        try:
            answer = self._channels[server].unary_unary(
                self._apis.GET_MODEL_STATUS,
                request_serializer=self._apis.GetModelStatusRequest.SerializeToString,
                response_deserializer=self._apis.GetModelStatusResponse.FromString,
            )(request, timeout=_ASK_TIMEOUT_S)
        except self._grpc.RpcError as error:
            if error.code() is self._grpc.StatusCode.NOT_FOUND:
                return {}
            if error.code() in (self._grpc.StatusCode.UNAVAILABLE, self._grpc.StatusCode.DEADLINE_EXCEEDED):
                return None
            raise CommandError(
                f"server {server} ({self.config.addresses[server]}) did not say what it holds: {error.code().name}: "
                f"{error.details()}"
            ) from None
        name = self._apis.ModelVersionStatus.State.Name
        return {
            status.version: (name(status.state), status.status.error_message if status.status.error_code else "")
            for status in answer.model_version_status
        }

    def change(self, wanted: Held) -> list[str]:
        """Gives each server its whole list of models, all at a time, and waits until these answer.

        Returns:
            What went wrong, a line each.
        """

        def change_one(server: str) -> str:
            problem = self._reload(server, wanted[server])
            return f"server {server} ({self.config.addresses[server]}): {problem}" if problem else ""

        return [problem for problem in self._pool.map(change_one, sorted(wanted)) if problem]

    def _reload(self, server: str, models: frozenset[str]) -> str:
        """Changes one server; returns what went wrong or ""."""
        end = time.monotonic() + self._timeout_s
        request = self._apis.ReloadConfigRequest()
        request.config.model_config_list.SetInParent()
        for name in sorted(models):
            entry = self.config.models[name]
            model = request.config.model_config_list.config.add(
                name=name, base_path=entry.base_path, model_platform="tensorflow"
            )
            if entry.versions:
                model.model_version_policy.specific.versions.extend(entry.versions)
            else:
                model.model_version_policy.latest.num_versions = entry.latest
            model.version_labels.update(entry.labels)
        try:
            answer = self._channels[server].unary_unary(
                self._apis.RELOAD_CONFIG,
                request_serializer=self._apis.ReloadConfigRequest.SerializeToString,
                response_deserializer=self._apis.ReloadConfigResponse.FromString,
            )(request, timeout=self._timeout_s)
        except self._grpc.RpcError as error:
            return "; ".join([f"{error.code().name}: {error.details()}", *self._load_errors(server, models)])
        if answer.status.error_code:
            return str(answer.status.error_message)
        problem = self._await(server, models, end)
        if not problem and self._config_dir is not None:
            from google.protobuf import text_format

            _write_file(self._config_dir / f"{server}.config", text_format.MessageToString(request.config))
        return problem

    def _load_errors(self, server: str, models: frozenset[str]) -> list[str]:
        """Why versions that the file names did not load: a refused label does not tell."""
        named = [(model, version) for model in sorted(models) for version in self.config.models[model].versions]
        states = {model: self._states(server, model) or {} for model, _ in named}
        errors = ((model, version, states[model].get(version, ("", ""))[1]) for model, version in named)
        return [f"model {model} version {version}: {error}" for model, version, error in errors if error]

    def _await(self, server: str, models: frozenset[str], end: float) -> str:
        """Waits until the models answer with all versions that they shall have; returns what went wrong or ""."""
        failed_since: dict[str, float] = {}
        waiting = sorted(models)
        while True:
            problem = ""
            for model in list(waiting):
                states = self._states(server, model)
                if states is None:
                    return "does not answer any more"
                entry = self.config.models[model]
                available = {version for version, (state, _) in states.items() if state == "AVAILABLE"}
                if (available >= set(entry.versions)) if entry.versions else available:
                    waiting.remove(model)
                    continue
                wanted = entry.versions or tuple(states)
                errors = [f"version {v}: {states[v][1]}" for v in wanted if v in states and states[v][1]]
                said = {version: state for version, (state, _) in states.items()} or "no version"
                problem = problem or f"model {model} is not available: {'; '.join(errors) or said}"
                if errors and time.monotonic() - failed_since.setdefault(model, time.monotonic()) > _FAILED_S:
                    return f"model {model} did not load: {'; '.join(errors)}"
                if not errors:
                    failed_since.pop(model, None)
            if not waiting:
                return ""
            if time.monotonic() > end:
                return f"not within --timeout_s={self._timeout_s:g}: {problem}"
            time.sleep(_LOOK_S)


class ProxyRouting:
    """The backends of the placed models in a proxy's configuration file; everything else in it stays.

    Raises:
        UsageError: the file is none that a proxy takes, or has a placed model in shards.
    """

    def __init__(self, path: Path, config: PlacementConfig) -> None:
        self._path = path
        self._config = config
        tree = self._read()
        for name in config.models:
            if isinstance(tree["models"].get(name), dict) and "shards" in tree["models"][name]:
                raise UsageError(f"{path}: models.{name} has shards, which are not placed; take it out of one file")

    def _read(self) -> dict[str, Any]:
        if not self._path.exists():
            return {"models": {}}

        def parse(text: str) -> dict[str, Any]:
            from dpsr_serving.proxy.config import parse_config as check

            check(text)
            tree = dict(load_yaml(text))
            return {**tree, "models": dict(tree.get("models") or {})}

        return read_file(self._path, parse)

    def write(self, held: Held) -> None:
        """Writes where the models answer, by one rename; what answers nowhere keeps what the file says."""
        tree = self._read()
        for name in self._config.models:
            backends = [self._config.addresses[server] for server in sorted(held) if name in held[server]]
            if backends:
                tree["models"][name] = {**(tree["models"].get(name) or {}), "backends": backends}
        text = "# The backends of models are written by `dpsr place`.\n" + yaml.safe_dump(
            tree, sort_keys=False, allow_unicode=True, width=120
        )
        _write_file(self._path, text)


def _write_file(path: Path, text: str) -> None:
    """Puts a file in place by one rename. Raises CommandError."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CommandError(f"{path}: cannot be written: {error.strerror}") from error


def _apply(
    fleet: _Fleet, known: _Known, target: Held, steps: Sequence[Step], routing: ProxyRouting | None, settle_s: float
) -> None:
    """Carries the steps out, then tells every server its final list, with the labels and versions of the file."""
    state = {server: set(names) for server, names in known.answering.items()}
    told: set[str] = set()
    for number, step in enumerate(steps, 1):
        changed = sorted({server for server, _ in (*step.adds, *step.removes)} - known.silent)
        begin = time.monotonic()
        for server, model in step.adds:
            state[server].add(model)
        for server, model in step.removes:
            state[server].discard(model)
        if step.removes:
            if routing is not None:
                routing.write(_frozen(state))
            time.sleep(settle_s)
        problems = fleet.change({server: frozenset(state[server]) for server in changed})
        if problems:
            raise _failure(fleet, step, number, len(steps), problems)
        told |= {server for server in changed if state[server] == target[server]}
        what = f"loaded {_pairs(step.adds)}" if step.adds else f"unloaded {_pairs(step.removes)}"
        print(f"step {number} of {len(steps)}: {what} ({time.monotonic() - begin:.1f} s)", flush=True)
    staying = [server for server in state if not fleet.config.servers[server].leaving]
    rest = {server: target[server] for server in staying if server not in told}
    problems = fleet.change(rest)
    if problems:
        raise CommandError("the models are in place, but not all as the file says:\n" + "\n".join(problems))
    if routing is not None:
        routing.write(_frozen(state))
    print(f"done: {sum(map(len, target.values()))} replicas answer as planned")


def _frozen(state: Mapping[str, set[str]]) -> Held:
    return {server: frozenset(names) for server, names in state.items()}


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    by_server: dict[str, list[str]] = {}
    for server, model in pairs:
        by_server.setdefault(server, []).append(model)
    parts = []
    for server, models in sorted(by_server.items()):
        more = f" and {len(models) - _MODELS_SHOWN} more" if len(models) > _MODELS_SHOWN else ""
        parts.append(f"{server}: {', '.join(models[:_MODELS_SHOWN])}{more}")
    return "; ".join(parts)


def _failure(fleet: _Fleet, step: Step, number: int, of: int, problems: Sequence[str]) -> CommandError:
    """The error of a step, and where its models stand now."""
    print(f"step {number} of {of} failed:", *problems, sep="\n  ")
    known = fleet.look()
    for model in sorted({model for _, model in (*step.adds, *step.removes)}):
        answering = sorted(server for server, names in known.answering.items() if model in names)
        print(f"  {model} answers on: {', '.join(answering) or 'no server'}")
    for server in sorted(known.silent):
        print(f"  server {server} does not answer")
    return CommandError(
        f"step {number} of {of} failed: {problems[0]}; nothing after it was done: mend it and run the command again, "
        "which goes on from what stands"
    )


def plan_text(
    config: PlacementConfig,
    before: Held,
    after: Held,
    steps: Sequence[Step],
    misfits: Sequence[Misfit],
    silent: frozenset[str] = frozenset(),
) -> str:
    """The plan as tables: the memory of each server before and after, the moves, what does not fit."""
    models = {name: entry.placed for name, entry in config.models.items()}

    def usage(held: Held, server: Server) -> tuple[str, str, str]:
        placed = [models[name] for name in held.get(server.name, ())]
        needed = memory_needed(placed)
        return str(len(placed)), format_bytes(needed), f"{100 * needed / server.memory:.0f} %"

    rows = [("server", "memory", "models", "need", "", "->", "models", "need", "", "")]
    for name, server in config.servers.items():
        note = ("leaves" if server.leaving else "") + (", does not answer" if name in silent else "")
        rows.append((name, format_bytes(server.memory), *usage(before, server), "->", *usage(after, server), note))
    lines = _columns(rows)

    moves: list[tuple[str, ...]] = []
    for name, model in models.items():
        added = [f"+ {server}" for server in config.servers if name in after[server] - before.get(server, frozenset())]
        taken = [f"- {server}" for server in config.servers if name in before.get(server, frozenset()) - after[server]]
        if added or taken:
            moves.append((name, format_bytes(model.memory), ", ".join((*added, *taken))))
    if moves:
        lines += ["", *_columns([("model", "memory", "moves"), *moves])]
    if misfits:
        rows_of_misfits = [(m.model, f"{m.replicas} of {models[m.model].replicas}", m.reason) for m in misfits]
        lines += ["", *_columns([("does not fit", "replicas", "why"), *rows_of_misfits])]
    loads = [model for step in steps for _, model in step.adds]
    size = format_bytes(sum(models[model].memory for model in loads))
    summary = f"{len(loads)} loads, {size}, in {len(steps)} steps" if steps else "no moves"
    return "\n".join([*lines, "", *([] if misfits else [summary])]).rstrip()


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align: list[Callable[[str, int], str]] = [str.ljust, *[str.rjust] * (len(widths) - 2), str.ljust]
    return ["  ".join(a(cell, w) for a, cell, w in zip(align, row, widths, strict=True)).rstrip() for row in rows]
