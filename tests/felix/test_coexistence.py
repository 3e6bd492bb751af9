"""Beside kube-proxy and Docker: their rules do what they did, ours do what policy says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from datastore.interface import JSON
from felix.backends import Backend, settle_others
from kernel.netns import inside
from tests.felix.fabric import MAKERS
from tests.felix.gateway import FAR, NEAR, NODE, POD, Gateway, allowed, dropped
from tests.felix.world import (
    Listener,
    Node,
    cluster,
    felix_configuration,
    global_policy,
    is_dropped,
    reaches,
)
from tests.support.netns import connect, eventually, fresh_namespace, run

BACKENDS = {
    "nftables": Backend.NFTABLES,
    "iptables": Backend.IPTABLES_NFT,
    "iptables-legacy": Backend.IPTABLES_LEGACY,
}
ENFORCING = {"nft": Backend.IPTABLES_NFT, "legacy": Backend.IPTABLES_LEGACY}
VARIANTS = tuple(ENFORCING)
SERVICE = {4: "10.96.0.10", 6: "fd96::10"}


@pytest.fixture(params=MAKERS)
def world(request: pytest.FixtureRequest) -> Iterator[Gateway]:
    with ExitStack() as stack:
        yield Gateway(request.param, stack)


def from_near(version: int, **rule: Any) -> JSON:
    """Pods are reached by what is near."""
    allow = {
        "action": "Allow",
        "source": {"nets": [f"{NEAR[version]}/{32 if version == 4 else 128}"]},
    }
    return global_policy(
        f"near{version}", selector="all()", types=["Ingress"], ingress=[allow | rule]
    )


def theirs(node: Node, variant: str) -> list[str]:
    """What others have in iptables."""
    lines = []
    for command in ("iptables", "ip6tables"):
        saved = run(node.netns, f"{command}-{variant}-save").stdout.splitlines()
        lines += [line for line in saved if line[0] in "-:" and "cali" not in line]
    return [re.sub(r"\[.*\]", "", line) for line in lines]


def docker(node: Node, variant: str) -> None:
    """What Docker does to the table filter: what no rule accepts is not forwarded."""
    for command in ("iptables", "ip6tables"):
        rules = """*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-FORWARD - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-FORWARD
-A DOCKER ! -i docker0 -o docker0 -j DROP
-A DOCKER-FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER-FORWARD -o docker0 -j DOCKER
-A DOCKER-FORWARD -i docker0 -j ACCEPT
-A DOCKER-USER -p tcp --dport 22 -j DROP
COMMIT
"""
        run(node.netns, f"{command}-{variant}-restore", "--noflush", stdin=rules)


@pytest.mark.parametrize("variant", VARIANTS)
def test_docker_drops_what_it_does_not_know_but_not_pods(world: Gateway, variant: str) -> None:
    """What others drop by a rule stays dropped where ours doesn't enforce: there it comes last."""
    docker(world.node, variant)
    before = theirs(world.node, variant)
    world.enforce(from_near(4), from_near(6))
    _settle(world)
    assert allowed(world.near, POD, 80) and allowed(world.pod.netns, FAR, 80)
    assert dropped(world.far, POD, 80), "policy has its say"
    assert dropped(world.near, FAR, 80), "and Docker about all others"
    if BACKENDS[world.backend] is not ENFORCING[variant]:
        assert dropped(world.near, POD, 22)
    assert theirs(world.node, variant) == before


@pytest.mark.parametrize(
    ("backend", "variant"),
    [(b, v) for b in BACKENDS for v in VARIANTS if BACKENDS[b] is not ENFORCING[v]],
)
def test_what_lets_pods_pass_is_there_only_where_it_is_needed(backend: str, variant: str) -> None:
    with ExitStack() as stack:
        world = Gateway(backend, stack)
        before = _tables(world.node, variant)
        _settle(world)
        assert _tables(world.node, variant) == before, "no table that nobody had"
        docker(world.node, variant)
        assert dropped(world.near, POD)
        _settle(world)
        assert allowed(world.near, POD)
        last = run(world.node.netns, f"iptables-{variant}", "-S", "FORWARD").stdout.splitlines()[-1]
        assert "cali-FORWARD" in last
        own = "nftables" if backend == "nftables" else "iptables"
        world.enforce(felix_configuration("default", **{f"{own}FilterAllowAction": "Return"}))
        _settle(world)
        assert dropped(world.near, POD), "who lets others decide lets them decide"
        world.enforce(felix_configuration("default"))
        _settle(world)
        for command in ("iptables", "ip6tables"):
            run(world.node.netns, f"{command}-{variant}", "-P", "FORWARD", "ACCEPT")
        _settle(world)
        assert "cali" not in run(world.node.netns, f"iptables-{variant}-save").stdout
        assert allowed(world.near, POD)


