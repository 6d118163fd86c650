"""Random numbers of the generated shop: streams, weighted draws and Zipf weights."""

from __future__ import annotations

import zlib

import numpy as np

from dpsr_tf.shop.parameters import Parameters


def random_stream(parameters: Parameters, part: str, *numbers: int) -> np.random.Generator:
    """The random stream of one part of the work."""
    return np.random.default_rng([parameters.seed, zlib.crc32(part.encode()), *numbers])


def draw(sums: np.ndarray, begin: np.ndarray, end: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An index of each range [begin, end), int64 of their shape, by weights with running sums `sums` float64 [n + 1].

    Ranges are not empty; where all weights of a range are 0 its last index is drawn.
    """
    low, high = sums[begin], sums[end]
    at = np.searchsorted(sums, low + rng.random(low.shape) * (high - low), side="right") - 1
    return np.clip(at, begin, end - 1)


def running_sums(weights: np.ndarray) -> np.ndarray:
    """0 and the sums of the first 1, 2, ... weights, float64 [n + 1]."""
    return np.concatenate([[0.0], np.cumsum(weights, dtype=np.float64)])


def zipf(n: int, exponent: float) -> np.ndarray:
    """1 / rank ** exponent of ranks 1 to n, float64 [n], divided by its sum."""
    weights = np.arange(1, n + 1) ** -float(exponent)
    return weights / weights.sum()
