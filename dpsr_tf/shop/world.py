"""The world behind the generated shop: what is sold, who buys, what people can ask for, and what each person likes.

The world is made in this order, each step with a random stream of its own, so that a change of one step leaves the
random numbers of the others as they are:

    lexicon -> catalogue -> items -> users -> meanings -> texts -> interests

An item is relevant to a query if its attributes are what one of the query's meanings asks for. Titles never decide
that. Codes (of languages, categories, types, brands, words, shops) count over both languages; -1 is none. All arrays
are in memory. Their size grows with items, users and query texts, not with the log.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from dpsr_common.errors import UsageError
from dpsr_tf.shop.catalogue import LANGUAGE_CODES, USER_CLASSES, Catalogue, Items
from dpsr_tf.shop.lexicon import ItemType, Language, Value
from dpsr_tf.shop.parameters import Parameters
from dpsr_tf.shop.sampling import draw, random_stream, running_sums, zipf
from dpsr_tf.shop.users import Users

# How much each of its parts counts in the latent taste; docs/generated_shop.md has the formula.
TASTE_WEIGHTS = {"brand": 1.0, "shop": 0.6, "style": 0.8}
# How far a text names its meaning by synonyms: for some of its parts, or for all of them; 0 is for none.
SOME_SYNONYMS, ALL_SYNONYMS = 1, 2
# What World.missed returns for an item of another type or category.
NOT_AN_ANSWER = 9


class World:
    """A whole shop, with everything that people can ask for.

    A *meaning* is what somebody can want: items of a category and, each of them optional, of a type, of a brand, and
    with up to two words of attributes. A *text* asks for a meaning; a text with several meanings is polysemous. A
    *pair* is a meaning and one of its texts. An *answer* is a list of items: the items of a meaning (which has the
    meaning's code), the items of all meanings of a polysemous text, items that mislead in a search for a type, or a
    whole category.
    """

    def __init__(self, parameters: Parameters):
        self.parameters = parameters
        self.catalogue = Catalogue(parameters)
        self.items = Items(self.catalogue, parameters)
        self.users = Users(self.catalogue, parameters)
        self._make_meanings()
        self._make_texts()
        self._hold_out(random_stream(parameters, "held out"))
        self._make_answers()
        self._make_interests()
        self._make_misspellings(random_stream(parameters, "misspellings"))

    def appeal(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """Returns how much an item appeals to a user, in log odds, float64 of the common shape of the two arrays."""
        users, items, parameters = self.users, self.items, self.parameters
        place = self.catalogue.category_place[items.category[item]]
        style = items.style[item]
        same_style = (style[..., 0] >= 0) & (users.styles[user, style[..., 0]] == style[..., 1])
        latent = TASTE_WEIGHTS["brand"] * (users.brands[user, place] == items.brand[item])
        latent = latent + TASTE_WEIGHTS["shop"] * (users.shops[user, place] == items.shop[item])
        latent += TASTE_WEIGHTS["style"] * same_style
        return parameters.taste * items.liking[item, users.profile[user]] + parameters.history * latent

    def missed(self, meaning: np.ndarray, item: np.ndarray) -> np.ndarray:
        """Counts how many of a meaning's brand and words an item lacks.

        Returns:
            int64 of the common shape of the two arrays; NOT_AN_ANSWER where type or category differ.
        """
        wanted, items = self.meaning[meaning], self.items
        fits = (wanted[..., 0] == items.category[item]) & ((wanted[..., 1] < 0) | (wanted[..., 1] == items.type[item]))
        missed = ((wanted[..., 2] >= 0) & (wanted[..., 2] != items.brand[item])).astype(np.int64)
        words = items.words[item]
        for column in (3, 4):
            word = wanted[..., column]
            missed += (word >= 0) & ~(words == word[..., None]).any(-1)
        return np.where(fits, missed, NOT_AN_ANSWER)

    def sessions(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draws n users by activity and the pair that each asks first. Returns both, int64 [n]."""
        zero = np.zeros(n, np.int64)
        user = draw(self._activity, zero, zero + len(self.users), rng)
        loyal = rng.random(n) < self.parameters.loyalty
        place = self.users.categories[user, rng.integers(0, 2, n)]
        cell = (self.users.language[user] * USER_CLASSES + self.users.profile[user]) * (self._places + 1)
        begin = np.where(loyal, self._cells[cell + place], self._cells[cell])
        end = np.where(loyal, self._cells[cell + place + 1], self._cells[cell + self._places])
        # Where nobody asks for anything of the category, the session is about any category.
        empty = self._interest[end] <= self._interest[begin]
        begin[empty], end[empty] = self._cells[cell][empty], self._cells[cell + self._places][empty]
        at = draw(self._interest, begin, end, rng)
        return user, at - self._cells[cell] + self._first_pair[self.users.language[user]]

    def answer_rows(self, answer: int) -> np.ndarray:
        """Returns the rows of an answer's items, ascending."""
        return np.sort(self.answer_items[self.answer_splits[answer] : self.answer_splits[answer + 1]])

    def _make_meanings(self) -> None:
        """Makes a meaning of every combination that at least one item answers.

        Sets `meaning` int64 [meanings, 5] (category, type, brand and two words; -1 is none), and `item_meanings`.
        """
        items = self.items
        sizes = [len(self.catalogue.categories), len(self.catalogue.types), len(self.catalogue.brands)]
        sizes += [len(self.catalogue.words)] * 2
        none = np.full(len(items), -1)
        word = items.words.T
        single = [(word[slot], none) for slot in range(3)]
        pairs = [(word[a], word[b]) for a, b in itertools.combinations(range(3), 2)]
        combinations = [(items.type, none, none, none), (items.type, items.brand, none, none)]
        combinations += [(items.type, none, *words) for words in [*single, *pairs]]
        combinations += [(items.type, items.brand, *words) for words in single]
        combinations += [(none, items.brand, none, none), *((none, items.brand, *words) for words in single)]
        num_words = [0, 0, 1, 1, 1, 2, 2, 2, 1, 1, 1, 0, 1, 1, 1]
        keys = np.empty((len(combinations), len(items)), np.int64)
        for row, (columns, words) in enumerate(zip(combinations, num_words, strict=True)):
            key = items.category
            for column, size in zip(columns, sizes[1:], strict=True):
                key = key * (size + 1) + column + 1
            keys[row] = np.where((np.array(columns[2:]) >= 0).sum(0) == words, key, -1)
        known, inverse = np.unique(keys, return_inverse=True)
        # The key -1 is that of items without that many words.
        first = int(known[0] < 0)
        known, inverse = known[first:], inverse.reshape(keys.shape) - first
        # The meanings that each item answers, int32 [items, 15]; -1 is none.
        self.item_meanings = np.ascontiguousarray(inverse.T.astype(np.int32))
        self.meaning = np.empty((len(known), 5), np.int64)
        for column in (4, 3, 2, 1):
            known, self.meaning[:, column] = np.divmod(known, sizes[column] + 1)
        self.meaning[:, 0] = known
        self.meaning[:, 1:] -= 1

    def _make_texts(self) -> None:
        """Makes the texts of all meanings, and the pairs of meanings and texts.

        Sets `texts`, for each text `senses` (its meanings), `polysemous`, `text_gap` and `text_language`; and
        `pair_meaning`, `pair_text`, `pair_gap` and `pair_asked` (whether the log may hold the pair), [pairs] each.
        """
        texts: dict[str, int] = {}
        meanings, rows, gaps, asked = [], [], [], []
        for meaning, codes in enumerate(self.meaning.tolist()):
            for text, gap, is_asked in self._phrasings(codes):
                meanings.append(meaning)
                rows.append(texts.setdefault(text, len(texts)))
                gaps.append(gap)
                asked.append(is_asked)
        self.pair_meaning, self.pair_text, self.pair_gap, self.pair_asked = (
            np.array(meanings),
            np.array(rows),
            np.array(gaps, np.int8),
            np.array(asked),
        )
        self.texts = list(texts)
        self.senses: list[list[int]] = [[] for _ in texts]
        for meaning, row in zip(meanings, rows, strict=True):
            self.senses[row].append(meaning)
        self.polysemous = np.array([len(senses) > 1 for senses in self.senses])
        # How far each text consists of synonyms. Of several meanings the one with the fewest synonyms counts.
        self.text_gap = np.full(len(texts), ALL_SYNONYMS, np.int8)
        np.minimum.at(self.text_gap, self.pair_text, self.pair_gap)
        self.text_language = np.zeros(len(texts), np.int64)
        self.text_language[self.pair_text] = self.catalogue.category_language[self.meaning[self.pair_meaning, 0]]

    def _phrasings(self, codes: list[int]) -> Iterator[tuple[str, int, bool]]:
        """Yields the texts that ask for a meaning: text; 0, SOME_SYNONYMS or ALL_SYNONYMS; whether the log holds it."""
        category, noun, brand, *words = codes
        separator = self.catalogue.languages[self.catalogue.category_language[category]].separator
        brands = [self.catalogue.brands[brand]] if brand >= 0 else []
        entries: list[ItemType | Value] = [self.catalogue.words[word] for word in words if word >= 0]
        entries += [self.catalogue.types[noun]] if noun >= 0 else []
        unasked = self.catalogue.unasked[noun] if noun >= 0 else frozenset()
        for choice in itertools.product(*([(e.word, False), *((s, True) for s in e.synonyms)] for e in entries)):
            parts = [text for text, _ in choice]
            parts[len(parts) - (noun >= 0) : len(parts) - (noun >= 0)] = brands
            late = [part for part in parts if part.startswith("for ")]
            parts = [part for part in parts if not part.startswith("for ")] + late
            synonyms = sum(synonym for _, synonym in choice)
            # `parts` holds the brand, too, which has no synonym: a text with a brand never is all synonyms.
            gap = ALL_SYNONYMS if synonyms == len(parts) else SOME_SYNONYMS if synonyms else 0
            yield separator.join(parts), gap, noun < 0 or choice[-1][0] not in unasked

    def _hold_out(self, rng: np.random.Generator) -> None:
        """Sets the fold of each meaning and text: 0 is the log, 1 dev, 2 test.

        Meanings that share a text have the same fold; otherwise the log would give the text away. Bare types and brands
        stay in the log, so that a model can learn from it what each word means. Each kind of query occurs in both dev
        and test, even in the smallest shop.
        """
        # Meanings that share a text are united into one group, which has one of them as its root.
        group = list(range(len(self.meaning)))

        def root(meaning: int) -> int:
            while group[meaning] != meaning:
                group[meaning] = group[group[meaning]]
                meaning = group[meaning]
            return meaning

        for senses in self.senses:
            for meaning in senses[1:]:
                group[root(meaning)] = root(senses[0])
        group_of = np.array([root(meaning) for meaning in range(len(group))])
        has_type = self.meaning[:, 1] >= 0
        modifiers = (self.meaning[:, 2:] >= 0).sum(1)
        bare = np.zeros(len(group_of), bool)
        np.logical_or.at(bare, group_of, modifiers + has_type < 2)
        is_polysemous, gap = np.zeros(len(group_of), bool), np.zeros(len(group_of), np.int8)
        np.logical_or.at(is_polysemous, group_of[self.pair_meaning], self.polysemous[self.pair_text])
        np.maximum.at(gap, group_of[self.pair_meaning], self.pair_gap)
        roots = np.unique(group_of)
        roots = roots[~bare[roots]]
        language = self.catalogue.category_language[self.meaning[roots, 0]]
        # One stratum for each language and kind of query: plain, partial, gap, polysemous.
        stratum = language * 4 + np.where(is_polysemous[roots], 3, gap[roots])
        # A meaning without a type is held out only if it is polysemous.
        stratum[~has_type[roots] & ~is_polysemous[roots]] = -1
        fold = np.zeros(len(group_of), np.int8)
        for kind in range(8):
            chosen = rng.permutation(roots[stratum == kind])
            # Few meanings have a text of synonyms only or a polysemous text, so a larger share of them is held out.
            share = self.parameters.held_out_share * (3 if kind % 4 >= ALL_SYNONYMS else 1)
            wanted = max(4, round(share * len(chosen)))
            chosen = chosen[: min(wanted, len(chosen) // 2)]
            fold[chosen] = 1 + np.arange(len(chosen)) % 2
        self.fold = fold[group_of]
        self.text_fold = np.array([self.fold[senses[0]] for senses in self.senses])

    def _make_answers(self) -> None:
        """Makes all answers.

        Sets `answer_splits` int64 [answers + 1], `answer_items` int32, and `answer_sums` float64, the running sums of
        the items' popularity.
        """
        items, catalogue = self.items, self.catalogue
        flat = self.item_meanings.ravel()
        order = np.argsort(flat, kind="stable")[(flat < 0).sum() :]
        sizes = [np.bincount(flat[flat >= 0], minlength=len(self.meaning))]
        rows = [(order // self.item_meanings.shape[1]).astype(np.int32)]
        splits = np.concatenate([[0], np.cumsum(sizes[0])])
        extra: list[np.ndarray] = []
        unions: dict[tuple[int, ...], int] = {}
        self.text_answer = np.array([senses[0] for senses in self.senses])
        for text in np.flatnonzero(self.polysemous):
            senses = tuple(self.senses[text])
            if senses not in unions:
                unions[senses] = len(self.meaning) + len(extra)
                extra.append(np.unique(np.concatenate([rows[0][splits[m] : splits[m + 1]] for m in senses])))
            self.text_answer[text] = unions[senses]
        # Answers to show beside the right ones: items that share words with a type, or else its whole category.
        self.category_answer = np.zeros(len(catalogue.categories), np.int64)
        for category in range(len(catalogue.categories)):
            self.category_answer[category] = len(self.meaning) + len(extra)
            extra.append(np.flatnonzero(items.category == category))
        self.misleading_answer = np.full(len(catalogue.types), -1)
        for code in range(len(catalogue.types)):
            misleading = np.flatnonzero(np.isin(items.type, self._misleading_types(code)))
            if len(misleading):
                self.misleading_answer[code] = len(self.meaning) + len(extra)
                extra.append(misleading)
        rows += [part.astype(np.int32) for part in extra]
        sizes.append(np.array([len(part) for part in extra]))
        self.answer_items = np.concatenate(rows)
        self.answer_splits = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
        self.answer_sums = running_sums(items.popularity[self.answer_items])

    def _misleading_types(self, code: int) -> list[int]:
        """Returns the types whose titles hold the word of a type: its accessories, and "apple juice" for "apple"."""
        catalogue, word = self.catalogue, self.catalogue.types[code].word
        language = int(catalogue.category_language[catalogue.type_category[code]])
        separator = catalogue.languages[language].separator
        longer = [t for t in catalogue.types_of(language) if catalogue.types[t].word.startswith(word + separator)]
        return sorted({*catalogue.accessories(code), *(int(t) for t in longer)} - {code})

    def misleading(self, language: int) -> dict[str, list[str]]:
        """Returns, for the word of each type, the words of the types that mislead in a search for it."""
        types = self.catalogue.types
        words = {
            types[t].word: [types[m].word for m in self._misleading_types(t)] for t in self.catalogue.types_of(language)
        }
        return {word: others for word, others in words.items() if others}

    def _make_interests(self) -> None:
        """Sets how often each class of users asks each pair. Short queries and the shop's own words are frequent."""
        catalogue, parameters = self.catalogue, self.parameters
        category = self.meaning[self.pair_meaning, 0]
        order = np.argsort(category, kind="stable")
        self.pair_meaning, self.pair_text, self.pair_gap, self.pair_asked = (
            column[order] for column in (self.pair_meaning, self.pair_text, self.pair_gap, self.pair_asked)
        )
        category = category[order]
        language = catalogue.category_language[category]
        size = np.diff(self.answer_splits)[: len(self.meaning)]
        # A type alone is asked most often, then a brand alone, then a brand with a type.
        modifiers = (self.meaning[:, 2:] >= 0).sum(1) - 0.5 * (self.meaning[:, 1] < 0)
        rarity = 3.0 * modifiers[self.pair_meaning] + (self.pair_gap > 0) - 0.5 * np.log(size[self.pair_meaning])
        self.pair_weight = np.zeros(len(order))
        self._first_pair = np.searchsorted(language, [0, 1])
        for number, name in enumerate(LANGUAGE_CODES):
            rng = random_stream(parameters, f"{name}.queries")
            mine = np.flatnonzero(language == number)
            rank = np.argsort(rng.gumbel(size=len(mine)) * 1.5 + rarity[mine])
            self.pair_weight[mine[rank]] = zipf(len(mine), parameters.query_exponent)
        self.pair_weight[(self.fold[self.pair_meaning] > 0) | ~self.pair_asked] = 0
        self.meaning_weight = np.bincount(self.pair_meaning, self.pair_weight, len(self.meaning))
        # The pairs of each meaning, for the second query of a session.
        self._by_meaning = np.argsort(self.pair_meaning, kind="stable")
        self._meaning_splits = np.concatenate([[0], np.cumsum(np.bincount(self.pair_meaning, minlength=len(size)))])
        self._meaning_sums = running_sums(self.pair_weight[self._by_meaning])

        # How often each class of users asks each pair, sorted by language, class and place of the category.
        self._places = int(catalogue.category_place.max()) + 1
        self._activity = running_sums(self.users.activity)
        weights, cells, begin = [], [], 0
        attraction = self._attraction()
        for number in range(len(LANGUAGE_CODES)):
            mine = np.flatnonzero(language == number)
            bounds = np.searchsorted(catalogue.category_place[category[mine]], np.arange(self._places + 1))
            for profile in range(USER_CLASSES):
                weight = self.pair_weight[mine] * attraction[self.pair_meaning[mine], profile]
                weights.append(weight / weight.sum())
                cells.append(bounds + begin)
                begin += len(mine)
        # Where each cell [language, class, place] begins in _interest, flat.
        self._cells = np.concatenate(cells)
        self._interest = running_sums(np.concatenate(weights))

    def _attraction(self) -> np.ndarray:
        """Returns how much each class likes each meaning, float64 [meanings, USER_CLASSES].

        It is exp(0.5 * taste * liking), averaged over the meaning's items by popularity.
        """
        bounds = self.answer_splits[: len(self.meaning) + 1]
        rows = self.answer_items[: bounds[-1]]
        mass = self.items.popularity[rows]
        total = np.add.reduceat(mass, bounds[:-1])
        attraction = np.empty((len(self.meaning), USER_CLASSES))
        for profile in range(USER_CLASSES):
            # The factor 0.5 is a square root: users who dislike pink things still ask for them now and then.
            liked = np.exp(0.5 * self.parameters.taste * self.items.liking[:, profile])
            attraction[:, profile] = np.add.reduceat(mass * liked[rows], bounds[:-1]) / total
        return attraction

    def another_pair(self, item: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draws a pair that each item answers, int64 [n]. A meaning's weight is the square root of its frequency."""
        meanings = self.item_meanings[item]
        weight = np.where(meanings >= 0, np.sqrt(self.meaning_weight[meanings]), 0).cumsum(1)
        at = (rng.random((len(item), 1)) * weight[:, -1:] >= weight).sum(1)
        meaning = meanings[np.arange(len(item)), np.minimum(at, meanings.shape[1] - 1)]
        return self._by_meaning[
            draw(self._meaning_sums, self._meaning_splits[meaning], self._meaning_splits[meaning + 1], rng)
        ]

    def _make_misspellings(self, rng: np.random.Generator) -> None:
        """Sets `misspelt`, the misspelt texts, and `misspelt_splits` int64 [texts + 1], where each text's begin."""
        known = set(self.texts)
        self.misspelt: list[str] = []
        splits = [0]
        slips = rng.random((len(self.texts), self.parameters.misspellings, 3))
        for text, language, numbers in zip(self.texts, self.text_language.tolist(), slips, strict=True):
            for a, b, c in numbers.tolist():
                slip = _misspelt(text, self.catalogue.languages[language], a, b, c)
                if slip is not None and slip not in known:
                    known.add(slip)
                    self.misspelt.append(slip)
            splits.append(len(self.misspelt))
        self.misspelt_splits = np.array(splits)

    def text_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Lists all texts, followed by the misspelt ones.

        Returns:
            The row of each one's right text, int64 [all], and whether it is misspelt, bool [all].
        """
        right = np.repeat(np.arange(len(self.texts)), np.diff(self.misspelt_splits))
        rows = np.concatenate([np.arange(len(self.texts)), right])
        return rows, np.arange(len(rows)) >= len(self.texts)


def _misspelt(text: str, language: Language, a: float, b: float, c: float) -> str | None:
    """Returns a text with one typing error, or None if none is possible. `a`, `b`, `c` are random numbers in [0, 1)."""
    if not language.separator:
        places = [(i, pair[1]) for pair in language.homophones for i, char in enumerate(text) if char == pair[0]]
        if not places:
            return None
        i, wrong = places[int(a * len(places))]
        return text[:i] + wrong + text[i + 1 :]
    words = text.split(" ")
    long = [i for i, word in enumerate(words) if len(word) >= 4 and word.isalpha()]
    if not long:
        return None
    i = long[int(a * len(long))]
    word = words[i]
    at = 1 + int(b * (len(word) - 2))
    words[i] = (
        word[:at] + word[at + 1 :],
        word[:at] + word[at] + word[at:],
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
    )[int(c * 3)]
    slip = " ".join(words)
    return None if slip == text else slip


def make_world(parameters: Parameters) -> World:
    """Makes the world of some parameters. Raises UsageError if they cannot be combined."""
    problem = parameters.problem()
    if problem:
        raise UsageError(problem)
    return World(parameters)
