"""A warm start: a training that begins with the weights of another model, `dpsr train --warm_start=MODEL`.

The new store has another vocabulary and other codes of features. So rows of embedding tables are matched by what they
stand for: the text of a token, the text of a categorical value, the same bucket of unknown tokens. All other variables
are matched by name and shape. What has no match starts as usual.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorflow as tf

from dpsr_common.errors import CommandError, UsageError, op_message
from dpsr_tf.config import Config, ModelConfig
from dpsr_tf.data.code_book import CodeBook
from dpsr_tf.models.embedding import name_in_checkpoint, rows_of
from dpsr_tf.models.features import CODED_KINDS, Feature, FeatureSpec
from dpsr_tf.models.graph_encoder import VALUES
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.two_tower import TwoTower
from dpsr_tokenizer import Vocabulary

v1 = tf.compat.v1

SUMS = ("keep", "reset")
_AVERAGE = "/ExponentialMovingAverage"
_SIDES = {"user": "users", "item": "items"}
# Rows that are sent to a table at once.
_CHUNK = 1 << 15


@dataclasses.dataclass(frozen=True)
class _Match:
    """The rows of a new table in the old one."""

    rows: np.ndarray  # int64 [new rows], the row of the old table; -1 for none
    found: int  # tokens or values that the old model has
    total: int  # tokens or values of the new table, without buckets and unknown values


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """The model whose weights a training begins with.

    It begins with what the old model serves: the averages of its weights, if it was trained with `average_decay`. The
    averages of the new training begin there too.

    Attributes:
        model: the old model.
        checkpoint: its last checkpoint.
        keeps_sums: whether AdaGrad's sums, and the state of other optimizers, come from the old model too.
    """

    model: ModelDirectory
    checkpoint: str
    keeps_sums: bool

    @staticmethod
    def open(path: str | Path, config: Config, sums: str) -> WarmStart:
        """Opens the model at `path` for a training with `config`; `sums` is one of SUMS.

        Raises:
            CommandError: there is no model or no trained checkpoint.
            UsageError: its embeddings have another width.
        """
        model = ModelDirectory.open(path, "retrieval")
        CodeBook.read(model.path)  # fails here, before anything is written
        for key in ("token_dim", "feature_dim"):
            was, now = getattr(model.config.model, key), getattr(config.model, key)
            if was != now:
                raise UsageError(
                    f"--warm_start={path}: the model has model.{key} {was}, and the config has {now}, expected the "
                    f"same width; change the config, or train without --warm_start"
                )
        return WarmStart(model, model.last_checkpoint(), sums == "keep")

    def init_fn(
        self, new: ModelDirectory, towers: TwoTower
    ) -> Callable[[tf.compat.v1.train.Scaffold, tf.compat.v1.Session], None]:
        """Adds the ops that load weights to the graph. Returns the `init_fn` of a Scaffold, which runs them.

        TensorFlow calls it in the chief, after the variables have their start values, and only if there is no
        checkpoint to resume from. It reads the old model variable by variable, so it needs memory for the largest of
        them, and sends rows in chunks.

        Args:
            new: the model to train.
            towers: its towers; all variables of the graph must exist.
        """
        loaders = [_Loader(variable) for variable in v1.global_variables() if variable.dtype.is_floating]

        def load(scaffold: tf.compat.v1.train.Scaffold, session: tf.compat.v1.Session) -> None:
            try:
                reader = tf.train.load_checkpoint(self.checkpoint)
                print(
                    self._load(reader, loaders, _matches(self.model, new, list(towers.tables)), new, session),
                    flush=True,
                )
            except (tf.errors.OpError, ValueError) as error:
                raise CommandError(
                    f"--warm_start={self.model.path}: {self.checkpoint} cannot be read: {op_message(error)}"
                ) from None

        return load

    def _load(
        self,
        reader: tf.train.CheckpointReader,
        loaders: Sequence[_Loader],
        matches: dict[str, _Match],
        new: ModelDirectory,
        session: tf.compat.v1.Session,
    ) -> str:
        """Loads all variables. Returns the line that says what was taken over."""
        trained = {loader.name for loader in loaders if loader.is_trained}
        skipped_widths = _changed_inputs(self.model, new)
        shapes = reader.get_variable_to_shape_map()
        layers = trained - matches.keys()
        taken = set()
        # Pieces of a table stand together, so that each variable of the old model is read once.
        source, values = None, np.zeros(0)
        for loader in sorted(loaders, key=lambda loader: loader.name):
            base, name = _sources(loader.name, trained, reader, self.keeps_sums)
            if name is None or name not in shapes:
                continue
            match = matches.get(base)
            if match is None and (
                loader.shape != shapes[name] or (base in layers and loader.shape[0] in skipped_widths)
            ):
                continue
            if name != source:
                source, values = name, reader.get_tensor(name)
            loader.load(session, values, None if match is None else match.rows)
            taken.add(loader.name)
        tokens, coded = (
            [match for name, match in matches.items() if ("token_embedding" in name) == is_text]
            for is_text in (True, False)
        )
        parts = [f"{sum(m.found for m in tokens):,} of {sum(m.total for m in tokens):,} tokens"]
        if coded:
            parts.append(f"{sum(m.found for m in coded):,} of {sum(m.total for m in coded):,} feature values")
        parts.append(f"{len(layers & taken)} of {len(layers)} weights of layers")
        sums = "kept" if self.keeps_sums else "reset"
        return f"warm start from {self.checkpoint}: {', '.join(parts)}; sums of the optimizer {sums}"


class _Loader:
    """Assigns a variable, or some of its rows.

    Attributes:
        name: the name in a checkpoint; pieces of a table have the same.
        shape: shape of the variable.
        is_trained: whether it is a weight.
    """

    def __init__(self, variable: tf.Variable):
        self.name = name_in_checkpoint(variable)
        self.shape = variable.shape.as_list()
        self.is_trained = any(variable is other for other in v1.trainable_variables())
        with tf.device(variable.device):
            self._value = v1.placeholder(variable.dtype, variable.shape)
            self._assign = v1.assign(variable, self._value, name="warm_start").op
            if len(self.shape) == 2:
                self._ranges = rows_of(variable)
                self._rows = v1.placeholder(tf.int64, [None])
                self._values = v1.placeholder(variable.dtype, [None, self.shape[1]])
                self._update = tf.raw_ops.ResourceScatterUpdate(
                    resource=variable.handle, indices=self._rows, updates=self._values
                )

    def load(self, session: tf.compat.v1.Session, old: np.ndarray, rows: np.ndarray | None) -> None:
        """Assigns the old value; with `rows`, the rows of a table that have one there."""
        if rows is None:
            session.run(self._assign, {self._value: old})
            return
        mine = np.concatenate([rows[begin:end] for begin, end in self._ranges])
        known = np.flatnonzero(mine >= 0)
        for begin in range(0, len(known), _CHUNK):
            chunk = known[begin : begin + _CHUNK]
            session.run(self._update, {self._rows: chunk, self._values: old[mine[chunk]]})


def _sources(name: str, trained: set[str], reader: tf.train.CheckpointReader, sums: bool) -> tuple[str, str | None]:
    """Returns the weight that a variable belongs to, and the old variable that it starts from; None for none.

    Variables that are neither weights, averages of weights nor an optimizer's state, such as the state of a layer of
    the user's own, start from the variable of the same name.
    """
    owner = name.rpartition("/")[0]
    if name in trained or (name.endswith(_AVERAGE) and owner in trained):
        weight = name.removesuffix(_AVERAGE)
        return weight, weight + _AVERAGE if reader.has_tensor(weight + _AVERAGE) else weight
    is_state = owner in trained or name in ("beta1_power", "beta2_power")
    return owner if owner in trained else name, name if sums or not is_state else None


def _matches(old: ModelDirectory, new: ModelDirectory, tables: Sequence[str]) -> dict[str, _Match]:
    """Returns where the rows of each embedding table of the new model are in the old model's table of that name."""
    before, now = CodeBook.read(old.path), CodeBook.read(new.path)
    found = {}
    for table in tables:
        if table == VALUES:
            found[table] = _match_codes("item", old.features.graph, new.features.graph, before, now)
        elif table.endswith("_feature_embedding"):
            side = table.removesuffix("_feature_embedding")
            found[table] = _match_codes(side, getattr(old.features, side), getattr(new.features, side), before, now)
        else:
            vocabulary = table.partition("token_embedding_")[2] or None
            found[table] = _match_tokens(before.vocabulary(vocabulary), now.vocabulary(vocabulary))
    return found


