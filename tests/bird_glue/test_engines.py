"""Both engines in the same place: one node, a top-of-rack router, and packets between."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from bird_glue.process import Bird as BirdProcess
from bird_glue.process import ExaBgp
from tests.bird_glue.world import (
    BIRD_COMMON,
    BIRD_SESSION,
    Bird,
    Node,
    Ping,
    Station,
    World,
    world,
)
from tests.support.netns import PROMPTLY, eventually

BLOCK, POD, OUTSIDE = "10.1.0.0/26", "10.1.0.5", "192.0.2.9"
TOR, NODE = "172.31.1.1", "172.31.1.11"
ANNOTATION = "projectcalico.org/BGPEngine"
STATICS = "protocol static {{ ipv4; {routes} }}\n"


def tor_configuration(*statics: str, asn: int = 65001) -> str:
    routes = " ".join(f"route {net} blackhole;" for net in statics)
    session = BIRD_SESSION.format(
        name="n1", local=TOR, asn=asn, peer=NODE, peer_asn=64512, export="all"
    )
    # two that call each other at once may need a second try, which some tests would take for ours
    session = session.replace("hold time 30;", "hold time 30; passive;")
    return BIRD_COMMON.format(router_id=TOR) + STATICS.format(routes=routes) + session


def set_engine(made: World, engine: str, **spec: object) -> None:
    """The annotation that says which engine runs."""
    made.store.put_raw(
        "BGPConfiguration",
        "default",
        {
            "apiVersion": "projectcalico.org/v3",
            "kind": "BGPConfiguration",
            "metadata": {"name": "default", "annotations": {ANNOTATION: engine}},
            "spec": {"nodeToNodeMeshEnabled": False, "asNumber": 64512, **spec},
        },
    )


@dataclass
class Rack:
    engine: str
    node: Node
    tor: Bird
    pod: Station
    outside: Station
    world: World

    def settle(self) -> None:
        """Everything as the fixture made it, and heard."""
        eventually(lambda: self.node.established(TOR))
        eventually(lambda: self.tor.blocks() == {BLOCK})
        eventually(lambda: self.learned() == [f"192.0.2.0/24 via {TOR} dev eth0 metric 1024"])
        eventually(lambda: bool((s := self.node.status()) and not s.holding))

    def tells(self, engine: str) -> bool:
        """The status is of this engine, and all is well."""
        status = self.node.status()
        return status is not None and (status.engine, status.problems) == (engine, [])

    def learned(self) -> list[str]:
        """What the kernel has of peers."""
        protocol = {"exabgp": "179", "bird": "bird"}[self.engine]
        return self.node.routes(f"proto {protocol} type unicast")

    def daemon(self) -> int:
        """The process id of the engine; 0 while there is none."""
        kind = {"exabgp": ExaBgp, "bird": BirdProcess}[self.engine]
        found = kind.find(self.node.run_dir)
        if found is None:
            return 0
        found.close()
        return found.pid


@pytest.fixture(scope="module", params=["exabgp", "bird"])
def rack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rack]:
    with world(tmp_path_factory.mktemp("engines")) as made:
        node, tor, outside = made.rack(NODE, TOR, OUTSIDE)
        pod = made.pod(node, "pod", POD)
        set_engine(made, request.param)
        made.store.put("IPPool", "plain", cidr="10.1.0.0/16")
        made.store.put("IPPool", "overlay", cidr="10.2.0.0/16", vxlanMode="Always")
        made.store.put("BGPPeer", "tor", peerIP=TOR, asNumber=65001)
        made.store.node("n1", f"{NODE}/24")
        made.store.block("n1", BLOCK)
        tor.start(tor_configuration())
        node.start()
        yield Rack(request.param, node, tor, pod, outside, made)


@pytest.fixture(autouse=True)
def settled(request: pytest.FixtureRequest) -> None:
    if "rack" in request.fixturenames:
        request.getfixturevalue("rack").settle()


def test_blocks_are_told_routes_learned_and_packets_flow(rack: Rack) -> None:
    assert rack.outside.reaches(POD)
    assert rack.pod.reaches(OUTSIDE)
    assert f"blackhole {BLOCK} metric 1024" in rack.node.routes("proto 179")
    complete = (2, 1, 1)
    eventually(
        lambda: bool(
            (p := rack.node.peer(TOR)) and (p.received, p.installed, p.announced) == complete
        )
    )
    peer, status = rack.node.peer(TOR), rack.node.status()
    assert peer
    assert status
    assert (status.engine, status.pid) == (rack.engine, rack.daemon())
    eventually(lambda: rack.tells(rack.engine))
    assert (peer.type, peer.asn, peer.port, peer.info) == ("global", 65001, 179, "")
    # the node's own subnet is told too, and not used
    assert (peer.received, peer.used, peer.installed) == (2, 1, 1)
    assert sum(peer.refused.values()) == 1


def test_blocks_and_routes_come_and_go(rack: Rack) -> None:
    store, node, tor = rack.world.store, rack.node, rack.tor
    session = tor.session("n1")
    store.block("n1", "10.1.9.0/26")
    tor.configure(tor_configuration("10.50.0.0/16", "10.2.7.0/26", "10.1.0.4/30"))
    eventually(lambda: tor.blocks() == {BLOCK, "10.1.9.0/26"})
    expected = [f"{net} via {TOR} dev eth0 metric 1024" for net in ("10.50.0.0/16", "192.0.2.0/24")]
    eventually(lambda: rack.learned() == expected)  # neither felix's nor inside of our block
    eventually(lambda: "blackhole 10.1.9.0/26 metric 1024" in node.routes("proto 179"))
    store.drop_block("n1", "10.1.9.0/26")
    tor.configure(tor_configuration())
    eventually(lambda: tor.blocks() == {BLOCK})
    assert tor.session("n1") == session


def test_a_change_to_one_peer_leaves_the_others_alone(rack: Rack) -> None:
    store, tor = rack.world.store, rack.tor
    session = tor.session("n1")
    store.put("BGPPeer", "other", peerIP="172.31.1.77", asNumber=65001, keepaliveTime="10s")
    eventually(lambda: rack.node.peer("172.31.1.77") is not None)
    missing = "no answer from 172.31.1.77 on its link"
    eventually(lambda: bool((p := rack.node.peer("172.31.1.77")) and p.info == missing))
    store.put("BGPPeer", "other", peerIP="172.31.1.78", asNumber=65002)
    eventually(lambda: rack.node.peer("172.31.1.78") is not None)
    store.delete("BGPPeer", "other")
    eventually(lambda: rack.node.peer("172.31.1.78") is None)
    assert tor.session("n1") == session


def test_wrong_as_is_explained(rack: Rack) -> None:
    rack.tor.configure(tor_configuration(asn=65009))
    eventually(
        lambda: bool((p := rack.node.peer(TOR)) and p.info.startswith("wrong AS number: the peer"))
    )
    rack.tor.configure(tor_configuration())


@pytest.mark.parametrize("who", ["agent", "engine", "agent and engine"])
def test_nothing_is_lost_when_it_is_killed(rack: Rack, who: str) -> None:
    node, tor = rack.node, rack.tor
    session, daemon = tor.session("n1"), rack.daemon()
    with Ping(rack.outside, POD) as ping:
        if "agent" in who:
            node.agent.end()
        if "engine" in who:
            os.kill(daemon, signal.SIGKILL)
        if "agent" in who:
            node.start()
        if "engine" in who:
            eventually(lambda: tor.session("n1") != session)
        rack.settle()
        eventually(lambda: "restart active" not in tor.birdc("show", "protocols", "all", "n1"))
    assert ping.lost == 0
    if who == "agent":
        assert (rack.daemon(), tor.session("n1")) == (daemon, session)


def test_a_router_that_restarts_gracefully_loses_nothing(rack: Rack) -> None:
    with Ping(rack.outside, POD) as ping:
        rack.tor.daemon.end()
        eventually(lambda: not rack.node.established(TOR), PROMPTLY)
        assert rack.learned() != []
        rack.tor.start(tor_configuration(), "-R")
        rack.settle()
    assert ping.lost == 0


def test_failure_detection_that_restarts_with_the_router_ends_no_graceful_restart(
    rack: Rack,
) -> None:
    """RFC 5882 4.3: by its own word it shares the fate of its BGP, and means no more than that."""
    with_bfd = tor_configuration().replace("hold time 30;", "hold time 30; bfd on;")
    with_bfd += "protocol bfd { accept direct; }\n"
    rack.tor.configure(with_bfd)

    def bfd() -> str:
        return peer.bfd if (peer := rack.node.peer(TOR)) else ""

    eventually(lambda: bfd().startswith("up"))
    rack.settle()
    with Ping(rack.outside, POD) as ping:
        rack.tor.daemon.end()
        eventually(lambda: not rack.node.established(TOR), PROMPTLY)
        eventually(lambda: bfd() == "down")
        assert rack.node.status()
        assert rack.learned() != []
        rack.tor.start(with_bfd, "-R")
        rack.settle()
        assert rack.learned() != []
    assert ping.lost == 0
    rack.tor.configure(tor_configuration())


def test_what_somebody_took_from_bird_is_noticed_and_put_back(rack: Rack) -> None:
    """By hand, behind the agent: its own routes no longer go out."""
    eventually(lambda: bool((p := rack.node.peer(TOR)) and p.announced == p.intended == 1))
    if rack.engine == "exabgp":
        return  # which has nothing to do it with
    control = str(rack.node.run_dir / "bird.ctl")
    rack.node.run("birdc", "-s", control, "disable", "own_v4")
    eventually(lambda: rack.tor.blocks() == set())
    words = f"session with {TOR}: 1 prefixes are not announced as they should be"
    eventually(lambda: words in "".join(s.problems if (s := rack.node.status()) else []))
    eventually(lambda: rack.tor.blocks() == {BLOCK})
    eventually(lambda: bool((s := rack.node.status()) and s.problems == []))


def test_a_peer_that_is_removed_forgets_us_at_once(rack: Rack) -> None:
    rack.world.store.delete("BGPPeer", "tor")
    eventually(lambda: rack.tor.blocks() == set())
    eventually(lambda: rack.learned() == [])
    # that there are none is no problem, also when the agent has asked the engine by itself
    looked = time.monotonic()
    while time.monotonic() < looked + 1.5:
        status = rack.node.status()
        assert status and (status.peers, status.problems) == ([], [])
    rack.world.store.put("BGPPeer", "tor", peerIP=TOR, asNumber=65001)


def test_routes_move_to_another_metric(rack: Rack) -> None:
    """As they do for IPv6 when an agent finds those of a version that had another one."""
    with Ping(rack.outside, POD) as inward, Ping(rack.pod, OUTSIDE) as outward:
        for metric in (512, 1024):
            set_engine(rack.world, rack.engine, ipv4NormalRoutePriority=metric)
            expected = [f"192.0.2.0/24 via {TOR} dev eth0 metric {metric}"]
            eventually(lambda expected=expected: rack.learned() == expected)  # type: ignore[misc]
            own = f"blackhole {BLOCK} metric {metric}"
            eventually(lambda own=own: own in rack.node.routes("proto 179"))  # type: ignore[misc]
    assert (inward.lost, outward.lost) == (0, 0)
    set_engine(rack.world, rack.engine)


def test_leaving_takes_everything_back_first(rack: Rack) -> None:
    from bird_glue.status import leave

    assert rack.node.failure_detectors() != []
    leave(rack.node.run_dir)
    assert rack.node.agent.wait() == 0
    eventually(lambda: rack.node.failure_detectors() == [])
    eventually(lambda: rack.tor.blocks() == set())
    assert rack.node.routes("proto 179") == rack.node.routes("proto bird") == []
    assert rack.daemon() == 0
    rack.node.start()


def test_engines_change_under_traffic(rack: Rack) -> None:
    """There and back. The router keeps our routes, the kernel keeps its: nothing is lost."""
    first, other = rack.engine, {"exabgp": "bird", "bird": "exabgp"}[rack.engine]
    with Ping(rack.outside, POD) as inward, Ping(rack.pod, OUTSIDE) as outward:
        for engine in (other, first):
            session, daemon = rack.tor.session("n1"), rack.daemon()
            set_engine(rack.world, engine)
            rack.engine = engine
            eventually(lambda session=session: rack.tor.session("n1") != session)  # type: ignore[misc]
            rack.settle()
            assert rack.daemon() != daemon
            eventually(partial(rack.tells, engine))
            # the other one's is gone
            eventually(lambda: len(rack.node.routes("192.0.2.0/24")) == 1)
    assert (inward.lost, outward.lost) == (0, 0)


def test_an_agent_that_dies_while_engines_change(rack: Rack) -> None:
    """The next one finds the wrong engine, or none, and routes of both."""
    first, other = rack.engine, {"exabgp": "bird", "bird": "exabgp"}[rack.engine]
    with Ping(rack.outside, POD) as inward, Ping(rack.pod, OUTSIDE) as outward:
        rack.node.agent.end()
        set_engine(rack.world, other)
        rack.node.start()
        rack.engine = other
        rack.settle()
        os.kill(rack.daemon(), signal.SIGKILL)
        rack.node.agent.end()
        set_engine(rack.world, first)
        rack.node.start()
        rack.engine = first
        rack.settle()
    assert (inward.lost, outward.lost) == (0, 0)


BROKEN = {
    # says no at once; takes the configuration, and ends as soon as it runs
    "refuses": "#!/bin/sh\necho 'not today' >&2\nexit 1\n",
    "ends": "#!/bin/sh\ncase \"$*\" in *-p*) exit 0;; esac\necho 'no such luck' >&2\nexit 1\n",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_bird_that_does_not_work_takes_nothing_along(tmp_path: Path, how: str) -> None:
    """ExaBGP stays, or comes back; no packet is lost; what is wrong is said."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "bird").write_text(BROKEN[how])
    (programs / "bird").chmod(0o755)
    with world(tmp_path) as made:
        node, tor, outside = made.rack(NODE, TOR, OUTSIDE)
        made.pod(node, "pod", POD)
        set_engine(made, "exabgp")
        made.store.put("IPPool", "plain", cidr="10.1.0.0/16")
        made.store.put("BGPPeer", "tor", peerIP=TOR, asNumber=65001)
        made.store.node("n1", f"{NODE}/24")
        made.store.block("n1", BLOCK)
        tor.start(tor_configuration())
        node.start(PATH=f"{programs}:{os.environ['PATH']}")
        eventually(lambda: node.established(TOR) and tor.blocks() == {BLOCK})
        eventually(lambda: node.route_to("192.0.2.0/24") != "")
        exabgp = node.exabgp()
        with Ping(outside, POD) as ping:
            set_engine(made, "bird")

            def said() -> bool:
                status = node.status()
                words = "".join(status.problems) if status else ""
                return (
                    f"metadata.annotations[{ANNOTATION}]: 'bird'" in words
                    and {"refuses": "not today", "ends": "no such luck"}[how] in words
                )

            eventually(said)
            eventually(lambda: node.established(TOR))
            eventually(lambda: tor.blocks() == {BLOCK})
            status = node.status()
            assert status
            assert status.engine == "exabgp"
            assert (node.exabgp() == exabgp) == (how == "refuses")
        assert ping.lost == 0
        assert node.route_to("192.0.2.0/24") != ""


