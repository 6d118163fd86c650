"""The loss of a whole batch against NumPy, and the configurations that make the paper's models."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from dpsr_tf.config import CONFIGS, Config, ModelConfig, QuantizerConfig, TrainConfig, load_config
from dpsr_tf.data.examples_dataset import Batch, Features, History, Tokens
from dpsr_tf.data.schema import EVENT_TYPES
from dpsr_tf.models.embedding import EmbeddingTable, minimize
from dpsr_tf.models.features import FeatureSpec, ItemFeatures, QueryFeatures
from dpsr_tf.models.input_layers import stock_table
from dpsr_tf.models.losses import log_q
from dpsr_tf.models.objective import build_loss
from dpsr_tf.models.quantizer import Quantizer
from dpsr_tf.models.quantizer_layer import QuantizerLayer, TeacherItems, quantizer_loss
from dpsr_tf.models.two_tower import TwoTower

v1 = tf.compat.v1


NUM_TOKENS, NUM_ITEMS = 40, 30
STORE_FEATURES = {
    "items": [
        {"name": "brand", "kind": "categorical", "num_values": 5},
        {"name": "tags", "kind": "multi", "num_values": 4},
        {"name": "blurb", "kind": "text", "vocabulary": None},
    ],
    "users": [{"name": "age", "kind": "number", "num_values": 3}],
}
MODEL = ModelConfig(token_dim=6, hidden=(8,), embedding_dim=5, num_heads=2)


def make_batch(config, seed=0):
    """A batch as the dataset makes it for `config`, with masks and weights of every sort."""
    rng = np.random.default_rng(seed)
    train, model = config.train, config.model
    b, r, o = train.batch_size, train.num_random_negatives, train.num_own_negatives
    n = b + r + b * o

    def tokens(lengths, top=NUM_TOKENS):
        lengths = np.asarray(lengths)
        values = rng.integers(0, top, lengths.sum())
        return Tokens(tf.constant(values, tf.int32), tf.constant(np.cumsum([0, *lengths]), tf.int64))

    def item_features(rows):
        if not model.item_features:
            return Features(tf.zeros([rows, 0], tf.int32), ())
        lists = tokens(rng.integers(0, 3, rows), 5), tokens(rng.integers(0, 4, rows))
        return Features(tf.constant(rng.integers(0, 6, (rows, 1)), tf.int32), lists)

    past = rng.integers(0, model.history_length + 1, b)
    past_queries = rng.integers(0, model.query_history_length + 1, b)
    user_codes = rng.integers(0, 4, (b, 1 if model.user_features else 0))
    mask = rng.random((b, b + r)) < 0.8
    mask[:, :b] &= ~np.eye(b, dtype=bool)
    return Batch(
        query=tokens(rng.integers(1, 4, b)),
        query_rows=tf.zeros([b], tf.int32),
        item=tokens(rng.integers(1, 6, n)),
        item_rows=tf.constant(rng.integers(0, NUM_ITEMS, n), tf.int32),
        item_features=item_features(n),
        user_rows=tf.zeros([b], tf.int32),
        user_features=Features(tf.constant(user_codes, tf.int32), ()),
        history=History(
            items=tokens(past),
            types=tf.constant(rng.integers(2, 5, past.sum()), tf.int32),
            text=tokens(rng.integers(0, 5, past.sum())),
            features=item_features(past.sum()),
            query_splits=tf.constant(np.cumsum([0, *past_queries]), tf.int64),
            query=tokens(rng.integers(0, 3, past_queries.sum())),
        ),
        weights=tf.constant(rng.uniform(0.5, 2, b), tf.float32),
        labels=tf.ones([b]),
        types=tf.constant(2 + (np.arange(b) + seed) % 3, tf.int32),
        negative_mask=tf.constant(mask),
        own_negative_mask=tf.constant(rng.random((b, o)) < 0.7),
    )


def run(config, seed=0, item_log_q=None, steps=0, table=None):
    """Losses before each of `steps` AdaGrad steps and after, metrics, embeddings and batch as NumPy arrays."""
    with tf.Graph().as_default(), v1.Session() as session:
        v1.set_random_seed(seed + 1)
        batch = make_batch(config, seed)
        features = FeatureSpec.choose(config.model, STORE_FEATURES, {None: NUM_TOKENS})
        towers = TwoTower(config.model, features, table or stock_table)
        loss, metrics = build_loss(config, batch, towers, item_log_q and item_log_q(batch))
        embeddings = towers.query_embedding(QueryFeatures.of(batch)), towers.item_embedding(ItemFeatures.of(batch))
        if table is None:
            train = v1.train.AdagradOptimizer(config.train.learning_rate).minimize(loss)
        else:
            train = minimize(loss, list(towers.tables.values()), config.train.learning_rate)
        session.run(v1.global_variables_initializer())
        losses, metrics, embeddings, batch = session.run((loss, metrics, embeddings, batch))
        losses = [losses]
        for _ in range(steps):
            session.run(train)
            losses.append(session.run(loss))
        return losses, metrics, embeddings, batch


def numpy_scores(config, query, item, batch):
    """Soft dot products [b, b + r] with the shared items and [b, o] with each query's own."""
    b, num_shared = batch.negative_mask.shape
    inner = np.einsum("bmd,nd->bmn", query.astype(np.float64), item)
    weights = np.exp(inner / config.model.temperature)
    scores = (weights / weights.sum(axis=1, keepdims=True) * inner).sum(axis=1)
    o = config.train.num_own_negatives
    columns = num_shared + np.arange(b)[:, None] * o + np.arange(o)
    return scores[:, :num_shared], np.take_along_axis(scores, columns, axis=1), columns


