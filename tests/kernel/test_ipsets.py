"""Sets of addresses: contents, growth, replacement under traffic, others' sets."""

import errno
import subprocess
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.net import BITS, Net, parse_net
from kernel.ipsets import IpSet, IpSetError, IpSets, net_members, port_member
from kernel.netns import Namespace, inside
from tests.support.netns import connect, fresh_namespace, run

KINDS = {
    "hash:ip": ("10.0.0.5", "10.0.0.6"),
    "hash:net": ("10.0.0.5", "10.1.0.0/16", "0.0.0.0/1", "10.1.2.0/24 nomatch"),
    "hash:ip,port": ("10.0.0.5,tcp:80", "10.0.0.5,udp:80", "10.0.0.5,sctp:65535"),
    "hash:net,port": ("10.0.0.0/8,tcp:80", "10.0.0.1,udp:53"),
}
KINDS6 = {
    "hash:ip": ("fd00::5",),
    "hash:net": ("fd00::5", "fd01::/16", "8000::/1"),
    "hash:ip,port": ("fd00::5,tcp:80", "fd00::5,udplite:1"),
    "hash:net,port": ("fd00::/64,tcp:80",),
}


@pytest.fixture
def sets(namespace: Namespace) -> Iterator[IpSets]:
    with IpSets(netns_fd=namespace.fd) as made:
        yield made


@pytest.mark.parametrize(("family", "examples"), [(4, KINDS), (6, KINDS6)])
def test_every_kind_keeps_its_members(
    sets: IpSets, namespace: Namespace, family: int, examples: dict[str, tuple[str, ...]]
) -> None:
    for number, (kind, members) in enumerate(examples.items()):
        sets.create(IpSet(f"cali{number}", kind, family), members)
    assert sets.read() == {
        f"cali{number}": (IpSet(f"cali{number}", kind, family), frozenset(members))
        for number, (kind, members) in enumerate(examples.items())
    }
    # ipset(8) sees them as we write them
    saved = run(namespace, "ipset", "save").stdout.splitlines()
    assert sorted(line for line in saved if line.startswith("add")) == sorted(
        f"add cali{number} {member}"
        for number, members in enumerate(examples.values())
        for member in members
    )
    for number, members in enumerate(examples.values()):
        sets.remove(f"cali{number}", members)
        assert sets.members(f"cali{number}") == frozenset()


def test_everything_may_be_said_twice(sets: IpSets) -> None:
    ipset = IpSet("cali1", "hash:net", 4)
    for _ in range(2):
        sets.create(ipset, ["10.0.0.1"])
        sets.add("cali1", ["10.0.0.1", "10.0.0.2", "10.0.0.2"])
    for _ in range(2):
        sets.remove("cali1", ["10.0.0.1", "10.9.9.9"])
    assert sets.read() == {"cali1": (ipset, frozenset({"10.0.0.2"}))}
    for _ in range(2):
        sets.replace(ipset, ["10.0.0.3"])
    assert sets.members("cali1") == frozenset({"10.0.0.3"})
    for _ in range(2):
        sets.destroy("cali1")
    assert sets.read() == {}
    assert sets.members("cali1") is None


NETS = st.one_of(
    st.builds(
        lambda address, length: Net(4, address >> (32 - length) << (32 - length), length),
        st.integers(0, 2**32 - 1),
        st.integers(0, 32),
    ),
    st.builds(
        lambda address, length: Net(6, address >> (128 - length) << (128 - length), length),
        st.integers(0, 2**128 - 1),
        st.integers(0, 128),
    ),
)


@given(st.lists(NETS, max_size=30), st.integers(0, 65535), st.sampled_from([6, 17, 132, 136]))
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_nets_come_back_as_written(
    sets: IpSets, nets: list[Net], port: int, protocol: int
) -> None:
    for family in (4, 6):
        own = [net for net in nets if net.version == family]
        plain = frozenset(member for net in own for member in net_members(net))
        ported = frozenset(port_member(net, protocol, port) for net in own if net.length)
        sets.replace(IpSet(f"cali{family}", "hash:net", family), plain)
        sets.replace(IpSet(f"cali{family}p", "hash:net,port", family), ported)
        assert sets.members(f"cali{family}") == plain
        assert sets.members(f"cali{family}p") == ported


def test_all_addresses_are_two_halves() -> None:
    for text in ("0.0.0.0/0", "::/0"):
        net = parse_net(text)
        halves = [parse_net(member) for member in net_members(net)]
        assert [half.length for half in halves] == [1, 1]
        assert sum(half.size for half in halves) == 1 << BITS[net.version]


@given(st.text(max_size=30))
@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_text_that_is_no_member_is_refused(sets: IpSets, text: str) -> None:
    try:
        errors = sets.update({"cali-missing": ((text,), ())})
    except ValueError as error:
        assert repr(text) in str(error)
    else:  # it could be a member, of a set that is not there
        assert errors["cali-missing"].errno == errno.ENOENT


def test_a_bad_member_is_named_and_the_others_are_in(sets: IpSets) -> None:
    sets.create(IpSet("cali1", "hash:net", 4))
    many = [f"10.1.{n >> 8}.{n & 255}" for n in range(10000)]
    with pytest.raises(IpSetError, match=r"cali1: fd00::1, 10\.0\.0\.0/33: ") as caught:
        sets.add("cali1", [*many[:5000], "fd00::1", "10.0.0.0/33", *many[5000:]])
    assert (caught.value.set_name, caught.value.members) == ("cali1", ("fd00::1", "10.0.0.0/33"))
    assert sets.members("cali1") == frozenset(many)


