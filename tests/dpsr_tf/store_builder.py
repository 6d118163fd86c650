"""Writes a small store from NumPy arrays, so that tests of what reads a store do not depend on ingest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpsr_common.packed_file import PackedFileWriter
from dpsr_tf.data.store import interactions_names
from dpsr_tokenizer import TokenizerConfig, VocabularyBuilder

CLICK = 2


@dataclasses.dataclass
class Ragged:
    """Row i is values[splits[i]:splits[i + 1]]."""

    splits: np.ndarray  # int64 [rows + 1]
    values: np.ndarray  # int32

    @staticmethod
    def of(rows: list[list[int]]) -> Ragged:
        lengths = [len(row) for row in rows]
        values = np.array([value for row in rows for value in row], np.int32)
        return Ragged(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), values)

    @staticmethod
    def of_lengths(lengths: np.ndarray, values: np.ndarray) -> Ragged:
        return Ragged(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), values.astype(np.int32))

    def take(self, rows: np.ndarray) -> Ragged:
        lengths = np.diff(self.splits)[rows]
        splits = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        index = np.repeat(self.splits[:-1][rows] - splits[:-1], lengths) + np.arange(splits[-1])
        return Ragged(splits, self.values[index])

    def lists(self) -> list[list[int]]:
        return [part.tolist() for part in np.split(self.values, self.splits[1:-1])]


@dataclasses.dataclass
class Table:
    """Items or users: ids in ascending order, fixed features as codes, list features as ragged codes or tokens."""

    ids: np.ndarray  # int64
    fixed: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    lists: dict[str, Ragged] = dataclasses.field(default_factory=dict)
    kinds: dict[str, str] = dataclasses.field(default_factory=dict)  # "categorical" and "multi" where left out


@dataclasses.dataclass
class Log:
    """Positives in any order. `query` counts from 0 over `queries`; the shard of a query is query % shards."""

    queries: Ragged  # tokens
    query: np.ndarray
    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    type: np.ndarray
    weight: np.ndarray | None = None
    label: np.ndarray | None = None
    request: np.ndarray | None = None  # rows of `impressions`, or -1
    impressions: Ragged | None = None
    negatives: Ragged | None = None  # of each query


@dataclasses.dataclass
class SmallStore:
    """What dpsr_tf.data.examples_dataset needs of a store."""

    path: Any
    manifest: dict[str, Any]


def mix64(x: np.ndarray) -> np.ndarray:
    """Mix64 of dpsr_tf/ops/permutation.h."""
    with np.errstate(over="ignore"):
        x = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def id_index(ids: np.ndarray) -> dict[str, np.ndarray]:
    """Sections id_index.splits and id_index.rows of a table."""
    bits = max(0, int(len(ids) - 1).bit_length()) if len(ids) else 0
    buckets = (mix64(ids) >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(len(ids), np.int64)
    rows = np.argsort(buckets, kind="stable").astype(np.int32)
    splits = np.searchsorted(buckets[rows], np.arange((1 << bits) + 1)).astype(np.int32)
    return {"id_index.splits": splits, "id_index.rows": rows}


def _features(table: Table) -> dict[str, np.ndarray]:
    sections: dict[str, np.ndarray] = {}
    for name, codes in table.fixed.items():
        sections[f"feature.{name}"] = codes.astype(np.uint8 if codes.max(initial=0) < 256 else np.int32)
    for name, column in table.lists.items():
        sections |= {f"feature.{name}.splits": column.splits, f"feature.{name}.values": column.values}
    for name, codes in [*table.fixed.items(), *((n, c.values) for n, c in table.lists.items())]:
        if _kind(table, name) in ("categorical", "multi"):
            count = int(codes.max(initial=0))
            sections[f"values.{name}.splits"] = np.arange(count + 1, dtype=np.int64)
            sections[f"values.{name}.bytes"] = np.full(count, ord("v"), np.uint8)
    return sections


def _numbers(name: str, column: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
    values = np.unique(column.astype(np.float32))
    if len(values) > 256:
        return {name: column[rows].astype(np.float32)}
    return {name: np.searchsorted(values, column[rows]).astype(np.uint8), f"{name}.values": values}


def queries_of(file: Mapping[str, np.ndarray]) -> np.ndarray:
    """Local query row of each positive of an interactions file."""
    lengths = np.diff(file["positive.splits"])
    return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)


def numbers_of(file: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Column `name` (positive.weight or positive.label) of an interactions file, float32."""
    return file[f"{name}.values"][file[name]] if f"{name}.values" in file else file[name]


