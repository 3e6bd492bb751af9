"""The agent of a node: snapshot, calculation, desired tables, ordered apply, status.

Not inside: BGP, pod wiring.
"""
