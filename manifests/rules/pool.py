"""IPPool."""

from __future__ import annotations

from pydantic import BaseModel

from api import ippool
from manifests.cel import Rule, given, true, without_global

IPV6 = "cidr(self.cidr).ip().family() == 6"


def _block_size(of: str) -> str:
    """The block size that holds: the default where none is given."""
    return (
        f"(has({of}.blockSize) && {of}.blockSize != 0 ? {of}.blockSize"
        f" : cidr({of}.cidr).ip().family() == 6 ? 122 : 26)"
    )


def _for(use: str, of: str = "self") -> str:
    return f"(has({of}.allowedUses) && '{use}' in {of}.allowedUses)"


def _never(mode: str) -> str:
    return f"(!{given(mode)} || self.{mode} == 'Never')"


IMMUTABLE = (
    Rule("cidr(self.cidr) == cidr(oldSelf.cidr)", "cidr is immutable"),
    Rule(f"{_block_size('self')} == {_block_size('oldSelf')}", "blockSize is immutable"),
    Rule(
        f"{_for('LoadBalancer')} == {_for('LoadBalancer', 'oldSelf')}",
        "allowedUses: LoadBalancer is neither added nor removed",
    ),
)

SIZE = (
    Rule(
        "!has(self.blockSize) || self.blockSize == 0"
        f" || ({IPV6} ? self.blockSize >= 116 && self.blockSize <= 128"
        " : self.blockSize >= 20 && self.blockSize <= 32)",
        "blockSize: 20 to 32 for an IPv4 pool, 116 to 128 for an IPv6 pool",
    ),
    Rule(
        f"{true('disabled')} || cidr(self.cidr).prefixLength() <= {_block_size('self')}",
        "cidr: a pool no smaller than a block, or a longer blockSize",
    ),
    Rule(
        "!cidr('169.254.0.0/16').containsIP(cidr(self.cidr).ip())"
        " && !cidr(self.cidr).containsIP('169.254.0.0')"
        " && !cidr('fe80::/10').containsIP(cidr(self.cidr).ip())"
        " && !cidr(self.cidr).containsIP('fe80::')",
        "cidr: no overlap with link-local 169.254.0.0/16, fe80::/10",
    ),
)

MODES = (
    Rule(f"{_never('ipipMode')} || {_never('vxlanMode')}", "ipipMode or vxlanMode must be Never"),
    Rule(f"{_never('ipipMode')} || !({IPV6})", "ipipMode must be Never for an IPv6 pool"),
)

USES = (
    Rule(
        f"!{_for('LoadBalancer')} || self.allowedUses.all(u, u == 'LoadBalancer')",
        "allowedUses: LoadBalancer alone, or without it",
    ),
    Rule(
        f"!{_for('LoadBalancer')} || ({_never('ipipMode')} && {_never('vxlanMode')})",
        "ipipMode and vxlanMode must be Never for a LoadBalancer pool",
    ),
    Rule(
        f"!{_for('LoadBalancer')} || !{true('disableBGPExport')}",
        "disableBGPExport must be false for a LoadBalancer pool",
    ),
    Rule(
        f"!{_for('LoadBalancer')} || !{given('nodeSelector')} || self.nodeSelector == 'all()'",
        "nodeSelector must be all() for a LoadBalancer pool",
    ),
    Rule(
        f"!{_for('Tunnel')} || !{given('namespaceSelector')}",
        "namespaceSelector must be absent for a pool whose allowedUses hold Tunnel",
    ),
)

RULES: dict[type[BaseModel], tuple[Rule, ...]] = {
    ippool.IPPoolSpec: (
        *IMMUTABLE,
        *SIZE,
        *MODES,
        *USES,
        *without_global("nodeSelector", "namespaceSelector"),
    ),
    ippool.IPPool: (),  # immutable fields: rules of the spec
}
