"""Attachments that are made together, in a process of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cni.attaching import Attached, Job, Outcome, Wanted
from cni.attachment import Attachment
from cni.features import Features
from cni.node import Node
from cni.turns import Turns
from datastore.connect import connect
from datastore.interface import Key, StoreError
from kernel.netns import Namespace, inside
from tests.cni.rig import NETWORK, NODE
from tests.support.etcd import single_node
from tests.support.netns import eventually, run


class Bed:
    """A node in a namespace of its own, whose daemon this process is."""

    def __init__(
        self, directory: Path, namespace: Namespace, stack: ExitStack, url: str = ""
    ) -> None:
        self.turns = Turns(1, alone=True)
        self.database = directory / "datastore.db"
        self._namespace = namespace
        self._stack = stack
        self.store = store = connect(url or f"sqlite://{self.database}")
        stack.callback(store.close)
        for name, cidr in (("pods", "10.65.0.0/24"), ("six", "fd00:65::/64")):
            metadata = {"name": name}
            store.create(Key("IPPool", name), {"metadata": metadata, "spec": {"cidr": cidr}})
        with inside(namespace.fd):
            self.node = Node(store, NODE, turns=self.turns, follow=bool(url))
            self.node.start()
        stack.callback(self.node.stop)

    def container(self) -> Namespace:
        return self._stack.enter_context(Namespace.create())

    def job(
        self,
        container: Namespace,
        then: Callable[[Outcome], object],
        versions: tuple[int, ...] = (4,),
        pod: str = "",
    ) -> Job:
        space = "default" if pod else ""
        attachment = Attachment(NETWORK, f"container-{container.fd}", "eth0", space, pod)
        features = Features(families=tuple((version, ()) for version in versions))
        return Job(attachment, container.fd, Wanted(features), then)

    def attach(self, *jobs: Job) -> None:
        self.turns.take()
        self.turns.compute()
        with inside(self._namespace.fd):
            found = self.node.cluster.look([job.attachment for job in jobs])
            for job in jobs:
                self.node.cluster.pod(job.attachment, found)
                self.node.cluster.namespace(job.attachment, found)
            self.node.attach_all(jobs)


@pytest.fixture
def bed(namespace: Namespace, tmp_path: Path) -> Iterator[Bed]:
    with ExitStack() as stack:
        yield Bed(tmp_path, namespace, stack)


def test_what_is_asked_of_etcd(namespace: Namespace, tmp_path: Path) -> None:
    """What is to be known of the pod; handle and block; the endpoint."""
    with ExitStack() as stack:
        etcd = stack.enter_context(single_node())
        bed = Bed(tmp_path, namespace, stack, f"etcd://{etcd.endpoints[0]}")
        eventually(lambda: bed.node.allocator.following)
        [member] = etcd.members
        outcomes: list[Outcome] = []

        def attach(pod: str) -> int:
            job = bed.job(bed.container(), outcomes.append, pod=pod)
            before = member.asked()
            bed.attach(job)
            return member.asked() - before

        bed.store.create(Key("Pod", "a", "default"), {"metadata": {"name": "a"}})
        # the first ones claim a block, and hear that it was claimed
        eventually(lambda: attach(f"first-{len(outcomes)}") == 3)
        assert attach("a") == 3
        assert {type(each) for each in outcomes} == {Attached}
        entries = bed.store.list("WorkloadEndpoint").entries
        assert len(entries) == len(outcomes)
        assert "a" in {entry.value["spec"]["pod"] for entry in entries}


def test_where_there_is_nothing_to_wire(bed: Bed, caplog: pytest.LogCaptureFixture) -> None:
    """A container that is complete: the node's socket stays open, and no fault is hidden."""
    outcomes: list[Outcome] = []
    job = bed.job(bed.container(), outcomes.append)
    bed.attach(job)
    with bed.node.sockets.borrow() as host:
        port = host.port
    bed.attach(job)
    assert [isinstance(each, Attached) and each.fresh for each in outcomes] == [True, False]
    with bed.node.sockets.borrow() as host:
        assert host.port == port
    assert not caplog.records


def test_one_that_must_be_waited_for_holds_up_nobody(bed: Bed) -> None:
    """Others are answered before, and somebody else has the turn meanwhile."""
    slow, quick = bed.container(), bed.container()
    outcomes: list[Outcome] = []
    bed.attach(bed.job(bed.container(), outcomes.append, versions=(4, 6)))  # claims blocks
    # The kernel knows no address to be the container's own. (Without other rules it asks none.)
    run(slow, "ip", "-6", "rule", "add", "pref", "9", "table", "main")
    run(slow, "ip", "-6", "rule", "del", "pref", "0")

    def answer(outcome: Outcome) -> None:
        outcomes.append(outcome)
        run(slow, "ip", "-6", "rule", "add", "pref", "0", "table", "local")

    bed.attach(bed.job(slow, outcomes.append, versions=(6,)), bed.job(quick, answer))
    assert [type(each) for each in outcomes] == [Attached] * 3
    assert not bed.turns.held


def test_a_datastore_that_cannot_be_read(bed: Bed) -> None:
    """From the beginning, so that not even the names of the nodes' ends are known."""
    outcomes: list[Outcome] = []
    bed.database.unlink()
    bed.node.attach_all([bed.job(bed.container(), outcomes.append) for _ in range(2)])
    assert [isinstance(each, StoreError) for each in outcomes] == [True, True]
