"""Decides which model servers hold which models, and in which order of steps to get there.

Both functions, assign() and schedule(), are pure and deterministic: the same input gives the same answer, in whatever
order its parts are listed. Section 5.2.2 of the DPSR paper states the need (hundreds of models of tens of gigabytes);
the method is our own.

The models of a server fit if the server's memory holds all of them plus the largest single version once more: a new
version loads while its predecessor still answers. Replicas of a model are on different servers. Among the assignments
that place every replica, the one with the fewest moves wins; a replica that stays on its server is no move. New places
are chosen by zone first, then by load. Bin packing is NP-hard, so assign() tries cheap rules first, which mostly
succeed, and then improves their result by an exhaustive search with a bounded number of steps, which is exact for small
inputs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

Assignment = Mapping[str, frozenset[str]]  # server -> models on it

_CHAIN_LENGTH = 3  # longest chain of replicas that make room for each other
_CHAIN_TRIES = 5_000  # attempts to move one replica for another, in one call of fill()
_SEARCH_NODES = 20_000  # most nodes that the exhaustive search visits
# There is no exhaustive search for more models than this, or if one model has more possible sets of servers than this.
_SEARCH_MODELS = 200
_SEARCH_CHOICES = 500
_BALANCED = 1.1  # rebalancing stops when no load is above this multiple of the mean


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to place.

    Attributes:
        name: the model's name in requests.
        memory: bytes that one replica takes, all its versions together.
        swap: further bytes that must stay free for its next version; 0 if versions do not change while it serves.
        replicas: number of servers that should hold it.
        requests: requests per second to all replicas together. They spread the load and never rule out a place.
    """

    name: str
    memory: int
    swap: int = 0
    replicas: int = 1
    requests: float = 0.0


@dataclasses.dataclass(frozen=True)
class Server:
    """A server to place models on.

    Attributes:
        name: the server's name.
        memory: bytes that its models may take.
        zone: replicas of a model go to different zones where possible.
        leaving: whether it must lose all its models.
    """

    name: str
    memory: int
    zone: str = ""
    leaving: bool = False


@dataclasses.dataclass(frozen=True)
class Misfit:
    """The number of replicas of a model that fit on no server, and the reason."""

    model: str
    replicas: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Step:
    """Changes that can be made at the same time: either additions or removals, each a pair (server, model)."""

    adds: tuple[tuple[str, str], ...] = ()
    removes: tuple[tuple[str, str], ...] = ()


class StuckError(Exception):
    """No order of steps keeps every model answering within the memory; there is no room to load `models`."""

    def __init__(self, models: Sequence[str]) -> None:
        super().__init__(", ".join(models))
        self.models = tuple(models)


def memory_needed(models: Iterable[Model]) -> int:
    """Returns the bytes that a server needs for these models, room for a next version included."""
    models = list(models)
    return sum(model.memory for model in models) + max((model.swap for model in models), default=0)


def assign(
    models: Sequence[Model], servers: Sequence[Server], present: Assignment, rebalance: bool = False
) -> tuple[dict[str, frozenset[str]], list[Misfit]]:
    """Decides which servers hold which models.

    Args:
        models: the models, with distinct names.
        servers: the servers, with distinct names.
        present: what the servers hold now; models and servers that are not in the lists are ignored.
        rebalance: whether to also move replicas until no server has over a tenth more load than the mean.

    Returns:
        The models of every server, and the replicas that fit nowhere; if there are none of those, every model has all
        its replicas.
    """
    models = sorted(models, key=lambda model: (-model.memory, model.name))
    active = sorted((server for server in servers if not server.leaving), key=lambda server: server.name)
    by_name = {model.name: model for model in models}
    held = {server.name: {m for m in present.get(server.name, ()) if m in by_name} for server in active}
    start = _Packing(models, active)
    for server, names in held.items():
        for name in sorted(names):
            start.add(by_name[name], server)
    least_moves = sum(max(0, _wanted(model, active) - len(start.holders(model.name))) for model in models)

    best: _Packing | None = None
    for keep, tight in ((True, False), (True, True), (False, True)):
        packing = start.copy() if keep else _Packing(models, active)
        packing.trim()
        packing.fill(tight)
        if best is None or packing.cost(held) < best.cost(held):
            best = packing
        if best.cost(held) == (0, least_moves):
            break
    assert best is not None
    if best.cost(held) > (0, least_moves):
        best = _search(models, active, held, best)
    if rebalance:
        best.rebalance()
    misfits = [
        Misfit(model.name, model.replicas - len(best.holders(model.name)), best.why_not(model))
        for model in models
        if len(best.holders(model.name)) < model.replicas
    ]
    return {server.name: frozenset(best.on.get(server.name, ())) for server in servers}, misfits


