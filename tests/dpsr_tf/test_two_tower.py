from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import tensorflow as tf
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsr_common.errors import UsageError
from dpsr_common.typed_config import from_dict, to_dict
from dpsr_tf.config import ModelConfig
from dpsr_tf.data.examples_dataset import Features, History, Tokens
from dpsr_tf.models.features import Feature, FeatureSpec, ItemFeatures, QueryFeatures
from dpsr_tf.models.input_layers import segment_softmax
from dpsr_tf.models.two_tower import TwoTower, soft_dot_product

v1 = tf.compat.v1

TEXTS = [[3, 1, 4, 1], [], [5], [9, 2, 6, 5, 3, 5], []]
NUM_IDS = 12


def tokens(texts):
    values = [token for text in texts for token in text]
    splits = np.cumsum([0, *map(len, texts)])
    return Tokens(tf.constant(values, tf.int32), tf.constant(splits, tf.int64))


def run(config, build, seed=1, spec=NUM_IDS, **options):
    """Values of what `build(towers)` makes, and all variables by name, in a graph of TensorFlow 1."""
    with tf.Graph().as_default(), v1.Session() as session:
        v1.set_random_seed(seed)
        fetches = build(TwoTower(config, spec, **options))
        session.run(v1.global_variables_initializer())
        variables = {variable.op.name: variable for variable in v1.global_variables()}
        return session.run((fetches, variables))


def both(texts):
    return lambda towers: (towers.query_embedding(tokens(texts)), towers.item_embedding(tokens(texts)))


# The towers of sections 4.1 and 4.2 in NumPy, float64.


def dense(variables, name, x):
    return x @ variables[f"{name}/kernel"].astype(np.float64) + variables.get(f"{name}/bias", 0.0)


def bags(table, texts):
    return np.stack([table[text].sum(axis=0) if text else np.zeros(table.shape[1]) for text in texts])


def layers(variables, scope, x, texts, hidden):
    for i in range(hidden):
        x = np.maximum(dense(variables, f"{scope}/hidden_{i}", x), 0)
    x = dense(variables, f"{scope}/embedding", x)
    # Where every ReLU of a layer is off nothing is left to normalise.
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)
    return x * np.array([[len(text) > 0] for text in texts])


def numpy_query(variables, texts, hidden, heads=1, parts=()):
    table = variables.get("token_embedding", variables.get("query_token_embedding")).astype(np.float64)
    x = np.concatenate([bags(table, texts), *parts], axis=1)
    outputs = []
    for head in range(heads):
        scope = f"query_tower/head_{head}"
        own = dense(variables, f"{scope}/projection", x) if heads > 1 else x
        outputs.append(layers(variables, scope, own, texts, hidden))
    return np.stack(outputs, axis=1)


def numpy_item_vector(variables, texts, parts=()):
    table = variables.get("token_embedding", variables.get("item_token_embedding")).astype(np.float64)
    return np.concatenate([bags(table, texts), *parts], axis=1)


def numpy_item(variables, texts, hidden, parts=()):
    return layers(variables, "item_tower", numpy_item_vector(variables, texts, parts), texts, hidden)


# Text alone.


@pytest.mark.parametrize("hidden", [(), (16,), (16, 7)])
@pytest.mark.parametrize("heads", [1, 3])
def test_equals_a_numpy_forward_pass(hidden, heads):
    config = ModelConfig(token_dim=6, hidden=hidden, embedding_dim=5, num_heads=heads)
    (query, item), variables = run(config, both(TEXTS))
    assert query.dtype == item.dtype == np.float32 and query.shape == (5, heads, 5) and item.shape == (5, 5)
    np.testing.assert_allclose(query, numpy_query(variables, TEXTS, len(hidden), heads), atol=1e-6)
    np.testing.assert_allclose(item, numpy_item(variables, TEXTS, len(hidden)), atol=1e-6)


