"""How a plan is carried out on any netlink table."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from kernel.netlink import Message, NetlinkSocket
from reconcile.plan import Plan

K = TypeVar("K")
V = TypeVar("V")


def apply_plan(
    socket: NetlinkSocket,
    plan: Plan[K, V],
    *,
    create: Callable[[V], Message],
    update: Callable[[V], Message],
    delete: Callable[[V], Message],
    gone: int,
) -> dict[K, OSError]:
    """Do the whole plan in one batch; returns the errors of the steps that failed.

    Creates and updates come before deletes, so that what moves to another key stays
    served. ``gone`` is the errno with which the kernel refuses to delete what isn't
    there; that is no error.
    """
    messages = [
        *map(create, plan.create.values()),
        *map(update, plan.update.values()),
        *map(delete, plan.delete.values()),
    ]
    failures = socket.batch(messages)
    if not failures:
        return {}
    first_delete = len(plan.create) + len(plan.update)
    steps = [*plan.create.items(), *plan.update.items(), *plan.delete.items()]
    errors: dict[K, OSError] = {}
    for failure in failures:
        if failure.index < first_delete or failure.errno != gone:
            key, value = steps[failure.index]
            errors[key] = failure.error(value)
    return errors
