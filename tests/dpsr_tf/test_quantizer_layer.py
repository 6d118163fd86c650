"""The quantizer layer against NumPy: values, gradients, losses, Givens steps; and its ops."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from dpsr_common.errors import UsageError
from dpsr_tf import ops
from dpsr_tf.config import QuantizerConfig
from dpsr_tf.models import quantizer_layer
from dpsr_tf.models.quantizer import Encoder, Quantizer
from dpsr_tf.models.quantizer_layer import ItemCodes, QuantizerLayer, TeacherItems, quantizer_loss

v1 = tf.compat.v1

D, M, LISTS = 12, 3, 5


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit(seed, *shape):
    x = normal(seed, *shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make_values(seed=0, dim=D, parts=M, bits=4, lists=LISTS, rotated=True):
    rotation = np.linalg.qr(normal(seed, dim, dim))[0] if rotated else np.eye(dim, dtype=np.float32)
    return Quantizer(
        rotation, 0.3 * normal(seed + 1, lists, dim), 0.2 * normal(seed + 2, parts, 1 << bits, dim // parts)
    )


def make_config(**values):
    return QuantizerConfig(**{"sub_spaces": M, "bits": 4, "lists": LISTS, "learning_rate": 0.01} | values)


def parts_of(q, x, lists, codes):
    """Coarse centroids and T(x) R of x with given lists and codes, float64."""
    parts = np.concatenate([book.astype(float)[codes[:, m]] for m, book in enumerate(q.codebooks)], axis=1)
    return q.coarse.astype(float)[lists], q.coarse.astype(float)[lists] + parts


@pytest.mark.parametrize(
    ("n", "dim", "parts", "bits", "lists"), [(50, 12, 3, 4, 5), (1, 16, 16, 4, 1), (300, 64, 8, 8, 40)]
)
def test_the_layer_is_the_quantizer(n, dim, parts, bits, lists):
    values, x = make_values(0, dim, parts, bits, lists), unit(5, n, dim)
    with tf.Graph().as_default(), v1.Session() as session:
        layer = QuantizerLayer(QuantizerConfig(sub_spaces=parts, bits=bits, lists=lists), dim, values)
        quantized = layer(tf.constant(x))
        session.run(v1.global_variables_initializer())
        got = session.run(quantized)
        read = layer.quantizer(session)
    assert read.fingerprint == values.fingerprint
    numbers, codes = values.encode(x)
    np.testing.assert_array_equal(got.lists, numbers)
    np.testing.assert_array_equal(got.codes, codes)
    np.testing.assert_allclose(got.full, values(x), atol=1e-6)
    np.testing.assert_allclose(got.coarse, values.coarse[numbers] @ values.rotation.T, atol=1e-6)
    np.testing.assert_allclose(got.rotated, x @ values.rotation, atol=1e-6)
    np.testing.assert_allclose(got.rotated_full @ values.rotation.T, got.full, atol=1e-6)


def test_the_gradient_passes_straight_through_and_to_the_chosen_centroids():
    values, x, upstream = make_values(), unit(5, 50, D), normal(6, 50, D)
    with tf.Graph().as_default(), v1.Session() as session:
        layer = QuantizerLayer(make_config(), D, values)
        given = tf.constant(x)
        quantized = layer(given)
        of_full = tf.gradients(quantized.full, [given, *layer.variables], upstream)
        of_coarse = tf.gradients(quantized.coarse, [given, *layer.variables], upstream)
        assert of_coarse[0] is None and of_coarse[3] is None
        session.run(v1.global_variables_initializer())
        of_x, of_rotation, of_centroids, of_codebooks = session.run(of_full)
        coarse_rotation, coarse_centroids = session.run(of_coarse[1:3])
    np.testing.assert_allclose(of_x, upstream, atol=1e-5)
    lists, codes = values.encode(x)
    rotated = upstream @ values.rotation
    expected = np.zeros_like(values.coarse)
    np.add.at(expected, lists, rotated)
    np.testing.assert_allclose(of_centroids, expected, atol=1e-5)
    np.testing.assert_allclose(coarse_centroids, expected, atol=1e-5)
    expected = np.zeros_like(values.codebooks)
    for m, part in enumerate(np.split(rotated, M, axis=1)):
        np.add.at(expected[m], codes[:, m], part)
    np.testing.assert_allclose(of_codebooks, expected, atol=1e-5)
    # The rotation's gradient is that of y R^T with constant codes y.
    coarse, full = parts_of(values, x, lists, codes)
    np.testing.assert_allclose(of_rotation, upstream.T @ full, atol=1e-5)
    np.testing.assert_allclose(coarse_rotation, upstream.T @ coarse, atol=1e-5)


# Residual codes.


def make_residual(seed=0, dim=D, books=M, bits=4, lists=LISTS):
    """Values that have moved away from those of the encoder."""
    encoder = Encoder(0.3 * normal(seed, lists, dim), 0.2 * normal(seed + 1, books, 1 << bits, dim))
    moved = [values + 0.05 * normal(seed + 2 + i, *values.shape) for i, values in enumerate(encoder)]
    return Quantizer(np.eye(dim, dtype=np.float32), *moved, encoder)


def test_residual_codes_are_those_with_a_small_error():
    values, x = make_residual(), unit(5, 200, D)
    lists, codes = values.encode(x)
    encoder = values.encoder
    np.testing.assert_array_equal(lists, ((x[:, np.newaxis] - encoder.coarse) ** 2).sum(axis=2).argmin(axis=1))
    sums = [book[codes[:, m]] for m, book in enumerate(encoder.codebooks)]
    residual = x - encoder.coarse[lists]
    # As good as the best of all 16^3 combinations, or nearly.
    every = np.stack(np.meshgrid(*[np.arange(16)] * M), axis=-1).reshape(-1, M)
    combined = sum(book[every[:, m]] for m, book in enumerate(encoder.codebooks))
    least = ((residual[:, np.newaxis] - combined) ** 2).sum(axis=2).min(axis=1)
    found = ((residual - sum(sums)) ** 2).sum(axis=1)
    assert (found >= least - 1e-6).all() and found.mean() < 1.02 * least.mean()
    # What an item is scored with are the values that were trained.
    trained = values.coarse[lists] + sum(book[codes[:, m]] for m, book in enumerate(values.codebooks))
    np.testing.assert_allclose(values(x), trained, atol=1e-6)
    assert values.code_bytes == 2 and values.encode(x)[1].tolist() == codes.tolist()
    assert (
        dataclasses.replace(values, encoder=Encoder(encoder.coarse, values.codebooks)).fingerprint != values.fingerprint
    )


def test_the_layer_looks_residual_codes_up():
    values, x, upstream = make_residual(), unit(5, 50, D), normal(6, 30, D)
    codes = ItemCodes(*values.encode(x))
    rows = np.random.default_rng(1).integers(0, 50, 30)
    with tf.Graph().as_default(), v1.Session() as session:
        config = make_config(codes="residual", rotation="none")
        layer = QuantizerLayer(config, D, values, codes)
        given = tf.constant(x[rows])
        quantized = layer(given, tf.constant(rows))
        gradients = tf.gradients(quantized.full, [given, layer.variables[1], layer.variables[2]], upstream)
        step = layer.minimize(tf.reduce_sum(quantized.full * upstream))
        session.run(v1.global_variables_initializer())
        got, (of_x, of_centroids, of_codebooks) = session.run((quantized, gradients))
        session.run(step)
        after = layer.quantizer(session)
    lists, chosen = codes.lists[rows], codes.codes[rows]
    np.testing.assert_array_equal(got.lists, lists)
    np.testing.assert_array_equal(got.codes, chosen)
    np.testing.assert_allclose(got.full, values(x)[rows], atol=1e-6)
    np.testing.assert_allclose(got.coarse, values.coarse[lists], atol=1e-6)
    np.testing.assert_allclose(of_x, upstream, atol=1e-6)
    expected = np.zeros_like(values.coarse)
    np.add.at(expected, lists, upstream)
    np.testing.assert_allclose(of_centroids, expected, atol=1e-5)
    expected = np.zeros_like(values.codebooks)
    for m in range(M):
        np.add.at(expected[m], chosen[:, m], upstream)
    np.testing.assert_allclose(of_codebooks, expected, atol=1e-5)
    # Adam's first step has the size of the rate, for codebooks over the root of their number.
    for name, size in (("coarse", config.coarse_learning_rate), ("codebooks", config.learning_rate / np.sqrt(M))):
        moved = np.abs(getattr(after, name) - getattr(values, name)).max()
        assert moved == pytest.approx(size, rel=1e-3), name
    for before, now in zip(values.encoder, after.encoder, strict=True):
        np.testing.assert_array_equal(before, now)


def test_residual_codes_are_needed():
    with pytest.raises(ValueError, match="no codes of items are given"):
        QuantizerLayer(make_config(codes="residual", rotation="none"), D)


@pytest.mark.parametrize("item_rows", [False, True])
def test_distillation_of_residual_codes(item_rows):
    """Every candidate has the codes of its own row."""
    values, x, query = make_residual(), unit(5, 40, D), unit(6, 3, 1, D)
    codes, taught = ItemCodes(*values.encode(x)), np.array([[7, 8], [9, 7], [20, 21]])
    config = make_config(codes="residual", rotation="none")
    batch = np.arange(5 if item_rows else 0)
    with tf.Graph().as_default(), v1.Session() as session:
        layer = QuantizerLayer(config, D, values, codes)
        teacher = TeacherItems(tf.constant(taught), tf.constant(x[taught]), tf.ones_like(taught, tf.bool))
        loss, _ = quantizer_loss(
            config, layer, tf.constant(query), tf.constant(x[batch]), teacher, 0.1, tf.constant(batch)
        )
        session.run(v1.global_variables_initializer())
        loss = session.run(loss)
    expected = []
    for row, own in zip(query[:, 0], taught, strict=True):
        candidates = [*batch, *own]
        target = np.exp(row @ x[candidates].T / 0.1)
        target /= target.sum()
        for student in (values.coarse[codes.lists[candidates]], values(x[candidates])):
            logits = row @ student.T / 0.1
            expected.append(-(target * (logits - np.log(np.exp(logits).sum()))).sum())
    assert loss == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_reconstruction_is_the_mean_distortion_and_its_slopes_are_those_of_procrustes():
    values, x = make_values(), unit(5, 50, D)
    with tf.Graph().as_default(), v1.Session() as session:
        config = make_config(objective="reconstruction")
        layer = QuantizerLayer(config, D, values)
        loss, _ = quantizer_loss(config, layer, tf.zeros([3, 1, D]), tf.constant(x), None, 0.1)
        session.run(v1.global_variables_initializer())
        loss, gradient = session.run((loss, tf.gradients(loss, layer.variables[0])[0]))
    assert loss == pytest.approx(((values(x) - x) ** 2).sum(axis=1).mean(), rel=1e-5)
    _, full = parts_of(values, x, *values.encode(x))
    slopes = gradient.T @ values.rotation - values.rotation.T @ gradient
    z = x @ values.rotation
    np.testing.assert_allclose(slopes, 2 / len(x) * (z.T @ full - full.T @ z), atol=1e-5)


# Distillation.


def soft(inner, beta):
    """Soft dot product over the heads of inner [m, n]."""
    if beta < 1e-6 or len(inner) == 1:
        return inner.max(axis=0)
    weights = np.exp(inner / beta)
    return (weights / weights.sum(axis=0) * inner).sum(axis=0)


def numpy_distillation(values, query, items, rows, teacher, tau, beta, codes_from=None):
    """The loss in float64. `codes_from`: the quantizer that makes the codes, by default `values`."""
    rotation = values.rotation.astype(float)
    shared = [i for i in range(len(items)) if rows is None or rows[i] not in rows[:i]]
    total = 0.0
    for i, heads in enumerate(query.astype(float)):
        candidates = [items[j] for j in shared]
        seen = set() if rows is None else {rows[j] for j in shared}
        for row, vector, valid in taught(teacher, i) if teacher is not None else ():
            if valid and row not in seen:
                seen.add(row)
                candidates.append(vector)
        x = np.stack(candidates).astype(np.float32)
        coarse, full = parts_of(values, x, *(codes_from or values).encode(x))
        logits = [soft(heads @ vectors.T, beta) / tau for vectors in (x, coarse @ rotation.T, full @ rotation.T)]
        log_p = [each - np.log(np.exp(each - each.max()).sum()) - each.max() for each in logits]
        total -= sum(np.exp(log_p[0]) @ student for student in log_p[1:])
    return total / len(query)


def taught(teacher, query):
    """Row, vector and validity of each of the teacher's items of a query."""
    valid = teacher.valid[query]
    vectors = teacher.vectors[teacher.valid[:query].any(axis=1).sum()] if valid.any() else [None] * len(valid)
    return zip(teacher.rows[query], vectors, valid, strict=True)


