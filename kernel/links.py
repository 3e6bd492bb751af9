"""Network interfaces: read, watch, change, delete; veth pairs, VXLAN devices. See ip-link(8)."""

from __future__ import annotations

import errno
import os
import select
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from kernel.addresses import RTM_DELADDR, RTM_NEWADDR, Address, parse_address
from kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_ECHO,
    NLM_F_EXCL,
    Message,
    MessagesLostError,
    NetlinkSocket,
    attribute,
    attribute_text,
    attribute_u32,
    attributes,
    mac_bytes,
    nested,
    text,
    u32,
)
from kernel.vxlan import Vxlan, changeable, encode_vxlan, parse_vxlan

RTM_NEWLINK = 16
RTM_DELLINK = 17
RTM_GETLINK = 18

_IFF_UP = 0x1
_IFF_LOWER_UP = 0x10000

_IFLA_ADDRESS = 1
_IFLA_IFNAME = 3
_IFLA_MTU = 4
_IFLA_LINK = 5
_IFLA_MASTER = 10
_IFLA_LINKINFO = 18
_IFLA_IFALIAS = 20
_IFLA_AF_SPEC = 26
_IFLA_GROUP = 27
_IFLA_NET_NS_FD = 28
_IFLA_EXT_MASK = 29
_IFLA_NUM_TX_QUEUES = 31
_IFLA_NUM_RX_QUEUES = 32
_IFLA_LINK_NETNSID = 37
_IFLA_INFO_KIND = 1
_IFLA_INFO_DATA = 2
_VETH_INFO_PEER = 1
_IFLA_INET_CONF = 1
_RTEXT_FILTER_SKIP_STATS = 8
_AF_UNSPEC = 0
_AF_INET = 2
_RTMGRP_LINK = 1
_RTMGRP_ADDRESSES = 0x10 | 0x100  # RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
# A BPF program that keeps only messages of type RTM_DELLINK. It loads in network byte order.
_ONLY_DELETIONS = (
    (0x28, 0, 0, 4),  # BPF_LD | BPF_H | BPF_ABS: nlmsghdr.nlmsg_type
    (0x15, 0, 1, int.from_bytes(struct.pack("=H", RTM_DELLINK), "big")),  # BPF_JMP | BPF_JEQ
    (0x06, 0, 0, 0xFFFFFFFF),  # BPF_RET: all of it
    (0x06, 0, 0, 0),  # nothing
)

_IFINFO = struct.Struct("=BxHiII")  # family, device type, index, flags, change mask
_ANY = bytes(_IFINFO.size)
_NUMBER = struct.Struct("=HHI")  # an attribute that holds one: length, type, value

