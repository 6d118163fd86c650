"""`dpsr export`: query tower and index in one servable (section 5.2.1): one version to deploy, one call to make."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from absl import flags

from dpsr_export import faiss_ops
from dpsr_export.embeddings import checkpoint_fingerprint
from dpsr_export.index import FORMAT, FORMAT_VERSION, check_files
from dpsr_tf import __version__
from dpsr_tf.config import to_dict
from dpsr_tf.data.dataset import Tokens
from dpsr_tf.data.store import new_directory, read_manifest
from dpsr_tf.errors import CommandError, op_message
from dpsr_tf.evaluation.checkpoint import is_personal
from dpsr_tf.models.two_tower import TwoTower
from dpsr_tf.training.model_directory import ModelDirectory
from dpsr_tokenizer import FormatError, PackedFile, tf_ops

USAGE = """
Usage: dpsr export --model=MODEL --index=INDEX --out=BASE [--version_number=N]

Writes the servable BASE/N: a SavedModel whose graph tokenizes a query, embeds it and looks its nearest items up in the
index it carries. N is one more than the highest version there if left out. BASE is what `dpsr serve` takes.
"""

v1 = tf.compat.v1

REQUIRED_FLAGS = ("model", "index", "out")


def define_flags(values: flags.FlagValues) -> None:
    """Flags of `dpsr export`."""
    flags.DEFINE_string("model", None, "model directory", flag_values=values)
    flags.DEFINE_string("index", None, "index directory made from that model", flag_values=values)
    flags.DEFINE_string("out", None, "base path of the servable's versions", flag_values=values)
    flags.DEFINE_integer("version_number", None, "version directory to write", 0, flag_values=values)


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr export`."""
    base = Path(values.out)
    version = values.version_number
    if version is None:
        version = 1 + max((int(p.name) for p in base.glob("*") if p.name.isdigit()), default=0)
    with new_directory(base / str(version)) as out:
        signatures = export(ModelDirectory.open(values.model), Path(values.index), out)
    print(f"servable {base / str(version)}: signatures {', '.join(signatures)}")


