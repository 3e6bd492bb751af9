"""ClusterInformation: what the cluster says of itself. Written by programs, read by people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

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


def is_locked(value: Mapping[str, Any] | None) -> bool:
    """Whether ``ClusterInformation default`` tells agents to change nothing.

    ``value`` is the stored object, whatever it is, or None where there is none.
    """
    spec = (value or {}).get("spec")
    return isinstance(spec, Mapping) and spec.get("datastoreReady") is False
