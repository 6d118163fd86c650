"""Claims of section 4 of the paper that need a training which `dpsr train` does not offer.

Each group compares ways to train: one projection or an embedding set for each head, a sum of embeddings or a
Transformer, random negatives that a batch shares or that each pair has alone, batches with and without the mask of
clicked items, and batch negatives or random ones by the number of steps. All train the paper's model with its hinge
loss. They train in this process, with the batches, towers, losses and optimizer of `dpsr train`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow.parquet
import tensorflow as tf

from dpsr_common.typed_config import from_dict
from dpsr_tf.config import Config
from dpsr_tf.data.examples_dataset import Batch, Tokens, examples_dataset
from dpsr_tf.evaluation.corpus import Corpus
from dpsr_tf.evaluation.judgments import Judgments
from dpsr_tf.evaluation.measure import Options, measure_all
from dpsr_tf.models.embedding import EmbeddingTable, minimize
from dpsr_tf.models.encoders import StoreTables, placeholder
from dpsr_tf.models.exact_search import ExactSearch
from dpsr_tf.models.features import ItemFeatures, QueryFeatures
from dpsr_tf.models.layers import FUSED
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.objective import build_loss
from dpsr_tf.models.text_encoder import Table
from dpsr_tf.models.two_tower import TwoTower
from dpsr_tf.report.ablations import PAPER
from dpsr_tf.report.polysemy import PolysemousQueries
from dpsr_tf.report.runner import Result
from dpsr_tf.report.shop import Shop
from dpsr_tf.training.train import batch_options

v1 = tf.compat.v1

# Random negatives of a pair in the comparison of shared ones with own ones.
_RANDOM = 16
# Steps that are not timed, and items that are embedded at once.
_WARM_UP, _BATCH = 3, 4096
# Queries whose encoding is timed, one at a time.
_TIMED_QUERIES = 200
# Purchases on which the models are measured.
_PURCHASES = 3_000


class EmbeddingSets(TwoTower):
    """Towers in which each head of the query tower has an embedding set of its own, in the place of a projection."""

    def query_embedding(self, query: QueryFeatures | Tokens) -> tf.Tensor:
        """Embeds queries as TwoTower does. They have a text only."""
        text = query if isinstance(query, Tokens) else query.text
        heads = []
        for head, table in enumerate(self._sets()):
            with v1.variable_scope(f"query_tower/head_{head}", reuse=v1.AUTO_REUSE):
                heads.append(self._layers(table.bag(text)))
        return self._normalised("query", tf.stack(heads, axis=1), text)

    def start(self) -> tf.Operation:
        """Returns what lets the sets start as the projections of TwoTower would make them of the shared set."""
        items, dim = _variable(self.tables["token_embedding"]), self.config.token_dim
        noise = v1.glorot_uniform_initializer()
        starts = [items + tf.matmul(items, noise([dim, dim], tf.float32)) for _ in range(self.config.num_heads)]
        return tf.group([_variable(table).assign(start) for table, start in zip(self._sets(), starts, strict=True)])

    def _sets(self) -> list[Table]:
        heads, size = self.config.num_heads, self.features.num_tokens
        return [self._table(f"query_token_embedding_{head}", size, self.config.token_dim) for head in range(heads)]


def _variable(table: Table) -> tf.Variable:
    """Returns the variable of a table that is in one piece."""
    assert isinstance(table, EmbeddingTable)
    return table.variables[0]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        changes: to the config (`section.key`) of the paper's training.
        towers: the towers.
        own_random: number of random negatives that each pair has alone, which are then its only negatives.
        masked: whether a clicked item of a query is none of its negatives.
    """

    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    towers: type[TwoTower] = TwoTower
    own_random: int = 0
    masked: bool = True


