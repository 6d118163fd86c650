"""`dpsr train` with a quantizer: the two phases, what lies between them, and resuming in each of them."""

from __future__ import annotations

import dataclasses
import json
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
from dpsr_tf.config import Config, ModelConfig, QuantizerConfig, TrainConfig, ValidationConfig, save_config
from dpsr_tf.data.examples_dataset import examples_dataset, training_input
from dpsr_tf.data.store import Store
from dpsr_tf.models.encoders import exact_search, item_embeddings, query_encoder
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.quantizer import Quantizer
from dpsr_tf.training import quantizer_start
from dpsr_tf.training.estimator import QuantizerPhase, loss_problem, model_fn
from dpsr_tf.training.quantizer_start import Teacher, fit, reconstruction_error
from dpsr_tf.training.train import batch_options, config_from_flags, train
from dpsr_tf.training.warm_start import WarmStart

v1 = tf.compat.v1

NONE = Config(
    model=ModelConfig(token_dim=16, hidden=(24,), embedding_dim=12),
    train=TrainConfig(
        steps=40,
        batch_size=8,
        num_random_negatives=8,
        num_title_queries=2,
        learning_rate=0.1,
        average_decay=0.9,
        checkpoint_steps=10,
    ),
)
CONFIG = dataclasses.replace(
    NONE,
    quantizer=QuantizerConfig(
        sub_spaces=3,
        bits=4,
        lists=4,
        start_step=20,
        schedule="constant",  # so that the number of steps changes nothing but where the training ends
        teacher_queries=20,
        teacher_items=10,
        candidates=3,
    ),
)


def with_quantizer(config=CONFIG, **options):
    return dataclasses.replace(config, quantizer=dataclasses.replace(config.quantizer, **options))


def towers_of(values):
    """The weights of the towers, without averages and the optimizer's state."""
    slots = ("/Adagrad", "/ExponentialMovingAverage")
    return {
        n: v for n, v in values.items() if not n.startswith(("quantizer/", "global_step")) and not n.endswith(slots)
    }


def averages_of(values):
    return {name: values[f"{name}/ExponentialMovingAverage"] for name in towers_of(values)}


def quantizer_of(path, step=None):
    return Quantizer.read(tf.train.latest_checkpoint(str(path)) if step is None else str(path / f"model.ckpt-{step}"))


def tags(path):
    return {
        value.tag
        for file in path.glob("events.*")
        for event in v1.train.summary_iterator(str(file))
        for value in event.summary.value
    }


@pytest.fixture(scope="module")
def without(click_store, tmp_path_factory):
    """A model of the first phase alone, trained without a quantizer; it must not be changed."""
    return train(click_store, with_train(NONE, steps=20), tmp_path_factory.mktemp("without") / "model")


@pytest.fixture(scope="module")
def quantized(click_store, tmp_path_factory):
    """A model of CONFIG, trained in one go; it must not be changed."""
    return train(click_store, CONFIG, tmp_path_factory.mktemp("quantized") / "model")


def copy_of(model, to, step=None):
    """A model directory with one checkpoint, as a killed training leaves it."""
    shutil.copytree(model.path, to)
    if step is not None:
        (to / "checkpoint").write_text(f'model_checkpoint_path: "model.ckpt-{step}"\n')
        for file in to.glob("model.ckpt-*"):
            if int(file.name.split(".")[1].removeprefix("ckpt-")) > step:
                file.unlink()
    return to


# The two phases.


@pytest.mark.slow
def test_what_a_training_with_a_quantizer_leaves(click_store, without, quantized, capfd):
    before, begin, end = weights(without.path), weights(quantized.path, 20), weights(quantized.path)
    assert end["global_step"] == 40
    # The first phase is a training without a quantizer, and what is served of it stays.
    assert set(before) < set(begin) == set(end)
    assert {name for name in set(end) - set(before)} == {name for name in end if name.startswith("quantizer/")}
    assert not [name for name in end if name.startswith("quantizer/") and "Average" in name]
    for values in (begin, end):
        for name, value in averages_of(before).items():
            np.testing.assert_array_equal(towers_of(values)[name], value, err_msg=name)
            np.testing.assert_array_equal(averages_of(values)[name], value, err_msg=name)
    # The second one trains coarse centroids and codebooks, and leaves the rotation of OPQ.
    first, last = quantizer_of(quantized.path, 20), quantizer_of(quantized.path)
    np.testing.assert_array_equal(first.rotation, last.rotation)
    assert first.coarse.shape == (4, 12) and first.codebooks.shape == (3, 16, 4)
    assert np.abs(first.coarse - last.coarse).max() > 1e-3 and np.abs(first.codebooks - last.codebooks).max() > 1e-3
    # Its start is that of the embeddings.
    vectors = item_embeddings(quantized.path, click_store)
    again = fit(vectors, CONFIG.quantizer, CONFIG.train.seed)
    for name in ("rotation", "coarse", "codebooks"):
        np.testing.assert_allclose(getattr(first, name), getattr(again, name), atol=1e-5, err_msg=name)
    assert ModelDirectory.open(quantized.path).has_quantizer and not without.has_quantizer
    found = tags(quantized.path)
    assert {"loss", "quantizer/distortion", "quantizer/entropy", "quantizer/codes_used"} <= found
    assert not [path.name for path in quantized.path.iterdir() if "tmp" in path.name]


