"""The tables of the MovieLens adapters, which are the same for all published layouts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from dpsr_tf.data.adapters import raw


class Film(NamedTuple):
    """A row of the item table."""

    item_id: int
    title: str
    year: int | None
    genres: str  # separated by spaces


class User(NamedTuple):
    """A row of the user table."""

    user_id: int
    age: int
    gender: str
    occupation: str


class Rating(NamedTuple):
    """A rating. All layouts have its fields in this order."""

    user_id: int
    item_id: int
    rating: float
    time: int  # seconds since 1970


def film(item_id: int, title: str, genres: str, year: str = "") -> Film:
    """Makes a film. Its year stands in a field of its own, or in the title: "Toy Story (1995)"."""
    in_title = re.match(r"(.+?)\s*\((\d{4})\)", title)
    if in_title:
        title, year = in_title[1], in_title[2]
    return Film(item_id, title, int(year) if year.isdigit() else None, genres)


def write(out: Path, films: Iterable[Film], users: Iterable[User], ratings: Iterable[Rating]) -> None:
    """Writes films.parquet, users.parquet and ratings.parquet. The query of a rating is the genres of its film."""
    all_films = list(films)
    genres = {film.item_id: film.genres for film in all_films}
    number, text = pa.int64(), pa.string()
    raw.write(out / "films.parquet", {"item_id": number, "title": text, "year": pa.int32(), "genres": text}, all_films)
    raw.write(out / "users.parquet", {"user_id": number, "age": pa.int32(), "gender": text, "occupation": text}, users)
    raw.write(
        out / "ratings.parquet",
        {"query": text, "user_id": number, "item_id": number, "rating": pa.float32(), "time": number},
        # A film that is not in the table has no genres. Its ratings have an empty query then, and ingest rejects them.
        ((genres.get(rating.item_id, ""), *rating) for rating in ratings),
    )
