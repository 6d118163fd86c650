"""The one YAML file that drives train, index and export, read into typed dataclasses.

A field's metadata gives its help text and range; an unknown key, a wrong type or a value out of range is an error that
names the key, the value, and what is allowed. The config is saved with every checkpoint and servable.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import yaml

from dpsr_common.strict_yaml import read_yaml
from dpsr_common.typed_config import from_dict, option, to_dict

# Config files that come with the package.
CONFIGS = Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The two towers (DPSR sections 4.1 to 4.3). Features are named as in the schema; "*" stands for all of them."""

    token_dim: int = option(64, "width of the embedding table of tokens, and of what each head's layers read", 1, 4096)
    feature_dim: int = option(16, "width of the embedding of a categorical, number or multi feature", 1, 4096)
    hidden: tuple[int, ...] = option((), "widths of the ReLU layers of a tower, and of each of its heads", 1, 65536)
    embedding_dim: int = option(64, "d, the length of query and item embeddings", 1, 4096)
    num_heads: int = option(1, "m, embeddings of a query (4.2)", 1, 16)
    temperature: float = option(0.1, "beta of the soft dot product over heads (equation 1); 0 is the largest", 0, 1e3)
    share_text_table: bool = option(True, "query and item text share one embedding table")
    aligned_start: bool = option(True, "towers and heads start as the same rotation of the text; off: each by chance")
    item_features: tuple[str, ...] = option((), "features that enter the item tower beside the text")
    user_features: tuple[str, ...] = option((), "profile features that enter the query tower (DPSR-p)")
    history_length: int = option(0, "last items of the user that enter the query tower (DPSR-h)", 0, 1000)
    query_history_length: int = option(0, "last queries of the user that enter the query tower (DPSR-h)", 0, 1000)
    history_pooling: str = option("attention", "how a history becomes one vector", choices=("attention", "sum"))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Optimisation (sections 4.3 and 4.4). Where the paper gives a number, it is the default."""

    RENAMED: ClassVar = {"own_negatives": ("own_negative_source", {"supervised": "labels"})}

    steps: int = option(10_000, "training steps in all", 1)
    batch_size: int = option(64, "b, positive pairs a step", 2, 1 << 16)
    num_title_queries: int = option(0, "pairs of a batch whose query is a piece of a random item's title", 0, 1 << 16)
    pretrain_steps: int = option(0, "first steps, in which all pairs are such ones", 0)
    title_subsampling: float = option(
        0.0, "words of a larger share of the titles come less often in them; 0: off", 0, 1
    )
    title_typo_rate: float = option(0.0, "share of the words of such a query that get a typing error", 0, 1)
    query_typo_rate: float = option(0.0, "the same of the words of the log's queries", 0, 1)
    learning_rate: float = option(0.01, "AdaGrad's learning rate", 1e-8, 100)
    initial_accumulator: float = option(0.1, "where AdaGrad's sums start in embedding tables", 1e-30, 1e6)
    average_decay: float = option(
        0.0, "of the moving average of the weights that is served; 0: the last ones", 0, 0.99999
    )
    loss: str = option("hinge", "hinge (4.3) or softmax over the negatives", choices=("hinge", "softmax"))
    margin: float = option(0.1, "delta of the hinge loss", 0, 2)
    softmax_temperature: float = option(0.07, "what the softmax loss divides scores by", 1e-3, 1e3)
    log_q_correction: bool = option(False, "the softmax loss corrects for how often an item is a negative")
    num_random_negatives: int = option(64, "random negatives a step, shared by the batch (4.4.1)", 0, 1 << 16)
    mixing_ratio: float = option(0.5, "alpha, the share of random negatives in the loss (4.4.3)", 0, 1)
    num_hard_negatives: int = option(0, "hardest negatives of a pair that count; 0: all, as in the paper", 0, 1 << 17)
    num_supervised_negatives: int = option(0, "places of the random set for labelled negatives (4.5)", 0, 1 << 16)
    num_own_negatives: int = option(0, "negatives that a pair has for itself alone", 0, 1024)
    own_negative_source: str = option(
        "impressions",
        "where a pair's own negatives come from: items shown with it and not clicked, labelled negatives of its query",
        choices=("impressions", "labels", "both"),
    )
    own_negative_weight: float = option(1.0, "how much one of them counts in the loss", 0, 1e6)
    seed: int = option(1, "of initial weights, shuffle and negatives", 0, 2**31 - 1)
    checkpoint_steps: int = option(2_000, "steps between checkpoints", 1)

    def problem(self) -> str | None:
        """What is wrong with values that are each allowed but do not go together."""
        if self.num_title_queries >= self.batch_size:
            return (
                f"num_title_queries is {self.num_title_queries}, expected at most batch_size - 1, "
                f"{self.batch_size - 1}: the others come from the log"
            )
        if self.num_supervised_negatives > self.num_random_negatives:
            return (
                f"num_supervised_negatives is {self.num_supervised_negatives}, expected at most num_random_negatives, "
                f"{self.num_random_negatives}: they take places of the random ones"
            )
        if self.mixing_ratio == 1 and self.num_random_negatives == 0 and self.num_own_negatives == 0:
            return "mixing_ratio is 1 and num_random_negatives 0, so no negative counts; raise one or lower the other"
        if self.num_hard_negatives and self.loss != "hinge":
            return f"num_hard_negatives is {self.num_hard_negatives} and loss {self.loss}, but it goes with hinge only"
        if self.log_q_correction and self.loss != "softmax":
            return f"log_q_correction is on and loss {self.loss}, but it goes with softmax only"
        return None


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Recall on the interactions that the store held out, measured at checkpoints; the best one is kept aside."""

    queries: int = option(0, "held-out queries, drawn by chance, that are asked; 0: no validation", 0, 10_000_000)
    recall_at: int = option(100, "k of recall@k, over all items", 1, 10_000)
    every: int = option(1, "checkpoints from one measurement to the next", 1)
    patience: int = option(0, "measurements without a new best after which training stops; 0: it goes on", 0)


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """How a model lies on several parameter servers (5.1.3). Checkpoints are the same whatever it says."""

    placement: str = option("whole", "a table is on one ps, or its rows on all", choices=("whole", "rows"))
    half_on_wire: bool = option(False, "dense weights and their gradients travel in 16 bits")


