"""The graph of a servable and its signatures (docs/serving.md), from raw values of a request to item ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from dpsr_export import faiss_search, fresh_items, item_attributes, query_table, request_tables
from dpsr_export.request_inputs import RequestInputs, absent, save_model, signature
from dpsr_export.servable_assets import ITEMS
from dpsr_tf.data.examples_dataset import Features, History, Tokens
from dpsr_tf.models.embedding import weights_saver
from dpsr_tf.models.features import FIXED_KINDS, ItemFeatures, QueryFeatures
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.two_tower import TwoTower

v1 = tf.compat.v1


def write_saved_model(
    model: ModelDirectory, index: dict[str, Any], index_dir: Path, max_parameters: str, checkpoint: str, out: Path
) -> dict[str, list[str]]:
    """Writes a SavedModel with the towers of a model and an index.

    Args:
        model: the model.
        index: content of index.json.
        index_dir: directory with the files of the index.
        max_parameters: the search parameters that a request may set, with their largest values.
        checkpoint: path of the weights.
        out: the directory to write, which is empty or does not exist.

    Returns:
        The names of the inputs of each signature.
    """
    with tf.Graph().as_default():
        graph = _Graph(model, index, index_dir, max_parameters)
        signatures = graph.signatures()
        request_tables.check_assets()
        initializer = graph.changes.initializer(v1.tables_initializer())
        with v1.Session() as session:
            weights_saver(model.config.train.average_decay > 0).restore(session, checkpoint)
            return save_model(session, signatures, initializer, out)


class _Graph:
    """The nodes that the signatures share. Inputs that a signature does not have are absent by default."""

    def __init__(self, model: ModelDirectory, index: dict[str, Any], index_dir: Path, max_parameters: str):
        self._model, self._index, self._dir = model, index, index_dir
        shard, num_shards = index.get("shard", (0, 1))
        self._config = model.config.model
        self._inputs = RequestInputs(model, index["features"], index_dir)
        self._keys = request_tables.KeyTable(index_dir / ITEMS) if index["string_ids"] else None
        self._items = faiss_search.FaissIndexTable(
            str(index_dir / "items.faiss"),
            str(index_dir / "item_ids.dpsr"),
            attributes_path=str(index_dir / item_attributes.FILE) if item_attributes.FILE in index["files"] else None,
            # The index file contains all search parameters but max_codes.
            parameters=index.get("parameters", ""),
            max_parameters=max_parameters,
            dim=self._config.embedding_dim,
            changes_offset=index.get("changes_offset", 0),
            shard=shard,
            num_shards=num_shards,
        )
        self._towers = TwoTower(self._config, model.features)
        self.changes = fresh_items.ItemChanges(self._items, model.features.item, self._embed, num_shards)
        self._graph = (
            query_table.QueryTable(index_dir / query_table.FILE, self._config.token_dim)
            if query_table.FILE in index["serving_files"]
            else None
        )

    def signatures(self) -> dict[str, Any]:
        """Returns the SignatureDefs by name."""
        query = v1.placeholder(tf.string, [None], "query")
        user: dict[str, tf.Tensor] = {}
        tokens = self._inputs.tokens(query)
        context = self._graph.context(tokens) if self._graph else None
        query_embedding = self._towers.query_embedding(
            QueryFeatures(
                tokens, self._inputs.features("user", query, user), self._history(query, user), context=context
            )
        )
        serving_k = self._model.config.serving.k
        k = v1.placeholder_with_default(tf.constant(serving_k), [], "k")
        search = {
            "k": k,
            "search_parameters": v1.placeholder_with_default("", [], "search_parameters"),
            "include": absent(tf.string, 2, "include"),
            "exclude": absent(tf.string, 2, "exclude"),
        }
        if self._keys is not None:
            search["excluded_item_keys"] = absent(tf.string, 2, "excluded_item_keys")
            keys = search["excluded_item_keys"]
            excluded = self._items.changed_item_ids(keys, self._keys.item_ids(keys))
        else:
            search["excluded_item_ids"] = excluded = absent(tf.int64, 2, "excluded_item_ids")
        item_ids, scores, heads = self._items.search(
            query_embedding, k, search["include"], search["exclude"], excluded, search["search_parameters"]
        )
        found = {"item_ids": item_ids, "scores": scores, "heads": heads}
        if self._keys is not None:
            found["item_keys"] = self._items.changed_item_keys(item_ids, self._keys.item_keys(item_ids))
        item = {"item_text": v1.placeholder(tf.string, [None], "item_text"), **self._inputs.placeholders("item")}
        items = self._embed(item["item_text"], item)
        score = self._towers.pair_scores(query_embedding, items)

        texts = {"query": query}
        made = {
            "serving_default": signature(texts, found),
            "search": signature(texts | search | user, found),
            "query_embedding": signature(texts | user, {"query_embedding": query_embedding}),
            "item_embedding": signature(item, {"item_embedding": items}),
            "score": signature(texts | user | item, {"score": score}),
            "apply_changes": self.changes.signature(),
        }
        for info in made["serving_default"].outputs.values():
            info.tensor_shape.dim[1].size = serving_k
        return made

    def _embed(self, texts: tf.Tensor, inputs: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Returns the embeddings [n, dim] of items with texts [n] and these feature inputs."""
        return self._towers.item_embedding(
            ItemFeatures(self._inputs.tokens(texts), self._inputs.encoded("item", texts, inputs))
        )

    def _history(self, query: tf.Tensor, inputs: dict[str, tf.Tensor]) -> History | None:
        """Returns the history that the query tower reads, if it reads one, and adds its placeholders to `inputs`."""
        config = self._config
        splits = tf.zeros([tf.shape(query)[0] + 1], tf.int64)
        no_texts = Tokens(tf.zeros([0], tf.int32), tf.zeros([1], tf.int64))
        history = History(
            Tokens(tf.zeros([0], tf.int32), splits),
            tf.zeros([0], tf.int32),
            no_texts,
            Features(tf.zeros([0, 0], tf.int32), ()),
            splits,
            no_texts,
        )
        if config.history_length:
            clicked = "clicked_items" if self._keys is None else "clicked_item_keys"
            inputs[clicked] = absent(tf.int64 if self._keys is None else tf.string, 2, clicked)
            inputs["clicked_item_types"] = absent(tf.string, 2, "clicked_item_types")
            item_ids = inputs[clicked] if self._keys is None else self._keys.item_ids(inputs[clicked])
            table = request_tables.ItemTable(self._dir / ITEMS, self._model.features.item)
            history = table.history(query, item_ids, inputs["clicked_item_types"], config.history_length)
            fixed = sum(feature.kind in FIXED_KINDS for feature in self._model.features.item)
            codes = tf.ensure_shape(history.features.codes, [None, fixed])
            history = history._replace(features=history.features._replace(codes=codes))
        if config.query_history_length:
            inputs["past_queries"] = absent(tf.string, 2, "past_queries")
            texts, splits = request_tables.past_queries(query, inputs["past_queries"], config.query_history_length)
            history = history._replace(query_splits=splits, query=self._inputs.tokens(texts))
        return history if config.history_length or config.query_history_length else None


def input_types(signature: Any) -> dict[str, tuple[np.dtype, int]]:
    """Returns NumPy type (object for text) and rank of each input of a SignatureDef."""
    return {
        name: (np.dtype(tf.as_dtype(info.dtype).as_numpy_dtype), len(info.tensor_shape.dim))
        for name, info in signature.inputs.items()
    }
