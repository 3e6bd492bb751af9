"""IPReservation: addresses of pools that nobody is given."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from api.fields import AnyCidr, refuse
from api.metadata import CalicoResource, Model


def _with_length(text: str) -> str:
    if "/" not in text:
        raise refuse("a CIDR: for one address, with /32 or /128")
    return text


# Bits beyond the prefix length are ignored: 10.0.0.5/30 reserves 10.0.0.4 to 10.0.0.7.
ReservedCidr = Annotated[AnyCidr, AfterValidator(_with_length)]


class IPReservationSpec(Model):
    """spec of an IPReservation."""

    reserved_cidrs: list[ReservedCidr] = Field(default_factory=list, alias="reservedCIDRs")


class IPReservation(CalicoResource):
    """Addresses that IPAM must not give out by itself; those in use stay."""

    kind: Literal["IPReservation"] = "IPReservation"
    spec: IPReservationSpec = Field(default_factory=IPReservationSpec)
