from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest

from dpsr_common.errors import UsageError
from dpsr_common.typed_config import from_dict, option, read_assignment, to_dict


@dataclasses.dataclass(frozen=True)
class Batch:
    RENAMED: ClassVar[dict[str, tuple[str, dict[str, str]]]] = {
        "negatives": ("own_negatives", {"few": "4"}),
        "rows": ("size", {}),
    }

    size: int = option(64, "pairs in a batch", 1, 100)
    own_negatives: int = option(0, "negatives of each pair", 0)

    def problem(self):
        return "own_negatives is larger than size" if self.own_negatives > self.size else None


@dataclasses.dataclass(frozen=True)
class Column:
    SHORTHAND: ClassVar[str] = "column"

    column: str = dataclasses.field(metadata={"help": "name of the column", "numbers": True})
    optional: bool = option(False, "rows may lack it")


@dataclasses.dataclass(frozen=True)
class Config:
    batch: Batch = dataclasses.field(default_factory=Batch)
    rate: float = option(0.5, "learning rate", 1e-8, 10)
    widths: tuple[int, ...] = option((), "layer widths", 1, 512)
    loss: str = option("hinge", "the loss", choices=("hinge", "softmax"))
    limit: int | None = option(None, "largest number of rows", 1)
    columns: dict[str, Column] = option({}, "columns by feature")


def refused(data, cls=Config, **options):
    with pytest.raises(UsageError) as caught:
        from_dict(cls, data, "c.yaml", **options)
    return str(caught.value)


def test_round_trip():
    config = Config(Batch(8, 2), 1.0, (3, 4), "softmax", 9, {"brand": Column("brand_id", True)})
    assert from_dict(Config, to_dict(config), "c.yaml") == config
    assert to_dict(config)["columns"] == {"brand": {"column": "brand_id", "optional": True}}
    assert from_dict(Config, None, "c.yaml") == from_dict(Config, {"batch": None}, "c.yaml") == Config()


def test_values_become_the_type_of_their_field():
    config = from_dict(Config, {"rate": "1e-3", "widths": 5, "limit": None, "columns": {"age": "years"}}, "c.yaml")
    assert (config.rate, config.widths, config.limit) == (0.001, (5,), None)
    assert config.columns == {"age": Column("years")}
    assert from_dict(Column, {"column": 3}, "c.yaml").column == "3"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1], "c.yaml: is [1], expected a section of `key: value` lines"),
        ({"batch": {"size": 0}}, "c.yaml: batch: size is 0, expected 1 to 100 (pairs in a batch)"),
        ({"batch": {"size": "8"}}, "c.yaml: batch: size is '8', expected a whole number (pairs in a batch)"),
        ({"batch": {"size": True}}, "c.yaml: batch: size is True, expected a whole number (pairs in a batch)"),
        ({"batch": {"own_negatives": -1}}, "c.yaml: batch: own_negatives is -1, expected 0 or more"),
        ({"rate": "fast"}, "c.yaml: rate is 'fast', expected a number (learning rate)"),
        ({"rate": float("nan")}, "c.yaml: rate is nan, expected "),
        ({"widths": [4, 0]}, "c.yaml: widths is 0, expected 1 to 512 (layer widths)"),
        ({"loss": "l2"}, "c.yaml: loss is 'l2', expected one of hinge, softmax"),
        ({"columns": [1]}, "c.yaml: columns is [1], expected `key: value` lines (columns by feature)"),
        ({"columns": {"a": {}}}, "c.yaml: columns: a: key 'column' is missing (name of the column)"),
        ({"batch": {"sise": 1}}, "unknown key 'sise', expected one of size, own_negatives; did you mean 'size'?"),
    ],
)
def test_errors_name_the_key_the_value_and_what_is_allowed(data, message):
    assert message in refused(data)


def test_values_that_do_not_go_together_are_refused_unless_the_check_is_put_off():
    data = {"batch": {"size": 2, "own_negatives": 3}}
    assert refused(data) == "c.yaml: batch: own_negatives is larger than size"
    assert from_dict(Config, data, "c.yaml", check=False).batch.own_negatives == 3


@pytest.mark.parametrize(
    ("key", "value", "now"),
    [("negatives", "few", "own_negatives: 4"), ("negatives", 3, "own_negatives: 3"), ("rows", 64, "size: 64")],
)
def test_a_renamed_key_says_how_it_is_written_now(key, value, now):
    assert refused({"batch": {key: value}}) == f"c.yaml: batch: key '{key}' was renamed; write '{now}'"


def test_renamed_keys_are_not_offered():
    assert "unknown key 'negativs', expected one of size, own_negatives" in refused({"negativs": 1}, Batch)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("train.steps=5", ("train.steps", 5)),
        ("train.loss=softmax", ("train.loss", "softmax")),
        ("model.hidden=[8, 4]", ("model.hidden", [8, 4])),
        ("index.parameters=nprobe=4", ("index.parameters", "nprobe=4")),
        ("index.parameters=", ("index.parameters", None)),
    ],
)
def test_an_assignment_is_a_name_and_a_yaml_value(assignment, expected):
    assert read_assignment(assignment, "train.steps=5") == expected


@pytest.mark.parametrize(
    ("assignment", "example", "message"),
    [
        ("train.steps", "train.steps=5", "--set=train.steps: expected section.key=value, for example train.steps=5"),
        ("steps=5", "train.steps=5", "--set=steps=5: expected section.key=value, for example train.steps=5"),
        ("=5", "users=5", "--set==5: expected name=value, for example users=5"),
        ("users=[1", "users=5", "--set=users=[1: '[1' is not valid YAML: "),
    ],
)
def test_an_assignment_that_cannot_be_read(assignment, example, message):
    with pytest.raises(UsageError) as caught:
        read_assignment(assignment, example)
    assert str(caught.value).startswith(message)