@pytest.mark.parametrize("others", [("bird", "bird"), ("exabgp", "bird")], ids="-".join)
def test_mesh_of_engines(tmp_path: Path, others: tuple[str, str]) -> None:
    """Both families; one restarts and loses nothing, one goes for good."""
    engines = ("bird", *others)
    with world(tmp_path) as made:
        nodes = [made.node(f"n{n}") for n in range(3)]
        hosts = [f"172.31.1.{n}" for n in (9, 10, 11)]
        made.switch("rack", *((n, f"{h}/24") for n, h in zip(nodes, hosts, strict=True)))
        pods = [made.pod(node, f"p{n}", f"10.1.{n}.5") for n, node in enumerate(nodes)]
        made.store.put("IPPool", "plain", cidr="10.1.0.0/16")
        for n, (node, host) in enumerate(zip(nodes, hosts, strict=True)):
            six = f"2001:db8::{n + 1}/64"
            node.run("ip", "address", "add", six, "dev", "eth0", "nodad")
            made.store.node(node.name, f"{host}/24", ipv6Address=six)
            made.store.block(node.name, f"10.1.{n}.0/26")
            made.store.block(node.name, f"2001:db8:1{n}::/122")
        for node, engine in zip(nodes, engines, strict=True):
            node.start(MANX_BGP_ENGINE=engine)
        for n, node in enumerate(nodes):
            protocol = {"exabgp": "179", "bird": "bird"}[engines[n]]
            for m in {0, 1, 2} - {n}:
                four = [f"10.1.{m}.0/26 via {hosts[m]} dev eth0 metric 1024"]
                six = f"2001:db8:1{m}::/122 via 2001:db8::{m + 1} dev eth0 metric 1025 pref medium"
                eventually(partial(learned, node, f"10.1.{m}.0/26", protocol, four))
                eventually(partial(learned, node, f"2001:db8:1{m}::/122", protocol, [six]))
        assert all(pods[a].reaches(f"10.1.{b}.5") for a in range(3) for b in range(3))
        assert {p.type for n in nodes for h in hosts if (p := n.peer(h))} == {"node-to-node mesh"}

        with Ping(pods[1], "10.1.0.5") as ping:
            before = nodes[1].sessions(hosts[0])
            found = BirdProcess.find(nodes[0].run_dir)
            assert found
            found.signal(signal.SIGKILL)
            found.close()
            eventually(lambda: nodes[1].established_since(before))
            eventually(lambda: nodes[0].established(hosts[1]))
            eventually(lambda: bool((s := nodes[0].status()) and not s.holding))
        assert ping.lost == 0

        made.store.delete("Node", "n2")
        made.store.drop_block("n2", "10.1.2.0/26")
        eventually(lambda: all(not n.routes("exact 10.1.2.0/26 type unicast") for n in nodes[:2]))
        assert pods[0].reaches("10.1.1.5")


