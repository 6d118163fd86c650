from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "tokenizer.py"
sys.path.append(str(SCRIPT.parent))
benchmark = importlib.import_module("tokenizer")
report = importlib.import_module("report")

TITLES = [
    "Simpson Strong-Tie 12-Gauge Angle",
    "BEHR 1-gal. #SC-141 Wood and Concrete Coating",
    "3.5mm x 5/8 in. (1,000-Pack) bolt, 12,500.5 lb.",
    "Élan ÇA жук",
    "a.b 1.a .5 7. 1..2 - 3",
    "",
]
QUERIES = ["减速器链条", "tasco望远镜", "iPhone13手机壳 3.5mm", "カーテン 遮光", "墙面, 底漆。", "机"]
TF_TEXT = ["tf_text_ngrams", "tf_text_substr"]
PEERS = {"tensorflow_text": TF_TEXT, "tokenizers": ["hf_bert_words", "hf_wordpiece"],
         "sentencepiece": ["sentencepiece_unigram", "sentencepiece_bpe"]}  # fmt: skip


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def differing(texts: list[str], folder: Path) -> dict[str, list[str]]:
    found = benchmark.same_as_core(benchmark.comparable(texts, folder), texts, batch_size=4)
    return {
        name: [text for text, is_same in zip(texts, same, strict=True) if not is_same] for name, same in found.items()
    }


@pytest.mark.parametrize("texts", [TITLES, QUERIES])
def test_comparable_ones_give_the_same_tokens(texts, tmp_path):
    names = ["op", "tf_strings", *(TF_TEXT if is_installed("tensorflow_text") else [])]
    assert differing(texts, tmp_path) == {name: [] for name in names}


def test_other_tokens_are_found(tmp_path):
    """tf.strings knows lower case but neither NFKC nor case folding; tensorflow-text does."""
    found = differing([*TITLES, "辅酶Ｑ10美国", "Straße"], tmp_path)
    assert found.pop("tf_strings") == ["辅酶Ｑ10美国", "Straße"]
    assert not any(found.values())


def test_texts_that_differ_are_not_timed(tmp_path):
    result = report.Report("tokenizer", 1, {})
    benchmark.measure(result, "mixed", [*TITLES * 5, "辅酶Ｑ10美国"], [8, 16], 1, 0)
    assert result.value("tf_strings", "mixed", "same_tokens") == 30 / 31
    assert result.value("all", "mixed", "texts_timed") == 30


def test_bars_are_of_the_worse_corpus_and_the_best_batches():
    result = report.Report("tokenizer", 1, {})
    # Name, rates at two batch sizes of the titles, how much faster the queries are, whether comparable
    found = [("core", (60, 50), 1, False), ("op", (20, 54), 2, False), ("core_default", (999, 1), 1, False),
             ("tf_strings", (1, 10), 2, True), ("other", (24, 8), 1, False)]  # fmt: skip
    for workload, is_second in (("titles", False), ("queries", True)):
        for name, rates, factor, comparable in found:
            for size, rate in zip((256, 4096), rates, strict=True):
                samples = [rate * (factor if is_second else 1), 0, 1e6]
                result.add_samples(name, workload, "rate", samples, "MB/s", comparable=comparable, batch_size=size)
    assert benchmark.bars(result) == {
        "ratio_to_best_comparable": pytest.approx(3),
        "ratio_to_best_any": pytest.approx(2.5),
        "op_over_core": pytest.approx(0.9),
    }


def test_rates_count_work_and_take_turns():
    calls = []
    found = report.rates({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 5, 3, 0)
    assert [len(samples) for samples in found.values()] == [3, 3]
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("generated", [False, True])
def test_the_json_line(generated, tmp_path):
    arguments = ["--json", "--quick"]
    workloads = {"generated_chinese_queries", "generated_english_titles"}
    if not generated:
        (tmp_path / "multicpr_ecom").mkdir()
        (tmp_path / "homedepot").mkdir()
        numbered = [f"{i}\t{text}\n" for i, text in enumerate(QUERIES * 20)]
        (tmp_path / "multicpr_ecom" / "dev.query.txt").write_text("".join(numbered), encoding="utf-8")
        numbered = [f"{i}\t{text}\n" for i, text in enumerate(["product_title", *TITLES * 20])]
        (tmp_path / "homedepot" / "products.tsv").write_text("".join(numbered), encoding="utf-8")
        arguments.append(f"--data={tmp_path}")
        workloads = {"multicpr_queries", "homedepot_titles"}
    run = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert list(found) == ["benchmark", "schema", "seed", "hardware", "rows", "bars"]
    assert (found["benchmark"], found["schema"], found["seed"]) == ("tokenizer", 1, 1)
    assert {"cpu", "cores", "versions"} <= set(found["hardware"])
    assert set(found["bars"]) == {"ratio_to_best_comparable", "ratio_to_best_any", "op_over_core"}
    assert all(value > 0 for value in found["bars"].values())
    assert {row["workload"] for row in found["rows"]} == workloads
    measured = {row["impl"] for row in found["rows"] if row["metric"] == "rate"}
    expected = {"core", "op", "tf_strings", "core_default"}
    assert measured == expected.union(*(names for package, names in PEERS.items() if is_installed(package)))
    assert all(0 < row["min"] <= row["value"] <= row["max"] for row in found["rows"] if row["metric"] == "rate")
    shares = [row["value"] for row in found["rows"] if row["metric"] == "same_tokens"]
    assert min(shares) == 1 if not generated else min(shares) > 0.99


def test_a_directory_without_the_corpora(tmp_path):
    with pytest.raises(SystemExit, match="no file multicpr_ecom"):
        benchmark.corpora(str(tmp_path), 10, 1)