@pytest.mark.parametrize("heads", [1, 2])
def test_unit_length_and_zero_for_empty_text(heads):
    config = ModelConfig(token_dim=8, hidden=(16,), embedding_dim=4, num_heads=heads)
    (query, item), _ = run(config, both(TEXTS))
    for vectors in (*np.moveaxis(query, 1, 0), item):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 0, 1, 1, 0], atol=1e-6)
        assert not vectors[[1, 4]].any()


@pytest.mark.parametrize("texts", [[[]], [[], [], []]])
def test_nothing_but_empty_texts(texts):
    (query, item), _ = run(ModelConfig(token_dim=4, embedding_dim=3, num_heads=2), both(texts))
    assert query.shape == (len(texts), 2, 3) and item.shape == (len(texts), 3) and not query.any() and not item.any()


def test_empty_text_is_zero_even_with_biases():
    """Trained biases give an empty text a direction; it must match nothing all the same."""

    def build(towers):
        outputs = both(TEXTS)(towers)
        biases = [v.assign(tf.ones_like(v)) for v in v1.global_variables() if v.op.name.endswith("bias")]
        initialize = v1.global_variables_initializer()
        return outputs, biases, initialize

    with tf.Graph().as_default(), v1.Session() as session:
        outputs, biases, initialize = build(TwoTower(ModelConfig(token_dim=4, hidden=(3,), embedding_dim=3), NUM_IDS))
        session.run(initialize)
        session.run(biases)
        query, item = session.run(outputs)
        for vectors in (query[:, 0], item):
            assert not vectors[[1, 4]].any()
            np.testing.assert_allclose(np.linalg.norm(vectors[[0, 2, 3]], axis=1), 1, atol=1e-6)


def test_one_table_and_two_towers():
    config = ModelConfig(token_dim=6, hidden=(8,), embedding_dim=5)
    _, variables = run(config, both(TEXTS))
    names = ["hidden_0/kernel", "hidden_0/bias", "embedding/kernel", "embedding/bias"]
    expected = {"token_embedding", *(f"{tower}/{n}" for tower in ("query_tower/head_0", "item_tower") for n in names)}
    assert set(variables) == expected, "one table for both, a checkpoint's names"
    assert variables["token_embedding"].shape == (NUM_IDS, 6)
    assert variables["query_tower/head_0/embedding/kernel"].shape == (8, 5)


@pytest.mark.parametrize("embedding_dim", [4, 8, 20])
def test_linear_towers_start_as_one_turn_of_the_text(embedding_dim):
    """So a text begins nearest to itself, and where d is not below token_dim its scores are those of the bags."""
    config = ModelConfig(token_dim=8, embedding_dim=embedding_dim)
    (query, item), variables = run(config, both(TEXTS))
    np.testing.assert_allclose(query[:, 0], item, atol=1e-6)
    kernel = variables["item_tower/embedding/kernel"]
    products = kernel @ kernel.T if embedding_dim >= 8 else kernel.T @ kernel
    np.testing.assert_allclose(products, np.eye(len(products)), atol=1e-5)
    if embedding_dim >= 8:
        texts = bags(variables["token_embedding"], TEXTS)
        texts /= np.maximum(np.linalg.norm(texts, axis=1, keepdims=True), 1e-6)
        np.testing.assert_allclose(item @ item.T, texts @ texts.T, atol=1e-5)


@pytest.mark.parametrize("hidden", [(8,), (16, 7)])
def test_towers_start_alike(hidden):
    (query, item), _ = run(ModelConfig(token_dim=8, hidden=hidden, embedding_dim=6), both(TEXTS))
    np.testing.assert_array_equal(query[:, 0], item)


@pytest.mark.parametrize("heads", [1, 2])
def test_towers_start_apart_where_the_start_is_not_aligned(heads):
    config = ModelConfig(token_dim=8, hidden=(8,), embedding_dim=6, num_heads=heads, aligned_start=False)
    (query, item), variables = run(config, both(TEXTS))
    assert np.abs(query - item[:, None])[[0, 2, 3]].max(axis=(0, 2)).min() > 0.01
    kernels = [value for name, value in variables.items() if name.endswith("hidden_0/kernel")]
    assert len(kernels) == heads + 1
    for one, other in itertools.combinations(kernels, 2):
        assert np.abs(one - other).max() > 0.1


