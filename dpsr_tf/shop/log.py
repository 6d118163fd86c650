"""The log of the generated shop: sessions of requests, the items that each request shows, and clicks on them.

Each session has a user, drawn by activity, and an intent: a meaning among the user's interests and, of its items, the
one that the user would like most. The first query of a session asks for the meaning. Further queries ask for anything
that the wanted item answers. A request shows a list that the engine ranks by popularity, for every meaning of the
query, with some items that only look right. The user looks at the item at position p with a known probability, and then
clicks it by its appeal to the user and its likeness to the wanted item (a position-based click model).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from dpsr_tf.data.schema import EVENT_TYPES
from dpsr_tf.shop.sampling import draw, random_stream
from dpsr_tf.shop.world import World

# First second of the log, 2024-01-01 UTC.
START = 1_704_067_200
# The relative number of sessions in each hour of the day.
HOURS = (2, 1, 1, 1, 1, 2, 3, 5, 6, 7, 8, 8, 9, 8, 7, 7, 8, 9, 10, 12, 13, 12, 8, 4)
_IMPRESSION, _SKIP, _CLICK, _CART, _ORDER = range(len(EVENT_TYPES))
# Clicks in a batch. Memory grows with it.
_BATCH = 32_768
# Largest number of requests in a session.
_MOST_REQUESTS = 5
# How many items a user compares to find the one wanted.
_CHOICES = 6
# Users put an irrelevant item into the cart less often after a click: the chance is multiplied by this.
STRAY_CARTS = 0.1
# Marks an item that was drawn a second time for the same list; larger than the key of every real place.
_REPEATED = 1 << 24


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of the log, in the order of time; arrays of one length."""

    text: np.ndarray  # int64, rows of the world's texts, followed by its misspelt texts
    user: np.ndarray  # int64, rows of users
    item: np.ndarray  # int64, rows of items
    event: np.ndarray  # int8, codes of EVENT_TYPES
    time: np.ndarray  # int64, seconds since 1970
    session: np.ndarray  # int64
    position: np.ndarray  # int32, from 1 on

    def take(self, rows: np.ndarray) -> Rows:
        """Returns the given rows."""
        return Rows(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    @staticmethod
    def join(parts: list[Rows]) -> Rows:
        """Joins several sets of rows, one after the other."""
        return Rows(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Rows)))


