"""Backups: the orchestrator's database and the store's results, to a folder or to S3, and back.

A destination holds any number of backups. objects/xx/DIGEST are the objects of all of them, by their content digests,
so what is there already is not copied again; backups/NAME.json.gz, written last, lists what belongs to one of them.

The database is copied first, as it is at one moment, and the store after it. A result is in the store before the
database names it, so all that the copied database names is there when the store is copied. What has been added since is
copied too, and does no harm: it is found when it is asked for. The other way round, the database would name results
that were not yet there when the store was copied, and a run that goes on would miss them.
"""

from cryofleet.backup.making import Made, make_backup
from cryofleet.backup.restoring import Restored, restore_backup
from cryofleet.backup.vault import Vault

__all__ = ["Made", "Restored", "Vault", "make_backup", "restore_backup"]
