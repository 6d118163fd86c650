"""`dpsr generate`: writes a synthetic shop and its click log.

The shop has the problems that DPSR (sections 1 and 6.3) sets out to solve: queries with words that no relevant title
holds (semantic gap), words with two meanings, misspelt queries, accessories whose titles name another product, long
tails of queries and items, and users whose profile and history decide what they click. docs/generated_shop.md describes
the files.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import yaml
from absl import flags

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.strict_yaml import read_yaml
from dpsr_common.typed_config import from_dict, read_assignment, to_dict
from dpsr_tf.data.schema import EVENT_TYPES
from dpsr_tf.data.store import new_directory
from dpsr_tf.shop.catalogue import LANGUAGE_CODES
from dpsr_tf.shop.judge import FOLDS, KINDS, judged, kinds, labels, purchases
from dpsr_tf.shop.lexicon import GENDERS, POWERS
from dpsr_tf.shop.log import START, Log, Rows
from dpsr_tf.shop.parameters import Parameters
from dpsr_tf.shop.sampling import random_stream
from dpsr_tf.shop.world import TASTE_WEIGHTS, World, make_world

USAGE = """
Usage: dpsr generate --out=DIR [--parameters=FILE] [--set=NAME=VALUE ...]

Writes a synthetic shop with English and Chinese items, and its search log, into DIR. The same flags give the same
files, byte for byte.

  items.parquet, users.parquet, interactions/    tables for `dpsr ingest`, described by schema.yaml
  schema.ranking.yaml, schema.rewriting.yaml     the same tables, described for a ranker and for a rewriter
  judgments.dev.tsv, judgments.test.tsv          judged queries that the log does not hold, for `dpsr evaluate`
  judgments.personal.tsv                         purchases of users after the end of the log, for `dpsr evaluate`
  labels.parquet                                 pairs of queries and items with a human grade
  truth.json, truth/                             the truth behind the log: parameters, tastes, relevant items

