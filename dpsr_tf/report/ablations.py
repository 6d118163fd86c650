"""Each part of DPSR's model and of its training changed alone, on the generated shop."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from dpsr_tf.data.generate import SCHEMA
from dpsr_tf.data.shop.log import START
from dpsr_tf.data.store import Store, new_directory
from dpsr_tf.evaluation.checkpoint import exact_search
from dpsr_tf.evaluation.corpus import Corpus
from dpsr_tf.evaluation.evaluate import Options, measure_all
from dpsr_tf.evaluation.judgments import Judgments
from dpsr_tf.report.lab import Made, Result
from dpsr_tf.report.shop import Shop, Size

# On a store of its own: the tokenizer, and the log with human labels.
TRIGRAMS: dict[str, dict[str, Any]] = {"with": {}, "off": {}}
SUPERVISION: dict[str, dict[str, Any]] = {
    "none": {},
    "positives only": {},
    "joined to the random ones": {"train.num_supervised_negatives": 32},
    "own query only": {"train.num_own_negatives": 4, "train.own_negatives": "supervised"},
}


def groups_of(size: Size) -> dict[str, dict[str, dict[str, Any]]]:
    """Group -> what a variant is called -> what it changes; the first of each is DPSR as Table 2 has it."""
    half = {"train.num_title_queries": size.batch_size // 2}
    begin = {"train.pretrain_steps": max(1, size.steps // 5)}
    return {
        "layers": {"linear": {}, "ReLU of 256 and 128": {"model.hidden": [256, 128]}},
        "heads": {"2": {}, "1": {"model.num_heads": 1}, "4": {"model.num_heads": 4}},
        "beta": {"0.1": {}, **{f"{beta:g}": {"model.temperature": beta} for beta in (0.0, 0.02, 0.5)}},
        "alpha": {"0.5": {}, **{f"{alpha:g}": {"train.mixing_ratio": alpha} for alpha in (0.0, 0.25, 0.75, 1.0)}},
        "margin": {"0.1": {}, **{f"{margin:g}": {"train.margin": margin} for margin in (0.03, 0.3, 0.6)}},
        "negatives": {
            "64 random, all count": {},
            "16 random": {"train.num_random_negatives": 16},
            "512 random": {"train.num_random_negatives": 512},
            "the hardest 16 count": {"train.num_hard_negatives": 16},
            "softmax": {"train.loss": "softmax"},
            "softmax, log Q": {"train.loss": "softmax", "train.log_q_correction": True},
            "with 4 unclicked": {"train.num_own_negatives": 4},
        },
        "pre-training": {"none": {}, "half of each batch titles": half, "first a fifth of titles only": half | begin},
        "text table": {"shared": {}, "one each": {"model.share_text_table": False}},
        "item features": {"all": {}, "title only": {"model.item_features": []}},
        "letter trigrams": TRIGRAMS,
        "supervision": SUPERVISION,
    }


def ablate(shop: Shop) -> Result:
    """Each part of the model and of the training changed alone: group -> what `dpsr evaluate` says of its variants."""
    lab = shop.lab
    wanted: dict[str, tuple[str, Mapping[str, Any], Made | None]] = {"base": ("base", {}, None)}
    plain = {**SCHEMA, "tokenizer": {"letter_trigrams": False}}
    stores = {
        "letter trigrams": lab.store(shop.named("store-words"), shop.made, plain),
        "supervision": _supervised_store(shop),
    }
    groups = groups_of(shop.size)
    for group, variants in groups.items():
        for number, (variant, changes) in enumerate(variants.items()):
            if number:
                wanted[f"{group}: {variant}"] = (f"{group}: {variant}", changes, stores.get(group))

    def train(label: str, changes: Mapping[str, Any], store: Made | None) -> Made:
        name = "DPSR" if label == "base" else re.sub(r"[^\w.]+", "-", label)
        return shop.model(name, "dpsr", changes, store)

    models = lab.together({label: functools.partial(train, *one) for label, one in wanted.items()})
    found: Result = {}
    for group, variants in groups.items():
        found[group] = _ablation(shop, group, list(variants), models, stores.get(group))
    return found


def _ablation(
    shop: Shop, group: str, variants: Sequence[str], models: Mapping[str, Made], store: Made | None
) -> Result:
    """Figures of each variant, and their differences from the first with intervals over the same queries.

    A model is asked through the store that it was trained on, so this is no one command.
    """
    labels = {variant: models[f"{group}: {variant}" if number else "base"] for number, variant in enumerate(variants)}

    def compute() -> Result:
        searches = {
            variant: exact_search(model.path, Store((store or shop.store).path) if number else shop.opened)
            for number, (variant, model) in enumerate(labels.items())
        }
        corpus = Corpus.of_store(shop.opened)
        options = Options(seed=shop.seed, latency_queries=0)
        files = {"unseen": "judgments.test.tsv", "purchases": "judgments.personal.tsv"}
        found: Result = {}
        for name, file in files.items():
            users = ("user_id", "time") if name == "purchases" else ("", "")
            judgments = Judgments.read(shop.made.path / file, "query", "item", "grade", 1.0, *users, ["kind"])
            found[name] = measure_all(searches, judgments, corpus, options, compare=True)
        return found

    return shop.computed(f"ablation-{group}".replace(" ", "-"), labels, compute)


def _supervised_store(shop: Shop) -> Made:
    """The store of the log with the labels of humans: grade 3 is positive, 0 and 1 are negative, 2 is neither."""
    lab = shop.lab
    definition = {"labelled": shop.made.digest}
    path = lab.out / "work" / f"{shop.named('labelled')}-{shop.made.digest}"

    def compute() -> Result:
        with new_directory(path, True, "shop", "log.parquet") as out:
            for name in ("items", "users"):
                (out / f"{name}.parquet").symlink_to((shop.made.path / f"{name}.parquet").resolve())
            log = pyarrow.parquet.read_table(shop.made.path / "interactions")
            clicked = pa.compute.is_in(log["event"], pa.array(["click", "cart", "order"]))
            log = log.append_column("grade", pa.compute.if_else(clicked, 3, 2))
            labels = pyarrow.parquet.read_table(shop.made.path / "labels.parquet").to_pydict()
            count = len(labels["query"])
            values: dict[str, Any] = {
                "query": labels["query"],
                "item_id": labels["item"],
                "event": ["click"] * count,
                "time": [START] * count,
                "grade": labels["grade"],
            }
            columns = [
                pa.array(values[field.name], field.type) if field.name in values else pa.nulls(count, field.type)
                for field in log.schema
            ]
            pyarrow.parquet.write_table(
                pa.concat_tables([log, pa.table(columns, schema=log.schema)]), out / "log.parquet"
            )
        return {"labels": count}

    lab.result(shop.named("labelled"), definition, compute)
    interactions = {**SCHEMA["interactions"], "files": "log.parquet", "label": "grade"}
    schema = {**SCHEMA, "interactions": {**interactions, "positive_from": 3, "negative_to": 1}}
    return lab.store(shop.named("store-supervised"), Made(path, shop.made.digest), schema)