def schedule(models: Sequence[Model], servers: Sequence[Server], present: Assignment, target: Assignment) -> list[Step]:
    """Returns the steps from `present` to `target`, in order.

    After every step, a model that has a server in both assignments is on at least one. During a step, no server holds
    more than its memory (but room for new versions is not kept free). A replica is removed after the model's new
    replicas have been loaded. Only where nothing else makes room is it removed earlier or moved to a third server.

    Raises:
        StuckError: no such order was found.
    """
    by_name = {model.name: model for model in models}
    memory = {server.name: server.memory for server in servers}
    state = {name: {m for m in present.get(name, ()) if m in by_name} for name in memory}
    goal = {name: set(target.get(name, ())) for name in memory}
    detours: dict[str, str] = {}  # model -> the third server
    steps: list[Step] = []

    def free(server: str) -> int:
        return memory[server] - sum(by_name[model].memory for model in state[server])

    def missing() -> list[tuple[str, str]]:
        pairs = ((server, model) for server in state for model in goal[server] - state[server])
        return sorted(pairs, key=lambda pair: (-by_name[pair[1]].memory, pair))

    def surplus() -> list[tuple[str, str]]:
        return sorted((server, model) for server in state for model in state[server] - goal[server])

    def take(step: Step) -> None:
        for server, model in step.adds:
            state[server].add(model)
        for server, model in step.removes:
            state[server].remove(model)
        steps.append(step)

    while True:
        room = {server: free(server) for server in state}
        adds = []
        for server, model in missing():
            if by_name[model].memory <= room[server]:
                room[server] -= by_name[model].memory
                adds.append((server, model))
        if adds:
            take(Step(adds=tuple(sorted(adds))))
            continue
        waiting = missing()
        late = {model for _, model in waiting}
        done = tuple(pair for pair in surplus() if pair[1] not in late)
        if done:
            take(Step(removes=done))
            continue
        if not waiting:
            return steps
        # Nothing fits. Remove early a replica of a model that has others; if there is none, move one to a third server.
        full = {server for server, _ in waiting}
        going = [(server, model) for server, model in surplus() if server in full and detours.get(model) != server]
        spare = [pair for pair in going if sum(pair[1] in names for names in state.values()) > 1]
        if spare:
            take(Step(removes=(spare[0],)))
            continue
        ways = [
            (by_name[model].memory, server, model)
            for _, model in going
            if model not in detours
            for server in state
            if model not in state[server] and by_name[model].memory <= free(server)
        ]
        if not ways:
            raise StuckError(sorted(late))
        _, server, model = min(ways)
        detours[model] = server
        take(Step(adds=((server, model),)))


def _wanted(model: Model, servers: Sequence[Server]) -> int:
    return min(model.replicas, len(servers))


