"""How large a report's experiments are, and the generated shops that they run on.

The truth of a shop says which items are right (docs/generated_shop.md); models learn from its log only.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet

from dpsr_common.typed_config import option
from dpsr_tf.config import shipped_config
from dpsr_tf.data.store import Store
from dpsr_tf.report.runner import Artifact, ExperimentRunner, Result
from dpsr_tf.shop import generate

REPOSITORY = Path(__file__).resolve().parents[2]

# The generated shop's schema, and two things that shops do: the item tower reads how much an item has sold, and only
# clicks make pairs and histories, not the carts and orders that repeat them.
SCHEMA: dict[str, Any] = {
    **generate.SCHEMA,
    "items": {
        **generate.SCHEMA["items"],
        "features": [
            *generate.SCHEMA["items"]["features"],
            {"column": "sales", "kind": "number", "boundaries": [2**power for power in range(16)]},
        ],
    },
    "interactions": {**generate.SCHEMA["interactions"], "positive_types": ["click"]},
}
# How all DPSR models of Table 2 are trained, chosen on a shop of seed 4 (docs/report.md). What the paper has, the hinge
# with 64 random negatives, is in figure 7 and in the ablations.
TRAINING: dict[str, Any] = {
    "train.loss": "softmax",
    "train.log_q_correction": True,
    "train.num_random_negatives": 512,
    "train.num_own_negatives": 4,
}


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the experiments are."""

    shops: int = option(3, "generated shops, of the report's seed and those after it", 1, 100)
    items: int = option(6_000, "items of a generated shop", 1_500, 10**6)
    users: int = option(1_000, "its users", 10, 10**7)
    interactions: int = option(150_000, "clicks of its log", 100, 10**8)
    shared_brands: int = option(4, "brands of each category that the next one has too: polysemous queries", 0, 100)
    homonyms: int = option(12, "query words that mean two types of product each", 0, 12)
    history: float = option(4.0, "how much users' latent taste decides what they click", 0, 5)
    loyalty: float = option(0.9, "share of a user's sessions in favourite categories", 0, 1)
    purchases: int = option(10_000, "purchases after the log's end that Table 2 is judged by", 10, 10**5)
    judged_queries: int = option(1_000, "judged queries that the log does not hold, at most", 10, 10**6)
    steps: int = option(1_500, "training steps of each model", 1, 10**9)
    batch_size: int = option(256, "positive pairs a step", 2, 1 << 16)
    learning_rate: float = option(0.05, "of AdaGrad", 1e-8, 100)
    widths: tuple[int, ...] = option((8, 16), "further d that one head is compared with two in", 1, 4096)
    mixing_ratios: tuple[float, ...] = option((0.0, 0.25, 0.5, 0.75, 1.0), "alphas of figure 7", 0, 1)
    plotted_items: int = option(1_500, "items in figure 5", 100, 100_000)
    index_items: int = option(300_000, "vectors of the index benchmark; 0: leave it out", 0, 10**9)
    serving_seconds: float = option(3.0, "of each load on the model server; 0: leave it out", 0, 3600)
    data_steps: int = option(1_500, "training steps on each public data set, at most", 1, 10**9)

    def config(
        self, preset: str, steps: int, changes: Mapping[str, Any] = types.MappingProxyType({})
    ) -> dict[str, Any]:
        """A file of configs/ with linear towers, this size's training, and `section.key` changed."""
        base: dict[str, Any] = {
            "model.hidden": [],  # in minutes ReLU layers learn too little: see the ablation
            "train.steps": steps,
            "train.checkpoint_steps": steps,
            "train.batch_size": self.batch_size,
            "train.learning_rate": self.learning_rate,
            "train.initial_accumulator": 1e-6,
            "serving.k": 1000,
        }
        return with_changes(shipped_config(preset), {**base, **changes})

    def public_config(self, preset: str, changes: Mapping[str, Any] = types.MappingProxyType({})) -> dict[str, Any]:
        """A file of configs/ for a public data set, with its own training but no more steps than this size has."""
        train = shipped_config(preset)["train"]
        steps = min(train["steps"], self.data_steps)
        pretrain = train.get("pretrain_steps", 0) * steps // train["steps"]
        cut = {"train.steps": steps, "train.pretrain_steps": pretrain, "train.checkpoint_steps": steps}
        return with_changes(shipped_config(preset), {**cut, **changes})


