"""Profile: rules and labels of the endpoints that name it.

With Kubernetes, every Namespace is a profile ``kns.<name>`` and every ServiceAccount a profile
``ksa.<namespace>.<name>``.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from api.fields import AtMost, is_subdomain
from api.metadata import CalicoResource, Checked, Fault, label_faults
from api.policy import Rule

# There is always a profile of this name, without labels, which allows everything.
DEFAULT_ALLOW = "projectcalico-default-allow"

# A ServiceAccount's name may be longer than the value of a label.
NAME_LABELS = frozenset(("pcns.projectcalico.org/name", "pcsa.projectcalico.org/name"))


class ProfileSpec(Checked):
    """spec of a Profile. An endpoint's own labels win over ``labels_to_apply``."""

    ingress: Annotated[list[Rule], AtMost(1024)] = Field(default_factory=list)
    egress: Annotated[list[Rule], AtMost(1024)] = Field(default_factory=list)
    labels_to_apply: dict[str, str] = Field(default_factory=dict)

    def faults(self) -> Iterator[Fault]:
        """Labels that no object can have, but for those that hold a name."""
        labels = {
            key: value
            for key, value in self.labels_to_apply.items()
            if not (key in NAME_LABELS and is_subdomain(value))
        }
        yield from label_faults(labels, ("labelsToApply",))


class Profile(CalicoResource):
    """What holds for endpoints that no policy selects, and labels they share."""

    kind: Literal["Profile"] = "Profile"
    spec: ProfileSpec = Field(default_factory=ProfileSpec)
