"""Amazon's Shopping Queries data set (ESCI): judged pairs of queries and products, in one of three locales."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from dpsr_common.errors import CommandError
from dpsr_tf.data.adapters import raw

_PUBLISHER = "Amazon, https://github.com/amazon-science/esci-data (folder shopping_queries_dataset)"
_FILES = ["shopping_queries_dataset_examples.parquet", "shopping_queries_dataset_products.parquet"]
_GRADES = {"E": 3, "S": 2, "C": 1, "I": 0}
_TEXTS = ("product_title", "product_brand", "product_color")


def convert(source: Path, out: Path, locale: str = "us") -> None:
    """Writes products.parquet and examples.parquet of a locale (us, es, jp).

    Raises UsageError or CommandError if files are missing or bad, or have no such locale or an unknown label.
    """
    examples, products = raw.require(source, _FILES, _PUBLISHER)
    text = pa.string()
    raw.write_batches(
        out / "products.parquet",
        dict.fromkeys(["product_id", *_TEXTS], text),
        (batch.drop_columns(["product_locale"]) for batch in _of_locale(products, ["product_id", *_TEXTS], locale)),
    )
    schema = {"query": text, "product_id": text, "grade": pa.int8(), "time": pa.int64()}
    raw.write_batches(out / "examples.parquet", schema, _examples(examples, locale, schema))


def _examples(path: Path, locale: str, schema: dict[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    for batch in _of_locale(path, ["query", "product_id", "esci_label", "split"], locale):
        grade = pc.index_in(batch.column("esci_label"), pa.array(list(_GRADES)))
        if grade.null_count:
            label = batch.column("esci_label").filter(pc.is_null(grade))[0]
            raise CommandError(f"{path}: column esci_label has {label.as_py()!r}, expected {', '.join(_GRADES)}")
        trained = pc.equal(batch.column("split"), "train").to_numpy(zero_copy_only=False)
        arrays = [
            batch.column("query"),
            batch.column("product_id"),
            np.array(list(_GRADES.values()), np.int8)[grade.to_numpy()],
            np.where(trained, raw.HELD_OUT_FROM - 1, raw.HELD_OUT_FROM),
        ]
        yield pa.record_batch(
            [pa.array(array).cast(kind) for array, kind in zip(arrays, schema.values(), strict=True)],
            names=list(schema),
        )


def _of_locale(path: Path, columns: Sequence[str], locale: str) -> Iterator[pa.RecordBatch]:
    """Yields the rows of the locale, as text, one chunk after the other."""
    names = [*columns, "product_locale"]
    rows = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        missing = [name for name in names if name not in file.schema_arrow.names]
        if missing:
            raise CommandError(
                f"{path}: has no column {', '.join(missing)}, expected {', '.join(names)} as published: {_PUBLISHER}"
            )
        for batch in file.iter_batches(columns=names):
            texts = pa.record_batch([batch.column(name).cast(pa.string()) for name in names], names=names)
            chosen = texts.filter(pc.equal(texts.column("product_locale"), locale))
            rows += chosen.num_rows
            yield chosen
    except (pa.ArrowException, OSError) as error:
        raise CommandError(f"{path}: cannot be read as parquet: {error}") from None
    if rows == 0:
        raise CommandError(f"{path}: has no rows of locale {locale}, expected us, es or jp")
