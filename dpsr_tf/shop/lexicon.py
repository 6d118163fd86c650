"""Reads the words of the generated shop. The dataclasses define the keys of lexicon.yaml."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

from dpsr_common.strict_yaml import read_yaml
from dpsr_common.typed_config import from_dict, option

LEXICON = Path(__file__).with_name("lexicon.yaml")
GENDERS = ("female", "male")
AGES = ("18-25", "26-35", "36-50", "51+")
POWERS = ("low", "middle", "high")


@dataclasses.dataclass(frozen=True)
class Value:
    """One value of an attribute, such as "black"."""

    word: str
    synonyms: tuple[str, ...] = ()
    gender: str | None = option(None, "gender of the users who like it", choices=GENDERS)
    age: str | None = option(None, "age of the users who like it", choices=AGES)


@dataclasses.dataclass(frozen=True)
class Range:
    """A numeric attribute: the numbers from first to last, both included."""

    first: int
    last: int
    step: int
    format: str  # such as "{} inch"


@dataclasses.dataclass(frozen=True)
class Attribute:
    """A property of items, with a list of values or a range of numbers."""

    name: str
    values: tuple[Value, ...] = ()
    range: Range | None = None

    def all_values(self) -> tuple[Value, ...]:
        """Returns the values, in order."""
        r = self.range
        return (
            self.values if r is None else tuple(Value(r.format.format(n)) for n in range(r.first, r.last + 1, r.step))
        )


@dataclasses.dataclass(frozen=True)
class ItemType:
    """A kind of product. The head of lexicon.yaml explains its fields."""

    word: str
    price: float
    attributes: tuple[str, ...]
    synonyms: tuple[str, ...] = ()
    fits: str | None = None
    gender: str | None = option(None, "gender of the users who like it", choices=GENDERS)
    age: str | None = option(None, "age of the users who like it", choices=AGES)


@dataclasses.dataclass(frozen=True)
class Family:
    """Types whose names have two parts, such as "garden chair": a modifier and a base."""

    modifiers: tuple[Value, ...]
    bases: tuple[ItemType, ...]

    def types(self, separator: str) -> list[ItemType]:
        """Returns a type for each modifier with each base; its synonyms are those of the modifier with the base's."""
        return [
            dataclasses.replace(
                base,
                word=modifier.word + separator + base.word,
                synonyms=tuple(a + separator + b for a in modifier.synonyms for b in base.synonyms),
            )
            for modifier, base in itertools.product(self.modifiers, self.bases)
        ]


@dataclasses.dataclass(frozen=True)
class Category:
    """Types of products that are made by the same brands."""

    name: str
    brands: tuple[str, ...]
    types: tuple[ItemType, ...]
    families: tuple[Family, ...] = ()  # further types


@dataclasses.dataclass(frozen=True)
class Language:
    """All words of one language."""

    separator: str
    fits: str  # word in a title before the product that an accessory fits
    fillers: tuple[str, ...]
    cities: tuple[str, ...]
    syllables: tuple[str, ...]  # parts of the names of invented brands and shops
    shop_endings: tuple[str, ...]
    attributes: tuple[Attribute, ...]
    categories: tuple[Category, ...]
    homophones: tuple[str, ...] = ()  # two characters each: the right one, the wrong one


@dataclasses.dataclass(frozen=True)
class Lexicon:
    """All words of the shop."""

    en: Language
    zh: Language


def load_lexicon() -> Lexicon:
    """Reads lexicon.yaml."""
    return from_dict(Lexicon, read_yaml(LEXICON), str(LEXICON))