@pytest.mark.parametrize("choice", [{}, {"iptablesBackend": "Legacy"}])
def test_the_agent_sees_docker_come(choice: dict[str, str]) -> None:
    """At once, without looking every so often."""
    with cluster("node1", addresses=("172.31.0.1/24",)) as (node,), fresh_namespace() as near:
        connect(node.netns, "eth0", near, "eth0", [f"{NODE[4]}/24", f"{NEAR[4]}/24"])
        run(near, "ip", "route", "add", "default", "via", NODE[4])
        refresh = dict.fromkeys(("nftables", "ipsets", "route"), "0s")
        spec = {f"{what}RefreshInterval": interval for what, interval in refresh.items()}
        node.put(felix_configuration("default", **spec, **choice))
        pod = node.pod("pod", POD[4])
        node.start()
        with Listener(pod.netns, 80):
            assert reaches(near, POD[4], 80)
            docker(node, "nft")
            eventually(lambda: reaches(near, POD[4], 80, patience=0.3) is not None)
            for policy in ("ACCEPT", "DROP"):
                run(node.netns, "iptables-nft", "-P", "FORWARD", policy)
                stands = policy == "DROP"
                eventually(lambda stands=stands: _is_passage(node) == stands)  # type: ignore[misc]
            run(node.netns, "iptables-nft", "-F", "FORWARD")
            eventually(lambda: reaches(near, POD[4], 80, patience=0.3) is not None)
        assert node.errors() == {}


def _is_passage(node: Node) -> bool:
    return "cali-FORWARD" in run(node.netns, "iptables-nft", "-S", "FORWARD").stdout


def _tables(node: Node, variant: str) -> list[str]:
    """Which tables there are."""
    if variant == "nft":
        return run(node.netns, "nft", "list", "tables").stdout.splitlines()
    names = (f"/proc/thread-self/net/{kind}_tables_names" for kind in ("ip", "ip6"))
    return [run(node.netns, "cat", name).stdout for name in names]


def kube_proxy_iptables(node: Node, variant: str) -> None:
    """A service with one endpoint, as kube-proxy writes it in mode iptables."""
    for version, command in ((4, "iptables"), (6, "ip6tables")):
        pod = f"{POD[version]}:80" if version == 4 else f"[{POD[version]}]:80"
        rules = f"""*nat
:KUBE-SERVICES - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SVC-1 - [0:0]
:KUBE-SEP-1 - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-SERVICES -d {SERVICE[version]} -p tcp --dport 8080 -j KUBE-SVC-1
-A KUBE-SERVICES -d {NODE[version]} -p tcp --dport 30080 -j KUBE-MARK-MASQ
-A KUBE-SERVICES -d {NODE[version]} -p tcp --dport 30080 -j KUBE-SVC-1
-A KUBE-SVC-1 -j KUBE-SEP-1
-A KUBE-SEP-1 -p tcp -j DNAT --to-destination {pod}
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
COMMIT
*filter
:KUBE-FORWARD - [0:0]
-A FORWARD -j KUBE-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
COMMIT
"""
        run(node.netns, f"{command}-{variant}-restore", "--noflush", stdin=rules)


def kube_proxy_nftables(node: Node, _: str) -> None:
    """The same in mode nftables."""
    for version, family in ((4, "ip"), (6, "ip6")):
        pod = f"{POD[version]}:80" if version == 4 else f"[{POD[version]}]:80"
        rules = f"""table {family} kube-proxy {{
  map service-ips {{
    type ipv{version}_addr . inet_proto . inet_service : verdict
    elements = {{ {SERVICE[version]} . tcp . 8080 : goto service-1,
                  {NODE[version]} . tcp . 30080 : goto external-1 }}
  }}
  chain nat-prerouting {{ type nat hook prerouting priority -100; jump services; }}
  chain nat-output {{ type nat hook output priority -100; jump services; }}
  chain nat-postrouting {{ type nat hook postrouting priority 100;
    meta mark & 0x4000 == 0 return
    meta mark set meta mark ^ 0x4000
    masquerade fully-random
  }}
  chain filter-forward {{ type filter hook forward priority -110; ct state invalid drop; }}
  chain services {{ {family} daddr . meta l4proto . th dport vmap @service-ips; }}
  chain external-1 {{ meta mark set meta mark | 0x4000; goto service-1; }}
  chain service-1 {{ meta l4proto tcp dnat to {pod}; }}
}}
"""
        # chains before the map that leads to them
        declared = f"table {family} kube-proxy {{ chain service-1 {{ }}; chain external-1 {{ }}; }}"
        run(node.netns, "nft", "-f", "-", stdin=f"{declared}\n{rules}")


