"""``-l``: a Calico selector, or kubectl's short ``key=value,other!=value``."""

from __future__ import annotations

import re
from collections.abc import Callable

import click

from datastore.interface import JSON

_EQUALITY = re.compile(r"\s*([\w./-]+)\s*(==|!=|=)\s*((?<=[^=]=)|[\w.-]+)\s*")


def label_filter(text: str | None) -> Callable[[JSON], bool]:
    """Whether an object's labels fit. Raises BadParameter."""
    if text is None:
        return lambda value: True
    from policy.selector import SelectorError, parse

    short = [_EQUALITY.fullmatch(part) for part in text.split(",")]
    if all(short):
        text = " && ".join(
            f'{found[1]} {"!=" if found[2] == "!=" else "=="} "{found[3]}"'
            for found in short
            if found
        )
    try:
        selector = parse(text)
    except SelectorError as error:
        raise click.BadParameter(str(error), param_hint="-l") from error
    return lambda value: selector.matches(_labels(value))


def _labels(value: JSON) -> dict[str, str]:
    metadata = value.get("metadata")
    labels = metadata.get("labels") if isinstance(metadata, dict) else None
    return labels if isinstance(labels, dict) else {}
