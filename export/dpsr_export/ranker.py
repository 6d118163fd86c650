"""`dpsr export` of a ranker: a servable with the signature `rank` (docs/ranking.md)."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dpsr_common.errors import CommandError, op_message
from dpsr_common.typed_config import from_dict, to_dict
from dpsr_export import request_tables, servable_assets, warmup
from dpsr_export.embeddings import checkpoint_fingerprint
from dpsr_export.index_files import MANIFEST_FORMAT, MANIFEST_VERSION, file_record
from dpsr_export.rank_table import FILE, RankNumbers, RankTable, RankWeights, write_rank_table
from dpsr_export.request_inputs import RequestInputs, absent, save_model, signature
from dpsr_tf import __version__
from dpsr_tf.config import Config
from dpsr_tf.data.examples_dataset import Features, Tokens
from dpsr_tf.data.ranking_features import DPSR_SCORE, LIST_SIMILARITY, RankingFeatures
from dpsr_tf.data.schema import FIXED_KINDS
from dpsr_tf.data.store import Store
from dpsr_tf.data.user_requests import USER, User, UserRequests, input_arrays
from dpsr_tf.models.encoders import StoreTables, item_embeddings, restore
from dpsr_tf.models.features import Feature, FeatureSpec, ItemFeatures
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.ranker import HALF_LIFE, Ranker
from dpsr_tf.models.ranker_inputs import check_numbers
from dpsr_tokenizer import Vocabulary

v1 = tf.compat.v1

# The signature that computes the item tables, for a renewal. Nobody else calls it.
ITEMS_SIGNATURE = "item_tables"
# The input with the user's id. It has the name that a feature `id` would have.
USER_ID = f"{USER}id"
_BATCH = 4096
# Requests that are kept for warm-up and measurement, and items in each.
_NUM_REQUESTS, _ITEMS = 100, 100


def export(model: ModelDirectory, store: Store, max_items: int, out: Path) -> dict[str, Any]:
    """Writes the servable of a ranker into the directory `out`, and lets it answer its warm-up requests.

    Args:
        model: a ranker. Its last checkpoint is exported.
        store: the store that it was trained on, or a newer one with the same vocabulary and codes.
        max_items: the largest number of items of a request.
        out: an empty directory.

    Returns:
        The entry `measured` of the manifest: number of requests, and their latency.

    Raises:
        CommandError: the store is not one that the model can read, or the written servable does not answer.
    """
    source = _Source.open(model, store)
    checkpoint = model.last_checkpoint()
    with tempfile.TemporaryDirectory(prefix=".assets-", dir=out.parent) as name:
        assets = Path(name)
        servable_assets.write_feature_files(model, store, assets, ["user"])
        inputs = _write_saved_model(source, checkpoint, max_items, assets, out)
    manifest = {
        "format": MANIFEST_FORMAT,
        "version": MANIFEST_VERSION,
        "kind": "ranker",
        "tensorflow_version": tf.__version__,
        "op_libraries": ["libdpsr_tokenizer_ops.so", "libdpsr_retrieval_ops.so"],
        "op_libraries_version": __version__,
        "checkpoint": Path(checkpoint).name,
        "checkpoint_fingerprint": checkpoint_fingerprint(checkpoint),
        "max_items": max_items,
        "inputs": inputs,
        "config": to_dict(model.config),
        "features": to_dict(model.features),
        "meanings": model.meanings,
    }
    return _finish(store, manifest, out)


def renew(old: Path, manifest: dict[str, Any], store: Store, out: Path) -> dict[str, Any]:
    """Copies a servable into the directory `out`, with the items, users and statistics of another store.

    Weights and graph stay, but for the table that the graph accepts.

    Args:
        old: the version directory of the servable.
        manifest: its manifest.
        store: a store with the same vocabulary, features and codes (`dpsr ingest --like`).
        out: an empty directory.

    Returns:
        As export.

    Raises:
        CommandError: as export.
    """
    # The servable has all that makes a model but its directory.
    model = ModelDirectory(
        old,
        from_dict(Config, manifest["config"], "config"),
        from_dict(FeatureSpec, manifest["features"], "features"),
        manifest["meanings"],
        Vocabulary(str(old / "assets" / "vocabulary.dpsr")),
    )
    source = _Source.open(model, store)
    servable = warmup.LoadedServable(old)
    try:
        tables = source.item_tables(lambda values: servable(ITEMS_SIGNATURE, values))
    finally:
        servable.close()
    shutil.copytree(old, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("assets.extra", FILE))
    write_rank_table(source.features, tables, out / "assets" / FILE)
    request_tables.accept_assets(out, {FILE})
    return _finish(store, manifest, out)


@dataclasses.dataclass(frozen=True)
class _Source:
    """A ranker, and the store whose items and statistics it reads."""

    model: ModelDirectory
    store: Store
    features: RankingFeatures
    tables: StoreTables

    @staticmethod
    def open(model: ModelDirectory, store: Store) -> _Source:
        """Raises CommandError if the model cannot be exported, or cannot read the store."""
        if any(feature.name == "id" for feature in model.features.user) or any(
            number.name == "user.id" for number in model.features.numbers
        ):
            raise CommandError(
                f"{model.path}: the user feature 'id' needs an input {USER_ID}, but the id of the user has this name "
                f"already; give the feature another `name` in the schema"
            )
        features = RankingFeatures(store)
        check_numbers(features, model.features.numbers, str(model.path))
        return _Source(model, store, features, StoreTables(model, store))

    @property
    def compares(self) -> bool:
        """Whether the ranker reads how similar the items of a list are."""
        return any(number.name == LIST_SIMILARITY for number in self.model.features.numbers)

    def item_tables(self, run: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]) -> list[np.ndarray]:
        """Computes the tables of all items, float32 [items, width] each; `run` is the signature for some items."""
        items = self.store.counts.items
        found = [run(self._items(np.arange(begin, min(begin + _BATCH, items)))) for begin in range(0, items, _BATCH)]
        tables = [np.concatenate([tables[name] for tables in found]) for name in sorted(found[0])]
        # The last table has embeddings of the retrieval model, which are no variables of the ranker.
        return [*tables, item_embeddings(self.model.config.ranker.dpsr_model, self.store)] if self.compares else tables

    def _items(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Returns what describes some items: the inputs of `item_tables`."""
        n, spec = len(rows), self.model.features
        text, features, _ = self.tables.items(rows)
        at_end = self.features.at_end([""], np.zeros(n, np.int64), np.zeros(n, np.int64), rows).numbers
        names = [number.name for number in spec.numbers_of("item")]
        numbers = np.empty((n, len(names)), np.float32)
        for place, name in enumerate(names):
            numbers[:, place] = at_end[name]
        codes = np.zeros((n, 0), np.int32) if features is None else features.codes
        values = {"text.values": text.values, "text.splits": text.row_splits, "codes": codes, "numbers": numbers}
        for feature, tokens in zip(_lists(spec), () if features is None else features.lists, strict=True):
            values |= {
                f"feature.{feature.name}.values": tokens.values,
                f"feature.{feature.name}.splits": tokens.row_splits,
            }
        return values