def _match_tokens(old: Path | None, new: Path | None) -> _Match:
    before, now = (None if path is None else Vocabulary(str(path)) for path in (old, new))
    if now is None:
        raise CommandError("the new model has no such vocabulary")
    rows = np.full(now.num_ids, -1)
    if before is not None:
        known = pa.array(before.token(row) for row in range(len(before)))
        for begin in range(0, len(now), _CHUNK):
            end = min(begin + _CHUNK, len(now))
            rows[begin:end] = _places(pa.array(now.token(row) for row in range(begin, end)), known)
        if before.num_oov_buckets == now.num_oov_buckets:
            rows[len(now) :] = np.arange(len(before), before.num_ids)
    return _Match(rows, int((rows[: len(now)] >= 0).sum()), len(now))


def _match_codes(side: str, old: Sequence[Feature], new: Sequence[Feature], before: CodeBook, now: CodeBook) -> _Match:
    """Matches the codes of all features of a side, which share a table."""
    table = _SIDES[side]
    offsets = dict(_offsets(old))
    stored = [{feature.name: feature for feature in getattr(book.features, table)} for book in (before, now)]
    rows = np.full(sum(feature.num_ids for feature in new if feature.kind in CODED_KINDS), -1)
    found = total = 0
    for feature, first in _offsets(new):
        total += feature.num_ids - 1
        was = next((f for f in offsets if (f.name, f.kind) == (feature.name, feature.kind)), None)
        if was is None:
            continue
        values, old_values = now.values(table, feature.name), before.values(table, feature.name)
        places = np.full(feature.num_ids - 1, -1)
        if values is not None and old_values is not None:
            places = _places(pa.array(values, pa.string()), pa.array(old_values, pa.string()))
        elif stored[0][feature.name] == stored[1][feature.name]:
            places = np.arange(feature.num_ids - 1)  # the same buckets of a number
        # Code 0 is the unknown value, so value i has code i + 1.
        rows[first] = offsets[was]
        rows[first + 1 : first + feature.num_ids] = np.where(places >= 0, offsets[was] + 1 + places, -1)
        found += int((places >= 0).sum())
    return _Match(rows, found, total)


