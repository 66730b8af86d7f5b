"""Shares the process that reads files among clients, so that one client cannot occupy it for minutes."""

import ipaddress
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from limits import InputError, Limits

# Entries are dropped when they are older than the period, so this many clients within one period are an attack.
MAX_CLIENTS = 10_000


class ReadingBudget:
    """The time that each client may use the reading process within a period.

    Args:
        limits: The limits of this Space.
        clock: Returns the time in seconds.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self.limits, self.clock = limits, clock
        self.used: dict[str, deque[tuple[float, float]]] = {}
        self.lock = threading.Lock()

    def check(self, client: str) -> None:
        """Check that a client has time left.

        Args:
            client: Address of the client.

        Raises:
            InputError: The client has used its time, or there are too many clients.
        """
        with self.lock:
            self._forget()
            seconds = sum(seconds for _, seconds in self.used.get(client, ()))
            if client not in self.used and len(self.used) >= MAX_CLIENTS:
                raise InputError("Too many visitors use this page. Try again in a few minutes.")
            if seconds >= self.limits.client_seconds:
                raise InputError(
                    f"Your files took more than {self.limits.client_seconds} seconds to read within "
                    f"{self.limits.client_period} seconds. Try again in a few minutes, with smaller files."
                )

    @contextmanager
    def measured(self, client: str) -> Iterator[None]:
        """Count the time that a block takes as used by a client."""
        start = self.clock()
        try:
            yield
        finally:
            with self.lock:
                end = self.clock()
                self.used.setdefault(client, deque()).append((end, end - start))

    def _forget(self) -> None:
        oldest = self.clock() - self.limits.client_period
        for client, entries in list(self.used.items()):
            while entries and entries[0][0] < oldest:
                entries.popleft()
            if not entries:
                del self.used[client]


def client_address(host: str | None, headers: Mapping[str, str]) -> str:
    """Return the address of a client, also behind the proxies of a host.

    A proxy appends the address of its client to `X-Forwarded-For`, some proxies with the port. A client can add
    entries only to the left of it, so the rightmost public address is that of the client. Entries to the left of one
    that is not an address are not used.

    Args:
        host: Address of the connection's other end.
        headers: Headers of the request.
    """
    for hop, address in enumerate([host or "", *reversed(headers.get("x-forwarded-for", "").split(","))]):
        try:
            parsed = ipaddress.ip_address(_without_port(address.strip()))
        except ValueError:
            if hop == 0:  # A connection through a Unix socket has no address.
                continue
            break
        # A socket for both versions shows the addresses of IPv4 as ::ffff:8.8.8.8.
        parsed = getattr(parsed, "ipv4_mapped", None) or parsed
        if parsed.is_global:
            # One customer has a whole /64 of IPv6.
            return str(parsed if parsed.version == 4 else ipaddress.ip_network((parsed, 64), strict=False))
    return host or ""


def _without_port(address: str) -> str:
    """Return the address in `1.2.3.4:5678`, `[2001:db8::1]:5678` or `[2001:db8::1]`; other text is unchanged."""
    match = re.fullmatch(r"\[(.+)\](?::\d+)?|([\d.]+):\d+", address)
    return match[1] or match[2] if match else address
