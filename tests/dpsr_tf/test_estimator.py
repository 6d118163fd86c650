from __future__ import annotations

import pytest
import tensorflow as tf

from dpsr_tf.training.estimator import QuickSteps

v1 = tf.compat.v1


class Seen(tf.estimator.SessionRunHook):
    """The global step after each step that hooks see."""

    def __init__(self):
        self.steps = []

    def begin(self):
        self._step = v1.train.get_global_step()

    def after_run(self, run_context, run_values):
        self.steps.append(int(run_context.session.run(self._step)))


@pytest.mark.parametrize(
    ("first", "last", "checkpoint_steps", "expected"),
    [
        (0, 130, 50, [1, 20, 40, 50, 60, 80, 100, 120, 130]),
        (0, 1, 50, [1]),
        (0, 45, 1000, [1, 20, 40, 45]),
        (0, 4, 1, [1, 2, 3, 4]),
        # Estimator counts checkpoints from where it goes on.
        (7, 60, 30, [8, 27, 37, 47, 60]),
    ],
)
def test_every_step_is_done_and_some_are_seen(first, last, checkpoint_steps, expected):
    with tf.Graph().as_default():
        step = v1.train.create_global_step()
        train = step.assign_add(1).op
        seen = Seen()
        hooks = [seen, QuickSteps(train, last, checkpoint_steps), tf.estimator.StopAtStepHook(last_step=last)]
        with v1.train.SingularMonitoredSession(hooks) as session:
            step.load(first, session.raw_session())
            hooks[1].after_create_session(session.raw_session(), None)
            while not session.should_stop():
                session.run(train)
    assert seen.steps == expected
