"""backup, restore: the database and the store, elsewhere and back."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import click

from cryofleet import local
from cryofleet.backup import Vault, make_backup, restore_backup
from cryofleet.backup.statement import Statement
from cryofleet.cli.options import json_option
from cryofleet.cli.output import print_json, print_table, size_text
from cryofleet.settings import Settings


@click.command()
@click.argument("destination")
@click.option("--verify", is_flag=True, help="Read what is there already, and copy again what is damaged.")
@click.option("--keep", default=0, type=click.IntRange(0), help="Keep this many of the newest backups; 0 for all.")
@json_option
def backup(destination: str, verify: bool, keep: int, as_json: bool) -> None:
    """Back up the database and the store to DESTINATION, a folder or s3://bucket/folder.

    The platform may be up, and runs may go on. What an earlier backup has copied there is not copied again.
    """
    made = make_backup(Settings.from_environment(), destination, verify=verify, keep=keep)
    statement = made.statement
    if as_json:
        more = {"copied_objects": made.copied_objects, "copied_bytes": made.copied_bytes, "deleted": made.deleted}
        print_json({**_summary(statement), **more, "left_out": [asdict(each) for each in statement.left_out]})
    else:
        click.echo(
            f"backup {statement.name}: the database and {len(statement.objects)} objects, "
            f"{size_text(statement.size_bytes)}; copied {made.copied_objects}, {size_text(made.copied_bytes)}"
        )
        for problem in statement.left_out:
            click.echo(f"left out {problem.name}: {problem.cause}", err=True)
    if statement.left_out:
        sys.exit(3)


@click.command()
@click.argument("source")
@click.option("--backup", "name", default="", help="Which one; the newest where it is left out.")
@click.option("--list", "only_list", is_flag=True, help="List the backups that are there; restore nothing.")
@json_option
def restore(source: str, name: str, only_list: bool, as_json: bool) -> None:
    """Restore a backup from SOURCE into an empty store and an empty database; the platform must be down.

    The store may be another than before. Runs that went on when the backup was made go on once the platform is up.
    """
    settings = Settings.from_environment()
    if only_list:
        vault = Vault(source, settings)
        found = [_summary(vault.statement(each)) for each in vault.names()]
        if as_json:
            print_json(found)
        else:
            rows = [[each["backup"], each["objects"], size_text(each["size_bytes"]), each["store"]] for each in found]
            print_table(["backup", "objects", "size", "of"], rows)
        return
    restored = restore_backup(settings, source, name, lambda: local.is_up(settings))
    statement = restored.statement
    if as_json:
        more = {"copied_objects": restored.copied_objects, "copied_bytes": restored.copied_bytes}
        print_json({**_summary(statement), **more, "restored_to": restored.root})
    else:
        click.echo(
            f"restored backup {statement.name} to {restored.root}: the database and {len(statement.objects)} objects, "
            f"{size_text(statement.size_bytes)}, all verified; copied {restored.copied_objects}, "
            f"{size_text(restored.copied_bytes)}"
        )


def _summary(statement: Statement) -> dict[str, Any]:
    return {
        "backup": statement.name,
        "software": statement.software,
        "store": statement.root,
        "database": statement.database_kind,
        "objects": len(statement.objects),
        "size_bytes": statement.size_bytes,
    }


COMMANDS = (backup, restore)
