"""A daemon's work in a process that dies at a chosen step (``python -m tests.cni.mortal``).

Reads one job a line, forks, and lets the child do it: attach, detach or repair. The child
ends itself (no clean-up whatsoever) right before its n-th write to kernel or datastore. The
exit status goes to stdout, one line each: 0 for a job that was done.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

from cni.attachment import Attachment
from cni.features import Features
from cni.node import Node, Wanted
from cni.repair import repair
from datastore.connect import connect
from datastore.interface import JSON, Entry, Key
from datastore.sqlite import SqliteDatastore
from kernel.netlink import NetlinkSocket

DIED = 9

_steps = 0


def _step(last: int) -> None:
    global _steps
    _steps += 1
    if _steps == last:
        os._exit(DIED)


def _make_mortal(last: int) -> None:
    """End this process before its ``last``-th step."""

    class Mortal(SqliteDatastore):
        def create(self, key: Key, value: JSON) -> Entry:
            _step(last)
            return create(self, key, value)

        def update(self, key: Key, value: JSON, revision: str | None = None) -> Entry:
            _step(last)
            return update(self, key, value, revision)

        def delete(self, key: Key, revision: str | None = None) -> Entry:
            _step(last)
            return delete(self, key, revision)

    create, update, delete = (
        SqliteDatastore.create,
        SqliteDatastore.update,
        SqliteDatastore.delete,
    )
    transact = NetlinkSocket.transact

    def mortal_transact(self: NetlinkSocket, messages: Any) -> Any:
        _step(last)
        return transact(self, messages)

    for name in ("create", "update", "delete"):
        setattr(SqliteDatastore, name, getattr(Mortal, name))
    setattr(NetlinkSocket, "transact", mortal_transact)  # noqa: B010


def _do(url: str, node_name: str, job: dict[str, Any]) -> None:
    if job["die"]:
        _make_mortal(job["die"])
    node = Node(connect(url), node_name)
    node.start()
    if job["verb"] == "repair":
        repair(node)
        return
    attachment = Attachment(**job["attachment"])
    if job["verb"] == "detach":
        node.detach(attachment)
        return
    netns = os.open(job["netns"], os.O_RDONLY)
    node.attach(attachment, netns, Wanted(Features(families=((4, ()),))))


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