class Log:
    """The log of a world. Its counts cover the batches that were read so far.

    Attributes:
        end: the first second after the log, seconds since 1970.
        propensities: the probability that a user looks at each position, float64 [list_length].
        user_clicks: number of clicks of each user, int64 [users].
        text_requests: number of requests with each text, int64 [texts + misspelt texts].
        events: number of rows with each code of EVENT_TYPES, int64.
        sessions, requests, stray_clicks: numbers; a stray click is one on an item that is no answer.
    """

    def __init__(self, world: World):
        self._world, self._parameters = world, world.parameters
        self.end = START + self._parameters.days * 86_400
        self.propensities = np.arange(1.0, self._parameters.list_length + 1) ** -self._parameters.position_exponent
        self.user_clicks = np.zeros(len(world.users), np.int64)
        self.text_requests = np.zeros(len(world.texts) + len(world.misspelt), np.int64)
        self.events = np.zeros(len(EVENT_TYPES), np.int64)
        self.requests = self.sessions = self.stray_clicks = 0
        self._popularity_rank = np.argsort(np.argsort(-world.items.popularity, kind="stable"))
        right, _ = world.text_rows()
        self._text_answer = world.text_answer[right]
        # No session begins in the last hour, so that all of them end within the log.
        hours = self._parameters.days * 24 - 1
        # The relative number of sessions before each hour of the log.
        self._sessions_before = np.concatenate([[0], np.cumsum(np.resize(HOURS, hours))])

    def batches(self) -> Iterator[Rows]:
        """Yields the whole log, in the order of time."""
        clicks = self._parameters.interactions
        bounds = np.round(np.linspace(0, clicks, -(-clicks // _BATCH) + 1)).astype(np.int64)
        late: list[Rows] = []
        for number in range(len(bounds) - 1):
            rng = random_stream(self._parameters, "log", number)
            rows = self._batch(int(bounds[number + 1] - bounds[number]), bounds[number : number + 2] / clicks, rng)
            rows = Rows.join([*late, rows])
            order = np.argsort(rows.time, kind="stable")
            # Rows after the first session of the next batch wait, and are sorted together with that batch.
            ready = (
                len(order) if number == len(bounds) - 2 else self._ready(rows.time[order], bounds[number + 1] / clicks)
            )
            late = [rows.take(order[ready:])]
            yield rows.take(order[:ready])

    def _ready(self, time: np.ndarray, share: float) -> int:
        """Returns how many rows come before the time at which this share of all sessions has begun."""
        return int(np.searchsorted(time, self._time(np.array([share]))[0]))

    def _time(self, share: np.ndarray) -> np.ndarray:
        """Returns the time at which this share of all sessions has begun, in seconds since 1970."""
        hours = np.interp(
            share * self._sessions_before[-1], self._sessions_before, np.arange(len(self._sessions_before))
        )
        return START + (hours * 3600).astype(np.int64)

    def _batch(self, clicks: int, shares: np.ndarray, rng: np.random.Generator) -> Rows:
        """Makes sessions with `clicks` clicks in all. They begin between two times, given as shares of all sessions."""
        parts: list[_Shown] = []
        made, sessions, rate = 0, 0, 1.5
        while made < clicks:
            n = int((clicks - made) / rate * 1.05) + 16
            parts.append(self._sessions(n, sessions, rng))
            made, sessions = made + int(parts[-1].clicked.sum()), sessions + n
            rate = max(made / sessions, 0.02)
        shown = _Shown.join(parts)
        shown = shown.cut(clicks)
        sessions = int(shown.session[-1]) + 1
        begin = self._time(shares[0] + rng.random(sessions) * (shares[1] - shares[0]))
        return self._rows(shown, begin, rng)

    def new_requests(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Draws the first requests of n further sessions, as those of the log, and shows them nothing.

        Returns:
            The rows of the users, of the meanings that they ask for, of the items that they want, and of the texts
            that they type (misspelt ones follow the world's texts); int64 [n] each.
        """
        world = self._world
        user, pair = world.sessions(n, rng)
        meaning = world.pair_meaning[pair]
        return user, meaning, self._wanted(user, meaning, rng), self._typed(world.pair_text[pair], rng)

    def _sessions(self, n: int, first: int, rng: np.random.Generator) -> _Shown:
        """Makes n sessions, numbered from `first` on, with the items that they are shown and click."""
        world = self._world
        user, pair = world.sessions(n, rng)
        target = self._wanted(user, world.pair_meaning[pair], rng)
        # The first request asks for the meaning, the others for something else that the wanted item answers.
        count = np.minimum(rng.geometric(1 / self._parameters.requests_per_session, n), _MOST_REQUESTS)
        session = np.repeat(np.arange(n), count)
        order = np.arange(len(session)) - np.repeat(np.cumsum(count) - count, count)
        asked = pair[session]
        later = order > 0
        asked[later] = world.another_pair(target[session[later]], rng)
        right = world.pair_text[asked]
        # A request that repeats the text before it is left out.
        new = np.ones(len(session), bool)
        new[1:] = ~later[1:] | (right[1:] != right[:-1])
        session, order, asked, right = (column[new] for column in (session, order, asked, right))
        meaning, text = world.pair_meaning[asked], self._typed(right, rng)
        request, item, position = self._lists(text, meaning, rng)
        clicked, stray = self._click(user[session], meaning, target[session], request, item, position, rng)
        return _Shown(first + session[request], order[request], text[request], user[session][request], item, position,
                      clicked, stray)  # fmt: skip

    def _wanted(self, user: np.ndarray, meaning: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draws the item that a user wants for each meaning: some items by popularity, and of these one by appeal."""
        world = self._world
        meaning = np.broadcast_to(meaning[:, None], (len(meaning), _CHOICES))
        choices = world.answer_items[
            draw(world.answer_sums, world.answer_splits[meaning], world.answer_splits[meaning + 1], rng)
        ]
        appeal = world.appeal(user[:, None], choices) + rng.gumbel(size=choices.shape)
        return choices[np.arange(len(user)), appeal.argmax(1)]

    def _typed(self, text: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the text that is typed for each text: mostly the same, sometimes a misspelt one."""
        world = self._world
        begin, end = world.misspelt_splits[text], world.misspelt_splits[text + 1]
        slip = (rng.random(len(text)) < self._parameters.typo_share) & (end > begin)
        # Some slips are more frequent than others.
        at = begin + ((end - begin) * rng.random(len(text)) ** 2).astype(np.int64)
        return np.where(slip, len(world.texts) + at, text)

    def _lists(
        self, text: np.ndarray, meaning: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Makes the list of each request. Returns rows of requests, rows of items, and positions, sorted by request."""
        world, length = self._world, self._parameters.list_length
        # More items are drawn than a list has places, because an item may be drawn twice.
        shape = (len(text), length + length // 2 + 1)
        answer = np.broadcast_to(self._text_answer[text][:, None], shape)
        # A share of the places, stray_share, is for items that only look right: half of them mislead by their words, if
        # there are such items, and half are of the same category.
        misleading = world.misleading_answer[world.meaning[meaning, 1]]
        category = world.category_answer[world.meaning[meaning, 0]]
        misleading = np.where((world.meaning[meaning, 1] >= 0) & (misleading >= 0), misleading, category)
        stray = rng.random(shape, np.float32) / max(self._parameters.stray_share, 1e-9)
        answer = np.where(stray < 0.5, misleading[:, None], np.where(stray < 1, category[:, None], answer))
        item = world.answer_items[
            draw(world.answer_sums, world.answer_splits[answer], world.answer_splits[answer + 1], rng)
        ]
        # Items that are drawn by popularity, one after the other, are ranked by popularity with noise. Of an item that
        # is drawn twice the first place counts. Keys hold item and place, in the order in which they are sorted.
        keys = (item.astype(np.int64) << 8) | np.arange(shape[1])
        keys.sort(1)
        place, item = keys & 255, keys >> 8
        if self._parameters.sorted_share > 0:
            by_popularity = rng.random(len(text)) < self._parameters.sorted_share
            place[by_popularity] = self._popularity_rank[item[by_popularity]]
        shuffled = rng.random(len(text)) < self._parameters.shuffled_share
        place[shuffled] = rng.integers(0, _REPEATED, (int(shuffled.sum()), shape[1]))
        place[:, 1:][item[:, 1:] == item[:, :-1]] = _REPEATED
        keys = (place << 32) | item
        keys.sort(1)
        keys = keys[:, :length]
        shown = keys < _REPEATED << 32
        request, position = np.nonzero(shown)
        return request, keys[shown] & 0xFFFFFFFF, position + 1

    def _click(
        self,
        user: np.ndarray,
        meaning: np.ndarray,
        target: np.ndarray,
        request: np.ndarray,
        item: np.ndarray,
        position: np.ndarray,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decides which shown items are clicked.

        Returns:
            Two bools per row: whether the item is clicked, and whether the user looks at it although it is no answer.
        """
        clicked, stray = np.zeros(len(item), bool), np.zeros(len(item), bool)
        seen = np.flatnonzero(rng.random(len(item), np.float32) < self.propensities[position - 1])
        request, item = request[seen], item[seen]
        chance, right = self.chances(user[request], meaning[request], target[request], item)
        clicked[seen] = rng.random(len(seen)) < chance
        stray[seen] = ~right
        return clicked, stray

    def click_chance(
        self, user: np.ndarray, meaning: np.ndarray, item: np.ndarray, draws: int, seed: int
    ) -> np.ndarray:
        """Returns how likely users are to click items once they look at them, whatever the position.

        It is the mean over `draws` items that the user may have in mind.

        Args:
            user, meaning, item: rows of the world, int64 [n].
            draws: number of draws.
            seed: of the draws.

        Returns:
            float64 [n].
        """
        rng = np.random.default_rng(seed)
        chances = (self.chances(user, meaning, self._wanted(user, meaning, rng), item)[0] for _ in range(draws))
        return np.asarray(sum(chances) / draws)

    def chances(
        self, user: np.ndarray, meaning: np.ndarray, wanted: np.ndarray, item: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the chance of a click once an item is looked at, and whether the item is an answer.

        Args:
            user, meaning, wanted, item: rows of the world, int64 of a common shape. The user has `wanted` in mind.

        Returns:
            float64 and bool of that shape.
        """
        world, items, parameters = self._world, self._world.items, self._parameters
        right = world.missed(meaning, item) == 0
        same = (items.words[item] >= 0) & (items.words[item] == items.words[wanted])
        likeness = (items.brand[item] == items.brand[wanted]) + same.mean(-1)
        odds = parameters.click_level + world.appeal(user, item) + parameters.intent * likeness
        return np.where(right, 1 / (1 + np.exp(-odds)), parameters.noise), right

    def _rows(self, shown: _Shown, begin: np.ndarray, rng: np.random.Generator) -> Rows:
        """Turns shown items into rows, adds carts and orders, and counts them all."""
        n = len(shown.item)
        # Rows that begin a request.
        first = np.ones(n, bool)
        first[1:] = (shown.session[1:] != shown.session[:-1]) | (shown.order[1:] != shown.order[:-1])
        starts = np.flatnonzero(first)
        lengths = np.diff(np.append(starts, n))
        last_click = np.repeat(np.maximum.reduceat(shown.position * shown.clicked, starts), lengths)
        event = np.where(shown.position < last_click, _SKIP, _IMPRESSION).astype(np.int8)
        event[shown.clicked] = _CLICK
        asked = begin[shown.session[starts]] + shown.order[starts] * 120 + rng.integers(0, 60, len(starts))
        time = np.repeat(asked, lengths)
        time += np.where(shown.clicked, 4 * shown.position + rng.integers(1, 10, n), 0)
        session = _scrambled(self.sessions + shown.session, self._parameters.seed)
        rows = Rows(shown.text, shown.user, shown.item, event, time, session, shown.position.astype(np.int32))

        clicks = np.flatnonzero(shown.clicked)
        share = self._parameters.cart_share * np.where(shown.stray[clicks], STRAY_CARTS, 1)
        carts = clicks[rng.random(len(clicks)) < share]
        cart = rows.take(carts)
        cart = dataclasses.replace(
            cart, event=np.full(len(carts), _CART, np.int8), time=cart.time + rng.integers(10, 40, len(carts))
        )
        ordered = np.flatnonzero(rng.random(len(carts)) < self._parameters.order_share)
        order = cart.take(ordered)
        order = dataclasses.replace(
            order, event=np.full(len(ordered), _ORDER, np.int8), time=order.time + rng.integers(30, 300, len(ordered))
        )
        rows = Rows.join([rows, cart, order])

        self.sessions += len(begin)
        self.requests += len(starts)
        self.stray_clicks += int((shown.clicked & shown.stray).sum())
        self.events += np.bincount(rows.event, minlength=len(EVENT_TYPES))
        self.user_clicks += np.bincount(shown.user[clicks], minlength=len(self.user_clicks))
        self.text_requests += np.bincount(shown.text[starts], minlength=len(self.text_requests))
        return rows


@dataclasses.dataclass(frozen=True)
class _Shown:
    """Items that were shown, in the order of session, request and position; arrays of one length."""

    session: np.ndarray
    order: np.ndarray  # number of the request in its session, from 0 on
    text: np.ndarray
    user: np.ndarray
    item: np.ndarray
    position: np.ndarray
    clicked: np.ndarray
    stray: np.ndarray

    @staticmethod
    def join(parts: list[_Shown]) -> _Shown:
        return _Shown(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(_Shown)))

    def cut(self, clicks: int) -> _Shown:
        """Keeps the first sessions, with exactly `clicks` clicks. Further clicks of the last session are dropped."""
        clicked = self.clicked & (np.cumsum(self.clicked) <= clicks)
        last = self.session[np.flatnonzero(clicked)[-1]]
        end = int(np.searchsorted(self.session, last, side="right"))
        columns = {f.name: getattr(self, f.name)[:end] for f in dataclasses.fields(self)}
        return _Shown(**{**columns, "clicked": clicked[:end]})


def _scrambled(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Replaces numbers by others of 60 bits, in no order. Different numbers stay different: each step can be undone."""
    mask = (1 << 60) - 1
    x = (numbers.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 & mask)) & np.uint64(mask)
    for odd in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        x = (x * np.uint64(odd)) & np.uint64(mask)
        x ^= x >> np.uint64(31)
    return x.astype(np.int64)
