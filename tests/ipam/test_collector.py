"""What is collected, when, and what never is."""

from __future__ import annotations

import pytest

from api.net import Net, parse_net
from datastore.interface import Key
from datastore.sqlite import SqliteDatastore
from ipam import claims
from ipam.allocator import Allocator
from ipam.block import Block
from ipam.collector import Collected, Collector, HaltedError, Periods, Standing
from ipam.reading import read
from ipam.records import CONFIRMED, PENDING, Records
from tests.controllers.world import (
    Clock,
    add_nodes,
    assign,
    attachment,
    forget,
    plug,
    put,
    record,
    release,
    remove,
)
from tests.ipam.world import (
    Died,
    add_pool,
    affinities,
    allocated,
    blocks,
    configure,
    dies_after,
    handles,
    overtaken_at,
)

PERIODS = Periods(grace=900, quiet=60)


class Rounds:
    """A collector, and the time between its rounds."""

    def __init__(self, store: SqliteDatastore) -> None:
        self.store = store
        self.clock = Clock()
        self.collector = Collector(store, clock=self.clock)

    def __call__(self, seconds: float = 0) -> Collected:
        """A round, so long after the last."""
        self.clock.now += seconds
        return self.collector.run(read(self.store), PERIODS)


@pytest.fixture
def rounds(store: SqliteDatastore) -> Rounds:
    add_pool(store, "four", "10.0.0.0/26", 28)
    add_pool(store, "six", "fd00::/122", 124)
    add_nodes(store, "n1", "n2")
    return Rounds(store)


def test_standing() -> None:
    standing: Standing[str] = Standing()
    standing.observe(["a", "b"], 0)
    assert not standing.lasted("a", 1000, 900)  # seen once
    standing.observe(["a"], 899)
    assert not standing.lasted("a", 899, 900)
    assert not standing.lasted("b", 5000, 0)  # went
    standing.observe(["a", "b"], 900)
    assert standing.lasted("a", 900, 900)
    assert not standing.lasted("b", 900, 0)
    assert (list(standing), len(standing)) == (["a", "b"], 2)


def test_a_leak_goes_after_the_grace_period(rounds: Rounds) -> None:
    leaked = assign(rounds.store, "n1", "web", "c1", (4, 6))
    kept = plug(rounds.store, "n1", "db", "c2", (4, 6))
    assert rounds().waiting["addresses"] == 2
    assert rounds(899).addresses == []
    assert sorted(rounds(1).addresses) == sorted(leaked)
    assert set(allocated(rounds.store)) == set(kept)
    assert set(handles(rounds.store)) == {attachment("db", "c2").handle}
    assert rounds(1000).addresses == []


def test_once_seen_is_not_enough(rounds: Rounds) -> None:
    assign(rounds.store, "n1", "web", "c1")
    rounds.clock.now += 5000
    assert rounds().addresses == []
    assert len(rounds(900).addresses) == 1


def test_use_in_between_begins_the_period_anew(rounds: Rounds) -> None:
    addresses = assign(rounds.store, "n1", "web", "c1")
    rounds()
    record(rounds.store, "n1", "web", "c1", addresses)
    rounds(600)
    forget(rounds.store, "n1", "web", "c1")
    assert rounds(600).addresses == []
    assert rounds(899).addresses == []
    assert rounds(1).addresses == addresses


def test_an_address_given_anew_is_another_allocation(rounds: Rounds) -> None:
    (address,) = assign(rounds.store, "n1", "web", "c1")
    rounds()
    release(rounds.store, "n1", "web", "c1")
    made = attachment("web", "c1")
    allocator = Allocator(rounds.store, "n1")
    allocator.assign_specific(address, made.handle, made.attributes("n1", "later"))
    assert rounds(900).addresses == []
    assert rounds(900).addresses == [address]


def test_all_addresses_of_a_handle_or_none(rounds: Rounds) -> None:
    four, six = assign(rounds.store, "n1", "web", "c1", (4, 6))
    # somebody else uses one of them, for whatever reason
    record(rounds.store, "n2", "other", "c9", [six])
    rounds()
    assert rounds(900).addresses == []
    assert {four, six} <= set(allocated(rounds.store))


