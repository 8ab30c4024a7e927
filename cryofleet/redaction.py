"""What of the settings may be shown to others, and text without what may not.

A setting is shown where it is one of those known to be harmless and has the shape that such a setting has: a password
in a URL, or a token where a path belongs, is not of that shape. All else is named, and its value is hidden wherever it
comes up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from cryofleet.settings import PROJECT_PATTERN, SERVICES

HIDDEN = "(hidden)"
"""Stands where something was hidden."""
_PREFIX = "CRYOFLEET_"
_SHORTEST = 4
"""Shorter values would be found in every other word."""

_NUMBER = r"\d+(\.\d+)?"
_BOOLEAN = r"(?i:true|false|yes|no|0|1)"
_PATH = r"[/~][^@?&=\s:;,]*"
_HOST = r"(localhost|\[[0-9a-f:]+\]|[a-z0-9-]+(\.[a-z0-9-]+)+)(:\d+)?|[a-z0-9.-]+:\d+"
_ADDRESS = rf"(unix:{_PATH}|dns:///[a-z0-9.-]+:\d+|{_HOST})"
_ROOT = rf"(file://{_PATH}|s3://[a-z0-9.-]+(/[^@?&=\s:;,]*)?)"
_WORD = r"[a-z][a-z0-9._-]{0,62}"
_WEB = r"https?://[a-z0-9.-]+(:\d+)?(/[^@?&=\s:;,]*)?"

_SHAPES: dict[str, str] = {
    **dict.fromkeys(
        ("SLOTS", "THREADS", "MEMORY_BYTES", "DRAIN_SECONDS", "METRICS_PORT", "HEALTH_PORT", "POOL_WAIT_SECONDS"),
        _NUMBER,
    ),
    **dict.fromkeys(("MAX_VOLUME_BYTES", "MAX_RUNS_PER_USER", "OIDC_LEEWAY_SECONDS", "RESERVE_BYTES"), _NUMBER),
    **dict.fromkeys(("HOME", "SCRATCH", "TOKENS", "TOKEN_FILE", "PROJECT_RULES"), _PATH),
    **dict.fromkeys(("TLS_CERTIFICATE", "TLS_KEY", "TLS_AUTHORITY"), _PATH),
    **{f"POOL_{name.upper()}": rf"{_ADDRESS}(,\s*{_ADDRESS})*" for name in SERVICES},
    **dict.fromkeys(("ADDRESS", "ORCHESTRATOR"), _ADDRESS),
    **dict.fromkeys(("OIDC_AUDIENCE", "OIDC_USER_CLAIM", "OIDC_ROLE_CLAIM", "OIDC_PROJECTS_CLAIM"), _WORD),
    "STORE": _ROOT,
    "READ_ONLY_ROOTS": rf"{_ROOT}(\s+{_ROOT})*",
    "DATABASE": rf"sqlite:///{_PATH}",
    "PIPELINES": rf"{_PATH}(:{_PATH})*",
    "INSTANCE": _WORD,
    "PROJECT": PROJECT_PATTERN.pattern,
    "PAGE": rf"off|{_HOST}",
    "PAGE_ORIGINS": rf"({_HOST})(\s+({_HOST}))*",
    "METRICS_HOST": r"[0-9.]+|localhost|::1?",
    "LOG_LEVEL": r"(?i:debug|info|warning|error|critical)",
    "AUDIT": rf"off|log|{_PATH}",
    "PLATFORM_NAMES": r"[a-z0-9.*-]+(\s+[a-z0-9.*-]+)*",
    "OIDC_ISSUER": _WEB,
    "OIDC_JWKS": rf"{_WEB}|{_PATH}",
    "OIDC_ROLES": r"[a-z0-9._-]+=(viewer|operator|admin)(\s+[a-z0-9._-]+=(viewer|operator|admin))*",
    "S3_ENDPOINT": _HOST,
    "S3_SECURE": _BOOLEAN,
    "S3_REGION": r"[a-z]+(-[a-z]+)*-\d+",
}
"""Of settings that are harmless, without CRYOFLEET_, what their values look like; others are never shown."""
_OTHERS = {"OMP_NUM_THREADS": _NUMBER, "CUDA_VISIBLE_DEVICES": r"[\d,\s]*"}

_PATTERNS = (
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"\bcryofleet_[A-Za-z0-9_-]{32,}"),  # a token of ours
    re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"),  # a JWT
    re.compile(r"(?<=://)[^\s/@\"'<>]*@"),  # user and password of a URL
    re.compile(r"(?i)(?<=\bbearer )[\w.~+/=-]{8,}"),
    re.compile(r"(?i)\b(?:password|passwd|secret_key|access_key|secret)=[^\s&\"',;]+"),
)


def shown_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Every CRYOFLEET_ variable by name, with its value where that is harmless."""
    shown = {}
    for name, value in sorted(environment.items()):
        if name in _OTHERS or name.startswith(_PREFIX):
            shown[name] = value if _harmless(name, value) else HIDDEN if value else ""
    return shown


def _harmless(name: str, value: str) -> bool:
    shape = _OTHERS.get(name) or _SHAPES.get(name.removeprefix(_PREFIX))
    return shape is not None and re.fullmatch(shape, value) is not None


class Redaction:
    """Hides in any text what the settings keep secret, and what looks like a secret in itself."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        secrets: set[str] = set()
        for name, value in environment.items():
            if name.startswith(_PREFIX) and not _harmless(name, value):
                secrets |= _forms(value)
            if name == f"{_PREFIX}TOKEN_FILE":
                secrets |= _forms(_content(Path(value).expanduser()))
        # The longest first: one may be a part of another.
        found = sorted((s for s in secrets if len(s) >= _SHORTEST), key=len, reverse=True)
        self._secrets = re.compile("|".join(map(re.escape, found))) if found else None

    def hide(self, text: str) -> str:
        """The text without them."""
        if self._secrets is not None:
            text = self._secrets.sub(HIDDEN, text)
        for pattern in _PATTERNS:
            text = pattern.sub(HIDDEN, text)
        return text


def _forms(value: str) -> set[str]:
    """A secret as it may be written: alone, as a part of a URL, and in JSON."""
    value = value.strip()
    forms = {value}
    if "://" in value:
        authority = value.partition("://")[2].partition("/")[0].rpartition("@")[0]
        forms |= {authority.partition(":")[2], authority}
        try:
            forms |= {text for name, text in parse_qsl(urlsplit(value).query) if "password" in name}
        except ValueError:
            forms.add(value.partition("?")[2])
    else:
        # Where several stand in one setting.
        forms |= set(re.split(r"[\s,]+", value))
    forms |= {unquote(form) for form in forms}
    return forms | {json.dumps(form, ensure_ascii=ascii_only)[1:-1] for form in forms for ascii_only in (True, False)}


def _content(path: Path) -> str:
    try:
        return path.read_text()[:65536] if path.is_file() else ""
    except (OSError, UnicodeDecodeError):
        return ""
