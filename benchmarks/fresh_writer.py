"""Writes changes of items to the log of a servable, for benchmarks/fresh.py, until all are written or it is killed.

    python benchmarks/fresh_writer.py SOURCE LOG END RATE BATCH

SOURCE and LOG are directories with logs of item changes. The changes of SOURCE that LOG does not have yet, up to the
offset END, are written to LOG, BATCH changes in one segment. RATE is the number of changes a second; 0 is as fast as
they are acknowledged. For each segment it prints the offset of its first change, the one after its last, and the time
when it was acknowledged. It imports no TensorFlow.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dpsr_export.item_changes import ItemChangeLog


def main(arguments: Sequence[str]) -> None:
    """Writes changes."""
    source, log = (ItemChangeLog(Path(path)) for path in arguments[:2])
    end, rate, batch = int(arguments[2]), float(arguments[3]), int(arguments[4])
    written = log.end()
    parts = [part.part(0, end - first) for first, part in source.read(written) if first < end]
    due = time.monotonic()
    for part in parts:
        for begin in range(0, len(part), batch):
            first, last = log.append(part.part(begin, begin + batch))
            print(first, last, time.time(), flush=True)
            if rate:
                due += (last - first) / rate
                time.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    main(sys.argv[1:])
