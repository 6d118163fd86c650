"""What people say about the generated shop: judged queries that are not in its log, graded pairs, later purchases."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from dpsr_tf.shop.log import Log
from dpsr_tf.shop.sampling import draw, random_stream
from dpsr_tf.shop.world import ALL_SYNONYMS, SOME_SYNONYMS, World

FOLDS = ("log", "dev", "test")
# The shares of the judged queries' kinds.
KINDS = {"plain": 0.35, "gap": 0.2, "partial": 0.15, "typo": 0.15, "polysemous": 0.15}
_NOT_RELEVANT = 5  # items of grade 0 listed for a query, at most
_FEWEST_CHOICES = 10  # a purchase says something about its user only where there was a choice
_CLICKS_BEFORE = 3


@dataclasses.dataclass(frozen=True)
class Judgment:
    """A judged query."""

    query: str
    kind: str
    relevant: np.ndarray  # rows of items, ascending
    not_relevant: np.ndarray  # rows of items that share words or category with them, ascending


def kinds(world: World) -> np.ndarray:
    """The kind of each text, object [texts].

    gap where all its parts are synonyms, partial where some are, polysemous where none is and it means several things.
    """
    gap, partial = (world.text_gap == level for level in (ALL_SYNONYMS, SOME_SYNONYMS))
    return np.select([gap, partial, world.polysemous], ["gap", "partial", "polysemous"], "plain")


def judged(world: World, fold: int) -> Iterator[Judgment]:
    """Queries of meanings that the log never asks for, in random order."""
    parameters, rng = world.parameters, random_stream(world.parameters, "judged", fold)
    texts = rng.permutation(np.flatnonzero(world.text_fold == fold))
    kind_of, language_of = kinds(world)[texts], world.text_language[texts]
    chosen: list[tuple[str, str, int]] = []
    for language, share in enumerate((1 - parameters.chinese_share, parameters.chinese_share)):
        for kind, part in KINDS.items():
            wanted = max(1, round(parameters.judged_queries * part * share))
            mine = texts[(kind_of == ("plain" if kind == "typo" else kind)) & (language_of == language)]
            if kind == "typo":
                # From the end, where the plain queries are not judged themselves (unless the shop is small).
                mine = mine[::-1][(world.misspelt_splits[mine + 1] > world.misspelt_splits[mine])[::-1]]
            for text in mine[:wanted].tolist():
                shown = world.misspelt[world.misspelt_splits[text]] if kind == "typo" else world.texts[text]
                chosen.append((shown, kind, text))
    for row in rng.permutation(len(chosen)):
        query, kind, text = chosen[row]
        relevant = world.answer_rows(int(world.text_answer[text]))
        if len(relevant) > parameters.max_judged_items:
            relevant = np.sort(rng.choice(relevant, parameters.max_judged_items, replace=False))
        beside = _beside(world, np.full(4 * _NOT_RELEVANT, text), rng)
        wrong = np.unique(beside[grades(world, np.full(len(beside), text), beside) <= 1])
        wrong = np.sort(rng.permutation(wrong)[:_NOT_RELEVANT])
        yield Judgment(query, kind, relevant, wrong)


def grades(world: World, text: np.ndarray, item: np.ndarray) -> np.ndarray:
    """How well an item answers a text, int64 [n].

    3: it is what one of the meanings asks for. 2: the right type, but a brand or word is another. 1: the right type,
    but two are, or an accessory of the type. 0: something else.
    """
    best = np.zeros(len(text), np.int64)
    types = len(world.catalogue.types)
    fits = np.zeros((types + 1, types), bool)  # the last row is that of meanings without a type
    for code in range(types):
        fits[code, world.catalogue.accessories(code)] = True
    senses = [world.senses[row] for row in text.tolist()]
    for number in range(max(map(len, senses))):
        rows = np.flatnonzero([len(mine) > number for mine in senses])
        meaning = np.array([senses[row][number] for row in rows])
        of, mine = world.meaning[meaning], item[rows]
        missed = world.missed(meaning, mine)
        missed[(of[:, 1] < 0) & (of[:, 2] != world.items.brand[mine])] = 9  # "velora" says no more than the brand
        grade = np.where(missed == 9, fits[of[:, 1], world.items.type[mine]], np.maximum(3 - missed, 1))
        best[rows] = np.maximum(best[rows], grade)
    return best


def labels(world: World) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of the log's texts and items with the grade that somebody gave and the true one; int64 [pairs] each."""
    parameters, rng = world.parameters, random_stream(world.parameters, "labels")
    _, pair = world.sessions(parameters.labelled_pairs * 2, rng)
    text = world.pair_text[pair]
    answer = world.text_answer[text]
    right = world.answer_items[
        draw(world.answer_sums, world.answer_splits[answer], world.answer_splits[answer + 1], rng)
    ]
    item = np.where(rng.random(len(text)) < 0.4, right, _beside(world, text, rng))
    unique = np.sort(np.unique(text * len(world.items) + item, return_index=True)[1])[: parameters.labelled_pairs]
    text, item = text[unique], item[unique]
    true = grades(world, text, item)
    off = rng.random(len(true)) < parameters.label_noise
    step = np.where(true == 0, 1, np.where(true == 3, -1, rng.choice([-1, 1], len(true))))
    return text, item, np.where(off, true + step, true), true


