"""What keeps bad rewrites out of the table of `dpsr rewrite` (docs/rewriting.md)."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpsr_common.errors import UsageError
from dpsr_common.packed_file import PackedFile
from dpsr_export.rewrite_table import WORDS, key_of, words_of
from dpsr_tf.data.store import Store, unpack_strings
from dpsr_tokenizer import Vocabulary, VocabularyBuilder

# float32 [texts, dim] of query texts: one unit vector each, or zeros for a text without a word.
Embed = Callable[[Sequence[str]], np.ndarray]

# Features of items whose values a rewrite may not lose, if the store has them.
KEPT = ("brand", "size")
# Sizes in words. Single letters are left out, because they are also parts of other words: the s of "men's".
_SIZES = frozenset(("xs", "xl", "xxl", "xxxl", "small", "medium", "large"))
_NUMBER = re.compile(r"\d+")
# Titles that are tokenized at a time.
_TITLES = 100_000
# From this many words on, a title may miss one of them: hardly any title has all words of a long query.
_MAY_MISS_ONE = 4


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A rewrite that the model or a list has proposed for a query.

    Attributes:
        text: the rewrite.
        log_probability: the model's; 0 for one of a list.
        cosine: of the vectors of query and rewrite; None if it was not computed.
        added: number of items whose titles match the rewrite and not the query (TitleIndex.matches).
        reason: why it was dropped; "" for one that is kept.
        listed: whether it is of the list of rewrites that always appear.
    """

    text: str
    log_probability: float
    cosine: float | None = None
    added: int | None = None
    reason: str = ""
    listed: bool = False


@dataclasses.dataclass(frozen=True)
class Limits:
    """The thresholds of the filters.

    Attributes:
        min_log_probability: smallest logarithm of a rewrite's probability.
        min_cosine: smallest cosine of query and rewrite, if there are towers.
        min_clicks: clicks of a query from which on a rewrite must lead to some of the clicked items.
        min_click_share: share of the query's clicks on items that the rewrite's words match.
    """

    min_log_probability: float
    min_cosine: float
    min_clicks: int
    min_click_share: float


class _Asked(NamedTuple):
    """A query, and its words."""

    text: str
    words: Sequence[str]

    @property
    def key(self) -> str:
        return " ".join(self.words)


