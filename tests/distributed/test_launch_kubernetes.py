"""`dpsr launch --kubernetes`: the manifests, and the part in the cluster that each pod sees."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from dpsr_tf.training.cluster import Cluster

PATHS = ["--store=/data/store", "--config=/data/config.yaml", "--out=/data/model"]
FLAGS = ["--kubernetes", "--image=registry.example.com/dpsr:1", *PATHS]


@pytest.fixture
def objects(dpsr):
    """Returns the objects that `dpsr launch --kubernetes ARGUMENTS...` prints, by name."""

    def printed(*arguments: str) -> dict[str, dict[str, Any]]:
        found = dpsr("launch", *FLAGS, *arguments)
        assert found.status == 0, found.errors
        return {f"{each['kind']} {each['metadata']['name']}": each for each in yaml.safe_load_all(found.out)}

    return printed


def pods(workload: dict[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """The name and the environment of each pod of a Job or StatefulSet, as Kubernetes makes them."""
    spec, name = workload["spec"], workload["metadata"]["name"]
    is_set = workload["kind"] == "StatefulSet"
    (container,) = spec["template"]["spec"]["containers"]
    index, config = container["env"]
    field = index["valueFrom"]["fieldRef"]["fieldPath"]
    source = "labels['apps.kubernetes.io/pod-index']" if is_set else (
        "annotations['batch.kubernetes.io/job-completion-index']"
    )  # fmt: skip
    assert field == f"metadata.{source}" and index["name"] == "INDEX"
    assert is_set or spec["completionMode"] == "Indexed", "only then there is an index"
    count = spec["replicas"] if is_set else spec["completions"]
    return [(f"{name}-{i}", {config["name"]: config["value"].replace("$(INDEX)", str(i))}) for i in range(count)]


def test_each_pod_has_its_place_and_its_address(objects):
    found = objects("--workers=3", "--ps=2", "--evaluator", "--name=shop", "--namespace=search", "--port=3000")
    service = found.pop("Service shop")
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert set(found) == {"StatefulSet shop-ps", "Job shop-chief", "Job shop-worker", "Job shop-evaluator"}
    parts, addresses = {}, set()
    for workload in found.values():
        assert workload["metadata"]["namespace"] == "search"
        template = workload["spec"]["template"]
        assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        # Only with this subdomain a pod has a name of its own.
        assert template["spec"]["subdomain"] == service["metadata"]["name"]
        command = template["spec"]["containers"][0]["command"]
        assert command[:2] == ["dpsr", "train"] and set(PATHS) <= set(command)
        for pod, environment in pods(workload):
            parts[pod] = Cluster.from_environment(environment)
            if "evaluator" not in pod:
                addresses.add(f"{pod}.shop:3000")
                assert f"{pod}.shop:3000" in environment["TF_CONFIG"]
    assert len(addresses) == 5
    assert parts == {
        "shop-ps-0": Cluster("ps", 0, 3, 2),
        "shop-ps-1": Cluster("ps", 1, 3, 2),
        "shop-chief-0": Cluster("chief", 0, 3, 2),
        "shop-worker-0": Cluster("worker", 0, 3, 2),
        "shop-worker-1": Cluster("worker", 1, 3, 2),
        "shop-evaluator-0": Cluster("evaluator", 0, 3, 2),
    }


def test_failures_that_are_final_end_a_job(objects):
    found = objects("--workers=1", "--ps_resources=cpu=500m,memory=64Gi", "--max_restarts=3")
    assert set(found) == {"Service dpsr-train", "StatefulSet dpsr-train-ps", "Job dpsr-train-chief"}
    job = found["Job dpsr-train-chief"]["spec"]
    assert job["template"]["spec"]["restartPolicy"] == "Never", "podFailurePolicy needs it"
    final = job["podFailurePolicy"]["rules"][0]
    assert final["action"] == "FailJob" and final["onExitCodes"]["values"] == [1, 2] and job["backoffLimit"] == 3
    (container,) = found["StatefulSet dpsr-train-ps"]["spec"]["template"]["spec"]["containers"]
    assert container["resources"] == {"requests": {"cpu": "500m", "memory": "64Gi"}, "limits": {"memory": "64Gi"}}


def test_schemas_of_kubernetes(objects):
    validate = pytest.importorskip("kubernetes_validate", reason="108 MB of schemas: pip install kubernetes-validate")
    for each in objects("--workers=3", "--ps=2", "--evaluator", "--namespace=search").values():
        validate.validate(each, validate.latest_version(), strict=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image="], "--image: is missing"),
        (["--hosts=a,b"], "--hosts: cannot be combined with --kubernetes"),
        (["--overwrite"], "--overwrite: cannot be combined with --kubernetes"),
        (["--name=Shop"], "--name=Shop: expected a letter, then"),
        (["--store=store"], "--store=store: expected a path below --mount=/data, as the pods see it"),
        (["--mount=/disk"], "--store=/data/store: expected a path below --mount=/disk"),
        (["--ps_resources=cpu=4"], "--ps_resources=cpu=4: expected cpu and memory, such as cpu=4,memory=8Gi"),
        (["--worker_resources=cpu=4,memory=8GB"], "--worker_resources=cpu=4,memory=8GB: expected cpu and memory"),
        (["--set=train.steps=$(5)"], "--set=train.steps=$(5): must not contain '$('"),
    ],
)
def test_wrong_flags_are_refused(dpsr, flags, message):
    found = dpsr("launch", *FLAGS, *flags)
    found.fails(2, "dpsr launch: error: ", message)
    assert not found.out
