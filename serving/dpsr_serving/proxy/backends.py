"""The model servers behind the proxy: their health, the models that they hold, and the choice among replicas.

A server counts as up until something shows that it is down: a lost connection at once, several failed checks or
UNAVAILABLE answers in a row, or calls that fail or hang while those to its replicas do not (outcomes.py). The proxy
then gives up its calls under way and makes them on another server. Only a successful check brings the server up again,
and its share of the requests then grows gradually. A server that was taken out for its calls is checked with a call
like those of clients.
"""

from __future__ import annotations

import asyncio
import functools
import random
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

from google.protobuf.message import DecodeError

from dpsr_common import serving_apis
from dpsr_serving.proxy import tracing
from dpsr_serving.proxy.admission import pushback
from dpsr_serving.proxy.calls import FAILED, Channel, Code, Connection, Metadata, Reply, Tls, client_tls
from dpsr_serving.proxy.config import HealthConfig, HedgeConfig, LimitsConfig, PoolConfig, RetryConfig, TlsConfig
from dpsr_serving.proxy.metrics import Metrics
from dpsr_serving.proxy.outcomes import Outcomes, does_badly, is_silent, quantile
from dpsr_serving.proxy.routing import Spec, least_outstanding

# Metadata that marks the proxy's own calls in the logs of the servers.
CHECK_METADATA = ((b"dpsr-proxy", b"check"),)
_ANSWERS_IN_A_ROW = 5  # UNAVAILABLE answers in a row after which a reachable server counts as down
_DISCOVER_EVERY_CHECKS = 3
_ABSENT_LIMIT = 4096
_RETIRE_S = 60.0  # time that the calls of a removed server have to end
_OUTCOMES_S = 10.0  # time over which servers are compared
_JUDGE_S = 0.25  # time between two comparisons
_SAMPLE_BYTES = 1 << 16  # the largest request that a server is checked with
_GIVEN_UP_S = 0.1  # a call that a client gives up after this time counts as failed
_HEDGE_S = 60.0  # time over which latencies tell when to ask a second server
_HEDGE_RESERVE = 10  # second calls that may be made beyond the budget
_WAIT_S = 0.1  # when to come back to busy servers, as long as none has answered
_DEADLY = 1  # servers that may be lost with a request before it is no longer made again

_NO_LIFE = (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.CANCELLED)
# Answers that may be the server's own fault. If they are that of the request, other servers give them, too.
_FAILED = (*_NO_LIFE, Code.INTERNAL, Code.UNKNOWN, Code.DATA_LOSS)


