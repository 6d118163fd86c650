"""The papers' online tests on the generated shop, as simulations: an A/B test, and raters who grade results.

Simulated users take the place of JD.com's: they are those of the generator (docs/generated_shop.md), so their tastes,
what they have in mind and where they look are known, and figures are expectations over their clicks. The production
system of the papers is a word search here, and a treatment unites its results with a model's by reciprocal ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dpsr_common.typed_config import from_dict
from dpsr_tf.data.user_requests import User
from dpsr_tf.evaluation import metrics
from dpsr_tf.evaluation.corpus import Corpus
from dpsr_tf.evaluation.retriever import Retriever, ask
from dpsr_tf.evaluation.systems import Systems
from dpsr_tf.report.runner import Artifact, Result
from dpsr_tf.report.shop import TUNED_BM25, Shop
from dpsr_tf.shop.generate import random_ids
from dpsr_tf.shop.log import STRAY_CARTS, Log
from dpsr_tf.shop.parameters import Parameters
from dpsr_tf.shop.world import World, make_world

CONTROL = "word search"
FIGURES = ("UCTR", "UCVR", "GMV", "QRR", "AOP")
GRADES = ("bad", "fair", "perfect")
# Queries that raters grade, and the items of each that they see.
_RATED_QUERIES, _RATED_ITEMS = 500, 10
# A query is in the long tail if the log has fewer requests with it.
TAIL = 5
_SAMPLES = 1000
_STREAM = 4711


def online(shop: Shop, models: Mapping[str, Artifact]) -> Result:
    """Runs the A/B test and the raters.

    Args:
        shop: the shop.
        models: name of the treatment -> the model whose results it adds to the word search; at least one.

    Returns:
        `requests`, `tail_requests`: their numbers. `ab_test`: group of requests (`all`, `tail`) -> treatment -> figure
        of FIGURES -> `change` against the control and its `interval`, as shares. `rated`: `queries`, and `systems`:
        system -> grade of GRADES -> its `share` in the results of long-tail queries, and `interval`.
    """

    def compute() -> Result:
        specs = {CONTROL: f"bm25:{TUNED_BM25}"}
        specs |= {name: f"rrf(bm25:{TUNED_BM25},model:{model.path})" for name, model in models.items()}
        # The first model in the place of the word search, too.
        name, model = next(iter(models.items()))
        specs[f"{name}, alone"] = f"model:{model.path}"
        simulation = Simulation(shop, shop.size.requests)
        systems = Systems(Corpus.of_store(shop.opened_store), shop.seed)
        pages = {name: simulation.pages(systems.make(spec)) for name, spec in specs.items()}
        groups = {"all": np.ones(len(simulation.tail), bool), "tail": simulation.tail}
        return {
            "requests": len(simulation.tail),
            "tail_requests": int(simulation.tail.sum()),
            "ab_test": {name: changes(simulation, pages, among, shop.seed) for name, among in groups.items()},
            "rated": rated(simulation, pages, shop.seed),
        }

    return {"seed": shop.seed, **shop.result("online", models, compute, requests=shop.size.requests)}


class Simulation:
    """New requests of the users of a shop, which come after its log.

    Attributes:
        world: the shop's.
        tail: whether a request is in the long tail, bool [requests].
    """

    def __init__(self, shop: Shop, requests: int):
        """Draws the requests."""
        self.world: World = make_world(from_dict(Parameters, shop.parameters, "parameters", check=False))
        self._log = Log(self.world)
        rng = np.random.default_rng([shop.seed, _STREAM])
        self.user, self.meaning, self.wanted, text = self._log.new_requests(requests, rng)
        texts = [*self.world.texts, *self.world.misspelt]
        self._queries = [texts[row] for row in text.tolist()]
        asked: dict[str, int] = {}
        for name in ("queries", "misspellings"):
            table = shop.truth_table(name)
            asked |= dict(zip(table["query"], table["requests"], strict=True))
        self.tail = np.array([asked.get(query, 0) < TAIL for query in self._queries])
        item_ids, user_ids = random_ids(self.world)
        self._users = [User(int(user_ids[row]), self._log.end) for row in self.user.tolist()]
        self._order = np.argsort(item_ids)
        self._ids = item_ids[self._order]

    def pages(self, retriever: Retriever) -> np.ndarray:
        """Returns the items that each request is shown: rows of the world, int64 [requests, k]; -1 where there is none.

        k is the number of items that raters see, and no less than what users see.
        """
        k = max(_RATED_ITEMS, self.world.parameters.list_length)
        found = ask(retriever, self._queries, self._users, k)[0]
        places = np.searchsorted(self._ids, found).clip(max=len(self._ids) - 1)
        return np.where(self._ids[places] == found, self._order[places], -1)

    def outcomes(self, pages: np.ndarray) -> np.ndarray:
        """Returns what is expected of each request, float64 [requests, 5].

        The columns: the chance of a click, the chance of an order, the price of what is ordered, and the position of
        orders, summed, with their number.
        """
        parameters = self.world.parameters
        shown = pages[:, : parameters.list_length]
        there, item = shown >= 0, np.maximum(shown, 0)
        user, meaning, wanted = (
            np.broadcast_to(x[:, None], shown.shape) for x in (self.user, self.meaning, self.wanted)
        )
        chance, right = self._log.chances(user, meaning, wanted, item)
        click = np.where(there, chance * self._log.propensities, 0)
        order = click * parameters.cart_share * np.where(right, 1, STRAY_CARTS) * parameters.order_share
        positions = np.arange(1, shown.shape[1] + 1)
        return np.stack(
            [
                1 - np.prod(1 - click, axis=1),
                1 - np.prod(1 - order, axis=1),
                (order * self.world.items.price[item]).sum(1),
                (order * positions).sum(1),
                order.sum(1),
            ],
            axis=1,
        )

    def grades(self, pages: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Returns the share of each grade among the first results of requests, float64 [rows, 3].

        An item is perfect if it has all that the query asks for, fair if it is of the right type and lacks one thing,
        and bad otherwise. A place without an item is bad too.
        """
        shown = pages[rows, :_RATED_ITEMS]
        missed = self.world.missed(self.meaning[rows][:, None], np.maximum(shown, 0))
        grade = np.where(shown >= 0, np.clip(2 - missed, 0, 2), 0)
        return np.stack([(grade == code).mean(1) for code in range(len(GRADES))], axis=1)

    def tail_queries(self, count: int) -> np.ndarray:
        """Returns the rows of the first requests with `count` different queries of the long tail."""
        first = {query: row for row, query in reversed(list(enumerate(self._queries))) if self.tail[row]}
        return np.sort(list(first.values()))[:count]


