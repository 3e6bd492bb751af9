"""The command line: one file a verb.

Not inside: logic that another program needs.
"""
