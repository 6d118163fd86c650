"""Puts load on a search gateway, for benchmarks/search_speed.py, and prints what it saw as a JSON object.

    python benchmarks/search_load.py ADDRESS FILE SECONDS RATE SEED

FILE holds a JSON list of bodies of POST /v1/search. RATE is the number of requests a second of an open loop, which
sends at random times; 0 means a closed loop of 8 requests. It imports little and costs a fraction of an HTTP library,
because it shares the cores with what it measures.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

CONCURRENCY = 8


@dataclasses.dataclass
class Load:
    """What the load generator saw.

    Attributes:
        seconds: from the first request to the last answer.
        latencies: seconds of each request; of an open loop from when it was due.
        failed: requests without an answer of status 200.
        degraded: stage -> number of answers without it.
    """

    seconds: float = 0.0
    latencies: list[float] = dataclasses.field(default_factory=list)
    failed: int = 0
    degraded: dict[str, int] = dataclasses.field(default_factory=dict)


class _Client:
    """Keeps connections to the gateway, each for one request at a time."""

    def __init__(self, address: str, load: Load) -> None:
        self._host, _, port = address.rpartition(":")
        self._port, self._load = int(port), load
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, body: bytes, due: float) -> None:
        connection = None
        try:
            connection = self._free.pop() if self._free else await asyncio.open_connection(self._host, self._port)
            reader, writer = connection
            writer.write(b"POST /v1/search HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                         b"Content-Length: %d\r\n\r\n%b" % (len(body), body))  # fmt: skip
            head = await reader.readuntil(b"\r\n\r\n")
            at = head.lower().index(b"content-length: ") + 16
            answer = await reader.readexactly(int(head[at : head.index(b"\r", at)]))
            self._free.append(connection)
            if head.startswith(b"HTTP/1.1 200"):
                begin = answer.rindex(b'"degraded":') + 11
                for stage in json.loads(answer[begin : answer.index(b"]", begin) + 1]):
                    self._load.degraded[stage] = self._load.degraded.get(stage, 0) + 1
            else:
                self._load.failed += 1
        except (OSError, asyncio.IncompleteReadError):
            self._load.failed += 1
            if connection is not None:
                connection[1].close()
        self._load.latencies.append(time.perf_counter() - due)


async def _closed(client: _Client, requests: Sequence[bytes], seconds: float) -> None:
    end = time.perf_counter() + seconds

    async def one(number: int) -> None:
        while (now := time.perf_counter()) < end:
            await client.ask(requests[number % len(requests)], now)
            number += 97

    await asyncio.gather(*(one(13 * number) for number in range(CONCURRENCY)))


async def _open(client: _Client, requests: Sequence[bytes], seconds: float, rate: float, seed: int) -> None:
    chance, tasks = random.Random(seed), set()
    due = time.perf_counter()
    end = due + seconds
    number = seed
    while (due := due + chance.expovariate(rate)) < end:
        pause = due - time.perf_counter()
        if pause > 0:
            await asyncio.sleep(pause)
        task = asyncio.ensure_future(client.ask(requests[number % len(requests)], due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        number += 1
    await asyncio.gather(*tasks)


def main(arguments: Sequence[str]) -> None:
    """Puts load on a gateway, and prints what it saw."""
    address, file, seconds, rate, seed = arguments
    requests = [body.encode() for body in json.loads(Path(file).read_text())]
    load = Load()

    async def run() -> None:
        client = _Client(address, load)
        start = time.perf_counter()
        if float(rate):
            await _open(client, requests, float(seconds), float(rate), int(seed))
        else:
            await _closed(client, requests, float(seconds))
        load.seconds = time.perf_counter() - start

    asyncio.run(run())
    print(json.dumps(dataclasses.asdict(load)))


if __name__ == "__main__":
    main(sys.argv[1:])