def _kind(table: Table, name: str) -> str:
    return table.kinds.get(name, "categorical" if name in table.fixed else "multi")


def _described(table: Table) -> list[dict[str, Any]]:
    described = []
    for name in [*table.fixed, *table.lists]:
        codes = table.fixed[name] if name in table.fixed else table.lists[name].values
        feature: dict[str, Any] = {"name": name, "kind": _kind(table, name), "boundaries": [], "vocabulary": None}
        if feature["kind"] != "text":
            feature["num_values"] = int(codes.max(initial=0))
        described.append(feature)
    return described


def write_file(path: Path, kind: str, sections: dict[str, np.ndarray]) -> None:
    """A packed file of these sections."""
    with PackedFileWriter(path, kind) as file:
        for name, values in sections.items():
            file.add(name, np.ascontiguousarray(values))


def title_of(tokens: list[int]) -> str:
    """A title with a word of letters a token."""
    return " ".join("".join(chr(ord("a") + int(digit)) for digit in f"{token:04}") for token in tokens)


def _texts(name: str, texts: list[str]) -> dict[str, np.ndarray]:
    encoded = [text.encode() for text in texts]
    splits = np.cumsum([0, *map(len, encoded)]).astype(np.int64)
    return {f"{name}.splits": splits, f"{name}.bytes": np.frombuffer(b"".join(encoded), np.uint8)}


def write_store(path: Path, items: Table, text: Ragged, users: Table, log: Log, shards: int = 1) -> SmallStore:
    """Writes items.dpsr, titles.dpsr, users.dpsr (row 0 anonymous) and the interaction files; no manifest.json.

    Texts of titles and queries are those of `title_of`; vocabulary.dpsr is of these texts, not of the tokens given.
    """
    path.mkdir(parents=True, exist_ok=True)
    num_queries = len(log.queries.splits) - 1
    # Rows of queries: shard after shard.
    shard_of = np.arange(num_queries) % shards
    order = np.lexsort((np.arange(num_queries), shard_of))
    row_of = np.empty(num_queries, np.int64)
    row_of[order] = np.arange(num_queries)
    query = row_of[log.query]
    rows = np.lexsort((log.type, log.time, log.user, log.item, query))
    write_file(
        path / "items.dpsr",
        "items",
        {"id": items.ids}
        | id_index(items.ids)
        | {"popularity": np.bincount(log.item, minlength=len(items.ids)).astype(np.float32)}
        | {"tokens.splits": text.splits, "tokens.values": text.values}
        | _features(items),
    )
    titles = [title_of(tokens) for tokens in text.lists()]
    write_file(path / "titles.dpsr", "titles", _texts("title", titles))
    vocabulary = VocabularyBuilder(TokenizerConfig(letter_trigrams=False))
    vocabulary.add([*titles, *(title_of(tokens) for tokens in log.queries.lists())])
    vocabulary.write(str(path / "vocabulary.dpsr"), num_oov_buckets=1)
    known = np.flatnonzero(log.user > 0)
    known = known[np.lexsort((log.type[known], log.item[known], query[known], log.time[known], log.user[known]))]
    write_file(
        path / "users.dpsr",
        "users",
        {"id": users.ids}
        | id_index(users.ids)
        | _features(users)
        | {
            "event.splits": np.searchsorted(log.user[known], np.arange(len(users.ids) + 1)).astype(np.int64),
            "event.time": log.time[known].astype(np.uint32),
            "event.item": log.item[known].astype(np.int32),
            "event.query": query[known].astype(np.int32),
            "event.type": log.type[known].astype(np.uint8),
        },
    )
    manifest = {
        "format": "dpsr-store",
        "version": 3,
        "shards": shards,
        "features": {"items": _described(items), "users": _described(users)},
    }
    negatives = log.negatives or Ragged(np.zeros(num_queries + 1, np.int64), np.zeros(0, np.int32))
    first = 0
    for shard, name in enumerate(interactions_names(manifest["shards"])):
        queries = order[shard_of[order] == shard]
        own = rows[shard_of[log.query[rows]] == shard]
        local = (query[own] - first).astype(np.int32)
        of_queries = log.queries.take(queries)
        of_negatives = negatives.take(queries)
        sections = {
            "query.splits": of_queries.splits,
            "query.tokens": of_queries.values,
            "positive.splits": np.searchsorted(local, np.arange(len(queries) + 1)).astype(np.int64),
            "positive.user": log.user[own].astype(np.int32),
            "positive.item": log.item[own].astype(np.int32),
            "positive.type": log.type[own].astype(np.uint8),
            "positive.time": log.time[own].astype(np.uint32),
        }
        sections |= _texts("query_text", [title_of(tokens) for tokens in of_queries.lists()])
        if log.weight is not None:
            sections |= _numbers("positive.weight", log.weight, own)
        if log.label is not None:
            sections |= _numbers("positive.label", log.label, own)
        if log.request is not None and log.impressions is not None:
            kept = np.unique(log.request[own][log.request[own] >= 0])
            request = np.where(log.request[own] < 0, -1, np.searchsorted(kept, log.request[own]))
            shown = log.impressions.take(kept)
            sections["positive.request"] = request.astype(np.int32)
            sections |= {"impression.splits": shown.splits, "impression.item": shown.values}
        sections |= {"negative.splits": of_negatives.splits, "negative.item": of_negatives.values}
        write_file(path / name, "interactions", sections)
        first += len(queries)
    return SmallStore(path, manifest)


