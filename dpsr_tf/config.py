"""The one YAML file that drives train, index and export, read into typed dataclasses.

Each field has a help text and a range. An unknown key, a wrong type or a value out of range is an error that names the
key, the value, and what is allowed. The config is saved with every checkpoint and servable.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import yaml

from dpsr_common.strict_yaml import read_yaml
from dpsr_common.typed_config import from_dict, option, to_dict

# Folder of the config files that come with this package.
CONFIGS = Path(__file__).parent / "configs"
# What came of an item shown, from worst to best.
UNCLICKED = "unclicked"
LADDER = (UNCLICKED, "click", "cart", "order")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The two towers (DPSR sections 4.1 to 4.3), a ranker (docs/ranking.md), or a rewriter (docs/rewriting.md).

    Features have the names of the schema; "*" stands for all of them. The defaults make a small retrieval model: texts
    only, one head, no ReLU layers. The paper's is `dpsr_tf/configs/dpsr.yaml`, and its ranker
    `dpsr_tf/configs/ranker.yaml`.
    """

    kind: str = option(
        "retrieval",
        "what is trained: two towers, which find items for a query; a ranker, which orders items that were found; or a "
        "rewriter, which writes other words for a query",
        choices=("retrieval", "ranker", "rewriter"),
    )
    token_dim: int = option(
        64,
        "width of the token embeddings, and of the vector that the layers of a head read; for a rewriter, the width of "
        "all layers",
        1,
        4096,
    )
    feature_dim: int = option(16, "width of the embedding of a categorical, number or multi feature", 1, 4096)
    hidden: tuple[int, ...] = option(
        (), "widths of the ReLU layers of the item tower and of each query head, or of a ranker", 1, 65536
    )
    embedding_dim: int = option(64, "d, the width of query and item embeddings", 1, 4096)
    num_heads: int = option(1, "m, the number of query heads: embeddings of one query (4.2)", 1, 16)
    temperature: float = option(
        0.1, "beta of the soft dot product over heads (equation 1). 0 takes the largest inner product", 0, 1e3
    )
    share_text_table: bool = option(True, "whether query text and item text share one embedding table")
    aligned_start: bool = option(
        True,
        "whether towers and heads start as the same rotation of the text. If false, each starts with random weights",
    )
    encoder: str = option(
        "",
        "package.module:function, which makes an encoder of texts of your own (docs/own_encoder.md). If empty, a text "
        "is the sum of its tokens' embeddings",
    )
    item_features: tuple[str, ...] = option((), "item features that the item tower reads beside the text")
    user_features: tuple[str, ...] = option((), "profile features that the query tower reads (DPSR-p)")
    history_length: int = option(0, "number of the user's last items that the query tower reads (DPSR-h)", 0, 1000)
    query_history_length: int = option(
        0, "number of the user's last queries that the query tower reads (DPSR-h)", 0, 1000
    )
    history_pooling: str = option(
        "attention",
        "how the events of a history become one vector. In a ranker, attention is that of each item to be ranked",
        choices=("attention", "sum"),
    )
    graph_fan_out: tuple[int, ...] = option(
        (),
        "largest number of neighbours in the click graph that a query or item reads, for each of one or two hops, such "
        "as [10, 5] (docs/graph.md). Empty: the towers read no graph",
        1,
        256,
    )
    graph_sampling: str = option(
        "weighted",
        "how training chooses neighbours: drawn by the clicks of their edges, or those with the most clicks. Embedding "
        "takes those with the most clicks",
        choices=("weighted", "strongest"),
    )
    graph_dropout: float = option(
        0.5,
        "share of the queries and items of a batch that get no neighbours by clicks, so that the towers also learn to "
        "work without neighbours",
        0,
        1,
    )
    graph_temperature: float = option(
        0.2, "temperature of the attention over neighbours; a high one gives all of them the same weight", 1e-3, 1e6
    )

    def problem(self) -> str | None:
        """Returns what is wrong with values that are allowed one by one but not together."""
        if len(self.graph_fan_out) > 2:
            return f"graph_fan_out is {list(self.graph_fan_out)}, expected one number for each of at most two hops"
        if self.kind == "ranker" and not self.hidden:
            return "hidden is [], expected at least one layer, because kind is ranker; the paper has three"
        # What a model does not read stays at its default, so that no setting is silently without effect.
        for field in dataclasses.fields(self):
            read = {"retrieval": True, "ranker": field.name not in _OF_TOWERS, "rewriter": field.name in _OF_REWRITER}
            if not read[self.kind] and getattr(self, field.name) != field.default:
                return (
                    f"{field.name} is {getattr(self, field.name)}, which cannot be combined with kind {self.kind}; "
                    f"leave it out"
                )
        return None


