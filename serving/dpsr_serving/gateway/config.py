"""The gateway's configuration file, in YAML. docs/search.md explains every key. An example:

index: shop/inverted                     # what `dpsr index --inverted` wrote
models:
  dpsr: {target: "127.0.0.1:8500"}
pipelines:
  bm25: {recall: {inverted: {k: 500}}}
  both: {recall: {inverted: {k: 300}, semantic: {model: dpsr, k: 300}}}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpsr_common.errors import UsageError
from dpsr_common.strict_yaml import Section, load_yaml, read_file
from dpsr_serving.addresses import check_address
from dpsr_serving.gateway.rerank import RERANK_KEYS, RerankConfig, read_config

# The two sources that ask the inverted index. Every other source asks a model.
INVERTED, REWRITTEN = "inverted", "rewritten"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model on a model server, or on servers behind a proxy.

    Attributes:
        target: "host:port" or "unix:/path".
        model: name of the model there.
        metadata_key: gRPC metadata key that carries the user's id, by which a proxy assigns arms; None: not sent.
        servable: a version directory, or a directory of versions, of the servable there; at the start the gateway
            compares its store with that of the index. None: it does not.
    """

    target: str
    model: str
    metadata_key: str | None = None
    servable: str | None = None


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of recall.

    Attributes:
        name: "inverted", "rewritten", or any name of a source that asks a model.
        model: key of a model for a semantic source, else None.
        k: number of items to find.
        deadline_ms: milliseconds after which the source is left out.
        weight: of the source in coarse ranking by ranks.
        parameters: settings of a semantic source's index that replace the servable's own, such as "nprobe=64".
    """

    name: str
    model: str | None
    k: int = 300
    deadline_ms: float = 100.0
    weight: float = 1.0
    parameters: str = ""


@dataclasses.dataclass(frozen=True)
class RewriteConfig:
    """Rewrites of the query, for the source "rewritten".

    Attributes:
        model: key of a model that `dpsr export` wrote for a rewriter.
        n: number of rewrites.
        deadline_ms: milliseconds after which rewrites are left out.
        min_log_probability: less probable rewrites are dropped; None: none is.
    """

    model: str
    n: int = 3
    deadline_ms: float = 50.0
    min_log_probability: float | None = None


@dataclasses.dataclass(frozen=True)
class CoarseConfig:
    """How the items of all sources become one list.

    Attributes:
        method: "ranks" (reciprocal ranks with the sources' weights) or "learned" (weights in `file`).
        file: what `dpsr search --learn` wrote.
        size: items that stay at most.
        min_score: items with a smaller score are cut off; None: the threshold in `file`, or no cut-off.
    """

    method: str = "ranks"
    file: str | None = None
    size: int = 500
    min_score: float | None = None


@dataclasses.dataclass(frozen=True)
class FineConfig:
    """The ranker.

    Attributes:
        model: key of a model that `dpsr export` wrote for a ranker.
        size: the best items of coarse ranking that it scores; the others follow in their order.
        deadline_ms: milliseconds after which coarse ranking's order stays.
        dpsr_source: semantic source whose scores the ranker reads as `dpsr_score`; None: the ranker reads none.
    """

    model: str
    size: int = 200
    deadline_ms: float = 100.0
    dpsr_source: str | None = None


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """The stages of a search. `identifiers` says what an exact identifier as query does: "first", "only", "off"."""

    name: str
    sources: tuple[SourceConfig, ...]
    rewrite: RewriteConfig | None = None
    coarse: CoarseConfig = CoarseConfig()
    fine: FineConfig | None = None
    rerank: RerankConfig | None = None
    identifiers: str = "first"
    deadline_ms: float = 1000.0


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """An experiment that splits the requests for one pipeline into arms, by the user's id.

    Attributes:
        name: in metrics and answers, and in the hash that assigns arms (dpsr_serving/proxy/experiments.py).
        weights: weight of each arm, above 0, on any scale, in order.
        pipelines: the pipeline of each arm.
    """

    name: str
    weights: Mapping[str, float]
    pipelines: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class LimitsConfig:
    """What clients may ask of the gateway.

    Attributes:
        body_bytes: of one request.
        page_size: items on one page.
        concurrent: requests under way; more are refused with status 503.
        connections: connections of clients over REST; further ones are closed.
        idle_s: seconds without a request, before a connection is ended.
        receive_s: seconds that a client may take to send one request.
        answer_s: seconds that a client over REST may take to read its answers.
        searches: threads that search the inverted index.
        waiting_searches: searches of the inverted index that may wait for a thread; more are left out as busy.
    """

    body_bytes: int = 2**18
    page_size: int = 200
    concurrent: int = 256
    connections: int = 1024
    idle_s: float = 75.0
    receive_s: float = 10.0
    answer_s: float = 60.0
    searches: int = 4
    waiting_searches: int = 64


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """The whole file. `default` is the pipeline of requests that name none."""

    index: str
    models: Mapping[str, ModelConfig]
    pipelines: Mapping[str, PipelineConfig]
    default: str
    experiments: Mapping[str, ExperimentConfig] = dataclasses.field(default_factory=dict)
    limits: LimitsConfig = LimitsConfig()


def load_config(path: Path) -> SearchConfig:
    """Reads a configuration file. Raises UsageError that names the file, the line, the key and what is allowed."""
    return read_file(path, lambda text: parse_config(text, path.parent))


def parse_config(text: str, folder: Path = Path()) -> SearchConfig:
    """Reads a configuration. Relative paths begin at `folder`. Raises UsageError."""
    top = Section(
        "",
        load_yaml(text, lines=True),
        ("index", "models", "pipelines", "default", "experiments", "limits"),
    )
    index = top.text("index", None)
    if index is None:
        raise top.error("index", "got None, expected the directory that `dpsr index --inverted` wrote")
    models = {name: _model(section, folder) for name, section in _named(top, "models", _fields(ModelConfig)).items()}
    pipelines = {
        name: _pipeline(name, section, models, folder)
        for name, section in _named(top, "pipelines", _PIPELINE_KEYS).items()
    }
    if not pipelines:
        raise top.error("pipelines", "got none, expected at least one: `NAME: {recall: {inverted: {k: 300}}}`")
    experiments = {
        name: _experiment(name, section, pipelines)
        for name, section in _named(top, "experiments", ("name", "arms")).items()
    }
    for name in experiments:
        if name not in pipelines:
            raise Section("experiments", top.tree["experiments"], tuple(experiments)).error(
                name, f"expected the name of a pipeline: {', '.join(pipelines)}"
            )
    return SearchConfig(
        index=_path(index, folder),
        models=models,
        pipelines=pipelines,
        default=_one_of(top, "default", pipelines, "pipeline") or next(iter(pipelines)),
        experiments=experiments,
        limits=_limits(top.section("limits", _fields(LimitsConfig))),
    )


def _fields(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def _named(top: Section, key: str, allowed: tuple[str, ...]) -> dict[str, Section]:
    """Returns the sections of a mapping of names."""
    tree = top.tree.get(key, {})
    if not isinstance(tree, dict):
        raise top.error(key, f"got {tree!r}, expected a mapping of names")
    for name in tree:
        if not isinstance(name, str) or not name or len(name) > 100:
            raise top.error(key, f"got the name {name!r}, expected a text of 1 to 100 characters (quote it)")
    names = Section(key, tree, tuple(tree))
    return {name: names.section(name, allowed) for name in tree}


def _path(path: str, folder: Path) -> str:
    return str(folder / path)


def _one_of(section: Section, name: str, known: Mapping[str, Any], what: str) -> str | None:
    """Reads the name of a model, pipeline or source."""
    found: str | None = section.text(
        name, None, known.__contains__, f"one of the configured {what}s: {', '.join(known) or 'there are none'}"
    )
    return found


def _model(section: Section, folder: Path) -> ModelConfig:
    target = section.tree.get("target")
    if target is None:
        raise section.error("target", "got None, expected host:port")
    if not (isinstance(target, str) and target.startswith("unix:/")):
        try:
            check_address("target", target)
        except UsageError as error:
            raise section.error("target", str(error).partition(": ")[2]) from None
    key = section.text(
        "metadata_key",
        None,
        lambda value: value == value.lower() and not value.endswith("-bin") and value.isascii(),
        "a metadata key: lower case, not ending in -bin",
    )
    default = section.key.rstrip(".").rpartition(".")[2]
    servable = section.text("servable", None)
    return ModelConfig(
        target, section.text("model", default), key, None if servable is None else _path(servable, folder)
    )


_PIPELINE_KEYS = ("rewrite", "recall", "coarse", "fine", "rerank", "identifiers", "deadline_ms")


def _pipeline(name: str, section: Section, models: Mapping[str, ModelConfig], folder: Path) -> PipelineConfig:
    recall = _named_sources(section)
    sources = tuple(_source(one, part, models) for one, part in recall.items())
    rewrite = None
    if "rewrite" in section.tree:
        rewrite = _rewrite(section.section("rewrite", _fields(RewriteConfig)), models)
    has_rewritten = REWRITTEN in recall
    if has_rewritten and rewrite is None:
        raise section.error("recall", f"got the source {REWRITTEN!r}, expected a section `rewrite` beside recall")
    if rewrite is not None and not has_rewritten:
        raise section.error("rewrite", f"nothing looks rewrites up; add the source {REWRITTEN!r} to recall")
    fine = None
    if "fine" in section.tree:
        semantic = {source.name: source for source in sources if source.model is not None}
        fine = _fine(section.section("fine", _fields(FineConfig)), models, semantic)
    rerank = None
    if "rerank" in section.tree:
        rerank = read_config(section.section("rerank", RERANK_KEYS), folder)
    return PipelineConfig(
        name=name,
        sources=sources,
        rewrite=rewrite,
        coarse=_coarse(section.section("coarse", _fields(CoarseConfig)), folder),
        fine=fine,
        rerank=rerank,
        identifiers=section.text(
            "identifiers", "first", ("first", "only", "off").__contains__, "'first', 'only' or 'off'"
        ),
        deadline_ms=section.number("deadline_ms", PipelineConfig.deadline_ms),
    )


# What answers call other things than sources.
_RESERVED = ("identifier", "coarse", "fine", "rerank")
_SOURCE_KEYS = ("k", "deadline_ms", "weight")
_SEMANTIC_KEYS = ("model", *_SOURCE_KEYS, "parameters")


def _named_sources(section: Section) -> dict[str, Section]:
    recall = section.tree.get("recall")
    if not isinstance(recall, dict) or not recall:
        raise section.error(
            "recall",
            f"got {recall!r}, expected at least one source: {INVERTED}, {REWRITTEN}, or NAME: {{model: MODEL}}",
        )
    part = Section(f"{section.key}recall", recall, tuple(recall))
    for name in recall:
        if not isinstance(name, str) or not name or len(name) > 100 or name in _RESERVED:
            raise part.error(
                name,
                f"expected a text of 1 to 100 characters as the name of a source, and none of {', '.join(_RESERVED)}",
            )
    if len(recall) > 8:
        raise section.error("recall", f"got {len(recall)} sources, expected at most 8")
    return {
        name: part.section(name, _SOURCE_KEYS if name in (INVERTED, REWRITTEN) else _SEMANTIC_KEYS) for name in recall
    }


def _source(name: str, section: Section, models: Mapping[str, ModelConfig]) -> SourceConfig:
    model = None
    if name not in (INVERTED, REWRITTEN):
        model = _one_of(section, "model", models, "model")
        if model is None:
            raise section.error("model", f"got None, expected one of the configured models: {', '.join(models)}")
    return SourceConfig(
        name=name,
        model=model,
        k=_at_most(section, "k", SourceConfig.k, 10_000),
        deadline_ms=section.number("deadline_ms", SourceConfig.deadline_ms),
        weight=section.number("weight", SourceConfig.weight),
        parameters=section.text("parameters", ""),
    )


def _at_most(section: Section, name: str, default: int, most: int) -> int:
    return int(
        section.value(
            name,
            default,
            lambda value: isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most,
            f"an integer from 1 to {most}",
        )
    )


def _needed_model(section: Section, models: Mapping[str, ModelConfig]) -> str:
    model = _one_of(section, "model", models, "model")
    if model is None:
        raise section.error("model", f"got None, expected one of the configured models: {', '.join(models)}")
    return model


def _rewrite(section: Section, models: Mapping[str, ModelConfig]) -> RewriteConfig:
    return RewriteConfig(
        model=_needed_model(section, models),
        n=_at_most(section, "n", RewriteConfig.n, 10),
        deadline_ms=section.number("deadline_ms", RewriteConfig.deadline_ms),
        min_log_probability=section.number("min_log_probability", None, least=-1e9, most=0),
    )


def _coarse(section: Section, folder: Path) -> CoarseConfig:
    method = section.text("method", "ranks", ("ranks", "learned").__contains__, "'ranks' or 'learned'")
    file = section.text("file", None)
    if (method == "learned") != (file is not None):
        raise section.error(
            "file", f"got {file!r} with method {method!r}; the method 'learned', and no other, needs it"
        )
    return CoarseConfig(
        method=method,
        file=None if file is None else _path(file, folder),
        size=_at_most(section, "size", CoarseConfig.size, 5000),
        min_score=section.number("min_score", None, least=-1e9),
    )


def _fine(section: Section, models: Mapping[str, ModelConfig], semantic: Mapping[str, SourceConfig]) -> FineConfig:
    return FineConfig(
        model=_needed_model(section, models),
        size=_at_most(section, "size", FineConfig.size, 5000),
        deadline_ms=section.number("deadline_ms", FineConfig.deadline_ms),
        dpsr_source=_one_of(section, "dpsr_source", semantic, "semantic source"),
    )


def _experiment(name: str, section: Section, pipelines: Mapping[str, PipelineConfig]) -> ExperimentConfig:
    arms = section.tree.get("arms")
    if not isinstance(arms, dict) or not arms or not all(isinstance(arm, str) and arm for arm in arms):
        raise section.error("arms", f"got {arms!r}, expected a mapping of names to {{weight: ..., pipeline: ...}}")
    part = Section(f"{section.key}arms", arms, tuple(arms))
    weights, targets = {}, {}
    for arm in arms:
        one = part.section(arm, ("weight", "pipeline"))
        pipeline = _one_of(one, "pipeline", pipelines, "pipeline")
        if pipeline is None:
            raise one.error("pipeline", f"got None, expected one of the configured pipelines: {', '.join(pipelines)}")
        if "weight" not in one.tree:
            raise one.error("weight", "got None, expected a number above 0")
        weights[arm], targets[arm] = float(one.number("weight", 0.0)), pipeline
    return ExperimentConfig(section.text("name", name), weights, targets)


_COUNTS = {
    "body_bytes": 2**26,
    "page_size": 1000,
    "concurrent": 65536,
    "connections": 65536,
    "searches": 256,
    "waiting_searches": 65536,
}


def _limits(section: Section) -> LimitsConfig:
    preset = LimitsConfig()
    found: dict[str, Any] = {
        name: _at_most(section, name, getattr(preset, name), most) for name, most in _COUNTS.items()
    }
    for name in ("idle_s", "receive_s", "answer_s"):
        found[name] = section.number(name, getattr(preset, name))
    return LimitsConfig(**found)
