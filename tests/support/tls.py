"""A mend of CPython's ``ssl`` for tests that cut connections."""

from __future__ import annotations

import ssl
from typing import Any


class ClosedIfReset(ssl.SSLSocket):
    """A socket that is closed if its peer has reset it before TLS begins.

    CPython 3.11 then leaves it open, for the garbage collector to warn of in whichever test runs at
    that moment: ``SSLSocket._create`` raises what ``recv`` says of it, and nobody has the socket.
    """

    def getpeername(self) -> Any:
        """See getpeername(2). Raises OSError."""
        try:
            return super().getpeername()
        except OSError as error:
            if self.version() is not None:  # TLS has begun
                raise
            try:
                self.recv(1)
            except ConnectionResetError as reset:
                self.close()
                raise reset from error
            raise


def mend() -> None:
    """From now on, in this process."""
    ssl.SSLContext.sslsocket_class = ClosedIfReset
