from __future__ import annotations

import pytest

from dpsr_common.errors import CommandError, UsageError, op_message

STACK = """Graph execution error:

Detected at node 'IteratorGetNext' defined at (most recent call last):
Node: 'IteratorGetNext'
items.dpsr: section "id": checksum mismatch
\t [[{{node IteratorGetNext}}]] [Op:__inference_train_7]
"""


class OpError(Exception):
    """Has its text in an attribute, as tf.errors.OpError."""

    def __init__(self, message):
        super().__init__("op error")
        self.message = message


def test_the_exit_status_of_each_kind():
    assert (CommandError("x").status, UsageError("x").status) == (1, 2)
    assert issubclass(UsageError, CommandError)


@pytest.mark.parametrize(
    "text",
    [
        'items.dpsr: section "id": checksum mismatch',
        'items.dpsr: section "id": checksum mismatch\n\t [[node IteratorGetNext]]',
        STACK,
        f"From /job:worker/replica:0/task:1:\n{STACK}",
        'From /job:ps/replica:0/task:0:\nitems.dpsr: section "id": checksum mismatch\nGRPC error',
    ],
)
def test_the_message_of_an_op_is_its_own_line(text):
    for error in (OpError(text), ValueError(text)):
        assert op_message(error) == 'items.dpsr: section "id": checksum mismatch'
