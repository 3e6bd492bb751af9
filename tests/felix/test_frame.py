"""What is around policy, proved with packets: NAT, service loops, verdicts' manners, spoofing.

On all enforcers, and in both IP versions where a setting has both.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from datastore.interface import JSON
from kernel.netns import Namespace, inside
from tests.felix.fabric import MAKERS
from tests.felix.gateway import FAR, NEAR, NODE, POD, Gateway, allowed, dropped
from tests.felix.world import (
    V3,
    felix_configuration,
    global_policy,
    is_dropped,
    policy,
    reaches,
)
from tests.support.netns import run

PORT = 8888


@pytest.fixture(scope="module", params=MAKERS)
def made(request: pytest.FixtureRequest) -> Iterator[Gateway]:
    with ExitStack() as stack:
        yield Gateway(request.param, stack)


@pytest.fixture
def world(made: Gateway) -> Iterator[Gateway]:
    yield made
    made.clean()


def settings(**spec: Any) -> JSON:
    return felix_configuration("default", **spec)


def pools(**spec: Any) -> list[JSON]:
    """A pool around the pod, in both IP versions."""
    return [
        {
            "apiVersion": V3,
            "kind": "IPPool",
            "metadata": {"name": name},
            "spec": {"cidr": cidr, "natOutgoing": True, **spec},
        }
        for name, cidr in (("four", "10.0.0.0/16"), ("six", "fd10::/64"))
    ]


def seen_as(source: Namespace, target: Namespace, address: str) -> tuple[str, int]:
    """The address and port from which a connection arrives."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with inside(target.fd):
        server = socket.create_server((address, PORT), family=family)
    with inside(source.fd):
        client = socket.socket(family)
    with server, client:
        server.settimeout(60)
        client.settimeout(60)
        client.connect((address, PORT))
        connection, peer = server.accept()
        connection.close()
        return peer[0], peer[1]


def test_nat_outgoing_is_behind_the_nodes_address(world: Gateway) -> None:
    assert seen_as(world.pod.netns, world.near, NEAR[4])[0] == POD[4]
    world.enforce(*pools())
    for version in (4, 6):
        assert seen_as(world.pod.netns, world.near, NEAR[version])[0] == NODE[version]


def test_others_who_translate_the_source_come_first(world: Gateway) -> None:
    """As whom a packet goes out is said by who says so; ours is what is left."""
    variant = "legacy" if world.backend.endswith("legacy") else "nft"
    chosen = {4: f"{NODE[4].rpartition('.')[0]}.78", 6: f"{NODE[6]}78"}
    rules = {}
    for version, command in ((4, f"iptables-{variant}"), (6, f"ip6tables-{variant}")):
        run(world.node.netns, "ip", "address", "add", chosen[version], "dev", "eth0")
        rules[command] = f"-p tcp --dport {PORT} -d {NEAR[version]} -j SNAT".split()
        rules[command] += ["--to-source", chosen[version]]
        run(world.node.netns, command, "-t", "nat", "-A", "POSTROUTING", *rules[command])
    world.enforce(*pools())
    for version in (4, 6):
        assert seen_as(world.pod.netns, world.near, NEAR[version])[0] == chosen[version]
        assert seen_as(world.pod.netns, world.far, FAR[version])[0] != POD[version]
    for command, rule in rules.items():
        # It comes behind ours again, until the next look.
        for verb in ("-D", "-A"):
            run(world.node.netns, command, "-t", "nat", verb, "POSTROUTING", *rule)
    world.brain.read()
    world.brain.enforce()
    for version in (4, 6):
        assert seen_as(world.pod.netns, world.near, NEAR[version])[0] == chosen[version]
    for command, rule in rules.items():
        run(world.node.netns, command, "-t", "nat", "-D", "POSTROUTING", *rule)
    for address in chosen.values():
        run(world.node.netns, "ip", "address", "del", address, "dev", "eth0")


