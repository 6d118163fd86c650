"""TF_CONFIG is understood as TensorFlow understands it, and refused with a reason where it is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dpsr_common.errors import UsageError
from dpsr_tf.training.cluster import Cluster

CLUSTER = {"chief": ["a:1"], "worker": ["b:1", "b:2"], "ps": ["c:1", "c:2"]}


def read(cluster: Any, task: Any) -> Cluster:
    return Cluster.from_environment({"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})})


@pytest.mark.parametrize("text", ["", "{}", '{"cluster": {}, "task": {}}'])
def test_without_a_cluster_a_process_trains_alone(text: str) -> None:
    assert Cluster.from_environment({"TF_CONFIG": text}) == Cluster("chief", 0, 1, 0)
    assert Cluster.from_environment({}).is_local


@pytest.mark.parametrize(
    ("task", "index", "worker_index"),
    [("chief", 0, 0), ("worker", 0, 1), ("worker", 1, 2), ("ps", 1, 0), ("evaluator", 0, 0)],
)
def test_each_task_knows_its_part(task: str, index: int, worker_index: int) -> None:
    cluster = read(CLUSTER, {"type": task, "index": index})
    assert cluster == Cluster(task, index, num_workers=3, num_ps=2)
    assert cluster.worker_index == worker_index
    assert not cluster.is_local


@pytest.mark.parametrize(
    ("cluster", "task", "expected"),
    [
        (CLUSTER, {"type": "worker", "index": 2}, "index is 2, expected 0 to 1"),
        (CLUSTER, {"type": "worker", "index": True}, "index is True"),
        (CLUSTER, {"type": "worker"}, "index is None"),
        (CLUSTER, {"type": "master", "index": 0}, "type is 'master', expected one of chief, worker, ps, evaluator"),
        (CLUSTER, None, "task is None"),
        ({**CLUSTER, "chief": []}, {"type": "ps", "index": 0}, "cluster has 0 chiefs"),
        ({**CLUSTER, "ps": []}, {"type": "chief", "index": 0}, "2 workers beside the chief and no ps"),
        ({**CLUSTER, "ps": ["c:1", "a:1"]}, {"type": "chief", "index": 0}, "a:1 is listed more than once"),
        ({**CLUSTER, "ps": ["c"]}, {"type": "chief", "index": 0}, "ps is ['c'], expected a list of HOST:PORT"),
        ({**CLUSTER, "ps": "c:1"}, {"type": "chief", "index": 0}, "ps is 'c:1', expected a list of HOST:PORT"),
        ({**CLUSTER, "ps": ["c:0"]}, {"type": "chief", "index": 0}, "expected a list of HOST:PORT"),
        ({**CLUSTER, "boss": ["d:1"]}, {"type": "chief", "index": 0}, "cluster has 'boss'"),
        ([], {"type": "chief", "index": 0}, "cluster is []"),
    ],
)
def test_what_is_wrong_is_named(cluster: Any, task: Any, expected: str) -> None:
    with pytest.raises(UsageError) as error:
        read(cluster, task)
    assert expected in str(error.value)
    assert str(error.value).startswith("TF_CONFIG")


def test_no_json_is_named() -> None:
    with pytest.raises(UsageError, match="TF_CONFIG is not valid JSON"):
        Cluster.from_environment({"TF_CONFIG": "{cluster"})
