"""FelixConfiguration: the agent's settings, for the cluster or (``node.<name>``) one node.

Every field is optional. None means: as the wider configuration says, and if none says
anything, Felix' own default. ``effective`` merges the two levels.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from api.bgp import LogSeverity, RoutePriority
from api.fields import (
    ANY_CASE,
    DSCP,
    AnyCidr,
    Duration,
    InterfaceFilter,
    InterfaceName,
    IPv4,
    IPv6,
    NetText,
    Number,
    Port,
    PortNumber,
    Regexp,
    Selector,
    is_label,
    parse_port,
    refuse,
)
from api.metadata import CalicoResource, Checked, Fault, Model
from api.net import parse_interface

MAX_ROUTE_TABLES = 0xFFFF

AllowAction = Annotated[Literal["Accept", "Return"], ANY_CASE]
DenyAction = Annotated[Literal["Drop", "Reject"], ANY_CASE]
Switch = Literal["Enabled", "Disabled"]
Mark = Annotated[int, Field(ge=0, le=0xFFFFFFFF)]
GoLimit = Annotated[int, Field(ge=-1)]
LogPrefix = Annotated[str, Field(pattern=r"^[a-zA-Z0-9%: /_-]*$")]
LogRate = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,3}/(second|minute|hour|day)$")]
PrometheusHost = Annotated[str, Field(pattern=r"^[a-zA-Z0-9:._+-]{1,64}$")]
FeatureOverrides = Annotated[str, Field(pattern=r"^(\w+=(true|false)?,+)*(\w+=(true|false)?)?$")]
FeatureGates = Annotated[str, Field(pattern=r"^(\w+=[^=,]+,+)*(\w+=[^=,]+)?$")]
ConntrackTimeout = Annotated[str, Field(pattern=r"^(([0-9]*(\.[0-9]*)?(ms|s|h|m|us)+)+|Auto)$")]


def _numeric(port: int | str) -> int | str:
    if parse_port(port) is None:
        raise refuse("a port or range of ports, not a name")
    return port


def _v4(text: str) -> str:
    if parse_interface(text)[0].version != 4:
        raise refuse("an IPv4 address or CIDR")
    return text


def _region(text: str) -> str:
    if not is_label(text) or len(text) > 63 - len("openstack-region-"):
        raise refuse("a DNS label of at most 46 characters")
    return text


def _not_negative(duration: timedelta) -> timedelta:
    if duration < timedelta(0):
        raise refuse("a duration that is not negative")
    return duration


Interval = Annotated[Duration, AfterValidator(_not_negative)]
NumericPort = Annotated[Port, AfterValidator(_numeric)]
AnyCidrV4 = Annotated[AnyCidr, AfterValidator(_v4)]
OpenstackRegion = Annotated[str, AfterValidator(_region)]


class ProtoPort(Model):
    """A port that always stays reachable."""

    protocol: Annotated[Literal["TCP", "UDP", "SCTP"], ANY_CASE] = "TCP"
    port: Annotated[int, Field(ge=0, le=65535)]
    net: NetText | None = None


class HealthTimeoutOverride(Model):
    """How long a part of the agent may be silent before it counts as hung."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_ -]+$")]
    timeout: Interval


class RouteTableRange(Checked):
    """Kernel routing tables the agent may use (deprecated form)."""

    min: Number
    max: Number

    def faults(self) -> Iterator[Fault]:
        """Not a range in 1 to 250."""
        if not 1 <= self.min <= self.max <= 250:
            yield Fault((), f"{self.min} to {self.max}", "a range within 1 to 250")


class RouteTableIDRange(Checked):
    """Kernel routing tables the agent may use."""

    min: Number
    max: Number

    def faults(self) -> Iterator[Fault]:
        """Not a range of table ids."""
        if not 1 <= self.min <= self.max <= 0xFFFFFFFF:
            yield Fault((), f"{self.min} to {self.max}", "a range within 1 to 4294967295")