def changes(simulation: Simulation, pages: Mapping[str, np.ndarray], among: np.ndarray, seed: int) -> Result:
    """Returns treatment -> figure -> `change` against the control and `interval`, over some requests.

    A user who clicks nothing asks again, so the query rewrite rate (QRR) is the share of requests without a click.
    AOP is the mean position of what is ordered. Intervals are bootstrap intervals over requests; all systems answer the
    same ones, so they are paired.
    """
    outcomes = {name: simulation.outcomes(found)[among] for name, found in pages.items()}
    control = outcomes.pop(CONTROL)
    found: Result = {}
    for name, treated in outcomes.items():
        both = np.concatenate([control, treated], axis=1)
        value = _figures(both.mean(0)[None])
        samples = _figures(metrics.bootstrap_means(both, _SAMPLES, seed))
        found[name] = {
            figure: {"change": float(value[0, column]), "interval": metrics.interval(samples[:, column])}
            for column, figure in enumerate(FIGURES)
        }
    return found


def _figures(means: np.ndarray) -> np.ndarray:
    """Turns means of outcomes of control and treatment, [n, 10], into changes of FIGURES, [n, 5]."""
    of = [
        np.stack([m[:, 0], m[:, 1], m[:, 2], 1 - m[:, 0], m[:, 3] / np.maximum(m[:, 4], 1e-12)], axis=1)
        for m in (means[:, :5], means[:, 5:])
    ]
    return np.asarray(of[1] / np.maximum(of[0], 1e-12) - 1)


def rated(simulation: Simulation, pages: Mapping[str, np.ndarray], seed: int) -> Result:
    """Returns system -> grade -> `share` and `interval`, over the first results of long-tail queries; and `queries`."""
    rows = simulation.tail_queries(_RATED_QUERIES)
    found: Result = {"queries": len(rows), "systems": {}}
    for name, shown in pages.items():
        shares = simulation.grades(shown, rows)
        samples = metrics.bootstrap_means(shares, _SAMPLES, seed)
        found["systems"][name] = {
            grade: {"share": float(shares[:, column].mean()), "interval": metrics.interval(samples[:, column])}
            for column, grade in enumerate(GRADES)
        }
    return found


def treatments(models: Mapping[str, Artifact], two_heads: str) -> dict[str, Artifact]:
    """Returns the treatments of the paper's table 4, and the histories of DPSR-h. `two_heads`: key of that model."""
    names: Sequence[tuple[str, str]] = (
        ("DPSR, one head", "DPSR"),
        ("DPSR, two heads", two_heads),
        ("DPSR, one head with profile (DPSR-p)", "DPSR-p"),
        ("DPSR, with profile and history (DPSR-h)", "DPSR-h"),
    )
    return {name: models[label] for name, label in names}
