"""Single fields, and the little languages in them."""

from __future__ import annotations

import ipaddress
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from api import fields
from api.bgp import BGPConfiguration, community_expected, split_peer_ip
from api.errors import InvalidObjectError
from api.felix import FelixConfiguration, FelixConfigurationSpec
from api.felix_defaults import DEFAULTS, effective
from api.net import Net, parse_interface, parse_net
from api.registry import dump, parse, validate


def accepts(type_: Any, value: object) -> bool:
    try:
        TypeAdapter(type_).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "seconds", "canonical"),
    [
        ("0", 0, "0s"),
        ("90s", 90, "1m30s"),
        ("1h", 3600, "1h0m0s"),
        ("1m30.5s", 90.5, "1m30.5s"),
        ("500ms", 0.5, "500ms"),
        ("1.5ms", 0.0015, "1.5ms"),
        ("250us", 0.00025, "250µs"),
        ("1ns", 0.000001, "1µs"),
        ("-2s", -2, "-2s"),
        ("100h", 360000, "100h0m0s"),
    ],
)
def test_durations(text: str, seconds: float, canonical: str) -> None:
    adapter: TypeAdapter[timedelta] = TypeAdapter(fields.Duration)
    value = adapter.validate_python(text)
    assert value.total_seconds() == seconds
    assert adapter.dump_python(value, mode="json") == canonical


@given(st.timedeltas(timedelta(0), timedelta(days=100 * 365)))
def test_durations_round_trip(value: timedelta) -> None:
    adapter: TypeAdapter[timedelta] = TypeAdapter(fields.Duration)
    assert adapter.validate_python(fields.format_duration(value)) == value


@pytest.mark.parametrize("text", ["", "5", "s", "1d", "1 s", "9999999999h", ".s", 5])
def test_no_durations(text: object) -> None:
    assert not accepts(fields.Duration, text)


@pytest.mark.parametrize(
    ("value", "stored", "numbers"),
    [
        (80, 80, (80, 80)),
        ("80", 80, (80, 80)),
        ("80:80", 80, (80, 80)),
        ("080:0090", "80:90", (80, 90)),
        ("http", "http", None),
    ],
)
def test_ports(value: object, stored: object, numbers: object) -> None:
    port = TypeAdapter(fields.Port).validate_python(value)
    assert port == stored
    assert fields.parse_port(port) == numbers


@pytest.mark.parametrize(
    "value", [0, 65536, -1, True, 1.0, "0", "90:80", "1:65536", "a--b", "UPPER", "1:2:3", "", None]
)
def test_no_ports(value: object) -> None:
    assert not accepts(fields.Port, value)


@pytest.mark.parametrize(
    ("value", "number"), [(64512, 64512), ("64512", 64512), ("1.10", 65546), (0, 0)]
)
def test_as_numbers(value: object, number: int) -> None:
    assert TypeAdapter(fields.AsNumber).validate_python(value) == number


@pytest.mark.parametrize("value", [-1, 1 << 32, "1.65536", "1.2.3", "x", True, 1.5])
def test_no_as_numbers(value: object) -> None:
    assert not accepts(fields.AsNumber, value)


@pytest.mark.parametrize(
    ("type_", "right", "wrong"),
    [
        (fields.Mac, "ee:ee:ee:ee:ee:ee", "ee:ee:ee:ee:ee"),
        (fields.IPv4, "10.0.0.1", "10.0.0.01"),
        (fields.IPv6, "fd00::1", "fe80::1%eth0"),
        (fields.Ip, "fd00::1", "fe80::1%eth0"),
        (fields.Ip, "10.0.0.1", "10.0.0.1/32"),
        (fields.Cidr, "10.0.0.0/8", "10.0.0.0/255.0.0.0"),
        (fields.Cidr, "fd00::/64", "10.0.0.1"),
        (fields.NetText, "10.0.0.1", "10.0.0.1/24"),
        (fields.InterfaceV4, "10.0.0.1/24", "fd00::1/64"),
        (fields.InterfaceName, "cali12d4a061371", "cali12d4a0613712"),
        (fields.InterfaceName, "*", "a*"),
        (fields.IgnoredInterface, "eth*", "*"),
        (fields.PortName, "http-alt", "http--alt"),
        (fields.Regexp, "^eth.*", "("),
        (fields.DSCP, "ef", "EF1"),
        (fields.DSCP, 63, 64),
        (fields.Name, "a.b-c", "a..b"),
    ],
)
def test_right_and_wrong(type_: Any, right: object, wrong: object) -> None:
    assert accepts(type_, right)
    assert not accepts(type_, wrong)


def test_addresses_without_netmasks_and_zones() -> None:
    for text in ("10.0.0.0/255.0.0.0", "fe80::%eth0/64", "fe80::1%eth0", "10.0.0.0/::"):
        with pytest.raises(ValueError):
            parse_net(text)
        with pytest.raises(ValueError):
            parse_interface(text)


def test_peer_addresses() -> None:
    assert split_peer_ip("192.0.2.1") == ("192.0.2.1", None)
    assert split_peer_ip("192.0.2.1:1790") == ("192.0.2.1", 1790)
    assert split_peer_ip("[2001:db8::1]:1790") == ("2001:db8::1", 1790)
    for text in ("192.0.2.1:0", "192.0.2.1:65536", "[192.0.2.1", "2001:db8::1]:179", "peer:179"):
        with pytest.raises(ValueError):
            split_peer_ip(text)


def test_communities() -> None:
    assert community_expected("64512:120") is None
    assert community_expected("4294967295:0:1") is None
    assert community_expected("65536:1") is not None
    assert community_expected("named") is not None


def felix(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "projectcalico.org/v3",
        "kind": "FelixConfiguration",
        "metadata": {"name": name},
        "spec": spec,
    }


