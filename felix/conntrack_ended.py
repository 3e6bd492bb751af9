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
finds it as it was. What a stranger takes from it is put back from memory.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import NamedTuple

from api.net import V4, V6, host_net
from kernel import nft_expressions as nft
from kernel.conntrack import Flow, Tuple
from kernel.nft_expressions import Base, Compare, ConntrackState, Meta, Verdict
from kernel.nft_sets import ADDRESS4, ADDRESS6, PORT, ForeignElementError, NftSet, key
from kernel.nftables import BaseChain, ChainState, Nftables, NftablesError, NftRule, Transaction

TABLE = "calico-ended"

_MOST = 1 << 13
_MARGIN = 1.0  # s, between our clock and the kernel's
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
        # What the kernel is to have, and when each will have gone by itself, in monotonic seconds.
        self._held: dict[_Protocol, dict[bytes, float]] = {each: {} for each in _PROTOCOLS}

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
        if self._exists is None:
            self._look()
        if not self._exists:
            # Not tried: who asks for what the kernel refuses waits until it has undone everything.
            self._write(keys)
        else:
            try:
                self._insert(keys)
            except NftablesError:
                # Somebody else removed it, or more would not fit.
                _, is_whole = self._look()
                if is_whole:
                    self._insert(keys)
                else:
                    self._write(keys)
        now = time.monotonic()
        for protocol, some in keys.items():
            self._held[protocol] |= dict.fromkeys(some, now + protocol.seconds + _MARGIN)

    def held(self) -> list[Tuple]:
        """What is kept ended, as its client began it. Raises OSError."""
        if self._exists is None:
            self._look()
        now = time.monotonic()
        return [
            self._began(protocol, raw)
            for protocol, held in self._held.items()
            for raw, until in held.items()
            if until > now
        ]

    def release(self, began: Collection[Tuple]) -> None:
        """Let these go on, of what is ``held``; with the last the table goes. Raises OSError."""
        if not began and (not self._exists or self.held()):
            return
        found, is_whole = self._look()
        transaction = self._nftables.transaction()
        for protocol, held in self._held.items():
            own = (each for each in began if each.protocol == protocol.number)
            allowed = {_key(_turned(each)) for each in own} & held.keys()
            self._held[protocol] = {raw: held[raw] for raw in held.keys() - allowed}
            transaction.delete_keys(protocol.name, allowed & found[protocol])
        try:
            if is_whole and any(self._held.values()):
                self._nftables.commit(transaction)
                return
        except NftablesError:
            self._look()  # some went by themselves meanwhile, or somebody else removed them
        self._write()

    def restore(self) -> list[Tuple]:
        """Put back what somebody else took away. Raises OSError.

        Returns as what servers may have begun meanwhile what was ended.
        """
        if not any(self._held.values()):
            return []
        _, is_whole = self._look()
        if is_whole:
            return []
        self._write()
        return [_turned(began) for began in self.held()]

    def _look(self) -> tuple[Mapping[_Protocol, set[bytes]], bool]:
        """What the kernel has; and whether that is all there should be, as it was made.

        What an agent before this one put there is remembered from now on.
        """
        state = self._nftables.read()
        self._exists = state.exists
        found: dict[_Protocol, set[bytes]] = {each: set() for each in _PROTOCOLS}
        is_whole = state.exists and not state.dormant
        try:
            for protocol in _PROTOCOLS if state.exists else ():
                found[protocol] = self._nftables.keys(protocol.name)
        except (FileNotFoundError, ForeignElementError):
            is_whole = False  # whom it stops now is somebody else's idea
        now = time.monotonic()
        for protocol, held in self._held.items():
            # How long one of an earlier agent's will stay, nobody tells. It is long only of TCP.
            until = now + _MARGIN + (protocol.seconds if protocol is _TCP else 0)
            expected = {raw for raw, end in held.items() if end > now + 2 * _MARGIN}
            is_whole = is_whole and expected <= found[protocol]
            current = {raw: end for raw, end in held.items() if end > now}
            self._held[protocol] = dict.fromkeys(found[protocol], until) | current
        chains = self._chains()
        return found, (
            is_whole
            and state.chains.keys() == chains.keys()
            and all(state.chains[name].is_as(chain) for name, chain in chains.items())
        )

    def _insert(self, keys: Mapping[_Protocol, Collection[bytes]]) -> None:
        transaction = self._nftables.transaction()
        for protocol, some in keys.items():
            transaction.add_keys(protocol.name, some)
        self._nftables.commit(transaction)

    def _write(self, more: Mapping[_Protocol, Collection[bytes]] | None = None) -> None:
        """The whole table, as it should be, and ``more`` in it; or none, if nothing would be."""
        transaction = self._nftables.transaction()
        if self._exists:
            transaction.delete_table()
        keys = {each: {*held, *(more or {}).get(each, ())} for each, held in self._held.items()}
        needed = any(keys.values())
        if needed:
            self._create(transaction)
            for protocol, some in keys.items():
                transaction.add_keys(protocol.name, some)
        self._nftables.commit(transaction)
        self._exists = needed
        now = time.monotonic()
        for protocol, held in self._held.items():
            self._held[protocol] = dict.fromkeys(held, now + protocol.seconds + _MARGIN)

    def _create(self, transaction: Transaction) -> None:
        address = ADDRESS4 if self._version == V4 else ADDRESS6
        transaction.create_table()
        for protocol in _PROTOCOLS:
            fields = (address, PORT, address, PORT)
            wanted = NftSet(protocol.name, fields, size=_MOST, timeout=protocol.seconds)
            transaction.create_set(wanted)
        for name, chain in self._chains().items():
            transaction.create_chain(name, chain.base)
            transaction.append_rules(name, chain.rules)

    def _chains(self) -> dict[str, ChainState]:
        rules = tuple(NftRule(self._rule(each), "Policy ended it") for each in _PROTOCOLS)
        return {
            hook: ChainState(BaseChain("filter", hook, _AFTER_MANGLE), rules) for hook in _HOOKS
        }

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


def _turned(began: Tuple) -> Tuple:
    """The packets that answer, where nothing is translated."""
    return Tuple(began.dst, began.src, began.protocol, began.dst_port, began.src_port)


def _key(sent: Tuple) -> bytes:
    assert sent.src_port is not None and sent.dst_port is not None, sent
    ports = (port.to_bytes(2, "big") for port in (sent.src_port, sent.dst_port))
    return key(sent.src.packed(), next(ports), sent.dst.packed(), next(ports))
