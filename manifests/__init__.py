"""What a cluster is installed with: CRDs and install YAML, and their renderer.

Not inside: reconcile loops.
"""
