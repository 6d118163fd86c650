"""`dpsr evaluate`: measures retrieval on human judgments."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.files import write_text
from dpsr_tf import __version__
from dpsr_tf.data.request_log import OUTCOMES
from dpsr_tf.data.store import Store
from dpsr_tf.evaluation import judgments, metrics, rankings
from dpsr_tf.evaluation.corpus import FREQUENCY, Corpus
from dpsr_tf.evaluation.judgments import FOLDS, Judgments
from dpsr_tf.evaluation.measure import DEFAULT_KS, Options, measure_all
from dpsr_tf.evaluation.result_tables import format_rankings, format_report
from dpsr_tf.evaluation.retriever import Retriever, is_validated
from dpsr_tf.evaluation.systems import Systems, system_names, systems_help

USAGE = f"""
Usage: dpsr evaluate --store=STORE --judgments=FILE --system=bm25 --system=server:HOST:PORT/MODEL
       dpsr evaluate --store=STORE --held_out --system=bm25 --system=model:DIR --compare
       dpsr evaluate --store=STORE --held_out --rank --system=shown --system=ranker:DIR --compare

Sends every judged query to each system and prints recall, precision, MRR and NDCG over the whole corpus, top-k among
1,024 items, AUC, coverage, popularity and latency. Figures are means over the queries with at least one relevant item.
An item without a judgment counts as not relevant. docs/evaluation.md defines every figure.
With --rank, each system orders the items of given lists, and the command prints session AUC, NDCG, MRR and calibration.

