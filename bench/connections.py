"""What it costs to end connections that policy forbids, and to hear of strangers' changes.

Keys: ``flows`` tracked, of ``pods``; ``judge_us_per_flow``, CPU to hold all of them against policy,
as at a start; ``change_ms``, CPU to do so after a change that concerns one pod, and ``gone_ms``, to
remove the flows of an address that is gone. ``monitor_us_per_commit``: CPU of felix for a
transaction of 50 elements in somebody else's table; ``commit_ratio``: how long that transaction
takes when it is told of, beside one that isn't (pair by pair, median). ``repair_p50_ms``: from the
moment a stranger deleted felix' table until it is there again.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress

from datastore.interface import JSON, Key
from felix.addresses import host_addresses
from felix.calculate import Calculator
from felix.conntrack import Connections
from felix.drift import WATCHED
from felix.nftables_dataplane import TABLE
from felix.snapshot import Snapshot
from kernel import nft_expressions as nft
from kernel import sysctl
from kernel.links import link_up
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace, call_inside
from kernel.nft_monitor import TableMonitor
from kernel.nft_sets import ADDRESS4, NftSet
from kernel.nftables import BaseChain, Nftables, NftRule, Transaction
from tests.felix.world import V3, cluster, global_policy
from tests.support.netns import eventually

FLOWS = 100_000
PODS = 100
POLICIES = 20
COMMITS = 200  # of each side, a round
ROUNDS = 5
ELEMENTS = 50
REPAIRS = 8

PEER = "11.0.0.1"


def run() -> dict[str, float]:
    """The parts one after the other, each in a namespace of its own."""
    figures: dict[str, float] = {"flows": FLOWS, "pods": PODS}
    for part in (_connections, _others_commits):
        with Namespace.create() as namespace:
            figures |= call_inside(namespace.fd, part)
    return figures | _repairs()


# --- connections ---


def _connections() -> dict[str, float]:
    snapshot, calculator = Snapshot(), Calculator("bench")
    snapshot.update(Key("Namespace", "default"), {"metadata": {"name": "default"}})
    for number in range(PODS):
        endpoint = _endpoint(number)
        key = Key("WorkloadEndpoint", endpoint["metadata"]["name"], "default")
        snapshot.update(key, endpoint)
    for number in range(POLICIES):
        rule: JSON = {"action": "Allow", "protocol": "TCP", "destination": {"ports": [number + 1]}}
        rules = [rule] if number < POLICIES - 1 else [{"action": "Allow"}]
        policy = global_policy(
            f"p{number}", selector="all()", order=number, types=["Ingress"], ingress=rules
        )
        snapshot.update(Key("GlobalNetworkPolicy", f"p{number}"), policy)
    calculator.set_host_addresses(host_addresses())
    calculator.calculate(snapshot)
    _make_flows()
    woken = threading.Event()
    with closing(Connections(calculator, woken.set)) as connections:
        everything = _cpu(lambda: _review(connections, woken))
        changed = Key("WorkloadEndpoint", _endpoint(7)["metadata"]["name"], "default")
        only = {"action": "Allow", "protocol": "UDP"}
        policy = global_policy(
            "one", selector="pod == 'p7'", order=0, types=["Ingress"], ingress=[only]
        )
        snapshot.update(Key("GlobalNetworkPolicy", "one"), policy)
        connections.note(calculator.calculate(snapshot))
        change = _cpu(lambda: _review(connections, woken))
        snapshot.update(changed, None)
        connections.note(calculator.calculate(snapshot))
        gone = _cpu(lambda: _review(connections, woken))
    return {
        "judge_us_per_flow": round(1e6 * everything / FLOWS, 1),
        "change_ms": round(1e3 * change, 1),
        "gone_ms": round(1e3 * gone, 1),
    }


def _endpoint(number: int) -> JSON:
    return {
        "apiVersion": V3,
        "kind": "WorkloadEndpoint",
        "metadata": {
            "name": f"bench-k8s-p{number}-eth0",
            "namespace": "default",
            "labels": {"pod": f"p{number}"},
        },
        "spec": {
            "orchestrator": "k8s",
            "node": "bench",
            "pod": f"p{number}",
            "endpoint": "eth0",
            "interfaceName": f"cali{number:011}",
            "ipNetworks": [_address(number) + "/32"],
            "profiles": ["kns.default"],
        },
    }


def _address(number: int) -> str:
    return f"10.0.0.{number + 1}"


def _make_flows() -> None:
    """Packets to the pods' addresses, which the loopback takes, from a peer, all tracked."""
    with NetlinkSocket() as netlink:
        netlink.batch([link_up(1)])
    for net in ("10.0.0.0/24", "11.0.0.0/24"):
        subprocess.run(["ip", "route", "add", "local", net, "dev", "lo"], check=True)
    with Nftables(4, "track") as table:
        transaction = table.transaction()
        transaction.create_table()
        transaction.create_chain("output", BaseChain("filter", "output", 0))
        transaction.append_rules("output", [NftRule(nft.load_conntrack_state())])
        table.commit(transaction)
    sysctl.write(("net", "netfilter", "nf_conntrack_udp_timeout"), "3600")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind((PEER, 0))
        for number in range(FLOWS):
            with suppress(ConnectionRefusedError):
                sender.sendto(b"", (_address(number % PODS), 1 + number // PODS))


def _review(connections: Connections, woken: threading.Event) -> None:
    while connections.reviewing:
        due = connections.next_due()
        woken.wait(None if due is None else max(0.0, due - time.monotonic()))
        woken.clear()
        connections.forget()
        connections.review(time.monotonic(), in_force=True)


def _cpu(act: Callable[[], None]) -> float:
    begin = time.process_time()
    act()
    return time.process_time() - begin


# --- strangers ---


def _others_commits() -> dict[str, float]:
    with Nftables(4, "other") as other:
        transaction = other.transaction()
        transaction.create_table()
        transaction.create_set(NftSet("members", (ADDRESS4,)))
        other.commit(transaction)
        ratios, cpu = [], []
        for turn in range(ROUNDS):
            alone, own_cpu = _commits(other, 3 * turn)
            # Not heard in this process, where the two sides would wait for each other.
            monitor = TableMonitor(WATCHED, (), _unexpected)
            told, _ = _commits(other, 3 * turn + 1)
            monitor.stop()
            with TableMonitor(WATCHED, (), _unexpected):
                _, heard_cpu = _commits(other, 3 * turn + 2)
            ratios.append(told / alone)
            cpu.append(heard_cpu - own_cpu)
    return {
        "monitor_us_per_commit": round(1e6 * statistics.median(cpu) / COMMITS, 1),
        "commit_ratio": round(statistics.median(ratios), 2),
    }


def _unexpected(_: object) -> None:
    raise AssertionError("nobody changed our table")


def _commits(other: Nftables, turn: int) -> tuple[float, float]:
    """Seconds that the transactions take, and of CPU in all other threads meanwhile."""
    transactions: list[Transaction] = []
    for number in range(COMMITS):
        transaction = other.transaction()
        first = (turn * COMMITS + number) * ELEMENTS + 1
        keys = (each.to_bytes(4, "big") for each in range(first, first + ELEMENTS))
        transaction.add_keys("members", keys)
        transactions.append(transaction)
    cpu, own = time.process_time(), time.thread_time()
    begin = time.perf_counter()
    for transaction in transactions:
        other.commit(transaction)
    elapsed = time.perf_counter() - begin
    time.sleep(0.05)  # what was told is heard
    return elapsed, (time.process_time() - cpu) - (time.thread_time() - own)


def _repairs() -> dict[str, float]:
    with cluster("bench", addresses=("198.51.100.1/24",)) as (node,):
        pod = node.pod("pod", "10.0.0.1")
        try:
            node.start()
            node.settle()
            with Nftables(4, TABLE, netns_fd=node.netns.fd) as stranger:
                seconds = [_repair(stranger) for _ in range(REPAIRS)]
        finally:
            pod.netns.close()
    return {"repair_p50_ms": round(1e3 * statistics.median(seconds), 1)}


def _repair(stranger: Nftables) -> float:
    time.sleep(1.2)  # the agent's pause after a repair
    transaction = stranger.transaction()
    transaction.delete_table()
    stranger.commit(transaction)
    begin = time.perf_counter()
    eventually(stranger.exists)
    return time.perf_counter() - begin
