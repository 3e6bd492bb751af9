"""Secret of Kubernetes: passwords, by key."""

from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from api.kubernetes import KubernetesMeta
from api.metadata import Resource


class Secret(Resource):
    """Values by key: ``data`` in base64, ``string_data`` as they are, which wins over it.

    What a value should be is left to those who use it: a complaint would show it.
    """

    model_config = ConfigDict(extra="ignore")
    namespaced: ClassVar[bool] = True

    api_version: Literal["v1"] = "v1"
    kind: Literal["Secret"] = "Secret"
    metadata: KubernetesMeta
    type: str = "Opaque"
    immutable: bool | None = None
    data: Any = Field(default=None, repr=False)
    string_data: Any = Field(default=None, repr=False)
