"""Merges the answers of several servers, each of which holds a part of the items, into one.

All parts share the query tower, so their scores are comparable: the best k items of the whole corpus are the best k of
all that the parts found, ordered by score and then by ascending id, as on a server that holds all items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from dpsr_common import serving_apis
from dpsr_serving.tensors import make_tensor, to_numpy

_PADDING_ID = -1


def merge_answers(answers: Sequence[bytes]) -> bytes:
    """Merges serialized PredictResponses of a search signature.

    `item_ids` int64 [batch, columns] and `scores` float [batch, columns] decide the order. Outputs with the same first
    two dimensions (heads, item_keys) are reordered with them; any other output is taken from the first answer. An item
    that several parts hold appears once, with its best score. The result has as many columns as the widest answer.

    Raises:
        ValueError: the answers do not belong to one request to parts of one servable.
    """
    try:
        responses = [serving_apis.PredictResponse.FromString(answer) for answer in answers]
    except DecodeError as error:
        raise ValueError(f"an answer is not a PredictResponse: {error}") from error
    if len(responses) == 1 or not all({"item_ids", "scores"} <= set(response.outputs) for response in responses):
        return answers[0]
    parts = [{name: to_numpy(tensor) for name, tensor in response.outputs.items()} for response in responses]
    shapes = [part["item_ids"].shape for part in parts]
    batches = {shape[0] if len(shape) == 2 else None for shape in shapes}
    if len(batches) > 1 or None in batches or any(p["scores"].shape != p["item_ids"].shape for p in parts):
        raise ValueError(
            f"item_ids have the shapes {shapes}, expected [batch, k] with the same batch, and scores of the same shape"
        )
    columns = max(shape[1] for shape in shapes)
    names = [
        name
        for name in parts[0]
        if all(name in part and part[name].shape[:2] == part["item_ids"].shape for part in parts)
    ]
    joined = {name: np.concatenate([part[name] for part in parts], axis=1) for name in names}
    order = _best(joined["item_ids"], joined["scores"], columns)
    merged = responses[0]
    rows = np.arange(len(order))[:, np.newaxis]
    for name in names:
        merged.outputs[name].CopyFrom(make_tensor(joined[name][rows, order]))
    return bytes(merged.SerializeToString())


def _best(ids: NDArray[np.int64], scores: NDArray[np.floating[Any]], count: int) -> NDArray[np.intp]:
    """Returns the columns of the best `count` items of each row, padding last.

    The result [batch, count] indexes into [batch, columns].
    """
    padding = ids == _PADDING_ID
    order = np.lexsort((ids, -scores, padding), axis=-1)
    for row in range(len(order)):
        found = ids[row, order[row]]
        # Repeated ids are moved behind everything else, where they are always cut off: a repeated id came with a part
        # that has as many columns as the result.
        _, first = np.unique(found, return_index=True)
        real = int(np.count_nonzero(found != _PADDING_ID))
        if len(first) < real + bool(real < len(found)):
            order[row] = _without_repeats(order[row], found, first)
    return order[:, :count]


def _without_repeats(order: NDArray[np.intp], found: NDArray[np.int64], first: NDArray[np.intp]) -> NDArray[np.intp]:
    keep = np.zeros(len(found), bool)
    keep[first] = True
    padding = found == _PADDING_ID
    keep[padding] = False
    repeats = ~keep & ~padding
    return np.concatenate([order[keep], order[padding], order[repeats]])
