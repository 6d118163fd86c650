"""The systems that `--system` names, as retrievers.

Packages above this one, and packages of others, register their kinds of system as entry points of the group
"dpsr.systems": KIND -> a function

    make(corpus: Corpus, *operands: str) -> Retriever

which opens what `--system=KIND:OPERAND` names. It raises CommandError if that cannot be opened. Its module is imported
only when the kind is asked for.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

import numpy as np

from dpsr_common.errors import UsageError
from dpsr_tf.evaluation import baselines
from dpsr_tf.evaluation.corpus import Corpus
from dpsr_tf.evaluation.fusion import Fusion
from dpsr_tf.evaluation.retriever import Retriever

GROUP = "dpsr.systems"

# How each system is written after --system=, and what it is. Kinds that other packages register and that are not here
# are listed after these.
_DESCRIPTIONS = {
    "bm25": "BM25 over the text that the towers read: words, and in scripts without spaces characters and bigrams",
    "bm25-bigrams": "BM25 as above, with pairs of neighbouring words in addition",
    "bm25-words": "BM25 over runs of ASCII letters and digits in the titles, as in published figures",
    "bm25:OPTIONS": "bm25 with options joined by +: stem, trigrams=WEIGHT, k1=NUMBER, b=NUMBER, COLUMN=WEIGHT",
    "popularity": "the most popular items, for every query",
    "random": "random items",
    "model:DIR": "the last checkpoint of a model, with exact search over all items of the store",
    "index:DIR": "an index, with the query tower of its model",
    "servable:DIR": "a servable in this process: a version directory, or the base path of several versions",
    "server:HOST:PORT/MODEL": "a model server or proxy",
    "search:HOST:PORT/PIPELINE": "a pipeline of a search gateway, for anonymous users",
    "rrf(A,B,...)": "reciprocal rank fusion of systems",
    "weighted(A:0.7,B:0.3)": "weighted sum of the systems' scores, each scaled to 0 .. 1 per query",
}

_BASELINES = ("bm25", "bm25-bigrams", "bm25-words", "popularity", "random")


def systems_help() -> str:
    """Returns one line per system: how it is written and what it is."""
    width = max(map(len, _DESCRIPTIONS))
    return "\n".join(f"  {name:<{width}} {what}" for name, what in _all_descriptions().items())


def system_names() -> str:
    """Returns how each system is written, separated by commas."""
    return ", ".join(_all_descriptions())


def _all_descriptions() -> dict[str, str]:
    described = {name.partition(":")[0] for name in _DESCRIPTIONS}
    others = {
        f"{kind}:OPERAND": f"registered by the package {entry.dist.name if entry.dist else entry.module}"
        for kind, entry in sorted(_registered().items())
        if kind not in described
    }
    return _DESCRIPTIONS | others


class Systems:
    """Opens systems over one corpus. A system that stands in several fusions is opened once."""

    def __init__(self, corpus: Corpus, seed: int = 1):
        """Takes the corpus and the seed of the system `random`."""
        self._corpus, self._seed = corpus, seed
        self._opened: dict[str, Retriever] = {}

    def make(self, spec: str) -> Retriever:
        """Returns the system that `spec` names. Raises UsageError for other names, CommandError if opening fails."""
        parse(spec)
        return self._get(spec.strip())

    def _get(self, spec: str) -> Retriever:
        if spec not in self._opened:
            self._opened[spec] = self._open(spec)
        return self._opened[spec]

    def _open(self, spec: str) -> Retriever:
        kind, parts, weights = parse(spec)
        corpus = self._corpus
        if kind in ("rrf", "weighted"):
            return Fusion([self._get(part) for part in parts], weights)
        if kind.startswith("bm25"):
            return _bm25(corpus, spec, kind, *parts)
        if kind == "popularity":
            return baselines.Popularity(corpus.item_ids, np.asarray(corpus.popularity))
        if kind == "random":
            return baselines.Random(corpus.item_ids, self._seed)
        if kind == "model":
            # Imports TensorFlow, which no baseline needs.
            from dpsr_tf.models.encoders import exact_search

            return exact_search(parts[0], corpus.need_store(spec))
        make: Callable[..., Retriever] = _registered()[kind].load()
        return make(corpus, *parts)


def _bm25(corpus: Corpus, spec: str, kind: str, options: str = "") -> baselines.Bm25:
    """Opens one of the systems `bm25`, `bm25:OPTIONS`, `bm25-bigrams` and `bm25-words`."""
    where = f"--system={spec}"
    chosen = baselines.Bm25Options.parse(options, where) if options else baselines.Bm25Options()
    fields = chosen.fields(corpus.texts(), where)
    if kind == "bm25-bigrams":
        fields = [dataclasses.replace(fields[0], tokenize=baselines.unigrams_and_bigrams())]
    elif kind == "bm25-words":
        fields = [baselines.Field(corpus.titles, baselines.plain_words())]
    return baselines.Bm25(corpus.item_ids, fields, chosen.k1, chosen.b)


def _registered() -> dict[str, EntryPoint]:
    """Returns the kinds of system that are entry points, in this project and in other packages."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def parse(spec: str) -> tuple[str, list[str], list[float] | None]:
    """Splits the name of a system.

    Returns:
        Its kind, its parts (the systems of a fusion, else the operands), and the weights of `weighted`, else None.

    Raises:
        UsageError: `spec` names no system.
    """
    return _parse(spec, f"--system={spec}")


def _parse(spec: str, where: str) -> tuple[str, list[str], list[float] | None]:
    spec = spec.strip()
    fusion = re.fullmatch(r"(rrf|weighted)\((.*)\)", spec)
    if fusion:
        parts, weights = _split(fusion[2]), None
        if fusion[1] == "weighted":
            named = [part.rpartition(":") for part in parts]
            if not all(re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight) and float(weight) > 0 for _, _, weight in named):
                raise UsageError(f"{where}: expected a weight above 0 with each system, as in weighted(bm25:0.3,A:0.7)")
            weights = [float(weight) for _, _, weight in named]
            parts = [system for system, _, _ in named]
        if len(parts) < 2:
            raise UsageError(f"{where}: fuses {len(parts)} system, expected at least two, as in rrf(bm25,model:DIR)")
        for part in parts:
            _parse(part, where)
        return fusion[1], parts, weights
    if spec in _BASELINES:
        return spec, [], None
    kind, _, rest = spec.partition(":")
    if kind == "bm25" and rest:
        baselines.Bm25Options.parse(rest, where)
        return kind, [rest], None
    if kind == "server" and kind in _registered():
        target, slash, model = rest.rpartition("/")
        if slash and target and model:
            return kind, [target, model], None
    elif rest and (kind == "model" or kind in _registered()):
        return kind, [rest], None
    part = "" if where.endswith(f"={spec}") else f" has '{spec}',"
    raise UsageError(f"{where}:{part} expected one of {system_names()}")


def _split(text: str) -> list[str]:
    """Splits at commas outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]