@pytest.mark.slow
def test_two_runs_are_equal_to_the_bit(click_store, quantized, tmp_path, capfd):
    again = train(click_store, CONFIG, tmp_path / "again")
    assert_same_weights(weights(again.path), weights(quantized.path))
    line = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("quantizer starts"))
    start = "quantizer starts at step 20: 60 items, 4 lists, 2 bytes an item, reconstruction error "
    assert line.startswith(start)
    vectors = item_embeddings(quantized.path, click_store)
    error = reconstruction_error(quantizer_of(quantized.path, 20), vectors)
    assert float(line.removeprefix(start)) == pytest.approx(error, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("towers", "objective"),
    [
        ("frozen", "reconstruction"),
        ("query", "ranking"),
        ("both", "distillation"),
        pytest.param("frozen", "ranking", marks=pytest.mark.long),
        pytest.param("frozen", "distillation", marks=pytest.mark.long),
        pytest.param("query", "reconstruction", marks=pytest.mark.long),
        pytest.param("query", "distillation", marks=pytest.mark.long),
        pytest.param("both", "reconstruction", marks=pytest.mark.long),
        pytest.param("both", "ranking", marks=pytest.mark.long),
    ],
)
def test_which_weights_each_choice_of_towers_trains(click_store, without, tmp_path, towers, objective):
    path = copy_of(without, tmp_path / "model")
    train(click_store, with_quantizer(with_train(CONFIG, steps=35), towers=towers, objective=objective), path)
    before, after = weights(without.path), weights(path)
    changed = {n for n, value in towers_of(after).items() if np.abs(value - averages_of(before)[n]).max() > 0}
    expected = {
        "frozen": set(),
        "query": {name for name in towers_of(after) if name.startswith("query_tower/")},
        "both": set(towers_of(after)),
    }[towers]
    assert changed == expected
    moved = {n for n, value in averages_of(after).items() if np.abs(value - averages_of(before)[n]).max() > 0}
    assert moved == expected, "the average of 30 of the steps is what is served"
    assert (path / "teacher.dpsr").exists() == (objective == "distillation")
    assert np.abs(quantizer_of(path).codebooks - quantizer_of(path, 20).codebooks).max() > 1e-3


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
def test_towers_that_rest_keep_the_state_of_their_optimizer(click_store, tmp_path, optimizer):
    """So that a warm start from the model finds it."""
    config = with_train(CONFIG, dense_optimizer=optimizer, average_decay=0.0, steps=25)
    path = tmp_path / "model"
    train(click_store, config, path)
    first, last = weights(path, 20), weights(path)
    of_towers = {name for name in last if not name.startswith("quantizer/")} - {"global_step"}
    assert len(of_towers) > len(towers_of(last))
    for name in of_towers:
        np.testing.assert_array_equal(last[name], first[name], err_msg=name)


@pytest.mark.long
@pytest.mark.slow
def test_a_small_rate_for_the_towers(click_store, without, tmp_path):
    """The steps of AdaGrad are in proportion to its rate."""
    moved = []
    for rate in (0.1, 0.001):
        path = copy_of(without, tmp_path / str(rate))
        train(click_store, with_quantizer(with_train(CONFIG, steps=21), towers="both", tower_rate=rate), path)
        name = "item_tower/embedding/kernel"
        moved.append(weights(path)[name] - weights(path, 20)[name])
    assert np.abs(moved[0]).max() > 1e-4
    np.testing.assert_allclose(moved[0], 100 * moved[1], atol=0.05 * np.abs(moved[0]).max())


