"""`dpsr launch` as users have it: real processes, really killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from dpsr_tf.config import Config
from dpsr_tf.data.ranking_features import RankingFeatures
from dpsr_tf.models.encoders import exact_search
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.ranker_scores import ranker_scores
from dpsr_tf.training.train import config_from_flags, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SMALL = ["train.batch_size=32", "model.token_dim=32", "model.embedding_dim=32", "train.learning_rate=0.05"]


def sets(*assignments):
    return [f"--set={assignment}" for assignment in (*SMALL, *assignments)]


def weights(path):
    """Every variable of the last checkpoint, the optimizer's too."""
    checkpoint = tf.train.latest_checkpoint(str(path))
    return {name: tf.train.load_variable(checkpoint, name) for name, _ in tf.train.list_variables(checkpoint)}


@pytest.mark.distributed
def test_a_cluster_begins_with_another_model(launch, shop_store, tmp_path):
    """The chief loads all tables, which lie in pieces on two parameter servers, once."""
    old = train(shop_store, config_from_flags(None, [*SMALL, "train.steps=200"]), tmp_path / "old")
    options = ["train.steps=20", "cluster.placement=rows", "train.learning_rate=1e-8", "train.average_decay=0.9"]
    cluster = launch("--ps=2", "--workers=2", f"--store={shop_store.path}", f"--out={tmp_path / 'model'}",
                     f"--warm_start={old.path}", *sets(*options))  # fmt: skip
    assert cluster.end() == 0, cluster.text()
    lines = [line for line in cluster.lines if "warm start from" in line]
    tokens = len(shop_store.vocabulary)
    assert len(lines) == 1 and lines[0].startswith("chief 0: "), cluster.text()
    assert f"{tokens:,} of {tokens:,} tokens" in lines[0]
    before, after = weights(old.path), weights(tmp_path / "model")
    for name, value in before.items():
        if name != "global_step" and "Adagrad" not in name:
            np.testing.assert_allclose(after[name], value, atol=1e-4, err_msg=name)
            np.testing.assert_allclose(after[f"{name}/ExponentialMovingAverage"], value, atol=1e-4, err_msg=name)


def test_a_cluster_trains_to_its_end(launch, shop_store, tmp_path):
    """With every option of a cluster, and an evaluator."""
    model = tmp_path / "model"
    options = ["train.steps=1500", "train.checkpoint_steps=500", "validation.queries=200", "validation.recall_at=10"]
    options += ["cluster.placement=rows", "cluster.half_on_wire=true"]
    cluster = launch("--ps=2", "--workers=2", f"--store={shop_store.path}", f"--out={model}", *sets(*options))
    tasks = [("ps", 0), ("ps", 1), ("chief", 0), ("worker", 0), ("evaluator", 0)]
    cluster.until(lambda: all(cluster.task(*task) for task in tasks))
    assert cluster.end() == 0, cluster.text()
    names = {line.partition(": ")[0] for line in cluster.lines}
    assert names <= {f"{kind} {index}" for kind, index in tasks}, "every line says whose it is"

    final = weights(model)
    assert 1500 <= final["global_step"] <= 1502, "each worker may be one step ahead"
    chief, worker = cluster.steps_of("chief 0"), cluster.steps_of("worker 0")
    assert len(chief) == len(worker) == 1 and chief[0] > 0 and worker[0] > 0, cluster.text()
    # The worker's last step may come after the chief's last checkpoint.
    assert final["global_step"] <= sum(chief + worker) <= 1502, "every step of every worker is counted"

    local = train(shop_store, config_from_flags(None, [*SMALL, "train.steps=1"]), tmp_path / "local")
    assert {name: value.shape for name, value in final.items()} == {
        name: value.shape for name, value in weights(local.path).items()
    }, "a checkpoint is the same whatever the placement"
    lines = [json.loads(line) for line in (model / "validation.jsonl").read_text().splitlines()]
    # The evaluator measures the first checkpoint of the last step. The chief writes one more if a worker was still on
    # its way then.
    assert 1500 <= lines[-1]["step"] <= final["global_step"]
    assert lines[-1]["recall@10"] > 0.3, "chance is 0.005"
    best = json.loads((model / "best" / "measured.json").read_text())
    assert best in lines and best["recall@10"] == max(line["recall@10"] for line in lines)
    exact_search(model / "best", shop_store)


OWN = [
    "model.encoder=own_encoders:TwoLayers",
    "model.hidden=[16]",
    "train.dense_optimizer=adam",
    "train.dense_learning_rate=0.001",
    "train.schedule=cosine",
    "train.warmup_steps=100",
    "train.steps=700",  # with more, powers of Adam's decay underflow, which threads do in two ways
]

