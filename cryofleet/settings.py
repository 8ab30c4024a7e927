"""Settings of a process, from CRYOFLEET_* environment variables, with defaults for one machine."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryofleet.errors import InvalidArgument

SERVICES = ("io", "picking", "alignment", "learning", "simulation")
PROJECT_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
DEFAULT_PROJECT = "default"
ROLES = ("viewer", "operator", "admin")
PAGE_OFF = "off"
AUDIT_OFF, AUDIT_LOG = "off", "log"
"""Words for CRYOFLEET_AUDIT; anything else is the path of a file."""


def available_cores() -> int:
    """Cores that this process may use, which a container may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of mutual TLS: this process's certificate and key, and the authority of its peers."""

    certificate: Path
    key: Path
    authority: Path


@dataclass(frozen=True)
class S3Settings:
    """Where the S3 (MinIO) server is, and the account to use there."""

    endpoint: str = "localhost:9000"
    """Host and port, without scheme."""
    access_key: str = field(default="", repr=False)
    secret_key: str = field(default="", repr=False)
    secure: bool = True
    region: str = "us-east-1"


@dataclass(frozen=True)
class OidcSettings:
    """An OpenID Connect provider whose tokens are taken, and which of their claims say who the user is."""

    issuer: str
    """The claim iss of its tokens."""
    audience: str
    """What the claim aud must name: this platform."""
    jwks: str
    """Where its public keys are: an https URL, or a file."""
    user_claim: str = "sub"
    role_claim: str = "cryofleet_role"
    """Claims may be paths, as realm_access.roles."""
    projects_claim: str = "cryofleet_projects"
    roles: Mapping[str, str] = field(default_factory=lambda: {role: role for role in ROLES})
    """Words of the role's claim, and the roles that they give."""
    leeway_seconds: float = 30.0
    """By how much the clocks of the provider and of this platform may differ."""


