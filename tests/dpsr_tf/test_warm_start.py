"""`dpsr train --warm_start`: what a new model takes over from an old one, row by row."""

from __future__ import annotations

import copy
import dataclasses
import re

import numpy as np
import pytest
import tensorflow as tf
from conftest import Shop

from dpsr_common import command_line
from dpsr_tf.config import Config, ModelConfig, TrainConfig, save_config
from dpsr_tf.data.code_book import CodeBook
from dpsr_tf.data.store import Store
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.training.train import train
from dpsr_tf.training.warm_start import WarmStart

BRAND, COLOR = {"column": "brand"}, {"column": "color", "kind": "categorical"}
PRICE = {"column": "price", "kind": "number", "boundaries": [10, 20]}
BLURB = {"column": "blurb", "kind": "text", "vocabulary": "blurbs"}
CONFIG = Config(
    model=ModelConfig(
        token_dim=6,
        feature_dim=3,
        hidden=(5,),
        embedding_dim=4,
        item_features=("brand", "color", "price", "blurb"),
        user_features=("gender",),
    ),
    train=TrainConfig(steps=20, batch_size=4, learning_rate=0.1, initial_accumulator=0.01),
)


def with_train(**options):
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **options))


def weights(path, step=None):
    """Every variable of a checkpoint, the optimizer's too."""
    checkpoint = tf.train.latest_checkpoint(str(path)) if step is None else str(path / f"model.ckpt-{step}")
    return {name: tf.train.load_variable(checkpoint, name) for name, _ in tf.train.list_variables(checkpoint)}


def tokens(model, name=None):
    """Row of each token in the table of a vocabulary, and the rows of its buckets."""
    from dpsr_tokenizer import Vocabulary

    vocabulary = Vocabulary(str(CodeBook.read(model.path).vocabulary(name)))
    rows = {vocabulary.token(row): row for row in range(len(vocabulary))}
    return rows, list(range(len(vocabulary), vocabulary.num_ids))


def values(model, side, features):
    """Row of each (feature, value) in the table of a side."""
    book, rows, first = CodeBook.read(model.path), {}, 0
    for feature in features:
        if feature.kind != "text":
            texts = book.values(side, feature.name) or [str(code) for code in range(1, feature.num_ids)]
            rows |= {(feature.name, text): first + 1 + i for i, text in enumerate(texts)}
            rows[feature.name, None] = first
            first += feature.num_ids
    return rows


@pytest.fixture(scope="module")
def two_days(tmp_path_factory):
    """The stores of two days. The second has more tokens, brands and colours, and its features in another order.

    They must not be changed.
    """
    shop = Shop(tmp_path_factory.mktemp("two_days"))

    def ingest(path, features, users):
        shop.schema["items"] |= {"text": "title", "features": features}
        shop.schema["users"]["features"] = users
        shop.schema["vocabularies"] = {"blurbs": {"vocabulary": {"num_oov_buckets": 4}}}
        shop.path = path
        assert command_line.main([*shop.write().flags(path / "store")]) == 0
        return Store(path / "store")

    for i, item in enumerate(shop.items):
        item |= {"price": 5.0 * i, "blurb": f"blurb {item['brand']} {i}"}
    everything = copy.deepcopy(shop.items), copy.deepcopy(shop.log)
    root = shop.path
    shop.items = [item for item in shop.items if item["item_id"] not in (10, 50)]
    shop.log = [row for row in shop.log if row["item_id"] not in (10, 50)]
    one = ingest(root / "one", [BRAND, COLOR, PRICE, BLURB], ["gender", "age"])
    shop.items, shop.log = everything
    two = ingest(root / "two", [COLOR, BLURB, PRICE, BRAND], ["age", "gender"])
    return one, two


@pytest.fixture(scope="module")
def old(two_days, tmp_path_factory):
    """A model of the first day; it must not be changed."""
    return train(two_days[0], CONFIG, tmp_path_factory.mktemp("old") / "model")


