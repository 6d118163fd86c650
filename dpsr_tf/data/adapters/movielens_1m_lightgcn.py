"""MovieLens 1M as lists of ids: train.txt, valid.txt and test.txt, one line a user, as LightGCN reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from dpsr_tf.data.adapters import raw

_PUBLISHER = "lists of the form `user item item ...`, as for LightGCN, https://github.com/gusye1234/LightGCN-PyTorch"

# Fold -> time. What each is before the next one is all that the lists tell; the items of a line are in no known order.
_FOLDS = {
    "train.txt": raw.HELD_OUT_FROM - 1,
    "valid.txt": raw.HELD_OUT_FROM,
    "test.txt": raw.HELD_OUT_FROM + 1,
}


def convert(source: Path, out: Path) -> None:
    """Writes items.parquet, users.parquet and log.parquet. Raises UsageError, CommandError (missing or bad files)."""
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
