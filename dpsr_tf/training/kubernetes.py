"""Kubernetes manifests of a training cluster: `dpsr launch --kubernetes`."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Any

import yaml
from absl import flags

from dpsr_common.errors import UsageError

# The longest name of a pod is that of a worker, "NAME-worker-INDEX", and may have 63 characters.
_MAX_NAME = 48
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?")
_HEADER = """\
# A training with {workers} workers, chief included, and {ps} parameter servers. When the chief is done, delete the
# parameter servers, which never end by themselves:
#
#     kubectl wait --for=condition=complete --timeout=-1s job/{name}-chief{namespace}
#     kubectl delete statefulset,job,service -l app={name}{namespace}
"""


def define_flags(values: flags.FlagValues) -> None:
    """Flags of `dpsr launch --kubernetes`."""

    def string(name: str, default: str, text: str) -> None:
        flags.DEFINE_string(name, default, f"for --kubernetes, {text}", flag_values=values)

    flags.DEFINE_boolean(
        "kubernetes",
        False,
        "print Kubernetes manifests of the cluster instead of starting it; --store, --out and --config are paths as "
        "the pods see them",
        flag_values=values,
    )
    string("image", "", "the image of all pods, in which `dpsr` with the extra `train` is installed")
    string("name", "dpsr-train", "the name of the training, which the names of all objects begin with")
    string("namespace", "", "the namespace of all objects; by default the one that kubectl uses")
    string("claim", "dpsr-data", "the PersistentVolumeClaim (ReadWriteMany) with store, config and room for the model")
    string("mount", "/data", "the directory of the pods where the claim is mounted")
    flags.DEFINE_boolean(
        "evaluator",
        False,
        "for --kubernetes, also run an evaluator; the config must have validation.queries above 0",
        flag_values=values,
    )
    for kind, what, default in (
        ("worker", "chief, each worker and the evaluator", ["cpu=4", "memory=8Gi"]),
        ("ps", "each parameter server", ["cpu=4", "memory=16Gi"]),
    ):
        flags.DEFINE_list(
            f"{kind}_resources",
            default,
            f"for --kubernetes, CPU and memory that {what} requests; the memory is its limit too",
            flag_values=values,
        )


def manifests(values: flags.FlagValues, arguments: list[str]) -> str:
    """Returns a headless Service, a StatefulSet of parameter servers, and Jobs of all others, as YAML.

    A pod's TF_CONFIG has the place of its index, which Kubernetes puts in. Statuses 1 and 2 of a task are final and
    end its Job; after any other failure the pod is replaced, `--max_restarts` times in each Job.

    Args:
        values: flags of `dpsr launch`.
        arguments: arguments of `dpsr` in every pod.

    Raises:
        UsageError: a flag is wrong; it names the flag.
    """
    _check(values, arguments)
    name, workers = values.name, values.workers - 1
    common = {"labels": {"app": name}}
    if values.namespace:
        common["namespace"] = values.namespace

    def metadata(suffix: str) -> dict[str, Any]:
        return {"name": f"{name}{suffix}", **common}

    def addresses(kind: str, count: int) -> list[str]:
        return [f"{name}-{kind}-{index}.{name}:{values.port}" for index in range(count)]

    cluster = {"chief": addresses("chief", 1), "ps": addresses("ps", values.ps)}
    if workers:
        cluster["worker"] = addresses("worker", workers)

    def template(kind: str) -> dict[str, Any]:
        label = "labels['apps.kubernetes.io/pod-index']"
        annotation = "annotations['batch.kubernetes.io/job-completion-index']"
        index = label if kind == "ps" else annotation
        resources = _resources(values, "ps_resources" if kind == "ps" else "worker_resources")
        container = {
            "name": "dpsr",
            "image": values.image,
            "command": ["dpsr", *arguments],
            "env": [
                {"name": "INDEX", "valueFrom": {"fieldRef": {"fieldPath": f"metadata.{index}"}}},
                {"name": "TF_CONFIG", "value": _tf_config(cluster, kind)},
            ],
            "ports": [{"name": "grpc", "containerPort": values.port}],
            "resources": {"requests": resources, "limits": {"memory": resources["memory"]}},
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
            "volumeMounts": [{"name": "data", "mountPath": values.mount}, {"name": "tmp", "mountPath": "/tmp"}],
        }
        return {
            "metadata": {"labels": {"app": name, "task": kind}},
            "spec": {
                "subdomain": name,
                "restartPolicy": "Always" if kind == "ps" else "Never",
                "automountServiceAccountToken": False,
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": 10001,
                    "fsGroup": 10001,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [container],
                "volumes": [
                    {"name": "data", "persistentVolumeClaim": {"claimName": values.claim}},
                    {"name": "tmp", "emptyDir": {}},
                ],
            },
        }

    def job(kind: str, count: int) -> dict[str, Any]:
        final = {"containerName": "dpsr", "operator": "In", "values": [1, 2]}
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": metadata(f"-{kind}"),
            "spec": {
                "completionMode": "Indexed",
                "completions": count,
                "parallelism": count,
                "backoffLimit": values.max_restarts,
                "podFailurePolicy": {
                    "rules": [
                        {"action": "FailJob", "onExitCodes": final},
                        {
                            "action": "Ignore",  # a pod that its node had no room for any more
                            "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                        },
                    ]
                },
                "template": template(kind),
            },
        }

    objects: list[dict[str, Any]] = [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata(""),
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": {"app": name},
                "ports": [{"name": "grpc", "port": values.port, "targetPort": "grpc"}],
            },
        },
        {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": metadata("-ps"),
            "spec": {
                "serviceName": name,
                "replicas": values.ps,
                "podManagementPolicy": "Parallel",
                "selector": {"matchLabels": {"app": name, "task": "ps"}},
                "template": template("ps"),
            },
        },
        job("chief", 1),
    ]
    if workers:
        objects.append(job("worker", workers))
    if values.evaluator:
        objects.append(job("evaluator", 1))
    namespace = f" -n {values.namespace}" if values.namespace else ""
    header = _HEADER.format(workers=values.workers, ps=values.ps, name=name, namespace=namespace)
    return header + yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes each object in full, where YAML would name a part that is written a second time."""

    def ignore_aliases(self, data: Any) -> bool:
        """Returns True."""
        return True