def test_heads_start_near_the_item_tower_and_apart():
    config = ModelConfig(token_dim=64, embedding_dim=64, num_heads=2)
    (query, item), _ = run(config, both(TEXTS))
    cosines = np.einsum("qhd,qd->qh", query, item)[[0, 2, 3]]
    assert cosines.min() > 0.4 and cosines.max() < 0.95
    assert np.abs(query[:, 0] - query[:, 1]).max() > 0.05


def test_the_turn_is_the_same_beside_features():
    config = ModelConfig(token_dim=8, feature_dim=3, embedding_dim=8, item_features=("brand",))
    spec = FeatureSpec(NUM_IDS, item=(Feature("brand", "categorical", 5),))

    def build(towers):
        brands = Features(tf.constant([[1], [2], [0], [4], [3]], tf.int32), ())
        return towers.query_embedding(tokens(TEXTS)), towers.item_embedding(ItemFeatures(tokens(TEXTS), brands))

    _, variables = run(config, build, spec=spec)
    kernel = variables["item_tower/embedding/kernel"]
    assert kernel.shape == (11, 8) and np.abs(kernel[8:]).min() > 0, "features have a say from the start"
    np.testing.assert_array_equal(kernel[:8], variables["query_tower/head_0/embedding/kernel"])


def test_a_table_a_tower_where_they_do_not_share():
    config = ModelConfig(token_dim=6, embedding_dim=5, share_text_table=False)
    (query, item), variables = run(config, both(TEXTS))
    assert {"query_token_embedding", "item_token_embedding"} < set(variables) and "token_embedding" not in variables
    np.testing.assert_allclose(query, numpy_query(variables, TEXTS, 0), atol=1e-6)
    np.testing.assert_allclose(item, numpy_item(variables, TEXTS, 0), atol=1e-6)


def test_each_head_has_projection_and_layers_of_its_own():
    config = ModelConfig(token_dim=6, hidden=(8,), embedding_dim=5, num_heads=3)
    (query, _), variables = run(config, both(TEXTS))
    assert {name.split("/")[1] for name in variables if name.startswith("query")} == {"head_0", "head_1", "head_2"}
    assert variables["query_tower/head_2/projection/kernel"].shape == (6, 6)
    for one in range(3):
        for other in range(one):
            assert np.abs(query[[0, 2, 3], one] - query[[0, 2, 3], other]).max() > 0.01


def test_heads_differ_by_their_projection_at_first():
    config = ModelConfig(token_dim=6, hidden=(8,), embedding_dim=5, num_heads=2)
    _, variables = run(config, both(TEXTS))
    names = [f"query_tower/head_{head}" for head in range(2)]
    for layer in ("hidden_0", "embedding"):
        first, second = (variables[f"{name}/{layer}/kernel"] for name in names)
        np.testing.assert_array_equal(first, second)
        assert np.abs(first).max() > 0.1
    first, second = (variables[f"{name}/projection/kernel"] for name in names)
    assert np.abs(first - second).max() > 0.1
    (other,), _ = run(config, lambda towers: [towers.query_embedding(tokens(TEXTS))], seed=2)
    (one,), _ = run(config, lambda towers: [towers.query_embedding(tokens(TEXTS))], seed=1)
    assert np.abs(one - other).max() > 0.01, "the seed decides all the same"


def test_later_calls_share_the_variables():
    config = ModelConfig(token_dim=6, hidden=(8,), embedding_dim=5)

    def build(towers):
        return [towers.query_embedding(tokens(TEXTS)) for _ in range(2)], towers.query_embedding(tokens(TEXTS[3:4]))

    ((first, second), alone), variables = run(config, build)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(alone[0], first[3], atol=1e-6, err_msg="a text's vector does not depend on its batch")
    assert len(variables) == 5


