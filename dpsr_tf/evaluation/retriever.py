"""What a retriever is, and the ones that need no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import bm25s
import numpy as np

from dpsr_tokenizer import Tokenizer, TokenizerConfig


class Retriever(Protocol):
    """Anything that finds items for queries: a baseline, a servable, a server."""

    def __call__(self, queries: Sequence[str], users: Sequence[int] | None, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best items of each query.

        Args:
            queries: n texts.
            users: n user ids, or None for anonymous users.
            k: items asked for.

        Returns:
            Item ids int64 [n, k] and scores float32 [n, k], best first, padded with -1 and -inf.
        """
        ...


class Bm25:
    """BM25 over whole words and, for scripts without spaces, the characters and their bigrams of the titles.

    Section 6.2.2 of the DPSR paper names it as the baseline. Tokens come from our tokenizer, scores from the library
    bm25s (Lucene's variant); an item that shares no token with the query is not retrieved.
    """

    def __init__(self, item_ids: np.ndarray, titles: Sequence[str], k1: float = 1.2, b: float = 0.75):
        """`item_ids` int64 [items], `titles` one text an item, `k1` and `b` BM25's usual constants."""
        self._item_ids = np.asarray(item_ids)
        self._tokenizer = Tokenizer(TokenizerConfig(letter_trigrams=False, number_parts=False))
        tokens = [self._tokenizer.tokenize(title) for title in titles]
        self._index = None
        if any(tokens):  # bm25s refuses a corpus without words
            self._index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
            self._index.index(tokens, show_progress=False)

    def __call__(self, queries: Sequence[str], users: Sequence[int] | None, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See Retriever; `users` is not used."""
        ids = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        if self._index is None:
            return ids, scores
        for row, query in enumerate(queries):
            # A word that no title holds adds nothing; bm25s would refuse a query of such words only.
            tokens = [token for token in self._tokenizer.tokenize(query) if token in self._index.vocab_dict]
            if not tokens:
                continue
            all_scores = self._index.get_scores(tokens)
            # Every item that ties with the k-th, so that ids decide which of them are in.
            floor = np.partition(all_scores, -k)[-k] if k < len(all_scores) else 0
            best = np.flatnonzero((all_scores >= floor) & (all_scores > 0))
            best = best[np.lexsort((self._item_ids[best], -all_scores[best]))][:k]
            ids[row, : len(best)] = self._item_ids[best]
            scores[row, : len(best)] = all_scores[best]
        return ids, scores
