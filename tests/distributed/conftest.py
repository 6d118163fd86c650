"""A generated shop as a store, and `dpsr launch` as a real cluster whose processes can be found and killed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from dpsr_common import command_line
from dpsr_tf.data.store import Store


@pytest.fixture(scope="session")
def shop_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A small generated shop with requests that holds out 15 % of its queries; it must not be changed."""
    path = tmp_path_factory.mktemp("shop")
    sizes = ["--items=2000", "--users=500", "--interactions=20000"]
    assert command_line.main(["generate", f"--out={path / 'log'}", *sizes]) == 0
    schema = yaml.safe_load((path / "log" / "schema.yaml").read_text())
    schema["interactions"]["held_out"] = {"query_share": 0.15}
    schema |= {"ranking": {}, "rewriting": {"meaning_share": 0}, "graph": {}}
    (path / "log" / "schema.yaml").write_text(yaml.safe_dump(schema))
    assert command_line.main(["ingest", f"--schema={path / 'log' / 'schema.yaml'}", f"--out={path / 'store'}"]) == 0
    return Store(path / "store")


@dataclasses.dataclass
class Launch:
    """A running `dpsr launch`."""

    process: subprocess.Popen[bytes]
    lines: list[str]  # of stdout and stderr so far
    reader: threading.Thread
    seen: set[int]  # every process of the cluster that was looked up

    def task(self, kind: str, index: int = 0) -> int | None:
        """The process id of a task; None where it does not run."""
        found = None
        for pid in _children(self.process.pid):
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            except OSError:
                continue
            text = next((value[10:] for value in environment if value.startswith("TF_CONFIG=")), None)
            if text is None:  # not yet what it will be
                continue
            self.seen.add(pid)
            if json.loads(text)["task"] == {"type": kind, "index": index}:
                found = pid
        return found

    def kill(self, kind: str, index: int = 0) -> None:
        """Kills a task with SIGKILL, and waits for the next one in its place."""
        pid = self.task(kind, index)
        assert pid is not None, self.text()
        os.kill(pid, signal.SIGKILL)
        self.until(lambda: self.task(kind, index) not in (None, pid))
        # The line may be on its way to us yet.
        self.until(lambda: f"launch: {kind} {index} was ended by SIGKILL; restarting it" in self.text())

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition while the launcher runs."""
        while not condition():
            assert self.process.poll() is None, self.text()
            time.sleep(0.02)

    def until_checkpoint(self, model: Path, step: int) -> None:
        """Waits for a checkpoint of this step or a later one."""
        self.until(lambda: any(int(path.stem.split("-")[1]) >= step for path in model.glob("model.ckpt-*.index")))

    def end(self) -> int:
        """The launcher's exit status; no process of the cluster is left."""
        status = self.process.wait()
        self.reader.join()
        # A launcher that was killed cannot wait for its processes; the kernel ends them.
        deadline = time.monotonic() + 30
        while left := [pid for pid in self.seen if _runs(pid)]:
            assert time.monotonic() < deadline, f"{left} still run\n{self.text()}"
            time.sleep(0.02)
        return status

    def starts_of(self, task: str) -> list[int]:
        """The steps from which a task trained, of each time it began to."""
        return [
            int(n.replace(",", "")) for n in re.findall(rf"^{task}: training from step ([\d,]+)", self.text(), re.M)
        ]

    def steps_of(self, task: str) -> list[int]:
        """What a task says it did, of each time it came to its end."""
        return self._numbers(rf"^{task}: this process trained ([\d,]+) steps")

    def _numbers(self, pattern: str) -> list[int]:
        return [int(number.replace(",", "")) for number in re.findall(pattern, self.text(), re.MULTILINE)]

    def text(self) -> str:
        """All that it printed."""
        return "\n".join(self.lines)


def _runs(pid: int) -> bool:
    try:  # a zombie waits for a parent that may be no good one
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@pytest.fixture
def launch() -> Iterator[Callable[..., Launch]]:
    """Starts `dpsr launch ARGUMENTS...`."""
    started: list[Launch] = []

    def start(*arguments: str) -> Launch:
        process = subprocess.Popen(
            [sys.executable, "-m", "dpsr_common", "launch", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        lines: list[str] = []

        def read() -> None:
            for line in process.stdout:  # type: ignore[union-attr]
                lines.append(line.decode(errors="replace").rstrip("\n"))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        started.append(Launch(process, lines, reader, set()))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.terminate()
            each.process.wait()
