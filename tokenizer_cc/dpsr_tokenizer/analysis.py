"""How texts become the tokens of an inverted index, and queries its terms.

Text is analysed by the same functions when `dpsr index --inverted` writes an index and when a query is looked up.
Engines only see tokens. So a query is always a list of terms with weights: whatever a user types never reaches a query
parser, and means no operator.

inverted.json lists the fields of an index. Each has the texts that it joins, an analyzer, and a boost:

    words            the project's tokenizer: words, and in scripts without spaces characters and their bigrams
    stems:LANGUAGE   words, cut to their stems by Snowball: shelves gives shelv
    trigrams         three neighbouring letters of each word, which find misspelt words
    simple:LANGUAGE  Tantivy's own tokenizer, lower case, without accents, cut to stems; "simple" alone cuts nothing

A field may be for unknown words only: then it is asked for those words of a query that no item has. The analyzers stems
and simple need the package tantivy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpsr_tokenizer._native import Tokenizer, TokenizerConfig

Analyze = Callable[[str], list[str]]

# Of one query, all its rewrites together: later terms are ignored. A term costs time, and no shopper types so many.
MAX_TERMS = 256

_KINDS = ("word_unigrams", "letter_trigrams", "char_unigrams", "char_bigrams", "number_parts")


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
    import tantivy

    words, stem = _words(), _built(tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.whitespace()), language)
    return lambda text: stem(" ".join(words(text)))


def _simple(language: str) -> Analyze:
    import tantivy

    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
    builder = builder.filter(tantivy.Filter.lowercase()).filter(tantivy.Filter.ascii_fold())
    return _built(builder, language)


def _built(builder: Any, language: str) -> Analyze:
    import tantivy

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
