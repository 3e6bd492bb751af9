"""BGP of a node: peers, advertisements, RIB, the ExaBGP speaker, learned routes to the kernel.

Not inside: pod policy.
"""
