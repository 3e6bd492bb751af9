"""UPDATEs handed over as they came: whatever ExaBGP itself would have said of the same bytes."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.net import BITS, V4, V6, Net, parse_net
from bird_glue import wire
from bird_glue.attributes import Attributes, Segment, unpack_attributes
from bird_glue.exabgp_main import packed_json
from bird_glue.messages import Announced, EndOfRib, Updated, parse, unpack_prefixes
from tests.bird_glue.rawpeer import attribute, encoded

PEER = parse_net("10.0.0.2")
HEAD = '{"type":"update","time":1.5,"neighbor":{"address":{"peer":"10.0.0.2"}'
FAMILIES = ((1, 1), (2, 1))
OPTIONAL, TRANSITIVE, BOTH = 0x80, 0x40, 0xC0
HOP, HOP6, ON_LINK = b"\x0a\0\0\2", b"\x20\x01\x0d\xb8" + bytes(11) + b"\2", b"\xfe\x80" + bytes(14)
ORIGIN = attribute(wire.ORIGIN, b"\0")
PATH = attribute(wire.AS_PATH, b"\2\2" + struct.pack("!LL", 65001, 4200000001))
NEXT_HOP = attribute(wire.NEXT_HOP, HOP)
NETS = [parse_net(text) for text in ("10.1.0.0/16", "0.0.0.0/0", "10.2.3.4/32", "10.8.128.0/17")]
NETS6 = [parse_net(text) for text in ("2001:db8:7::/48", "::/0", "2001:db8::1/128", "fd00::/9")]


def body(attributes: bytes = b"", announced: bytes = b"", withdrawn: bytes = b"") -> bytes:
    """An UPDATE behind its header."""
    parts = (struct.pack("!H", len(part)) + part for part in (withdrawn, attributes))
    return b"".join(parts) + announced


def reach(nets: bytes, hop: bytes = HOP6, afi: int = 2, safi: int = 1) -> bytes:
    value = struct.pack("!HBB", afi, safi, len(hop)) + hop + b"\0" + nets
    return attribute(wire.MP_REACH_NLRI, value, OPTIONAL)


def unreach(nets: bytes, afi: int = 2, safi: int = 1) -> bytes:
    return attribute(wire.MP_UNREACH_NLRI, struct.pack("!HB", afi, safi) + nets, OPTIONAL)


def heard(message: str) -> Updated | EndOfRib:
    event = parse(f'{HEAD},"direction":"receive","message":{message}}}}}'.encode())
    assert isinstance(event, Updated | EndOfRib), event
    return event


def ours(data: bytes, *, extended: bool = False) -> Updated | EndOfRib:
    return heard(packed_json(wire.plain(data, FAMILIES, extended=extended)))


@functools.cache
def _exabgp() -> Callable[[bytes, bool], str]:
    """What ExaBGP says of an UPDATE on a session with both families and 4-octet AS numbers."""
    import exabgp.environment.setup  # noqa: F401 - reads the settings that the others look at
    from exabgp.bgp.message import Action, Message
    from exabgp.bgp.message.direction import Direction
    from exabgp.bgp.message.open.capability.negotiated import Negotiated
    from exabgp.bgp.message.update.attribute import Attribute
    from exabgp.logger import log
    from exabgp.protocol.family import AFI, SAFI
    from exabgp.reactor.api.response.json import JSON

    log.disable()

    def say(data: bytes, extended: bool) -> str:
        negotiated = Negotiated({"capability": {"aigp": False}})
        negotiated.asn4 = True
        negotiated.families = [(AFI.ipv4, SAFI.unicast), (AFI.ipv6, SAFI.unicast)]
        negotiated.nexthop = [(AFI.ipv4, SAFI.unicast, AFI.ipv6)] if extended else []
        message = Message.unpack(Message.CODE.UPDATE, data, Direction.IN, negotiated)
        # as its reactor does with what comes in
        if Attribute.CODE.INTERNAL_TREAT_AS_WITHDRAW in message.attributes:
            for nlri in message.nlris:
                nlri.action = Action.WITHDRAW
        return str(JSON("5")._update(message)["message"])

    return say


def theirs(data: bytes, *, extended: bool = False) -> Updated | EndOfRib:
    return heard(_exabgp()(data, extended))


def test_an_update_with_every_attribute() -> None:
    rest = (
        attribute(wire.MED, bytes((0, 0, 0, 50)), OPTIONAL)
        + attribute(wire.LOCAL_PREF, bytes((0, 0, 1, 44)))
        + attribute(wire.ATOMIC_AGGREGATE, b"")
        + attribute(wire.AGGREGATOR, bytes((0, 0, 253, 233, 9, 9, 9, 9)), BOTH)
        + attribute(wire.COMMUNITY, struct.pack("!HHHH", 65001, 7, 100, 1), BOTH)
        + attribute(wire.ORIGINATOR_ID, bytes((10, 0, 0, 9)), OPTIONAL)
        + attribute(wire.CLUSTER_LIST, bytes((9, 9, 9, 9, 8, 8, 8, 8)), OPTIONAL)
        + attribute(wire.EXTENDED_COMMUNITY, bytes.fromhex("0002fde900000005"), BOTH)
        + attribute(wire.LARGE_COMMUNITY, struct.pack("!LLL", 65001, 1, 2) * 2, BOTH | 0x20)
    )
    gone = encoded([parse_net("10.9.0.0/24")])
    data = body(ORIGIN + PATH + NEXT_HOP + rest, encoded(NETS), gone)
    event = ours(data)
    assert event == theirs(data)
    assert event == Updated(
        PEER,
        False,
        (parse_net("10.9.0.0/24"),),
        tuple(Announced(net, PEER) for net in NETS),
        Attributes(
            origin=0,
            as_path=(Segment("as-sequence", (65001, 4200000001)),),
            med=50,
            local_preference=300,
            communities=("100:1", "65001:7"),
            large_communities=("65001:1:2",),
            extended_communities=("0x0002fde900000005",),
            originator=parse_net("10.0.0.9").address,
            clusters=tuple(parse_net(text).address for text in ("9.9.9.9", "8.8.8.8")),
        ),
    )


@pytest.mark.parametrize(
    ("hop", "shown"),
    [
        (HOP6, "2001:db8::2"),
        (HOP6 + ON_LINK, "2001:db8::2"),
        (ON_LINK + HOP6, "2001:db8::2"),
        (ON_LINK, "fe80::"),
    ],
)
@pytest.mark.parametrize("extended", [False, True])
def test_routes_of_ipv6_and_over_it(hop: bytes, shown: str, extended: bool) -> None:
    data = body(ORIGIN + PATH + reach(encoded(NETS6), hop) + unreach(encoded(NETS6[:1])))
    event = ours(data, extended=extended)
    assert event == theirs(data, extended=extended)
    assert isinstance(event, Updated)
    assert event.announced == tuple(Announced(net, parse_net(shown)) for net in NETS6)
    assert event.withdrawn == tuple(NETS6[:1])
    over = body(ORIGIN + PATH + reach(encoded(NETS), hop, afi=1))
    if extended:
        event = ours(over, extended=True)
        assert event == theirs(over, extended=True)
        assert isinstance(event, Updated)
        assert event.announced == tuple(Announced(net, parse_net(shown)) for net in NETS)
    else:
        with pytest.raises(wire.NotPlainError):
            wire.plain(over, FAMILIES, extended=False)


ALL = ORIGIN + PATH + NEXT_HOP
SOME = encoded(NETS)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"\0\0\0",
        b"\0\5\0\0",
        body(),  # end of RIB
        body(unreach(b"")),  # end of RIB, IPv6
        body(ALL),
        body(ORIGIN + PATH, SOME),
        body(ORIGIN + NEXT_HOP, SOME),
        body(PATH + NEXT_HOP, SOME),
        body(ALL + ORIGIN, SOME),
        body(ALL + b"\x40", SOME),
        body(ALL + b"\x40\5\4\0", SOME),
        body(ALL + b"\x50\5\4", SOME),
        body(attribute(wire.ORIGIN, b"\3") + PATH + NEXT_HOP, SOME),
        body(attribute(wire.ORIGIN, b"") + PATH + NEXT_HOP, SOME),
        body(attribute(wire.ORIGIN, b"\0", BOTH) + PATH + NEXT_HOP, SOME),
        body(ORIGIN + PATH + attribute(wire.NEXT_HOP, HOP6), SOME),
        body(ORIGIN + attribute(wire.AS_PATH, b"\2\2\0\0\0\1") + NEXT_HOP, SOME),
        body(ORIGIN + attribute(wire.AS_PATH, b"\2\0") + NEXT_HOP, SOME),
        body(ORIGIN + attribute(wire.AS_PATH, b"\2") + NEXT_HOP, SOME),
        body(ORIGIN + attribute(wire.AS_PATH, b"\3\1\0\0\0\1") + NEXT_HOP, SOME),
        body(ALL + attribute(wire.MED, bytes(3), OPTIONAL), SOME),
        body(ALL + attribute(wire.MED, bytes(4)), SOME),
        body(ALL + attribute(wire.COMMUNITY, bytes(6), BOTH), SOME),
        body(ALL + attribute(wire.COMMUNITY, b"", BOTH), SOME),
        body(ALL + attribute(wire.LARGE_COMMUNITY, bytes(16), BOTH), SOME),
        body(ALL + attribute(wire.CLUSTER_LIST, b"", OPTIONAL), SOME),
        body(ALL + attribute(17, b"\2\1\0\0\0\1", BOTH), SOME),  # AS4_PATH
        body(ALL + attribute(35, bytes(4), BOTH), SOME),  # one that we don't know
        body(ALL, b"\x21" + bytes(5)),
        body(ALL, b"\x18\x0a\0"),
        body(ALL, b"\x11\x0a\0\xff"),  # bits behind the length
        body(withdrawn=b"\x18\x0a\0"),
        body(ALL + reach(encoded(NETS6)), SOME),
        body(ORIGIN + PATH + reach(b"")),
        body(ORIGIN + PATH + reach(b"\x81" + bytes(17))),
        body(ORIGIN + PATH + reach(encoded(NETS6), HOP)),
        body(ORIGIN + PATH + reach(encoded(NETS6), HOP6[:15])),
        body(ORIGIN + PATH + reach(encoded(NETS6), safi=2)),
        body(ORIGIN + PATH + reach(encoded(NETS6), afi=25)),
        body(ORIGIN + PATH + attribute(wire.MP_REACH_NLRI, b"\0\2\1", OPTIONAL)),
        body(ORIGIN + PATH + attribute(wire.MP_REACH_NLRI, b"", OPTIONAL)),
        body(unreach(b"\x18\x20")),
        body(unreach(encoded(NETS6)) * 2),
    ],
)
def test_what_exabgp_is_to_decide_about(data: bytes) -> None:
    with pytest.raises(wire.NotPlainError):
        wire.plain(data, FAMILIES, extended=False)


def test_families_that_the_session_does_not_carry_are_left_to_exabgp() -> None:
    data = body(ORIGIN + PATH + reach(encoded(NETS6)))
    assert wire.plain(data, FAMILIES, extended=False).version == V6
    with pytest.raises(wire.NotPlainError):
        wire.plain(data, FAMILIES[:1], extended=False)


def _nets(version: int) -> st.SearchStrategy[list[Net]]:
    bits = BITS[version]

    def net(length: int, address: int) -> Net:
        return Net(version, address >> bits - length << bits - length, length)

    one = st.builds(net, st.integers(0, bits), st.integers(0, (1 << bits) - 1))
    return st.lists(one, max_size=6)


NETS_V4, NETS_V6 = _nets(V4).map(encoded), _nets(V6).map(encoded)
WORDS = st.integers(0, (1 << 32) - 1).map(lambda value: value.to_bytes(4, "big"))


def _words(count: int) -> st.SearchStrategy[bytes]:
    """A multiple of so many words."""
    return st.lists(st.tuples(*[WORDS] * count).map(b"".join), max_size=4).map(b"".join)


def _of(code: int, flags: int, value: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.builds(
        attribute, st.just(code), value, st.sampled_from((flags, flags, flags, flags | 0x20))
    )


SEGMENTS = st.lists(
    st.tuples(st.sampled_from((1, 2, 2, 2, 3)), st.lists(WORDS, max_size=4)).map(
        lambda found: bytes((found[0], len(found[1]))) + b"".join(found[1])
    ),
    max_size=3,
).map(b"".join)
ATTRIBUTES = st.one_of(
    _of(wire.MED, OPTIONAL, WORDS),
    _of(wire.LOCAL_PREF, TRANSITIVE, WORDS),
    _of(wire.ATOMIC_AGGREGATE, TRANSITIVE, st.just(b"")),
    _of(wire.AGGREGATOR, BOTH, st.binary(min_size=8, max_size=8)),
    _of(wire.COMMUNITY, BOTH, _words(1)),
    _of(wire.ORIGINATOR_ID, OPTIONAL, WORDS),
    _of(wire.CLUSTER_LIST, OPTIONAL, _words(1)),
    _of(wire.EXTENDED_COMMUNITY, BOTH, _words(2)),
    _of(wire.LARGE_COMMUNITY, BOTH, _words(3)),
    NETS_V6.map(unreach),
    NETS_V4.map(lambda nets: unreach(nets, afi=1)),
    st.builds(reach, NETS_V6, st.sampled_from((HOP6, ON_LINK, HOP6 + ON_LINK, ON_LINK + HOP6))),
    st.builds(reach, NETS_V4, st.sampled_from((HOP6, HOP6 + ON_LINK, HOP)), st.just(1)),
    st.builds(attribute, st.integers(0, 255), st.binary(max_size=12), st.integers(0, 255)),
)
BASICS = st.tuples(
    st.integers(0, 3).map(lambda value: attribute(wire.ORIGIN, bytes((value,)))),
    SEGMENTS.map(lambda value: attribute(wire.AS_PATH, value)),
    st.sampled_from((HOP, HOP, HOP, b"\0\0\0\0")).map(lambda hop: attribute(wire.NEXT_HOP, hop)),
).map(list)
LISTS = st.builds(lambda a, b: b"".join(a + b), BASICS, st.lists(ATTRIBUTES, max_size=4))
BODIES = st.builds(body, LISTS | BASICS.map(b"".join), NETS_V4, NETS_V4)


def _changed(data: bytes, changes: list[tuple[int, int]]) -> bytes:
    found = bytearray(data)
    for place, value in changes:
        found[place % len(found)] = value
    return bytes(found)


CHANGED = st.builds(
    _changed, BODIES, st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), max_size=2)
)


def _same(data: bytes, extended: bool) -> bool:
    """Whether an UPDATE is plain; if it is, both know the same of it."""
    try:
        found = ours(data, extended=extended)
    except wire.NotPlainError:
        return False
    assert found == theirs(data, extended=extended)
    return True


@settings(max_examples=300, deadline=None)
@given(CHANGED, st.booleans())
def test_what_is_plain_says_what_exabgp_understands(data: bytes, extended: bool) -> None:
    """ExaBGP neither answers it, nor takes it for a withdrawal, nor for anything else."""
    _same(data, extended)


@settings(max_examples=100, deadline=None)
@given(NETS_V4, NETS_V4, st.sampled_from((ALL, ALL + attribute(wire.COMMUNITY, HOP, BOTH))))
def test_what_routers_send_is_plain(told: bytes, gone: bytes, attributes: bytes) -> None:
    if told:
        assert _same(body(attributes, told, gone), extended=False)
    if gone:
        assert _same(body(withdrawn=gone), extended=False)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 3))
def test_no_bytes_are_fatal(data: bytes, kind: int) -> None:
    if kind:  # as far behind the lengths of fields as it gets
        data = struct.pack("!HH", 0, len(data) // kind) + data
    _same(data, extended=False)
    for text in (data.hex(), data.hex()[1:]):
        for unpack in (unpack_attributes, lambda found: unpack_prefixes(found, V6)):
            try:
                found: Any = unpack(text)
            except ValueError:
                continue
            assert found is not None