@pytest.mark.parametrize("write", range(3))
@pytest.mark.parametrize("what", ["again", "endpoint"])
def test_overtaken_just_before_a_write(rounds: Rounds, write: int, what: str) -> None:
    """The pod comes back between proof and release: it keeps what it has then."""
    store = rounds.store
    assign(store, "n1", "web", "c1")

    def come_back() -> None:
        if what == "again":  # a CNI ADD that begins anew
            release(store, "n1", "web", "c1")
            plug(store, "n1", "web", "c1")
        else:  # its endpoint is of another pod's
            plug(store, "n2", "db", "c2")

    collector = Collector(overtaken_at(store, write, come_back), clock=rounds.clock)
    collector.run(read(store), PERIODS)
    rounds.clock.now += 900
    collector.run(read(store), PERIODS)
    live = [
        parse_net(net)
        for entry in store.list("WorkloadEndpoint").entries
        for net in entry.value["spec"]["ipNetworks"]
    ]
    assert set(live) <= set(allocated(store))


def test_the_pod_is_looked_at_once_more(rounds: Rounds) -> None:
    """The reading is old: the endpoint was recorded since."""
    addresses = assign(rounds.store, "n1", "web", "c1")
    rounds()
    rounds.clock.now += 900
    old = read(rounds.store)
    record(rounds.store, "n1", "web", "c1", addresses)
    assert rounds.collector.run(old, PERIODS).addresses == []
    assert set(addresses) == set(allocated(rounds.store))


def test_an_unreadable_endpoint_stops_the_collection_of_addresses(rounds: Rounds) -> None:
    assign(rounds.store, "n1", "web", "c1")
    rounds()
    put(rounds.store, "WorkloadEndpoint", "bad", {"ipNetworks": ["?"]}, namespace="shop")
    done = rounds(900)
    assert (done.addresses, len(done.problems)) == ([], 1)
    remove(rounds.store, "WorkloadEndpoint", "bad", "shop")
    assert len(rounds(900).addresses) == 1


def test_a_dying_collector_is_followed_by_another(rounds: Rounds) -> None:
    """Whichever write it dies at, the next one finishes."""
    for write in range(4):
        assign(rounds.store, "n1", "web", f"c{write}", (4, 6))
        collector = Collector(dies_after(rounds.store, write), clock=rounds.clock)
        collector.run(read(rounds.store), PERIODS)
        rounds.clock.now += 900
        with pytest.raises(Died):
            collector.run(read(rounds.store), PERIODS)
    again = Rounds(rounds.store)
    again()
    again(900)
    again(60)
    again(60)
    assert allocated(rounds.store) == {}
    assert handles(rounds.store) == {}


def test_it_stops_when_told_to(rounds: Rounds) -> None:
    assign(rounds.store, "n1", "web", "c1")
    leading = True
    collector = Collector(rounds.store, clock=rounds.clock, proceed=lambda: leading)
    collector.run(read(rounds.store), PERIODS)
    rounds.clock.now += 900
    leading = False
    with pytest.raises(HaltedError):
        collector.run(read(rounds.store), PERIODS)
    assert len(allocated(rounds.store)) == 1


# who counts as a user


def test_who_is_unknown_keeps_the_address(rounds: Rounds) -> None:
    allocator = Allocator(rounds.store, "n1")
    allocator.assign("somebody", {"node": "n1"})
    allocator.assign("lb-0123", {"service": "web"})
    rounds()
    assert rounds(5000).addresses == []


def test_a_pod_without_endpoint(rounds: Rounds) -> None:
    """As where pods are Kubernetes' and their endpoints views of them."""
    store = rounds.store
    (running,) = assign(store, "n1", "web", "c1")
    assign(store, "n1", "new", "c2")
    (done,) = assign(store, "n1", "job", "c3")
    (moved,) = assign(store, "n1", "moved", "c4")
    put(store, "Pod", "web", {"nodeName": "n1"}, namespace="shop")
    put(store, "Pod", "new", {"nodeName": "n1"}, namespace="shop")
    put(store, "Pod", "job", {"nodeName": "n1"}, namespace="shop")
    put(store, "Pod", "moved", {"nodeName": "n2"}, namespace="shop")
    for name, status in (
        ("web", {"podIPs": [{"ip": str(running).partition("/")[0]}]}),
        ("job", {"phase": "Succeeded", "podIP": str(done).partition("/")[0]}),
    ):
        entry = store.get(Key("Pod", name, "shop"))
        store.update(entry.key, entry.value | {"status": status})
    rounds()
    assert sorted(rounds(900).addresses) == sorted([done, moved])


def test_an_endpoint_of_the_container_whatever_it_says(rounds: Rounds) -> None:
    assign(rounds.store, "n1", "web", "c1")
    record(rounds.store, "n1", "web", "c1", [])
    rounds()
    assert rounds(5000).addresses == []


# nodes that are gone


