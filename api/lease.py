"""Lease of Kubernetes: which of several programs leads."""

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from api.fields import Timestamp
from api.kubernetes import KubernetesMeta, KubernetesModel
from api.metadata import Resource

Number = Annotated[int, Field(ge=0, lt=2**31)]


class LeaseSpec(KubernetesModel):
    """spec of a Lease. Its times are the holder's clock's: nobody else may reckon with them."""

    holder_identity: str | None = None
    lease_duration_seconds: Number | None = None
    acquire_time: Timestamp | None = None
    renew_time: Timestamp | None = None
    lease_transitions: Number | None = None


class Lease(Resource):
    """Who leads, and for how long after its last renewal."""

    model_config = ConfigDict(extra="ignore")
    namespaced: ClassVar[bool] = True

    api_version: Literal["coordination.k8s.io/v1"] = "coordination.k8s.io/v1"
    kind: Literal["Lease"] = "Lease"
    metadata: KubernetesMeta
    spec: LeaseSpec = Field(default_factory=LeaseSpec)
