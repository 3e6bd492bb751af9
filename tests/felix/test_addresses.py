"""The node's addresses: what the kernel told of them adds up to what is there."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from api.net import Net, parse_net
from felix import names
from felix.addresses import HostAddresses, host_addresses
from felix.calculate import Calculator
from felix.desired import Delta, SetKey
from felix.snapshot import Snapshot
from kernel.addresses import Address, AddressKey
from kernel.links import AddressEvent, LinkEvent, LinkEventsLost, LinkMonitor
from kernel.netns import inside
from policy.engine import SetDelta
from policy.model import SetKind
from tests.support.netns import eventually, fresh_namespace, run

INTERFACES = (names.IPVS_DEVICE, "one", "two")
ADDRESSES = (
    "192.0.2.1/32",
    "192.0.2.1/24",
    "192.0.2.1 peer 192.0.2.9/32",
    "fd00::1/128 nodad",
)


def lines(*parts: Sequence[str]) -> st.SearchStrategy[str]:
    return st.tuples(*map(st.sampled_from, parts)).map(" ".join)


COMMANDS = st.one_of(
    lines(["address add"], ADDRESSES, ["dev"], INTERFACES),
    lines(["address add"], ADDRESSES, ["dev"], INTERFACES),
    lines(["address del"], ADDRESSES, ["dev"], INTERFACES),
    lines(["link set"], INTERFACES, ["name"], INTERFACES),
    lines(["link set"], INTERFACES, ["up", "down"]),
    lines(["link"], ["add", "del"], INTERFACES, ["type veth"]),
)


def state(addresses: HostAddresses) -> Any:
    named = {name: set(own) for name, own in addresses.by_interface().items()}
    services = addresses.services
    return named, set(addresses), services and {v: set(own) for v, own in services.items()}


def take(addresses: HostAddresses, event: LinkEvent | AddressEvent) -> None:
    """And nothing moves of which it does not say so."""
    named, _, services = state(addresses)
    addresses.services_changed = False
    moved = addresses.take(event)
    now, _, translated = state(addresses)
    assert {name for name in {*named, *now} if named.get(name) != now.get(name)} <= moved
    assert addresses.services_changed or services == translated


@settings(max_examples=50, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(st.lists(COMMANDS, max_size=10), st.lists(COMMANDS, min_size=20, max_size=40))
def test_what_is_told_adds_up(before: list[str], after: list[str]) -> None:
    """An address may be on several interfaces, and be there in several ways on one."""
    events: queue.SimpleQueue[LinkEvent | LinkEventsLost | AddressEvent] = queue.SimpleQueue()
    made = [f"link add {name} type veth" for name in INTERFACES[:2]]
    with (
        fresh_namespace() as namespace,
        inside(namespace.fd),
        LinkMonitor(events.put, addresses=True),
    ):
        run(namespace, "ip", "-force", "-batch", "-", stdin="\n".join(made + before), check=False)
        addresses = host_addresses()  # and what led there is told only now
        run(namespace, "ip", "-force", "-batch", "-", stdin="\n".join(after), check=False)

        def is_known() -> bool:
            while not events.empty():
                event = events.get()
                assert not isinstance(event, LinkEventsLost)
                take(addresses, event)
            return bool(state(addresses) == state(host_addresses()))

        eventually(is_known)


def test_one_more_address_of_a_service_is_one_more_member() -> None:
    calculator = Calculator("node1")
    keys = [AddressKey(7, Net(4, number, 32), 32) for number in range(1, 1000)]
    calculator.set_host_addresses(HostAddresses({1: "lo", 7: names.IPVS_DEVICE}, keys))
    calculator.calculate(Snapshot())
    assert calculator.has_ipvs
    address = Address(7, parse_net("10.96.0.10"), 32)
    for deleted in (False, True):
        calculator.host_changed(AddressEvent(address, deleted))
        assert calculator.hosts_changed
        came, went = frozenset({address.host}), frozenset[Net]()
        if deleted:
            came, went = went, came
        change = SetDelta(SetKind.NET, came, went, False, False)
        key = SetKey(4, names.SERVICE_ADDRESSES)
        assert calculator.calculate(Snapshot()) == Delta(sets={key: change}, forwarding=(4,))
