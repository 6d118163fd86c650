"""A model directory: TensorFlow's checkpoints, with what is needed to read them without the store.

Training writes it; evaluation, `dpsr index` and `dpsr export` read it. Its files:

config.yaml        the config of the training
features.json      the features that the model reads (FeatureSpec), and a hash of what the codes of each one mean
vocabulary.dpsr    the vocabulary of the token ids
vocabulary.words.dpsr     the words that a rewriter reads and writes
codes/             what the codes of the features mean (data/code_book.py)
checkpoint, model.ckpt-*, events.*     written by TensorFlow
teacher.dpsr       what the quantizer learns from (training/quantizer_start.py); nothing but its training reads it
validation.jsonl, best/, validation/   written by training with validation (training/validation.py)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.files import replaced, write_text
from dpsr_common.packed_file import FormatError
from dpsr_common.typed_config import from_dict, to_dict
from dpsr_tf.config import Config, load_config, save_config
from dpsr_tf.data.code_book import CODES, CodeBook
from dpsr_tf.data.schema import VALUE_KINDS
from dpsr_tf.data.store import WORDS, Store
from dpsr_tf.models.features import FeatureSpec, Number, SequenceSpec
from dpsr_tf.models.quantizer import Quantizer
from dpsr_tokenizer import Vocabulary, WordSequences

# The files that make a directory of checkpoints a model.
_FILES = ("vocabulary.dpsr", "features.json", "config.yaml")
# What a directory that is to become a model may hold: what a killed training wrote, and what file systems put there.
_BEGINNINGS = {*_FILES, CODES, WORDS, "lost+found"}
# What each kind of model is for, in errors about the other one.
_MADE_FOR = {
    "retrieval": "it finds items; for a ranker or rewriter, train with dpsr_tf/configs/ranker.yaml or rewriter.yaml",
    "ranker": "it orders items that were found; give it to `dpsr evaluate` or `dpsr export` as a ranker",
    "rewriter": "it writes other words for a query; give it to `dpsr rewrite` or `dpsr export` as a rewriter",
}


# How a trained rewriter is asked; training does not read it.
_OF_REWRITING = tuple(
    f"rewriter.{name}" for name in ("path", "method", "max_words", "title_beams", "draws", "top_words", "temperature")
)


@dataclasses.dataclass(frozen=True)
class ModelDirectory:
    """A model directory whose config, features and vocabulary have been read."""

    path: Path
    config: Config
    features: FeatureSpec
    meanings: dict[str, str]  # feature name, such as "users.gender", to a hash of what its codes mean
    vocabulary: Vocabulary

    @property
    def vocabulary_path(self) -> Path:
        """Path of the vocabulary file."""
        return self.path / "vocabulary.dpsr"

    @property
    def words_path(self) -> Path:
        """Path of the vocabulary of a rewriter's words."""
        return self.path / WORDS

    @property
    def words(self) -> Vocabulary:
        """The vocabulary of a rewriter's words. Raises CommandError if it cannot be read."""
        try:
            return Vocabulary(str(self.words_path))
        except (FormatError, FileNotFoundError) as error:
            raise CommandError(f"{error}; train the model again") from None

    @property
    def validated(self) -> bool:
        """Whether training measured its checkpoints on the validation fold of the held-out interactions."""
        return self.config.validation.queries > 0

    @property
    def has_quantizer(self) -> bool:
        """Whether the last checkpoint has a quantizer. Raises tf.errors.OpError if the checkpoint cannot be read."""
        return Quantizer.is_in(tf.train.latest_checkpoint(str(self.path)))

    @staticmethod
    def open(path: str | Path, kind: str | None = None) -> ModelDirectory:
        """Opens the model at `path`. Raises CommandError if there is none, or if it is not of this kind.

        Args:
            path: the directory.
            kind: "retrieval", "ranker" or "rewriter" for a caller that can use only one of them.
        """
        directory = Path(path)
        if not (directory / "config.yaml").is_file():
            raise CommandError(f"{path}: holds no model (no config.yaml); make one with `dpsr train`")
        try:
            vocabulary = Vocabulary(str(directory / "vocabulary.dpsr"))
        except (FormatError, FileNotFoundError) as error:
            raise CommandError(f"{error}; train the model again") from None
        try:
            held = json.loads((directory / "features.json").read_text())
            spec = from_dict(FeatureSpec, held["features"], f"{directory / 'features.json'}")
            meanings = dict(held["meanings"])
        except (OSError, ValueError, KeyError, TypeError, UsageError) as error:
            raise CommandError(
                f"{directory / 'features.json'}: cannot be read: {error}; train the model again"
            ) from None
        config = load_config(directory / "config.yaml")
        model = ModelDirectory(directory, config, spec, meanings, vocabulary)
        if kind is not None:
            model.expect(kind)
        return model

    def expect(self, kind: str) -> None:
        """Raises CommandError if the model is not of this kind."""
        if self.config.model.kind != kind:
            raise CommandError(
                f"{self.path}: holds a model of kind {self.config.model.kind}, expected {kind}; "
                f"{_MADE_FOR[self.config.model.kind]}"
            )

    def last_checkpoint(self) -> str:
        """Returns the path of the last checkpoint, "MODEL/model.ckpt-2000".

        Raises:
            CommandError: there is no checkpoint, or only the one of the random weights that training saves before its
                first step.
        """
        checkpoint = tf.train.latest_checkpoint(str(self.path))
        if checkpoint is None:
            raise CommandError(f"{self.path}: holds no checkpoint; run `dpsr train` to its first one")
        if checkpoint.endswith("-0"):
            raise CommandError(
                f"{self.path}: holds no trained checkpoint, only {Path(checkpoint).name}, the random weights that "
                f"training began with; run `dpsr train` to its next one"
            )
        return checkpoint

    def difference(self, config: Config, store: Store) -> str | None:
        """Returns why training with `config` on `store` cannot resume this model; None if it can.

        Training can resume with more steps, with other checkpoint times, and with other sections `index` and `serving`.
        The section `quantizer` may change until a checkpoint has a quantizer.
        """
        train = dataclasses.replace(
            self.config.train, steps=config.train.steps, checkpoint_steps=config.train.checkpoint_steps
        )
        before, now = _flat(dataclasses.replace(self.config, train=train)), _flat(config)
        differing = [key for key in now if before[key] != now[key]]
        of_quantizer = [key for key in differing if key.startswith("quantizer.")]
        sections = ["model.", "train."]
        if config.model.kind != "retrieval":
            sections.append(f"{config.model.kind}.")
        differing = [key for key in differing if key.startswith(tuple(sections)) and key not in _OF_REWRITING]
        if of_quantizer and self.has_quantizer:
            differing += of_quantizer
        if differing:
            changes = ", ".join(f"{key} was {before[key]!r} and is {now[key]!r}" for key in differing)
            return f"holds a model of another config: {changes}"
        return self.store_difference(store)

    def store_difference(self, store: Store) -> str | None:
        """Returns why this model cannot read `store`; None if it can."""
        if self.vocabulary.fingerprint != store.vocabulary.fingerprint:
            return f"holds a model of another vocabulary than that of {store.path}"
        if self.config.model.kind == "rewriter" and store.schema.rewriting is not None:
            own = self.words.fingerprint
            if own != Vocabulary(str(store.words_path)).fingerprint:
                return f"holds a model of other words than those of {store.path}"
        try:
            now = feature_spec(self.config, store)
        except UsageError as error:
            return str(error)
        meanings = _meanings(now, store)
        differing = [name for name in {**self.meanings, **meanings} if self.meanings.get(name) != meanings.get(name)]
        if differing:
            return f"holds a model that reads {', '.join(differing)} with other values or codes than {store.path}"
        now = dataclasses.replace(now, numbers=self.features.numbers)  # their scales are those of the training
        if now != self.features:
            return f"holds a model of other features than {store.path}: {_flat_spec(self.features, now)}"
        return None

    @staticmethod
    def create_or_resume(
        path: str | Path, config: Config, store: Store, numbers: Callable[[], tuple[Number, ...]] = tuple
    ) -> ModelDirectory:
        """Makes a model directory for `config` and `store`, or opens one that was started with the same.

        Args:
            path: the directory.
            config: the config of the training.
            store: the store to train on.
            numbers: returns the numbers that a new ranker reads.

        Raises:
            CommandError: another model is there, and the message names what differs; or other files are there.
            UsageError: the config names features that the store does not have.
        """
        directory = Path(path)
        spec = feature_spec(config, store)
        if (directory / "config.yaml").is_file():
            model = ModelDirectory.open(directory)
            difference = model.difference(config, store)
            if difference:
                raise CommandError(f"{path}: {difference}; choose another --out, or give --overwrite")
            spec = model.features
        else:
            if others := other_files(directory):
                raise CommandError(
                    f"{path}: holds no model, but other files, such as {others[0]}; choose another --out, or an empty "
                    f"directory"
                )
            spec = dataclasses.replace(spec, numbers=numbers())
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(f"{path}: cannot be made: {error.strerror}; choose another --out") from None
        held = {"features": to_dict(spec), "meanings": _meanings(spec, store)}
        # The config is written last, because a directory without one is not yet a model. Several workers of a cluster
        # may do this at the same time.
        items = dict.fromkeys(f.name for f in (*spec.item, *spec.graph))
        CodeBook.write(directory, store, list(items), [f.name for f in spec.user])
        if config.model.kind == "rewriter":
            with replaced(directory / WORDS) as temporary:
                shutil.copyfile(store.words_path, temporary)
        write_text(directory / "features.json", json.dumps(held, indent=2) + "\n")
        with replaced(directory / "config.yaml") as temporary:
            save_config(config, temporary)
        return ModelDirectory.open(directory)


