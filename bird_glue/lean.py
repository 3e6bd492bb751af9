"""Imported before all else by the agent: keeps out of its memory what it has no use for.

Every node runs it. Without ``_hashlib`` digests are the interpreter's own instead of those of
OpenSSL, whose library would be 3.5 MB of the process. With the Kubernetes API as datastore it is
there all the same, for TLS. And Pydantic looks for no plugins: to read what is installed would be
1 MB more.
"""

from __future__ import annotations

import sys
from types import ModuleType

# to import a name that stands for None raises ImportError, which hashlib and hmac are made for
sys.modules.setdefault("_hashlib", None)  # type: ignore[arg-type]

_plugins = ModuleType("pydantic.plugin._loader")
_plugins.get_plugins = tuple  # type: ignore[attr-defined] # there are none
sys.modules.setdefault(_plugins.__name__, _plugins)