def make_teacher(items, queries, count, seed=7):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(items), (queries, count))
    rows[0, :2] = rows[0, 0]  # twice in a list
    valid = rng.random(rows.shape) < 0.7
    valid[1] = False  # a query without a teacher
    valid[0, :2] = True
    rows[~valid] = rows[0, 0]  # the row of an entry that is not valid means nothing
    return TeacherItems(rows.astype(np.int64), items[rows][valid.any(axis=1)], valid)


CASES = pytest.mark.parametrize(
    ("heads", "beta", "teacher", "has_rows"),
    [
        (1, 0.1, "some", True),
        (2, 0.1, "some", True),
        (2, 0.0, "some", False),
        (1, 0.1, None, True),
        (2, 0.1, "none", True),
    ],
)


def distillation(heads, beta, teacher, has_rows, values):
    """Query, items, rows of the batch, teacher; and a function that makes the loss of a layer in the graph."""
    store = unit(1, 40, D)
    rows = np.random.default_rng(2).integers(0, 20, 15) if has_rows else None  # with repeats
    items = store[rows] if has_rows else unit(3, 15, D)
    query = unit(4, 6, heads, D)
    given = None if teacher is None else make_teacher(store, len(query), 5 if teacher == "some" else 3)
    if teacher == "none":
        given = given._replace(valid=np.zeros_like(given.valid), vectors=given.vectors[:0])
    config = make_config(objective="distillation", rotation="givens")
    layer = QuantizerLayer(config, D, values)
    tensors = tf.constant(query), tf.constant(items)
    loss, metrics = quantizer_loss(
        config,
        layer,
        *tensors,
        None if given is None else TeacherItems(*map(tf.constant, given)),
        0.2,
        None if rows is None else tf.constant(rows),
        beta,
    )
    return layer, loss, metrics, tensors, (query, items, rows, given)


