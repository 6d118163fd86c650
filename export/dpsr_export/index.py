"""`dpsr index`: embeds all items and builds the FAISS index; with --inverted, an inverted index of their texts.

The index directory of a model holds

    items.faiss            the FAISS index; its labels are the positions 0 to items - 1
    item_ids.dpsr          item id of each position; checksum of the index
    item_attributes.dpsr   attributes that searches may filter by, if the schema has filters (item_attributes.py)
    item_embeddings.dpsr   the embeddings that the index was built from (embeddings.py)
    item_titles.tsv.gz     title of each item id, for tools that show results
    semantic_ids.parquet   list and codes of each item, if the model has a quantizer (product_codes.py)
    recall.json            the recall report: ann_recall and latency for each setting of the search parameters
    recall.svg             a plot of the report (recall_report.py)
    requests.json, ...     other files that a servable needs (servable_assets.py)
    index.json             the model and store it was made from, counts, factory, search parameters, ann_recall, and
                           sizes and checksums of the files
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from absl import flags

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.files import link_or_copy
from dpsr_common.typed_config import to_dict
from dpsr_export import (
    ann,
    embeddings,
    faiss_search,
    item_attributes,
    product_codes,
    recall_report,
    servable_assets,
)
from dpsr_export.index_files import FORMAT, FORMAT_VERSION, file_record
from dpsr_export.recall_report import MeasuredIndex
from dpsr_tf import spark
from dpsr_tf.config import Config, IndexConfig
from dpsr_tf.data.store import Store, new_directory
from dpsr_tf.evaluation import judgments
from dpsr_tf.evaluation.corpus import Corpus
from dpsr_tf.evaluation.judgments import Judgments
from dpsr_tf.models.encoders import query_encoder
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.quantizer import Quantizer
from dpsr_tf.training.train import config_from_flags

USAGE = """
Usage: dpsr index --model=MODEL --store=STORE --out=INDEX [--set=index.factory=FACTORY ...]
       dpsr index --merge --index=INDEX --servable=BASE --out=NEW
       dpsr index --inverted --store=STORE --out=INVERTED [--analysis=OPTIONS]

Computes the embeddings of all items with the last checkpoint of a model, and builds a FAISS index over them. The config
value index.factory says which kind of index; "auto" chooses one by the number of items. If the model was trained with a
quantizer, the index uses its centroids and codes, and nothing is trained; a FAISS factory string or "Flat" builds
another index, of the float embeddings. Then the command measures which share of the exact results the index finds
(ann_recall) with several search parameters, and keeps the fastest ones that reach index.recall_target. If a run is
killed, the next run continues where it stopped.

With --merge the command takes the index that a servable was exported with, and writes a new one that also has the item
changes in the servable's log (docs/fresh_items.md). Only new items are embedded, and nothing is trained.
`dpsr export --index_only --index=NEW --out=BASE` then makes the next version.

