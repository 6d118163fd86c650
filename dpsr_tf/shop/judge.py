"""Human judgments about the generated shop: judged queries that are not in its log, graded pairs, later purchases."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from dpsr_tf.shop.log import Log
from dpsr_tf.shop.sampling import draw, random_stream
from dpsr_tf.shop.world import ALL_SYNONYMS, NOT_AN_ANSWER, SOME_SYNONYMS, World

FOLDS = ("log", "dev", "test")
# The share of each kind among the judged queries.
KINDS = {"plain": 0.35, "gap": 0.2, "partial": 0.15, "typo": 0.15, "polysemous": 0.15}
# Largest number of items with grade 0 listed for a query.
_NOT_RELEVANT = 5
# A purchase says something about its user only if there was a choice, and if the user's taste shows in the log.
_FEWEST_CHOICES = 10
_CLICKS_BEFORE = 3


@dataclasses.dataclass(frozen=True)
class Judgment:
    """A judged query."""

    query: str
    kind: str
    relevant: np.ndarray  # rows of relevant items, ascending
    not_relevant: np.ndarray  # rows of items that share words or category with relevant ones, ascending


def kinds(world: World) -> np.ndarray:
    """Returns the kind of each text, object [texts].

    A text is "gap" if all its parts are synonyms, "partial" if some are, "polysemous" if none is and it has several
    meanings, and "plain" otherwise.
    """
    gap, partial = (world.text_gap == level for level in (ALL_SYNONYMS, SOME_SYNONYMS))
    return np.select([gap, partial, world.polysemous], ["gap", "partial", "polysemous"], "plain")


def judged(world: World, fold: int) -> Iterator[Judgment]:
    """Yields judged queries in random order. Their meanings belong to `fold`, so the log never asks for them."""
    parameters, rng = world.parameters, random_stream(world.parameters, "judged", fold)
    texts = rng.permutation(np.flatnonzero(world.text_fold == fold))
    kind_of, language_of = kinds(world)[texts], world.text_language[texts]
    chosen: list[tuple[str, str, int]] = []
    for language, share in enumerate((1 - parameters.chinese_share, parameters.chinese_share)):
        for kind, part in KINDS.items():
            wanted = max(1, round(parameters.judged_queries * part * share))
            mine = texts[(kind_of == ("plain" if kind == "typo" else kind)) & (language_of == language)]
            if kind == "typo":
                # Typos are made from the last plain queries. Only in a small shop are these judged themselves, too.
                mine = mine[::-1][(world.misspelt_splits[mine + 1] > world.misspelt_splits[mine])[::-1]]
            for text in mine[:wanted].tolist():
                shown = world.misspelt[world.misspelt_splits[text]] if kind == "typo" else world.texts[text]
                chosen.append((shown, kind, text))
    for row in rng.permutation(len(chosen)):
        query, kind, text = chosen[row]
        relevant = world.answer_rows(int(world.text_answer[text]))
        if len(relevant) > parameters.max_judged_items:
            relevant = np.sort(rng.choice(relevant, parameters.max_judged_items, replace=False))
        similar = _similar_items(world, np.full(4 * _NOT_RELEVANT, text), rng)
        wrong = np.unique(similar[grades(world, np.full(len(similar), text), similar) <= 1])
        wrong = np.sort(rng.permutation(wrong)[:_NOT_RELEVANT])
        yield Judgment(query, kind, relevant, wrong)


def grades(world: World, text: np.ndarray, item: np.ndarray) -> np.ndarray:
    """Grades how well items answer texts.

    Args:
        world: the world.
        text: rows of texts, int64 [n].
        item: rows of items, int64 [n].

    Returns:
        Grades, int64 [n]. 3: one of the text's meanings asks for the item. 2: the type is right, but the brand or a
        word differs. 1: the type is right, but several of these differ, or the item is an accessory of the type. 0: all
        other items.
    """
    best = np.zeros(len(text), np.int64)
    fits = world.catalogue.fits
    senses = [world.senses[row] for row in text.tolist()]
    for number in range(max(map(len, senses))):
        rows = np.flatnonzero([len(meanings) > number for meanings in senses])
        meaning = np.array([senses[row][number] for row in rows])
        wanted, shown = world.meaning[meaning], item[rows]
        missed = world.missed(meaning, shown)
        # A meaning such as "velora" consists of the brand only: an item of another brand has nothing of it.
        missed[(wanted[:, 1] < 0) & (wanted[:, 2] != world.items.brand[shown])] = NOT_AN_ANSWER
        grade = np.where(
            missed == NOT_AN_ANSWER, fits[wanted[:, 1], world.items.type[shown]], np.maximum(3 - missed, 1)
        )
        best[rows] = np.maximum(best[rows], grade)
    return best


def labels(world: World) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns pairs of texts and items with grades: text, item, human grade and true grade, int64 [pairs] each."""
    parameters, rng = world.parameters, random_stream(world.parameters, "labels")
    _, pair = world.sessions(parameters.labelled_pairs * 2, rng)
    text = world.pair_text[pair]
    answer = world.text_answer[text]
    right = world.answer_items[
        draw(world.answer_sums, world.answer_splits[answer], world.answer_splits[answer + 1], rng)
    ]
    item = np.where(rng.random(len(text)) < 0.4, right, _similar_items(world, text, rng))
    unique = np.sort(np.unique(text * len(world.items) + item, return_index=True)[1])[: parameters.labelled_pairs]
    text, item = text[unique], item[unique]
    true = grades(world, text, item)
    is_wrong = rng.random(len(true)) < parameters.label_noise
    step = np.where(true == 0, 1, np.where(true == 3, -1, rng.choice([-1, 1], len(true))))
    return text, item, np.where(is_wrong, true + step, true), true