def _lists(spec: FeatureSpec) -> list[Feature]:
    return [feature for feature in spec.item if feature.kind not in FIXED_KINDS]


# The graph.


def _write_saved_model(
    source: _Source, checkpoint: str, max_items: int, assets: Path, out: Path
) -> dict[str, list[str]]:
    """Writes the SavedModel. Returns the names of the inputs of each signature."""
    model = source.model

    # The table comes first, because the graph of the servable says which table it accepts.
    with tf.Graph().as_default(), v1.Session() as session:
        inputs, tables = _items(model.features, Ranker(model.config, model.features))
        restore(model, session, checkpoint)
        found = source.item_tables(
            lambda values: session.run(tables.named(), {inputs[name]: value for name, value in values.items()})
        )
    write_rank_table(source.features, found, assets / FILE)
    with tf.Graph().as_default(), v1.Session() as session:
        ranker = Ranker(model.config, model.features)
        inputs, tables = _items(model.features, ranker)
        rank = _rank(source, ranker, tables, [of_items.shape[1] for of_items in found], max_items, assets)
        request_tables.check_assets()
        # All ops are made before the session runs one.
        initializer = v1.tables_initializer()
        restore(model, session, checkpoint)
        signatures = {
            "serving_default": signature(*rank),
            "rank": signature(*rank),
            ITEMS_SIGNATURE: signature(inputs, tables.named()),
        }
        return save_model(session, signatures, initializer, out)