def test_rows_are_matched_by_their_text(two_days, old, tmp_path, capfd):
    _, two = two_days
    plain = train(two, with_train(steps=1), tmp_path / "plain")
    for sums in ("keep", "reset"):
        capfd.readouterr()
        out = tmp_path / sums
        new = train(two, with_train(steps=1), out, warm_start=WarmStart.open(old.path, CONFIG, sums))
        line = re.search(r"warm start from .*", capfd.readouterr().out)[0]
        before, start, usual = weights(old.path), weights(out, 0), weights(plain.path, 0)
        assert set(start) == set(usual)
        sources = {}
        for vocabulary in (None, "blurbs"):
            (was, buckets), (now, new_buckets) = tokens(old, vocabulary), tokens(new, vocabulary)
            assert was.keys() < now.keys()
            table = "token_embedding" + (f"_{vocabulary}" if vocabulary else "")
            sources[table] = {row: was.get(token, -1) for token, row in now.items()}
            sources[table] |= dict(zip(new_buckets, buckets, strict=True))
        for side, table in (("item", "items"), ("user", "users")):
            was = values(old, table, getattr(old.features, side))
            now = values(new, table, getattr(new.features, side))
            assert (was.keys() <= now.keys() and list(was.values()) != [now[key] for key in was]) or side == "user"
            sources[f"{side}_feature_embedding"] = {row: was.get(key, -1) for key, row in now.items()}
        for table, rows in sources.items():
            assert (sorted(rows) == list(range(len(start[table]))) and -1 in rows.values()) or table.startswith("user")
            for suffix in ("", "/Adagrad"):
                for row, source in rows.items():
                    is_old = source >= 0 and (not suffix or sums == "keep")
                    expected = before[table + suffix][source] if is_old else usual[table + suffix][row]
                    np.testing.assert_array_equal(start[table + suffix][row], expected, err_msg=f"{table} {row}")
        for name in start.keys() - {"global_step"}:
            if name.removesuffix("/Adagrad") not in sources:
                is_old = not name.endswith("/Adagrad") or sums == "keep"
                np.testing.assert_array_equal(start[name], (before if is_old else usual)[name], err_msg=name)
        assert start["global_step"] == 0
        known = sum(
            source >= 0 for t in ("token_embedding", "token_embedding_blurbs") for source in sources[t].values()
        )
        known -= 16 + 4  # buckets
        every = sum(len(tokens(new, vocabulary)[0]) for vocabulary in (None, "blurbs"))
        layers = sum("tower" in name and "Adagrad" not in name for name in start)
        assert f"{known} of {every} tokens" in line and f"{layers} of {layers} weights of layers" in line, line
        assert ("sums of the optimizer kept" in line) == (sums == "keep")


def test_a_warm_start_is_read_once(two_days, old, tmp_path, capfd):
    """A resumed training continues with its own checkpoint, and says so."""
    _, two = two_days
    warm = WarmStart.open(old.path, CONFIG, "keep")
    new = train(two, with_train(steps=3), tmp_path / "new", warm_start=warm)
    first = weights(new.path)
    capfd.readouterr()
    train(two, with_train(steps=3), tmp_path / "new", warm_start=warm)
    printed = capfd.readouterr().out
    assert "resumes at step 3; --warm_start" in printed and "warm start from" not in printed
    for name, value in weights(new.path).items():
        np.testing.assert_array_equal(value, first[name], err_msg=name)


@pytest.mark.parametrize("decay", [pytest.param(0.0, marks=pytest.mark.long), 0.9])
def test_it_begins_with_the_averages_that_the_old_model_serves(two_days, tmp_path, decay):
    one, two = two_days
    old = train(one, with_train(average_decay=0.9), tmp_path / "old")
    config = with_train(average_decay=decay, steps=1)
    new = train(two, config, tmp_path / "new", warm_start=WarmStart.open(old.path, config, "keep"))
    before, start = weights(old.path), weights(new.path, 0)
    name = "item_tower/hidden_0/kernel"
    average = before[f"{name}/ExponentialMovingAverage"]
    assert np.abs(average - before[name]).max() > 1e-4
    np.testing.assert_array_equal(start[name], average)
    (was, _), (now, _) = tokens(old), tokens(new)
    shared = [(was[token], now[token]) for token in was]
    assert len(shared) > 10
    for table in ["token_embedding"] + (["token_embedding/ExponentialMovingAverage"] if decay else []):
        for row, place in shared:
            np.testing.assert_array_equal(
                start[table][place], before["token_embedding/ExponentialMovingAverage"][row], err_msg=table
            )


def test_state_of_another_optimizer(two_days, tmp_path):
    """All of Adam's state comes along, its scalars too."""
    one, two = two_days
    old = train(one, with_train(dense_optimizer="adam"), tmp_path / "old")
    config = with_train(dense_optimizer="adam", steps=1)
    for sums in ("keep", "reset"):
        train(two, config, tmp_path / sums, warm_start=WarmStart.open(old.path, config, sums))
    before, kept, reset = weights(old.path), weights(tmp_path / "keep", 0), weights(tmp_path / "reset", 0)
    states = [name for name in before if name.endswith("/Adam") or name.startswith("beta")]
    assert len(states) > 4 and "beta1_power" in states
    for name in states:
        np.testing.assert_array_equal(kept[name], before[name], err_msg=name)
        assert not np.array_equal(reset[name], before[name]) or not before[name].any(), name


