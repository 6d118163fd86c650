"""Runs the towers of a checkpoint on NumPy arrays: item embeddings, query embeddings, and exact search over both.

Validation, evaluation and `dpsr index` use it; training and export build graphs of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from dpsr_common.errors import CommandError
from dpsr_common.packed_file import PackedFile
from dpsr_tf.config import ModelConfig
from dpsr_tf.data.examples_dataset import Features, History, Tokens
from dpsr_tf.data.neighbourhoods import Neighbourhoods
from dpsr_tf.data.store import RowsById, Store
from dpsr_tf.data.user_requests import User
from dpsr_tf.models.embedding import weights_saver
from dpsr_tf.models.exact_search import ExactSearch, QueryEncoder, best_of_blocks
from dpsr_tf.models.features import FIXED_KINDS, Feature, FeatureSpec, ItemFeatures, QueryFeatures
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.quantizer import Quantizer
from dpsr_tf.models.two_tower import TwoTower

v1 = tf.compat.v1

_BATCH = 4096
# Number of items that are searched at once.
_BLOCK = 8 * _BATCH


def exact_search(directory: str | Path, store: Store, quantized: bool = False) -> ExactSearch:
    """Returns exact search over the embeddings of all items of a store, for the users of the store.

    Args:
        directory: the model.
        store: its store.
        quantized: whether to score T(x) in the place of the embeddings x, as the model's index does.

    Raises:
        CommandError: no model or checkpoint is there, the store has another vocabulary, or the checkpoint has no
            quantizer.
    """
    embeddings, model = item_embeddings(directory, store), ModelDirectory.open(directory)
    if quantized:
        embeddings = Quantizer.read(model.last_checkpoint())(embeddings)
    encode, personal = query_encoder(directory, store), is_personal(model.config.model)
    return ExactSearch(encode, store.items()["id"], embeddings, personal, model.validated)


def best_items(
    directory: str | Path,
    store: Store,
    queries: Sequence[str],
    users: Sequence[User] | None,
    k: int,
    quantized: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds what `exact_search` finds, in memory for some 30,000 items, however many the store has.

    Args:
        directory, store, quantized: as for `exact_search`.
        queries: texts [n].
        users: who asks [n], or None.
        k: number of items to find for each query.

    Returns:
        Item ids int64 [n, k] and scores float32 [n, k]; -1 and -inf where there are fewer.

    Raises:
        CommandError: as exact_search.
    """
    model = ModelDirectory.open(directory, "retrieval")
    encode_queries = query_encoder(directory, store)
    encode_items = item_encoder(model, store, model.last_checkpoint())
    quantizer = Quantizer.read(model.last_checkpoint()) if quantized else None
    heads = [
        encode_queries(queries[begin : begin + _BATCH], users[begin : begin + _BATCH] if users else None)
        for begin in range(0, len(queries), _BATCH)
    ]
    item_ids = store.items()["id"]

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for begin in range(0, len(item_ids), _BLOCK):
            rows = np.arange(begin, min(begin + _BLOCK, len(item_ids)))
            batches = [encode_items(rows[at : at + _BATCH]) for at in range(0, len(rows), _BATCH)]
            embeddings = np.concatenate(batches)
            yield item_ids[rows], embeddings if quantizer is None else quantizer(embeddings)

    return best_of_blocks(np.concatenate(heads), blocks(), k)


def item_embeddings(directory: str | Path, store: Store) -> np.ndarray:
    """Embeds all items of a store, in its order, by a model's last checkpoint: float32 [items, embedding_dim].

    Raises:
        CommandError: no model or checkpoint is there, or the store has another vocabulary.
    """
    model = ModelDirectory.open(directory, "retrieval")
    encode = item_encoder(model, store, model.last_checkpoint())
    embeddings = np.empty((store.counts.items, model.config.model.embedding_dim), np.float32)
    for begin in range(0, len(embeddings), _BATCH):
        rows = np.arange(begin, min(begin + _BATCH, len(embeddings)))
        embeddings[rows] = encode(rows)
    return embeddings


