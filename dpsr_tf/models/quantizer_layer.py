"""The quantizer as a layer of the training graph: its variables, T(x) with a straight-through gradient, and its losses.

The values are those of models/quantizer.py. The losses are those of Poeem (reconstruction) and Distill-VQ (Xiao et al.,
SIGIR 2022, section 3: ListNet against the exact scores). The rotation is learned by block coordinate descent over
Givens rotations (JD's talk, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from dpsr_common.errors import UsageError
from dpsr_tf import ops
from dpsr_tf.config import QuantizerConfig
from dpsr_tf.models.quantizer import ROTATION, VARIABLES, Quantizer
from dpsr_tf.models.two_tower import soft_dot_product

v1 = tf.compat.v1

# Distillation takes about so many of a batch's items as candidates of all queries. To score a whole batch of 1,024
# with itself would be the larger part of the work of a step.
_SHARED = 256
# Error of R^T R up to which a matrix counts as a rotation.
_ORTHOGONAL = 1e-3


class Quantized(NamedTuple):
    """What a quantizer makes of n vectors x. All floats are float32.

    Attributes:
        full: T(x), [n, d]. Its gradient passes to x as if T were the identity, to the chosen centroids, and to the
            rotation as if the codes were constant.
        coarse: the coarse centroid of x, rotated back, [n, d]. Its gradient passes to centroid and rotation only.
        rotated: z = x R, [n, d], without a gradient to R.
        rotated_full: T(x) R, [n, d].
        rotated_coarse: the coarse centroid, [n, d].
        lists: numbers of the coarse centroids, int32 [n].
        codes: int32 [n, M].
    """

    full: tf.Tensor
    coarse: tf.Tensor
    rotated: tf.Tensor
    rotated_full: tf.Tensor
    rotated_coarse: tf.Tensor
    lists: tf.Tensor
    codes: tf.Tensor


class TeacherItems(NamedTuple):
    """For each of b queries, c of its exact best items.

    Attributes:
        rows: int64 [b, c].
        vectors: embeddings for the t queries that have valid items, in their order, float32 [t, c, d].
        valid: bool [b, c], False where a query has fewer.
    """

    rows: tf.Tensor
    vectors: tf.Tensor
    valid: tf.Tensor


class ItemCodes(NamedTuple):
    """The lists and residual codes of all items, which stay the same while a quantizer is trained.

    Attributes:
        lists: int32 [items].
        codes: uint8 [items, M].
    """

    lists: np.ndarray
    codes: np.ndarray


class QuantizerLayer:
    """The quantizer of a training graph.

    Its variables are in no collection of trainable variables: an optimizer of the towers does not train them, and no
    moving average is taken, which would not be a rotation. `minimize` trains them.

    Attributes:
        config: what it was made with.
        variables: rotation [d, d], coarse [lists, d], codebooks [M, 2^bits, d / M], float32. With residual codes
            codebooks [M, 2^bits, d], and the encoder's coarse centroids and codebooks, which are never trained.
    """

    def __init__(
        self, config: QuantizerConfig, dim: int, values: Quantizer | None = None, items: ItemCodes | None = None
    ):
        """Makes the variables.

        Args:
            config: its `sub_spaces` must not be 0.
            dim: d, the embedding_dim of the model.
            values: initial values; by default the identity and zeros, to be restored from a checkpoint.
            items: needed for residual codes only.

        Raises:
            UsageError: the parts do not divide d.
            ValueError: the shapes of `values` are not those of the config, or the rotation is not orthogonal, or not
                the identity with rotation `none`, or `items` are missing.
        """
        self._is_residual = config.codes == "residual"
        if self._is_residual and items is None:
            raise ValueError("residual codes are looked up, but no codes of items are given")
        self._items = items
        if config.sub_spaces < 1 or (dim % config.sub_spaces and not self._is_residual):
            fits = ", ".join(str(m) for m in range(1, dim + 1) if dim % m == 0)
            raise UsageError(
                f"quantizer.sub_spaces is {config.sub_spaces}, which does not divide embedding_dim {dim}; give one of "
                f"{fits}"
            )
        self.config = config
        width = dim if self._is_residual else dim // config.sub_spaces
        centroids = [(config.lists, dim), (config.sub_spaces, 1 << config.bits, width)]
        of_arrays = [(dim, dim), *centroids, *(centroids if self._is_residual else ())]
        shapes = dict(zip(VARIABLES, of_arrays, strict=False))
        given = {} if values is None else dict(zip(shapes, values.arrays, strict=True))
        for name, value in given.items():
            if value.shape != shapes[name]:
                raise ValueError(f"the {name} given has shape {value.shape}, the config expects {shapes[name]}")
        if values is not None:
            start = np.eye(dim) if config.rotation == "none" else values.rotation.astype(np.float64)
            error = np.abs(start.T @ values.rotation - np.eye(dim)).max()
            if not error < _ORTHOGONAL:
                raise ValueError(
                    f"the {ROTATION} given is off by {error:.2g} from "
                    f"{'the identity' if config.rotation == 'none' else 'an orthogonal matrix'}, expected less than "
                    f"{_ORTHOGONAL:g}"
                )
        self.variables = [
            v1.get_variable(
                name,
                shape,
                tf.float32,
                v1.constant_initializer(given[name]) if given else _default_of(name),
                trainable=False,
                use_resource=True,
            )
            for name, shape in shapes.items()
        ]
        self._rotation, self._coarse, self._codebooks = (variable.read_value() for variable in self.variables[:3])

    def __call__(self, x: tf.Tensor, rows: tf.Tensor | None = None) -> Quantized:
        """Quantizes the items x, float32 [n, d]. `rows` are theirs, int64 [n], needed for residual codes only."""
        z = self._rotate(x, tf.stop_gradient(self._rotation))
        if self._items is None:
            lists, coarse = _quantize(z, self._coarse[tf.newaxis])
            codes, parts = _quantize(z - coarse, self._codebooks)
        else:
            # Looked up outside of the graph, which may have 2 GiB in all.
            lists, codes = tf.numpy_function(self._items_of, [rows], [tf.int32, tf.int32])
            lists = tf.ensure_shape(lists, [x.shape[0], 1])
            codes = tf.ensure_shape(codes, [x.shape[0], self.config.sub_spaces])
            look_up = ops.load().dpsr_look_up_codes
            coarse = look_up(lists, self._coarse[tf.newaxis])
            books = tf.split(self._codebooks, self.config.sub_spaces)
            of_books = tf.split(codes, self.config.sub_spaces, axis=1)
            parts = tf.add_n([look_up(chosen, book) for chosen, book in zip(of_books, books, strict=True)])
        full = _straight_through(coarse + parts, z)
        return Quantized(
            full=self._rotate(full, self._rotation, back=True),
            coarse=self._rotate(coarse, self._rotation, back=True),
            rotated=z,
            rotated_full=full,
            rotated_coarse=coarse,
            lists=lists[:, 0],
            codes=codes,
        )

    def rotate(self, x: tf.Tensor) -> tf.Tensor:
        """Returns x R, float32 [n, d], with the gradient to both: x R y^T scores x with the rotated y."""
        return self._rotate(x, self._rotation)

    def minimize(self, loss: tf.Tensor, factor: float | tf.Tensor = 1.0) -> tf.Operation:
        """Returns one training step: Adam for coarse centroids and codebooks, Givens rotations for the rotation.

        Args:
            loss: float32 [].
            factor: multiplies all learning rates.
        """
        of_rotation, of_coarse, of_codebooks = tf.gradients(loss, self.variables[:3])
        added = self.config.sub_spaces if self._is_residual else 1
        steps = []
        for variable, gradient, rate in (
            (self.variables[1], of_coarse, self.config.coarse_learning_rate),
            (self.variables[2], of_codebooks, self.config.learning_rate / math.sqrt(added)),
        ):
            if gradient is not None:
                # The names of Adam's variables must not depend on what else the graph has.
                with tf.name_scope(f"{variable.op.name}_step/"):
                    steps.append(v1.train.AdamOptimizer(rate * factor).apply_gradients([(gradient, variable)]))
        if self.config.rotation == "givens" and of_rotation is not None:
            steps.append(self._givens_step(of_rotation, self.config.rotation_learning_rate * factor))
        return tf.group(*steps)

    def quantizer(self, session: tf.compat.v1.Session) -> Quantizer:
        """Returns the values that the variables have in a session."""
        return Quantizer.of_arrays(session.run(self.variables))

    def _items_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns lists, int32 [n, 1], and codes, int32 [n, M], of items."""
        assert self._items is not None
        return self._items.lists[rows, np.newaxis].astype(np.int32), self._items.codes[rows].astype(np.int32)

    def _givens_step(self, gradient: tf.Tensor, learning_rate: float | tf.Tensor) -> tf.Operation:
        """Returns the step of the rotation, which also counts the steps: the seed of random pairs."""
        with tf.device(self.variables[0].device):
            done = v1.get_variable(
                "quantizer/steps", [], tf.int64, v1.zeros_initializer(), trainable=False, use_resource=True
            )
            step = done.read_value()
            product = tf.matmul(self._rotation, gradient, transpose_a=True)
            givens = ops.load().dpsr_givens_step(
                self.variables[0].handle, product, learning_rate, step, pairs=self.config.givens_pairs
            )
            with tf.control_dependencies([givens]):
                return done.assign_add(1, read_value=False)

    def _rotate(self, x: tf.Tensor, rotation: tf.Tensor, back: bool = False) -> tf.Tensor:
        return x if self.config.rotation == "none" else tf.matmul(x, rotation, transpose_b=back)


