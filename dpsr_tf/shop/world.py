"""The world behind the generated shop: what is sold, who buys, what can be asked, and what each person likes.

It is made in this order, each step with a random stream of its own, so that a new phenomenon in one step leaves the
others as they are:

    lexicon -> catalogue -> items -> users -> meanings -> texts -> interests

What is relevant is decided by an item's attributes, never by its title: an item is relevant to a query if it is what
one of the query's meanings asks for. Codes (of languages, categories, types, brands, words, shops) count over both
languages; -1 is none. All arrays are in memory; their size goes with items, users and query texts, not with the log.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Iterable, Iterator

import numpy as np

from dpsr_common.errors import UsageError
from dpsr_common.typed_config import option
from dpsr_tf.shop.lexicon import AGES, GENDERS, POWERS, Category, ItemType, Language, Value, load_lexicon

NAMES = ("en", "zh")
# How much of the latent taste each of its parts is; docs/generated_shop.md has the formula.
TASTE_WEIGHTS = {"brand": 1.0, "shop": 0.6, "style": 0.8}
# How far synonyms say what a text means: some of its parts are, or all of them; 0 is none.
SOME_SYNONYMS, ALL_SYNONYMS = 1, 2
CLASSES = len(GENDERS) * len(AGES) * len(POWERS)
_AGE_BOUNDS = ((18, 25), (26, 35), (36, 50), (51, 75))
# A brand's tier multiplies the price of what it sells: tier 0, 1, 2 divide by, keep, multiply by this.
_TIER_FACTOR = 1.8
_OUT_OF_STOCK = 0.03
_MOST_BRANDS, _MOST_SHOPS = 200, 5_000  # a language's syllables give no more names


@dataclasses.dataclass(frozen=True)
class Parameters:
    """What a shop is made from. The first four have flags; the others say how hard it is. truth.json records all."""

    seed: int = option(1, "of everything; another seed gives another shop", 0, 2**63 - 1)
    items: int = option(3_000, "items of both languages", 200, 5_000_000)
    users: int = option(500, "users of both languages", 10, 20_000_000)
    interactions: int = option(30_000, "clicks of the log; the rows are about seven times as many", 100, 1_000_000_000)
    chinese_share: float = option(1 / 3, "share of items and users in the Chinese half", 0.1, 0.9)
    days: int = option(60, "time that the log covers", 1, 3650)
    requests_per_session: float = option(1.6, "queries that a session asks, on average, at most 5 each", 1, 4)
    list_length: int = option(8, "items shown for a request, at most", 2, 100)
    popularity_exponent: float = option(0.8, "Zipf exponent of item popularity", 0, 2)
    query_exponent: float = option(0.8, "Zipf exponent of query frequency", 0, 2)
    activity_exponent: float = option(0.5, "Zipf exponent of user activity", 0, 2)
    position_exponent: float = option(0.7, "the item at position p is looked at with chance p ** -this", 0, 3)
    shuffled_share: float = option(0.1, "share of requests whose list is in random order", 0, 1)
    stray_share: float = option(0.15, "share of shown items that share words or category, but are no answer", 0, 0.9)
    noise: float = option(0.04, "chance of a click on an item that is looked at and is no answer", 0, 0.5)
    click_level: float = option(-2.5, "log odds of a click on an answer that nothing speaks for or against", -4, 4)
    taste: float = option(1.0, "how much the profile decides a click; 0 is nothing", 0, 5)
    history: float = option(2.5, "how much the latent taste decides, which only the history shows; 0 is nothing", 0, 5)
    intent: float = option(1.0, "how much the session's intent decides; 0 is nothing", 0, 5)
    loyalty: float = option(0.75, "share of sessions in one of the user's two favourite categories", 0, 1)
    cart_share: float = option(0.25, "share of clicks on answers that go to the cart", 0, 1)
    order_share: float = option(0.5, "share of carts that are ordered", 0, 1)
    typo_share: float = option(0.04, "share of requests whose query is misspelt", 0, 1)
    misspellings: int = option(4, "ways to misspell a query, at most", 1, 100)
    shops: int = option(80, "shops of both languages", 30, _MOST_SHOPS)
    invented_brands: int = option(0, "brands of each category beside the lexicon's", 0, _MOST_BRANDS)
    shared_brands: int = option(0, "of these, how many are brands of the next category too", 0, _MOST_BRANDS)
    homonyms: int = option(0, "English query words that are synonyms of two types each, of different categories", 0, 12)
    held_out_share: float = option(0.1, "share of meanings that the log never asks for, half dev, half test", 0.01, 0.5)
    judged_queries: int = option(300, "queries in each of judgments.dev.tsv and judgments.test.tsv, at most", 10, 10**6)
    max_judged_items: int = option(50, "relevant items listed for a query, at most", 1, 10_000)
    personal_judgments: int = option(1_000, "purchases after the log's end, judgments.personal.tsv", 10, 10**5)
    labelled_pairs: int = option(3_000, "pairs with a grade of humans, labels.parquet", 10, 10**6)
    label_noise: float = option(0.1, "share of those grades that are one off", 0, 1)

    def problem(self) -> str | None:
        """What is wrong with values that are each allowed but do not go together."""
        if self.days == 1 and self.interactions > 10_000_000:
            return f"interactions is {self.interactions} and days 1, expected 2 days or more for over 10000000 clicks"
        if self.shared_brands > self.invented_brands:
            return (
                f"shared_brands is {self.shared_brands}, expected at most invented_brands, {self.invented_brands}: "
                f"they are some of those"
            )
        return None


def random_stream(parameters: Parameters, part: str, *numbers: int) -> np.random.Generator:
    """The random stream of one part of the work."""
    return np.random.default_rng([parameters.seed, zlib.crc32(part.encode()), *numbers])


def draw(sums: np.ndarray, begin: np.ndarray, end: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An index of each range [begin, end), int64 of their shape, by weights with running sums `sums` float64 [n + 1].

    Ranges are not empty; where all weights of a range are 0 its last index is drawn.
    """
    low, high = sums[begin], sums[end]
    at = np.searchsorted(sums, low + rng.random(low.shape) * (high - low), side="right") - 1
    return np.clip(at, begin, end - 1)


