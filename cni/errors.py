"""What a CNI plugin answers when it can't do what it was asked (CNI spec, section 5)."""

from __future__ import annotations

from api.errors import Problem

INCOMPATIBLE_VERSION = 1
INVALID_ENVIRONMENT = 4
IO_FAILURE = 5
DECODING_FAILURE = 6
INVALID_CONFIGURATION = 7
TRY_AGAIN_LATER = 11
NOT_AVAILABLE = 50

# 100 and above are ours to define; docs/cni.md lists them.
ADDRESSES = 100  # no address can be given
WIRING = 101  # the kernel refused
NOT_AS_ADDED = 102  # CHECK found a difference
ANNOTATIONS = 103  # the pod asks for something that can't be
NO_ENDPOINT = 104  # the datastore can't hold its endpoint, whatever the runtime tries
INTERNAL = 999  # a fault of ours; the daemon's log has the traceback


class CniError(Exception):
    """An answer that is an error. ``code``: see the constants above; ``msg`` is one line."""

    def __init__(self, code: int, msg: str, details: str = "") -> None:
        super().__init__(msg)
        self.code = code
        self.msg = msg
        self.details = details

    def report(self, cni_version: str) -> dict[str, object]:
        """The error object that goes to the runtime."""
        return {
            "cniVersion": cni_version,
            "code": self.code,
            "msg": self.msg,
            "details": self.details,
        }


def invalid_environment(variable: str, value: object, expected: str) -> CniError:
    """Code 4: an environment variable is missing or wrong."""
    return CniError(INVALID_ENVIRONMENT, str(Problem(variable, value, expected)))


def invalid_configuration(problems: list[Problem]) -> CniError:
    """Code 7: all that is wrong with the network configuration."""
    return CniError(
        INVALID_CONFIGURATION,
        "network configuration: " + "; ".join(str(problem) for problem in problems),
        "nothing was changed",
    )
