"""Limits of pods' bandwidth: a token bucket for each direction.

What a pod receives leaves the node by its interface, whose bucket can make it wait. What it sends
arrives there, where nothing can wait: so it takes a way around by a device of its own, an IFB with
a bucket, and goes on from there as if it had just come from the pod. Ours are the IFB devices whose
names begin with ``bwcali``, each with its pod's interface for an alias, and what ``kernel.qdiscs``
knows by its numbers.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from felix.desired import UNLIMITED, Limit, Limits
from felix.tables import Table
from kernel.links import Link, Links, delete_link, ifb, link_set
from kernel.netlink import Message, NetlinkSocket
from kernel.qdiscs import (
    OURS,
    Bucket,
    Qdiscs,
    arriving_add,
    arriving_delete,
    bucket,
    bucket_delete,
    bucket_replace,
    redirect_add,
    redirect_delete,
)
from reconcile.plan import Plan

IFB_PREFIX = "bwcali"
_PLUGINS_PREFIX = "bwp"  # containernetworking/plugins, plugins/meta/bandwidth
_DIGITS = 9
_HEADER = 18  # of Ethernet, with one tag
_BROKEN = Bucket(0, 0, 0)  # stands for half of what there should be
_GONE = (errno.ENODEV, errno.ENOENT, errno.EINVAL)  # of what was to be taken away


@dataclass(frozen=True, slots=True)
class _Shaped:
    """What an interface has. ``index``: the kernel's number of it; 0: it is gone."""

    index: int
    ingress: Bucket | None
    egress: Bucket | None


class Bandwidth:
    """The buckets of pods, in the network namespace of ``socket``."""

    def __init__(self, socket: NetlinkSocket) -> None:
        self._socket = socket
        self._limits: dict[str, Limits] = {}
        self.table: Table[str, _Shaped] = Table(self._apply)

    def want(self, interface: str, limits: Limits) -> None:
        """How an interface shall be limited, wherever it is."""
        if limits == UNLIMITED:
            self._limits.pop(interface, None)
        else:
            self._limits[interface] = limits

    def place(self, interface: str, link: Link | None) -> None:
        """Where an interface is now; None: it is not, or must not be touched."""
        limits = self._limits.get(interface)
        shaped = None
        if limits is not None and link is not None:
            ingress, egress = (
                _bucket(limit, link.mtu) for limit in (limits.ingress, limits.egress)
            )
            shaped = _Shaped(link.index, ingress, egress)
        self.table.want(interface, shaped)

    def read(self, links: Mapping[str, Link]) -> None:
        """See what there is, to compare it with what there should be."""
        qdiscs = Qdiscs(self._socket)
        buckets = qdiscs.buckets()
        aside = {
            link.alias: link
            for link in links.values()
            if link.kind == "ifb" and link.name.startswith(IFB_PREFIX)
        }
        by_index = {link.index: name for name, link in links.items()}
        names = {by_index[index] for index in buckets if index in by_index}
        found = {}
        for name in {*aside, *names} - {link.name for link in aside.values()}:
            index = links[name].index if name in links else 0
            device = aside.get(name)
            egress = None
            if device is not None:
                whole = index and device.up and qdiscs.redirect(index) == device.index
                egress = buckets.get(device.index, _BROKEN) if whole else _BROKEN
            found[name] = _Shaped(index, buckets.get(index), egress)
        self.table.found(found)

    def _apply(self, plan: Plan[str, _Shaped]) -> dict[str, Exception]:
        errors: dict[str, Exception] = {}
        for name, wanted in (*plan.create.items(), *plan.update.items(), *plan.delete.items()):
            now = None if name in plan.delete else wanted
            try:
                self._shape(name, now, self.table.actual.get(name))
            except OSError as error:
                errors[name] = error
        return errors

    def _shape(self, name: str, wanted: _Shaped | None, before: _Shaped | None) -> None:
        index = wanted.index if wanted else before.index if before else 0
        if wanted and wanted.ingress:
            self._do(name, bucket_replace(index, wanted.ingress))
        elif before and before.ingress and index:
            self._do(name, bucket_delete(index), *_GONE)
        device = _device(name)
        if wanted and wanted.egress:
            self._redirect(name, device, wanted.index, wanted.egress)
        elif before and before.egress:
            if index:
                self._do(name, redirect_delete(index), *_GONE)
                if not Qdiscs(self._socket).filtered(index):
                    self._do(name, arriving_delete(index), *_GONE)
            self._do(device, delete_link(device), *_GONE)

    def _redirect(self, name: str, device: str, index: int, egress: Bucket) -> None:
        """The bucket is there before anything is led to it."""
        self._do(device, ifb(device), errno.EEXIST)
        aside = Links(self._socket).get(device)
        self._do(device, link_set(aside.index, alias=name, up=True))
        self._do(device, bucket_replace(aside.index, egress))
        redirects = Qdiscs(self._socket).redirects(index)
        if redirects.pop(OURS, 0) != aside.index:
            self._do(name, arriving_add(index), errno.EEXIST)
            self._do(name, redirect_delete(index), *_GONE)
            self._do(name, redirect_add(index, aside.index))
        self._supersede(name, index, redirects)

    def _supersede(self, name: str, index: int, redirects: Mapping[int, int]) -> None:
        """The detour that the reference plugin ``bandwidth`` once made would be taken first."""
        if not redirects:
            return
        others = {link.index: link for link in Links(self._socket).read().values()}
        for preference, target in redirects.items():
            device = others.get(target)
            if device and device.kind == "ifb" and device.name.startswith(_PLUGINS_PREFIX):
                self._do(name, redirect_delete(index, preference), *_GONE)
                self._do(device.name, delete_link(target), *_GONE)

    def _do(self, name: str, message: Message, *harmless: int) -> None:
        for failure in self._socket.batch([message]):
            if failure.errno not in harmless:
                raise failure.error(f"bandwidth of interface {name}")


def _bucket(limit: Limit | None, mtu: int) -> Bucket | None:
    """Bytes, and enough of them for a packet: less would let none through."""
    if limit is None:
        return None
    packet = mtu + _HEADER
    return bucket(
        limit.rate // 8,
        max(limit.burst // 8, packet),
        limit.peak // 8,
        max(limit.least, packet),
    )


def _device(interface: str) -> str:
    """The IFB of a pod's interface."""
    return IFB_PREFIX + hashlib.sha1(interface.encode()).hexdigest()[:_DIGITS]
