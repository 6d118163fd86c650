"""SavedModels for the tests of the model server, written by TensorFlow's two writers."""

from __future__ import annotations

import shutil
from pathlib import Path

import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

v1 = tf.compat.v1


def write_half_plus(path: Path, addend: float) -> None:
    """A TF1 export: `serving_default`, x float [n] -> y = x / 2 + addend."""
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None], name="x")
        y = tf.add(x / 2.0, v1.get_variable("addend", initializer=float(addend)), name="y")
        session.run(v1.global_variables_initializer())
        builder = v1.saved_model.Builder(str(path))
        builder.add_meta_graph_and_variables(
            session,
            [v1.saved_model.tag_constants.SERVING],
            {"serving_default": v1.saved_model.predict_signature_def({"x": x}, {"y": y})},
        )
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
    """A TF2 export whose signatures are `serving_default` (half) and the other methods of _Signatures."""
    module = _Signatures()
    names = ("pair", "text", "many", "negatives", "fail", "gate")
    signatures = {"serving_default": module.half} | {name: getattr(module, name) for name in names}
    tf.saved_model.save(module, str(path), signatures=signatures)


def write_unknown_op(path: Path, op: str) -> None:
    """A model that needs `op`, which no TensorFlow has."""
    write_half_plus(path, 0.0)
    file = path / "saved_model.pb"
    saved_model = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    for node in saved_model.meta_graphs[0].graph_def.node:
        if node.name == "y":
            node.op = op
    file.write_bytes(saved_model.SerializeToString())


def publish(source: Path, base_path: Path, version: int) -> None:
    """Copies the SavedModel `source` into place as `version`, all at once as an exporter does."""
    temporary = base_path / f".{version}.tmp"
    shutil.copytree(source, temporary)
    temporary.rename(base_path / str(version))
