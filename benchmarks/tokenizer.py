"""Measures how fast text becomes token ids on one thread, and compares that with other tokenizers.

The unit is megabytes of UTF-8 per second of CPU time.

    python benchmarks/tokenizer.py --json [--data=DIR] [--quick]

DIR holds multicpr_ecom/*.query.txt (id, tab, query) and homedepot/products.tsv (product_uid, product_title). Without
--data, the queries and titles of a shop made by `dpsr generate` are used.

The comparable implementations give the same tokens as ours. Every run checks this on every text: the vocabulary holds
every token of the corpus, so equal ids mean equal tokens. A text stays in the comparison only if each implementation
gives it the same ids, each as often; the order does not matter, because embeddings are summed. The share of equal texts
is a row of its own, and only the texts that stay are timed. The configuration is the default without number_parts,
which cannot be written reasonably with TensorFlow's ops. The other tokenizers make other tokens and are there for
orientation.

All implementations run in one process and one thread, in turns, one batch in each call. The best batch size differs
between them: a call of a TensorFlow graph has a fixed cost, and sentencepiece is faster on short lists. So several
sizes are measured, and the bars use the best size of each implementation.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# The libraries read these when they are loaded.
os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import report
import tensorflow as tf
from absl import app, flags

import dpsr_tokenizer
from dpsr_tokenizer.tf_ops import VocabularyTable

CONFIG = dpsr_tokenizer.TokenizerConfig(number_parts=False)
# Used without --data: enough titles for some hundred kilobytes.
GENERATED_ITEMS = 20_000

Ids = list[list[int]]


class Implementation(NamedTuple):
    """A tokenizer that turns texts into ids.

    Attributes:
        encode: turns a prepared batch into an object that holds the ids.
        prepare: turns a batch of texts into the argument of `encode`; not timed.
        ids: turns the result of `encode` into the ids of each text; None if the tokens are not ours.
        note: the last column of the table.
    """

    encode: Callable[[Any], Any]
    prepare: Callable[[list[str]], Any]
    ids: Callable[[Any], Ids] | None = None
    note: str = ""


# The regular expressions that say what a word is, for the implementations made of TensorFlow's ops.
_WORD = r"\p{L}\p{M}\p{N}"
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー"


def _join_numbers(text: tf.Tensor) -> tf.Tensor:
    """Turns separators into spaces, except . , / between digits, and removes thousands separators."""
    # RE2 has no look-around, hence the three steps.
    alone = rf"[./,]*[^{_WORD}./,\s]+[./,]*|[./,]+\s+[./,]*|\s+[./,]+|[./,]{{2,}}|^[./,]|[./,]$"
    text = tf.strings.regex_replace(text, alone, " ")
    text = tf.strings.regex_replace(text, r"([^\p{Nd}])[./,]|[./,]([^\p{Nd}])", r"\1 \2")
    return tf.strings.regex_replace(text, r"(\p{Nd}),(\p{Nd}{3})([^\p{Nd}]|$)", r"\1\2\3")


def _is_number(words: tf.Tensor) -> tf.Tensor:
    return tf.strings.regex_full_match(words, r"[\p{Nd}./,]+")


class SubstringTokens:
    """Makes all tokens with one tf.strings.substr, and their ids with one lookup: the fastest form of tf.strings found.

    The substrings are labels of the tokens: "#red# " for the word red, "#re" for the trigram ##re; characters and their
    pairs are their own labels. tf.strings.unicode_split and ngrams take about twice the time.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        unspaced = tf.strings.regex_full_match(tf.constant(tokens), f"[{_UNSPACED}]+").numpy()
        labels = [
            token[1:] if token[0] == "#" else token if is_unspaced else f"#{token}# "
            for token, is_unspaced in zip(tokens, unspaced, strict=True)
        ]
        self._table = _table(labels)

    def ids(self, text: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Tokenizes normalised text, string [num_texts], to ids int64 [num_ids] and row splits [num_texts + 1]."""
        text = tf.strings.regex_replace(_join_numbers(text), f"([{_UNSPACED}]+)", r" ~\1 ")
        runs = tf.strings.split(text)
        run = runs.values
        unspaced = tf.strings.substr(run, 0, 1) == "~"
        length = tf.strings.length(run, unit="UTF8_CHAR")
        # A word gives itself and as many trigrams as it has letters. Unspaced text, which begins with ~, gives its
        # characters and their pairs.
        count = tf.where(unspaced, 2 * length - 3, tf.where(_is_number(run), 1, length + 1))
        ends = tf.cumsum(count)
        row = tf.repeat(tf.range(tf.size(count)), count)
        i = tf.range(tf.size(row)) - tf.gather(ends - count, row)
        of_unspaced = tf.gather(unspaced, row)
        begin = tf.where(of_unspaced, 2 + i // 2, tf.maximum(i - 1, 0))
        size = tf.where(of_unspaced, 1 + i % 2, tf.where(i == 0, tf.gather(length, row) + 3, 3))
        padded = tf.gather(tf.strings.join(["#", run, "# "]), row)
        labels = tf.strings.substr(padded, begin, size, unit="UTF8_CHAR")
        return self._table.lookup(labels), tf.gather(tf.concat([[0], ends], 0), runs.row_splits)


class NgramTokens:
    """Makes the same tokens in the way that tensorflow-text's documentation suggests: a tokenizer, then text.ngrams."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._table = _table(tokens)

    def ids(self, text: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Tokenizes as SubstringTokens.ids does."""
        import tensorflow_text

        def ngrams(characters: tf.RaggedTensor, width: int) -> tf.RaggedTensor:
            return tensorflow_text.ngrams(
                characters, width, reduction_type=tensorflow_text.Reduction.STRING_JOIN, string_separator=""
            )

        tokenizer = tensorflow_text.WhitespaceTokenizer()
        words = tokenizer.tokenize(tf.strings.regex_replace(_join_numbers(text), f"[{_UNSPACED}]+", " "))
        letters = tf.ragged.boolean_mask(words, tf.logical_not(words.with_values(_is_number(words.values))))
        letters = tf.strings.unicode_split(letters.with_values(tf.strings.join(["#", letters.values, "#"])), "UTF-8")
        trigrams = ngrams(letters, 3).merge_dims(1, 2)
        trigrams = trigrams.with_values(tf.strings.join(["#", trigrams.values]))
        runs = tokenizer.tokenize(tf.strings.regex_replace(text, f"[^{_UNSPACED}]+", " "))
        characters = tf.strings.unicode_split(runs, "UTF-8")
        pairs = ngrams(characters, 2).merge_dims(1, 2)
        tokens = tf.concat([words, trigrams, characters.merge_dims(1, 2), pairs], axis=1)
        return self._table.lookup(tokens.values), tokens.row_splits


def _table(keys: Sequence[str]) -> tf.lookup.StaticHashTable:
    values = tf.range(len(keys), dtype=tf.int64)
    # The default value is the single bucket of unknown tokens, as in our vocabulary.
    return tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(tf.constant(keys), values), len(keys))


def _split(result: tuple[Any, Any]) -> Ids:
    values, row_splits = (np.asarray(part) for part in result)
    return [part.tolist() for part in np.split(values, row_splits[1:-1])]


def _graph(ids: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]], note: str = "") -> Implementation:
    """Returns `ids` as a graph that is traced once."""
    function = tf.function(ids, input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    return Implementation(function.get_concrete_function(), tf.constant, _split, note)


def _vocabulary(texts: list[str], config: dpsr_tokenizer.TokenizerConfig, path: Path) -> dpsr_tokenizer.Vocabulary:
    builder = dpsr_tokenizer.VocabularyBuilder(config)
    builder.add(texts)
    builder.write(path, num_oov_buckets=1)
    return dpsr_tokenizer.Vocabulary(path)


def _core(vocabulary: dpsr_tokenizer.Vocabulary, note: str = "") -> Implementation:
    return Implementation(vocabulary.encode_batch, list, _split, note)


def comparable(texts: list[str], folder: Path) -> dict[str, Implementation]:
    """Returns our implementations and those that give the same tokens; the vocabulary of `texts` goes to `folder`."""
    vocabulary = _vocabulary(texts, CONFIG, folder / "vocabulary.dpsr")
    tokens = [vocabulary.token(id) for id in range(len(vocabulary))]
    table = VocabularyTable(vocabulary.path)

    def op(text: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        ids = table.tokenize(text)
        return ids.values, ids.row_splits

    substrings = SubstringTokens(tokens)
    found = {
        "core": _core(vocabulary, "Vocabulary.encode_batch"),
        "op": _graph(op, "VocabularyTable.tokenize"),
        "tf_strings": _graph(
            lambda text: substrings.ids(tf.strings.lower(text, encoding="utf-8")), "comparable: tf.strings, tf.lookup"
        ),
    }
    try:
        import tensorflow_text
    except ModuleNotFoundError as error:
        _left_out("tensorflow_text", error)
        return found
    ngrams = NgramTokens(tokens)
    # case_fold_utf8 is ICU's NFKC_Casefold.
    found["tf_text_ngrams"] = _graph(
        lambda text: ngrams.ids(tensorflow_text.case_fold_utf8(text)), "comparable: tensorflow-text, text.ngrams"
    )
    found["tf_text_substr"] = _graph(
        lambda text: substrings.ids(tensorflow_text.case_fold_utf8(text)), "comparable: tensorflow-text, one substr"
    )
    return found


def _left_out(peer: str, error: ModuleNotFoundError) -> None:
    """Reports that a peer is not installed. A peer that is installed but lacks a dependency is an error."""
    if error.name != peer:
        raise error
    print(f"{peer} is not installed, so its rows are missing; `make bench-tokenizer` installs it", file=sys.stderr)


def orientation(texts: list[str], folder: Path) -> dict[str, Implementation]:
    """Returns other tokenizers, trained on `texts`. Their results are not converted, which would cost time."""
    note = "our default, with number_parts"
    default = _vocabulary(texts, dpsr_tokenizer.TokenizerConfig(), folder / "default.dpsr")
    found = {"core_default": _core(default, note)}
    try:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    except ModuleNotFoundError as error:
        _left_out("tokenizers", error)
    else:
        kinds = {
            "hf_bert_words": (
                models.WordLevel,
                trainers.WordLevelTrainer,
                "BERT's words, each an id",
            ),
            "hf_wordpiece": (models.WordPiece, trainers.WordPieceTrainer, "BERT's words, then WordPiece"),
        }
        for name, (model, trainer, note) in kinds.items():
            tokenizer = Tokenizer(model(unk_token="[UNK]"))
            tokenizer.normalizer = normalizers.BertNormalizer()
            tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            trained = trainer(vocab_size=30_000, special_tokens=["[UNK]"], show_progress=False)
            tokenizer.train_from_iterator(texts, trained)
            found[name] = Implementation(tokenizer.encode_batch_fast, list, note=note)
    try:
        import sentencepiece
    except ModuleNotFoundError as error:
        _left_out("sentencepiece", error)
    else:
        for kind in ("unigram", "bpe"):
            model_file = io.BytesIO()
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=model_file, model_type=kind, vocab_size=8_000,
                hard_vocab_limit=False, num_threads=1, minloglevel=2,
            )  # fmt: skip
            processor = sentencepiece.SentencePieceProcessor(model_proto=model_file.getvalue(), num_threads=1)
            found[f"sentencepiece_{kind}"] = Implementation(processor.encode, list, note=f"SentencePiece, {kind}")
    return found


def _batches(implementation: Implementation, texts: list[str], size: int) -> list[Any]:
    return [implementation.prepare(texts[i : i + size]) for i in range(0, len(texts), size)]


def same_as_core(found: dict[str, Implementation], texts: list[str], batch_size: int) -> dict[str, list[bool]]:
    """Returns by name whether an implementation gives each text the same ids as the core, each as often."""

    def ids(implementation: Implementation) -> Ids:
        assert implementation.ids is not None
        batches = _batches(implementation, texts, batch_size)
        return [sorted(row) for batch in batches for row in implementation.ids(implementation.encode(batch))]

    expected = ids(found["core"])
    return {
        name: [a == b for a, b in zip(ids(implementation), expected, strict=True)]
        for name, implementation in found.items()
        if name != "core"
    }


def _pass(implementation: Implementation, texts: list[str], batch_size: int) -> Callable[[], None]:
    batches = _batches(implementation, texts, batch_size)

    def run() -> None:
        for batch in batches:
            implementation.encode(batch)

    return run


def measure(
    result: report.Report, workload: str, texts: list[str], batch_sizes: Sequence[int], repeat: int, seconds: float
) -> None:
    """Measures all implementations on one corpus, and adds the rows."""
    with tempfile.TemporaryDirectory() as folder:
        ours_and_same = comparable(texts, Path(folder))
        same = same_as_core(ours_and_same, texts, batch_sizes[0])
        for name, flags_of_texts in same.items():
            result.add(name, workload, "same_tokens", sum(flags_of_texts) / len(texts), "of texts")
        kept = [text for text, *is_same in zip(texts, *same.values(), strict=True) if all(is_same)]
        if not kept:
            raise SystemExit(
                f"tokenizer: {workload}: no text has the same tokens in all implementations; cannot compare them"
            )
        megabytes = sum(len(text.encode()) for text in kept) / 1e6
        result.add("all", workload, "texts_timed", len(kept), "texts", note=f"{megabytes:.2f} MB")
        implementations = ours_and_same | orientation(texts, Path(folder))
        passes = {
            (name, size): _pass(each, kept, size) for name, each in implementations.items() for size in batch_sizes
        }
        for (name, size), samples in report.rates(passes, megabytes, repeat, seconds).items():
            is_same = name in same and name != "op"
            note = f"batches of {size:,}; {implementations[name].note}"
            result.add_samples(name, workload, "rate", samples, "MB/s", comparable=is_same, batch_size=size, note=note)


def bars(result: report.Report) -> dict[str, float]:
    """Returns each ratio for the corpus where it is lower, with each implementation at its best batch size."""
    rates = [row for row in result.rows if row["metric"] == "rate"]
    ratios: dict[str, list[float]] = {
        name: [] for name in ("ratio_to_best_comparable", "ratio_to_best_any", "op_over_core")
    }
    for workload in {row["workload"] for row in rates}:
        best_last = sorted((row for row in rates if row["workload"] == workload), key=lambda row: row["value"])
        here = {row["impl"]: row for row in best_last}
        core = here["core"]["value"]
        others = [row for name, row in here.items() if name not in ("core", "core_default", "op")]
        best = max(row["value"] for row in others if row["comparable"])
        ratios["ratio_to_best_comparable"].append(core / best)
        ratios["ratio_to_best_any"].append(core / max(row["value"] for row in others))
        ratios["op_over_core"].append(here["op"]["value"] / core)
    return {name: min(values) for name, values in ratios.items()}


def corpora(data: str | None, limit: int, seed: int) -> dict[str, list[str]]:
    """Returns at most `limit` texts of each workload, spread evenly over its corpus."""
    if data is None:
        found = _generated(seed)
    else:
        queries = sorted(Path(data, "multicpr_ecom").glob("*.query.txt"))
        if not queries:
            raise SystemExit(f"tokenizer: --data={data}: no file multicpr_ecom/*.query.txt in this directory")
        products = Path(data, "homedepot", "products.tsv")
        if not products.exists():
            raise SystemExit(f"tokenizer: --data={data}: no file homedepot/products.tsv in this directory")
        found = {
            "multicpr_queries": [text for path in queries for text in _second_column(path)],
            "homedepot_titles": _second_column(products)[1:],
        }
    return {name: texts[:: max(1, -(-len(texts) // limit))] for name, texts in found.items()}


def _second_column(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [line.split("\t")[1].rstrip("\r") for line in lines if "\t" in line]


def _generated(seed: int) -> dict[str, list[str]]:
    import pyarrow.parquet

    from dpsr_tf.shop.generate import Parameters, generate

    with tempfile.TemporaryDirectory() as folder:
        generate(Parameters(seed=seed, items=GENERATED_ITEMS), Path(folder))
        titles = pyarrow.parquet.read_table(Path(folder) / "items.parquet")["title"].to_pylist()
        queries = pyarrow.parquet.read_table(Path(folder) / "interactions")["query"].to_pylist()
    unique = list(dict.fromkeys(queries))
    return {
        "generated_chinese_queries": [text for text in unique if not text.isascii()],
        "generated_english_titles": [text for text in titles if text.isascii()],
    }


def _define_flags() -> None:
    flags.DEFINE_boolean("json", False, "print one JSON object as the last line")
    flags.DEFINE_string("data", None, "directory with multicpr_ecom/ and homedepot/; without it, texts are generated")
    flags.DEFINE_integer("texts", 60_000, "largest number of texts of each corpus", lower_bound=1)
    flags.DEFINE_list(
        "batch_sizes", ["256", "4096"], "numbers of texts in a call; the bars use the best one of each implementation"
    )
    flags.DEFINE_integer("repeat", 7, "number of measurements of each implementation", lower_bound=1)
    flags.DEFINE_float("seconds", 0.3, "least CPU time of one measurement, which is at least one whole pass")
    flags.DEFINE_integer("seed", 1, "seed of the generated texts", lower_bound=0)
    flags.DEFINE_boolean("quick", False, "2,000 texts and three short measurements, to try the benchmark")


def main(arguments: Sequence[str]) -> None:
    values = flags.FLAGS
    if arguments[1:]:
        raise app.UsageError(f"unexpected argument '{arguments[1]}'")
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    packages = ("dpsr", "tensorflow", "tensorflow-text", "tokenizers", "sentencepiece")
    try:
        batch_sizes = [int(size) for size in values.batch_sizes]
    except ValueError:
        batch_sizes = []
    if not batch_sizes or min(batch_sizes) < 1:
        raise app.UsageError(f"--batch_sizes={','.join(values.batch_sizes)}: expected numbers of at least 1")
    result = report.Report("tokenizer", values.seed, report.hardware(*packages))
    for package in packages[2:]:
        if package not in result.hardware["versions"]:
            print(
                f"tokenizer: {package} is not installed, so its rows are missing; pip install 'dpsr[bench]'",
                file=sys.stderr,
            )
    texts, repeat, seconds = (2_000, 3, 0.02) if values.quick else (values.texts, values.repeat, values.seconds)
    for workload, corpus in corpora(values.data, texts, values.seed).items():
        measure(result, workload, corpus, batch_sizes, repeat, seconds)
    result.bars = bars(result)
    result.print(values.json)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