class BPFConntrackTimeouts(Model):
    """Timeouts of the eBPF dataplane's connection table."""

    verbatim: ClassVar[frozenset[str]] = frozenset(
        (
            *("creationGracePeriod", "tcpSynSent", "tcpEstablished", "tcpFinsSeen"),
            *("tcpResetSeen", "udpTimeout", "genericTimeout", "icmpTimeout"),
        )
    )

    creation_grace_period: ConntrackTimeout | None = None
    tcp_syn_sent: ConntrackTimeout | None = None
    tcp_established: ConntrackTimeout | None = None
    tcp_fins_seen: ConntrackTimeout | None = None
    tcp_reset_seen: ConntrackTimeout | None = None
    udp_timeout: ConntrackTimeout | None = None
    generic_timeout: ConntrackTimeout | None = None
    icmp_timeout: ConntrackTimeout | None = None


class FelixConfigurationSpec(Checked):
    """spec of a FelixConfiguration."""

    verbatim: ClassVar[frozenset[str]] = frozenset(
        (
            "awsSrcDstCheck",
            "bpfAttachType",
            "bpfConnectTimeLoadBalancing",
            "bpfConntrackMode",
            "bpfHostNetworkedNATWithoutCTLB",
            "bpfJITHardening",
            "bpfOverlayHostSourceIP",
            "floatingIPs",
            "flowLogsLocalReporter",
            "flowLogsPolicyEvaluationMode",
            "iptablesBackend",
            "istioAmbientMode",
            "localSubnetL2Reachability",
            "logActionRateLimit",
            "natOutgoingExclusions",
            "nftablesFlowTableOffload",
            "nftablesMode",
            "programClusterRoutes",
            "prometheusMetricsClientAuth",
            "windowsManageFirewallRules",
        )
    )

    # Logs
    log_action_rate_limit: LogRate | None = None
    log_action_rate_limit_burst: Annotated[int, Field(ge=0, le=9999)] | None = None
    log_debug_filename_regex: Regexp | None = None
    log_file_path: str | None = None
    log_prefix: LogPrefix | None = None
    log_severity_file: LogSeverity | None = None
    log_severity_screen: LogSeverity | None = None
    log_severity_sys: LogSeverity | None = None
    # Interfaces and routes
    device_route_protocol: Number | None = None
    device_route_source_address: IPv4 | None = None
    device_route_source_address_ipv6: IPv6 | None = Field(
        default=None, alias="deviceRouteSourceAddressIPv6"
    )
    interface_exclude: str | None = None
    interface_prefix: str | None = None
    interface_refresh_interval: Interval | None = None
    ip_forwarding: Switch | None = None
    ipv4_elevated_route_priority: RoutePriority | None = None
    ipv4_normal_route_priority: RoutePriority | None = None
    ipv6_elevated_route_priority: RoutePriority | None = None
    ipv6_normal_route_priority: RoutePriority | None = None
    ipv6_support: bool | None = None
    live_migration_route_convergence_time: Interval | None = None
    local_subnet_l2_reachability: Literal["Disabled", "PodsAndLoadBalancers"] | None = None
    local_subnet_l2_reachability_refresh_interval: Interval | None = None
    program_cluster_routes: (
        Literal["Enabled", "Disabled", "EnabledIPIPOnly", "EnabledNoEncapOnly"] | None
    ) = None
    remove_external_routes: bool | None = None
    route_refresh_interval: Interval | None = None
    route_source: Annotated[Literal["WorkloadIPs", "CalicoIPAM"], ANY_CASE] | None = None
    route_sync_disabled: bool | None = None
    route_table_range: RouteTableRange | None = None
    route_table_ranges: list[RouteTableIDRange] | None = None
    # VXLAN, IPIP, MTU
    allow_ipip_packets_from_workloads: bool | None = Field(
        default=None, alias="allowIPIPPacketsFromWorkloads"
    )
    allow_vxlan_packets_from_workloads: bool | None = Field(
        default=None, alias="allowVXLANPacketsFromWorkloads"
    )
    ipip_enabled: bool | None = None
    ipip_mtu: Number | None = Field(default=None, alias="ipipMTU")
    mtu_iface_pattern: Regexp | None = None
    require_mtu_file: bool | None = Field(default=None, alias="requireMTUFile")
    vxlan_enabled: bool | None = None
    vxlan_mtu: Number | None = Field(default=None, alias="vxlanMTU")
    vxlan_mtu_v6: Number | None = Field(default=None, alias="vxlanMTUV6")
    vxlan_port: Number | None = None
    vxlan_vni: Number | None = Field(default=None, alias="vxlanVNI")
    # WireGuard
    wireguard_enabled: bool | None = None
    wireguard_enabled_v6: bool | None = None
    wireguard_host_encryption_enabled: bool | None = None
    wireguard_interface_name: InterfaceName | None = None
    wireguard_interface_name_v6: InterfaceName | None = None
    wireguard_keep_alive: Interval | None = None
    wireguard_listening_port: PortNumber | None = None
    wireguard_listening_port_v6: PortNumber | None = None
    wireguard_mtu: Number | None = Field(default=None, alias="wireguardMTU")
    wireguard_mtu_v6: Number | None = Field(default=None, alias="wireguardMTUV6")
    wireguard_routing_rule_priority: Annotated[int, Field(gt=0, lt=32766)] | None = None
    wireguard_threading_enabled: bool | None = None
    # Policy on this host
    default_endpoint_to_host_action: (
        Annotated[Literal["Drop", "Accept", "Return"], ANY_CASE] | None
    ) = None
    disable_conntrack_invalid_check: bool | None = None
    failsafe_inbound_host_ports: list[ProtoPort] | None = None
    failsafe_outbound_host_ports: list[ProtoPort] | None = None
    policy_sync_path_prefix: str | None = None
    sidecar_acceleration_enabled: bool | None = None
    workload_source_spoofing: Annotated[Literal["Disabled", "Any"], ANY_CASE] | None = None
    # iptables, ipsets
    chain_insert_mode: Annotated[Literal["Insert", "Append"], ANY_CASE] | None = None
    ipsets_refresh_interval: Interval | None = None
    iptables_backend: Annotated[Literal["Auto", "Legacy", "NFT"], ANY_CASE] | None = None
    iptables_filter_allow_action: AllowAction | None = None
    iptables_filter_deny_action: DenyAction | None = None
    iptables_lock_file_path: str | None = None  # Calico to 3.31
    iptables_lock_probe_interval: Interval | None = None
    iptables_lock_timeout: Interval | None = None  # Calico to 3.31
    iptables_mangle_allow_action: AllowAction | None = None
    iptables_mark_mask: Mark | None = None
    iptables_post_write_check_interval: Interval | None = None
    iptables_refresh_interval: Interval | None = None
    max_ipset_size: Number | None = None
    # nftables
    nftables_filter_allow_action: AllowAction | None = None
    nftables_filter_deny_action: DenyAction | None = None
    nftables_flow_table_data_iface_pattern: Regexp | None = None
    nftables_flow_table_offload: Literal["All", "Disabled"] | None = None
    nftables_mangle_allow_action: AllowAction | None = None
    nftables_mark_mask: Mark | None = None
    nftables_mode: Literal["Disabled", "Enabled", "Auto"] | None = None
    nftables_refresh_interval: Interval | None = None
    # NAT and services
    external_nodes_list: list[AnyCidrV4] | None = None
    floating_ips: Switch | None = Field(default=None, alias="floatingIPs")
    iptables_nat_outgoing_interface_filter: InterfaceFilter | None = Field(
        default=None, alias="iptablesNATOutgoingInterfaceFilter"
    )
    kube_node_port_ranges: Annotated[list[NumericPort], Field(max_length=7)] | None = None
    nat_outgoing_address: IPv4 | None = None
    nat_outgoing_exclusions: Literal["IPPoolsOnly", "IPPoolsAndHostIPs"] | None = None
    nat_port_range: NumericPort | None = None
    service_loop_prevention: Annotated[Literal["Drop", "Reject", "Disabled"], ANY_CASE] | None = (
        None
    )
    # Health, metrics, reports
    endpoint_reporting_delay: Interval | None = None
    endpoint_reporting_enabled: bool | None = None
    endpoint_status_path_prefix: str | None = None
    health_enabled: bool | None = None
    health_host: str | None = None
    health_port: Number | None = None
    health_timeout_overrides: list[HealthTimeoutOverride] | None = None
    prometheus_go_metrics_enabled: bool | None = None
    prometheus_metrics_ca_file: str | None = Field(default=None, alias="prometheusMetricsCAFile")
    prometheus_metrics_cert_file: str | None = None
    prometheus_metrics_client_auth: (
        Literal[
            "RequireAndVerifyClientCert",
            "RequireAnyClientCert",
            "VerifyClientCertIfGiven",
            "NoClientCert",
        ]
        | None
    ) = None
    prometheus_metrics_enabled: bool | None = None
    prometheus_metrics_host: PrometheusHost | None = None
    prometheus_metrics_key_file: str | None = None
    prometheus_metrics_port: Number | None = None
    prometheus_process_metrics_enabled: bool | None = None
    prometheus_wireguard_metrics_enabled: bool | None = Field(
        default=None, alias="prometheusWireGuardMetricsEnabled"
    )
    reporting_interval: Interval | None = None
    reporting_ttl: Interval | None = Field(default=None, alias="reportingTTL")
    usage_reporting_enabled: bool | None = None
    usage_reporting_initial_delay: Interval | None = None
    usage_reporting_interval: Interval | None = None
    # Flow logs
    flow_logs_collector_debug_trace: bool | None = None
    flow_logs_flush_interval: Interval | None = None
    flow_logs_goldmane_server: str | None = None
    flow_logs_local_reporter: Switch | None = None
    flow_logs_policy_evaluation_mode: Literal["None", "Continuous"] | None = None
    # Debugging and limits
    dataplane_driver: str | None = None
    dataplane_watchdog_timeout: Interval | None = None
    debug_disable_log_dropping: bool | None = None
    debug_host: str | None = None
    debug_memory_profile_path: str | None = None
    debug_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    debug_simulate_calc_graph_hang_after: Interval | None = None
    debug_simulate_dataplane_apply_delay: Interval | None = None
    debug_simulate_dataplane_hang_after: Interval | None = None
    feature_detect_override: FeatureOverrides | None = None
    feature_gates: FeatureGates | None = None
    go_gc_threshold: GoLimit | None = Field(default=None, alias="goGCThreshold")
    go_max_procs: GoLimit | None = None
    go_memory_limit_mb: GoLimit | None = Field(default=None, alias="goMemoryLimitMB")
    netlink_timeout: Interval | None = None
    use_internal_dataplane_driver: bool | None = None
    # eBPF, XDP
    bpf_attach_type: Literal["TC", "TCX", "Netkit"] | None = None
    bpf_ctlb_log_filter: str | None = Field(default=None, alias="bpfCTLBLogFilter")
    bpf_connect_time_load_balancing: Literal["TCP", "Enabled", "Disabled"] | None = None
    bpf_connect_time_load_balancing_enabled: bool | None = None
    bpf_conntrack_log_level: Literal["Off", "Debug"] | None = None
    bpf_conntrack_mode: Literal["Auto", "Userspace", "BPFProgram"] | None = None
    bpf_conntrack_timeouts: BPFConntrackTimeouts | None = None
    bpf_dsr_optout_cidrs: list[AnyCidr] | None = Field(default=None, alias="bpfDSROptoutCIDRs")
    bpf_data_iface_pattern: Regexp | None = None
    bpf_disable_gro_for_ifaces: Regexp | None = Field(default=None, alias="bpfDisableGROForIfaces")
    bpf_disable_unprivileged: bool | None = None
    bpf_enabled: bool | None = None
    bpf_enforce_rpf: Annotated[Literal["Disabled", "Strict", "Loose"], ANY_CASE] | None = Field(
        default=None, alias="bpfEnforceRPF"
    )
    bpf_exclude_cidrs_from_nat: list[AnyCidr] | None = Field(
        default=None, alias="bpfExcludeCIDRsFromNAT"
    )
    bpf_export_buffer_size_mb: Number | None = Field(default=None, alias="bpfExportBufferSizeMB")
    bpf_ext_to_service_connmark: Mark | None = None
    bpf_external_service_mode: Annotated[Literal["Tunnel", "DSR"], ANY_CASE] | None = None
    bpf_force_track_packets_from_ifaces: list[InterfaceFilter] | None = None
    bpf_host_conntrack_bypass: bool | None = None
    bpf_host_networked_nat_without_ctlb: Switch | None = Field(
        default=None, alias="bpfHostNetworkedNATWithoutCTLB"
    )
    bpf_ip_frag_timeout: Interval | None = Field(default=None, alias="bpfIPFragTimeout")
    bpf_ip_fragment_reassembly_enabled: bool | None = Field(
        default=None, alias="bpfIPFragmentReassemblyEnabled"
    )
    bpf_jit_hardening: Literal["Auto", "Strict"] | None = Field(
        default=None, alias="bpfJITHardening"
    )
    bpf_kube_proxy_endpoint_slices_enabled: bool | None = None  # Calico to 3.31
    bpf_kube_proxy_healthz_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    bpf_kube_proxy_iptables_cleanup_enabled: bool | None = None
    bpf_kube_proxy_min_sync_period: Interval | None = None
    bpf_l3_iface_pattern: Regexp | None = None
    bpf_log_filters: dict[InterfaceName, str] | None = None
    bpf_log_level: Annotated[Literal["Off", "Info", "Debug"], ANY_CASE] | None = None
    bpf_maglev_max_endpoints_per_service: Annotated[int, Field(gt=0, le=3000)] | None = None
    bpf_maglev_max_services: Annotated[int, Field(gt=0, le=3000)] | None = None
    bpf_map_size_conntrack: Number | None = None
    bpf_map_size_conntrack_cleanup_queue: Annotated[int, Field(ge=1)] | None = None
    bpf_map_size_conntrack_scaling: (
        Annotated[Literal["Disabled", "DoubleIfFull"], ANY_CASE] | None
    ) = None
    bpf_map_size_ipsets: Number | None = Field(default=None, alias="bpfMapSizeIPSets")
    bpf_map_size_if_state: Number | None = None
    bpf_map_size_nat_affinity: Number | None = Field(default=None, alias="bpfMapSizeNATAffinity")
    bpf_map_size_nat_backend: Number | None = Field(default=None, alias="bpfMapSizeNATBackend")
    bpf_map_size_nat_frontend: Number | None = Field(default=None, alias="bpfMapSizeNATFrontend")
    bpf_map_size_per_cpu_conntrack: Number | None = None
    bpf_map_size_route: Number | None = None
    bpf_overlay_host_source_ip: Literal["TunnelAddress", "HostAddress"] | None = Field(
        default=None, alias="bpfOverlayHostSourceIP"
    )
    bpf_psnat_ports: NumericPort | None = Field(default=None, alias="bpfPSNATPorts")
    bpf_policy_debug_enabled: bool | None = None
    bpf_profiling: Switch | None = None
    # L2Only: Calico 3.30 and 3.31
    bpf_redirect_to_peer: Literal["Enabled", "Disabled", "L2Only"] | None = None
    cgroup_v2_path: str | None = None
    generic_xdp_enabled: bool | None = Field(default=None, alias="genericXDPEnabled")
    xdp_enabled: bool | None = None
    xdp_refresh_interval: Interval | None = None
    # Others
    aws_src_dst_check: Literal["DoNothing", "Enable", "Disable"] | None = None
    istio_ambient_mode: Switch | None = None
    istio_dscp_mark: DSCP | None = Field(default=None, alias="istioDSCPMark")
    metadata_addr: str | None = None
    metadata_port: Number | None = None
    node_selector: Selector = ""
    openstack_region: OpenstackRegion | None = None
    windows_manage_firewall_rules: Switch | None = None

    def faults(self) -> Iterator[Fault]:
        """Two ways of saying which routing tables, or too many of them."""
        if self.route_table_ranges is None:
            return
        if self.route_table_range is not None:
            yield Fault(("routeTableRange",), "set", "absent, because routeTableRanges is set")
        tables = sum(part.max - part.min + 1 for part in self.route_table_ranges)
        if tables > MAX_ROUTE_TABLES:
            yield Fault(
                ("routeTableRanges",), f"{tables} tables", f"at most {MAX_ROUTE_TABLES} in all"
            )


class FelixConfiguration(CalicoResource):
    """Settings of the agent."""

    kind: Literal["FelixConfiguration"] = "FelixConfiguration"
    spec: FelixConfigurationSpec = Field(default_factory=FelixConfigurationSpec)

    @model_validator(mode="after")
    def _defaults(self) -> Self:
        """Calico's two defaults, in the cluster's object only: a node's would hide it."""
        if self.name == "default":
            self.spec.nftables_mode = self.spec.nftables_mode or "Auto"
            self.spec.nftables_flow_table_offload = (
                self.spec.nftables_flow_table_offload or "Disabled"
            )
        return self

    def faults(self) -> Iterator[Fault]:
        """A selector of nodes where the name says which nodes."""
        yield from super().faults()
        if self.spec.node_selector and (self.name == "default" or self.name.startswith("node.")):
            yield Fault(("spec", "nodeSelector"), self.spec.node_selector, f"absent in {self.name}")
