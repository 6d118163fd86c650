"""What all inverted indexes have in common: their interface, and how texts become terms.

Text is analysed here, with the project's tokenizer, when `dpsr index --inverted` writes the index and when a query is
looked up. Engines only see tokens. So a query is always a list of terms with weights: whatever a user types never
reaches a query parser, and means no operator.

inverted.json lists the fields of the index. Each has the texts that it joins, an analyzer, and a boost:

    words            the project's tokenizer: words, and in scripts without spaces characters and their bigrams
    stems:LANGUAGE   words, cut to their stems by Snowball: shelves gives shelv
    trigrams         three neighbouring letters of each word, which find misspelt words
    simple:LANGUAGE  Tantivy's own tokenizer, lower case, without accents, cut to stems; "simple" alone cuts nothing

A field may be for unknown words only: then it is asked for those words of a query that no item has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import tantivy
from numpy.typing import NDArray

from dpsr_serving.gateway.catalogue import Catalogue, Condition
from dpsr_tokenizer import Tokenizer, TokenizerConfig

Analyze = Callable[[str], list[str]]
Filters = Mapping[str, Any] | tuple[Condition, ...] | None

# Of one query, all its rewrites together: later terms are ignored. A term costs time, and no shopper types so many.
MAX_TERMS = 256
# The largest k of one search.
MAX_K = 10_000

_KINDS = ("word_unigrams", "letter_trigrams", "char_unigrams", "char_bigrams", "number_parts")


@dataclasses.dataclass(frozen=True)
class Found:
    """What a source found, best first.

    Attributes:
        ids: int64 [m], distinct.
        scores: float32 [m], descending.
    """

    ids: NDArray[np.int64]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        """Returns the number of items."""
        return len(self.ids)

    @classmethod
    def nothing(cls) -> Found:
        """Returns an empty list."""
        return cls(np.zeros(0, np.int64), np.zeros(0, np.float32))


class InvertedIndex(Protocol):
    """Finds items by words. Implementations are thread-safe."""

    catalogue: Catalogue

    def search(self, texts: Sequence[tuple[str, float]], k: int, filters: Filters = None) -> Found:
        """Finds the best k items.

        Args:
            texts: a query and its rewrites, each with a weight above 0. An item is found if it has a word of any of
                them. Its score is the weighted sum of its BM25 scores for the texts.
            k: largest number of items, 1 to MAX_K.
            filters: as Catalogue.conditions reads them, or its result.

        Raises:
            ValueError: a filter is wrong, or k is out of range.
            CommandError: the engine does not answer.
        """
        ...

    def identifier(self, text: str) -> NDArray[np.int64]:
        """Returns the ids of the items of which `text` is the exact identifier; [] if there is none."""
        ...

    def tokens(self, text: str) -> list[str]:
        """Returns the words that a search for `text` looks up, for people."""
        ...


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of an inverted index.

    Attributes:
        name: in the engine.
        texts: names of the texts that it joins, as in titles.dpsr.
        analyzer: what makes tokens of them, see above.
        boost: what its scores are multiplied by.
        unknown_words: whether it is only asked for words that no other field has.
    """

    name: str
    texts: tuple[str, ...]
    analyzer: str = "words"
    boost: float = 1.0
    unknown_words: bool = False


class Analysis:
    """The fields of an index with their analyzers.

    Attributes:
        fields: Field, in the order of the manifest.
    """

    def __init__(self, fields: Sequence[Field]) -> None:
        """Raises ValueError if there is no such analyzer or language."""
        self.fields = tuple(fields)
        self._analyzers = {field.analyzer: analyzer(field.analyzer) for field in fields}
        self._words = _words()

    def tokens(self, field: Field, text: str) -> list[str]:
        """Returns the tokens of a text in a field."""
        return self._analyzers[field.analyzer](text)

    def terms(
        self, texts: Sequence[tuple[str, float]], is_known: Callable[[str, str], bool]
    ) -> dict[tuple[str, str], float]:
        """Returns the terms of a search: (name of the field, token) -> weight.

        Args:
            texts: texts and weights.
            is_known: tells whether a field has a token.
        """
        found: dict[tuple[str, str], float] = {}
        always = [field for field in self.fields if not field.unknown_words]
        rest = [field for field in self.fields if field.unknown_words]
        for text, weight in texts:
            for field in always:
                self._add(found, field, text, weight)
        for text, weight in texts if rest else ():
            for word in self._words(text):
                tokens = [(field.name, token) for field in always for token in self.tokens(field, word)]
                if not any(is_known(*term) for term in tokens):
                    for field in rest:
                        self._add(found, field, word, weight)
        return found

    def _add(self, found: dict[tuple[str, str], float], field: Field, text: str, weight: float) -> None:
        for token in self.tokens(field, text):
            term = (field.name, token)
            if term in found or len(found) < MAX_TERMS:
                found[term] = found.get(term, 0.0) + weight * field.boost


def analyzer(name: str) -> Analyze:
    """Returns the analyzer of this name. Raises ValueError if there is none."""
    kind, _, language = name.partition(":")
    if kind == "words" and not language:
        return _words()
    if kind == "trigrams" and not language:
        return _tokenizer("letter_trigrams")
    if kind == "stems" and language:
        return _stems(language)
    if kind == "simple":
        return _simple(language)
    raise ValueError(f"analyzer {name!r}: expected words, stems:LANGUAGE, trigrams, simple or simple:LANGUAGE")


def _tokenizer(*kinds: str) -> Analyze:
    return Tokenizer(TokenizerConfig(**{kind: kind in kinds for kind in _KINDS})).tokenize


def _words() -> Analyze:
    return _tokenizer("word_unigrams", "char_unigrams", "char_bigrams")


def _stems(language: str) -> Analyze:
    words, stem = _words(), _built(tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.whitespace()), language)
    return lambda text: stem(" ".join(words(text)))


def _simple(language: str) -> Analyze:
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
    builder = builder.filter(tantivy.Filter.lowercase()).filter(tantivy.Filter.ascii_fold())
    return _built(builder, language)


def _built(builder: Any, language: str) -> Analyze:
    if language:
        try:
            builder = builder.filter(tantivy.Filter.stemmer(language))
        except ValueError:
            raise ValueError(
                f"language {language!r}: Tantivy has no stemmer for it; expected, for example, english"
            ) from None
    analyze: Analyze = builder.build().analyze
    return analyze


def fields_of(manifest: Mapping[str, Any]) -> list[Field]:
    """Returns the fields that inverted.json lists."""
    return [Field(**{**entry, "texts": tuple(entry["texts"])}) for entry in manifest["fields"]]


def check_k(k: int) -> None:
    """Raises ValueError unless k is in range."""
    if not 0 < k <= MAX_K:
        raise ValueError(f"k={k}: expected 1 to {MAX_K:,}")


def column_name(place: int) -> str:
    """Returns the name in Tantivy of the attribute with this place among the attributes."""
    return f"attribute{place}"
