"""BGP of a node: peers, advertisements, RIB, the ExaBGP speaker, learned routes to the kernel.

Not inside: pod policy.

- ``resources``, ``settings``, ``peers``, ``sessions``, ``pools``, ``services``, ``filters``: from
  objects to what should be
- ``adj_rib_in``, ``decision``, ``nexthops``, ``rib``: from what peers tell to what is used
- ``advertise``, ``fib``: what peers are told, what the kernel gets
- ``speaker`` and what it is made of: ``process`` and ``exabgp_main`` (a program that outlives us),
  ``config`` and ``configfile``, ``relay`` (its child), ``channel``, ``messages``, ``dialogue``,
  ``announcer``
- ``tracker``, ``words``, ``status``: what people see
- ``watch``, ``core``, ``agent``: the kernel's side, the whole, the loop
"""