@pytest.mark.long
@pytest.mark.slow
def test_the_rates_of_the_quantizer_fall(click_store, without, tmp_path):
    """From start_step to the last step. Adam's first step is as long as its rate, and so is the sum of all."""
    moved = {}
    for schedule, steps in (("constant", 21), ("cosine", 21), ("cosine", 22), ("linear", 22)):
        path = copy_of(without, tmp_path / f"{schedule}{steps}")
        train(click_store, with_quantizer(with_train(CONFIG, steps=steps), schedule=schedule), path)
        moved[schedule, steps] = np.abs(quantizer_of(path).coarse - quantizer_of(path, 20).coarse).max()
    assert moved["constant", 21] == pytest.approx(1e-3, rel=0.01) and moved["cosine", 21] == moved["constant", 21]
    assert moved["cosine", 22] == moved["linear", 22], "half the rate at the second of two steps"
    assert 1.2e-3 < moved["cosine", 22] < 1.55e-3


# Resuming.


def start_and_kill(store, config, path, tmp_path, when):
    """Starts `dpsr train`, and kills it when a file is there. Returns the step of the last checkpoint."""
    save_config(config, tmp_path / "config.yaml")
    command = [sys.executable, "-m", "dpsr_common.command_line", "train", f"--store={store.path}", f"--out={path}"]
    with open(tmp_path / "log", "w+b") as log:
        process = subprocess.Popen([*command, f"--config={tmp_path / 'config.yaml'}"], stdout=log, stderr=log)
        try:
            while not (path / when).exists():
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.005)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    return int(tf.train.latest_checkpoint(str(path)).rpartition("-")[2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "start_step"),
    [
        pytest.param("model.ckpt-10.index", 2000, id="first phase", marks=pytest.mark.long),
        pytest.param("teacher.dpsr", 20, id="between the phases", marks=pytest.mark.long),
        pytest.param("model.ckpt-30.index", 20, id="second phase", marks=pytest.mark.long),
    ],
)
def test_a_killed_training_resumes_to_the_bit(click_store, tmp_path, when, start_step):
    path = tmp_path / "model"
    config = with_train(with_quantizer(start_step=start_step), steps=1_000_000)
    killed_at = start_and_kill(click_store, config, path, tmp_path, when)
    assert Quantizer.is_in(tf.train.latest_checkpoint(str(path))) == (when == "model.ckpt-30.index")
    assert (killed_at < start_step) == (when == "model.ckpt-10.index")
    # A checkpoint after every 10 of 2,000 steps would take most of the time. When they are due changes no weight.
    config = with_train(config, steps=max(killed_at, start_step) + 15, checkpoint_steps=500)
    train(click_store, config, path)
    assert_same_weights(weights(path), weights(train(click_store, config, tmp_path / "reference").path))


@pytest.mark.long
@pytest.mark.slow
def test_more_steps_and_another_order_of_starts(click_store, quantized, tmp_path):
    path = tmp_path / "model"
    train(click_store, with_train(CONFIG, steps=27), path)
    assert weights(path)["global_step"] == 27
    train(click_store, with_train(CONFIG, steps=22), path)
    assert weights(path)["global_step"] == 27, "nothing to do"
    train(click_store, CONFIG, path)
    assert_same_weights(weights(path), weights(quantized.path))


@pytest.mark.slow
def test_a_lost_teacher_is_looked_up_again(click_store, quantized, tmp_path):
    """As in a copy of MODEL/best. The towers are frozen, so it is the same one."""
    path = copy_of(quantized, tmp_path / "model", step=30)
    (path / "teacher.dpsr").unlink()
    train(click_store, CONFIG, path)
    assert_same_weights(weights(path), weights(quantized.path))
    assert (path / "teacher.dpsr").read_bytes() == (quantized.path / "teacher.dpsr").read_bytes()


@pytest.mark.slow
def test_a_trained_model_gets_a_quantizer_later(click_store, without, quantized, tmp_path):
    """The section may change until the quantizer has started, and not after it."""
    path = copy_of(without, tmp_path / "model")
    with pytest.raises(CommandError, match=r"train\.margin was 0.1 and is 0.2"):
        ModelDirectory.create_or_resume(path, with_train(CONFIG, margin=0.2), click_store)
    train(click_store, with_quantizer(with_train(CONFIG, steps=40), start_step=7), path)
    assert_same_weights(weights(path), weights(quantized.path))
    with pytest.raises(CommandError, match=r"another config: quantizer\.lists was 4 and is 8; choose another --out"):
        train(click_store, with_quantizer(start_step=7, lists=8), path)


# A warm start.


