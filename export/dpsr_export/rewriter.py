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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from dpsr_common.errors import CommandError, op_message
from dpsr_common.typed_config import to_dict
from dpsr_export import request_tables, rewrite, rewrite_table, warmup
from dpsr_export.embeddings import checkpoint_fingerprint
from dpsr_export.index_files import MANIFEST_FORMAT, MANIFEST_VERSION, file_record
from dpsr_export.request_inputs import save_model, signature
from dpsr_export.rewrite_table import Found, RewriteTable
from dpsr_tf import __version__
from dpsr_tf.models.encoders import restore
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.rewriter_texts import RewriteGraph, without_long
from dpsr_tokenizer import Vocabulary, WordSequences

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
    with tempfile.TemporaryDirectory(prefix=".assets-", dir=out.parent) as name:
        assets = Path(name)
        _copy_table(table, assets)
        inputs = _write_saved_model(model, checkpoint, most, assets / rewrite_table.FILE, out)
    manifest = {
        "format": MANIFEST_FORMAT,
        "version": MANIFEST_VERSION,
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


def _write_saved_model(
    model: ModelDirectory, checkpoint: str, most: int, table: Path, out: Path
) -> dict[str, list[str]]:
    """Writes the SavedModel. Returns the names of the inputs of each signature."""
    with tf.Graph().as_default(), v1.Session() as session:
        query = v1.placeholder(tf.string, [None], "query")
        n = v1.placeholder_with_default(tf.constant(min(DEFAULT_N, most)), [], "n")
        seed = v1.placeholder_with_default(tf.constant(0, tf.int64), [], "seed")
        graph = RewriteGraph(model)
        fits = tf.logical_and(n >= 1, n <= most)
        message = f"expected 1 to {most}, the number of rewrites that this model was exported with (--max_rewrites)"
        with tf.control_dependencies([tf.debugging.Assert(fits, ["n is", n, message])]):
            count = tf.identity(n)
        texts = without_long(query)
        found = RewriteTable(table).find(texts, most)
        # Those that the model cannot read need no decoding to get no rewrites.
        found = found._replace(known=tf.logical_or(found.known, tf.logical_not(graph.readable(texts))))
        rewrites, scores = _known_or_decoded(found, texts, count, lambda tail: graph(tail, count, seed))
        request_tables.check_assets()
        # All ops are made before the session runs one.
        initializer = tf.group(v1.tables_initializer(), graph.compose)
        restore(model, session, checkpoint)
        outputs = {"rewrites": rewrites, "log_probabilities": scores}
        signatures = {
            "serving_default": signature({"query": query}, outputs),
            "rewrite": signature({"query": query, "n": n, "seed": seed}, outputs),
        }
        return save_model(session, signatures, initializer, out)


def _known_or_decoded(
    found: Found, queries: tf.Tensor, n: tf.Tensor, decode: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns what the table has for queries, and what `decode` writes for those that it does not have.

    Args:
        found: of the table, [b, most].
        queries: string [b].
        n: int32 [], the number of rewrites to return, at most `most`.
        decode: a function from queries, string [m], to rewrites and log-probabilities [m, n].

    Returns:
        Rewrites string [b, n] and log-probabilities float32 [b, n], padded with "" and -inf.
    """
    tail = tf.where(~found.known)[:, 0]
    # Only known queries, no decoding: a look-up takes microseconds.
    texts, scores = tf.cond(
        tf.size(tail) > 0,
        lambda: decode(tf.gather(queries, tail)),
        lambda: (tf.zeros(tf.stack([0, n]), tf.string), tf.zeros(tf.stack([0, n]))),
    )
    b = tf.size(queries)
    row = tf.where(found.known, tf.range(b), b + tf.cumsum(tf.cast(~found.known, tf.int32)) - 1)

    def joined(of_table: tf.Tensor, decoded: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(tf.gather(tf.concat([of_table[:, :n], decoded], 0), row), [None, None])

    return joined(found.rewrites, texts), joined(found.log_probabilities, scores)


# Requests.


def _tail(model: ModelDirectory) -> list[str]:
    """Returns queries that hardly anybody asks: pairs of the most frequent words."""
    words = [text.strip() for text in WordSequences(Vocabulary(str(model.words_path))).texts() if text.strip()]
    return [f"{one} {other}" for one, other in itertools.pairwise(words[: _REQUESTS + 1])]


def _finish(manifest: dict[str, Any], about: dict[str, Any] | None, table: Path | None, out: Path) -> dict[str, Any]:
    """Replays warm-up requests and writes assets.extra. Returns the latencies."""
    extra = out / "assets.extra"
    extra.mkdir()
    known = [] if table is None else _known(table)
    requests = []
    measured: dict[str, Any] = {"n": min(DEFAULT_N, manifest["max_rewrites"])}
    servable = warmup.LoadedServable(out)
    try:
        for what, queries in (("known", known), ("tail", manifest["tail"])):
            for texts in ([""], queries[:8], *([query] for query in queries)):
                requests.append(("rewrite", rewrite_inputs(texts, measured["n"])))
                _check(servable, requests[-1][1])
            if queries:
                p50, p99 = np.percentile(latencies(servable, queries, measured["n"]), [50, 99])
                measured |= {f"{what}_p50_ms": round(float(p50), 4), f"{what}_p99_ms": round(float(p99), 4)}
    finally:
        servable.close()
    warmup.write_warmup(extra / warmup.FILE, requests)
    manifest |= {
        "dpsr_version": __version__,
        "table": about,
        "measured": measured | {"hardware": f"{platform.machine()}, {os.cpu_count()} cores"},
        "files": {path.name: file_record(path) for path in sorted((out / "assets").iterdir())},
    }
    (extra / "dpsr_manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return measured


def latencies(servable: warmup.LoadedServable, queries: Sequence[str], n: int) -> np.ndarray:
    """Returns how long each query takes alone, in milliseconds: float64 [queries]."""
    found = np.empty(len(queries))
    for place, query in enumerate(queries):
        inputs = rewrite_inputs([query], n)
        start = time.perf_counter()
        servable("rewrite", inputs)
        found[place] = (time.perf_counter() - start) * 1000
    return found


def rewrite_inputs(queries: Sequence[str], n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns the inputs of the signature `rewrite`."""
    texts = np.empty(len(queries), object)
    texts[:] = [query.encode() for query in queries]
    return {"query": texts, "n": np.array(n, np.int32), "seed": np.array(seed, np.int64)}


def _known(table: Path) -> list[str]:
    """Returns queries of a table that have rewrites."""
    with gzip.open(table / rewrite.LIST, "rt", encoding="utf-8") as lines:
        queries = dict.fromkeys(line.partition("\t")[0] for line in lines)
        return list(itertools.islice(queries, _REQUESTS))


def _check(servable: warmup.LoadedServable, inputs: Mapping[str, np.ndarray]) -> None:
    """Sends a request. Raises CommandError if the answer is an error or not one of a rewriter."""
    try:
        found = servable("rewrite", inputs)
    except tf.errors.OpError as error:
        raise CommandError(f"the servable does not answer its warm-up requests: {op_message(error)}") from None
    texts, scores = found["rewrites"], found["log_probabilities"]
    expected = (len(inputs["query"]), int(inputs["n"]))
    if texts.shape != expected or scores.shape != expected or ((texts != b"") != np.isfinite(scores)).any():
        raise CommandError(
            "the servable does not give a finite log-probability for each rewrite; train the model again"
        )
