"""What queries ask for: the filter against pairs of queries that mean different things.

Queries that share clicks need not mean the same: "red trainers" and "trainers" do. So the words of a query are compared
by what they ask for. A word asks for those words of titles that most clicks for queries with the word go to: "rosy" and
"pink" ask for "pink", "trainers" and "joggers" for "running" and "shoes". What a query asks for is what its words do.

The words are those of the tokenizer. A run of a script without spaces gives its pairs of neighbouring characters,
because one character says too little.
"""

from __future__ import annotations

import pyarrow as pa

from dpsr_tf.data.database import TEXT_ROWS, Database
from dpsr_tokenizer import Tokenizer, TokenizerConfig

# Clicks are counted as whole numbers, 1024 times the logarithm of 1 + clicks, because sums of floats depend on their
# order.
DAMPED = "round(1024 * ln(1 + weight))::BIGINT"
# Added to the clicks of each word, on average titles, so that a word with few clicks asks for nothing.
_PRIOR = 2 * 1024
# A word whose clicks are fewer may ask for something that the log does not show.
_EVIDENCE = 10 * 1024
# A word asks only for words that clicked titles have so many times as often as the titles clicked for other queries.
_LIFT = 1.25
# More clicks than these say no more about words; every n-th query is then read.
_MOST_CLICKS = 2_000_000
_QUERY_WORDS = "(SELECT row, unnest(words) AS word FROM query_words)"
_TITLE_WORDS = "(SELECT row, unnest(words) AS word FROM title_words)"


def find_wants(database: Database, share: float) -> None:
    """Creates the table `wants`: what each query asks for.

        row       INTEGER, the query
        wants     list of the words of titles that its known words ask for, sorted
        unknown   list of its words that have too few clicks and are like no known word, sorted
        fillers   list of its words that ask for nothing
        misspelt  list of its words that are read as another word

    Args:
        database: has the tables `query_words` of add_words, `clicks` (query_row, item_row, weight), `candidates`
            (source, target; rows of queries) and `items` (id, title).
        share: a word asks for a word of titles if at least this share of the clicks go to titles with it, 0 to 1.
    """
    clicked = """SELECT item_row AS row, coalesce(title, '') AS text
        FROM (SELECT (row_number() OVER (ORDER BY id) - 1)::INTEGER AS item_row, title FROM items)
        SEMI JOIN clicks USING (item_row)"""
    add_words(database, "title_words", clicked, "words of titles")
    every = 1 + database.count("clicks") // _MOST_CLICKS
    database.create(
        "read_clicks", f"SELECT query_row, item_row, {DAMPED} AS clicks FROM clicks WHERE query_row % {every} = 0"
    )
    database.create(
        "words_clicked",
        f"""SELECT word, sum(clicks)::BIGINT AS clicks FROM {_QUERY_WORDS} JOIN read_clicks ON row = query_row
        GROUP BY word""",
    )
    total = database.scalar("SELECT coalesce(sum(clicks), 0) FROM read_clicks")
    database.create(
        "asks",
        f"""WITH title AS (
            SELECT word, sum(clicks)::BIGINT AS clicks FROM {_TITLE_WORDS} JOIN read_clicks ON row = item_row
            GROUP BY word),
        together AS (
            SELECT q.word, t.word AS want, sum(clicks)::BIGINT AS clicks
            FROM read_clicks JOIN {_QUERY_WORDS} AS q ON q.row = query_row JOIN {_TITLE_WORDS} AS t ON t.row = item_row
            GROUP BY ALL)
        SELECT together.word, want
        FROM together JOIN words_clicked USING (word) JOIN title ON want = title.word
        WHERE together.clicks + {_PRIOR} * title.clicks / {total} >= {share} * (words_clicked.clicks + {_PRIOR})
            AND together.clicks::DOUBLE * {total} >= {_LIFT} * words_clicked.clicks::DOUBLE * title.clicks""",
    )
    _correct_words(database)
    # A word with few clicks stands for the known word that it is spelt like.
    database.create(
        "wants",
        f"""WITH word AS (
            SELECT word, known, coalesce(known, word) AS meant, known IS NULL AND NOT is_known AS is_unknown
            FROM (SELECT DISTINCT word FROM {_QUERY_WORDS}) JOIN is_known USING (word)
            LEFT JOIN corrections USING (word)),
        of_query AS (
            SELECT row, want, word.word, known, meant, is_unknown
            FROM {_QUERY_WORDS} JOIN word USING (word) LEFT JOIN asks ON meant = asks.word)
        SELECT row, list_sort(list_distinct(list(want) FILTER (want IS NOT NULL))) AS wants,
            list_sort(list_distinct(list(meant) FILTER (is_unknown))) AS unknown,
            list_sort(list_distinct(list(meant) FILTER (want IS NULL AND NOT is_unknown))) AS fillers,
            list_sort(list_distinct(list(word) FILTER (known IS NOT NULL))) AS misspelt
        FROM of_query GROUP BY row""",
    )
    for table in ("title_words", "read_clicks", "words_clicked", "asks", "is_known", "corrections"):
        database.drop(table)


