"""`dpsr export` of a rewriter: a servable with the signature `rewrite` (docs/rewriting.md)."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from dpsr_common.errors import CommandError, op_message
from dpsr_common.typed_config import to_dict
from dpsr_export import request_tables, rewrite, rewrite_table, servable_assets, warmup
from dpsr_export.embeddings import checkpoint_fingerprint
from dpsr_export.index import file_record
from dpsr_export.rewrite_table import RewriteTable, key_of
from dpsr_tf import __version__
from dpsr_tf.models.encoders import restore
from dpsr_tf.models.model_directory import ModelDirectory

v1 = tf.compat.v1

# Number of rewrites of a query where a request does not say it.
DEFAULT_N = 3
# Requests that are kept for warm-up and measurement.
_REQUESTS = 100


def export(model: ModelDirectory, table: Path | None, most: int, out: Path) -> dict[str, Any]:
    """Writes the servable of a rewriter into the directory `out`, and lets it answer its warm-up requests.

    Args:
        model: a rewriter. Its last checkpoint is exported.
        table: a directory that `dpsr rewrite` made with it; None for no table.
        most: the largest number of rewrites that a request may ask for.
        out: an empty directory.

    Returns:
        The entry `measured` of the manifest: latencies of queries of the table and of other ones.

    Raises:
        CommandError: the table is of another rewriter or damaged, the model cannot be exported, or the written servable
            does not answer.
    """
    checkpoint = model.last_checkpoint()
    fingerprint = checkpoint_fingerprint(checkpoint)
    about = None if table is None else rewrite.open_table(table, fingerprint)
    shutil.rmtree(out)  # the builder fails if the directory exists
    with tempfile.TemporaryDirectory(prefix=".assets-", dir=out.parent) as name:
        assets = Path(name)
        _copy_table(table, assets)
        inputs = _write_saved_model(model, checkpoint, most, assets / rewrite_table.FILE, out)
    manifest = {
        "format": servable_assets.MANIFEST_FORMAT,
        "version": servable_assets.MANIFEST_VERSION,
        "kind": "rewriter",
        "tensorflow_version": tf.__version__,
        "op_libraries": ["libdpsr_tokenizer_ops.so", "libdpsr_retrieval_ops.so"],
        "op_libraries_version": __version__,
        "checkpoint": Path(checkpoint).name,
        "checkpoint_fingerprint": fingerprint,
        "max_rewrites": most,
        "inputs": inputs,
        "config": to_dict(model.config),
        # Queries that are not in the table, for the warm-up of this version and of later ones.
        "tail": _tail(model),
    }
    return _finish(manifest, about, table, out)


def renew(old: Path, manifest: dict[str, Any], table: Path, out: Path) -> dict[str, Any]:
    """Copies a servable into the directory `out`, with another table of rewrites. Weights and graph stay.

    Args:
        old: the version directory of the servable.
        manifest: its manifest.
        table: a directory that `dpsr rewrite` made with the same rewriter.
        out: an empty directory.

    Returns:
        As export.

    Raises:
        CommandError: as export.
    """
    about = rewrite.open_table(table, manifest["checkpoint_fingerprint"])
    ignored = shutil.ignore_patterns("assets.extra", rewrite_table.FILE)
    shutil.copytree(old, out, dirs_exist_ok=True, ignore=ignored)
    _copy_table(table, out / "assets")
    request_tables.accept_assets(out, {rewrite_table.FILE})
    return _finish(manifest, about, table, out)


def _copy_table(table: Path | None, assets: Path) -> None:
    if table is None:
        rewrite_table.write({}, assets / rewrite_table.FILE)
    else:
        shutil.copyfile(table / rewrite_table.FILE, assets / rewrite_table.FILE)


# The graph.


def _write_saved_model(model: ModelDirectory, checkpoint: str, most: int, table: Path, out: Path) -> dict[str, list[str]]:
    """Writes the SavedModel. Returns the names of the inputs of each signature."""
    with tf.Graph().as_default(), v1.Session() as session:
        query = v1.placeholder(tf.string, [None], "query")
        n = v1.placeholder_with_default(tf.constant(min(DEFAULT_N, most)), [], "n")
        seed = v1.placeholder_with_default(tf.constant(0, tf.int64), [], "seed")
        raise NotImplementedError


def _known_or_decoded(found: rewrite_table.Found, queries: tf.Tensor, decode: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns what the table has for queries, and what `decode` writes for those that it does not have.

    Args:
        found: of the table, [b, n].
        queries: string [b].
        decode: a function from queries, string [m], to rewrites and log-probabilities [m, n], padded with "" and -inf.

    Returns:
        string and float32 [b, n].
    """
    tail = tf.where(~found.known)[:, 0]
    n = tf.shape(found.rewrites)[1]
    texts, scores = tf.cond(
        tf.size(tail) > 0,
        lambda: decode(tf.gather(queries, tail)),
        lambda: (tf.zeros([0, n], tf.string), tf.zeros([0, n])),
    )
    b = tf.size(queries)
    row = tf.where(found.known, tf.range(b), b + tf.cumsum(tf.cast(~found.known, tf.int32)) - 1)
    return (
        tf.gather(tf.concat([found.rewrites, texts], 0), row),
        tf.gather(tf.concat([found.log_probabilities, scores], 0), row),
    )