QUANTIZER = [
    "quantizer.sub_spaces=4",
    "quantizer.bits=4",
    "quantizer.lists=8",
    "quantizer.start_step=150",
    "train.average_decay=0.9",
]

RESIDUAL = [*QUANTIZER, "quantizer.codes=residual", "quantizer.rotation=none"]

GRAPH = ["model.graph_fan_out=[4,2]"]

REWRITER = [
    "model.kind=rewriter",
    "model.embedding_dim=64",  # the default, which is not used
    "rewriter.inner_width=32",
    "rewriter.click_pairs=16",
    "rewriter.sampled_words=100",
    "train.dense_optimizer=adam",
    "train.dense_learning_rate=0.001",
    "train.steps=300",
]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("killed", "more"),
    [
        pytest.param("ps", [], id="ps"),
        pytest.param("ps", QUANTIZER, id="ps, with a quantizer"),
        pytest.param("ps", RESIDUAL, id="ps, with residual codes"),
        pytest.param("chief", [], id="chief"),
        pytest.param("ps", GRAPH, id="ps, with a graph"),
        pytest.param("ps", REWRITER, id="ps, a rewriter"),
        pytest.param("ps", OWN, id="ps, with an own encoder, Adam and a schedule"),
    ],
)
def test_one_worker_and_a_kill_are_the_training_of_one_process(launch, shop_store, tmp_path, monkeypatch, killed, more):
    """To the bit: variables, accumulators and the position in the log come back from the checkpoint."""
    encoders = str(Path(__file__).resolve().parents[1] / "dpsr_tf")
    monkeypatch.setenv("PYTHONPATH", encoders)
    monkeypatch.syspath_prepend(encoders)
    model, options = tmp_path / "model", ["train.steps=800", "train.checkpoint_steps=100", *more]
    cluster = launch("--ps=1", "--workers=1", f"--store={shop_store.path}", f"--out={model}", *sets(*options))
    cluster.until_checkpoint(model, 200)
    cluster.kill(killed)
    assert cluster.end() == 0, cluster.text()
    config = config_from_flags(None, [*SMALL, *options])
    local = train(shop_store, config, tmp_path / "local")
    expected, found = weights(local.path), weights(model)
    assert set(found) == set(expected) and found["global_step"] == config.train.steps
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def kill_the_worker(cluster):
    """Kills the worker that is not the chief, and returns when its successor trains.

    The chief stands still meanwhile, so that steps are left for the new worker, however slowly it starts.
    """
    chief = cluster.task("chief")
    os.kill(chief, signal.SIGSTOP)
    cluster.until(lambda: len(cluster.starts_of("worker 0")) == 1)
    cluster.kill("worker")
    cluster.until(lambda: len(cluster.starts_of("worker 0")) == 2)
    os.kill(chief, signal.SIGCONT)


@pytest.mark.distributed
def test_training_goes_on_without_a_killed_worker(launch, shop_store, tmp_path):
    model, options = tmp_path / "model", ["train.steps=1500", "train.checkpoint_steps=100"]
    cluster = launch("--ps=1", "--workers=2", f"--store={shop_store.path}", f"--out={model}", *sets(*options))
    cluster.until_checkpoint(model, 100)
    kill_the_worker(cluster)
    assert cluster.end() == 0, cluster.text()
    assert cluster.starts_of("worker 0")[-1] >= 100, "it goes on where the others are"
    assert cluster.starts_of("chief 0") == [0], "the chief goes on"
    assert cluster.steps_of("worker 0")[0] > 0
    assert 1500 <= weights(model)["global_step"] <= 1502


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("quantizer", "shape"),
    [pytest.param(QUANTIZER, (4, 16, 8), id="product codes"), pytest.param(RESIDUAL, (4, 16, 32), id="residual codes")],
)
def test_a_quantizer_is_trained_without_a_killed_worker(launch, shop_store, tmp_path, quantizer, shape):
    """The chief starts it, all train it, and the frozen towers stay as they were."""
    model, options = tmp_path / "model", ["train.steps=4000", "train.checkpoint_steps=100", *quantizer]
    options.append("cluster.half_on_wire=true")
    cluster = launch("--ps=2", "--workers=2", f"--store={shop_store.path}", f"--out={model}", *sets(*options))
    cluster.until(
        lambda: "worker 0: training from step" in cluster.text().partition("worker 0: waits until the chief has")[2]
    )
    # The chief waits until a new worker trains, so that steps are left for it.
    chief = cluster.task("chief")
    os.kill(chief, signal.SIGSTOP)
    assert len(re.findall(r"^chief 0: quantizer starts at step 15\d: 2,000 items", cluster.text(), re.M)) == 1
    at, starts = last_step(model), len(cluster.starts_of("worker 0"))
    cluster.kill("worker")
    cluster.until(lambda: len(cluster.starts_of("worker 0")) > starts)
    os.kill(chief, signal.SIGCONT)
    assert cluster.end() == 0, cluster.text()
    assert cluster.starts_of("worker 0")[-1] >= at, "it goes on where the others are"
    assert cluster.steps_of("worker 0")[-1] > 0
    found = weights(model)
    assert 4000 <= found["global_step"] <= 4002
    for name, value in found.items():
        assert np.isfinite(value).all(), name
        if f"{name}/ExponentialMovingAverage" in found:
            np.testing.assert_array_equal(value, found[f"{name}/ExponentialMovingAverage"], err_msg=name)
    assert found["quantizer/codebooks"].shape == shape and np.abs(found["quantizer/codebooks/Adam"]).max() > 0


