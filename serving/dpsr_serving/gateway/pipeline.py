"""One search through the stages of a pipeline: recall, coarse ranking, fine ranking, re-ranking, a page.

    recall   all sources at the same time, each with its own k and deadline; rewrites first, for the source "rewritten"
    coarse   one list of all sources (fusion.py); an item whose identifier the query is comes first
    fine     a ranker scores the best of the list
    rerank   variants collapse, neighbours differ, rules of merchandisers (rerank.py)

A stage that fails or is late is left out, and the answer names it in `degraded`. Only if no source of recall answers
there is an error. The list is made once: a cursor carries it from page to page, so pages neither overlap nor search
again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray

from dpsr_common.errors import CommandError
from dpsr_serving.client import ServingError
from dpsr_serving.gateway import cursor
from dpsr_serving.gateway.catalogue import Catalogue, Condition
from dpsr_serving.gateway.config import REWRITTEN, PipelineConfig, SearchConfig, SourceConfig
from dpsr_serving.gateway.fusion import Combined, LearnedFusion, RankFusion
from dpsr_serving.gateway.inverted import Found, InvertedIndex
from dpsr_serving.gateway.messages import (
    Explanation,
    Facet,
    Item,
    RequestError,
    SearchRequest,
    SearchResponse,
    Stage,
    rounded,
)
from dpsr_serving.gateway.metrics import METRICS
from dpsr_serving.gateway.model_client import ModelClient, fitting
from dpsr_serving.gateway.rerank import Reranker, RuleFile
from dpsr_serving.gateway.search_threads import SearchThreads, ThreadsBusyError
from dpsr_serving.proxy.experiments import assign
from dpsr_serving.proxy.metrics import Metrics
from dpsr_serving.search import User

_log = logging.getLogger(__name__)

T = TypeVar("T")

IDENTIFIER = "identifier"  # the source of an item whose identifier the query is
_FACET_VALUES = 50  # values of a keyword that a facet lists
_SHOWN_VALUES = 200  # values of a keyword that `describe` lists
_GRACE_S = 0.05  # beyond its deadline, before a source that does not keep it is given up
_REFRESH_S = 1.0  # time between two looks at the files of rules
_LEARN_S = 2.0  # time that a model server has to tell its inputs
_SAID = 20  # different errors of stages that the log shows in full


class RecallError(CommandError):
    """No source of recall answered."""


class _Late(Exception):
    """A stage took longer than it may."""


@dataclasses.dataclass
class _Plan:
    """A pipeline with what it needs.

    `names` are the sources of items, in the order of the bits of a mask, and `bits` has the bit of each.
    """

    config: PipelineConfig
    fusion: RankFusion | LearnedFusion
    reranker: Reranker | None
    names: tuple[str, ...]

    @functools.cached_property
    def bits(self) -> dict[str, int]:
        return {name: 1 << place for place, name in enumerate(self.names)}

    @functools.cached_property
    def stages(self) -> list[str]:
        """The names of all stages, in their order."""
        config = self.config
        recall = [f"recall.{source.name}" for source in config.sources]
        last = [*(["fine"] if config.fine else []), *(["rerank"] if self.reranker else [])]
        return [*(["rewrite"] if config.rewrite else []), *recall, "coarse", *last]


class _Trace:
    """What happened to one request."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan
        self.stages: list[Stage] = []
        self.degraded: list[str] = []
        self.rewrites: list[str] = []
        self.heads: dict[str, list[int]] = {}


