"""Runs the commands of pages that show a whole path, as they are written there."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_document(name: str, folder: Path, python: str | None = None) -> str:
    """Runs the `sh` blocks of a page as one script in `folder`, on free ports; returns what it printed.

    The page's first `python` block is saved as the file `python` before.
    """
    page = (ROOT / "docs" / name).read_text()
    if python is not None:
        (folder / python).write_text(re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[0])
    script = "\n".join(re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    for port in ("8500", "8501", "8700"):
        script = script.replace(f"{port}", str(free_port()))
    (folder / "dpsr_tf").symlink_to(ROOT / "dpsr_tf")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # The shell ends the processes that it has started, also if a command fails.
    script = f"set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{script}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quickstart(tmp_path: Path) -> None:
    printed = run_document("quickstart.md", tmp_path)
    assert re.search(r"^gents wellies\n.*\n +1 ", printed, re.MULTILINE), printed
    # Of the first table, whose first column is recall@10: the same systems stand in the tables after it.
    first_table = printed.split("ndcg@10")[1].split("bootstrap interval")[0]
    recall = {
        name: float(value) for name, value in re.findall(r"^(bm25|index:\S+) +(\d\.\d+)", first_table, re.MULTILINE)
    }
    assert recall["index:quick/index"] > recall["bm25"], printed


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bring_your_own_log(tmp_path: Path) -> None:
    printed = run_document("own_log.md", tmp_path)
    plain, filtered = printed.split("\nsneakers\n")[1:3]
    assert re.search(r" 1 .*Running Shoes", plain), printed
    assert "Trail" not in filtered.split("predictions")[0], printed  # The trail shoes cost more than 60.
    assert re.search(r"boiler\n.*\n +1 .*Kettle", printed), printed
    assert re.search(r"hedset\n.*\n +1 .*Headphones", printed), printed
    assert '"item_keys"' in printed
    # One search: words and model find the shoes, the ranker orders them, and the filter holds.
    answer = json.loads(re.findall(r'\{"query":.*\}', printed)[-1])
    assert answer["items"][0]["key"] == "A2" and not answer["degraded"], answer
    assert {"inverted", "semantic", "fine"} < set(answer["items"][0]["explain"]), answer
    assert {item["attributes"]["in_stock"] for item in answer["items"]} == {"1"}


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_text_encoder_of_ones_own(tmp_path: Path) -> None:
    """The module is importable for training, evaluation, index and export only."""
    printed = run_document("own_encoder.md", tmp_path, "shop_encoders.py")
    assert re.search(r"^women shoes\n.*\n +1 ", printed, re.MULTILINE), printed
    # Of the first two tables: ranks, then which items are found. Only the model can score pairs (auc).
    tables = printed.split("latency_ms_p50")[0]
    of_model, of_server = (
        [row.split()[:4] for row in re.findall(rf"^{kind}:\S+ +(\d.*)$", tables, re.MULTILINE)]
        for kind in ("model", "server")
    )
    assert len(of_model) == 2 and of_model == of_server, printed
    assert float(of_model[0][0]) > 0.5, printed


@pytest.mark.long
@pytest.mark.timeout(600)
def test_hyperparameter_search(tmp_path: Path) -> None:
    printed = run_document("hyperparameter_search.md", tmp_path, "search.py")
    number, best = re.search(
        r"^best: trial (\d), recall@10 (0\.\d+) on the validation queries$", printed, re.M
    ).groups()
    assert sorted(path.name for path in (tmp_path / "search" / "trials").iterdir()) == [f"trial-{i}" for i in range(5)]
    measured = {
        path.name: max(json.loads(line)["recall@10"] for line in (path / "validation.jsonl").read_text().splitlines())
        for path in (tmp_path / "search" / "trials").iterdir()
    }
    assert float(best) == pytest.approx(measured[f"trial-{number}"], abs=1e-3) and float(best) > 0.2
    assert measured[f"trial-{number}"] == max(measured.values())
    assert re.search(r"^model:search/best +0\.\d+", printed, re.MULTILINE), printed
