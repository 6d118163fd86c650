"""Wayfair's WANDS: judged pairs of queries and products. The .csv files are tab-separated, with quotes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from dpsr_common.errors import CommandError
from dpsr_tf.data.adapters import raw

_PUBLISHER = "Wayfair, https://github.com/wayfair/WANDS (folder dataset)"
_GRADES = {"Irrelevant": 0, "Partial": 1, "Exact": 2}
_NUMBER, _TEXT = pa.int64(), pa.string()
_PRODUCT = {
    "product_id": _NUMBER,
    "product_name": _TEXT,
    "product_class": _TEXT,
    "category hierarchy": _TEXT,
    "product_features": _TEXT,
    "average_rating": pa.float32(),
    "review_count": pa.float32(),
}


def convert(source: Path, out: Path) -> None:
    """Writes products.parquet and labels.parquet.

    Raises UsageError or CommandError if files are missing or bad.
    """
    queries, products, labels = raw.require(source, ["query.csv", "product.csv", "label.csv"], _PUBLISHER)
    texts = {
        number: query
        for batch in _batches(queries, {"query_id": _NUMBER, "query": _TEXT})
        for number, query in zip(*(column.to_pylist() for column in batch.columns), strict=True)
    }
    raw.write_batches(out / "products.parquet", _PRODUCT, map(_with_counts, _batches(products, _PRODUCT)))
    raw.write(
        out / "labels.parquet", {"query": _TEXT, "product_id": _NUMBER, "grade": pa.int8()}, _labels(labels, texts)
    )


def _with_counts(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Sets the review count of products without one to 0."""
    place = batch.schema.get_field_index("review_count")
    return batch.set_column(place, batch.schema.field(place), pc.fill_null(batch.column(place), 0))


def _labels(path: Path, texts: dict[int, str]) -> Iterator[tuple[str, int, int]]:
    for batch in _batches(path, {"query_id": _NUMBER, "product_id": _NUMBER, "label": _TEXT}):
        for query, product, label in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if label not in _GRADES:
                raise CommandError(f"{path}: column label has {label!r}, expected {', '.join(_GRADES)}")
            # A query that is not in the table has no text. Ingest rejects the row then.
            yield texts.get(query, ""), product, _GRADES[label]


def _batches(path: Path, columns: dict[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    try:
        yield from pyarrow.csv.open_csv(
            path,
            parse_options=pyarrow.csv.ParseOptions(delimiter="\t", newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=columns, include_columns=list(columns), strings_can_be_null=False
            ),
        )
    except pa.ArrowKeyError as error:
        raise CommandError(f"{path}: {error}; expected columns {', '.join(columns)}: {_PUBLISHER}") from None
    except (pa.ArrowException, OSError) as error:
        raise CommandError(f"{path}: cannot be read as tab-separated text: {error}") from None