# linux/ip.h IPV4_DEVCONF_…: the names under /proc/sys/net/ipv4/conf/DEVICE/
_INET_CONF = {
    name: number
    for number, name in enumerate(
        (
            "forwarding", "mc_forwarding", "proxy_arp", "accept_redirects", "secure_redirects",
            "send_redirects", "shared_media", "rp_filter", "accept_source_route", "bootp_relay",
            "log_martians", "tag", "arp_filter", "medium_id", "disable_xfrm", "disable_policy",
            "force_igmp_version", "arp_announce", "arp_ignore", "promote_secondaries",
            "arp_accept", "arp_notify", "accept_local", "src_valid_mark", "proxy_arp_pvlan",
            "route_localnet",
        ),
        start=1,
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Link:
    """An interface. ``kind`` is the driver's (``veth``, ``vxlan``), empty for loopback.

    ``peer_index`` is the other end of a veth pair, in the peer's namespace, or the lower
    device of a stacked one; 0 if none. ``master_index`` is the bridge it is a port of.
    ``running``: up and with carrier.
    """

    index: int
    name: str
    kind: str
    mac: str
    mtu: int
    up: bool
    running: bool = False
    group: int = 0
    peer_index: int = 0
    master_index: int = 0
    peer_elsewhere: bool = False  # peer_index counts in another namespace
    data: bytes = b""  # attributes of the kind (IFLA_INFO_DATA)
    alias: str = ""


class Links:
    """The interfaces of the namespace that ``socket`` speaks to."""

    def __init__(self, socket: NetlinkSocket) -> None:
        self._socket = socket

    def read(self) -> dict[str, Link]:
        """All interfaces, by name (``ip link show``)."""
        body = _IFINFO.pack(0, 0, 0, 0, 0) + attribute_u32(_IFLA_EXT_MASK, _RTEXT_FILTER_SKIP_STATS)
        found = map(parse_link, self._socket.dump(Message(RTM_GETLINK, 0, body)))
        return {link.name: link for link in found}

    def get(self, link: int | str) -> Link:
        """One interface, by index or by name (``ip link show dev NAME``).

        Raises OSError (ENODEV) if there is none.
        """
        try:
            return parse_link(self._socket.request(link_get(link)))
        except OSError as error:
            raise OSError(error.errno, f"interface {link}: {error.strerror}") from error


def parse_link(body: bytes) -> Link:
    """The interface that an RTM_NEWLINK or RTM_DELLINK message is about."""
    _, _, index, flags, _ = _IFINFO.unpack_from(body)
    found = attributes(body, _IFINFO.size)
    info = attributes(found.get(_IFLA_LINKINFO, b""))
    return Link(
        index=index,
        name=text(found.get(_IFLA_IFNAME, b"")),
        kind=text(info.get(_IFLA_INFO_KIND, b"")),
        mac=found.get(_IFLA_ADDRESS, b"").hex(":"),
        mtu=_number(found, _IFLA_MTU),
        up=bool(flags & _IFF_UP),
        running=is_running(body),
        group=_number(found, _IFLA_GROUP),
        peer_index=_number(found, _IFLA_LINK),
        master_index=_number(found, _IFLA_MASTER),
        peer_elsewhere=_IFLA_LINK_NETNSID in found,
        data=info.get(_IFLA_INFO_DATA, b""),
        alias=text(found.get(_IFLA_IFALIAS, b"")),
    )


@dataclass(frozen=True, slots=True)
class Ends:
    """A veth pair's two indexes, the peer's in the namespace that has it; see ``Link``."""

    index: int
    peer_index: int


def parse_ends(body: bytes) -> Ends:
    """What an RTM_NEWLINK message says of a pair: a part of ``parse_link``, in less time."""
    index = _IFINFO.unpack_from(body)[2]
    offset, last = _IFINFO.size, len(body) - _NUMBER.size
    length, kind, value = 4, 0, 0
    while offset <= last and length >= 4 and kind != _IFLA_LINK:
        length, kind, value = _NUMBER.unpack_from(body, offset)
        offset += (length + 3) & ~3
    return Ends(index, value if kind == _IFLA_LINK else 0)


def is_running(body: bytes) -> bool:
    """Whether the interface that an RTM_NEWLINK message is about is up and has carrier."""
    flags = _IFINFO.unpack_from(body)[3]
    return bool(flags & _IFF_UP and flags & _IFF_LOWER_UP)


def link_get(link: int | str) -> Message:
    """Ask for one interface, by index or by name; the answer is for ``parse_link``."""
    body = _header(link if isinstance(link, int) else 0)
    body += attribute_u32(_IFLA_EXT_MASK, _RTEXT_FILTER_SKIP_STATS)
    if isinstance(link, str):
        body += attribute_text(_IFLA_IFNAME, link)
    return Message(RTM_GETLINK, 0, body)


def _number(found: Mapping[int, bytes], kind: int) -> int:
    return u32(found[kind]) if kind in found else 0


def veth(
    name: str,
    peer: str,
    *,
    peer_netns_fd: int | None = None,
    mtu: int = 0,
    mac: str | None = None,
    peer_mac: str | None = None,
    queues: int = 1,
    group: int = 0,
    up: bool = True,
) -> Message:
    """A veth pair whose ``peer`` is born in another namespace.

    ``ip link add NAME type veth peer name PEER netns FD``. ``NetlinkSocket.request``
    returns the body for ``parse_link``: ``index`` is this end's, ``peer_index`` the
    peer's. ``up`` concerns this end; the kernel refuses to make the peer up.
    """
    common = _common(queues, mtu)
    other = _ANY + attribute_text(_IFLA_IFNAME, peer) + common
    if peer_netns_fd is not None:
        other += attribute_u32(_IFLA_NET_NS_FD, peer_netns_fd)
    if peer_mac is not None:
        other += attribute(_IFLA_ADDRESS, mac_bytes(peer_mac))
    body = _header(0, up=True if up else None) + attribute_text(_IFLA_IFNAME, name) + common
    if mac is not None:
        body += attribute(_IFLA_ADDRESS, mac_bytes(mac))
    if group:
        body += attribute_u32(_IFLA_GROUP, group)
    body += nested(
        _IFLA_LINKINFO,
        attribute(_IFLA_INFO_KIND, b"veth"),
        nested(_IFLA_INFO_DATA, attribute(_VETH_INFO_PEER, other)),
    )
    return Message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL | NLM_F_ECHO, body)


def ifb(name: str) -> Message:
    """A device that sends to itself, for what must wait on arrival (``ip link add type ifb``)."""
    info = nested(_IFLA_LINKINFO, attribute(_IFLA_INFO_KIND, b"ifb"))
    body = _header(0) + attribute_text(_IFLA_IFNAME, name) + info
    return Message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body)


