from __future__ import annotations

import gc

import numpy as np
import pytest

from dpsr_common.packed_file import FormatError, PackedFile, PackedFileWriter

DTYPES = ["uint8", "int8", "int32", "int64", "float32", "uint32", "uint64"]


def write(path, kind="items", **sections):
    with PackedFileWriter(path, kind) as file:
        for name, values in sections.items():
            file.add(name, values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(tmp_path, dtype):
    values = np.arange(1000).astype(dtype)
    write(tmp_path / "f", a=values, empty=values[:0], strided=values[::3])
    file = PackedFile(tmp_path / "f", "items")
    assert list(file) == ["a", "empty", "strided"] and len(file) == 3 and "a" in file and "b" not in file
    for name, expected in (("a", values), ("empty", values[:0]), ("strided", values[::3])):
        assert file[name].dtype == dtype
        np.testing.assert_array_equal(file[name], expected)
    assert (file.kind, file.path) == ("items", str(tmp_path / "f"))


def test_append_streams_a_section(tmp_path):
    with PackedFileWriter(tmp_path / "f", "items") as file:
        for i in range(10):
            file.append("a", np.full(3, i, np.int32))
        file.add("b", np.zeros(2, np.uint8))
        file.append("c", np.ones(1, np.float32))
    file = PackedFile(tmp_path / "f")
    np.testing.assert_array_equal(file["a"], np.repeat(np.arange(10), 3))
    assert [len(file[name]) for name in "abc"] == [30, 2, 1]


def test_append_keeps_one_dtype(tmp_path):
    with PackedFileWriter(tmp_path / "f", "items") as file:
        file.append("a", np.zeros(1, np.int32))
        with pytest.raises(ValueError, match='section "a" was begun as int32, got int64'):
            file.append("a", np.zeros(1, np.int64))
        file.append("b", np.zeros(1, np.int64))
        with pytest.raises(ValueError, match='section "a" is given twice'):
            file.append("a", np.zeros(1, np.int32))


def test_arrays_are_read_only_and_keep_the_map(tmp_path):
    write(tmp_path / "f", a=np.arange(100_000))
    array = PackedFile(tmp_path / "f")["a"]
    gc.collect()
    assert array.sum() == 100_000 * 99_999 // 2
    assert not array.flags.owndata and array.ctypes.data % 64 == 0
    with pytest.raises(ValueError):
        array[0] = 1
    with pytest.raises(ValueError):
        array.setflags(write=True)


def test_exception_leaves_no_file_and_no_temporary(tmp_path):
    with pytest.raises(ZeroDivisionError), PackedFileWriter(tmp_path / "f", "items") as file:
        file.add("a", np.zeros(3, np.int64))
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_exception_leaves_the_old_file(tmp_path):
    write(tmp_path / "f", a=np.arange(3))
    with pytest.raises(ZeroDivisionError), PackedFileWriter(tmp_path / "f", "items"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert PackedFile(tmp_path / "f")["a"].tolist() == [0, 1, 2]


def test_closed_writer(tmp_path):
    with PackedFileWriter(tmp_path / "f", "items") as file:
        pass
    with pytest.raises(ValueError, match="the file is closed"):
        file.add("a", np.zeros(1, np.int64))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(1, np.float16), "dtype float16, expected uint8"),
        (np.zeros(1, bool), "dtype bool, expected uint8"),
        (np.array(["a"]), "dtype <U1, expected uint8"),
        (np.zeros(1, ">i4"), "dtype >i4, expected uint8"),
        (np.zeros((2, 2), np.int32), "has 2 dimensions, expected 1"),
        (np.array(3, np.int32), "has 0 dimensions, expected 1"),
    ],
)
def test_arrays_that_have_no_place(tmp_path, values, message):
    with PackedFileWriter(tmp_path / "f", "items") as file, pytest.raises(ValueError, match=message):
        file.add("a", values)


def test_bad_names(tmp_path):
    with PackedFileWriter(tmp_path / "f", "items") as file:
        for name in ("", "n" * 32, "a\0b"):
            with pytest.raises(ValueError, match="expected 1 to 31 bytes"):
                file.add(name, np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="expected 1 to 15 bytes"):
        PackedFileWriter(tmp_path / "f", "k" * 16)


def test_missing_section_is_named(tmp_path):
    write(tmp_path / "f", a=np.zeros(1, np.int64))
    with pytest.raises(KeyError, match=r"has no section 'price' \(it has: a\)"):
        PackedFile(tmp_path / "f")["price"]


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        PackedFile(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="no_folder"):
        PackedFileWriter(tmp_path / "no_folder" / "f", "items")


def test_wrong_kind(tmp_path):
    write(tmp_path / "f")
    with pytest.raises(FormatError, match='kind "items", expected "users"'):
        PackedFile(tmp_path / "f", "users")


def test_corrupt_and_truncated_files(tmp_path):
    path = tmp_path / "f"
    write(path, a=np.arange(100))
    data = path.read_bytes()
    for size in (0, 10, 63, 64, 500, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(FormatError, match=str(path)):
            PackedFile(path, verify=False)
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(FormatError, match=f'{path}: the checksum of section "a"'):
        PackedFile(path)
    assert len(PackedFile(path, verify=False)["a"]) == 100, "the caller chose not to read it all"
