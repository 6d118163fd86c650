"""Shared by all tests: their order, SIGINT as in a terminal, and the fixture `dpsr`."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dpsr_common.command_line import main

# A background job of a shell ignores SIGINT, and so would the commands that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Java would spend most of the time of a short job of Spark on optimizing its own code.
os.environ.setdefault(
    "PYSPARK_SUBMIT_ARGS", '--driver-java-options "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC" pyspark-shell'
)

# The files that take longest, the longest first. `make test` runs two files at a time; if one of these started last,
# the other processor would be idle until it ended. All other files follow in the order of their paths.
_FIRST = (
    "end_to_end/test_demo.py",
    "dpsr_tf/test_quantizer_training.py",
    "end_to_end/test_wheel.py",
    "export/test_learned_index.py",
    "dpsr_tf/test_training.py",
    "distributed/test_launch.py",
    "end_to_end/test_documents.py",
    "export/test_export_versions.py",
    "export/test_fresh_items_life.py",
    "dpsr_tf/test_spark_ingest.py",
    "export/test_export_personal.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the fast tests first, then the slow ones in files sorted by _FIRST. The tests of a file keep their order."""

    def place(item: pytest.Item) -> int:
        if item.get_closest_marker("slow") is None:
            return -1
        return next((at for at, name in enumerate(_FIRST) if item.path.match(name)), len(_FIRST))

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`, gives all fast tests of a file to one process, and all its slow tests to one.

    So what the tests of a file share is made only once. The mark `xdist_group` would not do: pytest-xdist 3.8 writes it
    into the names of the tests, where pytest 9.2 no longer reads it.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        """Tests that follow each other and are of one file are one unit of work."""

        def _split_scope(self, nodeid: str) -> str:
            if not hasattr(self, "_units"):
                files = itertools.groupby(self.collection, key=lambda name: name.partition("::")[0])
                self._units = {name: f"{file} {at}" for at, (file, names) in enumerate(files) for name in names}
            return self._units[nodeid]

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@dataclasses.dataclass(frozen=True)
class CommandResult:
    """The exit status of a command, its stdout, and the lines of its stderr without progress bars."""

    status: int
    out: str
    errors: list[str]

    def fails(self, status: int, *fragments: str) -> None:
        """Asserts this exit status and exactly one line on stderr, which contains every fragment."""
        assert self.status == status, (self.status, self.errors)
        assert len(self.errors) == 1, self.errors
        for fragment in fragments:
            assert fragment in self.errors[0], (fragment, self.errors[0])

    def succeeds(self) -> CommandResult:
        """Asserts exit status 0 and an empty stderr."""
        assert (self.status, self.errors) == (0, []), (self.status, self.errors)
        return self


@pytest.fixture
def dpsr(capfd: pytest.CaptureFixture[str]) -> Callable[..., CommandResult]:
    """Runs `dpsr ARGUMENTS...` in this process."""

    def run(*arguments: str) -> CommandResult:
        capfd.readouterr()
        status = main(list(arguments))
        out, err = capfd.readouterr()
        # A progress bar overwrites its line. Its text ends with the elapsed time in brackets.
        lines = [line.strip() for line in re.split(r"[\r\n]", err)]
        return CommandResult(status, out, [line for line in lines if line and not re.search(r"\[\d\d:\d\d[<,]", line)])

    return run


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an object store that the tests of a module share."""
    from object_stores import s3_server  # moto takes a second to import

    with s3_server() as address:
        yield address


@pytest.fixture
def s3_url(s3: str, request: pytest.FixtureRequest) -> str:
    """A prefix of the object store that belongs to one test."""
    from object_stores import BUCKET

    return f"{BUCKET}/{request.node.name}"
