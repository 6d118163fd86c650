"""Re-ranking: variants of one product collapse, neighbours differ, and merchandisers' rules have the last word.

The steps run in this order on the candidates of the stages before, best first:

1. Collapse. Of the items of one group the best one stays. It says how many it stands for.
2. Diversity. The first results are put in another order, so that they do not all have the same brand or shop.
3. Rules. Boosted items move up, buried ones down, and pinned ones take their places.

All steps are functions of their arguments: the same candidates give the same list, so pages can be cut from it. Only
`RuleFile.refresh` looks at a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsr_common.errors import UsageError
from dpsr_common.strict_yaml import Section, load_yaml, read_file
from dpsr_serving import _native
from dpsr_serving.gateway.catalogue import KEYWORD, Catalogue, Condition
from dpsr_serving.gateway.messages import read_filters
from dpsr_serving.search import Filters

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DiversityConfig:
    """How neighbouring results are made to differ.

    Attributes:
        attributes: keyword attributes in which neighbours should differ, such as brand and shop.
        method: "mmr" trades the score for difference, "window" allows `most` results with a value in a window.
        strength: for mmr, the weight of the difference against the score, 0 to 1.
        most: for window, the largest number of results with the same value in a window.
        window: number of neighbouring results that are compared.
        size: number of first results that are put in another order.
    """

    attributes: tuple[str, ...]
    method: str = "mmr"
    strength: float = 0.3
    most: int = 2
    window: int = 10
    size: int = 50


@dataclasses.dataclass(frozen=True)
class RerankConfig:
    """The section `rerank` of a pipeline.

    Attributes:
        collapse: whether the variants of one product become one result.
        diversity: how neighbouring results are made to differ; None: not at all.
        rules: file with the rules of merchandisers; None: there are none.
    """

    collapse: bool = True
    diversity: DiversityConfig | None = None
    rules: str | None = None


RERANK_KEYS = ("collapse", "diversity", "rules")
_DIVERSITY_KEYS = ("attributes", "method", "strength", "most", "window", "size")


def read_config(section: Section, folder: Path) -> RerankConfig:
    """Reads the section `rerank` of a pipeline, with the keys RERANK_KEYS. Raises UsageError.

    A relative path of the rules begins at `folder`.
    """
    rules = section.text("rules", None)
    return RerankConfig(
        collapse=section.flag("collapse", True),
        diversity=_diversity(section.section("diversity", _DIVERSITY_KEYS)) if "diversity" in section.tree else None,
        rules=None if rules is None else str(folder / rules),
    )


def _diversity(section: Section) -> DiversityConfig:
    given = section.tree.get("attributes")
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise section.error("attributes", f"got {given!r}, expected a list of keyword attributes, such as [brand]")
    if len(set(names)) < len(names):
        raise section.error("attributes", f"got {given!r}, expected each attribute once")
    method = section.text("method", DiversityConfig.method, ("mmr", "window").__contains__, "'mmr' or 'window'")
    for name, other in (("strength", "mmr"), ("most", "window")):
        if name in section.tree and method != other:
            raise section.error(name, f"belongs to the method {other}; leave it out, or write `method: {other}`")
    return DiversityConfig(
        attributes=tuple(names),
        method=method,
        strength=section.number("strength", DiversityConfig.strength, least=0, most=1),
        most=section.integer("most", DiversityConfig.most, 1),
        window=section.integer("window", DiversityConfig.window, 2),
        size=_size(section),
    )


def _size(section: Section) -> int:
    size = section.integer("size", DiversityConfig.size, 1)
    if size > 500:
        raise section.error("size", f"got {size}, expected at most 500, because the time grows with it")
    return size


@dataclasses.dataclass(frozen=True, eq=False)
class Reranked:
    """The m results, best first.

    Attributes:
        ids: [m] int64.
        rows: [m] int64, rows of the catalogue.
        source: [m] int64, the place of each result among the candidates; -1 for an item that only a rule put there.
        variants: [m] int64, how many candidates of its group a result stands for, itself included.
        rules: id -> what rules did with the item, as "NAME: pinned", for those that a rule concerned.
    """

    ids: NDArray[np.int64]
    rows: NDArray[np.int64]
    source: NDArray[np.int64]
    variants: NDArray[np.int64]
    rules: Mapping[int, Sequence[str]]

    def reasons(self, place: int) -> list[str]:
        """Returns what re-ranking did with the result at a place (from 0), for the answer's `explain`."""
        source, variants = int(self.source[place]), int(self.variants[place])
        said = []
        if source < 0:
            said.append("not found by recall")
        elif source != place:
            said.append(f"moved from {source + 1} to {place + 1}")
        if variants > 1:
            said.append(f"stands for {variants} variants")
        return [*said, *self.rules.get(int(self.ids[place]), ())]