@pytest.mark.parametrize("mode", ["nft", "legacy", "nftables"])
def test_services_of_kube_proxy_obey_the_policy_of_their_pods(world: Gateway, mode: str) -> None:
    """Policy sees a service's client and its endpoint, whatever the client asked for."""
    write = kube_proxy_nftables if mode == "nftables" else kube_proxy_iptables
    write(world.node, mode)
    before = _theirs_everywhere(world.node)
    assert allowed(world.near, SERVICE, 8080) and allowed(world.near, NODE, 30080)
    only_80 = {"protocol": "TCP", "destination": {"ports": [80]}}
    world.enforce(from_near(4, **only_80), from_near(6, **only_80))
    _settle(world)
    assert allowed(world.near, SERVICE, 8080)
    assert dropped(world.far, SERVICE, 8080)
    assert allowed(world.near, NODE, 30080) and dropped(world.far, NODE, 30080)
    world.enforce(from_near(4, destination={"ports": [8080]}, protocol="TCP"))
    assert is_dropped(world.near, SERVICE[4], 8080), "the endpoint's port counts"
    world.clean()
    assert allowed(world.far, SERVICE, 8080)
    assert _theirs_everywhere(world.node) == before


def kube_proxy_ipvs(node: Node, variant: str) -> None:
    """What kube-proxy has in mode ipvs, but for ipvs: addresses of services, ipsets, rules."""
    for version, command, family in ((4, "iptables", "inet"), (6, "ip6tables", "inet6")):
        service, pod = f"{SERVICE[version]},tcp:8080", f"{POD[version]},tcp:80,{POD[version]}"
        name = "KUBE" if version == 4 else "KUBE-6"
        sets = f"""create {name}-CLUSTER-IP hash:ip,port family {family}
create {name}-LOOP-BACK hash:ip,port,ip family {family}
create {name}-IPVS-IPS hash:ip family {family}
create {name}-NODE-PORT-TCP bitmap:port range 0-65535
add {name}-CLUSTER-IP {service}
add {name}-LOOP-BACK {pod}
add {name}-IPVS-IPS {SERVICE[version]}
add {name}-NODE-PORT-TCP 30080
"""
        rules = f"""*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODE-PORT - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-SERVICES -m set --match-set {name}-CLUSTER-IP dst,dst -j KUBE-MARK-MASQ
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT
-A KUBE-SERVICES -m set --match-set {name}-CLUSTER-IP dst,dst -j ACCEPT
-A KUBE-NODE-PORT -p tcp -m set --match-set {name}-NODE-PORT-TCP dst -j KUBE-MARK-MASQ
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m set --match-set {name}-LOOP-BACK dst,dst,src -j MASQUERADE
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
COMMIT
*filter
:KUBE-FORWARD - [0:0]
:KUBE-IPVS-FILTER - [0:0]
-A INPUT -j KUBE-IPVS-FILTER
-A FORWARD -j KUBE-FORWARD
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A KUBE-IPVS-FILTER -m set --match-set {name}-CLUSTER-IP dst,dst -j RETURN
-A KUBE-IPVS-FILTER -m conntrack --ctstate NEW -m set --match-set {name}-IPVS-IPS dst -j REJECT
COMMIT
"""
        run(node.netns, "ipset", "restore", stdin=sets)
        run(node.netns, f"{command}-{variant}-restore", "--noflush", stdin=rules)
        run(node.netns, "ip", "address", "add", SERVICE[version], "dev", "lo")


@pytest.mark.parametrize("variant", VARIANTS)
def test_rules_of_kube_proxy_in_mode_ipvs_stand_beside_policy(world: Gateway, variant: str) -> None:
    kube_proxy_ipvs(world.node, variant)
    before = _theirs_everywhere(world.node)
    world.enforce(from_near(4), from_near(6))
    _settle(world)
    world.brain.read()
    world.brain.enforce()
    assert allowed(world.near, POD) and dropped(world.far, POD)
    # What ipvs does not take: their rules refuse it, and pods don't get to it anyway.
    assert not any(reaches(world.far, SERVICE[version], 80) for version in (4, 6))
    assert dropped(world.pod.netns, SERVICE, 8080)
    world.clean()
    assert allowed(world.far, POD)
    assert _theirs_everywhere(world.node) == before


def _theirs_everywhere(node: Node) -> list[str]:
    proxy = run(node.netns, "nft", "-s", "list", "table", "ip", "kube-proxy", check=False).stdout
    sets = run(node.netns, "ipset", "save", "-sorted").stdout.splitlines()
    of_others = [line.split(" initval")[0] for line in sets if "KUBE" in line]
    return [proxy, *theirs(node, "nft"), *theirs(node, "legacy"), *of_others]


def _settle(world: Gateway) -> None:
    """As the agent does after it has looked at the kernel."""
    with inside(world.node.netns.fd):
        assert settle_others(BACKENDS[world.backend], world.brain.calculator.settings) == []
