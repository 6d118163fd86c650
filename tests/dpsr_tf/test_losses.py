from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsr_tf.models.losses import hinge_loss, log_q, mixed_hinge_loss, negative_weights, softmax_loss


def random_mask(b, r, seed=0, allowed=0.7):
    """A mask as the dataset makes it: a query's own positive is never its negative."""
    mask = np.random.default_rng(seed).random((b, b + r)) < allowed
    mask[:, :b] &= ~np.eye(b, dtype=bool)
    return mask


def expected_weights(mask, alpha):
    """Section 4.4.3 query by query."""
    b = len(mask)
    weights = np.zeros(mask.shape)
    for i, row in enumerate(mask):
        batch, shared = np.flatnonzero(row[:b]), b + np.flatnonzero(row[b:])
        shares = [(batch, 1 - alpha), (shared, alpha)]
        shares = [(group, share) for group, share in shares if len(group)]
        total = sum(share for _, share in shares)
        for group, share in shares:
            if total:
                weights[i, group] = len(batch) + len(shared)
                weights[i, group] *= share / total / len(group)
    return weights


def expected_loss(positive, scores, weights, margin, example_weights):
    total = 0.0
    for i in range(len(positive)):
        for j in range(scores.shape[1]):
            total += example_weights[i] * weights[i, j] * max(0.0, margin - positive[i] + scores[i, j])
    return total / len(positive)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("b", "r"), [(1, 1), (2, 0), (2, 3), (8, 16), (16, 1)])
@pytest.mark.parametrize("allowed", [0.2, 0.7, 1.0])
def test_negative_weights_equal_the_definition(b, r, alpha, allowed):
    mask = random_mask(b, r, seed=b + r, allowed=allowed)
    weights = negative_weights(tf.constant(mask), alpha).numpy()
    assert weights.dtype == np.float32 and weights.shape == mask.shape
    np.testing.assert_allclose(weights, expected_weights(mask, alpha), rtol=1e-6)
    assert not weights[~mask].any(), "exactly zero where the mask is False"


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.8])
def test_weights_share_the_number_of_negatives(alpha):
    b, r = 8, 20
    mask = random_mask(b, r)
    weights = negative_weights(tf.constant(mask), alpha).numpy()
    count = mask.sum(axis=1)
    np.testing.assert_allclose(weights.sum(axis=1), count, rtol=1e-6)
    np.testing.assert_allclose(weights[:, b:].sum(axis=1), alpha * count, rtol=1e-6)


def test_alpha_0_and_1_are_exact():
    b, r = 6, 10
    mask = random_mask(b, r)
    batch_only = negative_weights(tf.constant(mask), 0.0).numpy()
    assert not batch_only[:, b:].any()
    np.testing.assert_array_equal(batch_only[:, :b] > 0, mask[:, :b])
    random_only = negative_weights(tf.constant(mask), 1.0).numpy()
    assert not random_only[:, :b].any()
    np.testing.assert_array_equal(random_only[:, b:] > 0, mask[:, b:])


def test_all_allowed_and_evenly_mixed_is_the_plain_sum():
    """b - 1 in-batch and as many random negatives at alpha 1/2: each counts once."""
    b = 5
    mask = np.ones((b, 2 * b - 1), bool)
    mask[:, :b] &= ~np.eye(b, dtype=bool)
    np.testing.assert_allclose(negative_weights(tf.constant(mask), 0.5), mask.astype(float), rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75])
def test_an_empty_group_gives_its_share_to_the_other(alpha):
    b, r = 3, 4
    mask = random_mask(b, r, allowed=1.0)
    mask[0, b:] = False
    mask[1, :b] = False
    weights = negative_weights(tf.constant(mask), alpha).numpy()
    np.testing.assert_allclose(weights[0], mask[0], rtol=1e-6)
    np.testing.assert_allclose(weights[1], mask[1], rtol=1e-6)


