"""`dpsr query`: asks a model server or a proxy and prints what it finds."""

from __future__ import annotations

import gzip
import json
import os
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import flags

from dpsr_serving.errors import CommandError, UsageError

USAGE = """
Usage: dpsr query --target=host:port --model=NAME [--k=10] [--titles=PATH] [--json] "text" ...

Searches for each text and prints rank, score, item id and, with --titles, the item's title.
A text that starts with a dash goes after a lone `--`.
"""
TAKES_ARGUMENTS = True
_TITLES_IN_SERVABLE = "assets.extra/item_titles.tsv.gz"


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("target", "127.0.0.1:8500", "Address of a model server or proxy.", flag_values=values)
    flags.DEFINE_string("model", "default", "Name of the model.", flag_values=values)
    flags.DEFINE_integer(
        "k", None, "Results for each query; without it the servable decides.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_string(
        "titles",
        None,
        "Titles to show: a gzipped TSV of item_id, title; or a servable version directory that has one.",
        flag_values=values,
    )
    flags.DEFINE_float("timeout_s", 10.0, "Seconds to wait for an answer.", lower_bound=0.001, flag_values=values)
    flags.DEFINE_boolean("json", False, "Prints one JSON object a query instead of tables.", flag_values=values)


def run(values: flags.FlagValues, texts: list[str]) -> None:
    """Searches for each text and prints what it finds.

    Raises:
        CommandError: the server gave no results, or the titles cannot be read; UsageError for the flags.
    """
    # Here, not at the top: gRPC is slow to import, and `--help` does without.
    from dpsr_serving.client import SearchClient

    if not texts:
        raise UsageError('nothing to search for; give at least one text: dpsr query --model=NAME "red shoes"')
    if not values.target or not values.model:
        raise UsageError("--target and --model must not be empty")
    for text in texts:
        # A server copes with any bytes, but here they mean a terminal or a file in another encoding: say so.
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError(f"the query {os.fsencode(text)!r} is not UTF-8 text; convert it to UTF-8") from None
    with SearchClient(values.target, values.model, values.timeout_s) as client:
        results = client.search(texts, values.k)
    titles = {}
    if values.titles is not None:
        titles = read_titles(Path(values.titles), (item_id for result in results for item_id in result.item_ids))
    for text, result in zip(texts, results, strict=True):
        rows = _rows(result, titles)
        if values.json:
            print(json.dumps({"query": text, "results": rows}, ensure_ascii=False))
        else:
            print(_table(text, rows))
    sys.stdout.flush()


def read_titles(path: Path, item_ids: Iterable[int]) -> dict[int, str]:
    """Reads the titles of `item_ids` from a gzipped TSV, or from the one in a servable version directory.

    The file is read as a stream: a shop has millions of titles, a result page a few.

    Raises:
        CommandError: no such file, or not a gzipped TSV of item id and title.
    """
    if path.is_dir():
        path = path / _TITLES_IN_SERVABLE
    wanted = {int(item_id) for item_id in item_ids}
    titles: dict[int, str] = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8", errors="replace", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                item_id, tab, title = line.rstrip("\r\n").partition("\t")
                if not tab or not item_id.removeprefix("-").isdecimal():
                    raise CommandError(f"{path}, line {number}: expected item_id<TAB>title, got {line[:80]!r}")
                if int(item_id) in wanted:
                    titles[int(item_id)] = title
    except FileNotFoundError:
        raise CommandError(f"{path}: no such file; --titles takes a titles file or a servable version") from None
    except (OSError, EOFError, zlib.error) as error:
        raise CommandError(f"{path}: cannot read titles: {error}") from error
    return titles


def _rows(result: Any, titles: dict[int, str]) -> list[dict[str, Any]]:
    rows = []
    for index, (item_id, score, head) in enumerate(zip(result.item_ids, result.scores, result.heads, strict=True)):
        row: dict[str, Any] = {"rank": index + 1, "score": float(score), "item_id": int(item_id), "head": int(head)}
        if result.item_keys is not None:
            row["item_key"] = result.item_keys[index]
        if int(item_id) in titles:
            row["title"] = titles[int(item_id)]
        rows.append(row)
    return rows


def _table(query: str, rows: list[dict[str, Any]]) -> str:
    if not rows:
        return f"{_printable(query)}\n  no results\n"
    ids = [_printable(str(row.get("item_key", row["item_id"]))) for row in rows]
    width = max(len("item id"), *map(len, ids))
    lines = [_printable(query), f"  rank    score  {'item id':>{width}}  title"]
    for row, item_id in zip(rows, ids, strict=True):
        line = f"  {row['rank']:>4}  {row['score']:>7.4f}  {item_id:>{width}}  {_printable(row.get('title', ''))}"
        lines.append(line.rstrip())
    return "\n".join(lines) + "\n"


def _printable(text: str) -> str:
    """Text from elsewhere without control characters, which a terminal would obey."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
