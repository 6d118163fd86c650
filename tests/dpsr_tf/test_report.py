"""The report: its files, that it continues where it stopped, and its parts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dpsr_common.errors import CommandError, UsageError
from dpsr_tf.report import plots, quotes, sections
from dpsr_tf.report.benchmarks import BENCHMARKS
from dpsr_tf.report.command import html, parts_from_flag, size_from_flags
from dpsr_tf.report.figures import EXPERIMENTS, figures, figures_page, full_command
from dpsr_tf.report.quotes import renewed, waiting
from dpsr_tf.report.runner import ExperimentRunner
from dpsr_tf.report.sections import Report
from dpsr_tf.report.shop import QUICK, REPOSITORY

MODELS_OF_TABLE_2 = ("DSSM", "DSSM-our-start", "DPSR")
# A report with a few seconds of training. Its models learn little, but every experiment runs.
TINY = (
    "--quick",
    "--parts=experiments,index",
    *(f"--set={value}" for value in ("items=1500", "users=30", "interactions=1500", "purchases=30", "steps=8")),
    *(f"--set={value}" for value in ("judged_queries=30", "shared_brands=1", "batch_size=32", "mixing_ratios=[0.5]")),
    *(f"--set={value}" for value in ("plotted_items=100", "widths=[64]", "requests=400")),
)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_report_is_whole_goes_on_and_repeats(dpsr: Callable, tmp_path: Path) -> None:
    out = tmp_path / "report"

    def report() -> str:
        outcome = dpsr("report", f"--out={out}", "--seed=3", *TINY)
        assert outcome.status == 0, outcome.errors
        return outcome.out

    report()
    found = json.loads((out / "report.json").read_text())
    page, text = (out / "index.html").read_text(), (out / "report.md").read_text()

    figures = re.findall(r"!\[.*\]\((plots/.*\.svg)\)", text)
    assert len(figures) == 4 and all((out / name).is_file() for name in figures)
    # The page opens from disk: it refers to no other file.
    assert page.count("<svg") == 4
    assert not re.search(r"<(img|script|link|iframe)\b|url\((?!#)|@import", page)
    assert [f'<h2 id="{name}' in page for name in ("table-2", "figure-5", "figure-6", "figure-7", "table-1")] == [
        True
    ] * 5
    for system in sections.METHODS:
        for measured, figure in (("purchases", "top-1"), ("purchases", "top-10"), ("labels", "auc")):
            low, high = found["table2"][0][measured]["intervals"][system][figure]
            assert low <= found["table2"][0][measured]["systems"][system][figure] <= high
    assert found["seed"] == 3 and found["size"]["steps"] == 8
    # DSSM differs from DPSR in its loss, its negatives and its start, not in what the towers read.
    models = {label: json.loads((out / "runs" / f"model-{label}-3.json").read_text()) for label in MODELS_OF_TABLE_2}
    configs = [one["definition"]["config"]["model"] for one in models.values()]
    assert len({json.dumps([config["hidden"], config["item_features"]]) for config in configs}) == 1
    assert [config.get("aligned_start", True) for config in configs] == [False, True, True]
    # AUC of models that read users is measured with users.
    graded = json.loads((out / "runs" / "labels-3.json").read_text())["definition"]
    assert "--user_column=user_id" in graded["flags"]
    assert "orders of the paper's Table 2" in text and "BM25 < BM25-u&b by top-1" in text
    assert found["bars"]["top_10_bm25"] == found["table2"][0]["purchases"]["systems"]["BM25"]["top-10"]

    # Rankers that know more of the truth find more.
    known = [ranker["top-1"]["value"] for ranker in found["ceilings"][0]["rankers"].values()]
    assert 0 < known[0] < known[1] < known[2] <= 1
    assert found["polysemy"][0]["widths"]["64"]["homonyms"]["queries"] > 20

    # Cases follow the rule: no common word, the first item relevant or not.
    for case in found["cases"]["gap"]["good_cases"]:
        assert not set(case["query"].lower().split()) & set(case["item"].lower().split())
    assert all(case["rank"] > 1 for of in found["cases"].values() for case in of["bad_cases"])
    for query in found["examples"]["queries"]:
        assert [len(of["heads"]) for of in query["models"].values()] == [1, 2]

    rows = (out / "projector" / "metadata.tsv").read_text().splitlines()
    vectors = np.loadtxt(out / "projector" / "vectors.tsv", delimiter="\t")
    assert vectors.shape == (1500, 64) and len(rows) == 1501
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)

    # The benchmark and the figures that docs quote.
    assert "build_wall_s" in found["benchmarks"]["index"]["bars"] and '<h2 id="120-million-items' in page
    assert json.loads((out / "figures.json").read_text())["index"]["bars"] == found["benchmarks"]["index"]["bars"]
    assert "| `build_wall_s` |" in (out / "figures.md").read_text()
    quoted = json.loads((out / "figures.json").read_text())["experiments"]
    assert quoted["command"].startswith("dpsr report --parts=experiments --quick --set=items=1500")
    assert quoted["rows"]["DPSR; purchases, seed 3; top-1"] == pytest.approx(
        found["table2"][0]["purchases"]["systems"]["DPSR"]["top-1"], rel=1e-5
    )
    table = quoted["tables"]["top-1, purchases"]
    assert table[0] == "| top-1, purchases | seed 3 |" and "\n".join(table) in text

    # No experiment runs again, except those whose results are deleted; these give the same results.
    assert "..." not in report()
    shutil.rmtree(next((out / "work").glob("model-DPSR-3-*")))
    for name in ("topology", "cases"):
        (out / "runs" / f"{name}-3.json").unlink()
    assert re.findall(r"^(\S+) \.\.\.$", report(), re.MULTILINE) == ["model-DPSR-3", "topology-3", "cases-3"]
    repeated = json.loads((out / "report.json").read_text())
    assert {key: value for key, value in repeated.items() if key != "seconds"} == {
        key: value for key, value in found.items() if key != "seconds"
    }


def test_bad_flags(dpsr: Callable, tmp_path: Path) -> None:
    dpsr("report").fails(2, "--out is missing")
    out = f"--out={tmp_path / 'new'}"
    dpsr("report", out, "--set=step=5").fails(2, "step", "steps")
    dpsr("report", out, "--set=items=5").fails(2, "items", "5", "1500")
    dpsr("report", out, "--set=items").fails(2, "--set=items", "name=value")
    dpsr("report", out, f"--movielens={tmp_path / 'none'}").fails(2, "--movielens", "no such directory")
    assert not (tmp_path / "new").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    dpsr("report", f"--out={tmp_path / 'other'}").fails(1, "holds no report")
    # A wrong directory is reported before the first experiment.
    dpsr("report", out, f"--homedepot={tmp_path}").fails(1, f"--homedepot={tmp_path}: has no judgments.dev.tsv")
    dpsr("report", out, f"--qbqtc={tmp_path}").fails(1, "train.json: cannot be read")


def test_parts_of_a_report() -> None:
    assert parts_from_flag(["graph", "experiments"], True) == ["experiments", "graph"]
    quick, full = parts_from_flag([], True), parts_from_flag([], False)
    assert full == ["experiments", *BENCHMARKS]
    assert set(full) - set(quick) == {"graph", "model_server", "scale", "search", "transfer"}
    with pytest.raises(UsageError, match=r"--parts=graph,grpah: 'grpah' is unknown; expected some of experiments, "):
        parts_from_flag(["graph", "grpah"], False)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_of_the_report_exist(name: str) -> None:
    one = BENCHMARKS[name]
    source = (REPOSITORY / "benchmarks" / f"{one.script}.py").read_text()
    reads = ["--data="] if one.reads and "{data}" not in "".join(one.flags) else []
    given = [*one.flags, *(one.quick or ()), *([f"--{one.keeps}="] if one.keeps else []), *reads]
    for flag in given:
        assert f'"{flag[2:].partition("=")[0]}"' in source or f'"{flag.partition("=")[0]}"' in source, flag
    assert (REPOSITORY / "docs" / one.page).is_file()
    assert f"`{name}`" in (REPOSITORY / "docs" / "report.md").read_text()


def test_benchmarks_in_the_report() -> None:
    def row(impl: str, metric: str, value: float, unit: str = "", **more: list[float]) -> dict:
        return {"impl": impl, "workload": "w 1", "metric": metric, "value": value, "unit": unit, **more}

    graph = {
        "rows": [
            row("A", "recall", 0.51234, interval=[0.5, 0.52]),
            row("B", "recall", 0.4),
            row("B", "cpu", 1234.5, "us"),
        ],
        "bars": {"train_rate_over_dpsr": 0.2, "query_latency_over_dpsr": 1.1, "other": 12345.6},
        "hardware": {"cpu": "a CPU", "cores": 2},
        "date": "2026-11-23",
        "seed": 1,
        "command": "python benchmarks/graph.py --json",
    }
    page = Report()
    sections._benchmarks(page, {"graph": graph, "search": {"missing": ["homedepot"]}}, "full")
    assert "| SearchGCN | `train_rate_over_dpsr` | ≥ 0.25 | 0.200 | **no** |" in page.lines
    assert "| `query_latency_over_dpsr` | ≤ 1.3 | 1.100 | yes |" in page.lines
    assert "| `other` |  | 12,346 |  |" in page.lines
    assert "| `gowalla_ndcg20` | ≥ 0.1517 | not measured |  |" in page.lines
    assert "### w 1" in page.lines and "| A | 0.512 (0.500 to 0.520) |  |" in page.lines
    assert "| B | 0.400 | 1,234 us |" in page.lines and "| Recall@20 on Gowalla | 0.1824 |" in page.markdown
    assert "the folder of the data sets has no homedepot. Give --data." in page.markdown
    found = figures({"benchmarks": {"graph": graph, "search": {"missing": ["homedepot"]}}}, {})
    assert list(found) == ["graph"]
    assert found["graph"]["rows"] == {
        "A; w 1; recall": 0.51234, "A; w 1; recall; low": 0.5, "A; w 1; recall; high": 0.52,
        "B; w 1; recall": 0.4, "B; w 1; cpu": 1234.5,
    }  # fmt: skip
    text = figures_page(found)
    assert "`python benchmarks/graph.py --json`, 2026-11-23, a CPU, 2 cores, seed 1." in text
    assert "| `train_rate_over_dpsr` | ≥ 0.25 | 0.200 | **no** |" in text


def test_size_of_a_mode() -> None:
    assert size_from_flags(True, []) == QUICK
    assert size_from_flags(False, ["mixing_ratios=[0, 1]"]).mixing_ratios == (0.0, 1.0)


def test_an_experiment_runs_once(tmp_path: Path) -> None:
    runner, ran = ExperimentRunner(tmp_path, 1, 1), []

    def compute() -> dict:
        ran.append(1)
        return {"value": len(ran)}

    assert runner.result("one", {"x": 1}, compute) == {"value": 1}
    assert runner.result("one", {"x": 1}, compute) == {"value": 1}
    assert ExperimentRunner(tmp_path, 1, 1).result("one", {"x": 1}, compute) == {"value": 1}
    assert runner.result("one", {"x": 2}, compute) == {"value": 2}
    (tmp_path / "runs" / "one.json").write_text('{"digest": "')
    assert runner.result("one", {"x": 2}, compute) == {"value": 3}

    def fail() -> dict:
        raise CommandError("no")

    with pytest.raises(CommandError):
        runner.result("two", {}, fail)
    assert not (tmp_path / "runs" / "two.json").exists()
    # If one of a group fails, the others do not start, and its error is raised.
    with pytest.raises(CommandError, match="no"):
        runner.run_together({"a": fail, "b": fail, "c": fail})


def test_a_script_that_fails_says_why(tmp_path: Path) -> None:
    runner = ExperimentRunner(tmp_path, 1, 1)
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('fine')\nsys.exit('it broke' if sys.argv[1:] else 0)\n")
    assert runner.run_script("good", script) == "fine\n"
    with pytest.raises(CommandError, match=r"bad: ended with status 1: it broke; see .*bad\.log") as error:
        runner.run_script("bad", script, "now")
    assert error.value.status == 1


def test_markdown_tables_and_html() -> None:
    page = Report()
    page.heading("Head")
    page.table(("name", "value"), [("a|b <i>", 1), ("c", 2)])
    page.table(("empty",), [])
    page.figure("plot", "a caption", plots.bars({"g": [("x", 1.0, None)]}, ""))
    drawn = {"plot": plots.svg(page.figures["plot"], "plot")}
    body = html(page.markdown, drawn)
    assert '<td style="text-align: left;">a|b &lt;i&gt;</td>' in body
    assert body.count("<table>") == 1 and "None." in body
    assert '<figure role="img" aria-label="a caption"><svg' in body


def test_figures_are_the_same_again_and_their_ids_are_apart() -> None:
    def draw(name: str) -> str:
        return plots.svg(plots.bars({"g": [("x", 1.0, [0.5, 1.5]), ("y", 2.0, [1.5, 2.5])]}, "title"), name)

    assert draw("one") == draw("one")
    ids = [set(re.findall(r'\bid="([^"]+)"', draw(name))) for name in ("one", "two")]
    assert ids[0] and not ids[0] & ids[1]
    for reference in re.findall(r'(?:href="|url\()#([^")]+)', draw("one")):
        assert reference in ids[0]


def test_labels_do_not_lie_over_one_another() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(60, 2))
    names = [f"type {row}" for row in range(12)]
    figure = plots.topology(
        {"points": points, "type": [names[row % 12] for row in range(60)], "category": dict.fromkeys(names, "category")}
    )
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 12
    assert not any(a.overlaps(b) for row, a in enumerate(boxes) for b in boxes[:row])


def test_orders_of_the_paper_are_said_to_hold_or_not() -> None:
    values = {"DSSM": 0.5, "BM25": 0.4, "BM25-u&b": 0.41, "DPSR": 0.6, "DPSR-p": 0.7, "DPSR-h": 0.8}

    def measured(*figures: str) -> dict:
        return {
            "systems": {label: dict.fromkeys(figures, value) for label, value in values.items()},
            "intervals": {
                label: {figure: [value - 0.02, value + 0.02] for figure in figures} for label, value in values.items()
            },
        }

    table = {"purchases": measured("top-1", "top-10"), "labels": measured("auc")}
    clearly, overlapping, wrong = sections._orders_of_the_paper([table, table])
    assert "BM25-u&b < DPSR by top-1; DPSR < DPSR-p by top-1" in clearly and "2 shops" in clearly
    assert overlapping.endswith("BM25 < BM25-u&b by top-1; BM25 < BM25-u&b by top-10.")
    assert "DSSM < BM25 by top-1 (holds on 0 of 2)" in wrong and "DPSR-h < DPSR-p by AUC (holds on 0 of 2)" in wrong


def test_an_order_is_judged_by_values_and_by_intervals() -> None:
    order = ("BM25", "DPSR", "DPSR-p", "DPSR-h")

    def judged(values: list[float], width: float) -> tuple[bool, bool]:
        systems = {label: {"top-1": value} for label, value in zip(order, values, strict=True)}
        limits = {label: {"top-1": [one["top-1"] - width, one["top-1"] + width]} for label, one in systems.items()}
        return sections._order({"systems": systems, "intervals": limits}, order, "top-1")

    assert judged([0.1, 0.2, 0.3, 0.4], 0.04) == (True, True)
    assert judged([0.1, 0.2, 0.3, 0.4], 0.06) == (True, False)
    assert judged([0.1, 0.3, 0.2, 0.4], 0.04) == (False, False)


def test_quoted_figures_follow_what_was_measured() -> None:
    measured = {"proxy": {"bars": {"added_p50_ms": 0.3149, "qps_per_core": 10960.2}}, "soak": {"bars": {"failed": 0}}}
    page = (
        "It adds 0.36<!--proxy.added_p50_ms--> ms at 9,999<!-- proxy.qps_per_core --> requests a second, 12 failed, "
        "1<!--soak.failed-->; 5.0<!--proxy.qps_per_core / 1000--> thousand, +9<!--proxy.added_p50_ms * 100--> %"
    )
    assert renewed(page, measured) == (
        "It adds 0.31<!--proxy.added_p50_ms--> ms at 10,960<!-- proxy.qps_per_core --> requests a second, 12 failed, "
        "0<!--soak.failed-->; 11.0<!--proxy.qps_per_core / 1000--> thousand, +31<!--proxy.added_p50_ms * 100--> %"
    )
    assert renewed("0.2-0.4<!--proxy.added_p50_ms-->", measured) == "0.2-0.3<!--proxy.added_p50_ms-->", "not a sign"
    for wrong, message in (
        ("1<!--proxy.failed-->", "has no such figure; run `dpsr report --parts=proxy`"),
        ("1 ms<!--soak.failed-->", "follows no figure"),
        ("1<!--soak.failed % 3-->", "expected <!--BENCHMARK.BAR-->"),
    ):
        with pytest.raises(CommandError, match=message):
            renewed(wrong, measured)


def test_quoted_rows_follow_what_was_measured() -> None:
    rows = {
        "nginx; open 300; p50": 0.28512,
        "proxy; open 300; p50": 0.4,
        "server; 1,000 items; restart": 4.41,
        "server; 1,000 items; restart; low": -4.31,
    }
    measured = {"fresh": {"bars": {}, "rows": rows}, "proxy": {"bars": {}}}
    page = (
        "0.2<!--fresh: nginx; open 300; p50--> ms, 1<!-- fresh: server; *; restart / 2 --> s "
        "(+0.5<!--fresh: server; *; restart; low-->), 285<!--fresh: *; open 300; p50--> us"
    )
    # One row alone has to fit.
    with pytest.raises(
        CommandError, match=r"2 rows of docs/figures.json .*nginx; open 300; p50 \| proxy; open 300; p50"
    ):
        renewed(page, measured)
    assert renewed(page.replace("*; open", "nginx; open").replace("p50--> us", "p50 * 1000--> us"), measured) == (
        "0.3<!--fresh: nginx; open 300; p50--> ms, 2<!-- fresh: server; *; restart / 2 --> s "
        "(-4.3<!--fresh: server; *; restart; low-->), 285<!--fresh: nginx; open 300; p50 * 1000--> us"
    )
    with pytest.raises(CommandError, match=r"0 rows of docs/figures.json .*with such names: nginx; open 300; p50"):
        renewed("0.2<!--fresh: nginx; open 30; p50--> ms", measured)
    with pytest.raises(CommandError, match="follows no figure"):
        renewed("0.2 ms<!--fresh: nginx; open 300; p50-->", measured)
    with pytest.raises(CommandError, match=r"has no such figure; run `dpsr report --parts=soak`"):
        renewed("0.2<!--soak: nginx; open 300; p50-->", measured)
    # A benchmark whose rows are not kept yet.
    later = "0.2<!--proxy: nginx; open 300; p50--> and 0.3<!--proxy: proxy; open 300; p50-->"
    assert renewed(later, measured) == later
    assert waiting(later + page, measured) == {"proxy": 2}


def test_tables_of_the_report_follow_what_was_measured() -> None:
    measured = {"experiments": {"bars": {}, "tables": {"alpha": ["| a |", "|---|", "| 1 |"]}}}
    page = "1\n<!--table experiments: alpha-->\n<!--end-->\n2"
    shown = "1\n<!--table experiments: alpha-->\n\n| a |\n|---|\n| 1 |\n\n<!--end-->\n2"
    assert renewed(page, measured) == shown == renewed(shown, measured)
    for wrong, message in (
        (page.replace("alpha", "beta"), "has no such table; tables with such names: alpha"),
        (page.replace("experiments", "proxy"), "has no such table"),
        (page.replace("<!--end-->", ""), "expected <!--end--> after each"),
    ):
        with pytest.raises(CommandError, match=message):
            renewed(wrong, measured)


def test_the_pages_take_the_figures_of_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that the report did not run keep their figures."""
    hardware = {"cpu": "a CPU", "cores": 2}
    old, new = (
        {
            "date": date,
            "command": "python benchmarks/store.py --json",
            "seed": 1,
            "hardware": hardware,
            "bars": {"bar": bar},
            "rows": [{"impl": "A", "workload": "w", "metric": "m", "value": 10 * bar, "unit": "s"}],
        }
        for date, bar in (("2026-01-01", 1.0), ("2026-02-02", 2.0))
    )
    kept_old, kept_new = ({**one, "rows": {"A; w; m": 10 * one["bars"]["bar"]}} for one in (old, new))
    del kept_old["rows"]
    own = {**new, "command": full_command(EXPERIMENTS), "rows": {"DPSR; purchases, seed 1; top-1": 0.3251}}
    own["tables"] = {"top-1, purchases": ["| method | seed 1 |", "| :-- | --: |", "| DPSR | 0.325 |"]}
    docs, report = tmp_path / "docs", tmp_path / "report"
    docs.mkdir()
    report.mkdir()
    (tmp_path / "README.md").write_text("1.0<!--store.bar-->, 10<!--store: A; w; m--> and 1<!--proxy.bar-->")
    (docs / "report.md").write_text(
        "a\n\n<!--table experiments: top-1, purchases-->\n| old |\n<!--end-->\n\n"
        "0.1<!--experiments: DPSR; purchases, seed 1; top-1-->\n"
    )
    (docs / "figures.json").write_text(json.dumps({"proxy": kept_old, "store": kept_old}))
    (docs / "figures.md").write_text("")
    (report / "figures.json").write_text(json.dumps({"store": kept_new, "experiments": own}))
    monkeypatch.setattr(quotes, "REPOSITORY", tmp_path)
    quotes.main([str(report)])
    assert (tmp_path / "README.md").read_text() == "2.0<!--store.bar-->, 20<!--store: A; w; m--> and 1<!--proxy.bar-->"
    assert (docs / "report.md").read_text() == (
        "a\n\n<!--table experiments: top-1, purchases-->\n\n| method | seed 1 |\n| :-- | --: |\n| DPSR | 0.325 |\n\n"
        "<!--end-->\n\n0.3<!--experiments: DPSR; purchases, seed 1; top-1-->\n"
    )
    expected = {"experiments": own, "store": kept_new, "proxy": kept_old}
    assert json.loads((docs / "figures.json").read_text()) == expected
    assert (docs / "figures.md").read_text() == figures_page(expected)

    quick = tmp_path / "quick"
    quick.mkdir()
    command = "python benchmarks/store.py --quick --json"
    (quick / "figures.json").write_text(json.dumps({"store": {**new, "command": command}}))
    (report / "figures.json").write_text(json.dumps({"stores": new}))
    for wrong, message in (
        (report, "unknown parts"),
        (tmp_path, "expected the directory of a `dpsr report`"),
        (quick, "store ran as `.*--quick --json`; expected `python benchmarks/store.py --json`"),
    ):
        with pytest.raises(CommandError, match=message):
            quotes.main([str(wrong)])
    assert json.loads((docs / "figures.json").read_text()) == expected
