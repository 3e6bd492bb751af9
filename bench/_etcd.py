"""The etcd store, beside grpcio with nothing around it; both in turn on one server.

Both change a block of 2 KB, write it as JSON where it is unchanged, and know its new revision.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import grpc
import orjson

from bench import datastore
from datastore import etcd_pb2 as pb
from datastore.etcd import EtcdDatastore
from datastore.etcd_client import TXN, EtcdSettings
from datastore.etcd_keys import path_of
from tests.support.etcd import single_node

_SLICE_SECONDS = 0.25
_SLICES = 20  # of each side


def run() -> dict[str, float]:
    """Measure."""
    with single_node() as server:
        settings = EtcdSettings(tuple(server.endpoints))
        connect = partial(EtcdDatastore, settings)
        figures = datastore.measure(connect)
        figures |= _beside_grpcio(connect, server.endpoints[0])
        _fill(server.endpoints[0])
        return figures | datastore.cost_of_list(connect, "WorkloadEndpoint").named("list_10k")


def _beside_grpcio(connect: datastore.Connect, endpoint: str) -> dict[str, float]:
    store = connect()
    entry = store.create(*datastore.block(10))

    def ours() -> None:
        nonlocal entry
        entry.value["spec"]["sequenceNumber"] += 1
        entry = store.update(entry.key, entry.value, entry.revision)

    with grpc.insecure_channel(endpoint) as channel:
        txn = _txn(channel)
        key, value = datastore.block(11)
        path, spec = path_of(key, value).encode(), value["spec"]

        def put() -> pb.RequestOp:
            return pb.RequestOp(request_put=pb.PutRequest(key=path, value=orjson.dumps(spec)))

        revision = txn(pb.TxnRequest(success=[put()])).header.revision

        def plain() -> None:
            nonlocal revision
            spec["sequenceNumber"] += 1
            same = pb.Compare(target=pb.Compare.MOD, key=path, mod_revision=revision)
            answer = txn(pb.TxnRequest(compare=[same], success=[put()]))
            if not answer.succeeded:
                raise RuntimeError("somebody else writes to this etcd")
            revision = answer.header.revision

        pairs = [(_rate(ours), _rate(plain)) for _ in range(_SLICES)]
    store.close()
    return {
        "cas_one_client_per_s": statistics.median(mine for mine, _ in pairs),
        "raw_cas_per_s": statistics.median(raw for _, raw in pairs),
        "cas_ratio": statistics.median(mine / raw for mine, raw in pairs),
    }


def _rate(side: Callable[[], None]) -> float:
    count, start = 0, time.monotonic()
    while time.monotonic() < start + _SLICE_SECONDS:
        side()
        count += 1
    return count / (time.monotonic() - start)


def _txn(channel: grpc.Channel) -> Callable[[pb.TxnRequest], pb.TxnResponse]:
    txn: Callable[[pb.TxnRequest], pb.TxnResponse] = channel.unary_unary(
        TXN.path,
        request_serializer=pb.TxnRequest.SerializeToString,
        response_deserializer=pb.TxnResponse.FromString,
    )
    return txn


def _fill(endpoint: str) -> None:
    """The WorkloadEndpoints to list, a hundred a transaction."""
    puts = [
        pb.RequestOp(
            request_put=pb.PutRequest(key=path_of(key, value).encode(), value=orjson.dumps(value))
        )
        for key, value in map(datastore.endpoint, range(datastore.OBJECTS))
    ]
    with grpc.insecure_channel(endpoint) as channel:
        txn = _txn(channel)
        for first in range(0, len(puts), 100):
            txn(pb.TxnRequest(success=puts[first : first + 100]))
