"""The etcd store, beside grpcio with nothing around it; all sides in turn on one server.

Each side has a block of 2 KB, changes its sequence number, writes it as JSON where it is
unchanged, and knows its new revision.
"""

from __future__ import annotations

import queue
import statistics
from collections.abc import Callable
from functools import partial

import grpc
import orjson

from bench._measure import (
    OBJECTS,
    Connect,
    Side,
    cost,
    cost_of_list,
    in_turn,
    measure,
    plain_delays,
    quantiles,
    ratio,
)
from bench._objects import block, endpoint
from datastore import etcd_pb2 as pb
from datastore.etcd import EtcdDatastore
from datastore.etcd_client import RANGE, TXN, WATCH, EtcdSettings
from datastore.etcd_keys import path_of, ranges
from datastore.interface import JSON, Datastore
from tests.support.etcd import single_node

Txn = Callable[[pb.TxnRequest], pb.TxnResponse]


def run() -> dict[str, float]:
    """Measure."""
    with single_node() as etcd:
        (server,) = etcd.endpoints
        connect = partial(EtcdDatastore, EtcdSettings((server,)))
        figures = measure(connect)
        figures |= quantiles("raw_watch", _raw_watch(connect, server))
        figures |= _beside_grpcio(connect, server)
        _fill(server)
        figures |= cost_of_list(connect, "WorkloadEndpoint").named("list_10k")
        return figures | cost(partial(_raw_list, server)).named("raw_list_10k")


def _raw_watch(connect: Connect, server: str) -> list[float]:
    """A stream of events under the path of blocks, and their JSON."""
    (of_blocks, *_) = ranges("IPAMBlock")
    create = pb.WatchCreateRequest(key=of_blocks.begin, range_end=of_blocks.end)
    requests: queue.SimpleQueue[pb.WatchRequest | None] = queue.SimpleQueue()
    requests.put(pb.WatchRequest(create_request=create))
    with grpc.insecure_channel(server) as channel:
        watch = channel.stream_stream(
            WATCH.path,
            request_serializer=pb.WatchRequest.SerializeToString,
            response_deserializer=pb.WatchResponse.FromString,
        )
        answers = watch(iter(requests.get, None))
        if not next(answers).created:
            raise RuntimeError("etcd made no watch")

        def heard() -> list[JSON]:
            values = [orjson.loads(event.kv.value) for event in next(answers).events]
            return [{"metadata": value.get("metadata") or {}} for value in values]

        delays = plain_delays(connect, heard)
        requests.put(None)
        answers.cancel()
        return delays


def _raw_list(server: str) -> Callable[[], int]:
    """All endpoints in parts, and their JSON."""
    (of_endpoints,) = ranges("WorkloadEndpoint")
    channel = grpc.insecure_channel(server)
    ask = channel.unary_unary(
        RANGE.path,
        request_serializer=pb.RangeRequest.SerializeToString,
        response_deserializer=pb.RangeResponse.FromString,
    )
    end = of_endpoints.end
    kept: list[JSON] = []

    def list_all() -> int:
        start, more = of_endpoints.begin, True
        while more:
            part = ask(pb.RangeRequest(key=start, range_end=end, limit=500))
            kept.extend(orjson.loads(kv.value) for kv in part.kvs)
            start, more = part.kvs[-1].key + b"\0", part.more
        return len(kept)

    return list_all


def _beside_grpcio(connect: Connect, server: str) -> dict[str, float]:
    store = connect()
    with grpc.insecure_channel(server) as channel:
        txn = _txn(channel)
        sides = {
            "ours": _ours(store, 10),
            "read_back": _read_back(store, 11),
            "raw": _raw(txn, 12),
            "fixed_bytes": _fixed_bytes(txn, 13),
        }
        rates = in_turn(sides)
    store.close()
    return {
        "cas_one_client_per_s": statistics.median(rates["ours"]),
        "raw_cas_per_s": statistics.median(rates["raw"]),
        "cas_ratio": ratio(rates["ours"], rates["raw"]),
        "cas_ratio_read_back": ratio(rates["read_back"], rates["raw"]),
        "cas_ratio_fixed_bytes": ratio(rates["ours"], rates["fixed_bytes"]),
    }


def _ours(store: Datastore, number: int) -> Side:
    """The store, as Manx's programs use it: the value is the writer's own."""
    key, value = block(number)
    revision = store.create(key, value).revision

    def swap() -> None:
        nonlocal revision
        value["spec"]["sequenceNumber"] += 1
        revision = store.update(key, value, revision).revision

    return swap


def _read_back(store: Datastore, number: int) -> Side:
    """The store, when the next value is made of the one that an update returns."""
    entry = store.create(*block(number))

    def swap() -> None:
        nonlocal entry
        entry.value["spec"]["sequenceNumber"] += 1
        entry = store.update(entry.key, entry.value, entry.revision)

    return swap


def _raw(txn: Txn, number: int) -> Side:
    """Grpcio, and orjson for the value."""
    key, value = block(number)
    path, spec = path_of(key, value).encode(), value["spec"]
    swap_bytes = _swap_bytes(txn, path)

    def swap() -> None:
        spec["sequenceNumber"] += 1
        swap_bytes(orjson.dumps(spec))

    return swap


def _fixed_bytes(txn: Txn, number: int) -> Side:
    """Grpcio alone: the value is the same bytes every time."""
    key, value = block(number)
    return partial(_swap_bytes(txn, path_of(key, value).encode()), orjson.dumps(value["spec"]))


def _swap_bytes(txn: Txn, path: bytes) -> Callable[[bytes], None]:
    def put(data: bytes) -> pb.RequestOp:
        return pb.RequestOp(request_put=pb.PutRequest(key=path, value=data))

    revision = txn(pb.TxnRequest(success=[put(b"{}")])).header.revision

    def swap(data: bytes) -> None:
        nonlocal revision
        same = pb.Compare(target=pb.Compare.MOD, key=path, mod_revision=revision)
        answer = txn(pb.TxnRequest(compare=[same], success=[put(data)]))
        if not answer.succeeded:
            raise RuntimeError("somebody else writes to this etcd")
        revision = answer.header.revision

    return swap


def _txn(channel: grpc.Channel) -> Callable[[pb.TxnRequest], pb.TxnResponse]:
    txn: Txn = channel.unary_unary(
        TXN.path,
        request_serializer=pb.TxnRequest.SerializeToString,
        response_deserializer=pb.TxnResponse.FromString,
    )
    return txn


def _fill(server: str) -> None:
    """The WorkloadEndpoints to list, a hundred a transaction."""
    puts = [
        pb.RequestOp(
            request_put=pb.PutRequest(key=path_of(key, value).encode(), value=orjson.dumps(value))
        )
        for key, value in map(endpoint, range(OBJECTS))
    ]
    with grpc.insecure_channel(server) as channel:
        txn = _txn(channel)
        for first in range(0, len(puts), 100):
            txn(pb.TxnRequest(success=puts[first : first + 100]))
