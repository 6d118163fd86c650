"""`dpsr place`: decides which servers hold which models, and moves them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.strict_yaml import read_file
from dpsr_serving.placement.config import PlacementConfig, parse_config
from dpsr_serving.placement.fleet import Fleet, FleetState
from dpsr_serving.placement.planner import (
    Assignment,
    Misfit,
    Server,
    Step,
    StuckError,
    assign,
    format_bytes,
    memory_needed,
    schedule,
)
from dpsr_serving.placement.rollout import ProxyRouting, roll_out

USAGE = """
Usage: dpsr place --config=placement.yaml [--apply] [--rebalance] [--proxy_config=proxy.yaml]

Decides which model servers hold which models. The models of a server fit into its memory, replicas of a model
are on different servers, and as few models as possible move from where they are now.

  servers:
    a: {address: "10.0.0.1:8500", memory: 64GiB, zone: east}
    b: {address: "10.0.0.2:8500", memory: 64GiB, zone: west}
  models:
    shop: {base_path: /models/shop, memory: 12GiB, replicas: 2}

Prints the plan and changes nothing. With --apply the plan is carried out: a model is loaded on its new server
before the old one unloads it. docs/operations.md explains every key of the file.
"""
REQUIRED_FLAGS = ("config",)


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("config", None, "YAML file that lists the servers and the models", flag_values=values)
    flags.DEFINE_boolean("apply", False, "carry the plan out. Without this flag it is only printed", flag_values=values)
    flags.DEFINE_boolean(
        "rebalance",
        False,
        "also move models between servers until no server's load is more than a tenth above the average",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "offline",
        False,
        "contact no server and plan as if all were empty, to see whether everything fits",
        flag_values=values,
    )
    flags.DEFINE_string(
        "proxy_config",
        None,
        "configuration file of the proxy. The backends of each model are written into it whenever they change. "
        "All other settings are kept, but comments are lost",
        flag_values=values,
    )
    flags.DEFINE_string(
        "config_dir",
        None,
        "directory to write each server's list of models to, as NAME.config. A server that is started with "
        "--model_config_file=NAME.config has its models again after a restart",
        flag_values=values,
    )
    flags.DEFINE_float(
        "settle_s",
        5.0,
        "seconds to wait before models leave their old servers, so that proxies notice the new ones",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_float(
        "timeout_s", 600.0, "seconds that the models of one step may take to load", lower_bound=1, flag_values=values
    )


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Prints the plan and, with --apply, carries it out.

    Raises:
        UsageError: the flags or the file are wrong.
        CommandError: something does not fit, a server does not answer, or a model does not load.
    """
    if values.offline and values.apply:
        raise UsageError("--offline cannot be combined with --apply: it plans as if all servers were empty")
    for name in ("proxy_config", "config_dir"):
        if values[name].value is not None and not values.apply:
            raise UsageError(f"--{name} needs --apply: the files are written while the plan is carried out")
    config = read_file(Path(values.config), parse_config)
    routing = None if values.proxy_config is None else ProxyRouting(Path(values.proxy_config), config)
    config_dir = None if values.config_dir is None else Path(values.config_dir)
    with Fleet(config, values.timeout_s, config_dir) as fleet:
        present = FleetState({}, {}, frozenset()) if values.offline else fleet.read_state()
        _check_silent(config, present)
        target, steps = _make_plan(config, present, values.rebalance)
        if values.apply:
            roll_out(fleet, present, target, steps, routing, values.settle_s)
        else:
            print("nothing was changed; --apply carries it out")
        sys.stdout.flush()


def _check_silent(config: PlacementConfig, present: FleetState) -> None:
    """Raises CommandError for a server that does not answer, unless it is to lose its models anyway."""
    for name in sorted(present.silent):
        if not config.servers[name].leaving:
            raise CommandError(
                f"server {name} ({config.addresses[name]}) does not answer; start it, or say `leaving: true` "
                "so that its models go elsewhere"
            )


def _make_plan(
    config: PlacementConfig, present: FleetState, rebalance: bool
) -> tuple[dict[str, frozenset[str]], list[Step]]:
    """Computes and prints the plan: the models of each server, and the steps to get there. Raises CommandError."""
    models = [entry.model for entry in config.models.values()]
    servers = list(config.servers.values())
    target, misfits = assign(models, servers, present.held, rebalance)
    steps: list[Step] = []
    stuck: Sequence[str] = ()
    if not misfits:
        try:
            steps = schedule(models, servers, present.answering, target)
        except StuckError as error:
            stuck = error.models
    print(plan_text(config, present.held, target, steps, misfits, present.silent))
    if misfits:
        raise CommandError(
            f"{sum(m.replicas for m in misfits)} replicas of {len(misfits)} models do not fit; "
            "nothing was changed: add a server or memory, or place less"
        )
    if stuck:
        raise CommandError(
            "the plan fits, but no order of moves keeps every model answering: there is no room to load "
            f"{', '.join(stuck)}; nothing was changed: add a server for a while"
        )
    return target, steps


def plan_text(
    config: PlacementConfig,
    before: Assignment,
    after: Assignment,
    steps: Sequence[Step],
    misfits: Sequence[Misfit],
    silent: frozenset[str] = frozenset(),
) -> str:
    """Returns the plan as tables: each server's memory before and after, the moves, and the models that do not fit."""
    models = {name: entry.model for name, entry in config.models.items()}

    def usage(assignment: Assignment, server: Server) -> tuple[str, str, str]:
        placed = [models[name] for name in assignment.get(server.name, ())]
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
    """Aligns the cells of rows: the first and last columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align: list[Callable[[str, int], str]] = [str.ljust, *[str.rjust] * (len(widths) - 2), str.ljust]
    return ["  ".join(a(cell, w) for a, cell, w in zip(align, row, widths, strict=True)).rstrip() for row in rows]
