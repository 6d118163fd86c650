"""Another package adds a system to `dpsr evaluate`, an adapter to `dpsr ingest`, and a command to `dpsr`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dpsr_tf.data.store import Store
from dpsr_tf.evaluation.systems import system_names, systems_help

ENTRY_POINTS = """
[dpsr.systems]
shelf = corner_shop.systems:shelf_system

[dpsr.adapters]
corner = corner_shop.corner

[dpsr.commands]
greet = corner_shop.greet
"""

FILES = {
    "__init__.py": "",
    "systems.py": '''
import numpy as np

def shelf_system(corpus, first_item):
    """Returns the same item for every query, then the rest of the corpus."""
    ids = np.array([int(first_item), *(item for item in corpus.item_ids.tolist() if item != int(first_item))])

    def retrieve(queries, users, k):
        found = np.full((len(queries), k), -1, np.int64)
        found[:, : len(ids[:k])] = ids[:k]
        return found, np.zeros((len(queries), k), np.float32)

    return retrieve
''',
    "corner.py": '''
def convert(source, out):
    """Turns "id: title" lines into a table."""
    rows = [line.split(": ") for line in (source / "stock.txt").read_text().splitlines()]
    (out / "items.tsv").write_text("".join("\\t".join(row) + "\\n" for row in [("item_id", "title"), *rows]))
    (out / "log.tsv").write_text("query\\titem\\nred shoes\\t7\\nbread\\t8\\n")
''',
    "corner.yaml": """
items: {files: items.tsv, id: item_id, text: title}
interactions: {files: log.tsv, query: query, item: item}
""",
    "greet.py": '''"""`dpsr greet`: greets somebody."""

from absl import flags

USAGE = "Usage: dpsr greet [--name=NAME]"


def define_flags(values):
    flags.DEFINE_string("name", "nobody", "who is greeted", flag_values=values)


def run(values, arguments):
    print(f"hello {values.name}")
''',
}


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on sys.path with the package `corner_shop`, installed as the distribution `corner-shop`."""
    site = tmp_path / "site"
    (site / "corner_shop").mkdir(parents=True)
    for name, text in FILES.items():
        (site / "corner_shop" / name).write_text(text)
    info = site / "corner_shop-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: corner-shop\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(site)
    return site


def test_another_package_adds_an_adapter_and_a_system(dpsr: Callable, plugin: Path, tmp_path: Path) -> None:
    (tmp_path / "stock.txt").write_text("7: red shoes\n8: rye bread\n9: butter\n")
    dpsr("ingest", "--adapter=corner", f"--input={tmp_path}", f"--out={tmp_path / 'store'}").succeeds()
    store = Store(tmp_path / "store")
    assert list(store.titles()) == ["red shoes", "rye bread", "butter"]
    dpsr("ingest", "--adapter=cornr", f"--input={tmp_path}", f"--out={tmp_path / 'other'}").fails(
        2, "--adapter=cornr: expected one of", " corner,"
    )

    judgments = tmp_path / "judgments.tsv"
    judgments.write_text("query\titem\tgrade\nshoes\t7\t1\nbutter\t9\t1\n")
    flags = ["evaluate", f"--store={tmp_path / 'store'}", f"--judgments={judgments}", "--k=1", "--bootstrap=0"]
    out = dpsr(*flags, "--system=shelf:9", "--system=rrf(shelf:9,bm25)").succeeds().out
    recall = {line.split()[0]: float(line.split()[1]) for line in out.splitlines()[2:4]}
    assert recall["shelf:9"] == 0.5 and "rrf(shelf:9,bm25)" in recall


def test_help_and_errors_name_systems_of_other_packages(dpsr: Callable, plugin: Path, tmp_path: Path) -> None:
    line = next(line for line in systems_help().splitlines() if "shelf" in line)
    assert line.split() == ["shelf:OPERAND", "registered", "by", "the", "package", "corner-shop"]
    assert system_names().endswith(", shelf:OPERAND")
    # The text of --help is made when the command's module is imported: ask a new process.
    script = "from dpsr_common.command_line import main; main(['evaluate', '--help'])"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(plugin)!r}); {script}"]
    assert line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_without_other_packages_help_lists_only_the_known_systems() -> None:
    assert "registered by" not in systems_help()


def test_another_package_adds_a_command(dpsr: Callable, plugin: Path) -> None:
    assert dpsr("greet", "--name=Ann").succeeds().out == "hello Ann\n"
    dpsr("greet", "--nam=Ann").fails(2, "dpsr greet: error: ", "nam")
    overview = dpsr("--help").succeeds().out
    assert "  greet      greets somebody\n" in overview
    assert overview.index("report") < overview.index("greet"), "our own commands come first"