# What only the two towers read.
_OF_TOWERS = (
    "embedding_dim",
    "num_heads",
    "temperature",
    "aligned_start",
    "query_history_length",
    "graph_fan_out",
    "graph_sampling",
    "graph_dropout",
    "graph_temperature",
)
# All that a rewriter reads of the section `model`.
_OF_REWRITER = ("kind", "token_dim")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Optimisation (sections 4.3 and 4.4). Batch size, learning rate and margin are the paper's (section 6)."""

    RENAMED: ClassVar = {"own_negatives": ("own_negative_source", {"supervised": "labels"})}

    steps: int = option(10_000, "number of training steps", 1)
    batch_size: int = option(
        64,
        "b, the number of positive pairs in a batch; for a ranker, the number of requests; for a rewriter, the number "
        "of pairs of queries",
        2,
        1 << 16,
    )
    num_title_queries: int = option(
        0,
        "number of pairs in a batch whose query is a piece of a random item's title. As many as batch_size: training "
        "reads titles only, and needs no clicks",
        0,
        1 << 16,
    )
    pretrain_steps: int = option(
        0, "number of steps at the start of training in which the query of every pair is a piece of a title", 0
    )
    title_subsampling: float = option(
        0.0,
        "in a title query, words that occur in more than this share of the titles are kept less often. 0 is off",
        0,
        1,
    )
    title_typo_rate: float = option(0.0, "share of the words in title queries that get a typing error", 0, 1)
    query_typo_rate: float = option(0.0, "share of the words in logged queries that get a typing error", 0, 1)
    learning_rate: float = option(0.01, "learning rate of AdaGrad, which trains the embedding tables", 1e-8, 100)
    schedule: str = option(
        "constant",
        "how the learning rates go on after the warm-up: they stay, or they fall to 0 at the last step",
        choices=("constant", "linear", "cosine"),
    )
    warmup_steps: int = option(0, "number of steps at the start in which the learning rates rise from 0", 0)
    dense_optimizer: str = option(
        "adagrad",
        "optimizer of all weights but the embedding tables: of the layers, and of a text encoder of your own",
        choices=("adagrad", "adam", "momentum"),
    )
    dense_learning_rate: float = option(
        0.0, "learning rate of dense_optimizer. 0 takes the value of learning_rate", 0, 100
    )
    initial_accumulator: float = option(
        0.1, "start value of AdaGrad's sums of squared gradients in embedding tables", 1e-30, 1e6
    )
    accumulator_decay: float = option(
        1.0,
        "share of AdaGrad's sums of squared gradients that a step keeps, in the rows that it reads. Below 1, AdaGrad "
        "becomes RMSProp, and the steps of frequent rows do not shrink for ever",
        0.5,
        1,
    )
    average_decay: float = option(
        0.0,
        "decay of the moving average of the weights. The average is what gets evaluated and exported. 0 turns it off",
        0,
        0.99999,
    )
    loss: str = option(
        "hinge", "loss over the negatives: the hinge of section 4.3, or softmax", choices=("hinge", "softmax")
    )
    margin: float = option(0.1, "delta of the hinge loss", 0, 2)
    softmax_temperature: float = option(0.07, "the softmax loss divides scores by this number", 1e-3, 1e3)
    log_q_correction: bool = option(
        False, "whether the softmax loss corrects for how often an item is drawn as a negative"
    )
    num_random_negatives: int = option(
        64, "r, the number of random items that are negatives of every pair in the batch (4.4.1)", 0, 1 << 16
    )
    mixing_ratio: float = option(
        0.5,
        "alpha, the weight of the random negatives in the loss; the other positives of the batch get the rest (4.4.3)",
        0,
        1,
    )
    num_hard_negatives: int = option(
        0, "number of hardest negatives of a pair that enter the hinge loss. 0 takes all, as in the paper", 0, 1 << 17
    )
    num_supervised_negatives: int = option(
        0, "number of random negatives that are replaced by labelled negatives of the batch's queries (4.5)", 0, 1 << 16
    )
    num_own_negatives: int = option(0, "number of negatives that each pair has for itself alone", 0, 1024)
    own_negative_source: str = option(
        "impressions",
        "where own negatives come from: items that were shown with the pair's item and not clicked, or items that are "
        "labelled as negatives of the query",
        choices=("impressions", "labels", "both"),
    )
    own_negative_weight: float = option(1.0, "weight of each own negative in the loss", 0, 1e6)
    type_weights: dict[str, float] = option(
        {},
        "weight in the loss for positive pairs of the types click, cart and order, multiplied by the weight that the "
        "store has; types that are not named have weight 1. unclicked: weight of each own negative in a second loss, "
        "in which it is the positive and should rank above the random and the batch negatives; by default 0, which "
        "leaves that loss out",
        0,
        1e6,
    )
    type_margins: dict[str, float] = option(
        {},
        "how far above a random item the hinge loss wants items of the types unclicked, click, cart and order; between "
        "two types it wants the difference. By default 0 for unclicked, and for the others `margin`",
        0,
        2,
    )
    shuffle_buffer: int = option(
        1 << 22,
        "number of positive pairs that are shuffled together. A larger log is shuffled in blocks of 4,096 pairs, and "
        "blocks with this many pairs in all are mixed at a time. More pairs take no memory, but read the log in more "
        "places at once",
        1,
        2**40,
    )
    seed: int = option(1, "seed of the initial weights, the shuffle and the negatives", 0, 2**31 - 1)
    checkpoint_steps: int = option(2_000, "number of steps between checkpoints", 1)

    def problem(self) -> str | None:
        """Returns what is wrong with values that are allowed one by one but not together."""
        if self.num_title_queries > self.batch_size:
            return (
                f"num_title_queries is {self.num_title_queries}, expected at most batch_size, "
                f"{self.batch_size}: the other pairs come from the log"
            )
        if self.num_supervised_negatives > self.num_random_negatives:
            return (
                f"num_supervised_negatives is {self.num_supervised_negatives}, expected at most num_random_negatives, "
                f"{self.num_random_negatives}: they replace random negatives"
            )
        if self.mixing_ratio == 1 and self.num_random_negatives == 0 and self.num_own_negatives == 0:
            return (
                "mixing_ratio is 1 and num_random_negatives is 0, so no negative counts; lower mixing_ratio, or raise "
                "num_random_negatives"
            )
        if self.num_hard_negatives and self.loss != "hinge":
            return (
                f"num_hard_negatives is {self.num_hard_negatives}, which cannot be combined with loss {self.loss}; "
                f"set loss to hinge, or num_hard_negatives to 0"
            )
        if self.log_q_correction and self.loss != "softmax":
            return (
                f"log_q_correction is on, which cannot be combined with loss {self.loss}; set loss to softmax, or turn "
                f"log_q_correction off"
            )
        return self._ladder_problem()

    def margin_of(self, event_type: str) -> float:
        """Returns how far above a random item the hinge loss wants items of a type, or "unclicked" ones."""
        return self.type_margins.get(event_type, 0.0 if event_type == UNCLICKED else self.margin)

    def _ladder_problem(self) -> str | None:
        for key, values in (("type_weights", self.type_weights), ("type_margins", self.type_margins)):
            for name in values:
                if name not in LADDER:
                    return f"{key} has '{name}', expected some of {', '.join(LADDER)}"
            if values.get(UNCLICKED) and (not self.num_own_negatives or self.own_negative_source != "impressions"):
                return (
                    f"{key} has {UNCLICKED}, which are the own negatives from impressions, but num_own_negatives is "
                    f"{self.num_own_negatives} and own_negative_source is {self.own_negative_source}; set them to 1 or "
                    f"more and to impressions, or leave {UNCLICKED} out"
                )
        if self.type_margins and self.loss != "hinge":
            return (
                f"type_margins is given, which cannot be combined with loss {self.loss}; set loss to hinge, or use "
                f"type_weights"
            )
        margins = [self.margin_of(name) for name in LADDER]
        if self.type_margins and margins != sorted(margins):
            found = ", ".join(f"{name} {margin:g}" for name, margin in zip(LADDER, margins, strict=True))
            return f"type_margins: gives {found}, expected margins that do not fall in this order"
        return None


