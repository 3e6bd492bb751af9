"""BGP of a node: peers, advertisements, filters, RIB, the engines, learned routes to the kernel.

Not inside: pod policy.

- ``resources``, ``settings``, ``peers``, ``sessions``, ``pools``, ``services``, ``filters``,
  ``secrets``, ``workloads``: from objects to what should be
- ``attributes``, ``adj_rib_in``, ``decision``, ``nexthops``, ``rib``: from what peers tell to what
  is used
- ``advertise``, ``announcement``, ``fib``: what peers are told, what the kernel gets
- ``engine``, ``engines``, ``choice``: what both engines are to the others, and which one runs
- ``speaker`` and what it is made of: ``process`` and ``exabgp_main`` (a program that outlives us),
  ``config`` and ``configfile``, ``wire``, ``relay`` and ``relay_main`` (its child), ``channel``,
  ``messages``, ``dialogue``, ``announcer``
- ``bird_engine`` and what it is made of: ``process``, ``birdc``, and the modules named ``bird_…``
- ``detector`` and its program ``bfd_main``, ``bfd``: peers that are dead, seen at once
- ``tracker``, ``drops``, ``words``, ``peerstatus``, ``status``: what people see
- ``watch``, ``ways``, ``keepsake``, ``core``, ``agent``: the kernel's side, the whole, the loop
- ``lean``: what its process need not carry
"""