def numpy_loss(config, query, item, batch, log_q_of_items=None):
    train = config.train
    b, num_shared = batch.negative_mask.shape
    scores, own, columns = numpy_scores(config, query, item, batch)
    margin_of = {2: train.margin, 3: train.margin, 4: train.margin}
    margin_of |= {EVENT_TYPES.index(name): m for name, m in train.type_margins.items() if name != "unclicked"}
    unclicked_margin = train.type_margins.get("unclicked", 0.0)
    unclicked_weight = train.type_weights.get("unclicked", 0.0)

    def hinge(score, margins_and_negatives):
        terms = [w * max(0.0, margin - score + s) for margin, (s, w, _) in margins_and_negatives]
        return sum(sorted(terms, reverse=True)[: train.num_hard_negatives or None])

    total = 0.0
    for i in range(b):
        kind = batch.types[i]
        weight = batch.weights[i] * train.type_weights.get(EVENT_TYPES[kind], 1.0)
        batch_items = [j for j in range(b) if batch.negative_mask[i, j]]
        random_items = [j for j in range(b, num_shared) if batch.negative_mask[i, j]]
        groups = [(batch_items, 1 - train.mixing_ratio), (random_items, train.mixing_ratio)]
        groups = [(items, share) for items, share in groups if items and share]
        count, shares = len(batch_items) + len(random_items), sum(share for _, share in groups)
        negatives = [(scores[i, j], count * share / shares / len(items), j) for items, share in groups for j in items]
        drawn = list(negatives)
        negatives += [
            (own[i, k], train.own_negative_weight, columns[i, k])
            for k in range(train.num_own_negatives)
            if batch.own_negative_mask[i, k]
        ]
        if train.loss == "hinge":
            of_own = [margin_of[kind] - unclicked_margin] * (len(negatives) - len(drawn))
            margins = [margin_of[kind]] * len(drawn) + of_own
            total += weight * hinge(scores[i, i], zip(margins, negatives, strict=True))
        else:
            # Expected counts: n q for shared items, 1 for own ones, to which no correction applies.
            expected = np.ones(len(item))
            if log_q_of_items is not None and count:
                expected[:num_shared] = count * np.exp(log_q_of_items[:num_shared])

            def softmax(positive, others, expected=expected):
                others = sum(w * np.exp(s / train.softmax_temperature) / expected[j] for s, w, j in others)
                return -np.log(positive / (positive + others))

            positive = np.exp(scores[i, i] / train.softmax_temperature)
            total += weight * softmax(positive / expected[i], negatives)
        for k in np.flatnonzero(batch.own_negative_mask[i]) if unclicked_weight else ():
            # The rung between clicks and random items.
            if train.loss == "hinge":
                found = hinge(own[i, k], [(unclicked_margin, negative) for negative in drawn])
            else:
                found = softmax(np.exp(own[i, k] / train.softmax_temperature), drawn)
            total += batch.weights[i] * unclicked_weight * found
    return total / b


