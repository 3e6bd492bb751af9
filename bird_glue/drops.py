"""Why a peer that should answer is silent: what the kernel drops before BGP hears of it.

A packet with a wrong TCP-MD5 signature, or none (RFC 2385), or from farther away than TTL security
allows (RFC 5082) is counted and answered by nobody. The counters are those of the whole node
(``nstat -az TcpExtTCPMD5Failure``), so this says what happens, not whose packets they are.
"""

from __future__ import annotations

import time
from pathlib import Path

from bird_glue.config import Neighbor

_PATH = Path("/proc/net/netstat")
_GROUP = "TcpExt:"
_RECENT_SECONDS = 120.0  # routers call again at least as often
_FAILURE, _NOT_FOUND, _UNEXPECTED = "TCPMD5Failure", "TCPMD5NotFound", "TCPMD5Unexpected"
_TTL = "TCPMinTTLDrop"
_WORDS = {
    _FAILURE: "packets signed with another TCP-MD5 password come to this node and are dropped",
    _NOT_FOUND: "packets without a TCP-MD5 signature come to this node from a peer that is to"
    " have a password, and are dropped",
    _UNEXPECTED: "packets with a TCP-MD5 signature come to this node from a peer that is to have"
    " no password, and are dropped",
    _TTL: "packets with a lower TTL than ttlSecurity allows come to this node and are dropped",
}


class Drops:
    """Looks at the counters whenever it is told to, and remembers which rose."""

    def __init__(self, path: Path = _PATH) -> None:
        self._path = path
        self._counts = self._read()
        self._rose: dict[str, float] = {}

    def look(self, now: float | None = None) -> None:
        """See which counters rose. ``now``: seconds of the monotonic clock."""
        now = time.monotonic() if now is None else now
        found = self._read()
        for name, count in found.items():
            if count > self._counts.get(name, count):
                self._rose[name] = now
        self._counts = found

    def why(self, neighbor: Neighbor, now: float | None = None) -> str:
        """What may be the reason for a neighbor's silence; empty if nothing is known of one."""
        now = time.monotonic() if now is None else now
        names = [_FAILURE, _NOT_FOUND] if neighbor.password else [_UNEXPECTED]
        if neighbor.ttl_security:
            names.append(_TTL)
        rose = [(self._rose[name], name) for name in names if name in self._rose]
        last, name = max(rose, default=(0.0, ""))
        return _WORDS[name] if name and now - last <= _RECENT_SECONDS else ""

    def _read(self) -> dict[str, int]:
        """The counters, by name; none where the kernel has none."""
        try:
            lines = [line.split() for line in self._path.read_text().splitlines()]
        except OSError:
            return {}
        found = [line[1:] for line in lines if line[:1] == [_GROUP]]
        if len(found) != 2:
            return {}
        counts = zip(*found, strict=False)
        return {name: int(count) for name, count in counts if name in _WORDS}
