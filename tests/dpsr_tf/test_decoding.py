"""Decoding in the graph, against exhaustive search and against the probabilities of a small model of words."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import tensorflow as tf

from dpsr_tf.models.decoding import Decoded, Words, beam_search, distinct, sample

v1 = tf.compat.v1

# Words 0 to 2 are reserved, 3 ends a sequence.
END, RESERVED, WORDS = 3, 3, 7
LENGTH = 3
TEXTS = 4


class Model:
    """Logits that depend on the text, on all words so far (through the state), and on the position."""

    def __init__(self, seed: int = 1, words: int = WORDS):
        rng = np.random.default_rng(seed)
        self.of_text = rng.normal(size=(TEXTS, words)).astype(np.float32) * 2
        self.of_word = rng.normal(size=(words, words)).astype(np.float32)
        self.of_history = rng.normal(size=(words, words)).astype(np.float32) * 2

    def step(self, last, state, position):
        if last is not None:
            # The state remembers words by their positions.
            one = tf.one_hot(last, self.of_word.shape[0])
            state = state + one / tf.cast(position, tf.float32)
            own = tf.gather(self.of_word, last)
        else:
            own = tf.zeros_like(state)
        return tf.constant(self.of_text)[:, tf.newaxis] + own + tf.tensordot(state, self.of_history, 1), state

    @property
    def state(self):
        return tf.zeros([TEXTS, 1, self.of_word.shape[0]])

    def log_probability(self, text: int, sequence: tuple[int, ...]) -> float:
        """The log probability of a sequence and its end, computed with NumPy."""
        state, total, last = np.zeros(len(self.of_word)), 0.0, None
        for position, word in enumerate([*sequence, END]):
            own = 0.0
            if last is not None:
                state[last] += 1 / position
                own = self.of_word[last]
            logits = self.of_text[text] + own + state @ self.of_history
            total += logits[word] - np.log(np.exp(logits).sum())
            last = word
        return float(total)

    def exhaustive(self, text: int, length: int = LENGTH) -> list[tuple[tuple[int, ...], float]]:
        """All sequences of 1 to `length` words, the most probable one first."""
        words = range(RESERVED + 1, len(self.of_word))
        found = [s for size in range(1, length + 1) for s in itertools.product(words, repeat=size)]
        return sorted(((s, self.log_probability(text, s)) for s in found), key=lambda pair: -pair[1])


def run(decoded: Decoded) -> list[list[tuple[tuple[int, ...], float]]]:
    with v1.Session() as session:
        words, logs = session.run(decoded)
    return [
        [(tuple(w for w in s if w), float(p)) for s, p in zip(*row, strict=True)]
        for row in zip(words, logs, strict=True)
    ]


def check_same(found, expected):
    assert [sequence for sequence, _ in found] == [sequence for sequence, _ in expected]
    np.testing.assert_allclose([p for _, p in found], [p for _, p in expected], atol=1e-4)


def test_a_beam_wide_enough_is_exhaustive_search():
    model, beams = Model(), 3 + 3**2 + 3**3
    with tf.Graph().as_default():
        found = run(beam_search(model.step, model.state, beams, LENGTH, Words(END, RESERVED)))
    for text in range(TEXTS):
        check_same(found[text], model.exhaustive(text))


def test_a_beam_beyond_all_sequences_says_that_there_are_no_more():
    model = Model(words=5)  # one word only: three sequences
    with tf.Graph().as_default():
        found = run(beam_search(model.step, model.state, 6, LENGTH, Words(END, RESERVED)))
    for text in range(TEXTS):
        assert found[text][3:] == [((), -math.inf)] * 3
        check_same(found[text][:3], model.exhaustive(text))


def test_one_beam_is_greedy():
    model = Model(2)
    with tf.Graph().as_default():
        found = run(beam_search(model.step, model.state, 1, LENGTH, Words(END, RESERVED)))
    for text in range(TEXTS):
        sequence: tuple[int, ...] = ()
        while len(sequence) < LENGTH:
            # The best next word, by the difference that it makes.
            choices = [(w,) for w in range(RESERVED + 1, WORDS)] + ([()] if sequence else [])

            def gain(choice, sequence=sequence, text=text):
                whole = model.log_probability(text, (*sequence, *choice))
                return whole - (_last(model, text, (*sequence, *choice)) if choice else 0.0)

            best = max(choices, key=gain)
            if not best:
                break
            sequence = (*sequence, *best)
        assert found[text][0][0] == sequence


def _last(model: Model, text: int, sequence: tuple[int, ...]) -> float:
    """The log probability that a sequence ends where it does."""
    state = np.zeros(len(model.of_word))
    for position, word in enumerate(sequence):
        state[word] += 1 / (position + 1)
    logits = model.of_text[text] + model.of_word[sequence[-1]] + state @ model.of_history
    return float(logits[END] - np.log(np.exp(logits).sum()))


def test_the_number_of_beams_may_be_a_tensor():
    model = Model()
    with tf.Graph().as_default():
        n = tf.identity(5)
        decoded = beam_search(model.step, model.state, n, LENGTH, Words(END, RESERVED))
        assert decoded.words.shape[2] == LENGTH
        found = run(decoded)
    assert all(len(row) == 5 for row in found)


@pytest.mark.long
def test_samples_follow_the_probabilities_of_the_model():
    model, count = Model(3), 20_000
    with tf.Graph().as_default():
        found = run(sample(model.step, model.state, count, LENGTH, Words(END, RESERVED), tf.constant(7, tf.int64)))
    for text in range(TEXTS):
        # Reserved words, and an end before the first word, are not drawn. The rest keeps its proportions.
        counts: dict[tuple[int, ...], int] = {}
        for sequence, p in found[text]:
            counts[sequence] = counts.get(sequence, 0) + 1
            assert p == pytest.approx(model.log_probability(text, sequence), abs=1e-3)
        expected = _restricted(model, text)
        assert sum(expected.values()) == pytest.approx(1, abs=1e-6)
        for sequence, share in expected.items():
            sd = math.sqrt(share * (1 - share) / count)
            assert counts.get(sequence, 0) / count == pytest.approx(share, abs=5 * sd + 1e-4), sequence
        assert set(counts) <= set(expected)


def _restricted(model: Model, text: int, top: int | None = None) -> dict[tuple[int, ...], float]:
    """The chance of each sequence when words are drawn from those allowed, or from the `top` best of these."""
    shares: dict[tuple[int, ...], float] = {}

    def grow(sequence: tuple[int, ...], share: float, state: np.ndarray) -> None:
        if len(sequence) == LENGTH:
            shares[sequence] = share
            return
        own = model.of_word[sequence[-1]] if sequence else 0.0
        logits = model.of_text[text] + own + state @ model.of_history
        allowed = [w for w in range(RESERVED, WORDS) if w != END or sequence]
        allowed = sorted(allowed, key=lambda w: -logits[w])[:top]
        total = sum(math.exp(logits[w]) for w in allowed)
        for word in allowed:
            p = share * math.exp(logits[word]) / total
            if word == END:
                shares[sequence] = p
                continue
            after = state.copy()
            after[word] += 1 / (len(sequence) + 1)
            grow((*sequence, word), p, after)

    grow((), 1.0, np.zeros(len(model.of_word)))
    return shares


def test_top_n_sampling_draws_from_the_most_probable_words():
    model, count = Model(4), 20_000
    with tf.Graph().as_default():
        seed = tf.constant(1, tf.int64)
        found = run(sample(model.step, model.state, count, LENGTH, Words(END, RESERVED), seed, top=2))
    for text in range(TEXTS):
        expected = _restricted(model, text, top=2)
        drawn = [sequence for sequence, _ in found[text]]
        assert set(drawn) <= set(expected)
        likely = max(expected, key=lambda s: expected[s])
        assert drawn.count(likely) / count == pytest.approx(expected[likely], abs=0.03)


def test_sampling_repeats_itself_for_a_seed_and_for_each_text_alone():
    model = Model(5)
    with tf.Graph().as_default():
        first, again, other = (
            run(sample(model.step, model.state, 20, LENGTH, Words(END, RESERVED), tf.constant(seed, tf.int64), 4))
            for seed in (3, 3, 4)
        )
        assert first == again and first != other
        # The last text alone gets what it gets in the batch.
        model.of_text = model.of_text[3:]
        alone = run(
            sample(
                lambda *of: model.step(*of), tf.zeros([1, 1, WORDS]), 20, LENGTH, Words(END, RESERVED),
                tf.constant(3, tf.int64), 4,
            )
        )  # fmt: skip
        assert [s for s, _ in alone[0]] == [s for s, _ in first[3]]


def test_a_low_temperature_is_greedy():
    model = Model(6)
    with tf.Graph().as_default():
        seed = tf.constant(1, tf.int64)
        cold = run(sample(model.step, model.state, 3, LENGTH, Words(END, RESERVED), seed, temperature=1e-3))
        greedy = run(beam_search(model.step, model.state, 1, LENGTH, Words(END, RESERVED)))
    for text in range(TEXTS):
        assert {s for s, _ in cold[text]} == {greedy[text][0][0]}


def test_distinct_keeps_the_most_probable_of_equal_ones_and_leaves_out_the_original():
    words = [[[4, 5, 0], [4, 5, 0], [6, 0, 0], [4, 0, 0]], [[5, 0, 0], [6, 5, 0], [5, 0, 0], [4, 4, 4]]]
    logs = [[-3.0, -3.0, -1.0, -2.0], [-1.0, -2.0, -1.0, -math.inf]]
    original = [[6, 0, 0, 0, 0], [9, 9, 9, 9, 9]]
    with tf.Graph().as_default():
        decoded = Decoded(tf.constant(words), tf.constant(logs))
        three = run(distinct(decoded, tf.constant(original), 3))
        six = run(distinct(decoded, tf.constant(original), tf.constant(6)))
    assert three == [[((4,), -2.0), ((4, 5), -3.0), ((), -math.inf)], [((5,), -1.0), ((6, 5), -2.0), ((), -math.inf)]]
    assert [row[:3] for row in six] == three and [row[3:] for row in six] == [[((), -math.inf)] * 3] * 2


@pytest.mark.parametrize("method", ["beam", "sampling"])
def test_the_graph_has_only_ops_of_tensorflow(method):
    model = Model()
    with tf.Graph().as_default() as graph:
        if method == "beam":
            beam_search(model.step, model.state, 3, LENGTH, Words(END, RESERVED))
        else:
            sample(model.step, model.state, 3, LENGTH, Words(END, RESERVED), tf.constant(1, tf.int64), 3)
        definition = graph.as_graph_def()
    ops = {node.op for node in definition.node}
    ops |= {node.op for function in definition.library.function for node in function.node_def}
    assert not [op for op in ops if op.startswith("Dpsr") or op in ("PyFunc", "EagerPyFunc")]