def test_other_layers_and_features_start_as_usual(two_days, old, tmp_path, capfd):
    """Reordered features move the rows of a kernel, so it is not taken, although its shape is equal."""
    _, two = two_days
    model = dataclasses.replace(CONFIG.model, item_features=("price", "blurb", "color", "brand"), embedding_dim=7)
    config = dataclasses.replace(with_train(steps=1), model=model)
    new = train(two, config, tmp_path / "new", warm_start=WarmStart.open(old.path, config, "keep"))
    printed = capfd.readouterr().out
    before, start = weights(old.path), weights(new.path, 0)
    assert start["item_tower/hidden_0/kernel"].shape == before["item_tower/hidden_0/kernel"].shape
    assert not np.array_equal(start["item_tower/hidden_0/kernel"], before["item_tower/hidden_0/kernel"])
    np.testing.assert_array_equal(
        start["query_tower/head_0/hidden_0/kernel"], before["query_tower/head_0/hidden_0/kernel"]
    )
    taken, total = map(int, re.search(r"(\d+) of (\d+) weights of layers", printed).groups())
    assert 0 < taken < total


def test_pieces_of_tables_on_parameter_servers(two_days, old, tmp_path):
    """With tables in pieces of rows, the same rows begin with the same weights."""
    from dpsr_tf.config import ClusterConfig
    from dpsr_tf.training.estimator import model_fn

    _, two = two_days
    warm = WarmStart.open(old.path, CONFIG, "keep")
    whole = train(two, with_train(steps=1), tmp_path / "whole", warm_start=warm)
    config = dataclasses.replace(CONFIG, cluster=ClusterConfig(placement="rows"))
    from dpsr_tf.data.examples_dataset import examples_dataset, training_input
    from dpsr_tf.training.train import batch_options

    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.compat.v1.set_random_seed(1)
        tf.compat.v1.train.get_or_create_global_step()
        dataset = training_input(examples_dataset(two, batch_options(config, whole.features)))
        features, labels = tf.compat.v1.data.make_one_shot_iterator(dataset).get_next(), None
        params = {"config": config, "features": whole.features, "num_ps": 3, "item_shares": None}
        params["warm_start"] = lambda towers: warm.init_fn(whole, towers)
        features = features[0] if isinstance(features, tuple) else features
        spec = model_fn(features, labels, tf.estimator.ModeKeys.TRAIN, params)
        session.run(tf.compat.v1.global_variables_initializer())
        spec.scaffold.init_fn(session)
        spec.scaffold.saver.save(session, str(tmp_path / "rows"), 0, latest_filename="rows")
    pieces, start = str(tmp_path / "rows-0"), weights(whole.path, 0)
    (was, _), (now, _) = tokens(old), tokens(whole)
    for name in ("token_embedding", "token_embedding/Adagrad"):
        found = tf.train.load_variable(pieces, name)
        rows = [now[token] for token in was]
        np.testing.assert_array_equal(found[rows], start[name][rows], err_msg=name)


def test_the_command(two_days, old, tmp_path, capfd):
    _, two = two_days
    save_config(with_train(steps=2), tmp_path / "config.yaml")
    flags = ["train", f"--store={two.path}", f"--config={tmp_path / 'config.yaml'}", f"--out={tmp_path / 'new'}"]
    assert command_line.main([*flags, f"--warm_start={old.path}"]) == 0
    assert f"warm start from {old.path}/model.ckpt-20: " in capfd.readouterr().out
    ModelDirectory.open(tmp_path / "new")
    # With another width, without a model, and with the model that --overwrite would remove.
    for more, status, message in (
        ([f"--warm_start={old.path}", "--set=model.token_dim=8"], 2, "the model has model.token_dim 6, and the config"),
        ([f"--warm_start={tmp_path / 'nowhere'}"], 1, "holds no model"),
        ([f"--warm_start={tmp_path / 'new'}", "--overwrite"], 2, "--overwrite removes this model"),
    ):
        assert command_line.main([*flags, *more]) == status
        assert message in capfd.readouterr().err
    assert Store(two.path) and ModelDirectory.open(tmp_path / "new")
