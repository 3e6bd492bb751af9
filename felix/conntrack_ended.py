"""What policy ended stays ended, also when the server goes on sending.

To the kernel a packet of a flow that it doesn't know is the first of a new one, in the midst of a
TCP connection, too (``nf_conntrack_tcp_loose``). When it comes from the server, the flow seems to
begin there: what the client may not begin would go on as begun by the server, which policy may
well allow. So what servers go on sending is dropped, by a table of its own, ``calico-ended``,
whose sets name the flows. It is nftables also where iptables enforces: no set of iptables' holds
both ends with their ports.

- TCP: what does not begin a connection, for a day.
- UDP: everything, as long as the kernel would remember a conversation that is silent
  (``nf_conntrack_udp_timeout_stream``). What is still sent then is a conversation of the server's.

Or until policy allows it again. The table is there only while it is needed; a restarted agent
finds it as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Set
from typing import NamedTuple

from api.net import V4, V6, host_net
from kernel import nft_expressions as nft
from kernel.conntrack import Flow, Tuple
from kernel.nft_expressions import Base, Compare, ConntrackState, Meta, Verdict
from kernel.nft_sets import ADDRESS4, ADDRESS6, PORT, ForeignElementError, NftSet, key
from kernel.nftables import BaseChain, Nftables, NftablesError, NftRule

TABLE = "calico-ended"

_MOST = 1 << 13
_AFTER_MANGLE = -149  # connection tracking is at -200
_HOOKS = ("prerouting", "output")
_FLAGS = 13  # offset in TCP's header
_FIN_SYN_RST_ACK, _SYN = b"\x17", b"\x02"
_SOURCE = {V4: 12, V6: 8}  # offset in the IP header
_SIZE = {V4: 4, V6: 16}


class _Protocol(NamedTuple):
    number: int
    name: str  # of the set
    seconds: int


_TCP = _Protocol(6, "tcp-connections", 24 * 3600)
_UDP = _Protocol(17, "udp-conversations", 120)
_PROTOCOLS = (_TCP, _UDP)


class Ended:
    """Those of one IP version, in the calling thread's network namespace."""

    def __init__(self, version: int) -> None:
        self._nftables = Nftables(version, TABLE)
        self._version = version
        self._exists: bool | None = None  # None: not known

    def close(self) -> None:
        """Close the socket. What is in the kernel stays."""
        self._nftables.close()

    def add(self, flows: Collection[Flow]) -> None:
        """Let the servers of these say no more. Raises OSError.

        Translated sources are left out: without the translation nobody knows for whom it is.
        """
        keys = {
            protocol: {
                _key(flow.reply)
                for flow in flows
                if flow.original.protocol == protocol.number and flow.reply.dst == flow.original.src
            }
            for protocol in _PROTOCOLS
        }
        if not any(keys.values()):
            return
        try:
            self._add(keys)
        except NftablesError:
            # Perhaps somebody else removed it meanwhile.
            self._exists = None
            self._add(keys)

    def review(self, is_forbidden: Callable[[Tuple], bool]) -> None:
        """Take out those whose client may speak to their server again. Raises OSError.

        They are asked about as their client began them.
        """
        try:
            self._review(is_forbidden)
        except (NftablesError, FileNotFoundError):
            # Some went by themselves meanwhile, or somebody else removed all of them.
            self._exists = None
            self._review(is_forbidden)
        except ForeignElementError:
            # Whom it stops now is somebody else's idea.
            transaction = self._nftables.transaction()
            transaction.delete_table()
            self._nftables.commit(transaction)
            self._exists = False

    def _review(self, is_forbidden: Callable[[Tuple], bool]) -> None:
        if self._exists is None:
            self._exists = self._nftables.exists()
        if not self._exists:
            return
        transaction = self._nftables.transaction()
        needed = False
        for protocol in _PROTOCOLS:
            keys = self._nftables.keys(protocol.name)
            allowed = {key for key in keys if not is_forbidden(self._began(protocol, key))}
            transaction.delete_keys(protocol.name, allowed)
            needed = needed or allowed != keys
        if not needed:
            transaction = self._nftables.transaction()
            transaction.delete_table()
        self._nftables.commit(transaction)
        self._exists = needed

    def _add(self, keys: Mapping[_Protocol, Set[bytes]]) -> None:
        transaction = self._nftables.transaction()
        if not self._exists:
            address = ADDRESS4 if self._version == V4 else ADDRESS6
            transaction.create_table()
            for hook in _HOOKS:
                transaction.create_chain(hook, BaseChain("filter", hook, _AFTER_MANGLE))
                transaction.flush_chain(hook)
            for protocol in _PROTOCOLS:
                fields = (address, PORT, address, PORT)
                wanted = NftSet(protocol.name, fields, size=_MOST, timeout=protocol.seconds)
                transaction.create_set(wanted)
                for hook in _HOOKS:
                    rule = NftRule(self._rule(protocol), "Policy ended it")
                    transaction.append_rules(hook, [rule])
        for protocol, some in keys.items():
            transaction.add_keys(protocol.name, some)
        self._nftables.commit(transaction)
        self._exists = True

    def _rule(self, protocol: _Protocol) -> bytes:
        """``ct state new tcp flags & (fin|syn|rst|ack) != syn … @tcp-connections counter drop``."""
        source, size = _SOURCE[self._version], _SIZE[self._version]
        first = nft.NARROW_REGISTER
        second = first + size // 4 + 1
        middle = (
            nft.load_payload(Base.TRANSPORT, _FLAGS, 1),
            nft.mask(_FIN_SYN_RST_ACK),
            nft.compare(_SYN, Compare.NOT_EQUAL),
        )
        return b"".join(
            (
                nft.load_conntrack_state(),
                nft.mask(nft.host_order(ConntrackState.NEW)),
                nft.compare(bytes(4), Compare.NOT_EQUAL),
                nft.load_meta(Meta.L4PROTO),
                nft.compare(bytes((protocol.number,))),
                *(middle if protocol is _TCP else ()),
                nft.load_payload(Base.NETWORK, source, size, first),
                nft.load_payload(Base.TRANSPORT, 0, 2, second - 1),
                nft.load_payload(Base.NETWORK, source + size, size, second),
                nft.load_payload(Base.TRANSPORT, 2, 2, second + size // 4),
                nft.lookup(protocol.name, register=first),
                nft.counter(),
                nft.verdict(Verdict.DROP),
            )
        )

    def _began(self, protocol: _Protocol, raw: bytes) -> Tuple:
        size = _SIZE[self._version]

        def end(offset: int) -> tuple[int, int]:
            address, port = raw[offset : offset + size], raw[offset + size : offset + size + 2]
            return int.from_bytes(address, "big"), int.from_bytes(port, "big")

        (server, server_port), (client, client_port) = end(0), end(size + 4)
        return Tuple(
            host_net(self._version, client),
            host_net(self._version, server),
            protocol.number,
            client_port,
            server_port,
        )


def _key(sent: Tuple) -> bytes:
    assert sent.src_port is not None and sent.dst_port is not None, sent
    ports = (port.to_bytes(2, "big") for port in (sent.src_port, sent.dst_port))
    return key(sent.src.packed(), next(ports), sent.dst.packed(), next(ports))
