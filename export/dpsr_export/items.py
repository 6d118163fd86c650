"""`dpsr items`: adds, updates and deletes items of a servable within seconds."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.files import write_text
from dpsr_export.item_changes import Changes
from dpsr_export.item_rows import Reject, ServableItems, changes_offsets, collect, describe_rejects, tables

USAGE = """
Usage: dpsr items add --servable=BASE TABLE...
       dpsr items update --servable=BASE TABLE...
       dpsr items delete --servable=BASE TABLE... | --ids=ID,ID,...
       dpsr items watch --servable=BASE --dir=DIR
       dpsr items status --servable=BASE
       dpsr items trim --servable=BASE --before=OFFSET
       dpsr items follow --server=HOST:PORT --model=NAME

Writes changes of items to the log of a servable, BASE/item_changes. Servers that hold the servable apply them within
seconds, and every version that is loaded later applies them before it is ready. docs/fresh_items.md has more.

add      adds whole items, or replaces items with the same id. Tables have the columns of the schema's items
update   changes attributes that searches filter by, such as price and stock. Tables have the id and these columns
delete   deletes items by their ids
watch    takes the files that appear in DIR: add-*, update-* and delete-*, for example update-0017.csv. Move a file
         there when it is complete. It goes on to DIR/done or, with the reason in NAME.error, to DIR/failed
status   prints what the log holds
trim     removes the changes before OFFSET. Do this when the index of every version that is served, or may be served
         again, has them
follow   makes TensorFlow Serving apply changes, by calls. `dpsr serve` needs no calls

