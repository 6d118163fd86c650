"""`dpsr ingest`: raw tables and a schema into a store (DPSR section 5.1.2)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from absl import flags
from tqdm import tqdm

from dpsr_tf.config import to_dict
from dpsr_tf.data.schema import InteractionsSchema, Schema, UsersSchema, adapter_path, load_schema
from dpsr_tf.data.store import FILES, FORMAT, FORMAT_VERSION, Counts, new_directory, pack_strings
from dpsr_tf.data.tables import Table, find_files
from dpsr_tf.errors import CommandError, UsageError
from dpsr_tokenizer import PackedFile, PackedFileWriter, TokenizerConfig, Vocabulary, VocabularyBuilder

USAGE = """
Usage: dpsr ingest --schema=FILE --out=STORE
       dpsr ingest --adapter=NAME --input=DIR --out=STORE

Turns raw tables (Parquet, CSV, TSV, JSON lines; .gz too) into a store that `dpsr train` reads. The schema file says
which columns are what; an adapter is a ready schema for a data set that is known by name (homedepot).
"""

# Rows a token step takes: large enough for speed, small enough for a moving progress bar.
_CHUNK = 8192

REQUIRED_FLAGS = ("out",)


def define_flags(values: flags.FlagValues) -> None:
    """Flags of `dpsr ingest`."""
    flags.DEFINE_string("schema", None, "schema file (YAML)", flag_values=values)
    flags.DEFINE_string("adapter", None, "ready schema, by name", flag_values=values)
    flags.DEFINE_string("input", None, "directory that the schema's files are relative to", flag_values=values)
    flags.DEFINE_string("out", None, "directory of the store, made by this command", flag_values=values)
    flags.DEFINE_boolean("overwrite", False, "replaces a store that is there", flag_values=values)
    flags.DEFINE_float("max_reject_fraction", 0.01, "share of unusable rows that stops the job", flag_values=values)


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr ingest`."""
    if (values.schema is None) == (values.adapter is None):
        raise UsageError("give either --schema=FILE or --adapter=NAME")
    if values.adapter is not None and values.input is None:
        raise UsageError(f"--adapter={values.adapter} needs --input, the directory of the downloaded files")
    if not 0 <= values.max_reject_fraction <= 1:
        raise UsageError(f"--max_reject_fraction={values.max_reject_fraction:g}: expected a share, 0 to 1")
    schema_path = Path(values.schema) if values.schema else adapter_path(values.adapter)
    schema = load_schema(schema_path)
    base = Path(values.input) if values.input else schema_path.parent
    with new_directory(Path(values.out), values.overwrite, "store", "manifest.json") as out:
        counts = ingest(schema, base, out, values.max_reject_fraction)
    print(
        f"store {values.out}: {counts.items:,} items, {counts.users:,} users, {counts.queries:,} queries, "
        f"{counts.positives:,} positive pairs, {counts.negatives:,} supervised negatives"
    )


def ingest(schema: Schema, base: Path, out: Path, max_reject_fraction: float = 0.01) -> Counts:
    """Writes the files of a store into the directory `out`.

    Args:
        schema: what the columns are.
        base: directory that the schema's files are relative to.
        out: an existing, empty directory.
        max_reject_fraction: share of unusable interactions (unknown item or user, no query text, no label) that is
            still accepted; they are left out.

    Raises:
        CommandError: a file cannot be read, or the rows give no store; the message names file and column.
    """
    items = _Items.read(schema, base)
    user_ids, user_features = _read_users(schema.users, base)
    log = _Log.read(schema.interactions, base, items.ids, user_ids, max_reject_fraction)

    tokenizer = TokenizerConfig(**dataclasses.asdict(schema.tokenizer))
    builder = VocabularyBuilder(tokenizer)
    for chunk in _chunks("count tokens", items.texts + log.queries):
        builder.add(chunk)
    limits = schema.vocabulary
    builder.write(
        str(out / "vocabulary.dpsr"),
        min_count=limits.min_count,
        max_size=limits.max_size,
        num_oov_buckets=limits.num_oov_buckets,
    )
    vocabulary = Vocabulary(str(out / "vocabulary.dpsr"))

    with PackedFileWriter(str(out / "users.dpsr"), "users") as users_file:
        users_file.add("id", user_ids)
        for name, codes in user_features.items():
            users_file.add(f"feature.{name}", codes)
    with PackedFileWriter(str(out / "items.dpsr"), "items") as items_file:
        items_file.add("id", items.ids)
        _add_tokens(items_file, "tokens.splits", "tokens.values", "encode items", items.texts, vocabulary)
    with PackedFileWriter(str(out / "titles.dpsr"), "titles") as titles_file:
        splits, data = pack_strings(items.titles)
        titles_file.add("title.splits", splits)
        titles_file.add("title.bytes", data)
    with PackedFileWriter(str(out / "interactions.dpsr"), "interactions") as log_file:
        _add_tokens(log_file, "query.splits", "query.tokens", "encode queries", log.queries, vocabulary)
        log.write(log_file)

    counts = Counts(len(user_ids), len(items.ids), len(log.queries), len(log.positive), len(log.negative))
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "counts": dataclasses.asdict(counts),
        "fingerprints": {name: f"{PackedFile(str(out / name), verify=False).fingerprint:016x}" for name in FILES},
        "schema": to_dict(schema),
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return counts