@pytest.mark.parametrize(("alpha", "b", "r"), [(0.5, 12, 12), (0.25, 16, 8), (0.9, 8, 24)])
def test_weights_equal_count_mixing_in_expectation(alpha, b, r):
    """The paper draws N negatives, a share alpha of them from the random set; the weights are the expected counts."""
    mask = random_mask(b, r, seed=3)
    weights = negative_weights(tf.constant(mask), alpha).numpy()
    rng = np.random.default_rng(0)
    for i in (0, b // 2, b - 1):
        batch, shared = np.flatnonzero(mask[i, :b]), b + np.flatnonzero(mask[i, b:])
        n, trials = int(mask[i].sum()), 20_000
        random_draws = rng.binomial(n, alpha, trials).sum()
        counts = np.bincount(rng.choice(shared, random_draws), minlength=b + r).astype(float)
        counts += np.bincount(rng.choice(batch, n * trials - random_draws), minlength=b + r)
        mean = counts / trials
        # A mean of `trials` counts of about w each: five standard errors.
        np.testing.assert_allclose(mean, weights[i], atol=5 * np.sqrt(weights[i].max() / trials))


@pytest.mark.parametrize("seed", range(3))
def test_hinge_loss_equals_numpy(seed):
    rng = np.random.default_rng(seed)
    b, n, margin = 7, 19, 0.3
    positive, scores = rng.uniform(-1, 1, b), rng.uniform(-1, 1, (b, n))
    weights, example_weights = rng.uniform(0, 3, (b, n)), rng.uniform(0, 2, b)
    arguments = [np.float32(x) for x in (positive, scores, weights)]
    loss = hinge_loss(*arguments, margin, np.float32(example_weights))
    assert loss.shape == () and loss.dtype == tf.float32
    np.testing.assert_allclose(loss, expected_loss(positive, scores, weights, margin, example_weights), rtol=1e-5)


@pytest.mark.parametrize("hard", [0, 3])
def test_positives_may_be_the_diagonal(hard):
    rng = np.random.default_rng(1)
    scores, weights = (tf.constant(rng.uniform(0, 1, (4, 9)), tf.float32) for _ in range(2))
    weights = tf.linalg.set_diag(weights, tf.zeros(4))
    examples = tf.constant([1.0, 0.0, 2.0, 0.5])
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(scores)
        apart = hinge_loss(tf.linalg.diag_part(scores), scores, weights, 0.3, examples, hard)
        together = hinge_loss(None, scores, weights, 0.3, examples, hard)
    np.testing.assert_array_equal(apart, together)
    np.testing.assert_allclose(tape.gradient(apart, scores), tape.gradient(together, scores), rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_mixed_hinge_loss_is_that_of_the_weights(alpha):
    rng = np.random.default_rng(2)
    b, r = 5, 17
    scores, mask = tf.constant(rng.uniform(-0.3, 0.3, (b, b + r)), tf.float32), tf.constant(random_mask(b, r, seed=2))
    examples = tf.constant(rng.uniform(0, 2, b), tf.float32)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(scores)
        apart = hinge_loss(None, scores, negative_weights(mask, alpha), 0.1, examples)
        mixed = mixed_hinge_loss(scores, mask, alpha, 0.1, examples)
        twice = 2 * mixed_hinge_loss(scores, mask, alpha, 0.1, examples)
    assert apart > 0
    np.testing.assert_array_equal(mixed, apart)
    np.testing.assert_array_equal(tape.gradient(mixed, scores), tape.gradient(apart, scores))
    np.testing.assert_array_equal(tape.gradient(twice, scores), 2 * tape.gradient(apart, scores))


def test_mixed_hinge_loss_refuses_what_does_not_fit():
    scores, mask = tf.zeros([2, 3]), tf.ones([2, 3], tf.bool)
    for arguments in (
        (tf.zeros([3, 2]), tf.ones([3, 2], tf.bool), 0.5, 0.1, tf.ones(3)),
        (scores, mask[:, :2], 0.5, 0.1, tf.ones(2)),
        (scores, mask, 0.5, 0.1, tf.ones(3)),
        (scores, mask, 1.5, 0.1, tf.ones(2)),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match="expected"):
            mixed_hinge_loss(*arguments)


def test_shapes_that_do_not_fit_are_refused():
    scores, three = tf.zeros([2, 3]), tf.zeros([3])
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"weights has shape \[3,2\], expected \[2,3\]"):
        hinge_loss(None, scores, tf.zeros([3, 2]), 0.1, tf.ones(2))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"positive has shape \[3\], expected \[2\]"):
        hinge_loss(three, scores, scores, 0.1, tf.ones(2))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"mask has shape \[3,2\], expected \[b, b \+ r\]"):
        negative_weights(tf.zeros([3, 2], tf.bool), 0.5)
    with tf.Graph().as_default(), pytest.raises(ValueError, match="must be equal"):
        hinge_loss(tf.zeros([3]), tf.zeros([2, 3]), tf.zeros([2, 3]), 0.1, tf.ones(2))


