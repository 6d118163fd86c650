"""Carries a placement plan out, step by step, and writes the new backends into a proxy's configuration file."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.strict_yaml import load_yaml, read_file
from dpsr_serving.placement.config import PlacementConfig
from dpsr_serving.placement.fleet import Fleet, FleetState, write_file
from dpsr_serving.placement.planner import Assignment, Step

_MODELS_SHOWN = 6  # names of models in one line of progress


class ProxyRouting:
    """The backends of the placed models in a proxy's configuration file; the rest of the file stays as it is.

    Raises:
        UsageError: the proxy would refuse the file, or the file spreads a placed model over shards.
    """

    def __init__(self, path: Path, config: PlacementConfig) -> None:
        self._path = path
        self._config = config
        tree = self._read()
        for name in config.models:
            if isinstance(tree["models"].get(name), dict) and "shards" in tree["models"][name]:
                raise UsageError(
                    f"{path}: models.{name} has shards, and `dpsr place` cannot place a model with shards; "
                    "remove the model from one of the two files"
                )

    def _read(self) -> dict[str, Any]:
        if not self._path.exists():
            return {"models": {}}

        def parse(text: str) -> dict[str, Any]:
            from dpsr_serving.proxy.config import parse_config as check

            check(text)
            tree = dict(load_yaml(text))
            return {**tree, "models": dict(tree.get("models") or {})}

        return read_file(self._path, parse)

    def write(self, answering: Assignment) -> None:
        """Writes where each model answers; a model that answers nowhere keeps the backends that it has in the file."""
        tree = self._read()
        for name in self._config.models:
            backends = [self._config.addresses[server] for server in sorted(answering) if name in answering[server]]
            if backends:
                tree["models"][name] = {**(tree["models"].get(name) or {}), "backends": backends}
        text = "# The backends of models are written by `dpsr place`.\n" + yaml.safe_dump(
            tree, sort_keys=False, allow_unicode=True, width=120
        )
        write_file(self._path, text)


def roll_out(
    fleet: Fleet,
    present: FleetState,
    target: Assignment,
    steps: Sequence[Step],
    routing: ProxyRouting | None,
    settle_s: float,
) -> None:
    """Carries the steps out, and then sends every server its final list, with the file's labels and versions.

    Before models leave a server, the proxy's file is written and proxies get `settle_s` seconds to read it.

    Raises:
        CommandError: a server did not do its part; the steps after that are not begun.
    """
    state = {server: set(names) for server, names in present.answering.items()}
    up_to_date: set[str] = set()
    for number, step in enumerate(steps, 1):
        changed = sorted({server for server, _ in (*step.adds, *step.removes)} - present.silent)
        begin = time.monotonic()
        for server, model in step.adds:
            state[server].add(model)
        for server, model in step.removes:
            state[server].discard(model)
        if step.removes:
            if routing is not None:
                routing.write(_frozen(state))
            time.sleep(settle_s)
        problems = fleet.set_models({server: frozenset(state[server]) for server in changed})
        if problems:
            raise _failure(fleet, step, number, len(steps), problems)
        up_to_date |= {server for server in changed if state[server] == target[server]}
        what = f"loaded {_by_server(step.adds)}" if step.adds else f"unloaded {_by_server(step.removes)}"
        print(f"step {number} of {len(steps)}: {what} ({time.monotonic() - begin:.1f} s)", flush=True)
    # Servers that no step changed may still hold other labels or versions than the file says.
    staying = [server for server in state if not fleet.config.servers[server].leaving]
    problems = fleet.set_models({server: target[server] for server in staying if server not in up_to_date})
    if problems:
        raise CommandError(
            "every model is on its servers, but not all versions and labels are as the file says:\n"
            + "\n".join(problems)
        )
    if routing is not None:
        routing.write(_frozen(state))
    print(f"done: {sum(map(len, target.values()))} replicas answer as planned")


def _frozen(state: Mapping[str, set[str]]) -> Assignment:
    return {server: frozenset(names) for server, names in state.items()}


def _by_server(pairs: Sequence[tuple[str, str]]) -> str:
    """Returns (server, model) pairs as text, "server: model, model; server: model"."""
    by_server: dict[str, list[str]] = {}
    for server, model in pairs:
        by_server.setdefault(server, []).append(model)
    parts = []
    for server, models in sorted(by_server.items()):
        more = f" and {len(models) - _MODELS_SHOWN} more" if len(models) > _MODELS_SHOWN else ""
        parts.append(f"{server}: {', '.join(models[:_MODELS_SHOWN])}{more}")
    return "; ".join(parts)


def _failure(fleet: Fleet, step: Step, number: int, num_steps: int, problems: Sequence[str]) -> CommandError:
    """Prints where the models of a failed step are now, and returns the error to raise."""
    print(f"step {number} of {num_steps} failed:", *problems, sep="\n  ")
    now = fleet.read_state()
    for model in sorted({model for _, model in (*step.adds, *step.removes)}):
        answering = sorted(server for server, names in now.answering.items() if model in names)
        print(f"  {model} answers on: {', '.join(answering) or 'no server'}")
    for server in sorted(now.silent):
        print(f"  server {server} does not answer")
    return CommandError(
        f"step {number} of {num_steps} failed: {problems[0]}; the later steps were not begun: "
        "remove the cause and run the command again, which continues from the present state"
    )
