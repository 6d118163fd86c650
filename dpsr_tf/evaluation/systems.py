"""The systems that `--system` names, as retrievers.

Packages above this one register their kinds of system as entry points of the group "dpsr.systems": KIND -> a function

    make(corpus: Corpus, *operands: str) -> Retriever

which opens what `--system=KIND:OPERAND` names. It raises CommandError if that cannot be opened, and is imported only
when it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

import numpy as np

from dpsr_common.errors import UsageError
from dpsr_tf.evaluation import retriever as retrievers
from dpsr_tf.evaluation.corpus import Corpus
from dpsr_tf.evaluation.retriever import Retriever

KINDS = """
  bm25                   BM25 over the titles: words, and the characters and their bigrams of unspaced scripts
  bm25-bigrams           the same with pairs of neighbouring words
  bm25-words             BM25 over runs of ASCII letters and digits, k1 1.2, b 0.75
  popularity             the most popular items, for every query
  random                 items by chance
  model:DIR              a model's last checkpoint, exact search over all items of the store
  index:DIR              an index and the query tower of its model
  servable:DIR           a servable in this process: a version directory, or the base path of several
  server:HOST:PORT/MODEL a model server or proxy
  rrf(A,B,...)           reciprocal rank fusion of systems
  weighted(A:0.7,B:0.3)  weighted sum of their scores, each brought to 0 .. 1 for each query
"""
NAMES = ", ".join(line.split("  ")[1].strip().split()[0] for line in KINDS.strip("\n").splitlines())

GROUP = "dpsr.systems"

_TOKENIZE = {
    "bm25": retrievers.unigrams,
    "bm25-bigrams": retrievers.unigrams_and_bigrams,
    "bm25-words": retrievers.plain_words,
}


class Systems:
    """Makes retrievers over one corpus; what several fusions share is made once."""

    def __init__(self, corpus: Corpus, seed: int = 1):
        """`seed`: of the system `random`."""
        self._corpus, self._seed = corpus, seed
        self._made: dict[str, Retriever] = {}

    def make(self, spec: str) -> Retriever:
        """The system that `spec` names. Raises UsageError for another, CommandError if it cannot be opened."""
        parse(spec)
        return self._make(spec.strip())

    def _make(self, spec: str) -> Retriever:
        if spec not in self._made:
            self._made[spec] = self._new(spec)
        return self._made[spec]

    def _new(self, spec: str) -> Retriever:
        kind, parts, weights = parse(spec)
        corpus = self._corpus
        if kind in ("rrf", "weighted"):
            return retrievers.Fusion([self._make(part) for part in parts], weights)
        if kind in _TOKENIZE:
            return retrievers.Bm25(corpus.item_ids, corpus.titles, tokenize=_TOKENIZE[kind]())
        if kind == "popularity":
            return retrievers.Popularity(corpus.item_ids, np.asarray(corpus.popularity))
        if kind == "random":
            return retrievers.Random(corpus.item_ids, self._seed)
        if kind == "model":
            from dpsr_tf.models.encoders import exact_search  # TensorFlow, which no baseline needs

            return exact_search(parts[0], corpus.need_store(spec))
        make: Callable[..., Retriever] = _registered()[kind].load()
        return make(corpus, *parts)


def _registered() -> dict[str, EntryPoint]:
    """The kinds of system that other packages have registered."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def parse(spec: str) -> tuple[str, list[str], list[float] | None]:
    """Kind, parts (systems that are fused; else the operands) and weights of a system's name.

    Raises:
        UsageError: it names none.
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
            raise UsageError(f"{where}: fuses {len(parts)} system, expected two or more, as in rrf(bm25,model:DIR)")
        for part in parts:
            _parse(part, where)
        return fusion[1], parts, weights
    if spec in (*_TOKENIZE, "popularity", "random"):
        return spec, [], None
    kind, _, rest = spec.partition(":")
    if kind == "server" and kind in _registered():
        target, slash, model = rest.rpartition("/")
        if slash and target and model:
            return kind, [target, model], None
    elif rest and (kind == "model" or kind in _registered()):
        return kind, [rest], None
    part = "" if where.endswith(f"={spec}") else f" has '{spec}',"
    raise UsageError(f"{where}:{part} expected one of {NAMES}")


def _split(text: str) -> list[str]:
    """The parts between commas that stand in no brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]
