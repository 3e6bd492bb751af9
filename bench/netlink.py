"""Routes into the kernel: our batches beside pyroute2, route by route, in one namespace.

Keys: ``routes``, ``batch_ms``, ``pyroute2_ms`` (medians), ``ratio`` (batch to pyroute2, pair by
pair, median).
"""

from __future__ import annotations

import statistics
import time

from pyroute2 import IPRoute

from api.net import Net, parse_net
from kernel.links import Links, link_up, veth
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace, call_inside
from kernel.routes import PROTO_FELIX, Hop, Route, Routes
from reconcile.plan import Plan

COUNT = 1000
ROUNDS = 5


def run() -> dict[str, object]:
    """Both sides in turn; what a round made is deleted before the next."""
    with Namespace.create() as namespace:
        return call_inside(namespace.fd, _run)


def _run() -> dict[str, object]:
    base = parse_net("10.0.0.0")
    nets = [Net(4, base.address + i, 32) for i in range(COUNT)]
    batch: list[float] = []
    single: list[float] = []
    with NetlinkSocket() as socket, IPRoute() as pyroute:
        socket.batch([veth("veth0", "veth1")])
        index = Links(socket).read()["veth0"].index
        socket.batch([link_up(index)])
        routes = Routes(socket)
        wanted = {route.key: route for route in (Route(net, (Hop(index),)) for net in nets)}
        texts = [str(net) for net in nets]
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            failed = routes.apply(Plan(create=wanted))
            batch.append(1000 * (time.perf_counter() - begin))
            if failed:
                raise next(iter(failed.values()))
            _clear(routes)
            begin = time.perf_counter()
            for text in texts:
                pyroute.route("add", dst=text, oif=index, proto=PROTO_FELIX)
            single.append(1000 * (time.perf_counter() - begin))
            _clear(routes)
    return {
        "routes": COUNT,
        "batch_ms": round(statistics.median(batch), 2),
        "pyroute2_ms": round(statistics.median(single), 2),
        "ratio": round(statistics.median(b / s for b, s in zip(batch, single, strict=True)), 4),
    }


def _clear(routes: Routes) -> None:
    found = routes.read(version=4, protocol=PROTO_FELIX)
    if len(found) != COUNT:
        raise RuntimeError(f"{len(found)} routes are in the kernel, {COUNT} were written")
    routes.apply(Plan(delete=found))
