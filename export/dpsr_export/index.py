"""`dpsr index`: embeds all items and builds the FAISS index.

The index directory holds

    items.faiss            the FAISS index; its labels are the positions 0 to items - 1
    item_ids.dpsr          item id of each position; checksum of the index
    item_attributes.dpsr   attributes that searches may filter by, if the schema has filters (item_attributes.py)
    item_embeddings.dpsr   the embeddings that the index was built from (embeddings.py)
    item_titles.tsv.gz     title of each item id, for tools that show results
    recall.json            the recall report: ann_recall and latency for each setting of the search parameters
    recall.svg             a plot of the report (recall_report.py)
    requests.json, ...     other files that a servable needs (servable_assets.py)
    index.json             the model and store it was made from, counts, factory, search parameters, ann_recall, and
                           sizes and checksums of the files
"""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from absl import flags

from dpsr_common.errors import CommandError
from dpsr_common.files import link_or_copy
from dpsr_common.typed_config import to_dict
from dpsr_export import ann, embeddings, faiss_search, item_attributes, recall_report, servable_assets
from dpsr_export.recall_report import MeasuredIndex
from dpsr_tf.config import Config, IndexConfig
from dpsr_tf.data.store import Store, new_directory
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.training.train import config_from_flags

USAGE = """
Usage: dpsr index --model=MODEL --store=STORE --out=INDEX [--set=index.factory=FACTORY ...]

Computes the embeddings of all items with the last checkpoint of a model, and builds a FAISS index over them. The config
value index.factory says which kind of index; "auto" chooses one by the number of items. Then the command measures which
share of the exact results the index finds (ann_recall) at several search parameters, and keeps the fastest that reach
index.recall_target. If a run is killed, the next run continues where it stopped.
"""

FORMAT = "dpsr-index"
FORMAT_VERSION = 3
# Number of query vectors that the recall report is measured with.
_RECALL_QUERIES = 1000

REQUIRED_FLAGS = ("model", "store", "out")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `dpsr index`."""
    flags.DEFINE_string("model", None, "model directory, made by `dpsr train`", flag_values=values)
    flags.DEFINE_string(
        "store", None, "store with the items, the one that the model was trained on", flag_values=values
    )
    flags.DEFINE_string("out", None, "directory to write the index to", flag_values=values)
    flags.DEFINE_boolean("overwrite", False, "replace an index that is already in the directory", flag_values=values)
    flags.DEFINE_multi_string(
        "set", [], "change a value of the model's config, for example index.factory=auto", flag_values=values
    )
    flags.DEFINE_enum(
        "device",
        "cpu",
        ["cpu", "gpu"],
        "device on which FAISS builds the index and computes exact results",
        flag_values=values,
    )
    flags.DEFINE_float(
        "min_ann_recall", 0.0, "fail if ann_recall@k is lower, with k = serving.k (0 to 1)", 0, 1, flag_values=values
    )


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr index`."""
    model = ModelDirectory.open(values.model)
    config = config_from_flags(str(model.path / "config.yaml"), values.set) if values.set else model.config
    manifest = build_index(
        model, Store(values.store), Path(values.out), config, values.overwrite, values.device, values.min_ann_recall
    )
    left_out = ", ".join(
        f"{manifest[key]:,} items not indexed ({why})"
        for key, why in (("empty_items", "no known token"), ("not_finite_items", "embedding is NaN or infinite"))
        if manifest[key]
    )
    print(
        f"index {values.out}: {manifest['items']:,} items, {manifest['factory']}, "
        f"ann_recall@100 {manifest['ann_recall@100']:.4f}, {manifest['bytes'] / 1e6:.1f} MB"
        f"{'; ' + left_out if left_out else ''}"
    )