With --inverted the command needs no model: it writes an inverted index of the texts of all items, and the catalogue
that `dpsr search` filters, counts and groups items by.
"""

# Number of query vectors that the recall report is measured with.
_RECALL_QUERIES = 1000

REQUIRED_FLAGS = ("out",)
REMOTE_INPUTS = ("model", "store")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `dpsr index`."""
    flags.DEFINE_string("model", None, "model directory, made by `dpsr train`", flag_values=values)
    flags.DEFINE_string(
        "store", None, "store with the items, the one that the model was trained on", flag_values=values
    )
    flags.DEFINE_string("out", None, "directory to write the index to", flag_values=values)
    flags.DEFINE_boolean("overwrite", False, "replace an index that is already in the directory", flag_values=values)
    flags.DEFINE_integer(
        "changes_offset",
        0,
        "offset in the servable's log of item changes up to which the store has the changes already; the servable "
        "applies only later ones",
        0,
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "merge", False, "write a new index from --index and the item changes in --servable's log", flag_values=values
    )
    flags.DEFINE_string("index", None, "with --merge, index directory to start from", flag_values=values)
    flags.DEFINE_string(
        "servable", None, "with --merge, base path of the servable: it has the model and the log", flag_values=values
    )
    flags.DEFINE_boolean(
        "inverted",
        False,
        "write an inverted index of the texts, for `dpsr search`; needs no --model",
        flag_values=values,
    )
    flags.DEFINE_string(
        "analysis",
        None,
        "with --inverted, how texts become terms, such as stem+typos=0.2, the default; docs/search.md has the options",
        flag_values=values,
    )
    flags.DEFINE_string(
        "opensearch",
        None,
        "address of a server of OpenSearch or Elasticsearch that holds the inverted index in place of Tantivy, for "
        "example http://127.0.0.1:9200",
        flag_values=values,
    )
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
    spark.define_flags(values, "embeds the items")
    judgments.define_flags(
        values,
        "table of judged query-item pairs (TSV, CSV, Parquet, JSON lines); the report then has the recall of relevant "
        "items, too",
    )


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr index`."""
    if values.merge:
        _run_merge(values)
        return
    for name in ("index", "servable"):
        if values[name].present:
            raise UsageError(f"--{name} is for merges; give --merge, or leave it out")
    if values.store is None:
        raise UsageError(f"--store is missing ({values['store'].help})")
    if values.inverted:
        _run_inverted(values)
        return
    if values.model is None:
        raise UsageError(f"--model is missing ({values['model'].help}); or give --inverted")
    for name in ("analysis", "opensearch"):
        if values[name].present:
            raise UsageError(f"--{name} is for inverted indexes; give --inverted, or leave it out")
    model, store = ModelDirectory.open(values.model), Store(values.store)
    config = config_from_flags(str(model.path / "config.yaml"), values.set) if values.set else model.config
    judged = None
    if values.judgments:
        corpus = Corpus.of_store(store)
        judged = judgments.read_flags(values, corpus.item_keys).sample(_RECALL_QUERIES, seed=1)
        judged.check_items(corpus.item_ids)
    with spark.session_of_flags(values, "dpsr index") as session:
        manifest = build_index(
            model,
            store,
            Path(values.out),
            config,
            values.overwrite,
            values.device,
            values.min_ann_recall,
            judged,
            values.changes_offset,
            session,
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


def _run_merge(values: flags.FlagValues) -> None:
    others = ("model", "store", "set", "device", "judgments", "inverted", "analysis", "opensearch", "changes_offset")
    for name in (*others, "engine", "spark_master"):
        if values[name].present:
            raise UsageError(f"--{name} cannot be combined with --merge, which takes the model from the servable")
    for name in ("index", "servable"):
        if values[name].value is None:
            raise UsageError(f"--{name} is missing ({values[name].help})")
    # Loads the ops of servables, which other indexes do not need.
    from dpsr_export import merge

    manifest = merge.merge_index(
        Path(values.index), Path(values.servable), Path(values.out), values.overwrite, values.min_ann_recall
    )
    merged = manifest["merged"]
    print(
        f"index {values.out}: {manifest['items']:,} items, {manifest['factory']}, ann_recall@100 "
        f"{manifest['ann_recall@100']:.4f}, {manifest['bytes'] / 1e6:.1f} MB; {merged['changes']:,} changes: "
        f"{merged['put']:,} items put, {merged['updated']:,} updated, {merged['removed']:,} removed, "
        f"{merged['ignored']:,} changes ignored; the next version applies changes from {manifest['changes_offset']}"
    )


def _run_inverted(values: flags.FlagValues) -> None:
    for name in ("model", "set", "judgments", "min_ann_recall", "engine", "spark_master"):
        if values[name].present:
            raise UsageError(f"--{name} cannot be combined with --inverted: an inverted index has no model")
    # Imports Tantivy, which other indexes do not need.
    from dpsr_export import inverted_index

    analysis = inverted_index.DEFAULT_ANALYSIS if values.analysis is None else values.analysis
    if values.opensearch and values.analysis is None:
        analysis = "stem+trigrams=0.2"
    manifest = inverted_index.build(
        Store(values.store), Path(values.out), analysis, values.overwrite, values.opensearch or ""
    )
    size = sum(record["bytes"] for record in manifest["files"].values())
    print(f"inverted index {values.out}: {manifest['items']:,} items, {size / 1e6:.1f} MB")


def build_index(
    model: ModelDirectory,
    store: Store,
    out: Path,
    config: Config,
    overwrite: bool = False,
    device: str = "cpu",
    min_ann_recall: float = 0.0,
    judgments: Judgments | None = None,
    changes_offset: int = 0,
    session: Any = None,
) -> dict[str, Any]:
    """Writes the index directory `out`. If it fails, no directory is written, and an earlier one stays.

    Args:
        model: the model. Its last checkpoint embeds items and queries.
        store: has the items, and the queries that the index is measured with.
        out: the directory to write.
        config: only the sections `index`, `serving` and `quantizer` are used.
        overwrite: replaces an index that is already there.
        device: "cpu" or "gpu", where FAISS builds the index and computes the exact result.
        min_ann_recall: lowest ann_recall@k that is accepted, with the k of section `serving`.
        judgments: queries with relevant items. If given, the report has the recall of relevant items, too.
        changes_offset: number of changes of the servable's log that the store has already (docs/fresh_items.md).
        session: a SparkSession that embeds the items; None is this machine.

    Returns:
        The content of index.json.

    Raises:
        CommandError: the model was not trained on this store, the model has no checkpoint, FAISS refuses the factory
            string or the parameters, no index fits into index.memory, there is no such device, ann_recall is too low,
            or the index is to be made of a quantizer that the checkpoint does not have.
    """
    checkpoint = model.last_checkpoint()
    config = _with_factory(config)
    quantizer = _check_inputs(model, store, config, device, checkpoint)
    source = embeddings.source_fingerprint(model, store, checkpoint)
    with (
        new_directory(out, overwrite, "index", "index.json") as directory,
        embeddings.kept_embeddings(out, source) as work,
    ):
        start = time.perf_counter()
        path = embeddings.embed_items(model, store, checkpoint, work, session)
        embedding_seconds = time.perf_counter() - start
        link_or_copy(path, directory / path.name)
        items = embeddings.ItemEmbeddings(path, model.config.model.embedding_dim)
        source_of = _Source(model, store, checkpoint, items)
        measured = _build_and_report(source_of, config, device, directory, quantizer, judgments)
        recall_report.check(measured, min_ann_recall)
        files = _write_files(source_of, measured, directory, config.serving.graph_queries, quantizer)
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "model": str(model.path),
            "checkpoint": Path(checkpoint).name,
            "checkpoint_fingerprint": embeddings.checkpoint_fingerprint(checkpoint),
            "vocabulary_fingerprint": f"{model.vocabulary.fingerprint:016x}",
            "embeddings_source": source,
            "changes_offset": changes_offset,
            "items": len(items.ids),
            "empty_items": items.num_empty,
            "not_finite_items": items.num_not_finite,
            "embedding_dim": model.config.model.embedding_dim,
            # `dpsr items` reads tables of new items by it.
            "items_schema": to_dict(store.schema.items),
            "factory": measured.factory,
            "parameters": measured.chosen.parameters,
            "metric": "inner_product",
            "entries": measured.entries,
            "quantizer": _identity(quantizer) if quantizer is not None else None,
            "config": to_dict(config.index),
            "bytes": (directory / "items.faiss").stat().st_size,
            **{f"ann_recall@{at}": value for at, value in measured.chosen.ann_recall.items()},
            "p50_ms": measured.chosen.p50_ms,
            "p99_ms": measured.chosen.p99_ms,
            **{f"relevant_recall@{at}": value for at, value in measured.chosen.relevant_recall.items()},
            "seconds": {"embeddings": round(embedding_seconds, 3), "index": round(measured.seconds, 3)},
            **files,
        }
        (directory / "index.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _with_factory(config: Config) -> Config:
    """Returns the config with the index.factory that an empty one stands for."""
    if config.index.factory:
        return config
    factory = product_codes.QUANTIZER if config.quantizer.sub_spaces else "Flat"
    return dataclasses.replace(config, index=dataclasses.replace(config.index, factory=factory))


def _read_quantizer(config: Config, checkpoint: str) -> Quantizer | None:
    """Returns the quantizer that the index is to be made of, or None. Raises CommandError if there is none to read."""
    if config.index.factory not in product_codes.FACTORIES:
        return None
    if not config.quantizer.sub_spaces:
        raise CommandError(
            f"index.factory '{config.index.factory}' takes the model's quantizer, but quantizer.sub_spaces is 0: the "
            f"model was trained without one; give --set=index.factory=auto, or train it with a quantizer"
        )
    return Quantizer.read(checkpoint)


def _identity(quantizer: Quantizer) -> dict[str, Any]:
    """Returns what index.json says about a quantizer."""
    return {
        "fingerprint": quantizer.fingerprint,
        "lists": len(quantizer.coarse),
        "sub_spaces": len(quantizer.codebooks),
        "codes": "residual" if quantizer.encoder else "product",
        "bits": quantizer.bits,
    }


def _check_inputs(
    model: ModelDirectory, store: Store, config: Config, device: str, checkpoint: str
) -> Quantizer | None:
    """Checks now what would otherwise fail after an hour. Returns the quantizer to make the index of, or None.

    Raises:
        CommandError: see build_index.
    """
    difference = model.store_difference(store)
    if difference:
        raise CommandError(f"{model.path}: {difference}; give the store the model was trained on")
    ann.check_device(device)
    dim = model.config.model.embedding_dim
    quantizer = _read_quantizer(config, checkpoint)
    if quantizer is not None:
        index, _, _ = product_codes.build(
            quantizer, config.index.factory, np.zeros((1, dim), np.float32), config.index.second_list
        )
        ann.set_parameters(index, config.index.parameters)
    elif config.index.factory != "auto":
        index = ann.make(config.index.factory, dim)
        ann.set_parameters(index, config.index.parameters)
        product_codes.check_second_list(index, config.index.second_list)
    elif config.index.second_list:
        raise CommandError(
            f"index.second_list is {config.index.second_list:g}, but index.factory auto chooses among indexes without "
            f"second lists; give index.factory={product_codes.QUANTIZER} or, for example, IVF1024,PQ16, or set "
            f"index.second_list=0"
        )
    _candidates(config.index, store.counts.items, dim)
    return quantizer


@dataclasses.dataclass(frozen=True)
class _Source:
    """What an index is made from: the embeddings of a checkpoint."""

    model: ModelDirectory
    store: Store
    checkpoint: str
    items: embeddings.ItemEmbeddings


def _build_and_report(
    source: _Source,
    config: Config,
    device: str,
    directory: Path,
    quantizer: Quantizer | None,
    judgments: Judgments | None,
) -> MeasuredIndex:
    """Builds the index, measures it with queries of the log, and prints and writes the recall report."""
    items = source.items
    queries, what = embeddings.sample_queries(source.model, source.store, source.checkpoint, _RECALL_QUERIES)
    if not len(queries):
        queries = items.vectors[:: max(1, len(items.ids) // _RECALL_QUERIES)][:_RECALL_QUERIES]
        what = f"{len(queries):,} items, because the log has no queries"
    relevant = _relevant(source, judgments, config) if judgments is not None else None
    measured = choose_and_build(items.vectors, queries, config, device, quantizer, relevant)
    print(f"ann_recall of {measured.factory} ({what})\n{recall_report.table(measured)}")
    recall_report.write(directory, measured, what)
    return measured


def _relevant(source: _Source, judgments: Judgments, config: Config) -> ann.Relevant:
    """Embeds the judged queries, asked by the anonymous user, and finds the positions of their relevant items."""
    encode = query_encoder(source.model.path, source.store, Path(source.checkpoint).name)
    heads = encode(judgments.queries, None)
    ids = source.items.ids
    positions = []
    for wanted in judgments.relevant:
        rows = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
        positions.append(np.where(ids[rows] == wanted, rows, -1))
    return ann.Relevant(source.items.vectors, heads, positions, sorted({*ann.RECALL_AT, config.serving.k}))


def _write_files(
    source: _Source, measured: MeasuredIndex, directory: Path, graph_queries: int, quantizer: Quantizer | None
) -> dict[str, Any]:
    """Writes the files that a servable is made from. Returns what index.json says about them."""
    model, store, items = source.model, source.store, source.items
    faiss.write_index(measured.index, str(directory / "items.faiss"))
    faiss_search.write_item_ids(
        directory / "item_ids.dpsr",
        items.ids,
        directory / "items.faiss",
        measured.entries,
        residual=ann.code_residual(measured.index, items.vectors),
    )
    if measured.semantic_ids is not None:
        keys = store.item_keys()
        rows = np.searchsorted(store.items()["id"], items.ids).tolist()
        product_codes.write_semantic_ids(
            directory / "semantic_ids.parquet",
            items.ids if keys is None else [keys[row] for row in rows],
            *measured.semantic_ids,
        )
    filtered_by = item_attributes.write(directory, store)
    write_titles(directory / "item_titles.tsv.gz", store.items()["id"], store.titles())
    texts, users, _ = embeddings.log_sample(store, servable_assets.NUM_REQUESTS)
    serving = servable_assets.write_assets(model, store, source.checkpoint, texts, users, directory, graph_queries)
    if serving["graph"]:
        print(_graph_line(serving["graph"]))
    names = ["items.faiss", "item_ids.dpsr", *filtered_by, servable_assets.REQUESTS, *serving["serving_files"]]
    if quantizer is not None and quantizer.encoder:
        product_codes.write_encoder(directory, quantizer.encoder)
        names.append(product_codes.ENCODER)
    return {**serving, "files": {name: file_record(directory / name) for name in names}}


def _graph_line(graph: dict[str, Any]) -> str:
    coverage = "" if graph["coverage"] is None else f", {graph['coverage']:.1%} of {graph['measured_on']}"
    return f"table of the click graph: {graph['queries']:,} queries{coverage}"


def choose_and_build(
    vectors: np.ndarray,
    queries: np.ndarray,
    config: Config,
    device: str = "cpu",
    quantizer: Quantizer | None = None,
    relevant: ann.Relevant | None = None,
) -> MeasuredIndex:
    """Builds and measures the index that `config.index` asks for.

    With "auto" a larger index is built if the recall of the first one is too low.

    Args:
        vectors: float32 [items, dim].
        queries: float32 [queries, dim], which it is measured with.
        config: only the sections `index` and `serving` are used.
        device: "cpu" or "gpu".
        quantizer: what the index is made of, if index.factory is one of product_codes.FACTORIES.
        relevant: judged queries, if there are some.

    Raises:
        CommandError: no index fits into index.memory, or FAISS refuses the factory string or the parameters.
    """
    config = _with_factory(config)
    k, target = config.serving.k, config.index.recall_target
    entries = 2 if config.index.second_list else 1
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
        start = time.perf_counter()
        semantic_ids = None
        if quantizer is not None:
            index, lists, codes = product_codes.build(quantizer, candidate.factory, vectors, config.index.second_list)
            semantic_ids = lists, codes
        else:
            index = ann.build(vectors, candidate.factory, device, config.index.second_list)
        seconds = time.perf_counter() - start
        settings = ann.measure_settings(index, exact, queries, k, config.index.parameters, entries, relevant)
        chosen = settings[0] if config.index.parameters else ann.choose(settings, k, target)
        if best is None or chosen.ann_recall[k] > best.chosen.ann_recall[k]:
            best = MeasuredIndex(
                index,
                candidate.factory if quantizer is None else product_codes.describe(quantizer, candidate.factory),
                settings,
                chosen,
                k,
                target,
                entries,
                seconds,
                semantic_ids,
                relevant.exact if relevant is not None else {},
            )
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


def write_titles(path: Path, item_ids: np.ndarray, titles: list[str]) -> None:
    """Writes a gzip file with the line `item_id<TAB>title` for each item. White space in titles becomes one space."""
    with gzip.GzipFile(path, "wb", mtime=0) as file:
        for item_id, title in zip(item_ids, titles, strict=True):
            file.write(f"{item_id}\t{' '.join(title.split())}\n".encode())