class _Tables(NamedTuple):
    """What a ranker computes of each item, float32 [items, width]; None is what this ranker does not need."""

    hidden: tf.Tensor  # part of the first layer
    vectors: tf.Tensor
    codes: tf.Tensor | None  # of features
    inputs: tf.Tensor | None  # of the cross layers
    offered: tf.Tensor | None  # is multiplied with what a request wants

    def named(self) -> dict[str, tf.Tensor]:
        """Returns those that there are, by the name of their section in the rank table."""
        there = [table for table in self if table is not None]
        return {f"table{number}": table for number, table in enumerate(there)}

    def number(self, name: str) -> int:
        """Returns the number of a table, -1 if it is not there."""
        there = [field for field, table in zip(self._fields, self, strict=True) if table is not None]
        return there.index(name) if name in there else -1

    def gather(self, table: RankTable, rows: tf.Tensor) -> _Tables:
        """Returns rows of the tables that there are."""
        there = [place for place, of_all in enumerate(self) if of_all is not None]
        found: list[tf.Tensor | None] = [None] * len(self)
        for number, place in enumerate(there):
            found[place] = table.rows(number, rows)
        return _Tables(*found)


def _items(spec: FeatureSpec, ranker: Ranker) -> tuple[dict[str, tf.Tensor], _Tables]:
    """Returns the inputs that describe some items, and what the ranker computes of each: its tables."""
    inputs: dict[str, tf.Tensor] = {}

    def placeholder(name: str, dtype: tf.DType, *columns: int) -> tf.Tensor:
        inputs[name] = v1.placeholder(dtype, [None, *columns], name)
        return inputs[name]

    def tokens(name: str, dtype: tf.DType = tf.int32) -> Tokens:
        return Tokens(placeholder(f"{name}.values", dtype), placeholder(f"{name}.splits", tf.int64))

    fixed = [feature for feature in spec.item if feature.kind in FIXED_KINDS]
    text = tokens("text")
    features = Features(
        placeholder("codes", tf.int32, len(fixed)),
        tuple(tokens(f"feature.{f.name}", tf.float32 if f.kind == "vector" else tf.int32) for f in _lists(spec)),
    )
    numbers = placeholder("numbers", tf.float32, len(spec.numbers_of("item")))
    items = ItemFeatures(text, features)
    vectors = ranker.item_vectors(items)
    return inputs, _Tables(
        hidden=ranker.item_hidden(vectors, numbers),
        vectors=vectors,
        # Codes are small enough to be exact as float32.
        codes=tf.cast(ranker.item_codes(items), tf.float32) if ranker.has_matches else None,
        inputs=ranker.item_inputs(vectors, numbers) if ranker.has_crosses else None,
        offered=ranker.offered(vectors) if _is_fused(ranker) and _has_products(ranker, vectors) else None,
    )


def _is_fused(ranker: Ranker) -> bool:
    """Whether one op computes the layers. Stock ops take some three times as long."""
    return not ranker.has_attention and not ranker.has_crosses


def _has_products(ranker: Ranker, vectors: tf.Tensor) -> bool:
    return bool(ranker.ranker.products and vectors.shape[1])


