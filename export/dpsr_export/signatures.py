"""The graph of a servable and its signatures (docs/serving.md), from raw values of a request to item ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from dpsr_export import faiss_search, item_attributes, request_tables
from dpsr_export.servable_assets import FEATURE_VALUES, ITEMS
from dpsr_tf.data.examples_dataset import Features, History, Tokens
from dpsr_tf.data.store import vocabulary_name
from dpsr_tf.data.user_requests import USER
from dpsr_tf.models.embedding import weights_saver
from dpsr_tf.models.features import CODED_KINDS, FIXED_KINDS, ItemFeatures, QueryFeatures
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.two_tower import TwoTower
from dpsr_tokenizer import tf_ops

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
        out: the directory to write. It must not exist.

    Returns:
        The names of the inputs of each signature.
    """
    with tf.Graph().as_default():
        graph = _Graph(model, index, index_dir, max_parameters)
        signatures = graph.signatures()
        request_tables.check_assets()
        with v1.Session() as session:
            weights_saver(model.config.train.average_decay > 0).restore(session, checkpoint)
            builder = v1.saved_model.Builder(str(out))
            builder.add_meta_graph_and_variables(
                session,
                [tf.saved_model.SERVING],
                signature_def_map=signatures,
                assets_collection=v1.get_collection(v1.GraphKeys.ASSET_FILEPATHS),
                main_op=v1.tables_initializer(),
            )
            builder.save()
    return {name: sorted(signature.inputs) for name, signature in signatures.items()}


class _Graph:
    """The nodes that the signatures share. Inputs that a signature does not have are absent by default."""

    def __init__(self, model: ModelDirectory, index: dict[str, Any], index_dir: Path, max_parameters: str):
        self._model, self._index, self._dir = model, index, index_dir
        self._config = model.config.model
        self._vocabularies: dict[str | None, tf_ops.VocabularyTable] = {
            None: tf_ops.VocabularyTable(str(model.vocabulary_path))
        }
        named = (feature.vocabulary for feature in (*model.features.user, *model.features.item))
        for name in sorted({vocabulary for vocabulary in named if vocabulary is not None}):
            self._vocabularies[name] = tf_ops.VocabularyTable(str(index_dir / vocabulary_name(name)))
        self._values = request_tables.KeyTable(index_dir / FEATURE_VALUES) if self._has(FEATURE_VALUES) else None
        self._keys = request_tables.KeyTable(index_dir / ITEMS) if index["string_ids"] else None
        self._items = faiss_search.FaissIndexTable(
            str(index_dir / "items.faiss"),
            str(index_dir / "item_ids.dpsr"),
            attributes_path=str(index_dir / item_attributes.FILE) if item_attributes.FILE in index["files"] else None,
            # The index file contains all search parameters but max_codes.
            parameters=index.get("parameters", ""),
            max_parameters=max_parameters,
            dim=self._config.embedding_dim,
        )
        self._towers = TwoTower(self._config, model.features)

    def _has(self, name: str) -> bool:
        return name in self._index["serving_files"]

    def signatures(self) -> dict[str, Any]:
        """Returns the SignatureDefs by name."""
        query = v1.placeholder(tf.string, [None], "query")
        user: dict[str, tf.Tensor] = {}
        query_embedding = self._towers.query_embedding(
            QueryFeatures(self._tokens(query), self._features("user", query, user), self._history(query, user))
        )
        serving_k = self._model.config.serving.k
        k = v1.placeholder_with_default(tf.constant(serving_k), [], "k")
        search = {
            "k": k,
            "search_parameters": v1.placeholder_with_default("", [], "search_parameters"),
            "include": _absent(tf.string, 2, "include"),
            "exclude": _absent(tf.string, 2, "exclude"),
        }
        if self._keys is not None:
            search["excluded_item_keys"] = _absent(tf.string, 2, "excluded_item_keys")
            excluded = self._keys.item_ids(search["excluded_item_keys"])
        else:
            search["excluded_item_ids"] = excluded = _absent(tf.int64, 2, "excluded_item_ids")
        item_ids, scores, heads = self._items.search(
            query_embedding, k, search["include"], search["exclude"], excluded, search["search_parameters"]
        )
        found = {"item_ids": item_ids, "scores": scores, "heads": heads}
        if self._keys is not None:
            found["item_keys"] = self._keys.item_keys(item_ids)
        item: dict[str, tf.Tensor] = {"item_text": v1.placeholder(tf.string, [None], "item_text")}
        items = self._towers.item_embedding(
            ItemFeatures(self._tokens(item["item_text"]), self._features("item", item["item_text"], item))
        )
        score = self._towers.pair_scores(query_embedding, items)

        def signature(inputs: dict[str, tf.Tensor], outputs: dict[str, tf.Tensor]) -> Any:
            return v1.saved_model.predict_signature_def({"query": query, **inputs}, outputs)

        made = {
            "serving_default": signature({}, found),
            "search": signature(search | user, found),
            "query_embedding": signature(user, {"query_embedding": query_embedding}),
            "score": signature(user | item, {"score": score}),
        }
        for info in made["serving_default"].outputs.values():
            info.tensor_shape.dim[1].size = serving_k
        return made

    def _tokens(self, text: tf.Tensor, vocabulary: str | None = None) -> Tokens:
        ragged = self._vocabularies[vocabulary].tokenize(text)
        return Tokens(ragged.values, ragged.row_splits)

    def _features(self, side: str, texts: tf.Tensor, inputs: dict[str, tf.Tensor]) -> Features | None:
        """Returns the features that a tower reads beside `texts`, and adds their placeholders to `inputs`."""
        chosen = self._model.features.user if side == "user" else self._model.features.item
        if not chosen:
            return None
        prefix = USER if side == "user" else "item_"
        for feature in chosen:
            dtype = tf.float32 if feature.kind in ("number", "vector") else tf.string
            name = f"{prefix}{feature.name}"
            inputs[name] = _absent(dtype, 2 if feature.kind in ("multi", "vector") else 1, name)
        coded = [feature for feature in chosen if feature.kind in CODED_KINDS]
        codes: tf.Tensor = tf.zeros([tf.shape(texts)[0], 0], tf.int32)
        lists: dict[str, Tokens] = {}
        if coded:
            assert self._values is not None
            boundaries = {feature["name"]: feature["boundaries"] for feature in self._index["features"][side]}
            values = [inputs[f"{prefix}{feature.name}"] for feature in coded]
            codes, lists = self._values.feature_codes(side, coded, boundaries, texts, values)
        for feature in chosen:
            name = f"{prefix}{feature.name}"
            if feature.kind == "vector":
                lists[feature.name] = _vectors(name, inputs[name], feature.num_ids, texts)
            if feature.kind == "text":
                lists[feature.name] = self._tokens(_padded(name, inputs[name], texts), feature.vocabulary)
        return Features(codes, tuple(lists[f.name] for f in chosen if f.kind not in FIXED_KINDS))

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
            inputs[clicked] = _absent(tf.int64 if self._keys is None else tf.string, 2, clicked)
            inputs["clicked_item_types"] = _absent(tf.string, 2, "clicked_item_types")
            item_ids = inputs[clicked] if self._keys is None else self._keys.item_ids(inputs[clicked])
            table = request_tables.ItemTable(self._dir / ITEMS, self._model.features.item)
            history = table.history(query, item_ids, inputs["clicked_item_types"], config.history_length)
            fixed = sum(feature.kind in FIXED_KINDS for feature in self._model.features.item)
            codes = tf.ensure_shape(history.features.codes, [None, fixed])
            history = history._replace(features=history.features._replace(codes=codes))
        if config.query_history_length:
            inputs["past_queries"] = _absent(tf.string, 2, "past_queries")
            texts, splits = request_tables.past_queries(query, inputs["past_queries"], config.query_history_length)
            history = history._replace(query_splits=splits, query=self._tokens(texts))
        return history if config.history_length or config.query_history_length else None


