"""The schema file: which columns of which raw tables are the items, the users and the interactions.

    items:
      files: items.parquet
      id: item_id
      text: [title, brand]
    interactions:
      files: log/*.parquet
      query: query
      item: item_id

docs/data_format.md describes every key.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from dpsr_common.strict_yaml import read_yaml
from dpsr_common.typed_config import from_dict, option

FILES_HELP = "files, directories or globs, relative to the schema file or --input"
KINDS = ("categorical", "number", "multi", "text")
# Those with one code a row; the others have a list a row.
FIXED_KINDS = ("categorical", "number")
FILTER_KINDS = ("categorical", "number", "multi")
# What an interaction can be, in the order of the codes that a store holds.
EVENT_TYPES = ("impression", "skip", "click", "cart", "order")


@dataclasses.dataclass(frozen=True)
class Feature:
    """One feature of items or users; a bare column name is a categorical one."""

    column: str = dataclasses.field(metadata={"help": "the column it is read from"})
    name: str | None = option(None, "its name in config and store, at most 16 bytes; the column's if left out")
    kind: str = option("categorical", "what the column holds", choices=KINDS)
    boundaries: tuple[float, ...] = option((), "of kind number: ascending upper ends of the buckets, each excluded")
    separator: str | None = option(None, "of kind multi: what stands between values; a list column needs none")
    max_values: int = option(1_000_000, "values that get a code of their own, the most frequent ones", 1, 2**30)
    vocabulary: str | None = option(None, "of kind text: one of `vocabularies`; that of the item text if left out")

    SHORTHAND = "column"

    @property
    def key(self) -> str:
        """The name in config and store."""
        return self.name or self.column

    def problem(self) -> str | None:
        """What is wrong with values that are each allowed but do not go together."""
        if len(self.key.encode()) > _LONGEST_FEATURE:
            return f"name is '{self.key}', expected at most {_LONGEST_FEATURE} bytes; give another with `name`"
        if "." in self.key:
            return f"name is '{self.key}', expected a name without a dot; give another with `name`"
        if not all(map(math.isfinite, self.boundaries)):
            return f"boundaries is {list(self.boundaries)}, expected finite numbers"
        if (self.kind == "number") != bool(self.boundaries):
            return (
                f"boundaries is {list(self.boundaries)} and kind {self.kind}, but they go with kind number, and only so"
            )
        if any(low >= high for low, high in itertools.pairwise(self.boundaries)):
            return f"boundaries is {list(self.boundaries)}, expected ascending numbers"
        if separator := _separator_problem(self):
            return separator
        if self.vocabulary is not None and self.kind != "text":
            return f"vocabulary is {self.vocabulary} and kind {self.kind}, but it goes with kind text only"
        return None


@dataclasses.dataclass(frozen=True)
class Filter:
    """One attribute that searches may filter items by; a bare column name is a categorical one.

    The model reads nothing of it: a column that it should read is a feature, too.
    """

    column: str = dataclasses.field(metadata={"help": "the column it is read from"})
    name: str | None = option(None, "its name in requests, at most 16 bytes; the column's if left out")
    kind: str = option("categorical", "what the column holds", choices=FILTER_KINDS)
    separator: str | None = option(None, "of kind multi: what stands between values; a list column needs none")

    SHORTHAND = "column"
    # As of a feature all of whose values have a code.
    max_values: ClassVar[int] = 2**30

    @property
    def key(self) -> str:
        """The name in requests and store."""
        return self.name or self.column

    def problem(self) -> str | None:
        """What is wrong with values that are each allowed but do not go together."""
        if not self.key or "." in self.key or "=" in self.key or len(self.key.encode()) > _LONGEST_FEATURE:
            return (
                f"name is '{self.key}', expected at most {_LONGEST_FEATURE} bytes without a dot or =; "
                f"give another with `name`"
            )
        return _separator_problem(self)


@dataclasses.dataclass(frozen=True)
class ItemsSchema:
    """The item table: one row an item."""

    files: tuple[str, ...] = dataclasses.field(metadata={"help": FILES_HELP})
    id: str = dataclasses.field(metadata={"help": "column of the item id, unique: int64 from 0 on, or text"})
    text: tuple[str, ...] = dataclasses.field(metadata={"help": "columns whose text the item tower reads"})
    title: str | None = option(None, "column shown to people; the first text column if left out")
    popularity: str | None = option(None, "column of a number, 0 or more; clicks in the log if left out")
    features: tuple[Feature, ...] = option((), "brand, category, price, ...")
    filters: tuple[Filter, ...] = option((), "what searches may filter by: brand, shop, price, in stock, ...")

    def problem(self) -> str | None:
        """What is wrong with the whole."""
        return _repeated("features", self.features) or _repeated("filters", self.filters)


@dataclasses.dataclass(frozen=True)
class UsersSchema:
    """The user table: one row a user."""

    files: tuple[str, ...] = dataclasses.field(metadata={"help": FILES_HELP})
    id: str = dataclasses.field(metadata={"help": "column of the user id, unique: int64 from 0 on, or text"})
    features: tuple[Feature, ...] = option((), "profile features")

    def problem(self) -> str | None:
        """What is wrong with the whole."""
        return _repeated("features", self.features)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What is kept from training, for `dpsr evaluate` and validation. Give one of the keys."""

    after: str | None = dataclasses.field(
        default=None,
        metadata={"help": "interactions from this time on: ISO 8601 (UTC), or a number in time_unit", "numbers": True},
    )
    last_days: float | None = option(None, "interactions of the last so many days of the log", 0, 36_500)
    query_share: float | None = option(None, "all interactions of this share of the queries, by a hash", 0, 0.5)

    def problem(self) -> str | None:
        """What is wrong with the whole."""
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]
        return None if len(given) == 1 else f"{', '.join(given) or 'nothing'} is given, expected exactly one key"


