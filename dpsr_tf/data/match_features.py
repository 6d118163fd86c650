"""How well a query matches the texts of an item: numbers for a ranker.

All of them come from the words of query and item (characters and their pairs for scripts without spaces), so they
need no training and hold for queries that no log has seen. docs/ranking.md lists them.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpsr_tf.data.column_files import row_splits
from dpsr_tf.data.store import Store, pack_strings, unpack_strings
from dpsr_tokenizer import Tokenizer, TokenizerConfig

# The constants of BM25 in Lucene's form.
_K1, _B = 1.2, 0.75
_WORDS = TokenizerConfig(letter_trigrams=False, number_parts=False)
_TRIGRAMS = TokenizerConfig(word_unigrams=False, number_parts=False, char_unigrams=False, char_bigrams=False)
# Numbers of the item alone.
_OF_ITEM = ("title_words", "title_numbers")


class _Postings(NamedTuple):
    """The distinct tokens of each of n texts."""

    splits: np.ndarray  # int64 [n + 1]
    tokens: np.ndarray  # int64, ascending within a text
    counts: np.ndarray  # int64: how often the text has the token

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns, for the tokens of some rows one after another, the place in `rows` and the place in `tokens`."""
        lengths = self.splits[rows + 1] - self.splits[rows]
        of_row = np.repeat(np.arange(len(rows)), lengths)
        begins = np.repeat(self.splits[rows] - row_splits(lengths)[:-1], lengths)
        return of_row, begins + np.arange(len(of_row))


