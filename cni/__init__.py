"""Pod wiring: the tiny client a runtime executes, the daemon behind it, its installation.

Not inside: policy.
"""
