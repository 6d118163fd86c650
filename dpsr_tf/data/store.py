"""A store: one directory with the three files of DPSR section 5.1.2, vocabularies, and a manifest.

    manifest.json             format version, counts, fingerprints of the files, features, the schema, a checksum
    vocabulary.dpsr           tokens and the tokenizer's config (dpsr_tokenizer.Vocabulary)
    vocabulary-NAME.dpsr      the same for text features with a vocabulary of their own
    users.dpsr                user ids, features, and the events of each user
    items.dpsr                item ids, popularity, token ids, features
    interactions.dpsr         queries, positive pairs, impressions, supervised negatives; or one file per shard
    held_out.dpsr             positive pairs kept out of training, if the schema names any
    titles.dpsr               item titles, for people and for title queries; the other texts that the towers read; what
                              only `dpsr search` reads: further texts, identifiers, groups of variants
    filters.dpsr              attributes that searches filter items by, if the schema names any; training never reads it

With a section `ranking` in the schema also (dpsr_tf/data/request_log.py):

    requests.dpsr             whole requests, with counts as of each; or one file per shard
    held_requests.dpsr        requests kept out of training, if the schema names any
    statistics.dpsr           counts as of the end of the log
    numbers.dpsr              numeric features of items and users as numbers

With a section `graph` also (dpsr_tf/data/click_graph.py):

    graph.dpsr                the edges between queries, items and attributes; or one file per shard

With a section `rewriting` also (dpsr_tf/data/query_pairs.py):

    vocabulary.words.dpsr     words and characters, for sequences
    sequences.dpsr            the words of each title in their order
    rewriting.dpsr            the words of each query, clicks, and pairs of queries; or one file per shard

dpsr_tf/ops/training_store.h and docs/data_format.md describe the layout of each file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.packed_file import FormatError, PackedFile
from dpsr_common.typed_config import from_dict
from dpsr_tf.data.schema import Schema
from dpsr_tokenizer import Vocabulary

FORMAT = "dpsr-store"
FORMAT_VERSION = 3
# The vocabulary of sequences. No vocabulary of a text feature can have this name.
WORDS = "vocabulary.words.dpsr"


@dataclasses.dataclass(frozen=True)
class Counts:
    """The number of rows of each table."""

    users: int  # including the anonymous user, row 0
    items: int
    queries: int
    positives: int
    impressions: int  # unclicked impressions in requests with a positive pair
    negatives: int
    events: int
    held_out: int
    rejected: int  # unusable rows of all input tables


@dataclasses.dataclass(frozen=True)
class StoredFeature:
    """One feature of the schema, as a store holds it."""

    name: str
    kind: str
    # The highest code; None for kind text; for kind vector, its length. Code 0 is unknown, so an embedding table has
    # one row more.
    num_values: int | None = None
    # For kind number: the bounds of the buckets.
    boundaries: tuple[float, ...] = ()
    # For kind text: the name of the vocabulary; None is that of the item text.
    vocabulary: str | None = None


@dataclasses.dataclass(frozen=True)
class Features:
    """The features of both tables, in the order of the schema."""

    items: tuple[StoredFeature, ...] = ()
    users: tuple[StoredFeature, ...] = ()


class Store:
    """An open store, whose files have been checked against its manifest.

    A section of a file is verified when it is first read from the opened file. CommandError says that it is damaged.

    Attributes:
        path: the directory.
        manifest: the content of manifest.json.
        counts: the number of rows of each table.
        schema: the schema that the store was made with.
        features: the features of items and users.
        vocabulary: the vocabulary of query and item text.
        vocabularies: the vocabularies of text features, by name.
    """

    def __init__(self, path: str | Path, has: Callable[[str], bool] | None = None):
        """Opens a store.

        Args:
            path: its directory.
            has: tells from its name whether a file is there; None: all are. The vocabularies must be there. A method
                that opens a file which is not there raises CommandError.

        Raises:
            CommandError: there is no complete store of this version.
        """
        self.path = Path(path)
        manifest_path = self.path / "manifest.json"
        self.manifest = read_manifest(manifest_path, FORMAT, FORMAT_VERSION, "dpsr ingest")
        if self.manifest.get("checksum") != manifest_checksum(self.manifest):
            raise CommandError(f"{manifest_path}: its checksum differs, so the file was changed; ingest the log again")
        try:
            self.counts = from_dict(Counts, self.manifest["counts"], "counts")
            self.features = from_dict(Features, self.manifest["features"], "features")
            self.schema = from_dict(Schema, self.manifest["schema"], "schema", check=False)
            fingerprints = {name: self.manifest["files"][name] for name in file_names(self.schema, self._shards)}
        except (KeyError, TypeError, UsageError) as error:
            raise CommandError(
                f"{manifest_path}: counts, files, features or schema are missing or malformed ({error}); "
                f"ingest the log again"
            ) from None
        for name, fingerprint in fingerprints.items():
            if has is not None and not has(name):
                continue
            # This reads the header and the section table only. Data are checked when they are read.
            found = f"{self._open(name).fingerprint:016x}"
            if found != fingerprint:
                raise CommandError(
                    f"{self.path / name}: is not the file this store was made with (its fingerprint is {found}, "
                    f"the manifest says {fingerprint}); ingest the log again"
                )
        try:
            self.vocabulary = Vocabulary(str(self.vocabulary_path))
            self.vocabularies = {
                name: Vocabulary(str(self.path / vocabulary_name(name))) for name in self.schema.vocabularies
            }
        except (FormatError, FileNotFoundError) as error:
            raise CommandError(f"{error}; ingest the log again") from None

    @property
    def vocabulary_path(self) -> Path:
        """The vocabulary file of query and item text."""
        return self.path / vocabulary_name()

    @property
    def users_path(self) -> Path:
        """The user file."""
        return self.path / "users.dpsr"

    @property
    def items_path(self) -> Path:
        """The item file."""
        return self.path / "items.dpsr"

    @property
    def interactions_paths(self) -> list[Path]:
        """The interaction files, one per shard."""
        return [self.path / name for name in interactions_names(self._shards)]

    def items(self) -> PackedFile:
        """Opens the items: sections `id`, `id_index.*`, `popularity`, `tokens.*`, `feature.*`, `values.*`, [`key.*`].

        The sections `key.*` exist only if the ids are text.
        """
        return self._open("items.dpsr")

    def users(self) -> PackedFile:
        """Opens the users: sections `id`, `id_index.*`, `feature.*`, `values.*`, `event.*`, [`key.*`].

        Row 0 is the anonymous user. The sections `key.*` exist only if the ids are text.
        """
        return self._open("users.dpsr")

    def interactions(self) -> list[PackedFile]:
        """Opens all shards: sections `query.*`, `query_text.*`, `positive.*`, `impression.*`, `negative.*`."""
        return [self._open(path.name) for path in self.interactions_paths]

    def held_out(self) -> PackedFile | None:
        """Opens the held-out pairs: sections `query`, `user`, `item`, `time`, `type`, [`weight`]; None without them.

        `query` is the row of the query among those of all shards.
        """
        return self._open("held_out.dpsr") if _holds_out(self.schema) else None

    def requests(self) -> list[PackedFile]:
        """Opens the requests of all shards; [] if the schema has no section `ranking`.

        Sections `query.*`, `query_text.*`, `request.*`, `shown.*`, `stat.*`, `all.*`, [`spend.*`].
        """
        return [self._open(name) for name in requests_names(self._shards)] if self.schema.ranking else []

    def held_requests(self) -> PackedFile | None:
        """Opens the requests that are kept out of training, with the sections of `requests`; None without them."""
        return self._open("held_requests.dpsr") if self.schema.ranking and _holds_out(self.schema) else None

    def statistics(self) -> PackedFile | None:
        """Opens the counts as of the end of the log; None if the schema has no section `ranking`."""
        return self._open("statistics.dpsr") if self.schema.ranking else None

    def numbers(self) -> PackedFile | None:
        """Opens the numeric features: sections `item.*`, `user.*`; None if the schema has no section `ranking`."""
        return self._open("numbers.dpsr") if self.schema.ranking else None

    def graph(self) -> list[PackedFile]:
        """Opens the click graph of all shards: sections `query.*`, `item.*`, in the first one `value.*`.

        [] if the schema has no section `graph`.
        """
        return [self._open(name) for name in graph_names(self._shards)] if self.schema.graph else []

    @property
    def words_path(self) -> Path:
        """The vocabulary file of words and characters; only a store with a section `rewriting` has it."""
        return self.path / WORDS

    def sequences(self) -> PackedFile | None:
        """Opens the words of the titles: sections `title.*`; None if the schema has no section `rewriting`."""
        return self._open("sequences.dpsr") if self.schema.rewriting else None

    def rewriting(self) -> list[PackedFile]:
        """Opens queries, clicks and pairs of queries of all shards; [] if the schema has no section `rewriting`.

        Sections `query_text.*`, `query.*`, `click.*`, `pair.*`.
        """
        return [self._open(name) for name in rewriting_names(self._shards)] if self.schema.rewriting else []

    def titles(self) -> list[str]:
        """Returns the title of each item, in the order of the item file."""
        return unpack_strings(self.packed_texts(), "title")

    def packed_texts(self) -> PackedFile:
        """Opens the texts of the items: sections `title.*`, [`text0.*`, ...], [`searched0.*`, ...].

        See ItemsSchema.text_names and ItemsSchema.search_names.
        """
        return self._open("titles.dpsr")

    def texts(self) -> dict[str, list[str]]:
        """Returns the texts of each item that the towers read: column of `items.text` -> one text per item."""
        file = self.packed_texts()
        return {column: unpack_strings(file, name) for column, name in self.schema.items.text_names.items()}

    def filters(self) -> PackedFile | None:
        """Opens the filters: sections `filter.*`, `values.*`. None if the schema has no filters."""
        return self._open("filters.dpsr") if self.schema.items.filters else None

    def queries(self) -> Iterator[str]:
        """Yields the text of each query, one shard after the other."""
        for file in self.interactions():
            yield from unpack_strings(file, "query_text")

    def item_keys(self) -> list[str] | None:
        """Returns the shop's own text id of each item; None where its ids are numbers."""
        items = self.items()
        return unpack_strings(items, "key") if "key.splits" in items else None

    @property
    def _shards(self) -> int:
        shards = self.manifest["shards"]
        if not isinstance(shards, int):
            raise TypeError(f"shards is {shards!r}")
        return shards

    def _open(self, name: str) -> PackedFile:
        try:
            return _StoreFile(self.path / name, re.split("[-.]", name)[0])
        except (FormatError, OSError) as error:
            raise CommandError(f"{error}; ingest the log again") from None


