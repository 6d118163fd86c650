from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from checkpoints import assert_same_weights, weights, with_train
from store_builder import queries_of

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.files import locked
from dpsr_tf.config import (
    ClusterConfig,
    Config,
    ModelConfig,
    ServingConfig,
    TrainConfig,
    ValidationConfig,
    load_config,
    save_config,
)
from dpsr_tf.data.examples_dataset import Tokens, examples_dataset, training_input
from dpsr_tf.models.embedding import TABLE_VARIABLES, weights_saver
from dpsr_tf.models.encoders import exact_search
from dpsr_tf.models.model_directory import ModelDirectory, feature_spec
from dpsr_tf.models.two_tower import TwoTower
from dpsr_tf.training.cluster import Cluster
from dpsr_tf.training.estimator import FiniteWeights, loss_problem, model_fn
from dpsr_tf.training.train import batch_options, config_from_flags, train
from dpsr_tf.training.validation import is_over

v1 = tf.compat.v1

CONFIG = Config(
    model=ModelConfig(token_dim=16, hidden=(24,), embedding_dim=12),
    train=TrainConfig(
        steps=30,
        batch_size=8,
        num_random_negatives=8,
        num_title_queries=2,
        pretrain_steps=15,
        title_typo_rate=0.2,
        query_typo_rate=0.2,
        learning_rate=0.1,
        average_decay=0.9,
        checkpoint_steps=10,
    ),
)


def losses(path):
    """Loss by step, from the event files."""
    found = {}
    for file in sorted(path.glob("events.*")):
        for event in v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                if value.tag == "loss":
                    found[event.step] = value.simple_value
    return found


def scores(model, store):
    """Inner products [queries, items] of everything in the store."""
    search, ids = exact_search(model.path, store), store.items()["id"]
    queries = list(store.queries())
    return search.score(queries, None, np.tile(ids, (len(queries), 1)))


# Learning.


@pytest.mark.slow
def test_loss_falls_and_relevant_items_rank_first(click_store, tmp_path):
    config = with_train(CONFIG, steps=400, checkpoint_steps=100, num_title_queries=0, pretrain_steps=0)
    model = train(click_store, config, tmp_path / "model")
    found = losses(tmp_path / "model")
    first, last = found[min(found)], found[max(found)]
    assert len(found) >= 4 and last < 0.5 * first, found

    (log,), all_scores = click_store.interactions(), scores(model, click_store)
    relevant = np.zeros(all_scores.shape, bool)
    relevant[queries_of(log), log["positive.item"]] = True
    better = [(row[wanted][:, None] > row[~wanted]).mean() for row, wanted in zip(all_scores, relevant, strict=True)]
    assert np.mean(better) > 0.95, "chance is 0.5"


@pytest.mark.slow
def test_hardly_any_learning_at_a_tiny_learning_rate(click_store, tmp_path):
    """The counterpart: what the test above measures is learnt, not given."""
    model = train(click_store, with_train(CONFIG, steps=50, learning_rate=1e-8), tmp_path / "model")
    (log,), all_scores = click_store.interactions(), scores(model, click_store)
    positive = all_scores[queries_of(log), log["positive.item"]].mean()
    assert abs(positive - all_scores.mean()) < 0.3


def graph_of(store, config, num_ps=0, change=lambda batch: batch, item_shares=None):
    """The training graph of model_fn in the default graph; features and EstimatorSpec."""
    spec = feature_spec(config, store)
    dataset = training_input(examples_dataset(store, batch_options(config, spec)))
    features = v1.data.make_one_shot_iterator(dataset).get_next()
    features = {"batch": change(features["batch"])}
    v1.train.get_or_create_global_step()
    params = {"config": config, "features": spec, "num_ps": num_ps, "item_shares": item_shares}
    return features["batch"], model_fn(features, None, tf.estimator.ModeKeys.TRAIN, params)


def test_one_step_of_the_graph_is_algorithm_1(click_store):
    """Loss of the model_fn against NumPy on the same batch, with weights, mask and mixing as the paper has them."""
    config = with_train(CONFIG, num_supervised_negatives=3, mixing_ratio=0.3, pretrain_steps=0)
    with tf.Graph().as_default(), v1.Session() as session:
        batch, spec = graph_of(click_store, config)
        with v1.variable_scope(v1.get_variable_scope(), reuse=True):
            towers = TwoTower(config.model, click_store.vocabulary.num_ids)
        embeddings = towers.query_embedding(batch.query)[:, 0], towers.item_embedding(batch.item)
        session.run(v1.global_variables_initializer())
        loss, batch, (query, item) = session.run((spec.loss, batch, embeddings))
        assert session.run(v1.train.get_global_step()) == 0
        session.run(spec.train_op)
        assert session.run(v1.train.get_global_step()) == 1
    b = config.train.batch_size
    expected = 0.0
    for i in range(b):
        in_batch = [j for j in range(b) if batch.negative_mask[i, j]]
        random = [j for j in range(b, len(item)) if batch.negative_mask[i, j]]
        violation = np.maximum(0, config.train.margin - query[i] @ item[i] + query[i] @ item.T)
        mean = 0.7 * violation[in_batch].mean() + 0.3 * violation[random].mean()
        expected += batch.weights[i] * (len(in_batch) + len(random)) * mean / b
    assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adagrad", "adam", "momentum"])