@pytest.mark.long
@pytest.mark.slow
def test_a_warm_start_quantizes_at_once(click_store, without, tmp_path, capfd):
    """With start_step 0, the towers are those of the old model."""
    config = with_train(with_quantizer(start_step=0), steps=15)
    path = tmp_path / "model"
    train(click_store, config, path, warm_start=WarmStart.open(without.path, config, "keep"))
    assert "quantizer starts at step 0: 60 items" in capfd.readouterr().out
    old, new = weights(without.path), weights(path)
    assert new["global_step"] == 15
    for name, value in averages_of(old).items():
        np.testing.assert_array_equal(towers_of(new)[name], value, err_msg=name)
        np.testing.assert_array_equal(averages_of(new)[name], value, err_msg=name)
    np.testing.assert_array_equal(
        item_embeddings(path, click_store), item_embeddings(without.path, click_store), "what is served stays"
    )
    train(click_store, with_train(config, steps=20), path)
    assert weights(path)["global_step"] == 20, "it resumes without the old model"


def test_a_start_at_step_0_needs_a_warm_start(dpsr, click_store, tmp_path):
    flags = [f"--store={click_store.path}", f"--out={tmp_path / 'm'}", "--set=quantizer.sub_spaces=8"]
    flags.append("--set=quantizer.bits=4")
    dpsr("train", *flags).fails(2, "quantizer.start_step is 0", "--warm_start=MODEL")
    assert not (tmp_path / "m").exists()


# What is refused.


@pytest.mark.parametrize(
    ("assignments", "fragments"),
    [
        (["bits=5"], ["bits is 5, expected 4 or 8"]),
        (["bits=9"], ["bits is 9", "4 to 8"]),
        (["sub_spaces=5"], ["sub_spaces is 5", "embedding_dim, 64", "1, 2, 4, 8, 16, 32, 64"]),
        (["sub_spaces=128"], ["sub_spaces is 128", "embedding_dim, 64"]),
        (["start_step=10000"], ["start_step is 10000, expected less than train.steps, 10000"]),
        (["warmup_items=100"], ["warmup_items is 100, expected at least 256", "bits is 8"]),
        (["lists=1000", "warmup_items=999"], ["warmup_items is 999, expected at least 1000", "lists is 1000"]),
        (["candidates=201"], ["candidates is 201, expected at most teacher_items, 200"]),
        (["codes=residual"], ["rotation is opq, expected none for codes residual"]),
        (
            ["codes=residual", "rotation=none", "towers=query"],
            ["towers is query, expected frozen", "once, at the start"],
        ),
        (["objective=best"], ["objective is 'best', expected one of reconstruction, ranking, distillation"]),
    ],
)
def test_values_that_are_refused(assignments, fragments):
    sets = [f"quantizer.{assignment}" for assignment in ("sub_spaces=8", "start_step=100", *assignments)]
    with pytest.raises(UsageError) as caught:
        config_from_flags(None, sets)
    for fragment in fragments:
        assert fragment in str(caught.value), str(caught.value)


def test_without_sub_spaces_the_section_is_ignored():
    config = config_from_flags(None, ["quantizer.start_step=99999", "quantizer.bits=5", "quantizer.lists=100000"])
    assert config.quantizer.sub_spaces == 0


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        (["quantizer.lists=61"], ["has 60 items", "quantizer.lists is 61", "60 vectors"]),
        (["quantizer.bits=8"], ["has 60 items", "quantizer.bits is 8, which makes 256 codes", "60 vectors"]),
    ],
)
def test_too_few_items_are_found_before_the_training(dpsr, click_store, tmp_path, settings, fragments):
    save_config(with_quantizer(lists=1), tmp_path / "config.yaml")
    flags = [f"--store={click_store.path}", f"--config={tmp_path / 'config.yaml'}", f"--out={tmp_path / 'm'}"]
    dpsr("train", *flags, *(f"--set={setting}" for setting in settings)).fails(1, *fragments)
    assert not (tmp_path / "m").exists()


