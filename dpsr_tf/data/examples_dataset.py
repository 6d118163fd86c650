"""Training batches straight from the files of a store, assembled in C++ (DPSR section 5.1.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import tensorflow as tf

from dpsr_common.errors import UsageError
from dpsr_tf import ops
from dpsr_tf.config import TrainConfig
from dpsr_tf.data.schema import EVENT_TYPES, FIXED_KINDS
from dpsr_tf.data.store import interactions_names, vocabulary_name


class StoreFiles(Protocol):
    """What a dataset needs of a store: dpsr_tf.data.store.Store has it.

    Attributes:
        path: the directory: a Path, or a text such as "ram://store".
        manifest: what manifest.json holds.
    """

    path: Any
    manifest: dict[str, Any]


class Tokens(NamedTuple):
    """Lists of ids, one a text: text i holds values[row_splits[i]:row_splits[i + 1]]."""

    values: tf.Tensor  # int32 [tokens]
    row_splits: tf.Tensor  # int64 [texts + 1]


class Features(NamedTuple):
    """Features of some rows of the item or user table, each kind in the order asked for."""

    codes: tf.Tensor  # int32 [rows, features of the kinds categorical and number]; 0 is unknown
    lists: tuple[Tokens, ...]  # one a feature of the kinds multi (codes) and text (token ids)


class History(NamedTuple):
    """What the user of each example did strictly before the example's time, oldest first; h items, p queries in all.

    Empty for anonymous users and title queries. DPSR keeps one history a user; this one never sees the future, nor at
    its end the click that the example, a cart or an order, repeats.
    """

    items: Tokens  # item rows [h], row_splits [b + 1]
    types: tf.Tensor  # int32 [h], index in EVENT_TYPES
    text: Tokens  # h texts; none unless BatchOptions.history_text
    features: Features  # of the h items
    query_splits: tf.Tensor  # int64 [b + 1], over the p texts
    query: Tokens  # p texts; of equal queries one after the other only one is kept


class Batch(NamedTuple):
    """A training batch of b positive pairs and n = b + r + b * m items (Algorithm 1, lines 3 and 4).

    What is not asked for is empty: [b, 0] codes, () lists, row splits of zeros.
    """

    query: Tokens  # b texts
    query_rows: tf.Tensor  # int32 [b], rows over all interaction files; -1 for a title query
    item: Tokens  # n texts: the positives in order, the r shared negatives, the m own negatives of each pair
    item_rows: tf.Tensor  # int32 [n]
    item_features: Features  # of the n items
    user_rows: tf.Tensor  # int32 [b]; 0 is the anonymous user
    user_features: Features  # of the b users
    history: History
    weights: tf.Tensor  # float32 [b]
    labels: tf.Tensor  # float32 [b]; 1 where there is none
    types: tf.Tensor  # int32 [b], index in EVENT_TYPES
    negative_mask: tf.Tensor  # bool [b, b + r]: item j may serve as a negative for query i; [b, 0] if not asked for
    own_negative_mask: tf.Tensor  # bool [b, m]: own negative j of pair i is there; otherwise its place holds row 0


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """What a batch holds, and in which order the examples come.

    Attributes:
        batch_size: b, positive pairs.
        num_title_queries: pairs whose query is a piece of a random item's title.
        pretrain_steps: first batches, in which all pairs are such ones.
        title_subsampling: a word that stands in a larger share s of the titles stays in such a query's title with
            probability sqrt(title_subsampling / s) only; 0: always.
        title_typo_rate: probability that a word of such a query gets a typing error (dpsr_tf/ops/query_noise.h).
        query_typo_rate: the same of the log's queries.
        num_random_negatives: r, items shared by the batch, uniform over all items (section 4.4.1).
        num_supervised_negatives: places of those for labelled negatives of the batch's queries (section 4.5).
        num_own_negatives: m, items that are negatives of one pair only.
        own_negative_source: "impressions": items shown with the positive and not clicked; "labels": labelled negatives
            of the query; "both".
        seed: of shuffle and negatives.
        user_features: names of features of the users, in the order wanted.
        item_features: the same of all n items.
        history_length: last events of the user, 0 for none.
        history_types: names of EVENT_TYPES that count as such; () is all that the store keeps.
        history_text: gives the text of the history's items.
        history_features: item features of the history's items.
        query_history_length: last queries of the user, 0 for none.
        negative_mask: gives the mask, which every loss over shared or in-batch negatives needs.
        shuffle_buffer: positives shuffled among themselves. A log that fits is shuffled as a whole; of a longer one,
            blocks of 4,096 positives are shuffled, and as many blocks at a time as fit are mixed.
        num_parallel_calls: batches assembled ahead, 0 for none; the batches are the same.
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
    shuffle_buffer: int = 1 << 22
    num_parallel_calls: int = 0

    @staticmethod
    def from_config(config: TrainConfig, **options: Any) -> BatchOptions:
        """The options that a training config has, with `options` for those that it has not."""
        return BatchOptions(
            batch_size=config.batch_size,
            num_title_queries=config.num_title_queries,
            pretrain_steps=config.pretrain_steps,
            title_subsampling=config.title_subsampling,
            title_typo_rate=config.title_typo_rate,
            query_typo_rate=config.query_typo_rate,
            num_random_negatives=config.num_random_negatives,
            num_supervised_negatives=config.num_supervised_negatives,
            num_own_negatives=config.num_own_negatives,
            own_negative_source="labels" if config.own_negatives == "supervised" else config.own_negatives,
            seed=config.seed,
            **options,
        )