def export(model: ModelDirectory, index_dir: Path, out: Path) -> list[str]:
    """Writes a servable into the directory `out`, asks it one query as a last check, and returns its signatures.

    There is no signature `score` where the item tower reads features: a text alone does not tell an item's score.

    Raises:
        CommandError: the model is personalised, the index was made from another model or checkpoint or is damaged, or
            the written servable does not answer.
    """
    if is_personal(model.config.model):
        raise CommandError(
            f"{model.path}: its query tower reads users (model.user_features, model.history_length, "
            f"model.query_history_length), and such models cannot be exported yet; train one with [], 0 and 0 there, "
            f"or measure this one with `dpsr evaluate --system=model:{model.path}`"
        )
    index = read_manifest(index_dir / "index.json", FORMAT, FORMAT_VERSION, "dpsr index")
    checkpoint = model.path / index["checkpoint"]
    expected = {
        "vocabulary_fingerprint": f"{model.vocabulary.fingerprint:016x}",
        "embedding_dim": model.config.model.embedding_dim,
    }
    for key, value in expected.items():
        if index[key] != value:
            raise CommandError(
                f"{index_dir}: {key} is {index[key]}, but model {model.path} has {value}; "
                f"build the index from this model"
            )
    if not tf.io.gfile.exists(f"{checkpoint}.index"):
        raise CommandError(
            f"{index_dir}: was made from {index['checkpoint']}, which {model.path} no longer holds; "
            f"run `dpsr index` again"
        )
    fingerprint = checkpoint_fingerprint(str(checkpoint))
    if index["checkpoint_fingerprint"] != fingerprint:
        raise CommandError(
            f"{index_dir}: was made from another {index['checkpoint']} (fingerprint {index['checkpoint_fingerprint']}) "
            f"than that of {model.path} ({fingerprint}); run `dpsr index` again"
        )
    check_files(index_dir, index)
    shutil.rmtree(out)  # the builder insists on making it
    signatures = _write_saved_model(model, index, index_dir, str(checkpoint), out)
    extra = out / "assets.extra"
    extra.mkdir()
    shutil.copyfile(index_dir / "item_titles.tsv.gz", extra / "item_titles.tsv.gz")
    manifest = {
        "format": "dpsr-servable",
        "version": 1,
        "dpsr_version": __version__,
        "tensorflow_version": tf.__version__,
        "op_libraries": ["libdpsr_tokenizer_ops.so", "libdpsr_retrieval_ops.so"],
        "k": model.config.serving.k,
        "config": to_dict(model.config),
        "index": {key: value for key, value in index.items() if key not in ("format", "version", "model")},
    }
    (extra / "dpsr_manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    _check(out, index_dir)
    return signatures


def _write_saved_model(
    model: ModelDirectory, index: dict[str, Any], index_dir: Path, checkpoint: str, out: Path
) -> list[str]:
    with tf.Graph().as_default():
        vocabulary = tf_ops.VocabularyTable(str(model.vocabulary_path))
        items = faiss_ops.FaissIndexTable(
            str(index_dir / "items.faiss"), str(index_dir / "item_ids.dpsr"), parameters=index["parameters"]
        )
        towers = TwoTower(model.config.model, model.features)
        query = v1.placeholder(tf.string, [None], "query")
        item_text = v1.placeholder(tf.string, [None], "item_text")
        k = v1.placeholder(tf.int32, [], "k")

        def tokens(text: tf.Tensor) -> Tokens:
            ragged = vocabulary.tokenize(text)
            return Tokens(ragged.values, ragged.row_splits)

        query_embedding = towers.query_embedding(tokens(query))  # [batch, heads, dim]

        def found(count: tf.Tensor) -> dict[str, tf.Tensor]:
            item_ids, scores, heads = items.search(query_embedding, count)
            return {"item_ids": item_ids, "scores": scores, "heads": heads}

        signatures = {
            "serving_default": ({"query": query}, found(tf.constant(model.config.serving.k))),
            "search": ({"query": query, "k": k}, found(k)),
            "query_embedding": ({"query": query}, {"query_embedding": query_embedding}),
        }
        if not model.features.item:
            score = towers.pair_scores(query_embedding, towers.item_embedding(tokens(item_text)))
            signatures["score"] = ({"query": query, "item_text": item_text}, {"score": score})
        with v1.Session() as session:
            v1.train.Saver().restore(session, checkpoint)
            builder = v1.saved_model.Builder(str(out))
            builder.add_meta_graph_and_variables(
                session,
                [tf.saved_model.SERVING],
                signature_def_map={
                    name: v1.saved_model.predict_signature_def(inputs, outputs)
                    for name, (inputs, outputs) in signatures.items()
                },
                assets_collection=v1.get_collection(v1.GraphKeys.ASSET_FILEPATHS),
                main_op=v1.tables_initializer(),
            )
            builder.save()
    return list(signatures)


def _check(servable: Path, index_dir: Path) -> None:
    """Loads the written servable and asks it a short and an empty query: what cannot answer must not be deployed."""
    try:
        ids = PackedFile(str(index_dir / "item_ids.dpsr"), "item_ids")["id"]
        with tf.Graph().as_default(), v1.Session() as session:
            loaded = v1.saved_model.load(session, [tf.saved_model.SERVING], str(servable))
            signature = loaded.signature_def["search"]
            found = session.run(
                signature.outputs["item_ids"].name,
                {signature.inputs["query"].name: ["a", ""], signature.inputs["k"].name: min(10, len(ids))},
            )
    except (FormatError, FileNotFoundError) as error:
        raise CommandError(f"{error}; run `dpsr index` again") from None
    except tf.errors.OpError as error:
        raise CommandError(f"the servable does not load or answer: {op_message(error)}") from None
    if not np.isin(found[0], np.append(ids, -1)).all() or (found[1] != -1).any():
        raise CommandError(
            f"the servable answers {found.tolist()} to the queries 'a' and '', expected ids of the index and nothing"
        )
