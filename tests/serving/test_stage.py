from __future__ import annotations

import errno
import tempfile
import time
from pathlib import Path

import pytest

from dpsr_common.errors import CommandError
from dpsr_common.files import locked
from dpsr_common.object_store import MARK, RemoteFolder, upload
from dpsr_serving.stage import stage


def version(path: Path, number: int) -> Path:
    """A small stand-in for a SavedModel, most of which every version has."""
    (path / str(number) / "assets").mkdir(parents=True)
    (path / str(number) / "saved_model.pb").write_text(f"graph {number}")
    (path / str(number) / "assets" / "vocabulary.dpsr").write_text("the same words")
    return path / str(number)


def names(base: Path) -> list[str]:
    return sorted(path.name for path in base.iterdir())


def test_the_newest_complete_versions_are_staged(s3_url: str, tmp_path: Path) -> None:
    base, made = tmp_path / "base", tmp_path / "made"
    with pytest.raises(CommandError, match="has no complete version"):
        stage(s3_url, base, 2)
    for number in (7, 9, 10):
        upload(version(made, number), f"{s3_url}/{number}")
    RemoteFolder(f"{s3_url}/11").write("saved_model.pb", b"half")
    RemoteFolder(f"{s3_url}/notes").write(MARK, b"{}")
    assert stage(s3_url, base, 2) == [f"{base / '10'}: staged, 0.0 MB", f"{base / '9'}: staged, 0.0 MB"]
    assert names(base) == ["10", "9"]
    assert (base / "10" / "saved_model.pb").read_text() == "graph 10"
    assert (base / "10/assets/vocabulary.dpsr").samefile(base / "9/assets/vocabulary.dpsr"), "copied once"
    assert stage(s3_url, base, 2) == []

    upload(version(made, 11), f"{s3_url}/11", overwrite=True)
    version(base, 3)  # not of this command
    (base / ".12.unfinished-abcdefgh").mkdir()  # of a killed run
    assert stage(s3_url, base, 2) == [f"{base / '11'}: staged, 0.0 MB", f"{base / '9'}: removed"]
    assert names(base) == ["10", "11", "3"]

    RemoteFolder(f"{s3_url}/11").delete(MARK)
    assert f"{base / '11'}: removed" in stage(s3_url, base, 2), "a version that is taken back"


def test_a_damaged_version_is_not_staged(s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    upload(version(tmp_path / "made", 1), f"{s3_url}/1")
    upload(version(tmp_path / "made", 2), f"{s3_url}/2")
    stage(s3_url, tmp_path / "base", 1)
    assert names(tmp_path / "base") == ["2"]
    upload(version(tmp_path / "made", 3), f"{s3_url}/3")
    RemoteFolder(f"{s3_url}/3").write("saved_model.pb", b"another")
    assert stage(s3_url, tmp_path / "base", 1) == []
    assert "3/saved_model.pb: is not the file" in capsys.readouterr().err
    assert names(tmp_path / "base") == ["2"], "what is served stays"
    fresh = tmp_path / "fresh"
    assert stage(s3_url, fresh, 1) == [f"{fresh / '2'}: staged, 0.0 MB"], "a new machine serves an older version"
    assert "3/saved_model.pb: is not the file" in capsys.readouterr().err
    RemoteFolder(f"{s3_url}/2").write(MARK, b"{")
    assert stage(s3_url, fresh, 1) == [f"{fresh / '1'}: staged, 0.0 MB"]
    assert names(fresh) == ["1", "2"], "a version that cannot be judged stays"
    RemoteFolder(f"{s3_url}/1").delete(MARK)
    with pytest.raises(CommandError, match=r"3/saved_model\.pb: is not the file"):
        stage(s3_url, fresh, 1)


def test_one_process_stages_to_a_directory(s3_url: str, tmp_path: Path) -> None:
    upload(version(tmp_path / "made", 1), f"{s3_url}/1")
    base, file = tmp_path / "base", tmp_path / "file"
    base.mkdir()
    with locked(base, ""), pytest.raises(CommandError, match="base: another `dpsr stage` writes there"):
        stage(s3_url, base, 1)
    assert stage(s3_url, base, 1) == [f"{base / '1'}: staged, 0.0 MB"]
    file.touch()
    with pytest.raises(CommandError, match="file: cannot be written: File exists; check --to"):
        stage(s3_url, file, 1)


def test_a_disk_that_refuses_is_an_error_of_that_look(
    s3_url: str, tmp_path: Path, dpsr, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(version(tmp_path / "made", 1), f"{s3_url}/1")
    mkdtemp = tempfile.mkdtemp
    looks = []

    def refuse(*_: object, **more: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", str(more.get("dir")))

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            raise KeyboardInterrupt
        monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    monkeypatch.setattr(time, "sleep", sleep)
    result = dpsr("stage", f"--from={s3_url}", f"--to={tmp_path / 'base'}", "--poll=5")
    assert result.status == 130 and looks == [5, 5]
    assert f"{tmp_path / 'base'}: cannot be written: No space left on device" in "".join(result.errors)
    assert f"{tmp_path / 'base' / '1'}: staged" in result.out


def test_polling_outlives_errors(s3_url: str, tmp_path: Path, dpsr, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt
        if len(looks) == 2:
            upload(version(tmp_path / "made", 1), f"{s3_url}/1")

    monkeypatch.setattr(time, "sleep", sleep)
    result = dpsr("stage", f"--from={s3_url}", f"--to={tmp_path / 'base'}", "--poll=5")
    assert result.status == 130 and looks == [5, 5, 5]
    assert f"{tmp_path / 'base' / '1'}: staged" in result.out
    assert [line for line in result.errors if "has no complete version" in line] == result.errors != []


def test_flags_are_checked(s3_url: str, tmp_path: Path, dpsr) -> None:
    dpsr("stage", "--from=/models", f"--to={tmp_path}").fails(2, "expected a path such as s3://")
    dpsr("stage", f"--from={s3_url}", f"--to={s3_url}").fails(2, "--to=s3://", "must be a path of this machine")
    dpsr("stage", f"--from={s3_url}", f"--to={tmp_path}").fails(1, "has no complete version")
