"""What holds for all tests: the order of their files, and that Ctrl-C means what it does in a terminal."""

from __future__ import annotations

import signal

import pytest

# A shell's background job ignores it, and so would the commands that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What takes longest, the longest first: `make test` runs two files at a time, and one of these begun last would leave a
# processor idle until it has ended. The others follow in the order of their paths.
_FIRST = (
    "end_to_end/test_demo.py",
    "dpsr_tf/test_report.py",
    "end_to_end/test_wheel.py",
    "end_to_end/test_documents.py",
    "serving/test_place.py",
    "benchmarks/test_serving_benchmarks.py",
    "dpsr_tf/test_training.py",
    "export/test_export_personal.py",
    "export/test_export_versions.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts files; the tests of a file keep their order."""
    items.sort(key=lambda item: next((at for at, name in enumerate(_FIRST) if item.path.match(name)), len(_FIRST)))
