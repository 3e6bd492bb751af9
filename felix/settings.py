"""Settings of this node: FelixConfiguration ``default``, overridden by ``node.<name>``.

One that can't be read as a whole is read field by field. What is left out then opens nothing:
of the lists of ports that stay reachable, those count that can be read; and an interface prefix
that can't be is made good by ``Configuration.unsure``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum

from api.errors import InvalidObjectError, Problem
from api.felix import FelixConfiguration, FelixConfigurationSpec, ProtoPort
from api.felix_defaults import effective
from api.fields import parse_port, protocol_number
from api.net import Net, parse_net
from api.registry import parse_as
from datastore.interface import JSON, Key
from felix import names
from felix.chains import Mark
from policy.model import PortRange

CLUSTER = "default"
FORBIDDEN_FLOWS = "projectcalico.org/ForbiddenFlows"  # an annotation
FORBIDDEN_FLOWS_CHOICES = ("end", "keep")
NODE_PREFIX = "node."


class EndpointToHost(Enum):
    """What becomes of a workload's packets to its own host, once its egress policy allows them."""

    DROP = "Drop"
    ACCEPT = "Accept"
    RETURN = "Return"


class NftablesMode(Enum):
    """Whether nftables enforces policy, rather than iptables."""

    ENABLED = "Enabled"
    DISABLED = "Disabled"
    AUTO = "Auto"


class LoopPrevention(Enum):
    """What becomes of packets for addresses of services that no service has."""

    DROP = "Drop"
    REJECT = "Reject"
    DISABLED = "Disabled"


class SettingsError(ValueError):
    """A FelixConfiguration that can't be used as it stands."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """What can be used of a FelixConfiguration.

    ``forbidden_flows`` is what its annotation says, one of ``FORBIDDEN_FLOWS_CHOICES``, if any.
    ``unsure``: its ``interfacePrefix`` can't be read, or not all of it. So interfaces of workloads
    may begin in yet another way, which is to be learnt from the workloads there are.
    """

    spec: FelixConfigurationSpec
    forbidden_flows: str = ""
    unsure: bool = False


@dataclass(frozen=True, slots=True)
class Manner:
    """How an enforcer writes verdicts.

    ``accept`` and ``passed`` are the two lowest bits of the mark mask, ``others`` the rest of it.
    ``rejects``: what policy denies is refused rather than dropped. ``returns``: what it allows goes
    on to others' rules rather than being accepted at once; so it is for the table mangle.
    """

    accept: int
    passed: int
    rejects: bool = False
    returns: bool = False
    mangle_returns: bool = False
    others: tuple[int, ...] = ()

    def bits(self, marks: Mark) -> int:
        """The bits of a packet's mark that stand for ``marks``: a mark a bit, the lowest first."""
        value = marks.value
        bits = (self.accept if value & 1 else 0) | (self.passed if value & 2 else 0)
        if value > 3:
            bits |= sum(bit for i, bit in enumerate(self.others) if value >> i & 4)
        return bits


@dataclass(frozen=True, slots=True)
class Failsafe:
    """A port that stays reachable whatever policy says.

    Of the host, from ``net`` (inbound), or of others in ``net``; None is everywhere.
    """

    protocol: int
    port: int
    net: Net | None = None

    def spares(self, protocol: int, ports: Collection[int | None], far: Net) -> bool:
        """Whether it is about a packet to one of ``ports``, ``far`` being the other end."""
        return (
            self.protocol == protocol
            and self.port in ports
            and (self.net is None or self.net.contains(far))
        )


@dataclass(frozen=True, slots=True)
class NatOutgoing:
    """How what leaves the pools is translated.

    ``address`` None: to that of the interface. ``interface``: only what goes out by it, where
    a trailing ``*`` stands for any ending. ``spare_hosts``: not what goes to other nodes.
    """

    address: Net | None = None
    ports: PortRange | None = None
    interface: str = ""
    spare_hosts: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """What felix does differently on request.

    ``iptables`` and ``nftables`` are for the enforcer of that name. ``refresh_…`` is how often, in
    seconds, what felix owns of each kind is compared with the kernel; 0 is never. ``vxlan_mtu`` 0
    is the uplink's less 50, ``vxlan_enabled`` None is as the pools need it. ``allow_sources``:
    endpoints may send with the prefixes they list, besides their addresses. ``ends_forbidden``:
    connections that policy forbids are ended; None is as the environment says. ``node_ports``:
    where services may have theirs.
    """

    interface_prefixes: tuple[str, ...]
    iptables: Manner
    nftables: Manner
    endpoint_to_host: EndpointToHost
    append_hooks: bool
    nftables_mode: NftablesMode
    iptables_backend: str  # auto, legacy or nft
    log_prefix: str
    max_set_size: int
    vxlan_enabled: bool | None
    vxlan_port: int
    vxlan_vni: int
    vxlan_mtu: int
    refresh_nftables: float
    refresh_iptables: float
    refresh_network: float
    drop_invalid: bool
    allow_vxlan: bool
    allow_ipip: bool
    allow_sources: bool
    failsafe_in: tuple[Failsafe, ...]
    failsafe_out: tuple[Failsafe, ...]
    nat_outgoing: NatOutgoing
    loop_prevention: LoopPrevention
    floating_ips: bool
    node_ports: tuple[PortRange, ...]
    ends_forbidden: bool | None = None

    @property
    def spare_marks(self) -> int:
        """How many marks either enforcer has besides ACCEPT and PASS."""
        return min(len(self.iptables.others), len(self.nftables.others))

    def is_workload(self, interface: str) -> bool:
        """Whether an interface's name says that it belongs to a workload."""
        return interface.startswith(self.interface_prefixes) and names.is_interface(interface)