def test_a_node_that_is_gone(rounds: Rounds) -> None:
    store = rounds.store
    leaked = assign(store, "n1", "web", "c1")
    tunnel = Allocator(store, "n1").assign(
        "vxlan-tunnel-addr-n1", {"node": "n1", "type": "vxlanTunnelAddress"}
    )
    plug(store, "n2", "db", "c2")
    rounds()
    remove(store, "Node", "n1")
    assert rounds(880).waiting["nodes"] == 1
    assert rounds(20).addresses == leaked  # of its own, and not yet because of the node
    assert set(affinities(store)) > {claim for claim in affinities(store) if claim.node == "n2"}
    assert rounds(880).addresses == [tunnel.address]
    assert {claim.node for claim in affinities(store)} == {"n2"}
    assert {block.affinity for block in blocks(store).values()} == {"host:n2"}


def test_addresses_that_another_main_plugin_has(rounds: Rounds) -> None:
    """Only the node knows of its containers: they stay as long as there is the node."""
    attributes = {"node": "n1", "type": "manx-ipam", "ipamAttachment": "net/c1/eth0"}
    address = Allocator(rounds.store, "n1").assign("net.c1", attributes).address
    rounds()
    assert rounds(5000).addresses == []
    remove(rounds.store, "Node", "n1")
    rounds()
    rounds(899)
    assert rounds(1).addresses == [address]


def test_a_node_that_comes_back(rounds: Rounds) -> None:
    plug(rounds.store, "n1", "web", "c1")
    remove(rounds.store, "Node", "n1")
    rounds()
    add_nodes(rounds.store, "n1")
    rounds(899)
    remove(rounds.store, "Node", "n1")
    rounds(1)
    before = affinities(rounds.store)
    rounds(899)
    assert affinities(rounds.store) == before


def test_a_node_that_is_gone_keeps_what_is_used(rounds: Rounds) -> None:
    addresses = plug(rounds.store, "n1", "web", "c1")
    remove(rounds.store, "Node", "n1")
    for _ in range(4):
        rounds(900)
    assert set(allocated(rounds.store)) == set(addresses)
    assert [claim.node for claim in affinities(rounds.store)] == ["n1"]


def test_no_node_at_all_is_not_believed(rounds: Rounds) -> None:
    Allocator(rounds.store, "n1").assign("vxlan-tunnel-addr-n1", {"node": "n1"})
    remove(rounds.store, "Node", "n1")
    remove(rounds.store, "Node", "n2")
    for _ in range(4):
        assert rounds(900).addresses == []
    assert [claim.node for claim in affinities(rounds.store)] == ["n1"]


def test_addresses_borrowed_from_a_gone_node_stay(rounds: Rounds) -> None:
    store = rounds.store
    plug(store, "n1", "mine", "c1")
    (block,) = blocks(store)
    made = attachment("borrower", "c2")
    borrowed = Net(4, block.address + 7, 32)
    Allocator(store, "n2").assign_specific(borrowed, made.handle, made.attributes("n2", "t"))
    record(store, "n2", "borrower", "c2", [borrowed])
    forget(store, "n1", "mine", "c1")
    remove(store, "Node", "n1")
    rounds()
    rounds(900)
    rounds(900)
    assert set(allocated(store)) == {borrowed}
    assert blocks(store)[block].affinity is None
    assert affinities(store) == []
    forget(store, "n2", "borrower", "c2")
    release(store, "n2", "borrower", "c2")
    rounds()
    rounds(60)
    assert blocks(store) == {}


# blocks, claims and handles


def claim(store: SqliteDatastore, node: str, *cidrs: str) -> None:
    for cidr in cidrs:
        assert claims.claim(Records(store), node, parse_net(cidr))


def test_empty_blocks_go_but_one_stays(rounds: Rounds) -> None:
    claim(rounds.store, "n1", "10.0.0.0/28", "10.0.0.16/28", "fd00::/124")
    claim(rounds.store, "n2", "10.0.0.32/28")
    rounds()
    assert rounds(59).blocks == []
    assert rounds(1).blocks == [parse_net("10.0.0.0/28")]
    assert rounds(60).blocks == []
    assert len(blocks(rounds.store)) == len(affinities(rounds.store)) == 3