def _beside(world: World, text: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An item for each text that shares words or category with what is meant, and now and then is right."""
    meaning = np.array([world.senses[row][0] for row in text.tolist()])
    misleading = world.misleading_answer[world.meaning[meaning, 1]]
    same_type = world.item_meanings[world.answer_items[world.answer_splits[meaning]], 0]  # the bare type's meaning
    category = world.category_answer[world.meaning[meaning, 0]]
    kind = rng.integers(0, 3, len(text))
    use_misleading = (kind == 0) & (misleading >= 0) & (world.meaning[meaning, 1] >= 0)
    answer = np.where(use_misleading, misleading, np.where(kind == 1, same_type, category))
    # Any of them, popular or not.
    begin, end = world.answer_splits[answer], world.answer_splits[answer + 1]
    return world.answer_items[begin + (rng.random(len(text)) * (end - begin)).astype(np.int64)]


@dataclasses.dataclass(frozen=True)
class Purchases:
    """What users bought after the log's end; arrays of one length."""

    text: np.ndarray
    user: np.ndarray
    item: np.ndarray
    time: np.ndarray  # int64, within a day of the log's end, ascending


def purchases(world: World, log: Log) -> Purchases:
    """Each by a user with a history: of all items in stock that are meant, one by popularity and appeal."""
    parameters, rng = world.parameters, random_stream(world.parameters, "purchases")
    user, pair = world.sessions(parameters.personal_judgments * 20, rng)
    meaning = world.pair_meaning[pair]
    # Those with a history and a choice first; all others where the shop has too few of them.
    size = world.answer_splits[meaning + 1] - world.answer_splits[meaning]
    good = (log.user_clicks[user] >= _CLICKS_BEFORE) & (size >= _FEWEST_CHOICES)
    best = np.argsort(~good, kind="stable")[: parameters.personal_judgments]
    user, pair, meaning = user[best], pair[best], meaning[best]
    item = np.full(len(user), -1)
    for row in range(len(user)):
        choices = world.answer_rows(int(meaning[row]))
        choices = choices[world.items.in_stock[choices]]
        if len(choices):
            appeal = np.log(world.items.popularity[choices]) + world.appeal(user[row], choices)
            item[row] = choices[np.argmax(appeal + rng.gumbel(size=len(choices)))]
    there = item >= 0
    time = log.end + np.sort(rng.integers(0, 86_400, int(there.sum())))
    return Purchases(world.pair_text[pair[there]], user[there], item[there], time)
