"""Who may talk to whom.

Inside: the selector language and the label index, tiers and ordering, the compiled
rule model, Kubernetes NetworkPolicy conversion, and ``evaluate``, the verdict for one flow.
Not inside: iptables, nftables, I/O of any kind.
"""
