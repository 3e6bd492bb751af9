"""The difference between what should be and what is.

Inside: ``Plan(create, update, delete)``, ``diff``, retry with back-off, per-object status.
Not inside: anything about Linux or about resources.
"""
