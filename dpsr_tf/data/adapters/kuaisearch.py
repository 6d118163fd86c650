"""KuaiSearch: searches in Kuaishou's shop, one per line, with the lists of items shown, clicked and bought."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from dpsr_common.errors import CommandError
from dpsr_tf.data.adapters import raw

_PUBLISHER = "Kuaishou, https://github.com/benchen4395/KuaiSearch"
_LISTS = ("impressed_item_ids", "clicked_item_ids", "purchased_item_ids")
# The event that each of these lists stands for.
_TYPES = ("impression", "click", "order")
_NUMBER, _TEXT = pa.int64(), pa.string()
_SEARCH = {"query": _TEXT, "user_id": _NUMBER, "session_id": _NUMBER, "time_index": _NUMBER, "split": _TEXT}
_EVENT = {
    "query": _TEXT,
    "user_id": _NUMBER,
    "session_id": _NUMBER,
    "time": _NUMBER,
    "item_id": _NUMBER,
    "type": _TEXT,
    "position": pa.int32(),
}


def convert(source: Path, out: Path) -> None:
    """Writes log.parquet and links to items.jsonl and users.jsonl.

    Raises UsageError or CommandError if files are missing or bad.
    """
    searches, *tables = raw.require(source, ["recall.jsonl", "items.jsonl", "users.jsonl"], _PUBLISHER)
    raw.write_batches(out / "log.parquet", _EVENT, map(_events, _batches(searches)))
    for table in tables:
        (out / table.name).symlink_to(table.resolve())


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    schema = pa.schema([*_SEARCH.items(), *((name, pa.list_(_NUMBER)) for name in _LISTS)])
    try:
        yield from pyarrow.json.open_json(
            path,
            # A line must fit into a block.
            pyarrow.json.ReadOptions(block_size=16 << 20),
            pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except (pa.ArrowException, OSError) as error:
        raise CommandError(f"{path}: is not as published ({_PUBLISHER}): {error}") from None


def _events(searches: pa.RecordBatch) -> pa.RecordBatch:
    """Returns one row for each item of a search, with the strongest event: order before click before impression."""
    lists = [searches.column(name) for name in _LISTS]
    search = np.concatenate([pc.list_parent_indices(column).to_numpy() for column in lists])
    item = np.concatenate([pc.list_flatten(column).to_numpy() for column in lists])
    kind = np.repeat(np.arange(len(lists)), [pc.sum(pc.list_value_length(column)).as_py() or 0 for column in lists])
    # The position in the list of items shown, from 1 on. It is 0, unknown, for a clicked item that the list lacks.
    position = np.zeros(len(item), np.int32)
    lengths = pc.fill_null(pc.list_value_length(lists[0]), 0).to_numpy()
    shown = int(lengths.sum())
    position[:shown] = np.arange(shown) - np.repeat(np.cumsum(lengths) - lengths, lengths) + 1
    # Rows of the same item and search become neighbours, the first position before the others.
    order = np.lexsort([item, search])
    search, item, kind, position = search[order], item[order], kind[order], position[order]
    is_first = np.ones(len(item), bool)
    is_first[1:] = (search[1:] != search[:-1]) | (item[1:] != item[:-1])
    first = np.flatnonzero(is_first)
    most = np.maximum.reduceat(kind, first) if len(first) else kind
    # All folds but train are held out. Within a fold the searches keep their order.
    held_out = pc.fill_null(pc.not_equal(searches.column("split"), "train"), False).to_numpy(zero_copy_only=False)
    time = pc.add(searches.column("time_index"), pa.array(held_out * raw.HELD_OUT_FROM))
    place = position[first]
    rows = pa.array(search[first])
    return pa.record_batch(
        [
            *(searches.column(name).take(rows) for name in ("query", "user_id", "session_id")),
            time.take(rows),
            pa.array(item[first]),
            pa.array(_TYPES).take(pa.array(most)),
            pa.array(place, mask=place == 0),
        ],
        schema=pa.schema(list(_EVENT.items())),
    )
