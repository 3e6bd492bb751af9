"""The flows of addresses that are gone go as well, lest who gets an address inherits them.

Nobody waits for that, unless somebody has got one of the addresses already: then its flows go in
the same turn, before it is told that its policy stands.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial

from api.net import V4, V6, Net
from felix.conntrack_lister import Lister, Listing
from kernel.conntrack import Conntrack, Flow

_log = logging.getLogger(__name__)


class Gone:
    """Addresses that are gone, in the calling thread's network namespace.

    ``wake`` is called, in another thread, when ``forget`` has more to do.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lister = Lister(wake)
        self._conntrack = Conntrack()
        self._addresses: set[Net] = set()
        self._sought: set[Net] = set()  # of these, whose flows are being listed
        self._inherited = False
        self._steps: Iterator[bool] | None = None

    def __bool__(self) -> bool:
        return bool(self._addresses) or self._steps is not None

    def close(self) -> None:
        """Close the sockets. What is in the kernel stays."""
        self._lister.close()
        self._conntrack.close()

    def add(self, address: Net) -> None:
        """It is gone, perhaps again."""
        self._addresses.add(address)
        self._sought.discard(address)

    def inherit(self, address: Net) -> None:
        """Somebody has the address now."""
        self._inherited |= address in self._addresses

    @property
    def ready(self) -> bool:
        """Whether ``forget`` has something to do now."""
        return self._lister.ready if self._steps is not None else bool(self._addresses)

    def forget(self, seconds: float) -> None:
        """Remove the flows of these addresses: for so long at most, unless somebody has one.

        Raises OSError; then it is all to be done once more.
        """
        begin = time.perf_counter()
        try:
            if self._inherited:
                self._forget_at_once()
            if self._steps is None and self._addresses:
                self._sought = set(self._addresses)
                self._steps = self._forget_sought(frozenset(self._sought))
            for has_more in self._steps or ():
                if not has_more or time.perf_counter() - begin > seconds:
                    return
        except OSError:
            self._steps = None
            self.close()  # perhaps in the midst of an answer
            self._lister, self._conntrack = Lister(self._wake), Conntrack()
            raise
        self._steps = None

    def _forget_at_once(self) -> None:
        for listing in _listings(self._addresses):
            self._delete([flow for flows in listing(self._conntrack) for flow in flows])
        self._addresses.clear()
        self._sought.clear()
        self._inherited = False

    def _forget_sought(self, sought: frozenset[Net]) -> Iterator[bool]:
        """In steps; False: wait until there are more flows."""
        for listing in _listings(sought):
            for flows in self._lister.listed(listing):
                if flows is not None:
                    self._delete(flows)
                yield flows is not None
        _log.debug("no flows any more of %d addresses that are gone", len(sought))
        self._addresses -= self._sought
        self._sought.clear()

    def _delete(self, flows: Iterable[Flow]) -> None:
        """Delete these, but of addresses that are still gone alone."""
        gone = self._addresses
        own = (flow for flow in flows if not gone.isdisjoint(_ends(flow)))
        self._conntrack.delete(own)


def _ends(flow: Flow) -> tuple[Net, ...]:
    return flow.original.src, flow.original.dst, flow.reply.src, flow.reply.dst


def _listings(addresses: Collection[Net]) -> Iterator[Listing]:
    for version in (V4, V6):
        own = [net for net in addresses if net.version == version]
        if own:
            yield partial(Conntrack.steps_of, version=version, addresses=own, meant=True)
