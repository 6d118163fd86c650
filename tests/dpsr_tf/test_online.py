"""The simulated online tests of the report: users, pages, changes against a control, and grades."""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from dpsr_common.typed_config import to_dict
from dpsr_tf.report import online
from dpsr_tf.report.online import CONTROL, FIGURES, GRADES, Simulation, changes, rated
from dpsr_tf.shop.generate import generate, random_ids
from dpsr_tf.shop.parameters import Parameters

SHOP = Parameters(items=600, users=40, interactions=2_000, judged_queries=20, personal_judgments=20, homonyms=2)


@pytest.fixture(scope="module")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Simulation:
    out: Path = tmp_path_factory.mktemp("shop")
    generate(SHOP, out)

    def table(name: str) -> dict:
        return dict(pyarrow.parquet.read_table(out / "truth" / f"{name}.parquet").to_pydict())

    shop = types.SimpleNamespace(seed=1, parameters=to_dict(SHOP), truth_table=table)
    return Simulation(shop, requests=400)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def right(simulation: Simulation) -> np.ndarray:
    """Pages of what each request asks for, as far as there are such items."""
    pages = np.full((400, 10), -1)
    for row, meaning in enumerate(simulation.meaning.tolist()):
        answer = simulation.world.answer_rows(meaning)[:10]
        pages[row, : len(answer)] = answer
    return pages


@pytest.fixture(scope="module")
def random(simulation: Simulation) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 600, (400, 10))


def test_the_right_items_win_and_the_same_items_change_nothing(
    simulation: Simulation, right: np.ndarray, random: np.ndarray
) -> None:
    everyone = np.ones(400, bool)
    found = changes(simulation, {CONTROL: random, "right": right, "same": random}, everyone, seed=1)
    assert list(found) == ["right", "same"] and list(found["right"]) == list(FIGURES)
    assert all(one == {"change": 0, "interval": [0, 0]} for one in found["same"].values())
    better = found["right"]
    for figure in ("UCTR", "UCVR", "GMV"):
        assert 0 < better[figure]["interval"][0] < better[figure]["change"] < better[figure]["interval"][1]
    assert better["QRR"]["interval"][1] < 0
    back = changes(simulation, {CONTROL: right, "random": random}, simulation.tail, seed=1)
    assert back["random"]["UCVR"]["change"] < -0.5


def test_what_is_expected_is_what_happens(simulation: Simulation, right: np.ndarray) -> None:
    """Draws users' clicks and orders one by one, and compares the means."""
    rng = np.random.default_rng(2)
    log, world, page = simulation._log, simulation.world, right[:, : SHOP.list_length]
    clicked, ordered, paid = np.zeros(400), np.zeros(400), np.zeros(400)
    rounds = 300
    columns = [np.repeat(x, page.shape[1]) for x in (simulation.user, simulation.meaning, simulation.wanted)]
    chance = log.chances(*columns, np.maximum(page, 0).ravel())[0].reshape(page.shape)
    for _ in range(rounds):
        click = (rng.random(page.shape) < log.propensities) & (rng.random(page.shape) < chance) & (page >= 0)
        order = click & (rng.random(page.shape) < SHOP.cart_share) & (rng.random(page.shape) < SHOP.order_share)
        clicked += click.any(1)
        ordered += order.any(1)
        paid += (order * world.items.price[page]).sum(1)
    expected = simulation.outcomes(right).mean(0)
    assert expected[0] == pytest.approx(clicked.mean() / rounds, rel=0.03)
    assert expected[1] == pytest.approx(ordered.mean() / rounds, rel=0.05)
    assert expected[2] == pytest.approx(paid.mean() / rounds, rel=0.1)


def test_orders_from_higher_places_lower_their_position(simulation: Simulation, right: np.ndarray) -> None:
    # The items stand at the end, behind places that show nothing.
    late = np.full_like(right, -1)
    late[:, 4 : SHOP.list_length] = right[:, : SHOP.list_length - 4]
    found = changes(simulation, {CONTROL: late, "early": right}, np.ones(400, bool), seed=1)
    assert found["early"]["AOP"]["interval"][1] < 0 < found["early"]["UCTR"]["interval"][0]


def test_raters_grade_by_the_truth(simulation: Simulation, right: np.ndarray, random: np.ndarray) -> None:
    found = rated(simulation, {CONTROL: random, "right": right}, seed=1)
    rows = simulation.tail_queries(500)
    assert found["queries"] == len(rows) > 20 and simulation.tail[rows].all()
    assert len({simulation._queries[row] for row in rows}) == len(rows)
    for grades in found["systems"].values():
        assert sum(grades[grade]["share"] for grade in GRADES) == pytest.approx(1)
    # What is not perfect on the right pages is a place without an item.
    assert found["systems"]["right"]["perfect"]["share"] == pytest.approx((right[rows] >= 0).mean())
    assert found["systems"]["right"]["fair"]["share"] == 0
    assert found["systems"][CONTROL]["bad"]["share"] > 0.9
    # An item of the right type that lacks one thing is fair.
    meaning, items = simulation.world.meaning, simulation.world.items
    row = next(row for row in rows if (meaning[simulation.meaning[row], 1:3] >= 0).all())
    wanted = meaning[simulation.meaning[row]]
    other = np.flatnonzero((items.type == wanted[1]) & (items.brand != wanted[2]))[:1]
    only = np.full_like(right, -1)
    only[row, 0] = other[0]
    share = simulation.grades(only, np.array([row]))[0]
    assert share[2] == 0 and share[1] == (0.1 if (wanted[3:] < 0).all() else share[1])


def test_pages_are_rows_of_the_world_for_the_users_of_the_shop(simulation: Simulation) -> None:
    item_ids, user_ids = random_ids(simulation.world)
    asked = []

    def retriever(queries: list[str], users: list | None, k: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append((queries, users))
        ids = np.tile(item_ids[5 : 5 + k], (len(queries), 1))
        ids[:, -1] = -1
        return ids, np.zeros(ids.shape, np.float32)

    retriever.personal = True  # type: ignore[attr-defined]
    found = simulation.pages(retriever)
    assert found[0].tolist() == [*range(5, 14), -1]
    queries, users = asked[0]
    assert [user.id for user in users] == user_ids[simulation.user].tolist()
    known = {*simulation.world.texts, *simulation.world.misspelt}
    assert set(queries) <= known and online.TAIL > 1 and 0 < simulation.tail.mean() < 1
