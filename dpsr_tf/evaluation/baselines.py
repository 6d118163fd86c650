"""Retrievers that need no model: BM25 over the titles, popularity, random items."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

import bm25s
import numpy as np
import scipy.sparse

from dpsr_tf.data.store import RowsById
from dpsr_tf.data.user_requests import User
from dpsr_tf.models.exact_search import no_results, top_positions
from dpsr_tokenizer import Tokenizer, TokenizerConfig

# Number of queries whose scores of all items are in memory at once.
_BATCH = 64

Tokenize = Callable[[str], list[str]]


def unigrams() -> Tokenize:
    """Whole words and, for scripts without spaces, the characters and their bigrams."""
    return Tokenizer(TokenizerConfig(letter_trigrams=False, number_parts=False)).tokenize


def unigrams_and_bigrams() -> Tokenize:
    """The same, and pairs of neighbouring words."""
    return Tokenizer(TokenizerConfig(letter_trigrams=False, number_parts=False, word_bigrams=True)).tokenize


def plain_words() -> Tokenize:
    """Runs of ASCII letters and digits, lower-cased: what textbooks do, for figures that others can check."""
    words = re.compile("[a-z0-9]+")
    return lambda text: words.findall(text.lower())


class Bm25:
    """BM25 over the tokens of the titles: with unigrams, or with unigrams and bigrams, the baselines of section 6.2.2.

    Tokens come from our tokenizer, the score of each token and title from the library bm25s (Lucene's variant); a
    sparse product sums them, many queries at once. An item that shares no token with the query is not retrieved, and
    its score is 0.
    """

    def __init__(
        self,
        item_ids: np.ndarray,
        titles: Sequence[str],
        k1: float = 1.2,
        b: float = 0.75,
        tokenize: Tokenize | None = None,
    ):
        """`item_ids` int64 [items], `titles` one text an item, `k1` and `b` BM25's usual constants."""
        self._item_ids = np.asarray(item_ids)
        self._rows = RowsById(self._item_ids)
        self._tokenize = tokenize or unigrams()
        self._vocabulary: dict[str, int] = {}
        tokens = [self._tokenize(title) for title in titles]
        if any(tokens):  # bm25s refuses a corpus without words
            index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
            index.index(tokens, show_progress=False)
            self._vocabulary = index.vocab_dict
            data, indices, indptr = (index.scores[name] for name in ("data", "indices", "indptr"))
            # A row a token: bm25s keeps the transposed matrix by columns.
            self._weights = scipy.sparse.csr_matrix((data, indices, indptr), (len(indptr) - 1, len(titles)))

    def _scores(self, queries: Sequence[str]) -> scipy.sparse.csr_matrix:
        """Sum of the weights of each query's tokens [n, items], a token as often as the query has it, in its order."""
        # A word that no title holds adds nothing.
        known = [
            [self._vocabulary[token] for token in self._tokenize(query) if token in self._vocabulary]
            for query in queries
        ]
        splits = np.cumsum([0, *map(len, known)])
        tokens = np.array([token for row in known for token in row], np.int64)
        counts = scipy.sparse.csr_matrix(
            (np.ones(len(tokens), np.float32), tokens, splits), (len(queries), self._weights.shape[0])
        )
        return counts @ self._weights

    def __call__(self, queries: Sequence[str], users: Sequence[User] | None, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See Retriever; `users` is not used."""
        ids, scores = no_results(len(queries), k)
        if not self._vocabulary:
            return ids, scores
        for begin in range(0, len(queries), _BATCH):
            found = self._scores(queries[begin : begin + _BATCH])
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
        if not self._vocabulary:
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
    """Items by chance, the same for the same query."""

    def __init__(self, item_ids: np.ndarray, seed: int = 1):
        """`item_ids` int64 [items]."""
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
        """0 for all: ties are resolved by chance, in expectation."""
        return np.zeros(items.shape, np.float32)


class Popularity:
    """The same items for every query: the most popular, ties by ascending id."""

    def __init__(self, item_ids: np.ndarray, popularity: np.ndarray):
        """`item_ids` int64 [items], `popularity` float [items]."""
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
