"""The arithmetic of a block: Calico's own recorded traces, and what must never happen."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.errors import InvalidObjectError
from api.net import Net, host_net, parse_net
from api.registry import parse_as
from ipam.block import AffinityError, AssignedError, Block, BlockError, ReleaseError

VECTORS = Path(__file__).parents[3] / "shared" / "vectors" / "ipam_block_traces.json.gz"


def traces() -> list[Any]:
    if not VECTORS.exists():
        return [pytest.param(None, marks=pytest.mark.skip(f"recorded traces absent: {VECTORS}"))]
    with gzip.open(VECTORS) as file:
        return [pytest.param(trace, id=trace["id"]) for trace in json.load(file)["traces"]]


def replay(block: Block, op: dict[str, Any]) -> dict[str, Any]:
    """Do one recorded operation and report in the words of the recording."""
    handle, secondary = op.get("handle"), op.get("attrs") or {}
    only_for = f"host:{op['host']}" if op.get("affinity_check") else None
    match op["op"]:
        case "auto":
            reserved = [parse_net(text) for text in op.get("reserved", ())]
            taken = block.take(op["num"], handle, secondary, only_for=only_for, reserved=reserved)
            length = block.net.length
            ips = [f"{str(net).partition('/')[0]}/{length}" for net in taken]
            return {"ips": ips} if ips else {}
        case "assign":
            block.take_address(parse_net(op["address"]), handle, secondary, only_for=only_for)
            return {}
        case "release":
            released = block.release(
                [parse_net(text) for text in op["addresses"]],
                handle=handle,
                sequence=op.get("sequence_number"),
            )
            report: dict[str, Any] = {}
            if released.skipped:
                report["skipped"] = [str(net).partition("/")[0] for net in released.skipped]
            if released.by_handle:
                report["count_by_handle"] = released.by_handle
            return report
        case "release_handle":
            return {"count": len(block.release_handle(handle))}
    raise AssertionError(op)


def comparable(spec: dict[str, Any]) -> dict[str, Any]:
    """Calico writes a missing affinity and empty attributes as null."""
    return {
        **{key: value for key, value in spec.items() if key != "strictAffinity"},
        "affinity": spec.get("affinity"),
        "attributes": spec["attributes"] or [],
    }


@pytest.mark.parametrize("trace", traces())
def test_recorded_trace(trace: dict[str, Any]) -> None:
    block = Block.new(parse_net(trace["cidr"]), trace["affinity"], 100, None)
    for step in trace["steps"]:
        before = json.dumps(block.to_spec())
        try:
            result = replay(block, step["op"])
            block.sequence += 1
        except BlockError as error:
            assert "error" in step["result"], f"{step['op']}: {error}"
            assert json.dumps(block.to_spec()) == before
        else:
            assert result == step["result"], step["op"]
        spec = block.to_spec()
        assert comparable(spec) == comparable(step["block"]), step["op"]
        reserved = [parse_net(text) for text in step["op"].get("reserved", ())]
        assert block.free(reserved) == step["free"]
        assert block.empty == step["empty"]
        assert Block.from_spec("b", json.loads(json.dumps(spec))) == block
