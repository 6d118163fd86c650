"""Numeric features as numbers, beside their buckets, and how they are scaled."""

from __future__ import annotations

import dataclasses

import numpy as np

# The knots of a feature lie at these shares of the shown items.
_KNOTS = np.arange(1, 16) / 16


@dataclasses.dataclass(frozen=True)
class NumericFeature:
    """What the manifest says about a numeric feature. Values are weighted as NumericFeature.of says.

    Attributes:
        table: "items" or "users".
        name: the feature's key in the schema.
        missing: share of the weight without a value, 0 to 1.
        mean: mean of the values; None if all of them are missing.
        std: standard deviation of the values; 0 if all of them are the same.
        knots: distinct quantiles of the values at 1/16, 2/16, ... 15/16, ascending.
    """

    table: str
    name: str
    missing: float
    mean: float | None
    std: float | None
    knots: tuple[float, ...]

    @staticmethod
    def of(table: str, name: str, values: np.ndarray, weights: np.ndarray) -> NumericFeature:
        """Fits the scales of a feature.

        Args:
            table: "items" or "users".
            name: the feature.
            values: float32 [rows], NaN where there is none.
            weights: int64 [rows]: how often each row occurs among the items shown in requests for training, or among
                the users of these requests.
        """
        used = np.flatnonzero((weights > 0) & ~np.isnan(values))
        total = int(weights.sum())
        missing = 1 - int(weights[used].sum()) / total if total else 1.0
        if len(used) == 0:
            return NumericFeature(table, name, missing, None, None, ())
        order = used[np.argsort(values[used], kind="stable")]
        number, weight = values[order].astype(np.float64), weights[order]
        mean = float(np.average(number, weights=weight))
        deviation = float(np.sqrt(np.average((number - mean) ** 2, weights=weight)))
        # The mean of equal numbers may differ from them by a rounding error.
        std = 0.0 if number[0] == number[-1] else deviation
        sums = np.cumsum(weight)
        knots = number[np.searchsorted(sums, _KNOTS * sums[-1])]
        return NumericFeature(table, name, missing, mean, std, tuple(np.unique(knots).tolist()))

    @property
    def problem(self) -> str | None:
        """Says why the feature tells nothing; None if it tells something."""
        if self.mean is None:
            return "has no value"
        return f"is always {self.mean:g}" if self.std == 0 else None
