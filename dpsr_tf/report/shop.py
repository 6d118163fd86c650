"""The size of a report's experiments, and the generated shops that they run on.

The truth of a shop says which items are relevant (docs/generated_shop.md). Models learn only from its log.
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

# The generated shop's schema with two changes. The item tower reads how often an item was sold before the log. Only
# clicks make pairs and histories, because carts and orders repeat them.
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
# The training of all DPSR models of Table 2, chosen on a shop of seed 4 (docs/report.md). The paper's training, hinge
# loss with 64 random negatives, is in figure 7 and in the ablations.
TRAINING: dict[str, Any] = {
    "train.loss": "softmax",
    "train.log_q_correction": True,
    "train.num_random_negatives": 512,
    "train.num_own_negatives": 4,
}
# The best BM25 that benchmarks/bm25.py found on the dev queries of the same shop.
TUNED_BM25 = "trigrams=0.1+b=0.6"


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of the experiments."""

    shops: int = option(3, "number of generated shops; their seeds are --seed and the ones after it", 1, 100)
    items: int = option(6_000, "number of items of a generated shop", 1_500, 10**6)
    users: int = option(1_000, "number of users of a generated shop", 10, 10**7)
    interactions: int = option(150_000, "number of clicks in the log of a generated shop", 100, 10**8)
    shared_brands: int = option(
        4, "number of brands that a category shares with the next one, which makes polysemous queries", 0, 100
    )
    homonyms: int = option(12, "number of query words that stand for two types of product each", 0, 12)
    history: float = option(4.0, "weight of a user's taste, which no profile shows, in what the user clicks", 0, 5)
    loyalty: float = option(0.9, "share of a user's sessions in the user's favourite categories", 0, 1)
    purchases: int = option(
        10_000, "number of purchases after the end of the log on which Table 2 is measured", 10, 10**5
    )
    requests: int = option(8_000, "number of new requests in the simulation of the online tests", 100, 10**6)
    judged_queries: int = option(1_000, "largest number of judged queries that are not in the log", 10, 10**6)
    steps: int = option(1_500, "training steps of each model on a generated shop", 1, 10**9)
    batch_size: int = option(256, "positive pairs per training step", 2, 1 << 16)
    learning_rate: float = option(0.05, "learning rate of AdaGrad", 1e-8, 100)
    widths: tuple[int, ...] = option(
        (8, 16), "embedding dimensions, beside the usual one, in which one head is compared with two", 1, 4096
    )
    mixing_ratios: tuple[float, ...] = option(
        (0.0, 0.25, 0.5, 0.75, 1.0), "shares of random negatives (alpha) in figure 7", 0, 1
    )
    plotted_items: int = option(1_500, "number of items in figure 5", 100, 100_000)
    data_steps: int = option(1_500, "largest number of training steps on a public data set", 1, 10**9)

    def config(
        self, preset: str, steps: int, changes: Mapping[str, Any] = types.MappingProxyType({})
    ) -> dict[str, Any]:
        """Returns a file of configs/ with linear towers, this size's training, and `changes` (`section.key`)."""
        base: dict[str, Any] = {
            # ReLU layers learn too little within minutes; see the ablation "layers".
            "model.hidden": [],
            "train.steps": steps,
            "train.checkpoint_steps": steps,
            "train.batch_size": self.batch_size,
            "train.learning_rate": self.learning_rate,
            "train.initial_accumulator": 1e-6,
            "serving.k": 1000,
        }
        return with_changes(shipped_config(preset), {**base, **changes})

    def public_config(self, preset: str, changes: Mapping[str, Any] = types.MappingProxyType({})) -> dict[str, Any]:
        """Returns a file of configs/ for a public data set, with its own training but at most `data_steps` steps."""
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
    data_steps=100,
)


class Shop:
    """A generated shop, its store, and its truth."""

    def __init__(self, runner: ExperimentRunner, size: Size, number: int):
        """Makes the shop and its store, unless they are there. The shop's seed is the report's plus `number`."""
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
        """Returns the name of an experiment on this shop."""
        return f"{name}-{self.seed}"

    def model(
        self, name: str, preset: str, changes: Mapping[str, Any] | None = None, store: Artifact | None = None
    ) -> Artifact:
        """Returns a model that is trained with a file of configs/ and with `changes` (`section.key`)."""
        changes = {"train.seed": self.seed, **(changes or {})}
        config = self.size.config(preset, self.size.steps, changes)
        return self.runner.model(self.experiment_name(f"model-{name}"), store or self.store, config)

    def evaluate(self, name: str, systems: Mapping[str, str | Artifact], file: str, *flags: str) -> Result:
        """Measures systems on a judgments file of the shop with `dpsr evaluate`."""
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
        """Runs a computation with models in this process, or returns its kept result; `more` adds to its definition."""
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
        """The store, open for reading."""
        return Store(self.store.path)

    def truth_table(self, name: str) -> dict[str, list[Any]]:
        """Returns a table of truth/ as column -> values."""
        return dict(pyarrow.parquet.read_table(self.directory.path / "truth" / f"{name}.parquet").to_pydict())

    @functools.cached_property
    def parameters(self) -> dict[str, Any]:
        """The parameters that the shop was generated with."""
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
    """Returns a config with `changes` (`section.key`)."""
    config = {section: dict(values) for section, values in config.items()}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        config.setdefault(section, {})[name] = value
    return config
