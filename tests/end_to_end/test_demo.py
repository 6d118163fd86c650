"""The README's first command, `make demo`: its answers, its files, interrupting it and running it again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parent.parent.parent
HOMEDEPOT = ROOT.parent / "shared" / "data" / "homedepot"


def run_dpsr(*arguments: object, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dpsr_common", *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


class Demo(NamedTuple):
    """A demo on the generated shop that was interrupted, then run again to its end, with the servers kept."""

    out: Path
    interrupted: str  # what the first run printed
    left: dict[str, int | bytes]  # what the first run left, see left_by()
    text: str  # what the second run printed
    page: str  # what its search page answered


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    out = tmp_path_factory.mktemp("demo") / "shop"
    interrupted = interrupt(out, at="query")
    left = left_by(out)
    command = ["make", "demo", f"OUT={out}", "KEEP=1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True
    ) as process:
        assert process.stdout
        printed, page = [], ""
        try:
            for line in process.stdout:
                printed.append(line)
                if found := re.search(r"The search page is on (\S+)\. Ctrl-C ends it", line):
                    page = urllib.request.urlopen(found[1], timeout=60).read().decode()
                    os.kill(pid_of(f"--out={out}", "--keep"), signal.SIGINT)
            assert process.wait(60) == 0, "".join(printed)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert not list(commands_running(out))
    return Demo(out, interrupted, left, "".join(printed), page)


def pid_of(*arguments: str) -> int:
    """The process of `dpsr` that was started with these arguments."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # The process has ended meanwhile.
            words = path.read_text().split("\0")
            if set(arguments) <= set(words) and "python" in words[0]:
                return int(path.parent.name)
    raise AssertionError(f"no process has the arguments {arguments}")


def left_by(out: Path) -> dict[str, int | bytes]:
    """When each checkpoint was written, and the bytes of the index."""
    times = {path.name: path.stat().st_mtime_ns for path in (out / "model").glob("model.ckpt*")}
    return {**times, **{path.name: path.read_bytes() for path in (out / "index").glob("*.faiss")}}


