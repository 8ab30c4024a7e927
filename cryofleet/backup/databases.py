"""The orchestrator's database as one file, as it is at one moment, and back.

SQLite by its own online backup, PostgreSQL by pg_dump, whose custom format pg_restore reads without this program too.
Where the store is restored to another place, the URIs in the database are changed on the way in.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from cryofleet.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, Unavailable

SQLITE, POSTGRESQL = "sqlite", "postgresql"

Move = tuple[str, str]
"""The store's root in the backup, and where it is now."""


class Database(ABC):
    """One that can be copied and restored while nobody, and copied while everybody uses it."""

    kind: str

    @abstractmethod
    def dump(self, target: Path) -> None:
        """Copies it to a new file. Raises NotFound where there is none, Unavailable."""

    @abstractmethod
    def check_empty(self) -> None:
        """Raises FailedPrecondition where it is there and holds anything."""

    @abstractmethod
    def load(self, dump: Path, move: Move) -> None:
        """Restores it, whole or not at all. Raises FailedPrecondition where it is not empty."""


def open_database(url: str) -> Database:
    """The database of CRYOFLEET_DATABASE."""
    scheme = url.partition(":")[0].partition("+")[0]
    if scheme == "sqlite":
        return SqliteDatabase(Path(url.partition(":///")[2].partition("?")[0]))
    if scheme in ("postgresql", "postgres"):
        return PostgresDatabase(url)
    raise InvalidArgument(f"CRYOFLEET_DATABASE must begin with sqlite:/// or postgresql://, not {scheme}:")


class SqliteDatabase(Database):
    """A file."""

    kind = SQLITE

    def __init__(self, path: Path) -> None:
        self._path = path

    def dump(self, target: Path) -> None:
        if not self._path.is_file():
            raise NotFound(f"there is no database {self._path}")
        with (
            _sqlite_errors(self._path),
            closing(sqlite3.connect(f"file:{quote(str(self._path))}?mode=rw", uri=True, timeout=60)) as source,
            closing(sqlite3.connect(target)) as copy,
        ):
            # In one go: it reads what was there when it began, and writers go on beside it.
            source.backup(copy)
            # One file, without a log of writes beside it.
            copy.execute("PRAGMA journal_mode=DELETE")
            _check_whole(copy, self._path)

    def check_empty(self) -> None:
        if self._path.exists():
            raise FailedPrecondition(
                f"there is a database {self._path} already; a backup is restored where there is none"
            )

    def load(self, dump: Path, move: Move) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        unfinished = self._path.with_name(f".{self._path.name}-{uuid.uuid4().hex}")
        try:
            shutil.copyfile(dump, unfinished)
            unfinished.chmod(0o600)
            with _sqlite_errors(dump), closing(sqlite3.connect(unfinished)) as copy:
                _check_whole(copy, dump)
                with copy:
                    for old, new in _texts(move):
                        _replace_everywhere(copy, old, new)
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            try:
                # Not a rename, which would replace one that somebody has made meanwhile.
                os.link(unfinished, self._path)
            except FileExistsError:
                self.check_empty()
        finally:
            unfinished.unlink(missing_ok=True)


def _check_whole(connection: sqlite3.Connection, path: Path) -> None:
    (answer,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if answer != "ok":
        raise DataLoss(f"the database {path} is damaged: {answer}")


def _replace_everywhere(connection: sqlite3.Connection, old: str, new: str) -> None:
    tables = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite~_%' ESCAPE '~'"
    )
    for (table,) in tables.fetchall():
        for _, column, *_ in connection.execute(f'PRAGMA table_info("{table}")').fetchall():
            connection.execute(
                f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?) '
                f"""WHERE typeof("{column}") = 'text' AND instr("{column}", ?) > 0""",
                (old, new, old),
            )


