"""A server that misbehaves as told, for benchmarks/faults.py: it forwards calls to a model server.

    python benchmarks/gray_server.py HOST:PORT MODE_FILE

It answers status requests, which health checks use, all the time. The first word of MODE_FILE says what it does to the
other calls: `ok` forwards them, `hang` never answers, `slow` answers after one second, and `stall` answers every 20th
after 0.1 s.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
from pathlib import Path

from dpsr_common import serving_apis
from dpsr_serving.proxy.calls import Channel, Metadata, Reply, Server
from dpsr_serving.proxy.config import LimitsConfig

_SLOW_S, _STALL_S, _STALL_EVERY = 1.0, 0.1, 20


async def serve(target: str, mode_file: Path) -> None:
    """Serves until SIGTERM."""
    channel = Channel(target, None, "", LimitsConfig())
    turn = itertools.count()

    async def status(message: bytes, deadline: float | None, metadata: Metadata) -> Reply:
        return await channel.call(serving_apis.GET_MODEL_STATUS, message, None, metadata)

    async def predict(message: bytes, deadline: float | None, metadata: Metadata) -> Reply:
        mode = mode_file.read_text()
        if mode == "hang":
            await asyncio.Event().wait()
        if mode == "slow":
            await asyncio.sleep(_SLOW_S)
        if mode == "stall" and next(turn) % _STALL_EVERY == 0:
            await asyncio.sleep(_STALL_S)
        return await channel.call(serving_apis.PREDICT, message, None, metadata)

    handlers = {serving_apis.GET_MODEL_STATUS: status, serving_apis.PREDICT: predict}
    server = Server(handlers, {}, LimitsConfig())
    port = await server.listen("127.0.0.1", 0, None, False)
    print(f"gray server on 127.0.0.1:{port}", flush=True)
    end = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end.set)
    await end.wait()
    channel.drop()
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], Path(sys.argv[2])))