@dataclasses.dataclass(frozen=True)
class RankerConfig:
    """What only a ranker has (docs/ranking.md). Its sections `model` and `train` are those of a retrieval model."""

    texts: bool = option(True, "whether the ranker reads the words of queries and items")
    numbers: bool = option(
        True, "whether the ranker reads the numbers that `dpsr features` writes, such as counts of past clicks"
    )
    products: bool = option(
        True, "whether the first layer also reads products of vectors: of query and item, and of history and item"
    )
    matches: bool = option(
        True,
        "whether the first layer also reads how many items of the history have the same value of each feature of kind "
        "categorical or number",
    )
    crosses: int = option(0, "number of cross layers beside the ReLU layers (DCN-v2)", 0, 16)
    loss: str = option(
        "pairwise",
        "pairwise is the cross entropy over all pairs of a request with different outcomes, as in the paper. listwise "
        "is the cross entropy of a softmax over the items of a request",
        choices=("pairwise", "listwise"),
    )
    gains: tuple[float, ...] = option(
        (0.0, 1.0, 2.0, 3.0),
        "gain of each outcome: unclicked, click, cart, order. The weight of a pair of items is the difference of their "
        "gains; a pair with weight 0 is left out",
        0,
        1e6,
    )
    position: bool = option(
        False, "whether training adds a learned bias for the position at which an item was shown. Scores never have it"
    )
    propensity_weights: bool = option(
        False,
        "whether a clicked item has the weight 1 / propensity, where the propensity is the estimated chance that users "
        "look at its position, relative to the first one",
    )
    most_propensity_weight: float = option(10.0, "largest weight that propensity_weights gives", 1, 1e6)
    dropout: float = option(0.0, "share of the outputs of each ReLU layer that training leaves out", 0, 0.95)
    dpsr_model: str = option(
        "", "directory of a retrieval model. If given, the ranker reads its score of query and item, dpsr_score"
    )
    list_similarity: bool = option(
        False,
        "whether the ranker reads how similar an item is to the others of its request, by the embeddings of "
        "dpsr_model. The servable then holds the embeddings of all items",
    )

    def problem(self) -> str | None:
        """Returns what is wrong with values that are allowed one by one but not together."""
        if len(self.gains) != 4:
            return f"gains has {len(self.gains)} numbers, expected 4: of unclicked, click, cart and order"
        if self.list_similarity and not self.dpsr_model:
            return "list_similarity is on, but dpsr_model is empty; give the directory of a retrieval model"
        if not self.texts and not self.numbers:
            return "texts and numbers are both off, expected at least one of them"
        if list(self.gains) != sorted(self.gains) or self.gains[0] == self.gains[-1]:
            return f"gains is {list(self.gains)}, expected numbers that rise from unclicked to order"
        return None


