"""The verbs of the CNI spec: from a request to the answer the runtime gets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import orjson

from api.errors import InvalidObjectError, Problem
from api.net import parse_interface
from cni import ipam_plugin
from cni.attaching import Attached, Job, Outcome, Wanted
from cni.attachment import Attachment
from cni.call import Call, parse_call
from cni.cluster import Found
from cni.config import VALID_ATTACHMENTS, find_version
from cni.delegate import Delegate, Lease
from cni.enforcement import Enforcement
from cni.errors import (
    ADDRESSES,
    ANNOTATIONS,
    INTERNAL,
    NOT_AS_ADDED,
    NOT_AVAILABLE,
    TRY_AGAIN_LATER,
    WIRING,
    CniError,
    invalid_configuration,
    invalid_environment,
)
from cni.features import IP_ADDRESSES, OUTSIDE_IPAM, Allowed
from cni.features import read as read_features
from cni.ipam_plugin import IpamPlugin
from cni.node import Node
from cni.protocol import Request
from cni.repair import known_attachments
from cni.result import previous_routes, result
from cni.server import Conversation, Reply
from datastore.interface import StoreError
from ipam.errors import IpamError
from kernel.netns import is_network_namespace, own_namespace, same_namespace

_log = logging.getLogger(__name__)

# Where the client says why it could not open CNI_NETNS.
_NETNS_ERROR = "MANX_NETNS_ERROR"
# Where it says by which name it was run.
_PLUGIN = "MANX_PLUGIN"
# Threads that take back ADDs that waited for felix in vain.
_TAKING_BACK = 8
# Seconds that a felix may need to be heard of by a daemon that has just started.
_FIRST_SECONDS = 2


@dataclass(frozen=True, slots=True)
class _Added:
    """A container that is wired: its ADD is answered when felix enforces its policy."""

    attachment: Attachment
    attached: Attached
    wanted: Wanted
    seconds: int
    result: dict[str, Any]


class Plugin:
    """Answers requests about one node.

    ``before_waiting`` is called by a thread that is about to wait for another plugin.
    """

    def __init__(
        self,
        node: Node,
        enforcement: Enforcement,
        before_waiting: Callable[[], object] = lambda: None,
    ) -> None:
        self._node = node
        self._enforcement = enforcement
        self._before_waiting = before_waiting
        self._late = ThreadPoolExecutor(_TAKING_BACK, "cni-late")
        self._ipam = IpamPlugin(node.cluster, node.allocator)
        self._own_namespace = own_namespace()

    def close(self) -> None:
        """Finish what goes on after an answer was late. Nothing may be asked any more."""
        self._late.shutdown()

    def handle(self, asked: Sequence[Conversation]) -> list[Conversation]:
        """Exit code and output for the runtime. Whatever goes wrong becomes an error object.

        Several at once only if ``is_add`` of each. Returns those that are not answered, and can't
        be but alone, because they have to wait for something.
        """
        adds: list[tuple[Conversation, Call]] = []
        for each in asked:
            request = each.request
            try:
                call = parse_call(request.environment, request.configuration)
                if is_add(request):
                    adds.append((each, call))
                else:
                    answer = self._answer(call, request)
                    each.reply(0, b"" if answer is None else _json(answer))
            except Exception as error:
                each.reply(*_report(request, error))
        return self._add_all(adds, alone=len(asked) == 1) if adds else []

    def _answer(self, call: Call, request: Request) -> dict[str, Any] | None:
        """To all but an ADD."""
        addresses_only = _is_ipam(request)
        if addresses_only and call.command != "STATUS":
            return self._answer_ipam(call)
        delegate = self._delegate(call, request)
        if delegate is not None or call.attachment is None:
            self._before_waiting()
        if call.attachment is None:
            if call.command == "STATUS":
                self._status(call, delegate, addresses_only)
            else:
                self._node.cluster.require_unlocked()
                self._collect_garbage(call, delegate)
            return None
        if call.command == "CHECK":
            self._require_namespace(request)
            self._check(call, call.attachment, request.netns_fd, delegate)
            return None
        self._node.cluster.require_unlocked()
        self._node.detach(call.attachment, delegate=delegate)
        _log.info("DEL %s", call.attachment)
        return None

    def _answer_ipam(self, call: Call) -> dict[str, Any] | None:
        """As the IPAM plugin of another main plugin."""
        if call.command != "CHECK":
            self._node.cluster.require_unlocked()
        if call.command == "GC":
            _require_valid_attachments(call)
        return self._ipam.answer(call)

    def _add_all(
        self, adds: Sequence[tuple[Conversation, Call]], *, alone: bool
    ) -> list[Conversation]:
        later: list[Conversation] = []
        jobs: list[Job] = []
        attachments = [call.attachment for _, call in adds if call.attachment is not None]
        try:
            found = self._node.cluster.look(attachments)
        except Exception as error:
            for asked, _ in adds:
                asked.reply(*_report(asked.request, error))
            return later
        for asked, call in adds:
            delegate = self._delegate(call, asked.request)
            if delegate is None or alone:
                try:
                    jobs.append(self._job(asked, call, delegate, found, later))
                except Exception as error:
                    asked.reply(*_report(asked.request, error))
            else:
                later.append(asked)
        if jobs:
            self._node.attach_all(jobs)
        return later

    def _job(
        self,
        asked: Conversation,
        call: Call,
        delegate: Delegate | None,
        found: Found,
        later: list[Conversation],
    ) -> Job:
        """``later``: where it is put if it can't be done now. Raises CniError, StoreError."""
        request, reply = asked.request, asked.reply
        attachment = call.attachment
        assert attachment is not None
        if delegate is not None:
            self._before_waiting()
        self._require_namespace(request)
        wanted = self._wanted(call, attachment, delegate, found)

        def then(outcome: Outcome) -> None:
            try:
                if isinstance(outcome, Attached):
                    added = self._added(call, attachment, outcome, wanted)
                    self._answer_when_enforced(request, added, reply)
                elif outcome is None:
                    later.append(asked)
                else:
                    reply(*_report(request, outcome))
            except Exception as error:
                reply(*_report(request, error))

        return Job(attachment, request.netns_fd, wanted, then)

    def _added(
        self, call: Call, attachment: Attachment, attached: Attached, wanted: Wanted
    ) -> _Added:
        dns = attached.lease.dns if attached.lease else {}
        answer = result(call, attached.wire, dns)
        return _Added(attachment, attached, wanted, call.configuration.policy_wait, answer)

    def _answer_when_enforced(self, request: Request, added: _Added, reply: Reply) -> None:
        """Wait until felix enforces the pod's policy, in no thread; 0 seconds: don't wait."""
        output = _json(added.result)

        def answer(enforced: bool | None) -> None:
            if enforced is None:  # it is complete, so the next daemon has nothing to do but wait
                reply(0, None)
            elif enforced:
                addresses = ", ".join(map(str, added.attached.wire.addresses))
                _log.info("ADD %s: %s", added.attachment, addresses)
                reply(0, output)
            else:
                self._late.submit(self._refuse, request, added, reply)

        if not added.seconds:
            answer(True)
            return
        attachment = added.attachment
        endpoint = attachment.endpoint_key(self._node.cluster.node)
        container = attachment.endpoint_container_id
        self._enforcement.when_enforced(endpoint, container, added.seconds, answer)

    def _refuse(self, request: Request, added: _Added, reply: Reply) -> None:
        """The policy was not enforced in time."""
        try:
            if added.attached.fresh:
                self._node.take_back(added.attachment, added.attached, added.wanted)
        finally:
            reply(*_report(request, self._unprotected(added.seconds)))

    def _wanted(
        self, call: Call, attachment: Attachment, delegate: Delegate | None, found: Found
    ) -> Wanted:
        configuration = call.configuration
        self._node.cluster.require_endpoint(attachment)
        pod = self._node.cluster.pod(attachment, found)
        namespace = self._node.cluster.namespace(attachment, found)
        permitted = configuration.feature_control
        features = read_features(
            f"{attachment.namespace}/{attachment.pod}",
            pod.metadata.annotations if pod else {},
            namespace.annotations if namespace else {},
            configuration.ipam.families,
            Allowed(permitted.ip_addrs_no_ipam, permitted.floating_ips),
            # another IPAM plugin is told of the address itself
            replace(call.asked, addresses=()) if delegate else call.asked,
        )
        if delegate and features.addresses and not features.outside_ipam:
            raise CniError(
                ANNOTATIONS,
                f"pod {attachment.namespace}/{attachment.pod}: annotation {IP_ADDRESSES}: expected"
                f" absent, since ipam.type is {delegate.kind}, which chooses addresses itself",
                "nothing was changed",
            )
        return Wanted(
            features,
            pod,
            namespace,
            configuration.mtu,
            None if features.outside_ipam else delegate,
            configuration.container_settings.allow_ip_forwarding,
        )

    def _unprotected(self, seconds: int) -> CniError:
        away = self._enforcement.away()
        felix = f"has been away for {away:.0f} s" if away else "runs, and has not done it"
        return CniError(
            TRY_AGAIN_LATER,
            f"the pod's policy is not enforced after {seconds} s (policy_setup_timeout_seconds):"
            f" felix {felix}; see manxctl node status",
        )

    def _delegate(self, call: Call, request: Request) -> Delegate | None:
        """The plugin that gives the addresses, where the configuration names another."""
        ipam = call.configuration.ipam
        if not ipam.delegated:
            return None
        pod_cidrs = self._node.cluster.pod_cidrs
        return Delegate(ipam.type, request.environment, request.configuration, pod_cidrs)

    def _require_namespace(self, request: Request) -> None:
        """CNI_NETNS must be a network namespace, and not the node's. Raises CniError."""
        path = request.environment.get("CNI_NETNS", "")
        if request.netns_fd < 0:
            why = request.environment.get(_NETNS_ERROR) or "required"
            raise invalid_environment("CNI_NETNS", path, why)
        if not is_network_namespace(request.netns_fd):
            raise invalid_environment("CNI_NETNS", path, "expected a network namespace")
        if same_namespace(request.netns_fd, self._own_namespace):
            raise invalid_environment(
                "CNI_NETNS", path, "expected a namespace other than the node's own"
            )

    def _check(
        self, call: Call, attachment: Attachment, netns_fd: int, delegate: Delegate | None
    ) -> None:
        """The wire against ``prevResult``: what plugins after us changed there is right."""
        assert call.previous is not None
        interfaces = call.previous.interfaces or []
        own = [
            (index, interface)
            for index, interface in enumerate(interfaces)
            if interface.name == attachment.ifname and interface.sandbox
        ]
        if not own:
            raise CniError(
                NOT_AS_ADDED, f"prevResult: interfaces: no {attachment.ifname} with a sandbox"
            )
        index, interface = own[0]
        addresses = {
            parse_interface(address.address)[0]
            for address in call.previous.ips or []
            if address.interface == index
        }
        mac = interface.mac or attachment.mac
        mtu = interface.mtu or 0
        lease = None
        pod = self._node.cluster.pod(attachment)
        outside_ipam = bool(pod and pod.metadata.annotations.get(OUTSIDE_IPAM))
        if delegate is not None and not outside_ipam:
            delegate.check()
        if delegate is not None or outside_ipam:
            lease = Lease(tuple(sorted(addresses)), previous_routes(call.previous))
        faults = self._node.faults(attachment, netns_fd, addresses, mac, mtu, lease)
        if faults:
            raise CniError(NOT_AS_ADDED, "; ".join(faults))

    def _status(self, call: Call, delegate: Delegate | None, addresses_only: bool) -> None:
        """Whether an ADD could be served now. Raises CniError with code 50."""
        try:
            self._node.cluster.require_unlocked()
            if delegate is not None:
                delegate.status()
            else:
                self._node.require_pools(call.configuration.ipam.families)
            seconds = call.configuration.policy_wait
            if seconds and not addresses_only:
                self._require_felix(seconds)
        except (StoreError, IpamError, CniError) as error:
            raise CniError(NOT_AVAILABLE, str(error)) from error

    def _require_felix(self, seconds: int) -> None:
        """Raise CniError where an ADD that waits for ``seconds`` could not succeed.

        A felix that was there may be restarting; one that was never there gets a moment.
        """
        away = self._enforcement.away()
        if not self._enforcement.known and away > min(seconds, _FIRST_SECONDS):
            raise CniError(
                NOT_AVAILABLE,
                f"felix has not been there since this daemon started, {away:.0f} s ago: no policy"
                " would be enforced; see manxctl node status",
            )
        if away > seconds:
            raise self._unprotected(seconds)

    def _collect_garbage(self, call: Call, delegate: Delegate | None) -> None:
        """Detach all of this network that the runtime does not list. Raises CniError."""
        _require_valid_attachments(call)
        listed = call.configuration.valid_attachments or []
        valid = {(item.container_id, item.ifname) for item in listed}
        errors = []
        for found in known_attachments(self._node):
            attachment = found.attachment
            if attachment.network != call.configuration.name:
                continue
            if (attachment.container_id, attachment.ifname) in valid:
                continue
            try:
                of_container = delegate.of(attachment) if delegate else None
                self._node.detach(attachment, found.interface, of_container)
                _log.info("GC %s: detached", attachment)
            except (StoreError, OSError, CniError) as error:
                errors.append(f"{attachment}: {error}")
        if delegate is not None:
            delegate.collect_garbage()
        if errors:
            raise CniError(TRY_AGAIN_LATER, f"{len(errors)} not collected", "; ".join(errors))


