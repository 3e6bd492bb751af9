"""What IPAM stores, in the shape of Calico's CRDs: blocks, who claims them, who holds addresses."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from api.fields import Cidr
from api.metadata import CalicoResource, Checked, Fault, Model
from api.net import Net, parse_net

Count = Annotated[int, Field(ge=0, lt=2**64)]


class AllocationAttribute(Model):
    """Who holds addresses of a block: a handle and what it said of itself."""

    handle_id: str | None = Field(default=None, alias="handle_id")
    secondary: dict[str, str] = Field(default_factory=dict)
    alternate_owner_attrs: dict[str, str] = Field(default_factory=dict)
    released_at: str | None = None


class IPAMBlockSpec(Checked):
    """spec of an IPAMBlock.

    ``allocations``: for each address of the block (by ordinal) the index of its element of
    ``attributes``, None when free. ``unallocated``: free ordinals, the next one first.
    ``sequence_number`` grows by one with every write.
    """

    kept: ClassVar[frozenset[str]] = frozenset(
        ("deleted", "strictAffinity", "sequenceNumber", "sequenceNumberForAllocation")
    )

    cidr: Cidr
    affinity: Annotated[str, Field(pattern=r"^(host|virtual):[a-zA-Z0-9\.\-_]+$")] | None = None
    affinity_claim_time: str | None = None
    allocations: list[Count | None]
    unallocated: list[Count]
    attributes: list[AllocationAttribute]
    sequence_number: Count = 0
    sequence_number_for_allocation: dict[str, Count] = Field(default_factory=dict)
    deleted: bool = False
    strict_affinity: bool = False

    @property
    def net(self) -> Net:
        """``cidr`` as a Net."""
        return parse_net(self.cidr)

    def faults(self) -> Iterator[Fault]:
        """Indices that point outside the block or its attributes."""
        size = self.net.size
        if len(self.allocations) != size:
            yield Fault(
                ("allocations",), len(self.allocations), f"{size} elements, one for each address"
            )
        for ordinal, index in enumerate(self.allocations):
            if index is not None and index >= len(self.attributes):
                yield Fault(
                    ("allocations", ordinal), index, "the index of an element of attributes"
                )
        for position, ordinal in enumerate(self.unallocated):
            if ordinal >= size:
                yield Fault(("unallocated", position), ordinal, f"an ordinal below {size}")


class IPAMBlock(CalicoResource):
    """A block of addresses and who holds them. Named as its CIDR: ``10-0-0-0-26``."""

    kind: Literal["IPAMBlock"] = "IPAMBlock"
    spec: IPAMBlockSpec


class BlockAffinitySpec(Checked):
    """spec of a BlockAffinity. State "" is an old spelling of confirmed, type absent of host."""

    kept: ClassVar[frozenset[str]] = frozenset(("state", "deleted"))

    state: Literal["", "confirmed", "pending", "pendingDeletion"] = ""
    node: str
    type: str | None = None
    cidr: Cidr
    deleted: bool = False

    @property
    def net(self) -> Net:
        """``cidr`` as a Net."""
        return parse_net(self.cidr)

    def faults(self) -> Iterator[Fault]:
        """The mark Calico sets in the moment before it deletes the object."""
        if self.deleted:
            yield Fault(("deleted",), True, "false: the affinity is about to go, not to be used")


class BlockAffinity(CalicoResource):
    """A node's claim on a block. Named ``<node>-10-0-0-0-26``."""

    kind: Literal["BlockAffinity"] = "BlockAffinity"
    spec: BlockAffinitySpec


class IPAMHandleSpec(Model):
    """spec of an IPAMHandle: how many addresses it holds in which block (by CIDR)."""

    kept: ClassVar[frozenset[str]] = frozenset(("deleted",))

    handle_id: str = Field(alias="handleID")
    block: dict[str, Count]
    deleted: bool = False


class IPAMHandle(CalicoResource):
    """Who holds addresses, and in which blocks. Named by the lower-cased handle id."""

    kind: Literal["IPAMHandle"] = "IPAMHandle"
    spec: IPAMHandleSpec


class IPAMConfigurationSpec(Model):
    """spec of the IPAMConfiguration. ``max_blocks_per_host`` 0 means 20."""

    kept: ClassVar[frozenset[str]] = frozenset(("strictAffinity",))
    verbatim: ClassVar[frozenset[str]] = frozenset(("kubeVirtVMAddressPersistence",))

    strict_affinity: bool = False
    auto_allocate_blocks: bool = True
    max_blocks_per_host: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    kubevirt_vm_address_persistence: Literal["Enabled", "Disabled"] | None = Field(
        default=None, alias="kubeVirtVMAddressPersistence"
    )
    ip_cooldown_seconds: Annotated[int, Field(ge=0, le=1200)] = 0


class IPAMConfiguration(CalicoResource):
    """IPAM of the whole cluster; the one that counts is named ``default``."""

    kind: Literal["IPAMConfiguration"] = "IPAMConfiguration"
    spec: IPAMConfigurationSpec = Field(default_factory=IPAMConfigurationSpec)