@pytest.mark.distributed
def test_training_goes_on_without_whom_is_killed(launch, shop_store, tmp_path):
    """A worker, then a parameter server, of two each."""
    model, options = tmp_path / "model", ["train.steps=8000", "train.checkpoint_steps=200"]
    arguments = ["--ps=2", "--workers=2", f"--store={shop_store.path}", f"--out={model}"]
    cluster = launch(*arguments, *sets(*options))
    cluster.until_checkpoint(model, 400)
    kill_the_worker(cluster)
    assert cluster.starts_of("worker 0")[-1] >= 400, "it goes on where the others are"

    at = last_step(model)
    worker = cluster.task("worker")
    os.kill(worker, signal.SIGSTOP)  # it would go on before the chief has read the step
    cluster.kill("ps", 1)
    cluster.until(lambda: len(cluster.starts_of("chief 0")) > 1)
    os.kill(worker, signal.SIGCONT)
    assert at <= cluster.starts_of("chief 0")[-1] <= last_step(model), "both ps go on from the last checkpoint"
    assert cluster.end() == 0, cluster.text()
    assert cluster.steps_of("worker 0")[0] > 0
    assert 8000 <= weights(model)["global_step"] <= 8002
    assert all(np.isfinite(value).all() for value in weights(model).values())


def last_step(model: Path) -> int:
    return int(tf.train.latest_checkpoint(str(model)).rpartition("-")[2])


@pytest.mark.distributed
def test_no_better_figures_stop_the_cluster(launch, shop_store, tmp_path):
    """Weights that hardly move: the first measurement stays the best."""
    model = tmp_path / "model"
    options = ["train.steps=1000000", "train.checkpoint_steps=200", "train.learning_rate=1e-8"]
    options += ["validation.queries=50", "validation.patience=2"]
    cluster = launch("--ps=1", "--workers=2", f"--store={shop_store.path}", f"--out={model}", *sets(*options))
    assert cluster.end() == 0, cluster.text()
    assert re.search(
        r"^chief 0: model .*: training has stopped: 2 measurements brought no better recall@100", cluster.text(), re.M
    )
    assert 600 <= last_step(model) < 1_000_000


@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_who_ends_the_launcher_ends_everything(launch, shop_store, tmp_path, number):
    model = tmp_path / "model"
    options = sets("train.steps=1000000", "train.checkpoint_steps=100")
    cluster = launch("--ps=2", "--workers=2", f"--store={shop_store.path}", f"--out={model}", *options)
    cluster.until_checkpoint(model, 100)
    assert all(cluster.task(*task) for task in [("ps", 0), ("ps", 1), ("chief", 0), ("worker", 0)])
    os.kill(cluster.process.pid, number)
    assert cluster.end() == (-number if number == signal.SIGKILL else 128 + number)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--set=train.stepz=3"], 2, "unknown key 'stepz'"),
        (["--stepz=3"], 2, "Unknown command line flag 'stepz'"),
        (["--set=model.item_features=[weight]"], 2, "'weight'"),
        (["--store=nowhere"], 1, "nowhere: holds no store"),
        (["--workers=0"], 2, "workers"),
    ],
)
def test_what_is_wrong_is_said_once(dpsr, shop_store, tmp_path, flags, status, message):
    found = dpsr("launch", "--ps=2", "--workers=2", f"--store={shop_store.path}", f"--out={tmp_path / 'model'}", *flags)
    found.fails(status, "dpsr launch: error: ", message)
    assert not found.out
    assert not (tmp_path / "model").exists()