def config_with(model=MODEL, **train):
    return Config(model=model, train=TrainConfig(batch_size=6, num_random_negatives=4, **train))


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"mixing_ratio": 0.0},
        {"mixing_ratio": 1.0},
        {"mixing_ratio": 0.25, "num_hard_negatives": 3},
        {"num_own_negatives": 3, "own_negative_weight": 2.5},
        {"num_own_negatives": 2, "num_hard_negatives": 2},
        {"loss": "softmax"},
        {"loss": "softmax", "mixing_ratio": 0.2, "num_own_negatives": 3, "own_negative_weight": 0.5},
        {"type_weights": {"cart": 2.0, "order": 5.0}},
        {"type_margins": {"cart": 0.2, "order": 0.5}},
        {
            "type_margins": {"click": 0.2, "cart": 0.3, "order": 0.4},
            "num_hard_negatives": 3,
            "type_weights": {"cart": 3.0},
        },
        {"type_margins": {"unclicked": 0.05}, "num_own_negatives": 2},
        {
            "type_margins": {"unclicked": 0.3, "click": 0.4, "cart": 0.5, "order": 0.9},
            "type_weights": {"unclicked": 0.5, "order": 3.0},
            "num_own_negatives": 3,
        },
        {
            "type_margins": {"order": 0.2},
            "type_weights": {"unclicked": 2.0},
            "num_own_negatives": 2,
            "num_hard_negatives": 2,
        },
        {"loss": "softmax", "type_weights": {"click": 0.5, "order": 4.0}},
        {"loss": "softmax", "type_weights": {"unclicked": 0.25, "order": 4.0}, "num_own_negatives": 3},
    ],
)
@pytest.mark.parametrize("heads", [1, 2])
def test_loss_of_a_batch_equals_numpy(train, heads):
    config = config_with(dataclasses.replace(MODEL, num_heads=heads), **train)
    (loss,), _, (query, item), batch = run(config)
    assert loss == pytest.approx(numpy_loss(config, query, item, batch), rel=1e-4)


@pytest.mark.parametrize(("own", "weights"), [(0, {}), (2, {}), (2, {"unclicked": 0.5, "order": 2.0})])
def test_log_q_correction_equals_numpy(own, weights):
    train = {"loss": "softmax", "log_q_correction": True, "mixing_ratio": 0.3, "type_weights": weights}
    config = config_with(num_own_negatives=own, **train)
    shares = np.random.default_rng(4).dirichlet(np.ones(NUM_ITEMS))

    def item_log_q(batch):
        return log_q(tf.gather(tf.constant(shares, tf.float32), batch.item_rows), NUM_ITEMS, 0.3)

    (loss,), _, (query, item), batch = run(config, item_log_q=item_log_q)
    q = np.log(0.3 / NUM_ITEMS + 0.7 * shares[batch.item_rows])
    assert loss == pytest.approx(numpy_loss(config, query, item, batch, q), rel=1e-4)
    assert loss != pytest.approx(numpy_loss(config, query, item, batch), rel=3e-3), "it does something"
    with pytest.raises(ValueError, match="no item_log_q"):
        run(config)


def test_a_ladder_of_equal_steps_is_the_loss_without_one():
    """Weights and margins that are the defaults, given by name."""
    for loss in ("hinge", "softmax"):
        own = {"num_own_negatives": 3}
        (plain,), *_ = run(config_with(loss=loss, **own))
        ladder = {"type_weights": {"unclicked": 0.0, "click": 1.0, "cart": 1.0, "order": 1.0}}
        if loss == "hinge":
            ladder["type_margins"] = {"unclicked": 0.0, "click": 0.1, "cart": 0.1, "order": 0.1}
        (named,), *_ = run(config_with(loss=loss, **own, **ladder))
        assert named == pytest.approx(plain, rel=1e-5)


