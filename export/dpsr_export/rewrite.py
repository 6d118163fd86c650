"""`dpsr rewrite`: writes the queries of a log in other words, filters them, and makes a table for the servable."""

from __future__ import annotations

import collections
import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.packed_file import FormatError, PackedFile
from dpsr_export import rewrite_table
from dpsr_export.embeddings import checkpoint_fingerprint
from dpsr_export.index_files import check_files, file_record
from dpsr_export.rewrite_filters import KEPT, Candidate, Embed, Filters, Limits, frequent_queries, value_names
from dpsr_export.rewrite_table import key_of
from dpsr_tf import __version__
from dpsr_tf.data.store import Store, new_directory, read_manifest
from dpsr_tf.models.encoders import query_encoder
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.rewriter_texts import rewriter

USAGE = """
Usage: dpsr rewrite --model=REWRITER --store=STORE --out=TABLE [--towers=MODEL] [--never=FILE] [--always=FILE]
       dpsr rewrite --model=REWRITER --store=STORE [--towers=MODEL] --explain="text" [--explain="text" ...]

Rewrites the most frequent queries of the log with a rewriter, and drops rewrites that mean something else. The
directory TABLE is for `dpsr export --rewrites`: a servable looks up the queries that are in its table, and decodes all
others. --explain prints the candidates of a query instead, and why each one was kept or dropped.

A rewrite is kept if its words match titles that those of the query do not match; if it has the numbers, the brand and
the size of the query; if it leads to items that were clicked for the query; and, with --towers, if a retrieval model
gives both similar embeddings. --never and --always are lists that people keep: one pair a line, query<TAB>rewrite.
"""
REQUIRED_FLAGS = ("model", "store")
REMOTE_INPUTS = ("model", "store")

FORMAT, FORMAT_VERSION = "dpsr-rewrites", 1
MANIFEST, LIST = "table.json", "rewrites.tsv.gz"
# Returns for each text up to n rewrites with their log-probabilities, best first.
Rewriter = Callable[[Sequence[str], int, int], list[list[tuple[str, float]]]]

