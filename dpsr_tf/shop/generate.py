"""`dpsr generate`: writes a synthetic shop and its click log.

It holds what DPSR (sections 1 and 6.3) sets out to solve: queries whose words stand in no title that they mean
(semantic gap), words with two meanings, misspelt queries, accessories whose titles name another product, long tails of
queries and items, and users whose profile and history decide what they click. docs/generated_shop.md says what is in
which file.
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

Writes a synthetic shop, English and Chinese, and its search log into DIR: items.parquet, users.parquet, interactions/,
labels.parquet, schema.yaml for `dpsr ingest`, judgments.dev.tsv and judgments.test.tsv for `dpsr evaluate` (queries
that the log does not hold), judgments.personal.tsv (purchases after the log's end), and what is true in truth.json and
truth/. The same flags give the same files, byte for byte.
"""

_FLAGS = ("seed", "items", "users", "interactions")
_BATCHES_OF_A_PART = 16  # some 3 million rows
# Ids are drawn from here up, so that none is a row number.
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

REQUIRED_FLAGS = ("out",)


def define_flags(values: flags.FlagValues) -> None:
    """Flags of `dpsr generate`."""
    flags.DEFINE_string("out", None, "directory to make", flag_values=values)
    flags.DEFINE_boolean("overwrite", False, "replaces a directory that is there", flag_values=values)
    flags.DEFINE_string("parameters", None, "YAML file of parameters; flags and --set win", flag_values=values)
    flags.DEFINE_multi_string("set", [], "name=value of a parameter; repeatable", flag_values=values)
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
        raise CommandError(f"{values.out}: cannot be written: {error}; nothing is left of it") from None
    print(
        f"shop {values.out}: {counts['items']:,} items, {counts['users']:,} users, {counts['interactions']:,} clicks "
        f"({counts['rows']:,} rows) of {counts['queries']:,} queries, {counts['judged_queries']:,} other queries judged"
    )


def _parameters(values: flags.FlagValues) -> Parameters:
    """File, then flags, then --set. Raises UsageError for what is not allowed."""
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

    Memory goes with items, users and distinct queries, not with interactions.

    Returns:
        The counts that truth.json holds.

    Raises:
        UsageError: the parameters do not go together.
    """
    world = make_world(parameters)
    rng = random_stream(parameters, "ids")
    item_ids, user_ids = _random_ids(len(world.items), rng), _random_ids(len(world.users), rng)
    _write(out / "items.parquet", _item_columns(world, item_ids))
    _write(out / "users.parquet", _user_columns(world, user_ids))
    log = Log(world)
    (out / "interactions").mkdir()
    _write_log(log, world, item_ids, user_ids, out / "interactions")
    judged_kinds = {FOLDS[fold]: _write_judgments(world, fold, item_ids, out) for fold in (1, 2)}
    _write_purchases(world, log, item_ids, user_ids, out / "judgments.personal.tsv")
    (out / "schema.yaml").write_text(yaml.safe_dump(SCHEMA, sort_keys=False))
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
        "judged_queries": sum(len(found) for found in judged_kinds.values()),
        **{f"judged_{fold}_{kind}": found.count(kind) for fold, found in judged_kinds.items() for kind in KINDS},
    }
    (out / "truth.json").write_text(
        json.dumps(_truth(world, log, counts), ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    return counts


def _random_ids(n: int, rng: np.random.Generator) -> np.ndarray:
    """n distinct ids, int64, in random order."""
    ids = rng.integers(_FIRST_ID, _LAST_ID, n)
    while len(unique := np.unique(ids)) < n:
        ids = np.concatenate([unique, rng.integers(_FIRST_ID, _LAST_ID, n - len(unique))])
    return rng.permutation(ids)


def _write(path: Path, columns: dict[str, Any]) -> None:
    """A table in the order of its first column: ids are random, so their order tells nothing."""
    table = pa.table(columns)
    pyarrow.parquet.write_table(table.take(np.argsort(columns[table.column_names[0]], kind="stable")), path)


def _names(codes: np.ndarray, names: Iterable[str]) -> pa.Array:
    """Text of codes; null for -1."""
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
            for rows in itertools.islice(batches, _BATCHES_OF_A_PART - 1):
                writer.write_table(table(rows))


def _write_judgments(world: World, fold: int, item_ids: np.ndarray, out: Path) -> list[str]:
    """judgments.dev.tsv or judgments.test.tsv; returns the kind of each query in it."""
    lines, found = ["query\titem\tgrade\tkind\n"], []
    for judgment in judged(world, fold):
        found.append(judgment.kind)
        pairs = [(i, 3) for i in item_ids[judgment.relevant]] + [(i, 0) for i in item_ids[judgment.not_relevant]]
        lines += [f"{judgment.query}\t{i}\t{grade}\t{judgment.kind}\n" for i, grade in sorted(pairs)]
    (out / f"judgments.{FOLDS[fold]}.tsv").write_text("".join(lines), encoding="utf-8")
    return found


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
    """A list a row of [rows, n] numbers, or the names of codes, where -1 is left out."""
    if names is None:
        splits = np.arange(len(values) + 1) * values.shape[1]
        return pa.ListArray.from_arrays(pa.array(splits, pa.int32()), pa.array(values.ravel()))
    there = values >= 0
    splits = np.concatenate([[0], np.cumsum(there.sum(1))])
    return pa.ListArray.from_arrays(pa.array(splits, pa.int32()), _names(values[there], names))


def _segments(requests: np.ndarray) -> np.ndarray:
    """0, 1, 2 for texts that make the first, second and last third of all requests, the most frequent first."""
    order = np.argsort(-requests, kind="stable")
    before = np.cumsum(requests[order]) - requests[order]
    segments = np.empty(len(requests), np.int64)
    segments[order] = np.minimum(before * 3 // max(int(requests.sum()), 1), 2)
    segments[requests == 0] = 2
    return segments


def _truth(world: World, log: Log, counts: dict[str, int]) -> dict[str, Any]:
    catalogue = world.catalogue
    synonyms, polysemous, across = {}, {}, {}
    for number, name in enumerate(LANGUAGE_CODES):
        types = [catalogue.types[code] for code in catalogue.types_of(number)]
        codes = sorted({int(code) for mine in catalogue.attributes[number].values() for code in mine})
        entries = [*types, *(catalogue.words[code] for code in codes)]
        synonyms[name] = {entry.word: list(entry.synonyms) for entry in entries if entry.synonyms}
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
        "polysemous": polysemous,
        "brands_across_categories": across,
        "homonyms": catalogue.homonyms,
        "misleading": {name: world.misleading(number) for number, name in enumerate(LANGUAGE_CODES)},
    }
