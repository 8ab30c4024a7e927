"""support-bundle: what others need to help."""

from __future__ import annotations

import os
from pathlib import Path

import click

from cryofleet.cli.options import json_option
from cryofleet.cli.output import print_json, size_text
from cryofleet.settings import Settings


@click.command("support-bundle")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--runs", default=50, show_default=True, type=click.IntRange(1, 1000), help="The newest so many runs.")
@click.option(
    "--log-mib", default=10, show_default=True, type=click.IntRange(0, 1000), help="The last so many MiB of the logs."
)
@json_option
def support_bundle(file: Path, runs: int, log_mib: int, as_json: bool) -> None:
    """Write FILE, a zip, for those who are to help: what doctor finds, settings, pools, runs, logs; no secrets."""
    from cryofleet.support_bundle import write_bundle  # it loads much

    settings = Settings.from_environment()
    missing = write_bundle(file, settings, os.environ, runs, log_mib * 1024**2)
    size = file.stat().st_size
    if as_json:
        print_json({"file": str(file), "size_bytes": size, "missing": missing})
        return
    for part, why in missing.items():
        click.echo(f"without {part}: {why}", err=True)
    click.echo(f"wrote {file}, {size_text(size)}; it names users, projects and files: look into it before you send it")


COMMANDS = (support_bundle,)
