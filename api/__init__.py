"""The nouns: resources users write, their defaults, validation and error texts.

Inside: ``projectcalico.org/v3`` kinds, the Kubernetes kinds Manx reads, the registry of
all kinds, compact network addresses. Pure: no I/O, no clock, no globals.
Not inside: storage, conversion to rules.
"""
