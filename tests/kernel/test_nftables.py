"""One table of nftables: what we send is what nft(8) lists, and all of it or nothing."""

import errno
import itertools
import json
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.net import BITS, Net, host_net, parse_net
from kernel import nft_expressions as nft
from kernel.netlink import attribute, attribute_text
from kernel.netns import Namespace
from kernel.nft_expressions import Base, Compare, Meta, Verdict
from kernel.nft_sets import (
    ADDRESS4,
    ADDRESS6,
    INTERFACE,
    MARK,
    PORT,
    PROTOCOL,
    ForeignElementError,
    NftSet,
    Range,
    Target,
    key,
    parse_elements,
    ranges,
)
from kernel.nftables import (
    BaseChain,
    ChainState,
    Nftables,
    NftablesError,
    NftRule,
)
from tests.support.netns import connect, fresh_namespace, run

FORWARD = BaseChain("filter", "forward", -10)
HTTP = (80).to_bytes(2, "big")


@pytest.fixture(params=[4, 6])
def table(request: pytest.FixtureRequest, namespace: Namespace) -> Iterator[Nftables]:
    with Nftables(request.param, "calico", netns_fd=namespace.fd) as made:
        transaction = made.transaction()
        transaction.create_table()
        made.commit(transaction)
        yield made


def rules_listed(namespace: Namespace, family: str) -> list[str]:
    """The rules as nft(8) writes them."""
    listing = run(namespace, "nft", "-nn", "list", "chain", family, "calico", "c").stdout
    return [line.strip() for line in listing.splitlines()[2:-2]]


@pytest.mark.parametrize(
    ("expressions", "text"),
    [
        (
            nft.load_meta(Meta.IIFNAME)
            + nft.compare(nft.interface_name("cali*"))
            + nft.verdict(Verdict.JUMP, "d"),
            'iifname "cali*" jump d',
        ),
        (
            nft.load_meta(Meta.OIFNAME)
            + nft.compare(nft.interface_name("eth0"), Compare.NOT_EQUAL)
            + nft.verdict(Verdict.GOTO, "d"),
            'oifname != "eth0" goto d',
        ),
        (
            nft.load_meta(Meta.MARK)
            + nft.mask(nft.host_order(0x30000))
            + nft.compare(nft.host_order(0x10000))
            + nft.verdict(Verdict.RETURN),
            "meta mark & 0x00030000 == 0x00010000 return",
        ),
        (
            nft.load_meta(Meta.MARK)
            + nft.mask(nft.host_order(0xFFFCFFFF), nft.host_order(0x10000))
            + nft.store_mark(),
            "meta mark set meta mark & 0xfffdffff | 0x00010000",
        ),
        (
            nft.load_meta(Meta.L4PROTO)
            + nft.compare(b"\x06")
            + nft.load_payload(Base.TRANSPORT, 2, 2)
            + nft.within(HTTP, (90).to_bytes(2, "big"))
            + nft.verdict(Verdict.ACCEPT),
            "tcp dport 80-90 accept",
        ),
        (
            nft.load_conntrack_state()
            + nft.mask(nft.host_order(nft.ConntrackState.ESTABLISHED | 4))
            + nft.compare(bytes(4), Compare.NOT_EQUAL)
            + nft.verdict(Verdict.ACCEPT),
            "ct state 0x2,0x4 accept",
        ),
        (nft.counter() + nft.verdict(Verdict.DROP), "counter packets 0 bytes 0 drop"),
        (
            nft.limit(5, 10) + nft.log("calico-packet: "),
            'limit rate 5/second burst 10 packets log prefix "calico-packet: " level notice',
        ),
        (
            nft.load_fib(
                nft.FibResult.ADDRTYPE,
                nft.FibFlag.DADDR,
            )
            + nft.compare(nft.host_order(2)),
            "fib daddr type 2",
        ),
    ],
)
def test_expressions_are_what_nft_lists(
    namespace: Namespace, expressions: bytes, text: str
) -> None:
    with Nftables(4, "calico", netns_fd=namespace.fd) as table:
        transaction = table.transaction()
        transaction.create_table()
        for chain in ("c", "d"):
            transaction.create_chain(chain)
        transaction.append_rules("c", [NftRule(expressions, "cali:why")])
        table.commit(transaction)
        assert table.read().chains["c"].rules == (NftRule(expressions, "cali:why"),)
    found = rules_listed(namespace, "ip")
    assert [" ".join(rule.split()) for rule in found] == [f'{text} comment "cali:why"']


