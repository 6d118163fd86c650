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
from pathlib import Path

from dpsr_tf.config import from_dict, option, read_yaml
from dpsr_tf.errors import UsageError


@dataclasses.dataclass(frozen=True)
class ItemsSchema:
    """The item table: one row an item."""

    files: tuple[str, ...] = dataclasses.field(
        metadata={"help": "files, directories or globs, relative to the schema file or --input"}
    )
    id: str = dataclasses.field(metadata={"help": "column of the item id, int64, unique"})
    text: tuple[str, ...] = dataclasses.field(metadata={"help": "columns whose text the item tower reads"})
    title: str | None = option(None, "column shown to people; the first text column if left out")


@dataclasses.dataclass(frozen=True)
class UsersSchema:
    """The user table: one row a user."""

    files: tuple[str, ...] = dataclasses.field(
        metadata={"help": "files, directories or globs, relative to the schema file or --input"}
    )
    id: str = dataclasses.field(metadata={"help": "column of the user id, int64, unique"})
    features: tuple[str, ...] = option((), "columns of categorical profile features")


@dataclasses.dataclass(frozen=True)
class InteractionsSchema:
    """The interaction table: one row a click, an order, or a judgment."""

    files: tuple[str, ...] = dataclasses.field(
        metadata={"help": "files, directories or globs, relative to the schema file or --input"}
    )
    query: str = dataclasses.field(metadata={"help": "column of the query text"})
    item: str = dataclasses.field(metadata={"help": "column of the item id"})
    user: str | None = option(None, "column of the user id; all rows anonymous if left out")
    weight: str | None = option(None, "column of the weight in the loss; 1 if left out")
    label: str | None = option(None, "column of the label; every row is positive if left out")
    positive_from: float = option(1.0, "labels of this and above are positive pairs")
    negative_to: float | None = option(None, "labels of this and below are supervised negatives (section 4.5)")


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


@dataclasses.dataclass(frozen=True)
class VocabularySchema:
    """Which tokens get an id of their own."""

    min_count: int = option(1, "tokens seen less often share the buckets", 1)
    max_size: int = option(1_000_000, "most frequent tokens that get an id of their own", 1, 2**30)
    num_oov_buckets: int = option(1024, "hash buckets for all other tokens; 0 drops them", 0, 2**24)


@dataclasses.dataclass(frozen=True)
class Schema:
    """All of it."""

    items: ItemsSchema
    interactions: InteractionsSchema
    users: UsersSchema | None = None
    tokenizer: TokenizerSchema = dataclasses.field(default_factory=TokenizerSchema)
    vocabulary: VocabularySchema = dataclasses.field(default_factory=VocabularySchema)


# A section "feature.<name>" of a packed file has at most 31 bytes.
_LONGEST_FEATURE = 31 - len("feature.")

ADAPTERS = Path(__file__).parent / "adapters"


def load_schema(path: str | Path) -> Schema:
    """Reads a schema file. Raises UsageError (no file, no YAML, or a key or value that is not allowed)."""
    schema = from_dict(Schema, read_yaml(path), str(path))
    log = schema.interactions
    if log.negative_to is not None and log.negative_to >= log.positive_from:
        raise UsageError(
            f"{path}: interactions: negative_to is {log.negative_to:g} and positive_from {log.positive_from:g}, "
            f"expected negative_to below positive_from"
        )
    if log.negative_to is not None and log.label is None:
        raise UsageError(
            f"{path}: interactions: negative_to is {log.negative_to:g}, but no label to compare is named; "
            f"name its column, or leave negative_to out"
        )
    for name in schema.users.features if schema.users else ():
        if len(name.encode()) > _LONGEST_FEATURE:
            raise UsageError(
                f"{path}: users: features is '{name}' of {len(name.encode())} bytes, "
                f"expected at most {_LONGEST_FEATURE}; rename the column"
            )
    if log.user is not None and schema.users is None:
        raise UsageError(
            f"{path}: interactions: user is '{log.user}', but there is no section users; add one or drop it"
        )
    return schema


def adapter_path(name: str) -> Path:
    """The schema file of a data set that is known by name. Raises UsageError for another name."""
    path = ADAPTERS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in ADAPTERS.glob("*.yaml")))
        raise UsageError(f"no adapter '{name}', expected one of: {known}; for other data write a schema file")
    return path