def build_index(
    model: ModelDirectory,
    store: Store,
    out: Path,
    config: Config,
    overwrite: bool = False,
    device: str = "cpu",
    min_ann_recall: float = 0.0,
) -> dict[str, Any]:
    """Writes the index directory `out`. If it fails, no directory is written, and an earlier one stays.

    Args:
        model: the model. Its last checkpoint embeds items and queries.
        store: has the items, and the queries that the index is measured with.
        out: the directory to write.
        config: only the sections `index` and `serving` are used.
        overwrite: replaces an index that is already there.
        device: "cpu" or "gpu", where FAISS builds the index and computes the exact result.
        min_ann_recall: lowest ann_recall@k that is accepted, with the k of section `serving`.

    Returns:
        The content of index.json.

    Raises:
        CommandError: the model was not trained on this store, the model has no checkpoint, FAISS refuses the factory
            string or the parameters, no index fits into index.memory, there is no such device, or ann_recall is too
            low.
    """
    _check_inputs(model, store, config, device)
    checkpoint = model.last_checkpoint()
    source = embeddings.source_fingerprint(model, store, checkpoint)
    with (
        new_directory(out, overwrite, "index", "index.json") as directory,
        embeddings.kept_embeddings(out, source) as work,
    ):
        path = embeddings.embed_items(model, store, checkpoint, work)
        link_or_copy(path, directory / path.name)
        items = embeddings.ItemEmbeddings(path, model.config.model.embedding_dim)
        measured = _build_and_report(model, store, checkpoint, items, config, device, directory)
        _check_recall(measured, min_ann_recall)
        files = _write_files(model, store, items, measured, directory)
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "model": str(model.path),
            "checkpoint": Path(checkpoint).name,
            "checkpoint_fingerprint": embeddings.checkpoint_fingerprint(checkpoint),
            "vocabulary_fingerprint": f"{model.vocabulary.fingerprint:016x}",
            "embeddings_source": source,
            "items": len(items.ids),
            "empty_items": items.num_empty,
            "not_finite_items": items.num_not_finite,
            "embedding_dim": model.config.model.embedding_dim,
            "factory": measured.factory,
            "parameters": measured.chosen.parameters,
            "metric": "inner_product",
            "config": to_dict(config.index),
            "bytes": (directory / "items.faiss").stat().st_size,
            **{f"ann_recall@{at}": value for at, value in measured.chosen.ann_recall.items()},
            "p50_ms": measured.chosen.p50_ms,
            "p99_ms": measured.chosen.p99_ms,
            **files,
        }
        (directory / "index.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _check_inputs(model: ModelDirectory, store: Store, config: Config, device: str) -> None:
    """Checks now what would otherwise fail after an hour. Raises CommandError."""
    difference = model.store_difference(store)
    if difference:
        raise CommandError(f"{model.path}: {difference}; give the store the model was trained on")
    ann.check_device(device)
    dim = model.config.model.embedding_dim
    if config.index.factory != "auto":
        ann.set_parameters(ann.make(config.index.factory, dim), config.index.parameters)
    _candidates(config.index, store.counts.items, dim)


def _build_and_report(
    model: ModelDirectory,
    store: Store,
    checkpoint: str,
    items: embeddings.ItemEmbeddings,
    config: Config,
    device: str,
    directory: Path,
) -> MeasuredIndex:
    """Builds the index, measures it with queries of the log, and prints and writes the recall report."""
    queries, what = embeddings.sample_queries(model, store, checkpoint, _RECALL_QUERIES)
    if not len(queries):
        queries = items.vectors[:: max(1, len(items.ids) // _RECALL_QUERIES)][:_RECALL_QUERIES]
        what = f"{len(queries):,} items, because the log has no queries"
    measured = choose_and_build(items.vectors, queries, config, device)
    print(f"ann_recall of {measured.factory} ({what})\n{recall_report.table(measured)}")
    recall_report.write(directory, measured, what)
    return measured


def _check_recall(measured: MeasuredIndex, min_ann_recall: float) -> None:
    """Raises CommandError if the index finds less than --min_ann_recall."""
    recall = measured.chosen.ann_recall[measured.k]
    if recall < min_ann_recall:
        raise CommandError(
            f"ann_recall@{measured.k} of {measured.factory} is {recall:.4f} at most ({measured.chosen.parameters}), "
            f"below --min_ann_recall={min_ann_recall:g}; choose another index.factory or index.parameters (the "
            f"embeddings are kept for the next run)"
        )


def _write_files(
    model: ModelDirectory, store: Store, items: embeddings.ItemEmbeddings, measured: MeasuredIndex, directory: Path
) -> dict[str, Any]:
    """Writes the files that a servable is made from. Returns what index.json says about them."""
    faiss.write_index(measured.index, str(directory / "items.faiss"))
    faiss_search.write_item_ids(directory / "item_ids.dpsr", items.ids, directory / "items.faiss")
    filtered_by = item_attributes.write(directory, store)
    write_titles(directory / "item_titles.tsv.gz", store.items()["id"], store.titles())
    texts, users, _ = embeddings.log_sample(store, servable_assets.NUM_REQUESTS)
    serving = servable_assets.write_assets(model, store, texts, users, directory)
    names = ["items.faiss", "item_ids.dpsr", *filtered_by, servable_assets.REQUESTS, *serving["serving_files"]]
    return {**serving, "files": {name: file_record(directory / name) for name in names}}


def choose_and_build(vectors: np.ndarray, queries: np.ndarray, config: Config, device: str = "cpu") -> MeasuredIndex:
    """Builds and measures the index that `config.index` asks for.

    With "auto" a larger index is built if the recall of the first one is too low.

    Args:
        vectors: float32 [items, dim].
        queries: float32 [queries, dim], which it is measured with.
        config: only the sections `index` and `serving` are used.
        device: "cpu" or "gpu".

    Raises:
        CommandError: no index fits into index.memory, or FAISS refuses the factory string or the parameters.
    """
    k, target = config.serving.k, config.index.recall_target
    exact = ann.Exact(vectors, queries, sorted({*ann.RECALL_AT, k}), device)
    best: MeasuredIndex | None = None
    best_bytes = 0
    fitting = _candidates(config.index, len(vectors), vectors.shape[1])
    if config.index.factory == "auto":
        looked_at = ann.candidates(len(vectors), vectors.shape[1], target, config.index.memory * 1e9)
        print(f"index.factory auto chooses {fitting[0].factory}, the first one that fits (sizes are estimates)")
        print("\n".join(candidate.line() for candidate in looked_at))
    for candidate in fitting:
        if best is not None and candidate.bytes <= best_bytes:
            continue  # an index with shorter codes does not find more
        index = ann.build(vectors, candidate.factory, device)
        settings = ann.measure_settings(index, exact, queries, k, config.index.parameters)
        chosen = settings[0] if config.index.parameters else ann.choose(settings, k, target)
        if best is None or chosen.ann_recall[k] > best.chosen.ann_recall[k]:
            best = MeasuredIndex(index, candidate.factory, settings, chosen, k, target)
            best_bytes = candidate.bytes
        if chosen.ann_recall[k] >= target:
            break
        print(f"{candidate.factory}: ann_recall@{k} is {chosen.ann_recall[k]:.4f} at most, below the target {target:g}")
    assert best is not None
    ann.set_parameters(best.index, best.chosen.parameters)
    return best


def _candidates(config: IndexConfig, items: int, dim: int) -> list[ann.Candidate]:
    """Returns the indexes to try, the preferred one first. Raises CommandError if none fits into index.memory."""
    if config.factory != "auto":
        return [ann.Candidate(config.factory, 0, "")]
    found = ann.candidates(items, dim, config.recall_target, config.memory * 1e9)
    fitting = [candidate for candidate in found if not candidate.verdict]
    if not fitting:
        smallest = min(found, key=lambda candidate: candidate.bytes)
        raise CommandError(
            f"index.memory is {config.memory:g} GB, but the smallest index of {items:,} items with {dim} dimensions, "
            f"{smallest.factory}, takes about {smallest.bytes / 1e9:.3g} GB; allow more, or lower model.embedding_dim"
        )
    return fitting


def file_record(path: Path) -> dict[str, Any]:
    """Returns size and SHA-256 of a file, in the form of index.json."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def check_files(index_dir: Path, manifest: dict[str, Any]) -> None:
    """Checks sizes and checksums of the files of an index against index.json. Raises CommandError."""
    for name, expected in manifest["files"].items():
        try:
            found = file_record(index_dir / name)
        except OSError as error:
            raise CommandError(
                f"{index_dir / name}: cannot be read: {error.strerror}; run `dpsr index` again"
            ) from None
        for key, value in expected.items():
            if found[key] != value:
                raise CommandError(
                    f"{index_dir / name}: {key} is {found[key]}, but index.json says {value}; run `dpsr index` again"
                )


def write_titles(path: Path, item_ids: np.ndarray, titles: list[str]) -> None:
    """Writes a gzip file with the line `item_id<TAB>title` for each item. White space in titles becomes one space."""
    with gzip.GzipFile(path, "wb", mtime=0) as file:
        for item_id, title in zip(item_ids, titles, strict=True):
            file.write(f"{item_id}\t{' '.join(title.split())}\n".encode())