@pytest.mark.parametrize(
    ("hook", "kind", "expressions", "text"),
    [
        (
            "prerouting",
            "filter",
            nft.load_fib(nft.FibResult.OIF, nft.FibFlag.SADDR | nft.FibFlag.IIF | 32)
            + nft.compare(b"\0")
            + nft.verdict(Verdict.DROP),
            "fib saddr . iif oif 0/8 drop",
        ),
        ("prerouting", "filter", nft.notrack(), "notrack"),
        ("postrouting", "nat", nft.masquerade(), "masquerade"),
        ("postrouting", "nat", nft.masquerade(random=True), "masquerade fully-random"),
        (
            "postrouting",
            "nat",
            nft.load_meta(Meta.L4PROTO) + nft.compare(b"\x06") + nft.masquerade(ports=(1024, 2047)),
            "meta l4proto 6 masquerade to :1024-2047",
        ),
        (
            "postrouting",
            "nat",
            nft.source_nat(2, parse_net("192.0.2.1").packed()),
            "snat to 192.0.2.1",
        ),
        (
            "prerouting",
            "nat",
            nft.destination_nat(2, parse_net("192.0.2.1").packed()),
            "dnat to 192.0.2.1",
        ),
        (
            "postrouting",
            "nat",
            nft.load_meta(Meta.L4PROTO)
            + nft.compare(b"\x06")
            + nft.source_nat(2, parse_net("192.0.2.1").packed(), ports=(1024, 2047), random=True),
            "meta l4proto 6 snat to 192.0.2.1:1024-2047 fully-random",
        ),
        ("input", "filter", nft.reject(4), "reject"),
    ],
)
def test_statements_of_a_hook_are_what_nft_lists(
    namespace: Namespace, hook: str, kind: str, expressions: bytes, text: str
) -> None:
    with Nftables(4, "calico", netns_fd=namespace.fd) as table:
        transaction = table.transaction()
        transaction.create_table()
        transaction.create_chain("c", BaseChain(kind, hook, 0))
        transaction.append_rules("c", [NftRule(expressions)])
        table.commit(transaction)
        told = table.read().chains["c"]
        assert told == ChainState(BaseChain(kind, hook, 0), (NftRule(expressions),))
    assert rules_listed(namespace, "ip")[1:] == [text]


def test_what_was_written_is_read_back(table: Nftables) -> None:
    address = ADDRESS4 if table.version == 4 else ADDRESS6
    wanted = [
        NftSet("hosts", (address,)),
        NftSet("nets", (address,), ranges=True),
        NftSet("ports", (address, PROTOCOL, PORT), size=100),
        NftSet("passing", (address,), timeout=3600),
        NftSet("interfaces", (INTERFACE,), verdicts=True),
    ]
    transaction = table.transaction()
    transaction.create_chain("forward", FORWARD)
    transaction.create_chain("pod")
    for each in wanted:
        transaction.create_set(each)
    transaction.append_rules("forward", [NftRule(nft.counter(), "one"), NftRule(nft.counter())])
    host = host_net(table.version, 5).packed()
    targets = {
        nft.interface_name("cali1"): Target(Verdict.GOTO, "pod"),
        nft.interface_name("cali2"): Target(Verdict.DROP),
    }
    keys = {key(host, b"\x06", HTTP), key(host, b"\x11", HTTP)}
    transaction.add_targets("interfaces", targets)
    transaction.add_keys("ports", keys)
    transaction.add_keys("hosts", [host])
    table.commit(transaction)

    state = table.read()
    assert state.chains == {
        "forward": ChainState(FORWARD, (NftRule(nft.counter(), "one"), NftRule(nft.counter()))),
        "pod": ChainState(None, ()),
    }
    assert state.sets == {each.name: each for each in wanted}
    assert table.targets("interfaces") == targets
    assert table.keys("ports") == keys
    assert table.keys("hosts") == {host}
    assert table.ranges("nets") == set()

    transaction = table.transaction()
    transaction.delete_keys("interfaces", [nft.interface_name("cali1")])
    transaction.delete_chain("pod")
    transaction.flush_set("ports")
    transaction.flush_chain("forward")
    transaction.delete_set("hosts")
    table.commit(transaction)
    state = table.read()
    assert state.chains == {"forward": ChainState(FORWARD, ())}
    assert state.sets.keys() == {"nets", "passing", "ports", "interfaces"}
    assert not table.keys("ports")