def test_felix_settings_in_any_case_become_canonical() -> None:
    parsed = parse(felix("default", chainInsertMode="append", logSeverityScreen="DEBUG"))
    assert dump(parsed)["spec"] == {
        "chainInsertMode": "Append",
        "logSeverityScreen": "Debug",
        "nftablesMode": "Auto",
        "nftablesFlowTableOffload": "Disabled",
    }


def test_felix_levels_merge() -> None:
    cluster = validate(
        FelixConfiguration,
        felix("default", vxlanPort=4790, bpfEnabled=False, nftablesMode="Enabled"),
    )
    node = validate(FelixConfiguration, felix("node.a", vxlanVNI=7, removeExternalRoutes=False))
    merged = effective(cluster.spec, None, node.spec)
    assert (merged.vxlan_port, merged.vxlan_vni, merged.nftables_mode) == (4790, 7, "Enabled")
    assert merged.remove_external_routes is False
    assert merged.iptables_refresh_interval == timedelta(seconds=180)
    assert effective() == DEFAULTS


# What released versions of Calico know, and the newest does not: clusters have it.
OLDER = {
    "iptablesLockFilePath": "/run/xtables.lock",
    "iptablesLockTimeout": "0s",
    "bpfKubeProxyEndpointSlicesEnabled": True,
}


def test_felix_has_every_field_of_the_reference() -> None:
    names = {field.alias for field in FelixConfigurationSpec.model_fields.values()}
    assert len(names - OLDER.keys()) == 188


def test_what_older_versions_of_calico_wrote() -> None:
    older = felix("default", bpfRedirectToPeer="L2Only", **OLDER)
    assert dump(parse(older))["spec"].items() >= older["spec"].items()
    # Calico 3.32's own default, in every cluster of it
    controllers = {
        "loadBalancer": {"assignIPs": "AllServices"},
        "node": {
            "hostEndpoint": {"autoCreate": "Disabled", "createDefaultHostEndpoint": "Enabled"},
            "leakGracePeriod": "15m0s",
            "reconcilerPeriod": "5m0s",
            "syncLabels": "Enabled",
        },
        "policyMigration": {"enabled": "Enabled"},
    }
    configuration = {
        "apiVersion": "projectcalico.org/v3",
        "kind": "KubeControllersConfiguration",
        "metadata": {"name": "default"},
        "spec": {"controllers": controllers, "healthChecks": "Enabled"},
    }
    assert dump(parse(configuration))["spec"]["controllers"] == controllers


@pytest.mark.parametrize(
    ("field", "right", "wrong"),
    [
        ("iptablesRefreshInterval", "1.5s", "-5s"),
        ("featureDetectOverride", "SNATFullyRandom=true,", "SNATFullyRandom=maybe"),
        ("featureGates", "A=b,C=d", "A"),
        ("natPortRange", "32768:65535", "http"),
        ("externalNodesList", ["10.0.0.0/8"], ["fd00::/64"]),
        ("failsafeInboundHostPorts", [{"protocol": "tcp", "port": 22}], [{"protocol": "TCP"}]),
        ("healthTimeoutOverrides", [{"name": "a", "timeout": "5s"}], [{"name": "a/b"}]),
        ("bpfConntrackTimeouts", {"tcpSynSent": "Auto"}, {"tcpSynSent": ""}),
        ("openstackRegion", "region-1", "r" * 47),
        ("mtuIfacePattern", "[[:alpha:]]+", "["),
        ("floatingIPs", "Enabled", ""),
        ("logSeverityScreen", "", "Loud"),
    ],
)
def test_felix_fields(field: str, right: object, wrong: object) -> None:
    parse(felix("default", **{field: right}))
    with pytest.raises(InvalidObjectError, match=field):
        parse(felix("default", **{field: wrong}))


def test_zero_as_a_port_to_listen_on_means_the_default() -> None:
    obj = {
        "apiVersion": "projectcalico.org/v3",
        "kind": "BGPConfiguration",
        "metadata": {"name": "default"},
        "spec": {"listenPort": 0},
    }
    assert validate(BGPConfiguration, obj).spec.listen_port is None


def test_an_affinity_about_to_be_deleted_is_refused() -> None:
    spec = {"cidr": "10.0.0.0/26", "node": "n", "state": "confirmed"}
    obj = {
        "apiVersion": "projectcalico.org/v3",
        "kind": "BlockAffinity",
        "metadata": {"name": "n-10-0-0-0-26"},
    }
    assert dump(parse(obj | {"spec": spec}))["spec"] == spec | {"deleted": False}
    with pytest.raises(InvalidObjectError, match="about to go"):
        parse(obj | {"spec": spec | {"deleted": True}})


@given(
    st.from_regex(r"\A[0-9]{1,3}(\.[0-9]{1,3}){2,4}(/[0-9]{0,3})?\Z")
    | st.builds(
        "{}/{}".format, st.ip_addresses(v=4), st.integers(0, 33) | st.just("08") | st.just("+8")
    )
    | st.ip_addresses(v=4).map(str)
)
def test_plain_addresses_are_read_as_all_others(text: str) -> None:
    """What is read quickly, and what isn't, as ``ipaddress`` reads it."""
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError:
        for parse in (parse_net, parse_interface):
            with pytest.raises(ValueError):
                parse(text)
        return
    network, bits = interface.network, interface.max_prefixlen
    net = Net(network.version, int(network.network_address), network.prefixlen)
    assert parse_interface(text) == (Net(net.version, int(interface.ip), bits), net)
    assert parse_net(text, strict=False) == net
    if interface.ip == network.network_address:
        assert parse_net(text) == net
    else:
        with pytest.raises(ValueError):
            parse_net(text)
