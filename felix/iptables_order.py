"""In which order members of ipsets come and go, so that nothing passes that is forbidden.

ipsets change one by one, while the chains stay. Who gets into the set of an Allow, and into that of
a Deny before it, is forbidden all the while, and so must be in the second before the first. So
members come first into the sets whose members are kept out, and leave them last; sets of which both
is true are in between. Where an Allow before a Deny takes the place of one behind it, what is
allowed may be dropped for as long as such a change takes; the other order would let pass what is
forbidden.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from enum import IntEnum

_SET = re.compile(r"-m set (! )?--match-set ([^ ]+) ")
_KEEPS_OUT = re.compile(r" -j (?:DROP|REJECT)\b")
_DECIDES_NOTHING = re.compile(r" -j (?:RETURN|LOG)\b")


class Role(IntEnum):
    """What it means to packets to be in a set. Members come in this order."""

    KEPT_OUT = 0
    BOTH = 1
    LET_IN = 2


class Roles:
    """Of all sets, by the rules that look them up."""

    def __init__(self) -> None:
        self._letting: Counter[str] = Counter()
        self._keeping: Counter[str] = Counter()
        self._going: list[str] = []  # fragments

    def come(self, fragments: Iterable[str]) -> None:
        """Rules are to be in force."""
        for name, keeps_out in _uses(fragments):
            (self._keeping if keeps_out else self._letting)[name] += 1

    def go(self, fragments: Iterable[str]) -> None:
        """Rules are to be in force no more; until ``gone`` they may be."""
        self._going.extend(fragment for fragment in fragments if "--match-set" in fragment)

    def gone(self) -> None:
        """The chains are as they are to be."""
        for name, keeps_out in _uses(self._going):
            counts = self._keeping if keeps_out else self._letting
            counts[name] -= 1
            if not counts[name]:
                del counts[name]
        self._going.clear()

    def of(self, name: str) -> Role:
        """A set's."""
        if name not in self._keeping:
            return Role.LET_IN
        return Role.BOTH if name in self._letting else Role.KEPT_OUT


def _uses(fragments: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Sets that rules look up, and whether that keeps members out."""
    for fragment in fragments:
        if "--match-set" not in fragment or _DECIDES_NOTHING.search(fragment):
            continue
        keeps_out = _KEEPS_OUT.search(fragment) is not None
        for inverted, name in _SET.findall(fragment):
            yield name, keeps_out != bool(inverted)