def test_nft_shows_keys_that_are_of_the_host_s_byte_order(namespace: Namespace) -> None:
    """Which it learns of the set, or shows an interface's name as nothing."""
    with Nftables(4, "calico", netns_fd=namespace.fd) as table:
        transaction = table.transaction()
        transaction.create_table()
        transaction.create_set(NftSet("interfaces", (INTERFACE,), verdicts=True))
        transaction.create_set(NftSet("marks", (MARK,)))
        drop = {nft.interface_name("cali1"): Target(Verdict.DROP)}
        transaction.add_targets("interfaces", drop)
        transaction.add_keys("marks", [(0x10).to_bytes(4, sys.byteorder)])
        table.commit(transaction)
    listing = run(namespace, "nft", "list", "table", "ip", "calico").stdout
    assert 'elements = { "cali1" : drop }' in listing
    assert "elements = { 0x00000010 }" in listing


@st.composite
def nets(draw: st.DrawFn, version: int) -> Net:
    """Networks that crowd one another, among them the whole and the very last."""
    length = draw(st.sampled_from([0, *range(BITS[version] - 8, BITS[version] + 1)]))
    start = draw(st.sampled_from([0, 10 << BITS[version] - 8, (1 << BITS[version]) - 256]))
    address = start + draw(st.integers(0, 255))
    shift = BITS[version] - length
    return Net(version, address >> shift << shift, length)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=60,
)
@given(data=st.data())
def test_ranges_change_step_by_step(table: Nftables, data: st.DataObject) -> None:
    address = ADDRESS4 if table.version == 4 else ADDRESS6
    transaction = table.transaction()
    transaction.create_set(NftSet("r", (address,), ranges=True))
    transaction.flush_set("r")
    table.commit(transaction)
    present: set[Range] = set()
    for wanted in data.draw(st.lists(st.lists(nets(table.version), max_size=12), max_size=4)):
        after = set(ranges(wanted))
        transaction = table.transaction()
        transaction.delete_ranges("r", present - after)
        transaction.add_ranges("r", after - present)
        table.commit(transaction)
        assert table.ranges("r") == after
        present = after


@given(st.lists(nets(4), max_size=12))
def test_ranges_hold_the_same_addresses_and_never_touch(wanted: list[Net]) -> None:
    made = ranges(wanted)
    for one, other in itertools.pairwise(made):
        assert one.last + 1 < other.first
    edges = {n.address for n in wanted} | {n.address + n.size - 1 for n in wanted}
    for address in edges | {e + 1 for e in edges} | {e - 1 for e in edges}:
        if 0 <= address < 1 << 32:
            inside = any(net.contains(host_net(4, address)) for net in wanted)
            assert any(r.first <= address <= r.last for r in made) == inside