def test_hinge_loss_by_hand():
    positive, scores = tf.constant([0.9, 0.2]), tf.constant([[0.9, 0.85, 0.5], [0.2, 0.3, 0.05]])
    weights = tf.constant([[0.0, 1.0, 1.0], [0.0, 2.0, 1.0]])
    # Pair 1: 0.1 - 0.9 + 0.85 = 0.05 and nothing; pair 2: 2 x (0.1 - 0.2 + 0.3) and nothing.
    loss = hinge_loss(positive, scores, weights, 0.1, tf.constant([1.0, 1.0]))
    np.testing.assert_allclose(loss, (0.05 + 0.4) / 2, rtol=1e-5)
    loss = hinge_loss(positive, scores, weights, 0.1, tf.constant([4.0, 0.0]))
    np.testing.assert_allclose(loss, 4 * 0.05 / 2, rtol=1e-5, err_msg="example weights scale their pair")


def test_a_separated_batch_has_no_loss_and_no_gradient():
    positive, scores = tf.constant([0.9, 0.9]), tf.constant([[0.9, 0.1], [0.1, 0.9]])
    weights = tf.constant([[0.0, 1.0], [1.0, 0.0]])
    with tf.GradientTape() as tape:
        tape.watch([positive, scores])
        loss = hinge_loss(positive, scores, weights, 0.1, tf.ones(2))
    assert loss == 0
    for gradient in tape.gradient(loss, [positive, scores]):
        assert not gradient.numpy().any()


def assert_gradients_equal_finite_differences(loss, *inputs):
    """`loss` of float64 inputs against central differences of itself, element by element."""
    with tf.GradientTape() as tape:
        tensors = [tf.constant(x) for x in inputs]
        tape.watch(tensors)
        # Twice the loss: what comes from above must be handed down.
        value = 2 * loss(*tensors)
    assert value.dtype == tf.float64
    step = 1e-6
    for which, gradient in enumerate(tape.gradient(value, tensors)):
        for index in np.ndindex(inputs[which].shape):
            moved = [[x.copy() for x in inputs] for _ in range(2)]
            moved[0][which][index] += step
            moved[1][which][index] -= step
            up, down = (loss(*map(tf.constant, ends)).numpy() for ends in moved)
            slope = (up - down) / step
            assert gradient.numpy()[index] == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("hard", [0, 1, 3])