def test_nat_outgoing_as_configured(world: Gateway) -> None:
    own = f"{NODE[4].rpartition('.')[0]}.77"
    run(world.node.netns, "ip", "address", "add", f"{own}/32", "dev", "eth0")
    world.enforce(*pools(), settings(natOutgoingAddress=own, natPortRange="4000:4010"))
    for _ in range(3):
        address, port = seen_as(world.pod.netns, world.near, NEAR[4])
        assert address == own and 4000 <= port <= 4010
    address, port = seen_as(world.pod.netns, world.near, NEAR[6])
    assert address == NODE[6] and 4000 <= port <= 4010
    world.enforce(settings(natOutgoingAddress=own, iptablesNATOutgoingInterfaceFilter="eth1"))
    assert seen_as(world.pod.netns, world.near, NEAR[4])[0] == POD[4]
    assert seen_as(world.pod.netns, world.far, FAR[6])[0] != POD[6]
    world.enforce(settings(iptablesNATOutgoingInterfaceFilter="eth+"))
    assert seen_as(world.pod.netns, world.near, NEAR[4])[0] == NODE[4]


def test_other_nodes_may_be_spared_by_nat_outgoing(world: Gateway) -> None:
    near = {
        "apiVersion": V3,
        "kind": "Node",
        "metadata": {"name": "node2"},
        "spec": {"bgp": {"ipv4Address": f"{NEAR[4]}/24"}},
    }
    world.enforce(*pools(), near, settings(natOutgoingExclusions="IPPoolsAndHostIPs"))
    assert seen_as(world.pod.netns, world.near, NEAR[4])[0] == POD[4]
    assert seen_as(world.pod.netns, world.far, FAR[4])[0] != POD[4]
    world.enforce(settings(natOutgoingExclusions="IPPoolsOnly"))
    assert seen_as(world.pod.netns, world.near, NEAR[4])[0] == NODE[4]


def test_packets_for_services_that_are_none_do_not_go_round(world: Gateway) -> None:
    services: JSON = {
        "apiVersion": V3,
        "kind": "BGPConfiguration",
        "metadata": {"name": "default"},
        "spec": {
            "serviceClusterIPs": [{"cidr": "172.32.0.0/24"}],
            "serviceExternalIPs": [{"cidr": "fd32::/64"}],
        },
    }
    assert allowed(world.near, FAR)
    world.enforce(services)
    assert dropped(world.near, FAR) and dropped(world.pod.netns, FAR)
    assert reaches(world.node.netns, FAR[4], 80), "what the node itself sends is not forwarded"
    world.enforce(settings(serviceLoopPrevention="Reject"))
    for version in (4, 6):
        with pytest.raises(ConnectionRefusedError):
            _connect(world.near, FAR[version])
    world.enforce(settings(serviceLoopPrevention="Disabled"))
    assert allowed(world.near, FAR)


def test_floating_addresses(world: Gateway) -> None:
    external = {4: "203.0.113.7", 6: "fd77::7"}
    nats = [{"internalIP": POD[v], "externalIP": external[v]} for v in (4, 6)]
    endpoint = world.brain.snapshot.workloads[world.pod.key]
    networks = [f"{POD[4]}/32", f"{POD[6]}/128"]
    with_nats = world.pod.endpoint(ipNetworks=networks, ipNATs=nats)
    world.brain.snapshot.update(world.pod.key, with_nats)
    world.enforce()
    assert dropped(world.near, external), "not without floatingIPs"
    world.enforce(settings(floatingIPs="Enabled"))
    assert allowed(world.near, external) and allowed(world.node.netns, external)
    for version in (4, 6):
        own = seen_as(world.pod.netns, world.pod.netns, POD[version])[0]
        assert own == POD[version]
        assert reaches(world.pod.netns, external[version], 80), "the pod itself"
    assert external[4] in run(world.node.netns, "ip", "route").stdout
    deny = policy("p", selector="all()", types=["Ingress"], ingress=[])
    world.enforce(deny)
    assert dropped(world.near, external)
    world.brain.snapshot.update(world.pod.key, world.pod.endpoint(ipNetworks=networks))
    world.enforce()
    assert external[4] not in run(world.node.netns, "ip", "route").stdout
    assert world.brain.snapshot.workloads[world.pod.key] == endpoint


@pytest.mark.parametrize("enforcer", ["iptables", "nftables"])
def test_what_is_denied_may_be_refused(world: Gateway, enforcer: str) -> None:
    deny = policy("p", selector="all()", types=["Ingress"], ingress=[{"action": "Deny"}])
    world.enforce(deny, settings(**{f"{enforcer}FilterDenyAction": "Reject"}))
    if (enforcer == "nftables") != (world.backend == "nftables"):
        assert dropped(world.near, POD)
    else:
        for version in (4, 6):
            with pytest.raises(ConnectionRefusedError):
                _connect(world.near, POD[version])


