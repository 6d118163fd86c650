"""`dpsr generate`: a synthetic shop and its click log, with known truths.

The world holds what DPSR (sections 1 and 6.3) sets out to solve, on a small scale: queries whose words stand in no
title that they mean (semantic gap), words with two meanings, misspelt queries, accessories whose titles name another
product, long tails of queries and items, and users whose profile decides what they click. It is made in this order,
each step with a random stream of its own, so that a new phenomenon in one step leaves the others as they are:

    lexicon (shop_lexicon.yaml) -> items -> queries -> users and clicks -> files

What is relevant is decided by an item's attributes, never by its title: an item is relevant to a query if it is what
one of the query's meanings asks for.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import yaml
from absl import flags

from dpsr_tf.config import from_dict, option, read_yaml, to_dict
from dpsr_tf.data.store import new_directory
from dpsr_tf.errors import UsageError

USAGE = """
Usage: dpsr generate --out=DIR

Writes a synthetic shop, English and Chinese, and its click log into DIR: items.parquet, users.parquet,
interactions.parquet, schema.yaml for `dpsr ingest`, judgments.dev.tsv for `dpsr evaluate` (queries that the log does
not hold), and truth.json. The same flags give the same files, byte for byte.
"""

LEXICON = Path(__file__).parent / "shop_lexicon.yaml"
GENDERS = ("female", "male")
AGES = ("18-25", "26-35", "36-50", "51+")
POWERS = ("low", "middle", "high")

# First second of the log, 2024-01-01 UTC.
_START = 1_704_067_200
# Ids are drawn from here up, so that none is a row number.
_FIRST_ID, _LAST_ID = 10_000_000, 10_000_000_000
# A brand's tier multiplies the price of what it sells: tier 0, 1, 2 divide by, keep, multiply by this.
_TIER_FACTOR = 1.8
# The shares of the judged queries' kinds.
_KINDS = {"plain": 0.5, "gap": 0.3, "typo": 0.2}


@dataclasses.dataclass(frozen=True)
class Parameters:
    """What a shop is made from. Fields without a flag set how hard it is; truth.json records all of them."""

    seed: int = option(1, "of everything; another seed gives another shop", 0, 2**63 - 1)
    items: int = option(3_000, "items of both languages", 200, 1_000_000)
    users: int = option(500, "users of both languages", 10, 10_000_000)
    interactions: int = option(30_000, "clicks of the log", 100, 20_000_000)
    chinese_share: float = option(1 / 3, "share of items, users and clicks in the Chinese half", 0.1, 0.9)
    days: int = option(60, "time that the log covers", 1, 3650)
    popularity_exponent: float = option(0.8, "Zipf exponent of item popularity", 0, 2)
    query_exponent: float = option(0.8, "Zipf exponent of query frequency", 0, 2)
    activity_exponent: float = option(0.5, "Zipf exponent of user activity", 0, 2)
    taste: float = option(1.0, "how much the profile decides a click; 0 is nothing", 0, 5)
    noise_share: float = option(0.05, "share of clicks on any item of the shop, by popularity", 0, 1)
    typo_share: float = option(0.04, "share of clicks whose query is misspelt", 0, 1)
    held_out_share: float = option(0.1, "share of combinations that the log never asks for", 0, 0.5)
    judged_queries: int = option(300, "queries in judgments.dev.tsv, at most", 10, 1_000_000)
    max_judged_items: int = option(50, "relevant items listed for a query, at most", 1, 10_000)


_FLAGS = ("seed", "items", "users", "interactions")

REQUIRED_FLAGS = ("out",)


def define_flags(values: flags.FlagValues) -> None:
    """Flags of `dpsr generate`."""
    flags.DEFINE_string("out", None, "directory to make", flag_values=values)
    flags.DEFINE_boolean("overwrite", False, "replaces a directory that is there", flag_values=values)
    for name in _FLAGS:
        field = Parameters.__dataclass_fields__[name]
        flags.DEFINE_integer(name, field.default, field.metadata["help"], flag_values=values)


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr generate`."""
    for name in _FLAGS:
        low, high = (Parameters.__dataclass_fields__[name].metadata[bound] for bound in ("minimum", "maximum"))
        if not low <= values[name].value <= high:
            raise UsageError(f"--{name}={values[name].value}: expected {low:,} to {high:,}")
    parameters = Parameters(**{name: values[name].value for name in _FLAGS})
    with new_directory(Path(values.out), values.overwrite, "shop", "truth.json") as out:
        counts = generate(parameters, out)
    print(
        f"shop {values.out}: {counts['items']:,} items, {counts['users']:,} users, {counts['interactions']:,} clicks "
        f"of {counts['queries']:,} queries, {counts['judged_queries']:,} other queries judged"
    )