def test_without_faiss(dpsr, click_store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    save_config(CONFIG, tmp_path / "config.yaml")
    flags = [f"--store={click_store.path}", f"--config={tmp_path / 'config.yaml'}", f"--out={tmp_path / 'm'}"]
    dpsr("train", *flags).fails(1, "FAISS is not installed", "faiss-cpu", "quantizer.sub_spaces is 3")
    assert not (tmp_path / "m").exists()


def spoiled(path, name, value):
    """Sets some numbers of a variable in the last checkpoint."""
    checkpoint = tf.train.latest_checkpoint(str(path))
    values = weights(path)
    values[name] = values[name].copy()
    values[name].reshape(-1)[5] = value
    with tf.Graph().as_default(), v1.Session() as session:
        variables = [v1.get_variable(n, initializer=tf.constant(v)) for n, v in values.items()]
        session.run(v1.global_variables_initializer())
        v1.train.Saver(variables).save(session, checkpoint, write_meta_graph=False)


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["codebooks", "coarse", "rotation"])
def test_a_quantizer_without_a_number_stops_the_training(click_store, quantized, tmp_path, variable):
    path = copy_of(quantized, tmp_path / "model")
    spoiled(path, f"quantizer/{variable}", np.nan)
    with pytest.raises(CommandError, match="weights became NaN or infinite at step 40 and are not saved"):
        train(click_store, with_train(CONFIG, steps=50), path)


@pytest.mark.slow
def test_a_loss_without_a_number_changes_nothing(click_store, taught):
    """Neither a weight of the towers nor of the quantizer."""
    config = with_quantizer(
        with_train(CONFIG, average_decay=0.0), towers="both", objective="reconstruction", rotation="givens"
    )
    with tf.Graph().as_default(), v1.Session() as session:
        dataset = training_input(examples_dataset(click_store, batch_options(config, taught.features)))
        v1.train.get_or_create_global_step()
        params = {"config": config, "features": taught.features, "num_ps": 0, "item_shares": None,
                  "quantizer": QuantizerPhase}  # fmt: skip
        features = v1.data.make_one_shot_iterator(dataset).get_next()
        spec = model_fn(features, None, tf.estimator.ModeKeys.TRAIN, params)
        session.run(v1.global_variables_initializer())
        variables = v1.global_variables()
        codebooks = next(variable for variable in variables if variable.op.name == "quantizer/codebooks")
        before = session.run(variables)
        session.run(spec.train_op)
        after = dict(zip((v.op.name for v in variables), session.run(variables), strict=True))
        changed = {v.op.name for v, one in zip(variables, before, strict=True) if (one != after[v.op.name]).any()}
        assert {"token_embedding", "quantizer/coarse", "global_step"} <= changed
        session.run(codebooks.assign(tf.fill(codebooks.shape, np.nan)))
        before = session.run(variables)
        with pytest.raises(tf.errors.InvalidArgumentError) as caught:
            session.run(spec.train_op)
        assert loss_problem(caught.value).startswith("the loss became NaN or infinite at step 1, in a batch of")
        for variable, one, other in zip(variables, before, session.run(variables), strict=True):
            np.testing.assert_array_equal(one, other, err_msg=variable.op.name)


# The start.


