"""The roles, and what each method of the contract asks for: the one table that says so."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from cryofleet.errors import InvalidArgument
from cryofleet.operations import operations


class Role(IntEnum):
    """What a user may do; each role may do what those below it may."""

    VIEWER = 1
    """Reads: runs, results, what is stored."""
    OPERATOR = 2
    """Also works: starts and cancels runs, uploads, calls operations."""
    ADMIN = 3
    """Also keeps house, in every project: garbage, pools."""

    @property
    def word(self) -> str:
        """viewer, operator or admin."""
        return self.name.lower()

    @classmethod
    def of(cls, word: str) -> Role:
        """Raises InvalidArgument naming the roles."""
        try:
            return cls[word.upper()]
        except KeyError:
            known = ", ".join(role.word for role in cls)
            raise InvalidArgument(f"role is {word!r}; it must be one of {known}") from None


@dataclass(frozen=True)
class Rule:
    """What a method asks of its caller."""

    role: Role | None
    """The least role; None where nobody is asked who they are."""
    platform: bool = False
    """Whether another process of the platform may call it by its certificate alone."""
    every_project: bool = False
    """Whether an empty project in its request means every project that the caller may see, not the default one."""
    audited: bool = True
    """Whether calls that went well are in the audit log too; refused ones always are."""


_OPERATION = Rule(Role.OPERATOR, platform=True)
"""Of every operation: computing takes the site's machines and writes to its store."""

RULES: Mapping[str, Rule] = {
    # What every server answers.
    "grpc.health.v1.Health": Rule(None, audited=False),
    "grpc.reflection.v1.ServerReflection": Rule(Role.VIEWER, audited=False),
    "grpc.reflection.v1alpha.ServerReflection": Rule(Role.VIEWER, audited=False),
    "cryofleet.v1.RuntimeService/GetCapacity": Rule(Role.VIEWER, platform=True, audited=False),
    # Of the project that the request names.
    "cryofleet.v1.RuntimeService/GetLog": Rule(Role.VIEWER, platform=True, audited=False),
    "cryofleet.v1.RuntimeService/Estimate": Rule(Role.OPERATOR, platform=True),
    # The page.
    "cryofleet.v1.ViewerService/GetPage": Rule(Role.VIEWER),
    # Files.
    "cryofleet.v1.IoService/Upload": Rule(Role.OPERATOR),
    "cryofleet.v1.IoService/Download": Rule(Role.VIEWER),
    "cryofleet.v1.IoService/List": Rule(Role.VIEWER),
    # Many a second while somebody scrolls.
    "cryofleet.v1.IoService/CutSlice": Rule(Role.VIEWER, audited=False),
    # Runs.
    "cryofleet.v1.OrchestratorService/SubmitRun": Rule(Role.OPERATOR),
    "cryofleet.v1.OrchestratorService/EstimateRun": Rule(Role.OPERATOR),
    "cryofleet.v1.OrchestratorService/GetRun": Rule(Role.VIEWER),
    "cryofleet.v1.OrchestratorService/WatchRun": Rule(Role.VIEWER),
    "cryofleet.v1.OrchestratorService/ListRuns": Rule(Role.VIEWER, every_project=True),
    "cryofleet.v1.OrchestratorService/ReadLog": Rule(Role.VIEWER),
    "cryofleet.v1.OrchestratorService/CancelRun": Rule(Role.OPERATOR),
    "cryofleet.v1.OrchestratorService/ResumeRun": Rule(Role.OPERATOR),
    "cryofleet.v1.OrchestratorService/RetryRun": Rule(Role.OPERATOR),
    "cryofleet.v1.OrchestratorService/ForgetRun": Rule(Role.OPERATOR),
    "cryofleet.v1.OrchestratorService/PinArtifact": Rule(Role.OPERATOR),
    "cryofleet.v1.OrchestratorService/GetUsage": Rule(Role.VIEWER, every_project=True),
    # Inboxes.
    "cryofleet.v1.OrchestratorService/AddInbox": Rule(Role.OPERATOR),
    "cryofleet.v1.OrchestratorService/ListInboxes": Rule(Role.VIEWER, every_project=True),
    "cryofleet.v1.OrchestratorService/GetInbox": Rule(Role.VIEWER),
    "cryofleet.v1.OrchestratorService/PauseInbox": Rule(Role.OPERATOR),
    "cryofleet.v1.OrchestratorService/ResumeInbox": Rule(Role.OPERATOR),
    "cryofleet.v1.OrchestratorService/RemoveInbox": Rule(Role.OPERATOR),
    "cryofleet.v1.OrchestratorService/RetryInbox": Rule(Role.OPERATOR),
    # The platform.
    "cryofleet.v1.OrchestratorService/ListPipelines": Rule(Role.VIEWER),
    "cryofleet.v1.OrchestratorService/GetPools": Rule(Role.VIEWER, platform=True, audited=False),
    "cryofleet.v1.OrchestratorService/PausePool": Rule(Role.ADMIN),
    "cryofleet.v1.OrchestratorService/ResumePool": Rule(Role.ADMIN),
    "cryofleet.v1.OrchestratorService/CollectGarbage": Rule(Role.ADMIN, every_project=True),
}
"""By method as PACKAGE.SERVICE/METHOD, or by a whole service; operations, which the contract marks, have one rule."""


@functools.cache
def _operations() -> frozenset[str]:
    return frozenset(operation.full_name for operation in operations().values())


def rule_of(method: str) -> Rule | None:
    """The rule of a method as gRPC names it, /PACKAGE.SERVICE/METHOD; None where there is none: nobody may call it."""
    if method in _operations():
        return _OPERATION
    name = method.removeprefix("/")
    return RULES.get(name) or RULES.get(name.partition("/")[0])