def test_blocks_whose_addresses_have_rested_go(rounds: Rounds) -> None:
    claim(rounds.store, "n1", "10.0.0.0/28", "10.0.0.16/28")
    configure(rounds.store, ipCooldownSeconds=600)
    for address in ("10.0.0.1", "10.0.0.17"):
        Allocator(rounds.store, "n1").assign_specific(parse_net(address), "h", {})
    Allocator(rounds.store, "n1").release("h")
    rounds()
    assert rounds(60).blocks == []
    entry = rounds.store.get(Key("IPAMBlock", "10-0-0-0-28"))
    rested = [{"releasedAt": "2024-01-31T12:00:00Z"}]
    spec = entry.value["spec"] | {"attributes": rested}
    rounds.store.update(entry.key, entry.value | {"spec": spec})
    rounds()
    rounds(60)
    assert rounds(60).blocks == [parse_net("10.0.0.0/28")]


def test_a_load_balancers_block_is_left_alone(rounds: Rounds) -> None:
    net = parse_net("10.0.0.0/28")
    block = Block.new(net, "virtual:load-balancer", 1, None)
    put(rounds.store, "IPAMBlock", "10-0-0-0-28", block.to_spec())
    for _ in range(3):
        assert rounds(900).waiting["blocks"] == 0
    assert list(blocks(rounds.store)) == [net]


def test_a_node_that_can_not_be_read_is_there(rounds: Rounds) -> None:
    claim(rounds.store, "n1", "10.0.0.0/28")
    remove(rounds.store, "Node", "n1")
    put(rounds.store, "Node", "n1", {"ipv4VXLANTunnelAddr": "?"})
    for _ in range(3):
        rounds(900)
    assert [claim.node for claim in affinities(rounds.store)] == ["n1"]


def test_a_block_in_use_is_the_one_that_stays(rounds: Rounds) -> None:
    claim(rounds.store, "n1", "10.0.0.0/28", "10.0.0.16/28")
    made = attachment("web", "c1")
    address = parse_net("10.0.0.17")
    Allocator(rounds.store, "n1").assign_specific(address, made.handle, made.attributes("n1", "t"))
    record(rounds.store, "n1", "web", "c1", [address])
    rounds()
    rounds(60)
    assert list(blocks(rounds.store)) == [parse_net("10.0.0.16/28")]


def test_a_block_that_was_used_meanwhile_stays(rounds: Rounds) -> None:
    claim(rounds.store, "n1", "10.0.0.0/28", "10.0.0.16/28")
    rounds()
    for pod in ("a", "b"):
        plug(rounds.store, "n1", pod, f"c-{pod}")
        forget(rounds.store, "n1", pod, f"c-{pod}")
        release(rounds.store, "n1", pod, f"c-{pod}")
    assert len(rounds(60).blocks) == 1  # the other one
    assert len(blocks(rounds.store)) == 1


def test_blocks_of_a_pool_that_is_gone_go_all(rounds: Rounds) -> None:
    claim(rounds.store, "n1", "10.0.0.0/28")
    remove(rounds.store, "IPPool", "four")
    rounds()
    assert rounds(60).blocks == [parse_net("10.0.0.0/28")]
    assert affinities(rounds.store) == []


def test_half_made_claims_are_finished_or_taken_back(rounds: Rounds) -> None:
    store, records = rounds.store, Records(rounds.store)
    records.create_affinity("n1", parse_net("10.0.0.0/28"), PENDING)  # no block
    claim(store, "n1", "10.0.0.16/28")
    records.create_affinity("n2", parse_net("10.0.0.16/28"), CONFIRMED)  # another's
    plug(store, "n2", "web", "c1")
    (mine,) = [net for net, block in blocks(store).items() if block.affinity == "host:n2"]
    found = records.affinity("n2", mine)
    assert found
    records.delete_affinity(found)  # a block in use without claim
    rounds()
    rounds(60)
    states = {(each.node, str(each.net)): each.state for each in affinities(store)}
    assert states == {("n1", "10.0.0.16/28"): CONFIRMED, ("n2", str(mine)): CONFIRMED}
    assert {block.affinity for block in blocks(store).values()} == {"host:n1", "host:n2"}


def test_handles_without_addresses_go(rounds: Rounds) -> None:
    store = rounds.store
    plug(store, "n1", "web", "c1")
    with pytest.raises(Died):
        Allocator(dies_after(store, 1), "n1").assign("k8s-pod-network.c2", {"node": "n1"})
    assert len(handles(store)) == 2
    rounds()
    assert rounds(59).handles == []
    assert rounds(1).handles == ["k8s-pod-network.c2"]
    assert set(handles(store)) == set(allocated(store).values())


def test_addresses_without_handle_object_are_released(rounds: Rounds) -> None:
    (address,) = assign(rounds.store, "n1", "web", "c1")
    remove(rounds.store, "IPAMHandle", attachment("web", "c1").handle)
    rounds()
    assert rounds(900).addresses == [address]
