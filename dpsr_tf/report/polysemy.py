"""Queries with several meanings: how many of the meanings a model finds, and whether it keeps categories together."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.metrics import silhouette_samples
from threadpoolctl import threadpool_limits

from dpsr_tf.data.store import RowsById
from dpsr_tf.evaluation import metrics
from dpsr_tf.evaluation.retriever import Retriever
from dpsr_tf.models.encoders import exact_search, item_embeddings
from dpsr_tf.report.runner import Artifact, Result
from dpsr_tf.report.shop import Shop

FIGURES = ("senses@10", "recall@100", "silhouette")
# Number of bootstrap samples, the default of `dpsr evaluate`.
_SAMPLES = 1000
# The silhouette looks at the most popular items of each type of product.
_ITEMS_OF_TYPE = 50


def polysemy(shop: Shop, pairs: Mapping[int, Mapping[str, Artifact]]) -> Result:
    """Compares one head with two on all polysemous queries of the shop, in the log and held out.

    `senses@10` is the share of a query's meanings that have an item among the first 10. `recall@100` is the share of
    the relevant items among the first 100 (if there are more than 100, the share of 100). `silhouette` is the mean
    silhouette, by type of product, of the items of all types that the query may mean: 1 if each type is a cluster of
    its own, 0 if they overlap, below 0 if items lie nearer to another type than to their own.

    Args:
        shop: the shop.
        pairs: embedding dimension -> label -> the model with one head, and the model with two. The last dimension is
            the usual one.

    Returns:
        `seed`; `figures`, the names above; `groups`: group of queries -> `queries` and, for each model and for the
        `difference`, `value` [figures] and `interval` [figures, 2], for the usual dimension; and `widths`: dimension ->
        groups.
    """
    queries = PolysemousQueries(shop)
    widths = {str(dim): _compared(shop, queries, f"polysemy-{dim}", pair) for dim, pair in pairs.items()}
    return {"seed": shop.seed, "figures": list(FIGURES), "groups": list(widths.values())[-1], "widths": widths}


class PolysemousQueries:
    """The queries of a shop that have several meanings.

    Attributes:
        queries: texts [n].
        groups: name of a group -> which queries belong to it, bool [n]. Groups without queries are left out.
    """

    def __init__(self, shop: Shop):
        """Reads the truth of a shop."""
        self._shop = shop
        table, meanings = shop.truth_table("queries"), shop.truth_table("meanings")
        rows = [row for row, senses in enumerate(table["meanings"]) if len(senses) > 1]
        self.queries: list[str] = [table["query"][row] for row in rows]
        self._senses = [[shop.meanings[meaning] for meaning in table["meanings"][row]] for row in rows]
        in_log = np.array([table["fold"][row] == "log" for row in rows])
        homonyms = json.loads((shop.directory.path / "truth.json").read_text())["homonyms"]
        homonym = np.array([not homonyms.keys().isdisjoint(query.split()) for query in self.queries])
        of_type = dict(zip(meanings["meaning"], meanings["type"], strict=True))
        named = [{of_type[meaning] is None for meaning in table["meanings"][row]} for row in rows]
        # A query such as "apple", the brand and the fruit.
        mixed = np.array([len(kinds) == 2 for kinds in named])
        groups = {"all": np.ones(len(rows), bool), "in the log": in_log, "held out": ~in_log}
        groups |= {"homonyms": homonym, "homonyms, held out": homonym & ~in_log, "brand and product": mixed}
        groups["brand of several categories"] = ~mixed & ~homonym
        self.groups = {name: among for name, among in groups.items() if among.any()}

    def found(self, search: Retriever) -> np.ndarray:
        """Returns senses@10 and recall@100 of each query, float64 [n, 2]."""
        ids = search(self.queries, None, 100)[0].tolist()
        return np.array([_senses_and_recall(*one) for one in zip(ids, self._senses, strict=True)])

    def silhouettes(self, embeddings: np.ndarray) -> np.ndarray:
        """Returns the silhouette of each query, float64 [n]; 0 if all its meanings are of one type of product.

        Args:
            embeddings: those of all items, in the order of the store, float32 [items, dim].
        """
        items = self._shop.truth_table("items")
        rows = RowsById(self._shop.opened_store.items()["id"])(np.array(items["item_id"]))
        type_of = dict(zip(items["item_id"], items["type"], strict=True))
        of_type: dict[str, list[int]] = {}
        for place in np.argsort(-np.array(items["popularity"]), kind="stable").tolist():
            of_type.setdefault(items["type"][place], []).append(int(rows[place]))

        @functools.cache
        def of_types(types: frozenset[str]) -> float:
            chosen = {name: of_type[name][:_ITEMS_OF_TYPE] for name in sorted(types)}
            labels = np.repeat(np.arange(len(chosen)), [len(of) for of in chosen.values()])
            if not 1 < len(chosen) < len(labels):
                return 0.0
            vectors = embeddings[np.concatenate([np.array(of) for of in chosen.values()])]
            return float(silhouette_samples(vectors, labels).mean())

        with threadpool_limits(1):
            return np.array([of_types(frozenset(type_of[i] for sense in of for i in sense)) for of in self._senses])


def _compared(shop: Shop, queries: PolysemousQueries, name: str, pair: Mapping[str, Artifact]) -> Result:
    """Returns the figures of a pair of models by group of queries."""

    def compute() -> Result:
        figures = {}
        for label, model in pair.items():
            found = queries.found(exact_search(model.path, shop.opened_store))
            apart = queries.silhouettes(item_embeddings(model.path, shop.opened_store))
            figures[label] = np.concatenate([found, apart[:, np.newaxis]], axis=1)
        return {
            group: compared({label: values[among] for label, values in figures.items()}, shop.seed)
            for group, among in queries.groups.items()
        }

    return shop.result(name, pair, compute, figures=list(FIGURES))


def _senses_and_recall(found: Sequence[int], senses: Sequence[set[int]]) -> tuple[float, float]:
    first, right = set(found[:10]), set().union(*senses)
    return sum(bool(first & items) for items in senses) / len(senses), len(right & set(found)) / min(len(right), 100)


def compared(figures: Mapping[str, np.ndarray], seed: int) -> Result:
    """Returns means and intervals of two models' figures, and of the second minus the first.

    Args:
        figures: label -> float64 [queries, figures].
        seed: seed of the bootstrap samples.

    Returns:
        `queries`, and for both labels and `difference`: `value` [figures] and `interval` [figures, 2].
    """
    one, other = figures.values()
    samples = metrics.bootstrap_means(np.concatenate([one, other, other - one], axis=1), _SAMPLES, seed)
    limits = [metrics.interval(samples[:, column]) for column in range(samples.shape[1])]
    width = one.shape[1]
    labels = [*figures, "difference"]
    means = [one.mean(0), other.mean(0), (other - one).mean(0)]
    return {
        "queries": len(one),
        **{
            label: {"value": mean.tolist(), "interval": limits[row * width : (row + 1) * width]}
            for row, (label, mean) in enumerate(zip(labels, means, strict=True))
        },
    }
