"""A daemon's work in a process that dies at a chosen step (``python -m tests.cni.mortal``).

Reads one job a line, forks, and lets the child do it: attach, detach or repair. The child
ends itself (no clean-up whatsoever) right before its n-th write to kernel or datastore, or run of
another IPAM plugin. The exit status goes to stdout, one line each: 0 for a job that was done.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from api.net import parse_net
from cni.attaching import Job, Outcome, Wanted
from cni.attachment import Attachment
from cni.delegate import Delegate
from cni.features import Features
from cni.node import Node
from cni.repair import repair
from datastore.connect import connect
from kernel.netlink import NetlinkSocket

DIED = 9

_steps = 0


def _step(last: int) -> None:
    global _steps
    _steps += 1
    if _steps == last:
        os._exit(DIED)


def _make_mortal(store: type, last: int) -> None:
    """End this process before its ``last``-th step."""
    writes = ("create", "create_all", "update", "update_with", "delete")
    steps = [(store, name) for name in writes if hasattr(store, name)]
    for of, name in (*steps, (NetlinkSocket, "transact"), (Delegate, "_run")):
        setattr(of, name, _mortal(getattr(of, name), last))


def _mortal(step: Callable[..., Any], last: int) -> Callable[..., Any]:
    def mortal(*arguments: Any, **keywords: Any) -> Any:
        _step(last)
        return step(*arguments, **keywords)

    return mortal


def _do(url: str, node_name: str, job: dict[str, Any]) -> None:
    store = connect(url)
    if job["die"]:
        _make_mortal(type(store), job["die"])
    node = Node(store, node_name, follow=not url.startswith("sqlite:"))
    node.start()
    if job["verb"] == "repair":
        repair(node)
        return
    attachment = Attachment(**job["attachment"])
    node.cluster.require_unlocked()
    wants = job["wants"]
    delegate = _delegate(attachment, wants["data"]) if "data" in wants else None
    if job["verb"] == "detach":
        node.detach(attachment, delegate=delegate)
        return
    netns = os.open(job["netns"], os.O_RDONLY)
    if job["others"]:
        containers = [(attachment, netns), *map(_other, job["others"])]
        _attach_all(node, containers, new=bool(job["die"]))
        return
    features = Features(
        families=tuple((version, ()) for version in wants.get("families", (4,))),
        addresses=tuple(parse_net(text) for text in wants.get("addresses", ())),
    )
    node.attach(attachment, netns, Wanted(features, delegate=delegate))


def _other(other: dict[str, Any]) -> tuple[Attachment, int]:
    return Attachment(**other["attachment"]), os.open(other["netns"], os.O_RDONLY)


def _attach_all(node: Node, containers: list[tuple[Attachment, int]], *, new: bool) -> None:
    """One group; what can't be done together, as where they are not new, follows, each alone."""
    features = Features(families=((4, ()),))
    outcomes: list[Outcome] = [None] * len(containers)

    def note(place: int) -> Callable[[Outcome], None]:
        return lambda outcome: outcomes.__setitem__(place, outcome)

    jobs = [
        Job(attachment, netns, Wanted(features), note(place))
        for place, (attachment, netns) in enumerate(containers)
    ]
    node.attach_all(jobs)
    assert not new or None not in outcomes
    for job, outcome in zip(jobs, outcomes, strict=True):
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is None:
            node.attach(job.attachment, job.netns_fd, job.wanted)


def _delegate(attachment: Attachment, data: str) -> Delegate:
    """host-local, which keeps its leases in a directory."""
    ipam = {"type": "host-local", "ranges": [[{"subnet": "10.99.0.0/24"}]], "dataDir": data}
    configuration = {"cniVersion": "1.0.0", "name": attachment.network, "type": "manx"}
    variables = {
        "CNI_CONTAINERID": attachment.container_id,
        "CNI_IFNAME": attachment.ifname,
        "CNI_NETNS": "/somewhere",
        "CNI_PATH": "/usr/lib/cni",
    }
    stdin = json.dumps(configuration | {"ipam": ipam}).encode()
    return Delegate("host-local", variables, stdin, tuple)


def main(url: str, node_name: str) -> None:
    """Do the jobs on stdin."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                _do(url, node_name, json.loads(line))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
