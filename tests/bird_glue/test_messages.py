"""ExaBGP's lines as it wrote them, and as nobody should write them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.net import Net, parse_net
from bird_glue.messages import (
    Announced,
    Answer,
    Connected,
    Down,
    EndOfRib,
    Event,
    Hello,
    Live,
    Malformed,
    Notified,
    Opened,
    Segment,
    Text,
    Up,
    Updated,
    parse,
    parse_prefix,
)

PEER = parse_net("10.0.0.2")
HEAD = (
    '{ "exabgp": "5.0.0", "time": 1795220176.5, "host" : "vm", "pid" : 1, "ppid" : 1, '
    '"counter": 1, '
)
ADDRESS = (
    '"neighbor": { "address": { "local": "10.0.0.1", "peer": "10.0.0.2" }, '
    '"asn": { "local": 64512, "peer": 65001 }, "router-id": "10.0.0.1" '
)


def line(kind: str, rest: str) -> bytes:
    return f'{HEAD}"type": "{kind}", {ADDRESS}, {rest} }} }}'.encode()


def update(message: str, direction: str = "receive") -> bytes:
    return line("update", f'"direction": "{direction}", "message": {{ {message} }}')


def parsed(text: bytes) -> Event:
    event = parse(text)
    assert event is not None
    return event


def test_states() -> None:
    assert parsed(line("state", '"state": "connected"')) == Connected(PEER, 1795220176.5)
    assert parsed(line("state", '"state": "up"')) == Up(PEER, 1795220176.5)
    lost = parsed(line("state", '"state": "down", "reason": "closing connection"'))
    assert isinstance(lost, Down)
    assert not lost.notified
    assert not lost.removed
    refused = parsed(line("state", '"state": "down", "reason": "notification sent (2,2)"'))
    assert isinstance(refused, Down)
    assert refused.notified
    removed = parsed(line("state", '"state": "down", "reason": "stop, message [removed]"'))
    assert isinstance(removed, Down)
    assert removed.removed


OPEN = (
    '"direction": "receive", "open": { "version": 4, "asn": 23456, "hold_time": 30, '
    '"router_id": "10.0.0.2", "capabilities": { "1": { "name": "multiprotocol", "families": '
    '[ "ipv4/unicast" ] }, "64": { "name": "graceful restart", "time": 120, '
    '"address-family-flags": { "ipv4/unicast": [ %s ] }, "restart-flags": [ %s ]  }, '
    '"65": { "name": "asn4", "asn4": 4200000001 } } }'
)


def test_who_takes_ipv4_routes_with_ipv6_next_hops_says_so() -> None:
    plain = OPEN % ("", "")
    event = parsed(line("open", plain))
    assert isinstance(event, Opened)
    assert not event.extended_next_hop
    capability = '"5": { "name": "nexthop", "conversion": [ "ipv4/unicast/ipv6" ] }, "65"'
    event = parsed(line("open", plain.replace('"65"', capability)))
    assert isinstance(event, Opened)
    assert event.extended_next_hop


def test_flags_of_graceful_restart_are_labelled_the_wrong_way_round() -> None:
    event = parsed(line("open", OPEN % ('"restart"', "")))
    assert isinstance(event, Opened)
    assert event.asn == 4200000001
    assert event.graceful_restart
    assert event.graceful_restart.forwarding == {4}
    assert not event.graceful_restart.restarted
    event = parsed(line("open", OPEN % ("", '"forwarding"')))
    assert isinstance(event, Opened)
    assert event.graceful_restart
    assert event.graceful_restart.forwarding == frozenset()
    assert event.graceful_restart.families == {4}
    assert event.graceful_restart.restarted


def test_our_own_open_is_nobodys_business() -> None:
    assert parse(line("open", OPEN.replace("receive", "send") % ("", ""))) is None


def test_notification() -> None:
    text = (
        '"direction": "send", "notification": { "code": 2, "subcode": 2, "data": "0x41", '
        '"message": "ASN in OPEN\\u0000 (65001)" }'
    )
    assert parsed(line("notification", text)) == Notified(
        PEER, 1795220176.5, True, 2, 2, "ASN in OPEN (65001)"
    )


def test_update_with_every_attribute() -> None:
    event = parsed(
        update(
            '"update": { "attribute": { "origin": "incomplete", "as-path": {"0": {"element": '
            '"as-sequence", "value": [65009, 4200000001]}, "1": {"element": "as-set", "value": '
            '[1, 2]}}, "med": 50, "local-preference": 300, "community": [ [ 65001, 7 ] ], '
            '"extended-community": [ { "value": 842127122628613, "string": "target:65001:5" } ], '
            '"large-community": [ [ 65001, 1 , 2 ] ], "originator-id": "10.0.0.9", '
            '"cluster-list": [ "9.9.9.9", "8.8.8.8" ] }, '
            '"announce": { "ipv4 unicast": { "10.0.0.2": [ { "nlri": "10.50.1.0/24" }, '
            '{ "nlri": "0.0.0.0/0" } ] } }, '
            '"withdraw": { "ipv4 unicast": [ { "nlri": "10.9.0.0/24" } ] } }'
        )
    )
    assert isinstance(event, Updated)
    assert not event.sent
    assert event.announced == (
        Announced(parse_net("10.50.1.0/24"), PEER),
        Announced(parse_net("0.0.0.0/0"), PEER),
    )
    assert event.withdrawn == (parse_net("10.9.0.0/24"),)
    attributes = event.attributes
    assert attributes.origin == 2
    assert attributes.as_path == (
        Segment("as-sequence", (65009, 4200000001)),
        Segment("as-set", (1, 2)),
    )
    assert attributes.path_length == 3
    assert (attributes.med, attributes.local_preference) == (50, 300)
    assert attributes.communities == ("65001:7",)
    assert attributes.large_communities == ("65001:1:2",)
    assert attributes.extended_communities == ("0x0002fde900000005",)
    assert attributes.originator == parse_net("10.0.0.9").address
    assert attributes.clusters == tuple(parse_net(t).address for t in ("9.9.9.9", "8.8.8.8"))


@pytest.mark.parametrize("order", [("2001:db8::1", "fe80::1"), ("fe80::1", "2001:db8::1")])
def test_ipv6_prefix_told_with_both_next_hops_keeps_the_global_one(order: tuple[str, str]) -> None:
    hops = ", ".join(f'"{hop}": [ {{ "nlri": "2001:db8:9::/64" }} ]' for hop in order)
    event = parsed(update(f'"update": {{ "announce": {{ "ipv6 unicast": {{ {hops} }} }} }}'))
    assert isinstance(event, Updated)
    assert event.announced == (Announced(parse_net("2001:db8:9::/64"), parse_net("2001:db8::1")),)


def test_families_of_other_kinds_are_ignored() -> None:
    event = parsed(
        update(
            '"update": { "announce": { "ipv4 multicast": { "10.0.0.2": [ { "nlri": "x" } ] } } }'
        )
    )
    assert isinstance(event, Updated)
    assert event.announced == ()


def test_end_of_rib() -> None:
    assert parsed(update('"eor": { "afi" : "ipv4", "safi" : "unicast" }')) == EndOfRib(
        PEER, False, 4
    )
    assert parsed(update('"eor": { "afi" : "ipv6", "safi" : "unicast" }', "send")) == EndOfRib(
        PEER, True, 6
    )


def test_bare_lines_between_events() -> None:
    assert parse(b"done") == Answer(True)
    assert parse(b"error") == Answer(False)
    assert parse(b'description "x";') == Text('description "x";')
    assert parse(b"") is None


def test_words_of_the_relay() -> None:
    hello = b'{"relay":"hello","pid":7,"unanswered":2,"announced":{"10.0.0.2":["10.1.0.0/26"]}}'
    assert parse(hello) == Hello(7, 2, {PEER: frozenset({parse_net("10.1.0.0/26")})})
    assert parse(b'{"relay":"live"}') == Live()


def test_prefix_bits_behind_the_length_are_cut_off() -> None:
    assert parse_prefix("10.1.2.3/24") == parse_net("10.1.2.0/24")
    assert parse_prefix("::ffff/0") == Net(6, 0, 0)


@pytest.mark.parametrize("text", ["10.0.0.0/33", "::/129", "10.0.0.0/-1", "10.0.0.0/x", "x/8", ""])
def test_what_is_no_prefix(text: str) -> None:
    with pytest.raises((ValueError, OSError)):
        parse_prefix(text)


GOOD = [
    line("state", '"state": "up"'),
    line("open", OPEN % ('"restart"', "")),
    update(
        '"update": { "attribute": { "origin": "igp", "as-path": {"0": {"element": "as-sequence", '
        '"value": [1]}} }, "announce": { "ipv4 unicast": { "10.0.0.2": [ { "nlri": "10.5.0.0/16" '
        "} ] } } }"
    ),
    update('"eor": { "afi" : "ipv4", "safi" : "unicast" }'),
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_are_fatal(data: bytes) -> None:
    parse(data)
    parse(b"{" + data)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(GOOD), st.data())
def test_no_changed_event_is_fatal(good: bytes, data: st.DataObject) -> None:
    """Any one place in a good event replaced by anything."""
    document = json.loads(good)
    here = document
    while True:
        key = data.draw(
            st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here)))
        )
        if isinstance(here[key], (dict, list)) and here[key] and data.draw(st.booleans()):
            here = here[key]
        else:
            break
    here[key] = data.draw(VALUES)
    event = parse(json.dumps(document).encode())
    if isinstance(event, Malformed):
        assert event.why


def test_malformed_says_what_and_why() -> None:
    event = parsed(update('"update": { "announce": { "ipv4 unicast": { "10.0.0.2": [ {} ] } } }'))
    assert isinstance(event, Malformed)
    assert event.why == "KeyError: 'nlri'"
    assert event.line.startswith('{ "exabgp"')


def test_a_change_of_family_is_malformed() -> None:
    changed: Any = update(
        '"update": { "announce": { "ipv6 unicast": { "::1": [ { "nlri": "10.0.0.0/8" } ] } } }'
    )
    assert isinstance(parse(changed), Malformed)
