"""Addresses and blocks.

Inside: block arithmetic (pure), the affinity claim protocol, allocation and release.
Not inside: how a store keeps it.
"""
