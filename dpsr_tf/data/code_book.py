"""What the token ids and feature codes of a model mean, kept with the model.

`dpsr ingest --like=MODEL` codes new tables in the same way, so that the model can read a store with new items, and with
new values of their features, which it does not know. A model directory holds

    vocabulary.dpsr                  the vocabulary of query and item text
    vocabulary.words.dpsr            the words of a rewriter
    codes/codes.json                 the features that the towers read, as in a store's manifest
    codes/items.dpsr, users.dpsr     values.NAME: the text of code 1, 2, ... of each categorical or multi feature
    codes/vocabulary-NAME.dpsr       the vocabularies of text features
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.files import replaced, write_text
from dpsr_common.packed_file import FormatError, PackedFile, PackedFileWriter
from dpsr_common.typed_config import from_dict, to_dict
from dpsr_tf.data.schema import VALUE_KINDS, Feature, Schema
from dpsr_tf.data.store import WORDS, Features, Store, StoredFeature, unpack_strings, vocabulary_name
from dpsr_tokenizer import TokenizerConfig, Vocabulary

CODES = "codes"


@dataclasses.dataclass(frozen=True)
class CodeBook:
    """The codes that a model reads.

    Attributes:
        path: the model directory.
        features: the features that its towers read.
    """

    path: Path
    features: Features

    @staticmethod
    def write(directory: Path, store: Store, items: Sequence[str], users: Sequence[str]) -> None:
        """Writes the files of a model that is trained on `store` and reads these features of items and users.

        Several workers of a cluster may write the same files at the same time.
        """
        chosen = Features(
            tuple(feature for feature in store.features.items if feature.name in items),
            tuple(feature for feature in store.features.users if feature.name in users),
        )
        folder = directory / CODES
        folder.mkdir(exist_ok=True)
        _copy(store.vocabulary_path, directory / vocabulary_name())
        for name in {feature.vocabulary for feature in (*chosen.items, *chosen.users)} - {None}:
            _copy(store.path / vocabulary_name(name), folder / vocabulary_name(name))
        for table, features, file in (("items", chosen.items, store.items()), ("users", chosen.users, store.users())):
            with PackedFileWriter(folder / f"{table}.dpsr", "codes") as writer:
                for section in (f"values.{feature.name}" for feature in features if feature.kind in VALUE_KINDS):
                    for part in ("splits", "bytes"):
                        writer.add(f"{section}.{part}", file[f"{section}.{part}"])
        write_text(folder / "codes.json", json.dumps(to_dict(chosen), indent=2) + "\n")

    @staticmethod
    def read(directory: str | Path) -> CodeBook:
        """Opens the codes of a model.

        Raises:
            CommandError: the directory holds no model, or the model was trained by a version that kept no codes.
        """
        path = Path(directory)
        if not (path / "config.yaml").is_file():
            raise CommandError(f"{directory}: holds no model (no config.yaml); make one with `dpsr train`")
        try:
            features = from_dict(Features, json.loads((path / CODES / "codes.json").read_text()), "codes.json")
        except (OSError, ValueError, UsageError) as error:
            raise CommandError(
                f"{path / CODES / 'codes.json'}: cannot be read: {error}; train the model again"
            ) from None
        return CodeBook(path, features)

    def vocabulary(self, name: str | None = None) -> Path | None:
        """Returns the file of a vocabulary; None if the model does not read it."""
        path = self.path / CODES / vocabulary_name(name) if name else self.path / vocabulary_name()
        return path if path.is_file() else None

    def words(self) -> Path | None:
        """Returns the vocabulary of the words that a rewriter reads and writes; None for another model."""
        path = self.path / WORDS
        return path if path.is_file() else None

    def values(self, table: str, feature: str) -> list[str] | None:
        """Returns the texts of code 1, 2, ... of a feature of "items" or "users"; None if the model reads none."""
        stored = {stored.name: stored for stored in getattr(self.features, table)}
        if feature not in stored or stored[feature].kind not in VALUE_KINDS:
            return None
        path = self.path / CODES / f"{table}.dpsr"
        try:
            return unpack_strings(PackedFile(str(path), "codes"), f"values.{feature}")
        except (FormatError, OSError, KeyError) as error:
            raise CommandError(f"{path}: cannot be read: {error}; train the model again") from None

    def check(self, schema: Schema) -> None:
        """Checks that a store of this schema can use the model's codes.

        Raises:
            CommandError: a feature that the model reads is missing or has another kind, bounds, vocabulary or length.
                Also when a tokenizer differs.
        """
        tables: Mapping[str, Sequence[Feature]] = {
            "items": schema.items.features,
            "users": schema.users.features if schema.users else (),
        }
        for table, features in tables.items():
            declared = {feature.key: feature for feature in features}
            for stored in getattr(self.features, table):
                problem = _difference(stored, declared.get(stored.name))
                if problem:
                    raise CommandError(
                        f"--like={self.path}: the model reads the feature '{stored.name}' of {table}, {problem}; "
                        f"correct the schema, or train a new model"
                    )
        names = {None: schema.tokenizer} | {name: section.tokenizer for name, section in schema.vocabularies.items()}
        for name, tokenizer in names.items():
            path = self.vocabulary(name)
            config = TokenizerConfig(**dataclasses.asdict(tokenizer))
            if path is not None and Vocabulary(str(path)).config != config:
                section = f"vocabularies: {name}: tokenizer" if name else "tokenizer"
                raise CommandError(
                    f"--like={self.path}: the schema's section `{section}` differs from the model's; "
                    f"correct the schema, or train a new model"
                )


def _difference(stored: StoredFeature, declared: Feature | None) -> str | None:
    if declared is None:
        return "which the schema does not have"
    for key in ("kind", "boundaries", "vocabulary"):
        was, now = getattr(stored, key), getattr(declared, key)
        if was != now:
            return f"whose {key} was {was!r} and is {now!r} in the schema"
    if stored.kind == "vector" and stored.num_values != declared.length:
        return f"whose length was {stored.num_values} and is {declared.length} in the schema"
    return None


def _copy(source: Path, path: Path) -> None:
    with replaced(path) as temporary:
        shutil.copyfile(source, temporary)
