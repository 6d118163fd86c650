"""The schema file, which says which columns of which raw tables hold the items, the users and the interactions.

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

FILES_HELP = "files, directories or glob patterns, relative to --input or, without it, to the schema file"
KINDS = ("categorical", "number", "multi", "text", "vector")
# Kinds with one code per row. The others have a list per row.
FIXED_KINDS = ("categorical", "number")
# Kinds whose codes have embeddings. A text has token ids, a vector is read as it is.
CODED_KINDS = ("categorical", "number", "multi")
# Kinds whose codes stand for values that are texts. The codes of numbers stand for buckets.
VALUE_KINDS = ("categorical", "multi")
FILTER_KINDS = ("categorical", "number", "multi")
# The types of interactions. A store holds their positions in this list.
EVENT_TYPES = ("impression", "skip", "click", "cart", "order")
# The types that a grade can stand for, from the lowest on.
GRADED = ("click", "cart", "order")
# What a store with requests counts events of, beside the attributes of the section `ranking`.
COUNTED = ("item", "query_item", "all")


@dataclasses.dataclass(frozen=True)
class Feature:
    """One feature of items or users. A column name alone stands for a categorical feature."""

    column: str = dataclasses.field(metadata={"help": "column that holds the values"})
    name: str | None = option(
        None, "name of the feature in config and store, at most 16 bytes; default: the name of the column"
    )
    kind: str = option("categorical", "kind of the values", choices=KINDS)
    boundaries: tuple[float, ...] = option(
        (), "for kind number: ascending bounds of the buckets; a bound belongs to the bucket above it"
    )
    separator: str | None = option(
        None, "for kinds multi and vector: text between two values of a cell; not needed if the column holds lists"
    )
    length: int | None = option(None, "for kind vector: number of values in each row", 1, 65_536)
    max_values: int = option(
        1_000_000, "largest number of values with a code of their own; the most frequent values get one", 1, 2**30
    )
    vocabulary: str | None = option(
        None, "for kind text: name of an entry of `vocabularies`; default: the vocabulary of the item text"
    )

    SHORTHAND = "column"

    @property
    def key(self) -> str:
        """The name of the feature in config and store."""
        return self.name or self.column

    def problem(self) -> str | None:
        """Describes values that are allowed one by one but not together; None if there are none."""
        if len(self.key.encode()) > _LONGEST_FEATURE:
            return f"name is '{self.key}', expected at most {_LONGEST_FEATURE} bytes; give another with `name`"
        if "." in self.key:
            return f"name is '{self.key}', expected a name without a dot; give another with `name`"
        if not all(map(math.isfinite, self.boundaries)):
            return f"boundaries is {list(self.boundaries)}, expected finite numbers"
        if (self.kind == "number") != bool(self.boundaries):
            return (
                f"boundaries is {list(self.boundaries)} and kind is {self.kind}: "
                f"kind number needs boundaries, other kinds cannot have them"
            )
        if any(low >= high for low, high in itertools.pairwise(self.boundaries)):
            return f"boundaries is {list(self.boundaries)}, expected ascending numbers"
        if (self.kind == "vector") != (self.length is not None):
            return f"length is {self.length} and kind is {self.kind}: kind vector needs a length, other kinds have none"
        if separator := _separator_problem(self, ("multi", "vector")):
            return separator
        if self.vocabulary is not None and self.kind != "text":
            return f"vocabulary is {self.vocabulary} and kind is {self.kind}: only kind text can have a vocabulary"
        return None


@dataclasses.dataclass(frozen=True)
class Filter:
    """One attribute that searches can filter items by. A column name alone stands for a categorical attribute.

    The model does not read filters. If it should read the column, name the column under `features`, too.
    """

    column: str = dataclasses.field(metadata={"help": "column that holds the values"})
    name: str | None = option(
        None, "name of the attribute in requests, at most 16 bytes; default: the name of the column"
    )
    kind: str = option("categorical", "kind of the values", choices=FILTER_KINDS)
    separator: str | None = option(
        None, "for kind multi: text between two values of a cell; not needed if the column holds lists"
    )

    SHORTHAND = "column"
    # Every value of a filter has a code.
    max_values: ClassVar[int] = 2**30

    @property
    def key(self) -> str:
        """The name of the attribute in requests and store."""
        return self.name or self.column

    def problem(self) -> str | None:
        """Describes values that are allowed one by one but not together; None if there are none."""
        if not self.key or "." in self.key or "=" in self.key or len(self.key.encode()) > _LONGEST_FEATURE:
            return (
                f"name is '{self.key}', expected at most {_LONGEST_FEATURE} bytes without a dot or =; "
                f"give another with `name`"
            )
        return _separator_problem(self, ("multi",))


@dataclasses.dataclass(frozen=True)
class ItemsSchema:
    """The item table, with one row per item."""

    files: tuple[str, ...] = dataclasses.field(metadata={"help": FILES_HELP})
    id: str = dataclasses.field(
        metadata={"help": "column with the item id, which is unique: a whole number of 0 or more (int64), or text"}
    )
    text: tuple[str, ...] = dataclasses.field(
        metadata={"help": "columns with the text of the item; the item tower reads them joined by spaces"}
    )
    title: str | None = option(None, "column with the title that people see; default: the first column of `text`")
    popularity: str | None = option(
        None, "column with the popularity, a number of 0 or more; default: the item's positive pairs in the log"
    )
    features: tuple[Feature, ...] = option(
        (), "item features that the model can read, such as brand, category and price"
    )
    filters: tuple[Filter, ...] = option(
        (), "attributes that searches can filter by, such as brand, price and whether the item is in stock"
    )
    searched: tuple[str, ...] = option(
        (), "further columns with text that only the inverted index reads, such as bullet points; see docs/search.md"
    )
    identifiers: tuple[str, ...] = option(
        (), "columns with an identifier, such as the model number: a query that equals one finds the items with it"
    )
    group: str | None = option(
        None, "column with the group of the item's variants, such as its colours; a search can show one of each group"
    )

    @property
    def text_names(self) -> dict[str, str]:
        """Column of `text` -> its name in encoded rows and in titles.dpsr: `title`, or `text` and a number."""
        title = self.title or self.text[0]
        columns = dict.fromkeys(self.text)
        return {column: "title" if column == title else f"text{i}" for i, column in enumerate(columns)}

    @property
    def search_names(self) -> dict[str, str]:
        """Name in encoded rows and in titles.dpsr -> column, of the texts that only searches read.

        The names are `searched0`, ..., `identifier0`, ..., and `variants` for the group.
        """
        names = {f"searched{i}": column for i, column in enumerate(dict.fromkeys(self.searched))}
        names |= {f"identifier{i}": column for i, column in enumerate(dict.fromkeys(self.identifiers))}
        return names | ({"variants": self.group} if self.group is not None else {})

    def problem(self) -> str | None:
        """Describes values that are allowed one by one but not together; None if there are none."""
        return _repeated("features", self.features) or _repeated("filters", self.filters)


@dataclasses.dataclass(frozen=True)
class UsersSchema:
    """The user table, with one row per user."""

    files: tuple[str, ...] = dataclasses.field(metadata={"help": FILES_HELP})
    id: str = dataclasses.field(
        metadata={"help": "column with the user id, which is unique: a whole number of 0 or more (int64), or text"}
    )
    features: tuple[Feature, ...] = option((), "profile features that the model can read, such as age and gender")

    def problem(self) -> str | None:
        """Describes values that are allowed one by one but not together; None if there are none."""
        return _repeated("features", self.features)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Interactions that are kept out of training, for validation and `dpsr evaluate`. Give exactly one of the keys."""

    after: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "hold out interactions from this time on: ISO 8601 text (UTC by default) or a number in time_unit",
            "numbers": True,
        },
    )
    last_days: float | None = option(
        None, "hold out the interactions of this many days at the end of the log", 0, 36_500
    )
    query_share: float | None = option(
        None, "hold out all interactions of this share of the queries, which a hash of the query chooses", 0, 0.5
    )

    def problem(self) -> str | None:
        """Describes values that are allowed one by one but not together; None if there are none."""
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]
        return None if len(given) == 1 else f"{' and '.join(given) or 'no key'} given, expected exactly one key"