def settings(specs: Sequence[FelixConfigurationSpec] = ()) -> Settings:
    """The settings that ``specs`` give together, the most specific first.

    Raises SettingsError, which names the field.
    """
    merged = effective(*reversed(specs))

    def pick(field: str) -> object:
        return getattr(merged, field)

    def number(field: str) -> int:
        value = pick(field)
        assert isinstance(value, int)
        return value

    def manner(enforcer: str, name: str) -> Manner:
        field = f"{enforcer}_mark_mask"
        accept, passed, *others = _bits(name, number(field))
        return Manner(
            accept,
            passed,
            rejects=pick(f"{enforcer}_filter_deny_action") == "Reject",
            returns=pick(f"{enforcer}_filter_allow_action") == "Return",
            mangle_returns=pick(f"{enforcer}_mangle_allow_action") == "Return",
            others=tuple(others),
        )

    sets = pick("ipsets_refresh_interval")
    return Settings(
        interface_prefixes=_prefixes(str(pick("interface_prefix"))),
        iptables=manner("iptables", "iptablesMarkMask"),
        nftables=manner("nftables", "nftablesMarkMask"),
        endpoint_to_host=EndpointToHost(pick("default_endpoint_to_host_action")),
        append_hooks=pick("chain_insert_mode") == "Append",
        nftables_mode=NftablesMode(pick("nftables_mode")),
        iptables_backend=str(pick("iptables_backend")).lower(),
        log_prefix=str(pick("log_prefix")),
        max_set_size=number("max_ipset_size"),
        vxlan_enabled=None if pick("vxlan_enabled") is None else bool(pick("vxlan_enabled")),
        vxlan_port=_within("vxlanPort", number("vxlan_port"), 1, 65535),
        vxlan_vni=_within("vxlanVNI", number("vxlan_vni"), 1, (1 << 24) - 1),
        vxlan_mtu=_within("vxlanMTU", number("vxlan_mtu"), 0, 65535),
        refresh_nftables=_shortest(pick("nftables_refresh_interval"), sets),
        refresh_iptables=_shortest(pick("iptables_refresh_interval"), sets),
        refresh_network=_shortest(pick("route_refresh_interval")),
        drop_invalid=not pick("disable_conntrack_invalid_check"),
        allow_vxlan=bool(pick("allow_vxlan_packets_from_workloads")),
        allow_ipip=bool(pick("allow_ipip_packets_from_workloads")),
        allow_sources=pick("workload_source_spoofing") == "Any",
        failsafe_in=_failsafes(merged.failsafe_inbound_host_ports),
        failsafe_out=_failsafes(merged.failsafe_outbound_host_ports),
        nat_outgoing=_nat_outgoing(merged),
        loop_prevention=LoopPrevention(pick("service_loop_prevention")),
        floating_ips=pick("floating_ips") == "Enabled",
        node_ports=_port_ranges(merged.kube_node_port_ranges),
    )


def read_configuration(key: Key, value: JSON) -> tuple[Configuration, tuple[str, ...]]:
    """What can be used of it, and what is wrong with it. Never raises."""
    chosen, wrong = _forbidden_flows(value)
    problems = dict.fromkeys(wrong)
    try:
        return Configuration(_checked(key, value), chosen), tuple(problems)
    except (InvalidObjectError, SettingsError) as error:
        problems |= {str(problem): None for problem in _problems(error)}
    fields = value.get("spec") if isinstance(value, Mapping) else None
    unsure = fields is not None and not isinstance(fields, Mapping)
    kept: dict[str, object] = {}
    spec = FelixConfigurationSpec()
    for name, given in fields.items() if isinstance(fields, Mapping) else ():
        field = str(name)
        attempt = given
        try:
            spec = _checked(key, {"spec": kept | {field: attempt}})
        except (InvalidObjectError, SettingsError) as error:
            problems |= {str(problem): None for problem in _problems(error)}
            unsure = unsure or field.lower() == _PREFIX
            attempt = _readable_part(key, field, given)
            if attempt is None or field.lower() in map(str.lower, kept):
                continue
            spec = _checked(key, {"spec": kept | {field: attempt}})
        kept[field] = attempt
    return Configuration(spec, chosen, unsure), tuple(problems)


