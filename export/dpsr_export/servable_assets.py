"""The files from the store that a servable needs besides the index. `dpsr index` writes them to the index directory.

items.dpsr            if the model reads histories: ids, texts and features of the items; if item ids are texts: keys
feature_values.dpsr   if the model reads features: the value of each code
vocabulary-NAME.dpsr  the vocabulary of text features that do not use the one of query and item text
query_graph.dpsr      if the model reads the click graph: what it adds to queries of the log (query_table.py)
requests.json         queries of the log with the features of the users who asked, for warm-up

index.json lists these files, and the kinds of the features.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpsr_common.errors import CommandError
from dpsr_common.packed_file import PackedFileWriter
from dpsr_export import query_table
from dpsr_tf.data.column_files import string_bytes
from dpsr_tf.data.column_values import ids_of
from dpsr_tf.data.id_index import id_index
from dpsr_tf.data.schema import VALUE_KINDS
from dpsr_tf.data.store import Store, unpack_strings, vocabulary_name
from dpsr_tf.data.user_requests import User, UserRequests
from dpsr_tf.models.model_directory import ModelDirectory

ITEMS, FEATURE_VALUES, REQUESTS = "items.dpsr", "feature_values.dpsr", "requests.json"
# Number of requests that are kept for warm-up and for the measurements of `dpsr export`.
NUM_REQUESTS = 100


def write_assets(
    model: ModelDirectory,
    store: Store,
    checkpoint: str,
    texts: Sequence[str],
    users: Sequence[User],
    directory: Path,
    graph_queries: int,
) -> dict[str, Any]:
    """Writes the files that the model needs to an index directory.

    Args:
        model: the model, which says what its towers read.
        store: the store that the model was trained on.
        checkpoint: path of the weights.
        texts: queries of the log.
        users: the user who asked each query.
        directory: the index directory.
        graph_queries: largest number of queries in the table of the click graph.

    Returns:
        Entries for index.json: `serving_files`, names of the files except requests.json; `string_ids`, whether the
        shop's item ids are texts; `features`, kind, boundaries and vocabulary of the features that the towers read;
        `graph`, what query_table.write says, or None for a model without a graph.
    """
    config, spec = model.config.model, model.features
    files = []
    items = store.items()
    string_ids = "key.splits" in items
    if config.history_length or string_ids:
        sections = ["id", "id_index.splits", "id_index.rows"]
        if config.history_length:
            names = [f"feature.{feature.name}" for feature in spec.item]
            wanted = ("tokens", *names)
            parts = [part for name in wanted for part in (name, f"{name}.splits", f"{name}.values")]
            # These tell how many values a feature has, so that its codes can be checked.
            parts += [f"values.{feature.name}.splits" for feature in spec.item]
            sections += [name for name in parts if name in items]
        if string_ids:
            sections += ["key.splits", "key.bytes"]
        with PackedFileWriter(str(directory / ITEMS), "items") as file:
            for name in sections:
                file.add(name, items[name])
        files.append(ITEMS)
    files += write_feature_files(model, store, directory)
    graph = None
    if config.graph_fan_out:
        graph = query_table.write(model, store, checkpoint, graph_queries, directory / query_table.FILE)
        files.append(query_table.FILE)
    _write_requests(model, store, texts, users, directory / REQUESTS)
    return {"serving_files": files, "string_ids": string_ids, "graph": graph, "features": describe(model, store)}


def describe(model: ModelDirectory, store: Store) -> dict[str, list[dict[str, Any]]]:
    """Returns kind, boundaries and vocabulary of the features that a model reads, by side, "user" or "item"."""
    spec = model.features
    stored = {
        side: {feature.name: feature for feature in of_side}
        for side, of_side in (("user", store.features.users), ("item", store.features.items))
    }
    return {
        side: [
            {
                "name": feature.name,
                "kind": feature.kind,
                "boundaries": list(stored[side][feature.name].boundaries),
                "vocabulary": feature.vocabulary,
            }
            for feature in chosen
        ]
        for side, chosen in (("user", spec.user), ("item", spec.item))
    }


def write_feature_files(
    model: ModelDirectory, store: Store, directory: Path, sides: Sequence[str] = ("user", "item")
) -> list[str]:
    """Writes feature_values.dpsr and vocabularies for the features of some sides. Returns the names of the files."""
    features = [feature for side in sides for feature in getattr(model.features, side)]
    files = []
    if features:
        _write_feature_values(model, store, directory / FEATURE_VALUES, sides)
        files.append(FEATURE_VALUES)
    for vocabulary in dict.fromkeys(feature.vocabulary for feature in features):
        if vocabulary is not None:
            name = vocabulary_name(vocabulary)
            shutil.copyfile(store.path / name, directory / name)
            files.append(name)
    return files


def _write_feature_values(model: ModelDirectory, store: Store, path: Path, sides: Sequence[str]) -> None:
    """Writes a key table with the code of each value of each feature that the model reads.

    Its keys are "SIDE\\0NAME\\0VALUE".
    """
    keys: list[str] = []
    codes: list[np.ndarray] = []
    for side in sides:
        table = store.users() if side == "user" else store.items()
        for feature in getattr(model.features, side):
            if feature.kind in VALUE_KINDS:
                values = unpack_strings(table, f"values.{feature.name}")
                keys += [f"{side}\0{feature.name}\0{value}" for value in values]
                codes.append(np.arange(1, len(values) + 1, dtype=np.int32))
    texts = pa.array(keys, pa.large_string())
    ids = ids_of(texts, string_ids=True).values if keys else np.zeros(0, np.int64)
    if len(np.unique(ids)) < len(ids):
        raise CommandError(f"{store.path}: two feature values have the same 63-bit hash; rename one of the features")
    data, splits = string_bytes(texts)
    bucket_splits, rows = id_index(ids)
    with PackedFileWriter(str(path), "keys") as file:
        file.add("id", ids)
        file.add("id_index.splits", bucket_splits)
        file.add("id_index.rows", rows)
        file.add("key.splits", splits)
        file.add("key.bytes", data)
        file.add("code", np.concatenate(codes) if codes else np.zeros(0, np.int32))


def _write_requests(
    model: ModelDirectory, store: Store, texts: Sequence[str], users: Sequence[User], path: Path
) -> None:
    config = model.config.model
    # The store does not keep the texts of text features, so requests leave them out.
    names = [f"user_{feature.name}" for feature in model.features.user if feature.kind != "text"]
    if config.history_length:
        names += ["clicked_item_keys" if store.item_keys() is not None else "clicked_items", "clicked_item_types"]
    if config.query_history_length:
        names.append("past_queries")
    user_requests = UserRequests(store, names)
    requests = []
    for text, user in list(zip(texts, users, strict=True))[:NUM_REQUESTS]:
        values = user_requests.of(user)
        for name, longest in (
            ("clicked_items", config.history_length),
            ("clicked_item_keys", config.history_length),
            ("clicked_item_types", config.history_length),
            ("past_queries", config.query_history_length),
        ):
            if name in values:
                values[name] = values[name][-longest:]
        requests.append({"query": text, **values})
    path.write_text(json.dumps(requests, ensure_ascii=False) + "\n")
