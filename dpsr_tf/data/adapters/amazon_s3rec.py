"""Amazon reviews in S3Rec's layout.

NAME.txt has lines `user item item ...` in the order of time, NAME_item2attributes.json the attributes of items.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from dpsr_common.errors import CommandError, UsageError
from dpsr_tf.data.adapters import raw

_PUBLISHER = "S3Rec, https://github.com/RUCAIBox/CIKM2020-S3Rec (folder data)"
_ATTRIBUTES = "_item2attributes.json"

# A query names attributes that at least this many items have, so that it does not give away the item behind it.
_COMMON = 20
_QUERY_WORDS = 2


def convert(source: Path, out: Path) -> None:
    """Writes items.parquet, users.parquet and log.parquet.

    Args:
        source: a directory with one such data set, or the file NAME.txt of one of several.
        out: an existing directory.

    Raises:
        UsageError, CommandError: files are missing or bad, or the directory holds several data sets.
    """
    sequences = _chosen(source)
    attributes = _attributes(sequences.with_name(sequences.stem + _ATTRIBUTES))
    items_with = Counter(attribute for values in attributes.values() for attribute in values)
    queries = {item: _query(values, items_with) for item, values in attributes.items()}
    users: set[int] = set()

    def log() -> Iterator[tuple[str, int, int, int]]:
        for user, items in raw.id_lists(sequences):
            users.add(user)
            # By convention the last item of a user is for the test and the one before it for validation.
            first = raw.HELD_OUT_FROM + 2 - len(items)
            for step, item in enumerate(items):
                yield queries.get(item, ""), user, item, first + step

    number, text = pa.int64(), pa.string()
    raw.write(out / "log.parquet", {"query": text, "user_id": number, "item_id": number, "time": number}, log())
    raw.write(out / "users.parquet", {"user_id": number}, ([user] for user in sorted(users)))
    raw.write(
        out / "items.parquet",
        {"item_id": number, "title": text, "attributes": text},
        ((item, f"item{item}", _words(values)) for item, values in sorted(attributes.items())),
    )


def _chosen(source: Path) -> Path:
    if source.is_file():
        return source
    names = [path.name.removesuffix(_ATTRIBUTES) for path in sorted(source.glob(f"*{_ATTRIBUTES}"))]
    if len(names) > 1:
        each = " or ".join(f"--input={source / name}.txt" for name in names)
        raise UsageError(f"{source}: holds {len(names)} data sets, {', '.join(names)}; choose one with {each}")
    name = names[0] if names else "Beauty"
    return raw.require(source, [f"{name}.txt", f"{name}{_ATTRIBUTES}"], _PUBLISHER)[0]


def _attributes(path: Path) -> dict[int, list[int]]:
    """Returns the attributes of each item, without repetitions."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file, expected it beside the sequences as published: {_PUBLISHER}")
    try:
        return {
            int(item): list(dict.fromkeys(map(int, values))) for item, values in json.loads(path.read_bytes()).items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise CommandError(f"{path}: is not a JSON object from items to lists of attribute ids: {error}") from None


def _query(attributes: list[int], items_with: Counter[int]) -> str:
    """Returns the rarest of the item's common attributes; all its attributes if none is common."""
    common = [attribute for attribute in attributes if items_with[attribute] >= _COMMON]
    return _words(sorted(common, key=lambda a: (items_with[a], a))[:_QUERY_WORDS] or attributes)


def _words(attributes: list[int]) -> str:
    return " ".join(f"attribute{attribute}" for attribute in attributes)