def same_meaning(a: str, b: str, follows: str) -> str:
    """Returns SQL for whether a query may be rewritten to another.

    Both ask for the same, and the rewrite has no further words that are misspelt or ask for nothing. If enough people
    asked the rewrite after the query (`follows`), it may also explain words that are not known.

    Args:
        a: name of the row of `wants` of the query.
        b: that of the rewrite.
        follows: SQL for whether enough people asked the rewrite after the query.
    """
    # Where nothing passes its filter, a list is null.
    query, rewrite = (
        {column: f"coalesce({row}.{column}, [])" for column in ("wants", "unknown", "fillers", "misspelt")}
        for row in (a, b)
    )
    return f"""len({rewrite["wants"]}) > 0 AND list_has_all({query["fillers"]}, {rewrite["fillers"]})
        AND list_has_all({query["misspelt"]}, {rewrite["misspelt"]})
        AND ({query["wants"]} = {rewrite["wants"]} AND {query["unknown"]} = {rewrite["unknown"]}
            OR {follows} AND len({query["unknown"]}) > 0 AND list_has_all({rewrite["wants"]}, {query["wants"]}))"""


def add_words(database: Database, table: str, query: str, label: str) -> None:
    """Creates a table of the distinct words of texts (row, words) from the result of a query (row, text)."""
    tokenizer = Tokenizer(TokenizerConfig(letter_trigrams=False, char_unigrams=False, number_parts=False))
    schema = pa.schema({"row": pa.int32(), "words": pa.list_(pa.string())})
    database.insert(table, pa.RecordBatch.from_pylist([], schema))
    for batch in database.batches(query, label, None, TEXT_ROWS):
        words = [list(dict.fromkeys(tokenizer.tokenize(text))) for text in batch["text"].to_pylist()]
        database.insert(table, pa.record_batch([batch["row"], pa.array(words, schema.field("words").type)], schema))


def _correct_words(database: Database) -> None:
    """Creates `is_known` (word, is_known), and `corrections` (word, known) of words that are not known."""
    database.create(
        "is_known",
        f"""SELECT word, coalesce(clicks, 0) AS clicks, coalesce(clicks, 0) >= {_EVIDENCE} OR word IN (
                SELECT word FROM asks) AS is_known
        FROM (SELECT DISTINCT word FROM {_QUERY_WORDS}) LEFT JOIN words_clicked USING (word)""",
    )
    errors = "if(least(length(x.word), length(y.word)) < 8, 1, 2)"
    database.create(
        "corrections",
        f"""WITH rare AS (SELECT row, word FROM {_QUERY_WORDS} JOIN is_known USING (word) WHERE NOT is_known),
        known AS (SELECT row, word, clicks FROM {_QUERY_WORDS} JOIN is_known USING (word) WHERE is_known)
        SELECT x.word AS word, y.word AS known
        FROM candidates JOIN rare AS x ON source = x.row JOIN known AS y ON target = y.row
        WHERE least(length(x.word), length(y.word)) >= 4 AND abs(length(x.word) - length(y.word)) <= 2
            AND damerau_levenshtein(x.word, y.word) <= {errors}
        QUALIFY row_number() OVER (PARTITION BY x.word ORDER BY y.clicks DESC, y.word) = 1""",
    )