_ALPHA: dict[str, Variant] = {f"α {alpha:g}": Variant({"train.mixing_ratio": alpha}) for alpha in (0.0, 0.5, 1.0)}
_ONLY_RANDOM = {"train.mixing_ratio": 1.0, "train.num_random_negatives": _RANDOM}
_ENCODERS = "dpsr_tf.report.transformer"
GROUPS: dict[str, dict[str, Variant]] = {
    "embedding sets": {"a projection for each head": Variant(), "a set for each head": Variant(towers=EmbeddingSets)},
    # With the paper's batch size, because Transformers are slow.
    "text encoder": {
        "sum of embeddings": Variant({"train.batch_size": 64}),
        "Transformer beside the sum": Variant({"train.batch_size": 64, "model.encoder": f"{_ENCODERS}:beside_the_sum"}),
        "Transformer alone": Variant({"train.batch_size": 64, "model.encoder": f"{_ENCODERS}:alone"}),
    },
    "random negatives": {
        f"{_RANDOM} for the batch": Variant(_ONLY_RANDOM),
        f"{_RANDOM} for each pair": Variant(_ONLY_RANDOM, own_random=_RANDOM),
    },
    "clicked items of the batch": {
        "never negatives": Variant({"train.mixing_ratio": 0.0}),
        "negatives like others": Variant({"train.mixing_ratio": 0.0}, masked=False),
    },
    "steps": _ALPHA,
}
# A Transformer takes minutes for each shop.
_FIRST_SHOP_ONLY = ("text encoder",)
# The shares of a training at which the group `steps` is measured.
_MARKS = (0.125, 0.25, 0.5, 1.0)


def claims(shop: Shop) -> Result:
    """Trains and measures all variants.

    Returns:
        `seed`; `groups`: group -> `variants` and `comparisons`, the group of text encoders for the first shop only;
        `chance`: see chance_of_relevance.

        Each variant has `parameters`, their number; `step_ms` and `query_ms`, the CPU time of a training step and of
        embedding one query; `senses@10` of homonyms; and `by_step`: number of steps -> the figures of `dpsr evaluate`
        on `purchases` and on `unseen` queries. The comparisons are those of `dpsr evaluate`, with the first variant,
        after the last step, on `purchases` and on `unseen` queries.
    """
    groups = {}
    for group, variants in GROUPS.items():
        if group in _FIRST_SHOP_ONLY and shop.number:
            continue
        marks = _MARKS if group == "steps" else _MARKS[-1:]
        steps = sorted({max(1, round(mark * shop.size.steps)) for mark in marks})
        groups[group] = _compared(shop, group, variants, steps)
    return {"seed": shop.seed, "groups": groups, "chance": chance_of_relevance(shop)}


def _compared(shop: Shop, group: str, variants: Mapping[str, Variant], steps: list[int]) -> Result:
    def compute() -> Result:
        found: Result = {name: {"by_step": {}} for name in variants}
        with contextlib.ExitStack() as stack:
            trainings = {
                name: stack.enter_context(contextlib.closing(_Training(shop, one))) for name, one in variants.items()
            }
            for step in steps:
                searches = {name: training.after(step) for name, training in trainings.items()}
                measured = _measured(shop, searches, step == steps[-1])
                for name in variants:
                    found[name]["by_step"][str(step)] = {on: of["systems"][name] for on, of in measured.items()}
            comparisons = {on: of["comparisons"] for on, of in measured.items()}
            queries = PolysemousQueries(shop)
            for name, training in trainings.items():
                senses = queries.found(searches[name])[queries.groups["homonyms"], 0]
                found[name] |= training.costs(queries.queries[:_TIMED_QUERIES])
                found[name]["senses@10"] = float(senses.mean())
        return {"variants": found, "comparisons": comparisons}

    definition = {name: dataclasses.asdict(one) | {"towers": one.towers.__name__} for name, one in variants.items()}
    size = dataclasses.asdict(shop.size)
    return shop.result("claim-" + group.replace(" ", "-"), {}, compute, steps=steps, variants=definition, size=size)