@lru_cache(maxsize=16)
def _common(queues: int, mtu: int) -> bytes:
    """What both ends of a pair have."""
    common = attribute_u32(_IFLA_NUM_TX_QUEUES, queues)
    common += attribute_u32(_IFLA_NUM_RX_QUEUES, queues)
    return common + attribute_u32(_IFLA_MTU, mtu) if mtu else common


def link_set(
    index: int,
    *,
    up: bool | None = None,
    name: str | None = None,
    mtu: int | None = None,
    mac: str | None = None,
    master_index: int | None = None,
    group: int | None = None,
    netns_fd: int | None = None,
    alias: str | None = None,
    inet_conf: Mapping[str, int] | None = None,
) -> Message:
    """Change what is given (``ip link set``); ``master_index`` 0 takes it from its bridge.

    ``inet_conf``: ``net.ipv4.conf.DEVICE.*``, without a path through /proc; raises ValueError for
    a name that is not one of them.
    """
    body = _header(index, up=up)
    if name is not None:
        body += attribute_text(_IFLA_IFNAME, name)
    if mac is not None:
        body += attribute(_IFLA_ADDRESS, mac_bytes(mac))
    if alias is not None:
        body += attribute(_IFLA_IFALIAS, alias.encode())
    numbers = (
        (_IFLA_MTU, mtu),
        (_IFLA_MASTER, master_index),
        (_IFLA_GROUP, group),
        (_IFLA_NET_NS_FD, netns_fd),
    )
    for kind, value in numbers:
        if value is not None:
            body += attribute_u32(kind, value)
    if inet_conf is not None:
        body += _inet_conf(tuple(inet_conf.items()))
    return Message(RTM_NEWLINK, 0, body)


def link_up(index: int) -> Message:
    """``ip link set dev … up``."""
    return link_set(index, up=True)


def set_group(index: int, group: int) -> Message:
    """Put the interface into a device group (``ip link set … group N``)."""
    return link_set(index, group=group)


@lru_cache(maxsize=64)
def _inet_conf(values: tuple[tuple[str, int], ...]) -> bytes:
    unknown = dict(values).keys() - _INET_CONF.keys()
    if unknown:
        raise ValueError(f"net.ipv4.conf: no such setting: {', '.join(sorted(unknown))}")
    conf = (attribute_u32(_INET_CONF[name], value) for name, value in values)
    return nested(_IFLA_AF_SPEC, nested(_AF_INET, nested(_IFLA_INET_CONF, *conf)))


def delete_link(link: int | str) -> Message:
    """Delete an interface, by index or by name (``ip link del``); a veth's peer goes too."""
    if isinstance(link, int):
        return Message(RTM_DELLINK, 0, _header(link))
    return Message(RTM_DELLINK, 0, _header(0) + attribute_text(_IFLA_IFNAME, link))


def delete_group(group: int) -> Message:
    """Delete all interfaces of a device group in one go (``ip link del group N``).

    Raises ValueError for group 0, where every interface is that was not put elsewhere.
    """
    if group <= 0:
        raise ValueError(f"device group {group}: only a group of its own may be deleted")
    return Message(RTM_DELLINK, 0, _header(0) + attribute_u32(_IFLA_GROUP, group))


def _header(index: int, *, up: bool | None = None) -> bytes:
    change = 0 if up is None else _IFF_UP
    return _IFINFO.pack(0, 0, index, _IFF_UP if up else 0, change)


