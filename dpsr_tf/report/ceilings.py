"""Upper limits of top-k: rankers that know the truth of a generated shop, such as the user's taste."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.parquet
from scipy.stats import hypergeom

from dpsr_tf.evaluation import metrics
from dpsr_tf.evaluation.judgments import Judgments
from dpsr_tf.report.runner import Result
from dpsr_tf.report.shop import Shop
from dpsr_tf.shop.world import TASTE_WEIGHTS

KNOWN = ("what the query means", "and the profile", "and the taste")
# Number of other items among which top-k ranks an item.
_OTHERS = 1023
_PURCHASES = 3_000
_SAMPLES = 1000


def ceilings(shop: Shop) -> Result:
    """Returns the expected top-1 and top-10 of three rankers on purchases.

    The rankers score an item by the probability that it is bought: its popularity among the items of each meaning of
    the query, all meanings being equally likely, times exp(appeal), see docs/generated_shop.md. The first ranker uses
    the mean of exp(appeal) over all profiles, the second the user's own profile, the third also the latent taste, which
    no history shows in full.
    """

    def compute() -> Result:
        judgments = Judgments.read(
            shop.directory.path / "judgments.personal.tsv", "query", "item", "grade", 1.0, "user_id", "time"
        )
        chosen = np.random.default_rng(shop.seed).permutation(len(judgments.queries))[:_PURCHASES]
        bought = judgments.take(np.sort(chosen).tolist())
        truth = _Truth(shop)
        figures = np.array(
            [
                truth.figures(query, user.id, relevant)
                for query, user, relevant in zip(bought.queries, bought.users or (), bought.relevant, strict=True)
            ]
        )  # [purchases, rankers * 2]
        samples = metrics.bootstrap_means(figures, _SAMPLES, shop.seed)
        limits = [metrics.interval(samples[:, column]) for column in range(samples.shape[1])]
        return {
            "purchases": len(figures),
            "rankers": {
                name: {
                    figure: {"value": float(figures[:, 2 * row + column].mean()), "interval": limits[2 * row + column]}
                    for column, figure in enumerate(("top-1", "top-10"))
                }
                for row, name in enumerate(KNOWN)
            },
        }

    return {"seed": shop.seed, **shop.result("ceilings", {}, compute, purchases=_PURCHASES)}


class _Truth:
    """The truth of a shop. Items are rows of truth/items.parquet."""

    def __init__(self, shop: Shop):
        items, users = shop.truth_table("items"), shop.truth_table("users")
        columns = ["item_id", "brand", "shop"]
        shown = pyarrow.parquet.read_table(shop.directory.path / "items.parquet", columns=columns).to_pydict()
        if shown["item_id"] != items["item_id"]:
            raise ValueError("items.parquet and truth/items.parquet differ in their items")
        self._row = {item: row for row, item in enumerate(items["item_id"])}
        self._brand, self._shop = np.array(shown["brand"]), np.array(shown["shop"])
        self._style, self._style_place = np.array(items["style"], object), np.array(items["style_place"])
        self._place = np.array(items["category_place"])
        self._popularity, self._liking = np.array(items["popularity"]), np.array(items["liking"], np.float64)
        self._users: dict[int, dict[str, Any]] = {
            user: {name: column[row] for name, column in users.items()} for row, user in enumerate(users["user_id"])
        }
        queries = shop.truth_table("queries")
        self._senses = {
            query: [np.array([self._row[item] for item in sorted(shop.meanings[meaning])]) for meaning in meanings]
            for query, meanings in zip(queries["query"], queries["meanings"], strict=True)
        }
        self._taste, self._history = shop.parameters["taste"], shop.parameters["history"]

    def figures(self, query: str, user_id: int, relevant: Any) -> list[float]:
        """Returns top-1 and top-10 of each ranker for a purchase, 6 numbers."""
        user = self._users[user_id]
        right = [self._row[int(item)] for item in relevant]
        scores = np.zeros((len(KNOWN), len(self._row)))
        for rows in self._senses[query]:
            liked = np.exp(self._taste * self._liking[rows])  # [items, profiles]
            own = liked[:, user["profile"]]
            for ranker, pull in enumerate((liked.mean(1), own, own * np.exp(self._history * self._latent(user, rows)))):
                mass = self._popularity[rows] * pull
                scores[ranker, rows] += mass / mass.sum()
        found = []
        for mine in scores:
            better = [(mine > mine[row]).sum() + ((mine == mine[row]).sum() - 1) // 2 for row in right]
            for k in (1, 10):
                found.append(float(np.mean(hypergeom.cdf(k - 1, len(mine) - 1, better, _OTHERS))))
        return found

    def _latent(self, user: dict[str, Any], rows: np.ndarray) -> np.ndarray:
        """Returns the appeal of the items `rows` to the user's latent taste, float64 [items]."""
        places, styled = self._place[rows], self._style_place[rows] >= 0
        style = np.array(user["styles"], object)[np.maximum(self._style_place[rows], 0)]
        return np.asarray(
            TASTE_WEIGHTS["brand"] * (np.array(user["brands"])[places] == self._brand[rows])
            + TASTE_WEIGHTS["shop"] * (np.array(user["shops"])[places] == self._shop[rows])
            + TASTE_WEIGHTS["style"] * (styled & (style == self._style[rows]))
        )