def test_popularity_of_an_own_negative_changes_nothing():
    """It is in the batch because of its pair and was not drawn, so q says nothing of it."""
    config = config_with(loss="softmax", log_q_correction=True, num_own_negatives=2)
    num_shared = config.train.batch_size + config.train.num_random_negatives
    num_items = num_shared + config.train.batch_size * 2

    def loss_of(own_share):
        shares = np.full(num_items, 0.01, np.float32)
        shares[num_shared:] = own_share
        return run(config, item_log_q=lambda batch: log_q(tf.constant(shares), NUM_ITEMS, 0.5))[0]

    assert loss_of(0.001) == loss_of(0.1)


def test_log_q_correction_without_shared_negatives():
    """A pair that is compared with its own negatives only is not corrected: none of them was drawn."""
    changes = {"loss": "softmax", "mixing_ratio": 1.0, "num_own_negatives": 3}
    plain = Config(MODEL, TrainConfig(batch_size=6, num_random_negatives=0, **changes))
    corrected = dataclasses.replace(plain, train=dataclasses.replace(plain.train, log_q_correction=True))

    def item_log_q(batch):
        return log_q(tf.cast(batch.item_rows, tf.float32) / 100, NUM_ITEMS, 1.0)

    (expected,), *_ = run(plain)
    (loss,), *_ = run(corrected, item_log_q=item_log_q)
    assert expected > 0 and loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("heads", [1, 2])
def test_metrics_equal_numpy(heads):
    config = config_with(dataclasses.replace(MODEL, num_heads=heads), num_own_negatives=10, margin=0.4)
    _, metrics, (query, item), batch = run(config, seed=2)
    shared, own, _ = numpy_scores(config, query, item, batch)
    scores, positive = np.concatenate([shared, own], axis=1), np.diag(shared)
    mask = np.concatenate([batch.negative_mask, batch.own_negative_mask], axis=1)
    violations = (scores > positive[:, None] - 0.4) & mask
    assert metrics["margin_violations"] == pytest.approx(violations.sum() / mask.sum())
    before = ((scores >= positive[:, None]) & mask).sum(axis=1)
    assert 0 < (before < 10).mean() < 1, "a batch that tells"
    assert metrics["recall@10"] == pytest.approx((before < 10).mean())
    assert metrics["norm/query"] > 0 and metrics["norm/item"] > 0
    best = np.einsum("bmd,bd->bm", query, item[: len(query)]).argmax(axis=1)
    usage = {f"head_usage/{i}": (best == i).mean() for i in range(heads)} if heads > 1 else {}
    assert {name: value for name, value in metrics.items() if name.startswith("head")} == pytest.approx(usage)


def recall_of_two_meanings(heads, loss):
    """Each of 90 queries has two of 60 items; share of them among its first two, by the largest inner product."""
    queries, items, r = 90, 60, 32
    rng = np.random.default_rng(0)
    relevant = np.stack([rng.choice(items, 2, replace=False) for _ in range(queries)])
    model = ModelConfig(token_dim=8, embedding_dim=3, num_heads=heads)
    train = TrainConfig(batch_size=64, num_random_negatives=r, loss=loss, learning_rate=0.1)
    with tf.Graph().as_default(), v1.Session() as session:
        v1.set_random_seed(1)

        def text(ids):
            return Tokens(ids, tf.range(tf.size(ids, out_type=tf.int64) + 1))

        query, item = v1.placeholder(tf.int32, [None]), v1.placeholder(tf.int32, [None])
        mask = v1.placeholder(tf.bool, [None, None])
        batch = make_batch(Config(model, train))._replace(
            query=text(query), item=text(item), negative_mask=mask, weights=tf.ones([64])
        )
        towers = TwoTower(model, queries + items)
        loss_of_batch, metrics = build_loss(Config(model, train), batch, towers)
        step = v1.train.AdagradOptimizer(train.learning_rate).minimize(loss_of_batch)
        embeddings = towers.query_embedding(text(query)), towers.item_embedding(text(item))
        session.run(v1.global_variables_initializer())
        for _ in range(500):
            rows = rng.integers(0, queries, 64)
            found = np.concatenate([relevant[rows, rng.integers(0, 2, 64)], rng.integers(0, items, r)])
            allowed = (found != relevant[rows][:, :1]) & (found != relevant[rows][:, 1:])
            feed = {query: rows, item: queries + found, mask: allowed}
            session.run(step, feed)
        usage = [value for name, value in session.run(metrics, feed).items() if name.startswith("head")]
        heads_of, vectors = session.run(embeddings, {query: range(queries), item: range(queries, queries + items)})
    first = np.argsort(-np.einsum("qmd,nd->qmn", heads_of, vectors).max(axis=1), axis=1)[:, :2]
    return np.mean([np.isin(relevant[row], first[row]).mean() for row in range(queries)]), usage


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["hinge", "softmax"])
def test_two_heads_find_both_meanings_of_a_query(loss):
    """Section 6.1.2: in few dimensions one vector cannot lie near two items far apart; two can, and both are used."""
    one, _ = recall_of_two_meanings(1, loss)
    two, usage = recall_of_two_meanings(2, loss)
    assert two > one + 0.1, (one, two)
    assert min(usage) > 0.1, usage


