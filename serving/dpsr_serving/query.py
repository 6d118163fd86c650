"""`dpsr query`: sends queries to a model server or proxy, and prints items or rewrites."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import flags

from dpsr_common.errors import CommandError, UsageError

USAGE = """
Usage: dpsr query --target=host:port --model=NAME [--k=10] [--titles=PATH] [--json] "text" ...
       dpsr query ... --user_features='{"gender": "f", "age": 31}' --clicked_items=17,4 --past_queries="red" "text"
       dpsr query ... --include="brand=Acme|Bolt" --include="price=10..20" --exclude="color=red" "text"
       dpsr query --target=host:port --model=RANKER --rank=17,4,99 [--user_id=12] [--titles=PATH] [--json] "text" ...
       dpsr query --target=host:port --model=REWRITER --rewrite [--k=3] [--seed=0] [--json] "text" ...

Searches for each text and prints a table: rank, score, item id and, with --titles, the item's title. A model with
several heads also shows the head that found the item. Put `--` before a text that starts with a dash.

With --rank the model is a ranker. It sorts the given items for each text, and the table has their scores. With
--rewrite the model is a rewriter, and the table has the rewrites of each text: rank, log-probability, rewrite.
"""
TAKES_ARGUMENTS = True
_TITLES_IN_SERVABLE = "assets.extra/item_titles.tsv.gz"


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("target", "127.0.0.1:8500", "address of a model server or proxy", flag_values=values)
    flags.DEFINE_string("model", "default", "name of the model", flag_values=values)
    flags.DEFINE_integer(
        "k",
        None,
        "number of results for each query. The default is the number that the model was exported with, or 3 rewrites",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_string(
        "titles",
        None,
        "item titles to print: a gzipped TSV file of item_id and title, or a servable version directory with such a "
        "file",
        flag_values=values,
    )
    flags.DEFINE_string(
        "user_features", None, "features of the user, as a JSON object of names and values", flag_values=values
    )
    flags.DEFINE_list(
        "clicked_items", [], "comma-separated items that the user clicked, oldest first", flag_values=values
    )
    flags.DEFINE_list(
        "clicked_item_types",
        [],
        "what the user did with each clicked item: click, cart or order. Items without a type count as clicks",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "past_queries",
        [],
        "a query that the user made before, oldest first",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "include",
        [],
        "a filter that every result must meet: NAME=VALUE|VALUE or NAME=LOW..HIGH",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "exclude", [], "a filter that no result may meet, written like --include", flag_values=values
    )
    flags.DEFINE_list("exclude_items", [], "comma-separated items to leave out of the results", flag_values=values)
    flags.DEFINE_string(
        "search_parameters",
        "",
        "search parameters of the index that replace the model's own, for example nprobe=64",
        flag_values=values,
    )
    flags.DEFINE_list("rank", None, "comma-separated items that a ranker sorts for each text", flag_values=values)
    flags.DEFINE_integer(
        "user_id",
        None,
        "with --rank, id of the user, whose earlier orders the ranker reads",
        flag_values=values,
    )
    flags.DEFINE_boolean("rewrite", False, "ask a rewriter for rewrites of each text", flag_values=values)
    flags.DEFINE_integer(
        "seed", 0, "with --rewrite, seed of the random draws of a rewriter with method sampling", flag_values=values
    )
    flags.DEFINE_integer("version", None, "version of the model to ask. The default is the latest", flag_values=values)
    flags.DEFINE_string("label", None, "label of the version to ask, instead of --version", flag_values=values)
    flags.DEFINE_multi_string(
        "metadata",
        [],
        "gRPC metadata to send, as KEY=VALUE, for example user-id=u17",
        flag_values=values,
    )
    flags.DEFINE_string(
        "ca", None, "PEM file of the authority that signed the server's certificate. Turns TLS on", flag_values=values
    )
    flags.DEFINE_string(
        "certificate", None, "PEM file of the client's certificate. Turns TLS on; needs --key", flag_values=values
    )
    flags.DEFINE_string("key", None, "PEM file of the key of --certificate", flag_values=values)
    flags.DEFINE_string(
        "server_name",
        None,
        "name in the server's certificate, where it is not the host of --target. Turns TLS on",
        flag_values=values,
    )
    flags.DEFINE_float("timeout_s", 10.0, "seconds to wait for an answer", lower_bound=0.001, flag_values=values)
    flags.DEFINE_boolean("json", False, "print one JSON object for each query instead of a table", flag_values=values)


def run(values: flags.FlagValues, texts: list[str]) -> None:
    """Searches for each text and prints what it finds.

    Raises:
        UsageError: a flag or a query is wrong.
        CommandError: the server gave no results, or the titles cannot be read.
    """
    # Imported here, not at the top: gRPC is slow to import, and `dpsr query --help` does not need it.
    from dpsr_serving.client import SearchClient, ServingError, Tls, User

    if not texts:
        raise UsageError('nothing to search for; give at least one text: dpsr query --model=NAME "red shoes"')
    if not values.target or not values.model:
        raise UsageError("--target and --model must not be empty")
    if ":" not in values.target:
        raise UsageError(f"--target={values.target}: has no port; expected host:port")
    for text in texts:
        # The server would accept any bytes, but on a command line they mean that the terminal has another encoding.
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError(f"the query {os.fsencode(text)!r} is not UTF-8 text; convert it to UTF-8") from None
    _check_combination(values)
    user = User(_features(values.user_features), values.clicked_items, values.past_queries, values.clicked_item_types)
    if (values.certificate is None) != (values.key is None):
        raise UsageError("--certificate and --key need each other; give both or neither")
    files = (values.ca, values.certificate, values.key, values.server_name)
    tls = None if all(file is None for file in files) else Tls(*files)
    try:
        with SearchClient(
            values.target,
            values.model,
            values.timeout_s,
            version=values.version,
            label=values.label,
            tls=tls,
            metadata=dict(_pair(text) for text in values.metadata),
        ) as client:
            if values.rewrite:
                for text, found in zip(texts, client.rewrite(texts, values.k or 3, values.seed), strict=True):
                    print(_rewrites(text, found, values.json))
                return
            if values.rank is not None:
                ranked = [client.rank(text, values.rank, user=user, user_id=values.user_id) for text in texts]
                _print_ranked(texts, values.rank, ranked, values)
                return
            results = client.search(
                texts,
                values.k,
                user=user if any(dataclasses.astuple(user)) else None,
                filters=values.include,
                exclude_filters=values.exclude,
                exclude_items=values.exclude_items,
                search_parameters=values.search_parameters,
            )
    except ServingError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from None
    titles = {}
    if values.titles is not None:
        titles = read_titles(Path(values.titles), (item_id for result in results for item_id in result.item_ids))
    for text, result in zip(texts, results, strict=True):
        rows = _rows(result, titles)
        if values.json:
            line: dict[str, Any] = {"query": text, "results": rows}
            if result.version:
                line["version"] = result.version
            if result.arm:
                line["arm"] = result.arm
            if result.shards is not None:
                line["shards"] = list(result.shards)
            print(json.dumps(line, ensure_ascii=False))
        else:
            print(_table(text, rows))
            if result.shards is not None and result.shards[0] < result.shards[1]:
                print(f"incomplete: {result.shards[0]} of {result.shards[1]} shards answered")
    sys.stdout.flush()


# Flags that only a search has, and those that a search and a ranker have.
_OF_SEARCH = ("past_queries", "include", "exclude", "exclude_items", "search_parameters")
_OF_USERS = ("titles", "user_features", "clicked_items", "clicked_item_types")


def _check_combination(values: flags.FlagValues) -> None:
    """Raises UsageError if flags are given that belong to different kinds of models."""
    unknown = {"rank": ("rewrite", "k", *_OF_SEARCH), "rewrite": ("rank", *_OF_SEARCH, *_OF_USERS)}
    for flag, names in unknown.items():
        others = [f"--{name}" for name in names if values[name].present]
        if values[flag].value and others:
            kind = "ranker" if flag == "rank" else "rewriter"
            raise UsageError(f"--{flag} cannot be combined with {', '.join(others)}, which a {kind} does not know")
    for name, flag in (("seed", "rewrite"), ("user_id", "rank")):
        if values[name].present and not values[flag].value:
            raise UsageError(f"--{name}={values[name].value}: needs --{flag}")
    if values.rank == []:
        raise UsageError("--rank is empty; expected items, such as --rank=17,4,99")


def _print_ranked(texts: list[str], items: list[str], ranked: list[Any], values: flags.FlagValues) -> None:
    """Prints the items of each text, best first. Items that the ranker does not know come last, without a score."""
    titles = {}
    if values.titles is not None:
        titles = read_titles(Path(values.titles), (int(item) for item in items if item.removeprefix("-").isdecimal()))
    for text, scores in zip(texts, ranked, strict=True):
        rows: list[dict[str, Any]] = []
        for place in sorted(range(len(items)), key=lambda place: -scores[place]):
            score, item = float(scores[place]), items[place]
            row = {"rank": len(rows) + 1, "score": score if math.isfinite(score) else None, "item_id": item, "head": 0}
            if item.isdecimal() and int(item) in titles:
                row["title"] = titles[int(item)]
            rows.append(row)
        if values.json:
            shown = [{key: value for key, value in row.items() if key != "head"} for row in rows]
            print(json.dumps({"query": text, "results": shown}, ensure_ascii=False))
        else:
            print(_table(text, rows))
    sys.stdout.flush()


def _rewrites(query: str, found: list[Any], as_json: bool) -> str:
    if as_json:
        return json.dumps({"query": query, "rewrites": [dataclasses.asdict(one) for one in found]}, ensure_ascii=False)
    if not found:
        return f"{_printable(query)}\n  no rewrites\n"
    lines = [_printable(query), "  rank  log-prob  rewrite"]
    lines += [f"  {i:>4}  {one.log_probability:>8.4f}  {_printable(one.text)}" for i, one in enumerate(found, 1)]
    return "\n".join(lines) + "\n"


def _features(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        features = json.loads(text)
    except ValueError as error:
        raise UsageError(f'--user_features: {error}; expected a JSON object such as {{"age": 31}}') from None
    if not isinstance(features, dict):
        raise UsageError(f'--user_features: got {text}, expected a JSON object such as {{"age": 31}}')
    return features


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UsageError(f"--metadata: got {text!r}, expected KEY=VALUE")
    return key.lower(), value


def read_titles(path: Path, item_ids: Iterable[int]) -> dict[int, str]:
    """Reads the titles of `item_ids` from a gzipped TSV file, or from the one in a servable version directory.

    The file is read line by line, because a shop has millions of titles and a result page needs only a few.

    Returns:
        item id -> title, without the items that have none.

    Raises:
        CommandError: the file does not exist, or is not a gzipped TSV of item id and title.
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
        raise CommandError(
            f"{path}: no such file; --titles expects a titles file or a servable version directory"
        ) from None
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
    # With a single head the column would only hold zeros.
    heads = any(row["head"] for row in rows)
    lines = [_printable(query), f"  rank    score  {'head  ' if heads else ''}{'item id':>{width}}  title"]
    for row, item_id in zip(rows, ids, strict=True):
        head = f"{row['head']:>4}  " if heads else ""
        title = _printable(row.get("title", ""))
        score = "unknown" if row["score"] is None else f"{row['score']:>7.4f}"
        lines.append(f"  {row['rank']:>4}  {score}  {head}{item_id:>{width}}  {title}".rstrip())
    return "\n".join(lines) + "\n"


def _printable(text: str) -> str:
    """Replaces control characters, which the terminal would obey: the text comes from users and from the server."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
