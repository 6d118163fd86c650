"""`dpsr index --merge`: an index directory with the changes of a servable's log in it.

`replay` says what a sequence of changes makes of items. A servable follows the same rules, one batch after the other
(export/faiss_search/fresh_index.h), and the tests compare the two. docs/fresh_items.md describes the rules.
"""

from __future__ import annotations

import dataclasses
import gzip
import heapq
import json
import operator
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import tensorflow as tf

from dpsr_common.errors import CommandError, op_message
from dpsr_common.files import link_or_copy
from dpsr_common.packed_file import PackedFile, PackedFileWriter
from dpsr_export import ann, embeddings, export, faiss_search, item_attributes, product_codes, recall_report, warmup
from dpsr_export import servable_assets as assets
from dpsr_export.index_files import file_record
from dpsr_export.item_attributes import Column, select_rows
from dpsr_export.item_changes import DELETE, DIRECTORY, PUT, UPDATE, Changes, ItemChangeLog
from dpsr_export.item_rows import newest_version
from dpsr_export.request_tables import KeyTable
from dpsr_tf.data.id_index import id_index
from dpsr_tf.data.schema import CODED_KINDS, FIXED_KINDS
from dpsr_tf.data.store import new_directory, pack_strings, unpack_strings, vocabulary_name
from dpsr_tf.data.user_requests import input_arrays
from dpsr_tf.models.features import Feature
from dpsr_tokenizer import Vocabulary

# Items that are embedded in one call, and vectors that are copied in one step.
_BATCH, _BLOCK = 1024, 1 << 18
_ATTRIBUTE = "attribute."
_NO_CHANGES = Changes(np.zeros(0, np.uint8), np.zeros(0, np.int64), [], np.zeros(0, np.int64))


@dataclasses.dataclass
class Changed:
    """What changes made of one item that is there in the end.

    Attributes:
        put: row of its last put. -1: it is in the base, and only attributes of it changed.
        updates: rows of the later updates, in their order.
    """

    put: int = -1
    updates: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Replayed:
    """What a sequence of changes makes of items.

    Attributes:
        items: the changed items that are there in the end, by id.
        hidden: ids that were in the base or were put, and are not there in the end.
        versions: the last version of each changed item that has one, deleted ones included.
        ignored: number of changes without effect: those with a lower version than the item's last one, and updates and
            deletes of items that are not there.
        not_indexed: row of the last put of each item that is not there because this put cannot be found, by id.
        met: rows of the puts whose item a later update or delete found, or that is there in the end.
    """

    items: dict[int, Changed]
    hidden: set[int]
    versions: dict[int, int]
    ignored: int
    not_indexed: dict[int, int]
    met: set[int]


def replay(
    base: np.ndarray,
    kinds: Sequence[int],
    ids: Sequence[int],
    versions: Sequence[int],
    base_versions: Mapping[int, int] | None = None,
    not_indexed: Iterable[int] = (),
    sharded: bool = False,
) -> Replayed:
    """Says what changes make of items.

    A change without a version (0) is always in order. A change with one is ignored if it is lower than the item's last
    version, and otherwise sets it. The version of an item that is not there is kept, so that a late put does not bring
    back what was deleted; for the same reason a delete of an unknown item sets it. With shards, an update of an unknown
    item sets it too: a shard cannot tell whether another one has the item, and all must ignore the same puts.

    Args:
        base: int64 [items], the items before the first change, ascending.
        kinds: n kinds: PUT, UPDATE or DELETE.
        ids: n item ids.
        versions: n versions.
        base_versions: the last versions of items before the first change.
        not_indexed: rows of puts that cannot be found, because their vector is zero or not finite. Such a put hides the
            item.
        sharded: whether the servable has shards.
    """
    known = set(base[np.isin(base, np.unique(np.asarray(ids, np.int64)), assume_unique=True)].tolist())
    last = dict(base_versions or {})
    changed: dict[int, Changed] = {}
    hidden: set[int] = set()
    without: dict[int, int] = {}
    met: set[int] = set()
    lost, ignored = set(not_indexed), 0
    for row, (kind, item, version) in enumerate(zip(kinds, ids, versions, strict=True)):
        if version and version < last.get(item, 0):
            ignored += 1
            continue
        there = item in changed or (item in known and item not in hidden)
        if kind != PUT and item in changed:
            met.add(changed[item].put)
        is_unknown_update = kind == UPDATE and not there
        if version and (sharded or not is_unknown_update):
            last[item] = version
        if is_unknown_update:
            ignored += 1
            continue
        if kind == UPDATE:
            changed.setdefault(item, Changed()).updates.append(row)
            continue
        without.pop(item, None)
        if kind == PUT and row not in lost:
            changed[item] = Changed(row)
            hidden.discard(item)
            continue
        if kind == PUT:
            without[item] = row
        ignored += kind == DELETE and not there
        if there or kind == PUT:
            hidden.add(item)
        changed.pop(item, None)
    met.update(change.put for change in changed.values())
    met.discard(-1)  # of the base
    return Replayed(changed, hidden, last, ignored, without, met)


