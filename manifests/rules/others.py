"""HostEndpoint, NetworkSet and what programs write.

Not said: labels and annotations, of which a rule on an object sees none, and IPAM's own book-
keeping, where a rule would cost time with every address.
"""

from __future__ import annotations

from pydantic import BaseModel

from api import controllers, hostendpoint, ipam, networkset, nodestatus
from manifests.cel import Rule, given, oneof_text

HAS_PORTS = oneof_text("protocol", "TCP", "UDP", "SCTP", 6, 17, 132)

RULES: dict[type[BaseModel], tuple[Rule, ...]] = {
    controllers.HostEndpointTemplate: (),
    networkset.GlobalNetworkSet: (),
    networkset.NetworkSet: (),
    ipam.IPAMBlockSpec: (),
    ipam.BlockAffinitySpec: (),
    nodestatus.CalicoNodeStatusSpec: (),  # a set
    hostendpoint.EndpointPort: (Rule(HAS_PORTS, "protocol: TCP, UDP or SCTP, which have ports"),),
    hostendpoint.HostEndpointSpec: (
        Rule(
            f"{given('interfaceName')} || {given('expectedIPs')}",
            "interfaceName is required, unless expectedIPs is set",
        ),
    ),
}