# With a quantizer.


def run_quantized(**options):
    """Loss, metrics, the quantizer's own loss, which towers have a gradient, embeddings, batch, and the quantizer."""
    quantizer = QuantizerConfig(sub_spaces=3, bits=4, lists=2, **options)
    model = dataclasses.replace(MODEL, embedding_dim=6, share_text_table=False)
    config = Config(model, TrainConfig(batch_size=8, num_random_negatives=4, num_own_negatives=2), quantizer=quantizer)
    rng = np.random.default_rng(1)
    values = Quantizer(
        np.linalg.qr(rng.normal(size=(6, 6)))[0].astype(np.float32),
        rng.normal(0, 0.4, (2, 6)).astype(np.float32),
        rng.normal(0, 0.2, (3, 16, 2)).astype(np.float32),
    )
    with tf.Graph().as_default(), v1.Session() as session:
        v1.set_random_seed(1)
        batch = make_batch(config)
        towers = TwoTower(model, FeatureSpec(NUM_TOKENS))
        layer = QuantizerLayer(quantizer, 6, values)
        vectors = rng.normal(size=(8, 3, 6)).astype(np.float32)
        rows, valid = rng.integers(0, NUM_ITEMS, (8, 3)), rng.random((8, 3)) < 0.8
        teacher = TeacherItems(*map(tf.constant, (rows, vectors[valid.any(axis=1)], valid)))
        loss, metrics = build_loss(config, batch, towers, quantizer=layer, teacher=teacher)
        query, items = towers.query_embedding(QueryFeatures.of(batch)), towers.item_embedding(ItemFeatures.of(batch))
        own = tf.zeros([])
        if quantizer.objective != "ranking":
            shared = (items[:12], teacher, config.train.softmax_temperature, batch.item_rows[:12])
            own, _ = quantizer_loss(quantizer, layer, query, *shared, model.temperature)
        trained = {
            side: any(
                gradient is not None
                for variable, gradient in zip(
                    v1.trainable_variables(), tf.gradients(loss, v1.trainable_variables()), strict=True
                )
                if variable.name.startswith(side)
            )
            for side in ("query", "item")
        }
        assert any(gradient is not None for gradient in tf.gradients(loss, layer.variables))
        session.run(v1.global_variables_initializer())
        loss, metrics, own, query, items, batch = session.run((loss, metrics, own, query, items, batch))
    return loss, metrics, own, trained, (query, items, batch), values, config


@pytest.mark.parametrize("objective", ["reconstruction", "distillation", "ranking"])
@pytest.mark.parametrize(
    ("towers", "trained"),
    [
        ("frozen", {"query": False, "item": False}),
        ("query", {"query": True, "item": False}),
        ("both", {"query": True, "item": True}),
    ],
)
def test_losses_with_a_quantizer(objective, towers, trained):
    loss, metrics, own, got, (query, items, batch), values, config = run_quantized(
        objective=objective, towers=towers, weight=3.0
    )
    if objective == "ranking":
        lists, _ = values.encode(items)
        coarse = values.coarse[lists] @ values.rotation.T
        expected = numpy_loss(config, query, values(items), batch) + numpy_loss(config, query, coarse, batch)
    else:
        expected = 3 * own + (0 if towers == "frozen" else numpy_loss(config, query, items, batch))
    assert loss == pytest.approx(expected, rel=1e-4)
    assert got == trained
    assert metrics["quantizer/distortion"] > 0 and all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixing_ratio": 1.0, "num_random_negatives": 0}, "so no negative counts"),
        ({"mixing_ratio": 1.0, "num_random_negatives": 0, "num_own_negatives": 1}, None),
        ({"loss": "softmax", "num_hard_negatives": 8}, "num_hard_negatives is 8, which cannot be combined with loss"),
        ({"log_q_correction": True}, "log_q_correction is on, which cannot be combined with loss hinge"),
        ({"log_q_correction": True, "loss": "softmax"}, None),
    ],
)
def test_values_that_do_not_go_together(values, message):
    problem = TrainConfig(**values).problem()
    assert problem is None if message is None else message in problem


