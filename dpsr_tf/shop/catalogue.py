"""What the generated shop sells: its brands, words and shops, and its items."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from dpsr_tf.shop.lexicon import AGES, GENDERS, POWERS, Category, ItemType, Language, Value, load_lexicon
from dpsr_tf.shop.parameters import Parameters
from dpsr_tf.shop.sampling import random_stream, zipf

LANGUAGE_CODES = ("en", "zh")
USER_CLASSES = len(GENDERS) * len(AGES) * len(POWERS)
# Brands of tier 0 are cheaper than the type's price by this factor, brands of tier 2 are dearer by it.
_TIER_FACTOR = 1.8
_OUT_OF_STOCK_SHARE = 0.03


class Catalogue:
    """Names and codes of categories, types, brands, words of attributes, and shops."""

    def __init__(self, parameters: Parameters):
        self.languages = _with_types_of_families(parameters)
        self.categories: list[Category] = [c for language in self.languages for c in language.categories]
        self.category_language = np.repeat([0, 1], [len(language.categories) for language in self.languages])
        # The place of a category among those of its language.
        self.category_place = np.concatenate([np.arange(len(language.categories)) for language in self.languages])
        self.types: list[ItemType] = [t for category in self.categories for t in category.types]
        self.type_category = np.repeat(np.arange(len(self.categories)), [len(c.types) for c in self.categories])
        self.brands: list[str] = []
        self.category_brands: list[np.ndarray] = []  # codes of the brands of each category
        # Values of attributes. A word that occurs in two attributes has one code.
        self.words: list[Value] = []
        # For each language, the codes of each attribute's values.
        self.attributes: list[dict[str, np.ndarray]] = []
        # For each language, the attributes whose values are words, not numbers.
        self.styles: list[list[str]] = []
        self.shops: list[str] = []
        self.category_shops: list[np.ndarray] = []  # codes of the shops of each category
        for number, language in enumerate(self.languages):
            rng = random_stream(parameters, f"{LANGUAGE_CODES[number]}.catalogue")
            self._add_brands(language, parameters, rng)
            self._add_words(language)
            per_category = max(2, parameters.shops // len(self.categories))
            self._add_shops(language, per_category, rng)
        # Whether the second type is an accessory of the first. The last row is for no type (-1) and all false.
        self.fits = np.zeros((len(self.types) + 1, len(self.types)), bool)
        for code, item_type in enumerate(self.types):
            if item_type.fits is not None:
                same = self.types_of(int(self.category_language[self.type_category[code]]))
                self.fits[same, code] = [self.types[t].word == item_type.fits for t in same]
        self.homonyms = self._add_homonyms(parameters)
        self.unasked = self._unasked(parameters)  # for each type, the synonyms that nobody uses in the log
        shares = ((0.0, 1 - parameters.chinese_share), (1 - parameters.chinese_share, 1.0))
        self.num_items = [_between(parameters.items, share) for share in shares]
        self.num_users = [_between(parameters.users, share) for share in shares]

    def types_of(self, language: int) -> np.ndarray:
        """Returns the codes of a language's types."""
        return np.flatnonzero(self.category_language[self.type_category] == language)

    def accessories(self, item_type: int) -> list[int]:
        """Returns the codes of the types that are accessories of a type."""
        return np.flatnonzero(self.fits[item_type]).tolist()

    def own_synonyms(self, item_type: int) -> list[str]:
        """Returns the synonyms of a type, without those that it shares with another type."""
        return [synonym for synonym in self.types[item_type].synonyms if synonym not in self.homonyms]

    def _unasked(self, parameters: Parameters) -> list[frozenset[str]]:
        """Returns for each type the synonyms that the log never holds.

        Those are synonyms with a rare word, which no query of the log holds for any type, and synonyms that are chosen
        for one type alone.
        """
        rng = random_stream(parameters, "unasked synonyms")
        # The two words of each synonym that a family composes.
        parts = {
            one + language.separator + other: (one, other)
            for language in self.languages
            for category in language.categories
            for family in category.families
            for modifier, base in itertools.product(family.modifiers, family.bases)
            for one, other in itertools.product(modifier.synonyms, base.synonyms)
        }
        own = [self.own_synonyms(code) for code in range(len(self.types))]
        words = list(dict.fromkeys(word for mine in own for synonym in mine for word in parts.get(synonym, (synonym,))))
        is_rare = rng.random(len(words)) < parameters.rare_synonyms
        rare = {word for word, chosen in zip(words, is_rare, strict=True) if chosen}
        return [
            frozenset(
                synonym
                for synonym, draw in zip(mine, rng.random(len(mine)), strict=True)
                if draw < parameters.unasked_synonyms or not rare.isdisjoint(parts.get(synonym, (synonym,)))
            )
            for mine in own
        ]

    def _add_brands(self, language: Language, parameters: Parameters, rng: np.random.Generator) -> None:
        invented, shared = parameters.invented_brands, parameters.shared_brands
        known = {brand for category in language.categories for brand in category.brands}
        known |= {word for category in language.categories for t in category.types for word in t.word.split()}
        names = _invent(language, invented * len(language.categories), 3 if language.separator else 2, known, rng)
        codes: dict[str, int] = {}
        for place, category in enumerate(language.categories):
            mine = [*category.brands, *names[place * invented : (place + 1) * invented]]
            if place:
                mine += names[(place - 1) * invented :][:shared]
            for name in mine:
                if name not in codes:
                    codes[name] = len(self.brands)
                    self.brands.append(name)
            self.category_brands.append(np.array([codes[name] for name in mine]))

    def _add_homonyms(self, parameters: Parameters) -> dict[str, list[str]]:
        """Adds synonyms that two types of different categories share. Returns the types' words for each synonym."""
        language, rng = self.languages[0], random_stream(parameters, "homonyms")
        known = {*self.brands, *(word for t in self.types for text in (t.word, *t.synonyms) for word in text.split())}
        free = [int(t) for t in rng.permutation(self.types_of(0)) if self.types[t].fits is None]
        homonyms: dict[str, list[str]] = {}
        for name in _invent(language, parameters.homonyms, 3, known, rng):
            one = free.pop()
            other = next((t for t in free[::-1] if self.type_category[t] != self.type_category[one]), None)
            if other is None:
                break
            free.remove(other)
            for code in (one, other):
                mine = self.types[code]
                self.types[code] = dataclasses.replace(mine, synonyms=(*mine.synonyms, name))
            homonyms[name] = [self.types[code].word for code in (one, other)]
        return homonyms

    def _add_words(self, language: Language) -> None:
        codes: dict[str, int] = {}
        attributes = {}
        for attribute in language.attributes:
            for value in attribute.all_values():
                if value.word not in codes:
                    codes[value.word] = len(self.words)
                    self.words.append(value)
            attributes[attribute.name] = np.array([codes[value.word] for value in attribute.all_values()])
        self.attributes.append(attributes)
        self.styles.append([attribute.name for attribute in language.attributes if attribute.values])

    def _add_shops(self, language: Language, per_category: int, rng: np.random.Generator) -> None:
        total = per_category * len(language.categories)
        names = _invent(language, total, 2, set(), rng, endings=True)
        for place in range(len(language.categories)):
            begin = len(self.shops)
            self.shops += names[place * per_category : (place + 1) * per_category]
            self.category_shops.append(np.arange(begin, len(self.shops)))


