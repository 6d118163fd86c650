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
from dpsr_tf.data.store import FORMAT, FORMAT_VERSION, Counts, new_directory, pack_strings
from dpsr_tf.data.tables import find_files, read_table
from dpsr_tf.errors import CommandError, UsageError
from dpsr_tokenizer import PackedFileWriter, TokenizerConfig, Vocabulary, VocabularyBuilder

USAGE = """
Usage: dpsr ingest --schema=FILE --out=STORE
       dpsr ingest --adapter=NAME --input=DIR --out=STORE

Turns raw tables (Parquet, CSV, TSV, JSON lines; .gz too) into a store that `dpsr train` reads. The schema file says
which columns are what; an adapter is a ready schema for a data set that is known by name (homedepot).
"""

# Rows a token step takes: large enough for speed, small enough for a moving progress bar.
_CHUNK = 8192


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
    if arguments:
        raise UsageError(f"unexpected argument '{arguments[0]}'; see `dpsr ingest --help`")
    if (values.schema is None) == (values.adapter is None):
        raise UsageError("give either --schema=FILE or --adapter=NAME")
    if values.out is None:
        raise UsageError("--out is missing: the directory of the store to make")
    if values.adapter is not None and values.input is None:
        raise UsageError(f"--adapter={values.adapter} needs --input, the directory of the downloaded files")
    schema_path = Path(values.schema) if values.schema else adapter_path(values.adapter)
    schema = load_schema(schema_path)
    base = Path(values.input) if values.input else schema_path.parent
    with new_directory(Path(values.out), values.overwrite) as out:
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
        "vocabulary_fingerprint": f"{vocabulary.fingerprint:016x}",
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
            table = read_table(path, [*s.text, title], [s.id])
            ids.append(_ids(table.column(s.id), path, s.id))
            columns = [table.column(name) for name in s.text]
            texts += pc.binary_join_element_wise(*columns, pa.scalar(" ", pa.large_string())).to_pylist()
            titles += table.column(title).to_pylist()
        all_ids = np.concatenate(ids)
        if len(all_ids) == 0:
            raise CommandError(f"{files[0]}: has no row, expected at least one item")
        unique, counts = np.unique(all_ids, return_counts=True)
        if len(unique) != len(all_ids):
            repeated = unique[counts > 1]
            raise CommandError(
                f"{files[0]}: column {s.id}: {len(repeated)} ids stand more than once, first {repeated[0]}; "
                f"expected one row an item"
            )
        return _Items(all_ids, texts, titles)


def _read_users(schema: UsersSchema | None, base: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Ids int64 [users] and codes int32 [users] of each feature. Row 0 is the anonymous user, id -1, all codes 0."""
    if schema is None:
        return np.array([-1], np.int64), {}
    ids, columns = [np.array([-1], np.int64)], []
    for path in find_files(schema.files, base):
        table = read_table(path, [], [schema.id, *schema.features])
        ids.append(_ids(table.column(schema.id), path, schema.id))
        columns.append(table.select(list(schema.features)))
    all_ids = np.concatenate(ids)
    if len(np.unique(all_ids)) != len(all_ids):
        raise CommandError(f"users: column {schema.id}: an id stands more than once, expected one row a user, none -1")
    features = {}
    for name in schema.features:
        values = pa.chunked_array([chunk for table in columns for chunk in table.column(name).chunks])
        texts = pc.fill_null(pc.cast(values, pa.string()), "")
        # Code 0 is "unknown"; the others follow the order of the values' text, so the same table gives the same codes.
        known = sorted(value for value in set(texts.unique().to_pylist()) if value)
        codes = pc.fill_null(pc.index_in(texts, pa.array(known, pa.string())), -1).to_numpy() + 1
        features[name] = np.concatenate([[0], codes]).astype(np.int32)
    return all_ids, features


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
            table = read_table(path, [s.query], [s.item, *optional])
            rows = np.zeros(len(table), _Log._PAIR)
            query = pc.utf8_trim_whitespace(table.column(s.query))
            item = _rows_of(_ids(table.column(s.item), path, s.item), item_ids)
            user = _rows_of(_ids(table.column(s.user), path, s.user), user_ids) if s.user else np.zeros(len(table), int)
            label = _numbers(table, s.label, path, s.positive_from)
            rows["item"], rows["user"], rows["weight"] = item, user, _numbers(table, s.weight, path, 1.0)
            filled = pc.not_equal(pc.utf8_length(query), 0).to_numpy(zero_copy_only=False)
            usable = (item >= 0) & (user >= 0) & filled
            for reason, bad in zip(rejected, (item < 0, user < 0, ~filled), strict=False):
                rejected[reason] += int(bad.sum())
            total += len(table)
            texts.append(query.filter(pa.array(usable)))
            pairs.append(rows[usable])
            labels.append(label[usable])
        all_pairs, all_labels = np.concatenate(pairs), np.concatenate(labels)
        if total - len(all_pairs) > max_reject_fraction * total:
            reasons = "; ".join(f"{count:,} rows: {reason}" for reason, count in rejected.items() if count)
            raise CommandError(
                f"{files[0]}: {total - len(all_pairs):,} of {total:,} interactions cannot be used ({reasons}), more "
                f"than --max_reject_fraction={max_reject_fraction:g}; correct the tables or the schema"
            )
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


def _ids(column: pa.ChunkedArray, path: Path, name: str) -> np.ndarray:
    """An id column as int64 [rows]. Raises CommandError for what is no whole number."""
    try:
        ids = pc.cast(column, pa.int64())
    except pa.ArrowInvalid as error:
        raise CommandError(f"{path}: column {name} is no whole number: {error}; expected int64 ids") from None
    if ids.null_count:
        raise CommandError(f"{path}: column {name}: {ids.null_count} rows have no id, expected int64 ids")
    return ids.to_numpy()


def _rows_of(ids: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Where each id stands in `table`; -1 if nowhere."""
    order = np.argsort(table, kind="stable")
    position = np.minimum(np.searchsorted(table, ids, sorter=order), len(table) - 1)
    rows = order[position]
    return np.where(table[rows] == ids, rows, -1)


def _numbers(table: pa.Table, name: str | None, path: Path, default: float) -> np.ndarray:
    """A number column as float64 [rows]; all `default` if there is none. Raises CommandError for what is no number."""
    if name is None:
        return np.full(len(table), default)
    try:
        numbers = pc.cast(table.column(name), pa.float64())
    except pa.ArrowInvalid as error:
        raise CommandError(f"{path}: column {name} is no number: {error}; correct the schema") from None
    if numbers.null_count or not np.isfinite(numbers.to_numpy()).all():
        raise CommandError(f"{path}: column {name} has rows without a finite number; correct the table")
    return numbers.to_numpy()


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