@dataclasses.dataclass(frozen=True)
class InteractionsSchema:
    """The interaction table, with one row per impression, click, order or judgment."""

    files: tuple[str, ...] = dataclasses.field(metadata={"help": FILES_HELP})
    query: str = dataclasses.field(metadata={"help": "column with the query text"})
    item: str = dataclasses.field(metadata={"help": "column with the item id"})
    user: str | None = option(
        None, "column with the user id; empty and -1 mean an anonymous user; default: all users are anonymous"
    )
    type: str | None = option(None, "column with the type of the interaction; default: every row is a click")
    types: dict[str, str] = option(
        {},
        "meaning of each value in the column `type`: impression, skip, click, cart or order (these need no entry)",
    )
    positive_types: tuple[str, ...] = option(("click", "cart", "order"), "types that make a row a positive pair")
    type_weights: dict[str, float] = option(
        {}, "weight in the loss for each type, multiplied by `weight`; types that are not named have weight 1"
    )
    time: str | None = option(
        None, "column with the time: a timestamp, ISO 8601 text (UTC unless it has a zone), or a number"
    )
    time_unit: str = option(
        "s", "unit of times that are numbers; they count from 1970-01-01 in UTC", choices=("s", "ms", "us")
    )
    session: str | None = option(
        None, "column with the session; rows with the same session, user and query form one request"
    )
    session_gap: float = option(
        30.0,
        "minutes without a row after which the same user and query begin a new request; for rows without a session. "
        "A request of anonymous users also ends so many minutes after its first row",
        0,
        1e6,
    )
    position: str | None = option(None, "column with the position at which the item was shown, from 1 on")
    weight: str | None = option(None, "column with the weight in the loss; default: weight 1")
    label: str | None = option(
        None,
        "column with a relevance label, such as a human grade; a label wins over the clicks for its query and item, "
        "and a row without a label counts by its type",
    )
    positive_from: float = option(1.0, "lowest label that makes a row a positive pair")
    negative_to: float | None = option(
        None, "highest label that makes a row a supervised negative (section 4.5); default: no label does"
    )
    mined_negatives: int = option(
        0,
        "largest number of items per query that become supervised negatives because they were shown often and never "
        "clicked; 0 turns this off",
        0,
        10_000,
    )
    mined_from: float = option(
        3.0,
        "for mined_negatives: the item was shown so often, and at such positions, that this many clicks were expected",
        0.1,
        1e6,
    )
    held_out: HeldOut | None = option(None, "interactions that are kept out of training")

    def problem(self) -> str | None:
        """Describes values that are allowed one by one but not together; None if there are none."""
        if self.negative_to is not None and self.negative_to >= self.positive_from:
            return (
                f"negative_to is {self.negative_to:g} and positive_from is {self.positive_from:g}, "
                f"expected negative_to below positive_from"
            )
        if self.negative_to is not None and self.label is None:
            return (
                f"negative_to is {self.negative_to:g}, but there is no column of labels; "
                f"name it with `label`, or leave negative_to out"
            )
        for key, names in (
            ("types", self.types.values()),
            ("positive_types", self.positive_types),
            ("type_weights", self.type_weights),
        ):
            for name in names:
                if name not in EVENT_TYPES:
                    return f"{key} has '{name}', expected one of {', '.join(EVENT_TYPES)}"
        for name, weight in self.type_weights.items():
            if not 0 <= weight <= 1e6:
                return f"type_weights: {name} is {weight:g}, expected 0 to 1000000"
        if self.mined_negatives and self.type is None:
            return (
                f"mined_negatives is {self.mined_negatives}, which needs a column with the type of each interaction; "
                f"name it with `type`, or leave mined_negatives out"
            )
        if self.types and self.type is None:
            return "types is given, but there is no column with the type; name it with `type`, or leave types out"
        timed = self.held_out is not None and self.held_out.query_share is None
        if timed and self.time is None:
            return "held_out needs times, but there is no column with the time; name it with `time`, or use query_share"
        return None


