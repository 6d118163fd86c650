"""Runs the processes of a training cluster on a list of hosts, over ssh: `dpsr launch --hosts=a,b,c`."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from dpsr_common.errors import UsageError

# The status of ssh itself, where it cannot reach a host or loses it.
SSH_FAILED = 255
# Runs a command until it ends, or until nobody holds the other end of stdin: ssh leaves a command running when the
# connection is lost. A command that SIGTERM does not end is killed after 15 seconds. Both outputs go one way, so that
# their lines keep their order.
_SCRIPT = """cd -- {directory} || exit 1
exec 3<&0 2>&1
TF_CONFIG={tf_config} {command} </dev/null 3<&- &
child=$!
(cat <&3; kill $child; sleep 15; kill -KILL $child) >/dev/null 2>&1 &
watcher=$!
exec 3<&-
wait $child 2>/dev/null
status=$?
kill $watcher 2>/dev/null
exit $status"""


@dataclasses.dataclass(frozen=True)
class SshHosts:
    """Hosts that ssh reaches without a password.

    Process n of a cluster runs on host n modulo their number, so each host gets as many processes as the others.

    Attributes:
        names: as ssh takes them, "HOST" or "USER@HOST". The other hosts reach it as HOST.
        ssh: the command that reaches a host, in words.
        python: path of the Python on the hosts that runs DPSR.
        port: where process 0 listens; process n listens on port + n.
    """

    names: Sequence[str]
    ssh: Sequence[str]
    python: str
    port: int

    @staticmethod
    def of_flags(names: Sequence[str], ssh: str, python: str, port: int, num_tasks: int) -> SshHosts:
        """Checks the flags. Raises UsageError that names the flag."""
        for name in names:
            if not name or name.startswith("-") or any(c.isspace() or c == ":" for c in name) or name.endswith("@"):
                raise UsageError(
                    f"--hosts={','.join(names)}: '{name}' is not a host; expected HOST or USER@HOST, and ports in the "
                    f"configuration of ssh"
                )
        if port + num_tasks > 65536:
            raise UsageError(f"--port={port}: {num_tasks} processes need as many ports from there, below 65536")
        words = shlex.split(ssh)
        if not words:
            raise UsageError(f"--ssh={ssh!r}: expected a command, such as 'ssh -F FILE'")
        return SshHosts(names, words, python, port)

    def host(self, number: int) -> str:
        """Returns the name of the host of a process."""
        return self.names[number % len(self.names)]

    def address(self, number: int) -> str:
        """Returns where the other processes reach a process."""
        return f"{self.host(number).rpartition('@')[2]}:{self.port + number}"

    def command(self, number: int, tf_config: Mapping[str, Any], arguments: Sequence[str]) -> list[str]:
        """Returns the command that runs `dpsr ARGUMENTS...` on a process's host, in this process's folder.

        It ends with the status of that command, 128 + the signal that ended it, or SSH_FAILED. While it runs, its stdin
        must be held open; the command on the host ends when that is closed.
        """
        script = _SCRIPT.format(
            directory=shlex.quote(os.getcwd()),
            tf_config=shlex.quote(json.dumps(tf_config)),
            command=shlex.join([self.python, "-m", "dpsr_common", *arguments]),
        )
        # No password is asked for, and a host that is lost is noticed after a minute.
        options = ["-o", "BatchMode=yes", "-o", "ServerAliveInterval=20", "-o", "ServerAliveCountMax=3"]
        return [*self.ssh, *options, "-T", self.host(number), f"exec sh -c {shlex.quote(script)}"]
