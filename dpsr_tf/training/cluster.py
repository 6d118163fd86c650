"""Reads TF_CONFIG, which tells a process its part in a training cluster, before TensorFlow sees it.

Parameter servers hold the variables. The chief and the workers each train on their own part of the log and update the
variables without waiting for one another (asynchronous between-graph replication). An evaluator, if there is one,
measures checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from dpsr_common.errors import UsageError

TASK_TYPES = ("chief", "worker", "ps", "evaluator")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The cluster as one process sees it. Without TF_CONFIG, a single chief without parameter servers."""

    task_type: str = "chief"
    task_index: int = 0
    num_workers: int = 1  # the chief is one of them
    num_ps: int = 0

    @property
    def worker_index(self) -> int:
        """Number of this process's part of the log, 0 to num_workers - 1. The chief has part 0."""
        return self.task_index + 1 if self.task_type == "worker" else 0

    @property
    def is_local(self) -> bool:
        """Whether this process trains by itself."""
        return self.num_workers == 1 and self.num_ps == 0

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> Cluster:
        """Reads TF_CONFIG. Raises UsageError that names what is wrong in it."""
        text = environment.get("TF_CONFIG", "").strip()
        if not text:
            return Cluster()
        try:
            config = json.loads(text)
        except ValueError as error:
            raise UsageError(f"TF_CONFIG is not valid JSON: {error}; expected {_EXAMPLE}") from None
        cluster = _mapping(config, "cluster", "TF_CONFIG") if config != {} else {}
        if not cluster:
            return Cluster()
        unknown = [name for name in cluster if name not in TASK_TYPES]
        if unknown:
            raise UsageError(f"TF_CONFIG: cluster has '{unknown[0]}', expected only {', '.join(TASK_TYPES)}")
        for name, addresses in cluster.items():
            if not isinstance(addresses, list) or not all(_is_address(address) for address in addresses):
                raise UsageError(f"TF_CONFIG: cluster: {name} is {addresses!r}, expected a list of HOST:PORT")
        everyone = [address for addresses in cluster.values() for address in addresses]
        twice = sorted({address for address in everyone if everyone.count(address) > 1})
        if twice:
            raise UsageError(
                f"TF_CONFIG: cluster: {twice[0]} is listed more than once, expected a different address for each task"
            )
        if len(cluster.get("chief", [])) != 1:
            raise UsageError(f"TF_CONFIG: cluster has {len(cluster.get('chief', []))} chiefs, expected one")
        workers, ps = len(cluster.get("worker", [])), len(cluster.get("ps", []))
        if workers and not ps:
            raise UsageError(
                f"TF_CONFIG: cluster has {workers} workers beside the chief and no ps, expected at least one ps, "
                f"which holds the variables that they share"
            )
        task = _mapping(config, "task", "TF_CONFIG")
        kind, index = task.get("type"), task.get("index")
        if kind not in TASK_TYPES:
            raise UsageError(f"TF_CONFIG: task: type is {kind!r}, expected one of {', '.join(TASK_TYPES)}")
        # Estimator allows an evaluator that the cluster does not list: no process connects to it.
        count = max(1, len(cluster.get("evaluator", []))) if kind == "evaluator" else len(cluster.get(kind, []))
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < count:
            raise UsageError(
                f"TF_CONFIG: task: index is {index!r}, expected 0 to {count - 1}: the cluster has {count} {kind}"
            )
        return Cluster(kind, index, workers + 1, ps)


_EXAMPLE = '{"cluster": {"chief": ["host:port"], "worker": [...], "ps": [...]}, "task": {"type": "ps", "index": 0}}'


def _mapping(parent: Any, key: str, where: str) -> dict[str, Any]:
    value = parent.get(key) if isinstance(parent, dict) else None
    if not isinstance(value, dict):
        raise UsageError(f"{where}: {key} is {value!r}, expected {_EXAMPLE}")
    return value


def _is_address(address: Any) -> bool:
    found = re.fullmatch(r"\S+:(\d+)", address) if isinstance(address, str) else None
    return found is not None and 0 < int(found[1]) < 65536