def item_encoder(model: ModelDirectory, store: Store, checkpoint: str) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the item tower of a checkpoint: a function from rows of the item table [n] to float32 [n, embedding_dim].

    The first call makes the graph. After it, several threads may call the function at the same time.

    Raises:
        CommandError: the store has another vocabulary or other features than the model, or the model is a ranker. When
            called: the checkpoint cannot be read.
    """
    model.expect("retrieval")
    tables = StoreTables(model, store)
    encode = _tower(model, tables.spec, checkpoint, "item_embedding")
    return lambda rows: encode(tables.items(rows))


def query_encoder(directory: str | Path, store: Store, checkpoint: str | None = None) -> QueryEncoder:
    """Returns the query tower of a checkpoint, by default of the last one.

    Raises:
        CommandError: no model or checkpoint is there, or the store has another vocabulary.
    """
    model = ModelDirectory.open(directory, "retrieval")
    tables = StoreTables(model, store)
    path = str(model.path / checkpoint) if checkpoint else model.last_checkpoint()
    encode = _tower(model, tables.spec, path, "query_embedding")
    return lambda queries, users: encode(tables.queries(queries, users))


def query_contexts(
    model: ModelDirectory, store: Store, checkpoint: str
) -> tuple[Callable[[np.ndarray], np.ndarray], Neighbourhoods]:
    """Returns what a model with a graph adds to queries of the log, and the neighbourhoods that it reads.

    Returns:
        A function from rows of queries [n], counted over all shards, to float32 [n, token_dim], TwoTower.query_context;
        and the neighbourhoods.

    Raises:
        CommandError: as item_encoder.
    """
    tables = StoreTables(model, store)
    neighbourhoods = tables.neighbourhoods
    assert neighbourhoods is not None
    encode = _tower(model, tables.spec, checkpoint, "query_context")

    def contexts(rows: np.ndarray) -> np.ndarray:
        return encode(QueryFeatures(neighbourhoods.texts(rows), graph=neighbourhoods.of_queries(rows)))

    return contexts, neighbourhoods


def is_personal(config: ModelConfig) -> bool:
    """Returns whether the query tower reads features or history of the user."""
    return bool(config.user_features or config.history_length or config.query_history_length)


class StoreTables:
    """Reads from a store what the towers need, as NumPy arrays: features of items and users, and users' histories.

    A history is the same as in training: what the user did strictly before a time, oldest first.

    Attributes:
        spec: the features that the towers read.
    """

    def __init__(self, model: ModelDirectory, store: Store):
        """Raises CommandError if the store has another vocabulary or other features than the model."""
        difference = model.store_difference(store)
        if difference:
            raise CommandError(f"{model.path}: {difference}; give the store the model was trained on")
        self._config, self._vocabulary, self.spec = model.config.model, model.vocabulary, model.features
        self._items, self._users = store.items(), store.users()
        self._user_rows = RowsById(self._users["id"])
        self._log_splits, self._log_tokens = np.zeros(1, np.int64), np.zeros(0, np.int32)
        if self._config.query_history_length:
            shards = store.interactions()
            lengths = [np.diff(shard["query.splits"]) for shard in shards]
            self._log_splits = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
            self._log_tokens = np.concatenate([shard["query.tokens"] for shard in shards])
        self.neighbourhoods: Neighbourhoods | None = None
        if self._config.graph_fan_out:
            attributes = {attribute.name: attribute.num_ids for attribute in self.spec.graph}
            self.neighbourhoods = Neighbourhoods(store, self._config.graph_fan_out, attributes)

    def items(self, rows: np.ndarray) -> ItemFeatures:
        """Returns the features of rows of the item table [n]."""
        text = take(self._items["tokens.values"], self._items["tokens.splits"], rows)
        graph = self.neighbourhoods.of_items(rows) if self.neighbourhoods else None
        return ItemFeatures(text, features_of(self._items, self.spec.item, rows), graph)

    def queries(self, queries: Sequence[str], users: Sequence[User] | None) -> QueryFeatures:
        """Returns the features of n queries and users. A user whom the store does not have counts as anonymous."""
        users = users or [User(-1)] * len(queries)
        rows = np.maximum(self._user_rows(np.array([user.id for user in users], np.int64)), 0)
        text = Tokens(*self._vocabulary.encode_batch(list(queries)))
        history = None
        if self._config.history_length or self._config.query_history_length:
            history = self._history(rows, [user.time for user in users])
        graph = self.neighbourhoods.of_queries(self.neighbourhoods.known(text)) if self.neighbourhoods else None
        return QueryFeatures(text, features_of(self._users, self.spec.user, rows), history, graph)

    def _history(self, rows: np.ndarray, times: Sequence[int | None]) -> History:
        splits, time, query = (self._users[f"event.{name}"] for name in ("splits", "time", "query"))
        events: list[np.ndarray] = []
        queries: list[np.ndarray] = []
        for row, until in zip(rows, times, strict=True):
            begin, end = splits[row], splits[row + 1]
            if until is not None:
                end = begin + np.searchsorted(time[begin:end], until, side="left")
            events.append(np.arange(max(begin, end - self._config.history_length), end))
            asked = query[begin:end]
            changes = asked[np.r_[True, asked[1:] != asked[:-1]]] if len(asked) else asked
            queries.append(changes[max(0, len(changes) - self._config.query_history_length) :])
        event = np.concatenate(events)
        item = self._users["event.item"][event]
        text, features, _ = self.items(item)
        none = Features(np.zeros((len(item), 0), np.int32), ())
        return History(
            items=Tokens(item, splits_of(events)),
            types=self._users["event.type"][event].astype(np.int32),
            text=text,
            features=none if features is None else features,
            query_splits=splits_of(queries),
            query=take(self._log_tokens, self._log_splits, np.concatenate(queries)),
        )


def splits_of(lists: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the row splits of some lists, int64 [lists + 1]."""
    return np.cumsum([0, *map(len, lists)], dtype=np.int64)


