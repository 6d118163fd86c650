"""Text encoders of a user's own: `model.encoder`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from dpsr_common.errors import CommandError, UsageError
from dpsr_tf.config import Config, ModelConfig, TrainConfig
from dpsr_tf.data.examples_dataset import Tokens
from dpsr_tf.models.encoders import exact_search
from dpsr_tf.models.features import ItemFeatures
from dpsr_tf.models.input_layers import stock_table
from dpsr_tf.models.text_encoder import EncoderInput, load_encoder
from dpsr_tf.models.two_tower import TwoTower
from dpsr_tf.training.train import train

v1 = tf.compat.v1

TEXTS = [[3, 1, 4, 1], [], [5], [9, 2, 6, 5, 3, 5], []]
NUM_IDS = 12


def tokens(texts):
    """Texts of any number, as in a batch."""
    values, splits = [token for text in texts for token in text], np.cumsum([0, *map(len, texts)])
    parts = tf.constant(values, tf.int32), tf.constant(splits, tf.int64)
    return Tokens(*(v1.placeholder_with_default(part, [None]) for part in parts))


def config_of(encoder, **options):
    return ModelConfig(**{"token_dim": 6, "embedding_dim": 5, "encoder": f"own_encoders:{encoder}", **options})


def run(build):
    with tf.Graph().as_default(), v1.Session() as session:
        v1.set_random_seed(1)
        fetches = build()
        session.run(v1.global_variables_initializer())
        return session.run((fetches, {variable.op.name: variable for variable in v1.global_variables()}))


def names_of(config, *calls):
    """Names and shapes of the variables of a graph with these towers, in which each is called."""
    with tf.Graph().as_default():
        towers = TwoTower(config, NUM_IDS)
        for call in calls:
            getattr(towers, call)(tokens(TEXTS))
        return {variable.op.name: tuple(variable.shape) for variable in v1.global_variables()}


# What an encoder gets.


@pytest.mark.parametrize("texts", [TEXTS, [[]], [], [[7]]])
@pytest.mark.parametrize("max_tokens", [None, 2])
def test_embeddings_are_padded_in_order(texts, max_tokens):
    def build():
        table = stock_table("table", NUM_IDS, 3)
        return EncoderInput(tokens(texts), table, "query").embeddings(max_tokens)

    (embeddings, mask), variables = run(build)
    kept = [text[:max_tokens] for text in texts]
    longest = max([1, *map(len, kept)])
    expected = np.zeros((len(texts), longest, 3), np.float32)
    for i, text in enumerate(kept):
        expected[i, : len(text)] = variables["table"][text]
    np.testing.assert_array_equal(embeddings, expected)
    assert mask.tolist() == [[j < len(text) for j in range(longest)] for text in kept]


def test_gradients_reach_the_table():
    """The gradient of a weighted sum over places is the weight of each place, added up for a token."""

    def build():
        table = stock_table("table", NUM_IDS, 1)
        embeddings, _ = EncoderInput(tokens([[3, 1, 3], [1]]), table, "query").embeddings()
        loss = tf.reduce_sum(embeddings[:, :, 0] * tf.constant([[1.0, 10.0, 100.0], [1000.0, 5.0, 5.0]]))
        return tf.convert_to_tensor(tf.gradients(loss, table.variables)[0])

    gradient, _ = run(build)
    expected = np.zeros((NUM_IDS, 1))
    expected[[3, 1], 0] = [101, 1010]
    np.testing.assert_array_equal(gradient, expected)


# What its vectors become.


def test_a_tower_reads_what_the_encoder_returns():
    config = config_of("Mean", aligned_start=False)
    item, variables = run(lambda: TwoTower(config, NUM_IDS).item_embedding(tokens(TEXTS)))
    means = [variables["token_embedding"][text].mean(axis=0) if text else np.zeros(6) for text in TEXTS]
    x = np.tanh(means @ variables["text_encoder/kernel"]) @ variables["item_tower/embedding/kernel"]
    expected = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)
    np.testing.assert_allclose(item, expected, atol=1e-6)


def test_order_counts_for_a_recurrent_layer_and_an_empty_text_is_zero():
    texts = [[1, 2, 3], [3, 2, 1], [], [1, 2, 3]]

    def build():
        return TwoTower(config_of("Gru"), NUM_IDS).query_embedding(tokens(texts))[:, 0]

    query, variables = run(build)
    np.testing.assert_allclose(query[0], query[3], atol=1e-6)
    assert np.abs(query[0] - query[1]).max() > 1e-4 and not query[2].any()
    assert variables["query_tower/head_0/embedding/kernel"].shape == (6 + 3, 5)


def test_only_the_training_graph_is_one_of_training():
    def build():
        with v1.variable_scope("", reuse=v1.AUTO_REUSE):
            items = [TwoTower(config_of("training_only"), NUM_IDS, training=t) for t in (False, True)]
            return [towers.item_vector(ItemFeatures(tokens(TEXTS))) for towers in items]

    (plain, training), _ = run(build)
    np.testing.assert_allclose(training, 3 * plain, rtol=1e-6)


def test_cut_texts():
    item, _ = run(lambda: TwoTower(config_of("first_tokens"), NUM_IDS).item_embedding(tokens([[1, 2, 3], [2, 1]])))
    np.testing.assert_allclose(item[0], item[1], atol=1e-6)


@pytest.mark.parametrize("encoder", ["Mean", "Convolution", "TwoLayers", "Steps"])
@pytest.mark.parametrize("heads", [1, 2])
def test_variables_have_the_same_names_whichever_tower_comes_first(encoder, heads):
    """A checkpoint of training fits the graph of one tower, which index and evaluation make."""
    config = config_of(encoder, num_heads=heads)
    one = names_of(config, "query_embedding", "item_embedding")
    other = names_of(config, "item_embedding", "query_embedding", "item_embedding")
    assert one == other
    assert names_of(config, "item_embedding").items() <= one.items()
    assert any(name.startswith("text_encoder/") for name in one)


def test_an_encoder_of_fewer_numbers_than_a_token():
    """The aligned start has fewer inputs than usual to turn."""
    config = config_of("Mean", token_dim=16, embedding_dim=4)
    (query, item), _ = run(
        lambda: [f(tokens(TEXTS)) for t in [TwoTower(config, NUM_IDS)] for f in (t.query_embedding, t.item_embedding)]
    )
    np.testing.assert_allclose(query[:, 0], item, atol=1e-6)


# Wrong encoders.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_encoders", "model.encoder is 'own_encoders', expected package.module:function"),
        ("a/b:c", "expected package.module:function"),
        ("no_package_of_this_name.x:f", "cannot be imported: ModuleNotFoundError: .*PYTHONPATH"),
        ("own_encoders:absent", "own_encoders has no such name, expected a function"),
        ("own_encoders:NOT_A_FUNCTION", "own_encoders has a int of that name, expected a function"),
    ],
)
def test_a_name_that_leads_nowhere(name, message):
    with pytest.raises(UsageError, match=message):
        load_encoder(name)


def test_a_module_with_an_error_is_shown_with_its_line(tmp_path, monkeypatch):
    (tmp_path / "broken_encoder.py").write_text("x = 1\nprint(1 / 0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"ZeroDivisionError: division by zero \(.*broken_encoder.py:2\)"):
        load_encoder("broken_encoder:f")


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("no_function", "returned None, expected a function of an EncoderInput"),
        ("nothing", r"returned None for query text, expected a tensor float32 \[texts, width\]"),
        ("of_rank_3", r"returned float32 \(None, None, 6\) for query text"),
        ("python", r"calls Python \(text_encoder/PyFunc, PyFunc\)"),
    ],
)
def test_an_encoder_that_returns_something_else(encoder, message):
    with tf.Graph().as_default(), pytest.raises(UsageError, match=message):
        TwoTower(config_of(encoder), NUM_IDS)


def test_as_many_vectors_as_texts():
    with pytest.raises(tf.errors.InvalidArgumentError, match="number of vectors, and number of texts, for item text"):
        run(lambda: TwoTower(config_of("for_each_token"), NUM_IDS).item_embedding(tokens(TEXTS)))


# Training with one.


def training_config(encoder, **options):
    train_options = {"steps": 12, "batch_size": 8, "num_random_negatives": 8, "learning_rate": 0.1, **options}
    return Config(model=config_of(encoder, token_dim=4), train=TrainConfig(checkpoint_steps=6, **train_options))


def weights(path):
    checkpoint = tf.train.latest_checkpoint(str(path))
    return {name: tf.train.load_variable(checkpoint, name) for name, _ in tf.train.list_variables(checkpoint)}


def assert_resumes(store, config, path, kernel):
    """Six steps and six more give the bits of twelve, and train the variable `kernel`."""
    train(store, config, path / "whole")
    half = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=6))
    train(store, half, path / "resumed")
    before = weights(path / "resumed")[kernel]
    train(store, config, path / "resumed")
    whole, resumed = weights(path / "whole"), weights(path / "resumed")
    assert set(whole) == set(resumed) and f"{kernel}/ExponentialMovingAverage" in whole
    assert np.abs(whole[kernel] - before).max() > 1e-3
    for name in whole:
        np.testing.assert_array_equal(whole[name], resumed[name], err_msg=name)
    exact_search(path / "whole", store)  # reads the averages


@pytest.mark.long
def test_a_convolution_is_trained_and_resumed(click_store, tmp_path):
    config = training_config("Convolution", average_decay=0.9)
    assert_resumes(click_store, config, tmp_path, "text_encoder/conv1d/kernel")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    "batch_size",
    [pytest.param(8, id="one thread"), pytest.param(150, id="several threads")],
)
def test_a_recurrent_layer_is_trained_and_resumed(click_store, tmp_path, batch_size):
    config = training_config("Gru", average_decay=0.9, batch_size=batch_size)
    assert_resumes(click_store, config, tmp_path, "text_encoder/gru/gru_cell/recurrent_kernel")


def test_averages_beside_a_variable_that_is_not_trained(click_store, tmp_path):
    train(click_store, training_config("Steps", average_decay=0.9), tmp_path / "model")
    assert "text_encoder/scale/ExponentialMovingAverage" not in weights(tmp_path / "model")
    exact_search(tmp_path / "model", click_store)


def test_a_wrong_name_leaves_no_model(click_store, tmp_path):
    with pytest.raises(UsageError, match="has no such name"):
        train(click_store, training_config("absent"), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_code_that_changed_after_training_is_named(click_store, tmp_path, monkeypatch):
    import own_encoders

    train(click_store, training_config("Convolution"), tmp_path / "model")
    monkeypatch.setattr(own_encoders, "Convolution", own_encoders.Mean)
    with pytest.raises(CommandError, match="does not fit the config or the code of own_encoders:Convolution"):
        exact_search(tmp_path / "model", click_store)