class Searcher:
    """Answers searches. Create and use it within one event loop.

    Attributes:
        metrics: counters and histograms; `metrics.METRICS` lists them.
        catalogue: the items.
    """

    def __init__(self, config: SearchConfig, index: InvertedIndex) -> None:
        """Raises UsageError if a file that the configuration names is wrong, CommandError if it cannot be read."""
        self.metrics = Metrics(METRICS)
        self.catalogue: Catalogue = index.catalogue
        self._config = config
        self._index = index
        self._clients = {name: ModelClient(name, model.target, model.model) for name, model in config.models.items()}
        self._threads = SearchThreads(config.limits.searches, config.limits.waiting_searches)
        self._rules: dict[str, RuleFile] = {}
        self._plans = {name: self._plan(pipeline) for name, pipeline in config.pipelines.items()}
        self._reading_users = self._models_that_read_users()
        self._arms = {f"{one.name}/{arm}" for one in config.experiments.values() for arm in one.pipelines}
        self._said: set[tuple[str, str]] = set()
        self._background: list[asyncio.Task[None]] = []
        self._fingerprint = cursor.fingerprint(self.catalogue.manifest)

    def _plan(self, pipeline: PipelineConfig) -> _Plan:
        coarse, reranker = pipeline.coarse, None
        fusion: RankFusion | LearnedFusion
        if coarse.file is None:
            fusion = RankFusion({source.name: source.weight for source in pipeline.sources}, coarse.min_score)
        else:
            fusion = LearnedFusion.read(Path(coarse.file))
            fusion.check_sources({source.name: source.k for source in pipeline.sources}, coarse.file)
            if coarse.min_score is not None:
                fusion = dataclasses.replace(fusion, min_score=coarse.min_score)
        if pipeline.rerank is not None:
            path = pipeline.rerank.rules
            if path is not None and path not in self._rules:
                self._rules[path] = RuleFile(Path(path), self.catalogue)
            reranker = Reranker(pipeline.rerank, self.catalogue, None if path is None else self._rules[path])
        names = (*(source.name for source in pipeline.sources), IDENTIFIER)
        return _Plan(pipeline, fusion, reranker, names)

    def start(self) -> None:
        """Begins to learn the models' inputs, and to look at the files of rules."""
        self._background = [asyncio.create_task(self._learn()), asyncio.create_task(self._watch())]

    async def close(self) -> None:
        """Closes the connections to the models."""
        for task in self._background:
            task.cancel()
        for client in self._clients.values():
            await client.close()
        self._threads.close()

    async def _learn(self) -> None:
        """Asks each model for its inputs, so that the first requests do not wait for them."""
        wanted = {(fine.model, "rank") for plan in self._plans.values() if (fine := plan.config.fine)}
        for plan in self._plans.values():
            wanted |= {(source.model, "search") for source in plan.config.sources if source.model}
        for model, signature in sorted(wanted):
            try:
                await self._clients[model].known_signature(signature, _LEARN_S)
            except ServingError as error:
                _log.warning("model %s: %s", model, error)

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while self._rules:
            await asyncio.sleep(_REFRESH_S)
            for path, rules in self._rules.items():
                await loop.run_in_executor(None, rules.refresh)
                for result, count in rules.reloads.items():
                    self.metrics.set_one("dpsr_search_rule_reloads_total", (path, result), count)

    # Requests.

    async def search(self, request: SearchRequest) -> SearchResponse:
        """Answers a request.

        Raises:
            RequestError: the request is wrong.
            RecallError: no source of recall answered.
        """
        config = self._config
        if request.size > config.limits.page_size:
            raise RequestError(f"size: got {request.size}, expected at most {config.limits.page_size}")
        for name in request.facets:
            if name not in self.catalogue.attributes:
                raise RequestError(f"facets: there is no attribute {name!r}, expected one of {self._attributes()}")
        if request.cursor:
            return self._later_page(request)
        plan, arm = self._assign(request)
        try:
            conditions = self.catalogue.conditions(request.filters)
        except ValueError as error:
            raise RequestError(f"filters: {error}") from None
        self._check_features(request.user)
        return await self._first_page(request, plan, arm, conditions)

    async def found(self, query: str, pipeline: str) -> dict[str, Found]:
        """Returns what each source of a pipeline finds for a query.

        Raises:
            RecallError: a source does not answer.
        """
        trace = _Trace(self._plans[pipeline])
        ends = time.monotonic() + trace.plan.config.deadline_ms / 1000
        found = await self._recall(SearchRequest(query), trace, (), ends)
        errors = [f"{stage.name}: {stage.error}" for stage in trace.stages if stage.error]
        if errors:
            raise RecallError(f"the query {query!r}: {'; '.join(errors)}")
        return found

    def _assign(self, request: SearchRequest) -> tuple[_Plan, str]:
        """Returns the pipeline of a request, and "experiment/arm" if an experiment chose it."""
        asked = request.pipeline or self._config.default
        if asked not in self._plans:
            raise RequestError(f"pipeline: got {asked!r}, expected one of {', '.join(self._plans)}")
        experiment = self._config.experiments.get(asked)
        if experiment is None:
            if request.arm:
                raise RequestError(f"arm: got {request.arm!r}, but the pipeline {asked!r} has no experiment")
            return self._plans[asked], ""
        if request.arm and request.arm not in experiment.pipelines:
            raise RequestError(f"arm: got {request.arm!r}, expected one of {', '.join(experiment.pipelines)}")
        key = "" if request.user_id is None else str(request.user_id)
        arm = request.arm or assign(experiment.name, key, experiment.weights)
        return self._plans[experiment.pipelines[arm]], f"{experiment.name}/{arm}"

    def _attributes(self) -> str:
        return ", ".join(self.catalogue.attributes) or "none: name some in the schema under items.filters"

    def _check_features(self, user: User) -> None:
        """Raises RequestError for a feature that no model reads, once all models have told their inputs."""
        if user.features and all(client.signatures for client in self._reading_users):
            known = self._known_features()
            for name in user.features:
                if name not in known:
                    expected = ", ".join(known) or "none"
                    raise RequestError(f"user.features: no model reads {name!r}, expected one of {expected}")

    def _known_features(self) -> dict[str, str]:
        """Returns the user features that any model reads, as far as models have told their inputs: name -> kind."""
        signatures = [signature for client in self._reading_users for signature in client.signatures]
        return dict(sorted(pair for signature in signatures for pair in signature.feature_kinds.items()))

    def _models_that_read_users(self) -> list[ModelClient]:
        """Returns the models that read what is known about users."""
        configs = [plan.config for plan in self._plans.values()]
        names = {source.model for config in configs for source in config.sources if source.model is not None}
        names |= {config.fine.model for config in configs if config.fine is not None}
        return [self._clients[name] for name in sorted(names)]

    async def _first_page(
        self, request: SearchRequest, plan: _Plan, arm: str, conditions: tuple[Condition, ...]
    ) -> SearchResponse:
        trace, config = _Trace(plan), plan.config
        ends = time.monotonic() + config.deadline_ms / 1000
        identified = np.zeros(0, np.int64)
        if config.identifiers != "off":
            identified = self._index.identifier(request.query)
            if len(identified):
                # A placeholder, such as 00000000, may be the identifier of half of the items.
                identified = identified[self._kept(identified, conditions)][: config.coarse.size]
        found: dict[str, Found] = {}
        if not (len(identified) and config.identifiers == "only"):
            found = await self._recall(request, trace, conditions, ends)
            if not found and not len(identified):
                errors = "; ".join(f"{stage.name}: {stage.error}" for stage in trace.stages if stage.error)
                raise RecallError(f"no source of recall answered: {errors}")
        ranked = self._coarse(trace, found, identified)
        if config.fine is not None and len(ranked.ids):
            await self._fine(request, trace, ranked, ends)
        final = self._rerank(request, trace, ranked, conditions)
        return self._answer(request, trace, final, arm)

    # Recall.

    async def _recall(
        self, request: SearchRequest, trace: _Trace, conditions: tuple[Condition, ...], ends: float
    ) -> dict[str, Found]:
        """Asks all sources at the same time. Returns what those found that answered in time.

        As long as no source has answered, those that are late are waited for: a late answer is better than none.
        """
        config, start, began = trace.plan.config, time.perf_counter(), time.monotonic()
        rewriting_ms = config.rewrite.deadline_ms if config.rewrite is not None else 0.0
        tasks = {source.name: asyncio.ensure_future(self._source(request, trace, source, conditions, ends))
                 for source in config.sources}  # fmt: skip
        allowed = {
            source.name: (source.deadline_ms + (rewriting_ms if source.name == REWRITTEN else 0.0)) / 1000
            for source in config.sources
        }

        def is_answered() -> bool:
            return any(task.done() and not task.cancelled() and task.result() is not None for task in tasks.values())

        try:
            for allowed_s in sorted({*allowed.values(), np.inf}):
                running = [task for task in tasks.values() if not task.done()]
                while running and (allowed_s < np.inf or not is_answered()):
                    left_s = min(began + allowed_s, ends + _GRACE_S) - time.monotonic()
                    if left_s <= 0:
                        break
                    first = asyncio.FIRST_COMPLETED if allowed_s == np.inf else asyncio.ALL_COMPLETED
                    await asyncio.wait(running, timeout=left_s, return_when=first)
                    running = [task for task in running if not task.done()]
                if running and is_answered():
                    for name, task in tasks.items():
                        if allowed[name] <= allowed_s and not task.done():
                            task.cancel()
        except asyncio.CancelledError:  # the client is gone
            for task in tasks.values():
                task.cancel()
            raise
        for name, task in tasks.items():
            if not task.done() or task.cancelled():
                task.cancel()
                self._left_out(trace, f"recall.{name}", 0, start, _Late(), min(allowed[name], ends - began))
        answers = {name: task.result() for name, task in tasks.items() if task.done() and not task.cancelled()}
        return {name: answer for name, answer in answers.items() if answer is not None}

    async def _source(
        self,
        request: SearchRequest,
        trace: _Trace,
        source: SourceConfig,
        conditions: tuple[Condition, ...],
        ends: float,
    ) -> Found | None:
        texts = [(request.query, 1.0)]
        if source.name == REWRITTEN:
            rewrites = await self._rewrite(request, trace, ends)
            if rewrites is None:
                return None
            trace.rewrites = rewrites
            texts = [(text, 1.0) for text in rewrites]
            if not texts:
                return Found.nothing()
        work: Callable[[float], Awaitable[Found]]
        if source.model is None:
            work = lambda left_s: self._look_up(texts, source.k, conditions, left_s)  # noqa: E731
        else:
            work = lambda left_s: self._ask_model(request, trace, source, left_s)  # noqa: E731
        # `_recall` keeps the source's own deadline.
        found = await self._stage(trace, f"recall.{source.name}", 0, trace.plan.config.deadline_ms, ends, work)
        if found is None:
            return None
        if source.model is None or not conditions:
            return found  # the index keeps the filters; `_coarse` leaves out items that the catalogue does not have
        kept = self._kept(found.ids, conditions)
        if len(kept) < len(found):
            found = Found(found.ids[kept], found.scores[kept])
        return found

    def _kept(self, ids: NDArray[np.int64], conditions: tuple[Condition, ...]) -> NDArray[np.int64]:
        """Returns the places of the items that the catalogue knows and that pass the filters."""
        rows = self.catalogue.rows(ids)
        kept = np.flatnonzero(rows >= 0)
        return kept[self.catalogue.matches(rows[kept], conditions)] if conditions else kept

    async def _look_up(
        self, texts: Sequence[tuple[str, float]], k: int, conditions: tuple[Condition, ...], left_s: float
    ) -> Found:
        """Searches the inverted index in a thread, in which the engine does not hold the interpreter."""
        start = time.thread_time()
        search = self._index.prepare(texts, k, conditions)
        self._threads.cpu_s += time.thread_time() - start
        found = await self._threads.run(search, left_s)
        self.metrics.set_one("dpsr_search_index_cpu_seconds_total", (), self._threads.cpu_s)
        return found

    async def _ask_model(self, request: SearchRequest, trace: _Trace, source: SourceConfig, left_s: float) -> Found:
        """Asks a retrieval model."""
        assert source.model is not None
        client = self._clients[source.model]
        start = time.monotonic()
        signature = await client.known_signature("search", left_s)
        ids, scores, heads = await client.find(
            request.query,
            source.k,
            fitting(request.user, signature, self._as_models_know),
            request.filters,
            source.parameters,
            self._metadata(source.model, request),
            max(left_s - (time.monotonic() - start), 0.0),
            with_heads=request.explain,
        )
        if heads is not None and len(heads):
            trace.heads[source.name] = np.bincount(np.maximum(heads, 0)).tolist()
        return Found(ids, scores)

    async def _rewrite(self, request: SearchRequest, trace: _Trace, ends: float) -> list[str] | None:
        config = trace.plan.config.rewrite
        assert config is not None
        client = self._clients[config.model]
        least = -np.inf if config.min_log_probability is None else config.min_log_probability

        async def ask(left_s: float) -> list[str]:
            rewrites = await client.rewrites(request.query, config.n, self._metadata(config.model, request), left_s)
            return [rewrite.text for rewrite in rewrites if rewrite.log_probability >= least]

        return await self._stage(trace, "rewrite", 1, config.deadline_ms, ends, ask)

    def _metadata(self, model: str, request: SearchRequest) -> dict[str, str] | None:
        """Returns the metadata by which a proxy assigns the arms of its own experiments."""
        key = self._config.models[model].metadata_key
        if key is None or request.user_id is None:
            return None
        text = str(request.user_id)
        # gRPC's metadata is printable ASCII.
        return {key: text} if text.isascii() and text.isprintable() else None

    def _as_models_know(self, item: int | str) -> int | str | None:
        """Returns an item of the request as models identify it; None if it cannot be one."""
        if self.catalogue.has_keys:
            return str(item)
        try:
            number = int(item)
        except ValueError:
            return None
        return number if -(2**63) <= number < 2**63 else None

    # The stages after recall.

    def _coarse(self, trace: _Trace, found: Mapping[str, Found], identified: NDArray[np.int64]) -> _Ranked:
        """Joins the sources to one list. If that fails, they are joined by their ranks."""
        start, plan = time.perf_counter(), trace.plan
        size, error = plan.config.coarse.size, ""
        try:
            combined = plan.fusion.combine(found, size)
        except Exception as failure:
            error = self._failed(trace, "coarse", failure)
            combined = RankFusion().combine(found, size)
        ranked = _Ranked(combined, self.catalogue.rows(combined.ids), plan.bits)
        if len(identified):
            ranked.put_first(identified, self.catalogue.rows(identified), plan.bits[IDENTIFIER])
        self._took(trace, "coarse", sum(map(len, found.values())), len(ranked.ids), start, error)
        return ranked

    async def _fine(self, request: SearchRequest, trace: _Trace, ranked: _Ranked, ends: float) -> None:
        """Puts the best of the list into the order of the ranker's scores."""
        config = trace.plan.config.fine
        assert config is not None
        size = min(config.size, len(ranked.ids))
        client, keyed = self._clients[config.model], self.catalogue.has_keys
        ids = ranked.ids[:size]
        items = self.catalogue.keys_of(ranked.rows[:size]) if keyed else ids.tolist()
        dpsr_scores = ranked.source_scores(config.dpsr_source, size) if config.dpsr_source else None

        async def ask(left_s: float) -> NDArray[np.float32]:
            start = time.monotonic()
            signature = await client.known_signature("rank", left_s)
            user = dataclasses.replace(fitting(request.user, signature, self._as_models_know), past_queries=())
            return await client.rank(
                request.query,
                items,
                metadata=self._metadata(config.model, request),
                timeout_s=max(left_s - (time.monotonic() - start), 0.0),
                user=user,
                user_id=request.user_id if isinstance(request.user_id, int) else None,
                dpsr_scores=() if dpsr_scores is None else dpsr_scores.tolist(),
            )

        scores = await self._stage(trace, "fine", size, config.deadline_ms, ends, ask)
        if scores is not None:
            ranked.put_fine(scores.astype(np.float64))

    def _rerank(
        self, request: SearchRequest, trace: _Trace, ranked: _Ranked, conditions: tuple[Condition, ...]
    ) -> _Final:
        start, reranker, ids, rows = time.perf_counter(), trace.plan.reranker, ranked.ids, ranked.rows
        plain = _Final(ranked, rows, np.arange(len(ids)), np.ones(len(ids), np.int64), None)
        if reranker is None:
            return plain
        try:
            result = reranker.apply(ids, rows, ranked.scores, request.query, time.time(), conditions or None)
        except Exception as failure:
            self._took(trace, "rerank", len(ids), len(ids), start, self._failed(trace, "rerank", failure))
            return plain
        self._took(trace, "rerank", len(ids), len(result.ids), start)
        return _Final(ranked, result.rows, result.source, result.variants, result.reasons)

    # Stages in general.

    async def _stage(
        self,
        trace: _Trace,
        name: str,
        items_in: int,
        deadline_ms: float,
        ends: float,
        work: Callable[[float], Awaitable[T]],
    ) -> T | None:
        """Returns the result of a stage, or None if it failed or was late. `work` takes the seconds that are left."""
        start = time.perf_counter()
        left_s = min(deadline_ms / 1000, ends - time.monotonic())
        try:
            if left_s <= 0:
                raise _Late
            result = await work(left_s)
        except asyncio.CancelledError:
            raise
        except Exception as failure:
            self._left_out(trace, name, items_in, start, failure, left_s)
            return None
        self._took(trace, name, items_in, len(result), start)  # type: ignore[arg-type]
        return result

    def _failed(self, trace: _Trace, name: str, failure: Exception) -> str:
        """Notes that a stage of our own failed; returns what went wrong."""
        trace.degraded.append(name)
        self.metrics.count("dpsr_search_left_out_total", (trace.plan.config.name, name, "failed"))
        return self._say(trace.plan, name, failure)

    def _left_out(
        self, trace: _Trace, name: str, items_in: int, start: float, failure: Exception, left_s: float
    ) -> None:
        trace.degraded.append(name)
        late = isinstance(failure, (_Late, asyncio.TimeoutError)) or (
            isinstance(failure, ServingError) and failure.code is grpc.StatusCode.DEADLINE_EXCEEDED
        )
        reason = "late" if late else "busy" if isinstance(failure, ThreadsBusyError) else "failed"
        self.metrics.count("dpsr_search_left_out_total", (trace.plan.config.name, name, reason))
        error = f"no answer within {left_s * 1000:.0f} ms" if late else self._say(trace.plan, name, failure)
        self._took(trace, name, items_in, 0, start, error)

    def _took(self, trace: _Trace, name: str, items_in: int, items_out: int, start: float, error: str = "") -> None:
        seconds = time.perf_counter() - start
        self.metrics.observe("dpsr_search_stage_seconds", (trace.plan.config.name, name), seconds)
        trace.stages.append(Stage(name, items_in, items_out, seconds * 1000, error))

    def _say(self, plan: _Plan, stage: str, failure: Exception) -> str:
        """Returns what went wrong in a stage, and logs an error once, with its traceback where it is our own."""
        error = " ".join(str(failure).split()) or type(failure).__name__
        expected = isinstance(failure, (ServingError, CommandError, ValueError, ThreadsBusyError))
        known = (stage, type(failure).__name__)
        if known not in self._said and len(self._said) < _SAID:
            self._said.add(known)
            _log.warning("pipeline %s: %s: %s", plan.config.name, stage, error, exc_info=not expected)
        return error if expected else f"{type(failure).__name__}: {error}"

    # Answers.

    def _answer(self, request: SearchRequest, trace: _Trace, final: _Final, arm: str) -> SearchResponse:
        plan, ranked, size = trace.plan, final.ranked, request.size
        if trace.degraded:
            trace.degraded.sort(key=plan.stages.index)
        listed = cursor.List(
            query=request.query,
            pipeline=plan.config.name,
            arm=arm,
            filters=cursor.digest(request.filters),
            degraded=tuple(trace.degraded),
            rewrites=tuple(trace.rewrites),
            rows=final.rows,
            scores=final.scores(),
            variants=final.variants,
            sources=final.sources(),
        )
        items = self._items(listed, 0, size)
        explanation = None
        if request.explain:
            items = [dataclasses.replace(item, explain=final.why(place)) for place, item in enumerate(items)]
            order = plan.stages
            explanation = Explanation(
                stages=sorted(trace.stages, key=lambda stage: order.index(stage.name)),
                tokens=self._index.tokens(request.query),
                heads=trace.heads,
                cut_off=ranked.cut_off,
                identifier=ranked.identified > 0,
            )
        if not items:
            self.metrics.count("dpsr_search_empty_total", (plan.config.name,))
        return self._page(listed, items, request, size, explanation)

    def _later_page(self, request: SearchRequest) -> SearchResponse:
        try:
            listed, begin = cursor.unpack(request.cursor, self._fingerprint, self.catalogue.num_items)
        except ValueError as error:
            raise RequestError(f"cursor: {error}") from None
        for name, given, of_list in (
            ("query", request.query, listed.query),
            ("filters", request.filters and cursor.digest(request.filters), listed.filters),
        ):
            if given and given != of_list:
                raise RequestError(f"cursor: belongs to a search with another {name}; leave out {name} or the cursor")
        if listed.pipeline not in self._plans:
            raise RequestError("cursor: belongs to a pipeline that is not configured any more; search again")
        if listed.arm not in self._arms:
            # Of an experiment that has ended, or made up by the client: metrics must not get labels from requests.
            listed = dataclasses.replace(listed, arm="")
        return self._page(listed, self._items(listed, begin, request.size), request, begin + request.size, None)

    def _page(
        self,
        listed: cursor.List,
        items: Sequence[Item],
        request: SearchRequest,
        end: int,
        explanation: Explanation | None,
    ) -> SearchResponse:
        facets = {}
        if request.facets:
            counted = self.catalogue.facets(listed.rows, request.facets, _FACET_VALUES)
            facets = {name: _facet(one) for name, one in counted.items()}
        return SearchResponse(
            query=listed.query,
            pipeline=listed.pipeline,
            total=len(listed.rows),
            items=items,
            facets=facets,
            next_cursor=cursor.pack(listed, end, self._fingerprint) if end < len(listed.rows) else "",
            degraded=listed.degraded,
            rewrites=listed.rewrites,
            explain=explanation,
            arm=listed.arm,
        )

    def _items(self, listed: cursor.List, begin: int, size: int) -> list[Item]:
        catalogue, names = self.catalogue, self._plans[listed.pipeline].names
        part = slice(begin, begin + size)
        rows = listed.rows[part]
        groups = catalogue.group(rows).tolist()
        found_by = {mask: _named(mask, names) for mask in set(listed.sources[part].tolist())}
        return [
            Item(
                id=id,
                key=key,
                title=title,
                attributes=attributes,
                score=score,
                group=catalogue.group_text(group),
                variants=variants,
                sources=found_by[mask],
            )
            for id, (key, title, attributes), group, score, variants, mask in zip(
                catalogue.ids[rows].tolist(),
                catalogue.cards(rows),
                groups,
                listed.scores[part].tolist(),
                listed.variants[part].tolist(),
                listed.sources[part].tolist(),
                strict=True,
            )
        ]

    def describe(self) -> dict[str, Any]:
        """Returns what GET /v1/pipelines answers."""
        pipelines = []
        for name, plan in self._plans.items():
            experiment = self._config.experiments.get(name)
            arms = list(experiment.pipelines) if experiment else []
            pipelines.append({"name": name, "stages": plan.stages, "arms": arms})
        attributes: list[dict[str, Any]] = []
        for name, attribute in self.catalogue.attributes.items():
            entry: dict[str, Any] = {"name": name, "kind": attribute.kind}
            if attribute.texts is not None:
                entry["values"] = [attribute.texts[i] for i in range(min(len(attribute.texts), _SHOWN_VALUES))]
            attributes.append(entry)
        return {
            "pipelines": pipelines,
            "default": self._config.default,
            "attributes": attributes,
            "user_features": [{"name": name, "kind": kind} for name, kind in self._known_features().items()],
        }


