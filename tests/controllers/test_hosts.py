"""Host endpoints that are made by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.controllers import AutoHostEndpointConfig
from api.registry import parse
from controllers.hosts import CREATOR, CREATOR_LABEL, keep_hosts
from controllers.housekeeping import Housekeeping
from controllers.settings import CONFIGURATION
from datastore.interface import JSON, Key
from datastore.sqlite import SqliteDatastore
from ipam.collector import HaltedError
from tests.controllers.world import put, remove

BGP = {"ipv4Address": "172.31.0.1/24", "ipv6Address": "fd31::1/64"}
INTERFACES = [
    {"name": "eth0", "addresses": ["172.31.0.1"]},
    {"name": "eth1", "addresses": ["192.0.2.1/24", "nonsense"]},
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteDatastore]:
    store = SqliteDatastore(tmp_path / "datastore.db")
    put_node(store, "n1", rack="a")
    put_node(store, "n2")
    yield store
    store.close()


def put_node(store: SqliteDatastore, name: str, **labels: str) -> None:
    store.create(
        Key("Node", name),
        {
            "apiVersion": "projectcalico.org/v3",
            "kind": "Node",
            "metadata": {"name": name, "labels": labels},
            "spec": {"bgp": BGP, "interfaces": INTERFACES, "ipv4VXLANTunnelAddr": "10.0.0.9"},
        },
    )


def config(**fields: Any) -> AutoHostEndpointConfig:
    return AutoHostEndpointConfig.model_validate({"autoCreate": "Enabled", **fields})


def hosts(store: SqliteDatastore) -> dict[str, JSON]:
    found = {entry.key.name: entry.value for entry in store.list("HostEndpoint").entries}
    for value in found.values():
        parse(value)  # the API would take it
    return found


def test_every_node_gets_one_of_all_its_interfaces(store: SqliteDatastore) -> None:
    kept = keep_hosts(store, config())
    assert kept.made == ["n1-auto-hep", "n2-auto-hep"] and not kept.problems
    made = hosts(store)["n1-auto-hep"]
    assert made["metadata"]["labels"] == {"rack": "a", CREATOR_LABEL: CREATOR}
    assert made["spec"] == {
        "node": "n1",
        "interfaceName": "*",
        "profiles": ["projectcalico-default-allow"],
        "expectedIPs": ["172.31.0.1", "fd31::1", "10.0.0.9", "192.0.2.1"],
    }
    again = keep_hosts(store, config())
    assert (again.made, again.changed, again.deleted) == ([], [], [])


def test_they_follow_their_nodes(store: SqliteDatastore) -> None:
    keep_hosts(store, config())
    node = store.get(Key("Node", "n1")).value
    store.update(Key("Node", "n1"), {**node, "metadata": {"name": "n1", "labels": {"rack": "b"}}})
    remove(store, "Node", "n2")
    put_node(store, "n3")
    kept = keep_hosts(store, config())
    assert (kept.made, kept.changed, kept.deleted) == (
        ["n3-auto-hep"],
        ["n1-auto-hep"],
        ["n2-auto-hep"],
    )
    assert hosts(store)["n1-auto-hep"]["metadata"]["labels"]["rack"] == "b"


@pytest.mark.parametrize("wanted", [config(autoCreate="Disabled"), config(autoCreate=None)])
def test_none_are_left_when_none_are_wanted(
    store: SqliteDatastore, wanted: AutoHostEndpointConfig
) -> None:
    keep_hosts(store, config())
    put(store, "HostEndpoint", "by-hand", {"node": "n1", "interfaceName": "eth0"})
    assert keep_hosts(store, wanted).deleted == ["n1-auto-hep", "n2-auto-hep"]
    assert hosts(store).keys() == {"by-hand"}


def test_templates(store: SqliteDatastore) -> None:
    templates = [
        {
            "generateName": "nets",
            "interfaceCIDRs": ["192.0.2.0/24"],
            "labels": {"zone": "outside", "rack": "mine"},
            "annotations": {"why": "because"},
            "nodeSelector": "rack == 'a'",
        },
        {"generateName": "if", "interfacePattern": "^eth[0-9]$"},
        {"generateName": "none", "interfaceCIDRs": ["198.51.100.0/24"]},
    ]
    wanted = config(createDefaultHostEndpoint="Disabled", templates=templates)
    keep_hosts(store, wanted)
    found = hosts(store)
    expected = {f"{node}-if-{name}-auto-hep" for node in ("n1", "n2") for name in ("eth0", "eth1")}
    assert found.keys() == expected | {"n1-nets-auto-hep"}
    outside = found["n1-nets-auto-hep"]
    assert outside["spec"]["expectedIPs"] == ["192.0.2.1"]
    assert "interfaceName" not in outside["spec"]
    assert outside["metadata"]["labels"]["rack"] == "mine"
    assert outside["metadata"]["annotations"] == {"why": "because"}
    assert found["n2-if-eth1-auto-hep"]["spec"]["interfaceName"] == "eth1"
    assert found["n2-if-eth1-auto-hep"]["spec"]["expectedIPs"] == ["192.0.2.1"]


def test_what_is_somebody_elses_or_unreadable_is_left(store: SqliteDatastore) -> None:
    keep_hosts(store, config())
    remove(store, "HostEndpoint", "n1-auto-hep")
    put(store, "HostEndpoint", "n1-auto-hep", {"node": "n1", "interfaceName": "eth0"})
    store.update(Key("Node", "n2"), {"metadata": {"name": "n2"}, "spec": {"bgp": "broken"}})
    kept = keep_hosts(store, config())
    assert not kept.deleted and not kept.changed
    assert len(kept.problems) == 2
    assert hosts(store)["n1-auto-hep"]["spec"] == {"node": "n1", "interfaceName": "eth0"}
    assert "n2-auto-hep" in hosts(store)


def test_who_no_longer_leads_stops(store: SqliteDatastore) -> None:
    with pytest.raises(HaltedError):
        keep_hosts(store, config(), proceed=lambda: False)
    assert hosts(store) == {}


def test_the_leader_does_it_in_its_rounds(store: SqliteDatastore) -> None:
    put(
        store,
        CONFIGURATION.kind,
        CONFIGURATION.name,
        {"controllers": {"node": {"hostEndpoint": {"autoCreate": "Enabled"}}}},
    )
    done = Housekeeping(store).round()
    assert done.hosts.made == ["n1-auto-hep", "n2-auto-hep"]
    assert done.status()["problems"] == []
    remove(store, CONFIGURATION.kind, CONFIGURATION.name)
    assert not Housekeeping(store).round().hosts.deleted, "a lost object opens no host"
