"""Top-of-rack routers of three makers, set by the same few words: BIRD, FRR, GoBGP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import yaml

from tests.bird_glue.world import Bird, Frr, Process, Router
from tests.support.gobgp import build
from tests.support.netns import eventually, run

NODE_AS = 64512
SHARED, SHARED_SIX, LOOP = "192.0.2.0/24", "2001:db8:5::/48", "10.99.0.0/16"


@dataclass(frozen=True)
class Uplink:
    """One router: number ``n`` of the rack, and how it is set now.

    ``asn`` and ``router_id`` are its own unless they are given. ``forwards``: its kernel does so
    while its BGP restarts, and it says so (which only FRR has a setting for). ``extended``: one
    session, over IPv6, with IPv4 routes in it as well.
    """

    n: int
    asn: int = 0
    router_id: str = ""
    peer_as: int = NODE_AS
    password: str = ""
    ttl_security: bool = False
    limit: int = 0
    bfd: bool = False
    forwards: bool = True
    extended: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "asn", self.asn or 65000 + self.n)
        object.__setattr__(self, "router_id", self.router_id or self.address)

    @property
    def address(self) -> str:
        return f"172.31.{self.n}.1"

    @property
    def six(self) -> str:
        return f"fd00:{self.n}::1"

    @property
    def node(self) -> str:
        return f"172.31.{self.n}.11"

    @property
    def node_six(self) -> str:
        return f"fd00:{self.n}::11"

    @property
    def own(self) -> tuple[str, str]:
        """What only this router announces, with the community ``ASN:7``."""
        return f"10.5{self.n}.0.0/16", f"2001:db8:5{self.n}::/48"

    @property
    def behind(self) -> tuple[str, str]:
        """The addresses of the host there."""
        return f"10.5{self.n}.0.9", f"2001:db8:5{self.n}::9"


class TopOfRack(Router):
    """What tests ask of any router."""

    def begin(self, uplink: Uplink, *, graceful: bool = False) -> None:
        """Start it, or start it again. ``graceful``: as one that was there a moment ago."""
        raise NotImplementedError

    def stop(self) -> None:
        """Kill its BGP."""
        raise NotImplementedError

    def prefixes(self) -> set[str]:
        """What it learned."""
        raise NotImplementedError

    def stale(self) -> bool:
        """Whether it keeps what a node told that is starting again: the next loss of the session
        ends that (RFC 4724 4.2).
        """
        raise NotImplementedError

    def communities(self, net: str) -> str:
        """What it says of a prefix, communities and all, if it has learned it."""
        raise NotImplementedError


_BIRD = """
log stderr all;
router id {router_id};
protocol device {{ scan time 1; }}
protocol kernel {{ merge paths on; graceful restart on; persist;
  ipv4 {{ export where source != RTS_STATIC; import none; }}; }}
protocol kernel {{ graceful restart on; persist;
  ipv6 {{ export where source != RTS_STATIC; import none; }}; }}
protocol bfd {{ accept direct; }}
protocol static {{ ipv4;
  route {own} blackhole {{ bgp_community.add(({asn},7)); }};
  route {shared} blackhole; route {loop} blackhole {{ bgp_path.prepend({node_as}); }}; }}
protocol static {{ ipv6; route {own_six} blackhole {{ bgp_community.add(({asn},7)); }};
  route {shared_six} blackhole; }}
template bgp node {{
  graceful restart on; graceful restart time 60; hold time 30; direct;
  connect delay time 0; connect retry time 1; error wait time 1, 2;
  {options}
}}
{four}
protocol bgp six from node {{ local {six} as {asn}; neighbor {node_six} as {peer_as};
  {more}
  ipv6 {{ import all; export all; next hop self; {limit} }}; }}
"""
_BIRD_FOUR = """
protocol bgp four from node {{ local {address} as {asn}; neighbor {node} as {peer_as};
  ipv4 {{ import all; export all; next hop self; {limit} }}; }}
"""


class BirdRouter(Bird, TopOfRack):
    """BIRD 2."""

    def begin(self, uplink: Uplink, *, graceful: bool = False) -> None:
        options = f'password "{uplink.password}"; ' if uplink.password else ""
        options += "ttl security on; " if uplink.ttl_security else ""
        options += "bfd on;" if uplink.bfd else ""
        self.stop()
        limit = f"import limit {uplink.limit} action disable;" if uplink.limit else ""
        four = _BIRD_FOUR.format(
            address=uplink.address,
            asn=uplink.asn,
            node=uplink.node,
            peer_as=uplink.peer_as,
            limit=limit,
        )
        more = "ipv4 { import all; export all; next hop self; extended next hop; };"
        text = _BIRD.format(
            router_id=uplink.router_id,
            four="" if uplink.extended else four,
            more=more if uplink.extended else "",
            own=uplink.own[0],
            own_six=uplink.own[1],
            asn=uplink.asn,
            shared=SHARED,
            shared_six=SHARED_SIX,
            loop=LOOP,
            node_as=NODE_AS,
            six=uplink.six,
            node_six=uplink.node_six,
            peer_as=uplink.peer_as,
            options=options,
            limit=limit,
        )
        self.start(text, *(("-R",) if graceful else ()))

    def stop(self) -> None:
        self.end()

    def prefixes(self) -> set[str]:
        return self.blocks()

    def stale(self) -> bool:
        return "Neighbor graceful restart active" in self.birdc("show", "protocols", "all")

    def communities(self, net: str) -> str:
        return self.shown(net)


# maps first: what names one that isn't there yet is told five seconds after the end of the rest
_FRR = """
route-map OWN permit 10
 set community {asn}:7
