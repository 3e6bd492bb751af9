"""A gRPC server in front of etcd: passes everything on but what it is told not to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc

from datastore import etcd_pb2 as pb
from datastore.etcd_client import TXN, WATCH
from tests.support.daemon import HOST


class EtcdFront(grpc.GenericRpcHandler):  # type: ignore[misc]
    """``endpoint`` is as good as etcd's, but for three things.

    ``told`` says what a watch is told in place of an answer; ``refuse`` with which status and
    words a call of a method is refused (None: it isn't); ``lose`` whether the answer to
    a transaction that was carried out is lost.
    """

    def __init__(self, target: str) -> None:
        self.told: Callable[[pb.WatchResponse], list[pb.WatchResponse]] = lambda answer: [answer]
        self.refuse: Callable[[str], tuple[grpc.StatusCode, str] | None] = lambda _: None
        self.lose: Callable[[pb.TxnRequest], bool] = lambda _: False
        self._channel = grpc.insecure_channel(target)
        self._server = grpc.server(ThreadPoolExecutor(8), handlers=[self])
        self.endpoint = f"{HOST}:{self._server.add_insecure_port(f'{HOST}:0')}"
        self._server.start()

    def close(self) -> None:
        """End everything."""
        self._server.stop(None).wait()
        self._channel.close()

    def service(self, details: Any) -> Any:
        """How a method is carried out: with the bytes as they are."""
        if details.method == WATCH.path:
            return grpc.stream_stream_rpc_method_handler(self._watch)

        def carry_out(request: bytes, context: Any) -> bytes:
            if refusal := self.refuse(details.method):
                context.abort(*refusal)
            answer: bytes = self._channel.unary_unary(details.method)(request, timeout=10)
            if details.method == TXN.path and self.lose(pb.TxnRequest.FromString(request)):
                context.abort(grpc.StatusCode.UNAVAILABLE, "the answer is lost")
            return answer

        return grpc.unary_unary_rpc_method_handler(carry_out)

    def _watch(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        call = self._channel.stream_stream(WATCH.path)(_until_it_ends(requests))
        context.add_callback(call.cancel)
        with suppress(grpc.RpcError):
            for answer in call:
                for told in self.told(pb.WatchResponse.FromString(answer)):
                    yield told.SerializeToString()


def _until_it_ends(requests: Iterator[bytes]) -> Iterator[bytes]:
    with suppress(grpc.RpcError):
        yield from requests
