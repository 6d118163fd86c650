"""The notebook of the tutorial runs, and its search is better than word search."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from notebooks import fill, run_notebook

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "tutorial.ipynb"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_tutorial(tmp_path: Path) -> None:
    printed = run_notebook(NOTEBOOK, tmp_path)
    recall = dict(re.findall(r"^(bm25|model:model) +(\d\.\d+)", "".join(printed), re.MULTILINE))
    assert float(recall["model:model"]) > float(recall["bm25"]), recall
    served = next(text for text in printed if text.startswith("gents wellies"))
    assert "Boots" in served and "Shampoo" in served, served
    # Word search finds no boots: no title says "wellies".
    explained = next(text for text in printed if text.startswith("word search"))
    assert re.search(r"^ +- +\d+ +-?\d+\.\d+  .*Boots", explained, re.MULTILINE), explained
    assert all(float(price) < 100 for price in re.findall(r"^ +(\d+\.\d+)  ", printed[-1], re.MULTILINE)), printed[-1]


def write_notebook(path: Path, *cells: str) -> None:
    sources = [{"cell_type": "code", "source": [cell], "outputs": []} for cell in cells]
    path.write_text(json.dumps({"cells": sources}))


def test_run_notebook(tmp_path: Path) -> None:
    notebook = tmp_path / "a.ipynb"
    write_notebook(notebook, "a = 2\n!echo one; echo two\nprint(a)", "", "print(a + 1)")
    printed = run_notebook(notebook, tmp_path)
    assert printed == ["one\ntwo\n2\n", "", "3\n"]
    fill(notebook, printed)
    cells = json.loads(notebook.read_text())["cells"]
    assert cells[0]["outputs"][0]["text"] == ["one\n", "two\n", "2\n"] and not cells[1]["outputs"]


@pytest.mark.parametrize("cell", ["!exit 3", "raise ValueError"])
def test_a_cell_that_fails_ends_the_run(tmp_path: Path, cell: str) -> None:
    write_notebook(tmp_path / "a.ipynb", "print('before')", cell, "print('after')")
    with pytest.raises(RuntimeError, match="before") as failure:
        run_notebook(tmp_path / "a.ipynb", tmp_path)
    assert "after" not in str(failure.value).partition("Traceback")[0]