class MatchFeatures:
    """Computes the match of pairs of queries and items of a store. Memory grows with the items' texts.

    Attributes:
        names: the names of the features.
        of_item: those of them that depend on the item alone.
    """

    of_item = _OF_ITEM

    def __init__(self, store: Store):
        """Reads the texts of all items of a store, whose schema has the section `ranking`."""
        assert store.schema.ranking is not None
        self._tokenizer = Tokenizer(_WORDS)
        # Token -> id, in the order in which tokens first occur in texts of items.
        self._ids: dict[str, int] = {}
        # The title comes first: it need not be among the texts that the towers read.
        schema = store.schema.items
        self._title = schema.title or schema.text[0]
        names, file = {self._title: "title"} | schema.text_names, store.packed_texts()
        tokens = {column: list(map(self._tokens, unpack_strings(file, name))) for column, name in names.items()}
        self._fields = {column: _postings(of_column) for column, of_column in tokens.items()}
        self._rarities = {column: _rarities(field, len(self._ids)) for column, field in self._fields.items()}
        self._weights = {column: _bm25_weights(field, self._rarities[column]) for column, field in self._fields.items()}
        self._has_digit = np.array([_has_digit(token) for token in self._ids], bool)
        # A title has the trigrams of its words. So those of each word are enough.
        self._split = Tokenizer(_TRIGRAMS)
        self._trigram_ids: dict[str, int] = {}
        self._trigrams = _postings(
            [
                [self._trigram_ids.setdefault(t, len(self._trigram_ids)) for t in self._split.tokenize(w)]
                for w in self._ids
            ]
        )
        title = self._fields[self._title]
        self._title_trigrams = self._count_trigrams(title)
        numbers = np.append(0, np.cumsum(self._has_digit[title.tokens]))[title.splits]
        self._item_numbers = {"title_words": np.diff(title.splits), "title_numbers": np.diff(numbers)}
        self._brands: np.ndarray | None = None
        brand = store.schema.ranking.brand
        if brand is not None:
            items = store.items()
            self._brands = items[f"feature.{brand}"]
            self._brand_tokens = [
                set(self._tokenizer.tokenize(text)) for text in unpack_strings(items, f"values.{brand}")
            ]
            # A brand is found by its rarest token.
            frequency = collections.Counter(token for of_brand in self._brand_tokens for token in of_brand)
            self._brands_by_token: dict[str, list[int]] = {}
            for code, of_brand in enumerate(self._brand_tokens, 1):
                if of_brand:
                    rarest = min(of_brand, key=lambda token: (frequency[token], token))
                    self._brands_by_token.setdefault(rarest, []).append(code)
        self.names = [
            *(f"bm25.{column}" for column in self._fields),
            "query_in_title",
            "title_in_query",
            "number_match",
            *(f"bm25_share.{column}" for column in self._fields),
            "query_in_texts",
            "missing_rarity",
            "last_word_in_title",
            "trigrams_in_title",
            "trigram_overlap",
            *_OF_ITEM,
        ]
        self.names += ["brand_match", "brand_other"] if brand is not None else []

    def __call__(self, queries: Sequence[str], query: np.ndarray, item: np.ndarray) -> dict[str, np.ndarray]:
        """Computes the features of n pairs.

        Args:
            queries: texts.
            query: int [n]: the query of each pair, a place in `queries`.
            item: int [n]: the item of each pair, a row of the store.

        Returns:
            float32 [n] by name, NaN where a feature is not defined.
        """
        words = [self._tokenizer.tokenize(text) for text in queries]
        asked = _postings([[self._ids[w] for w in of_query if w in self._ids] for of_query in words])
        distinct = np.array([len(set(of_query)) for of_query in words], np.int64)
        unknown = [sum(w not in self._ids for w in of_query) for of_query in words]
        size, n = max(len(self._ids), 1), len(query)
        row, place = asked.take(query)
        # Ascending, because the tokens of a query are.
        wanted, times = row * size + asked.tokens[place], asked.counts[place]
        found: dict[str, np.ndarray] = {}
        all_keys = [np.zeros(0, np.int64)]
        for column, field in self._fields.items():
            row, place = field.take(item)
            keys = row * size + field.tokens[place]
            at = np.minimum(np.searchsorted(wanted, keys), max(len(wanted) - 1, 0))
            same = wanted[at] == keys if len(wanted) else np.zeros(len(keys), bool)
            row, place, at, keys = row[same], place[same], at[same], keys[same]
            found[f"bm25.{column}"] = np.bincount(row, self._weights[column][place] * times[at], n)
            largest = self._rarity_of_queries(column, asked, unknown)
            found[f"bm25_share.{column}"] = _share(found[f"bm25.{column}"], largest[query])
            if column == self._title:
                matched = np.bincount(row, minlength=n)
                length = field.splits[item + 1] - field.splits[item]
                found["query_in_title"] = _share(matched, distinct[query])
                found["title_in_query"] = _share(matched, length)
                in_title = np.zeros(len(wanted), bool)
                in_title[at] = True
            all_keys.append(keys)
        row, token = np.divmod(wanted, size)
        lost = np.where(in_title, 0, self._rarities[self._title][token])
        at_least = np.where(unknown, _rarity(0, len(self._item_numbers["title_words"])), 0)
        found["missing_rarity"] = at_least[query]
        np.maximum.at(found["missing_rarity"], row, lost)
        last = np.array([self._ids.get(of_query[-1], -1) if of_query else -1 for of_query in words], np.int64)
        is_last = np.bincount(row, in_title & (token == last[query][row]), n)
        found["last_word_in_title"] = np.where(distinct[query] > 0, is_last, np.nan)
        keys = np.unique(np.concatenate(all_keys))
        found["query_in_texts"] = _share(np.bincount(keys // size, minlength=n), distinct[query])
        numbers = np.array([len({w for w in of_query if _has_digit(w)}) for of_query in words], np.int64)
        keys = keys[self._has_digit[keys % size]]
        found["number_match"] = _share(np.bincount(keys // size, minlength=n), numbers[query])
        found |= self._trigram_matches(queries, query, item)
        found |= {name: values[item] for name, values in self._item_numbers.items()}
        if self._brands is not None:
            found |= self._brand_matches(words, query, item)
        return {name: found[name].astype(np.float32) for name in self.names}

    def sections(self) -> dict[str, np.ndarray]:
        """Returns what a server needs to compute the same: sections of a file (export/rank_features/rank_table.h)."""
        words = list(self._ids)
        sections: dict[str, np.ndarray] = {}
        for place, (column, field) in enumerate(self._fields.items()):
            sections |= {
                f"text{place}.splits": field.splits,
                f"text{place}.values": field.tokens.astype(np.int32),
                f"text{place}.weights": self._weights[column].astype(np.float32),
            }
        if self._brands is not None:
            ids = dict(self._ids)
            of_brands = [sorted(ids.setdefault(word, len(ids)) for word in brand) for brand in self._brand_tokens]
            words = list(ids)
            sections |= {
                "brand": self._brands.astype(np.int32),
                "brand_words.splits": row_splits(np.array([len(brand) for brand in of_brands], np.int64)),
                "brand_words.values": np.array([word for brand in of_brands for word in brand], np.int32),
            }
        trigrams, trigram_bytes = pack_strings(list(self._trigram_ids))
        # Words of brands that no text has are not looked for in titles.
        no_trigrams = np.full(len(words) - len(self._ids), self._trigrams.splits[-1])
        digits = np.fromiter(map(str.isdigit, map(chr, range(sys.maxunicode + 1))), bool, sys.maxunicode + 1)
        edges = np.flatnonzero(np.diff(digits, prepend=False, append=False)).reshape(-1, 2)
        splits, data = pack_strings(words)
        return sections | {
            "tokenizer": np.frombuffer(self._tokenizer.config.serialize().encode(), np.uint8),
            "trigram_tokenizer": np.frombuffer(self._split.config.serialize().encode(), np.uint8),
            "word.splits": splits,
            "word.bytes": data,
            "trigram.splits": trigrams,
            "trigram.bytes": trigram_bytes,
            "word_trigrams.splits": np.append(self._trigrams.splits, no_trigrams),
            "word_trigrams.values": self._trigrams.tokens.astype(np.int32),
            "title_trigrams": self._title_trigrams.astype(np.int32),
            "digits": (edges - [0, 1]).reshape(-1).astype(np.int32),
        }

    def _brand_matches(
        self, words: Sequence[Sequence[str]], query: np.ndarray, item: np.ndarray
    ) -> dict[str, np.ndarray]:
        assert self._brands is not None
        named = [
            {
                code
                for word in set(of_query)
                for code in self._brands_by_token.get(word, ())
                if self._brand_tokens[code - 1] <= set(of_query)
            }
            for of_query in words
        ]
        brand = self._brands[item].astype(np.int64)
        pairs = np.array([code + place * 2**32 for place, codes in enumerate(named) for code in codes], np.int64)
        match = np.isin(query.astype(np.int64) * 2**32 + brand, pairs)
        names_any = np.array([bool(codes) for codes in named], bool)[query]
        unknown = brand == 0
        return {
            "brand_match": np.where(unknown, np.nan, match),
            "brand_other": np.where(unknown, np.nan, names_any & ~match),
        }

    def _rarity_of_queries(self, column: str, asked: _Postings, unknown: Sequence[int]) -> np.ndarray:
        """Returns the sum of the rarities of all words of each query, float64 [queries]: no BM25 is larger."""
        query = np.repeat(np.arange(len(unknown)), np.diff(asked.splits))
        known = np.bincount(query, self._rarities[column][asked.tokens] * asked.counts, len(unknown))
        return known + np.array(unknown) * _rarity(0, len(self._item_numbers["title_words"]))

    def _trigram_matches(self, queries: Sequence[str], query: np.ndarray, item: np.ndarray) -> dict[str, np.ndarray]:
        ids = self._trigram_ids
        split = [set(self._split.tokenize(text)) for text in queries]
        distinct = np.array([len(of_query) for of_query in split], np.int64)[query]
        # Which trigrams each query has: a table over those that any of them has. The last column is for all others.
        columns = {ids[t]: 0 for of_query in split for t in of_query if t in ids}
        column_of = np.full(len(ids), len(columns))
        column_of[list(columns)] = np.arange(len(columns))
        has = np.zeros((len(queries), len(columns) + 1), bool)
        for number, of_query in enumerate(split):
            has[number, [column_of[ids[t]] for t in of_query if t in ids]] = True
        title = self._fields[self._title]
        pair, place = title.take(item)
        of_word, place = self._trigrams.take(title.tokens[place])
        pair, column = pair[of_word], column_of[self._trigrams.tokens[place]]
        same = has[query[pair], column]
        keys = np.unique(pair[same] * (len(columns) + 1) + column[same])
        both = np.bincount(keys // (len(columns) + 1), minlength=len(query))
        either = distinct + self._title_trigrams[item] - both
        return {
            "trigrams_in_title": _share(both, distinct),
            "trigram_overlap": np.where(distinct > 0, _share(both, either), np.nan),
        }

    def _count_trigrams(self, title: _Postings) -> np.ndarray:
        """Returns the number of distinct trigrams of each title, int64 [items]."""
        size, counts = max(len(self._trigram_ids), 1), [np.zeros(0, np.int64)]
        for begin in range(0, len(title.splits) - 1, _ITEMS):
            items = np.arange(begin, min(begin + _ITEMS, len(title.splits) - 1))
            row, place = title.take(items)
            of_word, place = self._trigrams.take(title.tokens[place])
            keys = np.unique(row[of_word] * size + self._trigrams.tokens[place])
            counts.append(np.bincount(keys // size, minlength=len(items)))
        return np.concatenate(counts)

    def _tokens(self, text: str) -> list[int]:
        return [self._ids.setdefault(token, len(self._ids)) for token in self._tokenizer.tokenize(text)]


# Items whose trigrams are counted at a time.
_ITEMS = 1 << 14


def _postings(texts: Sequence[Sequence[int]]) -> _Postings:
    lengths = [len(text) for text in texts]
    tokens = np.fromiter((token for text in texts for token in text), np.int64, sum(lengths))
    size = int(tokens.max(initial=0)) + 1
    keys, counts = np.unique(np.repeat(np.arange(len(texts)), lengths) * size + tokens, return_counts=True)
    return _Postings(row_splits(np.bincount(keys // size, minlength=len(texts))), keys % size, counts)


def _rarities(field: _Postings, words: int) -> np.ndarray:
    """Returns the rarity of each word, float64 [words]."""
    return _rarity(np.bincount(field.tokens, minlength=words), len(field.splits) - 1)


def _rarity(frequency: np.ndarray | int, texts: int) -> np.ndarray:
    """Returns the inverse document frequency as BM25 has it, from how many of the texts have a word."""
    return np.log(1 + (texts - frequency + 0.5) / (np.asarray(frequency) + 0.5))


def _bm25_weights(field: _Postings, rarities: np.ndarray) -> np.ndarray:
    """Returns what each token of each text adds to BM25 when a query has it once, float64 [tokens]."""
    texts = len(field.splits) - 1
    of_text = np.repeat(np.arange(texts), np.diff(field.splits))
    length = np.bincount(of_text, field.counts, texts)
    average = length.mean() if texts and length.any() else 1.0
    strength = field.counts / (field.counts + _K1 * (1 - _B + _B * length[of_text] / average))
    return rarities[field.tokens] * strength


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def _has_digit(token: str) -> bool:
    return any(letter.isdigit() for letter in token)