Changes are on the disk when the command prints their offsets. If a row cannot be used, no row is written.
"""

TAKES_ARGUMENTS = True

# Seconds between two looks into a watched directory.
_WATCH_S = 0.2


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `dpsr items`."""
    flags.DEFINE_string(
        "servable",
        None,
        "base path of the servable: the directory that `dpsr export --out` wrote, also with shards",
        flag_values=values,
    )
    flags.DEFINE_list("ids", None, "for delete, ids of the items to delete", flag_values=values)
    flags.DEFINE_string(
        "version_column",
        None,
        "column with a number that rises with every change of an item. Changes that arrive late, with a lower number "
        "than the item's last one, are then ignored",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "skip_bad", False, "leave out the rows that cannot be used, and write the others", flag_values=values
    )
    flags.DEFINE_string("dir", None, "for watch, directory in which files with changes appear", flag_values=values)
    flags.DEFINE_integer("before", None, "for trim, offset of the first change that stays", 0, flag_values=values)
    flags.DEFINE_string("server", None, "for follow, HOST:PORT of the server's gRPC API", flag_values=values)
    flags.DEFINE_string("model", None, "for follow, name of the model", flag_values=values)
    flags.DEFINE_float(
        "interval_s", 0.1, "for follow, seconds between two calls when nothing is new", 0.001, flag_values=values
    )
    flags.DEFINE_boolean("once", False, "for follow, stop as soon as nothing is new", flag_values=values)


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr items`."""
    actions: dict[str, tuple[Callable[[flags.FlagValues, list[str]], None], tuple[str, ...], str | None]] = {
        # Action -> function, flags that it needs, and the arguments that it takes.
        "add": (_write, ("servable",), "TABLE"),
        "update": (_write, ("servable",), "TABLE"),
        "delete": (_write, ("servable",), "TABLE"),
        "watch": (_watch, ("servable", "dir"), None),
        "status": (_status, ("servable",), None),
        "trim": (_trim, ("servable", "before"), None),
        "follow": (_follow, ("server", "model"), None),
    }
    action = arguments[0] if arguments else ""
    if action not in actions:
        given = f"no action '{action}'" if action else "the action is missing"
        raise UsageError(f"{given}, expected one of: {', '.join(actions)}; see `dpsr items --help`")
    function, needed, takes = actions[action]
    for name in needed:
        if values[name].value is None:
            raise UsageError(f"--{name} is missing ({values[name].help}); `dpsr items {action}` needs it")
    if takes is None and arguments[1:]:
        raise UsageError(f"unexpected argument '{arguments[1]}'; see `dpsr items --help`")
    function(values, arguments)


def _write(values: flags.FlagValues, arguments: list[str]) -> None:
    action, *patterns = arguments
    if values.ids is not None and (action != "delete" or patterns):
        raise UsageError(f"--ids={','.join(values.ids)}: is for `dpsr items delete` without a table")
    if not patterns and values.ids is None:
        raise UsageError(f"the table is missing; give `dpsr items {action}` a file, a directory or a glob pattern")
    items = ServableItems(Path(values.servable))
    changes: Changes | None
    if values.ids is not None:
        changes, rejects = items.delete_rows(values.ids)
    else:
        changes, rejects = collect(_read(items, action, tables(patterns), values.version_column))
    print(_append(items, changes, rejects, values.skip_bad), flush=True)


def _read(
    items: ServableItems, action: str, files: Sequence[Path], version: str | None
) -> Iterator[tuple[Changes, list[Reject]]]:
    readers = {"add": items.put_tables, "update": items.update_tables, "delete": items.delete_tables}
    return readers[action](files, version)


def _append(items: ServableItems, changes: Changes | None, rejects: Sequence[Reject], skip_bad: bool) -> str:
    """Writes changes. Returns a line for people. Raises CommandError if rows cannot be used."""
    if rejects and not skip_bad:
        raise CommandError(
            f"{describe_rejects(rejects)}; nothing was written; correct the rows, or give --skip_bad to leave them out"
        )
    if changes is None or not len(changes):
        raise CommandError(f"no row can be used; {describe_rejects(rejects)}" if rejects else "the tables have no rows")
    first, end = items.log.append(changes)
    left_out = f"; left out {describe_rejects(rejects)}" if rejects else ""
    return f"{items.log.path}: {end - first:,} changes, offsets {first} to {end - 1}{left_out}"


def _status(values: flags.FlagValues, arguments: list[str]) -> None:
    items = ServableItems(Path(values.servable))
    status = items.log.status()
    print(f"log              {items.log.path}")
    print(f"newest version   {items.version}, whose index has the changes before {items.changes_offset}")
    if status.last_time is None:
        print("changes          none")
        return
    last = datetime.datetime.fromtimestamp(status.last_time, datetime.timezone.utc)
    print(f"changes          offsets {status.first} to {status.end - 1}, {status.end - status.first:,} in all")
    print(f"to apply         {max(0, status.end - items.changes_offset):,} when that version is loaded")
    print(f"files            {status.segments:,}, {status.size:,} bytes")
    print(f"last change      {last:%Y-%m-%dT%H:%M:%SZ}, {max(0.0, time.time() - status.last_time):.0f} s ago")


def _trim(values: flags.FlagValues, arguments: list[str]) -> None:
    items = ServableItems(Path(values.servable))
    if values.before > items.changes_offset:
        raise UsageError(
            f"--before={values.before}: the index of the newest version, {items.version}, has only the changes before "
            f"{items.changes_offset}, so that a server could not load it any more; run `dpsr index --merge` first"
        )
    for path, offset in changes_offsets(Path(values.servable)):
        if values.before > offset:
            raise UsageError(
                f"--before={values.before}: {path} needs the changes from {offset} on; remove this version if it will "
                f"not be served again, or give --before={offset}"
            )
    removed = items.log.trim(values.before)
    status = items.log.status()
    print(
        f"{items.log.path}: removed {removed:,} changes; the log now begins at {status.first} and ends at {status.end}"
    )


# Watching a directory.


def _watch(values: flags.FlagValues, arguments: list[str]) -> None:
    directory = Path(values.dir)
    done, failed = directory / "done", directory / "failed"
    ServableItems(Path(values.servable))  # fails at once if there is no servable
    try:
        for folder in (done, failed):
            folder.mkdir(exist_ok=True)
    except OSError as error:
        raise CommandError(f"--dir={directory}: cannot be written: {error.strerror}") from None
    with _stopped() as stop:
        print(f"watching {directory}", flush=True)
        while True:
            for path in _appeared(directory):
                _take_file(values, path, done, failed)
            if stop.wait(_WATCH_S):
                return


def _appeared(directory: Path) -> list[Path]:
    """Returns the files in a directory, the oldest first. Files that begin with a dot are still being written."""
    with os.scandir(directory) as entries:
        found = [(entry.stat().st_mtime_ns, entry.name) for entry in entries if entry.is_file()]
    return [directory / name for _, name in sorted(found) if not name.startswith(".")]


def _take_file(values: flags.FlagValues, path: Path, done: Path, failed: Path) -> None:
    action = path.name.partition("-")[0]
    try:
        if action not in ("add", "update", "delete"):
            raise UsageError(f"{path.name}: expected a name that begins with add-, update- or delete-")
        # Read anew for each file, because a new version may have a new schema.
        items = ServableItems(Path(values.servable))
        changes, rejects = collect(_read(items, action, tables([str(path)]), values.version_column))
        line = _append(items, changes, rejects, values.skip_bad)
    except CommandError as error:
        write_text(failed / f"{path.name}.error", f"{error}\n")
        os.replace(path, failed / path.name)
        print(f"{path}: {error}", file=sys.stderr, flush=True)
        return
    os.replace(path, done / path.name)
    print(f"{path}: {line}", flush=True)


@contextlib.contextmanager
def _stopped() -> Iterator[threading.Event]:
    """Gives an event that SIGTERM and SIGINT set."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *unused: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Following a log with TensorFlow Serving.


def _follow(values: flags.FlagValues, arguments: list[str]) -> None:
    # Only this action needs gRPC.
    import grpc

    from dpsr_common.serving_apis import CHANNEL_OPTIONS, PREDICT, PredictRequest, PredictResponse

    request = PredictRequest()
    request.model_spec.name = values.model
    request.model_spec.signature_name = "apply_changes"
    problem = ""
    with grpc.insecure_channel(values.server, CHANNEL_OPTIONS) as channel, _stopped() as stop:
        predict = channel.unary_unary(PREDICT, PredictRequest.SerializeToString, PredictResponse.FromString)
        applied, wait = 0, 0.0
        while not stop.wait(wait):
            try:
                outputs = predict(request, timeout=60).outputs
                applied, offset = _number(outputs["changes"]), _number(outputs["offset"])
            except grpc.RpcError as error:
                details = f"{values.server}: {error.code().name}: {' '.join(error.details().split())}"
                if values.once:
                    raise CommandError(
                        f"{details}; check --server and --model, and that the model was exported for item changes"
                    ) from None
                if details != problem:
                    print(details, file=sys.stderr, flush=True)
                # Later calls come at longer intervals, because the error may last.
                problem, wait = details, min(10.0, max(1.0, 2 * wait))
                continue
            problem = ""
            if applied:
                print(f"{values.model}: applied the changes {offset - applied} to {offset - 1}", flush=True)
            elif values.once:
                return
            wait = 0.0 if applied else values.interval_s


def _number(tensor: Any) -> int:
    """Returns the value of a TensorProto with one int32 or int64."""
    if tensor.tensor_content:
        return int(np.frombuffer(tensor.tensor_content, "<i4" if len(tensor.tensor_content) == 4 else "<i8")[0])
    return int((tensor.int_val or tensor.int64_val)[0])
