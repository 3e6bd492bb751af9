"""Sets of addresses that iptables rules refer to: read, fill, replace. See ipset(8).

Ours are recognised by a name prefix. Members are text in the form ``ipset save`` prints:
``10.0.0.5``, ``10.0.0.0/26``, ``10.0.0.5,tcp:80``, ``fd00::1,udp:53``. Speaks netlink
(linux/netfilter/ipset/ip_set.h), so a change costs microseconds.
"""

from __future__ import annotations

import errno
import hashlib
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from api.net import V4, V6, Net, format_address
from kernel.ipset_members import PROTOCOLS, encode_member, parse_members
from kernel.netlink import (
    NETLINK_NETFILTER,
    NLA_F_NET_BYTEORDER,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Failure,
    Message,
    NetlinkSocket,
    attribute,
    attribute_text,
    attributes,
    nested,
    text,
)

NAME_LIMIT = 31  # characters in a set's name

_SUBSYSTEM = 6 << 8  # NFNL_SUBSYS_IPSET
_CREATE = _SUBSYSTEM | 2
_DESTROY = _SUBSYSTEM | 3
_SWAP = _SUBSYSTEM | 6
_LIST = _SUBSYSTEM | 7
_ADD = _SUBSYSTEM | 9
_DEL = _SUBSYSTEM | 10
_TYPE = _SUBSYSTEM | 13

# struct nfgenmsg, then IPSET_ATTR_PROTOCOL 7
_PREAMBLE = bytes((0, 0, 0, 0)) + attribute(1, b"\x07")

_SETNAME = 2
_TYPENAME = 3  # and the second name of a swap
_REVISION = 4
_FAMILY = 5
_FLAGS = 6
_DATA = 7
_ADT = 8
_LINENO = 9

_HASHSIZE = 18
_MAXELEM = 19

_LIST_HEADER = 1 << 2
_FAMILIES = {V4: 2, V6: 10}
_VERSIONS = {2: V4, 10: V6}


# An attribute holds at most 64 KiB
_BULK_BYTES = 60_000
_HASH_FULL = 4352
_NO_SECOND_SET = 4101
_ERRORS = {
    4097: "not a member that a set of this type and family can have",
    4098: "the kernel has no such set type",
    4099: "the kernel's limit of sets is reached",
    4100: "the set is in use by a rule",
    4102: "the sets have different types",
    4103: "the member exists already, or doesn't exist",
    4104: "invalid prefix length",
    4106: "invalid address family",
    4109: "an IPv4 address is needed",
    4110: "an IPv6 address is needed",
    4352: "the set is full",
    4353: "null address or prefix length",
    4354: "invalid protocol",
    4355: "a protocol is needed",
}


@dataclass(frozen=True, slots=True)
class IpSet:
    """A set: ``kind`` is ``hash:ip``, ``hash:net``, ``hash:ip,port`` or ``hash:net,port``.

    ``family`` is 4 or 6. ``maxelem`` is how many members it can hold; it grows when more
    are added.
    """

    name: str
    kind: str
    family: int
    maxelem: int = 65536

    def __str__(self) -> str:
        return f"ipset {self.name} ({self.kind} IPv{self.family})"


class IpSetError(OSError):
    """The kernel refused a change. ``set_name`` and ``members`` say which part of it."""

    def __init__(self, code: int, set_name: str, reason: str, members: tuple[str, ...] = ()):
        shown = ", ".join(members[:5]) + (f" and {len(members) - 5} more" * (len(members) > 5))
        super().__init__(code, f"ipset {set_name}: {f'{shown}: ' if shown else ''}{reason}")
        self.set_name = set_name
        self.members = members


def net_members(net: Net) -> tuple[str, ...]:
    """The member (or, for ``0.0.0.0/0``, which ipset cannot hold, the two halves) of a net."""
    if net.is_host:
        return (format_address(net.version, net.address),)
    if net.length:
        return (str(net),)
    upper = 1 << (31 if net.version == V4 else 127)
    return (str(Net(net.version, 0, 1)), str(Net(net.version, upper, 1)))


def port_member(net: Net, protocol: int, port: int) -> str:
    """The member of an address (or net), protocol number and port."""
    address = format_address(net.version, net.address) if net.is_host else str(net)
    return f"{address},{PROTOCOLS.get(protocol, protocol)}:{port}"