def learned(node: Node, net: str, protocol: str, expected: list[str]) -> bool:
    family = "-6" if ":" in net else "-4"
    return node.routes(f"exact {net} proto {protocol}", family) == expected


def test_reflector_on_bird(tmp_path: Path) -> None:
    """No mesh: nodes hear of each other from one that runs BIRD, with unchanged next hops."""
    with world(tmp_path) as made:
        nodes = [made.node(name) for name in ("rr", "n1", "n2")]
        hosts = [f"172.31.1.{n}" for n in (10, 11, 12)]
        made.switch("rack", *((n, f"{h}/24") for n, h in zip(nodes, hosts, strict=True)))
        rr, one, two = nodes
        pod = made.pod(one, "p1", "10.1.1.5")
        made.pod(two, "p2", "10.1.2.5")
        store = made.store
        store.put("IPPool", "plain", cidr="10.1.0.0/16")
        store.put("BGPPeer", "rr", nodeSelector="all()", peerSelector="has(rr)")
        store.put("BGPConfiguration", "default", nodeToNodeMeshEnabled=False)
        cluster = {"routeReflectorClusterID": "1.0.0.1", "labels": {"rr": "1"}}
        for n, (node, host) in enumerate(zip(nodes, hosts, strict=True)):
            store.node(node.name, f"{host}/24", **(cluster if node is rr else {}))
            store.block(node.name, f"10.1.{n}.0/26")
            node.start(MANX_BGP_ENGINE="exabgp" if node is one else "bird")
        direct = ["10.1.2.0/26 via 172.31.1.12 dev eth0 metric 1024"]
        back = [f"10.1.1.0/26 via {NODE} dev eth0 metric 1024"]
        eventually(partial(learned, one, "10.1.2.0/26", "179", direct))
        eventually(partial(learned, two, "10.1.1.0/26", "bird", back))
        assert pod.reaches("10.1.2.5")
        with Ping(pod, "10.1.2.5") as ping:
            before = one.sessions(hosts[0])
            found = BirdProcess.find(rr.run_dir)
            assert found
            rr.agent.end()
            found.signal(signal.SIGKILL)
            found.close()
            rr.start(MANX_BGP_ENGINE="bird")
            eventually(lambda: one.established_since(before) and two.established(hosts[0]))
            eventually(lambda: bool((status := rr.status()) and not status.holding))
        assert ping.lost == 0
        assert rr.peer(hosts[1])
        store.drop_block("n2", "10.1.2.0/26")
        eventually(partial(learned, one, "10.1.2.0/26", "179", []))
