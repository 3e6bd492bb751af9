"""IPPools whose ranges overlap: two nodes could give the same address to different pods."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from api.errors import Problem
from api.ippool import IPPool
from api.metadata import Resource
from api.net import Net
from manxctl.documents import Document


def overlaps(
    found: Sequence[Document], resources: Sequence[Resource], others: Iterable[tuple[str, Net]] = ()
) -> Iterator[str]:
    """The complaints about pools that overlap one before them, or one of ``others``.

    ``others``: names and ranges of pools that exist.
    """
    taken = list(others)
    for document, pool in zip(found, resources, strict=True):
        if not isinstance(pool, IPPool):
            continue
        for name, net in taken:
            if net.overlaps(pool.spec.net):
                expected = f"a range of its own: it overlaps {net} of IPPool {name}"
                yield document.complain(Problem("spec.cidr", pool.spec.cidr, expected))
        taken.append((pool.name, pool.spec.net))
