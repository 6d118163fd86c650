"""Bulk embeddings: all items of a store by the item tower, and the queries that an index is measured with.

`item_embeddings.dpsr` is a packed file (memory-mapped, checksummed) of kind "item_embeddings":

    id           int64 [items]          the items that go into the index, by ascending id, then those that do not
    embedding    float32 [items * dim]  their unit vectors; zeros for those that are left out
    empty        int64 [..]             ids left out because nothing is known of the item: its vector is zero
    not_finite   int64 [..]             ids left out because their vector holds a NaN or an infinity
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dpsr_common.errors import CommandError
from dpsr_common.packed_file import FormatError, PackedFile, PackedFileWriter
from dpsr_tf.data.store import Store
from dpsr_tf.data.user_requests import User
from dpsr_tf.models.encoders import is_personal, item_encoder, query_encoder
from dpsr_tf.models.model_directory import ModelDirectory

KIND = "item_embeddings"
# A model of which more of the items have no finite embedding has not learnt anything: training diverged.
MAX_NOT_FINITE = 0.01
# Items whose embeddings one file holds until all are there: what a killed run loses at most, for each core.
CHUNK = 1 << 16
_BATCH = 4096


class ItemEmbeddings:
    """An open item_embeddings.dpsr.

    Attributes:
        ids: int64 [n], the items that go into the index, ascending.
        vectors: float32 [n, dim], memory-mapped.
        num_empty, num_not_finite: items left out.
    """

    def __init__(self, path: Path, dim: int):
        """Raises FormatError or FileNotFoundError."""
        file = PackedFile(str(path), KIND)
        self.num_empty, self.num_not_finite = len(file["empty"]), len(file["not_finite"])
        count = len(file["id"]) - self.num_empty - self.num_not_finite
        self.ids = file["id"][:count]
        self.vectors = file["embedding"].reshape(-1, dim)[:count]


def checkpoint_fingerprint(checkpoint: str) -> str:
    """16 hex digits that tell a checkpoint of the same name from another; its index holds checksums of all tensors."""
    return hashlib.sha256(Path(f"{checkpoint}.index").read_bytes()).hexdigest()[:16]


def source_fingerprint(model: ModelDirectory, store: Store, checkpoint: str) -> str:
    """16 hex digits of all that embeddings depend on: checkpoint, config of the towers, items with their features."""
    parts = [checkpoint_fingerprint(checkpoint), f"{model.vocabulary.fingerprint:016x}", repr(model.config.model)]
    parts.append(store.manifest["files"]["items.dpsr"])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@contextmanager
def kept_embeddings(index_dir: Path, source: str) -> Iterator[Path]:
    """A directory for the embeddings of an index while it is made: hidden, beside it; it vanishes when all went well.

    A run that was killed or refused leaves there what it has computed, and the next one goes on with it; so does an
    index that replaces one of the same source. Embeddings of another checkpoint or store are removed.

    Args:
        index_dir: where the index will lie; its parent is there.
        source: what the embeddings are made from, a source_fingerprint.

    Raises:
        CommandError: the directory cannot be made.
    """
    stem = f".{index_dir.name}.embeddings-"
    path = index_dir.resolve().parent / f"{stem}{source}"
    try:
        path.mkdir(exist_ok=True)
        for other in path.parent.iterdir():
            if other != path and re.fullmatch(re.escape(stem) + "[0-9a-f]{16}", other.name):
                shutil.rmtree(other)
    except OSError as error:
        raise CommandError(f"{path}: cannot be made: {error.strerror}; choose another --out") from None
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


def link_or_copy(source: Path, target: Path) -> None:
    """Gives a file that is never changed another name, or copies it where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def embed_items(model: ModelDirectory, store: Store, checkpoint: str, work: Path) -> Path:
    """Embeds all items of a store, with all cores, into the file item_embeddings.dpsr of the directory `work`.

    What an earlier call for the same checkpoint and store left in `work` is not computed again.

    Returns:
        The file; see the module. Memory stays bounded: the batches come straight from the mapped store.

    Raises:
        CommandError: model and store do not go together, the checkpoint cannot be read, more than a hundredth of the
            embeddings are no numbers, or no item has an embedding.
    """
    path = work / f"{KIND}.dpsr"
    if _is_whole(path):
        return path
    ids = store.items()["id"]
    if (np.diff(ids) <= 0).any():
        raise CommandError(f"{store.path}: items.dpsr holds an item id twice; ingest the log again")
    encode: Callable[[np.ndarray], np.ndarray] | None = None
    chunks = []
    with (
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads,
        tqdm(total=len(ids), desc=f"{'embed items':<14}", unit=" items") as bar,
    ):
        for begin in range(0, len(ids), CHUNK):
            end = min(begin + CHUNK, len(ids))
            chunk = work / f"chunk-{begin:012}.dpsr"
            if not _is_whole(chunk):
                batches = np.array_split(np.arange(begin, end), max(1, (end - begin) // _BATCH))
                if encode is None:
                    encode = item_encoder(model, store, checkpoint)
                    encode(batches[0][:1])  # makes the graph, which only one thread may do
                _write_chunk(chunk, ids[begin:end], np.concatenate(list(threads.map(encode, batches))))
            chunks.append(chunk)
            bar.update(end - begin)
    with PackedFileWriter(str(path), KIND) as file:
        left_out = {name: np.concatenate([PackedFile(str(c), KIND)[name] for c in chunks]) for name in _LEFT_OUT}
        count, bad = sum(map(len, left_out.values())), len(left_out["not_finite"])
        if bad > MAX_NOT_FINITE * len(ids):
            raise CommandError(
                f"{model.path}: {bad:,} of {len(ids):,} item embeddings are no numbers; train with a lower rate"
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


def _write_chunk(path: Path, ids: np.ndarray, embeddings: np.ndarray) -> None:
    finite = np.isfinite(embeddings).all(axis=1)
    empty = ~embeddings.any(axis=1)
    kept = finite & ~empty
    with PackedFileWriter(str(path), KIND) as file:
        file.add("id", ids[kept])
        file.add("embedding", np.ascontiguousarray(embeddings[kept]).reshape(-1))
        file.add("empty", ids[empty])
        file.add("not_finite", ids[~finite])


def _is_whole(path: Path) -> bool:
    try:
        PackedFile(str(path), KIND)
    except (FormatError, FileNotFoundError):
        return False
    return True


def sample_queries(model: ModelDirectory, store: Store, checkpoint: str, count: int) -> tuple[np.ndarray, str]:
    """Query vectors to measure an index with, each head's by itself.

    Of held-out interactions if the store has some, else of the log: a query comes as often as people ask it, with the
    user and time where the model reads those. The same call gives the same vectors.

    Returns:
        float32 [at most count, dim], none of them zero, and what they are, for people. None at all: no query has a
        vector.
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
    """Texts and users of `count` interactions by chance, held-out ones if there are; and what they are, for people."""
    rng = np.random.default_rng(1)
    shards = store.interactions()
    user_ids = store.users()["id"]
    held_out = store.held_out()
    if held_out is not None and len(held_out["query"]):
        rows = np.sort(rng.choice(len(held_out["query"]), min(count, len(held_out["query"])), replace=False))
        queries, users, times = (held_out[name][rows] for name in ("query", "user", "time"))
        what = f"{len(rows):,} held-out queries"
    else:
        ends = np.cumsum([len(shard["positive.item"]) for shard in shards])
        rows = np.sort(rng.choice(ends[-1], min(count, int(ends[-1])), replace=False))
        starts = _first_queries(shards)
        picked = []
        for shard, start, end in zip(shards, starts, ends, strict=False):
            begin = end - len(shard["positive.item"])
            here = rows[(rows >= begin) & (rows < end)] - begin
            local = np.searchsorted(shard["positive.splits"], here, side="right") - 1
            picked.append([start + local, shard["positive.user"][here], shard["positive.time"][here]])
        queries, users, times = (np.concatenate(column) for column in zip(*picked, strict=True))
        what = f"{len(rows):,} queries of the log"
    texts = list(_query_texts(shards, queries))
    return texts, [User(int(user_ids[user]), int(time)) for user, time in zip(users, times, strict=True)], what


def _query_texts(shards: list[PackedFile], rows: np.ndarray) -> Iterator[str]:
    """Texts of global query rows."""
    starts = _first_queries(shards)
    for row in rows.tolist():
        number = int(np.searchsorted(starts, row, side="right")) - 1
        splits, local = shards[number]["query_text.splits"], row - starts[number]
        yield shards[number]["query_text.bytes"][splits[local] : splits[local + 1]].tobytes().decode()


def _first_queries(shards: list[PackedFile]) -> np.ndarray:
    """Global row of the first query of each shard, and the number of all."""
    return np.cumsum([0, *(len(shard["query.splits"]) - 1 for shard in shards)])
