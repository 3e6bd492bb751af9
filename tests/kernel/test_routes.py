"""Routes of both families: what is read equals what was written, others' stay."""

import errno
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.net import Net, format_address, parse_net
from kernel.links import delete_link
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace
from kernel.routes import PROTO_BGP, PROTO_FELIX, Hop, Route, RouteKey, Routes
from reconcile.plan import Plan, diff
from tests.support.netns import connect, fresh_namespace, run

Table = dict[RouteKey, Route]

# Neighbours of the two interfaces, per family: (interface, address)
GATEWAYS = {
    4: [(n % 2, int(parse_net(f"10.{n % 2}.0.{2 + n // 2}").address)) for n in range(8)],
    6: [(n % 2, int(parse_net(f"fd00:0:{n % 2}::{2 + n // 2}").address)) for n in range(8)],
}


class Net2:
    """A namespace with two uplinks."""

    def __init__(self, namespace: Namespace, socket: NetlinkSocket, devices: list[int]) -> None:
        self.namespace = namespace
        self.socket = socket
        self.devices = devices
        self.routes = Routes(socket)

    def hop(self, version: int, number: int, weight: int = 1) -> Hop:
        device, gateway = GATEWAYS[version][number]
        return Hop(self.devices[device], gateway, weight=weight)

    def read(self, protocol: int | None = PROTO_FELIX) -> Table:
        return self.routes.read(version=4, protocol=protocol) | self.routes.read(
            version=6, protocol=protocol
        )

    def become(self, *wanted: Route) -> None:
        table = {route.key: route for route in wanted}
        assert self.routes.apply(diff(table, self.read())) == {}
        assert self.read() == table


@pytest.fixture(scope="module")
def net() -> Iterator[Net2]:
    with fresh_namespace() as namespace, fresh_namespace() as other:
        devices = [
            connect(
                namespace,
                f"up{n}",
                other,
                f"up{n}",
                (f"10.{n}.0.1/24", f"10.{n}.0.2/24", f"fd00:0:{n}::1/64", f"fd00:0:{n}::2/64"),
            )[0].index
            for n in range(2)
        ]
        with NetlinkSocket(netns_fd=namespace.fd) as socket:
            yield Net2(namespace, socket, devices)


@pytest.fixture(autouse=True)
def clean(net: Net2) -> Iterator[None]:
    yield
    net.become()


def prefix(version: int, number: int, length: int) -> Net:
    bits = 32 if version == 4 else 128
    base = int(parse_net("172.16.0.0" if version == 4 else "fd77::").address)
    return Net(version, base + (number << (bits - length)), length)


def example_routes(net: Net2, version: int) -> list[Route]:
    host = 32 if version == 4 else 128
    one, two, three = (net.hop(version, number) for number in (0, 1, 2))
    source = parse_net("10.0.0.1" if version == 4 else "fd00::1").address
    over_v6 = [net.hop(6, number)._replace(via_v6=True) for number in (0, 1)]
    return [
        Route(prefix(version, 1, host), (Hop(net.devices[0]),)),
        Route(prefix(version, 2, host - 6), (one,)),
        Route(prefix(version, 3, host - 6), (one, two)),
        Route(prefix(version, 4, host - 6), (three, two, one._replace(weight=7))),
        Route(prefix(version, 5, host - 6), kind="blackhole"),
        Route(prefix(version, 6, host - 6), kind="unreachable"),
        Route(prefix(version, 7, host - 6), kind="prohibit", metric=77),
        Route(prefix(version, 7, host - 6), (one,), metric=78),
        Route(prefix(version, 8, host - 6), (one,), source=source),
        Route(prefix(version, 9, host - 6), (one._replace(onlink=True),)),
        Route(Net(version, 0, 0), (one,), metric=5),
        Route(prefix(version, 10, host - 6), (over_v6[0],)),
        Route(prefix(version, 11, host - 6), (over_v6[1], one)),
    ]


