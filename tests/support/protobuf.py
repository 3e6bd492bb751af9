"""Message classes from .proto files: ``python -m tests.support.protobuf`` writes them anew."""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PROTO = "datastore/etcd.proto"
GENERATED = ("datastore/etcd_pb2.py", "datastore/etcd_pb2.pyi")


def generate(target: Path) -> None:
    """Write the classes below ``target``, as protoc of grpcio-tools makes them."""
    from grpc_tools import protoc

    arguments = ["protoc", f"-I{REPOSITORY}", f"--python_out={target}", f"--pyi_out={target}"]
    if protoc.main([*arguments, PROTO]) != 0:
        raise RuntimeError(f"{PROTO}: protoc failed")


if __name__ == "__main__":
    generate(REPOSITORY)
    sys.stdout.write(f"{', '.join(GENERATED)} written\n")