def take(values: np.ndarray, splits: np.ndarray, rows: np.ndarray) -> Tokens:
    """Returns some rows of a ragged table."""
    begins, lengths = splits[rows], splits[rows + 1] - splits[rows]
    taken = np.concatenate([[0], np.cumsum(lengths)])
    places = np.repeat(begins - taken[:-1], lengths) + np.arange(taken[-1])
    return Tokens(values[places], taken.astype(np.int64))


def features_of(table: PackedFile, features: Sequence[Feature], rows: np.ndarray) -> Features | None:
    """Returns codes [rows, fixed features] and lists of some rows of a table; None without features."""
    if not features:
        return None
    fixed = [table[f"feature.{feature.name}"][rows] for feature in features if feature.kind in FIXED_KINDS]
    lists = [
        take(table[f"feature.{feature.name}.values"], table[f"feature.{feature.name}.splits"], rows)
        for feature in features
        if feature.kind not in FIXED_KINDS
    ]
    codes = np.stack(fixed, axis=1) if fixed else np.zeros((len(rows), 0), np.int32)
    return Features(codes.astype(np.int32), tuple(lists))


def restore(model: ModelDirectory, session: tf.compat.v1.Session, checkpoint: str) -> None:
    """Restores the weights that are served into the default graph, whose variables are those of the model.

    Args:
        model: the model.
        session: of the default graph.
        checkpoint: path of a checkpoint.

    Raises:
        CommandError: the checkpoint cannot be read, or has other variables.
    """
    try:
        weights_saver(model.config.train.average_decay > 0).restore(session, checkpoint)
    except (tf.errors.OpError, ValueError):
        encoder = model.config.model.encoder
        shape = f"the config or the code of {encoder}" if encoder else "the config"
        raise CommandError(
            f"{model.path}: {Path(checkpoint).name} cannot be read, or does not fit {shape}; train the model again"
        ) from None


def _tower(
    model: ModelDirectory, spec: FeatureSpec, checkpoint: str, name: str
) -> Callable[[ItemFeatures | QueryFeatures], np.ndarray]:
    """Returns a tower of a checkpoint as a function of NumPy features. The first call makes the graph."""
    graph = tf.Graph()
    session = v1.Session(graph=graph)
    inputs: Any = None
    output: Any = None

    def encode(features: ItemFeatures | QueryFeatures) -> np.ndarray:
        nonlocal inputs, output
        if output is None:
            with graph.as_default():
                inputs = tf.nest.map_structure(placeholder, features)
                output = getattr(TwoTower(model.config.model, spec), name)(inputs)
                restore(model, session, checkpoint)
        pairs = zip(tf.nest.flatten(inputs), tf.nest.flatten(features), strict=True)
        return session.run(output, {tensor: array for tensor, array in pairs if tensor is not None})

    return encode


def placeholder(array: np.ndarray | None) -> tf.Tensor | None:
    """Returns a placeholder for arrays like this one, with any number of rows; None for None."""
    return None if array is None else v1.placeholder(array.dtype, [None, *array.shape[1:]])