def is_add(request: Request) -> bool:
    """Whether a container is to be wired."""
    return request.environment.get("CNI_COMMAND") == "ADD" and not _is_ipam(request)


def _is_ipam(request: Request) -> bool:
    """Whether we are the IPAM plugin of another main plugin."""
    return request.environment.get(_PLUGIN) == ipam_plugin.NAME


def _require_valid_attachments(call: Call) -> None:
    """libcni writes an empty list as null; without the key nothing is known to be stale."""
    if "valid_attachments" not in call.configuration.model_fields_set:
        raise invalid_configuration([Problem(VALID_ATTACHMENTS, None, "required")])


def _report(request: Request, error: Exception) -> tuple[int, bytes]:
    """Exit code and error object; the log has it, too."""
    what = request.environment.get("CNI_COMMAND", "")
    container = request.environment.get("CNI_CONTAINERID", "")
    report = _explain(error)
    _log.warning("%s %s: error %d: %s", what, container, report.code, report.msg)
    return 1, _json(report.report(find_version(request.configuration)))


def _json(document: dict[str, Any]) -> bytes:
    return orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE)


def _explain(error: Exception) -> CniError:
    """The CNI error for what went wrong; what nobody foresaw goes to the log in full."""
    if isinstance(error, CniError):
        return error
    if isinstance(error, StoreError):
        return CniError(TRY_AGAIN_LATER, f"datastore: {error}")
    if isinstance(error, IpamError | InvalidObjectError):
        return CniError(ADDRESSES, str(error))
    if isinstance(error, OSError):
        return CniError(WIRING, str(error))
    _log.error("a fault of the daemon", exc_info=error)
    return CniError(INTERNAL, f"{type(error).__name__}: {error}", "the daemon's log says more")
