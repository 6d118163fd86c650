"""`dpsr index`: a trained item tower over all items of a store, and the FAISS index over their embeddings (section 3).

The index directory holds

    items.faiss            the FAISS index; labels are positions 0 to items - 1
    item_ids.dpsr          position -> item id
    item_embeddings.dpsr   the embeddings the index was built from
    item_titles.tsv.gz     item id -> title, for tools that show results
    index.json             what it was made from: model, step, counts, factory, search parameters, ann_recall
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import tensorflow as tf
from absl import flags
from tqdm import tqdm

from dpsr_tf.config import IndexConfig
from dpsr_tf.data.dataset import Tokens
from dpsr_tf.data.store import Store, new_directory
from dpsr_tf.errors import CommandError
from dpsr_tf.models.two_tower import TwoTower
from dpsr_tf.training.model_directory import ModelDirectory
from dpsr_tokenizer import PackedFileWriter

USAGE = """
Usage: dpsr index --model=MODEL --store=STORE --out=INDEX

Computes the embeddings of all items with the last checkpoint of a model, builds the FAISS index that the model's config
names (index.factory), and measures how much of the exact result it finds (ann_recall).
"""

FORMAT = "dpsr-index"
FORMAT_VERSION = 1
_BATCH = 4096
# The recall report asks with this many item embeddings as queries.
_RECALL_QUERIES = 1000

v1 = tf.compat.v1

REQUIRED_FLAGS = ("model", "store", "out")


def define_flags(values: flags.FlagValues) -> None:
    """Flags of `dpsr index`."""
    flags.DEFINE_string("model", None, "model directory", flag_values=values)
    flags.DEFINE_string("store", None, "store with the items", flag_values=values)
    flags.DEFINE_string("out", None, "directory of the index, made by this command", flag_values=values)
    flags.DEFINE_boolean("overwrite", False, "replaces an index that is there", flag_values=values)


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr index`."""
    model, store = ModelDirectory.open(values.model), Store(values.store)
    with new_directory(Path(values.out), values.overwrite, "index", "index.json") as out:
        manifest = build_index(model, store, out)
    print(
        f"index {values.out}: {manifest['items']:,} items, {manifest['factory']}, "
        f"ann_recall@100 {manifest['ann_recall@100']:.4f}, {manifest['bytes'] / 1e6:.1f} MB"
    )


def build_index(model: ModelDirectory, store: Store, out: Path) -> dict[str, Any]:
    """Writes the files of an index into the directory `out`; returns what index.json holds.

    Raises:
        CommandError: model and store have another vocabulary, the model has no checkpoint, or FAISS refuses the
            factory string.
    """
    if model.vocabulary.fingerprint != store.vocabulary.fingerprint:
        raise CommandError(
            f"{store.path}: its vocabulary is not that of model {model.path}; give the store the model was trained on"
        )
    checkpoint = tf.train.latest_checkpoint(str(model.path))
    if checkpoint is None:
        raise CommandError(f"{model.path}: holds no checkpoint; run `dpsr train` to its first one")
    item_ids = store.items()["id"]
    embeddings = embed_items(model, store, checkpoint)
    index = _build(embeddings, model.config.index)
    faiss.write_index(index, str(out / "items.faiss"))
    with PackedFileWriter(str(out / "item_ids.dpsr"), "item_ids") as ids_file:
        ids_file.add("id", item_ids)
    with PackedFileWriter(str(out / "item_embeddings.dpsr"), "item_embeddings") as embeddings_file:
        embeddings_file.add("id", item_ids)
        embeddings_file.add("embedding", embeddings.reshape(-1))
    write_titles(out / "item_titles.tsv.gz", item_ids, store.titles())
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "model": str(model.path),
        "checkpoint": Path(checkpoint).name,
        "vocabulary_fingerprint": f"{model.vocabulary.fingerprint:016x}",
        "items": len(item_ids),
        "embedding_dim": embeddings.shape[1],
        "factory": model.config.index.factory,
        "parameters": model.config.index.parameters,
        "metric": "inner_product",
        "bytes": (out / "items.faiss").stat().st_size,
        "ann_recall@100": ann_recall(index, embeddings, 100),
        "empty_items": int((~embeddings.any(axis=1)).sum()),
    }
    (out / "index.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def embed_items(model: ModelDirectory, store: Store, checkpoint: str) -> np.ndarray:
    """Embeddings float32 [items, embedding_dim] of all items of a store, in the order of its item file."""
    items = store.items()
    values, splits = items["tokens.values"], items["tokens.splits"]
    count = len(splits) - 1
    embeddings = np.empty((count, model.config.model.embedding_dim), np.float32)
    with tf.Graph().as_default():
        tokens = Tokens(v1.placeholder(tf.int32, [None]), v1.placeholder(tf.int64, [None]))
        embedding = TwoTower(model.config.model, model.vocabulary.num_ids).item_embedding(tokens)
        with v1.Session() as session, tqdm(total=count, desc=f"{'embed items':<14}", unit=" items") as bar:
            v1.train.Saver().restore(session, checkpoint)
            for begin in range(0, count, _BATCH):
                end = min(begin + _BATCH, count)
                feed = {
                    tokens.values: values[splits[begin] : splits[end]],
                    tokens.row_splits: splits[begin : end + 1] - splits[begin],
                }
                embeddings[begin:end] = session.run(embedding, feed)
                bar.update(end - begin)
    if not np.isfinite(embeddings).all():
        bad = int((~np.isfinite(embeddings)).any(axis=1).sum())
        raise CommandError(
            f"{model.path}: {bad:,} of {count:,} item embeddings are no numbers; train with a lower rate"
        )
    return embeddings


def _build(embeddings: np.ndarray, config: IndexConfig) -> faiss.Index:
    try:
        index = faiss.index_factory(embeddings.shape[1], config.factory, faiss.METRIC_INNER_PRODUCT)
        index.train(embeddings)
        index.add(embeddings)
        if config.parameters:
            # The stub of this overload names its second argument's type wrongly.
            faiss.ParameterSpace().set_index_parameters(index, config.parameters)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise CommandError(
            f"FAISS refuses index.factory '{config.factory}' with parameters '{config.parameters}' for "
            f"{len(embeddings):,} items of {embeddings.shape[1]} dimensions: {str(error).splitlines()[-1]}"
        ) from None
    return index


def ann_recall(index: faiss.Index, embeddings: np.ndarray, k: int) -> float:
    """Of the exact top k, the share that the index finds; queries are evenly spaced items."""
    k = min(k, len(embeddings))
    queries = embeddings[:: max(1, len(embeddings) // _RECALL_QUERIES)][:_RECALL_QUERIES]
    exact = faiss.IndexFlatIP(embeddings.shape[1])
    exact.add(embeddings)
    # By score, not by id: items with equal embeddings are equally right.
    floor = exact.search(queries, k)[0][:, -1:]
    _, found = index.search(queries, k)
    scores = np.einsum("qkd,qd->qk", embeddings[found], queries)
    return float(((scores >= floor - 1e-6) & (found >= 0)).mean())


def write_titles(path: Path, item_ids: np.ndarray, titles: list[str]) -> None:
    """A gzip file with one line `item_id<TAB>title` an item; tabs and line breaks inside a title become spaces."""
    with gzip.GzipFile(path, "wb", mtime=0) as file:
        for item_id, title in zip(item_ids, titles, strict=True):
            file.write(f"{item_id}\t{' '.join(title.split())}\n".encode())
