"""IPPool: addresses for pods, in blocks that nodes claim."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from api.fields import Cidr, Selector
from api.metadata import CalicoResource, Checked, Fault, Status
from api.net import V4, V6, Net, parse_net

EncapsulationMode = Literal["Never", "Always", "CrossSubnet"]
AllowedUse = Literal["Workload", "Tunnel", "LoadBalancer"]

DEFAULT_BLOCK_SIZE = {V4: 26, V6: 122}
BLOCK_SIZES = {V4: (20, 32), V6: (116, 128)}
LINK_LOCAL = (parse_net("169.254.0.0/16"), parse_net("fe80::/10"))


class IPPoolSpec(Checked):
    """spec of an IPPool.

    Absent ``block_size`` becomes 26 (IPv4) or 122 (IPv6); absent ``allowed_uses`` Workload and
    Tunnel, or Workload alone where a ``namespace_selector`` excludes tunnels.
    """

    verbatim: ClassVar[frozenset[str]] = frozenset(("assignmentMode",))

    cidr: Cidr
    block_size: Annotated[int, Field(ge=0, le=128)] = 0
    ipip_mode: EncapsulationMode = "Never"
    vxlan_mode: EncapsulationMode = "Never"
    nat_outgoing: bool = False
    disabled: bool = False
    disable_bgp_export: bool = Field(default=False, alias="disableBGPExport")
    node_selector: Selector = "all()"
    namespace_selector: Selector = ""
    allowed_uses: list[AllowedUse] = Field(default_factory=list)
    assignment_mode: Literal["Automatic", "Manual"] = "Automatic"

    @property
    def net(self) -> Net:
        """``cidr`` as a Net."""
        return parse_net(self.cidr)

    def model_post_init(self, context: Any, /) -> None:
        """Fill the defaults that depend on others."""
        if not self.block_size:
            self.block_size = DEFAULT_BLOCK_SIZE[self.net.version]
        if not self.allowed_uses:
            self.allowed_uses.append("Workload")
            if not self.namespace_selector:
                self.allowed_uses.append("Tunnel")

    def faults(self) -> Iterator[Fault]:
        """Sizes that do not fit, ranges that cannot be pools, modes that exclude each other."""
        net = self.net
        least, most = BLOCK_SIZES[net.version]
        if not least <= self.block_size <= most:
            yield Fault(
                ("blockSize",), self.block_size, f"{least} to {most} for an IPv{net.version} pool"
            )
        elif net.length > self.block_size and not self.disabled:
            yield Fault(
                ("cidr",),
                self.cidr,
                f"a pool no smaller than a block (/{self.block_size}), or a longer blockSize",
            )
        if any(net.overlaps(range_) for range_ in LINK_LOCAL):
            yield Fault(
                ("cidr",), self.cidr, "no overlap with link-local 169.254.0.0/16, fe80::/10"
            )
        if self.ipip_mode != "Never" and self.vxlan_mode != "Never":
            yield Fault(
                ("ipipMode",), self.ipip_mode, "Never, because vxlanMode is set; or unset that"
            )
        if self.ipip_mode != "Never" and net.version == V6:
            yield Fault(("ipipMode",), self.ipip_mode, "Never for an IPv6 pool")
        for field, text in (
            ("nodeSelector", self.node_selector),
            ("namespaceSelector", self.namespace_selector),
        ):
            if "global(" in text:
                yield Fault((field,), text, "a selector without global()")
        yield from self._use_faults()

    def _use_faults(self) -> Iterator[Fault]:
        uses = self.allowed_uses
        if "Tunnel" in uses and self.namespace_selector:
            yield Fault(
                ("namespaceSelector",),
                self.namespace_selector,
                "absent for a pool whose allowedUses hold Tunnel",
            )
        if "LoadBalancer" not in uses:
            return
        if len(set(uses)) > 1:
            yield Fault(("allowedUses",), uses, "LoadBalancer alone, or without it")
        if self.ipip_mode != "Never" or self.vxlan_mode != "Never":
            field = "ipipMode" if self.ipip_mode != "Never" else "vxlanMode"
            yield Fault((field,), "set", "Never for a LoadBalancer pool")
        if self.disable_bgp_export:
            yield Fault(("disableBGPExport",), True, "false for a LoadBalancer pool")
        if self.node_selector != "all()":
            yield Fault(("nodeSelector",), self.node_selector, "all() for a LoadBalancer pool")


class IPPool(CalicoResource):
    """A pool of addresses."""

    kind: Literal["IPPool"] = "IPPool"
    spec: IPPoolSpec
    status: Status | None = None

    def update_faults(self, old: Self) -> Iterator[Fault]:
        """Another range or block size, under which existing blocks would not fit."""
        if self.spec.net != old.spec.net:
            yield Fault(("spec", "cidr"), self.spec.cidr, f"{old.spec.cidr}, as it is: immutable")
        if self.spec.block_size != old.spec.block_size:
            yield Fault(
                ("spec", "blockSize"),
                self.spec.block_size,
                f"{old.spec.block_size}, as it is: immutable",
            )
        was, now = ("LoadBalancer" in pool.spec.allowed_uses for pool in (old, self))
        if was != now:
            yield Fault(
                ("spec", "allowedUses"),
                self.spec.allowed_uses,
                "LoadBalancer still there" if was else "LoadBalancer still absent",
            )
