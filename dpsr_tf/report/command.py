"""`dpsr report`: runs the experiments of the paper and writes a report."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import markdown
import numpy as np
from absl import flags

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.files import write_text
from dpsr_common.typed_config import from_dict, read_assignment, to_dict
from dpsr_tf import __version__
from dpsr_tf.report import benchmarks, experiments, plots, sections
from dpsr_tf.report.figures import EXPERIMENTS, figures, figures_page
from dpsr_tf.report.public_data import DATA_SETS
from dpsr_tf.report.runner import ExperimentRunner, Result
from dpsr_tf.report.shop import QUICK, REPOSITORY, Size

USAGE = """
Usage: dpsr report --out=DIR [--quick] [--parts=NAMES] [--data=DIR] [--ablations] [--homedepot=DIR] [--movielens=DIR]
                   [--qbqtc=DIR]

Runs the experiments of the DPSR paper (section 6) on generated shops, and on the public data sets that are given; and
the benchmarks of all parts of the system, if it runs in a checkout of the repository. Writes DIR/index.html,
DIR/report.md, DIR/report.json, and the bars of the benchmarks as DIR/figures.md and DIR/figures.json. What has a
result in DIR is not run again, so a report that was interrupted continues where it stopped. docs/report.md says more.
"""

REQUIRED_FLAGS = ("out",)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
td, th { padding: .2rem .6rem; border-bottom: 1px solid #e4e4e4; font-variant-numeric: tabular-nums; }
th { border-bottom: 1px solid #888; vertical-align: bottom; } td { vertical-align: top; }
figure, svg { max-width: 100%; height: auto; } code { background: #f3f3f3; padding: 0 .2rem; }
"""


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `dpsr report`."""
    flags.DEFINE_string("out", None, "directory for the report, its shops, models and results", flag_values=values)
    flags.DEFINE_boolean(
        "quick", False, "run small experiments, which take minutes instead of hours", flag_values=values
    )
    flags.DEFINE_list(
        "parts",
        [],
        "what to run: experiments, and names of the benchmarks that docs/report.md lists (default: all; with --quick, "
        "all that have a quick form)",
        flag_values=values,
    )
    flags.DEFINE_string(
        "data",
        None,
        "folder of the data sets of the benchmarks (default: $DPSR_DATA, else ../shared/data beside the checkout)",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "ablations",
        False,
        "also run the ablations, which change one part of the model or training, and the trainings that check claims "
        "of section 4 of the paper",
        flag_values=values,
    )
    for name, title in (("homedepot", "Home Depot"), ("movielens", "MovieLens 100K"), ("qbqtc", "QBQTC")):
        flags.DEFINE_string(
            name, None, f"directory of the {title} files; without it this data set is skipped", flag_values=values
        )
    flags.DEFINE_integer(
        "seed", 1, "seed of the first generated shop, of trainings and of samples", 0, 2**31 - 1000, flag_values=values
    )
    flags.DEFINE_integer(
        "jobs", None, "number of trainings to run at once (default: the number of cores)", 1, 1024, flag_values=values
    )
    flags.DEFINE_multi_string(
        "set", [], "override one size of the experiments, for example steps=500", flag_values=values
    )


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr report`."""
    # Exit through exceptions on SIGTERM, so that the trainings are ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    size = size_from_flags(values.quick, values["set"].value)
    parts = parts_from_flag(values.parts, values.quick)
    data = {name: Path(values[name].value) for name in DATA_SETS if values[name].value}
    sets = Path(values.data or os.environ.get("DPSR_DATA") or REPOSITORY.parent / "shared" / "data")
    for name, path in [*data.items(), *([("data", sets)] if values.data else [])]:
        if not path.is_dir():
            raise UsageError(f"--{name}={path}: no such directory")
    out = Path(values.out)
    if out.is_dir() and any(out.iterdir()) and not (out / "runs").is_dir():
        raise CommandError(f"--out={out}: exists but holds no report (it has no runs/); choose another directory")
    try:
        runner = ExperimentRunner(out, values.seed, values.jobs or len(os.sched_getaffinity(0)))
    except OSError as error:
        raise CommandError(f"--out={out}: cannot be created: {error.strerror}") from None
    start = time.monotonic()
    results: Result = {}
    if EXPERIMENTS in parts:
        results |= experiments.run(runner, size, values.ablations, data)
    if (REPOSITORY / "benchmarks").is_dir() and len(parts) > (EXPERIMENTS in parts):
        named = [name for name in parts if name != EXPERIMENTS]
        results["benchmarks"] = benchmarks.run(runner, named, values.quick, sets)
    results |= {
        "schema": 1,
        "date": datetime.date.today().isoformat(),
        "mode": "quick" if values.quick else "full",
        "seed": values.seed,
        "size": to_dict(size),
        "hardware": hardware(),
        "versions": versions(),
        "seconds": runner.seconds,
    }
    results["bars"] = sections.bars(results)
    write_report(results, out)
    print(f"report {out / 'index.html'} ({time.monotonic() - start:.0f} s)")


