"""NetworkSet and GlobalNetworkSet: networks with labels, which policies select."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from api.fields import AnyCidr
from api.metadata import CalicoResource, Fault, Model

NAMESPACE_LABEL = "projectcalico.org/namespace"  # set by the agent, never by users


class NetworkSetSpec(Model):
    """spec of a NetworkSet: addresses and CIDRs; bits beyond a prefix length are ignored."""

    nets: list[AnyCidr] = Field(default_factory=list)


class GlobalNetworkSet(CalicoResource):
    """Networks for policies of all namespaces."""

    kind: Literal["GlobalNetworkSet"] = "GlobalNetworkSet"
    spec: NetworkSetSpec = Field(default_factory=NetworkSetSpec)

    def faults(self) -> Iterator[Fault]:
        """A label that is not the user's to give."""
        yield from super().faults()
        yield from _label_faults(self)


class NetworkSet(CalicoResource):
    """Networks for policies of its namespace (and global ones)."""

    namespaced: ClassVar[bool] = True

    kind: Literal["NetworkSet"] = "NetworkSet"
    spec: NetworkSetSpec = Field(default_factory=NetworkSetSpec)

    def faults(self) -> Iterator[Fault]:
        """A label that is not the user's to give."""
        yield from super().faults()
        yield from _label_faults(self)


def _label_faults(resource: Any) -> Iterator[Fault]:
    if NAMESPACE_LABEL in resource.metadata.labels:
        yield Fault(
            ("metadata", "labels", NAMESPACE_LABEL),
            resource.metadata.labels[NAMESPACE_LABEL],
            "absent: the agent sets this label itself",
        )
