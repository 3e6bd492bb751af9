"""Arithmetic on one block: pure, exactly as Calico's, whose nodes may share the block.

A block is a small CIDR. Its addresses are numbered from 0 (ordinals). ``allocations`` says for
each ordinal which element of ``attributes`` (who holds it) counts; ``unallocated`` is the queue
of free ordinals: taken from the head, given back at the tail, so that an address rests as long
as possible. An address that was released while there is a cooldown stays allocated until that
is over, to an element that says only ``releasedAt``.

Source of the behaviour: libcalico-go/lib/ipam/ipam_block.go; of the JSON: the IPAMBlock CRD.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from api.errors import InvalidObjectError, Problem
from api.net import Net, format_address, host_net, parse_net

JSON = dict[str, Any]

_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)

WINDOWS_RESERVED = "windows-reserved-ipam-handle"


class BlockError(Exception):
    """The block refuses, and is as it was."""


class AffinityError(BlockError):
    """The block belongs to another node, or to none."""


class AssignedError(BlockError):
    """The address is assigned already."""


class ReleaseError(BlockError):
    """An address has another holder, or was assigned at another time, than the release says."""


class OutsideError(BlockError):
    """The address does not lie in the block."""


@dataclass(frozen=True, slots=True)
class Cooldown:
    """How long an address rests after its release, in seconds, and what time it is now."""

    seconds: int = 0
    now: datetime = _LONG_AGO

    def over(self, released_at: str) -> bool:
        """Whether an address that was released then (RFC 3339) may be given again."""
        if not self.seconds:
            return True
        return self.now - _time(released_at) >= timedelta(seconds=self.seconds)

    def stamp(self) -> str:
        """Now, as RFC 3339; the next full second, so that none rests for too short a time."""
        if self.now.microsecond and self.seconds:
            return _stamp(self.now + timedelta(seconds=1))
        return _stamp(self.now)


NO_COOLDOWN = Cooldown()


@dataclass(slots=True)
class Released:
    """What a release did: addresses given back, those that were free, and counts by handle."""

    addresses: list[Net] = field(default_factory=list)
    skipped: list[Net] = field(default_factory=list)
    by_handle: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Block:
    """One block. ``affinity`` is ``host:<node>``, another owner, or None.

    ``attributes``: ``{"handle_id": …, "secondary": {…}}`` or ``{"releasedAt": …}``, as stored,
    without absent keys.
    ``sequence`` grows by one with every write; ``sequences`` remembers, for each allocated
    ordinal, what it was before the write that allocated it. ``claimed``: RFC 3339, or None.
    """

    net: Net
    affinity: str | None
    allocations: list[int | None]
    unallocated: list[int]
    attributes: list[JSON]
    sequence: int
    sequences: dict[int, int]
    claimed: str | None = None

    @classmethod
    def new(cls, net: Net, affinity: str | None, sequence: int, claimed: str | None) -> Block:
        """An empty block."""
        return cls(
            net, affinity, [None] * net.size, list(range(net.size)), [], sequence, {}, claimed
        )

    @classmethod
    def from_spec(cls, name: str, spec: Mapping[str, Any]) -> Block:
        """The block of an IPAMBlock's spec. Raises InvalidObjectError."""
        try:
            block = cls(
                net=parse_net(spec["cidr"]),
                affinity=spec.get("affinity") or None,
                allocations=list(spec["allocations"]),
                unallocated=list(spec["unallocated"]),
                attributes=list(spec["attributes"] or ()),
                sequence=int(spec["sequenceNumber"]),
                sequences={
                    int(ordinal): number
                    for ordinal, number in (spec.get("sequenceNumberForAllocation") or {}).items()
                },
                claimed=spec.get("affinityClaimTime") or None,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise _invalid(name, "spec", spec, f"a complete block ({error!r})") from error
        block._check(name)
        return block

    def to_spec(self) -> JSON:
        """The spec of an IPAMBlock."""
        spec: JSON = {
            "cidr": str(self.net),
            "affinity": self.affinity,
            "allocations": self.allocations,
            "unallocated": self.unallocated,
            "attributes": self.attributes,
            "sequenceNumber": self.sequence,
            "sequenceNumberForAllocation": {
                str(ordinal): number for ordinal, number in sorted(self.sequences.items())
            },
            "deleted": False,
            "strictAffinity": False,  # no longer used, but the CRD wants it
        }
        if self.affinity is None:
            del spec["affinity"]
        if self.claimed is not None:
            spec["affinityClaimTime"] = self.claimed
        return spec

    @property
    def empty(self) -> bool:
        """Whether no address is allocated, but for those a Windows node reserves in its blocks.

        As in Calico, one whose cooldown is not over, or was not looked at, counts as allocated.
        """
        used = {index for index in self.allocations if index is not None}
        return all(
            (_handle(self.attributes[index]) or "").lower() == WINDOWS_RESERVED for index in used
        )

    def owned_for(self, now: datetime) -> timedelta | None:
        """How long it has had its owner; None where nobody can tell.

        A time that makes no sense is as good as none; without a zone it is UTC.
        """
        if self.claimed is None:
            return None
        try:
            return now - _time(str(self.claimed))
        except ValueError:
            return None

    @property
    def resting(self) -> bool:
        """Whether an address waits for the end of its cooldown."""
        return any("releasedAt" in attribute for attribute in self.attributes)

    def address(self, ordinal: int) -> Net:
        """The address of an ordinal, as a /32 or /128."""
        return host_net(self.net.version, self.net.address + ordinal)

    def ordinal(self, address: Net) -> int:
        """The ordinal of an address. Raises OutsideError.

        As Calico does, it looks only at the last 64 bits of an IPv6 address (an outside one can
        pass for one inside): choose the block by the address.
        """
        distance = (address.address - self.net.address) & 0xFFFF_FFFF_FFFF_FFFF
        if address.version != self.net.version or distance >= self.net.size:
            raise OutsideError(f"{_text(address)} is not in block {self.net}")
        return distance

    def free(self, reserved: Sequence[Net] = ()) -> int:
        """How many addresses can still be taken."""
        return sum(not self._reserved(ordinal, reserved) for ordinal in self.unallocated)

    def take(
        self,
        count: int,
        handle: str | None,
        secondary: Mapping[str, str],
        *,
        only_for: str | None = None,
        reserved: Sequence[Net] = (),
    ) -> list[Net]:
        """Allocate up to ``count`` addresses, fewer (or none) when the block runs out.

        ``only_for``: an affinity the block must have, or AffinityError is raised. Addresses in
        ``reserved`` keep their place in the queue.
        """
        self._must_belong_to(only_for)
        chosen: list[int] = []
        for ordinal in self.unallocated:
            if len(chosen) == count:
                break
            if not self._reserved(ordinal, reserved):
                chosen.append(ordinal)
        self._allocate(chosen, handle, secondary)
        return [self.address(ordinal) for ordinal in chosen]

    def take_address(
        self,
        address: Net,
        handle: str | None,
        secondary: Mapping[str, str],
        *,
        only_for: str | None = None,
    ) -> None:
        """Allocate one address. Raises AffinityError, AssignedError."""
        self._must_belong_to(only_for)
        ordinal = self.ordinal(address)
        if self.allocations[ordinal] is not None:
            raise AssignedError(f"{_text(address)} is assigned already")
        self._allocate([ordinal], handle, secondary)

    def release(
        self,
        addresses: Iterable[Net],
        *,
        handle: str | None = None,
        sequences: Mapping[Net, int] | None = None,
        cooldown: Cooldown = NO_COOLDOWN,
    ) -> Released:
        """Give addresses back; those that are free already are reported as skipped.

        With ``handle`` every address must have that holder, and one in ``sequences`` must have
        been allocated at that sequence number; else ReleaseError is raised for all of them.
        """
        released = Released()
        ordinals: list[int] = []
        for address in dict.fromkeys(addresses):  # each once
            ordinal = self.ordinal(address)
            sequence = (sequences or {}).get(address)
            if sequence is not None and self.sequences.get(ordinal) != sequence:
                raise ReleaseError(
                    f"{_text(address)} was allocated at sequence number"
                    f" {self.sequences.get(ordinal)}, not {sequence}"
                )
            index = self.allocations[ordinal]
            if index is None or "releasedAt" in self.attributes[index]:
                released.skipped.append(address)
                continue
            holder = _handle(self.attributes[index])
            if handle is not None and holder != handle:
                raise ReleaseError(f"{_text(address)} is held by {holder!r}, not by {handle!r}")
            ordinals.append(ordinal)
            released.addresses.append(address)
            if holder is not None:
                released.by_handle[holder] = released.by_handle.get(holder, 0) + 1
        self._retire(ordinals, cooldown)
        for ordinal in ordinals:
            if ordinal in self.sequences:  # it rests
                self.sequences[ordinal] = self.sequence
        return released

    def release_handle(self, handle: str, cooldown: Cooldown = NO_COOLDOWN) -> list[Net]:
        """Give back all that a handle holds, in the order of the addresses."""
        ordinals = self._held_by(handle)
        self._retire(ordinals, cooldown)
        return [self.address(ordinal) for ordinal in ordinals]

    def collect(self, cooldown: Cooldown) -> bool:
        """Free the addresses whose cooldown is over; whether there were any.

        To the tail of the queue, in the order of the addresses; attributes nobody needs any more
        go, the rest move up.
        """
        ready = {
            index
            for index, attribute in enumerate(self.attributes)
            if "releasedAt" in attribute and cooldown.over(attribute["releasedAt"])
        }
        if not ready:
            return False
        for ordinal, index in enumerate(self.allocations):
            if index in ready:
                self.allocations[ordinal] = None
                self.sequences.pop(ordinal, None)
                self.unallocated.append(ordinal)
        self._compact()
        return True

    def held_by(self, handle: str) -> list[Net]:
        """The addresses a handle holds."""
        return [self.address(ordinal) for ordinal in self._held_by(handle)]

    def holder(self, address: Net) -> JSON | None:
        """The attributes of an address, None when it is free."""
        index = self.allocations[self.ordinal(address)]
        return None if index is None else self.attributes[index]

    def _held_by(self, handle: str) -> list[int]:
        indexes = {
            index for index, attribute in enumerate(self.attributes) if _handle(attribute) == handle
        }
        return [ordinal for ordinal, index in enumerate(self.allocations) if index in indexes]

    def _must_belong_to(self, affinity: str | None) -> None:
        if affinity is not None and self.affinity != affinity:
            raise AffinityError(
                f"block {self.net} belongs to {self.affinity or 'nobody'}, not to {affinity}"
            )

    def _reserved(self, ordinal: int, reserved: Sequence[Net]) -> bool:
        return bool(reserved) and any(net.contains(self.address(ordinal)) for net in reserved)

    def _allocate(
        self, ordinals: Sequence[int], handle: str | None, secondary: Mapping[str, str]
    ) -> None:
        if not ordinals:
            return
        attribute: JSON = {}
        if handle is not None:
            attribute["handle_id"] = handle
        if secondary:
            attribute["secondary"] = dict(secondary)
        try:
            index = self.attributes.index(attribute)
        except ValueError:
            index = len(self.attributes)
            self.attributes.append(attribute)
        for ordinal in ordinals:
            self.unallocated.remove(ordinal)
            self.allocations[ordinal] = index
            self.sequences[ordinal] = self.sequence

    def _retire(self, ordinals: Sequence[int], cooldown: Cooldown) -> None:
        """Let addresses rest, and free those that have."""
        if not ordinals:
            return
        self.attributes.append({"releasedAt": cooldown.stamp()})
        for ordinal in ordinals:
            self.allocations[ordinal] = len(self.attributes) - 1
        if not self.collect(cooldown):
            self._compact()

    def _compact(self) -> None:
        used = sorted({index for index in self.allocations if index is not None})
        place = {index: position for position, index in enumerate(used)}
        self.attributes = [self.attributes[index] for index in used]
        self.allocations = [None if index is None else place[index] for index in self.allocations]

    def _check(self, name: str) -> None:
        """Refuse what would make us give an address twice or lose one."""
        size = self.net.size
        if len(self.allocations) != size:
            raise _invalid(
                name, "spec.allocations", len(self.allocations), f"{size} elements for {self.net}"
            )
        indexes = range(len(self.attributes))
        for ordinal, index in enumerate(self.allocations):
            if index is not None and index not in indexes:
                raise _invalid(
                    name, f"spec.allocations[{ordinal}]", index, "the index of one of attributes"
                )
        for place, attribute in enumerate(self.attributes):
            if "releasedAt" in attribute:
                _check_time(name, f"spec.attributes[{place}].releasedAt", attribute["releasedAt"])
        free = {ordinal for ordinal, index in enumerate(self.allocations) if index is None}
        if len(self.unallocated) != len(free) or set(self.unallocated) != free:
            raise _invalid(
                name,
                "spec.unallocated",
                self.unallocated,
                f"each ordinal without allocation once: {sorted(free)}",
            )


def _handle(attribute: JSON) -> str | None:
    """Who holds it. Handles that came from host-local's files may go on after a carriage return."""
    handle: str | None = attribute.get("handle_id")
    return handle.partition("\r")[0] if handle else handle


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _stamp(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def _check_time(name: str, path: str, text: object) -> None:
    try:
        _time(str(text))
    except ValueError:
        raise _invalid(name, path, text, "a time such as 2026-01-02T03:04:05Z") from None


def _text(address: Net) -> str:
    return format_address(address.version, address.address)


def _invalid(name: str, path: str, value: object, expected: str) -> InvalidObjectError:
    return InvalidObjectError("IPAMBlock", name, [Problem(path, value, expected)])
