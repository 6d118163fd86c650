"""`dpsr demo`: runs every step once, from raw log to answered query.

Every step is a separate process, as in production. The queries are answered by a real server and a real proxy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from absl import flags

from dpsr_common import files
from dpsr_common.errors import CommandError, UsageError
from dpsr_tf.config import load_config, shipped_config
from dpsr_tf.data.store import Store
from dpsr_tf.evaluation.judgments import Judgments
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.report.public_data import TUNED_BM25

USAGE = """
Usage: dpsr demo [--data=DIR] [--out=DIR] [--keep]

Runs every step once and shows its command: generate or read a log, ingest, train, index, export, serve through a proxy,
query, search with an inverted index and the model together, on a page, and evaluate. The data is a small generated shop
or, with --data, the Home Depot product search files. A second run trains again only if the log or the settings have
changed.
"""

MODEL = "demo"


@dataclasses.dataclass(frozen=True)
class _Job:
    """The settings in which the two data sets differ.

    Attributes:
        generate: flags of `dpsr generate`; empty if the data exists.
        ingest: flags of `dpsr ingest`.
        judgments: judgments of queries that are not in the log.
        learn_from: other judgments, in the same columns, to learn from how to join two lists; None if there are none.
        slices: columns of the judgments to report by.
        bm25: the best BM25 that benchmarks/bm25.py found on the dev fold.
        analysis: how the inverted index reads texts, as near to `bm25` as it comes.
        columns: its columns of query, item and grade.
        relevant_from: lowest grade that counts as relevant.
        config: content of the config file.
    """

    generate: list[str]
    ingest: list[str]
    judgments: Path
    learn_from: Path | None
    slices: list[str]
    bm25: str
    analysis: str
    columns: tuple[str, str, str]
    relevant_from: float
    config: dict[str, Any]

    def judgment_flags(self) -> list[str]:
        query, item, grade = self.columns
        names = [f"--query_column={query}", f"--item_column={item}", f"--grade_column={grade}"]
        return [*names, f"--relevant_from={self.relevant_from:g}", *(f"--slice={name}" for name in self.slices)]


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `dpsr demo`."""
    flags.DEFINE_string(
        "data",
        None,
        "directory of the Home Depot files; without it the demo generates a small shop",
        flag_values=values,
    )
    flags.DEFINE_string(
        "out",
        None,
        "directory for everything that the demo writes (default demo/shop or demo/homedepot)",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "steps", None, "number of training steps (default: that of the data set's config)", 1, flag_values=values
    )
    flags.DEFINE_bool(
        "keep", False, "whether the servers and the search page go on running until Ctrl-C", flag_values=values
    )


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr demo`."""
    # Exit through exceptions on SIGTERM, so that the servers are ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = time.monotonic()
    out = Path(values.out or f"demo/{'homedepot' if values.data else 'shop'}")
    job = _homedepot(Path(values.data)) if values.data else _shop(out / "log")
    if values.steps:
        job.config["train"]["steps"] = values.steps
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(job.config, sort_keys=False))
    names = ("store", "model", "index", "servable", "inverted")
    store, model, index, servable, inverted = (str(out / name) for name in names)
    if job.generate:
        _dpsr("generate", *job.generate, "--overwrite")
    _dpsr("ingest", *job.ingest, f"--out={store}", "--overwrite")
    # A second demo does not train again, unless the log or the settings have changed.
    overwrite = ["--overwrite"] if _is_outdated(Path(model), out / "config.yaml", Store(store)) else []
    _dpsr("train", f"--store={store}", f"--config={out / 'config.yaml'}", f"--out={model}", *overwrite)
    _dpsr("index", f"--model={model}", f"--store={store}", f"--out={index}", "--overwrite")
    _dpsr("export", f"--model={model}", f"--index={index}", f"--out={servable}")
    _dpsr("index", "--inverted", f"--store={store}", f"--out={inverted}", f"--analysis={job.analysis}", "--overwrite")
    serve = ["serve", f"--model_base_path={servable}", f"--model_name={MODEL}", "--port=0"]
    titles = f"--titles={index}/item_titles.tsv.gz"
    with (
        _background(out, r"Running gRPC ModelServer at (\S+)", *serve) as server,
        _background(out, r"proxy ready on (\S+)", "proxy", f"--backend={server}", "--port=0") as proxy,
    ):
        queries = _unseen_queries(job, Store(store))
        _dpsr("query", f"--target={proxy}", f"--model={MODEL}", titles, "--k=10", *queries)

        _write_pipelines(out, job, Store(store), proxy)
        search = ["search", f"--config={out / 'search.yaml'}"]
        if job.learn_from is not None:
            # Something fits each of these queries, so that a cut-off could only lose items.
            learned = f"--out={out / 'fusion.json'}"
            _dpsr(*search, f"--learn={job.learn_from}", "--pipeline=both", learned, "--keep=1")
        search += ["--page", f"--judgments={out / 'judgments.tsv'}"]
        with _background(out, r"search ready on (http://[^\s,]+)", *search, "--port=0") as page:
            _search(page, queries[0])

            asked = [f"server:{proxy}/{MODEL}", f"search:{page.removeprefix('http://')}/both"]
            systems = [f"--system={system}" for system in ("bm25", job.bm25, *asked)]
            _dpsr("evaluate", f"--judgments={job.judgments}", *job.judgment_flags(), f"--store={store}", *systems)
            seconds = time.monotonic() - started
            if values.keep:
                # Whoever reads the line may press Ctrl-C before the next one runs.
                with contextlib.suppress(KeyboardInterrupt):
                    print(f"\nDone in {seconds:.0f} s. The search page is on {page}/. Ctrl-C ends it.", flush=True)
                    signal.pause()
    # For those who start the servers themselves, as the last lines say.
    _write_pipelines(out, job, Store(store), "127.0.0.1:8500")
    keep = "make demo KEEP=1" + (f" DATA={values.data}" if values.data else "")
    print(
        f"""
Done in {seconds:.0f} s. The servable lies in {servable}. To serve and query it yourself:
  {_program()} serve --model_base_path={servable} --model_name={MODEL}
  {_program()} query --model={MODEL} {titles} "your query"
The search page, which compares word search, the model and both, needs that server too (or `{keep}`):
  {_program()} {shlex.join(search)}
To use your own log, write a schema file and start with `dpsr ingest`; see docs/own_log.md."""
    )


def _write_pipelines(out: Path, job: _Job, store: Store, target: str) -> None:
    """Writes the configuration of `dpsr search`: word search, the model, both, and both with re-ranking."""
    # Time limits that also a busy machine keeps; a shop's would be shorter.
    sources: dict[str, dict[str, Any]] = {"inverted": {"k": 300}, "semantic": {"model": MODEL, "k": 300}}
    sources = {name: {**source, "deadline_ms": 3000} for name, source in sources.items()}
    both: dict[str, Any] = {"recall": sources}
    if job.learn_from is not None:
        both["coarse"] = {"method": "learned", "file": "fusion.json"}
    ranked: dict[str, Any] = {**both, "rerank": {"collapse": True}}
    attributes = [attribute.key for attribute in store.schema.items.filters]
    alike = [name for name in ("brand", "shop") if name in attributes]
    if alike:
        ranked["rerank"]["diversity"] = {"attributes": alike}
    if "in_stock" in attributes:
        ranked["rerank"]["rules"] = "rules.yaml"
        files.write_text(out / "rules.yaml", _RULES)
    config: dict[str, Any] = {
        "index": "inverted",
        "models": {MODEL: {"target": target}},
        "pipelines": {
            "reranked": ranked,
            "both": both,
            "dpsr": {"recall": {"semantic": sources["semantic"]}},
            "bm25": {"recall": {"inverted": sources["inverted"]}},
        },
    }
    for pipeline in config["pipelines"].values():
        pipeline["deadline_ms"] = 5000
    # A copy through JSON has no part twice, which YAML would write as a reference.
    config = json.loads(json.dumps(config))
    files.write_text(out / "search.yaml", yaml.safe_dump(config, sort_keys=False))


_RULES = """\
# Rules of merchandisers, which `dpsr search` reads again when they change; see "Rules" in docs/search.md.
sold out:
  bury: {filters: {in_stock: "false"}}
"""


def _search(address: str, query: str) -> None:
    """Shows a request to the gateway and the items of its answer."""
    request = json.dumps({"query": query, "pipeline": "both", "size": 5}, ensure_ascii=False)
    print(f"\n$ curl -s {address}/v1/search -d {shlex.quote(request)}", flush=True)
    try:
        call = urllib.request.Request(f"{address}/v1/search", request.encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(call, timeout=60) as answer:
            tree = json.load(answer)
    except OSError as error:
        raise CommandError(f"{address}: does not answer a search: {error}") from None
    for item in tree["items"]:
        print(f"{' + '.join(item['sources']):<20}  {item['title']}")
    print(f"{len(tree['items'])} of {tree['total']:,} items", flush=True)


def _is_outdated(model: Path, config: Path, store: Store) -> bool:
    """Returns whether there is a model that was trained with another log or other settings."""
    if not (model / "config.yaml").is_file():
        return False
    return ModelDirectory.open(model).difference(load_config(config), store) is not None


def _program() -> str:
    """Returns how to call `dpsr` from this shell: by name if the environment is active, else by path."""
    program = Path(sys.executable).with_name("dpsr")
    return "dpsr" if shutil.which("dpsr") == str(program) else os.path.relpath(program)


def _shop(shop: Path) -> _Job:
    return _Job(
        generate=[
            f"--out={shop}",
            "--items=10000",
            "--types=500",
            "--set=titled_synonyms=0.02",
            "--set=rare_synonyms=0.5",
            "--set=unasked_synonyms=0.5",
        ],
        ingest=[f"--schema={shop / 'schema.yaml'}"],
        # No setting was chosen on this fold: neither those of configs/shop.yaml nor those of BM25.
        judgments=shop / "judgments.test.tsv",
        learn_from=shop / "judgments.dev.tsv",
        slices=["kind"],
        bm25="bm25:trigrams=0.5+k1=0.3+b=0.15",
        analysis="trigrams=0.5",
        columns=("query", "item", "grade"),
        relevant_from=1.0,
        config=shipped_config("shop"),
    )


def _homedepot(data: Path) -> _Job:
    needed = ("products.tsv", "judgments.train.tsv", "judgments.dev.tsv")
    missing = [name for name in needed if not (data / name).is_file()]
    if missing:
        raise UsageError(
            f"--data={data}: has no {', '.join(missing)}; expected the Home Depot files {', '.join(needed)}"
        )
    return _Job(
        generate=[],
        ingest=["--adapter=homedepot", f"--input={data}"],
        judgments=data / "judgments.dev.tsv",
        learn_from=None,  # the model was trained on the others
        slices=[],
        bm25=TUNED_BM25["homedepot"],
        analysis="stem+trigrams=0.3",
        columns=("search_term", "product_uid", "relevance"),
        relevant_from=2.33,
        config=shipped_config("homedepot"),
    )


def _unseen_queries(job: _Job, store: Store) -> list[str]:
    """Returns four judged queries that are not in the log, though their words are, with many relevant items.

    Of the generated shop's queries they are some that share no word with what they mean.
    """
    judgments = Judgments.read(job.judgments, *job.columns, job.relevant_from, slices=("kind",) if job.generate else ())
    kinds = judgments.slices.get("kind", [()] * len(judgments.queries))
    log = {query.casefold() for query in store.queries()}
    words = {word for query in log for word in query.split()}
    unseen = [
        ("gap" not in kind, not words.issuperset(query.casefold().split()), -len(items), query)
        for query, items, kind in zip(judgments.queries, judgments.relevant, kinds, strict=True)
        if query.casefold() not in log
    ]
    return [query for *_, query in sorted(unseen)[:4]]


def _dpsr(*arguments: str) -> None:
    """Shows a command and runs it. Raises CommandError if it fails."""
    print(f"\n$ dpsr {shlex.join(arguments)}", flush=True)
    status = subprocess.run([sys.executable, "-m", "dpsr_common", *arguments]).returncode
    if status:
        raise CommandError(f"`dpsr {arguments[0]}` ended with status {status}; see its message above")


@contextlib.contextmanager
def _background(out: Path, ready: str, *arguments: str) -> Iterator[str]:
    """Runs a server command during the `with` block. Yields the address in the line that says it is ready."""
    print(f"\n$ dpsr {shlex.join(arguments)} &", flush=True)
    log_path = out / f"{arguments[0]}.log"
    with open(log_path, "wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "dpsr_common", *arguments], stdout=log, stderr=log)
    try:
        while (found := re.search(ready, log_path.read_text(errors="replace"))) is None:
            if process.poll() is not None:
                last = log_path.read_text(errors="replace").strip().splitlines()[-1:]
                raise CommandError(f"`dpsr {arguments[0]}` ended with status {process.returncode}: {' '.join(last)}")
            time.sleep(0.1)
        print(found.group(0), flush=True)
        yield found.group(1)
    finally:
        process.terminate()
        process.wait()