def running_sums(weights: np.ndarray) -> np.ndarray:
    """0 and the sums of the first 1, 2, ... weights, float64 [n + 1]."""
    return np.concatenate([[0.0], np.cumsum(weights, dtype=np.float64)])


def _zipf(n: int, exponent: float) -> np.ndarray:
    """1 / rank ** exponent of ranks 1 to n, float64 [n], divided by its sum."""
    weights = np.arange(1, n + 1) ** -float(exponent)
    return weights / weights.sum()


def _between(total: int, share: tuple[float, float]) -> int:
    return round(total * share[1]) - round(total * share[0])


class Catalogue:
    """Names and codes of all that items are made of."""

    def __init__(self, parameters: Parameters):
        lexicon = load_lexicon()
        self.languages: tuple[Language, ...] = (lexicon.en, lexicon.zh)
        self.categories: list[Category] = [c for language in self.languages for c in language.categories]
        self.category_language = np.repeat([0, 1], [len(language.categories) for language in self.languages])
        # The number of a category within its language.
        self.category_place = np.concatenate([np.arange(len(language.categories)) for language in self.languages])
        self.types: list[ItemType] = [t for category in self.categories for t in category.types]
        self.type_category = np.repeat(np.arange(len(self.categories)), [len(c.types) for c in self.categories])
        self.brands: list[str] = []
        self.category_brands: list[np.ndarray] = []  # codes of each category's brands
        self.words: list[Value] = []  # values of attributes; one that stands in two attributes is one
        self.attributes: list[dict[str, np.ndarray]] = []  # of each language: codes of an attribute's values
        self.styles: list[list[str]] = []  # of each language: attributes that are words, not numbers
        self.shops: list[str] = []
        self.category_shops: list[np.ndarray] = []
        for number, language in enumerate(self.languages):
            rng = random_stream(parameters, f"{NAMES[number]}.catalogue")
            self._add_brands(language, parameters, rng)
            self._add_words(language)
            per_category = max(2, parameters.shops // len(self.categories))
            self._add_shops(language, per_category, rng)
        self.homonyms = self._add_homonyms(parameters)
        shares = ((0.0, 1 - parameters.chinese_share), (1 - parameters.chinese_share, 1.0))
        self.num_items = [_between(parameters.items, share) for share in shares]
        self.num_users = [_between(parameters.users, share) for share in shares]

    def types_of(self, language: int) -> np.ndarray:
        """Codes of a language's types."""
        return np.flatnonzero(self.category_language[self.type_category] == language)

    def accessories(self, item_type: int) -> list[int]:
        """Codes of the types that fit a type."""
        word = self.types[item_type].word
        same = self.types_of(int(self.category_language[self.type_category[item_type]]))
        return [int(t) for t in same if self.types[t].fits == word]

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
        """Gives types further synonyms, each shared by two types of different categories; returns their words."""
        language, rng = self.languages[0], random_stream(parameters, "homonyms")
        known = {*self.brands, *(word for t in self.types for text in (t.word, *t.synonyms) for word in text.split())}
        free = [int(t) for t in rng.permutation(self.types_of(0)) if self.types[t].fits is None]
        found: dict[str, list[str]] = {}
        for name in _invent(language, parameters.homonyms, 3, known, rng):
            one = free.pop()
            other = next((t for t in free[::-1] if self.type_category[t] != self.type_category[one]), None)
            if other is None:
                break
            free.remove(other)
            for code in (one, other):
                mine = self.types[code]
                self.types[code] = dataclasses.replace(mine, synonyms=(*mine.synonyms, name))
            found[name] = [self.types[code].word for code in (one, other)]
        return found

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


def _invent(
    language: Language, n: int, syllables: int, known: set[str], rng: np.random.Generator, endings: bool = False
) -> list[str]:
    """n new names, none of them in `known`."""
    names: dict[str, None] = {}
    while len(names) < n:
        name = "".join(language.syllables[i] for i in rng.integers(0, len(language.syllables), syllables))
        if endings:
            # A number where the syllables are used up.
            number = str(rng.integers(2, 100)) if len(names) > len(language.syllables) ** 2 // 2 else ""
            ending = language.shop_endings[rng.integers(len(language.shop_endings))]
            name = language.separator.join(part for part in (name + number, ending) if part)
        elif len(names) > len(language.syllables) ** syllables // 3:
            name += language.syllables[rng.integers(len(language.syllables))]
        if name not in known:
            names[name] = None
    return list(names)


class Items:
    """All items, the English ones first; row r of each array is item r."""

    def __init__(self, catalogue: Catalogue, parameters: Parameters):
        self._catalogue = catalogue
        halves = [
            self._half(number, parameters, random_stream(parameters, f"{name}.items"))
            for number, name in enumerate(NAMES)
        ]
        columns = {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}
        self.type = columns["type"]  # int64 [items]
        self.category = catalogue.type_category[self.type]
        self.language = catalogue.category_language[self.category]
        self.brand = columns["brand"]
        self.words = columns["words"]  # int64 [items, 3], in the order of the type's attributes
        self.style = columns["style"]  # int64 [items, 2]: which of the language's styles, and its word; or -1, -1
        self.shop = columns["shop"]
        self.level = columns["level"]  # float64 [items], -1 cheap to 1 dear for its type
        self.price = columns["price"]
        self.popularity = columns["popularity"]  # float64 [items], sums to 1 in each language
        self.sales = columns["sales"]  # int64 [items], before the log: popularity with noise
        self.in_stock = columns["in_stock"]  # bool [items], at the end of the log
        self.liking = columns["liking"]  # float32 [items, CLASSES], 0 is neither likes nor dislikes
        self.titles = [title for half in halves for title in half["titles"]]

    def __len__(self) -> int:
        """Items."""
        return len(self.type)

    def _half(self, language: int, parameters: Parameters, rng: np.random.Generator) -> dict[str, np.ndarray]:
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
        columns["popularity"] = _zipf(n, parameters.popularity_exponent)[rng.permutation(n)]
        columns["sales"] = rng.poisson(columns["popularity"] * 200 * n * rng.lognormal(0, 0.5, n))
        columns["in_stock"] = rng.random(n) >= _OUT_OF_STOCK
        columns["liking"] = self._liking(columns)
        columns["titles"] = np.array(list(self._titles(language, columns, rng)), object)
        return columns

    def _liking(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """What each class of users likes, float32 [items, CLASSES]."""
        catalogue = self._catalogue
        n = len(columns["type"])
        gender, age = np.zeros((n, len(GENDERS))), np.zeros((n, len(AGES)))

        def add(entries: Iterable[ItemType | Value], codes: np.ndarray) -> None:
            for code, who in enumerate(entries):
                if who.gender is not None:
                    gender[codes == code] = [1.0 if g == who.gender else -1.0 for g in GENDERS]
                if who.age is not None:
                    age[codes == code] = [1.0 if a == who.age else -0.5 for a in AGES]

        # An attribute's word is nearer to the item than its type's: it comes last, and wins.
        add(catalogue.types, columns["type"])
        for slot in range(3):
            add(catalogue.words, columns["words"][:, slot])
        power = -np.abs(columns["level"][:, None] - (np.arange(len(POWERS)) - 1))
        liking = gender[:, :, None, None] + age[:, None, :, None] + power[:, None, None, :]
        return liking.reshape(n, CLASSES).astype(np.float32)

    def _titles(self, language: int, columns: dict[str, np.ndarray], rng: np.random.Generator) -> Iterator[str]:
        """Brand, attributes and type in changing order; what an accessory fits; words that every shop adds."""
        catalogue, words = self._catalogue, self._catalogue.languages[language]
        n = len(columns["type"])
        # Model numbers, so that few titles are alike.
        letter, number = rng.integers(0, 13, n), rng.integers(10, 1000, n)
        order, noun_first = rng.random((n, 3)).argsort(1), rng.random(n) < 0.3
        host_brand, fillers = rng.random(n), rng.integers(0, 3, n)
        filler = rng.random((n, len(words.fillers))).argsort(1)[:, :2]
        hosts = {t.word: code for code, t in enumerate(catalogue.types) if code in catalogue.types_of(language)}
        titled = [[_titled(value.word) for value in catalogue.words], [_titled(brand) for brand in catalogue.brands]]
        nouns = [_titled(t.word) for t in catalogue.types]
        for row in range(n):
            code = columns["type"][row]
            middle = [titled[0][w] for w in columns["words"][row][order[row]] if w >= 0]
            middle.insert(0 if noun_first[row] else len(middle), nouns[code])
            parts = [titled[1][columns["brand"][row]], *middle, f"{'BCDFGHKMPRTVX'[letter[row]]}{number[row]}"]
            host = catalogue.types[code].fits
            if host is not None:
                brands = catalogue.category_brands[catalogue.type_category[hosts[host]]]
                parts += [
                    _titled(words.fits),
                    titled[1][brands[int(host_brand[row] * len(brands))]],
                    nouns[hosts[host]],
                ]
            parts += [_titled(words.fillers[i]) for i in filler[row, : fillers[row]]]
            yield " ".join(parts)


def _titled(word: str) -> str:
    return word if any(c.isdigit() for c in word) else word.title()


class Users:
    """All users, the English ones first; what a profile shows, and the latent taste that it does not."""

    def __init__(self, catalogue: Catalogue, parameters: Parameters):
        self._catalogue = catalogue
        self.language = np.repeat([0, 1], catalogue.num_users)
        n = len(self.language)
        rng = random_stream(parameters, "profiles")
        self.profile = rng.integers(0, CLASSES, n)  # int64 [users]: gender, age and power as one number
        rest, self.power = np.divmod(self.profile, len(POWERS))
        self.gender, band = np.divmod(rest, len(AGES))
        low, high = np.array(_AGE_BOUNDS).T
        self.age = rng.integers(low[band], high[band] + 1)  # int64 [users], years
        cities = [len(language.cities) for language in catalogue.languages]
        self.city = rng.integers(0, np.array(cities)[self.language])
        self.activity = np.concatenate(
            [_zipf(k, parameters.activity_exponent)[rng.permutation(k)] * k for k in catalogue.num_users]
        )
        rng = random_stream(parameters, "tastes")
        places, styles = int(catalogue.category_place.max()) + 1, max(len(s) for s in catalogue.styles)
        # By the category's place in its language: the one brand and shop that the user prefers there.
        self.brands, self.shops = np.full((n, places), -1, np.int32), np.full((n, places), -1, np.int32)
        # By the style's place in its language: the word that the user prefers.
        self.styles = np.full((n, styles), -1, np.int32)
        # Places of the two categories that the user looks at most.
        self.categories = np.zeros((n, 2), np.int64)
        for number, language in enumerate(catalogue.languages):
            rows = np.flatnonzero(self.language == number)
            for category in np.flatnonzero(catalogue.category_language == number):
                place = catalogue.category_place[category]
                self.brands[rows, place] = rng.choice(catalogue.category_brands[category], len(rows))
                self.shops[rows, place] = rng.choice(catalogue.category_shops[category], len(rows))
            for place, name in enumerate(catalogue.styles[number]):
                self._draw_styles(rows, place, catalogue.attributes[number][name], rng)
            self.categories[rows] = rng.integers(0, len(language.categories), (len(rows), 2))

    def __len__(self) -> int:
        """Users."""
        return len(self.profile)

    def _draw_styles(self, rows: np.ndarray, place: int, codes: np.ndarray, rng: np.random.Generator) -> None:
        """A favourite among the words of a style; one that the profile dislikes is rare."""
        liking = np.zeros((len(codes), len(GENDERS), len(AGES)))
        for i, code in enumerate(codes):
            who = self._catalogue.words[code]
            if who.gender is not None:
                liking[i] += np.array([[1.0 if g == who.gender else -1.0] for g in GENDERS])
            if who.age is not None:
                liking[i] += np.array([1.0 if a == who.age else -0.5 for a in AGES])
        sums = np.cumsum(np.exp(liking), 0).reshape(len(codes), -1).T  # [gender and age, codes]
        mine = sums[self.profile[rows] // len(POWERS)]
        at = (rng.random((len(rows), 1)) * mine[:, -1:] >= mine).sum(1)
        self.styles[rows, place] = codes[np.minimum(at, len(codes) - 1)]


class World:
    """All of it.

    A *meaning* is what somebody can want: items of a category, and of a type, a brand and up to two words of
    attributes, each of these optional. A *text* asks for it; a text of several meanings is polysemous. A *pair* is a
    meaning and one of its texts. An *answer* is a list of items: those of a meaning (code: the meaning's), of a
    polysemous text (all its meanings together), the misleading ones of a type, or a whole category.
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
        """What speaks for an item in the eyes of a user, log odds, float64 of the rows' common shape."""
        users, items, parameters = self.users, self.items, self.parameters
        place = self.catalogue.category_place[items.category[item]]
        style = items.style[item]
        same_style = (style[..., 0] >= 0) & (users.styles[user, style[..., 0]] == style[..., 1])
        latent = TASTE_WEIGHTS["brand"] * (users.brands[user, place] == items.brand[item])
        latent = latent + TASTE_WEIGHTS["shop"] * (users.shops[user, place] == items.shop[item])
        latent += TASTE_WEIGHTS["style"] * same_style
        return parameters.taste * items.liking[item, users.profile[user]] + parameters.history * latent

    def missed(self, meaning: np.ndarray, item: np.ndarray) -> np.ndarray:
        """How many of a meaning's brand and words an item does not have; 9 where type or category differ. int64."""
        of, items = self.meaning, self.items
        fits = (of[meaning, 0] == items.category[item]) & ((of[meaning, 1] < 0) | (of[meaning, 1] == items.type[item]))
        missed = ((of[meaning, 2] >= 0) & (of[meaning, 2] != items.brand[item])).astype(np.int64)
        words = items.words[item]
        for column in (3, 4):
            word = of[meaning, column]
            missed += (word >= 0) & ~(words == word[..., None]).any(-1)
        return np.where(fits, missed, 9)

    def sessions(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Users by activity, and the pair that each asks first; int64 [n] both."""
        zero = np.zeros(n, np.int64)
        user = draw(self._activity, zero, zero + len(self.users), rng)
        loyal = rng.random(n) < self.parameters.loyalty
        place = self.users.categories[user, rng.integers(0, 2, n)]
        cell = (self.users.language[user] * CLASSES + self.users.profile[user]) * (self._places + 1)
        begin = np.where(loyal, self._cells[cell + place], self._cells[cell])
        end = np.where(loyal, self._cells[cell + place + 1], self._cells[cell + self._places])
        empty = self._interest[end] <= self._interest[begin]  # nobody asks for anything of that category
        begin[empty], end[empty] = self._cells[cell][empty], self._cells[cell + self._places][empty]
        at = draw(self._interest, begin, end, rng)
        return user, at - self._cells[cell] + self._first_pair[self.users.language[user]]

    def answer_rows(self, answer: int) -> np.ndarray:
        """Rows of the items of an answer, ascending."""
        return np.sort(self.answer_items[self.answer_splits[answer] : self.answer_splits[answer + 1]])

    def _make_meanings(self) -> None:
        """Every combination that at least one item answers: `meaning` int64 [meanings, 5], category, type, ..."""
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
        first = int(known[0] < 0)  # -1 is an item without that many words
        known, inverse = known[first:], inverse.reshape(keys.shape) - first
        # The meanings that each item answers, int32 [items, 15], -1 is none.
        self.item_meanings = np.ascontiguousarray(inverse.T.astype(np.int32))
        self.meaning = np.empty((len(known), 5), np.int64)
        for column in (4, 3, 2, 1):
            known, self.meaning[:, column] = np.divmod(known, sizes[column] + 1)
        self.meaning[:, 0] = known
        self.meaning[:, 1:] -= 1

    def _make_texts(self) -> None:
        """Pairs in the order of their category, and the texts in them."""
        texts: dict[str, int] = {}
        meanings, rows, gaps = [], [], []
        for meaning, codes in enumerate(self.meaning.tolist()):
            for text, gap in self._phrasings(codes):
                meanings.append(meaning)
                rows.append(texts.setdefault(text, len(texts)))
                gaps.append(gap)
        self.pair_meaning, self.pair_text, self.pair_gap = (
            np.array(meanings),
            np.array(rows),
            np.array(gaps, np.int8),
        )
        self.texts = list(texts)
        self.senses: list[list[int]] = [[] for _ in texts]
        for meaning, row in zip(meanings, rows, strict=True):
            self.senses[row].append(meaning)
        self.polysemous = np.array([len(senses) > 1 for senses in self.senses])
        # How far synonyms say what each text means, as of pairs: where it means several things, the least of them.
        self.text_gap = np.full(len(texts), ALL_SYNONYMS, np.int8)
        np.minimum.at(self.text_gap, self.pair_text, self.pair_gap)
        self.text_language = np.zeros(len(texts), np.int64)
        self.text_language[self.pair_text] = self.catalogue.category_language[self.meaning[self.pair_meaning, 0]]

    def _phrasings(self, codes: list[int]) -> Iterator[tuple[str, int]]:
        """Texts that ask for a meaning, and whether none of their parts is a synonym (0), SOME or ALL are."""
        category, noun, brand, *words = codes
        separator = self.catalogue.languages[self.catalogue.category_language[category]].separator
        brands = [self.catalogue.brands[brand]] if brand >= 0 else []
        entries: list[ItemType | Value] = [self.catalogue.words[word] for word in words if word >= 0]
        entries += [self.catalogue.types[noun]] if noun >= 0 else []
        for choice in itertools.product(*([(e.word, False), *((s, True) for s in e.synonyms)] for e in entries)):
            parts = [text for text, _ in choice]
            parts[len(parts) - (noun >= 0) : len(parts) - (noun >= 0)] = brands
            late = [part for part in parts if part.startswith("for ")]
            parts = [part for part in parts if not part.startswith("for ")] + late
            synonyms = sum(synonym for _, synonym in choice)
            # A brand has no synonym.
            gap = ALL_SYNONYMS if synonyms == len(parts) else SOME_SYNONYMS if synonyms else 0
            yield separator.join(parts), gap

    def _hold_out(self, rng: np.random.Generator) -> None:
        """`fold` of each meaning, int8 [meanings]: 0 is the log's, 1 dev's, 2 test's; by all texts of it.

        Meanings that share a text go together: held out alone, the other would give it away. Bare words stay in the
        log; from them a model learns what they mean. Each kind of query has its part in both folds, in the smallest
        shop too.
        """
        group = list(range(len(self.meaning)))

        def root(meaning: int) -> int:
            while group[meaning] != meaning:
                group[meaning] = group[group[meaning]]
                meaning = group[meaning]
            return meaning

        for senses in self.senses:
            for meaning in senses[1:]:
                group[root(meaning)] = root(senses[0])
        of = np.array([root(meaning) for meaning in range(len(group))])
        has_type = self.meaning[:, 1] >= 0
        modifiers = (self.meaning[:, 2:] >= 0).sum(1)
        bare = np.zeros(len(of), bool)
        np.logical_or.at(bare, of, modifiers + has_type < 2)
        many, gap = np.zeros(len(of), bool), np.zeros(len(of), np.int8)
        np.logical_or.at(many, of[self.pair_meaning], self.polysemous[self.pair_text])
        np.maximum.at(gap, of[self.pair_meaning], self.pair_gap)
        roots = np.unique(of)
        roots = roots[~bare[roots]]
        language = self.catalogue.category_language[self.meaning[roots, 0]]
        stratum = language * 4 + np.where(many[roots], 3, gap[roots])
        # A brand alone says nothing about a type: unless polysemous, such meanings are not asked of anybody.
        stratum[~has_type[roots] & ~many[roots]] = -1
        fold = np.zeros(len(of), np.int8)
        for kind in range(8):
            mine = rng.permutation(roots[stratum == kind])
            # Few meanings have a text all of synonyms, or a polysemous one, so more of them.
            share = self.parameters.held_out_share * (3 if kind % 4 >= ALL_SYNONYMS else 1)
            wanted = max(4, round(share * len(mine)))
            mine = mine[: min(wanted, len(mine) // 2)]
            fold[mine] = 1 + np.arange(len(mine)) % 2
        self.fold = fold[of]
        self.text_fold = np.array([self.fold[senses[0]] for senses in self.senses])

    def _make_answers(self) -> None:
        """`answer_splits` int64 [answers + 1], `answer_items` int32, `answer_sums` float64: sums of popularity."""
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
        # Answers to be shown beside the right ones: what shares words with a type, else with its category.
        self.category_answer = np.zeros(len(catalogue.categories), np.int64)
        for category in range(len(catalogue.categories)):
            self.category_answer[category] = len(self.meaning) + len(extra)
            extra.append(np.flatnonzero(items.category == category))
        self.misleading_answer = np.full(len(catalogue.types), -1)
        for code in range(len(catalogue.types)):
            found = np.flatnonzero(np.isin(items.type, self._misleading_types(code)))
            if len(found):
                self.misleading_answer[code] = len(self.meaning) + len(extra)
                extra.append(found)
        rows += [part.astype(np.int32) for part in extra]
        sizes.append(np.array([len(part) for part in extra]))
        self.answer_items = np.concatenate(rows)
        self.answer_splits = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
        self.answer_sums = running_sums(items.popularity[self.answer_items])

    def _misleading_types(self, code: int) -> list[int]:
        """Types whose titles hold the word of another: what fits it, and "apple juice" for "apple"."""
        catalogue, word = self.catalogue, self.catalogue.types[code].word
        language = int(catalogue.category_language[catalogue.type_category[code]])
        separator = catalogue.languages[language].separator
        longer = [t for t in catalogue.types_of(language) if catalogue.types[t].word.startswith(word + separator)]
        return sorted({*catalogue.accessories(code), *(int(t) for t in longer)} - {code})

    def misleading(self, language: int) -> dict[str, list[str]]:
        """Words of types to the words of types that mislead."""
        types = self.catalogue.types
        found = {
            types[t].word: [types[m].word for m in self._misleading_types(t)] for t in self.catalogue.types_of(language)
        }
        return {word: others for word, others in found.items() if others}

    def _make_interests(self) -> None:
        """How often each class of users asks each pair: short queries and the shop's own words more than others."""
        catalogue, parameters = self.catalogue, self.parameters
        category = self.meaning[self.pair_meaning, 0]
        order = np.argsort(category, kind="stable")
        self.pair_meaning, self.pair_text, self.pair_gap = (
            column[order] for column in (self.pair_meaning, self.pair_text, self.pair_gap)
        )
        category = category[order]
        language = catalogue.category_language[category]
        size = np.diff(self.answer_splits)[: len(self.meaning)]
        # A brand alone is asked more often than a brand and a type, a type alone most often.
        modifiers = (self.meaning[:, 2:] >= 0).sum(1) - 0.5 * (self.meaning[:, 1] < 0)
        rarity = 3.0 * modifiers[self.pair_meaning] + (self.pair_gap > 0) - 0.5 * np.log(size[self.pair_meaning])
        self.pair_weight = np.zeros(len(order))
        self._first_pair = np.searchsorted(language, [0, 1])
        for number, name in enumerate(NAMES):
            rng = random_stream(parameters, f"{name}.queries")
            mine = np.flatnonzero(language == number)
            rank = np.argsort(rng.gumbel(size=len(mine)) * 1.5 + rarity[mine])
            self.pair_weight[mine[rank]] = _zipf(len(mine), parameters.query_exponent)
        self.pair_weight[self.fold[self.pair_meaning] > 0] = 0
        self.meaning_weight = np.bincount(self.pair_meaning, self.pair_weight, len(self.meaning))
        # Pairs of a meaning, for a second query of the session.
        self._by_meaning = np.argsort(self.pair_meaning, kind="stable")
        self._meaning_splits = np.concatenate([[0], np.cumsum(np.bincount(self.pair_meaning, minlength=len(size)))])
        self._meaning_sums = running_sums(self.pair_weight[self._by_meaning])

        # Mean over a meaning's items, by popularity, of what each class likes.
        self._places = int(catalogue.category_place.max()) + 1
        self._activity = running_sums(self.users.activity)
        weights, cells, begin = [], [], 0
        pull = self._mean_pull()
        for number in range(len(NAMES)):
            mine = np.flatnonzero(language == number)
            bounds = np.searchsorted(catalogue.category_place[category[mine]], np.arange(self._places + 1))
            for profile in range(CLASSES):
                weight = self.pair_weight[mine] * pull[self.pair_meaning[mine], profile]
                weights.append(weight / weight.sum())
                cells.append(bounds + begin)
                begin += len(mine)
        self._cells = np.concatenate(cells)  # [language, class, place] flat: first index of the cell in _interest
        self._interest = running_sums(np.concatenate(weights))

    def _mean_pull(self) -> np.ndarray:
        """exp(taste * liking) of a meaning's items, mean by popularity, float64 [meanings, CLASSES]."""
        bounds = self.answer_splits[: len(self.meaning) + 1]
        rows = self.answer_items[: bounds[-1]]
        mass = self.items.popularity[rows]
        total = np.add.reduceat(mass, bounds[:-1])
        pull = np.empty((len(self.meaning), CLASSES))
        for profile in range(CLASSES):
            # The square root: who likes pink things less still asks for them now and then.
            liked = np.exp(0.5 * self.parameters.taste * self.items.liking[:, profile])
            pull[:, profile] = np.add.reduceat(mass * liked[rows], bounds[:-1]) / total
        return pull

    def another_pair(self, item: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A pair that each item answers, int64 [n]: frequent ones more often than rare ones, but less so than usual."""
        meanings = self.item_meanings[item]
        weight = np.where(meanings >= 0, np.sqrt(self.meaning_weight[meanings]), 0).cumsum(1)
        at = (rng.random((len(item), 1)) * weight[:, -1:] >= weight).sum(1)
        meaning = meanings[np.arange(len(item)), np.minimum(at, meanings.shape[1] - 1)]
        return self._by_meaning[
            draw(self._meaning_sums, self._meaning_splits[meaning], self._meaning_splits[meaning + 1], rng)
        ]

    def _make_misspellings(self, rng: np.random.Generator) -> None:
        """`misspelt` texts, and for each text the range of its own in `misspelt_splits` int64 [texts + 1]."""
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
        """Texts, then misspelt ones: each one's right text, int64 [all], and whether it is misspelt, bool [all]."""
        right = np.repeat(np.arange(len(self.texts)), np.diff(self.misspelt_splits))
        rows = np.concatenate([np.arange(len(self.texts)), right])
        return rows, np.arange(len(rows)) >= len(self.texts)


def _misspelt(text: str, language: Language, a: float, b: float, c: float) -> str | None:
    """`text` with one slip of the keyboard; None where that gives nothing. `a`, `b`, `c` are random, in [0, 1)."""
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
    """The world of some parameters. Raises UsageError if they do not go together."""
    problem = parameters.problem()
    if problem:
        raise UsageError(problem)
    return World(parameters)
