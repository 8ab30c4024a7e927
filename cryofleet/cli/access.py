"""certificates, tokens: what a platform on several machines knows its processes and its users by."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from cryofleet.cli.options import json_option
from cryofleet.cli.output import print_json, print_table
from cryofleet.errors import FailedPrecondition
from cryofleet.settings import ROLES


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--name", "names", multiple=True, metavar="HOST", help="A host or address of the servers; may be repeated."
)
@click.option("--namespace", default="cryofleet", show_default=True, help="The platform's namespace in a cluster.")
@click.option("--days", default=365, show_default=True, help="How long they are valid.")
@click.option("--replace", is_flag=True, help="Make all of them anew where some are there.")
@json_option
def certificates(folder: Path, names: tuple[str, ...], namespace: str, days: int, replace: bool, as_json: bool) -> None:
    """Make a development set of certificates in FOLDER: an authority, each service's, the orchestrator's, a client's.

    For trying TLS out. A site that others rely on has its own authority, cert-manager for instance.
    """
    from cryofleet.access.certificates import make_set  # it loads much

    made = make_set(folder, names, namespace=namespace, days=days, replace=replace)
    if as_json:
        print_json(
            [
                {"name": m.name, "folder": str(m.folder), "names": list(m.names), "not_after": m.not_after.isoformat()}
                for m in made
            ]
        )
        return
    print_table(
        ["certificate", "folder", "valid until (UTC)", "names"],
        [[m.name, m.folder, m.not_after.strftime("%Y-%m-%d %H:%M"), " ".join(m.names)] for m in made],
    )
    click.echo(f"keep {made[0].folder} to yourself: who has its key can make certificates", err=True)


@click.group()
def tokens() -> None:
    """Make clients' tokens, and list those of a file."""


@tokens.command()
@click.option("--user", required=True, help="Whose token it is.")
@click.option("--role", type=click.Choice(ROLES), required=True, help="What the user may do.")
@click.option(
    "--project", "projects", multiple=True, help="A project that the user may use; may be repeated; '*' is all."
)
@click.option("--days", type=click.IntRange(min=1), help="Days that it is valid; for ever where left out.")
@json_option
def new(user: str, role: str, projects: tuple[str, ...], days: int | None, as_json: bool) -> None:
    """Make a token. It is printed this once; the platform keeps a hash of it alone."""
    from cryofleet.access.roles import Role
    from cryofleet.access.tokens import EVERY_PROJECT, new_entry

    parsed = Role.of(role)
    if not projects and parsed is not Role.ADMIN:
        raise click.UsageError("name the projects that the user may use: --project NAME")
    expires = None if days is None else datetime.now(UTC) + timedelta(days=days)
    token, entry = new_entry(user, parsed, projects or (EVERY_PROJECT,), expires)
    if as_json:
        print_json({"token": token, "line": entry.to_line()})
        return
    click.echo("token, for the user's CRYOFLEET_TOKEN or token file:", err=True)
    click.echo(token)
    click.echo("line to add to the file CRYOFLEET_TOKENS of the orchestrator and the io service:", err=True)
    click.echo(entry.to_line())


@tokens.command("list")
@click.argument("path", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@json_option
def list_(path: Path, as_json: bool) -> None:
    """List whose tokens FILE holds; its hashes are not shown."""
    from cryofleet.access.tokens import EVERY_PROJECT, read_entries

    try:
        entries, problems = read_entries(path.read_text().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise FailedPrecondition(f"cannot read {path}: {error}") from None
    now = datetime.now(UTC)
    rows = []
    for entry in entries:
        projects = [EVERY_PROJECT] if entry.projects is None else sorted(entry.projects)
        expires = "" if entry.expires is None else entry.expires.isoformat(timespec="seconds")
        rows.append(
            (entry.user, entry.role.word, projects, expires, entry.expires is not None and entry.expires <= now)
        )
    if as_json:
        names = ("user", "role", "projects", "expires", "expired")
        print_json([dict(zip(names, row, strict=True)) for row in rows])
    else:
        print_table(
            ["user", "role", "projects", "expires", ""],
            [
                (user, role, " ".join(projects), expires, "expired" if expired else "")
                for user, role, projects, expires, expired in rows
            ],
        )
    if problems:
        raise FailedPrecondition(f"{path}: {'; '.join(problems)}")


COMMANDS = (certificates, tokens)
