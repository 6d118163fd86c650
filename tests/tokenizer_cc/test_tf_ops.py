from __future__ import annotations

import ctypes
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dpsr_common.packed_file import FormatError
from dpsr_tokenizer import Tokenizer, TokenizerConfig, VocabularyBuilder, op_library_path
from dpsr_tokenizer.tf_ops import VocabularyTable, _ops, tokenize_strings

TEXTS = [
    b"Red Running SHOES",
    "iPhone 手机壳　Ｓ 100ml".encode(),
    b"",
    "Straße ÉTÉ дом 한국어 ひらがな ไทย".encode(),
    b"dirty \xff\xfe\x00 bytes \xe6\x89",
    "zebra never seen 😀".encode(),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.dpsr"
    builder = VocabularyBuilder(TokenizerConfig(word_bigrams=True))
    builder.add(TEXTS[:5])
    builder.write(path, num_oov_buckets=13)
    return path


@pytest.fixture(scope="module")
def table(path):
    return VocabularyTable(path)


@pytest.fixture
def expected(table):
    """Returns the ids of TEXTS from the Python module, as nested lists."""
    return [table.vocabulary.encode(text).tolist() for text in TEXTS]


def save_v1(path, export: Path) -> None:
    """Makes a SavedModel as an Estimator does, text -> values, row_splits."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        text = tf.compat.v1.placeholder(tf.string, [None], name="text")
        ids = VocabularyTable(path).tokenize(text)
        values, row_splits = tf.identity(ids.values, "values"), tf.identity(ids.row_splits, "row_splits")
        session.run(tf.compat.v1.tables_initializer())
        builder = tf.compat.v1.saved_model.Builder(str(export))
        signature = tf.compat.v1.saved_model.predict_signature_def(
            {"text": text}, {"values": values, "row_splits": row_splits}
        )
        builder.add_meta_graph_and_variables(
            session,
            ["serve"],
            {"serving_default": signature},
            assets_collection=tf.compat.v1.get_collection(tf.compat.v1.GraphKeys.ASSET_FILEPATHS),
            main_op=tf.compat.v1.tables_initializer(),
        )
        builder.save()


@pytest.fixture
def moved_v1(path, tmp_path):
    """A SavedModel of TensorFlow 1 that was moved, and whose original vocabulary file is deleted."""
    copy = tmp_path / "vocabulary.dpsr"
    shutil.copy(path, copy)
    save_v1(copy, tmp_path / "export")
    copy.unlink()
    return (tmp_path / "export").rename(tmp_path / "moved")


def test_eager(table, expected):
    ids = table.tokenize(TEXTS)
    assert isinstance(ids, tf.RaggedTensor) and ids.dtype == tf.int32 and ids.row_splits.dtype == tf.int64
    assert ids.to_list() == expected
    assert table.tokenize(tf.zeros([0], tf.string)).to_list() == []


def test_tf_function(table, expected):
    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def tokenize(text):
        return table.tokenize(text)

    assert tokenize(tf.constant(TEXTS)).to_list() == expected


def test_dataset(table, expected):
    dataset = tf.data.Dataset.from_tensor_slices(TEXTS).batch(2).map(table.tokenize, num_parallel_calls=2)
    assert [row for batch in dataset for row in batch.to_list()] == expected


def test_graph(path, expected):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        ids = VocabularyTable(path).tokenize(tf.constant(TEXTS))
        session.run(tf.compat.v1.tables_initializer())
        assert session.run(ids).to_list() == expected


def test_dataset_in_a_graph(path, expected):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        table = VocabularyTable(path)
        dataset = tf.data.Dataset.from_tensor_slices(TEXTS).map(lambda text: table.tokenize(text[None]).values)
        iterator = tf.compat.v1.data.make_initializable_iterator(dataset)
        following = iterator.get_next()
        session.run([tf.compat.v1.tables_initializer(), iterator.initializer])
        assert [session.run(following).tolist() for _ in TEXTS] == expected


def test_estimator(path, tmp_path, expected):
    def model_fn(features, labels, mode):
        ids = VocabularyTable(path).tokenize(features)
        return tf.estimator.EstimatorSpec(mode, predictions={"ids": ids.to_tensor(-1)})

    estimator = tf.estimator.Estimator(model_fn, str(tmp_path))
    # An Estimator predicts from a checkpoint, and this model has nothing to train but the step.
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.compat.v1.train.get_or_create_global_step()
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, str(tmp_path / "model.ckpt"))
    rows = estimator.predict(lambda: tf.data.Dataset.from_tensor_slices(TEXTS).batch(3))
    assert [[i for i in row["ids"] if i >= 0] for row in rows] == expected


def test_two_tables_do_not_mix(path, tmp_path, expected):
    builder = VocabularyBuilder()
    builder.add("other")
    builder.write(tmp_path / "other", num_oov_buckets=1)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        first = VocabularyTable(path).tokenize(tf.constant(TEXTS))
        second = VocabularyTable(tmp_path / "other").tokenize(tf.constant(TEXTS))
        session.run(tf.compat.v1.tables_initializer())
        first, second = session.run([first, second])
    assert first.to_list() == expected
    assert second.to_list() != expected


@given(texts=st.lists(st.one_of(st.text(st.characters(codec="utf-8")).map(str.encode), st.binary()), max_size=5))
def test_op_equals_module(table, texts):
    values, row_splits = table.vocabulary.encode_batch(texts)
    ids = table.tokenize(tf.constant(texts, tf.string, [len(texts)]))
    np.testing.assert_array_equal(ids.values, values)
    np.testing.assert_array_equal(ids.row_splits, row_splits)


def test_saved_model_v1_in_a_session(moved_v1, expected):
    assert [file.name for file in (moved_v1 / "assets").iterdir()] == ["vocabulary.dpsr"]
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.compat.v1.saved_model.load(session, ["serve"], str(moved_v1))
        values, row_splits = session.run(["values:0", "row_splits:0"], {"text:0": TEXTS})
    assert tf.RaggedTensor.from_row_splits(values, row_splits).to_list() == expected


def test_saved_model_v1_in_tensorflow_2(moved_v1, expected):
    serve = tf.saved_model.load(str(moved_v1)).signatures["serving_default"]
    outputs = serve(text=tf.constant(TEXTS))
    assert tf.RaggedTensor.from_row_splits(outputs["values"], outputs["row_splits"]).to_list() == expected


def test_saved_model_v1_in_cpp(moved_v1):
    """The C API's loader is C++ LoadSavedModel, as in a model server. It runs the initializer, thus reads the asset."""
    library = ctypes.CDLL(str(Path(tf.sysconfig.get_lib()) / "libtensorflow_cc.so.2"))
    for name in ("TF_NewStatus", "TF_NewSessionOptions", "TF_NewGraph", "TF_LoadSessionFromSavedModel"):
        getattr(library, name).restype = ctypes.c_void_p
    library.TF_Message.restype = ctypes.c_char_p
    library.TF_Message.argtypes = library.TF_GetCode.argtypes = [ctypes.c_void_p]

    def load() -> tuple[int, str]:
        status = library.TF_NewStatus()
        library.TF_LoadSessionFromSavedModel(
            ctypes.c_void_p(library.TF_NewSessionOptions()),
            None,
            str(moved_v1).encode(),
            (ctypes.c_char_p * 1)(b"serve"),
            1,
            ctypes.c_void_p(library.TF_NewGraph()),
            None,
            ctypes.c_void_p(status),
        )
        return library.TF_GetCode(status), library.TF_Message(status).decode()

    assert load() == (0, "")
    asset = moved_v1 / "assets" / "vocabulary.dpsr"
    asset.write_bytes(asset.read_bytes()[:-1])
    code, message = load()
    assert code == tf.errors.DATA_LOSS and str(asset) in message


def test_saved_model_v2(path, tmp_path, expected):
    class Model(tf.Module):
        def __init__(self):
            super().__init__()
            self.table = VocabularyTable(tmp_path / "copy")

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def tokenize(self, text):
            return self.table.tokenize(text)

    shutil.copy(path, tmp_path / "copy")
    tf.saved_model.save(Model(), str(tmp_path / "export"))
    (tmp_path / "copy").unlink()
    (tmp_path / "export").rename(tmp_path / "moved")
    model = tf.saved_model.load(str(tmp_path / "moved"))
    assert model.tokenize(tf.constant(TEXTS)).to_list() == expected


def test_bad_files_fail_at_once(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        VocabularyTable(tmp_path / "missing")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match=f"{tmp_path / 'cut'}.*truncated"):
        VocabularyTable(tmp_path / "cut")


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda file: file.unlink(), tf.errors.NotFoundError),
        (lambda file: file.write_bytes(b"x" * 100), tf.errors.DataLossError),
        (lambda file: file.write_bytes(file.read_bytes()[:200]), tf.errors.DataLossError),
    ],
)
def test_load_names_a_bad_file(path, tmp_path, damage, error):
    copy = tmp_path / "copy"
    shutil.copy(path, copy)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        VocabularyTable(copy)
        damage(copy)
        with pytest.raises(error, match=str(copy)):
            session.run(tf.compat.v1.tables_initializer())


