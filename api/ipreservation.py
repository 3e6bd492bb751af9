"""IPReservation: addresses of pools that nobody is given."""

from typing import Literal

from pydantic import Field

from api.fields import AnyCidr
from api.metadata import CalicoResource, Model


class IPReservationSpec(Model):
    """spec of an IPReservation.

    Bits beyond the prefix length are ignored: 10.0.0.5/30 reserves 10.0.0.4 to 10.0.0.7.
    """

    reserved_cidrs: list[AnyCidr] = Field(default_factory=list, alias="reservedCIDRs")


class IPReservation(CalicoResource):
    """Addresses that IPAM must not give out by itself; those in use stay."""

    kind: Literal["IPReservation"] = "IPReservation"
    spec: IPReservationSpec = Field(default_factory=IPReservationSpec)