def _forbidden_flows(value: object) -> tuple[str, tuple[str, ...]]:
    """What the annotation says, and what is wrong with it."""
    found: object = value
    for name in ("metadata", "annotations"):
        found = found.get(name) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or FORBIDDEN_FLOWS not in found:
        return "", ()
    choice = found[FORBIDDEN_FLOWS]
    if choice in FORBIDDEN_FLOWS_CHOICES:
        return str(choice), ()
    where = f"metadata.annotations[{FORBIDDEN_FLOWS}]"
    return "", (str(Problem(where, choice, " or ".join(FORBIDDEN_FLOWS_CHOICES))),)


_PREFIX = "interfaceprefix"
_FAILSAFES = ("failsafeinboundhostports", "failsafeoutboundhostports")


def _readable_part(key: Key, field: str, given: object) -> object:
    """What counts of a list whose whole can't be read; None: nothing does."""

    def is_readable(part: object) -> bool:
        try:
            _checked(key, {"spec": {field: part}})
        except (InvalidObjectError, SettingsError):
            return False
        return True

    if field.lower() in _FAILSAFES:
        return [each for each in given if is_readable([each])] if isinstance(given, list) else []
    if field.lower() == _PREFIX and isinstance(given, str):
        parts = (part.strip() for part in given.split(","))
        return ",".join(part for part in parts if part and is_readable(part)) or None
    return None


def _checked(key: Key, value: object) -> FelixConfigurationSpec:
    """Raises InvalidObjectError, SettingsError."""
    named = {"metadata": {"name": key.name}, **value} if isinstance(value, Mapping) else value
    parsed = parse_as(key.kind, named)
    assert isinstance(parsed, FelixConfiguration)
    settings((parsed.spec,))
    return parsed.spec


def _problems(error: InvalidObjectError | SettingsError) -> Sequence[object]:
    return error.problems if isinstance(error, InvalidObjectError) else (error,)


def _shortest(*intervals: object) -> float:
    """In seconds, of those that are not 0."""
    seconds = []
    for interval in intervals:
        assert isinstance(interval, timedelta)
        seconds.append(interval.total_seconds())
    return min((each for each in seconds if each > 0), default=0.0)


def _prefixes(text: str) -> tuple[str, ...]:
    prefixes = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for prefix in prefixes:
        # Room must be left for what tells one interface from the other.
        if not names.is_interface(prefix) or len(prefix) > 14:
            raise SettingsError(
                f"spec.interfacePrefix: {text!r}: expected beginnings of interface names,"
                " separated by commas, such as cali"
            )
    return prefixes


def _failsafes(ports: Sequence[ProtoPort] | None) -> tuple[Failsafe, ...]:
    return tuple(
        Failsafe(
            protocol_number(each.protocol), each.port, parse_net(each.net) if each.net else None
        )
        for each in ports or ()
    )


def _port_ranges(ports: Sequence[int | str] | None) -> tuple[PortRange, ...]:
    ranges = (parse_port(port) for port in ports or ())
    return tuple(PortRange(*each) for each in ranges if isinstance(each, tuple))


def _nat_outgoing(spec: FelixConfigurationSpec) -> NatOutgoing:
    ports = None if spec.nat_port_range is None else parse_port(spec.nat_port_range)
    interface = spec.iptables_nat_outgoing_interface_filter or ""
    return NatOutgoing(
        address=parse_net(spec.nat_outgoing_address) if spec.nat_outgoing_address else None,
        ports=PortRange(*ports) if ports else None,
        interface=f"{interface[:-1]}*" if interface.endswith("+") else interface,
        spare_hosts=spec.nat_outgoing_exclusions == "IPPoolsAndHostIPs",
    )


def _bits(field: str, mask: int) -> list[int]:
    """The lowest first."""
    bits = [1 << place for place in range(mask.bit_length()) if mask >> place & 1]
    if len(bits) < 2:
        raise SettingsError(f"spec.{field}: {mask:#x}: expected at least two bits set")
    return bits


def _within(field: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise SettingsError(f"spec.{field}: {value}: expected {least} to {most}")
    return value