def test_table_without_its_initializer(path):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        ids = VocabularyTable(path).tokenize(tf.constant(TEXTS))
        with pytest.raises(tf.errors.FailedPreconditionError, match=r"no vocabulary is loaded.*tables_initializer"):
            session.run(ids)


def test_handle_of_another_resource():
    with pytest.raises(tf.errors.InvalidArgumentError):
        _ops.dpsr_tokenize(tf.raw_ops.VarHandleOp(dtype=tf.float32, shape=[], shared_name="v"), TEXTS)


def test_failed_load_keeps_the_vocabulary(path, tmp_path, expected):
    table = VocabularyTable(path)
    (tmp_path / "bad").write_bytes(b"")
    with pytest.raises(tf.errors.DataLossError):
        _ops.dpsr_vocabulary_load(table.resource_handle, str(tmp_path / "bad"))
    assert table.tokenize(TEXTS).to_list() == expected


def test_load_beside_tokenize(path, table, expected):
    failures = []

    def work(function):
        try:
            for _ in range(100):
                function()
        except Exception as error:
            failures.append(error)

    def tokenize():
        assert table.tokenize(TEXTS).to_list() == expected

    threads = [threading.Thread(target=work, args=[tokenize]) for _ in range(3)]
    threads.append(
        threading.Thread(target=work, args=[lambda: _ops.dpsr_vocabulary_load(table.resource_handle, str(path))])
    )
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("shape", [[], [1, 2]])
def test_text_is_a_vector(table, shape):
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"text has shape.*expected a vector"):
        table.tokenize(tf.fill(shape, "red"))


