"""Addresses of names such as `dns:models.shop.svc:8500`, followed as they change.

A headless Service of Kubernetes has one address for each pod that is ready, so the servers behind such a name come and
go. A name is looked up at an interval, and at once when a server is lost. A failed lookup, or one without addresses,
keeps the last known ones: the health checks know better which of them are up.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Callable, Iterable

from dpsr_common.errors import CommandError
from dpsr_serving.addresses import join_address
from dpsr_serving.proxy.config import DNS_PREFIX, DnsConfig
from dpsr_serving.proxy.metrics import Metrics

_SHORTEST_S = 0.2  # between two lookups of a name, however often servers are lost


def host_of(address: str) -> str:
    """Returns the NAME of "dns:NAME:PORT", and "" for any other address."""
    return address.removeprefix(DNS_PREFIX).rpartition(":")[0] if address.startswith(DNS_PREFIX) else ""


class Names:
    """Follows names. `on_change` is called whenever the addresses of one have changed."""

    def __init__(self, metrics: Metrics, on_change: Callable[[], None]) -> None:
        self._metrics = metrics
        self._on_change = on_change
        self._names: dict[str, _Name] = {}

    def addresses(self, address: str) -> tuple[str, ...]:
        """Returns the addresses that "dns:NAME:PORT" has now; any other address is its own."""
        if not address.startswith(DNS_PREFIX):
            return (address,)
        name = self._names.get(address)
        return () if name is None else name.addresses

    async def follow(self, config: DnsConfig, addresses: Iterable[str]) -> None:
        """Follows the names among `addresses` as well. Returns when each has been looked up once.

        Raises:
            CommandError: `dns.resolver` is given but its library is not installed.
        """
        look_up = _asking(config)
        for address in addresses:
            if address.startswith(DNS_PREFIX) and address not in self._names:
                self._names[address] = _Name(address, self._metrics, self._on_change)
        for name in self._names.values():
            name.start(config, look_up)
        await asyncio.gather(*(name.tried.wait() for name in self._names.values()))

    def keep(self, addresses: Iterable[str]) -> None:
        """Forgets all names that are not among `addresses`."""
        for address in set(self._names).difference(addresses):
            self._names.pop(address).close()

    def look_again(self) -> None:
        """Looks all names up soon, because a server was lost."""
        for name in self._names.values():
            name.again.set()

    def dump(self) -> dict[tuple[str, ...], float]:
        """Returns the number of addresses of each name, for a gauge."""
        return {(address,): float(len(name.addresses)) for address, name in self._names.items()}

    def close(self) -> None:
        """Ends all lookups."""
        for name in self._names.values():
            name.close()


LookUp = Callable[[str, int], "asyncio.Future[list[str]]"]


class _Name:
    """One name.

    Attributes:
        addresses: those of the last lookup that found some.
        tried: set once the name has been looked up, found or not.
        again: set when the next lookup should not wait.
    """

    def __init__(self, address: str, metrics: Metrics, on_change: Callable[[], None]) -> None:
        self.addresses: tuple[str, ...] = ()
        self.tried = asyncio.Event()
        self.again = asyncio.Event()
        self._address = address
        self._metrics = metrics
        self._on_change = on_change
        self._failing = False
        self._task: asyncio.Task[None] | None = None

    def start(self, config: DnsConfig, look_up: LookUp) -> None:
        """Begins to follow the name, or goes on with another configuration."""
        self.close()
        self._task = asyncio.create_task(self._follow(config, look_up))

    def close(self) -> None:
        """Ends the lookups."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _follow(self, config: DnsConfig, look_up: LookUp) -> None:
        host, port = host_of(self._address), int(self._address.rpartition(":")[2])
        asking: asyncio.Future[list[str]] | None = None
        # wait_for() does not notice a cancellation in the turn in which what it waits for ends.
        while self._task is asyncio.current_task():
            self.again.clear()
            # A lookup by the system cannot be given up, so the next turn waits for it instead of starting another.
            if asking is None:
                asking = look_up(host, port)
                asking.add_done_callback(lambda done: done.cancelled() or done.exception())  # marks errors as seen
            try:
                found = tuple(await asyncio.wait_for(asyncio.shield(asking), config.timeout_s))
                asking = None
                self._take(found, "it has no addresses")
            except asyncio.TimeoutError:
                self._take((), f"no answer within {config.timeout_s:g} s")
            except (OSError, UnicodeError) as error:  # UnicodeError: a text that no name can be, such as "a..b"
                asking = None
                self._take((), str(error))
            self.tried.set()
            await asyncio.sleep(min(_SHORTEST_S, config.every_s))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.again.wait(), max(config.every_s - _SHORTEST_S, 0.001))

    def _take(self, found: tuple[str, ...], problem: str) -> None:
        self._metrics.count("dpsr_proxy_lookups_total", (self._address, "ok" if found else "failed"))
        if not found:
            if not self._failing:
                kept = ", ".join(self.addresses) or "none"
                with contextlib.suppress(OSError):
                    print(
                        f"dpsr proxy: {self._address}: the lookup failed: {problem}; its last known addresses stay: "
                        f"{kept}",
                        file=sys.stderr,
                        flush=True,
                    )
            self._failing = True
            return
        self._failing = False
        if set(found) != set(self.addresses):
            self.addresses = found
            self._on_change()


def _asking(config: DnsConfig) -> LookUp:
    """Returns how names are looked up: by the system, or by the configured DNS server. Raises CommandError."""
    if config.resolver is None:
        return lambda host, port: asyncio.ensure_future(_ask_system(host, port))
    try:
        import dns.asyncresolver
        import dns.exception
    except ImportError:
        raise CommandError(
            f"dns.resolver: got {config.resolver!r}, but the package dnspython is not installed; install it by "
            "`pip install 'dpsr[dns]'`, or leave the key out to ask the system"
        ) from None
    resolver = dns.asyncresolver.Resolver(configure=False)
    server, _, port = config.resolver.rpartition(":")
    resolver.nameservers, resolver.port, resolver.lifetime = [server.strip("[]")], int(port), config.timeout_s

    async def ask(host: str, port: int) -> list[str]:
        try:
            for kind in ("A", "AAAA"):
                answer = await resolver.resolve(host, kind, raise_on_no_answer=False, search=False)
                if answer.rrset is not None:
                    return [join_address(record.address, port) for record in answer.rrset]
        except dns.exception.DNSException as error:
            raise OSError(str(error)) from None
        return []

    return lambda host, port: asyncio.ensure_future(ask(host, port))


async def _ask_system(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # A server with addresses of both families would count as two, so only the family that the system prefers counts.
    return list(dict.fromkeys(join_address(str(one[4][0]), port) for one in found if one[0] == found[0][0]))
