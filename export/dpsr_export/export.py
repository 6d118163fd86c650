"""`dpsr export`: joins the query tower and the index in one servable."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import tensorflow as tf
from absl import flags

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.files import link_or_copy
from dpsr_common.packed_file import FormatError, PackedFile, PackedFileWriter
from dpsr_common.typed_config import to_dict
from dpsr_export import item_attributes, product_codes, query_table, ranker, request_tables, servable_assets, warmup
from dpsr_export.ann import add, blocks_of, set_parameters, two_level_assignment
from dpsr_export.embeddings import ItemEmbeddings, checkpoint_fingerprint
from dpsr_export.faiss_search import write_item_ids
from dpsr_export.index_files import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    MANIFEST_FORMAT,
    MANIFEST_VERSION,
    check_files,
    file_record,
)
from dpsr_export.signatures import write_saved_model
from dpsr_tf import __version__
from dpsr_tf.data.store import Store, new_directory, read_manifest
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.quantizer import Quantizer

USAGE = """
Usage: dpsr export --model=MODEL --index=INDEX --out=BASE [--version_number=N] [--shards=N]
       dpsr export --index_only --index=INDEX --out=BASE [--version_number=N] [--shards=N]
       dpsr export --model=RANKER --store=STORE --out=BASE [--version_number=N] [--max_items=N]
       dpsr export --index_only --store=STORE --out=BASE [--version_number=N]
       dpsr export --model=REWRITER [--rewrites=TABLE] --out=BASE [--version_number=N] [--max_rewrites=N]
       dpsr export --index_only --rewrites=TABLE --out=BASE [--version_number=N]

Writes the servable BASE/N: a SavedModel that tokenizes a query, computes its embedding from the query and the user's
features, and looks up the nearest items in its index. Without --version_number, N is one more than the highest version
in BASE. `dpsr serve` takes BASE. The version appears only after it has answered its warm-up requests.

--index_only copies the model of the highest version in BASE unchanged, and gives it another index.
--shards=N writes BASE/shard-0-of-N/VERSION and so on. Each shard has every N-th item; a proxy merges their answers.

A ranker has no index. Its servable holds what the ranker reads of items, queries and users, as of the end of the log of
--store. --index_only gives the newest version in BASE the items and counts of a newer store (`dpsr ingest --like`).

