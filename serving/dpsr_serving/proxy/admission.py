"""Limits of a model's requests: how many a second, and how many at a time.

Every priority may use a share of a limit: at half of it, for instance, requests of the lowest priority are refused,
while those of the highest still use the whole. So a limit that is reached is felt by the lowest priority first.

A refusal tells the client when to come back, in the trailing metadata that gRPC's clients obey if their retry policy
names RESOURCE_EXHAUSTED (https://github.com/grpc/proposal/blob/master/A6-client-retries.md, "Pushback").
"""

from __future__ import annotations

import dataclasses
import math
import random

from dpsr_serving.proxy.calls import Code, Metadata, Reply
from dpsr_serving.proxy.config import LimitConfig, PrioritiesConfig

PUSHBACK_METADATA = b"grpc-retry-pushback-ms"

_REQUEST_S = 0.1  # how long a request takes, as long as none has ended
_WEIGHT = 0.1  # of a request in the mean time of the last ones


def pushback(seconds: float) -> Metadata:
    """Returns the trailing metadata that asks a client to wait, up to twice as long so that not all return together."""
    return ((PUSHBACK_METADATA, b"%d" % math.ceil(1000 * seconds * random.uniform(1, 2))),)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a request is not taken.

    Attributes:
        limit: the limit that it meets, "requests_per_s" or "in_flight".
        words: the limit in words.
        wait_s: seconds after which the request may succeed.
    """

    limit: str
    words: str
    wait_s: float

    def reply(self, model: str, priority: str) -> Reply:
        """Returns the answer to the request."""
        whose = f"requests of priority {priority!r}" if priority else "requests"
        words = f"model {model!r}: {whose} are at their limit, {self.words}; try again later"
        return Reply(Code.RESOURCE_EXHAUSTED, words, trailing=pushback(self.wait_s))


class Gate:
    """Counts the requests of a model against its limit. Times are those of time.monotonic().

    The rate is kept by a token bucket: a request takes a token, and `requests_per_s` tokens come back each second, up
    to `burst`. A priority with the share s leaves (1 - s) of the bucket to those above it.
    """

    def __init__(self, limit: LimitConfig, shares: dict[str, float], workers: int, now: float) -> None:
        """`shares`: priority -> share of the limits. `workers`: processes that divide the limits among themselves."""
        self.in_flight = 0
        self._request_s = _REQUEST_S
        self._then = now
        self._tokens = math.inf
        self.set_limit(limit, shares, workers)

    def set_limit(self, limit: LimitConfig, shares: dict[str, float], workers: int) -> None:
        """Changes the limits; requests in flight still count."""
        self._limit, self._shares, self._workers = limit, shares, workers
        self._rate = None if limit.requests_per_s is None else limit.requests_per_s / workers
        self._burst = max(limit.burst / workers, 1.0)
        self._most = None if limit.in_flight is None else limit.in_flight / workers
        self._tokens = min(self._tokens, self._burst)

    def enter(self, priority: str, now: float) -> Refusal | None:
        """Takes a request, which must leave() later, and returns None; or refuses it."""
        share = self._shares.get(priority, 1.0)
        if self._most is not None and self.in_flight >= max(share * self._most, 1.0):
            allowed = max(math.ceil(share * self._most), 1)
            words = f"{allowed} in flight" + (" in each worker of the proxy" if self._workers > 1 else "")
            return Refusal("in_flight", words, self._request_s)
        if self._rate is not None:
            self._tokens = min(self._tokens + (now - self._then) * self._rate, self._burst)
            self._then = now
            needed = 1 + (1 - share) * (self._burst - 1)
            if self._tokens < needed:
                words = f"{self._limit.requests_per_s:g} per second"
                return Refusal("requests_per_s", words, (needed - self._tokens) / self._rate)
            self._tokens -= 1
        self.in_flight += 1
        return None

    def leave(self, seconds: float) -> None:
        """Ends a request that was taken and took `seconds`."""
        self.in_flight -= 1
        self._request_s += _WEIGHT * (seconds - self._request_s)


def priority_of(config: PrioritiesConfig | None, metadata: Metadata) -> str:
    """Returns a request's priority: that of its metadata if it is a known one, else the default; "" if none exist."""
    if config is None:
        return ""
    key = config.key.encode()
    for name, value in metadata:
        if name == key:
            given = value.decode("latin-1")
            if given in config.shares:
                return given
    return config.default