@CASES
def test_distillation_and_its_gradients(heads, beta, teacher, has_rows):
    values = make_values()
    with tf.Graph().as_default(), v1.Session() as session:
        layer, loss, _, (query, items), arrays = distillation(heads, beta, teacher, has_rows, values)
        of_items = tf.gradients(loss, items)[0]
        gradients = tf.gradients(loss, [query, *layer.variables])
        session.run(v1.global_variables_initializer())
        loss, of_items, gradients = session.run((loss, of_items, gradients))
    query, items, rows, given = arrays
    assert loss == pytest.approx(numpy_distillation(values, *arrays, 0.2, beta), rel=1e-5)
    assert np.isfinite(of_items).all() and of_items.any()

    # Central differences of the loss with constant codes; the teacher's scores are constant too.
    def loss_of(query, rotation, coarse, codebooks):
        changed = Quantizer(rotation, coarse, codebooks)
        return numpy_distillation(changed, query, items, rows, given, 0.2, beta, codes_from=values)

    start = [np.asarray(value, float) for value in (query, values.rotation, values.coarse, values.codebooks)]
    rng = np.random.default_rng(0)
    for which in (1, 2, 3):
        for _ in range(8):
            place = tuple(rng.integers(0, size) for size in start[which].shape)
            sides = []
            for step in (1e-5, -1e-5):
                moved = [value.copy() for value in start]
                moved[which][place] += step
                sides.append(loss_of(*moved))
            expected = (sides[0] - sides[1]) / 2e-5
            assert gradients[which][place] == pytest.approx(expected, abs=2e-4), (which, place)


