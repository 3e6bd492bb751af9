"""Felix' own defaults (its configuration reference), and how the levels merge."""

from __future__ import annotations

from datetime import timedelta

from api.felix import FelixConfigurationSpec, ProtoPort

ETCD_AND_CLUSTER_PORTS = (179, 2379, 2380, 5473, 6443, 6666, 6667)  # BGP, etcd, Typha, API server


def _tcp(*ports: int) -> list[ProtoPort]:
    return [ProtoPort(protocol="TCP", port=port) for port in ports]


def _seconds(number: float) -> timedelta:
    return timedelta(seconds=number)


DEFAULTS = FelixConfigurationSpec(
    log_prefix="calico-packet",
    log_action_rate_limit_burst=5,
    log_severity_screen="Info",
    interface_prefix="cali",
    interface_exclude="kube-ipvs0",
    interface_refresh_interval=_seconds(90),
    ip_forwarding="Enabled",
    ipv4_normal_route_priority=1024,
    ipv4_elevated_route_priority=512,
    ipv6_normal_route_priority=1024,
    ipv6_elevated_route_priority=512,
    ipv6_support=True,
    device_route_protocol=3,  # RTPROT_BOOT
    remove_external_routes=True,
    route_refresh_interval=_seconds(90),
    route_source="CalicoIPAM",
    route_sync_disabled=False,
    vxlan_port=4789,
    vxlan_vni=4096,
    vxlan_mtu=0,  # 0: that of the node's interface less the overhead
    vxlan_mtu_v6=0,
    ipip_mtu=0,
    allow_vxlan_packets_from_workloads=False,
    allow_ipip_packets_from_workloads=False,
    mtu_iface_pattern="^((en|wl|ww|sl|ib)[Pcopsvx].*|(eth|wlan|wwan).*)",
    wireguard_enabled=False,
    wireguard_enabled_v6=False,
    wireguard_host_encryption_enabled=False,
    wireguard_interface_name="wireguard.cali",
    wireguard_interface_name_v6="wg-v6.cali",
    wireguard_keep_alive=_seconds(0),
    wireguard_listening_port=51820,
    wireguard_listening_port_v6=51821,
    wireguard_mtu=0,
    wireguard_mtu_v6=0,
    wireguard_routing_rule_priority=99,
    default_endpoint_to_host_action="Drop",
    disable_conntrack_invalid_check=False,
    failsafe_inbound_host_ports=[
        *_tcp(22),
        ProtoPort(protocol="UDP", port=68),
        *_tcp(*ETCD_AND_CLUSTER_PORTS),
    ],
    failsafe_outbound_host_ports=[
        ProtoPort(protocol="UDP", port=53),
        ProtoPort(protocol="UDP", port=67),
        *_tcp(*ETCD_AND_CLUSTER_PORTS),
    ],
    workload_source_spoofing="Disabled",
    chain_insert_mode="Insert",
    iptables_backend="Auto",
    iptables_filter_allow_action="Accept",
    iptables_filter_deny_action="Drop",
    iptables_lock_probe_interval=timedelta(milliseconds=50),
    iptables_mangle_allow_action="Accept",
    iptables_mark_mask=0xFFFF0000,
    iptables_post_write_check_interval=_seconds(5),
    iptables_refresh_interval=_seconds(180),
    ipsets_refresh_interval=_seconds(90),
    max_ipset_size=1 << 20,
    nftables_mode="Auto",
    nftables_filter_allow_action="Accept",
    nftables_filter_deny_action="Drop",
    nftables_flow_table_offload="Disabled",
    nftables_mangle_allow_action="Accept",
    nftables_mark_mask=0xFFFF0000,
    nftables_refresh_interval=_seconds(180),
    floating_ips="Disabled",
    kube_node_port_ranges=["30000:32767"],
    nat_outgoing_exclusions="IPPoolsOnly",
    service_loop_prevention="Drop",
    health_enabled=False,
    health_host="localhost",
    health_port=9099,
    prometheus_metrics_enabled=False,
    prometheus_metrics_port=9091,
    netlink_timeout=_seconds(10),
    flow_logs_flush_interval=_seconds(300),
)


def effective(*layers: FelixConfigurationSpec | None) -> FelixConfigurationSpec:
    """The settings that hold: each layer over those before it, all over the defaults.

    Give the ``default`` object's spec first and the node's own last. Fields without a default
    that nobody sets stay None.
    """
    merged = DEFAULTS.model_copy()
    for layer in layers:
        if layer is not None:
            changed = {
                name: value
                for name in FelixConfigurationSpec.model_fields
                if (value := getattr(layer, name)) is not None
            }
            merged = merged.model_copy(update=changed)
    return merged
