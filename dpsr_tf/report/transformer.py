"""A Transformer as text encoder, for the comparison that section 4.2 of the paper mentions.

A config chooses it with `model.encoder=dpsr_tf.report.transformer:beside_the_sum` or `:alone`. docs/own_encoder.md says
what such an encoder gets and returns.
"""

from __future__ import annotations

import tensorflow as tf

from dpsr_tf.config import ModelConfig
from dpsr_tf.models.text_encoder import EncoderInput, TextEncoder

# Tokens of a text that count; a word stands before its letter trigrams.
_MAX_TOKENS = 48
_HEADS = 4


class Transformer:
    """One block of a Transformer encoder (Vaswani et al., 2017) over a text's tokens, and the mean of its outputs."""

    def __init__(self, config: ModelConfig):
        """Makes the layers, all of width `config.token_dim`."""
        layers, dim = tf.keras.layers, config.token_dim
        self._positions = layers.Embedding(_MAX_TOKENS, dim)
        self._attention = layers.MultiHeadAttention(_HEADS, dim // _HEADS)
        self._widen, self._narrow = layers.Dense(2 * dim, "relu"), layers.Dense(dim)
        self._norms = layers.LayerNormalization(), layers.LayerNormalization()

    def __call__(self, texts: EncoderInput) -> tf.Tensor:
        """Returns a vector for each text, float32 [texts, token_dim]."""
        x, mask = texts.embeddings(_MAX_TOKENS)  # [texts, longest, token_dim], [texts, longest]
        x += self._positions(tf.range(tf.shape(mask)[1]))
        x = self._norms[0](x + self._attention(x, x, attention_mask=mask[:, tf.newaxis, :]))
        x = self._norms[1](x + self._narrow(self._widen(x)))
        real = tf.cast(mask, x.dtype)[:, :, tf.newaxis]
        return tf.reduce_sum(x * real, axis=1) / tf.maximum(tf.reduce_sum(real, axis=1), 1.0)


def alone(config: ModelConfig) -> TextEncoder:
    """Returns a Transformer in the place of the sum of the tokens' embeddings."""
    return Transformer(config)


def beside_the_sum(config: ModelConfig) -> TextEncoder:
    """Returns a Transformer whose output is added to the sum of the tokens' embeddings."""
    transformer = Transformer(config)
    return lambda texts: texts.bag() + transformer(texts)