@pytest.mark.parametrize("version", [4, 6])
def test_what_is_written_is_what_is_read(net: Net2, version: int) -> None:
    net.become(*example_routes(net, version))


@pytest.mark.parametrize("version", [4, 6])
def test_every_route_can_become_every_other(net: Net2, version: int) -> None:
    """Replaced in place, whatever it was: one hop, many, none."""
    length = 26 if version == 4 else 122
    variants = [
        route._replace(net=prefix(version, 50, length), metric=0)
        for route in example_routes(net, version)
    ]
    for before in variants:
        for after in variants:
            net.become(before)
            net.become(after)


def test_an_ipv4_route_by_an_ipv6_gateway(net: Net2) -> None:
    gateway = parse_net("fd00:0:1::9")
    route = Route(prefix(4, 1, 26), (Hop(net.devices[1], gateway.address, via_v6=True),))
    net.become(route)
    shown = run(net.namespace, "ip", "-4", "route", "show", str(route.net)).stdout
    assert "via inet6 fd00:0:1::9 dev up1" in shown
    assert "via inet6 fd00:0:1::9" in str(route)


class Drawn(NamedTuple):
    """A route as Hypothesis draws it: hops are numbers of gateways."""

    version: int
    number: int
    hops: list[int]
    kind: str
    metric: int
    table: int

    def route(self, net: Net2) -> Route:
        hops = tuple(net.hop(self.version, number) for number in self.hops)
        return Route(
            prefix(self.version, self.number, 26 if self.version == 4 else 122),
            hops if self.kind == "unicast" else (),
            self.kind,
            metric=self.metric,
            table=self.table,
        )


TABLES = st.lists(
    st.builds(
        Drawn,
        st.sampled_from([4, 6]),
        st.integers(0, 5),
        st.lists(st.integers(0, 7), min_size=1, max_size=4, unique=True),
        st.sampled_from(["unicast", "blackhole", "unreachable", "prohibit", "throw"]),
        st.sampled_from([0, 1, 100, 1024]),
        st.sampled_from([254, 99, 1000]),
    ),
    max_size=12,
)


@given(TABLES, TABLES)
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_table_becomes_any_other(net: Net2, one: list[Drawn], other: list[Drawn]) -> None:
    def read() -> Table:
        found: Table = {}
        for version in (4, 6):
            for table in (254, 99, 1000):
                found |= net.routes.read(version=version, table=table, protocol=PROTO_FELIX)
        return found

    for drawn in (one, other, []):
        wanted = {route.key: route for route in (each.route(net) for each in drawn)}
        assert net.routes.apply(diff(wanted, read())) == {}
        assert read() == wanted


def test_one_bad_route_of_a_thousand_is_reported_and_the_others_stand(net: Net2) -> None:
    routes = [Route(prefix(4, n, 32), (Hop(net.devices[0]),)) for n in range(1000)]
    bad = routes[417]._replace(hops=(Hop(net.devices[0], parse_net("192.0.2.1").address),))
    routes[417] = bad
    wanted = {route.key: route for route in routes}
    errors = net.routes.apply(diff(wanted, {}))
    assert errors.keys() == {bad.key}
    assert errors[bad.key].errno == errno.ENETUNREACH
    assert str(errors[bad.key]).startswith(
        f"[Errno 101] {bad}: Network is unreachable: Nexthop has invalid gateway"
    )
    assert net.read() == {key: route for key, route in wanted.items() if key != bad.key}


@pytest.mark.parametrize("version", [4, 6])
def test_others_routes_are_never_touched(net: Net2, version: int) -> None:
    length = 26 if version == 4 else 122
    theirs = Route(prefix(version, 1, length), (net.hop(version, 0),), protocol=PROTO_BGP)
    assert net.routes.apply(Plan(create={theirs.key: theirs})) == {}
    ours = theirs._replace(protocol=PROTO_FELIX, hops=(net.hop(version, 1),))
    try:
        assert net.read() == {}
        # neither overwritten
        errors = net.routes.apply(diff({ours.key: ours}, {}))
        assert errors[ours.key].errno == errno.EEXIST
        # nor deleted under a wrong belief
        assert net.routes.apply(Plan(delete={ours.key: ours})) == {}
        assert net.read(PROTO_BGP) == {theirs.key: theirs}
        everything = net.read(None)
        assert theirs.key in everything
        assert len(everything) > 1
    finally:
        assert net.routes.apply(Plan(delete={theirs.key: theirs})) == {}
    assert net.read(PROTO_BGP) == {}