# The presets.


def preset(name):
    """Small, so that a test trains it: the same parts, fewer of each."""
    config = load_config(CONFIGS / f"{name}.yaml")
    model = dataclasses.replace(
        config.model,
        token_dim=6,
        feature_dim=3,
        hidden=(8,) * len(config.model.hidden),
        embedding_dim=5,
        history_length=min(4, config.model.history_length),
        query_history_length=min(3, config.model.query_history_length),
    )
    train = dataclasses.replace(
        config.train,
        batch_size=8,
        num_random_negatives=min(8, config.train.num_random_negatives),
        learning_rate=0.1,
    )
    return Config(model=model, train=train)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("d*.yaml")), ids=lambda path: path.stem)
def test_presets_have_the_papers_values(path):
    config = load_config(path)
    assert config.train.margin == 0.1 and config.train.learning_rate == 0.01 and config.train.batch_size == 64
    assert config.model.embedding_dim == 64


def test_presets_are_the_models_of_table_2():
    dpsr, dpsr_p, dpsr_h, dsr, dssm = (
        load_config(CONFIGS / f"{n}.yaml") for n in ("dpsr", "dpsr_p", "dpsr_h", "dsr", "dssm")
    )
    profile = {"user_features": ("*",)}
    assert dpsr_p == dataclasses.replace(dpsr, model=dataclasses.replace(dpsr.model, **profile))
    history = {"history_length": 50, "query_history_length": 5}
    assert dpsr_h == dataclasses.replace(dpsr_p, model=dataclasses.replace(dpsr_p.model, **history))
    assert not dpsr.model.user_features and not dpsr.model.history_length
    assert dsr.model.num_heads == 1 and dsr.train.loss == "hinge"
    assert dssm.train.loss == "softmax" and dssm.train.num_own_negatives == 4
    assert dssm.train.own_negative_source == "impressions" and dssm.train.num_random_negatives == 0


@pytest.mark.parametrize("name", ["dpsr", "dpsr_p", "dpsr_h", "dsr", "dssm"])
def test_presets_learn_a_batch(name):
    config = preset(name)
    losses, metrics, _, batch = run(config, steps=60)
    assert losses[0] == pytest.approx(numpy_loss(config, *run(config)[2], batch), rel=1e-4)
    assert np.isfinite(losses).all() and losses[-1] < 0.5 * losses[0], losses
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("name", ["dpsr_h", "dssm"])
def test_fused_tables_learn_what_stock_ones_do(name):
    """Every lookup of the towers, repeated rows and several reads of a table among them, against AdagradOptimizer."""
    config = preset(name)
    stock, _, _, _ = run(config, steps=10)
    fused, _, _, _ = run(config, steps=10, table=EmbeddingTable)
    np.testing.assert_allclose(fused, stock, rtol=1e-3)
    assert fused[-1] < 0.9 * fused[0]


def test_dssm_has_no_other_negatives():
    """Without an unclicked item there is nothing to learn, however many items the batch has."""
    config = preset("dssm")
    with tf.Graph().as_default(), v1.Session() as session:
        batch = make_batch(config)
        batch = batch._replace(own_negative_mask=tf.zeros_like(batch.own_negative_mask))
        loss, _ = build_loss(config, batch, TwoTower(config.model, NUM_TOKENS))
        gradients = [tf.convert_to_tensor(g) for g in tf.gradients(loss, v1.trainable_variables())]
        session.run(v1.global_variables_initializer())
        loss, gradients = session.run((loss, gradients))
    assert loss == 0 and not any(gradient.any() for gradient in gradients)