QUICK = Size(
    shops=1,
    items=3_000,
    users=300,
    interactions=40_000,
    purchases=3_000,
    judged_queries=400,
    steps=500,
    widths=(16,),
    mixing_ratios=(0.0, 0.5, 1.0),
    plotted_items=800,
    index_items=20_000,
    serving_seconds=1.0,
    data_steps=100,
)


class Shop:
    """A generated shop, its store, and what is true of it."""

    def __init__(self, runner: ExperimentRunner, size: Size, number: int):
        """`number`: 0 is the shop of the report's seed."""
        self.runner, self.size, self.seed, self.number = runner, size, runner.seed + number, number
        self.directory = runner.shop(
            self.experiment_name("shop"),
            {
                "seed": self.seed,
                "items": size.items,
                "users": size.users,
                "interactions": size.interactions,
                "invented_brands": size.shared_brands,
                "shared_brands": size.shared_brands,
                "homonyms": size.homonyms,
                "history": size.history,
                "loyalty": size.loyalty,
                "personal_judgments": size.purchases,
                "judged_queries": size.judged_queries,
            },
        )
        self.store = runner.store(self.experiment_name("store"), self.directory, SCHEMA)

    def experiment_name(self, name: str) -> str:
        """The name of an experiment on this shop."""
        return f"{name}-{self.seed}"

    def model(
        self, name: str, preset: str, changes: Mapping[str, Any] | None = None, store: Artifact | None = None
    ) -> Artifact:
        """A model of a preset with `section.key` changed."""
        changes = {"train.seed": self.seed, **(changes or {})}
        config = self.size.config(preset, self.size.steps, changes)
        return self.runner.model(self.experiment_name(f"model-{name}"), store or self.store, config)

    def evaluate(self, name: str, systems: Mapping[str, str | Artifact], file: str, *flags: str) -> Result:
        """Systems measured on a judgment file of the shop."""
        return self.runner.evaluation(
            self.experiment_name(name),
            self.store,
            systems,
            self.directory.path / file,
            self.directory.digest,
            f"--seed={self.seed}",
            *flags,
        )

    def result(self, name: str, models: Mapping[str, Artifact], compute: Callable[[], Result], **more: Any) -> Result:
        """What is computed of models here, in this process."""
        digests = {label: model.digest for label, model in models.items()}
        definition = {
            "compute": name,
            "shop": self.directory.digest,
            "store": self.store.digest,
            "models": digests,
            **more,
        }
        return self.runner.result(self.experiment_name(name), definition, compute)

    @functools.cached_property
    def opened_store(self) -> Store:
        """The store, opened."""
        return Store(self.store.path)

    def truth_table(self, name: str) -> dict[str, list[Any]]:
        """A table of truth/, by columns."""
        return dict(pyarrow.parquet.read_table(self.directory.path / "truth" / f"{name}.parquet").to_pydict())

    @functools.cached_property
    def parameters(self) -> dict[str, Any]:
        """What the shop was generated with."""
        return dict(json.loads((self.directory.path / "truth.json").read_text())["parameters"])

    @functools.cached_property
    def meanings(self) -> dict[int, set[int]]:
        """Item ids of each meaning."""
        table = self.truth_table("relevant")
        found: dict[int, set[int]] = {}
        for meaning, item in zip(table["meaning"], table["item_id"], strict=True):
            found.setdefault(meaning, set()).add(item)
        return found


def with_changes(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with `section.key` changed."""
    config = {section: dict(values) for section, values in config.items()}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        config.setdefault(section, {})[name] = value
    return config
