"""benchmarks/scale.py: its queueing model against what is known of queueing networks, and a short run."""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "scale.py"
sys.path.append(str(SCRIPT.parent))
benchmark = importlib.import_module("scale")
Costs, Station, rate = benchmark.Costs, benchmark.Station, benchmark.rate


def balance(workers, thinking, stations):
    """The rate from the balance equations of the Markov chain whose states say how many steps each station holds."""
    states = [state for state in itertools.product(range(workers + 1), repeat=len(stations)) if sum(state) <= workers]
    number = {state: place for place, state in enumerate(states)}
    flow = np.zeros((len(states), len(states)))
    for state in states:
        # A step goes from thinking to the first station, from each station to the next, and back to thinking.
        speeds = [(workers - sum(state)) / thinking]
        speeds += [min(held, each.servers) / each.demand for held, each in zip(state, stations, strict=True)]
        for place, speed in enumerate(speeds):
            after = list(state)
            if place > 0:
                after[place - 1] -= 1
            if place < len(stations):
                after[place] += 1
            if speed > 0:
                flow[number[state], number[tuple(after)]] += speed
    flow -= np.diag(flow.sum(axis=1))
    shares = np.linalg.lstsq(np.vstack([flow.T, np.ones(len(states))]), np.eye(len(states) + 1)[-1], rcond=None)[0]
    return sum(share * (workers - sum(state)) / thinking for state, share in zip(states, shares, strict=True))


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize(
    "stations", [[Station(0.5)], [Station(0.5, 2)], [Station(0.5, 3), Station(0.2), Station(1.5, 2)]]
)
def test_the_rate_is_that_of_the_markov_chain(workers, stations):
    assert rate(workers, 0.7, stations) == pytest.approx(balance(workers, 0.7, stations), rel=1e-9)


def test_the_slowest_station_bounds_the_rate():
    assert rate(200, 1.0, [Station(0.1, 4), Station(0.05)]) == pytest.approx(20)
    assert rate(3, 0.5, []) == pytest.approx(6)
    assert rate(2, 0.0, [Station(0.5, 2)]) == pytest.approx(4)


def test_more_workers_are_never_slower():
    stations = [Station(0.0009, 16), Station(0.0002), Station(0.0001)] * 5
    rates = [rate(workers, 0.005, stations) for workers in range(1, 201)]
    assert np.all(np.diff(rates) > 0)
    assert 0.95 / 0.0002 < rates[-1] < 1 / 0.0002, "the five slowest stations are nearly always busy"


def test_a_cluster_is_bound_by_what_is_full():
    little = Costs(worker=0.01, ps=0.0, up=0.0, down=0.0)
    assert benchmark.of_cluster(little, 40) == pytest.approx(4000)
    bytes_bound = Costs(worker=1e-6, ps=0.0, up=benchmark.LINK_BYTES, down=0.0)
    assert benchmark.of_cluster(bytes_bound, 160) == pytest.approx(5, rel=0.05), "five links"
    alone = benchmark.on_one_machine(Costs(0.3, 0.2, 0, 0), 0.6, 1, 2)
    assert alone == pytest.approx(1 / 0.6), "what the run with one worker measured"
    assert benchmark.on_one_machine(Costs(0.3, 0.2, 0, 0), 0.6, 30, 2) == pytest.approx(4), "two cores"


@pytest.mark.slow
@pytest.mark.long
def test_a_short_run(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--json", f"--out={tmp_path}"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["benchmark"] == "scale"
    assert set(report["bars"]) == {
        "predicted_over_measured_2_workers", "hours_400m_steps_40_workers",
        "rate_ratio_to_stock_40_workers", "rate_ratio_to_stock_160_workers", "core_hours_5600m_pairs",
        "store_gb_5600m_pairs",
    }  # fmt: skip
    measured = [row for row in report["rows"] if row["impl"] == "measured"]
    assert all(row["value"] > 0 for row in measured) and len(measured) == 6
