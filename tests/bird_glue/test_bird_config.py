"""BIRD's configuration: what is in it, and that BIRD takes it."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

from api.net import V4, V6, Net, parse_net
from bird_glue.advertise import Speaking
from bird_glue.announcement import Announcement
from bird_glue.bird_config import divide, kernel_metrics, protocol_name, render
from bird_glue.config import Listen, Neighbor
from bird_glue.decision import Guard, Session
from bird_glue.engine import Intent
from bird_glue.filters import AddCommunity, Filter, PrependAsPath, Rule
from bird_glue.messages import Attributes, Segment
from bird_glue.pools import PoolPolicy, Pools

ONE, TWO, ROUTER, SIX = (
    parse_net(text) for text in ("172.31.1.12", "172.31.1.13", "172.31.1.1", "fd00::1")
)
BLOCK, OTHER, BLOCK6 = (parse_net(text) for text in ("10.1.0.0/26", "10.1.1.0/26", "fd00:1::/122"))
USUAL = Announcement(None, Attributes(origin=0, local_preference=1000))
PLAIN = Announcement(None, Attributes(origin=0))
MARKED = Announcement(
    None,
    Attributes(
        origin=0,
        as_path=(Segment("as-sequence", (64512, 65000)),),
        communities=("65001:7",),
        large_communities=("1:2:3",),
    ),
)
NODE = Speaking(64512, external=False, priority=1024, cluster_id=9)
OUT = Speaking(
    64512, external=True, priority=1024, communities=((parse_net("10.1.0.0/16"), ("1:2", "1:2:3")),)
)
RULES = (
    Rule(accept=True, as_path=(65001,), operations=(PrependAsPath((1,)), AddCommunity("5:6"))),
    Rule(accept=False, interface="eth*", community="1:2:3"),
)


def neighbor(address: Net, remote_as: int = 64512) -> Neighbor:
    local = parse_net("172.31.1.11" if address.version == V4 else "fd00::11")
    return Neighbor(address, local, remote_as, 64512, local.address)


def intent() -> Intent:
    router = replace(
        neighbor(ROUTER, 65001), ttl_security=1, password=b"it's \\ {new};", hold_seconds=9
    )
    neighbors = [neighbor(ONE), replace(neighbor(TWO), passive=True), router, neighbor(SIX, 65001)]
    found = Filter("f", RULES, RULES, RULES, RULES)
    return Intent(
        Listen(("172.31.1.11",), 1790),
        {n.address: n for n in neighbors},
        {n.address: Session(n.external, frozenset((64512,)), 1, (found,)) for n in neighbors},
        {n.address: OUT if n.external else NODE for n in neighbors},
        Guard(1, 9, (BLOCK, BLOCK6), frozenset((parse_net("172.31.1.11"),)), frozenset()),
        Pools((PoolPolicy(parse_net("10.1.0.0/16"), True, True),), told_on=(OTHER,)),
        (BLOCK, BLOCK6),
        {V4: 1024, V6: 2048},
    )


WANTED = {
    ONE: {BLOCK: USUAL, OTHER: USUAL},
    TWO: {BLOCK: USUAL, OTHER: USUAL},
    ROUTER: {BLOCK: MARKED},
    SIX: {BLOCK6: PLAIN},
}


def test_bird_takes_it(tmp_path: Path) -> None:
    text = render(intent(), WANTED, tmp_path)
    assert kernel_metrics(text) == ((V4, 1024), (V6, 2048))
    path = tmp_path / "bird.conf"
    path.write_text(text)
    result = subprocess.run(
        ["bird", "-p", "-c", str(path)], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    for line in (
        "  local 172.31.1.11 port 1790 as 64512;",
        "  neighbor 172.31.1.1 port 179 as 65001;",
        "  multihop 1;",
        "  ttl security on;",
        '  password "it\'s \\ {new};";',
        "  hold time 9;",
        "  strict bind;",
        "  rr cluster id 0.0.0.9;",
        "  learn; persist; graceful restart on; scan time 10; metric 2048;",
    ):
        assert line in text.splitlines()
    assert text.count("rr client;") == 2  # not the routers
    assert text.count("passive;") == 1


def test_one_peer_more_changes_nothing_of_the_others(tmp_path: Path) -> None:
    whole = intent()
    fewer = replace(whole, neighbors={ONE: whole.neighbors[ONE]})
    before = render(fewer, {ONE: WANTED[ONE]}, tmp_path)
    after = render(whole, WANTED, tmp_path)
    for name in ("protocol bgp peer_172_31_1_12", "protocol static own_v4"):
        begin = before.index(name)
        assert before[begin : before.index("\n}", begin)] in after


def test_what_most_are_told_and_what_others_are_told_instead() -> None:
    speaking = {ONE: NODE, TWO: NODE, ROUTER: OUT}
    told = {peer: WANTED[peer] for peer in speaking}
    own = divide(told, speaking)
    assert own.base == {BLOCK: USUAL, OTHER: USUAL}
    assert own.different == {ONE: {}, TWO: {}, ROUTER: {BLOCK: MARKED, OTHER: None}}
    # eBGP carries no local preference: the router is told the same
    own = divide({ONE: {BLOCK: USUAL}, ROUTER: {BLOCK: PLAIN}}, speaking)
    assert own.different == {ONE: {}, ROUTER: {}}
    # what only one is told
    own = divide({ONE: {}, ROUTER: {BLOCK: PLAIN}}, speaking)
    assert (own.base, own.different) == ({BLOCK: PLAIN}, {ONE: {BLOCK: None}, ROUTER: {}})
    assert divide({}, {}).base == {}


def test_each_peer_has_a_name_of_its_own() -> None:
    texts = ("10.0.0.1", "10.0.0.11", "::1", "::11", "fd00::1:1", "fd00:1::1", "fd00::11")
    assert len({protocol_name(parse_net(text)) for text in texts}) == len(texts)
