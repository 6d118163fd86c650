"""Cursors: the list of a search as a text, which the client sends back for the next page.

The list is carried, not made again. So pages neither overlap nor leave gaps when models, rules or deadlines give
another order meanwhile, and a page costs no search. A cursor is base64 of

    crc32 (4 bytes), fingerprint of the catalogue (8), place of the next page (4), length of the JSON (4),
    JSON: query, pipeline, arm, ...
    rows uint32, scores float32, variants uint8, sources uint16    one of each for every item

It is not signed: whoever forges one sees items of the catalogue, which any search shows.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HEAD = struct.Struct("<I8sII")
_ITEM = 11  # bytes


@dataclasses.dataclass(frozen=True, eq=False)
class List:
    """The list of a search, n items, best first, and what each page repeats.

    Attributes:
        filters: digest of the filters.
        rows: [n] rows of the catalogue.
        scores: [n], NaN for none.
        variants: [n], at most 255 is kept.
        sources: [n] uint16, masks of the sources that found each item.
    """

    query: str
    pipeline: str
    arm: str
    filters: str
    degraded: tuple[str, ...]
    rewrites: tuple[str, ...]
    rows: NDArray[np.int64]
    scores: NDArray[np.floating[Any]]
    variants: NDArray[np.int64]
    sources: NDArray[np.uint16]


def fingerprint(manifest: Mapping[str, Any]) -> bytes:
    """Returns 8 bytes that tell one catalogue from another."""
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=8).digest()


def digest(filters: Mapping[str, Any]) -> str:
    """Returns a text that tells filters from others; "" for none."""
    if not filters:
        return ""
    return hashlib.blake2b(json.dumps(filters, sort_keys=True).encode(), digest_size=8).hexdigest()


def pack(listed: List, begin: int, of_catalogue: bytes) -> str:
    """Returns the cursor of the page that begins at the place `begin` of the list."""
    said = [
        listed.query,
        listed.pipeline,
        listed.arm,
        listed.filters,
        listed.degraded,
        listed.rewrites,
    ]
    text = json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode()
    body = b"".join(
        (
            _HEAD.pack(0, of_catalogue, begin, len(text))[4:],
            text,
            listed.rows.astype("<u4").tobytes(),
            listed.scores.astype("<f4").tobytes(),
            np.minimum(listed.variants, 255).astype("u1").tobytes(),
            listed.sources.astype("<u2").tobytes(),
        )
    )
    return base64.urlsafe_b64encode(struct.pack("<I", zlib.crc32(body)) + body).decode()


def unpack(text: str, of_catalogue: bytes, num_items: int) -> tuple[List, int]:
    """Reads a cursor, and returns the list and the place of the page.

    Raises:
        ValueError: it is damaged, or of another catalogue.
    """
    damaged = "is damaged; send the next_cursor of an answer unchanged"
    try:
        data = base64.b64decode(text.encode(), b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(damaged) from None
    if len(data) < _HEAD.size:
        raise ValueError(damaged)
    checksum, found, begin, length = _HEAD.unpack_from(data)
    if zlib.crc32(data[4:]) != checksum:
        raise ValueError(damaged)
    if found != of_catalogue:
        raise ValueError("belongs to another index; search again")
    items, rest = divmod(len(data) - _HEAD.size - length, _ITEM)
    if items < 0 or rest:
        raise ValueError(damaged)
    try:
        query, pipeline, arm, filters, degraded, rewrites = json.loads(data[_HEAD.size : _HEAD.size + length])
        # Answers repeat them, so each must be a text that has a form in UTF-8.
        "".join([query, pipeline, arm, filters, *degraded, *rewrites]).encode()
    except (ValueError, TypeError, RecursionError):
        raise ValueError(damaged) from None
    columns, at = [], _HEAD.size + length
    for kind in ("<u4", "<f4", "u1", "<u2"):
        columns.append(np.frombuffer(data, kind, items, at))
        at += items * columns[-1].itemsize
    rows = columns[0].astype(np.int64)
    if (rows >= num_items).any() or begin > items:
        raise ValueError(damaged)
    listed = List(query, pipeline, arm, filters, tuple(degraded), tuple(rewrites), rows, *columns[1:])
    return listed, begin