@pytest.mark.distributed
def test_a_task_that_fails_ends_everything(launch, shop_store, tmp_path):
    """A damaged file, found when its bytes are read: who meets it says so, and nothing is started again."""
    store = tmp_path / "store"
    shutil.copytree(shop_store.path, store)
    path = store / "interactions.dpsr"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    cluster = launch("--ps=2", "--workers=2", f"--store={store}", f"--out={tmp_path / 'model'}", *sets())
    assert cluster.end() == 1
    assert re.match("dpsr launch: error: (chief|worker) 0 failed with status 1;", cluster.lines[-1]), cluster.text()
    assert "restarting it" not in cluster.text()
    assert f"{path}: " in cluster.text(), "whichever meets it first says which file"


@pytest.mark.distributed
def test_the_restarts_are_used_up(launch, shop_store, tmp_path):
    cluster = launch(
        "--ps=1", "--workers=1", f"--store={shop_store.path}", f"--out={tmp_path / 'model'}", "--max_restarts=0"
    )
    cluster.until(lambda: cluster.task("chief") is not None)
    os.kill(cluster.task("chief"), signal.SIGKILL)
    assert cluster.end() == 1
    assert cluster.lines[-1].startswith("dpsr launch: error: chief 0 was ended by SIGKILL, and no restart is left")


@pytest.mark.distributed
def test_recall_is_that_of_local_training(launch, shop_store, tmp_path):
    """Three seeds of 2 workers and 2 ps against three of one process: less than two pooled standard deviations."""
    recalls: dict[str, list[float]] = {"local": [], "cluster": []}
    options = ["train.steps=2000", "train.checkpoint_steps=2000", "validation.queries=600", "validation.recall_at=10"]
    for seed in (1, 2, 3):
        assignments = [*SMALL, *options, f"train.seed={seed}"]
        config: Config = config_from_flags(None, assignments)
        train(shop_store, config, tmp_path / f"local{seed}")
        flags = [f"--set={assignment}" for assignment in assignments]
        model = tmp_path / f"cluster{seed}"
        cluster = launch("--ps=1", "--workers=2", f"--store={shop_store.path}", f"--out={model}", *flags)
        assert cluster.end() == 0, cluster.text()
        assert cluster.steps_of("worker 0")[0] > 0, "a cluster of one worker shows nothing"
        for name, values in recalls.items():
            record = (tmp_path / f"{name}{seed}" / "validation.jsonl").read_text().splitlines()[-1]
            values.append(json.loads(record)["recall@10"])
    pooled = np.sqrt(np.mean([np.var(values, ddof=1) for values in recalls.values()]))
    difference = np.mean(recalls["cluster"]) - np.mean(recalls["local"])
    print(f"recall@10 {recalls}, difference {difference:+.4f}, pooled standard deviation {pooled:.4f}")
    assert abs(difference) < 2 * pooled, recalls
    assert min(recalls["local"]) > 0.3, "chance is 0.005"


@pytest.mark.distributed
def test_a_cluster_begins_a_ranker_that_reads_numbers(launch, shop_store, tmp_path):
    options = ["model.kind=ranker", "model.hidden=[16]", "model.token_dim=8", "train.batch_size=16", "train.steps=8"]
    cluster = launch(
        "--ps=1", "--workers=1", f"--store={shop_store.path}", f"--out={tmp_path}/m", *(f"--set={o}" for o in options)
    )
    assert cluster.end() == 0, cluster.text()
    numbers = ModelDirectory.open(tmp_path / "m").features.numbers
    train(shop_store, config_from_flags(None, options), tmp_path / "alone")
    assert numbers and numbers == ModelDirectory.open(tmp_path / "alone").features.numbers


@pytest.mark.distributed
def test_a_cluster_goes_on_with_a_ranker(launch, shop_store, tmp_path):
    """A ranker that was trained alone is trained on by chief, worker and parameter server."""
    model = tmp_path / "ranker"
    options = ["model.kind=ranker", "model.hidden=[16]", "model.token_dim=8", "model.history_length=8"]
    options += ["train.batch_size=16", "train.checkpoint_steps=8", "cluster.half_on_wire=true"]
    train(shop_store, config_from_flags(None, [*options, "train.steps=8"]), model)
    begun = weights(model)
    flags = [f"--set={option}" for option in (*options, "train.steps=40")]
    cluster = launch("--ps=1", "--workers=2", f"--store={shop_store.path}", f"--out={model}", *flags)
    assert cluster.end() == 0, cluster.text()
    assert cluster.starts_of("chief 0") == [8], cluster.text()
    final = weights(model)
    assert 40 <= final["global_step"] <= 42, "each worker may be one step ahead"
    assert begun.keys() == final.keys()
    assert all(np.isfinite(value).all() for value in final.values())
    assert np.abs(final["ranker/logit/kernel"] - begun["ranker/logit/kernel"]).max() > 0
    score = ranker_scores(model, shop_store)
    shown = RankingFeatures(shop_store).of(shop_store.held_requests(), np.arange(5))
    assert np.isfinite(score(shown)).all()
