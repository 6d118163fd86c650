"""A small shop with requests, and rankers of random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dpsr_common.command_line import main
from dpsr_common.typed_config import from_dict
from dpsr_tf.data.store import Store

WORDS = [
    "drill", "12mm", "ab300", "acme", "bolt", "tools", "red", "Ünïcode", "straße", "手机", "红色", "٣٤", "½", "Ⅻ",
    "ไทย", "한국어", "x²", "3.5mm", "1,000", "e\u0301", "shoes",
]  # fmt: skip
BRANDS = ["Acme", "Bolt Tools", "手机", "Tools", "bolt bolt", "!!!", None]
TAGS = ["new", "sale", "夏季"]
QUERIES = [
    "", "   ", "unknown words only", "drill drill drill", "acme drill 12MM", "bolt tools red", "手机 红色手机",
    " acme drill 12MM\u3000", "straße x² 12 mm", "ÿ", "٣٤ ½ ⅻ", "😀", "shoes\x00 1,000",
]  # fmt: skip
_START, _DAY = 1_700_000_000, 86_400


def ranking_store(folder: Path, text_ids: bool, seed: int = 5, like: Path | None = None) -> Store:
    """Ingests a shop of 60 items in several scripts, some without a title, a brand or a price.

    Args:
        folder: an existing directory.
        text_ids: whether ids are texts, and whether the schema has attributes, brand and price.
        seed: of the log. The items are always the same, but for the price.
        like: a model whose codes the store gets.
    """
    rng, log_rng = np.random.default_rng(5), np.random.default_rng(seed)

    def words(count: int, rng: np.random.Generator = rng) -> str:
        return " ".join(rng.choice(WORDS, count))

    def id_of(number: int) -> str | int:
        return f"sku-{number}" if text_ids else number * 3

    items = [
        {
            "item": id_of(i),
            "title": words(int(rng.integers(0, 7))),
            "detail": words(int(rng.integers(0, 12))),
            "brand": BRANDS[rng.integers(len(BRANDS))],
            "price": None if i % 7 == 0 else round(float(rng.uniform(1, 90)) + seed, 2),
            "tags": rng.choice(TAGS, rng.integers(0, 3)).tolist(),
            "photo": None if i % 6 == 0 else rng.normal(size=3).round(3).tolist(),
        }
        for i in range(60)
    ]
    users = [
        {"user": f"u{i}", "gender": ["f", "m", None][i % 3], "age": None if i == 4 else 15.5 + 9 * i, "likes": TAGS[:i]}
        for i in range(1, 6)
    ]
    asked = [text for text in QUERIES if text.strip()] + [words(2, log_rng) for _ in range(20)]
    log = [
        {
            "query": query,
            "item": id_of(int(item)),
            "user": user,
            "type": str(log_rng.choice(["impression", "click", "cart", "order"], p=[0.5, 0.2, 0.1, 0.2])),
            "time": time,
        }
        for query, user, time in zip(
            log_rng.choice(asked, 600),
            log_rng.choice(np.array(["u1", "u2", "u3", "u4", None], object), 600),
            (_START + log_rng.integers(40 * _DAY, size=600)).tolist(),
            strict=True,
        )
        for item in log_rng.choice(60, 5, replace=False)
    ]
    schema = {
        "items": {
            "files": "items.jsonl",
            "id": "item",
            "text": ["title", "detail"],
            "features": [
                "brand",
                {"column": "price", "kind": "number", "boundaries": [10, 50]},
                {"column": "tags", "kind": "multi"},
                {"column": "detail", "name": "words", "kind": "text"},
                {"column": "photo", "kind": "vector", "length": 3},
            ],
        },
        "users": {
            "files": "users.jsonl",
            "id": "user",
            "features": [
                "gender",
                {"column": "age", "kind": "number", "boundaries": [30]},
                {"column": "likes", "kind": "multi"},
            ],
        },
        "interactions": {
            "files": "log.jsonl", "query": "query", "item": "item", "user": "user", "type": "type", "time": "time",
            "held_out": {"last_days": 3},
        },
        "ranking": {"attributes": ["brand"], "brand": "brand", "price": "price"} if text_ids else {},
    }  # fmt: skip
    for name, rows in (("items", items), ("users", users), ("log", log)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
    more = [] if like is None else [f"--like={like}"]
    assert main(["ingest", f"--schema={folder / 'schema.yaml'}", f"--out={folder / 'store'}", *more]) == 0
    return Store(folder / "store")


def untrained_towers(path: Path, store: Store) -> None:
    """Makes a model directory with a checkpoint of random weights of a retrieval model."""
    import tensorflow as tf

    from dpsr_tf.config import Config
    from dpsr_tf.models.encoders import StoreTables, placeholder
    from dpsr_tf.models.model_directory import ModelDirectory
    from dpsr_tf.models.two_tower import TwoTower

    config = from_dict(Config, {"model": {"token_dim": 6, "embedding_dim": 5, "hidden": []}}, "test")
    directory = ModelDirectory.create_or_resume(path, config, store)
    tables = StoreTables(directory, store)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.compat.v1.set_random_seed(2)
        towers = TwoTower(config.model, tables.spec)
        towers.query_embedding(tf.nest.map_structure(placeholder, tables.queries(["red"], None)))
        towers.item_embedding(tf.nest.map_structure(placeholder, tables.items(np.arange(2))))
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, str(path / "model.ckpt"), global_step=3)


def untrained_ranker(path: Path, store: Store, towers: Path | None = None, **sections: dict[str, Any]) -> None:
    """Makes a model directory with a checkpoint of random weights of a ranker that reads all numbers and features.

    If there are `towers`, the ranker reads their numbers too.
    """
    import tensorflow as tf

    from dpsr_tf.config import Config
    from dpsr_tf.data.ranking_features import RankingFeatures
    from dpsr_tf.models.encoders import placeholder
    from dpsr_tf.models.model_directory import ModelDirectory
    from dpsr_tf.models.ranker import Ranker
    from dpsr_tf.models.ranker_inputs import RankerInputs, choose_numbers, dpsr_scorer, model_numbers

    model = {
        "kind": "ranker", "token_dim": 6, "feature_dim": 4, "hidden": [16, 8, 4], "item_features": ["*"],
        "user_features": ["*"], "history_length": 5,
    } | sections.pop("model", {})  # fmt: skip
    if towers is not None:
        sections["ranker"] = sections.get("ranker", {}) | {"dpsr_model": str(towers), "list_similarity": True}
    config = from_dict(Config, {"model": model, **sections}, "test")
    features = RankingFeatures(store)
    (file,) = store.requests()
    shown = features.of(file, np.arange(200))
    if towers is not None:
        shown = dpsr_scorer(str(towers), store)(shown)
    numbers, _ = choose_numbers(features, shown, model_numbers(config.ranker))
    numbers = numbers if config.ranker.numbers else ()
    directory = ModelDirectory.create_or_resume(path, config, store, lambda: numbers)
    lists = RankerInputs(store, directory.features, config.model.history_length)(shown)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.compat.v1.set_random_seed(1)
        Ranker(config, directory.features).scores(tf.nest.map_structure(placeholder, lists))
        session.run(tf.compat.v1.global_variables_initializer())
        # Biases of zero would hide what an absent value does. Larger weights tell scores apart.
        for variable in tf.compat.v1.global_variables():
            more = tf.fill(variable.shape, 0.1) if "bias" in variable.name else variable * 0.5
            session.run(variable.assign_add(more))
        if config.train.average_decay:
            average = tf.train.ExponentialMovingAverage(0.5)
            step = average.apply(tf.compat.v1.trainable_variables())
            session.run(tf.compat.v1.global_variables_initializer())
            session.run(step)
        tf.compat.v1.train.Saver().save(session, str(path / "model.ckpt"), global_step=7)
