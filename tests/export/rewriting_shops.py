"""A small shop with words in their order, and rewriters of random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dpsr_common.command_line import main
from dpsr_common.typed_config import from_dict
from dpsr_tf.config import Config
from dpsr_tf.data.store import Store
from dpsr_tf.models.model_directory import ModelDirectory

WORDS = ["red", "blue", "drill", "bit", "12mm", "acme", "shoes", "手机", "红色", "straße", "cordless", "power", "kit"]


def rewriting_store(folder: Path, seed: int = 1) -> Store:
    """Ingests 40 items and a log of 30 queries; `seed` is that of the log. Makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    of_items, rng = np.random.default_rng(1), np.random.default_rng(seed)
    items = [{"item": i, "title": " ".join(of_items.choice(WORDS, 4)), "brand": "Acme"} for i in range(40)]
    queries = [" ".join(rng.choice(WORDS, rng.integers(1, 4))) for _ in range(30)]
    log = [{"query": query, "item": int(item)} for query in queries for item in rng.choice(40, 5)]
    for name, rows in (("items", items), ("log", log)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    schema: dict[str, Any] = {
        "items": {"files": "items.jsonl", "id": "item", "text": ["title"], "filters": ["brand"]},
        "interactions": {"files": "log.jsonl", "query": "query", "item": "item"},
        "vocabulary": {"min_count": 1},
        "rewriting": {"min_count": 1, "max_query_words": 6, "max_title_words": 8},
    }
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
    assert main(["ingest", f"--schema={folder / 'schema.yaml'}", f"--out={folder / 'store'}"]) == 0
    return Store(folder / "store")


def untrained_rewriter(folder: Path, store: Store, seed: int = 1, **rewriter: Any) -> ModelDirectory:
    """Makes a model directory with a checkpoint of random weights."""
    import tensorflow as tf

    from dpsr_tf.models.rewriter_texts import RewriteGraph

    v1 = tf.compat.v1
    small = {"heads": 2, "inner_width": 16, "max_words": 5, **rewriter}
    sections = {"model": {"kind": "rewriter", "token_dim": 16}, "rewriter": small}
    model = ModelDirectory.create_or_resume(folder, from_dict(Config, sections, "config"), store)
    with tf.Graph().as_default(), v1.Session() as session:
        v1.set_random_seed(seed)
        RewriteGraph(model)(tf.constant(["red"]), 3, tf.constant(0, tf.int64))
        session.run(v1.global_variables_initializer())
        # The first weights make all words alike.
        rng = np.random.default_rng(seed)
        for variable in v1.global_variables():
            variable.load(rng.normal(0, 0.5, variable.shape).astype(np.float32), session)
        v1.train.Saver().save(session, str(folder / "model.ckpt"), global_step=7)
    return model
