"""What a model directory holds beside TensorFlow's checkpoints, so that it can be read without its store.

config.yaml        the config it was trained with
vocabulary.dpsr    the vocabulary its token ids come from
checkpoint, model.ckpt-*, events.*   TensorFlow's
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from dpsr_tf.config import Config, load_config, save_config, to_dict
from dpsr_tf.data.store import Store
from dpsr_tf.errors import CommandError
from dpsr_tokenizer import FormatError, Vocabulary


@dataclasses.dataclass(frozen=True)
class ModelDirectory:
    """A model directory whose config and vocabulary have been read."""

    path: Path
    config: Config
    vocabulary: Vocabulary

    @property
    def vocabulary_path(self) -> Path:
        """The vocabulary file."""
        return self.path / "vocabulary.dpsr"

    @staticmethod
    def open(path: str | Path) -> ModelDirectory:
        """Raises CommandError if there is no model at `path`."""
        directory = Path(path)
        if not (directory / "config.yaml").is_file():
            raise CommandError(f"{path}: holds no model (no config.yaml); make one with `dpsr train`")
        try:
            vocabulary = Vocabulary(str(directory / "vocabulary.dpsr"))
        except (FormatError, FileNotFoundError) as error:
            raise CommandError(f"{error}; train the model again") from None
        return ModelDirectory(directory, load_config(directory / "config.yaml"), vocabulary)

    def difference(self, config: Config, store: Store) -> str | None:
        """Why a training with `config` on `store` cannot go on with this model; None if it can.

        A longer training, other checkpoint times, and index and serving settings need no new model.
        """
        free = {"steps": config.train.steps, "checkpoint_steps": config.train.checkpoint_steps}
        same = dataclasses.replace(self.config, train=dataclasses.replace(self.config.train, **free))
        before, now = _flat(same), _flat(config)
        differing = [key for key in now if key.startswith(("model.", "train.")) and before[key] != now[key]]
        if differing:
            changes = ", ".join(f"{key} was {before[key]!r} and is {now[key]!r}" for key in differing)
            return f"holds a model of another config: {changes}"
        if self.vocabulary.fingerprint != store.vocabulary.fingerprint:
            return f"holds a model of another vocabulary than that of {store.path}"
        return None

    @staticmethod
    def create_or_resume(path: str | Path, config: Config, store: Store) -> ModelDirectory:
        """Makes a model directory for `config` and `store`, or opens one that has been begun with the same.

        Raises:
            CommandError: another model is there; the message names what differs.
        """
        directory = Path(path)
        if (directory / "config.yaml").is_file():
            difference = ModelDirectory.open(directory).difference(config, store)
            if difference:
                raise CommandError(f"{path}: {difference}; choose another --out, or give --overwrite")
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(f"{path}: cannot be made: {error.strerror}; choose another --out") from None
        # The config comes last: a directory without one is not yet a model.
        for name, write in (
            ("vocabulary.dpsr", lambda p: shutil.copyfile(store.vocabulary_path, p)),
            ("config.yaml", lambda p: save_config(config, p)),
        ):
            temporary = directory / f".{name}.tmp"
            write(temporary)
            os.replace(temporary, directory / name)
        return ModelDirectory.open(directory)


def _flat(config: Config) -> dict[str, object]:
    return {f"{section}.{key}": value for section, part in to_dict(config).items() for key, value in part.items()}