class _StoreFile(PackedFile):
    """A file of a store. A section is verified when it is first read, as not every process reads all of a large file.

    Reading a damaged section raises CommandError.
    """

    def __init__(self, path: Path, kind: str):
        """Opens a file. Raises FormatError or OSError if it is not a whole file of this kind."""
        super().__init__(path, kind, verify=False)
        self._verified: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a section as an array. Raises KeyError if the file lacks the section."""
        if name not in self._verified:
            try:
                self.verify(name)
            except FormatError as error:
                raise CommandError(f"{error}; ingest the log again") from None
            self._verified.add(name)
        return super().__getitem__(name)


def vocabulary_name(name: str | None = None) -> str:
    """Returns the file name of a vocabulary; None is the vocabulary of query and item text."""
    return f"vocabulary-{name}.dpsr" if name else "vocabulary.dpsr"


def interactions_names(shards: int) -> list[str]:
    """Returns the file names of the interactions, one per shard."""
    return _sharded("interactions", shards)


def requests_names(shards: int) -> list[str]:
    """Returns the file names of the requests for training, one per shard."""
    return _sharded("requests", shards)


def graph_names(shards: int) -> list[str]:
    """Returns the file names of the click graph, one per shard."""
    return _sharded("graph", shards)


def rewriting_names(shards: int) -> list[str]:
    """Returns the file names of queries and their pairs for a rewriter, one per shard."""
    return _sharded("rewriting", shards)


def _sharded(kind: str, shards: int) -> list[str]:
    if shards == 1:
        return [f"{kind}.dpsr"]
    return [f"{kind}-{shard:05}-of-{shards:05}.dpsr" for shard in range(shards)]


def file_names(schema: Schema, shards: int) -> list[str]:
    """Returns the names of all packed files of a store."""
    held_out = ["held_out.dpsr"] if _holds_out(schema) else []
    vocabularies = [vocabulary_name(name) for name in (None, *schema.vocabularies)]
    filters = ["filters.dpsr"] if schema.items.filters else []
    names = [*vocabularies, "users.dpsr", "items.dpsr", *interactions_names(shards), *held_out, "titles.dpsr", *filters]
    if schema.graph is not None:
        names += graph_names(shards)
    if schema.rewriting is not None:
        names += [WORDS, "sequences.dpsr", *rewriting_names(shards)]
    if schema.ranking is None:
        return names
    held_requests = ["held_requests.dpsr"] if held_out else []
    return [*names, *requests_names(shards), *held_requests, "statistics.dpsr", "numbers.dpsr"]


def _holds_out(schema: Schema) -> bool:
    return schema.interactions is not None and schema.interactions.held_out is not None


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Returns the SHA-256 of a manifest without its checksum, in hex."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def pack_strings(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the row splits int64 [n + 1] and UTF-8 bytes uint8 [total] of a list of texts."""
    encoded = [text.encode() for text in texts]
    splits = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(text) for text in encoded], out=splits[1:])
    return splits, np.frombuffer(b"".join(encoded), np.uint8)


