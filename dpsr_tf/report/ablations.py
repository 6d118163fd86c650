"""Ablations: variants of DPSR that change one part of the model or of the training, on the generated shop."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from dpsr_tf.data.store import Store, new_directory
from dpsr_tf.evaluation.corpus import Corpus
from dpsr_tf.evaluation.judgments import Judgments
from dpsr_tf.evaluation.measure import Options, measure_all
from dpsr_tf.models.encoders import exact_search
from dpsr_tf.report.runner import Artifact, Result
from dpsr_tf.report.shop import SCHEMA, TRAINING, Shop, Size

# These groups need a store of their own: with another tokenizer, with human labels in the log, with mined negatives.
TRIGRAMS: dict[str, dict[str, Any]] = {"with": {}, "off": {}}
SUPERVISION: dict[str, dict[str, Any]] = {
    "none": {},
    "positives only": {},
    "added to the random negatives": {"train.num_supervised_negatives": 32},
    "for their own query only": {"train.own_negative_source": "both", "train.num_own_negatives": 8},
}
MINED: dict[str, dict[str, Any]] = {
    "none": {},
    "added to the random negatives": {"train.num_supervised_negatives": 32},
    "for their own query only": {"train.own_negative_source": "both", "train.num_own_negatives": 8},
}
RELU: dict[str, Any] = {"model.hidden": [256, 128]}
RANDOM_START: dict[str, Any] = {"model.aligned_start": False}
# The loss of the paper, section 4.3.
HINGE: dict[str, Any] = {"train.loss": "hinge", "train.log_q_correction": False}
PAPER: dict[str, Any] = {**HINGE, "train.num_random_negatives": 64, "train.num_own_negatives": 0}


def groups_of(size: Size) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns group -> variant -> changes of the config. A variant without changes is DPSR as in Table 2."""
    half = {"train.num_title_queries": size.batch_size // 2}
    titles_first = {"train.pretrain_steps": max(1, size.steps // 5)}
    return {
        "loss": {
            "softmax, log Q": {},
            "softmax": {"train.log_q_correction": False},
            "hinge": HINGE,
            "as in the paper: hinge, 64 random negatives": PAPER,
        },
        "negatives": {
            "512 random, 4 unclicked": {},
            "64 random, 4 unclicked": {"train.num_random_negatives": 64},
            "512 random": {"train.num_own_negatives": 0},
        },
        "layers": {"linear": {}, "ReLU of 256 and 128": RELU},
        "start": {"aligned": {}, "random": RANDOM_START, "random, ReLU of 256 and 128": {**RANDOM_START, **RELU}},
        "heads": {"2": {}, "1": {"model.num_heads": 1}, "4": {"model.num_heads": 4}},
        "beta": {"0.1": {}, **{f"{beta:g}": {"model.temperature": beta} for beta in (0.0, 0.02, 0.5)}},
        "alpha": {"0.5": {}, **{f"{alpha:g}": {"train.mixing_ratio": alpha} for alpha in (0.0, 0.25, 0.75, 1.0)}},
        "margin, with the paper's loss": {
            f"{margin:g}": {**PAPER, "train.margin": margin} for margin in (0.1, 0.03, 0.3, 0.6)
        },
        "hardest negatives, with the paper's loss": {
            "all": PAPER,
            "the hardest 16": {**PAPER, "train.num_hard_negatives": 16},
        },
        "pre-training": {
            "none": {},
            "half of the queries from titles": half,
            "half of the queries from titles, in the first fifth of the steps all": half | titles_first,
        },
        "text table": {"shared": {}, "one per tower": {"model.share_text_table": False}},
        "item features": {"all": {}, "title only": {"model.item_features": []}},
        "letter trigrams": TRIGRAMS,
        "supervision": SUPERVISION,
        "mined negatives": MINED,
    }


def ablate(shop: Shop) -> Result:
    """Trains and measures all variants. Returns group -> figures as in the JSON object of `dpsr evaluate`."""
    runner = shop.runner
    wanted: dict[str, tuple[str, Mapping[str, Any], Artifact | None]] = {}
    plain = {**SCHEMA, "tokenizer": {"letter_trigrams": False}}
    mined = {**SCHEMA, "interactions": {**SCHEMA["interactions"], "mined_negatives": 20}}
    stores = {
        "letter trigrams": runner.store(shop.experiment_name("store-words"), shop.directory, plain),
        "supervision": _supervised_store(shop),
        "mined negatives": runner.store(shop.experiment_name("store-mined"), shop.directory, mined),
    }
    groups = groups_of(shop.size)
    for group, variants in groups.items():
        for number, (variant, changes) in enumerate(variants.items()):
            label = _label(group, variant, number, changes)
            wanted[label] = (label, changes, stores.get(group) if number else None)

    def train(label: str, changes: Mapping[str, Any], store: Artifact | None) -> Artifact:
        name = "DPSR" if label == "base" else re.sub(r"[^\w.]+", "-", label)
        return shop.model(name, "dpsr", {**TRAINING, **changes}, store)

    models = runner.run_together({label: functools.partial(train, *one) for label, one in wanted.items()})
    found: Result = {}
    for group, variants in groups.items():
        labels = {
            variant: models[_label(group, variant, number, changes)]
            for number, (variant, changes) in enumerate(variants.items())
        }
        found[group] = _ablation(shop, group, labels, stores.get(group))
    return found


def _label(group: str, variant: str, number: int, changes: Mapping[str, Any]) -> str:
    """Returns the name of a variant's model. The first variant of a group without changes is the model of Table 2."""
    return f"{group}: {variant}" if number or changes else "base"


def _ablation(shop: Shop, group: str, labels: Mapping[str, Artifact], store: Artifact | None) -> Result:
    """Measures the variants of a group, and their differences from the first variant over the same queries.

    `dpsr evaluate` has one store for all systems, but here each model needs the store that it was trained on.
    """

    def compute() -> Result:
        searches = {
            variant: exact_search(model.path, Store((store or shop.store).path) if number else shop.opened_store)
            for number, (variant, model) in enumerate(labels.items())
        }
        corpus = Corpus.of_store(shop.opened_store)
        options = Options(seed=shop.seed, latency_queries=0)
        files = {"unseen": "judgments.test.tsv", "purchases": "judgments.personal.tsv"}
        found: Result = {}
        for name, file in files.items():
            users = ("user_id", "time") if name == "purchases" else ("", "")
            judgments = Judgments.read(shop.directory.path / file, "query", "item", "grade", 1.0, *users, ["kind"])
            found[name] = measure_all(searches, judgments, corpus, options, compare=True)
        return found

    return shop.result("ablation-" + re.sub(r"\W+", "-", group), labels, compute)


def _supervised_store(shop: Shop) -> Artifact:
    """Returns the store of the log and human labels: grade 3 is positive, 0 and 1 are negative, 2 decides nothing."""
    runner = shop.runner
    definition = {"labelled": shop.directory.digest}
    path = runner.out / "work" / f"{shop.experiment_name('labelled')}-{shop.directory.digest}"

    def compute() -> Result:
        with new_directory(path, True, "shop", "log.parquet") as out:
            for name in ("items", "users"):
                (out / f"{name}.parquet").symlink_to((shop.directory.path / f"{name}.parquet").resolve())
            log = pyarrow.parquet.read_table(shop.directory.path / "interactions")
            log = log.append_column("grade", pa.nulls(len(log), pa.int64()))
            labels = pyarrow.parquet.read_table(shop.directory.path / "labels.parquet").to_pydict()
            count = len(labels["query"])
            values: dict[str, Any] = {
                "query": labels["query"],
                "item_id": labels["item"],
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

    runner.result(shop.experiment_name("labelled"), definition, compute)
    interactions = {**SCHEMA["interactions"], "files": "log.parquet", "label": "grade"}
    schema = {**SCHEMA, "interactions": {**interactions, "positive_from": 3, "negative_to": 1}}
    return runner.store(shop.experiment_name("store-supervised"), Artifact(path, shop.directory.digest), schema)
