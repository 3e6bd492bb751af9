"""This node in the datastore: its Node object, and the tunnel address it holds in IPAM.

A thread of its own, so that a slow datastore does not delay the kernel's side. What it writes
comes back through the watch like everything else.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from api.errors import InvalidObjectError
from api.net import V4, Net, format_address, parse_interface, parse_net
from datastore.interface import (
    AlreadyExistsError,
    ConflictError,
    Datastore,
    Key,
    StoreError,
)
from felix.desired import Registration
from felix.overlay import tunnel_mac
from ipam.allocator import AddressInUseError, AddressUnusableError, Allocator, IpamError
from kernel.addresses import SCOPE_GLOBAL, Address, Addresses
from kernel.links import Links
from kernel.netlink import NetlinkSocket
from kernel.routes import Routes
from reconcile.backoff import Backoff

NODE_IP = "MANX_NODE_IP"
_ATTEMPTS = 100
_TUNNEL = "ipv4VXLANTunnelAddr"
_MAC = "vxlanTunnelMACAddr"

_log = logging.getLogger(__name__)


class AddressError(Exception):
    """An address of this node can't be told."""


_EXPECTED = (StoreError, IpamError, InvalidObjectError, AddressError, OSError)


@dataclass(frozen=True, slots=True)
class RegistrationProblem:
    """Why the datastore does not say what it should about this node; None: it does."""

    text: str | None


def node_address(
    configured: str | None, workload_prefixes: tuple[str, ...], known: Collection[str] = ()
) -> str:
    """The node's address with its subnet's length: ``172.31.1.11/24``.

    ``configured`` wins. Otherwise the one of ``known`` (addresses that Kubernetes has for the
    node) that an interface has; the first address of the interface the default route leaves by;
    or of the first interface that has one. Raises AddressError.
    """
    with NetlinkSocket() as netlink:
        links = {link.index: link for link in Links(netlink).read().values()}
        addresses = [
            address
            for address in Addresses(netlink).read(version=V4).values()
            if address.scope == SCOPE_GLOBAL
        ]
        routes = Routes(netlink).read(version=V4).values()
    if configured:
        return _configured_address(configured, addresses)
    defaults = [hop.ifindex for route in routes if not route.net.length for hop in route.hops]
    candidates = [
        address
        for address in addresses
        if links[address.ifindex].up
        and links[address.ifindex].kind != "vxlan"
        and not links[address.ifindex].name.startswith(workload_prefixes)
    ]
    candidates.sort(
        key=lambda a: (_text(a.host) not in known, a.ifindex not in defaults, a.ifindex)
    )
    if not candidates:
        raise AddressError(f"no interface has an IPv4 address: set {NODE_IP}, as in 172.31.1.11/24")
    return str(candidates[0])


def _configured_address(text: str, addresses: list[Address]) -> str:
    try:
        host, network = parse_interface(text)
        if host.version != V4:
            raise ValueError(text)
    except ValueError as error:
        raise AddressError(
            f"{NODE_IP}: {text!r}: expected an IPv4 address such as 172.31.1.11/24"
        ) from error
    if "/" in text:
        return f"{_text(host)}/{network.length}"
    lengths = [address.length for address in addresses if address.host == host]
    return f"{text}/{lengths[0] if lengths else 32}"


def _text(host: Net) -> str:
    return format_address(host.version, host.address)


def _is_internal(address: Mapping[str, Any]) -> bool:
    return address.get("type") == "InternalIP"


