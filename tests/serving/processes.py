"""Child processes and models of the serving tests."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import dpsr_serving
import dpsr_tf

# Seconds after which something that must happen counts as missing. No test that passes waits so long.
PATIENCE_S = 60.0

_reserved: list[socket.socket] = []


def free_port() -> int:
    """A port that stays free until its server listens on it.

    The kernel never assigns it to a connection or to port 0, because it lies below the range of ephemeral ports. No
    other test process gets it either: an abstract UNIX socket, which ends with this process, reserves the number.
    """
    lowest_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(10_000, max(lowest_ephemeral, 20_000))
        reservation = socket.socket(socket.AF_UNIX)
        try:
            reservation.bind(f"\0dpsr-test-port-{port}")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            reservation.close()
            continue
        _reserved.append(reservation)
        return port


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie, which has ended but still has an entry in /proc, does not."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def freeze(pid: int) -> None:
    """Stops a process by SIGSTOP, and returns when all of its threads stand still.

    The signal stops the thread that takes it. Until that thread has a processor, the others run on.
    """
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + PATIENCE_S
    while any(") T " not in stat.read_text() for stat in Path(f"/proc/{pid}/task").glob("*/stat")):
        assert time.monotonic() < end, f"process {pid} goes on"
        time.sleep(0.005)


def child_environment(**extra: str) -> dict[str, str]:
    """An environment in which a child process imports our packages from the same place as this process."""
    roots = [str(Path(package.__file__).parents[1]) for package in (dpsr_serving, dpsr_tf)]
    inherited = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [*roots, inherited])), **extra}


def command_line(*arguments: str) -> list[str]:
    """The command line of `dpsr` with these arguments."""
    return [sys.executable, "-m", "dpsr_common", *arguments]


def run_command(*arguments: str, **extra_environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command_line(*arguments),
        env=child_environment(**extra_environment),
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=4 * PATIENCE_S,
    )


class ProxyProcess:
    """`dpsr proxy` on a free port."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            command_line("proxy", "--port=0", *arguments),
            env=child_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("proxy ready on "):
            self.process.kill()
            raise AssertionError(f"the proxy said {line!r}, {self.process.communicate()[1]!r}")
        self.target = line.removeprefix("proxy ready on ").strip()

    def stop(self) -> int:
        """Ends the proxy without draining and returns its exit status."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        return self.process.returncode


def save_search_model(version_dir: Path, base: int, with_keys: bool = False) -> None:
    """Saves a model that answers like a search servable, by a rule that tests can compute.

    A query of n bytes finds items base, base + 1, ... base + n - 1 (cut at k, 3 in `serving_default`) with scores
    1, 1/2, 1/3, ... and heads 0, 1, 0, 1, ...; what remains up to k is padding. `slow` keeps a thread busy for `work`
    rounds of some microseconds.
    """
    import tensorflow as tf

    def answer(query: tf.Tensor, k: tf.Tensor) -> dict[str, tf.Tensor]:
        rank = tf.range(k)[tf.newaxis, :]
        found = rank < tf.strings.length(query)[:, tf.newaxis]
        rank = tf.broadcast_to(rank, tf.shape(found))
        ids = tf.where(found, tf.cast(rank, tf.int64) + base, tf.constant(-1, tf.int64))
        outputs = {
            "item_ids": ids,
            "scores": tf.where(found, 1.0 / tf.cast(rank + 1, tf.float32), -float("inf")),
            "heads": tf.where(found, rank % 2, -1),
        }
        if with_keys:
            outputs["item_keys"] = tf.where(found, tf.strings.join(["sku-", tf.strings.as_string(ids)]), "")
        return outputs

    class Model(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "query")])
        def serve(self, query: tf.Tensor) -> dict[str, tf.Tensor]:
            return answer(query, tf.constant(3))

        @tf.function(
            input_signature=[tf.TensorSpec([None], tf.string, "query"), tf.TensorSpec([], tf.int32, "k")],
        )
        def search(self, query: tf.Tensor, k: tf.Tensor) -> dict[str, tf.Tensor]:
            return answer(query, k)

        @tf.function(input_signature=[tf.TensorSpec([], tf.int32, "work")])
        def slow(self, work: tf.Tensor) -> dict[str, tf.Tensor]:
            done, total = tf.constant(0), tf.constant(0.5)
            while done < work:
                done, total = done + 1, tf.math.sin(total + 1.0)
            return {"total": total}

    model = Model()
    signatures = {"serving_default": model.serve, "search": model.search, "slow": model.slow}
    tf.saved_model.save(model, str(version_dir), signatures=signatures)
