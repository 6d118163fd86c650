"""Assigns users to the arms of an experiment, by a pure function, so that logs can be joined offline.

    assign("ranker-v2", "user-17", {"treatment": 10, "control": 90})

The rule, to be implemented in any language: compute SHA-256 of the experiment's name in UTF-8, a zero byte, the key.
Read its first 8 bytes as a big-endian integer and divide by 2**64, which gives a number u in [0, 1). The arms divide
[0, 1) in their order and in proportion to their weights; the user is in the arm whose part contains u. Experiments with
different names split users independently.

To let an arm grow without losing users that it already has, put it first: its part then only extends to the right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


def assign(experiment: str, key: str | bytes, weights: Mapping[str, float]) -> str:
    """Returns the arm of `key`, one of the names in `weights`.

    Args:
        experiment: the experiment's name.
        key: the value of the metadata key, such as a user id.
        weights: arm -> weight above 0, in the order of the configuration; they need not sum to one.

    Raises:
        ValueError: there are no arms, or a weight is not above 0.
    """
    if not weights or not all(weight > 0 for weight in weights.values()):
        raise ValueError(f"weights: got {dict(weights)}, expected at least one arm, each with a weight above 0")
    text = key.encode() if isinstance(key, str) else key
    digest = hashlib.sha256(experiment.encode() + b"\0" + text).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64 * sum(weights.values())
    edge = 0.0
    for arm, weight in weights.items():
        edge += weight
        if point < edge:
            return arm
    return arm  # the last one: rounding can put u on its upper edge
