"""The store compared with flat training examples: size, reading speed, and the cost of ingest.

    python benchmarks/store.py --json [--quick] [--folder=DIR]

The log is generated with NumPy. Flags set its size; by default it has 2 million interactions of 100,000 users with
200,000 items and 50,000 distinct queries. Queries have 4 words and titles 30. There are five profile features, five
item features, a weight and a label. The popularity of words, queries and items follows Zipf's law. The activity of
users is log-normal, so that histories have all lengths up to the limit of 20 (a row reports their mean). Each word is
one token, without letter trigrams.

`dpsr ingest` reads the log. It also reads it as CSV, at once and one day onto the days before (`--append`). The same
content is also written as a flat TFRecord of tf.train.Example, one for each interaction, in the order of time. An
example has, under short names: token ids of query and title, codes of the ten features, the last 20 items before the
interaction with their types, token ids of the last 5 queries before it, rows of query, user and item, weight, label and
type. The bytes of the store's vocabulary, users, items and interactions (including the text of the queries) are
compared with the bytes of the TFRecord.

The op, and TFRecordDataset -> shuffle -> batch -> parse_example, emit the same fields, shuffled, on one thread each,
and are drained in C++. Neither has negatives or a mask. Rows of their own measure what training needs beyond the flat
examples: 64 shared negatives with text and features, and the mask of clicked items. Each implementation reads all batch
sizes in a process of its own, and they take turns. A rate is the difference in examples between a short and a long
drain, divided by the difference in CPU time (user and system, whole process), so that start-up and the first filling of
buffers do not count.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read when TensorFlow loads

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import report
import yaml
from absl import app, flags

HISTORY, QUERY_HISTORY = 20, 5
TITLE_WORDS, QUERY_WORDS, WORDS = 30, 4, 50_000
# Name -> distinct values: profile and item features, ten in all.
USER_FEATURES = {"gender": 3, "age": 8, "level": 10, "city": 300, "device": 20}
ITEM_FEATURES = {"brand": 10_000, "category": 2_000, "shop": 20_000, "price": 50, "rating": 10}
DAYS = 60
TYPES = ("click", "cart", "order")
CODEC = ("zstd", 3)
SHUFFLE_BUFFER = 16_384
BATCH_SIZES = (64, 1024)
# What the op reads from the store: the fields of the flat examples, or a training batch.
OPTIONS: dict[str, dict[str, Any]] = {
    "op": {"num_random_negatives": 0, "negative_mask": False},
    "op_training": {"num_random_negatives": 64},
}
NOTES = {
    "store": "each text once, as token ids; interactions are rows, time and codes; one event list for each user",
    "tfrecord": f"each example has two texts, 10 codes, {HISTORY} past items, tokens of {QUERY_HISTORY} past queries",
    "op": "the fields of the flat example; no negatives, no mask",
    "op_training": "op, with 64 shared negatives with text and features, and the mask of clicked items",
}


class Sizes(NamedTuple):
    """Size of the generated log."""

    interactions: int
    users: int
    items: int
    queries: int


# The generated log.


def generate(sizes: Sizes, seed: int, folder: Path) -> Path:
    """Writes items, users and log as Parquet, and schema.yaml, into `folder`; returns the schema."""
    folder.mkdir()
    draw = np.random.default_rng(seed)
    words = _words(WORDS, draw)
    queries: dict[str, None] = {}
    while len(queries) < sizes.queries:
        queries.update(dict.fromkeys(_texts(words, sizes.queries - len(queries), QUERY_WORDS, draw)))
    items = {"item_id": np.arange(sizes.items), "title": _texts(words, sizes.items, TITLE_WORDS, draw)}
    users = {"user_id": np.arange(sizes.users)}
    for table, features in ((items, ITEM_FEATURES), (users, USER_FEATURES)):
        rows = len(table["item_id" if table is items else "user_id"])
        table.update({name: _zipf(values, rows, draw) for name, values in features.items()})
    pyarrow.parquet.write_table(pa.table(items), folder / "items.parquet")
    pyarrow.parquet.write_table(pa.table(users), folder / "users.parquet")
    _write_log(folder / "log.parquet", list(queries), sizes, draw)
    schema = {
        "items": {"files": "items.parquet", "id": "item_id", "text": ["title"], "features": list(ITEM_FEATURES)},
        "users": {"files": "users.parquet", "id": "user_id", "features": list(USER_FEATURES)},
        "interactions": {
            "files": "log.parquet",
            **{column: column for column in ("query", "type", "time", "weight", "label")},
            "item": "item_id",
            "user": "user_id",
            "types": {name: name for name in TYPES},
        },
        "tokenizer": {"letter_trigrams": False, "number_parts": False},
    }
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
    return folder / "schema.yaml"


def _write_log(path: Path, queries: list[str], sizes: Sizes, draw: np.random.Generator) -> None:
    """Yields interactions in the order of time, in chunks."""
    activity = np.cumsum(draw.lognormal(0, 1, sizes.users))
    start = 1_700_000_000
    writer, written = None, 0
    while written < sizes.interactions:
        n = min(1_000_000, sizes.interactions - written)
        query = _zipf(sizes.queries, n, draw)
        if written == 0:
            query[: sizes.queries] = np.arange(min(sizes.queries, n))  # each is asked once at least
            draw.shuffle(query)
        # A query's clicks go to items of its own neighbourhood, popular ones first.
        item = (query * 7919 + _zipf(min(1_000, sizes.items), n, draw)) % sizes.items
        table = pa.table(
            {
                "query": pa.DictionaryArray.from_arrays(pa.array(query.astype(np.int32)), pa.array(queries)),
                "item_id": item,
                "user_id": np.searchsorted(activity, draw.uniform(0, activity[-1], n)),
                "type": pa.DictionaryArray.from_arrays(
                    pa.array(draw.choice(3, n, p=[0.85, 0.1, 0.05]).astype(np.int32)), pa.array(TYPES)
                ),
                "time": start + (written + np.arange(n)) * (DAYS * 86_400) // sizes.interactions,
                "weight": draw.choice(np.array([0.5, 1, 2], np.float32), n),
                "label": draw.choice(np.array([1, 2, 3], np.float32), n),
            }
        )
        writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
        written += n
    if writer is not None:
        writer.close()


def _zipf(values: int, size: int, draw: np.random.Generator) -> np.ndarray:
    """Draws int64 [size] below `values`, value i with probability proportional to 1 / (i + 1)."""
    mass = np.cumsum(1 / np.arange(1, values + 1))
    return np.searchsorted(mass, draw.uniform(0, mass[-1], size))


def _words(count: int, draw: np.random.Generator) -> np.ndarray:
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    found: dict[str, None] = {}
    while len(found) < count:
        lengths = draw.integers(3, 10, count)
        found.update(dict.fromkeys("".join(draw.choice(letters, length)) for length in lengths))
    return np.array(list(found)[:count])


def _texts(words: np.ndarray, count: int, length: int, draw: np.random.Generator) -> list[str]:
    return [" ".join(row) for row in words[_zipf(len(words), count * length, draw).reshape(count, length)].tolist()]


# Ingest.


def ingest(schema: Path, out: Path, *flags: str) -> tuple[float, int]:
    """Runs `dpsr ingest`. Returns its CPU seconds, children included, and its peak memory in bytes."""
    command = [sys.executable, "-m", "dpsr_common", "ingest", f"--schema={schema}", f"--out={out}", *flags]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, sum(map(_high_water, _family(process.pid))))
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    _, error = process.communicate()
    thread.join()
    if process.returncode:
        raise SystemExit(f"store: {' '.join(command)} failed:\n{error.decode(errors='replace')[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, peak


def append_a_day(schema: Path, folder: Path) -> tuple[float, float]:
    """Ingests a log as CSV, all at once, and its last day onto a store of the days before.

    Returns:
        The CPU seconds of both.
    """
    folder.mkdir()
    log = pyarrow.parquet.read_table(schema.parent / "log.parquet")
    times = log["time"].to_numpy()
    last = times >= times.max() - 86_400
    described = yaml.safe_load(schema.read_text())
    schemas = {}
    for name, rows in (("whole", log), ("before", log.filter(pa.array(~last))), ("last", log.filter(pa.array(last)))):
        pyarrow.csv.write_csv(rows, folder / f"{name}.csv")
        for table in ("items", "users"):
            described[table]["files"] = str(schema.parent / f"{table}.parquet")
        described["interactions"]["files"] = f"{name}.csv"
        schemas[name] = folder / f"{name}.yaml"
        schemas[name].write_text(yaml.safe_dump(described))
    ingest(schemas["before"], folder / "store_before", "--keep_log")
    whole, _ = ingest(schemas["whole"], folder / "store_whole", "--keep_log")
    day, _ = ingest(schemas["last"], folder / "store_last", f"--append={folder / 'store_before'}")
    return whole, day


def _family(pid: int) -> list[int]:
    """Returns a process and all its descendants."""
    family = [pid]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                family += _family(int(child))
    return family


def _high_water(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def store_files(store: Path) -> list[Path]:
    """Returns the files of a store that training reads: all but the titles."""
    return [path for path in sorted(store.glob("*.dpsr")) if path.name != "titles.dpsr"]


def compressed_bytes(paths: Sequence[Path]) -> int:
    """Returns the bytes of the files, each compressed with CODEC."""
    codec, total = pa.Codec(CODEC[0], compression_level=CODEC[1]), 0
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(64 << 20):
                total += len(codec.compress(block))
    return total


# The flat file.


def write_flat(store: Path, path: Path) -> float:
    """Writes an example for each positive of the store, in the order of time; returns the mean length of histories.

    A tf.train.Example is a map, and the encodings of maps that are written one after the other are that of their union:
    each query, item and user is encoded once, and an example is put together from their bytes.
    """
    import tensorflow as tf

    from dpsr_common.packed_file import PackedFile

    def integers(name: str, values: Sequence[int]) -> bytes:
        feature = tf.train.Feature(int64_list=tf.train.Int64List(value=values))
        return tf.train.Features(feature={name: feature}).SerializeToString()

    def number(name: str, value: float) -> bytes:
        feature = tf.train.Feature(float_list=tf.train.FloatList(value=[value]))
        return tf.train.Features(feature={name: feature}).SerializeToString()

    def rows(file: PackedFile, row_name: str, tokens: tuple[str, str, str] | None, features: Any) -> Any:
        columns = {name: file[f"feature.{name}"].tolist() for name in features}
        lists = None if tokens is None else (tokens[0], file[tokens[1]].tolist(), file[tokens[2]].tolist())
        count = len(file["id"]) if "id" in file else len(lists[1]) - 1
        for row in range(count):
            encoded = integers(row_name, [row])
            encoded += b"".join(integers(name, [column[row]]) for name, column in columns.items())
            if lists is not None:
                name, splits, values = lists
                encoded += integers(name, values[splits[row] : splits[row + 1]])
            yield encoded

    files = {name: PackedFile(str(store / f"{name}.dpsr")) for name in ("users", "items", "interactions")}
    users = list(rows(files["users"], "user_row", None, USER_FEATURES))
    items = list(rows(files["items"], "item_row", ("title", "tokens.splits", "tokens.values"), ITEM_FEATURES))
    log = files["interactions"]
    queries = list(rows(log, "query_row", ("query", "query.splits", "query.tokens"), ()))
    tokens = [part.tolist() for part in np.split(log["query.tokens"], log["query.splits"][1:-1])]
    positive = {name: log[f"positive.{name}"] for name in ("user", "item", "type", "time")}
    positive["query"] = np.repeat(np.arange(len(queries)), np.diff(log["positive.splits"]))
    positive |= {
        name: log[f"positive.{name}.values"][log[f"positive.{name}"]].astype(float) for name in ("weight", "label")
    }
    event = {name: files["users"][f"event.{name}"] for name in ("splits", "time", "item", "type", "query")}
    first, last = histories(positive, event)
    types = [integers("type", [code]) for code in range(int(positive["type"].max()) + 1)]
    numbers = {
        name: {value: number(name, value) for value in np.unique(positive[name]).tolist()}
        for name in ("weight", "label")
    }
    asked, *past = past_queries(positive["user"], last, event["splits"], event["query"])
    order = np.argsort(positive["time"], kind="stable")
    with tf.io.TFRecordWriter(str(path)) as writer:
        columns = [positive[name][order].tolist() for name in ("query", "user", "item", "type", "weight", "label")]
        spans = [span[order].tolist() for span in (first, last, *past)]
        for query, user, item, kind, weight, label, begin, end, begin_query, end_query in zip(
            *columns, *spans, strict=True
        ):
            past_tokens = [tokens[row] for row in asked[begin_query:end_query].tolist()]
            features = b"".join(
                (
                    queries[query], users[user], items[item], types[kind],
                    numbers["weight"][weight], numbers["label"][label],
                    integers("history_item", event["item"][begin:end].tolist()),
                    integers("history_type", event["type"][begin:end].tolist()),
                    integers("past_query", list(itertools.chain.from_iterable(past_tokens))),
                    integers("past_lengths", [len(text) for text in past_tokens]),
                )
            )  # fmt: skip
            # Field 1 of an Example is its Features.
            writer.write(b"\x0a" + _varint(len(features)) + features)
    return float((last - first).mean())


def histories(positive: dict[str, np.ndarray], event: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first event, and the last + 1, of the history of each positive.

    A history is the last HISTORY events of the user strictly before the request of the positive.
    """
    user, splits = positive["user"], event["splits"]
    owner = np.repeat(np.arange(len(splits) - 1, dtype=np.int64), np.diff(splits))
    keys = (owner << 32) + event["time"]
    last = np.searchsorted(keys, (user.astype(np.int64) << 32) + positive["time"], side="left")
    return np.maximum(splits[user], last - HISTORY), last