def test_order_of_tokens_does_not_matter():
    (query, _), _ = run(ModelConfig(token_dim=6, embedding_dim=5), both([[1, 2, 3], [3, 2, 1], [1, 2, 2, 3]]))
    np.testing.assert_allclose(query[0], query[1], atol=1e-6)
    assert np.abs(query[0] - query[2]).max() > 1e-3, "a token that stands twice counts twice"


def test_seed_decides_the_initial_weights():
    config = ModelConfig(token_dim=6, embedding_dim=5)
    (one, _), variables = run(config, both(TEXTS), seed=1)
    (again, _), _ = run(config, both(TEXTS), seed=1)
    (other, _), _ = run(config, both(TEXTS), seed=2)
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.01
    table = variables["token_embedding"]
    assert np.abs(table).max() <= 6**-0.5 and np.abs(table).max() > 0.5 * 6**-0.5, "uniform within 1 / sqrt(width)"


@pytest.mark.parametrize("hidden", [(), (16,)])
def test_gradients_reach_the_table_and_both_towers(hidden):
    def build(towers):
        query, item = both(TEXTS)(towers)
        loss = tf.reduce_sum(tf.matmul(query[:, 0], item, transpose_b=True))
        variables = v1.trainable_variables()
        gradients = tf.gradients(loss, variables)
        return {v.op.name: tf.convert_to_tensor(g) for v, g in zip(variables, gradients, strict=True)}

    gradients, variables = run(ModelConfig(token_dim=6, hidden=hidden, embedding_dim=5), build)
    assert set(gradients) == set(variables)
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-6, name
    used = sorted({token for text in TEXTS for token in text})
    moved = np.flatnonzero(np.abs(gradients["token_embedding"]).max(axis=1) > 0)
    np.testing.assert_array_equal(moved, used)


def test_gradient_of_an_empty_text_is_zero():
    def build(towers):
        query = towers.query_embedding(tokens([[]]))
        return [tf.convert_to_tensor(g) for g in tf.gradients(tf.reduce_sum(query), v1.trainable_variables())]

    gradients, _ = run(ModelConfig(token_dim=4, hidden=(3,), embedding_dim=3), build)
    assert len(gradients) == 5 and not any(gradient.any() for gradient in gradients)


def test_gradient_of_the_table_equals_finite_differences():
    config = ModelConfig(token_dim=3, hidden=(16,), embedding_dim=3)
    goal = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)

    def build(towers):
        loss = tf.reduce_sum(towers.query_embedding(tokens(TEXTS))[:, 0] * goal)
        return tf.convert_to_tensor(tf.gradients(loss, towers.tables["token_embedding"].variables)[0])

    gradient, variables = run(config, build)

    def loss(table):
        return (numpy_query(variables | {"token_embedding": table}, TEXTS, 1)[:, 0] * goal).sum()

    table, step = variables["token_embedding"].astype(np.float64), 1e-6
    for index in np.ndindex(table.shape):
        up, down = table.copy(), table.copy()
        up[index] += step
        down[index] -= step
        assert gradient[index] == pytest.approx((loss(up) - loss(down)) / (2 * step), abs=2e-4)


# Features.