class Registrar:
    """Writes what ``Registration`` asks for; tells ``report`` what hinders it.

    ``address`` finds the node's own address, if it can be one of those that the Node has as
    InternalIP; it may raise AddressError or OSError.
    """

    def __init__(
        self,
        store: Datastore,
        node: str,
        address: Callable[[Collection[str]], str],
        report: Callable[[RegistrationProblem], None],
    ) -> None:
        self._store = store
        self._node = node
        self._address = address
        self._report = report
        self._allocator = Allocator(store, node)
        self._handle = f"vxlan-tunnel-addr-{node}"
        self._attributes = {"node": node, "type": "vxlanTunnelAddress"}
        self._wishes: queue.SimpleQueue[Registration | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="registrar", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after what it is doing."""
        self._wishes.put(None)
        self._thread.join()

    def want(self, registration: Registration) -> None:
        """What the datastore should say, instead of what was wanted before."""
        self._wishes.put(registration)

    def _run(self) -> None:
        backoff: Backoff[str] = Backoff()
        wish: Registration | None = None
        while True:
            due = backoff.next_due()
            with contextlib.suppress(queue.Empty):
                wish = self._wishes.get(timeout=due and max(0.0, due - time.monotonic()))
            if wish is None:
                return
            try:
                self._fulfil(wish)
            except Exception as error:
                surprise = not isinstance(error, _EXPECTED)
                _log.warning("%s: %s; will be tried again", self._node, error, exc_info=surprise)
                self._report(RegistrationProblem(str(error)))
                backoff.failed(self._node, time.monotonic())
            else:
                self._report(RegistrationProblem(None))
                backoff.succeeded(self._node)

    def _fulfil(self, wish: Registration) -> None:
        if wish.missing:
            self._create_node()
        if wish.unaddressed:
            self._write_node(self._addressed)
        if not wish.overlay:
            self._release()
        else:
            self._hold(wish)

    def _create_node(self) -> None:
        address = self._address(())
        node = {
            "apiVersion": "projectcalico.org/v3",
            "kind": "Node",
            "metadata": {"name": self._node},
            "spec": {"bgp": {"ipv4Address": address}},
        }
        with contextlib.suppress(AlreadyExistsError):
            self._store.create(Key("Node", self._node), node)
            _log.info("registered node %s with address %s", self._node, address)

    def _addressed(self, spec: dict[str, Any]) -> dict[str, Any]:
        """The spec with our address, which others (a kubelet, an administrator) left out."""
        bgp = spec.get("bgp") or {}
        if bgp.get("ipv4Address") or bgp.get("ipv6Address"):
            return spec
        known = [one["address"] for one in spec.get("addresses") or () if _is_internal(one)]
        address = self._address(known)
        _log.info("node %s: registering its address %s", self._node, address)
        return spec | {"bgp": bgp | {"ipv4Address": address}}

    def _hold(self, wish: Registration) -> None:
        """See that IPAM counts the tunnel address as ours, and that the Node names it."""
        tunnel = self._held(wish) or self._taken(wish)
        text = _text(tunnel)
        mac = tunnel_mac(self._node)
        self._write_node(lambda spec: {_MAC: mac} | spec | {_TUNNEL: text})

    def _held(self, wish: Registration) -> Net | None:
        """The address of ours that may stay: the one the Node names, or another we hold."""
        held = self._allocator.addresses(self._handle)
        if wish.tunnel in held:
            return wish.tunnel
        if wish.tunnel is not None:
            # The Node names it and IPAM does not know: unless it is somebody's, it stays ours.
            with contextlib.suppress(AddressInUseError, AddressUnusableError):
                self._allocator.assign_specific(wish.tunnel, self._handle, self._attributes)
                return wish.tunnel
        pools = [parse_net(pool) for pool in wish.pools]
        return next((a for a in held if any(pool.contains(a) for pool in pools)), None)

    def _taken(self, wish: Registration) -> Net:
        """A new address, instead of any in pools that are gone."""
        if not wish.pools:
            raise AddressError(
                "the overlay needs a tunnel address: no VXLAN pool that selects this node has"
                " Tunnel in its allowedUses"
            )
        self._allocator.release(self._handle)
        return self._allocator.assign(
            self._handle, self._attributes, version=V4, pools=wish.pools, use="Tunnel"
        ).address

    def _release(self) -> None:
        """Hold no tunnel address any more, and don't name one."""
        self._allocator.release(self._handle)
        self._write_node(lambda spec: {k: v for k, v in spec.items() if k not in (_TUNNEL, _MAC)})

    def _write_node(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Change the Node's spec; when it is right already, nothing is written."""
        key = Key("Node", self._node)
        for _ in range(_ATTEMPTS):
            entry = self._store.get(key)
            spec: dict[str, Any] = entry.value.get("spec") or {}
            changed = change(spec)
            if changed == spec:
                return
            with contextlib.suppress(ConflictError):
                self._store.update(key, {**entry.value, "spec": changed}, entry.revision)
                return
        raise ConflictError(f"{key} changed {_ATTEMPTS} times while it was written", key)
