"""Loops that run once in a cluster: operator, IPAM garbage collection, node controllers.

Not inside: node-local work.
"""
