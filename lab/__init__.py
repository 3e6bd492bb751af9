"""Whole clusters in network namespaces: racks, routers, nodes, pods.

Used by the demo, the tests and by people who design a network before they buy it.
Not inside: assertions.
"""
