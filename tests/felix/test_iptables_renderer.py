from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.net import BITS, Net, parse_net
from felix import names
from felix.chains import (
    Accept,
    Chain,
    ChainRule,
    Condition,
    Dispatch,
    Drop,
    Log,
    Mark,
    MarkAndReturn,
    Side,
)
from felix.iptables_matches import ConstantSet
from felix.iptables_renderer import Renderer
from felix.rules import dispatches
from felix.settings import Manner
from kernel.ipsets import IpSet, IpSets, net_members
from kernel.iptables import IptablesTable, TableUpdate
from kernel.netns import Namespace
from policy.model import Match, PortRange
from tests.support.netns import fresh_namespace

pytestmark = pytest.mark.timeout(600)  # many examples, each with much to do for the kernel

V4 = Renderer(4, Manner(0x10000, 0x20000))
V6 = Renderer(6, Manner(0x10000, 0x20000))


def render(renderer: Renderer, rule: ChainRule) -> list[str]:
    return list(renderer.render(Chain("cali-c", (rule,)))["cali-c"].fragments)


def deny(**match: object) -> ChainRule:
    return ChainRule(Drop(), Condition(packet=Match(**match)))  # type: ignore[arg-type]


def test_plain_rules() -> None:
    assert render(V4, ChainRule(Accept())) == ["-j ACCEPT"]
    assert render(V4, deny(protocol=6, dst_ports=(PortRange(80, 80),))) == [
        "-p 6 -m multiport --dports 80 -j DROP"
    ]
    assert render(V4, ChainRule(MarkAndReturn(Mark.ACCEPT), Condition(in_interface="cali*"))) == [
        "-i cali+ -j MARK --set-xmark 0x10000/0x10000",
        "-m mark --mark 0x10000/0x10000 -j RETURN",
    ]
    marks = Condition(marked=Mark.ACCEPT, unmarked=Mark.PASS)
    assert render(V4, ChainRule(Drop(), marks)) == ["-m mark --mark 0x10000/0x30000 -j DROP"]


def test_icmp() -> None:
    kind, both = "-p 1 -m icmp --icmp-type 8", "-p 1 -m icmp --icmp-type 8/0"
    assert render(V4, deny(icmp_type=8)) == [f"{kind} -j DROP"]
    assert render(V4, deny(protocol=1, icmp_type=8, icmp_code=0)) == [f"{both} -j DROP"]
    assert render(V4, deny(icmp_type=8, not_icmp_code=0)) == [
        f"{kind} -m icmp ! --icmp-type 8/0 -j DROP"
    ]
    assert render(V6, deny(not_icmp_type=128)) == ["-p 58 -m icmp6 ! --icmpv6-type 128 -j DROP"]


def test_ports_beyond_fifteen_become_several_rules() -> None:
    singles = (PortRange(n, n) for n in range(1, 15))
    ports = (*singles, PortRange(100, 200), PortRange(9, 9))
    first, second = render(V4, deny(protocol=6, dst_ports=ports))
    assert "--dports 1,2,3,4,5,6,7,8,9,10,11,12,13,14 " in first
    assert "--dports 100:200,9 " in second
    only = render(V4, deny(protocol=17, not_src_ports=ports))
    assert len(only) == 1 and only[0].count("-m multiport ! --sports") == 2


def test_lists_of_networks_become_constant_sets() -> None:
    nets = (parse_net("10.0.0.0/8"), parse_net("192.0.2.1"), parse_net("2001:db8::/32"))
    made = V4.render(Chain("cali-c", (deny(src_nets=nets),)))["cali-c"]
    (constant,) = made.sets
    assert constant.members == tuple(sorted(nets[:2]))
    assert made.fragments == (f"-m set --match-set {names.set_name(constant.id, 4)} src -j DROP",)
    assert render(V6, deny(src_nets=nets)) == ["-s 2001:db8::/32 -j DROP"]
    again = V4.render(Chain("cali-d", (deny(not_dst_nets=nets[1::-1]),)))["cali-d"]
    assert again.sets == (constant,)


@pytest.mark.parametrize(
    "match",
    [
        {"version": 6},
        {"src_nets": (parse_net("2001:db8::/32"),)},
        {"not_dst_nets": (parse_net("0.0.0.0/0"),)},
        {"protocol": 6, "not_protocol": 6},
        {"protocol": 58, "icmp_type": 128},
        {"protocol": 1, "dst_ports": (PortRange(1, 1),)},
    ],
)
def test_what_can_never_match_is_left_out(match: dict[str, object]) -> None:
    assert render(V4, deny(**match)) == []


def test_everything_is_no_condition() -> None:
    assert render(V4, deny(src_nets=(parse_net("0.0.0.0/0"), parse_net("10.0.0.1")))) == ["-j DROP"]


def test_what_people_write_can_not_become_a_rule() -> None:
    evil = 'x" -j ACCEPT\n-A INPUT -j ACCEPT\\'
    (logged,) = render(V4, ChainRule(Log(evil), comment=evil))
    assert "\n" not in logged and logged.count('"') == 4


