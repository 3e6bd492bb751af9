"""The door to Linux: one module a kernel table.

Inside: links, routes, neighbours, FDB, iptables, ipsets, sysctl, network namespaces. Each
module can read what we own and apply a plan.
Not inside: resources, policy, decisions.
"""