@dataclasses.dataclass(frozen=True)
class RewriterConfig:
    """What only a rewriter has (docs/rewriting.md)."""

    layers: int = option(1, "number of layers of the Transformer that reads a text", 1, 24)
    heads: int = option(4, "number of attention heads of these layers; a divisor of model.token_dim", 1, 64)
    inner_width: int = option(256, "width of the ReLU layer inside each layer", 1, 65536)
    decoder: str = option(
        "gru",
        "what writes a text word by word: a GRU with attention on the text that was read, or a Transformer",
        choices=("gru", "transformer"),
    )
    decoder_layers: int = option(1, "number of layers of a decoder of kind transformer", 1, 24)
    shared: bool = option(
        True,
        "whether the three directions (query to title, title to query, query to query) share encoder and decoder. If "
        "false, each has its own, and only the embeddings of words are shared",
    )
    dropout: float = option(0.1, "share of the outputs of each layer that training leaves out", 0, 0.95)
    click_pairs: int = option(32, "number of pairs of query and title in a batch", 1, 1 << 16)
    title_queries: float = option(
        0.3,
        "share of the click_pairs whose query is a piece of the title, for items without clicks. In a store without "
        "clicks all of them are",
        0,
        1,
    )
    title_pairs: float = option(
        0.65, "share of the pairs of queries that are a piece of a title with typing errors, and the same piece", 0, 1
    )
    query_pairs: float = option(
        0.15,
        "share of the pairs of queries that are a query with typing errors, and the same query. The rest are two "
        "queries with the same clicks, or of which users type one after the other",
        0,
        1,
    )
    typo_rate: float = option(0.25, "share of the words that are read with a typing error", 0, 1)
    form_rate: float = option(
        0.1,
        "share of the words that are read in another form than they are written, such as the singular for the plural. "
        "Forms are found by the endings of words in the vocabulary",
        0,
        1,
    )
    drop_rate: float = option(0.0, "share of the words of a query that are left out where it is read", 0, 1)
    click_power: float = option(
        0.5, "a pair of query and title is drawn in proportion to this power of its clicks", 0, 10
    )
    target_power: float = option(
        0.5,
        "two different queries are drawn in proportion to their similarity, times this power of the clicks of the one "
        "that is written",
        0,
        10,
    )
    title_subsampling: float = option(
        0.003,
        "in a piece of a title, words that occur in more than this share of the titles are kept less often. 0 is off",
        0,
        1,
    )
    unknown_rate: float = option(
        0.1,
        "share of the words of a text that training reads by their letter trigrams alone, as if they were unknown",
        0,
        1,
    )
    forward_weight: float = option(0.2, "weight of the loss from query to title. 0 leaves it out", 0, 1e6)
    backward_weight: float = option(1.0, "weight of the loss from title to query. 0 leaves it out", 0, 1e6)
    direct_weight: float = option(1.0, "weight of the loss from query to query. 0 leaves it out", 0, 1e6)
    cycle_weight: float = option(
        0.0,
        "weight of the loss from a query to titles that are drawn, and from these back to the query. 0 leaves it out",
        0,
        1e6,
    )
    cycle_start: int = option(1_000, "number of steps at the start of training in which cycle_weight counts as 0", 0)
    cycle_queries: int = option(16, "number of queries of a batch that the cycle loss is computed for", 1, 1 << 16)
    cycle_titles: int = option(3, "number of titles that the cycle loss draws for a query", 1, 64)
    cycle_top_words: int = option(
        40, "number of most probable words that each word of a title of the cycle loss is drawn from", 1, 1 << 20
    )
    sampled_words: int = option(
        2_000,
        "number of words that are drawn at random for the softmax of a training step, beside all words that the batch "
        "writes. 0 takes the whole vocabulary",
        0,
        1 << 20,
    )
    path: str = option(
        "direct",
        "how queries are rewritten: by the direction query to query, or over the most probable title",
        choices=("direct", "titles"),
    )
    method: str = option(
        "beam",
        "how words are chosen: the most probable rewrites by beam search, or draws from the most probable words",
        choices=("beam", "sampling"),
    )
    max_words: int = option(8, "largest number of words of a rewrite", 1, 64)
    title_beams: int = option(2, "with path titles, number of beams that search for the title. 1 is greedy", 1, 64)
    draws: int = option(
        2, "with method sampling, number of draws for each rewrite that is asked for; equal ones count once", 1, 16
    )
    top_words: int = option(
        40, "with method sampling, number of most probable words that the next word is drawn from", 1, 1 << 20
    )
    temperature: float = option(
        1.0, "with method sampling, logits are divided by this number before a word is drawn", 1e-3, 1e3
    )

    def problem(self) -> str | None:
        """Returns what is wrong with values that are allowed one by one but not together."""
        if self.title_pairs + self.query_pairs > 1:
            return (
                f"title_pairs and query_pairs are {self.title_pairs:g} and {self.query_pairs:g}, expected a sum of at "
                f"most 1"
            )
        weights = {name: getattr(self, f"{name}_weight") for name in ("forward", "backward", "direct")}
        if not any(weights.values()):
            return "forward_weight, backward_weight and direct_weight are all 0, expected at least one above 0"
        needed = {"direct"} if self.path == "direct" else {"forward", "backward"}
        for name in sorted(needed):
            if not weights[name]:
                return f"{name}_weight is 0, expected more, because path is {self.path}"
        if self.cycle_weight and not (self.forward_weight and self.backward_weight):
            return (
                f"cycle_weight is {self.cycle_weight:g}, which needs forward_weight and backward_weight above 0; they "
                f"are {self.forward_weight:g} and {self.backward_weight:g}"
            )
        return None


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Recall on the validation fold of the held-out interactions, at checkpoints. The best checkpoint is kept.

    Of a ranker, it is NDCG@10 over the requests with a click. Of a rewriter, it is the mean log probability of a word
    of the fold's queries, written for the titles that they clicked and for the queries themselves with typing errors.
    """

    queries: int = option(
        0,
        "number of queries (for a ranker, of requests) of the validation fold that are asked. 0 turns validation off",
        0,
        10_000_000,
    )
    recall_at: int = option(100, "k of recall@k over all items, for a retrieval model", 1, 10_000)
    every: int = option(1, "number of checkpoints from one measurement to the next", 1)
    patience: int = option(
        0, "training stops after this many measurements in a row without a new best. 0 never stops it", 0
    )


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """How a model is spread over several parameter servers (5.1.3). It does not change the format of checkpoints."""

    placement: str = option(
        "whole",
        "how an embedding table is placed: as a whole on one parameter server, or its rows spread over all of them",
        choices=("whole", "rows"),
    )
    half_on_wire: bool = option(False, "whether dense weights and their gradients travel as 16-bit numbers")


@dataclasses.dataclass(frozen=True)
class QuantizerConfig:
    """The quantizer that is trained with the towers and becomes the index (docs/learned_index.md)."""

    sub_spaces: int = option(0, "M, the number of codes of an item. 0 trains no quantizer", 0, 4096)
    codes: str = option(
        "product",
        "what a code stands for: a part of an item's vector (product), or a whole vector, where the vectors of an "
        "item's codes are added (residual)",
        choices=("product", "residual"),
    )
    bits: int = option(8, "bits of a code: 4 or 8", 4, 8)
    lists: int = option(1, "number of coarse centroids, which become the inverted lists of the index", 1, 1 << 20)
    start_step: int = option(
        0,
        "number of steps that train the towers alone. Then the quantizer starts, from the items' embeddings. 0 is for "
        "a warm start, whose towers are trained already",
        0,
    )
    warmup_items: int = option(
        65_536, "number of items whose embeddings the start of the quantizer is computed from", 16, 10_000_000
    )
    objective: str = option(
        "distillation",
        "what the quantizer learns: small reconstruction errors, the model's own loss over quantized items and over "
        "their coarse centroids (ranking), or the order of the exact scores (distillation)",
        choices=("reconstruction", "ranking", "distillation"),
    )
    weight: float = option(1.0, "weight of the quantizer's loss beside the model's own", 1e-6, 1e6)
    towers: str = option(
        "frozen",
        "which towers go on training when the quantizer has started: none of them, the query tower, or both",
        choices=("frozen", "query", "both"),
    )
    tower_rate: float = option(
        0.1, "the learning rates of towers that go on training are multiplied by this number", 1e-6, 1
    )
    learning_rate: float = option(
        1e-3,
        "learning rate of Adam, which trains the codebooks. With residual codes it is divided by the square root of "
        "sub_spaces, because the vectors of so many codes are added",
        1e-8,
        10,
    )
    coarse_learning_rate: float = option(1e-3, "learning rate of Adam for the coarse centroids", 1e-8, 10)
    schedule: str = option(
        "cosine",
        "how the quantizer's learning rates go on from start_step: they stay, or they fall to 0 at the last step",
        choices=("constant", "linear", "cosine"),
    )
    rotation: str = option(
        "opq",
        "rotation of the vectors before they are split: none, the one that OPQ finds at the start (opq), or one that "
        "Givens rotations learn (givens)",
        choices=("none", "opq", "givens"),
    )
    givens_start: str = option("opq", "the rotation that givens begins with", choices=("opq", "identity"))
    givens_pairs: str = option(
        "steepest",
        "how givens chooses the pairs of axes that a step rotates: those with the largest gradients, or by chance",
        choices=("steepest", "random"),
    )
    rotation_learning_rate: float = option(1e-3, "learning rate of givens, in radians for a gradient of 1", 1e-8, 10)
    teacher_queries: int = option(
        100_000,
        "number of the log's queries whose exact best items distillation looks up at the start. That computes "
        "teacher_queries * num_heads * items * embedding_dim products",
        0,
        10_000_000,
    )
    teacher_items: int = option(
        200, "number of exact best items that are looked up for each of the teacher_queries", 1, 10_000
    )
    candidates: int = option(
        8,
        "number of the teacher_items that distillation draws for each query of a batch, beside the batch's own items",
        0,
        10_000,
    )
    temperature: float = option(
        0.0, "distillation divides scores by this number. 0 takes train.softmax_temperature", 0, 1e3
    )

    def problem(self) -> str | None:
        """Returns what is wrong with values that are allowed one by one but not together."""
        if not self.sub_spaces:
            return None
        if self.bits not in (4, 8):
            return f"bits is {self.bits}, expected 4 or 8"
        if self.codes == "residual":
            if self.sub_spaces < 2:
                return "sub_spaces is 1, expected at least 2 for codes residual: one code is the same in both ways"
            for name, expected, why in (
                ("rotation", "none", "whole vectors are added, which is the same in all rotations"),
                ("towers", "frozen", "each item gets them once, at the start"),
            ):
                if getattr(self, name) != expected:
                    return f"{name} is {getattr(self, name)}, expected {expected} for codes residual: {why}"
        for name, centroids in (("lists", self.lists), ("bits", 1 << self.bits)):
            if centroids > self.warmup_items:
                return (
                    f"warmup_items is {self.warmup_items}, expected at least {centroids}, because {name} is "
                    f"{getattr(self, name)} and each centroid needs an item"
                )
        if self.candidates > self.teacher_items:
            return (
                f"candidates is {self.candidates}, expected at most teacher_items, {self.teacher_items}, because they "
                f"are drawn from those"
            )
        return None


@dataclasses.dataclass(frozen=True)
class IndexConfig:
    """The FAISS index over all item embeddings."""

    factory: str = option(
        "",
        "FAISS index factory string. Flat is exact search; auto lets `dpsr index` choose; quantizer makes the index of "
        "the quantizer that was trained with the model, and quantizer_fs one of FastScan, for codes of 4 bits. Empty: "
        "quantizer if the model has one, otherwise Flat",
    )
    parameters: str = option(
        "", "FAISS search parameters, for example nprobe=32. If empty, the cheapest ones that reach recall_target"
    )
    recall_target: float = option(0.95, "ann_recall@k to reach, with k of the section serving", 0.01, 1)
    memory: float = option(
        0.0, "memory limit in GB (10^9 bytes) for the index that auto chooses. 0 sets no limit", 0, 1e6
    )
    second_list: float = option(
        0.0,
        "if above 0, an index of product codes holds each item in two lists, so that fewer probes find it; this is "
        "lambda, the weight of the direction of the first residual (SOAR has 1.5). 0 keeps items in one list",
        0,
        1e3,
    )


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """The servable."""

    k: int = option(100, "number of items that the signature serving_default returns for a query", 1, 10_000)
    graph_queries: int = option(
        1_000_000,
        "with model.graph_fan_out, number of queries of the log, the most frequent first, whose neighbourhoods are in "
        "a table of the servable; all other queries are embedded from their text",
        0,
        100_000_000,
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole config, one section for each stage."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    ranker: RankerConfig = dataclasses.field(default_factory=RankerConfig)
    rewriter: RewriterConfig = dataclasses.field(default_factory=RewriterConfig)
    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    quantizer: QuantizerConfig = dataclasses.field(default_factory=QuantizerConfig)
    index: IndexConfig = dataclasses.field(default_factory=IndexConfig)
    serving: ServingConfig = dataclasses.field(default_factory=ServingConfig)

    def problem(self) -> str | None:
        """Returns what is wrong with values of different sections that are allowed one by one but not together."""
        if self.model.kind != "retrieval":
            return self._problem_of_others()
        quantizer, d = self.quantizer, self.model.embedding_dim
        if not quantizer.sub_spaces:
            return None
        if quantizer.codes == "product" and d % quantizer.sub_spaces:
            fits = ", ".join(str(m) for m in range(1, d + 1) if d % m == 0)
            return (
                f"quantizer.sub_spaces is {quantizer.sub_spaces}, expected a divisor of model.embedding_dim, {d}: one "
                f"of {fits}"
            )
        if quantizer.start_step >= self.train.steps:
            return (
                f"quantizer.start_step is {quantizer.start_step}, expected less than train.steps, {self.train.steps}: "
                f"the quantizer is trained in the steps after it"
            )
        return None

    def _problem_of_others(self) -> str | None:
        """Returns which setting of a ranker or rewriter is for retrieval models only."""
        kind = self.model.kind
        if self.quantizer.sub_spaces:
            return f"quantizer.sub_spaces is {self.quantizer.sub_spaces}, expected 0, because a {kind} has no index"
        names = {f.name for f in dataclasses.fields(TrainConfig)} - _TRAIN_OF_ALL
        default = TrainConfig()
        for name in sorted(names):
            value = getattr(self.train, name)
            if value != getattr(default, name):
                return f"train.{name} is {value!r}, which cannot be combined with model.kind {kind}; leave it out"
        if kind == "rewriter" and self.model.token_dim % self.rewriter.heads:
            return (
                f"rewriter.heads is {self.rewriter.heads}, expected a divisor of model.token_dim, "
                f"{self.model.token_dim}"
            )
        return None


# What rankers and rewriters read of the section `train`.
_TRAIN_OF_ALL = frozenset({
    "steps", "batch_size", "learning_rate", "schedule", "warmup_steps", "dense_optimizer", "dense_learning_rate",
    "initial_accumulator", "accumulator_decay", "average_decay", "seed", "checkpoint_steps",
})  # fmt: skip


def load_config(path: str | Path) -> Config:
    """Reads a config file. Raises UsageError if it does not exist, is not YAML, or has a bad key or value."""
    return from_dict(Config, read_yaml(path), str(path))


def save_config(config: Config, path: str | Path) -> None:
    """Writes every key, defaults included, so that a checkpoint tells what it was trained with."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def shipped_config(name: str) -> dict[str, Any]:
    """Returns the content of a config file of this package: "dpsr_h" is dpsr_tf/configs/dpsr_h.yaml."""
    return read_yaml(CONFIGS / f"{name}.yaml")
