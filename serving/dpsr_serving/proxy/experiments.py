"""Which arm of an experiment a user is in: a pure function, so that logs can be joined offline.

    assign("ranker-v2", "user-17", {"treatment": 10, "control": 90})

The rule, for any language: take the first 8 bytes of SHA-256 of the experiment's name in UTF-8, a zero byte, and the
key; read them as a big-endian integer and divide by 2**64: a number u in [0, 1). The arms share [0, 1) in their order
by their weights, and u lies in one of them. Another experiment's name gives an independent split.

To let an arm grow without moving the users it has, put it first: its share then only extends to the right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


def assign(experiment: str, key: str | bytes, weights: Mapping[str, float]) -> str:
    """The arm of `key`, one of the names in `weights`.

    Args:
        experiment: the experiment's name.
        key: the value of the metadata key, such as a user id.
        weights: arm -> weight above 0, in the order of the configuration; they need not sum to one.

    Raises:
        ValueError: no arms, or a weight that is not above 0.
    """
    if not weights or not all(weight > 0 for weight in weights.values()):
        raise ValueError(f"weights must be arms with weights above 0, got {dict(weights)}")
    text = key.encode() if isinstance(key, str) else key
    digest = hashlib.sha256(experiment.encode() + b"\0" + text).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64 * sum(weights.values())
    edge = 0.0
    for arm, weight in weights.items():
        edge += weight
        if point < edge:
            return arm
    return arm  # of the last, should rounding leave u at its edge
