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
    """Returns a tokenizer into words and, for scripts without spaces, characters and their bigrams."""
    return Tokenizer(TokenizerConfig(letter_trigrams=False, number_parts=False)).tokenize


def unigrams_and_bigrams() -> Tokenize:
    """Returns the tokenizer of `unigrams` with pairs of neighbouring words in addition."""
    return Tokenizer(TokenizerConfig(letter_trigrams=False, number_parts=False, word_bigrams=True)).tokenize


def plain_words() -> Tokenize:
    """Returns a tokenizer into lower-cased runs of ASCII letters and digits, for comparison with published figures."""
    words = re.compile("[a-z0-9]+")
    return lambda text: words.findall(text.lower())


class Bm25:
    """BM25 over the tokens of the titles. Section 6.2.2 has it with unigrams, and with unigrams and bigrams.

    Tokens come from our tokenizer. The library bm25s (Lucene's variant of BM25) computes the score of each token and
    title, and a sparse product sums the scores for many queries at once. An item that shares no token with the query is
    not retrieved, and its score is 0.
    """

    def __init__(
        self,
        item_ids: np.ndarray,
        titles: Sequence[str],
        k1: float = 1.2,
        b: float = 0.75,
        tokenize: Tokenize | None = None,
    ):
        """Takes `item_ids` int64 [items], `titles`, one text per item, and the constants `k1` and `b` of BM25."""
        self._item_ids = np.asarray(item_ids)
        self._rows = RowsById(self._item_ids)
        self._tokenize = tokenize or unigrams()
        self._vocabulary: dict[str, int] = {}
        tokens = [self._tokenize(title) for title in titles]
        # bm25s rejects a corpus without words.
        if any(tokens):
            index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
            index.index(tokens, show_progress=False)
            self._vocabulary = index.vocab_dict
            data, indices, indptr = (index.scores[name] for name in ("data", "indices", "indptr"))
            # One row per token. bm25s stores the transposed matrix by columns, which is the same.
            self._weights = scipy.sparse.csr_matrix((data, indices, indptr), (len(indptr) - 1, len(titles)))

    def _scores(self, queries: Sequence[str]) -> scipy.sparse.csr_matrix:
        """Returns the summed weights of each query's tokens, [n, items]; repeated tokens count repeatedly."""
        # A token that is in no title adds nothing to a score.
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