def merge_index(
    index_path: Path, servable: Path, out: Path, overwrite: bool = False, min_ann_recall: float = 0.0
) -> dict[str, Any]:
    """Writes an index directory that has the changes of a log, from the end of those that `index_path` has.

    New items are embedded by the item tower of the servable. The vectors of all others stay, and so do the trained
    parts of the index and its search parameters. If it fails, no directory is written, and an earlier one stays.

    Args:
        index_path: the index directory to start from.
        servable: base path of the servable, with its versions and the directory `item_changes`. With shards, the
            directory above the base paths of the shards.
        out: the directory to write.
        overwrite: replaces an index that is already there.
        min_ann_recall: lowest ann_recall@k that is accepted.

    Returns:
        The content of index.json. Its `changes_offset` is the end of the changes, and `merged` counts them.

    Raises:
        CommandError: the index or the log is damaged, the log does not have all changes that the index lacks, the
            servable has another model than the index, or ann_recall is too low.
    """
    old = export.Index.open(index_path)
    begin = old.manifest.get("changes_offset", 0)
    log = ItemChangeLog(servable / DIRECTORY, begin)
    end, parts = log.end(), []
    for first, part in log.read(begin):
        # The log may grow meanwhile.
        parts.append(part.part(0, max(0, end - first)))
    if begin + sum(map(len, parts)) != end:
        raise CommandError(f"{log.path}: ends at the change {end}, but {index_path} has those before {begin}")
    changes = Changes.concatenated(parts) if parts else _NO_CHANGES
    version = newest_version(servable)
    served = export.manifest_of(version, "retrieval")
    difference = export.difference_of(served["index"], old.manifest)
    if difference:
        raise CommandError(f"{index_path}: {difference}; merge into the index that {version} was exported with")
    with new_directory(out, overwrite, "index", "index.json") as directory:
        # A version whose name is not a number has no log, so it is loaded as it was exported.
        alone = directory / ".servable"
        alone.symlink_to(version.resolve())
        model = warmup.LoadedServable(alone)
        try:
            sharded = served["shard"][1] > 1
            manifest = _Merge(old, changes, end, model, version, sharded, directory).write(min_ann_recall)
        finally:
            model.close()
            alone.unlink()
    return manifest


