"""MovieLens 1M as lists of ids: train.txt, valid.txt and test.txt, one line per user, as LightGCN reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from dpsr_tf.data.adapters import raw

_PUBLISHER = "lists of the form `user item item ...`, as for LightGCN, https://github.com/gusye1234/LightGCN-PyTorch"

# The time of each fold. The lists say only which fold comes first; the order of the items in a line has no meaning.
_FOLDS = {
    "train.txt": raw.HELD_OUT_FROM - 1,
    "valid.txt": raw.HELD_OUT_FROM,
    "test.txt": raw.HELD_OUT_FROM + 1,
}


def convert(source: Path, out: Path) -> None:
    """Writes items.parquet, users.parquet and log.parquet.

    Raises UsageError or CommandError if files are missing or bad.
    """
    paths = raw.require(source, list(_FOLDS), _PUBLISHER)
    users: set[int] = set()
    items: set[int] = set()

    def pairs() -> Iterator[tuple[str, int, int, int]]:
        for path, time in zip(paths, _FOLDS.values(), strict=True):
            for user, listed in raw.id_lists(path):
                users.add(user)
                items.update(listed)
                yield from ((f"user{user}", user, item, time) for item in listed)

    number, text = pa.int64(), pa.string()
    raw.write(out / "log.parquet", {"query": text, "user_id": number, "item_id": number, "time": number}, pairs())
    raw.write(out / "users.parquet", {"user_id": number}, ([user] for user in sorted(users)))
    raw.write(
        out / "items.parquet", {"item_id": number, "title": text}, ((item, f"item{item}") for item in sorted(items))
    )
