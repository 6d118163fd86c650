"""Where experiments run: each command or computation once, its result kept, so that a report that was killed goes on.

An experiment is a name and a definition, all that decides its result, as a JSON object. `runs/NAME.json` holds the
definition and the result; it is run again only if its definition has changed. What a command makes (shops, stores,
models, indices) lies in `work/NAME-DIGEST`, the digest being that of the definition.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dpsr_common import command_line
from dpsr_common.errors import CommandError
from dpsr_tf import __version__

K = TypeVar("K")
T = TypeVar("T")
Result = dict[str, Any]

# Raised when an experiment's code changes what it gives, so that kept results of before are not taken for it.
VERSION = 2


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A directory that a command has made; the digest is that of all that decided its content."""

    path: Path
    digest: str


class ExperimentRunner:
    """Runs experiments below one directory.

    Attributes:
        out: the report's directory.
        seed: of shops, trainings and measurements.
        jobs: experiments that `together` runs at once.
        seconds: that all experiments took when they ran, one after the other.
    """

    def __init__(self, out: Path, seed: int, jobs: int):
        self.out, self.seed, self.jobs, self.seconds = out, seed, jobs, 0.0
        for name in ("runs", "work"):
            (out / name).mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._running: set[BaseProcess] = set()

    def result(self, name: str, definition: Mapping[str, Any], compute: Callable[[], Result]) -> Result:
        """What `compute` returns, or returned when it last ran under this name with this definition.

        Args:
            name: of the file.
            definition: all that decides the result; JSON.
            compute: returns a JSON object.
        """
        held = self.out / "runs" / f"{name}.json"
        digest = _digest(definition)
        if held.is_file():
            try:
                found = json.loads(held.read_text())
                if found["digest"] == digest:
                    self._done(found["seconds"])
                    return dict(found["result"])
            except (ValueError, KeyError, TypeError):
                pass  # half a file of a full disk: run it again
        self._say(f"{name} ...")
        start = time.monotonic()
        result = compute()
        seconds = time.monotonic() - start
        record = {"digest": digest, "definition": definition, "seconds": round(seconds, 1), "result": result}
        write(held, json.dumps(record, ensure_ascii=False, indent=1) + "\n")
        self._done(seconds)
        self._say(f"{name}: {seconds:.0f} s")
        return dict(json.loads(json.dumps(result)))  # as it will be read the next time

    def artifact(self, name: str, definition: Mapping[str, Any], command: Callable[[Path], Sequence[str]]) -> Artifact:
        """The directory that a `dpsr` command makes.

        Args:
            name: of the directory.
            definition: all that decides its content; JSON.
            command: directory -> the command's arguments. A training goes on where it was.
        """
        digest = _digest(definition)
        path = self.out / "work" / f"{name}-{digest}"

        def compute() -> Result:
            self.run_dpsr(name, *command(path))
            return {"path": path.name}

        if not path.is_dir():
            # Its result is there and it is not: somebody made room.
            (self.out / "runs" / f"{name}.json").unlink(missing_ok=True)
        self.result(name, definition, compute)
        for other in (self.out / "work").glob(f"{name}-{'[0-9a-f]' * len(digest)}"):
            if other != path:  # of another definition
                shutil.rmtree(other)
        return Artifact(path, digest)

    def run_together(self, experiments: Mapping[K, Callable[[], T]]) -> dict[K, T]:
        """Some experiments that need nothing of one another, `jobs` at a time."""
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = {name: pool.submit(run) for name, run in experiments.items()}
            try:
                return {name: future.result() for name, future in futures.items()}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self._running):
                    process.terminate()
                raise

    def shop(self, name: str, parameters: Mapping[str, Any]) -> Artifact:
        """A generated shop; `parameters` are those of `dpsr generate --set`, the seed among them."""
        flags = [f"--set={key}={value}" for key, value in parameters.items()]
        definition = {"generate": parameters}
        return self.artifact(name, definition, lambda path: ["generate", f"--out={path}", "--overwrite", *flags])

    def store(self, name: str, source: Artifact, schema: Mapping[str, Any]) -> Artifact:
        """The store of a schema whose files lie in a directory that was made."""

        def command(path: Path) -> list[str]:
            file = self.out / "runs" / f"{name}.schema.yaml"
            write(file, yaml.safe_dump(dict(schema), sort_keys=False, allow_unicode=True))
            return ["ingest", f"--schema={file}", f"--input={source.path}", f"--out={path}", "--overwrite"]

        return self.artifact(name, {"ingest": source.digest, "schema": schema}, command)

    def public_store(self, adapter: str, source: Path) -> Artifact:
        """The store of a public data set."""
        definition = {"adapter": adapter, "input": str(source.resolve())}
        return self.artifact(
            f"store-{adapter}",
            definition,
            lambda path: ["ingest", f"--adapter={adapter}", f"--input={source}", f"--out={path}", "--overwrite"],
        )

    def model(self, name: str, store: Artifact, config: Mapping[str, Any]) -> Artifact:
        """A model trained on a store with a config (a dictionary as config files hold it) and the report's seed."""
        config = {**config, "train": {"seed": self.seed, **config["train"]}}

        def command(path: Path) -> list[str]:
            file = self.out / "runs" / f"{name}.config.yaml"
            write(file, yaml.safe_dump(config, sort_keys=False))
            return ["train", f"--store={store.path}", f"--config={file}", f"--out={path}"]

        return self.artifact(name, {"train": store.digest, "config": config}, command)

    def evaluation(
        self,
        name: str,
        store: Artifact,
        systems: Mapping[str, str | Artifact],
        judgments: Path | None,
        judgments_digest: str,
        *flags: str,
    ) -> Result:
        """The figures of `dpsr evaluate`, systems by their keys in `systems`; they are compared with the first.

        Args:
            name: of the experiment.
            store: with the items.
            systems: what to call it -> a system of `--system`, or a model.
            judgments: the table; None: what the store holds out.
            judgments_digest: what decides its content.
            flags: further flags.
        """
        specs = {label: f"model:{one.path}" if isinstance(one, Artifact) else one for label, one in systems.items()}
        definition = {
            "evaluate": store.digest,
            "systems": {label: one.digest if isinstance(one, Artifact) else one for label, one in systems.items()},
            "judgments": [judgments_digest, judgments.name if judgments else None],
            "flags": list(flags),
        }

        def compute() -> Result:
            out = self.out / "work" / f"{name}.json"
            what = f"--judgments={judgments}" if judgments else "--held_out"
            asked = [f"--system={spec}" for spec in specs.values()]
            compare = ["--compare"] if len(specs) > 1 else []
            self.run_dpsr(name, "evaluate", f"--store={store.path}", what, *asked, *compare, *flags, f"--json={out}")
            found = json.loads(out.read_text())
            out.unlink()
            return _renamed(found, {spec: label for label, spec in specs.items()})

        return self.result(name, definition, compute)

    def run_dpsr(self, name: str, *arguments: str) -> None:
        """Runs `dpsr`; what it prints goes to `runs/NAME.log`. Raises CommandError if it fails."""
        log = self.out / "runs" / f"{name}.log"
        process = _PROCESSES.Process(target=_run, args=(log, arguments), daemon=True)
        process.start()
        self._running.add(process)
        try:
            process.join()
        finally:  # where a signal or the failure of another ends the report
            process.terminate()
            self._running.discard(process)
        self._check(name, log, process.exitcode)

    def run_script(self, name: str, path: Path, *arguments: str) -> str:
        """Runs a Python script and returns its standard output. Raises CommandError if it fails."""
        log = self.out / "runs" / f"{name}.log"
        done = subprocess.run([sys.executable, str(path), *arguments], capture_output=True, text=True, check=False)
        write(log, done.stdout + done.stderr)
        self._check(name, log, done.returncode)
        return done.stdout

    def _check(self, name: str, log: Path, status: int | None) -> None:
        if status:
            last = [line for line in log.read_text().replace("\r", "\n").splitlines() if line.strip()]
            raise CommandError(f"{name}: ended with status {status}: {' '.join(last[-1:])}; see {log}")

    def _done(self, seconds: float) -> None:
        with self._lock:
            self.seconds += seconds

    def _say(self, line: str) -> None:
        with self._lock:
            print(line, flush=True)


