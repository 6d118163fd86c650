"""The index that finds the row of an id in constant time; dpsr_tf/ops/id_index.h reads it."""

from __future__ import annotations

import numpy as np


def mix64(x: np.ndarray) -> np.ndarray:
    """Mixes the bits of uint64 [n] like Mix64 in dpsr_tf/ops/permutation.h."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def id_index(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups rows into buckets by the first k bits of the Mix64 of their id.

    2^k is the smallest power of two that is n or more, so a bucket holds one row on average.

    Args:
        ids: int64 [n], distinct.

    Returns:
        Where each bucket begins in the second array, int32 [2^k + 1], and the rows, int32 [n], ordered by bucket.
    """
    k = max(len(ids) - 1, 0).bit_length()
    bucket = (mix64(ids.astype(np.uint64)) >> np.uint64(64 - k)).astype(np.int64) if k else np.zeros(len(ids), np.int64)
    splits = np.zeros((1 << k) + 1, np.int32)
    np.cumsum(np.bincount(bucket, minlength=1 << k), out=splits[1:])
    return splits, np.argsort(bucket, kind="stable").astype(np.int32)