class IpSets:
    """The sets whose names begin with ``prefix``, in one network namespace.

    That of the calling thread, unless ``netns_fd`` names another. For one thread at a time.
    """

    def __init__(self, prefix: str = "cali", *, netns_fd: int | None = None) -> None:
        self._prefix = prefix
        self._socket = NetlinkSocket(NETLINK_NETFILTER, netns_fd=netns_fd)
        self._revisions: dict[tuple[str, int], int] = {}

    def __enter__(self) -> IpSets:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def headers(self) -> dict[str, IpSet]:
        """Our sets, without members."""
        body = _PREAMBLE + attribute(_FLAGS | NLA_F_NET_BYTEORDER, struct.pack(">I", _LIST_HEADER))
        found = (_parse_header(answer) for answer in self._socket.dump(Message(_LIST, 0, body)))
        return {each.name: each for each in found if each.name.startswith(self._prefix)}

    def read(self) -> dict[str, tuple[IpSet, frozenset[str]]]:
        """Our sets and their members (``ipset save``)."""
        result = {}
        for name, header in self.headers().items():
            members = self.members(name)
            if members is not None:
                result[name] = (header, members)
        return result

    def members(self, name: str) -> frozenset[str] | None:
        """The members of one set; None if there is no such set."""
        try:
            answers = self._socket.dump(Message(_LIST, 0, _named(name)))
        except FileNotFoundError:
            return None
        return frozenset(
            member
            for answer in answers
            for member in parse_members(attributes(answer, 4).get(_ADT, b""))
        )

    def create(self, ipset: IpSet, members: Iterable[str] = ()) -> None:
        """Make the set, with members. One that exists and is alike is no error.

        Raises IpSetError, ValueError for text that is no member.
        """
        self._check(ipset.name)
        wanted = tuple(members)
        self._do(ipset.name, self._create_message(ipset, len(wanted)))
        self.add(ipset.name, wanted)

    def add(self, name: str, members: Iterable[str]) -> None:
        """Add members; one that is there is no error. A full set grows.

        Raises IpSetError, ValueError for text that is no member.
        """
        self._raise(self.update({name: (tuple(members), ())}))

    def remove(self, name: str, members: Iterable[str]) -> None:
        """Remove members; one that is not there is no error. Raises as ``add`` does."""
        self._raise(self.update({name: ((), tuple(members))}))

    def update(
        self, deltas: Mapping[str, tuple[Collection[str], Collection[str]]]
    ) -> dict[str, IpSetError]:
        """Add and remove members of many sets at once: name -> (added, removed).

        Returns the errors by set. Raises ValueError, before anything is sent, for text
        that is no member.
        """
        parts: list[tuple[str, tuple[str, ...]]] = []
        messages: list[Message] = []
        for name, (added, removed) in deltas.items():
            self._check(name)
            # First in, then out: an address whose entry only changes stays covered.
            for command, members in ((_ADD, added), (_DEL, removed)):
                for part, message in _bulk(command, name, members):
                    parts.append((name, part))
                    messages.append(message)
        errors: dict[str, IpSetError] = {}
        for failure in self._socket.batch(messages):
            name, part = parts[failure.index]
            error = self._repair(name, part, messages[failure.index].type, failure)
            if error is not None:
                errors[name] = error
        return errors

    def replace(self, ipset: IpSet, members: Iterable[str]) -> None:
        """Give the set exactly these members, and ``ipset.maxelem``, in one step.

        Packets see the old members or the new, never a part. The set is made if missing.
        Raises IpSetError (among others when the existing one has another kind), ValueError.
        """
        self._check(ipset.name)
        wanted = tuple(members)
        roomy = replace(ipset, maxelem=max(ipset.maxelem, len(wanted)))
        spare = replace(roomy, name=self._spare_name(ipset.name))
        self.destroy(spare.name)  # left by a crash
        try:
            self.create(spare, wanted)
            self._swap(spare, roomy)
        finally:
            self.destroy(spare.name)

    def destroy(self, name: str) -> None:
        """Remove the set; none there is no error. Raises IpSetError while a rule uses it."""
        self._check(name)
        failures = self._socket.batch([Message(_DESTROY, NLM_F_EXCL, _named(name))])
        if failures and failures[0].errno != errno.ENOENT:
            raise _error(name, failures[0])

    def _swap(self, spare: IpSet, ipset: IpSet) -> None:
        swap = Message(_SWAP, 0, _named(spare.name) + attribute_text(_TYPENAME, ipset.name))
        failures = self._socket.batch([swap])
        if failures and failures[0].errno == _NO_SECOND_SET:
            self._do(ipset.name, self._create_message(ipset))
            self._do(ipset.name, swap)
        elif failures:
            raise _error(ipset.name, failures[0])

    def _repair(
        self, name: str, members: tuple[str, ...], command: int, failure: Failure
    ) -> IpSetError | None:
        """A bulk add or removal failed: find the members at fault; make room if it was that."""
        if failure.errno == _HASH_FULL:
            return self._grow(name, members)
        if failure.errno == errno.ENOENT:
            return IpSetError(errno.ENOENT, name, "no such set")
        singles = [message for each in members for _, message in _bulk(command, name, [each])]
        failures = self._socket.batch(singles)
        if not failures:
            return None
        guilty = tuple(members[each.index] for each in failures)
        return _error(name, failures[0], guilty)

    def _grow(self, name: str, more: Collection[str]) -> IpSetError | None:
        """Replace a full set by one with room, members included."""
        header, present = self.headers().get(name), self.members(name)
        if header is None or present is None:
            return IpSetError(errno.ENOENT, name, "no such set")
        members = present | set(more)
        try:
            self.replace(replace(header, maxelem=max(2 * header.maxelem, len(members))), members)
        except IpSetError as error:
            return error
        return None

    def _create_message(self, ipset: IpSet, size: int = 0) -> Message:
        # A table that has to grow while it is filled waits for packets in flight each time.
        buckets = max(64, 1 << (size // 2).bit_length())
        settings = {_HASHSIZE: buckets, _MAXELEM: ipset.maxelem}
        body = _named(ipset.name) + attribute_text(_TYPENAME, ipset.kind)
        body += attribute(_REVISION, bytes((self._revision(ipset),)))
        body += attribute(_FAMILY, bytes((_FAMILIES[ipset.family],)))
        body += nested(
            _DATA,
            *(
                attribute(kind | NLA_F_NET_BYTEORDER, struct.pack(">I", value))
                for kind, value in settings.items()
            ),
        )
        return Message(_CREATE, NLM_F_CREATE, body)

    def _revision(self, ipset: IpSet) -> int:
        """The newest revision of the set's type that the kernel knows."""
        kind = (ipset.kind, ipset.family)
        if kind not in self._revisions:
            body = _PREAMBLE + attribute_text(_TYPENAME, ipset.kind)
            body += attribute(_FAMILY, bytes((_FAMILIES[ipset.family],)))
            try:
                answer = self._socket.request(Message(_TYPE, 0, body))
            except OSError as error:
                raise _error(ipset.name, Failure(0, error.errno or 0, ipset.kind)) from error
            self._revisions[kind] = attributes(answer, 4)[_REVISION][0]
        return self._revisions[kind]

    def _spare_name(self, name: str) -> str:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return f"{self._prefix}-spare-{digest}"[:NAME_LIMIT]

    def _check(self, name: str) -> None:
        if not name.startswith(self._prefix) or len(name.encode()) > NAME_LIMIT:
            raise ValueError(
                f"ipset {name!r}: a name that begins with {self._prefix!r} and has at most "
                f"{NAME_LIMIT} characters is needed"
            )

    def _do(self, name: str, message: Message) -> None:
        for failure in self._socket.batch([message]):
            raise _error(name, failure)

    @staticmethod
    def _raise(errors: Mapping[str, IpSetError]) -> None:
        for error in errors.values():
            raise error


def _error(name: str, failure: Failure, members: tuple[str, ...] = ()) -> IpSetError:
    if failure.errno == errno.EEXIST:
        reason = "exists, with another type, family or size"
    else:
        reason = _ERRORS.get(failure.errno) or failure.message
    return IpSetError(failure.errno, name, reason, members)


def _named(name: str) -> bytes:
    return _PREAMBLE + attribute_text(_SETNAME, name)


def _bulk(
    command: int, name: str, members: Iterable[str]
) -> Iterator[tuple[tuple[str, ...], Message]]:
    """Messages that add or remove the members, each with the members that are in it."""
    head = _named(name) + attribute(_LINENO, bytes(4))
    part: list[str] = []
    entries: list[bytes] = []
    size = 0
    for member in members:
        entry = encode_member(member)
        if size + len(entry) > _BULK_BYTES:
            yield tuple(part), Message(command, 0, head + nested(_ADT, *entries))
            part, entries, size = [], [], 0
        part.append(member)
        entries.append(entry)
        size += len(entry)
    if part:
        yield tuple(part), Message(command, 0, head + nested(_ADT, *entries))


def _parse_header(answer: bytes) -> IpSet:
    found = attributes(answer, 4)
    settings = attributes(found.get(_DATA, b""))
    return IpSet(
        name=text(found[_SETNAME]),
        kind=text(found[_TYPENAME]),
        family=_VERSIONS.get(found[_FAMILY][0], 0),
        maxelem=int.from_bytes(settings.get(_MAXELEM, b""), "big"),
    )