def test_hinge_gradients_equal_finite_differences(hard):
    rng = np.random.default_rng(5)
    b, n = 4, 9
    mask = random_mask(b, n - b, seed=5)
    weights = tf.cast(negative_weights(tf.constant(mask), 0.4), tf.float64)
    example_weights = tf.constant(rng.uniform(0.5, 2, b))
    inputs = rng.uniform(-1, 1, b), rng.uniform(-1, 1, (b, n))
    assert np.abs(0.1 - inputs[0][:, None] + inputs[1]).min() > 1e-3, "no kink within a step of the difference"
    assert_gradients_equal_finite_differences(
        lambda positive, scores: hinge_loss(positive, scores, weights, 0.1, example_weights, hard), *inputs
    )


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_masked_rows_give_no_loss_and_no_nan(alpha):
    b, r = 3, 2
    mask = random_mask(b, r, allowed=1.0)
    mask[1] = False
    scores = tf.Variable(np.random.default_rng(0).uniform(-1, 1, (b, b + r)).astype(np.float32))
    with tf.GradientTape() as tape:
        weights = negative_weights(tf.constant(mask), alpha)
        loss = hinge_loss(tf.zeros(b), scores, weights, 0.1, tf.constant([0.0, 1.0, 0.0]))
    assert not weights.numpy()[1].any() and loss.numpy() == 0
    gradient = tape.gradient(loss, scores).numpy()
    assert np.isfinite(gradient).all() and not gradient.any()
    nothing = negative_weights(tf.zeros([b, b + r], tf.bool), alpha).numpy()
    assert not nothing.any(), "no NaN from 0 / 0"


@pytest.mark.parametrize("hard", [1, 3, 8, 100])
def test_hard_negatives_are_the_largest_terms(hard):
    rng = np.random.default_rng(hard)
    scores, positive = rng.uniform(-1, 1, (5, 8)).astype(np.float32), rng.uniform(-1, 1, 5).astype(np.float32)
    weights = rng.uniform(0, 2, (5, 8)).astype(np.float32) * (rng.random((5, 8)) < 0.7)
    examples = rng.uniform(0.5, 2, 5).astype(np.float32)
    terms = weights * np.maximum(0, 0.3 - positive[:, None] + scores)
    expected = (examples * -np.sort(-terms, axis=1)[:, :hard].sum(axis=1)).mean()
    loss = hinge_loss(positive, scores, weights, 0.3, examples, num_hard_negatives=hard)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_as_many_hard_negatives_as_asked_for_among_equals():
    """One item twice in a batch has one score twice: it takes two places, not more than there are."""
    scores, weights = tf.constant([[0.5, 0.5, 0.5, 0.1]]), tf.ones([1, 4])
    loss = hinge_loss(tf.zeros(1), scores, weights, 0.1, tf.ones(1), num_hard_negatives=2)
    np.testing.assert_allclose(loss, 1.2, rtol=1e-6)


# Softmax.


def expected_softmax(positive, logits, weights, example_weights):
    total = 0.0
    for i in range(len(positive)):
        others = sum(w * np.exp(x) for w, x in zip(weights[i], logits[i], strict=True) if w > 0)
        total -= example_weights[i] * np.log(np.exp(positive[i]) / (np.exp(positive[i]) + others))
    return total / len(positive)