def test_what_is_allowed_may_go_on_to_others_rules(world: Gateway) -> None:
    """A stranger's rule behind ours drops port 81, where ours let it see the packet."""
    drop = ("iptables", "-A", "FORWARD", "-p", "tcp", "--dport", "81", "-j", "DROP")
    legacy = "iptables-legacy" if world.backend == "iptables-legacy" else "iptables"
    run(world.node.netns, legacy, *drop[1:])
    try:
        if world.backend == "nftables":
            assert is_dropped(world.near, POD[4], 81), "nftables asks everyone"
        else:
            assert reaches(world.near, POD[4], 81)
        world.enforce(
            settings(iptablesFilterAllowAction="Return", nftablesFilterAllowAction="Return")
        )
        assert is_dropped(world.near, POD[4], 81) and allowed(world.near, POD, 80)
        world.enforce(policy("p", selector="all()", types=["Ingress"], ingress=[]))
        assert dropped(world.near, POD, 80)
    finally:
        run(world.node.netns, legacy, "-D", *drop[2:])


def test_staged_policies_are_counted_and_do_nothing(world: Gateway) -> None:
    """Of a draft's rules the first that matches counts, as it would act; none logs."""
    only_80 = {"protocol": "TCP", "destination": {"ports": [80]}}
    rules = [{"action": "Log"}, {"action": "Allow", **only_80}, {"action": "Deny"}]
    draft = policy("draft", selector="all()", order=1, types=["Ingress"], ingress=rules)
    draft["kind"] = "StagedNetworkPolicy"
    world.enforce(draft, policy("late", selector="all()", order=9, ingress=[{"action": "Allow"}]))
    assert allowed(world.near, POD, 80) and allowed(world.near, POD, 81)
    counts = [_packets(world, f"(default/draft) ingress rule {index}") for index in range(3)]
    assert counts == [0, 1, 1], "first packets only: the rest is established"
    assert " LOG " not in _listed(world) and "log prefix" not in _listed(world)


@pytest.mark.parametrize(
    ("prefix", "own", "everybodys"),
    [
        ("%t %k %n %p", "first np p default/p", "default gnp g g"),
        ("%x%p%%t", "%xdefault/p%first", "%xg%default"),
        ("fixed", "fixed", "fixed"),
        ("", "calico-packet", "calico-packet"),
    ],
)
def test_a_log_tells_which_policy(world: Gateway, prefix: str, own: str, everybodys: str) -> None:
    """``felix/rules/policy.go`` generateLogPrefix. iptables shows 29 characters."""
    log: dict[str, Any] = {"ingress": [{"action": "Log"}], "selector": "all()"}
    tier = {"apiVersion": V3, "kind": "Tier", "metadata": {"name": "first"}, "spec": {"order": 1}}
    policies = (policy("p", tier="first", **log), global_policy("g", **log))
    world.enforce(settings(logPrefix=prefix), tier, *policies)
    for text in (own, everybodys):
        told = f"{text}: "[: 127 if world.backend == "nftables" else 29]
        assert f'prefix "{told}"' in _listed(world)
    if "%t" in prefix:
        world.enforce(settings(logPrefix=prefix), policy("p", **log))
        assert own.replace("first", "default")[:20] in _listed(world), "it moved to another tier"


def _listed(world: Gateway) -> str:
    command = {
        "nftables": ("nft", "list", "table", "ip", "calico"),
        "iptables": ("iptables-save", "-c"),
        "iptables-legacy": ("iptables-legacy-save", "-c"),
    }[world.backend]
    return run(world.node.netns, *command).stdout


def _packets(world: Gateway, comment: str) -> int:
    """How many packets met rules with such a comment, in IPv4."""
    lines = [line for line in _listed(world).splitlines() if comment in line]
    if world.backend == "nftables":
        words = [line.split() for line in lines]
        return sum(int(each[each.index("packets") + 1]) for each in words)
    return sum(int(line[1:].split(":")[0]) for line in lines)