def unit(rng, n, d):
    x = rng.normal(size=(n, d)).astype(np.float32) * np.linspace(3, 0.2, d, dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("rotation", ["none", "opq", "givens"])
@pytest.mark.parametrize("lists", [1, 8])
def test_fit(rotation, lists):
    x = unit(np.random.default_rng(1), 2000, 16)
    config = QuantizerConfig(sub_spaces=4, bits=4, lists=lists, rotation=rotation)
    found = fit(x, config, seed=7)
    assert found.coarse.shape == (lists, 16) and found.codebooks.shape == (4, 16, 4) and found.code_bytes == 2
    np.testing.assert_allclose(found.rotation.T @ found.rotation, np.eye(16), atol=1e-6)
    assert (found.rotation == np.eye(16)).all() == (rotation == "none")
    assert fit(x, config, seed=7).fingerprint == found.fingerprint, "the same seed"
    assert fit(x, config, seed=8).fingerprint != found.fingerprint
    # Each centroid is the mean of what it stands for, so that no error is left that training could take off at once.
    numbers, codes = found.encode(x)
    z = x @ found.rotation
    for number in range(lists):
        np.testing.assert_allclose(z[numbers == number].mean(axis=0), found.coarse[number], atol=0.02)
    residual = (z - found.coarse[numbers]).reshape(-1, 4, 4)
    for m in range(4):
        for code in np.unique(codes[:, m]):
            mean = residual[codes[:, m] == code, m].mean(axis=0)
            np.testing.assert_allclose(mean, found.codebooks[m, code], atol=0.03)
    error = reconstruction_error(found, x)
    assert error < np.mean(np.sum((x - x.mean(axis=0)) ** 2, axis=1))


def test_opq_lowers_the_error_and_identity_does_not():
    x = unit(np.random.default_rng(2), 3000, 16)
    options = [{"rotation": "none"}, {"rotation": "opq"}, {"rotation": "givens"},
               {"rotation": "givens", "givens_start": "identity"}]  # fmt: skip
    quantizers = [fit(x, QuantizerConfig(sub_spaces=4, bits=4, lists=4, **each), 1) for each in options]
    none, opq, givens, identity = (reconstruction_error(quantizer, x) for quantizer in quantizers)
    assert opq < 0.95 * none and givens == opq and identity == none
    assert quantizers[1].fingerprint == quantizers[2].fingerprint
    assert quantizers[0].fingerprint == quantizers[3].fingerprint


def test_what_cannot_be_quantized():
    x = unit(np.random.default_rng(3), 50, 8)
    with pytest.raises(CommandError, match=r"quantizer\.bits is 8, which makes 256 codes, but .* has 50 vectors"):
        fit(x, QuantizerConfig(sub_spaces=2), 1)
    with pytest.raises(CommandError, match=r"quantizer\.lists is 64, but .* has 50 vectors; lower quantizer\.lists"):
        fit(x, QuantizerConfig(sub_spaces=2, bits=4, lists=64), 1)
    x[7, 3], x[9, 0] = np.nan, np.inf
    with pytest.raises(CommandError, match="2 of 50 item embeddings are NaN or infinite, and no rotation of them"):
        fit(x, QuantizerConfig(sub_spaces=2, bits=4), 1)


@pytest.mark.parametrize("lists", [1, 8])
def test_fit_of_residual_codes(lists):
    x = unit(np.random.default_rng(1), 2000, 16)
    config = QuantizerConfig(sub_spaces=5, bits=4, lists=lists, codes="residual", rotation="none")
    found = fit(x, config, seed=7)
    assert found.coarse.shape == (lists, 16) and found.codebooks.shape == (5, 16, 16) and found.code_bytes == 3
    np.testing.assert_array_equal(found.rotation, np.eye(16))
    for values, of_encoder in zip((found.coarse, found.codebooks), found.encoder, strict=True):
        np.testing.assert_array_equal(values, of_encoder)
    assert fit(x, config, seed=7).fingerprint == found.fingerprint != fit(x, config, seed=8).fingerprint
    # Each codebook takes off a part of the error, and at the same size it is less than that of product codes without
    # the right rotation.
    errors = [
        reconstruction_error(fit(x, dataclasses.replace(config, sub_spaces=number), 7), x) for number in (1, 2, 4)
    ]
    product = fit(x, dataclasses.replace(config, sub_spaces=4, codes="product"), 7)
    assert errors[0] > errors[1] > errors[2] and errors[2] < reconstruction_error(product, x)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("objective", ["reconstruction", "ranking", "distillation"])
def test_residual_codes(click_store, without, tmp_path, objective):
    config = with_quantizer(codes="residual", rotation="none", objective=objective)
    path = copy_of(without, tmp_path / "model")
    train(click_store, config, path)
    first, last = quantizer_of(path, 20), quantizer_of(path)
    for before, after in zip(first.encoder, last.encoder, strict=True):
        np.testing.assert_array_equal(before, after)
    assert np.abs(first.coarse - last.coarse).max() > 1e-3 or objective == "reconstruction"
    assert np.abs(first.codebooks - last.codebooks).max() > 1e-3
    # All items have the codes of the start.
    codes = quantizer_start.open_item_codes(ModelDirectory.open(path), click_store, last)
    lists, chosen = last.encode(item_embeddings(path, click_store))
    np.testing.assert_array_equal(codes.lists, lists)
    np.testing.assert_array_equal(codes.codes, chosen)
    # A training that goes on looks the codes up, or chooses them again if their file is lost or of another store.
    for damage in (lambda file: file, lambda file: file.unlink(), lambda file: file.write_bytes(b"other")):
        again = copy_of(ModelDirectory.open(path), tmp_path / f"again_{objective}", 30)
        damage(again / quantizer_start.ITEM_CODES)
        train(click_store, config, again)
        assert_same_weights(weights(again), weights(path))
        shutil.rmtree(again)


@pytest.mark.slow
def test_a_sample_of_the_items(click_store, without):
    model = dataclasses.replace(without, config=with_quantizer(warmup_items=31))
    checkpoint = tf.train.latest_checkpoint(str(without.path))
    found, line = quantizer_start.start(model, click_store, checkpoint)
    assert ": 31 items, " in line
    assert quantizer_start.start(model, click_store, checkpoint)[0].fingerprint == found.fingerprint
    other = dataclasses.replace(model, config=with_train(model.config, seed=2))
    assert quantizer_start.start(other, click_store, checkpoint)[0].fingerprint != found.fingerprint


# The teacher.


@pytest.fixture
def taught(without, tmp_path):
    """A model of the first phase, with CONFIG; a test may write a teacher into it."""
    path = copy_of(without, tmp_path / "model")
    return dataclasses.replace(ModelDirectory.open(path), config=CONFIG)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, 2])
