"""How a text becomes a vector: the sum of its tokens' embeddings, or the encoder that `model.encoder` names.

docs/own_encoder.md shows how to write an encoder of your own. This is the only module that imports code by a name from
a config file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import tensorflow as tf

from dpsr_common.errors import UsageError
from dpsr_tf.config import ModelConfig
from dpsr_tf.data.examples_dataset import Tokens

v1 = tf.compat.v1

# Variable scope and name scope of an own encoder. Its variables begin with this name in a checkpoint.
SCOPE = "text_encoder"
# Ops that call Python, which a servable does not have.
_PYTHON_OPS = ("PyFunc", "PyFuncStateless", "EagerPyFunc")


class Table(Protocol):
    """An embedding table as the towers see it. models.embedding has the implementations."""

    def bag(self, tokens: Tokens) -> tf.Tensor:
        """Returns the sum of the rows of each text's tokens, [texts, dim] float32; zero for a text without tokens."""

    def lookup(self, codes: tf.Tensor) -> tf.Tensor:
        """Returns the row of each of `codes`, int32 [n]: [n, dim] float32."""


@dataclasses.dataclass(frozen=True)
class EncoderInput:
    """Texts to encode, and the table that embeds their tokens.

    Gradients reach the table through what `bag`, `embeddings` and `table.lookup` return.

    Attributes:
        tokens: ids in the order of the text, each word before its trigrams: values int32 [tokens], row_splits int64
            [texts + 1].
        table: the table of the tokens' embeddings, [ids, token_dim] float32.
        tower: "query" for queries, past queries and text features of users; "item" for the texts of items.
        feature: name of the text feature; None for the text of queries and items.
        training: whether this is the training graph, for layers such as dropout.
    """

    tokens: Tokens
    table: Table
    tower: str
    feature: str | None = None
    training: bool = False

    def bag(self) -> tf.Tensor:
        """Returns the sum of the tokens' embeddings, float32 [texts, token_dim]."""
        return self.table.bag(self.tokens)

    def embeddings(self, max_tokens: int | None = None) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the tokens' embeddings in order, as Keras layers take them: a padded tensor and a mask.

        Args:
            max_tokens: number of tokens of a text that count; by default all. It limits the work for long texts.

        Returns:
            Embeddings float32 [texts, longest, token_dim], padded with zeros, and a mask bool [texts, longest], true
            for tokens and false for padding. `longest` is at least 1.
        """
        texts = tf.RaggedTensor.from_row_splits(self.tokens.values, self.tokens.row_splits, validate=False)
        if max_tokens is not None:
            texts = texts[:, :max_tokens]
        lengths = texts.row_lengths()
        longest = tf.reduce_max(tf.concat([lengths, [1]], axis=0))
        mask = tf.sequence_mask(lengths, longest)
        rows = self.table.lookup(texts.values)
        padded = tf.scatter_nd(tf.where(mask), rows, [*tf.unstack(tf.shape(mask, tf.int64)), rows.shape[1]])
        return tf.ensure_shape(padded, [None, None, rows.shape[1]]), mask


# Encodes each text as one vector, [texts, a fixed width] float32. All its calls in a graph share their variables.
TextEncoder = Callable[[EncoderInput], tf.Tensor]


def bag_of_tokens(texts: EncoderInput) -> tf.Tensor:
    """Encodes texts as the paper does, by the sum of the tokens' embeddings."""
    return texts.bag()


def make_encoder(config: ModelConfig, texts: Iterable[tuple[str, str | None]]) -> TextEncoder:
    """Returns the encoder of a config, and makes its variables in the default graph.

    Args:
        config: names the encoder.
        texts: tower and feature of all texts that the towers read, in a fixed order. An own encoder is called once for
            each of them here, so that the names of its variables do not depend on which tower a graph has.

    Raises:
        UsageError: the encoder cannot be imported, or returns something else than [texts, width] float32.
    """
    if not config.encoder:
        return bag_of_tokens
    return _OwnEncoder(config, texts)