def quantizer_loss(
    config: QuantizerConfig,
    layer: QuantizerLayer,
    query: tf.Tensor,
    items: tf.Tensor,
    teacher: TeacherItems | None,
    temperature: float,
    item_rows: tf.Tensor | None = None,
    head_temperature: float = 0.0,
) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
    """Builds the loss that trains the quantizer, beside the model's own.

    `reconstruction` is Poeem's distortion: the mean over items of |T(x) - x|^2. `distillation` is that of Distill-VQ:
    the cross-entropy of softmax(t / tau) with softmax(s / tau), averaged over queries, for the students s = q T(x) and
    s = q coarse(x), whose losses are summed. t are the scores of the unquantized vectors. The candidates of a query are
    items of the batch, the same for all queries, and the teacher's items of this query. An item that is there several
    times counts once. Of a large batch, every k-th item is taken, so that the teacher's are the larger part of the
    work.

    Args:
        config: names the objective: reconstruction or distillation.
        layer: made with `config`.
        query: unit vectors, float32 [b, m, d].
        items: unit vectors, float32 [n, d].
        teacher: items for each query, or None.
        temperature: tau, if `config.temperature` is 0.
        item_rows: rows of `items`, int [n], which residual codes need; None: all are different, and the teacher has
            none of them.
        head_temperature: beta of the soft dot product over heads, `model.temperature`.

    Returns:
        The loss, float32 [], and metrics of this batch's items by name, float32 [] each:
        quantizer/distortion: mean of |T(x) - x|^2.
        quantizer/codes_used: share of the codes that occur, mean over sub-spaces.
        quantizer/entropy: entropy of the codes, mean over sub-spaces, bits.
        quantizer/imbalance: number of lists times the probability that two items share a list; 1 is even.
        quantizer/orthogonality_error: largest entry of |R^T R - 1|.

    Raises:
        ValueError: the objective is `ranking`, whose loss is the model's own.
    """
    if config.objective == "ranking":
        raise ValueError("the loss of the objective ranking is the model's own; build_loss makes it")
    if config.objective == "reconstruction":
        quantized = layer(items, item_rows)
        difference = quantized.full - tf.stop_gradient(items)
        return tf.reduce_mean(tf.reduce_sum(difference**2, axis=1)), quantizer_metrics(layer, quantized)

    every = tf.maximum(1, tf.shape(items)[0] // _SHARED)
    items = items[::every]
    if item_rows is not None:
        item_rows = tf.cast(item_rows[::every], tf.int64)
        first = tf.where(_first(item_rows))[:, 0]
        items, item_rows = tf.gather(items, first), tf.gather(item_rows, first)
    heads, dim = query.shape[1:]
    vectors, rows, num_shared = items, item_rows, tf.shape(items)[0]
    if teacher is not None:
        # Queries without valid items, such as pieces of titles, have nothing to quantize.
        taught = tf.where(tf.reduce_any(teacher.valid, axis=1))  # [t, 1]
        counted = tf.gather_nd(_first_of_query(teacher, item_rows), taught)
        vectors = tf.concat([items, tf.reshape(tf.stop_gradient(teacher.vectors), [-1, dim])], axis=0)
        taught_rows = tf.reshape(tf.cast(tf.gather_nd(teacher.rows, taught), tf.int64), [-1])
        rows = taught_rows if item_rows is None else tf.concat([item_rows, taught_rows], axis=0)
    quantized = layer(vectors, rows)

    tau = config.temperature or temperature
    query /= tau
    rotated = tf.reshape(layer.rotate(tf.reshape(query, [-1, dim])), [-1, heads, dim])

    def logits(queries: tf.Tensor, scored: tf.Tensor) -> tf.Tensor:
        """Returns the scores of all candidates over tau: [b, m, d] and [shared + t c, d] to [b, shared + c]."""
        scored, own = tf.split(scored, [num_shared, tf.shape(scored)[0] - num_shared])
        shared = [tf.matmul(head, scored, transpose_b=True) for head in tf.unstack(queries, axis=1)]
        result = soft_dot_product(shared, head_temperature / tau)
        if teacher is None:
            return result
        own = tf.reshape(own, [-1, tf.shape(teacher.rows)[1], dim])
        inner = tf.matmul(tf.gather_nd(queries, taught), own, transpose_b=True)  # [t, m, c]
        own_scores = soft_dot_product(tf.unstack(inner, axis=1), head_temperature / tau)
        none = tf.fill(tf.shape(teacher.rows), tf.float32.min)
        own_scores = tf.where(counted, own_scores, tf.float32.min)
        return tf.concat([result, tf.tensor_scatter_nd_update(none, taught, own_scores)], axis=1)

    target = tf.stop_gradient(tf.nn.softmax(logits(query, vectors)))
    students = logits(rotated, quantized.rotated_coarse), logits(rotated, quantized.rotated_full)
    losses = [tf.nn.softmax_cross_entropy_with_logits(target, student) for student in students]
    return tf.reduce_mean(tf.add_n(losses)), quantizer_metrics(layer, quantized)


def quantizer_metrics(layer: QuantizerLayer, quantized: Quantized) -> dict[str, tf.Tensor]:
    """Returns the metrics of `quantizer_loss`. A training step computes them only when they are fetched."""
    config = layer.config
    n = tf.cast(tf.shape(quantized.codes)[0], tf.float32)
    size = 1 << config.bits
    offsets = tf.range(config.sub_spaces) * size
    counts = tf.math.bincount(tf.reshape(quantized.codes + offsets, [-1]), minlength=config.sub_spaces * size)
    counts = tf.cast(tf.reshape(counts, [config.sub_spaces, size]), tf.float32)
    shares = counts / tf.maximum(n, 1.0)
    of_lists = tf.cast(tf.math.bincount(quantized.lists, minlength=config.lists), tf.float32)
    pairs = tf.reduce_sum(of_lists * (of_lists - 1))
    rotation = layer.variables[0]
    product = tf.matmul(rotation, rotation, transpose_a=True)
    error = quantized.rotated_full - quantized.rotated
    return {
        "quantizer/distortion": tf.reduce_mean(tf.reduce_sum(error**2, axis=1)),
        "quantizer/codes_used": tf.reduce_mean(tf.cast(counts > 0, tf.float32)),
        "quantizer/entropy": -tf.reduce_mean(tf.reduce_sum(tf.math.xlogy(shares, shares), axis=1)) / math.log(2),
        "quantizer/imbalance": config.lists * tf.math.divide_no_nan(pairs, n * (n - 1)),
        "quantizer/orthogonality_error": tf.reduce_max(tf.abs(product - tf.eye(rotation.shape[0]))),
    }


def _default_of(name: str) -> Callable[..., tf.Tensor]:
    """Returns the initial values of a variable that will be restored."""
    return v1.initializers.identity() if name == ROTATION else v1.zeros_initializer()


@tf.custom_gradient
def _straight_through(
    y: tf.Tensor, z: tf.Tensor
) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]]:
    """Returns y. The gradient passes to both y and z, as if they were the same."""
    return tf.identity(y), lambda upstream: (upstream, upstream)


