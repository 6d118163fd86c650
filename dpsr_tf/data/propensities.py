"""How likely users are to look at each position of a list, estimated from the clicks of a log without experiments.

Users click what they look at, and they look at the first positions more often. So clicks alone make a ranker believe
that what was shown first is better. A weight of 1 / propensity for each click corrects this (Joachims et al., WSDM
2017).

Most logs show an item at several positions for the same query, because the shop changes and other items come and go.
Such changes tell positions apart: with query and item the same, clicks differ by the position only (intervention
harvesting, Agarwal et al., WSDM 2019). Agarwal et al. compare two positions at a time, and estimate a relevance for
each pair of positions. Here all positions of a query and item are compared at once. In the position-based click model,
an item that is shown n(k) times at position k is expected to get n(k) * p(k) * relevance clicks there. So a click on it
is at position k with probability n(k) * p(k) / (sum over j of n(j) * p(j)), whatever the relevance. The p that make the
positions of all clicks most likely are those of a Poisson regression with a constant for each query and item.

Deep positions have few clicks. So the logarithm of p, as a function of the logarithm of the position, has a penalty on
its curvature: a power law is free. Cross-validation chooses the weight of the penalty. docs/ranking.md has the errors
of this and of other methods.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dpsr_common.errors import CommandError
from dpsr_tf.data.store import Store

# Weights of the penalty that are tried. The smallest one still bridges positions without data.
_PENALTIES = (1000.0, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
_FOLDS = 4
# Keeps the logarithm finite where clicks say nothing: as much as 0.001 clicks do.
_RIDGE = 1e-3
# Of more cells a part is read. Errors are far below 1 % then.
_MOST_CELLS = 1_000_000
_PAIRS_AT_ONCE = 8192
_ITERATIONS, _TOLERANCE = 50, 1e-5


def propensities(store: Store) -> np.ndarray:
    """Returns the probability that a user looks at each position, relative to position 1.

    Reads the requests for training. A click, cart or order counts as a click.

    Returns:
        float64 [positions], for positions 1, 2, ... up to the deepest one in the log. The first value is 1. A value may
        be above 1: users may look at another position more often than at the first.

    Raises:
        CommandError: the store has no requests, the log says no positions, or no item was clicked that was shown at
            two positions for the same query.
    """
    if store.schema.ranking is None:
        raise CommandError(
            f"{store.path}: holds no requests; add the section `ranking` to the schema and ingest the log again"
        )
    cells, deepest, first = [], 0, 0
    for file in store.requests():
        position = np.asarray(file["shown.position"])
        query = np.repeat(np.asarray(file["request.query"]), np.diff(file["request.splits"]))
        pair = (query.astype(np.int64) << 32) | np.asarray(file["shown.item"])
        deepest = max(deepest, int(position.max(initial=0)))
        cells.append(_Cells.of(pair, position, np.asarray(file["shown.outcome"]) > 0, first))
        first += int(cells[-1].pairs)
    if deepest == 0:
        raise CommandError(
            f"{store.path}: the log does not say at which positions items were shown, and propensities need them; name "
            f"the column with interactions: position, and ingest the log again"
        )
    return _estimate(_Cells.join(cells), deepest, str(store.path))


def estimate(pair: np.ndarray, position: np.ndarray, clicked: np.ndarray) -> np.ndarray:
    """Returns the propensities of a log that is given as arrays, as `propensities` does.

    Args:
        pair: int64 [n], equal for items shown for the same query that are the same item.
        position: int [n], from 1 on; 0 is unknown.
        clicked: bool [n].

    Raises:
        CommandError: no item was clicked that was shown at two positions for the same query.
    """
    return _estimate(_Cells.of(pair, position, clicked, 0), int(position.max(initial=0)), "the log")


class _Cells(NamedTuple):
    """One row for each pair and position; pairs that say nothing are left out."""

    pair: np.ndarray  # int64 [n], ascending, from 0 on
    place: np.ndarray  # int64 [n], position - 1
    shown: np.ndarray  # float64 [n], how often the pair was shown at the position
    clicks: np.ndarray  # float64 [n]
    pairs: int

    @staticmethod
    def of(pair: np.ndarray, position: np.ndarray, clicked: np.ndarray, first: int) -> _Cells:
        """Counts the rows of pairs that were clicked and shown at two positions or more."""
        known = position > 0
        # Most pairs were never clicked. They are dropped before all others are sorted.
        known &= np.isin(pair, np.unique(pair[known & clicked]))
        number = np.unique(pair[known], return_inverse=True)[1].astype(np.int64)
        cell, row = np.unique((number << 8) | (position[known] - 1), return_inverse=True)
        owner = cell >> 8
        several = (np.bincount(owner) > 1)[owner]
        owner = np.unique(owner[several], return_inverse=True)[1]
        clicks = np.bincount(row, clicked[known], len(cell))
        return _Cells(
            owner + first,
            cell[several] & 255,
            np.bincount(row, minlength=len(cell))[several].astype(np.float64),
            clicks[several],
            int(owner.max(initial=-1)) + 1,
        )

    @staticmethod
    def join(parts: list[_Cells]) -> _Cells:
        pair, place, shown, clicks = (np.concatenate([part[column] for part in parts]) for column in range(4))
        return _Cells(pair, place, shown, clicks, sum(part.pairs for part in parts))

    def take(self, rows: np.ndarray) -> _Cells:
        """Returns the cells of some pairs, given as bool [n]."""
        pair = np.unique(self.pair[rows], return_inverse=True)[1]
        return _Cells(pair, self.place[rows], self.shown[rows], self.clicks[rows], int(pair.max(initial=-1)) + 1)


def _estimate(cells: _Cells, positions: int, source: str) -> np.ndarray:
    if not len(cells.pair):
        raise CommandError(
            f"{source}: no item that was clicked was shown at two positions for the same query, so nothing tells how "
            f"likely users are to look at a position; use a longer log, or one whose lists change"
        )
    if len(cells.pair) > _MOST_CELLS:
        cells = cells.take(cells.pair % -(-len(cells.pair) // _MOST_CELLS) == 0)
    penalty = _best_penalty(cells, positions)
    return np.exp(_fit(cells, penalty * _curvature(positions), np.zeros(positions)))


def _best_penalty(cells: _Cells, positions: int) -> float:
    """Returns the penalty with which three quarters of the pairs predict best where the others were clicked."""
    total = np.zeros(len(_PENALTIES))
    for fold in range(_FOLDS):
        rest = cells.pair % _FOLDS == fold
        train, test = cells.take(~rest), cells.take(rest)
        start = np.zeros(positions)
        for number, penalty in enumerate(_PENALTIES):
            start = _fit(train, penalty * _curvature(positions), start)
            total[number] += _log_likelihood(test, start)
    return _PENALTIES[int(total.argmax())]


def _curvature(positions: int) -> np.ndarray:
    """Returns the matrix of the integral of f''(x)^2 over x = log(position), [positions, positions]."""
    x = np.log(np.arange(1, positions + 1))
    slope = np.diff(np.eye(positions), axis=0) / np.diff(x)[:, None]
    bend = np.diff(slope, axis=0) / np.sqrt((x[2:] - x[:-2]) / 2)[:, None]
    return bend.T @ bend


def _fit(cells: _Cells, penalty: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Returns the logarithms of the propensities, [positions], 0 for position 1, by Newton's method."""
    positions = len(start)
    of_pair = np.bincount(cells.pair, cells.clicks, cells.pairs)
    of_place = np.bincount(cells.place, cells.clicks, positions)
    penalty = penalty + _RIDGE * np.eye(positions)
    logs = start
    for _ in range(_ITERATIONS):
        looked = cells.shown * np.exp(logs)[cells.place]
        relevance = of_pair / np.bincount(cells.pair, looked, cells.pairs)
        expected = looked * relevance[cells.pair]
        of_position = np.bincount(cells.place, expected, positions)
        slope = of_place - of_position - penalty @ logs
        curvature = np.diag(of_position) - _products(cells, expected / np.sqrt(of_pair)[cells.pair], positions)
        step = np.linalg.solve(curvature + penalty, slope)
        logs = logs + step / max(1.0, np.abs(step).max())
        if np.abs(step).max() < _TOLERANCE:
            break
    # Only ratios count.
    return logs - logs[0]


def _products(cells: _Cells, values: np.ndarray, positions: int) -> np.ndarray:
    """Returns the sum over pairs of v v^T, [positions, positions], where v are the values of the pair's positions."""
    total = np.zeros((positions, positions))
    for begin in range(0, cells.pairs, _PAIRS_AT_ONCE):
        rows = slice(*np.searchsorted(cells.pair, [begin, begin + _PAIRS_AT_ONCE]))
        matrix = np.zeros((min(_PAIRS_AT_ONCE, cells.pairs - begin), positions))
        matrix[cells.pair[rows] - begin, cells.place[rows]] = values[rows]
        total += matrix.T @ matrix
    return total


def _log_likelihood(cells: _Cells, logs: np.ndarray) -> float:
    """Returns the logarithm of the probability that all clicks are where they are, given the pairs clicked."""
    looked = np.bincount(cells.pair, cells.shown * np.exp(logs)[cells.place], cells.pairs)
    of_pair = np.bincount(cells.pair, cells.clicks, cells.pairs)
    return float(cells.clicks @ logs[cells.place] - of_pair @ np.log(looked))
