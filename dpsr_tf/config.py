"""The one YAML file that drives train, index and export, read into typed dataclasses.

A field's metadata gives its help text and range; an unknown key, a wrong type or a value out of range is an error that
names the key, the value, and what is allowed. The config is saved with every checkpoint and servable.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import math
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dpsr_tf.errors import UsageError

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field with its help text and allowed values (bounds included; for a tuple they hold for each)."""
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "choices": choices}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: default.copy(), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


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
    own_negatives: str = option("impressions", "what those are", choices=("impressions", "supervised", "both"))
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


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping: YAML takes the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key_node.tag != "tag:yaml.org,2002:merge" and str(key) in seen:
                raise yaml.constructor.ConstructorError(
                    "while reading a section", node.start_mark, f"key '{key}' stands twice", key_node.start_mark
                )
            seen.add(str(key))
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UsageError if there is none."""
    try:
        data = yaml.load(Path(path).read_bytes(), _UniqueKeys)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file, expected a YAML file") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bad UTF-8, a date that does not exist
        raise UsageError(f"{path}: not valid YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"{path}: holds a {type(data).__name__}, expected `key: value` lines")
    return data


def read_assignment(assignment: str, example: str) -> tuple[str, Any]:
    """Name and value, read as YAML, of a flag `--set=name=value`.

    Args:
        assignment: what follows `--set=`.
        example: of one, for the message; with a dot in it, names are those of a section and a key.

    Raises:
        UsageError: there is no name, no dot in it that should be, or no `=`; or the value is not YAML.
    """
    name, equals, text = assignment.partition("=")
    dotted = "." in example
    if not name or not equals or (dotted and "." not in name):
        form = f"{'section.key' if dotted else 'name'}=value"
        raise UsageError(f"--set={assignment}: expected {form}, for example {example}")
    try:
        return name, yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) or error
        raise UsageError(f"--set={assignment}: '{text}' is not valid YAML: {problem}") from None


def to_dict(value: Any) -> Any:
    """A dataclass as plain dicts and lists, for YAML and JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    return [to_dict(item) for item in value] if isinstance(value, tuple) else value


def from_dict(cls: type[T], data: Any, where: str, check: bool = True) -> T:
    """Builds the dataclass `cls` from a mapping.

    Args:
        cls: the dataclass; its method `problem`, if it has one, says what is wrong with values that do not go together.
            Where it has a class variable SHORTHAND, a text stands for a mapping with that one key.
        data: the mapping; None, an empty section, is one without keys.
        where: stands before each error: the file, then the section.
        check: asks `problem`.

    Raises:
        UsageError: names the key, the value, and what is allowed.
    """
    data = {} if data is None else data
    shorthand = getattr(cls, "SHORTHAND", None)
    if shorthand is not None and isinstance(data, str):
        data = {shorthand: data}
    if not isinstance(data, dict):
        raise UsageError(f"{where}: is {data!r}, expected a section of `key: value` lines")
    types = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), list(fields), 1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UsageError(f"{where}: unknown key '{key}', expected one of {', '.join(fields)}{hint}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(data[name], types[name], field, f"{where}: {name}", check)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UsageError(f"{where}: key '{name}' is missing{_help_of(field.metadata)}")
    result = cls(**values)
    problem = getattr(result, "problem", lambda: None)() if check else None
    if problem:
        raise UsageError(f"{where}: {problem}")
    return result


def _convert(value: Any, kind: Any, field: Any, where: str, check: bool) -> Any:
    metadata = field.metadata
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):  # optional
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
        return _convert(value, kind, field, where, check)
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, where, check)  # type: ignore[arg-type]
    if origin is tuple:
        element = typing.get_args(kind)[0]
        items = value if isinstance(value, list) else [value]
        if not items and field.default is dataclasses.MISSING:
            raise UsageError(f"{where} is [], expected at least one{_help_of(metadata)}")
        return tuple(_convert(item, element, field, where, check) for item in items)
    if origin is dict:
        if not isinstance(value, dict):
            raise UsageError(f"{where} is {value!r}, expected `key: value` lines{_help_of(metadata)}")
        element = typing.get_args(kind)[1]
        return {str(key): _convert(item, element, field, f"{where}: {key}", check) for key, item in value.items()}
    given = value
    if kind is float:
        value = _as_float(value)
    if kind is str and isinstance(value, datetime.date):  # YAML's own reading of 2024-03-01
        value = value.isoformat()
    if kind is str and metadata.get("numbers") and type(value) in (int, float):
        value = str(value)
    if type(value) is not kind:
        raise UsageError(f"{where} is {value!r}, expected {_name(kind)}{_help_of(metadata)}")
    low, high, choices = metadata.get("minimum"), metadata.get("maximum"), metadata.get("choices")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = f"{_shown(low)} or more" if high is None else f"{_shown(low)} to {_shown(high)}"
        raise UsageError(
            f"{where} is {given if value in (math.inf, -math.inf) else value!r}, expected {bounds}{_help_of(metadata)}"
        )
    if value != value:  # NaN
        raise UsageError(f"{where} is {given!r}, expected {_name(kind)}{_help_of(metadata)}")
    if choices and value not in choices:
        raise UsageError(f"{where} is {value!r}, expected one of {', '.join(choices)}")
    return value


def _as_float(value: Any) -> Any:
    """A number as float; anything else as it is."""
    # YAML 1.1 takes 1e-3, which has no point, for a text.
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if is_number or (isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return value


def _shown(bound: float) -> str:
    return f"{int(bound)}" if bound == int(bound) else f"{bound:g}"


def _name(kind: Any) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[kind]


def _help_of(metadata: Any) -> str:
    return f" ({metadata['help']})" if metadata.get("help") else ""
