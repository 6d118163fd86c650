"""The rewriter: what it learns, that decoding agrees with its probabilities, its options, and resuming."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import tensorflow as tf
import yaml
from checkpoints import changed_config

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.typed_config import from_dict
from dpsr_tf.config import CONFIGS, Config, load_config
from dpsr_tf.data.ingest import ingest
from dpsr_tf.data.schema import load_schema
from dpsr_tf.data.store import Store, new_directory
from dpsr_tf.models.features import SequenceSpec
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.rewriter import END, RESERVED, Rewriter
from dpsr_tf.models.rewriter_texts import RewriteGraph, log_probabilities, rewriter
from dpsr_tf.training.train import config_from_flags, train
from dpsr_tokenizer import Vocabulary, WordSequences

v1 = tf.compat.v1

COLOURS = ("yellow", "purple", "orange", "silver")
# What people call a thing, and what titles call it.
THINGS = (("trash can", "rubbish bin"), ("sofa", "couch"), ("flashlight", "torch"), ("wrench", "spanner"))
SMALL = {
    "model": {"kind": "rewriter", "token_dim": 32},
    "train": {
        "steps": 120, "batch_size": 64, "learning_rate": 0.1, "initial_accumulator": 1e-6, "dense_optimizer": "adam",
        "dense_learning_rate": 0.01, "checkpoint_steps": 60, "schedule": "linear",
    },
    "rewriter": {
        "inner_width": 32, "click_pairs": 16, "sampled_words": 20, "title_pairs": 0.3, "query_pairs": 0.3,
        "form_rate": 0.0, "title_subsampling": 0.0,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """Queries of people and of those who know the titles' words, with clicks on the same items."""
    folder = tmp_path_factory.mktemp("rewriter")
    items, log = [], []
    for colour in COLOURS:
        for asked, titled in THINGS:
            number = len(items) + 1
            items.append({"item_id": number, "title": f"{colour} {titled} deluxe {number}"})
            for query in (f"{colour} {asked}", f"{colour} {titled}"):
                log += [{"query": query, "item_id": number, "time": 1_700_000_000 + len(log) * 86_400}] * 3
    schema = {
        "items": {"files": "items.jsonl", "id": "item_id", "text": "title"},
        "interactions": {"files": "log.jsonl", "query": "query", "item": "item_id", "time": "time",
                         "held_out": {"query_share": 0.2}},
        "rewriting": {"min_count": 1, "max_title_words": 8, "max_query_words": 6, "meaning_share": 0},
    }  # fmt: skip
    for name, rows in (("items", items), ("log", log)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
    with new_directory(folder / "store") as out:
        ingest(load_schema(folder / "schema.yaml"), folder, out)
    return Store(folder / "store")


def _config(**changes):
    return changed_config(SMALL, **changes)


@pytest.fixture(scope="module")
def model(store, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small"
    train(store, _config(), path)
    return path


@pytest.fixture(scope="module")
def rewrite(store, model):
    """The model as a function."""
    return rewriter(model, store)


def test_it_learns_synonyms_from_clicks_and_spelling_from_titles(rewrite):
    found = rewrite(["purple couch", "yellow flashlight", "silvr spanner", "orange wrnch"], 3, 0)
    texts = [[text for text, _ in row] for row in found]
    assert "purple sofa" in texts[0] and "yellow torch" in texts[1]
    assert "silver spanner" in texts[2] and "orange wrench" in texts[3]


def test_rewrites_are_ordered_distinct_and_never_the_text_itself(rewrite):
    queries = ["Purple  COUCH", "torch", "orange", "trash can silver"] * 20
    for row, query in zip(rewrite(queries, 5, 0), queries, strict=True):
        texts, logs = [text for text, _ in row], [log for _, log in row]
        assert len(set(texts)) == len(texts) == 5 and logs == sorted(logs, reverse=True)
        assert " ".join(query.lower().split()) not in texts and all(texts) and max(logs) <= 0
        assert all(len(set(text.split())) == len(text.split()) for text in texts)
    # A text's rewrites do not depend on the batch.
    assert [t for t, _ in rewrite(["torch"], 5, 0)[0]] == [t for t, _ in rewrite(queries, 5, 0)[1]]


def test_a_text_without_words_has_no_rewrites(rewrite):
    assert [bool(row) for row in rewrite(["torch", "", "  ", "?!", "\x00", "\ufffd"], 2, 0)] == [True] + [False] * 5


def test_sampling_depends_on_the_seed_alone(model):
    rewrite = rewriter(model, method="sampling")
    queries = ["purple couch", "silver torch"]
    assert rewrite(queries, 3, 5) == rewrite(queries, 3, 5)
    assert any(rewrite(queries, 3, 5) != rewrite(queries, 3, seed) for seed in range(6, 12))


def test_n_below_one_is_refused(rewrite):
    with pytest.raises(ValueError, match="n is 0, expected at least 1"):
        rewrite(["torch"], 0, 0)


def test_beams_have_the_probabilities_of_whole_texts(store, model, rewrite):
    check_scores(store, model, rewrite(QUERIES, 3, 0))


QUERIES = ["silver torch", "orange couch"]


def check_scores(store, path, found) -> None:
    words, score = WordSequences(Vocabulary(str(store.words_path))), log_probabilities(path)
    for query, row in zip(QUERIES, found, strict=True):
        assert len(row) == 3
        for text, log in row:
            target = words.encode([text], max_words=10, ends=True)
            mean = score("direct", [query], target)[0]
            assert log == pytest.approx(float(mean) * np.count_nonzero(target), abs=1e-3)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"rewriter__decoder": "transformer", "rewriter__forward_weight": 0.0, "rewriter__backward_weight": 0.0},
        {"rewriter__shared": False, "rewriter__sampled_words": 0, "rewriter__path": "titles",
         "validation__queries": 5, "train__average_decay": 0.9, "rewriter__cycle_weight": 0.5,
         "rewriter__cycle_start": 1, "rewriter__cycle_queries": 4, "rewriter__cycle_titles": 2},
    ],
)  # fmt: skip
def test_options_train_and_decode_as_they_score(store, tmp_path, changes):
    """Beams, which decode with cached states, give the probabilities of a whole text at once."""
    path = tmp_path / "model"
    train(store, _config(train__steps=4, train__checkpoint_steps=4, **changes), path)
    check_scores(store, path, rewriter(path, store, path="direct")(QUERIES, 3, 0))
    if "rewriter__path" in changes:
        assert all(row for row in rewriter(path)(["silver torch"], 2, 0))
        lines = [json.loads(line) for line in (path / "validation.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [4] and all(line["log_probability"] < 0 for line in lines)
        assert ModelDirectory.open(path / "best", "rewriter").last_checkpoint().endswith("-4")


@pytest.mark.long
def test_a_resumed_training_is_the_same_training(store, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-60"\n')
    train(store, _config(), tmp_path / "model")
    one, two = (tf.train.load_checkpoint(str(path / "model.ckpt-120")) for path in (model, tmp_path / "model"))
    for name in one.get_variable_to_shape_map():
        np.testing.assert_allclose(one.get_tensor(name), two.get_tensor(name), rtol=0.02, atol=0.01, err_msg=name)


def test_the_sampled_softmax_has_the_right_mean():
    words, spec = 60, SequenceSpec(num_words=60, num_pieces=30, max_pieces=3)
    rng = np.random.default_rng(1)
    pieces = rng.integers(0, 30, (words, 3)).astype(np.int32)
    targets = np.array([4, 9, 4, 20], np.int32)
    sums, exact = [], None
    with tf.Graph().as_default():
        v1.set_random_seed(1)  # of the weights
        step = v1.placeholder(tf.int64, [])
        graph = Rewriter(_config(), spec, pieces, step=step)
        hidden = tf.constant(rng.normal(size=(4, 32)).astype(np.float32))
        sampled, places = graph.candidates(tf.constant(targets), 10, 0)
        every, same = graph.candidates(tf.constant(targets), 0, 0)
        # Reserved words are never drawn.
        outputs = [
            tf.reduce_sum(tf.exp(sampled.logits(hidden)), 1),
            tf.reduce_sum(tf.exp(every.logits(hidden))[:, RESERVED:], 1),
            tf.gather(sampled.ids, places),
        ]
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            for number in range(600):
                total, exact, found = session.run(outputs, {step: number})
                sums.append(total)
                assert found.tolist() == targets.tolist() and session.run(same).tolist() == targets.tolist()
    assert sampled.words.end == 0 and every.words.end == END
    # The mean of Z is right, though its logarithm is smaller in the mean.
    np.testing.assert_allclose(np.mean(sums, 0), exact, rtol=0.05)


def test_the_graph_of_a_rewriter_has_ops_of_tensorflow_and_of_the_tokenizer_only(model):
    with tf.Graph().as_default() as graph:
        texts = v1.placeholder(tf.string, [None])
        rewrites, logs = RewriteGraph(ModelDirectory.open(model))(texts, 3, tf.constant(1, tf.int64))
        assert rewrites.dtype == tf.string and logs.dtype == tf.float32
        definition = graph.as_graph_def()
    ops = {node.op for node in definition.node}
    ops |= {node.op for function in definition.library.function for node in function.node_def}
    own = {op for op in ops if op.startswith("Dpsr")}
    assert own == {"DpsrTokenizeStrings", "DpsrVocabularyHandle", "DpsrVocabularyLoad", "DpsrWordSequences"}
    assert not ops & {"PyFunc", "EagerPyFunc", "PyFuncStateless"}


def test_a_model_is_refused_where_another_kind_is_needed(store, model, tmp_path):
    with pytest.raises(CommandError, match="holds a model of kind rewriter, expected retrieval"):
        ModelDirectory.open(model, "retrieval")
    with pytest.raises(CommandError, match=r"rewriter.layers was 1 and is 2"):
        train(store, _config(rewriter__layers=2), model)
    # How it is asked may change.
    assert ModelDirectory.open(model).difference(_config(rewriter__method="sampling"), store) is None
    with pytest.raises(CommandError, match="holds no model"):
        rewriter(tmp_path)


def test_a_store_without_sequences_is_refused(click_store, tmp_path):
    with pytest.raises(UsageError, match=r"add the section `rewriting: {}` to the schema"):
        train(click_store, _config(), tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewriter": {"direct_weight": 0}}, "direct_weight is 0, expected more, because path is direct"),
        ({"rewriter": {"path": "titles", "forward_weight": 0}}, "forward_weight is 0, expected more, because path is"),
        ({"rewriter": {"cycle_weight": 1, "backward_weight": 0}}, "cycle_weight is 1, which needs forward_weight"),
        ({"rewriter": {"title_pairs": 0.8, "query_pairs": 0.4}}, "expected a sum of at most 1"),
        ({"rewriter": {"heads": 3}}, "rewriter.heads is 3, expected a divisor of model.token_dim, 64"),
        ({"model": {"num_heads": 2}}, "num_heads is 2, which cannot be combined with kind rewriter"),
        ({"train": {"loss": "softmax"}}, "train.loss is 'softmax', which cannot be combined with model.kind rewriter"),
    ],
)
def test_settings_that_do_not_fit_are_errors(changes, message):
    data = {"model": {"kind": "rewriter"}}
    for section, values in changes.items():
        data[section] = {**data.get(section, {}), **values}
    with pytest.raises(UsageError, match=message):
        from_dict(Config, data, "test")


def test_the_shipped_config_can_be_read():
    config = load_config(CONFIGS / "rewriter.yaml")
    assert config.model.kind == "rewriter" and config_from_flags(str(CONFIGS / "rewriter.yaml"), []) == config
    assert math.isclose(config.rewriter.title_pairs + config.rewriter.query_pairs, 0.8, abs_tol=0.2)