class _Packing:
    """A changeable assignment of models to servers. `models` are sorted by size, largest first, `servers` by name."""

    def __init__(self, models: Sequence[Model], servers: Sequence[Server]) -> None:
        self.models = models
        self.servers = servers
        self.on: dict[str, dict[str, Model]] = {server.name: {} for server in servers}
        self._held = dict.fromkeys(self.on, 0)
        self._swap = dict.fromkeys(self.on, 0)  # the largest `swap` among the models of a server
        self._requests = dict.fromkeys(self.on, 0.0)
        self._tries = 0

    def copy(self) -> _Packing:
        other = _Packing(self.models, self.servers)
        for server, held in self.on.items():
            for model in held.values():
                other.add(model, server)
        return other

    def add(self, model: Model, server: str) -> None:
        self.on[server][model.name] = model
        self._held[server] += model.memory
        self._swap[server] = max(self._swap[server], model.swap)
        self._requests[server] += model.requests / model.replicas

    def remove(self, model: Model, server: str) -> None:
        del self.on[server][model.name]
        self._held[server] -= model.memory
        if model.swap and model.swap == self._swap[server]:
            self._swap[server] = max((other.swap for other in self.on[server].values()), default=0)
        self._requests[server] -= model.requests / model.replicas

    def holders(self, model: str) -> list[str]:
        return [server for server, held in self.on.items() if model in held]

    def room(self, server: Server, swap: int = 0) -> int:
        """Returns the bytes left for one more model, whose next version takes `swap`; negative if already too full."""
        return server.memory - self._held[server.name] - max(self._swap[server.name], swap)

    def fits(self, model: Model, server: Server) -> bool:
        return model.name not in self.on[server.name] and model.memory <= self.room(server, model.swap)

    def trim(self) -> None:
        """Removes superfluous replicas, and models for which a server has no memory."""
        for model in self.models:
            holders = [server for server in self.servers if model.name in self.on[server.name]]
            kept: list[Server] = []
            while len(kept) < min(model.replicas, len(holders)):
                rest = (server for server in holders if server not in kept)
                zones = {server.zone for server in kept}
                kept.append(min(rest, key=lambda s: (self.room(s) < 0, s.zone in zones, self._load(s), s.name)))
            for server in holders:
                if server not in kept:
                    self.remove(model, server.name)
        for server in self.servers:
            while self.room(server) < 0:
                held = sorted(self.on[server.name].values(), key=lambda model: (model.memory, model.name))
                self.remove(next((m for m in held if self._room_without(server, m) >= 0), held[-1]), server.name)

    def _room_without(self, server: Server, model: Model) -> int:
        self.remove(model, server.name)
        room = self.room(server)
        self.add(model, server.name)
        return room

    def fill(self, tight: bool) -> None:
        """Places missing replicas, largest first, on the least loaded server or, if `tight`, on the fullest one."""
        self._tries = _CHAIN_TRIES
        for model in self.models:
            for _ in range(_wanted(model, self.servers) - len(self.holders(model.name))):
                if not self._put(model, _CHAIN_LENGTH, tight, ()):
                    break

    def _put(self, model: Model, chain: int, tight: bool, barred: tuple[str, ...]) -> bool:
        """Adds a replica, moving up to `chain` - 1 others if needed, none of them to the `barred` servers."""
        zones = {server.zone for server in self.servers if model.name in self.on[server.name]}
        options = [s for s in self.servers if model.name not in self.on[s.name] and s.name not in barred]
        if tight:
            options.sort(key=lambda s: (s.zone in zones, self.room(s), s.name))
        else:
            options.sort(key=lambda s: (s.zone in zones, *self._load_with(model, s), s.name))
        for server in options:
            if self.fits(model, server):
                self.add(model, server.name)
                return True
        if chain == 1:
            return False
        for server in options:
            for other in sorted(self.on[server.name].values(), key=lambda m: (m.memory, m.name)):
                self._tries -= 1
                if self._tries < 0:
                    return False
                self.remove(other, server.name)
                if self.fits(model, server):
                    self.add(model, server.name)
                    if self._put(other, chain - 1, tight, (*barred, server.name)):
                        return True
                    self.remove(model, server.name)
                self.add(other, server.name)
        return False

    def _load(self, server: Server) -> tuple[float, float]:
        """Returns the server's load: requests and memory in use, each divided by the server's memory."""
        return self._requests[server.name] / server.memory, self._held[server.name] / server.memory

    def _load_with(self, model: Model, server: Server) -> tuple[float, float]:
        requests = self._requests[server.name] + model.requests / model.replicas
        return requests / server.memory, (self._held[server.name] + model.memory) / server.memory

    def cost(self, held: Mapping[str, set[str]]) -> tuple[int, int]:
        """Returns the number of unplaced replicas, and of moves: replicas on servers that did not hold the model."""
        placed = sum(map(len, self.on.values()))
        wanted = sum(_wanted(model, self.servers) for model in self.models)
        return wanted - placed, sum(name not in held[server] for server, names in self.on.items() for name in names)

    def why_not(self, model: Model) -> str:
        """Returns why there is no place for one more replica."""
        if model.replicas > len(self.servers):
            return f"wants {model.replicas} servers, but only {len(self.servers)} stay"
        others = [server for server in self.servers if model.name not in self.on[server.name]]
        roomiest = max(others, key=lambda server: (self.room(server, model.swap), server.name))
        free = format_bytes(max(0, roomiest.memory - self._held[roomiest.name]))
        swap = max(self._swap[roomiest.name], model.swap)
        next_version = f", and {format_bytes(swap)} for a next version" if swap else ""
        needs = f"needs {format_bytes(model.memory)}{next_version}"
        return f"{needs}; of the servers without it, {roomiest.name} has the most free memory: {free}"

    def rebalance(self) -> None:
        """Moves replicas off the most loaded server, best move first, as long as that makes the loads more even."""
        memory = sum(server.memory for server in self.servers) or 1
        means = sum(self._requests.values()) / memory, sum(self._held.values()) / memory

        def pressure(server: Server) -> float:
            return max(part / mean if mean else 0.0 for part, mean in zip(self._load(server), means, strict=True))

        def unevenness(*two: Server) -> float:
            """Returns these servers' share of a sum of squares that is smallest when all servers have equal load."""
            return sum(
                server.memory * sum((p / m) ** 2 for p, m in zip(self._load(server), means, strict=True) if m)
                for server in two
            )

        while True:
            fullest = max(self.servers, key=lambda server: (pressure(server), server.name), default=None)
            if fullest is None or pressure(fullest) <= _BALANCED:
                return
            gains: list[tuple[float, str, str]] = []
            for model in list(self.on[fullest.name].values()):
                zones = {s.zone for s in self.servers if model.name in self.on[s.name] and s != fullest}
                for server in self.servers:
                    if not self.fits(model, server) or (server.zone in zones and fullest.zone not in zones):
                        continue
                    before = unevenness(fullest, server)
                    self.remove(model, fullest.name)
                    self.add(model, server.name)
                    gains.append((unevenness(fullest, server) - before, model.name, server.name))
                    self.remove(model, server.name)
                    self.add(model, fullest.name)
            gain, name, to = min(gains, default=(0.0, "", ""))
            if gain > -1e-9 * memory:
                return
            model = self.on[fullest.name][name]
            self.remove(model, fullest.name)
            self.add(model, to)