_BATCH = 1024


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `dpsr rewrite`."""
    text, integer, number = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    text("model", None, "model directory of a rewriter, made by `dpsr train`", flag_values=values)
    text("store", None, "store with the queries, clicks and titles", flag_values=values)
    text("out", None, "directory of the table to make", flag_values=values)
    flags.DEFINE_boolean("overwrite", False, "replace the table at --out", flag_values=values)
    text("queries", None, "file with the queries to rewrite, one in a line, in place of those of the log",
         flag_values=values)  # fmt: skip
    integer("max_queries", 100_000, "number of queries of the log, the most frequent ones first", 0, flag_values=values)
    integer("n", 3, "largest number of rewrites of a query", 1, 100, flag_values=values)
    integer("candidates", 10, "number of rewrites that the model writes for a query", 1, 100, flag_values=values)
    integer("seed", 0, "seed of the random draws of a rewriter with method sampling", flag_values=values)
    text("towers", None, "model directory of a retrieval model, which compares query and rewrite", flag_values=values)
    number("min_log_probability", None, "smallest natural logarithm of the probability of a rewrite, for example -5",
           None, 0, flag_values=values)  # fmt: skip
    number("min_cosine", 0.7, "smallest cosine of a query and its rewrite; needs --towers", -1, 1, flag_values=values)
    flags.DEFINE_list("keep", None, "features or filters of items whose values a rewrite must keep. The default is "
                      "brand and size, where the store has them", flag_values=values)  # fmt: skip
    integer("min_clicks", 10, "number of clicks from which on a query's clicks tell whether a rewrite leads elsewhere",
            1, flag_values=values)  # fmt: skip
    number("min_click_share", 0.01, "smallest share of the query's clicks on items whose titles match the rewrite; "
           "0 turns this filter off", 0, 1, flag_values=values)  # fmt: skip
    text("never", None, "TSV file of pairs that must never appear: query<TAB>rewrite", flag_values=values)
    text("always", None, "TSV file of pairs that always appear, before all others: query<TAB>rewrite",
         flag_values=values)  # fmt: skip
    flags.DEFINE_multi_string("explain", [], "a query to explain; prints its candidates and makes no table",
                              flag_values=values)  # fmt: skip


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr rewrite`."""
    if (values.out is None) == (not values.explain):
        raise UsageError("give --out (directory of the table to make) or --explain (a query to explain), one of them")
    if values["min_cosine"].present and values.towers is None:
        raise UsageError(f"--min_cosine={values.min_cosine}: needs --towers (model directory of a retrieval model)")
    if values.candidates < values.n:
        raise UsageError(f"--candidates={values.candidates}: must be at least --n={values.n}")
    never, always = read_pairs(values.never, "never"), read_pairs(values.always, "always")
    forbidden = {(key_of(query), key_of(text)) for query, text in never}
    for query, text in always:
        if (key_of(query), key_of(text)) in forbidden:
            raise UsageError(f"--always={values.always}: the pair {query!r}, {text!r} is also in --never; remove one")
    model, store = ModelDirectory.open(values.model, "rewriter"), Store(values.store)
    kept = list(values.keep) if values.keep is not None else [name for name in KEPT if name in value_names(store)]
    least = -np.inf if values.min_log_probability is None else values.min_log_probability
    limits = Limits(least, values.min_cosine, values.min_clicks, values.min_click_share)
    embed = None if values.towers is None else embedder(values.towers, store)
    filters = Filters(store, limits, kept, forbidden, embed)
    listed = [query for query, _ in [*always, *never]]
    # The queries of the lists too: decoding a query that is not in the table would bring back what a list forbids.
    queries = [] if values.explain else _distinct([*listed, *_queries(values, store)])
    table = Table(rewriter(model.path), filters, _by_key(always), values.n, values.candidates, values.seed)
    if values.explain:
        for text in values.explain:
            (candidates,) = table.candidates([text])
            print(explanation(text, candidates, values.n))
        return
    with new_directory(Path(values.out), values.overwrite, "table of rewrites", MANIFEST) as out:
        counts = table.write(queries, out)
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "dpsr_version": __version__,
            "checkpoint": Path(model.last_checkpoint()).name,
            "checkpoint_fingerprint": checkpoint_fingerprint(model.last_checkpoint()),
            "settings": {name: values[name].value for name in _SETTINGS} | {"keep": kept},
            **counts,
            "files": {name: file_record(out / name) for name in (rewrite_table.FILE, LIST)},
        }
        (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    print(
        f"table {values.out}: {counts['rewrites']:,} rewrites for {counts['rewritten']:,} of {counts['queries']:,} "
        f"queries; dropped: {', '.join(f'{n:,} {reason}' for reason, n in counts['dropped'].items()) or 'none'}"
    )


_SETTINGS = ("n", "candidates", "seed", "towers", "min_log_probability", "min_cosine", "min_clicks",
             "min_click_share", "queries", "max_queries")  # fmt: skip


def _queries(values: flags.FlagValues, store: Store) -> Iterable[str]:
    if values.queries is None:
        return frequent_queries(store, values.max_queries)
    return (line for _, line in _lines(values.queries, "queries") if key_of(line))


def _distinct(queries: Iterable[str]) -> list[str]:
    """Returns queries without those whose words an earlier one has, and without those that have no words."""
    first: dict[str, str] = {}
    for query in queries:
        first.setdefault(key_of(query), query)
    first.pop("", None)
    return list(first.values())


def _lines(path: str, flag: str) -> Iterator[tuple[int, str]]:
    """Yields number and text of each line that is not blank. Raises CommandError if the file cannot be read."""
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise CommandError(f"--{flag}={path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise CommandError(f"--{flag}={path}: cannot be read: {error.strerror}") from None


def read_pairs(path: str | None, flag: str) -> list[tuple[str, str]]:
    """Reads a list that people keep: query<TAB>rewrite. Without a path it is empty.

    Args:
        path: the file.
        flag: name of its flag, for errors.

    Returns:
        Pairs of query and rewrite, in the order of the file.

    Raises:
        CommandError: the file cannot be read, or a line is not a pair of texts with words.
    """
    pairs = []
    for number, line in () if path is None else _lines(path, flag):
        query, tab, rewrite = line.partition("\t")
        if not tab or "\t" in rewrite or not key_of(query) or not key_of(rewrite):
            raise CommandError(
                f"--{flag}={path}, line {number}: expected query<TAB>rewrite, both with words, got {line[:80]!r}"
            )
        pairs.append((query.strip(), rewrite.strip()))
    return pairs


def _by_key(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """Returns the rewrites of each query by its key, without those of equal words."""
    by_key: dict[str, dict[str, str]] = {}
    for query, rewrite in pairs:
        by_key.setdefault(key_of(query), {}).setdefault(key_of(rewrite), rewrite)
    return {key: list(texts.values()) for key, texts in by_key.items()}


def embedder(towers: str | Path, store: Store) -> Embed:
    """Returns a function from texts to their unit vectors, by the query tower of a retrieval model.

    The vectors of several heads stand side by side, so that an inner product is the mean of the heads' cosines.

    Raises:
        CommandError: the directory does not hold a retrieval model, or the model belongs to another store.
    """
    encode = query_encoder(towers, store)

    def embed(texts: Sequence[str]) -> np.ndarray:
        heads = np.concatenate([encode(texts[at : at + _BATCH], None) for at in range(0, len(texts), _BATCH)])
        norms = np.linalg.norm(heads, axis=2, keepdims=True)
        unit = heads / np.maximum(norms, 1e-12)
        return np.asarray((unit / np.sqrt(heads.shape[1])).reshape(len(texts), -1), np.float32)

    return embed


class Table:
    """Rewrites of queries, from a list, and from a model through filters."""

    def __init__(
        self, rewrite: Rewriter, filters: Filters, always: Mapping[str, Sequence[str]], n: int, candidates: int,
        seed: int,
    ):  # fmt: skip
        """Takes what rewrites queries.

        Args:
            rewrite: the model.
            filters: drop some of its rewrites.
            always: for the key of a query the rewrites that come first.
            n: largest number of rewrites of a query, but for those of the list.
            candidates: number of rewrites that the model writes.
            seed: of rewrites that are drawn by chance.
        """
        self._rewrite, self._filters, self._always = rewrite, filters, always
        self._n, self._candidates, self._seed = n, candidates, seed

    def candidates(self, queries: Sequence[str]) -> list[list[Candidate]]:
        """Returns the candidates of queries: those of the list, then the model's, with the reasons for dropping."""
        return self._checked(queries, self._rewrite(queries, self._candidates, self._seed))

    def _checked(self, queries: Sequence[str], found: Sequence[Sequence[tuple[str, float]]]) -> list[list[Candidate]]:
        candidates = []
        for query, checked in zip(queries, self._filters(queries, found), strict=True):
            listed = self._always.get(key_of(query), ())
            keys = {key_of(text) for text in listed}
            rest = [one for one in checked if key_of(one.text) not in keys]
            candidates.append([*(Candidate(text, 0.0, listed=True) for text in listed), *rest])
        return candidates

    def write(self, queries: Sequence[str], out: Path) -> dict[str, Any]:
        """Writes the table of some queries, with distinct keys, into a directory.

        Returns:
            `queries`, their number; `rewritten`, how many of them have a rewrite; `rewrites`, how many there are;
            `dropped`, how many were dropped by the first word of the reason.
        """
        rows: dict[str, list[tuple[str, float]]] = {}
        dropped: collections.Counter[str] = collections.Counter()
        batches = [queries[at : at + _BATCH] for at in range(0, len(queries), _BATCH)]
        with gzip.GzipFile(out / LIST, "wb", mtime=0) as file:
            for batch, found in zip(batches, self._ahead(batches), strict=True):
                for query, candidates in zip(batch, self._checked(batch, found), strict=True):
                    kept = chosen(candidates, self._n)
                    dropped.update(one.reason.partition(":")[0] for one in candidates if one.reason)
                    rows[key_of(query)] = [(one.text, one.log_probability) for one in kept]
                    for one in kept:
                        cosine = "" if one.cosine is None else f"{one.cosine:.4f}"
                        source = "list" if one.listed else "model"
                        cells = (_cell(query), one.text, f"{one.log_probability:.4f}", cosine, source)
                        file.write(("\t".join(cells) + "\n").encode())
        rewrite_table.write(rows, out / rewrite_table.FILE)
        return {
            "queries": len(rows),
            "rewritten": sum(map(bool, rows.values())),
            "rewrites": sum(map(len, rows.values())),
            "dropped": dict(dropped.most_common()),
        }

    def _ahead(self, batches: Sequence[Sequence[str]]) -> Iterator[list[list[tuple[str, float]]]]:
        """Yields what the model writes for each batch; it writes the next one while the caller checks this one."""
        with ThreadPoolExecutor(1) as pool:
            waiting: collections.deque[Future[list[list[tuple[str, float]]]]] = collections.deque()
            for batch in batches:
                waiting.append(pool.submit(self._rewrite, batch, self._candidates, self._seed))
                if len(waiting) > 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


def chosen(candidates: Sequence[Candidate], n: int) -> list[Candidate]:
    """Returns the candidates that a table gets: those of the list, and then the best that were not dropped, n in all.

    The list may have more than n.
    """
    kept = [one for one in candidates if not one.reason]
    return kept[: max(n, sum(one.listed for one in kept))]


def explanation(query: str, candidates: Sequence[Candidate], n: int) -> str:
    """Returns a table for people: the candidates of a query, their scores, and why each one was dropped."""
    if not candidates:
        return f"{_cell(query)}\n  the model writes nothing for it\n"
    kept = chosen(candidates, n)
    lines = [_cell(query), "  log-prob  cosine  new titles  rewrite"]
    for one in candidates:
        cosine = "" if one.cosine is None else f"{one.cosine:.3f}"
        added = "" if one.added is None else f"{one.added:,}"
        verdict = "kept: of the list" if one.listed else "kept" if one in kept else one.reason or f"not among the {n}"
        lines.append(f"  {one.log_probability:>8.3f}  {cosine:>6}  {added:>10}  {_cell(one.text)}  [{verdict}]")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Returns a text without the characters that would end a cell or move the cursor of a terminal."""
    return "".join(char if char.isprintable() else " " for char in text)


def open_table(path: str | Path, checkpoint: str) -> dict[str, Any]:
    """Opens and checks a table of `dpsr rewrite` for a rewriter.

    Args:
        path: the directory.
        checkpoint: fingerprint of the rewriter's checkpoint.

    Returns:
        Its manifest.

    Raises:
        CommandError: the table is missing, one of its files was changed, or another rewriter made it.
    """
    directory = Path(path)
    manifest = read_manifest(directory / MANIFEST, FORMAT, FORMAT_VERSION, "dpsr rewrite")
    if manifest.get("checkpoint_fingerprint") != checkpoint:
        raise CommandError(
            f"{path}: was made with another rewriter (fingerprint {manifest.get('checkpoint_fingerprint')}) than the "
            f"one to export ({checkpoint}); run `dpsr rewrite` with that model"
        )
    check_files(directory, manifest, MANIFEST, "dpsr rewrite")
    try:
        PackedFile(str(directory / rewrite_table.FILE), "items")
    except (FormatError, OSError) as error:
        raise CommandError(f"{error}; run `dpsr rewrite` again") from None
    return manifest
