"""The table that keeps ended what policy ended, whatever becomes of it meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from api.net import V4, V6, parse_net
from felix.conntrack_ended import Ended
from kernel.conntrack import Flow, Tuple
from kernel.netns import Namespace, inside
from kernel.nftables import NftablesError
from tests.support.netns import run

ENDS = {V4: ("10.0.0.1", "10.0.0.2"), V6: ("fd10::1", "fd10::2")}
FAMILIES = {V4: "ip", V6: "ip6"}


@pytest.fixture(params=ENDS)
def version(request: pytest.FixtureRequest) -> int:
    value: int = request.param
    return value


@pytest.fixture
def ended(namespace: Namespace, version: int) -> Iterator[Ended]:
    with inside(namespace.fd):
        made = Ended(version)
    with closing(made):
        yield made


def flow(version: int, port: int, protocol: int = 6, *, seen_as: str = "") -> Flow:
    client, server = map(parse_net, ENDS[version])
    began = Tuple(client, server, protocol, port, 80)
    answered = Tuple(server, parse_net(seen_as) if seen_as else client, protocol, 80, port)
    return Flow(began, answered, 0, 0, 0, 0, None, b"")


def listed(namespace: Namespace, version: int) -> str:
    table = FAMILIES[version], "calico-ended"
    return run(namespace, "nft", "list", "table", *table, check=False).stdout


def elements(namespace: Namespace, version: int) -> int:
    return listed(namespace, version).count(f"{ENDS[version][1]} . 80 . {ENDS[version][0]} . ")


def test_it_is_there_while_it_is_needed(namespace: Namespace, ended: Ended, version: int) -> None:
    ended.review(lambda began: True)
    assert listed(namespace, version) == ""
    own = [flow(version, 1000), flow(version, 1001), flow(version, 1002, 17)]
    ended.add([*own, flow(version, 1003, 1), flow(version, 1004, seen_as=ENDS[version][1])])
    assert elements(namespace, version) == 3
    ended.add(own)
    assert elements(namespace, version) == 3
    asked: list[Tuple] = []

    def is_forbidden(began: Tuple) -> bool:
        asked.append(began)
        return began.src_port != 1000

    ended.review(is_forbidden)
    assert sorted(asked) == sorted(each.original for each in own)
    assert elements(namespace, version) == 2
    ended.review(lambda began: False)
    assert listed(namespace, version) == ""


def test_another_agent_finds_it(namespace: Namespace, ended: Ended, version: int) -> None:
    ended.add([flow(version, 1000)])
    with inside(namespace.fd), closing(Ended(version)) as other:
        other.add([flow(version, 1001)])
        assert elements(namespace, version) == 2
        assert listed(namespace, version).count("drop") == 4, "no rule twice"
        other.review(lambda began: False)
    assert listed(namespace, version) == ""
    ended.review(lambda began: True)
    ended.add([flow(version, 1002)])
    assert elements(namespace, version) == 1


def test_somebody_else_removes_it(namespace: Namespace, ended: Ended, version: int) -> None:
    for _ in range(2):
        ended.add([flow(version, 1000)])
        run(namespace, "nft", "delete", "table", FAMILIES[version], "calico-ended")
    ended.review(lambda began: True)
    ended.add([flow(version, 1000)])
    run(namespace, "nft", "flush", "set", FAMILIES[version], "calico-ended", "tcp-connections")
    ended.review(lambda began: True)
    assert listed(namespace, version) == "", "nothing is in it"


def test_what_goes_while_it_is_asked_about(
    namespace: Namespace, ended: Ended, version: int
) -> None:
    ended.add([flow(version, 1000), flow(version, 1001)])
    name = (FAMILIES[version], "calico-ended", "tcp-connections")

    def is_forbidden(began: Tuple) -> bool:
        run(namespace, "nft", "flush", "set", *name, check=False)
        return began.src_port != 1000

    ended.review(is_forbidden)
    assert listed(namespace, version) == ""


def test_more_than_fit_are_refused(namespace: Namespace, ended: Ended, version: int) -> None:
    ended.add([flow(version, 1000)])
    with pytest.raises(NftablesError, match="calico-ended"):
        ended.add([flow(version, port) for port in range(2000, 12000)])
    assert elements(namespace, version) == 1
