"""`dpsr search`: starts the search gateway, which joins an inverted index and models to one search."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import resource
import signal
from pathlib import Path

from absl import flags

from dpsr_common.errors import UsageError
from dpsr_serving.addresses import define_listen_flags
from dpsr_serving.gateway.catalogue import check_same_store
from dpsr_serving.gateway.config import SearchConfig, load_config
from dpsr_serving.gateway.fusion import read_judgments
from dpsr_serving.gateway.inverted import open_inverted_index
from dpsr_serving.gateway.judgments import JudgmentFile
from dpsr_serving.gateway.learning import learn
from dpsr_serving.gateway.page import add_page
from dpsr_serving.gateway.pipeline import Searcher
from dpsr_serving.gateway.server import Gateway

USAGE = """
Usage: dpsr search --config=search.yaml [--host=127.0.0.1] [--port=8700] [--grpc_port=8701] [--page]
       dpsr search --config=search.yaml --learn=JUDGMENTS --pipeline=NAME --out=fusion.json

Answers searches over REST and gRPC: recall with an inverted index and with models, coarse ranking, fine ranking,
re-ranking. The smallest configuration:

  index: inverted                  # what `dpsr index --inverted` wrote
  models:
    dpsr: {target: "127.0.0.1:8500"}
  pipelines:
    both: {recall: {inverted: {k: 300}, semantic: {model: dpsr, k: 300}}}

docs/search.md explains every key. POST /v1/search answers a search; GET /v1/openapi.json describes the API.
With --learn it learns the coarse ranking of a pipeline from judged queries and ends; the pipeline then reads the file
with `coarse: {method: learned, file: fusion.json}`.

On SIGTERM the gateway accepts no new searches and lets those under way finish. A second SIGTERM ends it at once.
"""

REQUIRED_FLAGS = ("config",)

# Objects after which Python's garbage collector runs. With the usual 700 it runs several times in one search, which
# finds hundreds of items.
_COLLECT_AFTER = 10_000


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("config", None, "YAML file with the index, the models and the pipelines", flag_values=values)
    define_listen_flags(values, 8700)
    flags.DEFINE_integer(
        "grpc_port",
        None,
        "port of the gRPC API. 0 chooses a free port. Without the flag there is no gRPC port",
        lower_bound=0,
        upper_bound=65535,
        flag_values=values,
    )
    flags.DEFINE_float(
        "drain_s", 30.0, "seconds that searches under way may still take after SIGTERM", lower_bound=0,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_boolean("page", False, "serve the search page at / of the REST port", flag_values=values)
    flags.DEFINE_string(
        "judgments",
        None,
        "TSV file in which the page saves judgments. Without it nobody can judge on the page",
        flag_values=values,
    )
    flags.DEFINE_string(
        "learn", None, "TSV or CSV file of judged queries to learn the coarse ranking of --pipeline from",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("pipeline", None, "with --learn, pipeline whose coarse ranking is learned", flag_values=values)
    flags.DEFINE_string(
        "out", None, "with --learn, file to write the learned weights to, such as fusion.json", flag_values=values
    )
    flags.DEFINE_string("query_column", "query", "column of --learn with the query text", flag_values=values)
    flags.DEFINE_string("item_column", "item", "column of --learn with the item id", flag_values=values)
    flags.DEFINE_string("grade_column", "grade", "column of --learn with the grade", flag_values=values)
    flags.DEFINE_float("relevant_from", 1.0, "lowest grade of --learn that counts as relevant", flag_values=values)
    flags.DEFINE_float(
        "keep",
        0.99,
        "with --learn, share of the relevant items that the cut-off keeps. 1 cuts nothing off",
        lower_bound=0.01,
        upper_bound=1,
        flag_values=values,
    )


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Serves until SIGTERM or SIGINT, or learns.

    Raises:
        UsageError: a flag or the configuration is wrong.
        CommandError: the index cannot be read, or the gateway cannot listen.
    """
    if not values.host:
        raise UsageError("--host must not be empty")
    if values.judgments is not None and not values.page:
        raise UsageError(f"--judgments={values.judgments}: only the page saves judgments; add --page")
    logging.basicConfig(level=logging.WARNING, format="dpsr search: %(message)s")
    config = load_config(Path(values.config))
    if values.learn is not None:
        _learn(values, config)
        return
    # Each connection is an open file. Many systems allow 1,024 unless a process asks for more.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(_serve(values, config))


def _learn(values: flags.FlagValues, config: SearchConfig) -> None:
    if values.pipeline is None or values.out is None:
        raise UsageError(f"--learn={values.learn}: needs --pipeline and --out as well")
    index = open_inverted_index(Path(config.index))
    columns = (values.query_column, values.item_column, values.grade_column)
    judged = read_judgments(Path(values.learn), index.catalogue, columns, values.relevant_from)
    found = learn(config, index, values.pipeline, judged, values.keep, Path(values.out)).learned
    others = "" if found["emptied_others"] is None else f" and {found['emptied_others']:.1%} of the others"
    print(
        f"{values.out}: learned from {found['queries']:,} queries and the {found['relevant']:,} relevant items found.\n"
        f"The cut-off keeps {found['kept']:.1%} of the relevant items, leaves {found['length']:,.0f} items a query,\n"
        f"and empties {found['emptied']:.1%} of the queries with a relevant item{others}."
    )


async def _serve(values: flags.FlagValues, config: SearchConfig) -> None:
    index = open_inverted_index(Path(config.index))
    for model in config.models.values():
        if model.servable is not None:
            check_same_store(index.catalogue, _version(Path(model.servable)))
    searcher = Searcher(config, index)
    gateway = Gateway(searcher, config.limits)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    routes = None
    if values.page:
        judgments = None if values.judgments is None else JudgmentFile(Path(values.judgments))
        routes = functools.partial(
            add_page,
            catalogue=index.catalogue,
            judgments=judgments,
            host=values.host,
            read_body=gateway.read_body,
        )
    try:
        await gateway.start(values.host, values.port, values.grpc_port, routes)
        searcher.start()
        # Modules and configuration stay as long as the process, so the collector need not look at them again and again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_COLLECT_AFTER)
        also = f", gRPC on {gateway.grpc_address}" if gateway.grpc_address else ""
        print(f"search ready on http://{gateway.rest_address}{also}", flush=True)
        await stop.wait()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):
                loop.remove_signal_handler(number)
        await gateway.stop(values.drain_s)


def _version(servable: Path) -> Path:
    """Returns the newest version below a directory of versions, or the directory itself if it has none."""
    versions = [path for path in servable.glob("*") if path.name.isdecimal()]
    return max(versions, key=lambda path: int(path.name), default=servable)