def _quantize(x: tf.Tensor, codebooks: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the nearest codes of the parts of x, int32 [n, M], and the centroids that they name, [n, d].

    x is [n, d], `codebooks` [M, K, d / M]. Of equally near centroids, the one with the lower number. The gradient
    passes to the codebooks only.
    """
    codes = ops.load().dpsr_nearest_codes(x, codebooks)
    return codes, ops.load().dpsr_look_up_codes(codes, codebooks)


tf.no_gradient("DpsrNearestCodes")


@tf.RegisterGradient("DpsrLookUpCodes")
def _look_up_gradient(op: tf.Operation, upstream: tf.Tensor) -> list[tf.Tensor | None]:
    return [None, ops.load().dpsr_look_up_codes_gradient(*op.inputs, upstream)]


def _first(rows: tf.Tensor) -> tf.Tensor:
    """Returns where a number is in `rows` [n] for the first time, bool [n]."""
    unique, places = tf.unique(rows)
    positions = tf.range(tf.size(rows))
    return tf.equal(tf.gather(tf.math.unsorted_segment_min(positions, places, tf.size(unique)), places), positions)


def _first_of_query(teacher: TeacherItems, item_rows: tf.Tensor | None) -> tf.Tensor:
    """Returns which of the teacher's items count, bool [b, c]: valid, not in the batch, the first in their list."""
    # The row of an entry that is not valid may be that of a valid one.
    own = tf.reshape(tf.where(teacher.valid, tf.cast(teacher.rows, tf.int64), -1), [-1])
    batch = own[:0] if item_rows is None else item_rows
    unique, places = tf.unique(tf.concat([batch, own], axis=0), tf.int64)
    known, places = tf.split(places, [tf.size(batch), tf.size(own)])
    is_new = places > tf.reduce_max(known)  # of the numbers of unique rows, those of the batch come first
    queries, count = tf.unstack(tf.shape(teacher.rows, tf.int64))
    keys = tf.repeat(tf.range(queries), count) * tf.size(unique, tf.int64) + places
    return teacher.valid & tf.reshape(is_new & _first(keys), tf.shape(teacher.rows))