route-map LOOP permit 10
 set as-path prepend {node_as}
router bgp {asn}
 bgp router-id {router_id}
 no bgp ebgp-requires-policy
 no bgp default ipv4-unicast
 no bgp network import-check
 bgp graceful-restart
 bgp graceful-restart restart-time 60
{graceful}
 neighbor {node} remote-as {peer_as}
 neighbor {node_six} remote-as {peer_as}
{options}
 address-family ipv4 unicast
  network {own} route-map OWN
  network {shared}
  network {loop} route-map LOOP
  neighbor {over} activate
{limit}
 exit-address-family
 address-family ipv6 unicast
  network {own_six} route-map OWN
  network {shared_six}
  neighbor {node_six} activate
{limit_six}
 exit-address-family
"""


class FrrRouter(Frr, TopOfRack):
    """FRR: zebra and bfdd stay, bgpd comes and goes."""

    bgpd: Process | None = None

    def begin(self, uplink: Uplink, *, graceful: bool = False) -> None:
        self.stop()
        both = uplink.node, uplink.node_six
        options = [f" neighbor {node} timers connect 1" for node in both]
        options += [f" neighbor {node} timers 10 30" for node in both]
        if uplink.password:
            options += [f" neighbor {node} password {uplink.password}" for node in both]
        if uplink.ttl_security:
            options += [f" neighbor {node} ttl-security hops 1" for node in both]
        if uplink.bfd:
            options += [f" neighbor {node} bfd" for node in both]
        limits = ["", ""]
        if uplink.limit:
            limits = [f"  neighbor {node} maximum-prefix {uplink.limit}" for node in both]
        if uplink.extended:
            options.append(f" neighbor {uplink.node_six} capability extended-nexthop")
        text = _FRR.format(
            over=uplink.node_six if uplink.extended else uplink.node,
            asn=uplink.asn,
            router_id=uplink.router_id,
            node=uplink.node,
            node_six=uplink.node_six,
            peer_as=uplink.peer_as,
            options="\n".join(options),
            own=uplink.own[0],
            own_six=uplink.own[1],
            shared=SHARED,
            shared_six=SHARED_SIX,
            loop=LOOP,
            node_as=NODE_AS,
            graceful=" bgp graceful-restart preserve-fw-state" if uplink.forwards else "",
            limit=limits[0],
            limit_six=limits[1],
        )
        (self.files / "bgpd.conf").write_text(text)
        (self.files / "zebra.conf").write_text("ip forwarding\nipv6 forwarding\n")
        (self.files / "bfdd.conf").write_text("")
        if not self.daemons:
            self.daemons = (self._daemon("zebra"),)
            eventually((self.files / "z").exists)
            self.daemons += (self._daemon("bfdd", "--bfdctl", str(self.files / "bfdd.sock")),)
        with self._four_first() if graceful else nullcontext():
            self.bgpd = self._daemon("bgpd")
            eventually((self.files / "bgpd.vty").exists)

    @contextmanager
    def _four_first(self) -> Iterator[None]:
        """IPv6 waits until IPv4 has been decided about.

        Zebra deletes what it kept of both when the End-of-RIB of one has come, however soon after
        it the routes of the other come.
        """
        rules = "tcp dport 179 drop; tcp sport 179 drop;"
        hook = "type filter hook input priority 0;"
        self.run("nft", f"table ip6 late {{ chain c {{ {hook} {rules} }}; }}")
        try:
            yield
            eventually(self._has_decided)
        finally:
            self.run("nft", "delete table ip6 late")

    def _has_decided(self) -> bool:
        """Whether it has chosen a path of IPv4, which it puts off while it starts again."""
        learned = self.prefixes()
        return any(
            net in learned and any(path.get("bestpath") for path in paths)
            for net, paths in self._tables()
            if ":" not in net
        )

    def _daemon(self, name: str, *options: str) -> Process:
        for left in (self.files / f"{name}.pid", self.files / f"{name}.vty"):
            left.unlink(missing_ok=True)
        return Process(
            self.namespace, f"/usr/lib/frr/{name}", "-A", "127.0.0.1", "-P", "0",
            "-f", str(self.files / f"{name}.conf"), "-i", str(self.files / f"{name}.pid"),
            "-z", str(self.files / "z"), "--vty_socket", str(self.files), *options,
            log=self.directory / f"{name}.log",
        )  # fmt: skip

    def stop(self) -> None:
        if self.bgpd is not None:
            self.bgpd.__exit__()
        self.bgpd = None

    def prefixes(self) -> set[str]:
        return {
            net
            for net, paths in self._tables()
            if any(path["peerId"] != "(unspec)" for path in paths)
        }

    def stale(self) -> bool:
        return any(path.get("stale") for _, paths in self._tables() for path in paths)

    def _tables(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """The paths of each prefix."""
        for family in ("ipv4", "ipv6"):
            table = json.loads(self.vtysh(f"show bgp {family} unicast json"))
            yield from table.get("routes", {}).items()

    def communities(self, net: str) -> str:
        family = "ipv6" if ":" in net else "ipv4"
        return self.vtysh(f"show bgp {family} unicast {net} json")

    def end(self) -> None:
        self.stop()
        super().end()


class GobgpRouter(TopOfRack):
    """GoBGP, which writes no routes: those of the node are static here."""

    daemon: Process | None = None

    def begin(self, uplink: Uplink, *, graceful: bool = False) -> None:
        self.stop()
        programs = build()
        self._client = str(programs / "gobgp")
        path = self.directory / "gobgpd.yaml"
        config = {"as": uplink.asn, "router-id": uplink.router_id}
        if uplink.extended:
            both = self._neighbor(uplink, uplink.node_six, "ipv4-unicast", "ipv6-unicast")
            neighbors = [both]
        else:
            neighbors = [
                self._neighbor(uplink, uplink.node, "ipv4-unicast"),
                self._neighbor(uplink, uplink.node_six, "ipv6-unicast"),
            ]
        path.write_text(yaml.safe_dump({"global": {"config": config}, "neighbors": neighbors}))
        options = ("-r",) if graceful else ()
        self.daemon = Process(
            self.namespace, str(programs / "gobgpd"), "-t", "yaml", "-f", str(path),
            "--api-hosts", "127.0.0.1:50051", *options, log=self.directory / "gobgpd.log",
        )  # fmt: skip
        eventually(lambda: f"AS:        {uplink.asn}" in self._ask("global", check=False))
        tag = ("community", f"{uplink.asn}:7")
        self._add("ipv4", uplink.own[0], *tag)
        self._add("ipv6", uplink.own[1], *tag)
        self._add("ipv4", SHARED)
        self._add("ipv6", SHARED_SIX)

    def _neighbor(self, uplink: Uplink, address: str, *families: str) -> dict[str, object]:
        limit = {"prefix-limit": {"config": {"max-prefixes": uplink.limit}}}
        graceful = {"mp-graceful-restart": {"config": {"enabled": True}}}
        safis = [{"config": {"afi-safi-name": family}} | graceful for family in families]
        neighbor: dict[str, object] = {
            "config": {
                "neighbor-address": address,
                "peer-as": uplink.peer_as,
                "auth-password": uplink.password,
            },
            "timers": {
                "config": {"connect-retry": 1, "hold-time": 30, "idle-hold-time-after-reset": 1}
            },
            "graceful-restart": {"config": {"enabled": True, "restart-time": 60}},
            "afi-safis": [safi | (limit if uplink.limit else {}) for safi in safis],
        }
        if uplink.ttl_security:
            neighbor["ttl-security"] = {"config": {"enabled": True, "ttl-min": 255}}
        return neighbor

    def _add(self, family: str, net: str, *words: str) -> None:
        self._ask("global", "rib", "add", "-a", family, net, "origin", "igp", *words)

    def _ask(self, *words: str, check: bool = True) -> str:
        return run(self.namespace, self._client, *words, check=check).stdout

    def stop(self) -> None:
        if self.daemon is not None:
            self.daemon.__exit__()
        self.daemon = None

    def prefixes(self) -> set[str]:
        return {
            net for net, paths in self._tables() if any("peer-address" in path for path in paths)
        }

    def stale(self) -> bool:
        return any(path.get("stale") for _, paths in self._tables() for path in paths)

    def _tables(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """The paths of each prefix."""
        for family in ("ipv4", "ipv6"):
            table = json.loads(self._ask("global", "rib", "-a", family, "-j") or "{}")
            yield from table.items()

    def communities(self, net: str) -> str:
        family = "ipv6" if ":" in net else "ipv4"
        return self._ask("global", "rib", "-a", family, net, check=False)

    def end(self) -> None:
        self.stop()


KINDS: dict[str, type[TopOfRack]] = {"bird": BirdRouter, "frr": FrrRouter, "gobgp": GobgpRouter}
