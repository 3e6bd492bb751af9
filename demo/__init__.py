"""The main job, end to end, with a check behind every sentence it prints.

Not inside: anything a product program needs.
"""