def _measured(shop: Shop, searches: Mapping[str, ExactSearch], compare: bool) -> Result:
    """Returns `purchases` and `unseen` -> what measure_all returns, without intervals unless it compares."""
    options = Options(seed=shop.seed, latency_queries=0, bootstrap=Options.bootstrap if compare else 0)
    corpus = Corpus.of_store(shop.opened_store)
    read = functools.partial(Judgments.read, query="query", item="item", grade="grade", relevant_from=1.0)
    directory = shop.directory.path
    purchases = read(directory / "judgments.personal.tsv", user="user_id", time="time").sample(_PURCHASES, shop.seed)
    judgments = {"purchases": purchases, "unseen": read(directory / "judgments.test.tsv")}
    return {name: measure_all(searches, judged, corpus, options, compare) for name, judged in judgments.items()}


class _Training:
    """A model that is trained in this process."""

    def __init__(self, shop: Shop, variant: Variant):
        changes = {"train.seed": shop.seed, **PAPER, **variant.changes}
        config = from_dict(Config, shop.size.config("dpsr", shop.size.steps, changes), "")
        self._store, self._done, self._seconds = shop.opened_store, 0, 0.0
        with tempfile.TemporaryDirectory() as folder:
            model = ModelDirectory.create_or_resume(folder, config, self._store)
        self._tables = StoreTables(model, self._store)
        options = batch_options(config, model.features)
        if variant.own_random:
            pairs = config.train.batch_size
            options = dataclasses.replace(options, num_random_negatives=pairs * variant.own_random)
            own = dataclasses.replace(config.train, num_random_negatives=0, num_own_negatives=variant.own_random)
            config = dataclasses.replace(config, train=own)
        self._graph = tf.Graph()
        with self._graph.as_default():
            v1.set_random_seed(config.train.seed)
            if config.model.encoder:
                tf.keras.utils.set_random_seed(config.train.seed)  # as in dpsr_tf.training.estimator
            batches = v1.data.make_initializable_iterator(examples_dataset(self._store, options))
            batch = batches.get_next()
            if variant.own_random:
                batch = with_own_negatives(batch, variant.own_random)
            if not variant.masked:
                batch = without_mask(batch)
            table = functools.partial(
                EmbeddingTable, exclusive=True, initial_accumulator=config.train.initial_accumulator
            )
            self._towers = variant.towers(config.model, model.features, table=table, layers=FUSED, training=True)
            loss, _ = build_loss(config, batch, self._towers)
            tables = [one for one in self._towers.tables.values() if isinstance(one, EmbeddingTable)]
            train_op = minimize(loss, tables, config.train.learning_rate)
            trained = {id(one): one for one in (*v1.trainable_variables(), *(v for t in tables for v in t.variables))}
            self._parameters = sum(int(np.prod(one.shape)) for one in trained.values())
            start = self._towers.start() if isinstance(self._towers, EmbeddingSets) else tf.no_op()
            one = v1.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)
            self._session = v1.Session(config=one)
            self._session.run([v1.global_variables_initializer(), batches.initializer])
            self._session.run(start)
            self._step = self._session.make_callable(train_op)
        self._query, self._item = self._tower("query_embedding"), self._tower("item_embedding")

    def after(self, step: int) -> ExactSearch:
        """Trains until `step` steps are done, and returns search with the model as it is then."""
        while self._done < step:
            begin = time.process_time()
            self._step()
            if self._done >= _WARM_UP:
                self._seconds += time.process_time() - begin
            self._done += 1
        rows = np.arange(self._store.counts.items)
        blocks = [self._item(self._tables.items(rows[at : at + _BATCH])) for at in range(0, len(rows), _BATCH)]
        return ExactSearch(self._embed, self._store.items()["id"], np.concatenate(blocks))

    def costs(self, queries: list[str]) -> Result:
        """Returns the number of `parameters`, and the CPU time of a training step and of embedding a query in ms."""
        for query in queries[:20]:
            self._embed([query], None)
        begin = time.process_time()
        for query in queries:
            self._embed([query], None)
        query_ms = (time.process_time() - begin) / len(queries) * 1e3
        step_ms = self._seconds / max(1, self._done - _WARM_UP) * 1e3
        return {"parameters": self._parameters, "step_ms": round(step_ms, 3), "query_ms": round(query_ms, 4)}

    def close(self) -> None:
        """Frees the session."""
        self._session.close()

    def _embed(self, queries: Any, users: Any) -> np.ndarray:
        return self._query(self._tables.queries(queries, None))

    def _tower(self, name: str) -> Callable[[ItemFeatures | QueryFeatures], np.ndarray]:
        """Returns a tower as a function of NumPy features. The first call adds it to the graph."""
        inputs: Any = None
        output: Any = None

        def embed(features: ItemFeatures | QueryFeatures) -> np.ndarray:
            nonlocal inputs, output
            if output is None:
                with self._graph.as_default():
                    inputs = tf.nest.map_structure(placeholder, features)
                    output = getattr(self._towers, name)(inputs)
            pairs = zip(tf.nest.flatten(inputs), tf.nest.flatten(features), strict=True)
            return np.asarray(
                self._session.run(output, {tensor: array for tensor, array in pairs if tensor is not None})
            )

        return embed