def test_only_a_share_of_a_large_batch_is_a_candidate_of_all_queries(monkeypatch):
    monkeypatch.setattr(quantizer_layer, "_SHARED", 5)
    values = make_values()
    with tf.Graph().as_default(), v1.Session() as session:
        _, loss, _, _, (query, items, rows, given) = distillation(2, 0.1, "some", True, values)
        session.run(v1.global_variables_initializer())
        loss = session.run(loss)
    assert loss == pytest.approx(numpy_distillation(values, query, items[::3], rows[::3], given, 0.2, 0.1), rel=1e-5)


def test_the_temperature_of_the_config_comes_first():
    values = make_values()
    x, query = unit(1, 9, D), unit(2, 4, 1, D)
    with tf.Graph().as_default(), v1.Session() as session:
        config = make_config(temperature=0.5)
        layer = QuantizerLayer(config, D, values)
        loss, _ = quantizer_loss(config, layer, tf.constant(query), tf.constant(x), None, 0.1)
        session.run(v1.global_variables_initializer())
        assert session.run(loss) == pytest.approx(numpy_distillation(values, query, x, None, None, 0.5, 0), rel=1e-5)


def test_a_ranking_loss_is_not_made_here():
    with tf.Graph().as_default(), pytest.raises(ValueError, match="ranking"):
        config = make_config(objective="ranking")
        quantizer_loss(config, QuantizerLayer(config, D), tf.zeros([1, 1, D]), tf.zeros([1, D]), None, 0.1)