class Filters:
    """Checks rewrites against the store, the towers, and the list of pairs that must never appear."""

    def __init__(
        self,
        store: Store,
        limits: Limits,
        kept: Sequence[str],
        never: Collection[tuple[str, str]],
        embed: Embed | None = None,
    ):
        """Indexes the titles of the store by word, and its clicks by query.

        Args:
            store: has titles, clicks, and the features `kept`.
            limits: thresholds.
            kept: features or filters of items whose values a rewrite may not lose.
            never: keys of a query and of a rewrite that it must not have.
            embed: embeds texts; None turns the filter by cosine off.

        Raises:
            UsageError: the store has no feature of a name in `kept`.
        """
        self._limits, self._never, self._embed = limits, never, embed
        self._titles = TitleIndex(store.titles())
        self._clicks = _Clicks(store)
        self._phrases = _phrases(store, kept)
        self._longest = max(map(len, self._phrases), default=0)

    def __call__(self, queries: Sequence[str], found: Sequence[Sequence[tuple[str, float]]]) -> list[list[Candidate]]:
        """Checks rewrites.

        Args:
            queries: n texts.
            found: for each query texts and log-probabilities, best first.

        Returns:
            For each query all of them in the same order, with the reason why one is dropped.
        """
        checked = [self._check(query, candidates) for query, candidates in zip(queries, found, strict=True)]
        if self._embed is None:
            return checked
        places = [(row, i) for row, of_query in enumerate(checked) for i, one in enumerate(of_query) if not one.reason]
        rows = list(dict.fromkeys(row for row, _ in places))
        if not rows:
            return checked
        texts = list(dict.fromkeys([*(queries[row] for row in rows), *(checked[row][i].text for row, i in places)]))
        place_of, vectors = {text: place for place, text in enumerate(texts)}, self._embed(texts)
        for row, i in places:
            one = checked[row][i]
            cosine = float(vectors[place_of[queries[row]]] @ vectors[place_of[one.text]])
            reason = "" if cosine >= self._limits.min_cosine else f"meaning: cosine below {self._limits.min_cosine:g}"
            checked[row][i] = dataclasses.replace(one, cosine=cosine, reason=reason)
        return checked

    def _check(self, query: str, candidates: Sequence[tuple[str, float]]) -> list[Candidate]:
        asked = _Asked(query, words_of(query))
        asked_phrases = self._phrases_of(asked.words)
        # A word that no title has is perhaps a misspelt brand.
        may_add = any(not self._titles.knows(word) for word in asked.words)
        seen: set[str] = set()
        checked = []
        for text, score in candidates:
            words, added = words_of(text), None
            new, phrases = " ".join(words), self._phrases_of(words)
            lost = next((phrase for phrase in asked_phrases if not _contains(words, phrase)), None)
            more = next((phrase for phrase in phrases if not _contains(asked.words, phrase)), None)
            if not words:
                reason = "empty: has no words"
            elif new == asked.key:
                reason = "same: has the words of the query"
            elif new in seen:
                reason = "twice: is a better candidate already"
            elif (asked.key, new) in self._never:
                reason = "never: the list forbids the pair"
            elif score < self._limits.min_log_probability:
                reason = f"unlikely: log-probability below {self._limits.min_log_probability:g}"
            elif _numbers(asked.key) != _numbers(new):
                reason = _difference(_numbers(asked.key), _numbers(new))
            elif lost is not None:
                reason = f"{self._name_of(lost)}: loses {' '.join(lost)}"
            elif more is not None and not may_add:
                reason = f"{self._name_of(more)}: {' '.join(more)} is not in the query"
            elif set(words) <= set(asked.words):
                reason = "no words: has only words of the query"
            else:
                added, reason = self._found(asked, words)
            seen.add(new)
            checked.append(Candidate(text, score, None, added, reason))
        return checked

    def _found(self, asked: _Asked, words: Sequence[str]) -> tuple[int, str]:
        """Returns how many items a rewrite adds to what a query finds, and why it is dropped, or ""."""
        # The same for both, so that a word more does not add items.
        may_miss = max(len(set(words)), len(set(asked.words))) >= _MAY_MISS_ONE
        items, matched = self._titles.matches(words, may_miss), self._titles.matches(asked.words, may_miss)
        added = int(np.count_nonzero(~_in_sorted(items, matched)))
        if not added:
            return added, "no items: its words match no other titles than those of the query"
        clicks = self._clicks.of(asked.text)
        share = float(_in_sorted(clicks, items).mean()) if len(clicks) >= self._limits.min_clicks else 1.0
        if share < self._limits.min_click_share:
            return added, f"drift: matches {share:.0%} of the query's {len(clicks):,} clicks"
        return added, ""

    def _name_of(self, phrase: tuple[str, ...]) -> str:
        return self._phrases.get(phrase, "size")

    def _phrases_of(self, words: Sequence[str]) -> list[tuple[str, ...]]:
        """Returns the values of features in a query, the longest at each place, and its sizes in words."""
        found, place = [], 0
        while place < len(words):
            lengths = range(min(self._longest, len(words) - place), 0, -1)
            length = next((n for n in lengths if tuple(words[place : place + n]) in self._phrases), 0)
            if length or words[place] in _SIZES:
                found.append(tuple(words[place : place + max(length, 1)]))
            place += max(length, 1)
        return found


def _numbers(key: str) -> frozenset[str]:
    return frozenset(_NUMBER.findall(key))


def _difference(numbers: frozenset[str], now: frozenset[str]) -> str:
    lost, made_up = " ".join(sorted(numbers - now)), " ".join(sorted(now - numbers))
    return f"number: loses {lost}" if lost else f"number: {made_up} is not in the query"


def _contains(words: Sequence[str], phrase: tuple[str, ...]) -> bool:
    n = len(phrase)
    return any(tuple(words[place : place + n]) == phrase for place in range(len(words) - n + 1))


def _phrases(store: Store, names: Sequence[str]) -> dict[tuple[str, ...], str]:
    """Returns the values of features or filters of items as words, and the name of the feature of each."""
    phrases: dict[tuple[str, ...], str] = {}
    for name in names:
        file = _file_of(store, name)
        if file is None:
            raise UsageError(
                f"--keep: the items of {store.path} have no feature or filter {name!r} with values, expected some of: "
                f"{', '.join(value_names(store)) or 'none'}"
            )
        for value in unpack_strings(file, f"values.{name}"):
            if words := tuple(words_of(value)):
                phrases.setdefault(words, name)
    return phrases


