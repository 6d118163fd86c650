from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest

from dpsr_common.errors import UsageError
from dpsr_common.typed_config import from_dict, option


@dataclasses.dataclass(frozen=True)
class Batch:
    RENAMED: ClassVar[dict[str, str]] = {"negatives": "own_negatives: 4", "rows": "size: 64"}

    size: int = option(64, "pairs in a batch", 1, 100)
    own_negatives: int = option(0, "negatives of each pair", 0)


@dataclasses.dataclass(frozen=True)
class Config:
    batch: Batch = dataclasses.field(default_factory=Batch)


@pytest.mark.parametrize(("key", "now"), [("negatives", "own_negatives: 4"), ("rows", "size: 64")])
def test_a_renamed_key_says_how_it_is_written_now(key, now):
    with pytest.raises(UsageError) as caught:
        from_dict(Config, {"batch": {"size": 8, key: 1}}, "c.yaml")
    assert str(caught.value) == f"c.yaml: batch: key '{key}' was renamed; write {now}"


def test_renamed_keys_are_not_offered():
    with pytest.raises(UsageError, match="unknown key 'negativs', expected one of size, own_negatives"):
        from_dict(Batch, {"negativs": 1}, "c.yaml")
