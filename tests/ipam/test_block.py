"""The arithmetic of a block: Calico's own recorded traces, and what must never happen."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.errors import InvalidObjectError
from api.net import Net, host_net, parse_net
from api.registry import parse_as
from ipam.block import (
    WINDOWS_RESERVED,
    AffinityError,
    AssignedError,
    Block,
    BlockError,
    Cooldown,
    OutsideError,
    ReleaseError,
)
from tests.support import vectors


def traces() -> list[Any]:
    recorded = vectors.find("ipam_block_traces")
    if recorded is None:
        return [pytest.param(None, marks=pytest.mark.skip(vectors.absent()))]
    return [pytest.param(trace, id=trace["id"]) for trace in recorded["traces"]]


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
            addresses = [parse_net(text) for text in op["addresses"]]
            sequence = op.get("sequence_number")
            released = block.release(
                addresses,
                handle=handle,
                sequences={} if sequence is None else dict.fromkeys(addresses, sequence),
            )
            report: dict[str, Any] = {}
            if released.skipped:
                report["skipped"] = [str(net).partition("/")[0] for net in released.skipped]
            if released.by_handle:
                report["count_by_handle"] = released.by_handle
            return report
        case "release_handle":
            return {"count": len(block.release_handle(op["handle"]))}
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


def block_of(cidr: str) -> Block:
    return Block.new(parse_net(cidr), "host:n1", 1, None)


cidrs = st.sampled_from(["10.0.0.0/30", "10.0.0.248/29", "fd00::40/126"])
handles = st.sampled_from(["a", "b", "c"])


@settings(deadline=None)
@given(cidrs, st.data())
def test_addresses_are_given_once_and_rest_longest(cidr: str, data: st.DataObject) -> None:
    """Against a queue: taken from its head, given back to its tail."""
    block = block_of(cidr)
    queue = [host_net(block.net.version, block.net.address + i) for i in range(block.net.size)]
    held: dict[Net, str] = {}
    for _ in range(data.draw(st.integers(1, 12))):
        handle = data.draw(handles)
        match data.draw(st.sampled_from(["take", "address", "release", "handle"])):
            case "take":
                count = data.draw(st.integers(1, 3))
                assert block.take(count, handle, {"pod": handle}) == queue[:count]
                held.update(dict.fromkeys(queue[:count], handle))
                del queue[:count]
            case "address" if queue:
                address = data.draw(st.sampled_from(queue))
                block.take_address(address, handle, {"pod": handle})
                queue.remove(address)
                held[address] = handle
            case "release" if held:
                address = data.draw(st.sampled_from(sorted(held)))
                assert block.release([address]).by_handle == {held.pop(address): 1}
                queue.append(address)
            case "handle":
                back = sorted(address for address, holder in held.items() if holder == handle)
                assert block.release_handle(handle) == back
                queue += back
                held = {address: holder for address, holder in held.items() if holder != handle}
        block.sequence += 1
        assert Block.from_spec("b", json.loads(json.dumps(block.to_spec()))) == block
        assert [block.address(ordinal) for ordinal in block.unallocated] == queue
        for one in "abc":
            assert block.held_by(one) == sorted(a for a, holder in held.items() if holder == one)
        assert len(block.attributes) == len(set(held.values()))
        assert block.empty == (not held)


def test_reserved_addresses_are_passed_over_and_keep_their_place() -> None:
    block = block_of("10.0.0.0/29")
    reserved = [parse_net("10.0.0.0/31"), parse_net("10.0.0.3")]
    assert block.free(reserved) == 5
    assert block.take(2, "h", {}, reserved=reserved) == [
        parse_net("10.0.0.2"),
        parse_net("10.0.0.4"),
    ]
    assert block.unallocated == [0, 1, 3, 5, 6, 7]
    assert block.take(9, "h", {}, reserved=[parse_net("10.0.0.0/24")]) == []
    assert len(block.take(9, "h", {})) == 6


def test_a_block_of_another_is_refused() -> None:
    block = block_of("10.0.0.0/30")
    with pytest.raises(AffinityError, match="belongs to host:n1, not to host:n2"):
        block.take(1, "h", {}, only_for="host:n2")
    block.affinity = None
    with pytest.raises(AffinityError, match="belongs to nobody"):
        block.take_address(parse_net("10.0.0.1"), "h", {}, only_for="host:n1")
    assert block.empty


def test_an_address_in_use_or_outside_is_refused() -> None:
    block = block_of("10.0.0.0/30")
    block.take_address(parse_net("10.0.0.1"), "h", {})
    with pytest.raises(AssignedError, match=r"10\.0\.0\.1"):
        block.take_address(parse_net("10.0.0.1"), "i", {})
    for outside in ("10.0.0.4", "9.255.255.255", "fd00::1"):
        with pytest.raises(OutsideError, match="not in block"):
            block.take_address(parse_net(outside), "i", {})


def test_release_is_all_or_nothing() -> None:
    block = block_of("10.0.0.0/30")
    one, two = block.take(1, "h", {}) + block.take(1, "i", {})
    before = block.to_spec()
    with pytest.raises(ReleaseError, match="held by 'i', not by 'h'"):
        block.release([one, two], handle="h")
    with pytest.raises(ReleaseError, match="sequence number 1, not 2"):
        block.release([one], sequences={one: 2})
    assert block.to_spec() == before
    released = block.release([one, one, parse_net("10.0.0.3")], handle="h")
    assert released.addresses == [one]
    assert released.skipped == [parse_net("10.0.0.3")]


def test_several_released_at_once_rest_in_the_order_of_addresses() -> None:
    block = block_of("10.0.0.0/30")
    given = block.take(4, "h", {})
    block.release(reversed(given[1:]))
    assert block.unallocated == [1, 2, 3]


NOON = datetime(2026, 1, 2, 12, 0, 0, 500_000, tzinfo=UTC)


def after(seconds: float) -> Cooldown:
    return Cooldown(60, NOON + timedelta(seconds=seconds))


def test_an_address_rests_for_the_cooldown() -> None:
    block = block_of("10.0.0.0/30")
    one, two, three = block.take(3, "h", {"pod": "p"})
    block.sequence = 7
    assert block.release([two], cooldown=after(0)).by_handle == {"h": 1}
    assert block.release_handle("h", after(10)) == [one, three]
    spec = block.to_spec()
    assert spec["attributes"] == [
        {"releasedAt": "2026-01-02T12:00:01Z"},
        {"releasedAt": "2026-01-02T12:00:11Z"},
    ]
    assert (spec["allocations"], spec["unallocated"]) == ([1, 0, 1, None], [3])
    assert spec["sequenceNumberForAllocation"] == {"0": 1, "1": 7, "2": 1}
    parse_as("IPAMBlock", {"metadata": {"name": "10-0-0-0-30"}, "spec": spec})
    block = Block.from_spec("b", spec)
    assert not block.empty
    assert block.held_by("h") == []
    assert block.release([one]).skipped == [one]
    with pytest.raises(AssignedError):
        block.take_address(one, "i", {})
    assert not block.collect(after(60))
    assert block.collect(after(60.5))
    assert block.unallocated == [3, 1]
    assert not block.collect(after(70))
    assert block.collect(Cooldown(0, NOON))  # the setting was taken back
    assert block.unallocated == [3, 1, 0, 2]
    assert (block.attributes, block.sequences) == ([], {})


def test_a_release_frees_what_has_rested() -> None:
    block = block_of("10.0.0.0/30")
    block.take(2, "h", {})
    block.take(2, "i", {})
    block.release_handle("i", after(0))
    block.release_handle("h", after(61))
    assert block.unallocated == [2, 3]


def test_a_handle_from_a_file_with_carriage_returns() -> None:
    block = block_of("10.0.0.0/30")
    address = block.take(1, "net.0123\r\neth0", {})
    assert block.held_by("net.0123") == address
    assert block.release(address, handle="net.0123").by_handle == {"net.0123": 1}


def test_a_windows_block_in_which_nobody_is_counts_as_empty() -> None:
    block = block_of("10.0.0.0/29")
    block.take(3, WINDOWS_RESERVED, {"note": "windows host rsvd"})
    assert block.empty
    block.take(1, "h", {})
    assert not block.empty


def test_json_is_that_of_the_crd() -> None:
    block = Block.new(
        parse_net("10.0.0.0/30"), "host:n1", 1700000000000000000, "2026-01-02T03:04:05Z"
    )
    block.take(1, "h", {"pod": "p"})
    value = {
        "apiVersion": "projectcalico.org/v3",
        "kind": "IPAMBlock",
        "metadata": {"name": "10-0-0-0-30"},
        "spec": block.to_spec(),
    }
    parse_as("IPAMBlock", value)
    assert value["spec"] == {
        "cidr": "10.0.0.0/30",
        "affinity": "host:n1",
        "affinityClaimTime": "2026-01-02T03:04:05Z",
        "allocations": [0, None, None, None],
        "unallocated": [1, 2, 3],
        "attributes": [{"handle_id": "h", "secondary": {"pod": "p"}}],
        "sequenceNumber": 1700000000000000000,
        "sequenceNumberForAllocation": {"0": 1700000000000000000},
        "deleted": False,
        "strictAffinity": False,
    }
    block.affinity = block.claimed = None
    assert not {"affinity", "affinityClaimTime"} & block.to_spec().keys()


def replaced(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda spec: spec.__setitem__(path, value)


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (lambda spec: spec.pop("cidr"), "spec"),
        (lambda spec: spec.pop("unallocated"), "spec"),
        (replaced("cidr", "10.0.0.1/30"), "spec"),
        (replaced("sequenceNumber", "x"), "spec"),
        (replaced("allocations", [0]), "spec.allocations"),
        (replaced("allocations", [0, None, None, 1]), "spec.allocations[3]"),
        (replaced("allocations", [0, None, None, "0"]), "spec.allocations[3]"),
        (replaced("unallocated", [1, 2]), "spec.unallocated"),  # one lost
        (replaced("unallocated", [0, 1, 2, 3]), "spec.unallocated"),  # one given twice
        (replaced("unallocated", [1, 2, 2, 3]), "spec.unallocated"),
        (replaced("unallocated", [1, 2, 3, 4]), "spec.unallocated"),
        (replaced("attributes", [{"releasedAt": "noon"}]), "spec.attributes[0].releasedAt"),
    ],
)
def test_a_block_that_makes_no_sense_is_refused(
    spoil: Callable[[dict[str, Any]], None], field: str
) -> None:
    block = block_of("10.0.0.0/30")
    block.take(1, "h", {})
    spec = block.to_spec()
    spoil(spec)
    with pytest.raises(InvalidObjectError) as caught:
        Block.from_spec("10-0-0-0-30", spec)
    assert [problem.field for problem in caught.value.problems] == [field]
    assert caught.value.name == "10-0-0-0-30"