def _rank(
    source: _Source, ranker: Ranker, tables: _Tables, widths: Sequence[int], max_items: int, assets: Path
) -> tuple[dict[str, tf.Tensor], dict[str, tf.Tensor]]:
    """Returns the inputs and outputs of the signature `rank`; `widths` are those of `source.item_tables`."""
    model, store = source.model, source.store
    config, spec = model.config.model, model.features
    # The fixed shape tells servers not to batch requests, which have any number of items.
    query = v1.placeholder(tf.string, [1], "query")
    inputs: dict[str, tf.Tensor] = {"query": query, USER_ID: absent(tf.int64, 1, USER_ID)}
    keys = request_tables.KeyTable(assets / FILE) if store.item_keys() is not None else None

    def items(ids: str, texts: str, rank: int) -> tf.Tensor:
        name = ids if keys is None else texts
        inputs[name] = absent(tf.int64 if keys is None else tf.string, rank, name)
        return inputs[name] if keys is None else keys.item_ids(inputs[name])

    item_ids = items("item_ids", "item_keys", 1)
    request = RequestInputs(model, servable_assets.describe(model, store), assets, ["user"])
    user = request.features("user", query, inputs) or Features(tf.zeros([1, 0], tf.int32), ())
    names = {kind: [number.name for number in spec.numbers_of(kind)] for kind in ("request", "pair")}
    score = tf.zeros([0])
    if DPSR_SCORE in names["pair"]:
        inputs[DPSR_SCORE] = score = absent(tf.float32, 1, DPSR_SCORE)
    of_user = {}
    for name in names["request"]:
        feature = f"{USER}{name.removeprefix('user.')}"
        if name.startswith("user."):
            of_user[name] = inputs.setdefault(feature, absent(tf.float32, 1, feature))
    table = RankTable(assets / FILE, source.features, widths)
    pairs = [name for name in names["pair"] if name != LIST_SIMILARITY]
    numbers = table.numbers(query, inputs[USER_ID], item_ids, score, of_user, names["request"], pairs, max_items)
    if source.compares:
        # choose_numbers puts it last.
        similarity = table.list_similarity(len(widths) - 1, numbers.rows)
        numbers = numbers._replace(pairs=tf.concat([numbers.pairs, similarity], 1))
    rows, types, past = None, tf.zeros([0], tf.int32), None
    if config.history_length:
        clicked = items("clicked_items", "clicked_item_keys", 2)
        inputs["clicked_item_types"] = absent(tf.string, 2, "clicked_item_types")
        rows, types = table.history(clicked, inputs["clicked_item_types"], config.history_length)
        past = tables.gather(table, rows)
    tokens = request.tokens(query)
    history = None if past is None else past.vectors
    asked = ranker.request(tokens, user, history, _splits(types), types, numbers.request, _codes(past))
    mine = tables.gather(table, numbers.rows)
    scores = ranker.logits(
        asked, mine.vectors, mine.hidden, _splits(numbers.rows), numbers.pairs, _codes(mine), mine.inputs
    )
    # An unknown item comes last, and its score tells that it is unknown.
    scores = tf.where(numbers.rows < 0, -np.inf * tf.ones_like(scores), scores)
    # The stock ops above have made the variables. They do not run if the fused op takes their place.
    fused = _fused_scores(ranker, table, tables, asked.text, user, rows, numbers) if _is_fused(ranker) else None
    return inputs, {"scores": scores if fused is None else fused}


def _fused_scores(
    ranker: Ranker,
    table: RankTable,
    tables: _Tables,
    text: tf.Tensor,
    user: Features,
    history_rows: tf.Tensor | None,
    numbers: RankNumbers,
) -> tf.Tensor | None:
    """Returns the scores by one op, or None if the ranker compares nothing of request and item."""
    config, spec = ranker.config, ranker.features
    scales = {kind: spec.numbers_of(kind) for kind in ("request", "pair")}
    products = _has_products(ranker, tables.vectors)
    if not (scales["pair"] or products or ranker.has_matches):
        return None
    fixed = [feature for feature in spec.item if feature.kind in FIXED_KINDS]
    fields = [*([config.token_dim] if ranker.ranker.texts else []), *[config.feature_dim] * len(fixed)]
    rest = int(tables.vectors.shape[1]) - sum(fields)
    variables = {variable.op.name: variable for variable in v1.trainable_variables()}

    def weight(name: str) -> tf.Tensor:
        return tf.convert_to_tensor(variables[f"ranker/{name}"])

    def layer(name: str) -> tuple[tf.Tensor, tf.Tensor]:
        return weight(f"{name}/kernel"), weight(f"{name}/bias")

    others = [part for i in range(1, len(config.hidden)) for part in layer(f"hidden_{i}")]
    vectors = ranker.feature_vectors("user", spec.user, user)
    return table.scores(
        [tables.number(name) for name in ("hidden", "vectors", "offered", "codes")],
        numbers.rows,
        history_rows,
        numbers,
        scales,
        text,
        tf.concat(vectors, 1) if vectors else tf.zeros([1, 0]),
        [*fields, rest] if rest else fields,
        HALF_LIFE,
        RankWeights(
            request=weight("hidden_0/request_kernel"),
            pair=weight("hidden_0/pair_kernel"),
            wanted=layer("wanted") if products else None,
            layers=[weight("hidden_0/bias"), *others, *layer("logit")],
        ),
    )


def _codes(tables: _Tables | None) -> tf.Tensor | None:
    return None if tables is None or tables.codes is None else tf.cast(tables.codes, tf.int32)


def _splits(values: tf.Tensor) -> tf.Tensor:
    """Returns the row splits of one list."""
    return tf.stack([tf.constant(0, tf.int64), tf.size(values, tf.int64)])