def test_metrics():
    values, x = make_values(), unit(5, 60, D)
    with tf.Graph().as_default(), v1.Session() as session:
        layer = QuantizerLayer(make_config(), D, values)
        metrics = quantizer_layer.quantizer_metrics(layer, layer(tf.constant(x)))
        session.run(v1.global_variables_initializer())
        got = session.run(metrics)
    lists, codes = values.encode(x)
    shares = np.stack([np.bincount(codes[:, m], minlength=16) for m in range(M)]) / 60
    of_lists = np.bincount(lists, minlength=LISTS)
    assert got == pytest.approx(
        {
            "quantizer/distortion": ((values(x) - x) ** 2).sum(axis=1).mean(),
            "quantizer/codes_used": (shares > 0).mean(),
            "quantizer/entropy": -np.where(shares > 0, shares * np.log2(np.maximum(shares, 1e-9)), 0)
            .sum(axis=1)
            .mean(),
            "quantizer/imbalance": LISTS * (of_lists * (of_lists - 1)).sum() / (60 * 59),
            "quantizer/orthogonality_error": np.abs(values.rotation.T @ values.rotation - np.eye(D)).max(),
        },
        rel=1e-4,
        abs=1e-6,
    )


# Training steps.


def greedy_step(rotation, gradient, rate):
    """Givens rotations of the steepest disjoint pairs, in float64."""
    slopes = gradient.T @ rotation - rotation.T @ gradient
    rotation, left = rotation.copy(), np.triu(np.abs(slopes), 1)
    while left.max() > 0:
        i, j = np.unravel_index(left.argmax(), left.shape)
        left[[i, j]] = left[:, [i, j]] = 0
        angle = -rate * slopes[i, j]
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        rotation[:, [i, j]] = rotation[:, [i, j]] @ turn
    return rotation


