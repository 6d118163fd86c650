"""The rewriter: writes other words for a query (section 3 of the talk; Qiu et al., ICDE 2021, arXiv 2103.00800).

Three directions share one vocabulary: forward (query to title), backward (title to query) and direct (query to query).
Each has a Transformer encoder, which reads words, and a decoder, which writes them one by one: a GRU with attention or
a Transformer.

A word has one vector, as input of encoder and decoder and in the output layer: the sum of its own embedding and those
of its pieces (letter trigrams) divided by the square root of their number. So a misspelt word, which has no embedding
of its own, stands close to the right one from the first step on, and the decoder may copy what it reads by its vector.

Shapes: b texts, S words of the longest text that is read, T words of one that is written with its end, P pieces of a
word, n sequences for each text, c candidates of the output layer, d model.token_dim, h rewriter.heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dpsr_tf.config import Config
from dpsr_tf.data.examples_dataset import Tokens
from dpsr_tf.models import decoding
from dpsr_tf.models.decoding import Decoded
from dpsr_tf.models.embedding import EmbeddingTable
from dpsr_tf.models.features import SequenceSpec
from dpsr_tf.models.input_layers import dense, stock_table
from dpsr_tf.models.layers import STOCK, Layers

v1 = tf.compat.v1

# Reserved words of the sequence vocabulary.
PADDING, UNKNOWN, START, END = range(4)
RESERVED = END
# What is read and written in each direction.
QUERY, TITLE = range(2)
DIRECTIONS = {"forward": (QUERY, TITLE), "backward": (TITLE, QUERY), "direct": (QUERY, QUERY)}
METHODS = ("beam", "sampling")

_SCOPE = "rewriter"
_FAR = -1e9
Drop = Callable[[tf.Tensor], tf.Tensor]


class Encoded(NamedTuple):
    """What an encoder made of b texts."""

    memory: tf.Tensor  # [b, S, d], outputs of the last layer; zero beyond the end of a text
    vectors: tf.Tensor  # [b, S, d], word vectors, scaled as in the input
    mask: tf.Tensor  # float32 [b, S], 0 for words and _FAR beyond the end of a text


class _Memory(NamedTuple):
    """What a decoder reads of b texts at each step; it is computed once."""

    keys: tf.Tensor  # [b, S, d]
    values: tf.Tensor  # [b, S, 2 d], outputs of the encoder and word vectors
    mask: tf.Tensor  # float32 [b, S]
    # Keys and values [b, h, S, d / h] of each layer of a Transformer.
    layers: tuple[tuple[tf.Tensor, tf.Tensor], ...]


class Candidates(NamedTuple):
    """Words among which the output layer chooses."""

    vectors: tf.Tensor  # [c, d]
    bias: tf.Tensor  # [c]
    words: decoding.Words  # which candidate ends a text, and which are never written
    ids: tf.Tensor | None = None  # int32 [c], words of the candidates; None if candidate i is word i
    columns: tf.Tensor | None = None  # [d, c], the vectors again, with which few logits take a fraction of the time

    def logits(self, hidden: tf.Tensor) -> tf.Tensor:
        """Returns the logits of the candidates, [m, d] to [m, c]."""
        if self.columns is not None:
            return tf.nn.bias_add(tf.matmul(hidden, self.columns), self.bias)
        return tf.nn.bias_add(tf.matmul(hidden, self.vectors, transpose_b=True), self.bias)

    def of(self, places: tf.Tensor) -> tf.Tensor:
        """Returns vectors of candidates as decoder and encoder read them, int32 [...] to [..., d]."""
        return tf.gather(self.vectors, places) * math.sqrt(self.vectors.shape[1])


class Rewriter:
    """An encoder and a decoder for each direction, or one of each for all directions.

    The first use makes the variables, and all later ones in a graph share them. A checkpoint holds them by their names:
    `word_embedding`, which has the rows of the words and then those of the pieces, and `rewriter/...`.

    Example, in a graph without training:
        rewriter = Rewriter(config, spec, pieces)
        candidates = rewriter.all_words()
        found = rewriter.rewrites(words, pieces_of_words, candidates, 3, seed, "beam", "direct")

    Attributes:
        tables: the embedding table by its name.
    """

    def __init__(
        self,
        config: Config,
        spec: SequenceSpec,
        pieces: np.ndarray,
        table: Callable[..., EmbeddingTable] = stock_table,
        layers: Layers = STOCK,
        step: tf.Tensor | None = None,
    ):
        """Makes the table.

        Args:
            config: its sections `model` and `rewriter` name the shape.
            spec: of the store.
            pieces: the pieces of each word of the vocabulary, int32 [words, P], padded with 0.
            table: makes the embedding table.
            layers: models.layers.STOCK or, for training, FUSED.
            step: the global step, int64 [], which with train.seed chooses what dropout leaves out; None for no dropout.
        """
        self.config, self.spec, self.dim = config.rewriter, spec, config.model.token_dim
        self._kernels, self._seed, self._step, self._drops = layers, config.train.seed, step, 0
        self._table = table("word_embedding", spec.num_words + spec.num_pieces, self.dim, begins=(0, spec.num_words))
        self.tables = {"word_embedding": self._table}
        self._pieces = pieces.astype(np.int32)

    # Words.

    def pieces_of(self, ids: tf.Tensor) -> tf.Tensor:
        """Returns the pieces of words of the vocabulary, int32 [...] to [..., P]."""
        return tf.gather(tf.constant(self._pieces), ids)

    def word_vectors(self, words: tf.Tensor, pieces: tf.Tensor) -> tf.Tensor:
        """Returns the vectors of words, int32 [m] with their pieces int32 [m, P]: [m, d]. No word may be padding."""
        rows = tf.concat([words[:, tf.newaxis], pieces + self.spec.num_words], 1)
        is_piece = pieces > 0
        there = tf.concat([tf.ones_like(words, tf.bool)[:, tf.newaxis], is_piece], 1)
        count = tf.reduce_sum(tf.cast(is_piece, tf.int64), 1)
        of_piece = tf.math.rsqrt(tf.cast(tf.maximum(count, 1), tf.float32))[:, tf.newaxis]
        weights = tf.concat([tf.ones_like(of_piece), tf.repeat(of_piece, pieces.shape[1], 1)], 1)
        splits = tf.concat([tf.zeros([1], tf.int64), tf.cumsum(count + 1)], 0)
        chosen = tf.where(tf.reshape(there, [-1]))[:, 0]
        flat = Tokens(tf.gather(tf.reshape(rows, [-1]), chosen), splits)
        return self._table.bag(flat, tf.gather(tf.reshape(weights, [-1]), chosen))

    def all_words(self) -> Candidates:
        """Returns all words as candidates. Composing their vectors takes time; see `frozen`."""
        ids = tf.range(self.spec.num_words)
        return Candidates(self.word_vectors(ids, self.pieces_of(ids)), self._bias(), decoding.Words(END, RESERVED))

    def frozen(self) -> tuple[Candidates, tf.Operation]:
        """Returns all words as candidates that are composed once, in local variables, and the op that composes them.

        Run the op when the weights are restored. The variables are not in the collection that a Saver restores.
        """
        made, count = self.all_words(), self.spec.num_words
        values = {"vectors": made.vectors, "columns": tf.transpose(made.vectors), "bias": made.bias}
        shapes = {"vectors": [count, self.dim], "columns": [self.dim, count], "bias": [count]}
        zeros, kept, steps = v1.zeros_initializer(), {}, []
        for name, value in values.items():
            variable = v1.get_local_variable(
                f"{_SCOPE}_words/{name}", shapes[name], initializer=zeros, use_resource=True
            )
            kept[name] = variable.read_value()
            steps.append(variable.assign(tf.ensure_shape(value, shapes[name])))
        return made._replace(**kept), tf.group(*steps)

    def candidates(self, targets: tf.Tensor, count: int, seed: int) -> tuple[Candidates, tf.Tensor]:
        """Returns the candidates of a softmax over a sample: the targets, and other words drawn at random.

        The drawn words stand for all words of the vocabulary that are not candidates. Their logits are raised by the
        logarithm of how many words each one stands for, so that the sum of all exponentials has the right mean.

        Args:
            targets: int32 [m], words of the batch that are written.
            count: number of draws; 0 takes all words.
            seed: of the draws, beside the step.

        Returns:
            The candidates, and the place of each target among them, int32 [m].
        """
        words = self.spec.num_words
        if not count:
            return self.all_words(), targets
        uniform = tf.random.stateless_uniform([count], self._seeds(seed), RESERVED, words, tf.int32)
        # END becomes candidate 0.
        ids, places = tf.unique(tf.concat([[END], targets, uniform], 0))
        of_targets = places[: tf.size(targets) + 1]
        known = tf.reduce_max(of_targets) + 1
        drawn = tf.maximum(tf.size(ids) - known, 1)
        others = tf.maximum(words - RESERVED - known, 1)
        gain = tf.math.log(tf.cast(others, tf.float32) / tf.cast(drawn, tf.float32))
        vectors = self.word_vectors(ids, self.pieces_of(ids))
        bias = tf.gather(self._bias(), ids) + tf.where(tf.range(tf.size(ids)) < known, 0.0, gain)
        return Candidates(vectors, bias, decoding.Words(0), ids), of_targets[1:]

    def _bias(self) -> tf.Tensor:
        with v1.variable_scope(_SCOPE, reuse=v1.AUTO_REUSE):
            # Ids fall by frequency, which is about that of Zipf's law.
            zipf = v1.constant_initializer(-np.log(np.arange(self.spec.num_words) + 1.0))
            bias = v1.get_variable("word_bias", [self.spec.num_words], initializer=zipf, use_resource=True)
        return tf.convert_to_tensor(bias)

    # Encoder and decoder.

    def encode(self, direction: str, words: tf.Tensor, pieces: tf.Tensor) -> Encoded:
        """Reads texts.

        Args:
            direction: one of DIRECTIONS.
            words: int32 [b, S], padded with 0.
            pieces: int32 [b, S, P].
        """
        # Layers compute words only, not padding, of which there is more.
        places = tf.where(tf.reshape(words > 0, [-1]))[:, 0]
        flat = tf.gather(tf.reshape(words, [-1]), places)
        of_flat = tf.gather(tf.reshape(pieces, [-1, pieces.shape[2]]), places)
        if self._step is not None and self.config.unknown_rate:
            self._drops += 1
            chance = tf.random.stateless_uniform(tf.shape(flat), self._seeds(self._drops))
            flat = tf.where(chance < self.config.unknown_rate, UNKNOWN, flat)
        vectors = self.word_vectors(flat, of_flat) * math.sqrt(self.dim)
        return self._encode(direction, vectors, places, words > 0)

    def encode_candidates(self, direction: str, texts: tf.Tensor, candidates: Candidates) -> Encoded:
        """Reads texts that were written, as `encode` does.

        Args:
            direction: one of DIRECTIONS.
            texts: places of candidates, int32 [b, S], padded with 0.
            candidates: the candidates.
        """
        places = tf.where(tf.reshape(texts > 0, [-1]))[:, 0]
        vectors = candidates.of(tf.gather(tf.reshape(texts, [-1]), places))
        return self._encode(direction, vectors, places, texts > 0)

    def _encode(self, direction: str, vectors: tf.Tensor, places: tf.Tensor, there: tf.Tensor) -> Encoded:
        """Reads words with vectors [m, d], which have the places int64 [m] where `there`, bool [b, S], is true."""
        kind, _ = DIRECTIONS[direction]
        b, size = tf.shape(there)[0], there.shape[1]
        mask = tf.where(there, 0.0, _FAR)
        with self._scope(direction, "encoder"):
            x = vectors + self._rows("position", self._longest, tf.cast(places % size, tf.int32))
            x = self._drop(x + self._rows("kind", 2, tf.fill([1], kind)))
            for i in range(self.config.layers):
                with v1.variable_scope(f"layer_{i}", reuse=v1.AUTO_REUSE):
                    joined = self._dense("joined", _norm("attention_norm", x), 3 * self.dim)
                    query, key, value = (
                        self._heads(part) for part in tf.split(_unpacked(joined, places, b, size), 3, axis=2)
                    )
                    mixed = _joined(_attend(query, key, value, mask[:, tf.newaxis, tf.newaxis]))
                    mixed = tf.gather(tf.reshape(mixed, [-1, self.dim]), places)
                    x += self._drop(self._dense("mixed", mixed, self.dim))
                    x += self._drop(self._inner(x))
            x = _norm("norm", x)
        return Encoded(_unpacked(x, places, b, size), _unpacked(vectors, places, b, size), mask)

    def hidden(self, direction: str, encoded: Encoded, before: tf.Tensor) -> tf.Tensor:
        """Returns what the output layer reads at each position of texts that are known.

        Args:
            direction: as in `encode`.
            encoded: of `encode`.
            before: `Candidates.of` all words but the last of each text, [b, T - 1, d].

        Returns:
            [b, T, d]: at place t, what predicts word t.
        """
        b, length = tf.shape(before)[0], before.shape[1] + 1
        with self._scope(direction, "decoder"):
            memory = self._memory(encoded)
            start = tf.repeat(self._start(direction)[tf.newaxis], b, 0)  # [b, 1, d]
            x = self._drop(tf.concat([start, before], 1))
            if self.config.decoder == "gru":
                inputs = tf.ensure_shape(self._dense("gru_inputs", x, 3 * self.dim), [None, length, 3 * self.dim])
                gru, state, states = self._gru(), self._first_state(encoded)[:, 0], []
                for each in tf.unstack(inputs, axis=1):
                    state = gru(each, state)
                    states.append(state)
                x = self._drop(tf.stack(states, 1)) + self._rows("position", self._longest, tf.range(length))
            else:
                x += self._rows("position", self._longest, tf.range(length))
                causal = (1.0 - tf.linalg.band_part(tf.ones([length, length]), -1, 0)) * _FAR
                for i in range(self.config.decoder_layers):
                    with v1.variable_scope(f"layer_{i}", reuse=v1.AUTO_REUSE):
                        query, key, value = self._projections(x)
                        mixed = _joined(_attend(query, key, value, causal))
                        x += self._drop(self._dense("mixed", mixed, self.dim))
                        x = self._crossed(x, memory.layers[i], memory.mask, self._drop)
            flat = self._head(tf.reshape(x, [-1, self.dim]), b, memory, self._drop)
            return tf.reshape(flat, [-1, length, self.dim])

    def decoder(
        self, direction: str, encoded: Encoded, candidates: Candidates, length: int
    ) -> tuple[decoding.Step, decoding.State]:
        """Returns the decoder for models.decoding, and its first state. It does not apply dropout.

        Args:
            direction: as in `encode`.
            encoded: of `encode`.
            candidates: what is written are places among them.
            length: the largest number of words.
        """
        b = tf.shape(encoded.memory)[0]
        with self._scope(direction, "decoder"):
            memory = self._memory(encoded)
            start = self._start(direction)
            if self.config.decoder == "gru":
                first: decoding.State = self._first_state(encoded)
            else:
                # Keys and values of all positions so far.
                empty = tf.zeros(tf.stack([b, 1, length + 1, self.dim]))
                first = [(empty, empty) for _ in range(self.config.decoder_layers)]

        def step(last: tf.Tensor | None, state: Any, position: tf.Tensor) -> tuple[tf.Tensor, Any]:
            with self._scope(direction, "decoder"):
                # All layers work on [b * n, d], so that small steps have few ops.
                x = tf.repeat(start, b, 0) if last is None else candidates.of(tf.reshape(last, [-1]))
                place = self._rows("position", self._longest, position[tf.newaxis])
                if self.config.decoder == "gru":
                    inputs = self._dense("gru_inputs", x, 3 * self.dim)
                    flat = self._gru()(inputs, tf.reshape(state, [-1, self.dim]))
                    state = tf.reshape(flat, tf.shape(state))
                    x = flat + place
                else:
                    n = tf.shape(state[0][0])[1]
                    x = tf.reshape(x + place, tf.stack([b, n, self.dim]))
                    caches = []
                    for i, cache in enumerate(state):
                        with v1.variable_scope(f"layer_{i}", reuse=v1.AUTO_REUSE):
                            x, cache = self._next(x, cache, position, n)
                            caches.append(cache)
                            x = self._crossed(x, memory.layers[i], memory.mask, _keep)
                    state = caches
                    x = tf.reshape(x, [-1, self.dim])
                logits = candidates.logits(self._head(x, b, memory, _keep))
                return tf.reshape(logits, tf.stack([b, -1, tf.shape(logits)[1]])), state

        return step, first

    # Rewriting.

    def rewrites(
        self,
        words: tf.Tensor,
        pieces: tf.Tensor,
        candidates: Candidates,
        count: int | tf.Tensor,
        seed: tf.Tensor,
        method: str | None = None,
        path: str | None = None,
    ) -> Decoded:
        """Returns the most probable rewrites of queries, each once and never the query itself.

        By the path `direct`, the direction of this name writes them. By `titles`, the forward direction writes the most
        probable title, and the backward direction writes queries for it.

        Args:
            words: int32 [b, query_words], padded with 0. A text without words has no rewrites.
            pieces: int32 [b, query_words, P].
            candidates: all words.
            count: n, the number of rewrites; int32 [] if it is a tensor.
            seed: int64 [], for sampling.
            method: one of METHODS; by default the config's.
            path: `direct` or `titles`; by default the config's.

        Returns:
            Words of rewrites, int32 [b, n, rewriter.max_words], and the logarithms of their probabilities (by `titles`,
            given the title); -inf and no words where there are fewer than n.
        """
        n, config = tf.convert_to_tensor(count, tf.int32), self.config
        direction, read, of_read = "direct", words, pieces
        if (path or config.path) == "titles":
            direction, length = "backward", self.spec.title_words
            encoded = self.encode("forward", words, pieces)
            step, state = self.decoder("forward", encoded, candidates, length)
            found = decoding.beam_search(step, state, config.title_beams, length, candidates.words)
            read = found.words[:, 0]
            # The encoder needs one word at least.
            of_read = self.pieces_of(read)
        encoded = self.encode(direction, read, of_read)
        step, state = self.decoder(direction, encoded, candidates, config.max_words)
        if (method or config.method) == "beam":
            # One more, because the query itself may be among them.
            decoded = decoding.beam_search(step, state, n + 1, config.max_words, candidates.words, read)
        else:
            decoded = decoding.sample(
                step, state, n * config.draws, config.max_words, candidates.words, seed, config.top_words,
                config.temperature, read,
            )  # fmt: skip
        has_words = tf.reduce_any(words > 0, 1)[:, tf.newaxis]
        logs = tf.where(has_words, decoded.log_probabilities, float("-inf"))
        return decoding.distinct(Decoded(decoded.words, logs), words, n)

    # Parts.

    @property
    def _longest(self) -> int:
        return max(self.spec.query_words, self.spec.title_words, self.config.max_words) + 1

    def _scope(self, direction: str, part: str) -> Any:
        name = part if self.config.shared else f"{direction}/{part}"
        return v1.variable_scope(f"{_SCOPE}/{name}", reuse=v1.AUTO_REUSE, auxiliary_name_scope=False)

    def _dense(self, name: str, x: tf.Tensor, width: int, relu: bool = False) -> tf.Tensor:
        flat = dense(name, tf.reshape(x, [-1, x.shape[-1]]), width, relu=relu, kernels=self._kernels)
        if x.shape.rank == 2:
            return flat
        return tf.ensure_shape(tf.reshape(flat, tf.concat([tf.shape(x)[:-1], [width]], 0)), [*x.shape[:-1], width])

    def _rows(self, name: str, count: int, rows: tf.Tensor) -> tf.Tensor:
        """Looks up rows of a small table of vectors, int32 [m] to [m, d]."""
        initializer = v1.random_normal_initializer(stddev=0.1)
        table = v1.get_variable(name, [count, self.dim], initializer=initializer, use_resource=True)
        # By a product, because a gradient of gather would be sparse, which is slow for small tables.
        return tf.matmul(tf.one_hot(rows, count), table)

    def _start(self, direction: str) -> tf.Tensor:
        """Returns what a decoder reads before the first word, [1, d]."""
        return self._rows("start", 2, tf.fill([1], DIRECTIONS[direction][1]))

    def _seeds(self, number: int) -> tf.Tensor:
        step = tf.constant(0, tf.int64) if self._step is None else tf.cast(self._step, tf.int64)
        return tf.stack([tf.constant((self._seed << 20) + number, tf.int64), step])

    def _drop(self, x: tf.Tensor) -> tf.Tensor:
        if self._step is None or not self.config.dropout:
            return x
        self._drops += 1
        return tf.nn.experimental.stateless_dropout(x, self.config.dropout, self._seeds(self._drops))

    def _inner(self, x: tf.Tensor) -> tf.Tensor:
        wide = self._dense("inner", _norm("inner_norm", x), self.config.inner_width, relu=True)
        return self._dense("outer", wide, self.dim)

    def _heads(self, x: tf.Tensor) -> tf.Tensor:
        """Splits [b, m, d] into heads, [b, h, m, d / h]."""
        heads = self.config.heads
        shape = tf.concat([tf.shape(x)[:2], [heads, self.dim // heads]], 0)
        split = tf.ensure_shape(tf.reshape(x, shape), [None, x.shape[1], heads, self.dim // heads])
        return tf.transpose(split, [0, 2, 1, 3])

    def _projections(self, x: tf.Tensor) -> list[tf.Tensor]:
        """Returns query, key and value of self attention, [b, h, m, d / h] each."""
        joined = self._dense("joined", _norm("attention_norm", x), 3 * self.dim)
        return [self._heads(part) for part in tf.split(joined, 3, axis=2)]

    def _next(
        self, x: tf.Tensor, cache: tuple[tf.Tensor, tf.Tensor], position: tf.Tensor, n: tf.Tensor
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor]]:
        """Runs self attention for the next word: x [b, n, d], and keys and values [b, n, length + 1, d] before it."""
        length, heads = cache[0].shape[2], self.config.heads
        joined = self._dense("joined", _norm("attention_norm", x), 3 * self.dim)
        query, key, value = tf.split(joined[:, :, tf.newaxis], 3, axis=3)  # [b, n, 1, d] each
        place = tf.one_hot(position, length)[:, tf.newaxis]
        cache = (cache[0] + key * place, cache[1] + value * place)
        shape = tf.concat([tf.shape(x)[:2], [-1, heads, self.dim // heads]], 0)
        query, key, value = (tf.transpose(tf.reshape(part, shape), [0, 1, 3, 2, 4]) for part in (query, *cache))
        later = tf.where(tf.range(length) <= position, 0.0, _FAR)
        mixed = _attend(query, key, value, later)  # [b, n, h, 1, d / h]
        mixed = tf.reshape(mixed, tf.stack([-1, n, self.dim]))
        return x + self._dense("mixed", tf.ensure_shape(mixed, [None, None, self.dim]), self.dim), cache

    def _memory(self, encoded: Encoded) -> _Memory:
        layers = []
        for i in range(self.config.decoder_layers if self.config.decoder == "transformer" else 0):
            with v1.variable_scope(f"layer_{i}", reuse=v1.AUTO_REUSE):
                both = tf.split(self._dense("cross_memory", encoded.memory, 2 * self.dim), 2, axis=2)
                layers.append((self._heads(both[0]), self._heads(both[1])))
        keys = self._dense("head_key", encoded.memory, self.dim)
        return _Memory(keys, tf.concat([encoded.memory, encoded.vectors], 2), encoded.mask, tuple(layers))

    def _crossed(self, x: tf.Tensor, layer: tuple[tf.Tensor, tf.Tensor], mask: tf.Tensor, drop: Drop) -> tf.Tensor:
        """Adds attention on the text that was read, and the inner layer, to x [b, m, d]."""
        query = self._heads(self._dense("cross_query", _norm("cross_norm", x), self.dim))
        mixed = _joined(_attend(query, *layer, mask[:, tf.newaxis, tf.newaxis]))
        x += drop(self._dense("cross_mixed", mixed, self.dim))
        return x + drop(self._inner(x))

    def _first_state(self, encoded: Encoded) -> tf.Tensor:
        """Returns the first state of the GRU, [b, 1, d], from the mean of what was read."""
        count = tf.reduce_sum(tf.cast(encoded.mask > _FAR / 2, tf.float32), 1, keepdims=True)
        mean = tf.reduce_sum(encoded.memory, 1) / tf.maximum(count, 1.0)
        return tf.tanh(self._dense("first_state", mean, self.dim))[:, tf.newaxis]

    def _gru(self) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
        """Returns the cell of the GRU (Cho et al., 2014; reset after): inputs [m, 3 d] and state [m, d] to [m, d]."""
        d, zeros = self.dim, v1.zeros_initializer()
        with v1.variable_scope("gru_state", reuse=v1.AUTO_REUSE):
            kernel = tf.convert_to_tensor(
                v1.get_variable("kernel", [d, 3 * d], initializer=v1.glorot_uniform_initializer(), use_resource=True)
            )
            bias = tf.convert_to_tensor(v1.get_variable("bias", [3 * d], initializer=zeros, use_resource=True))

        def cell(inputs: tf.Tensor, state: tf.Tensor) -> tf.Tensor:
            of_state = tf.nn.bias_add(tf.matmul(state, kernel), bias)
            update, reset = tf.split(tf.sigmoid(inputs[:, : 2 * d] + of_state[:, : 2 * d]), 2, axis=1)
            new = tf.tanh(inputs[:, 2 * d :] + reset * of_state[:, 2 * d :])
            return new + update * (state - new)

        return cell

    def _head(self, x: tf.Tensor, b: tf.Tensor, memory: _Memory, drop: Drop) -> tf.Tensor:
        """Returns what the output layer reads, [b * m, d], from the decoder's states [b * m, d].

        Attention on the text that was read gives its outputs, and a copy of its word vectors, which the output layer
        knows.
        """
        query = tf.reshape(self._dense("head_query", x, self.dim), tf.stack([b, -1, self.dim]))
        logits = tf.matmul(query, memory.keys, transpose_b=True) / math.sqrt(self.dim) + memory.mask[:, tf.newaxis]
        found = tf.reshape(tf.matmul(tf.nn.softmax(logits), memory.values), [-1, 2 * self.dim])
        found, copied = tf.split(found, 2, axis=1)
        share = v1.get_variable("copy", [self.dim], initializer=v1.ones_initializer(), use_resource=True)
        own = self._dense("head", tf.concat([x, found], 1), self.dim)
        return drop(_norm("head_norm", own)) + share * copied


def _keep(x: tf.Tensor) -> tf.Tensor:
    return x


def _norm(name: str, x: tf.Tensor) -> tf.Tensor:
    """Scales vectors [..., d] to a mean square of 1, times a learned gain (Zhang and Sennrich, 2019)."""
    gain = v1.get_variable(name, [x.shape[-1]], initializer=v1.ones_initializer(), use_resource=True)
    return x * (tf.math.rsqrt(tf.reduce_mean(tf.square(x), -1, keepdims=True) + 1e-6) * gain)


def _attend(query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Returns scaled dot product attention; the mask is added to its logits."""
    logits = tf.matmul(query, key, transpose_b=True) / math.sqrt(query.shape[-1]) + mask
    return tf.matmul(tf.nn.softmax(logits), value)


def _joined(x: tf.Tensor) -> tf.Tensor:
    """Joins heads [b, h, m, d / h] to [b, m, d]."""
    b, h, m, each = x.shape
    joined = tf.transpose(x, [0, 2, 1, 3])
    shape = tf.shape(joined)
    return tf.ensure_shape(tf.reshape(joined, tf.stack([shape[0], shape[1], h * each])), [b, m, h * each])


def _unpacked(flat: tf.Tensor, places: tf.Tensor, b: tf.Tensor, size: int) -> tf.Tensor:
    """Returns rows [m, width] at their places of [b, size, width], and zeros elsewhere."""
    shape = tf.stack([b * size, flat.shape[1]])
    padded = tf.scatter_nd(places[:, tf.newaxis], flat, tf.cast(shape, tf.int64))
    return tf.reshape(padded, tf.stack([b, size, flat.shape[1]]))
