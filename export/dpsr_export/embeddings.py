"""Embeddings of all items of a store, and of the queries that an index is measured with.

`item_embeddings.dpsr` is a packed file (memory-mapped, with checksums) of kind "item_embeddings":

    id           int64 [items]          the items that are indexed, by ascending id, then those that are not
    embedding    float32 [items * dim]  their unit vectors; zeros for items that are not indexed
    empty        int64 [..]             ids not indexed because no token or feature of the item is known: a zero vector
    not_finite   int64 [..]             ids not indexed because their vector holds a NaN or an infinity
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dpsr_common.errors import CommandError
from dpsr_common.files import link_or_copy, locked, replaced
from dpsr_common.packed_file import FormatError, PackedFile, PackedFileWriter
from dpsr_tf.data.store import Store
from dpsr_tf.data.user_requests import User
from dpsr_tf.models.encoders import is_personal, item_encoder, query_encoder
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.spark import run_tasks

KIND = "item_embeddings"
# If a larger share of the items has no finite embedding, training has diverged and the model is useless.
MAX_NOT_FINITE = 0.01
# Number of items in each of the files that are written on the way. A killed run loses at most one of them.
CHUNK = 1 << 16
_BATCH = 4096


class ItemEmbeddings:
    """An open item_embeddings.dpsr.

    Attributes:
        ids: int64 [n], the items that are indexed, ascending.
        vectors: float32 [n, dim], memory-mapped.
        num_empty: number of items that are not indexed because their vector is zero.
        num_not_finite: number of items that are not indexed because their vector holds a NaN or an infinity.
    """

    def __init__(self, path: Path, dim: int):
        """Opens the file. Raises FormatError or FileNotFoundError."""
        file = PackedFile(str(path), KIND)
        self.num_empty, self.num_not_finite = len(file["empty"]), len(file["not_finite"])
        count = len(file["id"]) - self.num_empty - self.num_not_finite
        self.ids = file["id"][:count]
        self.vectors = file["embedding"].reshape(-1, dim)[:count]


def checkpoint_fingerprint(checkpoint: str) -> str:
    """Returns 16 hex digits that identify the weights: a hash of the .index file, which has the tensors' checksums."""
    return hashlib.sha256(Path(f"{checkpoint}.index").read_bytes()).hexdigest()[:16]


def source_fingerprint(model: ModelDirectory, store: Store, checkpoint: str) -> str:
    """Returns 16 hex digits that identify what embeddings depend on: checkpoint, towers, items, and graph."""
    parts = [checkpoint_fingerprint(checkpoint), f"{model.vocabulary.fingerprint:016x}", repr(model.config.model)]
    read = ["items.dpsr"]
    if model.config.model.graph_fan_out:
        read += [name for name in store.manifest["files"] if name.startswith(("graph", "interactions"))]
    parts += [store.manifest["files"][name] for name in read]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@contextmanager
def kept_embeddings(index_dir: Path, source: str) -> Iterator[Path]:
    """Gives a hidden directory beside the index, for embeddings while the index is made. It is removed on success.

    A run that was killed or failed leaves its embeddings there, and the next run continues with them. An index that
    replaces one of the same source also reuses its embeddings. Embeddings of another checkpoint or store are removed.

    Args:
        index_dir: directory of the index. Its parent exists.
        source: source_fingerprint of the embeddings.

    Raises:
        CommandError: the directory cannot be made, or another process makes the same index.
    """
    busy = f"{index_dir}: another `dpsr index` makes this index; wait until it ends, or choose another --out"
    stem = f".{index_dir.name}.embeddings-"
    path = index_dir.resolve().parent / f"{stem}{source}"
    try:
        for other in path.parent.iterdir():
            if other != path and re.fullmatch(re.escape(stem) + "[0-9a-f]{16}", other.name):
                with locked(other, busy):
                    shutil.rmtree(other)
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise CommandError(f"{path}: cannot be made: {error.strerror}; choose another --out") from None
    with locked(path, busy):
        before = index_dir / f"{KIND}.dpsr"
        if before.is_file() and _source_of(index_dir) == source and not (path / before.name).exists():
            link_or_copy(before, path / before.name)
        try:
            yield path
        except BaseException:
            if not any(path.iterdir()):
                path.rmdir()
            raise
        shutil.rmtree(path)


