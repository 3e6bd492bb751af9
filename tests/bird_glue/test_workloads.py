"""A workload that speaks BGP with its node: a pod with a network of its own behind it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from api.net import parse_net
from bird_glue.status import leave
from bird_glue.workloads import PeeringAddresses, Workload, Workloads
from datastore.interface import JSON, Key
from kernel.addresses import Addresses
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace
from tests.bird_glue.world import BIRD_COMMON, Bird, Node, World, world
from tests.support.netns import connect, eventually, run

N1, N2, VM, INSIDE, CALLED = "172.31.1.11", "172.31.1.12", "10.1.1.5", "10.1.64.1", "169.254.0.179"
NETWORK = "10.1.64.0/26"
BIRD = (
    BIRD_COMMON.format(router_id=VM)
    + f"""
protocol static {{ ipv4; route {NETWORK} blackhole; route 192.0.2.0/24 blackhole; }}
protocol bgp node {{
  local {VM} as 65001; neighbor {CALLED} as 64512; multihop; graceful restart on; hold time 30;
  connect delay time 0; connect retry time 1; error wait time 1, 2;
  ipv4 {{ import all; export where source = RTS_STATIC; }};
}}
"""
)


def endpoint(name: str = "vm", node: str = "n1", **spec: Any) -> tuple[Key, JSON]:
    whole = {"node": node, "ipNetworks": [f"{VM}/32"], "interfaceName": "calivm", **spec}
    metadata = {"name": name, "namespace": "default", "labels": {"bgp": "yes"}}
    kind = {"apiVersion": "projectcalico.org/v3", "kind": "WorkloadEndpoint"}
    key = Key("WorkloadEndpoint", name, "default")
    return key, {**kind, "metadata": metadata, "spec": whole}


def test_those_of_this_node() -> None:
    workloads = Workloads("n1")
    assert workloads.update(*endpoint(ipNetworks=["10.1.1.5/32", "10.1.1.6/32", "fd00::5/128"]))
    assert not workloads.update(*endpoint("other", node="n2"))
    key, value = endpoint()
    hosts = {4: parse_net("10.1.1.5"), 6: parse_net("fd00::5")}
    assert workloads.known == {key: Workload({"bgp": "yes"}, hosts, "calivm")}
    assert workloads.update(key, value)
    assert not workloads.update(key, value)
    assert workloads.update(*endpoint(ipNetworks=["10.1.1.0/24"]))
    assert str(workloads.problems[0]).startswith("WorkloadEndpoint default/vm: spec.ipNetworks[0]")
    assert key in workloads.known  # what it was stands
    assert workloads.update(*endpoint(node="n2"))
    assert workloads.known == {}
    assert workloads.problems == []


def test_addresses_of_an_earlier_agent_are_known(
    namespace: Namespace, netlink: NetlinkSocket
) -> None:
    def there() -> set[str]:
        read = (Addresses(netlink).read(version=version) for version in (4, 6))
        return {str(address) for found in read for address in found.values()} - on_lo

    on_lo: set[str] = set()
    on_lo = there()
    run(namespace, "ip", "link", "add", "cali1", "type", "veth", "peer", "name", "other")
    for address in ("10.9.9.9/32", "fe80::1/64"):
        run(namespace, "ip", "address", "add", address, "dev", "cali1")
    others = there()
    hosts = frozenset(map(parse_net, ("169.254.0.179", "fe80::179", "fd00::179")))
    first = PeeringAddresses(netlink)
    first.apply({"cali1": hosts}, look=False)
    assert there() - others == {"169.254.0.179/32", "fe80::179/128", "fd00::179/128"}
    second = PeeringAddresses(netlink)
    second.apply({"cali1": hosts - {parse_net("169.254.0.179")}}, look=False)
    assert there() - others == {"fe80::179/128", "fd00::179/128"}
    PeeringAddresses(netlink).clear()
    assert there() - others == {"fd00::179/128"}
    second.clear()
    assert there() == others


@dataclass
class Scene:
    n1: Node
    n2: Node
    vm: Bird
    world: World


@pytest.fixture(params=["exabgp", "bird"])
def scene(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    with world(tmp_path_factory.mktemp("workloads")) as made:
        n1, n2, vm = made.node("n1"), made.node("n2"), made.bird("vm")
        connect(n1.namespace, "eth0", n2.namespace, "eth0", [f"{N1}/24", f"{N2}/24"])
        connect(n1.namespace, "calivm", vm.namespace, "eth0")
        n1.run("ip", "route", "add", f"{VM}/32", "dev", "calivm", "proto", "80")
        vm.run("ip", "address", "add", f"{VM}/32", "dev", "eth0")
        vm.run("ip", "address", "add", f"{INSIDE}/32", "dev", "lo")
        # the node answers for its gateway; here by an address, where felix uses proxy_arp
        n1.run("ip", "address", "add", "169.254.1.1/32", "dev", "calivm")
        vm.run("ip", "route", "add", "169.254.1.1", "dev", "eth0", "scope", "link")
        vm.run("ip", "route", "add", "default", "via", "169.254.1.1", "src", INSIDE)
        vm.run("ip", "route", "add", CALLED, "via", "169.254.1.1", "src", VM)
        store = made.store
        store.put("BGPConfiguration", "default", localWorkloadPeeringIPV4=CALLED)
        store.put("IPPool", "plain", cidr="10.1.0.0/16")
        store.put("BGPPeer", "vms", localWorkloadSelector="has(bgp)", asNumber=65001)
        store.node("n1", f"{N1}/24")
        store.node("n2", f"{N2}/24")
        store.block("n1", "10.1.1.0/26")
        key, value = endpoint()
        store.put_raw(key.kind, key.name, value, namespace=key.namespace)
        vm.start(BIRD)
        n1.engine = request.param
        n1.start()
        n2.start()
        yield Scene(n1, n2, vm, made)


def test_what_a_workload_says_is_told_to_all(scene: Scene) -> None:
    n1, n2, vm = scene.n1, scene.n2, scene.vm
    eventually(lambda: n1.established(VM, N2))
    eventually(lambda: n1.route_to(NETWORK) == f"{NETWORK} via {VM} dev calivm metric 1024")
    eventually(lambda: n2.route_to(NETWORK) == f"{NETWORK} via {N1} dev eth0 metric 1024")
    assert n2.reaches(INSIDE)
    assert n2.route_to("192.0.2.0/24") == ""  # outside of all pools: for filters to say
    eventually(lambda: "10.1.1.0/26" in vm.blocks())
    peer = n1.peer(VM)
    assert peer
    assert peer.type == "local workload"

    session = vm.session("node")
    n1.agent.end()
    n1.start()
    eventually(lambda: n1.established(VM))
    eventually(lambda: bool((status := n1.status()) and not status.holding))
    assert vm.session("node") == session

    scene.world.store.delete("BGPPeer", "vms")
    eventually(lambda: n1.route_to(NETWORK) == "" == n2.route_to(NETWORK))
    eventually(lambda: CALLED not in n1.run("ip", "address", "show", "calivm"))

    scene.world.store.put("BGPPeer", "vms", localWorkloadSelector="has(bgp)", asNumber=65001)
    eventually(lambda: n1.established(VM))
    n1.agent.end()
    scene.world.store.delete("Node", "n1")  # so the next agent never gets to know what it had
    n1.start()
    eventually(lambda: n1.status() is not None)
    leave(n1.run_dir)
    assert CALLED not in n1.run("ip", "address", "show", "calivm")
    eventually(lambda: vm.blocks() == set())
