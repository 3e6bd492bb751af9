"""Benchmarks: one module each, one JSON object out, both sides of a comparison in turn.

Not inside: assertions about time.
"""