def random_store(
    path: Path,
    seed: int = 0,
    *,
    num_items: int = 60,
    num_users: int = 10,
    num_queries: int = 30,
    num_positives: int = 240,
    text_length: int = 6,
    shards: int = 1,
    time_span: int = 40,
    zipf: float = 1.0,
    fixed: int = 2,
    items_per_query: int = 15,
    with_impressions: bool = True,
) -> SmallStore:
    """A store of random rows with every optional section; each weight is its own, 1 to num_positives.

    Some items have no text, some users no events, some positives no request and some queries no negatives; times are
    few, so that many events have the time of a positive; the log is as skewed as `zipf` says.
    """
    rng = np.random.default_rng(seed)

    def ragged(rows: int, longest: int, values: int) -> Ragged:
        lengths = rng.integers(0, longest + 1, rows)
        return Ragged.of_lengths(lengths, rng.integers(1, values + 1, lengths.sum()))

    def distinct(rows: int, longest: int) -> Ragged:
        raw = ragged(rows, longest, num_items)
        pairs = np.unique(np.repeat(np.arange(rows), np.diff(raw.splits)) * num_items + raw.values - 1)
        return Ragged.of_lengths(np.bincount(pairs // num_items, minlength=rows), pairs % num_items)

    items = Table(np.sort(rng.choice(10 * num_items, num_items, replace=False)).astype(np.int64) * 1_000_003)
    users = Table(np.concatenate([[-1], 100 + 7 * np.arange(num_users - 1)]).astype(np.int64))
    for i in range(fixed):
        items.fixed[f"code{i}"] = rng.integers(0, 5 + i, num_items)
        users.fixed[f"profile{i}"] = np.concatenate([[0], rng.integers(0, 3 + i, num_users - 1)])
    items.kinds["code0"] = "number"
    items.lists["tags"] = ragged(num_items, 3, 9)
    items.lists["note"] = ragged(num_items, 4, 100)
    items.kinds["note"] = "text"
    users.lists["interests"] = ragged(num_users, 3, 7)
    splits = users.lists["interests"].splits
    users.lists["interests"] = Ragged(np.maximum(splits - splits[1], 0), users.lists["interests"].values[splits[1] :])

    popular = 1.0 / np.arange(1, num_queries + 1) ** zipf
    query = rng.choice(num_queries, num_positives, p=popular / popular.sum())
    log = Log(
        queries=ragged(num_queries, 5, 1000),
        query=query,
        user=rng.integers(0, num_users, num_positives),
        item=(query * 7 + (items_per_query * rng.random(num_positives) ** 2).astype(np.int64)) % num_items,
        time=rng.integers(1000, 1000 + time_span, num_positives),
        type=rng.integers(2, 5, num_positives),
        weight=np.arange(1, num_positives + 1),
        label=rng.integers(1, 4, num_positives),
        negatives=distinct(num_queries, 6),
    )
    if with_impressions:
        log.impressions = distinct(num_positives // 2, 6)
        log.request = rng.integers(-1, num_positives // 2, num_positives)
    text = ragged(num_items, text_length, 1000) if text_length < 20 else _full(rng, num_items, text_length)
    return write_store(path, items, text, users, log, shards)


def _full(rng: np.random.Generator, rows: int, length: int) -> Ragged:
    return Ragged.of_lengths(np.full(rows, length), rng.integers(1, 30_000, rows * length))
