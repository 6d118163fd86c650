from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_stores import BUCKET

from dpsr_common import object_store
from dpsr_common.errors import CommandError, UsageError
from dpsr_common.object_store import MARK, RemoteFolder, cached, download, is_remote, upload


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("DPSR_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    end_of_process()


def end_of_process() -> None:
    """Gives up what this process reads, as its end would."""
    for lock in object_store._locks.values():
        os.close(lock)
    object_store._locks.clear()


def folder(path: Path, **files: str) -> Path:
    """A directory with files; "__" in a name is a "/"."""
    for name, text in files.items():
        target = path / name.replace("__", "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return path


def contents(path: Path) -> dict[str, str]:
    found = {str(p.relative_to(path)): p.read_text() for p in path.rglob("*") if p.is_file()}
    return {name: text for name, text in found.items() if name != MARK}


def files_in(cache: Path) -> int:
    return len(list((cache / "files").iterdir()))


def test_a_copy_is_the_directory(s3_url: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "source", manifest="{}", log__part="rows", empty="")
    assert upload(source, s3_url) == 6
    assert set(RemoteFolder(s3_url).names()) == {"manifest", "log/part", "empty", MARK}
    download(s3_url, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(source)
    with pytest.raises(CommandError, match="exists already"):
        download(s3_url, tmp_path / "copy")
    with pytest.raises(CommandError, match="holds files already"):
        upload(source, s3_url)
    upload(folder(tmp_path / "new", manifest="{1}"), s3_url, overwrite=True)
    assert contents(cached(s3_url)) == {"manifest": "{1}"}, "nothing of the old one stays"


def test_a_file_that_cannot_be_read_ends_no_older_copy(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(tmp_path / "source", a="one", b="two")
    upload(source, s3_url)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "b")
    with pytest.raises(CommandError, match="source/b: cannot be read; correct its permissions"):
        upload(source, s3_url, overwrite=True)
    assert RemoteFolder(s3_url).files() is not None, "it is complete as before"


def test_a_copy_is_on_the_disk_before_it_appears(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(folder(tmp_path / "source", a="one", log__part="rows"), s3_url)
    synced: set[int] = set()
    before: list[set[int]] = []
    fsync, rename = os.fsync, os.rename

    def note_sync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        before.append({part.stat().st_ino for part in (source, *source.rglob("*"))} - synced)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    download(s3_url, tmp_path / "copy")
    assert before == [set()]
    assert tmp_path.stat().st_ino in synced


def test_half_a_directory_is_refused(s3_url: str, tmp_path: Path) -> None:
    source, remote = folder(tmp_path / "source", a="one", b="two"), RemoteFolder(s3_url)
    remote.write("a", source / "a")
    for take in (cached, lambda url: download(url, tmp_path / "copy")):
        with pytest.raises(CommandError, match=rf"{s3_url}: is not a complete directory \(no {MARK}\)"):
            take(s3_url)
    upload(source, s3_url, overwrite=True)
    remote.write("b", b"three")
    damaged = rf"{s3_url}/b: is not the file that {MARK} lists \(5 bytes, expected 3\)"
    for take in (cached, lambda url: download(url, tmp_path / "copy")):
        with pytest.raises(CommandError, match=damaged):
            take(s3_url)
        end_of_process()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "source"], "nothing half-written stays"
    assert [path.name for path in (tmp_path / "cache" / "trees").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        (b"{", "cannot be read"),
        (b'{"format": "dpsr-complete", "version": 2, "files": {}}', "of dpsr-complete version 2"),
        (b'{"format": "dpsr-complete", "version": 1, "files": {"a": {"bytes": 1, "sha256": "../x"}}}', "no SHA-256"),
        (
            json.dumps(
                {"format": "dpsr-complete", "version": 1, "files": {"../a": {"bytes": 1, "sha256": "0" * 64}}}
            ).encode(),
            "../a: is not a path inside the directory",
        ),
    ],
)
def test_damaged_marks(mark: bytes, message: str, s3: str, tmp_path: Path) -> None:
    url = f"{BUCKET}/damaged"
    RemoteFolder(url).write(MARK, mark)
    with pytest.raises(CommandError, match=message):
        download(url, tmp_path / "copy")
    with pytest.raises(CommandError, match=message):
        cached(url)


def test_the_cache_holds_a_content_once(s3_url: str, tmp_path: Path, cache: Path) -> None:
    upload(folder(tmp_path / "1", same="same", model="old"), f"{s3_url}/1")
    upload(folder(tmp_path / "2", same="same", model="new"), f"{s3_url}/2")
    first, second = cached(f"{s3_url}/1"), cached(f"{s3_url}/2")
    assert contents(first) == contents(tmp_path / "1") and contents(second) == contents(tmp_path / "2")
    assert (first / "same").samefile(second / "same")
    assert files_in(cache) == 3
    assert cached(f"{s3_url}/1") == first
    part = cached(f"{s3_url}/2", wanted=lambda name: name == "model")
    assert contents(part) == {"model": "new"} and part != second


def test_the_cache_is_bounded(s3_url: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPSR_CACHE_BYTES", "25")
    trees = {}
    for name in "abc":
        upload(folder(tmp_path / name, file=name * 10), f"{s3_url}/{name}")
    for age, name in enumerate("ab"):
        trees[name] = cached(f"{s3_url}/{name}")
        os.utime(trees[name], (age, age))
    with pytest.raises(CommandError, match=r"10 bytes more do not fit into DPSR_CACHE_BYTES=25.* use 20"):
        cached(f"{s3_url}/c")
    end_of_process()
    trees["c"] = cached(f"{s3_url}/c")
    assert not trees["a"].exists(), "it was used longest ago"
    assert trees["b"].exists() and files_in(cache) == 2
    monkeypatch.setenv("DPSR_CACHE_BYTES", "much")
    with pytest.raises(UsageError, match="DPSR_CACHE_BYTES=much: is not a number"):
        cached(f"{s3_url}/a")


def test_a_cache_that_cannot_be_made(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(folder(tmp_path / "source", file="content"), s3_url)
    monkeypatch.setenv("DPSR_CACHE", str(tmp_path / "source" / "file" / "cache"))
    with pytest.raises(CommandError, match="cache: cannot be made: Not a directory; give another DPSR_CACHE"):
        cached(s3_url)


def test_a_cache_of_another_user(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(folder(tmp_path / "source", file="content"), s3_url)

    def refuse(tree: Path) -> int:
        raise PermissionError(13, "Permission denied", str(tree))

    monkeypatch.setattr(object_store, "_lock_of", refuse)
    with pytest.raises(CommandError, match="cache: cannot be made: Permission denied; give another DPSR_CACHE"):
        cached(s3_url)


def test_a_content_of_the_cache_is_on_the_disk_before_it_has_its_name(
    s3_url: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(folder(tmp_path / "source", a="one", log__part="rows"), s3_url)
    synced: set[int] = set()
    named: list[int] = []
    fsync, replace = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        named.append(source.stat().st_ino)
        assert named[-1] in synced
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    cached(s3_url)
    assert len(named) == files_in(cache) == 2


def test_two_processes_fill_the_cache_once(s3_url: str, tmp_path: Path, cache: Path) -> None:
    upload(folder(tmp_path / "source", a="one", b="two"), s3_url)
    program = f"from dpsr_common.object_store import cached; print(cached({s3_url!r}))"
    both = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=60)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(paths) == 1 and contents(Path(paths.pop())) == {"a": "one", "b": "two"}
    assert files_in(cache) == 2 and not list((cache / "trees").glob(".unfinished*"))


def test_two_processes_with_parts_of_a_directory_download_what_both_need_once(s3_url: str, tmp_path: Path) -> None:
    upload(folder(tmp_path / "source", both="both", one="1", two="2"), s3_url)
    program = (
        "import sys; from dpsr_common.object_store import cached; "
        f"print(cached({s3_url!r}, lambda name: name in ('both', sys.argv[1])))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, name], stdout=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    one, two = (Path(process.communicate(timeout=60)[0].strip()) for process in processes)
    assert contents(one) == {"both": "both", "one": "1"} and contents(two) == {"both": "both", "two": "2"}
    assert (one / "both").stat().st_nlink == 3, "in the cache and in both directories"


def test_a_directory_that_another_process_reads_is_read_at_once(s3_url: str, tmp_path: Path) -> None:
    upload(folder(tmp_path / "source", a="one"), s3_url)
    path = cached(s3_url)
    program = f"from dpsr_common.object_store import cached; print(cached({s3_url!r}))"
    other = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60)
    assert (other.returncode, other.stdout.strip()) == (0, str(path))


def test_a_directory_that_is_mended_is_read_by_the_same_process(s3_url: str, tmp_path: Path) -> None:
    upload(folder(tmp_path / "source", a="one"), s3_url)
    RemoteFolder(s3_url).write("a", b"two")
    with pytest.raises(CommandError, match="/a: is not the file"):
        cached(s3_url)
    RemoteFolder(s3_url).write("a", b"one")
    assert contents(cached(s3_url)) == {"a": "one"}


def test_what_killed_processes_left_is_removed_after_a_day(s3_url: str, tmp_path: Path, cache: Path) -> None:
    upload(folder(tmp_path / "source", a="one"), s3_url)
    folder(cache / "trees" / ".unfinished-old", a="half")
    folder(cache / "files", **{".old.tmp": "half", ".new.tmp": "half"})
    for left in (cache / "trees" / ".unfinished-old", cache / "files" / ".old.tmp"):
        os.utime(left, (0, 0))
    cached(s3_url)
    assert not (cache / "trees" / ".unfinished-old").exists()
    assert [path.name for path in (cache / "files").glob(".*")] == [".new.tmp"], "another process may write it"


def test_files_are_copied_where_links_are_not_possible(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(tmp_path / "source", a="one")
    upload(source, s3_url)
    digest = (RemoteFolder(s3_url).files() or {})["a"]["sha256"]

    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    download(s3_url, tmp_path / "copy", known={digest: source / "a"})
    assert contents(tmp_path / "copy") == {"a": "one"} and not (tmp_path / "copy" / "a").samefile(source / "a")


def test_what_an_object_store_refuses_is_an_error_in_one_line(s3: str) -> None:
    with pytest.raises(CommandError, match=r"s3://nobody/dir: cannot be written: .*; check the path, the credentials"):
        RemoteFolder("s3://nobody/dir").write("name", b"")
    for url in ("s3://", "s3:///", "s3://shop/dir?region=x"):
        with pytest.raises(UsageError, match="expected a directory such as"):
            RemoteFolder(url)
    assert not is_remote("/s3://x") and not is_remote("http://x")


def test_a_full_disk_is_not_blamed_on_the_object_store(s3_url: str, tmp_path: Path) -> None:
    upload(folder(tmp_path / "source", a="one"), s3_url)
    remote = RemoteFolder(s3_url)
    with pytest.raises(CommandError, match=r"^/dev: the disk is full \(.*No space left on device"):
        remote.download("a", (remote.files() or {})["a"], Path("/dev/full"))


def test_commands_take_object_stores_where_they_say_so(s3_url: str, tmp_path: Path, dpsr) -> None:
    source = folder(tmp_path / "source", manifest="{}")
    dpsr("copy", f"--from={source}", f"--to={s3_url}").succeeds()
    dpsr("copy", f"--from={s3_url}", f"--to={tmp_path / 'copy'}").succeeds()
    assert contents(tmp_path / "copy") == contents(source)
    dpsr("copy", f"--from={source}", f"--to={tmp_path / 'other'}").fails(2, "expected one of them, and only one")
    dpsr("copy", f"--from={tmp_path / 'missing'}", f"--to={s3_url}").fails(2, "is not a directory")
    in_file = tmp_path / "source" / "manifest" / "copy"
    dpsr("copy", f"--from={s3_url}", f"--to={in_file}").fails(1, "manifest: cannot be written: ", "choose another --to")
    dpsr("generate", f"--out={s3_url}").fails(2, f"--out={s3_url}: must be a path of this machine; `dpsr copy` copies")
    index = ("index", f"--model={s3_url}", f"--store={s3_url}", f"--out={tmp_path / 'index'}", "--engine=spark")
    dpsr(*index).fails(2, f"{s3_url}: with --engine=spark it must be a path that all machines see")