SPEC = FeatureSpec(
    NUM_IDS,
    user=(Feature("age", "number", 4), Feature("likes", "multi", 6), Feature("gender", "categorical", 3)),
    item=(
        Feature("tags", "multi", 5),
        Feature("brand", "categorical", 7),
        Feature("blurb", "text", NUM_IDS),
        Feature("price", "number", 3),
        Feature("origin", "text", 8, "places"),
    ),
)
PERSONAL = ModelConfig(
    token_dim=6,
    feature_dim=3,
    hidden=(16,),
    embedding_dim=5,
    num_heads=2,
    history_length=4,
    query_history_length=3,
)
USER = {"codes": [[1, 2], [0, 0], [3, 1], [2, 0], [1, 1]], "likes": [[5, 1], [], [1], [2, 2], []]}
ITEM = {
    "codes": [[6, 2], [1, 0], [0, 1], [3, 1], [0, 0]],
    "tags": [[1, 4], [2], [], [], [3]],
    "blurb": [[1, 2], [], [11], [3, 3], [4]],
    "origin": [[7], [], [0, 1], [2], []],
}
# Users 1 and 4 have no history. The items are those of ITEM, by row.
EVENTS, EVENT_TYPES_OF, PAST_QUERIES = (
    [[3, 0], [], [2], [4, 1, 0], []],
    [2, 3, 2, 4, 2, 2],
    [[[3, 1]], [], [[2], []], [[5], [1, 1], [9]], []],
)


def flat(lists):
    return [value for values in lists for value in values]


def splits_of(lists):
    return tf.constant(np.cumsum([0, *map(len, lists)]), tf.int64)


def item_features(rows=range(5), texts=TEXTS):
    pick = lambda values: [values[row] for row in rows]  # noqa: E731
    lists = tuple(tokens(pick(ITEM[name])) for name in ("tags", "blurb", "origin"))
    codes = tf.constant(pick(ITEM["codes"]), tf.int32, [len(rows), 2])
    return ItemFeatures(tokens(pick(texts)), Features(codes, lists))


def query_features(user=USER, events=EVENTS, types=EVENT_TYPES_OF, past=PAST_QUERIES):
    items = item_features(flat(events))
    history = History(
        items=tokens(events),
        types=tf.constant(types, tf.int32, [len(types)]),
        text=items.text,
        features=items.features,
        query_splits=splits_of(past),
        query=tokens(flat(past)),
    )
    return QueryFeatures(tokens(TEXTS), Features(tf.constant(user["codes"]), (tokens(user["likes"]),)), history)


def numpy_features(variables, side, texts_table):
    """The parts of the input layer, in the order in which a tower puts them together."""
    table = variables[f"{side}_feature_embedding"].astype(np.float64)
    if side == "user":
        first = {"age": 0, "likes": 4, "gender": 10}
        fixed = [("age", 0), ("gender", 1)]
        codes, lists = USER["codes"], [bags(table[first["likes"] :], USER["likes"])]
    else:
        first = {"tags": 0, "brand": 5, "price": 12}
        fixed = [("brand", 0), ("price", 1)]
        places = variables["token_embedding_places"].astype(np.float64)
        codes, lists = (
            ITEM["codes"],
            [bags(table, ITEM["tags"]), bags(texts_table, ITEM["blurb"]), bags(places, ITEM["origin"])],
        )
    columns = [
        np.stack([table[first[name] + row[column]] if row[column] else np.zeros(3) for row in codes])
        for name, column in fixed
    ]
    return [*columns, *lists]


def pooled(variables, scope, query, events, pooling):
    """Attention on the query, example by example; `events` holds an array [h, width] an example."""
    rows = []
    for one, vectors in zip(query, events, strict=True):
        weights = np.ones(len(vectors))
        if pooling == "attention" and len(vectors):
            logits = dense(variables, f"{scope}/key", vectors) @ dense(variables, f"{scope}/query", one) / np.sqrt(6)
            weights = np.exp(logits) / np.exp(logits).sum()
        rows.append(weights @ vectors)
    return np.stack(rows)


def numpy_personal(variables, pooling, hidden=1):
    table = variables["token_embedding"].astype(np.float64)
    item_vectors = numpy_item_vector(variables, TEXTS, numpy_features(variables, "item", table))
    type_vectors = variables["query_tower/history/type/kernel"].astype(np.float64)
    query, types = bags(table, TEXTS), iter(EVENT_TYPES_OF)
    width = item_vectors.shape[1]
    events = [
        np.array([item_vectors[row] + type_vectors[next(types)] for row in rows]).reshape(-1, width) for rows in EVENTS
    ]
    past = [bags(table, texts) if texts else np.zeros((0, 6)) for texts in PAST_QUERIES]
    parts = [
        *numpy_features(variables, "user", table),
        pooled(variables, "query_tower/history", query, events, pooling),
        pooled(variables, "query_tower/query_history", query, past, pooling),
    ]
    item = numpy_item(variables, TEXTS, hidden, numpy_features(variables, "item", table))
    return numpy_query(variables, TEXTS, hidden, 2, parts), item


