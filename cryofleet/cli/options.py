"""Options and argument forms that commands share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
import yaml

from cryofleet.settings import DEFAULT_PROJECT

F = TypeVar("F", bound=Callable[..., Any])

json_option: Callable[[F], F] = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
project_option: Callable[[F], F] = click.option(
    "--project", default=DEFAULT_PROJECT, show_default=True, envvar="CRYOFLEET_PROJECT", help="Whose results."
)


def key_values(settings: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE pairs as a mapping; a value that begins with [ or { is JSON, dots in a key nest.

    Raises click.BadParameter naming the pair.
    """
    mapping: dict[str, Any] = {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or not key:
            raise click.BadParameter(f"{setting!r} is not of the form KEY=VALUE")
        *holders, last = key.split(".")
        holder = mapping
        for name in holders:
            holder = holder.setdefault(name, {})
            if not isinstance(holder, dict):
                raise click.BadParameter(f"{setting!r}: {name} is a value already")
        holder[last] = _value(setting, text)
    return mapping


def _value(setting: str, text: str) -> Any:
    if text[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise click.BadParameter(f"{setting!r}: not JSON: {error}") from None
    # Numbers and true/false as YAML has them; dates and nulls stay text.
    value = yaml.safe_load(text) if text else ""
    return value if isinstance(value, (bool, int, float)) else text
