"""Which items do selectors match: an inverted index, kept up to date item by item.

Items are numbered; the items that carry a label, or a label with a value, are kept as the
bits of a Python int, so that a new selector finds its matches with a few ANDs and ORs, 10k
items at a time. A changed item is tried only against the selectors that one of its labels
points at: each selector has *anchors*, labels of which every match carries at least one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from policy.selector import And, Compare, Everything, Has, Membership, Node, Not, Or, Selector

K = TypeVar("K", bound=Hashable)

# A label with a value, or (None) with any value.
Anchor = tuple[str, str | None]

_FEW = 16  # up to so many items a tuple of their numbers is smaller than an int of all bits


class Postings:
    """The items under each label and value: a tuple while few, an int of bits when many.

    Values that few items share (names of pods, hashes) are the many; an int of bits for each
    of them would make memory grow with the square of the number of items.
    """

    __slots__ = ("_any", "_values")

    def __init__(self) -> None:
        self._any: dict[str, tuple[int, ...] | int] = {}
        self._values: dict[str, dict[str, tuple[int, ...] | int]] = {}

    def add(self, label: str, value: str, number: int, *, new_label: bool) -> None:
        """Put an item under a value, and (``new_label``) under the label."""
        values = self._values.setdefault(label, {})
        values[value] = _with(values.get(value, ()), number)
        if new_label:
            self._any[label] = _with(self._any.get(label, ()), number)

    def remove(self, label: str, value: str, number: int, *, lost_label: bool) -> None:
        """Take an item away from under a value, and (``lost_label``) from under the label."""
        values = self._values[label]
        values[value] = _without(values[value], number)
        if not values[value]:
            del values[value]
        if lost_label:
            self._any[label] = _without(self._any[label], number)
            if not self._any[label]:
                del self._any[label], self._values[label]

    def bits(self, anchor: Anchor) -> int:
        """The items under a label and value as bits."""
        return _bits(self._posting(anchor))

    def count(self, anchor: Anchor) -> int:
        """How many items are under a label and value."""
        posting = self._posting(anchor)
        return posting.bit_count() if isinstance(posting, int) else len(posting)

    def bits_where(self, label: str, test: Callable[[str], bool]) -> int:
        """The items whose value of a label passes a test."""
        found = 0
        for value, posting in self._values.get(label, {}).items():
            if test(value):
                found |= _bits(posting)
        return found

    def _posting(self, anchor: Anchor) -> tuple[int, ...] | int:
        label, value = anchor
        if value is None:
            return self._any.get(label, ())
        return self._values.get(label, {}).get(value, ())


class LabelIndex(Generic[K]):
    """Items with labels on one side, selectors on the other, and who matches whom."""

    def __init__(self) -> None:
        self._numbers: dict[K, int] = {}
        self._items: list[K | None] = []
        self._free: list[int] = []
        self._labels: dict[K, Mapping[str, str]] = {}
        self._postings = Postings()
        self._everything = 0
        self._selectors: dict[str, Selector] = {}
        self._matching: dict[str, int] = {}  # selector id -> bits
        self._anchors: dict[str, frozenset[Anchor] | None] = {}
        self._by_anchor: dict[Anchor, set[str]] = {}
        self._unanchored: set[str] = set()

    def set_item(
        self, item: K, labels: Mapping[str, str] | None
    ) -> tuple[list[Selector], list[Selector]]:
        """Give an item its labels (None: it is gone).

        Returns the selectors that began to match it and those that ceased to. The mapping is
        kept and must not change afterwards.
        """
        old = self._labels.get(item)
        if old is None and labels is None:
            return [], []
        number = self._number(item)
        self._post(number, old or {}, labels or {})
        gained: list[Selector] = []
        lost: list[Selector] = []
        bit = 1 << number
        for selector_id in self._candidates(old, labels):
            selector = self._selectors[selector_id]
            before = self._matching[selector_id] >> number & 1
            if before != (labels is not None and selector.matches(labels)):
                self._matching[selector_id] ^= bit
                (lost if before else gained).append(selector)
        if labels is None:
            self._forget(item)
        else:
            self._labels[item] = labels
            self._everything |= bit
        return gained, lost

    def add_selector(self, selector: Selector) -> Iterator[K]:
        """Register a selector, if it isn't yet; iterates over the items it matches."""
        if selector.id not in self._selectors:
            anchors = self._anchors_of(selector.root)
            self._selectors[selector.id] = selector
            self._anchors[selector.id] = anchors
            if anchors is None:
                self._unanchored.add(selector.id)
            else:
                for anchor in anchors:
                    self._by_anchor.setdefault(anchor, set()).add(selector.id)
            self._matching[selector.id] = self._bits(selector.root)
        return self.matches(selector)

    def remove_selector(self, selector: Selector) -> None:
        """Forget a selector."""
        del self._selectors[selector.id], self._matching[selector.id]
        anchors = self._anchors.pop(selector.id)
        if anchors is None:
            self._unanchored.remove(selector.id)
            return
        for anchor in anchors:
            self._by_anchor[anchor].remove(selector.id)
            if not self._by_anchor[anchor]:
                del self._by_anchor[anchor]

    def matches(self, selector: Selector) -> Iterator[K]:
        """The items that a registered selector matches."""
        for number in _numbers(self._matching[selector.id]):
            item = self._items[number]
            if item is not None:
                yield item

    def selectors_of(self, item: K) -> Iterator[Selector]:
        """The registered selectors that match an item."""
        number = self._numbers.get(item)
        if number is not None:
            for selector_id in self._candidates(None, self._labels[item]):
                if self._matching[selector_id] >> number & 1:
                    yield self._selectors[selector_id]

    def is_match(self, selector: Selector, item: K) -> bool:
        """Whether a registered selector matches an item."""
        number = self._numbers.get(item)
        return number is not None and self._matching[selector.id] >> number & 1 == 1

    def any_match(self, selector: Selector) -> bool:
        """Whether a registered selector matches anything."""
        return self._matching[selector.id] != 0

    def _number(self, item: K) -> int:
        number = self._numbers.get(item)
        if number is None:
            if self._free:
                number = self._free.pop()
                self._items[number] = item
            else:
                number = len(self._items)
                self._items.append(item)
            self._numbers[item] = number
        return number

    def _forget(self, item: K) -> None:
        number = self._numbers.pop(item)
        del self._labels[item]
        self._items[number] = None
        self._free.append(number)
        self._everything &= ~(1 << number)

    def _post(self, number: int, old: Mapping[str, str], new: Mapping[str, str]) -> None:
        for label, value in old.items():
            if new.get(label) != value:
                self._postings.remove(label, value, number, lost_label=label not in new)
        for label, value in new.items():
            if old.get(label) != value:
                self._postings.add(label, value, number, new_label=label not in old)

    def _candidates(
        self, old: Mapping[str, str] | None, new: Mapping[str, str] | None
    ) -> Iterable[str]:
        """The selectors that may match the old or the new labels."""
        found = set(self._unanchored)
        for labels in (old or {}, new or {}):
            for label, value in labels.items():
                for anchor in ((label, value), (label, None)):
                    if anchor in self._by_anchor:
                        found |= self._by_anchor[anchor]
        return found

    def _anchors_of(self, node: Node) -> frozenset[Anchor] | None:
        """Labels of which every match of the selector has at least one; None: there are none."""
        match node:
            case Has(label):
                return frozenset([(label, None)])
            case Compare(label, "==", value):
                return frozenset([(label, value)])
            case Compare(label, operator) if operator != "!=":
                return frozenset([(label, None)])
            case Membership(label, "in", values):
                return frozenset((label, value) for value in values)
            case And(operands):
                return self._best(self._anchors_of(operand) for operand in operands)
            case Or(operands):
                alternatives: set[Anchor] = set()
                for operand in operands:
                    anchors = self._anchors_of(operand)
                    if anchors is None:
                        return None
                    alternatives |= anchors
                return frozenset(alternatives)
            case _:
                return None

    def _best(self, choices: Iterable[frozenset[Anchor] | None]) -> frozenset[Anchor] | None:
        """The choice with the fewest items now, and of equals the last.

        What is written first (orchestrator, namespace) tends to be what most items share.
        """
        best: frozenset[Anchor] | None = None
        fewest = 0
        for choice in choices:
            if choice is not None:
                count = sum(map(self._postings.count, choice))
                if best is None or count <= fewest:
                    best, fewest = choice, count
        return best

    def _bits(self, node: Node) -> int:
        """The items that match a part of a selector."""
        match node:
            case Everything():
                return self._everything
            case Has(label):
                return self._postings.bits((label, None))
            case Compare(label, "==", value):
                return self._postings.bits((label, value))
            case Compare(label, "!=", value):
                return self._everything & ~self._postings.bits((label, value))
            case Compare(label, "contains", value):
                return self._postings.bits_where(label, lambda own: value in own)
            case Compare(label, "starts with", value):
                return self._postings.bits_where(label, lambda own: own.startswith(value))
            case Compare(label, _, value):
                return self._postings.bits_where(label, lambda own: own.endswith(value))
            case Membership(label, operator, values):
                found = 0
                for value in values:
                    found |= self._postings.bits((label, value))
                return found if operator == "in" else self._everything & ~found
            case Not(operand):
                return self._everything & ~self._bits(operand)
            case And(operands):
                found = self._everything
                for operand in operands:
                    found &= self._bits(operand)
                return found
            case Or(operands):
                found = 0
                for operand in operands:
                    found |= self._bits(operand)
                return found


def _bits(posting: tuple[int, ...] | int) -> int:
    if isinstance(posting, int):
        return posting
    bits = 0
    for number in posting:
        bits |= 1 << number
    return bits


def _with(posting: tuple[int, ...] | int, number: int) -> tuple[int, ...] | int:
    if isinstance(posting, int):
        return posting | 1 << number
    if len(posting) < _FEW:
        return (*posting, number)
    return _bits(posting) | 1 << number


def _without(posting: tuple[int, ...] | int, number: int) -> tuple[int, ...] | int:
    if isinstance(posting, tuple):
        return tuple(other for other in posting if other != number)
    bits = posting & ~(1 << number)
    return tuple(_numbers(bits)) if bits.bit_count() <= _FEW // 2 else bits


def _numbers(bits: int) -> Iterator[int]:
    """The positions of the bits that are set: by the lowest bit when few, by text when many."""
    if bits.bit_count() * 64 < bits.bit_length():
        while bits:
            lowest = bits & -bits
            yield lowest.bit_length() - 1
            bits ^= lowest
        return
    for number, digit in enumerate(reversed(f"{bits:b}")):
        if digit == "1":
            yield number
