"""What the kernel refuses does not hold up the rest, and is tried again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from felix.chains import Accept, Chain, ChainRule, Condition, Jump, Table
from felix.dataplane import Enforcer
from felix.desired import ChainKey, Delta, SetKey
from felix.iptables_dataplane import IptablesDataplane
from felix.nftables_dataplane import NftablesDataplane
from felix.settings import settings
from kernel.netns import Namespace, inside
from policy.model import Member
from tests.support.netns import fresh_namespace, run


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with fresh_namespace() as made, inside(made.fd):
        yield made


def no_members(key: SetKey) -> frozenset[Member]:
    raise AssertionError(key)


def chain(name: str, *rules: ChainRule) -> Delta:
    return Delta(chains={ChainKey(4, Table.FILTER, name): Chain(name, rules)})


_REFUSED = {
    "nftables": ChainRule(Jump("cali-missing")),
    "iptables": ChainRule(Accept(), Condition(in_interface="a-name-that-is-too-long")),
}


@pytest.mark.parametrize("kind", ["nftables", "iptables"])
def test_a_chain_that_is_refused_holds_up_no_other(namespace: Namespace, kind: str) -> None:
    enforcer: Enforcer = (
        NftablesDataplane(settings(), no_members)
        if kind == "nftables"
        else IptablesDataplane(settings(), no_members, "nft")
    )

    def listed() -> str:
        return run(namespace, "nft", "list", "ruleset").stdout

    try:
        enforcer.read()
        enforcer.want(chain("cali-broken", _REFUSED[kind]))
        enforcer.apply_chains(100.0)
        ((what, _),) = enforcer.problems()
        assert "cali-broken" in what
        assert "drop" in listed(), "as it is new, it drops"
        enforcer.want(chain("cali-fine", ChainRule(Accept())))
        enforcer.apply_chains(100.0)
        assert "cali-fine" in listed() and "accept" in listed()
        due = enforcer.next_retry()
        assert due is not None
        for turn in range(3):  # it stays as it is, however often it is tried
            enforcer.apply_chains(due + 100 * turn)
        assert len(list(enforcer.problems())) == 1
        if kind == "nftables":
            enforcer.want(chain("cali-missing"))  # what it was refused for is mended
        else:
            enforcer.want(chain("cali-broken", ChainRule(Jump("cali-fine"))))
        enforcer.apply_chains(due + 1000)
        enforcer.apply_chains(due + 2000)
        assert list(enforcer.problems()) == [] and enforcer.next_retry() is None
        assert "jump" in listed() and "drop" not in listed()
    finally:
        enforcer.close()