class _Merge:
    """One merge."""

    def __init__(
        self,
        old: export.Index,
        changes: Changes,
        end: int,
        model: warmup.LoadedServable,
        version: Path,
        sharded: bool,
        directory: Path,
    ):
        self._old, self._changes, self._end = old, changes, end
        self._model, self._version, self._sharded, self._dir = model, version, sharded, directory
        self._base = old.item_ids()
        start = time.perf_counter()
        self._replayed, vectors = self._replay()
        self._seconds = time.perf_counter() - start
        puts = {item: changed.put for item, changed in self._replayed.items.items() if changed.put >= 0}
        # By ascending id, also of puts that have no useful vector.
        self._puts = dict(sorted((puts | self._replayed.not_indexed).items()))
        self._examples = {item: values_of(changes.examples[row]) for item, row in self._puts.items()}
        # Of these items, float32 [puts, dim].
        self._vectors = np.array([vectors[row] for row in self._puts.values()], np.float32).reshape(
            len(self._puts), old.manifest["embedding_dim"]
        )

    def write(self, min_ann_recall: float) -> dict[str, Any]:
        """Writes the files of the new index. Returns the content of index.json."""
        rows = self._rows_of(self._vectors)
        found = self._write_vectors(rows, self._vectors)
        measured = self._build(found.vectors)
        recall_report.check(measured, min_ann_recall)
        faiss.write_index(measured.index, str(self._dir / "items.faiss"))
        faiss_search.write_item_ids(
            self._dir / "item_ids.dpsr",
            rows.ids,
            self._dir / "items.faiss",
            measured.entries,
            self._replayed.versions,
            # That of the items with which the index was trained, so that drift adds up over merges.
            self._old.code_residual(),
        )
        if item_attributes.FILE in self._old.manifest["files"]:
            item_attributes.write_columns(self._dir, self._attributes(rows))
        self._write_titles()
        for name in self._old.files_of_model():
            if name != assets.ITEMS:
                link_or_copy(self._old.path / name, self._dir / name)
        keys = self._write_items() if assets.ITEMS in self._old.manifest["serving_files"] else None
        if measured.semantic_ids is not None:
            product_codes.write_semantic_ids(
                self._dir / "semantic_ids.parquet",
                rows.ids if keys is None else [keys[item] for item in rows.ids.tolist()],
                *measured.semantic_ids,
            )
        return self._write_manifest(measured, found)

    def _replay(self) -> tuple[Replayed, dict[int, np.ndarray]]:
        """Returns what the changes make of items, and the vectors of puts, float32 [dim], by row.

        A servable embeds each put before it applies the next change, so it ignores an update of an item that cannot be
        found. Here only puts are embedded on which later changes or the result depend. If one of them cannot be found,
        the changes are replayed again.
        """
        changes, base_versions = self._changes, self._old.item_versions()
        assert changes.versions is not None
        kinds, ids, versions = (column.tolist() for column in (changes.kinds, changes.ids, changes.versions))
        vectors: dict[int, np.ndarray] = {}
        lost: set[int] = set()
        while True:
            replayed = replay(self._base, kinds, ids, versions, base_versions, lost, self._sharded)
            rows = sorted(replayed.met - vectors.keys(), key=lambda row: (ids[row], row))
            found = self._embed([changes.examples[row] for row in rows])
            vectors |= zip(rows, found, strict=True)
            useless = ~_is_useful(found)
            if not useless.any():
                return replayed, vectors
            lost.update(np.array(rows)[useless].tolist())

    def _embed(self, examples: Sequence[bytes]) -> np.ndarray:
        """Returns the vectors of items, float32 [examples, dim]."""
        wanted = self._model.inputs.get("item_embedding")
        if wanted is None:
            raise CommandError(
                f"{self._version}: has no signature item_embedding, because an older version of DPSR exported it; "
                f"export the model again"
            )
        found = [np.zeros((0, self._old.manifest["embedding_dim"]), np.float32)]
        for begin in range(0, len(examples), _BATCH):
            inputs = _arrays([values_of(example) for example in examples[begin : begin + _BATCH]], wanted)
            try:
                found.append(self._model("item_embedding", inputs)["item_embedding"])
            except tf.errors.OpError as error:
                raise CommandError(f"{self._version}: cannot embed items of the log: {op_message(error)}") from None
        return np.concatenate(found)

    def _rows_of(self, vectors: np.ndarray) -> _Rows:
        """Finds what each position of the new index holds."""
        puts = np.array(list(self._examples), np.int64)
        finite, useful = np.isfinite(vectors).all(axis=1), _is_useful(vectors)
        gone = np.union1d(puts, np.array(list(self._replayed.hidden), np.int64))
        kept, new = np.flatnonzero(~np.isin(self._base, gone)), np.flatnonzero(useful)
        ids = np.concatenate([self._base[kept], puts[new]])
        if not len(ids):
            raise CommandError(f"{self._old.path}: no item is left after the changes; an index needs at least one")
        order = np.argsort(ids, kind="stable")
        old = np.concatenate([kept, np.full(len(new), -1)])[order]
        fresh = np.concatenate([np.full(len(kept), -1), new])[order]
        return _Rows(ids[order], old, fresh, puts[finite & ~useful], puts[~finite])

    def _write_vectors(self, rows: _Rows, vectors: np.ndarray) -> embeddings.ItemEmbeddings:
        """Writes item_embeddings.dpsr, and opens it."""
        dim = self._old.manifest["embedding_dim"]
        path = self._dir / f"{embeddings.KIND}.dpsr"
        before, old = PackedFile(str(self._old.path / path.name), embeddings.KIND), self._old.vectors()
        touched = np.array([*self._examples, *self._replayed.hidden], np.int64)
        left_out = {
            "empty": np.union1d(np.setdiff1d(before["empty"], touched), rows.empty),
            "not_finite": np.union1d(np.setdiff1d(before["not_finite"], touched), rows.not_finite),
        }
        rest = np.concatenate(list(left_out.values()))
        with PackedFileWriter(str(path), embeddings.KIND) as file:
            file.add("id", np.concatenate([rows.ids, rest]))
            for begin in range(0, len(rows.ids), _BLOCK):
                block = old[np.maximum(rows.old[begin : begin + _BLOCK], 0)]
                fresh = rows.fresh[begin : begin + _BLOCK]
                block[fresh >= 0] = vectors[fresh[fresh >= 0]]
                file.append("embedding", block.reshape(-1))
            file.append("embedding", np.zeros(len(rest) * dim, np.float32))
            for name, which in left_out.items():
                file.add(name, which)
        return embeddings.ItemEmbeddings(path, dim)

    def _build(self, vectors: np.ndarray) -> recall_report.MeasuredIndex:
        """Fills the trained index with vectors, and measures it at the settings of the old recall report."""
        old, manifest = self._old, self._old.manifest
        start = time.perf_counter()
        index, semantic_ids = old.filled(vectors)
        seconds = time.perf_counter() - start
        report = json.loads((old.path / recall_report.JSON_FILE).read_text())
        queries = self._queries(vectors)
        k, entries = report["k"], manifest.get("entries", 1)
        exact = ann.Exact(vectors, queries, sorted({*ann.RECALL_AT, k}))
        parameters = dict.fromkeys([*(setting["parameters"] for setting in report["settings"]), manifest["parameters"]])
        settings = ann.measure_again(index, exact, queries, k, list(parameters), entries)
        chosen = next(setting for setting in settings if setting.parameters == manifest["parameters"])
        ann.set_parameters(index, chosen.parameters)
        measured = recall_report.MeasuredIndex(
            index, manifest["factory"], settings, chosen, k, report["recall_target"], entries, seconds, semantic_ids
        )
        what = f"{len(queries):,} queries"
        print(f"ann_recall of {measured.factory} ({what})\n{recall_report.table(measured)}")
        recall_report.write(self._dir, measured, what)
        return measured

    def _queries(self, vectors: np.ndarray) -> np.ndarray:
        """Embeds the queries of the log that the index keeps; items, if it keeps none. Float32 [queries, dim]."""
        requests = self._old.requests()
        if requests:
            inputs = input_arrays(requests, self._model.inputs["query_embedding"])
            found = self._model("query_embedding", inputs)["query_embedding"]
            found = found.reshape(-1, found.shape[2])
            found = found[found.any(axis=1) & np.isfinite(found).all(axis=1)]
            if len(found):
                return np.ascontiguousarray(found)
        return np.array(vectors[:: max(1, len(vectors) // assets.NUM_REQUESTS)])

    def _attributes(self, rows: _Rows) -> Iterator[Column]:
        """Returns the attributes of the items of the new index."""
        given: dict[int, dict[str, list[Any]]] = {}  # position -> the attributes that differ from those of the base
        for item, changed in self._replayed.items.items():
            values = dict(self._examples[item]) if changed.put >= 0 else {}
            for row in changed.updates:
                values |= values_of(self._changes.examples[row])
            given[int(np.searchsorted(rows.ids, item))] = {
                name.removeprefix(_ATTRIBUTE): of_name
                for name, of_name in values.items()
                if name.startswith(_ATTRIBUTE)
            }
        file = PackedFile(str(self._old.path / item_attributes.FILE))
        for section in file:
            if section.startswith("value."):
                yield _merged_column(file, section.removeprefix("value."), rows, given)

    def _write_titles(self) -> None:
        name = "item_titles.tsv.gz"
        gone = self._replayed.hidden | set(self._examples)
        new = [
            (item, f"{item}\t{' '.join(_text(values, 'title').split())}\n".encode())
            for item, values in self._examples.items()
        ]
        with gzip.open(self._old.path / name, "rb") as lines, gzip.GzipFile(self._dir / name, "wb", mtime=0) as file:
            old = ((int(line.partition(b"\t")[0]), line) for line in lines)
            kept = ((item, line) for item, line in old if item not in gone)
            for _, line in heapq.merge(kept, new, key=operator.itemgetter(0)):
                file.write(line)

    def _write_items(self) -> dict[int, str] | None:
        """Writes items.dpsr with the items that were put, and without those that were deleted. Returns the keys."""
        old = PackedFile(str(self._old.path / assets.ITEMS), "items")
        new = _ItemRows(self._version / "assets", self._old.manifest["features"]["item"], self._examples)
        new_ids = np.array(list(self._examples), np.int64)
        gone = np.union1d(new_ids, np.array(list(self._replayed.hidden), np.int64))
        kept = np.flatnonzero(~np.isin(old["id"], gone))
        ids = np.concatenate([old["id"][kept], new_ids])
        order = np.argsort(ids, kind="stable")
        ids = ids[order]
        with PackedFileWriter(str(self._dir / assets.ITEMS), "items") as file:
            file.add("id", ids)
            for name, section in zip(("id_index.splits", "id_index.rows"), id_index(ids), strict=True):
                file.add(name, section)
            for name in old:
                if name in ("id", "id_index.splits", "id_index.rows", "key.bytes") or name.endswith(".values"):
                    continue
                if name.startswith("values."):  # the texts of the codes, which only a new model changes
                    file.add(name, old[name])
                elif name == "key.splits":
                    assert self._changes.keys is not None or not self._puts
                    keys = [(self._changes.keys or [])[row] for row in self._puts.values()]
                    splits, data = _ragged(old["key.splits"], old["key.bytes"], kept, pack_strings(keys), order)
                    file.add("key.splits", splits)
                    file.add("key.bytes", data)
                elif name.endswith(".splits"):
                    stem = name.removesuffix(".splits")
                    before = old[f"{stem}.values"]
                    splits, values = _ragged(old[name], before, kept, new.ragged(stem, before.dtype), order)
                    file.add(name, splits)
                    file.add(f"{stem}.values", values)
                else:
                    file.add(name, np.concatenate([old[name][kept], new.codes(name).astype(old[name].dtype)])[order])
        if "key.splits" not in old:
            return None
        written = PackedFile(str(self._dir / assets.ITEMS), "items")
        return dict(zip(ids.tolist(), unpack_strings(written, "key"), strict=True))

    def _write_manifest(
        self, measured: recall_report.MeasuredIndex, found: embeddings.ItemEmbeddings
    ) -> dict[str, Any]:
        old, end = self._old.manifest, self._end
        names = old["files"]
        manifest = {key: value for key, value in old.items() if not key.startswith(("ann_recall@", "relevant_recall@"))}
        manifest |= {
            # The store no longer has what the index was made from, so `dpsr index` must not take its embeddings.
            "embeddings_source": f"{old['embeddings_source'].partition('+')[0]}+{end}",
            "changes_offset": end,
            "merged": {
                "changes": len(self._changes.kinds),
                "put": len(self._puts),
                "updated": sum(changed.put < 0 for changed in self._replayed.items.values()),
                "removed": int(np.isin(self._base, list(self._replayed.hidden)).sum()),
                "ignored": self._replayed.ignored,
            },
            "items": len(found.ids),
            "empty_items": found.num_empty,
            "not_finite_items": found.num_not_finite,
            "bytes": (self._dir / "items.faiss").stat().st_size,
            **{f"ann_recall@{at}": value for at, value in measured.chosen.ann_recall.items()},
            "p50_ms": measured.chosen.p50_ms,
            "p99_ms": measured.chosen.p99_ms,
            "seconds": {"embeddings": round(self._seconds, 3), "index": round(measured.seconds, 3)},
            "files": {name: file_record(self._dir / name) for name in names},
        }
        (self._dir / "index.json").write_text(json.dumps(manifest, indent=2) + "\n")
        return manifest


class _Rows(NamedTuple):
    """The items of the new index, by position.

    Attributes:
        ids: int64 [items], ascending.
        old: int64 [items], positions in the old index; -1 for an item that was put.
        fresh: int64 [items], rows of the new vectors; -1 for an item of the old index.
        empty: ids of puts whose vector is zero.
        not_finite: ids of puts whose vector holds a NaN or an infinity.
    """

    ids: np.ndarray
    old: np.ndarray
    fresh: np.ndarray
    empty: np.ndarray
    not_finite: np.ndarray


class _ItemRows:
    """The texts and features of new items as items.dpsr has them, by the tables of the servable."""

    def __init__(self, directory: Path, described: Sequence[Mapping[str, Any]], items: Mapping[int, dict[str, Any]]):
        """Tokenizes and codes them.

        Args:
            directory: assets of the servable.
            described: kind, boundaries and vocabulary of the item features (servable_assets.describe).
            items: the values of each item by the names of the servable's inputs.
        """
        self._lists: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._codes: dict[str, np.ndarray] = {}
        values = list(items.values())
        texts = [_text(item, "item_text") for item in values]
        self._lists["tokens"] = _tokens(directory / vocabulary_name(None), texts)
        coded = [Feature(feature["name"], feature["kind"]) for feature in described if feature["kind"] in CODED_KINDS]
        if coded and values:
            types = [np.dtype(np.float32 if feature.kind == "number" else object) for feature in coded]
            ranks = {
                f"item_{feature.name}": (dtype, 1 if feature.kind in FIXED_KINDS else 2)
                for feature, dtype in zip(coded, types, strict=True)
            }
            arrays = _arrays(values, ranks)
            inputs = [
                tf.constant(arrays[name], tf.string if dtype.kind == "O" else tf.float32)
                for name, (dtype, _) in ranks.items()
            ]
            table = KeyTable(directory / assets.FEATURE_VALUES)
            boundaries = {feature["name"]: feature["boundaries"] for feature in described}
            codes, lists = table.feature_codes("item", coded, boundaries, tf.constant(texts), inputs)
            fixed = [feature.name for feature in coded if feature.kind in FIXED_KINDS]
            self._codes = {f"feature.{name}": codes.numpy()[:, column] for column, name in enumerate(fixed)}
            for name, found in lists.items():
                self._lists[f"feature.{name}"] = found.row_splits.numpy(), found.values.numpy()
        for feature in described:
            name = feature["name"]
            if feature["kind"] == "text":
                given = [_text(item, f"item_{name}") for item in values]
                self._lists[f"feature.{name}"] = _tokens(directory / vocabulary_name(feature["vocabulary"]), given)
            elif feature["kind"] == "vector":
                rows = [np.array(item.get(f"item_{name}", []), np.float32) for item in values]
                rows = [row[:0] if np.isnan(row).any() else row for row in rows]
                splits = np.cumsum([0, *map(len, rows)], dtype=np.int64)
                self._lists[f"feature.{name}"] = splits, np.concatenate([np.zeros(0, np.float32), *rows])

    def codes(self, name: str) -> np.ndarray:
        """Returns the codes of a section such as "feature.brand", int32 [items]."""
        return self._codes.get(name, np.zeros(0, np.int32))

    def ragged(self, name: str, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Returns splits, int64 [items + 1], and values of a section such as "tokens"."""
        splits, values = self._lists.get(name, (np.zeros(1, np.int64), np.zeros(0, dtype)))
        return splits, values.astype(dtype)


def _is_useful(vectors: np.ndarray) -> np.ndarray:
    """Returns for each of the vectors [n, dim] whether a search can find it, bool [n]."""
    useful: np.ndarray = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
    return useful


def values_of(example: bytes) -> dict[str, list[Any]]:
    """Returns the values of a serialized tf.train.Example by name: texts, or numbers."""
    found: dict[str, list[Any]] = {}
    for name, feature in tf.train.Example.FromString(example).features.feature.items():
        if feature.WhichOneof("kind") == "float_list":
            found[name] = list(feature.float_list.value)
        else:
            found[name] = [value.decode(errors="replace") for value in feature.bytes_list.value]
    return found


def _text(values: Mapping[str, list[Any]], name: str) -> str:
    return str(next(iter(values.get(name, [])), ""))


def _arrays(items: Sequence[Mapping[str, list[Any]]], ranks: Mapping[str, tuple[np.dtype, int]]) -> dict[str, Any]:
    """Returns the inputs of a signature for the values of items."""
    single = {name for name, (_, rank) in ranks.items() if rank == 1}
    requests = [
        {name: next(iter(value), None) if name in single else value for name, value in values.items()}
        for values in items
    ]
    return input_arrays(requests, ranks)


def _tokens(vocabulary: Path, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns splits, int64 [texts + 1], and token ids, int32."""
    values, splits = Vocabulary(vocabulary).encode_batch(texts)
    return splits, values


def _ragged(
    splits: np.ndarray,
    values: np.ndarray,
    kept: np.ndarray,
    new: tuple[np.ndarray, np.ndarray],
    order: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Puts rows of an old ragged array and those of a new one in a new order.

    Args:
        splits: int64 [rows + 1].
        values: the values of the old rows.
        kept: int64, the old rows to take.
        new: splits and values of the new rows.
        order: int64 [kept + new], the place of each row of the result among the kept rows and then the new ones.

    Returns:
        Splits and values of the result.
    """
    all_splits = np.concatenate([splits, splits[-1] + new[0][1:]])
    rows = np.concatenate([kept, len(splits) - 1 + np.arange(len(new[0]) - 1)])
    taken, places = select_rows(all_splits, rows[order])
    return taken, np.concatenate([values, new[1]])[places]


def _merged_column(file: PackedFile, name: str, rows: _Rows, given: Mapping[int, Mapping[str, list[Any]]]) -> Column:
    """Returns one attribute of the items of the new index.

    Args:
        file: the attributes of the old index.
        name: the attribute.
        rows: the items.
        given: position -> attributes that changes gave the item. An item that was put has no others.
    """
    changed = {
        position: of_item.get(name, [])
        for position, of_item in given.items()
        if rows.old[position] < 0 or name in of_item
    }
    places = np.array(list(changed), np.int64)
    from_base = np.flatnonzero(rows.old >= 0)
    if f"text.{name}.splits" not in file:
        numbers = np.full(len(rows.ids), np.nan)
        numbers[from_base] = file[f"value.{name}"][rows.old[from_base]]
        numbers[places] = [_number(values) for values in changed.values()]
        return Column(name, numbers)
    texts = unpack_strings(file, f"text.{name}")
    codes = {text: code for code, text in enumerate(texts, 1)}

    def code_of(text: str) -> int:
        return codes.setdefault(text, len(codes) + 1)

    new = [[code_of(value) for value in map(str, values) if value] for values in changed.values()]
    if f"splits.{name}" not in file:
        found = np.zeros(len(rows.ids), np.int64)
        found[from_base] = file[f"value.{name}"][rows.old[from_base]]
        found[places] = [next(iter(of_item), 0) for of_item in new]
        return Column(name, found, list(codes))
    kept = np.setdiff1d(from_base, places)
    order = np.argsort(np.concatenate([kept, places]), kind="stable")
    lists = np.cumsum([0, *map(len, new)], dtype=np.int64), np.array([code for item in new for code in item], np.int64)
    splits, values = _ragged(file[f"splits.{name}"], file[f"value.{name}"], rows.old[kept], lists, order)
    return Column(name, values, list(codes), splits)


def _number(values: Sequence[Any]) -> float:
    """Returns a number that may be written as text. NaN is missing."""
    try:
        return float(next(iter(values), "nan"))
    except ValueError:
        return float("nan")