@dataclass(frozen=True)
class Settings:
    """One process's settings; `from_environment` reads them."""

    home: Path
    """Everything of the local platform lies under it. CRYOFLEET_HOME"""
    store: str
    """URI of the root that results are written under. CRYOFLEET_STORE"""
    read_only_roots: tuple[str, ...] = ()
    """Further roots that inputs may be read from, separated by spaces. CRYOFLEET_READ_ONLY_ROOTS"""
    address: str = ""
    """What to listen on: unix:/path or host:port. CRYOFLEET_ADDRESS"""
    instance: str = field(default_factory=socket.gethostname)
    """This instance's own name, the same after a restart. CRYOFLEET_INSTANCE"""
    pools: Mapping[str, str] = field(default_factory=dict)
    """Where each service's instances are. CRYOFLEET_POOL_IO and so on:
    unix:/path, host:port, several separated by commas, or dns:///name:port."""
    orchestrator: str = ""
    """Where the orchestrator is. CRYOFLEET_ORCHESTRATOR"""
    database: str = field(default="", repr=False)
    """May hold a password. The orchestrator's database: sqlite:///path or postgresql://… CRYOFLEET_DATABASE"""
    pipelines: tuple[Path, ...] = ()
    """Folders of further pipelines, separated by colons. CRYOFLEET_PIPELINES"""
    page: str = "localhost:0"
    """Where the viewer serves the page: host:port, any free port where it is 0; off for no viewer. CRYOFLEET_PAGE"""
    page_origins: tuple[str, ...] = ()
    """Hosts (host:port) that browsers know the page by, behind a proxy for instance, separated by spaces.
    CRYOFLEET_PAGE_ORIGINS"""
    slots: int = 1
    """Operations that an instance works on at a time. CRYOFLEET_SLOTS"""
    threads: int = 1
    """Cores that one operation may use. CRYOFLEET_THREADS"""
    memory_bytes: int = 0
    """Memory that an instance's operations may use together; 0 for three quarters of the machine's.
    CRYOFLEET_MEMORY_BYTES"""
    scratch: Path | None = None
    """Folder for temporary files. CRYOFLEET_SCRATCH"""
    drain_seconds: float = 30.0
    """How long a stopping instance lets running operations go on. CRYOFLEET_DRAIN_SECONDS"""
    metrics_port: int = 0
    """Port of Prometheus metrics; 0 for none. CRYOFLEET_METRICS_PORT"""
    metrics_host: str = "127.0.0.1"
    """Interface of the metrics' port. CRYOFLEET_METRICS_HOST"""
    health_port: int = 0
    """Port of an open health service, which answers nothing else, for probes that have no certificate; 0 for none.
    CRYOFLEET_HEALTH_PORT"""
    pool_wait_seconds: float = 300.0
    """How long a task waits for a pool that has no instance. CRYOFLEET_POOL_WAIT_SECONDS"""
    log_level: str = "INFO"
    """CRYOFLEET_LOG_LEVEL"""
    tls: TlsFiles | None = None
    """CRYOFLEET_TLS_CERTIFICATE, CRYOFLEET_TLS_KEY, CRYOFLEET_TLS_AUTHORITY"""
    tokens: Path | None = None
    """File of the hashes of clients' tokens. CRYOFLEET_TOKENS"""
    oidc: OidcSettings | None = None
    """CRYOFLEET_OIDC_ISSUER, _AUDIENCE, _JWKS, _USER_CLAIM, _ROLE_CLAIM, _PROJECTS_CLAIM, _ROLES, _LEEWAY_SECONDS"""
    platform_names: tuple[str, ...] = (*SERVICES, "orchestrator")
    """Names in certificates whose bearers act for the platform, separated by spaces. CRYOFLEET_PLATFORM_NAMES"""
    audit: str = ""
    """Where calls are recorded: off, log, or a file; log where empty and the address is TCP. CRYOFLEET_AUDIT"""
    max_volume_bytes: int = 0
    """The largest volume or uploaded file that is taken; 0 for no limit. CRYOFLEET_MAX_VOLUME_BYTES"""
    reserve_bytes: int = 2**30
    """What is kept free on the disks of a store that is a folder, and of temporary files. CRYOFLEET_RESERVE_BYTES"""
    project_rules: Path | None = None
    """File of how much projects may store, and for how long (`cryofleet.project_rules`). CRYOFLEET_PROJECT_RULES"""
    max_runs_per_user: int = 0
    """Runs that a user may have going on; 0 for no limit. CRYOFLEET_MAX_RUNS_PER_USER"""
    token: str = field(default="", repr=False)
    """A client's bearer token; sent over TLS only. CRYOFLEET_TOKEN"""
    token_file: Path | None = None
    """A file that holds it instead, which its owner alone may read. CRYOFLEET_TOKEN_FILE"""
    s3: S3Settings = field(default_factory=S3Settings)
    """CRYOFLEET_S3_ENDPOINT, _ACCESS_KEY, _SECRET_KEY, _SECURE, _REGION"""

    @property
    def run_folder(self) -> Path:
        """Where the local platform's sockets are; only its owner may enter it."""
        return self.home / "run"

    @property
    def log_folder(self) -> Path:
        return self.home / "logs"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Raises InvalidArgument naming the variable whose value can't be read."""
        read = _Reader(os.environ if environment is None else environment)
        home = Path(read.text("HOME", str(Path.home() / ".cryofleet"))).expanduser().absolute()
        run_folder = home / "run"
        pools = {name: read.text(f"POOL_{name.upper()}", f"unix:{run_folder / name}.sock") for name in SERVICES}
        tls_files = [read.text(f"TLS_{name}", "") for name in ("CERTIFICATE", "KEY", "AUTHORITY")]
        if any(tls_files) and not all(tls_files):
            raise InvalidArgument(
                "CRYOFLEET_TLS_CERTIFICATE, CRYOFLEET_TLS_KEY and CRYOFLEET_TLS_AUTHORITY must be set together"
            )
        scratch, tokens, token_file, project_rules = (
            read.text(name, "") for name in ("SCRATCH", "TOKENS", "TOKEN_FILE", "PROJECT_RULES")
        )
        return cls(
            home=home,
            store=read.text("STORE", f"file://{home}/store").rstrip("/"),
            read_only_roots=tuple(root.rstrip("/") for root in read.text("READ_ONLY_ROOTS", "").split()),
            address=read.text("ADDRESS", ""),
            instance=read.text("INSTANCE", socket.gethostname()),
            pools=pools,
            orchestrator=read.text("ORCHESTRATOR", f"unix:{run_folder}/orchestrator.sock"),
            database=read.text("DATABASE", f"sqlite:///{home}/orchestrator.sqlite"),
            pipelines=tuple(Path(folder) for folder in read.text("PIPELINES", "").split(":") if folder),
            page=_page(read),
            page_origins=tuple(read.text("PAGE_ORIGINS", "").split()),
            slots=read.integer("SLOTS", available_cores(), least=1),
            threads=read.integer("THREADS", 1, least=1),
            memory_bytes=read.integer("MEMORY_BYTES", 0, least=0),
            scratch=Path(scratch) if scratch else None,
            drain_seconds=read.number("DRAIN_SECONDS", 30.0),
            metrics_port=read.integer("METRICS_PORT", 0, least=0),
            metrics_host=read.text("METRICS_HOST", "127.0.0.1"),
            health_port=read.integer("HEALTH_PORT", 0, least=0),
            pool_wait_seconds=read.number("POOL_WAIT_SECONDS", 300.0),
            log_level=read.text("LOG_LEVEL", "INFO").upper(),
            tls=TlsFiles(*(Path(name) for name in tls_files)) if all(tls_files) else None,
            tokens=Path(tokens) if tokens else None,
            oidc=_oidc(read),
            platform_names=tuple(read.text("PLATFORM_NAMES", " ".join((*SERVICES, "orchestrator"))).split()),
            audit=read.text("AUDIT", ""),
            max_volume_bytes=read.integer("MAX_VOLUME_BYTES", 0, least=0),
            reserve_bytes=read.integer("RESERVE_BYTES", 2**30, least=0),
            project_rules=Path(project_rules) if project_rules else None,
            max_runs_per_user=read.integer("MAX_RUNS_PER_USER", 0, least=0),
            token=read.text("TOKEN", "").strip(),
            token_file=Path(token_file).expanduser() if token_file else None,
            s3=S3Settings(
                endpoint=read.text("S3_ENDPOINT", "localhost:9000"),
                access_key=read.text("S3_ACCESS_KEY", ""),
                secret_key=read.text("S3_SECRET_KEY", ""),
                secure=read.boolean("S3_SECURE", True),
                region=read.text("S3_REGION", "us-east-1"),
            ),
        )