docs/generated_shop.md describes all files and all parameters.
"""

_FLAGS = ("seed", "items", "users", "interactions", "types")
# Batches in each file of the log, which has some 3 million rows then.
_BATCHES_PER_FILE = 16
# Ids are drawn from this range, so that no id is a row number.
_FIRST_ID, _LAST_ID = 10_000_000, 10_000_000_000

SCHEMA: dict[str, Any] = {
    "items": {
        "files": "items.parquet",
        "id": "item_id",
        "text": "title",
        "popularity": "sales",
        "features": [
            "brand",
            "category",
            "shop",
            {
                "column": "price",
                "kind": "number",
                "boundaries": [5, 10, 20, 40, 80, 150, 300, 600, 1200, 2500, 5000],
            },
            "in_stock",
        ],
        "filters": ["brand", "category", "shop", {"column": "price", "kind": "number"}, "in_stock"],
    },
    "users": {
        "files": "users.parquet",
        "id": "user_id",
        "features": [
            "gender",
            {"column": "age", "kind": "number", "boundaries": [26, 36, 51]},
            "purchase_power",
            "city",
        ],
    },
    "interactions": {
        "files": "interactions",
        "query": "query",
        "item": "item_id",
        "user": "user_id",
        "type": "event",
        "time": "time",
        "session": "session",
        "position": "position",
    },
    "vocabulary": {"min_count": 2},
}

# What schema.ranking.yaml has beside it, together with a part of the log that is held out.
RANKING = {"attributes": ["brand", "shop", "category"], "brand": "brand", "price": "price"}
# The share of the log's days, at its end, that schema.ranking.yaml holds out.
_HELD_OUT = 1 / 6

REQUIRED_FLAGS = ("out",)


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `dpsr generate`."""
    flags.DEFINE_string(
        "out", None, "directory for the files of the shop, which this command creates", flag_values=values
    )
    flags.DEFINE_boolean("overwrite", False, "replace the shop if --out exists already", flag_values=values)
    flags.DEFINE_string(
        "parameters", None, "YAML file with parameters; flags and --set override it", flag_values=values
    )
    flags.DEFINE_multi_string("set", [], "set one parameter, as name=value", flag_values=values)
    for name in _FLAGS:
        field = Parameters.__dataclass_fields__[name]
        flags.DEFINE_integer(name, field.default, field.metadata["help"], flag_values=values)


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr generate`."""
    parameters = _parameters(values)
    try:
        with new_directory(Path(values.out), values.overwrite, "shop", "truth.json") as out:
            counts = generate(parameters, out)
    except OSError as error:
        raise CommandError(f"{values.out}: cannot be written: {error}; the unfinished files were removed") from None
    print(
        f"shop {values.out}: {counts['items']:,} items, {counts['users']:,} users, {counts['interactions']:,} clicks "
        f"({counts['rows']:,} rows) of {counts['queries']:,} queries, {counts['judged_queries']:,} other queries judged"
    )


def _parameters(values: flags.FlagValues) -> Parameters:
    """Reads the parameters: --set overrides flags, and flags override the file. Raises UsageError for bad values."""
    given: dict[str, Any] = {}
    if values.parameters is not None:
        given = read_yaml(values.parameters)
        from_dict(Parameters, given, f"--parameters={values.parameters}", check=False)
    for name in _FLAGS:
        low, high = (Parameters.__dataclass_fields__[name].metadata[bound] for bound in ("minimum", "maximum"))
        if not low <= values[name].value <= high:
            raise UsageError(f"--{name}={values[name].value}: expected {low:,} to {high:,}")
        if values[name].present:
            given[name] = values[name].value
    for assignment in values["set"].value:
        name, value = read_assignment(assignment, "list_length=10")
        from_dict(Parameters, {name: value}, f"--set={assignment}", check=False)
        given[name] = value
    return from_dict(Parameters, given, "parameters")


def generate(parameters: Parameters, out: Path) -> dict[str, int]:
    """Writes the shop's files into the directory `out`, which exists.

    Memory grows with the number of items, users and distinct queries, not with the number of interactions.

    Returns:
        The counts that truth.json holds.

    Raises:
        UsageError: the parameters cannot be combined.
    """
    world = make_world(parameters)
    item_ids, user_ids = random_ids(world)
    _write(out / "items.parquet", _item_columns(world, item_ids))
    _write(out / "users.parquet", _user_columns(world, user_ids))
    log = Log(world)
    (out / "interactions").mkdir()
    _write_log(log, world, item_ids, user_ids, out / "interactions")
    judged_kinds = {FOLDS[fold]: _write_judgments(world, fold, item_ids, out) for fold in (1, 2)}
    _write_purchases(world, log, item_ids, user_ids, out / "judgments.personal.tsv")
    (out / "schema.yaml").write_text(yaml.safe_dump(SCHEMA, sort_keys=False))
    held_out = {"held_out": {"last_days": round(parameters.days * _HELD_OUT, 3)}}
    ranking = SCHEMA | {"interactions": SCHEMA["interactions"] | held_out, "ranking": RANKING}
    (out / "schema.ranking.yaml").write_text(yaml.safe_dump(ranking, sort_keys=False))
    (out / "schema.rewriting.yaml").write_text(yaml.safe_dump(SCHEMA | {"rewriting": {}}, sort_keys=False))
    (out / "truth").mkdir()
    _write_labels(world, item_ids, out)
    _write_truth(world, log, item_ids, user_ids, out / "truth")
    counts = {
        "items": len(world.items),
        "users": len(world.users),
        "interactions": int(log.events[EVENT_TYPES.index("click")]),
        "rows": int(log.events.sum()),
        "sessions": log.sessions,
        "requests": log.requests,
        **{f"{name}s": int(n) for name, n in zip(EVENT_TYPES, log.events, strict=True)},
        "stray_clicks": log.stray_clicks,
        "queries": int((log.text_requests > 0).sum()),
        "judged_queries": sum(map(len, judged_kinds.values())),
        **{
            f"judged_{fold}_{kind}": query_kinds.count(kind)
            for fold, query_kinds in judged_kinds.items()
            for kind in KINDS
        },
    }
    (out / "truth.json").write_text(
        json.dumps(_truth(world, log, counts), ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    return counts


def random_ids(world: World) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of the world's items and users, in the order of their rows; int64 each."""
    rng = random_stream(world.parameters, "ids")
    return _random_ids(len(world.items), rng), _random_ids(len(world.users), rng)


def _random_ids(n: int, rng: np.random.Generator) -> np.ndarray:
    """Returns n distinct ids, int64, in random order."""
    ids = rng.integers(_FIRST_ID, _LAST_ID, n)
    while len(unique := np.unique(ids)) < n:
        ids = np.concatenate([unique, rng.integers(_FIRST_ID, _LAST_ID, n - len(unique))])
    return rng.permutation(ids)


def _write(path: Path, columns: dict[str, Any]) -> None:
    """Writes a table sorted by its first column. Where these are ids, which are random, the order tells nothing."""
    table = pa.table(columns)
    pyarrow.parquet.write_table(table.take(np.argsort(columns[table.column_names[0]], kind="stable")), path)


def _names(codes: np.ndarray, names: Iterable[str]) -> pa.Array:
    """Returns the names of codes; null for -1."""
    texts = pa.array(names, pa.string())
    return texts.take(pa.array(codes, mask=np.asarray(codes) < 0))


def _item_columns(world: World, ids: np.ndarray) -> dict[str, Any]:
    items, catalogue = world.items, world.catalogue
    return {
        "item_id": ids,
        "title": pa.array(items.titles),
        "brand": _names(items.brand, catalogue.brands),
        "category": _names(items.category, (category.name for category in catalogue.categories)),
        "shop": _names(items.shop, catalogue.shops),
        "price": items.price,
        "in_stock": items.in_stock,
        "sales": items.sales,
    }


def _user_columns(world: World, ids: np.ndarray) -> dict[str, Any]:
    users, languages = world.users, world.catalogue.languages
    first_city = np.array([0, len(languages[0].cities)])
    return {
        "user_id": ids,
        "gender": _names(users.gender, GENDERS),
        "age": users.age,
        "purchase_power": _names(users.power, POWERS),
        "city": _names(users.city + first_city[users.language], [*languages[0].cities, *languages[1].cities]),
    }


def _write_log(log: Log, world: World, item_ids: np.ndarray, user_ids: np.ndarray, out: Path) -> None:
    texts, events = pa.array([*world.texts, *world.misspelt]), pa.array(EVENT_TYPES)

    def table(rows: Rows) -> pa.Table:
        return pa.table(
            {
                "query": texts.take(pa.array(rows.text)),
                "user_id": user_ids[rows.user],
                "item_id": item_ids[rows.item],
                "event": events.take(pa.array(rows.event)),
                "time": rows.time,
                "session": rows.session,
                "position": rows.position,
            }
        )

    batches = log.batches()
    for part in itertools.count():
        first = next(batches, None)
        if first is None:
            return
        batch = table(first)
        with pyarrow.parquet.ParquetWriter(out / f"part-{part:05}.parquet", batch.schema) as writer:
            writer.write_table(batch)
            for rows in itertools.islice(batches, _BATCHES_PER_FILE - 1):
                writer.write_table(table(rows))


def _write_judgments(world: World, fold: int, item_ids: np.ndarray, out: Path) -> list[str]:
    """Writes judgments.dev.tsv or judgments.test.tsv. Returns the kind of each judged query."""
    lines, query_kinds = ["query\titem\tgrade\tkind\n"], []
    for judgment in judged(world, fold):
        query_kinds.append(judgment.kind)
        pairs = [(i, 3) for i in item_ids[judgment.relevant]] + [(i, 0) for i in item_ids[judgment.not_relevant]]
        lines += [f"{judgment.query}\t{i}\t{grade}\t{judgment.kind}\n" for i, grade in sorted(pairs)]
    (out / f"judgments.{FOLDS[fold]}.tsv").write_text("".join(lines), encoding="utf-8")
    return query_kinds


def _write_purchases(world: World, log: Log, item_ids: np.ndarray, user_ids: np.ndarray, path: Path) -> None:
    bought, kind = purchases(world, log), kinds(world)
    lines = ["query\tuser_id\titem\tgrade\tkind\ttime\n"]
    for text, user, item, time in zip(bought.text, bought.user, bought.item, bought.time, strict=True):
        lines.append(f"{world.texts[text]}\t{user_ids[user]}\t{item_ids[item]}\t3\t{kind[text]}\t{time}\n")
    path.write_text("".join(lines), encoding="utf-8")


def _write_labels(world: World, item_ids: np.ndarray, out: Path) -> None:
    text, item, given, true = labels(world)
    query = pa.array(world.texts).take(pa.array(text))
    for path, grade in ((out / "labels.parquet", given), (out / "truth" / "labels.parquet", true)):
        pyarrow.parquet.write_table(pa.table({"query": query, "item": item_ids[item], "grade": grade}), path)


def _write_truth(world: World, log: Log, item_ids: np.ndarray, user_ids: np.ndarray, out: Path) -> None:
    catalogue, items, users = world.catalogue, world.items, world.users
    words = [value.word for value in catalogue.words]
    _write(
        out / "items.parquet",
        {
            "item_id": item_ids,
            "language": _names(items.language, LANGUAGE_CODES),
            "type": _names(items.type, (t.word for t in catalogue.types)),
            "words": _lists(items.words, words),
            "style": _names(items.style[:, 1], words),
            "style_place": items.style[:, 0],
            "category_place": catalogue.category_place[items.category],
            "level": items.level,
            "popularity": items.popularity,
            "liking": _lists(items.liking),
        },
    )
    _write(
        out / "users.parquet",
        {
            "user_id": user_ids,
            "language": _names(users.language, LANGUAGE_CODES),
            "profile": users.profile,
            "activity": users.activity,
            "categories": _lists(users.categories),
            "brands": _lists(users.brands, catalogue.brands),
            "shops": _lists(users.shops, catalogue.shops),
            "styles": _lists(users.styles, words),
        },
    )
    _write_query_truth(world, log, item_ids, out)


def _write_query_truth(world: World, log: Log, item_ids: np.ndarray, out: Path) -> None:
    catalogue, meaning = world.catalogue, world.meaning
    _write(
        out / "meanings.parquet",
        {
            "meaning": np.arange(len(meaning)),
            "category": _names(meaning[:, 0], (category.name for category in catalogue.categories)),
            "type": _names(meaning[:, 1], (t.word for t in catalogue.types)),
            "brand": _names(meaning[:, 2], catalogue.brands),
            "words": _lists(meaning[:, 3:], [value.word for value in catalogue.words]),
            "fold": _names(world.fold, FOLDS),
        },
    )
    splits = world.answer_splits[: len(meaning) + 1]
    pairs = {
        "meaning": np.repeat(np.arange(len(meaning)), np.diff(splits)),
        "item_id": item_ids[world.answer_items[: splits[-1]]],
    }
    pyarrow.parquet.write_table(pa.table(pairs), out / "relevant.parquet")
    segment = _names(_segments(log.text_requests), ("head", "torso", "tail"))
    right, _ = world.text_rows()
    n = len(world.texts)
    queries = {
        "query": world.texts,
        "language": _names(world.text_language, LANGUAGE_CODES),
        "kind": kinds(world).tolist(),
        "meanings": world.senses,
        "fold": _names(world.text_fold, FOLDS),
        "requests": log.text_requests[:n],
        "segment": segment[:n],
    }
    pyarrow.parquet.write_table(pa.table(queries), out / "queries.parquet")
    misspelt = {
        "query": pa.array(world.misspelt, pa.string()),
        "right": pa.array(world.texts).take(pa.array(right[n:])),
        "requests": log.text_requests[n:],
        "segment": segment[n:],
    }
    pyarrow.parquet.write_table(pa.table(misspelt), out / "misspellings.parquet")


def _lists(values: np.ndarray, names: list[str] | None = None) -> pa.Array:
    """Turns [rows, n] numbers into one list per row. With `names` they are codes, and -1 is left out."""
    if names is None:
        splits = np.arange(len(values) + 1) * values.shape[1]
        return pa.ListArray.from_arrays(pa.array(splits, pa.int32()), pa.array(values.ravel()))
    known = values >= 0
    splits = np.concatenate([[0], np.cumsum(known.sum(1))])
    return pa.ListArray.from_arrays(pa.array(splits, pa.int32()), _names(values[known], names))


def _segments(requests: np.ndarray) -> np.ndarray:
    """Puts frequent texts first and splits them into three thirds of all requests: 0 head, 1 torso, 2 tail."""
    order = np.argsort(-requests, kind="stable")
    before = np.cumsum(requests[order]) - requests[order]
    segments = np.empty(len(requests), np.int64)
    segments[order] = np.minimum(before * 3 // max(int(requests.sum()), 1), 2)
    segments[requests == 0] = 2
    return segments


def _truth(world: World, log: Log, counts: dict[str, int]) -> dict[str, Any]:
    """Returns what truth.json holds."""
    catalogue = world.catalogue
    synonyms, unasked, polysemous, across = {}, {}, {}, {}
    for number, name in enumerate(LANGUAGE_CODES):
        types = [catalogue.types[code] for code in catalogue.types_of(number)]
        codes = sorted({int(code) for mine in catalogue.attributes[number].values() for code in mine})
        entries = [*types, *(catalogue.words[code] for code in codes)]
        synonyms[name] = {entry.word: list(entry.synonyms) for entry in entries if entry.synonyms}
        unasked[name] = {
            catalogue.types[code].word: sorted(catalogue.unasked[code])
            for code in catalogue.types_of(number)
            if catalogue.unasked[code]
        }
        mine = np.flatnonzero(catalogue.category_language == number)
        of_brand: dict[str, list[str]] = {}
        for category in mine:
            for code in catalogue.category_brands[category]:
                of_brand.setdefault(catalogue.brands[code], []).append(catalogue.categories[category].name)
        polysemous[name] = [brand for brand in of_brand if brand in {t.word for t in types}]
        across[name] = {brand: found for brand, found in of_brand.items() if len(found) > 1}
    return {
        "format": "dpsr-generated-shop",
        "version": 3,
        "parameters": to_dict(world.parameters),
        "counts": counts,
        "log_begins": START,
        "log_ends": log.end,
        "propensities": [round(float(p), 6) for p in log.propensities],
        "taste_weights": TASTE_WEIGHTS,
        "categories": {
            name: [c.name for c in language.categories]
            for name, language in zip(LANGUAGE_CODES, catalogue.languages, strict=True)
        },
        "styles": dict(zip(LANGUAGE_CODES, catalogue.styles, strict=True)),
        "synonyms": synonyms,
        "unasked_synonyms": unasked,
        "polysemous": polysemous,
        "brands_across_categories": across,
        "homonyms": catalogue.homonyms,
        "misleading": {name: world.misleading(number) for number, name in enumerate(LANGUAGE_CODES)},
    }