def personal(towers):
    return towers.query_embedding(query_features()), towers.item_embedding(item_features())


@pytest.mark.parametrize("pooling", ["attention", "sum"])
def test_features_and_history_equal_a_numpy_forward_pass(pooling):
    config = dataclasses.replace(PERSONAL, history_pooling=pooling)
    (query, item), variables = run(config, personal, spec=SPEC)
    expected_query, expected_item = numpy_personal(variables, pooling)
    np.testing.assert_allclose(query, expected_query, atol=2e-6)
    np.testing.assert_allclose(item, expected_item, atol=2e-6)
    # brand, price and tags; age, gender and likes: one table a side.
    assert variables["item_feature_embedding"].shape == (15, 3)
    assert variables["user_feature_embedding"].shape == (13, 3)


def test_gradients_of_a_personal_model_equal_finite_differences():
    config = dataclasses.replace(PERSONAL, hidden=())
    goals = [np.random.default_rng(i).normal(size=shape) for i, shape in enumerate([(5, 2, 5), (5, 5)])]

    def build(towers):
        loss = sum(tf.reduce_sum(x * g.astype(np.float32)) for x, g in zip(personal(towers), goals, strict=True))
        variables = v1.trainable_variables()
        gradients = tf.gradients(loss, variables)
        return {v.op.name: tf.convert_to_tensor(g) for v, g in zip(variables, gradients, strict=True)}

    gradients, variables = run(config, build, spec=SPEC)
    variables = {name: value.astype(np.float64) for name, value in variables.items()}
    assert set(gradients) == set(variables)

    def loss(changed):
        query, item = numpy_personal(changed, "attention", hidden=0)
        return (query * goals[0]).sum() + (item * goals[1]).sum()

    rng, step = np.random.default_rng(0), 1e-6
    for name, value in variables.items():
        places = list(np.ndindex(value.shape))
        for place in [places[i] for i in rng.choice(len(places), min(12, len(places)), replace=False)]:
            ends = []
            for sign in (1, -1):
                moved = value.copy()
                moved[place] += sign * step
                ends.append(loss(variables | {name: moved}))
            assert gradients[name][place] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=2e-4, rel=1e-3), name


def test_an_anonymous_user_is_the_query_alone():
    """Code 0, no list and no history add nothing, whatever the tables hold: two anonymous users are one."""
    nobody = {"codes": [[0, 0]] * 5, "likes": [[]] * 5}
    none = [[]] * 5

    def build(towers):
        return (
            towers.query_embedding(query_features(nobody, none, [], none)),
            towers.query_embedding(query_features()),
        )

    (anonymous, known), variables = run(PERSONAL, build, spec=SPEC)
    widths = [3, 3, 3, numpy_item_vector(variables, TEXTS).shape[1] + 2 * 3 + 3 + 6 + 6, 6]
    parts = [np.zeros((5, width)) for width in widths]
    np.testing.assert_allclose(anonymous, numpy_query(variables, TEXTS, 1, 2, parts), atol=2e-6)
    difference = np.abs(anonymous - known).max(axis=(1, 2))
    assert (difference[[0, 2, 3]] > 1e-3).all(), "a user with a profile gets another vector"
    assert not known[1].any(), "no text finds nothing, whoever asks"