@pytest.mark.parametrize("rotation", ["none", "opq", "givens"])
def test_a_step_is_adams_and_that_of_the_steepest_pairs(rotation):
    values, x, target = make_values(rotated=rotation != "none"), unit(5, 50, D), unit(6, 50, D)
    config = make_config(rotation=rotation, coarse_learning_rate=0.05, rotation_learning_rate=0.3)
    with tf.Graph().as_default(), v1.Session() as session:
        layer = QuantizerLayer(config, D, values)
        loss = tf.reduce_sum(layer(tf.constant(x)).full * target)
        gradients = tf.gradients(loss, layer.variables[:1] if rotation == "givens" else layer.variables[1:])
        step = layer.minimize(loss, 0.5)
        session.run(v1.global_variables_initializer())
        gradient = session.run(gradients[0])
        session.run(step)
        after = layer.quantizer(session)
        assert not v1.trainable_variables()
    expected = values.rotation
    if rotation == "givens":
        expected = greedy_step(values.rotation.astype(float), gradient, 0.15)
        assert np.abs(expected - values.rotation).max() > 0.01
    np.testing.assert_allclose(after.rotation, expected, atol=1e-5)
    # The first step of Adam is the learning rate, against the sign of the gradient.
    moved = np.abs(after.coarse - values.coarse), np.abs(after.codebooks - values.codebooks)
    for change, rate in zip(moved, (0.025, 0.005), strict=True):
        assert change.max() == pytest.approx(rate, rel=1e-2)


@pytest.mark.parametrize("pairs", ["steepest", "random"])
def test_givens_steps_reach_the_optimum_of_procrustes(pairs):
    x = normal(1, 200, 16)
    wanted = np.linalg.qr(normal(2, 16, 16))[0]
    wanted[:, 0] *= np.linalg.det(wanted)  # in reach of the identity
    y = x @ wanted + 0.3 * normal(3, 200, 16)
    left, _, right = np.linalg.svd(x.T @ y)
    best = ((x @ (left @ right) - y) ** 2).mean()
    with tf.Graph().as_default(), v1.Session() as session:
        rotation = v1.get_variable("r", initializer=tf.eye(16), use_resource=True)
        loss = tf.reduce_mean((tf.matmul(x, rotation) - y) ** 2)
        product = tf.matmul(rotation, tf.gradients(loss, rotation)[0], transpose_a=True)
        count = v1.placeholder(tf.int64, [])
        step = ops.load().dpsr_givens_step(rotation.handle, product, 2.0, count, pairs=pairs)
        session.run(v1.global_variables_initializer())
        first = session.run(loss)
        run = session.make_callable(step, [count])
        for i in range(2000):
            run(i)
        last, found = session.run((loss, rotation))
    assert first > 1.5 * best
    assert last == pytest.approx(best, rel=1e-5)
    assert np.abs(found.T @ found - np.eye(16)).max() < 1e-6


def test_training_lowers_the_loss_and_is_the_same_twice():
    def run():
        values, x, query = make_values(0, 64, 8, 4, 20), unit(1, 2000, 64), unit(2, 300, 1, 64)
        teacher = make_teacher(x, 300, 8)
        config = QuantizerConfig(sub_spaces=8, bits=4, lists=20, rotation="givens", rotation_learning_rate=0.01)
        with tf.Graph().as_default(), v1.Session() as session:
            layer = QuantizerLayer(config, 64, values)
            tensors = TeacherItems(*map(tf.constant, teacher))
            loss, _ = quantizer_loss(config, layer, tf.constant(query), tf.constant(x[:500]), tensors, 0.1)
            step = layer.minimize(loss)
            session.run(v1.global_variables_initializer())
            first = session.run(loss)
            for _ in range(30):
                session.run(step)
            return first, session.run(loss), layer.quantizer(session)

    first, last, trained = run()
    assert last < first - 0.05
    assert run()[2].fingerprint == trained.fingerprint


# Bad input.


@pytest.mark.parametrize("parts", [0, 5, 24])
def test_parts_that_do_not_divide_the_dimension(parts):
    with tf.Graph().as_default(), pytest.raises(UsageError, match=rf"sub_spaces is {parts}.*12.*1, 2, 3, 4, 6, 12"):
        QuantizerLayer(make_config(sub_spaces=parts), D)


def test_values_that_do_not_fit():
    values = make_values()
    with tf.Graph().as_default():
        with pytest.raises(ValueError, match=r"quantizer/coarse given has shape \(5, 12\).*\(6, 12\)"):
            QuantizerLayer(make_config(lists=6), D, values)
        with pytest.raises(ValueError, match="from the identity"):
            QuantizerLayer(make_config(rotation="none"), D, values)
        stretched = Quantizer(1.1 * values.rotation, values.coarse, values.codebooks)
        with pytest.raises(ValueError, match="from an orthogonal matrix"):
            QuantizerLayer(make_config(), D, stretched)


