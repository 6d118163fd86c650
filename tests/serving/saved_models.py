"""SavedModels for the tests of the model server, written by TensorFlow's two writers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tensorflow as tf
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2

v1 = tf.compat.v1


def write_half_plus(path: Path, addend: float, item_changes: bool = False, slow_calls: bool = False) -> None:
    """A TF1 export: `serving_default`, x float [n] -> y = x / 2 + addend; and `apply_changes`, to which nothing is new.

    Without `item_changes` it has only the first signature. With `slow_calls` as well, a call of the second one takes
    tenths of a second, and the first one also returns `calls`, int32 []: how often that was called.
    """
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None], name="x")
        y = tf.add(x / 2.0, v1.get_variable("addend", initializer=float(addend)), name="y")
        answers = {"y": y}
        if slow_calls:
            calls = v1.get_variable("calls", initializer=0, use_resource=True)
            answers["calls"] = calls.read_value()
        session.run(v1.global_variables_initializer())
        signatures = {"serving_default": v1.saved_model.predict_signature_def({"x": x}, answers)}
        if item_changes:
            counts = ("offset", "items", "open", "sealed", "segments", "hidden", "ignored", "not_indexed", "updated")
            state = {name: tf.constant(0, tf.int64) for name in counts} | {"changes": tf.constant(0)}
            state |= {"last_time": tf.constant(0.0, tf.float64), "drift": tf.constant(1.0)}
            if slow_calls:
                with tf.control_dependencies([tf.reduce_sum(tf.random.uniform([30_000_000]))]):
                    called = calls.assign_add(1, read_value=False)
                with tf.control_dependencies([called]):
                    state["changes"] = tf.constant(0)
            most = {"max_changes": v1.placeholder_with_default(1024, [])}
            signatures["apply_changes"] = v1.saved_model.predict_signature_def(most, state)
        builder = v1.saved_model.Builder(str(path))
        builder.add_meta_graph_and_variables(session, [v1.saved_model.tag_constants.SERVING], signatures)
        builder.save()


class _Signatures(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def half(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": x / 2.0}

    @tf.function(
        input_signature=[tf.TensorSpec([None], tf.float32, name="a"), tf.TensorSpec([None], tf.int64, name="b")]
    )
    def pair(self, a: tf.Tensor, b: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"a": a, "b": b, "sum": a + tf.cast(b, tf.float32)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def text(self, text: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"doubled": tf.strings.join([text, text]), "bytes": tf.strings.length(text)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image")])
    def image(self, image: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"image_bytes": tf.identity(image)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def scalar(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"sum": tf.reduce_sum(x)}

    @tf.function(input_signature=[tf.TensorSpec([], tf.float32, name="x")])
    def many(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {f"y{i}": x + i for i in range(8)}

    @tf.function(input_signature=[tf.TensorSpec([], tf.int64, name="n")])
    def negatives(self, n: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": tf.fill([n], tf.constant(-1, tf.int8))}

    @tf.function(input_signature=[tf.TensorSpec([], tf.string, name="message")])
    def fail(self, message: tf.Tensor) -> dict[str, tf.Tensor]:
        with tf.control_dependencies([tf.debugging.Assert(False, [message], summarize=10)]):
            return {"message": tf.identity(message)}

    @tf.function(
        input_signature=[tf.TensorSpec([], tf.string, name="begun"), tf.TensorSpec([], tf.string, name="release")]
    )
    def gate(self, begun: tf.Tensor, release: tf.Tensor) -> dict[str, tf.Tensor]:
        """Writes the file `begun`, then runs until the file `release` exists."""
        with tf.control_dependencies([tf.io.write_file(begun, "")]):
            turns = tf.while_loop(
                lambda turns: tf.equal(tf.size(tf.io.matching_files(release)), 0),
                lambda turns: [turns + 1],
                [tf.constant(0, tf.int64)],
            )
        return {"turns": turns[0]}


def write_signatures(path: Path) -> None:
    """A TF2 export whose signatures are `serving_default` (half) and the other methods of _Signatures.

    `defaulted` is `pair` with a default for b: [7].
    """
    module = _Signatures()
    names = ("pair", "text", "image", "scalar", "many", "negatives", "fail", "gate")
    signatures = {"serving_default": module.half} | {name: getattr(module, name) for name in names}
    tf.saved_model.save(module, str(path), signatures=signatures)
    with _edited(path) as meta_graph:
        meta_graph.signature_def["defaulted"].CopyFrom(meta_graph.signature_def["pair"])
        meta_graph.signature_def["defaulted"].defaults["b"].CopyFrom(tf.make_tensor_proto([7], tf.int64))


@contextmanager
def _edited(path: Path) -> Iterator[meta_graph_pb2.MetaGraphDef]:
    """Gives the graph of a SavedModel, and writes it back when it has been changed."""
    file = path / "saved_model.pb"
    saved_model = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    yield saved_model.meta_graphs[0]
    file.write_bytes(saved_model.SerializeToString())


def write_unknown_op(path: Path, op: str) -> None:
    """A model that needs `op`, which no TensorFlow has."""
    write_half_plus(path, 0.0)
    with _edited(path) as meta_graph:
        for node in meta_graph.graph_def.node:
            if node.name == "y":
                node.op = op


def publish(source: Path, base_path: Path, version: int) -> None:
    """Copies the SavedModel `source` into place as `version`, all at once as an exporter does."""
    temporary = base_path / f".{version}.tmp"
    shutil.copytree(source, temporary)
    temporary.rename(base_path / str(version))


def write_half_plus_two(path: Path, form: str = "tf1") -> None:
    """The model of TensorFlow Serving's examples: y = x / 2 + 2 and y2 = x / 2 + 3, as `form` "tf1", "tf2" or "keras".

    TF1 and TF2 have the signatures `serving_default` (x -> y), `regress_x_to_y` and `regress_x_to_y2` (tf.Examples with
    the float feature x -> outputs [n, 1]), `classify_x_to_y` (-> scores [n, 1]), `classify_with_labels` (-> classes and
    scores [n, 2]) and, against the rules, `classify_wrongly` (classes [n, 0], scores [n, 1]); TF1 names their methods.
    Keras has `serving_default` alone: x [n, 1] -> y [n, 1].
    """
    if form == "keras":
        x = tf.keras.Input([1], name="x")
        constant = tf.constant_initializer
        layer = tf.keras.layers.Dense(1, name="y", kernel_initializer=constant(0.5), bias_initializer=constant(2.0))
        tf.saved_model.save(tf.keras.Model(x, layer(x)), str(path))
    elif form == "tf2":
        _write_half_plus_two_tf2(path)
    else:
        _write_half_plus_two_tf1(path)


_EXAMPLES = {"x": tf.io.FixedLenFeature([1], tf.float32)}
_LABELS = [[b"small", b"large"]]


def _half_plus(x: tf.Tensor, addend: float) -> tf.Tensor:
    return x * 0.5 + addend


def _classes(y: tf.Tensor) -> dict[str, tf.Tensor]:
    return {"classes": tf.tile(tf.constant(_LABELS), [tf.shape(y)[0], 1]), "scores": tf.concat([-y, y], 1)}


def _write_half_plus_two_tf2(path: Path) -> None:
    examples = tf.TensorSpec([None], tf.string, name="inputs")

    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
        def predict(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"y": _half_plus(x, 2.0)}

        @tf.function(input_signature=[examples])
        def regress(self, inputs: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"outputs": _half_plus(tf.io.parse_example(inputs, _EXAMPLES)["x"], 2.0)}

        @tf.function(input_signature=[examples])
        def regress2(self, inputs: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"outputs": _half_plus(tf.io.parse_example(inputs, _EXAMPLES)["x"], 3.0)}

        @tf.function(input_signature=[examples])
        def classify(self, inputs: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"scores": _half_plus(tf.io.parse_example(inputs, _EXAMPLES)["x"], 2.0)}

        @tf.function(input_signature=[examples])
        def labels(self, inputs: tf.Tensor) -> dict[str, tf.Tensor]:
            return _classes(_half_plus(tf.io.parse_example(inputs, _EXAMPLES)["x"], 2.0))

        @tf.function(input_signature=[examples])
        def wrongly(self, inputs: tf.Tensor) -> dict[str, tf.Tensor]:
            x = tf.io.parse_example(inputs, _EXAMPLES)["x"]
            return {"classes": tf.as_string(x)[:, :0], "scores": x}

    module = Module()
    signatures = {
        "serving_default": module.predict,
        "regress_x_to_y": module.regress,
        "regress_x_to_y2": module.regress2,
        "classify_x_to_y": module.classify,
        "classify_with_labels": module.labels,
        "classify_wrongly": module.wrongly,
    }
    tf.saved_model.save(module, str(path), signatures=signatures)


def _write_half_plus_two_tf1(path: Path) -> None:
    info = v1.saved_model.build_tensor_info

    def signature(inputs: dict[str, tf.Tensor], outputs: dict[str, tf.Tensor], method: str) -> object:
        return v1.saved_model.build_signature_def(
            {key: info(value) for key, value in inputs.items()},
            {key: info(value) for key, value in outputs.items()},
            f"tensorflow/serving/{method}",
        )

    with tf.Graph().as_default(), v1.Session() as session:
        serialized = v1.placeholder(tf.string, [None], name="tf_example")
        x = tf.identity(v1.io.parse_example(serialized, _EXAMPLES)["x"], name="x")
        y, y2 = tf.identity(_half_plus(x, 2.0), name="y"), tf.identity(_half_plus(x, 3.0), name="y2")
        examples = {"inputs": serialized}
        signatures = {
            "serving_default": signature({"x": x}, {"y": y}, "predict"),
            "regress_x_to_y": signature(examples, {"outputs": y}, "regress"),
            "regress_x_to_y2": signature(examples, {"outputs": y2}, "regress"),
            "classify_x_to_y": signature(examples, {"scores": y}, "classify"),
            "classify_with_labels": signature(examples, _classes(y), "classify"),
            "classify_wrongly": signature(examples, {"classes": tf.as_string(x)[:, :0], "scores": x}, "classify"),
        }
        # An asset, as vocabularies are.
        asset = path.parent / "words.txt"
        asset.write_text("three\n")
        name = tf.constant(str(asset))
        v1.add_to_collection(v1.GraphKeys.ASSET_FILEPATHS, name)
        read = v1.get_variable("words", initializer=tf.constant(""), use_resource=True)
        start = read.assign(tf.io.read_file(name))
        session.run(v1.global_variables_initializer())
        builder = v1.saved_model.Builder(str(path))
        builder.add_meta_graph_and_variables(
            session,
            [v1.saved_model.tag_constants.SERVING],
            signatures,
            assets_collection=v1.get_collection(v1.GraphKeys.ASSET_FILEPATHS),
            main_op=start.op,
        )
        builder.save()
        asset.unlink()


def write_counter(path: Path) -> None:
    """A TF2 export with state: `get_counter`, `incr_counter`, `incr_counter_by` (delta), `reset_counter` -> output."""

    class Counter(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = tf.Variable(0.0)

        @tf.function(input_signature=[])
        def get_counter(self) -> dict[str, tf.Tensor]:
            return {"output": tf.identity(self.value)}

        @tf.function(input_signature=[])
        def incr_counter(self) -> dict[str, tf.Tensor]:
            return {"output": self.value.assign_add(1.0)}

        @tf.function(input_signature=[tf.TensorSpec([], tf.float32, name="delta")])
        def incr_counter_by(self, delta: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"output": self.value.assign_add(delta)}

        @tf.function(input_signature=[])
        def reset_counter(self) -> dict[str, tf.Tensor]:
            return {"output": self.value.assign(0.0)}

    counter = Counter()
    names = ("get_counter", "incr_counter", "incr_counter_by", "reset_counter")
    tf.saved_model.save(counter, str(path), signatures={name: getattr(counter, name) for name in names})


def write_warmup(version: Path, *records: bytes) -> None:
    """The warm-up file of a version: these records, PredictionLogs unless a test says otherwise."""
    folder = version / "assets.extra"
    folder.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(folder / "tf_serving_warmup_requests")) as writer:
        for record in records:
            writer.write(record)