@dataclasses.dataclass(frozen=True)
class InteractionsSchema:
    """The interaction table: one row an impression, a click, an order, or a judgment."""

    files: tuple[str, ...] = dataclasses.field(metadata={"help": FILES_HELP})
    query: str = dataclasses.field(metadata={"help": "column of the query text"})
    item: str = dataclasses.field(metadata={"help": "column of the item id"})
    user: str | None = option(None, "column of the user id, empty or -1 is anonymous; all are if left out")
    type: str | None = option(None, "column of the type; every row is a click if left out")
    types: dict[str, str] = option({}, "what each value of that column means: impression, skip, click, cart, order")
    positive_types: tuple[str, ...] = option(("click", "cart", "order"), "types that make a positive pair")
    type_weights: dict[str, float] = option({}, "weight in the loss by type, times that of `weight`; 1 if left out")
    time: str | None = option(None, "column of the time: a timestamp, ISO 8601 (UTC if it does not say), or a number")
    time_unit: str = option("s", "of a number: since 1970, UTC", choices=("s", "ms", "us"))
    session: str | None = option(None, "column of the session: its impressions and clicks of one query are one request")
    position: str | None = option(None, "column of the rank at which the item was shown, 1 or more")
    weight: str | None = option(None, "column of the weight in the loss; 1 if left out")
    label: str | None = option(None, "column of the label, of humans or graded; then it, not the type, decides")
    positive_from: float = option(1.0, "labels of this and above are positive pairs")
    negative_to: float | None = option(None, "labels of this and below are supervised negatives (section 4.5)")
    held_out: HeldOut | None = option(None, "what is kept from training")

    def problem(self) -> str | None:
        """What is wrong with the whole."""
        if self.negative_to is not None and self.negative_to >= self.positive_from:
            return (
                f"negative_to is {self.negative_to:g} and positive_from {self.positive_from:g}, "
                f"expected negative_to below positive_from"
            )
        if self.negative_to is not None and self.label is None:
            return (
                f"negative_to is {self.negative_to:g}, but no label to compare is named; "
                f"name its column, or leave negative_to out"
            )
        for key, names in (
            ("types", self.types.values()),
            ("positive_types", self.positive_types),
            ("type_weights", self.type_weights),
        ):
            for name in names:
                if name not in EVENT_TYPES:
                    return f"{key} names '{name}', expected one of {', '.join(EVENT_TYPES)}"
        for name, weight in self.type_weights.items():
            if not 0 <= weight <= 1e6:
                return f"type_weights: {name} is {weight:g}, expected 0 to 1000000"
        if self.types and self.type is None:
            return "types is given, but no column of the type is named; name it with `type`, or leave types out"
        timed = self.held_out is not None and self.held_out.query_share is None
        if timed and self.time is None:
            return "held_out goes by time, but no column of the time is named; name it with `time`, or use query_share"
        return None