def unpack_strings(file: PackedFile, name: str) -> list[str]:
    """Reads texts from the sections `<name>.splits` and `<name>.bytes`; the inverse of pack_strings."""
    splits, data = file[f"{name}.splits"], file[f"{name}.bytes"].tobytes()
    return [data[begin:end].decode() for begin, end in itertools.pairwise(splits)]


def read_manifest(path: Path, format_name: str, version: int, made_by: str) -> dict[str, Any]:
    """Reads the JSON object in a manifest file. Raises CommandError if it is not of this format and version."""
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        what = format_name.removeprefix("dpsr-")
        raise CommandError(f"{path.parent}: holds no {what} (no {path.name}); make one with `{made_by}`") from None
    except (OSError, ValueError) as error:
        raise CommandError(f"{path}: cannot be read: {error}; run `{made_by}` again") from None
    if not isinstance(manifest, dict):
        raise CommandError(f"{path}: holds a {type(manifest).__name__}, expected a JSON object; run `{made_by}` again")
    got = (manifest.get("format"), manifest.get("version"))
    if got != (format_name, version):
        raise CommandError(
            f"{path}: is of {got[0]} version {got[1]}, expected {format_name} version {version}; run `{made_by}` again"
        )
    return manifest


@contextmanager
def new_directory(path: Path, overwrite: bool = False, what: str = "", mark: str = "") -> Iterator[Path]:
    """Makes a directory that appears at `path` only when the block ends without an exception.

    Until then it is a temporary directory beside `path`, which an exception removes. Temporary directories that a
    killed process has left there are removed first.

    Args:
        path: the directory to make.
        overwrite: whether to replace an existing directory of the same kind.
        what: the kind, for error messages: "store".
        mark: the file by which a directory of that kind is recognised.

    Yields:
        The temporary directory.

    Raises:
        CommandError: `path` exists and may not be replaced, or cannot be made.
    """
    given, path = path, path.resolve()
    if not path.name:
        raise CommandError(f"{given}: is the root of the file system; choose another --out")
    try:
        _clean_up(path)
    except OSError as error:
        raise CommandError(f"{given}: the files that a killed run left beside it cannot be removed: {error}") from None
    if path.exists():
        if not overwrite:
            replace = ", or give --overwrite to replace it" if mark else ""
            raise CommandError(f"{given}: exists already; choose another --out{replace}")
        check_replaceable(given, what, mark)
    parents = [parent for parent in path.parents if not parent.exists()]
    temporary, old, locks = None, None, []
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}{_UNFINISHED}", dir=path.parent))
            locks.append(_lock(temporary))
        except OSError as error:
            raise CommandError(f"{given}: cannot be made: {error.strerror}") from None
        yield temporary
        # mkdtemp gives no rights to other users.
        os.chmod(temporary, 0o755)
        if path.exists() and not overwrite:
            raise CommandError(f"{given}: was made by another process meanwhile; choose another --out")
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}{_REPLACED}", dir=path.parent))
            locks.append(_lock(old))
            os.rename(path, old / "old")
            os.rename(temporary, path)
            shutil.rmtree(old)
        else:
            os.rename(temporary, path)
    except BaseException:
        if old is not None:
            with contextlib.suppress(OSError):  # the next run tries again
                _discard(old, path)
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise
    finally:
        for lock in locks:
            os.close(lock)