@dataclasses.dataclass(frozen=True)
class RankingSchema:
    """What a ranker needs: whole requests, numbers, and counts as of each request (docs/ranking.md)."""

    attributes: tuple[str, ...] = option(
        (),
        "categorical item features whose items are counted together, such as brand, shop and category: impressions, "
        "clicks, carts and orders of all items with the same value",
    )
    brand: str | None = option(
        None, "categorical item feature with the brand, which is looked for in queries; default: no brand is looked for"
    )
    price: str | None = option(
        None, "item feature of kind number with the price; default: what users spend is not computed"
    )
    smoothing_impressions: float = option(
        20.0, "number of impressions at the global rate that are added to each click-through rate", 0, 1e9
    )
    smoothing_clicks: float = option(
        20.0, "number of clicks at the global rate that are added to each conversion rate", 0, 1e9
    )
    grades: dict[str, float] = option(
        {},
        "for judged lists in place of a log: the lowest label that counts as a click, as a cart and as an order; the "
        "judged items of a query then form one request, and nothing is counted",
    )

    def problem(self) -> str | None:
        """Describes values that are allowed one by one but not together; None if there are none."""
        for name in self.grades:
            if name not in GRADED:
                return f"grades has '{name}', expected one of {', '.join(GRADED)}"
        ladder = [self.grades[name] for name in GRADED if name in self.grades]
        if any(low >= high for low, high in itertools.pairwise(ladder)):
            return f"grades is {self.grades}, expected numbers that rise from click to cart to order"
        for name in self.attributes:
            if name in COUNTED:
                return f"attributes has '{name}', a name that the store uses itself; give the feature another `name`"
            if self.attributes.count(name) > 1:
                return f"attributes has '{name}' twice, expected each feature once"
        return None