@contextmanager
def _sqlite_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise Unavailable(f"the database {path}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise DataLoss(f"the database {path} is damaged: {error}") from error


class PostgresDatabase(Database):
    """One of a PostgreSQL server, which belongs to the platform alone."""

    kind = POSTGRESQL

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query))
        password = query.pop("password", None) or unquote(parts.password or "")
        # Command lines are seen by all users of a machine, environments are not.
        self._environment = {**os.environ, "PGPASSWORD": password} if password else dict(os.environ)
        self._environment.setdefault("PGCONNECT_TIMEOUT", "10")
        place = parts.netloc.rpartition("@")[2]
        user = f"{parts.username}@" if parts.username else ""
        self._url = f"postgresql://{user}{place}{parts.path}" + (f"?{urlencode(query)}" if query else "")

    def dump(self, target: Path) -> None:
        self._run("pg_dump", "--format=custom", "--no-owner", "--no-privileges", f"--file={target}", self._url)

    def check_empty(self) -> None:
        tables = self._run(
            "psql",
            *("--no-psqlrc", "--tuples-only", "--no-align", f"--dbname={self._url}"),
            "--command=SELECT schemaname || '.' || tablename FROM pg_catalog.pg_tables "
            "WHERE schemaname !~ '^pg_' AND schemaname <> 'information_schema' ORDER BY 1 LIMIT 1",
        ).strip()
        if tables:
            raise FailedPrecondition(f"the database has the table {tables}; a backup is restored into an empty one")

    def load(self, dump: Path, move: Move) -> None:
        script = dump.with_suffix(".sql")
        self._run("pg_restore", "--no-owner", "--no-privileges", "--no-comments", f"--file={script}", str(dump))
        with script.open("a") as file:
            file.writelines(_replace_in_postgres(old, new) for old, new in _texts(move))
        arguments = ("--no-psqlrc", "--quiet", "--single-transaction", "--set=ON_ERROR_STOP=1", f"--file={script}")
        self._run("psql", *arguments, f"--dbname={self._url}")

    def _run(self, program: str, *arguments: str) -> str:
        path = shutil.which(program)
        if path is None:
            raise FailedPrecondition(
                f"{program} is not installed here: install the client programs of PostgreSQL, "
                "of the server's version or a newer one"
            )
        done = subprocess.run(
            [path, *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            said = " ".join(done.stderr.split())[-500:]
            kind = Unavailable if "connection to server" in said else FailedPrecondition
            raise kind(f"{program} failed: {said}")
        return done.stdout


def _replace_in_postgres(old: str, new: str) -> str:
    """SQL that does so in every text of the tables of DBOS and of the record of runs."""
    old, new = (f"E'{text}'" for text in (_quoted(old), _quoted(new)))
    return f"""
DO $move$
DECLARE c record;
BEGIN
    FOR c IN
        SELECT table_schema, table_name, column_name
        FROM information_schema.columns JOIN information_schema.tables USING (table_schema, table_name)
        WHERE table_type = 'BASE TABLE' AND data_type IN ('text', 'character varying') AND is_generated = 'NEVER'
        AND table_schema !~ '^pg_' AND table_schema <> 'information_schema'
    LOOP
        EXECUTE format(
            'UPDATE %1$I.%2$I SET %3$I = replace(%3$I, %4$L, %5$L) WHERE position(%4$L in %3$I) > 0',
            c.table_schema, c.table_name, c.column_name, {old}, {new}
        );
    END LOOP;
END
$move$;
"""


def _quoted(text: str) -> str:
    if "$move$" in text:
        raise InvalidArgument(f"{text} can't be the root of a store that is restored")
    return text.replace("\\", "\\\\").replace("'", "\\'")


def _texts(move: Move) -> Iterable[Move]:
    """What is to be replaced by what: the roots as they are, and as JSON writes them, where that differs."""
    if move[0] == move[1]:
        return []
    plain = (f"{move[0]}/", f"{move[1]}/")
    in_json = (json.dumps(plain[0])[1:-1], json.dumps(plain[1])[1:-1])
    return [plain] if in_json == plain else [in_json, plain]