# Requests.


def rank_inputs(servable: warmup.LoadedServable, request: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the inputs of `rank` for a request, which maps names of inputs to values. Other inputs are absent."""
    kinds = servable.inputs["rank"]
    of_items = {name: kinds[name] for name in ("item_ids", "item_keys", DPSR_SCORE) if name in kinds}
    arrays = input_arrays([request], {name: kind for name, kind in kinds.items() if name not in of_items})
    for name, (dtype, _) in of_items.items():
        arrays[name] = np.array(request.get(name, ()), dtype)
    return arrays


def _requests(store: Store, names: Sequence[str], count: int) -> list[dict[str, Any]]:
    """Returns requests of the log, held-out ones if there are any, of `count` items: those shown, then others."""
    rng = np.random.default_rng(1)
    held = store.held_requests()
    file = held if held is not None and len(held["request.query"]) else store.requests()[0]
    requests = len(file["request.query"])
    user_requests, keys = UserRequests(store, names), store.item_keys()
    ids, users, found = store.items()["id"], store.users()["id"], []
    texts, text_splits = file["query_text.bytes"], file["query_text.splits"]
    for row in np.sort(rng.choice(requests, min(requests, _NUM_REQUESTS), replace=False)).tolist():
        query = int(file["request.query"][row])
        shown = file["shown.item"][file["request.splits"][row] : file["request.splits"][row + 1]]
        others = rng.integers(len(ids), size=max(0, count - len(shown)))
        items = np.concatenate([shown, others])[:count]
        # The time of the request, so that its own clicks are not in the history.
        user = User(int(users[file["request.user"][row]]), int(file["request.time"][row]))
        of_items = {"item_ids": ids[items].tolist()} if keys is None else {"item_keys": [keys[i] for i in items]}
        text = texts[text_splits[query] : text_splits[query + 1]].tobytes().decode()
        found.append({"query": text, **user_requests.of(user), **of_items})
    return found


def _finish(store: Store, manifest: dict[str, Any], out: Path) -> dict[str, Any]:
    """Replays warm-up requests and writes assets.extra. Returns the latency."""
    extra = out / "assets.extra"
    extra.mkdir()
    servable = warmup.LoadedServable(out)
    try:
        items = min(_ITEMS, manifest["max_items"])
        # Warm-up requests are no place for the ids of users.
        names = [name for name in servable.inputs["rank"] if name != USER_ID]
        requests = [rank_inputs(servable, request) for request in _requests(store, names, items)]
        of_items = "item_keys" if "item_keys" in servable.inputs["rank"] else "item_ids"
        # Lists of other lengths, an empty one too.
        shorter = [inputs | {of_items: inputs[of_items][:n]} for n, inputs in zip((0, 1, 10), requests, strict=False)]
        seconds = []
        for inputs in [*shorter, *requests, *requests]:
            start = time.perf_counter()
            _check(servable, inputs, len(inputs[of_items]))
            seconds.append(time.perf_counter() - start)
    finally:
        servable.close()
    warmup.write_warmup(extra / warmup.FILE, [("rank", inputs) for inputs in [*shorter, *requests]])
    measured: dict[str, Any] = {"requests": len(requests)}
    if requests:
        p50, p99 = np.percentile(seconds[-len(requests) :], [50, 99]) * 1000
        measured |= {"items": items, "p50_ms": round(float(p50), 4), "p99_ms": round(float(p99), 4)}
    statistics = store.statistics()
    assert statistics is not None
    manifest |= {
        "dpsr_version": __version__,
        "items": store.counts.items,
        "until": int(statistics["until"][0]),
        "measured": measured | {"hardware": f"{platform.machine()}, {os.cpu_count()} cores"},
        "files": {path.name: file_record(path) for path in sorted((out / "assets").iterdir())},
    }
    (extra / "dpsr_manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return measured


def _check(servable: warmup.LoadedServable, inputs: Mapping[str, np.ndarray], items: int) -> None:
    """Sends a request. Raises CommandError if the answer is an error, or not a number for each item."""
    try:
        scores = servable("rank", inputs)["scores"]
    except tf.errors.OpError as error:
        raise CommandError(f"the servable does not answer its warm-up requests: {op_message(error)}") from None
    if scores.shape != (items,) or not np.isfinite(scores).all():
        raise CommandError("the servable does not give a finite score for each item; train the model again")
