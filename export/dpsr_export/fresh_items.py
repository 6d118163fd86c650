"""The graph that applies changes of items to the index of a servable, from the log beside its versions.

The log holds items, not vectors (dpsr_export/item_changes.py). New items go through the item tower of the servable that
applies them, so an index never holds vectors of two models. A servable applies all changes that its index does not have
when it is loaded, before it is ready. Later changes are applied by calls of the signature `apply_changes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from dpsr_export.faiss_search import FaissIndexTable, read_item_changes
from dpsr_export.item_changes import PUT
from dpsr_export.request_inputs import input_name, signature
from dpsr_tf.models.features import Feature

v1 = tf.compat.v1

# The counts of FaissIndexTable.changes_state, in order.
COUNTS = ("items", "open", "sealed", "segments", "hidden", "ignored", "not_indexed", "updated")
# Changes that one call applies, unless it asks for another number, and that one step of the replay applies.
_BATCH = 1024


class ItemChanges:
    """Applies the changes of a servable's log to its index."""

    def __init__(
        self,
        items: FaissIndexTable,
        features: Sequence[Feature],
        embed: Callable[[tf.Tensor, Mapping[str, tf.Tensor]], tf.Tensor],
        num_shards: int,
    ):
        """Makes the variable that remembers where the servable is.

        Args:
            items: the index.
            features: what the item tower reads beside the text.
            embed: returns the embeddings [n, dim] of items with texts [n] and feature inputs by name.
            num_shards: number of servables that share the log. Their base paths are in the directory that holds it.
        """
        self._items, self._features, self._embed = items, features, embed
        # From an asset, BASE/VERSION/assets/FILE, to the directory that holds the log.
        self._up = 3 if num_shards == 1 else 4
        # Servers tell a graph where its assets are only while they initialize it.
        self._asset = v1.get_variable(
            "item_changes_asset",
            initializer=tf.constant(""),
            trainable=False,
            collections=[v1.GraphKeys.LOCAL_VARIABLES],
            use_resource=True,
        )

    def initializer(self, tables: tf.Operation) -> tf.Operation:
        """Returns the op that initializes the servable: the tables, then all changes of the log."""
        with tf.control_dependencies([tables]):
            located = self._asset.assign(self._items.item_ids_path, read_value=False)
        with tf.control_dependencies([located]):
            replayed = tf.while_loop(
                lambda changes: changes > 0,
                lambda changes: self._apply(tf.constant(_BATCH), log_errors=True),
                [tf.constant(1)],
                parallel_iterations=1,
                name="replay_item_changes",
            )
        return tf.group(replayed)

    def signature(self) -> Any:
        """Returns the signature `apply_changes`."""
        max_changes = v1.placeholder_with_default(tf.constant(_BATCH), [], "max_changes")
        changes = self._apply(max_changes, log_errors=False)
        with tf.control_dependencies([changes]):
            state = self._items.changes_state()
        counts = {name: state.counts[place] for place, name in enumerate(COUNTS)}
        outputs = {"changes": changes, "offset": state.offset, "last_time": state.last_time, "drift": state.drift}
        return signature({"max_changes": max_changes}, outputs | counts)

    def _apply(self, max_changes: tf.Tensor, log_errors: bool) -> tf.Tensor:
        """Applies the next changes. Returns how many; 0 if there are none, or another call has just applied them."""
        offset = self._items.changes_state().offset
        changes = read_item_changes(self._asset.read_value(), offset, max_changes, self._up, log_errors)
        puts = tf.boolean_mask(changes.examples, tf.equal(changes.kinds, PUT))
        texts, inputs = self._parsed(puts)
        applied = self._items.apply_changes(offset, changes, self._embed(texts, inputs))
        return tf.where(applied, tf.size(changes.kinds), 0)

    def _parsed(self, examples: tf.Tensor) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        """Returns texts [n] and the feature inputs of items. What an example does not have is absent, as in requests.

        Inputs that the tower does not read are ignored. A list of another length than the feature has counts as absent.
        """
        numbers = {"number", "vector"}
        wanted: dict[str, Any] = {"item_text": tf.io.FixedLenFeature([], tf.string, "")}
        for feature in self._features:
            dtype = tf.float32 if feature.kind in numbers else tf.string
            wanted[input_name("item", feature)] = tf.io.VarLenFeature(dtype)
        parsed = tf.io.parse_example(examples, wanted)
        texts = parsed["item_text"]
        inputs = {}
        for feature in self._features:
            name = input_name("item", feature)
            nothing = float("nan") if feature.kind in numbers else ""
            length = feature.num_ids if feature.kind == "vector" else 1
            values = tf.sparse.to_dense(parsed[name], nothing)
            if feature.kind != "multi":
                empty = tf.fill([tf.size(texts), length], nothing)
                fits = tf.equal(_lengths(parsed[name]), length)
                values = tf.where(tf.expand_dims(fits, 1), tf.concat([values, empty], axis=1)[:, :length], empty)
            if feature.kind == "vector":
                finite = tf.reduce_all(tf.math.is_finite(values), axis=1, keepdims=True)
                values = tf.where(finite, values, empty)
            inputs[name] = values if feature.kind in ("multi", "vector") else values[:, 0]
        return texts, inputs


def _lengths(lists: tf.SparseTensor) -> tf.Tensor:
    """Returns the number of values of each row."""
    rows = tf.cast(lists.indices[:, 0], tf.int32)
    return tf.math.bincount(rows, minlength=tf.cast(lists.dense_shape[0], tf.int32))