def value_names(store: Store) -> list[str]:
    """Returns the names of the features and filters of items that have values in words."""
    files = [file for file in (store.items(), store.filters()) if file is not None]
    return sorted({name[len("values.") : -len(".splits")] for file in files for name in file if _is_values(name)})


def _is_values(section: str) -> bool:
    return section.startswith("values.") and section.endswith(".splits")


def _file_of(store: Store, name: str) -> PackedFile | None:
    files = (file for file in (store.items(), store.filters()) if file is not None)
    return next((file for file in files if f"values.{name}.bytes" in file), None)


class TitleIndex:
    """Finds the items whose titles match some words."""

    def __init__(self, titles: Sequence[str]):
        """Indexes titles, one for each item."""
        builder = VocabularyBuilder(WORDS)
        for begin in range(0, len(titles), _TITLES):
            builder.add(titles[begin : begin + _TITLES])
        with tempfile.TemporaryDirectory() as name:
            # The file may go when it is mapped.
            # Words that no title has share an id, which no title has.
            builder.write(Path(name) / "words.dpsr", num_oov_buckets=1)
            self._words = Vocabulary(Path(name) / "words.dpsr")
        pairs = []
        for begin in range(0, len(titles), _TITLES):
            ids, splits = self._words.encode_batch(titles[begin : begin + _TITLES])
            items = np.repeat(np.arange(begin, begin + len(splits) - 1), np.diff(splits))
            pairs.append(np.unique(ids.astype(np.int64) * len(titles) + items))
        held = np.sort(np.concatenate(pairs)) if pairs else np.zeros(0, np.int64)
        self._items = (held % max(len(titles), 1)).astype(np.int32)
        self._splits = np.searchsorted(held, np.arange(self._words.num_ids + 1, dtype=np.int64) * len(titles))

    def knows(self, word: str) -> bool:
        """Returns whether a title has this word."""
        return bool(len(self._items_of(word)))

    def matches(self, words: Sequence[str], may_miss: bool = False) -> np.ndarray:
        """Returns the items, ascending int32, whose title has all of some words, or all but one if `may_miss`."""
        lists = sorted((self._items_of(word) for word in dict.fromkeys(words)), key=len)
        if not may_miss or len(lists) < 2:
            return _in_all(lists)
        return np.unique(np.concatenate([_in_all([*lists[:i], *lists[i + 1 :]]) for i in range(len(lists))]))

    def _items_of(self, word: str) -> np.ndarray:
        ids = self._words.encode(word)
        return self._items[self._splits[ids[0]] : self._splits[ids[0] + 1]] if len(ids) == 1 else self._items[:0]


def _in_all(lists: Sequence[np.ndarray]) -> np.ndarray:
    """Returns what is in all of some ascending arrays, the shortest one first; nothing if there are none."""
    if not lists:
        return np.zeros(0, np.int32)
    found = lists[0]
    for other in lists[1:]:
        found = found[_in_sorted(found, other)]
    return found


def _in_sorted(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Returns whether each of some values is in an ascending array, bool of the same shape."""
    if not len(table):
        return np.zeros(len(values), bool)
    return table[np.minimum(np.searchsorted(table, values), len(table) - 1)] == values


class _Clicks:
    """The clicks of each query of a log."""

    def __init__(self, store: Store):
        shards = store.interactions()
        self._splits = [file["positive.splits"] for file in shards]
        self._items = [file["positive.item"] for file in shards]
        texts = (unpack_strings(file, "query_text") for file in shards)
        self._place_of = {text: (shard, row) for shard, rows in enumerate(texts) for row, text in enumerate(rows)}

    def of(self, query: str) -> np.ndarray:
        """Returns the items of a query's clicks, int32 [clicks]; none for a query that the log does not have."""
        place = self._place_of.get(query.strip())
        if place is None:
            return np.zeros(0, np.int32)
        shard, row = place
        return self._items[shard][self._splits[shard][row] : self._splits[shard][row + 1]]


def frequent_queries(store: Store, most: int) -> Iterator[str]:
    """Yields the queries of a log with the most clicks, the most frequent one first."""
    shards = store.interactions()
    counts = np.concatenate([np.diff(shard["positive.splits"]) for shard in shards])
    texts = list(store.queries())
    for row in np.lexsort((np.arange(len(counts)), -counts))[:most].tolist():
        if key_of(texts[row]):
            yield texts[row]
