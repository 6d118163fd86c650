"""MovieLens 100K: GroupLens' files (u.data, u.item, u.user), or RecBole's (ml-100k.inter, .item, .user)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dpsr_tf.data.adapters import movielens, raw

_PUBLISHER = (
    "GroupLens, https://grouplens.org/datasets/movielens/100k/ (ml-100k.zip); "
    "or ml-100k.inter, ml-100k.item, ml-100k.user, as RecBole names them"
)

# The genres of the columns from the sixth on. Each column holds 0 or 1.
_GENRES = [
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
]  # fmt: skip


def convert(source: Path, out: Path) -> None:
    """Writes films.parquet, users.parquet and ratings.parquet.

    Raises UsageError or CommandError if files are missing or bad.
    """
    if (source / "ml-100k.inter").is_file():
        names = [f"ml-100k.{suffix}" for suffix in ("inter", "item", "user")]
        ratings, items, users = raw.require(source, names, _PUBLISHER)
        films = (
            movielens.film(item_id, title, genres, year)
            for item_id, title, year, genres in raw.records(items, "\t", [int, str, str, str], header=True)
        )
        people = raw.records(users, "\t", [int, int, str, str], header=True)
        movielens.write(
            out,
            films,
            (movielens.User(*person) for person in people),
            (movielens.Rating(*r) for r in raw.records(ratings, "\t", [int, int, float, int], header=True)),
        )
        return
    ratings, items, users = raw.require(source, ["u.data", "u.item", "u.user"], _PUBLISHER)
    people = raw.records(users, "|", [int, int, str, str])
    movielens.write(
        out,
        _films(items),
        (movielens.User(*person) for person in people),
        (movielens.Rating(*r) for r in raw.records(ratings, "\t", [int, int, float, int])),
    )


def _films(path: Path) -> Iterator[movielens.Film]:
    # Id, title, two dates, address, genres.
    kinds = [int, str, str, str, str, *[int] * len(_GENRES)]
    for item_id, title, _, _, _, *flags in raw.records(path, "|", kinds, encoding="iso-8859-1"):
        genres = [genre for genre, flag in zip(_GENRES, flags, strict=True) if flag]
        yield movielens.film(item_id, title, " ".join(genres))
