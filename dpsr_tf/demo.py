"""`dpsr demo`: runs the whole path once, from raw log to answered query.

Every step is a process of its own, as in production; the server and the proxy that answer are real ones.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from absl import flags

from dpsr_common.errors import CommandError, UsageError
from dpsr_tf.config import load_config, shipped_config
from dpsr_tf.data.store import Store
from dpsr_tf.evaluation.judgments import Judgments
from dpsr_tf.models.model_directory import ModelDirectory

USAGE = """
Usage: dpsr demo [--data=DIR] [--out=DIR]

Runs the main job once: log -> store -> model -> index -> servable -> model server and proxy -> answered queries. On a
small generated shop, or, with --data, on the Home Depot product search files in that directory.
"""

MODEL = "demo"


@dataclasses.dataclass(frozen=True)
class _Job:
    """What differs between the two data sets."""

    generate: list[str]  # flags of `dpsr generate`; empty where the data is there
    ingest: list[str]  # flags of `dpsr ingest`
    judgments: Path  # of the dev fold
    columns: tuple[str, str, str]  # its query, item and grade
    relevant_from: float
    config: dict[str, Any]

    def judgment_flags(self) -> list[str]:
        query, item, grade = self.columns
        names = [f"--query_column={query}", f"--item_column={item}", f"--grade_column={grade}"]
        return [*names, f"--relevant_from={self.relevant_from:g}"]


def define_flags(values: flags.FlagValues) -> None:
    """Flags of `dpsr demo`."""
    flags.DEFINE_string("data", None, "Home Depot files; a generated shop if left out", flag_values=values)
    flags.DEFINE_string("out", None, "directory for all that is made (demo/shop or demo/homedepot)", flag_values=values)
    flags.DEFINE_integer("steps", None, "training steps, if not as many as usual", 1, flag_values=values)


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr demo`."""
    # Without this a SIGTERM would end the demo at once and leave its servers running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = time.monotonic()
    out = Path(values.out or f"demo/{'homedepot' if values.data else 'shop'}")
    job = _homedepot(Path(values.data)) if values.data else _shop(out / "log")
    if values.steps:
        job.config["train"]["steps"] = values.steps
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(job.config, sort_keys=False))
    store, model, index, servable = (str(out / name) for name in ("store", "model", "index", "servable"))
    if job.generate:
        _dpsr("generate", *job.generate, "--overwrite")
    _dpsr("ingest", *job.ingest, f"--out={store}", "--overwrite")
    # A second demo trains nothing again, unless log or settings have changed since.
    anew = ["--overwrite"] if _is_another(Path(model), out / "config.yaml", Store(store)) else []
    _dpsr("train", f"--store={store}", f"--config={out / 'config.yaml'}", f"--out={model}", *anew)
    _dpsr("index", f"--model={model}", f"--store={store}", f"--out={index}", "--overwrite")
    _dpsr("export", f"--model={model}", f"--index={index}", f"--out={servable}")
    serve = ["serve", f"--model_base_path={servable}", f"--model_name={MODEL}", "--port=0"]
    titles = f"--titles={index}/item_titles.tsv.gz"
    with (
        _background(out, r"Running gRPC ModelServer at (\S+)", *serve) as server,
        _background(out, r"proxy ready on (\S+)", "proxy", f"--backend={server}", "--port=0") as proxy,
    ):
        _dpsr("query", f"--target={proxy}", f"--model={MODEL}", titles, "--k=10", *_dev_queries(job, Store(store)))

        systems = ["--system=bm25", f"--system=server:{proxy}/{MODEL}"]
        _dpsr("evaluate", f"--judgments={job.judgments}", *job.judgment_flags(), f"--store={store}", *systems)
    print(
        f"""
Done in {time.monotonic() - started:.0f} s. The servable lies in {servable}. To go on:
  {_program()} serve --model_base_path={servable} --model_name={MODEL}
  {_program()} query --model={MODEL} {titles} "your query"
Your own log: write a schema file and start with `dpsr ingest`; docs/data_format.md shows how."""
    )


def _is_another(model: Path, config: Path, store: Store) -> bool:
    """Whether the model that is there is not the one this demo trains."""
    if not (model / "config.yaml").is_file():
        return False
    return ModelDirectory.open(model).difference(load_config(config), store) is not None


def _program() -> str:
    """How this shell finds the command: by its name where the environment is active, else by its path."""
    program = Path(sys.executable).with_name("dpsr")
    return "dpsr" if shutil.which("dpsr") == str(program) else os.path.relpath(program)


def _shop(shop: Path) -> _Job:
    return _Job(
        generate=[f"--out={shop}"],
        ingest=[f"--schema={shop / 'schema.yaml'}"],
        judgments=shop / "judgments.dev.tsv",
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
        columns=("search_term", "product_uid", "relevance"),
        relevant_from=2.33,
        config=shipped_config("homedepot"),
    )


def _dev_queries(job: _Job, store: Store) -> list[str]:
    """The four queries with the most relevant items in the dev fold, none of them in the log."""
    judgments = Judgments.read(job.judgments, *job.columns, job.relevant_from)
    log = {query.casefold() for query in store.queries()}
    unseen = [
        (-len(items), query)
        for query, items in zip(judgments.queries, judgments.relevant, strict=True)
        if query.casefold() not in log
    ]
    return [query for _, query in sorted(unseen)[:4]]


def _dpsr(*arguments: str) -> None:
    """Runs a command as the user would, shows it, and ends the demo if it fails."""
    print(f"\n$ dpsr {shlex.join(arguments)}", flush=True)
    status = subprocess.run([sys.executable, "-m", "dpsr_common", *arguments]).returncode
    if status:
        raise CommandError(f"`dpsr {arguments[0]}` ended with status {status}; its message stands above")


@contextmanager
def _background(out: Path, ready: str, *arguments: str) -> Iterator[str]:
    """A server command that runs while the block does. Yields the address in its ready line."""
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
