"""`dpsr search --learn`: learns the coarse ranking of a pipeline from judgments, with what its sources find."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Set
from pathlib import Path

from dpsr_common.errors import UsageError
from dpsr_serving.gateway import fusion
from dpsr_serving.gateway.config import CoarseConfig, PipelineConfig, SearchConfig
from dpsr_serving.gateway.inverted import Found, InvertedIndex
from dpsr_serving.gateway.pipeline import Searcher

_UNDER_WAY = 8  # queries that are asked at the same time
_PATIENCE_MS = 60_000.0  # nobody waits for an answer, so no source is left out for being late


def learn(
    config: SearchConfig,
    index: InvertedIndex,
    pipeline: str,
    judged: Mapping[str, Set[int]],
    keep: float,
    out: Path,
) -> fusion.LearnedFusion:
    """Asks the sources of a pipeline for every judged query, learns from what they find, and writes `out`.

    Args:
        config: has the pipeline. Its coarse ranking need not exist yet.
        index: the inverted index.
        pipeline: name of the pipeline.
        judged: query -> ids of its relevant items.
        keep: share of the relevant items found that the cut-off is to keep, above 0 to 1.
        out: the file to write.

    Raises:
        UsageError: there is no such pipeline.
        CommandError: a source does not answer, too few queries have a relevant item that was found, or `out` cannot be
            written.
    """
    if pipeline not in config.pipelines:
        raise UsageError(f"--pipeline={pipeline}: expected one of {', '.join(config.pipelines)}")
    patient = _patient(config.pipelines[pipeline])
    only = dataclasses.replace(config, pipelines={pipeline: patient}, default=pipeline, experiments={})
    lists = asyncio.run(_ask(only, index, pipeline, list(judged)))
    learned = fusion.learn(lists, list(judged.values()), {source.name: source.k for source in patient.sources}, keep)
    learned.write(out)
    return learned


def _patient(pipeline: PipelineConfig) -> PipelineConfig:
    """Returns recall alone, with time limits that only a dead source reaches."""
    sources = tuple(dataclasses.replace(source, deadline_ms=_PATIENCE_MS) for source in pipeline.sources)
    rewrite = pipeline.rewrite and dataclasses.replace(pipeline.rewrite, deadline_ms=_PATIENCE_MS)
    return dataclasses.replace(
        pipeline,
        sources=sources,
        rewrite=rewrite,
        coarse=CoarseConfig(),
        fine=None,
        rerank=None,
        deadline_ms=2 * _PATIENCE_MS,
    )


async def _ask(config: SearchConfig, index: InvertedIndex, pipeline: str, queries: list[str]) -> list[dict[str, Found]]:
    """Returns what each source found for each query."""
    searcher = Searcher(config, index)
    free = asyncio.Semaphore(_UNDER_WAY)

    async def ask(query: str) -> dict[str, Found]:
        async with free:
            return await searcher.found(query, pipeline)

    tasks = [asyncio.create_task(ask(query)) for query in queries]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await searcher.close()
