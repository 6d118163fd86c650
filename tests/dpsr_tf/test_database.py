"""The temporary database of `dpsr ingest` with little memory."""

from __future__ import annotations

import duckdb
import numpy as np

from dpsr_common.packed_file import PackedFile, PackedFileWriter
from dpsr_tf.data.database import Database
from dpsr_tf.data.parallel import Workers

ROWS, GROUPS = 400_000, 1000
COLUMNS = ["item", "weight", "time"]


def test_a_sort_that_is_too_much_for_all_threads_is_done_by_one(tmp_path):
    """The threads share the memory, and each needs some. A sort that gets too little is repeated."""
    with Workers(16) as workers:
        database = Database(tmp_path, workers, 20 << 20)
        database.create(
            "pairs",
            f"""SELECT (hash(i * 7) % {GROUPS})::INTEGER AS query, (hash(i * 3) % 200000)::INTEGER AS item,
                (hash(i * 11) % 5)::DOUBLE AS weight, (1600000000 + i)::UINTEGER AS time, i AS row
                FROM range({ROWS}) t(i)""",
        )
        tried = []
        sort = database._sorted_columns

        def counted(*arguments):
            tried.append(database.scalar("SELECT current_setting('threads')"))
            try:
                return sort(*arguments)
            except duckdb.OutOfMemoryException:
                tried.append("too much")
                raise

        database._sorted_columns = counted
        order = ["query", "item", "weight", "time"]
        found = database.sorted_columns(COLUMNS, "FROM pairs", order, "sort", group="query", num_groups=GROUPS)
        assert tried == [16, "too much", 1], "the memory of the test no longer suits DuckDB"
        assert database.scalar("SELECT current_setting('threads')") == 16
        assert found.splits[-1] == ROWS and len(found.splits) == GROUPS + 1
        rows = database.arrays("FROM pairs")
        database.close()
    with PackedFileWriter(str(tmp_path / "sorted.dpsr"), "sorted") as file:
        for name, column in zip(COLUMNS, found.columns, strict=True):
            column.copy(file, name)
    result = PackedFile(str(tmp_path / "sorted.dpsr"), "sorted")
    sorted_rows = np.lexsort([rows[name] for name in reversed(order)])
    for name in COLUMNS:
        np.testing.assert_array_equal(result[name], rows[name][sorted_rows], err_msg=name)
