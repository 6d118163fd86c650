"""Random numbers of the generated shop: streams, weighted draws and Zipf weights."""

from __future__ import annotations

import zlib

import numpy as np

from dpsr_tf.shop.parameters import Parameters


def random_stream(parameters: Parameters, part: str, *numbers: int) -> np.random.Generator:
    """Returns the random stream of one part of the work, which no other part changes."""
    return np.random.default_rng([parameters.seed, zlib.crc32(part.encode()), *numbers])


def draw(sums: np.ndarray, begin: np.ndarray, end: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws an index from each range [begin, end) with probabilities by weight.

    Args:
        sums: running sums of the weights, float64 [n + 1].
        begin, end: int64 arrays of one shape. Ranges must not be empty.
        rng: the random stream.

    Returns:
        Indices, int64 of the shape of `begin`. Where all weights of a range are 0 it is the last index.
    """
    low, high = sums[begin], sums[end]
    at = np.searchsorted(sums, low + rng.random(low.shape) * (high - low), side="right") - 1
    return np.clip(at, begin, end - 1)


def running_sums(weights: np.ndarray) -> np.ndarray:
    """Returns 0 and the sums of the first 1, 2, ... weights, float64 [n + 1]."""
    return np.concatenate([[0.0], np.cumsum(weights, dtype=np.float64)])


def zipf(n: int, exponent: float) -> np.ndarray:
    """Returns 1 / rank ** exponent for ranks 1 to n, divided by their sum, float64 [n]."""
    weights = np.arange(1, n + 1) ** -float(exponent)
    return weights / weights.sum()
