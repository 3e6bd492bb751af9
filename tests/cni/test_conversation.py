"""Pods come, talk and go: the executable, the daemon, the kernel and the datastore together."""

from __future__ import annotations

from pathlib import Path

from tests.cni.rig import Rig


def test_two_pods_talk(rig: Rig, client: Path) -> None:
    rig.client = client
    one, two = rig.container(), rig.container()
    first, second = rig.add(one), rig.add(two)
    address = second["ips"][0]["address"].removesuffix("/32")
    assert one.pings(address), rig.log()
    rig.delete(one)
    rig.delete(two)
