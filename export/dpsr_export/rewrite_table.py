"""The table of rewrites in a servable: what `dpsr rewrite` has found for known queries (docs/rewriting.md).

A query is found by its words, so case, width, punctuation and white space make no difference. A query that is in the
table is never decoded, also if the table has no rewrite for it: its candidates have been seen and dropped.

rewrites.dpsr is a packed file of kind "items", which the tables of request_tables.py read. Its rows are the known
queries and the texts of the rewrites; a text that is both has one row.

    id, id_index.*       int64 [rows]      hash of the key, ascending
    key.splits, .bytes                     the key: of a query its words with a space between two; of a rewrite its text
    tokens.splits, .values                 empty
    feature.rewrites.splits                int64 [rows + 1]
    feature.rewrites.values                bits of int32: for a query 0, and for each rewrite, best first, the low and
                                           the high half of its id, and its log-probability as float32; else nothing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from dpsr_common.packed_file import PackedFileWriter
from dpsr_export import request_tables
from dpsr_tf.models.features import Feature
from dpsr_tokenizer import Tokenizer, TokenizerConfig, tf_ops

FILE = "rewrites.dpsr"
_FEATURE = "rewrites"
# What the table keeps of a rewrite: two halves of an id, and a log-probability.
_PARTS = 3
# The words of a text in order, and single characters where a script has no spaces.
WORDS = TokenizerConfig(letter_trigrams=False, char_bigrams=False, number_parts=False)
_tokenizer = Tokenizer(WORDS)


def words_of(text: str) -> list[str]:
    """Returns the words of a text as the tokenizer normalises them.

    >>> words_of("Drill-Bits, 12mm 手机")
    ['drill', 'bits', '12mm', '手', '机']
    """
    return _tokenizer.tokenize(text)


def key_of(text: str) -> str:
    """Returns the key of a query: its words with a space between two; "" for a text without a word."""
    return " ".join(words_of(text))


def keys_of(texts: tf.Tensor) -> tf.Tensor:
    """Returns the keys of queries, string [batch], in a graph."""
    words = tf_ops.tokenize_strings(texts, WORDS)
    # Neither to_tensor nor value_rowids: both make something of the size batch times longest query.
    rows = tf.searchsorted(words.row_splits, tf.range(tf.size(words.values, tf.int64)), side="right") - 1
    return tf.strings.unsorted_segment_join(words.values, rows, words.nrows(), separator=" ")


def write(rewrites: Mapping[str, Sequence[tuple[str, float]]], path: Path) -> None:
    """Writes the table.

    Args:
        rewrites: for the key of each query its rewrites, best first: text and log-probability. Texts are not empty and
            have no white space at their ends.
        path: the file to write.

    Raises:
        CommandError: two texts have the same hash.
    """
    texts = list(dict.fromkeys([*rewrites, *(text for found in rewrites.values() for text, _ in found)]))
    rows = request_tables.TextRows.of(
        texts, f"{path}: two of the texts have the same 63-bit hash; leave out one of the queries"
    )
    id_of = {texts[place]: one for place, one in zip(rows.order.tolist(), rows.ids.tolist(), strict=True)}
    lists = [_packed(rewrites.get(texts[place]), id_of) for place in rows.order.tolist()]
    splits = np.cumsum([0, *map(len, lists)], dtype=np.int64)
    with PackedFileWriter(str(path), "items") as file:
        rows.add_to(file)
        file.add(f"feature.{_FEATURE}.splits", splits)
        # The reader takes vectors, which are floats, as they are; it would check integers as codes.
        values = np.concatenate(lists) if lists else np.zeros(0, np.int32)
        file.add(f"feature.{_FEATURE}.values", values.view(np.float32))


def _packed(found: Sequence[tuple[str, float]] | None, id_of: Mapping[str, int]) -> np.ndarray:
    if found is None:
        return np.zeros(0, np.int32)
    packed = np.zeros(1 + _PARTS * len(found), np.int32)
    rows = packed[1:].reshape(-1, _PARTS)
    rows[:, :2] = np.array([id_of[text] for text, _ in found], "<i8").view("<i4").reshape(-1, 2)
    rows[:, 2] = np.array([score for _, score in found], np.float32).view(np.int32)
    return packed


class Found(NamedTuple):
    """What the table has for queries.

    Attributes:
        rewrites: string [batch, n], padded with "".
        log_probabilities: float32 [batch, n], padded with -inf.
        known: bool [batch], whether the query is in the table.
    """

    rewrites: tf.Tensor
    log_probabilities: tf.Tensor
    known: tf.Tensor


class RewriteTable:
    """The table in the graph of a servable."""

    def __init__(self, path: Path):
        """Adds the ops that load the file."""
        self._keys = request_tables.KeyTable(path)
        self._rows = request_tables.ItemTable(path, [Feature(_FEATURE, "vector", 1)])

    def find(self, queries: tf.Tensor, n: int) -> Found:
        """Returns the first n rewrites of queries, string [batch]."""
        keys = keys_of(queries)
        ids = self._keys.item_ids(keys)[:, tf.newaxis]
        found = self._rows.history(keys, ids, tf.zeros([0, 0], tf.string), 1)
        held, places = found.features.lists[0], found.items.row_splits
        values = held.values if held.values.dtype == tf.int32 else tf.bitcast(held.values, tf.int32)
        ragged = tf.RaggedTensor.from_row_splits(values, held.row_splits, validate=False)
        # A last row of padding is for queries that are not in the table.
        rows = tf.concat([ragged.to_tensor(-1, shape=[None, 1 + _PARTS * n]), tf.fill([1, 1 + _PARTS * n], -1)], 0)
        lengths = tf.concat([held.row_splits[1:] - held.row_splits[:-1], [0]], 0)
        last = tf.size(lengths, tf.int64) - 1
        row = tf.where(places[1:] > places[:-1], places[:-1], last)
        parts = tf.reshape(tf.gather(rows, row)[:, 1:], [-1, n, _PARTS])
        texts = self._keys.item_keys(tf.bitcast(parts[:, :, :2], tf.int64))
        scores = tf.bitcast(parts[:, :, 2], tf.float32)
        scores = tf.where(tf.equal(texts, ""), -np.inf * tf.ones_like(scores), scores)
        # A row of length 0 is the text of a rewrite only.
        return Found(texts, scores, tf.gather(lengths, row) > 0)
