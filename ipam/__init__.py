"""Addresses and blocks.

Inside: block arithmetic (pure), the affinity claim protocol, allocation and release; what
disagrees with what (audit), and what nobody uses any more (collection).
Not inside: how a store keeps it.
"""
