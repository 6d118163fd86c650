"""The order of the files of tests."""

from __future__ import annotations

import pytest

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