def _similar_items(world: World, text: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws for each text an item that shares words or category with the meaning. Some of them do answer the text."""
    meaning = np.array([world.senses[row][0] for row in text.tolist()])
    misleading = world.misleading_answer[world.meaning[meaning, 1]]
    # An item's first meaning is its type alone.
    same_type = world.item_meanings[world.answer_items[world.answer_splits[meaning]], 0]
    category = world.category_answer[world.meaning[meaning, 0]]
    kind = rng.integers(0, 3, len(text))
    use_misleading = (kind == 0) & (misleading >= 0) & (world.meaning[meaning, 1] >= 0)
    answer = np.where(use_misleading, misleading, np.where(kind == 1, same_type, category))
    # All items of the answer are equally likely, whatever their popularity.
    begin, end = world.answer_splits[answer], world.answer_splits[answer + 1]
    return world.answer_items[begin + (rng.random(len(text)) * (end - begin)).astype(np.int64)]


@dataclasses.dataclass(frozen=True)
class Purchases:
    """Purchases after the end of the log; arrays of one length."""

    text: np.ndarray  # int64, rows of texts
    user: np.ndarray  # int64, rows of users
    item: np.ndarray  # int64, rows of items
    time: np.ndarray  # int64, seconds since 1970, within a day of the log's end, ascending


def purchases(world: World, log: Log) -> Purchases:
    """Draws purchases by users with a history: of all items in stock that a text means, one by its appeal."""
    parameters, rng = world.parameters, random_stream(world.parameters, "purchases")
    user, pair = world.sessions(parameters.personal_judgments * 20, rng)
    meaning = world.pair_meaning[pair]
    # Users with a history who have a choice come first. A small shop has too few of them, and takes others, too.
    size = world.answer_splits[meaning + 1] - world.answer_splits[meaning]
    good = (log.user_clicks[user] >= _CLICKS_BEFORE) & (size >= _FEWEST_CHOICES)
    first = np.argsort(~good, kind="stable")[: parameters.personal_judgments]
    user, pair, meaning = user[first], pair[first], meaning[first]
    item = np.full(len(user), -1)
    for row in range(len(user)):
        choices = world.answer_rows(int(meaning[row]))
        choices = choices[world.items.in_stock[choices]]
        if len(choices):
            appeal = np.log(world.items.popularity[choices]) + world.appeal(user[row], choices)
            item[row] = choices[np.argmax(appeal + rng.gumbel(size=len(choices)))]
    bought = item >= 0
    time = log.end + np.sort(rng.integers(0, 86_400, int(bought.sum())))
    return Purchases(world.pair_text[pair[bought]], user[bought], item[bought], time)