def test_the_teacher_is_exact_search(click_store, without, tmp_path, monkeypatch, heads):
    monkeypatch.setattr(quantizer_start, "_ITEMS", 16)
    monkeypatch.setattr(quantizer_start, "_QUERIES", 7)
    monkeypatch.setattr(quantizer_start, "_BATCH", 9)
    config = with_quantizer(teacher_queries=25)
    if heads > 1:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_heads=heads))
        model = train(click_store, dataclasses.replace(with_train(config, steps=5), quantizer=QuantizerConfig()),
                      tmp_path / "model")  # fmt: skip
    else:
        model = ModelDirectory.open(copy_of(without, tmp_path / "model"))
    model = dataclasses.replace(model, config=config)
    Teacher.write(model, click_store, tf.train.latest_checkpoint(str(model.path)))
    teacher = Teacher.open(model, click_store)
    (log,) = click_store.interactions()
    assert len(teacher.queries) == 25 and (np.diff(teacher.queries) > 0).all()
    assert set(teacher.queries) < set(queries_of(log)), "a sample of the queries with a click"
    items = item_embeddings(model.path, click_store)
    np.testing.assert_allclose(teacher.vectors, items, atol=1e-6)
    texts = list(click_store.queries())
    queries = query_encoder(model.path, click_store)([texts[row] for row in teacher.queries], None)
    scores = np.max(queries @ items.T, axis=1)
    found = np.take_along_axis(scores, teacher.items, axis=1)
    np.testing.assert_allclose(found, -np.sort(-scores, axis=1)[:, :10], atol=1e-5)
    assert all(len(set(row)) == 10 for row in teacher.items)


@pytest.mark.slow
def test_what_is_drawn_from_the_teacher(click_store, taught):
    Teacher.write(taught, click_store, tf.train.latest_checkpoint(str(taught.path)))
    teacher = Teacher.open(taught, click_store)
    assert len(teacher.queries) == 20
    unknown = next(row for row in range(30) if row not in teacher.queries)
    queries = np.array([teacher.queries[3], -1, unknown, teacher.queries[0], teacher.queries[19], 10**6], np.int32)
    seen = set()
    for step in range(40):
        rows, vectors, valid = teacher.draw(queries, 3, (1, 0, step))
        assert valid.tolist() == [[True] * 3, [False] * 3, [False] * 3, [True] * 3, [True] * 3, [False] * 3]
        assert vectors.shape == (3, 3, 12)
        for number, (i, place) in enumerate(((0, 3), (3, 0), (4, 19))):
            assert len(set(rows[i])) == 3 and set(rows[i]) <= set(teacher.items[place])
            np.testing.assert_array_equal(vectors[number], teacher.vectors[rows[i]])
        seen |= set(rows[0])
        np.testing.assert_array_equal(teacher.draw(queries, 3, (1, 0, step)).rows, rows)
        assert (teacher.draw(queries, 3, (2, 0, step)).rows != rows).any(), "another seed"
        others = np.array([-1, -1, -1, -1, queries[4], -1])
        np.testing.assert_array_equal(teacher.draw(others, 3, (1, 0, step)).rows[4], rows[4])
    assert seen == set(teacher.items[3]), "each of them is drawn"
    rows, _, valid = teacher.draw(queries[:1], 12, (1, 0, 0))
    assert valid.tolist() == [[True] * 10 + [False] * 2] and set(rows[0][:10]) == set(teacher.items[3])


@pytest.mark.slow
def test_a_batch_with_its_teacher(click_store, taught):
    Teacher.write(taught, click_store, tf.train.latest_checkpoint(str(taught.path)))
    teacher = Teacher.open(taught, click_store)

    def batches(first, count):
        found = []
        with tf.Graph().as_default(), v1.Session() as session:
            dataset = examples_dataset(click_store, batch_options(CONFIG, taught.features), first_step=first)
            element = v1.data.make_one_shot_iterator(teacher.join(dataset, CONFIG, first)).get_next()
            assert element["teacher"].vectors.shape.as_list() == [None, 3, 12]
            for _ in range(count):
                found.append(session.run((element["batch"].query_rows, *element["teacher"])))
        return found

    whole = batches(0, 6)
    for found, expected in zip(batches(4, 2), whole[4:], strict=True):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
    for queries, rows, vectors, valid in whole:
        assert valid[:, 0].tolist() == [query in teacher.queries for query in queries]
        np.testing.assert_array_equal(vectors, teacher.vectors[rows[valid[:, 0]]])
        assert (queries == -1).sum() == 2