def test_demo_answers_four_queries_and_beats_bm25(demo: Demo) -> None:
    out, text = demo.out, demo.text
    query = re.search(r"\$ dpsr query (.*)", text)
    assert query
    assert len(re.findall(r"^ +1 +0\.\d+ +\d+ +\S", text, re.MULTILINE)) == 4
    assert len(re.findall(r"^ +10 +0\.\d+ +\d+ +\S", text, re.MULTILINE)) == 4
    table = text[text.index("recall@10") :]  # the first table
    bm25, tuned, model = (
        [float(x) for x in re.search(rf"^{system}((?: +\d\.\d{{3}}){{3}})", table, re.MULTILINE)[1].split()]
        for system in ("bm25", r"bm25:\S+", r"server\S+")
    )
    # recall@10, recall@100, MRR@10 on the test fold: unlike BM25, the model matches texts without common words.
    for other in (bm25, tuned):
        assert model[0] > other[0] and model[1] > other[1] and model[2] > other[2], (bm25, tuned, model)
    # Each kind of query, with its number and its share of all.
    kinds = re.findall(r"^(\w+) +(\d+) +(0\.\d{3}) +server", text, re.MULTILINE)
    assert {kind for kind, _, _ in kinds} >= {"gap", "partial", "typo"}
    assert sum(float(share) for _, _, share in kinds) == pytest.approx(1, abs=0.01)
    asked = int(re.search(r"judgments.test.tsv: (\d+) queries", text)[1])
    assert sum(int(queries) for _, queries, _ in kinds) == asked
    assert model[1] < 0.97, "the shop is hard enough to tell models apart"
    assert f"The servable lies in {out}/servable" in text
    for command in ("serve", "query", "search"):
        to_go_on = re.search(rf"^  (\S*dpsr {command}) ", text, re.MULTILINE)
        assert to_go_on
        subprocess.run([*to_go_on[1].split(), "--help"], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_demo_ends_with_a_search_page(demo: Demo) -> None:
    assert "<title>Search" in demo.page
    shown = demo.text[demo.text.index("$ curl -s") :]
    found = re.findall(r"^((?:inverted|semantic)(?: \+ \w+)*)  +\S", shown, re.MULTILINE)
    assert len(found) == 5 and any("semantic" in sources for sources in found)
    # What is left can be served again as the last lines say.
    assert "127.0.0.1:8500" in (demo.out / "search.yaml").read_text() and (demo.out / "inverted").is_dir()


def test_demo_shows_progress_and_no_noise(demo: Demo) -> None:
    assert re.search(r"train .*100%.* examples/s", demo.interrupted)
    text = demo.interrupted + demo.text
    for noise in ("WARNING", "deprecat", "cuda", "tensorflow/", "Traceback", "rebuild TensorFlow"):
        assert noise.lower() not in text.lower(), noise


def test_demo_queries_are_not_in_the_log(demo: Demo) -> None:
    import shlex

    import pyarrow.parquet

    out, text = demo.out, demo.text
    shown = [word for word in shlex.split(re.search(r"\$ dpsr query (.*)", text)[1]) if not word.startswith("--")]
    log = set(pyarrow.parquet.read_table(out / "log" / "interactions").column("query").to_pylist())
    assert len(shown) == 4 and not log & set(shown)


def test_next_day_server_query_and_errors(demo: Demo) -> None:
    """Serves the demo's servable as its last lines say, and sends valid and invalid requests."""
    out = demo.out
    log = open(out / "next_day.log", "w+")  # noqa: SIM115
    command = [sys.executable, "-m", "dpsr_common", "serve", f"--model_base_path={out / 'servable'}"]
    server = subprocess.Popen([*command, "--model_name=shop", "--port=0"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"Running gRPC ModelServer at (\S+)", (out / "next_day.log").read_text())):
            assert server.poll() is None and time.monotonic() < deadline, (out / "next_day.log").read_text()
            time.sleep(0.1)
        target = f"--target={found[1]}"
        answer = run_dpsr("query", target, "--model=shop", "--json", "--k=3", "keyboard", "")
        assert answer.returncode == 0, answer.stderr
        keyboard, empty = (json.loads(line) for line in answer.stdout.splitlines())
        assert len(keyboard["results"]) == 3 and empty["results"] == []

        unknown = run_dpsr("query", target, "--model=shoop", "keyboard")
        assert unknown.returncode == 1 and "shoop" in unknown.stderr and len(unknown.stderr.splitlines()) == 1

        port = found[1].rpartition(":")[2]
        taken = subprocess.run([*command, f"--port={port}"], capture_output=True, text=True, timeout=60)
        assert taken.returncode == 1 and port in taken.stdout + taken.stderr

        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
        gone = run_dpsr("query", target, "--model=shop", "keyboard")
        assert gone.returncode == 1 and found[1] in gone.stderr and len(gone.stderr.splitlines()) == 1
    finally:
        server.kill()
        server.wait()
        log.close()


def test_demo_can_be_interrupted_and_run_again(demo: Demo) -> None:
    """After an interrupted demo the next one trains nothing again and makes the same index."""
    assert "model.ckpt" in "".join(demo.left) and ".faiss" in "".join(demo.left)
    assert left_by(demo.out) == demo.left


@pytest.mark.long
def test_demo_trains_anew_when_the_settings_have_changed(demo: Demo, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    shutil.copytree(demo.out / "model", out / "model")
    config = out / "model" / "config.yaml"
    config.write_text(config.read_text().replace("margin: 0.3", "margin: 0.25"))
    shown = interrupt(out, "--steps=5", at="index")
    assert "--overwrite" in re.search(r"\$ dpsr train .*", shown)[0]
    assert "margin: 0.3\n" in config.read_text()
    assert list((out / "model").glob("model.ckpt-5.*"))


def interrupt(out: Path, *flags: str, at: str) -> str:
    """Runs a demo in `out` until its command `dpsr AT` runs, then ends it; returns what it printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dpsr_common", "demo", f"--out={out}", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith(f"$ dpsr {at}"):
            break
    while process.poll() is None and not any(f"\0{at}\0".encode() in command for command in commands_running(out)):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed.append(process.stdout.read())  # ends only when every child that holds the pipe has ended
    assert process.wait(30) == 128 + signal.SIGTERM, "".join(printed)
    assert list(commands_running(Path("pytest"))) and not list(commands_running(out))
    return "".join(printed)


def commands_running(path: Path) -> Iterator[bytes]:
    """Yields the command line of every process that names this path."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # The process has ended meanwhile.
            if str(path).encode() in (command := process.read_bytes()):
                yield command


def test_demo_without_the_files_says_which(dpsr: Callable, tmp_path: Path) -> None:
    found = dpsr("demo", f"--data={tmp_path}", f"--out={tmp_path / 'out'}")
    found.fails(2, "has no products.tsv, judgments.train.tsv, judgments.dev.tsv")
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.skipif(not HOMEDEPOT.is_dir(), reason="the Home Depot files are not beside the repository")
def test_home_depot_path(tmp_path: Path) -> None:
    """The demo on a real log. With few steps it only has to show that the model learns."""
    result = run_dpsr("demo", f"--data={HOMEDEPOT}", f"--out={tmp_path / 'out'}", "--steps=60")
    assert result.returncode == 0, result.stdout + result.stderr
    recall = float(re.search(r"^server\S+ +\d\.\d{3} +(\d\.\d{3})", result.stdout, re.MULTILINE)[1])
    assert recall > 0.4, result.stdout
    assert re.search(r"^bm25 +0\.3[89]\d +0\.68\d +0\.39\d ", result.stdout, re.MULTILINE)