@dataclasses.dataclass(frozen=True)
class TokenizerSchema:
    """What tokens a text becomes; the names are those of dpsr_tokenizer.TokenizerConfig."""

    word_unigrams: bool = option(True, "words of alphabetic scripts")
    word_bigrams: bool = option(False, "pairs of neighbouring words")
    letter_trigrams: bool = option(True, "#-marked letter trigrams of words")
    char_unigrams: bool = option(True, "characters of scripts written without spaces")
    char_bigrams: bool = option(True, "pairs of neighbouring characters of such scripts")
    number_parts: bool = option(True, "the parts of words of letters and digits: 12mm as 12 and mm too")
    markers: bool = option(False, "<s> and </s> around each text")

    def problem(self) -> str | None:
        """What is wrong with the whole."""
        words = self.word_unigrams or self.word_bigrams or self.letter_trigrams
        if words or self.char_unigrams or self.char_bigrams:
            return None
        return "every kind of token is off, expected at least one of words, trigrams and characters"


@dataclasses.dataclass(frozen=True)
class VocabularySchema:
    """Which tokens get an id of their own."""

    min_count: int = option(1, "tokens seen less often share the buckets", 1)
    max_size: int = option(1_000_000, "most frequent tokens that get an id of their own", 1, 2**30)
    num_oov_buckets: int = option(1024, "hash buckets for all other tokens; 0 drops them", 0, 2**24)


@dataclasses.dataclass(frozen=True)
class FeatureVocabulary:
    """Tokenizer and vocabulary of text features that do not share those of query and item text."""

    tokenizer: TokenizerSchema = dataclasses.field(default_factory=TokenizerSchema)
    vocabulary: VocabularySchema = dataclasses.field(default_factory=VocabularySchema)


@dataclasses.dataclass(frozen=True)
class Schema:
    """All of it."""

    items: ItemsSchema
    interactions: InteractionsSchema
    users: UsersSchema | None = None
    tokenizer: TokenizerSchema = dataclasses.field(default_factory=TokenizerSchema)
    vocabulary: VocabularySchema = dataclasses.field(default_factory=VocabularySchema)
    vocabularies: dict[str, FeatureVocabulary] = option({}, "further tokenizers and vocabularies, for text features")

    def problem(self) -> str | None:
        """What is wrong with the whole."""
        for section, features in (("items", self.items.features), ("users", self.users.features if self.users else ())):
            for feature in features:
                if feature.vocabulary is not None and feature.vocabulary not in self.vocabularies:
                    known = ", ".join(self.vocabularies) or "none"
                    return (
                        f"{section}: feature {feature.key} has vocabulary '{feature.vocabulary}', "
                        f"expected one of `vocabularies`: {known}"
                    )
        for name in self.vocabularies:
            if not name.isidentifier():
                return f"vocabularies: '{name}' becomes part of a file's name, expected letters, digits and _"
        if self.interactions.user is not None and self.users is None:
            return (
                f"interactions: user is '{self.interactions.user}', but there is no section users; "
                f"add one or leave user out"
            )
        return None


def _repeated(key: str, features: Sequence[Feature | Filter]) -> str | None:
    keys = [feature.key for feature in features]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    return f"{key} has {twice[0]} twice, expected each name once; give one another `name`" if twice else None


def _separator_problem(column: Feature | Filter) -> str | None:
    if column.separator == "":
        return "separator is '', expected what stands between two values, for example '|'"
    if column.separator is not None and column.kind != "multi":
        return f"separator is {column.separator!r} and kind {column.kind}, but it goes with kind multi only"
    return None


# A section "feature.<name>.splits" of a packed file has at most 31 bytes.
_LONGEST_FEATURE = 31 - len("feature.") - len(".splits")


def load_schema(path: str | Path) -> Schema:
    """Reads a schema file. Raises UsageError (no file, no YAML, or a key or value that is not allowed)."""
    return from_dict(Schema, read_yaml(path), str(path))