class Reranker:
    """The re-ranking of one pipeline. Threads may share it."""

    def __init__(self, config: RerankConfig, catalogue: Catalogue, rules: RuleFile | None = None) -> None:
        """Checks the attributes of `diversity` and raises UsageError if the catalogue has no such keyword attribute.

        `rules` is the file that config.rules names, which pipelines can share.
        """
        keywords = [name for name, attribute in catalogue.attributes.items() if attribute.kind == KEYWORD]
        for name in config.diversity.attributes if config.diversity else ():
            if name not in keywords:
                raise UsageError(
                    f"rerank.diversity.attributes: the index has no keyword attribute {name!r}, expected one of "
                    f"{', '.join(keywords) or 'none (name some in the schema under items.filters)'}"
                )
        self._config = config
        self._catalogue = catalogue
        self._rules = rules

    def apply(
        self,
        ids: NDArray[np.int64],
        rows: NDArray[np.int64],
        scores: NDArray[np.floating[Any]],
        query: str,
        now: float,
        filters: Filters | tuple[Condition, ...] | None = None,
    ) -> Reranked:
        """Returns the results in their last order.

        Args:
            ids: [n] distinct items, best first.
            rows: [n] their rows in the catalogue, -1 for items that it does not know.
            scores: [n] their scores. Where a score is higher than one before it, it counts as equal to that.
            query: the user's text, which rules look at.
            now: seconds since 1970, which rules look at.
            filters: filters of the request. A pinned item that does not match them is left out.
        """
        rules = self._rules.active(query, now) if self._rules is not None else ()
        ids, rows = np.asarray(ids, np.int64), np.asarray(rows, np.int64)
        found = len(ids)
        pins = self._pins(rules, filters)
        if pins:
            added = np.setdiff1d(np.array(list(pins), np.int64), ids)
            ids = np.concatenate([ids, added])
            rows = np.concatenate([rows, self._catalogue.rows(added)])
            is_pinned = np.isin(ids, list(pins))
        else:
            is_pinned = np.zeros(len(ids), bool)

        kept, variants = self._collapse(rows, is_pinned)
        order = kept[~is_pinned[kept]]
        diversity = self._config.diversity
        if diversity is not None and len(order) > 2:
            first = order[: diversity.size]
            places = diversify(diversity, np.asarray(scores, np.float64)[first], *self._values(rows[first]))
            order = np.concatenate([first[places], order[diversity.size :]])
        reasons: dict[int, list[str]] = {}
        order = self._move(rules, order, ids, rows, reasons)
        order = _insert(order, kept[is_pinned[kept]], ids, pins, reasons)
        source = np.where(order < found, order, -1)
        return Reranked(ids[order], rows[order], source, variants[order], reasons)

    def _values(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the values of items in the attributes of `diversity`, as `diversify` takes them."""
        assert self._config.diversity is not None
        names = self._config.diversity.attributes
        known = np.flatnonzero(rows >= 0)
        places, values = [], []
        for number, name in enumerate(names):
            codes, items = self._catalogue.attributes[name].codes_of(rows[known])
            has_value = codes > 0
            places.append(known[items[has_value]])
            values.append(codes[has_value].astype(np.int64) * len(names) + number)
        return np.concatenate(places), np.concatenate(values)

    def _pins(
        self, rules: Sequence[Rule], filters: Filters | tuple[Condition, ...] | None
    ) -> dict[int, tuple[int, str]]:
        """Returns the pinned items: id -> (place from 0, name of the rule). The first rule that pins an item counts."""
        pins: dict[int, tuple[int, str]] = {}
        for rule in rules:
            for offset, item in enumerate(rule.pin):
                pins.setdefault(item, (rule.pin_at - 1 + offset, rule.name))
        if pins and filters:
            items = np.array(list(pins), np.int64)
            matching = self._catalogue.matches(self._catalogue.rows(items), filters)
            pins = {item: pins[item] for item in items[matching].tolist()}
        return pins

    def _collapse(
        self, rows: NDArray[np.int64], is_pinned: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the candidates that stay, ascending, and for every candidate the size of its group.

        A pinned item stands for its group. If several items of a group are pinned, all of them stay.
        """
        every = np.arange(len(rows))
        if not (self._config.collapse and self._catalogue.has_groups and len(rows)):
            return every, np.ones(len(rows), np.int64)
        # An item that the catalogue does not know is alone.
        groups = np.where(rows < 0, np.iinfo(np.int64).min + every, self._catalogue.group(np.maximum(rows, 0)))
        best_first = np.argsort(~is_pinned, kind="stable")
        _, first, group, sizes = np.unique(
            groups[best_first], return_index=True, return_inverse=True, return_counts=True
        )
        variants = np.empty(len(rows), np.int64)
        variants[best_first] = sizes[group]
        stays = is_pinned.copy()
        stays[best_first[first]] = True
        return np.flatnonzero(stays), variants

    def _move(
        self,
        rules: Sequence[Rule],
        order: NDArray[np.int64],
        ids: NDArray[np.int64],
        rows: NDArray[np.int64],
        reasons: dict[int, list[str]],
    ) -> NDArray[np.int64]:
        """Returns the order after boosts and buries, whose places add up."""
        if not rules:
            return order
        up = np.zeros(len(order), np.int64)
        for rule in rules:
            for move in rule.moves:
                concerned = np.isin(ids[order], move.items) if move.items else np.zeros(len(order), bool)
                if move.filters:
                    known = np.flatnonzero(rows[order] >= 0)
                    concerned[known] |= self._catalogue.matches(rows[order[known]], move.filters)
                up[concerned] += move.places
                word = "boosted" if move.places > 0 else "buried"
                for item in ids[order[concerned]].tolist():
                    reasons.setdefault(item, []).append(f"{rule.name}: {word}")
        if not up.any():
            return order
        place = np.arange(len(order))
        # Where two items meet, the one that moved up most comes first.
        return order[np.lexsort((place, -up, place - up))]


def diversify(
    config: DiversityConfig, scores: NDArray[np.float64], places: NDArray[np.int64], values: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Returns an order of n results in which neighbours differ, int64 [n].

    The method mmr takes, place by place, the result with the largest (1 - strength) * relevance - strength * similarity
    (Carbonell and Goldstein, SIGIR 1998, section 2). The relevance is the score, scaled so that the n scores go from 0
    to 1. The similarity is the share of the attributes in which the result has a value in common with one of the last
    `window` results.

    The method window takes, place by place, the first result with which no value stands more than `most` times among
    `window` neighbours, or the first one of all if there is none.

    Args:
        config: method and its parameters.
        scores: [n], best first.
        places, values: [v] each: the result at this place has this value. A value is one number:
            code * (number of attributes) + number of the attribute.

    Raises:
        ValueError: a place is not that of a result, or a value is negative.
    """
    if config.method == "window":
        return _native.sliding_window(len(scores), places, values, config.window, config.most)
    known = np.isfinite(scores)
    relevance = np.minimum.accumulate(np.where(known, scores, scores[known].min() if known.any() else 0.0))
    relevance -= relevance[-1]
    span, attributes = relevance[0], len(config.attributes)
    gains = (1 - config.strength) / span * relevance if span > 0 else relevance
    return _native.maximal_marginal_relevance(
        gains, places, values, attributes, config.window, config.strength / attributes
    )


def _insert(
    order: NDArray[np.int64],
    pinned: NDArray[np.int64],
    ids: NDArray[np.int64],
    pins: Mapping[int, tuple[int, str]],
    reasons: dict[int, list[str]],
) -> NDArray[np.int64]:
    """Returns the order with each pinned item at its place, or at the next one that is free."""
    if not len(pinned):
        return order
    total = len(order) + len(pinned)
    slots = np.full(total, -1, np.int64)
    rank_of = {item: rank for rank, item in enumerate(pins)}
    by_place = sorted(pinned.tolist(), key=lambda at: (pins[int(ids[at])][0], rank_of[int(ids[at])]))
    free = 0
    for index, at in enumerate(by_place):
        place, name = pins[int(ids[at])]
        # The items after this one still need their places in a list that is shorter than they ask for.
        free = min(max(place, free), total - (len(by_place) - index))
        slots[free] = at
        free += 1
        reasons.setdefault(int(ids[at]), []).append(f"{name}: pinned")
    slots[slots < 0] = order
    return slots


# Rules.

# More places than a list can have: to the end.
_TO_THE_END = 1_000_000
_RULE_KEYS = ("queries", "contains", "from", "until", "pin", "pin_at", "boost", "bury")
_MOVE_KEYS = ("items", "filters", "places")


@dataclasses.dataclass(frozen=True)
class Move:
    """Some items go up by a number of places, or down where it is negative."""

    items: tuple[int, ...]
    filters: tuple[Condition, ...]
    places: int


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rule of a merchandiser.

    Attributes:
        name: its name in the file.
        queries: normalised texts; the rule applies to queries that are one of them.
        contains: normalised words and phrases; the rule applies to queries that contain one of them.
        begins, ends: seconds since 1970; the rule applies from `begins` on and before `ends`.
        pin: item ids, which take the places from `pin_at` on. Places count from 1.
        moves: boosts and buries.
    """

    name: str
    queries: frozenset[str] = frozenset()
    contains: tuple[str, ...] = ()
    begins: float = -math.inf
    ends: float = math.inf
    pin: tuple[int, ...] = ()
    pin_at: int = 1
    moves: tuple[Move, ...] = ()

    def applies(self, query: str, now: float) -> bool:
        """Returns whether the rule applies to a normalised query at a time."""
        if not self.begins <= now < self.ends:
            return False
        if not self.queries and not self.contains:
            return True
        return query in self.queries or any(_contains(query, phrase) for phrase in self.contains)


class RuleFile:
    """The rules in a YAML file, which are read again when the file changes.

    Attributes:
        reloads: how often the file was read again, by result: "ok" or "refused".
    """

    def __init__(self, path: Path, catalogue: Catalogue) -> None:
        """Reads the file. Raises UsageError if it cannot be read or is wrong; names the line."""
        self.reloads = {"ok": 0, "refused": 0}
        self._path = path
        self._catalogue = catalogue
        self._seen = self._stamp()
        self._rules = read_rules(path, catalogue)

    def active(self, query: str, now: float) -> tuple[Rule, ...]:
        """Returns the rules that apply to a query at a time (seconds since 1970), in the order of the file."""
        text = normalise(query)
        return tuple(rule for rule in self._rules if rule.applies(text, now))

    def refresh(self) -> None:
        """Reads the file again if it has changed. A file that is wrong changes nothing but the log and `reloads`.

        It may take some milliseconds for thousands of rules, so servers call it in a thread, every second or so.
        """
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._rules = read_rules(self._path, self._catalogue)
        except UsageError as error:
            self.reloads["refused"] += 1
            _log.error("rules: %s; the rules of before stay", error)
        else:
            self.reloads["ok"] += 1
            _log.info("rules: read %d from %s", len(self._rules), self._path)

    def _stamp(self) -> tuple[int, int, int] | None:
        """Returns what tells one content of the file from another one; None if there is no file."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns


def read_rules(path: Path, catalogue: Catalogue) -> tuple[Rule, ...]:
    """Reads a file of rules. Raises UsageError if it cannot be read or is wrong; names file, line and key."""

    def parse(text: str) -> tuple[Rule, ...]:
        tree = load_yaml(text, lines=True)
        if not isinstance(tree, dict):
            raise UsageError(f"holds a {type(tree).__name__}, expected rules as `name:` with keys below it")
        names = Section("", tree, tuple(tree))
        return tuple(_rule(str(name), names.section(name, _RULE_KEYS), catalogue) for name in tree)

    return read_file(path, parse)


def normalise(text: str) -> str:
    """Returns a text as rules compare it: NFKC, case folded, words joined by one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _contains(query: str, phrase: str) -> bool:
    """Returns whether a query has a phrase as whole words. Scripts without spaces have no word boundaries."""
    at = query.find(phrase)
    while at >= 0:
        end = at + len(phrase)
        if not (at and _joined(query[at - 1], phrase[0])) and not (
            end < len(query) and _joined(phrase[-1], query[end])
        ):
            return True
        at = query.find(phrase, at + 1)
    return False


def _joined(left: str, right: str) -> bool:
    """Returns whether two neighbouring characters belong to one word."""
    # U+2E80 begins the blocks of Chinese, Japanese and Korean characters.
    return left.isalnum() and right.isalnum() and left < "\u2e80" and right < "\u2e80"


def _rule(name: str, section: Section, catalogue: Catalogue) -> Rule:
    tree = section.tree
    begins, ends = _time(section, "from", -math.inf), _time(section, "until", math.inf)
    if begins >= ends:
        raise section.error("until", f"got {tree['until']}, expected a time after `from`, which is {tree['from']}")
    moves = [_move(section, key, catalogue) for key in ("boost", "bury") if key in tree]
    if not moves and "pin" not in tree:
        raise section.error("pin", "the rule does nothing; give it at least one of pin, boost and bury")
    if "pin_at" in tree and "pin" not in tree:
        raise section.error("pin_at", f"got {tree['pin_at']!r}, but there is no `pin`; leave it out or give items")
    return Rule(
        name=name,
        queries=frozenset(_texts(section, "queries")),
        contains=_texts(section, "contains"),
        begins=begins,
        ends=ends,
        pin=_items(section, "pin", catalogue),
        pin_at=section.integer("pin_at", 1, 1),
        moves=tuple(moves),
    )


def _move(section: Section, key: str, catalogue: Catalogue) -> Move:
    part = section.section(key, _MOVE_KEYS)
    if not part.tree.get("items") and not part.tree.get("filters"):
        raise section.error(key, f"got {part.tree}, which moves no item; give items, filters or both")
    try:
        filters = catalogue.conditions(read_filters("filters", part.tree.get("filters", {})))
    except ValueError as error:
        raise part.error("filters", str(error)) from None
    places = min(part.integer("places", 10 if key == "boost" else _TO_THE_END, 1), _TO_THE_END)
    return Move(_items(part, "items", catalogue), filters, places if key == "boost" else -places)


def _items(section: Section, name: str, catalogue: Catalogue) -> tuple[int, ...]:
    """Returns the ids of the items in a list. An item that is not in the catalogue is left out, with a warning."""
    given = section.tree.get(name, [])
    if not isinstance(given, list) or not all(isinstance(i, (int, str)) and not isinstance(i, bool) for i in given):
        raise section.error(name, f"got {given!r}, expected a list of item ids")
    rows = find_items(catalogue, given)
    unknown = [item for item, row in zip(given, rows.tolist(), strict=True) if row < 0]
    if unknown:
        # Items leave a shop every day; that must not end the rules for the others.
        _log.warning("rules: %s%s: the index has no item %s", section.key, name, ", ".join(map(str, unknown[:5])))
    return tuple(dict.fromkeys(catalogue.ids[rows[rows >= 0]].tolist()))


def find_items(catalogue: Catalogue, items: Sequence[int | str]) -> NDArray[np.int64]:
    """Returns the rows of items that people name by the shop's own id, int64 [k]; -1 where an item is unknown."""
    if catalogue.has_keys:
        return catalogue.rows_of_keys([str(item) for item in items])
    numbers = [int(item) if re.fullmatch(r"\d{1,19}", str(item)) else -1 for item in items]
    return catalogue.rows(np.array([number if number < 2**63 else -1 for number in numbers], np.int64))


def _texts(section: Section, name: str) -> tuple[str, ...]:
    given = section.tree.get(name, [])
    given = [given] if isinstance(given, (str, int)) and not isinstance(given, bool) else given
    if not isinstance(given, list) or not all(isinstance(text, (str, int)) and normalise(str(text)) for text in given):
        raise section.error(name, f"got {given!r}, expected a list of texts that are not empty")
    if name in section.tree and not given:
        raise section.error(name, "got an empty list; give texts, or leave it out for all queries")
    return tuple(normalise(str(text)) for text in given)


def _time(section: Section, name: str, default: float) -> float:
    """Returns a time in seconds since 1970. A time without a zone is UTC, a date its first second."""
    given = section.tree.get(name)
    if given is None:
        return default
    if isinstance(given, str):
        with contextlib.suppress(ValueError):
            given = datetime.datetime.fromisoformat(re.sub("Z$", "+00:00", given))
    if isinstance(given, datetime.date) and not isinstance(given, datetime.datetime):
        given = datetime.datetime.combine(given, datetime.time())
    if not isinstance(given, datetime.datetime):
        raise section.error(name, f"got {given!r}, expected a date or time such as 2026-11-27T08:00+01:00")
    return (given if given.tzinfo else given.replace(tzinfo=datetime.timezone.utc)).timestamp()