# Commands are processes that are forked from one which has imported what takes seconds to import.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["dpsr_tf.models.encoders", "dpsr_tf.evaluation.evaluate", "dpsr_tf.training.train"])


def _run(log: Path, arguments: Sequence[str]) -> None:
    """A process of its own: `dpsr ARGUMENTS`, with both outputs in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for standard in (sys.stdout, sys.stderr):
        standard.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    print(f"$ dpsr {shlex.join(arguments)}", flush=True)
    status = command_line.main(arguments)
    if not status:
        print(f"{time.process_time():.1f} s of CPU time", flush=True)
    sys.exit(status)


def write(path: Path, text: str) -> None:
    """Writes a whole file or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _digest(definition: Mapping[str, Any]) -> str:
    text = json.dumps([VERSION, __version__, definition], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _renamed(report: Result, names: Mapping[str, str]) -> Result:
    """A report of `dpsr evaluate` with systems under other names."""
    report = dict(report)
    for key in ("systems", "intervals", "notes"):
        report[key] = {names[spec]: value for spec, value in report[key].items()}
    report["slices"] = {
        slicing: {
            value: {
                **part,
                **{key: {names[spec]: one for spec, one in part[key].items()} for key in ("systems", "intervals")},
            }
            for value, part in values.items()
        }
        for slicing, values in report["slices"].items()
    }
    for comparison in report.get("comparisons", []):
        comparison |= {key: names[comparison[key]] for key in ("system", "baseline")}
    return report