# The names of temporary directories beside `path`: .NAME, one of these, and 8 characters of mkdtemp.
_UNFINISHED, _REPLACED = ".unfinished-", ".replaced-"


def _lock(directory: Path) -> int:
    """Locks a directory until the returned descriptor is closed. Raises OSError if another process holds the lock."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _clean_up(path: Path) -> None:
    """Removes the directories that new_directory(path) left beside `path` when its process was killed."""
    if not path.parent.is_dir():
        return
    names = re.compile(rf"\.{re.escape(path.name)}({re.escape(_UNFINISHED)}|{re.escape(_REPLACED)})\w{{8}}")
    for left in [entry for entry in path.parent.iterdir() if names.fullmatch(entry.name)]:
        try:
            lock = _lock(left)
        except OSError:
            # The process that makes this directory is still running.
            continue
        try:
            _discard(left, path)
        finally:
            os.close(lock)


def _discard(left: Path, path: Path) -> None:
    """Removes a directory that new_directory(path) made beside `path`. Raises OSError."""
    if _REPLACED in left.name and (left / "old").exists() and not path.exists():
        # The process was stopped between its two renames: the old directory comes back.
        os.rename(left / "old", path)
    shutil.rmtree(left)


def check_replaceable(path: Path, what: str, mark: str) -> None:
    """Raises CommandError unless `path` holds the file `mark`: --overwrite replaces only what this package has made."""
    if not (path / mark).is_file():
        raise CommandError(
            f"{path}: exists and does not hold a {what} (no {mark}), so --overwrite does not replace it; "
            f"remove it yourself, or choose another --out"
        )


class RowsById:
    """Finds rows by id, for ids in any order."""

    def __init__(self, item_ids: np.ndarray):
        """Builds the index of `item_ids`, int64 [items], distinct."""
        self._order = np.argsort(item_ids, kind="stable")
        self._ids = np.asarray(item_ids)[self._order]

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Returns the rows of `ids`, int64 of the same shape; -1 where an id is unknown."""
        if not len(self._ids):
            return np.full(ids.shape, -1, np.int64)
        places = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        return np.where(self._ids[places] == ids, self._order[places], -1)
