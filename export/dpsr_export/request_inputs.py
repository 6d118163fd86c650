"""The inputs of a servable's signatures that say something of users and items, and what models read of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from dpsr_export import request_tables
from dpsr_export.servable_assets import FEATURE_VALUES
from dpsr_tf.data.examples_dataset import Features, Tokens
from dpsr_tf.data.store import vocabulary_name
from dpsr_tf.data.user_requests import USER
from dpsr_tf.models.features import CODED_KINDS, FIXED_KINDS, Feature
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tokenizer import tf_ops

v1 = tf.compat.v1


class RequestInputs:
    """Turns texts and feature values into token ids and codes, in a graph."""

    def __init__(
        self,
        model: ModelDirectory,
        described: Mapping[str, Sequence[Mapping[str, Any]]],
        directory: Path,
        sides: Sequence[str] = ("user", "item"),
    ):
        """Loads the vocabularies and the table of feature values.

        Args:
            model: says which features there are, and has the vocabulary of query and item text.
            described: by side, kind and boundaries of the features (servable_assets.describe).
            directory: has the other files of servable_assets.
            sides: whose features are read.
        """
        self._spec, self._described = model.features, described
        self._vocabularies: dict[str | None, tf_ops.VocabularyTable] = {
            None: tf_ops.VocabularyTable(str(model.vocabulary_path))
        }
        named = (feature.vocabulary for side in sides for feature in getattr(self._spec, side))
        for name in sorted({vocabulary for vocabulary in named if vocabulary is not None}):
            self._vocabularies[name] = tf_ops.VocabularyTable(str(directory / vocabulary_name(name)))
        has_values = any(described[side] for side in sides)
        self._values = request_tables.KeyTable(directory / FEATURE_VALUES) if has_values else None

    def tokens(self, text: tf.Tensor, vocabulary: str | None = None) -> Tokens:
        """Returns the token ids of texts, by the vocabulary of query and item text or of a text feature."""
        ragged = self._vocabularies[vocabulary].tokenize(text)
        return Tokens(ragged.values, ragged.row_splits)

    def features(self, side: str, texts: tf.Tensor, inputs: dict[str, tf.Tensor]) -> Features | None:
        """Returns the features that a tower reads beside `texts`, and adds their placeholders to `inputs`."""
        inputs |= self.placeholders(side)
        return self.encoded(side, texts, inputs)

    def placeholders(self, side: str) -> dict[str, tf.Tensor]:
        """Makes the inputs with the values of the features of a side."""
        made = {}
        for feature in getattr(self._spec, side):
            dtype = tf.float32 if feature.kind in ("number", "vector") else tf.string
            name = input_name(side, feature)
            made[name] = absent(dtype, 2 if feature.kind in ("multi", "vector") else 1, name)
        return made

    def encoded(self, side: str, texts: tf.Tensor, inputs: Mapping[str, tf.Tensor]) -> Features | None:
        """Returns the features that a tower reads beside `texts` [batch], from the values of the inputs."""
        chosen = getattr(self._spec, side)
        if not chosen:
            return None
        coded = [feature for feature in chosen if feature.kind in CODED_KINDS]
        codes: tf.Tensor = tf.zeros([tf.shape(texts)[0], 0], tf.int32)
        lists: dict[str, Tokens] = {}
        if coded:
            assert self._values is not None
            boundaries = {feature["name"]: feature["boundaries"] for feature in self._described[side]}
            values = [inputs[input_name(side, feature)] for feature in coded]
            codes, lists = self._values.feature_codes(side, coded, boundaries, texts, values)
        for feature in chosen:
            name = input_name(side, feature)
            if feature.kind == "vector":
                lists[feature.name] = _vectors(name, inputs[name], feature.num_ids, texts)
            if feature.kind == "text":
                lists[feature.name] = self.tokens(_padded(name, inputs[name], texts), feature.vocabulary)
        return Features(codes, tuple(lists[f.name] for f in chosen if f.kind not in FIXED_KINDS))


def input_name(side: str, feature: Feature) -> str:
    """Returns the name of the input with the values of a feature of "user" or "item"."""
    return f"{USER if side == 'user' else 'item_'}{feature.name}"


def absent(dtype: tf.DType, rank: int, name: str) -> tf.Tensor:
    """Makes an input that is an empty tensor, which means absent, unless it is fed."""
    return v1.placeholder_with_default(tf.zeros([0] * rank, dtype), [None] * rank, name)


def signature(inputs: Mapping[str, tf.Tensor], outputs: Mapping[str, tf.Tensor]) -> Any:
    """Makes a SignatureDef for Predict. Requests may leave out the inputs that have a default, such as absent ones.

    TensorFlow Serving and `dpsr serve` then feed SignatureDef.defaults, which are the graph's own defaults.
    """
    made = v1.saved_model.predict_signature_def(dict(inputs), dict(outputs))
    for name, tensor in inputs.items():
        if tensor.op.type == "PlaceholderWithDefault":
            made.defaults[name].CopyFrom(tensor.op.inputs[0].op.get_attr("value"))
    return made


def save_model(
    session: tf.compat.v1.Session, signatures: Mapping[str, Any], initializer: tf.Operation, out: Path
) -> dict[str, list[str]]:
    """Writes the graph of a session as a SavedModel.

    Args:
        session: holds the weights.
        signatures: SignatureDefs by name.
        initializer: what a server runs after it has read the weights.
        out: the directory to write, which is empty or does not exist.

    Returns:
        The names of the inputs of each signature.
    """
    builder = v1.saved_model.Builder(str(out))
    builder.add_meta_graph_and_variables(
        session,
        [tf.saved_model.SERVING],
        signature_def_map=signatures,
        assets_collection=v1.get_collection(v1.GraphKeys.ASSET_FILEPATHS),
        main_op=initializer,
    )
    builder.save()
    return {name: sorted(made.inputs) for name, made in signatures.items()}


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
