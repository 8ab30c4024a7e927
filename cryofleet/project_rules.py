"""How much each project may store, and for how long: a site's own rules, from a file.

The file is YAML: a project's name, or `"*"` for all others, and its rules.

    "*": {quota_gib: 500, keep_days: 180}
    apoferritin: {quota_gib: 4000}

What a project's own entry leaves out is as `"*"` says; what that leaves out has no limit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.settings import PROJECT_PATTERN

logger = logging.getLogger(__name__)

EVERY_OTHER = "*"
_FIELDS = ("quota_gib", "keep_days")
_LEAST_KEEP_DAYS = 1.0


@dataclass(frozen=True)
class Rules:
    """One project's; 0 is no limit."""

    quota_bytes: int = 0
    """What may be stored."""
    keep_days: float = 0.0
    """For how long runs that have ended are kept, and what only they need."""


def read_rules(text: str) -> dict[str, Rules]:
    """The rules of each project that is named, and of `*`. Raises InvalidArgument naming the entry."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidArgument(f"it is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise InvalidArgument("it must map projects to their rules")
    others = _numbers(EVERY_OTHER, content.get(EVERY_OTHER, {}))
    found = {EVERY_OTHER: _rules(others)}
    for project, entry in content.items():
        if project == EVERY_OTHER:
            continue
        if not isinstance(project, str) or not PROJECT_PATTERN.fullmatch(project):
            raise InvalidArgument(f'project {project!r} must match {PROJECT_PATTERN.pattern}, or be "*"')
        found[project] = _rules({**others, **_numbers(project, entry)})
    return found


def _numbers(project: str, entry: Any) -> dict[str, float]:
    if not isinstance(entry, dict):
        raise InvalidArgument(f"{project}: its rules must be as {{quota_gib: 500, keep_days: 180}}")
    for name, value in entry.items():
        if name not in _FIELDS:
            raise InvalidArgument(f"{project}: there is no rule {name!r}; there are {', '.join(_FIELDS)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise InvalidArgument(f"{project}: {name} is {value!r}; it must be a number, 0 for no limit")
    if 0 < entry.get("keep_days", 0) < _LEAST_KEEP_DAYS:
        raise InvalidArgument(f"{project}: keep_days is {entry['keep_days']}; it must be at least 1, or 0")
    return entry


def _rules(numbers: Mapping[str, float]) -> Rules:
    return Rules(round(numbers.get("quota_gib", 0) * 2**30), float(numbers.get("keep_days", 0)))


class ProjectRules:
    """The rules of a file, as it is now."""

    def __init__(self, path: Path | None) -> None:
        """Without a file nothing is limited. Raises FailedPrecondition where it can't be read or is wrong."""
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self._rules = {EVERY_OTHER: Rules()}
        if path is not None:
            self._read(path)

    def of(self, project: str) -> Rules:
        """A project's rules."""
        rules = self.all()
        return rules.get(project, rules[EVERY_OTHER])

    def all(self) -> dict[str, Rules]:
        """By project, those of all others under `*`. What is wrong with a file that has changed is logged."""
        if self._path is not None:
            try:
                self._read(self._path)
            except FailedPrecondition as failure:
                # Once for each change; nobody's limits fall away by a slip of the pen.
                logger.error("the rules stay as they were: %s", failure)
        return self._rules

    def _read(self, path: Path) -> None:
        try:
            status = path.stat()
            seen = (status.st_ino, status.st_mtime_ns, status.st_size)
            if seen == self._seen:
                return
            self._seen = seen
            self._rules = read_rules(path.read_text())
        except InvalidArgument as failure:
            raise FailedPrecondition(f"the projects' rules {path}: {failure}") from None
        except (OSError, UnicodeDecodeError) as error:
            if self._seen == ():
                return
            self._seen = ()
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise FailedPrecondition(f"cannot read the projects' rules {path}: {reason}") from None
