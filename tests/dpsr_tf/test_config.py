from __future__ import annotations

import dataclasses
import re

import pytest
import yaml

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.typed_config import from_dict, to_dict
from dpsr_tf.config import (
    CONFIGS,
    Config,
    IndexConfig,
    ModelConfig,
    ServingConfig,
    TrainConfig,
    load_config,
    save_config,
    shipped_config,
)
from dpsr_tf.training.train import config_from_flags


def message(tmp_path, text):
    """What load_config says about a file with this text; its first word is always the file."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def test_defaults_are_the_numbers_of_the_paper():
    config = Config()
    assert config.train.margin == 0.1
    assert config.train.learning_rate == 0.01
    assert config.train.batch_size == 64
    assert config.model.embedding_dim == 64
    assert config.index.factory == "", "the default index is that of the model's quantizer, or exact"


def test_an_empty_file_and_no_key_give_the_defaults(tmp_path):
    for text in ("", "# nothing\n", "train: {}\n", "{}"):
        (tmp_path / "config.yaml").write_text(text)
        assert load_config(tmp_path / "config.yaml") == Config()


def test_every_default_is_allowed_by_its_own_range():
    assert from_dict(Config, to_dict(Config()), "defaults") == Config()


def test_every_option_has_help():
    for section in (ModelConfig, TrainConfig, IndexConfig, ServingConfig):
        for field in dataclasses.fields(section):
            assert field.metadata["help"], f"{section.__name__}.{field.name}"


def test_round_trip(tmp_path):
    config = Config(
        model=ModelConfig(token_dim=32, hidden=(256, 128), embedding_dim=16),
        train=TrainConfig(steps=7, batch_size=2, learning_rate=0.5, margin=0.0, mixing_ratio=1.0, seed=0),
        index=IndexConfig(factory="IVF16,Flat", parameters="nprobe=4"),
        serving=ServingConfig(k=5),
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved == to_dict(config)
    assert set(saved["train"]) == {field.name for field in dataclasses.fields(TrainConfig)}, "defaults are written too"


def test_a_file_changes_only_what_it_names(tmp_path):
    (tmp_path / "config.yaml").write_text("train:\n  margin: 0.25\n")
    assert load_config(tmp_path / "config.yaml") == Config(train=TrainConfig(margin=0.25))


@pytest.mark.parametrize(
    ("text", "train"),
    [
        ("train: {learning_rate: 1}", TrainConfig(learning_rate=1.0)),
        ("train: {learning_rate: 1.0e-3}", TrainConfig(learning_rate=0.001)),
        # What Python and most people write; YAML 1.1 alone would read a text.
        ("train: {learning_rate: 1e-3}", TrainConfig(learning_rate=0.001)),
        ("train: {mixing_ratio: 0}", TrainConfig(mixing_ratio=0.0)),
        ("train: {margin: 2}", TrainConfig(margin=2.0)),
        ("train: {batch_size: 2}", TrainConfig(batch_size=2)),
        ("train: {seed: 2147483647}", TrainConfig(seed=2147483647)),
    ],
)
def test_numbers_at_the_bounds_and_whole_numbers_for_floats(tmp_path, text, train):
    (tmp_path / "config.yaml").write_text(text)
    loaded = load_config(tmp_path / "config.yaml").train
    assert loaded == train
    assert [type(value) for value in vars(loaded).values()] == [type(value) for value in vars(train).values()]


@pytest.mark.parametrize(("text", "hidden"), [("[]", ()), ("[8]", (8,)), ("[16, 8]", (16, 8)), ("8", (8,))])
def test_a_list_may_be_one_value(tmp_path, text, hidden):
    (tmp_path / "config.yaml").write_text(f"model: {{hidden: {text}}}")
    assert load_config(tmp_path / "config.yaml").model.hidden == hidden


def test_unknown_keys_get_a_suggestion(tmp_path):
    text = message(tmp_path, "train: {learnin_rate: 0.1}")
    assert "train: unknown key 'learnin_rate'" in text
    assert "did you mean 'learning_rate'?" in text
    assert "batch_size" in text and "checkpoint_steps" in text, "all allowed keys are listed"

    text = message(tmp_path, "trian: {steps: 1}")
    assert "unknown key 'trian'" in text and "did you mean 'train'?" in text
    assert "model, train, ranker, rewriter, validation, cluster, quantizer, index, serving" in text


def test_unknown_keys_without_a_near_name_get_the_list_only(tmp_path):
    text = message(tmp_path, "index: {zzz: 1}")
    assert "index: unknown key 'zzz', expected one of factory, parameters" in text
    assert "did you mean" not in text


@pytest.mark.parametrize(
    ("old", "new"), [("supervised", "labels"), ("both", "both"), ("impressions", "impressions"), ("[a]", "['a']")]
)
def test_a_renamed_key_names_the_new_key_and_value(tmp_path, old, new):
    expected = f"train: key 'own_negatives' was renamed; write 'own_negative_source: {new}'"
    assert expected in message(tmp_path, f"train: {{own_negatives: {old}}}")
    with pytest.raises(UsageError, match=f"--set=train.own_negatives={re.escape(old)}: {re.escape(expected)}"):
        config_from_flags(None, [f"train.own_negatives={old}"])


def test_a_key_that_is_no_text_is_unknown(tmp_path):
    assert "unknown key '7'" in message(tmp_path, "7: 1")
    assert "unknown key 'True'" in message(tmp_path, "train: {yes: 1}")


@pytest.mark.parametrize(
    ("text", "where", "value", "allowed"),
    [
        ("train: {steps: many}", "train: steps", "'many'", "a whole number"),
        ("train: {steps: 1.0}", "train: steps", "1.0", "a whole number"),
        ("train: {steps: '7'}", "train: steps", "'7'", "a whole number"),
        ("train: {steps: [7]}", "train: steps", "[7]", "a whole number"),
        ("train: {steps: null}", "train: steps", "None", "a whole number"),
        ("train: {steps: true}", "train: steps", "True", "a whole number"),
        ("train: {margin: high}", "train: margin", "'high'", "a number"),
        ("train: {margin: false}", "train: margin", "False", "a number"),
        ("train: {margin: 2024-01-01}", "train: margin", "datetime.date(2024, 1, 1)", "a number"),
        ("index: {factory: 5}", "index: factory", "5", "a text"),
        ("index: {factory: no}", "index: factory", "False", "a text"),
        ("model: {hidden: [8, wide]}", "model: hidden", "'wide'", "a whole number"),
        ("model: {hidden: [8, 8.5]}", "model: hidden", "8.5", "a whole number"),
        ("model: {hidden: [8, true]}", "model: hidden", "True", "a whole number"),
        ("model: {hidden: [[8]]}", "model: hidden", "[8]", "a whole number"),
        ("model: {hidden: {a: 8}}", "model: hidden", "{'a': 8}", "a whole number"),
    ],
)
def test_wrong_types_name_key_value_and_type(tmp_path, text, where, value, allowed):
    assert f"{where} is {value}, expected {allowed}" in message(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "where", "value", "allowed"),
    [
        ("train: {steps: 0}", "train: steps", "0", "1 or more"),
        ("train: {batch_size: 1}", "train: batch_size", "1", "2 to 65536"),
        ("train: {batch_size: 65537}", "train: batch_size", "65537", "2 to 65536"),
        ("train: {margin: -0.1}", "train: margin", "-0.1", "0 to 2"),
        ("train: {margin: 2.01}", "train: margin", "2.01", "0 to 2"),
        ("train: {margin: .nan}", "train: margin", "nan", "0 to 2"),
        ("train: {margin: .inf}", "train: margin", "inf", "0 to 2"),
        ("train: {mixing_ratio: 1.1}", "train: mixing_ratio", "1.1", "0 to 1"),
        ("train: {learning_rate: 0}", "train: learning_rate", "0.0", "1e-08 to 100"),
        ("train: {seed: -1}", "train: seed", "-1", "0 to"),
        ("train: {seed: 2147483648}", "train: seed", "2147483648", "2147483647"),
        ("model: {hidden: [8, 0]}", "model: hidden", "0", "1 to 65536"),
        ("model: {embedding_dim: 4097}", "model: embedding_dim", "4097", "1 to 4096"),
        ("serving: {k: 10001}", "serving: k", "10001", "1 to 10000"),
    ],
)
def test_out_of_range_names_key_value_and_range(tmp_path, text, where, value, allowed):
    text = message(tmp_path, text)
    assert f"{where} is {value}, expected " in text
    assert allowed in text


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("type_weights: {buy: 2}", "type_weights has 'buy', expected some of unclicked, click, cart, order"),
        ("type_margins: {skip: 0.1}", "type_margins has 'skip', expected some of unclicked, click, cart, order"),
        ("type_weights: {order: -1}", "type_weights: order is -1.0, expected 0 to 1000000"),
        ("type_weights: {unclicked: 0.5}", "but num_own_negatives is 0 and own_negative_source is impressions"),
        (
            "{num_own_negatives: 2, own_negative_source: both, type_margins: {unclicked: 0.05}}",
            "but num_own_negatives is 2 and own_negative_source is both",
        ),
        ("{loss: softmax, type_margins: {order: 0.2}}", "cannot be combined with loss softmax"),
        ("type_margins: {cart: 0.2, order: 0.15}", "gives unclicked 0, click 0.1, cart 0.2, order 0.15"),
        ("{margin: 0.3, type_margins: {order: 0.2}}", "gives unclicked 0, click 0.3, cart 0.3, order 0.2"),
    ],
)
def test_ladders_that_cannot_be(tmp_path, text, fragment):
    assert fragment in message(tmp_path, f"train: {text if text.startswith('{') else '{' + text + '}'}")


def test_errors_carry_the_help_of_the_key(tmp_path):
    assert "(delta of the hinge loss)" in message(tmp_path, "train: {margin: 3}")
    assert "(delta of the hinge loss)" in message(tmp_path, "train: {margin: x}")


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("train: 5", "train: is 5, expected a section of `key: value` lines"),
        ("train: [steps]", "train: is ['steps'], expected a section"),
        ("- train", "holds a list, expected `key: value` lines"),
        ("just words", "holds a str, expected `key: value` lines"),
    ],
)
def test_what_is_no_mapping(tmp_path, text, fragment):
    assert fragment in message(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "train: {steps: 1",
        "train:\n\tsteps: 1\n",
        "a: b: c",
        "!!python/object:os.system {}",
        "train: {steps: 2024-99-99}",  # YAML takes it for a date, and Python has no such date
    ],
)
def test_bad_yaml(tmp_path, text):
    assert "not valid YAML" in message(tmp_path, text)


def test_bad_utf8(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"index: {factory: \xff}")
    with pytest.raises(UsageError, match="not valid YAML"):
        load_config(path)


def test_a_number_that_no_float_holds(tmp_path):
    text = message(tmp_path, f"train: {{margin: 1{'0' * 400}}}")
    assert "train: margin is 1" in text and "0 to 2" in text


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(UsageError, match=r"none\.yaml: no such file, expected a YAML file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_usage_errors_end_with_status_2_and_are_command_errors():
    assert (CommandError.status, UsageError.status) == (1, 2)
    assert issubclass(UsageError, CommandError)


@dataclasses.dataclass(frozen=True)
class _Required:
    name: str = dataclasses.field(metadata={"help": "what to call it"})
    kind: str | None = dataclasses.field(default=None, metadata={"choices": ("cat", "dog")})


def test_required_and_optional_keys_and_choices():
    assert from_dict(_Required, {"name": "x"}, "pets") == _Required("x")
    assert from_dict(_Required, {"name": "x", "kind": None}, "pets") == _Required("x")
    assert from_dict(_Required, {"name": "x", "kind": "dog"}, "pets") == _Required("x", "dog")
    with pytest.raises(UsageError, match=r"pets: key 'name' is missing \(what to call it\)"):
        from_dict(_Required, {}, "pets")
    with pytest.raises(UsageError, match="pets: kind is 'cow', expected one of cat, dog"):
        from_dict(_Required, {"name": "x", "kind": "cow"}, "pets")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_of_the_package_is_one(path):
    assert load_config(path) == from_dict(Config, shipped_config(path.stem), path.stem)


@pytest.mark.parametrize("name", ["shop", "homedepot"])
def test_configs_of_the_demo_are_there(name):
    assert (CONFIGS / f"{name}.yaml").is_file()
