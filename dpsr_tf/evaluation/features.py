"""`dpsr features`: writes the features of requests as one table, so that every ranker reads the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from absl import flags
from tqdm import tqdm

from dpsr_common.errors import CommandError
from dpsr_common.files import replaced
from dpsr_common.packed_file import PackedFile
from dpsr_tf.data.ranking_features import MODEL_NUMBERS, RankingFeatures, Shown
from dpsr_tf.data.store import Store, unpack_strings
from dpsr_tf.evaluation.judgments import FOLDS, fold_of

USAGE = """
Usage: dpsr features --store=STORE --out=FILE.parquet [--fold=FOLD] [--model=MODEL]

Writes a table with one row for each item shown in the requests of a store. A row has the item's position, its outcome
(unclicked, click, cart or order), and its features. Train XGBoost, LightGBM or another ranker with it.

The store must be made by `dpsr ingest` with the section `ranking` in its schema. docs/ranking.md lists the columns.
"""

REQUIRED_FLAGS = ("store", "out")
REMOTE_INPUTS = ("store",)

TRAIN = "train"
# The key of the Parquet file's metadata with the names of the features, as JSON.
METADATA = b"dpsr_features"
# Rows of a row group, and the items shown that are in memory at a time.
_ROWS = 1 << 16


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `dpsr features`."""
    flags.DEFINE_string("store", None, "store with requests", flag_values=values)
    flags.DEFINE_string("out", None, "Parquet file to write", flag_values=values)
    flags.DEFINE_enum(
        "fold",
        TRAIN,
        [TRAIN, *FOLDS[:2]],
        "requests to write: those for training, or a half of those that the store holds out",
        flag_values=values,
    )
    flags.DEFINE_string(
        "model",
        None,
        "retrieval model that gives the columns dpsr_score and list_similarity; it must be trained on this store, or "
        "the store made with --like=MODEL",
        flag_values=values,
    )
    flags.DEFINE_boolean("overwrite", False, "replace the file if --out exists already", flag_values=values)


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr features`."""
    out = Path(values.out)
    if out.exists() and not values.overwrite:
        raise CommandError(f"--out={out}: exists already; choose another file, or give --overwrite to replace it")
    if not out.resolve().parent.is_dir():
        raise CommandError(f"--out={out}: the directory {out.parent} does not exist; create it first")
    requests, rows = write_features(Store(values.store), out, values.fold, values.model)
    print(f"features {out}: {rows:,} items shown in {requests:,} requests, fold {values.fold}")


def write_features(store: Store, out: Path, fold: str = TRAIN, model: str | None = None) -> tuple[int, int]:
    """Writes the features of a fold to the Parquet file `out`. Returns the number of requests and of rows.

    Memory grows with the number of items (their texts, and their embeddings if there is a model) and of distinct
    queries, not with the number of requests.

    Raises:
        CommandError: the store has no requests in this fold, the model cannot read the store, or the file cannot be
            written.
    """
    features = RankingFeatures(store)
    score = None
    if model:
        # TensorFlow is loaded only if there is a model.
        from dpsr_tf.models.ranker_inputs import dpsr_scorer

        score = dpsr_scorer(model, store)
    schema = _schema(features, score is not None)
    requests = rows = 0
    try:
        with replaced(out) as temporary:
            with pyarrow.parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
                for first, file, chosen in tqdm(request_batches(store, fold), desc="write features", unit=" batches"):
                    shown = features.of(file, chosen)
                    table = _table(store, score(shown) if score else shown, first + chosen, schema)
                    writer.write_table(table)
                    requests, rows = requests + len(chosen), rows + len(table)
            if not requests:
                why = "add `held_out` to its schema" if store.held_requests() is None else "hold out more"
                raise CommandError(
                    f"--fold={fold}: {store.path} has no requests in this fold; "
                    + ("give another store" if fold == TRAIN else f"{why}, and ingest the log again")
                )
    except OSError as error:
        raise CommandError(f"--out={out}: cannot be written: {error}") from None
    return requests, rows


def request_batches(store: Store, fold: str) -> Iterator[tuple[int, PackedFile, np.ndarray]]:
    """Yields batches: the number of the file's first request, the file, and rows of its requests.

    `fold` is "train", or one of FOLDS: "all" are all requests that the store holds out.
    """
    held = store.held_requests()
    files = store.requests() if fold == TRAIN else [held] if held is not None else []
    first = 0
    for file in files:
        lengths = np.diff(file["request.splits"])
        chosen = np.arange(len(lengths))
        if fold not in (TRAIN, "all"):
            inside = np.array([fold_of(text) == fold for text in unpack_strings(file, "query_text")], bool)
            chosen = chosen[inside[file["request.query"]]]
        # A batch has at least one request, and else at most _ROWS rows.
        ends = np.cumsum(lengths[chosen])
        begin = 0
        while begin < len(chosen):
            before = int(ends[begin - 1]) if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, before + _ROWS, side="right")))
            yield first, file, chosen[begin:end]
            begin = end
        first += len(lengths)


def _schema(features: RankingFeatures, scored: bool) -> pa.Schema:
    numbers = [*features.numbers, *(MODEL_NUMBERS if scored else ())]
    columns = [
        ("request", pa.int64()),
        ("query", pa.string()),
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("time", pa.int64()),
        ("position", pa.uint8()),
        ("outcome", pa.uint8()),
        *((name, pa.float32()) for name in numbers),
        *((name, pa.int32()) for name in features.codes),
    ]
    metadata = {METADATA: json.dumps({"numbers": numbers, "codes": features.codes}).encode()}
    return pa.schema(columns, metadata)


def _table(store: Store, shown: Shown, requests: np.ndarray, schema: pa.Schema) -> pa.Table:
    queries = pa.array(shown.queries, pa.string()).take(pa.array(shown.request))
    columns = {
        "request": requests[shown.request],
        "query": queries,
        "user_id": store.users()["id"][shown.user],
        "item_id": store.items()["id"][shown.item],
        "time": shown.time.astype(np.int64),
        "position": shown.position,
        "outcome": shown.outcome,
        **shown.numbers,
        **shown.codes,
    }
    # NaN stands for a missing number, and every reader of Parquet knows null.
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, from_pandas=True)
        for column in (columns[name] for name in schema.names)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)