@dataclasses.dataclass(frozen=True)
class GraphSchema:
    """The click graph of queries, items and attributes of items (docs/graph.md)."""

    attributes: tuple[str, ...] = option(
        (), "categorical item features whose values are nodes of the graph, such as brand, shop and category"
    )
    max_edges: int = option(
        1000, "largest number of edges that a node keeps in each direction; the strongest ones are kept", 1, 1_000_000
    )

    def problem(self) -> str | None:
        """Describes values that are allowed one by one but not together; None if there are none."""
        for name in self.attributes:
            if self.attributes.count(name) > 1:
                return f"attributes has '{name}' twice, expected each feature once"
        return None


@dataclasses.dataclass(frozen=True)
class RewritingSchema:
    """What a rewriter needs: words in their order, and pairs of queries that mean the same (docs/rewriting.md)."""

    max_words: int = option(
        16_384, "largest number of words with an id of their own; the most frequent ones get one", 1, 2**20
    )
    min_count: int = option(
        2, "smallest number of titles and queries, together, in which a word gets an id of its own", 1
    )
    max_query_words: int = option(12, "number of words of a query that are kept, with the end of the query", 2, 128)
    max_title_words: int = option(24, "number of words of a title that are kept, with the end of the title", 2, 512)
    min_similarity: float = option(
        0.05, "smallest cosine between the clicks of two queries with which they become a pair (0 to 1)", 0, 1
    )
    meaning_share: float = option(
        0.8,
        "a word of queries asks for a word of titles if at least this share of the clicks for it go to titles with the "
        "word (0 to 1); the two queries of a pair ask for the same. 0 turns this filter off",
        0,
        1,
    )
    max_pairs: int = option(
        20, "largest number of pairs that a query has as their source; the strongest ones are kept", 0, 10_000
    )
    max_queries_per_item: int = option(
        100, "number of an item's queries, those with the most clicks, that are compared with one another", 1, 10_000
    )
    reformulation_minutes: float = option(
        5.0,
        "longest time between two queries of a session with which the second counts as a rewrite; 0 turns this off",
        0,
        1440,
    )
    min_reformulations: int = option(
        2, "smallest number of times that a query must follow another with which they become a pair", 1, 1_000_000
    )
    min_lift: float = option(
        10.0,
        "smallest lift with which two queries become a pair: how many times as often the second query follows the "
        "first one as it follows any query",
        0,
        1e9,
    )


@dataclasses.dataclass(frozen=True)
class TokenizerSchema:
    """The kinds of tokens that a text is split into. They have the names of dpsr_tokenizer.TokenizerConfig."""

    word_unigrams: bool = option(True, "words of scripts with letters")
    word_bigrams: bool = option(False, "pairs of neighbouring words")
    letter_trigrams: bool = option(True, "three neighbouring letters of a word, where # stands for its two ends")
    char_unigrams: bool = option(True, "single characters of scripts that are written without spaces, such as Chinese")
    char_bigrams: bool = option(True, "pairs of neighbouring characters of scripts that are written without spaces")
    number_parts: bool = option(
        True, "parts of words with letters and digits, beside the word: 12mm also gives 12 and mm"
    )
    markers: bool = option(False, "tokens <s> and </s> at the beginning and end of each text")

    def problem(self) -> str | None:
        """Describes values that are allowed one by one but not together; None if there are none."""
        words = self.word_unigrams or self.word_bigrams or self.letter_trigrams
        if words or self.char_unigrams or self.char_bigrams:
            return None
        return "all kinds of tokens are off, expected at least one of words, trigrams and characters"


