"""The assignment of models to servers, and the steps that lead to it, on random instances."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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

Held = dict[str, frozenset[str]]


@st.composite
def instances(
    draw: st.DrawFn, most_models: int = 12, most_servers: int = 5
) -> tuple[list[Model], list[Server], dict[str, frozenset[str]]]:
    """Models, servers, and what the servers hold, which may exceed their memory and include unknown models."""
    models = [
        Model(
            f"m{i}",
            memory=draw(st.integers(1, 10)),
            swap=draw(st.sampled_from([0, 0, 1, 5])),
            replicas=draw(st.integers(1, 3)),
            requests=draw(st.sampled_from([0.0, 1.0, 7.5])),
        )
        for i in range(draw(st.integers(1, most_models)))
    ]
    servers = [
        Server(
            f"s{i}",
            memory=draw(st.integers(5, 40)),
            zone=draw(st.sampled_from(["", "x", "y"])),
            leaving=draw(st.sampled_from([False, False, False, True])),
        )
        for i in range(draw(st.integers(1, most_servers)))
    ]
    names = st.frozensets(st.sampled_from([*(model.name for model in models), "gone"]))
    return models, servers, {server.name: draw(names) for server in servers if draw(st.booleans())}


def holders(held: Mapping[str, frozenset[str]], model: str) -> set[str]:
    return {server for server, names in held.items() if model in names}


def moves(before: Mapping[str, frozenset[str]], after: Mapping[str, frozenset[str]]) -> int:
    return sum(len(names - before.get(server, frozenset())) for server, names in after.items())


@settings(max_examples=100, deadline=None)
@given(instances(), st.booleans())
def test_assignments_keep_the_rules(instance: tuple[list[Model], list[Server], Held], rebalance: bool) -> None:
    models, servers, present = instance
    after, misfits = assign(models, servers, present, rebalance)
    by_name = {model.name: model for model in models}
    assert set(after) == {server.name for server in servers}
    for server in servers:
        assert memory_needed(by_name[name] for name in after[server.name]) <= server.memory
        assert not (server.leaving and after[server.name])
    missing = {misfit.model: misfit.replicas for misfit in misfits}
    assert len(missing) == len(misfits)
    for model in models:
        assert len(holders(after, model.name)) == model.replicas - missing.get(model.name, 0)
    # Replicas that are placed as wanted stay, and the order of the input does not matter.
    if not misfits:
        assert assign(models, servers, after, rebalance) == (after, [])
    assert assign(models[::-1], servers[::-1], present, rebalance) == (after, misfits)


def cheapest(models: list[Model], servers: list[Server], present: Held) -> int | None:
    """The fewest moves of all assignments that place everything, found by trying them all; None: there is none."""
    active = [server for server in servers if not server.leaving]
    choices = [list(itertools.combinations(active, model.replicas)) for model in models]
    best = None
    for chosen in itertools.product(*choices):
        on = {server: [m for m, where in zip(models, chosen, strict=True) if server in where] for server in active}
        if all(memory_needed(held) <= server.memory for server, held in on.items()):
            after = {server.name: frozenset(model.name for model in held) for server, held in on.items()}
            cost = moves(present, after)
            best = cost if best is None else min(best, cost)
    return best


@settings(max_examples=100, deadline=None)
@given(instances(most_models=5, most_servers=4))
def test_small_instances_are_solved_at_the_least_cost(instance: tuple[list[Model], list[Server], Held]) -> None:
    models, servers, present = instance
    after, misfits = assign(models, servers, present)
    best = cheapest(models, servers, present)
    assert (best is None) == bool(misfits)
    if best is not None:
        assert moves(present, after) == best


@settings(max_examples=150, deadline=None)
@given(instances())
def test_steps_keep_every_model_answering(instance: tuple[list[Model], list[Server], Held]) -> None:
    models, servers, present = instance
    after, misfits = assign(models, servers, present)
    if misfits:
        return
    by_name = {model.name: model for model in models}
    state = {server.name: set(present.get(server.name, ())) & set(by_name) for server in servers}
    memory = {server.name: server.memory for server in servers}
    try:
        steps = schedule(models, servers, present, after)
    except StuckError as stuck:
        # Only models that wait for room, and only if memory is short.
        assert stuck.models and set(stuck.models) <= set(by_name)
        assert any(sum(by_name[n].memory for n in state[s] | after[s]) > memory[s] for s in memory)
        return
    answered = {name for names in state.values() for name in names}
    for step in steps:
        assert bool(step.adds) != bool(step.removes)
        for server, model in step.adds:
            assert model not in state[server]
            state[server].add(model)
            assert sum(by_name[name].memory for name in state[server]) <= memory[server]
        for server, model in step.removes:
            state[server].remove(model)
        assert answered <= {name for names in state.values() for name in names}
    assert state == {server: set(names) for server, names in after.items()}
    if state == {server: present.get(server, frozenset()) for server in state}:
        assert steps == []


def test_a_full_cycle_goes_by_a_third_server() -> None:
    models = [Model("a", 10), Model("b", 10)]
    servers = [Server("x", 10), Server("y", 10), Server("z", 10)]
    present = {"x": frozenset("a"), "y": frozenset("b")}
    target = {"x": frozenset("b"), "y": frozenset("a")}
    assert schedule(models, servers, present, target) == [
        Step(adds=(("z", "a"),)),
        Step(removes=(("x", "a"),)),
        Step(adds=(("x", "b"),)),
        Step(removes=(("y", "b"),)),
        Step(adds=(("y", "a"),)),
        Step(removes=(("z", "a"),)),
    ]
    with pytest.raises(StuckError) as raised:
        schedule(models, servers[:2], present, target)
    assert raised.value.models == ("a", "b")


def test_a_spare_replica_makes_room() -> None:
    models = [Model("a", 10, replicas=2), Model("b", 10)]
    servers = [Server(name, 10) for name in "xyz"]
    present = {"x": frozenset("a"), "y": frozenset("a"), "z": frozenset("b")}
    target = {"x": frozenset("a"), "y": frozenset("b"), "z": frozenset("a")}
    steps = schedule(models, servers, present, target)
    assert steps[0] == Step(removes=(("y", "a"),))
    assert steps[1] == Step(adds=(("y", "b"),))


def test_reasons() -> None:
    servers = [Server("x", 100), Server("y", 50), Server("z", 500, leaving=True)]
    models = [Model("big", 120), Model("wide", 1, replicas=3), Model("swapped", 60, swap=60)]
    after, misfits = assign(models, servers, {})
    assert misfits == [
        Misfit("big", 1, "needs 120 bytes; of the servers without it, x has the most free memory: 99 bytes"),
        Misfit(
            "swapped",
            1,
            "needs 60 bytes, and 60 bytes for a next version; of the servers without it, x has the most free memory: "
            "99 bytes",
        ),
        Misfit("wide", 1, "wants 3 servers, but only 2 stay"),
    ]
    assert holders(after, "wide") == {"x", "y"}
    assert assign(models, [], {})[1][0].reason == "wants 1 servers, but only 0 stay"


def test_replicas_go_to_different_zones_and_by_load() -> None:
    servers = [Server("a", 100, "one"), Server("b", 100, "one"), Server("c", 100, "two")]
    after, _ = assign([Model("m", 10, replicas=2)], servers, {"a": frozenset({"m"})})
    assert holders(after, "m") == {"a", "c"}
    models = [Model("hot", 1, requests=100), Model("cold1", 5), Model("cold2", 4), Model("warm", 3, requests=10)]
    after, _ = assign(models, [Server("a", 100), Server("b", 100)], {})
    assert holders(after, "hot") != holders(after, "warm")


def test_rebalancing_evens_what_stood_and_ends() -> None:
    """A third server comes; without rebalancing nothing moves, with it the loads are equal within a few models."""
    draw = random.Random(1)
    models = [Model(f"m{i}", draw.randint(5, 20), replicas=2, requests=draw.random()) for i in range(60)]
    two = [Server("a", 2000), Server("b", 2000)]
    before, misfits = assign(models, two, {})
    assert not misfits
    three = [*two, Server("c", 2000)]
    assert assign(models, three, before) == ({**before, "c": frozenset()}, [])
    after, _ = assign(models, three, before, rebalance=True)
    by_name = {model.name: model for model in models}
    used = [memory_needed(by_name[name] for name in after[server]) for server in "abc"]
    asked = [sum(by_name[name].requests for name in after[server]) for server in "abc"]
    assert max(used) <= 1.1 * sum(used) / 3 and max(asked) <= 1.1 * sum(asked) / 3
    assert moves(before, after) == len(after["c"])


def test_hundreds_of_models_on_many_servers() -> None:
    """A server leaves when all are 85 % full: its models move, and few others."""
    draw = random.Random(2)
    models = [Model(f"m{i:03}", draw.randint(1, 30), swap=1, replicas=draw.choice([1, 2, 3])) for i in range(500)]
    total = sum(model.memory * model.replicas for model in models)
    servers = [Server(f"s{i:02}", total // 34 + 1, zone=f"z{i % 3}") for i in range(40)]
    before, misfits = assign(models, servers, {})
    assert not misfits
    for model in models:
        zones = {server.zone for server in servers if model.name in before[server.name]}
        assert len(zones) == model.replicas
    leaving = [Server(s.name, s.memory, s.zone, leaving=s.name == "s07") for s in servers]
    after, misfits = assign(models, leaving, before)
    assert not misfits
    assert len(before["s07"]) <= moves(before, after) <= len(before["s07"]) + 5
    steps = schedule(models, leaving, before, after)
    assert [bool(step.adds) for step in steps] == [True, False]


def test_bytes_for_people() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 64 << 30, 5 << 40)] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "64.0 GiB",
        "5.0 TiB",
    ]