def test_a_history_item_is_the_item_towers_input():
    def build(towers):
        return towers.item_vector(item_features()), towers.item_vector(item_features([3, 0]))

    (all_items, some), variables = run(PERSONAL, build, spec=SPEC)
    np.testing.assert_allclose(some, all_items[[3, 0]], atol=1e-6, err_msg="a function of the item alone")
    table = variables["token_embedding"].astype(np.float64)
    expected = numpy_item_vector(variables, TEXTS, numpy_features(variables, "item", table))
    np.testing.assert_allclose(all_items, expected, atol=1e-6)


def test_order_and_length_of_other_histories_do_not_matter():
    def build(towers):
        forward = query_features()
        turned = query_features(
            events=[[0, 3], [], [2], [0, 1, 4], []],
            types=[3, 2, 2, 2, 2, 4],
            past=[[[3, 1]], [], [[2], []], [[9], [1, 1], [5]], []],
        )
        return towers.query_embedding(forward), towers.query_embedding(turned)

    (forward, turned), _ = run(PERSONAL, build, spec=SPEC)
    np.testing.assert_allclose(forward, turned, atol=2e-6)


@pytest.mark.parametrize(
    ("config", "query", "message"),
    [
        (PERSONAL, QueryFeatures(tokens(TEXTS)), "user features"),
        (dataclasses.replace(PERSONAL, history_length=0), query_features()._replace(history=None), "history"),
    ],
)
def test_what_the_config_asks_for_must_be_given(config, query, message):
    with pytest.raises(ValueError, match=f"asks for {message}"):
        TwoTower(config, SPEC).query_embedding(query)


# The choice of features.

FEATURES = {
    "items": [
        {"name": "brand", "kind": "categorical", "num_values": 6},
        {"name": "price", "kind": "number", "num_values": 2, "boundaries": [1.0]},
        {"name": "blurb", "kind": "text", "vocabulary": None},
        {"name": "origin", "kind": "text", "vocabulary": "places"},
    ],
    "users": [{"name": "age", "kind": "number", "num_values": 3, "boundaries": [20, 40]}],
}
VOCABULARIES = {None: NUM_IDS, "places": 8}


def test_features_of_a_store_in_the_order_of_the_config():
    config = ModelConfig(item_features=("origin", "brand"))
    spec = FeatureSpec.choose(config, FEATURES, VOCABULARIES)
    assert spec == FeatureSpec(
        NUM_IDS, (), (Feature("origin", "text", 8, "places"), Feature("brand", "categorical", 7))
    )
    every = FeatureSpec.choose(ModelConfig(item_features=("*",), user_features=("*",)), FEATURES, VOCABULARIES)
    assert [f.name for f in every.item] == ["brand", "price", "blurb", "origin"] and every.item[2].num_ids == NUM_IDS
    assert every.user == (Feature("age", "number", 4),)
    assert FeatureSpec.choose(ModelConfig(user_features=("*",)), {"users": []}, VOCABULARIES).user == ()


def test_a_spec_survives_its_file():
    spec = FeatureSpec.choose(ModelConfig(item_features=("*",)), FEATURES, VOCABULARIES)
    assert from_dict(FeatureSpec, yaml.safe_load(yaml.safe_dump(to_dict(spec))), "model") == spec


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(item_features=("brand", "colour")), "item_features names 'colour'.*brand, price, blurb, origin"),
        (ModelConfig(item_features=("brand", "brand")), "'brand' twice"),
        (ModelConfig(item_features=("*", "brand")), "names '\\*'"),
    ],
)
def test_features_that_cannot_be(config, message):
    with pytest.raises(UsageError, match=message):
        FeatureSpec.choose(config, FEATURES, VOCABULARIES)


# Scores.


