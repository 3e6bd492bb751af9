"""The table that keeps ended what policy ended, whatever becomes of it meanwhile."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from api.net import V4, V6, parse_net
from felix.conntrack_ended import TABLE, Ended
from kernel.conntrack import Flow, Tuple
from kernel.netns import Namespace, inside
from kernel.nftables import Nftables, NftablesError, Transaction
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


def review(ended: Ended, is_forbidden: Callable[[Tuple], bool]) -> None:
    """Ask about all that are kept ended, and let go on what isn't forbidden."""
    ended.release([began for began in ended.held() if not is_forbidden(began)])


def test_it_is_there_while_it_is_needed(namespace: Namespace, ended: Ended, version: int) -> None:
    review(ended, lambda began: True)
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

    review(ended, is_forbidden)
    assert sorted(asked) == sorted(each.original for each in own)
    assert elements(namespace, version) == 2
    review(ended, lambda began: False)
    assert listed(namespace, version) == ""


def test_another_agent_finds_it(namespace: Namespace, ended: Ended, version: int) -> None:
    ended.add([flow(version, 1000)])
    ended.close()
    with inside(namespace.fd), closing(Ended(version)) as other:
        other.add([flow(version, 1001)])
        assert elements(namespace, version) == 2
        assert listed(namespace, version).count("drop") == 4, "no rule twice"
        run(namespace, "nft", "delete", "table", FAMILIES[version], TABLE)
        assert len(other.restore()) == 2, "it remembers what it found"
        assert elements(namespace, version) == 2
        review(other, lambda began: False)
    assert listed(namespace, version) == ""


Stranger = Callable[[Namespace, str], None]


def flush_ruleset(namespace: Namespace, family: str) -> None:
    run(namespace, "nft", "flush", "ruleset")


def delete_table(namespace: Namespace, family: str) -> None:
    run(namespace, "nft", "delete", "table", family, TABLE)


def flush_set(namespace: Namespace, family: str) -> None:
    run(namespace, "nft", "flush", "set", family, TABLE, "tcp-connections")


def flush_chain(namespace: Namespace, family: str) -> None:
    run(namespace, "nft", "flush", "chain", family, TABLE, "prerouting")


def add_a_rule(namespace: Namespace, family: str) -> None:
    run(namespace, "nft", "insert", "rule", family, TABLE, "output", "accept")


def put_to_sleep(namespace: Namespace, family: str) -> None:
    run(namespace, "nft", "add", "table", family, TABLE, "{ flags dormant; }")


@pytest.mark.parametrize(
    "stranger", [flush_ruleset, delete_table, flush_set, flush_chain, add_a_rule, put_to_sleep]
)
def test_what_somebody_else_takes_away_is_put_back(
    namespace: Namespace, ended: Ended, version: int, stranger: Stranger
) -> None:
    own = [flow(version, 1000), flow(version, 1001), flow(version, 1002, 17)]
    assert ended.restore() == []
    ended.add(own)
    before = without_expiry(namespace, version)
    assert ended.restore() == []
    for mend in (
        lambda: ended.restore() != [],
        lambda: review(ended, lambda began: True),
        lambda: ended.add(own[:1]),
    ):
        stranger(namespace, FAMILIES[version])
        mend()
        ended.restore()
        assert without_expiry(namespace, version) == before
    stranger(namespace, FAMILIES[version])
    begun = ended.restore()
    assert {(own.src, own.src_port, own.dst_port) for own in begun} == {
        (each.original.dst, 80, each.original.src_port) for each in own
    }
    assert ended.restore() == []
    stranger(namespace, FAMILIES[version])
    ended.release(ended.held())
    assert listed(namespace, version) == "" and ended.restore() == []


def without_expiry(namespace: Namespace, version: int) -> list[str]:
    """The table's lines, and words of its elements, in any order."""
    text = re.sub(r" expires \w+|counter packets \d+ bytes \d+", "", listed(namespace, version))
    return sorted(re.split(r"[\n,{}]\s*", text))


def test_what_goes_while_it_is_asked_about(
    namespace: Namespace, ended: Ended, version: int
) -> None:
    ended.add([flow(version, 1000), flow(version, 1001)])

    def is_forbidden(began: Tuple) -> bool:
        run(namespace, "nft", "flush", "set", FAMILIES[version], TABLE, "tcp-connections")
        return began.src_port != 1000

    review(ended, is_forbidden)
    assert elements(namespace, version) == 1


def test_more_than_fit_are_refused(namespace: Namespace, ended: Ended, version: int) -> None:
    ended.add([flow(version, 1000)])
    with pytest.raises(NftablesError, match="calico-ended"):
        ended.add([flow(version, port) for port in range(2000, 12000)])
    assert elements(namespace, version) == 1


def test_nothing_is_tried_that_the_kernel_would_refuse(
    ended: Ended, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it refuses it takes ten milliseconds and more to undo."""
    refused: list[Exception] = []
    commit = Nftables.commit

    def watched(nftables: Nftables, transaction: Transaction) -> None:
        try:
            commit(nftables, transaction)
        except NftablesError as error:
            refused.append(error)
            raise

    monkeypatch.setattr(Nftables, "commit", watched)
    for _ in range(2):
        ended.add([flow(version, 1000), flow(version, 1001, 17)])
        ended.add([flow(version, 1002)])
        ended.release(ended.held()[:1])
        ended.release(ended.held())
    assert refused == []


def test_the_table_goes_when_all_have_gone_by_themselves(
    namespace: Namespace, ended: Ended, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended.add([flow(version, 1000)])
    ended.release([])
    assert elements(namespace, version) == 1
    flush_set(namespace, FAMILIES[version])
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now + 25 * 3600)
    ended.release([])
    assert listed(namespace, version) == ""
