"""The input of the towers: which features they read, how many values these have, and the tensors that carry them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from dpsr_common.errors import UsageError
from dpsr_common.typed_config import option
from dpsr_tf.config import ModelConfig
from dpsr_tf.data.schema import CODED_KINDS as CODED_KINDS
from dpsr_tf.data.schema import FIXED_KINDS as FIXED_KINDS
from dpsr_tf.data.schema import KINDS

if TYPE_CHECKING:
    import tensorflow as tf

    from dpsr_tf.data.examples_dataset import Batch, Features, Graph, History, Tokens

# What a number may depend on; RankingFeatures.kinds has the same names.
NUMBER_KINDS = ("item", "request", "pair")


@dataclasses.dataclass(frozen=True)
class Feature:
    """One feature that a tower reads, as the store codes it."""

    name: str
    kind: str = option("categorical", "kind of the feature", choices=KINDS)
    num_ids: int = option(
        1,
        "number of codes, 0 to num_ids - 1; for kind text, number of token ids of its vocabulary; for kind vector, its "
        "length",
        1,
    )
    vocabulary: str | None = option(
        None, "for kind text, name of its vocabulary; by default the vocabulary of query and item text"
    )


@dataclasses.dataclass(frozen=True)
class Number:
    """One number that a ranker reads, and how it is scaled.

    A value x becomes (sign(x) log(1 + |x| / unit) - mean) / std, cut at -CUT and CUT; a missing one becomes 0.
    """

    CUT: ClassVar[float] = 5.0

    name: str
    kind: str = option("pair", "what it depends on: the item, query and user (request), or both", choices=NUMBER_KINDS)
    unit: float = option(1.0, "median of the values' sizes, without zeros")
    mean: float = option(0.0, "mean of the logarithms")
    std: float = option(1.0, "standard deviation of the logarithms")
    may_miss: bool = option(False, "whether some values are missing; the ranker then reads that, too, as 0 or 1")


@dataclasses.dataclass(frozen=True)
class SequenceSpec:
    """The sequences of words of a store, as a rewriter must know them."""

    num_words: int = option(4, "number of words of the sequence vocabulary, the four reserved ones among them", 4)
    num_pieces: int = option(16_384, "number of values of a piece of a word; 0 is padding", 2)
    max_pieces: int = option(12, "largest number of pieces of a word", 1)
    query_words: int = option(12, "largest number of words of a query, with its end", 2)
    title_words: int = option(24, "largest number of words of a title, with its end", 2)


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """What a model must know about a store: its features, in the order in which a batch holds them.

    It is saved with a checkpoint (to_dict and from_dict of dpsr_common.typed_config), so that the towers can be built
    without the store.
    """

    num_tokens: int = option(1, "number of token ids of the vocabulary of query and item text", 1)
    user: tuple[Feature, ...] = option((), "profile features that the query tower reads")
    item: tuple[Feature, ...] = option((), "features that the item tower reads beside the text")
    numbers: tuple[Number, ...] = option((), "numbers that a ranker reads")
    graph: tuple[Feature, ...] = option((), "item features whose values are nodes of the click graph")
    sequences: SequenceSpec = dataclasses.field(default_factory=SequenceSpec)

    ALL: ClassVar[str] = "*"

    def numbers_of(self, kind: str) -> tuple[Number, ...]:
        """Returns the numbers of a kind, one of NUMBER_KINDS."""
        return tuple(number for number in self.numbers if number.kind == kind)

    @staticmethod
    def choose(
        config: ModelConfig,
        features: Mapping[str, Sequence[Mapping[str, Any]]],
        num_ids: Mapping[str | None, int],
        attributes: Sequence[str] | None = None,
    ) -> FeatureSpec:
        """Looks up the features that a config names among the features of a store.

        Args:
            config: names them in `user_features` and `item_features`.
            features: `features` of a store's manifest.
            num_ids: number of token ids by vocabulary of the store; None is the vocabulary of query and item text.
            attributes: the attributes of the store's click graph; None if it has no graph.

        Raises:
            UsageError: the store has no feature of that name, or one is named twice; or it has no graph to read.
        """
        if config.graph_fan_out and attributes is None:
            raise UsageError(
                f"model.graph_fan_out is {list(config.graph_fan_out)}, but the store has no click graph; add the "
                f"section graph to its schema and ingest again"
            )

        def chosen(side: str, key: str, names: tuple[str, ...]) -> tuple[Feature, ...]:
            known = {feature["name"]: feature for feature in features.get(side, ())}
            names = tuple(known) if names == (FeatureSpec.ALL,) else names
            for i, name in enumerate(names):
                if name not in known:
                    raise UsageError(
                        f"model.{key} names '{name}', which the store's {side} do not have, "
                        f"expected some of {', '.join(known) or 'none: its schema declares no features there'}"
                    )
                if name in names[:i]:
                    raise UsageError(f"model.{key} names '{name}' twice, expected each feature once")
            return tuple(_feature(known[name], num_ids) for name in names)

        return FeatureSpec(
            num_tokens=num_ids[None],
            user=chosen("users", "user_features", config.user_features),
            item=chosen("items", "item_features", config.item_features),
            graph=chosen("items", "graph_fan_out", tuple(attributes or ()) if config.graph_fan_out else ()),
        )


def _feature(known: Mapping[str, Any], num_ids: Mapping[str | None, int]) -> Feature:
    vocabulary = known.get("vocabulary")
    kind = known["kind"]
    ids = num_ids[vocabulary] if kind == "text" else known["num_values"] + (kind in CODED_KINDS)
    return Feature(known["name"], kind, ids, vocabulary)


class Lists(NamedTuple):
    """Input of a ranker: b requests, and n items to be ranked for them, those of a request one after another.

    Items are those to be ranked and those of histories. Each of the u distinct ones is there once.
    """

    query: Tokens  # b texts
    user: Features  # of the b users, in the order of FeatureSpec.user
    item_text: Tokens  # of the u items
    item_features: Features  # of the u items, in the order of FeatureSpec.item
    candidates: Tokens  # values int32 [n], places in the u items; row_splits int64 [b + 1]
    history: Tokens  # values int32 [h], places in the u items, oldest event first; row_splits int64 [b + 1]
    history_types: tf.Tensor  # int32 [h], index in EVENT_TYPES
    item_numbers: tf.Tensor  # float32 [n, numbers of kind item], NaN where there is none
    request_numbers: tf.Tensor  # float32 [b, numbers of kind request]
    pair_numbers: tf.Tensor  # float32 [n, numbers of kind pair]

    @property
    def items(self) -> ItemFeatures:
        """The u items, without neighbourhoods."""
        return ItemFeatures(self.item_text, self.item_features)


class RankingBatch(NamedTuple):
    """A training batch of a ranker: requests with two different outcomes at least."""

    lists: Lists
    outcomes: tf.Tensor  # int32 [n], place in OUTCOMES of request_log.py
    positions: tf.Tensor  # int32 [n], from 1 on; 0 is unknown
    requests: tf.Tensor  # int64 [b], numbers of the requests in the store


class QueryFeatures(NamedTuple):
    """Input of the query tower for b queries. Parts that its config does not name may be None."""

    text: Tokens  # b texts
    user: Features | None = None  # of the b users, in the order of FeatureSpec.user
    history: History | None = None
    graph: Graph | None = None  # their neighbourhoods; None for queries without neighbours
    context: tf.Tensor | None = None  # float32 [b, token_dim], TwoTower.query_context, in the place of `graph`

    @staticmethod
    def of(batch: Batch) -> QueryFeatures:
        """Returns the queries of a training batch."""
        return QueryFeatures(batch.query, batch.user_features, batch.history, *batch.graph)


class ItemFeatures(NamedTuple):
    """Input of the item tower for n items. The query tower reads the items of a history in the same form."""

    text: Tokens  # n texts
    features: Features | None = None  # of the n items, in the order of FeatureSpec.item
    graph: Graph | None = None  # their neighbourhoods; None for items without neighbours

    @staticmethod
    def of(batch: Batch) -> ItemFeatures:
        """Returns the items of a training batch: positives, random negatives, each pair's own negatives."""
        return ItemFeatures(batch.item, batch.item_features, *batch.graph)
