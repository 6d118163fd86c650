"""The file of judgments made by hand: saving, taking back, several processes, damage; `dpsr evaluate` reads it."""

from __future__ import annotations

import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dpsr_common.errors import CommandError, UsageError
from dpsr_serving.gateway import judgments as judgments_file
from dpsr_serving.gateway.judgments import JudgmentFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "judgments.tsv"


def test_judgments_are_saved_replaced_and_taken_back(path: Path) -> None:
    file = JudgmentFile(path)
    assert len(file) == 0 and not path.exists()
    assert [file.judge("red shoes", "17", 3), file.judge("red shoes", "18", 0), file.judge("手机", "a b", 1.5)] == [
        1,
        2,
        3,
    ]
    assert file.judge("red shoes", "17", 1) == 3
    assert path.read_text() == "query\titem\tgrade\nred shoes\t17\t1\nred shoes\t18\t0\n手机\ta b\t1.5\n"
    assert JudgmentFile(path).of_query("red shoes") == {"17": 1.0, "18": 0.0}
    assert file.of_query("other") == {}
    assert file.judge("red shoes", "18", None) == file.judge("red shoes", "99", None) == 2
    assert file.of_query("red shoes") == {"17": 1.0}


def test_a_query_is_one_line_without_tabs(path: Path) -> None:
    file = JudgmentFile(path)
    file.judge(' 5" pipe\t\n2\x00\u2028m  ', "1", 2)
    assert path.read_text().splitlines()[1:] == ['5" pipe 2 m\t1\t2']
    assert file.of_query('5" pipe 2 m') == file.of_query('5"  pipe\t2 m') == {"1": 2.0}


def test_dpsr_evaluate_reads_the_file(path: Path) -> None:
    from dpsr_tf.evaluation.judgments import Judgments

    file = JudgmentFile(path)
    for item, grade in ((7, 0), (8, 1), (9, 3)):
        file.judge('12" pipe', str(item), grade)
    read = Judgments.read(path, "query", "item", "grade", relevant_from=1.0)
    assert read.queries == ['12" pipe'] and read.relevant == [[8, 9]]
    assert read.grades == [{7: 0.0, 8: 1.0, 9: 3.0}]


@pytest.mark.parametrize(
    ("query", "grade", "words"),
    [
        ("q", 4, "grade: got 4, expected 0 to 3"),
        ("q", -1, "grade: got -1"),
        ("q", float("nan"), "grade: got nan"),
        (" \n", 1, "query: has 0 characters"),
        ("q" * 1001, 1, "query: has 1001 characters, expected 1 to 1000"),
    ],
)
def test_what_is_no_judgment_is_refused(path: Path, query: str, grade: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        JudgmentFile(path).judge(query, "1", grade)
    assert not path.exists()


def test_an_item_that_would_break_the_file_is_refused(path: Path) -> None:
    file = JudgmentFile(path)
    for item in ("a\tb", "a\nb", "a\rb"):
        with pytest.raises(ValueError, match="item: got"):
            file.judge("q", item, 1)
    file.judge("q", "a\u3000b", 1)
    assert file.of_query("q") == {"a\u3000b": 1.0}


def test_the_number_of_judgments_has_a_limit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judgments_file, "MAX_JUDGMENTS", 2)
    file = JudgmentFile(path)
    file.judge("q", "1", 1)
    file.judge("q", "2", 1)
    with pytest.raises(ValueError, match="has 2 judgments, which is the limit"):
        file.judge("q", "3", 1)
    assert file.judge("q", "1", 2) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("query\titem\n", "begins with .*expected the columns query, item and grade"),
        ("query\titem\tgrade\nq\t1\n", "line 2: expected a query, an item and a grade"),
        ("query\titem\tgrade\n\nq\t1\thigh\n", "line 3: expected a query, an item and a grade"),
        ("query\titem\tgrade\nq\t1\tnan\n", "line 2"),
    ],
)
def test_another_file_is_refused_and_stays(path: Path, text: str, words: str) -> None:
    path.write_text(text)
    with pytest.raises(CommandError, match=words):
        JudgmentFile(path)
    assert path.read_text() == text


def test_wrong_paths(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a file name that ends in"):
        JudgmentFile(tmp_path / "judgments.csv")
    with pytest.raises(UsageError, match="there is no directory"):
        JudgmentFile(tmp_path / "none" / "judgments.tsv")
    with pytest.raises(CommandError, match="cannot be read"):
        (tmp_path / "folder.tsv").mkdir()
        JudgmentFile(tmp_path / "folder.tsv")


def test_a_file_that_cannot_be_written_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = JudgmentFile(path)
    file.judge("q", "1", 1)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(CommandError, match="cannot be written: No space left on device"):
        file.judge("q", "2", 1)
    monkeypatch.undo()
    assert file.of_query("q") == {"1": 1.0}
    assert {found.name for found in path.parent.iterdir()} == {"judgments.tsv", ".judgments.tsv.lock"}
    assert stat.S_ISREG(path.stat().st_mode)


def test_threads_and_processes_lose_no_judgment(path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from dpsr_serving.gateway.judgments import JudgmentFile\n"
        "file = JudgmentFile(Path(sys.argv[1]))\n"
        "for i in range(30): file.judge('other', str(i), 1)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path)])
    file = JudgmentFile(path)
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda i: file.judge(f"query {i % 5}", str(i), 2), range(60)))
    assert process.wait(60) == 0
    assert len(file) == 90 and len(file.of_query("other")) == 30