# The ops.


@pytest.mark.parametrize(
    ("n", "parts", "size", "width"), [(0, 2, 3, 4), (7, 1, 1, 1), (65, 3, 33, 5), (100, 4, 256, 8)]
)
def test_nearest_codes(n, parts, size, width):
    x, codebooks = normal(1, n, parts * width), normal(2, parts, size, width)
    codes = ops.load().dpsr_nearest_codes(x, codebooks).numpy()
    difference = x.reshape(n, parts, 1, width).astype(float) - codebooks
    np.testing.assert_array_equal(codes, (difference**2).sum(axis=3).argmin(axis=2).reshape(n, parts))
    vectors = ops.load().dpsr_look_up_codes(codes, codebooks).numpy()
    expected = codebooks[np.arange(parts), codes].reshape(n, parts * width)
    np.testing.assert_array_equal(vectors, expected)


def test_ties_go_to_the_lower_number():
    x = np.repeat(normal(1, 40, 3), 2, axis=0)
    codebook = np.repeat(normal(2, 50, 3), 3, axis=0)[np.newaxis]
    assert not (ops.load().dpsr_nearest_codes(x, codebook).numpy() % 3).any()


def test_what_is_no_number_has_a_code():
    x, codebooks = normal(1, 10, 6), normal(2, 2, 40, 3)
    x[3], codebooks[1] = np.nan, np.nan
    codes = ops.load().dpsr_nearest_codes(x, codebooks).numpy()
    assert (codes[3] == 0).all() and (codes[:, 1] == 0).all() and codes[:, 0].any()


@pytest.mark.parametrize(
    ("call", "inferred"),
    [
        (lambda k: k.dpsr_nearest_codes(tf.zeros([2, 5]), tf.zeros([2, 4, 3])), True),
        (lambda k: k.dpsr_nearest_codes(tf.zeros([6]), tf.zeros([2, 4, 3])), True),
        (lambda k: k.dpsr_nearest_codes(tf.zeros([2, 6]), tf.zeros([4, 3])), True),
        (lambda k: k.dpsr_nearest_codes(tf.zeros([2, 6]), tf.zeros([2, 0, 3])), False),
        (lambda k: k.dpsr_look_up_codes(tf.zeros([2, 3], tf.int32), tf.zeros([2, 4, 3])), True),
        (lambda k: k.dpsr_look_up_codes(tf.fill([2, 2], 4), tf.zeros([2, 4, 3])), False),
        (lambda k: k.dpsr_look_up_codes(tf.fill([2, 2], -1), tf.zeros([2, 4, 3])), False),
        (
            lambda k: k.dpsr_look_up_codes_gradient(tf.zeros([2, 2], tf.int32), tf.zeros([2, 4, 3]), tf.zeros([2, 5])),
            True,
        ),
        (
            lambda k: k.dpsr_look_up_codes_gradient(tf.zeros([2, 2], tf.int32), tf.zeros([2, 4, 3]), tf.zeros([3, 6])),
            False,
        ),
        (lambda k: k.dpsr_givens_step(variable(4), tf.zeros([3, 4]), 0.1, np.int64(0), pairs="random"), True),
        (lambda k: k.dpsr_givens_step(variable(4), tf.zeros([3, 3]), 0.1, np.int64(0), pairs="random"), False),
        (lambda k: k.dpsr_givens_step(variable(4), tf.zeros([4, 4]), [0.1], np.int64(0), pairs="random"), True),
        (lambda k: k.dpsr_givens_step(variable(4), tf.zeros([4, 4]), 0.1, np.int64(-1), pairs="random"), False),
    ],
)
def test_input_that_does_not_fit_is_refused(call, inferred):
    """By the kernels, and where shapes tell already when a graph is made."""
    with pytest.raises(tf.errors.InvalidArgumentError, match="expected"):
        call(ops.load())
    if inferred:
        with tf.Graph().as_default(), pytest.raises(ValueError, match=r"ank|imension"):
            call(ops.load())


def variable(dim):
    return tf.Variable(tf.eye(dim)).handle
