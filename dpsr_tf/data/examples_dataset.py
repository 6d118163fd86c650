"""Training batches, which C++ assembles from the memory-mapped files of a store (DPSR section 5.1.2)."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import tensorflow as tf

from dpsr_common.errors import UsageError
from dpsr_tf import ops
from dpsr_tf.config import TrainConfig
from dpsr_tf.data.schema import EVENT_TYPES, FIXED_KINDS
from dpsr_tf.data.store import graph_names, interactions_names, vocabulary_name


class StoreFiles(Protocol):
    """What a dataset needs to know about a store. dpsr_tf.data.store.Store implements it.

    Attributes:
        path: the directory, as a Path or as a text such as "ram://store".
        manifest: the content of manifest.json.
    """

    path: Any
    manifest: dict[str, Any]


class Tokens(NamedTuple):
    """Lists of ids, one for each text: text i has the ids values[row_splits[i]:row_splits[i + 1]]."""

    values: tf.Tensor  # int32 [tokens]
    row_splits: tf.Tensor  # int64 [texts + 1]


class Features(NamedTuple):
    """Features of some rows of the item or user table. Each of the two groups is in the order asked for."""

    codes: tf.Tensor  # int32 [rows, features of kind categorical or number]; 0 is the unknown value
    # One for each feature of kind multi (codes), text (token ids), or vector (the bits of its float32 numbers, or
    # nothing; outside of batches, the values may also be float32).
    lists: tuple[Tokens, ...]


class History(NamedTuple):
    """What the user of each example did strictly before the example, oldest first: h items and p queries in all.

    It is empty for anonymous users and title queries. The paper keeps one history for each user. Here, each example has
    its own: it never has events of the future, nor at its end the click that an example of type cart or order repeats.
    """

    items: Tokens  # item rows [h], row_splits [b + 1]
    types: tf.Tensor  # int32 [h], index in EVENT_TYPES
    text: Tokens  # h texts; no texts without BatchOptions.history_text
    features: Features  # of the h items
    query_splits: tf.Tensor  # int64 [b + 1], over the p texts
    query: Tokens  # p texts; of equal consecutive queries, one is kept


class Graph(NamedTuple):
    """The neighbourhoods of b queries and n items in the click graph, one or two hops wide.

    They consist of u queries, i items and v values of attributes, each of which stands here once. All other numbers are
    places among these. The lists of a part give the neighbours of each element of the part before it: `query_items` the
    items next to each of the b queries, and `query_items_queries` the queries next to each of those p items.
    """

    query: Tokens  # u texts
    item: Tokens  # i texts
    value: tf.Tensor  # int32 [v], rows of the table of values: the codes of all attributes, one after the other
    value_items: Tokens  # items [..], row_splits [v + 1]; no items for values that only `node_attributes` has
    attributes: tf.Tensor  # int32 [n * attributes], value of each attribute of each item, row by row; -1 without one
    node_attributes: tf.Tensor  # int32 [.. * attributes], the same for the first ones of the i items
    query_items: Tokens  # items [p], row_splits [b + 1]; all of them have `node_attributes`
    query_items_queries: Tokens  # queries [..], row_splits [p + 1]
    item_queries: Tokens  # queries [s], row_splits [n + 1]
    item_queries_items: Tokens  # items [..], row_splits [s + 1]


class Batch(NamedTuple):
    """A training batch of b positive pairs and n = b + r + b * m items (Algorithm 1, lines 3 and 4).

    Parts that the options do not ask for are empty: [b, 0] codes, () lists, row splits of zeros.

    C++ defines the components (dpsr_tf/ops/batch_components.h). The fields here have the same names and order, which
    `batch_spec` checks.
    """

    query: Tokens  # b texts
    query_rows: tf.Tensor  # int32 [b], rows over all interaction files; -1 for a title query
    item: Tokens  # n texts: the positives in order, the r random negatives, the m own negatives of each pair
    item_rows: tf.Tensor  # int32 [n]
    item_features: Features  # of the n items
    user_rows: tf.Tensor  # int32 [b]; 0 is the anonymous user
    user_features: Features  # of the b users
    history: History
    weights: tf.Tensor  # float32 [b]
    labels: tf.Tensor  # float32 [b]; 1 if the log has no labels
    types: tf.Tensor  # int32 [b], index in EVENT_TYPES
    negative_mask: tf.Tensor  # bool [b, b + r]: item j may serve as a negative for query i; [b, 0] if not asked for
    own_negative_mask: tf.Tensor  # bool [b, m]: pair i has an own negative j; otherwise its place has row 0
    graph: tuple[Graph, ...] = ()  # of the b queries and n items; () without BatchOptions.graph_fan_out


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """What a batch holds, and in which order the examples come.

    An option that the `train` section of a config also has bears the same name there, and all bear the same name in C++
    (dpsr_tf/ops/batch_options.h), which checks the values.

    Attributes:
        batch_size: b, number of positive pairs.
        num_title_queries: number of pairs whose query is a piece of a random item's title.
        pretrain_steps: number of batches at the start of training in which every pair has a title query.
        title_subsampling: in a title query, a word that occurs in a larger share s of the titles is kept with
            probability sqrt(title_subsampling / s) only. 0 turns this off.
        title_typo_rate: share of the words in title queries that get a typing error (dpsr_tf/ops/query_noise.h).
        query_typo_rate: share of the words in logged queries that get a typing error.
        num_random_negatives: r, number of random items that are negatives of every pair of the batch, drawn uniformly
            from all items (section 4.4.1).
        num_supervised_negatives: how many of the random negatives are replaced by labelled negatives of the batch's
            queries (section 4.5).
        num_own_negatives: m, number of items for each pair that are negatives of this pair only.
        own_negative_source: "impressions": own negatives are items shown with the positive and not clicked; "labels":
            labelled negatives of the query; "both".
        seed: seed of the shuffle and of the random draws.
        user_features: names of the user features, in the order wanted.
        item_features: names of the features of all n items, in the order wanted.
        history_length: number of the user's last events, 0 for none.
        history_types: names in EVENT_TYPES of the events that belong to the history; () for all that the store keeps.
        history_text: whether the batch has the texts of the items in histories.
        history_features: names of the features of the items in histories, in the order wanted.
        query_history_length: number of the user's last queries, 0 for none.
        negative_mask: whether the batch has the mask of negatives, which every loss over shared or in-batch negatives
            needs.
        graph_fan_out: largest number of neighbours in the click graph, for each of one or two hops; () for no graph.
            The edge of a pair is on no path from its query or item, nor is an edge that is not older than the pair.
        graph_sampling: "weighted": neighbours are drawn by the clicks of their edges; "strongest": those with the most.
        graph_dropout: share of the queries and items that get no neighbours by clicks.
        graph_attributes: names of the item features whose values are nodes of the graph, in the order wanted.
        shuffle_buffer: number of positives that are shuffled together. A log that fits is shuffled as a whole. In a
            longer one, blocks of 4,096 positives are shuffled, and as many blocks as fit are mixed at a time.
        num_parallel_calls: number of batches that are assembled ahead, 0 for none. It does not change the batches.
    """

    batch_size: int = 64
    num_title_queries: int = 0
    pretrain_steps: int = 0
    title_subsampling: float = 0.0
    title_typo_rate: float = 0.0
    query_typo_rate: float = 0.0
    num_random_negatives: int = 64
    num_supervised_negatives: int = 0
    num_own_negatives: int = 0
    own_negative_source: str = "impressions"
    seed: int = 1
    user_features: tuple[str, ...] = ()
    item_features: tuple[str, ...] = ()
    history_length: int = 0
    history_types: tuple[str, ...] = ()
    history_text: bool = False
    history_features: tuple[str, ...] = ()
    query_history_length: int = 0
    negative_mask: bool = True
    graph_fan_out: tuple[int, ...] = ()
    graph_sampling: str = "weighted"
    graph_dropout: float = 0.0
    graph_attributes: tuple[str, ...] = ()
    shuffle_buffer: int = 1 << 22
    num_parallel_calls: int = 0

    @staticmethod
    def from_config(config: TrainConfig, **options: Any) -> BatchOptions:
        """Returns the options that a training config has, with `options` for the others."""
        names = {field.name for field in dataclasses.fields(BatchOptions)}
        shared = {field.name for field in dataclasses.fields(config)} & names
        return BatchOptions(**{name: getattr(config, name) for name in shared}, **options)

    def message(self, manifest: dict[str, Any], **epochs_and_shard: int) -> str:
        """Returns the JSON object that the op reads.

        Args:
            manifest: the store's, which says how each feature is held.
            **epochs_and_shard: num_epochs, shard_index and num_shards, as in batch_options.h.

        Raises:
            UsageError: the store has no feature of a name, or there is no event type of a name.
        """
        for event_type in self.history_types:
            if event_type not in EVENT_TYPES:
                raise UsageError(f"history_types has '{event_type}', expected some of {', '.join(EVENT_TYPES)}")
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        options |= epochs_and_shard
        options["history_types"] = sum(1 << EVENT_TYPES.index(event_type) for event_type in set(self.history_types))
        options["user_features"] = _by_kind(manifest, "users", self.user_features)
        options["item_features"] = _by_kind(manifest, "items", self.item_features)
        options["history_features"] = _by_kind(manifest, "items", self.history_features)
        options["graph_attributes"] = _by_kind(manifest, "items", self.graph_attributes)
        return json.dumps(options)


def _by_kind(manifest: dict[str, Any], table: str, names: Sequence[str]) -> dict[str, list[str]]:
    """Splits names of features of a table ("items" or "users") by how the store holds them, in their order."""
    kinds = {feature["name"]: feature["kind"] for feature in manifest["features"][table]}
    for name in names:
        if name not in kinds:
            raise UsageError(
                f"the store has no feature '{name}' of {table}, expected some of {', '.join(kinds) or 'none'}; "
                f"name it in the schema's {table}.features and ingest again, or leave it out of the config"
            )
    return {
        "fixed": [name for name in names if kinds[name] in FIXED_KINDS],
        "lists": [name for name in names if kinds[name] not in FIXED_KINDS],
    }


class _ExamplesDataset(tf.data.Dataset):
    """The C++ source op as a tf.data.Dataset."""

    def __init__(self, variant: tf.Tensor, spec: Batch):
        self._spec = spec
        super().__init__(variant)

    def _inputs(self) -> list[tf.data.Dataset]:
        return []

    @property
    def element_spec(self) -> Batch:
        """The types and shapes of the components."""
        return self._spec


def examples_dataset(
    store: StoreFiles,
    options: BatchOptions,
    num_epochs: int | None = None,
    shard_index: int = 0,
    num_shards: int = 1,
    first_step: int | tf.Tensor = 0,
) -> tf.data.Dataset:
    """Returns a dataset of Batch, each element of which is the batch of one training step.

    Batch n depends on the arguments and n only. The log is shuffled anew for each epoch. The workers of a training use
    the same seed and different values of `shard_index`. If the store has at least as many interaction files as there
    are workers, worker w reads the pairs of the files w, w + num_shards, ... only, and opens the other files only for
    histories of queries or a click graph. With fewer files, each worker takes its part of one shuffle of all files.

    Args:
        store: the files, on any file system that TensorFlow knows, and their manifest.
        options: what a batch holds.
        num_epochs: number of passes over the log; None for no end.
        shard_index: this worker's number, 0 to num_shards - 1.
        num_shards: number of workers that share the log.
        first_step: number of the first batch. A resumed training gives its global step.

    Raises:
        UsageError: the store does not have a feature.
        tf.errors.InvalidArgumentError: an option has a value that is not allowed.
        tf.errors.NotFoundError, DataLossError, FailedPreconditionError: a file is missing or damaged, or does not have
            what the options ask for. In a graph, this is raised when the graph runs.
    """
    message = options.message(
        store.manifest, num_epochs=num_epochs or 0, shard_index=shard_index, num_shards=num_shards
    )
    spec = batch_spec(message)
    variant = ops.load().dpsr_examples_dataset(
        users=_path(store, "users.dpsr"),
        items=_path(store, "items.dpsr"),
        interactions=[_path(store, name) for name in interactions_names(store.manifest["shards"])],
        queries=store.manifest.get("shard_queries", []),
        titles=_path(store, "titles.dpsr"),
        vocabulary=_path(store, vocabulary_name()),
        graph=[_path(store, name) for name in _graph_names(store.manifest)],
        first_step=first_step,
        options=message,
    )
    return _ExamplesDataset(variant, spec)


def _graph_names(manifest: dict[str, Any]) -> list[str]:
    return graph_names(manifest["shards"]) if "graph" in manifest else []


def batch_spec(message: str) -> Batch:
    """Returns types and shapes of the components of a batch, as C++ describes them (dpsr_tf/ops/batch_components.h).

    Args:
        message: BatchOptions.message().

    Raises:
        tf.errors.InvalidArgumentError: the option that is wrong, its value, and what is allowed.
    """
    described = json.loads(ops.load_c().DpsrDescribeBatchComponents(message.encode()))
    if "error" in described:
        raise tf.errors.InvalidArgumentError(None, None, described["error"])
    components = {
        name: tf.TensorSpec([None if size < 0 else size for size in shape], tf.as_dtype(dtype))
        for name, dtype, shape in described["components"]
    }
    # tf.data gives the components in the order of the structure.
    order = tf.nest.flatten(_fill(Batch, "", {name: name for name in components}))
    if order != list(components):
        raise RuntimeError(f"Batch has the components {order}, the op library {list(components)}; run `make setup`")
    return cast(Batch, _fill(Batch, "", components))


def _fill(kind: Any, name: str, components: Mapping[str, Any]) -> Any:
    """Returns a `kind`, such as Batch, that holds the components whose names begin with `name`."""
    if kind is tf.Tensor:
        return components[name]
    prefix = f"{name}." if name else ""
    if typing.get_origin(kind) is tuple:  # tuple[Tokens, ...], tuple[Graph, ...]
        indices = {int(other.removeprefix(prefix).split(".")[0]) for other in components if other.startswith(prefix)}
        return tuple(_fill(typing.get_args(kind)[0], f"{prefix}{index}", components) for index in sorted(indices))
    hints = typing.get_type_hints(kind)
    return kind(**{field: _fill(hint, f"{prefix}{field}", components) for field, hint in hints.items()})


def _path(store: StoreFiles, name: str) -> str:
    # A text is not converted to a Path, which would make one slash of the two in "ram://".
    return str(store.path / name) if isinstance(store.path, Path) else f"{str(store.path).rstrip('/')}/{name}"


def training_input(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Wraps each Batch in a dict for an Estimator's input_fn, as Estimator takes a tuple for (features, labels)."""
    return dataset.map(lambda batch: {"batch": batch})