A rewriter has no index either. Its servable looks up the queries of --rewrites, a table that `dpsr rewrite` made with
the same model, and writes rewrites for all others. --index_only gives the newest version in BASE another table.
"""

# Serving files that come with a new index. All others belong to the model.
_RENEWED = (servable_assets.ITEMS, query_table.FILE)


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `dpsr export`."""
    flags.DEFINE_string("model", None, "model directory, made by `dpsr train`", flag_values=values)
    flags.DEFINE_string("index", None, "index directory that `dpsr index` made from this model", flag_values=values)
    flags.DEFINE_string("store", None, "for a ranker, store with its items and requests", flag_values=values)
    flags.DEFINE_string(
        "rewrites", None, "for a rewriter, table of rewrites, made by `dpsr rewrite`", flag_values=values
    )
    flags.DEFINE_string(
        "out", None, "base path: the directory that holds the versions of the servable", flag_values=values
    )
    flags.DEFINE_integer("version_number", None, "number of the version to write", 0, flag_values=values)
    flags.DEFINE_boolean(
        "index_only", False, "keep the model of the newest version and give it a new index", flag_values=values
    )
    flags.DEFINE_integer(
        "max_items", 1000, "for a ranker, largest number of items in a request", 1, 100_000, flag_values=values
    )
    flags.DEFINE_integer(
        "max_rewrites", 10, "for a rewriter, largest number of rewrites that a request asks for", 1, 100,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "warmup", "all", ["all", "batchable"],
        "warm-up requests: of all kinds, or only those that TensorFlow Serving can compute with --enable_batching, "
        "where others would keep the servable from loading", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("shards", 1, "number of servables to spread the items over", 1, 1000, flag_values=values)


REQUIRED_FLAGS = ("out",)
REMOTE_INPUTS = ("model", "index", "store")


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr export`."""
    if values.index_only and values.model:
        raise UsageError(
            f"--model={values.model}: cannot be combined with --index_only, which keeps the model of the servable"
        )
    if not values.index_only and not values.model:
        raise UsageError(
            "--model is missing (model directory); to renew only the index of a servable, give --index_only"
        )
    others = [flag for flag in ("index", "store") if values[flag].value is not None]
    if values.rewrites is not None and others:
        raise UsageError(f"--rewrites={values.rewrites}: cannot be combined with --{others[0]}")
    if values.rewrites is not None or (values.model and not others and _kind(values.model) == "rewriter"):
        _export_rewriter(values)
        return
    if not others:
        raise UsageError("--index is missing (index directory); for a ranker, give --store")
    if values.store is not None:
        _export_ranker(values)
        return
    base = Path(values.out)
    bases = [base]
    if values.shards > 1:
        bases = [base / f"shard-{number}-of-{values.shards}" for number in range(values.shards)]
    version = _version(values, bases)
    index = Index.open(Path(values.index))
    model = None if values.index_only else ModelDirectory.open(values.model, "retrieval")
    if model is not None:
        _check_kind(bases, "retrieval")
    with contextlib.ExitStack() as made:
        for number, path in enumerate(bases):
            # All shards appear together, after the last one is complete.
            out = made.enter_context(new_directory(path / str(version)))
            with index.part(number, values.shards, out.parent) as part:
                measured = export(model, part, out) if model is not None else renew_index(newest(path), part, out)
                _select_warmup(values, out)
            print(f"servable {path / str(version)}: {part.manifest['items']:,} items; {_figures(measured)}")


def _version(values: flags.FlagValues, bases: Sequence[Path]) -> int:
    if values.version_number is not None:
        return int(values.version_number)
    return 1 + max((number for path in bases for number in versions(path)), default=0)


def _check_kind(bases: Sequence[Path], kind: str) -> None:
    """Raises CommandError if a base path has servables of another kind: a server would load this one in their place."""
    for base in bases:
        there = versions(base)
        if not there:
            continue
        try:
            found = _read_manifest(base / str(there[-1])).get("kind", "retrieval")
        except CommandError:  # not ours, or of an older version
            continue
        if found != kind:
            raise CommandError(
                f"{base}: its version {there[-1]} is a {found} servable, and this would be a {kind} servable; choose "
                f"another --out"
            )


def _read_manifest(servable: Path) -> dict[str, Any]:
    return read_manifest(servable / MANIFEST, MANIFEST_FORMAT, MANIFEST_VERSION, "dpsr export")


def _select_warmup(values: flags.FlagValues, version: Path) -> None:
    if values.warmup == "batchable":
        warmup.keep_batchable(version)


def _export_ranker(values: flags.FlagValues) -> None:
    if values.index is not None:
        raise UsageError(
            f"--store={values.store}: cannot be combined with --index; a ranker needs its store, and other models an "
            f"index"
        )
    if values.shards > 1:
        raise UsageError(f"--shards={values.shards}: cannot be combined with --store, because a ranker has no shards")
    base = Path(values.out)
    model = None if values.index_only else ModelDirectory.open(values.model, "ranker")
    if model is not None:
        _check_kind([base], "ranker")
    store = Store(values.store)
    path = base / str(_version(values, [base]))
    with new_directory(path) as out:
        if model is not None:
            measured = ranker.export(model, store, values.max_items, out)
        else:
            old = newest(base)
            measured = ranker.renew(old, manifest_of(old, "ranker"), store, out)
        _select_warmup(values, out)
    shown = "not measured, because the log has no requests"
    if measured["requests"]:
        shown = f"p50 {measured['p50_ms']:.2f} ms, p99 {measured['p99_ms']:.2f} ms for {measured['items']} items"
    print(f"servable {path}: ranks {store.counts.items:,} items; {shown} ({measured['requests']} requests)")


def _kind(model: str) -> str:
    return ModelDirectory.open(model).config.model.kind


def _export_rewriter(values: flags.FlagValues) -> None:
    # Imported here, because other servables do not need it.
    from dpsr_export import rewriter

    if values.shards > 1:
        raise UsageError(f"--shards={values.shards}: cannot be combined with a rewriter, which has no items")
    base = Path(values.out)
    model = None if values.index_only else ModelDirectory.open(values.model, "rewriter")
    if model is not None:
        _check_kind([base], "rewriter")
    table = None if values.rewrites is None else Path(values.rewrites)
    path = base / str(_version(values, [base]))
    with new_directory(path) as out:
        if model is not None:
            measured = rewriter.export(model, table, values.max_rewrites, out)
        else:
            assert table is not None
            old = newest(base)
            measured = rewriter.renew(old, manifest_of(old, "rewriter"), table, out)
        _select_warmup(values, out)
    shown = [
        f"{what} p50 {measured[f'{key}_p50_ms']:.2f} ms, p99 {measured[f'{key}_p99_ms']:.2f} ms"
        for key, what in (("known", "of the table"), ("tail", "written"))
        if f"{key}_p50_ms" in measured
    ]
    print(f"servable {path}: {measured['n']} rewrites of a query {', '.join(shown)}")


def _figures(measured: dict[str, Any]) -> str:
    if not measured["queries"]:
        return "not measured, because the log has no queries"
    recall = measured[f"ann_recall@{measured['k']}"]
    shown = "" if recall is None else f"ann_recall@{measured['k']} {recall:.4f}, "
    return f"{shown}p50 {measured['p50_ms']:.2f} ms, p99 {measured['p99_ms']:.2f} ms ({measured['queries']} queries)"


def versions(base: Path) -> list[int]:
    """Returns the version numbers in a base path, ascending."""
    return sorted(int(path.name) for path in base.glob("*") if path.name.isdigit())


def newest(base: Path) -> Path:
    """Returns the highest version in a base path. Raises CommandError if there is none."""
    there = versions(base)
    if not there:
        shards = {path.name.rpartition("-")[2] for path in base.glob("shard-0-of-*")}
        advice = f"give --shards={min(shards)}" if shards else "leave out --index_only and give --model"
        raise CommandError(f"{base}: holds no servable{' without shards' if shards else ''}; {advice}")
    return base / str(there[-1])


def manifest_of(servable: Path, kind: str) -> dict[str, Any]:
    """Returns the manifest of a servable. Raises CommandError if it is not of this kind, as model.kind has them."""
    manifest = _read_manifest(servable)
    found = manifest.get("kind", "retrieval")
    if found != kind:
        needs = {"retrieval": "--index", "ranker": "--store", "rewriter": "--rewrites"}
        raise CommandError(
            f"{servable}: is a {found} servable, expected a {kind} servable; renew it with {needs[found]}, not "
            f"{needs[kind]}"
        )
    return manifest


class Index:
    """An index directory, or one shard of it.

    Attributes:
        path: the directory with the files.
        manifest: content of index.json. That of a shard has the shard's own counts and files.
        shard: number of this shard, and number of all shards.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], shard: tuple[int, int] = (0, 1)):
        self.path, self.manifest, self.shard = path, manifest, shard

    @staticmethod
    def open(path: Path) -> Index:
        """Opens and checks an index directory. Raises CommandError if there is none, or a file of it was changed."""
        manifest = read_manifest(path / "index.json", FORMAT, FORMAT_VERSION, "dpsr index")
        check_files(path, manifest)
        return Index(path, manifest)

    def files_of_model(self) -> list[str]:
        """Returns the names of files that stay the same for other items of the same model, and the table of items."""
        encoder = {product_codes.ENCODER} & set(self.manifest["files"])
        return [servable_assets.REQUESTS, *encoder, *self.manifest["serving_files"]]

    def item_ids(self) -> np.ndarray:
        """Returns the item id of each position, int64 [items]."""
        try:
            return PackedFile(str(self.path / "item_ids.dpsr"), "item_ids")["id"]
        except (FormatError, FileNotFoundError) as error:
            raise CommandError(f"{error}; run `dpsr index` again") from None

    def item_versions(self) -> dict[int, int]:
        """Returns the last versions of items that have one (docs/fresh_items.md), deleted ones included."""
        file = PackedFile(str(self.path / "item_ids.dpsr"), "item_ids")
        if "version" not in file:
            return {}
        rows = np.flatnonzero(file["version"])
        ids = np.concatenate([file["id"][rows], file["hidden.id"]])
        versions = np.concatenate([file["version"][rows], file["hidden.version"]])
        return dict(zip(ids.tolist(), versions.tolist(), strict=True))

    def code_residual(self) -> float | None:
        """Returns what ann.code_residual returned for the index, or None."""
        file = PackedFile(str(self.path / "item_ids.dpsr"), "item_ids")
        return float(file["index.residual"][0]) if "index.residual" in file else None

    def vectors(self) -> np.ndarray:
        """Returns the embeddings that the index was made from, by position: float32 [items, dim], memory-mapped."""
        try:
            vectors = ItemEmbeddings(self.path / "item_embeddings.dpsr", self.manifest["embedding_dim"]).vectors
        except (FormatError, FileNotFoundError) as error:
            raise CommandError(f"{error}; run `dpsr index` again") from None
        return vectors

    def requests(self) -> list[dict[str, Any]]:
        """Returns requests with queries of the log."""
        return warmup.read_requests(self.path / servable_assets.REQUESTS)

    def max_parameters(self) -> str:
        """Returns the search parameters that a request may set, with the largest values that `dpsr index` measured."""
        bounds: dict[str, float] = {}
        try:
            settings = json.loads((self.path / "recall.json").read_text())["settings"]
            for setting in [*settings, {"parameters": self.manifest["parameters"]}]:
                for part in filter(None, setting["parameters"].split(",")):
                    name, _, value = part.partition("=")
                    # A request cannot set parameters of the coarse quantizer, and 0 is no limit (of max_codes).
                    if not name.strip().startswith("quantizer_") and float(value) > 0:
                        bounds[name.strip()] = max(float(value), bounds.get(name.strip(), 0.0))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CommandError(
                f"{self.path / 'recall.json'}: cannot be read: {error}; run `dpsr index` again"
            ) from None
        return ",".join(f"{name}={value:.10g}" for name, value in bounds.items())

    @contextlib.contextmanager
    def part(self, number: int, shards: int, work: Path) -> Iterator[Index]:
        """Makes one shard: every `shards`-th item from position `number` on. Its index stays trained on all items.

        Args:
            number: number of the shard.
            shards: number of shards. 1 gives the whole index.
            work: an existing directory that holds the files of the shard until the block ends.
        """
        if shards == 1:
            yield self
            return
        ids = self.item_ids()
        if shards > len(ids):
            raise UsageError(f"--shards={shards}: must be at most the number of items, {len(ids):,}")
        positions = np.arange(number, len(ids), shards)
        with tempfile.TemporaryDirectory(prefix=".shard-", dir=work) as name:
            path = Path(name)
            vectors = self.vectors()
            faiss.write_index(self.filled(vectors[positions])[0], str(path / "items.faiss"))
            write_item_ids(
                path / "item_ids.dpsr",
                ids[positions],
                path / "items.faiss",
                self.manifest.get("entries", 1),
                self.item_versions(),
                residual=self.code_residual(),
            )
            with PackedFileWriter(str(path / "item_embeddings.dpsr"), "item_embeddings") as file:
                file.add("id", ids[positions])
                file.add("embedding", np.ascontiguousarray(vectors[positions]).reshape(-1))
                file.add("empty", np.zeros(0, np.int64))
                file.add("not_finite", np.zeros(0, np.int64))
            if item_attributes.FILE in self.manifest["files"]:
                item_attributes.copy_positions(self.path, path, positions)
            _copy_titles(self.path / "item_titles.tsv.gz", set(ids[positions].tolist()), path / "item_titles.tsv.gz")
            for same in ("recall.json", *self.files_of_model()):
                link_or_copy(self.path / same, path / same)
            files = {name: file_record(path / name) for name in self.manifest["files"]}
            manifest = self.manifest | {"items": len(positions), "files": files, "shard": [number, shards]}
            yield Index(path, manifest, (number, shards))

    def filled(self, vectors: np.ndarray) -> tuple[faiss.Index, tuple[np.ndarray, np.ndarray] | None]:
        """Fills the trained index with other vectors, float32 [n, dim], and sets its search parameters.

        Returns:
            The index; and lists and codes of the vectors if the index is that of a model's quantizer, otherwise None.
        """
        index = faiss.read_index(str(self.path / "items.faiss"))
        second_list = self.manifest["config"].get("second_list", 0.0)
        if self.manifest.get("quantizer"):
            quantizer = product_codes.quantizer_of(index, product_codes.read_encoder(self.path))
            factory = self.manifest["config"]["factory"]
            index, lists, codes = product_codes.build(quantizer, factory, vectors, second_list)
            set_parameters(index, self.manifest["parameters"])
            return index, (lists, codes)
        index.reset()  # removes the vectors, keeps the trained parts and the search parameters
        if second_list:
            with two_level_assignment(index):
                product_codes.add_in_two_lists(index, vectors, second_list)
        else:
            add(index, lambda: blocks_of(vectors))
        return index, None


def _copy_titles(source: Path, item_ids: set[int], target: Path) -> None:
    with gzip.open(source, "rb") as lines, gzip.GzipFile(target, "wb", mtime=0) as file:
        file.writelines(line for line in lines if int(line.partition(b"\t")[0]) in item_ids)


def export(model: ModelDirectory, index: Index, out: Path) -> dict[str, Any]:
    """Writes a servable into the directory `out`, and lets it answer its warm-up requests.

    Returns:
        ann_recall and latency, as warmup.measure returns them.

    Raises:
        CommandError: the index was made from another model or checkpoint or is damaged, or the written servable does
            not answer.
    """
    _check_index_of_model(model, index)
    checkpoint = model.path / index.manifest["checkpoint"]
    inputs = write_saved_model(model, index.manifest, index.path, index.max_parameters(), str(checkpoint), out)
    manifest = {
        "format": MANIFEST_FORMAT,
        "version": MANIFEST_VERSION,
        "tensorflow_version": tf.__version__,
        "faiss_version": faiss.__version__,
        "op_libraries": ["libdpsr_tokenizer_ops.so", "libdpsr_retrieval_ops.so"],
        "op_libraries_version": __version__,
        "quantizer": _quantizer_fingerprint(str(checkpoint)),
        "k": model.config.serving.k,
        "inputs": inputs,
        "config": to_dict(model.config),
    }
    (out / "assets.extra").mkdir()
    return _finish(index, manifest, out)


def _check_index_of_model(model: ModelDirectory, index: Index) -> None:
    """Raises CommandError if the index was made from another model or checkpoint, or the model cannot be exported."""
    checkpoint = model.path / index.manifest["checkpoint"]
    expected = {
        "vocabulary_fingerprint": f"{model.vocabulary.fingerprint:016x}",
        "embedding_dim": model.config.model.embedding_dim,
    }
    for key, value in expected.items():
        if index.manifest[key] != value:
            raise CommandError(
                f"{index.path}: {key} is {index.manifest[key]}, but model {model.path} has {value}; "
                f"build the index from this model"
            )
    if not tf.io.gfile.exists(f"{checkpoint}.index"):
        raise CommandError(
            f"{index.path}: was made from {checkpoint.name}, which is no longer in {model.path}; run `dpsr index` again"
        )
    _check_quantizer(index, _quantizer_fingerprint(str(checkpoint)), f"model {checkpoint}")
    fingerprint = checkpoint_fingerprint(str(checkpoint))
    made_from = index.manifest["checkpoint_fingerprint"]
    if made_from != fingerprint:
        raise CommandError(
            f"{index.path}: was made from another {checkpoint.name} (fingerprint {made_from}) "
            f"than the one in {model.path} ({fingerprint}); run `dpsr index` again"
        )
    if any(feature.name == "text" for feature in model.features.item):
        raise CommandError(
            f"{model.path}: the item feature 'text' needs an input item_text, but the text of the item has this name "
            f"already; give the feature another `name` in the schema"
        )


def _quantizer_fingerprint(checkpoint: str) -> str | None:
    """Returns the fingerprint of a checkpoint's quantizer, or None if it has none."""
    return Quantizer.read(checkpoint).fingerprint if Quantizer.is_in(checkpoint) else None


def _check_quantizer(index: Index, expected: str | None, where: str) -> None:
    """Raises CommandError if the index is made of another quantizer than that of the model, `expected`."""
    made_of = (index.manifest.get("quantizer") or {}).get("fingerprint")
    if made_of is not None and made_of != expected:
        raise CommandError(
            f"{index.path}: was made of the quantizer {made_of}, but {where} has "
            f"{f'the quantizer {expected}' if expected else 'none'}; run `dpsr index` with that model"
        )


def renew_index(old: Path, index: Index, out: Path) -> dict[str, Any]:
    """Copies a servable into the directory `out` with another index, and lets it answer its warm-up requests.

    The variables stay. The graph changes only in what it says about the index: search parameters, their bounds, which
    changes of items it has, and which files it accepts.

    Returns:
        ann_recall and latency, as warmup.measure returns them.

    Raises:
        CommandError: `old` is not a servable, the index was made from another model, or the servable does not answer.
    """
    manifest = manifest_of(old, "retrieval")
    if tuple(manifest["shard"]) != index.shard:
        raise CommandError(f"{old}: is shard {manifest['shard']}, expected {list(index.shard)}; give the same --shards")
    _check_quantizer(index, manifest.get("quantizer"), f"the servable {old}")
    difference = difference_of(manifest["index"], index.manifest)
    if difference:
        raise CommandError(
            f"{index.path}: {difference}, so it is not of the model in {old}; build the index from that model, or "
            f"export the new model with --model"
        )
    renewed = {"items.faiss", "item_ids.dpsr", item_attributes.FILE, *_RENEWED} & set(index.manifest["files"])
    left_out = shutil.ignore_patterns("assets.extra", *renewed)
    shutil.copytree(old, out, dirs_exist_ok=True, ignore=left_out)
    for name in renewed:
        shutil.copyfile(index.path / name, out / "assets" / name)

    def set_parameters_of(node: Any) -> None:
        if node.op == "DpsrFaissIndexLoad":
            node.attr["parameters"].s = index.manifest["parameters"].encode()
            node.attr["max_parameters"].s = index.max_parameters().encode()
            node.attr["changes_offset"].i = index.manifest.get("changes_offset", 0)

    # The graph says search parameters, their bounds, which changes the index has, and the accepted files.
    request_tables.accept_assets(out, renewed, set_parameters_of)
    (out / "assets.extra").mkdir()
    return _finish(index, manifest, out)


def difference_of(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Compares the index.json of two indexes. Returns why they are not from the same model, or None if they are."""
    for key in (
        "vocabulary_fingerprint", "embedding_dim", "checkpoint_fingerprint", "metric", "string_ids", "features",
        "serving_files",
    ):  # fmt: skip
        if before[key] != now[key]:
            return f"{key} is {now[key]}, but {before[key]} in the servable"
    for name in now["serving_files"]:
        if name not in _RENEWED and before["files"][name]["sha256"] != now["files"][name]["sha256"]:
            return f"{name} differs from the one in the servable"
    if (item_attributes.FILE in before["files"]) != (item_attributes.FILE in now["files"]):
        return f"it has {'no ' if item_attributes.FILE in before['files'] else ''}item attributes, unlike the servable"
    return None


def _finish(index: Index, manifest: dict[str, Any], out: Path) -> dict[str, Any]:
    """Replays the warm-up requests and writes assets.extra. Returns ann_recall and latency."""
    extra = out / "assets.extra"
    shutil.copyfile(index.path / "item_titles.tsv.gz", extra / "item_titles.tsv.gz")
    queries = index.requests()
    # The name of `out` is not a number yet, so the changes of its log are not applied.
    servable = warmup.LoadedServable(out)
    try:
        requests = warmup.warmup_requests(servable, queries, manifest["k"])
        # A single shard may have no item for any of the queries.
        warmup.replay(servable, requests, index.item_ids(), bool(queries) and index.shard[1] == 1)
        measured = warmup.measure(servable, queries, index.item_ids(), index.vectors(), manifest["k"])
    finally:
        servable.close()
    warmup.write_warmup(extra / warmup.FILE, requests)
    kept = {key: value for key, value in index.manifest.items() if key not in ("format", "version", "model")}
    manifest |= {
        "dpsr_version": __version__,
        "metric": index.manifest["metric"],
        "search_parameters": {"default": index.manifest["parameters"], "max": index.max_parameters()},
        "shard": list(index.shard),
        "index": kept,
        "measured": measured | {"hardware": f"{platform.machine()}, {os.cpu_count()} cores"},
        "files": {path.name: file_record(path) for path in sorted((out / "assets").iterdir())},
    }
    (extra / "dpsr_manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return measured