def test_marks_are_of_the_mask(world: Gateway) -> None:
    world.enforce(settings(iptablesMarkMask=0xF00, nftablesMarkMask=0xF000))
    rules = _listed(world)
    nftables = world.backend == "nftables"
    assert ("& 0x00001000 == 0x00001000" if nftables else "0x100/0x100") in rules
    assert "0x10000" not in rules
    assert allowed(world.near, POD)


def test_a_pod_can_not_forge_its_source(world: Gateway) -> None:
    """In IPv6 no sysctl looks at sources: that is for our rules alone."""
    forged = {4: "10.0.0.99", 6: "fd10::99"}
    world.enforce(global_policy("all", types=["Egress"], egress=[{"action": "Allow"}]))
    for version, address in forged.items():
        length = 32 if version == 4 else 128
        flags = ["nodad"] if version == 6 else []
        add = ["ip", "address", "add", f"{address}/{length}", "dev", "eth0", *flags]
        run(world.pod.netns, *add)
        sysctl = f"net.ipv4.conf.{world.pod.interface}.rp_filter=0"
        run(world.node.netns, "sysctl", "-w", sysctl)
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with inside(world.near.fd):
            server = socket.socket(family, socket.SOCK_DGRAM)
        with server:
            server.bind((NEAR[version], 7000))
            server.settimeout(60)
            for source in (address, POD[version]):
                with inside(world.pod.netns.fd):
                    client = socket.socket(family, socket.SOCK_DGRAM)
                with client:
                    client.bind((source, 0))
                    client.sendto(source.encode(), (NEAR[version], 7000))
            assert server.recv(100).decode() == POD[version], "the forged one came first"
        run(world.pod.netns, "ip", "address", "del", f"{address}/{length}", "dev", "eth0")


def test_a_pod_can_not_encapsulate(world: Gateway) -> None:
    for version in (4, 6):
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with inside(world.near.fd):
            ipip = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_IPIP)
            vxlan = socket.socket(family, socket.SOCK_DGRAM)
            plain = socket.socket(family, socket.SOCK_DGRAM)
        with ipip, vxlan, plain:
            vxlan.bind((NEAR[version], 4789))
            plain.bind((NEAR[version], 4790))
            with inside(world.pod.netns.fd):
                raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_IPIP)
                client = socket.socket(family, socket.SOCK_DGRAM)
            with raw, client:
                raw.sendto(struct.pack("!20x"), (NEAR[version], 0))
                client.sendto(b"vxlan", (NEAR[version], 4789))
                client.sendto(b"plain", (NEAR[version], 4790))
            plain.settimeout(60)
            assert plain.recv(10) == b"plain"
            for nothing in (ipip, vxlan):
                nothing.setblocking(False)
                with pytest.raises(BlockingIOError):
                    nothing.recv(100)


def test_from_a_pod_to_its_node(world: Gateway) -> None:
    assert dropped(world.pod.netns, NODE)
    world.enforce(settings(defaultEndpointToHostAction="Accept"))
    assert allowed(world.pod.netns, NODE)
    world.enforce(policy("p", selector="all()", types=["Egress"], egress=[]))
    assert dropped(world.pod.netns, NODE)


def _connect(source: Namespace, address: str) -> None:
    with inside(source.fd):
        client = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    with client:
        client.settimeout(60)
        client.connect((address, 80))


def test_a_field_of_the_settings_that_nobody_knows_opens_nothing(world: Gateway) -> None:
    """As with a newer Calico in the cluster. The pod's interface isn't called cali…."""
    name = "eni0123456789a"
    run(world.node.netns, "ip", "link", "set", world.pod.interface, "name", name)
    renamed = world.pod.endpoint(interfaceName=name, ipNetworks=[f"{POD[4]}/32", f"{POD[6]}/128"])
    world.brain.read()
    nobody = policy("p", selector="all()", types=["Egress"])
    for fields in ({"interfacePrefix": "eni", "futureField": 1}, {"interfacePrefix": "eni,+"}):
        world.enforce(renamed, nobody, settings(**fields), readable=False)
        assert dropped(world.pod.netns, NEAR)
        assert allowed(world.near, POD)
    run(world.node.netns, "ip", "link", "set", name, "name", world.pod.interface)
    world.brain.read()
    world.brain.snapshot.update(
        world.pod.key, world.pod.endpoint(ipNetworks=[f"{POD[4]}/32", f"{POD[6]}/128"])
    )
    world.put.pop(world.pod.key)