@dataclasses.dataclass(frozen=True)
class VocabularySchema:
    """The tokens that get an id of their own. All other tokens share hash buckets."""

    min_count: int = option(1, "smallest number of occurrences with which a token gets an id of its own", 1)
    max_size: int = option(
        1_000_000, "largest number of tokens with an id of their own; the most frequent ones get one", 1, 2**30
    )
    num_oov_buckets: int = option(1024, "number of hash buckets for all other tokens; 0 drops these tokens", 0, 2**24)


@dataclasses.dataclass(frozen=True)
class FeatureVocabulary:
    """A tokenizer and vocabulary for text features, apart from those of query and item text."""

    tokenizer: TokenizerSchema = dataclasses.field(default_factory=TokenizerSchema)
    vocabulary: VocabularySchema = dataclasses.field(default_factory=VocabularySchema)


@dataclasses.dataclass(frozen=True)
class Schema:
    """The whole schema file."""

    items: ItemsSchema
    interactions: InteractionsSchema | None = None
    users: UsersSchema | None = None
    ranking: RankingSchema | None = None
    graph: GraphSchema | None = None
    rewriting: RewritingSchema | None = None
    tokenizer: TokenizerSchema = dataclasses.field(default_factory=TokenizerSchema)
    vocabulary: VocabularySchema = dataclasses.field(default_factory=VocabularySchema)
    vocabularies: dict[str, FeatureVocabulary] = option(
        {}, "further tokenizers and vocabularies for text features, by name"
    )

    def problem(self) -> str | None:
        """Describes values that are allowed one by one but not together; None if there are none."""
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
                return f"vocabularies: the name '{name}' becomes part of a file name, expected letters, digits and _"
        if self.interactions is not None and self.interactions.user is not None and self.users is None:
            return (
                f"interactions: user is '{self.interactions.user}', but there is no section `users`; "
                f"add one, or leave user out"
            )
        return self._graph_problem() or (self._ranking_problem() if self.ranking is not None else None)

    def _graph_problem(self) -> str | None:
        known = [feature.key for feature in self.items.features if feature.kind == "categorical"]
        for name in self.graph.attributes if self.graph else ():
            if name not in known:
                return (
                    f"graph: attributes has '{name}', expected an item feature of kind categorical: "
                    f"{', '.join(known) or 'none'}"
                )
        return None

    def _ranking_problem(self) -> str | None:
        assert self.ranking is not None
        if self.interactions is None:
            return "ranking: needs the section interactions, which says what was shown; add it, or leave ranking out"
        if self.ranking.grades:
            if self.interactions.label is None:
                return "ranking: grades needs a column with the label of each pair; name it with interactions: label"
            if self.interactions.type is not None:
                return (
                    f"ranking: grades cannot be combined with interactions: type '{self.interactions.type}', because "
                    f"graded pairs have no event types; leave one of them out"
                )
        for key in () if self.ranking.grades else ("type", "time"):
            if getattr(self.interactions, key) is None:
                return f"ranking: needs a column with the {key} of each interaction; name it with interactions: {key}"
        kinds = {feature.key: feature.kind for feature in self.items.features}
        wanted: list[tuple[str, str | None, str]] = [
            *(("attributes", name, "categorical") for name in self.ranking.attributes),
            ("brand", self.ranking.brand, "categorical"),
            ("price", self.ranking.price, "number"),
        ]
        for key, name, kind in wanted:
            if name is not None and kinds.get(name) != kind:
                known = ", ".join(key for key, found in kinds.items() if found == kind) or "none"
                return f"ranking: {key} has '{name}', expected an item feature of kind {kind}: {known}"
        return None


def _repeated(key: str, features: Sequence[Feature | Filter]) -> str | None:
    keys = [feature.key for feature in features]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    return f"{key} has {twice[0]} twice; give one of them another `name`" if twice else None


def _separator_problem(column: Feature | Filter, kinds: Sequence[str]) -> str | None:
    if column.separator == "":
        return "separator is '', expected the text between two values, for example '|'"
    if column.separator is not None and column.kind not in kinds:
        return (
            f"separator is {column.separator!r} and kind is {column.kind}: only kind {' or '.join(kinds)} can have a "
            f"separator"
        )
    return None


# The name of a packed file's section, such as "feature.<name>.splits", has at most 31 bytes.
_LONGEST_FEATURE = 31 - len("feature.") - len(".splits")


def load_schema(path: str | Path) -> Schema:
    """Reads a schema file. Raises UsageError if there is no file, it is not YAML, or a key or value is wrong."""
    return from_dict(Schema, read_yaml(path), str(path))
