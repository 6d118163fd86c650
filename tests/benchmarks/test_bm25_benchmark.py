"""benchmarks/bm25.py on a catalogue in which stems and letter trigrams matter."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dpsr_common import command_line
from dpsr_tf.data.store import Store
from dpsr_tf.evaluation.corpus import Corpus
from dpsr_tf.evaluation.judgments import Judgments

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "bm25.py"
sys.path.append(str(SCRIPT.parent))
benchmark = importlib.import_module("bm25")

SCHEMA = """
items: {files: items.tsv, id: id, text: [title, brand]}
interactions: {files: log.tsv, query: query, item: item}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, and judgments of two queries that no word of a title or brand answers."""
    folder = tmp_path_factory.mktemp("bm25")
    tables = {
        "schema.yaml": SCHEMA,
        "items.tsv": "id\ttitle\tbrand\n1\twall shelves\tAcme\n2\tred shoes\tNordic\n3\tblue lamp\tAcme\n",
        "log.tsv": "query\titem\nlamp\t3\n",
        "judgments.dev.tsv": "query\titem\tgrade\nshelved\t1\t1\nnordik\t2\t1\n",
    }
    for name, text in tables.items():
        (folder / name).write_text(text)
    assert not command_line.main(["ingest", f"--schema={folder / 'schema.yaml'}", f"--out={folder / 'store'}"])
    return folder


def test_the_search_finds_what_helps(folder):
    corpus = Corpus.of_store(Store(folder / "store"))
    judgments = Judgments.read(folder / "judgments.dev.tsv", "query", "item", "grade", 1.0)
    search = benchmark.Search(corpus, {"dev": judgments})
    best = search.best()
    assert search.value(benchmark.Setting()) == 0 and search.value(best) == 1
    assert best.stem and best.trigrams, "stems answer one query, trigrams the other"
    assert best.system(search.columns).startswith("bm25:stem+trigrams=")
    assert best == benchmark.Setting(stem=True, trigrams=0.1), "what changes nothing stays as it is"
    assert benchmark.Setting().system(["title"]) == "bm25"
    assert benchmark.Setting(title=2.0, k1=0.9).system(["title", "brand"]) == "bm25:k1=0.9+title=2+brand=1"


def test_the_command(folder):
    flags = [f"--store={folder / 'store'}", f"--judgments={folder / 'judgments.dev.tsv'}", "--json"]
    run = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["bars"] == {"recall100_judgments_dev_plain": 0, "recall100_judgments_dev_best": 1}
    assert "--system=bm25:stem+trigrams=" in run.stdout.splitlines()[0]
    tried = {row["impl"] for row in found["rows"]}
    assert {"bm25", "bm25:stem"} <= tried and len(tried) > 20
    missing = subprocess.run([sys.executable, SCRIPT, flags[0]], capture_output=True, text=True, check=False)
    assert missing.returncode and "--judgments is missing" in missing.stdout + missing.stderr