def test_a_step_without_a_number_changes_nothing(click_store, optimizer):
    """Not one variable; and the error knows step and rows of the batch."""

    def spoil(batch):
        weight = tf.cond(v1.train.get_or_create_global_step() < 2, lambda: 1.0, lambda: np.nan)
        return batch._replace(weights=batch.weights * weight)

    with tf.Graph().as_default(), v1.Session() as session:
        config = with_train(CONFIG, dense_optimizer=optimizer, schedule="cosine", warmup_steps=2)
        batch, spec = graph_of(click_store, config, change=spoil)
        session.run(v1.global_variables_initializer())
        # Averages follow every tenth step.
        variables = [v for v in v1.global_variables() if "ExponentialMovingAverage" not in v.name]
        before = session.run(variables)
        session.run(spec.train_op)
        session.run(spec.train_op)
        after = session.run(variables)
        assert all((one != other).any() for one, other in zip(before, after, strict=True)), "a sound step changes all"
        with pytest.raises(tf.errors.InvalidArgumentError) as caught:
            session.run(spec.train_op)
        for one, other in zip(after, session.run(variables), strict=True):
            np.testing.assert_array_equal(one, other)
    with tf.Graph().as_default(), v1.Session() as session:
        batch, _ = graph_of(click_store, CONFIG)
        rows = [session.run((batch.query_rows, batch.item_rows, batch.user_rows)) for _ in range(3)][2]
    message = loss_problem(caught.value)
    assert message.startswith("the loss became NaN or infinite at step 2, in a batch of query_rows [")
    found = re.search(r"query_rows \[(.*)\], item_rows \[(.*)\], user_rows \[(.*)\]$", message)
    for text, row in zip(found.groups(), rows, strict=True):
        assert [int(number) for number in text.split()] == row.tolist()


@pytest.mark.parametrize("placement", ["whole", "rows"])
def test_moving_average_of_the_weights(click_store, tmp_path, placement):
    """Against NumPy; what evaluation and export restore is the average."""
    config = dataclasses.replace(with_train(CONFIG, average_decay=0.95), cluster=ClusterConfig(placement=placement))
    names = ["token_embedding", "item_tower/embedding/kernel"]
    with tf.Graph().as_default(), v1.Session() as session:
        _, spec = graph_of(click_store, config, num_ps=2)
        session.run(v1.global_variables_initializer())
        saver = spec.scaffold.saver
        values = []
        for step in range(31):
            if step % 10 == 0:
                saver.save(session, str(tmp_path / "ckpt"), step, latest_filename="ckpt")
                values.append({name: tf.train.load_variable(str(tmp_path / f"ckpt-{step}"), name) for name in names})
            session.run(spec.train_op)
    with tf.Graph().as_default(), v1.Session() as session:
        TwoTower(config.model, click_store.vocabulary.num_ids).item_embedding(
            Tokens(tf.zeros([0], tf.int32), tf.zeros([1], tf.int64))
        )
        weights_saver(is_average=True).restore(session, str(tmp_path / "ckpt-30"))
        restored = {variable.op.name: session.run(variable) for variable in v1.trainable_variables()}
    for name in names:
        expected = values[0][name]
        for i, value in enumerate(values[1:], start=1):
            decay = min(0.95**10, (1 + i) / (10 + i))
            expected = decay * expected + (1 - decay) * value[name]
        np.testing.assert_allclose(restored[name], expected, rtol=1e-4, atol=1e-6)
        assert np.abs(restored[name] - values[-1][name]).max() > 1e-3


def test_the_graph_does_not_hold_how_often_items_are_drawn(click_store):
    """A graph may have 2 GiB, so 500 million items would not fit. The training steps look the shares up by row."""
    config = with_train(CONFIG, loss="softmax", log_q_correction=True, num_random_negatives=0, num_title_queries=0)
    shares = np.random.default_rng(1).random(500_000).astype(np.float32)
    shares /= shares[: click_store.counts.items].sum()
    with tf.Graph().as_default() as graph, v1.Session() as session:
        batch, spec = graph_of(click_store, config, item_shares=shares)
        assert graph.as_graph_def().ByteSize() < shares.nbytes / 2
        (drawn,) = [op.outputs[0] for op in graph.get_operations() if op.type == "PyFunc"]
        session.run(v1.global_variables_initializer())
        found, rows, loss = session.run((drawn, batch.item_rows, spec.loss))
        np.testing.assert_array_equal(found, shares[rows])
        assert np.isfinite(loss)


def test_where_adagrad_starts(click_store):
    with tf.Graph().as_default(), v1.Session() as session:
        graph_of(click_store, with_train(CONFIG, initial_accumulator=0.25, average_decay=0.0))
        session.run(v1.global_variables_initializer())
        tables = {variable.op.name for variable in v1.get_collection(TABLE_VARIABLES)}
        names = {variable.op.name for variable in v1.trainable_variables()}
        assert tables < names
        by_name = {variable.op.name: variable for variable in v1.global_variables()}
        for name, values in session.run({name: by_name[f"{name}/Adagrad"] for name in names}).items():
            assert (values == np.float32(0.25 if name in tables else 0.1)).all(), name