def test_a_refused_transaction_changes_nothing_and_says_why(table: Nftables) -> None:
    transaction = table.transaction()
    transaction.create_chain("new")
    transaction.delete_chain("missing")
    transaction.delete_set("no-such-set")
    with pytest.raises(NftablesError) as caught:
        table.commit(transaction)
    assert [what for what, _ in caught.value.refused] == ["chain missing", "set no-such-set"]
    assert caught.value.errno == errno.ENOENT
    assert table.read().chains == {}
    transaction = table.transaction()
    transaction.create_chain("new")
    table.commit(transaction)
    assert table.read().chains.keys() == {"new"}


def expression(name: str, **fields: int) -> bytes:
    """An expression whose fields (``f1`` and so on) are numbers."""
    data = b"".join(nft.number(int(kind[1:]), value) for kind, value in fields.items())
    return attribute(1, attribute_text(1, name) + attribute(2, data))


# Rules as this kernel tells them, and as others do: in another order, with or without what is zero.
META = expression("meta", f2=3, f1=1)
END = nft.counter() + nft.verdict(Verdict.DROP)
SENT = META + expression("lookup", f2=1, f5=0) + END


@pytest.mark.parametrize(
    ("told", "same"),
    [
        (SENT, True),
        (META + expression("lookup", f2=1) + END, True),
        (META + expression("lookup", f2=1, f5=0, f9=0) + END, True),
        (expression("meta", f1=1, f2=3) + expression("lookup", f5=0, f2=1) + END, True),
        (META + expression("lookup", f2=1, f5=1) + END, False),
        (META + expression("lookup", f2=1, f5=0, f9=1) + END, False),
        (SENT[: -len(END)] + nft.counter() + nft.verdict(Verdict.ACCEPT), False),
        (SENT[: -len(END)] + nft.verdict(Verdict.DROP), False),
        (SENT + nft.verdict(Verdict.ACCEPT), False),
        (nft.verdict(Verdict.ACCEPT) + SENT, False),
        (b"", False),
    ],
)
def test_rules_are_known_as_whichever_kernel_tells_them(told: bytes, same: bool) -> None:
    assert nft.alike(SENT, told) == same


def test_counts_are_no_difference(table: Nftables, namespace: Namespace) -> None:
    rules = (NftRule(END, "cali:why"), NftRule(nft.counter()))
    transaction = table.transaction()
    transaction.create_chain("output", BaseChain("filter", "output", 0))
    transaction.append_rules("output", [NftRule(nft.counter()), *rules])
    table.commit(transaction)
    address = "127.0.0.1" if table.version == 4 else "::1"
    run(namespace, "ping", "-c1", "-W0.1", address, check=False)
    family = "ip" if table.version == 4 else "ip6"
    assert "packets 1 " in run(namespace, "nft", "list", "table", family, "calico").stdout
    assert table.read().chains["output"].rules == (NftRule(nft.counter()), *rules)


def test_who_sleeps_is_woken(table: Nftables, namespace: Namespace) -> None:
    family = "ip" if table.version == 4 else "ip6"
    run(namespace, "nft", "add", "table", family, "calico", "{ flags dormant; }")
    assert table.exists() and table.dormant() and table.read().dormant
    transaction = table.transaction()
    transaction.create_table()
    table.commit(transaction)
    assert not table.dormant() and not table.read().dormant


def test_an_element_for_all_keys_is_none_of_ours(table: Nftables, namespace: Namespace) -> None:
    family, address = ("ip", ADDRESS4) if table.version == 4 else ("ip6", ADDRESS6)
    transaction = table.transaction()
    transaction.create_set(NftSet("s", (address,)))
    table.commit(transaction)
    run(namespace, "nft", "add", "element", family, "calico", "s", "{ * }")
    with pytest.raises(ForeignElementError):
        table.keys("s")
    transaction = table.transaction()
    transaction.flush_set("s")
    table.commit(transaction)
    assert table.keys("s") == set()