def _offsets(features: Sequence[Feature]) -> Iterator[tuple[Feature, int]]:
    """Yields each coded feature with its first row in the table of its side."""
    first = 0
    for feature in features:
        if feature.kind in CODED_KINDS:
            yield feature, first
            first += feature.num_ids


def _places(texts: pa.Array, known: pa.Array) -> np.ndarray:
    """Returns where each text stands in `known`, int64 [texts]; -1 if it does not."""
    return pc.fill_null(pc.index_in(texts, value_set=known), -1).to_numpy(zero_copy_only=False).astype(np.int64)


def _changed_inputs(old: ModelDirectory, new: ModelDirectory) -> set[int]:
    """Returns the widths of input layers whose parts have changed their order. Kernels of that width are not taken."""
    sides = [(getattr(old.features, side), getattr(new.features, side)) for side in _SIDES]
    changed = [[(f.name, f.kind) for f in was] != [(f.name, f.kind) for f in now] for was, now in sides]
    item = _input_width(new.features, new.config.model, "item")
    query = _input_width(new.features, new.config.model, "user")
    config = new.config.model
    query += item if config.history_length else 0
    query += config.token_dim if config.query_history_length else 0
    widths = {item} if changed[1] else set()
    return widths | ({query} if changed[0] or (changed[1] and config.history_length) else set())


def _input_width(features: FeatureSpec, config: ModelConfig, side: str) -> int:
    widths = {"text": config.token_dim, **dict.fromkeys(CODED_KINDS, config.feature_dim)}
    chosen: Sequence[Feature] = getattr(features, side)
    return config.token_dim + sum(widths.get(feature.kind, feature.num_ids) for feature in chosen)