def with_own_negatives(batch: Batch, count: int) -> Batch:
    """Returns a batch in which the random negatives are dealt out to the pairs, `count` to each.

    Args:
        batch: b pairs, with b * count random negatives and no own ones.
        count: number of own negatives.
    """
    b = tf.shape(batch.query_rows)[0]
    dealt = tf.transpose(tf.reshape(batch.negative_mask[:, b:], [b, b, count]), [2, 0, 1])  # [count, query, owner]
    own = tf.transpose(tf.linalg.diag_part(dealt))  # [b, count]
    return batch._replace(
        negative_mask=batch.negative_mask[:, :b], own_negative_mask=tf.ensure_shape(own, [None, count])
    )


def without_mask(batch: Batch) -> Batch:
    """Returns a batch in which every item but a pair's own positive is a negative of the pair."""
    b, n = tf.unstack(tf.shape(batch.negative_mask))
    return batch._replace(negative_mask=tf.logical_not(tf.eye(b, n, dtype=tf.bool)))


def chance_of_relevance(shop: Shop) -> Result:
    """Returns how often an item answers the query of a click, computed from the log and the truth (section 4.4).

    Returns:
        `click`: the chance that the item of the click itself answers the query. `batch`: the chance that the item of
        another click does, and `clicked`, that some user clicked that item for the query. `random`: the chance that an
        item drawn uniformly does.
    """

    def compute() -> Result:
        log = pyarrow.parquet.read_table(
            shop.directory.path / "interactions", columns=["query", "item_id"], filters=[("event", "=", "click")]
        )
        queries, query_of_row = np.unique(log["query"].to_numpy(), return_inverse=True)
        items, item_of_row = np.unique(log["item_id"].to_numpy(), return_inverse=True)
        clicks = np.bincount(item_of_row) / len(log)  # [items with a click]
        asked = np.bincount(query_of_row) / len(log)  # [queries]
        pairs = np.unique(np.stack([query_of_row, item_of_row]), axis=1)
        clicked = np.bincount(pairs[0], clicks[pairs[1]])
        table, misspelt = shop.truth_table("queries"), shop.truth_table("misspellings")
        meanings = dict(zip(table["query"], table["meanings"], strict=True))
        right = dict(zip(misspelt["query"], misspelt["right"], strict=True))
        place = {item: row for row, item in enumerate(items.tolist())}
        number = shop.opened_store.counts.items
        batch, random = 0.0, 0.0
        answers: dict[str, set[int]] = {}
        for query, share in zip(queries.tolist(), asked.tolist(), strict=True):
            relevant = answers[query] = set().union(*(shop.meanings[one] for one in meanings[right.get(query, query)]))
            batch += share * float(clicks[[place[item] for item in relevant if item in place]].sum())
            random += share * len(relevant) / number
        rows = zip(log["query"].to_pylist(), log["item_id"].to_pylist(), strict=True)
        click = sum(item in answers[query] for query, item in rows) / len(log)
        return {"click": click, "batch": batch, "clicked": float(asked @ clicked), "random": random}

    return shop.result("claim-chance", {}, compute)
