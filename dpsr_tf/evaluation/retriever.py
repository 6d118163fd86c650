"""What a retriever is, the baselines that need no model, exact search over embeddings, and fusion."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Protocol

import bm25s
import numpy as np
import scipy.sparse

from dpsr_tf.data.store import RowsById
from dpsr_tf.data.user_requests import User
from dpsr_tf.models.exact_search import is_repeat, no_results, top_positions
from dpsr_tokenizer import Tokenizer, TokenizerConfig

# Queries whose scores of all items are in memory at once.
_BATCH = 64


class Retriever(Protocol):
    """Anything that finds items for queries: a baseline, a model, an index, a servable, a server.

    Two attributes are optional. `personal = True` says that it makes use of users; others are given None.
    `score(queries, users, items)`, with items int64 [n, m], returns the score of each of these pairs, float32 [n, m],
    whether or not the item would be found; -1 among the items is padding and its score is ignored. Top-k among 1,024
    items and AUC need it.
    """

    def __call__(self, queries: Sequence[str], users: Sequence[User] | None, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best items of each query.

        Args:
            queries: n texts.
            users: n users, or None for anonymous ones.
            k: items asked for.

        Returns:
            Item ids int64 [n, k] and scores float32 [n, k], best first, padded with -1 and -inf.
        """
        ...


def ask(
    retriever: Retriever, queries: Sequence[str], users: Sequence[User] | None, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """What `retriever` answers, users left out where it makes no use of them. Raises ValueError for another shape."""
    ids, scores = retriever(queries, users if is_personal(retriever) else None, k)
    if ids.shape != (len(queries), k) or scores.shape != ids.shape:
        raise ValueError(
            f"the retriever returned ids {list(ids.shape)} and scores {list(scores.shape)}, "
            f"expected both [{len(queries)}, {k}]"
        )
    return ids, scores


def is_personal(retriever: Retriever) -> bool:
    """Whether it makes use of users."""
    return bool(getattr(retriever, "personal", False))


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


class Fusion:
    """Several retrievers as one; each is asked for `depth` items, or k if that is more.

    Reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009): an item's score is the sum over retrievers of
    1 / (60 + rank). With weights: the weighted sum of its scores, each retriever's brought to 0 .. 1 over what it
    returned for the query (all 1 where they are equal). A retriever that did not return the item adds nothing.
    """

    RANK_CONSTANT = 60

    def __init__(self, parts: Sequence[Retriever], weights: Sequence[float] | None = None, depth: int = 1000):
        """`weights`: one a part; None is reciprocal rank fusion."""
        self._parts, self._weights, self._depth = parts, weights, depth
        self.personal = any(is_personal(part) for part in parts)

    def __call__(self, queries: Sequence[str], users: Sequence[User] | None, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See Retriever."""
        depth = max(k, self._depth)
        all_ids, all_shares = [], []
        for row, part in enumerate(self._parts):
            found, part_scores = ask(part, queries, users, depth)
            counts = (found >= 0) & ~is_repeat(found) & ~np.isnan(part_scores)
            if self._weights is None:
                share = np.broadcast_to(1 / (self.RANK_CONSTANT + 1 + np.arange(depth)), found.shape)
            else:
                share = self._weights[row] * _to_unit(part_scores, counts)
            all_ids.append(np.where(counts, found, -1))
            all_shares.append(share)
        united, shares = np.concatenate(all_ids, axis=1), np.concatenate(all_shares, axis=1)
        ids, scores = no_results(len(queries), k)
        for row in range(len(queries)):
            there = united[row] >= 0
            items, which = np.unique(united[row][there], return_inverse=True)
            # Sums in float32, so that sums of the same numbers in another order are ties.
            sums = np.bincount(which, shares[row][there], len(items)).astype(np.float32)
            order = top_positions(items, sums, k)
            ids[row, : len(order)], scores[row, : len(order)] = items[order], sums[order]
        return ids, scores


def _to_unit(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Each row's scores where `counts`, brought to 0 .. 1."""
    finite = np.clip(scores.astype(np.float64), -1e30, 1e30)
    low = np.where(counts, finite, np.inf).min(axis=1, keepdims=True, initial=np.inf)
    high = np.where(counts, finite, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    width = np.where(high > low, high - low, 1)
    return np.where(high > low, (finite - np.where(counts.any(axis=1, keepdims=True), low, 0)) / width, 1)
