"""Batches for the training of a rewriter: queries with titles, and pairs of texts that mean the same.

A batch is a function of the store, the options, the step and the worker, so that a training that resumes sees the same
batches.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from dpsr_common.errors import CommandError
from dpsr_common.packed_file import PackedFile
from dpsr_tf.data.column_files import RaggedRows, row_splits
from dpsr_tf.data.store import Store
from dpsr_tf.data.word_forms import WordForms
from dpsr_tf.ops._native import TitlePieces, shortened
from dpsr_tokenizer import Vocabulary, WordSequences

Batch = dict[str, np.ndarray]

# A batch holds at most one in this many of the store's pairs of queries, so that few pairs are not learned by heart.
_PAIRS_PER_DRAW = 50


@dataclasses.dataclass(frozen=True)
class RewritingOptions:
    """What a batch holds.

    Attributes:
        batch_size: b, number of queries with a title.
        pair_batch_size: p, number of pairs of texts.
        seed: of all random draws.
        typo_rate: probability of a typing error in a word that is read (dpsr_tf/ops/query_noise.h).
        form_rate: probability that a word that is read has another form, such as the singular for the plural that is
            written (dpsr_tf/data/word_forms.py). So inflections are learned from titles alone.
        drop_rate: probability that a word of a query is left out where the query is read.
        title_queries: share of the b queries that are pieces of their title, for items without clicks. A store without
            clicks has no others.
        title_pairs: share of the p pairs that are a piece of a title with typing errors, and the piece.
        query_pairs: share of the p pairs that are a query with typing errors, and the query. The remaining pairs are
            two queries of the store, at most a fiftieth of those that it has. Where a store has too few of a kind,
            pieces of titles take their place.
        click_power: a query and an item are drawn in proportion to this power of their clicks.
        target_power: a pair of queries is drawn in proportion to its weight, times this power of the clicks of the
            query that is written. So frequent queries, which are rarely misspelt, are written more often.
        title_subsampling: in a piece of a title, a word that occurs in a larger share s of the titles is kept with
            probability sqrt(title_subsampling / s) only. 0 turns this off.
    """

    batch_size: int = 256
    pair_batch_size: int = 256
    seed: int = 1
    typo_rate: float = 0.2
    form_rate: float = 0.1
    drop_rate: float = 0.0
    title_queries: float = 0.3
    title_pairs: float = 0.5
    query_pairs: float = 0.2
    click_power: float = 0.5
    target_power: float = 0.5
    title_subsampling: float = 0.003


class RewritingBatches:
    """Makes the batches of a store with a section `rewriting`.

    A worker of a cluster reads the clicks and pairs of its own files only, if there are at least as many files as
    workers. Memory: 16 bytes for each of these clicks and pairs, and 8 bytes for each query; the files stay mapped.

    Attributes:
        max_query_words, max_title_words: lengths of the sequences, from the schema.
    """

    def __init__(self, store: Store, options: RewritingOptions, worker_index: int = 0, num_workers: int = 1):
        """Opens the files.

        Args:
            store: a store with sequences.
            options: what a batch holds.
            worker_index: this worker, from 0 on.
            num_workers: number of workers.

        Raises:
            CommandError: the store has no sequences.
        """
        titles, rewriting, files = store.sequences(), store.schema.rewriting, store.rewriting()
        if titles is None or rewriting is None:
            raise CommandError(
                f"{store.path}: holds no sequences of words, which a rewriter needs; add the section `rewriting` to "
                f"the schema, and ingest the log again"
            )
        self._options, self._worker = options, worker_index
        self.max_query_words, self.max_title_words = rewriting.max_query_words, rewriting.max_title_words
        texts = store.packed_texts()
        self._title_texts = RaggedRows([(texts["title.splits"], texts["title.bytes"])])
        self._title_words = RaggedRows([(titles["title.splits"], titles["title.words"])])
        self._query_texts = RaggedRows([(file["query_text.splits"], file["query_text.bytes"]) for file in files])
        self._query_words = RaggedRows([(file["query.splits"], file["query.words"]) for file in files])
        self._items = store.counts.items
        clicks = np.concatenate([np.zeros(0, np.float32), *(file["query.clicks"] for file in files)]).astype(np.float64)
        firsts = row_splits(np.array([len(file["query.clicks"]) for file in files], np.int64))
        mine = [*zip(firsts.tolist(), files, strict=False)]
        if len(files) >= num_workers:
            mine = mine[worker_index::num_workers]
        self._clicks = _Links(mine, "click", "item")
        self._clicks.weigh(self._clicks.weights**options.click_power)
        self._pairs = _Links(mine, "pair", "query")
        self._pairs.weigh(self._pairs.weights * (1 + clicks[self._pairs.others]) ** options.target_power)
        vocabulary = Vocabulary(store.words_path)
        self._words = WordSequences(vocabulary)
        # The text of a word begins with a space.
        self._forms = WordForms(map(str.strip, self._words.texts()) if options.form_rate else ())
        self._pieces = TitlePieces(_keep_rates(vocabulary, options.title_subsampling * self._items))

    def batch(self, step: int) -> Batch:
        """Returns the batch of a step of this worker.

        Returns:
            queries, titles: texts as bytes, object [b]; queries are with typing errors, titles as people see them.
            query_words: int32 [b, max_query_words], the words of the query as it was meant: ids, END, and then 0.
            title_words: int32 [b, max_title_words], those of the title.
            weights: float32 [b]; 0 for a query without a known word, else 1.
            pair_source: texts to read, as bytes, object [p].
            pair_words: int32 [p, max_query_words], what to write.
            pair_weights: float32 [p]; 1, or 0 if the vocabulary has none of the words to write.

            Words that the vocabulary does not have are UNKNOWN. A model should not learn to write them.
        """
        random = np.random.default_rng([self._options.seed, step, self._worker])
        queries, query_words, items = self._queries_with_items(random)
        sources, pair_words = self._pairs_of_texts(random)
        return {
            "queries": queries,
            "query_words": query_words,
            "titles": self._titles(items),
            "title_words": _padded(*self._title_words.take(items), self.max_title_words),
            "weights": _weights(query_words),
            "pair_source": sources,
            "pair_words": pair_words,
            "pair_weights": _weights(pair_words),
        }

    def batches(self, first_step: int = 0) -> Iterator[Batch]:
        """Yields the batches from a step on, without an end."""
        return map(self.batch, itertools.count(first_step))

    # Examples.

    def _queries_with_items(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns b queries with noise, object [b], their words int32 [b, max_query_words], and rows of items."""
        options = self._options
        clicked = round(options.batch_size * (1 - options.title_queries)) if len(self._clicks) else 0
        queries, items = self._clicks.draw(random, clicked)
        others = random.integers(0, self._items, options.batch_size - clicked)
        parts = [self._noisy_queries(queries, random, options.drop_rate), self._noisy_pieces(others, random)]
        texts, words = map(np.concatenate, zip(*parts, strict=True))
        return texts, words, np.concatenate([items, others])

    def _pairs_of_texts(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Returns p texts to read, object [p], and the words to write, int32 [p, max_query_words]."""
        options = self._options
        same = round(options.pair_batch_size * options.query_pairs) if len(self._clicks) else 0
        share = max(0.0, 1 - options.query_pairs - options.title_pairs)
        different = min(round(options.pair_batch_size * share), math.ceil(len(self._pairs) / _PAIRS_PER_DRAW))
        queries, _ = self._clicks.draw(random, same)
        sources, targets = self._pairs.draw(random, different)
        items = random.integers(0, self._items, options.pair_batch_size - same - different)
        parts = [
            self._noisy_queries(queries, random, options.drop_rate),
            (self._noisy_queries(sources, random, 0.0)[0], self._words_of(targets)),
            self._noisy_pieces(items, random),
        ]
        texts, words = map(np.concatenate, zip(*parts, strict=True))
        return texts, words

    def _noisy_queries(
        self, rows: np.ndarray, random: np.random.Generator, drop_rate: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns queries with typing errors, object [n], and their words without, int32 [n, max_query_words]."""
        texts = self._query_texts.take(rows)
        noisy = shortened(*texts, _seeds(random, len(rows)), drop_rate=drop_rate, typo_rate=self._options.typo_rate)
        return self._in_other_forms(noisy, random), self._words_of(rows)

    def _words_of(self, queries: np.ndarray) -> np.ndarray:
        return _padded(*self._query_words.take(queries), self.max_query_words)

    def _titles(self, items: np.ndarray) -> np.ndarray:
        values, splits = self._title_texts.take(items)
        data = values.tobytes()
        return _objects([data[begin:end] for begin, end in itertools.pairwise(splits.tolist())])

    def _noisy_pieces(self, items: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Returns pieces of titles with typing errors, and the words of these pieces without."""
        titles = self._title_texts.take(items)
        pieces, noisy = self._pieces(*titles, _seeds(random, len(items)), typo_rate=self._options.typo_rate)
        return self._in_other_forms(noisy, random), self._words.encode(
            pieces, max_words=self.max_query_words, ends=True
        )

    def _in_other_forms(self, texts: list[bytes], random: np.random.Generator) -> np.ndarray:
        rate = self._options.form_rate
        return _objects(self._forms.replaced(texts, rate, random) if rate else texts)


class _Links:
    """The clicks or the pairs of the queries of some files, of which each draw takes one in proportion to its weight.

    Attributes:
        queries: int32 [links], rows of the queries, counted over all files of the store.
        others: int32 [links], rows of the items that were clicked, or of the queries to write.
        weights: float64 [links], as the store has them.
    """

    def __init__(self, files: Sequence[tuple[int, PackedFile]], name: str, other: str):
        """Reads the sections `name`.splits, .`other` and .weight of files, each with the row of its first query."""
        queries, others = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        weights = [np.zeros(0, np.float32)]
        for first, file in files:
            lengths = np.diff(file[f"{name}.splits"])
            queries.append(np.repeat(np.arange(first, first + len(lengths), dtype=np.int32), lengths))
            others.append(file[f"{name}.{other}"])
            weights.append(file[f"{name}.weight"])
        self.queries, self.others = np.concatenate(queries), np.concatenate(others)
        self.weights = np.concatenate(weights).astype(np.float64)

    def __len__(self) -> int:
        """Returns the number of links."""
        return len(self.queries)

    def weigh(self, weights: np.ndarray) -> None:
        """Sets the weights of the draws, float64 [links]."""
        self.weights = np.cumsum(weights)

    def draw(self, random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws links with replacement. Returns their queries and others, int32 [count]."""
        if not count:
            return self.queries[:0], self.others[:0]
        places = np.searchsorted(self.weights, random.random(count) * self.weights[-1], side="right")
        places = np.minimum(places, len(self.queries) - 1)
        return self.queries[places], self.others[places]


def _padded(values: np.ndarray, splits: np.ndarray, size: int) -> np.ndarray:
    """Returns sequences as rows int32 [n, size]: at most size - 1 ids, END, and then padding."""
    lengths = np.minimum(np.diff(splits), size - 1)
    columns = np.arange(size)
    places = np.minimum(splits[:-1, None] + columns, max(0, len(values) - 1))
    rows = values[places] if len(values) else np.zeros(places.shape, np.int32)
    rows = np.where(columns < lengths[:, None], rows, WordSequences.PADDING)
    rows[np.arange(len(lengths)), lengths] = WordSequences.END
    return rows.astype(np.int32)


def _weights(words: np.ndarray) -> np.ndarray:
    return (words >= WordSequences.FIRST_WORD).any(axis=1).astype(np.float32)


def _keep_rates(vocabulary: Vocabulary, frequent: float) -> dict[str, float]:
    """Returns the probability that a frequent word stays in a piece of a title.

    Subsampling as in word2vec (Mikolov et al., NIPS 2013): a word that stands in every other title does not tell items
    apart, and users rarely type it.

    Args:
        vocabulary: of titles and queries.
        frequent: number of occurrences from which on a word is left out at times; 0 leaves none out.
    """
    rates = {}
    for word in range(len(vocabulary) if frequent > 0 else 0):
        count = vocabulary.count(word)
        if count <= frequent:
            break  # the words come by falling frequency
        rates[vocabulary.token(word)] = math.sqrt(frequent / count)
    return rates


def _seeds(random: np.random.Generator, count: int) -> np.ndarray:
    return random.integers(0, 1 << 64, count, dtype=np.uint64)


def _objects(texts: list[bytes]) -> np.ndarray:
    """Returns texts as an array object [n]. NumPy's own type of bytes would drop zeros at their ends."""
    array = np.empty(len(texts), object)
    array[:] = texts
    return array