def generate(parameters: Parameters, out: Path) -> dict[str, int]:
    """Writes the shop's files into the directory `out`, which exists; returns the counts that truth.json holds."""
    lexicon = load_lexicon()
    english = 1 - parameters.chinese_share
    shops = [Shop("en", lexicon.en, parameters, (0, english)), Shop("zh", lexicon.zh, parameters, (english, 1))]
    rng = _rng(parameters, "ids")
    item_ids = _random_ids(sum(len(shop.titles) for shop in shops), rng)
    user_ids = _random_ids(sum(len(shop.user_class) for shop in shops), rng)
    logs = [shop.clicks() for shop in shops]
    log_texts = {text for log in logs for text in log.queries}
    judged = [query for shop in shops for query in shop.judged(log_texts)]
    judged = [judged[row] for row in _rng(parameters, "judged").permutation(len(judged))]

    _write_items(shops, item_ids, out / "items.parquet")
    _write_users(shops, user_ids, out / "users.parquet")
    _write_clicks(shops, logs, item_ids, user_ids, out / "interactions.parquet")
    _write_judgments(shops, judged, item_ids, parameters, out / "judgments.dev.tsv")
    (out / "schema.yaml").write_text(yaml.safe_dump(_SCHEMA, sort_keys=False))

    counts = {
        "items": len(item_ids),
        "users": len(user_ids),
        "interactions": sum(len(log.item) for log in logs),
        "noise_interactions": sum(int(log.noise.sum()) for log in logs),
        "queries": len(log_texts),
        "judged_queries": len(judged),
        **{f"judged_{kind}": sum(query.kind == kind for query in judged) for kind in _KINDS},
    }
    truth = {
        "format": "dpsr-generated-shop",
        "version": 1,
        "parameters": to_dict(parameters),
        "counts": counts,
        "synonyms": {shop.name: shop.synonyms() for shop in shops},
        "polysemous": {shop.name: shop.polysemous() for shop in shops},
        "misleading": {shop.name: {t.word: t.fits for t in shop.types if t.fits} for shop in shops},
    }
    (out / "truth.json").write_text(json.dumps(truth, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return counts


# The lexicon: the dataclasses say what shop_lexicon.yaml may hold.


@dataclasses.dataclass(frozen=True)
class Value:
    """One value of an attribute, such as "black"."""

    word: str
    synonyms: tuple[str, ...] = ()
    gender: str | None = option(None, "who likes it", choices=GENDERS)
    age: str | None = option(None, "who likes it", choices=AGES)


@dataclasses.dataclass(frozen=True)
class Range:
    """A numeric attribute: the numbers from first to last, both included."""

    first: int
    last: int
    step: int
    format: str  # such as "{} inch"


@dataclasses.dataclass(frozen=True)
class Attribute:
    """A property that each item of a type has: a list of values, or a range of numbers."""

    name: str
    values: tuple[Value, ...] = ()
    range: Range | None = None

    def all_values(self) -> tuple[Value, ...]:
        """The values, in order."""
        r = self.range
        return (
            self.values if r is None else tuple(Value(r.format.format(n)) for n in range(r.first, r.last + 1, r.step))
        )


@dataclasses.dataclass(frozen=True)
class ItemType:
    """A kind of product; see the head of shop_lexicon.yaml."""

    word: str
    price: float
    attributes: tuple[str, ...]
    synonyms: tuple[str, ...] = ()
    fits: str | None = None
    gender: str | None = option(None, "who likes it", choices=GENDERS)
    age: str | None = option(None, "who likes it", choices=AGES)


@dataclasses.dataclass(frozen=True)
class Category:
    """Types that the same brands make."""

    name: str
    brands: tuple[str, ...]
    types: tuple[ItemType, ...]


@dataclasses.dataclass(frozen=True)
class Language:
    """All words of one language."""

    separator: str
    fillers: tuple[str, ...]
    attributes: tuple[Attribute, ...]
    categories: tuple[Category, ...]
    homophones: tuple[str, ...] = ()  # two characters each: the right one, the wrong one


@dataclasses.dataclass(frozen=True)
class Lexicon:
    """All words."""

    en: Language
    zh: Language


def load_lexicon() -> Lexicon:
    """The words of the shop."""
    return from_dict(Lexicon, read_yaml(LEXICON), str(LEXICON))


# The world.


@dataclasses.dataclass(frozen=True)
class Query:
    """A query text with its truth."""

    text: str
    kind: str  # plain: all its words stand in the titles it means; gap: a synonym instead; typo: misspelt
    rows: np.ndarray  # int64 [n], the relevant items, ascending
    modifiers: int  # brand and attribute words beside the type: 0, 1, 2
    held_out: bool  # the log never asks for this combination, whatever the words
    shop: str  # name of the shop


@dataclasses.dataclass(frozen=True)
class Clicks:
    """The log of one shop, one row a click, in no order."""

    queries: list[str]
    item: np.ndarray  # int64 [clicks], rows of items
    user: np.ndarray  # int64 [clicks], rows of users
    time: np.ndarray  # int64 [clicks], seconds since 1970
    noise: np.ndarray  # bool [clicks], clicks on whatever is popular


@dataclasses.dataclass(frozen=True)
class _Meaning:
    """What somebody can want: items of a type, of a brand, with a value of an attribute; each of them optional."""

    type: ItemType | None
    brand: str | None
    value: Value | None
    rows: np.ndarray

    def phrasings(self, separator: str) -> Iterable[tuple[str, bool]]:
        """Texts that ask for it, and whether a synonym makes them a gap query."""
        types = [(self.type.word, False), *((s, True) for s in self.type.synonyms)] if self.type else [("", False)]
        values = [(self.value.word, False), *((s, True) for s in self.value.synonyms)] if self.value else [("", False)]
        for (value, value_gap), (noun, noun_gap) in itertools.product(values, types):
            parts = [value, self.brand or "", noun]
            if value.startswith("for "):
                parts = [*parts[1:], value]
            yield separator.join(part for part in parts if part), value_gap or noun_gap


class Shop:
    """One language's half of the world: items, what users like, queries with their relevant items.

    Row r of `titles`, `item_type` int64, `brand` int64, `price` float64 and `popularity` float64 (sums to 1), and
    column r of `pull` float64 [classes, items] (how strongly the item draws a user of the class), are item r. A class
    is one combination of gender, age and power; `user_class` int64 [users] is each user's.
    """

    def __init__(self, name: str, language: Language, parameters: Parameters, share: tuple[float, float]):
        """`share` is the part of the world, as an interval of [0, 1], that this shop is."""
        self.name = name
        self.types = [t for category in language.categories for t in category.types]
        self._language, self._parameters, self._share = language, parameters, share
        self._category = [category for category in language.categories for _ in category.types]
        self._brands = list(dict.fromkeys(brand for category in language.categories for brand in category.brands))
        self._attributes = {attribute.name: attribute.all_values() for attribute in language.attributes}
        self._make_items(_rng(parameters, f"{name}.items"))
        self._make_users(_rng(parameters, f"{name}.users"))
        self._make_queries(_rng(parameters, f"{name}.queries"))

    def category(self, row: int) -> str:
        """Category of an item."""
        return self._category[self.item_type[row]].name

    def brand_name(self, row: int) -> str:
        """Brand of an item."""
        return self._brands[self.brand[row]]

    def synonyms(self) -> dict[str, list[str]]:
        """Words of type and attribute, as they stand in titles, to those that stand in queries only."""
        words: list[ItemType | Value] = [
            *self.types,
            *(value for values in self._attributes.values() for value in values),
        ]
        return {entry.word: list(entry.synonyms) for entry in words if entry.synonyms}

    def polysemous(self) -> list[str]:
        """Words that are a brand and a type."""
        types = {t.word for t in self.types}
        return [brand for brand in self._brands if brand in types]

    def _count(self, total: int) -> int:
        begin, end = self._share
        return round(total * end) - round(total * begin)

    def _make_items(self, rng: np.random.Generator) -> None:
        n, types = self._count(self._parameters.items), len(self.types)
        weights = rng.lognormal(0, 0.4, types)
        self.item_type = rng.choice(types, n, p=weights / weights.sum())
        # Brands that one category sells differ in price tier, and in how much they sell.
        tier = np.arange(len(self._brands)) % 3
        rng.shuffle(tier)
        self.brand = np.zeros(n, np.int64)
        self._value = {name: np.full(n, -1) for name in self._attributes}
        for row_type, item_type in enumerate(self.types):
            rows = np.flatnonzero(self.item_type == row_type)
            brands = [self._brands.index(brand) for brand in self._category[row_type].brands]
            weights = 1 / np.sqrt(1 + rng.permutation(len(brands)))
            self.brand[rows] = rng.choice(brands, len(rows), p=weights / weights.sum())
            for name in item_type.attributes:
                self._value[name][rows] = rng.integers(0, len(self._attributes[name]), len(rows))
        level = tier[self.brand] - 1 + rng.normal(0, 0.25, n)
        base = np.array([t.price for t in self.types])[self.item_type]
        self.price = np.round(base * _TIER_FACTOR**level, 2)
        self.popularity = _zipf(n, self._parameters.popularity_exponent)[rng.permutation(n)]
        self.pull = self.popularity * np.exp(self._parameters.taste * self._liking(level))
        self.titles = [self._title(row, rng) for row in range(n)]

    def _liking(self, level: np.ndarray) -> np.ndarray:
        """What each class of users likes, float64 [classes, items]; 0 is neither likes nor dislikes."""
        n = len(level)
        gender, age = np.zeros((len(GENDERS), n)), np.zeros((len(AGES), n))

        def add(who: ItemType | Value, rows: np.ndarray) -> None:
            if who.gender is not None:
                gender[:, rows] = np.array([[1.0] if g == who.gender else [-1.0] for g in GENDERS])
            if who.age is not None:
                age[:, rows] = np.array([[1.0] if a == who.age else [-0.5] for a in AGES])

        # An attribute's word is nearer to the item than its type's: it comes last, and wins.
        for row, item_type in enumerate(self.types):
            add(item_type, np.flatnonzero(self.item_type == row))
        for name, values in self._attributes.items():
            for row, value in enumerate(values):
                add(value, np.flatnonzero(self._value[name] == row))
        power = -np.abs(level - (np.arange(len(POWERS)) - 1)[:, None])
        return (gender[:, None, None] + age[None, :, None] + power[None, None]).reshape(-1, n)

    def _title(self, row: int, rng: np.random.Generator) -> str:
        """Brand, attributes and type in changing order; what an accessory fits; words that every shop adds."""
        item_type = self.types[self.item_type[row]]
        values = [self._attributes[name][self._value[name][row]].word for name in item_type.attributes]
        middle = [*(values[i] for i in rng.permutation(len(values))), item_type.word]
        if rng.random() < 0.3:
            middle = [middle[-1], *middle[:-1]]
        # Model numbers, so that few titles are alike.
        parts = [self._brands[self.brand[row]], *middle, f"{'BCDFGHKMPRTVX'[rng.integers(13)]}{rng.integers(10, 1000)}"]
        if item_type.fits is not None:
            host = next(i for i, t in enumerate(self.types) if t.word == item_type.fits)
            brands = self._category[host].brands
            fits = "fits" if self._language.separator else "适用"
            parts += [fits, brands[rng.integers(len(brands))], item_type.fits]
        fillers = self._language.fillers
        parts += [fillers[i] for i in rng.permutation(len(fillers))[: rng.integers(0, 3)]]
        return " ".join(word if any(c.isdigit() for c in word) else word.title() for word in parts)

    def _make_users(self, rng: np.random.Generator) -> None:
        n = self._count(self._parameters.users)
        self.user_class = rng.integers(0, len(GENDERS) * len(AGES) * len(POWERS), n)
        self._activity = _zipf(n, self._parameters.activity_exponent)[rng.permutation(n)]

    def profile(self, user: int) -> tuple[str, str, str]:
        """Gender, age and power of a user."""
        rest, power = divmod(int(self.user_class[user]), len(POWERS))
        gender, age = divmod(rest, len(AGES))
        return GENDERS[gender], AGES[age], POWERS[power]

    def _meanings(self) -> Iterable[_Meaning]:
        """Every combination that at least one item answers."""
        # A word may be a value of several attributes: "red" of color and of ripeness.
        by_word: dict[str, Value] = {}
        has_word: dict[str, np.ndarray] = {}
        for name, values in self._attributes.items():
            for row, entry in enumerate(values):
                by_word.setdefault(entry.word, entry)
                mask = self._value[name] == row
                has_word[entry.word] = has_word.get(entry.word, False) | mask
        for row_type, item_type in [*enumerate(self.types), (-1, None)]:
            of_type = np.flatnonzero(self.item_type == row_type) if item_type else np.arange(len(self.titles))
            brands: list[str | None] = list(self._category[row_type].brands if item_type else self._brands)
            for brand in [None, *brands] if item_type else brands:
                of_brand = of_type if brand is None else of_type[self.brand[of_type] == self._brands.index(brand)]
                for value in (None, *by_word.values()):
                    rows = of_brand if value is None else of_brand[has_word[value.word][of_brand]]
                    if len(rows):
                        yield _Meaning(item_type, brand, value, rows)

    def _make_queries(self, rng: np.random.Generator) -> None:
        by_text: dict[str, list[tuple[_Meaning, bool]]] = {}
        meanings = list(self._meanings())
        phrasings = [list(meaning.phrasings(self._language.separator)) for meaning in meanings]
        for meaning, texts in zip(meanings, phrasings, strict=True):
            for text, gap in texts:
                by_text.setdefault(text, []).append((meaning, gap))
        self.queries: list[Query] = []
        seen = set()
        for meaning, texts in zip(meanings, phrasings, strict=True):
            modifiers = (meaning.brand is not None) + (meaning.value is not None)
            # What has a second meaning stays in the log: held out, its other meaning would give it away. So does the
            # bare word, from which the model learns what it means.
            can_hold_out = (
                meaning.type is not None and modifiers > 0 and all(len(by_text[text]) == 1 for text, _ in texts)
            )
            held_out = bool(rng.random() < self._parameters.held_out_share) and can_hold_out
            for text, _ in texts:
                if text in seen:
                    continue
                seen.add(text)
                senses = by_text[text]
                kind = "gap" if all(gap for _, gap in senses) else "plain"
                rows = np.unique(np.concatenate([sense.rows for sense, _ in senses]))
                self.queries.append(Query(text, kind, rows, modifiers, held_out, self.name))
        self._texts = seen
        # Mostly, short queries are asked more often than long ones, and the shop's own words more than others.
        rarity = [3.0 * query.modifiers + (query.kind == "gap") for query in self.queries]
        rank = np.argsort(rng.gumbel(size=len(self.queries)) * 1.5 + rarity)
        self._frequency = np.zeros(len(self.queries))
        self._frequency[rank] = _zipf(len(rank), self._parameters.query_exponent)
        self._frequency[[q.held_out for q in self.queries]] = 0
        self._frequency /= self._frequency.sum()

    def clicks(self) -> Clicks:
        """The log: a query by its frequency, then a user and an item together, by activity, popularity and liking."""
        rng = _rng(self._parameters, f"{self.name}.clicks")
        n = self._count(self._parameters.interactions)
        query = rng.choice(len(self.queries), n, p=self._frequency)
        item, user_class = np.zeros(n, np.int64), np.zeros(n, np.int64)
        activity = np.bincount(self.user_class, self._activity, minlength=len(self.pull))
        order = np.argsort(query, kind="stable")
        for clicks in np.split(order, np.flatnonzero(np.diff(query[order])) + 1):
            rows = self.queries[query[clicks[0]]].rows
            chance = np.cumsum(activity[:, None] * self.pull[:, rows])
            drawn = np.searchsorted(chance, rng.random(len(clicks)) * chance[-1], side="right")
            user_class[clicks], item[clicks] = drawn // len(rows), rows[drawn % len(rows)]
        user = np.zeros(n, np.int64)
        for row in np.unique(user_class):
            users, clicks = np.flatnonzero(self.user_class == row), np.flatnonzero(user_class == row)
            weights = self._activity[users]
            user[clicks] = rng.choice(users, len(clicks), p=weights / weights.sum())
        noise = rng.random(n) < self._parameters.noise_share
        item[noise] = rng.choice(len(self.titles), int(noise.sum()), p=self.popularity)
        texts = [self.queries[row].text for row in query]
        for click in np.flatnonzero(rng.random(n) < self._parameters.typo_share):
            texts[click] = self._misspelt(texts[click], rng) or texts[click]
        time = _START + rng.integers(0, self._parameters.days * 86_400, n)
        return Clicks(texts, item, user, time, noise)

    def judged(self, log_texts: set[str]) -> list[Query]:
        """Held-out queries of each kind, none of them in `log_texts`."""
        rng = _rng(self._parameters, f"{self.name}.judged")
        candidates = [query for query in self.queries if query.held_out]
        candidates = [candidates[row] for row in rng.permutation(len(candidates))]
        wanted = {kind: self._count(round(self._parameters.judged_queries * share)) for kind, share in _KINDS.items()}
        judged = [
            query
            for kind in ("plain", "gap")
            for query in [query for query in candidates if query.kind == kind][: wanted[kind]]
        ]
        # From the end, where the plain queries are not judged themselves (unless the shop is small).
        for query in [query for query in reversed(candidates) if query.kind == "plain"][: wanted["typo"]]:
            text = self._misspelt(query.text, rng)
            if text is not None and text not in log_texts:
                judged.append(dataclasses.replace(query, text=text, kind="typo"))
        return judged

    def _misspelt(self, text: str, rng: np.random.Generator) -> str | None:
        """`text` with one slip of the keyboard; None where that gives nothing, or another query."""
        if self._language.separator:
            words = text.split(" ")
            long = [i for i, word in enumerate(words) if len(word) >= 4 and word.isalpha()]
            if not long:
                return None
            i = long[rng.integers(len(long))]
            word, at = words[i], int(rng.integers(1, len(words[i]) - 1))
            slips = [word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:]]
            slips.append(word[:at] + word[at + 1] + word[at] + word[at + 2 :])
            words[i] = slips[rng.integers(len(slips))]
            slip = " ".join(words)
        else:
            places = [(i, pair[1]) for pair in self._language.homophones for i, c in enumerate(text) if c == pair[0]]
            if not places:
                return None
            i, wrong = places[rng.integers(len(places))]
            slip = text[:i] + wrong + text[i + 1 :]
        return None if slip in self._texts or slip == text else slip


def _rng(parameters: Parameters, part: str) -> np.random.Generator:
    return np.random.default_rng([parameters.seed, zlib.crc32(part.encode())])


def _zipf(n: int, exponent: float) -> np.ndarray:
    """1 / rank ** exponent of ranks 1 to n, float64 [n], divided by its sum."""
    weights = np.arange(1, n + 1) ** -float(exponent)
    return weights / weights.sum()


def _random_ids(n: int, rng: np.random.Generator) -> np.ndarray:
    """n distinct ids, int64, in random order."""
    ids = rng.integers(_FIRST_ID, _LAST_ID, n)
    while len(unique := np.unique(ids)) < n:
        ids = np.concatenate([unique, rng.integers(_FIRST_ID, _LAST_ID, n - len(unique))])
    return rng.permutation(ids)


# The files.

_PROFILE = ("gender", "age", "power")
_SCHEMA = {
    "items": {"files": ["items.parquet"], "id": "item_id", "text": ["title"]},
    "users": {"files": ["users.parquet"], "id": "user_id", "features": list(_PROFILE)},
    "interactions": {"files": ["interactions.parquet"], "query": "query", "item": "item_id", "user": "user_id"},
    "vocabulary": {"min_count": 2},
}


def _write_items(shops: list[Shop], ids: np.ndarray, path: Path) -> None:
    rows = [(shop, row) for shop in shops for row in range(len(shop.titles))]
    table = pa.table(
        {
            "item_id": ids,
            "title": [shop.titles[row] for shop, row in rows],
            "brand": [shop.brand_name(row) for shop, row in rows],
            "category": [shop.category(row) for shop, row in rows],
            "price": np.concatenate([shop.price for shop in shops]),
        }
    )
    # Ids are random, so their order tells nothing.
    pyarrow.parquet.write_table(table.take(np.argsort(ids)), path)


def _write_users(shops: list[Shop], ids: np.ndarray, path: Path) -> None:
    profiles = [shop.profile(user) for shop in shops for user in range(len(shop.user_class))]
    table = pa.table(
        {"user_id": ids, **{name: [profile[i] for profile in profiles] for i, name in enumerate(_PROFILE)}}
    )
    pyarrow.parquet.write_table(table.take(np.argsort(ids)), path)


def _write_clicks(
    shops: list[Shop], logs: list[Clicks], item_ids: np.ndarray, user_ids: np.ndarray, path: Path
) -> None:
    """In the order of time."""
    first_item = np.cumsum([0] + [len(shop.titles) for shop in shops])
    first_user = np.cumsum([0] + [len(shop.user_class) for shop in shops])
    time = np.concatenate([log.time for log in logs])
    table = pa.table(
        {
            "query": [text for log in logs for text in log.queries],
            "item_id": item_ids[
                np.concatenate([log.item + first for log, first in zip(logs, first_item, strict=False)])
            ],
            "user_id": user_ids[
                np.concatenate([log.user + first for log, first in zip(logs, first_user, strict=False)])
            ],
            "time": time,
        }
    )
    pyarrow.parquet.write_table(table.take(np.argsort(time, kind="stable")), path)


def _write_judgments(
    shops: list[Shop], judged: list[Query], item_ids: np.ndarray, parameters: Parameters, path: Path
) -> None:
    """All relevant items of a query or, if they are too many, a random choice of them."""
    rng = _rng(parameters, "judgments")
    first_item = dict(
        zip((shop.name for shop in shops), np.cumsum([0] + [len(shop.titles) for shop in shops]), strict=False)
    )
    lines = ["query\titem\tgrade\tkind\n"]
    for query in judged:
        rows = query.rows
        if len(rows) > parameters.max_judged_items:
            rows = rng.choice(rows, parameters.max_judged_items, replace=False)
        lines += [f"{query.text}\t{i}\t1\t{query.kind}\n" for i in np.sort(item_ids[rows + first_item[query.shop]])]
    path.write_text("".join(lines), encoding="utf-8")
