"""Clustered unit vectors, made from a seed, that the benchmarks of the index and of the servable share.

They imitate the embeddings of a catalogue. There is one topic for every 500 items. Topic t is drawn with probability
proportional to 1 / (t + 50), which is Zipf's law without its few giants: of 15 million items, the largest topic has
47,000 and the smallest has 80. Topics are grouped in sqrt(topics) departments. A vector is

    normalize(s * (0.6 department + 0.8 topic) + 0.7 * s_t * item)

where department, topic and item are standard normal. The spectrum s[i] is proportional to 1 / sqrt(i + 4), and its
squares add up to the dimension: as in learnt embeddings, few directions hold much of the variance. s_t is s rotated by
t places, so that each topic extends in its own directions. Two items of a topic have a cosine of 0.67 on average, two
items of a department 0.24, and others 0.

Queries are drawn like items, with another stream of random numbers: they have the same topics, but are not items.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

DIM = 64
ITEMS_PER_TOPIC = 500
_ZIPF_SHIFT = 50
_DEPARTMENT, _TOPIC, _ITEM = 0.6, 0.8, 0.7
_BLOCK = 1 << 18
# Stream of the random numbers of samples, above those of all blocks.
_SAMPLE_STREAM = 1 << 31


class Vectors:
    """The distribution of the vectors of a catalogue of `items` items.

    Attributes:
        items: number of items.
        dim: dimension of a vector.
        probabilities: float64 [topics], the probability of each topic.
    """

    def __init__(self, items: int, seed: int, dim: int = DIM):
        """Draws departments and topics. The same arguments give the same vectors."""
        self.items, self.dim, self._seed = items, dim, seed
        topics = max(1, items // ITEMS_PER_TOPIC)
        weights = 1 / (np.arange(topics) + _ZIPF_SHIFT)
        self.probabilities = weights / weights.sum()
        self._ends = np.cumsum(self.probabilities)
        spectrum = 1 / np.sqrt(np.arange(dim, dtype=np.float32) + 4)
        spectrum *= np.sqrt(dim / (spectrum**2).sum())
        rng = np.random.default_rng([seed, 0])
        departments = rng.standard_normal((round(np.sqrt(topics)), dim), np.float32)
        of_topic = rng.integers(0, len(departments), topics)
        own = rng.standard_normal((topics, dim), np.float32)
        self._centres = spectrum * (_DEPARTMENT * departments[of_topic] + _TOPIC * own)
        self._spectra = _ITEM * np.stack([np.roll(spectrum, turn) for turn in range(dim)])

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields the vectors of all items in blocks, float32 [at most 2^18, dim]. A block is drawn on each core.

        Nothing is drawn while the caller works on a block.
        """
        sizes = [min(_BLOCK, self.items - begin) for begin in range(0, self.items, _BLOCK)]
        together = len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(together) as pool:
            for first in range(0, len(sizes), together):
                numbers = range(first, min(first + together, len(sizes)))
                yield from list(pool.map(lambda number: self._draw(sizes[number], 2 + number)[0], numbers))

    def sample(self, count: int) -> np.ndarray:
        """Returns vectors of the same distribution as the items, float32 [count, dim], to train an index on."""
        return self._draw(count, _SAMPLE_STREAM)[0]

    def write(self, path: Path) -> np.ndarray:
        """Writes the vectors of all items to a .npy file and maps it: float32 [items, dim]."""
        mapped = np.lib.format.open_memmap(path, "w+", np.float32, (self.items, self.dim))
        begin = 0
        for block in self.blocks():
            mapped[begin : begin + len(block)] = block
            begin += len(block)
        mapped.flush()
        del mapped
        return np.load(path, mmap_mode="r")

    def kept(self, folder: Path) -> np.ndarray:
        """Maps the vectors of all items from a file in the folder, and writes the file first if it is missing."""
        path = folder / f"{self.items}-{self._seed}.npy"
        if not path.exists():
            partial = path.with_suffix(".part")
            self.write(partial)
            os.replace(partial, path)
        return np.load(path, mmap_mode="r")

    def queries(self, count: int) -> np.ndarray:
        """Returns query vectors, float32 [count, dim]."""
        return self._draw(count, 1)[0]

    def _draw(self, count: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns vectors and their topics."""
        rng = np.random.default_rng([self._seed, stream])
        topics = np.searchsorted(self._ends, rng.random(count), side="right").clip(max=len(self._ends) - 1)
        found = rng.standard_normal((count, self.dim), np.float32)
        found *= self._spectra[topics % self.dim]
        found += self._centres[topics]
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        return found, topics
