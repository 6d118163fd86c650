"""The ranker: what it learns, its parts, resuming, and scores of a checkpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf
import yaml
from checkpoints import changed_config
from test_encoders import make_model

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.typed_config import from_dict
from dpsr_tf.config import Config
from dpsr_tf.data.ranking_batches import RankingBatches
from dpsr_tf.data.ranking_features import RankingFeatures
from dpsr_tf.data.request_log import OUTCOMES
from dpsr_tf.data.store import Store
from dpsr_tf.evaluation.judgments import fold_of
from dpsr_tf.evaluation.ranking_metrics import ndcg, session_auc
from dpsr_tf.evaluation.rankings import is_validated
from dpsr_tf.models.encoders import item_embeddings, placeholder
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.ranker import Ranker
from dpsr_tf.models.ranker_inputs import RankerInputs, dpsr_scorer, model_numbers
from dpsr_tf.models.ranker_scores import ranker_scores
from dpsr_tf.training.train import config_from_flags, train

v1 = tf.compat.v1

DAY = 86_400
SCHEMA = {
    "items": {
        "files": "items.jsonl",
        "id": "item_id",
        "text": "title",
        "features": ["brand", {"column": "price", "kind": "number", "boundaries": [50]}],
    },
    "users": {"files": "users.jsonl", "id": "user_id", "features": ["gender"]},
    "interactions": {
        "files": "log.jsonl",
        "query": "query",
        "item": "item_id",
        "user": "user_id",
        "type": "type",
        "time": "time",
        "position": "position",
        "held_out": {"last_days": 2},
    },
    "ranking": {"attributes": [], "price": "price"},
}
SMALL = {
    "model": {
        "kind": "ranker", "token_dim": 8, "feature_dim": 8, "hidden": [16, 8], "item_features": ["brand"],
        "history_length": 30,
    },
    "train": {
        "steps": 120, "batch_size": 32, "learning_rate": 0.1, "dense_optimizer": "adam", "dense_learning_rate": 0.01,
        "checkpoint_steps": 100,
    },
}  # fmt: skip
# What only texts, only numbers, or only histories tell.
KINDS = ("text", "number", "history")
WORDS, BRANDS = ("silk", "wool"), ("acme", "bolt")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """A log of three kinds of requests. In its last days all items are new, so that no counts tell which is good.

    text: "winter" wants wool, "summer" wants silk. number: the cheapest item is ordered. history: users buy the brand
    that they have bought before.
    """
    folder = tmp_path_factory.mktemp("ranker")
    rng = np.random.default_rng(1)
    items, log = [], []

    def item(title: str, brand: str, price: int) -> int:
        items.append({"item_id": len(items) + 1, "title": title, "brand": brand, "price": price})
        return len(items)

    pool: dict[tuple[int, str], list[int]] = {}
    for late in (0, 1):
        for kind in KINDS:
            # Of each pair of items, the second one has the other word, brand and a higher price, if its kind tells.
            of_kind = pool.setdefault((late, kind), [])
            for number in range(12):
                second = number % 2
                title = f"{WORDS[second]} coat" if kind == "text" else "coat"
                brand = BRANDS[second] if kind == "history" else "none"
                price = 20 + 60 * second + number if kind == "number" else 50
                of_kind.append(item(title, brand, price))
    users = [{"user_id": user, "gender": None} for user in range(1, 31)]
    for number in range(1200):
        late = number >= 900
        kind = KINDS[number % 3]
        user = int(rng.integers(1, 31))
        time = 1_700_000_000 + (number * DAY // 60 if not late else 18 * DAY + (number - 900) * DAY // 600)
        query, wanted = "coat", 0
        if kind == "text":
            query, wanted = ("summer", 0) if rng.random() < 0.5 else ("winter", 1)
        elif kind == "history":
            wanted = user % 2
        shown = rng.permutation(pool[late, kind])[:4]
        row = {"query": query, "user_id": user, "time": time}
        good = [i for i in shown if (int(i) - 1) % 2 == wanted]
        for place, i in enumerate(shown, 1):
            log.append(row | {"item_id": int(i), "type": "impression", "position": place})
            if i in good:
                log.append(row | {"item_id": int(i), "type": "order", "time": time + 5, "position": place})
    for name, rows in (("items", items), ("users", users), ("log", log)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return _ingested(folder, SCHEMA, "store")


def _ingested(folder, schema, name):
    from dpsr_tf.data.ingest import ingest
    from dpsr_tf.data.schema import load_schema
    from dpsr_tf.data.store import new_directory

    (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
    with new_directory(folder / name) as out:
        ingest(load_schema(folder / "schema.yaml"), folder, out)
    return Store(folder / name)


def _config(**changes):
    return changed_config(SMALL, **changes)


@pytest.fixture(scope="module")
def model(store, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "all"
    train(store, _config(), path)
    return path


def _held(store):
    file = store.held_requests()
    return RankingFeatures(store).of(file, np.arange(len(file["request.splits"]) - 1))


def _auc_by_kind(store, path):
    """Returns the session AUC of held-out requests of each kind."""
    shown = _held(store)
    score = ranker_scores(path, store)(shown)
    price, kinds = shown.numbers["item.price"], np.full(len(shown.item), 2)
    kinds[np.array(shown.queries)[shown.request] != "coat"] = 0
    kinds[(kinds == 2) & (price != 50)] = 1
    found = {}
    for place, kind in enumerate(KINDS):
        rows = kinds == place
        ordered = shown.outcome[rows] == OUTCOMES.index("order")
        found[kind] = session_auc(shown.request[rows], ordered, score[rows]).mean()
    return found


def test_it_learns_what_only_texts_only_numbers_or_only_histories_tell(store, model):
    assert min(_auc_by_kind(store, model).values()) > 0.9, _auc_by_kind(store, model)


def test_the_command_measures_a_ranker_on_requests_and_on_judged_lists(store, model, tmp_path, dpsr):
    flags = ["evaluate", f"--store={store.path}", "--rank", f"--system=ranker:{model}", "--bootstrap=0"]
    score, shown = ranker_scores(model, store), _held(store)

    def measured(*more):
        dpsr(*flags, *more, f"--json={tmp_path / 'out.json'}").succeeds()
        return json.loads((tmp_path / "out.json").read_text())["systems"][f"ranker:{model}"]

    expected = ndcg(shown.request, 2.0**shown.outcome - 1, score(shown), 10).mean()
    assert measured("--held_out", "--fold=all")["ndcg@10"] == pytest.approx(expected, abs=1e-4)
    # Rows of items, whose ids count from 1.
    queries, request, item = ["winter", "summer"], np.array([0, 0, 1, 1]), np.array([1, 0, 0, 1])
    grade = np.array([1, 0, 1, 0])
    file = tmp_path / "judged.tsv"
    lines = [f"{queries[r]}\t{i + 1}\t{g}\n" for r, i, g in zip(request, item, grade, strict=True)]
    file.write_text("query\titem\tgrade\n" + "".join(lines))
    judged = RankingFeatures(store).at_end(queries, request, np.zeros(4, int), item)
    expected = session_auc(request, grade > 0, score(judged)).mean()
    assert measured(f"--judgments={file}")["session_auc"] == pytest.approx(expected)


def test_without_numbers_and_histories_only_texts_tell(store, tmp_path):
    path = tmp_path / "texts"
    train(store, _config(train__steps=60, ranker__numbers=False, model__history_length=0), path)
    found = _auc_by_kind(store, path)
    # Items that differ in their price alone tie, but for rounding.
    assert found["text"] > 0.9 and 0.45 < found["number"] < 0.55
    assert 0.3 < found["history"] < 0.7


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        {"ranker__loss": "listwise", "model__history_pooling": "sum", "ranker__crosses": 2, "ranker__products": False},
        {"ranker__position": True, "ranker__propensity_weights": True, "ranker__dropout": 0.1,
         "ranker__matches": False, "model__user_features": ["gender"], "validation__queries": 50},
    ],
)  # fmt: skip
def test_options_train_and_score(store, tmp_path, changes):
    train(store, _config(train__steps=4, train__checkpoint_steps=2, **changes), tmp_path / "model")
    shown = _held(store)
    scores = ranker_scores(tmp_path / "model", store)(shown)
    assert scores.dtype == np.float32 and np.isfinite(scores).all() and scores.std() > 0
    if "validation__queries" not in changes:
        return
    assert is_validated(f" ranker:{tmp_path / 'model'}") and not is_validated("bm25")
    assert is_validated(f"model:{tmp_path / 'model'}"), "what the config says, whatever kind of model it is"
    # The best checkpoint is measured on requests with a click of the validation fold.
    lines = [json.loads(line) for line in (tmp_path / "model" / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    best = max(lines, key=lambda line: line["ndcg@10"])
    found = ranker_scores(tmp_path / "model" / "best", store)(shown)
    inside = np.array([fold_of(query) == "validation" for query in shown.queries])[shown.request]
    figures = ndcg(shown.request[inside], 2.0 ** shown.outcome[inside] - 1, found[inside], 10)
    assert best["queries"] == min(50, len(figures))
    if len(figures) <= 50:
        assert best["ndcg@10"] == pytest.approx(figures.mean(), abs=1e-5)


@pytest.mark.long
def test_the_retrieval_model_is_read_only_when_its_score_is_needed(store, tmp_path, monkeypatch):
    towers, opened = make_model(tmp_path / "towers", store, token_dim=4, embedding_dim=4).path, []

    def counted(directory, store):
        opened.append(directory)
        return dpsr_scorer(directory, store)

    for module in ("ranker_inputs", "ranker_scores"):
        monkeypatch.setattr(f"dpsr_tf.models.{module}.dpsr_scorer", counted)
    changes = {"train__checkpoint_steps": 2, "validation__queries": 50, "ranker__dpsr_model": str(towers)}
    assert model_numbers(_config(**changes).ranker) == ("dpsr_score",)
    changes["ranker__list_similarity"] = True
    train(store, _config(train__steps=4, **changes), tmp_path / "model")
    read = {number.name for number in ModelDirectory.open(tmp_path / "model").features.numbers}
    assert read >= {"dpsr_score", "list_similarity"}
    assert len(opened) == 2, "by the training, and by the validation for both checkpoints"
    shown, score = _held(store), ranker_scores(tmp_path / "model", store)
    scored = dpsr_scorer(str(towers), store)(shown)
    found = score(scored)
    assert len(opened) == 2, "these items have the score"
    np.testing.assert_allclose(score(shown), found, rtol=1e-4, atol=1e-5)
    assert len(opened) == 3
    train(store, _config(train__steps=2, ranker__numbers=False, **changes), tmp_path / "texts")
    assert len(opened) == 3, "this ranker reads no numbers"


@pytest.mark.long
def test_a_resumed_training_is_the_same_training(store, tmp_path, capsys):
    config = _config(train__steps=12, train__checkpoint_steps=6, train__average_decay=0.9)
    train(store, config, tmp_path / "whole")
    out = capsys.readouterr().out
    assert "of 889 requests for training have an item that is preferred to another" in out
    # Numbers that say nothing are named.
    assert "which say nothing: " in out and "number_match has no value" in out and "item.1.order" not in out
    read = {number.name for number in ModelDirectory.open(tmp_path / "whole").features.numbers}
    assert "item.price" in read and "number_match" not in read

    train(store, _config(train__steps=6, train__checkpoint_steps=6, train__average_decay=0.9), tmp_path / "parts")
    capsys.readouterr()
    train(store, config, tmp_path / "parts")
    assert "which say nothing" not in capsys.readouterr().out
    whole, parts = (tf.train.load_checkpoint(tf.train.latest_checkpoint(str(tmp_path / n))) for n in ("whole", "parts"))
    names = whole.get_variable_to_shape_map()
    assert names.keys() == parts.get_variable_to_shape_map().keys() and "ranker/hidden_0/item_kernel" in names
    for name in names:
        np.testing.assert_allclose(whole.get_tensor(name), parts.get_tensor(name), rtol=1e-5, atol=1e-6, err_msg=name)


def test_scores_do_not_depend_on_the_order_or_on_other_requests(store, model):
    shown, rng = _held(store), np.random.default_rng(2)
    score = ranker_scores(model, store)
    order = rng.permutation(len(shown.item))
    mixed = shown._replace(
        numbers={name: values[order] for name, values in shown.numbers.items()},
        codes={},
        **{n: getattr(shown, n)[order] for n in ("request", "user", "time", "item", "position", "outcome")},
    )
    all_scores = score(shown)
    np.testing.assert_allclose(score(mixed), all_scores[order], rtol=1e-4, atol=1e-5)
    rows = shown.request == 3
    one = RankingFeatures(store).of(store.held_requests(), np.array([3]))
    np.testing.assert_allclose(score(one), all_scores[rows], rtol=1e-4, atol=1e-5)
    features = RankingFeatures(store)
    none = features.at_end(["coat", "winter"], np.zeros(0, int), np.zeros(0, int), np.zeros(0, int))
    assert score(none).shape == (0,)


def test_the_parts_that_a_server_computes_give_the_score(store, model):
    """Item parts one by one, the request once, pairs last, against `scores`."""
    directory = ModelDirectory.open(model)
    shown = RankingFeatures(store).of(store.held_requests(), np.array([7]))
    lists, n = RankerInputs(store, directory.features, 30)(shown), len(shown.item)
    with tf.Graph().as_default(), v1.Session() as session:
        inputs = tf.nest.map_structure(placeholder, lists)
        ranker = Ranker(directory.config, directory.features)
        whole = ranker.scores(inputs)
        vectors = ranker.item_vectors(inputs.items)
        mine = tf.gather(vectors, inputs.candidates.values)
        items = tf.stack([ranker.item_hidden(mine[i : i + 1], inputs.item_numbers[i : i + 1])[0] for i in range(n)])
        of_items = ranker.item_codes(inputs.items)
        history, history_codes = (tf.gather(values, inputs.history.values) for values in (vectors, of_items))
        request = ranker.request(
            inputs.query,
            inputs.user,
            history,
            inputs.history.row_splits,
            inputs.history_types,
            inputs.request_numbers,
            history_codes,
        )
        codes = tf.gather(of_items, inputs.candidates.values)
        alone = tf.constant([0, 1], tf.int64)
        rows = [slice(i, i + 1) for i in range(n)]
        one = [
            ranker.logits(request, mine[row], items[row], alone, inputs.pair_numbers[row], codes[row])[0]
            for row in rows
        ]
        v1.train.Saver().restore(session, directory.last_checkpoint())
        feed = dict(zip(tf.nest.flatten(inputs), tf.nest.flatten(lists), strict=True))
        expected, found = session.run([whole, tf.stack(one)], feed)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ranker_scores(model, store)(shown), expected, rtol=1e-4, atol=1e-5)


# Batches.


def test_batches_are_a_function_of_the_step(store):
    features = RankingFeatures(store)
    batches = RankingBatches(store, features, seed=3)

    def first(steps, **options):
        return [numbers for _, (_, numbers) in zip(range(steps), batches.batches(7, **options), strict=False)]

    whole = first(20, first_step=0)
    np.testing.assert_array_equal(first(9, first_step=11), whole[11:])
    workers = [first(10, first_step=0, worker_index=i, num_workers=2) for i in range(2)]
    np.testing.assert_array_equal(np.stack(workers, 1).reshape(20, 7), whole)
    many = np.concatenate(first(-(-batches.usable // 7), first_step=0))[: batches.usable]
    assert len(np.unique(many)) == batches.usable
    file = store.requests()[0]
    for shown, numbers in [next(batches.batches(7, 5))]:
        expected = features.of(file, numbers)
        np.testing.assert_array_equal(shown.item, expected.item)
        np.testing.assert_array_equal(shown.request, expected.request)
        assert shown.queries == expected.queries
        np.testing.assert_array_equal(shown.numbers["bm25.title"], expected.numbers["bm25.title"])


def test_batches_of_several_shards_have_the_requests_they_name(store, tmp_path):
    from dpsr_tf.data.ingest import ingest
    from dpsr_tf.data.schema import load_schema
    from dpsr_tf.data.store import new_directory

    folder = store.path.parent
    with new_directory(tmp_path / "sharded") as out:
        ingest(load_schema(folder / "schema.yaml"), folder, out, shards=3)
    sharded = Store(tmp_path / "sharded")
    features = RankingFeatures(sharded)
    batches = RankingBatches(sharded, features, seed=1)
    shown, numbers = next(batches.batches(16, 2))
    firsts = np.cumsum([0, *(len(file["request.splits"]) - 1 for file in sharded.requests())])
    for place, number in enumerate(numbers):
        shard = int(np.searchsorted(firsts, number, side="right") - 1)
        expected = features.of(sharded.requests()[shard], np.array([number - firsts[shard]]))
        rows = shown.request == place
        np.testing.assert_array_equal(shown.item[rows], expected.item)
        np.testing.assert_array_equal(shown.numbers["item.30.click"][rows], expected.numbers["item.30.click"])
        assert shown.queries[place] == expected.queries[0]


def test_requests_without_a_preference_are_left_out(store):
    features = RankingFeatures(store)
    batches = RankingBatches(store, features, seed=1)
    outcome, splits = store.requests()[0]["shown.outcome"], store.requests()[0]["request.splits"]
    differing = [i for i in range(len(splits) - 1) if len(set(outcome[splits[i] : splits[i + 1]])) > 1]
    assert batches.usable == len(differing) < batches.requests
    _, numbers = next(batches.batches(batches.usable, 0))
    assert sorted(numbers) == differing
    # Clicks and orders count the same, so nothing is preferred.
    with pytest.raises(CommandError, match="has nothing to learn"):
        RankingBatches(store, features, seed=1, gains=(1, 1, 1, 1))


# Bad input.


def test_a_store_without_requests_is_an_error(store, tmp_path):
    schema = {key: value for key, value in SCHEMA.items() if key != "ranking"}
    folder = tmp_path / "plain"
    folder.mkdir()
    for name in ("items", "users", "log"):
        (folder / f"{name}.jsonl").write_bytes((store.path.parent / f"{name}.jsonl").read_bytes())
    plain = _ingested(folder, schema, "store")
    with pytest.raises(CommandError, match="add the section `ranking` to the schema"):
        train(plain, _config(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_each_kind_of_model_refuses_the_work_of_the_other(store, model, tmp_path):
    with pytest.raises(CommandError, match="holds a model of kind ranker, expected retrieval"):
        item_embeddings(model, store)
    with pytest.raises(CommandError, match=r"model\.kind was 'ranker' and is 'retrieval'"):
        train(store, Config(), model)
    config = from_dict(Config, {"model": {"token_dim": 4, "embedding_dim": 4}, "train": {"steps": 1}}, "test")
    ModelDirectory.create_or_resume(tmp_path / "towers", config, store)
    with pytest.raises(CommandError, match="holds a model of kind retrieval, expected ranker"):
        ranker_scores(tmp_path / "towers", store)


def test_overwrite_keeps_the_retrieval_model_that_a_ranker_reads(dpsr, store, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SMALL))
    towers = make_model(tmp_path / "towers", store, token_dim=4, embedding_dim=4)
    flags = [f"--store={store.path}", f"--config={tmp_path / 'config.yaml'}", f"--out={towers.path}", "--overwrite"]
    outcome = dpsr("train", *flags, f"--set=ranker.dpsr_model={towers.path}")
    outcome.fails(2, f"ranker.dpsr_model={towers.path}: --overwrite removes this model; choose another --out")
    missing = tmp_path / "none"
    dpsr("train", *flags, f"--set=ranker.dpsr_model={missing}").fails(1, f"{missing}: holds no model")
    assert towers.last_checkpoint().endswith("model.ckpt-7")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.num_heads=2", "num_heads is 2, which cannot be combined with kind ranker"),
        ("model.hidden=[]", "expected at least one layer"),
        ("train.loss=softmax", "train.loss is 'softmax', which cannot be combined with model.kind ranker"),
        ("quantizer.sub_spaces=8", "expected 0, because a ranker has no index"),
        ("ranker.list_similarity=true", "dpsr_model is empty; give the directory of a retrieval model"),
        ("ranker.gains=[0, 1]", "expected 4: of unclicked, click, cart and order"),
        ("ranker.gains=[0, 2, 1, 3]", "expected numbers that rise"),
    ],
)
def test_settings_that_a_ranker_cannot_have(tmp_path, assignment, message):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SMALL))
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        config_from_flags(str(tmp_path / "config.yaml"), [assignment])