def test_another_error_is_not_taken_for_a_loss_without_a_number():
    assert loss_problem(tf.errors.InvalidArgumentError(None, None, "ids out of range")) is None


def test_weights_without_a_number_are_not_saved(click_store):
    with tf.Graph().as_default(), v1.Session() as session:
        graph_of(click_store, CONFIG)
        listener = FiniteWeights()
        listener.begin()
        session.run(v1.global_variables_initializer())
        listener.before_save(session, 7)
        table = next(variable for variable in v1.global_variables() if variable.op.name == "token_embedding")
        session.run(table[3, 2].assign(np.inf))
        with pytest.raises(CommandError, match="weights became NaN or infinite at step 8 and are not saved"):
            listener.before_save(session, 8)


@pytest.mark.parametrize(("placement", "pieces"), [("whole", 1), ("rows", 3)])
@pytest.mark.parametrize("half", [False, True])
def test_where_a_model_lies_in_a_cluster(click_store, placement, pieces, half):
    config = dataclasses.replace(CONFIG, cluster=ClusterConfig(placement=placement, half_on_wire=half))
    place = v1.train.replica_device_setter(ps_tasks=3, worker_device="/job:worker/task:0")
    with tf.Graph().as_default() as graph, v1.device(place):
        graph_of(click_store, config, num_ps=3)
        table = [v for v in v1.global_variables() if re.fullmatch(r"token_embedding(/part_\d)?", v.op.name)]
        assert len(table) == pieces and sum(v.shape[0] for v in table) == click_store.vocabulary.num_ids
        assert len({variable.device for variable in table}) == pieces, "a piece each"
        halves = [op for op in graph.get_operations() if op.type == "Cast" and op.get_attr("DstT") == tf.float16]
        assert bool(halves) == half
        assert all("/job:ps" in op.device for op in halves), "before they travel"
    with tf.Graph().as_default():
        graph_of(click_store, config)
        names = [variable.op.name for variable in v1.global_variables()]
        assert "token_embedding" in names, "one process has one piece"


@pytest.mark.parametrize("mode", [tf.estimator.ModeKeys.PREDICT, tf.estimator.ModeKeys.EVAL])
def test_model_fn_trains_only(mode):
    with pytest.raises(ValueError, match=f"mode is '{mode}', expected 'train'"):
        model_fn({}, None, mode, {"config": CONFIG})


# Seeds and resuming.


@pytest.fixture(scope="module")
def uninterrupted(click_store, tmp_path_factory):
    """A model of CONFIG, trained in one go; it must not be changed."""
    return train(click_store, CONFIG, tmp_path_factory.mktemp("uninterrupted") / "model")


