"""The proxy's server: forwards each call to a backend and returns the answer, both as unchanged bytes."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import json
import math
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

from dpsr_common import serving_apis
from dpsr_serving import grpc_services
from dpsr_serving.addresses import join_address
from dpsr_serving.proxy import backends, calls, routing, tracing
from dpsr_serving.proxy.admission import Gate, priority_of
from dpsr_serving.proxy.backends import Backend, Pool, Replicas
from dpsr_serving.proxy.calls import Code, Metadata, Reply
from dpsr_serving.proxy.config import AccessLogConfig, PoolConfig, ProxyConfig, TargetConfig
from dpsr_serving.proxy.experiments import assign
from dpsr_serving.proxy.metrics import Metrics
from dpsr_serving.proxy.names import Names, host_of
from dpsr_serving.proxy.routing import Spec

ARM_METADATA = b"dpsr-arm"
SHARDS_METADATA = b"dpsr-shards"

_PLANS = 10_000  # number of model specs whose routes are cached
_PLAN_BYTES = 256  # longest serialized model spec that is cached
_SHADOWS = 256  # shadow copies that may be under way at the same time
_SHADOW_S = 60.0  # time limit of one shadow copy
# Share of the remaining time that shards may use, so that an answer without the slow shards still arrives in time.
_MARGIN = 0.9
_ASK_MODELS = (serving_apis.GET_MODEL_STATUS, serving_apis.GET_MODEL_METADATA)
_SEARCHES = ("", "serving_default", "search")
_LATE = Reply(Code.DEADLINE_EXCEEDED, "the deadline of the call had passed before a server was asked")


@dataclasses.dataclass(frozen=True)
class _Destination:
    """Where a request goes.

    Attributes:
        spec: its model spec.
        pool: the servers; None if none are configured.
        label: the model's name in metrics; "" for names that are not configured, because clients can invent any number
            of them.
        rewrite: whether the request's own model spec has to be replaced by `spec`.
    """

    spec: Spec
    pool: Pool | None
    label: str
    rewrite: bool = False


@dataclasses.dataclass
class _Plan:
    """How requests with one model spec are handled. Everything but `plain` is for inference only."""

    plain: _Destination
    gate: Gate | None = None
    experiment: str = ""
    key: str = ""
    override: str | None = None
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    arms: Mapping[str, _Destination] = dataclasses.field(default_factory=dict)
    shadow: _Destination | None = None
    share: float = 0.0
    simple: Replicas | None = None  # the servers, if requests need nothing but a call to one of them


class ProxyServer:
    """Serves PredictionService and ModelService by forwarding calls to the backends of a configuration.

    Forwarded unchanged: the messages, the deadline, metadata (but gRPC sets `user-agent` anew on each hop), the status
    code and its message, initial and trailing metadata. The proxy answers by itself only in these cases:

    - INVALID_ARGUMENT: the request names no model;
    - NOT_FOUND: no backend is configured for the model, or none holds it, in TensorFlow Serving's words;
    - UNAVAILABLE: no backend of the model can be reached (the message names model and addresses), or a shard is
      missing and the configuration demands all;
    - RESOURCE_EXHAUSTED: the model's limit is reached, or all its backends have `max_outstanding` requests under way;
    - PERMISSION_DENIED: HandleReloadConfigRequest, unless the configuration has `forward_reloads`;
    - FAILED_PRECONDITION: the same, which names no model, if there are several backends.

    Raises:
        OSError: a certificate cannot be read, or the access log cannot be opened.
    """

    def __init__(self, config: ProxyConfig, share_port: bool = False, workers: int = 1) -> None:
        """`workers`: processes that share the port. They divide the limits of models evenly."""
        self.metrics = Metrics()
        self._config = config
        self._backends: dict[str, Backend] = {}
        self._pools: dict[PoolConfig, Pool] = {}
        self._plans: dict[tuple[bool, bytes], _Plan] = {}
        self._gates: dict[str, Gate] = {}  # model, or "" for all models of `default` -> its limit
        self._workers = workers
        self._tasks: set[asyncio.Task[Any]] = set()
        self._shadows = 0
        self._draining = False
        self._checked = False
        listen = config.listen_tls
        self._tls: calls.Tls | None = None
        if listen is not None:
            assert listen.certificate is not None and listen.key is not None
            self._tls = calls.Tls(calls.server_tls, listen.certificate, listen.key, listen.ca)
        self._channel_tls = backends.channel_tls(config.backend_tls)
        self._share_port = share_port
        self._tracer = None if config.tracing is None else tracing.Tracer(config.tracing)
        self._log = AccessLog(config.access_log)
        self._names = Names(self.metrics, self._follow_names)
        self._set_up(config)
        handlers: dict[str, calls.Handler] = {}
        starters: dict[str, calls.Starter] = {}
        for path, request in serving_apis.METHODS.items():
            spec_path = routing.model_spec_path(request)
            inference = spec_path is not None and path not in _ASK_MODELS
            handlers[path] = functools.partial(self._forward, path, spec_path, inference)
            if spec_path is not None and inference:
                starters[path] = functools.partial(self._begin, path, spec_path)
        health = grpc_services.Health(self._health)
        reflection = grpc_services.Reflection((*serving_apis.SERVICES, grpc_services.HEALTH), (serving_apis.POOL,))
        handlers[f"/{grpc_services.HEALTH}/Check"] = functools.partial(_check, health)
        streaming: dict[str, calls.StreamHandler] = {
            f"/{grpc_services.HEALTH}/Watch": functools.partial(_watch, health)
        }
        for service in (grpc_services.REFLECTION, grpc_services.REFLECTION_ALPHA):
            streaming[f"/{service}/ServerReflectionInfo"] = functools.partial(_reflect, reflection)
        self._server = calls.Server(handlers, streaming, config.limits, starters)

    async def start(self, host: str, port: int, unix_socket: str | None = None) -> str:
        """Begins to serve and returns "host:port"; port 0 chooses a free port.

        Raises:
            OSError: it cannot listen.
            CommandError: the configuration needs a package that is not installed.
        """
        await self._names.follow(self._config.dns, _addresses(self._config))
        listening = join_address(host, port)
        try:
            tls = None if self._tls is None else self._tls.listening()
            bound = await self._server.listen(host, port, tls, self._share_port)
            if unix_socket is not None:
                listening = f"unix:{unix_socket}"
                await self._server.listen_unix(unix_socket, tls)
        except OSError as error:
            raise OSError(f"cannot listen on {listening}") from error
        for backend in self._backends.values():
            backend.watch(self._config.health)
        return join_address(host, bound)

    async def stop(self, grace_s: float) -> None:
        """Accepts no new calls, gives calls in flight `grace_s` seconds to finish, and closes all connections."""
        self._draining = True
        await self._server.stop(grace_s)
        for task in list(self._tasks):
            task.cancel()
        self._names.close()
        for backend in self._backends.values():
            backend.close()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
        self._log.close()

    async def reload(self, config: ProxyConfig) -> None:
        """Routes by a new configuration from the next request on. Backends in both keep their connections and state.

        Raises:
            ValueError: the configuration changes `tls`, which is read only at the start. Nothing was changed.
            OSError: the access log cannot be opened. Nothing was changed.
            CommandError: the configuration needs a package that is not installed. Nothing was changed.
        """
        if (config.listen_tls, config.backend_tls) != (self._config.listen_tls, self._config.backend_tls):
            raise ValueError("tls: it is read only when the proxy starts; restart it")
        log = AccessLog(config.access_log)
        old = tracer = self._tracer
        try:
            if config.tracing != self._config.tracing:
                tracer = None if config.tracing is None else tracing.Tracer(config.tracing)
            # Names that are new are looked up before any request goes there.
            await self._names.follow(config.dns, _addresses(config))
        except BaseException:
            log.close()
            if tracer is not None and tracer is not old:
                self._start(asyncio.to_thread(tracer.close))
            raise
        self._log.close()
        self._log, self._tracer = log, tracer
        if old is not None and old is not tracer:
            self._start(asyncio.to_thread(old.close))
        before = self._backends
        self._set_up(config)
        self._names.keep(_addresses(config))
        self._server.set_limits(config.limits)
        self._retire(before)
        for backend in self._backends.values():
            backend.set_limits(config.limits)
            backend.watch(config.health)

    def renew_certificates(self) -> list[str]:
        """Reads the files of `tls` again if they have changed. New connections use them; all others go on.

        Returns:
            which of "tls.listen" and "tls.backends" have changed.

        Raises:
            OSError: a file cannot be read, or a certificate and its key do not fit. The old ones stay in use.
        """
        sides = {"tls.listen": self._tls, "tls.backends": self._channel_tls}
        return [name for name, tls in sides.items() if tls is not None and tls.renew()]

    def ready(self) -> bool:
        """Returns whether all first backends have been checked, at least one is up, and the proxy is not draining."""
        found = self._backends.values()
        # Backends that join later do not count: they should not take the proxy out until their first check.
        self._checked = self._checked or all(b.checked for b in found)
        return not self._draining and self._checked and any(b.up for b in found)

    def _health(self, service: str) -> int:
        """Returns the status of a service, or of a model by its name, for grpc_services.Health."""
        if service in ("", *serving_apis.SERVICES):
            return _status(self.ready())
        model = self._config.models.get(service)
        pool = self._config.default if model is None else routing.route(self._config, Spec(service))
        if pool is None:
            return grpc_services.SERVICE_UNKNOWN
        shards = self._pools[pool].shards
        if model is None and not any(service in backend.holds for shard in shards for backend in shard.backends):
            # Clients can invent names; a model of `default` is one that a server is known to hold.
            return grpc_services.SERVICE_UNKNOWN
        enough = any if self._pools[pool].config.allow_partial else all
        return _status(not self._draining and enough(shard.serves(service) for shard in shards))

    def dump(self) -> str:
        """Returns the present metrics for metrics.merge()."""
        found = self._backends.items()
        self.metrics.set("dpsr_proxy_backend_up", {(address,): float(b.up) for address, b in found})
        self.metrics.set("dpsr_proxy_addresses", self._names.dump())
        self.metrics.set("dpsr_proxy_backend_outstanding", {(address,): float(b.outstanding) for address, b in found})
        return self.metrics.dump()

    def _set_up(self, config: ProxyConfig) -> None:
        before, self._backends = self._backends, {}
        self._config = config
        pools: dict[PoolConfig, Pool] = {}
        for pool in _pool_configs(config):
            shards = [
                Replicas(
                    addresses,
                    self._servers(addresses, before),
                    pool.discover,
                    config.max_outstanding,
                    config.retries,
                    config.hedge,
                    config.health,
                    self.metrics,
                )
                for addresses in pool.shards
            ]
            if len(shards) > 1:
                # It imports NumPy, which should not happen during the first request.
                from dpsr_serving.proxy import shards as _  # noqa: F401
            pools[pool] = Pool(pool, shards)
        self._pools, self._plans = pools, {}
        self._gates = self._make_gates(config)

    def _servers(self, addresses: Sequence[str], before: Mapping[str, Backend]) -> list[Backend]:
        """Returns the servers at some addresses, those of `before` where they are the same."""
        tls = self._config.backend_tls
        found: dict[str, Backend] = {}
        for given in addresses:
            for address in self._names.addresses(given):
                if address not in self._backends:
                    # A server that a name led to shows a certificate for the name.
                    name = (tls and (tls.server_name or host_of(given))) or ""
                    self._backends[address] = before.get(address) or Backend(
                        address, self.metrics, self._channel_tls, name, self._config.limits, self._names.look_again
                    )
                found[address] = self._backends[address]
        return list(found.values())

    def _follow_names(self) -> None:
        """Takes over the present addresses of the names. Requests that are under way also find them."""
        before, self._backends = self._backends, {}
        for pool in self._pools.values():
            for shard in pool.shards:
                shard.backends = self._servers(shard.addresses, before)
        self._retire(before)
        for address, backend in self._backends.items():
            if address not in before:
                backend.watch(self._config.health)

    def _retire(self, before: Mapping[str, Backend]) -> None:
        async def retire(address: str, backend: Backend) -> None:
            await backend.retire()
            if address not in self._backends:
                self.metrics.forget_backend(address)

        for address, backend in before.items():
            if address not in self._backends:
                self._start(retire(address, backend))

    def _make_gates(self, config: ProxyConfig) -> dict[str, Gate]:
        """Returns the limits of the models. Those that stay keep count of the requests in flight."""
        limits = {"": config.default_limit, **{name: model.limit for name, model in config.models.items()}}
        shares = dict(config.priorities.shares) if config.priorities is not None else {}
        gates = {}
        for name, limit in limits.items():
            if limit is None:
                continue
            if name in self._gates:
                gates[name] = self._gates[name]
                gates[name].set_limit(limit, shares, self._workers)
            else:
                gates[name] = Gate(limit, shares, self._workers, time.monotonic())
        return gates

    def _forward(
        self,
        path: str,
        spec_path: tuple[int, ...] | None,
        inference: bool,
        request: bytes,
        deadline: float | None,
        metadata: Metadata,
    ) -> Awaitable[Reply]:
        span = None if self._tracer is None else self._tracer.begin(path, metadata)
        if span is None:
            return self._answer(path, spec_path, inference, request, deadline, metadata)
        answer = functools.partial(self._answer, path, spec_path, inference, request, deadline, metadata)
        return _traced(span, answer)

    async def _answer(
        self,
        path: str,
        spec_path: tuple[int, ...] | None,
        inference: bool,
        request: bytes,
        deadline: float | None,
        metadata: Metadata,
    ) -> Reply:
        start = time.monotonic()
        plan: _Plan | None = None
        arm = ""
        # It ends here, because a fast server could answer before the timer of the call rings.
        late = _LATE if deadline is not None and deadline <= start else None
        if spec_path is None:
            reply = late or await self._ask_sole(path, request, deadline, metadata)
        else:
            found = self._plan(path, spec_path, inference, request)
            if isinstance(found, Reply):
                reply = found
            else:
                plan = found
                destination = plan.plain
                if plan.arms:
                    arm = _arm(plan, metadata)
                    destination = plan.arms[arm]
                refused = late or self._refused(plan, metadata, start)
                if refused is not None:
                    reply = refused
                else:
                    if plan.shadow is not None and random.random() < plan.share and self._shadows < _SHADOWS:
                        self._start(self._shadow(plan, path, spec_path, request, deadline, metadata))
                    try:
                        reply = await self._ask(destination, path, spec_path, request, deadline, metadata)
                    finally:
                        if plan.gate is not None:
                            plan.gate.leave(time.monotonic() - start)
                if arm:
                    arm_header = (ARM_METADATA, f"{plan.experiment}/{arm}".encode())
                    reply = reply._replace(trailing=(*reply.trailing, arm_header))
        seconds = time.monotonic() - start
        model, experiment = ("", "") if plan is None else (plan.plain.label, plan.experiment)
        span = tracing.current.get()
        if span is not None and plan is not None:
            span.describe(plan.plain.spec, f"{experiment}/{arm}" if arm else "")
        self.metrics.count("dpsr_proxy_requests_total", (_short(path), model, experiment, arm, reply.code.name))
        if inference:
            self.metrics.observe("dpsr_proxy_request_seconds", (model, experiment, arm), seconds)
        if self._log.wants(reply.code is Code.OK):
            self._log.write(path, plan.plain.spec if plan else None, experiment, arm, reply, seconds, request, metadata)
        return reply

    def _begin(
        self,
        path: str,
        spec_path: tuple[int, ...],
        request: bytes,
        deadline: float | None,
        metadata: Metadata,
        caller: calls.Caller,
        stream: int,
    ) -> calls.Pending | None:
        """Does what _forward() does for most inference requests, without a task. Returns None for the others."""
        start = time.monotonic()
        if self._tracer is not None or (deadline is not None and deadline <= start):
            return None
        try:
            message = routing.find_model_spec(request, spec_path)
        except ValueError:
            return None
        plan = None if message is None else self._plans.get((True, message))
        if plan is None or plan.simple is None:
            return None
        picked = plan.simple.pick()
        gate = plan.gate
        # A request beyond the limit is refused by _forward().
        if picked is None or (gate is not None and gate.enter(priority_of(self._config.priorities, metadata), start)):
            return None
        spec, label = plan.plain.spec, plan.plain.label
        done = functools.partial(self._finish, path, plan, start, request, metadata, caller, stream)
        call = plan.simple.begin(picked, spec, path, request, deadline, metadata, label, done)
        if call is None and gate is not None:
            gate.leave(0.0)
        return call

    def _finish(
        self,
        path: str,
        plan: _Plan,
        start: float,
        request: bytes,
        metadata: Metadata,
        caller: calls.Caller,
        stream: int,
        reply: Reply | None,
    ) -> None:
        """Answers a request of _begin(). `reply`: None if the client has given it up."""
        seconds = time.monotonic() - start
        if plan.gate is not None:
            plan.gate.leave(seconds)
        if reply is None:
            return
        ok = reply.code is Code.OK
        caller.finish(stream, reply)
        label = plan.plain.label
        labels = (_short(path), label, "", "", "OK" if ok else reply.code.name)
        self.metrics.count("dpsr_proxy_requests_total", labels)
        self.metrics.observe("dpsr_proxy_request_seconds", (label, "", ""), seconds)
        if self._log.wants(ok):
            self._log.write(path, plan.plain.spec, "", "", reply, seconds, request, metadata)

    def _refused(self, plan: _Plan, metadata: Metadata, now: float) -> Reply | None:
        """Counts a request against the limit of its model. Returns the answer to a request that is not taken."""
        if plan.gate is None:
            return None
        priority = priority_of(self._config.priorities, metadata)
        refusal = plan.gate.enter(priority, now)
        if refusal is None:
            return None
        self.metrics.count("dpsr_proxy_shed_total", (plan.plain.label, priority, refusal.limit))
        return refusal.reply(plan.plain.spec.model, priority)

    def _plan(self, path: str, spec_path: tuple[int, ...], inference: bool, request: bytes) -> _Plan | Reply:
        """Returns how to handle a request, or the answer to a request that cannot be routed."""
        try:
            message = routing.find_model_spec(request, spec_path)
            if message is None:
                return Reply(Code.INVALID_ARGUMENT, "Missing ModelSpec")
            plan = self._plans.get((inference, message))
            if plan is None:
                spec = routing.parse_spec(message)
                if not spec.model:
                    return Reply(Code.INVALID_ARGUMENT, "ModelSpec has no name specified.")
                plan = self._make_plan(spec, inference)
                # Clients choose these bytes, so both their number and their length are limited.
                if len(self._plans) >= _PLANS:
                    self._plans.clear()
                if len(message) <= _PLAN_BYTES:
                    self._plans[inference, message] = plan
        except ValueError as error:
            return Reply(Code.INVALID_ARGUMENT, f"cannot decode the request of {path}: {error}")
        return plan

    def _make_plan(self, spec: Spec, inference: bool) -> _Plan:
        model = self._config.models.get(spec.model)
        pool = routing.route(self._config, spec)
        plan = _Plan(_Destination(spec, self._pools[pool] if pool else None, spec.model if model else ""))
        if inference:
            plan.gate = self._gates.get(spec.model if model else "")
            if pool is not None and (model is None or not (model.experiment or model.shadow)):
                shards = self._pools[pool].shards
                plan.simple = shards[0] if len(shards) == 1 and shards[0].is_simple else None
        if model is None or not inference:
            return plan
        if model.experiment is not None:
            experiment = model.experiment
            plan.experiment, plan.key, plan.override = experiment.name, experiment.key, experiment.override
            plan.weights = experiment.weights
            plan.arms = {arm: self._destination(spec, target) for arm, target in experiment.targets.items()}
        if model.shadow is not None:
            plan.shadow, plan.share = self._destination(spec, model.shadow.target), model.shadow.share
        return plan

    def _destination(self, spec: Spec, target: TargetConfig) -> _Destination:
        new, pool = routing.redirect(self._config, spec, target)
        return _Destination(new, self._pools[pool] if pool else None, spec.model, new != spec)

    async def _ask(
        self,
        destination: _Destination,
        path: str,
        spec_path: tuple[int, ...],
        request: bytes,
        deadline: float | None,
        metadata: Metadata,
    ) -> Reply:
        spec, pool = destination.spec, destination.pool
        if pool is None:
            return Reply(Code.NOT_FOUND, backends.not_found(path, spec))
        if destination.rewrite:
            try:
                request = routing.rewrite_model_spec(request, spec_path, spec)
            except ValueError as error:
                return Reply(Code.INVALID_ARGUMENT, f"cannot decode the request of {path}: {error}")
        if len(pool.shards) > 1 and path == serving_apis.PREDICT and spec.signature in _SEARCHES:
            return await self._ask_shards(destination, pool, spec_path, request, deadline, metadata)
        # A request that searches no items can be answered by any shard that has a server which is up.
        healthy = [shard for shard in pool.shards if shard.is_up] or pool.shards
        replicas = healthy[0] if len(healthy) == 1 else random.choice(healthy)
        return await replicas.ask(spec, path, request, deadline, metadata, destination.label)

    async def _ask_shards(
        self,
        destination: _Destination,
        pool: Pool,
        spec_path: tuple[int, ...],
        request: bytes,
        deadline: float | None,
        metadata: Metadata,
    ) -> Reply:
        """Asks all shards at once and merges their answers, if allowed without those that fail or are late.

        All answers that are merged come from one version of the model: scores of two versions do not compare.
        """
        spec = destination.spec
        limit = deadline
        now = time.monotonic()
        if pool.config.allow_partial and deadline is not None:
            limit = now + _MARGIN * (deadline - now)
        if pool.config.shard_timeout_s is not None:
            limit = min(limit or float("inf"), now + pool.config.shard_timeout_s)

        async def ask_one(shard: Replicas, body: bytes) -> Reply:
            answer = functools.partial(shard.ask, spec, serving_apis.PREDICT, body, limit, metadata, destination.label)
            span = tracing.current.get()
            return await (
                answer() if span is None else _traced(span.part("shard", shard=pool.shards.index(shard) + 1), answer)
            )

        async def ask(shards: Sequence[Replicas], body: bytes) -> list[Reply]:
            return await asyncio.gather(*(ask_one(shard, body) for shard in shards))

        replies = await ask(pool.shards, request)
        try:
            versions = routing.answer_versions([reply.body if reply.code is Code.OK else None for reply in replies])
        except ValueError as error:
            return _cannot_merge(spec, error)
        if len({version for version in versions if version is not None}) > 1:
            replies = await _of_one_version(spec, spec_path, pool.shards, request, replies, versions, ask)
        answers, total = [reply for reply in replies if reply.code is Code.OK], len(replies)
        count = ((SHARDS_METADATA, b"%d/%d" % (len(answers), total)),)
        for index, reply in enumerate(replies):
            if reply.code is Code.OK:
                continue
            # Any other code is an error of the request, which all shards report alike.
            if reply.code not in _MISSING:
                return reply
            self.metrics.count("dpsr_proxy_shards_missing_total", (destination.label, str(index)))
            if not answers or not pool.config.allow_partial:
                code = reply.code if deadline is not None and limit == deadline else Code.UNAVAILABLE
                words = (
                    f"model {spec.model!r}: shard {index + 1} of {total} is missing: {reply.code.name}: {reply.details}"
                )
                return Reply(code, words, trailing=count, backend=reply.backend)
        from dpsr_serving.proxy.shards import merge_answers

        try:
            body = merge_answers([answer.body for answer in answers])
        except ValueError as error:
            return _cannot_merge(spec, error)._replace(trailing=count)
        first = answers[0]
        attempts = max(answer.attempts for answer in answers)
        return Reply(Code.OK, "", body, first.initial, (*first.trailing, *count), first.backend, attempts)

    async def _ask_sole(self, path: str, request: bytes, deadline: float | None, metadata: Metadata) -> Reply:
        if not self._config.forward_reloads:
            return Reply(
                Code.PERMISSION_DENIED,
                f"this proxy does not forward {path}; send it to a model server directly, or configure "
                "forward_reloads: true",
            )
        if len(self._backends) > 1:
            return Reply(
                Code.FAILED_PRECONDITION,
                f"{path} names no model, and this proxy has {len(self._backends)} backends; send it to a model server "
                "directly",
            )
        pool = next(iter(self._pools.values()))
        return await pool.shards[0].ask(Spec(""), path, request, deadline, metadata, "")

    async def _shadow(
        self,
        plan: _Plan,
        path: str,
        spec_path: tuple[int, ...],
        request: bytes,
        deadline: float | None,
        metadata: Metadata,
    ) -> None:
        assert plan.shadow is not None
        self._shadows += 1
        try:
            deadline = min(deadline or math.inf, time.monotonic() + _SHADOW_S)
            answer = functools.partial(self._ask, plan.shadow, path, spec_path, request, deadline, metadata)
            span = tracing.current.get()
            reply = await (answer() if span is None else _traced(span.part("shadow"), answer))
            self.metrics.count("dpsr_proxy_shadow_total", (plan.shadow.label, reply.code.name))
        finally:
            self._shadows -= 1

    def _start(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _traced(span: tracing.Span, answer: Callable[[], Awaitable[Reply]]) -> Reply:
    """Answers a request, or a part of it, in a span."""
    with span:
        tracing.current.set(span)
        reply = await answer()
        span.finish(reply)
        return reply


def _status(good: bool) -> int:
    return grpc_services.SERVING if good else grpc_services.NOT_SERVING


async def _check(health: grpc_services.Health, request: bytes, deadline: float | None, metadata: Metadata) -> Reply:
    try:
        return Reply(Code.OK, body=health.check(request))
    except grpc_services.UnknownServiceError as error:
        return Reply(Code.NOT_FOUND, str(error))
    except ValueError as error:
        return Reply(Code.INVALID_ARGUMENT, str(error))


async def _watch(health: grpc_services.Health, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for request in requests:
        async for answer in health.watch(request):
            yield answer


async def _reflect(reflection: grpc_services.Reflection, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for request in requests:
        yield reflection.answer(request)


# Codes with which a shard fails through no fault of the request.
_MISSING = (
    Code.UNAVAILABLE,
    Code.DEADLINE_EXCEEDED,
    Code.RESOURCE_EXHAUSTED,
    Code.CANCELLED,
    Code.INTERNAL,
)


def _cannot_merge(spec: Spec, error: ValueError) -> Reply:
    return Reply(Code.INTERNAL, f"model {spec.model!r}: cannot merge the shards' answers: {error}")


async def _of_one_version(
    spec: Spec,
    spec_path: tuple[int, ...],
    shards: Sequence[Replicas],
    request: bytes,
    replies: Sequence[Reply],
    versions: Sequence[int | None],
    ask: Callable[[Sequence[Replicas], bytes], Awaitable[list[Reply]]],
) -> list[Reply]:
    """Makes the answers of shards come from one version of the model.

    During a rollout some shards have the new version and others do not. The others are asked for the version that most
    answered with (the newest one under ties), and if they do not have it, the next one. If no version is on all shards,
    the shards without the first one count as missing.

    Args:
        spec, spec_path, request: the request, and where it has its model spec.
        shards: all shards.
        replies: their answers.
        versions: the version of each answer; None where there is no answer.
        ask: sends a request to some shards.
    """
    counts = collections.Counter(version for version in versions if version is not None)
    wanted = sorted(counts, key=lambda version: (counts[version], version), reverse=True)
    for version in wanted:
        others = [index for index, other in enumerate(versions) if other not in (None, version)]
        body = routing.rewrite_model_spec(request, spec_path, dataclasses.replace(spec, version=version, label=None))
        found = await ask([shards[index] for index in others], body)
        if all(reply.code is Code.OK for reply in found):
            again = dict(zip(others, found, strict=True))
            return [again.get(index, reply) for index, reply in enumerate(replies)]
    first = wanted[0]
    words = "it answers with version {} and other shards with version {}, and no version is on all shards"
    return [
        reply
        if version in (None, first)
        else reply._replace(code=Code.UNAVAILABLE, details=words.format(version, first), body=b"")
        for reply, version in zip(replies, versions, strict=True)
    ]


class AccessLog:
    """Writes lines of JSON for some requests. Raises OSError if the file cannot be opened."""

    def __init__(self, config: AccessLogConfig | None) -> None:
        self._config = config
        self._file = -1
        if config is not None:
            self._file = os.open(config.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def wants(self, ok: bool) -> bool:
        """Returns whether to log a request that succeeded (`ok`) or failed."""
        config = self._config
        return config is not None and ((config.errors and not ok) or random.random() < config.sample)

    def write(
        self,
        path: str,
        spec: Spec | None,
        experiment: str,
        arm: str,
        reply: Reply,
        seconds: float,
        request: bytes,
        metadata: Metadata,
    ) -> None:
        """Writes the line of a request. On an error, such as a full disk, the line is lost and the request goes on."""
        assert self._config is not None
        line: dict[str, Any] = {"time": round(time.time(), 3), "method": _short(path)}
        if spec is not None:
            given = {name: value for name, value in dataclasses.asdict(spec).items() if value not in (None, "")}
            line |= given
        if arm:
            line |= {"experiment": experiment, "arm": arm}
        line |= {
            "code": reply.code.name,
            "ms": round(seconds * 1000, 3),
            "backend": reply.backend,
            "attempts": max(reply.attempts, int(bool(reply.backend))),
            "request_bytes": len(request),
            "response_bytes": len(reply.body),
        }
        if reply.details:
            line["details"] = reply.details[:500]
        for key, value in calls.readable(metadata) if self._config.metadata else ():
            if key in self._config.metadata:
                line.setdefault("metadata", {})[key] = value if isinstance(value, str) else value.hex()
        try:
            os.write(self._file, (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
        except OSError:
            return

    def close(self) -> None:
        """Closes the file."""
        if self._file >= 0:
            os.close(self._file)
        self._file, self._config = -1, None


def _arm(plan: _Plan, metadata: Metadata) -> str:
    """Returns the request's arm: the one that its metadata names, else the one that its key is assigned to.

    A request without the key is assigned by the empty key.
    """
    value: str | bytes = ""
    for name, given in calls.readable(metadata):
        if name == plan.override and given in plan.arms:
            return str(given)
        if name == plan.key:
            value = given
    return assign(plan.experiment, value, plan.weights)


def _short(path: str) -> str:
    return path.rpartition("/")[2]


def _addresses(config: ProxyConfig) -> list[str]:
    return [address for pool in _pool_configs(config) for shard in pool.shards for address in shard]


def _pool_configs(config: ProxyConfig) -> dict[PoolConfig, None]:
    """Returns all pools of a configuration, each once."""
    targets: list[TargetConfig] = []
    pools: list[PoolConfig | None] = [config.default]
    for model in config.models.values():
        pools += [model.pool, *(rule.pool for rule in model.rules)]
        if model.experiment is not None:
            targets += model.experiment.targets.values()
        if model.shadow is not None:
            targets.append(model.shadow.target)
    pools += [target.pool for target in targets]
    return dict.fromkeys(pool for pool in pools if pool is not None)