class FeatureKinds(NamedTuple):
    """Names of features by how a store holds them; each in the order asked for."""

    fixed: list[str]
    lists: list[str]

    @staticmethod
    def of(manifest: dict[str, Any], table: str, names: Sequence[str]) -> FeatureKinds:
        """Looks features up in a store's manifest; `table` is "items" or "users". UsageError for one it has not."""
        kinds = {feature["name"]: feature["kind"] for feature in manifest["features"][table]}
        for name in names:
            if name not in kinds:
                raise UsageError(
                    f"the store has no feature '{name}' of {table}, expected some of {', '.join(kinds) or 'none'}; "
                    f"name it in the schema's {table}.features and ingest again, or leave it out of the config"
                )
        return FeatureKinds(
            [name for name in names if kinds[name] in FIXED_KINDS],
            [name for name in names if kinds[name] not in FIXED_KINDS],
        )


class _ExamplesDataset(tf.data.Dataset):
    """The C++ source op as a tf.data.Dataset."""

    def __init__(self, variant: tf.Tensor, spec: Batch):
        self._spec = spec
        super().__init__(variant)

    def _inputs(self) -> list[tf.data.Dataset]:
        return []

    @property
    def element_spec(self) -> Batch:
        """Types and shapes of the components."""
        return self._spec


