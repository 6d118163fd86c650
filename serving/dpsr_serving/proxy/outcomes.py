"""What came of the calls to a server over the last seconds, and which server does worse than its peers.

A server may answer health checks and still be of no use: it hangs when it is asked to predict, fails every second call,
or takes ten times as long as the others (a gray failure). Such a server shows only in comparison with its peers: if all
of them fail, it is the requests.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence

# Latencies are counted in buckets from 0.1 ms to 1,000 s, whose bounds grow by 10 %.
_SMALLEST_S, _GROWTH, _BUCKETS = 1e-4, math.log(1.1), 170

_CALLS = 5  # fewest calls of a server, and of its peers, that say something
_FAILED = 0.5  # share of failed calls from which a server does badly, if its peers have less than half of its share
_SLOW = 10.0  # how many times the peers' latency is too slow,
_SLOW_S = 0.1  # from this latency on
_SILENT = 20.0  # a server with calls under way is silent after so many times the peers' 95th percentile,
_SILENT_S = 0.5  # but not before this time
_SILENT_CALLS = 2  # and only if so many calls are under way: one may simply take long


class Outcomes:
    """Calls that ended in the last `span_s` seconds, to within half of it. Times are those of time.monotonic()."""

    def __init__(self, span_s: float) -> None:
        self._half_s = span_s / 2
        self._ends = 0.0
        self._now, self._before = _Half(), _Half()

    def add(self, now: float, seconds: float, ok: bool) -> None:
        """Counts a call that took `seconds`."""
        self._turn(now)
        half = self._now
        half.calls += 1
        if not ok:
            half.failed += 1
            return
        bucket = int(math.log(max(seconds, _SMALLEST_S) / _SMALLEST_S) / _GROWTH)
        half.buckets[min(bucket, _BUCKETS - 1)] += 1

    def calls(self, now: float) -> int:
        """Returns the number of calls."""
        self._turn(now)
        return self._now.calls + self._before.calls

    def failed(self, now: float) -> int:
        """Returns the number of failed calls."""
        self._turn(now)
        return self._now.failed + self._before.failed

    def quantile(self, now: float, share: float) -> float | None:
        """Returns a latency in seconds that `share` of the good calls did not exceed; None without good calls."""
        return quantile([self], now, share)

    def counts(self, now: float) -> list[int]:
        """Returns the number of good calls by bucket of latency."""
        self._turn(now)
        return [sum(pair) for pair in zip(self._now.buckets, self._before.buckets, strict=True)]

    def _turn(self, now: float) -> None:
        if now < self._ends:
            return
        self._before = self._now if now < self._ends + self._half_s else _Half()
        self._now, self._ends = _Half(), now + self._half_s


class _Half:
    def __init__(self) -> None:
        self.calls = self.failed = 0
        self.buckets = [0] * _BUCKETS


def quantile(outcomes: Sequence[Outcomes], now: float, share: float) -> float | None:
    """Returns the latency in seconds that `share` of the good calls to several servers did not exceed, or None."""
    counts = [sum(column) for column in zip(*(one.counts(now) for one in outcomes), strict=True)]
    wanted = share * sum(counts)
    if not wanted:
        return None
    bucket = bisect.bisect_left(list(itertools.accumulate(counts)), wanted)
    return _SMALLEST_S * math.exp(_GROWTH * (bucket + 1))


def does_badly(one: Outcomes, peers: Sequence[Outcomes], now: float) -> bool:
    """Returns whether the calls to a server fail, or take long, while those to its peers do not."""
    calls, peers_calls = one.calls(now), sum(peer.calls(now) for peer in peers)
    if calls < _CALLS or peers_calls < _CALLS:
        return False
    share, peers_share = one.failed(now) / calls, sum(peer.failed(now) for peer in peers) / peers_calls
    if share >= _FAILED and peers_share < share / 2:
        return True
    if calls - one.failed(now) < _CALLS:
        return False
    median, peers_median = one.quantile(now, 0.5), quantile(peers, now, 0.5)
    return median is not None and peers_median is not None and median > max(_SLOW_S, _SLOW * peers_median)


def is_silent(calls: int, quiet_s: float, peers: Sequence[Outcomes], now: float) -> bool:
    """Returns whether a server hangs.

    Args:
        calls: number of its calls under way.
        quiet_s: seconds since it ended a call, or since the oldest call under way began if that is later.
        peers: outcomes of the others.
    """
    if calls < _SILENT_CALLS or quiet_s < _SILENT_S:
        return False
    usual = quantile(peers, now, 0.95)
    return usual is not None and sum(peer.calls(now) for peer in peers) >= _CALLS and quiet_s > _SILENT * usual