def _source_of(index_dir: Path) -> object:
    try:
        return json.loads((index_dir / "index.json").read_text())["embeddings_source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def embed_items(model: ModelDirectory, store: Store, checkpoint: str, work: Path, session: Any = None) -> Path:
    """Embeds all items of a store, on all cores, and writes item_embeddings.dpsr in the directory `work`.

    Embeddings that an earlier call for the same checkpoint and store left in `work` are used again. Memory is bounded,
    because batches are read from the mapped store.

    Args:
        model: the model.
        store: has the items.
        checkpoint: the checkpoint, without a suffix.
        work: an existing directory.
        session: a SparkSession whose machines embed the items, and see model, store and `work` under the same paths;
            None is this machine.

    Returns:
        The path of the file. The head of this module describes its format.

    Raises:
        CommandError: the model was not trained on this store, the checkpoint cannot be read, more than
            MAX_NOT_FINITE of the embeddings hold a NaN or an infinity, or no item has an embedding.
    """
    path = work / f"{KIND}.dpsr"
    if _is_whole(path):
        return path
    ids = store.items()["id"]
    if (np.diff(ids) <= 0).any():
        raise CommandError(f"{store.path}: items.dpsr has an item id twice; ingest the log again")
    begins = range(0, len(ids), CHUNK)
    chunks = [_chunk_path(work, begin) for begin in begins]
    missing = [begin for begin, chunk in zip(begins, chunks, strict=True) if not _is_whole(chunk)]
    if session is None:
        embed = _Embedder(model, store, checkpoint, ids)
        with tqdm(total=len(ids), desc=f"{'embed items':<14}", unit=" items") as bar:
            for begin in begins:
                if begin in missing:
                    embed.write_chunk(work, begin)
                bar.update(min(CHUNK, len(ids) - begin))
    else:
        paths = tuple(os.path.abspath(path) for path in (model.path, store.path, checkpoint, work))
        run_tasks(session, functools.partial(_write_chunk_of_paths, paths), missing)
    with PackedFileWriter(str(path), KIND) as file:
        left_out = {name: np.concatenate([PackedFile(str(c), KIND)[name] for c in chunks]) for name in _LEFT_OUT}
        count, bad = sum(map(len, left_out.values())), len(left_out["not_finite"])
        if bad > MAX_NOT_FINITE * len(ids):
            raise CommandError(
                f"{model.path}: {bad:,} of {len(ids):,} item embeddings hold a NaN or an infinity; train the model "
                f"again with a lower train.learning_rate"
            )
        if count == len(ids):
            raise CommandError(f"{store.path}: no item has a text that the vocabulary knows; nothing can be indexed")
        for name, rest in (
            ("id", np.concatenate(list(left_out.values()))),
            ("embedding", np.zeros(count * model.config.model.embedding_dim, np.float32)),
        ):
            for chunk in chunks:
                file.append(name, PackedFile(str(chunk), KIND, verify=False)[name])
            file.append(name, rest)
        for name, which in left_out.items():
            file.add(name, which)
    for chunk in chunks:
        chunk.unlink()
    return path


_LEFT_OUT = ("empty", "not_finite")


class _Embedder:
    """Embeds items with all cores of this machine."""

    def __init__(self, model: ModelDirectory, store: Store, checkpoint: str, ids: np.ndarray):
        self._open = functools.partial(item_encoder, model, store, checkpoint)
        self._encode: Callable[[np.ndarray], np.ndarray] | None = None
        self._ids = ids

    def write_chunk(self, work: Path, begin: int) -> None:
        """Writes the embeddings of the items from row `begin` on, CHUNK or fewer."""
        end = min(begin + CHUNK, len(self._ids))
        batches = np.array_split(np.arange(begin, end), max(1, (end - begin) // _BATCH))
        if self._encode is None:
            self._encode = self._open()
            self._encode(batches[0][:1])  # builds the graph, which only one thread may do
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            embeddings = np.concatenate(list(threads.map(self._encode, batches)))
        ids, finite, empty = self._ids[begin:end], np.isfinite(embeddings).all(axis=1), ~embeddings.any(axis=1)
        kept = finite & ~empty
        # Spark may run a task twice at the same time.
        with replaced(_chunk_path(work, begin)) as path, PackedFileWriter(str(path), KIND) as file:
            file.add("id", ids[kept])
            file.add("embedding", np.ascontiguousarray(embeddings[kept]).reshape(-1))
            file.add("empty", ids[empty])
            file.add("not_finite", ids[~finite])


def _chunk_path(work: Path, begin: int) -> Path:
    return work / f"chunk-{begin:012}.dpsr"


def _write_chunk_of_paths(paths: Sequence[str], begin: int) -> None:
    """Does what _Embedder does in a task of Spark. `paths` are those of model, store, checkpoint and work."""
    model, store, checkpoint, work = paths
    _embedder(model, store, checkpoint).write_chunk(Path(work), begin)


@functools.lru_cache(maxsize=1)
def _embedder(model: str, store_path: str, checkpoint: str) -> _Embedder:
    """Opens model and store, which the tasks of a process share."""
    store = Store(store_path)
    return _Embedder(ModelDirectory.open(model), store, checkpoint, store.items()["id"])


def _is_whole(path: Path) -> bool:
    try:
        PackedFile(str(path), KIND)
    except (FormatError, FileNotFoundError):
        return False
    return True


def sample_queries(model: ModelDirectory, store: Store, checkpoint: str, count: int) -> tuple[np.ndarray, str]:
    """Samples query vectors to measure an index with. Each head of a query is one vector.

    They come from held-out interactions if the store has some, otherwise from the log, or from titles if there is no
    log. So a query is sampled as
    often as people ask it, and with user and time if the model reads them. The same call gives the same vectors.

    Returns:
        Vectors, float32 [at most count, dim], without zero vectors (there may be none), and a phrase for people that
        says which queries they are.
    """
    wanted = max(1, count // model.config.model.num_heads)
    texts, users, what = log_sample(store, wanted)
    if not texts:
        return np.zeros((0, model.config.model.embedding_dim), np.float32), what
    encode = query_encoder(model.path, store, Path(checkpoint).name)
    heads = encode(texts, users if is_personal(model.config.model) else None)
    vectors = heads.reshape(-1, heads.shape[2])
    return np.ascontiguousarray(vectors[vectors.any(axis=1) & np.isfinite(vectors).all(axis=1)]), what


def log_sample(store: Store, count: int) -> tuple[list[str], list[User], str]:
    """Samples texts and users of `count` interactions, held-out ones if there are any; and a phrase that says which.

    A store without interactions gives titles of items, asked by the anonymous user.
    """
    rng = np.random.default_rng(1)
    shards = store.interactions()
    user_ids = store.users()["id"]
    held_out = store.held_out()
    if held_out is not None and len(held_out["query"]):
        rows = np.sort(rng.choice(len(held_out["query"]), min(count, len(held_out["query"])), replace=False))
        queries, users, times = (held_out[name][rows] for name in ("query", "user", "time"))
        what = f"{len(rows):,} held-out queries"
    elif not store.counts.positives:
        titles = store.titles()
        picked = np.sort(rng.choice(len(titles), min(count, len(titles)), replace=False)).tolist()
        return [titles[row] for row in picked], [User(-1)] * len(picked), f"{len(picked):,} titles of items"
    else:
        ends = np.cumsum([len(shard["positive.item"]) for shard in shards])
        rows = np.sort(rng.choice(ends[-1], min(count, int(ends[-1])), replace=False))
        starts = _first_queries(shards)
        found = []
        for shard, start, end in zip(shards, starts, ends, strict=False):
            begin = end - len(shard["positive.item"])
            here = rows[(rows >= begin) & (rows < end)] - begin
            local = np.searchsorted(shard["positive.splits"], here, side="right") - 1
            found.append([start + local, shard["positive.user"][here], shard["positive.time"][here]])
        queries, users, times = (np.concatenate(column) for column in zip(*found, strict=True))
        what = f"{len(rows):,} queries of the log"
    texts = list(_query_texts(shards, queries))
    return texts, [User(int(user_ids[user]), int(time)) for user, time in zip(users, times, strict=True)], what


def _query_texts(shards: list[PackedFile], rows: np.ndarray) -> Iterator[str]:
    """Returns the texts of queries, which are numbered over all shards."""
    starts = _first_queries(shards)
    for row in rows.tolist():
        number = int(np.searchsorted(starts, row, side="right")) - 1
        splits, local = shards[number]["query_text.splits"], row - starts[number]
        yield shards[number]["query_text.bytes"][splits[local] : splits[local + 1]].tobytes().decode()


def _first_queries(shards: list[PackedFile]) -> np.ndarray:
    """Returns the number of the first query of each shard, counted over all shards, and the number of all queries."""
    return np.cumsum([0, *(len(shard["query.splits"]) - 1 for shard in shards)])
