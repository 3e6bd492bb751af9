"""ClusterInformation: what the cluster says of itself. Written by programs, read by people."""

from typing import Literal

from pydantic import Field

from api.metadata import CalicoResource, Model


class ClusterInformationSpec(Model):
    """spec of the ClusterInformation. ``datastore_ready`` false: agents wait (a migration)."""

    cluster_guid: str | None = Field(default=None, alias="clusterGUID")
    cluster_type: str | None = None
    calico_version: str | None = None
    datastore_ready: bool | None = None
    variant: str | None = None


class ClusterInformation(CalicoResource):
    """The cluster's identity and state; the one that counts is named ``default``."""

    kind: Literal["ClusterInformation"] = "ClusterInformation"
    spec: ClusterInformationSpec = Field(default_factory=ClusterInformationSpec)
