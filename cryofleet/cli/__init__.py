"""The command line."""

from __future__ import annotations

import sys

import click

from cryofleet import __version__
from cryofleet.cli import access, backup, formats, inbox, models, operations, platform, runs, storage, support, top
from cryofleet.errors import Failure

# What a script can tell a failure by; other failures exit with 1.
EXIT_CODES = {
    "INVALID_ARGUMENT": 2,
    "NOT_FOUND": 4,
    "UNAVAILABLE": 5,
    "PERMISSION_DENIED": 6,
    "UNAUTHENTICATED": 6,
    "FAILED_PRECONDITION": 7,
    "DATA_LOSS": 8,
}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="cryofleet")
def cli() -> None:
    """Cryofleet: from cryo-electron tomograms to identified, averaged structures.

    Exit codes: 0 done; 1 failed; 2 wrong argument; 3 done but for items set aside; 4 not found;
    5 platform or service not up; 6 not allowed; 7 an input in the wrong state; 8 damaged data; 130 interrupted.
    """


for group in (platform, runs, operations, storage, models, access, support, top, backup, formats, inbox):
    for command in group.COMMANDS:
        cli.add_command(command)


def main() -> None:
    """Run the command line; a failure is one line on stderr and an exit code."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except Failure as failure:
        click.echo(f"error: {failure.message}", err=True)
        sys.exit(EXIT_CODES.get(failure.status, 1))