def examples_dataset(
    store: StoreFiles,
    options: BatchOptions,
    num_epochs: int | None = None,
    shard_index: int = 0,
    num_shards: int = 1,
    first_step: int | tf.Tensor = 0,
) -> tf.data.Dataset:
    """A dataset of Batch: each element one training step.

    Batch n depends only on the arguments and n. The log is shuffled anew each epoch. Workers of one training give the
    same seed and their own `shard_index`: where the store has at least as many interaction files as there are workers,
    worker w reads the files w, w + num_shards, ... and no other's examples; with fewer files each worker takes its part
    of one shuffle of all of them.

    Args:
        store: where the files are, on any file system that TensorFlow knows, and what they hold.
        options: what a batch holds.
        num_epochs: passes over the log; None is forever.
        shard_index: this worker's number, 0 to num_shards - 1.
        num_shards: how many workers share the log.
        first_step: number of the first batch; a resumed training gives its global step.

    Raises:
        UsageError: the store has no feature of that name.
        tf.errors.InvalidArgumentError, NotFoundError, DataLossError, FailedPreconditionError: on the first use, with
            the option or the file that is wrong.
    """
    for event_type in options.history_types:
        if event_type not in EVENT_TYPES:
            raise UsageError(f"history_types has '{event_type}', expected some of {', '.join(EVENT_TYPES)}")
    user = FeatureKinds.of(store.manifest, "users", options.user_features)
    item = FeatureKinds.of(store.manifest, "items", options.item_features)
    history = FeatureKinds.of(store.manifest, "items", options.history_features)
    variant = ops.load().dpsr_examples_dataset(
        users=_path(store, "users.dpsr"),
        items=_path(store, "items.dpsr"),
        interactions=[_path(store, name) for name in interactions_names(store.manifest["shards"])],
        batch_size=options.batch_size,
        titles=_path(store, "titles.dpsr"),
        vocabulary=_path(store, vocabulary_name()),
        num_title_queries=options.num_title_queries,
        pretrain_steps=options.pretrain_steps,
        title_subsampling=options.title_subsampling,
        title_typo_rate=options.title_typo_rate,
        query_typo_rate=options.query_typo_rate,
        num_shared_negatives=options.num_random_negatives,
        num_supervised_negatives=options.num_supervised_negatives,
        shuffle_buffer=options.shuffle_buffer,
        seed=options.seed,
        num_epochs=num_epochs or 0,
        shard_index=shard_index,
        num_shards=num_shards,
        first_step=first_step,
        num_own_negatives=options.num_own_negatives,
        own_negative_source=options.own_negative_source,
        user_fixed=user.fixed,
        user_lists=user.lists,
        item_fixed=item.fixed,
        item_lists=item.lists,
        history_length=options.history_length,
        history_types=sum(1 << EVENT_TYPES.index(event_type) for event_type in set(options.history_types)),
        history_text=options.history_text,
        history_fixed=history.fixed,
        history_lists=history.lists,
        query_history_length=options.query_history_length,
        negative_mask=options.negative_mask,
        num_parallel_calls=options.num_parallel_calls,
    )
    return _ExamplesDataset(variant, _element_spec(options, user, item, history))


def _element_spec(options: BatchOptions, user: FeatureKinds, item: FeatureKinds, history: FeatureKinds) -> Batch:
    b, r, m = options.batch_size, options.num_random_negatives, options.num_own_negatives
    n = b + r + b * m

    def spec(shape: list[int | None], dtype: tf.DType = tf.int32) -> tf.TensorSpec:
        return tf.TensorSpec(shape, dtype)

    def tokens(texts: int | None) -> Tokens:
        return Tokens(spec([None]), spec([None if texts is None else texts + 1], tf.int64))

    def features(rows: int | None, kinds: FeatureKinds) -> Features:
        return Features(spec([rows, len(kinds.fixed)]), tuple(tokens(rows) for _ in kinds.lists))

    return Batch(
        query=tokens(b),
        query_rows=spec([b]),
        item=tokens(n),
        item_rows=spec([n]),
        item_features=features(n, item),
        user_rows=spec([b]),
        user_features=features(b, user),
        history=History(
            items=tokens(b),
            types=spec([None]),
            text=tokens(None if options.history_text else 0),
            features=features(None, history),
            query_splits=spec([b + 1], tf.int64),
            query=tokens(None),
        ),
        weights=spec([b], tf.float32),
        labels=spec([b], tf.float32),
        types=spec([b]),
        negative_mask=spec([b, b + r if options.negative_mask else 0], tf.bool),
        own_negative_mask=spec([b, m], tf.bool),
    )


def _path(store: StoreFiles, name: str) -> str:
    # Not Path: it makes one slash of the two of "ram://".
    return str(store.path / name) if isinstance(store.path, Path) else f"{str(store.path).rstrip('/')}/{name}"


def training_input(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """A dataset of Batch as an Estimator's input_fn gives it: Estimator takes a tuple for (features, labels)."""
    return dataset.map(lambda batch: {"batch": batch})