def load_encoder(name: str) -> Callable[[ModelConfig], TextEncoder]:
    """Imports the function "package.module:function". Raises UsageError if that is not possible."""
    where = f"model.encoder is '{name}'"
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        raise UsageError(f"{where}, expected package.module:function")
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if last.filename.startswith("<frozen") else f" ({last.filename}:{last.lineno})"
        raise UsageError(
            f"{where}: {module_name} cannot be imported: {type(error).__name__}: {error}{place}; install its package, "
            f"or add its folder to PYTHONPATH"
        ) from None
    function = getattr(module, attribute, None)
    if not callable(function):
        found = "has no such name" if function is None else f"has a {type(function).__name__} of that name"
        raise UsageError(f"{where}: {module_name} {found}, expected a function")
    return function


class _OwnEncoder:
    """Calls the encoder of a user, always in the same scopes, and checks what it returns."""

    def __init__(self, config: ModelConfig, texts: Iterable[tuple[str, str | None]]):
        self._name, self._graph = config.encoder, v1.get_default_graph()
        make = load_encoder(config.encoder)
        with self._scope():
            self._encode = make(config)
        if not callable(self._encode):
            raise UsageError(
                f"model.encoder {self._name}: returned {_described(self._encode)}, expected a function of an "
                f"EncoderInput"
            )
        before = len(self._graph.get_operations())
        # Sizes are left open, so that no layer takes those of this example for fixed.
        values, row_splits = tf.constant([0, 0], tf.int32), tf.constant([0, 2], tf.int64)
        example = Tokens(*(v1.placeholder_with_default(part, [None]) for part in (values, row_splits)))
        for tower, feature in texts:
            self(EncoderInput(example, _Zeros(config.token_dim), tower, feature))
        python = [op for op in self._graph.get_operations()[before:] if op.type in _PYTHON_OPS]
        if python:
            raise UsageError(
                f"model.encoder {self._name}: calls Python ({python[0].name}, {python[0].type}), which a servable does "
                f"not have; use TensorFlow's ops"
            )

    def __call__(self, texts: EncoderInput) -> tf.Tensor:
        with self._scope():
            vectors = self._encode(texts)
        kind = f"{texts.tower} text" if texts.feature is None else f"the {texts.tower} feature '{texts.feature}'"
        if not _is_vectors(vectors):
            raise UsageError(
                f"model.encoder {self._name}: returned {_described(vectors)} for {kind}, expected a tensor float32 "
                f"[texts, width] with a fixed width"
            )
        num_vectors, num_texts = tf.shape(vectors)[0], tf.size(texts.tokens.row_splits) - 1
        message = f"model.encoder {self._name}: number of vectors, and number of texts, for {kind}"
        check = tf.raw_ops.Assert(
            condition=tf.equal(num_vectors, num_texts), data=[message, num_vectors, num_texts], summarize=1
        )
        with tf.control_dependencies([check]):
            has_tokens = texts.tokens.row_splits[1:] > texts.tokens.row_splits[:-1]
        return tf.where(has_tokens[:, tf.newaxis], vectors, tf.zeros_like(vectors))

    @contextlib.contextmanager
    def _scope(self) -> Iterator[None]:
        """Enters one variable scope and one name scope, the same ones each time."""
        with v1.variable_scope(SCOPE, reuse=v1.AUTO_REUSE, auxiliary_name_scope=False), tf.name_scope(f"{SCOPE}/"):
            yield


class _Zeros:
    """A table that gives zeros, for the calls that only make variables."""

    def __init__(self, dim: int):
        self._dim = dim

    def bag(self, tokens: Tokens) -> tf.Tensor:
        return tf.zeros([tf.size(tokens.row_splits) - 1, self._dim])

    def lookup(self, codes: tf.Tensor) -> tf.Tensor:
        return tf.zeros([tf.size(codes), self._dim])


def _is_vectors(value: Any) -> bool:
    is_tensor = isinstance(value, tf.Tensor) and value.dtype == tf.float32 and value.shape.rank == 2
    return is_tensor and value.shape[1] is not None


def _described(value: Any) -> str:
    if isinstance(value, tf.Tensor):
        return f"{value.dtype.name} {value.shape}"
    return f"{value!r}" if value is None else f"a {type(value).__name__}"
