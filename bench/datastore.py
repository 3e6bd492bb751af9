"""How fast the datastores are, beside plain clients of the same servers in the same run.

For each store: compare-and-swaps a second, the delay of a watch, and what it takes to list ten
thousand WorkloadEndpoints (memory beyond that of the imported program). The servers are those of
the tests: Debian's etcd, and the kube-apiserver built from its Go module.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

SECTIONS = ("sqlite", "etcd", "kubernetes")


def run(sections: Sequence[str] = SECTIONS) -> dict[str, float]:
    """Measure stores; the names of a store's figures begin with its own."""
    figures: dict[str, float] = {}
    for section in sections:
        store = import_module(f"bench._{section}")  # needs no more than its own server
        figures |= {f"{section}.{name}": value for name, value in store.run().items()}
    return figures
