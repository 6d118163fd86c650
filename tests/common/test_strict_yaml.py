from __future__ import annotations

import math

import pytest

from dpsr_common.errors import UsageError
from dpsr_common.strict_yaml import Section, load_yaml, read_file, read_yaml


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_is_read_in_the_encodings_of_yaml(tmp_path, encoding):
    path = tmp_path / "c.yaml"
    path.write_bytes("a: 1\nb: {c: [x, 手机]}\n".encode(encoding))
    assert read_yaml(path) == read_yaml(str(path)) == {"a": 1, "b": {"c": ["x", "手机"]}}


@pytest.mark.parametrize("text", ["", "# only a comment\n", "{}", "---\n"])
def test_an_empty_file_is_an_empty_mapping(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    assert read_yaml(tmp_path / "c.yaml") == {}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a: [1", "not valid YAML: while parsing a flow sequence"),
        (b"a: 2024-13-01", "not valid YAML: month must be in 1..12"),
        (b"a: \xff", "not valid YAML: 'utf-8' codec can't decode byte 0xff"),
        (b"- 1\n- 2\n", "holds a list, expected `key: value` lines"),
        (b"text", "holds a str, expected `key: value` lines"),
        (b"a: 1\na: 2\n", "key 'a' is given twice"),
        (b"s: {b: 1, c: 2, b: 3}\n", "key 'b' is given twice"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_name(tmp_path, data, message):
    path = tmp_path / "c.yaml"
    path.write_bytes(data)
    with pytest.raises(UsageError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


@pytest.mark.parametrize("read", [read_yaml, lambda path: read_file(path, load_yaml)])
def test_files_that_cannot_be_read(tmp_path, read):
    with pytest.raises(UsageError, match=r"none\.yaml: no such file, expected a YAML file$"):
        read(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match=r": cannot be read: Is a directory; expected a YAML file$"):
        read(tmp_path)


def test_read_file_names_the_file_in_errors_of_parse(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("a: 1")
    assert read_file(path, str.upper) == "A: 1"

    def refuse(text):
        raise UsageError(f"a: got {text[-1]}, expected 2")

    with pytest.raises(UsageError) as caught:
        read_file(path, refuse)
    assert str(caught.value) == f"{path}: a: got 1, expected 2"


def test_merge_keys_may_repeat_a_key():
    assert load_yaml("base: &b {x: 1, y: 2}\nuse:\n  <<: *b\n  x: 3\n")["use"] == {"x": 3, "y": 2}


TREE = {"name": "demo", "on": True, "count": 3, "share": 0.5, "inner": {"deep": 1}}


def section(**changes):
    return Section("models.m", TREE | changes, (*TREE, "other"))


def test_a_section_reads_its_values():
    values = section()
    assert (values.text("name", None), values.flag("on", False), values.integer("count", 0, 1)) == ("demo", True, 3)
    assert values.number("share", 1.0) == 0.5 and values.number("count", 1.0) == 3
    assert values.section("inner", ("deep",)).integer("deep", 0, 0) == 1
    assert values.section("inner", ("deep",)).key == "models.m.inner."


def test_a_key_that_is_not_there_has_the_default():
    values = section()
    assert values.text("other", "preset") == "preset" and values.number("other", None) is None
    assert values.flag("other", True) is True and values.integer("other", 7, 1) == 7
    assert values.section("other", ("x",)).tree == {}


@pytest.mark.parametrize(
    ("changes", "read", "message"),
    [
        ({"name": ""}, lambda s: s.text("name", ""), "models.m.name: got '', expected a string that is not empty"),
        ({"name": 5}, lambda s: s.text("name", ""), "models.m.name: got 5, expected a string that is not empty"),
        (
            {},
            lambda s: s.text("name", "", str.isupper, "capital letters"),
            "models.m.name: got 'demo', expected capital letters",
        ),
        ({"on": 1}, lambda s: s.flag("on", False), "models.m.on: got 1, expected true or false"),
        ({"count": 2}, lambda s: s.integer("count", 0, 3), "models.m.count: got 2, expected an integer of at least 3"),
        ({"count": True}, lambda s: s.integer("count", 0, 0), "got True, expected an integer of at least 0"),
        ({"count": 2.0}, lambda s: s.integer("count", 0, 0), "got 2.0, expected an integer of at least 0"),
        (
            {"count": 10**20},
            lambda s: s.integer("count", 0, 0),
            f"models.m.count: got {10**20}, expected an integer of at least 0 and at most {2**63 - 1}",
        ),
        (
            {"count": 6},
            lambda s: s.integer("count", 0, 1, most=5),
            "got 6, expected an integer of at least 1 and at most 5",
        ),
        ({"share": 0}, lambda s: s.number("share", 1.0), "models.m.share: got 0, expected a number above 0"),
        ({"share": 2}, lambda s: s.number("share", 1.0, most=1), "got 2, expected a number above 0 and at most 1"),
        ({"share": -1}, lambda s: s.number("share", 1.0, least=0), "got -1, expected a number of at least 0"),
        ({"share": math.nan}, lambda s: s.number("share", 1.0), "got nan, expected a number above 0"),
        ({"share": math.inf}, lambda s: s.number("share", 1.0), "got inf, expected a number above 0"),
        ({"share": 10**400}, lambda s: s.number("share", 1.0), "0000, expected a number above 0"),
        ({"share": "1"}, lambda s: s.number("share", 1.0), "got '1', expected a number above 0"),
        ({"inner": [1]}, lambda s: s.section("inner", ("a", "b")), "models.m.inner: got [1], expected a mapping with"),
        ({}, lambda s: s.section("inner", ("a", "b")), "models.m.inner: unknown key 'deep', allowed: a, b"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_its_key(changes, read, message):
    with pytest.raises(UsageError) as caught:
        read(section(**changes))
    assert message in str(caught.value)


def test_number_of_at_least_takes_the_bound_itself():
    assert section(share=0).number("share", 1.0, least=0) == 0
    assert section(share=1).number("share", 0.0, most=1) == 1


def test_the_whole_file_is_a_section_without_a_key():
    top = Section("", {"a": 0}, ("a", "b"))
    assert top.key == "" and top.section("b", ()).key == "b."
    with pytest.raises(UsageError, match=r"^a: got 0, expected an integer of at least 1$"):
        top.integer("a", 1, 1)
    with pytest.raises(UsageError, match=r"^the configuration: unknown key 'c', allowed: a, b$"):
        Section("", {"c": 0}, ("a", "b"))
    with pytest.raises(UsageError, match=r"^the configuration: got \[\], expected a mapping with the keys a, b$"):
        Section("", [], ("a", "b"))


def test_errors_name_lines_if_the_text_was_read_with_them() -> None:
    text = "a:\n  b: 1\n\n  c: &c {d: 2}\ne:\n  <<: *c\n  f: 3\n"
    tree = load_yaml(text, lines=True)
    assert tree == load_yaml(text)
    top = Section("", tree, ("a", "e"))
    inner = top.section("a", ("b", "c"))
    with pytest.raises(UsageError, match=r"^line 2: a\.b: got 1, expected a string that is not empty"):
        inner.text("b", None)
    with pytest.raises(UsageError, match=r"^line 4: a\.c: unknown key 'd', allowed: g$"):
        inner.section("c", ("g",))
    with pytest.raises(UsageError, match=r"^line 5: e: got \{'d': 2, 'f': 3\}, expected a list$"):
        top.value("e", None, lambda value: isinstance(value, list), "a list")
    with pytest.raises(UsageError, match=r"^line 2: a\.x: is missing$"):
        raise inner.error("x", "is missing")
    with pytest.raises(UsageError, match=r"^a: unknown key 'b'"):
        Section("", load_yaml(text), ("a", "e")).section("a", ("c",))