class Backend:
    """A connection to one model server, shared by all pools that contain it.

    Attributes:
        address: "host:port" or "unix:/path".
        outstanding: number of calls under way.
        up: whether it takes requests.
        checked: whether it has been checked at least once.
        holds: model -> its AVAILABLE versions, for those models of `asked` that the server knows.
        asked: models whose status the proxy asked for since the server last came up.
        outcomes: what came of its last calls.
        ejected: whether it is down because of its calls.
    """

    def __init__(
        self,
        address: str,
        metrics: Metrics,
        tls: Tls | None,
        server_name: str,
        limits: LimitsConfig,
        on_down: Callable[[], None],
    ) -> None:
        """`on_down` is called whenever the server is taken out of service."""
        self.address = address
        self._on_down = on_down
        self.outstanding = 0
        self.up = True
        self.checked = False
        self.holds: dict[str, frozenset[int]] = {}
        self.asked: set[str] = set()
        self._metrics = metrics
        self._returned = 0.0
        self._return_s = 0.0
        self._failures = 0
        self._unavailable = 0
        self.outcomes = Outcomes(_OUTCOMES_S)
        self.ejected = False
        self._stays_out = 0.0
        self._sample: tuple[str, bytes] | None = None
        self._begun: dict[object, float] = {}  # calls under way -> their start, the oldest first
        self._ended = 0.0  # when a call was last answered
        self._watching: asyncio.Task[None] | None = None
        self._channel = Channel(address, tls, server_name, limits)

    async def call(self, path: str, request: bytes, timeout_s: float | None, metadata: Metadata) -> Reply:
        """Makes one call with serialized messages. UNAVAILABLE also means that the server went down meanwhile."""
        key = object()
        self.add_call(key)
        try:
            span = tracing.current.get()
            if span is None:
                reply = await self._channel.call(path, request, timeout_s, metadata)
            else:
                make = functools.partial(self._channel.call, path, request, timeout_s)
                reply = await span.attempt(self.address, metadata, make)
        except BaseException:
            self.forget_call(key)
            raise
        self.end_call(key, reply)
        return reply

    def ready(self) -> Connection | None:
        """Returns the connection to the server if it takes a call at once."""
        return self._channel.ready()

    def add_call(self, key: object) -> None:
        """Counts a call. Each one needs a key of its own."""
        self.outstanding += 1
        self._begun[key] = time.monotonic()

    def forget_call(self, key: object) -> None:
        """Ends a call that was given up."""
        self.outstanding -= 1
        begin, now = self._begun.pop(key), time.monotonic()
        if now - begin > _GIVEN_UP_S:
            self.outcomes.add(now, now - begin, False)

    def end_call(self, key: object, reply: Reply) -> None:
        """Ends a call, and learns from its answer."""
        self.outstanding -= 1
        begin, now = self._begun.pop(key), time.monotonic()
        if reply.code is Code.OK:
            self.outcomes.add(now, now - begin, True)
            self._ended = now
            self._failures = self._unavailable = 0
            return
        self.outcomes.add(now, now - begin, reply.code not in _FAILED)
        if reply.code is not Code.DEADLINE_EXCEEDED:
            self._ended = now
        if reply.code not in _NO_LIFE:
            # The server answers, so failed checks only mean that it is slow.
            self._failures = 0
        if reply.code is not Code.UNAVAILABLE:
            self._unavailable = 0
        elif reply.lost:
            self.put_down()
        else:
            self._unavailable += 1
            if self._unavailable >= _ANSWERS_IN_A_ROW:
                self.put_down()

    def put_down(self) -> None:
        """Takes the server out of service until a check succeeds, and gives up its calls, which hang or are lost."""
        if not self.up:
            return
        self.up = False
        self._metrics.count("dpsr_proxy_ejections_total", (self.address,))
        self._channel.drop()
        self._on_down()

    def quiet_s(self, now: float) -> float:
        """Returns for how long the server has had calls under way without ending one; 0 without calls."""
        return now - max(self._ended, next(iter(self._begun.values()))) if self._begun else 0.0

    def eject(self, sample: tuple[str, bytes] | None, eject_s: float) -> None:
        """Takes the server out for its calls, for at least `eject_s` seconds, until a call like `sample` succeeds.

        `sample`: method and request of a call that another server answered.
        """
        self.ejected, self._sample, self._stays_out = True, sample, time.monotonic() + eject_s
        self.put_down()
        self.outcomes = Outcomes(_OUTCOMES_S)

    def bring_up(self, return_s: float) -> None:
        """Puts the server back into service; its share of requests grows to the full one over `return_s` seconds."""
        self.up = True
        self.ejected = False
        self._failures = self._unavailable = 0
        self._returned, self._return_s = time.monotonic(), return_s
        self.asked.clear()

    def takes(self, draw: float) -> bool:
        """Returns whether a server that is coming back takes a request, which drew a random number from [0, 1)."""
        if not self._return_s:
            return True
        share = (time.monotonic() - self._returned) / self._return_s
        if share >= 1:
            self._return_s = 0.0
        return draw < max(share, 0.05)

    def set_limits(self, limits: LimitsConfig) -> None:
        """Changes the limits of connections that are made from now on."""
        self._channel.set_limits(limits)

    def watch(self, health: HealthConfig) -> None:
        """Starts the health checks, or restarts them with another configuration."""
        self._unwatch()
        self._watching = asyncio.create_task(self._watch(health))

    async def _watch(self, health: HealthConfig) -> None:
        turn = 0
        # A call that ends in the turn in which the task is cancelled may hide that from it.
        while self._watching is asyncio.current_task():
            await self.check(health)
            if self.up and turn % _DISCOVER_EVERY_CHECKS == 0:
                for model in list(self.holds):
                    await self.ask(model, health.timeout_s)
            turn += 1
            # A server that may hang is checked again at once.
            if not (self.up and self._failures):
                await asyncio.sleep(health.every_s)

    async def check(self, health: HealthConfig) -> None:
        """Sends the server a GetModelStatus that names no model: any answer, also an error, shows that it lives.

        A server that was taken out for its calls gets such a call as well, because it may have answered checks all the
        time.
        """
        if self.ejected:
            if time.monotonic() < self._stays_out:
                return
            if self._sample is not None:
                reply = await self._channel.call(*self._sample, health.timeout_s, CHECK_METADATA)
                if reply.code in _FAILED:
                    return
        reply = await self._own_call(b"", health.timeout_s)
        self.checked = True
        if reply.code not in _NO_LIFE:
            self._failures = 0
            if not self.up:
                self.bring_up(health.return_s)
            return
        self._failures += 1
        if reply.lost or self._failures >= health.failures:
            self.put_down()

    async def ask(self, model: str, timeout_s: float) -> None:
        """Asks the server which versions of the model it holds."""
        request = serving_apis.GetModelStatusRequest()
        request.model_spec.name = model
        reply = await self._own_call(request.SerializeToString(), timeout_s)
        if reply.code is Code.OK:
            try:
                statuses = serving_apis.GetModelStatusResponse.FromString(reply.body).model_version_status
            except DecodeError:
                statuses = ()  # an error message that is not UTF-8, for instance; health checks must go on
            available = serving_apis.ModelVersionStatus.State.Value("AVAILABLE")
            self.holds[model] = frozenset(status.version for status in statuses if status.state == available)
        elif reply.code not in _NO_LIFE:
            self.holds.pop(model, None)
        else:
            return
        if len(self.asked) > _ABSENT_LIMIT:
            self.asked.clear()
        self.asked.add(model)

    async def _own_call(self, request: bytes, timeout_s: float) -> Reply:
        return await self._channel.call(serving_apis.GET_MODEL_STATUS, request, timeout_s, CHECK_METADATA)

    def _unwatch(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None

    def close(self) -> None:
        """Stops the checks and closes the connection; calls under way fail."""
        self._unwatch()
        self._channel.drop()

    async def retire(self) -> None:
        """Closes the connection once the calls under way have ended, after a minute in any case: some may hang."""
        self._unwatch()
        ends = time.monotonic() + _RETIRE_S
        while self.outstanding and time.monotonic() < ends:
            await asyncio.sleep(0.1)
        self._channel.drop()


class RetryBudget:
    """Limits retries to a share of the requests, so that retries do not multiply the load of overloaded servers."""

    def __init__(self, config: RetryConfig) -> None:
        self._per_request = config.budget
        self._most = self._tokens = float(config.reserve)

    def request(self) -> None:
        """Counts a request, which adds a fraction of a retry to the budget."""
        if self._tokens < self._most:
            self._tokens = min(self._most, self._tokens + self._per_request)

    def retry(self) -> bool:
        """Takes one retry from the budget; False if none is left."""
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Replicas:
    """Servers that hold the same models; each request needs an answer from one of them.

    Attributes:
        addresses: where they are, as the configuration says it; some may be names.
        backends: the servers. The owner replaces the list when the addresses of a name change.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        backends: Sequence[Backend],
        discover: bool,
        max_outstanding: int,
        retries: RetryConfig,
        hedge: HedgeConfig,
        health: HealthConfig,
        metrics: Metrics,
    ) -> None:
        self.addresses = addresses
        self.backends = list(backends)
        self._discover = discover
        self._max_outstanding = max_outstanding
        self._attempts = retries.attempts
        self._budget = RetryBudget(retries)
        self._hedges = RetryBudget(RetryConfig(budget=hedge.budget, reserve=_HEDGE_RESERVE)) if hedge.budget else None
        self._hedge_after = hedge.quantile
        self._latencies = Outcomes(_HEDGE_S)
        self._sample: tuple[str, bytes] | None = None  # the last call that succeeded
        self._next_judgment = 0.0
        self._health = health
        self._metrics = metrics
        self._turn = 0
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._next_ask: dict[str, float] = {}  # model -> when all backends are asked about it again

    @property
    def is_simple(self) -> bool:
        """Whether begin() may be able to make calls."""
        return not self._discover and self._hedges is None

    @property
    def is_up(self) -> bool:
        """Whether one of the servers is up."""
        return any(backend.up for backend in self.backends)

    def serves(self, model: str) -> bool:
        """Returns whether one of the servers is up and, as far as they have been asked, holds the model."""
        return any(b.up and (not self._discover or model not in b.asked or model in b.holds) for b in self.backends)

    async def ask(
        self, spec: Spec, path: str, request: bytes, deadline: float | None, metadata: Metadata, label: str
    ) -> Reply:
        """Sends the request to one of the servers and, if that one cannot be reached, to others.

        Args:
            spec: the request's model spec, for discovery and messages.
            deadline: a time of time.monotonic(), or None.
            label: the model's name in metrics.
        """
        self._judge_at_times()
        self._budget.request()
        return await self._ask(_Request(spec, path, request, deadline, metadata, label), None, None)

    def pick(self) -> tuple[Backend, Connection] | None:
        """Returns a server that takes a request at once, for begin(), or None: ask() must answer it."""
        self._judge_at_times()
        backend = self._choose(self.backends, ())
        connection = None if backend is None else backend.ready()
        return None if backend is None or connection is None else (backend, connection)

    def begin(
        self,
        picked: tuple[Backend, Connection],
        spec: Spec,
        path: str,
        request: bytes,
        deadline: float | None,
        metadata: Metadata,
        label: str,
        done: Callable[[Reply | None], None],
    ) -> Call | None:
        """As ask(), without a task as long as no call fails. Only if is_simple.

        `done` gets the answer, or None if the request is given up. Returns None if the connection takes no more calls.
        """
        timeout_s = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        call = Call(self, _Request(spec, path, request, deadline, metadata, label), *picked, done)
        if not call.begin(timeout_s):
            return None
        self._budget.request()
        return call

    async def go_on(self, request: _Request, backend: Backend, reply: Reply | None) -> Reply:
        """Goes on with a request after its first call. `reply`: the answer; None if the server refused the call."""
        if reply is None:
            timeout_s = None if request.deadline is None else max(request.deadline - time.monotonic(), 0.0)
            reply = await backend.call(request.path, request.message, timeout_s, request.metadata)
        return await self._ask(request, backend, reply)

    def succeeded(self, request: _Request) -> None:
        """Learns from a request that a server answered with OK."""
        if request.path == serving_apis.PREDICT and len(request.message) <= _SAMPLE_BYTES:
            self._sample = request.path, request.message

    def _judge_at_times(self) -> None:
        now = time.monotonic()
        if now >= self._next_judgment:
            self._next_judgment = now + _JUDGE_S
            self._judge(now)

    async def _ask(self, request: _Request, backend: Backend | None, reply: Reply | None) -> Reply:
        """Makes calls until one is answered for good. `backend`, `reply`: the answer of a server that was called."""
        spec, path, message, deadline, metadata, label = request
        tried = [] if backend is None else [backend]
        ended = 0  # servers that were lost while they had the request
        while True:
            if reply is not None:
                assert backend is not None
                if reply.code is Code.OK:
                    self.succeeded(request)
                    return reply._replace(attempts=len(tried)) if len(tried) > 1 else reply
                self._metrics.count("dpsr_proxy_backend_failures_total", (backend.address, reply.code.name))
                ended += reply.begun
                # Only messages that the proxy itself wrote contain the address.
                if spec.model and backend.address in reply.details:
                    reply = reply._replace(details=f"model {spec.model!r}: {reply.details}")
                if reply.code is Code.NOT_FOUND and self._discover and spec.model in backend.holds:
                    # The server no longer holds the model that it reported: the request is good and goes to another.
                    self._next_ask.pop(spec.model, None)
                    await backend.ask(spec.model, self._health.timeout_s)
                elif reply.code is not Code.UNAVAILABLE:
                    return reply._replace(attempts=len(tried))
                if ended > _DEADLY:
                    # Perhaps it was the request that ended them. It must not end all the others as well.
                    return reply._replace(attempts=len(tried))
                if len(tried) >= self._attempts or (deadline is not None and time.monotonic() >= deadline):
                    return reply._replace(attempts=len(tried))
            holders = self.backends
            if not holders:
                return reply or self._none_known(spec)
            if self._discover:
                holders = await self._holders(spec, path)
                if not holders:
                    return reply or self._none_holds(spec, path)
            backend = self._choose(holders, tried)
            if backend is None:
                return (reply or self._none_free(spec, holders, label))._replace(attempts=len(tried))
            if reply is not None:
                if not self._budget.retry():
                    return reply._replace(attempts=len(tried))
                self._metrics.count("dpsr_proxy_retries_total", (label,))
            tried.append(backend)
            timeout_s = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if self._hedges is None or len(holders) < 2:
                reply = await backend.call(path, message, timeout_s, metadata)
            else:
                reply, backend = await self._hedged(holders, tried, path, message, timeout_s, metadata)

    def _judge(self, now: float) -> None:
        """Takes out servers that do worse than their peers; at most half of them all are out for their calls."""
        most = len(self.backends) // 2 - sum(backend.ejected for backend in self.backends)
        if not self._health.eject_s or most <= 0:
            return
        for backend in self.backends:
            peers = [peer.outcomes for peer in self.backends if peer.up and peer is not backend]
            if not backend.up or not peers or most <= 0:
                continue
            silent = is_silent(backend.outstanding, backend.quiet_s(now), peers, now)
            if silent or does_badly(backend.outcomes, peers, now):
                backend.eject(self._sample, self._health.eject_s)
                most -= 1

    async def _hedged(
        self,
        holders: Sequence[Backend],
        tried: list[Backend],
        path: str,
        request: bytes,
        timeout_s: float | None,
        metadata: Metadata,
    ) -> tuple[Reply, Backend]:
        """Makes a call on the last server of `tried` and, if it takes long, on a second one, which is added to `tried`.

        Returns the first good answer, or the last bad one, and its server. The other call is cancelled.
        """
        assert self._hedges is not None
        self._hedges.request()
        begin = time.monotonic()
        after = self._latencies.quantile(begin, self._hedge_after)
        calls = {asyncio.ensure_future(tried[-1].call(path, request, timeout_s, metadata)): tried[-1]}
        try:
            await asyncio.wait(calls, timeout=after)
            waiting = [call for call in calls if not call.done()]
            if waiting and after is not None:
                other = self._choose(holders, tried)
                if other is not None and self._hedges.retry():
                    tried.append(other)
                    left_s = None if timeout_s is None else max(begin + timeout_s - time.monotonic(), 0.0)
                    calls[asyncio.ensure_future(other.call(path, request, left_s, metadata))] = other
            while True:
                done, waiting_for = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
                good = [call for call in done if call.result().code is Code.OK]
                if good or not waiting_for:
                    call = (good or list(done))[0]
                    now = time.monotonic()
                    self._latencies.add(now, now - begin, bool(good))
                    return call.result(), calls[call]
                await asyncio.wait(waiting_for, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for call in calls:
                call.cancel()

    def _choose(self, holders: Sequence[Backend], tried: Sequence[Backend]) -> Backend | None:
        most = self._max_outstanding
        if len(holders) == 1:
            only = holders[0]
            return only if only.up and only.outstanding < most and only not in tried else None
        free = [b for b in holders if b.up and b.outstanding < most and b not in tried]
        if not free:
            return None
        self._turn += 1
        if len(free) > 1:
            draw = random.random()
            free = [backend for backend in free if backend.takes(draw)] or free
        return least_outstanding(free, self._turn)

    def _none_free(self, spec: Spec, holders: Sequence[Backend], label: str) -> Reply:
        whose = f"model {spec.model!r}: " if spec.model else ""
        full = [backend for backend in holders if backend.up]
        if full:
            self._metrics.count("dpsr_proxy_rejected_total", (label,))
            usual_s = quantile([backend.outcomes for backend in full], time.monotonic(), 0.5)
            return Reply(
                Code.RESOURCE_EXHAUSTED,
                f"{whose}all backends have {self._max_outstanding} requests under way: "
                + ", ".join(backend.address for backend in full),
                trailing=pushback(usual_s or _WAIT_S),
            )
        addresses = ", ".join(backend.address for backend in holders)
        which = f"backend {addresses}" if len(holders) == 1 else f"none of the backends {addresses}"
        return Reply(Code.UNAVAILABLE, f"{whose}{which} can{'not' if len(holders) == 1 else ''} be reached")

    async def _holders(self, spec: Spec, path: str) -> list[Backend]:
        """Returns the servers that hold the wanted version; else those that know the model and report the error."""
        model = spec.model
        unasked = [backend for backend in self.backends if backend.up and model not in backend.asked]
        serving = [backend for backend in self.backends if backend.up and backend.holds.get(model)]
        if unasked or time.monotonic() > self._next_ask.get(model, 0.0):
            task = self._asking.get(model)
            if task is None:
                task = self._asking[model] = asyncio.create_task(self._ask_all(model))
                task.add_done_callback(lambda _: self._asking.pop(model, None))
            if not serving:
                await asyncio.shield(task)
        known = [backend for backend in self.backends if model in backend.holds]
        if path == serving_apis.GET_MODEL_STATUS:
            return known
        versions = [b for b in known if (b.holds[model] if spec.version is None else spec.version in b.holds[model])]
        return versions or known

    async def _ask_all(self, model: str) -> None:
        backends = [backend for backend in self.backends if backend.up]
        await asyncio.gather(*(backend.ask(model, self._health.timeout_s) for backend in backends))
        if len(self._next_ask) > _ABSENT_LIMIT:
            self._next_ask.clear()
        self._next_ask[model] = time.monotonic() + _DISCOVER_EVERY_CHECKS * self._health.every_s

    def _none_known(self, spec: Spec) -> Reply:
        whose = f"model {spec.model!r}: " if spec.model else ""
        return Reply(Code.UNAVAILABLE, f"{whose}no address of {', '.join(self.addresses)} is known")

    def _none_holds(self, spec: Spec, path: str) -> Reply:
        silent = [b.address for b in self.backends if not b.up or spec.model not in b.asked]
        if silent:
            words = f"model {spec.model!r}: no reachable backend holds it; cannot be reached: {', '.join(silent)}"
            return Reply(Code.UNAVAILABLE, words)
        return Reply(Code.NOT_FOUND, not_found(path, spec))


class _Request(NamedTuple):
    spec: Spec
    path: str
    message: bytes
    deadline: float | None
    metadata: Metadata
    label: str


class Call:
    """A request of Replicas.begin(). If its first call fails, a task goes on with it."""

    __slots__ = ("_backend", "_connection", "_done", "_replicas", "_request", "_stream", "_task")

    def __init__(
        self,
        replicas: Replicas,
        request: _Request,
        backend: Backend,
        connection: Connection,
        done: Callable[[Reply | None], None],
    ) -> None:
        self._replicas, self._request, self._done = replicas, request, done
        self._backend, self._connection = backend, connection
        self._stream = -1
        self._task: asyncio.Task[None] | None = None

    def begin(self, timeout_s: float | None) -> bool:
        """Makes the first call. Returns False if the connection takes no more."""
        request = self._request
        self._stream = self._connection.begin(request.path, request.message, timeout_s, request.metadata, self)
        if self._stream < 0:
            return False
        self._backend.add_call(self)
        return True

    def on_reply(self, reply: Reply | None) -> None:
        """Takes the answer to the first call."""
        if reply is None:
            self._backend.forget_call(self)
        else:
            self._backend.end_call(self, reply)
            if reply.code is Code.OK:
                self._replicas.succeeded(self._request)
                try:
                    self._done(reply)
                except Exception:
                    # The connection belongs to all other calls as well.
                    traceback.print_exc(file=sys.stderr)
                return
        self._task = asyncio.get_running_loop().create_task(self._go_on(reply))

    def cancel(self) -> None:
        """Gives the request up."""
        if self._task is not None:
            self._task.cancel()
        else:
            self._connection.give_up(self._stream)
            self._backend.forget_call(self)
        self._done(None)

    async def _go_on(self, reply: Reply | None) -> None:
        # The connection may have been opened for a request that had a span, and its callbacks would keep it.
        tracing.current.set(None)
        try:
            reply = await self._replicas.go_on(self._request, self._backend, reply)
        except Exception:
            traceback.print_exc(file=sys.stderr)
            reply = FAILED
        self._done(reply)


class Pool:
    """The servers of a PoolConfig: a set of replicas for each shard."""

    def __init__(self, config: PoolConfig, shards: Sequence[Replicas]) -> None:
        self.config = config
        self.shards = list(shards)


def not_found(path: str, spec: Spec) -> str:
    """Returns TensorFlow Serving's message for a model that it does not know."""
    if path == serving_apis.GET_MODEL_STATUS:
        which = "any versions" if spec.version is None else f"version {spec.version}"
        return f"Could not find {which} of model {spec.model}"
    wanted = f"Latest({spec.model})" if spec.version is None else f"Specific({spec.model}, {spec.version})"
    return f"Servable not found for request: {wanted}"


def channel_tls(tls: TlsConfig | None) -> Tls | None:
    """Returns the TLS settings of connections to the servers. Raises OSError if a file cannot be read."""
    return None if tls is None else Tls(client_tls, tls.certificate, tls.key, tls.ca)
