"""TCP connections that policy ended stay ended, also when their server goes on sending.

The kernel takes a TCP packet of a connection that it doesn't know for the first of a new one
(``nf_conntrack_tcp_loose``). When that packet comes from the server, the connection seems to
begin there: what may not be begun by the client would go on as a connection begun by the server,
which policy may well allow. So what a server sends on is dropped by a table of its own, ``calico-
ended``, as long as the set ``connections`` in it names the connection; a packet that begins a
connection is not what it drops. It is nftables also where iptables enforces: there is no set of
iptables' that could hold both ends with their ports.

Elements go by themselves after a day, or when policy allows the connection again; the table is
there only while it is needed. A restarted agent finds it as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from api.net import V4, V6, host_net
from kernel import nft_expressions as nft
from kernel.conntrack import Flow, Tuple
from kernel.nft_expressions import Base, Compare, ConntrackState, Meta, Verdict
from kernel.nft_sets import ADDRESS4, ADDRESS6, PORT, NftSet, key
from kernel.nftables import BaseChain, Nftables, NftablesError, NftRule

TABLE = "calico-ended"
SET = "connections"
TCP = 6

_DAY = 24 * 3600  # s
_MOST = 1 << 13
_AFTER_MANGLE = -149  # connection tracking is at -200
_HOOKS = ("prerouting", "output")
_FLAGS = 13  # offset in TCP's header
_FIN_SYN_RST_ACK, _SYN = b"\x17", b"\x02"
_SOURCE = {V4: 12, V6: 8}  # offset in the IP header
_SIZE = {V4: 4, V6: 16}


class Ended:
    """Those of one IP version, in the calling thread's network namespace."""

    def __init__(self, version: int) -> None:
        self._nftables = Nftables(version, TABLE)
        self._version = version
        self._exists: bool | None = None  # None: not known

    def close(self) -> None:
        """Close the socket. What is in the kernel stays."""
        self._nftables.close()

    def add(self, flows: Iterable[Flow]) -> None:
        """Let the servers of these say no more. Raises OSError.

        Translated sources are left out: without the translation nobody knows for whom it is.
        """
        keys = {
            _key(flow.reply)
            for flow in flows
            if flow.original.protocol == TCP and flow.reply.dst == flow.original.src
        }
        if not keys:
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
        if self._exists is None:
            self._exists = self._nftables.exists()
        if not self._exists:
            return
        try:
            keys = self._nftables.keys(SET)
        except FileNotFoundError:
            self._exists = None
            return
        allowed = {each for each in keys if not is_forbidden(self._began(each))}
        transaction = self._nftables.transaction()
        if allowed == keys:
            transaction.delete_table()
        else:
            transaction.delete_keys(SET, allowed)
        self._nftables.commit(transaction)
        self._exists = allowed != keys

    def _add(self, keys: set[bytes]) -> None:
        transaction = self._nftables.transaction()
        if not self._exists:
            address = ADDRESS4 if self._version == V4 else ADDRESS6
            transaction.create_table()
            fields = (address, PORT, address, PORT)
            transaction.create_set(NftSet(SET, fields, size=_MOST, timeout=_DAY))
            for hook in _HOOKS:
                transaction.create_chain(hook, BaseChain("filter", hook, _AFTER_MANGLE))
                transaction.flush_chain(hook)
                transaction.append_rules(hook, [NftRule(self._rule(), "Policy ended it")])
        transaction.add_keys(SET, keys)
        self._nftables.commit(transaction)
        self._exists = True

    def _rule(self) -> bytes:
        """``ct state new tcp flags & (fin|syn|rst|ack) != syn … @connections counter drop``."""
        source, size = _SOURCE[self._version], _SIZE[self._version]
        first = nft.NARROW_REGISTER
        second = first + size // 4 + 1
        return b"".join(
            (
                nft.load_conntrack_state(),
                nft.mask(nft.host_order(ConntrackState.NEW)),
                nft.compare(bytes(4), Compare.NOT_EQUAL),
                nft.load_meta(Meta.L4PROTO),
                nft.compare(bytes((TCP,))),
                nft.load_payload(Base.TRANSPORT, _FLAGS, 1),
                nft.mask(_FIN_SYN_RST_ACK),
                nft.compare(_SYN, Compare.NOT_EQUAL),
                nft.load_payload(Base.NETWORK, source, size, first),
                nft.load_payload(Base.TRANSPORT, 0, 2, second - 1),
                nft.load_payload(Base.NETWORK, source + size, size, second),
                nft.load_payload(Base.TRANSPORT, 2, 2, second + size // 4),
                nft.lookup(SET, register=first),
                nft.counter(),
                nft.verdict(Verdict.DROP),
            )
        )

    def _began(self, raw: bytes) -> Tuple:
        size = _SIZE[self._version]

        def end(offset: int) -> tuple[int, int]:
            address, port = raw[offset : offset + size], raw[offset + size : offset + size + 2]
            return int.from_bytes(address, "big"), int.from_bytes(port, "big")

        (server, server_port), (client, client_port) = end(0), end(size + 4)
        return Tuple(
            host_net(self._version, client),
            host_net(self._version, server),
            TCP,
            client_port,
            server_port,
        )


def _key(sent: Tuple) -> bytes:
    assert sent.src_port is not None and sent.dst_port is not None, sent
    ports = (port.to_bytes(2, "big") for port in (sent.src_port, sent.dst_port))
    return key(sent.src.packed(), next(ports), sent.dst.packed(), next(ports))