def past_queries(
    user: np.ndarray, last: np.ndarray, splits: np.ndarray, event_query: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the queries of all events, and the range of them that is the query history of each positive.

    Of equal consecutive queries of a user, one is kept. A query history is the last QUERY_HISTORY queries of `user`
    before event `last`.
    """
    new = np.ones(len(event_query), bool)
    new[1:] = event_query[1:] != event_query[:-1]
    new[splits[:-1][np.diff(splits) > 0]] = True
    number = np.concatenate([[0], np.cumsum(new)])  # of different queries before each event
    end = number[last]
    return event_query[new], np.maximum(number[splits[user]], end - QUERY_HISTORY), end


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


# Reading, in a process of its own.


def op_dataset(store: Path, batch_size: int, seed: int, impl: str = "op") -> Any:
    """Returns the dataset of the op with one of OPTIONS."""
    from dpsr_tf.data.examples_dataset import BatchOptions, examples_dataset
    from dpsr_tf.data.store import Store

    options = BatchOptions(
        batch_size=batch_size,
        seed=seed,
        user_features=tuple(USER_FEATURES),
        item_features=tuple(ITEM_FEATURES),
        history_length=HISTORY,
        query_history_length=QUERY_HISTORY,
        shuffle_buffer=SHUFFLE_BUFFER,
        **OPTIONS[impl],
    )
    return examples_dataset(Store(store), options)


def flat_dataset(path: Path, batch_size: int, seed: int) -> Any:
    """Returns the dataset of the same fields by TFRecordDataset, shuffle, batch and parse_example."""
    import tensorflow as tf

    single = [*USER_FEATURES, *ITEM_FEATURES, "query_row", "user_row", "item_row", "type"]
    spec: dict[str, Any] = {name: tf.io.FixedLenFeature([], tf.int64) for name in single}
    spec |= {name: tf.io.FixedLenFeature([], tf.float32) for name in ("weight", "label")}
    spec |= {
        name: tf.io.RaggedFeature(tf.int64, row_splits_dtype=tf.int64)
        for name in ("query", "title", "history_item", "history_type")
    }
    spec["past_query"] = tf.io.RaggedFeature(
        tf.int64, partitions=[tf.io.RaggedFeature.RowLengths("past_lengths")], row_splits_dtype=tf.int64
    )
    dataset = tf.data.TFRecordDataset(str(path)).shuffle(SHUFFLE_BUFFER, seed=seed).repeat()
    return dataset.batch(batch_size, drop_remainder=True).map(lambda records: tf.io.parse_example(records, spec))


def drain(impl: str, path: Path, examples: int, seed: int) -> dict[int, float]:
    """Measures examples per CPU second of each batch size, between a short drain and one longer by `examples`."""
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.autotune.enabled = False
    rates = {}
    for batch_size in BATCH_SIZES:
        if impl in OPTIONS:
            dataset = op_dataset(path, batch_size, seed, impl).with_options(options)
        else:
            dataset = flat_dataset(path, batch_size, seed).with_options(options)
        batches = -(-examples // batch_size)
        seconds = []
        for count in (1, 1 + batches):
            # skip() asks for each of these batches and drops it, in C++.
            iterator = iter(dataset.skip(count).take(1))
            start = report.cpu_seconds()
            next(iterator)
            seconds.append(report.cpu_seconds() - start)
        rates[batch_size] = batches * batch_size / (seconds[1] - seconds[0])
    return rates


def measured(impl: str, path: Path, examples: int, seed: int) -> dict[int, float]:
    """Measures examples per CPU second of each batch size, in a process that does nothing but drain."""
    command = [sys.executable, __file__, f"--drain={impl}", f"--folder={path}"]
    command += [f"--examples={examples}", f"--seed={seed}"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"store: {' '.join(command)} failed:\n{run.stderr[-2000:]}")
    return {int(batch_size): rate for batch_size, rate in json.loads(run.stdout.splitlines()[-1]).items()}


# All of it.


def measure(result: report.Report, sizes: Sizes, folder: Path, seed: int, repeat: int, growth: int) -> None:
    """Fills the report with rows and bars."""
    workload = f"{sizes.interactions:,} interactions"
    say("generate the log")
    schema = generate(sizes, seed, folder / "log")
    seconds, peaks = [], []
    for turn in range(repeat):
        say(f"ingest, {turn + 1} of {repeat}")
        store = folder / f"store{turn}"
        used, peak = ingest(schema, store)
        seconds.append(used)
        peaks.append(peak)
    rates = [sizes.interactions / used for used in seconds]
    result.add_samples("ingest", workload, "rate", rates, "interactions/core-second")
    result.add_samples("ingest", workload, "peak_memory", [float(peak) for peak in peaks], "bytes")

    say("append a day")
    whole, day = append_a_day(schema, folder / "days")
    note = f"one day more, onto a store of {DAYS - 1} days, against a store of all days at once; the log is CSV"
    result.add("append", workload, "cpu_over_whole", day / whole, "", note=note)

    say("write the flat file")
    flat = folder / "flat.tfrecord"
    result.add("store", workload, "history_length", write_flat(store, flat), "items", note="mean, of 20 at most")
    files = {"store": store_files(store), "tfrecord": [flat]}
    for impl, paths in files.items():
        result.add(impl, workload, "bytes", sum(path.stat().st_size for path in paths), "bytes", note=NOTES[impl])
        for path in paths[: None if impl == "store" else 0]:
            result.add(impl, workload, f"bytes_of_{path.stem}", path.stat().st_size, "bytes")
    say(f"compress by {CODEC[0]}")
    for impl, paths in files.items():
        result.add(impl, workload, "bytes_compressed", compressed_bytes(paths), "bytes", note=f"{CODEC[0]} {CODEC[1]}")
    for metric in ("bytes", "bytes_compressed"):
        ratio = result.value("store", workload, metric) / result.value("tfrecord", workload, metric)
        result.add("store/tfrecord", workload, f"{metric}_ratio", ratio, "")

    found: dict[str, list[dict[int, float]]] = {impl: [] for impl in (*OPTIONS, "tfrecord")}
    for turn in range(repeat):
        say(f"read batches, {turn + 1} of {repeat}")
        # Each begins a turn as often as the other.
        for impl in sorted(found, reverse=turn % 2 == 1):
            examples = max(sizes.interactions, 1_000_000) // (1 if impl in OPTIONS else 8)
            found[impl].append(measured(impl, store if impl in OPTIONS else flat, examples, seed))
    for batch_size, (impl, rates_of) in itertools.product(BATCH_SIZES, found.items()):
        note = NOTES.get(impl if impl in OPTIONS else "", "the same fields")
        samples = [rates_of_turn[batch_size] for rates_of_turn in rates_of]
        result.add_samples(impl, workload, f"rate_b{batch_size}", samples, "examples/core-second", note=note)

    say(f"a log {growth} times as long")
    larger = sizes._replace(interactions=growth * sizes.interactions)
    schema = generate(larger, seed, folder / "longer")
    used, peak = ingest(schema, folder / "longer_store")
    longer = f"{larger.interactions:,} interactions"
    result.add("ingest", longer, "rate", larger.interactions / used, "interactions/core-second")
    result.add("ingest", longer, "peak_memory", peak, "bytes")

    def rate(impl: str, batch_size: int) -> float:
        return result.value(impl, workload, f"rate_b{batch_size}")

    result.bars = {
        "bytes_ratio_to_flat": result.value("store/tfrecord", workload, "bytes_ratio"),
        **{f"ratio_to_tfrecord_b{size}": rate("op", size) / rate("tfrecord", size) for size in BATCH_SIZES},
        "ingest_interactions_per_core_second": statistics.median(rates),
        "append_day_cpu_over_whole": day / whole,
        "peak_memory_growth_10x": peak / statistics.median(peaks),
    }


def say(what: str) -> None:
    """Prints progress."""
    print(f"store: {what}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def working_folder(path: str | None) -> Iterator[Path]:
    """Yields an empty folder: a temporary one, or a new one that is kept."""
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    if Path(path).exists():
        raise app.UsageError(f"--folder={path}: exists already, expected the name of a new folder")
    Path(path).mkdir(parents=True)
    yield Path(path)


def _define_flags() -> None:
    flags.DEFINE_boolean("json", False, "prints the results as one JSON object in the last line")
    flags.DEFINE_string(
        "folder", None, "new folder for log, stores and TFRecord, which is kept. By default, a temporary folder"
    )
    flags.DEFINE_integer("interactions", 2_000_000, "number of interactions in the log", lower_bound=1)
    flags.DEFINE_integer("users", 100_000, "number of users in the log", lower_bound=1)
    flags.DEFINE_integer("items", 200_000, "number of items in the log", lower_bound=1)
    flags.DEFINE_integer("queries", 50_000, "number of distinct queries in the log", lower_bound=1)
    flags.DEFINE_integer("repeat", 5, "number of measurements of each rate", lower_bound=1)
    flags.DEFINE_integer("seed", 1, "seed of the log and of the shuffle", lower_bound=0)
    flags.DEFINE_boolean("quick", False, "uses a small log and one measurement, to try the benchmark out")
    flags.DEFINE_enum("drain", None, [*OPTIONS, "tfrecord"], "internal: runs one measurement on --folder")
    flags.DEFINE_integer("examples", 0, "internal: number of examples of --drain")


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark, or a single measurement."""
    values = flags.FLAGS
    if arguments[1:]:
        raise app.UsageError(f"unexpected argument '{arguments[1]}'")
    if values.drain:
        print(json.dumps(drain(values.drain, Path(values.folder), values.examples, values.seed)))
        return
    sizes = Sizes(values.interactions, values.users, values.items, values.queries)
    if values.quick:
        sizes = Sizes(20_000, 1_000, 2_000, 500)
    if sizes.interactions < sizes.queries:
        raise app.UsageError(f"--queries={sizes.queries}: expected at most --interactions, {sizes.interactions}")
    result = report.Report("store", values.seed, report.hardware("dpsr", "tensorflow", "pyarrow", "numpy", "duckdb"))
    with working_folder(values.folder) as folder:
        measure(result, sizes, folder, values.seed, 1 if values.quick else values.repeat, 10)
    result.print(values.json)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