def _with_types_of_families(parameters: Parameters) -> tuple[Language, ...]:
    """Returns the languages of the lexicon. Each category has its own types, and some types of its families."""
    lexicon = load_lexicon()
    languages = (lexicon.en, lexicon.zh)
    composed = {
        (language.separator, category.name): [
            t for family in category.families for t in family.types(language.separator)
        ]
        for language in languages
        for category in language.categories
    }
    own = sum(len(category.types) for language in languages for category in language.categories)
    order = random_stream(parameters, "types of families").permutation(sum(map(len, composed.values())))
    is_chosen = iter(order < parameters.types - own)
    chosen = {key: tuple(t for t in types if next(is_chosen)) for key, types in composed.items()}

    def enlarged(language: Language) -> Language:
        categories = tuple(
            dataclasses.replace(category, types=category.types + chosen[language.separator, category.name])
            for category in language.categories
        )
        return dataclasses.replace(language, categories=categories)

    return tuple(map(enlarged, languages))


def _invent(
    language: Language, n: int, syllables: int, known: set[str], rng: np.random.Generator, endings: bool = False
) -> list[str]:
    """Invents n different names, none of them in `known`. With `endings` they are names of shops."""
    names: dict[str, None] = {}
    while len(names) < n:
        name = "".join(language.syllables[i] for i in rng.integers(0, len(language.syllables), syllables))
        if endings:
            # When the syllables are nearly used up, a number tells the names apart.
            number = str(rng.integers(2, 100)) if len(names) > len(language.syllables) ** 2 // 2 else ""
            ending = language.shop_endings[rng.integers(len(language.shop_endings))]
            name = language.separator.join(part for part in (name + number, ending) if part)
        elif len(names) > len(language.syllables) ** syllables // 3:
            name += language.syllables[rng.integers(len(language.syllables))]
        if name not in known:
            names[name] = None
    return list(names)


