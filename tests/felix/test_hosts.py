"""Host endpoints, proved with packets: to the host, from it, through it, before NAT, untracked.

On all enforcers, and everything is looked at in both IP versions.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

from api.net import parse_net
from datastore.interface import JSON
from felix.addresses import HostAddresses
from felix.hosts import HostPlace, resolve
from felix.settings import settings
from kernel.netns import inside
from policy.model import EndpointId
from tests.felix.fabric import MAKERS
from tests.felix.gateway import FAR, NEAR, NODE, NODE_FAR, POD, Gateway, allowed, dropped
from tests.felix.world import V3, Listener, Node, cluster, global_policy, is_dropped, reaches
from tests.support.netns import connect, eventually, fresh_namespace, run

INGRESS, EGRESS = ["Ingress"], ["Egress"]
TCP_80 = {"action": "Allow", "protocol": "TCP", "destination": {"ports": [80]}}


@pytest.fixture(scope="module", params=MAKERS)
def made(request: pytest.FixtureRequest) -> Iterator[Gateway]:
    with ExitStack() as stack:
        yield Gateway(request.param, stack)


@pytest.fixture
def world(made: Gateway) -> Iterator[Gateway]:
    yield made
    made.clean()


def host(interface: str = "eth0", name: str = "", **spec: Any) -> JSON:
    """A host endpoint of the node."""
    labels = {"host": interface if interface != "*" else "any"}
    return {
        "apiVersion": V3,
        "kind": "HostEndpoint",
        "metadata": {"name": name or f"node1-{labels['host']}", "labels": labels},
        "spec": {"node": "node1", "interfaceName": interface, **spec},
    }


def on_hosts(name: str, **spec: Any) -> JSON:
    """A policy for all host endpoints."""
    return global_policy(name, **{"selector": "has(host)", **spec})


def test_without_policy_only_failsafe_ports_are_open(world: Gateway) -> None:
    world.enforce(host())
    assert dropped(world.near, NODE) and allowed(world.near, NODE, 22)
    assert dropped(world.node.netns, NEAR)
    assert allowed(world.far, NODE_FAR), "another interface"
    assert allowed(world.near, FAR) and allowed(world.near, POD), "what is forwarded is not meant"
    assert allowed(world.node.netns, POD), "nor are the host's own workloads"


def test_policy_to_the_host_and_from_it(world: Gateway) -> None:
    world.enforce(
        host(),
        on_hosts("in", types=INGRESS, ingress=[TCP_80]),
        on_hosts("out", types=EGRESS, egress=[{**TCP_80, "destination": {"ports": [81]}}]),
    )
    assert allowed(world.near, NODE, 80) and dropped(world.near, NODE, 81)
    assert allowed(world.node.netns, NEAR, 81) and dropped(world.node.netns, NEAR, 80)
    assert allowed(world.near, FAR, 80)


def test_failsafe_ports_are_as_configured(world: Gateway) -> None:
    near = [{"protocol": "TCP", "port": 81, "net": f"{NEAR[4]}/32"}]
    world.enforce(
        host(),
        {
            "apiVersion": V3,
            "kind": "FelixConfiguration",
            "metadata": {"name": "default"},
            "spec": {"failsafeInboundHostPorts": near, "failsafeOutboundHostPorts": []},
        },
    )
    assert is_dropped(world.near, NODE[4], 22)
    assert reaches(world.near, NODE[4], 81) and is_dropped(world.near, NODE[6], 81)


def test_profiles_decide_where_no_policy_does(world: Gateway) -> None:
    profile = {
        "apiVersion": V3,
        "kind": "Profile",
        "metadata": {"name": "web"},
        "spec": {"ingress": [TCP_80], "egress": []},
    }
    world.enforce(profile, host(profiles=["web"]))
    assert allowed(world.near, NODE, 80) and dropped(world.near, NODE, 81)
    world.enforce(host(profiles=["projectcalico-default-allow"]))
    assert allowed(world.near, NODE, 81) and allowed(world.node.netns, NEAR, 81)
    world.enforce(on_hosts("in", types=INGRESS, ingress=[TCP_80]))
    assert dropped(world.near, NODE, 81) and allowed(world.node.netns, NEAR, 81)


def test_12_forwarded_traffic_is_allowed_unless_policy_applies_on_forward(world: Gateway) -> None:
    world.enforce(host(), host("eth1"), on_hosts("in", types=INGRESS, ingress=[]))
    assert allowed(world.near, FAR) and allowed(world.near, POD) and dropped(world.near, NODE)
    forward = {"applyOnForward": True, "selector": "host == 'eth0'"}
    world.enforce(on_hosts("forward", **forward, types=INGRESS, ingress=[TCP_80]))
    assert allowed(world.near, FAR, 80) and allowed(world.near, POD, 80)
    assert dropped(world.near, FAR, 81) and dropped(world.near, POD, 81)
    assert allowed(world.far, NEAR, 81) and allowed(world.pod.netns, NEAR, 81), "the other way"
    world.enforce(on_hosts("forward", **forward, types=EGRESS, egress=[TCP_80]))
    assert allowed(world.near, FAR, 81)
    assert allowed(world.far, NEAR, 80) and allowed(world.pod.netns, NEAR, 80)
    assert dropped(world.far, NEAR, 81) and dropped(world.pod.netns, NEAR, 81)


def test_what_is_forwarded_must_please_the_pod_too(world: Gateway) -> None:
    world.enforce(
        host(),
        on_hosts("forward", applyOnForward=True, types=INGRESS, ingress=[{"action": "Allow"}]),
        global_policy("pod", selector="!has(host)", types=INGRESS, ingress=[TCP_80]),
    )
    assert allowed(world.near, POD, 80) and dropped(world.near, POD, 81)


def test_tiers_that_pass_and_staged_policies_leave_it_open(world: Gateway) -> None:
    first = {"apiVersion": V3, "kind": "Tier", "metadata": {"name": "first"}, "spec": {"order": 1}}
    both = {"applyOnForward": True, "types": INGRESS}
    draft = on_hosts("draft", **both, ingress=[{"action": "Deny"}])
    draft["kind"] = "StagedGlobalNetworkPolicy"
    world.enforce(host(profiles=["none"]), draft)
    assert allowed(world.near, FAR) and dropped(world.near, NODE)
    passes = on_hosts("first.pass", **both, tier="first", ingress=[{"action": "Pass"}])
    world.enforce(first, passes)
    assert allowed(world.near, FAR) and dropped(world.near, NODE)


def test_all_interfaces(world: Gateway) -> None:
    world.enforce(host("*"), on_hosts("in", types=["Ingress", "Egress"], ingress=[TCP_80]))
    for source, target in ((world.near, NODE), (world.far, NODE_FAR)):
        assert allowed(source, target, 80) and dropped(source, target, 81)
    assert dropped(world.node.netns, NEAR) and allowed(world.node.netns, POD)
    assert allowed(world.near, FAR, 81)
    world.enforce(host("eth1", profiles=["none"]), on_hosts("eth1", selector="host == 'eth1'"))
    assert dropped(world.far, NODE_FAR, 81)
    world.enforce(
        on_hosts("eth1", selector="host == 'eth1'", order=1, ingress=[{"action": "Allow"}])
    )
    assert allowed(world.far, NODE_FAR, 81) and dropped(world.near, NODE, 81)


def test_expected_addresses_find_the_interface(world: Gateway) -> None:
    endpoint = host(name="by-address", expectedIPs=[FAR[4], NODE_FAR[6]])
    del endpoint["spec"]["interfaceName"]
    world.enforce(endpoint)
    assert dropped(world.far, NODE_FAR) and allowed(world.near, NODE)
    world.brain.calculator.set_host_addresses(HostAddresses())
    assert world.brain.calculator.hosts_changed
    world.enforce()
    assert allowed(world.far, NODE_FAR)
    world.brain.read()
    problems = dict(world.brain.calculator.problems(world.brain.snapshot))
    assert "guards no interface" in problems["HostEndpoint(by-address)"]


def test_before_dnat(world: Gateway) -> None:
    """A policy sees the address that was asked for, and what it allows is not asked again."""
    for version in (4, 6):
        _redirect(world, version, NODE[version], 8080, POD[version])
    pre = {"preDNAT": True, "applyOnForward": True, "selector": "host == 'eth0'"}
    asked = {"action": "Deny", "protocol": "TCP", "destination": {"ports": [8080]}}
    with contextlib.ExitStack() as stack:
        stack.callback(_flush_nat, world)
        world.enforce(host(profiles=["none"]), on_hosts("other", order=9, types=EGRESS))
        assert allowed(world.near, NODE, 8080), "forwarded to the pod"
        world.enforce(on_hosts("pre", **pre, ingress=[asked]))
        assert dropped(world.near, NODE, 8080) and allowed(world.near, POD, 80)
        assert allowed(world.near, NODE, 22)
        world.enforce(
            on_hosts("pre", **pre, ingress=[{**asked, "action": "Allow"}, TCP_80]),
            on_hosts("forward", applyOnForward=True, types=INGRESS, ingress=[{"action": "Deny"}]),
        )
        assert allowed(world.near, NODE, 8080) and allowed(world.near, NODE, 80)
        assert dropped(world.near, POD, 81) and dropped(world.near, NODE, 81)


def test_a_policy_that_cannot_be_read_denies_those_packets_that_it_is_for(world: Gateway) -> None:
    """A newer one, say, with a field that nobody here knows."""
    newer = {"applyOnForward": True, "ingress": [{"action": "Deny", "weather": "fine"}]}
    everything = {"selector": "all()", "types": INGRESS}
    open_host = host(profiles=["projectcalico-default-allow"])
    world.enforce(open_host, on_hosts("p", **newer, types=INGRESS), readable=False)
    assert dropped(world.near, NODE) and dropped(world.near, FAR)
    assert allowed(world.far, POD), "the pod is not selected"
    world.enforce(on_hosts("p", **newer, **everything, preDNAT=True), readable=False)
    assert dropped(world.near, NODE) and dropped(world.near, FAR)
    assert allowed(world.far, POD) and allowed(world.node.netns, POD), "nor is it for pods"
    allow_first = on_hosts("q", applyOnForward=True, order=1, ingress=[{"action": "Allow"}])
    world.enforce(
        allow_first, on_hosts("p", **newer, **everything, doNotTrack=True, order=9), readable=False
    )
    assert dropped(world.near, NODE) and dropped(world.near, FAR), "it comes before what allows"
    assert allowed(world.far, POD)


def test_what_the_host_sends_is_judged_as_dnat_left_it(world: Gateway) -> None:
    for version in (4, 6):
        _redirect(world, version, "10.9.9.9" if version == 4 else "fd99::9", 8080, NEAR[version])
        run(world.node.netns, "ip", f"-{version}", "route", "add", "default", "dev", "eth1")
    service = {4: "10.9.9.9", 6: "fd99::9"}
    with contextlib.ExitStack() as stack:
        stack.callback(_flush_nat, world)
        for version in (4, 6):
            stack.callback(
                run, world.node.netns, "ip", f"-{version}", "route", "del", "default", "dev", "eth1"
            )
        assert allowed(world.node.netns, service, 8080)
        world.enforce(host(), on_hosts("out", types=EGRESS, egress=[TCP_80]))
        assert allowed(world.node.netns, service, 8080), "port 80 behind eth0"
        rule = {**TCP_80, "destination": {"ports": [8080]}}
        world.enforce(on_hosts("out", types=EGRESS, egress=[rule]))
        assert dropped(world.node.netns, service, 8080)


def test_untracked(world: Gateway) -> None:
    untracked = {"doNotTrack": True, "applyOnForward": True}
    back = {"action": "Allow", "protocol": "TCP", "source": {"ports": [80]}}
    world.enforce(
        host(),
        on_hosts("in", **untracked, ingress=[TCP_80], egress=[back]),
    )
    for version in (4, 6):
        with inside(world.near.fd):
            client = socket.create_connection((NODE[version], 80), timeout=60)
        with client:
            listed = run(world.node.netns, "conntrack", "-L", "-f", f"ipv{version}").stdout
            assert f"sport={client.getsockname()[1]} " not in listed
    assert dropped(world.near, NODE, 81)
    assert allowed(world.near, NODE, 22), "failsafe, tracked"
    denied = {**TCP_80, "action": "Deny"}
    world.enforce(on_hosts("in", **untracked, ingress=[denied]))
    assert dropped(world.near, NODE, 80) and dropped(world.near, FAR, 80), "and what is forwarded"
    assert allowed(world.near, FAR, 81)


def test_nothing_stays_of_host_endpoints(world: Gateway) -> None:
    before = dict(world.brain.calculator.ruleset.chains)
    every = {"applyOnForward": True, "ingress": [TCP_80]}
    world.enforce(
        host(),
        host("*"),
        on_hosts("a", **every),
        on_hosts("b", **every, preDNAT=True),
        on_hosts("c", **every, doNotTrack=True),
    )
    assert world.brain.calculator.ruleset.chains != before
    world.clean()
    assert world.brain.calculator.ruleset.chains == before
    assert "failsafe" not in run(world.node.netns, "nft", "list", "ruleset").stdout
    assert allowed(world.near, NODE, 81)


def test_the_agent_follows_addresses() -> None:
    """An interface gets the address that an endpoint expects, and loses it."""
    with cluster("node1", addresses=(f"{NODE[4]}/24",)) as (node,), fresh_namespace() as near:
        connect(node.netns, "eth0", near, "eth0", [f"{NODE[4]}/24", f"{NEAR[4]}/24"])
        endpoint = host(name="by-address", expectedIPs=[NODE_FAR[4]])
        del endpoint["spec"]["interfaceName"]
        node.put(endpoint)
        node.start()
        with Listener(node.netns, 80):
            assert reaches(near, NODE[4], 80)
            address = ("address", "add", f"{NODE_FAR[4]}/24", "dev", "eth0")
            run(node.netns, "ip", *address)
            eventually(lambda: is_dropped(near, NODE[4], 80))
            assert node.errors() == {}
            run(node.netns, "ip", "address", "del", *address[2:])
            eventually(lambda: reaches(near, NODE[4], 80) is not None)


def test_the_agent_follows_names() -> None:
    """An interface that an endpoint found by its address is called otherwise, and stays guarded.

    Of its IPv6 addresses the kernel tells nothing then.
    """
    here, there = f"{NODE[6]}/64", f"{NEAR[6]}/64"
    with cluster("node1", addresses=(f"{NODE[4]}/24",)) as (node,), fresh_namespace() as near:
        connect(node.netns, "eth0", near, "eth0", [here, there])
        endpoint = host(name="by-address", expectedIPs=[NODE[6]])
        del endpoint["spec"]["interfaceName"]
        node.put(endpoint)
        node.start()
        with Listener(node.netns, 80, version=6):
            assert is_dropped(near, NODE[6], 80)
            for name, after in (("eth0", "wan0"), ("wan0", "eth0")):
                run(node.netns, "ip", "link", "set", name, "name", after)
                guarded = partial(_has_chain, node, f"filter-cali-fh-{after}")
                eventually(guarded)
                assert is_dropped(near, NODE[6], 80)
            assert node.errors() == {}


def test_an_interface_has_one_endpoint() -> None:
    def id(name: str) -> EndpointId:
        return EndpointId("HostEndpoint", "", name)

    address = parse_net("192.0.2.1")
    hosts = {
        id("a"): HostPlace("", (address,)),
        id("b"): HostPlace("eth0", ()),
        id("c"): HostPlace("eth1", ()),
        id("d"): HostPlace("*", ()),
        id("e"): HostPlace("*", ()),
        id("f"): HostPlace("cali1", ()),
        id("g"): HostPlace("eth0 -j ACCEPT", ()),
    }
    found = resolve(hosts, {"eth0": {address}, "cali2": {address}}, settings().is_workload)
    assert found == {"eth0": id("a"), "eth1": id("c"), "*": id("d")}


def _has_chain(node: Node, chain: str) -> bool:
    command = ("nft", "list", "chain", "ip6", "calico", chain)
    return run(node.netns, *command, check=False).returncode == 0


def _redirect(world: Gateway, version: int, address: str, port: int, to: str) -> None:
    """``-t nat -A PREROUTING -d … -p tcp --dport … -j DNAT``, and for the host itself."""
    command = "iptables" if version == 4 else "ip6tables"
    where = f"{to}:80" if version == 4 else f"[{to}]:80"
    for chain in ("PREROUTING", "OUTPUT"):
        rule = f"-A {chain} -d {address} -p tcp --dport {port} -j DNAT --to-destination {where}"
        run(world.node.netns, command, "-t", "nat", *rule.split())


def _flush_nat(world: Gateway) -> None:
    for command in ("iptables", "ip6tables"):
        for chain in ("PREROUTING", "OUTPUT"):
            run(world.node.netns, command, "-t", "nat", "-F", chain)