def ensure_vxlan(socket: NetlinkSocket, vxlan: Vxlan) -> Link:
    """Make the device what it should be, and up; return it as it then is.

    One that exists is changed where the kernel can change it, otherwise (VNI, port)
    made anew, which loses its routes and FDB. Nothing is written when all is right.
    Raises FileExistsError when the name belongs to another kind of device, OSError with
    the kernel's reason.
    """
    links = Links(socket)
    existing = links.read().get(vxlan.name)
    if existing is not None and existing.kind != "vxlan":
        raise FileExistsError(
            errno.EEXIST,
            f"interface {vxlan.name}: is a {existing.kind or 'plain'} device, not vxlan",
        )
    if existing is not None and not _change_vxlan(socket, existing, vxlan):
        _send_all(socket, vxlan, delete_link(existing.index))
        existing = None
    if existing is None:
        header = _header(0) + attribute_text(_IFLA_IFNAME, vxlan.name)
        create = _vxlan_message(header, encode_vxlan(vxlan.settings))
        _send_all(socket, vxlan, create._replace(flags=NLM_F_CREATE | NLM_F_EXCL))
        existing = links.get(vxlan.name)
    wanted = replace(existing, mac=vxlan.mac, mtu=vxlan.mtu or existing.mtu, up=True)
    if wanted == existing:
        return existing
    mac = vxlan.mac if wanted.mac != existing.mac else None
    mtu = vxlan.mtu if wanted.mtu != existing.mtu else None
    _send_all(socket, vxlan, link_set(existing.index, mac=mac, mtu=mtu, up=True))
    return links.get(vxlan.name)


def _change_vxlan(socket: NetlinkSocket, existing: Link, vxlan: Vxlan) -> bool:
    """Change the settings of a device; False when only a new device can have them."""
    wanted, actual = vxlan.settings, parse_vxlan(existing.data)
    if wanted == actual:
        return True
    if not changeable(actual, wanted):
        return False
    message = _vxlan_message(_header(existing.index), encode_vxlan(wanted, change=True))
    return not socket.batch([message])


def _vxlan_message(header: bytes, data: bytes) -> Message:
    info = nested(
        _IFLA_LINKINFO,
        attribute(_IFLA_INFO_KIND, b"vxlan"),
        nested(_IFLA_INFO_DATA, data),
    )
    return Message(RTM_NEWLINK, 0, header + info)


def _send_all(socket: NetlinkSocket, vxlan: Vxlan, *messages: Message) -> None:
    for failure in socket.batch(messages):
        raise failure.error(vxlan)


@dataclass(frozen=True, slots=True)
class LinkEvent:
    """An interface appeared, changed or (``deleted``) went."""

    name: str
    index: int
    up: bool
    deleted: bool


@dataclass(frozen=True, slots=True)
class LinkEventsLost:
    """More happened than could be told: read all interfaces again."""


@dataclass(frozen=True, slots=True)
class AddressEvent:
    """An address came to an interface, changed there, or (``deleted``) went."""

    address: Address
    deleted: bool


class LinkMonitor:
    """A thread that tells ``sink`` of every change of an interface.

    With ``addresses``, of those of its addresses too; with ``only_deletions``, only of those that
    go: of others the kernel doesn't wake it. It hears from the moment it is made, so make it
    before reading the interfaces. ``stop`` may come from any thread.
    """

    def __init__(
        self,
        sink: Callable[[LinkEvent | LinkEventsLost | AddressEvent], None],
        *,
        addresses: bool = False,
        only_deletions: bool = False,
        netns_fd: int | None = None,
    ) -> None:
        self._sink = sink
        groups = _RTMGRP_LINK | (_RTMGRP_ADDRESSES if addresses else 0)
        self._socket = NetlinkSocket(groups=groups, netns_fd=netns_fd)
        if only_deletions:
            self._socket.set_filter(_ONLY_DELETIONS)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="link-monitor", daemon=True)

    def start(self) -> None:
        """Start telling."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and wait until it has ended. Call it once."""
        os.eventfd_write(self._wake, 1)
        if self._thread.ident is not None:
            self._thread.join()
        self._socket.close()
        os.close(self._wake)

    def __enter__(self) -> LinkMonitor:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._wake in ready:
                return
            self._tell()

    def _tell(self) -> None:
        try:
            messages = self._socket.receive()
        except MessagesLostError:
            self._sink(LinkEventsLost())
            return
        for message in messages:
            if message.type in (RTM_NEWADDR, RTM_DELADDR):
                address = parse_address(message.body)
                self._sink(AddressEvent(address, message.type == RTM_DELADDR))
            # A bridge tells of its ports in messages of family AF_BRIDGE, where "deleted"
            # only means "left the bridge".
            if message.type in (RTM_NEWLINK, RTM_DELLINK) and message.body[0] == _AF_UNSPEC:
                link = parse_link(message.body)
                deleted = message.type == RTM_DELLINK
                self._sink(LinkEvent(link.name, link.index, link.up and not deleted, deleted))
