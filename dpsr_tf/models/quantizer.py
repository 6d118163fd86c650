"""The quantizer of a learned index: rotation, coarse centroids and codebooks, as NumPy arrays.

It is section 4 of JD's talk on search retrieval, and the layer of Poeem: z = x R; the coarse centroid nearest to z; the
residual split into M parts, each replaced by the nearest centroid of its codebook. T(x) = (coarse + product code) R^T
is what an index scores in the place of x. Training learns it (models/quantizer_layer.py), a checkpoint holds it, and
`dpsr index` makes a FAISS index of it.

With residual codes (Chen et al., Approximate nearest neighbor search by residual vector quantization, Sensors 2010) the
centroids of all M codebooks have d dimensions, and T(x) = coarse + sum of M centroids. R is the identity. Training
moves the centroids, so that items rank well. List and codes of an item do not follow: the encoder chooses them, and it
keeps the centroids that training began with.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dpsr_common.errors import CommandError

# Names of the variables in a checkpoint, in the order of Quantizer.arrays. Those of the encoder are for
# residual codes only.
VARIABLES = ROTATION, COARSE, CODEBOOKS, ENCODER_COARSE, ENCODER_CODEBOOKS = (
    "quantizer/rotation",
    "quantizer/coarse",
    "quantizer/codebooks",
    "quantizer/encoder_coarse",
    "quantizer/encoder_codebooks",
)
# Combinations of residual codes that are kept while codes are chosen one after the other.
BEAM = 16
# Rows whose distances to all centroids are in memory at the same time.
_BLOCK = 4096


class Encoder(NamedTuple):
    """The centroids by which residual codes are chosen: those that training began with.

    Attributes:
        coarse: float32 [lists, d].
        codebooks: float32 [M, 2^bits, d].
    """

    coarse: np.ndarray
    codebooks: np.ndarray


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """A quantizer with its values. d is the embedding_dim of the model.

    Attributes:
        rotation: R, float32 [d, d], orthogonal.
        coarse: coarse centroids in the rotated space, float32 [lists, d].
        codebooks: centroids of the residual's parts, float32 [M, 2^bits, d / M]; for residual codes
            [M, 2^bits, d].
        encoder: for residual codes only.
    """

    rotation: np.ndarray
    coarse: np.ndarray
    codebooks: np.ndarray
    encoder: Encoder | None = None

    @staticmethod
    def read(checkpoint: str) -> Quantizer:
        """Reads the quantizer of a checkpoint, "MODEL/model.ckpt-2000". Raises CommandError if it has none."""
        reader = tf.train.load_checkpoint(checkpoint)
        if not reader.has_tensor(CODEBOOKS):
            raise CommandError(
                f"{checkpoint}: has no trained quantizer, because it is of a step before quantizer.start_step; run "
                f"`dpsr train` to a later checkpoint"
            )
        return Quantizer.of_arrays([reader.get_tensor(name) for name in VARIABLES if reader.has_tensor(name)])

    @staticmethod
    def is_in(checkpoint: str | None) -> bool:
        """Returns whether a checkpoint has a quantizer; False for None."""
        return checkpoint is not None and tf.train.load_checkpoint(checkpoint).has_tensor(CODEBOOKS)

    @staticmethod
    def of_arrays(arrays: Iterable[np.ndarray]) -> Quantizer:
        """Returns the quantizer that has these `arrays`."""
        rotation, coarse, codebooks, *encoder = arrays
        return Quantizer(rotation, coarse, codebooks, Encoder(*encoder) if encoder else None)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """All values: rotation, coarse centroids, codebooks, and the encoder's."""
        return (self.rotation, self.coarse, self.codebooks, *(self.encoder or ()))

    @property
    def bits(self) -> int:
        """Number of bits of a code."""
        return int(self.codebooks.shape[1]).bit_length() - 1

    @property
    def code_bytes(self) -> int:
        """Number of bytes of an item's codes, without the number of its list."""
        return -(-len(self.codebooks) * self.bits // 8)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify the values."""
        digest = hashlib.sha256()
        for values in self.arrays:
            digest.update(f"{values.shape}".encode())
            digest.update(np.ascontiguousarray(values, np.float32).tobytes())
        return digest.hexdigest()[:16]

    @functools.cached_property
    def coder(self) -> Callable[[np.ndarray], np.ndarray]:
        """What chooses residual codes: see residual_coder."""
        assert self.encoder is not None
        return residual_coder(self.encoder.codebooks)

    def encode(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Quantizes vectors, as the layer does in training: the nearest centroid by Euclidean distance.

        Args:
            vectors: float32 [n, d].

        Returns:
            Numbers of the coarse centroids, int64 [n], and codes, uint8 [n, M]. Of equally near centroids, the one with
            the lower number. Residual codes: see residual_coder.
        """
        lists = np.empty(len(vectors), np.int64)
        codes = np.empty((len(vectors), len(self.codebooks)), np.uint8)
        coarse = self.encoder.coarse if self.encoder else self.coarse
        for begin in range(0, len(vectors), _BLOCK):
            end = begin + _BLOCK
            z = np.asarray(vectors[begin:end], np.float32) @ self.rotation
            lists[begin:end] = nearest(z, coarse)
            residual = z - coarse[lists[begin:end]]
            if self.encoder:
                codes[begin:end] = self.coder(residual)
                continue
            for m, part in enumerate(np.split(residual, len(self.codebooks), axis=1)):
                codes[begin:end, m] = nearest(part, self.codebooks[m])
        return lists, codes

    def decode(self, lists: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Returns T of each item from its list, int64 [n], and its codes, uint8 [n, M]: float32 [n, d]."""
        parts = [codebook[codes[:, m]] for m, codebook in enumerate(self.codebooks)]
        coded = np.sum(parts, axis=0) if self.encoder else np.concatenate(parts, axis=1)
        return (self.coarse[lists] + coded) @ self.rotation.T

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Returns T(x) of vectors, float32 [n, d] to float32 [n, d]."""
        return self.decode(*self.encode(vectors))


def nearest(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Returns the number of the centroid nearest to each row of x: [n, d] and [k, d] to int64 [n]."""
    return np.argmin((centroids**2).sum(axis=1) - 2 * (x @ centroids.T), axis=1)


def residual_coder(codebooks: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Returns what chooses residual codes by beam search, for a small squared error.

    FAISS does the work, on all cores. The same vectors get the same codes.

    Args:
        codebooks: float32 [M, 2^bits, d].

    Returns:
        A function of residuals, float32 [n, d], that returns codes, uint8 [n, M]. Threads may share it.
    """
    import faiss

    m, size, d = codebooks.shape
    bits = size.bit_length() - 1
    quantizer: Any = faiss.ResidualQuantizer(d, m, bits)
    quantizer.max_beam_size, quantizer.is_trained = BEAM, True
    faiss.copy_array_to_vector(np.ravel(codebooks).astype(np.float32), quantizer.codebooks)
    # Products of all pairs of centroids, instead of the residuals of all combinations: a sixth of the time.
    quantizer.use_beam_LUT = 1
    quantizer.compute_codebook_tables()

    def encode(residual: np.ndarray) -> np.ndarray:
        packed = quantizer.compute_codes(np.ascontiguousarray(residual, np.float32))
        return faiss.unpack_bitstrings(packed, m, bits).astype(np.uint8)

    return encode