class Items:
    """All items, the English ones first. Row r of each array is item r."""

    def __init__(self, catalogue: Catalogue, parameters: Parameters):
        self._catalogue = catalogue
        parts = [
            self._of_language(number, parameters, random_stream(parameters, f"{name}.items"))
            for number, name in enumerate(LANGUAGE_CODES)
        ]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        self.type = columns["type"]  # int64 [items]
        self.category = catalogue.type_category[self.type]
        self.language = catalogue.category_language[self.category]
        self.brand = columns["brand"]
        self.words = columns["words"]  # int64 [items, 3], in the order of the type's attributes
        self.style = columns["style"]  # int64 [items, 2]: one of the language's styles, and the word; or -1, -1
        self.shop = columns["shop"]
        self.level = columns["level"]  # float64 [items], from -1 (cheap for its type) to 1 (dear)
        self.price = columns["price"]
        self.popularity = columns["popularity"]  # float64 [items], sums to 1 in each language
        self.sales = columns["sales"]  # int64 [items], sales before the log: popularity with noise
        self.in_stock = columns["in_stock"]  # bool [items], at the end of the log
        self.liking = columns["liking"]  # float32 [items, USER_CLASSES], 0 where users neither like nor dislike it
        self.titles = [title for part in parts for title in part["titles"]]

    def __len__(self) -> int:
        """Returns the number of items."""
        return len(self.type)

    def _of_language(self, language: int, parameters: Parameters, rng: np.random.Generator) -> dict[str, np.ndarray]:
        catalogue = self._catalogue
        n, types = catalogue.num_items[language], catalogue.types_of(language)
        weights = rng.lognormal(0, 0.4, len(types))
        columns: dict[str, np.ndarray] = {"type": types[rng.choice(len(types), n, p=weights / weights.sum())]}
        tier = np.arange(len(catalogue.brands)) % 3
        rng.shuffle(tier)
        columns["brand"], columns["shop"] = np.zeros(n, np.int64), np.zeros(n, np.int64)
        columns["words"], columns["style"] = np.full((n, 3), -1), np.full((n, 2), -1)
        styles = catalogue.styles[language]
        # Brands and shops of a category differ in how much they sell.
        share = [
            tuple(1 / np.sqrt(1 + rng.permutation(len(codes))) for codes in of_category)
            for of_category in zip(catalogue.category_brands, catalogue.category_shops, strict=True)
        ]
        for code in types:
            rows = np.flatnonzero(columns["type"] == code)
            category = catalogue.type_category[code]
            for name, codes, weight in (
                ("brand", catalogue.category_brands[category], share[category][0]),
                ("shop", catalogue.category_shops[category], share[category][1]),
            ):
                columns[name][rows] = rng.choice(codes, len(rows), p=weight / weight.sum())
            for slot, name in enumerate(catalogue.types[code].attributes):
                columns["words"][rows, slot] = rng.choice(catalogue.attributes[language][name], len(rows))
                if name in styles and columns["style"][rows, 0].max(initial=-1) < 0:
                    columns["style"][rows, 0] = styles.index(name)
                    columns["style"][rows, 1] = columns["words"][rows, slot]
        columns["level"] = tier[columns["brand"]] - 1 + rng.normal(0, 0.25, n)
        base = np.array([t.price for t in catalogue.types])[columns["type"]]
        columns["price"] = np.round(base * _TIER_FACTOR ** columns["level"], 2)
        columns["popularity"] = zipf(n, parameters.popularity_exponent)[rng.permutation(n)]
        columns["sales"] = rng.poisson(columns["popularity"] * 200 * n * rng.lognormal(0, 0.5, n))
        columns["in_stock"] = rng.random(n) >= _OUT_OF_STOCK_SHARE
        columns["liking"] = self._liking(columns)
        nouns = self._nouns(
            columns["type"], parameters, random_stream(parameters, f"{LANGUAGE_CODES[language]}.titles")
        )
        columns["titles"] = np.array(list(self._titles(language, columns, nouns, rng)), object)
        return columns

    def _liking(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Returns how much each class of users likes each item, float32 [items, USER_CLASSES]."""
        catalogue = self._catalogue
        n = len(columns["type"])
        gender, age = np.zeros((n, len(GENDERS))), np.zeros((n, len(AGES)))

        def add(entries: Iterable[ItemType | Value], codes: np.ndarray) -> None:
            for code, who in enumerate(entries):
                if who.gender is not None:
                    gender[codes == code] = [1.0 if g == who.gender else -1.0 for g in GENDERS]
                if who.age is not None:
                    age[codes == code] = [1.0 if a == who.age else -0.5 for a in AGES]

        # What an attribute says about users overrides what the type says.
        add(catalogue.types, columns["type"])
        for slot in range(3):
            add(catalogue.words, columns["words"][:, slot])
        power = -np.abs(columns["level"][:, None] - (np.arange(len(POWERS)) - 1))
        liking = gender[:, :, None, None] + age[:, None, :, None] + power[:, None, None, :]
        return liking.reshape(n, USER_CLASSES).astype(np.float32)

    def _nouns(self, types: np.ndarray, parameters: Parameters, rng: np.random.Generator) -> list[str]:
        """Returns what each title calls its item: the word of the item's type or, now and then, a synonym of it."""
        catalogue = self._catalogue
        names = [[t.word, *catalogue.own_synonyms(code)] for code, t in enumerate(catalogue.types)]
        is_synonym, place = rng.random(len(types)) < parameters.titled_synonyms, rng.random(len(types))
        # A type without synonyms always has its word.
        return [
            _titled(names[code][int(1 + at * (len(names[code]) - 1)) if other and len(names[code]) > 1 else 0])
            for code, other, at in zip(types.tolist(), is_synonym.tolist(), place.tolist(), strict=True)
        ]

    def _titles(
        self, language: int, columns: dict[str, np.ndarray], nouns: list[str], rng: np.random.Generator
    ) -> Iterator[str]:
        """Yields titles: brand, attributes and type in varying order, the product that an accessory fits, fillers."""
        catalogue, words = self._catalogue, self._catalogue.languages[language]
        n = len(columns["type"])
        # Model numbers make most titles different.
        letter, number = rng.integers(0, 13, n), rng.integers(10, 1000, n)
        order, noun_first = rng.random((n, 3)).argsort(1), rng.random(n) < 0.3
        host_brand, fillers = rng.random(n), rng.integers(0, 3, n)
        filler = rng.random((n, len(words.fillers))).argsort(1)[:, :2]
        hosts = {catalogue.types[code].word: int(code) for code in catalogue.types_of(language)}
        titled = [[_titled(value.word) for value in catalogue.words], [_titled(brand) for brand in catalogue.brands]]
        for row in range(n):
            code = columns["type"][row]
            middle = [titled[0][w] for w in columns["words"][row][order[row]] if w >= 0]
            middle.insert(0 if noun_first[row] else len(middle), nouns[row])
            parts = [titled[1][columns["brand"][row]], *middle, f"{'BCDFGHKMPRTVX'[letter[row]]}{number[row]}"]
            host = catalogue.types[code].fits
            if host is not None:
                brands = catalogue.category_brands[catalogue.type_category[hosts[host]]]
                parts += [
                    _titled(words.fits),
                    titled[1][brands[int(host_brand[row] * len(brands))]],
                    _titled(host),
                ]
            parts += [_titled(words.fillers[i]) for i in filler[row, : fillers[row]]]
            yield " ".join(parts)


def _titled(word: str) -> str:
    return word if any(c.isdigit() for c in word) else word.title()


def _between(total: int, share: tuple[float, float]) -> int:
    """Returns how many of `total` things lie between two shares of them."""
    return round(total * share[1]) - round(total * share[0])