@dataclasses.dataclass(frozen=True)
class IndexConfig:
    """The FAISS index over all item embeddings."""

    factory: str = option("Flat", "FAISS index factory string; Flat is exact; auto chooses one")
    parameters: str = option("", "search parameters, as nprobe=32; if empty, the cheapest that meet recall_target")
    recall_target: float = option(0.95, "ann_recall@k to reach, with k of section serving", 0.01, 1)
    memory: float = option(0.0, "for auto: GB (10^9 bytes) that the index may take; 0: any", 0, 1e6)


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """The servable."""

    k: int = option(100, "items that signature serving_default returns for a query", 1, 10_000)


@dataclasses.dataclass(frozen=True)
class Config:
    """All of it; one section a stage."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    index: IndexConfig = dataclasses.field(default_factory=IndexConfig)
    serving: ServingConfig = dataclasses.field(default_factory=ServingConfig)


def load_config(path: str | Path) -> Config:
    """Reads a config file. Raises UsageError (no file, no YAML, or a key or value that is not allowed)."""
    return from_dict(Config, read_yaml(path), str(path))


def save_config(config: Config, path: str | Path) -> None:
    """Writes every key, defaults too, so that a checkpoint says what it was trained with."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def shipped_config(name: str) -> dict[str, Any]:
    """What a config file of the package says: "dpsr_h" is dpsr_tf/configs/dpsr_h.yaml."""
    return read_yaml(CONFIGS / f"{name}.yaml")
