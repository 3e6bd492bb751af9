"""The addresses of the node's interfaces, and those of them that ipvs translates.

Read once and then kept by what the kernel tells: kube-proxy's mode ipvs has thousands of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set

from api.net import V4, V6, Net
from felix import names
from kernel.addresses import Addresses, AddressKey
from kernel.links import AddressEvent, LinkEvent, Links
from kernel.netlink import NetlinkSocket


def host_addresses() -> HostAddresses:
    """As they are now, in the calling thread's network namespace. Raises OSError."""
    with NetlinkSocket() as netlink:
        interfaces = {link.index: link.name for link in Links(netlink).read().values()}
        addresses = Addresses(netlink)
        return HostAddresses(interfaces, (*addresses.read(version=V4), *addresses.read(version=V6)))


class HostAddresses:
    """See the module. An address may be on several interfaces, and on one several times.

    ``interfaces`` are names by index. What one is called that has addresses may be told later.
    """

    def __init__(
        self, interfaces: Mapping[int, str] | None = None, addresses: Iterable[AddressKey] = ()
    ) -> None:
        self._names: dict[int, str] = {}
        self._of: dict[int, set[Net]] = {}  # by interface
        self._at: dict[Net, set[AddressKey]] = {}  # the same by address
        self._ipvs = 0  # the index of its interface
        self._services: dict[int, set[Net]] = {version: set() for version in (V4, V6)}
        self.services_changed = False  # since somebody last said False
        for index, name in (interfaces or {}).items():
            self._call(index, name)
        for key in addresses:
            self._put(key, is_there=True)

    def __contains__(self, host: object) -> bool:
        return host in self._at

    def __iter__(self) -> Iterator[Net]:
        return iter(self._at)

    @property
    def services(self) -> Mapping[int, Set[Net]] | None:
        """By IP version what is on the interface of ipvs, and on no other; None: it has none."""
        return self._services if self._ipvs else None

    def by_interface(self) -> dict[str, Set[Net]]:
        """Those of each interface that has any, by its name."""
        return {name: self._of[i] for i, name in self._names.items() if i in self._of}

    def take(self, event: LinkEvent | AddressEvent) -> set[str]:
        """Something changed: the names by which other addresses are found now."""
        if isinstance(event, AddressEvent):
            key = event.address.key
            moved = self._put(key, is_there=not event.deleted)
            return {self._names[key.ifindex]} if moved and key.ifindex in self._names else set()
        before, now = self._names.get(event.index), None if event.deleted else event.name
        if before == now:
            return set()
        moved = event.index in self._of
        if event.deleted:
            for host in tuple(self._of.get(event.index, ())):
                for key in [each for each in self._at[host] if each.ifindex == event.index]:
                    self._put(key, is_there=False)
        self._call(event.index, now)
        return {name for name in (before, now) if name is not None and moved}

    def _call(self, index: int, name: str | None) -> None:
        """An interface has a name; None: it is gone."""
        if name is None:
            self._names.pop(index, None)
        else:
            self._names[index] = name
        if name == names.IPVS_DEVICE or index == self._ipvs:
            before, self._ipvs = self._ipvs, index if name == names.IPVS_DEVICE else 0
            self.services_changed = True
            for each in (before, self._ipvs):
                for host in self._of.get(each, ()):
                    self._judge(host)

    def _put(self, key: AddressKey, *, is_there: bool) -> bool:
        """An address is there, or isn't; whether its interface got it by that, or lost it."""
        own, at = self._of.setdefault(key.ifindex, set()), self._at.setdefault(key.host, set())
        had = key.host in own
        (at.add if is_there else at.discard)(key)
        has = is_there or any(each.ifindex == key.ifindex for each in at)
        (own.add if has else own.discard)(key.host)
        if not own:
            del self._of[key.ifindex]
        if not at:
            del self._at[key.host]
        if has != had:
            self._judge(key.host)
        return has != had

    def _judge(self, host: Net) -> None:
        """See whether ipvs translates it."""
        at, services = self._at.get(host, ()), self._services[host.version]
        is_service = bool(at) and all(key.ifindex == self._ipvs for key in at)
        if is_service != (host in services):
            (services.add if is_service else services.discard)(host)
            self.services_changed = True
