"""Loops that run once in a cluster: IPAM garbage collection and audit, nodes that are gone.

Inside: leader election by a lease in the datastore, and the loops that the leader runs.
Not inside: node-local work; what is garbage (``ipam.collector``), what disagrees (``ipam.audit``).
"""
