"""Files that appear whole or not at all, links to files that never change, and locks on directories."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dpsr_common.errors import CommandError
from dpsr_common.files import link_or_copy, locked, replaced, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_the_place_of_another(tmp_path):
    write_text(tmp_path / "a.json", "old")
    write_text(tmp_path / "a.json", "größer")
    assert (tmp_path / "a.json").read_bytes() == "größer".encode()
    assert names(tmp_path) == ["a.json"]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    write_text(tmp_path / "a", "old")
    with replaced(tmp_path / "a") as temporary:
        temporary.write_text("half")
        assert (tmp_path / "a").read_text() == "old"
        temporary.write_text("new")
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("written", [True, False])
def test_a_failure_leaves_the_old_file_and_no_temporary(tmp_path, written):
    write_text(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), replaced(tmp_path / "a") as temporary:
        if written:
            temporary.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_target_that_cannot_be_replaced(tmp_path):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OSError):
        write_text(tmp_path / "folder", "text")
    assert names(tmp_path) == ["folder"]


def test_processes_that_write_the_same_file(tmp_path):
    script = """
import sys
from pathlib import Path
from dpsr_common.files import write_text
for _ in range(300):
    write_text(Path(sys.argv[1]), sys.argv[2] * 10_000)
    assert len(set(Path(sys.argv[1]).read_text())) == 1
"""
    path = tmp_path / "shared"
    writers = [subprocess.Popen([sys.executable, "-c", script, str(path), letter]) for letter in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert path.read_text() in ("a" * 10_000, "b" * 10_000)
    assert names(tmp_path) == ["shared"]


def test_a_link(tmp_path):
    (tmp_path / "a").write_text("x")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert os.path.samefile(tmp_path / "a", tmp_path / "b")


def test_a_copy_where_links_are_not_possible(tmp_path):
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as source:
        source.write(b"x")
        source.flush()
        link_or_copy(Path(source.name), tmp_path / "b")
    assert (tmp_path / "b").read_text() == "x"


def test_a_source_that_is_gone(tmp_path):
    with pytest.raises(FileNotFoundError):
        link_or_copy(tmp_path / "gone", tmp_path / "b")
    assert names(tmp_path) == []


def test_a_locked_directory(tmp_path):
    with locked(tmp_path, ""), pytest.raises(CommandError, match="in use; wait"), locked(tmp_path, "in use; wait"):
        pass
    with locked(tmp_path, ""):
        assert names(tmp_path) == [], "a lock is no file"
    with pytest.raises(FileNotFoundError), locked(tmp_path / "none", ""):
        pass


def test_the_lock_of_a_killed_process_is_gone(tmp_path):
    code = f"""
import pathlib
from dpsr_common.files import locked
with locked(pathlib.Path({str(tmp_path)!r}), ""):
    print(flush=True)
    input()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdout.readline() == b"\n"
        with pytest.raises(CommandError, match="in use"), locked(tmp_path, "in use"):
            pass
        process.kill()
    with locked(tmp_path, "in use"):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path, "in use"):
        pass