def other_files(directory: Path) -> list[str]:
    """Returns the names of what is in a directory and does not begin a model, without hidden files."""
    if not directory.is_dir():
        return []
    names = sorted(path.name for path in directory.iterdir())
    return [name for name in names if name not in _BEGINNINGS and not name.startswith(".")]


def copy_model(source: Path, to: Path) -> None:
    """Copies what makes a model of a directory of checkpoints, without a checkpoint, into the directory `to`."""
    for name in _FILES:
        shutil.copyfile(source / name, to / name)
    if (source / WORDS).exists():
        shutil.copyfile(source / WORDS, to / WORDS)
    shutil.copytree(source / CODES, to / CODES)


def feature_spec(config: Config, store: Store) -> FeatureSpec:
    """Returns the features of `store` that the model of `config` reads. Raises UsageError if one is missing."""
    if config.model.kind == "rewriter":
        rewriting = store.schema.rewriting
        if rewriting is None:
            raise UsageError(
                f"{store.path}: holds no sequences of words, which a rewriter learns from; add the section "
                f"`rewriting: {{}}` to the schema and ingest the log again"
            )
        sequences = SequenceSpec(
            num_words=len(WordSequences(Vocabulary(str(store.words_path)))),
            query_words=rewriting.max_query_words,
            title_words=rewriting.max_title_words,
        )
        return FeatureSpec(store.vocabulary.num_ids, sequences=sequences)
    num_ids: dict[str | None, int] = {name: vocabulary.num_ids for name, vocabulary in store.vocabularies.items()}
    num_ids[None] = store.vocabulary.num_ids
    attributes = None if store.schema.graph is None else store.schema.graph.attributes
    return FeatureSpec.choose(config.model, store.manifest["features"], num_ids, attributes)


