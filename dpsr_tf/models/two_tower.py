"""The two towers (DPSR section 4.1): text in, unit vectors out, trained together and used apart."""

from __future__ import annotations

import tensorflow as tf

from dpsr_tf.config import ModelConfig
from dpsr_tf.data.dataset import Tokens

v1 = tf.compat.v1


class TwoTower:
    """Query tower and item tower over one shared embedding table.

    Each tower sums the embeddings of a text's tokens, sends the sum through its own ReLU layers and a last linear one,
    and normalises to length 1. Variables are made on the first call and shared by all later ones of a graph; their
    names (`token_embedding`, `query_tower/...`, `item_tower/...`) are what a checkpoint holds.

    Example:
        tower = TwoTower(ModelConfig(embedding_dim=64), num_ids=vocabulary.num_ids)
        scores = tf.matmul(tower.query_embedding(batch.query), tower.item_embedding(batch.item), transpose_b=True)
    """

    def __init__(self, config: ModelConfig, num_ids: int):
        """`num_ids`: rows of the embedding table, Vocabulary.num_ids."""
        self._config = config
        with v1.variable_scope(v1.get_variable_scope(), reuse=v1.AUTO_REUSE):
            bound = config.token_dim**-0.5
            self.token_embedding = v1.get_variable(
                "token_embedding",
                [num_ids, config.token_dim],
                initializer=v1.random_uniform_initializer(-bound, bound),
                use_resource=True,
            )

    def query_embedding(self, tokens: Tokens) -> tf.Tensor:
        """Unit vectors [texts, embedding_dim] float32; zero for a text without tokens, which matches nothing."""
        return self._tower("query_tower", tokens)

    def item_embedding(self, tokens: Tokens) -> tf.Tensor:
        """Unit vectors [texts, embedding_dim] float32; zero for a text without tokens."""
        return self._tower("item_tower", tokens)

    def _tower(self, name: str, tokens: Tokens) -> tf.Tensor:
        x = self._sum_of_embeddings(tokens)
        with v1.variable_scope(name, reuse=v1.AUTO_REUSE):
            for i, width in enumerate(self._config.hidden):
                x = tf.nn.relu(_dense(f"hidden_{i}", x, width))
            x = _dense("embedding", x, self._config.embedding_dim)
        has_tokens = tokens.row_splits[1:] > tokens.row_splits[:-1]
        return tf.math.l2_normalize(x, axis=1, epsilon=1e-12) * tf.cast(has_tokens, x.dtype)[:, tf.newaxis]

    def _sum_of_embeddings(self, tokens: Tokens) -> tf.Tensor:
        segments = tf.ragged.row_splits_to_segment_ids(tokens.row_splits)
        rows = tf.gather(self.token_embedding, tokens.values)
        total = tf.math.unsorted_segment_sum(rows, segments, tf.shape(tokens.row_splits)[0] - 1)
        return tf.ensure_shape(total, [None, self._config.token_dim])


def _dense(name: str, x: tf.Tensor, width: int) -> tf.Tensor:
    with v1.variable_scope(name, reuse=v1.AUTO_REUSE):
        kernel = v1.get_variable(
            "kernel", [x.shape[1], width], initializer=v1.glorot_uniform_initializer(), use_resource=True
        )
        bias = v1.get_variable("bias", [width], initializer=v1.zeros_initializer(), use_resource=True)
    return tf.nn.bias_add(tf.matmul(x, kernel), bias)
