"""Small shops, trained, indexed and exported once for all tests of this folder."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranking_shops import ranking_store

from dpsr_common.command_line import main
from dpsr_tf.data.store import Store


@dataclasses.dataclass(frozen=True)
class Job:
    """The output directories of the stages."""

    store: Path
    model: Path
    index: Path
    servable: Path


def dpsr(*arguments: object) -> None:
    """Runs a command that has to succeed."""
    assert main([str(argument) for argument in arguments]) == 0, arguments


SMALL = ["train.steps=30", "train.batch_size=32", "model.embedding_dim=16", "model.token_dim=16", "serving.k=7"]


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A generated shop of 400 items, 30 training steps, a Flat index, servable version 1."""
    root = tmp_path_factory.mktemp("job")
    result = Job(root / "store", root / "model", root / "index", root / "servable")
    dpsr("generate", f"--out={root / 'shop'}", "--items=400", "--users=20", "--interactions=2000")
    dpsr("ingest", f"--schema={root / 'shop' / 'schema.yaml'}", f"--out={result.store}")
    _train_to_servable(result, SMALL)
    return result


@pytest.fixture(scope="session")
def personal(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """DPSR-h on the same store: two heads, the user's profile, items and queries, averaged weights; version 1."""
    root = tmp_path_factory.mktemp("personal")
    result = Job(job.store, root / "model", root / "index", root / "servable")
    towers = ["num_heads=2", "history_length=4", "query_history_length=3"]
    average = ["train.average_decay=0.9"]
    features = ['model.user_features=["*"]', 'model.item_features=["*"]']
    _train_to_servable(result, [*SMALL, *average, *features, *(f"model.{setting}" for setting in towers)])
    return result


def _train_to_servable(job: Job, settings: list[str]) -> None:
    dpsr("train", f"--store={job.store}", f"--out={job.model}", *(f"--set={setting}" for setting in settings))
    dpsr("index", f"--model={job.model}", f"--store={job.store}", f"--out={job.index}")
    dpsr("export", f"--model={job.model}", f"--index={job.index}", f"--out={job.servable}")


@dataclasses.dataclass(frozen=True)
class TextShop:
    """A shop with text ids and features of every kind, a model of random weights, and its servable, version 1.

    Attributes:
        items, users: raw rows by id.
        events: of each user, oldest first: time, query, item, type.
    """

    job: Job
    items: dict[str, dict[str, Any]]
    users: dict[str, dict[str, Any]]
    events: dict[str, list[tuple[int, str, str, str]]]


_WORDS = ["red", "blue", "shoes", "phone", "case", "手机", "苹果", "running", "kids", "leather", "usb", "cable"]
_TAGS = ["new", "sale", "夏季", "eco"]


@pytest.fixture(scope="session")
def text_shop(tmp_path_factory: pytest.TempPathFactory) -> TextShop:
    """50 items and 8 users; some values are missing, rare or odd."""
    rng, of_vectors = np.random.default_rng(3), np.random.default_rng(4)

    def vector(length: int) -> list[float]:
        return [round(float(value), 3) for value in of_vectors.normal(size=length)]

    def words(count: int) -> str:
        return " ".join(rng.choice(_WORDS, count))

    items = {
        f"sku-{i}{'款' if i % 5 == 0 else ''}": {
            "title": words(4),
            "brand": rng.choice(["Acme", "阿克梅", "", "B|C"]),
            "price": None if i % 9 == 0 else round(float(rng.uniform(0, 100)), 2),
            "tags": rng.choice(_TAGS, rng.integers(0, 4)).tolist(),
            "details": "" if i % 7 == 0 else words(3),
            "photo": None if i % 6 == 0 else vector(5),
        }
        for i in range(50)
    }
    users = {
        f"u{i}": {
            "gender": ["f", "m", ""][i % 3],
            "age": None if i == 4 else 15.5 + 9 * i,
            "interests": rng.choice(_TAGS, i % 4).tolist(),
            "about": "" if i == 5 else words(2),
            "taste": None if i == 6 else vector(3),
        }
        for i in range(8)
    }
    events: dict[str, list[tuple[int, str, str, str]]] = {user: [] for user in users}
    for time in range(1000, 1120):
        user, kind = f"u{rng.integers(0, 7)}", str(rng.choice(["click", "cart", "order"]))
        query = events[user][-1][1] if events[user] and rng.random() < 0.4 else words(2)
        events[user].append((time, query, str(rng.choice(list(items))), kind))
    root = tmp_path_factory.mktemp("text_shop")
    rows = {
        "items": [{"item": key, **row} for key, row in items.items()],
        "users": [{"user": key, **row} for key, row in users.items()],
        "log": [
            {"user": user, "time": time, "query": query, "item": item, "type": kind}
            for user, history in events.items()
            for time, query, item, kind in history
        ],
    }
    for name, table in rows.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
        (root / f"{name}.jsonl").write_text(lines)
    (root / "schema.yaml").write_text(
        """
items:
  files: items.jsonl
  id: item
  text: title
  features:
    - brand
    - {column: details, kind: text, vocabulary: words}
    - {column: tags, kind: multi}
    - {column: photo, kind: vector, length: 5}
    - {column: price, kind: number, boundaries: [10, 33.3, 70.1]}
  filters: [brand, {column: price, kind: number}, {column: tags, kind: multi}]
users:
  files: users.jsonl
  id: user
  features:
    - {column: about, kind: text, vocabulary: words}
    - {column: taste, kind: vector, length: 3}
    - gender
    - {column: interests, kind: multi}
    - {column: age, kind: number, boundaries: [24.5, 42.5]}
interactions: {files: log.jsonl, query: query, item: item, user: user, time: time, type: type}
vocabularies: {words: {tokenizer: {letter_trigrams: false}}}
"""
    )
    job = Job(root / "store", root / "model", root / "index", root / "servable")
    dpsr("ingest", f"--schema={root / 'schema.yaml'}", f"--out={job.store}")
    untrained_model(job, hidden=(8,), num_heads=2, history_length=3, query_history_length=2)
    dpsr("index", f"--model={job.model}", f"--store={job.store}", f"--out={job.index}")
    dpsr("export", f"--model={job.model}", f"--index={job.index}", f"--out={job.servable}")
    return TextShop(job, items, users, events)


def untrained_model(job: Job, **model: Any) -> None:
    """A model directory with a checkpoint of random weights, which reads all features of the store unless told."""
    import tensorflow as tf

    from dpsr_tf.config import Config, ModelConfig, ServingConfig
    from dpsr_tf.data.store import Store
    from dpsr_tf.models.encoders import StoreTables
    from dpsr_tf.models.model_directory import ModelDirectory
    from dpsr_tf.models.two_tower import TwoTower

    store = Store(job.store)
    every: dict[str, Any] = {"user_features": ("*",), "item_features": ("*",)}
    towers = ModelConfig(token_dim=8, embedding_dim=6, feature_dim=4, **(every | model))
    directory = ModelDirectory.create_or_resume(job.model, Config(model=towers, serving=ServingConfig(k=5)), store)
    tables = StoreTables(directory, store)

    def placeholders(features: Any) -> Any:
        return tf.nest.map_structure(
            lambda a: None if a is None else tf.compat.v1.placeholder(a.dtype, [None, *a.shape[1:]]), features
        )

    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.compat.v1.set_random_seed(1)
        both = TwoTower(directory.config.model, tables.spec)
        both.query_embedding(placeholders(tables.queries(["red"], None)))
        both.item_embedding(placeholders(tables.items(np.arange(2))))
        session.run(tf.compat.v1.global_variables_initializer())
        # Biases of zero would hide what an absent value does.
        session.run([v.assign_add(tf.fill(v.shape, 0.1)) for v in tf.compat.v1.global_variables() if "bias" in v.name])
        tf.compat.v1.train.Saver().save(session, str(job.model / "model.ckpt"), global_step=7)


@pytest.fixture(scope="session")
def ranking_shop_of_texts(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with requests of 60 items, with text ids, attributes and prices."""
    return ranking_store(tmp_path_factory.mktemp("ranking_shop"), text_ids=True)


@pytest.fixture(scope="session")
def ranking_shop_of_numbers(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The same items with numeric ids, and `ranking: {}`."""
    return ranking_store(tmp_path_factory.mktemp("ranking_shop"), text_ids=False)


@pytest.fixture(scope="module", params=["texts", "numbers"])
def ranking_shop(request: pytest.FixtureRequest) -> Store:
    """Both shops, one after the other."""
    store: Store = request.getfixturevalue(f"ranking_shop_of_{request.param}")
    return store


def runs(values: list[Any]) -> list[Any]:
    """Drops repeats of equal values in a row."""
    return [value for value, _ in itertools.groupby(values)]