def _absent(dtype: tf.DType, rank: int, name: str) -> tf.Tensor:
    """Makes an input that is an empty tensor, which means absent, unless it is fed."""
    return v1.placeholder_with_default(tf.zeros([0] * rank, dtype), [None] * rank, name)


def _padded(name: str, values: tf.Tensor, texts: tf.Tensor) -> tf.Tensor:
    """Returns `values` [batch], or as many empty texts if they are absent."""
    given, batch = tf.size(values), tf.size(texts)
    message = f"{name}: expected one value for each text, or no values"
    absent = tf.equal(given, 0)
    fits = tf.logical_or(absent, tf.equal(given, batch))
    with tf.control_dependencies([tf.debugging.Assert(fits, [message, given, batch])]):
        return tf.concat([values, tf.fill([tf.where(absent, batch, 0)], "")], axis=0)


def _vectors(name: str, values: tf.Tensor, length: int, texts: tf.Tensor) -> Tokens:
    """Returns `values` [batch, length] as one list per row. A row of NaN, which means absent, is an empty list."""
    batch, shape = tf.size(texts), tf.shape(values)
    absent = tf.equal(tf.size(values), 0)
    fits = tf.logical_or(absent, tf.reduce_all(tf.equal(shape, tf.stack([batch, length]))))
    message = f"{name}: expected {length} numbers for each text, or no values"
    with tf.control_dependencies([tf.debugging.Assert(fits, [message, shape])]):
        rows = tf.reshape(values, [-1, length])
    missing = tf.reduce_all(tf.math.is_nan(rows), axis=1)
    finite = tf.logical_or(missing, tf.reduce_all(tf.math.is_finite(rows), axis=1))
    message = f"{name}: expected finite numbers, or only NaN for a text without a vector"
    with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(finite), [message])]):
        lengths = tf.where(missing, tf.constant(0, tf.int64), length)
    lengths = tf.concat([[0], lengths, tf.zeros([tf.where(absent, batch, 0)], tf.int64)], axis=0)
    return Tokens(tf.reshape(tf.boolean_mask(rows, ~missing), [-1]), tf.cumsum(lengths))


def input_types(signature: Any) -> dict[str, tuple[np.dtype, int]]:
    """Returns NumPy type (object for text) and rank of each input of a SignatureDef."""
    return {
        name: (np.dtype(tf.as_dtype(info.dtype).as_numpy_dtype), len(info.tensor_shape.dim))
        for name, info in signature.inputs.items()
    }
