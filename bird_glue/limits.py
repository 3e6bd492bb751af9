"""How many prefixes a peer may tell, and the rest that one takes that told more.

A router that leaks a full table would fill the node's memory and its kernel's tables. What goes
beyond the limit is not taken in, the session ends with all its routes, and is tried again after a
minute: longer than the node needs to get over it, shorter than people need to notice.
"""

from __future__ import annotations

import time

from api.errors import Problem
from api.net import Net, format_address
from bird_glue.sessions import Sessions
from bird_glue.settings import ObjectProblem

DEFAULT_LIMIT = 50_000
MOST = 250_000  # what the relay remembers of a peer
REST_SECONDS = 60.0


def parse_limit(text: str) -> int:
    """MANX_RECEIVE_LIMIT: prefixes a session; empty for the default. Raises ValueError."""
    if not text:
        return DEFAULT_LIMIT
    if text.isdecimal() and 1 <= int(text) <= MOST:
        return int(text)
    raise ValueError(f"MANX_RECEIVE_LIMIT={text!r}: expected prefixes a session, 1 to {MOST}")


class Resting:
    """Peers that are left alone for a while. ``limit``: prefixes a session."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self.limit = limit
        self._until: dict[Net, float] = {}

    def send(self, peer: Net, now: float) -> str:
        """The peer told too much: no session with it for a while. Returns that in words."""
        self._until[peer] = now + REST_SECONDS
        return f"it announced more than {self.limit} prefixes"

    def ends(self) -> list[float]:
        """When they are tried again."""
        return list(self._until.values())

    def leave_out(self, sessions: Sessions, now: float) -> None:
        """Take those that rest out of the sessions, and say so."""
        self._until = {peer: until for peer, until in self._until.items() if until > now}
        for address, until in self._until.items():
            peer = sessions.peers.pop(address, None)
            if peer is None:
                continue
            del sessions.neighbors[address]
            again = time.strftime("%H:%M:%S", time.localtime(time.time() + until - now))
            problem = Problem(
                "session with",
                format_address(*address[:2]),
                f"a peer that announces at most {self.limit} prefixes (MANX_RECEIVE_LIMIT): it"
                f" announced more, and is tried again at {again}",
            )
            sessions.problems.append(ObjectProblem(*peer.owner, problem))