def test_what_is_gone_already_is_no_error_to_delete(net: Net2) -> None:
    routes = [route for version in (4, 6) for route in example_routes(net, version)]
    assert net.routes.apply(Plan(delete={route.key: route for route in routes})) == {}


@pytest.mark.parametrize("kind", ["blackhole", "unreachable", "prohibit", "throw"])
def test_packets_that_go_nowhere(net: Net2, kind: str) -> None:
    routes = [
        Route(prefix(version, 9, 32 if version == 4 else 128), kind=kind) for version in (4, 6)
    ]
    net.become(*routes)
    assert [net.routes.lookup(route.net) for route in routes] == [None, None]
    net.become()


def test_a_missing_table_is_empty(net: Net2) -> None:
    for version in (4, 6):
        assert net.routes.read(version=version, table=4242) == {}


def test_ip_route_understands_ours(net: Net2) -> None:
    pod = Route(parse_net("172.16.0.1"), (Hop(net.devices[0]),))
    ecmp = Route(parse_net("172.16.1.0/26"), (net.hop(4, 0), net.hop(4, 1)), protocol=PROTO_FELIX)
    net.become(pod, ecmp)
    shown = run(net.namespace, "ip", "route", "show", "proto", "80").stdout
    assert "172.16.0.1 dev up0 scope link" in shown
    assert "172.16.1.0/26 \n\tnexthop via 10.0.0.2 dev up0 weight 1" in shown


def test_we_understand_ip_routes(net: Net2) -> None:
    command = "ip route add 172.16.9.0/24 via 10.1.0.2 dev up1 onlink metric 3 proto 80 table 99"
    run(net.namespace, *command.split())
    (route,) = net.routes.read(version=4, table=99).values()
    gateway = parse_net("10.1.0.2").address
    assert route == Route(
        parse_net("172.16.9.0/24"), (Hop(net.devices[1], gateway, onlink=True),), metric=3, table=99
    )
    assert str(route) == (
        f"172.16.9.0/24 via 10.1.0.2 dev #{net.devices[1]} onlink proto 80 metric 3 table 99"
    )
    assert net.routes.apply(Plan(delete={route.key: route})) == {}
    assert net.routes.read(version=4, table=99) == {}


def test_traffic_follows_the_route(net: Net2) -> None:
    def device(destination: str) -> str:
        return run(net.namespace, "ip", "route", "get", destination).stdout.split(" dev ")[1][:3]

    key = parse_net("172.16.0.0/26")
    for number in (0, 1, 0):
        net.become(Route(key, (net.hop(4, number),)))
        assert device("172.16.0.5") == f"up{number}"
    net.become(Route(key, kind="blackhole"))
    refused = run(net.namespace, "ip", "route", "get", "172.16.0.5", check=False)
    assert "Invalid argument" in refused.stderr


def test_routes_through_a_deleted_link_are_gone(namespace: Namespace) -> None:
    with fresh_namespace() as other, NetlinkSocket(netns_fd=namespace.fd) as socket:
        index = connect(namespace, "cali1", other, "eth0")[0].index
        route = Route(parse_net("172.16.0.1"), (Hop(index),))
        routes = Routes(socket)
        assert routes.apply(diff({route.key: route}, {})) == {}
        assert socket.batch([delete_link(index)]) == []
        assert routes.read(version=4, protocol=PROTO_FELIX) == {}
        errors = routes.apply(diff({route.key: route}, {}))
        assert errors[route.key].errno == errno.ENODEV
        assert format_address(4, route.net.address) in str(errors[route.key])
