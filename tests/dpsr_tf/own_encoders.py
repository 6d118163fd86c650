"""Text encoders as a user writes them, and some that are wrong; test_text_encoder.py names them in configs."""

from __future__ import annotations

import tensorflow as tf

v1 = tf.compat.v1


class Mean:
    """The mean of a text's tokens and a layer on it, with a variable of TensorFlow 1."""

    def __init__(self, config):
        self.shape = [config.token_dim, 9]

    def __call__(self, texts):
        splits = texts.tokens.row_splits
        count = tf.cast(splits[1:] - splits[:-1], tf.float32)[:, tf.newaxis]
        kernel = v1.get_variable("kernel", self.shape, use_resource=True)
        return tf.tanh(tf.matmul(tf.math.divide_no_nan(texts.bag(), count), kernel))


class Gru:
    """The sum of the tokens, and beside it what a GRU reads in their order; its bias is seen in empty texts too."""

    def __init__(self, config):
        self.gru = tf.keras.layers.GRU(3)

    def __call__(self, texts):
        embeddings, mask = texts.embeddings()
        return tf.concat([texts.bag(), self.gru(embeddings, mask=mask) + 1.0], axis=1)


class Convolution:
    """The largest output of a convolution over the tokens."""

    def __init__(self, config):
        self.convolution = tf.keras.layers.Conv1D(config.token_dim, 3, padding="same", activation="relu")

    def __call__(self, texts):
        embeddings, mask = texts.embeddings()
        return tf.reduce_max(self.convolution(embeddings) * tf.cast(mask, tf.float32)[:, :, tf.newaxis], axis=1)


class TwoLayers:
    """A layer for each tower, made at first use: the case in which names could depend on the order of calls."""

    def __init__(self, config):
        self.of_tower = {tower: tf.keras.layers.Dense(config.token_dim) for tower in ("query", "item")}
        self.shared = tf.keras.layers.LayerNormalization()

    def __call__(self, texts):
        return self.shared(self.of_tower[texts.tower](texts.bag()))


class Steps:
    """Has a variable that is not trained."""

    def __call__(self, texts):
        scale = v1.get_variable("scale", [], initializer=v1.ones_initializer(), trainable=False, use_resource=True)
        return texts.bag() * scale

    def __init__(self, config):
        pass


def first_tokens(config):
    return lambda texts: tf.reduce_sum(texts.embeddings(max_tokens=2)[0], axis=1)


def training_only(config):
    return lambda texts: texts.bag() * (3.0 if texts.training else 1.0)


def no_function(config):
    return None


def of_rank_3(config):
    return lambda texts: texts.embeddings()[0]


def nothing(config):
    return lambda texts: None


def for_each_token(config):
    return lambda texts: tf.reshape(texts.embeddings()[0], [-1, config.token_dim])


def python(config):
    return lambda texts: tf.ensure_shape(tf.numpy_function(lambda x: x, [texts.bag()], tf.float32), [None, 4])


NOT_A_FUNCTION = 3
