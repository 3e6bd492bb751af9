"""The door to the cluster: one interface, several stores.

Inside: get, list, create, update, delete and watch with revisions and compare-and-swap;
the embedded SQLite store, etcd, Kubernetes; the follower that turns a store into a stream of
updates; moving all data from one store to another.
Not inside: what felix, IPAM or BGP do with the objects.
"""
