"""The ops linked into a program instead of loaded: what a TensorFlow Serving build has (docs/tensorflow_serving.md)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from conftest import Job

from dpsr_export import faiss_search
from dpsr_export.warmup import LoadedServable

pytestmark = pytest.mark.slow
LINKED = Path(__file__).parents[2] / "build" / "current" / "export" / "linked_servable"
QUERIES = ["phone case", "苹果 手机", ""]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    faiss_search.load()  # says where libfaiss.so is
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [str(argument) for argument in (LINKED, *arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_program_with_the_ops_linked_in_answers_alike(personal: Job) -> None:
    """It fails where an op library of ours is mapped into the process."""
    done = run(personal.servable / "1", *QUERIES)
    assert done.returncode == 0, done.stderr
    expected = LoadedServable(personal.servable / "1")("serving_default", {"query": QUERIES})["item_ids"]
    assert [[int(item) for item in line.split()] for line in done.stdout.splitlines()] == expected.tolist()


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    done = run(tmp_path / "none", "red")
    assert done.returncode == 1 and "none" in done.stderr and done.stdout == ""
