"""How `make test` shares the tests among its processes (tests/conftest.py)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Its fixture takes so long that the other process is free meanwhile. Each test tells its kind and its process.
FILE = """
import os, time
import pytest

@pytest.fixture(scope="module")
def shared():
    time.sleep(0.3)
    with open("made", "a") as file:
        file.write(f"{__name__}\\n")

@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("kind", ["fast", pytest.param("slow", marks=pytest.mark.slow)])
def test_it(shared, kind, number):
    with open("ran", "a") as file:
        file.write(f"{__name__} {kind} {os.environ['PYTEST_XDIST_WORKER']}\\n")
"""


@pytest.mark.long
def test_what_a_file_shares_is_made_once_for_its_fast_and_once_for_its_slow_tests(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    for name in ("a", "b", "c"):
        (tmp_path / f"test_{name}.py").write_text(FILE)
    options = re.search(r"^PYTEST := .* -m pytest (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert options
    command = [sys.executable, "-m", "pytest", *options[1].split(), "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "24 passed" in done.stdout, done.stdout + done.stderr
    ran = [line.split() for line in (tmp_path / "ran").read_text().splitlines()]
    processes = {(module, kind): {worker for *one, worker in ran if one == [module, kind]} for module, kind, _ in ran}
    assert len(processes) == 6 and all(len(workers) == 1 for workers in processes.values()), ran
    assert len(set.union(*processes.values())) == 2, ran
    made = (tmp_path / "made").read_text().split()
    assert all(made.count(f"test_{name}") <= 2 for name in ("a", "b", "c")), made
    # The fast tests come first in every process.
    for worker in ("gw0", "gw1"):
        kinds = [kind for _, kind, at in ran if at == worker]
        assert kinds == sorted(kinds), ran