def parts_from_flag(names: list[str], quick: bool) -> list[str]:
    """Returns the parts of the report in their order: `experiments`, and names of benchmarks. Raises UsageError."""
    known = [EXPERIMENTS, *benchmarks.BENCHMARKS]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"--parts={','.join(names)}: {unknown[0]!r} is unknown; expected some of {', '.join(known)}")
    if names:
        return [name for name in known if name in names]
    return [name for name in known if not quick or name == EXPERIMENTS or benchmarks.BENCHMARKS[name].quick is not None]


def size_from_flags(quick: bool, assignments: list[str]) -> Size:
    """Returns the size of a mode, overridden by `name=value` assignments. Raises UsageError."""
    data = to_dict(QUICK if quick else Size())
    for assignment in assignments:
        name, value = read_assignment(assignment, "steps=500")
        from_dict(Size, {name: value}, f"--set={assignment}", check=False)
        data[name] = value
    return from_dict(Size, data, "--set")


def write_report(results: Result, out: Path) -> None:
    """Writes report.json, report.md with plots/, index.html, and the bars in figures.json and figures.md."""
    write_text(out / "report.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    page = sections.report(results)
    drawn = {name: plots.svg(figure, name) for name, figure in page.figures.items()}
    (out / "plots").mkdir(exist_ok=True)
    for name, text in drawn.items():
        write_text(out / "plots" / f"{name}.svg", '<?xml version="1.0" encoding="utf-8"?>\n' + text)
    write_text(out / "report.md", page.markdown)
    quoted = figures(results, page.tables)
    write_text(out / "figures.json", json.dumps(quoted, indent=1, ensure_ascii=False) + "\n")
    write_text(out / "figures.md", figures_page(quoted))
    write_text(out / "index.html", html(page.markdown, drawn))


def html(text: str, drawn: dict[str, str]) -> str:
    """Converts Markdown to an HTML page that contains the figures; `drawn` is name -> SVG."""
    body = markdown.markdown(text, extensions=["tables", "toc"])

    def place(match: re.Match[str]) -> str:
        caption, name = match.groups()
        return f'<figure role="img" aria-label="{caption}">{drawn[name]}</figure>'

    body = re.sub(r'<img alt="([^"]*)" src="plots/([\w-]+)\.svg" />', place, body)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">\n'
        "<title>DPSR: the paper's experiments</title>\n"
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def hardware() -> dict[str, Any]:
    """Returns CPU, cores, memory and system of this machine."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    """Returns the versions of the packages that decide the figures."""
    packages = ("tensorflow", "scikit-learn", "matplotlib", "bm25s", "scipy")
    found = {"dpsr": __version__, "python": platform.python_version(), "numpy": np.__version__}
    return found | {package: importlib.metadata.version(package) for package in packages}