class _Ranked:
    """The list after coarse ranking, and after fine ranking if there is one; n items, best first.

    Attributes:
        ids, rows: [n] int64.
        scores: [n] float64, of the last stage that ranked them.
        coarse: [n] float64, scores of coarse ranking.
        fine: [n] float64, the ranker's scores, NaN where it gave none; None without a ranker.
        sources: [n] uint16, masks of the sources that found each item.
        identified: number of items whose identifier the query is; they are the first ones.
        cut_off: items that were left out because their score was too low.
    """

    def __init__(self, combined: Combined, rows: NDArray[np.int64], bits: Mapping[str, int]) -> None:
        """Takes the rows of the items; those that the catalogue does not have (-1) are left out.

        `bits`: source -> its bit in a mask.
        """
        self.ids, self.rows = combined.ids, rows
        self.scores = self.coarse = combined.scores.astype(np.float64)
        self.fine: NDArray[np.float64] | None = None
        self.sources = combined.masks(bits)
        self.identified, self.cut_off = 0, combined.cut_off
        self._combined = combined
        self._places = np.arange(len(rows))  # of the items in `combined`, -1 for those that it does not have
        if len(rows) and rows.min() < 0:
            self._take(np.flatnonzero(rows >= 0))
            self.scores = self.coarse

    def put_first(self, identified: NDArray[np.int64], rows: NDArray[np.int64], bit: int) -> None:
        """Puts items first, whatever the scores of the others. `bit`: what their masks get besides."""
        rest = np.flatnonzero(~np.isin(self.ids, identified))
        place_of = {item: place for place, item in enumerate(self.ids.tolist())}
        at = np.array([place_of.get(item, -1) for item in identified.tolist()], np.int64)
        known, top = at >= 0, self.coarse.max(initial=0.0) + 1.0

        def joined(first: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
            return np.concatenate([first.astype(values.dtype), values[rest]])

        masks, places = np.zeros(len(at), np.uint16), np.full(len(at), -1)
        masks[known], places[known] = self.sources[at[known]], self._places[at[known]]
        self.ids, self.rows = joined(identified, self.ids), joined(rows, self.rows)
        self.scores = self.coarse = joined(np.full(len(at), top), self.coarse)
        self.sources, self._places = joined(masks | np.uint16(bit), self.sources), joined(places, self._places)
        self.identified = len(identified)

    def put_fine(self, given: NDArray[np.float64]) -> None:
        """Orders the first items by the ranker's scores; the others follow in their order, with scores below."""
        fine = np.full(len(self.ids), np.nan)
        fine[: len(given)] = given
        is_scored = np.isfinite(fine)
        scored = fine[is_scored]
        if not len(scored):
            return
        fine[~is_scored] = -np.inf  # behind all others
        order = (-fine).argsort(kind="stable")
        if self.identified:
            # Items whose identifier the query is stay in front.
            order = np.concatenate([order[order < self.identified], order[order >= self.identified]])
        self._take(order)
        fine = fine[order]
        is_left = fine == -np.inf
        fine[is_left] = np.nan
        self.fine = fine
        # Before the tail, only items that stay in front have no score.
        scores = np.where(is_left, scored.max(), fine)
        is_left[: self.identified] = False
        coarse = self.coarse[is_left]
        if len(coarse):
            scores[is_left] = scored.min() - 1e-3 - (coarse[0] - coarse)
        self.scores = scores

    def by_source(self, place: int) -> dict[str, tuple[int, float]]:
        """Returns rank and score of an item in each source that found it."""
        at, combined = int(self._places[place]), self._combined
        if at < 0:
            return {}
        ranks = {name: int(ranks[at]) for name, ranks in combined.ranks.items()}
        return {name: (rank, float(combined.source_scores[name][at])) for name, rank in ranks.items() if rank}

    def source_scores(self, name: str, size: int) -> NDArray[np.float32] | None:
        """Returns the scores of the first items in a source, NaN if it did not find the item; None if it failed."""
        found, places = self._combined.source_scores.get(name), self._places[:size]
        if found is None or not len(found):
            return None
        return np.where(places >= 0, found[places], np.float32("nan"))

    def _take(self, places: NDArray[np.int64]) -> None:
        self.ids, self.rows, self.coarse = self.ids[places], self.rows[places], self.coarse[places]
        self.sources, self._places = self.sources[places], self._places[places]


@dataclasses.dataclass
class _Final:
    """The list after re-ranking; m items, best first.

    Attributes:
        ranked: the list before.
        rows: [m] int64.
        source: [m] int64, the place of each item in `ranked`; -1 for one that only a rule put there.
        variants: [m] int64, items of its group that each one stands for.
        reasons: place -> what re-ranking did; None without re-ranking.
    """

    ranked: _Ranked
    rows: NDArray[np.int64]
    source: NDArray[np.int64]
    variants: NDArray[np.int64]
    reasons: Callable[[int], list[str]] | None

    def scores(self) -> NDArray[np.float64]:
        """Returns [m] scores, NaN for items that only a rule put there."""
        return self._of(self.ranked.scores, np.nan)

    def sources(self) -> NDArray[np.uint16]:
        """Returns [m] masks of sources; 0 for items that only a rule put there."""
        return self._of(self.ranked.sources, 0)

    def _of(self, values: NDArray[Any], otherwise: float) -> NDArray[Any]:
        if not len(values):
            return np.full(len(self.source), otherwise, values.dtype)
        found = values[self.source]
        if self.source.min() < 0:
            found[self.source < 0] = otherwise
        return found

    def why(self, place: int) -> dict[str, Any]:
        """Returns Item.explain: ranks and scores of an item by stage."""
        why: dict[str, Any] = {}
        at, ranked = int(self.source[place]), self.ranked
        if at >= 0:
            for name, (rank, score) in ranked.by_source(at).items():
                why[name] = {"rank": rank, "score": rounded(score)}
            why["coarse"] = rounded(ranked.coarse[at])
            if ranked.fine is not None:
                why["fine"] = rounded(ranked.fine[at])
        if self.reasons is not None:
            why["rerank"] = self.reasons(place)
        return why


def _named(mask: int, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for bit, name in enumerate(names) if mask >> bit & 1)


def _facet(counted: Mapping[str, Any]) -> Facet:
    if counted["kind"] == "number":
        return Facet("number", minimum=counted["min"], maximum=counted["max"])
    values = [(one["value"], one["count"]) for one in counted["values"]]
    return Facet("keyword", values, more=counted["more"])