@dataclasses.dataclass
class _Items:
    ids: np.ndarray  # int64 [items]
    texts: list[str]  # what the tower reads
    titles: list[str]  # what people read

    @staticmethod
    def read(schema: Schema, base: Path) -> _Items:
        s = schema.items
        title = s.title or s.text[0]
        ids, texts, titles = [], [], []
        files = find_files(s.files, base)
        for path in files:
            table = Table(path, [*s.text, title], [s.id])
            ids.append(table.ids(s.id, minimum=0))  # -1 is what a servable pads with
            columns = [table.text(name) for name in s.text]
            texts += pc.binary_join_element_wise(*columns, pa.scalar(" ", pa.large_string())).to_pylist()
            titles += table.text(title).to_pylist()
        all_ids = np.concatenate(ids)
        if len(all_ids) == 0:
            raise CommandError(f"{files[0]}: has no row, expected at least one item")
        _check_distinct(all_ids, files[0], s.id, "an item")
        return _Items(all_ids, texts, titles)


def _read_users(schema: UsersSchema | None, base: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Ids int64 [users] and codes int32 [users] of each feature. Row 0 is the anonymous user, id -1, all codes 0."""
    if schema is None:
        return np.array([-1], np.int64), {}
    ids = [np.array([-1], np.int64)]
    values: dict[str, list[pa.ChunkedArray]] = {name: [] for name in schema.features}
    files = find_files(schema.files, base)
    for path in files:
        table = Table(path, [], [schema.id, *schema.features])
        ids.append(table.ids(schema.id, minimum=0))
        for name in schema.features:
            values[name].append(table.text(name))
    all_ids = np.concatenate(ids)
    _check_distinct(all_ids, files[0], schema.id, "a user")
    features = {}
    for name, tables in values.items():
        texts = pa.chunked_array([chunk for table in tables for chunk in table.chunks], pa.large_string())
        # Code 0 is "unknown"; the others follow the order of the values' text, so the same table gives the same codes.
        known = sorted(value for value in set(texts.unique().to_pylist()) if value)
        codes = pc.fill_null(pc.index_in(texts, pa.array(known, pa.large_string())), -1).to_numpy() + 1
        features[name] = np.concatenate([[0], codes]).astype(np.int32)
    return all_ids, features


def _check_distinct(ids: np.ndarray, path: Path, column: str, what: str) -> None:
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) != len(ids):
        repeated = unique[counts > 1]
        raise CommandError(
            f"{path}: column {column}: {len(repeated):,} ids stand more than once, first {repeated[0]}; "
            f"expected one row {what}"
        )


@dataclasses.dataclass
class _Log:
    """Distinct queries, and pairs that refer to them by row, sorted by (query, item)."""

    queries: list[str]
    positive: np.ndarray  # rows of (query, user, item, weight)
    negative: np.ndarray  # the same

    _PAIR = np.dtype([("query", np.int32), ("user", np.int32), ("item", np.int32), ("weight", np.float32)])

    @staticmethod
    def read(
        s: InteractionsSchema, base: Path, item_ids: np.ndarray, user_ids: np.ndarray, max_reject_fraction: float
    ) -> _Log:
        optional = [name for name in (s.user, s.weight, s.label) if name is not None]
        texts, pairs, labels, total = [], [], [], 0
        rejected = {"item is not in the item table": 0, "user is not in the user table": 0, "query is empty": 0}
        files = find_files(s.files, base)
        for path in files:
            table = Table(path, [s.query], [s.item, *optional])
            rows = np.zeros(len(table), _Log._PAIR)
            query = pc.utf8_trim_whitespace(table.text(s.query))
            item = _rows_of(table.ids(s.item), item_ids)
            user = _rows_of(table.ids(s.user), user_ids) if s.user else np.zeros(len(table), int)
            label = table.numbers(s.label) if s.label else np.full(len(table), s.positive_from)
            rows["item"], rows["user"] = item, user
            rows["weight"] = table.numbers(s.weight, 0, float(np.finfo(np.float32).max)) if s.weight else 1
            filled = pc.not_equal(pc.utf8_length(query), 0).to_numpy(zero_copy_only=False)
            usable = (item >= 0) & (user >= 0) & filled
            for reason, bad in zip(rejected, (item < 0, user < 0, ~filled), strict=False):
                rejected[reason] += int(bad.sum())
            total += len(table)
            texts.append(query.filter(pa.array(usable)))
            pairs.append(rows[usable])
            labels.append(label[usable])
        all_pairs, all_labels = np.concatenate(pairs), np.concatenate(labels)
        reasons = "; ".join(f"{count:,} rows: {reason}" for reason, count in rejected.items() if count)
        if total - len(all_pairs) > max_reject_fraction * total:
            raise CommandError(
                f"{files[0]}: {total - len(all_pairs):,} of {total:,} interactions cannot be used ({reasons}), more "
                f"than --max_reject_fraction={max_reject_fraction:g}; correct the tables or the schema"
            )
        if reasons:
            print(f"left out {total - len(all_pairs):,} of {total:,} interactions ({reasons})")
        if not (all_labels >= s.positive_from).any():
            what = f"no label in column {s.label} is {s.positive_from:g} or more" if s.label else "there is no row"
            raise CommandError(f"{files[0]}: no positive pair among {total:,} interactions: {what}; correct the schema")
        negative = all_labels <= s.negative_to if s.negative_to is not None else np.zeros(len(all_labels), bool)
        used = (all_labels >= s.positive_from) | negative
        dictionary = pa.chunked_array([c for t in texts for c in t.chunks], pa.large_string()).filter(pa.array(used))
        encoded = dictionary.combine_chunks().dictionary_encode()
        # Rows of queries follow the order of their text, so the same log in another order gives the same store.
        words = encoded.dictionary.to_numpy(zero_copy_only=False)
        order = np.argsort(words, kind="stable")
        all_pairs, positive = all_pairs[used], ~negative[used]
        all_pairs["query"] = np.argsort(order)[encoded.indices.to_numpy()]
        rows = np.lexsort([all_pairs[name] for name in ("weight", "user", "item", "query")])
        all_pairs, positive = all_pairs[rows], positive[rows]
        return _Log(words[order].tolist(), all_pairs[positive], all_pairs[~positive])

    def write(self, file: PackedFileWriter) -> None:
        splits, data = pack_strings(self.queries)
        file.add("query_text.splits", splits)
        file.add("query_text.bytes", data)
        for name, pairs in (("positive", self.positive), ("negative", self.negative)):
            counts = np.bincount(pairs["query"], minlength=len(self.queries))
            file.add(f"{name}.splits", np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
            columns = ("query", "user", "item", "weight") if name == "positive" else ("item",)
            for column in columns:
                file.add(f"{name}.{column}", np.ascontiguousarray(pairs[column]))


def _rows_of(ids: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Where each id stands in `table`; -1 if nowhere."""
    order = np.argsort(table, kind="stable")
    position = np.minimum(np.searchsorted(table, ids, sorter=order), len(table) - 1)
    rows = order[position]
    return np.where(table[rows] == ids, rows, -1)


def _chunks(label: str, texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """`texts` in pieces, under a progress bar in rows a second."""
    with tqdm(total=len(texts), desc=f"{label:<14}", unit=" rows", unit_scale=True) as bar:
        for begin in range(0, len(texts), _CHUNK):
            chunk = texts[begin : begin + _CHUNK]
            yield chunk
            bar.update(len(chunk))


def _add_tokens(
    file: PackedFileWriter, splits_name: str, values_name: str, label: str, texts: Sequence[str], vocabulary: Vocabulary
) -> None:
    """Writes the token ids of `texts` as row splits int64 [rows + 1] and values int32 [tokens]."""
    lengths = []
    for chunk in _chunks(label, texts):
        values, splits = vocabulary.encode_batch(chunk)
        file.append(values_name, values)
        lengths.append(np.diff(splits))
    total = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(np.concatenate(lengths), out=total[1:])
    file.add(splits_name, total)