@settings(max_examples=50, deadline=None)
@given(
    b=st.integers(1, 5),
    n=st.integers(1, 7),
    allowed=st.sampled_from([0.0, 0.3, 1.0]),
    scale=st.sampled_from([0.1, 5.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_softmax_loss_equals_numpy(b, n, allowed, scale, seed):
    rng = np.random.default_rng(seed)
    positive, logits = rng.normal(scale=scale, size=b), rng.normal(scale=scale, size=(b, n))
    weights = rng.uniform(0.1, 3, (b, n)) * (rng.random((b, n)) < allowed)
    example_weights = rng.uniform(0, 2, b)
    loss = softmax_loss(*map(tf.constant, (positive, logits, weights, example_weights)))
    np.testing.assert_allclose(loss, expected_softmax(positive, logits, weights, example_weights), atol=1e-9)
    assert loss.numpy() >= 0 and (allowed > 0 or loss.numpy() == 0), "a pair without negatives adds nothing"


def test_softmax_gradients_equal_finite_differences():
    rng = np.random.default_rng(7)
    b, n = 4, 6
    weights = tf.constant(rng.uniform(0, 3, (b, n)) * random_mask(b, n - b, seed=2))
    example_weights = tf.constant(rng.uniform(0.5, 2, b))
    assert_gradients_equal_finite_differences(
        lambda positive, logits: softmax_loss(positive, logits, weights, example_weights),
        rng.normal(size=b),
        rng.normal(scale=2, size=(b, n)),
    )


def test_softmax_is_tensorflows_where_all_count_once():
    rng = np.random.default_rng(0)
    positive, logits = rng.normal(size=6), rng.normal(size=(6, 4))
    together = np.concatenate([positive[:, None], logits], axis=1)
    expected = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(np.zeros(6, np.int64), together))
    loss = softmax_loss(*map(tf.constant, (positive, logits, np.ones((6, 4)), np.ones(6))))
    np.testing.assert_allclose(loss, expected, rtol=1e-9)


def test_softmax_of_large_logits_and_of_masked_ones_is_finite():
    logits = tf.Variable([[1e4, -1e4, 3e38], [1e4, 0.0, 0.0]])
    positive = tf.Variable([0.0, 1e4])
    with tf.GradientTape() as tape:
        loss = softmax_loss(positive, logits, tf.constant([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), tf.ones(2))
    np.testing.assert_allclose(loss, 1e4 / 2)
    gradients = tape.gradient(loss, [positive, logits])
    np.testing.assert_allclose(gradients[0], [-0.5, 0], atol=1e-7)
    np.testing.assert_allclose(gradients[1], [[0.5, 0, 0], [0, 0, 0]], atol=1e-7)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("title_share", [0.0, 0.5])
def test_log_q_is_how_often_an_item_is_drawn(alpha, title_share):
    """Counted: negatives drawn as section 4.4.3 has it, with the shares of a small log."""
    shares = np.array([0.5, 0.3, 0.15, 0.05])
    rng, trials = np.random.default_rng(1), 400_000
    uniform = (rng.random(trials) < alpha) | (rng.random(trials) < title_share)
    drawn = np.where(uniform, rng.integers(0, 4, trials), rng.choice(4, trials, p=shares))
    q = np.exp(log_q(tf.constant(shares), 4, alpha, title_share))
    np.testing.assert_allclose(q.sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(q, np.bincount(drawn, minlength=4) / trials, atol=5e-3)


def test_log_q_of_an_item_that_is_never_drawn_is_a_number():
    np.testing.assert_allclose(log_q(tf.constant([0.0, 1.0]), 10, 0.0), np.log([0.001, 1.0]), rtol=1e-6)
    assert log_q(tf.constant([0.0, 1.0]), 10, 0.0).dtype == tf.float32


def test_log_q_makes_the_sum_over_drawn_negatives_that_over_all_items():
    """What the correction is for: drawn with popularity, weighted with 1 / q, items stand for the whole catalogue."""
    rng = np.random.default_rng(3)
    logits, shares = rng.normal(size=20), rng.dirichlet(np.ones(20))
    q = np.exp(log_q(tf.constant(shares), 20, 0.25).numpy())
    drawn = rng.choice(20, 200_000, p=q / q.sum())
    np.testing.assert_allclose((np.exp(logits - np.log(q))[drawn]).mean(), np.exp(logits).sum(), rtol=0.02)


@settings(max_examples=50, deadline=None)
@given(
    b=st.integers(1, 6),
    r=st.integers(0, 6),
    alpha=st.integers(0, 100).map(lambda percent: percent / 100),
    allowed=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_weights_of_any_mask(b, r, alpha, allowed, seed):
    mask = random_mask(b, r, seed, allowed)
    weights = negative_weights(tf.constant(mask), alpha).numpy()
    assert np.isfinite(weights).all() and (weights >= 0).all() and not weights[~mask].any()
    np.testing.assert_allclose(weights, expected_weights(mask, alpha), rtol=1e-4, atol=1e-6)
    # The whole weight of a query is its number of negatives, unless alpha gives its only group nothing.
    if 0 < alpha < 1:
        np.testing.assert_allclose(weights.sum(axis=1), mask.sum(axis=1), rtol=1e-4)