def numpy_soft_dot(inner, temperature):
    """Equation 1 as it stands, in float64: [b, m, n] to [b, n]."""
    if temperature == 0:
        return inner.max(axis=1)
    weights = np.exp((inner - inner.max(axis=1, keepdims=True)) / temperature)
    return (weights / weights.sum(axis=1, keepdims=True) * inner).sum(axis=1)


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 5),
    temperature=st.sampled_from([0.0, 1e-8, 1e-5, 0.01, 0.1, 1.0, 1000.0]),
    seed=st.integers(0, 2**16),
)
def test_soft_dot_product_and_its_gradient(heads, temperature, seed):
    rng = np.random.default_rng(seed)
    inner, upstream = rng.uniform(-1, 1, (3, heads, 4)), rng.normal(size=(3, 4))
    x = tf.constant(inner)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = soft_dot_product(tf.unstack(x, axis=1), temperature)
    score, gradient = value.numpy(), tape.gradient(value, x, tf.constant(upstream)).numpy()
    np.testing.assert_allclose(score, numpy_soft_dot(inner, temperature), atol=1e-7)
    assert (score <= inner.max(axis=1) + 1e-12).all() and (score >= inner.min(axis=1) - 1e-12).all()
    assert np.isfinite(gradient).all()
    # Each score is a function of its own inner products; a shift of all of them by c shifts it by c.
    np.testing.assert_allclose(gradient.sum(axis=1), upstream, atol=1e-6)
    if temperature in (0.0, 0.01, 0.1, 1.0, 1000.0):
        step = 1e-6
        for head in range(heads):
            moved = [inner.copy() for _ in range(2)]
            moved[0][:, head] += step
            moved[1][:, head] -= step
            slope = (numpy_soft_dot(moved[0], temperature) - numpy_soft_dot(moved[1], temperature)) / (2 * step)
            gaps = np.sort(inner, axis=1)
            smooth = np.ones((3, 4), bool) if temperature or heads == 1 else gaps[:, -1] - gaps[:, -2] > 1e-4
            np.testing.assert_allclose(gradient[:, head][smooth], (upstream * slope)[smooth], atol=1e-5)


def test_soft_dot_product_limits():
    inner = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4)).astype(np.float32)
    heads = tf.unstack(inner, axis=1)
    np.testing.assert_allclose(soft_dot_product(heads, 1e6), inner.mean(axis=1), atol=1e-5, err_msg="uniform weights")
    for temperature in (0.0, 1e-30, 1e-7, 1e-5):
        np.testing.assert_allclose(soft_dot_product(heads, temperature), inner.max(axis=1), atol=1e-4)
    np.testing.assert_array_equal(soft_dot_product(heads[:1], 0.3), inner[:, 0], err_msg="one head: the product")
    large = soft_dot_product([tf.constant([1e30]), tf.constant([-1e30])], 1e-3)
    np.testing.assert_allclose(large, [1e30], err_msg="no overflow")


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_matrix_own_and_pair_scores_are_one_score(heads, temperature):
    towers = TwoTower(ModelConfig(embedding_dim=5, num_heads=heads, temperature=temperature), NUM_IDS)
    rng = np.random.default_rng(heads)
    query, items = rng.normal(size=(4, heads, 5)).astype(np.float32), rng.normal(size=(4, 5)).astype(np.float32)
    expected = numpy_soft_dot(np.einsum("bmd,nd->bmn", query, items).astype(np.float64), temperature)
    np.testing.assert_allclose(towers.scores(query, items), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(towers.pair_scores(query, items), np.diag(expected), rtol=1e-4, atol=1e-5)
    own = np.broadcast_to(items, (4, 4, 5))
    np.testing.assert_allclose(towers.own_scores(query, own), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=5), seed=st.integers(0, 2**16))
def test_segment_softmax_is_a_softmax_of_each_segment(lengths, seed):
    logits = np.random.default_rng(seed).normal(scale=50, size=sum(lengths))
    splits = np.cumsum([0, *lengths])
    weights = segment_softmax(tf.constant(logits), tf.constant(splits, tf.int64)).numpy()
    for begin, end in itertools.pairwise(splits):
        part = logits[begin:end]
        expected = np.exp(part - part.max()) if len(part) else part
        np.testing.assert_allclose(weights[begin:end], expected / expected.sum() if len(part) else part, atol=1e-12)
