"""Runs experiments and keeps their results, so that a report that was interrupted continues where it stopped.

An experiment has a name and a definition: a JSON object of everything that decides its result. `runs/NAME.json` holds
the definition and the result. An experiment runs again only if its definition has changed. The directories that
commands write (shops, stores, models, indices) are `work/NAME-DIGEST`, with the digest of the definition.
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
from dpsr_common.files import write_text
from dpsr_tf import __version__

K = TypeVar("K")
T = TypeVar("T")
Result = dict[str, Any]

# Increase this when a change of the code changes the results of experiments. Results of other versions
# are not used.
VERSION = 3


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A directory that a command has written.

    Attributes:
        path: the directory.
        digest: digest of everything that decided its content.
    """

    path: Path
    digest: str


class ExperimentRunner:
    """Runs experiments below one directory.

    Attributes:
        out: directory of the report.
        seed: seed of shops, trainings and measurements.
        jobs: number of experiments that `run_together` runs at once.
        seconds: sum of the wall times of all experiments, also of those whose results were kept.
    """

    def __init__(self, out: Path, seed: int, jobs: int):
        self.out, self.seed, self.jobs, self.seconds = out, seed, jobs, 0.0
        for name in ("runs", "work"):
            (out / name).mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._running: set[BaseProcess] = set()

    def result(self, name: str, definition: Mapping[str, Any], compute: Callable[[], Result]) -> Result:
        """Returns the kept result of an experiment, or runs it and keeps its result.

        Args:
            name: name of the experiment and of its file.
            definition: JSON object of everything that decides the result.
            compute: runs the experiment; returns a JSON object.
        """
        kept = self.out / "runs" / f"{name}.json"
        digest = _digest(definition)
        if kept.is_file():
            try:
                record = json.loads(kept.read_text())
                if record["digest"] == digest:
                    self._add_seconds(record["seconds"])
                    return dict(record["result"])
            except (ValueError, KeyError, TypeError):
                pass  # The file is incomplete, for example because the disk was full: run the experiment again.
        self._print(f"{name} ...")
        start = time.monotonic()
        result = compute()
        seconds = time.monotonic() - start
        record = {"digest": digest, "definition": definition, "seconds": round(seconds, 1), "result": result}
        write_text(kept, json.dumps(record, ensure_ascii=False, indent=1) + "\n")
        self._add_seconds(seconds)
        self._print(f"{name}: {seconds:.0f} s")
        # Through JSON, so that a new result equals a kept one, for example in the types of keys.
        return dict(json.loads(json.dumps(result)))

    def artifact(self, name: str, definition: Mapping[str, Any], command: Callable[[Path], Sequence[str]]) -> Artifact:
        """Returns a directory that a `dpsr` command writes; runs the command if the directory is not there.

        Directories of the same name with other definitions are deleted.

        Args:
            name: name of the experiment; the directory's name begins with it.
            definition: JSON object of everything that decides the content.
            command: directory -> arguments of the command. A training that was interrupted continues.
        """
        digest = _digest(definition)
        path = self.out / "work" / f"{name}-{digest}"

        def compute() -> Result:
            self.run_dpsr(name, *command(path))
            return {"path": path.name}

        if not path.is_dir():
            # Somebody may have deleted the directory to free disk space: forget that the command has run.
            (self.out / "runs" / f"{name}.json").unlink(missing_ok=True)
        self.result(name, definition, compute)
        for other in (self.out / "work").glob(f"{name}-{'[0-9a-f]' * len(digest)}"):
            if other != path:
                shutil.rmtree(other)
        return Artifact(path, digest)

    def run_together(self, experiments: Mapping[K, Callable[[], T]]) -> dict[K, T]:
        """Runs experiments that do not depend on one another, `jobs` at a time. If one fails, the others end."""
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
        """Returns a generated shop; `parameters` are the assignments of `dpsr generate --set`, including the seed."""
        flags = [f"--set={key}={value}" for key, value in parameters.items()]
        definition = {"generate": parameters}
        return self.artifact(name, definition, lambda path: ["generate", f"--out={path}", "--overwrite", *flags])

    def store(self, name: str, source: Artifact, schema: Mapping[str, Any]) -> Artifact:
        """Returns a store. The files that the schema names are in the directory `source`."""

        def command(path: Path) -> list[str]:
            file = self.out / "runs" / f"{name}.schema.yaml"
            write_text(file, yaml.safe_dump(dict(schema), sort_keys=False, allow_unicode=True))
            return ["ingest", f"--schema={file}", f"--input={source.path}", f"--out={path}", "--overwrite"]

        return self.artifact(name, {"ingest": source.digest, "schema": schema}, command)

    def public_store(self, adapter: str, source: Path) -> Artifact:
        """Returns the store of a public data set, whose files are in the directory `source`."""
        definition = {"adapter": adapter, "input": str(source.resolve())}
        return self.artifact(
            f"store-{adapter}",
            definition,
            lambda path: ["ingest", f"--adapter={adapter}", f"--input={source}", f"--out={path}", "--overwrite"],
        )

    def model(self, name: str, store: Artifact, config: Mapping[str, Any]) -> Artifact:
        """Returns a model trained on a store. `config` is the content of a config file."""
        config = {**config, "train": {"seed": self.seed, **config["train"]}}

        def command(path: Path) -> list[str]:
            file = self.out / "runs" / f"{name}.config.yaml"
            write_text(file, yaml.safe_dump(config, sort_keys=False))
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
        """Returns the JSON object of `dpsr evaluate`, with systems under their labels, all compared with the first.

        Args:
            name: name of the experiment.
            store: store with the items.
            systems: label -> a system as in `--system`, or a model.
            judgments: table of judgments; None measures on what the store holds out.
            judgments_digest: digest of whatever decides the content of the table.
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
            report = json.loads(out.read_text())
            out.unlink()
            return _with_labels(report, {spec: label for label, spec in specs.items()})

        return self.result(name, definition, compute)

    def run_dpsr(self, name: str, *arguments: str) -> None:
        """Runs a `dpsr` command with its output in `runs/NAME.log`. Raises CommandError if it fails."""
        log = self.out / "runs" / f"{name}.log"
        process = _PROCESSES.Process(target=_run, args=(log, arguments), daemon=True)
        process.start()
        self._running.add(process)
        try:
            process.join()
        finally:
            # Also when a signal, or the failure of another experiment, ends the report.
            process.terminate()
            self._running.discard(process)
        self._check(name, log, process.exitcode)

    def run_script(self, name: str, path: Path, *arguments: str) -> str:
        """Runs a Python script and returns its standard output. Raises CommandError if it fails."""
        log = self.out / "runs" / f"{name}.log"
        quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3")}
        command = [sys.executable, str(path), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
        write_text(log, done.stdout + done.stderr)
        self._check(name, log, done.returncode)
        return done.stdout

    def _check(self, name: str, log: Path, status: int | None) -> None:
        if status:
            last = [line for line in log.read_text().replace("\r", "\n").splitlines() if line.strip()]
            raise CommandError(f"{name}: ended with status {status}: {' '.join(last[-1:])}; see {log}")

    def _add_seconds(self, seconds: float) -> None:
        with self._lock:
            self.seconds += seconds

    def _print(self, line: str) -> None:
        with self._lock:
            print(line, flush=True)


# Commands run in processes that are forked from a server process, which has already imported the slow modules.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["dpsr_tf.models.encoders", "dpsr_tf.evaluation.evaluate", "dpsr_tf.training.train"])


def _run(log: Path, arguments: Sequence[str]) -> None:
    """The body of a command's process: runs `dpsr ARGUMENTS` with standard output and error in the file `log`."""
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


def _digest(definition: Mapping[str, Any]) -> str:
    text = json.dumps([VERSION, __version__, definition], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _with_labels(report: Result, names: Mapping[str, str]) -> Result:
    """Returns a report of `dpsr evaluate` with the systems under other names."""
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
