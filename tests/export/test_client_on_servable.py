"""The typed client against a real personal servable on the real server, through the proxy."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from conftest import Job

from dpsr_common import serving_apis
from dpsr_serving.client import AsyncSearchClient, SearchClient, User
from dpsr_serving.model_server import start_model_server
from dpsr_serving.tensors import make_tensor, to_numpy

sys.path.append(str(Path(__file__).resolve().parents[1] / "serving"))
from processes import ProxyProcess

pytestmark = pytest.mark.slow
QUERY = "phone case"


@pytest.fixture(scope="module")
def target(personal: Job) -> Iterator[str]:
    with start_model_server(personal.servable, "shop") as server:
        proxy = ProxyProcess(f"--backend={server.target}")
        yield proxy.target
        proxy.stop()


def test_what_a_user_did_and_filters_count(target: str) -> None:
    with SearchClient(target, "shop") as client:
        (plain,) = client.search(QUERY)
        (anonymous,) = client.search(QUERY, 400)
        assert len(plain) == 7 and plain.item_ids.tolist() == anonymous.item_ids[:7].tolist()
        assert set(plain.heads) <= {0, 1} and plain.version == 1
        user = User({"gender": "f", "age": 31}, [int(anonymous.item_ids[9])], ["charger"], ["order"])
        (known,) = client.search(QUERY, 400, user=user)
        assert not np.array_equal(known.scores, anonymous.scores)
        # Rows of one request do not mix.
        both = client.search([QUERY, QUERY], 400, user=[None, user])
        for got, expected in zip(both, (anonymous, known), strict=True):
            # All 400 items; in a batch, scores may be rounded otherwise.
            by_item = dict(zip(got.item_ids.tolist(), got.scores.tolist(), strict=True))
            again = [by_item[item] for item in expected.item_ids.tolist()]
            np.testing.assert_allclose(again, expected.scores, rtol=1e-5, atol=1e-6)

        (cheap,) = client.search(QUERY, 400, filters={"price": (None, 50)})
        (dear,) = client.search(QUERY, 400, exclude_filters={"price": (None, 50)})
        assert len(cheap) and len(dear)
        assert sorted([*cheap.item_ids, *dear.item_ids]) == sorted(anonymous.item_ids)
        in_order = [item for item in anonymous.item_ids if item in set(cheap.item_ids)]
        assert cheap.item_ids.tolist() == in_order
        gone = anonymous.item_ids[:3]
        assert client.search(QUERY, 397, exclude_items=gone)[0].item_ids.tolist() == anonymous.item_ids[3:].tolist()
        with pytest.raises(ValueError, match="no such attribute, expected one of: brand"):
            client.search(QUERY, 3, filters={"brnd": "x"})
        with pytest.raises(ValueError, match="'height'; those it reads: age"):
            client.search(QUERY, 3, user=User({"height": 180}))

    # A plain gRPC client sends what it cares about: the servable has defaults for the rest.
    request = serving_apis.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "shop", "search"
    for given, expected in (({}, plain), ({"k": np.int32(5)}, anonymous), ({"include": [[b"price=..50"]]}, cheap)):
        for name, value in ({"query": [QUERY.encode()]} | given).items():
            request.inputs[name].CopyFrom(make_tensor(np.array(value)))
        with grpc.insecure_channel(target) as channel:
            answer = channel.unary_unary(serving_apis.PREDICT)(request.SerializeToString(), timeout=60)
        found = to_numpy(serving_apis.PredictResponse.FromString(answer).outputs["item_ids"])[0]
        assert found.tolist() == expected.item_ids[: len(found)].tolist()

    async def ask() -> list[int]:
        async with AsyncSearchClient(target, "shop") as client:
            (result,) = await client.search(QUERY, 400, user=user, filters={"price": (None, 50)})
            return [int(item) for item in result.item_ids]

    assert set(asyncio.run(ask())) == set(cheap.item_ids.tolist())