def _meanings(spec: FeatureSpec, store: Store) -> dict[str, str]:
    """Returns for each feature that the towers read a hash of what its codes stand for."""
    meanings = {}
    items = tuple(dict.fromkeys((*spec.item, *spec.graph)))
    for side, features, table in (("users", spec.user, store.users()), ("items", items, store.items())):
        stored = {feature["name"]: feature for feature in store.manifest["features"][side]}
        for feature in features:
            digest = hashlib.sha256(json.dumps(stored[feature.name], sort_keys=True).encode())
            if feature.kind == "text":
                vocabulary = store.vocabularies[feature.vocabulary] if feature.vocabulary else store.vocabulary
                digest.update(f"{vocabulary.fingerprint:016x}".encode())
            if feature.kind in VALUE_KINDS:
                for part in ("splits", "bytes"):
                    digest.update(table[f"values.{feature.name}.{part}"].tobytes())
            meanings[f"{side}.{feature.name}"] = digest.hexdigest()
    return meanings


def _flat(config: Config) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, part in to_dict(config).items() for key, value in part.items()}


def _flat_spec(before: FeatureSpec, now: FeatureSpec) -> str:
    was, is_now = to_dict(before), to_dict(now)
    return ", ".join(f"{key} was {was[key]!r} and is {is_now[key]!r}" for key in was if was[key] != is_now[key])