def _page(read: _Reader) -> str:
    page = read.text("PAGE", "localhost:0")
    host, separator, port = page.rpartition(":")
    if page != PAGE_OFF and not (separator and host and port.isdigit() and int(port) < 65536):
        raise InvalidArgument(f"CRYOFLEET_PAGE is {page!r}; it must be host:port, or {PAGE_OFF}")
    return page


def _oidc(read: _Reader) -> OidcSettings | None:
    issuer, audience, jwks = (read.text(f"OIDC_{name}", "") for name in ("ISSUER", "AUDIENCE", "JWKS"))
    if not any((issuer, audience, jwks)):
        return None
    if not all((issuer, audience, jwks)):
        raise InvalidArgument("CRYOFLEET_OIDC_ISSUER, CRYOFLEET_OIDC_AUDIENCE and CRYOFLEET_OIDC_JWKS go together")
    if "://" in jwks and not jwks.startswith("https://"):
        raise InvalidArgument(f"CRYOFLEET_OIDC_JWKS is {jwks!r}; it must be an https URL, or a file")
    roles = {}
    for pair in read.text("OIDC_ROLES", " ".join(f"{role}={role}" for role in ROLES)).split():
        word, separator, role = pair.rpartition("=")
        if not separator or role not in ROLES:
            raise InvalidArgument(f"CRYOFLEET_OIDC_ROLES has {pair!r}; it must be WORD=ROLE, of {', '.join(ROLES)}")
        roles[word] = role
    return OidcSettings(
        issuer=issuer,
        audience=audience,
        jwks=jwks,
        user_claim=read.text("OIDC_USER_CLAIM", "sub"),
        role_claim=read.text("OIDC_ROLE_CLAIM", "cryofleet_role"),
        projects_claim=read.text("OIDC_PROJECTS_CLAIM", "cryofleet_projects"),
        roles=roles,
        leeway_seconds=read.number("OIDC_LEEWAY_SECONDS", 30.0),
    )


class _Reader:
    """Reads CRYOFLEET_* variables and says which one is wrong."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def text(self, name: str, default: str) -> str:
        return self._environment.get(f"CRYOFLEET_{name}", default)

    def integer(self, name: str, default: int, least: int) -> int:
        value = self.text(name, str(default))
        try:
            number = int(value)
        except ValueError:
            raise InvalidArgument(f"CRYOFLEET_{name} is {value!r}; it must be a whole number") from None
        if number < least:
            raise InvalidArgument(f"CRYOFLEET_{name} is {number}; it must be at least {least}")
        return number

    def number(self, name: str, default: float) -> float:
        value = self.text(name, str(default))
        try:
            number = float(value)
        except ValueError:
            raise InvalidArgument(f"CRYOFLEET_{name} is {value!r}; it must be a number") from None
        if not 0 <= number < float("inf"):
            raise InvalidArgument(f"CRYOFLEET_{name} is {value}; it must be a finite number, 0 or more")
        return number

    def boolean(self, name: str, default: bool) -> bool:
        value = self.text(name, "true" if default else "false").lower()
        if value not in ("true", "false", "1", "0", "yes", "no"):
            raise InvalidArgument(f"CRYOFLEET_{name} is {value!r}; it must be true or false")
        return value in ("true", "1", "yes")