Systems:
{systems_help()}
Systems with --rank: those above that can score given items (bm25, popularity, random, model, index), and
{rankings.systems_help()}
"""

REQUIRED_FLAGS = ("store",)
REMOTE_INPUTS = ("store",)


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `dpsr evaluate`."""
    text, integer, boolean = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_boolean
    texts = flags.DEFINE_multi_string
    text("store", None, "store whose items the systems choose from", flag_values=values)
    texts("system", [], "system to measure, one of the list above", flag_values=values)

    judgments.define_flags(values, "table of judged query-item pairs (TSV, CSV, Parquet, JSON lines)")
    text("user_column", "", "column of --judgments with the user id, if there is one", flag_values=values)
    text(
        "time_column",
        "",
        "column of --judgments with the time of the query in seconds since 1970; needs --user_column",
        flag_values=values,
    )
    boolean(
        "held_out",
        False,
        "measure on the interactions that the store held out, instead of --judgments; see --fold",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "fold",
        None,
        list(FOLDS),
        "with --held_out, which queries to measure on: validation (the half that training looks at), test (the other "
        "half; the default), or all",
        flag_values=values,
    )
    boolean(
        "rank",
        False,
        "measure the order of given lists instead of retrieval: the items of each request that was held out "
        "(--held_out), or the judged items of each query (--judgments)",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "positive",
        None,
        list(OUTCOMES[1:]),
        "with --rank and --held_out, the lowest outcome that is positive in session AUC, MRR and calibration (default "
        "order)",
        flag_values=values,
    )
    boolean("skip_unknown", False, "ignore judgments of items that are not in the store", flag_values=values)

    text("queries", None, "table with one row per judged query; see --ask_column and --query_slice", flag_values=values)
    text("key_column", "query", "column of --queries with the query as it is in --judgments", flag_values=values)
    text("ask_column", "", "column of --queries with the text to ask instead of the query", flag_values=values)
    texts(
        "slice",
        [],
        f"column of --judgments to report by, or '{FREQUENCY}' (how often the log has the query)",
        flag_values=values,
    )
    texts("query_slice", [], "column of --queries to report by", flag_values=values)

    default_ks, ranking_ks = (",".join(map(str, ks)) for ks in (DEFAULT_KS, rankings.DEFAULT_KS))
    flags.DEFINE_list(
        "k",
        None,
        f"cut-offs k, separated by commas (default {default_ks}; with --rank {ranking_ks})",
        flag_values=values,
    )
    boolean("compare", False, "compare every system with the first one, query by query", flag_values=values)
    integer(
        "bootstrap",
        1000,
        "number of bootstrap samples for each confidence interval; 0 turns intervals off",
        0,
        1_000_000,
        flag_values=values,
    )
    integer("max_queries", None, "measure on a random sample of at most this many queries", 1, flag_values=values)
    integer(
        "latency_queries",
        100,
        "number of queries that are asked one at a time to measure latency; 0 turns this off",
        0,
        flag_values=values,
    )
    integer(
        "seed",
        1,
        "seed of the samples, of the candidates of top-k, and of the system 'random'",
        0,
        2**31 - 1,
        flag_values=values,
    )
    text("json", None, "file to write all figures to, as JSON", flag_values=values)


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr evaluate`."""
    ks = _ks(values.k, rankings.DEFAULT_KS if values.rank else DEFAULT_KS)
    _check_flags(values)
    if values.rank:
        _run_rank(values, ks)
        return
    corpus = Corpus.of_store(Store(values.store))
    if values.k and max(ks) > len(corpus.item_ids):
        raise UsageError(f"--k={max(ks)}: must be at most {len(corpus.item_ids)}, the number of items in the store")
    judged, left_out = _judgments(values, corpus)
    systems = Systems(corpus, values.seed)
    retrievers = {spec: systems.make(spec) for spec in values.system}
    options = Options(ks, values.seed, values.bootstrap, values.latency_queries)
    report = {
        "judgments": str(judged.path),
        "store": values.store,
        "queries": len(judged.queries),
        "left_out": left_out,
        "items": len(corpus.item_ids),
        "settings": dataclasses.asdict(options) | {"confidence": metrics.CONFIDENCE, "relevant_from": None},
        "versions": _versions(),
        **measure_all(retrievers, judged, corpus, options, values.compare),
    }
    report["settings"]["relevant_from"] = None if values.held_out else values.relevant_from
    if values.held_out:
        report["settings"]["fold"] = values.fold or "test"
        if values.fold in ("validation", "all"):
            _warn_of_validated(retrievers, report["notes"], values.fold)
    print(f"{judged.path}: {len(judged.queries):,} queries with a relevant item, {len(corpus.item_ids):,} items")
    _print_left_out(left_out)
    print(format_report(report))
    if values.json:
        _write_json(report, values.json)


def _run_rank(values: flags.FlagValues, ks: Sequence[int]) -> None:
    """Runs `dpsr evaluate --rank`."""
    corpus = Corpus.of_store(Store(values.store))
    left_out: dict[str, int] = {}
    assert corpus.store is not None
    lists: rankings.Lists
    if values.held_out:
        lists = rankings.HeldOutRequests(corpus.store, values.positive or "order")
    else:
        judged, left_out = _judgments(values, corpus)
        lists = rankings.JudgedLists(corpus, judged, values.relevant_from)
    rankers = rankings.Rankers(corpus, lists, values.seed)
    opened = {spec: rankers.make(spec) for spec in values.system}
    fold = (values.fold or "test") if values.held_out else "all"
    report = {
        "judgments": str(lists.path),
        "store": values.store,
        "left_out": left_out,
        "settings": {
            "ks": ks, "seed": values.seed, "bootstrap": values.bootstrap, "confidence": metrics.CONFIDENCE,
            "fold": fold, "positive": values.positive or "order" if values.held_out else None,
            "relevant_from": None if values.held_out else values.relevant_from,
        },
        "versions": _versions(),
        **rankings.measure_rankings(opened, lists, fold, ks, values.bootstrap, values.seed, values.compare),
    }  # fmt: skip
    if values.held_out and fold != "test":
        for spec in values.system:
            if rankings.is_validated(spec):
                report["notes"][spec].append(_warning(fold))
    print(f"{lists.path}: {report['lists']:,} lists with {report['items']:,} items, fold {fold}")
    _print_left_out(left_out)
    print(format_rankings(report))
    if values.json:
        _write_json(report, values.json)


def _print_left_out(left_out: Mapping[str, int]) -> None:
    print("".join(f"left out: {count:,} {what}\n" for what, count in left_out.items() if count), end="")


def _warn_of_validated(retrievers: Mapping[str, Retriever], notes: Mapping[str, list[str]], fold: str) -> None:
    """Adds a warning to the notes of each system whose training looked at the queries of this fold."""
    for spec, retriever in retrievers.items():
        if is_validated(retriever):
            notes[spec].append(_warning(fold))


def _warning(fold: str) -> str:
    return (
        f"warning: its training looked at {'half of ' if fold == 'all' else ''}these queries, to choose its best "
        f"checkpoint and when to stop, so its figures may be too high; measure it with --fold=test"
    )


def _check_flags(values: flags.FlagValues) -> None:
    """Raises UsageError for flags that cannot be combined, CommandError if --json cannot be written."""
    if not values.system:
        raise UsageError(f"--system is missing, expected at least one of: {system_names()}")
    if values.time_column and not values.user_column:
        raise UsageError("--time_column needs --user_column: only a known user has a history; give both")
    if math.isnan(values.relevant_from):
        raise UsageError("--relevant_from=nan: expected a number")
    if values.held_out and values.judgments:
        raise UsageError(f"--judgments={values.judgments}: cannot be combined with --held_out; give one of them")
    if values.fold and not values.held_out:
        raise UsageError(f"--fold={values.fold}: needs --held_out; a fold is a part of what the store held out")
    if not values.held_out and not values.judgments:
        raise UsageError("--judgments is missing; give a table of judged pairs, or --held_out")
    if (values.ask_column or values.query_slice) and not values.queries:
        raise UsageError("--queries is missing; --ask_column and --query_slice name columns of that table")
    _check_rank_flags(values)
    if values.compare and len(values.system) < 2:
        raise UsageError("--compare needs at least two systems; the others are compared with the first one")
    if values.json:
        folder = Path(values.json).parent
        if not folder.is_dir():
            raise CommandError(f"--json={values.json}: the directory {folder} does not exist; create it first")
        if Path(values.json).is_dir() or not os.access(folder, os.W_OK):
            raise CommandError(f"--json={values.json}: cannot be written; choose another file")


def _check_rank_flags(values: flags.FlagValues) -> None:
    if values.positive and not (values.rank and values.held_out):
        raise UsageError(f"--positive={values.positive}: needs --rank and --held_out; it chooses among their outcomes")
    if not values.rank:
        for spec in values.system:
            if rankings.is_ranker(spec):
                raise UsageError(f"--system={spec}: orders given items and cannot retrieve any; add --rank")
        return
    for name in ("queries", "slice", "query_slice", "max_queries"):
        if getattr(values, name):
            raise UsageError(f"--{name} cannot be combined with --rank; leave one of them out")


def _ks(given: Sequence[str] | None, default: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the cut-offs of --k, ascending. Raises UsageError."""
    if given is None:
        return default
    if not given or not all(text.strip().isdecimal() and int(text) > 0 for text in given):
        raise UsageError(f"--k={','.join(given)}: expected cut-offs of 1 or more, as in --k=10,100")
    return tuple(sorted({int(text) for text in given}))


def _judgments(values: flags.FlagValues, corpus: Corpus) -> tuple[Judgments, dict[str, int]]:
    """Returns the judgments that the flags name, and the number of judgments, users and queries left out by reason."""
    left_out = {}
    judged = _read_judgments(values, corpus)
    if values.skip_unknown:
        judged, left_out["judgments of items that are not in the store"] = judged.only_known(corpus.item_ids)
    judged.check_items(corpus.item_ids)
    if values.user_column:
        known = corpus.store.users()["id"] if corpus.store is not None else np.zeros(0, np.int64)
        unknown = {user.id for user in judged.users or ()} - set(known.tolist())
        left_out["users that are not in the store; their queries are asked as anonymous"] = len(unknown)
    if FREQUENCY in values.slice:
        frequencies: list[tuple[str, ...]] = [(name,) for name in corpus.frequencies(judged.queries)]
        judged = dataclasses.replace(judged, slices={FREQUENCY: frequencies, **judged.slices})
    if values.queries:
        judged = judged.with_queries(Path(values.queries), values.key_column, values.ask_column, values.query_slice)
    if values.max_queries:
        total = len(judged.queries)
        judged = judged.sample(values.max_queries, values.seed)
        left_out["queries that --max_queries did not draw"] = total - len(judged.queries)
    counted = "" if values.rank else " (they count for AUC only)"
    left_out[f"queries without a relevant item{counted}"] = len(judged.unanswered)
    return judged, left_out


def _read_judgments(values: flags.FlagValues, corpus: Corpus) -> Judgments:
    """Reads the table of --judgments, or what the store held out."""
    columns = [name for name in values.slice if name != FREQUENCY]
    if not values.held_out:
        keys = (corpus.item_keys, corpus.user_keys)
        return judgments.read_flags(values, *keys, values.user_column, values.time_column, columns)
    assert corpus.store is not None
    if columns:
        raise UsageError(f"--slice={columns[0]}: held-out interactions have no columns, expected {FREQUENCY}")
    return Judgments.of_held_out(corpus.store, values.fold or "test")


def _write_json(report: Mapping[str, Any], path: str) -> None:
    """Writes the report to a file. Raises CommandError if that fails."""
    try:
        write_text(Path(path), json.dumps(_jsonable(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise CommandError(f"--json={path}: cannot be written: {error.strerror}") from None


def _versions() -> dict[str, str]:
    """Returns the versions of the installed packages that decide the figures."""
    packages = ("numpy", "scipy", "bm25s", "PyStemmer", "ir-measures", "tensorflow", "faiss-cpu", "faiss-gpu")
    versions = {"dpsr": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _jsonable(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _jsonable(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