def test_filename_is_a_scalar(table):
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"filename has shape \[1\], expected a scalar"):
        _ops.dpsr_vocabulary_load(table.resource_handle, ["a"])


@pytest.mark.parametrize(("num_texts", "num_splits"), [(3, 4), (0, 1), (None, None)])
def test_inferred_shapes(num_texts, num_splits):
    with tf.Graph().as_default():
        text = tf.compat.v1.placeholder(tf.string, [num_texts])
        values, row_splits = _ops.dpsr_tokenize(_ops.dpsr_vocabulary_handle(), text)
        assert (values.shape.as_list(), row_splits.shape.as_list()) == ([None], [num_splits])
        values, row_splits = _ops.dpsr_tokenize(
            _ops.dpsr_vocabulary_handle(), tf.compat.v1.placeholder(tf.string, None)
        )
        assert (values.shape.rank, row_splits.shape.as_list()) == (1, [None])


def test_bad_shapes_fail_when_the_graph_is_built():
    with tf.Graph().as_default():
        handle = _ops.dpsr_vocabulary_handle()
        handles = tf.compat.v1.placeholder(tf.resource, [2])
        for text in (tf.compat.v1.placeholder(tf.string, []), tf.compat.v1.placeholder(tf.string, [None, 2])):
            with pytest.raises(ValueError, match="Shape must be rank 1"):
                _ops.dpsr_tokenize(handle, text)
        with pytest.raises(ValueError, match="Shape must be rank 0"):
            _ops.dpsr_tokenize(handles, tf.compat.v1.placeholder(tf.string, [None]))
        with pytest.raises(ValueError, match="Shape must be rank 0"):
            _ops.dpsr_vocabulary_load(handle, tf.compat.v1.placeholder(tf.string, [1]))


EVERY_KIND = TokenizerConfig(word_bigrams=True, markers=True)


@pytest.mark.parametrize("config", [None, EVERY_KIND, TokenizerConfig(letter_trigrams=False, number_parts=False)])
def test_tokenize_strings(config):
    tokens = tokenize_strings(TEXTS, config)
    assert tokens.dtype == tf.string and tokens.row_splits.dtype == tf.int64
    tokenizer = Tokenizer(config or TokenizerConfig())
    assert tokens.to_list() == [[token.encode() for token in tokenizer.tokenize(text)] for text in TEXTS]
    assert tokenize_strings(tf.zeros([0], tf.string), config).to_list() == []


def test_tokenize_strings_in_a_dataset():
    dataset = tf.data.Dataset.from_tensor_slices(TEXTS).batch(2).map(lambda text: tokenize_strings(text, EVERY_KIND))
    assert [row for batch in dataset for row in batch.to_list()] == tokenize_strings(TEXTS, EVERY_KIND).to_list()


def test_tokenize_strings_shapes():
    for num_texts, num_splits in ((3, 4), (None, None)):
        with tf.Graph().as_default():
            text = tf.compat.v1.placeholder(tf.string, [num_texts])
            values, row_splits = _ops.dpsr_tokenize_strings(text, config=EVERY_KIND.serialize())
            assert (values.shape.as_list(), row_splits.shape.as_list()) == ([None], [num_splits])
            with pytest.raises(ValueError, match="Shape must be rank 1"):
                tokenize_strings(tf.compat.v1.placeholder(tf.string, []))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"text has shape \[1,2\], expected a vector"):
        tokenize_strings([["a", "b"]])


def test_tokenize_strings_needs_a_valid_config():
    with pytest.raises(tf.errors.InvalidArgumentError, match="key word_unigrams is missing"):
        _ops.dpsr_tokenize_strings(TEXTS, config="tokenizer_version=1\n")


def test_large_batches_equal_small_ones(table):
    # Enough bytes for many blocks, with a text larger than a block in between.
    texts = [TEXTS[i % len(TEXTS)] + str(i).encode() for i in range(5000)]
    texts[1234] = b"red shoes " * 5000
    ids, tokens = table.tokenize(texts), tokenize_strings(texts)
    values, row_splits = table.vocabulary.encode_batch(texts)
    np.testing.assert_array_equal(ids.values, values)
    np.testing.assert_array_equal(ids.row_splits, row_splits)
    small = [row for begin in range(0, 5000, 50) for row in tokenize_strings(texts[begin : begin + 50]).to_list()]
    assert tokens.to_list() == small


def test_op_library_path():
    assert os.path.isabs(op_library_path()) and os.path.exists(op_library_path())
