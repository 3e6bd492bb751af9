"""A certificate authority for tests, by the openssl command."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support.daemon import HOST

NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30")


def openssl(*arguments: str) -> None:
    """Run openssl; its complaint is in the error."""
    done = subprocess.run(["openssl", *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"openssl {' '.join(arguments)}: {done.stderr}"


@dataclass(frozen=True)
class Certificate:
    """Files in PEM."""

    ca: Path
    cert: Path
    key: Path

    def client_context(self) -> ssl.SSLContext:
        """For a client that shows this certificate and trusts its authority alone."""
        context = ssl.create_default_context(cafile=str(self.ca))
        context.load_cert_chain(self.cert, self.key)
        return context


class Authority:
    """A CA of its own in a directory."""

    def __init__(self, directory: Path, name: str = "Manx test CA") -> None:
        self.directory = directory
        self.ca = directory / "ca.crt"
        self._key = directory / "ca.key"
        openssl(
            *("req", "-x509", *NEW_KEY, "-subj", f"/CN={name}"),
            *("-keyout", str(self._key), "-out", str(self.ca)),
        )

    def issue(self, name: str) -> Certificate:
        """A certificate for server and client of 127.0.0.1, with ``name`` as its common name."""
        made = Certificate(self.ca, self.directory / f"{name}.crt", self.directory / f"{name}.key")
        openssl(
            *("req", "-x509", *NEW_KEY, "-subj", f"/CN={name}"),
            *("-CA", str(self.ca), "-CAkey", str(self._key)),
            *("-addext", f"subjectAltName=IP:{HOST},DNS:localhost"),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
            *("-addext", "extendedKeyUsage=serverAuth,clientAuth"),
            *("-keyout", str(made.key), "-out", str(made.cert)),
        )
        return made