@pytest.mark.slow
def test_a_teacher_of_another_config_is_none(click_store, taught):
    Teacher.write(taught, click_store, tf.train.latest_checkpoint(str(taught.path)))
    assert Teacher.open(taught, click_store) is not None
    for options in ({"teacher_queries": 19}, {"teacher_items": 11}):
        other = dataclasses.replace(taught, config=with_quantizer(**options))
        assert Teacher.open(other, click_store) is None
    data = (taught.path / "teacher.dpsr").read_bytes()
    (taught.path / "teacher.dpsr").write_bytes(data[:-9])
    assert Teacher.open(taught, click_store) is None


@pytest.mark.slow
def test_more_teacher_items_than_items(click_store, taught):
    model = dataclasses.replace(taught, config=with_quantizer(teacher_items=500, teacher_queries=4))
    Teacher.write(model, click_store, tf.train.latest_checkpoint(str(taught.path)))
    assert Teacher.open(model, click_store).items.shape == (4, 60)


@pytest.mark.slow
def test_a_store_without_clicks_has_no_teacher(shop, dpsr, tmp_path):
    """All queries of a batch are titles, so distillation has the batch's own items alone."""
    del shop.schema["interactions"]
    dpsr(*shop.write().flags(tmp_path / "store")).succeeds()
    config = with_train(with_quantizer(lists=2, warmup_items=16, bits=4, start_step=3), steps=6, num_title_queries=8)
    save_config(config, tmp_path / "config.yaml")
    flags = [f"--store={tmp_path / 'store'}", f"--config={tmp_path / 'config.yaml'}", f"--out={tmp_path / 'm'}"]
    dpsr("train", *flags).fails(1, "has 7 items; quantizer.bits is 4, which makes 16 codes")
    for number in range(16):
        shop.items.append({"item_id": 1000 + number, "title": f"lamp of kind {number}", "brand": None, "color": None})
    dpsr(*shop.write().flags(tmp_path / "store"), "--overwrite").succeeds()
    dpsr("train", *flags).succeeds()
    model = ModelDirectory.open(tmp_path / "m")
    assert len(Teacher.open(model, Store(tmp_path / "store")).queries) == 0
    assert weights(tmp_path / "m")["global_step"] == 6


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, True),
        ({"objective": "ranking"}, False),
        ({"objective": "reconstruction"}, False),
        ({"candidates": 0}, False),
        ({"teacher_queries": 0}, False),
        ({"sub_spaces": 0}, False),
    ],
)
def test_when_a_teacher_is_needed(options, needed):
    assert Teacher.is_needed(with_quantizer(**options).quantizer) == needed


# Validation.


@pytest.mark.long
@pytest.mark.slow
def test_validation_measures_quantized_items(held_out_store, tmp_path):
    config = dataclasses.replace(CONFIG, validation=ValidationConfig(queries=100, recall_at=5, patience=1))
    config = with_train(config, learning_rate=1e-8)
    path = tmp_path / "model"
    train(held_out_store, config, path)
    lines = [json.loads(line) for line in (path / "validation.jsonl").read_text().splitlines()]
    floats = [line["step"] for line in lines if "quantized" not in line]
    assert floats == [10, 20], "patience does not end a training before the quantizer"
    first, *others = [line for line in lines if "quantized" in line]
    assert first["step"] == 20 and others, lines
    best = json.loads((path / "best" / "measured.json").read_text())
    assert best["quantized"] and best["recall@5"] == max(line["recall@5"] for line in (first, *others))
    assert Quantizer.is_in(tf.train.latest_checkpoint(str(path / "best")))
    # What is measured is T(x).
    search = exact_search(path, held_out_store, quantized=True)
    ids = held_out_store.items()["id"]
    scores = search.score(["lantern alpha"], None, ids[np.newaxis])
    vectors = quantizer_of(path)(item_embeddings(path, held_out_store))
    query = query_encoder(path, held_out_store)(["lantern alpha"], None)[:, 0]
    np.testing.assert_allclose(scores, query @ vectors.T, atol=1e-6)