@pytest.mark.slow
def test_what_a_model_directory_holds(click_store, uninterrupted):
    assert load_config(uninterrupted.path / "config.yaml") == CONFIG == uninterrupted.config
    assert uninterrupted.vocabulary.fingerprint == click_store.vocabulary.fingerprint
    variables = weights(uninterrupted.path)
    assert variables["global_step"] == 30
    assert variables["token_embedding"].shape == (click_store.vocabulary.num_ids, 16)
    checkpoints = {path.name for path in uninterrupted.path.glob("*.index")}
    assert {"model.ckpt-10.index", "model.ckpt-20.index", "model.ckpt-30.index"} >= checkpoints
    assert not [path.name for path in uninterrupted.path.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.long
@pytest.mark.slow
def test_same_seed_same_weights_another_seed_others(click_store, uninterrupted, tmp_path):
    again = train(click_store, CONFIG, tmp_path / "again")
    assert_same_weights(weights(again.path), weights(uninterrupted.path))
    # Hardly moved by two steps at this rate: these are the initial weights.
    initial = [
        weights(
            train(click_store, with_train(CONFIG, seed=seed, steps=2, learning_rate=1e-8), tmp_path / str(seed)).path
        )
        for seed in (1, 2)
    ]
    assert np.abs(initial[0]["token_embedding"] - initial[1]["token_embedding"]).max() > 0.01


@pytest.mark.long
@pytest.mark.slow
def test_a_longer_training_equals_an_uninterrupted_one(click_store, uninterrupted, tmp_path, capfd):
    """13 steps, then up to 30: weights, optimizer state and position in the log go on where they were."""
    path = tmp_path / "model"
    train(click_store, with_train(CONFIG, steps=13), path)
    assert weights(path)["global_step"] == 13
    capfd.readouterr()
    train(click_store, CONFIG, path)
    assert "step 30" in capfd.readouterr().out
    assert_same_weights(weights(path), weights(uninterrupted.path))
    assert load_config(path / "config.yaml").train.steps == 30


@pytest.mark.slow
def test_nothing_to_do_changes_nothing(click_store, uninterrupted, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(uninterrupted.path, path)
    (path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-30"\n')
    before = weights(path)
    train(click_store, CONFIG, path)
    train(click_store, with_train(CONFIG, steps=5), path)
    assert_same_weights(weights(path), before)


@pytest.mark.slow
def test_a_model_directory_may_be_moved(click_store, uninterrupted, tmp_path):
    train(click_store, with_train(CONFIG, steps=13), tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    train(click_store, CONFIG, tmp_path / "there")
    assert_same_weights(weights(tmp_path / "there"), weights(uninterrupted.path))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_resumes(click_store, uninterrupted, tmp_path, number):
    path = tmp_path / "model"
    save_config(with_train(CONFIG, steps=1_000_000), tmp_path / "config.yaml")
    command = [
        sys.executable,
        "-m",
        "dpsr_common.command_line",
        "train",
        f"--store={click_store.path}",
        f"--out={path}",
    ]
    with open(tmp_path / "log", "w+b") as log:
        process = subprocess.Popen([*command, f"--config={tmp_path / 'config.yaml'}"], stdout=log, stderr=log)
        try:
            while not (path / "model.ckpt-10.index").exists():
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.01)
        finally:
            process.send_signal(number)
            process.wait()
    killed_at = int(weights(path)["global_step"])
    assert killed_at % 10 == 0
    if number == signal.SIGINT:
        assert process.returncode == 130
        last = (tmp_path / "log").read_text().splitlines()[-1]
        assert last.startswith(f"model {path}: interrupted; its last checkpoint is of step {killed_at:,}, where")
    steps = killed_at + 15
    train(click_store, with_train(CONFIG, steps=steps), path)
    reference = train(click_store, with_train(CONFIG, steps=steps), tmp_path / "reference")
    assert_same_weights(weights(path), weights(reference.path))


# What a model directory refuses.


def begin(store, path, config=CONFIG):
    """A model directory as training makes it, without the training."""
    return ModelDirectory.create_or_resume(path, config, store)


def test_an_untrained_directory_opens_again(click_store, tmp_path):
    for model in (begin(click_store, tmp_path / "model"), begin(click_store, tmp_path / "model")):
        assert (model.path, model.config) == (tmp_path / "model", CONFIG)
        assert model.vocabulary_path.read_bytes() == click_store.vocabulary_path.read_bytes()
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "codes",
        "config.yaml",
        "features.json",
        "vocabulary.dpsr",
    ]
    assert ModelDirectory.open(str(tmp_path / "model")).config == CONFIG


def test_another_config_is_refused_and_named(click_store, tmp_path):
    begin(click_store, tmp_path / "model")
    config = dataclasses.replace(
        with_train(CONFIG, margin=0.2, steps=99), model=ModelConfig(token_dim=8, embedding_dim=12)
    )
    with pytest.raises(CommandError) as caught:
        begin(click_store, tmp_path / "model", config)
    text = str(caught.value)
    assert f"{tmp_path / 'model'}: holds a model of another config: " in text
    assert "model.token_dim was 16 and is 8" in text and "train.margin was 0.1 and is 0.2" in text
    assert "model.hidden was [24] and is []" in text
    assert "embedding_dim" not in text and "steps" not in text, "what is equal or free is not named"
    assert load_config(tmp_path / "model" / "config.yaml") == CONFIG, "a refusal changes nothing"


def test_steps_checkpoints_and_serving_may_change(click_store, tmp_path):
    begin(click_store, tmp_path / "model")
    config = dataclasses.replace(with_train(CONFIG, steps=7, checkpoint_steps=3), serving=ServingConfig(k=5))
    assert begin(click_store, tmp_path / "model", config).config == config
    assert load_config(tmp_path / "model" / "config.yaml") == config


def test_another_vocabulary_is_refused(click_store, store, tmp_path):
    begin(click_store, tmp_path / "model")
    with pytest.raises(CommandError, match=f"model: holds a model of another vocabulary than that of {store.path}"):
        begin(store, tmp_path / "model")
    assert ModelDirectory.open(tmp_path / "model").vocabulary.fingerprint == click_store.vocabulary.fingerprint


def test_no_model(tmp_path):
    with pytest.raises(CommandError, match=r"none: holds no model \(no config\.yaml\); make one with `dpsr train`"):
        ModelDirectory.open(tmp_path / "none")


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_vocabulary(click_store, tmp_path, damage):
    path = begin(click_store, tmp_path / "model").vocabulary_path
    data = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(data[:-1])
    with pytest.raises(CommandError, match=f"{path}.*train the model again"):
        ModelDirectory.open(tmp_path / "model")


def test_damaged_config(click_store, tmp_path):
    begin(click_store, tmp_path / "model")
    (tmp_path / "model" / "config.yaml").write_text("train: {steps: many}")
    with pytest.raises(CommandError, match=r"config\.yaml: train: steps is 'many'"):
        ModelDirectory.open(tmp_path / "model")


def test_out_is_a_file(click_store, tmp_path):
    (tmp_path / "model").touch()
    with pytest.raises(CommandError, match=f"{tmp_path / 'model'}: "):
        begin(click_store, tmp_path / "model")


# The command.


def test_config_from_flags(tmp_path):
    (tmp_path / "config.yaml").write_text("train: {steps: 5, margin: 0.3}\n")
    config = config_from_flags(
        str(tmp_path / "config.yaml"),
        ["train.steps=7", "train.learning_rate=1e-3", "model.hidden=[8, 4]", "index.factory=IVF4,Flat"],
    )
    assert config.train == TrainConfig(steps=7, margin=0.3, learning_rate=0.001)
    assert config.model.hidden == (8, 4) and config.index.factory == "IVF4,Flat"
    assert config_from_flags(None, []) == Config()
    assert config_from_flags(None, ["train.steps=1", "train.steps=2"]).train.steps == 2, "the last one counts"
    assert config_from_flags(None, ["index.parameters=nprobe=4"]).index.parameters == "nprobe=4"
    (tmp_path / "empty.yaml").write_text("train:\n")
    assert config_from_flags(str(tmp_path / "empty.yaml"), ["train.steps=2"]).train.steps == 2


@pytest.mark.parametrize(
    ("assignment", "fragments"),
    [
        ("steps=3", ["--set=steps=3: expected section.key=value"]),
        ("train.steps", ["--set=train.steps: expected section.key=value"]),
        ("train=3", ["--set=train=3: expected section.key=value"]),
        ("", ["--set=: expected section.key=value"]),
        ("train.stepz=3", ["unknown key 'stepz'", "did you mean 'steps'?"]),
        ("trian.steps=3", ["unknown key 'trian'", "did you mean 'train'?"]),
        ("train.steps=many", ["train: steps is 'many', expected a whole number"]),
        ("train.steps=", ["train: steps is None, expected a whole number"]),
        ("train.steps=0", ["train: steps is 0, expected 1 or more"]),
        ("train.steps=[", ["--set=train.steps=["]),
        ("train.steps=2024-99-99", ["--set=train.steps=2024-99-99"]),
        ("model.hidden=[8, x]", ["model: hidden is 'x', expected a whole number"]),
    ],
)
def test_set_errors(assignment, fragments):
    with pytest.raises(UsageError) as caught:
        config_from_flags(None, [assignment])
    for fragment in ["--set", *fragments]:
        assert fragment in str(caught.value), str(caught.value)


def test_set_errors_do_not_blame_the_file(tmp_path):
    (tmp_path / "config.yaml").write_text("train: {steps: 5}\n")
    with pytest.raises(UsageError, match="--set") as caught:
        config_from_flags(str(tmp_path / "config.yaml"), ["train.margin=9"])
    assert "margin is 9" in str(caught.value)


def test_set_over_a_file_with_a_bad_section(tmp_path):
    (tmp_path / "config.yaml").write_text("train: 5\n")
    with pytest.raises(UsageError, match="train: is 5, expected a section"):
        config_from_flags(str(tmp_path / "config.yaml"), ["train.steps=7"])


@pytest.mark.parametrize(
    ("flags", "status", "fragment"),
    [
        (["--out=m"], 2, "--store is missing"),
        (["--store=s"], 2, "--out is missing"),
        (["--store=s", "--out=m", "x"], 2, "unexpected argument 'x'"),
        (["--store=s", "--out=m"], 1, "s: holds no store"),
        (["--store=s", "--out=m", "--config=none.yaml"], 2, "none.yaml: no such file"),
        (["--store=s", "--out=m", "--set=train.steps=0"], 2, "steps is 0, expected 1 or more"),
    ],
)
def test_usage_errors(dpsr, tmp_path, monkeypatch, flags, status, fragment):
    monkeypatch.chdir(tmp_path)
    dpsr("train", *flags).fails(status, fragment)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_trains(dpsr, click_store, uninterrupted, tmp_path):
    save_config(CONFIG, tmp_path / "config.yaml")
    flags = ["train", f"--store={click_store.path}", f"--config={tmp_path / 'config.yaml'}", f"--out={tmp_path / 'm'}"]
    outcome = dpsr(*flags, "--set=train.steps=13").succeeds()
    assert f"model {tmp_path / 'm'}: step 13, {click_store.vocabulary.num_ids:,} token embeddings" in outcome.out
    dpsr(*flags).succeeds()
    assert_same_weights(weights(tmp_path / "m"), weights(uninterrupted.path))
    dpsr(*flags, "--set=train.margin=0.2").fails(1, "train.margin was 0.1 and is 0.2", "choose another --out")


@pytest.mark.slow
def test_overwrite_begins_anew(dpsr, click_store, uninterrupted, tmp_path):
    path = tmp_path / "m"
    shutil.copytree(uninterrupted.path, path)
    flags = ["train", f"--store={click_store.path}", f"--out={path}", "--overwrite", "--set=train.margin=0.2"]
    dpsr(*flags, "--set=train.steps=3").succeeds()
    assert weights(path)["global_step"] == 3 and load_config(path / "config.yaml").train.margin == 0.2
    assert not list(path.glob("model.ckpt-30*"))


def test_overwrite_removes_nothing_but_a_model(dpsr, click_store, tmp_path):
    (tmp_path / "thesis").mkdir()
    for path in (tmp_path / "thesis" / "chapter1.tex", tmp_path / "file"):
        path.write_text("years of work")
    flags = ["train", f"--store={click_store.path}", "--overwrite", "--set=train.steps=1"]
    dpsr(*flags, f"--out={tmp_path / 'file'}").fails(1, f"{tmp_path / 'file'}: ")
    dpsr(*flags, f"--out={tmp_path / 'thesis'}")
    for path in (tmp_path / "thesis" / "chapter1.tex", tmp_path / "file"):
        assert path.read_text() == "years of work"


@pytest.mark.slow
def test_overwrite_keeps_the_old_model_if_the_new_one_cannot_begin(dpsr, click_store, uninterrupted, tmp_path, tree):
    shutil.copytree(uninterrupted.path, tmp_path / "m")
    before = tree(tmp_path / "m")
    flags = ["train", f"--store={click_store.path}", f"--out={tmp_path / 'm'}", "--overwrite"]
    for setting, status, fragment in (
        ("train.num_title_queries=65", 2, "num_title_queries"),
        ("model.item_features=[smell]", 2, "model.item_features names 'smell'"),
        ("model.encoder=no_such_module:make", 2, "no_such_module cannot be imported"),
        ("model.kind=rewriter", 2, "holds no sequences of words"),
        ("validation.queries=5", 1, "holds no held-out interactions"),
    ):
        dpsr(*flags, f"--set={setting}").fails(status, fragment)
        assert tree(tmp_path / "m") == before, setting


@pytest.mark.parametrize(
    ("setting", "fragments"),
    [
        ("num_supervised_negatives=9", ["num_supervised_negatives", "9", "8"]),
        ("num_title_queries=9", ["num_title_queries", "9", "8"]),
    ],
)
def test_settings_that_do_not_go_together(dpsr, click_store, tmp_path, setting, fragments):
    save_config(CONFIG, tmp_path / "config.yaml")
    flags = [f"--store={click_store.path}", f"--config={tmp_path / 'config.yaml'}", f"--out={tmp_path / 'm'}"]
    dpsr("train", *flags, f"--set=train.{setting}").fails(2, *fragments)
    assert not (tmp_path / "m").exists(), "a model directory that can never be trained is not made"


def test_settings_that_leave_no_negatives(dpsr, click_store, tmp_path):
    """Only random negatives, and none of them: the loss would be 0 for ever."""
    flags = [f"--store={click_store.path}", f"--out={tmp_path / 'm'}", "--set=train.steps=1"]
    outcome = dpsr("train", *flags, "--set=train.mixing_ratio=1", "--set=train.num_random_negatives=0")
    outcome.fails(2, "mixing_ratio", "num_random_negatives")


@pytest.mark.slow
def test_a_damaged_store_file_is_named(dpsr, click_store, tmp_path):
    shutil.copytree(click_store.path, tmp_path / "store")
    path = tmp_path / "store" / "interactions.dpsr"
    path.write_bytes(path.read_bytes()[:-1])
    dpsr("train", f"--store={tmp_path / 'store'}", f"--out={tmp_path / 'm'}").fails(1, str(path))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named(dpsr, click_store, uninterrupted, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(uninterrupted.path, path)
    (path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-30"\n')
    for file in path.glob("model.ckpt-30*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    save_config(CONFIG, tmp_path / "config.yaml")
    flags = [f"--store={click_store.path}", f"--config={tmp_path / 'config.yaml'}", f"--out={path}"]
    outcome = dpsr("train", *flags, "--set=train.steps=40")
    assert outcome.status == 1
    assert "model.ckpt-30: the checkpoint cannot be read" in outcome.errors[-1], outcome.errors
    assert "--overwrite" in outcome.errors[-1]


@pytest.mark.slow
def test_a_loss_that_is_not_finite(shop, dpsr, tmp_path):
    """Weights as large as a float holds, and a huge learning rate."""
    for row in shop.log:
        row["weight"] = 1e38
    dpsr(*shop.write().flags(tmp_path / "store")).succeeds()
    save_config(
        with_train(CONFIG, learning_rate=100.0, num_title_queries=0, pretrain_steps=0), tmp_path / "config.yaml"
    )
    flags = [f"--store={tmp_path / 'store'}", f"--config={tmp_path / 'config.yaml'}", f"--out={tmp_path / 'm'}"]
    outcome = dpsr("train", *flags)
    outcome.fails(1, "the loss became NaN or infinite at step", "query_rows [", "item_rows [", "user_rows [")
    for fragment in ("the last checkpoint, of step 0, is sound", "train.learning_rate", "now 100", "--out"):
        assert fragment in outcome.errors[0]
    assert all(np.isfinite(value).all() for value in weights(tmp_path / "m").values())
    assert not [path.name for path in (tmp_path / "m").iterdir() if "tmp" in path.name or "temp" in path.name]


# Validation.


def with_validation(config=CONFIG, **options):
    return dataclasses.replace(config, validation=ValidationConfig(**{"queries": 100, "recall_at": 5} | options))


def lines_of(path):
    return [json.loads(line) for line in (path / "validation.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def validated(held_out_store, tmp_path_factory):
    """The path of a model of CONFIG that was measured during its training; it must not be changed."""
    return train(held_out_store, with_validation(), tmp_path_factory.mktemp("validated") / "model").path


@pytest.fixture(scope="module")
def not_validated(held_out_store, tmp_path_factory):
    """The path of the same model without a measurement; it must not be changed."""
    return train(held_out_store, CONFIG, tmp_path_factory.mktemp("not_validated") / "model").path


@pytest.mark.slow
def test_validation_measures_every_checkpoint_and_keeps_the_best(held_out_store, validated, tmp_path):
    path = validated
    lines = lines_of(path)
    assert [line["step"] for line in lines] == [10, 20, 30]
    best = max(lines, key=lambda line: line["recall@5"])
    assert json.loads((path / "best" / "measured.json").read_text()) == best

    # By hand: recall of the held-out queries of the validation fold, among all items.
    def recall(directory):
        file, items = held_out_store.held_out(), held_out_store.items()["id"]
        pairs: dict[tuple[int, int], set[int]] = {}
        texts = list(held_out_store.queries())
        for query, user, item in zip(file["query"], file["user"], file["item"], strict=True):
            if hashlib.blake2b(texts[query].encode(), digest_size=1).digest()[0] % 2 == 0:
                pairs.setdefault((query, user), set()).add(items[item])
        assert 0 < len(pairs) < len(set(zip(file["query"], file["user"], strict=True)))
        ids, _ = exact_search(directory, held_out_store)([texts[query] for query, _ in pairs], None, 5)
        return np.mean([len(set(row) & found) / len(found) for row, found in zip(ids, pairs.values(), strict=True)])

    assert recall(path / "best") == pytest.approx(best["recall@5"], abs=1e-6)
    assert recall(path) == pytest.approx(lines[-1]["recall@5"], abs=1e-6)
    figures = {}
    for file in (path / "validation").iterdir():
        for event in v1.train.summary_iterator(str(file)):
            figures.update((event.step, value.simple_value) for value in event.summary.value)
    assert figures == {line["step"]: pytest.approx(line["recall@5"], abs=1e-6) for line in lines}
    assert not list(path.glob(".*")), "nothing is left lying about"
    # The best one is a model like any other, and can be trained further.
    assert weights(path / "best")["global_step"] == best["step"]
    shutil.copytree(path / "best", tmp_path / "on")
    train(held_out_store, with_train(CONFIG, steps=35), tmp_path / "on")
    assert weights(tmp_path / "on")["global_step"] == 35


@pytest.mark.slow
def test_evaluation_warns_of_the_fold_that_training_looked_at(held_out_store, validated, not_validated, tmp_path, dpsr):
    systems = [f"model:{validated}", f"model:{validated / 'best'}", f"model:{not_validated}"]
    fused = f"rrf(bm25,{systems[0]})"
    flags = ["evaluate", f"--store={held_out_store.path}", "--held_out", "--k=5", "--bootstrap=0"]
    flags += [f"--system={name}" for name in (*systems, fused)]
    for fold, warned in (("validation", True), ("all", True), ("test", False)):
        out = tmp_path / "figures.json"
        outcome = dpsr(*flags, f"--fold={fold}", f"--json={out}").succeeds()
        notes = json.loads(out.read_text())["notes"]
        for name in (systems[0], systems[1], fused):
            assert any("measure it with --fold=test" in note for note in notes[name]) == warned, (fold, name)
        assert not any("--fold" in note for note in notes[systems[2]]), "it had no validation"
        assert (f"{systems[1]}: warning: its training looked at" in outcome.out) == warned


@pytest.mark.slow
def test_validation_changes_no_weight(validated, not_validated):
    assert_same_weights(weights(validated), weights(not_validated))


@pytest.mark.slow
def test_validation_goes_on_with_its_training(held_out_store, tmp_path):
    """Every second checkpoint and the last, whether the training is stopped in between or not."""
    path = tmp_path / "m"
    train(held_out_store, with_validation(with_train(CONFIG, steps=20), every=2), path)
    assert [line["step"] for line in lines_of(path)] == [20]
    (path / "best").rename(path / ".best.previous")  # killed while the best one was replaced
    train(held_out_store, with_validation(with_train(CONFIG, steps=50), every=2), path)
    assert [line["step"] for line in lines_of(path)] == [20, 40, 50]
    assert (path / "best" / "measured.json").exists()
    train(held_out_store, with_validation(with_train(CONFIG, steps=50), every=2), path)
    assert [line["step"] for line in lines_of(path)] == [20, 40, 50], "nothing is measured twice"


@pytest.mark.slow
def test_training_stops_when_it_gets_no_better(held_out_store, tmp_path, capfd):
    config = with_validation(with_train(CONFIG, steps=1000, learning_rate=1e-8), patience=2)
    path = tmp_path / "m"
    train(held_out_store, config, path)
    assert [line["step"] for line in lines_of(path)] == [10, 20, 30]
    assert weights(path)["global_step"] == 30 and weights(path / "best")["global_step"] == 10
    out = capfd.readouterr().out
    assert f"model {path}: training has stopped: 2 measurements brought no better recall@5 than" in out
    assert f"at step 10; that checkpoint is in {path / 'best'}" in out
    before = weights(path)
    train(held_out_store, config, path)
    assert "training has stopped: 2 measurements" in capfd.readouterr().out, "what has been stopped stays so"
    assert_same_weights(weights(path), before)
    train(held_out_store, with_validation(with_train(CONFIG, steps=40, learning_rate=1e-8), patience=5), path)
    assert weights(path)["global_step"] == 40, "with more patience it goes on"


@pytest.mark.parametrize(
    ("recalls", "patience", "over"),
    [
        ([], 1, False),
        ([0.1], 1, False),
        ([0.1, 0.2], 1, False),
        ([0.2, 0.1], 1, True),
        ([0.2, 0.2], 1, True),
        ([0.2, 0.1, 0.3], 1, False),
        ([0.2, 0.1], 2, False),
        ([0.2, 0.1, 0.15], 2, True),
        ([0.2, 0.1, 0.1], 0, False),
        ([float("nan"), 0.1], 1, False),
        ([float("nan"), 0.1, float("nan")], 1, True),
        ([float("nan"), float("nan")], 1, True),
    ],
)
def test_patience(tmp_path, recalls, patience, over):
    lines = [json.dumps({"step": step, "recall@5": recall}) for step, recall in enumerate(recalls)]
    lines.insert(0, json.dumps({"step": 0, "recall@100": 1.0}))  # of another metric, before
    (tmp_path / "validation.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert is_over(tmp_path, with_validation(patience=patience)) == over
    assert not is_over(tmp_path, with_validation(queries=0, patience=patience))


def test_two_trainings_of_one_model_at_once(dpsr, click_store, tmp_path):
    path = tmp_path / "m"
    path.mkdir()
    flags = ["train", f"--store={click_store.path}", f"--out={path}"]
    with locked(path, "taken"):
        dpsr(*flags).fails(1, f"{path}: another `dpsr train` trains this model", "choose another --out")
        assert (path / "config.yaml").is_file()
        dpsr(*flags, "--overwrite").fails(1, f"{path}: another `dpsr train` trains this model")
        assert (path / "config.yaml").is_file(), "nothing is removed"
        # The evaluator works beside the chief, so it comes as far as to its own error.
        with pytest.raises(CommandError, match="holds no held-out interactions"):
            train(click_store, with_validation(Config()), path, Cluster("evaluator"))


def test_a_directory_of_something_else_is_refused(dpsr, click_store, tmp_path):
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "items.parquet").write_bytes(b"PAR1")
    flags = ["train", f"--store={click_store.path}", "--set=train.steps=1"]
    dpsr(*flags, f"--out={tmp_path / 'shop'}").fails(1, "holds no model, but other files, such as items.parquet")
    assert [path.name for path in (tmp_path / "shop").iterdir()] == ["items.parquet"]


def test_a_config_does_not_make_a_model(dpsr, click_store, tmp_path):
    """A folder with a config of one's own is neither taken for a model nor removed."""
    save_config(Config(), tmp_path / "config.yaml")
    (tmp_path / "notes.txt").write_text("mine")
    flags = ["train", f"--store={click_store.path}", f"--out={tmp_path}", "--set=train.steps=1"]
    for more, status in (([], 1), (["--overwrite"], 1), (["--set=train.margin=0.2"], 1)):
        dpsr(*flags, *more).fails(status, str(tmp_path))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "notes.txt"]


def test_what_never_began_is_not_in_the_way(dpsr, click_store, tmp_path):
    """A training that failed before its first checkpoint leaves a directory, which another config may use."""
    ModelDirectory.create_or_resume(tmp_path / "m", Config(), click_store)
    flags = ["train", f"--store={click_store.path}", f"--out={tmp_path / 'm'}"]
    flags += ["--set=train.steps=2", "--set=train.batch_size=16", "--set=train.margin=0.2"]
    outcome = dpsr(*flags)
    assert outcome.status == 0, outcome
    dpsr(*flags, "--set=train.margin=0.3").fails(1, "train.margin was 0.2 and is 0.3")
    again = dpsr(*flags)
    assert again.status == 0 and "is at step 2 already; to train on, give a larger train.steps" in again.out


def test_validation_needs_something_held_out(dpsr, click_store, tmp_path):
    flags = [f"--store={click_store.path}", f"--out={tmp_path / 'm'}", "--set=validation.queries=5"]
    dpsr("train", *flags).fails(1, "holds no held-out interactions")


def test_an_evaluator_without_validation(dpsr, click_store, tmp_path, monkeypatch):
    cluster = {"chief": ["a:1"], "ps": ["b:1"]}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": {"type": "evaluator", "index": 0}}))
    flags = [f"--store={click_store.path}", f"--out={tmp_path / 'm'}"]
    dpsr("train", *flags).fails(2, "type is 'evaluator', but validation.queries is 0")
    dpsr("train", *flags, "--overwrite").fails(2, "--overwrite: cannot be combined with TF_CONFIG")
    assert not (tmp_path / "m").exists()
