"""MovieLens 1M: GroupLens' files ratings.dat, movies.dat and users.dat."""

from __future__ import annotations

from pathlib import Path

from dpsr_common.errors import UsageError
from dpsr_tf.data.adapters import movielens, raw

_PUBLISHER = "GroupLens, https://grouplens.org/datasets/movielens/1m/ (ml-1m.zip)"

# The meaning of the occupation codes, from the README of the data set.
_OCCUPATIONS = [
    "other", "academic/educator", "artist", "clerical/admin", "college/grad student", "customer service",
    "doctor/health care", "executive/managerial", "farmer", "homemaker", "K-12 student", "lawyer", "programmer",
    "retired", "sales/marketing", "scientist", "self-employed", "technician/engineer", "tradesman/craftsman",
    "unemployed", "writer",
]  # fmt: skip


def convert(source: Path, out: Path) -> None:
    """Writes films.parquet, users.parquet and ratings.parquet.

    Raises UsageError or CommandError if files are missing or bad.
    """
    names = ["ratings.dat", "movies.dat", "users.dat"]
    if (source / "train.txt").is_file() and not (source / names[0]).is_file():
        raise UsageError(
            f"{source}: has lists of ids (train.txt), expected {', '.join(names)}; "
            f"for the lists use --adapter=movielens_1m_lightgcn"
        )
    ratings, items, users = raw.require(source, names, _PUBLISHER)
    latin = "iso-8859-1"
    movielens.write(
        out,
        (
            movielens.film(item_id, title, genres.replace("|", " "))
            for item_id, title, genres in raw.records(items, "::", [int, str, str], encoding=latin)
        ),
        (
            movielens.User(user_id, age, gender, occupation)
            for user_id, gender, age, occupation in raw.records(users, "::", [int, str, int, _occupation])
        ),
        (movielens.Rating(*r) for r in raw.records(ratings, "::", [int, int, float, int])),
    )


def _occupation(code: str) -> str:
    if not 0 <= int(code) < len(_OCCUPATIONS):
        raise ValueError(f"occupation is {code}, expected 0 to {len(_OCCUPATIONS) - 1}")
    return _OCCUPATIONS[int(code)]