interface = st.text("abc0", min_size=1, max_size=8).map(lambda text: "cali" + text)


@given(st.sets(interface, max_size=60), st.lists(interface, max_size=20))
def test_a_dispatch_leads_every_interface_to_its_own_chain(
    known: set[str], others: list[str]
) -> None:
    for dispatch in dispatches(known):
        rendered = V4.render(dispatch)
        assert all(len(name) <= names.MAX_CHAIN for name in rendered)
        assert all(len(each.fragments) <= 40 for each in rendered.values())
        tree = {name: each.fragments for name, each in rendered.items()}
        expected = dict(dispatch.targets)
        for name in [*known, *others]:
            assert _walk(tree, dispatch, name) == expected.get(name, "DROP")


def _walk(tree: dict[str, tuple[str, ...]], dispatch: Dispatch, interface: str) -> str:
    """Where a packet of the interface ends up."""
    flag = "-i" if dispatch.side is Side.IN else "-o"
    chain = dispatch.name
    while True:
        for fragment in tree[chain]:
            words = fragment.split()
            if words[0] != flag:
                assert words[-2:] == ["-j", "DROP"]
                return "DROP"
            pattern = words[1]
            if pattern == interface or (
                pattern.endswith("+") and interface.startswith(pattern[:-1])
            ):
                if words[-1] not in tree:
                    return words[-1]
                chain = words[-1]
                break


nets = st.builds(
    lambda version, address, length: Net(
        version,
        (address % (1 << BITS[version])) >> (BITS[version] - length) << (BITS[version] - length),
        length,
    ),
    st.sampled_from([4, 6]),
    st.integers(0, (1 << 128) - 1),
    st.integers(0, 32),
)
net_lists = st.lists(nets, max_size=3).map(tuple)
ports = st.lists(
    st.builds(
        lambda a, b: PortRange(min(a, b), max(a, b)), st.integers(1, 65535), st.integers(1, 65535)
    ),
    max_size=20,
).map(tuple)
net_sets = st.lists(st.sampled_from(["s:one", "s:two"]), max_size=2, unique=True).map(tuple)
port_sets = st.lists(st.sampled_from(["n:one", "n:two"]), max_size=2, unique=True).map(tuple)
octet = st.none() | st.integers(0, 254)
matches = st.builds(
    Match,
    version=st.sampled_from([None, None, 4, 6]),
    protocol=st.sampled_from([None, 1, 6, 17, 58, 132, 200]),
    not_protocol=st.sampled_from([None, None, 6, 99]),
    icmp_type=octet,
    not_icmp_type=octet,
    src_nets=net_lists,
    not_src_nets=net_lists,
    dst_nets=net_lists,
    not_dst_nets=net_lists,
    src_sets=net_sets,
    not_src_sets=net_sets,
    dst_sets=net_sets,
    not_dst_sets=net_sets,
    src_ports=ports,
    not_src_ports=ports,
    dst_ports=ports,
    not_dst_ports=ports,
    src_named_ports=port_sets,
    not_src_named_ports=port_sets,
    dst_named_ports=port_sets,
    not_dst_named_ports=port_sets,
)


@pytest.fixture(scope="module")
def tables() -> Iterator[tuple[Namespace, IpSets, dict[int, IptablesTable]]]:
    """A namespace with the sets that rules refer to, and the filter table of each IP version."""
    with fresh_namespace() as namespace, IpSets(netns_fd=namespace.fd) as sets:
        for version in (4, 6):
            for set_id in ("s:one", "s:two", "n:one", "n:two"):
                kind = "hash:net" if set_id[0] == "s" else "hash:ip,port"
                sets.create(IpSet(names.set_name(set_id, version), kind, version))
        made = {v: IptablesTable(v, "filter", "nft", netns_fd=namespace.fd) for v in (4, 6)}
        yield namespace, sets, made
        for table in made.values():
            table.close()


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(matches, min_size=1, max_size=10), st.text(max_size=300))
def test_iptables_takes_whatever_is_rendered(
    tables: tuple[Namespace, IpSets, dict[int, IptablesTable]],
    drawn: list[Match],
    comment: str,
) -> None:
    _, sets, made = tables
    rules = tuple(
        ChainRule(MarkAndReturn(Mark.PASS), Condition(packet=match), comment) for match in drawn
    )
    for renderer in (V4, V6):
        rendered = renderer.render(Chain("cali-c", rules))["cali-c"]
        for constant in rendered.sets:
            _fill(sets, renderer.version, constant)
        made[renderer.version].apply(TableUpdate(replace={"cali-c": rendered.fragments}))
        state = made[renderer.version].read()
        assert len(state.chains["cali-c"]) == len(rendered.fragments)


def _fill(sets: IpSets, version: int, constant: ConstantSet) -> None:
    members = [text for net in constant.members for text in net_members(net)]
    sets.create(IpSet(names.set_name(constant.id, version), "hash:net", version), members)
