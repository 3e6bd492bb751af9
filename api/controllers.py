"""KubeControllersConfiguration: settings of the controllers of the cluster."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from api.fields import AnyCidr, Duration, Name, Regexp, Selector
from api.metadata import CalicoResource, Checked, Fault, Model, annotation_faults, label_faults

Switch = Literal["Enabled", "Disabled"]
TcpPort = Annotated[int, Field(ge=0, le=65535)]


class HostEndpointTemplate(Checked):
    """HostEndpoints to make for every node of ``node_selector``.

    One for the node's addresses within ``interface_cidrs``, one for each interface that
    ``interface_pattern`` matches.
    """

    generate_name: Name | None = None
    interface_cidrs: list[AnyCidr] = Field(default_factory=list, alias="interfaceCIDRs")
    interface_pattern: Regexp | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    node_selector: Selector = ""

    def faults(self) -> Iterator[Fault]:
        """Labels and annotations that no object can have."""
        yield from label_faults(self.labels, ("labels",))
        yield from annotation_faults(self.annotations, ("annotations",))


class AutoHostEndpointConfig(Model):
    """Which HostEndpoints are made by themselves."""

    auto_create: Switch | None = None
    create_default_host_endpoint: Switch | None = None
    templates: list[HostEndpointTemplate] = Field(default_factory=list)


class NodeControllerConfig(Model):
    """Of the controller that follows nodes and returns what dead ones held."""

    reconciler_period: Duration | None = None
    sync_labels: Switch | None = None
    host_endpoint: AutoHostEndpointConfig | None = None
    leak_grace_period: Duration | None = None


class ReconcilerConfig(Model):
    """Of a controller that compares now and then."""

    reconciler_period: Duration | None = None


class LoadBalancerControllerConfig(Model):
    """Of the controller that gives services addresses."""

    assign_ips: Literal["AllServices", "RequestedServicesOnly"] = Field(
        default="AllServices", alias="assignIPs"
    )


class MigrationControllerConfig(Model):
    """Of the controller that mends what older versions wrote."""

    policy_name_migrator: Switch = "Enabled"


class PolicyMigrationControllerConfig(Model):
    """The same in Calico 3.32, whose clusters have it whether anybody wrote it or not."""

    enabled: Switch = "Enabled"


class ControllersConfig(Model):
    """Which controllers run: those that are present."""

    node: NodeControllerConfig | None = None
    policy: ReconcilerConfig | None = None
    workload_endpoint: ReconcilerConfig | None = None
    service_account: ReconcilerConfig | None = None
    namespace: ReconcilerConfig | None = None
    load_balancer: LoadBalancerControllerConfig | None = None
    migration: MigrationControllerConfig | None = None
    policy_migration: PolicyMigrationControllerConfig | None = None


class KubeControllersConfigurationSpec(Model):
    """spec of the KubeControllersConfiguration."""

    kept: ClassVar[frozenset[str]] = frozenset(("controllers",))

    log_severity_screen: (
        Literal["None", "Debug", "Info", "Warning", "Error", "Fatal", "Panic"] | None
    ) = None
    health_checks: Switch = "Enabled"
    etcd_v3_compaction_period: Duration | None = None
    prometheus_metrics_port: TcpPort | None = None
    controllers: ControllersConfig = Field(default_factory=ControllersConfig)
    debug_profile_port: TcpPort | None = None


class KubeControllersConfigurationStatus(Model):
    """status of the KubeControllersConfiguration: what holds, with the environment's part."""

    running_config: KubeControllersConfigurationSpec | None = None
    environment_vars: dict[str, str] = Field(default_factory=dict)


class KubeControllersConfiguration(CalicoResource):
    """Settings of the controllers; the one that counts is named ``default``."""

    kind: Literal["KubeControllersConfiguration"] = "KubeControllersConfiguration"
    spec: KubeControllersConfigurationSpec = Field(default_factory=KubeControllersConfigurationSpec)
    status: KubeControllersConfigurationStatus | None = None