def _tf_config(cluster: dict[str, list[str]], kind: str) -> str:
    """Returns the TF_CONFIG of all tasks of a kind. Kubernetes replaces $(INDEX) by the variable of that name."""
    return json.dumps({"cluster": cluster, "task": {"type": kind, "index": "$(INDEX)"}}).replace(
        '"$(INDEX)"', "$(INDEX)"
    )


def _check(values: flags.FlagValues, arguments: list[str]) -> None:
    if not values.image:
        raise UsageError("--image: is missing; --kubernetes needs the image of the pods")
    if values.hosts:
        raise UsageError("--hosts: cannot be combined with --kubernetes; Kubernetes chooses the machines")
    if values.overwrite:
        raise UsageError("--overwrite: cannot be combined with --kubernetes; remove the model in the volume first")
    for flag in ("name", "namespace"):
        value = getattr(values, flag)
        if (value or flag == "name") and (not _NAME.fullmatch(value) or len(value) > _MAX_NAME):
            raise UsageError(
                f"--{flag}={value}: expected a letter, then letters, digits, '-', at most {_MAX_NAME}, lower-case"
            )
    for flag in ("store", "out", "config", "warm_start"):
        value = getattr(values, flag)
        if value is not None and PurePosixPath(values.mount) not in PurePosixPath(value).parents:
            raise UsageError(f"--{flag}={value}: expected a path below --mount={values.mount}, as the pods see it")
    for argument in arguments:
        if "$(" in argument:
            raise UsageError(f"{argument}: must not contain '$(', which Kubernetes would replace")


def _resources(values: flags.FlagValues, flag: str) -> dict[str, str]:
    """Returns the requests of a flag such as --ps_resources=cpu=4,memory=16Gi."""
    given = getattr(values, flag)
    pairs = dict(each.partition("=")[::2] for each in given)
    if set(pairs) != {"cpu", "memory"} or not all(_QUANTITY.fullmatch(value) for value in pairs.values()):
        raise UsageError(f"--{flag}={','.join(given)}: expected cpu and memory, such as cpu=4,memory=8Gi")
    return pairs
