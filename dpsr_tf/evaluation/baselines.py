"""Retrievers that need no model: BM25, popularity, random items."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import bm25s
import numpy as np
import scipy.sparse
import Stemmer

from dpsr_common.errors import UsageError
from dpsr_tf.data.store import RowsById
from dpsr_tf.data.user_requests import User
from dpsr_tf.models.exact_search import no_results, top_positions
from dpsr_tokenizer import Tokenizer, TokenizerConfig

# Number of queries whose scores of all items are in memory at once.
_BATCH = 64

Tokenize = Callable[[str], list[str]]


def unigrams() -> Tokenize:
    """Returns a tokenizer into words and, for scripts without spaces, characters and their bigrams."""
    return Tokenizer(TokenizerConfig(letter_trigrams=False, number_parts=False)).tokenize


def unigrams_and_bigrams() -> Tokenize:
    """Returns the tokenizer of `unigrams` with pairs of neighbouring words in addition."""
    return Tokenizer(TokenizerConfig(letter_trigrams=False, number_parts=False, word_bigrams=True)).tokenize


def plain_words() -> Tokenize:
    """Returns a tokenizer into lower-cased runs of ASCII letters and digits, for comparison with published figures."""
    words = re.compile("[a-z0-9]+")
    return lambda text: words.findall(text.lower())


def letter_trigrams() -> Tokenize:
    """Returns a tokenizer into the letter trigrams of each word: they find misspelt words, and parts of words."""
    kinds = {"word_unigrams": False, "number_parts": False, "char_unigrams": False, "char_bigrams": False}
    return Tokenizer(TokenizerConfig(letter_trigrams=True, **kinds)).tokenize


def stems() -> Tokenize:
    """Returns the tokenizer of `unigrams` with English words cut to their stems by Snowball: shelves gives shelv."""
    tokenize, stemmer = unigrams(), Stemmer.Stemmer("english")
    return lambda text: list(stemmer.stemWords(tokenize(text)))


@dataclasses.dataclass(frozen=True)
class Field:
    """One text of each item, for Bm25.

    Attributes:
        texts: one text per item.
        tokenize: splits texts and queries into tokens.
        weight: what the field's score is multiplied by. A field of weight 0 is left out.
    """

    texts: Sequence[str]
    tokenize: Tokenize = dataclasses.field(default_factory=unigrams)
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Bm25Options:
    """What `--system=bm25:OPTIONS` changes.

    Attributes:
        stem: whether English words are cut to their stems.
        trigrams: weight of the letter trigrams, which are a field of their own; 0 leaves them out.
        k1: how soon repeated words stop adding to the score.
        b: how much long texts are scored down, 0 to 1.
        columns: text column -> its weight. Each column is then a field of its own, and columns that are not named are
            left out. Empty: the texts of all columns are joined to one field.
    """

    stem: bool = False
    trigrams: float = 0.0
    k1: float = 1.2
    b: float = 0.75
    columns: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @staticmethod
    def parse(text: str, where: str) -> Bm25Options:
        """Reads options such as "stem+trigrams=0.3+k1=0.9". Raises UsageError, which begins with `where`."""
        found: dict[str, Any] = {"columns": {}}
        for option in text.split("+"):
            name, _, value = option.partition("=")
            if option == "stem":
                found["stem"] = True
                continue
            if not name or not re.fullmatch(r"\d+(\.\d*)?|\.\d+", value) or (name == "b" and float(value) > 1):
                raise UsageError(
                    f"{where}: has the option '{option}', expected stem, trigrams=WEIGHT, k1=NUMBER, b=NUMBER (0 to 1) "
                    f"or COLUMN=WEIGHT, joined by +, as in bm25:stem+trigrams=0.3+k1=0.9"
                )
            (found if name in ("trigrams", "k1", "b") else found["columns"])[name] = float(value)
        return Bm25Options(**found)

    def fields(self, texts: Mapping[str, Sequence[str]], where: str) -> list[Field]:
        """Returns the fields of items with these texts (column -> one text per item).

        Raises UsageError, which begins with `where`, if a column is not among them.
        """
        for column in self.columns:
            if column not in texts:
                raise UsageError(f"{where}: has the column '{column}', expected a text column: {', '.join(texts)}")
        weights = self.columns or dict.fromkeys(texts, 1.0)
        joined = [" ".join(parts) for parts in zip(*(texts[column] for column in weights), strict=True)]
        words = stems() if self.stem else unigrams()
        fields = [Field(joined, words)]
        if self.columns:
            fields = [Field(texts[column], words, weight) for column, weight in self.columns.items()]
        return [*fields, Field(joined, letter_trigrams(), self.trigrams)] if self.trigrams else fields


class Bm25:
    """BM25 over the tokens of one or several texts of each item. Section 6.2.2 has it with words, and with bigrams too.

    The library bm25s (Lucene's variant of BM25) computes the score of each token and text, and a sparse product sums
    the scores for many queries at once. The score of an item is the weighted sum over its fields. An item that shares
    no token with the query is not retrieved, and its score is 0.
    """

    def __init__(self, item_ids: np.ndarray, fields: Sequence[Field], k1: float = 1.2, b: float = 0.75):
        """Takes `item_ids` int64 [items], the fields, and the constants `k1` and `b` of BM25."""
        self._item_ids = np.asarray(item_ids)
        self._rows = RowsById(self._item_ids)
        # Of each field with words: its tokenizer, and the row of each token in `_weights` [tokens, items].
        self._fields: list[tuple[Tokenize, dict[str, int]]] = []
        weights: list[scipy.sparse.csr_matrix] = []
        for field in fields:
            # A field of weight 0 adds nothing to a score, so it finds no item.
            tokens = [field.tokenize(text) for text in field.texts] if field.weight else []
            if not any(tokens):  # bm25s rejects a corpus without words
                continue
            index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
            index.index(tokens, show_progress=False)
            first = sum(matrix.shape[0] for matrix in weights)
            self._fields.append((field.tokenize, {token: first + row for token, row in index.vocab_dict.items()}))
            data, indices, indptr = (index.scores[name] for name in ("data", "indices", "indptr"))
            # One row per token. bm25s stores the transposed matrix by columns, which is the same.
            shape = (len(indptr) - 1, len(field.texts))
            weights.append(scipy.sparse.csr_matrix((data * np.float32(field.weight), indices, indptr), shape))
        if weights:
            self._weights = scipy.sparse.vstack(weights, "csr")

    def counts(self, queries: Sequence[str]) -> scipy.sparse.csr_matrix:
        """Returns how often each query has each token of the index, float32 [n, tokens]."""
        # A token that is in no title adds nothing to a score.
        known = [
            [rows[token] for tokenize, rows in self._fields for token in tokenize(query) if token in rows]
            for query in queries
        ]
        splits = np.cumsum([0, *map(len, known)])
        tokens = np.array([token for row in known for token in row], np.int64)
        shape = (len(queries), self._weights.shape[0] if self._fields else 0)
        return scipy.sparse.csr_matrix((np.ones(len(tokens), np.float32), tokens, splits), shape)

    def knows(self, text: str) -> bool:
        """Returns whether the index has all tokens of a text, in each of its fields."""
        return all(token in rows for tokenize, rows in self._fields for token in tokenize(text))

    def _scores(self, queries: Sequence[str]) -> scipy.sparse.csr_matrix:
        """Returns the summed weights of each query's tokens, [n, items]; repeated tokens count repeatedly."""
        return self.counts(queries) @ self._weights

    def __call__(self, queries: Sequence[str], users: Sequence[User] | None, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See Retriever; `users` is not used."""
        return self.search(self.counts(queries), k)

    def search(self, counts: scipy.sparse.csr_matrix, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Finds items for queries that are given by how much each token counts, float32 [n, tokens].

        So a query and others that mean the same can be searched as one: by the weighted sum of their `counts`. Returns
        what a Retriever returns.
        """
        ids, scores = no_results(counts.shape[0], k)
        if not self._fields:
            return ids, scores
        for begin in range(0, len(ids), _BATCH):
            found = counts[begin : begin + _BATCH] @ self._weights
            for row in range(found.shape[0]):
                part = slice(found.indptr[row], found.indptr[row + 1])
                row_ids, row_scores = self._item_ids[found.indices[part]], found.data[part]
                order = top_positions(row_ids, row_scores, k)
                ids[begin + row, : len(order)] = row_ids[order]
                scores[begin + row, : len(order)] = row_scores[order]
        return ids, scores

    def score(self, queries: Sequence[str], users: Sequence[User] | None, items: np.ndarray) -> np.ndarray:
        """See Retriever."""
        result = np.zeros(items.shape, np.float32)
        if not self._fields:
            return result
        rows = self._rows(items)
        of_all = np.zeros(len(self._item_ids), np.float32)
        for begin in range(0, len(queries), _BATCH):
            found = self._scores(queries[begin : begin + _BATCH])
            for row in range(found.shape[0]):
                part = slice(found.indptr[row], found.indptr[row + 1])
                of_all[found.indices[part]] = found.data[part]
                result[begin + row] = np.where(rows[begin + row] >= 0, of_all[rows[begin + row]], 0)
                of_all[found.indices[part]] = 0
        return result


class Random:
    """Random items. The same query and seed always get the same items."""

    def __init__(self, item_ids: np.ndarray, seed: int = 1):
        """Takes `item_ids` int64 [items]."""
        self._item_ids, self._seed = np.asarray(item_ids), seed

    def __call__(self, queries: Sequence[str], users: Sequence[User] | None, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See Retriever; every score is 0."""
        ids, scores = no_results(len(queries), k)
        found = min(k, len(self._item_ids))
        for row, query in enumerate(queries):
            words = np.frombuffer(hashlib.blake2b(query.encode("utf-8", "replace"), digest_size=8).digest(), np.uint32)
            rng = np.random.default_rng([self._seed, *words])
            ids[row, :found] = self._item_ids[rng.choice(len(self._item_ids), found, replace=False)]
        scores[:, :found] = 0
        return ids, scores

    def score(self, queries: Sequence[str], users: Sequence[User] | None, items: np.ndarray) -> np.ndarray:
        """Returns 0 for all pairs. The metrics resolve ties in expectation, as if by chance."""
        return np.zeros(items.shape, np.float32)


class Popularity:
    """The most popular items, the same for every query; ties are broken by ascending id."""

    def __init__(self, item_ids: np.ndarray, popularity: np.ndarray):
        """Takes `item_ids` int64 [items] and `popularity` float [items]."""
        self._item_ids, self._popularity = np.asarray(item_ids), np.asarray(popularity, np.float32)
        self._order = np.lexsort((self._item_ids, -self._popularity))
        self._rows = RowsById(self._item_ids)

    def __call__(self, queries: Sequence[str], users: Sequence[User] | None, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See Retriever; the score is the popularity."""
        ids, scores = no_results(len(queries), k)
        top = self._order[:k]
        ids[:, : len(top)], scores[:, : len(top)] = self._item_ids[top], self._popularity[top]
        return ids, scores

    def score(self, queries: Sequence[str], users: Sequence[User] | None, items: np.ndarray) -> np.ndarray:
        """See Retriever."""
        rows = self._rows(items)
        return np.where(rows >= 0, self._popularity[rows], 0).astype(np.float32)