def _search(
    models: Sequence[Model], servers: Sequence[Server], held: Mapping[str, set[str]], known: _Packing
) -> _Packing:
    """Searches by branch and bound for an assignment cheaper than `known`; exact unless the node limit stops it."""
    most_choices = max((math.comb(len(servers), _wanted(model, servers)) for model in models), default=0)
    if len(models) > _SEARCH_MODELS or most_choices > _SEARCH_CHOICES:
        return known
    choices = []
    for model in models:
        sets = itertools.combinations(servers, _wanted(model, servers))
        costs = [(sum(model.name not in held[server.name] for server in chosen), chosen) for chosen in sets]
        choices.append(sorted(costs, key=lambda cost: cost[0]))
    # For each model: the fewest moves and the memory that it and all models after it need.
    rest_moves = list(itertools.accumulate((sets[0][0] for sets in reversed(choices)), initial=0))[::-1]
    sizes = (model.memory * _wanted(model, servers) for model in reversed(models))
    rest_memory = list(itertools.accumulate(sizes, initial=0))[::-1]
    packing = _Packing(models, servers)
    unplaced, moves = known.cost(held)
    best, best_moves = known, moves if not unplaced else sum(len(sets[0][1]) for sets in choices) + 1
    nodes = _SEARCH_NODES

    def visit(index: int, moves: int) -> None:
        nonlocal best, best_moves, nodes
        nodes -= 1
        if nodes < 0 or moves + rest_moves[index] >= best_moves:
            return
        if index == len(models):
            best, best_moves = packing.copy(), moves
            return
        if rest_memory[index] > sum(max(0, packing.room(server)) for server in servers):
            return
        model = models[index]
        for more, chosen in choices[index]:
            if not all(packing.fits(model, server) for server in chosen):
                continue
            for server in chosen:
                packing.add(model, server.name)
            visit(index + 1, moves + more)
            for server in chosen:
                packing.remove(model, server.name)

    visit(0, 0)
    return best


def format_bytes(number: float) -> str:
    """Formats a number of bytes for people, such as "12.3 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
