"""What a rewriter learns from, in a store: words in their order, clicks, and pairs of queries that mean the same.

vocabulary.words.dpsr: words and characters (dpsr_tokenizer.WordSequences), of titles and of queries for training

sequences.dpsr (kind "sequences")

  title.splits   int64 [items + 1]   row splits of the words of each title
  title.words    int32               their ids

rewriting.dpsr (kind "rewriting"), or one file for each shard; queries with equal words are one query

  query_text.splits, query_text.bytes   the words of each query as a text, in the order of these texts
  query.splits   int64 [queries + 1]    row splits of the words of each query
  query.words    int32                  their ids
  query.clicks   float32                sum of the weights of its clicks; 0 if it was only the source of a reformulation
  click.splits   int64 [queries + 1]    row splits of the items that were clicked for each query
  click.item     int32                  rows, ascending
  click.weight   float32                sum of the weights of these clicks
  pair.splits    int64 [queries + 1]    row splits of the queries that each query may be rewritten to
  pair.query     int32                  rows of queries, counted over all shards; the strongest pair first
  pair.weight    float32                cosine of the clicks of both, plus share of the source's visits that it followed

docs/rewriting.md says which pairs are kept.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpsr_common.errors import CommandError
from dpsr_common.packed_file import PackedFileWriter
from dpsr_tf.data.code_book import CodeBook
from dpsr_tf.data.column_files import RaggedColumnFile, add_splits, row_splits, string_bytes
from dpsr_tf.data.database import TEXT_ROWS, Database, SortedColumns
from dpsr_tf.data.encode import POSITIVE
from dpsr_tf.data.interaction_log import held_out_conditions, shard_of_query, summed_weights
from dpsr_tf.data.query_meanings import DAMPED, add_words, find_wants, same_meaning
from dpsr_tf.data.schema import Schema
from dpsr_tf.data.store import WORDS, rewriting_names
from dpsr_tokenizer import Vocabulary, VocabularyBuilder, WordSequences

# One click, damped, on an item that no other query has: queries with few clicks are like no other by chance.
_ONE_CLICK = round(1024 * math.log(2))
# The numbers of a text, each once: 6 and 1/2 of "6ft 1/2in".
_NUMBERS = r"list_sort(list_distinct(regexp_extract_all(text, '[0-9]+(?:[.,/][0-9]+)*'))).array_to_string(' ')"


class QueryPairs:
    """Writes the files of a rewriter. The methods are called in this order: find_reformulations, write."""

    def __init__(self, schema: Schema, database: Database):
        """`schema` has a section `rewriting`."""
        assert schema.rewriting is not None
        self._schema, self._rewriting, self._database = schema, schema.rewriting, database

    def find_reformulations(self, last_time: int) -> None:
        """Creates the table `follows`: how often one query text followed another within a session.

        A user who asks again after a query without a click, and then clicks, has said the same in other words. Call
        this while the table `log` of InteractionLog is there.

        Args:
            last_time: time of the last interaction.
        """
        interactions, minutes = self._schema.interactions, self._rewriting.reformulation_minutes
        if interactions is None or not interactions.time or not minutes or "log" not in self._database:
            self._database.create("follows", "SELECT '' AS source, '' AS target, 0::BIGINT AS visits LIMIT 0")
            self._database.create("visits", "SELECT '' AS text, 0::BIGINT AS visits LIMIT 0")
            return
        held_query, held_time = held_out_conditions(interactions, last_time)
        session = "session" if interactions.session else "0"
        same = "PARTITION BY user_row, session ORDER BY"
        # A visit is a run of rows with one query. Rows of different queries at the same time come by their text.
        self._database.create(
            "session_visits",
            f"""SELECT user_row, session, query, min(time) AS began, max(time) AS ended, bool_or(clicked) AS clicked
            FROM (SELECT *, sum(begins) OVER ({same} time, query) AS visit
                FROM (SELECT *, (query IS DISTINCT FROM lag(query) OVER ({same} time, query))::INTEGER AS begins
                    FROM (SELECT user_row, {session} AS session, time, query, bool_or(role = {POSITIVE}) AS clicked
                        FROM log WHERE time > 0 AND (user_row > 0 OR {session} <> 0)
                            AND NOT ({held_query}) AND NOT ({held_time})
                        GROUP BY ALL)))
            GROUP BY user_row, session, visit, query""",
        )
        self._database.create(
            "follows",
            f"""SELECT query AS source, target, count(*) AS visits
            FROM (SELECT query, clicked, ended, lead(query) OVER visit AS target, lead(began) OVER visit AS next,
                    lead(clicked) OVER visit AS target_clicked
                FROM session_visits WINDOW visit AS ({same} began, query))
            WHERE NOT clicked AND target_clicked AND next - ended <= {round(60 * minutes)} GROUP BY ALL""",
        )
        self._database.create("visits", "SELECT query AS text, count(*) AS visits FROM session_visits GROUP BY query")
        self._database.drop("session_visits")

    def write(self, out: Path, shards: int, codes: CodeBook | None, **builder: Any) -> dict[str, Any]:
        """Writes all files into the directory `out`. Returns what the manifest says about them.

        The database has the tables `items` of Assembler, and `queries` and `pairs` of InteractionLog.

        Args:
            out: the directory of the store.
            shards: number of files of queries.
            codes: has the words of a model, or None.
            **builder: options of the VocabularyBuilder.

        Raises:
            CommandError: no word is frequent enough for an id of its own.
        """
        self._group_queries(shards)
        words = self._write_vocabulary(out / WORDS, codes, **builder)
        self._write_titles(out, words)
        dropped = self._pair_queries()
        pairs = self._write_queries(out, shards, words)
        counts = {
            "words": len(words) - WordSequences.FIRST_WORD,
            "queries": self._database.count("asked"),
            "clicks": self._database.count("clicks"),
            "pairs": pairs,
            "dropped": dropped,
        }
        for table in ("asked", "clicks", "query_pairs"):
            self._database.drop(table)
        print(
            f"rewriting: {counts['words']:,} words, {counts['queries']:,} queries, {counts['clicks']:,} pairs of query "
            f"and item, {pairs:,} pairs of queries",
            flush=True,
        )
        return counts

    # Queries.

    def _group_queries(self, shards: int) -> None:
        """Creates `asked`, the queries with different words, `clicks`, and `reformulations` between them."""
        database = self._database
        texts = "SELECT text FROM queries WHERE training UNION SELECT source FROM follows"
        for batch in database.batches(f"SELECT DISTINCT text FROM ({texts})", "group queries", None, TEXT_ROWS):
            normal = pa.array(WordSequences.normal(batch["text"]), pa.string())
            database.insert("normal", pa.record_batch({"raw": batch["text"].cast(pa.string()), "query": normal}))
        if "normal" not in database:
            database.create("normal", "SELECT '' AS raw, '' AS query LIMIT 0")
        weight = summed_weights(database)
        database.create(
            "normal_clicks",
            f"""SELECT query, item_row, ({weight})::FLOAT AS weight
            FROM pairs JOIN queries USING (query_row) JOIN normal ON text = raw
            WHERE role = {POSITIVE} AND NOT pairs.held AND query <> '' GROUP BY query, item_row
            HAVING ({weight})::FLOAT > 0""",
        )
        database.create(
            "normal_follows",
            """SELECT s.query AS source, t.query AS target, sum(visits)::BIGINT AS visits
            FROM follows JOIN normal AS s ON source = s.raw JOIN normal AS t ON target = t.raw
            WHERE s.query <> t.query AND s.query <> '' AND t.query <> '' GROUP BY ALL""",
        )
        database.create(
            "asked",
            f"""SELECT text, shard, clicks, coalesce(visits, 0)::BIGINT AS visits, {_NUMBERS} AS numbers,
                (row_number() OVER (ORDER BY shard, text) - 1)::INTEGER AS row
            FROM (SELECT query AS text, {shard_of_query(shards)} AS shard,
                    coalesce(sum(round(weight * 1048576)::HUGEINT) / 1048576, 0)::FLOAT AS clicks
                FROM (SELECT query, weight FROM normal_clicks
                    UNION ALL SELECT source, NULL FROM normal_follows UNION ALL SELECT target, NULL FROM normal_follows)
                GROUP BY query)
            LEFT JOIN (SELECT query, sum(visits) AS visits FROM visits JOIN normal ON text = raw GROUP BY query)
                ON text = query""",
        )
        database.create(
            "clicks",
            """SELECT row AS query_row, item_row, weight FROM normal_clicks JOIN asked ON query = text""",
        )
        database.create(
            "reformulations",
            """SELECT s.row AS source, t.row AS target, normal_follows.visits, s.visits AS of_source,
                t.visits AS of_target
            FROM normal_follows JOIN asked AS s ON source = s.text JOIN asked AS t ON target = t.text""",
        )
        for table in ("normal", "normal_clicks", "normal_follows", "follows", "visits"):
            database.drop(table)

    def _pair_queries(self) -> dict[str, int]:
        """Creates `query_pairs`. Returns how many pairs each filter against drift has dropped."""
        s, database = self._rewriting, self._database
        database.create("damped", f"SELECT query_row, item_row, weight, {DAMPED} AS clicks FROM clicks")
        rank = "row_number() OVER (PARTITION BY item_row ORDER BY weight DESC, query_row)"
        compared = f"SELECT * FROM damped QUALIFY {rank} <= {s.max_queries_per_item}"
        # How often the target follows the source, compared with how often it follows any query.
        visits = database.scalar("SELECT coalesce(sum(visits), 0) FROM asked")
        lift = f"{visits} * visits / of_source / of_target"
        database.create(
            "candidates",
            f"""WITH compared AS ({compared}),
            lengths AS (
                SELECT query_row, sum(clicks * clicks) + {_ONE_CLICK**2} AS length FROM damped GROUP BY query_row),
            products AS (
                SELECT a.query_row AS source, b.query_row AS target, sum(a.clicks * b.clicks) AS product
                FROM compared AS a JOIN compared AS b USING (item_row) WHERE a.query_row <> b.query_row GROUP BY ALL),
            alike AS (
                SELECT source, target, product / sqrt(a.length::DOUBLE * b.length::DOUBLE) AS cosine
                FROM products JOIN lengths AS a ON source = a.query_row JOIN lengths AS b ON target = b.query_row)
            SELECT source, target, coalesce(cosine, 0) AS cosine, coalesce(visits / of_source, 0) AS share,
                coalesce(visits >= {s.min_reformulations} AND {lift} >= {s.min_lift}, FALSE) AS follows
            FROM alike FULL JOIN reformulations USING (source, target)""",
        )
        add_words(database, "query_words", "SELECT row, text FROM asked", "words of queries")
        dropped = {
            "few_shared_clicks": self._keep(f"follows OR cosine >= {s.min_similarity}"),
            "other_numbers": self._keep("a.numbers = b.numbers"),
            "no_new_word": self._keep("NOT list_has_all(a.words, b.words)", "query_words"),
        }
        if s.meaning_share:
            find_wants(database, s.meaning_share)
            dropped["other_meaning"] = self._keep(same_meaning("a", "b", "follows"), "wants")
            database.drop("wants")
        before = database.count("candidates")
        database.create(
            "query_pairs",
            f"""SELECT source, target, (cosine + if(follows, share, 0))::FLOAT AS weight FROM candidates
            QUALIFY row_number() OVER (PARTITION BY source ORDER BY weight DESC, target) <= {s.max_pairs}""",
        )
        dropped["too_many"] = before - database.count("query_pairs")
        for table in ("damped", "candidates", "reformulations", "query_words"):
            database.drop(table)
        return dropped

    def _keep(self, condition: str, table: str = "asked") -> int:
        """Keeps the candidates that pass a filter, which sees rows a and b of a table. Returns how many it drops."""
        before = self._database.count("candidates")
        self._database.create(
            "passed",
            f"""SELECT c.* FROM candidates AS c JOIN {table} AS a ON source = a.row JOIN {table} AS b ON target = b.row
            WHERE {condition}""",
        )
        self._database.drop("candidates")
        self._database.create("candidates", "FROM passed")
        self._database.drop("passed")
        return before - self._database.count("candidates")

    # Files.

    def _write_vocabulary(self, path: Path, codes: CodeBook | None, **builder_options: Any) -> WordSequences:
        known = codes.words() if codes else None
        if known is not None:
            shutil.copyfile(known, path)
            return WordSequences(Vocabulary(path))
        builder = VocabularyBuilder(WordSequences.config(), **builder_options)
        for label, table, column in (("items", "items", "title"), ("queries", "asked", "text")):
            rows = self._database.count(table)
            for batch in self._database.batches(f"SELECT {column} FROM {table}", f"words of {label}", rows, TEXT_ROWS):
                builder.add(batch.column(0))
        try:
            builder.write(path, min_count=self._rewriting.min_count, max_size=self._rewriting.max_words)
        except ValueError as error:
            raise CommandError(f"rewriting: {error}; lower min_count") from None
        return WordSequences(Vocabulary(path))

    def _write_titles(self, out: Path, words: WordSequences) -> None:
        titles = RaggedColumnFile(self._database.folder, np.int32)
        query, rows = "SELECT title FROM items ORDER BY id", self._database.count("items")
        limit = self._rewriting.max_title_words - 1
        for _, encoded in self._database.encoded_batches(
            query, "encode titles", rows, lambda batch: _sequences(words, batch["title"], limit)
        ):
            titles.append(*encoded)
        with PackedFileWriter(out / "sequences.dpsr", "sequences") as file:
            titles.copy(file, "title.splits", "title.words")

    def _write_queries(self, out: Path, shards: int, words: WordSequences) -> int:
        """Writes the files of queries. Returns the number of pairs."""
        database, queries = self._database, self._database.count("asked")
        texts = RaggedColumnFile(database.folder, np.uint8)
        sequences = RaggedColumnFile(database.folder, np.int32)
        limit = self._rewriting.max_query_words - 1

        def encode(batch: pa.RecordBatch) -> Any:
            return string_bytes(batch["text"]), _sequences(words, batch["text"], limit)

        for _, (text, encoded) in database.encoded_batches(
            "SELECT text FROM asked ORDER BY row", "encode queries", queries, encode
        ):
            texts.append(*text)
            sequences.append(*encoded)
        of_query = database.sorted_columns(["clicks"], "FROM asked", ["row"], "write queries")
        clicks = self._grouped(["item_row", "weight"], "clicks", "query_row", "item_row", queries)
        pairs = self._grouped(["target", "weight"], "query_pairs", "source", "weight DESC, target", queries)
        first = 0
        for shard, name in enumerate(rewriting_names(shards)):
            end = first + database.scalar(f"SELECT count(*) FROM asked WHERE shard = {shard}")
            with PackedFileWriter(out / name, "rewriting") as file:
                texts.copy(file, "query_text.splits", "query_text.bytes", first, end)
                sequences.copy(file, "query.splits", "query.words", first, end)
                of_query.columns[0].copy(file, "query.clicks", first, end)
                for group, columns, names in (
                    ("click", clicks, ("item", "weight")),
                    ("pair", pairs, ("query", "weight")),
                ):
                    span = add_splits(file, f"{group}.splits", columns.splits, first, end)
                    for part, column in zip(names, columns.columns, strict=True):
                        column.copy(file, f"{group}.{part}", *span)
            first = end
        return int(pairs.splits[-1])

    def _grouped(self, columns: list[str], table: str, group: str, order: str, groups: int) -> SortedColumns:
        return self._database.sorted_columns(
            columns, f"FROM {table}", [group, order], f"write {table}", group=group, num_groups=groups
        )


def _sequences(words: WordSequences, texts: pa.Array, max_words: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the word ids of texts, int32 [total], and their row splits, int64 [texts + 1]."""
    ids = words.encode(texts, max_words=max_words)
    there = ids != WordSequences.PADDING
    return ids[there], row_splits(there.sum(axis=1))
