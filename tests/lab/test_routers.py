"""Configurations of routers: judged by the routers' own parsers, and by what they say."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lab.fabric import Fabric
from lab.fabricfile import parse
from lab.routers import RouterSetup, node_as_number, setup
from lab.wiring import ports, wiring
from tests.lab.fabrics import small

# FRR leaves folders in /var/tmp, even when it only checks a configuration.
ALONE = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /var/tmp && exec "$@"', "sh")


def fabric(**spec: object) -> Fabric:
    document = small()
    document["spec"].update(spec)
    return parse(document, Path())


def with_spine() -> Fabric:
    document = small()
    document["spec"]["routers"] = [
        {"name": "a-spine-with-a-long-name", "asNumber": 65001, "router": "frr"}
    ]
    document["spec"]["links"] = [
        {"between": ["tor-1", "a-spine-with-a-long-name"], "subnet": "172.31.255.0/31"},
        {"between": ["a-spine-with-a-long-name", "tor-2"], "subnet": "172.31.255.4/30"},
    ]
    document["spec"]["racks"][0]["nodes"][1]["asNumber"] = 4200000001
    return parse(document, Path())


def setups(fabric: Fabric) -> dict[str, RouterSetup]:
    return {router.name: setup(fabric, router) for router in fabric.all_routers()}


@pytest.mark.parametrize("made", [fabric(), with_spine()], ids=["plain", "spine"])
def test_the_routers_accept_their_configurations(made: Fabric, tmp_path: Path) -> None:
    for router in made.all_routers():
        for path, text in setup(made, router).files.items():
            file = tmp_path / f"{router.name}-{Path(path).name}"
            file.write_text(text)
            if file.name.endswith("bird.conf"):
                check = ("bird", "-p", "-c", str(file))
            elif file.name.endswith("bgpd.conf"):
                check = ("/usr/lib/frr/bgpd", "-C", "-f", str(file))
            elif file.name.endswith("zebra.conf"):
                check = ("/usr/lib/frr/zebra", "-C", "-f", str(file))
            else:
                continue
            result = subprocess.run([*ALONE, *check], capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr + text


def test_a_router_reflects_between_nodes_of_its_as_only() -> None:
    bird = setups(with_spine())["tor-1"].files["/etc/bird/bird.conf"]
    sessions = {
        block.partition("'")[2].partition("'")[0]: block
        for block in bird.split("protocol bgp ")[1:]
    }
    assert list(sessions) == ["node-1a", "node-1b", "a-spine-with-a-long-name"]
    assert "rr client" in sessions["node-1a"]
    assert "passive" in sessions["node-1a"]
    assert "rr client" not in sessions["node-1b"]
    assert "as 4200000001;" in sessions["node-1b"]
    assert "passive" not in sessions["a-spine-with-a-long-name"]


def test_frr_and_bird_are_told_the_same() -> None:
    document = small()
    document["spec"]["racks"][0]["tor"]["router"] = "frr"
    frr = setups(parse(document, Path()))["tor-1"].files["/etc/frr/bgpd.conf"]
    for line in (
        "router bgp 65001",
        "neighbor 172.31.1.11 remote-as 65001",
        "neighbor 172.31.1.11 passive",
        "neighbor 172.31.1.12 route-reflector-client",
        "neighbor 172.31.255.1 remote-as 65002",
    ):
        assert line in frr
    assert "172.31.255.1 passive" not in frr


def test_a_nodes_as_number_is_its_own_or_the_clusters_or_the_default() -> None:
    document = small()
    node = document["spec"]["racks"][0]["nodes"][0]
    del node["asNumber"]
    made = parse(document, Path())
    assert node_as_number(made, made.spec.racks[0].nodes[0]) == 64512
    assert node_as_number(made, made.spec.racks[0].nodes[1]) == 65001
    document["spec"]["resources"].append(
        {
            "apiVersion": "projectcalico.org/v3",
            "kind": "BGPConfiguration",
            "metadata": {"name": "default"},
            "spec": {"asNumber": 64999},
        }
    )
    made = parse(document, Path())
    assert node_as_number(made, made.spec.racks[0].nodes[0]) == 64999


def test_interfaces_are_named_after_what_is_at_the_other_end() -> None:
    made = with_spine()
    # a name that is too long for the kernel gives way to a number
    assert ports(made, "tor-1") == {
        "rack-1": "rack-1",
        "node-1a": "node-1a",
        "node-1b": "node-1b",
        "a-spine-with-a-long-name": "port0",
    }
    assert ports(made, "tor-2")["outside"] == "outside"


def test_every_cable_is_made_once() -> None:
    plan = wiring(with_spine())
    cables = [cable for member in plan.values() for cable in member.cables if "veth" in cable]
    assert len(cables) == 3 + 2 + 1  # nodes, links, host
    assert len(set(cables)) == len(cables)
    assert "route add default via 172.31.1.1" in plan["node-1a"].configuration
    assert "route add default via 198.51.100.1" in plan["outside"].configuration