def test_an_element_with_a_statement_is_none_of_ours() -> None:
    plain = attribute(1, attribute(1, attribute(1, bytes(4))))
    limited = attribute(1, attribute(1, attribute(1, bytes(4))) + attribute(7, b""))
    body = bytes(4) + attribute(3, plain)
    assert list(parse_elements([body])) == [(bytes(4), False, None)]
    with pytest.raises(ForeignElementError):
        list(parse_elements([body, bytes(4) + attribute(3, limited)]))


def test_others_tables_are_neither_read_nor_touched(table: Nftables, namespace: Namespace) -> None:
    family = "ip" if table.version == 4 else "ip6"
    stranger = (
        f"table {family} calico2 {{ chain c {{ counter; }}; set s {{ type mark; }}; }}\n"
        "table inet calico { chain c { counter; }; }\n"
    )
    run(namespace, "nft", "-f", "-", stdin=stranger)
    assert table.read().chains == {}
    assert table.read().sets == {}
    transaction = table.transaction()
    transaction.delete_table()
    table.commit(transaction)
    assert not table.exists()
    found = json.loads(run(namespace, "nft", "-j", "list", "tables").stdout)["nftables"]
    tables = {(t["table"]["family"], t["table"]["name"]) for t in found if "table" in t}
    assert tables == {(family, "calico2"), ("inet", "calico")}


def test_a_table_that_is_not_there_is_empty(namespace: Namespace) -> None:
    with Nftables(4, "calico", netns_fd=namespace.fd) as table:
        assert not table.exists()
        assert table.read().chains == {}
        with pytest.raises(FileNotFoundError):
            table.keys("set")


def test_large_transactions_are_one(table: Nftables) -> None:
    address = ADDRESS4 if table.version == 4 else ADDRESS6
    keys = {number.to_bytes(address.length, "big") for number in range(1, 20_001)}
    spans = {Range(BITS[table.version], first, first + 4) for first in range(0, 60_000, 10)}
    transaction = table.transaction()
    transaction.create_set(NftSet("s", (address,)))
    transaction.create_set(NftSet("r", (address,), ranges=True))
    transaction.add_keys("s", keys)
    transaction.add_ranges("r", spans)
    for number in range(1000):
        transaction.create_chain(f"c{number}")
        transaction.append_rules(f"c{number}", [NftRule(nft.counter())] * 3)
    table.commit(transaction)
    assert table.keys("s") == keys
    assert table.ranges("r") == spans
    assert len(table.read().chains) == 1000
    refused = table.transaction()
    refused.delete_keys("s", keys | {b"\xff" * address.length})
    with pytest.raises(NftablesError, match="set s"):
        table.commit(refused)
    assert table.keys("s") == keys


def test_packets_obey(namespace: Namespace) -> None:
    with fresh_namespace() as other, Nftables(4, "calico", netns_fd=namespace.fd) as table:
        connect(namespace, "near", other, "far", ["10.0.0.1/24", "10.0.0.2/24"])
        transaction = table.transaction()
        transaction.create_table()
        transaction.create_set(NftSet("blocked", (ADDRESS4,)))
        transaction.create_set(NftSet("ways", (INTERFACE,), verdicts=True))
        transaction.create_chain("far")
        transaction.create_chain("input", BaseChain("filter", "input", 0))
        source = nft.load_payload(Base.NETWORK, 12, 4)
        transaction.append_rules(
            "far", [NftRule(source + nft.lookup("blocked") + nft.verdict(Verdict.DROP))]
        )
        transaction.append_rules(
            "input", [NftRule(nft.load_meta(Meta.IIFNAME) + nft.lookup_verdict("ways"))]
        )
        transaction.add_targets("ways", {nft.interface_name("near"): Target(Verdict.GOTO, "far")})
        table.commit(transaction)
        ping = ("ping", "-c1", "10.0.0.1", "-W")
        assert run(other, *ping, "20").returncode == 0
        block = table.transaction()
        block.add_keys("blocked", [parse_net("10.0.0.2").packed()])
        table.commit(block)
        assert run(other, *ping, "1", check=False).returncode == 1