def test_many_sets_change_in_one_go(sets: IpSets) -> None:
    for number in range(20):
        sets.create(IpSet(f"cali{number}", "hash:ip", 4), ["10.0.0.1", "10.0.0.2"])
    deltas = {f"cali{n}": ([f"10.0.1.{n}"], ["10.0.0.1"]) for n in range(20)}
    errors = sets.update({**deltas, "cali-missing": (["10.0.0.1"], [])})
    assert errors.keys() == {"cali-missing"}
    assert str(errors["cali-missing"]) == "[Errno 2] ipset cali-missing: no such set"
    for number in range(20):
        assert sets.members(f"cali{number}") == frozenset({"10.0.0.2", f"10.0.1.{number}"})


def test_a_full_set_grows_while_a_rule_uses_it(sets: IpSets, namespace: Namespace) -> None:
    sets.create(IpSet("cali1", "hash:ip", 4, maxelem=4), ["10.0.0.1"])
    rule = "-A INPUT -m set --match-set cali1 src -j DROP"
    run(namespace, "iptables-nft", *rule.split())
    many = [f"10.0.0.{n}" for n in range(1, 200)]
    sets.add("cali1", many)
    assert sets.members("cali1") == frozenset(many)
    header = sets.headers()["cali1"]
    assert header.maxelem >= 199
    assert sets.headers().keys() == {"cali1"}
    sets.replace(header, [f"10.1.{n >> 8}.{n & 255}" for n in range(1000)])
    assert sets.headers()["cali1"].maxelem == 1000


def test_what_cannot_be_is_refused_in_words(sets: IpSets, namespace: Namespace) -> None:
    sets.create(IpSet("cali1", "hash:net", 4), ["10.0.0.1"])
    with pytest.raises(IpSetError, match="cali1: exists, with another type"):
        sets.create(IpSet("cali1", "hash:ip", 4))
    with pytest.raises(IpSetError, match="cali1: the sets have different types"):
        sets.replace(IpSet("cali1", "hash:ip", 4), ["10.0.0.2"])
    with pytest.raises(IpSetError, match="cali2: the kernel has no such set type"):
        sets.create(IpSet("cali2", "hash:nonsense", 4))
    rule = "-A INPUT -m set --match-set cali1 src -j DROP"
    run(namespace, "iptables-nft", *rule.split())
    with pytest.raises(IpSetError, match="cali1: the set is in use by a rule"):
        sets.destroy("cali1")
    assert sets.read() == {"cali1": (IpSet("cali1", "hash:net", 4), frozenset({"10.0.0.1"}))}


def test_others_sets_are_neither_seen_nor_touched(sets: IpSets, namespace: Namespace) -> None:
    run(namespace, "ipset", "create", "KUBE-CLUSTER-IP", "hash:ip,port")
    run(namespace, "ipset", "create", "bits", "bitmap:port", "range", "0-100")
    run(namespace, "ipset", "add", "KUBE-CLUSTER-IP", "10.0.0.1,80")
    sets.create(IpSet("cali1", "hash:net", 4))
    assert sets.read().keys() == {"cali1"}
    changes: tuple[Callable[[], None], ...] = (
        lambda: sets.destroy("KUBE-CLUSTER-IP"),
        lambda: sets.add("KUBE-CLUSTER-IP", ["10.0.0.1,tcp:1"]),
        lambda: sets.replace(IpSet("KUBE-CLUSTER-IP", "hash:ip,port", 4), []),
        lambda: sets.create(IpSet("cali" + 28 * "x", "hash:ip", 4)),
    )
    for change in changes:
        with pytest.raises(ValueError, match="a name that begins with 'cali' and has at most 31"):
            change()
    assert "10.0.0.1,tcp:80" in run(namespace, "ipset", "list", "KUBE-CLUSTER-IP").stdout


def test_sets_belong_to_their_namespace(sets: IpSets) -> None:
    sets.create(IpSet("cali1", "hash:net", 4))
    with fresh_namespace() as other, inside(other.fd), IpSets() as elsewhere:
        assert elsewhere.read() == {}


def test_a_replacement_interrupted_by_a_crash_is_repaired(sets: IpSets) -> None:
    ipset = IpSet("cali1", "hash:net", 4)
    sets.replace(ipset, ["10.0.0.1"])
    spare = sets._spare_name("cali1")
    sets.create(IpSet(spare, "hash:ip", 6), ["fd00::1"])  # whatever was there
    sets.replace(ipset, ["10.0.0.2"])
    assert sets.read() == {"cali1": (ipset, frozenset({"10.0.0.2"}))}


def test_no_packet_is_lost_while_a_set_is_replaced(sets: IpSets, namespace: Namespace) -> None:
    with fresh_namespace() as other:
        connect(namespace, "one", other, "two", ("10.0.0.1/24", "10.0.0.2/24"))
        ipset = IpSet("cali1", "hash:net", 4)
        sets.replace(ipset, ["10.0.0.2"])
        rule = "-A INPUT -m set ! --match-set cali1 src -j DROP"
        run(namespace, "iptables-nft", *rule.split())
        number = 0
        while number <= 50:  # the less often in a second, the longer
            with inside(other.fd):
                flood = subprocess.Popen(
                    ["ping", "-q", "-i", "0.002", "-c", "500", "-W", "20", "10.0.0.1"],
                    stdout=subprocess.PIPE,
                    text=True,
                )
            while flood.poll() is None:
                number += 1
                sets.replace(ipset, ["10.0.0.2", f"10.9.{number >> 8 & 255}.{number & 255}"])
            output = flood.communicate()[0]
            assert "500 packets transmitted, 500 received, 0% packet loss" in output
        sets.replace(ipset, ["10.0.0.3"])
        lost = run(other, "ping", "-c1", "-W1", "10.0.0.1", check=False)
        assert "1 packets transmitted, 0 received" in lost.stdout
